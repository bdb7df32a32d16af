/* Loads every fixture, whole and by stages, and compares packed weights with a plain reading of the file; then rewrites
 * fixtures in every accepted spelling (same result) and in every wrong way (a message that names the tensor). */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/file.h"
#include "model/layout.h"
#include "model/safetensors.h"
#include "model/weights.h"
#include "tests/checkpoint.h"

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

typedef struct told {
    sh_load_times last;
    int n;
} told;

static void progressed(void *arg, const sh_load_times *t) {
    told *x = arg;
    CU_ASSERT(t->bytes >= x->last.bytes && t->bytes <= t->total && t->seconds >= x->last.seconds);
    CU_ASSERT(x->n == 0 || t->total == x->last.total);
    CU_ASSERT(t->reading >= 0 && t->packing >= 0 && t->reading + t->packing <= t->seconds * 1.001);
    x->last = *t;
    x->n++;
}

/* What loading the whole model reads: everything but the tables that are looked up, and what nobody uses. */
static uint64_t bytes_to_read(const sh_config *c, const sh_tensors *t) {
    uint64_t sum = 0;
    for (int i = 0; i < sh_tensors_count(t); i++) {
        const sh_tensor *x = sh_tensors_at(t, i);
        int layer = -1;
        const char *at = strstr(x->name, "layers.");
        if (sh_weights_is_tower(x->name) || strstr(x->name, "embed_tokens_per_layer")) continue;
        if (strstr(x->name, "embed_tokens") && !c->tied) continue;
        if (at) layer = atoi(at + 7);
        bool kv = strstr(x->name, ".k_proj") || strstr(x->name, ".v_proj") || strstr(x->name, ".k_norm");
        if (layer >= 0 && !c->layer[layer].has_kv && kv) continue;
        sum += x->bytes;
    }
    return sum;
}

static void test_fixtures(void) {
    for (int i = 0; i < MODELS; i++) {
        sh_config c;
        sh_weights *w = NULL;
        sh_tensors *t = NULL;
        told p = {0};
        CU_ASSERT_EQUAL_FATAL(sh_config_load(model[i], &c), SH_OK);
        CU_ASSERT_EQUAL_FATAL(sh_tensors_open(model[i], &t), SH_OK);
        sh_status st = sh_weights_load(
            model[i], &c,
            &(sh_weights_options){
                .mode = SH_MODE_BF16, .first = 0, .last = c.n_layers, .tell = progressed, .tell_arg = &p},
            NULL, &w);
        if (st != SH_OK) printf("%s\n", sh_error_text());
        CU_ASSERT_EQUAL_FATAL(st, SH_OK);
        CU_ASSERT(p.n >= 1 && p.last.bytes == p.last.total && p.last.bytes == w->load.bytes);
        CU_ASSERT_EQUAL(w->load.bytes, bytes_to_read(&c, t));
        CU_ASSERT(w->load.seconds > 0 && w->load.packing > 0);
        CU_ASSERT_EQUAL(w->bytes, sh_weights_estimate(&c, SH_MODE_BF16, 0, c.n_layers));
        for (int y = 0; y < c.n_layers; y++) check_layer(&c, t, y, &w->layer[y]);
        CU_ASSERT_EQUAL(differing(t, "model.language_model.embed_tokens.weight", 0, &w->head), 0);
        sh_weights_destroy(&w);
        CU_ASSERT_PTR_NULL(w);
        sh_tensors_close(&t);
    }
}

