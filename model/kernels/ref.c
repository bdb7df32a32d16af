/*
 * The kernels in plain C: the definition of the arithmetic. Every other level must give the same bits. Written to be
 * read, not to be fast; correct on any CPU with IEEE 754 arithmetic (fmaf comes from the C library where the CPU has
 * none).
 */
#include "model/kernels/kernels.h"
#include "model/kernels/poly.h"
#include "model/kernels/quant_group.h"

#include <math.h>
#include <string.h>

#define ROW_TILE 4 /* rows that share one widening of a weight panel */

static inline float as_float(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline uint32_t as_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline uint64_t as_bits64(double d) {
    uint64_t u;
    memcpy(&u, &d, sizeof u);
    return u;
}

/* The fixed tree over 16 lanes; destroys l. */
static float join_lanes(float l[SH_LANES]) {
    for (int step = SH_LANES / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; i++) l[i] = l[i] + l[i + step];
    }
    return l[0];
}

/* The larger of a and b; b when they do not compare (NaN), as the CPU's max instructions do. */
static inline float larger(float a, float b) {
    return a > b ? a : b;
}

/* Largest of x by the same lanes and tree; NaN elements are ignored (they show up in the sums). n ≥ 1. */
static float lanes_max(const float *x, int n) {
    float l[SH_LANES];
    for (int i = 0; i < SH_LANES; i++) l[i] = -INFINITY;
    for (int i = 0; i < n; i++) l[i % SH_LANES] = larger(x[i], l[i % SH_LANES]);
    for (int step = SH_LANES / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; i++) l[i] = larger(l[i], l[i + step]);
    }
    return l[0];
}

/* ---- elementary functions ---------------------------------------------------------------------------------------- */

/* x = n·ln 2 + r: returns n, sets *p = exp(r) − 1. NaN gives NaN in *p and any n. */
static inline uint32_t exp_reduce(float x, float *p) {
    float t = x * SH_LOG2E + SH_ROUND_F;
    uint32_t n = as_bits(t) - as_bits(SH_ROUND_F);
    float nf = t - SH_ROUND_F;
    float r = fmaf(-nf, SH_LN2_HI, x);
    r = fmaf(-nf, SH_LN2_LO, r);
    float q = fmaf(SH_EXP_C6, r, SH_EXP_C5);
    q = fmaf(q, r, SH_EXP_C4);
    q = fmaf(q, r, SH_EXP_C3);
    q = fmaf(q, r, SH_EXP_C2);
    *p = fmaf(r * r, q, r);
    return n;
}

/* 2^n for −126 ≤ n ≤ 127; unsigned, so that what a NaN brings is harmless. */
static inline float power_of_two(uint32_t n) {
    return as_float((n + 127) << 23);
}

float sh_expf(float x) {
    float p, y = larger(SH_EXP_MIN, x); /* written so that NaN passes */
    y = SH_EXP_MAX < y ? SH_EXP_MAX : y;
    uint32_t n = exp_reduce(y, &p);
    /* Two factors, because 2^n alone leaves the range: the result under- and overflows as it should. */
    uint32_t a = (uint32_t)((int32_t)n >> 1);
    return (1.0f + p) * power_of_two(a) * power_of_two(n - a);
}

float sh_weightf(float x) {
    return x < SH_WEIGHT_MIN ? 0 : sh_expf(x);
}

/* tanh x = e/(e + 2) with e = exp(2|x|) − 1: no cancellation anywhere. */
static float tanh_poly(float x) {
    float p, y = 2.0f * fabsf(x);
    y = SH_TANH_MAX < y ? SH_TANH_MAX : y;
    float s = power_of_two(exp_reduce(y, &p));
    float e = fmaf(s, p, s - 1.0f);
    return copysignf(e / (e + 2.0f), x);
}

static float gelu_tanh(float x) {
    float c = SH_GELU_C * x;
    c = c * x;
    c = c * x;
    return x / (1.0f + sh_weightf(SH_GELU_W * (x + c)));
}

/* log x = e·ln 2 + 2·atanh(s), s = (m − 1)/(m + 1), m in [sqrt ½, sqrt 2); in double, rounded once. */
float sh_logf(float x) {
    if (!(x > 0)) return x == 0 ? -INFINITY : NAN;
    if (isinf(x)) return x;
    int e;
    double m = frexp((double)x, &e);
    if (m < 0.70710678118654752) {
        m *= 2;
        e--;
    }
    double s = (m - 1) / (m + 1), z = s * s, q = 0;
    for (int k = 15; k >= 3; k -= 2) q = (q + 1.0 / k) * z;
    return (float)((double)e * 0x1.62e42fefa39efp-1 + 2 * (s + s * q));
}

