/*
 * How fast attention over pages runs on a team: steps of made-up sequences, for the planner and for benchmarks.
 * Queries, keys and values are noise; pages come from memory.
 */
#ifndef SH_MODEL_ATTENTION_RATES_H
#define SH_MODEL_ATTENTION_RATES_H

#include "common/status.h"
#include "model/attention.h"
#include "model/product_rates.h"

/* A layer's attention and the rows that meet it: of each of `sequences` the last `rows` of `context` positions. */
typedef struct sh_attn_work {
    int heads, kv_heads, head_dim, window; /* window 0: all */
    bool k_eq_v;
    sh_kv_type kv;
    int sequences, context, rows;
} sh_attn_work;

/* What one call of sh_attention_run over them reads and computes; operations, a multiplication and an addition counting
 * as two. */
double sh_attn_work_bytes(const sh_attn_work *w);
double sh_attn_work_flops(const sh_attn_work *w);

/* Pages for such work: a pool of about `bytes` (at least twice the last cache, so that none keeps them from call to
 * call), or of one call's pages where these are more. Borrowed: team, kn. Destroyed by sh_attn_bench_destroy, which
 * accepts NULL. */
typedef struct sh_attn_bench sh_attn_bench;
sh_status sh_attn_bench_create(sh_team *t, const sh_kernels *kn, const sh_attn_work *w, size_t bytes,
                               sh_attn_bench **out);
void sh_attn_bench_destroy(sh_attn_bench **b);
/* Seconds of a call in which so many heads and rows meet these pages: the quickest of `tries`, of pages that none of
 * the last few read. SH_EINPUT unless heads are a multiple of the KV heads and rows are at most the context, with a
 * window at most those before. */
sh_status sh_attn_bench_seconds(sh_attn_bench *b, int heads, int rows, int tries, double *seconds);

/* What the planner asks, of pages of one KV type: as sh_product_rates of one type, a row being a query that meets a
 * key, `read` the bytes of keys and values as pages hold them. */
typedef struct sh_attention_rates {
    double read, flops, both, few[SH_PRODUCT_FEWS];
    double formed; /* forming keys from values (K = V) takes as long as so many rows more at `flops` */
} sh_attention_rates;

/* Pages of `bytes` (at least twice the last cache), held only during the call; takes a second or two. */
sh_status sh_attention_rates_measure(sh_team *t, const sh_kernels *kn, sh_kv_type kv, size_t bytes,
                                     sh_attention_rates *out);

#endif
