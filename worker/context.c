/*
 * Sending and waiting for members. Two send buffers for each: queries may still be on their way when partials follow. A
 * rank that waits keeps the link going for its own sends. A dead member is noticed by the uplink, which ends this rank
 * too. See context.h.
 */
#include "worker/context.h"

#include <stdlib.h>
#include <string.h>

#include "common/mem.h"
#include "worker/backoff.h"

enum { SENDS = 2, HEAD = 64 };

#define MAGIC 0x31585443u /* "CTX1" */

/* At the front of each message; the rest of its 64 bytes is 0. In the machine's byte order, like the blocks of a cut.
 */
typedef struct head {
    uint32_t magic;
    int32_t from;    /* member */
    uint64_t number; /* of this message between these two, from 0 */
    uint64_t bytes;  /* that follow the head */
} head;

typedef struct sending {
    uint8_t *buffer;
    size_t bytes; /* with the head */
    int req;      /* −1: free */
} sending;

/* What this member and another have sent each other. */
typedef struct pair {
    sending send[SENDS];
    uint8_t *received;
    uint64_t sent, taken; /* messages */
} pair;

struct sh_context {
    sh_context_peers table;
    sh_link *link;
    int first, members, member;
    size_t room; /* of a buffer */
    pair *pair;  /* [members] */
};

static sh_status room(void *context, int to, size_t n, void **out);
static sh_status send_room(void *context, int to);
static sh_status take(void *context, int from, size_t n, const void **data);

sh_status sh_context_create(sh_link *link, int first, int members, size_t bytes, sh_context **out) {
    sh_context *c = calloc(1, sizeof *c);
    if (!c) SH_FAIL(SH_EMEMORY, "no memory for the exchange of %d members", members);
    *c = (sh_context){.link = link, .first = first, .members = members, .member = link->rank - first};
    c->table = (sh_context_peers){
        .ctx = c, .members = members, .member = c->member, .room = room, .send = send_room, .take = take};
    c->room = HEAD + sh_mem_align(bytes);
    c->pair = calloc((size_t)members, sizeof *c->pair);
    sh_status st = SH_OK;
    if (!c->pair)
        st = sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "no memory for the exchange of %d members", members);
    for (int m = 0; st == SH_OK && m < members; m++) {
        pair *p = &c->pair[m];
        for (int i = 0; i < SENDS; i++) p->send[i].req = -1;
        if (m == c->member) continue;
        for (int i = 0; st == SH_OK && i < SENDS; i++)
            st = sh_mem_alloc(c->room, "messages to a member", (void **)&p->send[i].buffer);
        if (st == SH_OK) st = sh_mem_alloc(c->room, "messages of a member", (void **)&p->received);
    }
    if (st != SH_OK) {
        sh_context_destroy(&c);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = c;
    return SH_OK;
}

void sh_context_destroy(sh_context **cp) {
    sh_context *c = *cp;
    if (!c) return;
    for (int m = 0; c->pair && m < c->members; m++) {
        for (int i = 0; i < SENDS; i++) sh_mem_free(c->pair[m].send[i].buffer, c->room);
        sh_mem_free(c->pair[m].received, c->room);
    }
    free(c->pair);
    free(c);
    *cp = NULL;
}

sh_status sh_context_progress(sh_context *c) {
    for (int m = 0; m < c->members; m++)
        for (int i = 0; i < SENDS; i++) {
            sending *s = &c->pair[m].send[i];
            bool done = false;
            if (s->req < 0) continue;
            SH_TRY(c->link->ops->test(c->link, s->req, &done));
            if (done) s->req = -1;
        }
    return SH_OK;
}

bool sh_context_is_idle(const sh_context *c) {
    for (int m = 0; m < c->members; m++)
        for (int i = 0; i < SENDS; i++)
            if (c->pair[m].send[i].req >= 0) return false;
    return true;
}

const sh_context_peers *sh_context_table(const sh_context *c) {
    return &c->table;
}

static sh_status check_member(const sh_context *c, int m, size_t n) {
    if (m < 0 || m >= c->members || m == c->member)
        SH_FAIL(SH_ESTATE, "member %d: the others of %d are meant, this is %d", m, c->members, c->member);
    if (n > c->room - HEAD)
        SH_FAIL(SH_ESTATE, "a message of %zu bytes between members %d and %d: room is %zu", n, c->member, m,
                c->room - HEAD);
    return SH_OK;
}

static sh_status room(void *context, int to, size_t n, void **out) {
    sh_context *c = context;
    SH_TRY(check_member(c, to, n));
    sending *s = &c->pair[to].send[c->pair[to].sent % SENDS];
    sh_backoff wait = {0};
    while (s->req >= 0) {
        SH_TRY(sh_context_progress(c));
        if (s->req >= 0) sh_backoff_wait(&wait);
    }
    s->bytes = HEAD + n;
    *out = s->buffer + HEAD;
    return SH_OK;
}

static sh_status send_room(void *context, int to) {
    sh_context *c = context;
    pair *p = &c->pair[to];
    sending *s = &p->send[p->sent % SENDS];
    head h = {.magic = MAGIC, .from = c->member, .number = p->sent, .bytes = s->bytes - HEAD};
    memset(s->buffer, 0, HEAD);
    memcpy(s->buffer, &h, sizeof h);
    p->sent++;
    return c->link->ops->send(c->link, c->first + to, SH_TAG_CONTEXT, s->buffer, s->bytes, &s->req);
}

static sh_status take(void *context, int from, size_t n, const void **data) {
    sh_context *c = context;
    SH_TRY(check_member(c, from, n));
    pair *p = &c->pair[from];
    int source = 0, rank = c->first + from;
    size_t len = 0;
    bool found = false;
    sh_backoff wait = {0};
    for (;;) {
        SH_TRY(c->link->ops->probe(c->link, rank, SH_TAG_CONTEXT, &found, &source, &len));
        if (found) break;
        SH_TRY(sh_context_progress(c));
        sh_backoff_wait(&wait);
    }
    if (len != HEAD + n)
        SH_FAIL(SH_EPEER, "message %llu of rank %d has %zu bytes: %zu were expected", (unsigned long long)p->taken,
                rank, len, HEAD + n);
    SH_TRY(c->link->ops->recv(c->link, rank, SH_TAG_CONTEXT, p->received, len));
    head h;
    memcpy(&h, p->received, sizeof h);
    if (h.magic != MAGIC || h.from != from || h.number != p->taken || h.bytes != n)
        SH_FAIL(SH_EPEER,
                "message of rank %d: magic %08x, member %d, number %llu, %llu bytes: member %d, number %llu, %zu bytes "
                "were expected",
                rank, h.magic, h.from, (unsigned long long)h.number, (unsigned long long)h.bytes, from,
                (unsigned long long)p->taken, n);
    p->taken++;
    *data = p->received + HEAD;
    return SH_OK;
}
