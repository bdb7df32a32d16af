/*
 * Bytes on the link, message by message, against the formulas of docs/planning.md and against what the cost model says
 * of the same micro-batches: whole groups on the local link, whose sends are counted on their way, in every numeric
 * mode with every KV type and layout. What the formulas leave out is headers, whose bytes are counted or bounded here
 * too. The formulas are written out again below from the model's configuration, not taken from the code under test.
 * Says nothing of time.
 */
#include "tests/cluster/tap.h"

#include <math.h>
#include "model/owner.h"
#include "partition/cost.h"

#ifdef __SANITIZE_THREAD__
enum { SOME = 1 };
#else
enum { SOME = 0 };
#endif

#ifdef __SANITIZE_ADDRESS__
enum { EVERY = 5 };
#else
enum { EVERY = 1 };
#endif

enum { TAGS = SH_LINK_TAGS, MAX_STEPS = 2048, MAX_SPANS = 8 * MAX_STEPS, TENSOR_HEAD = 32, CONTEXT_HEAD = 64 };

#define BY_CHANCE  0.03 /* which experts are chosen */
#define SHARED_OUT 0.04 /* who computes which rows, beside who stores their K/V */

/* A micro-batch as the sender's message says. */
typedef struct seen {
    int to, rows, kept;
    int span0, n_spans;
    size_t header, header_most, block;
} seen;

typedef struct counter { /* one per rank, written by its thread alone */
    uint64_t bytes[TAGS], messages[TAGS], all, link_says;
    uint64_t head, heads;            /* of tensor parallelism: what is exchanged for the sampler, and its messages */
    uint64_t rows, choices, results; /* of expert parallelism: what its messages say they hold */
    uint64_t row_bytes, result_bytes;
    uint64_t payload, shards; /* K/V rows of prompts */
    seen step[MAX_STEPS];
    sh_span span[MAX_SPANS];
    int n_steps, n_spans;
} counter;

static counter counters[FAKE_RANKS];

/* What a descriptor may take, for what it holds: docs/protocol.md. */
static size_t header_most(const sh_batch *b) {
    size_t n = 192 + 4 * (size_t)b->n_rows + 8 * (size_t)b->n_drops;
    for (int i = 0; i < b->n_spans; i++)
        for (int k = 0; k < SH_KV_KINDS; k++) n += 48 + 4 * (size_t)b->spans[i].n_pages[k];
    for (int i = 0; i < b->n_starts; i++) n += 256 + 4 * (size_t)b->starts[i].n_tokens;
    return n;
}

static void note_batch(counter *c, int rank, int to, const void *p, size_t n) {
    size_t header = 0;
    const sh_batch *b = tap_batch(rank, p, n, &header);
    if (c->n_steps == MAX_STEPS || c->n_spans + b->n_spans > MAX_SPANS) {
        CHECK(false, "more than %d micro-batches or %d spans", MAX_STEPS, MAX_SPANS);
        return;
    }
    c->step[c->n_steps++] = (seen){.to = to,
                                   .rows = b->n_rows,
                                   .kept = b->n_kept,
                                   .span0 = c->n_spans,
                                   .n_spans = b->n_spans,
                                   .header = header,
                                   .header_most = header_most(b),
                                   .block = n - header};
    for (int i = 0; i < b->n_spans; i++) c->span[c->n_spans++] = b->spans[i];
}

/* docs/protocol.md: rows for experts, behind a head of 32 bytes and 4 per choice; or results, one per choice. */
static void note_experts(counter *c, const uint8_t *p, size_t n) {
    uint16_t kind;
    int32_t held[2];
    memcpy(&kind, p + 4, sizeof kind);
    memcpy(held, p + 24, sizeof held);
    if (kind == 0) {
        c->rows += (uint64_t)held[0];
        c->choices += (uint64_t)held[1];
        c->row_bytes += n - align64(32 + 4 * (size_t)held[1]);
    } else {
        c->results += (uint64_t)held[1];
        c->result_bytes += n - 64;
    }
}

static void note(const sh_link *l, int to, int tag, const void *p, size_t n) {
    counter *c = &counters[l->rank];
    c->bytes[tag % TAGS] += n;
    c->messages[tag % TAGS]++;
    c->all += n;
    c->link_says = l->sent_bytes;
    if (tag == SH_TAG_BATCH) note_batch(c, l->rank, to, p, n);
    if (tag == SH_TAG_TENSOR && memcmp(p, "VOC1", 4) == 0) c->head += n, c->heads++;
    if (tag % TAGS == SH_TAG_EXPERTS) note_experts(c, p, n);
    if (tag == SH_TAG_SHARD) tap_shards(p, n, &c->shards, &c->payload);
}

