/* KV pages: what is written is read, in every type; bytes move between pools; nothing else changes. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "model/kv.h"
#include "model/rope.h"

#define HEADS 3
#define DIM   10

/* Layers: 0 sliding producer, 1 global producer with K = V, 2 sliding consumer of 0. */
static sh_config config(void) {
    sh_layer l = {.heads = HEADS, .kv_heads = HEADS, .head_dim = DIM, .rotated_pairs = 2, .theta = 1e4};
    l.rope_factor = 1;
    sh_config c = {.n_layers = 3, .first_shared = 2};
    c.layer[0] = c.layer[1] = c.layer[2] = l;
    c.layer[0].kind = c.layer[2].kind = SH_KV_SLIDING;
    c.layer[0].window = c.layer[2].window = 64;
    c.layer[1].k_eq_v = c.layer[0].has_kv = c.layer[1].has_kv = true;
    c.layer[1].kv_from = 1;
    return c;
}

static const int32_t pages[SH_KV_KINDS] = {8, 8};
static const int32_t mine[] = {6, 1, 3, 4}, others[] = {0, 2, 5, 7};

static sh_span span(const int32_t *p) {
    sh_span s = {.seq = 1, .pos = 20, .rows = 90, .keep = 1, .n_pages = {4, 4}};
    s.pages[0] = s.pages[1] = p;
    return s;
}

static const sh_kernels *kernels(void) {
    const sh_kernels *kn = NULL;
    CU_ASSERT_FATAL(sh_kernels_get("ref", &kn) == SH_OK);
    return kn;
}

/* Values that every type holds exactly, different for every place: with 127 in each vector, the scale of q8 is 1. */
static float value(int pos, int head, int d, int which) {
    if (d == pos % DIM) return 127;
    return (float)((pos * 7 + head * 31 + d * 3 + which * 101) % 255 - 127);
}

static void fill(sh_kv_pool *p, int layer, const sh_span *s, bool k_eq_v) {
    float k[HEADS * DIM], v[HEADS * DIM];
    for (int r = 0; r < s->rows; r++) {
        for (int h = 0; h < HEADS; h++)
            for (int d = 0; d < DIM; d++) {
                k[h * DIM + d] = value(s->pos + r, h, d, 0);
                v[h * DIM + d] = value(s->pos + r, h, d, 1);
            }
        sh_kv_write(p, kernels(), layer, s, r, k_eq_v ? NULL : k, v);
    }
}

static void check_read(const sh_kv_pool *p, int layer, const sh_span *s, int pos, int n, int head) {
    float *k = malloc((size_t)n * DIM * sizeof *k), *v = malloc((size_t)n * DIM * sizeof *v);
    if (!k || !v) exit(1);
    sh_kv_read(p, kernels(), layer, s, pos, n, head, NULL, NULL, k, v);
    int wrong = 0;
    for (int i = 0; i < n; i++)
        for (int d = 0; d < DIM; d++)
            wrong += k[i * DIM + d] != value(pos + i, head, d, 0) || v[i * DIM + d] != value(pos + i, head, d, 1);
    CU_ASSERT_EQUAL(wrong, 0);
    free(k);
    free(v);
}

static void write_and_read(void) {
    for (int type = SH_KV_F32; type < SH_KV_TYPES; type++) {
        sh_config c = config();
        sh_kv_pool *p = NULL;
        CU_ASSERT_FATAL(sh_kv_create(&c, (sh_kv_type)type, 0, 2, pages, &p) == SH_OK);
        CU_ASSERT_EQUAL(sh_kv_pool_type(p), (sh_kv_type)type);
        sh_span a = span(mine), b = span(others);
        fill(p, 0, &a, false);
        fill(p, 0, &b, false); /* another sequence at the same positions */
        for (int h = 0; h < HEADS; h++) {
            check_read(p, 0, &a, 20, 90, h);
            check_read(p, 0, &a, 31, 2, h); /* over a page border */
            check_read(p, 0, &b, 109, 1, h);
        }
        a.page0[SH_KV_SLIDING] = 2; /* the first pages are gone */
        a.n_pages[SH_KV_SLIDING] = 2;
        a.pages[SH_KV_SLIDING] = mine + 2;
        check_read(p, 0, &a, 64, 40, 1);
        sh_kv_destroy(&p);
        CU_ASSERT_PTR_NULL(p);
        sh_kv_destroy(&p);
    }
}

/* K = V: one tensor stored, K made from it by norm weight and rotation. */
static void one_tensor(sh_kv_type type) {
    sh_config c = config();
    sh_kv_pool *p = NULL;
    sh_rope rope;
    CU_ASSERT_FATAL(sh_kv_create(&c, type, 0, 2, pages, &p) == SH_OK);
    CU_ASSERT_FATAL(sh_rope_create(&c.layer[1], 128, &rope) == SH_OK);
    sh_rope_reach(&rope, kernels(), 128);
    CU_ASSERT_EQUAL(2 * sh_kv_row_bytes(&c, type, 1), sh_kv_row_bytes(&c, type, 0));
    sh_span s = span(mine);
    fill(p, 1, &s, true);
    float norm[DIM], k[3 * DIM], v[3 * DIM], alone[3 * DIM];
    for (int d = 0; d < DIM; d++) norm[d] = 0.5f + (float)d;
    sh_kv_read(p, kernels(), 1, &s, 62, 3, 2, norm, &rope, k, v);
    sh_kv_read(p, kernels(), 1, &s, 62, 3, 2, norm, &rope, NULL, alone);
    CU_ASSERT(memcmp(v, alone, sizeof v) == 0);
    for (int i = 0; i < 3; i++) {
        float want[DIM];
        for (int d = 0; d < DIM; d++) {
            CU_ASSERT_EQUAL(v[i * DIM + d], value(62 + i, 2, d, 1));
            want[d] = v[i * DIM + d] * norm[d];
        }
        sh_rope_apply(&rope, kernels(), want, 62 + i);
        CU_ASSERT(memcmp(want, k + i * DIM, sizeof want) == 0);
    }
    sh_rope_release(&rope);
    sh_kv_destroy(&p);
}

