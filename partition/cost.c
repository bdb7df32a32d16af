/* Seconds of a layer and of a step. See cost.h; traffic is traffic.c's, many micro-batches forecast.c's. */
#include "partition/cost.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "model/owner.h"
#include "partition/cost_int.h"

#define GELU_FLOPS    120.0 /* multiply-adds' worth of one gelu(x)·y: docs/performance.md */
#define NORM_FLOPS    10.0  /* the same for one value that a norm, a rotation or a sum passes */
#define SAME_AS_LAYER 8     /* shapes of layers that a step remembers */

/* --- rows ----------------------------------------------------------------------------------------------------------
 */

/* Σ min(i, window) for i = 1 … n: keys that the first n rows of a sequence see. */
static double keys_below(double n, double window) {
    if (n <= window) return n * (n + 1) / 2;
    return window * (window + 1) / 2 + (n - window) * window;
}

sh_cost_load sh_cost_load_of(const sh_cost_span *span, int n_spans, bool kept_only, int window) {
    sh_cost_load l = {0};
    double w = window > 0 ? window : INFINITY;
    for (int i = 0; i < n_spans; i++) {
        const sh_cost_span *s = &span[i];
        double rows = kept_only ? s->kept : s->rows;
        if (!(rows > 0) || !(s->seqs > 0)) continue;
        l.all += s->seqs * s->rows;
        l.rows += s->seqs * rows;
        l.kept += s->seqs * s->kept;
        for (int k = 0; k < SH_COST_POSITIONS; k++) {
            double first = s->lo + (s->hi - s->lo) * (k + 0.5) / SH_COST_POSITIONS, end = first + s->rows;
            l.pairs += s->seqs * (keys_below(end, w) - keys_below(end - rows, w)) / SH_COST_POSITIONS;
            l.keys += s->seqs * (end < w - 1 + rows ? end : w - 1 + rows) / SH_COST_POSITIONS;
        }
    }
    return l;
}

sh_cost_load sh_cost_batch_load(sh_cost_batch *b, bool kept_only, int window) {
    for (int i = 0; i < b->n; i++)
        if (b->known[i].kept_only == kept_only && b->known[i].window == window) return b->known[i].load;
    sh_cost_load l = sh_cost_load_of(b->span, b->n_spans, kept_only, window);
    if (b->n < SH_COST_LOADS) {
        b->known[b->n].kept_only = kept_only;
        b->known[b->n].window = window;
        b->known[b->n++].load = l;
    }
    return l;
}

/* --- seconds -------------------------------------------------------------------------------------------------------
 */

const sh_cost_rates *sh_cost_rates_of(const sh_cost_model *m, int rank) {
    return &m->rates[m->alike ? 0 : rank];
}

/* The roofline: whichever of memory and arithmetic takes longer, and of the other what that does not hide. */
static sh_cost_part part(double bytes, double flops, double read, double fma, double both) {
    double a = bytes / read, b = flops / fma;
    return (sh_cost_part){.bytes = bytes, .flops = flops, .seconds = fmax(a, b) + both * fmin(a, b)};
}

/* Integer products do more at a time than those of f32. */
double sh_cost_products_rate(const sh_cost_rates *r, sh_mode mode) {
    double share = mode == SH_MODE_Q8 ? r->q8_fma : mode == SH_MODE_Q4 ? r->q4_fma : r->weights_fma;
    return r->fma * (share > 0 ? share : r->weights_fma * SH_COST_INT8);
}

double sh_cost_weights_read(const sh_cost_rates *r, sh_mode mode) {
    double share = mode == SH_MODE_Q8 ? r->q8_read : mode == SH_MODE_Q4 ? r->q4_read : 0;
    return r->read * (share > 0 ? share : r->weights_read);
}

double sh_cost_both(const sh_cost_rates *r, sh_mode mode) {
    return mode == SH_MODE_Q8 ? r->q8_both : mode == SH_MODE_Q4 ? r->q4_both : r->weights_both;
}

static double paid_rows(const double *few, double rows) {
    if (!(few[0] > 0) || rows >= SH_COST_MANY) return rows;
    if (rows < 1) return rows * few[0];
    int i = 0;
    while (i + 1 < SH_COST_FEW && rows >= 2 << i) i++;
    double lo = 1 << i, hi = i + 1 < SH_COST_FEW ? few[i + 1] : SH_COST_MANY;
    return few[i] + (hi - few[i]) * (rows - lo) / lo;
}

