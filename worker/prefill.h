/*
 * The schedule of a prefill pipeline: ranks of a group that make the K/V rows of prompts for the ranks that decode
 * (docs/decisions/0017-prefill-and-decode.md). It has a page pool of its own; rows that it made leave as shards into
 * pages of the decode pool, which the leader gives out. Part of the leader, and as pure: no I/O, no clock; nothing is
 * allocated but when a sequence arrives.
 *
 * Rows [0, n_tokens − 1) of a sequence are made here, the last known token is a decode row. A micro-batch lands when
 * every rank that decodes has confirmed its rows; they do so in order. Pages of both pools stay a sequence's own while
 * micro-batches of it are out, whatever becomes of it: rows that nobody wants any more are still written.
 */
#ifndef SH_WORKER_PREFILL_H
#define SH_WORKER_PREFILL_H

#include "worker/leader.h"

typedef struct sh_prefill sh_prefill;

sh_status sh_prefill_create(const sh_leader_options *o, sh_prefill **out);
void sh_prefill_destroy(sh_prefill **p);
/* Micro-batches out at once: one per stage, and one whose rows are being confirmed. */
static inline int sh_prefill_in_flight(const sh_leader_options *o) {
    return o->prefill + 1;
}
/* Pages of a kind that a sequence holds at most while n rows of it are made. */
int32_t sh_prefill_peak(const sh_leader_options *o, sh_kv_kind kind, int32_t n);
/* Memory for the page tables of a sequence that arrives. */
sh_status sh_prefill_prepare(const sh_prefill *p, sh_seq *s);
/* Whether the known rows of s are to be made here: there is more than the decode row, nobody wants logits of the
 * prompt, and the pool could hold it. */
bool sh_prefill_wants(const sh_prefill *p, const sh_seq *s);
/* Sets the pages aside that the rows of s need; false (and nothing done) when they are not open. */
bool sh_prefill_admit(sh_prefill *p, sh_seq *s);
/* Gives back what s holds here. No micro-batch of it may be out. */
sh_status sh_prefill_release(sh_prefill *p, sh_seq *s);

/* Makes the next micro-batch from sequences that are being handed over, oldest first. cover: holds pages of the decode
 * pool for positions below `end` of s, or those of them that travel. after: as in sh_batch. */
sh_status sh_prefill_next(sh_prefill *p, sh_seq **running, int n, uint64_t after,
                          sh_status (*cover)(void *arg, sh_seq *s, int32_t end), void *arg, sh_batch *b, bool *made);
/* One rank's word on a micro-batch: all rows in place, or some arrived damaged. SH_EPEER when none is expected. Then,
 * for each sequence in what has landed by it, in order: landed(). */
sh_status sh_prefill_confirm(sh_prefill *p, uint64_t step, bool ok, sh_status (*landed)(void *arg, sh_seq *s),
                             void *arg);
int sh_prefill_out(const sh_prefill *p); /* micro-batches out */
uint64_t sh_prefill_redone(const sh_prefill *p);
int32_t sh_prefill_free(const sh_prefill *p, sh_kv_kind kind); /* free pages */
/* Checks the books (tests), as sh_leader_audit: held by the sequences of a list, and by running ones. */
sh_status sh_prefill_audit(const sh_prefill *p, sh_seq *const *running, int n, const sh_seq *const *lists, int n_lists);

#endif
