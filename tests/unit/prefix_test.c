/*
 * Which rows are left out when sequences begin alike, case by case: what a micro-batch must hold when equal prompts
 * come together, when they part, when logits are wanted, when there is a picture, when pages have become rare. That
 * pages hold what they should, and that the books are right, tests/unit/leader_test.c shows with thousands of
 * sequences.
 */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>
#include "worker/lanes.h"

enum { VOCAB = 50000, PLACEHOLDER = 49999, LONGEST = 4000 };

typedef struct world {
    sh_leader *l;
    sh_batch b;
    bool made;
    uint64_t next; /* key; the leader's ids are the same numbers */
    int out;       /* spans that want a token, of the micro-batch in hand */
    sh_token answer[64];
} world;

/* Sliding windows of 512, pools of these many pages. */
static world begin(int global, int sliding, int chunk) {
    world w = {.next = 1};
    const sh_leader_options o = {.stages = 1,
                                 .max_seqs = 16,
                                 .chunk = chunk,
                                 .max_context = LONGEST,
                                 .vocab = VOCAB,
                                 .window = 512,
                                 .kind = {true, sliding > 0},
                                 .pages = {global, sliding},
                                 .share = true,
                                 .n_placeholders = 1,
                                 .placeholder = {PLACEHOLDER}};
    CU_ASSERT_FATAL(sh_leader_create(&o, &w.l) == SH_OK);
    CU_ASSERT_FATAL(sh_batch_create(sh_leader_descriptor_bytes(&o), &w.b) == SH_OK);
    return w;
}

static void end(world *w) {
    CU_ASSERT_EQUAL(sh_leader_audit(w->l), SH_OK);
    sh_batch_release(&w->b);
    sh_leader_destroy(&w->l);
}

/* A text whose first n tokens are those of `text`, and whose later ones nobody else has. */
static int32_t text[LONGEST];
static int32_t *begins_with(int what, int n, int total, int own) {
    for (int i = 0; i < total; i++) text[i] = i < n ? (what * 1000 + i) % 40000 : 40000 + (own * 37 + i) % 9000;
    return text;
}

static uint64_t add_seq(world *w, const int32_t *tokens, int n, int max_tokens, bool score, int scored) {
    const sh_sampling sampling = {.max_tokens = max_tokens, .score_prompt = score, .logprobs = -1};
    sh_seq *s = NULL;
    bool known = false;
    CU_ASSERT_FATAL(sh_seq_create(w->next, tokens, (size_t)n, NULL, 0, &sampling, scored, VOCAB, &s) == SH_OK);
    CU_ASSERT_FATAL(sh_leader_add(w->l, &s, &known) == SH_OK);
    return w->next++;
}

static uint64_t add(world *w, const int32_t *tokens, int n) {
    return add_seq(w, tokens, n, 1, false, 0);
}

static void ignore(void *arg, uint64_t key, const sh_token *t) {
    (void)arg, (void)key, (void)t;
}

/* The next micro-batch; every sequence ends with its first token. */
static void make(world *w) {
    CU_ASSERT_EQUAL_FATAL(sh_leader_next(w->l, &w->b, &w->made), SH_OK);
    CU_ASSERT_EQUAL(sh_leader_audit(w->l), SH_OK);
    w->out = 0;
    for (int i = 0; w->made && i < w->b.n_spans; i++)
        if (w->b.spans[i].keep > 0)
            w->answer[w->out++] =
                (sh_token){.seq = w->b.spans[i].seq, .id = 5, .finish = SH_FINISH_LENGTH, .text_len = -1};
}

static void apply(world *w) {
    CU_ASSERT_EQUAL_FATAL(sh_leader_apply(w->l, w->b.step, w->answer, w->out, ignore, NULL), SH_OK);
    CU_ASSERT_EQUAL(sh_leader_audit(w->l), SH_OK);
}

static const sh_span *span_of(const world *w, uint64_t id) {
    for (int i = 0; i < w->b.n_spans; i++)
        if (w->b.spans[i].seq == id) return &w->b.spans[i];
    return NULL;
}

/* Runs everything to its end; where the rows of `id` began. */
static int run(world *w, uint64_t id) {
    int first = -1;
    for (make(w); w->made; make(w)) {
        const sh_span *s = span_of(w, id);
        if (s && first < 0) first = s->pos;
        apply(w);
    }
    CU_ASSERT(first >= 0);
    return first;
}

