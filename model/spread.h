/*
 * One member's part in a stage that shares positions out (context parallelism, docs/decisions/0016). A member computes
 * its share of the micro-batch's rows. K/V rows go to whoever stores them: those of sliding layers to every member,
 * those of global layers to the owner of their position (owner.h). In global layers queries visit the owners, which
 * answer with one partial per block of segments; the row's member joins them along the tree. Says what travels and in
 * what order; who carries it is behind peers.h. Collective among the members: each calls the same functions in the same
 * order.
 */
#ifndef SH_MODEL_SPREAD_H
#define SH_MODEL_SPREAD_H

#include "common/timeline.h"
#include "model/attention.h"
#include "model/peers.h"

typedef struct sh_spread sh_spread;

/* For micro-batches of at most max_rows rows in max_spans spans, through layers [first, last). Borrowed: all. */
sh_status sh_spread_create(const sh_config *c, int first, int last, int max_rows, int max_spans, sh_kv_pool *kv,
                           sh_attention *a, const sh_kernels *kn, const sh_context_peers *peers, sh_spread **out);
void sh_spread_destroy(sh_spread **x);
/* Rows of the largest micro-batch that one member computes; bytes of the longest message between two members. */
int sh_spread_rows(int max_rows, int members);
size_t sh_spread_message_bytes(const sh_config *c, sh_kv_type type, int first, int last, int max_rows, int members);

/* The batch at hand, and whether all its rows are here or the kept ones. The batch is borrowed. */
void sh_spread_view(sh_spread *x, const sh_batch *b, bool kept);
/* Takes K and V of this member's row r (k, v as for sh_kv_write), rounded to the KV type, until sh_spread_attend. Rows
 * may come from several threads. */
void sh_spread_put(sh_spread *x, int layer, int r, const float *k, const float *v);
/* As sh_attention_run for this member's rows; first every member's K/V rows come into the pages. */
sh_status sh_spread_attend(sh_spread *x, int layer, const float *k_norm, const sh_rope *rope, const sh_attn_rows *spans,
                           int n_spans, float *q);
/* Waiting as slices, too; NULL: off. Borrowed. */
void sh_spread_set_timeline(sh_spread *x, sh_timeline *t);
/* Seconds spent waiting for others since the last call. */
double sh_spread_waited(sh_spread *x);
/* Member 0: out gets everybody's rows [n, width] in order; the others' rows go there. */
sh_status sh_spread_gather(sh_spread *x, const float *rows, int width, float *out);

#endif