static void count_on(sh_link *l) {
    counters[l->rank] = (counter){0};
    tap_on(l, note);
}

/* ---- groups --------------------------------------------------------------------------------------------------------
 */

typedef struct layout {
    int stages, ep, tp, cp;
    bool sum;
    int prefill;
} layout;

typedef struct load { /* what the requests amount to */
    int64_t rows;     /* prompt tokens, and tokens generated but the last */
    int64_t kept;     /* rows that were sampled */
} load;

/* A group and all that is known of it. */
typedef struct scene {
    char what[128];
    sh_config c;
    layout y;
    const char *mode, *kv;
    int width;
    fake f;
    load l;          /* of the stages that decode */
    int64_t prompts; /* rows that ranks of their own read */
} scene;

/* Requests of several lengths that all run to their max_tokens. */
static load add_requests(scene *s) {
    load l = {0};
    for (int i = 0; i < 12; i++) {
        int32_t ids[1000];
        int n = 20 + 13 * i, out = 6 + i;
        if (s->y.cp > 1 && i % 5 == 4) n *= 5; /* several blocks, of one segment and of two */
        for (int j = 0; j < n; j++) ids[j] = 200 + (7 * j + 31 * i) % 290;
        fake_work *w = fake_add(&s->f, ids, n, out);
        w->sampling.ignore_eos = 1;
        w->sampling.logprobs = s->y.tp > 1 ? 3 : -1;
        int read = s->y.prefill > 0 ? n - 1 : 0;
        l.rows += n - read + out - 1;
        l.kept += out;
        s->prompts += read;
    }
    return l;
}

static bool run_group(scene *s, const char *name, const char *mode, const char *kv, layout y) {
    char model[600];
    int cut[FAKE_RANKS + 1];
    *s = (scene){.y = y, .mode = mode, .kv = kv, .width = y.ep * y.tp * y.cp};
    snprintf(s->what, sizeof s->what, "%s, %s, KV %s, %d stages, ep %d, tp %d%s, cp %d, prefill %d", name, mode, kv,
             y.stages, y.ep, y.tp, y.sum ? " by sums" : "", y.cp, y.prefill);
    snprintf(model, sizeof model, "%s/text/models/%s", SH_TEST_DATA, name);
    MUST(sh_config_load(model, &s->c));
    for (int i = 0; i <= y.stages; i++) cut[i] = s->c.n_layers * i / y.stages;
    fake *f = &s->f;
    fake_open(f, model, y.stages, cut, mode, kv);
    f->plan.max_context = 1024;
    f->on_link = count_on;
    f->prefill = y.prefill;
    fake_divide(f, y.ep, y.tp, y.cp);
    f->plan.tp_sum = f->plan.has_tp_sum = y.sum;
    s->l = add_requests(s);
    fake_start_threads(f);
    bool ok = fake_run(f, 120);
    CHECK(ok, "%s: did not answer: %s", s->what, f->fault);
    fake_leave(f);
    fake_join(f);
    for (int i = 0; i < f->n_work; i++)
        CHECK(f->work[i].n == f->work[i].sampling.max_tokens, "%s: request %d: %d tokens", s->what, i, f->work[i].n);
    for (int r = 0; r < f->n; r++)
        CHECK(counters[r].all == counters[r].link_says, "%s: rank %d: the link counted %llu bytes of %llu", s->what, r,
              (unsigned long long)counters[r].link_says, (unsigned long long)counters[r].all);
    return ok;
}

static void near(const scene *s, const char *what, double got, double want, double share) {
    CHECK(fabs(got - want) <= share * want, "%s: %s: %.0f, the formula says %.0f", s->what, what, got, want);
}

/* What was sent is what the formula says, to the byte. */
static void same(const scene *s, int rank, const char *what, uint64_t got, uint64_t want) {
    CHECK(got == want, "%s: rank %d: %s: %llu bytes, the formula says %llu", s->what, rank, what,
          (unsigned long long)got, (unsigned long long)want);
}

/* ---- the cost model ------------------------------------------------------------------------------------------------
 */