static int run_one(world *w, const int32_t *tokens, int n) {
    return run(w, add(w, tokens, n));
}

/* Four equal prompts at once: the first in one micro-batch, what is left of the others in the next. */
static void test_together(void) {
    world w = begin(200, 200, 512);
    begins_with(1, 100, 100, 0);
    for (int i = 0; i < 4; i++) add(&w, text, 100);
    add(&w, begins_with(2, 10, 50, 1), 50); /* nothing to wait for */
    make(&w);
    CU_ASSERT_EQUAL_FATAL(w.b.n_spans, 2);
    CU_ASSERT(w.b.spans[0].seq == 1 && w.b.spans[0].rows == 100);
    CU_ASSERT(w.b.spans[1].seq == 5 && w.b.spans[1].rows == 50);
    apply(&w);
    make(&w);
    CU_ASSERT_EQUAL_FATAL(w.b.n_spans, 3);
    for (int i = 0; i < 3; i++) CU_ASSERT(w.b.spans[i].pos == 96 && w.b.spans[i].rows == 4 && w.b.spans[i].keep == 1);
    for (int k = 0; k < SH_KV_KINDS; k++) /* the same pages, and a last one each */
        for (int i = 0; i < 4; i++) CU_ASSERT_EQUAL(w.b.spans[0].pages[k][i] == w.b.spans[1].pages[k][i], i < 3);
    apply(&w);
    CU_ASSERT_EQUAL(sh_leader_look(w.l).shared, 3 * 96);
    end(&w);
}

/* One that runs already takes the pages of another that is ahead, and gives its own back. */
static void test_catching_up(void) {
    world w = begin(200, 200, 64);
    begins_with(1, 1000, 1050, 1);
    uint64_t a = add(&w, text, 1050);
    make(&w), apply(&w);
    uint64_t b = add(&w, begins_with(1, 1000, 1060, 2), 1060);
    int at = -1, rows = 0;
    for (make(&w); w.made; make(&w)) {
        const sh_span *s = span_of(&w, b);
        if (s && at < 0) at = s->pos;
        rows += s ? s->rows : 0;
        CU_ASSERT(!span_of(&w, a) || !s || s->pos >= 992);
        apply(&w);
    }
    CU_ASSERT_EQUAL(at, 992);
    CU_ASSERT_EQUAL(rows, 68);
    CU_ASSERT_EQUAL(sh_leader_look(w.l).shared, 992);
    CU_ASSERT_EQUAL(sh_leader_look(w.l).free[SH_KV_GLOBAL], 200);
    end(&w);
}

/* Where a prompt begins: behind the last full page that it has in common with an earlier one, but for its last token.
 */
static void test_borders(void) {
    for (int sliding = 0; sliding < 2; sliding++) {
        world w = begin(400, sliding ? 400 : 0, 512);
        CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 1000, 1050, 1), 1050), 0);
        CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 1000, 1050, 2), 1050), 992); /* the window was still there */
        CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 1000, 1050, 1), 1050), 1024);
        CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 1000, 1050, 1), 1024), 992);
        CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 1000, 1050, 1), 1025), 1024);
        CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 31, 500, 3), 500), 0); /* less than a page */
        CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 32, 500, 4), 500), 32);
        CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 1000, 1000, 0) + 1, 999), 0); /* the same at other positions */
        end(&w);
    }
}

static void test_logits(void) {
    world w = begin(400, 400, 512);
    begins_with(1, 1000, 1000, 0);
    CU_ASSERT_EQUAL(run_one(&w, text, 1000), 0);
    add_seq(&w, text, 1000, 1, true,
            500); /* scores of tokens 1 to 500 are known: row 500 is the first that is wanted */
    make(&w);
    CU_ASSERT_EQUAL(w.b.spans[0].pos, 480);
    CU_ASSERT_EQUAL(w.b.n_kept, 492);
    sh_leader_cancel(w.l, 2);
    w.out = 0, apply(&w);
    add_seq(&w, text, 1000, 1, true, 0);
    make(&w);
    CU_ASSERT(w.b.spans[0].pos == 0 && w.b.n_kept == 512);
    sh_leader_cancel(w.l, 3);
    w.out = 0, apply(&w);
    add_seq(&w, text, 1000, 1, true, 999); /* all of them */
    make(&w);
    CU_ASSERT(w.b.spans[0].pos == 992 && w.b.n_kept == 1);
    apply(&w);
    end(&w);
}

