/*
 * Reads config.json into the layer table and generation_config.json into request defaults. See config.h. Counting lives
 * in model/count.c. Nothing here looks at tensors.
 */
#include "model/config.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/file.h"
#include "common/json.h"
#include "model/beside.h"

static const char *const layer_type_name[SH_KV_KINDS] = {"full_attention", "sliding_attention"};

/* What several steps of the reading share. */
typedef struct reader {
    const json_t *root, *text; /* the same object in a text-only file */
    sh_config *c;
    int64_t head_dim, kv_heads, window, ff, shared;
    bool k_eq_v, double_wide, moe;
} reader;

/* An int field with a default for both absent and null. */
static sh_status get_int(const json_t *o, const char *key, int64_t min, int64_t max, int64_t fallback, int64_t *out) {
    *out = fallback;
    return sh_json_int(o, key, min, max, out);
}

/* --- which model is this -------------------------------------------------------------------------------------------
 */

static sh_status check_model_type(const json_t *o, const char *where, const char *const *allowed, const char *list) {
    const char *type = NULL;
    SH_TRY(sh_json_string(o, "model_type", &type));
    if (!type) return SH_OK;
    for (int i = 0; allowed[i]; i++)
        if (strcmp(type, allowed[i]) == 0) return SH_OK;
    SH_FAIL(SH_EUNSUPPORTED, "%smodel_type: \"%s\" is not known: allowed are %s", where, type, list);
}

static sh_status check_architectures(const json_t *root) {
    static const char *const known[] = {"Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"};
    const json_t *a = json_object_get(root, "architectures");
    if (!a || json_is_null(a)) return SH_OK;
    if (!json_is_array(a)) SH_FAIL(SH_EINPUT, "architectures: %s is not an array", sh_json_type_name(a));
    size_t i;
    json_t *v;
    json_array_foreach(a, i, v) {
        const char *s = json_string_value(v);
        if (s && (strcmp(s, known[0]) == 0 || strcmp(s, known[1]) == 0)) continue;
        SH_FAIL(SH_EUNSUPPORTED, "architectures: \"%s\" is not known: allowed are %s and %s",
                s ? s : sh_json_type_name(v), known[0], known[1]);
    }
    return SH_OK;
}

static sh_status find_text(reader *r) {
    static const char *const any[] = {"gemma4", "gemma4_text", NULL};
    if (!json_is_object(r->root)) SH_FAIL(SH_EFORMAT, "%s is not an object", sh_json_type_name(r->root));
    if (!sh_json_is_set(r->root, "model_type") && !sh_json_is_set(r->root, "architectures"))
        SH_FAIL(SH_EINPUT, "model_type: missing: allowed are gemma4 and gemma4_text");
    SH_TRY(check_model_type(r->root, "", any, "gemma4 and gemma4_text"));
    SH_TRY(check_architectures(r->root));
    const json_t *t = json_object_get(r->root, "text_config");
    if (t && !json_is_object(t)) SH_FAIL(SH_EINPUT, "text_config: %s is not an object", sh_json_type_name(t));
    const char *type = "";
    SH_TRY(sh_json_string(r->root, "model_type", &type));
    if (!t && strcmp(type, "gemma4") == 0) SH_FAIL(SH_EINPUT, "text_config: missing: model_type gemma4 needs it");
    r->text = t ? t : r->root;
    if (t) SH_TRY(check_model_type(t, "text_config.", any + 1, "gemma4_text"));
    return SH_OK;
}

