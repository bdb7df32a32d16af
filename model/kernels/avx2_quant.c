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

#define TILE_ROWS  4
#define WALK_WORDS 2
#define SIDE(rows) 1

typedef struct tile {
    const uint8_t *block; /* of group g0 of the first panel */
    size_t stride;        /* bytes to the same group of the next panel */
    const uint8_t *next;  /* weights to be fetched meanwhile, as many as these: their share `index` of `tiles` */
    size_t index, tiles;
    const uint32_t *x;    /* packed rows from g0 */
    const float *scale;   /* of the first row's group 0 */
    const int32_t *sum;
    size_t groups, g0, g1; /* groups: of a row of x */
    float *y;
    size_t ldy;
    int outputs; /* from the first panel's first on */
} tile;

SH_INLINE __m256i load(const void *p) {
    return _mm256_loadu_si256(p);
}

SH_INLINE __m256i lanes8(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

SH_INLINE __m256i word(const uint32_t *x) {
    return _mm256_set1_epi32((int)*x);
}

/* s + v, and no other order of additions: compilers that join two products before they add them run out of registers. */
SH_INLINE void add_to(__m256i *s, __m256i v, bool wide) {
    *s = wide ? _mm256_add_epi32(*s, v) : _mm256_add_epi16(*s, v);
    __asm__("" : "+x"(*s));
}

SH_INLINE int walk_words(sh_wtype t) {
    return t == SH_W_Q8 ? 2 : 1;
}

/* Group by group and in it row by row: the codes of q4 as they are; for q8 of each four inputs 0 and 2 in 16 bits, then
 * 1 and 3 of each. */
static void walk_pack(sh_wtype t, const sh_qrows *x, size_t r0, int rows, size_t g0, size_t g1, uint32_t *to) {
    size_t size = (size_t)sh_wtype_group(t);
    for (size_t g = g0; g < g1; g++)
        for (size_t r = r0; r < r0 + (size_t)rows; r++, to += size / 4 * (size_t)walk_words(t)) {
            const int8_t *code = x->code + r * x->ld + g * size;
            if (t == SH_W_Q4) {
                _mm256_storeu_si256((__m256i *)(void *)to, load(code));
                continue;
            }
            for (int i = 0; i < 2; i++) {
                __m256i v = load(code + 32 * i);
                _mm256_storeu_si256((__m256i *)(void *)(to + 8 * i), _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
                _mm256_storeu_si256((__m256i *)(void *)(to + 16 + 8 * i), _mm256_srai_epi16(v, 8));
            }
        }
}

SH_INLINE void sums_q8(const uint8_t *codes, const uint32_t *x, int rows, int quarters, const uint8_t *next,
                       size_t step, __m256i s[TILE_ROWS][4]) {
    const __m256i even = _mm256_set1_epi16(255);
    for (int i = 0; i < SH_Q8_GROUP; i += 4, codes += 128, x++) {
        __m256i a[4], b[4];
        _mm_prefetch((const char *)next, _MM_HINT_T0);
        if (quarters == 4) _mm_prefetch((const char *)next + step / 2, _MM_HINT_T0);
        next += step;
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++) {
            __m256i w = load(codes + 32 * q);
            a[q] = _mm256_and_si256(w, even);
            b[q] = _mm256_srli_epi16(w, 8);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            __m256i u = word(x + 32 * r), v = word(x + 32 * r + 16);
#pragma GCC unroll 4
            for (int q = 0; q < quarters; q++) add_to(&s[r][q], _mm256_madd_epi16(a[q], u), true);
#pragma GCC unroll 4
            for (int q = 0; q < quarters; q++) add_to(&s[r][q], _mm256_madd_epi16(b[q], v), true);
        }
    }
}

SH_INLINE void sums_q4(const uint8_t *codes, const uint32_t *x, int rows, int quarters, const uint8_t *next,
                       size_t step, __m256i s[TILE_ROWS][4]) {
    const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int i = 0; i < SH_Q4_GROUP; i += 8, codes += 128, x += 2) {
        __m256i a[4], b[4];
        _mm_prefetch((const char *)next, _MM_HINT_T0);
        if (quarters == 4) _mm_prefetch((const char *)next + step / 2, _MM_HINT_T0);
        next += step;
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++) {
            __m256i w = load(codes + 32 * q);
            a[q] = _mm256_and_si256(w, low);
            b[q] = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            __m256i u = word(x + 8 * r), v = word(x + 8 * r + 1);
#pragma GCC unroll 4
            for (int q = 0; q < quarters; q++) {
                __m256i p = _mm256_maddubs_epi16(a[q], u);
                if (i)
                    add_to(&s[r][q], p, false);
                else
                    s[r][q] = p;
            }
#pragma GCC unroll 4
            for (int q = 0; q < quarters; q++) add_to(&s[r][q], _mm256_maddubs_epi16(b[q], v), false);
        }
    }
    const __m256i one = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++) s[r][q] = _mm256_madd_epi16(s[r][q], one);
    }
}

/* `quarters` quarters of a panel over some groups; the float sums lie in memory, the integer sums of a group need the
 * registers. */
typedef struct part {
    const uint8_t *block, *codes, *next; /* scales and codes of these quarters; what to fetch meanwhile */
    size_t step;
    const uint32_t *x;
    const float *scale;
    const int32_t *sum;
    size_t groups, n; /* groups of a row of x; of this part */
    float *acc;       /* [rows, SH_PANEL] */
} part;

