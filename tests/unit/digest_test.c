/* Rows in parts (model/digest.h) against whole rows: same tokens, log-probabilities and alternatives, to the bit, for
 * random requests, parts and rows, with many equal entries, impossible ones and flat rows; what is asked for is
 * counted, so that every way is known to be taken. Damaged digests are refused. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/draw_int.h"
#include "model/sampler.h"

enum { MAX_VOCAB = 9000, PROMPT = 4, CONTEXT = 16, MAX_PARTS = 5 };

static const sh_kernels *kn;
static uint64_t seed = 12345;

static uint32_t next_random(void) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33);
}

static int below(int n) {
    return (int)(next_random() % (uint32_t)n);
}

static float unit(void) {
    return (float)next_random() / 2147483648.0f;
}

/* Kinds of rows: smooth, coarse (ties everywhere), flat, few possible, one far above. */
static void fill_row(float *x, int n, int kind) {
    for (int i = 0; i < n; i++) {
        float g = unit() + unit() + unit() + unit() - 2;
        x[i] = kind == 1 ? roundf(g * 4) / 2 : kind == 2 ? 1e-6f * g : g * 8;
        if (kind == 3 && below(200)) x[i] = -INFINITY;
        if (kind == 5 && g < 0.5f) x[i] = i & 1 ? -0.0f : 0.0f;
    }
    if (kind == 3) x[below(n)] = 1;
    if (kind == 4) x[below(n)] = 30;
}

static sh_sampling random_request(int vocab) {
    static const float temperatures[] = {0, 0.3f, 1, 1, 1.7f, 60};
    sh_sampling p = {.top_p = 1, .max_tokens = 4, .seed = next_random(), .logprobs = -1};
    p.temperature = temperatures[below(6)];
    if (below(3) == 0) p.top_p = below(2) ? 0.9f : unit();
    if (below(3) == 0) p.min_p = below(2) ? 0.05f : 0.5f * unit();
    if (below(3) == 0) p.top_k = below(4) ? 1 + below(100) : 1 + below(vocab + 10);
    if (below(2)) p.logprobs = below(SH_MAX_TOP_LOGPROBS + 1);
    p.score_prompt = below(2);
    p.min_tokens = below(2) * 2;
    p.n_eos = 2;
    p.eos[0] = below(vocab);
    p.eos[1] = vocab - 1;
    p.n_suppress = 3;
    for (int i = 0; i < 3; i++) p.suppress[i] = below(vocab);
    p.n_stops = 1; /* quiet parts need no tokenizer for it; the others have no stop strings */
    return p;
}

/* One sampler on whole rows; one that chooses from parts; one quiet sampler per other part. */
typedef struct group {
    int vocab, parts;
    sh_sampler *whole, *quiet[MAX_PARTS];
    sh_row *row;
    float *x, *all, *y;
    uint8_t *digest;
    int asked[3];
} group;

static void open_group(group *g, int vocab, int parts) {
    *g = (group){.vocab = vocab, .parts = parts};
    CU_ASSERT_EQUAL_FATAL(sh_sampler_create(kn, NULL, vocab, 1, CONTEXT, NULL, &g->whole), SH_OK);
    for (int i = 0; i < parts; i++) {
        CU_ASSERT_EQUAL_FATAL(sh_sampler_create(kn, NULL, vocab, 1, CONTEXT, NULL, &g->quiet[i]), SH_OK);
        if (i > 0) sh_sampler_quiet(g->quiet[i]);
    }
    CU_ASSERT_EQUAL_FATAL(sh_row_create(vocab, parts, &g->row), SH_OK);
    g->x = malloc((size_t)vocab * sizeof(float));
    g->all = malloc((size_t)vocab * sizeof(float));
    g->y = malloc((size_t)vocab * sizeof(float));
    g->digest = malloc(sh_digest_bytes(vocab));
}

static void close_group(group *g) {
    sh_sampler_destroy(&g->whole);
    for (int i = 0; i < g->parts; i++) sh_sampler_destroy(&g->quiet[i]);
    sh_row_destroy(&g->row);
    free(g->x);
    free(g->all);
    free(g->y);
    free(g->digest);
}

