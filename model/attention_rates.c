/* Times sh_attention_run on made-up pages. See attention_rates.h. */
#include "model/attention_rates.h"

#include <stdlib.h>
#include <string.h>
#include "common/clock.h"
#include "common/mem.h"

#define HEADS    8 /* of the planner's work: as in global layers of E2B, and on each KV head of 26B-A4B and 31B */
#define HEAD_DIM 512
#define CONTEXT  4096
#define SEQS     8
#define TRIES    9
#define SECONDS  0.15 /* after so much time no further try begins */
#define MOST     64.0 /* rows that forming keys may cost */

struct sh_attn_bench {
    sh_attn_work w;
    sh_team *team;
    const sh_kernels *kn;
    int next; /* layer whose turn it is */
    sh_config c;
    sh_kv_pool *kv;
    sh_rope rope;
    sh_span *spans;     /* [sequences] */
    sh_attn_rows *rows; /* [sequences] */
    int32_t *pages;     /* [sequences, pages of one] */
    float *k_norm;      /* [head_dim] */
    uint8_t *packed;    /* one position, as pages have it */
};

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

static void set_rows(sh_attn_bench *b) {
    const sh_attn_work *w = &b->w;
    for (int s = 0; s < w->sequences; s++) {
        b->spans[s].pos = w->context - w->rows;
        b->spans[s].rows = w->rows;
        b->rows[s] = (sh_attn_rows){.span = &b->spans[s], .row = s * w->rows, .n = w->rows, .pos = b->spans[s].pos};
    }
}

static sh_status open_pages(sh_attn_bench *b, size_t bytes) {
    const sh_attn_work *w = &b->w;
    int first = first_of(w) / SH_PAGE_TOKENS, each = (w->context - 1) / SH_PAGE_TOKENS + 1 - first;
    int32_t counts[SH_KV_KINDS] = {0};
    double layers = (double)bytes / sh_attn_work_bytes(w);
    counts[SH_KV_GLOBAL] = each * w->sequences;
    b->c.n_layers = layers < 1 ? 1 : layers > SH_MAX_LAYERS ? SH_MAX_LAYERS : (int)layers;
    b->c.first_shared = b->c.n_layers;
    for (int i = 0; i < b->c.n_layers; i++) b->c.layer[i] = layer_of(w, i);
    SH_TRY(sh_kv_create(&b->c, w->kv, 0, b->c.n_layers, counts, &b->kv));
    for (int s = 0; s < w->sequences; s++) { /* sequences that grow together have pages in turn */
        int32_t *pages = b->pages + (size_t)s * (size_t)each;
        for (int i = 0; i < each; i++) pages[i] = i * w->sequences + s;
        b->spans[s].seq = (uint64_t)s + 1;
        b->spans[s].page0[SH_KV_GLOBAL] = first;
        b->spans[s].n_pages[SH_KV_GLOBAL] = each;
        b->spans[s].pages[SH_KV_GLOBAL] = pages;
    }
    set_rows(b);
    return SH_OK;
}

/* About −0.1 to 0.1. */
static void noise(float *x, size_t n, uint32_t seed) {
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(seed >> 8) * 0x1p-24f * 0.2f - 0.1f;
    }
}

/* Layers in turn; each member touches its own first, so that the pages lie on its memory node. */
static void fill_layers(void *arg, int member, int size) {
    sh_attn_bench *b = arg;
    const sh_attn_work *w = &b->w;
    int lo, hi;
    sh_team_share(b->c.n_layers * w->sequences, member, size, &lo, &hi);
    for (int i = lo; i < hi; i++) {
        sh_span all = b->spans[i % w->sequences];
        all.pos = first_of(w);
        for (int p = 0; p < w->context - all.pos; p++) sh_kv_import(b->kv, i / w->sequences, &all, p, 1, b->packed);
    }
}

