/* The planner: plans of real models on real machines against committed text, properties on random machines and models,
 * and the JSON of messages. PLANS_WRITE=1 writes the committed text again. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cli/planuse.h"
#include "common/file.h"
#include "partition/explain.h"
#include "partition/protojson.h"

#define MOST ((size_t)1 << 22)

#ifdef __SANITIZE_ADDRESS__
enum { MACHINES = 500 };
#else
enum { MACHINES = 10000 };
#endif

static sh_config e2b, e4b, b31, a4b;

static int load(void) {
    return sh_config_load(SH_TEST_DATA "/configs/e2b", &e2b) || sh_config_load(SH_TEST_DATA "/configs/e4b", &e4b) ||
           sh_config_load(SH_TEST_DATA "/configs/31b", &b31) || sh_config_load(SH_TEST_DATA "/configs/26b-a4b", &a4b);
}

static void must(sh_status st) {
    if (st != SH_OK) printf("\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
}

/* --- committed plans -----------------------------------------------------------------------------------------------
 */

static void machine(const char *name, sh_cluster *c) {
    char path[512], *text;
    size_t len;
    snprintf(path, sizeof path, SH_TEST_DATA "/machines/%s.json", name);
    must(sh_file_read(path, MOST, &text, &len));
    must(sh_cluster_read(name, text, len, 0, c));
    free(text);
}

static void compare(const char *model, const char *name, const sh_buf *got) {
    char path[512], *want = NULL;
    size_t len = 0;
    snprintf(path, sizeof path, SH_TEST_DATA "/plans/%s-%s.txt", model, name);
    if (getenv("PLANS_WRITE")) {
        FILE *f = fopen(path, "w");
        CU_ASSERT_PTR_NOT_NULL_FATAL(f);
        fwrite(got->data, 1, got->len, f);
        fclose(f);
        return;
    }
    must(sh_file_read(path, MOST, &want, &len));
    bool same = len == got->len && memcmp(want, got->data, len) == 0;
    if (!same) printf("\n%s: is now\n%s", path, (const char *)got->data);
    CU_ASSERT_TRUE(same);
    free(want);
}

static void one_golden(const sh_config *c, const char *model, const char *name) {
    sh_cluster k;
    sh_workload w = sh_workload_default();
    sh_search *s = NULL;
    sh_buf out;
    machine(name, &k);
    sh_search_options o = {
        .config = c, .cluster = &k, .workload = &w, .fixed = {.mode = SH_MODE_BF16, .kv = SH_KV_BF16}};
    sh_buf_init(&out, 0);
    must(sh_search_run(&o, &s));
    if (s->n) must(sh_explain_plan(&o, &s->best[0], &out));
    must(sh_explain_search(&o, s, &out));
    compare(model, name, &out);
    sh_buf_release(&out);
    sh_search_free(&s);
}

static void test_goldens(void) {
    static const char *const machines[] = {"box-24g",     "xeon-1",       "epyc-1",      "xeon-4-25g",  "xeon-4-200g",
                                           "xeon-16-25g", "xeon-16-200g", "xeon-64-25g", "xeon-64-200g"};
    const struct {
        const sh_config *c;
        const char *name;
    } model[] = {{&e2b, "e2b"}, {&e4b, "e4b"}, {&a4b, "26b-a4b"}, {&b31, "31b"}};
    for (int m = 0; m < 4; m++)
        for (size_t i = 0; i < sizeof machines / sizeof *machines; i++)
            one_golden(model[m].c, model[m].name, machines[i]);
}

/* --- random machines and models ------------------------------------------------------------------------------------
 */

static uint64_t state = 88172645463325252u;
static int upto(int n) { /* 0 … n − 1 */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (int)(state % (uint64_t)n);
}

static void random_config(sh_config *c) {
    *c = (sh_config){.vocab = 64 << upto(12), .hidden = 32 * (1 + upto(120)), .n_layers = 1 + upto(40), .tied = true};
    bool moe = upto(2), k_eq_v = upto(2);
    int period = 2 + upto(6), heads = 1 << upto(6), kv = 1 << upto(5), ff = 64 * (1 + upto(200)),
        window = 64 << upto(6);
    snprintf(c->variant, sizeof c->variant, "custom");
    c->max_context = 4096 << upto(6);
    c->experts = moe ? 2 + upto(200) : 0;
    c->top_k = moe ? 1 + upto(c->experts < 8 ? c->experts : 8) : 0;
    c->expert_ff = moe ? 32 * (1 + upto(40)) : 0;
    c->ple = !moe && upto(2) ? 64 : 0;
    c->ple_vocab = c->vocab;
    c->first_shared = c->ple && c->n_layers > 3 * period ? c->n_layers - period - upto(period) : c->n_layers;
    for (int i = 0; i < c->n_layers; i++) {
        sh_layer *l = &c->layer[i];
        bool global = i % period == period - 1 || i == c->n_layers - 1;
        *l = (sh_layer){.kind = global ? SH_KV_GLOBAL : SH_KV_SLIDING, .heads = heads, .ff = ff, .moe = moe};
        l->kv_heads = kv < heads ? kv : heads;
        l->head_dim = global ? 128 : 64;
        l->rotated_pairs = l->head_dim / 4;
        l->window = global ? 0 : window;
        l->k_eq_v = global && k_eq_v && c->first_shared == c->n_layers;
        l->has_kv = i < c->first_shared;
        l->kv_from = i;
        for (int j = i - 1; !l->has_kv && j >= 0; j--)
            if (c->layer[j].kind == l->kind && c->layer[j].has_kv) {
                l->kv_from = j;
                break;
            }
    }
}