/* What stands behind a placeholder is known by its maker alone. */
static void test_pictures(void) {
    world w = begin(400, 400, 512);
    begins_with(1, 1000, 1000, 0)[300] = PLACEHOLDER;
    CU_ASSERT_EQUAL(run_one(&w, text, 1000), 0);
    CU_ASSERT_EQUAL(run_one(&w, text, 1000), 288);
    add(&w, text, 1000), add(&w, text, 1000); /* together, neither waits for the other beyond that */
    make(&w);
    CU_ASSERT_EQUAL(w.b.n_spans, 1); /* one chunk */
    CU_ASSERT(w.b.spans[0].pos == 288 && w.b.spans[0].rows == 512);
    apply(&w), make(&w);
    CU_ASSERT_EQUAL_FATAL(w.b.n_spans, 2);
    CU_ASSERT(w.b.spans[0].pos == 800 && w.b.spans[1].pos == 288);
    end(&w);
}

static void flush(world *w, int times, int *own) {
    for (int i = 0; i < times; i++) CU_ASSERT_EQUAL(run_one(w, begins_with(50, 0, 300, ++*own * 301), 300), 0);
}

/* Pages that several used outlast any number that one used. */
static void test_rare_pages(void) {
    world w = begin(130, 300, 512);
    int own = 0;
    CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 320, 400, 1), 400), 0);
    CU_ASSERT_EQUAL(run_one(&w, begins_with(2, 320, 400, 1), 400), 0); /* of this one, nobody makes use */
    CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 320, 400, 2), 400), 320);
    flush(&w, 40, &own);
    CU_ASSERT_EQUAL(run_one(&w, begins_with(2, 320, 400, 3), 400), 0);
    CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 320, 400, 4), 400), 320);
    for (int family = 3; family < 30; family++) /* but not others that several used since */
        for (int i = 0; i < 2; i++)
            CU_ASSERT_EQUAL(run_one(&w, begins_with(family, 320, 400, 5 + i), 400), i ? 320 : 0);
    CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 320, 400, 8), 400), 0);
    CU_ASSERT_EQUAL(sh_leader_look(w.l).free[SH_KV_GLOBAL], 130);
    CU_ASSERT_EQUAL(sh_leader_look(w.l).free[SH_KV_SLIDING], 300);
    end(&w);
}

/* What several used leaves room for what nobody has used yet. */
static void test_room_for_new_ones(void) {
    world w = begin(130, 300, 512);
    for (int family = 1; family < 20; family++)
        for (int i = 0; i < 2; i++) (void)run_one(&w, begins_with(family, 320, 400, i), 400);
    CU_ASSERT_EQUAL(run_one(&w, begins_with(30, 320, 400, 1), 400), 0);
    CU_ASSERT_EQUAL(run_one(&w, begins_with(31, 320, 400, 1), 400), 0);
    CU_ASSERT_EQUAL(run_one(&w, begins_with(30, 320, 400, 2), 400), 320);
    end(&w);
}

/* Shared pages are there once: more sequences find room. */
static void test_room(void) {
    world w = begin(20, 0, 512);
    add_seq(&w, begins_with(1, 320, 370, 1), 370, 14, false, 0); /* 12 pages */
    make(&w);
    CU_ASSERT_EQUAL(sh_leader_look(w.l).running, 1);
    w.answer[0].finish = SH_FINISH_NONE;
    apply(&w);
    for (int i = 2; i < 6; i++) add_seq(&w, begins_with(1, 320, 370, i), 370, 14, false, 0);
    add_seq(&w, begins_with(2, 320, 370, 1), 370, 14, false, 0);
    make(&w);
    CU_ASSERT_EQUAL(sh_leader_look(w.l).running, 5); /* of 2 pages each that are their own */
    CU_ASSERT_EQUAL(sh_leader_look(w.l).waiting, 1);
    end(&w);
}

