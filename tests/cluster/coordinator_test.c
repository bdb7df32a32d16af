/*
 * The coordinator as a process of its own, driven through its socket: by libshoal as a client, and by a fake group of
 * one rank that makes up tokens as a function of prompt and place. Whatever is killed, every line gets one row, and the
 * rows are those of an undisturbed run.
 */
#include "coordinator/dispatch.h"
#include "serving.h"

static void check_rows(const server *s, uint64_t job) {
    json_t *rows = rows_of(s, job);
    CU_ASSERT_EQUAL(json_object_size(rows), 60);
    if (!json_equal(rows, expected)) {
        const char *key;
        json_t *v;
        json_object_foreach(expected, key, v) {
            char *have = json_dumps(json_object_get(rows, key), JSON_ENCODE_ANY), *want = json_dumps(v, 0);
            if (!have || strcmp(have, want) != 0)
                fprintf(stderr, "\n%s:\n  have %.600s\n  want %.600s\n", key, have ? have : "nothing", want);
            bool differs = !have || strcmp(have, want) != 0;
            free(have);
            free(want);
            if (differs) break;
        }
    }
    CU_ASSERT(json_equal(rows, expected));
    json_decref(rows);
}

/* --- tests ---------------------------------------------------------------------------------------------------------
 */

static void test_plain(void) {
    server s;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("plain")}, NULL));
    sh_buf lines;
    make_lines(&lines, 60, 40);
    uint64_t job = 0, again = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
    fake f;
    fake_open(&f, s.endpoint, "g1");
    CU_ASSERT_FATAL(wait_done(&s, &f, job, "done", 60));
    expected = rows_of(&s, job);
    CU_ASSERT_EQUAL(json_object_size(expected), 60);
    const json_t *row = json_object_get(expected, "r3"),
                 *body = json_object_get(json_object_get(row, "response"), "body");
    const json_t *ids = json_object_get(json_array_get(json_object_get(body, "choices"), 0), "token_ids");
    CU_ASSERT_EQUAL(json_array_size(ids), 40);
    int32_t prompt[] = {303, 301, 9};
    uint64_t h = sh_hash64(0, prompt, sizeof prompt);
    for (size_t i = 0; i < 40; i++) CU_ASSERT_EQUAL(json_integer_value(json_array_get(ids, i)), fake_id(h, (int)i));
    counts k = status(&s, job);
    CU_ASSERT(k.total == 60 && k.errors == 0 && k.in == 180 && k.out == 2400);
    for (int i = 0; i < 200 && f.n; i++) fake_turn(&f);
    CU_ASSERT_EQUAL(f.n, 0); /* all acknowledged */
    CU_ASSERT_EQUAL(submit(&s, "j", &lines, NULL, &again), SH_OK);
    CU_ASSERT_EQUAL(again, job);
    lines.data[20] = '7';
    CU_ASSERT_EQUAL(submit(&s, "j", &lines, NULL, &again), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "began with another file"));
    lines.data[20] = ' ';
    Shoal__JobOptions o = SHOAL__JOB_OPTIONS__INIT;
    o.has_lenient = o.lenient = true;
    CU_ASSERT_EQUAL(submit(&s, "j", &lines, &o, &again), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "--lenient was 0"));
    sh_buf_release(&lines);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    for (int i = 0; i < 200 && !f.left; i++) fake_turn(&f);
    CU_ASSERT(f.left);
    sh_wire_close(&f.wire);
}

static void test_bad_lines(void) {
    server s;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("bad")}, NULL));
    sh_buf b;
    sh_buf_init(&b, 0);
    add_line(&b, 1, 5);                                         /* 1 */
    SH_IGNORE(sh_buf_add_str(&b, "\n  \t\r\n"));                /* 2, 3: blank */
    SH_IGNORE(sh_buf_add_str(&b, "{\"custom_id\": \"x\", \n")); /* 4 */
    add_line(&b, 1, 5);                                         /* 5: twice */
    SH_IGNORE(sh_buf_add(&b, "\0\1\n", 3));                     /* 6 */
    SH_IGNORE(sh_buf_add_str(&b,
                             "{\"custom_id\": \"un\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": "
                             "{\"prompt\": [5], \"frobnicate\": 1}}\r\n")); /* 7 */
    size_t big = SH_MAX_LINE_BYTES + 100;                                   /* 8 */
    char *fill = malloc(big);
    memset(fill, ' ', big);
    fill[0] = '{';
    SH_IGNORE(sh_buf_add(&b, fill, big));
    free(fill);
    SH_IGNORE(sh_buf_add_str(&b, "\n"));
    add_line(&b, 2, 5); /* 9 */
    b.len--;            /* no newline at the end */
    uint64_t job = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "bad", &b, NULL, &job), SH_OK);
    counts k = status(&s, job);
    CU_ASSERT(k.total == 7 && k.done == 5 && k.errors == 5); /* refused at once, no group needed */
    fake f;
    fake_open(&f, s.endpoint, "g1");
    CU_ASSERT_FATAL(wait_done(&s, &f, job, "done", 60));
    json_t *rows = rows_of(&s, job);
    static const char *const keys[] = {"r1", "line 4", "line 5", "line 6", "un", "line 8", "r2"};
    CU_ASSERT_EQUAL(json_object_size(rows), 7);
    for (int i = 0; i < 7; i++) {
        if (!json_object_get(rows, keys[i])) fprintf(stderr, "\nno row %s\n", keys[i]);
        CU_ASSERT_PTR_NOT_NULL(json_object_get(rows, keys[i]));
    }
    const json_t *e = json_object_get(json_object_get(rows, "line 5"), "error");
    CU_ASSERT_PTR_NOT_NULL(
        strstr(json_string_value(json_object_get(e, "message")), "\"r1\" is that of an earlier line"));
    json_decref(rows);
    sh_buf_release(&b);
    CU_ASSERT_EQUAL(server_end(&s, SIGINT), SH_OK);
    sh_wire_close(&f.wire);
}

