/*
 * Products with quantised weights for AVX-512 with VNNI: unsigned codes of weights times signed codes of activations,
 * four at a time, exact in 32 bits. The weights' zero point is taken off through the sum of the row's codes, with which
 * the sums begin. Same bits as ref.c (kernels.h, quant.h).
 */
#include <immintrin.h>
#include <stdbool.h>
#include <string.h>
#include "model/kernels/quant_group.h"

#define SH_INLINE static inline __attribute__((always_inline))

#define TILE_ROWS   6 /* 12 integer sums, 12 float sums, scales, codes */
#define TILE_PASSES 1
#define WALK_WORDS  1
#include "model/kernels/quant_blocks.h"
#include "model/kernels/quant_walk.h"

static __mmask16 lanes(int n) {
    return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
}

static inline size_t walk_words(sh_wtype t) {
    return (size_t)sh_wtype_group(t) / 4;
}

static void walk_pack(sh_wtype t, const sh_qrows *x, size_t r0, int rows, size_t g0, size_t g1, uint32_t *to) {
    walk_pack_codes(t, x, r0, rows, g0, g1, to);
}

/* Adds 64 bytes of unsigned codes times four inputs of each row to the sums of half h. Of the intrinsic gcc 12 makes
 * two copies of the sum beside each addition. */
SH_INLINE void dot(__m512i s[TILE_ROWS][2], int h, __m512i u, const __m512i *x, int rows) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) __asm__("vpdpbusd %2, %1, %0" : "+v"(s[r][h]) : "v"(u), "v"(x[r]));
}

SH_INLINE __m512i four(const int8_t *x) {
    int32_t v;
    memcpy(&v, x, sizeof v);
    return _mm512_set1_epi32(v);
}

/* One block: integer sums of `rows` rows with 32 outputs. `step` bytes are fetched for each 128 of codes. */
SH_INLINE void block_sums(sh_wtype t, const uint8_t *codes, const int8_t *x, size_t ld, int rows, const uint8_t *next,
                          size_t step, __m512i s[TILE_ROWS][2]) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int i = 0; i < sh_wtype_group(t); i += t == SH_W_Q8 ? 4 : 8, codes += 128, next += step) {
        __m512i a = _mm512_loadu_si512(codes), b = _mm512_loadu_si512(codes + 64), v[TILE_ROWS];
        walk_fetch(next);
        walk_fetch(next + step / 2);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) v[r] = four(x + (size_t)r * ld + i);
        if (t == SH_W_Q8) {
            dot(s, 0, a, v, rows);
            dot(s, 1, b, v, rows);
            continue;
        }
        dot(s, 0, _mm512_and_si512(a, low), v, rows);
        dot(s, 1, _mm512_and_si512(b, low), v, rows);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) v[r] = four(x + (size_t)r * ld + i + 4);
        dot(s, 0, _mm512_and_si512(_mm512_srli_epi16(a, 4), low), v, rows);
        dot(s, 1, _mm512_and_si512(_mm512_srli_epi16(b, 4), low), v, rows);
    }
}

SH_INLINE void run_tile(sh_wtype t, const tile *j, int rows, bool packed) {
    const size_t group = (size_t)sh_wtype_group(t), ldx = packed ? group : j->ldx;
    const __mmask16 exist[2] = {lanes(j->outputs), lanes(j->outputs - 16)};
    const size_t step = 128 / j->shares;
    __m512 acc[TILE_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++)
            acc[r][h] =
                j->g0 ? _mm512_maskz_loadu_ps(exist[h], j->y + (size_t)r * j->ldy + 16 * h) : _mm512_setzero_ps();
    const int8_t *x = j->x;
    const uint8_t *block = j->block;
    const uint8_t *next = j->next + (j->g1 - j->g0) * sh_wtype_block(t) * j->share / j->shares;
    for (size_t g = j->g0; g < j->g1; g++) {
        __m512i s[TILE_ROWS][2];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512i sum = _mm512_set1_epi32(j->sum[(size_t)r * j->groups + g]);
            s[r][0] = s[r][1] =
                _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, t == SH_W_Q8 ? 7 : 3)); /* · −128, −8 */
        }
        block_sums(t, block + 2 * SH_PANEL, x, ldx, rows, next, step, s);
        __m512 lo = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)block));
        __m512 hi = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(block + 32)));
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512 d = _mm512_set1_ps(j->scale[(size_t)r * j->groups + g]);
            acc[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[r][0]), _mm512_mul_ps(lo, d), acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[r][1]), _mm512_mul_ps(hi, d), acc[r][1]);
        }
        block += sh_wtype_block(t);
        next += sh_wtype_block(t) / j->shares;
        x += packed ? group * (size_t)rows : group;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) _mm512_mask_storeu_ps(j->y + (size_t)r * j->ldy + 16 * h, exist[h], acc[r][h]);
}

SH_INLINE void run_type(sh_wtype t, const tile *j, int rows) {
    if (j->ldx) {
        run_tile(t, j, rows, false);
    } else {
        run_tile(t, j, rows, true);
    }
}

static void walk_tile(sh_wtype t, const tile *j, int rows) {
#define ROWS(n)                                                                                                        \
    case n:                                                                                                            \
        t == SH_W_Q8 ? run_type(SH_W_Q8, j, n) : run_type(SH_W_Q4, j, n);                                              \
        break;
    switch (rows) {
        ROWS(1)
        ROWS(2)
        ROWS(3)
        ROWS(4)
        ROWS(5)
        ROWS(6)
    default:
        break;
    }
#undef ROWS
}

/* ---- many rows --------------------------------------------------------------------------------------------------- */

#define MANY_ROWS 17

static void block_begin(sh_wtype t, int rows) {
    (void)t;
    (void)rows;
}

