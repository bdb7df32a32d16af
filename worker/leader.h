/*
 * The scheduler of a group: which rows of which sequences travel next, and in which KV pages. Continuous batching with
 * chunked prompts: a micro-batch holds decode rows of running sequences and chunks of prompts; as many are in flight as
 * there are stages. Pure: no I/O, no clock, no randomness; it allocates nothing but when a sequence arrives.
 *
 *   sh_leader_add / _cancel        what the coordinator wants
 *   sh_leader_next                 makes the next micro-batch, if there is something to do and room in flight
 *   sh_leader_apply                takes what the last stage answered to the oldest micro-batch in flight
 *   sh_leader_next_prompts, _confirm  the same for the prefill pipeline, where there is one (worker/prefill.h)
 *
 * Why its books are right:
 *   1. A page belongs to one sequence, or, full and never written again, to all that begin alike (worker/prefix.h).
 * Every stage handles micro-batches in order, so a page given back while micro-batch n is made may be written by n
 * already (the sequence that gave it back does not read it in n) and later.
 *   2. A prompt is admitted when pages for all of it are open; they are promised to it until taken. Decode takes open
 * pages only, and pauses the youngest running sequence when there are none; so the oldest always gets on, and alone it
 * fits (sh_leader_check).
 *   3. Sequences are served and admitted by age; nobody overtakes a waiting one.
 * Nothing of this can enter a result: rows computed again give the same bytes, and random numbers depend on positions.
 */
#ifndef SH_WORKER_LEADER_H
#define SH_WORKER_LEADER_H

#include "worker/pages.h"
#include "worker/seq.h"

typedef struct sh_leader_options {
    int stages;
    int in_flight;   /* micro-batches at once; 0: as many as stages */
    int max_seqs;    /* sequences running at once */
    int chunk;       /* prompt rows of a micro-batch, at most */
    int max_context; /* tokens of one sequence */
    int vocab;
    int window;                         /* widest window of the sliding layers; 0 when there are none */
    bool kind[SH_KV_KINDS];             /* kinds that the model's layers use */
    int32_t pages[SH_KV_KINDS];         /* the pool: the smallest stage's */
    int members;                        /* of a stage that share positions out (model/owner.h): each has a pool of
                                           global pages of that size, and all have the same sliding ones. 0: 1 */
    int prefill;                        /* stages that make the K/V of prompts; 0: none, the others do it */
    int confirms;                       /* ranks that take such rows and say so */
    int32_t prefill_pages[SH_KV_KINDS]; /* the pool of those stages */
    bool share;                         /* sequences that begin alike share pages, where that is possible (prefix.h) */
    int n_placeholders;                 /* ids that stand for what they do not name: images, sound */
    int32_t placeholder[3];
} sh_leader_options;

/* Window, kinds, vocabulary, placeholders from the model; the rest is left as it is. */
void sh_leader_options_model(sh_leader_options *o, const sh_config *c);
/* Upper bounds that every rank sizes its buffers by. */
static inline int sh_leader_max_rows(const sh_leader_options *o) {
    return o->max_seqs + o->chunk;
}
static inline int sh_leader_in_flight(const sh_leader_options *o) {
    return o->in_flight > 0 ? o->in_flight : o->stages;
}
size_t sh_leader_descriptor_bytes(const sh_leader_options *o);
/* Tokens that one sequence can hold at most. */
int32_t sh_leader_capacity(const sh_leader_options *o);
/* Tokens of KV of all sequences together: of the kind whose pages stay (global), or of the sliding kind when there is
 * no other. */
int64_t sh_leader_total(const sh_leader_options *o);
/* Pages of a kind that a sequence of n tokens holds at most at any time in one pool. */
int32_t sh_leader_peak(const sh_leader_options *o, sh_kv_kind kind, int32_t n);

typedef struct sh_leader sh_leader;
sh_status sh_leader_create(const sh_leader_options *o, sh_leader **out);
void sh_leader_destroy(sh_leader **l);
/* SH_ELIMIT with a sentence for the user when the sequence can never run here. */
sh_status sh_leader_check(const sh_leader *l, const sh_seq *s);
/* Takes a sequence (checked) into the queue. One with a key that is known already is dropped: *known. Consumes *s. */
sh_status sh_leader_add(sh_leader *l, sh_seq **s, bool *known);
bool sh_leader_knows(const sh_leader *l, uint64_t key);
/* Tokens at the start of s whose pages others have filled: rows that it need not compute here, about. */
int32_t sh_leader_shared(const sh_leader *l, sh_seq *s);
/* Rows that its sequences still need at most: the load that a new one would join. */
int64_t sh_leader_rows_to_go(const sh_leader *l);
void sh_leader_cancel(sh_leader *l, uint64_t key); /* unknown: nothing happens */

/* Makes the next micro-batch in b (made by sh_batch_create with sh_leader_descriptor_bytes). *made false: nothing to do
 * now. What b borrows is valid until the next call on this leader. */
sh_status sh_leader_next(sh_leader *l, sh_batch *b, bool *made);
/* Applies the answer to the oldest micro-batch in flight, which must have this step number. emit is called with each
 * new token and each new prompt score, in order. SH_EPEER when the answer does not fit the question. */
sh_status sh_leader_apply(sh_leader *l, uint64_t step, const sh_token *tokens, int n,
                          void (*emit)(void *arg, uint64_t key, const sh_token *t), void *arg);

/* Makes the next micro-batch for the prefill pipeline, with hand-offs; steps are counted apart. As sh_leader_next. */
sh_status sh_leader_next_prompts(sh_leader *l, sh_batch *b, bool *made);
/* One rank's word that the rows of that micro-batch are in its pages, or (ok false) that some came damaged: then they
 * are made again. SH_EPEER when no such word is due. */
sh_status sh_leader_confirm(sh_leader *l, uint64_t step, bool ok);

typedef struct sh_leader_state {
    int running, waiting, in_flight;
    int prompts_out; /* micro-batches in the prefill pipeline, or not yet confirmed */
    int64_t kv_free; /* tokens' worth of open pages: of the global kind where there is one, over all members */
    uint64_t pauses; /* sequences paused for want of pages, since creation */
    uint64_t shared; /* prompt rows that were not computed since others had filled their pages */
    uint64_t redone; /* times that rows of a prompt were made again */
    int32_t free[SH_KV_KINDS], prefill_free[SH_KV_KINDS];
} sh_leader_state;
sh_leader_state sh_leader_look(const sh_leader *l);
/* Checks the books (tests): every page's holders, promises add up. */
sh_status sh_leader_audit(const sh_leader *l);

#endif