/* Groups die by fault, by silence and by standing still; one resends everything; one makes a gap. */
static void test_lost_groups(void) {
    server s;
    uint64_t job = server_begin(&s, &(server_options){.store = in_dir("lost")}, 60, 40);
    fake f;
    fake_open(&f, s.endpoint, "first");
    f.budget = 700;
    f.loud = true;
    while (f.budget > 0) fake_turn(&f);
    fake_fault(&f, "rank 0: tensor x: file y is damaged"); /* who it is stands before it already */
    counts k = {0};
    for (int i = 0; i < 300 && strcmp(k.group, "lost") != 0; i++) {
        f.mute = true;
        fake_turn(&f);
        k = status(&s, job);
    }
    CU_ASSERT_STRING_EQUAL(k.group, "lost");
    CU_ASSERT_PTR_NOT_NULL(strstr(k.fault, "rank 0 (here): tensor x: file y is damaged"));
    for (int i = 0; i < 500 && !f.left; i++) fake_turn(&f);
    CU_ASSERT(f.left && strstr(f.reason, "damaged"));
    sh_wire_close(&f.wire);
    fake_open(&f, s.endpoint, "second"); /* falls silent */
    f.budget = 500;
    while (f.budget > 0) fake_turn(&f);
    CU_ASSERT(f.resumed > 0);
    f.mute = true;
    double t = sh_now();
    do {
        fake_turn(&f);
        k = status(&s, job);
    } while (strcmp(k.group, "lost") != 0 && sh_now() - t < 10);
    CU_ASSERT(sh_now() - t < 8);
    CU_ASSERT_PTR_NOT_NULL(strstr(k.fault, "nothing heard for"));
    sh_wire_close(&f.wire);
    fake_open(&f, s.endpoint, "third");
    for (int i = 0; i < 2000 && f.n == 0; i++) fake_turn(&f);
    CU_ASSERT_FATAL(f.n > 0);
    fake_seq ahead = f.seq[0]; /* tokens from nowhere: dropped */
    ahead.key = f.seq[0].key;
    fake_tokens(&f, &ahead, ahead.max - 2, ahead.max);
    fake_tokens(&f, &(fake_seq){.key = 999999, .max = 5}, 0, 5); /* and of an unknown request */
    CU_ASSERT_FATAL(wait_done(&s, &f, job, "done", 60));
    check_rows(&s, job);
    k = status(&s, job);
    CU_ASSERT_EQUAL(k.out, 2400); /* no token counted twice */
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_wire_close(&f.wire);
}

/* A leader's connection breaks and takes work along that was on its way: over the new one it gets that work again. */
static void test_lost_work(void) {
    server s;
    uint64_t job = server_begin(&s, &(server_options){.store = in_dir("again")}, 60, 40);
    fake f;
    fake_open(&f, s.endpoint, "g");
    f.budget = 30;
    for (int i = 0; i < 2000 && (f.budget > 0 || f.n < 8); i++) fake_turn(&f);
    CU_ASSERT_EQUAL_FATAL(f.n, 8); /* twice what it can run */
    sh_wire_close(&f.wire);
    CU_ASSERT_EQUAL_FATAL(sh_wire_connect(s.endpoint, NULL, &f.wire), SH_OK);
    f.n = 5; /* three never arrived */
    f.budget = -1;
    fake_hello(&f);
    CU_ASSERT_FATAL(wait_done(&s, &f, job, "done", 20));
    check_rows(&s, job);
    counts k = status(&s, job);
    CU_ASSERT_STRING_EQUAL(k.group, "ready"); /* and it was never given up */
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_wire_close(&f.wire);
}

/* A leader's connection is gone when it is to be given more. It may come back, say what happened, or be heard no more;
 * its group is lost in the last two, and by the first reason that is one. */
