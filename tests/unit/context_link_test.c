/* Messages between members: in order, whole, from several; and what is not as it should be is refused in words. */
#include <CUnit/Basic.h>
#include <string.h>
#include "worker/context.h"

static sh_link *link[3];
static sh_context *context[3];

static void open_all(void) {
    CU_ASSERT_FATAL(sh_link_local_create(3, link) == SH_OK);
    for (int m = 0; m < 3; m++) CU_ASSERT_FATAL(sh_context_create(link[m], 0, 3, 1000, &context[m]) == SH_OK);
}

static void close_all(void) {
    for (int m = 0; m < 3; m++) {
        sh_context_destroy(&context[m]);
        sh_context_destroy(&context[m]);
        sh_link_destroy(&link[m]);
    }
}

static sh_status send(int from, int to, int value, size_t n) {
    const sh_context_peers *p = sh_context_table(context[from]);
    void *room = NULL;
    SH_TRY(p->room(p->ctx, to, n, &room));
    memset(room, value, n);
    return p->send(p->ctx, to);
}

/* The next message is n bytes of this value. */
static bool comes(int to, int from, int value, size_t n) {
    const sh_context_peers *p = sh_context_table(context[to]);
    const void *data = NULL;
    if (p->take(p->ctx, from, n, &data) != SH_OK) return false;
    for (size_t i = 0; i < n; i++)
        if (((const uint8_t *)data)[i] != value) return false;
    return ((uintptr_t)data & 63) == 0;
}

static void in_order(void) {
    open_all();
    CU_ASSERT_EQUAL(sh_context_table(context[2])->member, 2);
    CU_ASSERT_EQUAL(sh_context_table(context[2])->members, 3);
    for (int i = 0; i < 10; i++) { /* two at a time: as many as there are buffers */
        CU_ASSERT(send(0, 1, 2 * i, 1000) == SH_OK && send(0, 1, 2 * i + 1, 1) == SH_OK);
        CU_ASSERT(send(2, 1, 100 + i, 64) == SH_OK);
        CU_ASSERT_FALSE(sh_context_is_idle(context[0]));
        CU_ASSERT(comes(1, 2, 100 + i, 64) && comes(1, 0, 2 * i, 1000) && comes(1, 0, 2 * i + 1, 1));
    }
    for (int m = 0; m < 3; m++) {
        CU_ASSERT_EQUAL(sh_context_progress(context[m]), SH_OK);
        CU_ASSERT_TRUE(sh_context_is_idle(context[m]));
    }
    CU_ASSERT_EQUAL(link[0]->sent_by_tag[SH_TAG_CONTEXT], 10 * (1000 + 1 + 2 * 64));
    close_all();
}

static void refused(void) {
    void *room = NULL;
    const void *data = NULL;
    open_all();
    const sh_context_peers *p = sh_context_table(context[0]), *q = sh_context_table(context[1]);
    CU_ASSERT_EQUAL(p->room(p->ctx, 1, 1025, &room), SH_ESTATE); /* 1000, rounded up to a multiple of 64 */
    CU_ASSERT_EQUAL(p->room(p->ctx, 0, 8, &room), SH_ESTATE);
    CU_ASSERT_EQUAL(p->room(p->ctx, 3, 8, &room), SH_ESTATE);
    CU_ASSERT_EQUAL(p->take(p->ctx, 1, 5000, &data), SH_ESTATE);
    CU_ASSERT_PTR_NULL(room);
    CU_ASSERT_PTR_NULL(data);
    CU_ASSERT_EQUAL(send(0, 1, 7, 100), SH_OK);
    CU_ASSERT_EQUAL(q->take(q->ctx, 0, 101, &data), SH_EPEER);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "message 0 of rank 0 has 164 bytes: 165 were expected");
    close_all();
}

/* A message with a head of anybody's making; `field` is wrong, −1: none. */
static sh_status forged(int field) {
    struct {
        uint32_t magic;
        int32_t from;
        uint64_t number, bytes;
        uint8_t rest[64 - 24 + 8];
    } m = {.magic = 0x31585443u, .bytes = 8};
    int req = 0;
    const void *data = NULL;
    if (field == 0) m.magic++;
    if (field == 1) m.from = 2;
    if (field == 2) m.number = 1;
    if (field == 3) m.bytes = 9;
    open_all();
    const sh_context_peers *q = sh_context_table(context[1]);
    sh_status st = link[0]->ops->send(link[0], 1, SH_TAG_CONTEXT, &m, 72, &req);
    if (st == SH_OK) st = q->take(q->ctx, 0, 8, &data);
    close_all();
    return st;
}

static void heads(void) {
    CU_ASSERT_EQUAL(forged(-1), SH_OK);
    for (int field = 0; field < 4; field++) CU_ASSERT_EQUAL(forged(field), SH_EPEER);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("context link", NULL, NULL);
    CU_add_test(s, "in order", in_order);
    CU_add_test(s, "refused", refused);
    CU_add_test(s, "heads are checked", heads);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
