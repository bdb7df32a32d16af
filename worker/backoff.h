/* Waiting without burning a core that another rank needs: spin for 50 µs, then sleep, longer each time: up to 0.2 ms
 * while work is likely to come soon, up to 1 ms after that. */
#ifndef SH_WORKER_BACKOFF_H
#define SH_WORKER_BACKOFF_H

#include "common/clock.h"

typedef struct sh_backoff {
    double since; /* 0: something happened a moment ago */
    double nap;
    double idle; /* seconds waited in all */
} sh_backoff;

/* Something happened. */
static inline void sh_backoff_reset(sh_backoff *b) {
    if (b->since > 0) b->idle += sh_now() - b->since;
    b->since = b->nap = 0;
}

/* Nothing happened: waits a little. */
static inline void sh_backoff_wait(sh_backoff *b) {
    double now = sh_now();
    if (b->since <= 0) b->since = now;
    if (now - b->since < 50e-6) return;
    double most = now - b->since < 20e-3 ? 0.2e-3 : 1e-3;
    b->nap = b->nap <= 0 ? 20e-6 : b->nap * 1.5 < most ? b->nap * 1.5 : most;
    sh_sleep(b->nap);
}

#endif
