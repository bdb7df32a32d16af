/*
 * make_shape SHAPE DIR [TYPE]: writes a checkpoint with random, well-scaled weights and no tokenizer, as safetensors in
 * bf16 or, with a TYPE of BF16, Q8_0 or Q4_0, as one GGUF file that llama.cpp reads too. With the layer shapes of
 * a released model and a vocabulary of 32,768, for tests and benchmarks where K-blocking, panels and wide heads come
 * into play:
 *   e2b          6 layers around the border of producers and consumers of shared K/V (0.9 GB)
 *   31b, 31b-3   6 or 3 layers, one of them global with K = V (6.2 GB, 3.3 GB)
 *   26b-a4b      2 layers with 128 experts (3.4 GB); 26b-a4b-3 and -6 have more (5.0 GB, 9.8 GB)
 *   e2b-whole    all 35 layers and the whole vocabulary (9.3 GB)
 * Small ones with the demo model's vocabulary, whose tokenizer files may be put beside them, to compare layouts:
 *   small-moe    12 layers with 32 experts (0.3 GB)
 *   small-dense  12 layers (0.2 GB)
 *   demo         the demo model's own shapes (4 MB)
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "shape.h"

static const shape shapes[] = {
    {"e2b", 6, 3, 1536, 8, 1, 1, 256, 512, 6144, 512, 256, 3, 0, 0, 0, 0, 32768},
    {"e2b-whole", 35, 5, 1536, 8, 1, 1, 256, 512, 6144, 512, 256, 20, 0, 0, 0, 0, 262144},
    {"31b", 6, 6, 5376, 32, 16, 4, 256, 512, 21504, 1024, 0, 0, 0, 0, 0, 1, 32768},
    {"31b-3", 3, 6, 5376, 32, 16, 4, 256, 512, 21504, 1024, 0, 0, 0, 0, 0, 1, 32768},
    {"26b-a4b", 2, 2, 2816, 16, 8, 2, 256, 512, 2112, 1024, 0, 0, 128, 8, 704, 1, 32768},
    {"26b-a4b-3", 3, 6, 2816, 16, 8, 2, 256, 512, 2112, 1024, 0, 0, 128, 8, 704, 1, 32768},
    {"26b-a4b-6", 6, 6, 2816, 16, 8, 2, 256, 512, 2112, 1024, 0, 0, 128, 8, 704, 1, 32768},
    {"demo", 6, 6, 128, 4, 2, 1, 32, 64, 256, 64, 0, 0, 16, 4, 64, 1, 3072},
    {"small-moe", 12, 6, 512, 8, 4, 2, 64, 128, 1024, 1024, 0, 0, 32, 4, 256, 1, 3072},
    {"small-dense", 12, 6, 768, 8, 4, 2, 96, 192, 3072, 1024, 0, 0, 0, 0, 0, 1, 3072},
};

static tensor list[1024];
static int n_list;

static void add(int layer, const char *name, size_t experts, size_t rows, size_t cols, float scale, float mean) {
    tensor *t = &list[n_list++];
    if (layer < 0)
        snprintf(t->name, sizeof t->name, "model.language_model.%s", name);
    else
        snprintf(t->name, sizeof t->name, "model.language_model.layers.%d.%s", layer, name);
    t->experts = experts;
    t->rows = rows;
    t->cols = cols;
    t->scale = scale;
    t->mean = mean;
}

/* Uniform with the variance that keeps a unit-variance input at unit variance. */
static void matrix(int layer, const char *name, size_t rows, size_t cols) {
    add(layer, name, 0, rows, cols, sqrtf(3.0f / (float)cols), 0);
}

static void norm(int layer, const char *name, size_t n, float mean) {
    add(layer, name, 0, 0, n, 0.1f, mean);
}

int is_global(const shape *s, int layer) {
    return (layer + 1) % s->global_every == 0 || layer + 1 == s->layers;
}

