/* Batches for a benchmark, and the count of their work. See drive.h. */
#include "cli/drive.h"

#include <stdlib.h>
#include <string.h>
#include "common/clock.h"
#include "common/mem.h"
#include "partition/cost.h"

struct sh_drive {
    sh_drive_options o;
    sh_model *model;
    int n_pages;     /* per sequence and kind */
    int32_t *pages;  /* [max_batch][n_pages]: the pages of a sequence, the same numbers for both kinds */
    int32_t *prompt; /* [prompt] */
    int32_t *next;   /* [max_batch]: the token that each sequence goes on with */
    int32_t first_token;
    sh_span *spans;
    double *step_seconds; /* [generate] */
    bool *touched;        /* [n_layers][experts]: by the step at hand */
    void *in, *out;
    float *logits;
    uint8_t *rows; /* K/V of the prompt in one layer */
    size_t in_bytes, out_bytes, logits_bytes, rows_bytes;
    uint64_t random;
    sh_timeline *timeline;
    uint64_t steps;
};

/* --- counting ------------------------------------------------------------------------------------------------------
 */

static double expert_params(const sh_config *c) {
    return 3.0 * c->hidden * c->expert_ff;
}

static double dense_params(const sh_config *c, int layer) {
    double all = (double)sh_layer_params(c, layer);
    return c->layer[layer].moe ? all - expert_params(c) * c->experts : all;
}

static double head_params(const sh_config *c, int last) {
    return last == c->n_layers ? (double)c->vocab * c->hidden : 0;
}

double sh_drive_dense_bytes(const sh_config *c, sh_mode mode, int first, int last) {
    double params = head_params(c, last);
    for (int i = first; i < last; i++) params += dense_params(c, i);
    return sh_mode_weight_bytes(mode) * params;
}

/* Keys that a query at `pos` sees. */
static double keys_seen(const sh_layer *l, int pos) {
    return l->window > 0 && l->window < pos + 1 ? l->window : pos + 1;
}

double sh_drive_flops(const sh_config *c, int first, int last, int pos, int rows, int kept) {
    double sum = 2 * head_params(c, last) * kept;
    for (int i = first; i < last; i++) {
        const sh_layer *l = &c->layer[i];
        int n = i < c->first_shared ? rows : kept;
        double params = dense_params(c, i) + (l->moe ? expert_params(c) * c->top_k : 0), keys = 0;
        for (int r = rows - n; r < rows; r++) keys += keys_seen(l, pos + r);
        sum += 2 * params * n + 4.0 * l->heads * l->head_dim * keys;
    }
    return sum;
}

double sh_drive_kv_bytes(const sh_config *c, sh_kv_type type, int first, int last, int pos) {
    double sum = 0;
    for (int i = first; i < last; i++)
        sum += keys_seen(&c->layer[i], pos) * (double)sh_kv_row_bytes(c, type, c->layer[i].kv_from);
    return sum;
}

static void note_experts(void *arg, int layer, const int32_t *ids, const float *weights, int n, int top_k) {
    sh_drive *d = arg;
    (void)weights;
    bool *of = d->touched + (size_t)layer * (size_t)d->o.config->experts;
    for (int i = 0; i < n * top_k; i++) of[ids[i]] = true;
}

/* Bytes of the experts that the last step touched; forgets them. */
static double touched_bytes(sh_drive *d) {
    size_t n = (size_t)d->o.config->n_layers * (size_t)d->o.config->experts;
    double count = 0;
    for (size_t i = 0; i < n; i++) count += d->touched[i];
    memset(d->touched, 0, n);
    return count * sh_mode_weight_bytes(d->o.mode) * expert_params(d->o.config);
}

/* --- memory --------------------------------------------------------------------------------------------------------
 */

