/*
 * What a step costs: seconds by cause, bytes on links and bytes of memory, for every rank of a plan. Pure functions of
 * the model's configuration, a plan, what the cores and links can do, and the rows of a micro-batch: no files, no MPI,
 * no clock, no randomness. Formulas with their reasons: docs/planning.md; sources: gemma4-text §2.5–2.9.
 *
 *   sh_cost_layer_of   one rank, one layer, one micro-batch: the finest grain, for simulations and for sleeping kernels
 *   sh_cost_step       all ranks that decode, one micro-batch: the layers of each, head, sampler, the block that
 *                      crosses the cut; ranks that only read prompts are prefill_cost.h's
 *   sh_cost_forecast   a workload in steady state: tokens/s, shares of time, traffic (forecast.h)
 *
 * Numbers of rows may be fractions: they are averages. Times are those of one micro-batch that meets no other; what
 * several in flight do to each other is sh_cost_ring's (forecast.h).
 */
#ifndef SH_PARTITION_COST_H
#define SH_PARTITION_COST_H

#include "partition/plan.h"
#include "partition/routing.h"
#include "partition/workload.h"

/* --- what a rank and its links can do ------------------------------------------------------------------------------
 */

#define SH_COST_FEW      6  /* numbers of rows whose rate is measured: 1 << i, and … */
#define SH_COST_MANY     64 /* … that of the …_fma below */
#define SH_COST_FEW_MOST 16 /* of that rate: where reading hides all there is no telling */

/* Of attention over pages of one KV type; shares as of weights, a row being a query that meets a key. */
typedef struct sh_cost_attention {
    double read, fma; /* scores and weighted sums */
    double both, few[SH_COST_FEW];
    double formed; /* rows more that forming keys from values (K = V) costs */
} sh_cost_attention;

typedef struct sh_cost_rates {
    double read; /* bytes/s that the rank's cores read from memory together */
    double fma;  /* f32 operations/s of the same cores, a multiply-add counting as two */
    /* Shares of these that the kernels reach, and what is left over */
    double weights_read, weights_fma; /* products with weights */
    double q8_read, q8_fma;           /* of 8-bit weights; 0: weights_read, weights_fma × SH_COST_INT8 */
    double q4_read, q4_fma;           /* of 4-bit weights; the same */
    double weights_both, q8_both,
        q4_both; /* of reading and computing, the part of the shorter that adds to the longer */
    /* Rows of many that take as long to compute as 1, 2, 4, … 32; 0: that many */
    double weights_few[SH_COST_FEW], q8_few[SH_COST_FEW], q4_few[SH_COST_FEW];
    sh_cost_attention attention, attention_q8; /* pages of bf16, and of f32 too; of q8: read 0: as attention */
    double layer;   /* seconds of each layer whatever its rows: starting and joining threads */
    double sample;  /* seconds per sampled row and entry of the vocabulary, of one thread */
    double threads; /* of the rank; 0: one */
} sh_cost_rates;

typedef struct sh_cost_link {
    double latency;   /* seconds for a message of no bytes */
    double bandwidth; /* bytes/s in each direction; between nodes: of a node, shared by its ranks */
} sh_cost_link;

typedef struct sh_cost_net {
    sh_cost_link within, between; /* ranks of one node; ranks of two */
    int ranks_per_node;           /* rank r of a group is on its node r / ranks_per_node */
} sh_cost_net;

typedef struct sh_cost_model {
    const sh_config *config;
    const Shoal__Plan *plan;    /* checked; all borrowed */
    const sh_cost_rates *rates; /* [plan->n_rank], or [1] with `alike` */
    bool alike;                 /* all ranks have rates[0] */
    sh_cost_net net;
    const sh_routing *routing; /* counted in a run: how often each expert is chosen; NULL: all alike */
    double prompts;            /* that the pages of ranks which only read them hold at once; 0: enough */
} sh_cost_model;

/* --- rows ----------------------------------------------------------------------------------------------------------
 */

/* Spans of a micro-batch that are alike. With ep > 1 a micro-batch is one lane's, and all lanes have the same. */
typedef struct sh_cost_span {
    double seqs;       /* how many */
    double rows, kept; /* of each: rows at consecutive positions, the last `kept` of which go to the sampler */
    double lo, hi;     /* position of the first row: anywhere between, evenly */
    double tokens;     /* of the whole sequence, prompt and output, where it is longer than hi + rows */
} sh_cost_span;

