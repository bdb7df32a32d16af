/* Clients' requests. See service.h. */
#include "coordinator/service.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "common/log.h"

#define CLIENTS 64 /* whose last warning is remembered */

typedef struct held_reply {
    sh_wire_peer to;
    uint64_t job; /* acknowledges lines of this job; 0: none */
    bool failed;
    char *error;
} held_reply;

typedef struct heard_client { /* which warnings it has seen */
    sh_wire_peer peer;
    uint64_t warned;
} heard_client;

struct sh_service {
    sh_store *store;
    sh_jobs *jobs;
    sh_dispatch *dispatch;
    sh_wire *wire;
    bool run, end;
    held_reply *held;
    int n_held, cap_held;
    heard_client client[CLIENTS];
    int next_client;
    sh_buf out;
};

sh_status sh_service_create(sh_store *s, sh_jobs *jobs, sh_dispatch *d, sh_wire *wire, bool run, sh_service **out) {
    sh_service *v = calloc(1, sizeof *v);
    if (!v) SH_FAIL(SH_EMEMORY, "no memory for the job interface");
    v->store = s, v->jobs = jobs, v->dispatch = d, v->wire = wire, v->run = run;
    sh_buf_init(&v->out, 0);
    *out = v;
    return SH_OK;
}

void sh_service_destroy(sh_service **vp) {
    sh_service *v = *vp;
    if (!v) return;
    for (int i = 0; i < v->n_held; i++) free(v->held[i].error);
    free(v->held);
    sh_buf_release(&v->out);
    free(v);
    *vp = NULL;
}

bool sh_service_has_replies(const sh_service *v) {
    return v->n_held > 0;
}

bool sh_service_must_end(const sh_service *v) {
    return v->end;
}

/* --- replies -------------------------------------------------------------------------------------------------------
 */

static heard_client *client_of(sh_service *v, const sh_wire_peer *p) {
    for (int i = 0; i < CLIENTS; i++)
        if (v->client[i].peer.len == p->len && memcmp(v->client[i].peer.id, p->id, p->len) == 0) return &v->client[i];
    heard_client *c = &v->client[v->next_client++ % CLIENTS];
    *c = (heard_client){.peer = *p};
    return c;
}

/* A client that is gone needs no answer. */
static sh_status send_reply(sh_service *v, const sh_wire_peer *to, Shoal__JobReply *r) {
    char *warning[SH_WARNINGS];
    heard_client *c = client_of(v, to);
    r->n_warning = (size_t)sh_jobs_warnings(v->jobs, c->warned, warning, &c->warned);
    r->warning = warning;
    r->has_epoch = true;
    r->epoch = sh_store_epoch(v->store);
    sh_buf_clear(&v->out);
    SH_TRY(sh_buf_reserve(&v->out, shoal__job_reply__get_packed_size(r)));
    v->out.len = shoal__job_reply__pack(r, v->out.data);
    SH_IGNORE(sh_wire_send(v->wire, to, SH_WIRE_JOB, v->out.data, v->out.len));
    return SH_OK;
}

static sh_status send_error(sh_service *v, const sh_wire_peer *to, const char *text) {
    Shoal__JobReply r = SHOAL__JOB_REPLY__INIT;
    r.error = (char *)(uintptr_t)text;
    return send_reply(v, to, &r);
}

/* A refusal (SH_EINPUT, SH_ELIMIT) is the client's affair; anything else is ours. */
static bool is_refusal(sh_status st) {
    return st == SH_EINPUT || st == SH_ELIMIT;
}

