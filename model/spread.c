/* What the members of a context-parallel stage send each other, layer by layer. See spread.h. */
#include "model/spread.h"

#include <stdlib.h>
#include <string.h>
#include "common/clock.h"
#include "common/mem.h"

/* What rows of one member and the store of another have in common. */
typedef struct dealing {
    int owned;    /* rows whose global K/V are stored there */
    int queries;  /* rows that see a block there */
    int partials; /* what these get: one for each block that they see there */
} dealing;

struct sh_spread {
    const sh_config *c;
    sh_kv_pool *kv;
    sh_attention *attention;
    const sh_kernels *kn;
    const sh_context_peers *peers;
    int members, member;
    size_t widest_row; /* bytes of K/V */

    /* the batch at hand */
    const sh_batch *batch;
    sh_attn_rows *rows; /* of member m: [first[m], first[m + 1]), numbered as the batch's rows (kept rows) are */
    int *first, *begin; /* [members + 1]: in rows; number of the member's first row */
    sh_attn_rows *far;  /* the same of those rows that see a block here: the others' [0, n_far), then this member's */
    int n_far, n_near;
    dealing *to, *from; /* [members]: this member's rows and their store; their rows and this store */

    /* one layer's */
    uint8_t *kv_rows;       /* [own rows][K/V bytes] */
    const float **q;        /* [max_rows] a row's queries: in a message, or this member's own */
    float **partial;        /* [max_rows] where a row's partials go */
    const float **partials; /* [own rows][members] where an own row's are */
    float *own;             /* partials of own rows from the own store */
    size_t own_bytes, kv_bytes;
    double waited;
    sh_timeline *timeline;
};

static size_t max_size(size_t a, size_t b) {
    return a > b ? a : b;
}

int sh_spread_rows(int max_rows, int members) {
    return (max_rows + members - 1) / members;
}

static size_t query_bytes(const sh_layer *l) {
    return (size_t)l->heads * (size_t)l->head_dim * sizeof(float);
}

static size_t partial_bytes(const sh_layer *l) {
    return SH_PARTIAL_FLOATS(l) * sizeof(float);
}

size_t sh_spread_message_bytes(const sh_config *c, sh_kv_type type, int first, int last, int max_rows, int members) {
    size_t rows = (size_t)sh_spread_rows(max_rows, members), most = (size_t)c->hidden * sizeof(float) * rows;
    for (int i = first; i < last; i++) {
        const sh_layer *l = &c->layer[i];
        size_t n = l->has_kv ? sh_mem_align(rows * sh_kv_row_bytes(c, type, i)) : 0;
        if (l->kind == SH_KV_GLOBAL) n = max_size(n + rows * query_bytes(l), rows * SH_OWNER_BLOCKS * partial_bytes(l));
        most = max_size(most, n);
    }
    return most;
}

/* --- making --------------------------------------------------------------------------------------------------------
 */

static sh_status reserve(sh_spread *x, int first, int last, int max_rows, int max_spans) {
    size_t own = (size_t)sh_spread_rows(max_rows, x->members), all = (size_t)max_rows, m = (size_t)x->members, most = 0;
    for (int i = first; i < last; i++) {
        const sh_layer *l = &x->c->layer[i];
        if (l->has_kv) x->widest_row = max_size(x->widest_row, sh_kv_row_bytes(x->c, sh_kv_pool_type(x->kv), i));
        if (l->kind == SH_KV_GLOBAL) most = max_size(most, partial_bytes(l));
    }
    size_t portions = (size_t)max_spans + m; /* a span may lie across each border between members */
    x->rows = calloc(portions, sizeof *x->rows);
    x->far = calloc(portions, sizeof *x->far);
    x->first = calloc(m + 1, sizeof *x->first);
    x->begin = calloc(m + 1, sizeof *x->begin);
    x->to = calloc(m, sizeof *x->to);
    x->from = calloc(m, sizeof *x->from);
    x->q = calloc(all, sizeof *x->q);
    x->partial = calloc(all, sizeof *x->partial);
    x->partials = calloc(own * m, sizeof *x->partials);
    if (!x->rows || !x->far || !x->first || !x->begin || !x->to || !x->from || !x->q || !x->partial || !x->partials)
        SH_FAIL(SH_EMEMORY, "no memory for the rows of %d members", x->members);
    x->kv_bytes = own * x->widest_row;
    x->own_bytes = own * SH_OWNER_BLOCKS * most;
    SH_TRY(sh_mem_alloc(x->kv_bytes, "K/V rows on their way", (void **)&x->kv_rows));
    return sh_mem_alloc(x->own_bytes, "partial attention", (void **)&x->own);
}

