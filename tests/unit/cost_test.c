/* The cost model against the tables of the model description: bytes, operations, traffic; and the ring. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "model/gemma4.h"
#include "partition/cost.h"
#include "partition/cost_int.h"
#include "partition/forecast.h"

static sh_config e2b, e4b, b31, a4b;
/* Reading and arithmetic at 1 per second and everything else for nothing: seconds are bytes or operations. */
static const sh_cost_rates reading = {
    .read = 1, .fma = 1e30, .weights_read = 1, .weights_fma = 1, .attention = {.read = 1, .fma = 1}};
static const sh_cost_link free_link = {.latency = 0, .bandwidth = 1e30};

static int load(void) {
    return sh_config_load(SH_TEST_DATA "/configs/e2b", &e2b) || sh_config_load(SH_TEST_DATA "/configs/e4b", &e4b) ||
           sh_config_load(SH_TEST_DATA "/configs/31b", &b31) || sh_config_load(SH_TEST_DATA "/configs/26b-a4b", &a4b);
}

static Shoal__Plan *plan_of(const sh_config *c, sh_plan_request r) {
    Shoal__Plan *p = NULL;
    sh_status st = sh_plan_make(c, &r, &p);
    if (st != SH_OK) printf("\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    return p;
}

static sh_cost_model model_of(const sh_config *c, const Shoal__Plan *p) {
    return (sh_cost_model){
        .config = c, .plan = p, .rates = &reading, .alike = true, .net = {free_link, free_link, .ranks_per_node = 1}};
}

static const sh_plan_request bf16 = {.mode = SH_MODE_BF16, .kv = SH_KV_BF16};

static void near(double got, double want, double tolerance, const char *what) {
    if (!(fabs(got - want) <= tolerance)) printf("\n%s: %.6g, should be %.6g\n", what, got, want);
    CU_ASSERT_TRUE(fabs(got - want) <= tolerance);
}

static sh_cost_span decode(double rows, double context) {
    return (sh_cost_span){.seqs = rows, .rows = 1, .kept = 1, .lo = context - 1, .hi = context - 1};
}

/* One rank, one decode step. */
static sh_cost_rank alone(const sh_config *c, double rows, double context) {
    Shoal__Plan *p = plan_of(c, bf16);
    sh_cost_model m = model_of(c, p);
    sh_cost_span s = decode(rows, context);
    sh_cost_rank r;
    CU_ASSERT_EQUAL(sh_cost_step(&m, &s, 1, &r), SH_OK);
    sh_plan_free(&p);
    return r;
}

/* gemma4-text §2.8: GiB of weights read per decode step. */
static void test_weight_bytes(void) {
    static const struct {
        int batch;
        double e2b, e4b, a4b, b31;
    } row[] = {{1, 4.25, 8.65, 7.12, 57.18},
               {2, 4.25, 8.65, 9.61, 57.18},
               {4, 4.25, 8.65, 14.14, 57.18},
               {8, 4.25, 8.65, 21.62, 57.18},
               {16, 4.25, 8.65, 31.85, 57.18}};
    const sh_config *config[] = {&e2b, &e4b, &a4b, &b31};
    for (size_t i = 0; i < sizeof row / sizeof *row; i++)
        for (int k = 0; k < 4; k++) {
            double want[] = {row[i].e2b, row[i].e4b, row[i].a4b, row[i].b31};
            sh_cost_rank r = alone(config[k], row[i].batch, 1);
            double gib = (r.part[SH_CAUSE_WEIGHTS].bytes + r.part[SH_CAUSE_EXPERTS].bytes) / 0x1p30;
            near(gib, want[k], 0.006, config[k]->variant);
        }
    Shoal__Plan *p = plan_of(&a4b, bf16);
    sh_cost_model m = model_of(&a4b, p);
    static const double touched[][2] = {{1, 8}, {2, 15.5}, {4, 29.1}, {32, 111.8}, {64, 125.9}, {128, 128}};
    for (size_t i = 0; i < sizeof touched / sizeof *touched; i++) {
        sh_cost_span s = decode(touched[i][0], 10);
        sh_cost_layer l;
        CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 3, &s, 1, &l), SH_OK);
        near(l.experts_touched, touched[i][1], 0.06, "distinct experts");
        near(l.experts.flops, 2 * touched[i][0] * 8 * 3 * 2816 * 704, 1, "operations of experts");
    }
    sh_plan_free(&p);
}

