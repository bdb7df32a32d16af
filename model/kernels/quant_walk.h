/*
 * How a product with quantised weights goes through memory: written once, included by avx2_quant.c and avx512vnni.c,
 * each compiled with its own flags. Not here: the arithmetic. The includer defines TILE_ROWS, the most rows of a tile,
 * and WALK_WORDS before, and walk_pack and walk_tile behind.
 *
 * A block is some inputs of some panels. Rows are packed a block at a time and lie near; a block of a panel comes from
 * memory once for all packed rows, and while tiles work on it, each fetches its share of the next panel's: so reading
 * and arithmetic overlap. Up to TILE_ROWS rows are one tile, which fetches ahead in its own panel.
 */
#ifndef SH_MODEL_KERNELS_QUANT_WALK_H
#define SH_MODEL_KERNELS_QUANT_WALK_H

#include "model/kernels/kernels.h"

#define WALK_ROWS   16    /* packed at a time */
#define WALK_INPUTS 16384 /* packed at a time, of all these rows together */
#define WALK_PANELS 16    /* whose block stays in L2 while more rows than that pass */
#define WALK_AHEAD  2048  /* bytes */

/* What a tile works on: groups [g0, g1) of one panel; the sums wait in y between blocks. */
typedef struct tile {
    const uint8_t *block;  /* of group g0 */
    const uint8_t *next;   /* as many bytes to fetch meanwhile; */
    size_t share, shares;  /* by this tile its share of them */
    const uint32_t *x;     /* packed rows, from group g0 on */
    const float *scale;    /* of the first row's group 0 */
    const int32_t *sum;    /* likewise */
    size_t groups, g0, g1; /* groups: from row to row of scale and sum */
    float *y;              /* the panel's first output of the first row */
    size_t ldy;
    int outputs; /* of the panel that exist, if less than 32 */
} tile;

/* Rows [r0, r0 + rows) of the groups [g0, g1), WALK_WORDS words of 32 bits for each four inputs. */
static void walk_pack(sh_wtype t, const sh_qrows *x, size_t r0, int rows, size_t g0, size_t g1, uint32_t *to);
static void walk_tile(sh_wtype t, const tile *j, int rows);

/* Rows of a product and the groups [g0, g1) of a block. */
typedef struct walk {
    const sh_wmat *w;
    const sh_qrows *x;
    int r0, rows, tiles;
    float *y;
    size_t ldy, g0, g1, words; /* words: of a packed row */
    uint32_t *packed;
} walk;

static inline int walk_min(int a, int b) {
    return a < b ? a : b;
}

/* First row of tile t: as even as possible, so that no short one is left over. */
static inline int walk_first(const walk *j, int t) {
    return (int)((long)j->rows * t / j->tiles);
}

static void walk_rows(const walk *j) {
    for (int t = 0; t < j->tiles; t++) {
        int a = walk_first(j, t);
        walk_pack(j->w->type, j->x, (size_t)(j->r0 + a), walk_first(j, t + 1) - a, j->g0, j->g1,
                  j->packed + (size_t)a * j->words);
    }
}

static void walk_panel(const walk *j, int p) {
    const sh_wmat *w = j->w;
    size_t panel = (size_t)sh_wtype_groups(w->type, w->k) * sh_wtype_block(w->type);
    const uint8_t *block = (const uint8_t *)w->data + (size_t)p * panel + j->g0 * sh_wtype_block(w->type);
    for (int t = 0; t < j->tiles; t++) {
        int a = walk_first(j, t);
        size_t row = (size_t)(j->r0 + a);
        tile i = {.block = block,
                  .next = block + (j->tiles > 1 ? panel : WALK_AHEAD),
                  .share = (size_t)t,
                  .shares = (size_t)j->tiles,
                  .x = j->packed + (size_t)a * j->words,
                  .scale = j->x->scale + row * j->x->groups,
                  .sum = j->x->sum + row * j->x->groups,
                  .groups = j->x->groups,
                  .g0 = j->g0,
                  .g1 = j->g1,
                  .y = j->y + (size_t)a * j->ldy + (size_t)p * SH_PANEL,
                  .ldy = j->ldy,
                  .outputs = w->n - p * SH_PANEL};
        walk_tile(w->type, &i, walk_first(j, t + 1) - a);
    }
}

/* gemm_q of kernels.h. */
static void walk_gemm(const sh_wmat *w, int p0, int p1, const sh_qrows *x, int r0, int m, float *y, size_t ldy) {
    uint32_t packed[WALK_INPUTS / 4 * WALK_WORDS] __attribute__((aligned(64)));
    if (m <= 0) return;
    int groups = sh_wtype_groups(w->type, w->k), size = sh_wtype_group(w->type);
    int step = WALK_INPUTS / walk_min(m, WALK_ROWS) / size, panels = m > WALK_ROWS ? WALK_PANELS : p1 - p0;
    for (int p = p0; p < p1; p += panels)
        for (int g = 0; g < groups; g += step)
            for (int r = 0; r < m; r += WALK_ROWS) {
                int n = walk_min(step, groups - g), rows = walk_min(WALK_ROWS, m - r);
                walk j = {.w = w,
                          .x = x,
                          .r0 = r0 + r,
                          .rows = rows,
                          .tiles = (rows + TILE_ROWS - 1) / TILE_ROWS,
                          .y = y + (size_t)r * ldy,
                          .ldy = ldy,
                          .g0 = (size_t)g,
                          .g1 = (size_t)(g + n),
                          .words = (size_t)(n * size / 4 * WALK_WORDS),
                          .packed = packed};
                walk_rows(&j);
                for (int i = p; i < walk_min(p + panels, p1); i++) walk_panel(&j, i);
            }
}

#endif
