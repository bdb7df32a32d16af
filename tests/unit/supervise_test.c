/* Processes: started, watched, ended by force, found by their mark; their start times; the store folder's rules. */
#include <CUnit/Basic.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "cli/runstore.h"
#include "common/clock.h"
#include "common/file.h"
#include "coordinator/supervise.h"

static char folder[4096];

static sh_status start(const char *script, const char *mark, sh_child *c) {
    const char *argv[] = {"sh", "-c", script, NULL}, *env[] = {mark, NULL};
    char log[4200];
    snprintf(log, sizeof log, "%s/log", folder);
    sh_child_spec s = {.argv = argv, .env = env, .log = log, .keep_fd = -1, .death_signal = SIGKILL};
    return sh_child_start(&s, c);
}

static void test_status(void) {
    sh_child c = {0};
    char how[128], log[4200], *text = NULL;
    size_t len;
    CU_ASSERT_EQUAL_FATAL(start("echo mark is $MARK; exit 7", "MARK=1", &c), SH_OK);
    while (sh_child_poll(&c)) sh_sleep(0.01);
    sh_child_describe(&c, how, sizeof how);
    CU_ASSERT_STRING_EQUAL(how, "ended with status 7");
    snprintf(log, sizeof log, "%s/log", folder);
    CU_ASSERT_EQUAL_FATAL(sh_file_read(log, 1000, &text, &len), SH_OK);
    CU_ASSERT_STRING_EQUAL(text, "mark is 1\n");
    free(text);
}

static void test_not_there(void) {
    const char *argv[] = {"no-such-program-here", NULL};
    sh_child_spec s = {.argv = argv, .keep_fd = -1};
    sh_child c;
    CU_ASSERT_EQUAL(sh_child_start(&s, &c), SH_EIO);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "no-such-program-here: cannot be started: No such file or directory");
}

static void test_end_by_force(void) {
    sh_child c = {0};
    char how[128];
    CU_ASSERT_EQUAL_FATAL(start("trap '' TERM; while :; do sleep 0.05; done", "MARK=2", &c), SH_OK);
    CU_ASSERT(sh_process_started(c.pid) == c.started && c.started > 0);
    sh_sleep(0.1);
    double t0 = sh_now();
    sh_child_end(&c, 0.3);
    CU_ASSERT(sh_now() - t0 >= 0.3 && sh_now() - t0 < 5);
    CU_ASSERT_FALSE(c.running);
    sh_child_describe(&c, how, sizeof how);
    CU_ASSERT_STRING_EQUAL(how, "was killed by signal 9 (Killed)");
    CU_ASSERT_EQUAL(sh_process_started(c.pid), 0);
    sh_child_end(&c, 0.3); /* a second time is harmless */
}

/* However often it is asked: mpirun takes the second time for an order to leave things lying about. */
static void test_asked_once(void) {
    sh_child c = {0};
    char how[128];
    const char *count = "n=0; trap 'n=$((n + 1))' TERM; for k in 1 2 3 4 5 6 7 8 9 10; do sleep 0.05; done; exit $n";
    CU_ASSERT_EQUAL_FATAL(start(count, "MARK=3", &c), SH_OK);
    sh_sleep(0.1);
    sh_child_ask(&c);
    sh_sleep(0.1);
    sh_child_ask(&c);
    sh_child_end(&c, 5);
    sh_child_describe(&c, how, sizeof how);
    CU_ASSERT_STRING_EQUAL(how, "ended with status 1");
    CU_ASSERT_EQUAL_FATAL(start(count, "MARK=3", &c), SH_OK); /* the next in its place has not been asked */
    sh_sleep(0.1);
    sh_child_end(&c, 5);
    sh_child_describe(&c, how, sizeof how);
    CU_ASSERT_STRING_EQUAL(how, "ended with status 1");
}

/* A launcher that is killed leaves its ranks, which are in process groups of their own and may be stopped. */
static void test_marked(void) {
    char mark[128], other[128];
    snprintf(mark, sizeof mark, "SH_TEST_MARK=%d", (int)getpid());
    snprintf(other, sizeof other, "SH_TEST_MARK=%d0", (int)getpid());
    sh_child c = {0}, bystander = {0};
    CU_ASSERT_EQUAL_FATAL(start("setsid sleep 60 & setsid sh -c 'kill -STOP $$' & wait", mark, &c), SH_OK);
    CU_ASSERT_EQUAL_FATAL(start("exec sleep 60", other, &bystander), SH_OK);
    sh_sleep(0.3);
    kill(c.pid, SIGKILL);
    while (sh_child_poll(&c)) sh_sleep(0.01);
    CU_ASSERT_EQUAL(sh_process_end_marked(mark, 0.3), 2);
    CU_ASSERT_EQUAL(sh_process_end_marked(mark, 0.3), 0);
    CU_ASSERT_TRUE(sh_child_poll(&bystander));
    sh_child_end(&bystander, 1);
}

