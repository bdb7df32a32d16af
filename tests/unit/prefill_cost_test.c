/* Ranks that only read prompts: what a micro-batch of theirs costs and sends, and the pace that follows, against
 * numbers worked out by hand. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "partition/explain.h"
#include "partition/prefill_cost.h"

static sh_config e2b, e4b, b31, a4b;

static int load(void) {
    return sh_config_load(SH_TEST_DATA "/configs/e2b", &e2b) || sh_config_load(SH_TEST_DATA "/configs/e4b", &e4b) ||
           sh_config_load(SH_TEST_DATA "/configs/31b", &b31) || sh_config_load(SH_TEST_DATA "/configs/26b-a4b", &a4b);
}

static void near(double got, double want, double tolerance, const char *what) {
    if (!(fabs(got - want) <= tolerance)) printf("\n%s: %.9g, should be %.9g\n", what, got, want);
    CU_ASSERT_TRUE(fabs(got - want) <= tolerance);
}

static Shoal__Plan *plan_of(const sh_config *c, int pp, int prefill, sh_kv_type kv) {
    Shoal__Plan *p = NULL;
    const sh_plan_request r = {.pp = pp, .prefill = prefill, .mode = SH_MODE_BF16, .kv = kv};
    sh_status st = sh_plan_make(c, &r, &p);
    if (st != SH_OK) printf("\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    return p;
}

/* Weights at a byte per second; arithmetic, attention and links for nothing. */
static const sh_cost_rates reading = {
    .read = 1, .fma = 1e30, .weights_read = 1, .weights_fma = 1, .attention = {.read = 1e30, .fma = 1}};
static const sh_cost_link free_link = {.latency = 0, .bandwidth = 1e30};

static sh_cost_model model_of(const sh_config *c, const Shoal__Plan *p) {
    return (sh_cost_model){
        .config = c, .plan = p, .rates = &reading, .alike = true, .net = {free_link, free_link, .ranks_per_node = 1}};
}

/* 600 rows of a prompt in two pieces, through 31B: 10 global layers with 4 heads of 512 (K = V), 50 sliding ones with
 * 16 heads of 256, all rows of which are in the window of 1,024. */
static void test_rows(void) {
    Shoal__Plan *p = plan_of(&b31, 1, 1, SH_KV_BF16);
    sh_cost_model m = model_of(&b31, p);
    sh_cost_span s = {.seqs = 1, .rows = 300, .lo = 0, .hi = 300};
    sh_cost_prompt_rank r;
    sh_cost_taken t;
    CU_ASSERT_EQUAL(sh_cost_prompts(&m, &s, 1, &r, &t), SH_OK);
    double row = 10 * 4 * 512 * 2 + 50 * 2 * 16 * 256 * 2, heads = 64 + 192; /* 96 + 4 · 10 pages, up to 64 */
    near(row, 860160, 0, "840 KiB of a token");
    near(r.payload, 300 * row, 1e-3, "rows");
    near(r.rows.bytes, 300 * row + 60 * heads, 1e-3, "rows, envelopes, heads of shards");
    near(r.rows.messages, 60, 0, "a message of each layer");
    near(t.bytes, r.rows.bytes, 1e-3, "taken");
    near(r.copying, r.rows.bytes / SH_COST_COPY_RATE, 1e-12, "copied and summed once");
    near(r.step.cut.bytes, 0, 0, "the last of them hands nothing on");
    strcpy(p->kv, "q8"); /* 4 bytes more for each 64 values or part of them */
    CU_ASSERT_EQUAL(sh_cost_prompts(&m, &s, 1, &r, &t), SH_OK);
    near(r.payload, 300.0 * (10 * 4 * (512 + 32) + 50 * 2 * 16 * (256 + 16)), 1e-3, "rows, q8");
    sh_plan_free(&p);
}

