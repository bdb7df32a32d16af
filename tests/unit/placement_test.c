/* Placing experts by counts: every expert is held, nobody holds too much, copies are made only where they help, and the
 * loads are what the header says. And the file of counts: written, read, refused. */
#include <CUnit/Basic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "common/hash.h"
#include "partition/placement.h"
#include "partition/plan.h"

enum { MOST = 200 };

static uint64_t counts[MOST];
static bool held[16 * MOST];

static int holders(int members, int experts, int e) {
    int n = 0;
    for (int m = 0; m < members; m++) n += held[m * experts + e];
    return n;
}

static int holds(int experts, int m) {
    int n = 0;
    for (int e = 0; e < experts; e++) n += held[m * experts + e];
    return n;
}

static void test_even(void) {
    memset(counts, 0, sizeof counts);
    CU_ASSERT_EQUAL_FATAL(sh_placement_make(counts, 24, 5, 3, held), SH_OK);
    for (int e = 0; e < 24; e++) CU_ASSERT_EQUAL(holders(5, 24, e), 1);
    for (int m = 0; m < 5; m++) CU_ASSERT(holds(24, m) >= 4 && holds(24, m) <= 5);
    CU_ASSERT_EQUAL(sh_placement_balance(counts, 24, 5, held), 1);
}

/* Known by hand: 4 experts with 6, 3, 2, 1 rows on 2 members. */
static void test_small(void) {
    memcpy(counts, (uint64_t[]){1, 6, 2, 3}, 4 * sizeof *counts);
    CU_ASSERT_EQUAL_FATAL(sh_placement_make(counts, 4, 2, 0, held), SH_OK);
    CU_ASSERT_EQUAL(sh_placement_balance(counts, 4, 2, held), 7.0 / 6); /* 6 + 1 | 3 + 2: two each */
    CU_ASSERT_EQUAL_FATAL(sh_placement_make(counts, 4, 2, 1, held), SH_OK);
    CU_ASSERT_EQUAL(sh_placement_balance(counts, 4, 2, held), 1);     /* 6 | 3 + 2 + 1 */
    for (int e = 0; e < 4; e++) CU_ASSERT_EQUAL(holders(2, 4, e), 1); /* no copy is needed for it */
    memcpy(counts, (uint64_t[]){12, 0, 0, 0}, 4 * sizeof *counts);
    CU_ASSERT_EQUAL_FATAL(sh_placement_make(counts, 4, 2, 1, held), SH_OK);
    CU_ASSERT_EQUAL(holders(2, 4, 0), 2);
    CU_ASSERT_EQUAL(sh_placement_balance(counts, 4, 2, held), 1);
}

static void test_random(void) {
    uint64_t seed = 1;
    for (int round = 0; round < 400; round++) {
        int members = 1 + (int)(sh_mix64(++seed) % 16), experts = members + (int)(sh_mix64(++seed) % (MOST - 16));
        int extra = (int)(sh_mix64(++seed) % 6), share = (experts + members - 1) / members;
        for (int e = 0; e < experts; e++) {
            uint64_t r = sh_mix64(++seed);
            counts[e] = round % 3 == 0 ? r % 10 : (r % 1000) * (r % 7 == 0 ? 50 : 1);
        }
        CU_ASSERT_EQUAL_FATAL(sh_placement_make(counts, experts, members, 0, held), SH_OK);
        double once = sh_placement_balance(counts, experts, members, held);
        for (int e = 0; e < experts; e++) CU_ASSERT_EQUAL(holders(members, experts, e), 1);
        CU_ASSERT_EQUAL_FATAL(sh_placement_make(counts, experts, members, extra, held), SH_OK);
        for (int e = 0; e < experts; e++) CU_ASSERT(holders(members, experts, e) >= 1);
        for (int m = 0; m < members; m++) CU_ASSERT(holds(experts, m) <= share + extra);
        double with = sh_placement_balance(counts, experts, members, held);
        CU_ASSERT(with >= 1 - 1e-9 && (extra == 0 || once <= 1.02 || with <= once + 1e-9));
    }
}

