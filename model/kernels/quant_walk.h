/*
 * How a product with quantised weights goes through memory: written once, included by avx2_quant.c, avxvnni.c and
 * avx512vnni.c, each compiled with its own flags. Not here: the arithmetic. The includer defines TILE_ROWS, the most
 * rows of a tile, and WALK_WORDS, the most words that four inputs of a row become, before it, and the functions
 * declared below.
 *
 * Up to WALK_ROWS rows are packed for a run of inputs. Panel after panel, the run is cut into blocks that stay in L1
 * while the rows' tiles pass; each tile fetches its share of the next block, so that reading and arithmetic overlap,
 * and memory is read as one stream. Up to TILE_ROWS rows are a single tile over the whole run, which fetches ahead of
 * itself. More rows than WALK_ROWS take turns with runs and panels that stay in L2.
 */
#ifndef SH_MODEL_KERNELS_QUANT_WALK_H
#define SH_MODEL_KERNELS_QUANT_WALK_H

#include <immintrin.h>
#include <stdbool.h>
#include <string.h>
#include "model/kernels/kernels.h"

#define WALK_ROWS   16    /* packed at a time */
#define WALK_PACKED 65536 /* inputs of a run, of all packed rows together */
#define WALK_RUN    1024  /* inputs of a run for more rows; 16 panels of it are about 0.5 MiB in q8 */
#define WALK_PANELS 16
#define WALK_BLOCK  16384 /* bytes of codes */
#define WALK_AHEAD  2048  /* bytes */
#define WALK_FAR    6144  /* bytes behind what is fetched into L1 is fetched into L2 */

/* What a tile works on: groups [g0, g1) of one panel; the sums wait in y between blocks. */
typedef struct tile {
    const uint8_t *block;  /* of group g0 */
    const uint8_t *next;   /* as many bytes to fetch meanwhile; */
    size_t share, shares;  /* by this tile its share of them */
    const void *x;         /* packed rows, from group g0 on; or with */
    size_t ldx;            /* bytes from row to row: codes as they lie */
    const float *scale;    /* of the first row's group 0 */
    const int32_t *sum;    /* likewise */
    size_t groups, g0, g1; /* groups: from row to row of scale and sum */
    float *y;              /* the panel's first output of the first row */
    size_t ldy;
    int outputs; /* of the panel that exist, if less than 32 */
} tile;

/* Words of a packed group of a row. */
static size_t walk_words(sh_wtype t);
/* Packs rows [r0, r0 + rows) of the groups [g0, g1): group by group, in it row by row. */
static void walk_pack(sh_wtype t, const sh_qrows *x, size_t r0, int rows, size_t g0, size_t g1, uint32_t *to);
static void walk_tile(sh_wtype t, const tile *j, int rows);

/* For walk_pack: codes as they are, a byte each. */
static inline void walk_pack_codes(sh_wtype t, const sh_qrows *x, size_t r0, int rows, size_t g0, size_t g1,
                                   uint32_t *to) {
    size_t size = (size_t)sh_wtype_group(t);
    for (size_t g = g0; g < g1; g++)
        for (size_t r = r0; r < r0 + (size_t)rows; r++, to += size / 4)
            memcpy(to, x->code + r * x->ld + g * size, size);
}

/* Some rows of a product and the groups [g0, g1) of a run. */
typedef struct walk {
    const sh_wmat *w;
    const sh_qrows *x;
    int r0, rows, tiles;
    float *y;
    size_t ldy, g0, g1;
    uint32_t *packed; /* tile after tile */
} walk;

/* A line into L1, and one that comes later into L2. */
static inline __attribute__((always_inline)) void walk_fetch(const uint8_t *next) {
    _mm_prefetch((const char *)next, _MM_HINT_T0);
    _mm_prefetch((const char *)next + WALK_FAR, _MM_HINT_T1);
}

static inline size_t walk_min(size_t a, size_t b) {
    return a < b ? a : b;
}

