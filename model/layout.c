/* See layout.h. Reads no files. */
#include "model/layout.h"

#include <stdlib.h>
#include "common/mem.h"
#include "model/linear.h"

typedef struct cursor {
    char *base;
    size_t used;
    sh_wtype type; /* of matrices */
} cursor;

static void *take(cursor *at, size_t bytes) {
    void *p = at->base ? at->base + at->used : NULL;
    at->used += sh_mem_align(bytes);
    return p;
}

static const float *take_vector(cursor *at, int n) {
    return take(at, (size_t)n * sizeof(float));
}

static sh_wmat take_matrix(cursor *at, int n, int k) {
    return (sh_wmat){.n = n, .k = k, .type = at->type, .data = take(at, sh_wmat_bytes(at->type, n, k))};
}

/* A matrix that mixes what the parts of a stage computed: n outputs of k inputs, of which this part has k_mine. */
static sh_wmat take_mixing(sh_share s, cursor *at, int n, int k, int k_mine) {
    sh_range mine = sh_share_range(s, n, SH_SHARE_COLUMNS);
    return s.sum ? take_matrix(at, n, k_mine) : take_matrix(at, mine.hi - mine.lo, k);
}

/* What makes K/V. */
static void layout_kv(const sh_config *c, const sh_layer *mine, sh_layer_weights *w, cursor *at) {
    int kv = mine->kv_heads * mine->head_dim;
    w->k_norm = take_vector(at, mine->head_dim);
    w->k = take_matrix(at, kv, c->hidden);
    if (!mine->k_eq_v) w->v = take_matrix(at, kv, c->hidden);
}

static void layout_attention(const sh_config *c, sh_share s, const sh_layer *l, sh_layer_weights *w, cursor *at) {
    sh_layer mine = sh_share_layer(s, l);
    int q = mine.heads * l->head_dim;
    w->q_norm = take_vector(at, l->head_dim);
    w->q = take_matrix(at, q, c->hidden);
    if (l->has_kv)
        layout_kv(c, &mine, w, at);
    else if (l->k_eq_v)
        w->k_norm = take_vector(at, l->head_dim);
    w->o = take_mixing(s, at, c->hidden, l->heads * l->head_dim, q);
}

static void layout_experts(const sh_weights *own, int layer, sh_layer_weights *w, sh_wmat *expert, cursor *at) {
    const sh_config *c = own->config;
    const sh_held_experts *held = &own->held;
    w->post_ff_norm_1 = take_vector(at, c->hidden);
    w->post_ff_norm_2 = take_vector(at, c->hidden);
    w->pre_ff_norm_2 = take_vector(at, c->hidden);
    w->router_scale = take_vector(at, c->hidden);
    w->expert_scale = take_vector(at, c->experts);
    w->router =
        (sh_wmat){.n = c->experts, .k = c->hidden, .data = take(at, sh_wmat_bytes(SH_W_BF16, c->experts, c->hidden))};
    w->expert_gate_up = expert;
    w->expert_down = expert ? expert + c->experts : NULL;
    if (!expert && !held->holds) { /* nothing to place: all are as long as the first */
        size_t before = at->used;
        take_matrix(at, 2 * c->expert_ff, c->hidden);
        take_matrix(at, c->hidden, c->expert_ff);
        at->used += (size_t)(c->experts - 1) * (at->used - before);
        return;
    }
    for (int e = 0; e < c->experts; e++) {
        bool here = !held->holds || held->holds(held->ctx, layer, e);
        sh_wmat gate_up = here ? take_matrix(at, 2 * c->expert_ff, c->hidden) : (sh_wmat){0};
        sh_wmat down = here ? take_matrix(at, c->hidden, c->expert_ff) : (sh_wmat){0};
        if (!expert) continue;
        expert[e] = gate_up;
        expert[c->experts + e] = down;
    }
}

