/*
 * Everything that the weights of a model consist of besides the tables of embeddings, by name and shape: what a packed
 * folder (packed.h) holds, and where it goes in sh_weights. Follows from the layer table alone. Private to model/.
 */
#ifndef SH_MODEL_SLOTS_H
#define SH_MODEL_SLOTS_H

#include "model/weights.h"

/* What of a slot a part of a stage has (share.h). */
typedef enum sh_slot_part {
    SH_SLOT_WHOLE,       /* all of it */
    SH_SLOT_QUERIES,     /* outputs of its query heads */
    SH_SLOT_KV,          /* outputs of the KV heads that these read, some perhaps twice */
    SH_SLOT_COLUMNS,     /* outputs: its feed-forward columns */
    SH_SLOT_MIX_QUERIES, /* some outputs of all inputs, or (share.sum) all outputs of the inputs of its query heads */
    SH_SLOT_MIX_COLUMNS, /* the same with its feed-forward columns */
    SH_SLOT_EXPERTS,     /* of a stack those that are held */
    SH_SLOT_VOCABULARY   /* outputs: its ids */
} sh_slot_part;

typedef struct sh_slot {
    char name[64]; /* "layers.3.self_attn.q_proj" */
    int layer;     /* −1: behind the layers */
    sh_slot_part part;
    int count; /* matrices [n, k] of a stack; 0: a vector [k] of f32 */
    int n, k;  /* of the whole model */
    sh_wtype type;
    const float **vector; /* its place in the weights, NULL with matrices; layer_scalar has `scalar` instead */
    float *scalar;
    sh_wmat *mat; /* count matrices one after another */
} sh_slot;

typedef sh_status sh_slot_fn(void *ctx, const sh_slot *s);

/* Calls fn for each slot of layers [w->first, w->last) and, as w->last and w->config say, of what lies behind them, in
 * the order of a packed folder. w is laid out (layout.h), with a table of experts where the model has some. */
sh_status sh_slots_each(sh_weights *w, sh_slot_fn *fn, void *ctx);

#endif
