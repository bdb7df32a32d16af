/* The report's numbers against the tables of the model description, for the four released configurations. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/inspect.h"
#include "model/weights.h"

enum { E2B, E4B, A4B, B31, MODELS };
static const char *const dir[MODELS] = {SH_TEST_DATA "/configs/e2b", SH_TEST_DATA "/configs/e4b",
                                        SH_TEST_DATA "/configs/26b-a4b", SH_TEST_DATA "/configs/31b"};
static sh_config config[MODELS];

static int load(void) {
    for (int i = 0; i < MODELS; i++)
        if (sh_config_load(dir[i], &config[i]) != SH_OK) return 1;
    return 0;
}

/* x equals a number that was printed with `digits` decimals. */
static bool rounds_to(double x, double printed, int digits) {
    return fabs(x - printed) <= 0.5000001 * pow(10, -digits);
}
#define CHECK(x, printed, digits)                                                                                      \
    do {                                                                                                               \
        if (!rounds_to((x), (printed), (digits)))                                                                      \
            printf("\n%s: %.6f, expected %g\n", #x, (double)(x), (double)(printed));                                   \
        CU_ASSERT_TRUE(rounds_to((x), (printed), (digits)));                                                           \
    } while (0)

static void test_totals(void) {
    static const char *const name[MODELS] = {"E2B", "E4B", "26B-A4B", "31B"};
    static const double total[MODELS] = {4.629, 7.463, 25.233, 30.697},
                        effective[MODELS] = {2.280, 4.644, 25.233, 30.697},
                        active[MODELS] = {2.280, 4.644, 3.823, 30.697};
    for (int i = 0; i < MODELS; i++) {
        sh_param_count p = sh_config_count(&config[i]);
        CU_ASSERT_STRING_EQUAL(config[i].variant, name[i]);
        CHECK((double)p.total / 1e9, total[i], 3);
        CHECK((double)(p.total - p.ple_table) / 1e9, effective[i], 3);
        CHECK((double)sh_inspect_active(&config[i]) / 1e9, active[i], 3);
    }
}

static void test_components(void) {
    static const double want[MODELS][7] = {{0.403, 2.349, 0.014, 0.278, 1.557, 0, 0.028},
                                           {0.671, 2.819, 0.028, 0.587, 3.303, 0, 0.055},
                                           {0.738, 0, 0, 1.110, 0.535, 22.838, 0},
                                           {1.409, 0, 0, 8.478, 20.809, 0, 0}};
    for (int i = 0; i < MODELS; i++) {
        sh_param_count p = sh_config_count(&config[i]);
        const int64_t have[7] = {p.embedding, p.ple_table, p.ple_projection, p.attention,
                                 p.mlp,       p.experts,   p.ple_layers};
        for (int k = 0; k < 7; k++) CHECK((double)have[k] / 1e9, want[i][k], 3);
        int64_t sum = p.router + p.norms;
        for (int k = 0; k < 7; k++) sum += have[k];
        CU_ASSERT_EQUAL(sum, p.total);
    }
    CHECK((double)sh_config_count(&config[A4B]).router / 1e9, 0.011, 3);
}

static void test_memory(void) {
    static const double all[MODELS] = {8.62, 13.90, 47.00, 57.18}, without[MODELS] = {4.25, 8.65, 47.00, 57.18};
    for (int i = 0; i < MODELS; i++) {
        sh_param_count p = sh_config_count(&config[i]);
        CHECK((double)p.total * 2 / 0x1p30, all[i], 2);
        CHECK((double)(p.total - p.ple_table) * 2 / 0x1p30, without[i], 2);
        double held = (double)sh_weights_estimate(&config[i], SH_MODE_BF16, 0, config[i].n_layers) / 0x1p30;
        CU_ASSERT_TRUE(held > without[i] * 0.999 && held < without[i] * 1.002);
    }
}

static void test_one_layer(void) {
    static const struct {
        int model, layer, count;
        double qo, kv, mlp, experts, total, mib;
    } row[] = {{E2B, 0, 12, 6.29, 0.79, 28.31, 0, 36.18, 69.0},
               {E2B, 4, 3, 12.58, 1.57, 28.31, 0, 43.26, 82.5},
               {E2B, 15, 16, 6.29, 0, 56.62, 0, 63.71, 121.5},
               {E2B, 19, 4, 12.58, 0, 56.62, 0, 70.00, 133.5},
               {E4B, 0, 20, 10.49, 2.62, 78.64, 0, 93.07, 177.5},
               {E4B, 5, 4, 20.97, 5.24, 78.64, 0, 106.18, 202.5},
               {E4B, 24, 15, 10.49, 0, 78.64, 0, 90.45, 172.5},
               {E4B, 29, 3, 20.97, 0, 78.64, 0, 100.94, 192.5},
               {A4B, 0, 25, 23.07, 11.53, 17.84, 761.27, 814.09, 1552.8},
               {A4B, 5, 5, 46.14, 2.88, 17.84, 761.27, 828.51, 1580.3},
               {B31, 0, 50, 88.08, 44.04, 346.82, 0, 478.96, 913.5},
               {B31, 5, 10, 176.16, 11.01, 346.82, 0, 534.01, 1018.5}};
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        const sh_config *c = &config[row[i].model];
        sh_layer_count n = sh_config_layer_count(c, row[i].layer);
        int64_t total = n.qo + n.kv + n.mlp + n.experts + n.router + n.ple + n.norms;
        CHECK((double)n.qo / 1e6, row[i].qo, 2);
        CHECK((double)n.kv / 1e6, row[i].kv, 2);
        CHECK((double)n.mlp / 1e6, row[i].mlp, 2);
        CHECK((double)n.experts / 1e6, row[i].experts, 2);
        CHECK((double)total / 1e6, row[i].total, 2);
        CHECK((double)total * 2 / 0x1p20, row[i].mib, 1);
        int count = 0;
        for (int y = 0; y < c->n_layers; y++)
            count +=
                c->layer[y].kind == c->layer[row[i].layer].kind && c->layer[y].has_kv == c->layer[row[i].layer].has_kv;
        CU_ASSERT_EQUAL(count, row[i].count);
        CU_ASSERT_TRUE(llabs(sh_layer_params(c, row[i].layer) - total) <
                       1000000); /* matrices alone, and one projection slice */
    }
}

