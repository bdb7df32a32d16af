/*
 * The nodes that a plan is made for: how many, what one of them can do, and the links. From the message Machine
 * (proto/machine.proto), whose absent fields are filled with stated assumptions. Pure: measuring is cli/probe's, files
 * are the callers'.
 */
#ifndef SH_PARTITION_CLUSTER_H
#define SH_PARTITION_CLUSTER_H

#include "partition/cost.h"
#include "partition/machine.h"
#include "proto/machine.pb-c.h"

#define SH_CLUSTER_NODES 4096

typedef struct sh_cluster {
    char name[128], cpu[128];
    int nodes;
    /* one node */
    int packages, numa, cores;
    double cache, memory; /* bytes */
    double read, fma;     /* per second, all cores together */
    sh_cost_link within;
    sh_cost_link between;  /* nodes */
    sh_cost_rates kernels; /* shares alone: read and fma are 0 */
    double spanning;       /* share of the read bandwidth that a rank over several NUMA nodes has */
    char assumed[512];     /* what was not given, in words; "": all was */
    char measured[256];    /* where the rest comes from */
    bool mixed;            /* nodes differ: planned as if all were as poor as the poorest in each number */
} sh_cluster;

/* Refuses what cannot be by the field's name; nodes 0: as the message says, else that many of them. */
sh_status sh_cluster_of(const Shoal__Machine *m, int nodes, sh_cluster *out);
/* The same from JSON text; `what` names it in errors. */
sh_status sh_cluster_read(const char *what, const char *text, size_t len, int nodes, sh_cluster *out);
/* What one of `ranks` ranks of a node can do, and the memory that it may use. */
sh_cost_rates sh_cluster_rates(const sh_cluster *c, int ranks);
uint64_t sh_cluster_memory(const sh_cluster *c, int ranks);
/* "4 nodes of 2 × Xeon …: 64 cores, 4 NUMA nodes, 512.0 GiB, reading 280 GB/s, …" and a line of what is assumed. */
sh_status sh_cluster_print(const sh_cluster *c, sh_buf *out);

/* A workload from JSON text (the message Workload). */
sh_status sh_workload_read(const char *what, const char *text, size_t len, sh_workload *out);

#endif
