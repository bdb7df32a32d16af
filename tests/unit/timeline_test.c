/* A timeline as it is filled and emptied: the window, whole steps, joined and dropped slices; the messages made of it;
 * the file made of them, and of what no rank would send. */
#include <CUnit/Basic.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "cli/tracefile.h"
#include "common/file.h"
#include "common/timeline.h"
#include "worker/trace.h"

/* A step of `causes` slices of 10 µs, one after the other, from `at` on. */
static double step(sh_timeline *t, uint64_t number, int causes, double at) {
    sh_slice_work w = {.step = number, .rows = 3, .decode = 1, .prompt = 2};
    double from = at;
    sh_timeline_begin(t, number);
    for (int i = 0; i < causes; i++, at += 10e-6)
        sh_timeline_note(t, i % 2 ? SH_SLICE_WEIGHTS : SH_SLICE_OTHER, at, at + 10e-6);
    sh_timeline_end(t, from, at, &w);
    return at;
}

static void test_window(void) {
    sh_timeline *t = NULL;
    sh_slice s[64];
    CU_ASSERT_EQUAL_FATAL(sh_timeline_create(64, 2, 2, &t), SH_OK);
    double at = 5;
    for (uint64_t i = 0; i < 6; i++) {
        sh_timeline_note(t, SH_SLICE_IDLE, at, at + 1); /* before the step: in the window where the last step was */
        at = step(t, i, 1, at + 1);
    }
    size_t n = sh_timeline_take(t, s, 64);
    CU_ASSERT_EQUAL_FATAL(n, 6);
    CU_ASSERT(s[0].kind == SH_SLICE_OTHER && s[1].kind == SH_SLICE_STEP && s[1].work.step == 2);
    CU_ASSERT(s[2].kind == SH_SLICE_IDLE && s[4].kind == SH_SLICE_STEP && s[4].work.step == 3);
    CU_ASSERT(s[5].kind == SH_SLICE_IDLE); /* until step 4 begins, which is not recorded */
    CU_ASSERT_EQUAL(sh_timeline_dropped(t), 0);
    sh_timeline_destroy(&t);
    CU_ASSERT_EQUAL_FATAL(sh_timeline_create(8, UINT64_MAX, UINT64_MAX, &t), SH_OK); /* no overflow */
    step(t, 0, 1, 1);
    CU_ASSERT_EQUAL(sh_timeline_waiting(t), 0);
    sh_timeline_destroy(&t);
}

static void test_joined(void) {
    sh_timeline *t = NULL;
    sh_slice s[16];
    sh_slice_work w = {0};
    CU_ASSERT_EQUAL_FATAL(sh_timeline_create(16, 0, 1, &t), SH_OK);
    sh_timeline_begin(t, 0);
    sh_timeline_note(t, SH_SLICE_OTHER, 1.0, 1.5);
    sh_timeline_note(t, SH_SLICE_OTHER, 1.5, 2.0);
    sh_timeline_note(t, SH_SLICE_WEIGHTS, 2.0, 2.0 + 0.2e-6); /* too short */
    sh_timeline_note(t, SH_SLICE_OTHER, 2.5, 3.0);            /* apart */
    CU_ASSERT_EQUAL(sh_timeline_waiting(t), 0);               /* the step is not over */
    sh_timeline_end(t, 1, 3, &w);
    CU_ASSERT_EQUAL_FATAL(sh_timeline_take(t, s, 16), 3);
    CU_ASSERT(s[0].from == 1.0 && s[0].to == 2.0 && s[1].from == 2.5 && s[2].kind == SH_SLICE_STEP);
    /* off, and without any */
    sh_timeline_begin(t, 1);
    sh_timeline_note(t, SH_SLICE_OTHER, 4, 5);
    sh_timeline_end(t, 4, 5, &w);
    CU_ASSERT_EQUAL(sh_timeline_waiting(t), 0);
    sh_timeline_destroy(&t);
    sh_timeline_begin(NULL, 0);
    sh_timeline_note(NULL, SH_SLICE_OTHER, 4, 5);
    sh_timeline_end(NULL, 4, 5, &w);
    sh_timeline_queue(NULL, 4, &w);
    CU_ASSERT(!sh_timeline_is_on(NULL) && sh_timeline_waiting(NULL) == 0 && sh_timeline_dropped(NULL) == 0);
}