/* First row of tile t: as even as possible, so that no short one is left over. */
static inline int walk_first(const walk *j, int t) {
    return (int)((long)j->rows * t / j->tiles);
}

static inline uint32_t *walk_packed(const walk *j, int row) {
    return j->packed + (size_t)row * (j->g1 - j->g0) * walk_words(j->w->type);
}

/* Groups [g0, g1) of panel p, all tiles. */
static void walk_block(const walk *j, int p, size_t g0, size_t g1) {
    const sh_wmat *w = j->w;
    size_t bytes = sh_wtype_block(w->type), panel = (size_t)sh_wtype_groups(w->type, w->k) * bytes;
    const uint8_t *block = (const uint8_t *)w->data + (size_t)p * panel + g0 * bytes;
    size_t hop = j->tiles == 1 ? WALK_AHEAD : g1 < j->g1 ? (g1 - g0) * bytes : panel - (g0 - j->g0) * bytes;
    for (int t = 0; t < j->tiles; t++) {
        int a = walk_first(j, t), rows = walk_first(j, t + 1) - a;
        size_t row = (size_t)(j->r0 + a);
        tile i = {.block = block,
                  .next = block + hop,
                  .share = (size_t)t,
                  .shares = (size_t)j->tiles,
                  .x = walk_packed(j, a) + (g0 - j->g0) * (size_t)rows * walk_words(w->type),
                  .scale = j->x->scale + row * j->x->groups,
                  .sum = j->x->sum + row * j->x->groups,
                  .groups = j->x->groups,
                  .g0 = g0,
                  .g1 = g1,
                  .y = j->y + (size_t)a * j->ldy + (size_t)p * SH_PANEL,
                  .ldy = j->ldy,
                  .outputs = w->n - p * SH_PANEL};
        walk_tile(w->type, &i, rows);
    }
}

/* Panels [p0, p1) of a run. */
static void walk_run(const walk *j, int p0, int p1) {
    size_t block = j->tiles == 1 ? j->g1 - j->g0 : WALK_BLOCK / (sh_wtype_block(j->w->type) - 2 * SH_PANEL);
    for (int t = 0; t < j->tiles; t++) {
        int a = walk_first(j, t);
        walk_pack(j->w->type, j->x, (size_t)(j->r0 + a), walk_first(j, t + 1) - a, j->g0, j->g1, walk_packed(j, a));
    }
    for (int p = p0; p < p1; p++)
        for (size_t g = j->g0; g < j->g1; g += block) walk_block(j, p, g, walk_min(g + block, j->g1));
}

/* gemm_q of kernels.h. */
static void walk_gemm(const sh_wmat *w, int p0, int p1, const sh_qrows *x, int r0, int m, float *y, size_t ldy) {
    uint32_t packed[WALK_PACKED / 4 * WALK_WORDS] __attribute__((aligned(64)));
    if (m <= 0) return;
    bool many = m > WALK_ROWS;
    size_t groups = (size_t)sh_wtype_groups(w->type, w->k);
    size_t run = (size_t)((many ? WALK_RUN : WALK_PACKED / m) / sh_wtype_group(w->type));
    int panels = many ? WALK_PANELS : p1 - p0;
    for (int p = p0; p < p1; p += panels)
        for (size_t g = 0; g < groups; g += run)
            for (int r = 0; r < m; r += WALK_ROWS) {
                int rows = m - r < WALK_ROWS ? m - r : WALK_ROWS;
                walk j = {.w = w,
                          .x = x,
                          .r0 = r0 + r,
                          .rows = rows,
                          .tiles = (rows + TILE_ROWS - 1) / TILE_ROWS,
                          .y = y + (size_t)r * ldy,
                          .ldy = ldy,
                          .g0 = g,
                          .g1 = walk_min(g + run, groups),
                          .packed = packed};
                walk_run(&j, p, p1 - p < panels ? p1 : p + panels);
            }
}

#endif
