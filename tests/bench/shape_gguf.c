/*
 * A checkpoint of make_shape.c as GGUF (docs/model.md), with the names, keys and types that llama.cpp's converter and
 * quantiser give (`--pure`: the embedding has the type of the matrices): vectors and the router are F32,
 * per_layer_model_proj is BF16. There is no tokenizer: the vocabulary is said to be "none", which its benchmarks
 * accept.
 */
#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "shape.h"

enum { F32 = 0, Q4_0 = 2, Q8_0 = 8, BF16 = 30 };                                       /* tensor types */
enum { OF_U32 = 4, OF_I32 = 5, OF_F32 = 6, OF_BOOL = 7, OF_STRING = 8, OF_ARRAY = 9 }; /* types of values */

typedef struct gguf_type {
    const char *name;
    uint32_t type, file_type, block, block_bytes;
} gguf_type;

static const gguf_type types[] = {{"BF16", BF16, 32, 1, 2}, {"Q8_0", Q8_0, 7, 32, 34}, {"Q4_0", Q4_0, 2, 32, 18}};
static const gguf_type plain = {"F32", F32, 0, 1, 4};

static const char *const names[][2] = {
    {"embed_tokens.weight", "token_embd.weight"},
    {"norm.weight", "output_norm.weight"},
    {"embed_tokens_per_layer.weight", "per_layer_token_embd.weight"},
    {"per_layer_model_projection.weight", "per_layer_model_proj.weight"},
    {"per_layer_projection_norm.weight", "per_layer_proj_norm.weight"},
    {"input_layernorm.weight", "attn_norm.weight"},
    {"self_attn.q_proj.weight", "attn_q.weight"},
    {"self_attn.k_proj.weight", "attn_k.weight"},
    {"self_attn.v_proj.weight", "attn_v.weight"},
    {"self_attn.o_proj.weight", "attn_output.weight"},
    {"self_attn.q_norm.weight", "attn_q_norm.weight"},
    {"self_attn.k_norm.weight", "attn_k_norm.weight"},
    {"post_attention_layernorm.weight", "post_attention_norm.weight"},
    {"pre_feedforward_layernorm.weight", "ffn_norm.weight"},
    {"post_feedforward_layernorm.weight", "post_ffw_norm.weight"},
    {"mlp.gate_proj.weight", "ffn_gate.weight"},
    {"mlp.up_proj.weight", "ffn_up.weight"},
    {"mlp.down_proj.weight", "ffn_down.weight"},
    {"layer_scalar", "layer_output_scale.weight"},
    {"per_layer_input_gate.weight", "inp_gate.weight"},
    {"per_layer_projection.weight", "proj.weight"},
    {"post_per_layer_input_norm.weight", "post_norm.weight"},
    {"router.proj.weight", "ffn_gate_inp.weight"},
    {"router.scale", "ffn_gate_inp.scale"},
    {"router.per_expert_scale", "ffn_down_exps.scale"},
    {"experts.gate_up_proj", "ffn_gate_up_exps.weight"},
    {"experts.down_proj", "ffn_down_exps.weight"},
    {"pre_feedforward_layernorm_2.weight", "pre_ffw_norm_2.weight"},
    {"post_feedforward_layernorm_1.weight", "post_ffw_norm_1.weight"},
    {"post_feedforward_layernorm_2.weight", "post_ffw_norm_2.weight"},
};

static void gguf_name(const char *hf, char *to, size_t size) {
    const char *rest = strstr(hf, "language_model.") + strlen("language_model.");
    long layer = -1;
    if (strncmp(rest, "layers.", 7) == 0) {
        char *end;
        layer = strtol(rest + 7, &end, 10);
        rest = end + 1;
    }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(names[i][0], rest) == 0) rest = names[i][1];
    if (layer < 0)
        snprintf(to, size, "%s", rest);
    else
        snprintf(to, size, "blk.%ld.%s", layer, rest);
}

/* --- keys ----------------------------------------------------------------------------------------------------------
 */

static void put(FILE *f, const void *p, size_t n) {
    fwrite(p, 1, n, f); /* whether it worked is asked once, at the end */
}
static void put32(FILE *f, uint32_t x) {
    put(f, &x, 4);
}
static void put64(FILE *f, uint64_t x) {
    put(f, &x, 8);
}
static void put_string(FILE *f, const char *s) {
    put64(f, strlen(s));
    put(f, s, strlen(s));
}

static uint64_t n_keys; /* counted in a first pass */

