/*
 * Tiles of few rows in registers of 256 bits: how the groups of a panel pass, and what becomes of their integer sums.
 * Written once, included by avx2_quant.c and avxvnni.c, each compiled with its own flags. Not here: the integer sums.
 * The includer defines TILE_ROWS and WALK_WORDS (quant_walk.h) before it, and the functions declared below and there.
 *
 * The sixteen registers hold the integer sums of one or two rows with a whole panel, or of more rows with a half of it;
 * float sums lie in memory, but for those of a single row.
 */
#ifndef SH_MODEL_KERNELS_QUANT_TILE256_H
#define SH_MODEL_KERNELS_QUANT_TILE256_H

#include <immintrin.h>
#include <stdbool.h>
#include <string.h>

#define SH_INLINE static inline __attribute__((always_inline))

#define WHOLE_ROWS   2   /* that take all of a panel at once */
#define CHUNK_INPUTS 256 /* of a single tile that pass for one half of a panel before they do for the other */
#include "model/kernels/quant_walk.h"

SH_INLINE __m256i load(const void *p) {
    return _mm256_loadu_si256(p);
}

SH_INLINE __m256i lanes8(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

SH_INLINE __m256i word(const void *x) {
    int32_t v;
    memcpy(&v, x, sizeof v);
    return _mm256_set1_epi32(v);
}

SH_INLINE __m256 half8(const void *scales) {
    return _mm256_cvtph_ps(_mm_loadu_si128(scales));
}

/* A chunk of groups for some quarters of a panel. */
typedef struct part {
    const uint8_t *scales, *codes, *next;
    size_t step, stride; /* bytes of `next`: fetched for each 128 bytes of codes, from group to group */
    const uint32_t *x;
    const float *scale;
    const int32_t *sum;
    size_t groups, n; /* groups: from row to row of scale and sum */
    float *acc;       /* [rows, SH_PANEL] */
} part;

/* Integer sums of one group, the weights' zero point taken off: `rows` rows with `quarters` times eight outputs. sum:
 * of the codes of the first row, j->groups apart. For each 128 bytes of codes one fetch(). */
SH_INLINE void part_sums(sh_wtype t, const part *j, const uint8_t *codes, const uint32_t *x, const int32_t *sum,
                         const uint8_t *next, int rows, int quarters, __m256i s[TILE_ROWS][4]);
/* Such a sum as a float. */
SH_INLINE __m256 sum_float(__m256i s);

SH_INLINE const uint8_t *fetch(const uint8_t *next, size_t step, int quarters) {
    walk_fetch(next);
    if (quarters == 4) walk_fetch(next + step / 2);
    return next + step;
}

SH_INLINE void run_part(sh_wtype t, const part *j, int rows, int quarters) {
    const uint8_t *codes = j->codes, *scales = j->scales, *next = j->next;
    const uint32_t *x = j->x;
    __m256 only[4]; /* of a single row, whose sums do fit in registers */
#pragma GCC unroll 4
    for (int q = 0; q < quarters; q++) only[q] = _mm256_loadu_ps(j->acc + 8 * q);
    for (size_t g = 0; g < j->n; g++) {
        __m256i s[TILE_ROWS][4];
        __m256 d[4];
        part_sums(t, j, codes, x, j->sum + g, next, rows, quarters, s);
#pragma GCC unroll 4
        for (int q = 0; q < quarters; q++) d[q] = half8(scales + 16 * q);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m256 e = _mm256_set1_ps(j->scale[(size_t)r * j->groups + g]);
#pragma GCC unroll 4
            for (int q = 0; q < quarters; q++) {
                float *acc = j->acc + r * SH_PANEL + 8 * q;
                __m256 v = sum_float(s[r][q]), de = _mm256_mul_ps(d[q], e);
                if (rows == 1)
                    only[q] = _mm256_fmadd_ps(v, de, only[q]);
                else
                    _mm256_storeu_ps(acc, _mm256_fmadd_ps(v, de, _mm256_loadu_ps(acc)));
            }
        }
        codes += sh_wtype_block(t);
        scales += sh_wtype_block(t);
        next += j->stride;
        x += walk_words(t) * (size_t)rows;
    }
    if (rows > 1) return;
#pragma GCC unroll 4
    for (int q = 0; q < quarters; q++) _mm256_storeu_ps(j->acc + 8 * q, only[q]);
}

