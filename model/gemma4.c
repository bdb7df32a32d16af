/*
 * THE decoder layer, for every variant, for prompts and decode alike. Formulas: gemma4-text §4; reference
 * Stage.layer().
 *
 *   x = x + rms( o · attention( rms(x) ) )
 *   x = x + rms( ffn( rms(x) ) )              ffn: dense, or rms(dense) + rms(Σ experts)
 *   x = x + rms( p · (gelu(g · x) ⊙ ple) )    where the model has per-layer embeddings
 *   x = x · layer_scalar
 *
 * Rows are [n, hidden], f32; matrices [out, in]; rms(x, w) = x / sqrt(mean(x²) + eps) ⊙ w. Each row's result depends on
 * that row and its sequence's pages alone.
 */
#include <math.h>
#include <string.h>
#include "common/clock.h"
#include "model/gemma4_model.h"
#include "model/linear.h"

/* A loop over rows: what the callbacks below need to know. */
typedef struct row_job {
    sh_model *m;
    int layer;
    const sh_layer *l;
    const sh_layer_weights *w;
    const float *norm;
    float *x, *y, *z;
    const int32_t *ids;
    int width;
} row_job;

static const sh_layer_weights *weights_of(const sh_model *m, int layer) {
    return &m->weights->layer[layer - m->options.first];
}

static const sh_rope *rope_of(const sh_model *m, int layer) {
    return &m->ropes[m->rope_of[layer]];
}

static float *row(float *x, int r, int width) {
    return x + (size_t)r * (size_t)width;
}

static sh_slice_kind kind_of(const sh_model *m, const double *cause) {
    return cause == &m->times.weights     ? SH_SLICE_WEIGHTS
           : cause == &m->times.attention ? SH_SLICE_ATTENTION
           : cause == &m->times.experts   ? SH_SLICE_EXPERTS
           : cause == &m->times.exchange  ? SH_SLICE_EXCHANGE
                                          : SH_SLICE_OTHER;
}

/* Books the time since the last call under `cause`. */
static void book(sh_model *m, double *cause) {
    double now = sh_now();
    *cause += now - m->mark;
    sh_timeline_note(m->timeline, kind_of(m, cause), m->since, now);
    m->mark = m->since = now;
}

/* Books the time that was spent waiting for who shares positions out; the rest is of another cause. */
static void book_waiting(sh_model *m) {
    double waited = m->spread ? sh_spread_waited(m->spread) : 0;
    m->times.exchange += waited;
    m->mark += waited;
}

/* y[i] [n, w[i]->n] = x [n, k] · w[i]ᵀ for `count` matrices; x is made first, unless make is NULL. */
static void project_made(sh_model *m, int count, const sh_wmat *const *w, const sh_row_maker *make, const float *x,
                         int n, float *const *y) {
    size_t ld[SH_LINEAR_MOST];
    for (int i = 0; i < count; i++) ld[i] = (size_t)w[i]->n;
    book(m, &m->times.other);
    sh_linear_made(m->team, m->kn, count, w, make, x, (size_t)w[0]->k, n, y, ld);
    book(m, &m->times.weights);
}

/* y [n, w->n] = x [n, w->k] · wᵀ */
static void project(sh_model *m, const sh_wmat *w, const float *x, int n, float *y) {
    project_made(m, 1, &w, NULL, x, n, &y);
}

/* --- members of a stage --------------------------------------------------------------------------------------------
 */

/* all [n, total] from every member's columns of it; cut at multiples of `unit` */
static sh_status gather(sh_model *m, int layer, sh_joint what, const float *mine, int n, int total, int unit,
                        float *all) {
    const sh_peers *p = m->options.peers;
    book(m, &m->times.other);
    SH_TRY(p->gather(p->ctx, layer, what, mine, n, total, unit, all));
    book(m, &m->times.exchange);
    return SH_OK;
}

/* y [n, hidden] = Σ of every member's y */
static sh_status sum(sh_model *m, int layer, sh_joint what, float *y, int n) {
    const sh_peers *p = m->options.peers;
    SH_TRY(p->sum(p->ctx, layer, what, y, n, m->config.hidden));
    book(m, &m->times.exchange);
    return SH_OK;
}

