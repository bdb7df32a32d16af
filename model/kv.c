/*
 * Pages of keys and values. Each layer has its own block of pages; inside a page the tokens of one KV head lie
 * together: page: [kv_heads][K tokens, then V tokens][SH_PAGE_TOKENS][head_dim]      (V alone with k_eq_v) so that
 * attention reads one head's keys as one run; with q8 the scales follow the codes of their vector. See kv.h.
 */
#include "model/kv.h"

#include <stdlib.h>
#include <string.h>
#include "model/rope.h"

#define STEP_BYTES  512  /* widened at a time, or one vector */
#define AHEAD_BYTES 8192 /* asked for in advance: measured, 28 GB/s from memory on one core instead of 7 */

typedef struct layer_pages {
    uint8_t *data; /* NULL: not held by this stage */
    size_t bytes;
    size_t vec;  /* bytes of one head's vector */
    size_t part; /* bytes of one head's K (or V) in a page */
    size_t page; /* bytes of a page */
    int kv_heads, head_dim;
    sh_kv_kind kind;
    bool k_eq_v;
} layer_pages;

struct sh_kv_pool {
    sh_kv_type type;
    int32_t pages[SH_KV_KINDS];
    int n_layers;
    layer_pages layer[SH_MAX_LAYERS];
};

size_t sh_kv_row_bytes(const sh_config *c, sh_kv_type type, int layer) {
    return sh_layer_kv_bytes(&c->layer[layer], type);
}

static sh_status reserve_layer(sh_kv_pool *p, const sh_config *c, int layer) {
    const sh_layer *l = &c->layer[layer];
    layer_pages *lp = &p->layer[layer];
    if (lp->data) return SH_OK;
    lp->kv_heads = l->kv_heads;
    lp->head_dim = l->head_dim;
    lp->kind = l->kind;
    lp->k_eq_v = l->k_eq_v;
    lp->vec = sh_kv_vec_bytes(p->type, l->head_dim);
    lp->part = lp->vec * SH_PAGE_TOKENS;
    lp->page = lp->part * (l->k_eq_v ? 1 : 2) * (size_t)l->kv_heads;
    size_t bytes = lp->page * (size_t)p->pages[l->kind];
    SH_TRY(sh_mem_alloc(bytes, "KV pool", (void **)&lp->data));
    lp->bytes = bytes;
    return SH_OK;
}

sh_status sh_kv_create(const sh_config *c, sh_kv_type type, int first, int last, const int32_t pages[SH_KV_KINDS],
                       sh_kv_pool **out) {
    for (int k = 0; k < SH_KV_KINDS; k++)
        if (pages[k] < 0) SH_FAIL(SH_EINPUT, "KV pool: %d pages: 0 or more are allowed", pages[k]);
    sh_kv_pool *p = calloc(1, sizeof *p);
    if (!p) SH_FAIL(SH_EMEMORY, "KV pool: no memory for its table");
    p->type = type;
    p->n_layers = c->n_layers;
    memcpy(p->pages, pages, sizeof p->pages);
    for (int i = first; i < last; i++) {
        sh_status st;
        SH_TRY_OR(st, reserve_layer(p, c, c->layer[i].kv_from), {
            sh_kv_destroy(&p);
            return st;
        });
    }
    *out = p;
    return SH_OK;
}

void sh_kv_destroy(sh_kv_pool **pp) {
    sh_kv_pool *p = *pp;
    if (!p) return;
    for (int i = 0; i < p->n_layers; i++) sh_mem_free(p->layer[i].data, p->layer[i].bytes);
    free(p);
    *pp = NULL;
}

sh_kv_type sh_kv_pool_type(const sh_kv_pool *p) {
    return p->type;
}

bool sh_kv_holds(const sh_kv_pool *p, int layer) {
    return layer >= 0 && layer < p->n_layers && p->layer[layer].data;
}

