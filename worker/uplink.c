/* The thread that talks to the coordinator. See uplink.h. Fields of sh_uplink say who may touch them. */
#include "worker/uplink.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/mapped.h"
#include "common/mem.h"
#include "proto/wire.h"
#include "worker/ledger.h"

enum {
    OUTBOX = 8192, /* tokens on their way from the main thread */
    TOKENS_PER_MESSAGE = 4096,
    TICK_MS = 10, /* tokens wait at most this long, so that they travel in company */
    FIRST_WAIT_MS = 120000,
    FIRST_BEAT_MS = 1000, /* pace of hellos before the welcome says otherwise */
    GRACE_MS = 10000      /* a main thread that does not leave in this time is stuck */
};

typedef struct out_item {
    uint64_t key;
    bool reject;
    union {
        sh_token token;
        char reason[sizeof(sh_token)];
    };
} out_item;

typedef struct in_item {
    struct in_item *next;
    sh_inbox item;
} in_item;

struct sh_uplink {
    /* set before the thread starts */
    sh_uplink_options o;
    char host[128];
    int wake; /* eventfd: stop */
    pthread_t thread;

    /* both threads, under lock */
    pthread_mutex_t lock;
    in_item *in_head, *in_tail;
    out_item *out; /* ring [OUTBOX] */
    int out_at, out_n;
    sh_beat beat;
    sh_load_times load;
    Shoal__Routing routing; /* n_layer 0: nothing was counted */
    bool routing_news;
    bool ready, stop;
    Shoal__Ready ready_message;
    char *ready_note;
    sh_trace *trace; /* set once; the uplink thread's from then on */
    int vocab;
    char fault[1024], reason[256];
    bool has_fault, lasting;
    atomic_int state, n_in;
    atomic_bool welcomed;
    _Atomic uint64_t asked; /* number of the last report that is wanted */

    /* the uplink thread alone (welcome: written before `welcomed`, read-only afterwards) */
    sh_wire *wire;
    sh_ledger *ledger;
    sh_buf buf, message;
    Shoal__ToRank *first; /* holds the first welcome */
    const Shoal__Welcome *welcome;
    uint64_t epoch;
    double heard, said_hello, said_beat, ended;
    uint64_t said_shared; /* of the last heartbeat, as the next two */
    uint64_t said_report;
    double said_load;
    int beat_ms, orphan_ms;
    bool said_ready;
    bool mute; /* said hello again: no tokens before the welcome, or a new coordinator would see a gap */
};

/* ---- the thread: sending --------------------------------------------------------------------------------------------
 */

static sh_status send_packed(sh_uplink *u, const Shoal__FromRank *m) {
    sh_buf_clear(&u->buf);
    SH_TRY(sh_buf_reserve(&u->buf, shoal__from_rank__get_packed_size(m)));
    u->buf.len = shoal__from_rank__pack(m, u->buf.data);
    return sh_wire_send(u->wire, NULL, SH_WIRE_GROUP, u->buf.data, u->buf.len);
}

static sh_status say_hello(sh_uplink *u) {
    Shoal__Hello h = SHOAL__HELLO__INIT;
    h.rank = u->o.rank;
    h.size = u->o.size;
    h.pid = (int32_t)getpid();
    h.host = u->host;
    h.group = (char *)u->o.group;
    h.has_epoch = atomic_load(&u->welcomed);
    h.epoch = u->epoch;
    h.build = (char *)"shoal";
    Shoal__FromRank m = SHOAL__FROM_RANK__INIT;
    m.hello = &h;
    u->said_hello = sh_now();
    u->mute = true;
    return send_packed(u, &m);
}

static sh_status say_ready(sh_uplink *u) {
    Shoal__Ready r = SHOAL__READY__INIT;
    pthread_mutex_lock(&u->lock);
    bool ready = u->ready;
    if (ready) r = u->ready_message;
    pthread_mutex_unlock(&u->lock);
    if (!ready) return SH_OK;
    u->said_ready = true;
    char *note[1] = {u->ready_note};
    r.n_note = u->ready_note ? 1 : 0;
    r.note = note;
    Shoal__FromRank m = SHOAL__FROM_RANK__INIT;
    m.ready = &r;
    return send_packed(u, &m);
}