static float bf16_at(const sh_tensor *t, size_t i) {
    uint16_t v;
    memcpy(&v, t->data + 2 * i, 2);
    uint32_t u = (uint32_t)v << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static void test_vectors(void) {
    for (int i = 0; i < MODELS; i++) {
        sh_config c;
        sh_weights *w = NULL;
        sh_tensors *t = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_config_load(model[i], &c), SH_OK);
        CU_ASSERT_EQUAL_FATAL(sh_tensors_open(model[i], &t), SH_OK);
        CU_ASSERT_EQUAL_FATAL(
            sh_weights_load(model[i], &c, &(sh_weights_options){.mode = SH_MODE_BF16, .first = 0, .last = c.n_layers},
                            NULL, &w),
            SH_OK);
        const sh_tensor *norm = sh_tensors_find(t, "model.language_model.norm.weight");
        const sh_tensor *scalar = sh_tensors_find(t, "model.language_model.layers.2.layer_scalar");
        const sh_tensor *post = sh_tensors_find(t, "model.language_model.layers.1.post_feedforward_layernorm.weight");
        for (int k = 0; k < c.hidden; k++) {
            CU_ASSERT_EQUAL(w->final_norm[k], bf16_at(norm, (size_t)k));
            CU_ASSERT_EQUAL(w->layer[1].post_ff_norm[k], bf16_at(post, (size_t)k));
        }
        CU_ASSERT_EQUAL(w->layer[2].scalar, bf16_at(scalar, 0));
        float *row = malloc(sizeof *row * (size_t)c.hidden);
        const sh_tensor *embed = sh_tensors_find(t, "model.language_model.embed_tokens.weight");
        for (int id = 0; id < c.vocab; id += 511) {
            sh_weights_embed(w, id, row);
            for (int k = 0; k < c.hidden; k++)
                CU_ASSERT_EQUAL(row[k],
                                bf16_at(embed, (size_t)id * (size_t)c.hidden + (size_t)k) * (float)sqrt(c.hidden));
        }
        const sh_tensor *ple = sh_tensors_find(t, "model.language_model.embed_tokens_per_layer.weight");
        for (int y = 0; ple && y < c.n_layers; y += 3) {
            sh_weights_ple_row(w, y, 1000, row);
            for (int k = 0; k < c.ple; k++)
                CU_ASSERT_EQUAL(row[k], bf16_at(ple, (size_t)(1000 * c.n_layers + y) * (size_t)c.ple + (size_t)k) *
                                            (float)sqrt(c.ple));
        }
        free(row);
        sh_weights_destroy(&w);
        sh_tensors_close(&t);
    }
}

/* Stages together hold what the whole holds, and each only its own. */
static void test_stages(void) {
    for (int i = 0; i < MODELS; i++) {
        sh_config c;
        sh_tensors *t = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_config_load(model[i], &c), SH_OK);
        CU_ASSERT_EQUAL_FATAL(sh_tensors_open(model[i], &t), SH_OK);
        sh_team *team = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_team_create(3, NULL, 0, &team), SH_OK); /* threads cannot change a byte */
        for (int first = 0, last; first < c.n_layers; first = last) {
            last = first + 2 < c.n_layers ? first + 2 : c.n_layers;
            sh_weights *w = NULL;
            CU_ASSERT_EQUAL_FATAL(
                sh_weights_load(model[i], &c, &(sh_weights_options){.mode = SH_MODE_BF16, .first = first, .last = last},
                                team, &w),
                SH_OK);
            CU_ASSERT_EQUAL(w->bytes, sh_weights_estimate(&c, SH_MODE_BF16, first, last));
            for (int y = first; y < last; y++) check_layer(&c, t, y, &w->layer[y - first]);
            CU_ASSERT_EQUAL(w->head.data != NULL, last == c.n_layers);
            CU_ASSERT_EQUAL(w->final_norm != NULL, last == c.n_layers);
            if (last == c.n_layers)
                CU_ASSERT_EQUAL(differing(t, "model.language_model.embed_tokens.weight", 0, &w->head), 0);
            sh_weights_destroy(&w);
        }
        sh_team_destroy(&team);
        sh_tensors_close(&t);
    }
    sh_config c;
    sh_weights *w = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_config_load(model[0], &c), SH_OK);
    CU_ASSERT_EQUAL(
        sh_weights_load(model[0], &c, &(sh_weights_options){.mode = SH_MODE_BF16, .first = 3, .last = 3}, NULL, &w),
        SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "layers 3 to 3: the model has 12 layers");
    CU_ASSERT_EQUAL(
        sh_weights_load(model[0], &c, &(sh_weights_options){.mode = SH_MODE_BF16, .first = 3, .last = 13}, NULL, &w),
        SH_EINPUT);
}

