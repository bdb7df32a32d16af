/* See slots.h. The shapes are those that weights.c asks of a checkpoint. */
#include "model/slots.h"

#include <stdio.h>

typedef struct walk {
    const sh_config *c;
    sh_wtype type;
    int layer;
    sh_slot_fn *fn;
    void *ctx;
} walk;

static sh_slot begin(const walk *x, const char *part) {
    sh_slot s = {.layer = x->layer, .type = x->type};
    if (x->layer < 0)
        snprintf(s.name, sizeof s.name, "%s", part);
    else
        snprintf(s.name, sizeof s.name, "layers.%d.%s", x->layer, part);
    return s;
}

static sh_status vector(const walk *x, const char *part, int k, const float **to) {
    sh_slot s = begin(x, part);
    s.k = k;
    s.vector = to;
    return x->fn(x->ctx, &s);
}

static sh_status stack(const walk *x, const char *part, sh_slot_part cut, int count, int n, int k, sh_wmat *to) {
    sh_slot s = begin(x, part);
    s.part = cut;
    s.count = count;
    s.n = n;
    s.k = k;
    s.mat = to;
    return x->fn(x->ctx, &s);
}

static sh_status matrix(const walk *x, const char *part, sh_slot_part cut, int n, int k, sh_wmat *to) {
    return stack(x, part, cut, 1, n, k, to);
}

static sh_status keys_and_values(const walk *x, const sh_layer *l, sh_layer_weights *w) {
    int n = l->kv_heads * l->head_dim;
    SH_TRY(vector(x, "self_attn.k_norm", l->head_dim, &w->k_norm));
    SH_TRY(matrix(x, "self_attn.k_proj", SH_SLOT_KV, n, x->c->hidden, &w->k));
    return l->k_eq_v ? SH_OK : matrix(x, "self_attn.v_proj", SH_SLOT_KV, n, x->c->hidden, &w->v);
}

static sh_status attention(const walk *x, const sh_layer *l, sh_layer_weights *w) {
    int h = x->c->hidden, q = l->heads * l->head_dim;
    SH_TRY(vector(x, "self_attn.q_norm", l->head_dim, &w->q_norm));
    SH_TRY(matrix(x, "self_attn.q_proj", SH_SLOT_QUERIES, q, h, &w->q));
    if (l->has_kv)
        SH_TRY(keys_and_values(x, l, w));
    else if (l->k_eq_v) /* a consumer of K = V pages: its producer's norm */
        SH_TRY(vector(x, "self_attn.k_norm", l->head_dim, &w->k_norm));
    return matrix(x, "self_attn.o_proj", SH_SLOT_MIX_QUERIES, h, q, &w->o);
}

static sh_status experts(const walk *x, sh_layer_weights *w) {
    const sh_config *c = x->c;
    SH_TRY(vector(x, "post_feedforward_layernorm_1", c->hidden, &w->post_ff_norm_1));
    SH_TRY(vector(x, "post_feedforward_layernorm_2", c->hidden, &w->post_ff_norm_2));
    SH_TRY(vector(x, "pre_feedforward_layernorm_2", c->hidden, &w->pre_ff_norm_2));
    SH_TRY(vector(x, "router.scale", c->hidden, &w->router_scale));
    SH_TRY(vector(x, "router.per_expert_scale", c->experts, &w->expert_scale));
    walk router = *x;
    router.type = SH_W_BF16;
    SH_TRY(matrix(&router, "router.proj", SH_SLOT_WHOLE, c->experts, c->hidden, &w->router));
    SH_TRY(stack(x, "experts.gate_up_proj", SH_SLOT_EXPERTS, c->experts, 2 * c->expert_ff, c->hidden,
                 (sh_wmat *)(uintptr_t)w->expert_gate_up));
    return stack(x, "experts.down_proj", SH_SLOT_EXPERTS, c->experts, c->hidden, c->expert_ff,
                 (sh_wmat *)(uintptr_t)w->expert_down);
}

static sh_status per_layer(const walk *x, sh_layer_weights *w) {
    const sh_config *c = x->c;
    SH_TRY(matrix(x, "per_layer_input_gate", SH_SLOT_WHOLE, c->ple, c->hidden, &w->ple_gate));
    SH_TRY(matrix(x, "per_layer_projection", SH_SLOT_WHOLE, c->hidden, c->ple, &w->ple_proj));
    SH_TRY(matrix(x, "per_layer_model_projection", SH_SLOT_WHOLE, c->ple, c->hidden, &w->ple_model_proj));
    return vector(x, "post_per_layer_input_norm", c->hidden, &w->post_ple_norm);
}

static sh_status scalar(const walk *x, sh_layer_weights *w) {
    sh_slot s = begin(x, "layer_scalar");
    s.k = 1;
    s.scalar = &w->scalar;
    return x->fn(x->ctx, &s);
}

static sh_status layer(const walk *x, sh_layer_weights *w) {
    const sh_config *c = x->c;
    const sh_layer *l = &c->layer[x->layer];
    int h = c->hidden;
    SH_TRY(scalar(x, w));
    SH_TRY(vector(x, "input_layernorm", h, &w->input_norm));
    if (sh_config_only_kv(c, x->layer)) return keys_and_values(x, l, w);
    SH_TRY(vector(x, "post_attention_layernorm", h, &w->post_attn_norm));
    SH_TRY(vector(x, "pre_feedforward_layernorm", h, &w->pre_ff_norm));
    SH_TRY(vector(x, "post_feedforward_layernorm", h, &w->post_ff_norm));
    SH_TRY(attention(x, l, w));
    SH_TRY(matrix(x, "mlp.gate_proj", SH_SLOT_COLUMNS, l->ff, h, &w->gate));
    SH_TRY(matrix(x, "mlp.up_proj", SH_SLOT_COLUMNS, l->ff, h, &w->up));
    SH_TRY(matrix(x, "mlp.down_proj", SH_SLOT_MIX_COLUMNS, h, l->ff, &w->down));
    if (l->moe) SH_TRY(experts(x, w));
    return c->ple ? per_layer(x, w) : SH_OK;
}

sh_status sh_slots_each(sh_weights *w, sh_slot_fn *fn, void *ctx) {
    const sh_config *c = w->config;
    walk x = {.c = c, .type = w->type, .fn = fn, .ctx = ctx};
    for (x.layer = w->first; x.layer < w->last; x.layer++) SH_TRY(layer(&x, &w->layer[x.layer - w->first]));
    x.layer = -1;
    if (c->ple) SH_TRY(vector(&x, "per_layer_projection_norm", c->ple, &w->ple_norm));
    if (!sh_config_has_head(c, w->last)) return SH_OK;
    SH_TRY(vector(&x, "norm", c->hidden, &w->final_norm));
    return matrix(&x, "head", SH_SLOT_VOCABULARY, c->vocab, c->hidden, &w->head);
}