/* Where position `pos` of head `head` begins: its key, or its value. */
static uint8_t *slot(const layer_pages *lp, const sh_span *s, int pos, int head, bool value) {
    int32_t page = s->pages[lp->kind][pos / SH_PAGE_TOKENS - s->page0[lp->kind]];
    size_t parts = lp->k_eq_v ? 1 : 2;
    size_t part = (size_t)head * parts + (value && !lp->k_eq_v ? 1 : 0);
    return lp->data + (size_t)page * lp->page + part * lp->part + (size_t)(pos % SH_PAGE_TOKENS) * lp->vec;
}

/* One vector of n values into its bytes in the KV type. */
static void narrow(const sh_kv_pool *p, const sh_kernels *kn, uint8_t *to, const float *from, int n) {
    if (p->type == SH_KV_Q8)
        kn->to_kv8(to, from, n);
    else if (p->type == SH_KV_BF16)
        kn->to_bf16((uint16_t *)(void *)to, from, n);
    else
        memcpy(to, from, (size_t)n * sizeof(float));
}

/* `rows` vectors of n values, one behind the other, out of theirs. */
static void widen(const sh_kv_pool *p, const sh_kernels *kn, float *to, const uint8_t *from, int n, int rows) {
    if (p->type == SH_KV_Q8)
        kn->from_kv8(to, from, n, rows);
    else if (p->type == SH_KV_BF16)
        kn->from_bf16(to, (const uint16_t *)(const void *)from, n * rows);
    else
        memcpy(to, from, (size_t)n * (size_t)rows * sizeof(float));
}

void sh_kv_write(sh_kv_pool *p, const sh_kernels *kn, int layer, const sh_span *s, int row, const float *k,
                 const float *v) {
    const layer_pages *lp = &p->layer[layer];
    int pos = s->pos + row;
    for (int h = 0; h < lp->kv_heads; h++) {
        size_t at = (size_t)h * (size_t)lp->head_dim;
        if (!lp->k_eq_v) narrow(p, kn, slot(lp, s, pos, h, false), k + at, lp->head_dim);
        narrow(p, kn, slot(lp, s, pos, h, true), v + at, lp->head_dim);
    }
}

void sh_kv_pack(const sh_kv_pool *p, const sh_kernels *kn, int layer, const float *k, const float *v, void *to) {
    const layer_pages *lp = &p->layer[layer];
    uint8_t *at = to;
    int n = lp->head_dim;
    for (int h = 0; h < lp->kv_heads && !lp->k_eq_v; h++, at += lp->vec)
        narrow(p, kn, at, k + (size_t)h * (size_t)n, n);
    for (int h = 0; h < lp->kv_heads; h++, at += lp->vec) narrow(p, kn, at, v + (size_t)h * (size_t)n, n);
}

/* Copies the vectors of one row between its pages and its packed form: all heads' K, then all heads' V. */
static void copy_row(const layer_pages *lp, const sh_span *s, int pos, uint8_t *packed, bool out) {
    for (int value = lp->k_eq_v ? 1 : 0; value < 2; value++)
        for (int h = 0; h < lp->kv_heads; h++, packed += lp->vec) {
            uint8_t *stored = slot(lp, s, pos, h, value);
            memcpy(out ? packed : stored, out ? stored : packed, lp->vec);
        }
}

static size_t packed_bytes(const layer_pages *lp) {
    return lp->page / SH_PAGE_TOKENS;
}

void sh_kv_export(const sh_kv_pool *p, int layer, const sh_span *s, int row, int n, void *to) {
    const layer_pages *lp = &p->layer[layer];
    for (int i = 0; i < n; i++) copy_row(lp, s, s->pos + row + i, (uint8_t *)to + (size_t)i * packed_bytes(lp), true);
}

void sh_kv_import(sh_kv_pool *p, int layer, const sh_span *s, int row, int n, const void *from) {
    const layer_pages *lp = &p->layer[layer];
    /* copy_row reads the packed bytes only when out is false */
    for (int i = 0; i < n; i++)
        copy_row(lp, s, s->pos + row + i, (uint8_t *)from + (size_t)i * packed_bytes(lp), false);
}

/* One part of positions [pos, pos+n), widened, some vectors at a time, page by page. One stream of loads from memory is
 * several times slower than memory: asks ahead, in the run and then in the next one. */