/* y [n, hidden] = x [n, total] · wᵀ, x being what the members of a stage computed column by column; it is made first,
 * unless make is NULL. Each gathers x, computes some outputs of all inputs and gathers those; where sums may be split,
 * each multiplies the columns that it has, and the products are added. */
static sh_status mix(sh_model *m, int layer, sh_joint from, sh_joint to, const sh_wmat *w, const sh_row_maker *make,
                     const float *x, int n, int total, int unit, float *y) {
    const sh_share *s = &m->options.share;
    if (s->parts <= 1 || s->sum) {
        project_made(m, 1, &w, make, x, n, &y);
        return s->parts <= 1 ? SH_OK : sum(m, layer, to, y, n);
    }
    if (make) sh_row_loop_run(m->team, n, make->width, make->fn, make->arg);
    SH_TRY(gather(m, layer, from, x, n, total, unit, m->all));
    project(m, w, m->all, n, m->own);
    return gather(m, layer, to, m->own, n, m->config.hidden, SH_SHARE_COLUMNS, y);
}

/* --- passes over rows ----------------------------------------------------------------------------------------------
 */

static void norm_rows(void *arg, int lo, int hi) {
    const row_job *j = arg;
    int H = j->m->config.hidden;
    for (int r = lo; r < hi; r++) j->m->kn->rmsnorm(row(j->y, r, H), row(j->x, r, H), j->norm, H, j->m->config.eps);
}

static sh_row_maker maker(sh_row_loop_fn fn, row_job *j, int width) {
    return (sh_row_maker){.fn = fn, .arg = j, .width = (size_t)width};
}

static void residual_rows(void *arg, int lo, int hi) {
    const row_job *j = arg;
    int H = j->m->config.hidden;
    for (int r = lo; r < hi; r++) {
        float *y = row(j->y, r, H);
        j->m->kn->rmsnorm(y, y, j->norm, H, j->m->config.eps);
        j->m->kn->add(row(j->x, r, H), y, H);
    }
}

/* x = x + rms(y, w); y is spent. Every block output is normed whole before it joins the stream. */
static void residual(sh_model *m, float *x, float *y, const float *w, int n) {
    row_job j = {.m = m, .x = x, .y = y, .norm = w};
    sh_row_loop_run(m->team, n, 2 * (size_t)m->config.hidden, residual_rows, &j);
}

static void scale_rows(void *arg, int lo, int hi) {
    const row_job *j = arg;
    int H = j->m->config.hidden;
    for (int r = lo; r < hi; r++) j->m->kn->scale(row(j->x, r, H), row(j->x, r, H), j->w->scalar, H);
}

static void gelu_rows(void *arg, int lo, int hi) {
    const row_job *j = arg;
    for (int r = lo; r < hi; r++) {
        float *g = row(j->x, r, j->width);
        j->m->kn->gelu_mul(g, g, row(j->y, r, j->width), j->width);
    }
}

/* --- attention -----------------------------------------------------------------------------------------------------
 */

/* Norms and rotates the heads of one row: q = rope(rms(q)), k = rope(rms(k)), v = rms(v) without a weight. Where K = V
 * the raw projection is the value, and v alone is stored: k = rope(k_norm ⊙ v) is formed by whoever reads it. */
