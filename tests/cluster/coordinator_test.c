/*
 * The coordinator as a process of its own, driven through its socket: by libshoal as a client, and by a fake group of
 * one rank that makes up tokens as a function of prompt and place. Whatever is killed, every line gets one row, and the
 * rows are those of an undisturbed run.
 */
#include <CUnit/Basic.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "common/clock.h"
#include "common/file.h"
#include "common/hash.h"
#include "common/json.h"
#include "coordinator/coordinator.h"
#include "partition/routing.h"
#include "proto/client.h"
#include "proto/group.pb-c.h"

static char dir[64];
static const char model[] = SH_SOURCE_DIR "/share/minnow";

static const char *in_dir(const char *name) {
    static char text[4][200];
    static int at;
    at = (at + 1) % 4;
    snprintf(text[at], sizeof text[at], "%s/%s", dir, name);
    return text[at];
}

/* --- the coordinator -----------------------------------------------------------------------------------------------
 */

typedef struct server {
    pid_t pid;
    char endpoint[200];
} server;

typedef struct server_options {
    const char *store, *socket, *cuts, *routing;
    bool run;
    sh_mode mode;
    uint64_t seed;
    rlim_t file_limit;
    int load_ms, groups;
} server_options;

/* The coordinator runs in this program started anew, not in a fork of it: the parent has threads (ZeroMQ's). */
static int server_main(char **arg) {
    const server_options o = {.store = arg[1],
                              .run = atoi(arg[3]),
                              .cuts = arg[4][0] ? arg[4] : NULL,
                              .mode = (sh_mode)atoi(arg[5]),
                              .seed = (uint64_t)atoi(arg[6]),
                              .file_limit = (rlim_t)atoi(arg[7]),
                              .load_ms = atoi(arg[8]),
                              .groups = atoi(arg[9]),
                              .routing = arg[10][0] ? arg[10] : NULL};
    if (o.file_limit) {
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){o.file_limit, o.file_limit});
    }
    sh_coordinator_options c = {.model = model,
                                .endpoint = arg[0],
                                .store = o.store,
                                .run = o.run,
                                .mode = o.mode,
                                .kv = SH_KV_F32,
                                .cuts = o.cuts,
                                .routing = o.routing,
                                .max_seqs = 4,
                                .chunk = 64,
                                .heartbeat_ms = 300,
                                .orphan_ms = 20000,
                                .intake = {.seed = o.seed},
                                .groups = o.groups,
                                .load_ms = o.load_ms,
                                .progress_ms = 30};
    sh_status st = sh_coordinator_run(&c, atoi(arg[2]));
    if (st != SH_OK) fprintf(stderr, "  (coordinator ended: %s)\n", sh_error_text());
    return (int)st;
}

static void server_exec(const server_options *o, const char *endpoint, int fd) {
    char number[7][24];
    const long long value[7] = {fd,         o->run,   o->mode, (long long)o->seed, (long long)o->file_limit,
                                o->load_ms, o->groups};
    for (int i = 0; i < 7; i++) snprintf(number[i], sizeof number[i], "%lld", value[i]);
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that gives up leaves nothing behind */
    execl("/proc/self/exe", "coordinator_test", "--server", endpoint, o->store, number[0], number[1],
          o->cuts ? o->cuts : "", number[2], number[3], number[4], number[5], number[6], o->routing ? o->routing : "",
          (char *)NULL);
    _exit(99);
}

