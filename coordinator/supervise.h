/*
 * Processes of a run: each is started in a process group of its own, with a signal that reaches it when its parent
 * dies, its output appended to a file, and marks in its environment by which it (and whatever it starts on this node)
 * is found again after a crash. A process is always named by pid and start time, so that a reused pid is never hit.
 * Prints nothing. One thread: the death signal follows the thread that started the process.
 */
#ifndef SH_COORDINATOR_SUPERVISE_H
#define SH_COORDINATOR_SUPERVISE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include "common/status.h"

typedef struct sh_child {
    pid_t pid;           /* 0: never started */
    uint64_t started;    /* start time in clock ticks since boot: with pid, the process's name */
    bool running, asked; /* asked: it had its SIGTERM */
    int status;          /* as of waitpid, once it ended */
} sh_child;

typedef struct sh_child_spec {
    const char *const *argv; /* NULL at the end; argv[0] is looked for in PATH */
    const char *const *env;  /* "NAME=value" that replace or add to the environment; NULL at the end; NULL: none */
    const char *log;         /* standard output and error are appended here; NULL: thrown away */
    int keep_fd;             /* stays open in the child under the same number; −1: none */
    int death_signal;        /* when the starting thread dies; 0: none */
} sh_child_spec;

/* Fails with the program's name when it cannot be run. */
sh_status sh_child_start(const sh_child_spec *s, sh_child *out);
/* Whether it still runs; reaps it when not. */
bool sh_child_poll(sh_child *c);
/* SIGTERM to its process group, once: mpirun takes a second one within 5 s as an order to leave without tidying up. */
void sh_child_ask(sh_child *c);
/* Asks it, if nobody has; SIGKILL after `grace` seconds; returns when it is reaped. */
void sh_child_end(sh_child *c, double grace);
/* "was killed by signal 9 (Killed)", "ended with status 3". */
void sh_child_describe(const sh_child *c, char *to, size_t size);

/* Start time of a process; 0 when there is none (a zombie counts as none). */
uint64_t sh_process_started(pid_t pid);
/* Ends every process of this node, but the caller, whose environment has exactly the entry `mark` ("NAME=value"):
 * SIGTERM, after `grace` seconds SIGKILL. Returns how many there were. */
int sh_process_end_marked(const char *mark, double grace);

#endif