static sh_cluster random_cluster(void) {
    sh_cluster k = {.nodes = 1 + upto(12), .packages = 1 + upto(2), .spanning = 0.7};
    k.numa = k.packages * (1 + upto(2));
    k.cores = k.numa * (1 + upto(64));
    k.memory = (0.3 + upto(1000) * 0.02) * 0x1p30 * (1 + upto(4));
    k.read = k.cores * (1 + upto(10)) * 1e9;
    k.fma = k.cores * (10 + upto(100)) * 1e9;
    k.within = (sh_cost_link){1e-6 * (1 + upto(5)), 1e9 * (1 + upto(20))};
    k.between = (sh_cost_link){1e-6 * (2 + upto(100)), 1e8 * (1 + upto(250))};
    k.kernels = (sh_cost_rates){
        .weights_read = 0.9, .weights_fma = 0.8, .attention = {.read = 0.6, .fma = 0.5}, .layer = 2e-5, .sample = 1e-9};
    return k;
}

/* Memory: what is named adds up to no more than there is. */
static bool fits(const sh_config *c, const sh_cluster *k, const sh_choice *x) {
    uint64_t have = sh_cluster_memory(k, x->ranks_per_node);
    sh_kv_type kv;
    if (sh_kv_type_parse(x->plan->kv, &kv) != SH_OK) return false;
    for (int i = 0; i < x->ranks; i++) {
        sh_plan_memory m = sh_choice_memory(&(sh_search_options){.config = c, .cluster = k}, x, i);
        static sh_config mine;
        sh_config_share(c, sh_plan_share(x->plan, i), &mine);
        const int32_t *pages = i < x->shape.decode ? x->kv.pages : x->prompts.pages;
        uint64_t pool = sh_plan_kv_bytes(&mine, kv, x->plan->rank[i]->first, x->plan->rank[i]->last, pages);
        if (m.weights + m.scratch + m.reserve + pool > have) {
            printf("\nrank %d: %llu + %llu + %llu + %llu of %llu\n", i, (unsigned long long)m.weights,
                   (unsigned long long)m.scratch, (unsigned long long)m.reserve, (unsigned long long)pool,
                   (unsigned long long)have);
            return false;
        }
    }
    return true;
}

/* Elements of matrices and vectors that all ranks of a group own: each of the model's once, apart from what every
 * member of a stage has (norms, router, what ep and cp do not divide, KV heads that are fewer than members, experts
 * twice). */
static bool owned_once(const sh_config *c, const sh_choice *x) {
    const Shoal__Plan *p = x->plan;
    for (int s = 0; s < x->shape.pp; s++) {
        const Shoal__PlanRank *r = p->rank[s * x->shape.width];
        if (r->first != (s ? p->rank[(s - 1) * x->shape.width]->last : 0)) return false;
        for (int layer = r->first; layer < r->last; layer++) {
            int ff = 0, hidden = 0, vocab = 0;
            for (int m = 0; m < x->shape.tp; m++) {
                ff += sh_cost_share(c->layer[layer].ff, SH_SHARE_COLUMNS, m, x->shape.tp);
                hidden += sh_cost_share(c->hidden, SH_SHARE_COLUMNS, m, x->shape.tp);
                vocab += sh_cost_share(c->vocab, SH_SHARE_VOCAB, m, x->shape.tp);
            }
            if (ff != c->layer[layer].ff || hidden != c->hidden || vocab != c->vocab) return false;
            for (int e = 0; x->shape.ep > 1 && c->layer[layer].moe && e < c->experts; e++) {
                int owners = 0;
                for (int m = 0; m < x->shape.ep; m++) {
                    const Shoal__PlanRank *o = p->rank[s * x->shape.width + m];
                    for (size_t i = 0; i < o->n_experts; i++)
                        for (size_t j = 0; o->experts[i]->layer == layer && j < o->experts[i]->n_expert; j++)
                            owners += o->experts[i]->expert[j] == e;
                }
                if (owners != 1) return false;
            }
        }
    }
    for (int i = x->shape.decode, next = 0; i < x->ranks; i++) { /* and once more up to the last that makes K/V */
        if (p->rank[i]->first != next || p->rank[i]->last <= next || p->rank[i]->n_experts) return false;
        next = p->rank[i]->last;
        if (i + 1 == x->ranks && next != c->first_shared) return false;
    }
    return p->rank[x->shape.decode - 1]->last == c->n_layers;
}

static bool about(const sh_config *c, uint64_t sum, uint64_t whole, int ranks) {
    double slack = (c->ple ? 4.0 * c->ple : 0) * ranks + 64.0 * ranks; /* one vector for all layers */
    return fabs((double)sum - (double)whole) <= slack;
}

/* Bytes of weights: the ranks' together are at least the model's, and exactly that (tables aside) where nothing of a
 * stage is held by all its members. Ranks that only read prompts have those of K/V and what K/V come from. */
static bool weights_add_up(const sh_config *c, const sh_choice *x) {
    static sh_config made;
    uint64_t sum = 0, prompts = 0, whole = sh_weights_estimate(c, SH_MODE_BF16, 0, c->n_layers);
    for (int i = 0; i < x->ranks; i++)
        *(i < x->shape.decode ? &sum : &prompts) += sh_plan_rank_memory(c, x->plan, i, 0).weights;
    if (x->shape.width > 1) return sum + sum / 1000 + 65536 >= whole;
    made = *c;
    sh_config_prefill(&made);
    uint64_t need = x->shape.prefill ? sh_weights_estimate(&made, SH_MODE_BF16, 0, made.kv_end) : 0;
    return about(c, sum, whole, x->shape.decode) && about(c, prompts, need, x->shape.prefill) && need < whole;
}

static sh_status round_trip(const sh_config *c, sh_choice *x, const sh_search_options *o, bool *same) {
    sh_buf a, b;
    Shoal__Plan *back = NULL;
    sh_buf_init(&a, 0);
    sh_buf_init(&b, 0);
    sh_status st = sh_explain_annotate(o, "test", x);
    if (st == SH_OK) st = sh_protojson_write(&x->plan->base, &a);
    if (st == SH_OK) st = sh_plan_read("plan", (const char *)a.data, a.len, c, &back);
    if (st == SH_OK) st = sh_protojson_write(&back->base, &b);
    *same = st == SH_OK && a.len == b.len && memcmp(a.data, b.data, a.len) == 0;
    sh_plan_free(&back);
    sh_buf_release(&a);
    sh_buf_release(&b);
    return st;
}

