/*
 * A workload in steady state on a plan: how many rows travel together, how long that takes, tokens per second, and
 * where the time of each rank goes. Pure, deterministic; allocates and frees within the call.
 *
 * The leader keeps S sequences running. Each micro-batch has its share of them as decode rows; every request that ends
 * makes room for a prompt, whose rows come in pieces of at most a chunk. So there are two kinds of micro-batches, with
 * and without a piece of prompt, and their mixture follows from the lengths. sh_cost_ring sends them through the
 * stages. With ranks that only read prompts there are two pipelines: micro-batches of decode rows alone go round the
 * ring, prompts through the other ranks, and the slower side sets the pace (prefill_forecast.c).
 */
#ifndef SH_PARTITION_FORECAST_H
#define SH_PARTITION_FORECAST_H

#include "partition/cost.h"

#define SH_STEP_SECONDS   50e-6 /* of a micro-batch whatever it holds: schedule, descriptor, answer */
#define SH_FORECAST_SPANS (2 * SH_WORKLOAD_BINS)
#define SH_FORECAST_WIRES 6

/* What an average micro-batch of a lane holds. */
typedef struct sh_forecast_mix {
    double decode;                        /* decode rows */
    double piece;                         /* prompt rows of a micro-batch that has some */
    double mixed;                         /* share of micro-batches that have some; with ranks that only read prompts:
                                             micro-batches of theirs for each of the others */
    double in_flight;                     /* micro-batches at once */
    double requests;                      /* begun (and ended) per micro-batch */
    sh_cost_span span[SH_FORECAST_SPANS]; /* the first n_decode are decode rows */
    int n_decode, n_spans;
} sh_forecast_mix;
/* seqs: running in the group, over all lanes. */
sh_forecast_mix sh_forecast_mix_of(const Shoal__Plan *p, const sh_workload *w, double seqs);

/* Micro-batches going round: kinds 0 (share 1 − mixed) and 1, evenly strewn. seconds[kind·stages + stage], link the
 * same: the way to the next stage (the last one's back to the first). A stage and a link handle one at a time, in
 * order; the next micro-batch of a place in the ring begins when its answer is back. */
typedef struct sh_cost_cycle {
    double period;     /* seconds between two micro-batches that leave the last stage */
    double round_trip; /* seconds from a sequence's token to its next, on average */
    int slowest;       /* stage with most to do */
    double bubble;     /* share of its time in which that stage waits */
} sh_cost_cycle;
sh_status sh_cost_ring(int stages, const double *seconds, const double *link, double mixed, double in_flight,
                       sh_cost_cycle *out);

/* Of a rank that only reads prompts: for each micro-batch of decode rows what it does meanwhile. */
typedef struct sh_forecast_rank {
    double seconds[SH_CAUSES];      /* mean of a micro-batch, by cause */
    double exchange;                /* waiting for other ranks of the stage, theirs to compute and to send */
    double idle;                    /* waiting for a micro-batch */
    double memory_bound;            /* of the computing: memory is the limit */
    double sent[SH_FORECAST_WIRES]; /* bytes per micro-batch: dispatch, results, gather (head included), context, cut,
                                       K/V of prompts */
    double overlapped;              /* seconds of exchange that hide behind computing */
    double weight_bytes, kv_bytes;  /* read */
} sh_forecast_rank;
extern const char *const sh_forecast_wires[SH_FORECAST_WIRES];

/* The ranks that only read prompts, of one group; all 0 without them. */
typedef struct sh_forecast_prompts {
    double rows;    /* per second that they can make, in full chunks */
    double needed;  /* per second that the others ask for when prompts never keep them waiting */
    double period;  /* seconds between two of their micro-batches that follow each other closely */
    double first;   /* seconds from a sequence's admission until its last token becomes a decode row */
    double handing; /* sequences that they have in hand, on average */
    double exposed; /* seconds of a micro-batch in which the busiest of them waits for its links */
    bool slower;    /* they set the pace */
} sh_forecast_prompts;

typedef struct sh_forecast {
    double tokens_out, tokens_in, requests; /* per second, all replicas */
    double seconds;                         /* for the workload's requests */
    double seqs;                            /* running in a group */
    sh_forecast_mix mix;
    sh_cost_cycle cycle;
    double step_decode, step_mixed; /* seconds of the slowest stage without and with a piece of prompt */
    double sent;                    /* bytes on links per token put out, all ranks of a group */
    sh_forecast_prompts prompts;
} sh_forecast;
/* rank [n_rank] may be NULL. */
sh_status sh_cost_forecast(const sh_cost_model *m, const sh_workload *w, double seqs, double replicas, sh_forecast *out,
                           sh_forecast_rank *rank);

#endif
