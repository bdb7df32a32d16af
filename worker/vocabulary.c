/* Digests, questions, answers. See vocabulary.h. */
#include "worker/vocabulary.h"

#include <stdlib.h>
#include <string.h>

#include "common/mem.h"
#include "worker/backoff.h"

#define MAGIC 0x31434f56u /* "VOC1" */

/* Messages: digests of n rows, part by part to member 0; sh_row_ask [n] from member 0; what was asked for, row by row,
 * from those who have some of it. */
typedef enum kind { DIGESTS, ASKS, REST } kind;

typedef struct head {
    uint32_t magic;
    int32_t kind, n;
    uint32_t zero;
    uint64_t serial, bytes; /* calls so far; bytes that follow */
} head;

struct sh_vocabulary {
    sh_vocabulary_options o;
    sh_range ids;
    uint64_t serial;
    double seconds;
    size_t message_bytes;
    uint8_t *send;   /* one message */
    uint8_t *recv;   /* member 0: [parts] messages; others: one */
    size_t n_recv;   /* of them */
    int *req;        /* [parts] */
    sh_row_ask *ask; /* [max_rows] */
    /* member 0 */
    sh_row **row; /* [max_rows] */
    float *whole; /* [max_rows, vocab] rows that were asked for in whole */
};

static size_t whole_bytes(const sh_vocabulary *v) {
    return (size_t)v->o.max_rows * (size_t)v->o.vocab * sizeof(float);
}

static sh_range ids_of(const sh_vocabulary *v, int member) {
    return sh_share_range_of(v->o.share, member, v->o.vocab, SH_SHARE_VOCAB);
}

/* --- creation ------------------------------------------------------------------------------------------------------
 */

static sh_status create_rows(sh_vocabulary *v) {
    void *p = NULL;
    v->row = calloc((size_t)v->o.max_rows, sizeof(sh_row *));
    if (!v->row) SH_FAIL(SH_EMEMORY, "no memory for rows in parts");
    for (int i = 0; i < v->o.max_rows; i++) SH_TRY(sh_row_create(v->o.vocab, v->o.share.parts, &v->row[i]));
    SH_TRY(sh_mem_alloc(whole_bytes(v), "whole rows of logits", &p));
    v->whole = p;
    return SH_OK;
}

static sh_status create_buffers(sh_vocabulary *v) {
    size_t room = 0, rows = (size_t)v->o.max_rows, parts = (size_t)v->o.share.parts;
    void *p = NULL;
    for (int m = 0; m < v->o.share.parts; m++) {
        sh_range r = ids_of(v, m);
        size_t digest = sh_digest_bytes(r.hi - r.lo), rest = (size_t)(r.hi - r.lo) * sizeof(float);
        if (digest > room) room = digest;
        if (rest > room) room = rest;
    }
    v->message_bytes = (sizeof(head) + rows * room + 63) / 64 * 64;
    v->n_recv = v->o.share.part == 0 ? parts : 1;
    v->req = calloc(parts, sizeof *v->req);
    v->ask = calloc(rows, sizeof *v->ask);
    if (!v->req || !v->ask) SH_FAIL(SH_EMEMORY, "no memory for questions of %zu rows", rows);
    SH_TRY(sh_mem_alloc(v->message_bytes, "digests", &p));
    v->send = p;
    SH_TRY(sh_mem_alloc(v->n_recv * v->message_bytes, "digests", &p));
    v->recv = p;
    return v->o.share.part == 0 ? create_rows(v) : SH_OK;
}

