/*
 * A rank's line to the coordinator: a thread that owns the ZeroMQ socket, says hello, keeps the heartbeat, takes work
 * in and sends tokens out, and notices when it is alone. The rank's main thread exchanges plain data with it and never
 * waits for it.
 *
 * Silence: after three heartbeats without an answer the rank says hello again, with the epoch that it knows; to a
 * welcome (of the same coordinator or of its successor) it answers with everything not yet acknowledged. After
 * orphan_ms it gives up: one line, and the main thread is told; if that is stuck, the process ends by _exit(3).
 */
#ifndef SH_WORKER_UPLINK_H
#define SH_WORKER_UPLINK_H

#include "model/config.h"
#include "model/loading.h"
#include "proto/group.pb-c.h"
#include "proto/link.h"
#include "worker/seq.h"
#include "worker/trace.h"

typedef struct sh_uplink sh_uplink;

typedef struct sh_uplink_options {
    const char *endpoint, *keys, *group;
    int rank, size;
    int first_wait_ms; /* how long to wait for the first welcome; 0: 120,000 */
} sh_uplink_options;

typedef enum sh_uplink_state {
    SH_UPLINK_SERVING, /* also before the first welcome */
    SH_UPLINK_LEAVE,   /* told to leave */
    SH_UPLINK_ORPHAN   /* nothing heard for too long, or the socket failed */
} sh_uplink_state;

typedef enum sh_inbox_kind { SH_INBOX_WORK, SH_INBOX_CANCEL } sh_inbox_kind;
typedef struct sh_inbox {
    sh_inbox_kind kind;
    uint64_t key;
    sh_seq *seq; /* WORK: the receiver's to keep */
} sh_inbox;

/* What a heartbeat says; the main thread refreshes it as often as it likes. */
typedef struct sh_beat {
    uint64_t step; /* anything that shows progress counts; stands still when the main thread is stuck */
    bool busy;
    uint64_t steps;                                            /* micro-batches computed */
    double weights, attention, experts, exchange, other, idle; /* seconds */
    uint64_t bytes, sent;
    double exposed[SH_KV_KINDS], travel[SH_KV_KINDS]; /* seconds, of the exchange of experts */
    uint64_t sent_by_tag[SH_LINK_TAGS];
    uint64_t expert_rows;
    bool leader; /* what is below is meant */
    int running, waiting;
    int64_t kv_free;
    uint64_t shared_rows;
    uint64_t report; /* answers sh_uplink_asked */
} sh_beat;

sh_status sh_uplink_start(const sh_uplink_options *o, sh_uplink **out);
/* Sends what is left, then Fault{fault, lasting} unless NULL; ends the thread; frees. */
void sh_uplink_stop(sh_uplink **u, const char *fault, bool lasting);

sh_uplink_state sh_uplink_look(const sh_uplink *u);
/* Why it is no longer serving: borrowed, "" when nobody said. */
const char *sh_uplink_reason(const sh_uplink *u);
/* Waits for the first welcome; borrowed until stop. SH_EPEER when orphaned, SH_ECANCELLED when told to leave. */
sh_status sh_uplink_welcome(sh_uplink *u, const Shoal__Welcome **out);
/* Leader: every rank has its weights; from here on work is taken in. vocab checks token ids. note may be NULL. */
sh_status sh_uplink_ready(sh_uplink *u, int kv_tokens, int64_t kv_total, int max_seqs, uint64_t fingerprint, int vocab,
                          const char *note);
/* Leader: the next thing the coordinator wants, if any. */
bool sh_uplink_take(sh_uplink *u, sh_inbox *out);
/* Leader: one token or score of a sequence. Copies; allocates nothing; waits only when the queue is full. */
void sh_uplink_token(sh_uplink *u, uint64_t key, const sh_token *t);
/* Leader: the group can never run this one. */
void sh_uplink_reject(sh_uplink *u, uint64_t key, const char *reason);
void sh_uplink_beat(sh_uplink *u, const sh_beat *b);
/* The number of the last report that the coordinator asked for, 0: none. A beat with it is told at once, with all of
 * the trace that waits and the routing as it was given last. */
uint64_t sh_uplink_asked(const sh_uplink *u);
/* How loading gets on, until it is done. */
void sh_uplink_load(sh_uplink *u, const sh_load_times *t);
/* How often rows of this rank chose each expert: [layers, experts] of layers first, first + 1, …; those without experts
 * have zeros. Copies; the first call makes room and may fail. Told with the next heartbeat. */
sh_status sh_uplink_routing(sh_uplink *u, int first, int layers, int experts, const uint64_t *chosen);
/* From here on heartbeats carry pieces of it, as they come and all that is left at the end. Borrowed until stop. */
void sh_uplink_trace(sh_uplink *u, sh_trace *x);

#endif
