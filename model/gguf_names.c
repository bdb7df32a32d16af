/* llama.cpp's tensor names of Gemma 4 → those of Hugging Face. See gguf.h. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "model/gguf.h"

typedef struct pair {
    const char *gguf, *hf;
} pair;

static const pair whole_model[] = {
    {"token_embd.weight", "model.language_model.embed_tokens.weight"},
    {"output_norm.weight", "model.language_model.norm.weight"},
    {"output.weight", "lm_head.weight"},
    {"per_layer_token_embd.weight", "model.language_model.embed_tokens_per_layer.weight"},
    {"per_layer_model_proj.weight", "model.language_model.per_layer_model_projection.weight"},
    {"per_layer_proj_norm.weight", "model.language_model.per_layer_projection_norm.weight"},
};

static const pair of_layer[] = {
    {"attn_norm.weight", "input_layernorm.weight"},
    {"attn_q.weight", "self_attn.q_proj.weight"},
    {"attn_k.weight", "self_attn.k_proj.weight"},
    {"attn_v.weight", "self_attn.v_proj.weight"},
    {"attn_output.weight", "self_attn.o_proj.weight"},
    {"attn_q_norm.weight", "self_attn.q_norm.weight"},
    {"attn_k_norm.weight", "self_attn.k_norm.weight"},
    {"post_attention_norm.weight", "post_attention_layernorm.weight"},
    {"ffn_norm.weight", "pre_feedforward_layernorm.weight"},
    {"post_ffw_norm.weight", "post_feedforward_layernorm.weight"},
    {"ffn_gate.weight", "mlp.gate_proj.weight"},
    {"ffn_up.weight", "mlp.up_proj.weight"},
    {"ffn_down.weight", "mlp.down_proj.weight"},
    {"layer_output_scale.weight", "layer_scalar"},
    {"inp_gate.weight", "per_layer_input_gate.weight"},
    {"proj.weight", "per_layer_projection.weight"},
    {"post_norm.weight", "post_per_layer_input_norm.weight"},
    {"ffn_gate_inp.weight", "router.proj.weight"},
    {"ffn_gate_inp.scale", "router.scale"},
    {"ffn_gate_up_exps.weight", "experts.gate_up_proj"},
    {"ffn_gate_exps.weight", "experts.gate_proj"},
    {"ffn_up_exps.weight", "experts.up_proj"},
    {"ffn_down_exps.weight", "experts.down_proj"},
    {"ffn_down_exps.scale", "router.per_expert_scale"},
    {"pre_ffw_norm_2.weight", "pre_feedforward_layernorm_2.weight"},
    {"post_ffw_norm_1.weight", "post_feedforward_layernorm_1.weight"},
    {"post_ffw_norm_2.weight", "post_feedforward_layernorm_2.weight"},
};

static const char *find(const pair *p, size_t n, const char *name) {
    for (size_t i = 0; i < n; i++)
        if (strcmp(p[i].gguf, name) == 0) return p[i].hf;
    return NULL;
}

void sh_gguf_name(const char *name, char *to, size_t size) {
    const char *hf = find(whole_model, sizeof whole_model / sizeof *whole_model, name);
    char *part = NULL;
    long layer = -1;
    if (!hf && strncmp(name, "blk.", 4) == 0 && name[4] >= '0' && name[4] <= '9') {
        layer = strtol(name + 4, &part, 10);
        hf = *part == '.' ? find(of_layer, sizeof of_layer / sizeof *of_layer, part + 1) : NULL;
    }
    if (!hf)
        snprintf(to, size, "%s", name);
    else if (layer < 0)
        snprintf(to, size, "%s", hf);
    else
        snprintf(to, size, "model.language_model.layers.%ld.%s", layer, hf);
}