/* false: it ended before it took requests; *status then is its exit status. */
static bool server_start(server *s, const server_options *o, int *status) {
    int fd[2];
    CU_ASSERT_EQUAL_FATAL(pipe(fd), 0);
    snprintf(s->endpoint, sizeof s->endpoint, "ipc://%s/sock/%s", dir, o->socket ? o->socket : "s");
    s->pid = fork();
    if (s->pid == 0) {
        close(fd[0]);
        server_exec(o, s->endpoint, fd[1]);
    }
    close(fd[1]);
    char line[300] = "";
    ssize_t n = read(fd[0], line, sizeof line - 1);
    close(fd[0]);
    if (n > 0) {
        CU_ASSERT(line[n - 1] == '\n' && strncmp(line, s->endpoint, strlen(s->endpoint)) == 0);
        return true;
    }
    int st = 0;
    waitpid(s->pid, &st, 0);
    if (status) *status = WIFEXITED(st) ? WEXITSTATUS(st) : -1;
    s->pid = 0;
    return false;
}

/* Exit status; −1 when killed. */
static int server_end(server *s, int sig) {
    int st = 0;
    if (sig) kill(s->pid, sig);
    double end = sh_now() + 60;
    while (waitpid(s->pid, &st, WNOHANG) == 0 && sh_now() < end) sh_sleep(0.005);
    if (sh_now() >= end) {
        CU_FAIL("the coordinator does not end");
        kill(s->pid, SIGKILL);
        waitpid(s->pid, &st, 0);
    }
    return WIFEXITED(st) ? WEXITSTATUS(st) : -1;
}

/* --- a group of one rank -------------------------------------------------------------------------------------------
 */

enum { FAKE_SEQS = 64 };

typedef struct fake_seq {
    uint64_t key, prompt;
    int first, made, sent, max; /* tokens [first, made) were made here */
    bool tops;
} fake_seq;

typedef struct fake {
    sh_wire *wire;
    char name[40];
    uint64_t epoch, step;
    bool welcomed, ready, left, mute, stuck, loud; /* loud: sends every token twice, and once from the start */
    int budget;                                    /* tokens it may still make; −1: no limit */
    int kv_tokens, max_seqs, every;                /* every: makes tokens in each so many-th turn only */
    int turns, cancels;
    bool slow_to_load;
    const int32_t *poison; /* work whose prompt begins with this id kills it: it falls silent, `died` is set */
    bool died;
    int resumed; /* work that came with tokens */
    int works;
    double heard, beat;
    char reason[500];
    fake_seq seq[FAKE_SEQS];
    int n;
} fake;

static void fake_send(fake *f, const Shoal__FromRank *m) {
    uint8_t buf[65536];
    size_t n = shoal__from_rank__get_packed_size(m);
    CU_ASSERT_FATAL(n <= sizeof buf);
    shoal__from_rank__pack(m, buf);
    SH_IGNORE(sh_wire_send(f->wire, NULL, SH_WIRE_GROUP, buf, n));
}

static void fake_hello(fake *f) {
    Shoal__Hello h = SHOAL__HELLO__INIT;
    h.rank = 0, h.size = 1, h.pid = (int)getpid();
    h.host = h.build = (char[]){"here"};
    h.group = f->name;
    h.has_epoch = f->welcomed;
    h.epoch = f->epoch;
    Shoal__FromRank m = SHOAL__FROM_RANK__INIT;
    m.hello = &h;
    fake_send(f, &m);
    f->heard = sh_now();
}

static void fake_open(fake *f, const char *endpoint, const char *name) {
    *f = (fake){.budget = -1, .kv_tokens = 4096, .max_seqs = 4, .every = 1};
    snprintf(f->name, sizeof f->name, "%s", name);
    CU_ASSERT_EQUAL_FATAL(sh_wire_connect(endpoint, NULL, &f->wire), SH_OK);
    fake_hello(f);
}

static void fake_fault(fake *f, const char *text) {
    Shoal__Fault x = SHOAL__FAULT__INIT;
    x.text = (char *)(uintptr_t)text;
    Shoal__FromRank m = SHOAL__FROM_RANK__INIT;
    m.fault = &x;
    fake_send(f, &m);
}

static int32_t fake_id(uint64_t prompt, int place) {
    return 300 + (int32_t)(sh_mix64(prompt ^ (uint64_t)place) % 500);
}