static void check_choice(const sh_config *c, const sh_search_options *o, sh_choice *x, int *bad) {
    bool same = false;
    sh_status st = sh_plan_check(c, x->plan);
    if (st == SH_OK) st = round_trip(c, x, o, &same);
    bool good = st == SH_OK && same && fits(c, o->cluster, x) && owned_once(c, x) && weights_add_up(c, x);
    good = good && x->ranks == x->shape.pp * x->shape.width + x->shape.prefill &&
           x->ranks * x->replicas <= o->cluster->nodes * x->ranks_per_node;
    good = good && x->forecast.seconds > 0 && isfinite(x->forecast.seconds) && x->forecast.cycle.period > 0;
    if (!good && ++*bad < 4)
        printf("\n%d layers, %d experts; pp %d ep %d tp %d cp %d prefill %d × %d: %d %d %d %d %s\n", c->n_layers,
               c->experts, x->shape.pp, x->shape.ep, x->shape.tp, x->shape.cp, x->shape.prefill, x->replicas, same,
               fits(c, o->cluster, x), owned_once(c, x), weights_add_up(c, x), st == SH_OK ? "" : sh_error_text());
}

/* 10,000 machines and models, each with one random layout; every hundredth with the whole search. */
static void test_properties(void) {
    static sh_config c;
    int bad = 0, fitting = 0, refused = 0, searched = 0, apart = 0;
    for (int i = 0; i < MACHINES; i++) {
        random_config(&c);
        sh_cluster k = random_cluster();
        sh_workload w = {.bin = {{.prompt = 1 + upto(900), .output = 1 + upto(400), .requests = 1 + upto(1000)}},
                         .n = 1};
        must(sh_workload_check(&w));
        bool exact = upto(2);
        sh_search_options o = {.config = &c, .cluster = &k, .workload = &w};
        o.fixed.mode = exact ? SH_MODE_EXACT : SH_MODE_BF16;
        o.fixed.kv = exact ? SH_KV_F32 : SH_KV_BF16;
        if (i % 100 == 0) {
            sh_search *s = NULL;
            must(sh_search_run(&o, &s));
            searched++;
            for (int j = 0; j < s->n; j++) check_choice(&c, &o, &s->best[j], &bad);
            for (int j = 2; j < s->n; j++)
                if (s->best[j].forecast.seconds < s->best[j - 1].forecast.seconds) bad++;
            sh_search_free(&s);
            continue;
        }
        int way = upto(5), width = way % 4 ? 1 + upto(8) : 1, pp = 1 + upto(c.n_layers < 6 ? c.n_layers : 6);
        int prefill = way == 4 ? 1 + upto(c.first_shared < 6 ? c.first_shared : 6) : 0;
        sh_choice x = {.shape = {.pp = pp, .ep = 1, .tp = 1, .cp = 1, .width = width, .prefill = prefill},
                       .ranks = pp * width + prefill,
                       .replicas = 1};
        if (way == 1) x.shape.ep = width;
        if (way == 2) x.shape.tp = width;
        if (way == 3) x.shape.cp = width;
        x.ranks_per_node = (x.ranks + k.nodes - 1) / k.nodes;
        must(sh_search_try(&o, &x));
        if (x.fits)
            check_choice(&c, &o, &x, &bad);
        else if (!*x.why)
            bad++;
        fitting += x.fits;
        apart += x.fits && prefill > 0;
        refused += !x.fits;
        sh_choice_release(&x);
    }
    printf("\n%d plans fit (%d with ranks that only read prompts), %d do not, %d searches\n", fitting, apart, refused,
           searched);
    CU_ASSERT_TRUE(apart > MACHINES / 20);
    CU_ASSERT_TRUE(fitting > 3 * MACHINES / 10 && refused > MACHINES / 10);
    CU_ASSERT_EQUAL(bad, 0);
}

/* --- particular things ---------------------------------------------------------------------------------------------
 */

/* What the search calls best is best among all layouts, tried one by one. */
static void test_exhaustive(void) {
    sh_cluster k;
    machine("epyc-1", &k);
    sh_workload w = sh_workload_default();
    sh_search_options o = {
        .config = &a4b, .cluster = &k, .workload = &w, .fixed = {.mode = SH_MODE_BF16, .kv = SH_KV_BF16}};
    sh_search *s = NULL;
    must(sh_search_run(&o, &s));
    CU_ASSERT_TRUE_FATAL(s->n > 0);
    double best = INFINITY;
    for (int ranks = 1; ranks <= 8; ranks *= 2)
        for (int width = 1; width <= ranks; width *= 2)
            for (int way = 0; way < 3; way++) {
                sh_choice x = {.shape = {.pp = ranks / width, .ep = 1, .tp = 1, .cp = 1, .width = width},
                               .ranks = ranks,
                               .replicas = 8 / ranks,
                               .ranks_per_node = 8};
                *(way == 0 ? &x.shape.ep : way == 1 ? &x.shape.tp : &x.shape.cp) = width;
                must(sh_search_try(&o, &x));
                if (x.fits && x.forecast.seconds < best) best = x.forecast.seconds;
                sh_choice_release(&x);
            }
    CU_ASSERT_TRUE(s->best[0].forecast.seconds <= best * 1.003);
    sh_search_free(&s);
}

