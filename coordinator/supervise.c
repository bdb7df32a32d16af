/* Starting, watching and ending processes. See supervise.h. */
#include "coordinator/supervise.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include "common/clock.h"

extern char **environ;

/* environ with the entries of `add` put over it; one block, freed with free(). The strings stay the owners'. */
static const char **merged_env(const char *const *add) {
    size_t n = 0, m = 0;
    while (environ[n]) n++;
    while (add && add[m]) m++;
    const char **env = calloc(n + m + 1, sizeof *env);
    if (!env) return NULL;
    size_t k = 0;
    for (size_t i = 0; i < n; i++) {
        bool replaced = false;
        for (size_t j = 0; j < m && !replaced; j++) {
            size_t name = strcspn(add[j], "=") + 1;
            replaced = strncmp(environ[i], add[j], name) == 0;
        }
        if (!replaced) env[k++] = environ[i];
    }
    for (size_t j = 0; j < m; j++) env[k++] = add[j];
    return env;
}

/* In the new process: never returns. A failure to start is told through tell_fd. */
static _Noreturn void become(const sh_child_spec *s, const char **env, pid_t parent, int log_fd, int tell_fd) {
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGINT, SIG_DFL), signal(SIGTERM, SIG_DFL), signal(SIGPIPE, SIG_DFL);
    setpgid(0, 0);
    if (s->death_signal) prctl(PR_SET_PDEATHSIG, s->death_signal);
    if (getppid() != parent) _exit(127); /* the parent died before the death signal was set */
    int null = open("/dev/null", O_RDWR);
    if (null >= 0) dup2(null, STDIN_FILENO);
    dup2(log_fd >= 0 ? log_fd : null, STDOUT_FILENO);
    dup2(log_fd >= 0 ? log_fd : null, STDERR_FILENO);
    if (s->keep_fd >= 0) fcntl(s->keep_fd, F_SETFD, 0);
    execvpe(s->argv[0], (char *const *)(uintptr_t)s->argv, (char *const *)(uintptr_t)env);
    int e = errno;
    ssize_t w = write(tell_fd, &e, sizeof e);
    (void)w;
    _exit(127);
}

