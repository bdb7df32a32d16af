/*
 * Promise 2 at the level of the model: final hidden states, logits and KV bytes of a sequence are the same bytes for
 * any chunking, any batch mates, any number of threads, any cut, any instruction set, and whether a token was decoded
 * or recomputed as a prompt row.
 */
#include "tests/golden/golden.h"

#include "common/clock.h"
#include "model/gemma4_model.h"

#define N_SEQS  5
#define CONTEXT 640

/* A sanitizer is slower: it sees some of the cuts and chunks, and plain C, the slowest, on the odd shapes alone. */
#ifdef __SANITIZE_ADDRESS__
enum { STRIDE = 6 };
#else
enum { STRIDE = 1 };
#endif

static const int lengths[N_SEQS] = {1, 7, 40, 131, 300};

/* How one run goes about the same sequences. */
typedef struct way {
    const char *what;
    int chunk;      /* rows of a sequence per step */
    bool together;  /* all sequences in one batch, else one after the other */
    bool last_only; /* prompt rows but the last are not kept; the last `decoded` tokens are decoded one by one */
    int threads;
    const char *isa;
    const int *cuts;
    int n_cuts;
} way;

#define DECODED 5

typedef struct result {
    float *hidden, *logits;     /* [n, hidden], [n, vocab]; rows not kept: zero */
    bool *kept;                 /* [n] */
    uint8_t *kv[SH_MAX_LAYERS]; /* of producers: [n][row bytes] */
} result;

typedef struct fixture {
    const char *name;
    char dir[512];
    sh_mode mode;
    sh_kv_type kv;
    bool odd; /* of tests/data/odd */
    int32_t *ids[N_SEQS];
    result base[N_SEQS];
    sh_config c;
} fixture;

static result result_open(const sh_config *c, int n) {
    return (result){.hidden = must_alloc((size_t)n * (size_t)c->hidden * 4),
                    .logits = must_alloc((size_t)n * (size_t)c->vocab * 4),
                    .kept = must_alloc((size_t)n)};
}

static void result_close(result *r) {
    free(r->hidden);
    free(r->logits);
    free(r->kept);
    for (int i = 0; i < SH_MAX_LAYERS; i++) free(r->kv[i]);
}

/* The next rows of a sequence. */
static int next_take(const way *w, const seq *s) {
    int left = s->n - s->done, take = w->chunk < left ? w->chunk : left;
    if (!w->last_only || left == 0) return take;
    int prompt = s->n > DECODED ? s->n - DECODED : s->n;
    if (s->done >= prompt) return 1;
    return take < prompt - s->done ? take : prompt - s->done;
}

static int next_keep(const way *w, const seq *s, int take) {
    if (!w->last_only) return take;
    int prompt = s->n > DECODED ? s->n - DECODED : s->n;
    return s->done + take >= prompt ? 1 : 0;
}

static void record(const chain *ch, seq *s, const int *take, const int *keep, result *r, const float *logits) {
    size_t H = (size_t)ch->c.hidden, V = (size_t)ch->c.vocab, row = 0;
    for (int i = 0; i < N_SEQS; i++)
        for (int k = 0; k < keep[i]; k++, row++) {
            size_t pos = (size_t)(s[i].done - keep[i] + k);
            memcpy(r[i].hidden + pos * H, ch->hidden + row * H, H * 4);
            memcpy(r[i].logits + pos * V, logits + row * V, V * 4);
            r[i].kept[pos] = true;
        }
    (void)take;
}

static void steps(chain *ch, const way *w, seq *s, int lo, int hi, result *r, float *logits) {
    for (;;) {
        int take[N_SEQS] = {0}, keep[N_SEQS] = {0}, rows = 0;
        for (int i = lo; i < hi; i++) {
            take[i] = next_take(w, &s[i]);
            keep[i] = take[i] ? next_keep(w, &s[i], take[i]) : 0;
            rows += take[i];
        }
        if (rows == 0) return;
        int kept = chain_step(ch, s, N_SEQS, take, keep);
        sh_model_logits(chain_last(ch), ch->hidden, kept, logits);
        record(ch, s, take, keep, r, logits);
    }
}

/* Stored bytes of every stage that holds a layer: the producer's, and mirrors' too. */
static void collect_kv(const fixture *f, chain *ch, const way *w, const seq *s, result *r) {
    for (int st = 0; st < ch->n_stages; st++)
        for (int j = 0; j < ch->c.n_layers; j++) {
            const sh_kv_pool *kv = sh_model_kv(ch->stage[st]);
            if (!sh_kv_holds(kv, j)) continue;
            size_t bytes = (size_t)s->n * sh_kv_row_bytes(&ch->c, f->kv, j);
            uint8_t *got = must_alloc(bytes);
            sh_span span = {.rows = s->n, .n_pages = {s->n_pages, s->n_pages}, .pages = {s->pages, s->pages}};
            sh_kv_export(kv, j, &span, 0, s->n, got);
            if (!r->kv[j]) {
                r->kv[j] = got;
                continue;
            }
            CHECK(memcmp(r->kv[j], got, bytes) == 0, "%s: %s: layer %d: stage %d holds other KV bytes", f->name,
                  w->what, j, st);
            free(got);
        }
}