static void test_unreachable(void) {
    enum { BACK, SPEAKS, SILENT };
    for (int how = BACK; how <= SILENT; how++) {
        server s;
        CU_ASSERT_FATAL(
            server_start(&s, &(server_options){.store = in_dir((char[]){'u', (char)('0' + how), 0})}, NULL));
        sh_buf few, more;
        make_lines(&few, 3, 40);
        make_lines(&more, 60, 40);
        uint64_t first = 0, job = 0;
        CU_ASSERT_EQUAL_FATAL(submit(&s, "few", &few, NULL, &first), SH_OK);
        fake f;
        fake_open(&f, s.endpoint, "g");
        f.budget = 30;
        for (int i = 0; i < 2000 && (f.budget > 0 || f.n < 3); i++) fake_turn(&f);
        CU_ASSERT_EQUAL_FATAL(f.n, 3);
        sh_wire_close(&f.wire);
        sh_sleep(0.1);
        double t = sh_now();
        CU_ASSERT_EQUAL_FATAL(submit(&s, "more", &more, NULL, &job), SH_OK); /* given out at once: to nobody */
        sh_sleep(how == SILENT ? 0 : 0.1);
        CU_ASSERT_EQUAL_FATAL(sh_wire_connect(s.endpoint, NULL, &f.wire), SH_OK);
        if (how != SILENT) fake_hello(&f);
        if (how == SPEAKS) fake_fault(&f, "file y ends at byte 5");
        counts k = {0};
        do k = status(&s, job);
        while (how != BACK && strcmp(k.group, "lost") != 0 && sh_now() - t < 10);
        CU_ASSERT_STRING_EQUAL(k.group, how == BACK ? "ready" : "lost");
        if (how == SPEAKS) CU_ASSERT_STRING_EQUAL(k.fault, "rank 0 (here): file y ends at byte 5");
        if (how == SILENT) CU_ASSERT_PTR_NOT_NULL(strstr(k.fault, "rank 0 (here): "));
        if (how == SILENT) CU_ASSERT_PTR_NOT_NULL(strstr(k.fault, "the peer is gone"));
        CU_ASSERT(how != SILENT ||
                  (sh_now() - t >= 0.3 * SH_GONE_BEATS && sh_now() - t < 2.8)); /* before silence says so */
        if (how != BACK) {
            sh_wire_close(&f.wire);
            fake_open(&f, s.endpoint, "h");
        }
        f.budget = -1;
        CU_ASSERT_FATAL(wait_done(&s, &f, job, "done", 20));
        check_rows(&s, job);
        k = status(&s, job);
        CU_ASSERT_EQUAL(k.groups, how == BACK ? 1 : 2);
        sh_buf_release(&few);
        sh_buf_release(&more);
        CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
        sh_wire_close(&f.wire);
    }
}

/* The coordinator is killed again and again while a group works; the group goes on and reconnects, or is gone as well.
 */
static void test_killed_at_work(void) {
    const char *store = in_dir("killed");
    server s;
    uint64_t job = server_begin(&s, &(server_options){.store = store}, 60, 40);
    fake f;
    fake_open(&f, s.endpoint, "g0");
    unsigned seed = 3;
    int resumed = 0;
    for (int round = 0; round < 6; round++) {
        f.budget = 150 + (int)(rand_r(&seed) % 100);
        double t = sh_now();
        while (f.budget > 0 && sh_now() - t < 10) fake_turn(&f);
        CU_ASSERT(f.budget <= 0);
        double wait = sh_now() + 0.08; /* some progress is on disk, some is not */
        while (sh_now() < wait) fake_turn(&f);
        CU_ASSERT_EQUAL(server_end(&s, SIGKILL), -1);
        CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = store}, NULL));
        if (round % 2) {
            resumed += f.resumed;
            sh_wire_close(&f.wire);
            char name[20];
            snprintf(name, sizeof name, "g%d", round + 1);
            fake_open(&f, s.endpoint, name);
        }
    }
    f.budget = -1;
    CU_ASSERT_FATAL(wait_done(&s, &f, job, "done", 60));
    CU_ASSERT(resumed + f.resumed > 0);
    CU_ASSERT_EQUAL(f.epoch, 7);
    check_rows(&s, job);
    CU_ASSERT_EQUAL(status(&s, job).out, 2400);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_wire_close(&f.wire);
}

