/*
 * The one loop. See coordinator.h. It hears everybody, commits, and only then tells anybody; what it does in between is
 * in service.c (clients), dispatch.c (groups), jobs.c (counts and answers) and store.c.
 *
 *     hear messages → sweep cancelled jobs → save progress (now and then) → commit → say done, acknowledge, give out
 * work
 */
#include "coordinator/coordinator.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>
#include "common/clock.h"
#include "common/file.h"
#include "common/hash.h"
#include "common/log.h"
#include "coordinator/dispatch.h"
#include "coordinator/service.h"

#define HEAR_AT_ONCE   256 /* messages between two commits … */
#define HEAR_SECONDS   0.5 /* … and how long they may take: acknowledgements, heartbeats and clients wait meanwhile */
#define IDLE_MS        100
#define GATHER_MS      10 /* answers wait at most this long for company before they are committed */
#define FENCE_SECONDS  1.0
#define WATCH_SECONDS  0.25
#define LISTEN_SECONDS 10.0 /* for a predecessor on this node to notice that it is fenced */
#define HEARTBEAT_MS   1000
#define ORPHAN_RUN_MS  120000
#define ORPHAN_MS      600000
#define PROGRESS_MS    2000

typedef struct coordinator {
    sh_coordinator_options o;
    sh_config *config;
    sh_intake *intake;
    sh_store *store;
    sh_wire *wire;
    sh_jobs *jobs;
    sh_dispatch *dispatch;
    sh_service *service;
    sh_buf message;
    int signals; /* descriptor */
    double fence_at, watch_at, save_at, dirty_since;
    bool end;
} coordinator;

/* --- what the store is pinned to -----------------------------------------------------------------------------------
 */

/* Of everything that decides an answer and can be read at once; the weights' own fingerprint comes from the ranks. */
static sh_status model_fingerprint(const char *dir, uint64_t *out) {
    uint64_t h = 0, files = 0;
    SH_TRY(sh_settings_hash(dir, &h));
    SH_TRY(sh_weight_files_hash(dir, &files));
    *out = sh_mix64(h ^ files);
    return SH_OK;
}

static sh_status pin_options(coordinator *c) {
    uint64_t h = 0;
    char text[40];
    SH_TRY(model_fingerprint(c->o.model, &h));
    snprintf(text, sizeof text, "%016" PRIx64, h);
    SH_TRY(sh_store_pin(c->store, "the model (fingerprint of its files)", text));
    SH_TRY(sh_store_pin(c->store, "--mode", sh_mode_name(c->o.mode)));
    return sh_store_pin(c->store, "--kv", sh_kv_type_name(c->o.kv));
}

/* --- start and end -------------------------------------------------------------------------------------------------
 */

static sh_status open_signals(coordinator *c, sigset_t *before) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    if (pthread_sigmask(SIG_BLOCK, &set, before) != 0) SH_FAIL(SH_EIO, "signals cannot be blocked");
    c->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (c->signals < 0) SH_FAIL(SH_EIO, "signals cannot be heard: %s", strerror(errno));
    return SH_OK;
}

/* A predecessor on this node still holds the socket until it notices that it is fenced. */
static sh_status listen_patiently(coordinator *c) {
    for (double end = sh_now() + LISTEN_SECONDS;;) {
        sh_status st = sh_wire_listen(c->o.endpoint, c->o.keys, &c->wire);
        if (st == SH_OK || sh_now() > end || !strstr(sh_error_text(), "another process listens")) return st;
        sh_sleep(0.2);
    }
}

static void set_defaults(coordinator *c, const sh_coordinator_options *o) {
    c->o = *o;
    if (c->o.heartbeat_ms <= 0) c->o.heartbeat_ms = HEARTBEAT_MS;
    if (c->o.orphan_ms <= 0) c->o.orphan_ms = o->run ? ORPHAN_RUN_MS : ORPHAN_MS;
    if (c->o.progress_ms <= 0) c->o.progress_ms = PROGRESS_MS;
    /* what the plan holds is what intake allows */
    if (c->o.intake.max_context <= 0) c->o.intake.max_context = c->o.max_context;
}

static sh_status start(coordinator *c) {
    c->config = calloc(1, sizeof *c->config);
    if (!c->config) SH_FAIL(SH_EMEMORY, "no memory for the model's configuration");
    SH_TRY(sh_config_load(c->o.model, c->config));
    SH_TRY(sh_intake_create(c->o.model, &c->o.intake, &c->intake)); /* before a store is claimed for nothing */
    SH_TRY(sh_store_open(c->o.store, &c->store));
    SH_TRY(pin_options(c));
    SH_TRY(sh_store_commit(c->store));
    SH_TRY(sh_jobs_create(c->store, c->intake, &c->o.intake, &c->jobs));
    if (c->o.run) sh_jobs_retry(c->jobs); /* typed again, what failed may have been mended */
    SH_TRY(listen_patiently(c));
    SH_TRY(sh_dispatch_create(&c->o, c->config, c->store, c->intake, c->jobs, c->wire, &c->dispatch));
    return sh_service_create(c->store, c->jobs, c->dispatch, c->wire, c->o.run, &c->service);
}

static void stop(coordinator *c) {
    sh_service_destroy(&c->service);
    sh_dispatch_destroy(&c->dispatch);
    sh_jobs_destroy(&c->jobs);
    sh_wire_close(&c->wire);
    sh_store_close(&c->store);
    sh_intake_destroy(&c->intake);
    sh_buf_release(&c->message);
    free(c->config);
    if (c->signals >= 0) close(c->signals);
}