static void heads_of_row(const row_job *j, int r, const sh_attn_rows *s) {
    sh_model *m = j->m;
    const sh_layer *l = j->l;
    const sh_kernels *kn = m->kn;
    const sh_rope *rope = rope_of(m, j->layer);
    int pos = s->pos + r - s->row, hd = l->head_dim;
    for (int h = 0; j->w->q_norm && h < l->heads; h++) {
        float *q = row(m->q, r * l->heads + h, hd);
        kn->rmsnorm(q, q, j->w->q_norm, hd, m->config.eps);
        sh_rope_apply(rope, kn, q, pos);
    }
    if (!l->has_kv) return;
    float *k_row = row(m->k, r, l->kv_heads * hd), *v_row = l->k_eq_v ? k_row : row(m->v, r, l->kv_heads * hd);
    for (int h = 0; h < l->kv_heads; h++) {
        float *k = row(k_row, h, hd), *v = row(v_row, h, hd);
        kn->rmsnorm(v, v, NULL, hd, m->config.eps);
        if (l->k_eq_v) continue;
        kn->rmsnorm(k, k, j->w->k_norm, hd, m->config.eps);
        sh_rope_apply(rope, kn, k, pos);
    }
    if (m->spread)
        sh_spread_put(m->spread, j->layer, r, k_row, v_row);
    else
        sh_kv_write(m->kv, kn, j->layer, s->span, pos - s->span->pos, l->k_eq_v ? NULL : k_row, v_row);
}

static void heads_rows(void *arg, int lo, int hi) {
    const row_job *j = arg;
    for (int i = 0; i < j->m->n_part_spans; i++) {
        const sh_attn_rows *s = &j->m->part_spans[i];
        int from = s->row > lo ? s->row : lo, to = s->row + s->n < hi ? s->row + s->n : hi;
        for (int r = from; r < to; r++) heads_of_row(j, r, s);
    }
}

/* Of rms(x): queries of this layer, unless only its K/V are wanted, and keys and values if it has its own; all raw. */
static void project_heads(sh_model *m, const sh_layer *l, const sh_layer_weights *w, const sh_part *p) {
    row_job j = {.m = m, .x = row(m->x, p->row0, m->config.hidden), .y = m->h, .norm = w->input_norm};
    sh_row_maker normed = maker(norm_rows, &j, m->config.hidden);
    const sh_wmat *mats[] = {&w->q, &w->k, &w->v};
    float *out[] = {m->q, m->k, m->v};
    int count = !l->has_kv ? 1 : l->k_eq_v ? 2 : 3, from = w->q.data ? 0 : 1;
    project_made(m, count - from, mats + from, &normed, m->h, p->n, out + from);
}

/* q, and K and V in their pages. */
static sh_status heads_block(sh_model *m, const sh_part *p) {
    const sh_layer *l = &m->config.layer[p->layer];
    const sh_layer_weights *w = weights_of(m, p->layer);
    const sh_peers *peers = m->options.peers;
    sh_model_clip(m, p);
    project_heads(m, l, w, p);
    row_job j = {.m = m, .layer = p->layer, .l = l, .w = w};
    sh_row_loop_run(m->team, p->n, (size_t)((l->heads + 2 * l->kv_heads) * l->head_dim), heads_rows, &j);
    book(m, &m->times.other);
    if (!l->has_kv || !peers || !peers->kv_written || p->row0 + p->n < m->n) return SH_OK;
    SH_TRY(peers->kv_written(peers->ctx, p->layer));
    book(m, &m->times.exchange);
    return SH_OK;
}

/* q = softmax(q · k) v over all positions, wherever their K/V are stored. */
static sh_status attend(sh_model *m, int layer) {
    const sh_layer *l = &m->config.layer[layer];
    const float *k_norm = weights_of(m, layer)->k_norm;
    const sh_rope *rope = rope_of(m, layer);
    if (m->spread)
        SH_TRY(sh_spread_attend(m->spread, layer, k_norm, rope, m->part_spans, m->n_part_spans, m->q));
    else
        sh_attention_run(m->attention, m->kv, l, k_norm, rope, m->part_spans, m->n_part_spans, m->q);
    book_waiting(m);
    book(m, &m->times.attention);
    return SH_OK;
}

static sh_status attention_block(sh_model *m, const sh_part *p) {
    const sh_layer *l = &m->config.layer[p->layer];
    const sh_layer_weights *w = weights_of(m, p->layer);
    float *x = row(m->x, p->row0, m->config.hidden);
    SH_TRY(attend(m, p->layer));
    int all = m->whole.layer[p->layer].heads * l->head_dim;
    SH_TRY(mix(m, p->layer, SH_JOINT_HEADS, SH_JOINT_O, &w->o, NULL, m->q, p->n, all, l->head_dim, m->h));
    residual(m, x, m->h, w->post_attn_norm, p->n);
    return SH_OK;
}

