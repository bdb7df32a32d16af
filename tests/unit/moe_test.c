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

static void run(sh_mode mode, const sh_expert_peers *peers, sh_team *t, const float *in, int n, float *z, int32_t *ids,
                float *w) {
    sh_moe *m = NULL;
    int slot = peers ? 1 : 0;
    CU_ASSERT_FATAL(sh_moe_create(&config, mode, ROWS, t, kn, peers, &m) == SH_OK);
    CU_ASSERT_EQUAL(sh_moe_begin(m, slot, 0, &weights, in, n), SH_OK);
    if (ids) memcpy(ids, sh_moe_ids(m, slot), (size_t)(n * TOP) * sizeof *ids);
    if (w) memcpy(w, sh_moe_weights(m, slot), (size_t)(n * TOP) * sizeof *w);
    CU_ASSERT_EQUAL(sh_moe_compute(m, slot, &weights), SH_OK);
    CU_ASSERT_EQUAL(sh_moe_end(m, slot, z), SH_OK);
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

/* Members that hold the odd experts, and each send as many rows as they get, for the even ones: together more than go
 * in one pass. */
#define GUESTS 4

typedef struct other {
    sh_mode mode;
    int calls;
    uint8_t rows[ROWS * H * 4], results[ROWS * TOP * H * 4];           /* of the rows that came */
    uint8_t theirs[ROWS * H * 4], answers[GUESTS][ROWS * TOP * H * 4]; /* of those that it sends */
    uint16_t choice[ROWS * TOP][2];
    sh_expert_guest guest[GUESTS];
} other;

static size_t wire(const other *o) {
    return o->mode == SH_MODE_BF16 ? 2 : 4;
}

/* One expert on one row, as it travels. */
static void expert_row(const other *o, int e, const uint8_t *row, uint8_t *to) {
    float in[H], act[2 * FF], out[H];
    if (o->mode == SH_MODE_BF16)
        kn->from_bf16(in, (const uint16_t *)(const void *)row, H);
    else
        memcpy(in, row, sizeof in);
    kn->gemm(&gate_up_mats[e], 0, sh_wmat_panels(2 * FF), in, H, 1, act, 2 * FF);
    kn->gelu_mul(act, act, act + FF, FF);
    kn->gemm(&down_mats[e], 0, sh_wmat_panels(H), act, FF, 1, out, H);
    if (o->mode == SH_MODE_BF16)
        kn->to_bf16((uint16_t *)(void *)to, out, H);
    else
        memcpy(to, out, sizeof out);
}

static bool other_holds(const void *ctx, int layer, int expert) {
    (void)ctx, (void)layer;
    return expert % 2 == 0;
}

static sh_status other_begin(void *ctx, int slot, int layer, const void *rows, const int32_t *ids, int n,
                             const void **answer) {
    other *o = ctx;
    CU_ASSERT(slot == 1 && layer == 0 && o->calls++ == 0);
    memcpy(o->rows, rows, (size_t)n * H * wire(o));
    for (int i = n * TOP - 1; i >= 0; i--) { /* in whatever order */
        if (ids[i] % 2 == 0) continue;
        uint8_t *to = o->results + (size_t)i * H * wire(o);
        expert_row(o, ids[i], o->rows + (size_t)(i / TOP) * H * wire(o), to);
        answer[i] = to;
    }
    return SH_OK;
}

static sh_status other_guests(void *ctx, int slot, const sh_expert_guest **guests, int *n) {
    other *o = ctx;
    CU_ASSERT(slot == 1 && o->calls++ == 1);
    memcpy(o->theirs, o->rows, sizeof o->rows);
    int count = 0;
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < TOP; j++) {
            o->choice[count][0] = (uint16_t)r;
            o->choice[count++][1] = (uint16_t)(r % 5 == 4 ? 8 : 2 * j); /* one expert gets many */
        }
    for (int g = 0; g < GUESTS; g++)
        o->guest[g] = (sh_expert_guest){.n_rows = ROWS,
                                        .n_choices = g == 1 ? 0 : count - g,
                                        .choice = o->choice,
                                        .rows = o->theirs,
                                        .results = o->answers[g]};
    *guests = o->guest;
    *n = GUESTS;
    return SH_OK;
}

static sh_status other_reply(void *ctx, int slot) {
    other *o = ctx;
    CU_ASSERT(slot == 1 && o->calls++ == 2);
    for (int g = 0; g < GUESTS; g++)
        for (int i = 0; i < o->guest[g].n_choices; i++) {
            uint8_t want[H * 4];
            size_t bytes = H * wire(o);
            expert_row(o, o->choice[i][1], o->theirs + o->choice[i][0] * bytes, want);
            CU_ASSERT(memcmp(want, o->answers[g] + (size_t)i * bytes, bytes) == 0);
        }
    return SH_OK;
}

static sh_status other_end(void *ctx, int slot) {
    other *o = ctx;
    CU_ASSERT(slot == 1 && o->calls++ == 3);
    return SH_OK;
}

static void other_poll(void *ctx) {
    (void)ctx;
}

static void placement(void) {
    static other o;
    sh_expert_peers peers = {.ctx = &o,
                             .members = 1 + GUESTS,
                             .part_rows = ROWS,
                             .split_rows = ROWS + 1,
                             .holds = other_holds,
                             .begin = other_begin,
                             .guests = other_guests,
                             .reply = other_reply,
                             .end = other_end,
                             .poll = other_poll};
    sh_team *two = NULL;
    CU_ASSERT_FATAL(sh_team_create(2, NULL, 0, &two) == SH_OK);
    float local[ROWS * H], elsewhere[ROWS * H];
    for (int mode = SH_MODE_EXACT; mode <= SH_MODE_BF16; mode++) {
        o.mode = (sh_mode)mode;
        run(o.mode, NULL, team, x, ROWS, local, NULL, NULL);
        for (int i = 0; i < 2; i++) {
            o.calls = 0;
            run(o.mode, &peers, i ? two : team, x, ROWS, elsewhere, NULL, NULL);
            CU_ASSERT(memcmp(local, elsewhere, sizeof local) == 0);
            CU_ASSERT_EQUAL(o.calls, 4);
        }
        run(o.mode, NULL, two, x, ROWS, elsewhere, NULL, NULL);
        CU_ASSERT(memcmp(local, elsewhere, sizeof local) == 0);
        for (int i = 0; i < ROWS; i++) { /* a row alone */
            run(o.mode, NULL, team, x + i * H, 1, elsewhere, NULL, NULL);
            CU_ASSERT(memcmp(local + i * H, elsewhere, H * sizeof(float)) == 0);
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
