/* Matrix products over a team: splits weight panels over threads and rows into blocks. The result does not depend on
 * the split (kernels.h). */
#ifndef SH_MODEL_LINEAR_H
#define SH_MODEL_LINEAR_H

#include "model/kernels/kernels.h"
#include "model/row_loop.h"
#include "model/team.h"

#define SH_LINEAR_MOST 4 /* matrices of one call */

/* y [m, w->n] = x [m, w->k] · Wᵀ; strides in floats. For quantised matrices x is quantised first, in the team's
 * scratch, which must hold sh_qrows_bytes of a row; it is done in one go when it holds all m rows. */
void sh_linear(sh_team *t, const sh_kernels *kn, const sh_wmat *w, const float *x, size_t ldx, int m, float *y,
               size_t ldy);
/* Several matrices on the same rows in one parallel region: y[i] gets w[i]'s product (q, k, v; gate and up). count ≤
 * SH_LINEAR_MOST; all of one type and one k. */
void sh_linear_multi(sh_team *t, const sh_kernels *kn, int count, const sh_wmat *const *w, const float *x, size_t ldx,
                     int m, float *const *y, const size_t *ldy);

/* What writes the rows of x before they are multiplied: a norm, an activation. */
typedef struct sh_row_maker {
    sh_row_loop_fn fn; /* for ranges of rows that together are all of them */
    void *arg;
    size_t width; /* values of work in a row */
} sh_row_maker;

/* sh_linear_multi on rows that are made first (make NULL: they are there), unless there is nothing to multiply. A row
 * that is quantised is so by the thread that has just made it, while it is in its cache. */
void sh_linear_made(sh_team *t, const sh_kernels *kn, int count, const sh_wmat *const *w, const sh_row_maker *make,
                    const float *x, size_t ldx, int m, float *const *y, const size_t *ldy);

/* Memory of `rows` rows quantised for a matrix of this type with k inputs, and the rows laid out in it. */
size_t sh_qrows_bytes(sh_wtype type, int k, int rows);
sh_qrows sh_qrows_place(sh_wtype type, int k, int rows, void *memory);

#endif