/* Functions of their own, so that nothing else wants their registers. */
#define ROWS(n, t)                                                                                                     \
    case n:                                                                                                            \
        run_part(t, j, n, (n) > WHOLE_ROWS ? 2 : 4);                                                                   \
        break;
#if TILE_ROWS > 4
#define ROWS_ABOVE_4(t) ROWS(5, t) ROWS(6, t)
#else
#define ROWS_ABOVE_4(t)
#endif
#define RUN_ROWS(name, t)                                                                                              \
    static __attribute__((noinline)) void name(const part *j, int rows) {                                              \
        switch (rows) {                                                                                                \
            ROWS(1, t)                                                                                                 \
            ROWS(2, t)                                                                                                 \
            ROWS(3, t)                                                                                                 \
            ROWS(4, t)                                                                                                 \
            ROWS_ABOVE_4(t)                                                                                            \
        default:                                                                                                       \
            break;                                                                                                     \
        }                                                                                                              \
    }
RUN_ROWS(run_q8, SH_W_Q8)
RUN_ROWS(run_q4, SH_W_Q4)
#undef RUN_ROWS
#undef ROWS_ABOVE_4
#undef ROWS

/* Groups [g, g + n) of a tile, one half of the panel after the other where there are `halves`. */
static void run_chunk(sh_wtype t, const tile *j, size_t g, size_t n, int rows, size_t halves, float *acc) {
    size_t at = (g - j->g0) * sh_wtype_block(t), bytes = n * sh_wtype_block(t), shares = j->shares * halves;
    const uint8_t *block = j->block + at, *next = j->next + at;
    if (j->shares == 1 && halves > 1) next = block + bytes; /* nearer would be too late for the other half */
    for (size_t h = 0; h < halves; h++) {
        part k = {.scales = block + 32 * h,
                  .codes = block + 2 * SH_PANEL + 64 * h,
                  .next = next + bytes * (j->share * halves + h) / shares,
                  .step = 128 / shares,
                  .stride = sh_wtype_block(t) / shares,
                  .x = (const uint32_t *)j->x + (g - j->g0) * walk_words(t) * (size_t)rows,
                  .scale = j->scale + g,
                  .sum = j->sum + g,
                  .groups = j->groups,
                  .n = n,
                  .acc = acc + 16 * h};
        if (t == SH_W_Q8)
            run_q8(&k, rows);
        else
            run_q4(&k, rows);
    }
}

/* The first n (≤ 0: none, ≥ 8: all) of eight outputs; masked stores are slow on some CPUs. */
SH_INLINE __m256 load8(const float *y, int n) {
    return n >= 8 ? _mm256_loadu_ps(y) : _mm256_maskload_ps(y, lanes8(n));
}
SH_INLINE void store8(float *y, __m256 v, int n) {
    if (n >= 8)
        _mm256_storeu_ps(y, v);
    else if (n > 0)
        _mm256_maskstore_ps(y, lanes8(n), v);
}

static void walk_tile(sh_wtype t, const tile *j, int rows) {
    float acc[TILE_ROWS * SH_PANEL] __attribute__((aligned(32)));
    size_t halves = rows > WHOLE_ROWS ? 2 : 1;
    size_t chunk = halves > 1 && j->shares == 1 ? CHUNK_INPUTS / (size_t)sh_wtype_group(t) : j->g1 - j->g0;
    for (int i = 0; i < 4 * rows; i++) {
        const float *y = j->y + (size_t)(i / 4) * j->ldy + i % 4 * 8;
        _mm256_store_ps(acc + 8 * i, j->g0 ? load8(y, j->outputs - i % 4 * 8) : _mm256_setzero_ps());
    }
    for (size_t g = j->g0; g < j->g1; g += chunk)
        run_chunk(t, j, g, g + chunk < j->g1 ? chunk : j->g1 - g, rows, halves, acc);
    for (int i = 0; i < 4 * rows; i++)
        store8(j->y + (size_t)(i / 4) * j->ldy + i % 4 * 8, _mm256_load_ps(acc + 8 * i), j->outputs - i % 4 * 8);
}

#endif
