/*
 * The schedule of a group: one leader per lane. A lane is one member of every stage, with sequences and KV pages of its
 * own; where the members of a stage divide something else than sequences there is one lane. Each step gives every lane
 * a micro-batch, an empty one where a lane has nothing to do, so that the members of a stage always do the same steps
 * in the same order; a step is over when every lane that had rows has answered.
 */
#ifndef SH_WORKER_LANES_H
#define SH_WORKER_LANES_H

#include "worker/leader.h"

typedef struct sh_lanes sh_lanes;

/* o: of one lane, the same for all. n ≥ 1. */
sh_status sh_lanes_create(const sh_leader_options *o, int n, sh_lanes **out);
void sh_lanes_destroy(sh_lanes **l);
/* As sh_leader_add; the lane with the fewest tokens to go gets it, those not counted that s shares there. */
sh_status sh_lanes_add(sh_lanes *l, sh_seq **s, bool *known);
void sh_lanes_cancel(sh_lanes *l, uint64_t key);
/* Makes a step: *batches [n], borrowed until the next call. *made false: nothing to do now, or enough in flight. */
sh_status sh_lanes_next(sh_lanes *l, sh_batch **batches, bool *made);
/* Applies a lane's answer to the oldest of its micro-batches in flight; as sh_leader_apply. */
sh_status sh_lanes_apply(sh_lanes *l, int lane, uint64_t step, const sh_token *tokens, int n,
                         void (*emit)(void *arg, uint64_t key, const sh_token *t), void *arg);
/* A micro-batch for the prefill pipeline, and a word on one: sh_leader_next_prompts, sh_leader_confirm. Groups that
 * have such a pipeline have one lane. */
sh_status sh_lanes_next_prompts(sh_lanes *l, sh_batch **batch, bool *made);
sh_status sh_lanes_confirm(sh_lanes *l, uint64_t step, bool ok);
/* Sums over the lanes; in_flight counts steps. */
sh_leader_state sh_lanes_look(const sh_lanes *l);

#endif