/* decision 0017: a prompt of 4,096 tokens sends 30.0 MiB of E2B, 84.0 of E4B, 959.2 of 31B, 239.8 of 26B-A4B. */
static void test_prompt(void) {
    static const double mib[] = {30.0, 84.0, 959.2, 239.8};
    const sh_config *config[] = {&e2b, &e4b, &b31, &a4b};
    for (int k = 0; k < 4; k++)
        for (int prefill = 1; prefill <= 3; prefill++) {
            Shoal__Plan *p = plan_of(config[k], 1, prefill, SH_KV_BF16);
            sh_cost_model m = model_of(config[k], p);
            sh_cost_span s = {.seqs = 1, .rows = 512, .lo = 0, .hi = 4095 - 512};
            sh_cost_prompt_rank r[3];
            sh_cost_taken t;
            double sum = 0;
            CU_ASSERT_EQUAL(sh_cost_prompts(&m, &s, 1, r, &t), SH_OK);
            for (int i = 0; i < prefill; i++) sum += r[i].payload * 4095 / 512;
            near(sum / 0x1p20, mib[k], 0.06, config[k]->variant);
            near(t.messages, config[k]->first_shared, 0, "messages");
            sh_plan_free(&p);
        }
}

/* Each row is sent to every rank whose layers read it: E2B's layers from 15 on read 13 (sliding) and 14 (global). */
static void test_mirrors(void) {
    Shoal__Plan *p = plan_of(&e2b, 2, 1, SH_KV_BF16);
    CU_ASSERT_TRUE_FATAL(p->rank[1]->first > 15);
    sh_cost_model m = model_of(&e2b, p);
    sh_cost_span s = {.seqs = 2, .rows = 100, .lo = 0, .hi = 0};
    sh_cost_prompt_rank r;
    sh_cost_taken t[2];
    CU_ASSERT_EQUAL(sh_cost_prompts(&m, &s, 1, &r, t), SH_OK);
    near(t[0].messages, 15, 0, "all producers");
    near(t[1].messages, 2, 0, "two of them again");
    double heads = 64 + 2 * 128; /* two shards of 96 + 4 · 4 pages */
    near(t[1].bytes, 200 * (1024 + 2048) + 2 * heads, 1e-6, "again");
    near(r.payload, 200 * (12 * 1024 + 3 * 2048 + 1024 + 2048), 1e-6, "sent");
    CU_ASSERT_TRUE(sh_cost_stores(&m, 1, 13) && sh_cost_stores(&m, 1, 14) && !sh_cost_stores(&m, 1, 12));
    sh_plan_free(&p);
}

/* Layers that share K/V are never computed, and of the last one that has its own no more than that. */
static void test_work(void) {
    const sh_config *config[] = {&e2b, &e4b, &b31, &a4b};
    for (int k = 0; k < 4; k++) {
        const sh_config *c = config[k];
        Shoal__Plan *p = plan_of(c, 1, 2, SH_KV_BF16);
        sh_cost_model m = model_of(c, p);
        sh_cost_span s = {.seqs = 1, .rows = 10, .lo = 0, .hi = 0};
        sh_cost_prompt_rank r[2];
        sh_cost_taken t;
        sh_cost_layer l;
        int last = c->first_shared - 1;
        double want = 0, got = 0, hidden = 10 * 4.0 * c->hidden * (c->ple ? 2 : 1);
        for (int i = 0; i <= last; i++) {
            sh_layer_count n = sh_config_layer_count(c, i);
            double experts =
                c->experts ? 3.0 * c->top_k * c->expert_ff * c->hidden + (double)c->experts * c->hidden : 0;
            want += 2 * 10 *
                    (i == last ? (double)n.kv : (double)(n.qo + n.kv + n.mlp) + experts + 3.0 * c->ple * c->hidden);
        }
        CU_ASSERT_EQUAL(sh_cost_prompts(&m, &s, 1, r, &t), SH_OK);
        for (int i = 0; i < 2; i++)
            got += r[i].step.part[SH_CAUSE_WEIGHTS].flops + r[i].step.part[SH_CAUSE_EXPERTS].flops;
        near(got, want, want * 1e-3, c->variant);
        near(r[0].step.cut.bytes, hidden, 0, "hidden states alone cross");
        CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 2, last, &s, 1, &l), SH_OK);
        near(l.dense.seconds + l.attention.seconds + l.experts.seconds + l.ple.seconds, 0, 0, "K and V alone");
        near(l.project.bytes, 2.0 * (double)sh_config_layer_count(c, last).kv, 3 * 1024, "K and V alone");
        CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, last, &s, 1, &l), SH_OK);
        CU_ASSERT_TRUE(l.dense.seconds > 0); /* where it decodes */
        sh_plan_free(&p);
    }
}