/* Killed while lines arrive: what was acknowledged is there, and the same submit goes on to the end. */
static void test_killed_while_submitting(void) {
    enum { N = 6000 };
    const char *store = in_dir("submitting");
    sh_buf lines;
    sh_buf_init(&lines, 0);
    for (int i = 1; i <= N; i++)
        SH_IGNORE(sh_buf_printf(&lines, "{\"custom_id\": \"b%d\", \"oops\": 1}\n", i)); /* refused at once */
    unsigned seed = 11;
    int interrupted = 0;
    uint64_t job = 0;
    server s = {0};
    for (int round = 0; round < 6; round++) {
        CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = store}, NULL));
        pid_t killer = fork();
        if (killer == 0) {
            sh_sleep(0.01 + 1e-3 * (double)(rand_r(&seed) % 40));
            kill(s.pid, SIGKILL);
            _exit(0);
        }
        (void)rand_r(&seed);
        sh_client *c = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_client_open(s.endpoint, NULL, 400, &c), SH_OK);
        FILE *f = file_of((const char *)lines.data, lines.len);
        sh_status st = sh_client_submit(c, "big", NULL, f, &job);
        fclose(f);
        sh_client_close(&c);
        CU_ASSERT(st == SH_OK || st == SH_EPEER);
        interrupted += st != SH_OK;
        waitpid(killer, NULL, 0);
        server_end(&s, SIGKILL);
    }
    CU_ASSERT(interrupted > 0);
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = store}, NULL));
    sh_status last = submit(&s, "big", &lines, NULL, &job);
    if (last != SH_OK) fprintf(stderr, "\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(last, SH_OK);
    CU_ASSERT(wait_done(&s, NULL, job, "done", 60));
    counts k = status(&s, job);
    CU_ASSERT(k.total == N && k.errors == N);
    json_t *rows = rows_of(&s, job);
    CU_ASSERT_EQUAL(json_object_size(rows), N);
    json_decref(rows);
    sh_buf_release(&lines);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
}

static void test_cancel(void) {
    server s;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("cancel")}, NULL));
    sh_buf lines;
    make_lines(&lines, 1500, 40);
    uint64_t job = 0, other = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "a", &lines, NULL, &job), SH_OK);
    sh_buf_release(&lines);
    make_lines(&lines, 3, 10);
    CU_ASSERT_EQUAL_FATAL(submit(&s, "b", &lines, NULL, &other), SH_OK);
    fake f;
    fake_open(&f, s.endpoint, "g");
    f.budget = 400;
    while (f.budget > 0) fake_turn(&f);
    f.budget = -1;
    sh_client *c = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_client_open(s.endpoint, NULL, 60000, &c), SH_OK);
    Shoal__Request which = SHOAL__REQUEST__INIT;
    which.has_job = true, which.job = job;
    Shoal__JobRequest q = SHOAL__JOB_REQUEST__INIT;
    q.cancel = &which;
    Shoal__JobReply *reply = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_client_call(c, &q, &reply), SH_OK);
    shoal__job_reply__free_unpacked(reply, NULL);
    which.job = 77;
    CU_ASSERT_EQUAL(sh_client_call(c, &q, &reply), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "no job 77"));
    Shoal__JobRequest end = SHOAL__JOB_REQUEST__INIT;
    end.has_shutdown = end.shutdown = true;
    CU_ASSERT_EQUAL(sh_client_call(c, &end, &reply), SH_EINPUT); /* not a run */
    sh_client_close(&c);
    CU_ASSERT_FATAL(wait_done(&s, &f, job, "cancelled", 60));
    CU_ASSERT_FATAL(wait_done(&s, &f, other, "done", 60)); /* the other job goes on */
    counts k = status(&s, job);
    CU_ASSERT(k.total == 1500 && k.done == 1500 && k.errors > 1000 && k.errors <= 1500);
    json_t *rows = rows_of(&s, job);
    CU_ASSERT_EQUAL(json_object_size(rows), 1500);
    const json_t *last = json_object_get(json_object_get(rows, "r1500"), "response");
    CU_ASSERT_EQUAL(json_integer_value(json_object_get(last, "status_code")), 499);
    json_decref(rows);
    sh_buf_release(&lines);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_wire_close(&f.wire);
}

