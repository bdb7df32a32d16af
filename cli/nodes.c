/* NUMA nodes and CPUs. See nodes.h. */
#include "cli/nodes.h"

#include <glob.h>
#include <sched.h>
#include <stdio.h>

void sh_nodes_read(sh_nodes *out) {
    cpu_set_t set;
    glob_t g = {0};
    *out = (sh_nodes){1, 1};
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) out->cpus = CPU_COUNT(&set);
    int numa = 0;
    if (glob("/sys/devices/system/node/node*/cpulist", 0, NULL, &g) == 0)
        for (size_t i = 0; i < g.gl_pathc; i++) { /* nodes of memory alone have an empty list */
            FILE *f = fopen(g.gl_pathv[i], "re");
            int c = f ? fgetc(f) : '\n';
            numa += c >= '0' && c <= '9';
            if (f) fclose(f);
        }
    globfree(&g);
    if (numa > 0) out->numa = numa;
}
