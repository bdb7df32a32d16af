/*
 * Sees what the ranks of a fake group send on the local link, message by message, and takes batches and K/V rows apart
 * as docs/protocol.md has them. Test code only.
 */
#ifndef SH_TESTS_TAP_H
#define SH_TESTS_TAP_H

#include "tests/cluster/fake.h"

#include "model/batch.h"
#include "worker/shard.h"

typedef struct tap { /* one per rank, used by its thread alone */
    sh_status (*send)(sh_link *l, int to, int tag, const void *p, size_t n, int *req);
    void (*note)(const sh_link *l, int to, int tag, const void *p, size_t n);
    sh_batch batch;
} tap;

static tap taps[FAKE_RANKS];
static sh_link_ops tapped;

static inline sh_status tap_send(sh_link *l, int to, int tag, const void *p, size_t n, int *req) {
    SH_TRY(taps[l->rank].send(l, to, tag, p, n, req));
    taps[l->rank].note(l, to, tag, p, n);
    return SH_OK;
}

/* For fake.on_link: note is told of each message that the link has taken, by the thread of its sender. */
static inline void tap_on(sh_link *l, void (*note)(const sh_link *l, int to, int tag, const void *p, size_t n)) {
    tap *t = &taps[l->rank];
    t->send = l->ops->send;
    t->note = note;
    if (!t->batch.arena.base) MUST(sh_batch_create((size_t)4 << 20, &t->batch));
    if (l->rank == 0) tapped = *l->ops; /* the same for all */
    tapped.send = tap_send;
    l->ops = &tapped;
}

static inline void tap_close(void) {
    for (int r = 0; r < FAKE_RANKS; r++) sh_batch_release(&taps[r].batch);
}

static inline size_t align64(size_t n) {
    return (n + 63) / 64 * 64;
}

/* The micro-batch of a message from this rank, until its next one. *header: bytes before the block of its cut, which
 * begins at a multiple of 64; a descriptor alone is not padded. */
static inline const sh_batch *tap_batch(int rank, const void *p, size_t n, size_t *header) {
    size_t used = 0;
    MUST(sh_batch_decode(&taps[rank].batch, p, n, &used));
    *header = align64(used) < n ? align64(used) : n;
    return &taps[rank].batch;
}

/* "K/V rows of prompts": an envelope of 64 bytes, then shards at multiples of 64. Adds what they hold. */
static inline void tap_shards(const uint8_t *p, size_t n, uint64_t *shards, uint64_t *payload) {
    for (size_t at = 64; at < n;) {
        sh_shard s;
        size_t used = 0;
        MUST(sh_shard_open(p + at, n - at, &s, &used));
        *payload += sh_shard_payload_bytes(&s);
        ++*shards;
        at += align64(used);
    }
}

#endif
