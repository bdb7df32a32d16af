/*
 * How a product of many rows with quantised weights goes through memory: written once, included by avxvnni.c,
 * avx512vnni.c and amx.c, each compiled with its own flags. Not here: the arithmetic. The includer defines TILE_ROWS,
 * the most rows of a tile, TILE_PASSES, how often a tile passes its panel's groups, and the functions declared below.
 *
 * Up to BLOCK_ROWS rows are packed for a span of inputs, tile after tile. Then panel after panel the span is cut into
 * blocks, whose codes are unpacked to bytes and stay in L1 while the tiles of rows pass; meanwhile the next block is
 * fetched, so that memory is read as one stream. The panel's sums wait in a buffer of their own, because rows of y lie
 * so far apart that they would drive each other out of the cache.
 */
#ifndef SH_MODEL_KERNELS_QUANT_BLOCKS_H
#define SH_MODEL_KERNELS_QUANT_BLOCKS_H

#include <string.h>
#include "model/kernels/quant.h"

#define BLOCK_ROWS   128
#define BLOCK_SPAN   2048 /* inputs for which rows are packed */
#define BLOCK_INPUTS 512  /* of a block: 16 KiB of codes */
#define BLOCK_TILES  (BLOCK_ROWS / TILE_ROWS + 1)
#define BLOCK_GROUPS (BLOCK_INPUTS / SH_Q4_GROUP)
#define SPAN_GROUPS  (BLOCK_SPAN / SH_Q4_GROUP)

/* Rows in tiles. Of each tile group after group, and of each group row after row, TILE_ROWS apart: the codes, the
 * scale, and what the zero point of the weights takes off the group's sum. */
typedef struct block_rows {
    int8_t code[BLOCK_TILES * TILE_ROWS * BLOCK_SPAN] __attribute__((aligned(64)));
    float scale[BLOCK_TILES * TILE_ROWS * SPAN_GROUPS];
    int32_t offset[BLOCK_TILES * TILE_ROWS * SPAN_GROUPS];
} block_rows;

/* Weights of a panel. Group after group two halves of 16 outputs: for each four inputs the 16 outputs' codes. */
typedef struct block_weights {
    int8_t code[SH_PANEL * BLOCK_INPUTS] __attribute__((aligned(64)));
    float scale[BLOCK_GROUPS][SH_PANEL];
} block_weights;

/* One tile of rows and the groups of a block. */
typedef struct block_tile {
    const int8_t *code; /* the rows' */
    const float *scale;
    const int32_t *offset;
    const block_weights *w;
    int groups;
    const char *next; /* `step` bytes of it are fetched for each group and pass */
    size_t step;
    float (*sum)[SH_PANEL]; /* [TILE_ROWS]: goes on from what is there */
} block_tile;

/* Codes of one block's groups as the tile wants them, and their scales. */
static void block_unpack(sh_wtype t, const uint8_t *block, size_t groups, block_weights *to);
/* The next tiles have `rows` rows: called before them. */
static void block_begin(sh_wtype t, int rows);
static void block_tile_run(sh_wtype t, const block_tile *j, int rows);

/* Some rows of a product, in tiles of `size` rows, and the groups [g0, g1) of a span. */
typedef struct block_part {
    const sh_wmat *w;
    const sh_qrows *x;
    int r0, rows, size, tiles;
    size_t g0, g1;
    float *y;
    size_t ldy;
} block_part;

static inline size_t block_min(size_t a, size_t b) {
    return a < b ? a : b;
}

/* Tile t; where the last one has fewer rows than the others, scales of zero. */
static void block_pack_tile(const block_part *p, int t, block_rows *to) {
    sh_wtype type = p->w->type;
    size_t group = (size_t)sh_wtype_group(type), groups = p->g1 - p->g0, first = (size_t)t * TILE_ROWS * groups;
    const int32_t zero = type == SH_W_Q8 ? SH_Q8_ZERO : SH_Q4_ZERO;
    for (size_t g = 0; g < groups; g++) /* rows that a tile may have beyond these: computed perhaps, not used */
        for (int i = p->size; i < TILE_ROWS; i++) to->scale[first + g * TILE_ROWS + (size_t)i] = 0;
    for (int i = 0; i < p->size; i++) {
        bool here = t * p->size + i < p->rows;
        size_t row = (size_t)(here ? p->r0 + t * p->size + i : p->r0), at = row * p->x->groups + p->g0;
        const int8_t *from = p->x->code + row * p->x->ld + p->g0 * group;
        for (size_t g = 0; g < groups; g++, from += group) {
            size_t to_row = first + g * TILE_ROWS + (size_t)i;
            if (type == SH_W_Q8) /* sizes that the compiler knows */
                memcpy(to->code + to_row * SH_Q8_GROUP, from, SH_Q8_GROUP);
            else
                memcpy(to->code + to_row * SH_Q4_GROUP, from, SH_Q4_GROUP);
            to->scale[to_row] = here ? p->x->scale[at + g] : 0;
            to->offset[to_row] = -zero * p->x->sum[at + g];
        }
    }
}

