/*
 * From the tensors of a checkpoint to the packed weights of one stage. See weights.h. First every tensor of the whole
 * checkpoint is resolved and checked against config.json (headers only, the same on every rank), then the stage's own
 * are packed, one at a time. Knows names and shapes; the memory layout is layout.c's.
 */
#include "model/weights.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "common/mem.h"
#include "model/blocks.h"
#include "model/kernels/quant.h"
#include "model/layout.h"
#include "model/packed.h"
#include "model/packed_int.h"
#include "model/safetensors.h"
#include "model/values.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are little-endian and read in place");

typedef struct impl {
    sh_tensors *tensors;
    sh_packed *packed;                  /* NULL: weights are in the block */
    const sh_tensor *embed, *ple_table; /* kept mapped for look-ups */
    void *block;
    size_t block_bytes;
    sh_wmat *expert;
} impl;

/* Rows that are taken head by head, where a part's KV heads are not one run (sh_share_kv_head). */
typedef struct head_map {
    const sh_layer *layer; /* NULL: rows follow each other */
    sh_share share;
} head_map;

/* One thing to fill: a vector (to) or a packed matrix (mat) from the rows of up to two tensors. */
typedef struct job {
    const sh_tensor *t[2];
    int64_t row[2]; /* first row taken of each */
    int n[2], k;
    int col, width; /* first item taken of each row; items of a row (0: k) */
    head_map heads;
    float *to;
    const sh_wmat *mat;
} job;

typedef struct loader {
    const char *dir, *prefix;
    const sh_config *c;
    sh_weights *w;
    const sh_kernels *kn;
    sh_tensors *tensors;
    bool rounds;         /* blocks of GGUF to bf16; else what bf16 cannot hold is refused */
    bool *used;          /* per tensor of the set */
    sh_loading *loading; /* NULL: nothing is counted */
    job *jobs;
    int n_jobs, cap;
    char name[512]; /* of the last look-up */
} loader;

/* --- names ---------------------------------------------------------------------------------------------------------
 */

