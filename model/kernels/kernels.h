/*
 * The kernel table: every inner loop whose speed matters, once per instruction set.
 *
 * ref.c (plain C, fmaf) DEFINES the arithmetic; each other file overwrites the entries it has and reproduces the plain
 * C result bit for bit (tests/kernels). Rules that make this possible, for every entry:
 *   - one f32 accumulator per output element, fused multiply-add in ascending order of the summed index;
 *   - vector lanes lie along outputs; where a row itself is reduced (norms, q·k, sums), 16 virtual lanes: lane i takes
 *     elements i, i+16, i+32, … in order by fma/add starting from 0, then the lanes join by the fixed tree
 *     (i, i+8), (i, i+4), (i, i+2), (i, i+1);
 *   - a multiplication followed by an addition is fused only where the comment says fma;
 *   - exp, tanh and so on are the polynomials of ref.c, evaluated alike.
 * Kernels run on one thread, allocate nothing and know no ranks. Threads are linear.c's and the callers' business.
 */
#ifndef SH_MODEL_KERNELS_H
#define SH_MODEL_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "common/status.h"

#define SH_LANES 16
#define SH_PANEL 32 /* outputs per weight panel */

/*
 * A weight matrix [n outputs, k inputs] in bf16, packed in panels of 32 outputs: panel p holds outputs 32p … 32p+31;
 * for each input kk there are 16 words of 32 bits; word j has output 32p+j in its low half and output 32p+16+j in its
 * high half. The last panel is padded with zeros. The layout is the same for every instruction set.
 */
typedef struct sh_wmat {
    int32_t n, k;
    const uint32_t *data; /* sh_wmat_panels(n) * k * 16 words, 64-byte aligned; borrowed */
} sh_wmat;
static inline int sh_wmat_panels(int n) {
    return (n + SH_PANEL - 1) / SH_PANEL;
}
static inline size_t sh_wmat_bytes(int n, int k) {
    return (size_t)sh_wmat_panels(n) * (size_t)k * 64;
}

typedef struct sh_kernels {
    const char *isa; /* "ref", "avx2", "avx512", "blas", "model" */
    bool modelled;   /* "model": takes the time of a rank with given rates; its one thread stands for all of them */

    /* y[r, i] = Σ_k fma(x[r, k], W[i, k]) for rows r < m and outputs i of panels [p0, p1) that are < w->n. Strides in
     * floats. y must not overlap x. Any m ≥ 0. */
    void (*gemm)(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int m, float *y, size_t ldy);

    /* y[i] = (x[i] · s) · w[i] with s = 1 / sqrtf(Σx²/n + eps), the sum by 16 virtual lanes with fma; w NULL: x[i] · s.
     * y may be x. */
    void (*rmsnorm)(float *y, const float *x, const float *w, int n, float eps);
    /* Rotates pairs (j, j+half), j < pairs: (u, v) → (fma(u, c, -(v·s)), fma(v, c, u·s)). */
    void (*rope)(float *x, const float *cs, const float *sn, int half, int pairs);
    /* y[i] = gelu_tanh(gate[i]) · up[i]; y may be gate or up. */
    void (*gelu_mul)(float *y, const float *gate, const float *up, int n);
    void (*add)(float *y, const float *x, int n);            /* y += x */
    void (*scale)(float *y, const float *x, float s, int n); /* y = x · s; y may be x */
    void (*axpy)(float *y, float a, const float *x, int n);  /* y = fma(a, x, y) */
    void (*softcap)(float *x, float cap, int n);             /* x = tanh(x / cap) · cap */
    void (*from_bf16)(float *y, const uint16_t *x, int n);
    void (*to_bf16)(uint16_t *y, const float *x, int n); /* round to nearest even; NaN stays NaN */

    /* Attention inner loops over one segment of keys. q rows [rows, hd] with stride ldq; k and v tiles [keys, hd] f32,
     * stride hd. hd is any positive number.
     * s[r·lds + j] = q_r · k_j, by 16 virtual lanes along hd (fma) and the fixed tree. */
    void (*scores)(float *s, size_t lds, const float *q, size_t ldq, int rows, const float *k, int keys, int hd);
    /* For one row of scores: m = max, p[j] = exp(s[j] − m) in place, l = Σ p by 16 virtual lanes. keys ≥ 1. */
    void (*softmax_part)(float *s, int keys, float *m, float *l);
    /* o[r·ldo + d] = Σ_j fma(p[r·lds + j], v[j, d]) in ascending j, from 0. */
    void (*weighted_sum)(float *o, size_t ldo, const float *p, size_t lds, int rows, const float *v, int keys, int hd);
    /* Joins two parts of one row, a before b: m = max(ma, mb); ea = exp(ma − m), eb = exp(mb − m);
     * oa = fma(eb, ob, ea · oa); la = fma(eb, lb, ea · la); ma = m. Neither is empty. */
    void (*merge)(float *oa, float *ma, float *la, const float *ob, float mb, float lb, int hd);

    /* m = max x, s = Σ exp(x − m) by 16 virtual lanes: one segment (≤ 1,024 entries) of a log-sum-exp. n ≥ 1. */
    void (*max_sum_exp)(const float *x, int n, float *m, float *s);
    void (*exp)(float *y, const float *x, int n);
    /* Sines and cosines of n angles (any size: full range reduction). */
    void (*sincos)(float *sn, float *cs, const float *angle, int n);
} sh_kernels;

/* The best table for this CPU, or the one SHOAL_ISA (ref|avx2|avx512|blas|model:FMA,BYTES) lowers it to. A level that
 * this CPU lacks or an unknown name is an error naming what is allowed. The table is static; nobody frees it. */
sh_status sh_kernels_select(const sh_kernels **out);
/* A level by name; SH_EUNSUPPORTED when the CPU or the build lacks it. For tests and `doctor`. A process has one pair
 * of rates: another model:… than the first is SH_EINPUT. */
sh_status sh_kernels_get(const char *isa, const sh_kernels **out);
/* All names of levels that compute, lowest first, NULL-terminated (also those this CPU lacks). */
extern const char *const sh_kernels_levels[];

/* Fill-in functions of the levels, called bottom up by select.c. */
void sh_kernels_fill_ref(sh_kernels *t);
void sh_kernels_fill_avx2(sh_kernels *t);
void sh_kernels_fill_avx512(sh_kernels *t);
void sh_kernels_fill_blas(sh_kernels *t);                         /* after sh_blas_load */
sh_status sh_kernels_fill_model(sh_kernels *t, const char *spec); /* spec: "FMA,BYTES"; SH_EINPUT says how */

/* Opens OpenBLAS, once per process; SH_EUNSUPPORTED when it is missing. Where it does not know the CPU and falls back
 * to kernels of an old one, it is opened again with OPENBLAS_CORETYPE set to what the CPU has. Not before it is needed:
 * its start costs memory. Set no environment from other threads meanwhile. */
sh_status sh_blas_load(void);
/* For `shoal doctor`: loads OpenBLAS and writes one line, version and core, to text[n]. SH_EUNSUPPORTED (with the
 * reason in sh_error_text, and text written too unless the library is missing) when it is missing or runs an old CPU's
 * kernels. */
sh_status sh_blas_check(char *text, size_t n);

/* One exp and one log for scalar callers (sampler): the same polynomial as the table's. */
float sh_expf(float x);
float sh_logf(float x);

/* Packs a row-major bf16 matrix [n, k] with row stride ld (elements) into panels [p0, p1) of dst (sh_wmat layout). */
void sh_pack_bf16(uint32_t *dst, const uint16_t *src, size_t ld, int n, int k, int p0, int p1);

#endif
