/* Bytes on links, and which experts are reached: the formulas of docs/planning.md, headers aside. See cost.h. */
#include <math.h>
#include "partition/cost.h"
#include "model/owner.h"
#include "partition/cost_int.h"

/* Which other members are on the rank's node, and how many ranks of the group are there. */
static void neighbours(const sh_cost_model *m, int rank, sh_cost_place *p) {
    int per = sh_cost_ranks_per_node(m), ranks = (int)m->plan->n_rank;
    int width = p->shape.width, begin = rank / width * width, node = rank / per;
    int lo = node * per, hi = lo + per < ranks ? lo + per : ranks;
    p->sharers = hi - lo;
    lo = lo > begin ? lo : begin;
    hi = hi < begin + width ? hi : begin + width;
    p->near = hi - lo - 1;
    p->far = width - 1 - p->near;
}

sh_status sh_cost_place_of(const sh_cost_model *m, int rank, sh_cost_place *out) {
    sh_cost_place p = {.rank = rank, .shape = sh_plan_shape_of(m->plan), .rates = sh_cost_rates_of(m, rank)};
    SH_TRY(sh_kv_type_parse(m->plan->kv, &p.kv));
    SH_TRY(sh_mode_parse(m->plan->mode, &p.mode));
    p.member = rank % p.shape.width;
    p.sums = m->plan->tp_sum && p.shape.tp > 1;
    neighbours(m, rank, &p);
    *out = p;
    return SH_OK;
}

int sh_cost_share(int n, int unit, int m, int w) {
    sh_range r = sh_share_range_of((sh_share){.parts = w}, m, n, unit);
    return r.hi - r.lo;
}

static int share(int n, const sh_cost_place *p, int member) {
    return sh_cost_share(n, SH_SHARE_COLUMNS, member, p->shape.tp);
}

double sh_cost_parts(const sh_cost_model *m, const sh_cost_place *p, double rows) {
    int lanes = p->shape.ep;
    if (lanes == 1) return fmax(1, ceil(rows / SH_PART_ROWS));
    int most = (m->plan->max_seqs + lanes - 1) / lanes + (m->plan->chunk + lanes - 1) / lanes;
    double part = sh_expert_part_rows(most, lanes);
    double split = m->plan->split_rows > 0 ? m->plan->split_rows : SH_COST_SPLIT_ROWS;
    return rows <= part && rows < split ? 1 : 2 * fmax(1, ceil(rows / (2 * part)));
}

/* --- seconds on the wire -------------------------------------------------------------------------------------------
 */

/* `bytes` to the other members of the stage, even shares, in `rounds` that wait for each other. Ranks of a node send at
 * the same time. */
static sh_cost_wire to_members(const sh_cost_model *m, const sh_cost_place *p, double bytes, double rounds) {
    int others = p->near + p->far;
    sh_cost_wire w = {.messages = rounds * others, .bytes = bytes};
    if (others == 0 || !(bytes > 0)) return (sh_cost_wire){0};
    const sh_cost_link *in = &m->net.within, *out = &m->net.between;
    double near = p->near ? rounds * in->latency + bytes * p->near / others / in->bandwidth : 0;
    double far = p->far ? rounds * out->latency + bytes * p->far / others * p->sharers / out->bandwidth : 0;
    w.seconds = fmax(near, far);
    return w;
}

static void add(sh_cost_wire *to, sh_cost_wire w) {
    to->messages += w.messages;
    to->bytes += w.bytes;
    to->seconds += w.seconds;
}

/* --- experts -------------------------------------------------------------------------------------------------------
 */

/* Lists are one per layer that has experts: where all layers have, the place is known. */
static const Shoal__PlanExperts *experts_of(const Shoal__Plan *plan, int rank, int layer) {
    const Shoal__PlanRank *r = plan->rank[rank];
    size_t guess = (size_t)(layer - r->first);
    if (guess < r->n_experts && r->experts[guess]->layer == layer) return r->experts[guess];
    for (size_t i = 0; i < r->n_experts; i++)
        if (r->experts[i]->layer == layer) return r->experts[i];
    return NULL;
}

static int count_of(const Shoal__Plan *plan, int rank, int layer) {
    const Shoal__PlanExperts *e = experts_of(plan, rank, layer);
    return e ? (int)e->n_expert : 0;
}

bool sh_cost_once(const sh_cost_model *m, int stage) {
    sh_plan_shape s = sh_plan_shape_of(m->plan);
    const Shoal__PlanRank *r = m->plan->rank[stage * s.width];
    for (int layer = r->first; layer < r->last && s.ep > 1; layer++) {
        int n = 0;
        for (int i = 0; i < s.width; i++) n += count_of(m->plan, stage * s.width + i, layer);
        if (n > m->config->experts) return false;
    }
    return true;
}

