/*
 * The link between ranks that are threads of one process: every parallel test runs on it, under a debugger or a
 * sanitizer. A message is a pointer to the sender's bytes until the receiver copies them, which is MPI's rendezvous at
 * its strictest: a sender that reuses its buffer early is caught here. Ranks poll; nothing here waits but the barrier,
 * which yields.
 */
#include "proto/link.h"
#include "common/limits.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

typedef struct message {
    struct message *next;
    const void *data;
    size_t len;
    int from, tag;
    enum { FREE, QUEUED, TAKEN } state;
} message;

typedef struct mailbox {
    message *head, *tail; /* messages for this rank, in the order sent */
} mailbox;

typedef struct hub { /* shared by all ranks of the group */
    pthread_mutex_t lock;
    int size, users;
    int arrived;         /* at the barrier */
    unsigned generation; /* of the barrier */
    mailbox *box;        /* [size] */
} hub;

typedef struct local_link {
    sh_link base;
    hub *hub;
    message slot[SH_LINK_MAX_REQUESTS];
    int to[SH_LINK_MAX_REQUESTS];
} local_link;

static local_link *local(sh_link *l) {
    return (local_link *)l;
}

static sh_status check_peer(const sh_link *l, int peer, const char *what) {
    if (peer < 0 || peer >= l->size) SH_FAIL(SH_EINPUT, "%s rank %d: ranks are 0 to %d", what, peer, l->size - 1);
    return SH_OK;
}

static sh_status local_send(sh_link *base, int to, int tag, const void *p, size_t n, int *req) {
    local_link *l = local(base);
    SH_TRY(check_peer(base, to, "send to"));
    int i = 0;
    pthread_mutex_lock(&l->hub->lock);
    while (i < SH_LINK_MAX_REQUESTS && l->slot[i].state != FREE) i++;
    if (i < SH_LINK_MAX_REQUESTS) {
        message *m = &l->slot[i];
        *m = (message){.data = p, .len = n, .from = base->rank, .tag = tag, .state = QUEUED};
        l->to[i] = to;
        mailbox *b = &l->hub->box[to];
        if (b->tail)
            b->tail->next = m;
        else
            b->head = m;
        b->tail = m;
    }
    pthread_mutex_unlock(&l->hub->lock);
    if (i == SH_LINK_MAX_REQUESTS) SH_FAIL(SH_ELIMIT, "more than %d requests are open", SH_LINK_MAX_REQUESTS);
    sh_link_book(base, tag, n);
    *req = i;
    return SH_OK;
}

static sh_status local_test(sh_link *base, int req, bool *done) {
    local_link *l = local(base);
    if (req < 0 || req >= SH_LINK_MAX_REQUESTS) SH_FAIL(SH_ESTATE, "request %d is not open", req);
    pthread_mutex_lock(&l->hub->lock);
    bool open = l->slot[req].state != FREE, taken = l->slot[req].state == TAKEN;
    if (taken) l->slot[req].state = FREE;
    pthread_mutex_unlock(&l->hub->lock);
    if (!open) SH_FAIL(SH_ESTATE, "request %d is not open", req);
    *done = taken;
    return SH_OK;
}

static message *find(const mailbox *b, int from, int tag, message **before) {
    message *prev = NULL;
    for (message *m = b->head; m; prev = m, m = m->next)
        if (m->tag == tag && (from < 0 || m->from == from)) {
            if (before) *before = prev;
            return m;
        }
    return NULL;
}

static void unlink_message(mailbox *b, message *m, message *before) {
    if (before)
        before->next = m->next;
    else
        b->head = m->next;
    if (b->tail == m) b->tail = before;
    m->next = NULL;
}

static sh_status local_probe(sh_link *base, int from, int tag, bool *found, int *source, size_t *len) {
    local_link *l = local(base);
    if (from >= 0) SH_TRY(check_peer(base, from, "probe"));
    pthread_mutex_lock(&l->hub->lock);
    const message *m = find(&l->hub->box[base->rank], from, tag, NULL);
    if (m) {
        *source = m->from;
        *len = m->len;
    }
    pthread_mutex_unlock(&l->hub->lock);
    *found = m != NULL;
    return SH_OK;
}

