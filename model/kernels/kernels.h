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

/* How the weights of a matrix are stored. */
typedef enum sh_wtype { SH_W_BF16, SH_W_Q8, SH_W_Q4, SH_W_TYPES } sh_wtype;

#define SH_Q8_GROUP 64 /* inputs that share a scale; docs/decisions/0027 has the measurements */
#define SH_Q4_GROUP 32

/*
 * A weight matrix [n outputs, k inputs], packed in panels of 32 outputs: panel p holds outputs 32p … 32p+31, the last
 * one padded with zeros. The layout is the same for every instruction set.
 *   bf16    for each input kk there are 16 words of 32 bits; word j has output 32p+j in its low half and output
 * 32p+16+j in its high half. q8, q4  quant.h
 */
typedef struct sh_wmat {
    int32_t n, k;
    sh_wtype type;
    const uint32_t *data; /* sh_wmat_bytes, 64-byte aligned; borrowed */
} sh_wmat;
static inline int sh_wmat_panels(int n) {
    return (n + SH_PANEL - 1) / SH_PANEL;
}
static inline int sh_wtype_group(sh_wtype t) {
    return t == SH_W_Q8 ? SH_Q8_GROUP : t == SH_W_Q4 ? SH_Q4_GROUP : 1;
}
/* Groups along k of a quantised matrix; the last one may be short, and is then padded with zeros. */
static inline int sh_wtype_groups(sh_wtype t, int k) {
    return (k + sh_wtype_group(t) - 1) / sh_wtype_group(t);
}
/* Bytes of one group of one panel: 32 scales of two bytes, then the codes. */
static inline size_t sh_wtype_block(sh_wtype t) {
    return 2 * SH_PANEL + (size_t)SH_PANEL * (t == SH_W_Q8 ? SH_Q8_GROUP : SH_Q4_GROUP / 2);
}
static inline size_t sh_wmat_bytes(sh_wtype t, int n, int k) {
    size_t panels = (size_t)sh_wmat_panels(n);
    return t == SH_W_BF16 ? panels * (size_t)k * 64 : panels * (size_t)sh_wtype_groups(t, k) * sh_wtype_block(t);
}

/* Rows of 8-bit activations, quantised in the groups of the matrix that they meet: x ≈ scale · code. Borrowed. */
typedef struct sh_qrows {
    int8_t *code; /* [rows, ld] */
    float *scale; /* [rows, groups] */
    int32_t *sum; /* [rows, groups]: of the codes of a group */
    size_t ld;    /* bytes of a row of codes: groups · group */
    size_t groups;
} sh_qrows;

/*
 * Keys and values in 8 bits (the KV type q8). A vector of n values is n codes (int8_t), then one f32 scale for each
 * group of SH_KV8_GROUP values, unaligned; the last group may be short. x ≈ scale · code.
 */
#define SH_KV8_GROUP 64 /* values of a vector that share a scale; docs/decisions/0030 has the measurements */
static inline int sh_kv8_groups(int n) {
    return (n + SH_KV8_GROUP - 1) / SH_KV8_GROUP;
}
static inline size_t sh_kv8_bytes(int n) {
    return (size_t)n + sizeof(float) * (size_t)sh_kv8_groups(n);
}