/* What the times say of links and experts. */
static void fill_traffic(Shoal__StageTimes *t, const sh_beat *b) {
    t->has_exposed_global = t->has_exposed_sliding = t->has_travel_global = t->has_travel_sliding = true;
    t->exposed_global = b->exposed[SH_KV_GLOBAL], t->exposed_sliding = b->exposed[SH_KV_SLIDING];
    t->travel_global = b->travel[SH_KV_GLOBAL], t->travel_sliding = b->travel[SH_KV_SLIDING];
    t->has_sent_cuts = t->has_sent_experts = t->has_sent_tensor = t->has_sent_context = t->has_sent_shards = true;
    t->sent_cuts = b->sent_by_tag[SH_TAG_BATCH], t->sent_experts = b->sent_by_tag[SH_TAG_EXPERTS];
    t->sent_tensor = b->sent_by_tag[SH_TAG_TENSOR], t->sent_context = b->sent_by_tag[SH_TAG_CONTEXT];
    t->sent_shards = b->sent_by_tag[SH_TAG_SHARD];
    t->has_expert_rows = true;
    t->expert_rows = b->expert_rows;
    t->has_shared_rows = b->leader;
    t->shared_rows = b->shared_rows;
}

static void fill_load(Shoal__StageTimes *t, const sh_load_times *l) {
    t->has_load_seconds = t->has_load_bytes = t->has_load_total = t->has_load_reading = t->has_load_packing = true;
    t->load_seconds = l->seconds, t->load_reading = l->reading, t->load_packing = l->packing;
    t->load_bytes = l->bytes, t->load_total = l->total;
    t->has_load_received = t->has_load_exchange = l->received > 0 || l->exchange > 0;
    t->load_received = l->received, t->load_exchange = l->exchange;
}

static sh_trace *trace_of(sh_uplink *u) {
    pthread_mutex_lock(&u->lock);
    sh_trace *x = u->trace;
    pthread_mutex_unlock(&u->lock);
    return x;
}

static sh_status say_beat(sh_uplink *u) {
    pthread_mutex_lock(&u->lock);
    sh_beat b = u->beat;
    sh_load_times load = u->load;
    pthread_mutex_unlock(&u->lock);
    Shoal__StageTimes t = SHOAL__STAGE_TIMES__INIT;
    t.rank = u->o.rank;
    t.has_weights = t.has_attention = t.has_experts = t.has_exchange = t.has_other = t.has_idle = true;
    t.weights = b.weights, t.attention = b.attention, t.experts = b.experts;
    t.exchange = b.exchange, t.other = b.other, t.idle = b.idle;
    t.has_bytes = t.has_steps = t.has_sent = true;
    t.bytes = b.bytes, t.steps = b.steps, t.sent = b.sent;
    fill_traffic(&t, &b);
    fill_load(&t, &load);
    Shoal__Heartbeat h = SHOAL__HEARTBEAT__INIT;
    h.step = b.step;
    h.busy = b.busy;
    h.times = &t;
    h.has_running = h.has_waiting = h.has_kv_free = b.leader;
    h.running = b.running, h.waiting = b.waiting, h.kv_free = b.kv_free;
    sh_trace *trace = trace_of(u);
    bool more = trace && sh_trace_is_full(trace);
    if (trace) h.trace = sh_trace_next(trace);
    h.has_report = b.report && !more;
    h.report = b.report;
    Shoal__FromRank m = SHOAL__FROM_RANK__INIT;
    m.heartbeat = &h;
    u->said_beat = sh_now();
    u->said_shared = b.shared_rows;
    u->said_load = load.seconds;
    pthread_mutex_lock(&u->lock); /* the counts are read while the message is packed */
    if (u->routing_news) h.routing = &u->routing;
    sh_status st = send_packed(u, &m);
    if (st == SH_OK) {
        u->routing_news = false;
        if (h.has_report) u->said_report = b.report;
    }
    pthread_mutex_unlock(&u->lock);
    if (st != SH_OK && h.trace) sh_trace_lost(trace);
    return st;
}

