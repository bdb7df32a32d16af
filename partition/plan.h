/*
 * Plans of a group: which rank holds which layers, and how its KV memory is divided. Pure functions of the model's
 * configuration and of numbers: no files, no MPI, no clock. The plan itself is the message Shoal__Plan
 * (proto/group.proto); how a budget becomes pages is in docs/decisions/0006-plan-and-kv-budget.md.
 */
#ifndef SH_PARTITION_PLAN_H
#define SH_PARTITION_PLAN_H

#include "common/buf.h"
#include "model/config.h"
#include "proto/group.pb-c.h"

typedef struct sh_plan_request {
    int ranks;                  /* of the group; 0: stages × width, as the other members say */
    int pp;                     /* stages; 0: as the cuts say, else ranks / width */
    int ep, tp, cp;             /* how a stage is divided among its members; 0: 1. At most one is above 1 */
    bool tp_sum;                /* partial sums in place of gathered outputs */
    bool no_prefix_sharing;     /* each sequence computes all of its prompt */
    bool share_weights;         /* what several ranks need one of them reads, and sends to the others */
    int prefill;                /* ranks besides the stages that make the K/V of prompts; `ranks` counts them */
    const char *cuts;           /* "5,9": first layers of stages 1, 2, …; NULL or "": balanced */
    const char *prefill_cuts;   /* the same of the second, third … rank that makes the K/V of prompts */
    const double *layer_cost;   /* [layers] what balanced means, head in the last; NULL: elements of weights */
    const double *prefill_cost; /* [layers with K/V] the same for the ranks that make the K/V of prompts */
    sh_mode mode;
    sh_kv_type kv;
    int threads;                      /* per rank; 0: the rank's CPU set */
    int max_seqs;                     /* 0: 32 per stage, at most 256 */
    int chunk;                        /* 0: 512 */
    int max_context;                  /* 0: the model's */
    uint64_t kv_memory;               /* bytes per rank; 0: what is left */
    const struct sh_routing *routing; /* with ep: experts are placed by these counts; NULL: in even shares */
    uint64_t replicate;               /* bytes per rank for copies of hot experts */
} sh_plan_request;

/* How the ranks of a group stand: rank s·width + m is member m of stage s; behind those, ranks that make the K/V of
 * prompts, one a stage. */
typedef struct sh_plan_shape {
    int pp, ep, tp, cp;
    int width;   /* ep · tp · cp: members of a stage */
    int decode;  /* pp · width: ranks that decode */
    int prefill; /* ranks from `decode` on */
} sh_plan_shape;
sh_plan_shape sh_plan_shape_of(const Shoal__Plan *p);
/* What a rank has of its layers' heads and columns: with tp > 1 its member's part of tp. */
sh_share sh_plan_share(const Shoal__Plan *p, int rank);

/* The model as rank `rank` computes it: sh_config_prefill where it only makes K/V. */
void sh_plan_rank_config(const sh_config *c, const Shoal__Plan *p, int rank, sh_config *out);

/* Makes a checked plan; freed by sh_plan_free. Errors name the option, the value and what is possible. */
sh_status sh_plan_make(const sh_config *c, const sh_plan_request *r, Shoal__Plan **out);
void sh_plan_free(Shoal__Plan **p); /* also what protobuf unpacked */
sh_status sh_plan_copy(const Shoal__Plan *p, Shoal__Plan **out);
/* How a stage is divided: one way at a time, so that its width is one of these numbers. To be asked before they are
 * multiplied. */
sh_status sh_plan_check_division(int ep, int tp, int cp);
/* "--prefill 1": what a number of ranks that stages of one rank do not use up might mean, for messages; "" where they
 * are not such stages. `more`: ranks beyond the stages. */
