/* Loads every fixture, whole and by stages, and compares packed weights with a plain reading of the file. */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>

#include "model/layout.h"
#include "model/safetensors.h"
#include "model/weights.h"

static const char *const model[] = {
    SH_TEST_DATA "/text/models/26b-a4b-like", SH_TEST_DATA "/text/models/26b-a4b-sharded",
    SH_TEST_DATA "/text/models/31b-like",     SH_TEST_DATA "/text/models/e2b-like",
    SH_TEST_DATA "/text/models/e4b-like",     SH_SOURCE_DIR "/share/minnow"};
#define MODELS ((int)(sizeof model / sizeof model[0]))

static uint16_t packed(const sh_wmat *m, int row, int col) {
    uint32_t w = m->data[((size_t)(row / 32) * (size_t)m->k + (size_t)col) * 16 + (size_t)(row % 16)];
    return (uint16_t)(row % 32 < 16 ? w : w >> 16);
}

/* Counts elements of a bf16 tensor, from row `skip` on, that differ from a packed matrix. */
static int differing(const sh_tensors *t, const char *name, int skip, const sh_wmat *m) {
    const sh_tensor *x = sh_tensors_find(t, name);
    if (!x || !m->data) return -1;
    int bad = 0;
    for (int r = 0; r < m->n; r++)
        for (int k = 0; k < m->k; k++) {
            uint16_t v;
            memcpy(&v, x->data + 2 * ((size_t)(skip + r) * (size_t)m->k + (size_t)k), 2);
            bad += v != packed(m, r, k);
        }
    return bad;
}

static int differing_in(const sh_tensors *t, int layer, const char *part, int skip, const sh_wmat *m) {
    char name[200];
    snprintf(name, sizeof name, "model.language_model.layers.%d.%s", layer, part);
    return differing(t, name, skip, m);
}

static void check_layer(const sh_config *c, const sh_tensors *t, int i, const sh_layer_weights *w) {
    const sh_layer *l = &c->layer[i];
    CU_ASSERT_EQUAL(differing_in(t, i, "self_attn.q_proj.weight", 0, &w->q), 0);
    CU_ASSERT_EQUAL(differing_in(t, i, "self_attn.o_proj.weight", 0, &w->o), 0);
    CU_ASSERT_EQUAL(w->k.data != NULL, l->has_kv);
    CU_ASSERT_EQUAL(w->v.data != NULL, l->has_kv && !l->k_eq_v);
    if (l->has_kv) CU_ASSERT_EQUAL(differing_in(t, i, "self_attn.k_proj.weight", 0, &w->k), 0);
    if (w->v.data) CU_ASSERT_EQUAL(differing_in(t, i, "self_attn.v_proj.weight", 0, &w->v), 0);
    CU_ASSERT_EQUAL(differing_in(t, i, "mlp.gate_proj.weight", 0, &w->gate), 0);
    CU_ASSERT_EQUAL(differing_in(t, i, "mlp.up_proj.weight", 0, &w->up), 0);
    CU_ASSERT_EQUAL(differing_in(t, i, "mlp.down_proj.weight", 0, &w->down), 0);
    for (int e = 0; e < c->experts; e++) {
        CU_ASSERT_EQUAL(differing_in(t, i, "experts.gate_up_proj", e * 2 * c->expert_ff, &w->expert_gate_up[e]), 0);
        CU_ASSERT_EQUAL(differing_in(t, i, "experts.down_proj", e * c->hidden, &w->expert_down[e]), 0);
    }
    if (c->experts) CU_ASSERT_EQUAL(differing_in(t, i, "router.proj.weight", 0, &w->router), 0);
    if (!c->ple) return;
    CU_ASSERT_EQUAL(differing_in(t, i, "per_layer_input_gate.weight", 0, &w->ple_gate), 0);
    CU_ASSERT_EQUAL(differing_in(t, i, "per_layer_projection.weight", 0, &w->ple_proj), 0);
    CU_ASSERT_EQUAL(
        differing(t, "model.language_model.per_layer_model_projection.weight", i * c->ple, &w->ple_model_proj), 0);
}

static void progressed(void *arg, size_t done, size_t total) {
    size_t *p = arg;
    CU_ASSERT_TRUE(done >= p[0] && done <= total);
    p[0] = done;
    p[1] = total;
}

static void test_fixtures(void) {
    for (int i = 0; i < MODELS; i++) {
        sh_config c;
        sh_weights *w = NULL;
        sh_tensors *t = NULL;
        size_t p[2] = {0};
        CU_ASSERT_EQUAL_FATAL(sh_config_load(model[i], &c), SH_OK);
        CU_ASSERT_EQUAL_FATAL(sh_tensors_open(model[i], &t), SH_OK);
        sh_status st = sh_weights_load(model[i], &c, 0, c.n_layers, NULL, progressed, p, &w);
        if (st != SH_OK) printf("%s\n", sh_error_text());
        CU_ASSERT_EQUAL_FATAL(st, SH_OK);
        CU_ASSERT_EQUAL(p[0], p[1]);
        CU_ASSERT_EQUAL(w->bytes, sh_weights_estimate(&c, 0, c.n_layers));
        for (int y = 0; y < c.n_layers; y++) check_layer(&c, t, y, &w->layer[y]);
        CU_ASSERT_EQUAL(differing(t, "model.language_model.embed_tokens.weight", 0, &w->head), 0);
        sh_weights_destroy(&w);
        CU_ASSERT_PTR_NULL(w);
        sh_tensors_close(&t);
    }
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("weights", NULL, NULL);
    CU_add_test(s, "fixtures", test_fixtures);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed != 0;
}
