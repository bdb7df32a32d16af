/*
 * Metadata of GGUF → config.json and generation_config.json. See gguf_files.h. Each key is checked here, under its own
 * name; two facts are in no key and come from the tensors: that values are keys (no attn_v), and how far full layers
 * rotate (rope_freqs).
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/json.h"
#include "common/limits.h"
#include "model/gguf_files.h"
#include "model/gguf_meta.h"
#include "model/safetensors.h"
#include "model/tensors_int.h"

#define KEY(name) "gemma4." name

typedef struct facts {
    const sh_gguf_meta *m;
    const sh_tensors *t;
    int64_t vocab, layers, hidden, context, heads, window, shared, ple, head_dim[2]; /* head_dim: full, sliding */
    int64_t experts, top_k, expert_ff;
    int64_t kv_heads[SH_MAX_LAYERS], ff[SH_MAX_LAYERS];
    bool sliding[SH_MAX_LAYERS], k_eq_v, wide;
    double theta[2], eps, softcap, rotated;
    int64_t eos[8], pad, bos; /* pad, bos: −1: not there */
    int n_eos;
    int64_t media[3]; /* placeholders of image, audio, video; −1: none */
} facts;

/* --- keys ----------------------------------------------------------------------------------------------------------
 */

static sh_status need_int(const facts *f, const char *key, int64_t min, int64_t max, int64_t *out) {
    SH_TRY(sh_gguf_meta_need(f->m, key));
    return sh_gguf_meta_int(f->m, key, min, max, out);
}

static sh_status need_real(const facts *f, const char *key, double min, double max, double *out) {
    SH_TRY(sh_gguf_meta_need(f->m, key));
    return sh_gguf_meta_real(f->m, key, min, max, out);
}

/* A key that says again what another says. */
static sh_status same_as(const facts *f, const char *key, const char *other, int64_t want) {
    int64_t x = want;
    SH_TRY(sh_gguf_meta_int(f->m, key, 0, INT64_MAX, &x));
    if (x == want) return SH_OK;
    return sh_gguf_meta_fail(f->m, SH_EUNSUPPORTED, key, "%lld, but %s is %lld: allowed is the same", (long long)x,
                             other, (long long)want);
}

static sh_status check_kind(const facts *f) {
    sh_gguf_text a = {"", 0}, scaling = {"none", 4};
    bool causal = true;
    double factor = 1;
    SH_TRY(sh_gguf_meta_need(f->m, "general.architecture"));
    SH_TRY(sh_gguf_meta_text(f->m, "general.architecture", &a));
    if (!sh_gguf_is(a, "gemma4"))
        return sh_gguf_meta_fail(f->m, SH_EUNSUPPORTED, "general.architecture", "%.*s: allowed is gemma4",
                                 (int)(a.n < 64 ? a.n : 64), a.s);
    SH_TRY(sh_gguf_meta_bool(f->m, KEY("attention.causal"), &causal));
    if (!causal) return sh_gguf_meta_fail(f->m, SH_EUNSUPPORTED, KEY("attention.causal"), "false: allowed is true");
    SH_TRY(sh_gguf_meta_text(f->m, KEY("rope.scaling.type"), &scaling));
    if (!sh_gguf_is(scaling, "none"))
        return sh_gguf_meta_fail(f->m, SH_EUNSUPPORTED, KEY("rope.scaling.type"), "%.*s: allowed is none",
                                 (int)(scaling.n < 64 ? scaling.n : 64), scaling.s);
    SH_TRY(sh_gguf_meta_real(f->m, KEY("rope.scaling.factor"), 0, 1e9, &factor));
    if (factor != 1)
        return sh_gguf_meta_fail(f->m, SH_EUNSUPPORTED, KEY("rope.scaling.factor"), "%g: allowed is 1", factor);
    return SH_OK;
}

static sh_status read_vocab(facts *f) {
    static const char tokens[] = "tokenizer.ggml.tokens";
    uint64_t n = sh_gguf_meta_count(f->m, tokens);
    if (n > SH_MAX_VOCAB)
        return sh_gguf_meta_fail(f->m, SH_ELIMIT, tokens, "%llu values: at most %d", (unsigned long long)n,
                                 SH_MAX_VOCAB);
    f->vocab = (int64_t)n;
    if (n == 0) SH_TRY(sh_gguf_meta_need(f->m, KEY("vocab_size")));
    SH_TRY(sh_gguf_meta_int(f->m, KEY("vocab_size"), 1, SH_MAX_VOCAB, &f->vocab));
    if (n == 0 || f->vocab == (int64_t)n) return SH_OK;
    return sh_gguf_meta_fail(f->m, SH_EFORMAT, KEY("vocab_size"), "%lld, but %s has %llu values: allowed is the same",
                             (long long)f->vocab, tokens, (unsigned long long)n);
}