static float fake_logprob(uint64_t prompt, int place) {
    return -(float)(sh_mix64(prompt + 77 * (uint64_t)place) % 1000) / 256;
}

static void fake_tokens(fake *f, const fake_seq *s, int from, int to) {
    int32_t id[64];
    float lp[64], alt[64];
    Shoal__TopLogprobs top[64], *list[64];
    Shoal__Tokens t = SHOAL__TOKENS__INIT, *tp = &t;
    t.key = s->key, t.offset = from, t.n_id = (size_t)(to - from), t.id = id;
    for (int i = 0; i < to - from; i++) {
        id[i] = fake_id(s->prompt, from + i);
        lp[i] = fake_logprob(s->prompt, from + i);
        alt[i] = lp[i] - 1;
        shoal__top_logprobs__init(&top[i]);
        top[i].n_id = top[i].n_logprob = 1;
        top[i].id = &id[i], top[i].logprob = &alt[i];
        list[i] = &top[i];
    }
    if (s->tops) t.n_logprob = t.n_top = t.n_id, t.logprob = lp, t.top = list;
    if (to == s->max) t.has_finish = true, t.finish = SH_FINISH_LENGTH;
    Shoal__FromRank m = SHOAL__FROM_RANK__INIT;
    m.n_tokens = 1, m.tokens = &tp;
    fake_send(f, &m);
}

static void fake_work(fake *f, const Shoal__Work *w) {
    for (int i = 0; i < f->n; i++)
        if (f->seq[i].key == w->key) {
            f->seq[i].sent = f->seq[i].first;
            return;
        }
    CU_ASSERT_FATAL(f->n < FAKE_SEQS);
    fake_seq s = {.key = w->key,
                  .prompt = sh_hash64(0, w->prompt, w->n_prompt * sizeof *w->prompt),
                  .first = (int)w->n_generated,
                  .made = (int)w->n_generated,
                  .sent = (int)w->n_generated,
                  .max = w->sampling->max_tokens,
                  .tops = w->sampling->logprobs > 0};
    CU_ASSERT(s.first < s.max && s.max <= 60);
    for (int i = 0; i < s.first; i++) CU_ASSERT_EQUAL(w->generated[i], fake_id(s.prompt, i));
    f->resumed += s.first > 0;
    f->works++;
    if (f->poison && w->prompt[0] == *f->poison) f->died = true;
    f->seq[f->n++] = s;
}

static void fake_drop(fake *f, uint64_t key) {
    for (int i = 0; i < f->n; i++)
        if (f->seq[i].key == key) f->seq[i--] = f->seq[--f->n];
}

static void fake_take(fake *f, const Shoal__ToRank *m) {
    if (m->welcome) {
        CU_ASSERT_STRING_EQUAL(m->welcome->model, model);
        CU_ASSERT_EQUAL(m->welcome->plan->n_rank, 1);
        f->epoch = m->welcome->epoch;
        f->welcomed = true;
        if (f->slow_to_load) return;
        for (int i = 0; i < f->n; i++) f->seq[i].sent = f->seq[i].first; /* everything again */
        Shoal__Ready r = SHOAL__READY__INIT;
        r.kv_tokens = f->kv_tokens, r.max_seqs = f->max_seqs, r.fingerprint = 0xfeed;
        Shoal__FromRank out = SHOAL__FROM_RANK__INIT;
        out.ready = &r;
        fake_send(f, &out);
    }
    for (size_t i = 0; i < m->n_work; i++) fake_work(f, m->work[i]);
    for (size_t i = 0; i < m->n_cancel; i++) fake_drop(f, m->cancel[i]);
    f->cancels += (int)m->n_cancel;
    for (size_t i = 0; i < m->n_done; i++) fake_drop(f, m->done[i]);
    if (m->has_leave && m->leave) {
        f->left = true;
        snprintf(f->reason, sizeof f->reason, "%s", m->reason ? m->reason : "");
    }
}

