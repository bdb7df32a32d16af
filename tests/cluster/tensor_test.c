/*
 * Whole groups whose stages divide heads, columns and vocabulary, on the local link: every kind of draw, alternatives,
 * scores and bans, against one rank. tp 2, 4 and 8, alone and with a pipeline, with KV heads that are shared out and KV
 * heads that are replicated, in small pools where sequences are paused. With partial sums a group answers everything,
 * and the same from run to run.
 */
#include "tests/cluster/fake.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { SOME = 1 };
#else
enum { SOME = 0 };
#endif

typedef struct setting {
    const char *model;
    int stages, tp;
    bool sum;
    const char *mode, *kv;
    int max_seqs, chunk;
    uint64_t kv_memory;
} setting;

static uint32_t next_random(uint32_t *s) {
    *s = *s * 1664525u + 1013904223u;
    return *s >> 8;
}

/* Prompts of 1 to 70 tokens; request i asks for what the bits of i say. */
static void add_requests(fake *f) {
    uint32_t s = 7;
    for (int i = 0; i < 40; i++) {
        int32_t ids[80];
        int n = 1 + (i * 37) % 70;
        for (int k = 0; k < n; k++) ids[k] = (int32_t)(next_random(&s) % 2048);
        fake_work *w = fake_add(f, ids, n, 4 + i % 9);
        w->sampling.temperature = i % 4 == 0 ? 0 : 0.5f + 0.25f * (float)(i % 5);
        w->sampling.top_k = i % 8 == 1 ? 40 : i % 16 == 3 ? 1500 : 0;
        w->sampling.top_p = i % 8 == 2 ? 0.9f : i % 16 == 6 ? 0.9999f : 1;
        w->sampling.min_p = i % 8 == 5 ? 0.1f : 0;
        w->sampling.logprobs = i % 3 == 0 ? -1 : i % 7;
        w->sampling.score_prompt = i % 5 == 2;
        w->sampling.seed = (uint64_t)i;
        if (i % 6 == 4) w->n_given = 3, memcpy(w->given, ids, 3 * sizeof *ids);
    }
}

static bool run(const setting *s, fake *f) {
    char model[600];
    sh_config c;
    int cut[FAKE_RANKS + 1];
    snprintf(model, sizeof model, "%s/text/models/%s", SH_TEST_DATA, s->model);
    MUST(sh_config_load(model, &c));
    for (int i = 0; i <= s->stages; i++) cut[i] = c.n_layers * i / s->stages;
    fake_open(f, model, s->stages, cut, s->mode, s->kv);
    f->plan.max_seqs = s->max_seqs;
    f->plan.chunk = s->chunk;
    f->plan.kv_memory = s->kv_memory;
    fake_divide(f, 1, s->tp, 1);
    f->plan.has_tp_sum = true;
    f->plan.tp_sum = s->sum;
    add_requests(f);
    fake_start_threads(f);
    bool ok = fake_run(f, 120);
    CHECK(ok, "%s: %d stages, tp %d: no answer: %s", s->model, s->stages, s->tp, f->fault);
    fake_leave(f);
    fake_join(f);
    for (int i = 0; i < f->n; i++)
        CHECK(f->rank[i].status == SH_OK, "rank %d of %d ended with %d: %s", i, f->n, f->rank[i].status,
              f->rank[i].error);
    return ok;
}

static void compare(const setting *s, const fake *base) {
    fake f;
    if (run(s, &f))
        for (int i = 0; i < f.n_work; i++)
            CHECK(fake_same(&f.work[i], &base->work[i]), "%s request %d: %d stages, tp %d%s, max_seqs %d, %s differs",
                  s->model, i, s->stages, s->tp, s->sum ? " (sum)" : "", s->max_seqs, s->mode);
    fake_close(&f);
}

static void test_model(const char *model, const char *mode, const char *kv, const int (*grid)[2], int n) {
    setting s = {.model = model, .stages = 1, .tp = 1, .mode = mode, .kv = kv, .max_seqs = 3, .chunk = 64};
    fake base;
    if (run(&s, &base))
        for (int i = 0; i < n; i++) {
            setting t = s;
            t.stages = grid[i][0];
            t.tp = grid[i][1];
            t.max_seqs = i ? 5 + 4 * i : 40;
            t.chunk = i == 0 ? 1100 : i % 2 ? 13 : 64; /* first: more rows than pass a layer at a time */
            if (i == 1) t.kv_memory = 700 << 10;       /* some sequences at a time */
            compare(&t, &base);
        }
    fake_close(&base);
}

static void test_sum(void) {
    setting s = {.model = "31b-like", .stages = 1, .tp = 4, .sum = true, .mode = "exact", .kv = "f32", .max_seqs = 7};
    s.chunk = 64;
    fake first;
    if (run(&s, &first)) {
        s.max_seqs = 16;
        s.chunk = 9;
        compare(&s, &first);
        s.stages = 2;
        compare(&s, &first);
    }
    fake_close(&first);
}

int main(void) {
    static const int heads8[][2] = {{1, 2}, {2, 4}, {1, 8}, {3, 2}}, heads4[][2] = {{1, 2}, {1, 4}, {2, 2}};
    test_model("31b-like", "exact", "f32", heads8, SOME ? 2 : 4);
    test_model("e2b-like", "bf16", "bf16", heads4, SOME ? 2 : 3);
    if (!SOME) test_model("26b-a4b-like", "bf16", "bf16", heads4, 2);
    if (!SOME) test_sum();
    printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