static void read_part(const sh_kv_pool *p, const sh_kernels *kn, const layer_pages *lp, const sh_span *s, int pos,
                      int n, int head, bool value, float *to) {
    int most = lp->vec < STEP_BYTES ? (int)(STEP_BYTES / lp->vec) : 1, dim = lp->head_dim;
    for (int done = 0, run; done < n; done += run) {
        run = SH_PAGE_TOKENS - (pos + done) % SH_PAGE_TOKENS;
        if (run > n - done) run = n - done;
        const uint8_t *from = slot(lp, s, pos + done, head, value);
        const uint8_t *next = n - done > run ? slot(lp, s, pos + done + run, head, value) : NULL;
        size_t bytes = (size_t)run * lp->vec;
        for (int r = 0; r < run; r += most) {
            size_t at = (size_t)r * lp->vec, ahead = at + AHEAD_BYTES;
            int rows = run - r < most ? run - r : most;
            const uint8_t *want = ahead < bytes || !next ? from + ahead : next + (ahead - bytes);
            for (size_t i = 0; i < (size_t)rows * lp->vec; i += 64) __builtin_prefetch(want + i);
            widen(p, kn, to + (size_t)(done + r) * (size_t)dim, from + at, dim, rows);
        }
    }
}

/* K = V layers: both norms act on the same vector and share its root mean square, so k = rope(k_norm ⊙ v). */
static void form_keys(const sh_kernels *kn, const layer_pages *lp, const float *k_norm, const sh_rope *rope, int pos,
                      int n, const float *v, float *k) {
    for (int i = 0; i < n; i++, v += lp->head_dim, k += lp->head_dim) {
        kn->mul(k, v, k_norm, lp->head_dim);
        sh_rope_apply(rope, kn, k, pos + i);
    }
}

void sh_kv_read(const sh_kv_pool *p, const sh_kernels *kn, int layer, const sh_span *s, int pos, int n, int kv_head,
                const float *k_norm, const struct sh_rope *rope, float *k, float *v) {
    const layer_pages *lp = &p->layer[layer];
    read_part(p, kn, lp, s, pos, n, kv_head, true, v);
    if (!k) return;
    if (lp->k_eq_v)
        form_keys(kn, lp, k_norm, rope, pos, n, v, k);
    else
        read_part(p, kn, lp, s, pos, n, kv_head, false, k);
}

/* --- few rows ------------------------------------------------------------------------------------------------------
 */

/* Rows that look at the keys of some positions, or take their values. */
typedef struct looking {
    const sh_kv_pool *p;
    const sh_kernels *kn;
    const layer_pages *lp;
    const sh_span *s;
    const sh_kv_rows *r;
    int pos, n, head;
    bool value, plain; /* plain: bf16 as it is stored */
} looking;

bool sh_kv_few(const sh_kernels *kn) {
    return kn->add_weighted != NULL;
}

/* Asks for one part of positions [pos, pos+n), to be near in a while. */
static void ask_for(const layer_pages *lp, const sh_span *s, int pos, int n, int head, bool value) {
    for (int run; n > 0; pos += run, n -= run) {
        run = SH_PAGE_TOKENS - pos % SH_PAGE_TOKENS;
        if (run > n) run = n;
        const uint8_t *from = slot(lp, s, pos, head, value);
        for (size_t i = 0; i < (size_t)run * lp->vec; i += 64) __builtin_prefetch(from + i, 0, 2);
    }
}

/* What is used after vectors [at, at+rows) of n: their values after keys, the keys of the next positions after values;
 * where keys are formed from values, these two use the same. */
static void ask_ahead(const looking *l, int at, int rows) {
    const sh_kv_rows *r = l->r;
    int from = (int)((long)r->n_next * at / l->n), to = (int)((long)r->n_next * (at + rows) / l->n);
    if (l->value)
        ask_for(l->lp, l->s, r->next + from, to - from, l->head, l->lp->k_eq_v);
    else if (!l->lp->k_eq_v)
        ask_for(l->lp, l->s, l->pos + at, rows, l->head, true);
}