static void run(const fixture *f, const way *w, result *r) {
    if (w->isa) setenv("SHOAL_ISA", w->isa, 1);
    int total = 0;
    for (int i = 0; i < N_SEQS; i++) total += lengths[i];
    chain ch = chain_open(&(chain_options){.dir = f->dir,
                                           .mode = f->mode,
                                           .kv = f->kv,
                                           .threads = w->threads,
                                           .max_rows = total,
                                           .max_context = CONTEXT,
                                           .max_seqs = N_SEQS,
                                           .cuts = w->cuts,
                                           .n_cuts = w->n_cuts});
    float *logits = must_alloc((size_t)total * (size_t)ch.c.vocab * 4);
    seq s[N_SEQS];
    for (int i = 0; i < N_SEQS; i++) {
        s[i] = seq_open(&ch, f->ids[i], lengths[i]);
        r[i] = result_open(&ch.c, lengths[i]);
    }
    if (w->together)
        steps(&ch, w, s, 0, N_SEQS, r, logits);
    else
        for (int i = 0; i < N_SEQS; i++) steps(&ch, w, s, i, i + 1, r, logits);
    for (int i = 0; i < N_SEQS; i++) {
        collect_kv(f, &ch, w, &s[i], &r[i]);
        seq_close(&s[i]);
    }
    free(logits);
    chain_close(&ch);
    if (w->isa) unsetenv("SHOAL_ISA");
}

static void compare(const fixture *f, const way *w) {
    result r[N_SEQS];
    double start = sh_now();
    run(f, w, r);
    printf("%-16s %-28s %5.2f s\n", f->name, w->what, sh_now() - start);
    fflush(stdout);
    size_t H = (size_t)f->c.hidden * 4, V = (size_t)f->c.vocab * 4;
    for (int i = 0; i < N_SEQS; i++) {
        int kept = 0;
        for (size_t p = 0; p < (size_t)lengths[i]; p++) {
            if (!r[i].kept[p]) continue;
            kept++;
            CHECK(memcmp((char *)r[i].hidden + p * H, (char *)f->base[i].hidden + p * H, H) == 0,
                  "%s: %s: sequence %d: hidden state %zu differs", f->name, w->what, i, p);
            CHECK(memcmp((char *)r[i].logits + p * V, (char *)f->base[i].logits + p * V, V) == 0,
                  "%s: %s: sequence %d: logits %zu differ", f->name, w->what, i, p);
        }
        int want = !w->last_only ? lengths[i] : lengths[i] > DECODED ? DECODED + 1 : 1;
        CHECK(kept == want, "%s: %s: sequence %d: %d rows kept, %d wanted", f->name, w->what, i, kept, want);
        for (int j = 0; j < f->c.n_layers; j++) {
            CHECK(!r[i].kv[j] == !f->base[i].kv[j], "%s: %s: layer %d: KV is missing", f->name, w->what, j);
            if (r[i].kv[j] && f->base[i].kv[j])
                CHECK(memcmp(r[i].kv[j], f->base[i].kv[j], (size_t)lengths[i] * sh_kv_row_bytes(&f->c, f->kv, j)) == 0,
                      "%s: %s: sequence %d: KV bytes of layer %d differ", f->name, w->what, i, j);
        }
        result_close(&r[i]);
    }
}

/* Every single cut, and one layer per stage: chunked prompts, all together, then decoding. */
static void check_cuts(const fixture *f) {
    int every[SH_MAX_LAYERS];
    for (int i = 0; i < f->c.n_layers - 1; i++) every[i] = i + 1;
    for (int cut = 1; cut < f->c.n_layers; cut += STRIDE) {
        char what[64];
        snprintf(what, sizeof what, "cut before layer %d", cut);
        bool last_only = cut & 1;
        compare(f, &(way){what, .chunk = 64, .together = true, .last_only = last_only, .threads = 1, .cuts = &cut,
                          .n_cuts = 1});
    }
    for (int last_only = 0; f->c.n_layers > 1 && last_only < 2; last_only++)
        compare(f, &(way){"one layer per stage", .chunk = 64, .together = true, .last_only = last_only, .threads = 1,
                          .cuts = every, .n_cuts = f->c.n_layers - 1});
}