static int tensor_index(const sh_tensors *t, const sh_tensor *x) {
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
static sh_status look_up(loader *l, const char *name, const sh_tensor **out) {
    char full[600];
    snprintf(full, sizeof full, "%s.weight", name);
    const sh_tensor *a = sh_tensors_find(l->tensors, full), *b = sh_tensors_find(l->tensors, name);
    if (a && b) SH_FAIL(SH_EFORMAT, "%s/%s: %s: is there twice, as %s too", l->dir, b->file, name, full);
    *out = a ? a : b;
    if (*out) l->used[tensor_index(l->tensors, *out)] = true;
    return SH_OK;
}

static const char *name_of(loader *l, int layer, const char *part) {
    if (layer < 0)
        snprintf(l->name, sizeof l->name, "%s%s", l->prefix, part);
    else
        snprintf(l->name, sizeof l->name, "%slayers.%d.%s", l->prefix, layer, part);
    return l->name;
}

static sh_status find_prefix(loader *l) {
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

static sh_status check_tensor(const loader *l, const sh_tensor *t, int rank, const int64_t *shape) {
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
static sh_status need(loader *l, const char *name, int rank, const int64_t *shape, const sh_tensor **out) {
    const sh_tensor *t = NULL;
    SH_TRY(look_up(l, name, &t));
    if (!t) SH_FAIL(SH_EFORMAT, "%s: missing tensor %s", l->dir, name);
    SH_TRY(check_tensor(l, t, rank, shape));
    *out = t;
    return SH_OK;
}

static sh_status add_job(loader *l, job j) {
    if (l->n_jobs == l->cap) {
        int cap = l->cap ? 2 * l->cap : 256;
        job *p = realloc(l->jobs, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "%s: no memory for the list of tensors", l->dir);
        l->jobs = p;
        l->cap = cap;
    }
    l->jobs[l->n_jobs++] = j;
    return SH_OK;
}

/* Vector [n] → to (NULL: only checked, the layer belongs to another stage, or this one needs only its K/V). */
static sh_status want_vector(loader *l, int layer, const char *part, int n, const float *to) {
    const sh_tensor *t = NULL;
    SH_TRY(need(l, name_of(l, layer, part), 1, (const int64_t[]){n}, &t));
    if (!to) return SH_OK;
    return add_job(l, (job){.t = {t}, .n = {1}, .k = n, .to = (float *)(uintptr_t)to});
}

/* Matrix [n, k] → to; rows [row, row + to->n) of it. */
static sh_status want_rows(loader *l, int layer, const char *part, int64_t n, int k, int64_t row, const sh_wmat *to) {
    const sh_tensor *t = NULL;
    SH_TRY(need(l, name_of(l, layer, part), 2, (const int64_t[]){n, k}, &t));
    if (!to || !to->data) return SH_OK;
    return add_job(l, (job){.t = {t}, .row = {row}, .n = {to->n}, .k = k, .mat = to});
}

static sh_status want_matrix(loader *l, int layer, const char *part, int n, int k, const sh_wmat *to) {
    return want_rows(l, layer, part, n, k, 0, to);
}

/* Matrix [n, k] of which this part computes outputs [mine.lo, mine.hi). */
static sh_status want_outputs(loader *l, int layer, const char *part, int n, int k, sh_range mine, const sh_wmat *to) {
    return want_rows(l, layer, part, n, k, mine.lo, to);
}

/* Matrix [n, k] that mixes what the parts computed: this part takes some outputs of all inputs, or (share.sum) all
 * outputs of its inputs [mine.lo, mine.hi). */
static sh_status want_mixing(loader *l, int layer, const char *part, int n, int k, sh_range mine, const sh_wmat *to) {
    const sh_tensor *t = NULL;
    sh_share s = l->w->share;
    if (!s.sum) return want_outputs(l, layer, part, n, k, sh_share_range(s, n, SH_SHARE_COLUMNS), to);
    SH_TRY(need(l, name_of(l, layer, part), 2, (const int64_t[]){n, k}, &t));
    if (!to) return SH_OK;
    return add_job(l, (job){.t = {t}, .n = {n}, .k = to->k, .col = mine.lo, .width = k, .mat = to});
}

/* Keys or values [kv_heads·head_dim, k]: the heads that this part's queries read. */
static sh_status want_kv(loader *l, int layer, const char *part, const sh_wmat *to) {
    const sh_layer *y = &l->c->layer[layer];
    const sh_tensor *t = NULL;
    sh_share s = l->w->share;
    int n = sh_share_layer(s, y).kv_heads, first = sh_share_kv_head(s, y, 0), last = sh_share_kv_head(s, y, n - 1);
    const int64_t shape[] = {(int64_t)y->kv_heads * y->head_dim, l->c->hidden};
    SH_TRY(need(l, name_of(l, layer, part), 2, shape, &t));
    if (!to) return SH_OK;
    job j = {.t = {t}, .row = {(int64_t)first * y->head_dim}, .n = {to->n}, .k = to->k, .mat = to};
    if (last - first + 1 != n) j.heads = (head_map){y, s}; /* some heads come more than once */
    return add_job(l, j);
}

/* --- what a layer has ----------------------------------------------------------------------------------------------
 */

#define AT(field)  (w ? w->field : NULL)  /* a vector's place, NULL in other stages' layers */
#define MAT(field) (w ? &w->field : NULL) /* a matrix's place */

static sh_status want_attention(loader *l, int i, const sh_layer_weights *w) {
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
static sh_status want_fused(loader *l, int i, const sh_layer_weights *w) {
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
        SH_TRY(add_job(l, (job){.t = {gu, up},
                                .row = {row, row},
                                .n = {rows, up ? rows : 0},
                                .k = c->hidden,
                                .mat = &w->expert_gate_up[x]}));
        SH_TRY(add_job(
            l, (job){.t = {down}, .row = {h * x}, .n = {c->hidden}, .k = c->expert_ff, .mat = &w->expert_down[x]}));
    }
    return SH_OK;
}

/* experts.E.{gate_proj, up_proj} [I, H] (or gate_up_proj [2I, H]) and experts.E.down_proj [H, I]. */
static sh_status want_unfused(loader *l, int i, int x, const sh_layer_weights *w) {
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
        l, (job){.t = {gate, up}, .n = {c->expert_ff, c->expert_ff}, .k = c->hidden, .mat = &w->expert_gate_up[x]});
}

static sh_status want_experts(loader *l, int i, const sh_layer_weights *w) {
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

static sh_status want_layer(loader *l, int i) {
    const sh_config *c = l->c;
    bool mine = i >= l->w->first && i < l->w->last;
    const sh_layer_weights *w = mine ? &l->w->layer[i - l->w->first] : NULL;
    int h = c->hidden, ff = c->layer[i].ff;
    sh_range columns = sh_share_range(l->w->share, ff, SH_SHARE_COLUMNS);
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

static sh_status find_head(loader *l, const sh_tensor **out) {
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

static sh_status want_head(loader *l, const sh_tensor *embed) {
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
        l, (job){.t = {c->tied ? embed : head}, .row = {ids.lo}, .n = {ids.hi - ids.lo}, .k = c->hidden, .mat = to});
}

static sh_status want_tables(loader *l, const sh_tensor **embed) {
    const sh_config *c = l->c;
    impl *m = l->w->impl;
    const int64_t shape[] = {c->ple_vocab, (int64_t)c->n_layers * c->ple};
    SH_TRY(need(l, name_of(l, -1, "embed_tokens"), 2, (const int64_t[]){c->vocab, c->hidden}, embed));
    if (l->w->first == 0) m->embed = *embed;
    return c->ple ? need(l, name_of(l, -1, "embed_tokens_per_layer"), 2, shape, &m->ple_table) : SH_OK;
}

static sh_status want_ends(loader *l) {
    const sh_config *c = l->c;
    const sh_tensor *embed = NULL, *t = NULL;
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
static bool is_unused(const loader *l, const char *name) {
    if (sh_weights_is_tower(name)) return true;
    if (!starts(name, l->prefix) || !starts(name + strlen(l->prefix), "layers.")) return false;
    char *end;
    long i = strtol(name + strlen(l->prefix) + 7, &end, 10);
    if (i < 0 || i >= l->c->n_layers || !starts(end, ".self_attn.")) return false;
    end += 11;
    if (starts(end, "v_norm")) return true;
    return !l->c->layer[i].has_kv && (starts(end, "k_proj") || starts(end, "v_proj") || starts(end, "k_norm"));
}

static sh_status refuse_unexpected(const loader *l) {
    for (int i = 0; i < sh_tensors_count(l->tensors); i++) {
        const sh_tensor *t = sh_tensors_at(l->tensors, i);
        if (!l->used[i] && !is_unused(l, t->name))
            SH_FAIL(SH_EFORMAT, "%s/%s: %s: unexpected tensor: config.json implies none of this name", l->dir, t->file,
                    t->name);
    }
    return SH_OK;
}

static sh_status resolve_all(loader *l) {
    SH_TRY(find_prefix(l));
    SH_TRY(want_ends(l));
    for (int i = 0; i < l->c->n_layers; i++) SH_TRY(want_layer(l, i));
    return refuse_unexpected(l);
}

#define READ_PIECE ((size_t)4 << 20) /* of the files, that a thread brings and packs at a time */

/* --- packing -------------------------------------------------------------------------------------------------------
 */

typedef struct packing {
    const sh_kernels *kn;
    const job *j;
    uint8_t *to; /* of panels [first, last) of the matrix */
    int first, last;
    bool rounds;
    sh_loading *loading; /* NULL: pages come as they are touched */
    _Atomic bool unread;
    char why[512];
    _Atomic int64_t inexact; /* lowest item of the matrix that bf16 cannot hold; INT64_MAX: none */
    _Atomic bool no_memory;
} packing;

static int64_t row_items(const job *j) {
    return j->width ? j->width : j->k;
}

/* Where row `row` of the matrix comes from. */
static const sh_tensor *job_row(const job *j, int row, int64_t *item) {
    int part = row >= j->n[0];
    int64_t from = j->row[part] + row - (part ? j->n[0] : 0);
    if (j->heads.layer) {
        int hd = j->heads.layer->head_dim;
        from = (int64_t)sh_share_kv_head(j->heads.share, j->heads.layer, row / hd) * hd + row % hd;
    }
    *item = from * row_items(j) + j->col;
    return j->t[part];
}

static bool packs_in_place(const job *j) {
    return !j->t[1] && !j->heads.layer && j->t[0]->dtype == SH_BF16 && (uintptr_t)j->t[0]->data % 2 == 0;
}

static void note_inexact(packing *p, int64_t item) {
    int64_t seen = atomic_load(&p->inexact);
    while (item < seen && !atomic_compare_exchange_weak(&p->inexact, &seen, item)) {
    }
}

/* Panels [p0, p1) of n rows of src, whose first panel is at `to`. */
static void pack_panels(const sh_kernels *kn, const sh_wmat *m, uint8_t *to, const uint16_t *src, size_t ld, int n,
                        int p0, int p1) {
    if (m->type == SH_W_BF16)
        sh_pack_bf16((uint32_t *)(void *)to, src, ld, n, m->k, p0, p1);
    else
        sh_quant_pack(kn, m->type, to, src, ld, n, m->k, p0, p1);
}

/* k items of a tensor of blocks as bf16, rounded. */
static void round_blocks(const packing *p, const sh_tensor *t, int64_t item, int k, uint16_t *to) {
    float w[SH_GGUF_BLOCK];
    for (int i = 0; i < k; i += SH_GGUF_BLOCK) {
        int n = k - i < SH_GGUF_BLOCK ? k - i : SH_GGUF_BLOCK;
        sh_blocks_floats(t, item + i, n, w);
        p->kn->to_bf16(to + i, w, n);
    }
}

/* Whether a job's blocks go into q8 or q4 without a way through bf16. */
static bool packs_blocks(const job *j) {
    return j->mat->type != SH_W_BF16 && sh_dtype_is_blocks(j->t[0]->dtype) &&
           (!j->t[1] || sh_dtype_is_blocks(j->t[1]->dtype));
}

static void pack_panel(packing *p, int panel, uint16_t *rows) {
    const job *j = p->j;
    const sh_wmat *m = j->mat;
    uint8_t *to = p->to + (size_t)(panel - p->first) * sh_wmat_bytes(m->type, SH_PANEL, m->k);
    int r0 = panel * SH_PANEL, n = m->n - r0 < SH_PANEL ? m->n - r0 : SH_PANEL;
    for (int r = 0; packs_blocks(j) && r < SH_PANEL; r++) {
        int64_t item = 0;
        const sh_tensor *t = r < n ? job_row(j, r0 + r, &item) : NULL;
        sh_blocks_pack_row(p->kn, t, item, m, to, r);
    }
    if (packs_blocks(j)) return;
    for (int r = 0; r < n; r++) {
        int64_t item;
        const sh_tensor *t = job_row(j, r0 + r, &item);
        if (sh_dtype_is_blocks(t->dtype) && p->rounds) {
            round_blocks(p, t, item, m->k, rows + (size_t)r * (size_t)m->k);
            continue;
        }
        int ok = sh_values_bf16(t, item, m->k, rows + (size_t)r * (size_t)m->k);
        if (ok < m->k) {
            note_inexact(p, (int64_t)(r0 + r) * m->k + ok);
            return;
        }
    }
    pack_panels(p->kn, m, to, rows, (size_t)m->k, n, 0, 1);
}

static sh_status bring_run(const sh_tensor *t, const uint8_t *from, const uint8_t *end) {
    char what[600];
    snprintf(what, sizeof what, "%s: %s", t->file, t->name);
    return from == end ? SH_OK : sh_packed_bring(what, from, (size_t)(end - from), t->data);
}

/* Rows [r0, r1) of the matrix come into memory, run by run. */
static sh_status bring_rows(const job *j, int r0, int r1) {
    const sh_tensor *t = NULL;
    const uint8_t *from = NULL, *end = NULL;
    for (int r = r0; r < r1; r++) {
        int64_t item;
        const sh_tensor *of = job_row(j, r, &item);
        const uint8_t *a = of->data + sh_dtype_bytes(of->dtype, (uint64_t)item);
        int64_t block = sh_dtype_block(of->dtype), past = (item + j->k + block - 1) / block * block;
        const uint8_t *b = of->data + sh_dtype_bytes(of->dtype, (uint64_t)past);
        if (t && a != end) SH_TRY(bring_run(t, from, end));
        if (!t || a != end) from = a;
        t = of;
        end = b;
    }
    return t ? bring_run(t, from, end) : SH_OK;
}

/* The source of panels [p0, p1): waiting for storage is not work, and a file that ends early is an error, no signal. */
static bool bring(packing *p, int p0, int p1, int member, int size) {
    const job *j = p->j;
    sh_loading *l = p->loading;
    if (!l) return true;
    int r0 = p0 * SH_PANEL, r1 = p1 * SH_PANEL < j->mat->n ? p1 * SH_PANEL : j->mat->n;
    double since = sh_now();
    sh_status st = bring_rows(j, r0, r1);
    double now = sh_now();
    l->reading += sh_loading_share(l, since, now, size);
    l->bytes += (uint64_t)(r1 - r0) * sh_dtype_bytes(j->t[0]->dtype, (uint64_t)j->k);
    if (member == 0) sh_loading_tell(l, now);
    if (st != SH_OK && !atomic_exchange(&p->unread, true)) snprintf(p->why, sizeof p->why, "%s", sh_error_text());
    return st == SH_OK;
}

/* Panels [lo, hi), counted from the first. */
static void pack_piece(packing *p, int lo, int hi, uint16_t *rows) {
    const sh_wmat *m = p->j->mat;
    if (packs_in_place(p->j)) {
        size_t ld = (size_t)row_items(p->j);
        int skip = p->first * SH_PANEL;
        const uint16_t *src = (const uint16_t *)(const void *)p->j->t[0]->data;
        src += ((size_t)p->j->row[0] + (size_t)skip) * ld + (size_t)p->j->col;
        pack_panels(p->kn, m, p->to, src, ld, m->n - skip, lo, hi);
        return;
    }
    for (int i = lo; i < hi; i++) pack_panel(p, p->first + i, rows);
}

static void pack_member(void *arg, int member, int size) {
    packing *p = arg;
    int lo, hi, k = p->j->mat->k;
    sh_team_share(p->last - p->first, member, size, &lo, &hi);
    if (lo == hi) return;
    bool in_place = packs_in_place(p->j);
    uint16_t *rows = in_place ? NULL : malloc(SH_PANEL * (size_t)k * sizeof *rows);
    if (!rows && !in_place) {
        atomic_store(&p->no_memory, true);
        return;
    }
    int step = (int)(READ_PIECE / (SH_PANEL * sh_dtype_bytes(p->j->t[0]->dtype, (uint64_t)k) + 1)) + 1;
    for (int at = lo; at < hi; at += step) {
        int end = hi - at < step ? hi : at + step;
        if (!bring(p, p->first + at, p->first + end, member, size)) break;
        double since = sh_now();
        pack_piece(p, at, end, rows);
        if (p->loading) p->loading->packing += sh_loading_share(p->loading, since, sh_now(), size);
    }
    free(rows);
}

/* Panels [first, last) of a matrix → to. */
static sh_status pack_job(const loader *l, const job *j, sh_team *team, int first, int last, uint8_t *to) {
    packing p = {.kn = l->kn,
                 .j = j,
                 .to = to,
                 .first = first,
                 .last = last,
                 .rounds = l->rounds,
                 .inexact = INT64_MAX,
                 .loading = l->loading};
    if (team)
        sh_team_run(team, pack_member, &p);
    else
        pack_member(&p, 0, 1);
    if (p.unread) SH_FAIL(SH_EIO, "%s/%s", l->dir, p.why);
    if (p.no_memory) SH_FAIL(SH_EMEMORY, "%s: no memory for packing", j->t[0]->name);
    if (p.inexact == INT64_MAX) return SH_OK;
    int64_t item;
    float f;
    const sh_tensor *t = job_row(j, (int)(p.inexact / j->k), &item);
    item += p.inexact % j->k;
    sh_values_floats(t, item, 1, &f);
    if (sh_dtype_is_blocks(t->dtype))
        SH_FAIL(
            SH_EUNSUPPORTED,
            "%s/%s: %s: the %s value %.9g of item %lld is not exact in BF16, and mode exact rounds nothing: allowed "
            "are bf16 (which rounds it), q8 and q4",
            l->dir, t->file, t->name, t->dtype_name, (double)f, (long long)item);
    SH_FAIL(SH_EUNSUPPORTED,
            "%s/%s: %s: the %s value %.9g of item %lld is not exact in BF16: convert the checkpoint to BF16 first",
            l->dir, t->file, t->name, t->dtype_name, (double)f, (long long)item);
}

/* Advice on the pages that lie wholly inside a range: only a hint. */
static void advise(const uint8_t *data, size_t bytes, int advice) {
    const uintptr_t page = 4096;
    uintptr_t a = ((uintptr_t)data + page - 1) & ~(page - 1), b = ((uintptr_t)data + bytes) & ~(page - 1);
    if (a < b) (void)madvise((void *)a, b - a, advice);
}

/* Packed: the source's pages need not stay in this process. */
static void let_go(const job *j) {
    for (int s = 0; s < 2 && j->t[s]; s++) {
        size_t row = sh_dtype_bytes(j->t[s]->dtype, (uint64_t)row_items(j));
        advise(j->t[s]->data + (size_t)j->row[s] * row, (size_t)j->n[s] * row, MADV_DONTNEED);
    }
}

static sh_status run_job(const loader *l, const job *j, sh_team *team) {
    if (j->to)
        sh_values_floats(j->t[0], 0, j->k, j->to);
    else
        SH_TRY(pack_job(l, j, team, 0, sh_wmat_panels(j->mat->n), (uint8_t *)(uintptr_t)j->mat->data));
    let_go(j);
    return SH_OK;
}

/* Of the files. */
static uint64_t job_bytes(const job *j) {
    return (uint64_t)(j->to ? 1 : j->mat->n) * sh_dtype_bytes(j->t[0]->dtype, (uint64_t)j->k);
}

static sh_status pack_all(loader *l, sh_team *team) {
    for (int i = 0; i < l->n_jobs; i++) l->loading->total += job_bytes(&l->jobs[i]);
    for (int i = 0; i < l->n_jobs; i++) {
        SH_TRY(run_job(l, &l->jobs[i], team));
        if (l->jobs[i].to) l->loading->bytes += job_bytes(&l->jobs[i]);
    }
    return SH_OK;
}

/* --- the object ----------------------------------------------------------------------------------------------------
 */

static sh_status allocate(sh_weights *w) {
    const sh_config *c = w->config;
    size_t n = (size_t)(w->last - w->first);
    impl *m = calloc(1, sizeof *m);
    w->impl = m;
    w->layer = calloc(n ? n : 1, sizeof *w->layer);
    if (m && c->experts) m->expert = calloc(n * 2 * (size_t)c->experts, sizeof *m->expert);
    if (!m || !w->layer || (c->experts && !m->expert)) SH_FAIL(SH_EMEMORY, "weights: no memory for their tables");
    return SH_OK;
}

static sh_status allocate_block(sh_weights *w) {
    const sh_config *c = w->config;
    impl *m = w->impl;
    size_t bytes = sh_weights_layout(w, m->expert, NULL);
    SH_TRY(sh_mem_alloc(bytes, "weights", &m->block));
    m->block_bytes = bytes;
    sh_weights_layout(w, m->expert, m->block);
    w->bytes = bytes + sh_weights_table_bytes(c, w->first, w->last);
    return SH_OK;
}

static void keep_tables(impl *m) {
    const sh_tensor *const table[] = {m->embed, m->ple_table};
    for (int i = 0; i < 2; i++) {
        if (!table[i]) continue;
        sh_tensors_need(m->tensors, table[i]);
        advise(table[i]->data, (size_t)table[i]->bytes, MADV_RANDOM); /* rows here and there: no read-ahead */
    }
    sh_tensors_trim(m->tensors);
}

/* Of a packed folder, which has no other tensors than the tables and towers. */
static sh_status resolve_tables(loader *l) {
    const sh_tensor *embed = NULL;
    SH_TRY(find_prefix(l));
    SH_TRY(want_tables(l, &embed));
    return refuse_unexpected(l);
}

static sh_status open_used(loader *l) {
    l->used = calloc((size_t)sh_tensors_count(l->tensors) + 1, sizeof *l->used);
    if (!l->used) SH_FAIL(SH_EMEMORY, "%s: no memory for the list of tensors", l->dir);
    return SH_OK;
}

static sh_status check_set(const char *dir, const sh_config *c, sh_tensors *t, sh_status (*resolve)(loader *l)) {
    impl m = {0};
    sh_weights w = {.config = c, .impl = &m}; /* layers [0, 0): nothing is this stage's own */
    loader l = {.dir = dir, .c = c, .w = &w, .tensors = t};
    sh_status st = open_used(&l);
    if (st == SH_OK) st = resolve(&l);
    free(l.used);
    free(l.jobs);
    return st;
}

sh_status sh_weights_check(const char *model_dir, const sh_config *c, sh_tensors *t) {
    return check_set(model_dir, c, t, resolve_all);
}

sh_status sh_weights_check_tables(const char *model_dir, const sh_config *c, sh_tensors *t) {
    return check_set(model_dir, c, t, resolve_tables);
}

static sh_status load_packed(loader *l, sh_team *team) {
    impl *m = l->w->impl;
    SH_TRY(sh_packed_open(l->dir, l->c, &m->packed));
    SH_TRY(sh_packed_load(m->packed, l->w, m->expert, team, l->loading));
    SH_TRY(sh_packed_tables(m->packed, &m->tensors));
    l->tensors = m->tensors;
    SH_TRY(open_used(l));
    SH_TRY(resolve_tables(l));
    keep_tables(m);
    return SH_OK;
}

static sh_status load(loader *l, sh_team *team) {
    SH_TRY(sh_kernels_select(&l->kn));
    SH_TRY(allocate(l->w));
    if (sh_packed_is(l->dir)) return load_packed(l, team);
    SH_TRY(allocate_block(l->w));
    impl *m = l->w->impl;
    SH_TRY(sh_tensors_open(l->dir, &m->tensors));
    l->tensors = m->tensors;
    SH_TRY(open_used(l));
    SH_TRY(resolve_all(l));
    SH_TRY(pack_all(l, team));
    keep_tables(m);
    return SH_OK;
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
    loader l = {.dir = model_dir, .c = c, .w = w, .rounds = o->mode != SH_MODE_EXACT, .loading = &loading};
    sh_status st = load(&l, team);
    if (st == SH_OK) w->load = sh_loading_end(&loading);
    free(l.used);
    free(l.jobs);
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
    impl *m = w->impl;
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
    const impl *m = w->impl;
    table_row(m->embed, (int64_t)id * w->config->hidden, w->config->hidden, (float)sqrt(w->config->hidden), out);
}

void sh_weights_ple_row(const sh_weights *w, int layer, int id, float *out) {
    const impl *m = w->impl;
    const sh_config *c = w->config;
    int64_t row = (int64_t)id * c->n_layers * c->ple;
    table_row(m->ple_table, row + (int64_t)layer * c->ple, c->ple, (float)sqrt(c->ple), out);
}

/* --- one at a time -------------------------------------------------------------------------------------------------
 */

#define SUPPLY_PIECE ((size_t)32 << 20)

struct sh_supply {
    loader l;
    sh_team *team;
    void *room; /* address space for the layout: never touched */
    size_t room_bytes;
    uint8_t *piece;
};

static uintptr_t place_of(const job *j) {
    return j->to ? (uintptr_t)j->to : (uintptr_t)j->mat;
}

static int by_place(const void *a, const void *b) {
    uintptr_t x = place_of(a), y = place_of(b);
    return (x > y) - (x < y);
}

static sh_status open_supply(sh_supply *s) {
    loader *l = &s->l;
    SH_TRY(sh_kernels_select(&l->kn));
    SH_TRY(allocate(l->w));
    impl *m = l->w->impl;
    s->room_bytes = sh_weights_layout(l->w, m->expert, NULL);
    s->room = mmap(NULL, s->room_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (s->room == MAP_FAILED) {
        s->room = NULL;
        SH_FAIL(SH_EMEMORY, "%s: no addresses for %zu bytes of weights", l->dir, s->room_bytes);
    }
    sh_weights_layout(l->w, m->expert, s->room);
    SH_TRY(sh_tensors_open(l->dir, &m->tensors));
    l->tensors = m->tensors;
    SH_TRY(open_used(l));
    SH_TRY(resolve_all(l));
    qsort(l->jobs, (size_t)l->n_jobs, sizeof *l->jobs, by_place);
    for (int i = 0; i < l->n_jobs; i++) /* layer_scalar: lies in the tables of layers, not in the room */
        if (l->jobs[i].to &&
            ((char *)l->jobs[i].to < (char *)s->room || (char *)l->jobs[i].to >= (char *)s->room + s->room_bytes))
            sh_values_floats(l->jobs[i].t[0], 0, 1, l->jobs[i].to);
    return sh_mem_alloc(SUPPLY_PIECE, "a piece of a matrix", (void **)&s->piece);
}

sh_status sh_supply_open(const char *model_dir, const sh_config *c, sh_mode mode, sh_team *team, sh_supply **out) {
    sh_supply *s = calloc(1, sizeof *s);
    sh_weights *w = calloc(1, sizeof *w);
    if (!s || !w) {
        free(s);
        free(w);
        SH_FAIL(SH_EMEMORY, "weights: no memory");
    }
    *w = (sh_weights){.config = c, .type = sh_mode_wtype(mode), .last = c->n_layers};
    *s = (sh_supply){.l = {.dir = model_dir, .c = c, .w = w}, .team = team};
    sh_status st = open_supply(s);
    if (st != SH_OK) {
        sh_supply_close(&s);
        return st;
    }
    *out = s;
    return SH_OK;
}

void sh_supply_close(sh_supply **sp) {
    sh_supply *s = *sp;
    if (!s) return;
    sh_mem_free(s->piece, SUPPLY_PIECE);
    if (s->room) munmap(s->room, s->room_bytes);
    free(s->l.used);
    free(s->l.jobs);
    sh_weights_destroy(&s->l.w);
    free(s);
    *sp = NULL;
}

sh_weights *sh_supply_weights(sh_supply *s) {
    return s->l.w;
}

static sh_status give_vector(sh_supply *s, const job *j, sh_supply_fn *put, void *ctx) {
    size_t bytes = (size_t)j->k * sizeof(float);
    if (bytes > SUPPLY_PIECE) SH_FAIL(SH_ELIMIT, "%s: %d values: at most %zu", j->t[0]->name, j->k, SUPPLY_PIECE / 4);
    sh_values_floats(j->t[0], 0, j->k, (float *)(void *)s->piece);
    return put(ctx, s->piece, bytes);
}

sh_status sh_supply_give(sh_supply *s, const void *place, sh_supply_fn *put, void *ctx) {
    const job *j = NULL;
    int lo = 0, hi = s->l.n_jobs;
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2;
        if (place_of(&s->l.jobs[mid]) < (uintptr_t)place)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo < s->l.n_jobs && place_of(&s->l.jobs[lo]) == (uintptr_t)place) j = &s->l.jobs[lo];
    if (!j) SH_FAIL(SH_ESTATE, "%s: nothing is known of this place", s->l.dir);
    if (j->to) return give_vector(s, j, put, ctx);
    size_t panel = sh_wmat_bytes(j->mat->type, SH_PANEL, j->mat->k);
    int all = sh_wmat_panels(j->mat->n), n = (int)(SUPPLY_PIECE / panel);
    if (n == 0) SH_FAIL(SH_ELIMIT, "%s: a panel of %zu bytes: at most %zu", j->t[0]->name, panel, SUPPLY_PIECE);
    for (int p = 0; p < all; p += n) {
        int end = all - p < n ? all : p + n;
        SH_TRY(pack_job(&s->l, j, s->team, p, end, s->piece));
        SH_TRY(put(ctx, s->piece, (size_t)(end - p) * panel));
    }
    let_go(j);
    return SH_OK;
}

const sh_tensors *sh_supply_tensors(const sh_supply *s) {
    return s->l.tensors;
}

const sh_tensor *sh_supply_embed(const sh_supply *s) {
    return ((impl *)s->l.w->impl)->embed;
}

const sh_tensor *sh_supply_ple(const sh_supply *s) {
    return ((impl *)s->l.w->impl)->ple_table;
}
