/* Cuts, their messages, and the arithmetic of KV budgets. */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>

#include "model/batch.h"
#include "partition/plan.h"

#define MIB ((uint64_t)1 << 20)
static sh_config e2b, b31, a4b, minnow;

static int load(void) {
    return sh_config_load(SH_TEST_DATA "/configs/e2b", &e2b) || sh_config_load(SH_TEST_DATA "/configs/31b", &b31) ||
           sh_config_load(SH_TEST_DATA "/configs/26b-a4b", &a4b) ||
           sh_config_load(SH_SOURCE_DIR "/share/minnow", &minnow);
}

static void check_text(const sh_config *c, int ranks, const char *cuts, const char *want) {
    const sh_plan_request r = {.ranks = ranks, .cuts = cuts, .mode = SH_MODE_BF16, .kv = SH_KV_BF16};
    Shoal__Plan *p = NULL;
    sh_status st = sh_plan_make(c, &r, &p);
    if (st != SH_OK) printf("\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    sh_buf b;
    sh_buf_init(&b, 0);
    CU_ASSERT_EQUAL(sh_plan_print(c, p, &b), SH_OK);
    if (strcmp((const char *)b.data, want) != 0) printf("\n%s\n", (const char *)b.data);
    CU_ASSERT_STRING_EQUAL((const char *)b.data, want);
    sh_buf_release(&b);
    sh_plan_free(&p);
    CU_ASSERT_PTR_NULL(p);
}

static void test_text(void) {
    check_text(&minnow, 0, NULL, "one stage: layers 0-5 + head");
    check_text(&minnow, 1, "", "one stage: layers 0-5 + head");
    check_text(&minnow, 0, "2,4,5", "pipeline of 4 stages: layers 0-1 | 2-3 | 4 | 5 + head");
    check_text(&minnow, 2, "3", "pipeline of 2 stages: layers 0-2 | 3-5 + head");
    check_text(&minnow, 6, NULL, "pipeline of 6 stages: layers 0 | 1 | 2 | 3 | 4 | 5 + head");
}

static void test_messages(void) {
    static const struct {
        int ranks;
        const char *cuts, *message;
    } row[] = {
        {7, NULL, "7 ranks: the model has 6 layers: at most 6 ranks"},
        {-1, NULL, "-1 ranks: at least 1"},
        {0, "5,5", "--cuts 5,5: not ascending: 5 follows 5: each is the first layer of the next stage"},
        {0, "4,2", "--cuts 4,2: not ascending: 2 follows 4: each is the first layer of the next stage"},
        {0, "0", "--cuts 0: 0 is not a cut: the model has 6 layers: allowed are 1 to 5"},
        {0, "2,6", "--cuts 2,6: 6 is not a cut: the model has 6 layers: allowed are 1 to 5"},
        {0, "99999999999999999999",
         "--cuts 99999999999999999999: 99999999999999999999 is not a cut: the model has 6 layers: allowed are 1 to 5"},
        {0, "2,x", "--cuts 2,x: not a list of layers: allowed are numbers from 1 to 5, ascending, with commas between"},
        {0, "2,", "--cuts 2,: not a list of layers: allowed are numbers from 1 to 5, ascending, with commas between"},
        {0, "-2", "--cuts -2: not a list of layers: allowed are numbers from 1 to 5, ascending, with commas between"},
        {0, "2 4", "--cuts 2 4: not a list of layers: allowed are numbers from 1 to 5, ascending, with commas between"},
        {4, "2,4", "--cuts 2,4: 3 stages, but there are 4 ranks: give 3 cuts, or -n 3"},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        const sh_plan_request r = {.ranks = row[i].ranks, .cuts = row[i].cuts, .mode = SH_MODE_BF16, .kv = SH_KV_BF16};
        Shoal__Plan *p = NULL;
        CU_ASSERT_EQUAL(sh_plan_make(&minnow, &r, &p), SH_EINPUT);
        if (strcmp(sh_error_text(), row[i].message) != 0) printf("\n%s\n", sh_error_text());
        CU_ASSERT_STRING_EQUAL(sh_error_text(), row[i].message);
        CU_ASSERT_PTR_NULL(p);
    }
    const sh_plan_request r = {.ranks = 1, .max_context = 5000};
    Shoal__Plan *p = NULL;
    CU_ASSERT_EQUAL(sh_plan_make(&minnow, &r, &p), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "--max-context: 5000 is out of range: allowed are 1 to 4096");
}

/* The dearest stage of a plan, by trying every way to cut. */
static int64_t cheapest(const sh_config *c, int from, int ranks) {
    if (ranks == 1) return sh_plan_cost(c, from, c->n_layers);
    int64_t best = INT64_MAX;
    for (int cut = from + 1; cut <= c->n_layers - ranks + 1; cut++) {
        int64_t here = sh_plan_cost(c, from, cut), rest = cheapest(c, cut, ranks - 1);
        int64_t worst = here > rest ? here : rest;
        if (worst < best) best = worst;
    }
    return best;
}

static void test_balance(void) {
    const sh_config *const model[] = {&e2b, &a4b, &minnow};
    for (int m = 0; m < 3; m++)
        for (int ranks = 1; ranks <= 4; ranks++) {
            int cut[SH_MAX_LAYERS];
            CU_ASSERT_EQUAL_FATAL(sh_plan_balance(model[m], ranks, cut), SH_OK);
            int64_t worst = 0;
            for (int r = 0, first = 0; r < ranks; r++) {
                int last = r + 1 < ranks ? cut[r] : model[m]->n_layers;
                CU_ASSERT_TRUE(last > first);
                int64_t cost = sh_plan_cost(model[m], first, last);
                if (cost > worst) worst = cost;
                first = last;
            }
            CU_ASSERT_EQUAL(worst, cheapest(model[m], 0, ranks));
        }
    int cut[SH_MAX_LAYERS];
    CU_ASSERT_EQUAL(sh_plan_balance(&b31, 60, cut), SH_OK);
    for (int i = 0; i < 59; i++) CU_ASSERT_EQUAL(cut[i], i + 1);
    CU_ASSERT_EQUAL(sh_plan_cost(&e2b, 0, 35), sh_plan_cost(&e2b, 0, 20) + sh_plan_cost(&e2b, 20, 35));
}

static Shoal__Plan *plan_of(const sh_config *c, sh_plan_request r) {
    Shoal__Plan *p = NULL;
    r.mode = SH_MODE_BF16;
    r.kv = SH_KV_BF16;
    CU_ASSERT_EQUAL_FATAL(sh_plan_make(c, &r, &p), SH_OK);
    return p;
}

static void test_shape(void) {
    Shoal__Plan *p = plan_of(&a4b, (sh_plan_request){.pp = 2, .ep = 5});
    sh_plan_shape s = sh_plan_shape_of(p);
    CU_ASSERT_EQUAL(p->n_rank, 10);
    CU_ASSERT_EQUAL(s.pp, 2);
    CU_ASSERT_EQUAL(s.width, 5);
    CU_ASSERT_EQUAL(p->rank[4]->last, p->rank[0]->last);
    CU_ASSERT_EQUAL(p->rank[5]->first, p->rank[0]->last);
    int held = 0; /* of layer 0: 128 experts over 5 ranks, each once */
    for (int m = 0; m < 5; m++) held += (int)p->rank[m]->experts[0]->n_expert;
    CU_ASSERT_EQUAL(held, 128);
    p->rank[3]->experts[0]->n_expert--;
    CU_ASSERT_EQUAL(sh_plan_check(&a4b, p), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "plan: layer 0: expert 101 is on no rank");
    sh_plan_free(&p);
    p = plan_of(&b31, (sh_plan_request){.ranks = 8, .tp = 4});
    CU_ASSERT_EQUAL(sh_plan_shape_of(p).pp, 2);
    p->rank[7]->last--;
    CU_ASSERT_EQUAL(sh_plan_check(&b31, p), SH_EINPUT);
    sh_plan_free(&p);
    const struct {
        sh_plan_request r;
        const char *message;
    } bad[] = {
        {{.tp = 3}, "--tp: 3 does not divide the 16 query heads of the model: allowed are 1, 2, 4, 8, 16"},
        {{.ep = 129}, "--ep: 129: the model has 128 experts: allowed are 1 to 128"},
        {{.ranks = 6, .ep = 4}, "6 ranks: not a multiple of the 4 ranks of a stage (ep 4, tp 1, cp 1)"},
        {{.ranks = 6, .pp = 2, .ep = 2}, "6 ranks: 2 stages of 2 ranks (ep 2, tp 1, cp 1) need 4: give -n 4"},
        {{.pp = 3, .cuts = "4"}, "--cuts 4: 2 stages, but --pp asks for 3: give 2 cuts"},
        {{.ranks = 2, .prefill = 2}, "--prefill: 2 of 2 ranks: allowed are 0 to 1: one at least must decode"},
        {{.prefill = 31}, "--prefill: 31 is out of range: allowed are 0 to 30"},
        {{.ranks = 5, .pp = 2, .prefill = 2},
         "3 ranks that decode: 2 stages of 1 ranks (ep 1, tp 1, cp 1) need 2: give -n 4, or --prefill 3 where so many "
         "are only to read prompts"},
        {{.ranks = 3, .pp = 2},
         "3 ranks: 2 stages of 1 ranks (ep 1, tp 1, cp 1) need 2: give -n 2, or --prefill 1 where one is only to read "
         "prompts"},
        {{.ranks = 1, .pp = 2}, "1 ranks: 2 stages of 1 ranks (ep 1, tp 1, cp 1) need 2: give -n 2"},
        {{.ranks = 4, .prefill = 3, .prefill_cuts = "9"},
         "--prefill-cuts 9: 2 ranks that read prompts, but there are 3: give --prefill 2"},
        {{.ranks = 4, .prefill_cuts = "9"},
         "--prefill-cuts 9: 2 ranks that read prompts, but there are 0: give --prefill 2"},
        {{.ranks = 4, .prefill = 2, .prefill_cuts = "30"},
         "--prefill-cuts 30: 30 is not a cut: K/V of their own have 30 layers: allowed are 1 to 29"},
        {{.tp = 2, .prefill = 1},
         "--prefill 1, --ep 1, --tp 2, --cp 1: prompts are handed over between stages of one rank: allowed with "
         "--prefill is 1 for each of the others"},
        {{.ep = 2, .cp = 2},
         "--ep 2, --tp 1, --cp 2: a stage is divided one way at a time: allowed is one of them above 1, with any --pp "
         "and --replicas"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CU_ASSERT_EQUAL(sh_plan_make(&a4b, &bad[i].r, &p), SH_EINPUT);
        if (strcmp(sh_error_text(), bad[i].message) != 0) printf("\n%s\n", sh_error_text());
        CU_ASSERT_STRING_EQUAL(sh_error_text(), bad[i].message);
    }
    const sh_plan_request e = {.ep = 2};
    CU_ASSERT_EQUAL(sh_plan_make(&e2b, &e, &p), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "--ep: 2: the model has no experts: allowed is 1");
}

/* Numbers whose products are more than an int, as a file or a command line may have them: refused, not multiplied. */
static void test_far_too_many(void) {
    static const int far[][4] = {{65536, 65536, 1, 0},
                                 {1 << 30, 4, 1, 0},
                                 {4096, 4096, 4096, 0},
                                 {0, 0, 0, 0},
                                 {INT32_MAX, INT32_MAX, INT32_MAX, 5},
                                 {1, 1, 1, INT32_MIN},
                                 {1, 1, 1, INT32_MAX}};
    Shoal__Plan *p = plan_of(&minnow, (sh_plan_request){.ranks = 2}), *none = NULL;
    p->has_prefill = 1;
    for (size_t i = 0; i < sizeof far / sizeof *far; i++) {
        p->ep = far[i][0], p->tp = far[i][1], p->cp = far[i][2], p->prefill = far[i][3];
        CU_ASSERT_EQUAL(sh_plan_check(&minnow, p), SH_EINPUT);
    }
    sh_plan_free(&p);
    const sh_plan_request r = {.ranks = 2, .ep = SH_MAX_RANKS, .tp = SH_MAX_RANKS, .cp = SH_MAX_RANKS};
    CU_ASSERT_EQUAL(sh_plan_make(&minnow, &r, &none), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "one way at a time"));
}

static void test_check(void) {
    const sh_plan_request r = {.ranks = 3, .cuts = "2,4", .mode = SH_MODE_BF16, .kv = SH_KV_BF16};
    Shoal__Plan *p = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_plan_make(&minnow, &r, &p), SH_OK);
    CU_ASSERT_EQUAL(p->max_seqs, 96);
    CU_ASSERT_EQUAL(p->chunk, 512);
    CU_ASSERT_EQUAL(p->max_context, 4096);
    p->rank[1]->first = 3;
    CU_ASSERT_EQUAL(sh_plan_check(&minnow, p), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(),
                           "plan: rank 1 has layers 3 to 3: it must begin at layer 2 and hold at least one");
    p->rank[1]->first = 2;
    p->rank[2]->last = 5;
    CU_ASSERT_EQUAL(sh_plan_check(&minnow, p), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "plan: layers 5 to 5 are on no rank");
    p->rank[2]->last = 7;
    CU_ASSERT_EQUAL(sh_plan_check(&minnow, p), SH_EINPUT);
    p->rank[2]->last = 6;
    CU_ASSERT_EQUAL(sh_plan_check(&minnow, p), SH_OK);
    p->chunk = SH_MAX_CHUNK + 1;
    CU_ASSERT_EQUAL(sh_plan_check(&minnow, p), SH_EINPUT);
    p->chunk = 1;
    p->max_seqs = 0;
    CU_ASSERT_EQUAL(sh_plan_check(&minnow, p), SH_EINPUT);
    p->max_seqs = 1;
    strcpy(p->mode, "bf17");
    CU_ASSERT_EQUAL(sh_plan_check(&minnow, p), SH_EINPUT);
    sh_plan_free(&p);
}