/* Ranks that only make K/V: no head, of the last layer what makes K/V, and nothing of the layers that share K/V. */
static void test_only_kv(void) {
    for (int i = 0; i < MODELS; i++) {
        sh_config c, all;
        sh_weights *w = NULL, *whole = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_config_load(model[i], &all), SH_OK);
        c = all;
        sh_config_prefill(&c);
        int last = c.kv_end - 1;
        CU_ASSERT_EQUAL(last + 1, all.first_shared);
        CU_ASSERT_EQUAL_FATAL(sh_weights_load(model[i], &c,
                                              &(sh_weights_options){.mode = SH_MODE_BF16, .first = 0, .last = last + 1},
                                              NULL, &w),
                              SH_OK);
        CU_ASSERT_EQUAL_FATAL(
            sh_weights_load(model[i], &all,
                            &(sh_weights_options){.mode = SH_MODE_BF16, .first = 0, .last = all.n_layers}, NULL,
                            &whole),
            SH_OK);
        const sh_layer_weights *a = &w->layer[last], *b = &whole->layer[last];
        CU_ASSERT_EQUAL(w->bytes, sh_weights_estimate(&c, SH_MODE_BF16, 0, last + 1));
        CU_ASSERT_TRUE(w->bytes < whole->bytes);
        CU_ASSERT_TRUE(!w->head.data && !w->final_norm && !a->q.data && !a->o.data && !a->gate.data && !a->down.data);
        CU_ASSERT_TRUE(!a->q_norm && !a->pre_ff_norm && !a->expert_gate_up && !a->ple_gate.data);
        CU_ASSERT_EQUAL(memcmp(a->k.data, b->k.data, sh_wmat_bytes(SH_W_BF16, b->k.n, b->k.k)), 0);
        CU_ASSERT_EQUAL(memcmp(a->input_norm, b->input_norm, sizeof(float) * (size_t)c.hidden), 0);
        if (last > 0) CU_ASSERT_EQUAL(memcmp(w->layer[0].down.data, whole->layer[0].down.data, 64), 0);
        sh_weights_destroy(&w);
        sh_weights_destroy(&whole);
    }
}

/* --- rewriting a fixture -------------------------------------------------------------------------------------------
 */

static char dir[] = "/tmp/shoal-weights-XXXXXX";

static int begin(void) {
    return mkdtemp(dir) == NULL;
}

static int end(void) {
    return sh_path_remove(dir) != SH_OK;
}

#define OLD "model.language_model."
typedef struct edit {
    const char *prefix;             /* in place of OLD */
    bool strip, add;                /* .weight taken away, or put after names without it */
    bool unfuse;                    /* experts one by one */
    const char *type;               /* every tensor in F32 or F16 */
    bool odd;                       /* data at an odd address */
    const char *drop, *rename, *to; /* one tensor: left out; with another name */
    const char *retype;             /* one tensor: another type of the same size */
    const char *reshape;            /* one tensor: one dimension more, [1, …] */
    const char *head;               /* embed_tokens a second time under this name */
    const char *spoil;              /* one tensor: its first item changed to a number that bf16 cannot hold */
    int bits;                       /* with spoil: those of the 16 bits of that item, in place of that number */
    const char *extra;              /* one more tensor, [1] */
} edit;

static uint16_t to_f16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    int e = (int)(u >> 23 & 255) - 112;
    if (e <= 0 || e >= 31) return 0; /* tests compare only what survives */
    return (uint16_t)(u >> 16 & 0x8000) | (uint16_t)(e << 10) | (uint16_t)(u >> 13 & 1023);
}

static void add_part(ck_file *f, const edit *e, const char *name, const sh_tensor *t, int rank, const int64_t *shape,
                     size_t from) {
    size_t n = 1;
    for (int i = 0; i < rank; i++) n *= (size_t)shape[i];
    uint8_t *p = malloc(4 * n + 4);
    bool f32 = e->type && strcmp(e->type, "F32") == 0;
    for (size_t i = 0; i < n; i++) {
        float v = bf16_at(t, from + i);
        uint16_t half = to_f16(v);
        if (f32)
            memcpy(p + 4 * i, &v, 4);
        else if (e->type)
            memcpy(p + 2 * i, &half, 2);
        else
            memcpy(p + 2 * i, t->data + 2 * (from + i), 2);
    }
    if (e->spoil && strcmp(e->spoil, name) == 0) {
        const float v = 1 + 0x1p-20f;
        const uint16_t half = (uint16_t)(e->bits ? e->bits : e->type ? 0x3c01 : 0x7777); /* 1 + 2⁻¹⁰ */
        memcpy(p, f32 ? (const void *)&v : &half, f32 ? 4 : 2);
    }
    int64_t more[9] = {1};
    bool reshape = e->reshape && strcmp(e->reshape, name) == 0, retype = e->retype && strcmp(e->retype, name) == 0;
    memcpy(more + 1, shape, (size_t)rank * sizeof *shape);
    ck_add(f, name,
           retype    ? "I16"
           : e->type ? e->type
                     : "BF16",
           rank + reshape, reshape ? more : shape, p, n * (f32 ? 4 : 2));
    free(p);
}