/* |x| ≥ SH_TRIG_BIG: x·2/π modulo 4 from the bits of 2/π that matter (Payne and Hanek). Returns the quadrant. */
static unsigned reduce_big(float x, double *r) {
    static const uint32_t bits[] = {0xa2f9836e, 0x4e441529, 0xfc2757d1, 0xf534ddc0,
                                    0xdb629599, 0x3c439041, 0xfe5163ab, 0xdebbc561};
    uint32_t u = as_bits(x);
    int e = (int)(u >> 23 & 255) - 150; /* |x| = m · 2^e */
    uint64_t m = (u & 0x7fffff) | 0x800000;
    int first = e - 2; /* bits before this one contribute multiples of 4 */
    unsigned __int128 w = 0;
    for (int i = 0; i < 128; i++) {
        int b = first + i;
        w = w << 1 | (bits[b / 32] >> (31 - b % 32) & 1);
    }
    w *= m; /* two integer bits, 126 of fraction */
    unsigned k = (unsigned)(w >> 126);
    __int128 f = (__int128)(w << 2); /* fraction · 2^128, as a signed number in [−½, ½) */
    if (f < 0) k++;
    *r = (double)f * 0x1p-128 * SH_PIO2_HI;
    if (u >> 31) {
        *r = -*r;
        k = 0 - k;
    }
    return k & 3;
}

static unsigned reduce_angle(float x, double *r) {
    if (fabsf(x) >= SH_TRIG_BIG) return reduce_big(x, r);
    double t = (double)x * SH_TWO_OVER_PI + SH_ROUND_D;
    double k = t - SH_ROUND_D;
    *r = fma(-k, SH_PIO2_LO, fma(-k, SH_PIO2_HI, (double)x));
    return (unsigned)as_bits64(t) & 3;
}

static void sincos_one(float x, float *sn, float *cs) {
    if (!isfinite(x)) {
        *sn = *cs = NAN;
        return;
    }
    double r;
    unsigned k = reduce_angle(x, &r);
    double z = r * r;
    double s = fma(SH_SIN_11, z, SH_SIN_9);
    s = fma(s, z, SH_SIN_7);
    s = fma(s, z, SH_SIN_5);
    s = fma(s, z, SH_SIN_3);
    s = fma(s * z, r, r);
    double c = fma(SH_COS_12, z, SH_COS_10);
    c = fma(c, z, SH_COS_8);
    c = fma(c, z, SH_COS_6);
    c = fma(c, z, SH_COS_4);
    c = fma(c, z, SH_COS_2);
    c = fma(c, z, 1.0);
    float fs = (float)(k & 1 ? c : s), fc = (float)(k & 1 ? s : c);
    *sn = k & 2 ? -fs : fs;
    *cs = (k + 1) & 2 ? -fc : fc;
}

/* ---- matrix product ---------------------------------------------------------------------------------------------- */

/* Rows [0, rows) of x times one panel; only the outputs < n are stored. */
static void gemm_tile(const uint32_t *w, int k, const float *x, size_t ldx, int rows, float *y, size_t ldy, int n) {
    float acc[ROW_TILE][SH_PANEL] = {{0}};
    for (int kk = 0; kk < k; kk++, w += SH_LANES) {
        float wide[SH_PANEL];
        for (int j = 0; j < SH_LANES; j++) {
            wide[j] = as_float(w[j] << 16);
            wide[j + SH_LANES] = as_float(w[j] & 0xffff0000u);
        }
        for (int r = 0; r < rows; r++) {
            float a = x[(size_t)r * ldx + (size_t)kk];
            for (int j = 0; j < SH_PANEL; j++) acc[r][j] = fmaf(a, wide[j], acc[r][j]);
        }
    }
    for (int r = 0; r < rows; r++) memcpy(y + (size_t)r * ldy, acc[r], (size_t)n * sizeof(float));
}

static void ref_gemm(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int m, float *y, size_t ldy) {
    for (int p = p0; p < p1; p++) {
        int n = w->n - p * SH_PANEL < SH_PANEL ? w->n - p * SH_PANEL : SH_PANEL;
        for (int r = 0; r < m; r += ROW_TILE) {
            gemm_tile(w->data + (size_t)p * (size_t)w->k * SH_LANES, w->k, x + (size_t)r * ldx, ldx,
                      m - r < ROW_TILE ? m - r : ROW_TILE, y + (size_t)r * ldy + (size_t)p * SH_PANEL, ldy, n);
        }
    }
}

