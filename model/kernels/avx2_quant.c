/*
 * Products with quantised weights for AVX2, which has no integer dot product that is exact for all codes of q8: its
 * 8-bit multiply-add joins pairs in 16 bits and saturates. So
 *   q8  codes are widened to 16 bits: of each four inputs 0 and 2 lie in one register, 1 and 3 in another, where two
 *       multiply-adds bring all four to their output's lane of 32 bits
 *   q4  codes are at most 15, and the pairs of a whole group fit in 16 bits: 8 · 2 · 15 · 128 < 2¹⁵
 * Both take weights unsigned; their zero point comes off through the row's sum of codes. Same bits as ref.c (kernels.h,
 * quant.h).
 */
#include "model/kernels/quant_group.h"

#define TILE_ROWS  4 /* eight integer sums; four registers of codes, constants, a row's codes, a product */
#define WALK_WORDS 2
#include "model/kernels/quant_tile256.h"

SH_INLINE void store(uint32_t *p, __m256i v) {
    _mm256_storeu_si256((__m256i *)(void *)p, v);
}

/* Keeps the compiler from joining products before it adds them: it would run out of registers. */
SH_INLINE void settle(__m256i *s) {
    __asm__("" : "+x"(*s));
}

/* Words of a group of a row: in q8 all pairs of even inputs, then all of odd ones; in q4 the codes as they are. */
static inline size_t walk_words(sh_wtype t) {
    return (size_t)sh_wtype_group(t) / (t == SH_W_Q8 ? 2 : 4);
}

/* Group by group, in it row by row. */
static void walk_pack(sh_wtype t, const sh_qrows *x, size_t r0, int rows, size_t g0, size_t g1, uint32_t *to) {
    for (size_t g = g0; g < g1; g++)
        for (size_t r = r0; r < r0 + (size_t)rows; r++, to += walk_words(t)) {
            const int8_t *code = x->code + r * x->ld + g * (size_t)sh_wtype_group(t);
            if (t == SH_W_Q4) {
                store(to, load(code));
                continue;
            }
            for (int i = 0; i < SH_Q8_GROUP / 4; i += 8) {
                __m256i v = load(code + 4 * i);
                store(to + i, _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
                store(to + SH_Q8_GROUP / 4 + i, _mm256_srai_epi16(v, 8));
            }
        }
}

/* ---- one group ----------------------------------------------------------------------------------------------------
 */

SH_INLINE void sums_q8(const uint8_t *codes, const uint32_t *x, int rows, int quarters, const uint8_t *next,
                       size_t step, __m256i s[TILE_ROWS][4]) {
    const __m256i low = _mm256_set1_epi16(255);
    for (int i = 0; i < SH_Q8_GROUP; i += 4, codes += 128, x++) {
        __m256i a[4], b[4];
        next = fetch(next, step, quarters);
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++) {
            __m256i w = load(codes + 32 * q);
            a[q] = _mm256_and_si256(w, low);
            b[q] = _mm256_srli_epi16(w, 8);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            __m256i u = word(x + r * SH_Q8_GROUP / 2), v = word(x + r * SH_Q8_GROUP / 2 + SH_Q8_GROUP / 4);
#pragma GCC unroll 8
            for (int q = 0; q < 2 * quarters; q++) {
                __m256i *to = &s[r][q % quarters];
                *to = _mm256_add_epi32(*to, q < quarters ? _mm256_madd_epi16(a[q], u)
                                                         : _mm256_madd_epi16(b[q - quarters], v));
                settle(to);
            }
        }
    }
}

SH_INLINE void sums_q4(const uint8_t *codes, const uint32_t *x, int rows, int quarters, const uint8_t *next,
                       size_t step, __m256i s[TILE_ROWS][4]) {
    const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int i = 0; i < SH_Q4_GROUP; i += 8, codes += 128, x += 2) {
        __m256i a[4], b[4];
        next = fetch(next, step, quarters);
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++) {
            __m256i w = load(codes + 32 * q);
            a[q] = _mm256_and_si256(w, low);
            b[q] = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            __m256i u = word(x + r * SH_Q4_GROUP / 4), v = word(x + r * SH_Q4_GROUP / 4 + 1);
#pragma GCC unroll 8
            for (int q = 0; q < 2 * quarters; q++) {
                __m256i *to = &s[r][q % quarters];
                *to = _mm256_add_epi16(*to, q < quarters ? _mm256_maddubs_epi16(a[q], u)
                                                         : _mm256_maddubs_epi16(b[q - quarters], v));
                settle(to);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++) s[r][q] = _mm256_madd_epi16(s[r][q], one);
    }
}

SH_INLINE void part_sums(sh_wtype t, const part *j, const uint8_t *codes, const uint32_t *x, const int32_t *sum,
                         const uint8_t *next, int rows, int quarters, __m256i s[TILE_ROWS][4]) {
#pragma GCC unroll 16
    for (int i = 0; i < rows * quarters; i++) s[i / quarters][i % quarters] = _mm256_setzero_si256();
    if (t == SH_W_Q8)
        sums_q8(codes, x, rows, quarters, next, j->step, s);
    else
        sums_q4(codes, x, rows, quarters, next, j->step, s);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        __m256i zero = _mm256_slli_epi32(word(sum + (size_t)r * j->groups), t == SH_W_Q8 ? 7 : 3); /* · 128, · 8 */
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++) s[r][q] = _mm256_sub_epi32(s[r][q], zero);
    }
}

SH_INLINE __m256 sum_float(__m256i s) {
    return _mm256_cvtepi32_ps(s);
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
    t->gemm_q = walk_gemm;
}
