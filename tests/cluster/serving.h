/*
 * For tests of the coordinator: it as a process of its own (the test program started anew), libshoal as its client, and
 * a fake group of one rank that makes up tokens as a function of prompt and place. Test code only.
 */
#ifndef SH_TESTS_SERVING_H
#define SH_TESTS_SERVING_H

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
static json_t *expected; /* rows of an undisturbed run */
static const char model[] = SH_SOURCE_DIR "/share/minnow";

static inline const char *in_dir(const char *name) {
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
static inline int server_main(char **arg) {
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

static inline void server_exec(const server_options *o, const char *endpoint, int fd) {
    char number[7][24];
    const long long value[7] = {fd,         o->run,   o->mode, (long long)o->seed, (long long)o->file_limit,
                                o->load_ms, o->groups};
    for (int i = 0; i < 7; i++) snprintf(number[i], sizeof number[i], "%lld", value[i]);
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that gives up leaves nothing behind */
    execl("/proc/self/exe", "server", "--server", endpoint, o->store, number[0], number[1], o->cuts ? o->cuts : "",
          number[2], number[3], number[4], number[5], number[6], o->routing ? o->routing : "", (char *)NULL);
    _exit(99);
}

/* false: it ended before it took requests; *status then is its exit status. */
static inline bool server_start(server *s, const server_options *o, int *status) {
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
static inline int server_end(server *s, int sig) {
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

enum { FAKE_SEQS = 64, FAKE_ORDER = 512 };

typedef struct fake_seq {
    uint64_t key, prompt;
    int first, made, sent, max; /* tokens [first, made) were made here */
    bool tops;
} fake_seq;

typedef struct fake {
    sh_wire *wire;
    char name[40];
    uint64_t epoch, step, weights;
    int pid, size;
    bool welcomed, ready, left, mute, stuck, loud; /* loud: sends every token twice, and once from the start */
    int budget;                                    /* tokens it may still make; −1: no limit */
    int kv_tokens, max_seqs, every;                /* every: makes tokens in each so many-th turn only */
    int turns, cancels;
    bool slow_to_load;
    const int32_t *poison; /* work whose prompt begins with this id kills it: it falls silent, `died` is set */
    bool died;
    int resumed; /* work that came with tokens */
    int works;
    uint64_t order[FAKE_ORDER]; /* keys as they came, the first of them */
    bool strict; /* as a leader: runs max_seqs at once, the oldest, a token each in a step; `step` counts these */
    double heard, beat;
    char reason[500];
    fake_seq seq[FAKE_SEQS];
    int n;
} fake;

static inline void fake_send(fake *f, const Shoal__FromRank *m) {
    uint8_t buf[65536];
    size_t n = shoal__from_rank__get_packed_size(m);
    CU_ASSERT_FATAL(n <= sizeof buf);
    shoal__from_rank__pack(m, buf);
    SH_IGNORE(sh_wire_send(f->wire, NULL, SH_WIRE_GROUP, buf, n));
}

static inline void fake_hello(fake *f) {
    Shoal__Hello h = SHOAL__HELLO__INIT;
    h.rank = 0, h.size = f->size, h.pid = f->pid;
    h.host = h.build = (char[]){"here"};
    h.group = f->name;
    h.has_epoch = f->welcomed;
    h.epoch = f->epoch;
    Shoal__FromRank m = SHOAL__FROM_RANK__INIT;
    m.hello = &h;
    fake_send(f, &m);
    f->heard = sh_now();
}

/* As process `pid`, or as this one. */
static inline void fake_open_as(fake *f, const char *endpoint, const char *name, int pid) {
    *f = (fake){.weights = 0xfeed, .pid = pid, .size = 1, .budget = -1, .kv_tokens = 4096, .max_seqs = 4, .every = 1};
    snprintf(f->name, sizeof f->name, "%s", name);
    CU_ASSERT_EQUAL_FATAL(sh_wire_connect(endpoint, NULL, &f->wire), SH_OK);
    fake_hello(f);
}

static inline void fake_open(fake *f, const char *endpoint, const char *name) {
    fake_open_as(f, endpoint, name, (int)getpid());
}

static inline void fake_fault(fake *f, const char *text) {
    Shoal__Fault x = SHOAL__FAULT__INIT;
    x.text = (char *)(uintptr_t)text;
    Shoal__FromRank m = SHOAL__FROM_RANK__INIT;
    m.fault = &x;
    fake_send(f, &m);
}

static inline int32_t fake_id(uint64_t prompt, int place) {
    return 300 + (int32_t)(sh_mix64(prompt ^ (uint64_t)place) % 500);
}

static inline float fake_logprob(uint64_t prompt, int place) {
    return -(float)(sh_mix64(prompt + 77 * (uint64_t)place) % 1000) / 256;
}

static inline void fake_tokens(fake *f, const fake_seq *s, int from, int to) {
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

static inline void fake_work(fake *f, const Shoal__Work *w) {
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
    if (f->works < FAKE_ORDER) f->order[f->works] = w->key;
    f->works++;
    if (f->poison && w->prompt[0] == *f->poison) f->died = true;
    f->seq[f->n++] = s;
}

static inline void fake_drop(fake *f, uint64_t key) {
    for (int i = 0; i < f->n; i++)
        if (f->seq[i].key == key) {
            memmove(f->seq + i, f->seq + i + 1, (size_t)(f->n - i - 1) * sizeof *f->seq);
            f->n--;
            i--;
        }
}

static inline void fake_take(fake *f, const Shoal__ToRank *m) {
    if (m->welcome) {
        CU_ASSERT_STRING_EQUAL(m->welcome->model, model);
        CU_ASSERT_EQUAL((int)m->welcome->plan->n_rank, f->size);
        f->epoch = m->welcome->epoch;
        f->welcomed = true;
        if (f->slow_to_load) return;
        for (int i = 0; i < f->n; i++) f->seq[i].sent = f->seq[i].first; /* everything again */
        Shoal__Ready r = SHOAL__READY__INIT;
        r.kv_tokens = f->kv_tokens, r.max_seqs = f->max_seqs, r.fingerprint = f->weights;
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

static inline void fake_hear(fake *f) {
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

/* What ended must be acknowledged before the next step: then what takes its place is here. */
static inline void fake_step(fake *f) {
    int running = 0;
    for (int i = 0; i < f->n; i++)
        if (f->seq[i].made == f->seq[i].max && f->seq[i].sent == f->seq[i].max) return;
    for (int i = 0; i < f->n && running < f->max_seqs; i++, running++) {
        fake_seq *s = &f->seq[i];
        fake_tokens(f, s, s->made, s->made + 1);
        s->sent = ++s->made;
    }
    f->step += running > 0;
}

static inline void fake_compute(fake *f) {
    if (f->strict) {
        fake_step(f);
        return;
    }
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

static inline void fake_turn(fake *f) {
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

static inline FILE *file_of(const char *text, size_t n) {
    FILE *f = tmpfile();
    CU_ASSERT_PTR_NOT_NULL_FATAL(f);
    CU_ASSERT_EQUAL(fwrite(text, 1, n, f), n);
    rewind(f);
    return f;
}

/* Request number i: from 1. */
static inline void add_line(sh_buf *b, int i, int tokens) {
    SH_IGNORE(sh_buf_printf(
        b,
        "{\"custom_id\": \"r%d\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"model\": "
        "\"m\", \"prompt\": [%d, %d, 9], \"max_tokens\": %d, \"temperature\": 0, \"return_token_ids\": true%s}}\n",
        i, 300 + i % 100, 301 + i / 100, tokens, i % 3 == 0 ? ", \"logprobs\": 1" : ""));
}

static inline void make_lines(sh_buf *b, int n, int tokens) {
    sh_buf_init(b, 0);
    for (int i = 1; i <= n; i++) add_line(b, i, tokens);
}

static inline sh_status submit(const server *s, const char *name, const sh_buf *lines, const Shoal__JobOptions *o,
                               uint64_t *job) {
    sh_client *c = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_client_open(s->endpoint, NULL, 60000, &c), SH_OK);
    FILE *f = file_of((const char *)lines->data, lines->len);
    sh_status st = sh_client_submit(c, name, o, f, job);
    fclose(f);
    sh_client_close(&c);
    return st;
}

/* A server with a job "j" of n lines with so many tokens each; its number. */
static inline uint64_t server_begin(server *s, const server_options *o, int n, int tokens) {
    sh_buf lines;
    uint64_t job = 0;
    CU_ASSERT_FATAL(server_start(s, o, NULL));
    make_lines(&lines, n, tokens);
    CU_ASSERT_EQUAL_FATAL(submit(s, "j", &lines, NULL, &job), SH_OK);
    sh_buf_release(&lines);
    return job;
}

typedef struct counts {
    char state[20], group[20], fault[300], failure[300];
    uint64_t total, done, errors, in, out;
    int groups;
} counts;

static inline counts status(const server *s, uint64_t job) {
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
static inline void add_row(json_t *rows, const char *text, size_t len) {
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
static inline json_t *rows_of(const server *s, uint64_t job) {
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

static inline bool wait_done(const server *s, fake *f, uint64_t job, const char *state, double seconds) {
    for (double end = sh_now() + seconds; sh_now() < end;) {
        for (int i = 0; f && i < 10; i++) fake_turn(f);
        counts k = status(s, job);
        if (strcmp(k.state, state) == 0 && k.done == k.total) return true;
        if (!f) sh_sleep(0.01);
    }
    return false;
}

/* --- the program ---------------------------------------------------------------------------------------------------
 */

/* main of such a test: the coordinator where it was started as that, else the tests, in a folder of their own. */
static inline int serving_main(int argc, char **argv, const char *suite, CU_TestInfo *tests) {
    if (argc == 13 && strcmp(argv[1], "--server") == 0) return server_main(argv + 2);
    snprintf(dir, sizeof dir, "/tmp/shoal-serving-XXXXXX");
    if (!mkdtemp(dir) || CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_SuiteInfo suites[] = {{.pName = suite, .pTests = tests}, CU_SUITE_INFO_NULL};
    if (CU_register_suites(suites) != CUE_SUCCESS) return 1;
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    json_decref(expected);
    SH_IGNORE(sh_path_remove(dir));
    return failed != 0;
}

#endif
