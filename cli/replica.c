/* One group of a run. See replica.h. */
#include "cli/replica.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "common/clock.h"

#define FAULT_WAIT 0.3 /* seconds for a group's last words to arrive by way of the coordinator */

void sh_child_reason(const sh_child *c, sh_logtail *tail, char *to, size_t size) {
    char how[128], why[768];
    sh_child_describe(c, how, sizeof how);
    if (sh_logtail_reason(tail, WIFSIGNALED(c->status), why, sizeof why))
        snprintf(to, size, "%s: %s", how, why);
    else
        snprintf(to, size, "%s", how);
}

/* The first group writes into the run's own log, as a lone one does. */
void sh_replica_init(sh_replica *r, const sh_replica_options *o) {
    *r = (sh_replica){.o = *o};
    if (o->number == 1)
        snprintf(r->log, sizeof r->log, "%s", o->store->log);
    else
        snprintf(r->log, sizeof r->log, "%s/group-%d.log", o->store->path, o->number);
    sh_logtail_open(&r->tail, r->log);
}

void sh_replica_release(sh_replica *r) {
    sh_launch_release(&r->launch);
    sh_logtail_close(&r->tail);
}

static sh_status start(sh_replica *r, const char *endpoint) {
    r->starts++;
    snprintf(r->name, sizeof r->name, "run-%d-%d-%d", (int)getpid(), r->o.number, r->starts);
    snprintf(r->mark, sizeof r->mark, "SHOAL_GROUP=%s", r->name);
    sh_launch_options lo = r->o.like;
    lo.endpoint = endpoint;
    lo.group = r->name;
    sh_launch_release(&r->launch);
    SH_TRY(sh_launch_make(&lo, &r->launch));
    sh_child_spec spec = {
        .argv = r->launch.argv, .env = r->launch.env, .log = r->log, .keep_fd = -1, .death_signal = SIGTERM};
    sh_logtail_mark(&r->tail);
    r->started = sh_now();
    r->gone = 0;
    r->seen = r->progressed = false;
    SH_TRY(sh_child_start(&spec, &r->child));
    r->state = SH_REPLICA_STARTING;
    return SH_OK;
}

void sh_replica_ask_end(sh_replica *r) {
    sh_child_ask(&r->child);
}

void sh_replica_end(sh_replica *r) {
    sh_child_end(&r->child, SH_RUN_GRACE);
    if (r->mark[0]) (void)sh_process_end_marked(r->mark, 1.0); /* ranks whose launcher was killed */
    if (r->state != SH_REPLICA_GIVEN_UP) r->state = SH_REPLICA_WAITING;
}

/* Ends what is left of it and notes the failure. why "": what the launcher left in its log. */
static sh_replica_event lose(sh_replica *r, const char *why, bool lasting, int most) {
    bool ran = sh_child_poll(&r->child);
    snprintf(r->attempt.reason, sizeof r->attempt.reason, "%s", why);
    sh_replica_end(r);
    if (!ran && !*why) sh_child_reason(&r->child, &r->tail, r->attempt.reason, sizeof r->attempt.reason);
    if (r->seen) {
        snprintf(r->ended, sizeof r->ended, "%s", r->name);
        snprintf(r->ended_reason, sizeof r->ended_reason, "%s", r->attempt.reason);
    }
    r->lasting = lasting;
    bool again = sh_attempt_again(&r->attempt, r->progressed, most, sh_now());
    if (again && !lasting) return SH_REPLICA_FAILED;
    r->state = SH_REPLICA_GIVEN_UP;
    return SH_REPLICA_GAVE_UP;
}

/* The launcher has ended; why, its ranks have told the coordinator, if they could. */
static sh_replica_event mourn(sh_replica *r, const char *fault, bool lasting, int most) {
    if (r->gone <= 0) r->gone = sh_now();
    if (!fault && sh_now() - r->gone < FAULT_WAIT) return SH_REPLICA_NOTHING;
    return lose(r, fault ? fault : "", lasting, most);
}

/* The coordinator has not heard of it, or has forgotten it. */
static sh_replica_event miss(sh_replica *r, int most) {
    const char *hosts = r->o.like.hosts;
    char why[400];
    if (r->seen) return lose(r, "the coordinator has given it up", false, most);
    if (sh_now() - r->started <= SH_REPLICA_CONNECT) return SH_REPLICA_NOTHING;
    snprintf(why, sizeof why, "no rank connected within %.0f s%s%.300s", SH_REPLICA_CONNECT, hosts ? " from " : "",
             hosts ? hosts : "");
    return lose(r, why, false, most);
}

sh_status sh_replica_tend(sh_replica *r, const Shoal__GroupState *g, const char *endpoint, int most,
                          sh_replica_event *event) {
    *event = SH_REPLICA_NOTHING;
    if (r->state == SH_REPLICA_GIVEN_UP) return SH_OK;
    if (r->state == SH_REPLICA_WAITING) return sh_now() < r->attempt.not_before ? SH_OK : start(r, endpoint);
    const char *fault = g && g->fault && *g->fault ? g->fault : NULL;
    bool lasting = g && g->has_lasting && g->lasting;
    if (g) r->seen = true;
    if (g && g->has_progress && g->progress) r->progressed = true;
    if (!sh_child_poll(&r->child))
        *event = mourn(r, fault, lasting, most);
    else if (!g)
        *event = miss(r, most);
    else if (strcmp(g->state, "lost") == 0)
        *event = lose(r, fault ? fault : "fell silent", lasting, most);
    else if (strcmp(g->state, "ready") == 0 && r->state != SH_REPLICA_READY) {
        r->state = SH_REPLICA_READY;
        *event = SH_REPLICA_BECAME_READY;
    }
    return SH_OK;
}
