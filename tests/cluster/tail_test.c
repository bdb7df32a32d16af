/*
 * The order in which a coordinator gives out the requests of a job, against a fake group that counts its steps: the
 * lines' own, until what waits is little against the longest; then longest first. So a long request at the end of a
 * file costs few steps more than the tokens take, whatever happens to groups and coordinator; jobs do not overtake each
 * other, and rows are the same.
 */
#include "serving.h"

enum {
    SHORT = 5,
    LONG = 60,
    COUNTS = 64, /* what the long one counts as: with its prompt of 3 tokens 61, and that is rounded */
    N = 100,     /* short lines; line N + 1 is long */
    PLACES = 4,
    ROOM = 8 /* requests that the group takes at once */
};

/* Lines [1, n] are short, the next one is long. */
static void make_file(sh_buf *b, int n) {
    make_lines(b, n, SHORT);
    add_line(b, n + 1, LONG);
}

/* Requests that wait when the rule lets the long one go first: twice its length on all places. */
static int left_then(void) {
    return (2 * PLACES * COUNTS - COUNTS) / (SHORT + 1) + 1;
}

static int place_of(const fake *f, uint64_t key) {
    for (int i = 0; i < f->works; i++)
        if (f->order[i] == key) return i;
    return -1;
}

/* The long one came when it was due, give or take a page; the others by age. */
static void check_order(const fake *f, int first, int n, uint64_t long_key) {
    int due = n + 1 - left_then(), place = place_of(f, long_key);
    if (place < due || place > due + ROOM) fprintf(stderr, "\nthe long one came as number %d, not %d\n", place, due);
    CU_ASSERT(place >= due && place <= due + ROOM);
    uint64_t before = 0;
    for (int i = first; i < f->works; i++) {
        if (f->order[i] == long_key) continue;
        CU_ASSERT(f->order[i] > before);
        before = f->order[i];
    }
}

static void run_out(const server *s, fake *f, uint64_t job) {
    CU_ASSERT_FATAL(wait_done(s, f, job, "done", 60));
}

/* A job whose lines are all there, and that says so now or never. */
static uint64_t submit_part(const server *s, const char *name, sh_buf *lines, bool close) {
    enum { MOST = 256 };
    static Shoal__Line line[MOST];
    Shoal__Line *list[MOST];
    size_t n = 0;
    char *text = (char *)lines->data;
    for (char *end; (size_t)(text - (char *)lines->data) < lines->len && n < MOST; text = end + 1) {
        end = memchr(text, '\n', lines->len - (size_t)(text - (char *)lines->data));
        shoal__line__init(&line[n]);
        line[n].number = n + 1;
        line[n].text = (ProtobufCBinaryData){(size_t)(end - text), (uint8_t *)text};
        list[n] = &line[n];
        n++;
    }
    Shoal__Submit q = SHOAL__SUBMIT__INIT;
    q.name = (char *)(uintptr_t)name;
    q.n_line = n, q.line = list;
    q.has_close = q.close = close;
    Shoal__JobRequest r = SHOAL__JOB_REQUEST__INIT;
    r.submit = &q;
    sh_client *c = NULL;
    Shoal__JobReply *reply = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_client_open(s->endpoint, NULL, 60000, &c), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_client_call(c, &r, &reply), SH_OK);
    uint64_t job = reply->job;
    shoal__job_reply__free_unpacked(reply, NULL);
    sh_client_close(&c);
    return job;
}

static void close_job(const server *s, uint64_t job) {
    Shoal__Submit q = SHOAL__SUBMIT__INIT;
    q.has_job = q.has_close = q.close = true;
    q.job = job;
    Shoal__JobRequest r = SHOAL__JOB_REQUEST__INIT;
    r.submit = &q;
    sh_client *c = NULL;
    Shoal__JobReply *reply = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_client_open(s->endpoint, NULL, 60000, &c), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_client_call(c, &r, &reply), SH_OK);
    shoal__job_reply__free_unpacked(reply, NULL);
    sh_client_close(&c);
}

static void check_rows(const server *s, uint64_t job) {
    json_t *rows = rows_of(s, job);
    CU_ASSERT_EQUAL(json_object_size(rows), N + 1);
    CU_ASSERT(json_equal(rows, expected));
    json_decref(rows);
}

/* Steps of the whole job. complete: it is known as a whole before the group comes. */
static int steps_of(const char *name, bool complete) {
    server s;
    fake f;
    sh_buf lines;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir(name)}, NULL));
    make_file(&lines, N);
    uint64_t job = submit_part(&s, "j", &lines, complete);
    fake_open(&f, s.endpoint, "g");
    f.strict = true;
    if (!complete) {
        for (double end = sh_now() + 60; f.works <= N && sh_now() < end;) fake_turn(&f);
        CU_ASSERT_EQUAL(f.works, N + 1);
        for (int i = 0; i <= N; i++) CU_ASSERT_EQUAL(f.order[i], (uint64_t)i + 1);
        close_job(&s, job);
    }
    run_out(&s, &f, job);
    if (complete) check_order(&f, 0, N, N + 1);
    if (!expected) expected = rows_of(&s, job);
    check_rows(&s, job);
    sh_buf_release(&lines);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_wire_close(&f.wire);
    return (int)f.step;
}

