/* The sampler: filters against a plain full sort, sums, ties, the draw's distribution, bans, ends, stop strings,
 * restarts. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "common/hash.h"
#include "model/draw.h"
#include "model/sampler.h"

static const sh_kernels *kn;
static sh_tokenizer *tok;

static float noise(uint64_t a, uint64_t b) { /* in [−8, 8), on a coarse grid so that ties happen */
    return (float)(sh_mix64(a * 1000003 + b) % 4096) / 256.0f - 8.0f;
}

static void test_philox(void) { /* known answers of Random123's kat_vectors */
    static const uint32_t zero[4], key0[2], want0[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    static const uint32_t ctr[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, key[2] = {0xa4093822, 0x299f31d0};
    static const uint32_t want[4] = {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
    uint32_t out[4];
    sh_philox4x32(zero, key0, out);
    CU_ASSERT(!memcmp(out, want0, sizeof out));
    sh_philox4x32(ctr, key, out);
    CU_ASSERT(!memcmp(out, want, sizeof out));
    CU_ASSERT_EQUAL(sh_draw_uniform(0, 0, 0), (double)(0x6627e8d5e169c58du >> 11) * 0x1p-53);
    CU_ASSERT(sh_draw_uniform(1, 0, 5) != sh_draw_uniform(1, 1, 5) &&
              sh_draw_uniform(1, 0, 5) != sh_draw_uniform(2, 0, 5));
}

/* --- filters against a plain sort --- */

typedef struct entry {
    float y;
    int32_t id;
} entry;

static int by_value(const void *a, const void *b) {
    const entry *x = a, *y = b;
    if (x->y != y->y) return x->y < y->y ? 1 : -1;
    return x->id < y->id ? -1 : 1;
}

/* transformers' rules, written as they read. Returns how many stay at the front of e. */
static int plain_filter(const float *x, int vocab, const sh_sampling *p, entry *e) {
    for (int i = 0; i < vocab; i++) e[i] = (entry){x[i] / p->temperature, i};
    qsort(e, (size_t)vocab, sizeof *e, by_value);
    int n = 0;
    while (n < vocab && e[n].y > -INFINITY) n++;
    if (p->top_k > 0 && p->top_k < n) {
        float least = e[p->top_k - 1].y;
        for (n = p->top_k; n < vocab && e[n].y == least;) n++;
    }
    double total = 0, sum = 0;
    for (int i = 0; i < n; i++) total += exp((double)(e[i].y - e[0].y));
    if (p->top_p < 1)
        for (int i = 0; i < n; i++) {
            sum += exp((double)(e[i].y - e[0].y));
            if (sum >= (double)p->top_p * total) {
                n = i + 1;
                break;
            }
        }
    int kept = 1;
    while (kept < n && exp((double)(e[kept].y - e[0].y)) >= (double)p->min_p) kept++;
    return kept;
}

static void test_filters(void) {
    static const int sizes[] = {1, 2, 15, 255, 256, 257, 1024, 1025, 5000, 20000};
    static const sh_sampling ask[] = {
        {.temperature = 1, .top_p = 1, .top_k = 5},
        {.temperature = 1, .top_p = 1, .top_k = 64},
        {.temperature = 0.7f, .top_p = 0.8f, .top_k = 10},
        {.temperature = 1.3f, .top_p = 0.5f, .top_k = 0},
        {.temperature = 2, .top_p = 0.999f, .top_k = 0},
        {.temperature = 1, .top_p = 1, .top_k = 0, .min_p = 0.05f},
        {.temperature = 1, .top_p = 0.9f, .top_k = 300, .min_p = 0.01f},
        {.temperature = 0.3f, .top_p = 0, .top_k = 0},
        {.temperature = 1, .top_p = 0.95f, .top_k = 1},
    };
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        int vocab = sizes[s];
        float *x = malloc((size_t)vocab * sizeof *x);
        entry *e = malloc((size_t)vocab * sizeof *e);
        sh_draw *d = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_draw_create(kn, vocab, &d), SH_OK);
        for (int i = 0; i < vocab; i++) x[i] = i % 97 == 5 ? -INFINITY : noise(s, (uint64_t)i);
        for (size_t a = 0; a < sizeof ask / sizeof *ask; a++) {
            sh_support got;
            int n = plain_filter(x, vocab, &ask[a], e);
            CU_ASSERT_EQUAL_FATAL(sh_draw_support(d, x, &ask[a], &got), SH_OK);
            CU_ASSERT_EQUAL(got.n, n);
            int bad = 0;
            for (int i = 0; i < n && i < got.n; i++) bad += got.id[i] != e[i].id;
            CU_ASSERT_EQUAL(bad, 0);
        }
        sh_draw_destroy(&d);
        free(x);
        free(e);
    }
}

static void test_logprobs(void) {
    enum { V = 3001 };
    static float x[V];
    sh_draw *d = NULL;
    sh_lse l;
    sh_top_logprob top[SH_MAX_TOP_LOGPROBS];
    CU_ASSERT_EQUAL_FATAL(sh_draw_create(kn, V, &d), SH_OK);
    for (int i = 0; i < V; i++) x[i] = noise(7, (uint64_t)i);
    for (int i = 2048; i < V; i++) x[i] = -INFINITY; /* a whole segment without a possible entry */
    CU_ASSERT_EQUAL_FATAL(sh_draw_lse(d, x, &l), SH_OK);
    double sum = 0;
    for (int i = 0; i < V; i++) sum += exp((double)sh_lse_logprob(l, x[i]));
    CU_ASSERT_DOUBLE_EQUAL(sum, 1, 1e-5);
    CU_ASSERT_EQUAL(sh_draw_top(d, x, l, 20, top), 20);
    for (int i = 1; i < 20; i++)
        CU_ASSERT(top[i - 1].logprob > top[i].logprob ||
                  (top[i - 1].logprob == top[i].logprob && top[i - 1].id < top[i].id));
    for (int i = 0; i < V; i++)
        if (i != 9 && i != 1500) x[i] = -INFINITY;
    CU_ASSERT_EQUAL_FATAL(sh_draw_lse(d, x, &l), SH_OK);
    CU_ASSERT_EQUAL(sh_draw_top(d, x, l, 20, top), 2); /* never an impossible one */
    sh_draw_destroy(&d);
}

static void test_bad_logits(void) {
    float x[300];
    int32_t id = -5;
    sh_lse l;
    sh_draw *d = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_draw_create(kn, 300, &d), SH_OK);
    for (int i = 0; i < 300; i++) x[i] = -1;
    x[40] = x[299] = x[7] = 3;
    CU_ASSERT_EQUAL(sh_draw_greedy(d, x, &id), SH_OK);
    CU_ASSERT_EQUAL(id, 7); /* the lowest of equals */
    x[100] = NAN;
    CU_ASSERT_EQUAL(sh_draw_greedy(d, x, &id), SH_EFORMAT);
    CU_ASSERT_EQUAL(sh_draw_lse(d, x, &l), SH_EFORMAT);
    x[100] = INFINITY;
    CU_ASSERT_EQUAL(sh_draw_greedy(d, x, &id), SH_EFORMAT);
    for (int i = 0; i < 300; i++) x[i] = -INFINITY;
    CU_ASSERT_EQUAL(sh_draw_greedy(d, x, &id), SH_EFORMAT);
    CU_ASSERT_EQUAL(id, 7); /* untouched */
    sh_draw_destroy(&d);
}

