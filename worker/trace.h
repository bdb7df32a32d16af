/*
 * A rank's timeline as messages (Trace of proto/group.proto): what the uplink puts into heartbeats, piece by piece. All
 * room is made at creation. One thread uses it, another fills the timeline.
 */
#ifndef SH_WORKER_TRACE_H
#define SH_WORKER_TRACE_H

#include "common/timeline.h"
#include "proto/group.pb-c.h"
#include "worker/ranks.h"

#define SH_TRACE_RING  65536 /* slices of a rank on their way: several steps of the deepest models */
#define SH_TRACE_PIECE 16384 /* slices of one message: below 200 KiB */

typedef struct sh_trace sh_trace;

sh_status sh_trace_create(sh_timeline *t, sh_rank_clock clock, sh_trace **out); /* borrows t */
void sh_trace_destroy(sh_trace **x);
bool sh_trace_is_full(const sh_trace *x); /* a whole piece waits */
/* The next piece, borrowed until the next call; NULL: nothing waits. */
Shoal__Trace *sh_trace_next(sh_trace *x);
/* The last piece did not get away: its slices count as dropped. */
void sh_trace_lost(sh_trace *x);

#endif
