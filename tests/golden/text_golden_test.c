/*
 * Every fixture against the numbers of the reference implementation, in exact mode to the tolerances of
 * tests/data/text/README.md, and in bf16 mode nearer to them than the reference's own bfloat16 run (same README).
 */
#include "tests/golden/golden.h"

#include "model/gemma4_model.h"

#define ABS     2e-3
#define REL     1e-4
#define CONTEXT 512

static void compare(const char *model, const char *what, const float *got, const float *want, size_t n,
                    double abs_tol) {
    double worst = -1;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)got[i] - want[i]) - REL * fabs((double)want[i]);
        if (!(d <= worst)) worst = d, at = i;
    }
    CHECK(worst <= abs_tol, "%s: %s: item %zu of %zu: %g, reference %g", model, what, at, n, (double)got[at],
          (double)want[at]);
}

static const float *floats(const golden *g, const char *model, const char *name, size_t n) {
    size_t have = 0;
    const float *t = golden_tensor(g, name, &have);
    CHECK(t && have == n, "%s: %s: %zu values wanted, the golden has %zu", model, name, n, have);
    return t && have == n ? t : NULL;
}

/* --- what happens inside -------------------------------------------------------------------------------------------
 */

typedef struct watch {
    const char *model;
    const golden *g;
    int layers; /* layers seen */
    int n_layers, routed;
    bool hidden, ple, router; /* which to compare */
} watch;

static void see_hidden(void *arg, int layer, const float *x, int n, int hidden) {
    watch *w = arg;
    if (!w->hidden) return;
    char name[64] = "hidden.embed";
    if (layer >= 0) snprintf(name, sizeof name, "hidden.layer.%d", layer);
    const float *want = floats(w->g, w->model, name, (size_t)n * (size_t)hidden);
    if (want) compare(w->model, name, x, want, (size_t)n * (size_t)hidden, ABS);
    w->layers++;
}

static void see_ple(void *arg, int layer, const float *ple, int n, int width) {
    watch *w = arg;
    if (!w->ple) return;
    size_t P = (size_t)width, L = (size_t)w->n_layers;
    const float *want = floats(w->g, w->model, "ple.inputs", (size_t)n * L * P);
    for (size_t t = 0; want && t < (size_t)n; t++)
        compare(w->model, "ple.inputs", ple + t * P, want + (t * L + (size_t)layer) * P, P, ABS);
}

static void see_router(void *arg, int layer, const int32_t *ids, const float *weights, int n, int top_k) {
    watch *w = arg;
    if (!w->router) return;
    char name[64];
    size_t have = 0, total = (size_t)n * (size_t)top_k;
    snprintf(name, sizeof name, "router.%d.index", layer);
    const int32_t *want = golden_tensor(w->g, name, &have);
    CHECK(want && have == total && memcmp(want, ids, total * 4) == 0, "%s: %s: other experts", w->model, name);
    snprintf(name, sizeof name, "router.%d.weight", layer);
    const float *want_w = floats(w->g, w->model, name, total);
    if (want_w) compare(w->model, name, weights, want_w, total, 1e-3);
    w->routed++;
}

/* --- parts of the test ---------------------------------------------------------------------------------------------
 */

static chain open_model(const char *name, sh_mode mode) {
    static char dir[512];
    snprintf(dir, sizeof dir, "%s/text/models/%s", SH_TEST_DATA, name);
    return chain_open(&(chain_options){.dir = dir,
                                       .mode = mode,
                                       .kv = mode == SH_MODE_EXACT ? SH_KV_F32 : SH_KV_BF16,
                                       .threads = 1,
                                       .max_rows = 256,
                                       .max_context = CONTEXT,
                                       .max_seqs = 2});
}

/* Runs ids as one prompt, all rows kept; returns logits [n, vocab] (free). The sequence stays open in *s. */
static float *prompt(chain *ch, seq *s, const int32_t *ids, int n) {
    *s = seq_open(ch, ids, n);
    CHECK(chain_step(ch, s, 1, &n, &n) == n, "all rows are kept");
    float *logits = must_alloc((size_t)n * (size_t)ch->c.vocab * sizeof(float));
    sh_model_logits(chain_last(ch), ch->hidden, n, logits);
    return logits;
}