static void start_group(group *g, const sh_seq_start *start) {
    sh_sampling texts = *start->sampling, plain = texts;
    plain.n_stops = 0;
    sh_seq_start with = *start, without = *start;
    with.sampling = &texts;
    without.sampling = &plain;
    CU_ASSERT_EQUAL_FATAL(sh_sampler_start(g->whole, &without), SH_OK);
    for (int i = 0; i < g->parts; i++)
        CU_ASSERT_EQUAL_FATAL(sh_sampler_start(g->quiet[i], i ? &with : &without), SH_OK);
}

static bool same_token(const sh_token *a, const sh_token *b) {
    return a->id == b->id && a->index == b->index && a->score == b->score && a->finish == b->finish &&
           memcmp(&a->logprob, &b->logprob, sizeof a->logprob) == 0 && a->n_top == b->n_top &&
           memcmp(a->top, b->top, (size_t)a->n_top * sizeof *a->top) == 0;
}

/* The digests of g->y (bans are applied to it, part by part) into g->row. */
static void collect(group *g, int pos) {
    sh_row_clear(g->row);
    for (int i = 0; i < g->parts; i++) {
        sh_range ids = sh_share_range((sh_share){.parts = g->parts, .part = i}, g->vocab, SH_SHARE_VOCAB);
        size_t bytes = 0, used = 0;
        CU_ASSERT_EQUAL_FATAL(
            sh_sampler_digest(g->quiet[i], 1, pos, g->y + ids.lo, ids.hi - ids.lo, ids.lo, g->digest, &bytes), SH_OK);
        CU_ASSERT_FATAL(bytes <= sh_digest_bytes(ids.hi - ids.lo));
        CU_ASSERT_EQUAL_FATAL(sh_row_add(g->row, ids, g->digest, bytes, &used), SH_OK);
        CU_ASSERT_EQUAL_FATAL(bytes, used);
    }
    CU_ASSERT_EQUAL_FATAL(sh_row_join(g->row), SH_OK);
}

static void one_step(group *g, int pos) {
    sh_token a = {0}, b = {0};
    sh_row_ask ask = {0};
    int made_a = 0, made_b = 0;
    fill_row(g->x, g->vocab, below(6));
    memcpy(g->y, g->x, (size_t)g->vocab * sizeof(float));
    sh_status whole = sh_sampler_step(g->whole, 1, pos, g->x, &a, &made_a);
    collect(g, pos);
    if (whole != SH_OK) { /* everything that was possible is banned */
        CU_ASSERT_EQUAL(sh_sampler_step_row(g->quiet[0], 1, pos, g->row, &b, &made_b), whole);
        return;
    }
    CU_ASSERT_EQUAL_FATAL(sh_sampler_ask(g->quiet[0], 1, pos, g->row, &ask), SH_OK);
    g->asked[ask.kind]++;
    if (ask.kind != SH_ASK_NOTHING && below(4) == 0) /* nothing is guessed, and nothing changes */
        CU_ASSERT_EQUAL(sh_sampler_step_row(g->quiet[0], 1, pos, g->row, &b, &made_b), SH_ESTATE);
    if (ask.kind == SH_ASK_SEGMENT)
        sh_row_give_segment(g->row, ask.segment, g->y + (size_t)ask.segment * SH_DRAW_SEGMENT);
    memcpy(g->all, g->y, (size_t)g->vocab * sizeof(float));
    if (ask.kind == SH_ASK_ALL) sh_row_give_all(g->row, g->all);
    sh_row_ask again = {0};
    CU_ASSERT_EQUAL(sh_sampler_ask(g->quiet[0], 1, pos, g->row, &again), SH_OK);
    if (again.kind == SH_ASK_ALL) { /* a segment settles the draw, but not all alternatives */
        g->asked[SH_ASK_ALL]++;
        sh_row_give_all(g->row, g->all);
    }
    CU_ASSERT_EQUAL_FATAL(sh_sampler_step_row(g->quiet[0], 1, pos, g->row, &b, &made_b), SH_OK);
    CU_ASSERT_EQUAL_FATAL(made_a, made_b);
    CU_ASSERT_FATAL(made_a == 0 || same_token(&a, &b));
}

