/*
 * One group of a run: an MPI job (or one process) that holds a replica of the model. Started, watched with the help of
 * what the coordinator says of it, started again after growing pauses when it ends, and given up when a number of tries
 * in a row got nothing done, or when its fault would come again. Says nothing itself: the session does.
 */
#ifndef SH_CLI_REPLICA_H
#define SH_CLI_REPLICA_H

#include "cli/attempt.h"
#include "cli/launch.h"
#include "cli/logtail.h"
#include "cli/runstore.h"
#include "coordinator/supervise.h"
#include "proto/job.pb-c.h"

#define SH_REPLICA_CONNECT 60.0 /* seconds until the first rank of a group is heard of */

typedef struct sh_replica_options {
    int number;             /* from 1 */
    sh_launch_options like; /* what all its starts have in common; texts are borrowed */
    const sh_runstore *store;
} sh_replica_options;

typedef enum sh_replica_state {
    SH_REPLICA_WAITING,  /* to be started when its pause is over */
    SH_REPLICA_STARTING, /* its launcher runs */
    SH_REPLICA_READY,    /* it gets work */
    SH_REPLICA_GIVEN_UP
} sh_replica_state;

typedef enum sh_replica_event {
    SH_REPLICA_NOTHING,
    SH_REPLICA_BECAME_READY,
    SH_REPLICA_FAILED, /* attempt.reason says why; it will be started again */
    SH_REPLICA_GAVE_UP /* the same; it will not */
} sh_replica_event;

typedef struct sh_replica {
    sh_replica_options o;
    sh_replica_state state;
    sh_attempt attempt;
    int starts;
    char name[96], mark[112], log[PATH_MAX + 32], part[32];
    sh_child child;
    sh_launch launch;
    sh_logtail tail;
    double started, gone; /* gone: when its launcher was seen to have ended; 0: not yet */
    bool seen;            /* the coordinator knows it */
    bool lasting;         /* given up: its fault would come again */
    bool progressed;      /* this start got something done */
    /* the start that ended last, until the coordinator has heard of it; "": none */
    char ended[96], ended_reason[1024];
} sh_replica;

void sh_replica_init(sh_replica *r, const sh_replica_options *o);
void sh_replica_release(sh_replica *r);
/* One look. g: what the coordinator says of this start, or NULL; endpoint: where its ranks connect; most: tries in a
 * row. Fails only when the launcher cannot be started at all. */
sh_status sh_replica_tend(sh_replica *r, const Shoal__GroupState *g, const char *endpoint, int most,
                          sh_replica_event *event);
/* Asks it to end; sh_replica_end waits. */
void sh_replica_ask_end(sh_replica *r);
/* Ends it, and all that bears its mark; it is to be started again unless it was given up. */
void sh_replica_end(sh_replica *r);
static inline bool sh_replica_lives(const sh_replica *r) {
    return r->state != SH_REPLICA_GIVEN_UP;
}

/* What the process wrote last before it ended, as far as it looks like a reason. */
void sh_child_reason(const sh_child *c, sh_logtail *tail, char *to, size_t size);

#endif