static void test_dropped(void) {
    sh_timeline *t = NULL;
    sh_slice s[8];
    CU_ASSERT_EQUAL_FATAL(sh_timeline_create(8, 0, 100, &t), SH_OK);
    double at = step(t, 0, 5, 1); /* 6 slices */
    at = step(t, 1, 5, at);       /* 2 find room, the step's own does not */
    CU_ASSERT_EQUAL(sh_timeline_dropped(t), 4);
    CU_ASSERT_EQUAL(sh_timeline_take(t, s, 8), 8);
    at = step(t, 2, 5, at);
    CU_ASSERT_EQUAL(sh_timeline_take(t, s, 4), 4);
    CU_ASSERT_EQUAL(sh_timeline_waiting(t), 2);
    step(t, 3, 5, at);
    CU_ASSERT_EQUAL(sh_timeline_take(t, s, 8), 8);
    CU_ASSERT(s[1].kind == SH_SLICE_STEP && s[1].work.step == 2 && s[7].kind == SH_SLICE_STEP && s[7].work.step == 3);
    CU_ASSERT_EQUAL(sh_timeline_dropped(t), 4);
    sh_timeline_destroy(&t);
}

enum { STEPS = 20000 };

static void *fill(void *arg) {
    double at = 1;
    for (uint64_t i = 0; i < STEPS; i++) at = step(arg, i, 4, at);
    return NULL;
}

/* Two threads: what was taken is in order and nothing is lost but what was counted. */
static void test_threads(void) {
    sh_timeline *t = NULL;
    sh_slice s[32];
    pthread_t thread;
    uint64_t taken = 0;
    double last = 0;
    bool ordered = true, over = false;
    CU_ASSERT_EQUAL_FATAL(sh_timeline_create(128, 0, STEPS, &t), SH_OK);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&thread, NULL, fill, t), 0);
    while (!over || sh_timeline_waiting(t) > 0) {
        size_t n = sh_timeline_take(t, s, 32);
        for (size_t i = 0; i < n; i++) {
            ordered = ordered && s[i].to >= last;
            last = s[i].to;
        }
        taken += n;
        if (!over && n == 0) over = pthread_tryjoin_np(thread, NULL) == 0;
    }
    CU_ASSERT(ordered);
    CU_ASSERT_EQUAL(taken + sh_timeline_dropped(t), (uint64_t)STEPS * 5);
    sh_timeline_destroy(&t);
}

static void test_message(void) {
    sh_timeline *t = NULL;
    sh_trace *x = NULL;
    const sh_rank_clock clock = {.offset = 1700000000000000000, .error = 1500};
    CU_ASSERT_EQUAL_FATAL(sh_timeline_create(64, 0, 9, &t), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_trace_create(t, clock, &x), SH_OK);
    CU_ASSERT_PTR_NULL(sh_trace_next(x));
    step(t, 7, 2, 3.0);
    sh_timeline_queue(t, 4.0, &(sh_slice_work){.rows = 2, .decode = 5, .prompt = 6});
    Shoal__Trace *m = sh_trace_next(x);
    CU_ASSERT_PTR_NOT_NULL_FATAL(m);
    CU_ASSERT(m->n_kind == 4 && m->n_start == 4 && m->n_length == 4 && m->n_work == 2);
    CU_ASSERT(m->origin == 1700000003000000000 && m->start[0] == 0 && m->length[0] == 10000);
    CU_ASSERT(m->start[1] == 10000 && m->start[2] == -10000 && m->length[2] == 20000 && m->kind[2] == SH_SLICE_STEP);
    CU_ASSERT(m->kind[3] == SH_SLICE_QUEUE && m->start[3] == 1000000000 && m->length[3] == 0);
    CU_ASSERT(m->work[0]->step == 7 && m->work[0]->rows == 3 && m->work[1]->decode == 5);
    CU_ASSERT(m->dropped == 0 && m->clock_error == 1500);
    CU_ASSERT_PTR_NULL(sh_trace_next(x));
    step(t, 8, 1, 5.0);
    CU_ASSERT_PTR_NOT_NULL(sh_trace_next(x));
    sh_trace_lost(x);
    step(t, 8, 1, 6.0);
    m = sh_trace_next(x);
    CU_ASSERT(m && m->dropped == 2);
    sh_trace_destroy(&x);
    sh_timeline_destroy(&t);
}