static sh_status read_sizes(facts *f) {
    SH_TRY(need_int(f, KEY("block_count"), 1, SH_MAX_LAYERS, &f->layers));
    SH_TRY(need_int(f, KEY("embedding_length"), 1, SH_MAX_WIDTH, &f->hidden));
    SH_TRY(need_int(f, KEY("context_length"), 1, SH_MAX_CONTEXT, &f->context));
    SH_TRY(need_int(f, KEY("embedding_length_per_layer_input"), 0, SH_MAX_HEADS, &f->ple));
    SH_TRY(need_int(f, KEY("attention.head_count"), 1, SH_MAX_HEADS, &f->heads));
    SH_TRY(need_int(f, KEY("attention.sliding_window"), 1, SH_MAX_CONTEXT, &f->window));
    SH_TRY(need_real(f, KEY("attention.layer_norm_rms_epsilon"), 1e-12, 1, &f->eps));
    SH_TRY(sh_gguf_meta_int(f->m, KEY("attention.shared_kv_layers"), 0, f->layers - 1, &f->shared));
    SH_TRY(sh_gguf_meta_real(f->m, KEY("final_logit_softcapping"), 0, 1e6, &f->softcap));
    if (f->softcap != 0 && f->softcap < 1e-3)
        return sh_gguf_meta_fail(f->m, SH_EFORMAT, KEY("final_logit_softcapping"),
                                 "%g: allowed are 0, and 0.001 to 1e+06", f->softcap);
    return read_vocab(f);
}

static sh_status read_heads(facts *f) {
    static const char *const length[] = {KEY("attention.key_length"), KEY("attention.key_length_swa")};
    static const char *const value[] = {KEY("attention.value_length"), KEY("attention.value_length_swa")};
    static const char *const turned[] = {KEY("rope.dimension_count"), KEY("rope.dimension_count_swa")};
    static const char *const base[] = {KEY("rope.freq_base"), KEY("rope.freq_base_swa")};
    for (int k = 0; k < 2; k++) {
        SH_TRY(need_int(f, length[k], 2, SH_MAX_HEADS, &f->head_dim[k]));
        if (f->head_dim[k] % 2)
            return sh_gguf_meta_fail(f->m, SH_EFORMAT, length[k], "%lld is odd: rotation needs pairs",
                                     (long long)f->head_dim[k]);
        if (f->heads * f->head_dim[k] > SH_MAX_WIDTH)
            return sh_gguf_meta_fail(f->m, SH_ELIMIT, length[k], "%lld, for %lld heads: allowed is a product of %d",
                                     (long long)f->head_dim[k], (long long)f->heads, SH_MAX_WIDTH);
        SH_TRY(same_as(f, value[k], length[k], f->head_dim[k]));
        SH_TRY(same_as(f, turned[k], length[k], f->head_dim[k]));
        SH_TRY(need_real(f, base[k], 1, 1e12, &f->theta[k]));
    }
    return SH_OK;
}

/* Feed-forward widths: one, doubled or not in the layers that share K/V. */
static sh_status read_widths(facts *f) {
    static const char key[] = KEY("feed_forward_length");
    int n = (int)f->layers, own = (int)(f->layers - f->shared);
    SH_TRY(sh_gguf_meta_need(f->m, key));
    SH_TRY(sh_gguf_meta_ints(f->m, key, "the layers", n, 1, SH_MAX_WIDTH, f->ff));
    f->wide = f->shared > 0 && f->ff[n - 1] == 2 * f->ff[0];
    for (int i = 0; i < n; i++) {
        int64_t want = i >= own && f->wide ? 2 * f->ff[0] : f->ff[0];
        if (f->ff[i] != want)
            return sh_gguf_meta_fail(f->m, SH_EUNSUPPORTED, key,
                                     "[%d]: %lld: allowed is %lld: layers of one width, or those that share K/V of two",
                                     i, (long long)f->ff[i], (long long)want);
    }
    return SH_OK;
}

