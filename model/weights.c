/*
 * From the tensors of a checkpoint to the packed weights of one stage. See weights.h. First every tensor of the whole
 * checkpoint is resolved and checked against config.json (headers only, the same on every rank), then the stage's own
 * are packed (weights_pack.c), one at a time, alone or together with other members (weights_shared.c). Knows names and
 * shapes; the memory layout is layout.c's.
 */
#include "model/weights.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "common/keep.h"
#include "common/mem.h"
#include "model/layout.h"
#include "model/values.h"
#include "model/weights_int.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are little-endian and read in place");
/* --- names ---------------------------------------------------------------------------------------------------------
 */

int sh_loader_index(const sh_tensors *t, const sh_tensor *x) {
    int lo = 0, hi = sh_tensors_count(t) - 1;
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2;
        if (strcmp(sh_tensors_at(t, mid)->name, x->name) < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* Looks up NAME.weight and NAME; marks what it finds as used. *out NULL when absent. */
static sh_status look_up(sh_loader *l, const char *name, const sh_tensor **out) {
    char full[600];
    snprintf(full, sizeof full, "%s.weight", name);
    const sh_tensor *a = sh_tensors_find(l->tensors, full), *b = sh_tensors_find(l->tensors, name);
    if (a && b) SH_FAIL(SH_EFORMAT, "%s/%s: %s: is there twice, as %s too", l->dir, b->file, name, full);
    *out = a ? a : b;
    if (*out) l->used[sh_loader_index(l->tensors, *out)] = true;
    return SH_OK;
}

static const char *name_of(sh_loader *l, int layer, const char *part) {
    if (layer < 0)
        snprintf(l->name, sizeof l->name, "%s%s", l->prefix, part);
    else
        snprintf(l->name, sizeof l->name, "%slayers.%d.%s", l->prefix, layer, part);
    return l->name;
}

static sh_status find_prefix(sh_loader *l) {
    static const char *const known[] = {"model.language_model.", "model.", "language_model.model.", "language_model.",
                                        ""};
    l->prefix = NULL;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        char name[64];
        snprintf(name, sizeof name, "%sembed_tokens", known[i]);
        const sh_tensor *t;
        SH_TRY(look_up(l, name, &t));
        if (!t) continue;
        if (l->prefix)
            SH_FAIL(SH_EFORMAT, "%s: two text models: %sembed_tokens and %sembed_tokens", l->dir, l->prefix, known[i]);
        l->prefix = known[i];
    }
    if (!l->prefix)
        SH_FAIL(SH_EFORMAT, "%s: missing tensor model.language_model.embed_tokens.weight (any known prefix)", l->dir);
    return SH_OK;
}

/* --- checks of one tensor ------------------------------------------------------------------------------------------
 */

static void print_shape(char *to, size_t size, int rank, const int64_t *shape) {
    size_t n = (size_t)snprintf(to, size, "[");
    for (int i = 0; i < rank && n < size; i++)
        n += (size_t)snprintf(to + n, size - n, "%s%lld", i ? ", " : "", (long long)shape[i]);
    if (n < size) snprintf(to + n, size - n, "]");
}

static sh_status check_tensor(const sh_loader *l, const sh_tensor *t, int rank, const int64_t *shape) {
    if (t->dtype == SH_OTHER)
        SH_FAIL(SH_EUNSUPPORTED, "%s/%s: %s: type %s: allowed are BF16, F32 and F16", l->dir, t->file, t->name,
                t->dtype_name);
    bool same = t->rank == rank;
    for (int i = 0; same && i < rank; i++) same = t->shape[i] == shape[i];
    if (rank == 1 && shape[0] == 1 && t->rank == 0) same = true; /* a scalar may be stored without a dimension */
    if (same) return SH_OK;
    char found[200], want[200];
    print_shape(found, sizeof found, t->rank, t->shape);
    print_shape(want, sizeof want, rank, shape);
    SH_FAIL(SH_EFORMAT, "%s/%s: %s: shape %s, but config.json implies %s", l->dir, t->file, t->name, found, want);
}

/* The tensor of a name, which must be there with this shape. */
static sh_status need(sh_loader *l, const char *name, int rank, const int64_t *shape, const sh_tensor **out) {
    const sh_tensor *t = NULL;
    SH_TRY(look_up(l, name, &t));
    if (!t) SH_FAIL(SH_EFORMAT, "%s: missing tensor %s", l->dir, name);
    SH_TRY(check_tensor(l, t, rank, shape));
    *out = t;
    return SH_OK;
}

static sh_status add_job(sh_loader *l, sh_load_job j) {
    if (l->n_jobs == l->cap) {
        int cap = l->cap ? 2 * l->cap : 256;
        sh_load_job *p = realloc(l->jobs, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "%s: no memory for the list of tensors", l->dir);
        l->jobs = p;
        l->cap = cap;
    }
    j.layer = l->layer;
    l->jobs[l->n_jobs++] = j;
    return SH_OK;
}

/* Vector [n] → to (NULL: only checked, the layer belongs to another stage, or this one needs only its K/V). */
static sh_status want_vector(sh_loader *l, int layer, const char *part, int n, const float *to) {
    const sh_tensor *t = NULL;
    SH_TRY(need(l, name_of(l, layer, part), 1, (const int64_t[]){n}, &t));
    if (!to) return SH_OK;
    return add_job(l, (sh_load_job){.t = {t}, .n = {1}, .k = n, .to = (float *)(uintptr_t)to});
}

/* Matrix [n, k] → to; rows [row, row + to->n) of it. */
static sh_status want_rows(sh_loader *l, int layer, const char *part, int64_t n, int k, int64_t row,
                           const sh_wmat *to) {
    const sh_tensor *t = NULL;
    SH_TRY(need(l, name_of(l, layer, part), 2, (const int64_t[]){n, k}, &t));
    if (!to || !to->data) return SH_OK;
    return add_job(l, (sh_load_job){.t = {t}, .row = {row}, .n = {to->n}, .k = k, .mat = to});
}

static sh_status want_matrix(sh_loader *l, int layer, const char *part, int n, int k, const sh_wmat *to) {
    return want_rows(l, layer, part, n, k, 0, to);
}

/* Matrix [n, k] of which this part computes outputs [mine.lo, mine.hi). */
static sh_status want_outputs(sh_loader *l, int layer, const char *part, int n, int k, sh_range mine,
                              const sh_wmat *to) {
    return want_rows(l, layer, part, n, k, mine.lo, to);
}

/* Matrix [n, k] that mixes what the parts computed: this part takes some outputs of all inputs, or (share.sum) all
 * outputs of its inputs [mine.lo, mine.hi). */
static sh_status want_mixing(sh_loader *l, int layer, const char *part, int n, int k, sh_range mine,
                             const sh_wmat *to) {
    const sh_tensor *t = NULL;
    sh_share s = l->w->share;
    if (!s.sum) return want_outputs(l, layer, part, n, k, sh_share_range(s, n, SH_SHARE_COLUMNS), to);
    SH_TRY(need(l, name_of(l, layer, part), 2, (const int64_t[]){n, k}, &t));
    if (!to) return SH_OK;
    return add_job(l, (sh_load_job){.t = {t}, .n = {n}, .k = to->k, .col = mine.lo, .width = k, .mat = to});
}

/* Keys or values [kv_heads·head_dim, k]: the heads that this part's queries read. */
static sh_status want_kv(sh_loader *l, int layer, const char *part, const sh_wmat *to) {
    const sh_layer *y = &l->c->layer[layer];
    const sh_tensor *t = NULL;
    sh_share s = l->w->share;
    int n = sh_share_layer(s, y).kv_heads, first = sh_share_kv_head(s, y, 0), last = sh_share_kv_head(s, y, n - 1);
    const int64_t shape[] = {(int64_t)y->kv_heads * y->head_dim, l->c->hidden};
    SH_TRY(need(l, name_of(l, layer, part), 2, shape, &t));
    if (!to) return SH_OK;
    sh_load_job j = {.t = {t}, .row = {(int64_t)first * y->head_dim}, .n = {to->n}, .k = to->k, .mat = to};
    if (last - first + 1 != n) j.heads = (sh_head_map){y, s}; /* some heads come more than once */
    return add_job(l, j);
}

/* --- what a layer has ----------------------------------------------------------------------------------------------
 */

#define AT(field)  (w ? w->field : NULL)  /* a vector's place, NULL in other stages' layers */
#define MAT(field) (w ? &w->field : NULL) /* a matrix's place */

static sh_status want_attention(sh_loader *l, int i, const sh_layer_weights *w) {
    const sh_layer *y = &l->c->layer[i];
    int h = l->c->hidden, q = y->heads * y->head_dim;
    sh_range mine = sh_share_range(l->w->share, q, y->head_dim);
    SH_TRY(want_vector(l, i, "self_attn.q_norm", y->head_dim, AT(q_norm)));
    SH_TRY(want_outputs(l, i, "self_attn.q_proj", q, h, mine, MAT(q)));
    SH_TRY(want_mixing(l, i, "self_attn.o_proj", h, q, mine, MAT(o)));
    /* A consumer of K = V pages forms K itself, with its producer's norm. */
    if (!y->has_kv) return y->k_eq_v ? want_vector(l, y->kv_from, "self_attn.k_norm", y->head_dim, AT(k_norm)) : SH_OK;
    SH_TRY(want_vector(l, i, "self_attn.k_norm", y->head_dim, AT(k_norm)));
    SH_TRY(want_kv(l, i, "self_attn.k_proj", MAT(k)));
    if (y->k_eq_v) return SH_OK;
    return want_kv(l, i, "self_attn.v_proj", MAT(v));
}

/* experts.gate_up_proj [E, 2I, H], or (GGUF) experts.gate_proj and up_proj [E, I, H]; experts.down_proj [E, H, I]. */
static sh_status want_fused(sh_loader *l, int i, const sh_layer_weights *w) {
    const sh_config *c = l->c;
    int64_t h = c->hidden, n = c->expert_ff, e = c->experts;
    const sh_tensor *gu = NULL, *up = NULL, *down = NULL;
    SH_TRY(look_up(l, name_of(l, i, "experts.gate_proj"), &gu));
    if (gu) {
        SH_TRY(check_tensor(l, gu, 3, (const int64_t[]){e, n, h}));
        SH_TRY(need(l, name_of(l, i, "experts.up_proj"), 3, (const int64_t[]){e, n, h}, &up));
    } else {
        SH_TRY(need(l, name_of(l, i, "experts.gate_up_proj"), 3, (const int64_t[]){e, 2 * n, h}, &gu));
    }
    int rows = up ? c->expert_ff : 2 * c->expert_ff;
    SH_TRY(need(l, name_of(l, i, "experts.down_proj"), 3, (const int64_t[]){e, h, n}, &down));
    for (int x = 0; w && x < c->experts; x++) {
        if (!w->expert_down[x].data) continue; /* another member's */
        int64_t row = (int64_t)rows * x;
        SH_TRY(add_job(l, (sh_load_job){.t = {gu, up},
                                        .row = {row, row},
                                        .n = {rows, up ? rows : 0},
                                        .k = c->hidden,
                                        .mat = &w->expert_gate_up[x]}));
        SH_TRY(add_job(
            l, (sh_load_job){
                   .t = {down}, .row = {h * x}, .n = {c->hidden}, .k = c->expert_ff, .mat = &w->expert_down[x]}));
    }
    return SH_OK;
}

/* experts.E.{gate_proj, up_proj} [I, H] (or gate_up_proj [2I, H]) and experts.E.down_proj [H, I]. */
static sh_status want_unfused(sh_loader *l, int i, int x, const sh_layer_weights *w) {
    const sh_config *c = l->c;
    char part[64];
    const sh_tensor *gate = NULL, *up = NULL;
    if (w && !w->expert_down[x].data) w = NULL; /* another member's: only checked */
    snprintf(part, sizeof part, "experts.%d.down_proj", x);
    SH_TRY(want_matrix(l, i, part, c->hidden, c->expert_ff, w ? &w->expert_down[x] : NULL));
    snprintf(part, sizeof part, "experts.%d.gate_up_proj", x);
    SH_TRY(look_up(l, name_of(l, i, part), &gate));
    if (gate) return want_matrix(l, i, part, 2 * c->expert_ff, c->hidden, w ? &w->expert_gate_up[x] : NULL);
    snprintf(part, sizeof part, "experts.%d.gate_proj", x);
    SH_TRY(need(l, name_of(l, i, part), 2, (const int64_t[]){c->expert_ff, c->hidden}, &gate));
    snprintf(part, sizeof part, "experts.%d.up_proj", x);
    SH_TRY(need(l, name_of(l, i, part), 2, (const int64_t[]){c->expert_ff, c->hidden}, &up));
    if (!w) return SH_OK;
    return add_job(
        l, (sh_load_job){
               .t = {gate, up}, .n = {c->expert_ff, c->expert_ff}, .k = c->hidden, .mat = &w->expert_gate_up[x]});
}

static sh_status want_experts(sh_loader *l, int i, const sh_layer_weights *w) {
    const sh_config *c = l->c;
    SH_TRY(want_vector(l, i, "post_feedforward_layernorm_1", c->hidden, AT(post_ff_norm_1)));
    SH_TRY(want_vector(l, i, "post_feedforward_layernorm_2", c->hidden, AT(post_ff_norm_2)));
    SH_TRY(want_vector(l, i, "pre_feedforward_layernorm_2", c->hidden, AT(pre_ff_norm_2)));
    SH_TRY(want_vector(l, i, "router.scale", c->hidden, AT(router_scale)));
    SH_TRY(want_vector(l, i, "router.per_expert_scale", c->experts, AT(expert_scale)));
    SH_TRY(want_matrix(l, i, "router.proj", c->experts, c->hidden, MAT(router)));
    const sh_tensor *fused = NULL, *single = NULL;
    SH_TRY(look_up(l, name_of(l, i, "experts.0.down_proj"), &single));
    SH_TRY(look_up(l, name_of(l, i, "experts.down_proj"), &fused));
    if (fused || !single) return want_fused(l, i, w);
    for (int x = 0; x < c->experts; x++) SH_TRY(want_unfused(l, i, x, w));
    return SH_OK;
}

static sh_status want_layer(sh_loader *l, int i) {
    const sh_config *c = l->c;
    bool mine = i >= l->w->first && i < l->w->last;
    const sh_layer_weights *w = mine ? &l->w->layer[i - l->w->first] : NULL;
    int h = c->hidden, ff = c->layer[i].ff;
    sh_range columns = sh_share_range(l->w->share, ff, SH_SHARE_COLUMNS);
    l->layer = i;
    SH_TRY(want_vector(l, i, "input_layernorm", h, AT(input_norm)));
    SH_TRY(want_vector(l, i, "post_attention_layernorm", h, AT(post_attn_norm)));
    SH_TRY(want_vector(l, i, "pre_feedforward_layernorm", h, AT(pre_ff_norm)));
    SH_TRY(want_vector(l, i, "post_feedforward_layernorm", h, AT(post_ff_norm)));
    SH_TRY(want_attention(l, i, w));
    SH_TRY(want_outputs(l, i, "mlp.gate_proj", ff, h, columns, MAT(gate)));
    SH_TRY(want_outputs(l, i, "mlp.up_proj", ff, h, columns, MAT(up)));
    SH_TRY(want_mixing(l, i, "mlp.down_proj", h, ff, columns, MAT(down)));
    if (c->layer[i].moe) SH_TRY(want_experts(l, i, sh_config_only_kv(c, i) ? NULL : w));
    const sh_tensor *scalar;
    SH_TRY(look_up(l, name_of(l, i, "layer_scalar"), &scalar));
    if (scalar) SH_TRY(want_vector(l, i, "layer_scalar", 1, w ? &w->scalar : NULL));
    if (c->ple == 0) return SH_OK;
    SH_TRY(want_matrix(l, i, "per_layer_input_gate", c->ple, h, MAT(ple_gate)));
    SH_TRY(want_matrix(l, i, "per_layer_projection", h, c->ple, MAT(ple_proj)));
    SH_TRY(want_vector(l, i, "post_per_layer_input_norm", h, AT(post_ple_norm)));
    return want_rows(l, -1, "per_layer_model_projection", (int64_t)c->n_layers * c->ple, h, (int64_t)i * c->ple,
                     MAT(ple_model_proj));
}

/* --- the head and the tables ---------------------------------------------------------------------------------------
 */

static sh_status find_head(sh_loader *l, const sh_tensor **out) {
    static const char *const known[] = {"lm_head", "language_model.lm_head", "model.lm_head",
                                        "model.language_model.lm_head"};
    const sh_tensor *head = NULL;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        const sh_tensor *t;
        SH_TRY(look_up(l, known[i], &t));
        if (t && head) SH_FAIL(SH_EFORMAT, "%s: two heads: %s and %s", l->dir, head->name, t->name);
        if (t) head = t;
    }
    *out = head;
    return SH_OK;
}