static void test_kv(void) {
    static const size_t sliding[MODELS] = {12288, 40960, 204800, 819200}, full[MODELS] = {6144, 16384, 10240, 40960};
    static const int64_t mib[MODELS][4] = {
        {54, 198, 774, 1542}, {148, 532, 2068, 4116}, {280, 520, 1480, 2760}, {1120, 2080, 5920, 11040}};
    for (int i = 0; i < MODELS; i++) {
        const sh_config *c = &config[i];
        CU_ASSERT_EQUAL(sh_config_kv_bytes(c, SH_KV_BF16, SH_KV_SLIDING, 0, c->n_layers), sliding[i]);
        CU_ASSERT_EQUAL(sh_config_kv_bytes(c, SH_KV_BF16, SH_KV_GLOBAL, 0, c->n_layers), full[i]);
        CU_ASSERT_EQUAL(sh_config_kv_bytes(c, SH_KV_F32, SH_KV_GLOBAL, 0, c->n_layers), 2 * full[i]);
        CU_ASSERT_EQUAL(sh_config_kv_bytes(c, SH_KV_Q8, SH_KV_GLOBAL, 0, c->n_layers), full[i] / 2 / 16 * 17);
        CU_ASSERT_EQUAL(sh_config_kv_bytes(c, SH_KV_Q8, SH_KV_SLIDING, 0, c->n_layers), sliding[i] / 2 / 16 * 17);
        for (int k = 0; k < 4; k++)
            CU_ASSERT_EQUAL(sh_inspect_kv_sequence(c, SH_KV_BF16, 0, c->n_layers, 8192 << 2 * k >> (k == 3)),
                            mib[i][k] << 20);
    }
}