bool sh_cost_experts_alike(const Shoal__Plan *plan, const sh_cost_place *p, int a, int b) {
    if (!p->once) return false;
    for (int i = 0; i < p->shape.width; i++)
        if (count_of(plan, p->rank - p->member + i, a) != count_of(plan, p->rank - p->member + i, b)) return false;
    return true;
}

/* Of a layer's choices those of one expert, times k: rows that choose it, of one. */
static double chance(const sh_cost_model *m, int layer, int expert, double all) {
    const sh_config *c = m->config;
    if (!(all > 0)) return (double)c->top_k / c->experts;
    return fmin(1, (double)sh_routing_of(m->routing, layer)[expert] * c->top_k / all);
}

static double choices(const sh_cost_model *m, int layer) {
    double n = 0;
    for (int e = 0; m->routing && e < m->config->experts; e++) n += (double)sh_routing_of(m->routing, layer)[e];
    return n;
}

/* C(E − n, k) / C(E, k): no expert of n is among the k of a row. */
static double missed(const sh_config *c, double n) {
    double p = 1;
    for (int i = 0; i < c->top_k; i++) p *= fmax(0, c->experts - n - i) / (c->experts - i);
    return p;
}

/* Every expert on one rank of the stage, all chosen alike. */
static sh_cost_routes even_routes(const sh_cost_model *m, const sh_cost_place *p, int layer, double rows) {
    const sh_config *c = m->config;
    double k = c->top_k, own = p->shape.ep > 1 ? count_of(m->plan, p->rank, layer) : c->experts;
    sh_cost_routes r = {.owned = own / c->experts};
    r.rows = rows * k * r.owned;
    r.touched = own * (1 - pow(1 - k / c->experts, rows));
    for (int i = 0; i < p->shape.width && p->shape.ep > 1; i++)
        if (i != p->member) r.reach += 1 - missed(c, count_of(m->plan, p->rank - p->member + i, layer));
    return r;
}

/* Measured routing, or experts on several ranks, whose rows are then shared evenly among the copies. */
static sh_cost_routes uneven_routes(const sh_cost_model *m, const sh_cost_place *p, int layer, double rows) {
    const sh_config *c = m->config;
    int copies[SH_MAX_EXPERTS];
    double all = choices(m, layer);
    sh_cost_routes r = {0};
    for (int e = 0; e < c->experts; e++) copies[e] = p->shape.ep > 1 ? 0 : 1;
    for (int i = 0; i < p->shape.width && p->shape.ep > 1; i++) {
        const Shoal__PlanExperts *x = experts_of(m->plan, p->rank - p->member + i, layer);
        for (size_t j = 0; x && j < x->n_expert; j++) copies[x->expert[j]]++;
    }
    for (int i = 0; i < p->shape.width; i++) {
        const Shoal__PlanExperts *x = experts_of(m->plan, p->rank - p->member + i, layer);
        double none = 1;
        size_t n = p->shape.ep > 1 ? x ? x->n_expert : 0 : (size_t)c->experts;
        for (size_t j = 0; j < n; j++) {
            int e = p->shape.ep > 1 ? x->expert[j] : (int)j;
            double q = chance(m, layer, e, all) / (copies[e] ? copies[e] : 1);
            none *= 1 - q;
            if (i != p->member) continue;
            r.owned += q / c->top_k;
            r.touched += 1 - pow(1 - q, rows);
        }
        if (i != p->member && p->shape.ep > 1) r.reach += 1 - none;
    }
    r.rows = rows * c->top_k * r.owned;
    return r;
}

sh_cost_routes sh_cost_routes_of(const sh_cost_model *m, const sh_cost_place *p, int layer, double rows) {
    return p->once && !m->routing ? even_routes(m, p, layer, rows) : uneven_routes(m, p, layer, rows);
}

void sh_cost_wire_experts(const sh_cost_model *m, const sh_cost_place *p, double rows, const sh_cost_routes *e,
                          sh_cost_layer *out) {
    if (p->shape.ep == 1) return;
    double row = (double)sh_expert_row_bytes(m->config, p->mode), parts = sh_cost_parts(m, p, rows);
    double result = (double)sh_expert_result_bytes(m->config, p->mode);
    out->dispatch = to_members(m, p, rows * e->reach * row, parts);
    out->results = to_members(m, p, rows * (p->shape.ep - 1) * m->config->top_k * e->owned * result, parts);
}

/* --- heads and columns ---------------------------------------------------------------------------------------------
 */

/* Outputs are gathered before and after the products that mix heads or columns; partial sums go to who adds their
 * columns, and the sums to all. Experts are whole on every member. */
