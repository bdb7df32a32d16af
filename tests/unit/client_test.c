/* proto/client against a server in the same process: time-outs, refusals, what a submit sends and how it goes on. */
#include <CUnit/Basic.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "common/clock.h"
#include "common/file.h"
#include "common/limits.h"
#include "proto/client.h"

static char dir[64], endpoint[128];

/* A server that keeps a job in memory: what it was sent, as "number:length:first bytes;". */
typedef struct server {
    sh_wire *wire;
    pthread_t thread;
    atomic_bool stop;
    sh_buf log;
    uint64_t accepted, chain;
    int closes;
    const char *refuse; /* text of an error for lines */
    bool crossed;       /* somebody else's line comes in before the first one */
    bool garbage;       /* answers with bytes that are no message */
} server;

static void take_lines(server *s, const Shoal__Submit *q) {
    if (s->crossed && q->n_line) {
        s->chain = sh_line_chain(s->chain, 1, "else", 4);
        s->crossed = false;
    }
    for (size_t i = 0; i < q->n_line; i++) {
        const Shoal__Line *l = q->line[i];
        s->chain = sh_line_chain(s->chain, l->number, l->text.data, l->text.len);
        s->accepted++;
        SH_IGNORE(sh_buf_printf(&s->log, "%d:%zu:%.*s;", (int)l->number, l->text.len,
                                l->text.len > 8 ? 8 : (int)l->text.len, (const char *)l->text.data));
    }
    s->closes += q->has_close && q->close;
}

static void answer(server *s, const sh_wire_peer *to, const Shoal__JobRequest *q) {
    Shoal__JobReply r = SHOAL__JOB_REPLY__INIT;
    uint8_t buf[1000];
    if (q->submit && s->refuse && q->submit->n_line)
        r.error = (char *)(uintptr_t)s->refuse;
    else if (q->submit)
        take_lines(s, q->submit);
    r.has_job = r.has_accepted = r.has_chain = true;
    r.job = 5, r.accepted = s->accepted, r.chain = s->chain;
    size_t n = shoal__job_reply__pack(&r, buf);
    if (s->garbage) n = 3, memcpy(buf, "\xff\xff\xff", 3);
    SH_IGNORE(sh_wire_send(s->wire, to, SH_WIRE_JOB, buf, n));
}

static void *serve(void *arg) {
    server *s = arg;
    sh_buf b;
    sh_buf_init(&b, 0);
    while (!atomic_load(&s->stop)) {
        bool got = false, readable;
        sh_wire_peer from;
        char kind;
        SH_IGNORE(sh_wire_poll(s->wire, -1, 20, &readable));
        while (sh_wire_recv(s->wire, &from, &kind, &b, &got) == SH_OK && got) {
            Shoal__JobRequest *q = shoal__job_request__unpack(NULL, b.len, b.data);
            if (q) answer(s, &from, q);
            if (q) shoal__job_request__free_unpacked(q, NULL);
        }
    }
    sh_buf_release(&b);
    return NULL;
}

static void start(server *s) {
    sh_buf_init(&s->log, 0);
    CU_ASSERT_EQUAL_FATAL(sh_wire_listen(endpoint, NULL, &s->wire), SH_OK);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&s->thread, NULL, serve, s), 0);
}

static void stop(server *s) {
    atomic_store(&s->stop, true);
    pthread_join(s->thread, NULL);
    sh_wire_close(&s->wire);
    sh_buf_release(&s->log);
}

static sh_status submit(const char *text, size_t n, uint64_t *job) {
    sh_client *c = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_client_open(endpoint, NULL, 5000, &c), SH_OK);
    FILE *f = tmpfile();
    CU_ASSERT_PTR_NOT_NULL_FATAL(f);
    CU_ASSERT_EQUAL(fwrite(text, 1, n, f), n);
    rewind(f);
    sh_status st = sh_client_submit(c, "name", NULL, f, job);
    fclose(f);
    sh_client_close(&c);
    return st;
}

static void test_absent(void) {
    sh_client *c = NULL;
    Shoal__JobRequest q = SHOAL__JOB_REQUEST__INIT;
    Shoal__JobReply *r = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_client_open(endpoint, NULL, 300, &c), SH_OK);
    double t = sh_now();
    CU_ASSERT_EQUAL(sh_client_call(c, &q, &r), SH_EPEER);
    t = sh_now() - t;
    CU_ASSERT(t >= 0.29 && t < 3);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), endpoint));
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "no answer within 0.3 s"));
    CU_ASSERT_PTR_NULL(r);
    sh_client_close(&c);
    CU_ASSERT_PTR_NULL(c);
    CU_ASSERT_EQUAL(sh_client_open("http://x", NULL, 300, &c), SH_EINPUT);
}