static void test_page(void) {
    const int32_t one[SH_KV_KINDS] = {1, 1};
    CU_ASSERT_EQUAL(sh_plan_kv_bytes(&e2b, SH_KV_BF16, 0, 35, one), (12288u + 6144u) * SH_PAGE_TOKENS);
    CU_ASSERT_EQUAL(sh_plan_kv_bytes(&e2b, SH_KV_F32, 20, 35, one), 2 * (1024u + 2048u) * SH_PAGE_TOKENS);
    /* heads of 256 and 512: 16 and 32 bytes of scales to a vector */
    CU_ASSERT_EQUAL(sh_plan_kv_bytes(&e2b, SH_KV_Q8, 0, 35, one), (6144u + 384u + 3072u + 192u) * SH_PAGE_TOKENS);
}

static int pages_of(int tokens) {
    return (tokens + SH_PAGE_TOKENS - 1) / SH_PAGE_TOKENS;
}

/* For many budgets: never more than the budget, one sequence fits by the leader's rule, more bytes never give less. */
static void check_budgets(const sh_config *c, const sh_kv_limits *l, int first, int last, int window) {
    int accepted = 0;
    sh_kv_plan before = {0};
    for (uint64_t budget = MIB / 16; budget < (uint64_t)1 << 42; budget += budget / 5) {
        sh_kv_plan k = {.tokens = -1};
        sh_status st = sh_plan_kv(c, l, first, last, budget, &k);
        if (st != SH_OK) {
            CU_ASSERT_EQUAL(st, SH_EMEMORY);
            CU_ASSERT_EQUAL(k.tokens, -1);
            CU_ASSERT_EQUAL(accepted, 0);
            continue;
        }
        accepted++;
        CU_ASSERT_TRUE(sh_plan_kv_bytes(c, l->type, first, last, k.pages) <= budget);
        CU_ASSERT_TRUE(k.tokens >= 1 && k.tokens <= l->max_context &&
                       k.tokens <= k.pages[SH_KV_GLOBAL] * SH_PAGE_TOKENS);
        int peak = (window + l->chunk - 2) / SH_PAGE_TOKENS + 2;
        if (peak > pages_of(l->max_context)) peak = pages_of(l->max_context);
        CU_ASSERT_TRUE(k.pages[SH_KV_SLIDING] >= peak);
        CU_ASSERT_TRUE(k.seqs >= 1 && k.seqs <= l->max_seqs);
        CU_ASSERT_TRUE(k.seqs >= before.seqs && k.tokens >= before.tokens / 2);
        CU_ASSERT_TRUE(k.pages[SH_KV_GLOBAL] <= l->max_seqs * pages_of(l->max_context));
        before = k;
    }
    CU_ASSERT_TRUE(accepted > 20);
    CU_ASSERT_EQUAL(before.tokens, l->max_context);
    CU_ASSERT_EQUAL(before.seqs, l->max_seqs);
}

