/*
 * Products with quantised weights for AVX2. The 8-bit multiply-add joins pairs in 16 bits and saturates: codes of q4
 * are at most 15, and q8 takes |w| times x with the sign of w, both within ±127, so that 2 · 127 · 127 fits. Same bits
 * as ref.c (kernels.h, quant.h).
 */
#include <immintrin.h>
#include <stdbool.h>
#include <string.h>
#include "model/kernels/quant_group.h"

#define SH_INLINE static inline __attribute__((always_inline))

#define TILE_ROWS   2
#define K_BLOCK     1024
#define PANEL_BLOCK 8
#define AHEAD       2048 /* bytes */

SH_INLINE __m256i load(const void *p) {
    return _mm256_loadu_si256(p);
}

SH_INLINE __m256i four(const int8_t *x) {
    int32_t v;
    memcpy(&v, x, sizeof v);
    return _mm256_set1_epi32(v);
}

SH_INLINE __m256i lanes8(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* s + Σ of four products in each 32-bit lane: |u| ≤ 127 unsigned, v signed. */
SH_INLINE __m256i dot(__m256i s, __m256i u, __m256i v) {
    return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(u, v), _mm256_set1_epi16(1)));
}

/* Eight outputs (quarter h of a panel) of one block. */
SH_INLINE void quarter_sums(sh_wtype t, const uint8_t *codes, const int8_t *x, size_t ld, int rows,
                            __m256i s[TILE_ROWS]) {
    const __m256i low = _mm256_set1_epi8(15), zero = _mm256_set1_epi8((char)0x80);
    for (int i = 0; i < sh_wtype_group(t); i += t == SH_W_Q8 ? 4 : 8, codes += 128) {
        __m256i w = load(codes);
        if (t == SH_W_Q8) {
            w = _mm256_xor_si256(w, zero);
            __m256i size = _mm256_abs_epi8(w);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) s[r] = dot(s[r], size, _mm256_sign_epi8(four(x + (size_t)r * ld + i), w));
            continue;
        }
        __m256i a = _mm256_and_si256(w, low), b = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            s[r] = dot(s[r], a, four(x + (size_t)r * ld + i));
            s[r] = dot(s[r], b, four(x + (size_t)r * ld + i + 4));
        }
    }
}

/* What a tile works on: rows of x from r0, groups [g0, g1) of one panel; the sums wait in y between K blocks. */
typedef struct tile {
    const uint8_t *block; /* of group g0 */
    const sh_qrows *x;
    size_t r0, g0, g1;
    float *y;
    size_t ldy;
    int outputs; /* of the panel that exist */
} tile;

SH_INLINE void run_quarter(sh_wtype t, const tile *j, int h, int rows) {
    __m256i mask = lanes8(j->outputs - 8 * h);
    __m256 acc[TILE_ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        acc[r] = j->g0 ? _mm256_maskload_ps(j->y + (size_t)r * j->ldy + 8 * h, mask) : _mm256_setzero_ps();
    const int8_t *x = j->x->code + j->r0 * j->x->ld + j->g0 * (size_t)sh_wtype_group(t);
    const uint8_t *block = j->block;
    for (size_t g = j->g0; g < j->g1; g++, block += sh_wtype_block(t), x += sh_wtype_group(t)) {
        __m256i s[TILE_ROWS];
        _mm_prefetch((const char *)block + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            int32_t sum = j->x->sum[(j->r0 + (size_t)r) * j->x->groups + g];
            s[r] = _mm256_set1_epi32(t == SH_W_Q4 ? -(sum * SH_Q4_ZERO) : 0);
        }
        quarter_sums(t, block + 2 * SH_PANEL + 32 * h, x, j->x->ld, rows, s);
        __m256 d = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(block + 16 * h)));
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            __m256 e = _mm256_set1_ps(j->x->scale[(j->r0 + (size_t)r) * j->x->groups + g]);
            acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[r]), _mm256_mul_ps(d, e), acc[r]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) _mm256_maskstore_ps(j->y + (size_t)r * j->ldy + 8 * h, mask, acc[r]);
}