static void check_kv(const char *name, chain *ch, const golden *g, const seq *s) {
    sh_model *m = ch->stage[0];
    sh_span span = {.pos = 0, .rows = s->n, .n_pages = {s->n_pages, s->n_pages}, .pages = {s->pages, s->pages}};
    for (int i = 0; i < ch->c.n_layers; i++) {
        const sh_layer *l = &ch->c.layer[i];
        if (!l->has_kv) continue;
        size_t head = (size_t)s->n * (size_t)l->head_dim, n = head * (size_t)l->kv_heads;
        float *k = must_alloc(n * 4), *v = must_alloc(n * 4);
        for (int h = 0; h < l->kv_heads; h++)
            sh_kv_read(m->kv, m->kn, i, &span, 0, s->n, h, m->weights->layer[i].k_norm, &m->ropes[m->rope_of[i]],
                       k + (size_t)h * head, v + (size_t)h * head);
        char what[32];
        snprintf(what, sizeof what, "kv.%d.k", i);
        const float *want = floats(g, name, what, n);
        if (want) compare(name, what, k, want, n, ABS);
        snprintf(what, sizeof what, "kv.%d.v", i);
        want = floats(g, name, what, n);
        if (want) compare(name, what, v, want, n, ABS);
        free(k);
        free(v);
    }
}

static void check_logits(const char *name, const golden *g, const json_t *f, const float *logits, int n, int vocab) {
    const char *prompt_name = json_string_value(json_object_get(f, "name"));
    const json_t *positions = json_object_get(f, "positions"), *argmax = json_object_get(f, "argmax");
    size_t np = json_array_size(positions);
    char what[64];
    snprintf(what, sizeof what, "forward.%s.logits", prompt_name);
    const float *want = floats(g, name, what, np * (size_t)vocab);
    for (size_t i = 0; want && i < np; i++) {
        int pos = (int)json_integer_value(json_array_get(positions, i));
        compare(name, what, logits + (size_t)pos * (size_t)vocab, want + i * (size_t)vocab, (size_t)vocab, ABS);
    }
    snprintf(what, sizeof what, "forward.%s.logsumexp", prompt_name);
    want = floats(g, name, what, (size_t)n);
    for (int i = 0; want && i < n; i++) {
        const float *x = logits + (size_t)i * (size_t)vocab;
        float lse = (float)log_sum_exp(x, vocab);
        compare(name, what, &lse, want + i, 1, ABS);
        CHECK(arg_max(x, vocab) == (int)json_integer_value(json_array_get(argmax, (size_t)i)), "%s: %s: argmax of %d",
              name, what, i);
    }
}

static void check_forward(const char *name, chain *ch, const golden *g) {
    const json_t *forward = json_object_get(g->info, "forward");
    watch w = {.model = name, .g = g, .n_layers = ch->c.n_layers};
    sh_model_probe probe = {.arg = &w, .hidden = see_hidden, .ple = see_ple, .router = see_router};
    sh_model_set_probe(ch->stage[0], &probe);
    for (size_t i = 0; i < json_array_size(forward); i++) {
        const json_t *f = json_array_get(forward, i);
        int n;
        int32_t *ids = golden_ids(json_object_get(f, "ids"), &n);
        w.hidden = w.ple = strcmp(json_string_value(json_object_get(f, "name")), "short") == 0;
        seq s;
        float *logits = prompt(ch, &s, ids, n);
        check_logits(name, g, f, logits, n, ch->c.vocab);
        if (w.hidden) {
            size_t total = (size_t)n * (size_t)ch->c.hidden;
            const float *want = floats(g, name, "hidden.final_norm", total);
            if (want) compare(name, "hidden.final_norm", ch->hidden, want, total, ABS);
            CHECK(w.layers == ch->c.n_layers + 1, "%s: %d hidden states seen", name, w.layers);
            check_kv(name, ch, g, &s);
        }
        free(logits);
        seq_close(&s);
        free(ids);
    }
    const json_t *router = json_object_get(g->info, "router");
    if (ch->c.experts > 0) {
        int n;
        int32_t *ids = golden_ids(json_object_get(router, "ids"), &n);
        w.hidden = w.ple = false;
        w.router = true;
        seq s;
        free(prompt(ch, &s, ids, n));
        CHECK(w.routed == ch->c.n_layers, "%s: %d routers seen", name, w.routed);
        seq_close(&s);
        free(ids);
    }
    sh_model_set_probe(ch->stage[0], NULL);
}