static void test_kv(void) {
    const sh_kv_limits l = {.type = SH_KV_BF16, .max_seqs = 32, .max_context = 131072, .chunk = 512};
    check_budgets(&e2b, &l, 0, 35, 512);
    check_budgets(&e2b, &l, 15, 35, 512); /* mirrors only */
    check_budgets(&b31, &l, 0, 60, 1024);
    const sh_kv_limits small = {.type = SH_KV_F32, .max_seqs = 1, .max_context = 40, .chunk = 8192};
    check_budgets(&minnow, &small, 0, 6, 64);
    const sh_kv_limits many = {.type = SH_KV_BF16, .max_seqs = 4096, .max_context = 262144, .chunk = 1};
    sh_kv_plan k;
    CU_ASSERT_EQUAL(sh_plan_kv(&b31, &many, 0, 60, UINT64_MAX, &k), SH_OK); /* no overflow, no negative count */
    CU_ASSERT_TRUE(k.pages[0] > 0 && k.pages[1] > 0);
    CU_ASSERT_EQUAL(sh_plan_kv(&b31, &l, 0, 60, 100 * MIB, &k), SH_EMEMORY);
    CU_ASSERT_STRING_EQUAL(sh_error_text(),
                           "rank 0: 100.0 MiB for KV are too few: one sequence needs at least 1270.0 MiB: raise "
                           "--kv-memory, lower --chunk or --max-context, or use more ranks");
}