static sh_status hold(sh_service *v, const sh_wire_peer *to, uint64_t job, const char *error) {
    if (v->n_held == v->cap_held) {
        int cap = v->cap_held ? v->cap_held * 2 : 16;
        held_reply *p = realloc(v->held, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for replies");
        v->held = p;
        v->cap_held = cap;
    }
    char *text = error ? strdup(error) : NULL;
    if (error && !text) SH_FAIL(SH_EMEMORY, "no memory for replies");
    v->held[v->n_held++] = (held_reply){.to = *to, .job = job, .error = text};
    return SH_OK;
}

static sh_status send_held(sh_service *v, const held_reply *h) {
    const sh_job_entry *e = sh_jobs_find(v->jobs, h->job);
    Shoal__JobReply r = SHOAL__JOB_REPLY__INIT;
    r.error = h->error;
    if (e) {
        r.has_job = r.has_accepted = r.has_chain = true;
        r.job = e->job.id;
        r.accepted = e->job.accepted;
        r.chain = e->job.chain;
    }
    return send_reply(v, &h->to, &r);
}

sh_status sh_service_after_commit(sh_service *v) {
    sh_status st = SH_OK;
    for (int i = 0; i < v->n_held; i++) {
        if (st == SH_OK) st = send_held(v, &v->held[i]);
        free(v->held[i].error);
    }
    v->n_held = 0;
    return st;
}

/* --- requests ------------------------------------------------------------------------------------------------------
 */

static sh_status find_job(sh_service *v, uint64_t id, sh_job_entry **out) {
    *out = sh_jobs_find(v->jobs, id);
    if (!*out) SH_FAIL(SH_EINPUT, "job: there is no job %llu here", (unsigned long long)id);
    return SH_OK;
}

static sh_status take_submit(sh_service *v, const Shoal__Submit *s, sh_job_entry **e) {
    if (s->name) {
        SH_TRY(sh_jobs_submit_open(v->jobs, s->name, s->options, e));
        sh_dispatch_wake(v->dispatch, true);
    } else {
        SH_TRY(find_job(v, s->has_job ? s->job : 0, e));
    }
    if (s->n_line) SH_TRY(sh_jobs_submit_lines(v->jobs, *e, s->line, s->n_line));
    if (s->has_close && s->close) SH_TRY(sh_jobs_submit_close(v->jobs, *e));
    sh_dispatch_wake(v->dispatch, false);
    return SH_OK;
}

/* Refusals wait for the commit too: replies keep the order of the requests. */
static sh_status hear_submit(sh_service *v, const sh_wire_peer *from, const Shoal__Submit *s) {
    sh_job_entry *e = NULL;
    sh_status st = take_submit(v, s, &e);
    if (st != SH_OK && !is_refusal(st)) return st;
    return hold(v, from, e ? e->job.id : 0, st == SH_OK ? NULL : sh_error_text());
}

static sh_status reply_status(sh_service *v, const sh_wire_peer *from, const Shoal__Request *q) {
    sh_job_entry *one = NULL;
    if (q->has_job) {
        sh_status st = find_job(v, q->job, &one);
        if (st != SH_OK) return send_error(v, from, sh_error_text());
    }
    int n = one ? 1 : sh_jobs_count(v->jobs), g = sh_dispatch_groups(v->dispatch), filled = 0;
    Shoal__JobCounts *c = calloc((size_t)n + 1, sizeof *c), **cp = calloc((size_t)n + 1, sizeof *cp);
    Shoal__GroupState *s = calloc((size_t)g + 1, sizeof *s), **sp = calloc((size_t)g + 1, sizeof *sp);
    sh_status st = c && cp && s && sp ? SH_OK : sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "no memory for a status");
    for (int i = 0; st == SH_OK && i < n; i++) sh_jobs_fill(one ? one : sh_jobs_at(v->jobs, i), cp[i] = &c[i]);
    for (; st == SH_OK && filled < g; filled += st == SH_OK)
        st = sh_dispatch_fill(v->dispatch, filled, sp[filled] = &s[filled]);
    Shoal__JobReply r = SHOAL__JOB_REPLY__INIT;
    r.n_counts = (size_t)n, r.counts = cp;
    r.n_group = (size_t)g, r.group = sp;
    r.has_suspects = true;
    r.suspects = sh_dispatch_suspects(v->dispatch);
    if (st == SH_OK) st = send_reply(v, from, &r);
    for (int i = 0; i < filled; i++) sh_dispatch_release_group(&s[i]);
    free(c);
    free(cp);
    free(s);
    free(sp);
    return st;
}

typedef struct rows {
    Shoal__ResultRow *row;
    size_t n, most, start[SH_RESULTS_ROWS];
    sh_buf text;
    bool more;
} rows;

static sh_status take_row(void *ctx, const sh_stored_result *q, bool *stop) {
    rows *r = ctx;
    if (r->n == r->most || (r->n > 0 && r->text.len + q->len > SH_RESULTS_BYTES)) {
        *stop = r->more = true;
        return SH_OK;
    }
    Shoal__ResultRow *to = &r->row[r->n];
    shoal__result_row__init(to);
    to->cursor = q->cursor;
    to->number = q->number;
    to->text.len = q->len;
    r->start[r->n++] = r->text.len;
    return sh_buf_add(&r->text, q->row, q->len);
}

