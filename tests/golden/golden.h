/*
 * For the golden tests: reads golden/NAME.{json,safetensors}, makes models of a fixture, and runs sequences through
 * chains of stages as the worker does, with pages from a plain counter. Test code only.
 */
#ifndef SH_TESTS_GOLDEN_H
#define SH_TESTS_GOLDEN_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "common/file.h"
#include "common/json.h"
#include "model/gemma4.h"

#define MUST(expr)                                                                                                     \
    do {                                                                                                               \
        if ((expr) != SH_OK) {                                                                                         \
            fprintf(stderr, "%s:%d: %s\n%s\n", __FILE__, __LINE__, sh_error_text(), sh_error_trail());                 \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static int failures, checks;
#define CHECK(cond, ...)                                                                                               \
    do {                                                                                                               \
        checks++;                                                                                                      \
        if (!(cond)) {                                                                                                 \
            failures++;                                                                                                \
            fprintf(stderr, "FAILED %s:%d: ", __FILE__, __LINE__);                                                     \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
        }                                                                                                              \
    } while (0)

static const char *const fixtures[] = {"26b-a4b-like", "26b-a4b-sharded", "31b-like", "e2b-like", "e4b-like"};
#define N_FIXTURES ((int)(sizeof fixtures / sizeof fixtures[0]))
/* In tests/data/odd, by make_odd_models.py. */
static const char *const odd_fixtures[] = {"odd-widths", "wide-window", "full-only", "shared-values",
                                           "one-expert", "all-experts", "one-layer"};
#define N_ODD ((int)(sizeof odd_fixtures / sizeof odd_fixtures[0]))

static inline void *must_alloc(size_t n) {
    void *p = calloc(1, n ? n : 1);
    if (!p) exit(1);
    return p;
}

/* --- golden files --------------------------------------------------------------------------------------------------
 */

typedef struct golden {
    sh_map map;
    json_t *header, *info;
    const uint8_t *data;
} golden;

static inline golden golden_open(const char *name) {
    golden g = {0};
    char path[512];
    snprintf(path, sizeof path, "%s/text/golden/%s.safetensors", SH_TEST_DATA, name);
    MUST(sh_map_open(path, &g.map));
    uint64_t n;
    memcpy(&n, g.map.data, 8);
    MUST(sh_json_parse(path, (const char *)g.map.data + 8, n, &g.header));
    g.data = g.map.data + 8 + n;
    snprintf(path, sizeof path, "%s/text/golden/%s.json", SH_TEST_DATA, name);
    MUST(sh_json_read(path, (size_t)64 << 20, &g.info));
    return g;
}

static inline void golden_close(golden *g) {
    json_decref(g->header);
    json_decref(g->info);
    sh_map_close(&g->map);
}

/* A tensor's 4-byte items; *n their number. Missing: NULL. */
static inline const void *golden_tensor(const golden *g, const char *name, size_t *n) {
    json_t *t = json_object_get(g->header, name);
    if (!t) return NULL;
    json_t *o = json_object_get(t, "data_offsets");
    size_t a = (size_t)json_integer_value(json_array_get(o, 0)), b = (size_t)json_integer_value(json_array_get(o, 1));
    *n = (b - a) / 4;
    return g->data + a;
}

static inline int32_t *golden_ids(const json_t *array, int *n) {
    *n = (int)json_array_size(array);
    int32_t *ids = must_alloc((size_t)*n * sizeof *ids);
    for (int i = 0; i < *n; i++) ids[i] = (int32_t)json_integer_value(json_array_get(array, (size_t)i));
    return ids;
}

/* --- a chain of stages ---------------------------------------------------------------------------------------------
 */

#define MAX_STAGES 64
#define MAX_BATCH  64

typedef struct seq {
    const int32_t *ids;
    int n, done, slot; /* rows done; number of its pages in every pool */
    int32_t *pages;
    int n_pages;
} seq;

typedef struct chain {
    sh_config c, mine; /* the model; as the member of a divided stage sees it */
    sh_model *stage[MAX_STAGES];
    int n_stages, first[MAX_STAGES + 1];
    sh_kv_type kv;
    int max_context, max_rows, next_page, n_pages, window; /* of the sliding layers */
    uint8_t *blocks[2];
    size_t block_bytes[2];
    float *hidden; /* [max_rows, hidden] final output of the last step's kept rows */
    int32_t *ids;
    sh_span *spans;
    uint64_t step;
    int32_t widest_rows, widest_kept; /* among the members of the stage; 0: alone */
} chain;

typedef struct chain_options {
    const char *dir;
    sh_mode mode;
    sh_kv_type kv;
    int threads, max_rows, max_context, max_seqs;
    const int *cuts; /* ascending first layers of stages 1, 2, … */
    int n_cuts;
    sh_share share; /* {0}: stages are not divided */
    const sh_peers *peers;
} chain_options;

static inline chain chain_open(const chain_options *o) {
    chain ch = {.kv = o->kv, .max_context = o->max_context, .max_rows = o->max_rows, .n_stages = o->n_cuts + 1};
    MUST(sh_config_load(o->dir, &ch.c));
    sh_config_share(&ch.c, o->share, &ch.mine);
    ch.n_pages = o->max_seqs * (o->max_context / SH_PAGE_TOKENS + 1);
    ch.first[ch.n_stages] = ch.c.n_layers;
    for (int i = 0; i < ch.c.n_layers; i++)
        if (ch.c.layer[i].window > ch.window) ch.window = ch.c.layer[i].window;
    size_t biggest = 0;
    for (int i = 0; i < ch.n_stages; i++) {
        ch.first[i] = i ? o->cuts[i - 1] : 0;
        size_t b = sh_model_cut_bytes(&ch.mine, o->kv, ch.first[i], o->max_rows, o->max_rows);
        if (b > biggest) biggest = b;
    }
    for (int i = 0; i < ch.n_stages; i++) {
        sh_model_options m = {.mode = o->mode,
                              .kv_type = o->kv,
                              .first = ch.first[i],
                              .last = ch.first[i + 1],
                              .threads = o->threads,
                              .max_rows = o->max_rows,
                              .max_spans = MAX_BATCH,
                              .max_context = o->max_context,
                              .share = o->share,
                              .peers = o->peers,
                              .pages = {ch.n_pages, ch.n_pages}};
        MUST(sh_model_create(o->dir, &ch.c, &m, &ch.stage[i]));
    }
    for (int i = 0; i < 2; i++) ch.blocks[i] = must_alloc(biggest);
    ch.hidden = must_alloc((size_t)o->max_rows * (size_t)ch.c.hidden * sizeof(float));
    ch.ids = must_alloc((size_t)o->max_rows * sizeof(int32_t));
    ch.spans = must_alloc(MAX_BATCH * sizeof(sh_span));
    return ch;
}

static inline void chain_close(chain *ch) {
    for (int i = 0; i < ch->n_stages; i++) sh_model_destroy(&ch->stage[i]);
    for (int i = 0; i < 2; i++) free(ch->blocks[i]);
    free(ch->hidden);
    free(ch->ids);
    free(ch->spans);
}

/* A sequence with pages for its whole context, scattered over the pool. */
static inline seq seq_open(chain *ch, const int32_t *ids, int n) {
    seq s = {.ids = ids, .n = n, .n_pages = (ch->max_context + SH_PAGE_TOKENS - 1) / SH_PAGE_TOKENS};
    s.pages = must_alloc((size_t)s.n_pages * sizeof(int32_t));
    for (int i = 0; i < s.n_pages; i++) s.pages[i] = (ch->next_page + s.n_pages - 1 - i) % ch->n_pages;
    ch->next_page = (ch->next_page + s.n_pages) % ch->n_pages;
    return s;
}

static inline void seq_close(seq *s) {
    free(s->pages);
}

/* One micro-batch: take[i] rows of seqs[i] (0: left out), keep[i] of them kept. ch->hidden gets the kept rows. Returns
 * how many. */
static inline int chain_step(chain *ch, seq *seqs, int n, const int *take, const int *keep) {
    sh_batch b = {.step = ++ch->step,
                  .ids = ch->ids,
                  .spans = ch->spans,
                  .widest_rows = ch->widest_rows,
                  .widest_kept = ch->widest_kept};
    for (int i = 0; i < n; i++) {
        if (take[i] == 0) continue;
        seq *s = &seqs[i];
        sh_span *sp = &b.spans[b.n_spans++];
        *sp = (sh_span){.seq = (uint64_t)i + 1,
                        .pos = s->done,
                        .rows = take[i],
                        .keep = keep[i],
                        .row0 = b.n_rows,
                        .kept0 = b.n_kept};
        for (int k = 0; k < SH_KV_KINDS; k++) {
            /* pages before the window are gone */
            int w = k == SH_KV_SLIDING ? ch->window : 0;
            sp->page0[k] = w > 0 && s->done >= w ? (s->done - w + 1) / SH_PAGE_TOKENS : 0;
            sp->n_pages[k] = (s->done + take[i] - 1) / SH_PAGE_TOKENS + 1 - sp->page0[k];
            sp->pages[k] = s->pages + sp->page0[k];
        }
        memcpy(b.ids + b.n_rows, s->ids + s->done, (size_t)take[i] * sizeof(int32_t));
        b.n_rows += take[i];
        b.n_kept += keep[i];
        s->done += take[i];
    }
    for (int i = 0; i < ch->n_stages; i++) {
        void *out = i + 1 < ch->n_stages ? (void *)ch->blocks[(i + 1) & 1] : (void *)ch->hidden;
        MUST(sh_model_forward(ch->stage[i], &b, i ? ch->blocks[i & 1] : NULL, out));
    }
    return b.n_kept;
}

static inline sh_model *chain_last(const chain *ch) {
    return ch->stage[ch->n_stages - 1];
}

/* The K and V (f32) of a head of a producer at positions [0, n), as attention sees them; k_norm only for K = V layers.
 */
static inline double log_sum_exp(const float *x, int n) {
    double m = x[0], s = 0;
    for (int i = 1; i < n; i++) m = x[i] > m ? x[i] : m;
    for (int i = 0; i < n; i++) s += exp((double)x[i] - m);
    return m + log(s);
}

static inline int arg_max(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

static inline int finish(const char *what) {
    printf("%s: %d checks, %d failed\n", what, checks, failures);
    return failures ? 1 : 0;
}

#endif