static void against_whole(void) {
    static const int vocabs[] = {33, 1024, 2500, MAX_VOCAB};
    int asked[3] = {0};
    for (int round = 0; round < 2000; round++) {
        group g;
        open_group(&g, vocabs[round % 4], 2 + below(MAX_PARTS - 1));
        sh_sampling p = random_request(g.vocab);
        int32_t tokens[CONTEXT];
        for (int i = 0; i < CONTEXT; i++) tokens[i] = below(g.vocab);
        int given = below(3);
        start_group(&g,
                    &(sh_seq_start){
                        .seq = 1, .sampling = &p, .tokens = tokens, .n_prompt = PROMPT, .n_tokens = PROMPT + given});
        for (int pos = 0; pos < PROMPT + given; pos++) one_step(&g, pos);
        for (int k = 0; k < 3; k++) asked[k] += g.asked[k];
        close_group(&g);
    }
    printf(" (asked for nothing %d, a segment %d, all %d)", asked[0], asked[1], asked[2]);
    CU_ASSERT(asked[0] > 100 && asked[1] > 100 && asked[2] > 20);
}

static void not_numbers(void) {
    group g;
    open_group(&g, 3000, 3);
    sh_sampling p = {.temperature = 1, .top_p = 1, .max_tokens = 4};
    int32_t tokens[CONTEXT] = {0};
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    start_group(&g, &(sh_seq_start){.seq = 1, .sampling = &p, .tokens = tokens, .n_prompt = 1, .n_tokens = 1});
    for (int i = 0; i < 3; i++) {
        sh_token t;
        int n = 0;
        for (int k = 0; k < g.vocab; k++) g.x[k] = i == 2 ? bad[i] : unit();
        g.x[2000] = bad[i];
        memcpy(g.y, g.x, (size_t)g.vocab * sizeof(float));
        collect(&g, 0);
        sh_status whole = sh_sampler_step(g.whole, 1, 0, g.x, &t, &n);
        CU_ASSERT_EQUAL(whole, SH_EFORMAT);
        CU_ASSERT_EQUAL(sh_sampler_step_row(g.quiet[0], 1, 0, g.row, &t, &n), SH_EFORMAT);
    }
    close_group(&g);
}

static void damaged(void) {
    enum { N = 2048 };
    sh_draw *d = NULL;
    sh_row *r = NULL;
    float x[N];
    uint8_t good[16384], bad[16384];
    size_t bytes = 0, used = 0;
    sh_range ids = {0, N};
    CU_ASSERT_EQUAL_FATAL(sh_draw_create(kn, N, &d), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_row_create(N, 2, &r), SH_OK);
    CU_ASSERT_FATAL(sh_digest_bytes(N) <= sizeof good);
    fill_row(x, N, 0);
    sh_digest_make(d, x, N, 0, &(sh_digest_want){.lse = true, .temperature = 1, .best = 64, .id = 5}, good, &bytes);
    CU_ASSERT_EQUAL(sh_row_add(r, ids, good, bytes, &used), SH_OK);
    CU_ASSERT_EQUAL(sh_row_join(r), SH_OK);
    for (size_t len = 0; len < bytes; len++) {
        sh_row_clear(r);
        CU_ASSERT_EQUAL(sh_row_add(r, ids, good, len, &used), SH_EPEER);
    }
    sh_row_clear(r);
    CU_ASSERT_EQUAL(sh_row_join(r), SH_EPEER); /* a part is missing */
    CU_ASSERT_EQUAL(sh_row_add(r, (sh_range){0, 1024}, good, bytes, &used), SH_EPEER);
    for (int round = 0; round < 3000; round++) { /* refused or taken, never out of bounds */
        memcpy(bad, good, bytes);
        for (int k = 0; k < 3; k++) bad[(size_t)below((int)bytes)] = (uint8_t)next_random();
        if (round & 1) bad[(size_t)below(24)] = (uint8_t)next_random();
        sh_row_clear(r);
        if (sh_row_add(r, ids, bad, bytes, &used) != SH_OK || sh_row_join(r) != SH_OK) continue;
        sh_row_ask ask;
        int32_t id;
        sh_sampling p = {.temperature = 1, .top_p = 0.9f, .top_k = 10};
        SH_IGNORE(sh_row_id(r, &p, 0.5, &id, &ask));
    }
    sh_row_destroy(&r);
    sh_draw_destroy(&d);
}

int main(void) {
    if (sh_kernels_select(&kn) != SH_OK) return 1;
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("digest", NULL, NULL);
    CU_add_test(s, "against whole rows", against_whole);
    CU_add_test(s, "not numbers", not_numbers);
    CU_add_test(s, "damaged", damaged);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
