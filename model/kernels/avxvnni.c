/*
 * Products with quantised weights for AVX-VNNI, the 256-bit integer dot product of CPUs without AVX-512: unsigned codes
 * of weights times signed codes of activations, four at a time, exact in 32 bits. The weights' zero point is taken off
 * through the row's sum of codes, with which the sums begin. Same bits as ref.c (kernels.h, quant.h).
 */
#include <stdbool.h>
#include "model/kernels/quant.h"

#define TILE_ROWS   6 /* twelve integer sums, two registers of codes, a row's codes, a constant */
#define TILE_PASSES 2 /* one for each half of the panel */
#define WALK_WORDS  1
#include "model/kernels/quant_blocks.h"
#include "model/kernels/quant_tile256.h"

#define MANY_ROWS 17

/* Adds 32 unsigned codes times four inputs to eight sums. Written out, so that every compiler keeps the sum where it
 * is. */
SH_INLINE void dot(__m256i *s, __m256i u, __m256i x) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(*s) : "x"(u), "x"(x));
}

SH_INLINE __m256i low4(__m256i v) {
    return _mm256_and_si256(v, _mm256_set1_epi8(15));
}

SH_INLINE __m256i high4(__m256i v) {
    return low4(_mm256_srli_epi16(v, 4));
}

/* Sums begin at the bits of 1.5 · 2²³, as a float: its last bit is worth 1, so a group's sum (at most 64 · 2¹⁴ = 2²⁰)
 * makes the float 1.5 · 2²³ + sum, and a subtraction leaves the sum, exact. A conversion would take the units that
 * multiply. */
#define SUM_ZERO 0x4b400000

SH_INLINE __m256 sum_float(__m256i s) {
    return _mm256_sub_ps(_mm256_castsi256_ps(s), _mm256_set1_ps(0x1.8p23f));
}

/* ---- few rows ---------------------------------------------------------------------------------------------------- */

static inline size_t walk_words(sh_wtype t) {
    return (size_t)sh_wtype_group(t) / 4;
}

static void walk_pack(sh_wtype t, const sh_qrows *x, size_t r0, int rows, size_t g0, size_t g1, uint32_t *to) {
    walk_pack_codes(t, x, r0, rows, g0, g1, to);
}

/* Codes times the words x, one of each row, `ld` apart. */
SH_INLINE void dots(__m256i s[TILE_ROWS][4], const __m256i *codes, const uint32_t *x, size_t ld, int rows,
                    int quarters) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        __m256i v = word(x + (size_t)r * ld);
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++) dot(&s[r][q], codes[q], v);
    }
}

SH_INLINE void part_sums(sh_wtype t, const part *j, const uint8_t *codes, const uint32_t *x, const int32_t *sum,
                         const uint8_t *next, int rows, int quarters, __m256i s[TILE_ROWS][4]) {
    const int words = (int)walk_words(t), turn = t == SH_W_Q8 ? 1 : 2;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        __m256i v = _mm256_slli_epi32(word(sum + (size_t)r * j->groups), t == SH_W_Q8 ? 7 : 3); /* · 128, · 8 */
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++) s[r][q] = _mm256_sub_epi32(_mm256_set1_epi32(SUM_ZERO), v);
    }
    for (int i = 0; i < words; i += turn, codes += 128, x += turn) {
        __m256i v[4];
        next = fetch(next, j->step, quarters);
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++) v[q] = t == SH_W_Q8 ? load(codes + 32 * q) : low4(load(codes + 32 * q));
        dots(s, v, x, (size_t)words, rows, quarters);
        if (t == SH_W_Q8) continue;
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++) v[q] = high4(load(codes + 32 * q));
        dots(s, v, x + 1, (size_t)words, rows, quarters);
    }
}

/* ---- many rows --------------------------------------------------------------------------------------------------- */

static void block_begin(sh_wtype t, int rows) {
    (void)t;
    (void)rows;
}