/* --- the draw --- */

/* Chi-square of `draws` positions against exact probabilities, for a row whose six likely ids sit in different
 * segments. */
static double chi_square(sh_draw *d, int vocab, const sh_sampling *p, uint64_t seed, int draws) {
    static const int at[6] = {0, 3, 1023, 1024, 2500, 2999};
    static const double prob[6] = {0.4, 0.25, 0.15, 0.1, 0.07, 0.03};
    float *x = malloc((size_t)vocab * sizeof *x);
    int hits[6] = {0}, other = 0;
    for (int i = 0; i < vocab; i++) x[i] = -INFINITY;
    for (int i = 0; i < 6; i++) x[at[i]] = (float)log(prob[i]) * p->temperature;
    for (int pos = 0; pos < draws; pos++) {
        int32_t id = -1;
        int k = 0;
        CU_ASSERT_EQUAL_FATAL(sh_draw_id(d, x, p, sh_draw_uniform(seed, 0, (uint32_t)pos), &id), SH_OK);
        while (k < 6 && at[k] != id) k++;
        if (k < 6)
            hits[k]++;
        else
            other++;
    }
    free(x);
    CU_ASSERT_EQUAL(other, 0);
    double chi = 0;
    for (int k = 0; k < 6; k++) chi += pow(hits[k] - prob[k] * draws, 2) / (prob[k] * draws);
    return chi;
}

