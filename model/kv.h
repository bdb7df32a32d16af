/*
 * The KV cache of one stage: a pool of pages per kind, a page number meaning the same in every layer of the kind. The
 * leader allocates numbers (worker/pages); this file only stores. K and V are rounded to the KV type when written,
 * before anything attends to them. Layers with k_eq_v store V only.
 */
#ifndef SH_MODEL_KV_H
#define SH_MODEL_KV_H

#include "model/batch.h"
#include "model/kernels/kernels.h"

typedef struct sh_kv_pool sh_kv_pool;

/* Pages for the layers that stage [first, last) must hold: its producers and mirrors of earlier ones. Memory is
 * reserved, and touched only when pages are written. */
sh_status sh_kv_create(const sh_config *c, sh_kv_type type, int first, int last, const int32_t pages[SH_KV_KINDS],
                       sh_kv_pool **out);
void sh_kv_destroy(sh_kv_pool **p);
sh_kv_type sh_kv_pool_type(const sh_kv_pool *p);
/* Whether this stage stores K/V of producer `layer`. */
bool sh_kv_holds(const sh_kv_pool *p, int layer);
/* Bytes of one token of `layer` in the KV type (K and V, or V alone): the unit of what crosses a cut. */
size_t sh_kv_row_bytes(const sh_config *c, sh_kv_type type, int layer);

/* Rounds row `row` of a span (k, v: [kv_heads, head_dim] f32; k NULL with k_eq_v) into its page. */
void sh_kv_write(sh_kv_pool *p, const sh_kernels *kn, int layer, const sh_span *s, int row, const float *k,
                 const float *v);
/* The same bytes, packed into `to` as sh_kv_export would: K/V of a row that others may store. */
void sh_kv_pack(const sh_kv_pool *p, const sh_kernels *kn, int layer, const float *k, const float *v, void *to);
/* The stored bytes of rows [row, row+n) of a span, in the order of sh_kv_row_bytes, out of and into pages: shards that
 * cross a cut. */
void sh_kv_export(const sh_kv_pool *p, int layer, const sh_span *s, int row, int n, void *to);
void sh_kv_import(sh_kv_pool *p, int layer, const sh_span *s, int row, int n, const void *from);
/* Widens positions [pos, pos+n) of one KV head into f32 tiles k, v [n, head_dim]; with k_eq_v, k is formed from v
 * (k_norm ⊙ v, rotated by absolute position; cos/sin by rope). k may be NULL to skip. */
struct sh_rope;
void sh_kv_read(const sh_kv_pool *p, const sh_kernels *kn, int layer, const sh_span *s, int pos, int n, int kv_head,
                const float *k_norm, const struct sh_rope *rope, float *k, float *v);

/* The same for few rows, without a tile of all positions: scores of positions [pos, pos+n), and after their softmax the
 * weighted sum, straight from the pages, some vectors at a time. Bits as with tiles. Not with kernels that only take
 * time. */
#define SH_KV_TILE 4096 /* floats of a tile, or one vector if that has more: stays in L1 beside the rows */
typedef struct sh_kv_rows {
    int rows;
    const float *q; /* [rows, head_dim], stride ldq */
    size_t ldq;
    float *s; /* [rows, n], stride lds: scores, then weights */
    size_t lds;
    float *o; /* [rows, head_dim], stride ldo */
    size_t ldo;
    float *tile;         /* scratch [max(SH_KV_TILE, head_dim)] */
    int next, n_next;    /* positions [next, next+n_next) will be asked for next; n_next 0: not known */
    const float *k_norm; /* these two with k_eq_v */
    const struct sh_rope *rope;
} sh_kv_rows;
bool sh_kv_few(const sh_kernels *kn);
void sh_kv_scores(const sh_kv_pool *p, const sh_kernels *kn, int layer, const sh_span *s, int pos, int n, int kv_head,
                  const sh_kv_rows *rows);
void sh_kv_weigh(const sh_kv_pool *p, const sh_kernels *kn, int layer, const sh_span *s, int pos, int n, int kv_head,
                 const sh_kv_rows *rows);

#endif
