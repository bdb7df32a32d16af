/* Rates of attention: every number is there and in its range; what made-up
 * work reads and computes is counted right. */
#include <CUnit/Basic.h>
#include <math.h>
#include <string.h>
#include "model/attention_rates.h"
#include "partition/cost_int.h"

#define PAGES ((size_t)16 << 20)

static const sh_kernels *kn;
static sh_team *team;

static void check_rates(sh_kv_type kv) {
    sh_attention_rates r = {.formed = -1};
    CU_ASSERT_EQUAL_FATAL(sh_attention_rates_measure(team, kn, kv, PAGES, &r), SH_OK);
    CU_ASSERT(isfinite(r.read) && r.read > 1e6);
    CU_ASSERT(isfinite(r.flops) && r.flops > 1e6);
    CU_ASSERT(r.both >= 0 && r.both <= 1);
    CU_ASSERT(r.formed >= 0 && r.formed <= SH_COST_MANY);
    for (int i = 0; i < SH_PRODUCT_FEWS; i++) { /* more rows take no less time, and no more than many */
        double rows = 1 << i, more = i + 1 < SH_PRODUCT_FEWS ? r.few[i + 1] : 1;
        CU_ASSERT(r.few[i] > 0 && rows / r.few[i] <= 2 * rows / more * (1 + 1e-12));
    }
}

static void test_rates(void) {
    for (int kv = 0; kv < SH_KV_TYPES; kv++) check_rates((sh_kv_type)kv);
}

static void test_counts(void) {
    sh_attn_work w = {
        .heads = 8, .kv_heads = 2, .head_dim = 64, .kv = SH_KV_BF16, .sequences = 3, .context = 100, .rows = 1};
    CU_ASSERT_EQUAL(sh_attn_work_bytes(&w), 3 * 100 * 2 * 2 * 64 * 2);
    CU_ASSERT_EQUAL(sh_attn_work_flops(&w), 4.0 * 8 * 64 * 100 * 3);
    w.rows = 3;
    CU_ASSERT_EQUAL(sh_attn_work_bytes(&w), 3 * 100 * 2 * 2 * 64 * 2);
    CU_ASSERT_EQUAL(sh_attn_work_flops(&w), 4.0 * 8 * 64 * (98 + 99 + 100) * 3);
    w.window = 40;
    w.k_eq_v = true;
    w.kv = SH_KV_F32;
    CU_ASSERT_EQUAL(sh_attn_work_bytes(&w), 3 * 42 * 2 * 64 * 4);
    CU_ASSERT_EQUAL(sh_attn_work_flops(&w), 4.0 * 8 * 64 * (40 + 40 + 40) * 3);
}

/* Windows whose pages begin later, every KV type, K = V: the pages hold what the rows ask for. */
static void test_works(void) {
    for (int i = 0; i < 2 * SH_KV_TYPES; i++) {
        sh_attn_work w = {.heads = 4,
                          .kv_heads = 2,
                          .head_dim = 32,
                          .kv = (sh_kv_type)(i / 2),
                          .k_eq_v = i % 2,
                          .sequences = 3,
                          .context = 700,
                          .window = i % 2 ? 0 : 100,
                          .rows = 1};
        sh_attn_bench *b = NULL;
        double one = 0, more = 0;
        CU_ASSERT_EQUAL_FATAL(sh_attn_bench_create(team, kn, &w, (size_t)1 << 20, &b), SH_OK);
        CU_ASSERT_EQUAL(sh_attn_bench_seconds(b, 4, 1, 3, &one), SH_OK);
        CU_ASSERT_EQUAL(sh_attn_bench_seconds(b, 8, 1, 3, &more), SH_OK);
        CU_ASSERT_EQUAL(sh_attn_bench_seconds(b, 3, 1, 3, &more), SH_EINPUT);
        CU_ASSERT_EQUAL(sh_attn_bench_seconds(b, 4, i % 2 ? 701 : 2, 3, &more), SH_EINPUT);
        CU_ASSERT_PTR_NOT_NULL(
            strstr(sh_error_text(), i % 2 ? "a multiple of 2 and 1 to 700" : "a multiple of 2 and 1 to 1 "));
        CU_ASSERT(one > 0 && one < 10 && more > 0 && more < 10);
        sh_attn_bench_destroy(&b);
        CU_ASSERT_PTR_NULL(b);
        sh_attn_bench_destroy(&b);
    }
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("attention rates", NULL, NULL);
    if (sh_kernels_select(&kn) != SH_OK || sh_team_create(2, NULL, 0, &team) != SH_OK) return 1;
    CU_add_test(s, "rates", test_rates);
    CU_add_test(s, "counts", test_counts);
    CU_add_test(s, "works of all kinds", test_works);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    sh_team_destroy(&team);
    return failed != 0;
}
