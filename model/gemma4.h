/*
 * The decoder: layers [first, last) on a micro-batch. One path for every variant, for prompts and decode alike. Knows
 * no rank; a layer that is cut across ranks asks `peers` (peers.h; NULL: alone).
 */
#ifndef SH_MODEL_GEMMA4_H
#define SH_MODEL_GEMMA4_H

#include "common/timeline.h"
#include "model/kv.h"
#include "model/peers.h"
#include "model/weights.h"

typedef struct sh_model sh_model;

typedef struct sh_model_options {
    sh_mode mode;
    sh_kv_type kv_type;
    int first, last; /* layers of this stage */
    int threads;
    const int *cpus; /* CPUs to bind to; NULL: none */
    int n_cpus;
    int max_rows; /* rows of the largest micro-batch, all members' together */
    int max_spans;
    int max_context;
    int32_t pages[SH_KV_KINDS]; /* KV pool */
    sh_share share;             /* heads and columns of each layer that are this member's; {0}: all */
    const sh_peers *peers;      /* NULL: alone; borrowed */
    sh_load_peers *load_peers; /* with whom weights are loaded together; NULL: alone. Borrowed until creation is over */
    sh_load_told *load_told;   /* how loading gets on; NULL: nobody asks */
    void *load_arg;
} sh_model_options;

/* Loads weights and reserves KV and scratch. */
sh_status sh_model_create(const char *model_dir, const sh_config *c, const sh_model_options *o, sh_model **out);
void sh_model_destroy(sh_model **m);

/*
 * What crosses the cut before layer `cut`, for a batch of n_rows rows of which n_kept are kept: one block of bytes
 *   x   f32 [rows here, hidden]       rows here: n_rows, or n_kept when cut ≥ first_shared
 *   x0  f32 [rows here, hidden]       scaled embeddings, when P > 0 (later stages make their per-layer inputs from it)
 *   kv  per crossing producer, ascending: [n_rows][sh_kv_row_bytes], rounded to the KV type
 * 0 for cut 0 (nothing comes in) and for cut kv_end where only K/V are made; f32 [n_kept, hidden] for cut n_layers (the
 * final output). c as the member sees it (sh_config_share): the KV heads that cross are its own.
 */
size_t sh_model_cut_bytes(const sh_config *c, sh_kv_type type, int cut, int n_rows, int n_kept);
/* The same for one batch (which need not be checked yet) on a model whose members share positions out: rows are those
 * that this member computes, K/V rows those that it stores. Each member sends to its like in the next stage. */
size_t sh_model_block_bytes(const sh_model *m, int cut, const sh_batch *b);

/* Runs the stage. in: the block of this stage's first cut (NULL at layer 0). out: room for the block of its last cut,
 * or, when the stage ends the model, f32 [n_kept, hidden] after the final norm (where positions are shared out, member
 * 0 gets them; NULL where only K/V are made and the stage is the last). in must stay as it is until the return; in and
 * out do not overlap. A batch that this stage cannot run (limits, ids, pages) is refused before anything is computed.
 * Allocates nothing. Collective among members. */
sh_status sh_model_forward(sh_model *m, const sh_batch *b, const void *in, void *out);
/* Soft-capped logits [n, vocab] of n rows of that final output. Last stage only. A share has those of its ids alone:
 * [n, sh_model_ids(m)]. */
sh_range sh_model_ids(const sh_model *m);
void sh_model_logits(sh_model *m, const float *hidden, int n, float *logits);

/* Optional observers for tests and tracing: called after each layer (−1: the embeddings) with the rows' hidden states
 * [n, hidden], and with the router's choices (ids, weights [n, top_k]). All come once per part of at most 512 rows of a
 * layer, in order of the rows. */
typedef struct sh_model_probe {
    void *arg;
    void (*hidden)(void *arg, int layer, const float *x, int n, int hidden);
    void (*router)(void *arg, int layer, const int32_t *ids, const float *weights, int n, int top_k);
    /* per-layer embeddings [n, width] */
    void (*ple)(void *arg, int layer, const float *ple, int n, int width);
} sh_model_probe;
void sh_model_set_probe(sh_model *m, const sh_model_probe *p); /* NULL: off; p is copied */

/* Seconds spent by cause since creation. */
typedef struct sh_model_times {
    double weights, attention, experts, other, exchange; /* exchange: what peers do */
} sh_model_times;
sh_model_times sh_model_time(const sh_model *m);
/* Every piece of that time as a slice, too; NULL: off. Borrowed. */
void sh_model_set_timeline(sh_model *m, sh_timeline *t);
/* How often rows here chose each expert, since creation: [layers here, experts]; NULL: no experts. */
const uint64_t *sh_model_chosen(const sh_model *m);
/* Rows that experts here computed since creation, a row once per expert, other members' rows included. */
uint64_t sh_model_expert_rows(const sh_model *m);
const sh_kernels *sh_model_kernels(const sh_model *m);
sh_team *sh_model_team(sh_model *m);
size_t sh_model_weight_bytes(const sh_model *m);
sh_load_times sh_model_load(const sh_model *m); /* what loading the weights took */
sh_kv_pool *sh_model_kv(const sh_model *m);

#endif
