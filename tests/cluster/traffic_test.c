/*
 * Bytes on the link, message by message, against the formulas of docs/planning.md: whole groups on the local link,
 * whose sends are counted on their way. What the formulas leave out is headers: descriptors and answers, which are
 * bounded here too. The formulas are written out again below from the model's configuration, not taken from the code
 * under test. Says nothing of time.
 */
#include "tests/cluster/fake.h"

#include <math.h>
#include "model/batch.h"
#include "partition/cost.h"

#ifdef __SANITIZE_THREAD__
enum { SOME = 1 };
#else
enum { SOME = 0 };
#endif

enum { TAGS = SH_LINK_TAGS, MAX_STEPS = 2048, HEADER = 64 };

/* A micro-batch as the sender's message says. */
typedef struct seen {
    int rows, kept;
    size_t header, header_most, block;
} seen;

typedef struct counter { /* one per rank, written by its thread alone */
    sh_status (*send)(sh_link *l, int to, int tag, const void *p, size_t n, int *req);
    uint64_t bytes[TAGS], messages[TAGS], all, link_says;
    uint64_t head, heads;            /* of tensor parallelism: what is exchanged for the sampler, and its messages */
    uint64_t rows, choices, results; /* of expert parallelism: what its messages say they hold */
    uint64_t row_bytes, result_bytes;
    sh_batch batch;
    seen step[MAX_STEPS];
    int n_steps;
} counter;

static counter counters[FAKE_RANKS];
static sh_link_ops counting;

/* What a descriptor may take, for what it holds: docs/protocol.md. */
static size_t header_most(const sh_batch *b) {
    size_t n = 192 + 4 * (size_t)b->n_rows + 8 * (size_t)b->n_drops;
    for (int i = 0; i < b->n_spans; i++)
        for (int k = 0; k < SH_KV_KINDS; k++) n += 48 + 4 * (size_t)b->spans[i].n_pages[k];
    for (int i = 0; i < b->n_starts; i++) n += 256 + 4 * (size_t)b->starts[i].n_tokens;
    return n;
}

static void note_batch(counter *c, const void *p, size_t n) {
    size_t used = 0;
    MUST(sh_batch_decode(&c->batch, p, n, &used));
    size_t header = (used + 63) / 64 * 64; /* a block begins at a multiple of 64 */
    if (header > n) header = n;            /* a descriptor alone is not padded */
    if (c->n_steps == MAX_STEPS) return;
    c->step[c->n_steps++] = (seen){.rows = c->batch.n_rows,
                                   .kept = c->batch.n_kept,
                                   .header = header,
                                   .header_most = header_most(&c->batch),
                                   .block = n - header};
}

