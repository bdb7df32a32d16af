/*
 * The link table on threads of one process: order per pair and tag, lengths, when a send's buffer is free again, a ring
 * of ranks under random traffic, a rank that leaves with messages nobody took. Run under tsan as well.
 */
#include <CUnit/Basic.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include "common/clock.h"
#include "common/hash.h"
#include "proto/link.h"

static void test_order(void) {
    sh_link *l[2];
    CU_ASSERT_FATAL(sh_link_local_create(2, l) == SH_OK);
    int a[3] = {1, 2, 3}, req[3], got = 0, source = -1;
    size_t len = 0;
    bool found = false, done = true;
    CU_ASSERT_EQUAL(l[1]->ops->probe(l[1], -1, SH_TAG_BATCH, &found, &source, &len), SH_OK);
    CU_ASSERT_FALSE(found);
    CU_ASSERT_EQUAL(l[0]->ops->send(l[0], 1, SH_TAG_BATCH, &a[0], sizeof(int), &req[0]), SH_OK);
    CU_ASSERT_EQUAL(l[0]->ops->send(l[0], 1, SH_TAG_TOKENS, &a[1], sizeof(int), &req[1]), SH_OK);
    CU_ASSERT_EQUAL(l[0]->ops->send(l[0], 1, SH_TAG_BATCH, &a[2], sizeof(int), &req[2]), SH_OK);
    CU_ASSERT_EQUAL(l[0]->ops->test(l[0], req[0], &done), SH_OK);
    CU_ASSERT_FALSE(done); /* nobody has taken it: the buffer is not free */
    CU_ASSERT_EQUAL(l[1]->ops->probe(l[1], 0, SH_TAG_TOKENS, &found, &source, &len), SH_OK);
    CU_ASSERT(found && source == 0 && len == sizeof(int));
    CU_ASSERT_EQUAL(l[1]->ops->recv(l[1], 0, SH_TAG_TOKENS, &got, len), SH_OK);
    CU_ASSERT_EQUAL(got, 2);
    CU_ASSERT_EQUAL(l[1]->ops->recv(l[1], 0, SH_TAG_BATCH, &got, len + 1), SH_ESTATE); /* wrong length: it stays */
    CU_ASSERT_EQUAL(l[1]->ops->recv(l[1], 0, SH_TAG_BATCH, &got, len), SH_OK);
    CU_ASSERT_EQUAL(got, 1);
    CU_ASSERT_EQUAL(l[1]->ops->recv(l[1], 0, SH_TAG_BATCH, &got, len), SH_OK);
    CU_ASSERT_EQUAL(got, 3);
    CU_ASSERT_EQUAL(l[1]->ops->recv(l[1], 0, SH_TAG_BATCH, &got, len), SH_ESTATE);
    CU_ASSERT_EQUAL(l[0]->ops->test(l[0], req[0], &done), SH_OK);
    CU_ASSERT_TRUE(done);
    CU_ASSERT_EQUAL(l[0]->ops->test(l[0], req[0], &done), SH_ESTATE); /* closed */
    CU_ASSERT_EQUAL(l[0]->sent_bytes, 3 * sizeof(int));
    sh_link_destroy(&l[0]);
    sh_link_destroy(&l[1]);
}

static void test_limits(void) {
    sh_link *l[1];
    int req = 0;
    CU_ASSERT_EQUAL(sh_link_local_create(0, l), SH_EINPUT);
    CU_ASSERT_FATAL(sh_link_local_create(1, l) == SH_OK);
    CU_ASSERT_EQUAL(l[0]->ops->send(l[0], 1, SH_TAG_BATCH, "", 0, &req), SH_EINPUT);
    for (int i = 0; i < SH_LINK_MAX_REQUESTS; i++)
        CU_ASSERT_EQUAL(l[0]->ops->send(l[0], 0, SH_TAG_BATCH, "", 0, &req), SH_OK);
    CU_ASSERT_EQUAL(l[0]->ops->send(l[0], 0, SH_TAG_BATCH, "", 0, &req), SH_ELIMIT);
    CU_ASSERT_EQUAL(l[0]->ops->recv(l[0], 0, SH_TAG_BATCH, NULL, 0), SH_OK); /* a message of no bytes */
    sh_link_destroy(&l[0]);
    CU_ASSERT_PTR_NULL(l[0]);
}