/* §2.6: MiB of KV read per decoded token; §2.7: GFLOP. */
static void test_attention(void) {
    static const struct {
        int context;
        double mib[4];
        double gflop[4];
    } row[] = {{8192, {126, 259, 280, 1120}, {1.06, 1.09, 1.76, 7.05}},
               {32768, {462, 931, 520, 2080}, {3.9, 3.9, 5.8, 23.2}},
               {131072, {1806, 3619, 1480, 5920}, {15.2, 15.2, 21.9, 87.6}}};
    static const double weights[] = {3.75, 7.95, 6.17, 58.57}, head[] = {0.81, 1.34, 1.48, 2.82};
    const sh_config *config[] = {&e2b, &e4b, &a4b, &b31};
    for (size_t i = 0; i < 3; i++)
        for (int k = 0; k < 4; k++) {
            sh_cost_rank r = alone(config[k], 1, row[i].context);
            near(r.part[SH_CAUSE_ATTENTION].bytes / 0x1p20, row[i].mib[k], 1, "KV bytes");
            near(r.part[SH_CAUSE_ATTENTION].flops * 1e-9, row[i].gflop[k], 0.06, "attention operations");
            double all = r.part[SH_CAUSE_WEIGHTS].flops + r.part[SH_CAUSE_EXPERTS].flops;
            near(all * 1e-9, weights[k] + head[k], 0.02, "operations of weights");
        }
}

/* A prompt: rows below first_shared pass all layers, others stop there; windows bound what is seen. */
static void test_prompt(void) {
    static const struct {
        const sh_config *c;
        double tokens, saved;
    } row[] = {{&e2b, 1024, 0.69}, {&e2b, 8192, 0.68}, {&e4b, 1024, 0.42}, {&e4b, 8192, 0.42}};
    for (size_t i = 0; i < 4; i++) {
        sh_config whole = *row[i].c;
        double flops[2];
        for (int k = 0; k < 2; k++) {
            Shoal__Plan *p = plan_of(&whole, (sh_plan_request){.mode = SH_MODE_BF16, .kv = SH_KV_BF16, .chunk = 8192});
            sh_cost_model m = model_of(&whole, p);
            sh_cost_span s = {.seqs = 1, .rows = row[i].tokens, .kept = k ? row[i].tokens : 1};
            sh_cost_rank r;
            CU_ASSERT_EQUAL(sh_cost_step(&m, &s, 1, &r), SH_OK);
            flops[k] = r.part[SH_CAUSE_WEIGHTS].flops + r.part[SH_CAUSE_ATTENTION].flops -
                       2 * s.kept * whole.vocab * (double)whole.hidden;
            sh_plan_free(&p);
        }
        near(1 - flops[0] / flops[1], row[i].saved, 0.011, "saved in a prompt");
    }
    Shoal__Plan *p = plan_of(&b31, bf16);
    sh_cost_model m = model_of(&b31, p);
    sh_cost_span s = {.seqs = 1, .rows = 100, .kept = 0, .lo = 5000, .hi = 5000};
    sh_cost_layer l;
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK); /* sliding, 1,024 keys each */
    near(l.attention.flops, 4.0 * 32 * 256 * 100 * 1024, 1, "window");
    near(l.attention.bytes, (1023 + 100) * 16384.0, 1, "window");
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 5, &s, 1, &l), SH_OK); /* global: 5,001 … 5,100 keys */
    near(l.attention.flops, 4.0 * 32 * 512 * (100 * 5050.5), 1, "causal");
    near(l.attention.bytes, 5100 * 4096.0, 1, "causal");
    strcpy(p->kv, "q8"); /* a scale of 4 bytes for each 64 codes */
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 5, &s, 1, &l), SH_OK);
    near(l.attention.bytes, 5100 * 2176.0, 1, "causal, q8");
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 60, &s, 1, &l), SH_EINPUT);
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 1, 5, &s, 1, &l), SH_EINPUT);
    sh_plan_free(&p);
}

/* What crosses a cut is what the model sends. */
static void test_cuts(void) {
    const sh_config *config[] = {&e2b, &e4b, &a4b, &b31};
    for (int k = 0; k < 4; k++)
        for (int cut = 0; cut <= config[k]->n_layers; cut++)
            for (int kv = 0; kv < SH_KV_TYPES; kv++) {
                double want = (double)sh_model_cut_bytes(config[k], (sh_kv_type)kv, cut, 37, 5);
                near(sh_cost_cut_bytes(config[k], (sh_kv_type)kv, cut, 37, 5), want, 0, "cut");
            }
}

/* The members of a stage send what they have: own rows, own heads, what they store. */
static void test_member_cuts(void) {
    double hidden = 2 * 2560 * 4.0, sliding = 2048,
           global = 4096; /* E4B after layer 25: both producers are before it */
    for (int way = 0; way < 3; way++) {
        sh_plan_request q = bf16;
        q.cuts = "26";
        q.tp = way == 1 ? 2 : 1;
        q.cp = way == 2 ? 2 : 1;
        Shoal__Plan *p = plan_of(&e4b, q);
        sh_cost_model m = model_of(&e4b, p);
        sh_cost_span s = {.seqs = 1, .rows = 80, .kept = 8, .lo = 0, .hi = 0};
        sh_cost_rank r[4];
        CU_ASSERT_EQUAL(sh_cost_step(&m, &s, 1, r), SH_OK);
        double want = 8 * hidden + 80 * (sliding + global);
        if (way == 1) want = 8 * hidden + 80 * (sliding + global) / 2;
        if (way == 2) want = 4 * hidden + 80 * sliding + 40 * global;
        near(r[0].cut.bytes, want, 1e-6, "cut");
        sh_plan_free(&p);
    }
}

