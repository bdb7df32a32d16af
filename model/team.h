/*
 * A team of compute threads of one rank (OpenMP underneath), bound to given CPUs. One caller at a time. The calling
 * thread is member 0 and is bound by the first run.
 */
#ifndef SH_MODEL_TEAM_H
#define SH_MODEL_TEAM_H

#include <stdbool.h>
#include "common/status.h"

typedef struct sh_team sh_team;

/* threads ≥ 1. cpus: n_cpus logical CPU numbers (thread i goes to cpus[i % n_cpus]); n_cpus 0 leaves threads unbound.
 */
sh_status sh_team_create(int threads, const int *cpus, int n_cpus, sh_team **out);
void sh_team_destroy(sh_team **t);
/* To be called first in main() of a program that will run teams, with main's argv. Members that wait spin for a while
 * before they sleep; libgomp's own choice is milliseconds, which on shared CPUs costs 25 times the work between
 * (measured: 3 ranks of 2 threads on 2 CPUs). It reads its setting while it is loaded, so this sets GOMP_SPINCOUNT and
 * runs the program again from the start. Returns when the environment has a setting (the user's or this one), or when
 * that fails. */
void sh_team_prepare(char **argv);
int sh_team_size(const sh_team *t);
/* Memory that whoever runs work on the team may use until somebody else does: at least `bytes` from now on. */
sh_status sh_team_reserve(sh_team *t, size_t bytes);
void *sh_team_scratch(const sh_team *t, size_t *bytes); /* 64-byte aligned; NULL and 0 when nothing was reserved */
/* Runs fn(arg, i, size) for every member and waits for all; members must not wait for each other within fn, for those
 * that share a CPU take turns on one thread. Where that is all of them, fn is called directly, without OpenMP. */
void sh_team_run(sh_team *t, void (*fn)(void *arg, int member, int size), void *arg);
/* Something that the calling thread does now and then while a team computes (progress of messages under way); NULL:
 * nothing. Loops over pieces of work call sh_team_poll after each piece; it does nothing on other members' threads. */
void sh_team_set_poll(sh_team *t, void (*fn)(void *arg), void *arg);
bool sh_team_polls(const sh_team *t);
void sh_team_poll(const sh_team *t, int member);
/* [*lo, *hi) is member's share of n items, as even as possible, ascending. */
static inline void sh_team_share(int n, int member, int size, int *lo, int *hi) {
    *lo = (int)((long)n * member / size);
    *hi = (int)((long)n * (member + 1) / size);
}

#endif