/* More of anything is never slower; fixed numbers are kept. */
static void test_monotone(void) {
    sh_cluster k;
    machine("xeon-4-25g", &k);
    sh_workload w = sh_workload_default();
    sh_search_options o = {
        .config = &a4b, .cluster = &k, .workload = &w, .fixed = {.mode = SH_MODE_BF16, .kv = SH_KV_BF16}};
    sh_search *s = NULL;
    must(sh_search_run(&o, &s));
    double before = s->best[0].forecast.seconds;
    sh_search_free(&s);
    for (int i = 0; i < 4; i++) {
        sh_cluster more = k;
        *(i == 0 ? &more.read : i == 1 ? &more.fma : i == 2 ? &more.between.bandwidth : &more.memory) *= 3;
        o.cluster = &more;
        must(sh_search_run(&o, &s));
        CU_ASSERT_TRUE(s->best[0].forecast.seconds <= before * 1.001);
        sh_search_free(&s);
    }
    o.cluster = &k;
    o.fixed.ep = 4;
    o.fixed.pp = 2;
    o.replicas = 1;
    must(sh_search_run(&o, &s));
    CU_ASSERT_EQUAL_FATAL(s->n, 1);
    CU_ASSERT_EQUAL(s->best[0].shape.ep, 4);
    CU_ASSERT_EQUAL(s->best[0].shape.pp, 2);
    CU_ASSERT_EQUAL(s->best[0].replicas, 1);
    sh_search_free(&s);
}

/* A cluster whose nodes are too small for one rank: experts must be divided, or layers. */
static void test_small_nodes(void) {
    sh_cluster k;
    machine("box-24g", &k);
    k.nodes = 4;
    k.between = (sh_cost_link){20e-6, 25e9 / 8};
    sh_workload w = sh_workload_default();
    sh_search_options o = {
        .config = &a4b, .cluster = &k, .workload = &w, .fixed = {.mode = SH_MODE_BF16, .kv = SH_KV_BF16}};
    sh_search *s = NULL;
    must(sh_search_run(&o, &s));
    CU_ASSERT_TRUE_FATAL(s->n > 0);
    CU_ASSERT_TRUE(s->has_way[SH_WAY_ALONE] && !s->of_way[SH_WAY_ALONE].fits);
    CU_ASSERT_PTR_NOT_NULL(strstr(s->of_way[SH_WAY_ALONE].why, "may use 24576.0 MiB"));
    CU_ASSERT_TRUE(s->best[0].shape.pp > 1 || s->best[0].shape.ep > 1);
    sh_search_free(&s);
}

/* However many sequences a group may run, no more prompts are answered than its ranks can read. */
static void test_pace_of_prompts(void) {
    sh_cluster k;
    sh_workload usual = sh_workload_default();
    machine("xeon-4-25g", &k);
    for (int seqs = 64; seqs <= 4096; seqs *= 4) {
        sh_search *s = NULL;
        sh_search_options o = {.config = &e2b,
                               .cluster = &k,
                               .workload = &usual,
                               .fixed = {.mode = SH_MODE_BF16,
                                         .kv = SH_KV_BF16,
                                         .pp = 3,
                                         .ep = 1,
                                         .tp = 1,
                                         .cp = 1,
                                         .prefill = 1,
                                         .max_seqs = seqs}};
        must(sh_search_run(&o, &s));
        CU_ASSERT_TRUE_FATAL(s->n > 0 && s->best[0].shape.prefill == 1);
        const sh_forecast *f = &s->best[0].forecast;
        double rows = f->requests / s->best[0].replicas * (sh_workload_mean_prompt(&usual) - 1);
        CU_ASSERT_TRUE(f->prompts.slower && rows > 0.99 * f->prompts.rows && rows <= f->prompts.rows * 1.002);
        sh_search_free(&s);
    }
}

/* E2B on three nodes, prompts of 8,000 tokens: ranks that read them need no weights of the layers that share K/V. A run
 * asks for such ranks only when told. */
static void test_prompts_apart(void) {
    static sh_plan_tuning t2;
    sh_cluster k;
    bool chosen = false;
    sh_option t[SH_OPTIONS_MAX];
    sh_shared_options mine;
    sh_search *s = NULL;
    sh_workload w = {.bin = {{.prompt = 1000, .output = 1000, .requests = 1e6}}, .n = 1, .requests = 1e6};
    sh_workload longer = {.bin = {{.prompt = 8000, .output = 500, .requests = 1e6}}, .n = 1, .requests = 1e6};
    machine("box-24g", &k);
    k.nodes = 3;
    sh_search_options o = {
        .config = &e2b, .cluster = &k, .workload = &longer, .fixed = {.mode = SH_MODE_BF16, .kv = SH_KV_BF16}};
    must(sh_search_run(&o, &s));
    CU_ASSERT_TRUE_FATAL(s->n > 0);
    CU_ASSERT_TRUE(s->best[0].way == SH_WAY_PREFILL && s->best[0].shape.pp == 1 && s->best[0].shape.prefill == 2);
    CU_ASSERT_TRUE(s->best[0].forecast.seconds < 0.98 * s->of_way[SH_WAY_STAGES].forecast.seconds);
    CU_ASSERT_TRUE(s->best[0].forecast.seconds < s->of_way[SH_WAY_ALONE].forecast.seconds);
    sh_search_free(&s);
    o.no_prefill = true;
    must(sh_search_run(&o, &s));
    CU_ASSERT_TRUE(s->n > 0 && s->best[0].shape.prefill == 0 && !s->has_way[SH_WAY_PREFILL]);
    sh_search_free(&s);
    sh_options_shared(&mine, t);
    machine("box-24g", &k);
    k.nodes = 3;
    k.memory = 10 * 0x1p30;
    k.between = (sh_cost_link){50e-6, 10e9 / 8};
    must(
        sh_plan_choose(&mine, &e4b, &k, &w, &t2, &chosen)); /* a run does so when told: it knows no common beginnings */
    CU_ASSERT_TRUE(chosen && mine.ranks == 3 && mine.pp == 3 && mine.prefill == 0 && mine.max_seqs > 0);
}