/* Things that change the computation and that this program does not have. */
static sh_status refuse_unsupported(const reader *r) {
    bool bias = false;
    SH_TRY(sh_json_bool(r->text, "attention_bias", &bias));
    if (bias) SH_FAIL(SH_EUNSUPPORTED, "attention_bias: true is not supported: allowed is false");
    const char *act = "gelu_pytorch_tanh";
    SH_TRY(sh_json_string(r->text, "hidden_activation", &act));
    if (strcmp(act, "gelu_pytorch_tanh") != 0)
        SH_FAIL(SH_EUNSUPPORTED, "hidden_activation: \"%s\" is not supported: allowed is gelu_pytorch_tanh", act);
    if (sh_json_is_set(r->text, "rope_scaling"))
        SH_FAIL(SH_EUNSUPPORTED, "rope_scaling: not supported: allowed is rope_parameters per layer type");
    if (sh_json_is_set(r->root, "quantization_config") || sh_json_is_set(r->text, "quantization_config"))
        SH_FAIL(SH_EUNSUPPORTED,
                "quantization_config: quantised checkpoints are not supported: use the BF16 checkpoint");
    const json_t *b = json_object_get(r->text, "use_bidirectional_attention");
    if (!b || json_is_null(b) || json_is_false(b)) return SH_OK;
    const char *s = json_string_value(b);
    if (!s || strcmp(s, "vision") != 0)
        SH_FAIL(SH_EUNSUPPORTED,
                "use_bidirectional_attention: %s%s%s is not supported: allowed are null and \"vision\"", s ? "\"" : "",
                s ? s : sh_json_type_name(b), s ? "\"" : "");
    r->c->vision_bidirectional = true;
    return SH_OK;
}

/* --- sizes ---------------------------------------------------------------------------------------------------------
 */

static sh_status read_sizes(reader *r) {
    sh_config *c = r->c;
    const json_t *t = r->text;
    int64_t vocab, hidden, layers, context, ple = 256, ple_vocab;
    SH_TRY(get_int(t, "vocab_size", 1, SH_MAX_VOCAB, 262144, &vocab));
    SH_TRY(get_int(t, "hidden_size", 1, SH_MAX_WIDTH, 2304, &hidden));
    SH_TRY(get_int(t, "num_hidden_layers", 1, SH_MAX_LAYERS, 30, &layers));
    SH_TRY(get_int(t, "intermediate_size", 1, SH_MAX_WIDTH, 9216, &r->ff));
    SH_TRY(get_int(t, "head_dim", 2, SH_MAX_HEADS, 256, &r->head_dim));
    SH_TRY(get_int(t, "num_key_value_heads", 1, SH_MAX_HEADS, 4, &r->kv_heads));
    SH_TRY(get_int(t, "sliding_window", 1, SH_MAX_CONTEXT, 512, &r->window));
    SH_TRY(get_int(t, "max_position_embeddings", 1, SH_MAX_CONTEXT, 131072, &context));
    SH_TRY(get_int(t, "num_kv_shared_layers", 0, layers - 1, 0, &r->shared));
    if (json_is_null(json_object_get(t, "hidden_size_per_layer_input"))) ple = 0; /* null is off, absent is 256 */
    SH_TRY(sh_json_int(t, "hidden_size_per_layer_input", 0, SH_MAX_HEADS, &ple));
    SH_TRY(get_int(t, "vocab_size_per_layer_input", 1, SH_MAX_VOCAB, 262144, &ple_vocab));
    if (ple && ple_vocab < vocab)
        SH_FAIL(SH_EINPUT, "vocab_size_per_layer_input: %lld is less than vocab_size %lld: each token needs a row",
                (long long)ple_vocab, (long long)vocab);
    c->vocab = (int)vocab;
    c->hidden = (int)hidden;
    c->n_layers = (int)layers;
    c->max_context = (int)context;
    c->ple = (int)ple;
    c->ple_vocab = ple ? (int)ple_vocab : 0;
    c->first_shared = (int)(layers - r->shared);
    SH_TRY(sh_json_bool(t, "attention_k_eq_v", &r->k_eq_v));
    SH_TRY(sh_json_bool(t, "use_double_wide_mlp", &r->double_wide));
    double eps = 1e-6, cap = 0;
    SH_TRY(sh_json_double(t, "rms_norm_eps", 1e-12, 1, &eps));
    SH_TRY(sh_json_double(t, "final_logit_softcapping", 0, 1e6, &cap)); /* 0 is off, as null is */
    if (cap != 0 && cap < 1e-3)
        SH_FAIL(SH_EINPUT, "final_logit_softcapping: %g: allowed are null, 0, and 0.001 to 1e+06", cap);
    c->eps = (float)eps;
    c->softcap = (float)cap;
    c->tied = true; /* the composite's word counts where both have one: it owns the head */
    SH_TRY(sh_json_bool(t, "tie_word_embeddings", &c->tied));
    return sh_json_bool(r->root, "tie_word_embeddings", &c->tied);
}

