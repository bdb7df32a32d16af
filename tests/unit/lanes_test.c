/*
 * Lanes: every step gives every lane a micro-batch, empty ones included; answers may come from the lanes in any order
 * and with some lanes ahead; a sequence stays on its lane; a key is known to one lane only; all sequences end.
 */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>
#include "common/hash.h"
#include "worker/lanes.h"

enum { LANES = 3, DEPTH = 4, SEQS = 60, VOCAB = 100 };

/* An answer that a lane owes: one token per span that ends its known tokens. */
typedef struct answer {
    uint64_t step;
    int n;
    sh_token t[64];
} answer;

typedef struct world {
    sh_lanes *lanes;
    answer queue[LANES][DEPTH + 1];
    int count[LANES];
    int got[SEQS], lane_of[SEQS + 1]; /* by key */
    int finished;
} world;

static uint64_t rng = 5;
static int draw(int n) {
    rng = sh_mix64(rng);
    return (int)(rng % (uint64_t)n);
}

static const sh_leader_options options = {.stages = DEPTH,
                                          .max_seqs = 4,
                                          .chunk = 8,
                                          .max_context = 64,
                                          .vocab = VOCAB,
                                          .kind = {[SH_KV_GLOBAL] = true},
                                          .pages = {[SH_KV_GLOBAL] = 9}};

static sh_status add(sh_lanes *l, uint64_t key, int n_prompt, int max_tokens, bool *known) {
    int32_t prompt[64];
    const sh_sampling sampling = {.max_tokens = max_tokens, .top_p = 1, .logprobs = -1};
    for (int i = 0; i < n_prompt; i++) prompt[i] = (int32_t)(key % VOCAB); /* whose row it is */
    sh_seq *s = NULL;
    SH_TRY(sh_seq_create(key, prompt, (size_t)n_prompt, NULL, 0, &sampling, 0, VOCAB, &s));
    sh_status st = sh_lanes_add(l, &s, known);
    sh_seq_destroy(&s);
    return st;
}

/* A lane's micro-batch as its last stage would answer it: key k gets 3 + k % 5 tokens. */
static void take(world *w, int lane, const sh_batch *b) {
    if (b->n_rows == 0) return;
    answer *a = &w->queue[lane][w->count[lane]++];
    CU_ASSERT_FATAL(w->count[lane] <= DEPTH);
    *a = (answer){.step = b->step};
    for (int i = 0; i < b->n_spans; i++) {
        const sh_span *s = &b->spans[i];
        int key = b->ids[s->row0]; /* tokens of a sequence are all its key */
        if (!w->lane_of[key]) w->lane_of[key] = lane + 1;
        CU_ASSERT_EQUAL(w->lane_of[key], lane + 1);
        if (s->keep == 0) continue;
        a->t[a->n] = (sh_token){.seq = s->seq, .index = w->got[key]++, .id = key};
        a->t[a->n++].finish = w->got[key] == 3 + key % 5 ? SH_FINISH_LENGTH : SH_FINISH_NONE;
    }
}

static void emit(void *arg, uint64_t key, const sh_token *t) {
    world *w = arg;
    CU_ASSERT_EQUAL(key, (uint64_t)t->id);
    w->finished += t->finish != SH_FINISH_NONE;
}

static void answer_one(world *w, int lane) {
    answer *a = &w->queue[lane][0];
    CU_ASSERT_EQUAL_FATAL(sh_lanes_apply(w->lanes, lane, a->step, a->t, a->n, emit, w), SH_OK);
    w->count[lane]--;
    memmove(a, a + 1, (size_t)w->count[lane] * sizeof *a);
}