/* Groups [g0, g1) of the span with all tiles; as many bytes at `next` are fetched meanwhile. */
static void block_run(const block_part *p, size_t g0, size_t g1, const block_rows *rows, const block_weights *w,
                      const char *next, float (*sum)[SH_PANEL]) {
    sh_wtype t = p->w->type;
    size_t group = (size_t)sh_wtype_group(t), groups = g1 - g0, bytes = groups * sh_wtype_block(t);
    size_t turns = TILE_PASSES * (size_t)p->tiles * groups, step = (bytes / turns + 63) / 64 * 64;
    const char *end = next + bytes;
    for (int i = 0; i < p->tiles; i++) {
        size_t first = ((size_t)i * (p->g1 - p->g0) + g0 - p->g0) * TILE_ROWS;
        block_tile j = {.code = rows->code + first * group,
                        .scale = rows->scale + first,
                        .offset = rows->offset + first,
                        .w = w,
                        .groups = (int)groups,
                        .next = next,
                        .step = next < end ? step : 0,
                        .sum = sum + i * TILE_ROWS};
        block_tile_run(t, &j, p->size);
        next += TILE_PASSES * groups * j.step;
    }
}

/* Copies n ≤ SH_PANEL floats; of a whole panel the compiler knows the size. */
static inline void block_copy(float *to, const float *from, int n) {
    if (n >= SH_PANEL)
        memcpy(to, from, SH_PANEL * sizeof *to);
    else
        memcpy(to, from, (size_t)n * sizeof *to);
}

/* Sums of a panel before the span: zero, or what y has. */
static void block_load_sums(const block_part *p, int panel, float (*sum)[SH_PANEL]) {
    for (int r = 0; r < p->tiles * TILE_ROWS; r++) memset(sum[r], 0, sizeof sum[r]);
    for (int r = 0; p->g0 > 0 && r < p->rows; r++)
        block_copy(sum[r / p->size * TILE_ROWS + r % p->size], p->y + (size_t)r * p->ldy + panel * SH_PANEL,
                   p->w->n - panel * SH_PANEL);
}

static void block_store_sums(const block_part *p, int panel, float (*sum)[SH_PANEL]) {
    for (int r = 0; r < p->rows; r++)
        block_copy(p->y + (size_t)r * p->ldy + panel * SH_PANEL, sum[r / p->size * TILE_ROWS + r % p->size],
                   p->w->n - panel * SH_PANEL);
}

/* The span for panels [p0, p1). */
static void block_span(const block_part *p, int p0, int p1, block_rows *rows) {
    block_weights w;
    float sum[BLOCK_TILES * TILE_ROWS][SH_PANEL] __attribute__((aligned(64)));
    size_t bytes = sh_wtype_block(p->w->type), panel = p->x->groups * bytes;
    size_t most = (size_t)(BLOCK_INPUTS / sh_wtype_group(p->w->type));
    for (int t = 0; t < p->tiles; t++) block_pack_tile(p, t, rows);
    for (int i = p0; i < p1; i++) {
        const uint8_t *data = (const uint8_t *)p->w->data + (size_t)i * panel;
        block_load_sums(p, i, sum);
        for (size_t g = p->g0; g < p->g1; g += most) {
            size_t end = block_min(g + most, p->g1);
            block_unpack(p->w->type, data + g * bytes, end - g, &w);
            const uint8_t *next = end < p->g1 ? data + end * bytes : data + panel + p->g0 * bytes;
            block_run(p, g, end, rows, &w, (const char *)next, sum);
        }
        block_store_sums(p, i, sum);
    }
}

/* gemm_q of kernels.h. */
static void block_gemm(const sh_wmat *w, int p0, int p1, const sh_qrows *x, int r0, int m, float *y, size_t ldy) {
    block_rows rows;
    size_t span = (size_t)(BLOCK_SPAN / sh_wtype_group(w->type));
    int chunks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int c = 0; c < chunks; c++) {
        int a = (int)((long)m * c / chunks), n = (int)((long)m * (c + 1) / chunks) - a;
        int tiles = (n + TILE_ROWS - 1) / TILE_ROWS, size = (n + tiles - 1) / tiles;
        block_part p = {.w = w,
                        .x = x,
                        .r0 = r0 + a,
                        .rows = n,
                        .size = size,
                        .tiles = (n + size - 1) / size,
                        .y = y + (size_t)a * ldy,
                        .ldy = ldy};
        block_begin(w->type, size);
        for (p.g0 = 0; p.g0 < x->groups; p.g0 = p.g1) {
            p.g1 = block_min(p.g0 + span, x->groups);
            block_span(&p, p0, p1, &rows);
        }
    }
}

#endif
