/* Mapped files that are cut while they are read: the lines that are said, the exit status, any thread, and what is left
 * alone. Each case is a process of its own, since it ends. */
#include <CUnit/Basic.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include "common/clock.h"
#include "common/file.h"
#include "common/log.h"
#include "common/mapped.h"
#include "model/team.h"

enum { BYTES = 3 * 4096 + 100, STATUS = 3 };

static char folder[] = "/tmp/shoal-mapped-XXXXXX";
static char path[100];

static void write_file(void) {
    static uint8_t bytes[BYTES];
    memset(bytes, 5, sizeof bytes);
    SH_IGNORE(sh_file_write(path, bytes, sizeof bytes));
}

static void must(sh_status st) {
    if (st != SH_OK) _exit(90);
}

static uint8_t read_at(const sh_map *m, size_t at) {
    return ((const volatile uint8_t *)m->data)[at];
}

/* Another file before and one behind, so that the right one must be found. */
static sh_map open_three(void) {
    static sh_map a, b, m;
    char other[120];
    snprintf(other, sizeof other, "%s.other", path);
    must(sh_file_write(other, "abc", 3));
    must(sh_map_open(other, &a));
    must(sh_map_open(path, &m));
    must(sh_map_open(other, &b));
    must(sh_mapped_watch(STATUS));
    return m;
}

/* Runs it in a process of its own: its wait status, and what it wrote to standard error. */
static int run(void (*what)(void), char *said, size_t size, double *seconds) {
    int pipes[2], status = 0;
    size_t n = 0;
    double since = sh_now();
    write_file();
    CU_ASSERT_FATAL(pipe(pipes) == 0);
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        const struct rlimit none = {0, 0};
        setrlimit(RLIMIT_CORE, &none);
        dup2(pipes[1], STDERR_FILENO);
        close(pipes[0]);
        close(pipes[1]);
        sh_log_setup(SH_LOG_WARN, "rank 7");
        what();
        _exit(91);
    }
    close(pipes[1]);
    for (ssize_t got; n + 1 < size && (got = read(pipes[0], said + n, size - 1 - n)) > 0;) n += (size_t)got;
    said[n] = 0;
    close(pipes[0]);
    CU_ASSERT_FATAL(pid > 0 && waitpid(pid, &status, 0) == pid);
    *seconds = sh_now() - since;
    return status;
}

static void ends_with(void (*what)(void), const char *format, double least, double most) {
    char said[3000], want[500];
    double seconds = 0;
    int status = run(what, said, sizeof said, &seconds);
    snprintf(want, sizeof want, format, path);
    CU_ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == STATUS);
    CU_ASSERT_STRING_EQUAL(said, want);
    CU_ASSERT_TRUE(seconds >= least && seconds < most);
}

#define PLACE "shoal rank 7: error: %1$s: byte 8200 cannot be read any more\n"
#define CUT                                                                                                            \
    PLACE                                                                                                              \
    "shoal rank 7: error: %1$s: byte 8200 cannot be read any more: the file was cut while it was in use: it had "      \
    "12388 "                                                                                                           \
    "bytes, and ends at offset 4096\n"

static void read_cut(void) {
    sh_map m = open_three();
    if (read_at(&m, 8200) != 5 || truncate(path, 4096) != 0 || read_at(&m, 4000) != 5) _exit(92);
    (void)read_at(&m, 8200);
}

static void cut(void) {
    ends_with(read_cut, CUT, 0, 60);
}

static void *thread_main(void *arg) {
    pthread_barrier_t *at = arg;
    sh_map m;
    must(sh_map_open(path, &m));
    pthread_barrier_wait(at);
    pthread_barrier_wait(at);
    (void)read_at(&m, 8200);
    return NULL;
}

/* Many at once, each with a map of its own: one line. */
static void read_in_threads(void) {
    enum { N = 8 };
    pthread_t t[N];
    pthread_barrier_t at;
    must(sh_mapped_watch(STATUS));
    pthread_barrier_init(&at, NULL, N + 1);
    for (int i = 0; i < N; i++)
        if (pthread_create(&t[i], NULL, thread_main, &at) != 0) _exit(93);
    pthread_barrier_wait(&at);
    if (truncate(path, 4096) != 0) _exit(92);
    pthread_barrier_wait(&at);
    for (int i = 0; i < N; i++) pthread_join(t[i], NULL);
}

static void threads(void) {
    ends_with(read_in_threads, CUT, 0, 60);
}

static void team_main(void *arg, int member, int size) {
    if (member == size - 1) (void)read_at(arg, 8200);
}

static void read_in_team(void) {
    sh_team *team = NULL;
    sh_map m = open_three();
    must(sh_team_create(3, NULL, 0, &team));
    if (truncate(path, 4096) != 0) _exit(92);
    sh_team_run(team, team_main, &m);
}

static void team(void) {
    ends_with(read_in_team, CUT, 0, 60);
}

static void read_replaced(void) {
    sh_map m = open_three();
    if (truncate(path, 0) != 0) _exit(92);
    must(sh_file_write(path, "new", 3)); /* another file, by rename */
    (void)read_at(&m, 1);
}

static void replaced(void) {
    ends_with(
        read_replaced,
        "shoal rank 7: error: %1$s: byte 1 cannot be read any more\n"
        "shoal rank 7: error: %1$s: byte 1 cannot be read any more: the file is not there now, or another has its "
        "name\n",
        0, 60);
}