static sh_status say_rejected(sh_uplink *u, uint64_t key, const char *reason) {
    Shoal__Rejected r = SHOAL__REJECTED__INIT, *list[1] = {&r};
    r.key = key;
    r.reason = (char *)reason;
    Shoal__FromRank m = SHOAL__FROM_RANK__INIT;
    m.n_rejected = 1;
    m.rejected = list;
    sh_ledger_forget(u->ledger, key);
    return send_packed(u, &m);
}

/* With the ends of sequences goes what they shared: the last one may be the end of the job, and no heartbeat is heard
 * any more. */
static sh_status say_shared(sh_uplink *u) {
    pthread_mutex_lock(&u->lock);
    bool news = u->beat.shared_rows != u->said_shared;
    pthread_mutex_unlock(&u->lock);
    return news ? say_beat(u) : SH_OK;
}

/* What loading took is told when it is over: a job of a moment may end before the next heartbeat is due. */
static bool has_loaded(sh_uplink *u) {
    pthread_mutex_lock(&u->lock);
    bool news = u->load.total > 0 && u->load.bytes == u->load.total && u->load.seconds > u->said_load;
    pthread_mutex_unlock(&u->lock);
    return news;
}

/* The main thread has answered: the coordinator waits for it. */
static bool has_report(sh_uplink *u) {
    pthread_mutex_lock(&u->lock);
    bool news = u->beat.report != u->said_report;
    pthread_mutex_unlock(&u->lock);
    return news;
}

/* Moves what the main thread has put out into the ledger, and all that is unsent onto the wire. */
static sh_status send_tokens(sh_uplink *u) {
    bool ends = false;
    for (;;) {
        out_item item;
        pthread_mutex_lock(&u->lock);
        bool any = u->out_n > 0;
        if (any) {
            item = u->out[u->out_at];
            u->out_at = (u->out_at + 1) % OUTBOX;
            u->out_n--;
        }
        pthread_mutex_unlock(&u->lock);
        if (!any) break;
        if (item.reject)
            SH_TRY(say_rejected(u, item.key, item.reason));
        else
            SH_TRY(sh_ledger_add(u->ledger, item.key, &item.token));
        ends = ends || (!item.reject && item.token.finish != SH_FINISH_NONE);
    }
    if (ends && !u->mute) SH_TRY(say_shared(u));
    while (!u->mute) {
        sh_buf_clear(&u->buf);
        SH_TRY(sh_ledger_pack(u->ledger, TOKENS_PER_MESSAGE, &u->buf));
        if (u->buf.len == 0) break;
        SH_TRY(sh_wire_send(u->wire, NULL, SH_WIRE_GROUP, u->buf.data, u->buf.len));
    }
    return SH_OK;
}

/* ---- the thread: hearing
 * --------------------------------------------------------------------------------------------- */

static void end_service(sh_uplink *u, sh_uplink_state why, const char *reason) {
    if (atomic_load(&u->state) != SH_UPLINK_SERVING) return;
    pthread_mutex_lock(&u->lock);
    snprintf(u->reason, sizeof u->reason, "%s", reason ? reason : "");
    pthread_mutex_unlock(&u->lock);
    u->ended = sh_now();
    atomic_store(&u->state, why);
}

/* Told to leave in the middle of something long: no fault. */
static void die(const sh_uplink *u) {
    _exit(atomic_load(&u->state) == SH_UPLINK_LEAVE ? 0 : 3);
}

static sh_status push_inbox(sh_uplink *u, const sh_inbox *item) {
    in_item *n = calloc(1, sizeof *n);
    if (!n) SH_FAIL(SH_EMEMORY, "no memory for work");
    n->item = *item;
    pthread_mutex_lock(&u->lock);
    if (u->in_tail)
        u->in_tail->next = n;
    else
        u->in_head = n;
    u->in_tail = n;
    pthread_mutex_unlock(&u->lock);
    atomic_fetch_add(&u->n_in, 1);
    return SH_OK;
}

