/* Times sh_attention_run on made-up pages. See attention_rates.h. */
#include "model/attention_rates.h"

#include <stdlib.h>
#include <string.h>
#include "common/clock.h"
#include "common/mem.h"

typedef struct bench {
    const sh_attn_work *w;
    const sh_kernels *kn;
    sh_config c;
    sh_kv_pool *kv;
    sh_rope rope;
    sh_attention *a;
    sh_span *spans;     /* [sequences] */
    sh_attn_rows *rows; /* [sequences] */
    int32_t *pages;     /* [sequences, pages of one] */
    float *q, *k_norm;  /* [sequences · rows, heads · head_dim], [head_dim] */
    uint8_t *packed;    /* one position, as pages have it */
    size_t q_bytes;
} bench;

static int keys_of(const sh_attn_work *w, int pos) {
    return w->window > 0 && w->window < pos + 1 ? w->window : pos + 1;
}

/* The first position that some row sees. */
static int first_of(const sh_attn_work *w) {
    int pos = w->context - w->rows;
    return pos + 1 - keys_of(w, pos);
}

static sh_layer layer_of(const sh_attn_work *w, int from) {
    return (sh_layer){.kind = SH_KV_GLOBAL,
                      .heads = w->heads,
                      .kv_heads = w->kv_heads,
                      .head_dim = w->head_dim,
                      .rotated_pairs = w->head_dim / (w->window > 0 ? 2 : 8),
                      .theta = 1e6,
                      .rope_factor = 1,
                      .window = w->window,
                      .kv_from = from,
                      .has_kv = true,
                      .k_eq_v = w->k_eq_v};
}

double sh_attn_work_bytes(const sh_attn_work *w) {
    sh_layer l = layer_of(w, 0);
    return (double)w->sequences * (w->context - first_of(w)) * (double)sh_layer_kv_bytes(&l, w->kv);
}

double sh_attn_work_flops(const sh_attn_work *w) {
    double pairs = 0;
    for (int i = 0; i < w->rows; i++) pairs += keys_of(w, w->context - w->rows + i);
    return 4.0 * w->heads * w->head_dim * pairs * w->sequences;
}

static sh_status open_pages(bench *b, size_t bytes) {
    const sh_attn_work *w = b->w;
    int first = first_of(w) / SH_PAGE_TOKENS, each = (w->context - 1) / SH_PAGE_TOKENS + 1 - first;
    int32_t counts[SH_KV_KINDS] = {0};
    counts[SH_KV_GLOBAL] = each * w->sequences;
    double one = sh_attn_work_bytes(w), layers = (double)bytes / one;
    b->c.n_layers = layers < 1 ? 1 : layers > SH_MAX_LAYERS ? SH_MAX_LAYERS : (int)layers;
    b->c.first_shared = b->c.n_layers;
    for (int i = 0; i < b->c.n_layers; i++) b->c.layer[i] = layer_of(w, i);
    SH_TRY(sh_kv_create(&b->c, w->kv, 0, b->c.n_layers, counts, &b->kv));
    for (int s = 0; s < w->sequences; s++) { /* sequences that grow together have pages in turn */
        for (int i = 0; i < each; i++) b->pages[(size_t)s * (size_t)each + (size_t)i] = i * w->sequences + s;
        b->spans[s] = (sh_span){.seq = (uint64_t)s + 1, .pos = w->context - w->rows, .rows = w->rows};
        b->spans[s].page0[SH_KV_GLOBAL] = first;
        b->spans[s].n_pages[SH_KV_GLOBAL] = each;
        b->spans[s].pages[SH_KV_GLOBAL] = b->pages + (size_t)s * (size_t)each;
        b->rows[s] = (sh_attn_rows){.span = &b->spans[s], .row = s * w->rows, .n = w->rows, .pos = b->spans[s].pos};
    }
    return SH_OK;
}