static void cost_of_spans(const scene *s, const sh_cost_span *span, int n, sh_cost_rank *cost) {
    static const sh_cost_rates rates = {
        .read = 1e9, .fma = 1e9, .weights_read = 1, .weights_fma = 1, .attention = {.read = 1, .fma = 1}};
    static const sh_cost_link link = {0, 1e9};
    sh_cost_model m = {.config = &s->c, .plan = &s->f.plan, .rates = &rates, .alike = true, .net = {link, link, 1}};
    MUST(sh_cost_step(&m, span, n, cost));
}

/* What it says of one micro-batch, all ranks. */
static void cost_of(const scene *s, const counter *t, const seen *x, sh_cost_rank *cost) {
    sh_cost_span span[64];
    CHECK(x->n_spans <= 64, "%s: %d spans", s->what, x->n_spans);
    for (int i = 0; i < x->n_spans && i < 64; i++) {
        const sh_span *p = &t->span[x->span0 + i];
        span[i] = (sh_cost_span){.seqs = 1, .rows = p->rows, .kept = p->keep, .lo = p->pos, .hi = p->pos};
        span[i].tokens = s->y.cp > 1 ? 2 * s->y.cp * (SH_SEGMENT_TOKENS << p->level) : 0; /* the longest of its level */
    }
    cost_of_spans(s, span, x->n_spans, cost);
}

/* ---- formulas ------------------------------------------------------------------------------------------------------
 */

/* Bytes of one vector of a KV head: q8 has a scale of four bytes for each 64 codes or part of them. */
static size_t vec_bytes(const char *kv, int head_dim) {
    if (strcmp(kv, "q8") == 0) return (size_t)(head_dim + (head_dim + 63) / 64 * 4);
    return (size_t)head_dim * (strcmp(kv, "f32") == 0 ? 4 : 2);
}

/* K/V bytes of a row: K, and V unless it is the same. */
static size_t kv_bytes(const sh_layer *y, const char *kv) {
    return (size_t)((y->k_eq_v ? 1 : 2) * y->kv_heads) * vec_bytes(kv, y->head_dim);
}

static bool crosses(const sh_config *c, int layer, int cut) {
    for (int i = cut; i < c->n_layers; i++)
        if (c->layer[i].kv_from == layer) return true;
    return false;
}

/* Of a micro-batch those rows that member m of cp computes, their kept ones, and rows whose global K/V it stores. */
static void rows_of(const scene *s, const counter *t, const seen *x, int m, int *own, int *kept, int *stored) {
    int members = s->y.cp, row = 0;
    *own = *kept = *stored = 0;
    for (int i = 0; i < x->n_spans; i++) {
        const sh_span *p = &t->span[x->span0 + i];
        for (int k = 0; k < p->rows; k++, row++) {
            bool mine = row >= x->rows * m / members && row < x->rows * (m + 1) / members;
            int block = (p->pos + k) / (SH_SEGMENT_TOKENS << p->level);
            *own += mine;
            *kept += mine && k >= p->rows - p->keep;
            *stored += (int)(((uint64_t)block + p->seq) % (uint64_t)members) == m;
        }
    }
}

/* docs/planning.md: the block of a cut. Hidden states in f32, with the embeddings where there are per-layer ones;
 * behind the last producer only rows that are sampled; K/V of producers before the cut that layers behind it read, of
 * the member's heads (tp), of the rows that it stores (cp). */
static size_t cut_formula(const scene *s, const counter *t, const seen *x, int cut, int member) {
    const sh_config *c = &s->c;
    int own, kept, stored;
    rows_of(s, t, x, s->y.cp > 1 ? member : 0, &own, &kept, &stored);
    size_t bytes = (size_t)(cut >= c->first_shared ? kept : own) * (size_t)c->hidden * 4 * (c->ple ? 2 : 1);
    for (int j = 0; j < cut; j++) {
        const sh_layer *y = &c->layer[j];
        size_t heads = (size_t)(y->kv_heads > s->y.tp ? y->kv_heads / s->y.tp : 1), all = (size_t)y->kv_heads;
        size_t rows = (size_t)(y->kind == SH_KV_GLOBAL ? stored : x->rows);
        if (crosses(c, j, cut)) bytes += rows * kv_bytes(y, s->kv) / all * (s->y.tp > 1 ? heads : all);
    }
    return bytes;
}

