/*
 * K/V rows of prompts from one sender to one receiver over the local link, without a model: every row arrives in the
 * page that it was sent to, not before the receiver may write there; damage is told and nothing of it is written.
 */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>
#include "common/hash.h"
#include "worker/kv_stream.h"

enum { PAGES = 12, ROWS = 50, FROM = 40 /* the first row of sliding layers that travels */ };

typedef struct pair {
    sh_config config;
    Shoal__Plan *plan;
    sh_leader_options schedule;
    sh_link *link[2];
    sh_kv_pool *pool[2]; /* of the one that decodes, and of the one that makes rows */
    sh_kv_sender *sender;
    sh_kv_receiver *receiver;
    sh_batch batch;
    sh_span span;
    sh_handoff handoff;
} pair;

static const int32_t made[] = {3, 1}, global[] = {7, 2}, sliding[] = {5}; /* pages of positions 0–31 and 32–63 */

static void open_pair(pair *p) {
    sh_plan_request r = {.pp = 1, .prefill = 1, .max_seqs = 4, .chunk = 64, .max_context = 200, .kv = SH_KV_BF16};
    memset(p, 0, sizeof *p);
    CU_ASSERT_FATAL(sh_config_load(SH_TEST_DATA "/text/models/e2b-like", &p->config) == SH_OK);
    CU_ASSERT_FATAL(sh_plan_make(&p->config, &r, &p->plan) == SH_OK);
    p->schedule = (sh_leader_options){.stages = 1, .max_seqs = 4, .chunk = 64, .max_context = 200};
    sh_leader_options_model(&p->schedule, &p->config);
    p->schedule.prefill = p->schedule.confirms = 1;
    for (int k = 0; k < SH_KV_KINDS; k++) p->schedule.pages[k] = p->schedule.prefill_pages[k] = PAGES;
    CU_ASSERT_FATAL(sh_link_local_create(2, p->link) == SH_OK);
    for (int i = 0; i < 2; i++)
        CU_ASSERT_FATAL(sh_kv_create(&p->config, SH_KV_BF16, p->plan->rank[i]->first, p->plan->rank[i]->last,
                                     p->schedule.pages, &p->pool[i]) == SH_OK);
    sh_kv_stream_options o = {
        .link = p->link[1], .config = &p->config, .plan = p->plan, .schedule = &p->schedule, .type = SH_KV_BF16};
    CU_ASSERT_FATAL(sh_kv_sender_create(&o, &p->sender) == SH_OK);
    o.link = p->link[0];
    CU_ASSERT_FATAL(sh_kv_receiver_create(&o, p->pool[0], &p->receiver) == SH_OK);
    p->span = (sh_span){.seq = 9, .rows = ROWS, .n_pages = {2, 2}, .pages = {made, made}};
    p->handoff = (sh_handoff){
        .from = {0, FROM}, .page0 = {0, FROM / SH_PAGE_TOKENS}, .n_pages = {2, 1}, .pages = {global, sliding}};
    p->batch = (sh_batch){.step = 1,
                          .n_rows = ROWS,
                          .n_spans = 1,
                          .spans = &p->span,
                          .n_handoffs = 1,
                          .after = 4,
                          .handoffs = &p->handoff};
}

static void close_pair(pair *p) {
    sh_kv_sender_destroy(&p->sender);
    sh_kv_receiver_destroy(&p->receiver);
    for (int i = 0; i < 2; i++) {
        sh_kv_destroy(&p->pool[i]);
        sh_link_destroy(&p->link[i]);
    }
    sh_plan_free(&p->plan);
}

/* Rows of a layer as they are made: bytes that name the layer and the place. */
static void make_rows(pair *p, int layer, uint8_t *rows) {
    size_t n = ROWS * sh_kv_row_bytes(&p->config, SH_KV_BF16, layer);
    for (size_t i = 0; i < n; i++) rows[i] = (uint8_t)sh_mix64((uint64_t)layer << 32 | i);
    sh_kv_import(p->pool[1], layer, &p->span, 0, ROWS, rows);
}