/* Rows leave while later layers compute: what is waited for is what does not fit beside that. */
static void test_links(void) {
    sh_cost_rates r = {
        .read = 1e12, .fma = 1e12, .weights_read = 1, .weights_fma = 1, .attention = {.read = 1e9, .fma = 1e9}};
    Shoal__Plan *p = plan_of(&b31, 2, 2, SH_KV_BF16);
    sh_cost_model m = model_of(&b31, p);
    m.rates = &r;
    m.net.between = (sh_cost_link){0, 1e9};
    sh_cost_span s = {.seqs = 1, .rows = 100, .lo = 0, .hi = 0};
    sh_cost_prompt_rank rank[2];
    sh_cost_taken taken[2];
    CU_ASSERT_EQUAL(sh_cost_prompts(&m, &s, 1, rank, taken), SH_OK);
    double cut = 100 * 4.0 * 5376;
    near(rank[0].rows.seconds, (rank[0].rows.bytes + cut) / 1e9, 1e-9, "its link");
    near(rank[1].rows.seconds, rank[1].rows.bytes / 1e9, 1e-9, "its link");
    near(rank[0].exposed, 0, 0, "86 MB beside 6 TFLOP");
    double most = fmax(taken[0].bytes, taken[1].bytes);
    near(sh_cost_taken_wire(&m, taken), most / 1e9, 1e-9, "into a node");
    m.net.between.bandwidth = 1e6; /* now it is the link */
    CU_ASSERT_EQUAL(sh_cost_prompts(&m, &s, 1, rank, taken), SH_OK);
    near(rank[0].exposed, rank[0].rows.seconds - rank[0].step.seconds - rank[0].copying, 1e-9, "waits");
    CU_ASSERT_TRUE(rank[0].exposed > 0.9 * rank[0].rows.seconds);
    m.net.ranks_per_node = 2; /* those that decode on one node, these on another: one link */
    CU_ASSERT_EQUAL(sh_cost_prompts(&m, &s, 1, rank, taken), SH_OK);
    near(rank[1].rows.seconds, (rank[0].rows.bytes + rank[1].rows.bytes) / 1e6, 1e-6, "a link for two");
    near(sh_cost_taken_wire(&m, taken), (taken[0].bytes + taken[1].bytes) / 1e6, 1e-6, "a link for two");
    m.net.ranks_per_node = 4; /* all on one node */
    CU_ASSERT_EQUAL(sh_cost_prompts(&m, &s, 1, rank, taken), SH_OK);
    near(rank[0].rows.seconds, 0, 1e-9, "no link between nodes");
    near(taken[0].far, 0, 0, "no link between nodes");
    p->prefill = 0;
    p->n_rank = 2;
    CU_ASSERT_EQUAL(sh_cost_prompts(&m, &s, 1, rank, taken), SH_EINPUT);
    p->prefill = 2;
    p->n_rank = 4;
    sh_plan_free(&p);
}

/* Steps that read all weights whatever they hold: T seconds for a step of rows that decode, R for one of prompts. */
typedef struct times {
    double decode, prompts;
} times;