static void add_tensor(ck_file *f, const edit *e, const sh_tensor *t) {
    char name[300];
    bool weight = strlen(t->name) > 7 && strcmp(t->name + strlen(t->name) - 7, ".weight") == 0;
    snprintf(name, sizeof name, "%s%s%s", e->prefix ? e->prefix : OLD, t->name + strlen(OLD),
             e->add && !weight ? ".weight" : "");
    if (e->strip && weight) name[strlen(name) - 7] = 0;
    if (e->drop && strcmp(e->drop, name) == 0) return;
    if (e->rename && strcmp(e->rename, name) == 0) snprintf(name, sizeof name, "%s", e->to);
    char *experts = strstr(name, "experts.");
    if (!e->unfuse || !experts) {
        add_part(f, e, name, t, t->rank, t->shape, 0);
        return;
    }
    bool gate_up = strstr(experts, "gate_up") != NULL;
    int64_t rows = t->shape[1] / (gate_up ? 2 : 1), k = t->shape[2];
    for (int64_t x = 0; x < t->shape[0]; x++)
        for (int half = 0; half < 1 + gate_up; half++) {
            char part[300];
            snprintf(part, sizeof part, "%.*sexperts.%lld.%s.weight", (int)(experts - name), name, (long long)x,
                     !gate_up ? "down_proj"
                     : half   ? "up_proj"
                              : "gate_proj");
            add_part(f, e, part, t, 2, (int64_t[]){rows, k}, (size_t)((x * (1 + gate_up) + half) * rows * k));
        }
}

static void rewrite(const char *from, const edit *e) {
    sh_tensors *t = NULL;
    ck_file f = {0};
    CU_ASSERT_EQUAL_FATAL(sh_tensors_open(from, &t), SH_OK);
    for (int i = 0; i < sh_tensors_count(t); i++) add_tensor(&f, e, sh_tensors_at(t, i));
    const sh_tensor *embed = sh_tensors_find(t, OLD "embed_tokens.weight");
    if (e->head) add_part(&f, e, e->head, embed, 2, embed->shape, 0);
    if (e->extra) ck_add(&f, e->extra, "BF16", 1, (int64_t[]){1}, "\0\0", 2);
    ck_finish(&f, dir, "model.safetensors", e->odd);
    sh_tensors_close(&t);
}