static sh_status copy_ids(const int32_t *from, size_t n, const char *what, int32_t *to, int32_t *n_to) {
    if (n > SH_MAX_STOP_IDS) SH_FAIL(SH_EINPUT, "%s: %zu ids: %d are allowed", what, n, SH_MAX_STOP_IDS);
    for (size_t i = 0; i < n; i++)
        if (from[i] < 0) SH_FAIL(SH_EINPUT, "%s: id %d: 0 or more are allowed", what, from[i]);
    if (n) memcpy(to, from, n * sizeof *to);
    *n_to = (int32_t)n;
    return SH_OK;
}

static sh_status read_sampling(const Shoal__Sampling *m, sh_sampling *s) {
    *s = (sh_sampling){.temperature = m->temperature,
                       .top_p = m->top_p,
                       .min_p = m->min_p,
                       .top_k = m->top_k,
                       .seed = m->seed,
                       .choice = m->choice,
                       .max_tokens = m->max_tokens,
                       .min_tokens = m->min_tokens,
                       .ignore_eos = m->ignore_eos,
                       .score_prompt = m->score_prompt,
                       .logprobs = m->logprobs};
    if (m->logprobs < -1 || m->logprobs > SH_MAX_TOP_LOGPROBS)
        SH_FAIL(SH_EINPUT, "logprobs: %d: -1 to %d are allowed", m->logprobs, SH_MAX_TOP_LOGPROBS);
    /* The last stage refuses a whole descriptor, and the group would end, for what is not caught here. */
    if (!isfinite(m->temperature) || m->temperature < 0 || !isfinite(m->top_p) || !isfinite(m->min_p))
        SH_FAIL(SH_EINPUT, "temperature, top_p, min_p: %g, %g, %g: finite numbers are allowed", (double)m->temperature,
                (double)m->top_p, (double)m->min_p);
    if (m->top_k < 0 || m->choice < 0 || m->min_tokens < 0)
        SH_FAIL(SH_EINPUT, "top_k, choice, min_tokens: %d, %d, %d: 0 or more are allowed", m->top_k, m->choice,
                m->min_tokens);
    SH_TRY(copy_ids(m->eos, m->n_eos, "eos", s->eos, &s->n_eos));
    SH_TRY(copy_ids(m->stop_ids, m->n_stop_ids, "stop_ids", s->stop_ids, &s->n_stop_ids));
    SH_TRY(copy_ids(m->suppress, m->n_suppress, "suppress", s->suppress, &s->n_suppress));
    if (m->n_stop > SH_MAX_STOPS) SH_FAIL(SH_EINPUT, "stop: %zu strings: %d are allowed", m->n_stop, SH_MAX_STOPS);
    for (size_t i = 0; i < m->n_stop; i++) {
        if (m->stop[i].len > SH_MAX_STOP_BYTES)
            SH_FAIL(SH_EINPUT, "stop: a string of %zu bytes: %d are allowed", m->stop[i].len, SH_MAX_STOP_BYTES);
        memcpy(s->stop[i], m->stop[i].data, m->stop[i].len);
        s->stop_len[i] = (uint16_t)m->stop[i].len;
    }
    s->n_stops = (int32_t)m->n_stop;
    return SH_OK;
}

/* Work known already (a coordinator that came back sends it again) is answered with what is there. */
static sh_status take_work(sh_uplink *u, const Shoal__Work *w) {
    if (sh_ledger_knows(u->ledger, w->key)) {
        sh_ledger_rewind_key(u->ledger, w->key);
        return SH_OK;
    }
    sh_sampling *sampling = calloc(1, sizeof *sampling);
    if (!sampling) SH_FAIL(SH_EMEMORY, "no memory for work");
    sh_seq *s = NULL;
    sh_status st = read_sampling(w->sampling, sampling);
    int scored = w->has_scored ? w->scored : 0;
    if (st == SH_OK)
        st =
            sh_seq_create(w->key, w->prompt, w->n_prompt, w->generated, w->n_generated, sampling, scored, u->vocab, &s);
    bool logprobs = sampling->logprobs >= 0;
    free(sampling);
    if (st != SH_OK) return say_rejected(u, w->key, sh_error_text());
    SH_TRY_OR(st, sh_ledger_open(u->ledger, w->key, (int32_t)w->n_generated, scored, logprobs), goto fail);
    SH_TRY_OR(st, push_inbox(u, &(sh_inbox){.kind = SH_INBOX_WORK, .key = w->key, .seq = s}), goto fail);
    return SH_OK;
fail:
    sh_seq_destroy(&s);
    return st;
}

