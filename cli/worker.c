/* shoal worker: the ranks of a group. Normally started by mpirun, srun or `shoal run`; on its own it is a group of one.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "cli/commands.h"
#include "cli/options.h"
#include "common/log.h"
#include "common/mapped.h"
#include "partition/machine.h"
#include "worker/worker.h"

static const char usage[] =
    "Usage: mpirun -n RANKS --bind-to none shoal worker --connect ENDPOINT [OPTION]...\n"
    "       shoal worker --connect ENDPOINT --link local [-n RANKS] [OPTION]...\n"
    "Serves as one group: RANKS ranks that hold one replica of the model, each some of its layers. The coordinator\n"
    "at ENDPOINT ('shoal serve' or 'shoal run') tells each rank its layers, sends requests and takes the tokens.\n"
    "A group leaves when the coordinator ends it or is silent for too long. 'shoal run' starts its own groups; use "
    "this\n"
    "command to add groups to a 'shoal serve'.\n\n"
    "  mpirun -n 4 --bind-to none shoal worker --connect tcp://head:5555 --keys ~/.shoal/keys\n"
    "  srun --mpi=pmix -n 4 shoal worker --connect tcp://head:5555 --keys ~/keys   the same under Slurm\n"
    "  shoal worker --connect ipc:///run/user/1000/shoal/s --link local -n 2       two ranks in one process\n\n";

static const char *const links[] = {"auto", "mpi", "local", NULL};
enum { LINK_AUTO, LINK_MPI, LINK_LOCAL };

typedef struct arguments {
    const char *connect, *keys, *group, *cpus, *part;
    uint64_t memory;
    int link, ranks, threads, patience;
} arguments;

/* MPI is touched only by a process that a launcher started as one of its ranks. */
static bool launched(void) {
    static const char *const names[] = {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (getenv(names[i])) return true;
    return false;
}

/* Tasks of srun that no MPI joins would each be a group of its own, or several times the same one. */
static sh_status refuse_strangers(void) {
    const char *tasks = getenv("SLURM_STEP_NUM_TASKS");
    if (launched() || !tasks || atoi(tasks) < 2) return SH_OK;
    SH_FAIL(SH_EINPUT,
            "was started as one of %d tasks (SLURM_STEP_NUM_TASKS) that no MPI joins: srun needs --mpi=pmix ('srun "
            "--mpi=list' shows what it has); with --link local each task is a group of its own",
            atoi(tasks));
}

/* "0-3,8,10-11" → numbers. */
static sh_status parse_cpus(const char *s, int *cpus, int *n) {
    int count = 0;
    for (const char *p = s;;) {
        char *end = NULL;
        long lo = strtol(p, &end, 10), hi = lo;
        bool good = end != p && *p >= '0' && *p <= '9';
        if (good && *end == '-') {
            p = end + 1;
            hi = strtol(p, &end, 10);
            good = end != p && *p >= '0' && *p <= '9';
        }
        if (!good || lo > hi || hi >= 1 << 20 || (*end && *end != ','))
            SH_FAIL(SH_EINPUT, "--cpus: '%s': CPU numbers and ranges are allowed, as in 0-3,8", s);
        if (hi - lo >= SH_MAX_CPUS - count) SH_FAIL(SH_EINPUT, "--cpus: more than %d CPUs", SH_MAX_CPUS);
        while (lo <= hi) cpus[count++] = (int)lo++;
        if (!*end) break;
        p = end + 1;
    }
    *n = count;
    return SH_OK;
}

/* "2/4": the second of four → 1, 4. */
static sh_status parse_part(const char *s, int *part, int *parts) {
    char *end = NULL;
    long k = *s >= '1' && *s <= '9' ? strtol(s, &end, 10) : 0;
    long n = end && *end == '/' && end[1] >= '1' && end[1] <= '9' ? strtol(end + 1, &end, 10) : 0;
    if (!n || *end || k > n || n > SH_MAX_RANKS)
        SH_FAIL(SH_EINPUT, "--part: '%s': K/N is allowed, 1 to N of at most %d, as in 2/4", s, SH_MAX_RANKS);
    *part = (int)k - 1;
    *parts = (int)n;
    return SH_OK;
}

/* Leaving in step lets MPI finish; everything else must not wait for ranks that may be gone. speaks: for its group. */
static int leave(sh_link **link, sh_status st, bool speaks) {
    if (st == SH_OK) {
        sh_link_destroy(link);
        return SH_EXIT_OK;
    }
    if (st == SH_ECANCELLED) {
        const char *run = getenv("SHOAL_GROUP"); /* a run tells its user itself */
        if (!run && speaks) fprintf(stderr, "shoal worker: %s\n", sh_error_text());
        _exit(SH_EXIT_OK);
    }
    sh_error("%s", sh_error_text());
    _exit(SH_EXIT_RUN);
}

static int run_mpi(const sh_worker_options *o) {
    sh_link *link = NULL;
    if (sh_link_mpi_create(&link) != SH_OK) {
        sh_error("%s", sh_error_text());
        return SH_EXIT_RUN;
    }
    char who[32];
    SH_IGNORE(sh_mapped_watch(SH_EXIT_RUN)); /* MPI has taken the signal when it started */
    snprintf(who, sizeof who, "rank %d", link->rank);
    sh_log_setup(SH_LOG_WARN, who);
    sh_status st = sh_worker_run(link, o);
    return leave(&link, st, link->rank == 0);
}

typedef struct local_rank {
    pthread_t thread;
    sh_link *link;
    const sh_worker_options *o;
    int status;
} local_rank;

static void *local_main(void *arg) {
    local_rank *r = arg;
    static atomic_flag told = ATOMIC_FLAG_INIT; /* the first to leave ends the process */
    sh_status st = sh_worker_run(r->link, r->o);
    r->status = leave(&r->link, st, st == SH_ECANCELLED && !atomic_flag_test_and_set(&told));
    return NULL;
}

static int run_local(int n, const sh_worker_options *o) {
    int status = SH_EXIT_OK;
    sh_link **links_of = calloc((size_t)n, sizeof *links_of);
    local_rank *ranks = calloc((size_t)n, sizeof *ranks);
    if (!links_of || !ranks || sh_link_local_create(n, links_of) != SH_OK) {
        sh_error("no local link of %d ranks: %s", n, sh_error_text());
        free(links_of);
        free(ranks);
        return SH_EXIT_RUN;
    }
    for (int i = 0; i < n; i++) {
        ranks[i] = (local_rank){.link = links_of[i], .o = o};
        if (pthread_create(&ranks[i].thread, NULL, local_main, &ranks[i]) != 0) {
            sh_error("no thread for rank %d of %d", i, n);
            _exit(SH_EXIT_RUN); /* the ranks that run already cannot go on without it */
        }
    }
    for (int i = 0; i < n; i++) {
        pthread_join(ranks[i].thread, NULL);
        if (ranks[i].status > status) status = ranks[i].status;
    }
    free(links_of);
    free(ranks);
    return status;
}

static int run_worker(const arguments *a) {
    static int cpus[SH_MAX_CPUS];
    char group[160], host[128] = "";
    sh_worker_options o = {.endpoint = a->connect,
                           .keys = a->keys,
                           .group = a->group,
                           .threads = a->threads,
                           .memory = a->memory,
                           .first_wait_ms = a->patience * 1000};
    if (a->cpus && parse_cpus(a->cpus, cpus, &o.n_cpus) != SH_OK) return sh_options_complain("worker", SH_EXIT_USAGE);
    o.cpus = o.n_cpus ? cpus : NULL;
    if (a->part && parse_part(a->part, &o.part, &o.parts) != SH_OK) return sh_options_complain("worker", SH_EXIT_USAGE);
    if (a->link == LINK_AUTO && !a->ranks && refuse_strangers() != SH_OK) {
        sh_error("%s", sh_error_text()); /* for the log of a run that started it */
        return SH_EXIT_USAGE;
    }
    bool mpi = a->link == LINK_MPI || (a->link == LINK_AUTO && launched());
    if (mpi && a->ranks) {
        fprintf(stderr,
                "shoal worker: -n: %d ranks: over MPI the launcher decides, as in mpirun -n %d shoal worker …\n",
                a->ranks, a->ranks);
        return SH_EXIT_USAGE;
    }
    if (!o.group) { /* the same on all ranks: the launcher's own name of the job, if it has one */
        const char *job = getenv("OMPI_MCA_ess_base_jobid"), *slurm = getenv("SLURM_JOB_ID");
        const char *step = getenv("SLURM_STEP_ID"); /* each srun of an allocation is a group of its own */
        if (gethostname(host, sizeof host - 1) != 0) host[0] = 0;
        if (mpi && (job || slurm))
            snprintf(group, sizeof group, "group-%.100s%s%.20s", job ? job : slurm, !job && step ? "." : "",
                     !job && step ? step : "");
        else
            snprintf(group, sizeof group, "%s-%d", host[0] ? host : "group", mpi ? (int)getppid() : (int)getpid());
        o.group = group;
    }
    return mpi ? run_mpi(&o) : run_local(a->ranks ? a->ranks : 1, &o);
}

int sh_cmd_worker(int argc, char **argv) {
    arguments a = {0};
    sh_option t[] = {
        {"connect", 0, SH_OPTION_TEXT, &a.connect, "ENDPOINT", "the coordinator: ipc://PATH or tcp://HOST:PORT", 0, 0,
         NULL},
        {"keys", 0, SH_OPTION_TEXT, &a.keys, "DIR", "key folder of 'shoal keygen'; needed for tcp://", 0, 0, NULL},
        {"group", 0, SH_OPTION_TEXT, &a.group, "NAME", "the same on all ranks; default: the launcher's job", 0, 0,
         NULL},
        {"link", 0, SH_OPTION_CHOICE, &a.link, "LINK",
         "auto (default: mpi under a launcher, else local), mpi, or local: ranks are threads of this process", 0, 0,
         links},
        {"ranks", 'n', SH_OPTION_INT, &a.ranks, "N", "ranks of a local link; default 1", 1, SH_MAX_RANKS, NULL},
        {"threads", 0, SH_OPTION_INT, &a.threads, "N", "compute threads per rank; default: the plan's, else its CPUs",
         1, 4096, NULL},
        {"connect-timeout", 0, SH_OPTION_INT, &a.patience, "SECONDS",
         "how long to wait for the coordinator's first word; default 120", 1, 86400, NULL},
        {"cpus", 0, SH_OPTION_TEXT, &a.cpus, "LIST",
         "CPUs that this node's ranks share, as in 0-3,8; default: the process's", 0, 0, NULL},
        {"part", 0, SH_OPTION_TEXT, &a.part, "K/N",
         "this is the K-th of N groups that share their nodes: take that part of the CPUs and an Nth of the memory", 0,
         0, NULL},
        {"memory", 0, SH_OPTION_SIZE, &a.memory, "SIZE",
         "what the group's ranks on a node may use together; default: what is free there", 0, 0, NULL},
    };
    int operands = 0;
    int rc = sh_options_begin("worker", usage, t, (int)(sizeof t / sizeof *t), argc, argv, &operands);
    if (rc >= 0) return rc;
    if (operands) {
        fprintf(stderr, "shoal worker: '%s': no operands are expected\n", argv[1]);
        return SH_EXIT_USAGE;
    }
    if (!a.connect) {
        fprintf(
            stderr,
            "shoal worker: --connect: the coordinator's endpoint is needed, as in ipc:///path or tcp://host:5555\n");
        return SH_EXIT_USAGE;
    }
    sh_log_setup(SH_LOG_WARN, "worker");
    return run_worker(&a);
}
