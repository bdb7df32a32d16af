/*
 * What ranks that only read prompts cost (docs/decisions/0017-prefill-and-decode.md): one micro-batch of theirs, the
 * K/V rows that they send to the ranks that decode, and what taking these costs there. Pure functions, as in cost.h.
 *
 * Spans here are pieces of prompts without their last token, which is a decode row: rows at positions lo … of a
 * sequence of which hi + rows are to be made; nothing is kept.
 */
#ifndef SH_PARTITION_PREFILL_COST_H
#define SH_PARTITION_PREFILL_COST_H

#include "partition/cost.h"

/* Bytes/s at which one core copies K/V rows out of pages or into them and forms their checksum: measured, see
 * docs/planning.md, "Ranks that only read prompts". */
#define SH_COST_COPY_RATE 3.0e9

/* One rank that makes K/V, one micro-batch. */
typedef struct sh_cost_prompt_rank {
    sh_cost_rank step; /* its layers; cut: to the next of these ranks; seconds: computing alone */
    sh_cost_wire rows; /* K/V rows to the ranks that store them; bytes with envelopes and the heads of shards */
    double payload;    /* of these bytes: rows */
    double far;        /* of these bytes: to other nodes */
    double copying;    /* seconds of rows.seconds' other end: copying and checksums, while nothing is computed */
    double exposed;    /* seconds in which it computes nothing because its links are still at it */
} sh_cost_prompt_rank;

/* What one rank that decodes takes of that micro-batch. */
typedef struct sh_cost_taken {
    double messages, bytes;
    double far;     /* of the bytes: from other nodes */
    double seconds; /* copying and checksums, between its own products */
} sh_cost_taken;

/* rank [prefill], taken [decode]. SH_EINPUT when the plan has no such ranks. */
sh_status sh_cost_prompts(const sh_cost_model *m, const sh_cost_span *span, int n_spans, sh_cost_prompt_rank *rank,
                          sh_cost_taken *taken);
/* Seconds for which the links into the busiest node that decodes are at these rows. */
double sh_cost_taken_wire(const sh_cost_model *m, const sh_cost_taken *taken);
/* Whether rank d stores K/V of producer `layer`: some layer of its own reads them (sh_kv_stream_holds). */
bool sh_cost_stores(const sh_cost_model *m, int d, int layer);

#endif
