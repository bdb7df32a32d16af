/* A loop over rows, shared by a team when there is enough to do; small loops stay on the calling thread, where waking
 * the others would cost more. What a row gives must not depend on which thread or call handles it. */
#ifndef SH_MODEL_ROW_LOOP_H
#define SH_MODEL_ROW_LOOP_H

#include <stddef.h>
#include "model/team.h"

#define SH_ROW_LOOP_ALONE 65536 /* values below which a loop is not worth a parallel region */

/* Handles rows [lo, hi). */
typedef void (*sh_row_loop_fn)(void *arg, int lo, int hi);

/* fn over rows [0, n), each about `width` values of work. */
void sh_row_loop_run(sh_team *t, int n, size_t width, sh_row_loop_fn fn, void *arg);

#endif