/* Codes stay unsigned; the groups' offsets take their zero point off. */
static void block_unpack(sh_wtype t, const uint8_t *block, size_t groups, block_weights *to) {
    __m256i *code = (__m256i *)(void *)to->code;
    for (size_t g = 0; g < groups; g++, block += sh_wtype_block(t)) {
        for (int q = 0; q < 4; q++) _mm256_store_ps(to->scale[g] + 8 * q, half8(block + 16 * q));
        const uint8_t *from = block + 2 * SH_PANEL;
        if (t == SH_W_Q8) {
            memcpy(code, from, SH_PANEL * SH_Q8_GROUP);
            code += SH_Q8_GROUP;
            continue;
        }
        for (int u = 0; u < SH_Q4_GROUP / 8; u++, from += 128, code += 8)
            for (int q = 0; q < 4; q++) {
                __m256i v = load(from + 32 * q);
                _mm256_store_si256(code + q, low4(v));
                _mm256_store_si256(code + 4 + q, high4(v));
            }
    }
}

/* Half h of the panel. */
SH_INLINE void run_half(const block_tile *j, int h, int rows, int group) {
    const int8_t *w = j->w->code + 64 * h, *x = j->code;
    const char *next = j->next + (size_t)(h * j->groups) * j->step;
    for (int g = 0; g < j->groups; g++, x += TILE_ROWS * group) {
        const int32_t *offset = j->offset + g * TILE_ROWS;
        __m256i s[TILE_ROWS][2];
        for (const char *end = next + j->step; next < end; next += 64) _mm_prefetch(next, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            s[r][0] = s[r][1] = _mm256_add_epi32(word(offset + r), _mm256_set1_epi32(SUM_ZERO));
        for (int i = 0; i < group; i += 4, w += 128) {
            __m256i a = load(w), b = load(w + 32);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                __m256i v = word(x + r * group + i);
                dot(&s[r][0], a, v);
                dot(&s[r][1], b, v);
            }
        }
        const float *scale = j->w->scale[g] + 16 * h;
        __m256 lo = _mm256_load_ps(scale), hi = _mm256_load_ps(scale + 8);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            float *y = j->sum[r] + 16 * h;
            __m256 d = _mm256_set1_ps(j->scale[g * TILE_ROWS + r]);
            _mm256_store_ps(y, _mm256_fmadd_ps(sum_float(s[r][0]), _mm256_mul_ps(lo, d), _mm256_load_ps(y)));
            y += 8;
            _mm256_store_ps(y, _mm256_fmadd_ps(sum_float(s[r][1]), _mm256_mul_ps(hi, d), _mm256_load_ps(y)));
        }
    }
}

/* Functions of their own, so that nothing else wants their registers. */
#define ROWS(n, group)                                                                                                 \
    case n:                                                                                                            \
        run_half(j, h, n, group);                                                                                      \
        break;
#define RUN_ROWS(name, group)                                                                                          \
    static __attribute__((noinline)) void name(const block_tile *j, int h, int rows) {                                 \
        switch (rows) {                                                                                                \
            ROWS(1, group)                                                                                             \
            ROWS(2, group)                                                                                             \
            ROWS(3, group)                                                                                             \
            ROWS(4, group)                                                                                             \
            ROWS(5, group)                                                                                             \
            ROWS(6, group)                                                                                             \
        default:                                                                                                       \
            break;                                                                                                     \
        }                                                                                                              \
    }
RUN_ROWS(half_q8, SH_Q8_GROUP)
RUN_ROWS(half_q4, SH_Q4_GROUP)
#undef RUN_ROWS
#undef ROWS

static void block_tile_run(sh_wtype t, const block_tile *j, int rows) {
    for (int h = 0; h < 2; h++) t == SH_W_Q8 ? half_q8(j, h, rows) : half_q4(j, h, rows);
}

static void avxvnni_gemm_q(const sh_wmat *w, int p0, int p1, const sh_qrows *x, int r0, int m, float *y, size_t ldy) {
    if (m < MANY_ROWS)
        walk_gemm(w, p0, p1, x, r0, m, y, ldy);
    else
        block_gemm(w, p0, p1, x, r0, m, y, ldy);
}

void sh_kernels_fill_avxvnni(sh_kernels *t) {
    t->gemm_q = avxvnni_gemm_q;
}
