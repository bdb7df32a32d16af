/*
 * Bytes from ranks that only read prompts, on the local link, against the formulas of docs/planning.md ("Ranks that
 * only read prompts") and against the cost model's count of the same prompts: K/V rows to the byte, heads within their
 * bound, hidden states between those ranks to the byte. The formulas are written out again below from the model's
 * configuration. Says nothing of time.
 */
#include "tests/cluster/tap.h"

#include <math.h>
#include "partition/prefill_cost.h"

#ifdef __SANITIZE_THREAD__
enum { SOME = 1 };
#else
enum { SOME = 0 };
#endif

typedef struct counter {                    /* one per rank, written by its thread alone */
    uint64_t messages, shards, rows, heads; /* K/V rows of prompts: bytes of rows, and all else of their messages */
    uint64_t blocks, passed;                /* hidden states handed on: bytes, and rows of their micro-batches */
} counter;

static counter counters[FAKE_RANKS];

static void note(const sh_link *l, int to, int tag, const void *p, size_t n) {
    (void)to;
    counter *c = &counters[l->rank];
    if (tag == SH_TAG_SHARD) {
        uint64_t rows = 0;
        tap_shards(p, n, &c->shards, &rows);
        c->messages++;
        c->rows += rows;
        c->heads += n - rows;
    }
    if (tag == SH_TAG_BATCH && l->rank > 0) {
        size_t header = 0;
        c->passed += (uint64_t)tap_batch(l->rank, p, n, &header)->n_rows;
        c->blocks += n - header;
    }
}

static void count_on(sh_link *l) {
    counters[l->rank] = (counter){0};
    tap_on(l, note);
}

/* Prompts shorter and longer than a chunk and than a window. */
static void add_requests(fake *f) {
    for (int i = 0; i < 12; i++) {
        int32_t ids[200];
        int n = 2 + 15 * i;
        for (int j = 0; j < n; j++) ids[j] = 200 + (7 * j + 31 * i) % 290;
        fake_work *w = fake_add(f, ids, n, 3 + i % 4);
        w->sampling.ignore_eos = 1;
        w->sampling.logprobs = -1;
    }
}

/* ---- formulas ------------------------------------------------------------------------------------------------------
 */

/* Bytes of one vector of a KV head: q8 has a scale of four bytes for each 64 codes or part of them. */
static size_t vec_bytes(const char *kv, int head_dim) {
    if (strcmp(kv, "q8") == 0) return (size_t)(head_dim + (head_dim + 63) / 64 * 4);
    return (size_t)head_dim * (strcmp(kv, "f32") == 0 ? 4 : 2);
}

/* Decode ranks that store the K/V of a layer: those with a layer that reads them. */
static int holders(const sh_config *c, const fake *f, int decode, int layer) {
    int n = 0;
    for (int d = 0; d < decode; d++) {
        bool reads = false;
        for (int i = f->plan.rank[d]->first; i < f->plan.rank[d]->last; i++)
            reads = reads || c->layer[i].kv_from == layer;
        n += reads;
    }
    return n;
}

/* The K/V of all tokens of a prompt but the last, of each layer of a rank, to each rank that stores them; of sliding
 * layers those that the last token sees. */
static uint64_t rows_formula(const sh_config *c, const fake *f, int decode, int rank, const char *kv) {
    uint64_t sum = 0;
    int window = 0;
    for (int i = 0; i < c->n_layers; i++)
        if (c->layer[i].window > window) window = c->layer[i].window;
    for (int y = f->plan.rank[rank]->first; y < f->plan.rank[rank]->last; y++) {
        const sh_layer *l = &c->layer[y];
        size_t row = (l->k_eq_v ? 1 : 2) * (size_t)l->kv_heads * vec_bytes(kv, l->head_dim);
        for (int i = 0; i < f->n_work; i++) {
            int rows = f->work[i].n_prompt - 1;
            if (l->window > 0 && rows > window - 1) rows = window - 1;
            sum += (uint64_t)holders(c, f, decode, y) * (uint64_t)rows * row;
        }
    }
    return sum;
}

static uint64_t rows_read(const fake *f) {
    uint64_t n = 0;
    for (int i = 0; i < f->n_work; i++) n += (uint64_t)f->work[i].n_prompt - 1;
    return n;
}

