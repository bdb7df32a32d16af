/* What is where, and hearing of it; giving out is giving.c's. See dispatch.h. */
#include "coordinator/dispatch.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "common/clock.h"
#include "common/log.h"
#include "coordinator/dispatch_int.h"
#include "partition/placement.h"

#define DONE_AT_ONCE 1024

/* --- life ----------------------------------------------------------------------------------------------------------
 */

sh_status sh_dispatch_create(const sh_coordinator_options *o, const sh_config *config, sh_store *s, sh_intake *in,
                             sh_jobs *jobs, sh_wire *wire, sh_dispatch **out) {
    sh_dispatch *d = calloc(1, sizeof *d);
    if (!d) SH_FAIL(SH_EMEMORY, "no memory for dispatch");
    d->o = o, d->config = config, d->store = s, d->intake = in, d->jobs = jobs, d->wire = wire;
    d->silent = 1e-3 * o->heartbeat_ms * SH_SILENT_BEATS;
    d->expected = o->groups;
    d->reports = sh_store_epoch(s) << 32; /* not one that a predecessor asked for */
    sh_buf_init(&d->out, 0);
    sh_status st = o->routing ? sh_routing_load(o->routing, config, &d->routing) : SH_OK;
    if (st != SH_OK) {
        sh_dispatch_destroy(&d);
        return sh_error_prefix(st, "--routing");
    }
    if (o->trace_steps > 0) st = sh_tracelog_create(o->store, sh_store_epoch(s), &d->trace);
    if (st != SH_OK) {
        sh_dispatch_destroy(&d);
        return st;
    }
    *out = d;
    return SH_OK;
}

void sh_dispatch_destroy(sh_dispatch **dp) {
    sh_dispatch *d = *dp;
    if (!d) return;
    for (int i = 0; i < SH_DISPATCH_BUCKETS; i++)
        for (sh_running *r = d->bucket[i], *next; r; r = next) {
            next = r->next;
            sh_running_destroy(&r);
        }
    for (int i = 0; i < d->n; i++) sh_group_destroy(&d->group[i]);
    free(d->group);
    free(d->waiting);
    sh_buf_release(&d->out);
    sh_routing_destroy(&d->routing);
    sh_tracelog_destroy(&d->trace);
    free(d);
    *dp = NULL;
}

/* --- requests by key -----------------------------------------------------------------------------------------------
 */

sh_running *sh_dispatch_find(const sh_dispatch *d, uint64_t key) {
    sh_running *r = d->bucket[key % SH_DISPATCH_BUCKETS];
    while (r && r->key != key) r = r->next;
    return r;
}

void sh_dispatch_insert(sh_dispatch *d, sh_running *r) {
    r->turn = d->turns++;
    r->next = d->bucket[r->key % SH_DISPATCH_BUCKETS];
    d->bucket[r->key % SH_DISPATCH_BUCKETS] = r;
}

sh_group *sh_dispatch_group(const sh_dispatch *d, int number) {
    for (int i = 0; i < d->n; i++)
        if (d->group[i]->number == number) return d->group[i];
    return NULL;
}

sh_allot sh_dispatch_allot(const sh_dispatch *d) {
    return (sh_allot){.group = d->group, .n = d->n, .tester = d->tester};
}

bool sh_dispatch_is_suspect(const sh_running *r) {
    return r->lost >= SH_SUSPECT_AT;
}

/* Something came of it: it is under no suspicion. */
static void clear_suspicion(sh_running *r, sh_group *owner) {
    if (owner) owner->unproven -= r->unproven, owner->testing -= r->testing;
    r->unproven = r->testing = false;
    r->lost = r->alone = 0;
}

void sh_dispatch_set_owner(sh_dispatch *d, sh_running *r, sh_group *g) {
    sh_group *before = sh_dispatch_group(d, r->group);
    if (before) before->given--, before->unproven -= r->unproven, before->testing -= r->testing;
    r->group = g ? g->number : -1;
    if (g) r->meant = 0;
    r->unproven = g != NULL;
    r->testing = g && sh_dispatch_is_suspect(r);
    if (g) g->given++, g->unproven++, g->testing += r->testing;
}

void sh_dispatch_unwait(sh_dispatch *d, const sh_running *r) {
    for (int i = 0; i < d->n_waiting; i++)
        if (d->waiting[i] == r) {
            memmove(d->waiting + i, d->waiting + i + 1, (size_t)(d->n_waiting - i - 1) * sizeof *d->waiting);
            d->n_waiting--;
            return;
        }
}

