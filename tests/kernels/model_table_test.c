/*
 * SHOAL_ISA=model:FMA,BYTES: what its entries take in time and what they leave behind. On a busy machine a try takes
 * longer than modelled, so tries go on until one does not: none may be much shorter, and one not much longer.
 */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "common/clock.h"
#include "model/kernels/kernels.h"
#include "model/linear.h"

#define SPEC "model:2G,2G,0.5"

enum { K = 512, N = 2048, ROWS = 64, KEYS = 256, HD = 64, CALLS = 40 };

static const sh_kernels *kn;
static float x[ROWS * K], y[ROWS * N], z[ROWS * N];
static uint32_t panels[N / SH_PANEL * K * 16];
static const sh_wmat mat = {.n = N, .k = K, .data = panels};

static void fill_rows(void) {
    for (int i = 0; i < ROWS * K; i++) x[i] = sinf((float)i);
}

typedef struct work {
    int rows;
    int kv8; /* keys and values in 8 bits, else bf16 */
} work;

static void products(work w) {
    for (int i = 0; i < CALLS; i++) kn->gemm(&mat, 0, N / SH_PANEL, x, K, w.rows, y, N);
}

static uint8_t codes[2 * KEYS * (HD + 4 * ((HD + SH_KV8_GROUP - 1) / SH_KV8_GROUP))];

static void attention(work w) {
    static uint16_t pages[2 * KEYS * HD];
    static float tile[2 * KEYS * HD], scores[4 * KEYS];
    for (int i = 0; i < 500; i++) {
        if (w.kv8) kn->from_kv8(tile, codes, HD, 2 * KEYS);
        for (int j = 0; j < 2 * KEYS && !w.kv8; j++) kn->from_bf16(tile + j * HD, pages + j * HD, HD);
        kn->scores(scores, KEYS, x, HD, w.rows, tile, KEYS, HD);
        kn->weighted_sum(y, HD, scores, KEYS, w.rows, tile + KEYS * HD, KEYS, HD);
    }
}

static void takes(const char *what, void (*work_of)(work), work w, double want) {
    double best = 1e9;
    for (double since = sh_now(); best > 1.25 * want && sh_now() - since < 20;) {
        double t0 = sh_now();
        work_of(w);
        best = fmin(best, sh_now() - t0);
    }
    if (best < 0.93 * want || best > 1.25 * want) fprintf(stderr, "%s: %.4f s, modelled %.4f s\n", what, best, want);
    CU_ASSERT(best > 0.93 * want && best < 1.25 * want);
}

/* 2 G multiply-adds and 2 GB a second: one row reads 2 MiB for 1 M multiply-adds, 64 rows multiply 64 M. */
static void test_products_take_their_time(void) {
    takes("one row", products, (work){1, 0}, CALLS * (double)N * K * 2 / 2e9);
    takes("64 rows", products, (work){ROWS, 0}, CALLS * (double)ROWS * N * K / 2e9);
}

static void test_attention_takes_its_time(void) {
    const double add = 2.0 * KEYS * HD; /* multiply-adds of a row */
    takes("one row, bound by reading", attention, (work){1, 0}, 500 * 2 * 2.0 * KEYS * HD / 2e9);
    takes("four rows, bound by arithmetic", attention, (work){4, 0}, 500 * 4 * add / 2e9);
    takes("keys in 8 bits, about half to read", attention, (work){1, 1}, 500 * fmax((double)sizeof codes, add) / 2e9);
}

/* The same numbers however panels and rows are shared out; rows that differ get different ones; all in (0, 1). */
static void test_results_are_made_up_alike(void) {
    sh_team *team = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_team_create(2, NULL, 0, &team), SH_OK);
    kn->gemm(&mat, 0, N / SH_PANEL, x, K, 8, y, N);
    sh_linear(team, kn, &mat, x, K, 8, z, N);
    CU_ASSERT(memcmp(y, z, 8 * N * sizeof *y) == 0);
    CU_ASSERT(memcmp(y, y + N, N * sizeof *y) != 0);
    int largest = 0;
    for (int i = 0; i < 8 * N; i++) {
        CU_ASSERT(y[i] > 0 && y[i] < 1);
        if (i < N && y[i] > y[largest]) largest = i;
    }
    CU_ASSERT(largest >= 256); /* no end of text */
    sh_team_destroy(&team);
}

/* Of rows that differ about half have the first of few outputs as the largest, as the spec says; large matrices none.
 */
static void test_a_hot_output(void) {
    enum { FEW = 64 };
    const sh_wmat router = {.n = FEW, .k = K, .data = panels};
    int hot = 0;
    kn->gemm(&router, 0, FEW / SH_PANEL, x, K, ROWS, y, FEW);
    for (int r = 0; r < ROWS; r++) {
        int largest = 0;
        for (int i = 1; i < FEW; i++)
            if (y[r * FEW + i] > y[r * FEW + largest]) largest = i;
        hot += largest == 0;
    }
    CU_ASSERT(hot > ROWS / 4 && hot < 3 * ROWS / 4);
    kn->gemm(&mat, 0, N / SH_PANEL, x, K, ROWS, y, N);
    for (int r = 0; r < ROWS; r++) CU_ASSERT(y[r * N] < 1);
}

static void refused(const char *isa, const char *word) {
    const sh_kernels *t = NULL;
    CU_ASSERT_EQUAL(sh_kernels_get(isa, &t), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), word));
}

static void test_rates(void) {
    const sh_kernels *t = NULL;
    refused("model:", "model:FMA,BYTES");
    refused("model:50G", "model:FMA,BYTES");
    refused("model:50G,", "model:FMA,BYTES");
    refused("model:50G,20", "each from 1M");
    refused("model:50G,20Gx", "model:FMA,BYTES");
    refused("model:-5G,20G", "model:FMA,BYTES");
    refused("model:nan,20G", "model:FMA,BYTES");
    refused("model:0,20G", "model:FMA,BYTES");
    refused("model:50G,20G,", "model:FMA,BYTES");
    refused("model:50G,20G,1.5", "model:FMA,BYTES");
    refused("model:50G,20G,0.5x", "model:FMA,BYTES");
    refused("model", "allowed are");
    refused("model:3G,2G", "this process has model:2G,2G");
    CU_ASSERT_EQUAL(sh_kernels_get(SPEC, &t), SH_OK);
    CU_ASSERT_PTR_EQUAL(t, kn);
    CU_ASSERT(kn->modelled);
    CU_ASSERT_EQUAL(sh_kernels_get("ref", &t), SH_OK);
    CU_ASSERT(!t->modelled);
}

int main(void) {
    if (sh_kernels_get(SPEC, &kn) != SH_OK) {
        fprintf(stderr, "%s\n", sh_error_text());
        return 1;
    }
    fill_rows();
    if (CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("modelled kernels", NULL, NULL);
    CU_add_test(s, "products take their time", test_products_take_their_time);
    CU_add_test(s, "attention takes its time", test_attention_takes_its_time);
    CU_add_test(s, "results are made up alike", test_results_are_made_up_alike);
    CU_add_test(s, "rates", test_rates);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_add_test(s, "a hot output", test_a_hot_output);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + CU_get_number_of_suites_failed();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