static void test_draw_is_fair(void) {
    static const sh_sampling ask[] = {{.temperature = 1, .top_p = 1},
                                      {.temperature = 0.5f, .top_p = 1, .top_k = 10},
                                      {.temperature = 1.5f, .top_p = 0.9999f},
                                      {.temperature = 1, .top_p = 1, .min_p = 0.001f}};
    sh_draw *d = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_draw_create(kn, 3000, &d), SH_OK);
    for (size_t a = 0; a < sizeof ask / sizeof *ask; a++)
        for (uint64_t seed = 0; seed < 3; seed++)
            CU_ASSERT(chi_square(d, 3000, &ask[a], seed, 4000) < 20.5); /* 5 degrees, 0.1 % */
    sh_draw_destroy(&d);
}

/* --- sequences --- */

enum { VOCAB = 2048, CONTEXT = 256 };

/* A model: logits that depend on the last two tokens and the position. */
static void fake_logits(const int32_t *tokens, int n, float *x) {
    uint64_t h = sh_mix64((uint64_t)tokens[n - 1] << 20 ^ (uint64_t)(n > 1 ? tokens[n - 2] : 0) ^ (uint64_t)n << 40);
    for (int i = 0; i < VOCAB; i++) x[i] = noise(h, (uint64_t)i);
}

typedef struct run {
    int32_t tokens[CONTEXT];
    sh_token out[CONTEXT];
    int n_prompt, n; /* n: generated */
} run;

/* Generates from r's first n_prompt + keep tokens to the end. */
static void generate(sh_sampler *s, uint64_t seq, const sh_sampling *p, run *r, int keep) {
    static float x[VOCAB];
    sh_seq_start b = {
        .seq = seq, .sampling = p, .tokens = r->tokens, .n_prompt = r->n_prompt, .n_tokens = r->n_prompt + keep};
    CU_ASSERT_EQUAL_FATAL(sh_sampler_start(s, &b), SH_OK);
    r->n = keep;
    for (;;) {
        int at = r->n_prompt + r->n, n = 0;
        sh_token t;
        fake_logits(r->tokens, at, x);
        CU_ASSERT_EQUAL_FATAL(sh_sampler_step(s, seq, at - 1, x, &t, &n), SH_OK);
        CU_ASSERT_EQUAL_FATAL(n, 1);
        if (t.id < 0) break;
        r->tokens[at] = t.id;
        r->out[r->n++] = t;
        if (t.finish) break;
    }
    sh_sampler_drop(s, seq);
}

static void begin(run *r) {
    static const int32_t prompt[] = {10, 500, 501, 502};
    memset(r, 0, sizeof *r);
    memcpy(r->tokens, prompt, sizeof prompt);
    r->n_prompt = 4;
}

static bool same_token(const sh_token *a, const sh_token *b) {
    bool top = a->n_top == b->n_top;
    for (int i = 0; top && i < a->n_top; i++)
        top = a->top[i].id == b->top[i].id && !memcmp(&a->top[i].logprob, &b->top[i].logprob, 4);
    return a->id == b->id && a->index == b->index && !memcmp(&a->logprob, &b->logprob, 4) && a->finish == b->finish &&
           a->text_len == b->text_len && top;
}

static sh_sampling some_sampling(void) {
    return (sh_sampling){.temperature = 1,
                         .top_p = 0.95f,
                         .top_k = 64,
                         .seed = 77,
                         .max_tokens = 60,
                         .logprobs = 3,
                         .eos = {3},
                         .n_eos = 1};
}

static void text_of(const run *r, int n, sh_buf *b) {
    sh_buf_clear(b);
    CU_ASSERT_EQUAL_FATAL(sh_tokenizer_decode(tok, r->tokens + r->n_prompt, (size_t)n, true, b), SH_OK);
}

enum { TEAM_SEQS = 7, TEAM_STEPS = 12 };

static sh_sampling team_sampling(int k) {
    sh_sampling p = some_sampling();
    p.seed = (uint64_t)k;
    p.temperature = k % 3 ? 1 : 0;
    p.score_prompt = k % 2;
    if (k == 4) {
        p.n_stops = 1;
        p.stop_len[0] = 9;
        memcpy(p.stop[0], "not there", 9);
    }
    return p;
}

