/* Lists of hosts as mpirun takes them ("node1,node2:4"): from a Slurm allocation, and divided among groups. Pure but
 * for reading the environment. */
#ifndef SH_CLI_HOSTS_H
#define SH_CLI_HOSTS_H

#include "common/buf.h"

/* How many hosts a list names: entries with the same name are one; 1 for this machine alone (NULL or ""). */
int sh_hosts_count(const char *list);
/* What the k-th of `groups` groups gets, as a text appended to `out`. With as many hosts as groups or more, hosts of
 * its own; else one host, on which it is group *part of *parts. SH_EINPUT: an entry without a name. */
sh_status sh_hosts_divide(const char *list, int k, int groups, sh_buf *out, int *part, int *parts);
/* Appends the hosts of Slurm's notation, "a[01-03,7],b" → "a01,a02,a03,a7,b". SH_EINPUT: not that notation. */
sh_status sh_hosts_expand(const char *nodelist, sh_buf *out);
/* --hosts inside a Slurm job: mpirun leaves out, without a word, what is not of the job. SH_EINPUT: an entry of the
 * list whose name is neither in Slurm's `nodelist` (domains do not count) nor localhost; names it. */
sh_status sh_hosts_within(const char *list, const char *nodelist);

#endif
