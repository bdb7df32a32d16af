/* Sixteen f32 lanes on AVX-512: one register. The vocabulary of rows.h; same names as vec256.h, same bits. `n` lanes:
 * the first n of 16, the others untouched in memory and, in the _n arithmetic, passed through. For avx512.c only. */
#ifndef SH_MODEL_KERNELS_VEC512_H
#define SH_MODEL_KERNELS_VEC512_H

#include <immintrin.h>
#include <stdint.h>
#include "model/kernels/poly.h"

#define SH_INLINE static inline __attribute__((always_inline))

typedef __m512 v16;

SH_INLINE __mmask16 lanes(int n) {
    return (__mmask16)((1u << n) - 1);
}

SH_INLINE v16 v_zero(void) {
    return _mm512_setzero_ps();
}
SH_INLINE v16 v_set1(float a) {
    return _mm512_set1_ps(a);
}
SH_INLINE v16 v_load(const float *p) {
    return _mm512_loadu_ps(p);
}
SH_INLINE v16 v_load_n(const float *p, int n) {
    return _mm512_maskz_loadu_ps(lanes(n), p);
}
SH_INLINE void v_store(float *p, v16 a) {
    _mm512_storeu_ps(p, a);
}
SH_INLINE void v_store_n(float *p, v16 a, int n) {
    _mm512_mask_storeu_ps(p, lanes(n), a);
}
SH_INLINE v16 v_add(v16 a, v16 b) {
    return _mm512_add_ps(a, b);
}
SH_INLINE v16 v_sub(v16 a, v16 b) {
    return _mm512_sub_ps(a, b);
}
SH_INLINE v16 v_mul(v16 a, v16 b) {
    return _mm512_mul_ps(a, b);
}
SH_INLINE v16 v_div(v16 a, v16 b) {
    return _mm512_div_ps(a, b);
}
SH_INLINE v16 v_fma(v16 a, v16 b, v16 c) {
    return _mm512_fmadd_ps(a, b, c);
}
SH_INLINE v16 v_fms(v16 a, v16 b, v16 c) {
    return _mm512_fmsub_ps(a, b, c);
} /* a·b − c */
SH_INLINE v16 v_fnma(v16 a, v16 b, v16 c) {
    return _mm512_fnmadd_ps(a, b, c);
} /* c − a·b */
SH_INLINE v16 v_max(v16 a, v16 b) {
    return _mm512_max_ps(a, b);
} /* a > b ? a : b */
SH_INLINE v16 v_min(v16 a, v16 b) {
    return _mm512_min_ps(a, b);
} /* a < b ? a : b */
/* a, but 0 where x < min (a NaN is not). */
SH_INLINE v16 v_zero_below(v16 a, v16 x, v16 min) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, min, _CMP_NLT_UQ), a);
}
/* Lanes from n on keep c, a and b respectively. */
SH_INLINE v16 v_fma_n(v16 a, v16 b, v16 c, int n) {
    return _mm512_mask3_fmadd_ps(a, b, c, lanes(n));
}
SH_INLINE v16 v_add_n(v16 a, v16 b, int n) {
    return _mm512_mask_add_ps(a, lanes(n), a, b);
}
SH_INLINE v16 v_max_n(v16 a, v16 b, int n) {
    return _mm512_mask_max_ps(b, lanes(n), a, b);
}

SH_INLINE v16 v_abs(v16 a) {
    return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a);
}
SH_INLINE v16 v_copysign(v16 a, v16 s) {
    __m512 sign = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(sign, a), _mm512_and_ps(sign, s));
}

/* t holds n + SH_ROUND_F: 2^n, and x·2^n in two factors as sh_expf does. */
SH_INLINE __m512i exponent(v16 t) {
    return _mm512_sub_epi32(_mm512_castps_si512(t), _mm512_castps_si512(_mm512_set1_ps(SH_ROUND_F)));
}
SH_INLINE v16 pow2_bits(__m512i n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}
SH_INLINE v16 v_pow2(v16 t) {
    return pow2_bits(exponent(t));
}
SH_INLINE v16 v_scale_pow2(v16 x, v16 t) {
    __m512i n = exponent(t), a = _mm512_srai_epi32(n, 1);
    return _mm512_mul_ps(_mm512_mul_ps(x, pow2_bits(a)), pow2_bits(_mm512_sub_epi32(n, a)));
}

/* The fixed tree over the lanes of one vector. */
SH_INLINE __m256 upper(v16 a) {
    return _mm512_extractf32x8_ps(a, 1);
}
SH_INLINE float v_join(v16 a) {
    __m256 e = _mm256_add_ps(_mm512_castps512_ps256(a), upper(a));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
SH_INLINE float v_join_max(v16 a) {
    __m256 e = _mm256_max_ps(_mm512_castps512_ps256(a), upper(a));
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

/* The same tree over 16 vectors at once, by transposing: lane 4·(i % 4) + i / 4 of the result is the sum of a[i]. */
SH_INLINE v16 v_join16(const v16 a[16]) {
    v16 b[8], c[4], d[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        d[i] = _mm512_add_ps(_mm512_shuffle_ps(c[2 * i], c[2 * i + 1], 0x44),
                             _mm512_shuffle_ps(c[2 * i], c[2 * i + 1], 0xee));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(d[0], d[1], 0x88), _mm512_shuffle_ps(d[0], d[1], 0xdd));
}

/* A word goes to the high half of a lane in one step, where extending and shifting are two. */
SH_INLINE v16 v_from_bf16(const uint16_t *p) {
    const __m512i to = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3,
                                        0, 2, 0, 1, 0, 0, 0);
    __m512i x = _mm512_maskz_loadu_epi16(0xffff, p);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, to, x));
}
SH_INLINE v16 v_from_bf16_n(const uint16_t *p, int n) {
    if (n == 16) return v_from_bf16(p);
    __m256i x = _mm256_maskz_loadu_epi16(lanes(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
SH_INLINE void v_to_bf16_n(uint16_t *p, v16 a, int n) {
    __m512i u = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
    _mm256_mask_storeu_epi16(p, lanes(n), _mm512_cvtepi32_epi16(r));
}

/* The greater bits of each lane, as unsigned integers: absolute values order like that, NaN above all. */
SH_INLINE v16 v_max_bits(v16 a, v16 b) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
SH_INLINE float v_join_max_bits(v16 a) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)_mm512_reduce_max_epu32(_mm512_castps_si512(a)))));
}
SH_INLINE v16 v_from_i8_n(const uint8_t *p, int n) {
    __m128i x = n == 16 ? _mm_loadu_si128((const __m128i *)(const void *)p) : _mm_maskz_loadu_epi8(lanes(n), p);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
}
SH_INLINE void v_to_i8_n(uint8_t *p, v16 a, int n) { /* |a| < 127.5; rounds to nearest even */
    _mm_mask_storeu_epi8(p, lanes(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}

#endif
