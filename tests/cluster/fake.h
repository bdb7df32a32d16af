/*
 * A coordinator for tests: hands one group its plan and its work over ipc, collects the tokens, and can be rude in ways
 * that a real one is not (vanish, come back with a new epoch). Ranks are threads on the local link, or processes that
 * the test starts. Test code only.
 */
#ifndef SH_TESTS_FAKE_H
#define SH_TESTS_FAKE_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "common/clock.h"
#include "common/file.h"
#include "common/json.h"
#include "partition/plan.h"
#include "proto/group.pb-c.h"
#include "proto/wire.h"
#include "worker/worker.h"

static int failures, checks;
#define CHECK(cond, ...)                                                                                               \
    do {                                                                                                               \
        checks++;                                                                                                      \
        if (!(cond)) {                                                                                                 \
            failures++;                                                                                                \
            fprintf(stderr, "FAILED %s:%d: ", __FILE__, __LINE__);                                                     \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
        }                                                                                                              \
    } while (0)
#define MUST(expr)                                                                                                     \
    do {                                                                                                               \
        if ((expr) != SH_OK) {                                                                                         \
            fprintf(stderr, "%s:%d: %s\n%s\n", __FILE__, __LINE__, sh_error_text(), sh_error_trail());                 \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

enum { FAKE_RANKS = 16, FAKE_WORK = 256 };

/* One request and all that is known about its answer. Scores and tokens are kept as bytes of (place, id,
 * log-probability, alternatives), so that comparing answers is comparing bytes. */
typedef struct fake_work {
    int32_t *prompt;
    int n_prompt;
    int32_t given[64]; /* generated in an earlier life */
    int n_given, scored;
    Shoal__Sampling sampling;
    ProtobufCBinaryData stop[4];
    sh_buf tokens, scores;
    int32_t ids[2048];
    int n, n_scores, finish, text_len;
    bool done, rejected;
    char reason[256];
} fake_work;

typedef struct fake_rank {
    pthread_t thread;
    sh_link *link;
    sh_worker_options o;
    sh_status status;
    char error[600];
    sh_wire_peer peer;
    bool known;
    uint64_t step;
    int beats, hellos, pid;
} fake_rank;

typedef struct fake {
    char dir[64], endpoint[96], model[512];
    sh_wire *wire;
    int n;
    fake_rank rank[FAKE_RANKS];
    Shoal__PlanRank layer[FAKE_RANKS], *layers[FAKE_RANKS];
    Shoal__Plan plan, *divided;
    uint64_t epoch;
    int heartbeat_ms, orphan_ms;
    uint64_t trace_steps; /* that ranks shall tell the timeline of */
    fake_work *work;      /* [FAKE_WORK] */
    int n_work;
    bool ready, all_greeted, mute;
    int64_t kv_total;
    int kv_tokens, running_most;
    char fault[1024];
    int prefill;                 /* ranks that fake_divide adds to read prompts */
    void (*on_link)(sh_link *l); /* sees each local link before the ranks start; NULL: nobody */
} fake;

/* A group of n ranks with layers [cut[i], cut[i+1]); cut has n + 1 entries. */
static inline void fake_open(fake *f, const char *model, int n, const int *cut, const char *mode, const char *kv) {
    *f = (fake){.n = n, .epoch = 7, .heartbeat_ms = 100, .orphan_ms = 60000};
    snprintf(f->dir, sizeof f->dir, "/tmp/shoal-test-XXXXXX");
    if (!mkdtemp(f->dir)) exit(1);
    snprintf(f->endpoint, sizeof f->endpoint, "ipc://%s/run/s", f->dir);
    snprintf(f->model, sizeof f->model, "%s", model);
    MUST(sh_wire_listen(f->endpoint, NULL, &f->wire));
    f->work = calloc(FAKE_WORK, sizeof *f->work);
    shoal__plan__init(&f->plan);
    for (int i = 0; i < n; i++) {
        shoal__plan_rank__init(&f->layer[i]);
        f->layer[i].first = cut[i];
        f->layer[i].last = cut[i + 1];
        f->layers[i] = &f->layer[i];
    }
    f->plan.n_rank = (size_t)n;
    f->plan.rank = f->layers;
    f->plan.mode = (char *)mode;
    f->plan.kv = (char *)kv;
    f->plan.threads = 1;
    f->plan.max_seqs = 8;
    f->plan.chunk = 64;
    f->plan.max_context = 512;
}

/* Before the ranks start: each of the n stages is divided over ep · tp · cp ranks, and f->prefill more read prompts. */
static inline void fake_divide(fake *f, int ep, int tp, int cp) {
    static sh_config c;
    char cuts[256] = "";
    for (int i = 1, at = 0; i < f->n; i++)
        at += snprintf(cuts + at, sizeof cuts - (size_t)at, "%s%d", i > 1 ? "," : "", f->layer[i].first);
    MUST(sh_config_load(f->model, &c));
    sh_plan_request r = {
        .cuts = cuts, .ep = ep, .tp = tp, .cp = cp, .max_seqs = f->plan.max_seqs, .prefill = f->prefill};
    MUST(sh_plan_make(&c, &r, &f->divided));
    f->n = f->n * ep * tp * cp + f->prefill;
    f->plan.has_prefill = true;
    f->plan.prefill = f->prefill;
    f->plan.n_rank = f->divided->n_rank;
    f->plan.rank = f->divided->rank;
    f->plan.ep = ep;
    f->plan.tp = tp;
    f->plan.cp = cp;
    f->plan.has_ep = f->plan.has_tp = f->plan.has_cp = 1;
}

static void *fake_rank_main(void *arg) {
    fake_rank *r = arg;
    r->status = sh_worker_run(r->link, &r->o);
    snprintf(r->error, sizeof r->error, "%s", sh_error_text());
    sh_link_destroy(&r->link);
    return NULL;
}

static inline void fake_start_threads(fake *f) {
    sh_link *links[FAKE_RANKS];
    MUST(sh_link_local_create(f->n, links));
    for (int i = 0; i < f->n && f->on_link; i++) f->on_link(links[i]);
    for (int i = 0; i < f->n; i++) {
        f->rank[i].link = links[i];
        f->rank[i].o = (sh_worker_options){.endpoint = f->endpoint, .group = "test"};
        if (pthread_create(&f->rank[i].thread, NULL, fake_rank_main, &f->rank[i])) exit(1);
    }
}

/* ---- talking --------------------------------------------------------------------------------------------------------
 */

static inline void fake_send(fake *f, int rank, const Shoal__ToRank *m) {
    size_t n = shoal__to_rank__get_packed_size(m);
    uint8_t *p = malloc(n + 1);
    shoal__to_rank__pack(m, p);
    SH_IGNORE(sh_wire_send(f->wire, &f->rank[rank].peer, SH_WIRE_GROUP, p, n));
    free(p);
}

static inline void fake_welcome(fake *f, int rank) {
    Shoal__Welcome w = SHOAL__WELCOME__INIT;
    w.epoch = f->epoch;
    w.model = f->model;
    w.plan = &f->plan;
    w.heartbeat_ms = f->heartbeat_ms;
    w.has_trace_steps = f->trace_steps > 0;
    w.trace_steps = f->trace_steps;
    w.orphan_ms = f->orphan_ms;
    Shoal__ToRank m = SHOAL__TO_RANK__INIT;
    m.welcome = &w;
    fake_send(f, rank, &m);
}

static inline fake_work *fake_add(fake *f, const int32_t *prompt, int n, int max_tokens) {
    fake_work *w = &f->work[f->n_work++];
    w->prompt = malloc((size_t)n * sizeof *prompt);
    memcpy(w->prompt, prompt, (size_t)n * sizeof *prompt);
    w->n_prompt = n;
    shoal__sampling__init(&w->sampling);
    w->sampling.top_p = 1;
    w->sampling.max_tokens = max_tokens;
    w->sampling.logprobs = 3;
    w->text_len = -1;
    return w;
}

/* Sends request i; its key is 1000 + i. */
static inline void fake_send_work(fake *f, int i) {
    fake_work *w = &f->work[i];
    Shoal__Work work = SHOAL__WORK__INIT, *list[1] = {&work};
    work.key = 1000 + (uint64_t)i;
    work.prompt = w->prompt;
    work.n_prompt = (size_t)w->n_prompt;
    work.generated = w->given;
    work.n_generated = (size_t)w->n_given;
    work.has_scored = w->scored > 0;
    work.scored = w->scored;
    work.sampling = &w->sampling;
    Shoal__ToRank m = SHOAL__TO_RANK__INIT;
    m.n_work = 1;
    m.work = list;
    fake_send(f, 0, &m);
}

static inline void fake_send_key(fake *f, int i, bool cancel) {
    uint64_t key[1] = {1000 + (uint64_t)i};
    Shoal__ToRank m = SHOAL__TO_RANK__INIT;
    *(cancel ? &m.n_cancel : &m.n_done) = 1;
    *(cancel ? &m.cancel : &m.done) = key;
    fake_send(f, 0, &m);
}

static inline void fake_keep(sh_buf *to, int place, int id, const Shoal__Tokens *t, size_t i) {
    int32_t fixed[2] = {place, id};
    float lp = i < t->n_logprob ? t->logprob[i] : 0;
    MUST(sh_buf_add(to, fixed, sizeof fixed));
    MUST(sh_buf_add(to, &lp, sizeof lp));
    if (i >= t->n_top) return;
    MUST(sh_buf_add(to, t->top[i]->id, t->top[i]->n_id * sizeof(int32_t)));
    MUST(sh_buf_add(to, t->top[i]->logprob, t->top[i]->n_logprob * sizeof(float)));
}

/* Takes places that are not known yet, as the store does; a gap is an error of the group. */
static inline void fake_take_tokens(fake *f, const Shoal__Tokens *t) {
    if (t->key < 1000 || t->key >= 1000 + (uint64_t)f->n_work) {
        CHECK(false, "tokens of key %llu", (unsigned long long)t->key);
        return;
    }
    fake_work *w = &f->work[t->key - 1000];
    bool score = t->has_score && t->score;
    int have = score ? w->scored + w->n_scores + 1 : w->n_given + w->n;
    CHECK(t->offset <= have, "%s from %d: %d are there", score ? "scores" : "tokens", t->offset, have);
    for (size_t i = 0; i < t->n_id; i++) {
        int place = t->offset + (int)i;
        if (place < have) continue;
        fake_keep(score ? &w->scores : &w->tokens, place, score ? 0 : t->id[i], t, i);
        if (score)
            w->n_scores++;
        else
            w->ids[w->n++] = t->id[i];
    }
    if (t->has_finish) {
        w->finish = t->finish;
        w->text_len = t->has_text_len ? t->text_len : -1;
        w->done = true;
    }
}

static inline int fake_rank_of(const fake *f, const sh_wire_peer *p) {
    for (int i = 0; i < f->n; i++)
        if (f->rank[i].known && f->rank[i].peer.len == p->len && !memcmp(f->rank[i].peer.id, p->id, p->len)) return i;
    return -1;
}

static inline void fake_take(fake *f, const sh_wire_peer *from, const Shoal__FromRank *m) {
    if (m->hello && m->hello->rank >= 0 && m->hello->rank < f->n) {
        fake_rank *r = &f->rank[m->hello->rank];
        r->peer = *from;
        r->known = true;
        r->hellos++;
        r->pid = m->hello->pid;
        fake_welcome(f, m->hello->rank);
    }
    int rank = fake_rank_of(f, from);
    if (rank < 0) return; /* a stranger until it says hello */
    if (m->ready) {
        f->ready = true;
        f->kv_tokens = m->ready->kv_tokens;
        f->kv_total = m->ready->kv_total;
    }
    if (m->heartbeat) {
        f->rank[rank].beats++;
        f->rank[rank].step = m->heartbeat->step;
        if (m->heartbeat->has_running && m->heartbeat->running > f->running_most)
            f->running_most = m->heartbeat->running;
        Shoal__ToRank answer = SHOAL__TO_RANK__INIT;
        answer.has_heartbeat = answer.heartbeat = true;
        fake_send(f, rank, &answer);
    }
    for (size_t i = 0; i < m->n_tokens; i++) fake_take_tokens(f, m->tokens[i]);
    for (size_t i = 0; i < m->n_rejected; i++) {
        fake_work *w = &f->work[m->rejected[i]->key - 1000];
        w->done = w->rejected = true;
        snprintf(w->reason, sizeof w->reason, "%s", m->rejected[i]->reason);
    }
    if (m->fault) snprintf(f->fault, sizeof f->fault, "%s", m->fault->text);
}

/* Hears everything that has come; waits up to ms for the first. */
static inline void fake_pump(fake *f, int ms) {
    bool readable = false, got = true;
    sh_buf msg;
    sh_buf_init(&msg, 0);
    if (f->mute) {
        sh_sleep(ms * 1e-3);
        return;
    }
    MUST(sh_wire_poll(f->wire, -1, ms, &readable));
    while (got) {
        sh_wire_peer from;
        char kind = 0;
        MUST(sh_wire_recv(f->wire, &from, &kind, &msg, &got));
        if (!got) break;
        Shoal__FromRank *m = shoal__from_rank__unpack(NULL, msg.len, msg.data);
        CHECK(m != NULL, "a message that is no FromRank");
        if (m) fake_take(f, &from, m);
        if (m) shoal__from_rank__free_unpacked(m, NULL);
    }
    sh_buf_release(&msg);
}

static inline bool fake_all_done(const fake *f) {
    for (int i = 0; i < f->n_work; i++)
        if (!f->work[i].done) return false;
    return true;
}

static inline bool fake_wait_ready(fake *f, double seconds) {
    for (double end = sh_now() + seconds; !f->ready && !f->fault[0] && sh_now() < end;) fake_pump(f, 10);
    return f->ready;
}

/* Sends all work and waits for all answers. */
static inline bool fake_run(fake *f, double seconds) {
    if (!fake_wait_ready(f, 60)) return false;
    for (int i = 0; i < f->n_work; i++) fake_send_work(f, i);
    for (double end = sh_now() + seconds; !fake_all_done(f) && !f->fault[0] && sh_now() < end;) fake_pump(f, 10);
    return fake_all_done(f);
}

static inline void fake_leave(fake *f) {
    Shoal__ToRank m = SHOAL__TO_RANK__INIT;
    m.has_leave = m.leave = true;
    m.reason = (char *)"the test is over";
    for (int i = 0; i < f->n; i++)
        if (f->rank[i].known) fake_send(f, i, &m);
}

static inline void fake_join(fake *f) {
    for (int i = 0; i < f->n; i++) pthread_join(f->rank[i].thread, NULL);
}

static inline void fake_close(fake *f) {
    sh_wire_close(&f->wire);
    sh_plan_free(&f->divided);
    for (int i = 0; i < f->n_work; i++) {
        free(f->work[i].prompt);
        sh_buf_release(&f->work[i].tokens);
        sh_buf_release(&f->work[i].scores);
    }
    free(f->work);
    SH_IGNORE(sh_path_remove(f->dir));
}

static inline bool fake_same(const fake_work *a, const fake_work *b) {
    return a->n == b->n && a->n_scores == b->n_scores && a->finish == b->finish && a->text_len == b->text_len &&
           a->rejected == b->rejected && a->tokens.len == b->tokens.len && a->scores.len == b->scores.len &&
           (a->tokens.len == 0 || !memcmp(a->tokens.data, b->tokens.data, a->tokens.len)) &&
           (a->scores.len == 0 || !memcmp(a->scores.data, b->scores.data, a->scores.len));
}

/* ids of a JSON array of numbers. */
static inline int fake_ids(const json_t *array, int32_t *out, int max) {
    int n = (int)json_array_size(array);
    for (int i = 0; i < n && i < max; i++) out[i] = (int32_t)json_integer_value(json_array_get(array, (size_t)i));
    return n < max ? n : max;
}

#endif
