/* --plan FILE for run and serve: a plan made by 'shoal plan -o', perhaps edited, takes the place of the options that
 * say how ranks share a model. */
#ifndef SH_CLI_PLANUSE_H
#define SH_CLI_PLANUSE_H

#include "cli/options.h"
#include "partition/cluster.h"
#include "partition/workload.h"

/* Reads and checks the plan and sets in *s what it says: ranks, replicas, mode, KV type, threads and limits. Options
 * that would say otherwise are refused by name. Freed by sh_plan_free; NULL without --plan. */
sh_status sh_plan_use(sh_shared_options *s, const sh_config *c, Shoal__Plan **out);
/* Where nothing is said of ranks (no -n, --replicas, --pp, --ep, --tp, --cp, --cuts, --plan …): sets ranks, replicas,
 * how a stage is divided, ranks that only read prompts, sequences and chunk to what the planner finds best on these
 * nodes for that workload. *chosen false, and *s as it was, where something is said or nothing fits. */
sh_status sh_plan_choose(sh_shared_options *s, const sh_config *c, const sh_cluster *k, const sh_workload *w,
                         bool *chosen);
/* Where the layout is settled: the sequences at once and the rows of a chunk that the cost model finds best, those
 * given being as they are, and the seconds that the job takes so. out->max_seqs 0: nothing is chosen, with both given,
 * with --plan, and where nothing fits. */
typedef struct sh_plan_batch {
    int max_seqs, chunk;
    double seconds;
} sh_plan_batch;
sh_status sh_plan_tune(const sh_shared_options *s, const sh_config *c, const sh_cluster *k, const sh_workload *w,
                       int ranks, int replicas, sh_plan_batch *out);

#endif