/* One expert takes half of the rows: placing by the counts, with a copy, makes a step shorter and says so. */
static void test_placement(void) {
    sh_cluster k;
    machine("epyc-1", &k);
    sh_workload w = sh_workload_default();
    sh_routing *counts = NULL;
    sh_search *s = NULL;
    sh_forecast even;
    sh_buf out;
    must(sh_routing_create(&a4b, &counts));
    for (int i = 0; i < 30 * 128; i++) counts->chosen[i] = i % 128 ? 7500 : 127 * 500;
    sh_search_options o = {.config = &a4b,
                           .cluster = &k,
                           .workload = &w,
                           .routing = counts,
                           .fixed = {.mode = SH_MODE_BF16, .kv = SH_KV_BF16}};
    o.fixed.ep = 8;
    o.fixed.routing = counts;
    o.fixed.replicate = (uint64_t)2 << 30;
    must(sh_search_run(&o, &s));
    CU_ASSERT_EQUAL_FATAL(s->n, 1);
    must(sh_search_unplaced(&o, &s->best[0], &even));
    CU_ASSERT_TRUE(even.cycle.period > 1.05 * s->best[0].forecast.cycle.period);
    sh_buf_init(&out, 0);
    must(sh_explain_plan(&o, &s->best[0], &out));
    CU_ASSERT_PTR_NOT_NULL(strstr((const char *)out.data, "  placement  by counts: a step every "));
    sh_buf_release(&out);
    sh_search_free(&s);
    sh_routing_destroy(&counts);
}

/* What a run takes when nothing is said. */
static void test_choice(void) {
    static sh_plan_tuning t2;
    sh_cluster k;
    bool chosen = false;
    sh_option t[SH_OPTIONS_MAX];
    sh_shared_options s;
    sh_workload w = sh_workload_default();
    sh_options_shared(&s, t);
    machine("xeon-1", &k);
    must(sh_plan_choose(&s, &a4b, &k, &w, &t2, &chosen));
    CU_ASSERT_TRUE(chosen && s.ranks == 1 && s.replicas == 2 && s.pp == 1 && s.ep == 1); /* a socket each */
    machine("box-24g", &k);
    k.nodes = 4;
    k.between = (sh_cost_link){20e-6, 25e9 / 8};
    sh_options_shared(&s, t);
    must(sh_plan_choose(&s, &a4b, &k, &w, &t2, &chosen));
    CU_ASSERT_TRUE(chosen && s.ranks == 4 && s.replicas == 1 && s.ep == 4 && s.max_seqs > 0);
    sh_options_shared(&s, t);
    s.pp = 4;
    must(sh_plan_choose(&s, &a4b, &k, &w, &t2, &chosen));
    CU_ASSERT_TRUE(!chosen && s.ep == 0 && s.ranks == 0); /* something is said */
    s.pp = 0;
    k.nodes = 1;
    must(sh_plan_choose(&s, &b31, &k, &w, &t2, &chosen));
    CU_ASSERT_TRUE(!chosen && s.ranks == 0); /* nothing fits */
}

static double seconds_with(const sh_cluster *k, const sh_workload *w, int seqs, int chunk) {
    sh_search *found = NULL;
    sh_search_options o = {.config = &a4b, .cluster = k, .workload = w, .replicas = 1};
    o.fixed = (sh_plan_request){
        .ranks = 4, .ep = 4, .mode = SH_MODE_BF16, .kv = SH_KV_BF16, .max_seqs = seqs, .chunk = chunk};
    must(sh_search_run(&o, &found));
    CU_ASSERT_FATAL(found->n > 0);
    double seconds = found->best[0].forecast.seconds;
    sh_search_free(&found);
    return seconds;
}

static sh_status made(const sh_shared_options *s, const sh_config *c, Shoal__Plan **out) {
    sh_plan_request q;
    sh_options_plan(s, sh_options_ranks(s), &q);
    return sh_plan_make(c, &q, out);
}

/* The plan that a run makes of its options is the one that was chosen, cuts included: with ranks chosen, and with ranks
 * that are given. */
static void test_what_runs(void) {
    static sh_plan_tuning t2;
    static const struct { int ranks, prefill; } row[] = {{0, 0}, {3, 0}, {2, 0}, {5, 3}};
    sh_cluster k;
    sh_option t[SH_OPTIONS_MAX];
    sh_shared_options s;
    sh_workload w = {.bin = {{.prompt = 2000, .output = 50, .requests = 1000}}, .n = 1, .requests = 1000};
    int differing = 0;
    machine("box-24g", &k);
    k.memory = 9 * 0x1p30;
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        Shoal__Plan *p = NULL, *by_weights = NULL;
        sh_search *found = NULL;
        bool chosen = false;
        int ranks = row[i].ranks ? row[i].ranks : 3;
        k.nodes = ranks;
        sh_options_shared(&s, t);
        s.ranks = row[i].ranks;
        s.prefill = row[i].prefill;
        sh_search_options o = {
            .config = &e4b, .cluster = &k, .workload = &w, .replicas = row[i].ranks != 0, .no_prefill = !s.prefill};
        sh_options_plan(&s, s.ranks, &o.fixed);
        if (row[i].ranks) o.fixed.ep = o.fixed.tp = o.fixed.cp = 1;
        must(sh_search_run(&o, &found));
        CU_ASSERT_FATAL(found->n > 0 && found->best[0].shape.pp > 1);
        if (row[i].ranks)
            must(sh_plan_tune(&s, &e4b, &k, &w, NULL, ranks, 1, &t2));
        else
            must(sh_plan_choose(&s, &e4b, &k, &w, &t2, &chosen));
        CU_ASSERT_EQUAL(chosen, row[i].ranks == 0);
        sh_plan_take(&s, &t2);
        must(made(&s, &e4b, &p));
        const Shoal__Plan *want = found->best[0].plan;
        CU_ASSERT(p->n_rank == want->n_rank && p->max_seqs == want->max_seqs && p->chunk == want->chunk);
        for (size_t r = 0; r < p->n_rank && r < want->n_rank; r++)
            CU_ASSERT(p->rank[r]->first == want->rank[r]->first && p->rank[r]->last == want->rank[r]->last);
        s.cuts = s.prefill_cuts = NULL;
        must(made(&s, &e4b, &by_weights)); /* and it is seldom what weights alone would have */
        bool differs = false;
        for (size_t r = 0; r < p->n_rank; r++) differs |= p->rank[r]->first != by_weights->rank[r]->first;
        differing += differs;
        sh_plan_free(&p);
        sh_plan_free(&by_weights);
        sh_search_free(&found);
    }
    CU_ASSERT_TRUE(differing >= 3);
}