static sh_status want_head(sh_loader *l, const sh_tensor *embed) {
    const sh_config *c = l->c;
    bool mine = sh_config_has_head(c, l->w->last);
    const int64_t shape[] = {c->vocab, c->hidden};
    const sh_tensor *head = NULL;
    SH_TRY(find_head(l, &head));
    if (!head && !c->tied)
        SH_FAIL(SH_EFORMAT, "%s: missing tensor lm_head.weight: tie_word_embeddings is false", l->dir);
    if (head) SH_TRY(check_tensor(l, head, 2, shape));
    /* Some writers store the tied head a second time: harmless only when it says the same. */
    if (head && c->tied && mine &&
        (head->bytes != embed->bytes || memcmp(head->data, embed->data, (size_t)head->bytes) != 0))
        SH_FAIL(SH_EFORMAT, "%s/%s: %s: differs from %s, although tie_word_embeddings is true", l->dir, head->file,
                head->name, embed->name);
    if (!mine) return SH_OK;
    SH_TRY(want_vector(l, -1, "norm", c->hidden, l->w->final_norm));
    sh_range ids = sh_share_range(l->w->share, c->vocab, SH_SHARE_VOCAB);
    const sh_wmat *to = &l->w->head;
    return add_job(
        l, (sh_load_job){
               .t = {c->tied ? embed : head}, .row = {ids.lo}, .n = {ids.hi - ids.lo}, .k = c->hidden, .mat = to});
}

