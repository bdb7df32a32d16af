/*
 * How fast attention over pages runs on a team: steps of made-up sequences, for the planner and for benchmarks.
 * Queries, keys and values are noise; every call reads pages that no cache keeps.
 */
#ifndef SH_MODEL_ATTENTION_RATES_H
#define SH_MODEL_ATTENTION_RATES_H

#include "common/status.h"
#include "model/attention.h"

/* A layer's attention and the rows that meet it: of each of `sequences` the last `rows` of `context` positions. */
typedef struct sh_attn_work {
    int heads, kv_heads, head_dim, window;
    bool k_eq_v;
    sh_kv_type kv;
    int sequences, context, rows;
} sh_attn_work;

/* What one call of sh_attention_run over them reads and computes; operations, a multiplication and an addition counting
 * as two. */
double sh_attn_work_bytes(const sh_attn_work *w);
double sh_attn_work_flops(const sh_attn_work *w);

/* Seconds of such a call: the quickest of `tries`, each over pages of its own, of a pool of about `bytes` (many times
 * the last cache) or of one call's pages where these are more; held only during this call. */
sh_status sh_attn_work_measure(sh_team *t, const sh_kernels *kn, const sh_attn_work *w, size_t bytes, int tries,
                               double *seconds);

#endif