static void test_incarnations(void) {
    const char *store = in_dir("two");
    server s, t;
    int st = 0;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = store, .run = true, .socket = "one"}, NULL));
    sh_buf lines;
    make_lines(&lines, 60, 40);
    uint64_t job = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
    fake f;
    fake_open(&f, s.endpoint, "g");
    f.budget = 100;
    while (f.budget > 0) fake_turn(&f);
    CU_ASSERT_FATAL(server_start(&t, &(server_options){.store = store, .run = true, .socket = "two"}, NULL));
    CU_ASSERT_EQUAL(server_end(&s, 0), SH_ESTATE); /* by itself */
    sh_wire_close(&f.wire);
    fake old;
    CU_ASSERT_EQUAL_FATAL(sh_wire_connect(t.endpoint, NULL, &old.wire), SH_OK);
    sh_wire *w = old.wire;
    old = (fake){.wire = w, .welcomed = true, .epoch = 1, .budget = -1, .every = 1, .size = 1, .name = "g"};
    fake_hello(&old); /* a rank of the old incarnation */
    for (int i = 0; i < 500 && !old.left; i++) fake_turn(&old);
    CU_ASSERT(old.left);
    CU_ASSERT_STRING_EQUAL(old.reason, "this rank served another coordinator");
    sh_wire_close(&old.wire);
    fake_open(&f, t.endpoint, "new");
    CU_ASSERT_FATAL(wait_done(&t, &f, job, "done", 60));
    check_rows(&t, job);
    sh_client *c = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_client_open(t.endpoint, NULL, 60000, &c), SH_OK);
    Shoal__JobRequest end = SHOAL__JOB_REQUEST__INIT;
    end.has_shutdown = end.shutdown = true;
    Shoal__JobReply *reply = NULL;
    CU_ASSERT_EQUAL(sh_client_call(c, &end, &reply), SH_OK);
    shoal__job_reply__free_unpacked(reply, NULL);
    sh_client_close(&c);
    CU_ASSERT_EQUAL(server_end(&t, 0), SH_OK);
    sh_wire_close(&f.wire);
    /* other numbers are refused by name */
    CU_ASSERT_FALSE(server_start(&s, &(server_options){.store = store, .mode = SH_MODE_BF16}, &st));
    CU_ASSERT_EQUAL(st, SH_EINPUT);
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = store, .seed = 5}, NULL));
    CU_ASSERT_EQUAL(submit(&s, "j", &lines, NULL, &job), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "--seed was 0 when it began: it cannot go on with 5"));
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_buf_release(&lines);
}

static void test_impossible_plan(void) {
    server s;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("plan"), .run = true, .cuts = "1"}, NULL));
    sh_buf lines;
    make_lines(&lines, 5, 5);
    uint64_t job = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
    fake f;
    fake_open(&f, s.endpoint, "g"); /* one rank for two stages */
    for (int i = 0; i < 500 && !f.left; i++) fake_turn(&f);
    CU_ASSERT(f.left && !f.welcomed);
    counts k = status(&s, job);
    CU_ASSERT_STRING_EQUAL(k.state, "failed");
    CU_ASSERT_STRING_EQUAL(k.failure, f.reason);
    CU_ASSERT(k.failure[0] != 0);
    sh_wire_close(&f.wire);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    /* the same job goes on with a plan that works */
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("plan"), .run = true}, NULL));
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
    fake_open(&f, s.endpoint, "h");
    CU_ASSERT(wait_done(&s, &f, job, "done", 60));
    sh_wire_close(&f.wire);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    /* a service tells each of its hellos the same, and counts one group */
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("plan2"), .cuts = "1"}, NULL));
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
    fake_open(&f, s.endpoint, "g");
    for (int n = 0; n < 3; n++) {
        for (int i = 0; i < 500 && !f.left; i++) fake_turn(&f);
        CU_ASSERT(f.left && !f.welcomed);
        f.left = false;
        fake_hello(&f);
    }
    CU_ASSERT_EQUAL(status(&s, job).groups, 1);
    sh_wire_close(&f.wire);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_buf_release(&lines);
}

/* The system refuses to let the store grow: the coordinator says so and ends; with room again, the job goes on. */
static void test_disk_full(void) {
    const char *store = in_dir("full");
    server s;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = store, .file_limit = 400000}, NULL));
    sh_buf lines;
    make_lines(&lines, 6000, 40);
    uint64_t job = 0;
    sh_client *c = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_client_open(s.endpoint, NULL, 1000, &c), SH_OK);
    FILE *f = file_of((const char *)lines.data, lines.len);
    CU_ASSERT_EQUAL(sh_client_submit(c, "j", NULL, f, &job), SH_EPEER);
    fclose(f);
    sh_client_close(&c);
    CU_ASSERT_EQUAL(server_end(&s, 0), SH_EIO);
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = store}, NULL));
    CU_ASSERT_EQUAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
    CU_ASSERT_EQUAL(status(&s, job).total, 6000);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_buf_release(&lines);
}

/* Turns of several groups until the job is done. */
static bool wait_groups(const server *s, fake *f, int n, uint64_t job, double seconds) {
    for (double end = sh_now() + seconds; sh_now() < end;) {
        for (int i = 0; i < 10 * n; i++) fake_turn(&f[i % n]);
        counts k = status(s, job);
        if (strcmp(k.state, "done") == 0 && k.done == k.total) return true;
    }
    return false;
}

static int row_status(const json_t *rows, const char *id) {
    return (int)json_integer_value(
        json_object_get(json_object_get(json_object_get(rows, id), "response"), "status_code"));
}

static const char *row_message(const json_t *rows, const char *id) {
    const char *s = json_string_value(json_object_get(json_object_get(json_object_get(rows, id), "error"), "message"));
    return s ? s : "";
}

/* Requests that a small group's KV cannot hold go to the large one, in whatever order the groups come; one that fits
 * neither is refused. */