/* About −0.1 to 0.1. */
static void noise(float *x, size_t n, uint32_t seed) {
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(seed >> 8) * 0x1p-24f * 0.2f - 0.1f;
    }
}

/* Every position has the same noise: what is in pages costs no time. */
static sh_status fill(bench *b) {
    const sh_attn_work *w = b->w;
    size_t row = (size_t)w->kv_heads * (size_t)w->head_dim;
    float *kv = NULL;
    SH_TRY(sh_mem_alloc(2 * row * sizeof(float), "attention rates", (void **)&kv));
    noise(kv, 2 * row, 1);
    sh_kv_pack(b->kv, b->kn, 0, w->k_eq_v ? NULL : kv, kv + row, b->packed);
    for (int i = 0; i < b->c.n_layers; i++)
        for (int s = 0; s < w->sequences; s++) {
            sh_span all = b->spans[s];
            all.pos = first_of(w);
            for (int p = 0; p < w->context - all.pos; p++) sh_kv_import(b->kv, i, &all, p, 1, b->packed);
        }
    sh_mem_free(kv, 2 * row * sizeof(float));
    noise(b->k_norm, (size_t)w->head_dim, 2);
    return SH_OK;
}

static sh_status open_bench(bench *b, sh_team *t, size_t bytes) {
    const sh_attn_work *w = b->w;
    sh_layer l = layer_of(w, 0);
    size_t n = (size_t)w->sequences;
    b->spans = calloc(n, sizeof *b->spans);
    b->rows = calloc(n, sizeof *b->rows);
    b->pages = calloc(n * ((size_t)w->context / SH_PAGE_TOKENS + 2), sizeof *b->pages);
    b->k_norm = calloc((size_t)w->head_dim, sizeof *b->k_norm);
    b->packed = calloc(1, sh_layer_kv_bytes(&l, w->kv));
    if (!b->spans || !b->rows || !b->pages || !b->k_norm || !b->packed)
        SH_FAIL(SH_EMEMORY, "attention rates: no memory for %d sequences", w->sequences);
    b->q_bytes = n * (size_t)w->rows * (size_t)w->heads * (size_t)w->head_dim * sizeof(float);
    SH_TRY(sh_mem_alloc(b->q_bytes, "attention rates", (void **)&b->q));
    SH_TRY(open_pages(b, bytes));
    SH_TRY(sh_rope_create(&l, w->context, &b->rope));
    sh_rope_reach(&b->rope, b->kn, w->context);
    SH_TRY(fill(b));
    return sh_attention_create(&b->c, 0, b->c.n_layers, w->sequences * w->rows, w->sequences, w->context, t, b->kn,
                               &b->a);
}

static void close_bench(bench *b) {
    sh_attention_destroy(&b->a);
    sh_kv_destroy(&b->kv);
    sh_rope_release(&b->rope);
    sh_mem_free(b->q, b->q_bytes);
    free(b->spans);
    free(b->rows);
    free(b->pages);
    free(b->k_norm);
    free(b->packed);
}

static double best_of(bench *b, int tries) {
    double best = 1e9;
    for (int i = 0; i < tries; i++) {
        const sh_layer *l = &b->c.layer[i % b->c.n_layers];
        noise(b->q, b->q_bytes / sizeof(float), (uint32_t)i); /* a result is no query */
        double t0 = sh_now();
        sh_attention_run(b->a, b->kv, l, b->k_norm, &b->rope, b->rows, b->w->sequences, b->q);
        double d = sh_now() - t0;
        if (d < best) best = d;
    }
    return best;
}

sh_status sh_attn_work_measure(sh_team *t, const sh_kernels *kn, const sh_attn_work *w, size_t bytes, int tries,
                               double *seconds) {
    bench b = {.w = w, .kn = kn};
    sh_status st = open_bench(&b, t, bytes);
    if (st == SH_OK) *seconds = best_of(&b, tries);
    close_bench(&b);
    return st;
}