double sh_cost_paid_rows(const sh_cost_rates *r, sh_mode mode, double rows) {
    return paid_rows(mode == SH_MODE_Q8 ? r->q8_few : mode == SH_MODE_Q4 ? r->q4_few : r->weights_few, rows);
}

/* Matrices of so many elements, each read once and multiplied with so many rows. */
static sh_cost_part weights_part(const sh_cost_place *p, double elements, double rows) {
    const sh_cost_rates *r = p->rates;
    double flops = 2 * elements * sh_cost_paid_rows(r, p->mode, rows);
    sh_cost_part x = part(elements * sh_mode_weight_bytes(p->mode), flops, sh_cost_weights_read(r, p->mode),
                          sh_cost_products_rate(r, p->mode), sh_cost_both(r, p->mode));
    x.flops = 2 * elements * rows;
    return x;
}

/* Weights are read once for each part of the rows. */
static sh_cost_part product(const sh_cost_place *p, double elements, double rows, double parts) {
    return rows > 0 ? weights_part(p, elements * parts, rows / parts) : (sh_cost_part){0};
}

/* Of n columns or outputs, those of this member. */
static double slice(int n, const sh_cost_place *p) {
    return sh_cost_share(n, SH_SHARE_COLUMNS, p->member, p->shape.tp);
}

static double kv_heads_of(const sh_layer *l, const sh_cost_place *p) {
    return p->shape.tp > l->kv_heads ? 1 : (double)l->kv_heads / p->shape.tp;
}

/* Member m of a stage that is divided in positions holds whole segments: short sequences are one member's. */
static double context_share(const sh_cost_place *p, const sh_layer *l, const sh_cost_load *d) {
    double longest = d->rows > 0 ? d->pairs / d->rows : 0;
    if (p->shape.cp == 1) return 1;
    if (l->kind == SH_KV_SLIDING || longest <= 0) return 1.0 / p->shape.cp; /* its own rows */
    return fmin(1, fmax(1.0 / p->shape.cp, SH_SEGMENT_TOKENS / longest));
}

/* Rows that meet a key pay as those that meet a weight do; keys that are formed are so once for each block of rows. */
static sh_cost_part attention(const sh_cost_model *m, const sh_cost_place *p, int layer, const sh_cost_load *d) {
    const sh_config *c = m->config;
    const sh_layer *l = &c->layer[layer];
    const sh_cost_rates *r = p->rates;
    const sh_cost_attention *a = p->kv == SH_KV_Q8 && r->attention_q8.read > 0 ? &r->attention_q8 : &r->attention;
    double share = context_share(p, l, d), kv_heads = kv_heads_of(l, p), heads = (double)l->heads / p->shape.tp;
    double bytes = d->keys * (double)sh_layer_kv_bytes(&c->layer[l->kv_from], p->kv) * kv_heads / l->kv_heads * share;
    double flops = 4.0 * heads * l->head_dim * d->pairs * share;
    double rows = d->keys > 0 ? d->pairs * heads / (d->keys * kv_heads) : 0, paid = paid_rows(a->few, rows);
    if (c->layer[l->kv_from].k_eq_v) paid += a->formed * fmax(1, rows / SH_COST_MANY);
    sh_cost_part x = part(bytes, rows > 0 ? flops * paid / rows : 0, r->read * a->read, r->fma * a->fma, a->both);
    x.flops = flops;
    return x;
}

static double kv_elements(const sh_config *c, const sh_layer *l, const sh_cost_place *p) {
    return l->has_kv ? (l->k_eq_v ? 1 : 2) * kv_heads_of(l, p) * l->head_dim * c->hidden : 0;
}

static double project_elements(const sh_config *c, const sh_layer *l, const sh_cost_place *p) {
    double q = (double)l->heads * l->head_dim, h = c->hidden;
    return q / p->shape.tp * h + (p->sums ? h * q / p->shape.tp : slice(c->hidden, p) * q) + kv_elements(c, l, p);
}

/* gate, up and down of the dense branch. */
static double dense_elements(const sh_config *c, const sh_layer *l, const sh_cost_place *p) {
    double cut = slice(l->ff, p);
    return 2 * cut * c->hidden + (p->sums ? cut * c->hidden : slice(c->hidden, p) * l->ff);
}