static void test_sizes(void) {
    server s;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("sizes"), .groups = 2}, NULL));
    sh_buf lines;
    sh_buf_init(&lines, 0);
    for (int i = 1; i <= 40; i++) add_line(&lines, i, i % 4 == 1 ? 50 : 20); /* 53 tokens, or 23 */
    add_line(&lines, 41, 58);
    uint64_t job = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
    fake f[2];
    fake_open(&f[0], s.endpoint, "small");
    f[0].kv_tokens = 40;
    for (int i = 0; i < 3000 && status(&s, job).done < 30; i++) fake_turn(&f[0]);
    counts k = status(&s, job);
    CU_ASSERT_EQUAL(k.done, 30); /* what fits; the others wait, since a second group is expected */
    CU_ASSERT_EQUAL(k.errors, 0);
    fake_open(&f[1], s.endpoint, "large");
    f[1].kv_tokens = 60;
    CU_ASSERT_FATAL(wait_groups(&s, f, 2, job, 30));
    CU_ASSERT_EQUAL(f[0].works, 30);
    CU_ASSERT(f[1].works == 10);
    json_t *rows = rows_of(&s, job);
    CU_ASSERT_EQUAL(row_status(rows, "r1"), 200);
    CU_ASSERT_EQUAL(row_status(rows, "r41"), 413);
    CU_ASSERT_STRING_EQUAL(row_message(rows, "r41"), "prompt of 3 tokens and max_tokens 58 make 61: the largest group "
                                                     "can hold 60 tokens of one sequence");
    json_decref(rows);
    sh_buf_release(&lines);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    for (int i = 0; i < 2; i++) sh_wire_close(&f[i].wire);
}

/* One group makes a token where the other makes 120: the end does not wait for what the slow one has queued, nor for
 * what it would be long about. */
static void test_slow_group(void) {
    server s;
    uint64_t job = server_begin(&s, &(server_options){.store = in_dir("slow")}, 60, 40);
    fake f[2];
    fake_open(&f[0], s.endpoint, "slow");
    fake_open(&f[1], s.endpoint, "fast");
    f[0].every = 120;
    for (int i = 0; i < 2000 && f[0].n < 8; i++) fake_turn(&f[0]);
    CU_ASSERT_EQUAL_FATAL(f[0].n, 8); /* as many ahead as ever */
    CU_ASSERT_FATAL(wait_groups(&s, f, 2, job, 60));
    check_rows(&s, job);
    CU_ASSERT(f[0].cancels >= 5); /* queued ones, and some that were begun */
    CU_ASSERT(f[1].works >= 55);
    CU_ASSERT(f[1].resumed > 0);
    CU_ASSERT_EQUAL(f[0].resumed, 0); /* what was taken from it does not come back */
    CU_ASSERT_EQUAL(status(&s, job).out, 2400);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    for (int i = 0; i < 2; i++) sh_wire_close(&f[i].wire);
}

/* Two groups found other weights under the same path, before anything came of either. */
static void test_other_weights(void) {
    server s;
    uint64_t job = server_begin(&s, &(server_options){.store = in_dir("weights")}, 60, 40);
    fake f[2];
    fake_open(&f[0], s.endpoint, "old");
    f[0].budget = 0;
    for (int i = 0; i < 2000 && f[0].n < 8; i++) fake_turn(&f[0]);
    CU_ASSERT_EQUAL_FATAL(f[0].n, 8);
    fake_open(&f[1], s.endpoint, "new");
    f[1].weights = 0xbeef;
    for (int i = 0; i < 2000 && !f[1].left; i++) fake_turn(&f[i % 2]);
    CU_ASSERT_STRING_EQUAL(f[1].reason,
                           "group old (here) has weights with fingerprint 000000000000feed, group new (here) "
                           "000000000000beef: all must have the same");
    CU_ASSERT_EQUAL(f[1].works, 0);
    f[0].budget = -1;
    CU_ASSERT_FATAL(wait_done(&s, &f[0], job, "done", 60));
    check_rows(&s, job);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    for (int i = 0; i < 2; i++) sh_wire_close(&f[i].wire);
}

/* In a service a group is started again under its name: while the old one's silence is not noticed yet, and after it
 * was lost. */