static void check_spelling(const char *from, const edit *e, bool tied) {
    sh_config c;
    sh_tensors *t = NULL;
    sh_weights *w = NULL;
    rewrite(from, e);
    CU_ASSERT_EQUAL_FATAL(sh_config_load(from, &c), SH_OK);
    c.tied = tied;
    CU_ASSERT_EQUAL_FATAL(sh_tensors_open(from, &t), SH_OK);
    sh_status st =
        sh_weights_load(dir, &c, &(sh_weights_options){.mode = SH_MODE_BF16, .first = 0, .last = c.n_layers}, NULL, &w);
    if (st != SH_OK) printf("\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    for (int y = 0; y < c.n_layers; y++) check_layer(&c, t, y, &w->layer[y]);
    CU_ASSERT_EQUAL(differing(t, OLD "embed_tokens.weight", 0, &w->head), 0);
    float row[256];
    sh_weights_embed(w, 77, row);
    CU_ASSERT_EQUAL(row[5], bf16_at(sh_tensors_find(t, OLD "embed_tokens.weight"), 77 * (size_t)c.hidden + 5) *
                                (float)sqrt(c.hidden));
    sh_weights_destroy(&w);
    sh_tensors_close(&t);
}

static void test_spellings(void) {
    const char *const moe = model[1], *const ple = model[3];
    check_spelling(moe, &(edit){.prefix = "model."}, true);
    check_spelling(moe, &(edit){.prefix = "language_model.model."}, true);
    check_spelling(ple, &(edit){.prefix = "model.", .strip = true}, true);
    check_spelling(moe, &(edit){.add = true}, true);
    check_spelling(moe, &(edit){.unfuse = true}, true);
    check_spelling(moe, &(edit){.unfuse = true, .type = "F32"}, true);
    check_spelling(ple, &(edit){.type = "F32", .odd = true}, true);
    check_spelling(ple, &(edit){.odd = true}, true);
    check_spelling(moe, &(edit){.odd = true}, true);
    check_spelling(moe, &(edit){.head = "lm_head.weight"}, true); /* the tied head written twice: the same bytes */
    check_spelling(moe, &(edit){.head = "lm_head.weight"}, false);
    check_spelling(moe, &(edit){.head = "language_model.lm_head.weight", .prefix = "language_model.model."}, false);
    check_spelling(moe, &(edit){.extra = "model.vision_tower.encoder.weight"}, true);
    check_spelling(moe, &(edit){.extra = "model.audio_tower.x"}, true);
    check_spelling(moe, &(edit){.extra = "model.embed_vision.embedding_projection.weight"}, true);
    check_spelling(moe, &(edit){.extra = "embed_audio.embedding_projection.weight", .prefix = "model."}, true);
    check_spelling(moe, &(edit){.extra = "multi_modal_projector.mm.weight"}, true);
    check_spelling(moe, &(edit){.extra = OLD "layers.3.self_attn.v_norm.weight"}, true);
    check_spelling(ple, &(edit){.drop = OLD "layers.14.self_attn.k_proj.weight"}, true); /* a consumer's, never read */
    check_spelling(ple, &(edit){.reshape = OLD "layers.14.self_attn.v_proj.weight"}, true);
}

/* F16: what bf16 can hold is taken, the first thing that it cannot is named. */
static void test_half(void) {
    sh_config c;
    sh_weights *w = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_config_load(model[2], &c), SH_OK);
    rewrite(model[2], &(edit){.type = "F16"});
    CU_ASSERT_EQUAL(
        sh_weights_load(dir, &c, &(sh_weights_options){.mode = SH_MODE_BF16, .first = 0, .last = c.n_layers}, NULL, &w),
        SH_OK); /* 8 bits of mantissa fit */
    sh_tensors *t = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_tensors_open(model[2], &t), SH_OK);
    const sh_tensor *q = sh_tensors_find(t, OLD "layers.0.self_attn.q_proj.weight");
    int same = 0, n = 0;
    for (int r = 0; w && r < w->layer[0].q.n; r++)
        for (int k = 0; k < c.hidden; k++, n++) {
            uint32_t u = (uint32_t)packed(&w->layer[0].q, r, k) << 16;
            float f;
            memcpy(&f, &u, 4);
            same += f == bf16_at(q, (size_t)n);
        }
    CU_ASSERT_TRUE(same > n * 99 / 100); /* the others are below F16's range */
    sh_weights_destroy(&w);
    sh_tensors_close(&t);
}

static void refused(int from, const edit *e, bool tied, sh_status code, const char *message) {
    sh_config c;
    sh_weights *w = NULL;
    char want[600];
    rewrite(model[from], e);
    CU_ASSERT_EQUAL_FATAL(sh_config_load(model[from], &c), SH_OK);
    c.tied = tied;
    CU_ASSERT_EQUAL(
        sh_weights_load(dir, &c, &(sh_weights_options){.mode = SH_MODE_BF16, .first = 0, .last = c.n_layers}, NULL, &w),
        code);
    CU_ASSERT_PTR_NULL(w);
    sh_weights_destroy(&w);
    snprintf(want, sizeof want, "%s%s", dir, message);
    if (strcmp(sh_error_text(), want) != 0) printf("\nfound  %s\nwanted %s\n", sh_error_text(), want);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), want);
}

