/*
 * One member of one stage of the pipeline: layers [first, last) of the model on one micro-batch after the other, in
 * order. Takes [descriptor | cut block] from the same member of the stage before, sends the same to that of the next;
 * members of the first stage get descriptors from rank 0. The last stage samples and sends tokens to rank 0: every
 * member where members are lanes (worker/lanes.h), else member 0. Knows nothing of scheduling or of the coordinator.
 * All buffers are made at creation: a step allocates nothing.
 */
#ifndef SH_WORKER_STAGE_H
#define SH_WORKER_STAGE_H

#include "model/gemma4.h"
#include "model/sampler.h"
#include "proto/link.h"
#include "proto/group.pb-c.h"
#include "worker/experts.h"
#include "worker/kv_stream.h"
#include "worker/ranks.h"

typedef struct sh_stage sh_stage;

typedef struct sh_stage_options {
    const char *model_dir;
    const sh_config *config; /* borrowed for the stage's life */
    sh_mode mode;
    sh_kv_type kv_type;
    int first, last; /* layers */
    int threads;
    const int *cpus;
    int n_cpus;
    const sh_leader_options *schedule; /* the same on every rank: bounds of a lane's micro-batch, pages */
    int stages, width;                 /* rank r is member r % width of stage r / width */
    bool lanes;                        /* each member has micro-batches of its own; else all have the same */
    bool spread;                       /* the members share positions out; schedule->members of them */
    sh_share share;                    /* parts > 1: the members divide heads, columns and vocabulary */
    const Shoal__Plan *plan;           /* borrowed; with lanes: which member holds which experts */
    sh_link *link;                     /* borrowed */
    /* With ranks that make the K/V of prompts (worker/kv_stream.h); else NULL. root is the rank of the first stage: 0,
     * or the first of those ranks, whose stages have a config with kv_end. */
    int root;
    const sh_kv_stream_options *stream;
    /* All ranks load their weights together; alive is asked while they wait for each other, and may be NULL. */
    bool load_together;
    const sh_alive *alive;
    sh_load_told *load_told; /* how loading gets on; NULL: nobody asks */
    void *load_arg;
    sh_timeline *timeline; /* where its steps' time goes; NULL: off. Borrowed */
} sh_stage_options;
/* Micro-batches of a step: one per lane. */
static inline int sh_stage_lanes(const sh_stage_options *o) {
    return o->lanes ? o->width : 1;
}

/* Loads the stage's weights and reserves its KV pages and buffers. */
sh_status sh_stage_create(const sh_stage_options *o, sh_stage **out);
void sh_stage_destroy(sh_stage **s);

/* Polls a receiver of K/V rows also while a step computes, about every 100 µs. Borrowed for the stage's life; what goes
 * wrong there is told by the next sh_stage_progress. */
void sh_stage_take_rows(sh_stage *s, sh_kv_receiver *r);
/* Frees the buffers of sends that are done: progress of the link. */
sh_status sh_stage_progress(sh_stage *s);
/* Whether a step can start without waiting for the next stage to take an earlier one. Rank 0 asks before each step. */
bool sh_stage_has_room(const sh_stage *s);
bool sh_stage_is_idle(const sh_stage *s); /* no send of its own is open */

/* Rank 0: hands out the micro-batches [lanes] of a step and runs its own. In a pipeline of one stage the answer to that
 * is taken by sh_stage_answer at once. */
sh_status sh_stage_lead(sh_stage *s, const sh_batch *batches);
/* Rank 0: whether a micro-batch of prompts can leave for the first prefill rank without waiting; sends one. */
bool sh_stage_has_room_for_prompts(const sh_stage *s);
sh_status sh_stage_send_prompts(sh_stage *s, const sh_batch *b);
/* Ranks above 0: takes one micro-batch if one has come (*got); then serve runs it. */
sh_status sh_stage_receive(sh_stage *s, bool *got);
sh_status sh_stage_serve(sh_stage *s);
/* Rank 0: an answer of the last stage, if one has come, and of which lane. *tokens is borrowed until the next call. */
sh_status sh_stage_answer(sh_stage *s, bool *got, int *lane, uint64_t *step, const sh_token **tokens, int *n);

double sh_stage_received_at(const sh_stage *s);      /* when the last micro-batch began to come in */
double sh_stage_exchange_seconds(const sh_stage *s); /* in and around the link, waiting for the next stage included */
sh_experts_times sh_stage_experts_time(const sh_stage *s); /* zeros where experts are not divided */
uint64_t sh_stage_steps(const sh_stage *s);                /* micro-batches finished */
sh_kv_pool *sh_stage_kv(sh_stage *s);
const sh_model *sh_stage_model(const sh_stage *s);

#endif