static sh_status read_layers(facts *f) {
    static const char pattern[] = KEY("attention.sliding_window_pattern"), kv[] = KEY("attention.head_count_kv");
    int n = (int)f->layers;
    SH_TRY(sh_gguf_meta_need(f->m, pattern));
    SH_TRY(sh_gguf_meta_bools(f->m, pattern, "the layers", n, f->sliding));
    SH_TRY(sh_gguf_meta_need(f->m, kv));
    SH_TRY(sh_gguf_meta_ints(f->m, kv, "the layers", n, 1, SH_MAX_HEADS, f->kv_heads));
    for (int i = 0; i < n; i++)
        if (f->heads % f->kv_heads[i])
            return sh_gguf_meta_fail(f->m, SH_EFORMAT, kv, "%lld in layer %d does not divide attention.head_count %lld",
                                     (long long)f->kv_heads[i], i, (long long)f->heads);
    f->sliding[n - 1] = false; /* the reference has the last layer full, whatever the list says */
    return read_widths(f);
}

static sh_status read_experts(facts *f) {
    SH_TRY(sh_gguf_meta_int(f->m, KEY("expert_count"), 0, SH_MAX_EXPERTS, &f->experts));
    if (f->experts == 0) return SH_OK;
    SH_TRY(need_int(f, KEY("expert_used_count"), 1, f->experts, &f->top_k));
    int n = (int)f->layers;
    int64_t ff[SH_MAX_LAYERS];
    SH_TRY(sh_gguf_meta_need(f->m, KEY("expert_feed_forward_length")));
    SH_TRY(sh_gguf_meta_ints(f->m, KEY("expert_feed_forward_length"), "the layers", n, 1, SH_MAX_WIDTH, ff));
    for (int i = 0; i < n; i++)
        if (ff[i] != ff[0])
            return sh_gguf_meta_fail(f->m, SH_EUNSUPPORTED, KEY("expert_feed_forward_length"),
                                     "[%d]: %lld: allowed is %lld in all layers", i, (long long)ff[i],
                                     (long long)ff[0]);
    f->expert_ff = ff[0];
    return SH_OK;
}

/* --- ids -----------------------------------------------------------------------------------------------------------
 */

static void add_end(facts *f, int64_t id) {
    for (int i = 0; i < f->n_eos; i++)
        if (f->eos[i] == id) return;
    if (id >= 0 && f->n_eos < (int)(sizeof f->eos / sizeof *f->eos)) f->eos[f->n_eos++] = id;
}

/* Ids of tokens by their text; −1: none. */
static sh_status find_tokens(const facts *f, const char *const *text, int n, int64_t *id) {
    sh_gguf_strings s;
    for (int k = 0; k < n; k++) id[k] = -1;
    if (!sh_gguf_meta_has(f->m, "tokenizer.ggml.tokens")) return SH_OK;
    SH_TRY(sh_gguf_meta_strings(f->m, "tokenizer.ggml.tokens", &s));
    for (uint64_t i = 0; i < s.n; i++) {
        sh_gguf_text t = sh_gguf_next(&s);
        for (int k = 0; k < n; k++)
            if (sh_gguf_is(t, text[k])) id[k] = (int64_t)i;
    }
    return SH_OK;
}

/* Ends are those of the keys and <eos>; with a chat template also the end of a turn and the call for a tool's answer,
 * as Gemma's own generation_config.json has them: one key cannot say all three. */
static sh_status read_ids(facts *f) {
    static const char *const ends[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                       "tokenizer.ggml.eom_token_id"};
    static const char *const text[] = {"<eos>", "<turn|>", "<|tool_response>", "<|image|>", "<|audio|>", "<|video|>"};
    int64_t id[6];
    SH_TRY(sh_gguf_meta_need(f->m, ends[0]));
    for (int i = 0; i < 3; i++) {
        int64_t end = -1;
        SH_TRY(sh_gguf_meta_int(f->m, ends[i], 0, f->vocab - 1, &end));
        add_end(f, end);
    }
    f->bos = f->pad = -1;
    SH_TRY(sh_gguf_meta_int(f->m, "tokenizer.ggml.bos_token_id", 0, f->vocab - 1, &f->bos));
    SH_TRY(sh_gguf_meta_int(f->m, "tokenizer.ggml.padding_token_id", 0, f->vocab - 1, &f->pad));
    SH_TRY(find_tokens(f, text, 6, id));
    for (int i = 0; i < (sh_gguf_meta_has(f->m, "tokenizer.chat_template") ? 3 : 1); i++) add_end(f, id[i]);
    memcpy(f->media, id + 3, sizeof f->media);
    return SH_OK;
}

