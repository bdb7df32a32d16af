/*
 * Dispatch: groups, their ranks, and which request is where. Hears FromRank messages, gives work to leaders, takes
 * tokens, answers requests, notices groups that are lost. Speaks to ranks itself; writes through jobs and store;
 * commits nothing: the loop does, and calls sh_dispatch_after_commit, before which nobody hears `done` or gets new
 * work.
 *
 *   group:    starting ──all ranks said hello──▶ loading ──leader ready──▶ ready
 *                 └──────────────┴── fault, silence, stall, told to leave ──┴──▶ lost   (its requests wait again)
 *   request:  waiting ──work──▶ at a group ──finish──▶ answered ──commit──▶ done is said
 */
#ifndef SH_COORDINATOR_DISPATCH_H
#define SH_COORDINATOR_DISPATCH_H

#include "coordinator/coordinator.h"
#include "coordinator/jobs.h"
#include "partition/routing.h"
#include "proto/group.pb-c.h"
#include "proto/wire.h"

#define SH_SILENT_BEATS 10    /* heartbeats missed in a row: the rank counts as dead */
#define SH_GONE_BEATS   5     /* heartbeats in which a leader out of reach may come back, or be heard */
#define SH_STALL_LEAST  60.0  /* seconds for a busy rank to finish a step, plus what its arithmetic … */
#define SH_STALL_RATE   1e9   /* … takes at so many multiply-adds a second: far below any machine's */
#define SH_LOAD_LEAST   120.0 /* seconds for the ranks of a group to load their weights, plus what they take … */
#define SH_LOAD_RATE    20e6  /* … at so many bytes a second, all ranks' together */
#define SH_START_MOST   120.0 /* seconds from the first rank's hello to the last one's */
#define SH_LOST_KEPT    8     /* lost groups that a status still shows */

typedef struct sh_dispatch sh_dispatch;

/* Borrows all; o as the coordinator's, with heartbeat_ms and orphan_ms set. */
sh_status sh_dispatch_create(const sh_coordinator_options *o, const sh_config *config, sh_store *s, sh_intake *in,
                             sh_jobs *jobs, sh_wire *wire, sh_dispatch **out);
void sh_dispatch_destroy(sh_dispatch **d);

/* One message of a rank. What is wrong with it is the rank's fault and ends its group; failures are the store's. */
sh_status sh_dispatch_hear(sh_dispatch *d, const sh_wire_peer *from, const Shoal__FromRank *m);
/* Looks for silent and stuck ranks. Call when all messages that wait were heard. */
sh_status sh_dispatch_watch(sh_dispatch *d);
/* Token progress into the store. */
sh_status sh_dispatch_save(sh_dispatch *d);
/* Says `done` for what was just committed, and keeps leaders supplied. */
sh_status sh_dispatch_after_commit(sh_dispatch *d);
bool sh_dispatch_has_news(const sh_dispatch *d); /* answers wait for a commit */
/* There may be something new to give out. from_start: also among old lines, as a failed job goes on. */
void sh_dispatch_wake(sh_dispatch *d, bool from_start);
/* A job was cancelled: groups forget its requests. */
void sh_dispatch_drop_job(sh_dispatch *d, uint64_t job);
/* All ranks are told to leave. */
void sh_dispatch_leave(sh_dispatch *d, const char *reason);

/* Ranks of groups that serve are asked for a heartbeat of now; a group's status says when all have answered. */
void sh_dispatch_ask_report(sh_dispatch *d);

/* What the supervisor of a run knows: groups that it keeps up, and groups whose processes are gone. */
sh_status sh_dispatch_supervised(sh_dispatch *d, const Shoal__Supervision *s);

/* How often each expert was chosen in the life of this store: the caller's to destroy. SH_EINPUT: no experts. */
sh_status sh_dispatch_routing(sh_dispatch *d, sh_routing **out);
/* Requests that were in hand, without progress, when two groups or more ended in a row. */
int sh_dispatch_suspects(const sh_dispatch *d);

int sh_dispatch_groups(const sh_dispatch *d);
/* Group i for a status; free with sh_dispatch_release_group. */
sh_status sh_dispatch_fill(const sh_dispatch *d, int i, Shoal__GroupState *g);
void sh_dispatch_release_group(Shoal__GroupState *g);

#endif