static void fake_hear(fake *f) {
    for (bool got = true; got;) {
        char kind;
        sh_buf b;
        sh_buf_init(&b, 0);
        CU_ASSERT_EQUAL_FATAL(sh_wire_recv(f->wire, NULL, &kind, &b, &got), SH_OK);
        if (got) {
            Shoal__ToRank *m = shoal__to_rank__unpack(NULL, b.len, b.data);
            CU_ASSERT_PTR_NOT_NULL_FATAL(m);
            fake_take(f, m);
            shoal__to_rank__free_unpacked(m, NULL);
            f->heard = sh_now();
        }
        sh_buf_release(&b);
    }
}

static void fake_compute(fake *f) {
    for (int i = 0; i < f->n; i++) {
        fake_seq *s = &f->seq[i];
        int to = s->made < s->max ? s->made + 1 + (int)(s->key % 3) : s->made;
        if (to > s->max) to = s->max;
        if (f->budget >= 0 && to - s->made > f->budget) to = s->made + f->budget;
        if (f->budget >= 0) f->budget -= to - s->made;
        s->made = to;
        if (s->sent == s->made) continue;
        fake_tokens(f, s, s->sent, s->made);
        if (f->loud) {
            fake_tokens(f, s, s->sent, s->made);
            fake_tokens(f, s, s->first, s->made);
        }
        s->sent = s->made;
        f->step++;
    }
}

static void fake_turn(fake *f) {
    bool readable;
    SH_IGNORE(sh_wire_poll(f->wire, -1, 2, &readable));
    fake_hear(f);
    if (f->mute || f->died) return;
    if (++f->turns % f->every == 0) fake_compute(f);
    if (f->welcomed && sh_now() - f->beat > 0.05) {
        Shoal__Heartbeat h = SHOAL__HEARTBEAT__INIT;
        h.step = f->step, h.busy = f->stuck;
        Shoal__FromRank m = SHOAL__FROM_RANK__INIT;
        m.heartbeat = &h;
        fake_send(f, &m);
        f->beat = sh_now();
    }
    if (sh_now() - f->heard > 0.2) fake_hello(f);
}

/* --- the client ----------------------------------------------------------------------------------------------------
 */

static FILE *file_of(const char *text, size_t n) {
    FILE *f = tmpfile();
    CU_ASSERT_PTR_NOT_NULL_FATAL(f);
    CU_ASSERT_EQUAL(fwrite(text, 1, n, f), n);
    rewind(f);
    return f;
}

/* Request number i: from 1. */
static void add_line(sh_buf *b, int i, int tokens) {
    SH_IGNORE(sh_buf_printf(
        b,
        "{\"custom_id\": \"r%d\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"model\": "
        "\"m\", \"prompt\": [%d, %d, 9], \"max_tokens\": %d, \"temperature\": 0, \"return_token_ids\": true%s}}\n",
        i, 300 + i % 100, 301 + i / 100, tokens, i % 3 == 0 ? ", \"logprobs\": 1" : ""));
}

static void make_lines(sh_buf *b, int n, int tokens) {
    sh_buf_init(b, 0);
    for (int i = 1; i <= n; i++) add_line(b, i, tokens);
}

static sh_status submit(const server *s, const char *name, const sh_buf *lines, const Shoal__JobOptions *o,
                        uint64_t *job) {
    sh_client *c = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_client_open(s->endpoint, NULL, 60000, &c), SH_OK);
    FILE *f = file_of((const char *)lines->data, lines->len);
    sh_status st = sh_client_submit(c, name, o, f, job);
    fclose(f);
    sh_client_close(&c);
    return st;
}

typedef struct counts {
    char state[20], group[20], fault[300], failure[300];
    uint64_t total, done, errors, in, out;
    int groups;
} counts;