static void test_death_signal(void) {
    int p[2];
    CU_ASSERT_EQUAL_FATAL(pipe(p), 0);
    pid_t parent = fork();
    if (parent == 0) {
        sh_child c = {0};
        if (start("exec sleep 60", "MARK=3", &c) != SH_OK) _exit(1);
        ssize_t w = write(p[1], &c, sizeof c);
        _exit(w == sizeof c ? 0 : 1);
    }
    sh_child c = {0};
    CU_ASSERT_EQUAL(read(p[0], &c, sizeof c), sizeof c);
    waitpid(parent, NULL, 0);
    double until = sh_now() + 5;
    while (sh_process_started(c.pid) == c.started && sh_now() < until) sh_sleep(0.01);
    CU_ASSERT_NOT_EQUAL(sh_process_started(c.pid), c.started);
    close(p[0]), close(p[1]);
}

static json_t *job(const char *mode) {
    return json_pack("{s:s, s:s}", "model", "/m", "--mode", mode);
}

static void test_store(void) {
    char path[4200], other[4200], want[9000];
    snprintf(path, sizeof path, "%s/out.store", folder);
    snprintf(other, sizeof other, "%s/epoch", path);
    json_t *exact = job("exact"), *bf16 = job("bf16");
    sh_runstore s = {0}, again = {0};
    CU_ASSERT_EQUAL_FATAL(sh_runstore_open(path, exact, true, &s), SH_OK);
    CU_ASSERT_FALSE(s.existed);
    CU_ASSERT_TRUE(sh_file_exists(s.ipc));
    CU_ASSERT_EQUAL(sh_dir_make(other), SH_OK);

    /* another job is refused by what differs, and nothing is touched */
    CU_ASSERT_EQUAL(sh_runstore_open(path, bf16, true, &again), SH_EINPUT);
    snprintf(want, sizeof want,
             "%s: belongs to another job: its --mode was exact, now it is bf16: finish that job, remove the folder, or "
             "name another one with --store",
             path);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), want);

    /* the same job goes on; what the old run left is ended and removed */
    sh_child left = {0};
    char ipc[4096];
    snprintf(ipc, sizeof ipc, "%s", s.ipc);
    CU_ASSERT_EQUAL_FATAL(start("exec sleep 60", s.mark, &left), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_runstore_open(path, exact, true, &again), SH_OK);
    CU_ASSERT_TRUE(again.existed);
    CU_ASSERT_EQUAL(again.ended, 1);
    CU_ASSERT_FALSE(sh_child_poll(&left));
    CU_ASSERT_FALSE(sh_file_exists(ipc));
    CU_ASSERT_EQUAL(sh_runstore_close(&again, true), SH_OK);
    CU_ASSERT_FALSE(sh_file_exists(path));
    CU_ASSERT_FALSE(sh_file_exists(again.ipc));
    if (s.shm[0]) SH_IGNORE(sh_path_remove(s.shm));

    /* a folder of something else is not taken */
    CU_ASSERT_EQUAL(sh_dir_make(other), SH_OK);
    CU_ASSERT_EQUAL(sh_runstore_open(path, exact, true, &again), SH_EINPUT);
    snprintf(want, sizeof want, "%s: is not the store of a run: name another folder with --store", path);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), want);
    json_decref(exact), json_decref(bf16);
}

