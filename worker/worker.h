/* A rank of a group: connects to the coordinator, learns the plan, loads its stage, serves until told to leave. */
#ifndef SH_WORKER_H
#define SH_WORKER_H

#include <stdint.h>
#include "proto/link.h"

typedef struct sh_worker_options {
    const char *endpoint, *keys; /* the coordinator */
    const char *group;           /* the same on all ranks of the job */
    const int *cpus;             /* CPUs this rank may use; NULL: as the process */
    int n_cpus;
    int part, parts;   /* this is group `part` of `parts` that share its nodes' CPUs; parts 0: it is alone there */
    uint64_t memory;   /* what the group's ranks on a node may use together; 0: as measured, divided by `parts` */
    int threads;       /* 0: as the plan says */
    int first_wait_ms; /* how long to wait for the first welcome; 0: 120,000 */
} sh_worker_options;

/* Runs one rank to its end (told to leave, orphaned, or failed: SH_EPEER, …). */
sh_status sh_worker_run(sh_link *link, const sh_worker_options *o);

#endif