static sh_cost_part rest(const sh_config *c, const sh_layer *l, const sh_cost_place *p, double rows) {
    double gelu = l->ff + (l->moe ? (double)c->top_k * c->expert_ff : 0) + c->ple;
    double norms = 8.0 * c->hidden + 3.0 * (l->heads + 2 * l->kv_heads) * l->head_dim +
                   (l->moe ? (double)(c->top_k + 3) * c->hidden + c->experts : 0);
    double flops = rows * (GELU_FLOPS * gelu + NORM_FLOPS * norms) / p->shape.tp;
    return (sh_cost_part){.flops = flops, .seconds = rows > 0 ? flops / p->rates->fma + p->rates->layer : 0};
}

/* --- one layer -----------------------------------------------------------------------------------------------------
 */

/* The last layer of ranks that only read prompts: nobody asks for more of it than K and V (sh_config_prefill). */
static bool only_kv(const sh_config *c, const sh_cost_place *p, int layer) {
    return p->rank >= p->shape.decode && layer == c->first_shared - 1;
}

static void keys_and_values(const sh_config *c, const sh_layer *l, const sh_cost_place *p, double rows, double parts,
                            sh_cost_layer *out) {
    double values = 2.0 * l->kv_heads * l->head_dim;
    out->project = product(p, kv_elements(c, l, p), rows, parts);
    out->rest.flops = rows * NORM_FLOPS * (c->hidden + 3 * values);
    out->rest.seconds = out->rest.flops / p->rates->fma + p->rates->layer;
    out->seconds = out->project.seconds + out->rest.seconds;
}

/* Rows that a member computes of those that its micro-batch has. */
static double own_rows(const sh_cost_place *p, double rows) {
    return rows / p->shape.cp;
}

static void experts(const sh_cost_model *m, const sh_cost_place *p, int layer, double rows, sh_cost_layer *out) {
    const sh_config *c = m->config;
    double parts = sh_cost_parts(m, p, rows);
    sh_cost_routes e = sh_cost_routes_of(m, p, layer, rows * p->shape.ep / parts);
    double elements = 3.0 * c->expert_ff * c->hidden; /* whole ones, also where heads and columns are divided */
    if (e.touched > 0) out->experts = weights_part(p, e.touched * parts * elements, e.rows / e.touched);
    out->experts_touched = e.touched;
    out->router = product(p, (double)c->hidden * c->experts, rows, parts);
    sh_cost_wire_experts(m, p, rows, &e, out);
}

/* What of the exchange the rank has something to compute for. One part: its rows travel behind its dense branch, its
 * results behind nothing. Two at a time, A and B: rows of A behind the attention of B and the dense branch of A; rows
 * of B behind dense and experts of A and dense of B; results of A behind dense and experts of B; results of B behind
 * the attention of A in the next layer. */
static void overlap(double parts, sh_cost_layer *out) {
    double rows = out->dispatch.seconds, results = out->results.seconds, dense = out->dense.seconds;
    double first = out->project.seconds + out->attention.seconds + out->router.seconds, hidden = fmin(rows, dense);
    if (parts > 1) {
        hidden = fmin(rows / 2, (first + dense) / 2) + fmin(rows / 2, dense + out->experts.seconds / 2);
        hidden += fmin(results / 2, (dense + out->experts.seconds) / 2) + fmin(results / 2, first / 2);
    }
    out->hidden = hidden;
    out->exposed = rows + results + out->gather.seconds + out->context.seconds - hidden;
}

static void layer_of(const sh_cost_model *m, const sh_cost_place *p, int layer, sh_cost_batch *b, sh_cost_layer *out) {
    const sh_config *c = m->config;
    const sh_layer *l = &c->layer[layer];
    sh_cost_load d = sh_cost_batch_load(b, layer >= c->first_shared, l->window);
    double rows = own_rows(p, d.rows), parts = sh_cost_parts(m, p, rows);
    *out = (sh_cost_layer){0};
    if (!(d.rows > 0)) return;
    if (only_kv(c, p, layer)) {
        keys_and_values(c, l, p, rows, parts, out);
        return;
    }
    out->project = product(p, project_elements(c, l, p), rows, parts);
    out->attention = attention(m, p, layer, &d);
    if (l->moe) experts(m, p, layer, rows, out);
    out->dense = product(p, dense_elements(c, l, p), rows, parts);
    if (c->ple) out->ple = product(p, 3.0 * c->ple * c->hidden, rows, parts);
    out->rest = rest(c, l, p, rows);
    if (p->shape.tp > 1) sh_cost_wire_tensor(m, p, layer, d.rows, out);
    if (p->shape.cp > 1) sh_cost_wire_context(m, p, layer, b, out);
    overlap(parts, out);
    out->seconds = out->project.seconds + out->attention.seconds + out->router.seconds + out->dense.seconds +
                   out->experts.seconds + out->ple.seconds + out->rest.seconds + out->exposed;
}