typedef struct sh_kernels {
    const char *isa; /* "ref", "avx2", "avxvnni", "avx512", "avx512vnni", "amx", "blas", "model" */
    bool modelled;   /* "model": takes the time of a rank with given rates; its one thread stands for all of them */

    /* y[r, i] = Σ_k fma(x[r, k], W[i, k]) for rows r < m and outputs i of panels [p0, p1) that are < w->n. Strides in
     * floats. y must not overlap x. Any m ≥ 0. */
    void (*gemm)(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int m, float *y, size_t ldy);

    /* One group of weights: scale (bits of a half) and codes; quant.h. q8 [SH_Q8_GROUP]: zero at 128. q4 [SH_Q4_GROUP]:
     * zero at 8; of the scales that put the largest weight on a code, the first with the least squared error, so
     * weights that lie on a grid of 16 values already come back on it. Infinities and NaN: scale NaN. */
    uint16_t (*quant_q8)(const float *w, uint8_t *code);
    uint16_t (*quant_q4)(const float *w, uint8_t *code);
    /* One row x [k] of activations in groups of `group`: code = x · (127 / a) rounded to nearest even, scale = a · (1 /
     * 127), a the largest absolute value of the group. A group with an infinity or a NaN gets scale NaN and codes 0,
     * one with a < 2^−100 scale 0 and codes 0. The last group is padded with codes 0. */
    void (*quantize)(const float *x, int k, int group, int8_t *code, float *scale, int32_t *sum);
    /* The same product for a quantised matrix and rows [r0, r0+m) of x, quantised in the matrix's groups; y has m rows.
     * Per group g: s = Σ_k code_w[i, k] · code_x[r, k], exact; then, in ascending g and starting from 0,
     * y = fma(s, scale_w[i, g] · scale_x[r, g], y). */
    void (*gemm_q)(const sh_wmat *w, int p0, int p1, const sh_qrows *x, int r0, int m, float *y, size_t ldy);

    /* y[i] = (x[i] · s) · w[i] with s = 1 / sqrtf(Σx²/n + eps), the sum by 16 virtual lanes with fma; w NULL: x[i] · s.
     * y may be x. */
    void (*rmsnorm)(float *y, const float *x, const float *w, int n, float eps);
    /* Rotates pairs (j, j+half), j < pairs: (u, v) → (fma(u, c, -(v·s)), fma(v, c, u·s)). */
    void (*rope)(float *x, const float *cs, const float *sn, int half, int pairs);
    /* y[i] = gelu_tanh(gate[i]) · up[i]; y may be gate or up. */
    void (*gelu_mul)(float *y, const float *gate, const float *up, int n);
    void (*add)(float *y, const float *x, int n);                 /* y += x */
    void (*scale)(float *y, const float *x, float s, int n);      /* y = x · s; y may be x */
    void (*axpy)(float *y, float a, const float *x, int n);       /* y = fma(a, x, y) */
    void (*mul)(float *y, const float *a, const float *b, int n); /* y = a · b; y may be either */
    void (*softcap)(float *x, float cap, int n);                  /* x = tanh(x / cap) · cap */
    void (*from_bf16)(float *y, const uint16_t *x, int n);
    void (*to_bf16)(uint16_t *y, const float *x, int n); /* round to nearest even; NaN stays NaN */
    /* One vector of n values to sh_kv8_bytes(n): codes and scales as quantize makes them (nothing is padded), so a
     * group with an infinity or a NaN becomes NaN, one whose largest absolute value is below 2^−100 becomes 0. */
    void (*to_kv8)(uint8_t *y, const float *x, int n);
    /* `rows` such vectors, one behind the other, to y [rows, n]: y = code · scale. */
    void (*from_kv8)(float *y, const uint8_t *x, int n, int rows);

    /* Attention inner loops over one segment of keys. q rows [rows, hd] with stride ldq; k and v tiles [keys, hd] f32,
     * stride hd. hd is any positive number.
     * s[r·lds + j] = q_r · k_j, by 16 virtual lanes along hd (fma) and the fixed tree. */
    void (*scores)(float *s, size_t lds, const float *q, size_t ldq, int rows, const float *k, int keys, int hd);
    /* For one row of scores: m = max, p[j] = sh_weightf(s[j] − m) in place, l = Σ p by 16 virtual lanes. keys ≥ 1. */
    void (*softmax_part)(float *s, int keys, float *m, float *l);
    /* o[r·ldo + d] = Σ_j fma(p[r·lds + j], v[j, d]) in ascending j, from 0. */
    void (*weighted_sum)(float *o, size_t ldo, const float *p, size_t lds, int rows, const float *v, int keys, int hd);
    /* The same, but o goes on from what it is: 0, or what fewer keys gave. NULL, with the two below: there are none,
     * tiles of a segment serve. */
    void (*add_weighted)(float *o, size_t ldo, const float *p, size_t lds, int rows, const float *v, int keys, int hd);
    /* scores and add_weighted of keys and values in bf16, [keys, hd] without gaps as pages hold them: quicker than
     * widening them in memory first for up to plain_rows rows. next: as many that will be asked for soon; NULL: not
     * known. */
    void (*scores_bf16)(float *s, size_t lds, const float *q, size_t ldq, int rows, const uint16_t *k, int keys, int hd,
                        const uint16_t *next);
    void (*add_weighted_bf16)(float *o, size_t ldo, const float *p, size_t lds, int rows, const uint16_t *v, int keys,
                              int hd, const uint16_t *next);
    int plain_rows;
    /* Joins two parts of one row, a before b: m = max(ma, mb); ea, eb = sh_weightf of ma − m, mb − m;
     * oa = fma(eb, ob, ea · oa); la = fma(eb, lb, ea · la); ma = m. Neither is empty. */
    void (*merge)(float *oa, float *ma, float *la, const float *ob, float mb, float lb, int hd);

    /* m = max x, s = Σ sh_weightf(x − m) by 16 virtual lanes: one segment (≤ 1,024 entries) of a log-sum-exp. n ≥ 1. */
    void (*max_sum_exp)(const float *x, int n, float *m, float *s);
    void (*exp)(float *y, const float *x, int n);
    /* Sines and cosines of n angles (any size: full range reduction). */
    void (*sincos)(float *sn, float *cs, const float *angle, int n);
} sh_kernels;

/* The best table for this CPU, or the one SHOAL_ISA (ref|avx2|avxvnni|avx512|avx512vnni|amx|blas|model:FMA,BYTES)
 * lowers it to. A level that this CPU lacks or an unknown name is an error naming what is allowed. The table is static;
 * nobody frees it. */
sh_status sh_kernels_select(const sh_kernels **out);
/* A level by name; SH_EUNSUPPORTED when the CPU or the build lacks it. For tests and `doctor`. A process has one pair
 * of rates: another model:… than the first is SH_EINPUT. */
sh_status sh_kernels_get(const char *isa, const sh_kernels **out);
/* All names of levels that compute, lowest first, NULL-terminated (also those this CPU lacks). */
extern const char *const sh_kernels_levels[];

/* Fill-in functions of the levels, called bottom up by select.c. */
void sh_kernels_fill_ref(sh_kernels *t);
void sh_kernels_fill_avx2(sh_kernels *t);
void sh_kernels_fill_avx2_quant(sh_kernels *t);
void sh_kernels_fill_avxvnni(sh_kernels *t);
void sh_kernels_fill_avx512(sh_kernels *t);
void sh_kernels_fill_avx512vnni(sh_kernels *t);
void sh_kernels_fill_amx(sh_kernels *t); /* after avx512vnni, whose product few rows take */
/* Whether this CPU has AMX-INT8 and the kernel lets this process use its tiles: asks it to. */
bool sh_kernels_amx_usable(void);
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
/* exp(x) as the weight of a term beside one of weight 1: 0 below SH_WEIGHT_MIN (poly.h). */
float sh_weightf(float x);
float sh_logf(float x);

/* Packs a row-major bf16 matrix [n, k] with row stride ld (elements) into panels [p0, p1) of dst (sh_wmat layout). */
void sh_pack_bf16(uint32_t *dst, const uint16_t *src, size_t ld, int n, int k, int p0, int p1);

#endif