static size_t align64(size_t n) {
    return (n + 63) / 64 * 64;
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

static sh_status count_send(sh_link *l, int to, int tag, const void *p, size_t n, int *req) {
    counter *c = &counters[l->rank];
    SH_TRY(c->send(l, to, tag, p, n, req));
    c->bytes[tag % TAGS] += n;
    c->messages[tag % TAGS]++;
    c->all += n;
    c->link_says = l->sent_bytes;
    if (tag == SH_TAG_BATCH) note_batch(c, p, n);
    if (tag == SH_TAG_TENSOR && ((const int32_t *)p)[1] < 0) c->head += n, c->heads++; /* of no layer */
    if (tag % TAGS == SH_TAG_EXPERTS) note_experts(c, p, n);
    return SH_OK;
}

static void count_on(sh_link *l) {
    counter *c = &counters[l->rank];
    sh_batch batch = c->batch;
    *c = (counter){.send = l->ops->send, .batch = batch};
    if (!batch.arena.base) MUST(sh_batch_create((size_t)4 << 20, &c->batch));
    if (l->rank == 0) counting = *l->ops; /* the same for all */
    counting.send = count_send;
    l->ops = &counting;
}

/* ---- groups --------------------------------------------------------------------------------------------------------
 */

typedef struct layout {
    int stages, ep, tp, cp;
    bool sum;
} layout;

typedef struct load { /* what the requests amount to */
    int64_t rows;     /* prompt tokens, and tokens generated but the last */
    int64_t kept;     /* rows that were sampled */
} load;

/* Requests of several lengths that all run to their max_tokens. */
static load add_requests(fake *f) {
    load l = {0};
    for (int i = 0; i < 12; i++) {
        int32_t ids[200];
        int n = 20 + 13 * i, out = 6 + i;
        for (int j = 0; j < n; j++) ids[j] = 200 + (7 * j + 31 * i) % 290;
        fake_work *w = fake_add(f, ids, n, out);
        w->sampling.ignore_eos = 1;
        w->sampling.logprobs = -1;
        l.rows += n + out - 1;
        l.kept += out;
    }
    return l;
}

static int width_of(const layout *y) {
    return y->ep * y->tp * y->cp;
}

static bool run_group(const char *name, const sh_config *c, const layout *y, const char *mode, const char *kv, fake *f,
                      load *l) {
    char model[600];
    int cut[FAKE_RANKS + 1];
    snprintf(model, sizeof model, "%s/text/models/%s", SH_TEST_DATA, name);
    for (int i = 0; i <= y->stages; i++) cut[i] = c->n_layers * i / y->stages;
    fake_open(f, model, y->stages, cut, mode, kv);
    f->on_link = count_on;
    fake_divide(f, y->ep, y->tp, y->cp);
    f->plan.tp_sum = f->plan.has_tp_sum = y->sum;
    *l = add_requests(f);
    fake_start_threads(f);
    bool ok = fake_run(f, 120);
    CHECK(ok, "%s on %d stages did not answer: %s", name, y->stages, f->fault);
    fake_leave(f);
    fake_join(f);
    for (int i = 0; i < f->n_work; i++)
        CHECK(f->work[i].n == f->work[i].sampling.max_tokens, "request %d: %d tokens", i, f->work[i].n);
    for (int r = 0; r < f->n; r++)
        CHECK(counters[r].all == counters[r].link_says, "rank %d: the link counted %llu bytes of %llu", r,
              (unsigned long long)counters[r].link_says, (unsigned long long)counters[r].all);
    return ok;
}

/* ---- formulas ------------------------------------------------------------------------------------------------------
 */

/* Bytes of one vector of a KV head: q8 has a scale of four bytes for each 64 codes or part of them. */
static size_t vec_bytes(const char *kv, int head_dim) {
    if (strcmp(kv, "q8") == 0) return (size_t)(head_dim + (head_dim + 63) / 64 * 4);
    return (size_t)head_dim * (strcmp(kv, "f32") == 0 ? 4 : 2);
}

/* docs/planning.md: the block of a cut. Hidden states in f32, with the embeddings where there are per-layer ones;
 * behind the last producer only rows that are sampled; K/V of producers before the cut that layers behind it read. */
static size_t cut_formula(const sh_config *c, int cut, const char *kv, int rows, int kept) {
    size_t here = (size_t)(cut >= c->first_shared ? kept : rows);
    size_t bytes = here * (size_t)c->hidden * 4 * (c->ple ? 2 : 1);
    for (int j = 0; j < cut; j++) {
        bool read = false;
        for (int i = cut; i < c->n_layers; i++) read = read || c->layer[i].kv_from == j;
        const sh_layer *y = &c->layer[j];
        if (read) bytes += (size_t)rows * (y->k_eq_v ? 1 : 2) * (size_t)y->kv_heads * vec_bytes(kv, y->head_dim);
    }
    return bytes;
}

static void check_blocks(const char *name, const sh_config *c, const fake *f, const layout *y, const char *kv, load l) {
    int width = width_of(y);
    for (int r = 0; r < (y->stages - 1) * width; r++) {
        const counter *t = &counters[r];
        int cut = f->plan.rank[r]->last, rows = 0, kept = 0;
        size_t blocks = 0, handouts = 0;
        for (int i = 0; i < t->n_steps; i++) {
            const seen *s = &t->step[i];
            CHECK(s->header <= s->header_most, "%s: a header of %zu bytes, %zu at most", name, s->header,
                  s->header_most);
            handouts += s->block == 0;
            if (s->block == 0 && s->rows > 0) continue; /* rank 0: a descriptor for another member */
            size_t want = cut_formula(c, cut, kv, s->rows, s->kept);
            CHECK(s->block == want, "%s, cut %d: a block of %zu bytes for %d rows, %d kept: %zu", name, cut, s->block,
                  s->rows, s->kept, want);
            rows += s->rows;
            kept += s->kept;
            blocks += s->block;
        }
        CHECK(width > 1 || (handouts == 0 && rows == l.rows && kept == l.kept),
              "%s, cut %d: %d rows of %lld passed, %d kept of %lld", name, cut, rows, (long long)l.rows, kept,
              (long long)l.kept);
        CHECK(blocks > 0, "%s, cut %d: nothing passed", name, cut);
    }
}

/* Answers: a step's number and count, and what the sampler says of each token. */
static void check_answers(const char *name, const fake *f, const layout *y, load l) {
    int width = width_of(y);
    for (int r = f->n - width; r < f->n && y->stages > 1; r++) {
        const counter *t = &counters[r];
        CHECK(t->bytes[SH_TAG_TOKENS] <= 64 * t->messages[SH_TAG_TOKENS] + 64 * (uint64_t)l.kept,
              "%s: %llu bytes of answers for %lld tokens", name, (unsigned long long)t->bytes[SH_TAG_TOKENS],
              (long long)l.kept);
        CHECK(t->bytes[SH_TAG_BATCH] == 0, "%s: the last stage sent micro-batches", name);
    }
}

static void test_pipeline(const char *name, const char *mode, const char *kv) {
    static sh_config c;
    char model[600];
    snprintf(model, sizeof model, "%s/text/models/%s", SH_TEST_DATA, name);
    MUST(sh_config_load(model, &c));
    for (int stages = 2; stages <= 4; stages++) {
        layout y = {.stages = stages, .ep = 1, .tp = 1, .cp = 1};
        fake f;
        load l;
        if (run_group(name, &c, &y, mode, kv, &f, &l)) {
            check_blocks(name, &c, &f, &y, kv, l);
            check_answers(name, &f, &y, l);
        }
        fake_close(&f);
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
static int64_t gather_formula(const sh_config *c, const sh_layer *y, int m, int w, bool sum, int64_t rows) {
    int64_t own = columns(c->hidden, 32, m, w), others = w - 1;
    if (sum && w == 2) return 4 * rows * 2 * c->hidden;
    if (sum) return 4 * rows * 2 * (c->hidden - own + others * own);
    return 4 * rows * others * ((int64_t)y->heads / w * y->head_dim + 2 * own + columns(y->ff, 32, m, w));
}

static void check_gathers(const char *name, const sh_config *c, const fake *f, const layout *y, load l) {
    for (int r = 0; r < f->n; r++) {
        const counter *t = &counters[r];
        int64_t want = 0, got = (int64_t)(t->bytes[SH_TAG_TENSOR] - t->head);
        int64_t messages = (int64_t)(t->messages[SH_TAG_TENSOR] - t->heads);
        for (int i = f->plan.rank[r]->first; i < f->plan.rank[r]->last; i++)
            want += gather_formula(c, &c->layer[i], r % y->tp, y->tp, y->sum, i >= c->first_shared ? l.kept : l.rows);
        CHECK(got >= want && got <= want + HEADER * messages,
              "%s, %d stages, tp %d%s: rank %d gathered %lld bytes in %lld messages: %lld and headers", name, y->stages,
              y->tp, y->sum ? " by sums" : "", r, (long long)got, (long long)messages, (long long)want);
        CHECK((t->heads > 0) == (r >= f->n - y->tp && t->head > 0), "%s: rank %d sent %llu bytes for the sampler", name,
              r, (unsigned long long)t->head);
    }
}

/* The cost model counts what was sent. */
static void check_cost(const char *name, const sh_config *c, const fake *f, const layout *y, load l) {
    static const sh_cost_rates rates = {1e9, 1e9, 1, 1, 1, 1, 0, 0};
    static const sh_cost_link link = {0, 1e9};
    sh_cost_model m = {.config = c, .plan = &f->plan, .rates = &rates, .alike = true, .net = {link, link, 1}};
    sh_cost_rank cost[FAKE_RANKS];
    sh_cost_span all = {.seqs = 1, .rows = (double)l.rows, .kept = (double)l.kept};
    MUST(sh_cost_step(&m, &all, 1, cost));
    for (int r = 0; r < f->n; r++) {
        const counter *t = &counters[r];
        double want = cost[r].gather.bytes, got = (double)(t->bytes[SH_TAG_TENSOR] - t->head);
        CHECK(got >= want - 1 && got <= want + HEADER * (double)(t->messages[SH_TAG_TENSOR] - t->heads),
              "%s, %d stages, tp %d: rank %d gathered %.0f bytes, the cost model counts %.0f", name, y->stages, y->tp,
              r, got, want);
    }
}

static void test_tensor(const char *name, int stages, int tp, bool sum) {
    static sh_config c;
    char model[600];
    snprintf(model, sizeof model, "%s/text/models/%s", SH_TEST_DATA, name);
    MUST(sh_config_load(model, &c));
    layout y = {.stages = stages, .ep = 1, .tp = tp, .cp = 1, .sum = sum};
    fake f;
    load l;
    if (run_group(name, &c, &y, "bf16", "bf16", &f, &l)) {
        check_blocks(name, &c, &f, &y, "bf16", l);
        check_gathers(name, &c, &f, &y, l);
        check_cost(name, &c, &f, &y, l);
    }
    fake_close(&f);
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

static void within(const char *name, const layout *y, const char *what, double got, double want, double share) {
    CHECK(fabs(got - want) <= share * want, "%s, %d stages, ep %d: %s: %.0f, the formula says %.0f", name, y->stages,
          y->ep, what, got, want);
}

/* docs/planning.md: a row goes once to each other member that holds one of its experts, and comes back as one row per
 * choice. Which are chosen is chance, here: the modelled kernels' router has no favourites. */
static void check_experts(const char *name, const sh_config *c, const fake *f, const layout *y, int value, load l) {
    double rows = 0, choices = 0;
    for (int r = 0; r < f->n; r++)
        for (int i = f->plan.rank[r]->first; i < f->plan.rank[r]->last; i++) {
            const Shoal__PlanExperts *e = experts_of(f, r, i);
            CHECK(e && e->n_expert > 0, "%s: rank %d has no experts of layer %d", name, r, i);
            if (!e) continue;
            double from_others = (double)l.rows * (y->ep - 1) / y->ep;
            rows += from_others * (1 - missed(c, e->n_expert));
            choices += from_others * c->top_k * (double)e->n_expert / c->experts;
        }
    counter sum = {0};
    for (int r = 0; r < f->n; r++) {
        const counter *t = &counters[r];
        CHECK(t->row_bytes == t->rows * (uint64_t)(c->hidden * value), "%s: rank %d: %llu bytes of %llu rows", name, r,
              (unsigned long long)t->row_bytes, (unsigned long long)t->rows);
        CHECK(t->result_bytes == t->results * (uint64_t)(c->hidden * value), "%s: rank %d: %llu bytes of %llu results",
              name, r, (unsigned long long)t->result_bytes, (unsigned long long)t->results);
        sum.rows += t->rows;
        sum.choices += t->choices;
        sum.results += t->results;
    }
    CHECK(sum.choices == sum.results, "%s: %llu choices sent, %llu results", name, (unsigned long long)sum.choices,
          (unsigned long long)sum.results);
    within(name, y, "rows to experts", (double)sum.rows, rows, 0.03);
    within(name, y, "results of experts", (double)sum.results, choices, 0.03);
}

/* The cost model's bytes of all ranks together; each lane has its share of the rows. */
static void check_expert_cost(const char *name, const sh_config *c, const fake *f, const layout *y, load l) {
    static const sh_cost_rates rates = {1e9, 1e9, 1, 1, 1, 1, 0, 0};
    static const sh_cost_link link = {0, 1e9};
    sh_cost_model m = {.config = c, .plan = &f->plan, .rates = &rates, .alike = true, .net = {link, link, 1}};
    sh_cost_rank cost[FAKE_RANKS];
    sh_cost_span lane = {.seqs = 1, .rows = (double)l.rows / y->ep, .kept = (double)l.kept / y->ep};
    double want[2] = {0}, got[2] = {0};
    MUST(sh_cost_step(&m, &lane, 1, cost));
    for (int r = 0; r < f->n; r++) {
        want[0] += cost[r].dispatch.bytes;
        want[1] += cost[r].results.bytes;
        got[0] += (double)counters[r].row_bytes;
        got[1] += (double)counters[r].result_bytes;
    }
    within(name, y, "bytes of rows, by the cost model", got[0], want[0], 0.03);
    within(name, y, "bytes of results, by the cost model", got[1], want[1], 0.03);
}

static void test_experts(const char *name, int stages, int ep, const char *mode, int value) {
    static sh_config c;
    char model[600];
    snprintf(model, sizeof model, "%s/text/models/%s", SH_TEST_DATA, name);
    MUST(sh_config_load(model, &c));
    layout y = {.stages = stages, .ep = ep, .tp = 1, .cp = 1};
    fake f;
    load l;
    setenv("SHOAL_ISA", "model:1T,1T", 1);
    if (run_group(name, &c, &y, mode, value == 4 ? "f32" : "bf16", &f, &l)) {
        check_blocks(name, &c, &f, &y, value == 4 ? "f32" : "bf16", l);
        check_experts(name, &c, &f, &y, value, l);
        check_expert_cost(name, &c, &f, &y, l);
    }
    unsetenv("SHOAL_ISA");
    fake_close(&f);
}

/* ---- positions -----------------------------------------------------------------------------------------------------
 */

/* docs/planning.md, all members together: sliding layers send every K/V row to all others. Row by row, and for global
 * layers, tests/cluster/context_test.c counts; here the cost model's averages are compared with what was sent. */
static void check_positions(const char *name, const sh_config *c, const fake *f, const layout *y, const char *kv,
                            load l) {
    static const sh_cost_rates rates = {1e9, 1e9, 1, 1, 1, 1, 0, 0};
    static const sh_cost_link link = {0, 1e9};
    sh_cost_model m = {.config = c, .plan = &f->plan, .rates = &rates, .alike = true, .net = {link, link, 1}};
    sh_cost_rank cost[FAKE_RANKS];
    sh_cost_span span[FAKE_WORK];
    double got = 0, want = 0, sliding = 0, headers = 0;
    for (int i = 0; i < f->n_work; i++)
        span[i] =
            (sh_cost_span){.seqs = 1, .rows = f->work[i].n_prompt + f->work[i].n - 1, .kept = (double)f->work[i].n};
    MUST(sh_cost_step(&m, span, f->n_work, cost));
    for (int r = 0; r < f->n; r++) {
        want += cost[r].context.bytes;
        got += (double)counters[r].bytes[SH_TAG_CONTEXT];
        headers += 64 * (double)counters[r].messages[SH_TAG_CONTEXT];
    }
    for (int i = 0; i < c->n_layers; i++) {
        const sh_layer *x = &c->layer[i];
        if (x->window > 0 && x->has_kv)
            sliding +=
                (double)l.rows * (y->cp - 1) * (x->k_eq_v ? 1 : 2) * x->kv_heads * (double)vec_bytes(kv, x->head_dim);
    }
    CHECK(got > sliding, "%s, %d stages, cp %d: %.0f bytes, sliding layers alone are %.0f", name, y->stages, y->cp, got,
          sliding);
    CHECK(fabs(got - headers - want) <= 0.1 * want,
          "%s, %d stages, cp %d: %.0f bytes, %.0f of headers: the cost model %.0f", name, y->stages, y->cp, got,
          headers, want);
}

static void test_positions(const char *name, int stages, int cp, const char *kv) {
    static sh_config c;
    char model[600];
    snprintf(model, sizeof model, "%s/text/models/%s", SH_TEST_DATA, name);
    MUST(sh_config_load(model, &c));
    layout y = {.stages = stages, .ep = 1, .tp = 1, .cp = cp};
    fake f;
    load l;
    if (run_group(name, &c, &y, "bf16", kv, &f, &l)) check_positions(name, &c, &f, &y, kv, l);
    fake_close(&f);
}

/* Threads meet alike in all groups of a kind: the thread sanitizer sees the largest of each. */
static void test_some(void) {
    test_pipeline("e2b-like", "exact", "f32");
    test_tensor("31b-like", 2, 2, false);
    test_tensor("31b-like", 1, 4, true);
    test_experts("26b-a4b-like", 2, 2, "bf16", 2);
    test_positions("26b-a4b-like", 2, 2, "bf16");
}

static void test_all(void) {
    test_pipeline("e2b-like", "exact", "f32");
    test_pipeline("e2b-like", "bf16", "bf16");
    test_pipeline("e2b-like", "bf16", "q8");
    test_pipeline("31b-like", "bf16", "bf16");
    test_pipeline("26b-a4b-like", "bf16", "bf16");
    test_tensor("31b-like", 1, 2, false);
    test_tensor("31b-like", 1, 4, false);
    test_tensor("31b-like", 2, 2, false);
    test_tensor("e2b-like", 2, 2, false);
    test_tensor("26b-a4b-like", 1, 2, false);
    test_tensor("31b-like", 1, 2, true);
    test_tensor("31b-like", 1, 4, true);
    test_experts("26b-a4b-like", 1, 2, "bf16", 2);
    test_experts("26b-a4b-like", 1, 3, "exact", 4);
    test_experts("26b-a4b-like", 1, 5, "bf16", 2);
    test_experts("26b-a4b-like", 2, 2, "bf16", 2);
    test_positions("31b-like", 1, 2, "bf16");
    test_positions("31b-like", 1, 4, "bf16");
    test_positions("31b-like", 1, 4, "q8");
    test_positions("26b-a4b-like", 2, 2, "bf16");
}

int main(void) {
    (SOME ? test_some : test_all)();
    for (int r = 0; r < FAKE_RANKS; r++) sh_batch_release(&counters[r].batch);
    printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