/* A first welcome is kept for the main thread; a later one means that the coordinator may have forgotten us. */
static sh_status take_welcome(sh_uplink *u, Shoal__ToRank **m) {
    const Shoal__Welcome *w = (*m)->welcome;
    if (w->heartbeat_ms < 1 || w->orphan_ms < 1)
        SH_FAIL(SH_EPEER, "welcome: heartbeat_ms %d and orphan_ms %d must be positive", w->heartbeat_ms, w->orphan_ms);
    if (atomic_load(&u->welcomed) && w->epoch < u->epoch) return SH_OK; /* one that has been succeeded already */
    u->epoch = w->epoch;
    u->beat_ms = w->heartbeat_ms;
    u->orphan_ms = w->orphan_ms;
    if (!atomic_load(&u->welcomed)) {
        u->welcome = w;
        u->first = *m;
        u->mute = false;
        *m = NULL;
        atomic_store(&u->welcomed, true);
        return SH_OK;
    }
    sh_ledger_rewind(u->ledger);
    u->mute = false;
    return say_ready(u);
}

static sh_status take_message(sh_uplink *u, Shoal__ToRank **p) {
    Shoal__ToRank *m = *p;
    for (size_t i = 0; i < m->n_done; i++) sh_ledger_forget(u->ledger, m->done[i]);
    for (size_t i = 0; i < m->n_cancel; i++) {
        sh_ledger_forget(u->ledger, m->cancel[i]);
        SH_TRY(push_inbox(u, &(sh_inbox){.kind = SH_INBOX_CANCEL, .key = m->cancel[i]}));
    }
    pthread_mutex_lock(&u->lock);
    bool ready = u->ready;
    pthread_mutex_unlock(&u->lock);
    for (size_t i = 0; ready && i < m->n_work; i++) SH_TRY(take_work(u, m->work[i]));
    if (m->has_report) atomic_store(&u->asked, m->report);
    if (m->has_leave && m->leave) end_service(u, SH_UPLINK_LEAVE, m->reason);
    return m->welcome ? take_welcome(u, p) : SH_OK;
}

static sh_status hear(sh_uplink *u) {
    for (;;) {
        bool got = false;
        char kind = 0;
        SH_TRY(sh_wire_recv(u->wire, NULL, &kind, &u->message, &got));
        if (!got) return SH_OK;
        if (kind != SH_WIRE_GROUP) continue;
        Shoal__ToRank *m = shoal__to_rank__unpack(NULL, u->message.len, u->message.data);
        if (!m) SH_FAIL(SH_EPEER, "a message of %zu bytes from the coordinator is no ToRank", u->message.len);
        u->heard = sh_now();
        sh_status st = take_message(u, &m);
        if (m) shoal__to_rank__free_unpacked(m, NULL);
        if (st != SH_OK) return sh_error_pass(st, __FILE__, __LINE__);
    }
}

/* ---- the thread: time
 * --------------------------------------------------------------------------------------------------- */

/* Before anything is sent: a peer that takes nothing must not put this off. */
static void watch_silence(sh_uplink *u) {
    double now = sh_now(), silent = (now - u->heard) * 1e3;
    if (silent > u->orphan_ms && atomic_load(&u->state) == SH_UPLINK_SERVING) {
        char text[200];
        snprintf(text, sizeof text, "nothing heard from the coordinator for %.0f s: this rank ends", silent / 1e3);
        sh_warn("%s", text);
        end_service(u, SH_UPLINK_ORPHAN, text);
    }
    if (u->ended > 0 && (now - u->ended) * 1e3 > GRACE_MS) die(u); /* the main thread is stuck */
}