static void test_steps(void) {
    static world w;
    bool known = false;
    CU_ASSERT_EQUAL_FATAL(sh_lanes_create(&options, LANES, &w.lanes), SH_OK);
    for (int k = 1; k < SEQS; k++) CU_ASSERT_EQUAL(add(w.lanes, (uint64_t)k, 1 + k % 20, 3 + k % 5, &known), SH_OK);
    int steps = 0, empty = 0, most = 0;
    for (int turn = 0; turn < 100000 && w.finished < SEQS - 1; turn++) {
        sh_batch *b = NULL;
        bool made = false;
        int lane = draw(2 * LANES);
        if (lane < LANES && w.count[lane] > 0) answer_one(&w, lane);
        if (lane < LANES) continue;
        CU_ASSERT_EQUAL_FATAL(sh_lanes_next(w.lanes, &b, &made), SH_OK);
        if (!made) continue;
        steps++;
        int rows = 0, kept = 0;
        for (int i = 0; i < LANES; i++) {
            if (b[i].n_rows > rows) rows = b[i].n_rows;
            if (b[i].n_kept > kept) kept = b[i].n_kept;
            empty += b[i].n_rows == 0;
        }
        CU_ASSERT(rows > 0);
        for (int i = 0; i < LANES; i++) {
            CU_ASSERT_EQUAL(b[i].widest_rows, rows);
            CU_ASSERT_EQUAL(b[i].widest_kept, kept);
            take(&w, i, &b[i]);
        }
        int flying = sh_lanes_look(w.lanes).in_flight;
        CU_ASSERT(flying >= 1 && flying <= DEPTH);
        if (flying > most) most = flying;
    }
    CU_ASSERT_EQUAL(w.finished, SEQS - 1);
    CU_ASSERT_EQUAL(most, DEPTH);
    CU_ASSERT(empty > 0);                      /* lanes that had nothing to do took part */
    for (int lane = 0; lane < LANES; lane++) { /* the load was shared */
        int n = 0;
        for (int k = 1; k < SEQS; k++) n += w.lane_of[k] == lane + 1;
        CU_ASSERT(n >= SEQS / LANES / 2);
        while (w.count[lane] > 0) answer_one(&w, lane);
    }
    CU_ASSERT_EQUAL(sh_lanes_look(w.lanes).in_flight, 0);
    CU_ASSERT_EQUAL(sh_lanes_look(w.lanes).free[SH_KV_GLOBAL], LANES * options.pages[SH_KV_GLOBAL]);
    sh_lanes_destroy(&w.lanes);
    CU_ASSERT(steps > 0);
}

static void test_keys(void) {
    sh_lanes *l = NULL;
    bool known = false;
    CU_ASSERT_EQUAL_FATAL(sh_lanes_create(&options, LANES, &l), SH_OK);
    for (uint64_t k = 1; k <= 4; k++) CU_ASSERT(add(l, k, 5, 5, &known) == SH_OK && !known);
    for (uint64_t k = 1; k <= 4; k++) CU_ASSERT(add(l, k, 5, 5, &known) == SH_OK && known);
    CU_ASSERT_EQUAL(sh_lanes_look(l).waiting, 4);
    sh_lanes_cancel(l, 2);
    sh_lanes_cancel(l, 77); /* unknown: nothing happens */
    CU_ASSERT_EQUAL(sh_lanes_look(l).waiting, 3);
    CU_ASSERT(add(l, 2, 5, 5, &known) == SH_OK && !known);
    CU_ASSERT_EQUAL(add(l, 9, 60, 60, &known), SH_ELIMIT); /* 120 tokens: no lane holds them */
    sh_lanes_destroy(&l);
}

static void test_wrong_answers(void) {
    sh_lanes *l = NULL;
    sh_batch *b = NULL;
    bool known = false, made = false;
    CU_ASSERT_EQUAL_FATAL(sh_lanes_create(&options, LANES, &l), SH_OK);
    CU_ASSERT_EQUAL(add(l, 1, 5, 5, &known), SH_OK);
    CU_ASSERT(sh_lanes_next(l, &b, &made) == SH_OK && made);
    const sh_token t = {.seq = b[0].spans[0].seq, .id = 1};
    CU_ASSERT_EQUAL(sh_lanes_apply(l, 1, b[0].step, &t, 1, NULL, NULL), SH_EPEER); /* lane 1 had no rows */
    CU_ASSERT_EQUAL(sh_lanes_apply(l, 0, b[0].step + 1, &t, 1, NULL, NULL), SH_EPEER);
    CU_ASSERT_EQUAL(sh_lanes_look(l).in_flight, 1);
    sh_lanes_destroy(&l);
}

int main(void) {
    if (CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("lanes", NULL, NULL);
    CU_add_test(s, "steps", test_steps);
    CU_add_test(s, "keys", test_keys);
    CU_add_test(s, "wrong answers", test_wrong_answers);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned bad = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    return bad ? 1 : 0;
}
