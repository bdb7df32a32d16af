/* How a group is started: the command line and environment of mpirun, of a launcher that the user names, or of one
 * process whose threads are the ranks. Makes strings only; starts nothing. */
#ifndef SH_CLI_LAUNCH_H
#define SH_CLI_LAUNCH_H

#include <stdbool.h>
#include <stdint.h>
#include "common/status.h"

#define SH_LAUNCH_MOST 64

typedef struct sh_launch_options {
    const char *program;  /* shoal itself, absolute */
    const char *endpoint; /* the coordinator's */
    const char *keys;     /* key folder or NULL */
    const char *group;    /* name of this MPI job */
    const char *mark;     /* "NAME=value" for the environment of all ranks */
    const char
        *launcher; /* NULL: chosen here; "local"; else a shell command that is followed by the rank's command line */
    const char *hosts;     /* "node1,node2:4" or NULL */
    const char *tmp, *shm; /* private folders; "" or NULL: none */
    int ranks, threads;    /* threads 0: the rank's share */
    int part, parts;       /* group `part` (from 0) of `parts` that share its nodes; parts 0 or 1: alone there */
    uint64_t memory;       /* of a node, for all its ranks together; 0: what is free there, divided by parts */
    bool root, crowded;    /* running as root; more ranks than CPUs */
} sh_launch_options;

typedef struct sh_launch {
    const char *argv[SH_LAUNCH_MOST], *env[SH_LAUNCH_MOST]; /* NULL at the end */
    int argc, n_env;
    char *owned[SH_LAUNCH_MOST]; /* what argv and env borrow */
    int n_owned;
} sh_launch;

/* Whether ranks are processes that speak MPI, by the same rule. */
bool sh_launch_is_mpi(const char *launcher, const char *hosts, int ranks);
sh_status sh_launch_make(const sh_launch_options *o, sh_launch *out);
void sh_launch_release(sh_launch *l);

#endif