sh_status sh_dispatch_wait(sh_dispatch *d, sh_running *r) {
    if (d->n_waiting == d->cap_waiting) {
        int cap = d->cap_waiting ? d->cap_waiting * 2 : 64;
        sh_running **p = realloc(d->waiting, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for waiting requests");
        d->waiting = p;
        d->cap_waiting = cap;
    }
    int at = d->n_waiting++; /* by turn */
    for (; at > 0 && d->waiting[at - 1]->turn > r->turn; at--) d->waiting[at] = d->waiting[at - 1];
    d->waiting[at] = r;
    return SH_OK;
}

/* Takes the request out of everything and frees it. */
void sh_dispatch_remove(sh_dispatch *d, sh_running *r) {
    if (r->group < 0) sh_dispatch_unwait(d, r);
    sh_dispatch_set_owner(d, r, NULL);
    sh_running **p = &d->bucket[r->key % SH_DISPATCH_BUCKETS];
    while (*p != r) p = &(*p)->next;
    *p = r->next;
    sh_job_entry *e = sh_jobs_find(d->jobs, r->job);
    uint64_t unsaved = (uint64_t)(r->tokens.n - r->tokens.saved);
    if (e && e->live >= unsaved) { /* what was counted as live is now in the job's count */
        e->live -= unsaved;
        e->job.tokens_out += unsaved;
        e->dirty = true;
    }
    sh_running_destroy(&r);
}

sh_status sh_dispatch_save_one(sh_dispatch *d, sh_running *r) {
    int saved = 0;
    if (sh_running_is_saved(r)) return SH_OK;
    SH_TRY(sh_running_save(r, d->store, &saved));
    sh_job_entry *e = sh_jobs_find(d->jobs, r->job);
    if (!e || e->live < (uint64_t)saved) return SH_OK;
    e->live -= (uint64_t)saved;
    e->job.tokens_out += (uint64_t)saved;
    e->dirty = true;
    return SH_OK;
}

static sh_status save_routing(sh_dispatch *d) {
    for (int i = 0; i < d->n; i++) SH_TRY(sh_group_save_routing(d->group[i], d->store));
    return SH_OK;
}

sh_status sh_dispatch_save(sh_dispatch *d) {
    for (int i = 0; i < SH_DISPATCH_BUCKETS; i++)
        for (sh_running *r = d->bucket[i]; r; r = r->next) SH_TRY(sh_dispatch_save_one(d, r));
    return save_routing(d);
}

static sh_status add_routing(void *ctx, const void *p, size_t n) {
    Shoal__Routing *m = shoal__routing__unpack(NULL, n, p);
    if (!m) SH_FAIL(SH_EFORMAT, "the store: counts of experts that cannot be read");
    sh_status st = sh_routing_add(ctx, m);
    shoal__routing__free_unpacked(m, NULL);
    return st;
}

sh_status sh_dispatch_routing(sh_dispatch *d, sh_routing **out) {
    SH_CLEANUP(sh_routing_destroy) sh_routing *r = NULL;
    SH_TRY(sh_routing_create(d->config, &r));
    SH_TRY(save_routing(d));
    SH_TRY(sh_store_routing(d->store, add_routing, r));
    *out = r;
    r = NULL;
    return SH_OK;
}

/* --- speaking to ranks ---------------------------------------------------------------------------------------------
 */

static sh_status send_packed(sh_dispatch *d, const sh_wire_peer *to, const Shoal__ToRank *m) {
    sh_buf_clear(&d->out);
    SH_TRY(sh_buf_reserve(&d->out, shoal__to_rank__get_packed_size(m)));
    d->out.len = shoal__to_rank__pack(m, d->out.data);
    return sh_wire_send(d->wire, to, SH_WIRE_GROUP, d->out.data, d->out.len);
}

/* A peer that is gone is noticed by its silence. */
static void say(sh_dispatch *d, const sh_wire_peer *to, const Shoal__ToRank *m) {
    if (to->len) SH_IGNORE(send_packed(d, to, m));
}

static void say_leave(sh_dispatch *d, const sh_wire_peer *to, const char *reason) {
    Shoal__ToRank m = SHOAL__TO_RANK__INIT;
    m.has_leave = m.leave = true;
    m.reason = (char *)(uintptr_t)reason;
    say(d, to, &m);
}

void sh_dispatch_say_cancel(sh_dispatch *d, const sh_group *g, uint64_t key) {
    Shoal__ToRank m = SHOAL__TO_RANK__INIT;
    m.n_cancel = 1, m.cancel = &key;
    say(d, &g->seat[0].peer, &m);
}

static void say_done(sh_dispatch *d, sh_group *g) {
    for (int i = 0; i < g->n_done; i += DONE_AT_ONCE) {
        Shoal__ToRank m = SHOAL__TO_RANK__INIT;
        m.n_done = (size_t)(g->n_done - i < DONE_AT_ONCE ? g->n_done - i : DONE_AT_ONCE);
        m.done = g->done + i;
        say(d, &g->seat[0].peer, &m);
    }
    g->n_done = 0;
}

void sh_dispatch_leave(sh_dispatch *d, const char *reason) {
    for (int i = 0; i < d->n; i++)
        for (int k = 0; k < d->group[i]->size; k++) say_leave(d, &d->group[i]->seat[k].peer, reason);
}

void sh_dispatch_ask_report(sh_dispatch *d) {
    Shoal__ToRank m = SHOAL__TO_RANK__INIT;
    m.has_report = true;
    m.report = ++d->reports;
    for (int i = 0; i < d->n; i++) {
        sh_group *g = d->group[i];
        if (g->state != SH_GROUP_READY) continue;
        g->report = m.report;
        for (int k = 0; k < g->size; k++) say(d, &g->seat[k].peer, &m);
    }
}

/* --- groups --------------------------------------------------------------------------------------------------------
 */

/* Its group is lost. Without progress since it was given out, it may be to blame. */
static void suspect(const sh_dispatch *d, sh_running *r, const char *fault) {
    if (!r->unproven) return;
    char *copy = strdup(fault);
    if (copy) {
        free(r->fault);
        r->fault = copy;
    }
    r->lost++;
    if (!r->testing || ++r->alone < SH_CONVICT_AT) return;
    r->convicted = true;
    r->seen = d->progress;
}

sh_status sh_dispatch_lose(sh_dispatch *d, sh_group *g, const char *fault, bool lasting) {
    sh_group_set_fault(g, fault, lasting);
    if (g->state == SH_GROUP_LOST) return SH_OK;
    if (d->o->run)
        sh_info("group %s is lost: %s", g->name, fault); /* its supervisor tells the user */
    else
        sh_warn("group %s is lost: %s", g->name, fault);
    g->state = SH_GROUP_LOST;
    g->here = 0;
    for (int i = 0; i < g->size; i++) say_leave(d, &g->seat[i].peer, fault);
    for (int i = 0; i < SH_DISPATCH_BUCKETS; i++)
        for (sh_running *r = d->bucket[i]; r; r = r->next) {
            if (r->group != g->number) continue;
            suspect(d, r, fault);
            sh_dispatch_set_owner(d, r, NULL);
            SH_TRY(sh_dispatch_save_one(d, r));
            SH_TRY(sh_dispatch_wait(d, r));
            d->unsaved = true;
        }
    return SH_OK;
}

static sh_status forget_lost(sh_dispatch *d) {
    int lost = 0;
    for (int i = d->n - 1; i >= 0; i--) {
        if (d->group[i]->state != SH_GROUP_LOST || ++lost <= SH_LOST_KEPT) continue;
        SH_TRY(sh_group_save_routing(d->group[i], d->store));
        sh_group_destroy(&d->group[i]);
        memmove(d->group + i, d->group + i + 1, (size_t)(d->n - i - 1) * sizeof *d->group);
        d->n--;
    }
    return SH_OK;
}

/* Multiply-adds of one row in a stage: its matrices, and attention over the longest context. */
static double row_cost(const sh_config *c, const Shoal__Plan *p, const Shoal__PlanRank *stage) {
    double cost = (double)sh_plan_cost(c, stage->first, stage->last);
    for (int l = stage->first; l < stage->last; l++) {
        const sh_layer *y = &c->layer[l];
        int keys = y->window > 0 && y->window < p->max_context ? y->window : p->max_context;
        cost += 2.0 * y->heads * y->head_dim * keys;
    }
    return cost;
}

/* Longer than any honest step: the dearest stage with a full micro-batch. */
static double stall_time(const sh_dispatch *d, const Shoal__Plan *p) {
    double most = 0;
    for (size_t i = 0; i < p->n_rank; i++) {
        double cost = row_cost(d->config, p, p->rank[i]);
        if (cost > most) most = cost;
    }
    return SH_STALL_LEAST + most * (p->chunk + p->max_seqs) / SH_STALL_RATE;
}

/* Longer than any honest loading: all ranks' weights, one after the other, from a slow file system. */
static double load_time(const sh_dispatch *d, const Shoal__Plan *p) {
    double bytes = 0;
    for (int i = 0; i < (int)p->n_rank; i++) bytes += (double)sh_plan_rank_memory(d->config, p, i, 0).weights;
    return (d->o->load_ms > 0 ? 1e-3 * d->o->load_ms : SH_LOAD_LEAST) + bytes / SH_LOAD_RATE;
}

static sh_status make_plan(const sh_dispatch *d, sh_group *g) {
    const sh_coordinator_options *o = d->o;
    if (o->plan && (int)o->plan->n_rank != g->size)
        SH_FAIL(SH_EINPUT, "the plan is for groups of %zu ranks, and this one has %d", o->plan->n_rank, g->size);
    if (o->plan) return sh_plan_copy(o->plan, &g->plan);
    sh_plan_request q = {.ranks = g->size,
                         .pp = o->pp,
                         .ep = o->ep,
                         .tp = o->tp,
                         .cp = o->cp,
                         .tp_sum = o->tp_sum,
                         .no_prefix_sharing = o->no_prefix_sharing,
                         .share_weights = o->share_weights,
                         .prefill = o->prefill,
                         .cuts = o->cuts,
                         .prefill_cuts = o->prefill_cuts,
                         .mode = o->mode,
                         .kv = o->kv,
                         .threads = o->threads,
                         .max_seqs = o->max_seqs,
                         .chunk = o->chunk,
                         .max_context = o->max_context,
                         .kv_memory = o->kv_memory,
                         .routing = d->routing,
                         .replicate = o->replicate};
    return sh_plan_make(d->config, &q, &g->plan);
}

static sh_status group_plan(sh_dispatch *d, sh_group *g) {
    SH_TRY(make_plan(d, g));
    g->stall = stall_time(d, g->plan);
    g->load = load_time(d, g->plan);
    SH_CLEANUP(sh_buf_release) sh_buf text;
    sh_buf_init(&text, 0);
    SH_TRY(sh_plan_print(d->config, g->plan, &text));
    if (d->routing) SH_TRY(sh_placement_print(d->config, d->routing, g->plan, &text));
    g->plan_text = sh_buf_take(&text);
    return SH_OK;
}

static sh_status group_add(sh_dispatch *d, const Shoal__Hello *h, sh_group **out) {
    SH_TRY(forget_lost(d));
    if (d->n == d->cap) {
        int cap = d->cap ? d->cap * 2 : 8;
        sh_group **p = realloc(d->group, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for a group");
        d->group = p;
        d->cap = cap;
    }
    sh_group *g = NULL;
    SH_TRY(sh_group_create(h->group, h->size, ++d->last_number, &g));
    g->born = sh_now();
    d->group[d->n++] = g;
    *out = g;
    if (group_plan(d, g) == SH_OK) return SH_OK;
    char why[1024];
    snprintf(why, sizeof why, "%s", sh_error_text());
    SH_TRY(sh_dispatch_lose(d, g, why, true));
    /* In a run every group has this shape: none can ever serve. */
    return d->o->run ? sh_jobs_fail(d->jobs, why) : SH_OK;
}

static bool is_process(const sh_rank_seat *s, const Shoal__Hello *h) {
    return s->pid == h->pid && strncmp(s->host, h->host, sizeof s->host - 1) == 0;
}

/* The youngest of that name; but where the process h had a seat in an older one, that. */
static sh_group *group_by_name(const sh_dispatch *d, const char *name, const Shoal__Hello *h) {
    sh_group *youngest = NULL;
    for (int i = d->n - 1; i >= 0; i--) {
        sh_group *g = d->group[i];
        if (strcmp(g->name, name) != 0) continue;
        if (!youngest) youngest = g;
        if (h && h->rank < g->size && is_process(&g->seat[h->rank], h)) return g;
    }
    return youngest;
}

/* --- hearing -------------------------------------------------------------------------------------------------------
 */

static void say_welcome(sh_dispatch *d, const sh_group *g, const sh_wire_peer *to) {
    Shoal__Welcome w = SHOAL__WELCOME__INIT;
    w.epoch = sh_store_epoch(d->store);
    w.model = (char *)(uintptr_t)d->o->model;
    w.plan = g->plan;
    w.heartbeat_ms = d->o->heartbeat_ms;
    w.orphan_ms = d->o->orphan_ms;
    w.has_seed = true;
    w.seed = d->o->intake.seed;
    w.has_trace_first = w.has_trace_steps = d->trace != NULL;
    w.trace_first = d->o->trace_first, w.trace_steps = d->o->trace_steps;
    Shoal__ToRank m = SHOAL__TO_RANK__INIT;
    m.welcome = &w;
    say(d, to, &m);
}

static bool hello_is_good(const Shoal__Hello *h) {
    size_t n = strlen(h->group);
    return h->size >= 1 && h->size <= SH_MAX_RANKS && h->rank >= 0 && h->rank < h->size && n >= 1 &&
           n <= SH_MAX_GROUP_NAME;
}

sh_status sh_dispatch_send_work(sh_dispatch *d, const sh_running *r, const sh_group *g) {
    sh_buf work;
    sh_buf_init(&work, 0);
    sh_status st = sh_running_work(r, &work);
    if (st == SH_OK) st = sh_wire_send(d->wire, &g->seat[0].peer, SH_WIRE_GROUP, work.data, work.len);
    sh_buf_release(&work);
    return st;
}

/* A leader that comes over a new connection may have lost what was on its way over the old one. Work that it has is
 * known by its key. */
static sh_status give_again(sh_dispatch *d, const sh_group *g) {
    for (int i = 0; i < SH_DISPATCH_BUCKETS; i++)
        for (const sh_running *r = d->bucket[i]; r; r = r->next) {
            if (r->group != g->number) continue;
            sh_status st = sh_dispatch_send_work(d, r, g);
            if (st == SH_EPEER) return SH_OK; /* gone again: it will say hello, or its silence is noticed */
            SH_TRY(st);
        }
    return SH_OK;
}

/* The group that this rank is of, NULL: none yet. A run's groups have names of their own. Elsewhere one may be started
 * again under a name that is known (a requeued job, a service): where a rank that served nobody yet is not the process
 * that had its seat, the old group is gone. */
static sh_status find_group(sh_dispatch *d, const Shoal__Hello *h, sh_group **out) {
    sh_group *g = group_by_name(d, h->group, h);
    *out = g;
    if (!g || d->o->run || h->has_epoch) return SH_OK;
    const sh_rank_seat *s = h->rank < g->size ? &g->seat[h->rank] : NULL;
    if (s && s->peer.len && is_process(s, h)) return SH_OK; /* itself, before it was welcomed */
    if (g->size == h->size && !s->peer.len) { /* its seat is free; where there never was a plan, it hears that, too */
        if (g->state == SH_GROUP_LOST && g->plan_text) *out = NULL;
        return SH_OK;
    }
    char why[200];
    snprintf(why, sizeof why, "it was started again under its name: rank %d of %d is pid %d on %.60s now", h->rank,
             h->size, h->pid, h->host);
    *out = NULL;
    return sh_dispatch_lose(d, g, why, false);
}

static sh_status hear_hello(sh_dispatch *d, const sh_wire_peer *from, const Shoal__Hello *h) {
    if (!hello_is_good(h)) {
        say_leave(d, from, "hello: rank, size or group is not allowed");
        return SH_OK;
    }
    if (d->o->run && h->has_epoch && h->epoch != sh_store_epoch(d->store)) {
        say_leave(d, from, "this rank served another coordinator");
        return SH_OK;
    }
    sh_group *g = NULL;
    SH_TRY(find_group(d, h, &g));
    if (!g) SH_TRY(group_add(d, h, &g));
    if (g->state == SH_GROUP_LOST || g->size != h->size) {
        say_leave(d, from, g->state == SH_GROUP_LOST ? g->fault : "another rank of this group gave another size");
        return SH_OK;
    }
    sh_rank_seat *seat = &g->seat[h->rank];
    bool again = seat->peer.len && (seat->peer.len != from->len || memcmp(seat->peer.id, from->id, from->len) != 0);
    g->here += seat->peer.len == 0;
    seat->peer = *from;
    seat->pid = h->pid;
    seat->heard = seat->moved = sh_now();
    snprintf(seat->host, sizeof seat->host, "%s", h->host);
    if (h->rank == 0) g->gone = 0;
    if (g->here == g->size && g->state == SH_GROUP_STARTING) {
        g->state = g->max_seqs > 0 ? SH_GROUP_READY : SH_GROUP_LOADING; /* ready already: it served our predecessor */
        g->loading = sh_now();
    }
    say_welcome(d, g, from);
    return again && h->rank == 0 && g->state == SH_GROUP_READY ? give_again(d, g) : SH_OK;
}

/* The weights are the store's, and of all groups that serve: another checkpoint would answer the rest of a job in
 * another voice. The store lets go of them as long as nothing came of them. */
static sh_status pin_weights(const sh_dispatch *d, const sh_group *g, uint64_t weights) {
    char text[24];
    for (int i = 0; i < d->n; i++) {
        const sh_group *other = d->group[i];
        if (other != g && other->state == SH_GROUP_READY && other->weights != weights)
            SH_FAIL(SH_EINPUT,
                    "group %s (%s) has weights with fingerprint %016" PRIx64 ", group %s (%s) %016" PRIx64
                    ": all must have the same",
                    other->name, other->seat[0].host, other->weights, g->name, g->seat[0].host, weights);
    }
    snprintf(text, sizeof text, "%016" PRIx64, weights);
    return sh_store_pin(d->store, "weights", text);
}

static sh_status hear_ready(sh_dispatch *d, sh_group *g, const Shoal__Ready *r) {
    sh_status st = pin_weights(d, g, r->fingerprint);
    if (st == SH_EINPUT) {
        char why[1024];
        snprintf(why, sizeof why, "%s", sh_error_text());
        SH_TRY(sh_dispatch_lose(d, g, why, true)); /* other groups of a run may have the right ones */
        return d->o->run && d->expected <= 1 ? sh_jobs_fail(d->jobs, why) : SH_OK;
    }
    SH_TRY(st);
    g->weights = r->fingerprint;
    g->kv_tokens = r->kv_tokens;
    g->kv_total = r->kv_total;
    g->max_seqs = r->max_seqs < 1 ? 1 : r->max_seqs > SH_MAX_SEQS ? SH_MAX_SEQS : r->max_seqs;
    for (size_t i = 0; i < r->n_note; i++) sh_group_add_note(g, r->note[i]);
    if (g->here == g->size) g->state = SH_GROUP_READY;
    for (int i = 0; i < g->size; i++) g->seat[i].moved = sh_now();
    return SH_OK;
}

static void hear_heartbeat(sh_dispatch *d, sh_group *g, int rank, const Shoal__Heartbeat *h) {
    sh_rank_seat *s = &g->seat[rank];
    if (h->step != s->step || !h->busy) s->moved = sh_now();
    s->step = h->step;
    s->busy = h->busy;
    if (h->has_report) s->report = h->report;
    if (h->times) {
        s->has_times = true;
        s->times = *h->times;
        s->times.rank = rank;
        s->times.base.n_unknown_fields = 0;
        s->times.base.unknown_fields = NULL;
    }
    if (h->trace && d->trace) sh_tracelog_keep(d->trace, g, rank, h->trace);
    if (h->routing && sh_group_keep_routing(g, rank, h->routing) != SH_OK) sh_warn("%s", sh_error_text());
    if (rank == 0 && h->has_running) g->said_running = h->running;
    Shoal__ToRank m = SHOAL__TO_RANK__INIT;
    m.has_heartbeat = m.heartbeat = true;
    if (send_packed(d, &s->peer, &m) == SH_OK && rank == 0) g->gone = 0; /* its queue was full, and is no more */
}

typedef struct adoption {
    sh_dispatch *d;
    sh_running *r; /* NULL: it is answered already, or nobody wants it any more */
    bool done;
} adoption;

static sh_status adopt(void *ctx, const sh_stored_request *q) {
    adoption *a = ctx;
    sh_job_entry *e = sh_jobs_find(a->d->jobs, q->job);
    a->done = q->done;
    if (q->done || !e || e->job.state == SH_JOB_CANCELLED) return SH_OK;
    sh_jobs_use(a->d->jobs, e);
    if (q->length > 0) sh_tail_take(&e->tail, q->kind, q->length);
    return sh_running_create(a->d->intake, a->d->store, q, &a->r);
}

/* Tokens of a request that this incarnation did not give out: its predecessor did. */
static sh_status take_up(sh_dispatch *d, sh_group *g, uint64_t key, sh_running **out) {
    adoption a = {.d = d};
    bool found = false;
    *out = NULL;
    SH_TRY(sh_store_request_get(d->store, key, adopt, &a, &found));
    if (a.done)
        SH_TRY(sh_group_add_done(g, key));
    else if (!a.r)
        sh_dispatch_say_cancel(d, g, key);
    if (!a.r) return SH_OK;
    sh_dispatch_insert(d, a.r);
    sh_dispatch_set_owner(d, a.r, g);
    *out = a.r;
    return SH_OK;
}

sh_status sh_dispatch_refuse(sh_dispatch *d, const sh_running *r, int status, const char *code, const char *param,
                             const char *message) {
    sh_stored_request q = {.key = r->key,
                           .job = r->job,
                           .number = r->request.number,
                           .hash = r->request.hash,
                           .custom_id = r->request.custom_id};
    return sh_jobs_refuse(d->jobs, &q, status, code, param, message);
}

sh_status sh_dispatch_answer(sh_dispatch *d, sh_running *r) {
    sh_buf row;
    sh_buf_init(&row, SH_MAX_ROW_BYTES);
    sh_status st = sh_running_row(r, d->intake, (int64_t)time(NULL), &row);
    if (st == SH_OK) {
        st = sh_jobs_answer(d->jobs, r->key, r->job, r->request.number, &row, true, r->request.prompt.n);
    } else if (st == SH_ELIMIT) { /* it would fit into no message */
        char text[160];
        snprintf(text, sizeof text, "logprobs: the row of %zu tokens is longer than %zu bytes: allowed are fewer",
                 r->request.prompt.n + r->ids.n, SH_MAX_ROW_BYTES);
        st = sh_dispatch_refuse(d, r, 413, "row_too_long", "logprobs", text);
    }
    sh_buf_release(&row);
    SH_TRY(st);
    sh_job_entry *e = sh_jobs_find(d->jobs, r->job);
    if (e) sh_tail_end(&e->tail, &r->request, (int64_t)r->ids.n);
    sh_dispatch_remove(d, r);
    return SH_OK;
}

static sh_status hear_tokens(sh_dispatch *d, sh_group *g, const Shoal__Tokens *t) {
    sh_running *r = sh_dispatch_find(d, t->key);
    if (!r) SH_TRY(take_up(d, g, t->key, &r));
    if (!r) return SH_OK;
    int added = 0, known = r->tokens.n + r->prompt.n;
    sh_status st = sh_running_take(r, t, &added);
    if (st == SH_EPEER) {
        /* What was lost with a connection is missing here until the rank hears our welcome and sends all again. */
        sh_debug("group %s: %s", g->name, sh_error_text());
        return SH_OK;
    }
    SH_TRY(st);
    uint64_t new = (uint64_t)(r->tokens.n + r->prompt.n - known) + (r->finish != SH_FINISH_NONE);
    sh_group *owner = sh_dispatch_group(d, r->group);
    g->taken += new;
    d->progress += new;
    if (new) clear_suspicion(r, owner);
    sh_job_entry *e = sh_jobs_find(d->jobs, r->job);
    if (e) e->live += (uint64_t)added;
    if (r->finish == SH_FINISH_NONE) return SH_OK;
    if (owner && owner != g) sh_dispatch_say_cancel(d, owner, r->key);
    SH_TRY(sh_group_add_done(g, r->key));
    return sh_dispatch_answer(d, r);
}

/* What its leader's KV cannot hold may fit elsewhere; the rest would be refused everywhere. */
static sh_status hear_rejected(sh_dispatch *d, sh_group *g, const Shoal__Rejected *j) {
    sh_running *r = sh_dispatch_find(d, j->key);
    if (!r || r->group != g->number) return SH_OK;
    if (!sh_allot_fits(g, r)) {
        sh_dispatch_set_owner(d, r, NULL);
        return sh_dispatch_wait(d, r);
    }
    SH_TRY(sh_dispatch_refuse(d, r, 413, "too_long", "prompt", j->reason));
    sh_dispatch_remove(d, r);
    return SH_OK;
}

static sh_status hear_fault(sh_dispatch *d, sh_group *g, int rank, const Shoal__Fault *f) {
    char text[1500], own[24];
    size_t n = (size_t)snprintf(own, sizeof own, "rank %d: ", rank); /* it may have said who it is */
    const char *what = strncmp(f->text, own, n) == 0 ? f->text + n : f->text;
    snprintf(text, sizeof text, "rank %d (%s): %s", rank, g->seat[rank].host, what);
    return sh_dispatch_lose(d, g, text, f->has_lasting && f->lasting);
}

sh_status sh_dispatch_hear(sh_dispatch *d, const sh_wire_peer *from, const Shoal__FromRank *m) {
    if (m->hello) SH_TRY(hear_hello(d, from, m->hello));
    sh_group *g = NULL;
    int rank = -1;
    for (int i = 0; i < d->n && rank < 0; i++) rank = sh_group_seat(g = d->group[i], from);
    if (rank < 0) return SH_OK; /* a stranger is not answered: it will say hello */
    if (g->state == SH_GROUP_LOST) {
        if (m->fault) return hear_fault(d, g, rank, m->fault);
        say_leave(d, from, g->fault);
        return SH_OK;
    }
    g->seat[rank].heard = sh_now();
    if (m->ready && rank == 0) SH_TRY(hear_ready(d, g, m->ready));
    if (m->heartbeat) hear_heartbeat(d, g, rank, m->heartbeat);
    for (size_t i = 0; rank == 0 && i < m->n_tokens; i++) SH_TRY(hear_tokens(d, g, m->tokens[i]));
    for (size_t i = 0; rank == 0 && i < m->n_rejected; i++) SH_TRY(hear_rejected(d, g, m->rejected[i]));
    return m->fault ? hear_fault(d, g, rank, m->fault) : SH_OK;
}

sh_status sh_dispatch_watch(sh_dispatch *d) {
    double now = sh_now();
    for (int i = 0; i < d->n; i++) {
        char text[300];
        sh_group *g = d->group[i];
        if (g->state == SH_GROUP_LOST) continue;
        bool dead = sh_group_is_dead(g, now, d->silent, text, sizeof text);
        if (!dead && g->state == SH_GROUP_STARTING && now - g->born > SH_START_MOST) {
            snprintf(text, sizeof text, "%d of %d ranks came within %.0f s", g->here, g->size, SH_START_MOST);
            dead = true;
        }
        if (!dead && g->state == SH_GROUP_LOADING && now - g->loading > g->load) {
            snprintf(text, sizeof text, "its weights were not loaded within %.0f s", g->load);
            dead = true;
        }
        if (!dead && g->gone > 0 && now - g->gone > 1e-3 * d->o->heartbeat_ms * SH_GONE_BEATS) {
            snprintf(text, sizeof text, "rank 0 (%s): %s", g->seat[0].host, g->gone_why);
            dead = true;
        }
        sh_allot_measure(g, now);
        if (dead) SH_TRY(sh_dispatch_lose(d, g, text, false));
    }
    return SH_OK;
}

sh_status sh_dispatch_after_commit(sh_dispatch *d) {
    d->unsaved = false;
    for (int i = 0; i < d->n; i++) say_done(d, d->group[i]);
    return sh_dispatch_give(d);
}

int sh_dispatch_suspects(const sh_dispatch *d) {
    int n = 0;
    for (int i = 0; i < SH_DISPATCH_BUCKETS; i++)
        for (const sh_running *r = d->bucket[i]; r; r = r->next) n += r->lost + 1 >= SH_SUSPECT_AT;
    return n;
}

bool sh_dispatch_has_news(const sh_dispatch *d) {
    bool news = d->unsaved;
    for (int i = 0; !news && i < d->n; i++) news = d->group[i]->n_done > 0;
    return news;
}

void sh_dispatch_wake(sh_dispatch *d, bool from_start) {
    d->exhausted = false;
    if (from_start) d->cursor = 0;
}

void sh_dispatch_drop_job(sh_dispatch *d, uint64_t job) {
    for (int i = 0; i < SH_DISPATCH_BUCKETS; i++)
        for (sh_running *r = d->bucket[i], *next; r; r = next) {
            next = r->next;
            if (r->job != job) continue;
            sh_group *g = sh_dispatch_group(d, r->group);
            if (g) sh_dispatch_say_cancel(d, g, r->key);
            sh_dispatch_remove(d, r);
        }
}

sh_status sh_dispatch_supervised(sh_dispatch *d, const Shoal__Supervision *s) {
    d->expected = s->groups;
    for (size_t i = 0; i < s->n_ended; i++) {
        sh_group *g = group_by_name(d, s->ended[i]->group, NULL);
        if (g) SH_TRY(sh_dispatch_lose(d, g, s->ended[i]->reason, false));
    }
    return SH_OK;
}

int sh_dispatch_groups(const sh_dispatch *d) {
    return d->n;
}

sh_status sh_dispatch_fill(const sh_dispatch *d, int i, Shoal__GroupState *g) {
    return sh_group_fill(d->group[i], g);
}

void sh_dispatch_release_group(Shoal__GroupState *g) {
    sh_group_release_state(g);
}