/* §2.9: r(R) other ranks per token; dispatch of one row to each, one row per chosen expert back. */
static void test_expert_traffic(void) {
    static const struct {
        int ranks;
        double dispatch; /* bytes in bf16, half of the table's, which has both ways */
    } row[] = {{2, 11229 / 2.0}, {4, 30658 / 2.0}, {8, 52625 / 2.0}, {16, 69659 / 2.0}};
    for (size_t i = 0; i < 4; i++)
        for (int exact = 0; exact < 2; exact++) {
            sh_plan_request q = bf16;
            q.ep = row[i].ranks;
            if (exact) q.mode = SH_MODE_EXACT;
            Shoal__Plan *p = plan_of(&a4b, q);
            sh_cost_model m = model_of(&a4b, p);
            sh_cost_span s = decode(3, 100);
            sh_cost_layer l;
            CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 1, 2, &s, 1, &l), SH_OK);
            near(l.dispatch.bytes, 3 * row[i].dispatch * (1 + exact), 4, "dispatch");
            double back = 8 * (1 - 1.0 / row[i].ranks) * 2816 * (exact ? 4 : 2);
            near(l.results.bytes, 3 * back, 1e-6, "results");
            CU_ASSERT_EQUAL(l.dispatch.messages, row[i].ranks - 1);
            /* its own experts, rows of all lanes */
            double own = 128.0 / row[i].ranks, all = 3.0 * row[i].ranks;
            near(l.experts_touched, own * (1 - pow(1 - 8.0 / 128, all)), 1e-9, "own experts");
            near(l.experts.flops, 2 * 3 * 8 * 3 * 2816.0 * 704, 1, "work is even");
            sh_plan_free(&p);
        }
}

/* One expert takes half of the rows; a copy of it halves what its rank has to do. */
static void test_routing(void) {
    sh_routing *measured = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_routing_create(&a4b, &measured), SH_OK);
    for (int l = 0; l < 30; l++)
        for (int e = 0; e < 128; e++) measured->chosen[l * 128 + e] = e == 0 ? 127 * 500 : 7500;
    sh_plan_request q = bf16;
    q.ep = 2;
    Shoal__Plan *p = plan_of(&a4b, q);
    sh_cost_model m = model_of(&a4b, p);
    m.routing = measured;
    sh_cost_span s = decode(100, 100);
    sh_cost_layer a, b;
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 2, &s, 1, &a), SH_OK);
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 1, 2, &s, 1, &b), SH_OK);
    near(a.experts.flops / (2 * 3 * 2816.0 * 704), 200 * (0.5 + 63 * 7.5 / 127), 1e-6, "hot");
    near(b.experts.flops / (2 * 3 * 2816.0 * 704), 200 * 64 * 7.5 / 127, 1e-6, "cool");
    sh_cost_rank r[2];
    CU_ASSERT_EQUAL(sh_cost_step(&m, &s, 1, r), SH_OK);
    near(r[0].seconds, r[1].seconds, 1e-6, "members meet");
    CU_ASSERT_TRUE(r[1].waits > 0 || r[0].waits > 0);
    sh_plan_free(&p);
    q.routing = measured; /* placed by the counts, with room for copies */
    q.replicate = (uint64_t)1 << 30;
    p = plan_of(&a4b, q);
    m.plan = p;
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 2, &s, 1, &a), SH_OK);
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 1, 2, &s, 1, &b), SH_OK);
    near(a.experts.flops / b.experts.flops, 1, 0.03, "a copy of the hot one evens it out");
    sh_plan_free(&p);
    sh_routing_destroy(&measured);
}

