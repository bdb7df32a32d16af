/*
 * The weights that one stage owns, repacked for the kernels one tensor at a time. Everything is borrowed from the
 * sh_weights object, which also keeps the maps open for table look-ups (embedding and per-layer embedding rows stay on
 * disk, mapped). Tensor names: gemma4-text §3; every accepted variant is resolved here.
 */
#ifndef SH_MODEL_WEIGHTS_H
#define SH_MODEL_WEIGHTS_H

#include <stdbool.h>
#include "model/config.h"
#include "model/kernels/kernels.h"
#include "model/loading.h"
#include "model/peers.h"
#include "model/team.h"

typedef struct sh_layer_weights {
    /* norms [hidden] unless said otherwise; NULL where the layer has none */
    const float *input_norm, *post_attn_norm, *pre_ff_norm, *post_ff_norm;
    const float *q_norm, *k_norm; /* [head_dim]; k_norm: producers; with k_eq_v consumers too: their producer's */
    sh_wmat q, k, v, o;     /* of this part (model/share.h), as are gate, up, down and the head; k: producers only; v:
                               producers without k_eq_v (data NULL otherwise) */
    sh_wmat gate, up, down; /* [ff, hidden], [ff, hidden], [hidden, ff] */
    /* mixture of experts */
    const float *post_ff_norm_1, *post_ff_norm_2, *pre_ff_norm_2;
    const float *router_scale, *expert_scale; /* [hidden], [experts] */
    sh_wmat router;                           /* [experts, hidden] */
    const sh_wmat *expert_gate_up; /* experts × [2·expert_ff, hidden]: gate rows first; data NULL: not held */
    const sh_wmat *expert_down;    /* experts × [hidden, expert_ff]; the same */
    /* per-layer embedding */
    sh_wmat ple_gate, ple_proj; /* [P, hidden], [hidden, P] */
    sh_wmat ple_model_proj;     /* this layer's rows of per_layer_model_projection: [P, hidden] */
    const float *post_ple_norm;
    float scalar; /* layer_scalar, 1 when absent */
} sh_layer_weights;

/* Which experts a member of a stage holds. */
typedef struct sh_held_experts {
    bool (*holds)(const void *ctx, int layer, int expert); /* NULL: every expert */
    const void *ctx;
} sh_held_experts;

/* How matrices are kept in a mode. The router's stays bf16 in all: its choices should not move. */
static inline sh_wtype sh_mode_wtype(sh_mode m) {
    return m == SH_MODE_Q8 ? SH_W_Q8 : m == SH_MODE_Q4 ? SH_W_Q4 : SH_W_BF16;
}

typedef struct sh_weights {
    const sh_config *config; /* borrowed; of the whole model */
    sh_wtype type;           /* of matrices, the router's apart */
    sh_share share;          /* what of each layer is here */
    sh_held_experts held;
    int first, last;         /* layers [first, last) */
    sh_layer_weights *layer; /* [last − first] */
    const float *ple_norm;   /* [P] */
    const float *final_norm; /* last stage only */
    sh_wmat head;            /* [vocab, hidden], of this part's ids; last stage only */
    size_t bytes;            /* memory held: anonymous, or (a packed folder's) mapped */
    sh_load_times load;      /* what loading took */
    void *impl;
} sh_weights;

typedef struct sh_weights_options {
    sh_mode mode;
    sh_share share;
    sh_held_experts held; /* only these are read */
    int first, last;      /* layers [first, last) */
    sh_load_peers *peers; /* those that load together with this one; NULL: alone. Without effect on a packed folder */
    sh_load_told *tell;   /* how loading gets on; may be NULL */
    void *tell_arg;
} sh_weights_options;

/* Loads a share of layers [first, last) of MODEL; the embedding when first is 0, final norm and head when last is the
 * layer count (not where config.kv_end says that only K/V are made: then neither these nor more than K/V of layer
 * kv_end − 1). Of the matrices that are shared only this part's bytes are read; experts, router and per-layer embedding
 * are whole on every part.
 * Missing, wrongly shaped or typed tensors fail by name; unexpected ones too, except those the model description allows
 * (towers of other modalities, unused K/V of consumers, v_norm). team: reading and packing run on it.
 * With peers what several members need one of them reads and packs, and the others get it: collective, and a failure of
 * one is everybody's, with its text. */
sh_status sh_weights_load(const char *model_dir, const sh_config *c, const sh_weights_options *o, sh_team *team,
                          sh_weights **out);
/* Resolves and checks every tensor of an open checkpoint against config.json, from headers alone: what sh_weights_load
 * does first. model_dir is for messages. */
struct sh_tensors;
sh_status sh_weights_check(const char *model_dir, const sh_config *c, struct sh_tensors *t);
/* The same of the tables of a packed folder (packed.h). */
sh_status sh_weights_check_tables(const char *model_dir, const sh_config *c, struct sh_tensors *t);
/* A hash over the checkpoint's names, shapes and sampled bytes (sh_tensors_fingerprint), or what a packed folder says
 * of the checkpoint that it was made from: two ranks, or two runs, compare it. */
sh_status sh_weights_fingerprint(const char *model_dir, uint64_t *out);
/* Whether a tensor belongs to another modality. */
bool sh_weights_is_tower(const char *name);
void sh_weights_destroy(sh_weights **w);

/* Row `id` of embed_tokens × sqrt(hidden) → out [hidden]. Stage 0 only. */
void sh_weights_embed(const sh_weights *w, int id, float *out);
/* Slice of `layer` of row `id` of embed_tokens_per_layer × sqrt(P) → out [P]. */
void sh_weights_ple_row(const sh_weights *w, int layer, int id, float *out);

/*
 * A whole checkpoint, resolved and checked, whose vectors and matrices are given one at a time as a rank would hold
 * them: for whoever writes them down (packer.c). Memory: one piece of a matrix.
 */
typedef struct sh_supply sh_supply;
typedef sh_status sh_supply_fn(void *ctx, const void *p, size_t n);
sh_status sh_supply_open(const char *model_dir, const sh_config *c, sh_mode mode, sh_team *team, sh_supply **out);
void sh_supply_close(sh_supply **s);
/* Laid out: its matrices and vectors are the places that are asked for; they hold nothing. Scalars are filled in. */
sh_weights *sh_supply_weights(sh_supply *s);
/* Hands the bytes of a vector (its first element's address) or of a matrix (the address of its sh_wmat) to `put`. */
sh_status sh_supply_give(sh_supply *s, const void *place, sh_supply_fn *put, void *ctx);
/* All tensors as they are, and the tables among them: ple NULL where the model has none. */
const struct sh_tensors *sh_supply_tensors(const sh_supply *s);
const struct sh_tensor *sh_supply_embed(const sh_supply *s), *sh_supply_ple(const sh_supply *s);

#endif