static void test_steps(void) {
    int tokens = N * SHORT + LONG, in_order = steps_of("in-order", false), longest = steps_of("longest", true);
    printf("(%d steps in the order of lines, %d longest first; %d tokens on %d places) ", in_order, longest, tokens,
           PLACES);
    CU_ASSERT(in_order >= N * SHORT / PLACES + LONG - ROOM); /* the long one alone at the end */
    CU_ASSERT(longest <= tokens / PLACES * 105 / 100);
}

/* A group that has the long one is lost: what it had goes out again in the same order, before what never was out. */
static void test_lost_group(void) {
    server s;
    fake a, b;
    sh_buf lines;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("lost")}, NULL));
    make_file(&lines, N);
    uint64_t job = submit_part(&s, "j", &lines, true);
    fake_open(&a, s.endpoint, "a");
    a.strict = true;
    for (double end = sh_now() + 60; place_of(&a, N + 1) < 0 && sh_now() < end;) fake_turn(&a);
    check_order(&a, 0, N, N + 1);
    fake_fault(&a, "out of order");
    for (int i = 0; i < 500 && !a.left; i++) {
        a.mute = true;
        fake_turn(&a);
    }
    CU_ASSERT(a.left);
    fake_open(&b, s.endpoint, "b");
    b.strict = true;
    run_out(&s, &b, job);
    int at = -1, again = 0;
    for (; again < b.works; again++) {
        int place = place_of(&a, b.order[again]);
        if (place < 0) break; /* new ones from here on */
        CU_ASSERT(place > at);
        at = place;
    }
    CU_ASSERT(again >= PLACES && again <= ROOM);
    CU_ASSERT(place_of(&b, N + 1) >= 0 && place_of(&b, N + 1) < again);
    for (int i = again; i < b.works; i++) CU_ASSERT(place_of(&a, b.order[i]) < 0);
    check_rows(&s, job);
    sh_buf_release(&lines);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_wire_close(&a.wire);
    sh_wire_close(&b.wire);
}

/* A coordinator that takes over knows what waits from the store. */
static void test_restart(void) {
    const char *store = in_dir("restart");
    server s;
    fake f;
    sh_buf lines;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = store}, NULL));
    make_file(&lines, N);
    uint64_t job = submit_part(&s, "j", &lines, true);
    fake_open(&f, s.endpoint, "g");
    f.strict = true;
    for (double end = sh_now() + 60; f.works < 2 * ROOM && sh_now() < end;) fake_turn(&f);
    CU_ASSERT(place_of(&f, N + 1) < 0);
    server_end(&s, SIGKILL);
    sh_wire_close(&f.wire);
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = store}, NULL));
    counts k = status(&s, job);
    fake_open(&f, s.endpoint, "h");
    f.strict = true;
    run_out(&s, &f, job);
    CU_ASSERT(k.done > 0);
    check_order(&f, 0, N - (int)k.done, N + 1);
    check_rows(&s, job);
    sh_buf_release(&lines);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_wire_close(&f.wire);
}

/* A job that came later gets a place when the earlier one has all it wants, whatever is long in it. */
static void test_two_jobs(void) {
    server s;
    fake f;
    sh_buf one, two;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("two")}, NULL));
    make_file(&one, N);
    make_file(&two, 20);
    uint64_t first = submit_part(&s, "one", &one, true), second = submit_part(&s, "two", &two, true);
    fake_open(&f, s.endpoint, "g");
    f.strict = true;
    run_out(&s, &f, first);
    run_out(&s, &f, second);
    check_rows(&s, first);
    CU_ASSERT_EQUAL(f.works, N + 1 + 21);
    for (int i = 0; i <= N; i++) CU_ASSERT(f.order[i] <= N + 1);
    CU_ASSERT_EQUAL(f.order[N + 1], N + 1 + 21); /* its long one: all of it is the end of it */
    sh_buf_release(&one);
    sh_buf_release(&two);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_wire_close(&f.wire);
}

/* Two groups share the end: neither has more steps than its half of the tokens and the long one's own. */
static void test_two_groups(void) {
    server s;
    fake f[2];
    sh_buf lines;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("groups")}, NULL));
    make_file(&lines, N);
    fake_open(&f[0], s.endpoint, "a");
    fake_open(&f[1], s.endpoint, "b");
    f[0].strict = f[1].strict = true;
    for (int i = 0; i < 200 && !(f[0].welcomed && f[1].welcomed); i++) fake_turn(&f[i % 2]);
    uint64_t job = submit_part(&s, "j", &lines, true);
    counts k = status(&s, job);
    for (double end = sh_now() + 60; strcmp(k.state, "done") != 0 && sh_now() < end; k = status(&s, job))
        for (int i = 0; i < 20; i++) fake_turn(&f[i % 2]);
    CU_ASSERT_STRING_EQUAL(k.state, "done");
    uint64_t most = f[0].step > f[1].step ? f[0].step : f[1].step;
    int half = (N * SHORT + LONG) / PLACES / 2;
    printf("(%d and %d steps; %d would do) ", (int)f[0].step, (int)f[1].step, half);
    CU_ASSERT(most <= (uint64_t)half * 115 / 100);
    check_rows(&s, job);
    sh_buf_release(&lines);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    for (int i = 0; i < 2; i++) sh_wire_close(&f[i].wire);
}

int main(int argc, char **argv) {
    CU_TestInfo tests[] = {
        {"steps", test_steps},       {"a group is lost", test_lost_group}, {"another coordinator", test_restart},
        {"two jobs", test_two_jobs}, {"two groups", test_two_groups},      CU_TEST_INFO_NULL};
    return serving_main(argc, argv, "the end of a job", tests);
}