/* Rows that the other pool has of a layer: those that were made, or none of them. */
static void check_rows(const pair *p, int layer, const uint8_t *rows, bool there) {
    sh_kv_kind kind = p->config.layer[layer].kind;
    size_t row = sh_kv_row_bytes(&p->config, SH_KV_BF16, layer);
    int from = p->handoff.from[kind];
    sh_span at = {.pos = from, .rows = ROWS - from};
    at.page0[kind] = p->handoff.page0[kind];
    at.pages[kind] = p->handoff.pages[kind];
    uint8_t *got = malloc((size_t)at.rows * row);
    if (!got) exit(1);
    sh_kv_export(p->pool[0], layer, &at, 0, at.rows, got);
    bool same = memcmp(got, rows + (size_t)from * row, (size_t)at.rows * row) == 0;
    CU_ASSERT_EQUAL(same, there);
    free(got);
}

/* Sends all layers of the batch while the receiver takes them, and asks for the word on it. */
static void send_layers(pair *p, uint8_t **rows, uint64_t done, bool *got, bool *good, uint64_t *step) {
    bool worked = false;
    sh_kv_sender_begin(p->sender, p->pool[1], &p->batch);
    for (int layer = 0; layer < p->config.first_shared; layer++) {
        rows[layer] = malloc(ROWS * sh_kv_row_bytes(&p->config, SH_KV_BF16, layer));
        if (!rows[layer]) exit(1);
        make_rows(p, layer, rows[layer]);
        if (layer < 3) /* as many as wait without the receiver's help */
            CU_ASSERT_EQUAL(sh_kv_sender_written(p->sender, layer), SH_OK);
    }
    for (int layer = 3; layer < p->config.first_shared; layer++) {
        for (int i = 0; i < 3; i++) CU_ASSERT_EQUAL(sh_kv_receiver_poll(p->receiver, done, &worked), SH_OK);
        CU_ASSERT_EQUAL(sh_kv_sender_written(p->sender, layer), SH_OK);
    }
    for (int i = 0; i < 20; i++) CU_ASSERT_EQUAL(sh_kv_receiver_poll(p->receiver, done, &worked), SH_OK);
    CU_ASSERT_EQUAL(sh_kv_receiver_landed(p->receiver, got, step, good), SH_OK);
}

static void free_rows(const pair *p, uint8_t **rows) {
    for (int i = 0; i < p->config.first_shared; i++) free(rows[i]);
}

static void test_rows_arrive(void) {
    pair p;
    uint8_t *rows[SH_MAX_LAYERS];
    bool got = false, good = false;
    uint64_t step = 0;
    open_pair(&p);
    CU_ASSERT(p.config.first_shared >= 4 && p.config.first_shared < p.config.n_layers);
    send_layers(&p, rows, 4, &got, &good, &step);
    CU_ASSERT(got && good && step == 1);
    for (int i = 0; i < p.config.first_shared; i++) check_rows(&p, i, rows[i], true);
    CU_ASSERT_EQUAL(sh_kv_sender_progress(p.sender), SH_OK);
    CU_ASSERT(sh_kv_sender_is_idle(p.sender) && sh_kv_receiver_is_idle(p.receiver));
    CU_ASSERT_EQUAL(sh_kv_receiver_landed(p.receiver, &got, &step, &good), SH_OK);
    CU_ASSERT_FALSE(got); /* one word for all layers */
    free_rows(&p, rows);
    close_pair(&p);
}

