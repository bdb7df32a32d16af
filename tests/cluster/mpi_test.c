/*
 * A group over MPI: mpirun starts `shoal worker` three times, and the answers are those of one rank on the local link,
 * byte for byte. Then a rank is killed: the launcher ends the job, and nothing stays behind. Needs mpirun and the
 * program itself (SHOAL in the environment, else beside the tests).
 */
#include <signal.h>
#include <sys/wait.h>
#include "tests/cluster/fake.h"

static const int one_cut[] = {0, 15}, three_cut[] = {0, 3, 9, 15};
static char program[600];

static void open_group(fake *f, int n) {
    char model[600];
    snprintf(model, sizeof model, "%s/text/models/e2b-like", SH_TEST_DATA);
    fake_open(f, model, n, n == 1 ? one_cut : three_cut, "bf16", "bf16");
}

static void add_some(fake *f, int n, int max_tokens) {
    int32_t ids[200];
    for (int i = 0; i < n; i++) {
        int len = 5 + 13 * (i % 9);
        for (int j = 0; j < len; j++) ids[j] = 20 + (i * 131 + j * 17) % 1900;
        fake_work *w = fake_add(f, ids, len, max_tokens + 3 * (i % 5));
        w->sampling.temperature = i % 2 ? 1 : 0;
        w->sampling.score_prompt = i % 5 == 0;
        w->sampling.seed = (uint64_t)i;
    }
}

static pid_t start_mpi(const fake *f) {
    char ranks[16];
    snprintf(ranks, sizeof ranks, "%d", f->n);
    pid_t pid = fork();
    if (pid != 0) return pid;
    setpgid(0, 0);
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    setenv("OMPI_MCA_pml", "ob1", 0);
    setenv("OMPI_MCA_btl", "self,vader", 0);
    setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
    setenv("OMPI_MCA_orte_tmpdir_base", f->dir, 1);
    setenv("OMPI_MCA_btl_vader_backing_directory", f->dir, 1);
    execlp("mpirun", "mpirun", "--oversubscribe", "--bind-to", "none", "-n", ranks, program, "worker", "--connect",
           f->endpoint, "--group", "mpi", (char *)NULL);
    _exit(127);
}

/* The launcher's exit status; −1 when it had to be killed. */
static int end_mpi(pid_t pid, double seconds) {
    int status = 0;
    for (double end = sh_now() + seconds; sh_now() < end; sh_sleep(0.02))
        if (waitpid(pid, &status, WNOHANG) == pid)
            return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    kill(-pid, SIGKILL);
    waitpid(pid, &status, 0);
    return -1;
}

static void test_same_bytes(const fake *base) {
    fake f;
    open_group(&f, 3);
    add_some(&f, 20, 40);
    pid_t pid = start_mpi(&f);
    CHECK(fake_run(&f, 120), "MPI: no answers: %s", f.fault);
    for (int i = 0; i < f.n_work; i++) CHECK(fake_same(&f.work[i], &base->work[i]), "MPI: request %d differs", i);
    fake_leave(&f);
    int status = end_mpi(pid, 20);
    CHECK(status == 0, "MPI: mpirun ended with %d", status);
    fake_close(&f);
}

static void test_killed_rank(void) {
    fake f;
    open_group(&f, 3);
    add_some(&f, 20, 300);
    pid_t pid = start_mpi(&f);
    if (fake_wait_ready(&f, 60)) {
        for (int i = 0; i < f.n_work; i++) fake_send_work(&f, i);
        for (double end = sh_now() + 30; f.work[0].n < 3 && sh_now() < end;) fake_pump(&f, 5);
        CHECK(f.rank[1].pid > 0 && kill(f.rank[1].pid, SIGKILL) == 0, "killed rank: no process %d", f.rank[1].pid);
    }
    int status = end_mpi(pid, 20);
    CHECK(status > 0, "killed rank: mpirun ended with %d", status);
    for (int i = 0; i < 3; i++) {
        bool gone = false;
        for (double end = sh_now() + 5; !gone && sh_now() < end; sh_sleep(0.02)) gone = kill(f.rank[i].pid, 0) != 0;
        CHECK(f.rank[i].pid > 0 && gone, "killed rank: rank %d is still there", i);
    }
    fake_close(&f);
}

int main(int argc, char **argv) {
#ifdef __SANITIZE_THREAD__
    printf("skipped: Open MPI is not instrumented\n");
    return 77;
#endif
    const char *given = getenv("SHOAL"), *slash = strrchr(argv[0], '/');
    (void)argc;
    if (given)
        snprintf(program, sizeof program, "%s", given);
    else
        snprintf(program, sizeof program, "%.*s/../shoal", slash ? (int)(slash - argv[0]) : 1, slash ? argv[0] : ".");
    if (access(program, X_OK) != 0) {
        fprintf(stderr, "mpi_test: %s: no such program\n", program);
        return 1;
    }
    fake base;
    open_group(&base, 1);
    add_some(&base, 20, 40);
    fake_start_threads(&base);
    CHECK(fake_run(&base, 60), "no answers: %s", base.fault);
    fake_leave(&base);
    fake_join(&base);
    test_same_bytes(&base);
    test_killed_rank();
    fake_close(&base);
    printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
