/* Compute threads by OpenMP; the only file that knows it. libgomp keeps one pool per calling thread, so teams of
 * several ranks (threads of one process on the local link) do not meet. */
#include "model/team.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "common/limits.h"
#include "common/mem.h"

#define SPIN "4000" /* rounds: some 50 µs, longer than the serial parts between the products of a layer */

struct sh_team {
    uint64_t id; /* unique within the process: tells a thread whether it is bound for this team */
    int threads, n_cpus;
    void *scratch;
    size_t scratch_bytes;
    void (*poll)(void *arg);
    void *poll_arg;
    int cpus[];
};

static _Thread_local uint64_t bound_for;
static atomic_uint_fast64_t last_id;

sh_status sh_team_create(int threads, const int *cpus, int n_cpus, sh_team **out) {
    if (threads < 1 || threads > CPU_SETSIZE)
        SH_FAIL(SH_EINPUT, "threads: %d: 1 to %d are allowed", threads, CPU_SETSIZE);
    for (int i = 0; i < n_cpus; i++) {
        if (cpus[i] < 0 || cpus[i] >= CPU_SETSIZE) {
            SH_FAIL(SH_EINPUT, "cpus[%d]: %d: 0 to %d are allowed", i, cpus[i], CPU_SETSIZE - 1);
        }
    }
    sh_team *t = malloc(sizeof *t + (size_t)n_cpus * sizeof(int));
    if (!t) SH_FAIL(SH_EMEMORY, "team: no memory for %d CPU numbers", n_cpus);
    t->id = atomic_fetch_add(&last_id, 1) + 1;
    t->threads = threads;
    t->n_cpus = n_cpus;
    t->scratch = NULL;
    t->scratch_bytes = 0;
    t->poll = NULL;
    if (n_cpus > 0) memcpy(t->cpus, cpus, (size_t)n_cpus * sizeof(int));
    *out = t;
    return SH_OK;
}

void sh_team_prepare(char **argv) {
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0 || setenv("GOMP_SPINCOUNT", SPIN, 1) != 0) return;
    self[n] = 0;
    (void)execv(self, argv); /* returns only when it failed: the default spins longer, nothing else */
}

void sh_team_destroy(sh_team **t) {
    if (*t) sh_mem_free((*t)->scratch, (*t)->scratch_bytes);
    free(*t);
    *t = NULL;
}

sh_status sh_team_reserve(sh_team *t, size_t bytes) {
    void *p = NULL;
    if (bytes <= t->scratch_bytes) return SH_OK;
    SH_TRY(sh_mem_alloc(bytes, "scratch of a team", &p));
    sh_mem_free(t->scratch, t->scratch_bytes);
    t->scratch = p;
    t->scratch_bytes = bytes;
    return SH_OK;
}

void *sh_team_scratch(const sh_team *t, size_t *bytes) {
    *bytes = t->scratch_bytes;
    return t->scratch;
}

int sh_team_size(const sh_team *t) {
    return t->threads;
}

void sh_team_set_poll(sh_team *t, void (*fn)(void *arg), void *arg) {
    t->poll = fn;
    t->poll_arg = arg;
}

bool sh_team_polls(const sh_team *t) {
    return t->poll != NULL;
}

/* Member 0 runs on the calling thread (sh_team_run). */
void sh_team_poll(const sh_team *t, int member) {
    if (member == 0 && t->poll) t->poll(t->poll_arg);
}

/* A refused binding (the CPU is outside this process's set) leaves the thread where it is: slower, never wrong. */
static void bind(const sh_team *t, int member) {
    if (bound_for == t->id) return;
    bound_for = t->id;
    if (t->n_cpus == 0) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)t->cpus[member % t->n_cpus], &set);
    (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

void sh_team_run(sh_team *t, void (*fn)(void *arg, int member, int size), void *arg) {
    /* Members that would share a CPU take turns on one thread: threads that wait for each other there only spin. */
    int running = t->n_cpus > 0 && t->n_cpus < t->threads ? t->n_cpus : t->threads;
    if (running == 1) {
        bind(t, 0);
        for (int i = 0; i < t->threads; i++) fn(arg, i, t->threads);
        return;
    }
#pragma omp parallel num_threads(running) default(none) shared(t, fn, arg)
    {
        int first = omp_get_thread_num(), step = omp_get_num_threads();
        bind(t, first);
        for (int i = first; i < t->threads; i += step) fn(arg, i, t->threads);
    }
}