static void test_started_again(void) {
    server s;
    uint64_t job = server_begin(&s, &(server_options){.store = in_dir("name")}, 60, 40);
    fake f;
    int pid = (int)getpid();
    fake_open(&f, s.endpoint, "g");
    f.budget = 30;
    for (int i = 0; i < 2000 && (f.budget > 0 || f.n < 8); i++) fake_turn(&f);
    CU_ASSERT_EQUAL_FATAL(f.n, 8);
    sh_wire_close(&f.wire);
    fake_open_as(&f, s.endpoint, "g", pid + 1);
    f.budget = 200;
    for (int i = 0; i < 2000 && f.budget > 0; i++) fake_turn(&f);
    CU_ASSERT_EQUAL(f.budget, 0);
    CU_ASSERT(f.resumed > 0);
    counts k = status(&s, job);
    CU_ASSERT_EQUAL(k.groups, 2);
    fake_fault(&f, "cannot go on");
    for (int i = 0; i < 2000 && !f.left; i++) fake_turn(&f);
    CU_ASSERT(f.left && strstr(f.reason, "cannot go on"));
    for (int i = 0; i < 100; i++) fake_turn(&f); /* who was told to leave does not come back … */
    CU_ASSERT_EQUAL(status(&s, job).groups, 2);
    sh_wire_close(&f.wire);
    fake_open_as(&f, s.endpoint, "g", pid + 2); /* … another does */
    CU_ASSERT_FATAL(wait_done(&s, &f, job, "done", 20));
    check_rows(&s, job);
    CU_ASSERT_EQUAL(status(&s, job).groups, 3);
    f.welcomed = false; /* … with more ranks, too */
    f.pid = pid + 3, f.size = 2;
    fake_hello(&f);
    for (int i = 0; i < 2000 && !f.left; i++) fake_turn(&f);
    CU_ASSERT(f.left && strstr(f.reason, "it was started again under its name: rank 0 of 2 is pid"));
    CU_ASSERT_EQUAL(status(&s, job).groups, 4);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_wire_close(&f.wire);
}

/* A group that comes late to a short job gets half of what the first has not begun, though nobody knows its pace. */
static void test_late_group(void) {
    server s;
    uint64_t job = server_begin(&s, &(server_options){.store = in_dir("late")}, 8, 40);
    fake f[2];
    fake_open(&f[0], s.endpoint, "early");
    f[0].every = 1 << 30;
    for (int i = 0; i < 2000 && f[0].n < 8; i++) fake_turn(&f[0]);
    CU_ASSERT_EQUAL_FATAL(f[0].n, 8);
    fake_open(&f[1], s.endpoint, "late");
    f[1].every = 1 << 30;
    for (int i = 0; i < 2000 && (f[0].n != 4 || f[1].n != 4); i++) fake_turn(&f[i % 2]);
    CU_ASSERT(f[0].n == 4 && f[1].n == 4);
    f[0].every = f[1].every = 1;
    CU_ASSERT_FATAL(wait_groups(&s, f, 2, job, 60));
    CU_ASSERT_EQUAL(status(&s, job).out, 320);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    for (int i = 0; i < 2; i++) sh_wire_close(&f[i].wire);
}

static void tell_ended(const server *s, const char *group, const char *reason, int groups, int *suspects) {
    sh_client *c = NULL;
    Shoal__Request all = SHOAL__REQUEST__INIT;
    Shoal__EndedGroup e = SHOAL__ENDED_GROUP__INIT, *list = &e;
    Shoal__Supervision v = SHOAL__SUPERVISION__INIT;
    Shoal__JobRequest r = SHOAL__JOB_REQUEST__INIT;
    Shoal__JobReply *reply = NULL;
    e.group = (char *)(uintptr_t)group, e.reason = (char *)(uintptr_t)reason;
    v.groups = groups, v.n_ended = 1, v.ended = &list;
    r.status = &all, r.supervision = &v;
    CU_ASSERT_EQUAL_FATAL(sh_client_open(s->endpoint, NULL, 60000, &c), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_client_call(c, &r, &reply), SH_OK);
    *suspects = reply->suspects;
    shoal__job_reply__free_unpacked(reply, NULL);
    sh_client_close(&c);
}

/* Groups end one after the other, as the supervisor tells, whenever they are given the request whose prompt begins with
 * `poison`. Returns how many ended until the job was done, or `most`. */
static int run_poisoned(const server *s, uint64_t job, int32_t poison, int most, bool *alone) {
    int ended = 0, suspects = 0;
    bool done = false;
    for (; !done && ended < most; ended += !done) {
        fake f;
        char name[20];
        snprintf(name, sizeof name, "g%d", ended);
        fake_open(&f, s->endpoint, name);
        f.poison = &poison;
        double end = sh_now() + 20;
        while (!f.died && !done && sh_now() < end) {
            for (int i = 0; i < 10 && !f.died; i++) fake_turn(&f);
            counts k = status(s, job);
            done = strcmp(k.state, "done") == 0 && k.done == k.total;
        }
        CU_ASSERT_FATAL(f.died || done);
        if (f.died && f.works == 1) *alone = true;
        sh_wire_close(&f.wire);
        if (!done) tell_ended(s, name, "was killed by signal 9 (Killed)", 1, &suspects);
        if (!done && ended == 1) CU_ASSERT(suspects > 0);
    }
    return ended;
}