/* While another process that lives owns the store, it is refused; the socket's path has its limit. */
static void test_store_owner(void) {
    char path[4200], note[4300], text[512], want[9000];
    snprintf(path, sizeof path, "%s/owned.store", folder);
    json_t *j = job("exact");
    sh_runstore s = {0}, again = {0};
    CU_ASSERT_EQUAL_FATAL(sh_runstore_open(path, j, true, &s), SH_OK);
    char host[256] = "";
    CU_ASSERT_EQUAL(gethostname(host, sizeof host - 1), 0);
    int n =
        snprintf(text, sizeof text, "{\"pid\": %d, \"started\": %llu, \"host\": \"%s\", \"ipc\": \"\", \"shm\": \"\"}",
                 (int)getppid(), (unsigned long long)sh_process_started(getppid()), host);
    snprintf(note, sizeof note, "%s/owner", path);
    sh_file_writer *w = NULL;
    CU_ASSERT_EQUAL(sh_file_writer_open(note, &w), SH_OK);
    CU_ASSERT_EQUAL(sh_file_writer_add(w, text, (size_t)n), SH_OK);
    CU_ASSERT_EQUAL(sh_file_writer_commit(&w), SH_OK);
    CU_ASSERT_EQUAL(sh_runstore_open(path, j, true, &again), SH_EINPUT);
    snprintf(want, sizeof want, "%s: shoal run with pid %d works on it: wait for it, or end it first (kill %d)", s.path,
             (int)getppid(), (int)getppid());
    CU_ASSERT_STRING_EQUAL(sh_error_text(), want);
    CU_ASSERT_EQUAL(sh_runstore_close(&s, true), SH_OK);
    CU_ASSERT_TRUE(sh_file_exists(path)); /* it is that process's now */
    CU_ASSERT_EQUAL(sh_path_remove(path), SH_OK);

    char deep[256] = "/tmp/";
    memset(deep + 5, 'x', 120);
    char *tmp = getenv("TMPDIR"), *kept = tmp ? strdup(tmp) : NULL;
    setenv("TMPDIR", deep, 1);
    CU_ASSERT_EQUAL(sh_runstore_open(path, j, true, &again), SH_ELIMIT);
    CU_ASSERT_PTR_NOT_NULL(
        strstr(sh_error_text(), "makes socket paths of 146 bytes: allowed are 107: set TMPDIR to a shorter path"));
    if (kept)
        setenv("TMPDIR", kept, 1);
    else
        unsetenv("TMPDIR");
    free(kept);
    json_decref(j);
}

static bool touch(const char *fmt, int pid, char *path, size_t size) {
    char name[64];
    snprintf(name, sizeof name, fmt, pid);
    snprintf(path, size, "%s/%s", folder, name);
    FILE *f = fopen(path, "w");
    return f && fclose(f) == 0;
}

/* What killed writers of a file left goes; what a living one writes, and what only looks alike, stays. */
static void test_leftovers(void) {
    pid_t dead = fork();
    if (dead == 0) _exit(0);
    waitpid(dead, NULL, 0);
    char file[4200], gone[2][4300], kept[4][4300];
    snprintf(file, sizeof file, "%s/rows", folder);
    CU_ASSERT_FATAL(touch("rows.tmp.%d", dead, gone[0], sizeof gone[0]));
    CU_ASSERT_FATAL(touch("rows.tmp.%d", getpid(), gone[1], sizeof gone[1]));
    CU_ASSERT_FATAL(touch("rows.tmp.%d", getppid(), kept[0], sizeof kept[0]));
    CU_ASSERT_FATAL(touch("rows.tmp.%d.bak", dead, kept[1], sizeof kept[1]));
    CU_ASSERT_FATAL(touch("other.tmp.%d", dead, kept[2], sizeof kept[2]));
    CU_ASSERT_FATAL(touch("rows.tmp.%dx", dead, kept[3], sizeof kept[3]));
    CU_ASSERT_EQUAL(sh_file_writer_sweep(file), SH_OK);
    for (int i = 0; i < 2; i++) CU_ASSERT_FALSE(sh_file_exists(gone[i]));
    for (int i = 0; i < 4; i++) CU_ASSERT_TRUE(sh_file_exists(kept[i]));
    CU_ASSERT_EQUAL(chdir(folder), 0); /* a name without a folder */
    CU_ASSERT_FATAL(touch("rows.tmp.%d", dead, gone[0], sizeof gone[0]));
    CU_ASSERT_EQUAL(sh_file_writer_sweep("rows"), SH_OK);
    CU_ASSERT_FALSE(sh_file_exists(gone[0]));
}

int main(void) {
    const char *tmp = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/supervise-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(folder)) return 1;
    char real[4096];
    if (realpath(folder, real)) memcpy(folder, real, sizeof folder);
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("supervise", NULL, NULL);
    CU_add_test(s, "status and log", test_status);
    CU_add_test(s, "no such program", test_not_there);
    CU_add_test(s, "end by force", test_end_by_force);
    CU_add_test(s, "asked once", test_asked_once);
    CU_add_test(s, "marked", test_marked);
    CU_add_test(s, "death signal", test_death_signal);
    CU_add_test(s, "store", test_store);
    CU_add_test(s, "store's owner", test_store_owner);
    CU_add_test(s, "what killed writers left", test_leftovers);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned bad = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    SH_IGNORE(sh_path_remove(folder));
    return bad ? 1 : 0;
}