/* The example of the decision record. */
static void test_kv_example(void) {
    const sh_kv_limits l = {.type = SH_KV_BF16, .max_seqs = 64, .max_context = 131072, .chunk = 512};
    sh_kv_plan k;
    CU_ASSERT_EQUAL_FATAL(sh_plan_kv(&b31, &l, 0, 60, 10240 * MIB, &k), SH_OK);
    CU_ASSERT_EQUAL(k.seqs, 8);
    CU_ASSERT_EQUAL(k.pages[SH_KV_SLIDING], 281);
    CU_ASSERT_EQUAL(k.pages[SH_KV_GLOBAL], 2572);
    CU_ASSERT_EQUAL(k.tokens, 82304);
    CU_ASSERT_EQUAL_FATAL(sh_plan_kv(&e2b, &l, 0, 35, 2048 * MIB, &k), SH_OK);
    CU_ASSERT_EQUAL(k.seqs, 64);
    CU_ASSERT_EQUAL(k.pages[SH_KV_SLIDING], 1105);
    CU_ASSERT_EQUAL(k.pages[SH_KV_GLOBAL], 8712);
    CU_ASSERT_EQUAL(k.tokens, 131072);
}

/* Members that share positions out: per rank never more than the budget; a sequence may be about as many times longer.
 */