/* `rows` vectors in f32: where they lie, or widened into the tile. */
static const float *in_f32(const looking *l, const uint8_t *from, int at, int rows) {
    int hd = l->lp->head_dim;
    const sh_kv_rows *r = l->r;
    bool formed = !l->value && l->lp->k_eq_v;
    if (l->p->type == SH_KV_F32 && !formed) return (const float *)(const void *)from;
    widen(l->p, l->kn, r->tile, from, hd, rows);
    if (formed) form_keys(l->kn, l->lp, r->k_norm, r->rope, l->pos + at, rows, r->tile, r->tile);
    return r->tile;
}

/* What ask_ahead asks for, where the kernel does that: as many vectors as it has now, if they follow each other. */
static const uint16_t *next_of(const looking *l, int at, int rows) {
    const sh_kv_rows *r = l->r;
    if (!l->value) return (const uint16_t *)(const void *)slot(l->lp, l->s, l->pos + at, l->head, true);
    int next = r->next + at, left = SH_PAGE_TOKENS - next % SH_PAGE_TOKENS;
    if (rows > r->n_next - at || rows > left) return NULL;
    return (const uint16_t *)(const void *)slot(l->lp, l->s, next, l->head, l->lp->k_eq_v);
}

static void look(const looking *l, const uint8_t *from, int at, int rows) {
    const sh_kernels *kn = l->kn;
    const sh_kv_rows *r = l->r;
    int hd = l->lp->head_dim;
    const uint16_t *stored = (const uint16_t *)(const void *)from;
    if (l->plain && l->value)
        kn->add_weighted_bf16(r->o, r->ldo, r->s + at, r->lds, r->rows, stored, rows, hd, next_of(l, at, rows));
    else if (l->plain)
        kn->scores_bf16(r->s + at, r->lds, r->q, r->ldq, r->rows, stored, rows, hd, next_of(l, at, rows));
    else if (l->value)
        kn->add_weighted(r->o, r->ldo, r->s + at, r->lds, r->rows, in_f32(l, from, at, rows), rows, hd);
    else
        kn->scores(r->s + at, r->lds, r->q, r->ldq, r->rows, in_f32(l, from, at, rows), rows, hd);
}

/* Page by page, and in a page as many vectors at a time as stay in L1. */
static void look_at_all(const looking *l) {
    int most = l->plain ? SH_PAGE_TOKENS : SH_KV_TILE / l->lp->head_dim;
    if (most < 1) most = 1;
    for (int done = 0, run; done < l->n; done += run) {
        run = SH_PAGE_TOKENS - (l->pos + done) % SH_PAGE_TOKENS;
        if (run > l->n - done) run = l->n - done;
        if (run > most) run = most;
        if (!l->plain) ask_ahead(l, done, run);
        look(l, slot(l->lp, l->s, l->pos + done, l->head, l->value), done, run);
    }
}

static looking looking_at(const sh_kv_pool *p, const sh_kernels *kn, int layer, const sh_span *s, int pos, int n,
                          int kv_head, bool value, const sh_kv_rows *rows) {
    const layer_pages *lp = &p->layer[layer];
    bool plain = p->type == SH_KV_BF16 && rows->rows <= kn->plain_rows && (value || !lp->k_eq_v);
    return (looking){.p = p,
                     .kn = kn,
                     .lp = lp,
                     .s = s,
                     .r = rows,
                     .pos = pos,
                     .n = n,
                     .head = kv_head,
                     .value = value,
                     .plain = plain};
}

void sh_kv_scores(const sh_kv_pool *p, const sh_kernels *kn, int layer, const sh_span *s, int pos, int n, int kv_head,
                  const sh_kv_rows *rows) {
    looking l = looking_at(p, kn, layer, s, pos, n, kv_head, false, rows);
    look_at_all(&l);
}

void sh_kv_weigh(const sh_kv_pool *p, const sh_kernels *kn, int layer, const sh_span *s, int pos, int n, int kv_head,
                 const sh_kv_rows *rows) {
    looking l = looking_at(p, kn, layer, s, pos, n, kv_head, true, rows);
    for (int r = 0; r < rows->rows; r++)
        memset(rows->o + (size_t)r * rows->ldo, 0, (size_t)l.lp->head_dim * sizeof(float));
    look_at_all(&l);
}
