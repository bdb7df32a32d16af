/* --plan FILE for run and serve: a plan made by 'shoal plan -o', perhaps edited, takes the place of the options that
 * say how ranks share a model. */
#ifndef SH_CLI_PLANUSE_H
#define SH_CLI_PLANUSE_H

#include "cli/options.h"
#include "partition/cluster.h"
#include "partition/routing.h"
#include "partition/workload.h"

/* Reads and checks the plan and sets in *s what it says: ranks, replicas, mode, KV type, threads and limits. Options
 * that would say otherwise are refused by name. Freed by sh_plan_free; NULL without --plan. */
sh_status sh_plan_use(sh_shared_options *s, const sh_config *c, Shoal__Plan **out);
/* What is left to choose where a layout is settled, as the cost model finds it best, and the seconds that the job takes
 * so. */
typedef struct sh_plan_tuning {
    int max_seqs, chunk;                                 /* max_seqs 0: nothing is chosen */
    char cuts[SH_PLAN_CUTS], prefill_cuts[SH_PLAN_CUTS]; /* "": there is nothing to cut */
    double seconds;
} sh_plan_tuning;
/* Sets in *s what of it is not given; *t must live as long. Nothing where nothing is chosen. */
void sh_plan_take(sh_shared_options *s, const sh_plan_tuning *t);
/* Where nothing is said of ranks (no -n, --replicas, --pp, --ep, --tp, --cp, --cuts, --plan …): sets ranks, replicas,
 * how a stage is divided and ranks that only read prompts to what the planner finds best on these nodes for that
 * workload, and in *out with what cuts, sequences and chunk. *chosen false, and *s as it was, where something is said
 * or nothing fits. */
sh_status sh_plan_choose(sh_shared_options *s, const sh_config *c, const sh_cluster *k, const sh_workload *w,
                         sh_plan_tuning *out, bool *chosen);
/* Where the layout is settled: so many ranks and replicas, and of pp, ep, tp, cp and prefill what *s says, 1 where it
 * says nothing. What is given stays. Chooses nothing where all is given, with --plan, and where nothing fits. routing:
 * what --routing names, or NULL. */
sh_status sh_plan_tune(const sh_shared_options *s, const sh_config *c, const sh_cluster *k, const sh_workload *w,
                       const sh_routing *routing, int ranks, int replicas, sh_plan_tuning *out);

#endif
