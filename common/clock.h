/* Time: monotonic seconds and sleeping. */
#ifndef SH_COMMON_CLOCK_H
#define SH_COMMON_CLOCK_H

#include <time.h>

static inline double sh_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void sh_sleep(double seconds) {
    struct timespec t = {.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
}

#endif