sh_status sh_vocabulary_create(const sh_vocabulary_options *o, sh_vocabulary **out) {
    sh_vocabulary *v = calloc(1, sizeof *v);
    if (!v) SH_FAIL(SH_EMEMORY, "no memory for a divided head");
    v->o = *o;
    v->ids = ids_of(v, o->share.part);
    sh_status st = create_buffers(v);
    if (st != SH_OK) {
        sh_vocabulary_destroy(&v);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    if (o->share.part > 0) sh_sampler_quiet(o->sampler);
    *out = v;
    return SH_OK;
}

void sh_vocabulary_destroy(sh_vocabulary **p) {
    sh_vocabulary *v = *p;
    if (!v) return;
    for (int i = 0; v->row && i < v->o.max_rows; i++) sh_row_destroy(&v->row[i]);
    if (v->whole) sh_mem_free(v->whole, whole_bytes(v));
    if (v->send) sh_mem_free(v->send, v->message_bytes);
    if (v->recv) sh_mem_free(v->recv, v->n_recv * v->message_bytes);
    free(v->row);
    free(v->ask);
    free(v->req);
    free(v);
    *p = NULL;
}

double sh_vocabulary_seconds(const sh_vocabulary *v) {
    return v->seconds;
}

/* --- messages ------------------------------------------------------------------------------------------------------
 */

static uint8_t *body(uint8_t *message) {
    return message + sizeof(head);
}

/* Where the message of a member lies once received. */
static uint8_t *received(const sh_vocabulary *v, int member) {
    return v->recv + (v->n_recv > 1 ? (size_t)member * v->message_bytes : 0);
}

/* Before the first send: what is under way must stay as it is. */
static void write_head(sh_vocabulary *v, kind what, int n, size_t bytes) {
    head h = {.magic = MAGIC, .kind = what, .n = n, .serial = v->serial, .bytes = bytes};
    memcpy(v->send, &h, sizeof h);
}

static sh_status start_send(sh_vocabulary *v, int member, size_t bytes) {
    return v->o.link->ops->send(v->o.link, v->o.first_rank + member, SH_TAG_TENSOR, v->send, sizeof(head) + bytes,
                                &v->req[member]);
}

static void waited_since(sh_vocabulary *v, double t0) {
    double now = sh_now();
    v->seconds += now - t0;
    sh_timeline_note(v->o.timeline, SH_SLICE_EXCHANGE, t0, now);
}

static sh_status finish_send(sh_vocabulary *v, int member) {
    double t0 = sh_now();
    sh_backoff wait = {0};
    for (bool done = false; !done;) {
        SH_TRY(v->o.link->ops->test(v->o.link, v->req[member], &done));
        if (!done) sh_backoff_wait(&wait);
    }
    waited_since(v, t0);
    return SH_OK;
}

static sh_status receive(sh_vocabulary *v, int member, kind what, int n, size_t *bytes) {
    const sh_link_ops *ops = v->o.link->ops;
    int source = 0, rank = v->o.first_rank + member;
    bool found = false;
    size_t len = 0;
    head h;
    double t0 = sh_now();
    for (sh_backoff wait = {0};;) {
        SH_TRY(ops->probe(v->o.link, rank, SH_TAG_TENSOR, &found, &source, &len));
        if (found) break;
        sh_backoff_wait(&wait);
    }
    if (len < sizeof h || len > v->message_bytes)
        SH_FAIL(SH_EPEER, "%zu bytes about logits from rank %d: room is %zu", len, rank, v->message_bytes);
    SH_TRY(ops->recv(v->o.link, rank, SH_TAG_TENSOR, received(v, member), len));
    waited_since(v, t0);
    memcpy(&h, received(v, member), sizeof h);
    if (h.magic != MAGIC || h.kind != (int32_t)what || h.n != n || h.serial != v->serial || h.bytes != len - sizeof h)
        SH_FAIL(SH_EPEER, "logits, call %llu: message %d of %d rows from rank %d: call %llu, message %d of %d rows",
                (unsigned long long)v->serial, (int)what, n, rank, (unsigned long long)h.serial, h.kind, h.n);
    *bytes = len - sizeof h;
    return SH_OK;
}

/* --- what is asked for ---------------------------------------------------------------------------------------------
 */

static bool asks_something(const sh_row_ask *ask, int n) {
    for (int i = 0; i < n; i++)
        if (ask[i].kind != SH_ASK_NOTHING) return true;
    return false;
}

/* The ids of a member's part that a question is about. */
static sh_range asked_of(const sh_vocabulary *v, int member, const sh_row_ask *ask) {
    sh_range r = ids_of(v, member);
    int at = ask->segment * SH_DRAW_SEGMENT;
    if (ask->kind == SH_ASK_ALL) return r;
    if (ask->kind == SH_ASK_NOTHING || at < r.lo || at >= r.hi) return (sh_range){r.lo, r.lo};
    return (sh_range){at, at + SH_DRAW_SEGMENT < r.hi ? at + SH_DRAW_SEGMENT : r.hi};
}

static size_t rest_bytes(const sh_vocabulary *v, int member, int n) {
    size_t bytes = 0;
    for (int i = 0; i < n; i++) {
        sh_range r = asked_of(v, member, &v->ask[i]);
        bytes += (size_t)(r.hi - r.lo) * sizeof(float);
    }
    return bytes;
}

/* --- the other members ---------------------------------------------------------------------------------------------
 */

static const float *own_row(const sh_vocabulary *v, const float *logits, int i) {
    return logits + (size_t)i * (size_t)(v->ids.hi - v->ids.lo);
}

static sh_status make_digests(sh_vocabulary *v, const sh_sampler_row *rows, int n, float *logits, uint8_t *to,
                              size_t *bytes) {
    int width = v->ids.hi - v->ids.lo;
    size_t at = 0, one = 0;
    for (int i = 0; i < n; i++, at += one)
        SH_TRY(sh_sampler_digest(v->o.sampler, rows[i].seq, rows[i].pos, logits + (size_t)i * (size_t)width, width,
                                 v->ids.lo, to + at, &one));
    *bytes = at;
    return SH_OK;
}

static sh_status send_rest(sh_vocabulary *v, int n, const float *logits) {
    uint8_t *to = body(v->send);
    for (int i = 0; i < n; i++) {
        sh_range r = asked_of(v, v->o.share.part, &v->ask[i]);
        size_t bytes = (size_t)(r.hi - r.lo) * sizeof(float);
        memcpy(to, own_row(v, logits, i) + (r.lo - v->ids.lo), bytes);
        to += bytes;
    }
    size_t all = (size_t)(to - body(v->send));
    if (all == 0) return SH_OK;
    write_head(v, REST, n, all);
    SH_TRY(start_send(v, 0, all));
    return finish_send(v, 0);
}

static sh_status tell(sh_vocabulary *v, const sh_sampler_row *rows, int n, float *logits) {
    size_t bytes = 0;
    SH_TRY(make_digests(v, rows, n, logits, body(v->send), &bytes));
    write_head(v, DIGESTS, n, bytes);
    SH_TRY(start_send(v, 0, bytes));
    SH_TRY(finish_send(v, 0));
    for (;;) {
        SH_TRY(receive(v, 0, ASKS, n, &bytes));
        if (bytes != (size_t)n * sizeof *v->ask) SH_FAIL(SH_EPEER, "questions about %d rows: %zu bytes", n, bytes);
        memcpy(v->ask, body(received(v, 0)), bytes);
        if (!asks_something(v->ask, n)) return SH_OK;
        SH_TRY(send_rest(v, n, logits));
    }
}

/* --- member 0 ------------------------------------------------------------------------------------------------------
 */

static sh_status collect(sh_vocabulary *v, const sh_sampler_row *rows, int n, float *logits) {
    size_t bytes = 0, used = 0;
    SH_TRY(make_digests(v, rows, n, logits, body(received(v, 0)), &bytes));
    for (int i = 0; i < n; i++) sh_row_clear(v->row[i]);
    for (int m = 0; m < v->o.share.parts; m++) {
        if (m > 0) SH_TRY(receive(v, m, DIGESTS, n, &bytes));
        const uint8_t *from = body(received(v, m));
        for (int i = 0; i < n; i++, from += used, bytes -= used)
            SH_TRY(sh_row_add(v->row[i], ids_of(v, m), from, bytes, &used));
    }
    for (int i = 0; i < n; i++) SH_TRY(sh_row_join(v->row[i]));
    return SH_OK;
}

static sh_status ask_all(sh_vocabulary *v, const sh_sampler_row *rows, int n) {
    size_t bytes = (size_t)n * sizeof *v->ask;
    for (int i = 0; i < n; i++) SH_TRY(sh_sampler_ask(v->o.sampler, rows[i].seq, rows[i].pos, v->row[i], &v->ask[i]));
    memcpy(body(v->send), v->ask, bytes);
    write_head(v, ASKS, n, bytes);
    for (int m = 1; m < v->o.share.parts; m++) SH_TRY(start_send(v, m, bytes));
    for (int m = 1; m < v->o.share.parts; m++) SH_TRY(finish_send(v, m));
    return SH_OK;
}

/* What a member (this one too) says of one row. */
static void give(sh_vocabulary *v, int member, int i, const float *x) {
    sh_range r = asked_of(v, member, &v->ask[i]);
    float *whole = v->whole + (size_t)i * (size_t)v->o.vocab;
    if (r.lo == r.hi) return;
    if (v->ask[i].kind == SH_ASK_SEGMENT) {
        memcpy(whole, x, (size_t)(r.hi - r.lo) * sizeof *x);
        sh_row_give_segment(v->row[i], v->ask[i].segment, whole);
        return;
    }
    memcpy(whole + r.lo, x, (size_t)(r.hi - r.lo) * sizeof *x);
    sh_row_give_all(v->row[i], whole);
}

static sh_status take_rest(sh_vocabulary *v, int n, const float *logits) {
    for (int i = 0; i < n; i++) give(v, 0, i, own_row(v, logits, i) + (asked_of(v, 0, &v->ask[i]).lo - v->ids.lo));
    for (int m = 1; m < v->o.share.parts; m++) {
        size_t want = rest_bytes(v, m, n), bytes = 0;
        if (want == 0) continue;
        SH_TRY(receive(v, m, REST, n, &bytes));
        if (bytes != want) SH_FAIL(SH_EPEER, "%zu bytes of logits from member %d: %zu were asked for", bytes, m, want);
        const float *from = (const float *)(void *)body(received(v, m));
        for (int i = 0; i < n; i++) {
            sh_range r = asked_of(v, m, &v->ask[i]);
            give(v, m, i, from);
            from += r.hi - r.lo;
        }
    }
    return SH_OK;
}

static sh_status choose(sh_vocabulary *v, const sh_sampler_row *rows, int n, float *logits, sh_token *token,
                        int *made) {
    SH_TRY(collect(v, rows, n, logits));
    for (;;) {
        SH_TRY(ask_all(v, rows, n));
        if (!asks_something(v->ask, n)) break;
        SH_TRY(take_rest(v, n, logits));
    }
    for (int i = 0; i < n; i++)
        SH_TRY(sh_sampler_step_row(v->o.sampler, rows[i].seq, rows[i].pos, v->row[i], &token[i], &made[i]));
    return SH_OK;
}

sh_status sh_vocabulary_sample(sh_vocabulary *v, const sh_sampler_row *rows, int n, float *logits, sh_token *token,
                               int *made) {
    if (n < 1 || n > v->o.max_rows) SH_FAIL(SH_ESTATE, "%d rows of logits: 1 to %d are allowed", n, v->o.max_rows);
    SH_TRY(v->o.share.part == 0 ? choose(v, rows, n, logits, token, made) : tell(v, rows, n, logits));
    v->serial++;
    return SH_OK;
}
