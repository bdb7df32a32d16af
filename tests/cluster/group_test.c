/*
 * Whole groups on the local link: n ranks as threads, a coordinator played by the test. The answers to the same
 * requests must be the same bytes for every number of ranks, every cut, every --max-seqs and --chunk and with a KV pool
 * so small that sequences are paused; greedy ones must be the reference's.
 */
#include "tests/cluster/mixed.h"

/* Sanitizers are ten times slower and more: they see some of the settings. OpenMP's own synchronisation is invisible to
 * tsan. */
#if defined(__SANITIZE_THREAD__)
enum { STRIDE = 7, THREADS = 1, MODELS = 1 };
#elif defined(__SANITIZE_ADDRESS__)
enum { STRIDE = 4, THREADS = 1, MODELS = 2 };
#else
enum { STRIDE = 1, THREADS = 2, MODELS = 4 };
#endif

typedef struct setting {
    int n, cut[FAKE_RANKS + 1]; /* stages */
    int ep, tp, cp;
    int max_seqs, chunk, threads;
    uint64_t kv_memory;
    const char *mode, *kv;
} setting;

static bool run_setting(const char *name, const json_t *g, const setting *s, fake *f) {
    char model[600];
    snprintf(model, sizeof model, "%s/text/models/%s", SH_TEST_DATA, name);
    fake_open(f, model, s->n, s->cut, s->mode, s->kv);
    f->plan.max_seqs = s->max_seqs;
    f->plan.chunk = s->chunk;
    f->plan.threads = s->threads;
    f->plan.kv_memory = s->kv_memory;
    fake_divide(f, s->ep, s->tp, s->cp);
    mixed_add(f, g);
    fake_start_threads(f);
    bool ok = fake_run(f, 120);
    CHECK(ok, "%s on %d ranks did not answer: %s", name, s->n, f->fault);
    fake_leave(f);
    fake_join(f);
    for (int i = 0; i < f->n; i++)
        CHECK(f->rank[i].status == SH_OK, "rank %d of %d ended with %d: %s", i, f->n, f->rank[i].status,
              f->rank[i].error);
    return ok;
}

static void compare(const char *name, const json_t *g, const setting *s, const fake *base) {
    fake f;
    if (run_setting(name, g, s, &f))
        for (int i = 0; i < f.n_work; i++)
            CHECK(fake_same(&f.work[i], &base->work[i]),
                  "%s request %d: %d stages (first cut %d), ep %d, tp %d, cp %d, max_seqs %d, chunk %d, KV %llu differ",
                  name, i, s->n, s->cut[1], s->ep, s->tp, s->cp, s->max_seqs, s->chunk,
                  (unsigned long long)s->kv_memory);
    fake_close(&f);
}

static setting even(int layers, int n) {
    setting s = {
        .n = n, .ep = 1, .tp = 1, .cp = 1, .max_seqs = 8, .chunk = 64, .threads = 1, .mode = "exact", .kv = "f32"};
    for (int i = 0; i <= n; i++) s.cut[i] = layers * i / n;
    return s;
}

/* Stages of several ranks. */
static void compare_divided(const char *name, const json_t *g, int layers, bool experts, const fake *base) {
    static const int divided[][4] = {/* stages, ep, tp, cp */ {1, 2, 1, 1},
                                     {1, 3, 1, 1},
                                     {2, 2, 1, 1},
                                     {1, 4, 1, 1},
                                     {1, 5, 1, 1},
                                     {1, 8, 1, 1},
                                     {3, 2, 1, 1},
                                     {1, 1, 2, 1},
                                     {2, 1, 2, 1},
                                     {1, 1, 1, 2},
                                     {2, 1, 1, 2}};
    for (size_t i = 0; i<sizeof divided / sizeof *divided; i += STRIDE> 1 ? 2 : 1) {
        setting s = even(layers, divided[i][0]);
        s.ep = divided[i][1];
        s.tp = divided[i][2];
        s.cp = divided[i][3];
        s.max_seqs = 12;
        if (s.ep == 1 || experts) compare(name, g, &s, base);
    }
}

static void test_model(const char *name, int layers, bool every_cut) {
    json_t *g = mixed_golden(name);
    fake base;
    setting one = even(layers, 1);
    one.max_seqs = 1;
    one.chunk = 512;
    if (run_setting(name, g, &one, &base)) {
        mixed_check_greedy(name, g, &base);
        static const int ranks[] = {1, 2, 3, 4, 6};
        for (int i = STRIDE > 1; i<5; i += STRIDE> 1 ? 2 : 1) {
            setting s = even(layers, ranks[i]);
            s.max_seqs = 1 + 5 * i;
            s.chunk = i % 2 ? 7 : 64;
            compare(name, g, &s, &base);
        }
        for (int cut = 1; every_cut && cut < layers; cut += STRIDE) {
            setting s = even(layers, 2);
            s.cut[1] = cut;
            s.max_seqs = 40;
            compare(name, g, &s, &base);
        }
        setting tiny = even(layers, 3);
        tiny.chunk = 1;
        if (STRIDE < 7) compare(name, g, &tiny, &base);
        setting two = even(layers, 2);
        two.threads = THREADS;
        if (THREADS > 1) compare(name, g, &two, &base);
        compare_divided(name, g, layers, strstr(name, "26b") != NULL, &base);
    }
    fake_close(&base);
    json_decref(g);
}

/* Modes whose weights are quantised: other products, other rows to experts. */
static void test_mode(const char *name, int layers, const char *mode) {
    json_t *g = mixed_golden(name);
    fake base;
    setting one = even(layers, 1);
    one.max_seqs = 1;
    one.chunk = 512;
    one.mode = mode;
    one.kv = "bf16";
    if (run_setting(name, g, &one, &base)) {
        setting s = even(layers, 3);
        s.mode = mode;
        s.kv = "bf16";
        s.chunk = 7;
        compare(name, g, &s, &base);
        s = one;
        s.max_seqs = 12;
        s.chunk = 64;
        s.tp = 2;
        compare(name, g, &s, &base);
        s.tp = 1;
        s.cp = 3;
        compare(name, g, &s, &base);
        s.cp = 1;
        s.ep = 3;
        if (strstr(name, "26b")) compare(name, g, &s, &base);
    }
    fake_close(&base);
    json_decref(g);
}

int main(void) {
    static const struct {
        const char *name;
        int layers;
    } models[] = {{"e2b-like", 15}, {"26b-a4b-like", 12}, {"31b-like", 12}, {"e4b-like", 12}};
    for (int i = 0; i < MODELS; i++) test_model(models[i].name, models[i].layers, i == 0);
    for (int i = 0; i < 2 && STRIDE < 7; i++) {
        test_mode("26b-a4b-like", 12, i ? "q4" : "q8");
        if (STRIDE == 1) test_mode("e2b-like", 15, i ? "q4" : "q8");
    }
    printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
