/* One micro-batch of ranks that only read prompts. See prefill_cost.h; many of them are prefill_forecast.c's. */
#include "partition/prefill_cost.h"

#include <math.h>
#include "common/mem.h"
#include "model/owner.h"
#include "partition/cost_int.h"

/* docs/protocol.md, "K/V rows of prompts" and "KV shard": an envelope for each message; a head for each shard, and four
 * bytes for each page, rounded up to 64. */
enum { ENVELOPE = 64, SHARD = 96, PAGE = 4 };

bool sh_cost_stores(const sh_cost_model *m, int d, int layer) {
    const Shoal__PlanRank *r = m->plan->rank[d];
    for (int i = r->first; i < r->last; i++)
        if (m->config->layer[i].kv_from == layer) return true;
    return false;
}

/* Rows of a micro-batch that leave, of a layer of some kind, and the shards that they make. */
typedef struct leaving {
    double rows, shards, heads; /* heads: bytes beside the rows */
} leaving;

/* Of sliding layers only the rows leave that the last token of the prompt still sees: window − 1 of them, which lie in
 * the last pieces of a prompt. */
static leaving leaving_of(const sh_cost_span *span, int n_spans, int window) {
    leaving l = {0};
    for (int i = 0; i < n_spans; i++) {
        const sh_cost_span *s = &span[i];
        if (!(s->rows > 0) || !(s->seqs > 0)) continue;
        double all = s->hi + s->rows, seen = window > 0 ? fmin(all, window - 1) : all, pieces = all / s->rows;
        double touched = seen < all ? fmin(1, (seen / s->rows + 0.5) / pieces) : 1, shards = s->seqs * touched;
        double rows = s->seqs * s->rows * seen / all;
        if (!(rows > 0)) continue;
        l.rows += rows;
        l.shards += shards;
        l.heads += shards * (double)sh_mem_align(SHARD + PAGE * (size_t)ceil(rows / shards / SH_PAGE_TOKENS));
    }
    return l;
}

/* A message with the rows of one layer, to each rank that stores them. near, far: bytes within the node and out of it.
 */
static void send_layer(const sh_cost_model *m, const sh_cost_place *p, int layer, const leaving *l, double far[2],
                       sh_cost_prompt_rank *out, sh_cost_taken *taken) {
    double rows = l->rows * (double)sh_layer_kv_bytes(&m->config->layer[layer], p->kv);
    double bytes = ENVELOPE + l->heads + rows;
    for (int d = 0; d < p->shape.decode; d++) {
        if (!sh_cost_stores(m, d, layer)) continue;
        bool away = sh_cost_node_of(m, d) != sh_cost_node_of(m, p->rank);
        far[away] += bytes;
        out->rows.messages++;
        out->rows.bytes += bytes;
        out->payload += rows;
        taken[d].messages++;
        taken[d].bytes += bytes;
        taken[d].far += away ? bytes : 0;
        taken[d].seconds += bytes / SH_COST_COPY_RATE;
    }
    out->copying += bytes / SH_COST_COPY_RATE; /* once, whoever takes it */
}

/* The hidden states of all rows, to the next of these ranks; no K/V: nobody of them reads another's. */
static void cut(const sh_cost_model *m, const sh_cost_place *p, double rows, sh_cost_wire *out) {
    const sh_config *c = m->config;
    if (p->rank + 1 == (int)m->plan->n_rank) return;
    bool away = sh_cost_node_of(m, p->rank + 1) != sh_cost_node_of(m, p->rank);
    const sh_cost_link *way = away ? &m->net.between : &m->net.within;
    *out = (sh_cost_wire){.messages = 1, .bytes = rows * c->hidden * (double)sizeof(float) * (c->ple ? 2 : 1)};
    out->seconds = way->latency + out->bytes / way->bandwidth;
}

static sh_status one_rank(const sh_cost_model *m, int rank, sh_cost_batch *b, const leaving kind[SH_KV_KINDS],
                          double far[2], sh_cost_prompt_rank *out, sh_cost_taken *taken) {
    const sh_config *c = m->config;
    double took[SH_MAX_LAYERS];
    sh_cost_place p;
    SH_TRY(sh_cost_place_of(m, rank, &p));
    p.once = true;
    *out = (sh_cost_prompt_rank){0};
    sh_cost_member_layers(m, &p, b, took, &out->step);
    for (int i = m->plan->rank[rank]->first; i < m->plan->rank[rank]->last; i++) {
        out->step.seconds += took[i - m->plan->rank[rank]->first];
        send_layer(m, &p, i, &kind[c->layer[i].kind], far, out, taken);
    }
    out->far = far[1];
    cut(m, &p, sh_cost_batch_load(b, false, 0).all, &out->step.cut);
    return SH_OK;
}

/* Ranks of a node send at the same time, over one link. */
static void on_links(const sh_cost_model *m, int decode, double (*far)[2], sh_cost_prompt_rank *rank) {
    int n = (int)m->plan->n_rank - decode;
    for (int i = 0; i < n; i++) {
        double out = 0;
        for (int j = 0; j < n; j++) {
            if (sh_cost_node_of(m, decode + j) != sh_cost_node_of(m, decode + i)) continue;
            bool leaves = j + 1 < n && sh_cost_node_of(m, decode + j + 1) != sh_cost_node_of(m, decode + j);
            out += far[j][1] + (leaves ? rank[j].step.cut.bytes : 0);
        }
        sh_cost_prompt_rank *r = &rank[i];
        r->rows.seconds = fmax(out / m->net.between.bandwidth, far[i][0] / m->net.within.bandwidth);
        r->exposed = fmax(0, r->rows.seconds - r->step.seconds - r->copying);
    }
}

double sh_cost_taken_wire(const sh_cost_model *m, const sh_cost_taken *taken) {
    sh_plan_shape s = sh_plan_shape_of(m->plan);
    double most = 0, sum = 0;
    for (int d = 0; d < s.decode; d++) {
        if (d > 0 && sh_cost_node_of(m, d) != sh_cost_node_of(m, d - 1)) sum = 0;
        sum += taken[d].far;
        most =
            fmax(most, fmax(sum / m->net.between.bandwidth, (taken[d].bytes - taken[d].far) / m->net.within.bandwidth));
    }
    return most;
}

sh_status sh_cost_prompts(const sh_cost_model *m, const sh_cost_span *span, int n_spans, sh_cost_prompt_rank *rank,
                          sh_cost_taken *taken) {
    sh_plan_shape s = sh_plan_shape_of(m->plan);
    double far[SH_MAX_LAYERS][2] = {0}; /* no more such ranks than layers */
    if (s.prefill < 1 || s.prefill > SH_MAX_LAYERS)
        SH_FAIL(SH_EINPUT, "cost: plan: prefill %d: ranks that read prompts are needed: 1 to %d", s.prefill,
                SH_MAX_LAYERS);
    for (int d = 0; d < s.decode; d++) taken[d] = (sh_cost_taken){0};
    sh_cost_batch b = {.span = span, .n_spans = n_spans};
    const leaving kind[SH_KV_KINDS] = {[SH_KV_GLOBAL] = leaving_of(span, n_spans, 0),
                                       [SH_KV_SLIDING] = leaving_of(span, n_spans, sh_config_widest_window(m->config))};
    for (int i = 0; i < s.prefill; i++) SH_TRY(one_rank(m, s.decode + i, &b, kind, far[i], &rank[i], taken));
    on_links(m, s.decode, far, rank);
    return SH_OK;
}
