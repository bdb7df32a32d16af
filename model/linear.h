/* Matrix products over a team: splits weight panels over threads and rows into blocks. The result does not depend on
 * the split (kernels.h). */
#ifndef SH_MODEL_LINEAR_H
#define SH_MODEL_LINEAR_H

#include "model/kernels/kernels.h"
#include "model/team.h"

/* y [m, w->n] = x [m, w->k] · Wᵀ; strides in floats. */
void sh_linear(sh_team *t, const sh_kernels *kn, const sh_wmat *w, const float *x, size_t ldx, int m, float *y,
               size_t ldy);
/* Several matrices on the same rows in one parallel region: y[i] gets w[i]'s product (q, k, v; gate and up). count ≤ 4.
 */
void sh_linear_multi(sh_team *t, const sh_kernels *kn, int count, const sh_wmat *const *w, const float *x, size_t ldx,
                     int m, float *const *y, const size_t *ldy);

#endif