static sh_status tell_ready(const coordinator *c, int fd) {
    char line[600];
    int n = snprintf(line, sizeof line, "%s\n", sh_wire_endpoint(c->wire));
    sh_info("epoch %" PRIu64 " accepts requests at %s", sh_store_epoch(c->store), sh_wire_endpoint(c->wire));
    if (fd >= 0 && write(fd, line, (size_t)n) != n)
        SH_FAIL(SH_EIO, "the parent process does not listen: %s", strerror(errno));
    return SH_OK;
}

/* --- the loop ------------------------------------------------------------------------------------------------------
 */

static sh_status hear_one(coordinator *c, const sh_wire_peer *from, char kind) {
    if (kind == SH_WIRE_JOB) return sh_service_hear(c->service, from, c->message.data, c->message.len);
    if (kind != SH_WIRE_GROUP) return SH_OK;
    Shoal__FromRank *m = shoal__from_rank__unpack(NULL, c->message.len, c->message.data);
    if (!m) return SH_OK; /* not ours */
    sh_status st = sh_dispatch_hear(c->dispatch, from, m);
    shoal__from_rank__free_unpacked(m, NULL);
    return st;
}

/* *drained: nothing is left that waits to be heard. */
static sh_status hear(coordinator *c, bool *drained) {
    double until = sh_now() + HEAR_SECONDS;
    for (int i = 0; i < HEAR_AT_ONCE && sh_now() < until; i++) {
        sh_wire_peer from = {0};
        char kind = 0;
        bool got = false;
        SH_TRY(sh_wire_recv(c->wire, &from, &kind, &c->message, &got));
        *drained = !got;
        if (!got) return SH_OK;
        SH_TRY(hear_one(c, &from, kind));
    }
    return SH_OK;
}

static sh_status keep_time(coordinator *c, double now, bool drained) {
    if (now >= c->fence_at) {
        SH_TRY(sh_store_check_fence(c->store));
        c->fence_at = now + FENCE_SECONDS;
    }
    if (drained && now >= c->watch_at) { /* what waits to be heard may be the sign of life that is missed */
        SH_TRY(sh_dispatch_watch(c->dispatch));
        c->watch_at = now + WATCH_SECONDS;
    }
    if (now >= c->save_at) {
        SH_TRY(sh_dispatch_save(c->dispatch));
        c->save_at = now + 1e-3 * c->o.progress_ms;
    }
    return SH_OK;
}

/* A commit costs a sync: answers wait a little for company; acknowledgements only for what was heard together. */
static bool commit_is_due(coordinator *c, double now) {
    if (!sh_jobs_is_dirty(c->jobs) && !sh_service_has_replies(c->service) && !sh_dispatch_has_news(c->dispatch)) {
        c->dirty_since = 0;
        return false;
    }
    if (c->dirty_since == 0) c->dirty_since = now;
    return sh_service_has_replies(c->service) || now - c->dirty_since >= 1e-3 * GATHER_MS;
}

static sh_status commit(coordinator *c) {
    SH_TRY(sh_jobs_commit(c->jobs));
    c->dirty_since = 0;
    return sh_service_after_commit(c->service);
}

static void hear_signals(coordinator *c) {
    struct signalfd_siginfo s;
    while (read(c->signals, &s, sizeof s) == (ssize_t)sizeof s) c->end = true;
}

static sh_status turn(coordinator *c, int wait_ms, bool *busy) {
    bool readable = false, drained = true, more = false;
    SH_TRY(sh_wire_poll(c->wire, c->signals, wait_ms, &readable));
    hear_signals(c);
    SH_TRY(hear(c, &drained));
    SH_TRY(sh_jobs_sweep(c->jobs, &more));
    double now = sh_now();
    SH_TRY(keep_time(c, now, drained));
    bool due = commit_is_due(c, now);
    if (due) SH_TRY(commit(c));
    /* lines that are not on disk are nobody's work yet: their numbers could come to mean others */
    if (due || (!sh_jobs_has_uncommitted(c->jobs) && !sh_dispatch_has_news(c->dispatch)))
        SH_TRY(sh_dispatch_after_commit(c->dispatch));
    *busy = !drained || more || c->dirty_since > 0;
    return SH_OK;
}

static sh_status finish(coordinator *c) {
    SH_TRY(sh_dispatch_save(c->dispatch));
    SH_TRY(commit(c));
    sh_dispatch_leave(c->dispatch, "the coordinator has finished");
    return SH_OK;
}

static sh_status loop(coordinator *c) {
    for (bool busy = false; !c->end && !sh_service_must_end(c->service);)
        SH_TRY(turn(c, busy ? GATHER_MS / 2 : IDLE_MS, &busy));
    return finish(c);
}

sh_status sh_coordinator_run(const sh_coordinator_options *o, int ready_fd) {
    coordinator c = {.signals = -1};
    sigset_t before;
    set_defaults(&c, o);
    sh_buf_init(&c.message, 0);
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    sh_status st = open_signals(&c, &before);
    if (st == SH_OK) st = start(&c);
    if (st == SH_OK) st = tell_ready(&c, ready_fd);
    if (st == SH_OK) st = loop(&c);
    if (st != SH_OK && c.dispatch && st == SH_ESTATE)
        sh_dispatch_leave(c.dispatch, "a newer coordinator has taken over");
    stop(&c);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return st == SH_OK ? SH_OK : sh_error_pass(st, __FILE__, __LINE__);
}
