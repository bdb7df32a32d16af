/* The option parser: every kind of value, every way to write it, and the exact messages of what is refused. */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>
#include "cli/options.h"
#include "common/status.h"

static sh_shared_options shared;
static const char *text;
static bool flag;

static sh_status parse(int argc, char **argv, int *operands) {
    sh_option t[SH_OPTIONS_MAX];
    int n = sh_options_shared(&shared, t);
    t[n++] = (sh_option){"output", 'o', SH_OPTION_TEXT, &text, "FILE", "where to"};
    t[n++] = (sh_option){"wait", 'w', SH_OPTION_FLAG, &flag, NULL, "until the end"};
    return sh_options_parse(t, n, argc, argv, operands);
}

#define ARGS(...)                                                                                                      \
    char *argv[] = {(char[]){"run"}, __VA_ARGS__};                                                                     \
    int argc = (int)(sizeof argv / sizeof *argv), operands = 0
#define S(x)                                                                                                           \
    (char[]) {                                                                                                         \
        x                                                                                                              \
    }

static void test_ways_to_write(void) {
    ARGS(S("-n"), S("4"), S("--mode=exact"), S("in"), S("-oout"), S("--kv-mem"), S("1.5GiB"), S("-w"), S("--"),
         S("--mode"));
    CU_ASSERT_EQUAL_FATAL(parse(argc, argv, &operands), SH_OK);
    CU_ASSERT_EQUAL(shared.ranks, 4);
    CU_ASSERT_EQUAL(sh_options_mode(&shared), SH_MODE_EXACT);
    CU_ASSERT_EQUAL(sh_options_kv(&shared), SH_KV_F32); /* by mode */
    CU_ASSERT_EQUAL(shared.kv_memory, 1610612736u);
    CU_ASSERT_STRING_EQUAL(text, "out");
    CU_ASSERT_TRUE(flag);
    CU_ASSERT_EQUAL_FATAL(operands, 2);
    CU_ASSERT_STRING_EQUAL(argv[1], "in");
    CU_ASSERT_STRING_EQUAL(argv[2], "--mode");
}

static void test_defaults(void) {
    ARGS(S("-o"), S("x"));
    CU_ASSERT_EQUAL_FATAL(parse(argc, argv, &operands), SH_OK);
    CU_ASSERT_EQUAL(sh_options_mode(&shared), SH_MODE_BF16);
    CU_ASSERT_EQUAL(sh_options_kv(&shared), SH_KV_BF16);
    CU_ASSERT_EQUAL(shared.ranks, 0);
    CU_ASSERT_PTR_NULL(shared.cuts);
}

static void test_sizes(void) {
    static const struct {
        const char *text;
        uint64_t bytes;
    } good[] = {{"0", 0},         {"512", 512},         {"64KiB", 65536}, {"64K", 65536}, {"8GiB", 1ull << 33},
                {"2MB", 2000000}, {"1TiB", 1ull << 40}, {"0.5M", 524288}};
    static const char *const bad[] = {"", "-1", "8gib", "GiB", "1e3x", "99999999TiB", "1 GiB", "nan", "+1"};
    uint64_t v;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        CU_ASSERT_EQUAL(sh_options_size(good[i].text, &v), SH_OK);
        CU_ASSERT_EQUAL(v, good[i].bytes);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        v = 77;
        CU_ASSERT_EQUAL(sh_options_size(bad[i], &v), SH_EINPUT);
        CU_ASSERT_EQUAL(v, 77);
    }
}