/* One expert takes half of all rows, the others share the rest. */
static void test_hot(void) {
    for (int members = 2; members <= 16; members *= 2) {
        for (int e = 0; e < 128; e++) counts[e] = e == 77 ? 127000 : 1000;
        CU_ASSERT_EQUAL_FATAL(sh_placement_make(counts, 128, members, 0, held), SH_OK);
        CU_ASSERT(sh_placement_balance(counts, 128, members, held) >= members / 2.0);
        CU_ASSERT_EQUAL_FATAL(sh_placement_make(counts, 128, members, 4, held), SH_OK);
        CU_ASSERT(sh_placement_balance(counts, 128, members, held) <= 1.25);
    }
}

static void test_refused(void) {
    CU_ASSERT_EQUAL(sh_placement_make(counts, 4, 5, 0, held), SH_EINPUT);
    CU_ASSERT_EQUAL(sh_placement_make(counts, 4, 0, 0, held), SH_EINPUT);
}

/* --- files and plans -----------------------------------------------------------------------------------------------
 */

static sh_config c;
static char path[4200];

static void write_text(const char *text) {
    FILE *f = fopen(path, "w");
    CU_ASSERT_PTR_NOT_NULL_FATAL(f);
    fputs(text, f);
    fclose(f);
}

static void refuse(const char *text, const char *why) {
    sh_routing *r = NULL;
    write_text(text);
    CU_ASSERT_NOT_EQUAL(sh_routing_load(path, &c, &r), SH_OK);
    CU_ASSERT_PTR_NULL(r);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), why));
    if (!strstr(sh_error_text(), why)) printf("\n%s\n", sh_error_text());
}

static void test_file(void) {
    sh_routing *r = NULL, *back = NULL, *packed = NULL;
    sh_buf text;
    sh_buf_init(&text, 0);
    CU_ASSERT_EQUAL_FATAL(sh_routing_create(&c, &r), SH_OK);
    for (int i = 0; i < c.n_layers * c.experts; i++) r->chosen[i] = i < c.experts ? 0 : sh_mix64((uint64_t)i) % 100000;
    CU_ASSERT_EQUAL_FATAL(sh_routing_print(r, &text), SH_OK);
    write_text((const char *)text.data);
    CU_ASSERT_EQUAL_FATAL(sh_routing_load(path, &c, &back), SH_OK);
    size_t bytes = (size_t)(c.n_layers * c.experts) * sizeof *r->chosen;
    CU_ASSERT(memcmp(r->chosen, back->chosen, bytes) == 0);
    sh_buf_clear(&text);
    CU_ASSERT_EQUAL_FATAL(sh_routing_pack(r, &text), SH_OK);
    Shoal__Routing *m = shoal__routing__unpack(NULL, text.len, text.data);
    CU_ASSERT_PTR_NOT_NULL_FATAL(m);
    CU_ASSERT_EQUAL(m->n_layer, (size_t)c.n_layers - 1); /* a layer of zeros need not be told */
    CU_ASSERT_EQUAL_FATAL(sh_routing_create(&c, &packed), SH_OK);
    CU_ASSERT_EQUAL(sh_routing_add(packed, m), SH_OK);
    CU_ASSERT(memcmp(r->chosen, packed->chosen, bytes) == 0);
    m->layer[0]->layer = c.n_layers;
    CU_ASSERT_EQUAL(sh_routing_add(packed, m), SH_EFORMAT);
    CU_ASSERT(memcmp(r->chosen, packed->chosen, bytes) == 0);
    shoal__routing__free_unpacked(m, NULL);
    sh_routing_destroy(&packed);
    sh_routing_destroy(&back);
    sh_routing_destroy(&r);
    sh_buf_release(&text);
}

