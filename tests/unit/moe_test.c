/* Router and experts: against plain double arithmetic, ties, row by row independence, and experts elsewhere (peers). */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "common/mem.h"
#include "model/moe.h"

#define H       40
#define EXPERTS 9
#define TOP     3
#define FF      22
#define ROWS    33

typedef struct matrix {
    int n, k;
    float *w; /* [n, k], exactly bf16 */
    sh_wmat mat;
    void *packed;
} matrix;

static const sh_kernels *kn;
static sh_team *team;
static sh_config config;
static matrix router, gate_up[EXPERTS], down[EXPERTS];
static sh_wmat gate_up_mats[EXPERTS], down_mats[EXPERTS];
static float router_scale[H], pre_norm[H], expert_scale[EXPERTS], x[ROWS * H];
static sh_layer_weights weights;

static uint64_t state = 7;
static float noise(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(state >> 11) / 4503599627370496.0 - 1.0);
}

static matrix make(int n, int k) {
    matrix m = {.n = n, .k = k, .w = malloc((size_t)(n * k) * sizeof(float))};
    uint16_t *half = malloc((size_t)(n * k) * sizeof *half);
    if (!m.w || !half || sh_mem_alloc(sh_wmat_bytes(SH_W_BF16, n, k), "test", &m.packed) != SH_OK) exit(1);
    for (int i = 0; i < n * k; i++) m.w[i] = noise() * 0.5f;
    kn->to_bf16(half, m.w, n * k);
    kn->from_bf16(m.w, half, n * k);
    sh_pack_bf16(m.packed, half, (size_t)k, n, k, 0, sh_wmat_panels(n));
    free(half);
    m.mat = (sh_wmat){.n = n, .k = k, .data = m.packed};
    return m;
}

static void drop(matrix *m) {
    sh_mem_free(m->packed, sh_wmat_bytes(SH_W_BF16, m->n, m->k));
    free(m->w);
}

static int set_up(void) {
    if (sh_kernels_select(&kn) != SH_OK || sh_team_create(1, NULL, 0, &team) != SH_OK) return 1;
    config = (sh_config){.hidden = H, .experts = EXPERTS, .top_k = TOP, .expert_ff = FF, .eps = 1e-6f};
    router = make(EXPERTS, H);
    for (int e = 0; e < EXPERTS; e++) {
        gate_up[e] = make(2 * FF, H);
        down[e] = make(H, FF);
        gate_up_mats[e] = gate_up[e].mat;
        down_mats[e] = down[e].mat;
        expert_scale[e] = 1 + 0.3f * noise();
    }
    for (int i = 0; i < H; i++) router_scale[i] = 1 + 0.5f * noise(), pre_norm[i] = 1 + 0.5f * noise();
    for (int i = 0; i < ROWS * H; i++) x[i] = 3 * noise();
    weights = (sh_layer_weights){.router = router.mat,
                                 .router_scale = router_scale,
                                 .expert_scale = expert_scale,
                                 .pre_ff_norm_2 = pre_norm,
                                 .expert_gate_up = gate_up_mats,
                                 .expert_down = down_mats};
    return 0;
}

static int tear_down(void) {
    drop(&router);
    for (int e = 0; e < EXPERTS; e++) drop(&gate_up[e]), drop(&down[e]);
    sh_team_destroy(&team);
    return 0;
}

static void run(sh_mode mode, const sh_peers *peers, sh_team *t, const float *in, int n, float *z, int32_t *ids,
                float *w) {
    sh_moe *m = NULL;
    CU_ASSERT_FATAL(sh_moe_create(&config, mode, ROWS, t, kn, peers, &m) == SH_OK);
    sh_moe_begin(m, 0, &weights, in, n);
    if (ids) memcpy(ids, sh_moe_ids(m), (size_t)(n * TOP) * sizeof *ids);
    if (w) memcpy(w, sh_moe_weights(m), (size_t)(n * TOP) * sizeof *w);
    sh_moe_end(m, 0, &weights, z);
    sh_moe_destroy(&m);
    sh_moe_destroy(&m);
}

static void normed(const float *in, double *out) {
    double sq = 0;
    for (int i = 0; i < H; i++) sq += (double)in[i] * in[i];
    for (int i = 0; i < H; i++) out[i] = in[i] / sqrt(sq / H + 1e-6);
}

static void plain_expert(int e, const double *m, double *out) {
    double act[FF];
    for (int i = 0; i < FF; i++) {
        double g = 0, u = 0;
        for (int k = 0; k < H; k++) {
            g += gate_up[e].w[i * H + k] * m[k];
            u += gate_up[e].w[(FF + i) * H + k] * m[k];
        }
        act[i] = 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u;
    }
    for (int o = 0; o < H; o++) {
        out[o] = 0;
        for (int i = 0; i < FF; i++) out[o] += down[e].w[o * FF + i] * act[i];
    }
}

