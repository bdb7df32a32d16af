/*
 * This machine as the planner sees it: what hwloc and the limits say, and read bandwidth and multiply-add rate as
 * measured once and kept in the user's cache folder, by host, build and CPU set. Measuring takes some seconds on
 * all CPUs.
 */
#ifndef SH_CLI_PROBE_H
#define SH_CLI_PROBE_H

#include <stdbool.h>
#include "partition/cluster.h"

typedef enum sh_probe_how {
    SH_PROBE_CACHED,  /* what was measured earlier; else the speeds are assumed */
    SH_PROBE_MEASURE, /* what was measured earlier; else measure now and keep it */
    SH_PROBE_AGAIN    /* measure now and keep it */
} sh_probe_how;

/* The description as a message (shoal__machine__free_unpacked). A cache that cannot be written is no failure. */
sh_status sh_probe_machine(sh_probe_how how, Shoal__Machine **out);
/* So many nodes like this one. *known: its speed was measured, now or earlier. */
sh_status sh_probe_cluster(sh_probe_how how, int nodes, sh_cluster *out, bool *known);

#endif