/* --- feed-forward --------------------------------------------------------------------------------------------------
 */

/* y = down( gelu(gate h) ⊙ (up h) ), h = rms(x) */
static sh_status dense(sh_model *m, int layer, const sh_layer_weights *w, float *x, int n, float *y) {
    int ff = m->config.layer[layer].ff;
    row_job before = {.m = m, .x = x, .y = m->h, .norm = w->pre_ff_norm};
    row_job between = {.m = m, .x = m->gate, .y = m->up, .width = ff};
    sh_row_maker normed = maker(norm_rows, &before, m->config.hidden), active = maker(gelu_rows, &between, ff);
    project_made(m, 2, (const sh_wmat *const[]){&w->gate, &w->up}, &normed, m->h, n, (float *const[]){m->gate, m->up});
    return mix(m, layer, SH_JOINT_FF, SH_JOINT_DOWN, &w->down, &active, m->gate, n, m->whole.layer[layer].ff,
               SH_SHARE_COLUMNS, y);
}

static void join_rows(void *arg, int lo, int hi) {
    const row_job *j = arg;
    const sh_kernels *kn = j->m->kn;
    int H = j->m->config.hidden;
    float eps = j->m->config.eps;
    for (int r = lo; r < hi; r++) {
        float *y = row(j->y, r, H), *z = row(j->z, r, H);
        kn->rmsnorm(y, y, j->w->post_ff_norm_1, H, eps);
        kn->rmsnorm(z, z, j->w->post_ff_norm_2, H, eps);
        kn->add(y, z, H);
    }
}

static void count_chosen(sh_model *m, int layer, const int32_t *ids, int n) {
    uint64_t *to = m->chosen + (size_t)(layer - m->options.first) * (size_t)m->config.experts;
    for (int i = 0; i < n * m->config.top_k; i++) to[ids[i]]++;
}

/* Rows leave for their experts. */
static sh_status experts_begin(sh_model *m, int slot) {
    const sh_part *p = &m->part[slot];
    if (!m->config.layer[p->layer].moe) return SH_OK;
    book(m, &m->times.other);
    SH_TRY(sh_moe_begin(m->moe, slot, p->layer, weights_of(m, p->layer), row(m->x, p->row0, m->config.hidden), p->n));
    book(m, &m->times.experts);
    count_chosen(m, p->layer, sh_moe_ids(m->moe, slot), p->n);
    if (m->probe.router && p->n > 0)
        m->probe.router(m->probe.arg, p->layer, sh_moe_ids(m->moe, slot), sh_moe_weights(m->moe, slot), p->n,
                        m->config.top_k);
    return SH_OK;
}

/* The dense branch, while the experts' rows are on their way; then this member's experts. */
static sh_status feed_forward(sh_model *m, int slot) {
    const sh_part *p = &m->part[slot];
    const sh_layer_weights *w = weights_of(m, p->layer);
    SH_TRY(dense(m, p->layer, w, row(m->x, p->row0, m->config.hidden), p->n, p->y));
    if (!m->config.layer[p->layer].moe) return SH_OK;
    book(m, &m->times.other);
    SH_TRY(sh_moe_compute(m->moe, slot, w));
    book(m, &m->times.experts);
    return SH_OK;
}

/* y = rms(dense) + rms(Σ experts), once the results are there. */
static sh_status experts_end(sh_model *m, int slot) {
    const sh_part *p = &m->part[slot];
    if (!m->config.layer[p->layer].moe) return SH_OK;
    book(m, &m->times.other);
    SH_TRY(sh_moe_end(m->moe, slot, m->z));
    book(m, &m->times.experts);
    row_job j = {.m = m, .w = weights_of(m, p->layer), .y = p->y, .z = m->z};
    sh_row_loop_run(m->team, p->n, 3 * (size_t)m->config.hidden, join_rows, &j);
    return SH_OK;
}

/* --- per-layer embedding -------------------------------------------------------------------------------------------
 */