static times times_of(const sh_cost_model *m) {
    sh_cost_span one = {.seqs = 1, .rows = 1, .kept = 1, .lo = 9, .hi = 9}, piece = {.seqs = 1, .rows = 500};
    sh_cost_rank d;
    sh_cost_prompt_rank r;
    sh_cost_taken t;
    CU_ASSERT_EQUAL(sh_cost_step(m, &one, 1, &d), SH_OK);
    CU_ASSERT_EQUAL(sh_cost_prompts(m, &piece, 1, &r, &t), SH_OK);
    return (times){d.seconds + SH_STEP_SECONDS, r.step.seconds + SH_STEP_SECONDS};
}

/* 10 sequences, 100 tokens each: a sequence is read for R, and until rank 0 looks, half a step later; then it decodes
 * for 100 steps, the first token included. */
static void test_decode_sets_the_pace(void) {
    Shoal__Plan *p = plan_of(&e4b, 1, 1, SH_KV_BF16);
    sh_cost_model m = model_of(&e4b, p);
    sh_workload w = {.bin = {{.prompt = 513, .output = 100, .requests = 1000}}, .n = 1, .requests = 1000};
    sh_forecast f;
    sh_forecast_rank rank[2];
    times t = times_of(&m);
    CU_ASSERT_TRUE_FATAL(t.prompts < t.decode);
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 10, 1, &f, rank), SH_OK);
    double read = t.prompts + t.decode / 2, rate = 10 / (100 * t.decode + read);
    near(f.requests / rate, 1, 2e-3, "requests per second");
    CU_ASSERT_FALSE(f.prompts.slower);
    near(f.prompts.first / read, 1, 1e-3, "read");
    near(f.prompts.handing, rate * read, 0.02, "being read");
    near(f.mix.decode, 10 - rate * read, 0.02, "decoding");
    near(f.tokens_in / f.tokens_out, 5.13, 1e-9, "in and out");
    /* those that fill up, those that run out: half of 100 tokens, for all lengths are the same */
    double fill = f.mix.decode * t.decode; /* a micro-batch of prompts for each step */
    near(f.seconds / (1000 / rate + read + fill * (1 + 10.0 / 1000) / 2 + (100 - 50 - 50 * 0.01) * t.decode), 1, 2e-3,
         "the whole job");
    near(rank[1].idle / t.decode, 1 - f.mix.requests * t.prompts / t.decode, 2e-3, "it waits for prompts");
    near(rank[0].idle / t.decode, 0, 1e-3, "always at work");
    near(rank[0].sent[SH_FORECAST_WIRES - 1], 0, 0, "sends none");
    double sent =
        f.mix.requests * 512 * (4 * 4096 + 20 * 2048); /* E4B: 4 global, 20 sliding producers, 511 of 512 rows */
    near(rank[1].sent[SH_FORECAST_WIRES - 1] / sent, 1, 0.01, "sends rows");
    sh_plan_free(&p);
}

/* 8 micro-batches to a prompt, two tokens out: the ranks that decode wait. */
static void test_prompts_set_the_pace(void) {
    Shoal__Plan *p = plan_of(&e4b, 1, 1, SH_KV_BF16);
    sh_cost_model m = model_of(&e4b, p);
    sh_workload w = {.bin = {{.prompt = 4097, .output = 2, .requests = 1000}}, .n = 1, .requests = 1000};
    sh_forecast f, two;
    sh_forecast_rank rank[2];
    times t = times_of(&m);
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 10, 1, &f, rank), SH_OK);
    near(f.requests * 8 * t.prompts, 1, 2e-3, "requests per second");
    CU_ASSERT_TRUE(f.prompts.slower);
    near(f.prompts.rows * t.prompts, 512, 1, "rows per second");
    near(10 - f.prompts.handing, f.requests * 2 * t.decode, 0.01, "decoding");
    near(rank[1].idle / f.cycle.period, 0, 3e-3, "always at work");
    near(rank[0].idle / f.cycle.period, 1 - f.requests * 2 * t.decode, 5e-3, "waits");
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 10, 2, &two, NULL), SH_OK);
    near(two.tokens_out / f.tokens_out, 2, 1e-9, "replicas");
    m.net.between.bandwidth = 1e-3; /* rows that do not fit beside the computing */
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 10, 1, &two, rank), SH_OK);
    CU_ASSERT_TRUE(two.requests < 0.5 * f.requests && two.prompts.exposed > 0 && rank[1].exchange > rank[1].idle);
    m.net.between.bandwidth = 1e30;
    m.prompts = 1; /* no more than one has pages */
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 10, 1, &two, NULL), SH_OK);
    double landing = fmin(1, two.requests * 2 * t.decode) * t.decode / 2; /* until rank 0 has heard of its last row */
    near(two.requests * (8 * t.prompts + landing), 1, 2e-3, "one fills a chunk, and the next one waits for its pages");
    w.bin[0].prompt = 65; /* but not this one */
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 10, 1, &two, NULL), SH_OK);
    near(two.mix.piece, 64, 1e-6, "rows at a time");
    sh_plan_free(&p);
}