static sh_status reply_rows(sh_service *v, const sh_wire_peer *from, const Shoal__ResultsRequest *q, rows *r) {
    Shoal__ResultRow **list = calloc(r->most, sizeof *list);
    r->row = calloc(r->most, sizeof *r->row);
    sh_status st = list && r->row ? sh_store_results(v->store, q->job, q->after, take_row, r)
                                  : sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "no memory for results");
    for (size_t i = 0; st == SH_OK && i < r->n; i++) {
        r->row[i].text.data = r->text.data + r->start[i];
        list[i] = &r->row[i];
    }
    Shoal__JobReply reply = SHOAL__JOB_REPLY__INIT;
    reply.n_row = r->n, reply.row = list;
    reply.has_more = true, reply.more = r->more;
    if (st == SH_OK) st = send_reply(v, from, &reply);
    free(r->row);
    free(list);
    return st;
}

static sh_status hear_results(sh_service *v, const sh_wire_peer *from, const Shoal__ResultsRequest *q) {
    sh_job_entry *e;
    if (find_job(v, q->job, &e) != SH_OK) return send_error(v, from, sh_error_text());
    rows *r = calloc(1, sizeof *r);
    if (!r) SH_FAIL(SH_EMEMORY, "no memory for results");
    r->most = q->has_most && q->most > 0 && q->most < SH_RESULTS_ROWS ? q->most : SH_RESULTS_ROWS;
    sh_buf_init(&r->text, 0);
    sh_status st = reply_rows(v, from, q, r);
    sh_buf_release(&r->text);
    free(r);
    return st;
}

static sh_status reply_routing(sh_service *v, const sh_wire_peer *from) {
    SH_CLEANUP(sh_routing_destroy) sh_routing *r = NULL;
    sh_status st = sh_dispatch_routing(v->dispatch, &r);
    if (st == SH_EINPUT) return send_error(v, from, sh_error_text());
    SH_TRY(st);
    Shoal__JobReply reply = SHOAL__JOB_REPLY__INIT;
    sh_buf packed;
    sh_buf_init(&packed, 0);
    st = sh_routing_pack(r, &packed);
    reply.has_routing = true;
    reply.routing = (ProtobufCBinaryData){packed.len, packed.data};
    if (st == SH_OK) st = send_reply(v, from, &reply);
    sh_buf_release(&packed);
    return st;
}

static sh_status hear_cancel(sh_service *v, const sh_wire_peer *from, const Shoal__Request *q) {
    sh_job_entry *e = NULL;
    if (find_job(v, q->has_job ? q->job : 0, &e) != SH_OK) return hold(v, from, 0, sh_error_text());
    SH_TRY(sh_jobs_cancel(v->jobs, e));
    if (e->job.state == SH_JOB_CANCELLED) sh_dispatch_drop_job(v->dispatch, e->job.id);
    return hold(v, from, e->job.id, NULL);
}

/* What a client sees is on disk: uncommitted answers are committed before they are shown. */
static sh_status commit_first(sh_service *v) {
    if (!sh_jobs_is_dirty(v->jobs)) return SH_OK;
    SH_TRY(sh_jobs_commit(v->jobs));
    return sh_service_after_commit(v);
}

static sh_status hear_request(sh_service *v, const sh_wire_peer *from, const Shoal__JobRequest *q) {
    if (q->submit) return hear_submit(v, from, q->submit);
    if (q->cancel) return hear_cancel(v, from, q->cancel);
    if (q->supervision && v->run) SH_TRY(sh_dispatch_supervised(v->dispatch, q->supervision));
    SH_TRY(commit_first(v));
    if (q->has_report && q->report && v->run) sh_dispatch_ask_report(v->dispatch);
    if (q->status) return reply_status(v, from, q->status);
    if (q->results) return hear_results(v, from, q->results);
    if (q->has_routing && q->routing) return reply_routing(v, from);
    if (!q->has_shutdown || !q->shutdown)
        return send_error(v, from, "request: nothing this coordinator knows was asked for");
    if (!v->run)
        return send_error(v, from, "shutdown: only the coordinator of a run takes it: end this one with SIGTERM");
    v->end = true;
    Shoal__JobReply r = SHOAL__JOB_REPLY__INIT;
    return send_reply(v, from, &r);
}

sh_status sh_service_hear(sh_service *v, const sh_wire_peer *from, const void *p, size_t n) {
    Shoal__JobRequest *q = shoal__job_request__unpack(NULL, n, p);
    if (!q) return hold(v, from, 0, "request: a message that cannot be read");
    sh_status st = hear_request(v, from, q);
    shoal__job_request__free_unpacked(q, NULL);
    return st;
}