/* ple = (rms(proj · x0 · H^(−1/2)) + table row) · 2^(−1/2); gate = gelu(gate) ⊙ ple */
static void ple_rows(void *arg, int lo, int hi) {
    const row_job *j = arg;
    sh_model *m = j->m;
    const sh_kernels *kn = m->kn;
    int P = m->config.ple;
    float factor = (float)(1.0 / sqrt((double)m->config.hidden)), half = (float)sqrt(0.5);
    for (int r = lo; r < hi; r++) {
        float *ple = row(m->ple, r, P), *gate = row(m->gate, r, P), *tok = row(m->ctx, r, P);
        kn->scale(ple, ple, factor, P);
        kn->rmsnorm(ple, ple, m->weights->ple_norm, P, m->config.eps);
        sh_weights_ple_row(m->weights, j->layer, j->ids[r], tok);
        kn->add(ple, tok, P);
        kn->scale(ple, ple, half, P);
        kn->gelu_mul(gate, gate, ple, P);
    }
}

static void ple_block(sh_model *m, const sh_part *p) {
    const sh_layer_weights *w = weights_of(m, p->layer);
    int H = m->config.hidden, P = m->config.ple, n = p->n;
    float *x = row(m->x, p->row0, H);
    project(m, &w->ple_model_proj, row(m->x0, p->row0, H), n, m->ple);
    project(m, &w->ple_gate, x, n, m->gate); /* reads x itself, without a norm */
    row_job j = {.m = m, .layer = p->layer, .ids = m->ids + p->row0};
    sh_row_maker gated = maker(ple_rows, &j, 8 * P);
    project_made(m, 1, (const sh_wmat *const[]){&w->ple_proj}, &gated, m->gate, n, (float *const[]){m->h});
    if (m->probe.ple) m->probe.ple(m->probe.arg, p->layer, m->ple, n, P);
    residual(m, x, m->h, w->post_ple_norm, n);
}

/* --- the layer -----------------------------------------------------------------------------------------------------
 */

/* The second half of what a slot's part still has to do in its layer; nothing when it has no part. */
static sh_status part_end(sh_model *m, int slot) {
    sh_part *p = &m->part[slot];
    if (!p->open) return SH_OK;
    const sh_layer_weights *w = weights_of(m, p->layer);
    float *x = row(m->x, p->row0, m->config.hidden);
    SH_TRY(experts_end(m, slot));
    residual(m, x, p->y, w->post_ff_norm, p->n);
    if (m->config.ple) ple_block(m, p);
    row_job j = {.m = m, .w = w, .x = x};
    sh_row_loop_run(m->team, p->n, (size_t)m->config.hidden, scale_rows, &j);
    if (m->probe.hidden) m->probe.hidden(m->probe.arg, p->layer, x, p->n, m->config.hidden);
    p->open = false;
    return SH_OK;
}

static sh_status part_begin(sh_model *m, int slot, int layer, int index, int parts) {
    int lo, hi;
    sh_part *p = &m->part[slot];
    sh_team_share(m->n, index, parts, &lo, &hi);
    *p = (sh_part){.open = true, .layer = layer, .row0 = lo, .n = hi - lo, .y = p->y};
    SH_TRY(heads_block(m, p));
    p->open = !sh_config_only_kv(&m->config, layer); /* else that was all */
    if (!p->open) return SH_OK;
    SH_TRY(attention_block(m, p));
    return experts_begin(m, slot);
}

/*
 * A layer for all rows, part by part. Where experts are with other members two parts are under way, so that something
 * is computed while messages travel:
 *
 *   rows of A        ──────►  experts of others  ──────►  results of A
 *   here:  begin A │ begin B │ dense A, experts A │ dense B, experts B │ end A, begin A of the next layer │ end B, …
 *   rows of B                ──────►  experts of others            ──────►  results of B
 *
 * A part's attention needs the K/V of earlier rows alone, and those have begun before. Every part is left open, for the
 * next layer or settle() to end.
 */