static void key(FILE *f, const char *name, uint32_t type) {
    n_keys++;
    put_string(f, name);
    put32(f, type);
}
static void key_u32(FILE *f, const char *name, int x) {
    key(f, name, OF_U32);
    put32(f, (uint32_t)x);
}
static void key_f32(FILE *f, const char *name, float x) {
    key(f, name, OF_F32);
    put(f, &x, 4);
}
static void key_text(FILE *f, const char *name, const char *x) {
    key(f, name, OF_STRING);
    put_string(f, x);
}
static void key_array(FILE *f, const char *name, uint32_t type, int n) {
    key(f, name, OF_ARRAY);
    put32(f, type);
    put64(f, (uint64_t)n);
}

static void put_layer_keys(FILE *f, const shape *s) {
    key_array(f, "gemma4.feed_forward_length", OF_I32, s->layers);
    for (int i = 0; i < s->layers; i++) put32(f, (uint32_t)(i >= s->layers - s->shared ? 2 * s->ff : s->ff));
    key_array(f, "gemma4.attention.head_count_kv", OF_I32, s->layers);
    for (int i = 0; i < s->layers; i++) put32(f, (uint32_t)(is_global(s, i) ? s->global_kv : s->kv));
    key_array(f, "gemma4.attention.sliding_window_pattern", OF_BOOL, s->layers);
    for (int i = 0; i < s->layers; i++) put(f, &(char){!is_global(s, i)}, 1);
}

static void put_keys(FILE *f, const shape *s, const gguf_type *t) {
    n_keys = 0;
    key_text(f, "general.architecture", "gemma4");
    key_text(f, "general.name", s->name);
    key_u32(f, "general.file_type", (int)t->file_type);
    key_u32(f, "general.quantization_version", 2);
    key_u32(f, "gemma4.block_count", s->layers);
    key_u32(f, "gemma4.context_length", 131072);
    key_u32(f, "gemma4.embedding_length", s->hidden);
    key_u32(f, "gemma4.attention.head_count", s->heads);
    put_layer_keys(f, s);
    key_f32(f, "gemma4.rope.freq_base", 1e6f);
    key_f32(f, "gemma4.rope.freq_base_swa", 1e4f);
    key_f32(f, "gemma4.attention.layer_norm_rms_epsilon", 1e-6f);
    key_u32(f, "gemma4.attention.key_length", s->global_hd);
    key_u32(f, "gemma4.attention.value_length", s->global_hd);
    key_u32(f, "gemma4.attention.key_length_swa", s->hd);
    key_u32(f, "gemma4.attention.value_length_swa", s->hd);
    key_u32(f, "gemma4.rope.dimension_count", s->global_hd);
    key_u32(f, "gemma4.rope.dimension_count_swa", s->hd);
    key_f32(f, "gemma4.final_logit_softcapping", 30);
    key_u32(f, "gemma4.attention.sliding_window", s->window);
    key_u32(f, "gemma4.attention.shared_kv_layers", s->shared);
    key_u32(f, "gemma4.embedding_length_per_layer_input", s->ple);
    if (s->experts) {
        key_u32(f, "gemma4.expert_count", s->experts);
        key_u32(f, "gemma4.expert_used_count", s->top_k);
        key_u32(f, "gemma4.expert_feed_forward_length", s->eff);
    }
    key_text(f, "tokenizer.ggml.model", "none");
    key_u32(f, "gemma4.vocab_size", s->vocab);
}

/* --- tensors -------------------------------------------------------------------------------------------------------
 */

static const gguf_type *type_of(const tensor *t, const gguf_type *matrices) {
    if (!t->rows || strstr(t->name, "router")) return &plain;
    if (strstr(t->name, "per_layer_model_projection")) return &types[0];
    return matrices;
}

static uint64_t bytes_of(const tensor *t, const gguf_type *matrices) {
    const gguf_type *g = type_of(t, matrices);
    return items(t) / g->block * g->block_bytes;
}

static uint64_t padded(uint64_t n) {
    return (n + 31) & ~(uint64_t)31;
}

static uint64_t put_info(FILE *f, const tensor *t, const gguf_type *matrices, uint64_t at) {
    char name[96];
    gguf_name(t->name, name, sizeof name);
    put_string(f, name);
    put32(f, 1 + (t->rows > 0) + (t->experts > 0));
    put64(f, t->cols);
    if (t->rows) put64(f, t->rows);
    if (t->experts) put64(f, t->experts);
    put32(f, type_of(t, matrices)->type);
    put64(f, at);
    return at + padded(bytes_of(t, matrices));
}