static void add_experts(const shape *s, int i) {
    size_t H = (size_t)s->hidden, E = (size_t)s->experts, F = (size_t)s->eff;
    norm(i, "post_feedforward_layernorm_1.weight", H, 1);
    norm(i, "post_feedforward_layernorm_2.weight", H, 1);
    norm(i, "pre_feedforward_layernorm_2.weight", H, 1);
    add(i, "router.scale", 0, 0, H, 0.1f, 4);
    add(i, "router.per_expert_scale", 0, 0, E, 0.1f, 1);
    add(i, "router.proj.weight", 0, E, H, 1, 0);
    add(i, "experts.gate_up_proj", E, 2 * F, H, sqrtf(3.0f / (float)H), 0);
    add(i, "experts.down_proj", E, H, F, sqrtf(3.0f / (float)F), 0);
}

static void add_layer(const shape *s, int i) {
    int global = is_global(s, i), consumer = i >= s->layers - s->shared;
    size_t H = (size_t)s->hidden, hd = (size_t)(global ? s->global_hd : s->hd);
    size_t kv = (size_t)(global ? s->global_kv : s->kv), ff = (size_t)s->ff * (consumer ? 2 : 1);
    norm(i, "input_layernorm.weight", H, 1);
    norm(i, "post_attention_layernorm.weight", H, 1);
    norm(i, "pre_feedforward_layernorm.weight", H, 1);
    norm(i, "post_feedforward_layernorm.weight", H, 1);
    norm(i, "self_attn.q_norm.weight", hd, 0.35f); /* around 1 the softmax would be far too sharp */
    matrix(i, "self_attn.q_proj.weight", (size_t)s->heads * hd, H);
    matrix(i, "self_attn.o_proj.weight", H, (size_t)s->heads * hd);
    if (!consumer) {
        norm(i, "self_attn.k_norm.weight", hd, 0.35f);
        matrix(i, "self_attn.k_proj.weight", kv * hd, H);
        if (!(global && s->k_eq_v)) matrix(i, "self_attn.v_proj.weight", kv * hd, H);
    }
    matrix(i, "mlp.gate_proj.weight", ff, H);
    matrix(i, "mlp.up_proj.weight", ff, H);
    matrix(i, "mlp.down_proj.weight", H, ff);
    add(i, "layer_scalar", 0, 0, 1, 0.1f, 0.9f);
    if (s->experts) add_experts(s, i);
    if (!s->ple) return;
    matrix(i, "per_layer_input_gate.weight", (size_t)s->ple, H);
    matrix(i, "per_layer_projection.weight", H, (size_t)s->ple);
    norm(i, "post_per_layer_input_norm.weight", H, 1);
}

static void add_all(const shape *s) {
    size_t H = (size_t)s->hidden, P = (size_t)s->ple * (size_t)s->layers;
    add(-1, "embed_tokens.weight", 0, (size_t)s->vocab, H, sqrtf(3.0f / (float)H), 0);
    norm(-1, "norm.weight", H, 1);
    if (s->ple) {
        add(-1, "embed_tokens_per_layer.weight", 0, (size_t)s->vocab, P, sqrtf(3.0f / (float)s->ple), 0);
        matrix(-1, "per_layer_model_projection.weight", P, H);
        norm(-1, "per_layer_projection_norm.weight", (size_t)s->ple, 1);
    }
    for (int i = 0; i < s->layers; i++) add_layer(s, i);
}

size_t items(const tensor *t) {
    return (t->experts ? t->experts : 1) * (t->rows ? t->rows : 1) * t->cols;
}

static uint64_t state = 1;
float noise(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (float)((double)(int64_t)state * 0x1p-63);
}