static void against_plain(void) {
    float z[ROWS * H], w[ROWS * TOP];
    int32_t ids[ROWS * TOP];
    run(SH_MODE_EXACT, NULL, team, x, ROWS, z, ids, w);
    for (int r = 0; r < ROWS; r++) {
        double n[H], p[EXPERTS], m[H], want[H] = {0}, sum = 0, chosen = 0;
        normed(x + r * H, n);
        for (int e = 0; e < EXPERTS; e++) {
            p[e] = 0;
            for (int k = 0; k < H; k++) p[e] += n[k] * router_scale[k] / sqrt(H) * router.w[e * H + k];
            p[e] = exp(p[e]);
            sum += p[e];
        }
        for (int k = 0; k < H; k++) m[k] = n[k] * pre_norm[k];
        for (int j = 0; j < TOP; j++) chosen += p[ids[r * TOP + j]];
        for (int j = 0; j < TOP; j++) {
            int e = ids[r * TOP + j], better = 0;
            for (int i = 0; i < EXPERTS; i++) better += p[i] > p[e];
            CU_ASSERT_EQUAL(better, j); /* the j-th largest */
            double one[H], weight = p[e] / chosen * expert_scale[e];
            CU_ASSERT_DOUBLE_EQUAL(w[r * TOP + j], weight, 1e-6);
            plain_expert(e, m, one);
            for (int i = 0; i < H; i++) want[i] += weight * one[i];
        }
        for (int i = 0; i < H; i++) CU_ASSERT_DOUBLE_EQUAL(z[r * H + i], want[i], 1e-4 + 1e-5 * fabs(want[i]));
    }
}

/* A zero row: every expert is as likely as any other, the lower ids win. */
static void ties(void) {
    float zero[H] = {0}, z[H], w[TOP];
    int32_t ids[TOP];
    run(SH_MODE_EXACT, NULL, team, zero, 1, z, ids, w);
    for (int j = 0; j < TOP; j++) {
        CU_ASSERT_EQUAL(ids[j], j);
        CU_ASSERT_DOUBLE_EQUAL(w[j], expert_scale[j] / TOP, 1e-6);
    }
}

/* NaN from damaged weights stays in its row and picks valid experts. */
static void not_a_number(void) {
    float bad[2 * H], z[2 * H], alone[H];
    int32_t ids[2 * TOP];
    memcpy(bad, x, sizeof bad);
    bad[3] = NAN;
    run(SH_MODE_BF16, NULL, team, bad, 2, z, ids, NULL);
    for (int j = 0; j < TOP; j++) {
        CU_ASSERT(ids[j] >= 0 && ids[j] < EXPERTS);
        for (int i = 0; i < j; i++) CU_ASSERT_NOT_EQUAL(ids[i], ids[j]);
    }
    run(SH_MODE_BF16, NULL, team, x + H, 1, alone, NULL, NULL);
    CU_ASSERT(memcmp(alone, z + H, sizeof alone) == 0);
}

/* Experts elsewhere: gets rows as they travel, answers per choice. */
typedef struct remote {
    sh_mode mode;
    float rows[ROWS * H];
    int32_t ids[ROWS * TOP];
} remote;

static void remote_begin(void *ctx, int layer, const float *rows, const int32_t *ids, int n) {
    remote *r = ctx;
    CU_ASSERT_EQUAL(layer, 0);
    memcpy(r->rows, rows, (size_t)(n * H) * sizeof(float));
    memcpy(r->ids, ids, (size_t)(n * TOP) * sizeof *ids);
}

static void remote_end(void *ctx, int layer, float *results, int n) {
    remote *r = ctx;
    (void)layer;
    for (int i = n * TOP - 1; i >= 0; i--) { /* in whatever order */
        float act[2 * FF], *out = results + (size_t)i * H;
        int e = r->ids[i];
        kn->gemm(&gate_up_mats[e], 0, sh_wmat_panels(2 * FF), r->rows + (size_t)(i / TOP) * H, H, 1, act, 2 * FF);
        kn->gelu_mul(act, act, act + FF, FF);
        kn->gemm(&down_mats[e], 0, sh_wmat_panels(H), act, FF, 1, out, H);
        if (r->mode != SH_MODE_BF16) continue;
        uint16_t half[H];
        kn->to_bf16(half, out, H);
        kn->from_bf16(out, half, H);
    }
}

static void placement(void) {
    static remote r;
    sh_peers peers = {.ctx = &r, .experts_begin = remote_begin, .experts_end = remote_end};
    sh_team *two = NULL;
    CU_ASSERT_FATAL(sh_team_create(2, NULL, 0, &two) == SH_OK);
    float local[ROWS * H], other[ROWS * H];
    for (int mode = SH_MODE_EXACT; mode <= SH_MODE_BF16; mode++) {
        r.mode = (sh_mode)mode;
        run(r.mode, NULL, team, x, ROWS, local, NULL, NULL);
        run(r.mode, &peers, team, x, ROWS, other, NULL, NULL);
        CU_ASSERT(memcmp(local, other, sizeof local) == 0);
        run(r.mode, NULL, two, x, ROWS, other, NULL, NULL);
        CU_ASSERT(memcmp(local, other, sizeof local) == 0);
        for (int i = 0; i < ROWS; i++) { /* a row alone */
            run(r.mode, NULL, team, x + i * H, 1, other, NULL, NULL);
            CU_ASSERT(memcmp(local + i * H, other, H * sizeof(float)) == 0);
        }
    }
    sh_team_destroy(&two);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("moe", set_up, tear_down);
    CU_add_test(s, "against plain arithmetic", against_plain);
    CU_add_test(s, "ties", ties);
    CU_add_test(s, "not a number", not_a_number);
    CU_add_test(s, "placement", placement);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
