/* A worker group as the coordinator knows it: ranks, plan, signs of life. Private to dispatch. Sends nothing. */
#ifndef SH_COORDINATOR_GROUP_H
#define SH_COORDINATOR_GROUP_H

#include "coordinator/store.h"
#include "partition/plan.h"
#include "proto/job.pb-c.h"
#include "proto/wire.h"

#define SH_MAX_GROUP_NAME 127
#define SH_MAX_NOTES      16

typedef struct sh_rank_seat {
    sh_wire_peer peer; /* len 0: not here */
    char host[64];
    int pid;
    double heard; /* last sign of life */
    double moved; /* when its step number last changed, or it was last idle */
    uint64_t step;
    bool busy, has_times;
    Shoal__StageTimes times;
    uint64_t report;   /* the last one that it answered */
    sh_buf routing;    /* packed, as last heard */
    bool routing_news; /* not in the store yet */
} sh_rank_seat;

typedef enum sh_group_state { SH_GROUP_STARTING, SH_GROUP_LOADING, SH_GROUP_READY, SH_GROUP_LOST } sh_group_state;

typedef struct sh_group {
    int number; /* never reused */
    char name[SH_MAX_GROUP_NAME + 1];
    int size, here;
    sh_rank_seat *seat; /* [size] */
    sh_group_state state;
    Shoal__Plan *plan;
    char *plan_text, *fault;
    bool lasting; /* the fault would come again */
    char *note[SH_MAX_NOTES];
    int n_notes;
    uint64_t weights; /* fingerprint, as its leader said when it was ready */
    int kv_tokens, max_seqs;
    int64_t kv_total; /* 0: not told */
    int given;        /* requests it has … */
    int unproven;     /* … of which it has not made a token or score yet … */
    int testing;      /* … and which are under suspicion (allot.h): 0 or 1 */
    uint64_t taken;   /* tokens and scores that came from it and were new */
    uint64_t report;  /* that its ranks were asked for last; 0: none */
    int said_running; /* as its leader's heartbeat says; −1: nothing yet */
    double gone;      /* since when its leader cannot be reached; 0: it can, as far as is known */
    char gone_why[200];
    double born;
    double stall;   /* seconds that a step may last */
    double loading; /* since when it loads … */
    double load;    /* … and how many seconds it may */
    /* how fast it is: allot.h */
    double pace, measured, spent; /* seconds per token and sequence, 0: not known; when looked at last; since then */
    uint64_t paced;
    uint64_t *done; /* keys to say `done` for, after the commit */
    int n_done, cap_done;
} sh_group;

/* How often a rank's rows chose each expert since the rank started: kept until saved, under a name for the rank's life.
 */
sh_status sh_group_keep_routing(sh_group *g, int rank, const Shoal__Routing *m);
sh_status sh_group_save_routing(sh_group *g, sh_store *store);
sh_status sh_group_create(const char *name, int size, int number, sh_group **out);
void sh_group_destroy(sh_group **g);
sh_status sh_group_add_done(sh_group *g, uint64_t key);
/* The first text stays, but for that of a lasting fault: what the others say follows from it. */
void sh_group_set_fault(sh_group *g, const char *text, bool lasting);
void sh_group_add_note(sh_group *g, const char *text);
/* Seat of a peer; −1: not of this group. */
int sh_group_seat(const sh_group *g, const sh_wire_peer *p);
/* It works, and its leader can be given requests. */
bool sh_group_serves(const sh_group *g);
const char *sh_group_state_name(sh_group_state s);
/* A silent or stuck rank, described in text; false: all is well. */
bool sh_group_is_dead(const sh_group *g, double now, double silent, char *text, size_t size);
sh_status sh_group_fill(const sh_group *g, Shoal__GroupState *out);
void sh_group_release_state(Shoal__GroupState *g);

#endif