/* Two stages, cut in every way: none is much faster than what is chosen, whatever the kind of micro-batch that sets the
 * pace. */
static void test_cuts(void) {
    static const struct {
        double prompt, output;
        int seqs;
    } row[] = {{512, 256, 64}, {64, 128, 64}, {8, 256, 32}, {4000, 1000, 64}};
    sh_cluster k;
    machine("box-24g", &k);
    k.nodes = 2;
    k.memory = 64 * 0x1p30;
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        sh_workload w = {.bin = {{row[i].prompt, row[i].output, 1e5}}, .n = 1, .requests = 1e5};
        sh_search_options o = {.config = &e2b, .cluster = &k, .workload = &w, .replicas = 1, .no_prefill = true};
        o.fixed = (sh_plan_request){.ranks = 2, .pp = 2, .mode = SH_MODE_Q4, .kv = SH_KV_BF16};
        o.fixed.max_seqs = row[i].seqs;
        sh_search *s = NULL;
        double best = INFINITY;
        must(sh_search_run(&o, &s));
        CU_ASSERT_EQUAL_FATAL(s->n, 1);
        for (int cut = 1; cut < e2b.n_layers; cut++) {
            char text[8];
            snprintf(text, sizeof text, "%d", cut);
            sh_search_options given = o;
            given.fixed.cuts = text;
            given.fixed.chunk = s->best[0].plan->chunk;
            sh_choice x = {.way = SH_WAY_STAGES,
                           .shape = {.pp = 2, .ep = 1, .tp = 1, .cp = 1, .width = 1, .decode = 2},
                           .ranks = 2,
                           .replicas = 1,
                           .ranks_per_node = 1};
            must(sh_search_try(&given, &x));
            if (x.fits && x.forecast.seconds < best) best = x.forecast.seconds;
            sh_choice_release(&x);
        }
        double off = s->best[0].forecast.seconds / best;
        if (off > 1.02) printf("\n%zu: %.3f of the best\n", i, off);
        CU_ASSERT_TRUE(off <= 1.02);
        sh_search_free(&s);
    }
}

/* What a run takes when the layout is said, and the batch is not. */
static void test_batch(void) {
    sh_cluster k;
    sh_option t[SH_OPTIONS_MAX];
    sh_shared_options s;
    static sh_plan_tuning b;
    sh_workload w = sh_workload_default();
    machine("box-24g", &k);
    k.nodes = 4;
    sh_options_shared(&s, t);
    s.ranks = s.ep = 4;
    must(sh_plan_tune(&s, &a4b, &k, &w, NULL, 4, 1, &b));
    CU_ASSERT_TRUE(b.max_seqs > 32 && b.chunk >= 64 && s.max_seqs == 0 && s.chunk == 0);
    CU_ASSERT_TRUE(fabs(b.seconds / seconds_with(&k, &w, b.max_seqs, b.chunk) - 1) < 1e-9);
    CU_ASSERT_TRUE(b.seconds < seconds_with(&k, &w, 16, 64) && b.seconds < seconds_with(&k, &w, 32, 512));
    s.max_seqs = 7;
    must(sh_plan_tune(&s, &a4b, &k, &w, NULL, 4, 1, &b));
    CU_ASSERT_TRUE(b.max_seqs == 7 && b.chunk > 0); /* what is given stays */
    s.chunk = 64;
    must(sh_plan_tune(&s, &a4b, &k, &w, NULL, 4, 1, &b));
    CU_ASSERT_EQUAL(b.max_seqs, 0); /* both are given */
    s.max_seqs = s.chunk = 0;
    s.prefill = 2;
    must(sh_plan_tune(&s, &a4b, &k, &w, NULL, 6, 1, &b));
    CU_ASSERT_EQUAL(b.max_seqs, 0); /* experts divided, and prompts apart: who makes the plan says so */
    s.ep = 0;
    must(sh_plan_tune(&s, &e4b, &k, &w, NULL, 4, 1, &b));
    CU_ASSERT_TRUE(b.max_seqs > 0 && b.chunk > 0 && b.seconds > 0);
    s.prefill = 0;
    k.nodes = 1;
    must(sh_plan_tune(&s, &b31, &k, &w, NULL, 1, 1, &b));
    CU_ASSERT_EQUAL(b.max_seqs, 0); /* does not fit: who makes the plan says so */
}

#define MACHINE_WITH(kernels) "{\"node\": [{\"cores\": 4, \"memory_gib\": 8}], \"kernels\": {" kernels "}}"