void sh_cost_wire_tensor(const sh_cost_model *m, const sh_cost_place *p, int layer, double rows, sh_cost_layer *out) {
    const sh_config *c = m->config;
    const sh_layer *l = &c->layer[layer];
    double others = p->shape.tp - 1, parts = sh_cost_parts(m, p, rows), hidden = share(c->hidden, p, p->member);
    double row = rows * sizeof(float), heads = (double)l->heads / p->shape.tp * l->head_dim;
    if (p->sums) {
        double sum = c->hidden - hidden + others * hidden;
        add(&out->gather, to_members(m, p, 2 * row * sum, 4 * parts));
        return;
    }
    double columns = heads + share(l->ff, p, p->member) + 2 * hidden;
    add(&out->gather, to_members(m, p, row * others * columns, 4 * parts));
}

/* To member 0, for the sampler. tp: of each kept row id and value of the best 64, and (max, sum) of each segment of
 * 1,024 entries; a row that asks for more sends more. cp: the final hidden states of own kept rows. */
void sh_cost_wire_head(const sh_cost_model *m, const sh_cost_place *p, double kept, sh_cost_wire *out) {
    double vocab = sh_cost_share(m->config->vocab, SH_SHARE_VOCAB, p->member, p->shape.tp);
    double bytes = p->shape.tp > 1 ? kept * (fmin(64, vocab) * 8 + ceil(vocab / SH_SHARE_VOCAB) * 8)
                                   : kept / p->shape.cp * m->config->hidden * (double)sizeof(float);
    if (p->member == 0 || p->shape.width == 1 || p->shape.ep > 1) return;
    const sh_cost_link *way = p->far ? &m->net.between : &m->net.within;
    *out = (sh_cost_wire){.messages = 1, .bytes = bytes};
    out->seconds = way->latency + out->bytes * (p->far ? p->sharers : 1) / way->bandwidth;
}

/* --- positions -----------------------------------------------------------------------------------------------------
 */

/* Σ over the positions below n of the blocks that a row there sees, counted up to `most`. */
static double blocks_below(double n, double size, double most) {
    double whole = fmin(floor(n / size), most);
    return size * whole * (whole + 1) / 2 + (n - whole * size) * fmin(whole + 1, most);
}

/* Blocks of a global layer that the rows see, and members that store some of what a row sees, both added up. */
static void blocks_seen(const sh_cost_span *span, int n_spans, bool kept_only, int members, double *blocks,
                        double *owners) {
    *blocks = *owners = 0;
    for (int i = 0; i < n_spans; i++) {
        const sh_cost_span *s = &span[i];
        double rows = kept_only ? s->kept : s->rows, whole = fmax(s->tokens, s->hi + s->rows), places;
        if (!(rows > 0) || !(s->seqs > 0)) continue;
        double size = (double)((int64_t)SH_SEGMENT_TOKENS << sh_owner_level((int)ceil(whole), members));
        for (int k = 0; k < (places = s->hi > s->lo ? SH_COST_POSITIONS : 1); k++) {
            double end = s->lo + (s->hi - s->lo) * (k + 0.5) / places + s->rows, n = s->seqs / places;
            *blocks += n * (blocks_below(end, size, INFINITY) - blocks_below(end - rows, size, INFINITY));
            *owners += n * (blocks_below(end, size, members) - blocks_below(end - rows, size, members));
        }
    }
}

/* K/V rows of a message, which are filled up to a multiple of 64 bytes; between two numbers of rows what lies between.
 */
static double filled(double rows, double bytes) {
    double whole = floor(rows), lo = ceil(whole * bytes / 64) * 64, hi = ceil((whole + 1) * bytes / 64) * 64;
    return lo + (rows - whole) * (hi - lo);
}

/* Every member computes its share of the rows. Sliding layers: each K/V row to all. Global layers: each K/V row to its
 * owner, each query to the owners of what it sees, and from these a partial result (o, m, l) of each head and block. */
void sh_cost_wire_context(const sh_cost_model *m, const sh_cost_place *p, int layer, sh_cost_batch *b,
                          sh_cost_layer *out) {
    const sh_layer *l = &m->config->layer[layer];
    bool kept_only = layer >= m->config->first_shared;
    sh_cost_load d = sh_cost_batch_load(b, kept_only, 0);
    double own = d.rows / p->shape.cp, others = p->shape.cp - 1, elsewhere = others / p->shape.cp / p->shape.cp;
    double kv = l->has_kv ? (double)sh_layer_kv_bytes(l, p->kv) : 0;
    if (l->kind == SH_KV_SLIDING) {
        add(&out->context, to_members(m, p, others * filled(own, kv), 1));
        return;
    }
    if (!b->seen[kept_only].known)
        blocks_seen(b->span, b->n_spans, kept_only, p->shape.cp, &b->seen[kept_only].blocks,
                    &b->seen[kept_only].owners);
    b->seen[kept_only].known = true;
    double blocks = b->seen[kept_only].blocks, owners = b->seen[kept_only].owners;
    double q = (double)l->heads * l->head_dim * sizeof(float);
    double partial = (double)l->heads * (l->head_dim + 2) * sizeof(float);
    add(&out->context, to_members(m, p, others * filled(own / p->shape.cp, kv) + elsewhere * owners * q, 1));
    add(&out->context, to_members(m, p, elsewhere * blocks * partial, 1));
}