static counts status(const server *s, uint64_t job) {
    counts k = {0};
    sh_client *c = NULL;
    Shoal__Request q = SHOAL__REQUEST__INIT;
    q.has_job = true, q.job = job;
    Shoal__JobRequest r = SHOAL__JOB_REQUEST__INIT;
    r.status = &q;
    Shoal__JobReply *reply = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_client_open(s->endpoint, NULL, 60000, &c), SH_OK);
    sh_status st = sh_client_call(c, &r, &reply);
    sh_client_close(&c);
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    const Shoal__JobCounts *j = reply->counts[0];
    snprintf(k.state, sizeof k.state, "%s", j->state);
    if (j->failure) snprintf(k.failure, sizeof k.failure, "%s", j->failure);
    k.total = j->total, k.done = j->done, k.errors = j->errors, k.in = j->tokens_in, k.out = j->tokens_out;
    k.groups = (int)reply->n_group;
    if (k.groups) {
        const Shoal__GroupState *g = reply->group[k.groups - 1];
        snprintf(k.group, sizeof k.group, "%s", g->state);
        if (g->fault) snprintf(k.fault, sizeof k.fault, "%s", g->fault);
    }
    shoal__job_reply__free_unpacked(reply, NULL);
    return k;
}

/* What rows are compared by: everything but the time of making. */
static void add_row(json_t *rows, const char *text, size_t len) {
    json_t *row = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_json_parse("row", text, len, &row), SH_OK);
    json_t *body = json_object_get(json_object_get(row, "response"), "body");
    if (body) json_object_del(body, "created");
    const json_t *id = json_object_get(row, "custom_id"),
                 *line = json_object_get(json_object_get(row, "error"), "line");
    char key[64];
    if (json_is_string(id))
        snprintf(key, sizeof key, "%s", json_string_value(id));
    else
        snprintf(key, sizeof key, "line %d", (int)json_integer_value(line));
    if (json_object_get(rows, key)) fprintf(stderr, "\n%s: twice\n", key);
    CU_ASSERT_PTR_NULL(json_object_get(rows, key));
    json_object_set_new(rows, key, row);
}

/* All rows of a job by custom_id or "line N", fetched a few at a time. */
static json_t *rows_of(const server *s, uint64_t job) {
    json_t *rows = json_object();
    sh_client *c = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_client_open(s->endpoint, NULL, 60000, &c), SH_OK);
    Shoal__ResultsRequest q = SHOAL__RESULTS_REQUEST__INIT;
    q.job = job, q.has_most = true, q.most = 7;
    for (bool more = true; more;) {
        Shoal__JobRequest r = SHOAL__JOB_REQUEST__INIT;
        r.results = &q;
        Shoal__JobReply *reply = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_client_call(c, &r, &reply), SH_OK);
        for (size_t i = 0; i < reply->n_row; i++) {
            CU_ASSERT(reply->row[i]->cursor > q.after);
            q.after = reply->row[i]->cursor;
            add_row(rows, (const char *)reply->row[i]->text.data, reply->row[i]->text.len);
        }
        CU_ASSERT(reply->n_row <= 7 && (!reply->more || reply->n_row == 7));
        more = reply->more;
        shoal__job_reply__free_unpacked(reply, NULL);
    }
    sh_client_close(&c);
    return rows;
}

static bool wait_done(const server *s, fake *f, uint64_t job, const char *state, double seconds) {
    for (double end = sh_now() + seconds; sh_now() < end;) {
        for (int i = 0; f && i < 10; i++) fake_turn(f);
        counts k = status(s, job);
        if (strcmp(k.state, state) == 0 && k.done == k.total) return true;
        if (!f) sh_sleep(0.01);
    }
    return false;
}

static json_t *expected; /* rows of the undisturbed run of make_lines(60, 40) */

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
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("lost")}, NULL));
    sh_buf lines;
    make_lines(&lines, 60, 40);
    uint64_t job = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
    fake f;
    fake_open(&f, s.endpoint, "first");
    f.budget = 700;
    f.loud = true;
    while (f.budget > 0) fake_turn(&f);
    fake_fault(&f, "tensor x: file y is damaged");
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
    sh_buf_release(&lines);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_wire_close(&f.wire);
}

