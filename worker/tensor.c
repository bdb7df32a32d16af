/*
 * Exchanges between the members of a stage: one message to each other member, one from each. See tensor.h. A sum over
 * two members trades whole rows; over more, each member adds the columns of its own range and the sums are gathered,
 * which sends 2·(W − 1)/W rows instead of W − 1. Both add in the order of members: the bytes are the same.
 */
#include "worker/tensor.h"

#include <stdlib.h>
#include <string.h>

#include "common/mem.h"
#include "worker/backoff.h"

#define MAGIC 0x31505354u /* "TSP1" */

/* Which exchange a message belongs to; its rows follow, f32 [n, width]. */
typedef struct head {
    uint32_t magic;
    int32_t layer, what, n, width;
    uint32_t zero;
    uint64_t serial; /* of the exchange, since the start */
} head;

struct sh_tensor_link {
    sh_tensor_options o;
    sh_peers peers;
    uint64_t serial;
    int max_width;        /* widest rows of a message */
    size_t message_bytes; /* room for one */
    uint8_t *send, *recv; /* [parts] messages each */
    size_t buffer_bytes;  /* of each of the two */
    float *row;           /* [max_width] */
    int *req;             /* [parts] sends; −1: done */
    bool *has;            /* [parts] whose message has come */
};

static const char *const names[] = {"heads", "o", "feed-forward", "down"};

static const char *name_of(int what) {
    return what >= 0 && what < (int)(sizeof names / sizeof names[0]) ? names[what] : "?";
}

/* --- creation ------------------------------------------------------------------------------------------------------
 */

static int widest_part(sh_share s, int total, int unit) {
    int w = 0;
    for (int i = 0; i < s.parts; i++) {
        sh_range r = sh_share_range_of(s, i, total, unit);
        if (r.hi - r.lo > w) w = r.hi - r.lo;
    }
    return w;
}

static int max_int(int a, int b) {
    return a > b ? a : b;
}

static int widest_message(const sh_config *c, sh_share s) {
    int w = s.sum && s.parts == 2 ? c->hidden : widest_part(s, c->hidden, SH_SHARE_COLUMNS);
    for (int i = 0; i < c->n_layers && !s.sum; i++) {
        const sh_layer *l = &c->layer[i];
        w = max_int(w, widest_part(s, l->heads * l->head_dim, l->head_dim));
        w = max_int(w, widest_part(s, l->ff, SH_SHARE_COLUMNS));
    }
    return w;
}

static sh_status gather(void *ctx, int layer, sh_joint what, const float *mine, int n, int total, int unit, float *all);
static sh_status sum(void *ctx, int layer, sh_joint what, float *y, int n, int width);

static sh_status create_buffers(sh_tensor_link *t) {
    size_t parts = (size_t)t->o.share.parts;
    void *send = NULL, *recv = NULL;
    t->max_width = widest_message(t->o.config, t->o.share);
    t->message_bytes = sizeof(head) + (size_t)t->o.max_rows * (size_t)t->max_width * sizeof(float);
    t->message_bytes = (t->message_bytes + 63) / 64 * 64;
    t->req = calloc(parts, sizeof *t->req);
    t->has = calloc(parts, sizeof *t->has);
    t->row = calloc((size_t)t->max_width, sizeof *t->row);
    if (!t->req || !t->has || !t->row) SH_FAIL(SH_EMEMORY, "no memory for exchanges with %zu members", parts);
    t->buffer_bytes = parts * t->message_bytes;
    SH_TRY(sh_mem_alloc(t->buffer_bytes, "rows to other members", &send));
    t->send = send;
    SH_TRY(sh_mem_alloc(t->buffer_bytes, "rows from other members", &recv));
    t->recv = recv;
    return SH_OK;
}

