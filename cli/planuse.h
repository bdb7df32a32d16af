/* --plan FILE for run and serve: a plan made by 'shoal plan -o', perhaps edited, takes the place of the options that
 * say how ranks share a model. */
#ifndef SH_CLI_PLANUSE_H
#define SH_CLI_PLANUSE_H

#include "cli/options.h"
#include "partition/cluster.h"

/* Reads and checks the plan and sets in *s what it says: ranks, replicas, mode, KV type, threads and limits. Options
 * that would say otherwise are refused by name. Freed by sh_plan_free; NULL without --plan. */
sh_status sh_plan_use(sh_shared_options *s, const sh_config *c, Shoal__Plan **out);
/* Where nothing is said of ranks (no -n, --replicas, --pp, --ep, --tp, --cp, --cuts, --plan …): sets ranks, replicas,
 * how a stage is divided, sequences and chunk to what the planner finds best on these nodes for so many requests of
 * usual lengths. *chosen false, and *s as it was, where something is said or nothing fits. */
sh_status sh_plan_choose(sh_shared_options *s, const sh_config *c, const sh_cluster *k, double requests, bool *chosen);

#endif