static sh_status want_tables(sh_loader *l, const sh_tensor **embed) {
    const sh_config *c = l->c;
    sh_weights_impl *m = l->w->impl;
    const int64_t shape[] = {c->ple_vocab, (int64_t)c->n_layers * c->ple};
    SH_TRY(need(l, name_of(l, -1, "embed_tokens"), 2, (const int64_t[]){c->vocab, c->hidden}, embed));
    if (l->w->first == 0) m->embed = *embed;
    return c->ple ? need(l, name_of(l, -1, "embed_tokens_per_layer"), 2, shape, &m->ple_table) : SH_OK;
}

static sh_status want_ends(sh_loader *l) {
    const sh_config *c = l->c;
    const sh_tensor *embed = NULL, *t = NULL;
    l->layer = -1;
    SH_TRY(want_tables(l, &embed));
    if (c->ple) SH_TRY(want_vector(l, -1, "per_layer_projection_norm", c->ple, l->w->ple_norm));
    SH_TRY(need(l, name_of(l, -1, "norm"), 1, (const int64_t[]){c->hidden}, &t));
    return want_head(l, embed);
}

/* --- what may be there and is not read -----------------------------------------------------------------------------
 */

static bool starts(const char *s, const char *with) {
    return strncmp(s, with, strlen(with)) == 0;
}

