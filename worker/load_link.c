/*
 * The exchange of weights. Expectations of each source are a queue, since messages of a pair arrive in the order sent.
 * No rank waits for another's order: whatever comes is taken whenever this rank polls, so a sender waits only for ranks
 * to get around to it. See load_link.h.
 */
#include "worker/load_link.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/keep.h"
#include "worker/backoff.h"

enum {
    OPEN_SENDS = 64,
    OPEN_TAKES = 64,
    OPEN_WORDS = 64
}; /* far fewer than a link can have open, however many ranks */

#define WORD_MAGIC   0x31534457u /* "WDS1" */
#define STOP_SECONDS 3.0         /* for the others to hear of a failure and end what is under way */
#define NAP_SECONDS  50e-6
#define CHANNEL_WORD sh_link_channel(SH_TAG_WEIGHTS, 1)

/* The last that a rank says to another; its text ends with a 0 byte, and the message there. In the machine's byte
 * order, as the weights are. */
typedef struct word {
    uint32_t magic;
    int32_t status;    /* SH_OK: it has everything */
    uint64_t messages; /* of weights that it sent to this one */
    char text[1000];   /* of the failure: whose it is, and what */
} word;

typedef struct place {
    void *p;
    size_t n;
} place;

typedef struct peer {
    place *expected; /* queue */
    int n, cap, next;
    uint64_t sent, taken, announced; /* messages; announced: by its word */
    bool told;                       /* its word is here */
} peer;

typedef struct saying { /* a word under way */
    int req;            /* −1: free */
    word w;
} saying;

typedef struct taking { /* under way to its place */
    int req;            /* −1: free */
    size_t n;
    void *spare; /* the place of one that nobody expects any more; else NULL */
} taking;

struct sh_load_link {
    sh_load_peers table;
    sh_link *link;
    const sh_alive *alive;
    peer *peer;           /* [size] */
    int send[OPEN_SENDS]; /* requests; −1: free */
    taking take[OPEN_TAKES];
    saying say[OPEN_WORDS];
    int left;           /* expectations that are not met */
    int said;           /* ranks that this one's word was sent to, from the next one on */
    bool speaking;      /* its word is `last` */
    word last, failure; /* failure: the first one heard, status SH_OK: none */
    bool was_told;      /* of the failure that ended the loading here */
    bool stopping;      /* what does not fit is dropped */
    bool stuck;         /* in vain: somebody may still read what was sent */
};

static sh_status gather(void *ctx, const void *mine, size_t n, void *all);
static sh_status send_bytes(void *ctx, int to, const void *p, size_t n);
static sh_status expect(void *ctx, int from, void *p, size_t n);
static sh_status poll(void *ctx);
static sh_status finish(void *ctx);
static bool stop(void *ctx, sh_status st);

sh_status sh_load_link_create(sh_link *link, const sh_alive *alive, sh_load_link **out) {
    sh_load_link *x = calloc(1, sizeof *x);
    if (x) x->peer = calloc((size_t)link->size, sizeof *x->peer);
    if (!x || !x->peer) {
        free(x);
        SH_FAIL(SH_EMEMORY, "no memory for loading together with %d ranks", link->size);
    }
    x->link = link;
    x->alive = alive;
    x->table = (sh_load_peers){.ctx = x,
                               .members = link->size,
                               .member = link->rank,
                               .gather = gather,
                               .send = send_bytes,
                               .expect = expect,
                               .poll = poll,
                               .finish = finish,
                               .stop = stop};
    for (int i = 0; i < OPEN_SENDS; i++) x->send[i] = -1;
    for (int i = 0; i < OPEN_TAKES; i++) x->take[i].req = -1;
    for (int i = 0; i < OPEN_WORDS; i++) x->say[i].req = -1;
    *out = x;
    return SH_OK;
}

void sh_load_link_destroy(sh_load_link **xp) {
    sh_load_link *x = *xp;
    *xp = NULL;
    if (!x) return;
    if (x->stuck) { /* the link still reads its words */
        sh_keep(x);
        return;
    }
    for (int i = 0; i < x->link->size; i++) free(x->peer[i].expected);
    for (int i = 0; i < OPEN_TAKES; i++) free(x->take[i].spare);
    free(x->peer);
    free(x);
}

sh_load_peers *sh_load_link_peers(sh_load_link *x) {
    return &x->table;
}