/* Every position has the same noise: what is in pages costs no time. */
static sh_status fill(sh_attn_bench *b) {
    const sh_attn_work *w = &b->w;
    size_t row = (size_t)w->kv_heads * (size_t)w->head_dim;
    float *kv = NULL;
    SH_TRY(sh_mem_alloc(2 * row * sizeof(float), "attention rates", (void **)&kv));
    noise(kv, 2 * row, 1);
    sh_kv_pack(b->kv, b->kn, 0, w->k_eq_v ? NULL : kv, kv + row, b->packed);
    sh_mem_free(kv, 2 * row * sizeof(float));
    noise(b->k_norm, (size_t)w->head_dim, 2);
    sh_team_run(b->team, fill_layers, b);
    return SH_OK;
}

static sh_status open_bench(sh_attn_bench *b, size_t bytes) {
    const sh_attn_work *w = &b->w;
    sh_layer l = layer_of(w, 0);
    size_t n = (size_t)w->sequences;
    b->spans = calloc(n, sizeof *b->spans);
    b->rows = calloc(n, sizeof *b->rows);
    b->pages = calloc(n * ((size_t)w->context / SH_PAGE_TOKENS + 2), sizeof *b->pages);
    b->k_norm = calloc((size_t)w->head_dim, sizeof *b->k_norm);
    b->packed = calloc(1, sh_layer_kv_bytes(&l, w->kv));
    if (!b->spans || !b->rows || !b->pages || !b->k_norm || !b->packed)
        SH_FAIL(SH_EMEMORY, "attention rates: no memory for %d sequences", w->sequences);
    SH_TRY(open_pages(b, bytes));
    SH_TRY(sh_rope_create(&l, w->context, &b->rope));
    sh_rope_reach(&b->rope, b->kn, w->context);
    return fill(b);
}