/* Sliding pages are kept where a prompt ends and where prompts part, the latter from when it is seen. */
static void test_snapshots(void) {
    world w = begin(2000, 130, 512);
    int own = 0;
    CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 1000, 1050, 1), 1050), 0);
    for (int i = 0; i < 2; i++) CU_ASSERT_EQUAL(run_one(&w, begins_with(2 + i, 2000, 2000, 1), 2000), 0);
    CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 1000, 1050, 1), 1050), 1024); /* its end was kept */
    CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 1000, 1050, 2), 1050),
                    0); /* page 15, the first of the window, was not */
    flush(&w, 40, &own);
    CU_ASSERT_EQUAL(run_one(&w, begins_with(1, 1000, 1050, 3), 1050), 992);
    for (int i = 0; i < 2; i++) { /* nothing at all was kept of the first one's */
        CU_ASSERT_EQUAL(run_one(&w, begins_with(9, 1000, 1050, 1 + i), 1050), 0);
        flush(&w, 40, &own);
    }
    CU_ASSERT_EQUAL(run_one(&w, begins_with(9, 1000, 1050, 3), 1050), 992);
    end(&w);
}

static void add_to(sh_lanes *l, uint64_t key, int like, int n) {
    const sh_sampling sampling = {.max_tokens = 1, .logprobs = -1};
    sh_seq *s = NULL;
    bool known = false;
    begins_with(like, 500, n, (int)key);
    CU_ASSERT_FATAL(sh_seq_create(key, text, (size_t)n, NULL, 0, &sampling, 0, VOCAB, &s) == SH_OK);
    CU_ASSERT_FATAL(sh_lanes_add(l, &s, &known) == SH_OK);
}

/* A sequence goes to the lane that has its beginning, unless that one has more to do by more than this saves. */
static void test_lanes(void) {
    const sh_leader_options o = {.stages = 1,
                                 .max_seqs = 8,
                                 .chunk = 1000,
                                 .max_context = LONGEST,
                                 .vocab = VOCAB,
                                 .kind = {true, false},
                                 .pages = {400, 0},
                                 .share = true};
    sh_lanes *l = NULL;
    sh_batch *b = NULL;
    bool made = false;
    CU_ASSERT_FATAL(sh_lanes_create(&o, 3, &l) == SH_OK);
    for (int i = 0; i < 3; i++) add_to(l, (uint64_t)i, i, 700);
    CU_ASSERT_FATAL(sh_lanes_next(l, &b, &made) == SH_OK && made);
    for (int lane = 0; lane < 3; lane++) {
        sh_token t = {.seq = b[lane].spans[0].seq, .id = 1, .finish = SH_FINISH_LENGTH, .text_len = -1};
        CU_ASSERT_EQUAL(b[lane].ids[1] / 1000, lane);
        CU_ASSERT_EQUAL(sh_lanes_apply(l, lane, b[lane].step, &t, 1, ignore, NULL), SH_OK);
    }
    for (int i = 0; i < 5; i++) add_to(l, (uint64_t)(10 + i), 1, 600); /* 120 rows and a token each, or 480 more */
    CU_ASSERT_FATAL(sh_lanes_next(l, &b, &made) == SH_OK && made);
    CU_ASSERT(b[0].n_spans == 1 && b[0].spans[0].pos == 0);
    CU_ASSERT_EQUAL_FATAL(b[1].n_spans, 4);
    for (int i = 0; i < 4; i++) CU_ASSERT(b[1].spans[i].pos == 480 && b[1].spans[i].rows == 120);
    CU_ASSERT_EQUAL(b[2].n_spans, 0);
    CU_ASSERT_EQUAL(sh_lanes_look(l).shared, 4 * 480);
    sh_lanes_destroy(&l);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("prefix", NULL, NULL);
    CU_add_test(s, "equal prompts that come together", test_together);
    CU_add_test(s, "one that catches up", test_catching_up);
    CU_add_test(s, "where a prompt begins", test_borders);
    CU_add_test(s, "rows whose logits are wanted", test_logits);
    CU_add_test(s, "pictures", test_pictures);
    CU_add_test(s, "when pages are rare", test_rare_pages);
    CU_add_test(s, "room for new ones", test_room_for_new_ones);
    CU_add_test(s, "shared pages take room once", test_room);
    CU_add_test(s, "snapshots of sliding layers", test_snapshots);
    CU_add_test(s, "lanes", test_lanes);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed || CU_get_error() ? 1 : 0;
}
