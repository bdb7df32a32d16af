/*
 * What this process may use of its machine: CPUs (hwloc, limited by the cgroup's CPU quota), NUMA nodes, memory (the
 * least of what the kernel, the cgroup, Slurm and the process limits leave), each with where the number comes from.
 * Knows no ranks but for dividing all that among those of one node. Read it before threads are bound: it takes the
 * calling process's own CPU set.
 */
#ifndef SH_PARTITION_MACHINE_H
#define SH_PARTITION_MACHINE_H

#include <stdbool.h>
#include <stdint.h>
#include "common/buf.h"

#define SH_MAX_CPUS 4096

typedef struct sh_memory_limit {
    const char *name; /* "MemAvailable", "cgroup v2", … */
    bool set;         /* false: no such limit here */
    uint64_t bytes;   /* what it leaves */
    char source[256]; /* file or variable */
} sh_memory_limit;
enum { SH_MEMORY_LIMITS = 5 };

typedef struct sh_machine {
    /* One logical CPU per core that this process may use, NUMA node by NUMA node, cut to the quota: one compute thread
     * each. */
    int cpus[SH_MAX_CPUS], n_cpus;
    uint16_t numa[SH_MAX_CPUS];         /* for each of them its NUMA node, counted from 0 in that order */
    int n_allowed, n_cores, n_packages; /* logical CPUs, cores, … under the CPU set of this process */
    int n_numa;                         /* nodes of the CPUs above */
    int machine_cpus;                   /* logical CPUs of the machine */
    double quota;                       /* CPUs' worth of time that the cgroup grants; 0: no quota */
    char quota_source[256];
    uint64_t cache;  /* bytes of the last level, all that the CPU set reaches; 0: not told */
    uint64_t memory; /* the least of the limits */
    int memory_from; /* its index in limit[] */
    sh_memory_limit limit[SH_MEMORY_LIMITS];
} sh_machine;

/* Where to look: for tests. root: prefix of /proc and /sys files; topology: hwloc's synthetic description. NULL
 * members: this machine. */
typedef struct sh_machine_origin {
    const char *root, *topology;
} sh_machine_origin;

/* Fails only when no CPU or no memory figure at all can be found. origin NULL: this machine. */
sh_status sh_machine_read(const sh_machine_origin *origin, sh_machine *out);
/* One line per fact: "memory  23.2 GiB  cgroup v1 (/sys/fs/cgroup/memory/…)". */
sh_status sh_machine_print(const sh_machine *m, sh_buf *out);

/* Bytes to measure memory's speed over: as many as usual, or twice the last cache, so that what is read in turn is not
 * in it any more; a quarter of the memory at most, but 64 MiB. */
size_t sh_machine_block(const sh_machine *m, size_t usual);

/* Leaves part k of n of the CPUs, for the k-th of n groups of ranks that share the machine: whole NUMA nodes where n
 * divides their number, a part of one node where their number divides n, else equal runs of CPUs. With more groups than
 * CPUs, groups take turns on a CPU. */
void sh_machine_keep_cpus(sh_machine *m, int k, int n);
/* What local rank i of n gets. With more ranks than CPUs, ranks take turns on a CPU. */
typedef struct sh_machine_part {
    const int *cpus; /* borrowed from the machine */
    int n_cpus;
    uint64_t memory;
} sh_machine_part;
sh_machine_part sh_machine_share(const sh_machine *m, int i, int n);
/* The same when a launcher has bound ranks to CPUs: `same` of the n are bound to these, this one the i-th of them. */
sh_machine_part sh_machine_share_bound(const sh_machine *m, int i, int same, int n);

#endif
