/*
 * Which members of a stage hold which experts, from how often each was chosen. Pure functions. A hot expert may be on
 * several members, which share its rows evenly (worker/experts.c: a member takes its own rows, the others' go to
 * whoever has the fewest). Nothing here can change a result: docs/decisions/0013.
 */
#ifndef SH_PARTITION_PLACEMENT_H
#define SH_PARTITION_PLACEMENT_H

#include <stdbool.h>
#include <stdint.h>
#include "common/buf.h"
#include "partition/routing.h"

/*
 * held [members, experts]: every expert on at least one member, and no member with more than ⌈experts/members⌉ + extra;
 * extra 0: every expert once. counts [experts]: choices seen; all 0: even shares. Replicas are made only as far as they
 * help. SH_EINPUT when there are fewer experts than members or no members.
 */
sh_status sh_placement_make(const uint64_t *counts, int experts, int members, int extra, bool *held);
/* The load of the busiest member over the mean, 1 being perfect; 1 when nothing was counted. */
double sh_placement_balance(const uint64_t *counts, int experts, int members, const bool *held);
/* The same for all layers of a stage, in held [layers, members, experts] (zeroed): copies go first to the layers that
 * are furthest from balance, within `bytes` of weights per member beyond even shares. */
sh_status sh_placement_stage(const sh_config *c, const sh_routing *r, sh_mode mode, int first, int last, int members,
                             uint64_t bytes, bool *held);
/* "; experts by counts, 12 copies: busiest rank 1.04 of the mean, 1.61 with even shares" for a plan with ep > 1. */
sh_status sh_placement_print(const sh_config *c, const sh_routing *r, const Shoal__Plan *p, sh_buf *out);

#endif
