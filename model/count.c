/* Counts that follow from the layer table alone: parameters and KV bytes. Declared in config.h; nothing is read here.
 */
#include "model/config.h"
#include "model/kernels/kernels.h"

sh_layer_count sh_config_layer_count(const sh_config *c, int layer) {
    const sh_layer *l = &c->layer[layer];
    int64_t h = c->hidden, q = (int64_t)l->heads * l->head_dim, kv = (int64_t)l->kv_heads * l->head_dim;
    sh_layer_count n = {.qo = 2 * q * h, .mlp = 3 * h * l->ff};
    if (l->has_kv) n.kv = (l->k_eq_v ? 1 : 2) * kv * h;
    n.norms = 4 * h + l->head_dim + (l->has_kv ? l->head_dim : 0);
    if (l->moe) {
        n.experts = 3 * h * c->expert_ff * c->experts;
        n.router = h * c->experts + h + c->experts;
        n.norms += 3 * h;
    }
    if (c->ple) {
        n.ple = 2 * h * c->ple;
        n.norms += h;
    }
    return n;
}

int64_t sh_layer_params(const sh_config *c, int layer) {
    sh_layer_count n = sh_config_layer_count(c, layer);
    int64_t router = c->layer[layer].moe ? (int64_t)c->hidden * c->experts : 0;
    return n.qo + n.kv + n.mlp + n.experts + router + n.ple + (int64_t)c->ple * c->hidden;
}

sh_param_count sh_config_count(const sh_config *c) {
    int64_t h = c->hidden;
    sh_param_count p = {.embedding = (c->tied ? 1 : 2) * h * c->vocab, .norms = h};
    if (c->ple) {
        p.ple_table = (int64_t)c->ple_vocab * c->n_layers * c->ple;
        p.ple_projection = (int64_t)c->n_layers * c->ple * h;
        p.norms += c->ple;
    }
    for (int i = 0; i < c->n_layers; i++) {
        sh_layer_count n = sh_config_layer_count(c, i);
        p.attention += n.qo + n.kv;
        p.mlp += n.mlp;
        p.experts += n.experts;
        p.router += n.router;
        p.ple_layers += n.ple;
        p.norms += n.norms;
    }
    p.total = p.embedding + p.ple_table + p.ple_projection + p.attention + p.mlp + p.experts + p.router + p.ple_layers +
              p.norms;
    return p;
}

int sh_layer_kv_values(const sh_layer *l) {
    return (l->k_eq_v ? 1 : 2) * l->kv_heads * l->head_dim;
}

size_t sh_kv_vec_bytes(sh_kv_type t, int head_dim) {
    if (t == SH_KV_Q8) return sh_kv8_bytes(head_dim);
    return (size_t)head_dim * (t == SH_KV_F32 ? sizeof(float) : sizeof(uint16_t));
}

size_t sh_layer_kv_bytes(const sh_layer *l, sh_kv_type t) {
    return (l->k_eq_v ? 1 : 2) * (size_t)l->kv_heads * sh_kv_vec_bytes(t, l->head_dim);
}

size_t sh_config_kv_bytes(const sh_config *c, sh_kv_type type, sh_kv_kind kind, int first, int last) {
    size_t bytes = 0;
    bool mirrored[SH_MAX_LAYERS] = {false};
    for (int i = first; i < last; i++) {
        const sh_layer *l = &c->layer[i];
        if (l->kind != kind) continue;
        bool mirror = l->kv_from < first && !mirrored[l->kv_from];
        if (mirror) mirrored[l->kv_from] = true;
        if (l->has_kv || mirror) bytes += sh_layer_kv_bytes(&c->layer[l->kv_from], type);
    }
    return bytes;
}

int sh_config_widest_window(const sh_config *c) {
    int w = 0;
    for (int i = 0; i < c->n_layers; i++)
        if (c->layer[i].kind == SH_KV_SLIDING && c->layer[i].window > w) w = c->layer[i].window;
    return w;
}

bool sh_config_kv_crosses(const sh_config *c, int layer, int cut) {
    if (layer >= cut || !c->layer[layer].has_kv) return false;
    int from = cut > c->first_shared ? cut : c->first_shared; /* layers before that read their own */
    for (int i = from; i < (c->kv_end ? c->kv_end : c->n_layers); i++)
        if (c->layer[i].kv_from == layer) return true;
    return false;
}

int sh_config_usual_context(const sh_config *c) {
    return c->max_context < SH_USUAL_CONTEXT ? c->max_context : SH_USUAL_CONTEXT;
}