static void test_leaving(void) {
    sh_link *l[2];
    int word = 5, req = 0, source = 0;
    size_t len = 0;
    bool found = true;
    CU_ASSERT_FATAL(sh_link_local_create(2, l) == SH_OK);
    CU_ASSERT_EQUAL(l[0]->ops->send(l[0], 1, SH_TAG_BATCH, &word, sizeof word, &req), SH_OK);
    sh_link_destroy(&l[0]); /* its bytes may be gone: so is the message */
    CU_ASSERT_EQUAL(l[1]->ops->probe(l[1], 0, SH_TAG_BATCH, &found, &source, &len), SH_OK);
    CU_ASSERT_FALSE(found);
    sh_link_destroy(&l[1]);
}

/* ---- a ring under traffic -------------------------------------------------------------------------------------------
 */

enum { RANKS = 5, MESSAGES = 400, BUFFERS = 3, BYTES = 5000 };

typedef struct ring_rank {
    sh_link *link;
    pthread_t thread;
    int bad;
} ring_rank;

static size_t length_of(int from, int i) {
    return sh_mix64((uint64_t)(from * 100000 + i)) % BYTES;
}

static void fill(uint8_t *p, int from, int i) {
    for (size_t k = 0; k < length_of(from, i); k++) p[k] = (uint8_t)(from * 31 + i * 7 + (int)k);
}

static void take_one(ring_rank *r, int from, int i, uint8_t *in, uint8_t *want) {
    size_t len = 0;
    int source = 0;
    len = length_of(from, i);
    if (i % 2) {
        r->bad += r->link->ops->recv(r->link, from, SH_TAG_BATCH, in, len) != SH_OK;
    } else {
        bool done = false;
        int req = 0;
        r->bad += r->link->ops->accept(r->link, from, SH_TAG_BATCH, in, len, &req) != SH_OK;
        while (!done && r->bad == 0) r->bad += r->link->ops->test(r->link, req, &done) != SH_OK;
    }
    fill(want, from, i);
    r->bad += memcmp(in, want, len) != 0;
    (void)source;
}

static void *ring_main(void *arg) {
    ring_rank *r = arg;
    sh_link *l = r->link;
    static _Thread_local uint8_t out[BUFFERS][BYTES], in[BYTES], want[BYTES];
    int req[BUFFERS] = {-1, -1, -1}, sent = 0, got = 0, next = (l->rank + 1) % l->size,
        from = (l->rank + l->size - 1) % l->size;
    bool idle = false;
    while (sent < MESSAGES || got < MESSAGES || !idle) {
        idle = true;
        for (int b = 0; b < BUFFERS; b++) {
            bool done = true;
            if (req[b] >= 0) r->bad += l->ops->test(l, req[b], &done) != SH_OK;
            if (done) req[b] = -1;
            if (done && sent < MESSAGES && b == sent % BUFFERS) {
                fill(out[b], l->rank, sent);
                r->bad += l->ops->send(l, next, SH_TAG_BATCH, out[b], length_of(l->rank, sent), &req[b]) != SH_OK;
                sent++;
            }
            idle = idle && req[b] < 0;
        }
        bool found = false;
        int source = 0;
        size_t len = 0;
        r->bad += l->ops->probe(l, -1, SH_TAG_BATCH, &found, &source, &len) != SH_OK;
        if (!found) continue;
        r->bad += source != from || len != length_of(from, got);
        take_one(r, from, got++, in, want);
    }
    r->bad += l->ops->barrier(l) != SH_OK;
    sh_link_destroy(&r->link);
    return NULL;
}

static void test_ring(void) {
    sh_link *l[RANKS];
    ring_rank r[RANKS];
    CU_ASSERT_FATAL(sh_link_local_create(RANKS, l) == SH_OK);
    for (int i = 0; i < RANKS; i++) {
        r[i] = (ring_rank){.link = l[i]};
        CU_ASSERT_FATAL(pthread_create(&r[i].thread, NULL, ring_main, &r[i]) == 0);
    }
    for (int i = 0; i < RANKS; i++) {
        pthread_join(r[i].thread, NULL);
        CU_ASSERT_EQUAL(r[i].bad, 0);
    }
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("link_local", NULL, NULL);
    CU_add_test(s, "order and buffers", test_order);
    CU_add_test(s, "limits", test_limits);
    CU_add_test(s, "a rank that leaves", test_leaving);
    CU_add_test(s, "a ring under traffic", test_ring);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed || CU_get_error() ? 1 : 0;
}