static void test_bad_files(void) {
    refuse("{}", "layers: is missing");
    refuse("{\"layers\": {\"99\": []}}", "layers.99: not a layer with experts");
    refuse("{\"layers\": {\"x\": []}}", "layers.x: not a layer");
    refuse("{\"layers\": {\"0\": [1, 2]}}", "layers.0: 2 counts: the model has 16 experts");
    refuse("{\"layers\": {\"0\": [1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,-1]}}", "layers.0[15]: not a count");
    refuse("{\"layers\": {\"0\": [1.5,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]}}", "layers.0[0]: not a count");
    refuse("[", path);
}

/* Plans by counts: within the memory allowed, and better. */
static void test_plan(void) {
    sh_routing *r = NULL;
    sh_buf text;
    sh_buf_init(&text, 0);
    CU_ASSERT_EQUAL_FATAL(sh_routing_create(&c, &r), SH_OK);
    for (int i = 0; i < c.n_layers * c.experts; i++) r->chosen[i] = i % c.experts == 5 ? 50000 : 1000;
    for (int copies = 0; copies <= 24; copies += 6) {
        Shoal__Plan *p = NULL;
        sh_plan_request q = {.pp = 2,
                             .ep = 5,
                             .mode = SH_MODE_BF16,
                             .routing = r,
                             .replicate = (uint64_t)copies * sh_expert_bytes(&c, SH_MODE_BF16)};
        CU_ASSERT_EQUAL_FATAL(sh_plan_make(&c, &q, &p), SH_OK);
        for (int rank = 0; rank < 10; rank++) {
            uint64_t weights = sh_plan_rank_memory(&c, p, rank, 0).weights, n = 0;
            for (size_t i = 0; i < p->rank[rank]->n_experts; i++) n += p->rank[rank]->experts[i]->n_expert;
            uint64_t layers = (uint64_t)(p->rank[rank]->last - p->rank[rank]->first);
            CU_ASSERT(n <= layers * 4 + (uint64_t)copies); /* ⌈16/5⌉ each, and the copies */
            CU_ASSERT_EQUAL(sh_weights_estimate(&c, SH_MODE_BF16, p->rank[rank]->first, p->rank[rank]->last) - weights,
                            (layers * (uint64_t)c.experts - n) * sh_expert_bytes(&c, SH_MODE_BF16));
        }
        sh_buf_clear(&text);
        CU_ASSERT_EQUAL(sh_placement_print(&c, r, p, &text), SH_OK);
        double busiest = 0;
        const char *at = strstr((const char *)text.data, "busiest rank ");
        CU_ASSERT_PTR_NOT_NULL_FATAL(at);
        busiest = strtod(at + 13, NULL);
        CU_ASSERT(copies == 0 ? busiest > 3 : copies < 24 || busiest < 1.1);
        sh_plan_free(&p);
    }
    Shoal__Plan *p = NULL;
    CU_ASSERT_EQUAL(sh_plan_make(&c, &(sh_plan_request){.pp = 2, .routing = r}, &p), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "--routing: places experts on the ranks of a stage: give --ep too");
    CU_ASSERT_EQUAL(sh_plan_make(&c, &(sh_plan_request){.ep = 2, .replicate = 1000}, &p), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "--replicate: which experts are hot is not known: give --routing too");
    sh_buf_release(&text);
    sh_routing_destroy(&r);
}

int main(void) {
    const char *tmp = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/counts-%d.json", tmp ? tmp : "/tmp", (int)getpid());
    if (sh_config_load(SH_TEST_DATA "/text/models/26b-a4b-like", &c) != SH_OK) return 1;
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("placement", NULL, NULL);
    CU_add_test(s, "even", test_even);
    CU_add_test(s, "small", test_small);
    CU_add_test(s, "random", test_random);
    CU_add_test(s, "hot", test_hot);
    CU_add_test(s, "refused", test_refused);
    CU_add_test(s, "file", test_file);
    CU_add_test(s, "bad files", test_bad_files);
    CU_add_test(s, "plan", test_plan);
    CU_basic_run_tests();
    unsigned bad = CU_get_number_of_failures();
    CU_cleanup_registry();
    unlink(path);
    return bad ? 1 : 0;
}