static sh_status gather(void *ctx, const void *mine, size_t n, void *all) {
    sh_load_link *x = ctx;
    return sh_ranks_exchange(x->link, mine, n, all, x->alive);
}

static sh_status expect(void *ctx, int from, void *p, size_t n) {
    sh_load_link *x = ctx;
    peer *e = &x->peer[from];
    if (e->n == e->cap) {
        int cap = e->cap ? 2 * e->cap : 64;
        place *q = realloc(e->expected, (size_t)cap * sizeof *q);
        if (!q) SH_FAIL(SH_EMEMORY, "no memory for the places of weights");
        e->expected = q;
        e->cap = cap;
    }
    e->expected[e->n++] = (place){p, n};
    x->left++;
    return SH_OK;
}

/* ---- progress -------------------------------------------------------------------------------------------------------
 */

static sh_status test(sh_load_link *x, int *req, bool *done) {
    *done = *req < 0;
    if (*done) return SH_OK;
    SH_TRY(x->link->ops->test(x->link, *req, done));
    if (*done) *req = -1;
    return SH_OK;
}

static sh_status end_requests(sh_load_link *x) {
    bool done;
    for (int i = 0; i < OPEN_SENDS; i++) SH_TRY(test(x, &x->send[i], &done));
    for (int i = 0; i < OPEN_WORDS; i++) SH_TRY(test(x, &x->say[i].req, &done));
    for (int i = 0; i < OPEN_TAKES; i++) {
        taking *t = &x->take[i];
        if (t->req < 0) continue;
        SH_TRY(test(x, &t->req, &done));
        if (!done) continue;
        if (!t->spare) x->table.received += t->n, x->left--;
        free(t->spare);
        t->spare = NULL;
    }
    return SH_OK;
}

/* Where the next message of a rank goes. */
static sh_status find_place(sh_load_link *x, int from, size_t len, taking *t, void **p) {
    peer *e = &x->peer[from];
    const place *next = e->next < e->n ? &e->expected[e->next] : NULL;
    *p = next ? next->p : NULL;
    if (next && next->n == len) {
        e->next++;
        return SH_OK;
    }
    if (!x->stopping)
        SH_FAIL(SH_EPEER, "weights from rank %d: message %llu has %zu bytes: %zu were expected", from,
                (unsigned long long)e->taken, len, next ? next->n : 0);
    *p = t->spare = malloc(len);
    if (!t->spare) SH_FAIL(SH_EMEMORY, "no memory for %zu bytes from rank %d", len, from);
    return SH_OK;
}

static sh_status take_weights(sh_load_link *x) {
    for (int i = 0; i < OPEN_TAKES; i++) {
        taking *t = &x->take[i];
        bool found = false;
        int from = 0;
        size_t len = 0;
        void *p = NULL;
        if (t->req >= 0) continue;
        SH_TRY(x->link->ops->probe(x->link, -1, SH_TAG_WEIGHTS, &found, &from, &len));
        if (!found) return SH_OK;
        SH_TRY(find_place(x, from, len, t, &p));
        t->n = len;
        SH_TRY(x->link->ops->accept(x->link, from, SH_TAG_WEIGHTS, p, len, &t->req));
        x->peer[from].taken++;
    }
    return SH_OK;
}

static sh_status take_words(sh_load_link *x) {
    for (;;) {
        bool found = false;
        int from = 0;
        size_t len = 0;
        word w;
        SH_TRY(x->link->ops->probe(x->link, -1, CHANNEL_WORD, &found, &from, &len));
        if (!found) return SH_OK;
        if (len <= offsetof(word, text) || len > sizeof w)
            SH_FAIL(SH_EPEER, "word on loading from rank %d: %zu bytes: %zu to %zu were expected", from, len,
                    offsetof(word, text) + 1, sizeof w);
        SH_TRY(x->link->ops->recv(x->link, from, CHANNEL_WORD, &w, len));
        if (w.magic != WORD_MAGIC) SH_FAIL(SH_EPEER, "word on loading from rank %d: magic %08x", from, w.magic);
        ((char *)&w)[len - 1] = 0;
        x->peer[from].announced = w.messages;
        x->peer[from].told = true;
        if (w.status != SH_OK && x->failure.status == SH_OK) x->failure = w;
    }
}