/* Which shared K/V crosses which cut: table of section 6.1. */
static void test_crossing(void) {
    static const struct {
        int model, sliding, full, both_from, both_to, full_only;
    } row[] = {{E2B, 13, 14, 15, 33, 34}, {E4B, 22, 23, 24, 40, 41}};
    for (int i = 0; i < 2; i++) {
        const sh_config *c = &config[row[i].model];
        for (int cut = 1; cut < c->n_layers; cut++) {
            bool s = sh_config_kv_crosses(c, row[i].sliding, cut), f = sh_config_kv_crosses(c, row[i].full, cut);
            CU_ASSERT_EQUAL(s, cut > row[i].sliding && cut <= row[i].both_to);
            CU_ASSERT_EQUAL(f, cut >= row[i].both_from && cut <= row[i].full_only);
            for (int y = 0; y < cut; y++)
                if (y != row[i].sliding && y != row[i].full) CU_ASSERT_FALSE(sh_config_kv_crosses(c, y, cut));
        }
        /* a stage of consumers alone mirrors one producer of each kind */
        CU_ASSERT_EQUAL(sh_config_kv_bytes(c, SH_KV_BF16, SH_KV_GLOBAL, row[i].both_from + 5, c->n_layers),
                        i ? 4096u : 2048u);
        CU_ASSERT_EQUAL(sh_config_kv_bytes(c, SH_KV_BF16, SH_KV_SLIDING, row[i].both_from + 5, c->n_layers),
                        i ? 2048u : 1024u);
        CU_ASSERT_EQUAL(sh_config_kv_bytes(c, SH_KV_BF16, SH_KV_SLIDING, c->n_layers - 1, c->n_layers), 0u);
    }
    for (int cut = 1; cut < 60; cut++)
        for (int y = 0; y < 60; y++) CU_ASSERT_FALSE(sh_config_kv_crosses(&config[B31], y, cut));
}

static void test_text(void) {
    static const char *const want[MODELS][6] = {
        {"Gemma 4 E2B: 35 layers", "of layer 13", "36.18 M  0-3, 5-8, 10-13\n", "2.280 B\n", "4.38 GiB  likewise",
         "no weights in "},
        {"Gemma 4 E4B: 42 layers", "of layer 23", "93.07 M  0-4, 6-10, 12-16, 18-22\n", "7.463 B\n",
         "128k         1.07 GiB     2.02 GiB     4.04 GiB  the model's longest\n", "no weights in "},
        {"Gemma 4 26B-A4B: 30 layers", "2112 + 8 of 128 x 704", "K = V: one tensor",
         "active per token                        3.823 B", "47.00 GiB", "no weights in "},
        {"Gemma 4 31B: 60 layers", "own, K = V", "534.01 M  5, 11, 17, 23, 29, 35, 41, 47, 53, 59\n", "30.697 B",
         "1.09 GiB", "no weights in "}};
    for (int i = 0; i < MODELS; i++) {
        sh_buf b;
        sh_buf_init(&b, 0);
        CU_ASSERT_EQUAL_FATAL(sh_inspect_model(dir[i], &b), SH_OK);
        for (int k = 0; k < 6; k++) {
            bool there = strstr((const char *)b.data, want[i][k]) != NULL;
            if (!there) printf("\nmissing \"%s\" in:\n%s", want[i][k], (const char *)b.data);
            CU_ASSERT_TRUE(there);
        }
        sh_buf_release(&b);
    }
}

static void test_with_weights(void) {
    sh_buf b;
    sh_buf_init(&b, 0);
    CU_ASSERT_EQUAL_FATAL(sh_inspect_model(SH_TEST_DATA "/text/models/26b-a4b-sharded", &b), SH_OK);
    CU_ASSERT_PTR_NOT_NULL(strstr((const char *)b.data, "Gemma 4 custom: 6 layers"));
    CU_ASSERT_PTR_NOT_NULL(strstr((const char *)b.data, "  total                                    671600\n"));
    CU_ASSERT_PTR_NOT_NULL(
        strstr((const char *)b.data, "tensors in 4 files, 1.3 MiB, as config.json implies; fingerprint "));
    sh_buf_release(&b);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("inspect", load, NULL);
    CU_add_test(s, "totals", test_totals);
    CU_add_test(s, "components", test_components);
    CU_add_test(s, "memory", test_memory);
    CU_add_test(s, "one layer", test_one_layer);
    CU_add_test(s, "kv", test_kv);
    CU_add_test(s, "crossing", test_crossing);
    CU_add_test(s, "text", test_text);
    CU_add_test(s, "with weights", test_with_weights);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + (CU_get_number_of_suites_failed() != 0);
    CU_cleanup_registry();
    return failed != 0;
}
