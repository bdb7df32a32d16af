/* Sharing rows out. See row_loop.h. */
#include "model/row_loop.h"

typedef struct job {
    sh_row_loop_fn fn;
    void *arg;
    int n;
} job;

static void run_share(void *arg, int member, int size) {
    const job *j = arg;
    int lo, hi;
    sh_team_share(j->n, member, size, &lo, &hi);
    if (lo < hi) j->fn(j->arg, lo, hi);
}

void sh_row_loop_run(sh_team *t, int n, size_t width, sh_row_loop_fn fn, void *arg) {
    if (n <= 0) return;
    if (n == 1 || (size_t)n * width < SH_ROW_LOOP_ALONE || sh_team_size(t) == 1) {
        fn(arg, 0, n);
        return;
    }
    job j = {.fn = fn, .arg = arg, .n = n};
    sh_team_run(t, run_share, &j);
}