static sh_status keep_time(sh_uplink *u) {
    double now = sh_now(), silent = (now - u->heard) * 1e3;
    bool welcomed = atomic_load(&u->welcomed);
    sh_trace *trace = trace_of(u);
    bool full = trace && sh_trace_is_full(trace); /* its room must not run out before the next beat is due */
    if (welcomed && (full || has_loaded(u) || has_report(u) || (now - u->said_beat) * 1e3 >= u->beat_ms))
        SH_TRY(say_beat(u));
    bool strange = !welcomed || silent > 3 * u->beat_ms;
    if (strange && (now - u->said_hello) * 1e3 >= u->beat_ms) SH_TRY(say_hello(u));
    return SH_OK;
}

static sh_status turn(sh_uplink *u) {
    bool readable = false;
    SH_TRY(sh_wire_poll(u->wire, u->wake, TICK_MS, &readable));
    sh_status st = hear(u);
    watch_silence(u);
    SH_TRY(st);
    if (!u->said_ready) SH_TRY(say_ready(u));
    if (atomic_load(&u->welcomed)) SH_TRY(send_tokens(u));
    return keep_time(u);
}

/* A full queue or an absent peer is no end: what is unsent is sent again after the next welcome. */
static sh_status soften(sh_uplink *u, sh_status st) {
    if (st != SH_EPEER) return st;
    sh_ledger_rewind(u->ledger);
    sh_sleep(TICK_MS * 1e-3);
    return SH_OK;
}

static void say_fault(sh_uplink *u, const char *text, bool lasting) {
    Shoal__Fault f = SHOAL__FAULT__INIT;
    f.text = (char *)(uintptr_t)text;
    f.has_lasting = f.lasting = lasting;
    Shoal__FromRank m = SHOAL__FROM_RANK__INIT;
    m.fault = &f;
    SH_IGNORE(send_packed(u, &m));
}

static void last_words(sh_uplink *u) {
    SH_IGNORE(send_tokens(u));
    bool heard = atomic_load(&u->welcomed) && atomic_load(&u->state) != SH_UPLINK_LEAVE; /* who says leave has left */
    if (u->trace && heard) SH_IGNORE(say_beat(u));
    if (u->has_fault) say_fault(u, u->fault, u->lasting);
}

/* Bytes of a mapped file are gone, and the thread that met them waits for this word to be on its way: it then ends the
 * process. Not lasting: the file may be whole when the group is started again, which looks at it. */
static void tell_of_file(sh_uplink *u) {
    const char *text = sh_mapped_fault();
    if (!text) return;
    say_fault(u, text, false);
    sh_wire_close(&u->wire); /* waits until it is sent */
    sh_mapped_told();
    for (;;) pause();
}

static void *uplink_main(void *arg) {
    sh_uplink *u = arg;
    (void)pthread_setname_np(pthread_self(), "shoal-uplink");
    sh_status st = soften(u, say_hello(u));
    sh_mapped_listen_begin();
    for (;;) {
        tell_of_file(u);
        pthread_mutex_lock(&u->lock);
        bool stop = u->stop;
        pthread_mutex_unlock(&u->lock);
        if (stop) break;
        if (st == SH_OK) st = soften(u, turn(u));
        if (st != SH_OK) {
            if (u->ended == 0) sh_error("%s", sh_error_text());
            end_service(u, SH_UPLINK_ORPHAN, sh_error_text());
            sh_sleep(TICK_MS * 1e-3);
            if ((sh_now() - u->ended) * 1e3 > GRACE_MS) die(u);
        }
    }
    sh_mapped_listen_end();
    last_words(u);
    return NULL;
}

/* ---- the main thread's side
 * ------------------------------------------------------------------------------------------------ */

static void free_routing(Shoal__Routing *r) {
    for (size_t i = 0; i < r->n_layer; i++) {
        free(r->layer[i]->chosen);
        free(r->layer[i]);
    }
    free(r->layer);
    *r = (Shoal__Routing){0};
}