/* The text of the file of one record; NULL: it was not taken. */
static char *file_of(Shoal__TraceRecord *r, sh_tracefile_count *n) {
    char path[] = "timeline_test.XXXXXX", *text = NULL;
    size_t len = 0;
    sh_tracefile *f = NULL;
    int fd = mkstemp(path);
    CU_ASSERT_FATAL(fd >= 0);
    close(fd);
    CU_ASSERT_EQUAL_FATAL(sh_tracefile_open(path, 1000, &f), SH_OK);
    sh_status st = sh_tracefile_add(f, r);
    CU_ASSERT_EQUAL(sh_tracefile_close(&f, n), SH_OK);
    CU_ASSERT_EQUAL(sh_file_read(path, 1 << 20, &text, &len), SH_OK);
    unlink(path);
    if (st == SH_OK) return text;
    CU_ASSERT_EQUAL(st, SH_EFORMAT);
    free(text);
    return NULL;
}

static void test_file(void) {
    int32_t kind[] = {SH_SLICE_WEIGHTS, SH_SLICE_STEP};
    int64_t start[] = {0, -500}, length[] = {1000, 2001};
    Shoal__TraceWork work = SHOAL__TRACE_WORK__INIT, *works[] = {&work};
    Shoal__Trace m = SHOAL__TRACE__INIT;
    Shoal__TraceRecord r = SHOAL__TRACE_RECORD__INIT;
    sh_tracefile_count n;
    work.step = 17;
    work.rows = work.prompt = 4;
    m.origin = 2500;
    m.n_kind = m.n_start = m.n_length = 2;
    m.kind = kind, m.start = start, m.length = length;
    m.n_work = 1, m.work = works;
    m.has_dropped = true, m.dropped = 3;
    r.group = (char *)"a \"quoted\" group", r.host = (char *)"h\xff", r.rank = 5, r.stage = 2, r.member = 1,
    r.width = 2;
    r.trace = &m;
    char *text = file_of(&r, &n);
    CU_ASSERT_PTR_NOT_NULL_FATAL(text);
    CU_ASSERT(n.steps == 1 && n.slices == 2 && n.dropped == 3 && n.groups == 1 && n.ranks == 1);
    CU_ASSERT_PTR_NOT_NULL(strstr(text, "group a \\\"quoted\\\" group"));
    char *outer =
        strstr(text, "\"tid\":5,\"name\":\"step 17\",\"ts\":1.000,\"dur\":2.001,\"args\":{\"step\":17,\"rows\":4,");
    CU_ASSERT_PTR_NOT_NULL_FATAL(outer);
    CU_ASSERT_PTR_NOT_NULL(
        strstr(outer, "\"name\":\"weights\",\"ts\":1.500,\"dur\":1.000}")); /* behind what holds it */
    free(text);
    kind[0] = SH_SLICE_KINDS;
    CU_ASSERT_PTR_NULL(file_of(&r, &n));
    kind[0] = SH_SLICE_STEP; /* one work is missing */
    CU_ASSERT_PTR_NULL(file_of(&r, &n));
    kind[0] = SH_SLICE_WEIGHTS;
    length[0] = -1;
    CU_ASSERT_PTR_NULL(file_of(&r, &n));
    length[0] = 1;
    m.n_length = 1;
    CU_ASSERT_PTR_NULL(file_of(&r, &n));
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("timeline", NULL, NULL);
    CU_add_test(s, "window", test_window);
    CU_add_test(s, "joined", test_joined);
    CU_add_test(s, "dropped", test_dropped);
    CU_add_test(s, "threads", test_threads);
    CU_add_test(s, "message", test_message);
    CU_add_test(s, "file", test_file);
    CU_basic_set_mode(CU_BRM_NORMAL);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