/* Between stages that read prompts hidden states alone: no K/V of one is read in another. */
static size_t prefill_formula(const scene *s, const seen *x) {
    return (size_t)(x->rows * s->c.hidden) * 4 * (s->c.ple ? 2 : 1);
}

/* What a rank sent to the next stage, and what the cost model says of it. */
typedef struct passed {
    double bytes, model;
    int64_t rows, kept;
} passed;

static void check_rank_blocks(const scene *s, int r, bool prompts, passed *sum) {
    const counter *t = &counters[r];
    int cut = s->f.plan.rank[r]->last, next = r + (prompts ? 1 : s->width);
    sh_cost_rank cost[FAKE_RANKS];
    for (int i = 0; i < t->n_steps; i++) {
        const seen *x = &t->step[i];
        CHECK(x->header <= x->header_most, "%s: a header of %zu bytes, %zu at most", s->what, x->header,
              x->header_most);
        if (x->to != next) { /* a descriptor for another member, or for who reads prompts */
            CHECK(r == 0 && x->block == 0, "%s: rank %d sent a block of %zu bytes to %d", s->what, r, x->block, x->to);
            continue;
        }
        size_t want = prompts ? prefill_formula(s, x) : cut_formula(s, t, x, cut, r % s->width);
        CHECK(x->block == want, "%s, cut %d: a block of %zu bytes for %d rows, %d kept: %zu", s->what, cut, x->block,
              x->rows, x->kept, want);
        sum->bytes += (double)x->block;
        sum->rows += x->rows;
        sum->kept += x->kept;
        if (prompts || x->rows == 0) continue;
        cost_of(s, t, x, cost);
        sum->model += cost[r].cut.bytes;
    }
}

static void check_blocks(const scene *s) {
    int decode = s->y.stages * s->width;
    for (int stage = 0; stage < s->y.stages - 1; stage++) {
        passed sum = {0};
        int64_t times = s->y.tp * s->y.cp; /* members that know of each row */
        for (int m = 0; m < s->width; m++) check_rank_blocks(s, stage * s->width + m, false, &sum);
        CHECK(sum.rows == times * s->l.rows && sum.kept == times * s->l.kept,
              "%s, stage %d: %lld rows passed, %lld kept: %lld and %lld, %lld times", s->what, stage,
              (long long)sum.rows, (long long)sum.kept, (long long)s->l.rows, (long long)s->l.kept, (long long)times);
        CHECK(sum.bytes > 0, "%s, stage %d: nothing passed", s->what, stage);
        near(s, "cuts, by the cost model", sum.bytes, sum.model, 1e-9);
    }
    for (int r = decode; r < s->f.n - 1; r++) {
        passed sum = {0};
        check_rank_blocks(s, r, true, &sum);
        CHECK(sum.rows == s->prompts, "%s: rank %d passed %lld rows of prompts of %lld", s->what, r,
              (long long)sum.rows, (long long)s->prompts);
    }
}

/* Answers: a step's number and count, and what the sampler says of each token. */
static void check_answers(const scene *s) {
    int decode = s->y.stages * s->width;
    for (int r = decode - s->width; r < decode && s->y.stages > 1; r++) {
        const counter *t = &counters[r];
        uint64_t each = 64 + (s->y.tp > 1 ? 8 * 3 : 0); /* alternatives */
        CHECK(t->bytes[SH_TAG_TOKENS] <= 64 * t->messages[SH_TAG_TOKENS] + each * (uint64_t)s->l.kept,
              "%s: %llu bytes of answers for %lld tokens", s->what, (unsigned long long)t->bytes[SH_TAG_TOKENS],
              (long long)s->l.kept);
        CHECK(t->bytes[SH_TAG_BATCH] == 0, "%s: the last stage sent micro-batches", s->what);
    }
}

/* ---- heads and columns ---------------------------------------------------------------------------------------------
 */

/* Of n columns in units, those of member m of w. */
static int64_t columns(int n, int unit, int m, int w) {
    int units = (n + unit - 1) / unit, lo = units * m / w * unit, hi = units * (m + 1) / w * unit;
    return (hi < n ? hi : n) - (lo < n ? lo : n);
}

/* docs/planning.md: what a member sends for `rows` rows of a layer, f32: its heads, its columns of o, of the activated
 * feed-forward and of down, to all others; or, where sums are split, whole rows of both to the one other member, or to
 * each of several others its columns of the partial sums and then the own columns of the sum. */