static sh_status need_int(const json_t *t, const char *key, const char *alias, int64_t max, int *out) {
    const char *k = sh_json_is_set(t, key) || !sh_json_is_set(t, alias) ? key : alias;
    int64_t v = 0;
    SH_TRY(sh_json_int(t, k, 1, max, &v));
    if (v == 0) SH_FAIL(SH_EINPUT, "%s: missing: enable_moe_block needs it", key);
    *out = (int)v;
    return SH_OK;
}

static sh_status read_experts(reader *r) {
    sh_config *c = r->c;
    SH_TRY(sh_json_bool(r->text, "enable_moe_block", &r->moe));
    if (!r->moe) return SH_OK;
    SH_TRY(need_int(r->text, "num_experts", "num_local_experts", SH_MAX_EXPERTS, &c->experts));
    SH_TRY(need_int(r->text, "top_k_experts", "num_experts_per_tok", c->experts, &c->top_k));
    return need_int(r->text, "moe_intermediate_size", "expert_intermediate_size", SH_MAX_WIDTH, &c->expert_ff);
}

/* --- the layer table -----------------------------------------------------------------------------------------------
 */

static sh_status read_layer_types(reader *r) {
    sh_config *c = r->c;
    const json_t *a = json_object_get(r->text, "layer_types");
    if (a && json_is_null(a)) a = NULL;
    if (a && !json_is_array(a)) SH_FAIL(SH_EINPUT, "layer_types: %s is not an array", sh_json_type_name(a));
    if (a && json_array_size(a) != (size_t)c->n_layers)
        SH_FAIL(SH_EINPUT, "layer_types: %zu entries: num_hidden_layers is %d", json_array_size(a), c->n_layers);
    for (int i = 0; i < c->n_layers; i++) {
        sh_layer *l = &c->layer[i];
        l->kind = (i + 1) % 6 == 0 ? SH_KV_GLOBAL : SH_KV_SLIDING;
        if (a) {
            const char *s = json_string_value(json_array_get(a, (size_t)i));
            int k = 0;
            while (k < SH_KV_KINDS && !(s && strcmp(s, layer_type_name[k]) == 0)) k++;
            if (k == SH_KV_KINDS)
                SH_FAIL(SH_EINPUT,
                        "layer_types[%d]: \"%s\" is not known: allowed are sliding_attention and full_attention", i,
                        s ? s : sh_json_type_name(json_array_get(a, (size_t)i)));
            l->kind = (sh_kv_kind)k;
        }
    }
    c->layer[c->n_layers - 1].kind = SH_KV_GLOBAL; /* the reference forces this, whatever the list says */
    return SH_OK;
}

/* The newer spelling: {"05": {"head_dim": 512, "num_key_value_heads": 2}}; it alone counts when present. */
static sh_status read_per_layer(reader *r, const json_t *plc) {
    sh_config *c = r->c;
    if (!json_is_object(plc)) SH_FAIL(SH_EINPUT, "per_layer_config: %s is not an object", sh_json_type_name(plc));
    bool seen[SH_MAX_LAYERS] = {false};
    const char *key, *field;
    json_t *o, *v;
    json_object_foreach((json_t *)(uintptr_t)plc, key, o) {
        char *end;
        long i = strtol(key, &end, 10);
        if (strspn(key, "0123456789") != strlen(key) || !*key || i >= c->n_layers)
            SH_FAIL(SH_EINPUT, "per_layer_config: \"%s\" is not a layer: allowed are 0 to %d", key, c->n_layers - 1);
        if (seen[i]) SH_FAIL(SH_EINPUT, "per_layer_config: layer %ld appears twice", i);
        seen[i] = true;
        if (!json_is_object(o))
            SH_FAIL(SH_EINPUT, "per_layer_config.%s: %s is not an object", key, sh_json_type_name(o));
        json_object_foreach(o, field, v) {
            if (strcmp(field, "head_dim") != 0 && strcmp(field, "num_key_value_heads") != 0)
                SH_FAIL(SH_EUNSUPPORTED,
                        "per_layer_config.%s.%s: not known: allowed are head_dim and num_key_value_heads", key, field);
        }
        int64_t hd, kv;
        sh_status st = get_int(o, "head_dim", 2, SH_MAX_HEADS, r->head_dim, &hd);
        if (st == SH_OK) st = get_int(o, "num_key_value_heads", 1, SH_MAX_HEADS, r->kv_heads, &kv);
        if (st != SH_OK) return sh_error_prefix(st, "per_layer_config.%s", key);
        c->layer[i].head_dim = (int)hd;
        c->layer[i].kv_heads = (int)kv;
    }
    return SH_OK;
}

