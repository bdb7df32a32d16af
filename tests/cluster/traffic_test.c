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

enum { TAGS = 8, MAX_STEPS = 2048, HEADER = 64 };

/* A micro-batch as the sender's message says. */
typedef struct seen {
    int rows, kept;
    size_t header, header_most, block;
} seen;

typedef struct counter { /* one per rank, written by its thread alone */
    sh_status (*send)(sh_link *l, int to, int tag, const void *p, size_t n, int *req);
    uint64_t bytes[TAGS], messages[TAGS], all, link_says;
    uint64_t head, heads; /* of tensor parallelism: what is exchanged for the sampler, and its messages */
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

static sh_status count_send(sh_link *l, int to, int tag, const void *p, size_t n, int *req) {
    counter *c = &counters[l->rank];
    SH_TRY(c->send(l, to, tag, p, n, req));
    c->bytes[tag] += n;
    c->messages[tag]++;
    c->all += n;
    c->link_says = l->sent_bytes;
    if (tag == SH_TAG_BATCH) note_batch(c, p, n);
    if (tag == SH_TAG_TENSOR && ((const int32_t *)p)[1] < 0) c->head += n, c->heads++; /* of no layer */
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

/* docs/planning.md: the block of a cut. Hidden states in f32, with the embeddings where there are per-layer ones;
 * behind the last producer only rows that are sampled; K/V of producers before the cut that layers behind it read. */
static size_t cut_formula(const sh_config *c, int cut, int kv_bytes, int rows, int kept) {
    size_t here = (size_t)(cut >= c->first_shared ? kept : rows);
    size_t bytes = here * (size_t)c->hidden * 4 * (c->ple ? 2 : 1);
    for (int j = 0; j < cut; j++) {
        bool read = false;
        for (int i = cut; i < c->n_layers; i++) read = read || c->layer[i].kv_from == j;
        const sh_layer *y = &c->layer[j];
        if (read) bytes += (size_t)rows * (y->k_eq_v ? 1 : 2) * (size_t)(y->kv_heads * y->head_dim * kv_bytes);
    }
    return bytes;
}

static void check_blocks(const char *name, const sh_config *c, const fake *f, const layout *y, int kv_bytes, load l) {
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
            size_t want = cut_formula(c, cut, kv_bytes, s->rows, s->kept);
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

static void test_pipeline(const char *name, const char *mode, const char *kv, int kv_bytes) {
    static sh_config c;
    char model[600];
    snprintf(model, sizeof model, "%s/text/models/%s", SH_TEST_DATA, name);
    MUST(sh_config_load(model, &c));
    for (int stages = 2; stages <= 4; stages++) {
        layout y = {.stages = stages, .ep = 1, .tp = 1, .cp = 1};
        fake f;
        load l;
        if (run_group(name, &c, &y, mode, kv, &f, &l)) {
            check_blocks(name, &c, &f, &y, kv_bytes, l);
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
        check_blocks(name, &c, &f, &y, 2, l);
        check_gathers(name, &c, &f, &y, l);
        check_cost(name, &c, &f, &y, l);
    }
    fake_close(&f);
}

int main(void) {
    test_pipeline("e2b-like", "exact", "f32", 4);
    test_pipeline("e2b-like", "bf16", "bf16", 2);
    test_pipeline("31b-like", "bf16", "bf16", 2);
    test_pipeline("26b-a4b-like", "bf16", "bf16", 2);
    test_tensor("31b-like", 1, 2, false);
    test_tensor("31b-like", 1, 4, false);
    test_tensor("31b-like", 2, 2, false);
    test_tensor("e2b-like", 2, 2, false);
    test_tensor("26b-a4b-like", 1, 2, false);
    test_tensor("31b-like", 1, 2, true);
    test_tensor("31b-like", 1, 4, true);
    for (int r = 0; r < FAKE_RANKS; r++) sh_batch_release(&counters[r].batch);
    printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
