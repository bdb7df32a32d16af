/*
 * The folder of a run (OUTPUT.store): which job it belongs to, who works on it, and what an interrupted run left
 * behind. The coordinator keeps its numbered epoch folders in it and is the only one to touch those.
 *
 *     job.json      what decides the results (input, model, numbers); written once, never changed
 *     owner         pid, start time and host of the `shoal run` that works on it, and its private folders
 *     run.log       what the coordinator and the ranks wrote
 *     input.jsonl   the input, where it came from standard input
 *     keys/         key pairs of the run, where ranks connect over TCP
 */
#ifndef SH_CLI_RUNSTORE_H
#define SH_CLI_RUNSTORE_H

#include <limits.h>
#include <stdbool.h>
#include "common/json.h"

#define SH_RUN_SPOOL "input.jsonl"
#define SH_RUN_GRACE 5.0 /* seconds between SIGTERM and SIGKILL */

typedef struct sh_runstore {
    char path[PATH_MAX]; /* absolute */
    char log[PATH_MAX + 16];
    char mark[PATH_MAX + 16]; /* "SHOAL_RUN=path": in the environment of all processes of the run */
    char ipc[PATH_MAX];       /* private folder for sockets and MPI's files; "" until made */
    char shm[64];             /* private folder in /dev/shm; "" where there is none */
    bool existed;             /* it was there: the job goes on */
    int ended;                /* processes of an older run that had to be ended */
} sh_runstore;

/*
 * Opens or makes the folder for the job described by `job` (an object of strings). Refuses a folder of another job
 * (naming what differs), one that is no run's store, and one whose `shoal run` still works (naming its pid). Ends the
 * processes and removes the private folders that a dead run left on this node, then writes down the caller as owner.
 * Makes the private folders: under TMPDIR, with mpi in /dev/shm too.
 */
sh_status sh_runstore_open(const char *path, const json_t *job, bool mpi, sh_runstore *out);
/* Whether the note is that of this run still, and not of a newer one that has taken the folder over. */
sh_status sh_runstore_owned(const sh_runstore *s, bool *yes);
/* Removes the private folders and the owner's note; with `remove_all`, the whole folder, atomically as seen from
 * outside. Where a newer run has taken the folder over, it stays with its note. */
sh_status sh_runstore_close(sh_runstore *s, bool remove_all);

#endif