static sh_status layer_run(sh_model *m, int layer) {
    int parts = sh_model_parts(m);
    for (int i = 0; i < parts; i += m->n_parts) {
        int here = parts - i < m->n_parts ? parts - i : m->n_parts;
        for (int slot = 0; slot < here; slot++) {
            SH_TRY(part_end(m, slot));
            SH_TRY(part_begin(m, slot, layer, i + slot, parts));
        }
        for (int slot = 0; slot < here; slot++)
            if (m->part[slot].open) SH_TRY(feed_forward(m, slot));
    }
    return SH_OK;
}

static sh_status settle(sh_model *m) {
    for (int slot = 0; slot < m->n_parts; slot++) SH_TRY(part_end(m, slot));
    return SH_OK;
}

static void embed_rows(void *arg, int lo, int hi) {
    const row_job *j = arg;
    sh_model *m = j->m;
    int H = m->config.hidden;
    for (int r = lo; r < hi; r++) {
        sh_weights_embed(m->weights, m->ids[r], row(m->x, r, H));
        if (m->x0) memcpy(row(m->x0, r, H), row(m->x, r, H), (size_t)H * sizeof(float));
    }
}

/* The rows' ids, positions and hidden states as this stage gets them. */
static void begin_step(sh_model *m, const sh_batch *b, const void *in) {
    m->batch = b;
    m->mark = m->since = sh_now();
    for (int slot = 0; slot < m->n_parts; slot++) m->part[slot].open = false; /* a step that failed leaves them so */
    int end = 0;
    for (int i = 0; i < b->n_spans; i++)
        if (b->spans[i].pos + b->spans[i].rows > end) end = b->spans[i].pos + b->spans[i].rows;
    for (int i = 0; i < m->n_ropes; i++) sh_rope_reach(&m->ropes[i], m->kn, end);
    sh_model_view(m, false);
    if (m->n > 0) memcpy(m->ids, b->ids + m->lo, (size_t)m->n * sizeof *m->ids);
    if (m->options.first == 0) {
        row_job j = {.m = m};
        sh_row_loop_run(m->team, m->n, (size_t)m->config.hidden, embed_rows, &j);
        if (m->probe.hidden) m->probe.hidden(m->probe.arg, -1, m->x, m->n, m->config.hidden);
        return;
    }
    if (m->options.first >= m->config.first_shared) sh_model_keep(m); /* the rows came already cut down: ids follow */
    sh_model_receive(m, in);
}

sh_status sh_model_forward(sh_model *m, const sh_batch *b, const void *in, void *out) {
    SH_TRY(sh_model_check(m, b));
    begin_step(m, b, in);
    for (int i = m->options.first; i < m->options.last; i++) {
        if (i == m->config.first_shared) { /* consumers write no K/V: nobody needs the other rows */
            SH_TRY(settle(m));
            sh_model_keep(m);
        }
        SH_TRY(layer_run(m, i));
    }
    SH_TRY(settle(m));
    if (m->options.last >= m->config.first_shared) sh_model_keep(m);
    if (sh_config_has_head(&m->config, m->options.last)) {
        row_job j = {.m = m, .x = m->x, .y = m->spread ? m->h : out, .norm = m->weights->final_norm};
        sh_row_loop_run(m->team, m->n, (size_t)m->config.hidden, norm_rows, &j);
        if (m->spread) SH_TRY(sh_spread_gather(m->spread, m->h, m->config.hidden, out));
        book_waiting(m);
    } else if (m->options.last != m->config.kv_end) {
        sh_model_send(m, in, out);
    }
    book(m, &m->times.other);
    return SH_OK;
}

static void softcap_rows(void *arg, int lo, int hi) {
    const row_job *j = arg;
    for (int r = lo; r < hi; r++) j->m->kn->softcap(row(j->x, r, j->width), j->m->config.softcap, j->width);
}

void sh_model_logits(sh_model *m, const float *hidden, int n, float *logits) {
    m->mark = m->since = sh_now();
    project(m, &m->weights->head, hidden, n, logits);
    if (m->config.softcap > 0) {
        row_job j = {.m = m, .x = logits, .width = m->weights->head.n};
        sh_row_loop_run(m->team, n, (size_t)j.width, softcap_rows, &j);
    }
    book(m, &m->times.other);
}