bool sh_weights_is_tower(const char *name) {
    static const char *const tower[] = {"vision_tower.",   "audio_tower.",          "embed_vision.",
                                        "embed_audio.",    "vision_model.",         "vision_embedder.",
                                        "audio_embedder.", "multi_modal_projector."};
    if (starts(name, "model.")) name += 6;
    for (size_t i = 0; i < sizeof tower / sizeof tower[0]; i++)
        if (starts(name, tower[i])) return true;
    return false;
}

/* K/V of layers that read another layer's (released files have them), and the value norm, which has no weight. */
static bool is_unused(const sh_loader *l, const char *name) {
    if (sh_weights_is_tower(name)) return true;
    if (!starts(name, l->prefix) || !starts(name + strlen(l->prefix), "layers.")) return false;
    char *end;
    long i = strtol(name + strlen(l->prefix) + 7, &end, 10);
    if (i < 0 || i >= l->c->n_layers || !starts(end, ".self_attn.")) return false;
    end += 11;
    if (starts(end, "v_norm")) return true;
    return !l->c->layer[i].has_kv && (starts(end, "k_proj") || starts(end, "v_proj") || starts(end, "k_norm"));
}

static sh_status refuse_unexpected(const sh_loader *l) {
    for (int i = 0; i < sh_tensors_count(l->tensors); i++) {
        const sh_tensor *t = sh_tensors_at(l->tensors, i);
        if (!l->used[i] && !is_unused(l, t->name))
            SH_FAIL(SH_EFORMAT, "%s/%s: %s: unexpected tensor: config.json implies none of this name", l->dir, t->file,
                    t->name);
    }
    return SH_OK;
}