static void one_tensor_all(void) {
    for (int type = SH_KV_F32; type < SH_KV_TYPES; type++) one_tensor((sh_kv_type)type);
}

/* Shards: out of one pool into a mirror with other pages. */
static void export_import(sh_kv_type type, size_t vec) {
    sh_config c = config();
    sh_kv_pool *p = NULL, *mirror = NULL;
    CU_ASSERT_FATAL(sh_kv_create(&c, type, 0, 2, pages, &p) == SH_OK);
    CU_ASSERT_FATAL(sh_kv_create(&c, type, 2, 3, pages, &mirror) == SH_OK);
    CU_ASSERT(sh_kv_holds(p, 0) && sh_kv_holds(p, 1) && !sh_kv_holds(p, 2));
    CU_ASSERT(sh_kv_holds(mirror, 0) && !sh_kv_holds(mirror, 1));
    sh_span from = span(mine), to = span(others);
    fill(p, 0, &from, false);
    size_t row = sh_kv_row_bytes(&c, type, 0);
    CU_ASSERT_EQUAL(row, 2 * HEADS * vec);
    uint8_t *bytes = malloc(90 * row + 8);
    if (!bytes) exit(1);
    memset(bytes, 0x5a, 90 * row + 8);
    sh_kv_export(p, 0, &from, 0, 90, bytes);
    for (int i = 0; i < 8; i++) CU_ASSERT_EQUAL(bytes[90 * row + (size_t)i], 0x5a);
    sh_kv_import(mirror, 0, &to, 0, 30, bytes); /* in two parts */
    sh_kv_import(mirror, 0, &to, 30, 60, bytes + 30 * row);
    for (int h = 0; h < HEADS; h++) check_read(mirror, 0, &to, 20, 90, h);
    free(bytes);
    sh_kv_destroy(&p);
    sh_kv_destroy(&mirror);
}

static void export_import_all(void) {
    export_import(SH_KV_F32, 4 * DIM);
    export_import(SH_KV_BF16, 2 * DIM);
    export_import(SH_KV_Q8, DIM + 4);
}

/* Values that no type but f32 holds: what is packed for others is what is exported after writing; codes, then their
 * scale; read back half a step away at most. */
static void pack_q8(void) {
    sh_config c = config();
    sh_kv_pool *p = NULL;
    CU_ASSERT_FATAL(sh_kv_create(&c, SH_KV_Q8, 0, 2, pages, &p) == SH_OK);
    sh_span s = span(mine);
    float k[HEADS * DIM], v[HEADS * DIM], tile[2][DIM], scale;
    for (int i = 0; i < HEADS * DIM; i++) k[i] = sinf((float)i), v[i] = 1e3f * cosf((float)i);
    k[3] = -2; /* the largest of head 0 */
    for (int layer = 0; layer < 2; layer++) {
        uint8_t packed[2 * HEADS * (DIM + 4) + 1], stored[2 * HEADS * (DIM + 4)];
        size_t row = sh_kv_row_bytes(&c, SH_KV_Q8, layer);
        CU_ASSERT_EQUAL_FATAL(row, (size_t)(layer ? 1 : 2) * HEADS * (DIM + 4));
        packed[row] = 0x5a;
        sh_kv_write(p, kernels(), layer, &s, 7, layer ? NULL : k, v);
        sh_kv_pack(p, kernels(), layer, layer ? NULL : k, v, packed);
        sh_kv_export(p, layer, &s, 7, 1, stored);
        CU_ASSERT(memcmp(packed, stored, row) == 0);
        CU_ASSERT_EQUAL(packed[row], 0x5a);
        if (layer) continue;
        CU_ASSERT_EQUAL((int8_t)stored[3], -127);
        memcpy(&scale, stored + DIM, sizeof scale);
        CU_ASSERT_DOUBLE_EQUAL(scale, 2 / 127.0, 1e-8);
        sh_kv_read(p, kernels(), 0, &s, 27, 1, 0, NULL, NULL, tile[0], tile[1]);
        for (int d = 0; d < DIM; d++) {
            CU_ASSERT(fabsf(tile[0][d] - k[d]) <= 0.5001f * 2 / 127);
            CU_ASSERT(fabsf(tile[1][d] - v[d]) <= 0.5001f * 1e3f / 127);
        }
    }
    sh_kv_destroy(&p);
}

static void bad_pages(void) {
    sh_config c = config();
    sh_kv_pool *p = NULL;
    CU_ASSERT_EQUAL(sh_kv_create(&c, SH_KV_F32, 0, 2, (const int32_t[]){4, -1}, &p), SH_EINPUT);
    CU_ASSERT_PTR_NULL(p);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("kv", NULL, NULL);
    CU_add_test(s, "write and read", write_and_read);
    CU_add_test(s, "one tensor", one_tensor_all);
    CU_add_test(s, "export and import", export_import_all);
    CU_add_test(s, "packed as stored, q8", pack_q8);
    CU_add_test(s, "bad pages", bad_pages);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