void sh_pack_bf16(uint32_t *dst, const uint16_t *src, size_t ld, int n, int k, int p0, int p1) {
    for (int p = p0; p < p1; p++) {
        uint32_t *d = dst + (size_t)p * (size_t)k * SH_LANES;
        for (int j = 0; j < SH_LANES; j++) {
            int lo = p * SH_PANEL + j, hi = lo + SH_LANES;
            const uint16_t *a = lo < n ? src + (size_t)lo * ld : NULL, *b = hi < n ? src + (size_t)hi * ld : NULL;
            for (int kk = 0; kk < k; kk++) {
                d[(size_t)kk * SH_LANES + (size_t)j] = (a ? a[kk] : 0u) | (b ? (uint32_t)b[kk] << 16 : 0u);
            }
        }
    }
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

static void ref_rmsnorm(float *y, const float *x, const float *w, int n, float eps) {
    float l[SH_LANES] = {0};
    for (int i = 0; i < n; i++) l[i % SH_LANES] = fmaf(x[i], x[i], l[i % SH_LANES]);
    float s = 1.0f / sqrtf(join_lanes(l) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = w ? x[i] * s * w[i] : x[i] * s;
}

static void ref_rope(float *x, const float *cs, const float *sn, int half, int pairs) {
    for (int j = 0; j < pairs; j++) {
        float u = x[j], v = x[j + half];
        x[j] = fmaf(u, cs[j], -(v * sn[j]));
        x[j + half] = fmaf(v, cs[j], u * sn[j]);
    }
}

static void ref_gelu_mul(float *y, const float *gate, const float *up, int n) {
    for (int i = 0; i < n; i++) y[i] = gelu_tanh(gate[i]) * up[i];
}

static void ref_add(float *y, const float *x, int n) {
    for (int i = 0; i < n; i++) y[i] = y[i] + x[i];
}

static void ref_scale(float *y, const float *x, float s, int n) {
    for (int i = 0; i < n; i++) y[i] = x[i] * s;
}

static void ref_axpy(float *y, float a, const float *x, int n) {
    for (int i = 0; i < n; i++) y[i] = fmaf(a, x[i], y[i]);
}

static void ref_mul(float *y, const float *a, const float *b, int n) {
    for (int i = 0; i < n; i++) y[i] = a[i] * b[i];
}

static void ref_softcap(float *x, float cap, int n) {
    for (int i = 0; i < n; i++) x[i] = tanh_poly(x[i] / cap) * cap;
}

static float widen(uint16_t x) {
    return as_float((uint32_t)x << 16);
}

static void ref_from_bf16(float *y, const uint16_t *x, int n) {
    for (int i = 0; i < n; i++) y[i] = widen(x[i]);
}

static void ref_to_bf16(uint16_t *y, const float *x, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t u = as_bits(x[i]);
        if ((u & 0x7fffffff) > 0x7f800000) {
            y[i] = (uint16_t)(u >> 16 | 0x40); /* quiet, so that cutting the payload cannot make it infinite */
        } else {
            y[i] = (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
        }
    }
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

static void ref_scores(float *s, size_t lds, const float *q, size_t ldq, int rows, const float *k, int keys, int hd) {
    for (int r = 0; r < rows; r++) {
        const float *qr = q + (size_t)r * ldq;
        for (int j = 0; j < keys; j++) {
            const float *kj = k + (size_t)j * (size_t)hd;
            float l[SH_LANES] = {0};
            for (int d = 0; d < hd; d++) l[d % SH_LANES] = fmaf(qr[d], kj[d], l[d % SH_LANES]);
            s[(size_t)r * lds + (size_t)j] = join_lanes(l);
        }
    }
}

static void ref_scores_bf16(float *s, size_t lds, const float *q, size_t ldq, int rows, const uint16_t *k, int keys,
                            int hd, const uint16_t *next) {
    (void)next;
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < keys; j++) {
            float l[SH_LANES] = {0};
            for (int d = 0; d < hd; d++)
                l[d % SH_LANES] =
                    fmaf(q[(size_t)r * ldq + (size_t)d], widen(k[(size_t)j * (size_t)hd + (size_t)d]), l[d % SH_LANES]);
            s[(size_t)r * lds + (size_t)j] = join_lanes(l);
        }
}

/* p[i] = weight(x[i] − m), stored unless p is NULL; returns Σ p by lanes. A maximum of −inf counts as 0, so that
 * entries of −inf alone sum to 0 instead of NaN. */
static float sum_exp(float *p, const float *x, int n, float m) {
    float l[SH_LANES] = {0}, shift = m == -INFINITY ? 0.0f : m;
    for (int i = 0; i < n; i++) {
        float e = sh_weightf(x[i] - shift);
        if (p) p[i] = e;
        l[i % SH_LANES] = l[i % SH_LANES] + e;
    }
    return join_lanes(l);
}

static void ref_softmax_part(float *s, int keys, float *m, float *l) {
    *m = lanes_max(s, keys);
    *l = sum_exp(s, s, keys, *m);
}

static void ref_add_weighted_bf16(float *o, size_t ldo, const float *p, size_t lds, int rows, const uint16_t *v,
                                  int keys, int hd, const uint16_t *next) {
    (void)next;
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < keys; j++)
            for (int d = 0; d < hd; d++) {
                float *out = &o[(size_t)r * ldo + (size_t)d];
                *out = fmaf(p[(size_t)r * lds + (size_t)j], widen(v[(size_t)j * (size_t)hd + (size_t)d]), *out);
            }
}

static void ref_add_weighted(float *o, size_t ldo, const float *p, size_t lds, int rows, const float *v, int keys,
                             int hd) {
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < keys; j++)
            for (int d = 0; d < hd; d++) {
                float *out = &o[(size_t)r * ldo + (size_t)d];
                *out = fmaf(p[(size_t)r * lds + (size_t)j], v[(size_t)j * (size_t)hd + (size_t)d], *out);
            }
}