sh_status sh_cost_layer_of(const sh_cost_model *m, int rank, int layer, const sh_cost_span *span, int n_spans,
                           sh_cost_layer *out) {
    if (rank < 0 || rank >= (int)m->plan->n_rank)
        SH_FAIL(SH_EINPUT, "cost: rank %d: the plan has %zu", rank, m->plan->n_rank);
    if (layer < m->plan->rank[rank]->first || layer >= m->plan->rank[rank]->last)
        SH_FAIL(SH_EINPUT, "cost: rank %d: layer %d: it has %d to %d", rank, layer, m->plan->rank[rank]->first,
                m->plan->rank[rank]->last - 1);
    sh_cost_place p;
    SH_TRY(sh_cost_place_of(m, rank, &p));
    p.once = sh_cost_once(m, rank / p.shape.width);
    layer_of(m, &p, layer, &(sh_cost_batch){.span = span, .n_spans = n_spans}, out);
    return SH_OK;
}

/* --- one step ------------------------------------------------------------------------------------------------------
 */

static void add_part(const sh_cost_rates *r, sh_cost_rank *to, sh_cause cause, const sh_cost_part *p) {
    sh_cost_part *t = &to->part[cause];
    t->bytes += p->bytes;
    t->flops += p->flops;
    t->seconds += p->seconds;
    if (p->seconds > 0 && p->bytes * r->fma > p->flops * r->read) to->memory_bound += p->seconds;
}

static void add_wire(sh_cost_wire *to, const sh_cost_wire *w) {
    to->messages += w->messages;
    to->bytes += w->bytes;
    to->seconds += w->seconds;
}

static void add_layer(const sh_cost_place *p, const sh_cost_layer *l, sh_cost_rank *to) {
    const sh_cost_rates *r = p->rates;
    add_part(r, to, SH_CAUSE_WEIGHTS, &l->project);
    add_part(r, to, SH_CAUSE_WEIGHTS, &l->dense);
    add_part(r, to, SH_CAUSE_WEIGHTS, &l->ple);
    add_part(r, to, SH_CAUSE_ATTENTION, &l->attention);
    add_part(r, to, SH_CAUSE_EXPERTS, &l->router);
    add_part(r, to, SH_CAUSE_EXPERTS, &l->experts);
    add_part(r, to, SH_CAUSE_OTHER, &l->rest);
    add_wire(&to->dispatch, &l->dispatch);
    add_wire(&to->results, &l->results);
    add_wire(&to->gather, &l->gather);
    add_wire(&to->context, &l->context);
    to->hidden += l->hidden;
    to->exposed += l->exposed;
}

/* Whether a layer costs a rank what another one does. */
static bool same_layer(const sh_cost_model *m, const sh_cost_place *p, int a, int b) {
    const sh_config *c = m->config;
    const sh_layer *x = &c->layer[a], *y = &c->layer[b];
    bool moe = x->moe && p->shape.ep > 1;
    return !(x->moe && m->routing) && x->kind == y->kind && x->heads == y->heads && x->kv_heads == y->kv_heads &&
           x->head_dim == y->head_dim && x->window == y->window && x->has_kv == y->has_kv && x->k_eq_v == y->k_eq_v &&
           x->ff == y->ff && x->moe == y->moe && (a >= c->first_shared) == (b >= c->first_shared) &&
           only_kv(c, p, a) == only_kv(c, p, b) && (!moe || sh_cost_experts_alike(m->plan, p, a, b));
}

void sh_cost_member_layers(const sh_cost_model *m, const sh_cost_place *p, sh_cost_batch *b, double *took,
                           sh_cost_rank *out) {
    int first = m->plan->rank[p->rank]->first, last = m->plan->rank[p->rank]->last, n = 0;
    struct {
        int layer;
        sh_cost_layer cost;
    } known[SAME_AS_LAYER];
    for (int i = first; i < last; i++) {
        int k = 0;
        while (k < n && !same_layer(m, p, known[k].layer, i)) k++;
        if (k == n) {
            k = n < SAME_AS_LAYER ? n++ : n - 1;
            known[k].layer = i;
            layer_of(m, p, i, b, &known[k].cost);
        }
        add_layer(p, &known[k].cost, out);
        took[i - first] = known[k].cost.seconds;
    }
}