static sh_status make_routing(int first, int layers, int experts, Shoal__Routing *out) {
    Shoal__Routing r = SHOAL__ROUTING__INIT;
    r.layer = calloc((size_t)layers, sizeof *r.layer);
    bool ok = r.layer != NULL;
    for (int i = 0; ok && i < layers; i++) {
        Shoal__ExpertCounts *c = calloc(1, sizeof *c);
        uint64_t *chosen = calloc((size_t)experts, sizeof *chosen);
        ok = c && chosen;
        if (!ok) {
            free(c);
            free(chosen);
            break;
        }
        shoal__expert_counts__init(c);
        c->layer = first + i;
        c->n_chosen = (size_t)experts;
        c->chosen = chosen;
        r.layer[r.n_layer++] = c;
    }
    if (!ok) {
        free_routing(&r);
        SH_FAIL(SH_EMEMORY, "no memory for the counts of %d layers", layers);
    }
    *out = r;
    return SH_OK;
}

sh_status sh_uplink_routing(sh_uplink *u, int first, int layers, int experts, const uint64_t *chosen) {
    if (u->routing.n_layer == 0) {
        Shoal__Routing r;
        SH_TRY(make_routing(first, layers, experts, &r));
        pthread_mutex_lock(&u->lock);
        u->routing = r;
        pthread_mutex_unlock(&u->lock);
    }
    pthread_mutex_lock(&u->lock);
    for (int i = 0; i < layers; i++)
        memcpy(u->routing.layer[i]->chosen, chosen + (size_t)i * (size_t)experts, (size_t)experts * sizeof *chosen);
    u->routing_news = true;
    pthread_mutex_unlock(&u->lock);
    return SH_OK;
}

static void release(sh_uplink *u) {
    for (in_item *i = u->in_head, *next; i; i = next) {
        next = i->next;
        sh_seq_destroy(&i->item.seq);
        free(i);
    }
    sh_wire_close(&u->wire);
    sh_ledger_destroy(&u->ledger);
    sh_buf_release(&u->buf);
    sh_buf_release(&u->message);
    if (u->first) shoal__to_rank__free_unpacked(u->first, NULL);
    sh_mem_free(u->out, OUTBOX * sizeof *u->out);
    if (u->wake >= 0) close(u->wake);
    free(u->ready_note);
    free_routing(&u->routing);
    pthread_mutex_destroy(&u->lock);
    free(u);
}

static sh_status prepare(sh_uplink *u) {
    void *ring = NULL;
    if (gethostname(u->host, sizeof u->host - 1) != 0) snprintf(u->host, sizeof u->host, "unknown");
    SH_TRY(sh_mem_alloc(OUTBOX * sizeof *u->out, "outbox", &ring));
    u->out = ring;
    SH_TRY(sh_ledger_create(&u->ledger));
    u->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (u->wake < 0) SH_FAIL(SH_EIO, "eventfd: no more files can be opened");
    SH_TRY(sh_wire_connect(u->o.endpoint, u->o.keys, &u->wire));
    if (pthread_create(&u->thread, NULL, uplink_main, u) != 0) SH_FAIL(SH_EIO, "no thread for the heartbeat");
    return SH_OK;
}