/* Codes stay unsigned; the groups' offsets take their zero point off. */
static void block_unpack(sh_wtype t, const uint8_t *block, size_t groups, block_weights *to) {
    const __m512i low = _mm512_set1_epi8(15);
    int8_t *code = to->code;
    for (size_t g = 0; g < groups; g++, block += sh_wtype_block(t)) {
        for (int h = 0; h < 2; h++) {
            __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)(block + 32 * h));
            _mm512_store_ps(to->scale[g] + 16 * h, _mm512_cvtph_ps(half));
        }
        const uint8_t *from = block + 2 * SH_PANEL;
        if (t == SH_W_Q8) {
            memcpy(code, from, SH_PANEL * SH_Q8_GROUP);
            code += SH_PANEL * SH_Q8_GROUP;
            continue;
        }
        for (int u = 0; u < SH_Q4_GROUP / 8; u++, from += 128, code += 256)
            for (int h = 0; h < 2; h++) {
                __m512i v = _mm512_loadu_si512(from + 64 * h);
                _mm512_store_si512(code + 64 * h, _mm512_and_si512(v, low));
                _mm512_store_si512(code + 128 + 64 * h, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
            }
    }
}

/* Integer sums of one group, from their offsets on. */
SH_INLINE void group_sums(const int8_t *w, const int8_t *x, const int32_t *offset, int rows, int group,
                          __m512i s[TILE_ROWS][2]) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = _mm512_set1_epi32(offset[r]);
#pragma GCC unroll 2
    for (int i = 0; i < group; i += 4, w += 128) {
        __m512i a = _mm512_load_si512(w), b = _mm512_load_si512(w + 64), v[TILE_ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) v[r] = four(x + r * group + i);
        dot(s, 0, a, v, rows);
        dot(s, 1, b, v, rows);
    }
}

SH_INLINE void run_block(const block_tile *j, int rows, int group) {
    const int8_t *w = j->w->code, *x = j->code;
    const char *next = j->next;
    __m512 acc[TILE_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) acc[r][h] = _mm512_load_ps(j->sum[r] + 16 * h);
    for (int g = 0; g < j->groups; g++, w += SH_PANEL * group, x += TILE_ROWS * group) {
        __m512i s[TILE_ROWS][2];
        for (const char *end = next + j->step; next < end; next += 64) _mm_prefetch(next, _MM_HINT_T0);
        group_sums(w, x, j->offset + g * TILE_ROWS, rows, group, s);
        __m512 lo = _mm512_load_ps(j->w->scale[g]), hi = _mm512_load_ps(j->w->scale[g] + 16);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512 d = _mm512_set1_ps(j->scale[g * TILE_ROWS + r]);
            acc[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[r][0]), _mm512_mul_ps(lo, d), acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[r][1]), _mm512_mul_ps(hi, d), acc[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) _mm512_store_ps(j->sum[r] + 16 * h, acc[r][h]);
}

static void block_tile_run(sh_wtype t, const block_tile *j, int rows) {
#define ROWS(n)                                                                                                        \
    case n:                                                                                                            \
        t == SH_W_Q8 ? run_block(j, n, SH_Q8_GROUP) : run_block(j, n, SH_Q4_GROUP);                                    \
        break;
    switch (rows) {
        ROWS(1)
        ROWS(2)
        ROWS(3)
        ROWS(4)
        ROWS(5)
        ROWS(6)
    default:
        break;
    }
#undef ROWS
}

static void vnni_gemm_q(const sh_wmat *w, int p0, int p1, const sh_qrows *x, int r0, int m, float *y, size_t ldy) {
    if (m < MANY_ROWS)
        walk_gemm(w, p0, p1, x, r0, m, y, ldy);
    else
        block_gemm(w, p0, p1, x, r0, m, y, ldy);
}

/* ---- activations ------------------------------------------------------------------------------------------------- */

/* One group of n ≤ group inputs; group is a multiple of 16. */
SH_INLINE void quantize_group(const float *x, int n, int group, int8_t *code, float *scale, int32_t *sum) {
    __m512i top = _mm512_setzero_si512(), s = top;
    const __m512i absolute = _mm512_set1_epi32(0x7fffffff);
    for (int i = 0; i < n; i += 16)
        top = _mm512_max_epu32(
            top, _mm512_and_si512(_mm512_castps_si512(_mm512_maskz_loadu_ps(lanes(n - i), x + i)), absolute));
    uint32_t bits = _mm512_reduce_max_epu32(top);
    float a;
    memcpy(&a, &bits, sizeof a);
    bool bad = bits >= 0x7f800000u, none = !bad && a < 0x1p-100f;
    *scale = bad ? __builtin_nanf("") : none ? 0 : a * (1.0f / 127.0f);
    __m512 inv = _mm512_set1_ps(bad || none ? 0 : 127.0f / a);
    for (int i = 0; i < group; i += 16) {
        __m512 v = _mm512_maskz_loadu_ps(bad || none ? 0 : lanes(n - i), x + i);
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, inv));
        s = _mm512_add_epi32(s, q);
        _mm_storeu_si128((__m128i *)(void *)(code + i), _mm512_cvtepi32_epi8(q));
    }
    *sum = _mm512_reduce_add_epi32(s);
}

static void vnni_quantize(const float *x, int k, int group, int8_t *code, float *scale, int32_t *sum) {
    for (int g = 0, i = 0; i < k; g++, i += group)
        quantize_group(x + i, k - i < group ? k - i : group, group, code + i, scale + g, sum + g);
}

void sh_kernels_fill_avx512vnni(sh_kernels *t) {
    t->quant_q8 = group_q8;
    t->quant_q4 = group_q4;
    t->quantize = vnni_quantize;
    t->gemm_q = vnni_gemm_q;
}