static void check_isas(const fixture *f) {
    for (const char *const *isa = sh_kernels_levels; *isa; isa++) {
        const sh_kernels *kn;
        if (strcmp(*isa, "blas") == 0) continue; /* gives the promise up, and says so */
        if (STRIDE > 1 && (!f->odd || strncmp(*isa, "avx", 3) == 0)) continue;
        if (sh_kernels_get(*isa, &kn) != SH_OK) {
            printf("%s: instruction set %s is not here\n", f->name, *isa);
            continue;
        }
        compare(f, &(way){*isa, .chunk = 64, .together = true, .threads = 1, .isa = *isa});
    }
}

/* The ids of a fixture's golden. */
static int32_t *golden_text(const char *name, bool odd, int *n) {
    if (!odd) {
        golden g = golden_open(name);
        int32_t *ids = golden_ids(json_object_get(json_object_get(g.info, "loglik"), "ids"), n);
        golden_close(&g);
        return ids;
    }
    char path[512];
    json_t *g = NULL;
    snprintf(path, sizeof path, "%s/odd/%s.json", SH_TEST_DATA, name);
    MUST(sh_json_read(path, (size_t)4 << 20, &g));
    int32_t *ids = golden_ids(json_object_get(g, "ids"), n);
    json_decref(g);
    return ids;
}

static void check_fixture(const char *name, bool odd, sh_mode mode, sh_kv_type kv, bool all_cuts) {
    fixture f = {.name = name, .mode = mode, .kv = kv, .odd = odd};
    snprintf(f.dir, sizeof f.dir, "%s/%s/%s", SH_TEST_DATA, odd ? "odd" : "text/models", name);
    MUST(sh_config_load(f.dir, &f.c));
    int n;
    int32_t *text = golden_text(name, odd, &n);
    for (int i = 0; i < N_SEQS; i++) { /* different texts, longer than the golden one by going round */
        f.ids[i] = must_alloc((size_t)lengths[i] * 4);
        for (int t = 0; t < lengths[i]; t++) f.ids[i][t] = text[(t * (i + 1) + 3 * i) % n];
    }
    free(text);
    run(&f, &(way){"base", .chunk = CONTEXT, .threads = 1}, f.base);
    compare(&f, &(way){"together", .chunk = CONTEXT, .together = true, .threads = 1});
    compare(&f, &(way){"chunks of 7", .chunk = 7, .together = true, .threads = 1});
    if (STRIDE == 1) compare(&f, &(way){"chunks of 64", .chunk = 64, .threads = 1});
    compare(&f, &(way){"decoded token by token", .chunk = 1, .together = true, .threads = 1});
    if (STRIDE == 1) compare(&f, &(way){"two threads", .chunk = CONTEXT, .threads = 2});
    compare(&f, &(way){"two threads, chunks of 20", .chunk = 20, .threads = 2});
    compare(&f, &(way){"last row kept, then decoded", .chunk = 64, .together = true, .last_only = true, .threads = 1});
    check_isas(&f);
    if (all_cuts) check_cuts(&f);
    for (int i = 0; i < N_SEQS; i++) {
        free(f.ids[i]);
        result_close(&f.base[i]);
    }
}

/* With arguments: only these fixtures. */
static bool wanted(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], name) == 0) return true;
    return argc < 2;
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        sh_mode mode;
        sh_kv_type kv;
        bool all_cuts;
    } runs[] = {{"e2b-like", SH_MODE_EXACT, SH_KV_F32, true},
                {"e4b-like", SH_MODE_BF16, SH_KV_BF16, true},
                {"26b-a4b-like", SH_MODE_BF16, SH_KV_BF16, true},
                {"26b-a4b-sharded", SH_MODE_EXACT, SH_KV_F32, false},
                {"31b-like", SH_MODE_BF16, SH_KV_BF16, true}};
    for (size_t i = 0; i < sizeof runs / sizeof runs[0]; i++)
        if (wanted(runs[i].name, argc, argv))
            check_fixture(runs[i].name, false, runs[i].mode, runs[i].kv, runs[i].all_cuts);
    for (int i = 0; i < N_ODD; i++)
        if (wanted(odd_fixtures[i], argc, argv)) {
            sh_mode mode = i % 2 ? SH_MODE_BF16 : SH_MODE_EXACT;
            check_fixture(odd_fixtures[i], true, mode, sh_kv_type_of_mode(mode), true);
            if (i == 0 || strcmp(odd_fixtures[i], "shared-values") == 0)
                check_fixture(odd_fixtures[i], true, SH_MODE_BF16, SH_KV_Q8, true);
        }
    return finish("invariance");
}