/* 31B by gathering: about 10 MB per token and other member (design section 5); by summing a quarter. */
static void test_tensor_traffic(void) {
    double bytes[2];
    for (int sum = 0; sum < 2; sum++) {
        sh_plan_request q = bf16;
        q.tp = 2;
        q.tp_sum = sum;
        Shoal__Plan *p = plan_of(&b31, q);
        sh_cost_model m = model_of(&b31, p);
        sh_cost_span s = decode(1, 100);
        sh_cost_rank r[2];
        CU_ASSERT_EQUAL(sh_cost_step(&m, &s, 1, r), SH_OK);
        bytes[sum] = r[0].gather.bytes + r[1].gather.bytes;
        /* half of the columns each: the head too */
        near(r[1].part[SH_CAUSE_WEIGHTS].flops, (58.57 + 2.82) * 1e9 / 2, 2e7, "half of the work");
        CU_ASSERT_EQUAL(r[0].head.bytes, 0);
        CU_ASSERT_TRUE(r[1].head.bytes > 0);
        sh_plan_free(&p);
    }
    double gather = 60 * (32 * 256 + 2 * 5376 + 21504) * 4.0 + 10 * 32 * 256 * 4.0;
    near(bytes[0], gather, 1, "gathered");
    near(gather * 1e-6, 10, 0.1, "10 MB");
    near(bytes[1], 60 * 2 * 2 * 5376 * 4.0, 1, "summed"); /* both members' whole rows */
}

static void test_context_traffic(void) {
    sh_plan_request q = bf16;
    q.cp = 4;
    Shoal__Plan *p = plan_of(&b31, q);
    sh_cost_model m = model_of(&b31, p);
    sh_cost_span s = {.seqs = 1, .rows = 400, .kept = 1, .lo = 64000, .hi = 64000};
    sh_cost_layer l;
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK); /* sliding: own K/V rows to the three others */
    near(l.context.bytes, 100 * 3 * 16384, 1e-6, "sliding");
    near(l.project.flops, 2 * 100 * (88.08e6 + 44.04e6), 1e7, "own rows");
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 5, &s, 1, &l), SH_OK); /* 503 segments: 8 blocks of 64 */
    double want = 100 * 0.75 * (4096 + 4 * 32 * 512 * 4.0) + 100 * 0.75 * 8 * 32 * 514 * 4.0;
    near(l.context.bytes, want, 1, "global");
    near(l.attention.bytes, 64400 * 4096.0 / 4, 1, "its part of the keys");
    sh_cost_rank r[4];
    CU_ASSERT_EQUAL(sh_cost_step(&m, &s, 1, r), SH_OK);
    CU_ASSERT_EQUAL(r[0].head.bytes, 0);
    near(r[2].head.bytes, 5376, 1e-6, "its share of the kept row");
    /* not what an average row sees, but the sum over rows */
    double q1 = 32 * 512 * 4.0, part = 32 * 514 * 4.0;
    s = (sh_cost_span){.seqs = 1, .rows = 400, .kept = 1, .lo = 0, .hi = 0}; /* 128, 128, 128, 16 rows see 1, 2, 3, 4 */
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 5, &s, 1, &l), SH_OK);
    near(l.context.bytes, 100 * 0.75 * 4096 + (128 * 6 + 16 * 4) * 3 / 16.0 * (q1 + part), 1, "blocks of each row");
    s = (sh_cost_span){.seqs = 2, .rows = 2, .kept = 2, .lo = 639, .hi = 639}; /* 5 blocks, then 6 */
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 5, &s, 1, &l), SH_OK);
    near(l.context.bytes, 0.75 * 4096 + 2 * 3 / 16.0 * (8 * q1 + 11 * part), 1e-3, "no more owners than members");
    s.tokens = 64400; /* blocks of 8,192: a row sees one */
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 5, &s, 1, &l), SH_OK);
    near(l.context.bytes, 0.75 * 4096 + 2 * 3 / 16.0 * (2 * q1 + 2 * part), 1e-3, "the whole sequence sets their size");
    sh_plan_free(&p);
}

/* K/V of a message are filled up to a multiple of 64 bytes: rows whose bytes are none. */
static void test_filled_rows(void) {
    sh_config odd = b31;
    for (int i = 0; i < odd.n_layers; i++) odd.layer[i].kv_heads = 1;
    for (int i = 0; i < odd.n_layers; i++) odd.layer[i].head_dim = odd.layer[i].kind == SH_KV_GLOBAL ? 32 : 16;
    sh_plan_request q = {.mode = SH_MODE_BF16, .kv = SH_KV_Q8, .cp = 2};
    Shoal__Plan *p = plan_of(&odd, q);
    sh_cost_model m = model_of(&odd, p);
    sh_cost_layer l;
    static const double rows[] = {2, 3, 4, 16}, filled[] = {64, 96, 128, 320}; /* 40 bytes a row: of 1, 1 or 2, 2, 8 */
    for (int i = 0; i < 4; i++) {
        sh_cost_span s = {.seqs = 1, .rows = rows[i], .kept = 1};
        CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK);
        near(l.context.bytes, filled[i], 1e-9, "sliding");
        CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 5, &s, 1, &l), SH_OK); /* K = V: 36 bytes; half of them elsewhere */
        double others = rows[i] / 4 * 32 * (32 + 34) * 4, stored = rows[i] / 4;
        near(l.context.bytes, (stored < 1 ? stored * 64 : stored > 1 ? 192 : 64) + others, 1e-9, "global");
    }
    sh_plan_free(&p);
}