static void ref_weighted_sum(float *o, size_t ldo, const float *p, size_t lds, int rows, const float *v, int keys,
                             int hd) {
    for (int r = 0; r < rows; r++) {
        float *out = o + (size_t)r * ldo;
        for (int d = 0; d < hd; d++) out[d] = 0;
        for (int j = 0; j < keys; j++) {
            float a = p[(size_t)r * lds + (size_t)j];
            for (int d = 0; d < hd; d++) out[d] = fmaf(a, v[(size_t)j * (size_t)hd + (size_t)d], out[d]);
        }
    }
}

static void ref_merge(float *oa, float *ma, float *la, const float *ob, float mb, float lb, int hd) {
    float m = larger(*ma, mb), shift = m == -INFINITY ? 0.0f : m;
    float ea = sh_weightf(*ma - shift), eb = sh_weightf(mb - shift);
    for (int d = 0; d < hd; d++) oa[d] = fmaf(eb, ob[d], ea * oa[d]);
    *la = fmaf(eb, lb, ea * *la);
    *ma = m;
}

static void ref_max_sum_exp(const float *x, int n, float *m, float *s) {
    float top = lanes_max(x, n);
    *s = sum_exp(NULL, x, n, top);
    *m = top;
}

static void ref_exp(float *y, const float *x, int n) {
    for (int i = 0; i < n; i++) y[i] = sh_expf(x[i]);
}

static void ref_sincos(float *sn, float *cs, const float *angle, int n) {
    for (int i = 0; i < n; i++) sincos_one(angle[i], sn + i, cs + i);
}

/* ---- quantised products ------------------------------------------------------------------------------------------ */

static void ref_quantize_group(const float *x, int n, int group, int8_t *code, float *scale, int32_t *sum) {
    uint32_t top = 0; /* bits of absolute values order like the values; NaN comes out on top */
    for (int i = 0; i < n; i++) {
        uint32_t u = as_bits(x[i]) & 0x7fffffffu;
        top = u > top ? u : top;
    }
    float a = as_float(top);
    memset(code, 0, (size_t)group);
    *sum = 0;
    *scale = top >= 0x7f800000u ? NAN : a * (1.0f / 127.0f);
    if (a < 0x1p-100f) *scale = 0;
    if (top >= 0x7f800000u || a < 0x1p-100f) return;
    float inv = 127.0f / a;
    for (int i = 0; i < n; i++) {
        code[i] = (int8_t)rintf(x[i] * inv);
        *sum += code[i];
    }
}

