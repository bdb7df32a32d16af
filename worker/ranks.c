/* Exchange of start-up records and the word to leave. See ranks.h. */
#include "worker/ranks.h"

#include <stdlib.h>
#include <string.h>

#include "worker/backoff.h"

#define LEAVE 0x3156454cu /* "LEV1" */

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

sh_status sh_ranks_exchange(sh_link *l, const void *mine, size_t bytes, void *all, const sh_alive *alive) {
    size_t total = bytes * (size_t)l->size;
    int req = 0;
    memcpy((char *)all + bytes * (size_t)l->rank, mine, bytes);
    if (l->rank > 0) {
        SH_TRY(l->ops->send(l, 0, SH_TAG_CONTROL, mine, bytes, &req));
        SH_TRY(finish_send(l, req, alive, 0));
        return take(l, 0, all, total, alive);
    }
    for (int r = 1; r < l->size; r++) SH_TRY(take(l, r, (char *)all + bytes * (size_t)r, bytes, alive));
    for (int r = 1; r < l->size; r++) {
        SH_TRY(l->ops->send(l, r, SH_TAG_CONTROL, all, total, &req));
        SH_TRY(finish_send(l, req, alive, 0));
    }
    return SH_OK;
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