sh_status sh_spread_create(const sh_config *c, int first, int last, int max_rows, int max_spans, sh_kv_pool *kv,
                           sh_attention *a, const sh_kernels *kn, const sh_context_peers *peers, sh_spread **out) {
    sh_spread *x = calloc(1, sizeof *x);
    if (!x) SH_FAIL(SH_EMEMORY, "no memory for context parallelism");
    x->c = c;
    x->kv = kv;
    x->attention = a;
    x->kn = kn;
    x->peers = peers;
    x->members = peers->members;
    x->member = peers->member;
    sh_status st = reserve(x, first, last, max_rows, max_spans);
    if (st != SH_OK) {
        sh_spread_destroy(&x);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = x;
    return SH_OK;
}

void sh_spread_destroy(sh_spread **xp) {
    sh_spread *x = *xp;
    if (!x) return;
    free(x->rows);
    free(x->far);
    free(x->first);
    free(x->begin);
    free(x->to);
    free(x->from);
    free(x->q);
    free(x->partial);
    free(x->partials);
    sh_mem_free(x->kv_rows, x->kv_bytes);
    sh_mem_free(x->own, x->own_bytes);
    free(x);
    *xp = NULL;
}

/* --- waiting --------------------------------------------------------------------------------------------------------
 */

static void waited_since(sh_spread *x, double t0) {
    double now = sh_now();
    x->waited += now - t0;
    sh_timeline_note(x->timeline, SH_SLICE_EXCHANGE, t0, now);
}

static sh_status room_for(sh_spread *x, int to, size_t n, void **room) {
    double t0 = sh_now();
    SH_TRY(x->peers->room(x->peers->ctx, to, n, room));
    waited_since(x, t0);
    return SH_OK;
}

static sh_status take_from(sh_spread *x, int from, size_t n, const void **data) {
    double t0 = sh_now();
    SH_TRY(x->peers->take(x->peers->ctx, from, n, data));
    waited_since(x, t0);
    return SH_OK;
}

void sh_spread_set_timeline(sh_spread *x, sh_timeline *t) {
    x->timeline = t;
}

double sh_spread_waited(sh_spread *x) {
    double t = x->waited;
    x->waited = 0;
    return t;
}

/* --- whose rows, and what they have to do with whom ------------------------------------------------------------------
 */

static int place_of(const sh_spread *x, const sh_attn_rows *p, int member) {
    return sh_owner_place(member, p->span->seq, x->members);
}

/* The rows of a portion that see a block of `member`: its last ones. */
static sh_attn_rows seeing(const sh_spread *x, const sh_attn_rows *p, int member) {
    int64_t from = ((int64_t)place_of(x, p, member) * SH_SEGMENT_TOKENS) << p->span->level;
    int skip = from <= p->pos ? 0 : from - p->pos < p->n ? (int)(from - p->pos) : p->n;
    return (sh_attn_rows){.span = p->span, .row = p->row + skip, .n = p->n - skip, .pos = p->pos + skip};
}

/* Blocks of `member` that a row sees; at least one. */
static int blocks_of(const sh_spread *x, const sh_attn_rows *p, int i, int member) {
    return (sh_owner_seen(p->pos + i, p->span->level) - place_of(x, p, member) - 1) / x->members + 1;
}

/* Rows of member `asker` and the store of member `store`. */
static dealing deal(const sh_spread *x, int asker, int store) {
    dealing d = {0};
    for (int i = x->first[asker]; i < x->first[asker + 1]; i++) {
        const sh_attn_rows *p = &x->rows[i], s = seeing(x, p, store);
        int place = place_of(x, p, store);
        d.owned += sh_owner_below(p->pos + p->n, p->span->level, x->members, place) -
                   sh_owner_below(p->pos, p->span->level, x->members, place);
        d.queries += s.n;
        for (int k = 0; k < s.n; k++) d.partials += blocks_of(x, &s, k, store);
    }
    return d;
}

/* Adds the rows of one member that see a block here. */
static int add_seeing(sh_spread *x, int asker, int at) {
    for (int i = x->first[asker]; i < x->first[asker + 1]; i++) {
        sh_attn_rows s = seeing(x, &x->rows[i], x->member);
        if (s.n > 0) x->far[at++] = s;
    }
    return at;
}

void sh_spread_view(sh_spread *x, const sh_batch *b, bool kept) {
    x->batch = b;
    for (int m = 0; m < x->members; m++) {
        int lo = sh_owner_first_row(b->n_rows, x->members, m), hi = sh_owner_first_row(b->n_rows, x->members, m + 1);
        sh_attn_rows *p = &x->rows[x->first[m]];
        int n = sh_attn_rows_of(b, lo, hi, kept, p);
        x->first[m + 1] = x->first[m] + n;
        x->begin[m + 1] = n ? p[n - 1].row + p[n - 1].n : x->begin[m];
    }
    x->n_far = 0;
    for (int m = 0; m < x->members; m++) {
        x->to[m] = deal(x, x->member, m);
        x->from[m] = deal(x, m, x->member);
        if (m != x->member) x->n_far = add_seeing(x, m, x->n_far);
    }
    x->n_near = add_seeing(x, x->member, x->n_far) - x->n_far;
}

/* --- K/V and queries -----------------------------------------------------------------------------------------------
 */

void sh_spread_put(sh_spread *x, int layer, int r, const float *k, const float *v) {
    sh_kv_pack(x->kv, x->kn, layer, k, v, x->kv_rows + (size_t)r * x->widest_row);
}

/* Whether member `store` stores K/V of a position. */
static bool stores(const sh_spread *x, const sh_layer *l, const sh_span *s, int pos, int store) {
    return l->kind == SH_KV_SLIDING || sh_owner_of(sh_owner_seen(pos, s->level) - 1, s->seq, x->members) == store;
}

/* Bytes of the K/V part of a message: rows of `asker` that `store` stores. */
static size_t kv_part(const sh_spread *x, int layer, int asker, const dealing *d) {
    const sh_layer *l = &x->c->layer[layer];
    if (!l->has_kv) return 0;
    int rows = l->kind == SH_KV_SLIDING ? x->begin[asker + 1] - x->begin[asker] : d->owned;
    return sh_mem_align((size_t)rows * sh_kv_row_bytes(x->c, sh_kv_pool_type(x->kv), layer));
}

static size_t query_part(const sh_layer *l, const dealing *d) {
    return l->kind == SH_KV_GLOBAL ? (size_t)d->queries * query_bytes(l) : 0;
}

/* This member's K/V rows and queries for another, as one message: K/V, zeros up to a multiple of 64, queries. */
static void pack_rows(const sh_spread *x, int layer, int to, const float *q, size_t kv_bytes, uint8_t *room) {
    const sh_layer *l = &x->c->layer[layer];
    size_t row = sh_kv_row_bytes(x->c, sh_kv_pool_type(x->kv), layer), width = query_bytes(l);
    uint8_t *kv = room, *queries = room + kv_bytes;
    for (int i = x->first[x->member]; i < x->first[x->member + 1]; i++) {
        const sh_attn_rows *p = &x->rows[i];
        int own = p->row - x->begin[x->member];
        for (int k = 0; l->has_kv && k < p->n; k++) {
            if (!stores(x, l, p->span, p->pos + k, to)) continue;
            memcpy(kv, x->kv_rows + (size_t)(own + k) * x->widest_row, row);
            kv += row;
        }
        if (l->kind != SH_KV_GLOBAL) continue;
        sh_attn_rows s = seeing(x, p, to);
        if (s.n == 0) continue;
        size_t n = (size_t)s.n * width;
        memcpy(queries, (const uint8_t *)q + (size_t)(s.row - x->begin[x->member]) * width, n);
        queries += n;
    }
    memset(kv, 0, (size_t)(room + kv_bytes - kv));
}

static sh_status send_rows(sh_spread *x, int layer, const float *q) {
    const sh_layer *l = &x->c->layer[layer];
    for (int m = 0; m < x->members; m++) {
        size_t kv = kv_part(x, layer, x->member, &x->to[m]), n = kv + query_part(l, &x->to[m]);
        if (m == x->member || n == 0) continue;
        void *room = NULL;
        SH_TRY(room_for(x, m, n, &room));
        pack_rows(x, layer, m, q, kv, room);
        SH_TRY(x->peers->send(x->peers->ctx, m));
    }
    return SH_OK;
}

/* K/V rows of `asker` that are stored here, `stride` bytes apart, into their pages. */
static const uint8_t *store_row(const sh_spread *x, int layer, const sh_attn_rows *p, int k, const uint8_t *from,
                                size_t stride) {
    sh_kv_import(x->kv, layer, p->span, p->pos + k - p->span->pos, 1, from);
    return from + stride;
}

static void store_own(const sh_spread *x, int layer) {
    const sh_layer *l = &x->c->layer[layer];
    const uint8_t *from = x->kv_rows;
    for (int i = x->first[x->member]; i < x->first[x->member + 1]; i++) {
        const sh_attn_rows *p = &x->rows[i];
        for (int k = 0; k < p->n; k++, from += x->widest_row)
            if (stores(x, l, p->span, p->pos + k, x->member)) store_row(x, layer, p, k, from, 0);
    }
}

static void store_others(const sh_spread *x, int layer, int asker, const uint8_t *from) {
    const sh_layer *l = &x->c->layer[layer];
    size_t row = sh_kv_row_bytes(x->c, sh_kv_pool_type(x->kv), layer);
    for (int i = x->first[asker]; i < x->first[asker + 1]; i++) {
        const sh_attn_rows *p = &x->rows[i];
        for (int k = 0; k < p->n; k++)
            if (stores(x, l, p->span, p->pos + k, x->member)) from = store_row(x, layer, p, k, from, row);
    }
}

/* Where the queries of a member's rows are that see a block here. */
static void point_queries(sh_spread *x, const sh_layer *l, int asker, const float *from) {
    size_t width = (size_t)l->heads * (size_t)l->head_dim;
    for (int i = x->first[asker]; i < x->first[asker + 1]; i++) {
        sh_attn_rows s = seeing(x, &x->rows[i], x->member);
        for (int k = 0; k < s.n; k++, from += width) x->q[s.row + k] = from;
    }
}

static sh_status take_rows(sh_spread *x, int layer) {
    const sh_layer *l = &x->c->layer[layer];
    for (int m = 0; m < x->members; m++) {
        size_t kv = kv_part(x, layer, m, &x->from[m]), n = kv + query_part(l, &x->from[m]);
        if (m == x->member || n == 0) continue;
        const void *data = NULL;
        SH_TRY(take_from(x, m, n, &data));
        if (l->has_kv) store_others(x, layer, m, data);
        if (l->kind == SH_KV_GLOBAL) point_queries(x, l, m, (const float *)(const void *)((const uint8_t *)data + kv));
    }
    return SH_OK;
}

/* --- partials ------------------------------------------------------------------------------------------------------
 */

/* Where the partials of a member's rows go that see a block here. */
static void point_partials(sh_spread *x, const sh_layer *l, int asker, float *to) {
    for (int i = x->first[asker]; i < x->first[asker + 1]; i++) {
        sh_attn_rows s = seeing(x, &x->rows[i], x->member);
        for (int k = 0; k < s.n; k++) {
            x->partial[s.row + k] = to;
            to += (size_t)blocks_of(x, &s, k, x->member) * SH_PARTIAL_FLOATS(l);
        }
    }
}

/* Makes the partials of the others' rows and sends them; then, while they travel, those of this member's own. */
static sh_status make_partials(sh_spread *x, const sh_layer *l, const float *k_norm, const sh_rope *rope,
                               const float *q) {
    const sh_attn_far far = {.members = x->members, .member = x->member, .q = x->q, .to = x->partial};
    for (int m = 0; m < x->members; m++) {
        if (m == x->member || x->from[m].partials == 0) continue;
        void *room = NULL;
        SH_TRY(room_for(x, m, (size_t)x->from[m].partials * partial_bytes(l), &room));
        point_partials(x, l, m, room);
    }
    sh_attention_partials(x->attention, x->kv, l, k_norm, rope, x->far, x->n_far, &far);
    for (int m = 0; m < x->members; m++)
        if (m != x->member && x->from[m].partials > 0) SH_TRY(x->peers->send(x->peers->ctx, m));

    /* own rows that see nothing here are the first of their spans: the queries are at their own rows */
    size_t width = (size_t)l->heads * (size_t)l->head_dim;
    for (int r = x->begin[x->member]; r < x->begin[x->member + 1]; r++)
        x->q[r] = q + (size_t)(r - x->begin[x->member]) * width;
    point_partials(x, l, x->member, x->own);
    sh_attention_partials(x->attention, x->kv, l, k_norm, rope, x->far + x->n_far, x->n_near, &far);
    return SH_OK;
}

/* Where the partials of this member's rows are that member `store` made. */
static void point_answers(sh_spread *x, const sh_layer *l, int store, const float *from) {
    for (int i = x->first[x->member]; i < x->first[x->member + 1]; i++) {
        sh_attn_rows s = seeing(x, &x->rows[i], store);
        for (int k = 0; k < s.n; k++) {
            int own = s.row + k - x->begin[x->member];
            x->partials[own * x->members + store] = from;
            from += (size_t)blocks_of(x, &s, k, store) * SH_PARTIAL_FLOATS(l);
        }
    }
}

static sh_status take_partials(sh_spread *x, const sh_layer *l) {
    point_answers(x, l, x->member, x->own);
    for (int m = 0; m < x->members; m++) {
        size_t n = (size_t)x->to[m].partials * partial_bytes(l);
        if (m == x->member || n == 0) continue;
        const void *data = NULL;
        SH_TRY(take_from(x, m, n, &data));
        point_answers(x, l, m, data);
    }
    return SH_OK;
}

sh_status sh_spread_attend(sh_spread *x, int layer, const float *k_norm, const sh_rope *rope, const sh_attn_rows *spans,
                           int n_spans, float *q) {
    const sh_layer *l = &x->c->layer[layer];
    SH_TRY(send_rows(x, layer, q));
    if (l->has_kv) store_own(x, layer);
    SH_TRY(take_rows(x, layer));
    if (l->kind == SH_KV_SLIDING) {
        sh_attention_run(x->attention, x->kv, l, k_norm, rope, spans, n_spans, q);
        return SH_OK;
    }
    SH_TRY(make_partials(x, l, k_norm, rope, q));
    SH_TRY(take_partials(x, l));
    sh_attention_merge(x->attention, l, spans, n_spans, x->members, x->partials, q);
    return SH_OK;
}

/* --- the end -------------------------------------------------------------------------------------------------------
 */

sh_status sh_spread_gather(sh_spread *x, const float *rows, int width, float *out) {
    size_t row = (size_t)width * sizeof(float);
    for (int m = 0; m < x->members; m++) {
        size_t n = (size_t)(x->begin[m + 1] - x->begin[m]) * row;
        if (n == 0 || (x->member != 0 && x->member != m)) continue;
        void *room = NULL;
        const void *data = rows;
        if (x->member != 0) {
            SH_TRY(room_for(x, 0, n, &room));
            memcpy(room, rows, n);
            SH_TRY(x->peers->send(x->peers->ctx, 0));
            continue;
        }
        if (m != 0) SH_TRY(take_from(x, m, n, &data));
        memcpy((uint8_t *)out + (size_t)x->begin[m] * row, data, n);
    }
    return SH_OK;
}