static void test_lines(void) {
    server s = {0};
    start(&s);
    uint64_t job = 0;
    static const char text[] = "one\n\n \t\r\ntwo\r\nthree";
    CU_ASSERT_EQUAL(submit(text, sizeof text - 1, &job), SH_OK);
    CU_ASSERT_EQUAL(job, 5);
    CU_ASSERT_STRING_EQUAL((char *)s.log.data, "1:3:one;4:3:two;5:5:three;");
    CU_ASSERT_EQUAL(s.closes, 1);
    sh_buf_clear(&s.log);
    static const char longer[] = "one\n\n \t\r\ntwo\r\nthree\nfour\n"; /* goes on behind what is there */
    CU_ASSERT_EQUAL(submit(longer, sizeof longer - 1, &job), SH_OK);
    CU_ASSERT_STRING_EQUAL((char *)s.log.data, "6:4:four;");
    sh_buf_clear(&s.log);
    static const char *const others[] = {"One\n\n \t\r\ntwo\r\nthree\nfour\n", "one\ntwo\nthree\nfour\n",
                                         "one\n\n\ntwo\nthree\n", ""};
    for (size_t i = 0; i < 4; i++) {
        CU_ASSERT_EQUAL(submit(others[i], strlen(others[i]), &job), SH_EINPUT);
        CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "job name began with another file"));
    }
    CU_ASSERT_EQUAL(s.log.len, 0);
    stop(&s);
}

/* Two files under one name at the same time: whoever does not find its own lines there says so, and closes nothing. */
static void test_crossed(void) {
    server s = {.crossed = true};
    start(&s);
    uint64_t job = 0;
    CU_ASSERT_EQUAL(submit("one\ntwo\n", 8, &job), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "lines of another file"));
    CU_ASSERT_EQUAL(s.closes, 0);
    stop(&s);
}

static void test_many_and_long(void) {
    server s = {0};
    start(&s);
    sh_buf text;
    sh_buf_init(&text, 0);
    for (int i = 0; i < 3000; i++) SH_IGNORE(sh_buf_printf(&text, "{\"line\": %d}\n", i));
    size_t n = SH_MAX_LINE_BYTES + 5000;
    char *fill = malloc(n);
    memset(fill, 'x', n);
    SH_IGNORE(sh_buf_add(&text, fill, n));
    SH_IGNORE(sh_buf_add_str(&text, "\nlast\n"));
    free(fill);
    uint64_t job = 0;
    CU_ASSERT_EQUAL(submit((const char *)text.data, text.len, &job), SH_OK);
    CU_ASSERT_EQUAL(s.accepted, 3002);
    char want[100];
    snprintf(want, sizeof want, "3001:%zu:xxxxxxxx;3002:4:last;", SH_MAX_LINE_BYTES + 1);
    CU_ASSERT_PTR_NOT_NULL(s.log.data && strstr((char *)s.log.data, want));
    sh_buf_release(&text);
    stop(&s);
}

static void test_refused(void) {
    server s = {.refuse = "no room here"};
    start(&s);
    uint64_t job = 77;
    CU_ASSERT_EQUAL(submit("a\n", 2, &job), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "no room here");
    CU_ASSERT_EQUAL(job, 77);
    CU_ASSERT_EQUAL(s.closes, 0);
    stop(&s);
    server g = {.garbage = true};
    start(&g);
    CU_ASSERT_EQUAL(submit("a\n", 2, &job), SH_EPEER);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "cannot be read"));
    stop(&g);
}

int main(void) {
    snprintf(dir, sizeof dir, "/tmp/shoal-client-XXXXXX");
    if (!mkdtemp(dir) || CU_initialize_registry() != CUE_SUCCESS) return 1;
    snprintf(endpoint, sizeof endpoint, "ipc://%s/s", dir);
    CU_pSuite s = CU_add_suite("client", NULL, NULL);
    CU_add_test(s, "nobody there", test_absent);
    CU_add_test(s, "lines, blanks, going on, another file", test_lines);
    CU_add_test(s, "many lines, a long one", test_many_and_long);
    CU_add_test(s, "two files under one name", test_crossed);
    CU_add_test(s, "refusals and nonsense", test_refused);
    CU_basic_set_mode(CU_BRM_NORMAL);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    SH_IGNORE(sh_path_remove(dir));
    return failed != 0;
}
