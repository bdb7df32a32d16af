/* Rates of products: every type has one, on any level of instructions that this CPU has; too few weights are refused.
 */
#include <CUnit/Basic.h>
#include <math.h>
#include <string.h>
#include "model/product_rates.h"

#define WEIGHTS ((size_t)80 << 20)

static void test_rates(void) {
    const sh_kernels *kn;
    sh_team *t = NULL;
    sh_product_rates r = {0};
    CU_ASSERT_EQUAL_FATAL(sh_team_create(1, NULL, 0, &t), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_kernels_select(&kn), SH_OK);
    CU_ASSERT_EQUAL(sh_product_rates_measure(t, kn, WEIGHTS, &r), SH_OK);
    for (int type = 0; type < SH_W_TYPES; type++) {
        CU_ASSERT(isfinite(r.read[type]) && r.read[type] > 1e6);
        CU_ASSERT(isfinite(r.flops[type]) && r.flops[type] > 1e6);
    }
    sh_team_destroy(&t);
}

static void test_too_few(void) {
    const sh_kernels *kn;
    sh_team *t = NULL;
    sh_product_rates r;
    CU_ASSERT_EQUAL_FATAL(sh_team_create(1, NULL, 0, &t), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_kernels_get("ref", &kn), SH_OK);
    CU_ASSERT_EQUAL(sh_product_rates_measure(t, kn, (size_t)64 << 20, &r), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "at least 75497472 are needed"));
    sh_team_destroy(&t);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("product rates", NULL, NULL);
    CU_add_test(s, "rates", test_rates);
    CU_add_test(s, "too few weights", test_too_few);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed != 0;
}
