/* Weights on their way between ranks: to their places and in order, more than may be under way at once; a message of
 * another length, a failure and a rank that does not answer end it on both sides. */
#include <CUnit/Basic.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "common/clock.h"
#include "common/limits.h"
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
    open_all(2);
    sh_load_peers *a = ends[0].p;
    CU_ASSERT_EQUAL(a->send(a->ctx, 1, bytes, sizeof bytes), SH_OK);
    double since = sh_now();
    CU_ASSERT_FALSE(a->stop(a->ctx, SH_EIO));
    CU_ASSERT_TRUE(sh_now() - since < 60);
    close_all(2);
}

static sh_status is_over(void *arg) {
    (void)arg;
    SH_FAIL(SH_ECANCELLED, "told to leave");
}

/* What a rank had to say when it gave up may be taken later: by then its own memory may be gone. */
static void given_up(void) {
    static const sh_alive over = {is_over, NULL};
    uint8_t want[100], got[100], all[2][100];
    uint8_t *mine = malloc(sizeof want);
    bool found = false;
    int from = 0;
    size_t len = 0;
    CU_ASSERT_PTR_NOT_NULL_FATAL(mine);
    open_all(2);
    sh_link *a = ends[0].link, *b = ends[1].link;
    memset(want, 7, sizeof want);
    memcpy(mine, want, sizeof want);
    CU_ASSERT_EQUAL(sh_ranks_exchange(b, mine, sizeof want, all, &over), SH_ECANCELLED);
    memset(mine, 0, sizeof want);
    free(mine);
    CU_ASSERT_EQUAL(a->ops->probe(a, -1, SH_TAG_CONTROL, &found, &from, &len), SH_OK);
    CU_ASSERT_TRUE_FATAL(found && from == 1 && len == sizeof got);
    CU_ASSERT_EQUAL(a->ops->recv(a, 1, SH_TAG_CONTROL, got, len), SH_OK);
    CU_ASSERT_EQUAL(memcmp(got, want, sizeof want), 0);
    close_all(2);
}

/* ---- as many ranks as there may be
 * -----------------------------------------------------------------------------------
 */

/* One end of a link whose other ranks follow it: each takes this one's word a while later, and then says its own. */
typedef struct crowd {
    sh_link base;
    bool open[SH_LINK_MAX_REQUESTS];
    int n_open, most_open;
    int heard[SH_MAX_RANKS]; /* how often a rank had this one's word */
    int queue[SH_MAX_RANKS], n, next, tested;
    bool silent; /* they never take anything */
    int fails;   /* this one has failed; −1: none */
} crowd;

static sh_status crowd_send(sh_link *base, int to, int tag, const void *p, size_t n, int *req) {
    crowd *c = (crowd *)base;
    int i = 0;
    (void)p;
    while (i < SH_LINK_MAX_REQUESTS && c->open[i]) i++;
    if (i == SH_LINK_MAX_REQUESTS) SH_FAIL(SH_ELIMIT, "more than %d requests are open", SH_LINK_MAX_REQUESTS);
    CU_ASSERT_TRUE(tag == sh_link_channel(SH_TAG_WEIGHTS, 1) && n > 16 && to != base->rank);
    c->open[i] = true;
    if (++c->n_open > c->most_open) c->most_open = c->n_open;
    c->heard[to]++;
    c->queue[c->n++ % SH_MAX_RANKS] = to;
    *req = i;
    return SH_OK;
}

static sh_status crowd_test(sh_link *base, int req, bool *done) {
    crowd *c = (crowd *)base;
    *done = !c->silent && ++c->tested % 3 == 0;
    if (*done) c->open[req] = false, c->n_open--;
    return SH_OK;
}

static sh_status crowd_probe(sh_link *base, int from, int tag, bool *found, int *source, size_t *len) {
    const crowd *c = (crowd *)base;
    (void)from;
    *found = tag == sh_link_channel(SH_TAG_WEIGHTS, 1) && !c->silent && c->next < c->n;
    if (!*found) return SH_OK;
    *source = c->queue[c->next];
    *len = *source == c->fails ? 16 + sizeof "its disk is gone" : 17;
    return SH_OK;
}

static sh_status crowd_recv(sh_link *base, int from, int tag, void *p, size_t len) {
    crowd *c = (crowd *)base;
    bool fails = from == c->fails;
    const uint32_t head[4] = {0x31534457u, fails ? SH_EIO : SH_OK, 0, 0};
    (void)tag;
    memcpy(p, head, sizeof head);
    memcpy((char *)p + sizeof head, fails ? "its disk is gone" : "", len - sizeof head);
    c->next++;
    return SH_OK;
}

static crowd gathering;

static sh_load_peers *join(int rank, sh_load_link **x) {
    static const sh_link_ops ops = {
        .name = "crowd", .send = crowd_send, .test = crowd_test, .probe = crowd_probe, .recv = crowd_recv};
    gathering = (crowd){.base = {.ops = &ops, .rank = rank, .size = SH_MAX_RANKS}, .fails = -1};
    CU_ASSERT_FATAL(sh_load_link_create(&gathering.base, NULL, x) == SH_OK);
    return sh_load_link_peers(*x);
}

static void everybody_heard_once(int rank) {
    for (int i = 0; i < SH_MAX_RANKS; i++) CU_ASSERT_TRUE(gathering.heard[i] == (i != rank));
    CU_ASSERT_TRUE(gathering.most_open < SH_LINK_MAX_REQUESTS / 4);
}

static void most_ranks(void) {
    for (int rank = 0; rank < SH_MAX_RANKS; rank += SH_MAX_RANKS / 2 - 1) {
        sh_load_link *x = NULL;
        sh_load_peers *p = join(rank, &x);
        CU_ASSERT_EQUAL(p->finish(p->ctx), SH_OK);
        everybody_heard_once(rank);
        sh_load_link_destroy(&x);
    }
}

/* While the words go round: of the others' some are "all is here", and of this one's too. */
static void most_ranks_and_a_failure(void) {
    sh_load_link *x = NULL;
    sh_load_peers *p = join(7, &x);
    gathering.fails = 3000;
    sh_status st = p->finish(p->ctx);
    CU_ASSERT_EQUAL(st, SH_EIO);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "its disk is gone");
    CU_ASSERT_TRUE(gathering.n < SH_MAX_RANKS - 1);
    CU_ASSERT_TRUE(p->stop(p->ctx, st));
    everybody_heard_once(7);
    sh_load_link_destroy(&x);
}

static void most_ranks_and_nobody_answers(void) {
    sh_load_link *x = NULL;
    sh_load_peers *p = join(0, &x);
    gathering.silent = true;
    SH_IGNORE(sh_error_set(SH_EIO, __FILE__, __LINE__, "no such file"));
    CU_ASSERT_FALSE(p->stop(p->ctx, SH_EIO));
    CU_ASSERT_TRUE(gathering.most_open < SH_LINK_MAX_REQUESTS / 4);
    sh_load_link_destroy(&x);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("load link", NULL, NULL);
    CU_add_test(s, "all to all", all_to_all);
    CU_add_test(s, "a failure is everybody's", failure);
    CU_add_test(s, "another length", other_length);
    CU_add_test(s, "silence", silence);
    CU_add_test(s, "a record of one that gave up", given_up);
    CU_add_test(s, "as many ranks as there may be", most_ranks);
    CU_add_test(s, "… and one fails", most_ranks_and_a_failure);
    CU_add_test(s, "… and nobody answers", most_ranks_and_nobody_answers);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
