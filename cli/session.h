/*
 * A run at work: keeps the coordinator and the groups alive until the job is finished. Each is restarted when it dies
 * or falls silent, with growing pauses; after SH_SESSION_TRIES starts in a row of one of them without a request or
 * token of progress it is given up. The run goes on as long as one group is left; without any, or without a
 * coordinator, it says why and ends. A coordinator that died takes its groups along: the ranks of the older epoch are
 * ended, and the new ones go on from the store. To be driven by one thread.
 */
#ifndef SH_CLI_SESSION_H
#define SH_CLI_SESSION_H

#include <signal.h>
#include "cli/launch.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "cli/runstore.h"
#include "proto/client.h"

#define SH_SESSION_TRIES   3
#define SH_SESSION_ALONE   7     /* the same while the coordinator finds out which request ends groups */
#define SH_SESSION_SILENCE 20.0  /* seconds without an answer of the coordinator */
#define SH_SESSION_READY   120.0 /* seconds until a coordinator takes requests … */
#define SH_SESSION_TAKING  5e6   /* … and one more for each so many bytes of the store, which it copies and checks */

typedef struct sh_session_options {
    const char *program; /* shoal itself, absolute */
    const char *model;   /* absolute */
    const char *input;   /* file to submit */
    uint64_t lines;      /* in it */
    const sh_shared_options *shared;
    sh_runstore *store;
    bool ordered;
    bool reports;                 /* the ranks' times, counts or timeline are of interest at the end */
    const char *trace_steps;      /* "A:B": micro-batches whose timeline the store shall have; NULL: of none */
    int replicas, ranks;          /* groups; ranks of each */
    int cpus;                     /* of this machine */
    uint64_t memory;              /* of this machine: what is free before anything was started */
    const char *launcher, *hosts; /* or NULL */
    sh_progress *progress;
    const char *model_name;             /* for the first line */
    const Shoal__Plan *plan;            /* the same; borrowed */
    volatile sig_atomic_t *interrupted; /* becomes true by a signal */
} sh_session_options;

typedef struct sh_session sh_session;

sh_status sh_session_create(const sh_session_options *o, sh_session **out);
/* Until every request has its row and, where `reports` asks for it, the ranks have told the last of what they counted
 * (SH_OK), the user interrupts (SH_ECANCELLED) or nothing more can be done (others, text says why). */
sh_status sh_session_drive(sh_session *s);
/* Writes the rows of the finished job; restarts the coordinator for it if need be. */
sh_status sh_session_collect(sh_session *s, const char *output, sh_outcomes *outcomes);
/* Writes how often each expert was chosen (partition/routing.h); after the job is finished. */
sh_status sh_session_save_routing(sh_session *s, const char *path);
/* Ends ranks and coordinator: kindly when the job is finished, else by SIGTERM, both by SIGKILL after SH_RUN_GRACE. */
void sh_session_stop(sh_session *s, bool finished);
/* Numbers for the closing table, and requests answered so far. */
void sh_session_closing(const sh_session *s, sh_closing *c);
uint64_t sh_session_done(const sh_session *s, uint64_t *total);
/* Whether the session ended for the input's sake: the same command would meet the same input. */
bool sh_session_input_is_wrong(const sh_session *s);
void sh_session_destroy(sh_session **s);

#endif