static void run_tile(sh_wtype t, const tile *j, int rows) {
    for (int h = 0; h < 4 && 8 * h < j->outputs; h++) {
        if (t == SH_W_Q8)
            rows == 1 ? run_quarter(SH_W_Q8, j, h, 1) : run_quarter(SH_W_Q8, j, h, 2);
        else
            rows == 1 ? run_quarter(SH_W_Q4, j, h, 1) : run_quarter(SH_W_Q4, j, h, 2);
    }
}

static void run_block(const sh_wmat *w, int p0, int p1, const sh_qrows *x, int r0, int m, size_t g0, size_t g1,
                      float *y, size_t ldy) {
    size_t groups = (size_t)sh_wtype_groups(w->type, w->k), block = sh_wtype_block(w->type);
    for (int a = 0; a < m; a += TILE_ROWS)
        for (int p = p0; p < p1; p++) {
            int outputs = w->n - p * SH_PANEL;
            tile j = {.block = (const uint8_t *)w->data + ((size_t)p * groups + g0) * block,
                      .x = x,
                      .r0 = (size_t)(r0 + a),
                      .g0 = g0,
                      .g1 = g1,
                      .y = y + (size_t)a * ldy + (size_t)p * SH_PANEL,
                      .ldy = ldy,
                      .outputs = outputs < SH_PANEL ? outputs : SH_PANEL};
            run_tile(w->type, &j, m - a < TILE_ROWS ? m - a : TILE_ROWS);
        }
}

static void avx2_gemm_q(const sh_wmat *w, int p0, int p1, const sh_qrows *x, int r0, int m, float *y, size_t ldy) {
    size_t groups = (size_t)sh_wtype_groups(w->type, w->k), step = (size_t)(K_BLOCK / sh_wtype_group(w->type));
    for (int p = p0; p < p1; p += PANEL_BLOCK)
        for (size_t g = 0; g < groups; g += step)
            run_block(w, p, p1 - p < PANEL_BLOCK ? p1 : p + PANEL_BLOCK, x, r0, m, g,
                      g + step < groups ? g + step : groups, y, ldy);
}

/* ---- activations ------------------------------------------------------------------------------------------------- */

SH_INLINE uint32_t top_of(__m256i v) {
    __m128i a = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    a = _mm_max_epu32(a, _mm_shuffle_epi32(a, 0x4e));
    a = _mm_max_epu32(a, _mm_shuffle_epi32(a, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(a);
}

SH_INLINE int32_t sum_of(__m256i v) {
    __m128i a = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    a = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4e));
    a = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0xb1));
    return _mm_cvtsi128_si32(a);
}

SH_INLINE void quantize_group(const float *x, int n, int group, int8_t *code, float *scale, int32_t *sum) {
    __m256i top = _mm256_setzero_si256(), s = top;
    const __m256i absolute = _mm256_set1_epi32(0x7fffffff);
    for (int i = 0; i < n; i += 8)
        top = _mm256_max_epu32(
            top, _mm256_and_si256(_mm256_castps_si256(_mm256_maskload_ps(x + i, lanes8(n - i))), absolute));
    uint32_t bits = top_of(top);
    float a;
    memcpy(&a, &bits, sizeof a);
    bool bad = bits >= 0x7f800000u, none = bad || a < 0x1p-100f;
    *scale = bad ? __builtin_nanf("") : none ? 0 : a * (1.0f / 127.0f);
    __m256 inv = _mm256_set1_ps(none ? 0 : 127.0f / a);
    for (int i = 0; i < group; i += 8) {
        __m256 v = _mm256_maskload_ps(x + (i < n ? i : 0), lanes8(none ? 0 : n - i));
        __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(v, inv));
        s = _mm256_add_epi32(s, q);
        __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        _mm_storel_epi64((__m128i *)(void *)(code + i), _mm_packs_epi16(w, w));
    }
    *sum = sum_of(s);
}

static void avx2_quantize(const float *x, int k, int group, int8_t *code, float *scale, int32_t *sum) {
    for (int g = 0, i = 0; i < k; g++, i += group)
        quantize_group(x + i, k - i < group ? k - i : group, group, code + i, scale + g, sum + g);
}

void sh_kernels_fill_avx2_quant(sh_kernels *t) {
    t->quant_q8 = group_q8;
    t->quant_q4 = group_q4;
    t->quantize = avx2_quantize;
    t->gemm_q = avx2_gemm_q;
}
