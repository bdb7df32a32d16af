/* Rotations: frequencies and angles as the reference forms them, partial rotation, growth of the table. */
#include <CUnit/Basic.h>
#include <math.h>
#include <string.h>
#include "model/rope.h"

static const sh_layer sliding = {.head_dim = 32, .rotated_pairs = 16, .theta = 1e4, .rope_factor = 1};
static const sh_layer global = {.head_dim = 512, .rotated_pairs = 64, .theta = 1e6, .rope_factor = 8};

static const sh_kernels *kernels(void) {
    const sh_kernels *kn = NULL;
    CU_ASSERT_FATAL(sh_kernels_select(&kn) == SH_OK);
    return kn;
}

static void frequencies(void) {
    sh_rope r;
    CU_ASSERT_FATAL(sh_rope_create(&global, 16, &r) == SH_OK);
    for (int j = 0; j < 64; j++) { /* the exponent uses the whole head dimension, not the rotated part */
        double want = pow(1e6, -2.0 * j / 512) / 8;
        CU_ASSERT_DOUBLE_EQUAL(r.freq[j], want, 3e-7 * want);
    }
    CU_ASSERT(sh_rope_fits(&r, &global));
    CU_ASSERT(!sh_rope_fits(&r, &sliding));
    sh_rope_release(&r);
    sh_rope_release(&r);
}

/* The power is the true one, rounded once: what every C library and CPU would agree on. */
static void frequencies_are_exact(void) {
    static const double thetas[] = {1, 2, 500, 1e4, 1e6, 2.5e5, 123456789, 1e12};
    static const int dims[] = {2, 18, 20, 64, 256, 512, 16384};
    for (size_t t = 0; t < sizeof thetas / sizeof *thetas; t++)
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
            sh_layer l = {.head_dim = dims[d], .rotated_pairs = dims[d] / 2, .theta = thetas[t], .rope_factor = 3};
            sh_rope r;
            int other = 0;
            CU_ASSERT_FATAL(sh_rope_create(&l, 1, &r) == SH_OK);
            for (int j = 0; j < r.pairs; j++) {
                float exponent = (float)(2 * j) / (float)l.head_dim;
                other += r.freq[j] != 1.0f / (float)powl((float)thetas[t], exponent) / 3.0f;
            }
            CU_ASSERT_EQUAL(other, 0);
            sh_rope_release(&r);
        }
}

/* The angle is a float32 product; sine and cosine of that, whatever its size. */
static void far_angles(void) {
    static const int at[] = {0, 1, 1000, 131071, 262143};
    sh_rope r;
    CU_ASSERT_FATAL(sh_rope_create(&sliding, 262144, &r) == SH_OK);
    sh_rope_reach(&r, kernels(), 262144);
    for (size_t i = 0; i < sizeof at / sizeof at[0]; i++)
        for (int j = 0; j < r.pairs; j++) {
            float angle = (float)at[i] * r.freq[j];
            size_t k = (size_t)at[i] * (size_t)r.pairs + (size_t)j;
            CU_ASSERT_DOUBLE_EQUAL(r.cs[k], cos((double)angle), 1e-6);
            CU_ASSERT_DOUBLE_EQUAL(r.sn[k], sin((double)angle), 1e-6);
        }
    sh_rope_release(&r);
}

static void partial_rotation(void) {
    sh_rope r;
    float x[512], y[512];
    CU_ASSERT_FATAL(sh_rope_create(&global, 64, &r) == SH_OK);
    sh_rope_reach(&r, kernels(), 64);
    for (int i = 0; i < 512; i++) x[i] = y[i] = sinf((float)i) + 0.1f;
    sh_rope_apply(&r, kernels(), y, 37);
    for (int j = 0; j < 256; j++) {
        double a = j < 64 ? (double)(37.0f * r.freq[j]) : 0, u = x[j], v = x[j + 256];
        CU_ASSERT_DOUBLE_EQUAL(y[j], u * cos(a) - v * sin(a), 1e-5);
        CU_ASSERT_DOUBLE_EQUAL(y[j + 256], v * cos(a) + u * sin(a), 1e-5);
        if (j >= 64) CU_ASSERT(y[j] == x[j] && y[j + 256] == x[j + 256]);
    }
    sh_rope_apply(&r, kernels(), x, 0); /* position 0 changes nothing */
    sh_rope_release(&r);
}

static void growth(void) {
    sh_rope once, grown;
    CU_ASSERT_FATAL(sh_rope_create(&sliding, 100, &once) == SH_OK);
    CU_ASSERT_FATAL(sh_rope_create(&sliding, 100, &grown) == SH_OK);
    sh_rope_reach(&once, kernels(), 100);
    for (int n = 0; n <= 100; n += 9) sh_rope_reach(&grown, kernels(), n);
    sh_rope_reach(&grown, kernels(), 3); /* never shrinks */
    CU_ASSERT_EQUAL(grown.filled, 99);
    sh_rope_reach(&grown, kernels(), 100);
    CU_ASSERT(memcmp(once.cs, grown.cs, 100 * 16 * sizeof(float)) == 0);
    CU_ASSERT(memcmp(once.sn, grown.sn, 100 * 16 * sizeof(float)) == 0);
    sh_rope_release(&once);
    sh_rope_release(&grown);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("rope", NULL, NULL);
    CU_add_test(s, "frequencies", frequencies);
    CU_add_test(s, "frequencies are exact", frequencies_are_exact);
    CU_add_test(s, "far angles", far_angles);
    CU_add_test(s, "partial rotation", partial_rotation);
    CU_add_test(s, "growth", growth);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