#define FILE_ "/model.safetensors: "
static void test_refused(void) {
    refused(1, &(edit){.drop = OLD "layers.2.mlp.up_proj.weight"}, true, SH_EFORMAT,
            ": missing tensor " OLD "layers.2.mlp.up_proj");
    refused(1, &(edit){.drop = OLD "norm.weight"}, true, SH_EFORMAT, ": missing tensor " OLD "norm");
    refused(1, &(edit){.drop = OLD "embed_tokens.weight"}, true, SH_EFORMAT,
            ": missing tensor " OLD "embed_tokens.weight (any known prefix)");
    refused(1, &(edit){.drop = OLD "layers.0.experts.down_proj"}, true, SH_EFORMAT,
            ": missing tensor " OLD "layers.0.experts.down_proj");
    refused(1, &(edit){.unfuse = true, .rename = OLD "layers.0.router.scale", .to = OLD "layers.0.router.scales"}, true,
            SH_EFORMAT, ": missing tensor " OLD "layers.0.router.scale");
    refused(3, &(edit){.drop = OLD "embed_tokens_per_layer.weight"}, true, SH_EFORMAT,
            ": missing tensor " OLD "embed_tokens_per_layer");
    refused(1, &(edit){0}, false, SH_EFORMAT, ": missing tensor lm_head.weight: tie_word_embeddings is false");
    refused(1, &(edit){.head = "lm_head.weight", .spoil = "lm_head.weight"}, true, SH_EFORMAT,
            FILE_ "lm_head.weight: differs from " OLD "embed_tokens.weight, although tie_word_embeddings is true");
    refused(1, &(edit){.extra = "lm_head.weight"}, false, SH_EFORMAT,
            FILE_ "lm_head.weight: shape [1], but config.json implies [2048, 96]");
    refused(1, &(edit){.extra = "lm_head", .head = "model.lm_head.weight"}, false, SH_EFORMAT,
            ": two heads: lm_head and model.lm_head.weight");
    refused(1, &(edit){.extra = OLD "layers.0.mlp.extra"}, true, SH_EFORMAT,
            FILE_ OLD "layers.0.mlp.extra: unexpected tensor: config.json implies none of this name");
    refused(1, &(edit){.extra = OLD "layers.6.input_layernorm.weight"}, true, SH_EFORMAT,
            FILE_ OLD "layers.6.input_layernorm.weight: unexpected tensor: config.json implies none of this name");
    refused(1, &(edit){.extra = OLD "layers.5.self_attn.v_proj.weight"}, true, SH_EFORMAT, /* K = V: there is none */
            FILE_ OLD "layers.5.self_attn.v_proj.weight: unexpected tensor: config.json implies none of this name");
    refused(1, &(edit){.extra = OLD "layers.0.self_attn.q_proj.weight_scale"}, true, SH_EFORMAT,
            FILE_ OLD
            "layers.0.self_attn.q_proj.weight_scale: unexpected tensor: config.json implies none of this name");
    refused(1, &(edit){.extra = OLD "layers.0.router.scale.weight"}, true, SH_EFORMAT,
            FILE_ OLD "layers.0.router.scale: is there twice, as " OLD "layers.0.router.scale.weight too");
    refused(1, &(edit){.extra = "model.embed_tokens.weight"}, true, SH_EFORMAT,
            ": two text models: " OLD "embed_tokens and model.embed_tokens");
    refused(1, &(edit){.reshape = OLD "layers.1.self_attn.q_proj.weight"}, true, SH_EFORMAT,
            FILE_ OLD "layers.1.self_attn.q_proj.weight: shape [1, 64, 96], but config.json implies [64, 96]");
    refused(1, &(edit){.retype = OLD "layers.1.input_layernorm.weight"}, true, SH_EUNSUPPORTED,
            FILE_ OLD "layers.1.input_layernorm.weight: type I16: allowed are BF16, F32 and F16");
    refused(1, &(edit){.retype = OLD "layers.5.experts.gate_up_proj"}, true, SH_EUNSUPPORTED,
            FILE_ OLD "layers.5.experts.gate_up_proj: type I16: allowed are BF16, F32 and F16");
    refused(1, &(edit){.type = "F32", .spoil = OLD "layers.3.mlp.down_proj.weight"}, true, SH_EUNSUPPORTED,
            FILE_ OLD "layers.3.mlp.down_proj.weight: the F32 value 1.00000095 of item 0 is not exact in BF16: convert "
                      "the checkpoint "
                      "to BF16 first");
    refused(
        2, &(edit){.type = "F16", .spoil = OLD "layers.1.mlp.up_proj.weight"}, true, SH_EUNSUPPORTED,
        FILE_ OLD
        "layers.1.mlp.up_proj.weight: the F16 value 1.00097656 of item 0 is not exact in BF16: convert the checkpoint "
        "to BF16 first");
    refused(1, &(edit){.spoil = OLD "layers.3.mlp.down_proj.weight", .bits = 0x7fc0}, true, SH_EFORMAT,
            FILE_ OLD
            "layers.3.mlp.down_proj.weight: the BF16 value of item 0 is not a number: allowed are finite numbers");
    refused(1, &(edit){.spoil = OLD "layers.1.input_layernorm.weight", .bits = 0xff80}, true, SH_EFORMAT,
            FILE_ OLD
            "layers.1.input_layernorm.weight: the BF16 value of item 0 is infinite: allowed are finite numbers");
    refused(2, &(edit){.type = "F16", .spoil = OLD "layers.1.mlp.up_proj.weight", .bits = 0x7c00}, true, SH_EFORMAT,
            FILE_ OLD "layers.1.mlp.up_proj.weight: the F16 value of item 0 is infinite: allowed are finite numbers");
}