sh_status sh_loader_resolve(sh_loader *l) {
    SH_TRY(find_prefix(l));
    SH_TRY(want_ends(l));
    for (int i = 0; i < l->c->n_layers; i++) SH_TRY(want_layer(l, i));
    return refuse_unexpected(l);
}

/* --- the object ----------------------------------------------------------------------------------------------------
 */

sh_status sh_loader_allocate(sh_weights *w) {
    const sh_config *c = w->config;
    size_t n = (size_t)(w->last - w->first);
    sh_weights_impl *m = calloc(1, sizeof *m);
    w->impl = m;
    w->layer = calloc(n ? n : 1, sizeof *w->layer);
    if (m && c->experts) m->expert = calloc(n * 2 * (size_t)c->experts, sizeof *m->expert);
    if (!m || !w->layer || (c->experts && !m->expert)) SH_FAIL(SH_EMEMORY, "weights: no memory for their tables");
    return SH_OK;
}

static sh_status allocate_block(sh_weights *w) {
    const sh_config *c = w->config;
    sh_weights_impl *m = w->impl;
    size_t bytes = sh_weights_layout(w, m->expert, NULL);
    SH_TRY(sh_mem_alloc(bytes, "weights", &m->block));
    m->block_bytes = bytes;
    sh_weights_layout(w, m->expert, m->block);
    w->bytes = bytes + sh_weights_table_bytes(c, w->first, w->last);
    return SH_OK;
}

