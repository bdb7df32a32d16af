/*
 * A micro-batch: the rows that travel together through all stages. Decode steps and prompt chunks are the same thing, a
 * span of consecutive positions of one sequence. The descriptor is all a stage needs: it names the KV pages of every
 * span and tells the sampler which sequences begin and end. The leader makes it; it is encoded once and travels with
 * the activations.
 */
#ifndef SH_MODEL_BATCH_H
#define SH_MODEL_BATCH_H

#include "common/buf.h"
#include "common/mem.h"
#include "model/config.h"
#include "model/owner.h"
#include "model/sampling.h"

typedef struct sh_span {
    uint64_t seq;  /* the leader's number for the sequence; never reused within a group's life */
    int32_t pos;   /* absolute position of the first row */
    int32_t rows;  /* ≥ 1 */
    int32_t keep;  /* the last `keep` rows go through every layer and to the sampler; the others only make K/V */
    int32_t row0;  /* first row in the batch */
    int32_t kept0; /* first kept row among the batch's kept rows */
    int32_t level; /* of the blocks by which members share its global positions out (owner.h) */
    /* Pages per kind: pages[kind][i] is the pool page of the sequence's page page0[kind] + i; a global page is one of
     * the pool of the member that stores it. Sliding pages before the window are gone, so page0 moves on. Covers every
     * position this span reads or writes. */
    int32_t page0[SH_KV_KINDS], n_pages[SH_KV_KINDS];
    const int32_t *pages[SH_KV_KINDS]; /* borrowed from the batch */
} sh_span;

/* What the sampler must know when a sequence starts or resumes: see sampler.h. */
typedef struct sh_seq_start {
    uint64_t seq;
    const sh_sampling *sampling; /* borrowed from the batch */
    const int32_t *tokens;       /* prompt, then tokens generated so far */
    int32_t n_prompt, n_tokens;
} sh_seq_start;

/* Where the K/V rows that a span makes go besides its own pages: into the decode pool of another rank, as shards
 * (worker/shard.h). Positions [from[kind], pos + rows) travel; none where that is empty. */
typedef struct sh_handoff {
    int32_t from[SH_KV_KINDS]; /* pos ≤ from ≤ pos + rows */
    int32_t page0[SH_KV_KINDS],
        n_pages[SH_KV_KINDS];          /* as in a span, of the pool that they go to; they hold the rows */
    const int32_t *pages[SH_KV_KINDS]; /* borrowed from the batch */
} sh_handoff;

typedef struct sh_batch {
    uint64_t step; /* number of the micro-batch, ascending */
    int32_t n_rows, n_kept, n_spans, n_starts, n_drops;
    /* Most rows and kept rows among the batches that the members of a stage run in this step: so they agree on how
     * often they exchange rows. 0: no other has more than this one. */
    int32_t widest_rows, widest_kept;
    int32_t *ids; /* [n_rows] token ids */
    sh_span *spans;
    sh_seq_start *starts;
    uint64_t *drops; /* sequences whose sampler state ends */
    /* Of prompts whose K/V are made here for other ranks: one per span, or none at all. A rank that takes their rows
     * must have done its micro-batch `after` before, the last one that may still read what the pages held. */
    int32_t n_handoffs;
    uint64_t after;
    sh_handoff *handoffs;
    sh_arena arena; /* holds all of the above */
} sh_batch;

/* A batch with room for `bytes` of descriptor; reused by decode and by the leader for every step, without allocation.
 */
sh_status sh_batch_create(size_t bytes, sh_batch *out);
void sh_batch_release(sh_batch *b);
/* Appends the descriptor to `to` (its layout is in docs/protocol.md; little-endian; starts with a length and a magic).
 */
sh_status sh_batch_encode(const sh_batch *b, sh_buf *to);
/* Reads a descriptor; everything is checked against its length and against the limits; *used gets its bytes. */
sh_status sh_batch_decode(sh_batch *b, const void *data, size_t len, size_t *used);

#endif