static void ref_quantize(const float *x, int k, int group, int8_t *code, float *scale, int32_t *sum) {
    for (int g = 0, i = 0; i < k; g++, i += group)
        ref_quantize_group(x + i, k - i < group ? k - i : group, group, code + i, scale + g, sum + g);
}

/* Σ code · code of output o (0 … 31) of a block with one group of a row. */
static int32_t ref_dot(sh_wtype t, const uint8_t *codes, int o, const int8_t *x) {
    const uint8_t *half = codes + (o / 16) * 64 + (o % 16) * 4;
    int32_t s = 0;
    for (int i = 0; i < SH_Q8_GROUP && t == SH_W_Q8; i++) s += (half[i / 4 * 128 + i % 4] - SH_Q8_ZERO) * x[i];
    for (int i = 0; i < SH_Q4_GROUP && t == SH_W_Q4; i++) {
        int b = half[i / 8 * 128 + i % 4];
        s += ((i % 8 < 4 ? b & 15 : b >> 4) - SH_Q4_ZERO) * x[i];
    }
    return s;
}

static void ref_gemm_q(const sh_wmat *w, int p0, int p1, const sh_qrows *x, int r0, int m, float *y, size_t ldy) {
    size_t groups = (size_t)sh_wtype_groups(w->type, w->k), size = (size_t)sh_wtype_group(w->type);
    for (int i = p0 * SH_PANEL; i < p1 * SH_PANEL && i < w->n; i++) {
        size_t p = (size_t)(i / SH_PANEL);
        for (int r = 0; r < m; r++) {
            size_t row = (size_t)(r0 + r);
            float acc = 0;
            for (size_t g = 0; g < groups; g++) {
                const uint8_t *block = (const uint8_t *)w->data + (p * groups + g) * sh_wtype_block(w->type);
                uint16_t half;
                memcpy(&half, block + 2 * (i % SH_PANEL), sizeof half);
                int32_t s = ref_dot(w->type, block + 2 * SH_PANEL, i % SH_PANEL, x->code + row * x->ld + g * size);
                acc = fmaf((float)s, sh_half_to_float(half) * x->scale[row * x->groups + g], acc);
            }
            y[(size_t)r * ldy + (size_t)i] = acc;
        }
    }
}

/* ---- keys and values in 8 bits ----------------------------------------------------------------------------------- */

static void ref_to_kv8(uint8_t *y, const float *x, int n) {
    uint8_t *scales = y + n;
    for (int i = 0; i < n; i += SH_KV8_GROUP, scales += sizeof(float)) {
        int size = n - i < SH_KV8_GROUP ? n - i : SH_KV8_GROUP;
        float scale;
        int32_t sum;
        ref_quantize_group(x + i, size, size, (int8_t *)y + i, &scale, &sum);
        memcpy(scales, &scale, sizeof scale);
    }
}

static void ref_from_kv8(float *y, const uint8_t *x, int n, int rows) {
    for (int r = 0; r < rows; r++, y += n, x += sh_kv8_bytes(n))
        for (int i = 0; i < n; i++) {
            float scale;
            memcpy(&scale, x + n + sizeof(float) * (size_t)(i / SH_KV8_GROUP), sizeof scale);
            y[i] = (float)(int8_t)x[i] * scale;
        }
}

void sh_kernels_fill_ref(sh_kernels *t) {
    *t = (sh_kernels){
        .isa = "ref",
        .gemm = ref_gemm,
        .rmsnorm = ref_rmsnorm,
        .rope = ref_rope,
        .gelu_mul = ref_gelu_mul,
        .add = ref_add,
        .scale = ref_scale,
        .axpy = ref_axpy,
        .mul = ref_mul,
        .softcap = ref_softcap,
        .from_bf16 = ref_from_bf16,
        .to_bf16 = ref_to_bf16,
        .to_kv8 = ref_to_kv8,
        .from_kv8 = ref_from_kv8,
        .scores = ref_scores,
        .scores_bf16 = ref_scores_bf16,
        .plain_rows = 4,
        .softmax_part = ref_softmax_part,
        .weighted_sum = ref_weighted_sum,
        .add_weighted = ref_add_weighted,
        .add_weighted_bf16 = ref_add_weighted_bf16,
        .merge = ref_merge,
        .max_sum_exp = ref_max_sum_exp,
        .exp = ref_exp,
        .sincos = ref_sincos,
        .quant_q8 = group_q8,
        .quant_q4 = group_q4,
        .quantize = ref_quantize,
        .gemm_q = ref_gemm_q,
    };
}