static sh_status read_heads(reader *r) {
    sh_config *c = r->c;
    int64_t heads, global_hd, global_kv = 0;
    SH_TRY(get_int(r->text, "num_attention_heads", 1, SH_MAX_HEADS, 8, &heads));
    for (int i = 0; i < c->n_layers; i++) {
        c->layer[i].heads = (int)heads;
        c->layer[i].head_dim = (int)r->head_dim;
        c->layer[i].kv_heads = (int)r->kv_heads;
    }
    if (sh_json_is_set(r->text, "per_layer_config"))
        return read_per_layer(r, json_object_get(r->text, "per_layer_config"));
    /* The older spelling. A missing global_head_dim is 512, null is head_dim; the KV heads count only with K = V. */
    int64_t fallback = json_object_get(r->text, "global_head_dim") ? r->head_dim : 512;
    SH_TRY(get_int(r->text, "global_head_dim", 2, SH_MAX_HEADS, fallback, &global_hd));
    SH_TRY(sh_json_int(r->text, "num_global_key_value_heads", 1, SH_MAX_HEADS, &global_kv));
    for (int i = 0; i < c->n_layers; i++) {
        if (c->layer[i].kind != SH_KV_GLOBAL) continue;
        c->layer[i].head_dim = (int)global_hd;
        if (global_kv && r->k_eq_v) c->layer[i].kv_heads = (int)global_kv;
    }
    return SH_OK;
}

static sh_status check_heads(const sh_config *c) {
    for (int i = 0; i < c->n_layers; i++) {
        const sh_layer *l = &c->layer[i];
        if (l->head_dim % 2)
            SH_FAIL(SH_EINPUT, "head_dim: %d in layer %d is odd: rotation needs pairs", l->head_dim, i);
        if (l->heads % l->kv_heads)
            SH_FAIL(SH_EINPUT, "num_key_value_heads: %d in layer %d does not divide num_attention_heads %d",
                    l->kv_heads, i, l->heads);
        if ((int64_t)l->heads * l->head_dim > SH_MAX_WIDTH)
            SH_FAIL(SH_EINPUT,
                    "num_attention_heads: %d × head_dim %d in layer %d is too large: allowed is a product of %lld",
                    l->heads, l->head_dim, i, (long long)SH_MAX_WIDTH);
    }
    return SH_OK;
}

typedef struct rope {
    bool proportional;
    double partial, theta, factor;
} rope;

static sh_status read_rope_of(const json_t *o, rope *p) {
    const char *type = "default";
    SH_TRY(sh_json_string(o, "rope_type", &type));
    p->proportional = strcmp(type, "proportional") == 0;
    if (!p->proportional && strcmp(type, "default") != 0)
        SH_FAIL(SH_EUNSUPPORTED, "rope_type: \"%s\" is not supported: allowed are default and proportional", type);
    p->partial = 1;
    SH_TRY(sh_json_double(o, "rope_theta", 1, 1e12, &p->theta));
    SH_TRY(sh_json_double(o, "partial_rotary_factor", 0, 1, &p->partial));
    return sh_json_double(o, "factor", 1e-3, 1e6, &p->factor);
}

