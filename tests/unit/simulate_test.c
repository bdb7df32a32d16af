/* Timetables: that nothing of what the cost model counts is lost on the way into the text, and that the order of
 * messages that replay.c repeats is cut into parts as the exchange cuts it. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "partition/simulate.h"
#include "worker/experts.h"

static sh_config a4b, b31;
static const sh_cost_rates rates = {.read = 380e9,
                                    .fma = 5.6e12,
                                    .weights_read = 0.9,
                                    .weights_fma = 0.8,
                                    .attention = {.read = 0.6, .fma = 0.5},
                                    .layer = 20e-6,
                                    .sample = 1e-9};
static const sh_cost_link far = {.latency = 10e-6, .bandwidth = 12.5e9};

static int load(void) {
    return sh_config_load(SH_TEST_DATA "/configs/26b-a4b", &a4b) || sh_config_load(SH_TEST_DATA "/configs/31b", &b31);
}

/* A plan with its cost model and forecast, as text. */
typedef struct scene {
    Shoal__Plan *plan;
    sh_cost_model m;
    sh_forecast_mix mix;
    sh_buf text;
} scene;

static sh_status make(scene *s, const sh_config *c, sh_plan_request q) {
    sh_workload w = sh_workload_default();
    *s = (scene){0};
    sh_buf_init(&s->text, 1 << 22);
    q.kv = SH_KV_BF16;
    SH_TRY(sh_plan_make(c, &q, &s->plan));
    s->m = (sh_cost_model){
        .config = c, .plan = s->plan, .rates = &rates, .alike = true, .net = {far, far, .ranks_per_node = 1}};
    s->mix = sh_forecast_mix_of(s->plan, &w, 128);
    return sh_simulate_timetable(&s->m, &s->mix, s->mix.requests * 256, 3, &s->text);
}

static void release(scene *s) {
    sh_plan_free(&s->plan);
    sh_buf_release(&s->text);
}

/* Numbers of the n-th line that begins with `name`; the count of them. */
static int line(const scene *s, const char *name, int nth, double *v, int most) {
    const char *p = (const char *)s->text.data;
    size_t len = strlen(name);
    for (; *p; p = strchr(p, '\n') + 1) {
        if (strncmp(p, name, len) != 0 || p[len] != ' ' || nth-- > 0) continue;
        int n = 0;
        char *q = NULL;
        for (p += len; *p == ' ' && n < most; p = q) v[n++] = strtod(p, &q);
        return n;
    }
    return 0;
}

static double one(const scene *s, const char *name) {
    double v[8] = {NAN};
    CU_ASSERT_TRUE(line(s, name, 0, v, 8) >= 1);
    return v[0];
}

static void near(double got, double want) {
    bool same = fabs(got - want) <= 1e-4 * fabs(want);
    if (!same) printf("\n%.9g, should be %.9g\n", got, want);
    CU_ASSERT_TRUE(same);
}

/* Seconds of a stage's layers and edges of one kind; experts as the cost model expects them. */
static double stage_seconds(const scene *s, int kind, int stage) {
    double sum = 0, v[8], first[3] = {0};
    CU_ASSERT_EQUAL(line(s, "stage", stage, first, 3), 3);
    for (int i = 0; line(s, "layer", i, v, 7) == 7; i++)
        if ((int)v[0] == kind && v[1] >= first[1] && v[1] < first[2]) sum += v[3] + v[4] + v[5] + v[6];
    for (int i = 0; line(s, "edge", i, v, 5) == 5; i++)
        if ((int)v[0] == kind && (int)v[1] == stage) sum += v[3] + v[4];
    return sum;
}

static void test_nothing_lost(void) {
    static const sh_plan_request q[] = {{.pp = 1}, {.pp = 4}, {.ep = 4}, {.pp = 3, .ep = 5}};
    for (size_t i = 0; i < sizeof q / sizeof *q; i++) {
        scene s;
        sh_cost_rank r[16];
        sh_plan_request x = q[i];
        x.mode = SH_MODE_BF16;
        CU_ASSERT_EQUAL_FATAL(make(&s, &a4b, x), SH_OK);
        sh_plan_shape shape = sh_plan_shape_of(s.plan);
        CU_ASSERT_EQUAL((int)one(&s, "groups"), 3);
        CU_ASSERT_EQUAL((int)one(&s, "stages"), shape.pp);
        CU_ASSERT_EQUAL((int)one(&s, "members"), shape.width);
        for (int kind = 0; kind < 2; kind++) {
            CU_ASSERT_EQUAL_FATAL(sh_cost_step(&s.m, s.mix.span, kind ? s.mix.n_spans : s.mix.n_decode, r), SH_OK);
            for (int stage = 0; stage < shape.pp; stage++) {
                const sh_cost_rank *k = &r[stage * shape.width];
                near(stage_seconds(&s, kind, stage), k->seconds - k->waits - k->exposed + 50e-6);
            }
        }
        release(&s);
    }
}

