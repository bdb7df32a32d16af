/* Who stores what: every position has one owner, blocks are few, counts and capacities agree with counting. */
#include <CUnit/Basic.h>
#include "model/owner.h"

static void blocks_are_few(void) {
    for (int members = 1; members <= 17; members++)
        for (int tokens = 1; tokens < 1 << 20; tokens += 1 + tokens / 7) {
            int level = sh_owner_level(tokens, members), blocks = sh_owner_seen(tokens - 1, level);
            CU_ASSERT(members == 1 ? level == 0 : blocks <= SH_OWNER_BLOCKS * members);
            /* no finer level would do */
            if (level > 0) CU_ASSERT(sh_owner_seen(tokens - 1, level - 1) > SH_OWNER_BLOCKS * members);
        }
    CU_ASSERT(sh_owner_level(1 << 30, 2) <= SH_MAX_LEVEL);
}

/* What the closed forms say is what counting gives. */
static void counts(void) {
    for (int members = 1; members <= 6; members++)
        for (uint64_t seq = 1; seq < 9; seq += 3)
            for (int level = 0; level < 4; level++) {
                int below[6] = {0}, wrong = 0;
                for (int pos = 0; pos < 9000; pos++) {
                    int owner = sh_owner_of(sh_owner_seen(pos, level) - 1, seq, members), sum = 0;
                    for (int m = 0; m < members; m++) {
                        int n = sh_owner_below(pos, level, members, sh_owner_place(m, seq, members));
                        wrong += n != below[m];
                        sum += n;
                    }
                    wrong += owner < 0 || owner >= members || sum != pos;
                    below[owner]++;
                }
                CU_ASSERT_EQUAL(wrong, 0);
            }
}

static void places(void) {
    for (int members = 1; members <= 6; members++)
        for (uint64_t seq = 0; seq < 20; seq++)
            for (int block = 0; block < 30; block++) {
                int owner = sh_owner_of(block, seq, members);
                CU_ASSERT_EQUAL(sh_owner_place(owner, seq, members), block % members);
            }
    CU_ASSERT(sh_owner_of(0, 1, 3) != sh_owner_of(0, 2, 3)); /* first blocks do not all lie with one member */
}

static void capacity(void) {
    for (int members = 1; members <= 5; members++)
        for (int pages = 0; pages < 300; pages += 1 + pages / 9) {
            int n = sh_owner_capacity(pages, members, 1 << 20);
            CU_ASSERT(n == 0 || sh_owner_most(n, members) <= pages);
            CU_ASSERT(sh_owner_most(n + 1, members) > pages);
            CU_ASSERT(n <= pages * members * SH_PAGE_TOKENS);
            if (pages >= SH_SEGMENT_TOKENS / SH_PAGE_TOKENS) CU_ASSERT(2 * n >= pages * members * SH_PAGE_TOKENS);
            for (int more = 1; more < 3000; more += 97) CU_ASSERT(sh_owner_most(n + more, members) > pages);
        }
    CU_ASSERT_EQUAL(sh_owner_capacity(1000, 3, 500), 500);
}

static void rows(void) {
    for (int members = 1; members <= 9; members++)
        for (int n = 0; n < 40; n++) {
            CU_ASSERT_EQUAL(sh_owner_first_row(n, members, 0), 0);
            CU_ASSERT_EQUAL(sh_owner_first_row(n, members, members), n);
            for (int m = 0; m < members; m++) {
                int has = sh_owner_first_row(n, members, m + 1) - sh_owner_first_row(n, members, m);
                CU_ASSERT(has == n / members || has == (n + members - 1) / members);
            }
        }
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("owner", NULL, NULL);
    CU_add_test(s, "blocks are few", blocks_are_few);
    CU_add_test(s, "closed forms and counting", counts);
    CU_add_test(s, "places", places);
    CU_add_test(s, "capacity", capacity);
    CU_add_test(s, "rows", rows);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
