/*
 * Every entry but gemm and scores, written once in the sixteen-lane vocabulary of vec256.h or vec512.h, one of which is
 * included before. A template, not an interface: included by avx2.c and avx512.c only, each compiled with its own
 * flags. The order of operations is ref.c's, step by step.
 */
#include <math.h>
#include <stdbool.h>
#include <string.h>
#include "model/kernels/kernels.h"

/* Loads the lanes of a row from element i of n; *c gets their number. */
SH_INLINE v16 take(const float *x, int i, int n, int *c) {
    *c = n - i < SH_LANES ? n - i : SH_LANES;
    return *c == SH_LANES ? v_load(x + i) : v_load_n(x + i, *c);
}

SH_INLINE void put(float *y, v16 a, int c) {
    if (c == SH_LANES) {
        v_store(y, a);
    } else {
        v_store_n(y, a, c);
    }
}

/* Asks for bytes that are to be near in a while; NULL: for none. */
SH_INLINE void sh_prefetch(const void *p, size_t bytes) {
    for (size_t i = 0; p && i < bytes; i += 64) _mm_prefetch((const char *)p + i, _MM_HINT_T1);
}

/* How many blocks of 4 KiB lie in so many bytes: 2 to the power of the result, rounded down. */
SH_INLINE unsigned blocks_of(size_t bytes) {
    unsigned n = 0;
    while (((size_t)8192 << n) <= bytes) n++;
    return n;
}

/* Asks for a line of what comes next, for L2. Lines go round the blocks: hardware reads ahead in each of them, where
 * one ascending stream is several times slower than memory. */
SH_INLINE void ask_line(const void *next, size_t line, unsigned blocks) {
    size_t block = line & (((size_t)1 << blocks) - 1);
    _mm_prefetch((const char *)next + block * 4096 + (line >> blocks) * 64, _MM_HINT_T1);
}

/* xt[kk · stride + r] = x[r][kk] for kk < kb: one stream for the inner loop of gemm instead of one per row. stride is a
 * multiple of 4, at least `rows`. Up to three columns past `rows` hold copies of the last row and are not used. */
SH_INLINE void pack_rows(float *xt, int stride, const float *x, size_t ldx, int rows, int kb) {
    for (int r = 0; r < rows; r += 4) {
        const float *row[4];
        for (int i = 0; i < 4; i++) row[i] = x + (size_t)(r + i < rows ? r + i : rows - 1) * ldx;
        float *to = xt + r;
        int kk = 0;
        for (; kk + 4 <= kb; kk += 4, to += 4 * stride) {
            __m128 a = _mm_loadu_ps(row[0] + kk), b = _mm_loadu_ps(row[1] + kk);
            __m128 c = _mm_loadu_ps(row[2] + kk), d = _mm_loadu_ps(row[3] + kk);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps(to, a);
            _mm_storeu_ps(to + stride, b);
            _mm_storeu_ps(to + 2 * stride, c);
            _mm_storeu_ps(to + 3 * stride, d);
        }
        for (; kk < kb; kk++, to += stride) {
            for (int i = 0; i < 4; i++) to[i] = row[i][kk];
        }
    }
}

/* ---- elementary functions ---------------------------------------------------------------------------------------- */

/* Returns exp(r) − 1; *t gets n + SH_ROUND_F, where x = n·ln 2 + r. */
SH_INLINE v16 v_exp_reduce(v16 x, v16 *t) {
    *t = v_add(v_mul(x, v_set1(SH_LOG2E)), v_set1(SH_ROUND_F));
    v16 n = v_sub(*t, v_set1(SH_ROUND_F));
    v16 r = v_fnma(n, v_set1(SH_LN2_HI), x);
    r = v_fnma(n, v_set1(SH_LN2_LO), r);
    v16 q = v_fma(v_set1(SH_EXP_C6), r, v_set1(SH_EXP_C5));
    q = v_fma(q, r, v_set1(SH_EXP_C4));
    q = v_fma(q, r, v_set1(SH_EXP_C3));
    q = v_fma(q, r, v_set1(SH_EXP_C2));
    return v_fma(v_mul(r, r), q, r);
}

