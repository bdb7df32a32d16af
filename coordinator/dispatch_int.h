/* What dispatch.c and giving.c share: the books of what is where. Private to them; see dispatch.h. */
#ifndef SH_COORDINATOR_DISPATCH_INT_H
#define SH_COORDINATOR_DISPATCH_INT_H

#include "coordinator/allot.h"
#include "coordinator/dispatch.h"
#include "coordinator/group.h"
#include "coordinator/running.h"
#include "coordinator/tracelog.h"

#define SH_DISPATCH_BUCKETS 16384

struct sh_dispatch {
    const sh_coordinator_options *o;
    const sh_config *config;
    sh_store *store;
    sh_intake *intake;
    sh_jobs *jobs;
    sh_wire *wire;
    double silent;
    int expected; /* groups that are up or will come: a request that fits none of those that are up waits for them */
    sh_group **group;
    int n, cap, last_number;
    sh_running *bucket[SH_DISPATCH_BUCKETS];
    sh_running **waiting; /* by turn: came back from lost groups, or fit none; in the buckets too */
    uint64_t turns;
    int n_waiting, cap_waiting;
    uint64_t progress;      /* tokens, scores and ends that were new */
    const sh_group *tester; /* set apart for a suspect, or NULL */
    uint64_t cursor;        /* unanswered requests up to this key were taken from the store */
    bool exhausted;         /* there are none behind it */
    bool unsaved;           /* progress of requests that came back must be committed before they are given out again */
    sh_buf out;
    uint64_t reports;    /* number of the last one asked for */
    sh_routing *routing; /* experts are placed by it; NULL: in even shares */
    sh_tracelog *trace;  /* NULL: nobody asked for it */
};

/* --- books --- */

sh_running *sh_dispatch_find(const sh_dispatch *d, uint64_t key);
/* A request is in hand from here on, and has its turn. */
void sh_dispatch_insert(sh_dispatch *d, sh_running *r);
/* Takes it out of everything and frees it. */
void sh_dispatch_remove(sh_dispatch *d, sh_running *r);
sh_status sh_dispatch_save_one(sh_dispatch *d, sh_running *r);
sh_group *sh_dispatch_group(const sh_dispatch *d, int number); /* NULL: none has this number */
sh_allot sh_dispatch_allot(const sh_dispatch *d);
bool sh_dispatch_is_suspect(const sh_running *r);
void sh_dispatch_set_owner(sh_dispatch *d, sh_running *r, sh_group *g);
/* Into and out of the list of those that wait. */
sh_status sh_dispatch_wait(sh_dispatch *d, sh_running *r);
void sh_dispatch_unwait(sh_dispatch *d, const sh_running *r);

/* --- acts --- */

sh_status sh_dispatch_send_work(sh_dispatch *d, const sh_running *r, const sh_group *g);
void sh_dispatch_say_cancel(sh_dispatch *d, const sh_group *g, uint64_t key);
sh_status sh_dispatch_lose(sh_dispatch *d, sh_group *g, const char *fault, bool lasting);
/* Its row, as an error or from its tokens; the latter takes it out of everything. */
sh_status sh_dispatch_refuse(sh_dispatch *d, const sh_running *r, int status, const char *code, const char *param,
                             const char *message);
sh_status sh_dispatch_answer(sh_dispatch *d, sh_running *r);

/* Keeps leaders supplied (giving.c). */
sh_status sh_dispatch_give(sh_dispatch *d);

#endif