/* ---- who carries it on ----------------------------------------------------------------------------------------------
 */

static void *listener_main(void *arg) {
    (void)arg;
    while (!sh_mapped_fault()) sh_sleep(1e-3);
    sh_sleep(0.3);
    const char *text = sh_mapped_fault();
    if (strncmp(text, path, strlen(path)) == 0 && strstr(text, "byte 8200")) sh_mapped_told();
    return NULL;
}

static void read_with_listener(void) {
    pthread_t t;
    sh_mapped_listen_begin();
    if (pthread_create(&t, NULL, listener_main, NULL) != 0) _exit(93);
    read_cut();
}

static void read_with_deaf(void) {
    sh_mapped_listen_begin();
    read_cut();
}

static void read_without_any(void) {
    sh_mapped_listen_begin();
    sh_mapped_listen_end();
    read_cut();
}

static void listeners(void) {
    ends_with(read_with_listener, CUT, 0.3, 60);
    ends_with(read_with_deaf, CUT, SH_MAPPED_WAIT, 60);
    ends_with(read_without_any, CUT, 0, SH_MAPPED_WAIT);
}

/* ---- a server that does not answer ----------------------------------------------------------------------------------
 */

static volatile bool server_is_dead;

/* In place of the C library's: as on a file system whose server is gone. */
int stat(const char *restrict name, struct stat *restrict sb) {
    while (server_is_dead) pause();
    return fstatat(AT_FDCWD, name, sb, 0);
}

static void read_from_dead(void) {
    sh_map m = open_three();
    if (truncate(path, 4096) != 0) _exit(92);
    server_is_dead = true;
    (void)read_at(&m, 8200);
}

static void *reporter_main(void *arg) {
    (void)arg;
    while (!sh_mapped_fault()) sh_sleep(1e-3);
    const char *text = sh_mapped_fault(), *end = strstr(text, ": byte 8200 cannot be read any more");
    if (end && strncmp(text, path, strlen(path)) == 0 && strlen(end) == 35) sh_mapped_told();
    _exit(94);
}

static void read_from_dead_with_listener(void) {
    pthread_t t;
    sh_mapped_listen_begin();
    if (pthread_create(&t, NULL, reporter_main, NULL) != 0) _exit(93);
    read_from_dead();
}

static void dead_server(void) {
    char said[3000], want[300];
    double seconds = 0;
    ends_with(read_from_dead_with_listener, PLACE, SH_MAPPED_LOOK, SH_MAPPED_WAIT);
    int status = run(read_from_dead, said, sizeof said, &seconds);
    snprintf(want, sizeof want, PLACE, path);
    CU_ASSERT_STRING_EQUAL(said, want);
    CU_ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM);
    CU_ASSERT_TRUE(seconds > SH_MAPPED_WAIT && seconds < 3 * SH_MAPPED_WAIT);
}

/* ---- what is not ours -----------------------------------------------------------------------------------------------
 */

static void dies_of_it(void (*what)(void)) {
    char said[8000];
    double seconds = 0;
    int status = run(what, said, sizeof said, &seconds);
#ifdef __SANITIZE_ADDRESS__ /* has a handler of its own, which is the one before ours */
    CU_ASSERT_TRUE(WIFSIGNALED(status) ||
                   (WIFEXITED(status) && WEXITSTATUS(status) != STATUS && WEXITSTATUS(status) < 90));
#else
    CU_ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    CU_ASSERT_STRING_EQUAL(said, "");
#endif
}

/* A file that is mapped by somebody else. */
static void read_unknown(void) {
    (void)open_three();
    must(sh_mapped_watch(STATUS)); /* again, as after MPI's start: it does not follow itself */
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    sh_map m = {.data = mmap(NULL, BYTES, PROT_READ, MAP_SHARED, fd, 0), .len = BYTES};
    if (m.data == MAP_FAILED || truncate(path, 4096) != 0) _exit(92);
    (void)read_at(&m, 8200);
}

static void was_sent(void) {
    (void)open_three();
    raise(SIGBUS);
}

/* The place of a map that was closed, taken by a map that is not known. */
static void read_closed(void) {
    sh_map m;
    must(sh_map_open(path, &m));
    must(sh_mapped_watch(STATUS));
    void *place = (void *)(uintptr_t)m.data;
    sh_map_close(&m);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (mmap(place, BYTES, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) != place || truncate(path, 0) != 0) _exit(92);
    m = (sh_map){.data = place, .len = BYTES};
    (void)read_at(&m, 1);
}

static void not_ours(void) {
    dies_of_it(read_unknown);
    dies_of_it(was_sent);
    dies_of_it(read_closed);
}

int main(void) {
    if (!mkdtemp(folder)) return 1;
    snprintf(path, sizeof path, "%s/weights", folder);
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("mapped files", NULL, NULL);
    CU_add_test(s, "a cut file", cut);
    CU_add_test(s, "in many threads at once", threads);
    CU_add_test(s, "in a thread of a team", team);
    CU_add_test(s, "a file that was replaced", replaced);
    CU_add_test(s, "those that carry it on", listeners);
    CU_add_test(s, "a server that does not answer", dead_server);
    CU_add_test(s, "what is not ours", not_ours);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    SH_IGNORE(sh_path_remove(folder));
    return failed ? 1 : 0;
}
