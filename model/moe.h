/*
 * Mixture of experts, beside the dense feed-forward: the router chooses top_k experts per row; each chosen expert gives
 * one result row; the rows' results are summed in the order of the router's choice. Begin and end are apart so that
 * rows can be with remote experts while the dense branch computes. The row given to experts and each result are what
 * would travel, also when the expert is local: so placement cannot change bytes. Source: gemma4-text §4.7; reference
 * moe().
 */
#ifndef SH_MODEL_MOE_H
#define SH_MODEL_MOE_H

#include "model/peers.h"
#include "model/team.h"
#include "model/weights.h"

typedef struct sh_moe sh_moe;

/* Scratch for blocks of at most max_rows rows. Borrowed: c, team, kn, peers (NULL: all experts are local). */
sh_status sh_moe_create(const sh_config *c, sh_mode mode, int max_rows, sh_team *team, const sh_kernels *kn,
                        const sh_peers *peers, sh_moe **out);
void sh_moe_destroy(sh_moe **m);

/* Routes rows x [n, hidden] (the residual after attention) and sends them on their way. */
void sh_moe_begin(sh_moe *m, int layer, const sh_layer_weights *w, const float *x, int n);
/* z [n, hidden] = Σ_e w_e · expert_e(rms(x)), before any norm, for the rows of the last begin. */
void sh_moe_end(sh_moe *m, int layer, const sh_layer_weights *w, float *z);
/* The router's choices of the last begin: [n, top_k]. */
const int32_t *sh_moe_ids(const sh_moe *m);
const float *sh_moe_weights(const sh_moe *m);

#endif