/* --- cuts ----------------------------------------------------------------------------------------------------------
 */

double sh_cost_cut_bytes(const sh_config *c, sh_kv_type kv, int cut, double rows, double kept) {
    if (cut <= 0) return 0;
    double hidden = c->hidden * (double)sizeof(float);
    if (cut >= c->n_layers) return kept * hidden;
    double n = (cut >= c->first_shared ? kept : rows) * hidden * (c->ple ? 2 : 1);
    for (int i = 0; i < cut; i++)
        if (sh_config_kv_crosses(c, i, cut)) n += rows * (double)sh_layer_kv_bytes(&c->layer[i], kv);
    return n;
}

/* The block of one member: with cp its own rows, K/V of global layers as far as it stores them, those of sliding layers
 * whole; with tp all rows, and K/V of the heads that it has. */
static double block_bytes(const sh_cost_model *m, const sh_cost_place *p, int cut, double rows, double kept) {
    const sh_config *c = m->config;
    double own = p->shape.cp, hidden = c->hidden * (double)sizeof(float) * (c->ple ? 2 : 1);
    double n = (cut >= c->first_shared ? kept : rows) / own * hidden;
    for (int i = 0; i < cut; i++) {
        const sh_layer *l = &c->layer[i];
        double heads = p->shape.tp > l->kv_heads ? 1 : (double)l->kv_heads / p->shape.tp;
        if (!sh_config_kv_crosses(c, i, cut)) continue;
        n += rows / (l->kind == SH_KV_GLOBAL ? own : 1) * (double)sh_layer_kv_bytes(l, p->kv) * heads / l->kv_heads;
    }
    return n;
}

void sh_cost_wire_cut(const sh_cost_model *m, const sh_cost_place *p, double rows, double kept, sh_cost_wire *out) {
    int per = sh_cost_ranks_per_node(m), width = p->shape.width, node = p->rank / per;
    int leave = 0, end = (node + 1) * per; /* ranks that only read prompts are behind these */
    for (int r = node * per; r < end && r + width < p->shape.decode; r++) leave += r + width >= end;
    bool far = p->rank + width >= end;
    const sh_cost_link *way = far ? &m->net.between : &m->net.within;
    *out = (sh_cost_wire){.messages = 1, .bytes = block_bytes(m, p, m->plan->rank[p->rank]->last, rows, kept)};
    out->seconds = way->latency + out->bytes * (far ? leave : 1) / way->bandwidth;
}

/* --- members that are alike ----------------------------------------------------------------------------------------
 */

static bool same_shares(const sh_config *c, const sh_cost_place *p, int other) {
    int w = p->shape.tp;
    bool same =
        share(c->hidden, p, p->member) == share(c->hidden, p, other) &&
        sh_cost_share(c->vocab, SH_SHARE_VOCAB, p->member, w) == sh_cost_share(c->vocab, SH_SHARE_VOCAB, other, w);
    for (int i = 0; i < c->n_layers && same; i++)
        same = share(c->layer[i].ff, p, p->member) == share(c->layer[i].ff, p, other);
    return same;
}

static bool same_experts(const sh_cost_model *m, const sh_cost_place *p, int other) {
    for (int i = m->plan->rank[p->rank]->first; i < m->plan->rank[p->rank]->last && p->shape.ep > 1; i++)
        if (count_of(m->plan, p->rank, i) != count_of(m->plan, other, i)) return false;
    return true;
}

int sh_cost_twin(const sh_cost_model *m, const sh_cost_place *p) {
    if (!m->alike || m->routing || !p->once) return -1;
    for (int i = p->shape.ep > 1 ? 0 : 1; i < p->member; i++) { /* member 0 has the head and the sampler to itself */
        int rank = p->rank - p->member + i;
        sh_cost_place q = *p;
        neighbours(m, rank, &q);
        if (q.near == p->near && q.sharers == p->sharers && (p->shape.ep > 1 || same_shares(m->config, p, i)) &&
            same_experts(m, p, rank))
            return i;
    }
    return -1;
}