static void test_json_errors(void) {
    static const struct {
        const char *text, *message;
    } row[] = {
        {"{", "m: not valid JSON at line 1, column 1: string or '}' expected near end of file"},
        {"[]", "m: is an array: allowed is an object"},
        {"{\"nodes\": []}", "m: nodes: no such field: allowed are name, node, between, kernels, measured"},
        {"{\"node\": [{\"cores\": 2.5}]}", "m: node[0].cores: is a number: allowed is a whole number"},
        {"{\"node\": [{\"cores\": 3000000000}]}",
         "m: node[0].cores: 3000000000 is out of range: allowed are -2147483648 to 2147483647"},
        {"{\"node\": {}}", "m: node: is an object: allowed is a list"},
        {"{\"name\": 7}", "m: name: is an integer: allowed is a string"},
        {"{}", "m: machine: node: is missing: at least one kind of node is needed"},
        {"{\"node\": [{\"memory_gib\": 4}]}", "m: machine: node.cores: is missing"},
        {"{\"node\": [{\"cores\": 4}]}", "m: machine: node.memory_gib: is missing"},
        {"{\"node\": [{\"cores\": 4, \"memory_gib\": -1}]}",
         "m: machine: node.memory_gib: -1 is out of range: allowed are 0.001 to 1e+06"},
        {"{\"node\": [{\"cores\": 4, \"memory_gib\": 8, \"count\": 9999}]}",
         "m: machine: node.count: 9999 is out of range: allowed are 1 to 4096"},
        {"{\"node\": [{\"cores\": 4, \"memory_gib\": 8}], \"between\": {\"gbit\": 0}}",
         "m: machine: between.gbit: 0 is out of range: allowed are 0.001 to 1e+06"},
        {MACHINE_WITH("\"q4_few\": [0.5, 0.6]"),
         "m: machine: kernels.q4_few: 2 numbers: allowed are 6, for 1, 2, 4, 8, 16 and 32 rows"},
        {MACHINE_WITH("\"q8_few\": [0.1, 0.1, 0.2, 0.3, 0.5, 0.4]"),
         "m: machine: kernels.q8_few[5]: 0.4 is out of range: allowed are 0.5 to 16: 32 rows take no longer than 64"},
        {MACHINE_WITH("\"attention_few\": [0.5]"),
         "m: machine: kernels.attention_few: 1 numbers: allowed are 6, for 1, 2, 4, 8, 16 and 32 rows"},
        {MACHINE_WITH("\"attention_both\": 1.5"),
         "m: machine: kernels.attention_both: 1.5 is out of range: allowed are 0 to 1"},
        {MACHINE_WITH("\"attention_q8_few\": [0.5]"),
         "m: machine: kernels.attention_q8_few: 1 numbers: allowed are 6, for 1, 2, 4, 8, 16 and 32 rows"},
        {MACHINE_WITH("\"attention_q8_read\": 2"),
         "m: machine: kernels.attention_q8_read: 2 is out of range: allowed are 0.001 to 1"},
        {MACHINE_WITH("\"attention_formed\": -1"),
         "m: machine: kernels.attention_formed: -1 is out of range: allowed are 0 to 64"},
        {MACHINE_WITH("\"weights_few\": [0.1, 0.1, 0.2, 0.2, 0.8, 0.9]"),
         "m: machine: kernels.weights_few[3]: 0.2 is out of range: allowed are 0.4 to 16: 8 rows take no longer than "
         "16"},
    };
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        sh_cluster c;
        CU_ASSERT_NOT_EQUAL(sh_cluster_read("m", row[i].text, strlen(row[i].text), 0, &c), SH_OK);
        if (strcmp(sh_error_text(), row[i].message)) printf("\n%s\n", sh_error_text());
        CU_ASSERT_STRING_EQUAL(sh_error_text(), row[i].message);
    }
    sh_cluster c;
    const char *text =
        "{\"node\": [{\"cores\": 4, \"memory_gib\": 8, \"count\": 2}, {\"cores\": 2, \"memory_gib\": 16}]}";
    must(sh_cluster_read("m", text, strlen(text), 0, &c));
    CU_ASSERT_EQUAL(c.nodes, 3);
    CU_ASSERT_EQUAL(c.cores, 2);
    CU_ASSERT_EQUAL(c.memory, 8 * 0x1p30);
    CU_ASSERT_TRUE(c.mixed);
    CU_ASSERT_PTR_NOT_NULL(strstr(c.assumed, "reading 12 GB/s"));
    CU_ASSERT_PTR_NOT_NULL(strstr(c.assumed, "between 10 Gbit/s"));
    CU_ASSERT_EQUAL(c.kernels.q4_few[0], 0); /* not said: as many */
    text = MACHINE_WITH("\"q4_few\": [0.125, 0.125, 0.25, 0.5, 1, 1]");
    must(sh_cluster_read("m", text, strlen(text), 0, &c));
    static const double paid[] = {8, 16, 16, 16, 16, 32};
    for (int i = 0; i < SH_COST_FEW; i++) CU_ASSERT_EQUAL(c.kernels.q4_few[i], paid[i]);
    CU_ASSERT_EQUAL(c.kernels.weights_few[0], 0);
    CU_ASSERT_EQUAL(c.kernels.attention.few[0], 0);
    CU_ASSERT_EQUAL(c.kernels.attention.both, 0);
    CU_ASSERT_EQUAL(c.kernels.attention.formed, 0);
    CU_ASSERT_EQUAL(c.kernels.attention.fma, 0.5);
    text = MACHINE_WITH("\"attention_few\": [0.125, 0.125, 0.25, 0.5, 1, 1], \"attention_both\": 0.25, "
                        "\"attention_formed\": 5.5");
    must(sh_cluster_read("m", text, strlen(text), 0, &c));
    for (int i = 0; i < SH_COST_FEW; i++) CU_ASSERT_EQUAL(c.kernels.attention.few[i], paid[i]);
    CU_ASSERT_EQUAL(c.kernels.attention.both, 0.25);
    CU_ASSERT_EQUAL(c.kernels.attention.formed, 5.5);
    CU_ASSERT_EQUAL(c.kernels.attention_q8.read, 0); /* not said: as the others */
    text = MACHINE_WITH("\"attention_fma\": 0.25, \"attention_q8_read\": 0.75, \"attention_q8_both\": 0.5, "
                        "\"attention_q8_formed\": 7, \"attention_q8_few\": [0.125, 0.125, 0.25, 0.5, 1, 1]");
    must(sh_cluster_read("m", text, strlen(text), 0, &c));
    CU_ASSERT_EQUAL(c.kernels.attention_q8.read, 0.75);
    CU_ASSERT_EQUAL(c.kernels.attention_q8.fma, 0.25);
    CU_ASSERT_EQUAL(c.kernels.attention_q8.both, 0.5);
    CU_ASSERT_EQUAL(c.kernels.attention_q8.formed, 7);
    for (int i = 0; i < SH_COST_FEW; i++) CU_ASSERT_EQUAL(c.kernels.attention_q8.few[i], paid[i]);
    CU_ASSERT_EQUAL(c.kernels.attention.few[0], 0);
}