static void test_kv_members(void) {
    sh_kv_limits l = {.type = SH_KV_BF16, .max_seqs = 1, .max_context = 262144, .chunk = 512};
    int before = 0, alone = 0;
    for (int members = 1; members <= 8; members *= 2) {
        sh_kv_plan k;
        l.members = members;
        CU_ASSERT_EQUAL_FATAL(sh_plan_kv(&b31, &l, 0, 60, 2048 * MIB, &k), SH_OK);
        CU_ASSERT_TRUE(sh_plan_kv_bytes(&b31, l.type, 0, 60, k.pages) <= 2048 * MIB);
        CU_ASSERT_TRUE(sh_owner_most(k.tokens, members) <= k.pages[SH_KV_GLOBAL]);
        CU_ASSERT_TRUE(k.tokens == l.max_context || sh_owner_most(k.tokens + 1, members) > k.pages[SH_KV_GLOBAL]);
        CU_ASSERT_TRUE(k.tokens == l.max_context || k.tokens > before * 10 / 9);
        before = k.tokens;
        if (members == 1) alone = k.tokens;
    }
    CU_ASSERT_TRUE(before > 4 * alone);
    /* where windows are most of it, members do not help */
    l = (sh_kv_limits){.type = SH_KV_BF16, .max_seqs = 8, .max_context = 131072, .chunk = 512, .members = 1};
    sh_kv_plan one, four;
    CU_ASSERT_EQUAL_FATAL(sh_plan_kv(&b31, &l, 0, 60, 10240 * MIB, &one), SH_OK);
    l.members = 4;
    CU_ASSERT_EQUAL_FATAL(sh_plan_kv(&b31, &l, 0, 60, 10240 * MIB, &four), SH_OK);
    CU_ASSERT_TRUE(four.tokens >= one.tokens && four.seqs >= one.seqs);
}