sh_status sh_tensor_link_create(const sh_tensor_options *o, sh_tensor_link **out) {
    if (o->share.parts < 2 || o->first_rank < 0 || o->first_rank + o->share.parts > o->link->size)
        SH_FAIL(SH_EINPUT, "%d members from rank %d on: there are %d ranks", o->share.parts, o->first_rank,
                o->link->size);
    sh_tensor_link *t = calloc(1, sizeof *t);
    if (!t) SH_FAIL(SH_EMEMORY, "no memory for exchanges between members");
    t->o = *o;
    t->peers = (sh_peers){.ctx = t, .gather = gather, .sum = sum};
    sh_status st = create_buffers(t);
    if (st != SH_OK) {
        sh_tensor_link_destroy(&t);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    t->o.config = NULL;
    *out = t;
    return SH_OK;
}

void sh_tensor_link_destroy(sh_tensor_link **p) {
    sh_tensor_link *t = *p;
    if (!t) return;
    sh_mem_free(t->send, t->buffer_bytes);
    sh_mem_free(t->recv, t->buffer_bytes);
    free(t->req);
    free(t->has);
    free(t->row);
    free(t);
    *p = NULL;
}

const sh_peers *sh_tensor_link_peers(sh_tensor_link *t) {
    return &t->peers;
}

/* --- messages ------------------------------------------------------------------------------------------------------
 */

static head *message(uint8_t *buffer, const sh_tensor_link *t, int member) {
    return (head *)(void *)(buffer + (size_t)member * t->message_bytes);
}

static float *rows_of(head *h) {
    return (float *)(void *)(h + 1);
}

static size_t bytes_of(int n, int width) {
    return sizeof(head) + (size_t)n * (size_t)width * sizeof(float);
}

static void copy_rows(float *to, size_t ld_to, const float *from, size_t ld_from, int n, int width) {
    for (int r = 0; r < n; r++) memcpy(to + (size_t)r * ld_to, from + (size_t)r * ld_from, (size_t)width * sizeof *to);
}

static sh_status check_head(const sh_tensor_link *t, const head *h, const head *want, int rank) {
    if (memcmp(h, want, sizeof *h) == 0) return SH_OK;
    SH_FAIL(SH_EPEER,
            "exchange %llu (layer %d, %s, %d rows of %d) with rank %d: it sent %llu (layer %d, %s, %d rows of %d)",
            (unsigned long long)t->serial, want->layer, name_of(want->what), want->n, want->width, rank,
            (unsigned long long)h->serial, h->layer, name_of(h->what), h->n, h->width);
}

/* Takes the message of member m, if it has come. */
static sh_status take(sh_tensor_link *t, int m, const head *want, bool *got) {
    const sh_link_ops *ops = t->o.link->ops;
    int source = 0, rank = t->o.first_rank + m;
    size_t len = 0, need = bytes_of(want->n, want->width);
    SH_TRY(ops->probe(t->o.link, rank, SH_TAG_TENSOR, got, &source, &len));
    if (!*got) return SH_OK;
    if (len > t->message_bytes || len < sizeof(head))
        SH_FAIL(SH_EPEER, "%zu bytes from rank %d: %zu were expected", len, rank, need);
    SH_TRY(ops->recv(t->o.link, rank, SH_TAG_TENSOR, message(t->recv, t, m), len));
    SH_TRY(check_head(t, message(t->recv, t, m), want, rank));
    if (len != need) SH_FAIL(SH_EPEER, "%zu bytes from rank %d: %zu were expected", len, rank, need);
    return SH_OK;
}

/* One exchange of n rows. Their columns are cut among the members; each sends its own to all, or (scatter) each sends
 * everybody theirs. A member without columns has no message. */
typedef struct trade {
    int layer, n;
    sh_joint what;
    int total, unit; /* columns, and what they are cut in; unit 0: not cut, everybody has all */
    bool scatter;
} trade;

static sh_range range_of(const sh_tensor_link *t, const trade *x, int m) {
    if (x->unit == 0) return (sh_range){0, x->total};
    return sh_share_range_of(t->o.share, m, x->total, x->unit);
}

static int width_of(const sh_tensor_link *t, const trade *x, int m) {
    sh_range r = range_of(t, x, m);
    return r.hi - r.lo;
}

static head head_of(const sh_tensor_link *t, const trade *x, int width) {
    return (head){.magic = MAGIC, .layer = x->layer, .what = x->what, .n = x->n, .width = width, .serial = t->serial};
}

static sh_status send_all(sh_tensor_link *t, const trade *x) {
    int me = t->o.share.part;
    if (!x->scatter) *message(t->send, t, 0) = head_of(t, x, width_of(t, x, me)); /* once: it is on its way to many */
    for (int m = 0; m < t->o.share.parts; m++) {
        int width = width_of(t, x, x->scatter ? m : me);
        t->req[m] = -1;
        if (m == me || width == 0) continue;
        head *h = message(t->send, t, x->scatter ? m : 0);
        if (x->scatter) *h = head_of(t, x, width);
        SH_TRY(
            t->o.link->ops->send(t->o.link, t->o.first_rank + m, SH_TAG_TENSOR, h, bytes_of(x->n, width), &t->req[m]));
    }
    return SH_OK;
}

/* Whether the message of each member is here, and each of mine has left. */
static sh_status finish(sh_tensor_link *t, const trade *x) {
    int me = t->o.share.part, parts = t->o.share.parts, open = 0;
    sh_backoff wait = {0};
    for (int m = 0; m < parts; m++) t->has[m] = m == me || width_of(t, x, x->scatter ? me : m) == 0;
    do {
        bool moved = false;
        open = 0;
        for (int m = 0; m < parts; m++) {
            bool done = false;
            if (!t->has[m]) {
                head want = head_of(t, x, width_of(t, x, x->scatter ? me : m));
                SH_TRY(take(t, m, &want, &t->has[m]));
                moved = moved || t->has[m];
            }
            if (t->req[m] >= 0) {
                SH_TRY(t->o.link->ops->test(t->o.link, t->req[m], &done));
                if (done) t->req[m] = -1;
                moved = moved || done;
            }
            open += !t->has[m] + (t->req[m] >= 0);
        }
        if (moved)
            sh_backoff_reset(&wait);
        else if (open > 0)
            sh_backoff_wait(&wait);
    } while (open > 0);
    t->serial++;
    return SH_OK;
}

static sh_status trade_rows(sh_tensor_link *t, const trade *x) {
    SH_TRY(send_all(t, x));
    return finish(t, x);
}

static sh_status check_rows(const sh_tensor_link *t, int n, int width) {
    if (n < 0 || n > t->o.max_rows || width > t->max_width)
        SH_FAIL(SH_ESTATE, "exchange of %d rows of %d: room is for %d of %d", n, width, t->o.max_rows, t->max_width);
    return SH_OK;
}

/* --- what peers ask for --------------------------------------------------------------------------------------------
 */

static sh_status gather(void *ctx, int layer, sh_joint what, const float *mine, int n, int total, int unit,
                        float *all) {
    sh_tensor_link *t = ctx;
    trade x = {.layer = layer, .n = n, .what = what, .total = total, .unit = unit};
    int me = t->o.share.part, width = width_of(t, &x, me);
    for (int m = 0; m < t->o.share.parts; m++) SH_TRY(check_rows(t, n, width_of(t, &x, m)));
    memmove(rows_of(message(t->send, t, 0)), mine, (size_t)n * (size_t)width * sizeof *mine);
    SH_TRY(trade_rows(t, &x));
    for (int m = 0; m < t->o.share.parts; m++) {
        sh_range r = range_of(t, &x, m);
        const float *from = m == me ? mine : rows_of(message(t->recv, t, m));
        copy_rows(all + r.lo, (size_t)total, from, (size_t)(r.hi - r.lo), n, r.hi - r.lo);
    }
    return SH_OK;
}

/* y [n, ld], columns r: the sum over members, in their order; mine are in y, the others' in what was received. */
static void add_up(sh_tensor_link *t, float *y, size_t ld, int n, sh_range r) {
    size_t width = (size_t)(r.hi - r.lo);
    for (int i = 0; i < n; i++) {
        float *own = y + (size_t)i * ld + (size_t)r.lo;
        for (int m = 0; m < t->o.share.parts; m++) {
            const float *part = m == t->o.share.part ? own : rows_of(message(t->recv, t, m)) + (size_t)i * width;
            for (size_t c = 0; c < width; c++) t->row[c] = m == 0 ? part[c] : t->row[c] + part[c];
        }
        memcpy(own, t->row, width * sizeof *own);
    }
}

static sh_status sum(void *ctx, int layer, sh_joint what, float *y, int n, int width) {
    sh_tensor_link *t = ctx;
    bool whole = t->o.share.parts == 2; /* trades whole rows; else each adds up its own columns */
    trade x = {.layer = layer, .n = n, .what = what, .total = width, .unit = SH_SHARE_COLUMNS, .scatter = true};
    if (whole) x.unit = 0;
    for (int m = 0; m < t->o.share.parts; m++) {
        sh_range r = range_of(t, &x, m);
        SH_TRY(check_rows(t, n, r.hi - r.lo));
        if (m == t->o.share.part) continue;
        copy_rows(rows_of(message(t->send, t, m)), (size_t)(r.hi - r.lo), y + r.lo, (size_t)width, n, r.hi - r.lo);
    }
    SH_TRY(trade_rows(t, &x));
    sh_range own = range_of(t, &x, t->o.share.part);
    add_up(t, y, (size_t)width, n, own);
    if (whole) return SH_OK;
    float *mine = rows_of(message(t->send, t, t->o.share.part)); /* free: nothing is sent to oneself */
    copy_rows(mine, (size_t)(own.hi - own.lo), y + own.lo, (size_t)width, n, own.hi - own.lo);
    return gather(t, layer, what, mine, n, width, SH_SHARE_COLUMNS, y);
}