/* Rows of several sequences in one call: as step by step, whatever the threads; some have prompt rows to score before.
 */
static void test_team(void) {
    static float one[VOCAB], all[(TEAM_SEQS * 4) * VOCAB];
    sh_team *team = NULL;
    sh_sampler *s = NULL, *t = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_team_create(3, NULL, 0, &team), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_sampler_create(kn, tok, VOCAB, TEAM_SEQS, CONTEXT, NULL, &s), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_sampler_create(kn, tok, VOCAB, TEAM_SEQS, CONTEXT, team, &t), SH_OK);
    run r[TEAM_SEQS];
    for (int k = 0; k < TEAM_SEQS; k++) {
        sh_sampling p = team_sampling(k);
        begin(&r[k]);
        r[k].tokens[1] = 100 + k;
        sh_seq_start b = {.seq = (uint64_t)k, .sampling = &p, .tokens = r[k].tokens, .n_prompt = 4, .n_tokens = 4};
        CU_ASSERT_EQUAL_FATAL(sh_sampler_start(s, &b), SH_OK);
        CU_ASSERT_EQUAL_FATAL(sh_sampler_start(t, &b), SH_OK);
    }
    for (int step = 0; step < TEAM_STEPS; step++) {
        sh_sampler_row row[TEAM_SEQS * 4];
        sh_token got[TEAM_SEQS * 4];
        int n = 0, made[TEAM_SEQS * 4] = {0}, bad = 0;
        for (int k = 0; k < TEAM_SEQS; k++) /* at first the whole prompt */
            for (int pos = step ? 3 + step : 0; pos <= 3 + step; pos++) {
                row[n] = (sh_sampler_row){.seq = (uint64_t)k, .pos = pos};
                fake_logits(r[k].tokens, pos + 1, all + (size_t)n++ * VOCAB);
            }
        CU_ASSERT_EQUAL_FATAL(sh_sampler_steps(t, row, n, all, got, made), SH_OK);
        for (int i = 0; i < n; i++) {
            sh_token want;
            int k = (int)row[i].seq, one_made = 0;
            fake_logits(r[k].tokens, row[i].pos + 1, one);
            CU_ASSERT_EQUAL_FATAL(sh_sampler_step(s, row[i].seq, row[i].pos, one, &want, &one_made), SH_OK);
            bad += made[i] != one_made || (one_made && !same_token(&got[i], &want));
            if (one_made && !want.score) r[k].tokens[4 + step] = want.id;
        }
        CU_ASSERT_EQUAL(bad, 0);
    }
    sh_sampler_row wrong[3] = {{0, 3 + TEAM_STEPS}, {99, 0}, {98, 0}};
    sh_token got[3];
    int made[3] = {0};
    fake_logits(r[0].tokens, 4 + TEAM_STEPS, all);
    CU_ASSERT_EQUAL(sh_sampler_steps(t, wrong, 3, all, got, made), SH_ESTATE);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "sequence 99: a step before its start")); /* the first that failed */
    sh_sampler_destroy(&s);
    sh_sampler_destroy(&t);
    sh_team_destroy(&team);
}