#define SH_PLAN_HINT 96
void sh_plan_hint_prefill(int more, int width, int prefill, char text[SH_PLAN_HINT]);
/* Ranks that only read prompts go with stages of one rank. */
sh_status sh_plan_check_prefill(int prefill, int ep, int tp, int cp);
/* Whether a plan (from anywhere) can run this model: every layer once and in order, every number within its limits. */
sh_status sh_plan_check(const sh_config *c, const Shoal__Plan *p);
/* Whether a rank computes an expert of one of its layers: every one where ep is 1. */
bool sh_plan_holds(const Shoal__Plan *p, int rank, int layer, int expert);
/* "pipeline of 4 stages: layers 0-1 | 2-3 | 4 | 5 + head" */
sh_status sh_plan_print(const sh_config *c, const Shoal__Plan *p, sh_buf *out);
/* Where a plan cuts its layers, or those of the ranks that make the K/V of prompts, as sh_plan_request has it; ""
 * where there is no cut. */
#define SH_PLAN_CUTS (4 * SH_MAX_LAYERS + 1)
void sh_plan_cuts(const Shoal__Plan *p, bool prompts, char text[SH_PLAN_CUTS]);
/* First layers of stages 1 … ranks−1, in cut[] (below kv_end where that is set), such that the dearest stage is as
 * cheap as possible. Cost is weight bytes read per step, the head's on the last stage included. 1 ≤ ranks ≤ layers. */
sh_status sh_plan_balance(const sh_config *c, int ranks, int *cut);
/* The same with the cost of each of n layers given, such as its seconds. */
sh_status sh_plan_balance_by(const double *layer_cost, int n, int ranks, int *cut);
/* Elements of weights that a step reads on a stage: the cost above. */
int64_t sh_plan_cost(const sh_config *c, int first, int last);

/* What sequences may ask of the KV pool of one lane: of a group, or of one of its ep members. */
typedef struct sh_kv_limits {
    sh_kv_type type;
    int max_seqs, max_context, chunk;
    int members; /* of a stage that share positions out (model/owner.h): global pages are those of one of them. 0: 1 */
} sh_kv_limits;
/* The page counts of a group: the same on every rank. */
typedef struct sh_kv_plan {
    int32_t pages[SH_KV_KINDS]; /* of a rank; 0 for a kind that no layer has */
    int32_t tokens;             /* what one sequence may hold at most: ≤ max_context */
    int32_t seqs;               /* sequences of usual length at once: for the summary */
} sh_kv_plan;
sh_status sh_plan_kv_limits(const Shoal__Plan *p, sh_kv_limits *out);
/* Pages for one stage [first, last) with `budget` bytes. SH_EMEMORY names the least that would do. */
sh_status sh_plan_kv(const sh_config *c, const sh_kv_limits *l, int first, int last, uint64_t budget, sh_kv_plan *out);
/* Pages for all stages of a plan that decode: the best that fits the budget [n_rank] of each. */
sh_status sh_plan_kv_group(const sh_config *c, const sh_kv_limits *l, const Shoal__Plan *p, const uint64_t *budget,
                           sh_kv_plan *out);
/* The same for the ranks that make the K/V of prompts; there must be some. */
sh_status sh_plan_kv_prefill(const sh_config *c, const sh_kv_limits *l, const Shoal__Plan *p, const uint64_t *budget,
                             sh_kv_plan *out);
/* Bytes that a stage's pool takes with these pages. */
uint64_t sh_plan_kv_bytes(const sh_config *c, sh_kv_type type, int first, int last, const int32_t pages[SH_KV_KINDS]);

/* Memory of one rank, before anything is allocated. */
typedef struct sh_plan_memory {
    uint64_t weights; /* exact */
    uint64_t scratch; /* activations, logits, message buffers: an estimate from above */
    uint64_t reserve; /* left alone: the program, MPI, page tables */
} sh_plan_memory;
/* threads: that the rank has; 0: what the plan says, else 16. */
sh_plan_memory sh_plan_rank_memory(const sh_config *c, const Shoal__Plan *p, int rank, int threads);
/* The KV budget of a rank that may use `available` bytes: plan.kv_memory where given, else what is left. threads: as
 * above. SH_EMEMORY says what the rank needs and has. */
sh_status sh_plan_kv_budget(const sh_config *c, const Shoal__Plan *p, int rank, int threads, uint64_t available,
                            uint64_t *out);

#endif