static int64_t gather_formula(const scene *s, const sh_layer *y, int m, int64_t rows) {
    const sh_config *c = &s->c;
    int w = s->y.tp;
    int64_t own = columns(c->hidden, 32, m, w), others = w - 1;
    if (s->y.sum && w == 2) return 4 * rows * 2 * c->hidden;
    if (s->y.sum) return 4 * rows * 2 * (c->hidden - own + others * own);
    return 4 * rows * others * ((int64_t)y->heads / w * y->head_dim + 2 * own + columns(y->ff, 32, m, w));
}

/* For the sampler, with alternatives asked for: of each kept row 64 of its ids with values, 8 bytes each, and (max,
 * sum) of each own segment of 1,024 ids, to member 0. */
static int64_t candidates_formula(const scene *s, int m) {
    int64_t own = columns(s->c.vocab, 1024, m, s->y.tp);
    return m > 0 ? s->l.kept * ((own < 64 ? own : 64) * 8 + (own + 1023) / 1024 * 8) : 0;
}

/* Headers: of a message 32 bytes; of a kept row 24 to member 0, and 8 from it to each other member. */
static void check_tensor(const scene *s) {
    sh_cost_rank cost[FAKE_RANKS];
    sh_cost_span all = {.seqs = 1, .rows = (double)s->l.rows, .kept = (double)s->l.kept};
    cost_of_spans(s, &all, 1, cost);
    for (int r = 0; r < s->f.n; r++) {
        const counter *t = &counters[r];
        int m = r % s->y.tp;
        int64_t gathered = 0;
        for (int i = s->f.plan.rank[r]->first; i < s->f.plan.rank[r]->last; i++)
            gathered += gather_formula(s, &s->c.layer[i], m, i >= s->c.first_shared ? s->l.kept : s->l.rows);
        uint64_t messages = t->messages[SH_TAG_TENSOR] - t->heads;
        same(s, r, "gathers", t->bytes[SH_TAG_TENSOR] - t->head - TENSOR_HEAD * messages, (uint64_t)gathered);
        uint64_t row = m > 0 ? 24 : 8 * ((uint64_t)s->y.tp - 1), head = (uint64_t)candidates_formula(s, m);
        bool last = r >= s->f.n - s->y.tp;
        same(s, r, "for the sampler", t->head, last ? head + row * (uint64_t)s->l.kept + TENSOR_HEAD * t->heads : 0);
        near(s, "gathers, by the cost model", cost[r].gather.bytes, (double)gathered, 1e-9);
        near(s, "for the sampler, by the cost model", cost[r].head.bytes, last ? (double)head : 0, 1e-9);
    }
}

/* ---- experts -------------------------------------------------------------------------------------------------------
 */

/* None of n experts is among the k that a row chooses of all, all being chosen alike. */
static double missed(const sh_config *c, size_t n) {
    double p = 1;
    for (int i = 0; i < c->top_k; i++) p *= fmax(0, c->experts - (double)n - i) / (c->experts - i);
    return p;
}

static const Shoal__PlanExperts *experts_of(const fake *f, int rank, int layer) {
    for (size_t i = 0; i < f->plan.rank[rank]->n_experts; i++)
        if (f->plan.rank[rank]->experts[i]->layer == layer) return f->plan.rank[rank]->experts[i];
    return NULL;
}

/* docs/planning.md: a row on its way to experts. f32 in exact mode, bf16 in bf16; codes in q8 and q4, and of each group
 * of 64 or 32 values, the last one filled up, a scale and a sum. */
static uint64_t expert_row_formula(const scene *s) {
    int group = strcmp(s->mode, "q8") == 0 ? 64 : 32, groups = (s->c.hidden + group - 1) / group;
    if (strcmp(s->mode, "exact") == 0) return 4 * (uint64_t)s->c.hidden;
    if (strcmp(s->mode, "bf16") == 0) return 2 * (uint64_t)s->c.hidden;
    return (uint64_t)groups * (uint64_t)(group + 8);
}

/* And a result. */
static uint64_t expert_result_formula(const scene *s) {
    return (uint64_t)s->c.hidden * (strcmp(s->mode, "exact") == 0 ? 4 : 2);
}

/* docs/planning.md: a row goes once to each other member that holds one of its experts, and comes back as one row per
 * choice. Which are chosen is chance, here: the modelled kernels' router has no favourites. */