static bool odd_ones(const void *ctx, int layer, int expert) {
    (void)ctx, (void)layer;
    return expert % 2 == 1;
}

/* Of the experts only those that are held are read: what is wrong with others goes unnoticed. */
static void test_held(void) {
    const sh_held_experts odd = {.holds = odd_ones};
    for (int unfused = 0; unfused < 2; unfused++) {
        sh_config c;
        sh_weights *all = NULL, *w = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_config_load(model[1], &c), SH_OK);
        CU_ASSERT_EQUAL_FATAL(sh_weights_load(model[1], &c,
                                              &(sh_weights_options){.mode = SH_MODE_BF16, .first = 1, .last = 3}, NULL,
                                              &all),
                              SH_OK);
        rewrite(model[1], unfused ? &(edit){.unfuse = true}
                                  : &(edit){.type = "F32", .spoil = OLD "layers.2.experts.gate_up_proj"});
        CU_ASSERT_EQUAL(
            sh_weights_load(dir, &c, &(sh_weights_options){.mode = SH_MODE_BF16, .first = 1, .last = 3}, NULL, &w),
            unfused ? SH_OK : SH_EUNSUPPORTED);
        sh_weights_destroy(&w);
        CU_ASSERT_EQUAL_FATAL(
            sh_weights_load(dir, &c, &(sh_weights_options){.mode = SH_MODE_BF16, .held = odd, .first = 1, .last = 3},
                            NULL, &w),
            SH_OK);
        int absent = 0;
        for (int y = 0; y < 2; y++)
            for (int e = 0; e < c.experts; e++) {
                const sh_wmat *a[] = {&all->layer[y].expert_gate_up[e], &all->layer[y].expert_down[e]};
                const sh_wmat *b[] = {&w->layer[y].expert_gate_up[e], &w->layer[y].expert_down[e]};
                absent += e % 2 == 0;
                for (int i = 0; i < 2; i++) {
                    CU_ASSERT_EQUAL_FATAL(b[i]->data != NULL, e % 2 == 1);
                    if (b[i]->data)
                        CU_ASSERT(memcmp(a[i]->data, b[i]->data, sh_wmat_bytes(SH_W_BF16, a[i]->n, a[i]->k)) == 0);
                }
            }
        CU_ASSERT_EQUAL(w->bytes, all->bytes - (size_t)absent * sh_expert_bytes(&c, SH_MODE_BF16));
        sh_weights_destroy(&w);
        sh_weights_destroy(&all);
    }
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("weights", begin, end);
    CU_add_test(s, "fixtures", test_fixtures);
    CU_add_test(s, "vectors", test_vectors);
    CU_add_test(s, "stages", test_stages);
    CU_add_test(s, "ranks that only make K/V", test_only_kv);
    CU_add_test(s, "spellings", test_spellings);
    CU_add_test(s, "half", test_half);
    CU_add_test(s, "refused", test_refused);
    CU_add_test(s, "held experts", test_held);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + (CU_get_number_of_suites_failed() != 0);
    CU_cleanup_registry();
    return failed != 0;
}