uint16_t bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static int write_config(const shape *s, const char *dir) {
    char path[512];
    snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *f = fopen(path, "w");
    if (!f) return 0;
    fprintf(f, "{\"model_type\": \"gemma4_text\", \"architectures\": [\"Gemma4ForCausalLM\"],\n \"layer_types\": [");
    for (int i = 0; i < s->layers; i++)
        fprintf(f, "%s\"%s_attention\"", i ? ", " : "", is_global(s, i) ? "full" : "sliding");
    fprintf(f, "],\n \"vocab_size\": %d, \"hidden_size\": %d, \"intermediate_size\": %d, \"num_hidden_layers\": %d,\n",
            s->vocab, s->hidden, s->ff, s->layers);
    fprintf(f,
            " \"num_attention_heads\": %d, \"num_key_value_heads\": %d, \"head_dim\": %d, \"global_head_dim\": %d,\n",
            s->heads, s->kv, s->hd, s->global_hd);
    if (s->k_eq_v) fprintf(f, " \"attention_k_eq_v\": true, \"num_global_key_value_heads\": %d,\n", s->global_kv);
    fprintf(f, " \"sliding_window\": %d, \"num_kv_shared_layers\": %d, \"use_double_wide_mlp\": %s,\n", s->window,
            s->shared, s->shared ? "true" : "false");
    fprintf(f, " \"hidden_size_per_layer_input\": %d, \"vocab_size_per_layer_input\": %d,\n", s->ple, s->vocab);
    if (s->experts)
        fprintf(f,
                " \"enable_moe_block\": true, \"num_experts\": %d, \"top_k_experts\": %d, "
                "\"moe_intermediate_size\": %d,\n",
                s->experts, s->top_k, s->eff);
    fprintf(f, " \"final_logit_softcapping\": 30.0, \"rms_norm_eps\": 1e-06, \"max_position_embeddings\": 131072,\n"
               " \"tie_word_embeddings\": true, \"pad_token_id\": 0, \"bos_token_id\": 2, \"eos_token_id\": 1}\n");
    return fclose(f) == 0;
}

static int write_header(FILE *f) {
    char *text = malloc((size_t)n_list * 256), *at = text;
    if (!text) return 0;
    size_t offset = 0;
    at += sprintf(at, "{");
    for (int i = 0; i < n_list; i++) {
        const tensor *t = &list[i];
        at += sprintf(at, "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[", i ? "," : "", t->name);
        if (t->experts) at += sprintf(at, "%zu,", t->experts);
        if (t->rows) at += sprintf(at, "%zu,", t->rows);
        at += sprintf(at, "%zu],\"data_offsets\":[%zu,%zu]}", t->cols, offset, offset + 2 * items(t));
        offset += 2 * items(t);
    }
    at += sprintf(at, "}");
    while ((at - text) % 8) *at++ = ' ';
    uint64_t n = (uint64_t)(at - text);
    int ok = fwrite(&n, 8, 1, f) == 1 && fwrite(text, 1, n, f) == n;
    free(text);
    return ok;
}

static int write_tensors(const char *dir) {
    char path[512];
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    FILE *f = fopen(path, "wb");
    if (!f) return 0;
    int ok = write_header(f);
    static uint16_t block[1 << 16];
    for (int i = 0; ok && i < n_list; i++)
        for (size_t left = items(&list[i]), n; ok && left > 0; left -= n) {
            n = left < 1 << 16 ? left : 1 << 16;
            for (size_t k = 0; k < n; k++) block[k] = bf16(list[i].mean + list[i].scale * noise());
            ok = fwrite(block, 2, n, f) == n;
        }
    return fclose(f) == 0 && ok;
}

int main(int argc, char **argv) {
    for (size_t i = 0; (argc == 3 || argc == 4) && i < sizeof shapes / sizeof shapes[0]; i++) {
        if (strcmp(argv[1], shapes[i].name) != 0) continue;
        mkdir(argv[2], 0700);
        add_all(&shapes[i]);
        if (write_config(&shapes[i], argv[2]) &&
            (argc == 3 ? write_tensors(argv[2]) : write_gguf(&shapes[i], list, n_list, argv[2], argv[3])))
            return 0;
        perror(argv[2]);
        return 1;
    }
    fprintf(stderr, "usage: make_shape SHAPE DIR [BF16|Q8_0|Q4_0], SHAPE being one of");
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) fprintf(stderr, " %s", shapes[i].name);
    fprintf(stderr, "\n");
    return 2;
}