/* --- from the tensors ----------------------------------------------------------------------------------------------
 */

static sh_status read_k_eq_v(facts *f) {
    int first = -1;
    for (int i = 0; i < f->layers - f->shared; i++) {
        char name[100];
        if (f->sliding[i]) continue;
        snprintf(name, sizeof name, "model.language_model.layers.%d.self_attn.v_proj.weight", i);
        bool none = !sh_tensors_find(f->t, name);
        if (first >= 0 && none != f->k_eq_v)
            SH_FAIL(SH_EUNSUPPORTED,
                    "%s: blk.%d.attn_v.weight is %s, but blk.%d.attn_v.weight is %s: allowed is the "
                    "same in all full layers",
                    sh_gguf_meta_path(f->m), i, none ? "missing" : "there", first, f->k_eq_v ? "missing" : "there");
        if (first < 0) first = i;
        f->k_eq_v = none;
    }
    return SH_OK;
}

/* rope_freqs divides the frequencies of full layers: 1 where a pair is rotated, then something huge. */
static sh_status read_rotated(facts *f) {
    const sh_tensor *t = &f->t->rope_freqs;
    const char *path = sh_gguf_meta_path(f->m);
    int64_t pairs = f->head_dim[0] / 2, n = 0;
    if (t->bytes == 0) SH_FAIL(SH_EFORMAT, "%s: missing tensor rope_freqs.weight", path);
    if (t->dtype != SH_F32 || t->rank != 1 || t->shape[0] != pairs)
        SH_FAIL(
            SH_EFORMAT,
            "%s: rope_freqs.weight: %s of %lld values: allowed is F32 of %lld, half of " KEY("attention.key_length"),
            path, t->dtype_name, (long long)t->shape[0], (long long)pairs);
    for (int64_t i = 0; i < pairs; i++) {
        float x;
        memcpy(&x, t->data + 4 * i, sizeof x);
        if (x == 1 && n == i)
            n++;
        else if (!(x >= 1e29f))
            SH_FAIL(SH_EUNSUPPORTED,
                    "%s: rope_freqs.weight: %g of item %lld: allowed are 1, and from some item on 1e30", path,
                    (double)x, (long long)i);
    }
    f->rotated = (double)n / (double)pairs;
    while (floor(f->rotated * (double)f->head_dim[0] / 2) < (double)n) f->rotated = nextafter(f->rotated, 2);
    return SH_OK;
}

/* --- the file ------------------------------------------------------------------------------------------------------
 */

static json_t *layer_types(const facts *f) {
    json_t *a = json_array();
    for (int i = 0; i < f->layers; i++)
        json_array_append_new(a, json_string(f->sliding[i] ? "sliding_attention" : "full_attention"));
    return a;
}

static json_t *layer_heads(const facts *f) {
    json_t *o = json_object();
    for (int i = 0; i < f->layers; i++) {
        char key[24];
        snprintf(key, sizeof key, "%02d", i);
        json_object_set_new(o, key,
                            json_pack("{s:I, s:I}", "head_dim", (json_int_t)f->head_dim[f->sliding[i]],
                                      "num_key_value_heads", (json_int_t)f->kv_heads[i]));
    }
    return o;
}

static json_t *rope_parameters(const facts *f) {
    return json_pack("{s:{s:s, s:f, s:f}, s:{s:s, s:f}}", "full_attention", "rope_type", "proportional", "rope_theta",
                     f->theta[0], "partial_rotary_factor", f->rotated, "sliding_attention", "rope_type", "default",
                     "rope_theta", f->theta[1]);
}

static void set_int(json_t *o, const char *key, int64_t v) {
    json_object_set_new(o, key, v < 0 ? json_null() : json_integer(v));
}

static void set_ids(json_t *o, const facts *f) {
    static const char *const media[] = {"image_token_id", "audio_token_id", "video_token_id"};
    json_t *ends = json_array();
    for (int i = 0; i < f->n_eos; i++) json_array_append_new(ends, json_integer(f->eos[i]));
    json_object_set_new(o, "eos_token_id", ends);
    set_int(o, "bos_token_id", f->bos);
    set_int(o, "pad_token_id", f->pad);
    for (int i = 0; i < 3; i++) set_int(o, media[i], f->media[i]);
}

