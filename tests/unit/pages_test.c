/* The page allocator against a plain list of who holds what, under random takes, gives and promises. */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include "worker/pages.h"

static void test_empty(void) {
    sh_pages p;
    CU_ASSERT_FATAL(sh_pages_create(0, &p) == SH_OK);
    CU_ASSERT_EQUAL(sh_pages_take(&p, false), -1);
    CU_ASSERT_EQUAL(sh_pages_take(&p, true), -1);
    CU_ASSERT_FALSE(sh_pages_promise(&p, 1));
    sh_pages_release(&p);
    CU_ASSERT_EQUAL(sh_pages_create(-1, &p), SH_EINPUT);
}

static void test_wrong_gives(void) {
    sh_pages p;
    CU_ASSERT_FATAL(sh_pages_create(3, &p) == SH_OK);
    int32_t a = sh_pages_take(&p, false);
    CU_ASSERT_EQUAL(sh_pages_give(&p, a + 1), SH_ESTATE);
    CU_ASSERT_EQUAL(sh_pages_give(&p, -1), SH_ESTATE);
    CU_ASSERT_EQUAL(sh_pages_give(&p, 3), SH_ESTATE);
    CU_ASSERT_EQUAL(sh_pages_give(&p, a), SH_OK);
    CU_ASSERT_EQUAL(sh_pages_give(&p, a), SH_ESTATE); /* twice */
    CU_ASSERT_EQUAL(p.free, 3);
    sh_pages_release(&p);
}

static void test_promises(void) {
    sh_pages p;
    CU_ASSERT_FATAL(sh_pages_create(4, &p) == SH_OK);
    CU_ASSERT_TRUE(sh_pages_promise(&p, 3));
    CU_ASSERT_EQUAL(sh_pages_open(&p), 1);
    CU_ASSERT_FALSE(sh_pages_promise(&p, 2));
    CU_ASSERT(sh_pages_take(&p, false) >= 0);
    CU_ASSERT_EQUAL(sh_pages_take(&p, false), -1); /* the rest is promised */
    CU_ASSERT(sh_pages_take(&p, true) >= 0);
    sh_pages_unpromise(&p, 2);
    CU_ASSERT_EQUAL(sh_pages_open(&p), 2);
    sh_pages_release(&p);
}

static void test_random(void) {
    enum { N = 57 };
    sh_pages p;
    bool held[N] = {false};
    int count = 0;
    srand(7);
    CU_ASSERT_FATAL(sh_pages_create(N, &p) == SH_OK);
    for (int i = 0; i < 20000; i++) {
        if (rand() % 2) {
            int32_t page = sh_pages_take(&p, false);
            CU_ASSERT_EQUAL(page < 0, count == N);
            if (page < 0) continue;
            CU_ASSERT_FATAL(page < N && !held[page]);
            held[page] = true;
            count++;
        } else {
            int32_t page = rand() % N;
            CU_ASSERT_EQUAL(sh_pages_give(&p, page), held[page] ? SH_OK : SH_ESTATE);
            count -= held[page];
            held[page] = false;
        }
        CU_ASSERT_EQUAL(p.free, N - count);
    }
    sh_pages_release(&p);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("pages", NULL, NULL);
    CU_add_test(s, "an empty pool gives nothing", test_empty);
    CU_add_test(s, "wrong gives are errors", test_wrong_gives);
    CU_add_test(s, "promised pages are set aside", test_promises);
    CU_add_test(s, "random takes and gives", test_random);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed || CU_get_error() ? 1 : 0;
}
