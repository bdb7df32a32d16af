/*
 * The search for a plan: replicas × stages × one way of dividing a stage, or ranks that only read prompts; all that are
 * legal (of the numbers of such ranks a few), those that fit memory, ranked by the time that the workload would take.
 * Pure and deterministic: (model, machine, workload, what is fixed) → choices. Says of every way why its best did not
 * win. Formulas and rules: docs/planning.md.
 */
#ifndef SH_PARTITION_SEARCH_H
#define SH_PARTITION_SEARCH_H

#include "partition/cluster.h"
#include "partition/forecast.h"

/* How the ranks of a group share the model; stages may be combined with any of the last three, and all with replicas.
 */
typedef enum sh_way {
    SH_WAY_ALONE,   /* a group is one rank */
    SH_WAY_STAGES,  /* layers alone */
    SH_WAY_PREFILL, /* some ranks only read prompts; layers alone on both sides */
    SH_WAY_EXPERTS, /* ep > 1: this and the next are the ways of dividing a stage */
    SH_WAY_TENSOR,  /* tp > 1 */
    SH_WAY_CONTEXT, /* cp > 1 */
    SH_WAYS
} sh_way;
extern const char *const sh_way_names[SH_WAYS];

typedef struct sh_search_options {
    const sh_config *config; /* all borrowed */
    const sh_cluster *cluster;
    const sh_workload *workload;
    sh_plan_request fixed;     /* members that are 0 or NULL are free; ranks: of a group */
    int replicas;              /* 0: free */
    int least;                 /* ranks that a group needs at least: where groups have more than there are NUMA nodes,
                                  they have so many and share nodes; 0: they do not share */
    bool no_prefill;           /* all ranks decode; fixed.prefill is 0 */
    const sh_routing *routing; /* what routing will be like; NULL: all experts alike. fixed.routing places them */
} sh_search_options;

typedef struct sh_choice {
    sh_way way;
    sh_plan_shape shape;
    int ranks, replicas, ranks_per_node;
    bool fits;
    Shoal__Plan *plan; /* owned; NULL unless it fits */
    sh_forecast forecast;
    sh_kv_plan kv, prompts; /* prompts: of the ranks that only read them */
    uint64_t kv_budget;     /* bytes of the tightest rank */
    double seqs;            /* that the group can run at once */
    double reading;         /* prompts that the ranks which only read them can hold at once; 0: there are none */
    char why[512];          /* !fits: the sentence; else, for what did not win: what costs it most */
} sh_choice;

#define SH_SEARCH_BEST 5
typedef struct sh_search {
    sh_choice best[SH_SEARCH_BEST]; /* fastest first; at most two of a kind */
    int n;
    sh_choice of_way[SH_WAYS]; /* the best of each, or the one that misses by least */
    bool has_way[SH_WAYS];     /* false: no legal plan; of_way[].why says the rule */
    int tried, fitting;
} sh_search;

/* n = 0 when nothing fits: of_way says why. Fails for want of memory, and when what is fixed contradicts itself. */
sh_status sh_search_run(const sh_search_options *o, sh_search **out);
void sh_search_free(sh_search **s);

/* What a choice costs with this machine instead: for "what if". */
sh_status sh_search_forecast(const sh_search_options *o, const sh_choice *x, sh_forecast *out, sh_forecast_rank *rank);
/* The same layout with experts in even shares, in order: what placing them by counts gains. */
sh_status sh_search_unplaced(const sh_search_options *o, const sh_choice *x, sh_forecast *out);
/* One choice, evaluated: shape, replicas and ranks_per_node are given. fits and why tell how it went. */
sh_status sh_search_try(const sh_search_options *o, sh_choice *x);
/* A plan that was made elsewhere, evaluated on the machine: memory, KV, forecast. x->plan is given and stays owned. */
sh_status sh_search_judge(const sh_search_options *o, sh_choice *x);
void sh_choice_release(sh_choice *x);
/* Memory of a rank of it, with the threads that the rank has on this machine. */
sh_plan_memory sh_choice_memory(const sh_search_options *o, const sh_choice *x, int rank);

#endif