/* --- one layer -----------------------------------------------------------------------------------------------------
 */

typedef struct sh_cost_part {
    double bytes; /* read from memory */
    double flops; /* 2 per multiply-add */
    double seconds;
} sh_cost_part;

/* What one member sends to the other members of its stage, all together; it receives as much on average. */
typedef struct sh_cost_wire {
    double messages, bytes, seconds;
} sh_cost_wire;

/* In the order of their happening. Rows travel to experts beside `dense`. A step whose lanes have many rows is cut into
 * two parts (sh_cost_parts), and the exchange of one travels while the other computes. */
typedef struct sh_cost_layer {
    sh_cost_part project;   /* products with q, k, v, o */
    sh_cost_part attention; /* scores, softmax, weighted sums */
    sh_cost_part router;    /* product with the router */
    sh_cost_wire dispatch;  /* ep: rows to the owners of their experts */
    sh_cost_part dense;     /* gate, up, down of the dense branch */
    sh_cost_part experts;   /* those that this rank owns, for the rows of all members */
    sh_cost_wire results;   /* ep: one row per chosen expert, back home */
    sh_cost_part ple;       /* per-layer embedding: three products */
    sh_cost_part rest;      /* norms, activations, starting threads */
    sh_cost_wire gather;    /* tp: all gathers of the layer, or with tp_sum its sums */
    sh_cost_wire context;   /* cp: K/V rows, queries, partial results */
    double hidden;          /* seconds of exchange behind which the rank computes */
    double exposed;         /* seconds of exchange in which it waits */
    double seconds;         /* computing and waiting */
    double experts_touched; /* expected number of own experts that some row chose */
} sh_cost_layer;

sh_status sh_cost_layer_of(const sh_cost_model *m, int rank, int layer, const sh_cost_span *span, int n_spans,
                           sh_cost_layer *out);

/* Seconds of each layer of ranks from, from + step, … below `to`, as sh_cost_layer_of has them, into seconds [layers of
 * the model]: those of the first members of all stages with step = the width of a stage. */
sh_status sh_cost_layers(const sh_cost_model *m, int from, int to, int step, const sh_cost_span *span, int n_spans,
                         double *seconds);

/* --- one step ------------------------------------------------------------------------------------------------------
 */

typedef enum sh_cause { SH_CAUSE_WEIGHTS, SH_CAUSE_ATTENTION, SH_CAUSE_EXPERTS, SH_CAUSE_OTHER, SH_CAUSES } sh_cause;

/* One rank, one micro-batch. */
typedef struct sh_cost_rank {
    sh_cost_part part[SH_CAUSES]; /* as StageTimes books them: weights has the dense matrices and the head */
    double memory_bound;          /* of the computing: seconds in which memory is the limit; the rest is arithmetic */
    sh_cost_wire dispatch, results, gather, context; /* inside the stage, over its layers */
    double hidden, exposed;                          /* of the exchange inside the stage */
    sh_cost_wire cut;                                /* the block to the same member of the next stage */
    sh_cost_wire head; /* tp, cp: to member 0, which samples: candidates, or final hidden states */
    double seconds;    /* of its stage: the slowest member of each layer, with waiting; cut not included */
    double waits;      /* of these: for other members that had more to do */
} sh_cost_rank;

/* out [ranks that decode]. */
sh_status sh_cost_step(const sh_cost_model *m, const sh_cost_span *span, int n_spans, sh_cost_rank *out);

/* Adds to *seconds what head and sampler take on a rank of the last stage: for n_decode of the spans in a share
 * 1 − mixed of the micro-batches, for all n_spans in the rest. */
sh_status sh_cost_head(const sh_cost_model *m, int rank, const sh_cost_span *span, int n_decode, int n_spans,
                       double mixed, double *seconds);

/* --- traffic, in bytes, headers aside ------------------------------------------------------------------------------
 */

/* The block that crosses the cut before layer `cut`: what sh_model_cut_bytes says. */
double sh_cost_cut_bytes(const sh_config *c, sh_kv_type kv, int cut, double rows, double kept);
#define SH_COST_INT8       2.8 /* rate of 8-bit products over that of f32: docs/performance.md */
#define SH_COST_SPLIT_ROWS 128 /* SH_EXPERTS_SPLIT_ROWS of worker/experts.h; a test compares */
/* Columns, outputs or ids of n that member m of w has (tp), in whole units: sh_share_range. */
int sh_cost_share(int n, int unit, int m, int w);

#endif