static void check_formulas(const char *what, const sh_config *c, const fake *f, int decode, const char *kv) {
    for (int r = 0; r < f->n; r++) {
        const counter *t = &counters[r];
        uint64_t want = r < decode ? 0 : rows_formula(c, f, decode, r, kv);
        CHECK(t->rows == want, "%s: rank %d sent %llu bytes of K/V rows, the formula says %llu", what, r,
              (unsigned long long)t->rows, (unsigned long long)want);
        CHECK((t->messages > 0) == (r >= decode) && t->heads >= 64 * t->messages + 96 * t->shards &&
                  t->heads <= 64 * t->messages + 256 * t->shards,
              "%s: rank %d: %llu bytes beside the rows in %llu messages and %llu shards", what, r,
              (unsigned long long)t->heads, (unsigned long long)t->messages, (unsigned long long)t->shards);
        if (r < decode || r + 1 == f->n) continue;
        uint64_t block = rows_read(f) * 4 * (uint64_t)c->hidden * (c->ple ? 2 : 1);
        CHECK(t->passed == rows_read(f) && t->blocks == block,
              "%s: rank %d handed on %llu rows in %llu bytes: %llu and %llu", what, r, (unsigned long long)t->passed,
              (unsigned long long)t->blocks, (unsigned long long)rows_read(f), (unsigned long long)block);
    }
}

/* The cost model of all prompts, in pieces of no more than a chunk. Its heads are about those: chunks end anywhere. */
static void check_cost(const char *what, const sh_config *c, const fake *f, int decode, int prefill) {
    static const sh_cost_rates rates = {1e9, 1e9, 1, 1, 1, 1, 0, 0};
    static const sh_cost_link link = {0, 1e9};
    sh_cost_model m = {.config = c, .plan = &f->plan, .rates = &rates, .alike = true, .net = {link, link, 1}};
    sh_cost_prompt_rank rank[FAKE_RANKS];
    sh_cost_taken taken[FAKE_RANKS];
    sh_cost_span span[FAKE_WORK];
    double sent = 0, got = 0;
    for (int i = 0; i < f->n_work; i++) {
        double all = f->work[i].n_prompt - 1, one = fmin(all, f->plan.chunk);
        span[i] = (sh_cost_span){.seqs = all / one, .rows = one, .lo = 0, .hi = all - one};
    }
    MUST(sh_cost_prompts(&m, span, f->n_work, rank, taken));
    for (int i = 0; i < prefill; i++) {
        const counter *t = &counters[decode + i];
        sent += rank[i].rows.bytes;
        CHECK(fabs(rank[i].payload - (double)t->rows) < 0.5,
              "%s: rank %d sent %llu bytes of rows, the cost model counts %.0f", what, decode + i,
              (unsigned long long)t->rows, rank[i].payload);
        CHECK(fabs(rank[i].step.cut.bytes - (double)t->blocks) < 0.5,
              "%s: rank %d handed on %llu bytes, the cost model counts %.0f", what, decode + i,
              (unsigned long long)t->blocks, rank[i].step.cut.bytes);
        double heads = rank[i].rows.bytes - rank[i].payload;
        CHECK(heads > 0 && heads <= (double)t->heads,
              "%s: rank %d: %.0f bytes beside the rows for all prompts in one micro-batch, %llu in several", what,
              decode + i, heads, (unsigned long long)t->heads);
    }
    for (int d = 0; d < decode; d++) got += taken[d].bytes;
    CHECK(fabs(got - sent) < 0.5, "%s: %.0f bytes are sent and %.0f taken", what, sent, got);
}

static void test(const char *name, int stages, int prefill, const char *mode, const char *kv) {
    static sh_config c;
    char model[600], what[200];
    int cut[FAKE_RANKS + 1];
    fake f;
    snprintf(model, sizeof model, "%s/text/models/%s", SH_TEST_DATA, name);
    snprintf(what, sizeof what, "%s, %s, KV %s, %d + %d ranks", name, mode, kv, stages, prefill);
    MUST(sh_config_load(model, &c));
    for (int i = 0; i <= stages; i++) cut[i] = c.n_layers * i / stages;
    fake_open(&f, model, stages, cut, mode, kv);
    f.on_link = count_on;
    f.prefill = prefill;
    fake_divide(&f, 1, 1, 1);
    add_requests(&f);
    fake_start_threads(&f);
    bool ok = fake_run(&f, 120);
    CHECK(ok, "%s: did not answer: %s", what, f.fault);
    fake_leave(&f);
    fake_join(&f);
    if (ok) {
        check_formulas(what, &c, &f, stages, kv);
        check_cost(what, &c, &f, stages, prefill);
    }
    fake_close(&f);
}

int main(void) {
    test("e2b-like", 2, 2, "bf16", "bf16");
    if (!SOME) {
        test("e2b-like", 1, 1, "exact", "f32");
        test("e2b-like", 3, 2, "bf16", "q8");
        test("e4b-like", 2, 1, "bf16", "bf16");
        test("31b-like", 2, 2, "bf16", "bf16");
        test("26b-a4b-like", 1, 3, "bf16", "q8");
    }
    tap_close();
    printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