/* A leader's connection breaks and takes work along that was on its way: over the new one it gets that work again. */
static void test_lost_work(void) {
    server s;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("again")}, NULL));
    sh_buf lines;
    make_lines(&lines, 60, 40);
    uint64_t job = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
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
    sh_buf_release(&lines);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    sh_wire_close(&f.wire);
}

/* The coordinator is killed again and again while a group works; the group goes on and reconnects, or is gone as well.
 */
static void test_killed_at_work(void) {
    const char *store = in_dir("killed");
    server s;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = store}, NULL));
    sh_buf lines;
    make_lines(&lines, 60, 40);
    uint64_t job = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
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
    sh_buf_release(&lines);
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
    old = (fake){.wire = w, .welcomed = true, .epoch = 1, .budget = -1, .every = 1, .name = "g"};
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
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("slow")}, NULL));
    sh_buf lines;
    make_lines(&lines, 60, 40);
    uint64_t job = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
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
    CU_ASSERT_EQUAL(status(&s, job).out, 2400);
    sh_buf_release(&lines);
    CU_ASSERT_EQUAL(server_end(&s, SIGTERM), SH_OK);
    for (int i = 0; i < 2; i++) sh_wire_close(&f[i].wire);
}

/* A group that comes late to a short job gets half of what the first has not begun, though nobody knows its pace. */
static void test_late_group(void) {
    server s;
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("late")}, NULL));
    sh_buf lines;
    make_lines(&lines, 8, 40);
    uint64_t job = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
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
    sh_buf_release(&lines);
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
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("poison"), .run = true}, NULL));
    sh_buf lines;
    make_lines(&lines, 60, 40);
    uint64_t job = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
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
    sh_buf_release(&lines);
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
    CU_ASSERT_FATAL(server_start(&s, &(server_options){.store = in_dir("load"), .load_ms = 500}, NULL));
    sh_buf lines;
    make_lines(&lines, 3, 5);
    uint64_t job = 0;
    CU_ASSERT_EQUAL_FATAL(submit(&s, "j", &lines, NULL, &job), SH_OK);
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
    sh_buf_release(&lines);
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
    if (argc == 13 && strcmp(argv[1], "--server") == 0) return server_main(argv + 2);
    snprintf(dir, sizeof dir, "/tmp/shoal-coord-XXXXXX");
    if (!mkdtemp(dir) || CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("coordinator", NULL, NULL);
    CU_add_test(s, "a job from start to end", test_plain);
    CU_add_test(s, "bad lines", test_bad_lines);
    CU_add_test(s, "lost groups, repeated tokens", test_lost_groups);
    CU_add_test(s, "work lost with a connection", test_lost_work);
    CU_add_test(s, "coordinator killed at work", test_killed_at_work);
    CU_add_test(s, "coordinator killed while lines arrive", test_killed_while_submitting);
    CU_add_test(s, "cancel", test_cancel);
    CU_add_test(s, "two incarnations", test_incarnations);
    CU_add_test(s, "a plan that cannot be", test_impossible_plan);
    CU_add_test(s, "disk full", test_disk_full);
    CU_add_test(s, "groups of two sizes", test_sizes);
    CU_add_test(s, "a slow group", test_slow_group);
    CU_add_test(s, "a late group", test_late_group);
    CU_add_test(s, "a request that ends groups", test_poison);
    CU_add_test(s, "groups that end by themselves", test_bad_groups);
    CU_add_test(s, "groups that do not load", test_slow_loading);
    CU_add_test(s, "counts of experts", test_routing);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    json_decref(expected);
    SH_IGNORE(sh_path_remove(dir));
    return failed != 0;
}