/* Products of 8 and 4 bits have rates of their own where these were measured. */
static void test_quantised_rates(void) {
    sh_cost_rates r = {.read = 100e9, .fma = 1e12, .weights_read = 0.9, .weights_fma = 0.8};
    near(sh_cost_products_rate(&r, SH_MODE_BF16), 0.8e12, 1, "bf16");
    near(sh_cost_products_rate(&r, SH_MODE_Q8), 0.8e12 * SH_COST_INT8, 1, "q8, not measured");
    near(sh_cost_weights_read(&r, SH_MODE_Q4), 90e9, 1, "reading q4, not measured");
    r.q8_read = 0.5, r.q8_fma = 1.2, r.q4_read = 0.4, r.q4_fma = 1.1;
    near(sh_cost_products_rate(&r, SH_MODE_EXACT), 0.8e12, 1, "exact");
    near(sh_cost_products_rate(&r, SH_MODE_Q8), 1.2e12, 1, "q8");
    near(sh_cost_products_rate(&r, SH_MODE_Q4), 1.1e12, 1, "q4");
    near(sh_cost_weights_read(&r, SH_MODE_BF16), 90e9, 1, "reading bf16");
    near(sh_cost_weights_read(&r, SH_MODE_Q8), 50e9, 1, "reading q8");
    near(sh_cost_weights_read(&r, SH_MODE_Q4), 40e9, 1, "reading q4");
}

/* Few rows take longer each than many, where that was measured. */
static void test_few_rows(void) {
    sh_cost_rates r = {.read = 1e15, .fma = 1e12, .weights_read = 1, .weights_fma = 1, .q4_fma = 2};
    for (double n = 0; n < 100; n += 0.5) near(sh_cost_paid_rows(&r, SH_MODE_Q4, n), n, 0, "not measured");
    memcpy(r.q4_few, (double[]){3, 5, 10, 16, 16, 40}, sizeof r.q4_few);
    static const double rows[][2] = {{0, 0},   {0.5, 1.5}, {1, 3},   {1.5, 4},  {2, 5},   {3, 7.5},
                                     {4, 10},  {8, 16},    {12, 16}, {16, 16},  {24, 28}, {32, 40},
                                     {48, 52}, {64, 64},   {65, 65}, {200, 200}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        near(sh_cost_paid_rows(&r, SH_MODE_Q4, rows[i][0]), rows[i][1], 1e-12, "measured");
    for (double n = 0, before = 0; n < 100; n += 1.0 / 64) {
        double now = sh_cost_paid_rows(&r, SH_MODE_Q4, n);
        CU_ASSERT_TRUE(now >= before && now - before <= 3.0 / 64 + 1e-12); /* no jump, never less */
        before = now;
    }
    near(sh_cost_paid_rows(&r, SH_MODE_BF16, 8), 8, 0, "of its own mode");
    near(sh_cost_paid_rows(&r, SH_MODE_Q8, 8), 8, 0, "of its own mode");
    Shoal__Plan *p = plan_of(&a4b, (sh_plan_request){.mode = SH_MODE_Q4, .kv = SH_KV_BF16});
    sh_cost_model m = model_of(&a4b, p);
    m.rates = &r;
    sh_cost_span s = decode(128, 1024); /* 8 rows to each expert, 128 to the rest */
    sh_cost_layer l;
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK);
    double expert = 2.0 * 3 * 2816 * 704, dense = 2.0 * 3 * 2816 * 2112, each = 128 * 8 / l.experts_touched;
    near(l.experts.seconds, l.experts_touched * expert * sh_cost_paid_rows(&r, SH_MODE_Q4, each) / 2e12, 1e-9,
         "experts");
    near(l.experts.flops, 128 * 8 * expert, 1, "what is computed");
    near(l.dense.seconds, 128 * dense / 2e12, 1e-9, "many rows");
    s = decode(2, 1024);
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK);
    near(l.dense.seconds, 5 * dense / 2e12, 1e-9, "few rows");
    near(l.dense.flops, 2 * dense, 1, "what is computed");
    sh_plan_free(&p);
}