static void check_experts(const scene *s) {
    const sh_config *c = &s->c;
    double rows = 0, choices = 0;
    for (int r = 0; r < s->f.n; r++)
        for (int i = s->f.plan.rank[r]->first; i < s->f.plan.rank[r]->last; i++) {
            const Shoal__PlanExperts *e = experts_of(&s->f, r, i);
            CHECK(e && e->n_expert > 0, "%s: rank %d has no experts of layer %d", s->what, r, i);
            if (!e) continue;
            double from_others = (double)s->l.rows * (s->y.ep - 1) / s->y.ep;
            rows += from_others * (1 - missed(c, e->n_expert));
            choices += from_others * c->top_k * (double)e->n_expert / c->experts;
        }
    uint64_t sent = 0, asked = 0, results = 0;
    for (int r = 0; r < s->f.n; r++) {
        const counter *t = &counters[r];
        same(s, r, "rows to experts", t->row_bytes, t->rows * expert_row_formula(s));
        same(s, r, "results of experts", t->result_bytes, t->results * expert_result_formula(s));
        sent += t->rows;
        asked += t->choices;
        results += t->results;
    }
    CHECK(asked == results, "%s: %llu choices sent, %llu results", s->what, (unsigned long long)asked,
          (unsigned long long)results);
    near(s, "rows to experts", (double)sent, rows, BY_CHANCE);
    near(s, "results of experts", (double)results, choices, BY_CHANCE);
}

/* The cost model's bytes of all ranks together; each lane has its share of the rows. */
static void check_expert_cost(const scene *s) {
    sh_cost_rank cost[FAKE_RANKS];
    sh_cost_span lane = {.seqs = 1, .rows = (double)s->l.rows / s->y.ep, .kept = (double)s->l.kept / s->y.ep};
    double want[2] = {0}, got[2] = {0};
    cost_of_spans(s, &lane, 1, cost);
    for (int r = 0; r < s->f.n; r++) {
        want[0] += cost[r].dispatch.bytes;
        want[1] += cost[r].results.bytes;
        got[0] += (double)counters[r].row_bytes;
        got[1] += (double)counters[r].result_bytes;
    }
    near(s, "bytes of rows, by the cost model", got[0], want[0], BY_CHANCE);
    near(s, "bytes of results, by the cost model", got[1], want[1], BY_CHANCE);
}

/* ---- positions -----------------------------------------------------------------------------------------------------
 */

/* What member `asker` asks of member `store` in a layer, in rows. */
typedef struct asked {
    uint64_t kv, queries, partials;
} asked;

static asked asked_of(const scene *s, const counter *t, const seen *x, int layer, int asker, int store) {
    const sh_layer *l = &s->c.layer[layer];
    int members = s->y.cp, row = 0;
    asked a = {0};
    for (int i = 0; i < x->n_spans; i++) {
        const sh_span *p = &t->span[x->span0 + i];
        for (int k = 0; k < p->rows; k++, row++) {
            bool own = row >= x->rows * asker / members && row < x->rows * (asker + 1) / members;
            if (!own || (layer >= s->c.first_shared && k < p->rows - p->keep)) continue;
            int block = (p->pos + k) / (SH_SEGMENT_TOKENS << p->level), there = 0;
            for (int b = 0; b <= block; b++) there += ((uint64_t)b + p->seq) % (uint64_t)members == (uint64_t)store;
            a.kv += l->kind == SH_KV_SLIDING || ((uint64_t)block + p->seq) % (uint64_t)members == (uint64_t)store;
            a.queries += there > 0;
            a.partials += (uint64_t)there;
        }
    }
    return a;
}

/* docs/planning.md: K/V of a message, filled up to a multiple of 64 bytes, and queries; then partials. With the head of
 * each message, adds what the asker sends and what comes back. */
static void layer_formula(const scene *s, int layer, const asked *a, uint64_t *to, uint64_t *back) {
    const sh_layer *l = &s->c.layer[layer];
    uint64_t width = (uint64_t)(l->heads * l->head_dim) * 4, partial = (uint64_t)(l->heads * (l->head_dim + 2)) * 4;
    uint64_t rows = l->has_kv ? align64(a->kv * kv_bytes(l, s->kv)) : 0, partials = 0;
    if (l->kind == SH_KV_GLOBAL) {
        rows += a->queries * width;
        partials = a->partials * partial;
    }
    *to += rows ? rows + CONTEXT_HEAD : 0;
    *back += partials ? partials + CONTEXT_HEAD : 0;
}