/* The word goes to everybody who has not had one, a few at a time; each rank begins with the next. */
static sh_status say_words(sh_load_link *x) {
    for (int i = 0; x->speaking && x->said < x->link->size - 1 && i < OPEN_WORDS; i++) {
        saying *s = &x->say[i];
        if (s->req >= 0) continue;
        int to = (x->link->rank + 1 + x->said) % x->link->size;
        s->w = x->last;
        s->w.messages = x->peer[to].sent;
        SH_TRY(x->link->ops->send(x->link, to, CHANNEL_WORD, &s->w, offsetof(word, text) + strlen(s->w.text) + 1,
                                  &s->req));
        x->said++;
    }
    return SH_OK;
}

/* From now on progress says it. */
static void speak(sh_load_link *x, sh_status st, const char *text) {
    x->last = (word){.magic = WORD_MAGIC, .status = (int32_t)st};
    snprintf(x->last.text, sizeof x->last.text, "%s", text);
    x->speaking = true;
}

static sh_status progress(sh_load_link *x) {
    SH_TRY(end_requests(x));
    SH_TRY(take_weights(x));
    SH_TRY(take_words(x));
    return say_words(x);
}

static bool has_open_sends(const sh_load_link *x) {
    for (int i = 0; i < OPEN_SENDS; i++)
        if (x->send[i] >= 0) return true;
    for (int i = 0; i < OPEN_WORDS; i++)
        if (x->say[i].req >= 0) return true;
    return false;
}

static bool has_open_takes(const sh_load_link *x) {
    for (int i = 0; i < OPEN_TAKES; i++)
        if (x->take[i].req >= 0) return true;
    return false;
}

/* Nothing to do but progress: short naps while bytes flow, which on some transports they do only then. */
static void rest(const sh_load_link *x, sh_backoff *wait) {
    if (!has_open_takes(x) && !has_open_sends(x)) {
        sh_backoff_wait(wait);
        return;
    }
    sh_backoff_reset(wait);
    sh_sleep(NAP_SECONDS);
}

static sh_status poll(void *ctx) {
    sh_load_link *x = ctx;
    SH_TRY(progress(x));
    if (x->failure.status != SH_OK) {
        x->was_told = true;
        SH_FAIL((sh_status)x->failure.status, "%s", x->failure.text);
    }
    return x->alive ? x->alive->check(x->alive->arg) : SH_OK;
}

/* ---- sending --------------------------------------------------------------------------------------------------------
 */

static sh_status send_bytes(void *ctx, int to, const void *p, size_t n) {
    sh_load_link *x = ctx;
    for (sh_backoff wait = {0};;) {
        for (int i = 0; i < OPEN_SENDS; i++) {
            if (x->send[i] >= 0) continue;
            SH_TRY(x->link->ops->send(x->link, to, SH_TAG_WEIGHTS, p, n, &x->send[i]));
            x->peer[to].sent++;
            return SH_OK;
        }
        SH_TRY(poll(x));
        rest(x, &wait);
    }
}

/* Everybody has said the last word, and all that was sent before it is here. */
static bool has_heard_all(const sh_load_link *x) {
    if (has_open_takes(x)) return false;
    for (int i = 0; i < x->link->size; i++) {
        const peer *e = &x->peer[i];
        if (i != x->link->rank && (!e->told || e->taken < e->announced)) return false;
    }
    return true;
}

/* … and this one has said it, and everything that it sent is taken. */
static bool has_ended(const sh_load_link *x) {
    return x->said == x->link->size - 1 && has_heard_all(x) && !has_open_sends(x);
}

static sh_status finish(void *ctx) {
    sh_load_link *x = ctx;
    for (sh_backoff wait = {0}; x->left > 0 || has_open_sends(x);) {
        SH_TRY(poll(x));
        rest(x, &wait);
    }
    speak(x, SH_OK, "");
    for (sh_backoff wait = {0}; !has_ended(x);) {
        SH_TRY(poll(x));
        rest(x, &wait);
    }
    return SH_OK;
}

static bool stop(void *ctx, sh_status st) {
    sh_load_link *x = ctx;
    char text[sizeof x->last.text];
    if (x->was_told) /* goes on as it was heard */
        snprintf(text, sizeof text, "%s", sh_error_text());
    else
        snprintf(text, sizeof text, "rank %d: %s", x->link->rank, sh_error_text());
    x->stopping = true;
    speak(x, st, text);
    bool ok = true;
    sh_backoff wait = {0};
    for (double until = sh_now() + STOP_SECONDS; ok && !has_ended(x);) {
        ok = progress(x) == SH_OK && sh_now() < until;
        rest(x, &wait);
    }
    x->stuck = !ok;
    return ok;
}