sh_status sh_uplink_start(const sh_uplink_options *o, sh_uplink **out) {
    sh_uplink *u = calloc(1, sizeof *u);
    if (!u) SH_FAIL(SH_EMEMORY, "no memory for the uplink");
    u->o = *o;
    u->wake = -1;
    u->beat_ms = FIRST_BEAT_MS;
    u->orphan_ms = o->first_wait_ms > 0 ? o->first_wait_ms : FIRST_WAIT_MS;
    u->heard = sh_now();
    sh_buf_init(&u->buf, SH_MAX_MESSAGE);
    sh_buf_init(&u->message, SH_MAX_MESSAGE);
    pthread_mutex_init(&u->lock, NULL);
    sh_status st = prepare(u);
    if (st != SH_OK) {
        release(u);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = u;
    return SH_OK;
}

void sh_uplink_stop(sh_uplink **p, const char *fault, bool lasting) {
    sh_uplink *u = *p;
    if (!u) return;
    pthread_mutex_lock(&u->lock);
    if (fault) snprintf(u->fault, sizeof u->fault, "%s", fault);
    u->has_fault = fault != NULL;
    u->lasting = lasting;
    u->stop = true;
    pthread_mutex_unlock(&u->lock);
    uint64_t one = 1;
    ssize_t written = write(u->wake, &one, sizeof one);
    (void)written;
    pthread_join(u->thread, NULL);
    release(u);
    *p = NULL;
}

sh_uplink_state sh_uplink_look(const sh_uplink *u) {
    return (sh_uplink_state)atomic_load(&u->state);
}

const char *sh_uplink_reason(const sh_uplink *u) {
    return atomic_load(&u->state) == SH_UPLINK_SERVING ? "" : u->reason; /* written before the state, once */
}

sh_status sh_uplink_welcome(sh_uplink *u, const Shoal__Welcome **out) {
    while (!atomic_load(&u->welcomed)) {
        sh_uplink_state s = sh_uplink_look(u);
        if (s == SH_UPLINK_LEAVE) SH_FAIL(SH_ECANCELLED, "told to leave: %s", u->reason);
        if (s == SH_UPLINK_ORPHAN) SH_FAIL(SH_EPEER, "%s: no welcome: %s", u->o.endpoint, u->reason);
        sh_sleep(2e-3);
    }
    *out = u->welcome;
    return SH_OK;
}

sh_status sh_uplink_ready(sh_uplink *u, int kv_tokens, int64_t kv_total, int max_seqs, uint64_t fingerprint, int vocab,
                          const char *note) {
    char *copy = note ? strdup(note) : NULL;
    if (note && !copy) SH_FAIL(SH_EMEMORY, "no memory for a note");
    pthread_mutex_lock(&u->lock);
    shoal__ready__init(&u->ready_message);
    u->ready_message.kv_tokens = kv_tokens;
    u->ready_message.has_kv_total = true;
    u->ready_message.kv_total = kv_total;
    u->ready_message.max_seqs = max_seqs;
    u->ready_message.fingerprint = fingerprint;
    u->ready_note = copy;
    u->vocab = vocab;
    u->ready = true;
    pthread_mutex_unlock(&u->lock);
    return SH_OK;
}

bool sh_uplink_take(sh_uplink *u, sh_inbox *out) {
    if (atomic_load(&u->n_in) == 0) return false;
    pthread_mutex_lock(&u->lock);
    in_item *i = u->in_head;
    if (i) u->in_head = i->next;
    if (!u->in_head) u->in_tail = NULL;
    pthread_mutex_unlock(&u->lock);
    if (!i) return false;
    atomic_fetch_sub(&u->n_in, 1);
    *out = i->item;
    free(i);
    return true;
}

static void put_out(sh_uplink *u, const out_item *item) {
    for (;;) {
        pthread_mutex_lock(&u->lock);
        bool room = u->out_n < OUTBOX;
        if (room) u->out[(u->out_at + u->out_n++) % OUTBOX] = *item;
        pthread_mutex_unlock(&u->lock);
        if (room || sh_uplink_look(u) == SH_UPLINK_ORPHAN) return;
        sh_sleep(1e-3);
    }
}

void sh_uplink_token(sh_uplink *u, uint64_t key, const sh_token *t) {
    out_item item = {.key = key, .token = *t};
    put_out(u, &item);
}

void sh_uplink_reject(sh_uplink *u, uint64_t key, const char *reason) {
    out_item item = {.key = key, .reject = true};
    snprintf(item.reason, sizeof item.reason, "%s", reason);
    put_out(u, &item);
}

void sh_uplink_load(sh_uplink *u, const sh_load_times *t) {
    pthread_mutex_lock(&u->lock);
    u->load = *t;
    pthread_mutex_unlock(&u->lock);
}

void sh_uplink_trace(sh_uplink *u, sh_trace *x) {
    pthread_mutex_lock(&u->lock);
    u->trace = x;
    pthread_mutex_unlock(&u->lock);
}

void sh_uplink_beat(sh_uplink *u, const sh_beat *b) {
    pthread_mutex_lock(&u->lock);
    u->beat = *b;
    pthread_mutex_unlock(&u->lock);
}

uint64_t sh_uplink_asked(const sh_uplink *u) {
    return atomic_load(&u->asked);
}