/* Adds what every rank sends for a micro-batch, heads included, to sent [ranks]. */
static void context_formula(const scene *s, const counter *t, const seen *x, uint64_t *sent) {
    int members = s->y.cp, last = s->f.n - members, own, kept, stored;
    for (int r = 0; r < s->f.n; r++) {
        int first = r - r % members, asker = r % members;
        for (int i = s->f.plan.rank[r]->first; i < s->f.plan.rank[r]->last; i++)
            for (int store = 0; store < members; store++) {
                if (store == asker) continue;
                asked a = asked_of(s, t, x, i, asker, store);
                layer_formula(s, i, &a, &sent[r], &sent[first + store]);
            }
        rows_of(s, t, x, asker, &own, &kept, &stored);
        if (r > last && kept > 0) sent[r] += (uint64_t)(kept * s->c.hidden) * 4 + CONTEXT_HEAD;
    }
}

/* To the byte; and the cost model, whose members are all alike and whose rows may be fractions, on all ranks together.
 */
static void check_positions(const scene *s) {
    const counter *t = &counters[0];
    uint64_t want[FAKE_RANKS] = {0};
    double model = 0, got = 0;
    sh_cost_rank cost[FAKE_RANKS];
    for (int i = 0; i < t->n_steps; i++) {
        if (t->step[i].to != 1) continue; /* each micro-batch once */
        context_formula(s, t, &t->step[i], want);
        cost_of(s, t, &t->step[i], cost);
        for (int r = 0; r < s->f.n; r++) model += cost[r].context.bytes + cost[r].head.bytes;
    }
    for (int r = 0; r < s->f.n; r++) {
        same(s, r, "positions", counters[r].bytes[SH_TAG_CONTEXT], want[r]);
        got += (double)(counters[r].bytes[SH_TAG_CONTEXT] - CONTEXT_HEAD * counters[r].messages[SH_TAG_CONTEXT]);
    }
    near(s, "positions, by the cost model", got, model, SHARED_OUT);
}

/* ---- prompts on ranks of their own ---------------------------------------------------------------------------------
 */

/* docs/planning.md: of each prompt all rows but the last, of each layer that makes K/V to each stage that has it or
 * reads it; of sliding layers those that the last row sees. */
static uint64_t rows_formula(const scene *s, int layer) {
    const sh_layer *l = &s->c.layer[layer];
    uint64_t rows = 0, holders = 0;
    int window = 0;
    for (int i = 0; i < s->c.n_layers; i++)
        if (s->c.layer[i].window > window) window = s->c.layer[i].window;
    for (int i = 0; i < s->f.n_work; i++) {
        int n = s->f.work[i].n_prompt - 1;
        rows += (uint64_t)(l->kind == SH_KV_SLIDING && n > window - 1 ? window - 1 : n);
    }
    for (int d = 0; d < s->y.stages; d++) {
        bool reads = false;
        for (int i = s->f.plan.rank[d]->first; i < s->f.plan.rank[d]->last; i++)
            reads = reads || s->c.layer[i].kv_from == layer;
        holders += reads;
    }
    return rows * holders * kv_bytes(l, s->kv);
}

/* Headers: of a message 64 bytes, of a shard 96 and 4 for each page, of both up to a multiple of 64; here a shard has
 * three pages at most. */
static void check_prompts(const scene *s) {
    for (int r = 0; r < s->f.n; r++) {
        const counter *t = &counters[r];
        uint64_t want = 0, bytes = t->bytes[SH_TAG_SHARD], heads = 64 * t->messages[SH_TAG_SHARD] + 192 * t->shards;
        for (int i = s->f.plan.rank[r]->first; r >= s->y.stages && i < s->f.plan.rank[r]->last; i++)
            want += rows_formula(s, i);
        same(s, r, "K/V of prompts", t->payload, want);
        CHECK(bytes >= want && bytes <= want + heads,
              "%s: rank %d: %llu bytes for %llu of K/V, %llu of headers at most", s->what, r, (unsigned long long)bytes,
              (unsigned long long)want, (unsigned long long)heads);
    }
}

/* ---- all of them ---------------------------------------------------------------------------------------------------
 */