/* Three ranks that read, and pages for one prompt: it must be through all of them before the next one begins. With
 * pages for more they follow each other, as closely as the busiest rank allows. */
static void test_pages_set_the_pace(void) {
    Shoal__Plan *p = plan_of(&e4b, 1, 3, SH_KV_BF16);
    sh_cost_model m = model_of(&e4b, p);
    sh_workload w = {.bin = {{.prompt = 65, .output = 2, .requests = 1000}}, .n = 1, .requests = 1000};
    sh_cost_span one = {.seqs = 1, .rows = 1, .kept = 1, .lo = 9, .hi = 9}, piece = {.seqs = 1, .rows = 64};
    sh_cost_rank d;
    sh_cost_prompt_rank r[3];
    sh_cost_taken t;
    sh_forecast f;
    CU_ASSERT_EQUAL(sh_cost_step(&m, &one, 1, &d), SH_OK);
    CU_ASSERT_EQUAL(sh_cost_prompts(&m, &piece, 1, r, &t), SH_OK);
    double step = d.seconds + SH_STEP_SECONDS, through = 0, busiest = 0;
    for (int i = 0; i < 3; i++) {
        through += r[i].step.seconds + SH_STEP_SECONDS;
        busiest = fmax(busiest, r[i].step.seconds + SH_STEP_SECONDS);
    }
    m.prompts = 1;
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 10, 1, &f, NULL), SH_OK);
    double decoding = f.requests * 2 * step;       /* less than one */
    double landing = fmin(1, decoding) * step / 2; /* until rank 0 looks, where it has a step under way */
    near(f.requests * (through + landing), 1, 2e-3, "one at a time");
    near(f.prompts.rows / (f.requests * 64), 1, 2e-3, "rows per second");
    CU_ASSERT_TRUE(f.prompts.slower);
    m.prompts = 8; /* a chunk is full: as with pages for all */
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 10, 1, &f, NULL), SH_OK);
    CU_ASSERT_TRUE(f.prompts.rows * fmax(busiest, through / 4) < 512 * 1.002);
    double all = f.prompts.rows;
    m.prompts = 1000;
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 10, 1, &f, NULL), SH_OK);
    CU_ASSERT_TRUE(f.prompts.rows >= all);
    sh_plan_free(&p);
}

/* Short prompts and long ones: a row travels with those of its own prompt, and most rows are of long ones. */
static void test_usual_piece(void) {
    Shoal__Plan *p = plan_of(&e4b, 1, 1, SH_KV_BF16);
    sh_cost_model m = model_of(&e4b, p);
    sh_workload w = {
        .bin = {{.prompt = 11, .output = 1000, .requests = 900}, {.prompt = 401, .output = 1000, .requests = 100}},
        .n = 2,
        .requests = 1000};
    sh_forecast f;
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 4, 1, &f, NULL), SH_OK);
    CU_ASSERT_FALSE(f.prompts.slower);
    near(f.mix.piece, (900 * 10 * 10 + 100 * 400 * 400) / (900.0 * 10 + 100 * 400), 1e-6,
         "rows of a usual row's piece");
    sh_plan_free(&p);
}