static void test_restart(void) {
    sh_sampler *s = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_sampler_create(kn, tok, VOCAB, 3, CONTEXT, NULL, &s), SH_OK);
    sh_sampling p = some_sampling();
    run whole, again;
    begin(&whole);
    generate(s, 1, &p, &whole, 0);
    CU_ASSERT_EQUAL(whole.n, 60);
    CU_ASSERT_EQUAL(whole.out[59].finish, SH_FINISH_LENGTH);
    for (int round = 0; round < 2; round++) {
        if (round == 1) { /* with stop strings that straddle tokens: bytes out of the middle of the text */
            SH_CLEANUP(sh_buf_release) sh_buf b = {0}, c = {0};
            text_of(&whole, 41, &b);
            text_of(&whole, 40, &c);
            size_t at = c.len > 2 ? c.len - 2 : 0; /* begins in token 40, ends in token 41 or later */
            while (at > 0 && (b.data[at] & 0xc0) == 0x80) at--;
            p.n_stops = 2;
            p.stop_len[0] = (uint16_t)(b.len - at);
            memcpy(p.stop[0], b.data + at, b.len - at);
            p.stop_len[1] = 9;
            memcpy(p.stop[1], "not there", 9);
            begin(&whole);
            generate(s, 1, &p, &whole, 0);
            CU_ASSERT_EQUAL(whole.out[whole.n - 1].finish, SH_FINISH_STOP);
            text_of(&whole, whole.n, &b);
            int cut = whole.out[whole.n - 1].text_len;
            CU_ASSERT(cut >= 0 && (size_t)cut + p.stop_len[0] <= b.len &&
                      !memcmp(b.data + cut, p.stop[0], p.stop_len[0]));
            CU_ASSERT(cut == (int)at || cut < (int)at);
        }
        for (int keep = 0; keep < whole.n; keep++) {
            again = whole;
            memset(again.out, 0, sizeof again.out);
            memset(again.tokens + 4 + keep, 0, (size_t)(CONTEXT - 4 - keep) * 4);
            generate(s, 2, &p, &again, keep);
            CU_ASSERT_EQUAL(again.n, whole.n);
            int bad = 0;
            for (int i = keep; i < whole.n; i++) bad += !same_token(&again.out[i], &whole.out[i]);
            CU_ASSERT_EQUAL(bad, 0);
        }
    }
    sh_sampler_destroy(&s);
}

/* One step at the end of a four-token prompt with given logits. */
static sh_token one_step(sh_sampler *s, const sh_sampling *p, const float *x) {
    float y[VOCAB];
    run r;
    sh_token t = {.id = -9};
    int n = 0;
    begin(&r);
    memcpy(y, x, sizeof y);
    sh_seq_start b = {.seq = 5, .sampling = p, .tokens = r.tokens, .n_prompt = 4, .n_tokens = 4};
    CU_ASSERT_EQUAL_FATAL(sh_sampler_start(s, &b), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_sampler_step(s, 5, 3, y, &t, &n), SH_OK);
    CU_ASSERT_EQUAL(n, 1);
    return t;
}

static void test_bans_and_ends(void) {
    static float x[VOCAB];
    sh_sampler *s = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_sampler_create(kn, tok, VOCAB, 2, CONTEXT, NULL, &s), SH_OK);
    x[3] = 9, x[50] = 8, x[60] = 7, x[70] = 6; /* 3 ends, 50 stops, 60 is suppressed */
    sh_sampling p = {
        .top_p = 1, .max_tokens = 5, .logprobs = -1, .eos = {3}, .n_eos = 1, .stop_ids = {50}, .n_stop_ids = 1};
    sh_token t = one_step(s, &p, x);
    CU_ASSERT(t.id == 3 && t.finish == SH_FINISH_STOP && t.text_len == -1 && t.n_top == 0);
    p.ignore_eos = true;
    t = one_step(s, &p, x);
    CU_ASSERT(t.id == 3 && t.finish == SH_FINISH_NONE);
    p.min_tokens = 1; /* only what would stop is banned: 3 no longer does */
    CU_ASSERT_EQUAL(one_step(s, &p, x).id, 3);
    p.ignore_eos = false;
    CU_ASSERT_EQUAL(one_step(s, &p, x).id, 60);
    p.n_suppress = 1, p.suppress[0] = 60;
    t = one_step(s, &p, x);
    CU_ASSERT(t.id == 70 && t.finish == SH_FINISH_NONE && t.index == 0);
    p.max_tokens = 1;
    CU_ASSERT_EQUAL(one_step(s, &p, x).finish, SH_FINISH_LENGTH);
    p.max_tokens = 0;
    t = one_step(s, &p, x);
    CU_ASSERT(t.id == -1 && t.finish == SH_FINISH_LENGTH && t.index == 0);
    p.max_tokens = 9, p.logprobs = 2, p.n_suppress = 0, p.min_tokens = 0;
    t = one_step(s, &p, x);
    CU_ASSERT(t.n_top == 2 && t.top[0].id == 3 && t.top[1].id == 50 && t.top[0].logprob == t.logprob);
    p.temperature = 1e-6f; /* as good as 0 */
    CU_ASSERT_EQUAL(one_step(s, &p, x).id, 3);
    sh_sampler_destroy(&s);
}