static sh_status read_rope(reader *r) {
    sh_config *c = r->c;
    rope p[SH_KV_KINDS] = {{true, 0.25, 1e6, 1}, {false, 1, 1e4, 1}};
    const json_t *all = json_object_get(r->text, "rope_parameters");
    if (all && !json_is_null(all) && !json_is_object(all))
        SH_FAIL(SH_EINPUT, "rope_parameters: %s is not an object", sh_json_type_name(all));
    for (int k = 0; k < SH_KV_KINDS && json_is_object(all); k++) {
        const json_t *o = json_object_get(all, layer_type_name[k]);
        bool used = false;
        for (int i = 0; i < c->n_layers; i++) used |= c->layer[i].kind == (sh_kv_kind)k;
        if (!used) continue;
        if (!json_is_object(o))
            SH_FAIL(SH_EINPUT, "rope_parameters.%s: missing: an object is needed", layer_type_name[k]);
        sh_status st = read_rope_of(o, &p[k]);
        if (st != SH_OK) return sh_error_prefix(st, "rope_parameters.%s", layer_type_name[k]);
    }
    for (int i = 0; i < c->n_layers; i++) {
        sh_layer *l = &c->layer[i];
        const rope *q = &p[l->kind];
        l->theta = q->theta;
        l->rope_factor = q->proportional ? q->factor : 1;
        l->rotated_pairs = q->proportional ? (int)floor(q->partial * l->head_dim / 2) : l->head_dim / 2;
    }
    return SH_OK;
}

static sh_status share_kv(reader *r) {
    sh_config *c = r->c;
    int producer[SH_KV_KINDS] = {-1, -1};
    for (int i = 0; i < c->first_shared; i++) producer[c->layer[i].kind] = i;
    for (int i = 0; i < c->n_layers; i++) {
        sh_layer *l = &c->layer[i];
        l->has_kv = i < c->first_shared;
        l->kv_from = l->has_kv ? i : producer[l->kind];
        l->k_eq_v = r->k_eq_v && l->kind == SH_KV_GLOBAL;
        l->window = l->kind == SH_KV_SLIDING ? (int)r->window : 0;
        l->ff = (int)(l->has_kv || !r->double_wide ? r->ff : 2 * r->ff);
        l->moe = r->moe;
        if (l->has_kv) continue;
        if (l->kv_from < 0)
            SH_FAIL(SH_EINPUT, "num_kv_shared_layers: %d leaves no %s layer to give K/V to layer %d",
                    c->n_layers - c->first_shared, layer_type_name[l->kind], i);
        const sh_layer *from = &c->layer[l->kv_from];
        if (from->head_dim != l->head_dim || from->kv_heads != l->kv_heads)
            SH_FAIL(SH_EINPUT,
                    "num_kv_shared_layers: layer %d (%d KV heads of %d) cannot read the K/V of layer %d (%d of %d)", i,
                    l->kv_heads, l->head_dim, l->kv_from, from->kv_heads, from->head_dim);
    }
    return SH_OK;
}

/* --- ids -----------------------------------------------------------------------------------------------------------
 */

/* An id or a list of ids; *n is untouched when absent. */
static sh_status read_ids(const json_t *o, const char *key, int vocab, int *ids, int *n) {
    const json_t *v = json_object_get(o, key);
    if (!v || json_is_null(v)) return SH_OK;
    size_t count = json_is_array(v) ? json_array_size(v) : 1;
    if (count > SH_MAX_STOP_IDS) SH_FAIL(SH_ELIMIT, "%s: %zu ids: at most %d", key, count, SH_MAX_STOP_IDS);
    for (size_t i = 0; i < count; i++) {
        const json_t *e = json_is_array(v) ? json_array_get(v, i) : v;
        if (!json_is_integer(e))
            SH_FAIL(SH_EINPUT, "%s: %s is not an id: allowed are integers from 0 to %d, or a list of them", key,
                    sh_json_type_name(e), vocab - 1);
        if (json_integer_value(e) < 0 || json_integer_value(e) >= vocab)
            SH_FAIL(SH_EINPUT, "%s: %lld is out of range: allowed are 0 to %d", key, (long long)json_integer_value(e),
                    vocab - 1);
        ids[i] = (int)json_integer_value(e);
    }
    *n = (int)count;
    return SH_OK;
}

