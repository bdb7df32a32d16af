/*
 * How a product with quantised weights goes through memory: written once, included by avx2_quant.c and avx512vnni.c,
 * each compiled with its own flags. Not here: the arithmetic, which is the includer's. It defines before
 *   TILE_ROWS                  most rows of a tile
 *   WALK_WORDS                 most words of 32 bits that four inputs of a row become
 *   walk_pack, walk_tile       rows of a tile as its inner loop reads them; the tile
 */
#include "model/kernels/kernels.h"

typedef struct tile tile;

#define WALK_ROWS   32    /* packed at a time */
#define WALK_INPUTS 16384 /* rows · inputs that are packed at a time */
#define WALK_PANELS 16    /* panels whose block stays in L2 while all rows pass */

/* Rows [r0, r0+rows) of x, whose products go to y, and the groups [g0, g1) of panels. */
typedef struct walk {
    const sh_wmat *w;
    const sh_qrows *x;
    int r0, rows;
    float *y;
    size_t ldy, g0, g1;
} walk;

static inline int walk_min(int a, int b) {
    return a < b ? a : b;
}

/* Tile t of `tiles`, as even as possible: rows [*a, *a + result). */
static inline int walk_share(int m, int t, int tiles, int *a) {
    *a = (int)((long)m * t / tiles);
    return (int)((long)m * (t + 1) / tiles) - *a;
}

/* Panels [p0, p1) of one block along k, packed rows in `packed`. Each tile fetches its share of the panel that comes next. */
static void walk_panels(const walk *j, int p0, int p1, uint32_t *packed) {
    const sh_wmat *w = j->w;
    size_t groups = (size_t)sh_wtype_groups(w->type, w->k), bytes = sh_wtype_block(w->type);
    size_t inputs = (j->g1 - j->g0) * (size_t)sh_wtype_group(w->type);
    int tiles = (j->rows + TILE_ROWS - 1) / TILE_ROWS, a;
    size_t words = inputs / 4 * (size_t)walk_words(w->type);
    for (int t = 0; t < tiles; t++) {
        int n = walk_share(j->rows, t, tiles, &a);
        walk_pack(w->type, j->x, (size_t)(j->r0 + a), n, j->g0, j->g1, packed + (size_t)a * words);
    }
    int side = tiles > 1 ? 1 : SIDE(j->rows);
    for (int p = p0; p < p1; p += side) {
        const uint8_t *block = (const uint8_t *)w->data + ((size_t)p * groups + j->g0) * bytes;
        if (side > p1 - p) side = 1;
        for (int t = 0; t < tiles; t++) {
            int n = walk_share(j->rows, t, tiles, &a);
            size_t row = (size_t)(j->r0 + a);
            tile i = {.block = block,
                      .stride = groups * bytes,
                      .next = block + groups * bytes,
                      .index = (size_t)t,
                      .tiles = (size_t)tiles,
                      .x = packed + (size_t)a * words,
                      .scale = j->x->scale + row * j->x->groups,
                      .sum = j->x->sum + row * j->x->groups,
                      .groups = j->x->groups,
                      .g0 = j->g0,
                      .g1 = j->g1,
                      .y = j->y + (size_t)a * j->ldy + (size_t)p * SH_PANEL,
                      .ldy = j->ldy,
                      .outputs = w->n - p * SH_PANEL};
            walk_tile(w->type, &i, n, side);
        }
    }
}

static void walk_gemm(const sh_wmat *w, int p0, int p1, const sh_qrows *x, int r0, int m, float *y, size_t ldy) {
    uint32_t packed[WALK_INPUTS / 4 * WALK_WORDS] __attribute__((aligned(64)));
    if (m <= 0) return;
    size_t groups = (size_t)sh_wtype_groups(w->type, w->k);
    size_t step = (size_t)(WALK_INPUTS / walk_min(m, WALK_ROWS) / sh_wtype_group(w->type));
    int panels = m > WALK_ROWS ? WALK_PANELS : p1 - p0;
    for (int p = p0; p < p1; p += panels)
        for (size_t g = 0; g < groups; g += step)
            for (int r = 0; r < m; r += WALK_ROWS) {
                walk j = {.w = w, .x = x, .r0 = r0 + r, .rows = walk_min(m - r, WALK_ROWS), .y = y + (size_t)r * ldy, .ldy = ldy,
                          .g0 = g, .g1 = g + step < groups ? g + step : groups};
                walk_panels(&j, p, walk_min(p1, p + panels), packed);
            }
}
