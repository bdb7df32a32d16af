/* Sixteen f32 lanes on AVX2: two registers. The vocabulary of rows.h; same names as vec512.h, same bits. `n` lanes: the
 * first n of 16, the others untouched in memory and, in the _n arithmetic, passed through. For avx2.c only. */
#ifndef SH_MODEL_KERNELS_VEC256_H
#define SH_MODEL_KERNELS_VEC256_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include "model/kernels/poly.h"

#define SH_INLINE static inline __attribute__((always_inline))

typedef struct v16 {
    __m256 a, b; /* lanes 0–7, 8–15 */
} v16;

SH_INLINE __m256i lanes8(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SH_INLINE __m256 pick(__m256 no, __m256 yes, int n) {
    return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(lanes8(n)));
}

SH_INLINE v16 v_zero(void) {
    return (v16){_mm256_setzero_ps(), _mm256_setzero_ps()};
}
SH_INLINE v16 v_set1(float a) {
    return (v16){_mm256_set1_ps(a), _mm256_set1_ps(a)};
}
SH_INLINE v16 v_load(const float *p) {
    return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
SH_INLINE v16 v_load_n(const float *p, int n) {
    return (v16){_mm256_maskload_ps(p, lanes8(n)), _mm256_maskload_ps(p + 8, lanes8(n - 8))};
}
SH_INLINE void v_store(float *p, v16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
SH_INLINE void v_store_n(float *p, v16 x, int n) {
    _mm256_maskstore_ps(p, lanes8(n), x.a);
    _mm256_maskstore_ps(p + 8, lanes8(n - 8), x.b);
}
SH_INLINE v16 v_add(v16 x, v16 y) {
    return (v16){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
SH_INLINE v16 v_sub(v16 x, v16 y) {
    return (v16){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
SH_INLINE v16 v_mul(v16 x, v16 y) {
    return (v16){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
SH_INLINE v16 v_div(v16 x, v16 y) {
    return (v16){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
SH_INLINE v16 v_fma(v16 x, v16 y, v16 z) {
    return (v16){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
SH_INLINE v16 v_fms(v16 x, v16 y, v16 z) { /* x·y − z */
    return (v16){_mm256_fmsub_ps(x.a, y.a, z.a), _mm256_fmsub_ps(x.b, y.b, z.b)};
}
SH_INLINE v16 v_fnma(v16 x, v16 y, v16 z) { /* z − x·y */
    return (v16){_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
/* x > y ? x : y, and x < y ? x : y */
SH_INLINE v16 v_max(v16 x, v16 y) {
    return (v16){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
SH_INLINE v16 v_min(v16 x, v16 y) {
    return (v16){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
SH_INLINE v16 keep_from(v16 old, v16 new, int n) {
    return (v16){pick(old.a, new.a, n), pick(old.b, new.b, n - 8)};
}
/* a, but 0 where x < min (a NaN is not). */
SH_INLINE v16 v_zero_below(v16 a, v16 x, v16 min) {
    return (v16){_mm256_and_ps(a.a, _mm256_cmp_ps(x.a, min.a, _CMP_NLT_UQ)),
                 _mm256_and_ps(a.b, _mm256_cmp_ps(x.b, min.b, _CMP_NLT_UQ))};
}
/* Lanes from n on keep z, x and y respectively. */
SH_INLINE v16 v_fma_n(v16 x, v16 y, v16 z, int n) {
    return keep_from(z, v_fma(x, y, z), n);
}
SH_INLINE v16 v_add_n(v16 x, v16 y, int n) {
    return keep_from(x, v_add(x, y), n);
}
SH_INLINE v16 v_max_n(v16 x, v16 y, int n) {
    return keep_from(y, v_max(x, y), n);
}

SH_INLINE v16 v_abs(v16 x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (v16){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
SH_INLINE v16 v_copysign(v16 x, v16 s) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    v16 m = v_abs(x);
    return (v16){_mm256_or_ps(m.a, _mm256_and_ps(sign, s.a)), _mm256_or_ps(m.b, _mm256_and_ps(sign, s.b))};
}

/* t holds n + SH_ROUND_F: 2^n, and x·2^n in two factors as sh_expf does. */
SH_INLINE __m256i exponent8(__m256 t) {
    return _mm256_sub_epi32(_mm256_castps_si256(t), _mm256_castps_si256(_mm256_set1_ps(SH_ROUND_F)));
}
SH_INLINE __m256 pow2_bits8(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
SH_INLINE __m256 scale_pow2_8(__m256 x, __m256 t) {
    __m256i n = exponent8(t), a = _mm256_srai_epi32(n, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, pow2_bits8(a)), pow2_bits8(_mm256_sub_epi32(n, a)));
}
SH_INLINE v16 v_pow2(v16 t) {
    return (v16){pow2_bits8(exponent8(t.a)), pow2_bits8(exponent8(t.b))};
}
SH_INLINE v16 v_scale_pow2(v16 x, v16 t) {
    return (v16){scale_pow2_8(x.a, t.a), scale_pow2_8(x.b, t.b)};
}

/* The fixed tree over the lanes of one vector. */
SH_INLINE float v_join(v16 x) {
    __m256 e = _mm256_add_ps(x.a, x.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
SH_INLINE float v_join_max(v16 x) {
    __m256 e = _mm256_max_ps(x.a, x.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

/* Sums of e[0..3] of eight lanes each, as four lanes in order; the lower half of the fixed tree. */
SH_INLINE __m128 join4(const __m256 e[4]) {
    __m256 c = _mm256_add_ps(_mm256_permute2f128_ps(e[0], e[2], 0x20), _mm256_permute2f128_ps(e[0], e[2], 0x31));
    __m256 d = _mm256_add_ps(_mm256_permute2f128_ps(e[1], e[3], 0x20), _mm256_permute2f128_ps(e[1], e[3], 0x31));
    c = _mm256_add_ps(_mm256_shuffle_ps(c, d, 0x44), _mm256_shuffle_ps(c, d, 0xee)); /* e0 e0 e1 e1 | e2 e2 e3 e3 */
    __m128 lo = _mm256_castps256_ps128(c), hi = _mm256_extractf128_ps(c, 1);
    return _mm_add_ps(_mm_shuffle_ps(lo, hi, 0x88), _mm_shuffle_ps(lo, hi, 0xdd));
}

SH_INLINE v16 v_from_bf16_n(const uint16_t *p, int n) {
    uint16_t h[16] = {0};
    if (n < 16) {
        memcpy(h, p, (size_t)n * 2);
        p = h;
    }
    __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p + 8)));
    return (v16){_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}
SH_INLINE __m256i to_bf16_8(__m256 x) {
    __m256i u = _mm256_castps_si256(x), top = _mm256_srli_epi32(u, 16);
    __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), nan);
}
SH_INLINE void v_to_bf16_n(uint16_t *p, v16 x, int n) {
    __m256i r = _mm256_packus_epi32(to_bf16_8(x.a), to_bf16_8(x.b));
    uint16_t h[16];
    _mm256_storeu_si256((__m256i *)(void *)(n < 16 ? h : p), _mm256_permute4x64_epi64(r, 0xd8));
    if (n < 16) memcpy(p, h, (size_t)n * 2);
}

/* The greater bits of each lane, as unsigned integers: absolute values order like that, NaN above all. */
SH_INLINE v16 v_max_bits(v16 x, v16 y) {
    return (v16){_mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(x.a), _mm256_castps_si256(y.a))),
                 _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(x.b), _mm256_castps_si256(y.b)))};
}
SH_INLINE float v_join_max_bits(v16 x) {
    __m256i e = _mm256_max_epu32(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b));
    __m128i q = _mm_max_epu32(_mm256_castsi256_si128(e), _mm256_extracti128_si256(e, 1));
    q = _mm_max_epu32(q, _mm_shuffle_epi32(q, 0x4e));
    q = _mm_max_epu32(q, _mm_shuffle_epi32(q, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(q));
}
SH_INLINE v16 v_from_i8_n(const uint8_t *p, int n) {
    uint8_t h[16] = {0};
    if (n < 16) {
        memcpy(h, p, (size_t)n);
        p = h;
    }
    __m256i a = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
    __m256i b = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p + 8)));
    return (v16){_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)};
}
SH_INLINE void v_to_i8_n(uint8_t *p, v16 x, int n) { /* |x| < 127.5; rounds to nearest even */
    __m256i r = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    r = _mm256_permute4x64_epi64(r, 0xd8);
    uint8_t h[16];
    _mm_storeu_si128((__m128i *)(void *)(n < 16 ? h : p),
                     _mm_packs_epi16(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
    if (n < 16) memcpy(p, h, (size_t)n);
}

#endif