/* Rows that meet a key pay as those that meet a weight; formed keys cost rows more; both are off where not measured. */
static void test_attention_rows(void) {
    sh_cost_rates r = {
        .read = 1e15, .fma = 1e12, .weights_read = 1, .weights_fma = 1, .attention = {.read = 1, .fma = 0.5}};
    Shoal__Plan *p = plan_of(&a4b, (sh_plan_request){.mode = SH_MODE_Q4, .kv = SH_KV_BF16});
    sh_cost_model m = model_of(&a4b, p);
    m.rates = &r;
    sh_cost_span s = decode(10, 4096);
    sh_cost_layer l;
    const double sliding = 4.0 * 16 * 256 * 10 * 1024, global = 4.0 * 16 * 512 * 10 * 4096; /* 2 and 8 rows to a key */
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK);
    near(l.attention.seconds, sliding / 0.5e12, 1e-9, "not measured");
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 5, &s, 1, &l), SH_OK);
    near(l.attention.seconds, global / 0.5e12, 1e-9, "not measured, K = V");
    memcpy(r.attention.few, (double[]){3, 5, 10, 16, 16, 40}, sizeof r.attention.few);
    r.attention.formed = 4;
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK);
    near(l.attention.seconds, sliding * 5 / 2 / 0.5e12, 1e-9, "two rows");
    near(l.attention.flops, sliding, 1, "what is computed");
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 5, &s, 1, &l), SH_OK);
    near(l.attention.seconds, global * (16 + 4) / 8 / 0.5e12, 1e-9, "eight rows and what forming costs");
    near(l.attention.flops, global, 1, "what is computed");
    sh_cost_span prompt = {.seqs = 1, .rows = 128, .lo = 0, .hi = 0, .kept = 1}; /* 516 rows to a key */
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 5, &prompt, 1, &l), SH_OK);
    double pairs = 128 * 129 / 2.0;
    near(l.attention.seconds, 4.0 * 16 * 512 * pairs * (1 + 4.0 / 64) / 0.5e12, 1e-9, "formed for each block of rows");
    r.attention.both = 0.5;
    r.read = 1e9;
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK);
    near(l.attention.seconds, 10 * 1024 * 8192 / 1e9 + 0.5 * sliding * 5 / 2 / 0.5e12, 1e-9, "both");
    sh_plan_free(&p);
    p = plan_of(&a4b, (sh_plan_request){.mode = SH_MODE_Q4, .kv = SH_KV_Q8});
    m = model_of(&a4b, p);
    m.rates = &r;
    double pages = 10 * 1024 * (double)sh_layer_kv_bytes(&a4b.layer[0], SH_KV_Q8);
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK);
    near(l.attention.seconds, pages / 1e9 + 0.5 * sliding * 5 / 2 / 0.5e12, 1e-9, "pages of q8, not measured");
    r.attention_q8 = (sh_cost_attention){.read = 0.5, .fma = 0.25, .few = {3, 7, 10, 16, 16, 40}};
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK);
    near(l.attention.seconds, fmax(pages / 0.5e9, sliding * 7 / 2 / 0.25e12), 1e-9, "pages of q8");
    sh_plan_free(&p);
}

/* Seconds: the roofline, links with latency, nodes that share one. */
static void test_seconds(void) {
    sh_cost_rates r = {
        .read = 100e9, .fma = 1e12, .weights_read = 0.9, .weights_fma = 0.8, .attention = {.read = 0.5, .fma = 0.5}};
    sh_plan_request q = bf16;
    q.ep = 4;
    Shoal__Plan *p = plan_of(&a4b, q);
    sh_cost_model m = model_of(&a4b, p);
    m.rates = &r;
    m.net = (sh_cost_net){.within = {1e-6, 20e9}, .between = {10e-6, 12.5e9}, .ranks_per_node = 2};
    sh_cost_span s = decode(64, 1024);
    sh_cost_layer l;
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK);
    double dense = 3.0 * 2816 * 2112;
    near(l.dense.seconds, fmax(dense * 2 / 90e9, dense * 2 * 64 / 0.8e12), 1e-9, "dense");
    double experts = l.experts_touched * 3 * 2816 * 704;
    near(l.experts.seconds, fmax(experts * 2 / 90e9, 2.0 * 64 * 8 * 3 * 2816 * 704 / 0.8e12), 1e-9, "experts");
    /* two of three others are on the other node, two ranks share its link */
    near(l.dispatch.seconds, 10e-6 + l.dispatch.bytes * 2 / 3 * 2 / 12.5e9, 1e-9, "dispatch");
    near(l.hidden, fmin(l.dispatch.seconds, l.dense.seconds), 1e-12, "hidden");
    near(l.exposed, l.dispatch.seconds + l.results.seconds - l.hidden, 1e-12, "exposed");
    m.net.ranks_per_node = 4;
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK);
    near(l.dispatch.seconds, 1e-6 + l.dispatch.bytes / 20e9, 1e-9, "dispatch within a node");
    s = decode(200, 1024); /* enough rows to be cut into two parts, which hide each other's exchange */
    CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK);
    CU_ASSERT_EQUAL(l.dispatch.messages, 6);
    CU_ASSERT_TRUE(l.dispatch.seconds < l.dense.seconds && l.results.seconds < l.experts.seconds);
    near(l.exposed,
         l.results.seconds / 2 -
             fmin(l.results.seconds, l.project.seconds + l.attention.seconds + l.router.seconds) / 2,
         1e-12, "two parts");
    near(l.experts.bytes, 2 * 32 * (1 - pow(1 - 8.0 / 128, 400)) * 3 * 2816 * 704 * 2, 1e3, "read twice");
    sh_plan_free(&p);
}

