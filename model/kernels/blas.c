/*
 * The OpenBLAS path: only gemm, weights widened to f32 panel by panel and multiplied by sgemm. For CPUs without kernels
 * of their own; its sums are in OpenBLAS's order, so results depend on the CPU and on the shapes (never chosen by
 * itself).
 */
#include "model/kernels/kernels.h"

#include <cblas.h>
#include <string.h>

#define K_BLOCK 256 /* inputs widened at once: 32 KiB of stack */

static float widen(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static void blas_gemm(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int m, float *y, size_t ldy) {
    float wide[K_BLOCK][SH_PANEL];
    for (int p = p0; p < p1 && m > 0; p++) {
        const uint32_t *d = w->data + (size_t)p * (size_t)w->k * SH_LANES;
        int n = w->n - p * SH_PANEL < SH_PANEL ? w->n - p * SH_PANEL : SH_PANEL;
        for (int k0 = 0; k0 < w->k; k0 += K_BLOCK) {
            int kb = w->k - k0 < K_BLOCK ? w->k - k0 : K_BLOCK;
            for (int i = 0; i < kb; i++, d += SH_LANES) {
                for (int j = 0; j < SH_LANES; j++) {
                    wide[i][j] = widen(d[j] << 16);
                    wide[i][j + SH_LANES] = widen(d[j] & 0xffff0000u);
                }
            }
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, kb, 1.0f, x + k0, (int)ldx, wide[0], SH_PANEL,
                        k0 ? 1.0f : 0.0f, y + (size_t)p * SH_PANEL, (int)ldy);
        }
    }
}

void sh_kernels_fill_blas(sh_kernels *t) {
    openblas_set_num_threads(1); /* threads are linear.c's */
    t->gemm = blas_gemm;
}