/* A soft-token placeholder beyond the vocabulary can never occur in a prompt: as good as none. */
static sh_status read_placeholder(const reader *r, const char *key, int *out) {
    int64_t v = -1;
    SH_TRY(sh_json_int(r->root, key, 0, INT32_MAX, &v));
    *out = v < r->c->vocab ? (int)v : -1;
    return SH_OK;
}

static sh_status read_token_ids(reader *r) {
    sh_config *c = r->c;
    int one[SH_MAX_STOP_IDS], n = 0;
    int *const dest[] = {&c->pad_id, &c->bos_id};
    const char *const name[] = {"pad_token_id", "bos_token_id"};
    for (int i = 0; i < 2; i++) {
        *dest[i] = i ? 2 : 0;
        n = 0;
        SH_TRY(read_ids(r->root, name[i], c->vocab, one, &n));
        SH_TRY(read_ids(r->text, name[i], c->vocab, one, &n)); /* the text part's word counts */
        if (n) *dest[i] = one[0];
        if (*dest[i] >= c->vocab)
            SH_FAIL(SH_EINPUT, "%s: %d is out of range: allowed are 0 to %d", name[i], *dest[i], c->vocab - 1);
    }
    c->n_eos = 1;
    c->eos_ids[0] = 1;
    SH_TRY(read_ids(r->text, "eos_token_id", c->vocab, c->eos_ids, &c->n_eos));
    SH_TRY(read_ids(r->root, "eos_token_id", c->vocab, c->eos_ids, &c->n_eos)); /* the composite has the longer list */
    SH_TRY(read_placeholder(r, "image_token_id", &c->image_id));
    SH_TRY(read_placeholder(r, "audio_token_id", &c->audio_id));
    return read_placeholder(r, "video_token_id", &c->video_id);
}

/* --- released shapes -----------------------------------------------------------------------------------------------
 */

static void name_variant(sh_config *c) {
    static const struct {
        const char *name;
        int layers, hidden, heads, ff, ple, shared, experts, top_k, expert_ff;
    } known[] = {
        {"E2B", 35, 1536, 8, 6144, 256, 20, 0, 0, 0},
        {"E4B", 42, 2560, 8, 10240, 256, 18, 0, 0, 0},
        {"31B", 60, 5376, 32, 21504, 0, 0, 0, 0, 0},
        {"26B-A4B", 30, 2816, 16, 2112, 0, 0, 128, 8, 704},
    };
    snprintf(c->variant, sizeof c->variant, "custom");
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (known[i].layers == c->n_layers && known[i].hidden == c->hidden && known[i].heads == c->layer[0].heads &&
            known[i].ff == c->layer[0].ff && known[i].ple == c->ple &&
            known[i].shared == c->n_layers - c->first_shared && known[i].experts == c->experts &&
            known[i].top_k == c->top_k && known[i].expert_ff == c->expert_ff && c->vocab == 262144)
            snprintf(c->variant, sizeof c->variant, "%s", known[i].name);
}

/* --- entry points --------------------------------------------------------------------------------------------------
 */

static sh_status read_config(const json_t *root, sh_config *c) {
    reader r = {.root = root, .c = c};
    SH_TRY(find_text(&r));
    SH_TRY(refuse_unsupported(&r));
    SH_TRY(read_sizes(&r));
    SH_TRY(read_experts(&r));
    SH_TRY(read_layer_types(&r));
    SH_TRY(read_heads(&r));
    SH_TRY(check_heads(c));
    SH_TRY(read_rope(&r));
    SH_TRY(share_kv(&r));
    SH_TRY(read_token_ids(&r));
    name_variant(c);
    return SH_OK;
}

sh_status sh_config_parse(const char *what, const char *json, size_t len, sh_config *out) {
    SH_CLEANUP(sh_json_release) json_t *root = NULL;
    SH_TRY(sh_json_parse(what, json, len, &root));
    sh_config c = {0};
    sh_status st = read_config(root, &c);
    if (st != SH_OK) return sh_error_prefix(st, "%s", what);
    *out = c;
    return SH_OK;
}