SH_INLINE v16 v_exp_from(float min, v16 x) {
    v16 t, y = v_min(v_set1(SH_EXP_MAX), v_max(v_set1(min), x));
    v16 p = v_exp_reduce(y, &t);
    return v_scale_pow2(v_add(v_set1(1.0f), p), t);
}

/* sh_weightf of x ≤ 0. */
SH_INLINE v16 v_weight(v16 x) {
    v16 t, p = v_exp_reduce(v_max(v_set1(SH_WEIGHT_MIN), x), &t);
    return v_zero_below(v_mul(v_add(v_set1(1.0f), p), v_pow2(t)), x, v_set1(SH_WEIGHT_MIN));
}

SH_INLINE v16 v_tanh(v16 x) {
    v16 t, y = v_min(v_set1(SH_TANH_MAX), v_mul(v_set1(2.0f), v_abs(x)));
    v16 p = v_exp_reduce(y, &t), s = v_pow2(t);
    v16 e = v_fma(s, p, v_sub(s, v_set1(1.0f)));
    return v_copysign(v_div(e, v_add(e, v_set1(2.0f))), x);
}

SH_INLINE v16 v_gelu_tanh(v16 x) {
    v16 c = v_mul(v_mul(v_mul(v_set1(SH_GELU_C), x), x), x);
    v16 e = v_exp_from(SH_WEIGHT_MIN, v_mul(v_set1(SH_GELU_W), v_add(x, c))); /* 1 + what is below is 1 */
    return v_div(x, v_add(v_set1(1.0f), e));
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

static void x86_rmsnorm(float *y, const float *x, const float *w, int n, float eps) {
    v16 acc = v_zero();
    int i = 0, c;
    for (; i + SH_LANES <= n; i += SH_LANES) {
        v16 a = v_load(x + i);
        acc = v_fma(a, a, acc);
    }
    if (i < n) {
        v16 a = v_load_n(x + i, n - i);
        acc = v_fma_n(a, a, acc, n - i);
    }
    v16 s = v_set1(1.0f / sqrtf(v_join(acc) / (float)n + eps));
    for (i = 0; i < n; i += SH_LANES) {
        v16 a = v_mul(take(x, i, n, &c), s);
        if (w) a = v_mul(a, take(w, i, n, &c));
        put(y + i, a, c);
    }
}

static void x86_rope(float *x, const float *cs, const float *sn, int half, int pairs) {
    int c;
    for (int j = 0; j < pairs; j += SH_LANES) {
        v16 u = take(x, j, pairs, &c), v = take(x + half, j, pairs, &c);
        v16 co = take(cs, j, pairs, &c), si = take(sn, j, pairs, &c);
        put(x + j, v_fms(u, co, v_mul(v, si)), c);
        put(x + half + j, v_fma(v, co, v_mul(u, si)), c);
    }
}

static void x86_gelu_mul(float *y, const float *gate, const float *up, int n) {
    int c;
    for (int i = 0; i < n; i += SH_LANES) {
        v16 g = v_gelu_tanh(take(gate, i, n, &c));
        put(y + i, v_mul(g, take(up, i, n, &c)), c);
    }
}

static void x86_add(float *y, const float *x, int n) {
    int c;
    for (int i = 0; i < n; i += SH_LANES) {
        v16 a = take(y, i, n, &c);
        put(y + i, v_add(a, take(x, i, n, &c)), c);
    }
}

static void x86_scale(float *y, const float *x, float s, int n) {
    int c;
    for (int i = 0; i < n; i += SH_LANES) {
        v16 a = v_mul(take(x, i, n, &c), v_set1(s));
        put(y + i, a, c);
    }
}

static void x86_axpy(float *y, float a, const float *x, int n) {
    int c;
    for (int i = 0; i < n; i += SH_LANES) {
        v16 b = take(x, i, n, &c);
        put(y + i, v_fma(v_set1(a), b, take(y, i, n, &c)), c);
    }
}

static void x86_mul(float *y, const float *a, const float *b, int n) {
    int i = 0, c;
    for (; i + 4 * SH_LANES <= n; i += 4 * SH_LANES) {
#pragma GCC unroll 4
        for (int j = i; j < i + 4 * SH_LANES; j += SH_LANES) v_store(y + j, v_mul(v_load(a + j), v_load(b + j)));
    }
    for (; i < n; i += SH_LANES) {
        v16 x = take(a, i, n, &c);
        put(y + i, v_mul(x, take(b, i, n, &c)), c);
    }
}

static void x86_softcap(float *x, float cap, int n) {
    int c;
    for (int i = 0; i < n; i += SH_LANES) {
        v16 a = v_div(take(x, i, n, &c), v_set1(cap));
        put(x + i, v_mul(v_tanh(a), v_set1(cap)), c);
    }
}

static void x86_exp(float *y, const float *x, int n) {
    int c;
    for (int i = 0; i < n; i += SH_LANES) {
        v16 a = v_exp_from(SH_EXP_MIN, take(x, i, n, &c));
        put(y + i, a, c);
    }
}

static void x86_from_bf16(float *y, const uint16_t *x, int n) {
    int i = 0;
    for (; i + 4 * SH_LANES <= n; i += 4 * SH_LANES) {
#pragma GCC unroll 4
        for (int j = 0; j < 4 * SH_LANES; j += SH_LANES) v_store(y + i + j, v_from_bf16_n(x + i + j, SH_LANES));
    }
    for (; i < n; i += SH_LANES) {
        int c = n - i < SH_LANES ? n - i : SH_LANES;
        put(y + i, v_from_bf16_n(x + i, c), c);
    }
}

static void x86_to_bf16(uint16_t *y, const float *x, int n) {
    int c;
    for (int i = 0; i < n; i += SH_LANES) {
        v16 a = take(x, i, n, &c);
        v_to_bf16_n(y + i, a, c);
    }
}

/* Codes and scale of a group of n values. */
SH_INLINE float to_kv8_group(uint8_t *y, const float *x, int n) {
    v16 top = v_zero();
    int i = 0, c;
    for (; i + SH_LANES <= n; i += SH_LANES) top = v_max_bits(v_abs(v_load(x + i)), top);
    if (i < n) top = v_max_bits(v_abs(v_load_n(x + i, n - i)), top);
    float a = v_join_max_bits(top);
    bool bad = !(a < INFINITY), none = bad || a < 0x1p-100f;
    v16 inv = v_set1(none ? 0 : 127.0f / a);
    for (i = 0; i < n; i += SH_LANES) {
        v16 v = v_mul(take(x, i, n, &c), inv);
        v_to_i8_n(y + i, none ? v_zero() : v, c);
    }
    return bad ? NAN : none ? 0 : a * (1.0f / 127.0f);
}

static void x86_to_kv8(uint8_t *y, const float *x, int n) {
    uint8_t *scales = y + n;
    for (int i = 0; i < n; i += SH_KV8_GROUP, scales += sizeof(float)) {
        float scale = to_kv8_group(y + i, x + i, n - i < SH_KV8_GROUP ? n - i : SH_KV8_GROUP);
        memcpy(scales, &scale, sizeof scale);
    }
}

static void x86_from_kv8(float *y, const uint8_t *x, int n, int rows) {
    for (int r = 0; r < rows; r++, y += n, x += sh_kv8_bytes(n)) {
        const uint8_t *scales = x + n;
        for (int g = 0; g < n; g += SH_KV8_GROUP, scales += sizeof(float)) {
            int i = g, to = n - g < SH_KV8_GROUP ? n : g + SH_KV8_GROUP;
            float scale;
            memcpy(&scale, scales, sizeof scale);
            v16 s = v_set1(scale);
            for (; i + SH_LANES <= to; i += SH_LANES) v_store(y + i, v_mul(v_from_i8_n(x + i, SH_LANES), s));
            if (i < to) v_store_n(y + i, v_mul(v_from_i8_n(x + i, to - i), s), to - i);
        }
    }
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

static float lanes_max(const float *x, int n) {
    v16 top = v_set1(-INFINITY);
    int i = 0;
    for (; i + SH_LANES <= n; i += SH_LANES) top = v_max(v_load(x + i), top);
    if (i < n) top = v_max_n(v_load_n(x + i, n - i), top, n - i);
    return v_join_max(top);
}

SH_INLINE float sum_exp(float *p, const float *x, int n, float m) {
    v16 acc = v_zero(), shift = v_set1(m == -INFINITY ? 0.0f : m);
    int i = 0;
    for (; i + SH_LANES <= n; i += SH_LANES) {
        v16 e = v_weight(v_sub(v_load(x + i), shift));
        if (p) v_store(p + i, e);
        acc = v_add(acc, e);
    }
    if (i < n) {
        v16 e = v_weight(v_sub(v_load_n(x + i, n - i), shift));
        if (p) v_store_n(p + i, e, n - i);
        acc = v_add_n(acc, e, n - i);
    }
    return v_join(acc);
}

static void x86_softmax_part(float *s, int keys, float *m, float *l) {
    float top = lanes_max(s, keys);
    *l = sum_exp(s, s, keys, top);
    *m = top;
}

static void x86_max_sum_exp(const float *x, int n, float *m, float *s) {
    float top = lanes_max(x, n);
    *s = sum_exp(NULL, x, n, top);
    *m = top;
}

/* n lanes of a key or a value, widened or as it is stored, from element `at`. */
SH_INLINE v16 v_stored(const void *v, size_t at, bool bf16, int n) {
    if (bf16) return v_from_bf16_n((const uint16_t *)v + at, n);
    return n == SH_LANES ? v_load((const float *)v + at) : v_load_n((const float *)v + at, n);
}

/* Values as they are stored, and whether the sums go on from what is there. */
typedef struct values {
    const void *v;
    bool bf16, on;
    const uint16_t *next; /* bf16: to be near in a while; NULL: nothing */
    unsigned blocks;      /* of next: blocks_of */
} values;

/* `rows` rows times `vecs` vectors of one head, from element d0 on: the sums stay in registers over all keys. c: lanes
 * of the last vector. */
SH_INLINE void weighted_tile(float *o, size_t ldo, const float *p, size_t lds, int rows, values v, int keys, int hd,
                             int d0, int vecs, int c) {
    v16 acc[SH_WS_MANY > SH_WS_ROWS ? SH_WS_MANY : SH_WS_ROWS][SH_WS_VECS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 8
        for (int d = 0; d < vecs; d++) {
            const float *from = o + (size_t)r * ldo + d0 + d * SH_LANES;
            acc[r][d] = !v.on ? v_zero() : d + 1 < vecs || c == SH_LANES ? v_load(from) : v_load_n(from, c);
        }
    }
    size_t at = (size_t)d0;
    for (int j = 0; j < keys; j++, at += (size_t)hd) {
        v16 x[SH_WS_VECS];
#pragma GCC unroll 4
        for (int i = 0; i < vecs / 2; i++) { /* 32 values to a line */
            if (v.next) ask_line(v.next, (size_t)((d0 / SH_LANES / vecs * keys + j) * (vecs / 2) + i), v.blocks);
        }
#pragma GCC unroll 8
        for (int d = 0; d < vecs; d++) {
            x[d] = v_stored(v.v, at + (size_t)(d * SH_LANES), v.bf16, d + 1 < vecs ? SH_LANES : c);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            v16 a = v_set1(p[(size_t)r * lds + (size_t)j]);
#pragma GCC unroll 8
            for (int d = 0; d < vecs; d++) acc[r][d] = v_fma(a, x[d], acc[r][d]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 8
        for (int d = 0; d < vecs; d++) {
            put(o + (size_t)r * ldo + d0 + d * SH_LANES, acc[r][d], d + 1 < vecs ? SH_LANES : c);
        }
    }
}

SH_INLINE void weighted_rows(float *o, size_t ldo, const float *p, size_t lds, int rows, int vecs, values v, int keys,
                             int hd) {
    int d = 0;
    for (; d + vecs * SH_LANES <= hd; d += vecs * SH_LANES) {
        weighted_tile(o, ldo, p, lds, rows, v, keys, hd, d, vecs, SH_LANES);
    }
    for (; d < hd; d += SH_LANES) {
        weighted_tile(o, ldo, p, lds, rows, v, keys, hd, d, 1, hd - d < SH_LANES ? hd - d : SH_LANES);
    }
}

/* `most` rows at a time, then one. */
SH_INLINE void weigh(float *o, size_t ldo, const float *p, size_t lds, int rows, int most, int vecs, values v, int keys,
                     int hd) {
    int r = 0;
    for (; r + most <= rows; r += most) {
        weighted_rows(o + (size_t)r * ldo, ldo, p + (size_t)r * lds, lds, most, vecs, v, keys, hd);
    }
    for (; r < rows; r++) weighted_rows(o + (size_t)r * ldo, ldo, p + (size_t)r * lds, lds, 1, SH_WS_VECS, v, keys, hd);
}

static void x86_weighted_sum(float *o, size_t ldo, const float *p, size_t lds, int rows, const float *v, int keys,
                             int hd) {
    weigh(o, ldo, p, lds, rows, SH_WS_ROWS, SH_WS_VECS, (values){.v = v}, keys, hd);
}

static void x86_add_weighted(float *o, size_t ldo, const float *p, size_t lds, int rows, const float *v, int keys,
                             int hd) {
    int many = rows - rows % SH_WS_ROWS; /* two rows left over share what they load */
    values x = {.v = v, .on = true};
    weigh(o, ldo, p, lds, many, SH_WS_ROWS, SH_WS_VECS, x, keys, hd);
    weigh(o + (size_t)many * ldo, ldo, p + (size_t)many * lds, lds, rows - many, 2, SH_WS_VECS, x, keys, hd);
}

static void x86_add_weighted_bf16(float *o, size_t ldo, const float *p, size_t lds, int rows, const uint16_t *v,
                                  int keys, int hd, const uint16_t *next) {
    values x = {
        .v = v, .bf16 = true, .on = true, .next = next, .blocks = blocks_of((size_t)keys * (size_t)hd * sizeof *v)};
    static const int most[] = {SH_WS_MANY, SH_WS_ROWS, 2, 1}; /* the more rows, the fewer times a value is widened */
    for (int i = 0, n; i < 4; i++, rows -= n, o += (size_t)n * ldo, p += (size_t)n * lds) {
        n = rows - rows % most[i];
        if (i == 0) weigh(o, ldo, p, lds, n, SH_WS_MANY, 2, x, keys, hd);
        if (i == 1) weigh(o, ldo, p, lds, n, SH_WS_ROWS, SH_WS_VECS, x, keys, hd);
        if (i > 1) weigh(o, ldo, p, lds, n, 2, SH_WS_VECS, x, keys, hd);
    }
}

static void x86_merge(float *oa, float *ma, float *la, const float *ob, float mb, float lb, int hd) {
    float m = *ma > mb ? *ma : mb, shift = m == -INFINITY ? 0.0f : m;
    float ea = sh_weightf(*ma - shift), eb = sh_weightf(mb - shift);
    int c;
    for (int d = 0; d < hd; d += SH_LANES) {
        v16 a = v_mul(v_set1(ea), take(oa, d, hd, &c));
        put(oa + d, v_fma(v_set1(eb), take(ob, d, hd, &c), a), c);
    }
    *la = fmaf(eb, lb, ea * *la);
    *ma = m;
}

static void fill_rows(sh_kernels *t) {
    t->rmsnorm = x86_rmsnorm;
    t->rope = x86_rope;
    t->gelu_mul = x86_gelu_mul;
    t->add = x86_add;
    t->scale = x86_scale;
    t->axpy = x86_axpy;
    t->mul = x86_mul;
    t->softcap = x86_softcap;
    t->from_bf16 = x86_from_bf16;
    t->to_bf16 = x86_to_bf16;
    t->to_kv8 = x86_to_kv8;
    t->from_kv8 = x86_from_kv8;
    t->softmax_part = x86_softmax_part;
    t->weighted_sum = x86_weighted_sum;
    t->add_weighted = x86_add_weighted;
    t->add_weighted_bf16 = x86_add_weighted_bf16;
    t->merge = x86_merge;
    t->max_sum_exp = x86_max_sum_exp;
    t->exp = x86_exp;
}