/* A member's work is its share of the rows, and what it sends. */
static void test_members_memory(void) {
    uint64_t scratch[2] = {0}, weights[2] = {0};
    for (int i = 0; i < 2; i++) {
        sh_plan_request r = {.pp = 1, .cp = i ? 4 : 1, .mode = SH_MODE_BF16, .kv = SH_KV_BF16, .max_seqs = 8};
        Shoal__Plan *p = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_plan_make(&b31, &r, &p), SH_OK);
        sh_plan_memory m = sh_plan_rank_memory(&b31, p, (int)p->n_rank - 1, 0);
        sh_kv_limits l;
        CU_ASSERT_EQUAL_FATAL(sh_plan_kv_limits(p, &l), SH_OK);
        CU_ASSERT_EQUAL(l.members, i ? 4 : 1);
        scratch[i] = m.scratch;
        weights[i] = m.weights;
        sh_plan_free(&p);
    }
    CU_ASSERT_EQUAL(weights[0], weights[1]);
    /* 130 rows of a member: three members, two messages to each and one from it, of two partials of 32 heads a row */
    uint64_t messages = 9ull * 130 * 2 * 32 * (512 + 2) * 4;
    CU_ASSERT_TRUE(scratch[1] > messages && scratch[1] < scratch[0] + messages);
}

static void test_kv_group(void) {
    const sh_plan_request r = {.cuts = "5,15,16,34", .mode = SH_MODE_BF16, .kv = SH_KV_BF16};
    Shoal__Plan *p = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_plan_make(&e2b, &r, &p), SH_OK);
    sh_kv_limits l;
    CU_ASSERT_EQUAL_FATAL(sh_plan_kv_limits(p, &l), SH_OK);
    const uint64_t budget[] = {300 * MIB, 700 * MIB, 64 * MIB, 200 * MIB, 32 * MIB};
    sh_kv_plan group;
    CU_ASSERT_EQUAL_FATAL(sh_plan_kv_group(&e2b, &l, p, budget, &group), SH_OK);
    bool tight = false; /* one more page of either kind would not fit */
    for (int i = 0; i < 5; i++) {
        int first = p->rank[i]->first, last = p->rank[i]->last;
        CU_ASSERT_TRUE(sh_plan_kv_bytes(&e2b, l.type, first, last, group.pages) <= budget[i]);
        const int32_t more[] = {[SH_KV_GLOBAL] = group.pages[0] + 1, [SH_KV_SLIDING] = group.pages[1]};
        tight |= sh_plan_kv_bytes(&e2b, l.type, first, last, more) > budget[i];
    }
    CU_ASSERT_TRUE(tight);
    const uint64_t poor[] = {300 * MIB, 700 * MIB, MIB / 8, 200 * MIB, 32 * MIB};
    CU_ASSERT_EQUAL(sh_plan_kv_group(&e2b, &l, p, poor, &group), SH_EMEMORY);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "rank 2: 0.1 MiB for KV are too few"));
    sh_plan_free(&p);
}

static void test_rank_budget(void) {
    sh_plan_request r = {.ranks = 4, .mode = SH_MODE_BF16, .kv = SH_KV_BF16};
    Shoal__Plan *p = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_plan_make(&b31, &r, &p), SH_OK);
    uint64_t left = 0, total = 0;
    for (int i = 0; i < 4; i++) {
        sh_plan_memory m = sh_plan_rank_memory(&b31, p, i, 0);
        total += m.weights;
        CU_ASSERT_EQUAL(sh_plan_kv_budget(&b31, p, i, 0, 40960 * MIB, &left), SH_OK);
        CU_ASSERT_EQUAL(left, 40960 * MIB - m.weights - m.scratch - m.reserve);
    }
    CU_ASSERT_EQUAL(total, sh_weights_estimate(&b31, SH_MODE_BF16, 0, 60));
    left = 7;
    CU_ASSERT_EQUAL(sh_plan_kv_budget(&b31, p, 1, 0, 8192 * MIB, &left), SH_EMEMORY);
    CU_ASSERT_EQUAL(left, 7);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "rank 1 (layers "));
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "and may use 8192.0 MiB: use more ranks or more memory"));
    p->kv_memory = 3 * MIB;
    CU_ASSERT_EQUAL(sh_plan_kv_budget(&b31, p, 1, 0, 40960 * MIB, &left), SH_OK);
    CU_ASSERT_EQUAL(left, 3 * MIB);
    p->kv_memory = UINT64_MAX;
    CU_ASSERT_EQUAL(sh_plan_kv_budget(&b31, p, 1, 0, 40960 * MIB, &left), SH_EMEMORY);
    sh_plan_free(&p);
}

