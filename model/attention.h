/*
 * Attention over pages: softmax(q·k) v with scale 1 for the rows of a micro-batch, prompts and decode alike.
 *
 * The order of the arithmetic is part of the definition (docs/decisions/0003). Keys fall into segments of
 * SH_SEGMENT_TOKENS aligned to absolute positions. Each segment gives its own (m, l, o) from the keys that the row sees
 * in it; segments join along the binary tree of absolute segment numbers, an empty one being the exact identity. So a
 * row's result does not depend on its batch mates, on how a prompt was cut into chunks, on the rows or heads that share
 * a tile, nor on which thread did which segment. Source: gemma4-text §4.4, §4.5; reference attend_part() and merge().
 */
#ifndef SH_MODEL_ATTENTION_H
#define SH_MODEL_ATTENTION_H

#include "model/kv.h"
#include "model/rope.h"
#include "model/team.h"

/* Rows of one span that attend: rows [row, row+n) of q, at positions [pos, pos+n). */
typedef struct sh_attn_rows {
    const sh_span *span;
    int row, n, pos;
} sh_attn_rows;

/* The rows, or kept rows, that spans have among rows [lo, hi) of a batch; row numbers are those of the batch's rows, or
 * of its kept rows. Returns how many spans have some. */
int sh_attn_rows_of(const sh_batch *b, int lo, int hi, bool kept, sh_attn_rows *out);

typedef struct sh_attention sh_attention;

/* Scratch for max_rows rows in max_spans spans of a stage whose layers are [first, last); independent of the context
 * but for the logarithm of it. Both borrowed: team, kn. */
sh_status sh_attention_create(const sh_config *c, int first, int last, int max_rows, int max_spans, int max_context,
                              sh_team *team, const sh_kernels *kn, sh_attention **out);
void sh_attention_destroy(sh_attention **a);

/*
 * q [rows, heads·head_dim], normed and rotated, is replaced by the attention output of the same shape. `layer` gives
 * shape and window; keys and values are those of layer l->kv_from in the pool, already written. k_norm and rope form K
 * where only V is stored.
 */
void sh_attention_run(sh_attention *a, const sh_kv_pool *kv, const sh_layer *l, const float *k_norm,
                      const sh_rope *rope, const sh_attn_rows *spans, int n_spans, float *q);

/*
 * The same in two halves, for layers of the global kind whose positions are shared out (owner.h). Where a sequence's
 * keys are, each block of segments that a row sees gives one partial, SH_PARTIAL_FLOATS floats: o [heads, head_dim],
 * m [heads], l [heads]. Where the row is, its partials join along the tree: the bytes are those of sh_attention_run.
 */
#define SH_PARTIAL_FLOATS(l) ((size_t)(l)->heads * (size_t)((l)->head_dim + 2))

/* Partials of the blocks that `member` stores. q[row]: a row's queries [heads, head_dim]; to[row]: its partials, one
 * for each of these blocks that it sees, ascending. Every row sees one at least. */
typedef struct sh_attn_far {
    int members, member;
    const float *const *q;
    float *const *to;
} sh_attn_far;
void sh_attention_partials(sh_attention *a, const sh_kv_pool *kv, const sh_layer *l, const float *k_norm,
                           const sh_rope *rope, const sh_attn_rows *spans, int n_spans, const sh_attn_far *far);
/* q as for sh_attention_run: only written. partials[row·members + member]: what that member made for the row; not
 * looked at where the row sees none of its blocks. */
void sh_attention_merge(sh_attention *a, const sh_layer *l, const sh_attn_rows *spans, int n_spans, int members,
                        const float *const *partials, float *q);

#endif