/* d as IEEE half precision, rounded down in magnitude to a value that it holds: it divides what is quantised next. */
static uint16_t half(float d) {
    uint32_t u;
    memcpy(&u, &d, 4);
    int e = (int)(u >> 23 & 255) - 127 + 15;
    if (e <= 0 || e >= 31) return 0; /* scales of random weights are far from both */
    return (uint16_t)(u >> 16 & 0x8000) | (uint16_t)(e << 10) | (uint16_t)(u >> 13 & 0x3ff);
}

static float half_value(uint16_t h) {
    uint32_t u = (uint32_t)(h & 0x8000) << 16 | ((uint32_t)(h >> 10 & 31) + 112) << 23 | (uint32_t)(h & 0x3ff) << 13;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static int code(float x, float d, int least, int most) {
    int q = (int)lrintf(x / d);
    return q < least ? least : q > most ? most : q;
}

/* 32 values as one block; its layout is in docs/model.md. */
static void put_block(FILE *f, const float *x, uint32_t type) {
    float big = 0;
    for (int i = 0; i < 32; i++) big = fabsf(x[i]) > fabsf(big) ? x[i] : big;
    uint16_t h = half(type == Q8_0 ? fabsf(big) / 127 : big / -8);
    float d = half_value(h);
    unsigned char out[32];
    for (int i = 0; i < 32 && type == Q8_0; i++) out[i] = (unsigned char)code(x[i], d, -127, 127);
    for (int i = 0; i < 16 && type == Q4_0; i++)
        out[i] = (unsigned char)((code(x[i], d, -8, 7) + 8) | (code(x[16 + i], d, -8, 7) + 8) << 4);
    put(f, &h, 2);
    put(f, out, type == Q8_0 ? 32 : 16);
}

/* To bf16, as the checkpoints are that llama.cpp converts. */
static float rounded(float x) {
    uint32_t u = (uint32_t)bf16(x) << 16;
    memcpy(&x, &u, 4);
    return x;
}

static void put_tensor(FILE *f, const tensor *t, const gguf_type *matrices) {
    uint32_t type = type_of(t, matrices)->type;
    float x[32];
    for (size_t at = 0, n = items(t); at < n; at += 32) {
        int m = n - at < 32 ? (int)(n - at) : 32;
        for (int i = 0; i < m; i++) x[i] = rounded(t->mean + t->scale * noise());
        if (type == Q8_0 || type == Q4_0)
            put_block(f, x, type);
        else if (type == F32)
            put(f, x, (size_t)m * 4);
        else
            for (int i = 0; i < m; i++) put(f, &(uint16_t){bf16(x[i])}, 2);
    }
    uint64_t bytes = bytes_of(t, matrices);
    put(f, (char[32]){0}, padded(bytes) - bytes);
}

/* llama.cpp divides the global layers' angles by these: the last three quarters of the dimensions are not rotated. */
static const tensor rope_freqs = {.name = "rope_freqs.weight"};

static void put_rope_freqs(FILE *f, const shape *s) {
    for (int i = 0; i < s->global_hd / 2; i++) put(f, &(float){i < s->global_hd / 8 ? 1 : 1e30f}, 4);
}

static void put_head(FILE *f, const shape *s, const tensor *list, int n, const gguf_type *t) {
    put(f, "GGUF", 4);
    put32(f, 3);
    put64(f, (uint64_t)n + 1);
    put64(f, n_keys);
    put_keys(f, s, t);
    put_string(f, rope_freqs.name);
    put32(f, 1);
    put64(f, (uint64_t)s->global_hd / 2);
    put32(f, F32);
    put64(f, 0);
    uint64_t at = padded((uint64_t)s->global_hd * 2);
    for (int i = 0; i < n; i++) at = put_info(f, &list[i], t, at);
    long here = ftell(f);
    put(f, (char[32]){0}, padded((uint64_t)here) - (uint64_t)here);
}

int write_gguf(const shape *s, const tensor *list, int n, const char *dir, const char *type) {
    const gguf_type *t = NULL;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(types[i].name, type) == 0) t = &types[i];
    char path[512];
    snprintf(path, sizeof path, "%s/model.gguf", dir);
    FILE *f = t ? fopen(path, "wb") : (errno = EINVAL, NULL);
    if (!f) return 0;
    put_head(f, s, list, n, t); /* counts the keys */
    rewind(f);
    put_head(f, s, list, n, t);
    put_rope_freqs(f, s);
    for (int i = 0; i < n; i++) put_tensor(f, &list[i], t);
    bool ok = !ferror(f);
    return fclose(f) == 0 && ok;
}
