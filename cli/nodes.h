/* The two numbers of this machine that starting ranks needs: NUMA nodes with CPUs, and CPUs this process may use. */
#ifndef SH_CLI_NODES_H
#define SH_CLI_NODES_H

typedef struct sh_nodes {
    int numa, cpus; /* at least 1 each */
} sh_nodes;
void sh_nodes_read(sh_nodes *out);

#endif