sh_status sh_attn_bench_create(sh_team *t, const sh_kernels *kn, const sh_attn_work *w, size_t bytes,
                               sh_attn_bench **out) {
    sh_attn_bench *b = calloc(1, sizeof *b);
    if (!b) SH_FAIL(SH_EMEMORY, "attention rates: no memory");
    b->w = *w;
    b->team = t;
    b->kn = kn;
    sh_status st = open_bench(b, bytes);
    if (st != SH_OK) {
        sh_attn_bench_destroy(&b);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = b;
    return SH_OK;
}

void sh_attn_bench_destroy(sh_attn_bench **bp) {
    sh_attn_bench *b = *bp;
    if (!b) return;
    sh_kv_destroy(&b->kv);
    sh_rope_release(&b->rope);
    free(b->spans);
    free(b->rows);
    free(b->pages);
    free(b->k_norm);
    free(b->packed);
    free(b);
    *bp = NULL;
}

static double best_of(sh_attn_bench *b, sh_attention *a, float *q, size_t n, int tries) {
    double best = 1e9, begin = sh_now();
    for (int i = 0; i < tries && (i < 2 || tries > TRIES || sh_now() - begin < SECONDS); i++) {
        const sh_layer *l = &b->c.layer[b->next];
        b->next = (b->next + 1) % b->c.n_layers;
        noise(q, n, (uint32_t)i); /* a result is no query */
        double t0 = sh_now();
        sh_attention_run(a, b->kv, l, b->k_norm, &b->rope, b->rows, b->w.sequences, q);
        double d = sh_now() - t0;
        if (d < best) best = d;
    }
    return best;
}

sh_status sh_attn_bench_seconds(sh_attn_bench *b, int heads, int rows, int tries, double *seconds) {
    sh_attention *a = NULL;
    float *q = NULL;
    if (heads < 1 || heads % b->w.kv_heads || rows < 1 || rows > (b->w.window > 0 ? b->w.rows : b->w.context))
        SH_FAIL(SH_EINPUT, "attention rates: %d heads, %d rows: a multiple of %d and 1 to %d are allowed", heads, rows,
                b->w.kv_heads, b->w.window > 0 ? b->w.rows : b->w.context);
    size_t n = (size_t)b->w.sequences * (size_t)rows * (size_t)heads * (size_t)b->w.head_dim;
    b->w.heads = heads;
    b->w.rows = rows;
    set_rows(b);
    for (int i = 0; i < b->c.n_layers; i++) b->c.layer[i].heads = heads;
    SH_TRY(sh_mem_alloc(n * sizeof *q, "attention rates", (void **)&q));
    sh_status st = sh_attention_create(&b->c, 0, b->c.n_layers, b->w.sequences * rows, b->w.sequences, b->w.context,
                                       b->team, b->kn, &a);
    if (st == SH_OK) *seconds = best_of(b, a, q, n, tries);
    sh_attention_destroy(&a);
    sh_mem_free(q, n * sizeof *q);
    return st;
}

/* --- for the planner -----------------------------------------------------------------------------------------------
 */

/* Seconds of 1, 2, 4, … 64 rows that meet each key: up to HEADS heads of one position, then more positions. More rows
 * take no less time: what says otherwise is a disturbance. */
static sh_status measure_times(sh_attn_bench *b, double *t) {
    for (int i = SH_PRODUCT_FEWS; i >= 0; i--) {
        int heads = 1 << i < HEADS ? 1 << i : HEADS;
        SH_TRY(sh_attn_bench_seconds(b, heads, (1 << i) / heads, TRIES, &t[i]));
        if (i < SH_PRODUCT_FEWS && t[i] > t[i + 1]) t[i] = t[i + 1];
    }
    return SH_OK;
}

/* Rows that forming keys costs, from the seconds of HEADS rows with it: what is longer than reading and computing. */
static double formed_of(const sh_attention_rates *r, double bytes, double flops, double seconds) {
    double row = flops / HEADS / r->flops, own = HEADS / r->few[3], read = bytes / r->read, c = 0;
    if (seconds > (1 + r->both) * read)
        c = seconds - r->both * read;
    else if (r->both > 0 && seconds > read)
        c = (seconds - read) / r->both;
    double rows = c / row - own;
    return rows < 0 ? 0 : rows > MOST ? MOST : rows;
}

_Static_assert(HEADS == 1 << 3, "few[3] is that of HEADS rows");

static sh_status measure_formed(sh_team *t, const sh_kernels *kn, sh_attn_work w, size_t bytes,
                                sh_attention_rates *out) {
    sh_attn_bench *b = NULL;
    double seconds = 0;
    w.k_eq_v = true;
    SH_TRY(sh_attn_bench_create(t, kn, &w, bytes, &b));
    sh_status st = sh_attn_bench_seconds(b, HEADS, 1, TRIES, &seconds);
    sh_attn_bench_destroy(&b);
    SH_TRY(st);
    out->formed = formed_of(out, sh_attn_work_bytes(&w), sh_attn_work_flops(&w), seconds);
    return SH_OK;
}

sh_status sh_attention_rates_measure(sh_team *t, const sh_kernels *kn, sh_kv_type kv, size_t bytes,
                                     sh_attention_rates *out) {
    sh_attn_work w = {.heads = HEADS,
                      .kv_heads = 1,
                      .head_dim = HEAD_DIM,
                      .kv = kv,
                      .sequences = SEQS,
                      .context = CONTEXT,
                      .rows = 1};
    sh_attn_bench *b = NULL;
    sh_product_rates p;
    double seconds[SH_PRODUCT_FEWS + 1];
    SH_TRY(sh_attn_bench_create(t, kn, &w, bytes, &b));
    sh_status st = measure_times(b, seconds);
    sh_attn_bench_destroy(&b);
    SH_TRY(st);
    sh_product_rates_of(seconds, sh_attn_work_bytes(&w), sh_attn_work_flops(&w) / HEADS, SH_W_BF16, &p);
    out->read = p.read[SH_W_BF16];
    out->flops = p.flops[SH_W_BF16];
    out->both = p.both[SH_W_BF16];
    for (int i = 0; i < SH_PRODUCT_FEWS; i++) out->few[i] = p.few[SH_W_BF16][i];
    return measure_formed(t, kn, w, bytes, out);
}