static void read_plan(const char *text, const char *message) {
    Shoal__Plan *p = NULL;
    CU_ASSERT_EQUAL(sh_plan_read("f", text, strlen(text), &a4b, &p), SH_EINPUT);
    if (strcmp(sh_error_text(), message)) printf("\n%s\n", sh_error_text());
    CU_ASSERT_STRING_EQUAL(sh_error_text(), message);
    CU_ASSERT_PTR_NULL(p);
}

/* Plans that were edited badly. */
static void test_edited(void) {
#define REST                                                                                                           \
    "\"mode\": \"bf16\", \"kv\": \"bf16\", \"threads\": 0, \"max_seqs\": 8, \"chunk\": 64, \"max_context\": 4096, "    \
    "\"kv_memory\": 0"
    read_plan("{\"rank\": [], " REST "}", "f: ranks of a group: 0 is out of range: allowed are 1 to 4096");
    read_plan("{\"rank\": [{\"first\": 0, \"last\": 20}], " REST "}", "f: plan: layers 20 to 29 are on no rank");
    read_plan("{\"rank\": [{\"first\": 0, \"last\": 20}, {\"first\": 19, \"last\": 30}], " REST "}",
              "f: plan: rank 1 has layers 19 to 29: it must begin at layer 20 and hold at least one");
    read_plan("{\"rank\": [{\"first\": 0}], " REST "}", "f: rank[0].last: is missing");
    read_plan("{\"rank\": [{\"first\": 0, \"last\": 30, \"experts\": [{\"layer\": 0, \"expert\": [1]}]}], " REST "}",
              "f: plan: rank 0: experts are named, but ep is 1: allowed are none");
    read_plan("{\"rank\": [{\"first\": 0, \"last\": 30}], " REST ", \"model\": {\"layers\": 30, \"hidden\": 5376}}",
              "f: plan: model.hidden: 5376: the plan was made for another model: this one has 2816");
    read_plan("{\"rank\": [{\"first\": 0, \"last\": 30}], " REST ", \"replicas\": 0}",
              "f: plan: replicas: 0 is out of range: allowed are 1 to 4096");
    read_plan("{\"rank\": [{\"first\": 0, \"last\": 30}, {\"first\": 0, \"last\": 30}, {\"first\": 0, \"last\": 30}], "
              "\"tp\": 3, " REST "}",
              "f: --tp: 3 does not divide the 16 query heads of the model: allowed are 1, 2, 4, 8, 16");
#undef REST
    /* an expert that nobody has, and one on two ranks: the first is refused, the second runs */
    sh_plan_request r = {.ep = 2, .mode = SH_MODE_BF16, .kv = SH_KV_BF16};
    Shoal__Plan *p = NULL;
    must(sh_plan_make(&a4b, &r, &p));
    int32_t kept = p->rank[0]->experts[3]->expert[63];
    p->rank[0]->experts[3]->n_expert--;
    CU_ASSERT_EQUAL(sh_plan_check(&a4b, p), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "plan: layer 3: expert 63 is on no rank");
    CU_ASSERT_EQUAL(kept, 63);
    p->rank[0]->experts[3]->n_expert++;
    p->rank[0]->experts[3]->expert[63] = 64;
    p->rank[1]->experts[3]->expert[0] = 63;
    CU_ASSERT_EQUAL(sh_plan_check(&a4b, p), SH_OK);
    sh_plan_free(&p);
}

/* Numbers that contradict each other are refused by the rule, not searched for in vain. */
static void test_contradictions(void) {
    sh_cluster k;
    sh_workload w = sh_workload_default();
    sh_search *s = NULL;
    machine("box-24g", &k);
    sh_search_options o = {.config = &a4b, .cluster = &k, .workload = &w, .fixed = {.ranks = 4, .ep = 2, .tp = 2}};
    CU_ASSERT_EQUAL(sh_search_run(&o, &s), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "one way at a time"));
    o.fixed = (sh_plan_request){.ranks = 4, .pp = 3};
    CU_ASSERT_EQUAL(sh_search_run(&o, &s), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(),
                           "4 ranks: 3 stages of 1 ranks (ep 1, tp 1, cp 1) do not divide them: give -n 3 or "
                           "6, or --prefill 1 where one is only to read prompts");
    o.fixed = (sh_plan_request){.ranks = 2, .pp = 3};
    CU_ASSERT_EQUAL(sh_search_run(&o, &s), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(),
                           "2 ranks: 3 stages of 1 ranks (ep 1, tp 1, cp 1) do not divide them: give -n 3");
    o.fixed = (sh_plan_request){.ranks = 6, .pp = 3, .prefill = 1};
    CU_ASSERT_EQUAL(sh_search_run(&o, &s), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(),
                           "5 ranks that decode: 3 stages of 1 ranks (ep 1, tp 1, cp 1) do not divide "
                           "them: give -n 4 or 7, or --prefill 3 where so many are only to read prompts");
    CU_ASSERT_PTR_NULL(s);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("planner", load, NULL);
    CU_add_test(s, "committed plans", test_goldens);
    CU_add_test(s, "sequences and chunk of a layout", test_batch);
    CU_add_test(s, "10,000 machines and models", test_properties);
    CU_add_test(s, "the best of all", test_exhaustive);
    CU_add_test(s, "more is not slower", test_monotone);
    CU_add_test(s, "small nodes", test_small_nodes);
    CU_add_test(s, "prompts apart", test_prompts_apart);
    CU_add_test(s, "pace of prompts", test_pace_of_prompts);
    CU_add_test(s, "placing by counts", test_placement);
    CU_add_test(s, "the choice of a run", test_choice);
    CU_add_test(s, "what runs is what was chosen", test_what_runs);
    CU_add_test(s, "all cuts", test_cuts);
    CU_add_test(s, "errors of machine files", test_json_errors);
    CU_add_test(s, "edited plans", test_edited);
    CU_add_test(s, "contradictions", test_contradictions);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + (CU_get_number_of_suites_failed() != 0);
    CU_cleanup_registry();
    return failed != 0;
}