/* Members that divide heads: a quarter of the weights each, and pages a quarter as large. */
static void test_tensor_budget(void) {
    sh_plan_request r = {.ranks = 1, .mode = SH_MODE_BF16, .kv = SH_KV_BF16}, r4 = r;
    Shoal__Plan *one = NULL, *four = NULL;
    r4.ranks = r4.tp = 4;
    CU_ASSERT_EQUAL_FATAL(sh_plan_make(&b31, &r, &one), SH_OK);
    r4.max_seqs = one->max_seqs;
    CU_ASSERT_EQUAL_FATAL(sh_plan_make(&b31, &r4, &four), SH_OK);
    sh_plan_memory whole = sh_plan_rank_memory(&b31, one, 0, 0);
    for (int i = 0; i < 4; i++) {
        sh_plan_memory part = sh_plan_rank_memory(&b31, four, i, 0);
        CU_ASSERT_TRUE(part.weights >= whole.weights / 4 && part.weights < whole.weights / 4 + whole.weights / 50);
        CU_ASSERT_TRUE(part.scratch > whole.scratch / 4 && part.scratch < 2 * whole.scratch);
        CU_ASSERT_EQUAL(sh_plan_share(four, i).part, i);
        CU_ASSERT_EQUAL(sh_plan_share(four, i).parts, 4);
    }
    sh_kv_limits l;
    sh_kv_plan kv1, kv4;
    const uint64_t all[] = {16384 * MIB}, each[] = {4096 * MIB, 4096 * MIB, 4096 * MIB, 4096 * MIB};
    CU_ASSERT_EQUAL_FATAL(sh_plan_kv_limits(one, &l), SH_OK);
    CU_ASSERT_EQUAL(sh_plan_kv_group(&b31, &l, one, all, &kv1), SH_OK);
    CU_ASSERT_EQUAL(sh_plan_kv_group(&b31, &l, four, each, &kv4), SH_OK);
    CU_ASSERT_EQUAL(kv1.pages[SH_KV_GLOBAL], kv4.pages[SH_KV_GLOBAL]);
    CU_ASSERT_EQUAL(kv1.pages[SH_KV_SLIDING], kv4.pages[SH_KV_SLIDING]);
    CU_ASSERT_EQUAL(sh_plan_share(one, 0).parts, 0);
    sh_plan_free(&one);
    sh_plan_free(&four);
}

