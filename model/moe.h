/*
 * Mixture of experts, beside the dense feed-forward: the router chooses top_k experts per row; each chosen expert gives
 * one result row; the rows' results are summed in the order of the router's choice. The row given to experts and each
 * result are what would travel, also when the expert is here: so placement cannot change bytes. Begin, compute and end
 * are apart, and there are two slots, so that rows and results of one part of a step can be on their way while another
 * part computes. Source: gemma4-text §4.7; reference moe().
 */
#ifndef SH_MODEL_MOE_H
#define SH_MODEL_MOE_H

#include "model/peers.h"
#include "model/team.h"
#include "model/weights.h"

typedef struct sh_moe sh_moe;

/* Scratch for parts of at most max_rows rows, in one slot, or two with peers. Borrowed: c, team, kn, peers (NULL: every
 * expert is here). */
sh_status sh_moe_create(const sh_config *c, sh_mode mode, int max_rows, sh_team *team, const sh_kernels *kn,
                        const sh_expert_peers *peers, sh_moe **out);
void sh_moe_destroy(sh_moe **m);

/* Routes rows x [n, hidden] (the residual after attention) and sends them on their way. */
sh_status sh_moe_begin(sh_moe *m, int slot, int layer, const sh_layer_weights *w, const float *x, int n);
/* Runs this member's experts on the rows of the last begin and on those that others sent: one pass over the weights of
 * each expert. */
sh_status sh_moe_compute(sh_moe *m, int slot, const sh_layer_weights *w);
/* z [n, hidden] = Σ_e w_e · expert_e(rms(x)), before any norm, for the rows of the last begin. */
sh_status sh_moe_end(sh_moe *m, int slot, float *z);
/* Choices computed here since creation, the others' included. */
uint64_t sh_moe_computed(const sh_moe *m);
/* The router's choices of the slot's last begin: [n, top_k]. */
const int32_t *sh_moe_ids(const sh_moe *m, int slot);
const float *sh_moe_weights(const sh_moe *m, int slot);

#endif
