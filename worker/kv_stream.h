/*
 * K/V rows of prompts on their way from the ranks that make them to the ranks that decode, layer by layer while later
 * layers still compute (docs/decisions/0017-prefill-and-decode.md). For every micro-batch of the prefill pipeline,
 * every stage of it sends one message per layer to each rank that stores this layer: an envelope, then a shard per span
 * whose rows travel (worker/shard.h). A layer of which nothing travels has an empty message, so that who receives knows
 * which one comes next, also when it cannot read it. All buffers are made at creation: a step allocates nothing.
 */
#ifndef SH_WORKER_KV_STREAM_H
#define SH_WORKER_KV_STREAM_H

#include "model/batch.h"
#include "model/kv.h"
#include "partition/plan.h"
#include "proto/link.h"
#include "worker/leader.h"

typedef struct sh_kv_stream_options {
    sh_link *link;           /* borrowed, as are config, plan and schedule */
    const sh_config *config; /* the whole model */
    const Shoal__Plan *plan; /* ranks [0, n_rank − prefill) decode, the others make K/V */
    const sh_leader_options *schedule;
    sh_kv_type type;
    uint64_t model; /* fingerprint of checkpoint, mode and KV type */
} sh_kv_stream_options;

/* Whether rank `rank` of a plan stores K/V of producer `layer` for decode. */
bool sh_kv_stream_holds(const sh_kv_stream_options *o, int rank, int layer);

/* ---- on a prefill rank --------------------------------------------------------------------------------------------
 */

typedef struct sh_kv_sender sh_kv_sender;
sh_status sh_kv_sender_create(const sh_kv_stream_options *o, sh_kv_sender **out);
void sh_kv_sender_destroy(sh_kv_sender **s);
/* The micro-batch that the pool's next rows are of. Both borrowed until the next call. */
void sh_kv_sender_begin(sh_kv_sender *s, const sh_kv_pool *pool, const sh_batch *b);
/* sh_peers' kv_written, with the sender as ctx: copies the rows that travel and starts sending. Waits while all
 * buffers are on their way. */
sh_status sh_kv_sender_written(void *sender, int layer);
sh_status sh_kv_sender_progress(sh_kv_sender *s);
bool sh_kv_sender_is_idle(const sh_kv_sender *s);

/* ---- on a rank that decodes ---------------------------------------------------------------------------------------
 */

typedef struct sh_kv_receiver sh_kv_receiver;
sh_status sh_kv_receiver_create(const sh_kv_stream_options *o, sh_kv_pool *pool, sh_kv_receiver **out);
void sh_kv_receiver_destroy(sh_kv_receiver **r);
/* Between steps and in them: moves what has come into the pool, where `done` (the last micro-batch that this rank has
 * decoded) lets it: no later one reads those pages before rank 0 has heard; tells rank 0 of each prefill micro-batch
 * that all its rows are here, or that some were damaged. *worked: something moved. SH_EPEER when a message is whole and
 * wrong. Never waits. */
sh_status sh_kv_receiver_poll(sh_kv_receiver *r, uint64_t done, bool *worked);
bool sh_kv_receiver_is_idle(const sh_kv_receiver *r); /* no buffer is in the link's hands */
/* Rank 0: the next word of any rank, itself included, on a micro-batch. */
sh_status sh_kv_receiver_landed(sh_kv_receiver *r, bool *got, uint64_t *step, bool *ok);

#endif