sh_status sh_config_load(const char *model_dir, sh_config *out) {
    SH_CLEANUP(sh_beside_release) sh_beside b = {0};
    if (!sh_file_exists(model_dir))
        SH_FAIL(SH_EINPUT, "%s: no such directory: a checkpoint directory is needed", model_dir);
    SH_TRY(sh_beside_read(model_dir, "config.json", SH_MAX_CONFIG_BYTES, &b));
    if (!b.text) SH_FAIL(SH_EINPUT, "%s: missing: not a Hugging Face checkpoint directory", b.what);
    return sh_config_parse(b.what, b.text, b.len, out);
}

static sh_status read_generation(const json_t *o, const sh_config *c, sh_generation *g) {
    if (!json_is_object(o)) SH_FAIL(SH_EFORMAT, "%s is not an object", sh_json_type_name(o));
    int64_t top_k = 0;
    SH_TRY(sh_json_double(o, "temperature", 0, 1e3, &g->temperature));
    SH_TRY(sh_json_double(o, "top_p", 0, 1, &g->top_p));
    SH_TRY(sh_json_int(o, "top_k", 0, INT32_MAX, &top_k));
    SH_TRY(sh_json_bool(o, "do_sample", &g->do_sample));
    g->top_k = (int)top_k;
    if (!g->do_sample) g->temperature = 0;
    SH_TRY(read_ids(o, "eos_token_id", c->vocab, g->stop_ids, &g->n_stop));
    return read_ids(o, "suppress_tokens", c->vocab, g->suppress, &g->n_suppress);
}

sh_status sh_generation_load(const char *model_dir, const sh_config *c, sh_generation *out) {
    sh_generation g = {.temperature = 1, .top_p = 1, .do_sample = true, .n_stop = c->n_eos};
    memcpy(g.stop_ids, c->eos_ids, sizeof g.stop_ids);
    SH_CLEANUP(sh_beside_release) sh_beside b = {0};
    SH_TRY(sh_beside_read(model_dir, "generation_config.json", SH_MAX_CONFIG_BYTES, &b));
    if (b.text) {
        SH_CLEANUP(sh_json_release) json_t *o = NULL;
        SH_TRY(sh_json_parse(b.what, b.text, b.len, &o));
        sh_status st = read_generation(o, c, &g);
        if (st != SH_OK) return sh_error_prefix(st, "%s", b.what);
    }
    *out = g;
    return SH_OK;
}

/* --- small names ---------------------------------------------------------------------------------------------------
 */

const char *sh_mode_name(sh_mode m) {
    static const char *const names[SH_MODES] = {"exact", "bf16", "q8", "q4"};
    return names[m];
}

const char *sh_kv_type_name(sh_kv_type t) {
    static const char *const names[SH_KV_TYPES] = {"f32", "bf16", "q8"};
    return names[t];
}

sh_kv_type sh_kv_type_of_mode(sh_mode m) {
    return m == SH_MODE_EXACT ? SH_KV_F32 : SH_KV_BF16;
}

sh_status sh_mode_parse(const char *s, sh_mode *out) {
    for (int m = SH_MODE_EXACT; m < SH_MODES; m++)
        if (strcmp(s, sh_mode_name((sh_mode)m)) == 0) {
            *out = (sh_mode)m;
            return SH_OK;
        }
    SH_FAIL(SH_EINPUT, "mode: \"%s\" is not known: allowed are exact, bf16, q8 and q4", s);
}

sh_status sh_kv_type_parse(const char *s, sh_kv_type *out) {
    for (int t = SH_KV_F32; t < SH_KV_TYPES; t++)
        if (strcmp(s, sh_kv_type_name((sh_kv_type)t)) == 0) {
            *out = (sh_kv_type)t;
            return SH_OK;
        }
    SH_FAIL(SH_EINPUT, "kv: \"%s\" is not known: allowed are f32, bf16 and q8", s);
}