static void test_poison(void) {
    server s;
    uint64_t job = server_begin(&s, &(server_options){.store = in_dir("poison"), .run = true}, 60, 40);
    bool alone = false;
    int ended = run_poisoned(&s, job, 303, 20, &alone); /* of r3 alone */
    CU_ASSERT_EQUAL(ended, 5);                          /* 3 in company, 2 alone */
    CU_ASSERT_TRUE(alone);
    json_t *rows = rows_of(&s, job), *want = json_deep_copy(expected);
    CU_ASSERT_EQUAL(row_status(rows, "r3"), 500);
    CU_ASSERT_STRING_EQUAL(row_message(rows, "r3"), "the worker ended 5 times while working on this request, 2 times "
                                                    "on it alone: was killed by signal 9 (Killed)");
    json_object_del(rows, "r3");
    json_object_del(want, "r3");
    CU_ASSERT(json_equal(rows, want)); /* and nobody else suffers */
    json_decref(rows), json_decref(want);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
}

/* Groups that end whatever they work on: no request is blamed. */
static void test_bad_groups(void) {
    server s;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("badgroups"), .run = true}, NULL));
    sh_buf lines;
    sh_buf_init(&lines, 0);
    for (int i = 1; i <= 12; i++) add_line(&lines, 300, 40);                                  /* all begin with 300 */
    for (char *p = (char *)lines.data, k = 'a'; (p = strstr(p, "\"r300\"")); p++) p[1] = k++; /* other names */
    uint64_t job = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
    bool alone = false;
    CU_ASSERT_EQUAL(run_poisoned(&s, job, 300, 9, &alone), 9);
    counts k = status(&s, job);
    CU_ASSERT(k.total == 12 && k.done == 0);
    sh_buf_release(&lines);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
}

/* Ranks that live and never get ready are given up. */
static void test_slow_loading(void) {
    server s;
    uint64_t job = server_begin(&s, &(server_options){.store = in_dir("load"), .load_ms = 500}, 3, 5);
    fake f;
    fake_open(&f, s.endpoint, "g");
    f.slow_to_load = true;
    double t = sh_now();
    while (!f.left && sh_now() - t < 10) fake_turn(&f);
    CU_ASSERT(f.left && sh_now() - t > 0.5);
    CU_ASSERT_PTR_NOT_NULL(strstr(f.reason, "its weights were not loaded within 1 s"));
    sh_wire_close(&f.wire);
    fake_open(&f, s.endpoint, "h");
    CU_ASSERT(wait_done(&s, &f, job, "done", 60));
    sh_wire_close(&f.wire);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
}

/* Counts of experts for a group that has no ranks to divide experts among: it hears so. What was read is freed: the
 * leak check decides the exit status. */
static void test_routing(void) {
    server s;
    char path[200];
    static sh_config c; /* a large table */
    sh_buf text;
    sh_routing *r = NULL;
    snprintf(path, sizeof path, "%s/routing.json", dir);
    sh_buf_init(&text, 0);
    CU_ASSERT_EQUAL_FATAL(sh_config_load(model, &c), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_routing_create(&c, &r), SH_OK);
    for (int i = 0; i < r->layers * r->experts; i++) r->chosen[i] = (uint64_t)(1 + i % 7);
    CU_ASSERT_EQUAL_FATAL(sh_routing_print(r, &text), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_file_write(path, text.data, text.len), SH_OK);
    sh_buf_release(&text);
    sh_routing_destroy(&r);
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("routing"), .routing = path}, NULL));
    fake f;
    fake_open(&f, s.endpoint, "g");
    for (double end = sh_now() + 60; !f.left && sh_now() < end;) fake_turn(&f);
    CU_ASSERT_STRING_EQUAL(f.reason, "--routing: places experts on the ranks of a stage: give --ep too");
    sh_wire_close(&f.wire);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
}

int main(int argc, char **argv) {
    CU_TestInfo tests[] = {{"a job from start to end", test_plain},
                           {"bad lines", test_bad_lines},
                           {"lost groups, repeated tokens", test_lost_groups},
                           {"work lost with a connection", test_lost_work},
                           {"a leader that cannot be reached", test_unreachable},
                           {"coordinator killed at work", test_killed_at_work},
                           {"coordinator killed while lines arrive", test_killed_while_submitting},
                           {"cancel", test_cancel},
                           {"two incarnations", test_incarnations},
                           {"a plan that cannot be", test_impossible_plan},
                           {"disk full", test_disk_full},
                           {"groups of two sizes", test_sizes},
                           {"a slow group", test_slow_group},
                           {"groups with other weights", test_other_weights},
                           {"a group started again", test_started_again},
                           {"a late group", test_late_group},
                           {"a request that ends groups", test_poison},
                           {"groups that end by themselves", test_bad_groups},
                           {"groups that do not load", test_slow_loading},
                           {"counts of experts", test_routing},
                           CU_TEST_INFO_NULL};
    return serving_main(argc, argv, "coordinator", tests);
}
