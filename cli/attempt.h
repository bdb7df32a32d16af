/* Tries of something that is supervised: pauses grow, and after some tries in a row without progress it is given up.
 * Starts nothing and prints nothing. */
#ifndef SH_CLI_ATTEMPT_H
#define SH_CLI_ATTEMPT_H

#include <stdbool.h>

typedef struct sh_attempt {
    int tries;         /* in a row that came to nothing */
    double not_before; /* sh_now() before which it is not started again */
    char reason[1024]; /* of the last failure */
} sh_attempt;

/* Notes a failure at `now`; progressed: the try that failed got something done. False: it is to be given up, being the
 * `most`-th in a row (or a later one) that did not. */
static inline bool sh_attempt_again(sh_attempt *a, bool progressed, int most, double now) {
    a->tries = progressed ? 1 : a->tries + 1;
    if (a->tries >= most) return false;
    a->not_before = now + 0.1 * (double)(1 << (a->tries < 10 ? a->tries : 10));
    return true;
}

#endif