static void keep_tables(sh_weights_impl *m) {
    const sh_tensor *const table[] = {m->embed, m->ple_table};
    for (int i = 0; i < 2; i++) {
        if (!table[i]) continue;
        sh_tensors_need(m->tensors, table[i]);
        sh_load_advise(table[i]->data, (size_t)table[i]->bytes, MADV_RANDOM); /* rows here and there: no read-ahead */
    }
    sh_tensors_trim(m->tensors);
}

/* Of a packed folder, which has no other tensors than the tables and towers. */
static sh_status resolve_tables(sh_loader *l) {
    const sh_tensor *embed = NULL;
    SH_TRY(find_prefix(l));
    SH_TRY(want_tables(l, &embed));
    return refuse_unexpected(l);
}

sh_status sh_loader_open(sh_loader *l) {
    l->used = calloc((size_t)sh_tensors_count(l->tensors) + 1, sizeof *l->used);
    if (!l->used) SH_FAIL(SH_EMEMORY, "%s: no memory for the list of tensors", l->dir);
    return SH_OK;
}

static sh_status check_set(const char *dir, const sh_config *c, sh_tensors *t, sh_status (*resolve)(sh_loader *l)) {
    sh_weights_impl m = {0};
    sh_weights w = {.config = c, .impl = &m}; /* layers [0, 0): nothing is this stage's own */
    sh_loader l = {.dir = dir, .c = c, .w = &w, .tensors = t};
    sh_status st = sh_loader_open(&l);
    if (st == SH_OK) st = resolve(&l);
    free(l.used);
    free(l.jobs);
    return st;
}

sh_status sh_weights_check(const char *model_dir, const sh_config *c, sh_tensors *t) {
    return check_set(model_dir, c, t, sh_loader_resolve);
}

sh_status sh_weights_check_tables(const char *model_dir, const sh_config *c, sh_tensors *t) {
    return check_set(model_dir, c, t, resolve_tables);
}

static sh_status load_packed(sh_loader *l, sh_team *team) {
    sh_weights_impl *m = l->w->impl;
    SH_TRY(sh_packed_open(l->dir, l->c, &m->packed));
    SH_TRY(sh_packed_load(m->packed, l->w, m->expert, team, l->loading));
    SH_TRY(sh_packed_tables(m->packed, &m->tensors));
    l->tensors = m->tensors;
    SH_TRY(sh_loader_open(l));
    SH_TRY(resolve_tables(l));
    keep_tables(m);
    return SH_OK;
}