static void test_layers_and_cuts(void) {
    scene s;
    double v[40];
    int seen[2][30] = {{0}};
    CU_ASSERT_EQUAL_FATAL(make(&s, &a4b, (sh_plan_request){.pp = 3, .ep = 5, .mode = SH_MODE_BF16}), SH_OK);
    for (int i = 0; line(&s, "layer", i, v, 7) == 7; i++) {
        seen[(int)v[0]][(int)v[1]]++;
        CU_ASSERT_EQUAL((int)v[2], 1); /* every layer has experts */
    }
    for (int i = 0; i < 60; i++) CU_ASSERT_EQUAL(seen[i / 30][i % 30], 1);
    CU_ASSERT_EQUAL(line(&s, "owned", 0, v, 40), 6);
    for (int i = 0; i < 5; i++) CU_ASSERT_TRUE(v[i + 1] - v[i] == 25 || v[i + 1] - v[i] == 26);
    CU_ASSERT_EQUAL((int)v[5], 128);
    double kind[4], edge[5];
    CU_ASSERT_EQUAL(line(&s, "kind", 1, kind, 4), 4);
    CU_ASSERT_EQUAL(line(&s, "edge", 3, edge, 5), 5); /* kind 1, stage 0 */
    near(kind[1], s.mix.decode + s.mix.piece);
    near(edge[2], kind[1] * 2816 * 4);
    CU_ASSERT_EQUAL(line(&s, "edge", 5, edge, 5), 5);
    CU_ASSERT_EQUAL((int)edge[2], 0); /* nothing crosses behind the last stage */
    CU_ASSERT_TRUE(edge[4] > 0);      /* the head */
    release(&s);
}

/* What one exchange costs is the cost model's experts, put together from rows and experts touched. */
static void test_experts(void) {
    static const sh_mode modes[] = {SH_MODE_EXACT, SH_MODE_BF16, SH_MODE_Q8, SH_MODE_Q4};
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        scene s;
        double expert[2], row[2];
        sh_cost_layer l;
        CU_ASSERT_EQUAL_FATAL(make(&s, &a4b, (sh_plan_request){.ep = 4, .mode = modes[i]}), SH_OK);
        CU_ASSERT_EQUAL(line(&s, "expert", 0, expert, 2), 2);
        CU_ASSERT_EQUAL(line(&s, "row", 0, row, 2), 2);
        CU_ASSERT_EQUAL(sh_cost_layer_of(&s.m, 0, 0, s.mix.span, s.mix.n_decode, &l), SH_OK);
        near(l.experts.seconds, fmax(l.experts_touched * expert[0], s.mix.decode * 8 * expert[1]));
        near(l.results.bytes, s.mix.decode * 8 * 3 / 4 * row[1]); /* a quarter of the choices fall on this member */
        double reach = 3 * (1 - exp(lgamma(97) - lgamma(89) - lgamma(129) + lgamma(121)));
        near(l.dispatch.bytes, s.mix.decode * reach * row[0]); /* C(96, 8) / C(128, 8) of the rows miss a member */
        release(&s);
    }
}

static void test_parts(void) {
    scene s;
    double v[2];
    CU_ASSERT_EQUAL(SH_COST_SPLIT_ROWS, SH_EXPERTS_SPLIT_ROWS);
    CU_ASSERT_EQUAL_FATAL(make(&s, &a4b, (sh_plan_request){.ep = 4, .max_seqs = 40, .chunk = 80, .mode = SH_MODE_BF16}),
                          SH_OK);
    CU_ASSERT_EQUAL(line(&s, "part_rows", 0, v, 2), 2);
    CU_ASSERT_EQUAL((int)v[0], 30); /* no more than a lane's micro-batch has */
    CU_ASSERT_EQUAL((int)v[1], SH_EXPERTS_SPLIT_ROWS);
    release(&s);
}

static void test_refused(void) {
    scene s;
    CU_ASSERT_EQUAL(make(&s, &b31, (sh_plan_request){.tp = 2, .mode = SH_MODE_BF16}), SH_EUNSUPPORTED);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "tp 2"));
    release(&s);
}

int main(void) {
    if (CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("simulate", load, NULL);
    CU_add_test(s, "seconds of a stage are the cost model's", test_nothing_lost);
    CU_add_test(s, "layers, owners, cuts", test_layers_and_cuts);
    CU_add_test(s, "experts", test_experts);
    CU_add_test(s, "parts are those of the exchange", test_parts);
    CU_add_test(s, "what is not laid out is refused", test_refused);
    CU_basic_run_tests();
    int failed = (int)CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed > 0;
}