/* Ranks that make the K/V of prompts: which layers, which memory, and what is no such plan. */
static void test_prefill(void) {
    Shoal__Plan *p = plan_of(&e2b, (sh_plan_request){.ranks = 5, .prefill = 2});
    sh_plan_shape s = sh_plan_shape_of(p);
    CU_ASSERT(s.pp == 3 && s.decode == 3 && s.prefill == 2 && s.width == 1);
    CU_ASSERT_EQUAL(p->rank[2]->last, 35);
    CU_ASSERT_EQUAL(p->rank[3]->first, 0);
    CU_ASSERT_EQUAL(p->rank[4]->last, 15); /* the 20 layers without K/V of their own are not theirs */
    sh_buf text;
    sh_buf_init(&text, 0);
    CU_ASSERT_EQUAL(sh_plan_print(&e2b, p, &text), SH_OK);
    CU_ASSERT_PTR_NOT_NULL(strstr((const char *)text.data, " + head; prompts on 2 more: layers 0-"));
    sh_buf_release(&text);
    char cuts[SH_PLAN_CUTS], again[SH_PLAN_CUTS];
    Shoal__Plan *q = plan_of(&e2b, (sh_plan_request){.ranks = 6, .prefill = 3, .cuts = "20,28", .prefill_cuts = "2,7"});
    CU_ASSERT(q->rank[3]->last == 2 && q->rank[4]->first == 2 && q->rank[5]->first == 7 && q->rank[5]->last == 15);
    sh_plan_cuts(q, false, cuts);
    sh_plan_cuts(q, true, again);
    CU_ASSERT_STRING_EQUAL(cuts, "20,28");
    CU_ASSERT_STRING_EQUAL(again, "2,7");
    sh_plan_free(&q);
    uint64_t made = sh_plan_rank_memory(&e2b, p, 3, 0).weights + sh_plan_rank_memory(&e2b, p, 4, 0).weights;
    uint64_t as_stage = sh_weights_estimate(&e2b, SH_MODE_BF16, 0, 15);
    CU_ASSERT_TRUE(made < as_stage && made > as_stage - as_stage / 10); /* less the last one's feed-forward */
    CU_ASSERT_EQUAL(p->max_seqs, 96);
    sh_kv_limits l;
    sh_kv_plan decode, prompts;
    const uint64_t budget[] = {600 * MIB, 600 * MIB, 600 * MIB, 100 * MIB, 200 * MIB},
                   poor[] = {600 * MIB, 600 * MIB, 600 * MIB, MIB, 1};
    CU_ASSERT_EQUAL_FATAL(sh_plan_kv_limits(p, &l), SH_OK);
    CU_ASSERT_EQUAL(sh_plan_kv_group(&e2b, &l, p, budget, &decode), SH_OK);
    CU_ASSERT_EQUAL(sh_plan_kv_prefill(&e2b, &l, p, budget, &prompts), SH_OK);
    CU_ASSERT_TRUE(sh_plan_kv_bytes(&e2b, l.type, 0, p->rank[3]->last, prompts.pages) <= 100 * MIB);
    CU_ASSERT_TRUE(decode.pages[SH_KV_GLOBAL] != prompts.pages[SH_KV_GLOBAL]);
    CU_ASSERT_EQUAL(sh_plan_kv_group(&e2b, &l, p, poor, &decode), SH_OK);
    CU_ASSERT_EQUAL(sh_plan_kv_prefill(&e2b, &l, p, poor, &prompts), SH_EMEMORY);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "rank 3: "));
    p->rank[4]->last = 16;
    CU_ASSERT_EQUAL(sh_plan_check(&e2b, p), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "hold at least one and none behind layer 14"));
    p->rank[4]->last = 14;
    CU_ASSERT_EQUAL(sh_plan_check(&e2b, p), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "plan: nobody makes the K/V of prompts for layers 14 to 14");
    p->rank[4]->last = 15;
    CU_ASSERT_EQUAL(sh_plan_check(&e2b, p), SH_OK);
    p->rank[4]->first++;
    CU_ASSERT_EQUAL(sh_plan_check(&e2b, p), SH_EINPUT);
    p->rank[4]->first--;
    p->prefill = 5;
    CU_ASSERT_EQUAL(sh_plan_check(&e2b, p), SH_EINPUT);
    p->prefill = -1;
    CU_ASSERT_EQUAL(sh_plan_check(&e2b, p), SH_EINPUT);
    sh_plan_free(&p);
    p = plan_of(&b31, (sh_plan_request){.cuts = "30", .prefill = 2});
    CU_ASSERT_EQUAL(p->n_rank, 4);
    CU_ASSERT_EQUAL(p->rank[3]->last, 60); /* every layer has K/V of its own; of the last nothing else is made */
    sh_config whole = b31;
    sh_config_prefill(&whole);
    CU_ASSERT_EQUAL(sh_plan_cost(&whole, 59, 60), sh_config_layer_count(&b31, 59).kv);
    sh_plan_free(&p);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("plan", load, NULL);
    CU_add_test(s, "text", test_text);
    CU_add_test(s, "messages", test_messages);
    CU_add_test(s, "balance", test_balance);
    CU_add_test(s, "shape", test_shape);
    CU_add_test(s, "ranks that make K/V", test_prefill);
    CU_add_test(s, "check", test_check);
    CU_add_test(s, "far too many", test_far_too_many);
    CU_add_test(s, "page", test_page);
    CU_add_test(s, "kv", test_kv);
    CU_add_test(s, "kv example", test_kv_example);
    CU_add_test(s, "kv of members", test_kv_members);
    CU_add_test(s, "memory of members", test_members_memory);
    CU_add_test(s, "kv of a group", test_kv_group);
    CU_add_test(s, "rank budget", test_rank_budget);
    CU_add_test(s, "budget of a member by heads", test_tensor_budget);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + (CU_get_number_of_suites_failed() != 0);
    CU_cleanup_registry();
    return failed != 0;
}