sh_status sh_child_start(const sh_child_spec *s, sh_child *out) {
    int tell[2], log_fd = -1;
    if (s->log && (log_fd = open(s->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0)
        SH_FAIL(SH_EIO, "%s: cannot be written: %s", s->log, strerror(errno));
    const char **env = merged_env(s->env);
    if (!env || pipe2(tell, O_CLOEXEC) != 0) {
        if (log_fd >= 0) close(log_fd);
        free(env);
        SH_FAIL(SH_EIO, "%s: cannot be started: %s", s->argv[0], strerror(errno));
    }
    pid_t parent = getpid(), pid = fork();
    if (pid == 0) become(s, env, parent, log_fd, tell[1]);
    int e = pid < 0 ? errno : 0;
    close(tell[1]);
    if (log_fd >= 0) close(log_fd);
    free(env);
    if (pid > 0) {
        setpgid(pid, pid); /* on both sides: whoever comes first */
        ssize_t n;
        while ((n = read(tell[0], &e, sizeof e)) < 0 && errno == EINTR) {
        }
        if (n != sizeof e) e = 0;
    }
    close(tell[0]);
    if (e) {
        if (pid > 0) waitpid(pid, NULL, 0);
        SH_FAIL(SH_EIO, "%s: cannot be started: %s", s->argv[0], strerror(e));
    }
    *out = (sh_child){.pid = pid, .started = sh_process_started(pid), .running = true};
    return SH_OK;
}

bool sh_child_poll(sh_child *c) {
    if (!c->running) return false;
    int status;
    pid_t r = waitpid(c->pid, &status, WNOHANG);
    if (r == 0 || (r < 0 && errno == EINTR)) return true;
    c->running = false;
    c->status = r == c->pid ? status : 0;
    return false;
}

void sh_child_ask(sh_child *c) {
    if (!c->pid || c->asked || !sh_child_poll(c)) return;
    c->asked = true;
    kill(-c->pid, SIGTERM);
}

void sh_child_end(sh_child *c, double grace) {
    if (!c->pid) return;
    double until = sh_now() + grace;
    sh_child_ask(c);
    while (sh_child_poll(c) && sh_now() < until) sh_sleep(0.01);
    if (!c->running) return;
    kill(-c->pid, SIGKILL);
    while (sh_child_poll(c)) sh_sleep(0.005);
}

void sh_child_describe(const sh_child *c, char *to, size_t size) {
    if (WIFSIGNALED(c->status))
        snprintf(to, size, "was killed by signal %d (%s)", WTERMSIG(c->status), strsignal(WTERMSIG(c->status)));
    else
        snprintf(to, size, "ended with status %d", WEXITSTATUS(c->status));
}

/* Reads up to size−1 bytes of /proc/PID/NAME; −1 when it cannot be read. */
static ssize_t read_proc(pid_t pid, const char *name, char *to, size_t size) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    size_t n = 0;
    ssize_t r;
    while (n < size - 1 && (r = read(fd, to + n, size - 1 - n)) > 0) n += (size_t)r;
    close(fd);
    to[n] = 0;
    return (ssize_t)n;
}

uint64_t sh_process_started(pid_t pid) {
    char stat[1024];
    if (pid <= 0 || read_proc(pid, "stat", stat, sizeof stat) <= 0) return 0;
    char *p = strrchr(stat, ')'); /* the name before it may hold anything */
    if (!p || p[1] != ' ' || p[2] == 'Z' || p[2] == 'X') return 0;
    unsigned long long started = 0;
    p += 2;
    for (int field = 3; field < 22 && p; field++) p = strchr(p + 1, ' ');
    return p && sscanf(p, "%llu", &started) == 1 ? started : 0;
}

static bool is_marked(pid_t pid, const char *mark, char *env, size_t size) {
    ssize_t n = read_proc(pid, "environ", env, size);
    for (const char *p = env; n > 0 && p < env + n; p += strlen(p) + 1)
        if (strcmp(p, mark) == 0) return true;
    return false;
}

/* One round over all processes: sends `sig` (0: only counts) to the marked ones. */
static int signal_marked(const char *mark, int sig, char *env, size_t size) {
    int found = 0;
    DIR *proc = opendir("/proc");
    for (struct dirent *e; proc && (e = readdir(proc));) {
        pid_t pid = (pid_t)atoi(e->d_name);
        if (pid <= 1 || pid == getpid() || !is_marked(pid, mark, env, size)) continue;
        /* The descriptor is taken first and the mark read again: the signal cannot reach a later owner of the pid. */
        int fd = (int)syscall(SYS_pidfd_open, pid, 0);
        if (fd < 0) continue;
        if (is_marked(pid, mark, env, size)) {
            found++;
            if (sig) syscall(SYS_pidfd_send_signal, fd, sig, NULL, 0);
        }
        close(fd);
    }
    if (proc) closedir(proc);
    return found;
}

int sh_process_end_marked(const char *mark, double grace) {
    enum { ENVIRON_MOST = 1 << 20 };
    char *env = malloc(ENVIRON_MOST);
    if (!env) return 0;
    double until = sh_now() + grace;
    int found = signal_marked(mark, SIGTERM, env, ENVIRON_MOST);
    for (int k = 0; !found && k < 2; k++) { /* one that was about to start shows its environment a moment later */
        sh_sleep(0.005);
        found = signal_marked(mark, SIGTERM, env, ENVIRON_MOST);
    }
    int left = found;
    while (left && sh_now() < until) {
        sh_sleep(0.02);
        left = signal_marked(mark, 0, env, ENVIRON_MOST);
    }
    for (int k = 0; left && k < 100; k++) { /* what starts meanwhile is found by the next round */
        left = signal_marked(mark, SIGKILL, env, ENVIRON_MOST);
        sh_sleep(0.02);
    }
    free(env);
    return found;
}
