/*
 * Rotary position embedding: cosines and sines of position × frequency for one kind of layer, in a table that grows
 * with the positions seen. Angles are formed in float32 like the reference's (position as float32 times a float32
 * frequency), so that long contexts rotate as the model was trained. Source: gemma4-text §4.4; reference
 * Config.inv_freq and rope().
 */
#ifndef SH_MODEL_ROPE_H
#define SH_MODEL_ROPE_H

#include "model/config.h"
#include "model/kernels/kernels.h"

typedef struct sh_rope {
    int head_dim, pairs; /* dimensions j and j + head_dim/2 rotate together, j < pairs */
    double theta, factor;
    int max_context, filled; /* positions [0, filled) of the table are ready */
    float *freq;             /* [pairs] */
    float *cs, *sn;          /* [max_context, pairs], reserved; touched as far as filled */
    float *angle;            /* [pairs] scratch */
} sh_rope;

/* A table for the layer's head dimension, base and rotated pairs. Memory is reserved, not touched. Released by
 * sh_rope_release, which accepts a zeroed struct. */
sh_status sh_rope_create(const sh_layer *l, int max_context, sh_rope *out);
void sh_rope_release(sh_rope *r);
/* Whether the layer rotates as this table does. */
bool sh_rope_fits(const sh_rope *r, const sh_layer *l);
/* Makes positions [0, n) ready; n ≤ max_context. One thread; call it before the step's rows are shared out. */
void sh_rope_reach(sh_rope *r, const sh_kernels *kn, int n);
/* Rotates one head's vector [head_dim] to position pos < filled. */
static inline void sh_rope_apply(const sh_rope *r, const sh_kernels *kn, float *x, int pos) {
    size_t at = (size_t)pos * (size_t)r->pairs;
    kn->rope(x, r->cs + at, r->sn + at, r->head_dim / 2, r->pairs);
}

#endif