/* What crosses the cut into the second stage and the K/V that it stores come over the same link. */
static void test_shared_link(void) {
    const sh_plan_request q = {.pp = 2, .prefill = 1, .cuts = "1", .mode = SH_MODE_BF16, .kv = SH_KV_BF16};
    Shoal__Plan *p = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_plan_make(&e4b, &q, &p), SH_OK);
    sh_cost_model m = model_of(&e4b, p);
    sh_workload w = {.bin = {{.prompt = 65, .output = 400, .requests = 1000}}, .n = 1, .requests = 1000};
    sh_cost_rank d[2];
    sh_cost_prompt_rank r;
    sh_cost_taken t[2];
    sh_forecast f;
    sh_cost_span piece = {.seqs = 8, .rows = 64};
    CU_ASSERT_EQUAL(sh_cost_prompts(&m, &piece, 1, &r, t), SH_OK);
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 200, 1, &f, NULL), SH_OK);
    CU_ASSERT_EQUAL(sh_cost_step(&m, f.mix.span, f.mix.n_decode, d), SH_OK);
    double alone = f.cycle.period, cut = d[0].cut.bytes, kv = f.mix.requests * t[1].far / 8;
    CU_ASSERT_TRUE_FATAL(kv > cut / 10 && f.mix.requests * r.rows.bytes / 8 < 0.9 * cut);
    m.net.between.bandwidth = cut / (0.97 * alone); /* each of them hides behind computing */
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 200, 1, &f, NULL), SH_OK);
    CU_ASSERT_EQUAL(sh_cost_step(&m, f.mix.span, f.mix.n_decode, d), SH_OK);
    double both = (f.mix.requests * t[1].far / 8 + d[0].cut.bytes) / m.net.between.bandwidth;
    CU_ASSERT_TRUE(both > 1.2 * alone && !f.prompts.slower);
    near(f.cycle.period / both, 1, 1e-9, "both on one link");
    sh_plan_free(&p);
}

/* Prompts of one token are decode rows: those ranks have nothing to do. */
static void test_no_prompts(void) {
    Shoal__Plan *p = plan_of(&e4b, 1, 1, SH_KV_BF16);
    sh_cost_model m = model_of(&e4b, p);
    sh_workload w = {.bin = {{.prompt = 1, .output = 10, .requests = 100}}, .n = 1, .requests = 100};
    sh_forecast f;
    sh_forecast_rank rank[2];
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 4, 1, &f, rank), SH_OK);
    near(f.tokens_out * times_of(&m).decode, 4, 1e-6, "decode alone");
    near(rank[1].seconds[SH_CAUSE_WEIGHTS], 0, 0, "nothing to do");
    sh_plan_free(&p);
}

/* A pipeline that only decodes goes round as sh_cost_ring plays it, apart from where its some hundred beats are cut
 * off.
 */
static void test_ring(void) {
    Shoal__Plan *p = plan_of(&e4b, 3, 1, SH_KV_BF16);
    sh_cost_model m = model_of(&e4b, p);
    sh_workload w = {.bin = {{.prompt = 2, .output = 1e5, .requests = 1e6}}, .n = 1, .requests = 1e6};
    for (int seqs = 1; seqs <= 4; seqs++)
        for (int slow = 0; slow < 2; slow++) {
            sh_forecast f;
            sh_forecast_rank rank[4];
            sh_cost_cycle c;
            m.net.between.latency = slow ? 3e9 : 0; /* as long as a stage or so */
            CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, seqs, 1, &f, rank), SH_OK);
            double seconds[6], link[6];
            for (int s = 0; s < 6; s++) {
                const sh_forecast_rank *r = &rank[s % 3];
                seconds[s] = r->seconds[0] + r->seconds[1] + r->seconds[2] + r->seconds[3] + r->exchange;
                link[s] = m.net.between.latency;
            }
            CU_ASSERT_EQUAL(sh_cost_ring(3, seconds, link, 0, fmin(3, seqs), &c), SH_OK);
            near(f.cycle.period / c.period, 1, 5e-3, "period");
            near(f.cycle.round_trip / c.round_trip, 1, 5e-3, "round");
            CU_ASSERT_EQUAL(f.cycle.slowest, c.slowest);
        }
    sh_plan_free(&p);
}