/* Micro-batch 4 may still read what the pages hold. */
static void test_not_too_early(void) {
    pair p;
    bool got = false, good = false, worked = false;
    uint64_t step = 0;
    uint8_t *rows = malloc(ROWS * 4096);
    if (!rows) exit(1);
    open_pair(&p);
    sh_kv_sender_begin(p.sender, p.pool[1], &p.batch);
    make_rows(&p, 0, rows);
    CU_ASSERT_EQUAL(sh_kv_sender_written(p.sender, 0), SH_OK);
    for (uint64_t done = 0; done < 4; done++) {
        for (int i = 0; i < 5; i++) CU_ASSERT_EQUAL(sh_kv_receiver_poll(p.receiver, done, &worked), SH_OK);
        check_rows(&p, 0, rows, false);
    }
    CU_ASSERT_EQUAL(sh_kv_receiver_poll(p.receiver, 4, &worked), SH_OK);
    check_rows(&p, 0, rows, true);
    CU_ASSERT_EQUAL(sh_kv_receiver_landed(p.receiver, &got, &step, &good), SH_OK);
    CU_ASSERT_FALSE(got); /* the other layers have not come */
    free(rows);
    close_pair(&p);
}

/* A link that flips one bit of one message. */
static const sh_link_ops *plain;
static sh_link_ops altering;
static int victim, sent;
static size_t victim_byte;

static sh_status altered_send(sh_link *l, int to, int tag, const void *data, size_t n, int *req) {
    if (sent++ == victim) ((uint8_t *)(uintptr_t)data)[victim_byte < n ? victim_byte : n - 1] ^= 4;
    return plain->send(l, to, tag, data, n, req);
}

static void test_damage_is_told(void) {
    static const size_t bytes[] = {0, 9, 40, 63, 64, 70, 100, 160, 200, 100000000};
    for (size_t i = 0; i < sizeof bytes / sizeof *bytes; i++) {
        pair p;
        uint8_t *rows[SH_MAX_LAYERS];
        bool got = false, good = true;
        uint64_t step = 0;
        open_pair(&p);
        plain = p.link[1]->ops;
        altering = *plain;
        altering.send = altered_send;
        p.link[1]->ops = &altering;
        sent = 0;
        victim = (int)i % p.config.first_shared;
        victim_byte = bytes[i];
        send_layers(&p, rows, 4, &got, &good, &step);
        CU_ASSERT(got && !good && step == 1);
        for (int y = 0; y < p.config.first_shared; y++) check_rows(&p, y, rows[y], y != victim);
        free_rows(&p, rows);
        victim = -1; /* the same again, as the next micro-batch */
        p.batch.step = 2;
        send_layers(&p, rows, 4, &got, &good, &step);
        CU_ASSERT(got && good && step == 2);
        for (int y = 0; y < p.config.first_shared; y++) check_rows(&p, y, rows[y], true);
        free_rows(&p, rows);
        close_pair(&p);
    }
}

/* Whole and well sealed, but not what comes next, or not of this model: no damage, a fault. */
static void test_wrong_is_refused(void) {
    for (int wrong = 0; wrong < 3; wrong++) {
        pair p;
        bool worked = false;
        uint8_t *rows = malloc(ROWS * 4096);
        if (!rows) exit(1);
        open_pair(&p);
        static const int32_t outside[] = {PAGES, 2};
        if (wrong == 0) p.batch.step = 2;
        if (wrong == 1) p.handoff.pages[0] = p.handoff.pages[1] = outside;
        sh_kv_sender_begin(p.sender, p.pool[1], &p.batch);
        int layer = wrong == 2 ? 1 : 0;
        make_rows(&p, layer, rows);
        CU_ASSERT_EQUAL(sh_kv_sender_written(p.sender, layer), SH_OK);
        sh_status st = SH_OK;
        for (int i = 0; i < 5 && st == SH_OK; i++) st = sh_kv_receiver_poll(p.receiver, 4, &worked);
        CU_ASSERT_EQUAL(st, SH_EPEER);
        free(rows);
        close_pair(&p);
    }
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("kv_stream", NULL, NULL);
    CU_add_test(s, "rows arrive", test_rows_arrive);
    CU_add_test(s, "not too early", test_not_too_early);
    CU_add_test(s, "damage is told", test_damage_is_told);
    CU_add_test(s, "what is wrong is refused", test_wrong_is_refused);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed || CU_get_error() ? 1 : 0;
}