/* All that can be wrong with the names and shapes of the checkpoint. */
static sh_status prepare(sh_loader *l) {
    SH_TRY(sh_kernels_select(&l->kn));
    SH_TRY(sh_loader_allocate(l->w));
    SH_TRY(allocate_block(l->w));
    sh_weights_impl *m = l->w->impl;
    SH_TRY(sh_tensors_open(l->dir, &m->tensors));
    l->tensors = m->tensors;
    SH_TRY(sh_loader_open(l));
    return sh_loader_resolve(l);
}

static sh_status pack_all(sh_loader *l, sh_team *team) {
    for (int i = 0; i < l->n_jobs; i++) {
        const sh_load_job *j = &l->jobs[i];
        l->loading->total += sh_load_bytes(j, 0, j->to ? 1 : j->mat->n);
    }
    for (int i = 0; i < l->n_jobs; i++) SH_TRY(sh_load_run(l, &l->jobs[i], team));
    return SH_OK;
}

static sh_status load(sh_loader *l, sh_team *team) {
    if (sh_packed_is(l->dir)) { /* mapped: nothing is gained by sending it */
        l->peers = NULL;
        SH_TRY(sh_kernels_select(&l->kn));
        SH_TRY(sh_loader_allocate(l->w));
        return load_packed(l, team);
    }
    sh_status st = prepare(l);
    if (l->peers)
        st = sh_load_together(l, st, team);
    else if (st == SH_OK)
        st = pack_all(l, team);
    if (st == SH_OK) keep_tables(l->w->impl);
    return st;
}

sh_status sh_weights_load(const char *model_dir, const sh_config *c, const sh_weights_options *o, sh_team *team,
                          sh_weights **out) {
    if (o->first < 0 || o->first >= o->last || o->last > c->n_layers)
        SH_FAIL(SH_EINPUT, "layers %d to %d: the model has %d layers", o->first, o->last, c->n_layers);
    sh_weights *w = calloc(1, sizeof *w);
    if (!w) SH_FAIL(SH_EMEMORY, "weights: no memory");
    *w = (sh_weights){.config = c,
                      .type = sh_mode_wtype(o->mode),
                      .share = o->share,
                      .held = o->held,
                      .first = o->first,
                      .last = o->last};
    sh_loading loading;
    sh_loading_begin(&loading, team ? sh_team_size(team) : 1, o->tell, o->tell_arg);
    sh_loader l = {
        .dir = model_dir, .c = c, .w = w, .rounds = o->mode != SH_MODE_EXACT, .loading = &loading, .peers = o->peers};
    sh_status st = load(&l, team);
    if (st == SH_OK) w->load = sh_loading_end(&loading);
    free(l.used);
    free(l.jobs);
    if (st != SH_OK && l.lent) { /* messages begin and end in the block, and in the scalars of the layers */
        sh_keep(w);
        return st;
    }
    if (st != SH_OK) {
        sh_weights_destroy(&w);
        return st;
    }
    *out = w;
    return SH_OK;
}

void sh_weights_destroy(sh_weights **wp) {
    sh_weights *w = *wp;
    if (!w) return;
    sh_weights_impl *m = w->impl;
    if (m) {
        sh_tensors_close(&m->tensors);
        sh_packed_close(&m->packed);
        sh_mem_free(m->block, m->block_bytes);
        free(m->expert);
        free(m);
    }
    free(w->layer);
    free(w);
    *wp = NULL;
}

static void table_row(const sh_tensor *t, int64_t from, int n, float scale, float *out) {
    sh_values_floats(t, from, n, out);
    for (int i = 0; i < n; i++) out[i] *= scale;
}

void sh_weights_embed(const sh_weights *w, int id, float *out) {
    const sh_weights_impl *m = w->impl;
    table_row(m->embed, (int64_t)id * w->config->hidden, w->config->hidden, (float)sqrt(w->config->hidden), out);
}

void sh_weights_ple_row(const sh_weights *w, int layer, int id, float *out) {
    const sh_weights_impl *m = w->impl;
    const sh_config *c = w->config;
    int64_t row = (int64_t)id * c->n_layers * c->ple;
    table_row(m->ple_table, row + (int64_t)layer * c->ple, c->ple, (float)sqrt(c->ple), out);
}