sh_status sh_cost_layers(const sh_cost_model *m, int from, int to, int step, const sh_cost_span *span, int n_spans,
                         double *seconds) {
    sh_cost_batch b = {.span = span, .n_spans = n_spans};
    sh_cost_rank unused = {0};
    for (int r = from; r < to; r += step) {
        sh_cost_place p;
        SH_TRY(sh_cost_place_of(m, r, &p));
        p.once = sh_cost_once(m, r / p.shape.width);
        sh_cost_member_layers(m, &p, &b, seconds + m->plan->rank[r]->first, &unused);
    }
    return SH_OK;
}

/* Head and sampler: every lane's own rows; with tp each member its part of the vocabulary; with cp member 0 alone. */
static double add_head(const sh_cost_model *m, const sh_cost_place *p, double kept, sh_cost_rank *out) {
    const sh_config *c = m->config;
    if (!(kept > 0)) return 0;
    sh_cost_wire_head(m, p, kept, &out->head);
    out->exposed += out->head.seconds;
    if (p->shape.cp > 1 && p->member > 0) return out->head.seconds;
    double vocab = sh_cost_share(c->vocab, SH_SHARE_VOCAB, p->member, p->shape.tp), passes = ceil(kept / SH_LOGIT_ROWS);
    sh_cost_part head = product(p, vocab * c->hidden, kept, passes);
    double threads = fmin(kept, fmin(fmax(1, p->rates->threads), SH_SAMPLE_THREADS)); /* a row is one thread's */
    sh_cost_part sample = {.seconds = kept * vocab * p->rates->sample / threads};
    add_part(p->rates, out, SH_CAUSE_WEIGHTS, &head);
    add_part(p->rates, out, SH_CAUSE_OTHER, &sample);
    return head.seconds + sample.seconds + out->head.seconds;
}

/* Members of a stage meet in every layer: each takes as long as the slowest. */
static sh_status stage_step(const sh_cost_model *m, int stage, int width, sh_cost_batch *b, sh_cost_rank *out) {
    int first = m->plan->rank[stage * width]->first, layers = m->plan->rank[stage * width]->last - first;
    double slowest[SH_MAX_LAYERS + 1] = {0}, took[SH_MAX_LAYERS + 1], whole = 0;
    bool last = first + layers == m->config->n_layers, once = sh_cost_once(m, stage);
    sh_cost_load d = sh_cost_batch_load(b, false, 0);
    for (int i = 0; i < width; i++) {
        sh_cost_rank *r = &out[i];
        sh_cost_place p;
        SH_TRY(sh_cost_place_of(m, stage * width + i, &p));
        p.once = once;
        *r = (sh_cost_rank){0};
        int twin = sh_cost_twin(m, &p);
        if (twin >= 0) {
            *r = out[twin];
            if (!last) sh_cost_wire_cut(m, &p, d.rows, d.kept, &r->cut);
            continue;
        }
        sh_cost_member_layers(m, &p, b, took, r);
        took[layers] = last ? add_head(m, &p, d.kept, r) : 0;
        if (!last) sh_cost_wire_cut(m, &p, d.rows, d.kept, &r->cut);
        for (int k = 0; k <= layers; k++) {
            slowest[k] = fmax(slowest[k], took[k]);
            r->seconds += took[k];
        }
    }
    for (int k = 0; k <= layers; k++) whole += slowest[k];
    for (int i = 0; i < width; i++) {
        out[i].waits = whole - out[i].seconds;
        out[i].seconds = whole;
    }
    return SH_OK;
}

sh_status sh_cost_step(const sh_cost_model *m, const sh_cost_span *span, int n_spans, sh_cost_rank *out) {
    sh_plan_shape s = sh_plan_shape_of(m->plan);
    sh_cost_batch b = {.span = span, .n_spans = n_spans};
    for (int i = 0; i < s.pp; i++) SH_TRY(stage_step(m, i, s.width, &b, out + (size_t)i * (size_t)s.width));
    return SH_OK;
}

sh_status sh_cost_head(const sh_cost_model *m, int rank, const sh_cost_span *span, int n_decode, int n_spans,
                       double mixed, double *seconds) {
    sh_cost_place p;
    sh_cost_rank unused = {0};
    SH_TRY(sh_cost_place_of(m, rank, &p));
    double decode = sh_cost_load_of(span, n_decode, false, 0).kept, all = sh_cost_load_of(span, n_spans, false, 0).kept;
    *seconds += (1 - mixed) * add_head(m, &p, decode, &unused) + mixed * add_head(m, &p, all, &unused);
    return SH_OK;
}