static void test_scores(void) {
    static float x[VOCAB];
    sh_sampler *s = NULL;
    run r;
    begin(&r);
    CU_ASSERT_EQUAL_FATAL(sh_sampler_create(kn, NULL, VOCAB, 1, CONTEXT, NULL, &s), SH_OK);
    sh_sampling p = {
        .top_p = 1, .max_tokens = 0, .logprobs = 1, .score_prompt = true, .suppress = {500}, .n_suppress = 1};
    sh_seq_start b = {.seq = 1, .sampling = &p, .tokens = r.tokens, .n_prompt = 4, .n_tokens = 4};
    CU_ASSERT_EQUAL_FATAL(sh_sampler_start(s, &b), SH_OK);
    for (int pos = 0; pos < 3; pos++) {
        sh_token t;
        int n = 0;
        fake_logits(r.tokens, pos + 1, x);
        double z = 0, want;
        for (int i = 0; i < VOCAB; i++) z += exp((double)x[i]);
        want = (double)x[r.tokens[pos + 1]] - log(z);
        CU_ASSERT_EQUAL_FATAL(sh_sampler_step(s, 1, pos, x, &t, &n), SH_OK);
        CU_ASSERT(n == 1 && t.score && t.index == pos + 1 && t.id == r.tokens[pos + 1] && t.n_top == 1 &&
                  t.finish == SH_FINISH_NONE);
        CU_ASSERT_DOUBLE_EQUAL((double)t.logprob, want, 1e-4); /* a suppressed token of the prompt has its true score */
    }
    sh_sampler_destroy(&s);
}

static void test_misuse(void) {
    static float x[VOCAB];
    sh_sampler *s = NULL;
    sh_token t;
    run r;
    int n = 7;
    begin(&r);
    CU_ASSERT_EQUAL_FATAL(sh_sampler_create(kn, NULL, VOCAB, 1, CONTEXT, NULL, &s), SH_OK);
    sh_sampling p = some_sampling();
    sh_seq_start b = {.seq = 1, .sampling = &p, .tokens = r.tokens, .n_prompt = 4, .n_tokens = 4};
    CU_ASSERT_EQUAL(sh_sampler_step(s, 1, 3, x, &t, &n), SH_ESTATE); /* before its start */
    CU_ASSERT_EQUAL(sh_sampler_start(s, &b), SH_OK);
    CU_ASSERT_EQUAL(sh_sampler_step(s, 1, 4, x, &t, &n), SH_ESTATE);
    CU_ASSERT_EQUAL(sh_sampler_step(s, 1, 1, x, &t, &n), SH_OK);
    CU_ASSERT_EQUAL(n, 0); /* nothing asked about the prompt */
    b.seq = 2;
    CU_ASSERT_EQUAL(sh_sampler_start(s, &b), SH_ELIMIT);
    b.seq = 1;
    CU_ASSERT_EQUAL(sh_sampler_start(s, &b), SH_OK); /* replaced */
    p.n_stops = 1, p.stop_len[0] = 1, p.stop[0][0] = 'x';
    CU_ASSERT_EQUAL(sh_sampler_start(s, &b), SH_ESTATE); /* no tokenizer */
    p.n_stops = 0;
    r.tokens[2] = VOCAB;
    CU_ASSERT_EQUAL(sh_sampler_start(s, &b), SH_EINPUT);
    sh_sampler_drop(s, 99);
    sh_sampler_destroy(&s);
    CU_ASSERT_PTR_NULL(s);
}

/* Stop strings count once more than min_tokens tokens are there, and at the end what byte tokens held back is looked at
 * too. */
static void test_stop_rules(void) {
    sh_sampler *s = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_sampler_create(kn, tok, VOCAB, 1, CONTEXT, NULL, &s), SH_OK);
    sh_sampling p = some_sampling();
    run r;
    begin(&r);
    p.max_tokens = 20;
    generate(s, 1, &p, &r, 0);
    SH_CLEANUP(sh_buf_release) sh_buf b = {0};
    text_of(&r, 3, &b);
    CU_ASSERT_FATAL(b.len > 0 && b.len < SH_MAX_STOP_BYTES);
    p.n_stops = 1;
    p.stop_len[0] = (uint16_t)b.len;
    memcpy(p.stop[0], b.data, b.len);
    begin(&r);
    generate(s, 1, &p, &r, 0);
    CU_ASSERT(r.n <= 4 && r.out[r.n - 1].finish == SH_FINISH_STOP && r.out[r.n - 1].text_len == 0);
    p.min_tokens = 10;
    begin(&r);
    generate(s, 1, &p, &r, 0);
    CU_ASSERT_EQUAL(r.n, 20); /* seen too early, and not seen again */
    sh_sampler_destroy(&s);
}