static void test(const char *name, const char *mode, const char *kv, layout y) {
    static scene s;
    layout all = {y.stages, y.ep ? y.ep : 1, y.tp ? y.tp : 1, y.cp ? y.cp : 1, y.sum, y.prefill};
    if (y.ep > 1) setenv("SHOAL_ISA", "model:1T,1T", 1);
    if (run_group(&s, name, mode, kv, all)) {
        check_blocks(&s);
        check_answers(&s);
        if (y.ep > 1) check_experts(&s);
        if (y.ep > 1) check_expert_cost(&s);
        if (y.tp > 1) check_tensor(&s);
        if (y.cp > 1) check_positions(&s);
        if (y.prefill > 0) check_prompts(&s);
    }
    unsetenv("SHOAL_ISA");
    fake_close(&s.f);
}

/* Threads meet alike in all groups of a kind: the thread sanitizer sees the largest of each. */
static void test_some(void) {
    test("e2b-like", "exact", "f32", (layout){.stages = 3});
    test("31b-like", "bf16", "bf16", (layout){.stages = 2, .tp = 2});
    test("31b-like", "bf16", "bf16", (layout){.stages = 1, .tp = 4, .sum = true});
    test("26b-a4b-like", "bf16", "bf16", (layout){.stages = 2, .ep = 2});
    test("26b-a4b-like", "bf16", "q8", (layout){.stages = 2, .cp = 2});
    test("e2b-like", "bf16", "q8", (layout){.stages = 2, .prefill = 2});
}

/* Every mode with every KV type in every layout: rows, sums and K/V are what travels. */
static void test_types(void) {
    static const char *const modes[] = {"exact", "bf16", "q8", "q4"}, *const types[] = {"f32", "bf16", "q8"};
    for (int i = 0; i < 12; i += EVERY) { /* at least every KV type once, and three modes */
        const char *mode = modes[i / 3], *kv = types[i % 3];
        test("e2b-like", mode, kv, (layout){.stages = 3});
        test("26b-a4b-like", mode, kv, (layout){.stages = 2, .ep = 2});
        test("e2b-like", mode, kv, (layout){.stages = 2, .tp = 2});
        test("e2b-like", mode, kv, (layout){.stages = 2, .cp = 2});
        test("e2b-like", mode, kv, (layout){.stages = 2, .prefill = 2});
    }
}

/* Other shapes, and how many share a stage. */
static void test_shapes(void) {
    for (int stages = 2; stages <= 4; stages += 2) test("e2b-like", "bf16", "q8", (layout){.stages = stages});
    for (int stages = 2; stages <= 4; stages++) {
        test("31b-like", "bf16", "bf16", (layout){.stages = stages});
        test("26b-a4b-like", "bf16", "bf16", (layout){.stages = stages});
    }
    test("31b-like", "bf16", "bf16", (layout){.stages = 1, .tp = 2});
    test("31b-like", "bf16", "bf16", (layout){.stages = 1, .tp = 4});
    test("31b-like", "bf16", "bf16", (layout){.stages = 2, .tp = 2});
    test("e4b-like", "bf16", "q8", (layout){.stages = 2, .tp = 2});
    test("26b-a4b-like", "bf16", "bf16", (layout){.stages = 1, .tp = 2});
    test("31b-like", "bf16", "bf16", (layout){.stages = 1, .tp = 2, .sum = true});
    test("31b-like", "bf16", "bf16", (layout){.stages = 1, .tp = 4, .sum = true});
    test("26b-a4b-like", "bf16", "bf16", (layout){.stages = 1, .ep = 2});
    test("26b-a4b-like", "exact", "f32", (layout){.stages = 1, .ep = 3});
    test("26b-a4b-like", "bf16", "bf16", (layout){.stages = 1, .ep = 5});
    static const char *const shapes[] = {"31b-like", "26b-a4b-like", "e4b-like", "e2b-like"};
    for (int i = 0; i < 4; i++) {
        test(shapes[i], "bf16", "q8", (layout){.stages = 1, .cp = 2});
        test(shapes[i], "bf16", "q8", (layout){.stages = 1, .cp = 3});
        test(shapes[i], "bf16", i % 2 ? "f32" : "bf16", (layout){.stages = 2, .cp = 4});
        test(shapes[i], "bf16", "q8", (layout){.stages = 1, .prefill = 1});
        test(shapes[i], "bf16", "q8", (layout){.stages = 3, .prefill = 3});
    }
}

int main(void) {
    if (SOME) {
        test_some();
    } else {
        test_types();
        test_shapes();
    }
    tap_close();
    printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
