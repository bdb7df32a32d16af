/* coordinator/tail: what a request is expected to take, and when the longest of a job goes first. */
#include <CUnit/Basic.h>
#include "coordinator/tail.h"

static sh_request request(int prompt, int most, bool ignore_eos) {
    return (sh_request){.prompt.n = (size_t)prompt, .sampling = {.max_tokens = most, .ignore_eos = ignore_eos}};
}

static void test_kinds(void) {
    sh_request r = request(10, 100, true);
    CU_ASSERT_EQUAL(sh_tail_kind_of(&r), SH_TAIL_FIXED);
    r.sampling.n_stops = 1; /* a stop string ends it, too */
    CU_ASSERT_EQUAL(sh_tail_kind_of(&r), SH_TAIL_LIMITED);
    r.sampling.min_tokens = 100;
    CU_ASSERT_EQUAL(sh_tail_kind_of(&r), SH_TAIL_FIXED);
    r = request(10, 100, true);
    r.sampling.n_stop_ids = 1;
    CU_ASSERT_EQUAL(sh_tail_kind_of(&r), SH_TAIL_LIMITED);
    r = request(10, 1, false);
    CU_ASSERT_EQUAL(sh_tail_kind_of(&r), SH_TAIL_FIXED);
    r = request(10, 8182, false);
    r.unlimited = true;
    CU_ASSERT_EQUAL(sh_tail_kind_of(&r), SH_TAIL_OPEN);
}

static void test_lengths(void) {
    sh_request r = request(1, 12, true);
    CU_ASSERT_EQUAL(sh_tail_length_of(&r), 13);
    r = request(64, 12, true);
    CU_ASSERT_EQUAL(sh_tail_length_of(&r), 13);
    r = request(768, 1, true); /* a prompt to be read is work, too */
    CU_ASSERT_EQUAL(sh_tail_length_of(&r), 13);
    int64_t before = 0;
    int different = 0;
    for (int n = 1; n < 1 << 20; n = n < 1000 ? n + 1 : n + n / 50) { /* rounded up, in order, to few numbers */
        r = request(1, n, true);
        int64_t l = sh_tail_length_of(&r);
        CU_ASSERT(l >= n + 1 && l <= (n + 1) * 9 / 8 && l >= before);
        different += l > before;
        before = l;
    }
    CU_ASSERT(different <= 15 + 17 * 8);
    r = request(8000, 192, false);
    r.unlimited = true;
    sh_request s = request(100, 8092, false);
    s.unlimited = true;
    CU_ASSERT(sh_tail_length_of(&r) >= sh_tail_length_of(&s)); /* what the context leaves says nothing of the answer */
}

/* The rule: the longest first once what waits is worked off in twice its time. */
static void test_begin(void) {
    sh_tail t;
    sh_tail_init(&t);
    CU_ASSERT_FALSE(sh_tail_may_have_begun(&t, 4)); /* nothing waits */
    sh_tail_add(&t, SH_TAIL_FIXED, 2 * 4 * 50 + 1, 50);
    CU_ASSERT_FALSE(sh_tail_has_begun(&t, 50, 4));
    CU_ASSERT_FALSE(sh_tail_may_have_begun(&t, 4));
    sh_tail_take(&t, SH_TAIL_FIXED, 1);
    CU_ASSERT_TRUE(sh_tail_has_begun(&t, 50, 4));
    CU_ASSERT_TRUE(sh_tail_may_have_begun(&t, 4));
    CU_ASSERT_FALSE(sh_tail_has_begun(&t, 49, 4)); /* the longest was given out before */
    CU_ASSERT_FALSE(sh_tail_has_begun(&t, 50, 3)); /* a group is gone */
    CU_ASSERT_FALSE(sh_tail_has_begun(&t, 50, 0)); /* all are */
    sh_tail_take(&t, SH_TAIL_FIXED, 1000);         /* never below nothing */
    CU_ASSERT_EQUAL(t.waits[SH_TAIL_FIXED], 0);
}

/* What may stop is expected to, as the others of its kind did; but not after a few. */
static void test_share(void) {
    sh_tail t;
    sh_tail_init(&t);
    sh_request r = request(10, 95, false); /* a length of 96 */
    sh_tail_add(&t, SH_TAIL_LIMITED, 1000, 500);
    for (int i = 0; i < SH_TAIL_SEEN; i++) {
        CU_ASSERT_EQUAL(sh_tail_expected(&t, SH_TAIL_LIMITED, 500), 500);
        sh_tail_end(&t, &r, 23); /* a quarter, with the prompt's part */
    }
    CU_ASSERT_EQUAL(sh_tail_expected(&t, SH_TAIL_LIMITED, 500), 125);
    CU_ASSERT_EQUAL(sh_tail_expected(&t, SH_TAIL_FIXED, 500), 500);
    CU_ASSERT_EQUAL(sh_tail_expected(&t, SH_TAIL_OPEN, 500), 500);
    sh_tail_add(&t, SH_TAIL_FIXED, 150, 150); /* 250 + 150 wait */
    CU_ASSERT_TRUE(sh_tail_has_begun(&t, 100, 2));
    CU_ASSERT_FALSE(sh_tail_has_begun(&t, 99, 2));
    CU_ASSERT_TRUE(sh_tail_may_have_begun(&t, 2)); /* the fixed one is the longest by far */
}

static void test_longest(void) {
    sh_tail t;
    sh_tail_init(&t);
    CU_ASSERT_EQUAL(sh_tail_longest(&t), -1);
    t.next[SH_TAIL_FIXED].length = 100, t.next[SH_TAIL_FIXED].key = 9;
    t.next[SH_TAIL_OPEN].length = 100, t.next[SH_TAIL_OPEN].key = 7;
    CU_ASSERT_EQUAL(sh_tail_longest(&t), SH_TAIL_OPEN); /* of equal ones the older */
    t.next[SH_TAIL_FIXED].length = 101;
    CU_ASSERT_EQUAL(sh_tail_longest(&t), SH_TAIL_FIXED);
    t.next[SH_TAIL_FIXED].none = true;
    CU_ASSERT_EQUAL(sh_tail_longest(&t), SH_TAIL_OPEN);
}

int main(void) {
    if (CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("order", NULL, NULL);
    CU_add_test(s, "kinds", test_kinds);
    CU_add_test(s, "lengths", test_lengths);
    CU_add_test(s, "when the longest goes first", test_begin);
    CU_add_test(s, "share of a bound", test_share);
    CU_add_test(s, "of several kinds", test_longest);
    CU_basic_set_mode(CU_BRM_NORMAL);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    return failed != 0;
}
