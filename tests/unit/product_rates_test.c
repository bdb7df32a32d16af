/* Rates of products: every type has one, on any level of instructions that this CPU has; too few weights are refused.
 */
#include <CUnit/Basic.h>
#include <math.h>
#include <string.h>
#include "model/product_rates.h"
#include "partition/cost_int.h"

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
        for (int i = 0; i < SH_PRODUCT_FEWS; i++) { /* more rows take no less time, and no more than many */
            double rows = 1 << i, more = i + 1 < SH_PRODUCT_FEWS ? r.few[type][i + 1] : 1;
            CU_ASSERT(r.few[type][i] > 0 && rows / r.few[type][i] <= 2 * rows / more * (1 + 1e-12));
        }
    }
    sh_team_destroy(&t);
}

/* What the cost model makes of times is these times again. */
static void test_given_back(void) {
    static const double times[][SH_PRODUCT_FEWS + 1] = {
        {0.0250, 0.0263, 0.0273, 0.0369, 0.0538, 0.0761, 0.1373}, /* measured, q4 with AMX: ns of an element */
        {0.0745, 0.0745, 0.0758, 0.0974, 0.1837, 0.2596, 0.4623}, /* bf16 with AVX-512 */
        {1, 1, 1, 1, 2, 4, 8},                                    /* the longer hides the shorter */
        {1, 1.25, 1.5, 2, 3, 5, 9},                               /* nothing is hidden */
        {1, 5, 5, 5, 5, 5, 9},                                    /* a tile of 32 rows */
        {1, 1, 1, 1, 1, 1, 1},
    };
    for (size_t k = 0; k < sizeof times / sizeof *times; k++) {
        const double *t = times[k];
        sh_product_rates p;
        sh_product_rates_of(t, 1, 2, SH_W_Q4, &p);
        sh_cost_rates r = {.read = p.read[SH_W_Q4], .fma = p.flops[SH_W_Q4], .q4_both = p.both[SH_W_Q4]};
        for (int i = 0; i < SH_COST_FEW; i++) r.q4_few[i] = (1 << i) / p.few[SH_W_Q4][i];
        for (int i = 0; i <= SH_PRODUCT_FEWS; i++) {
            double read = 1 / r.read, compute = 2 * sh_cost_paid_rows(&r, SH_MODE_Q4, 1 << i) / r.fma;
            double got = fmax(read, compute) + r.q4_both * fmin(read, compute);
            if (fabs(got / t[i] - 1) > 0.02) printf("\n%zu: %d rows: %g, measured %g\n", k, 1 << i, got, t[i]);
            CU_ASSERT(fabs(got / t[i] - 1) <= 0.02);
        }
    }
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
    CU_add_test(s, "times are given back", test_given_back);
    CU_add_test(s, "too few weights", test_too_few);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed != 0;
}
