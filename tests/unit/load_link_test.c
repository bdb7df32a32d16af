/* Weights on their way between ranks: to their places and in order, more than may be under way at once; a message of
 * another length, a failure and a rank that does not answer end it on both sides. */
#include <CUnit/Basic.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include "common/clock.h"
#include "worker/load_link.h"

enum { RANKS = 3, MESSAGES = 200, BYTES = 1000 };

typedef struct end {
    sh_link *link;
    sh_load_link *x;
    sh_load_peers *p;
    int rank, fails_at; /* −1: never */
    uint8_t got[RANKS][MESSAGES][BYTES];
    uint8_t out[MESSAGES][BYTES];
    sh_status status;
    bool stopped;
    char why[200];
} end;

static end ends[RANKS];

static void open_all(int n) {
    sh_link *link[RANKS];
    CU_ASSERT_FATAL(sh_link_local_create(n, link) == SH_OK);
    memset(ends, 0, sizeof ends);
    for (int i = 0; i < n; i++) {
        ends[i].link = link[i];
        ends[i].rank = i;
        ends[i].fails_at = -1;
        CU_ASSERT_FATAL(sh_load_link_create(link[i], NULL, &ends[i].x) == SH_OK);
        ends[i].p = sh_load_link_peers(ends[i].x);
        CU_ASSERT(ends[i].p->members == n && ends[i].p->member == i);
    }
}

static void close_all(int n) {
    for (int i = 0; i < n; i++) {
        sh_load_link_destroy(&ends[i].x);
        CU_ASSERT_PTR_NULL(ends[i].x);
        sh_link_destroy(&ends[i].link);
    }
}

static int length(int from, int i) {
    return 1 + (i * 37 + from * 11) % BYTES;
}

static sh_status exchange(end *e) {
    for (int from = 0; from < e->p->members; from++)
        for (int i = 0; from != e->rank && i < MESSAGES; i++)
            SH_TRY(e->p->expect(e->p->ctx, from, e->got[from][i], (size_t)length(from, i)));
    for (int i = 0; i < MESSAGES; i++) {
        if (i == e->fails_at) SH_FAIL(SH_EIO, "cannot read its file");
        memset(e->out[i], 1 + (e->rank * 50 + i) % 200, BYTES);
        for (int to = 0; to < e->p->members; to++)
            if (to != e->rank) SH_TRY(e->p->send(e->p->ctx, to, e->out[i], (size_t)length(e->rank, i)));
    }
    return e->p->finish(e->p->ctx);
}

static void *end_main(void *arg) {
    end *e = arg;
    e->status = exchange(e);
    if (e->status == SH_OK) return NULL;
    snprintf(e->why, sizeof e->why, "%s", sh_error_text());
    e->stopped = e->p->stop(e->p->ctx, e->status);
    return NULL;
}

static void run_all(int n) {
    pthread_t t[RANKS];
    for (int i = 0; i < n; i++) CU_ASSERT_FATAL(pthread_create(&t[i], NULL, end_main, &ends[i]) == 0);
    for (int i = 0; i < n; i++) pthread_join(t[i], NULL);
}

static void all_to_all(void) {
    open_all(RANKS);
    run_all(RANKS);
    for (int r = 0; r < RANKS; r++) {
        uint64_t bytes = 0;
        CU_ASSERT_EQUAL(ends[r].status, SH_OK);
        for (int from = 0; from < RANKS; from++)
            for (int i = 0; from != r && i < MESSAGES; i++) {
                int n = length(from, i);
                const uint8_t *g = ends[r].got[from][i];
                CU_ASSERT_EQUAL(memcmp(g, ends[from].out[i], (size_t)n), 0);
                CU_ASSERT_TRUE(n == BYTES || g[n] == 0);
                bytes += (uint64_t)n;
            }
        CU_ASSERT_EQUAL(ends[r].p->received, bytes);
    }
    close_all(RANKS);
}

static void failure(void) {
    for (int at = 0; at < MESSAGES; at += 60) {
        open_all(RANKS);
        ends[1].fails_at = at;
        run_all(RANKS);
        for (int r = 0; r < RANKS; r++) {
            CU_ASSERT_EQUAL(ends[r].status, SH_EIO);
            CU_ASSERT_STRING_EQUAL(ends[r].why, r == 1 ? "cannot read its file" : "rank 1: cannot read its file");
            CU_ASSERT_TRUE(ends[r].stopped);
        }
        close_all(RANKS);
    }
}

static void other_length(void) {
    static const char bytes[11];
    char place[10];
    open_all(2);
    sh_load_peers *a = ends[0].p, *b = ends[1].p;
    CU_ASSERT_EQUAL(b->expect(b->ctx, 0, place, sizeof place), SH_OK);
    CU_ASSERT_EQUAL(a->send(a->ctx, 1, bytes, sizeof bytes), SH_OK);
    CU_ASSERT_EQUAL(b->poll(b->ctx), SH_EPEER);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "weights from rank 0: message 0 has 11 bytes: 10 were expected");
    close_all(2);
}

/* Nobody answers: what was sent may be read later, and is said to be. */
static void silence(void) {
    static const char bytes[11];
    static sh_load_link *kept; /* it stays, since its word may be read later too */
    open_all(2);
    sh_load_peers *a = ends[0].p;
    kept = ends[0].x;
    CU_ASSERT_PTR_NOT_NULL(kept);
    CU_ASSERT_EQUAL(a->send(a->ctx, 1, bytes, sizeof bytes), SH_OK);
    double since = sh_now();
    CU_ASSERT_FALSE(a->stop(a->ctx, SH_EIO));
    CU_ASSERT_TRUE(sh_now() - since < 60);
    close_all(2);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("load link", NULL, NULL);
    CU_add_test(s, "all to all", all_to_all);
    CU_add_test(s, "a failure is everybody's", failure);
    CU_add_test(s, "another length", other_length);
    CU_add_test(s, "silence", silence);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
