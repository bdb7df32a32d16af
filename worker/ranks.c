/* Exchange of start-up records and the word to leave. See ranks.h. */
#include "worker/ranks.h"

#include <stdlib.h>
#include <string.h>

#include "common/file.h"
#include "common/hash.h"
#include "common/keep.h"
#include "worker/backoff.h"

#define LEAVE           0x3156454cu /* "LEV1" */
#define CLOCK_QUESTIONS 16

static sh_status finish_send(sh_link *l, int req, const sh_alive *alive, double until) {
    bool done = false;
    for (sh_backoff wait = {0}; !done;) {
        SH_TRY(l->ops->test(l, req, &done));
        if (done) break;
        if (alive) SH_TRY(alive->check(alive->arg));
        if (until > 0 && sh_now() > until)
            SH_FAIL(SH_EPEER, "rank %d: the next rank does not take the word to leave", l->rank);
        sh_backoff_wait(&wait);
    }
    return SH_OK;
}

static sh_status take(sh_link *l, int from, void *p, size_t bytes, const sh_alive *alive) {
    for (sh_backoff wait = {0};;) {
        bool found = false;
        int source = 0;
        size_t len = 0;
        SH_TRY(l->ops->probe(l, from, SH_TAG_CONTROL, &found, &source, &len));
        if (found) {
            if (len != bytes)
                SH_FAIL(SH_EPEER, "control message of %zu bytes from rank %d: %zu were expected", len, from, bytes);
            return l->ops->recv(l, from, SH_TAG_CONTROL, p, len);
        }
        if (alive) SH_TRY(alive->check(alive->arg));
        sh_backoff_wait(&wait);
    }
}

/* A message that outlives its sender's wait: one who gives up leaves it to the link, which may read it at any time. */
typedef struct parcel {
    bool open; /* a send of it was not seen to end */
    unsigned char bytes[];
} parcel;

static sh_status wrap(const void *p, size_t bytes, parcel **out) {
    parcel *c = malloc(sizeof *c + bytes);
    if (!c) SH_FAIL(SH_EMEMORY, "no memory for a message of %zu bytes", bytes);
    c->open = false;
    memcpy(c->bytes, p, bytes);
    *out = c;
    return SH_OK;
}

static void unwrap(parcel *c) {
    if (c->open)
        sh_keep(c);
    else
        free(c);
}

static sh_status give_parcel(sh_link *l, int to, parcel *c, size_t bytes, const sh_alive *alive) {
    int req = 0;
    SH_TRY(l->ops->send(l, to, SH_TAG_CONTROL, c->bytes, bytes, &req));
    c->open = true;
    SH_TRY(finish_send(l, req, alive, 0));
    c->open = false;
    return SH_OK;
}

static sh_status give(sh_link *l, int to, const void *p, size_t bytes, const sh_alive *alive) {
    parcel *c = NULL;
    SH_TRY(wrap(p, bytes, &c));
    sh_status st = give_parcel(l, to, c, bytes, alive);
    unwrap(c);
    return st;
}

static sh_status give_all(sh_link *l, const void *p, size_t bytes, const sh_alive *alive) {
    parcel *c = NULL;
    sh_status st = SH_OK;
    SH_TRY(wrap(p, bytes, &c));
    for (int r = 1; st == SH_OK && r < l->size; r++) st = give_parcel(l, r, c, bytes, alive);
    unwrap(c);
    return st;
}

sh_status sh_ranks_exchange(sh_link *l, const void *mine, size_t bytes, void *all, const sh_alive *alive) {
    size_t total = bytes * (size_t)l->size;
    memcpy((char *)all + bytes * (size_t)l->rank, mine, bytes);
    if (l->rank > 0) {
        SH_TRY(give(l, 0, mine, bytes, alive));
        return take(l, 0, all, total, alive);
    }
    for (int r = 1; r < l->size; r++) SH_TRY(take(l, r, (char *)all + bytes * (size_t)r, bytes, alive));
    return l->size > 1 ? give_all(l, all, total, alive) : SH_OK;
}

/* Same kernel, same monotonic clock. 0: not known. */
static uint64_t boot_id(void) {
    char *text = NULL;
    size_t len = 0;
    if (sh_file_read("/proc/sys/kernel/random/boot_id", 4096, &text, &len) != SH_OK) return 0;
    uint64_t h = sh_hash64(0, text, len);
    free(text);
    return h;
}

typedef struct clock_word {
    uint64_t boot;
    int64_t offset, now;
} clock_word;

static int64_t nanoseconds(double seconds) {
    return (int64_t)(seconds * 1e9);
}

static int64_t own_offset(void) {
    struct timespec t;
    double before = sh_now();
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec - nanoseconds((before + sh_now()) / 2);
}

static sh_status answer_clock(sh_link *l, const sh_alive *alive, int64_t offset) {
    clock_word w = {.boot = boot_id(), .offset = offset};
    for (int r = 1; r < l->size; r++)
        for (int i = 0; i < CLOCK_QUESTIONS; i++) {
            uint32_t question = 0;
            SH_TRY(take(l, r, &question, sizeof question, alive));
            w.now = nanoseconds(sh_now()) + offset;
            SH_TRY(give(l, r, &w, sizeof w, alive));
        }
    return SH_OK;
}

static sh_status ask_clock(sh_link *l, const sh_alive *alive, sh_rank_clock *out) {
    static const uint32_t question = 1;
    uint64_t boot = boot_id();
    *out = (sh_rank_clock){.error = INT64_MAX};
    for (int i = 0; i < CLOCK_QUESTIONS; i++) {
        clock_word w;
        int64_t before = nanoseconds(sh_now());
        SH_TRY(give(l, 0, &question, sizeof question, alive));
        SH_TRY(take(l, 0, &w, sizeof w, alive));
        int64_t after = nanoseconds(sh_now()), half = (after - before) / 2;
        if (w.boot && w.boot == boot)
            *out = (sh_rank_clock){w.offset, 0};
        else if (half < out->error)
            *out = (sh_rank_clock){w.now - before - half, half};
    }
    return SH_OK;
}

sh_status sh_ranks_clock(sh_link *l, const sh_alive *alive, sh_rank_clock *out) {
    if (l->rank > 0) return ask_clock(l, alive, out);
    *out = (sh_rank_clock){own_offset(), 0};
    return answer_clock(l, alive, out->offset);
}

sh_status sh_ranks_pass_leave(sh_link *l, double seconds) {
    static const uint32_t word = LEAVE;
    int req = 0;
    if (l->rank == l->size - 1) return SH_OK;
    SH_TRY(l->ops->send(l, l->rank + 1, SH_TAG_CONTROL, &word, sizeof word, &req));
    return finish_send(l, req, NULL, sh_now() + seconds);
}

sh_status sh_ranks_told_leave(sh_link *l, bool *told) {
    uint32_t word = 0;
    bool found = false;
    int source = 0;
    size_t len = 0;
    SH_TRY(l->ops->probe(l, l->rank - 1, SH_TAG_CONTROL, &found, &source, &len));
    if (found) {
        if (len != sizeof word) SH_FAIL(SH_EPEER, "control message of %zu bytes: %zu were expected", len, sizeof word);
        SH_TRY(l->ops->recv(l, l->rank - 1, SH_TAG_CONTROL, &word, len));
        if (word != LEAVE) SH_FAIL(SH_EPEER, "control message 0x%x: only the word to leave is expected", word);
    }
    *told = found;
    return SH_OK;
}