static sh_status local_recv(sh_link *base, int from, int tag, void *p, size_t len) {
    local_link *l = local(base);
    SH_TRY(check_peer(base, from, "receive from"));
    pthread_mutex_lock(&l->hub->lock);
    mailbox *b = &l->hub->box[base->rank];
    message *before = NULL, *m = find(b, from, tag, &before);
    size_t have = m ? m->len : 0;
    bool fits = m && have == len;
    if (fits) {
        unlink_message(b, m, before);
        if (len) memcpy(p, m->data, len); /* under the lock: the sender may leave at any time otherwise */
        m->state = TAKEN;
    }
    pthread_mutex_unlock(&l->hub->lock);
    if (!m) SH_FAIL(SH_ESTATE, "no message with tag %d from rank %d waits", tag, from);
    if (!fits) SH_FAIL(SH_ESTATE, "message from rank %d has %zu bytes: %zu were expected", from, have, len);
    return SH_OK;
}

/* What waits is whole: it is copied at once, and the request only says so. */
static sh_status local_accept(sh_link *base, int from, int tag, void *p, size_t len, int *req) {
    local_link *l = local(base);
    int i = 0;
    pthread_mutex_lock(&l->hub->lock);
    while (i < SH_LINK_MAX_REQUESTS && l->slot[i].state != FREE) i++;
    pthread_mutex_unlock(&l->hub->lock); /* this rank alone fills its slots */
    if (i == SH_LINK_MAX_REQUESTS) SH_FAIL(SH_ELIMIT, "more than %d requests are open", SH_LINK_MAX_REQUESTS);
    SH_TRY(local_recv(base, from, tag, p, len));
    pthread_mutex_lock(&l->hub->lock);
    l->slot[i] = (message){.state = TAKEN};
    pthread_mutex_unlock(&l->hub->lock);
    *req = i;
    return SH_OK;
}

static sh_status local_barrier(sh_link *base) {
    hub *h = local(base)->hub;
    pthread_mutex_lock(&h->lock);
    unsigned mine = h->generation;
    if (++h->arrived == h->size) {
        h->arrived = 0;
        h->generation++;
    }
    while (h->generation == mine) {
        pthread_mutex_unlock(&h->lock);
        sched_yield();
        pthread_mutex_lock(&h->lock);
    }
    pthread_mutex_unlock(&h->lock);
    return SH_OK;
}

static void hub_release(hub *h) {
    pthread_mutex_lock(&h->lock);
    int left = --h->users;
    pthread_mutex_unlock(&h->lock);
    if (left) return;
    pthread_mutex_destroy(&h->lock);
    free(h->box);
    free(h);
}

static void local_destroy(sh_link **p) {
    local_link *l = local(*p);
    if (!l) return;
    pthread_mutex_lock(&l->hub->lock);
    for (int i = 0; i < SH_LINK_MAX_REQUESTS; i++) { /* what nobody took is gone with its sender */
        message *before = NULL, *m = &l->slot[i];
        if (m->state != QUEUED) continue;
        mailbox *b = &l->hub->box[l->to[i]];
        for (message *k = b->head; k && k != m; k = k->next) before = k;
        unlink_message(b, m, before);
    }
    pthread_mutex_unlock(&l->hub->lock);
    hub_release(l->hub);
    free(l);
    *p = NULL;
}

static const sh_link_ops local_ops = {.name = "local",
                                      .send = local_send,
                                      .test = local_test,
                                      .probe = local_probe,
                                      .accept = local_accept,
                                      .recv = local_recv,
                                      .barrier = local_barrier,
                                      .destroy = local_destroy};

sh_status sh_link_local_create(int n, sh_link **out) {
    if (n < 1 || n > SH_MAX_RANKS) SH_FAIL(SH_EINPUT, "ranks: %d: 1 to %d are allowed", n, SH_MAX_RANKS);
    hub *h = calloc(1, sizeof *h);
    local_link **l = calloc((size_t)n, sizeof *l);
    bool ok = h && l && (h->box = calloc((size_t)n, sizeof *h->box));
    for (int i = 0; ok && i < n; i++) ok = (l[i] = calloc(1, sizeof **l)) != NULL;
    if (!ok) {
        for (int i = 0; l && i < n; i++) free(l[i]);
        free(l);
        if (h) free(h->box);
        free(h);
        SH_FAIL(SH_EMEMORY, "no memory for a local link of %d ranks", n);
    }
    pthread_mutex_init(&h->lock, NULL);
    h->size = h->users = n;
    for (int i = 0; i < n; i++) {
        l[i]->base = (sh_link){.ops = &local_ops, .rank = i, .size = n};
        l[i]->hub = h;
        out[i] = &l[i]->base;
    }
    free(l);
    return SH_OK;
}