/* What the longer of reading and computing does not hide; sampling by the threads of a rank. */
static void test_hiding(void) {
    sh_cost_rates r = {.read = 100e9, .fma = 1e12, .weights_read = 0.9, .weights_fma = 0.8, .sample = 1e-9};
    Shoal__Plan *p = plan_of(&a4b, bf16);
    sh_cost_model m = model_of(&a4b, p);
    m.rates = &r;
    m.alike = true;
    sh_cost_span s = decode(8, 1024);
    sh_cost_layer l;
    double bytes = 3.0 * 2816 * 2112 * 2 / 90e9, flops = 3.0 * 2816 * 2112 * 2 * 8 / 0.8e12, head = 0, threaded = 0;
    for (int i = 0; i <= 2; i++) {
        r.weights_both = 0.5 * i;
        CU_ASSERT_EQUAL(sh_cost_layer_of(&m, 0, 0, &s, 1, &l), SH_OK);
        near(l.dense.seconds, fmax(bytes, flops) + 0.5 * i * fmin(bytes, flops), 1e-9, "dense");
    }
    r.q8_both = 0.25, r.q4_both = 0.75;
    near(sh_cost_both(&r, SH_MODE_Q8) + sh_cost_both(&r, SH_MODE_Q4) + sh_cost_both(&r, SH_MODE_EXACT), 2, 1e-12,
         "modes");
    CU_ASSERT_EQUAL(sh_cost_head(&m, 0, &s, 1, 1, 0, &head), SH_OK);
    r.threads = 4;
    CU_ASSERT_EQUAL(sh_cost_head(&m, 0, &s, 1, 1, 0, &threaded), SH_OK);
    near(head - threaded, 8 * 262144e-9 * 0.75, 1e-12, "a row is one thread's");
    r.threads = 64;
    CU_ASSERT_EQUAL(sh_cost_head(&m, 0, &s, 1, 1, 0, &threaded), SH_OK);
    near(threaded, head * 2 - 8 * 262144e-9 * 0.75 - 8 * 262144e-9 * 0.875, 1e-12,
         "eight rows: no more than eight threads");
    sh_plan_free(&p);
}

static void test_ring(void) {
    sh_cost_cycle c;
    /* even stages, nothing on the way: full when as many are in flight as stages */
    CU_ASSERT_EQUAL(sh_cost_ring(4, (double[]){1, 1, 1, 1, 1, 1, 1, 1}, (double[8]){0}, 0, 4, &c), SH_OK);
    near(c.period, 1, 1e-9, "full");
    near(c.round_trip, 4, 1e-9, "full");
    near(c.bubble, 0, 1e-9, "full");
    CU_ASSERT_EQUAL(sh_cost_ring(4, (double[]){1, 1, 1, 1, 1, 1, 1, 1}, (double[8]){0}, 0, 1, &c), SH_OK);
    near(c.period, 4, 1e-9, "one at a time");
    near(c.bubble, 0.75, 1e-9, "one at a time");
    CU_ASSERT_EQUAL(sh_cost_ring(2, (double[]){1, 3, 1, 3}, (double[]){0.5, 0.5, 0.5, 0.5}, 0, 2, &c), SH_OK);
    near(c.period, 3, 1e-9, "slowest stage");
    CU_ASSERT_EQUAL(c.slowest, 1);
    CU_ASSERT_EQUAL(sh_cost_ring(2, (double[]){1, 1, 1, 1}, (double[]){1, 1, 1, 1}, 0, 2, &c), SH_OK);
    near(c.period, 2, 1e-9, "ways that nothing hides");
    CU_ASSERT_EQUAL(sh_cost_ring(1, (double[]){1, 5}, (double[2]){0}, 0.25, 1, &c), SH_OK);
    near(c.period, 2, 0.05, "mixture");
    /* a long micro-batch among short ones leaves stages waiting */
    CU_ASSERT_EQUAL(sh_cost_ring(4, (double[]){1, 1, 1, 1, 9, 9, 9, 9}, (double[8]){0}, 0.25, 4, &c), SH_OK);
    CU_ASSERT_TRUE(c.period > 3.5 && c.period < 9);
}