/* splitmix64 (Steele, Lea and Flood 2014). */
static uint64_t draw(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static int32_t draw_token(sh_drive *d) {
    int vocab = d->o.config->vocab;
    if (d->o.config->ple && d->o.config->ple_vocab < vocab) vocab = d->o.config->ple_vocab;
    return (int32_t)(draw(&d->random) % (uint64_t)vocab);
}

/* Hidden states for a stage that is not the first: values in ±1 with few bits, so that they are tame read as bf16 too
 * (keys and values may come in the same block). */
static void fill_input(sh_drive *d) {
    uint32_t *w = d->in;
    for (size_t i = 0; i < d->in_bytes / 4; i++) {
        float x = (float)((double)(int64_t)draw(&d->random) * 0x1p-63);
        memcpy(&w[i], &x, sizeof x);
        w[i] &= 0xffff0000u;
    }
}

static size_t kv_row_most(const sh_config *c, sh_kv_type type) {
    size_t most = 0;
    for (int i = 0; i < c->n_layers; i++) {
        size_t row = c->layer[i].has_kv ? sh_kv_row_bytes(c, type, i) : 0;
        if (row > most) most = row;
    }
    return most;
}

static sh_status reserve(sh_drive *d, int max_rows) {
    const sh_drive_options *o = &d->o;
    const sh_config *c = o->config;
    size_t batch = (size_t)o->max_batch, pages = batch * (size_t)d->n_pages;
    d->pages = calloc(pages, sizeof *d->pages);
    d->prompt = calloc((size_t)o->prompt, sizeof *d->prompt);
    d->next = calloc(batch, sizeof *d->next);
    d->spans = calloc(batch, sizeof *d->spans);
    d->step_seconds = calloc((size_t)(o->generate > o->prompt ? o->generate : o->prompt), sizeof *d->step_seconds);
    d->touched = calloc((size_t)c->n_layers * (size_t)(c->experts ? c->experts : 1), sizeof *d->touched);
    if (!d->pages || !d->prompt || !d->next || !d->spans || !d->step_seconds || !d->touched)
        SH_FAIL(SH_EMEMORY, "bench: no memory for its batches");
    for (size_t i = 0; i < pages; i++) d->pages[i] = (int32_t)i;
    for (int i = 0; i < o->prompt; i++) d->prompt[i] = draw_token(d);
    d->in_bytes = sh_model_cut_bytes(c, o->kv, o->first, max_rows, max_rows);
    d->out_bytes = sh_model_cut_bytes(c, o->kv, o->last, max_rows, max_rows);
    d->logits_bytes = o->last == c->n_layers ? SH_LOGIT_ROWS * (size_t)c->vocab * sizeof(float) : 0;
    d->rows_bytes = (size_t)o->prompt * kv_row_most(c, o->kv);
    SH_TRY(sh_mem_alloc(d->in_bytes, "incoming rows", &d->in));
    SH_TRY(sh_mem_alloc(d->out_bytes, "outgoing rows", &d->out));
    SH_TRY(sh_mem_alloc(d->logits_bytes, "logits", (void **)&d->logits));
    SH_TRY(sh_mem_alloc(d->rows_bytes, "keys and values of the prompt", (void **)&d->rows));
    fill_input(d);
    return SH_OK;
}

static sh_status load(sh_drive *d, int max_rows) {
    const sh_drive_options *o = &d->o;
    int32_t pages = (int32_t)(o->max_batch * d->n_pages);
    sh_model_options m = {.mode = o->mode,
                          .kv_type = o->kv,
                          .first = o->first,
                          .last = o->last,
                          .threads = o->threads,
                          .cpus = o->cpus,
                          .n_cpus = o->n_cpus,
                          .max_rows = max_rows,
                          .max_spans = o->max_batch,
                          .max_context = o->prompt + o->generate + 1,
                          .pages = {pages, pages}};
    return sh_model_create(o->model_dir, o->config, &m, &d->model);
}

sh_status sh_drive_create(const sh_drive_options *o, sh_drive **out) {
    sh_drive *d = calloc(1, sizeof *d);
    if (!d) SH_FAIL(SH_EMEMORY, "bench: no memory");
    d->o = *o;
    d->n_pages = (o->prompt + o->generate) / SH_PAGE_TOKENS + 1;
    int chunk = o->chunk < o->prompt ? o->chunk : o->prompt, rows = chunk > o->max_batch ? chunk : o->max_batch;
    sh_status st = load(d, rows);
    if (st == SH_OK) st = reserve(d, rows);
    if (st != SH_OK) {
        sh_drive_destroy(&d);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    d->o.cpus = NULL; /* the caller's */
    *out = d;
    return SH_OK;
}

void sh_drive_destroy(sh_drive **dp) {
    sh_drive *d = *dp;
    if (!d) return;
    sh_mem_free(d->in, d->in_bytes);
    sh_mem_free(d->out, d->out_bytes);
    sh_mem_free(d->logits, d->logits_bytes);
    sh_mem_free(d->rows, d->rows_bytes);
    sh_model_destroy(&d->model);
    free(d->pages);
    free(d->prompt);
    free(d->next);
    free(d->spans);
    free(d->step_seconds);
    free(d->touched);
    free(d);
    *dp = NULL;
}

sh_model *sh_drive_model(sh_drive *d) {
    return d->model;
}

void sh_drive_set_timeline(sh_drive *d, sh_timeline *t) {
    d->timeline = t;
    sh_model_set_timeline(d->model, t);
}

/* --- steps ---------------------------------------------------------------------------------------------------------
 */

/* The place of the largest value, the first of equal ones. */
static int32_t argmax(const float *x, int n) {
    enum { LANES = 16 };
    float top[LANES];
    for (int k = 0; k < LANES; k++) top[k] = x[0];
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) top[k] = x[i + k] > top[k] ? x[i + k] : top[k];
    for (; i < n; i++) top[0] = x[i] > top[0] ? x[i] : top[0];
    for (int k = 1; k < LANES; k++) top[0] = top[k] > top[0] ? top[k] : top[0];
    for (i = 0; i < n; i++)
        if (x[i] == top[0]) return i;
    return 0;
}

static sh_span span_of(const sh_drive *d, int seq, int pos, int rows, int keep) {
    const int32_t *pages = d->pages + (size_t)seq * (size_t)d->n_pages;
    sh_span s = {.seq = (uint64_t)seq, .pos = pos, .rows = rows, .keep = keep};
    for (int k = 0; k < SH_KV_KINDS; k++) {
        s.n_pages[k] = d->n_pages;
        s.pages[k] = pages;
    }
    return s;
}

static void note_step(sh_drive *d, const sh_batch *b, bool decode, double from, double to) {
    sh_slice_work w = {.step = d->steps++, .rows = b->n_rows, .decode = decode ? b->n_rows : 0};
    w.prompt = w.rows - w.decode;
    sh_timeline_end(d->timeline, from, to, &w);
}

/* What the rows of one product with the head are shared out by. */
typedef struct choosing {
    sh_drive *d;
    int first, n;
} choosing;

static void choose_rows(void *arg, int member, int size) {
    const choosing *x = arg;
    const sh_config *c = x->d->o.config;
    int lo, hi;
    sh_team_share(x->n, member, size, &lo, &hi);
    for (int i = lo; i < hi; i++) {
        int32_t *next = &x->d->next[x->first + i];
        *next = argmax(x->d->logits + (size_t)i * (size_t)c->vocab, c->vocab);
        if (c->ple && *next >= c->ple_vocab) *next = 0;
    }
}

/* Runs the batch and puts the next token of every kept row into d->next. */
static sh_status step(sh_drive *d, sh_batch *b, bool decode, double *seconds) {
    const sh_config *c = d->o.config;
    double t0 = sh_now();
    sh_timeline_begin(d->timeline, d->steps);
    SH_TRY(sh_model_forward(d->model, b, d->o.first > 0 ? d->in : NULL, d->out));
    for (int k = 0; d->o.last == c->n_layers && k < b->n_kept; k += SH_LOGIT_ROWS) {
        choosing x = {d, k, b->n_kept - k < SH_LOGIT_ROWS ? b->n_kept - k : SH_LOGIT_ROWS};
        sh_model_logits(d->model, (float *)d->out + (size_t)k * (size_t)c->hidden, x.n, d->logits);
        double chosen = sh_now();
        sh_team_run(sh_model_team(d->model), choose_rows, &x);
        sh_timeline_note(d->timeline, SH_SLICE_SAMPLING, chosen, sh_now());
    }
    double t1 = sh_now();
    *seconds = t1 - t0;
    note_step(d, b, decode, t0, t1);
    return SH_OK;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void finish(sh_drive *d, const sh_model_times *before, sh_drive_count *n) {
    sh_model_times now = sh_model_time(d->model);
    n->times = (sh_model_times){.weights = now.weights - before->weights,
                                .attention = now.attention - before->attention,
                                .experts = now.experts - before->experts,
                                .other = now.other - before->other};
    for (int i = 0; i < n->steps; i++) n->seconds += d->step_seconds[i];
    qsort(d->step_seconds, (size_t)n->steps, sizeof *d->step_seconds, by_value);
    n->best = d->step_seconds[0];
    n->median = n->steps % 2 ? d->step_seconds[n->steps / 2]
                             : (d->step_seconds[n->steps / 2 - 1] + d->step_seconds[n->steps / 2]) / 2;
}

sh_status sh_drive_prefill(sh_drive *d, sh_drive_count *out) {
    const sh_drive_options *o = &d->o;
    sh_drive_count n = {.tokens = o->prompt};
    sh_model_times before = sh_model_time(d->model);
    for (int pos = 0, rows; pos < o->prompt; pos += rows) {
        rows = o->prompt - pos < o->chunk ? o->prompt - pos : o->chunk;
        int keep = pos + rows == o->prompt ? 1 : 0;
        d->spans[0] = span_of(d, 0, pos, rows, keep);
        sh_batch b = {.n_rows = rows, .n_kept = keep, .n_spans = 1, .ids = d->prompt + pos, .spans = d->spans};
        SH_TRY(step(d, &b, false, &d->step_seconds[n.steps++]));
        n.flops += sh_drive_flops(o->config, o->first, o->last, pos, rows, keep);
    }
    d->first_token = d->next[0];
    finish(d, &before, &n);
    n.best = n.seconds;
    *out = n;
    return SH_OK;
}

/* Gives every sequence of the batch the first one's keys and values of the prompt. */
static void copy_prompt(sh_drive *d, int batch) {
    sh_kv_pool *kv = sh_model_kv(d->model);
    sh_span from = span_of(d, 0, 0, d->o.prompt, 0);
    for (int i = 0; i < d->o.config->n_layers; i++) {
        if (!sh_kv_holds(kv, i)) continue;
        sh_kv_export(kv, i, &from, 0, d->o.prompt, d->rows);
        for (int s = 1; s < batch; s++) {
            sh_span to = span_of(d, s, 0, d->o.prompt, 0);
            sh_kv_import(kv, i, &to, 0, d->o.prompt, d->rows);
        }
    }
}

sh_status sh_drive_decode(sh_drive *d, int batch, sh_drive_count *out) {
    const sh_drive_options *o = &d->o;
    copy_prompt(d, batch);
    d->next[0] = d->first_token;
    for (int s = 1; s < batch; s++) d->next[s] = draw_token(d); /* so that the sequences part */
    sh_model_probe probe = {.arg = d, .router = note_experts};
    if (o->config->experts) sh_model_set_probe(d->model, &probe);
    sh_drive_count n = {.tokens = batch * o->generate};
    sh_model_times before = sh_model_time(d->model);
    sh_status st = SH_OK;
    for (; st == SH_OK && n.steps < o->generate; n.steps++) {
        int pos = o->prompt + n.steps;
        for (int s = 0; s < batch; s++) {
            d->spans[s] = span_of(d, s, pos, 1, 1);
            d->spans[s].row0 = d->spans[s].kept0 = s;
        }
        sh_batch b = {.n_rows = batch, .n_kept = batch, .n_spans = batch, .ids = d->next, .spans = d->spans};
        st = step(d, &b, true, &d->step_seconds[n.steps]);
        n.flops += batch * sh_drive_flops(o->config, o->first, o->last, pos, 1, 1);
        n.weight_bytes += sh_drive_dense_bytes(o->config, o->mode, o->first, o->last) + touched_bytes(d);
        n.kv_bytes += batch * sh_drive_kv_bytes(o->config, o->kv, o->first, o->last, pos);
    }
    sh_model_set_probe(d->model, NULL);
    SH_TRY(st);
    finish(d, &before, &n);
    *out = n;
    return SH_OK;
}