/* Generates ids chosen by the test; returns the last token. */
static sh_token force(sh_sampler *s, const sh_sampling *p, const int *ids, int n) {
    static float x[VOCAB];
    run r;
    sh_token t = {0};
    begin(&r);
    sh_seq_start b = {.seq = 8, .sampling = p, .tokens = r.tokens, .n_prompt = 4, .n_tokens = 4};
    CU_ASSERT_EQUAL_FATAL(sh_sampler_start(s, &b), SH_OK);
    for (int i = 0; i < n && !t.finish; i++) {
        int made = 0;
        for (int j = 0; j < VOCAB; j++) x[j] = j == ids[i] ? 9 : 0;
        CU_ASSERT_EQUAL_FATAL(sh_sampler_step(s, 8, 3 + i, x, &t, &made), SH_OK);
        CU_ASSERT_EQUAL(t.id, ids[i]);
    }
    sh_sampler_drop(s, 8);
    return t;
}

/* A stop string out of byte tokens: seen when the run ends, by another token or by the end of the sequence. */
static void test_held_back_bytes(void) {
    sh_sampler *s = NULL;
    int c3 = sh_tokenizer_id(tok, "<0xC3>"), a9 = sh_tokenizer_id(tok, "<0xA9>"), other = sh_tokenizer_id(tok, "a");
    CU_ASSERT_FATAL(c3 >= 0 && a9 >= 0 && other >= 0);
    CU_ASSERT_EQUAL_FATAL(sh_sampler_create(kn, tok, VOCAB, 1, CONTEXT, NULL, &s), SH_OK);
    sh_sampling p = {.top_p = 1,
                     .max_tokens = 9,
                     .logprobs = -1,
                     .n_stops = 1,
                     .stop_len = {2},
                     .stop = {"\xc3\xa9"},
                     .eos = {3},
                     .n_eos = 1};
    sh_token t = force(s, &p, (int[]){other, c3, a9, other}, 4);
    CU_ASSERT(t.index == 3 && t.finish == SH_FINISH_STOP && t.text_len == 1);
    t = force(s, &p, (int[]){other, c3, a9, 3}, 4);
    CU_ASSERT(t.index == 3 && t.finish == SH_FINISH_STOP && t.text_len == 1);
    t = force(s, &p, (int[]){other, c3, other}, 3); /* half a character is none */
    CU_ASSERT_EQUAL(t.finish, SH_FINISH_NONE);
    p.max_tokens = 3;
    t = force(s, &p, (int[]){other, c3, a9}, 3); /* the last token the length allows, and yet a stop */
    CU_ASSERT(t.index == 2 && t.finish == SH_FINISH_STOP && t.text_len == 1);
    sh_sampler_destroy(&s);
}

int main(void) {
    if (sh_kernels_select(&kn) != SH_OK || sh_tokenizer_load(SH_TEST_DATA "/text/models/e2b-like", &tok) != SH_OK) {
        fprintf(stderr, "%s\n", sh_error_text());
        return 1;
    }
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("sampler", NULL, NULL);
    CU_add_test(s, "philox", test_philox);
    CU_add_test(s, "filters", test_filters);
    CU_add_test(s, "log-probabilities", test_logprobs);
    CU_add_test(s, "bad logits", test_bad_logits);
    CU_add_test(s, "fair draw", test_draw_is_fair);
    CU_add_test(s, "restart", test_restart);
    CU_add_test(s, "rows on several threads", test_team);
    CU_add_test(s, "bans and ends", test_bans_and_ends);
    CU_add_test(s, "scores", test_scores);
    CU_add_test(s, "misuse", test_misuse);
    CU_add_test(s, "stop rules", test_stop_rules);
    CU_add_test(s, "held back bytes", test_held_back_bytes);
    CU_basic_run_tests();
    int failed = (int)CU_get_number_of_failures();
    CU_cleanup_registry();
    sh_tokenizer_destroy(&tok);
    return failed ? 1 : 0;
}