static void test_mix(void) {
    Shoal__Plan *p = plan_of(&b31, (sh_plan_request){.pp = 4, .mode = SH_MODE_BF16, .kv = SH_KV_BF16});
    sh_workload w = {.bin = {{.prompt = 100, .output = 101, .requests = 10}}, .n = 1};
    CU_ASSERT_EQUAL(sh_workload_check(&w), SH_OK);
    sh_forecast_mix x = sh_forecast_mix_of(p, &w, 128);
    near(x.decode, 32, 1e-9, "decode rows");
    near(x.requests, 0.32, 1e-9, "requests per micro-batch");
    near(x.piece, 100, 1e-9, "one prompt at a time");
    near(x.mixed, 0.32, 1e-9, "about every third");
    x = sh_forecast_mix_of(p, &w, 2);
    near(x.in_flight, 2, 0, "no more micro-batches than sequences");
    w.bin[0].output = 1; /* only prompts */
    x = sh_forecast_mix_of(p, &w, 128);
    near(x.mixed, 1, 0, "only prompts");
    near(x.piece, 512, 0, "full chunks");
    CU_ASSERT_EQUAL(x.n_decode, 0);
    sh_plan_free(&p);
}

static void test_workload(void) {
    sh_workload w = {0};
    for (int i = 0; i < 1000; i++) sh_workload_add(&w, 1 + i * 37 % 5000, 1 + i * 91 % 700, 1);
    CU_ASSERT_EQUAL(w.n, SH_WORKLOAD_BINS);
    CU_ASSERT_EQUAL(w.requests, 1000);
    double prompt = 0, output = 0;
    for (int i = 0; i < 1000; i++) {
        prompt += (1 + i * 37 % 5000) / 1000.0;
        output += (1 + i * 91 % 700) / 1000.0;
    }
    near(sh_workload_mean_prompt(&w), prompt, 1e-6, "mean prompt");
    near(sh_workload_mean_output(&w), output, 1e-6, "mean output");
    sh_workload bad = {.bin = {{.prompt = 0, .output = 5, .requests = 1}}, .n = 1};
    CU_ASSERT_EQUAL(sh_workload_check(&bad), SH_EINPUT);
    sh_workload many = sh_workload_default();
    many.requests = 1e306;
    CU_ASSERT_EQUAL(sh_workload_check(&many), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "workload: requests: 1e+306: fewer than 10^15 are allowed");
}

/* One rank: throughput is rows over seconds. */
static void test_forecast(void) {
    Shoal__Plan *p = plan_of(&e4b, bf16);
    sh_cost_model m = model_of(&e4b, p);
    sh_cost_rates r = {
        .read = 50e9, .fma = 500e9, .weights_read = 0.9, .weights_fma = 0.8, .attention = {.read = 0.6, .fma = 0.6}};
    m.rates = &r;
    sh_workload w = {.bin = {{.prompt = 1, .output = 1e6, .requests = 1e3}}, .n = 1, .requests = 1e3};
    sh_forecast f, two;
    sh_forecast_rank rank;
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 1, 1, &f, &rank), SH_OK);
    sh_cost_rank c = {0};
    sh_cost_span s = {.seqs = 1, .rows = 1, .kept = 1, .lo = 1, .hi = 1e6};
    CU_ASSERT_EQUAL(sh_cost_step(&m, &s, 1, &c), SH_OK);
    near(f.tokens_out * (c.seconds + 50e-6), 1, 1e-3, "decode alone");
    near(rank.idle, 0, 1e-9, "always busy");
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 1, 2, &two, NULL), SH_OK);
    near(two.tokens_out / f.tokens_out, 2, 1e-9, "replicas");
    w = sh_workload_default();
    CU_ASSERT_EQUAL(sh_cost_forecast(&m, &w, 32, 1, &f, &rank), SH_OK);
    near(f.tokens_in / f.tokens_out, 2, 1e-9, "in and out");
    near(f.requests * f.seconds, 1e6, 0.01 * 1e6, "the whole job");
    sh_plan_free(&p);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("cost", load, NULL);
    CU_add_test(s, "weight bytes", test_weight_bytes);
    CU_add_test(s, "attention", test_attention);
    CU_add_test(s, "prompts", test_prompt);
    CU_add_test(s, "cuts", test_cuts);
    CU_add_test(s, "cuts of members", test_member_cuts);
    CU_add_test(s, "traffic of experts", test_expert_traffic);
    CU_add_test(s, "measured routing", test_routing);
    CU_add_test(s, "traffic of heads and columns", test_tensor_traffic);
    CU_add_test(s, "traffic of positions", test_context_traffic);
    CU_add_test(s, "K/V rows in messages", test_filled_rows);
    CU_add_test(s, "rates of quantised products", test_quantised_rates);
    CU_add_test(s, "few rows", test_few_rows);
    CU_add_test(s, "rows that meet a key", test_attention_rows);
    CU_add_test(s, "seconds", test_seconds);
    CU_add_test(s, "what does not hide", test_hiding);
    CU_add_test(s, "ring", test_ring);
    CU_add_test(s, "rows of a micro-batch", test_mix);
    CU_add_test(s, "workload", test_workload);
    CU_add_test(s, "forecast", test_forecast);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + (CU_get_number_of_suites_failed() != 0);
    CU_cleanup_registry();
    return failed != 0;
}