/* Written, read back and explained: the same plan. */
static void test_file(void) {
    sh_cluster k = {.nodes = 3,
                    .packages = 1,
                    .numa = 1,
                    .cores = 16,
                    .memory = 64 * 0x1p30,
                    .read = 60e9,
                    .fma = 1e12,
                    .spanning = 0.7};
    k.within = k.between = (sh_cost_link){20e-6, 3e9};
    k.kernels =
        (sh_cost_rates){.weights_read = 0.9, .weights_fma = 0.8, .attention = {.read = 0.6, .fma = 0.5}, .layer = 2e-5};
    sh_workload w = sh_workload_default();
    sh_search_options o = {.config = &e2b,
                           .cluster = &k,
                           .workload = &w,
                           .fixed = {.mode = SH_MODE_BF16, .kv = SH_KV_BF16, .ranks = 3, .prefill = 1}};
    sh_search *s = NULL;
    sh_buf out;
    CU_ASSERT_EQUAL_FATAL(sh_search_run(&o, &s), SH_OK);
    CU_ASSERT_EQUAL_FATAL(s->n, 1);
    CU_ASSERT_TRUE(s->best[0].shape.pp == 2 && s->best[0].shape.prefill == 1 && s->best[0].plan->n_rank == 3);
    sh_buf_init(&out, 0);
    CU_ASSERT_EQUAL(sh_explain_plan(&o, &s->best[0], &out), SH_OK);
    CU_ASSERT_PTR_NOT_NULL(strstr((const char *)out.data, "pipeline of 2 stages + 1 rank that only reads prompts"));
    CU_ASSERT_PTR_NOT_NULL(strstr((const char *)out.data, "  prompts    "));
    CU_ASSERT_PTR_NOT_NULL(strstr((const char *)out.data, "K/V of prompts"));
    sh_buf_release(&out);
    o.fixed.prefill = 3;
    sh_search *none = NULL;
    CU_ASSERT_EQUAL(sh_search_run(&o, &none), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "--prefill: 3 of 3 ranks: allowed are 0 to 2: one at least must decode");
    o.fixed.prefill = 1;
    o.fixed.tp = 2;
    CU_ASSERT_EQUAL(sh_search_run(&o, &none), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "--prefill 1, --ep 1, --tp 2, --cp 1: prompts are handed over"));
    o.fixed = (sh_plan_request){.ranks = 4, .pp = 2, .prefill = 1};
    CU_ASSERT_EQUAL(sh_search_run(&o, &none), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "3 ranks that decode: 2 stages of 1 ranks"));
    sh_search_free(&s);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("prefill cost", load, NULL);
    CU_add_test(s, "rows on the link", test_rows);
    CU_add_test(s, "rows of a prompt", test_prompt);
    CU_add_test(s, "rows that several store", test_mirrors);
    CU_add_test(s, "what is computed", test_work);
    CU_add_test(s, "links", test_links);
    CU_add_test(s, "decode sets the pace", test_decode_sets_the_pace);
    CU_add_test(s, "prompts set the pace", test_prompts_set_the_pace);
    CU_add_test(s, "pages set the pace", test_pages_set_the_pace);
    CU_add_test(s, "a usual piece", test_usual_piece);
    CU_add_test(s, "a link for cuts and K/V", test_shared_link);
    CU_add_test(s, "no prompts", test_no_prompts);
    CU_add_test(s, "the ring of those that decode", test_ring);
    CU_add_test(s, "search and words", test_file);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + (CU_get_number_of_suites_failed() != 0);
    CU_cleanup_registry();
    return failed != 0;
}