static void test_refused(void) {
    static const struct {
        const char *option, *value, *message;
    } all[] = {
        {"--mode", "fp16", "--mode: 'fp16' is not provided: allowed are exact, bf16, q8, q4"},
        {"--kv", "q4", "--kv: 'q4' is not provided: allowed are f32, bf16, q8"},
        {"-n", "0", "-n: 0 is out of range: allowed are 1 to 4096"},
        {"-n", "two", "-n: 'two' is not a whole number: allowed are 1 to 4096"},
        {"--ranks", "99999999999999999999",
         "--ranks: '99999999999999999999' is not a whole number: allowed are 1 to 4096"},
        {"--seed", "-1", "--seed: '-1' is not a whole number: allowed are 0 to 18446744073709551615"},
        {"--cuts", "5,5",
         "--cuts: '5,5' is not a list of layers: allowed are increasing whole numbers from 1, such as 5,9"},
        {"--cuts", "5,",
         "--cuts: '5,' is not a list of layers: allowed are increasing whole numbers from 1, such as 5,9"},
        {"--cuts", "0",
         "--cuts: '0' is not a list of layers: allowed are increasing whole numbers from 1, such as 5,9"},
        {"--kv-memory", "much",
         "--kv-memory: 'much' is not a size: allowed are bytes with KiB, MiB, GiB, TiB, KB, MB, GB or TB, such as "
         "8GiB"},
        {"--replicas", "257", "--replicas: 257 is out of range: allowed are 1 to 256"},
        {"--replicas", "x", "--replicas: 'x' is not a whole number: allowed are 1 to 256"},
        {"--model", "", "--model: the value is empty: give MODEL"},
        {"--max-", "3", "--max-: can mean --max-context or --max-seqs: write it out"},
        {"--frobnicate", "3", "--frobnicate: no such option: --help lists them"},
        {"-x", "3", "-x: no such option: --help lists them"},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        char o[64], v[64];
        snprintf(o, sizeof o, "%s", all[i].option);
        snprintf(v, sizeof v, "%s", all[i].value);
        ARGS(o, v);
        CU_ASSERT_NOT_EQUAL(parse(argc, argv, &operands), SH_OK);
        CU_ASSERT_STRING_EQUAL(sh_error_text(), all[i].message);
    }
    ARGS(S("-n"));
    CU_ASSERT_EQUAL(parse(argc, argv, &operands), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "-n: the value is missing: give N");
    char *with_value[] = {(char[]){"run"}, S("--wait=yes")};
    CU_ASSERT_EQUAL(parse(2, with_value, &operands), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "--wait: takes no value: 'yes' was given");
}

static void test_one_is_none(void) {
    ARGS(S("--replicas"), S("1"));
    CU_ASSERT_EQUAL(parse(argc, argv, &operands), SH_OK);
}

static void ranks_of(int want, int argc, char **argv) {
    int operands;
    CU_ASSERT_EQUAL_FATAL(parse(argc, argv, &operands), SH_OK);
    CU_ASSERT_EQUAL(sh_options_ranks(&shared), want);
}
#define RANKS(want, ...)                                                                                               \
    do {                                                                                                               \
        char *list[] = {S("run"), __VA_ARGS__};                                                                        \
        ranks_of(want, (int)(sizeof list / sizeof *list), list);                                                       \
    } while (0)

/* Whether the numbers fit each other is the plan's to say: plan_test. */
static void test_ranks(void) {
    RANKS(0, S("--lenient"));
    RANKS(3, S("-n3"));
    RANKS(2, S("--pp=2"));
    RANKS(4, S("--cuts=2,4,6"));
    RANKS(8, S("--cuts=2,4,6"), S("--ep=2"));
    RANKS(4, S("--pp=2"), S("--tp=2"));
    RANKS(4, S("--pp=2"), S("--prefill=2"));
    RANKS(2, S("--prefill=1"));
    RANKS(3, S("-n3"), S("--prefill=1"));
    RANKS(4, S("--cp=4"));
    RANKS(6, S("-n6"), S("--ep=3"));
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("options", NULL, NULL);
    CU_add_test(s, "ways to write", test_ways_to_write);
    CU_add_test(s, "defaults", test_defaults);
    CU_add_test(s, "sizes", test_sizes);
    CU_add_test(s, "refused", test_refused);
    CU_add_test(s, "one is none", test_one_is_none);
    CU_add_test(s, "ranks", test_ranks);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned bad = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    return bad ? 1 : 0;
}