/* Prompt with only its last row kept (so that the layers that share K/V are skipped for the others), then decoding. */
static void check_greedy(const char *name, chain *ch, const golden *g) {
    const json_t *greedy = json_object_get(g->info, "greedy");
    float *logits = must_alloc((size_t)ch->c.vocab * sizeof(float));
    for (size_t i = 0; i < json_array_size(greedy); i++) {
        const json_t *e = json_array_get(greedy, i);
        int n, n_out, one = 1;
        int32_t *ids = golden_ids(json_object_get(e, "ids"), &n);
        int32_t *want = golden_ids(json_object_get(e, "output_ids"), &n_out);
        const json_t *lps = json_object_get(e, "logprobs");
        int32_t *all = must_alloc((size_t)(n + n_out) * 4);
        memcpy(all, ids, (size_t)n * 4);
        seq s = seq_open(ch, all, n);
        int take = n, same = 0;
        for (int t = 0; t < n_out; t++) {
            CHECK(chain_step(ch, &s, 1, &take, &one) == 1, "one row is kept");
            sh_model_logits(chain_last(ch), ch->hidden, 1, logits);
            int id = arg_max(logits, ch->c.vocab);
            double lp = (double)logits[id] - log_sum_exp(logits, ch->c.vocab);
            double want_lp = json_number_value(json_array_get(lps, (size_t)t));
            CHECK(fabs(lp - want_lp) < 2e-3, "%s: greedy %zu step %d: log-probability %g, reference %g", name, i, t, lp,
                  want_lp);
            if (id != want[t]) break;
            same++;
            all[n + t] = id;
            s.n = n + t + 1;
            take = 1;
        }
        CHECK(same == n_out, "%s: greedy %zu: %d of %d tokens agree", name, i, same, n_out);
        seq_close(&s);
        free(all);
        free(want);
        free(ids);
    }
    free(logits);
}

/* Sum of the log-probabilities of ids[1:]. want NULL: not compared. */
static double loglik(const char *name, const float *logits, const int32_t *ids, int n, int vocab, const float *want) {
    double sum = 0;
    for (int i = 0; i + 1 < n; i++) {
        const float *x = logits + (size_t)i * (size_t)vocab;
        float lp = (float)((double)x[ids[i + 1]] - log_sum_exp(x, vocab));
        if (want) compare(name, "loglik.token_logprobs", &lp, want + i, 1, ABS);
        sum += lp;
    }
    return sum;
}

/* The bf16 run of the reference: what must be beaten. */
static double reference(const golden *g, const char *field) {
    const json_t *n = json_object_get(json_object_get(g->info, "numerics"), "bfloat16_activations");
    const json_t *v = json_object_get(n, field);
    CHECK(json_is_number(v), "numerics.bfloat16_activations.%s is missing", field);
    return json_number_value(v);
}

static void check_bf16(const char *name, const golden *g, const int32_t *ids, int n, const float *exact, double want) {
    chain ch = open_model(name, SH_MODE_BF16);
    size_t V = (size_t)ch.c.vocab;
    seq s;
    float *logits = prompt(&ch, &s, ids, n);
    double sum = loglik(name, logits, ids, n, ch.c.vocab, NULL), diff = 0;
    int same = 0;
    for (size_t i = 0; i + 1 < (size_t)n; i++) {
        same += arg_max(logits + i * V, (int)V) == arg_max(exact + i * V, (int)V);
        for (size_t j = 0; j < V; j++) diff += fabs((double)logits[i * V + j] - exact[i * V + j]);
    }
    double mean = diff / ((double)(n - 1) * (double)V), agree = same / (double)(n - 1), off = sum - want;
    double ref_mean = reference(g, "loglik_text_mean_logit"), ref_agree = reference(g, "argmax_agreement");
    double ref_off = reference(g, "loglik_sum");
    printf("%-16s bf16: mean logit difference %.4f (reference's bf16 %.4f), argmax %.3f (%.3f), loglik %+.3f (%+.3f)\n",
           name, mean, ref_mean, agree, ref_agree, off, ref_off);
    CHECK(mean < ref_mean, "%s: bf16: mean logit difference %g, the reference's %g", name, mean, ref_mean);
    CHECK(agree >= ref_agree && agree >= 0.95, "%s: bf16: argmax agreement %g, the reference's %g", name, agree,
          ref_agree);
    CHECK(fabs(off) <= fmax(fabs(ref_off), 0.2), "%s: bf16: log-likelihood off by %g, the reference by %g", name, off,
          ref_off);
    free(logits);
    seq_close(&s);
    chain_close(&ch);
}

static void check_fixture(const char *name) {
    golden g = golden_open(name);
    chain ch = open_model(name, SH_MODE_EXACT);
    check_forward(name, &ch, &g);
    check_greedy(name, &ch, &g);
    const json_t *l = json_object_get(g.info, "loglik");
    int n;
    int32_t *ids = golden_ids(json_object_get(l, "ids"), &n);
    seq s;
    float *logits = prompt(&ch, &s, ids, n);
    double want = json_number_value(json_object_get(l, "sum"));
    double sum = loglik(name, logits, ids, n, ch.c.vocab, floats(&g, name, "loglik.token_logprobs", (size_t)n - 1));
    CHECK(fabs(sum - want) < 2e-2, "%s: loglik %g, reference %g", name, sum, want);
    check_bf16(name, &g, ids, n, logits, want);
    free(logits);
    free(ids);
    seq_close(&s);
    chain_close(&ch);
    golden_close(&g);
}

int main(void) {
    for (int i = 0; i < N_FIXTURES; i++) check_fixture(fixtures[i]);
    return finish("text_golden");
}