SH_INLINE void run_part(sh_wtype t, const part *j, int rows, int quarters) {
    const uint8_t *block = j->block, *codes = j->codes, *next = j->next;
    const uint32_t *x = j->x;
    __m256 kept[4];
#pragma GCC unroll 4
    for (int q = 0; q < quarters; q++) kept[q] = _mm256_loadu_ps(j->acc + 8 * q);
    for (size_t g = 0; g < j->n; g++) {
        __m256i s[TILE_ROWS][4];
        if (t == SH_W_Q8) {
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
                for (int q = 0; q < quarters; q++) s[r][q] = _mm256_setzero_si256();
            }
            sums_q8(codes, x, rows, quarters, next, j->step, s);
        } else {
            sums_q4(codes, x, rows, quarters, next, j->step, s);
        }
        __m256 d[4];
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++)
            d[q] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(block + 16 * q)));
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            size_t at = (size_t)r * j->groups + g;
            __m256i zero = _mm256_slli_epi32(_mm256_set1_epi32(j->sum[at]), t == SH_W_Q8 ? 7 : 3);
            __m256 e = _mm256_set1_ps(j->scale[at]);
#pragma GCC unroll 4
            for (int q = 0; q < quarters; q++) {
                float *acc = j->acc + r * SH_PANEL + 8 * q;
                __m256 v = _mm256_cvtepi32_ps(_mm256_sub_epi32(s[r][q], zero));
                if (rows == 1)
                    kept[q] = _mm256_fmadd_ps(v, _mm256_mul_ps(d[q], e), kept[q]);
                else
                    _mm256_storeu_ps(acc, _mm256_fmadd_ps(v, _mm256_mul_ps(d[q], e), _mm256_loadu_ps(acc)));
            }
        }
        block += sh_wtype_block(t);
        codes += sh_wtype_block(t);
        next += j->step * (size_t)(t == SH_W_Q8 ? SH_Q8_GROUP / 4 : SH_Q4_GROUP / 8);
        x += sh_wtype_group(t) / 4 * walk_words(t) * rows;
    }
#pragma GCC unroll 4
    for (int q = 0; q < quarters && rows == 1; q++) _mm256_storeu_ps(j->acc + 8 * q, kept[q]);
}

#define PARTS(t)                                                                                                       \
    static __attribute__((noinline)) void parts_##t(const part *j, int rows) {                                         \
        switch (rows) {                                                                                                \
        case 1:                                                                                                        \
            run_part(t, j, 1, 4);                                                                                      \
            break;                                                                                                     \
        case 2:                                                                                                        \
            run_part(t, j, 2, 4);                                                                                      \
            break;                                                                                                     \
        case 3:                                                                                                        \
            run_part(t, j, 3, 2);                                                                                      \
            break;                                                                                                     \
        default:                                                                                                       \
            run_part(t, j, 4, 2);                                                                                      \
            break;                                                                                                     \
        }                                                                                                              \
    }
PARTS(SH_W_Q8)
PARTS(SH_W_Q4)

#define AHEAD 2048 /* bytes */
#define CHUNK 256 /* inputs */
static void walk_tile(sh_wtype t, const tile *j, int rows, int panels) {
    float acc[2][TILE_ROWS * SH_PANEL] __attribute__((aligned(32)));
    for (int i = 0; i < panels; i++)
        for (int r = 0; r < rows; r++)
            for (int q = 0; q < 4; q++)
                _mm256_store_ps(acc[i] + r * SH_PANEL + 8 * q,
                                j->g0 ? _mm256_maskload_ps(j->y + (size_t)r * j->ldy + 32 * i + 8 * q,
                                                           lanes8(j->outputs - 32 * i - 8 * q))
                                      : _mm256_setzero_ps());
    const int quarters = rows <= 2 ? 4 : 2;
    const size_t halves = 4 / (size_t)quarters, bytes = sh_wtype_block(t), size = (size_t)sh_wtype_group(t);
    const size_t chunk = CHUNK / size, shares = halves * j->tiles;
    for (size_t g = j->g0; g < j->g1; g += chunk) {
        size_t n = g + chunk < j->g1 ? chunk : j->g1 - g, at = (g - j->g0) * bytes;
        for (int i = 0; i < panels; i++)
            for (size_t h = 0; h < halves; h++) {
                const uint8_t *block = j->block + (size_t)i * j->stride + at;
                part k = {.block = block + 32 * h,
                          .codes = block + 2 * SH_PANEL + 64 * h,
                          .next = (j->tiles > 1 ? j->next + at : block + (halves > 1 ? n * bytes : AHEAD)) +
                                  n * bytes * (j->index * halves + h) / shares,
                          .step = 128 / shares,
                          .x = j->x + (g - j->g0) * (size_t)(sh_wtype_group(t) / 4 * walk_words(t) * rows),
                          .scale = j->scale + g,
                          .sum = j->sum + g,
                          .groups = j->groups,
                          .n = n,
                          .acc = acc[i] + 16 * h};
                t == SH_W_Q8 ? parts_SH_W_Q8(&k, rows) : parts_SH_W_Q4(&k, rows);
            }
    }
    for (int i = 0; i < panels; i++)
        for (int r = 0; r < rows; r++)
            for (int q = 0; q < 4; q++)
                _mm256_maskstore_ps(j->y + (size_t)r * j->ldy + 32 * i + 8 * q, lanes8(j->outputs - 32 * i - 8 * q),
                                    _mm256_load_ps(acc[i] + r * SH_PANEL + 8 * q));
}

#include "model/kernels/quant_walk.h"

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