static void layout_layer(const sh_weights *own, int layer, sh_layer_weights *w, sh_wmat *expert, cursor *at) {
    const sh_config *c = own->config;
    const sh_layer *l = &c->layer[layer], mine = sh_share_layer(own->share, l);
    int ff = mine.ff;
    *w = (sh_layer_weights){.scalar = 1};
    w->input_norm = take_vector(at, c->hidden);
    if (sh_config_only_kv(c, layer)) {
        layout_kv(c, &mine, w, at);
        return;
    }
    w->post_attn_norm = take_vector(at, c->hidden);
    w->pre_ff_norm = take_vector(at, c->hidden);
    w->post_ff_norm = take_vector(at, c->hidden);
    layout_attention(c, own->share, l, w, at);
    w->gate = take_matrix(at, ff, c->hidden);
    w->up = take_matrix(at, ff, c->hidden);
    w->down = take_mixing(own->share, at, c->hidden, l->ff, ff);
    if (l->moe) layout_experts(own, layer, w, expert, at);
    if (c->ple == 0) return;
    w->ple_gate = take_matrix(at, c->ple, c->hidden);
    w->ple_proj = take_matrix(at, c->hidden, c->ple);
    w->ple_model_proj = take_matrix(at, c->ple, c->hidden);
    w->post_ple_norm = take_vector(at, c->hidden);
}

size_t sh_weights_layout(sh_weights *w, sh_wmat *expert, void *base) {
    const sh_config *c = w->config;
    cursor at = {.base = base, .type = w->type};
    for (int i = w->first; i < w->last; i++) {
        sh_layer_weights scratch;
        size_t skip = (size_t)(i - w->first) * 2 * (size_t)c->experts;
        layout_layer(w, i, w->layer ? &w->layer[i - w->first] : &scratch, expert ? expert + skip : NULL, &at);
    }
    if (c->ple) w->ple_norm = take_vector(&at, c->ple);
    if (sh_config_has_head(c, w->last)) {
        w->final_norm = take_vector(&at, c->hidden);
        sh_range ids = sh_share_range(w->share, c->vocab, SH_SHARE_VOCAB);
        w->head = take_matrix(&at, ids.hi - ids.lo, c->hidden);
    }
    return at.used;
}

size_t sh_weights_table_bytes(const sh_config *c, int first, int last) {
    size_t n = (size_t)(last - first);
    return n * sizeof(sh_layer_weights) + n * 2 * (size_t)c->experts * sizeof(sh_wmat);
}

size_t sh_expert_bytes(const sh_config *c, sh_mode mode) {
    sh_wtype t = sh_mode_wtype(mode);
    return sh_wmat_bytes(t, 2 * c->expert_ff, c->hidden) + sh_wmat_bytes(t, c->hidden, c->expert_ff);
}

double sh_mode_weight_bytes(sh_mode mode) {
    sh_wtype t = sh_mode_wtype(mode);
    return t == SH_W_BF16 ? 2 : (double)sh_wtype_block(t) / (SH_PANEL * sh_wtype_group(t));
}

size_t sh_expert_row_bytes(const sh_config *c, sh_mode mode) {
    sh_wtype type = sh_mode_wtype(mode);
    if (type != SH_W_BF16) return sh_qrows_bytes(type, c->hidden, 1);
    return sh_expert_result_bytes(c, mode);
}

size_t sh_expert_result_bytes(const sh_config *c, sh_mode mode) {
    return (size_t)c->hidden * (mode == SH_MODE_EXACT ? sizeof(float) : sizeof(uint16_t));
}

int sh_expert_part_rows(int max_rows, int members) {
    enum { TOGETHER = 1024, LEAST = 64 };
    int n = TOGETHER / members;
    n = n < LEAST ? LEAST : n > SH_PART_ROWS ? SH_PART_ROWS : n;
    return n < max_rows ? n : max_rows;
}

size_t sh_weights_estimate_share(const sh_config *c, sh_mode mode, sh_share s, int first, int last) {
    sh_weights w = {.config = c, .type = sh_mode_wtype(mode), .share = s, .first = first, .last = last};
    return sh_weights_layout(&w, NULL, NULL) + sh_weights_table_bytes(c, first, last);
}

size_t sh_weights_estimate(const sh_config *c, sh_mode mode, int first, int last) {
    return sh_weights_estimate_share(c, mode, (sh_share){0}, first, last);
}