static json_t *config_of(const facts *f) {
    json_t *o = json_pack("{s:s, s:[s], s:s}", "model_type", "gemma4_text", "architectures", "Gemma4ForCausalLM",
                          "hidden_activation", "gelu_pytorch_tanh");
    const struct {
        const char *key;
        int64_t value;
    } number[] = {{"vocab_size", f->vocab},
                  {"vocab_size_per_layer_input", f->vocab},
                  {"hidden_size", f->hidden},
                  {"hidden_size_per_layer_input", f->ple},
                  {"num_hidden_layers", f->layers},
                  {"intermediate_size", f->ff[0]},
                  {"num_attention_heads", f->heads},
                  {"num_key_value_heads", f->kv_heads[0]},
                  {"head_dim", f->head_dim[1]},
                  {"sliding_window", f->window},
                  {"max_position_embeddings", f->context},
                  {"num_kv_shared_layers", f->shared},
                  {"num_experts", f->experts ? f->experts : -1},
                  {"top_k_experts", f->experts ? f->top_k : -1},
                  {"moe_intermediate_size", f->experts ? f->expert_ff : -1}};
    for (size_t i = 0; i < sizeof number / sizeof *number; i++) set_int(o, number[i].key, number[i].value);
    json_object_set_new(o, "attention_k_eq_v", json_boolean(f->k_eq_v));
    json_object_set_new(o, "use_double_wide_mlp", json_boolean(f->wide));
    json_object_set_new(o, "enable_moe_block", json_boolean(f->experts > 0));
    json_object_set_new(o, "tie_word_embeddings", json_boolean(!sh_tensors_find(f->t, "lm_head.weight")));
    json_object_set_new(o, "rms_norm_eps", json_real(f->eps));
    json_object_set_new(o, "final_logit_softcapping", json_real(f->softcap));
    json_object_set_new(o, "layer_types", layer_types(f));
    json_object_set_new(o, "per_layer_config", layer_heads(f));
    json_object_set_new(o, "rope_parameters", rope_parameters(f));
    set_ids(o, f);
    return o;
}

static sh_status add_json(const sh_gguf_meta *m, const json_t *o, sh_buf *out) {
    char *text = o ? json_dumps(o, JSON_INDENT(1)) : NULL;
    if (!text) SH_FAIL(SH_EMEMORY, "%s: no memory for what the metadata say", sh_gguf_meta_path(m));
    sh_status st = sh_buf_add_str(out, text);
    free(text);
    return st;
}

static sh_status read_facts(facts *f) {
    SH_TRY(check_kind(f));
    SH_TRY(read_sizes(f));
    SH_TRY(read_heads(f));
    SH_TRY(read_layers(f));
    SH_TRY(read_experts(f));
    SH_TRY(read_ids(f));
    SH_TRY(read_k_eq_v(f));
    return read_rotated(f);
}

sh_status sh_gguf_config(const char *dir, sh_buf *out) {
    SH_CLEANUP(sh_gguf_meta_close) sh_gguf_meta *m = NULL;
    SH_CLEANUP(sh_tensors_close) sh_tensors *t = NULL;
    SH_CLEANUP(sh_json_release) json_t *o = NULL;
    SH_TRY(sh_tensors_open(dir, &t)); /* first: a part that is missing is named */
    SH_TRY(sh_gguf_meta_open(dir, &m));
    facts f = {.m = m, .t = t};
    SH_TRY(read_facts(&f));
    o = config_of(&f);
    return add_json(m, o, out);
}

sh_status sh_gguf_generation(const char *dir, sh_buf *out) {
    SH_CLEANUP(sh_gguf_meta_close) sh_gguf_meta *m = NULL;
    SH_CLEANUP(sh_json_release) json_t *o = json_object();
    double temperature = -1, top_p = -1;
    int64_t top_k = -1;
    SH_TRY(sh_gguf_meta_open(dir, &m));
    SH_TRY(sh_gguf_meta_real(m, "general.sampling.temp", 0, 1e3, &temperature));
    SH_TRY(sh_gguf_meta_real(m, "general.sampling.top_p", 0, 1, &top_p));
    SH_TRY(sh_gguf_meta_int(m, "general.sampling.top_k", 0, INT32_MAX, &top_k));
    if (temperature >= 0) json_object_set_new(o, "temperature", json_real(temperature));
    if (top_p >= 0) json_object_set_new(o, "top_p", json_real(top_p));
    if (top_k >= 0) json_object_set_new(o, "top_k", json_integer(top_k));
    return json_object_size(o) ? add_json(m, o, out) : SH_OK;
}
