/* shoal doctor: one line for each thing that a run needs, and under it, where something is missing or slow, the command
 * that mends it. Exit status 0: a run can be started; 3: something that it needs is missing. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>
#include "cli/commands.h"
#include "cli/demo.h"
#include "cli/facts.h"
#include "cli/options.h"
#include "common/file.h"
#include "partition/machine.h"

#define SOCKET_PATH_MOST 107 /* sun_path less its 0 */

static const char usage[] =
    "Usage: shoal doctor\n"
    "Tells what this machine has for shoal, what is missing, and the command that mends it.\n\n";

typedef enum level { GOOD, SLOW, MISSING } level;
static int worst;

__attribute__((format(printf, 4, 5))) static void say(level l, const char *what, const char *mend, const char *fmt,
                                                      ...) {
    static const char *const label[] = {"ok", "slow", "missing"};
    va_list ap;
    printf("%-8s%-14s", label[l], what);
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    putchar('\n');
    if (l != GOOD && mend) printf("%-22s→ %s\n", "", mend);
    if ((int)l > worst) worst = (int)l;
}

/* First line of a small file, without its end; "" when it cannot be read. */
static const char *first_line(const char *path, char *to, size_t size) {
    to[0] = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, to, size - 1);
    if (fd >= 0) close(fd);
    to[n > 0 ? n : 0] = 0;
    to[strcspn(to, "\n")] = 0;
    return to;
}

/* Output's first line of a program found in PATH. */
static bool program_says(const char *command, char *to, size_t size) {
    FILE *p = popen(command, "re");
    to[0] = 0;
    if (p && !fgets(to, (int)size, p)) to[0] = 0;
    int rc = p ? pclose(p) : -1;
    to[strcspn(to, "\n")] = 0;
    return rc == 0 && *to;
}

static void check_libraries(void) {
    sh_library_fact f[16];
    int n = sh_facts_libraries(f, 16);
    for (int i = 0; i < n; i++) {
        char mend[128];
        snprintf(mend, sizeof mend, "apt-get install %s, then build again", f[i].package);
        say(strcmp(f[i].version, "not found") ? GOOD : MISSING, f[i].name, mend, "%s", f[i].version);
    }
    char isa[SH_FACTS_MAX];
    sh_facts_isa(isa, sizeof isa);
    say(strncmp(isa, "none", 4) ? GOOD : MISSING, "kernels", "unset SHOAL_ISA, or give a level that this CPU has", "%s",
        isa);
    const char *core = sh_facts_blas_core();
    static const char *const old[] = {"Prescott", "Core2", "Banias", "Northwood", "Katmai", "Coppermine", "generic"};
    level l = GOOD;
    for (size_t i = 0; i < sizeof old / sizeof *old; i++)
        if (strcasecmp(core, old[i]) == 0) l = SLOW;
    if (*core)
        say(l, "OpenBLAS core",
            "export OPENBLAS_CORETYPE=Haswell (or SkylakeX with AVX-512); only SHOAL_ISA=blas uses it", "%s%s", core,
            l == SLOW ? ": an SSE3 fall-back, about five times slower" : "");
}

static void check_mpirun(void) {
    char text[256];
    if (!program_says("mpirun --version 2>/dev/null", text, sizeof text)) {
        say(MISSING, "mpirun", "apt-get install openmpi-bin (or use --launcher local)", "not found in PATH");
        return;
    }
    say(GOOD, "mpirun", NULL, "%s; more ranks than cores are started with --oversubscribe%s", text,
        geteuid() == 0 ? "; running as root is allowed by shoal run" : "");
    const char *nested = getenv("OMPI_COMM_WORLD_SIZE");
    if (nested) say(MISSING, "nested", "start shoal run outside of mpirun", "this is one of %s MPI tasks", nested);
}

static void check_folders(void) {
    const char *tmp = getenv("TMPDIR");
    if (!tmp || !*tmp) tmp = "/tmp";
    size_t longest = strlen(tmp) + strlen("/shoal-XXXXXX/c99");
    if (access(tmp, W_OK | X_OK) != 0)
        say(MISSING, "TMPDIR", "export TMPDIR=/tmp", "%s: %s", tmp, strerror(errno));
    else if (longest > SOCKET_PATH_MOST)
        say(MISSING, "TMPDIR", "export TMPDIR=/tmp", "%s makes socket paths of %zu bytes: allowed are %d", tmp, longest,
            SOCKET_PATH_MOST);
    else
        say(GOOD, "TMPDIR", NULL, "%s (socket paths of %zu bytes, %d allowed)", tmp, longest, SOCKET_PATH_MOST);
    struct statvfs v;
    if (statvfs("/dev/shm", &v) != 0 || access("/dev/shm", W_OK) != 0) {
        say(SLOW, "/dev/shm", "mount -t tmpfs tmpfs /dev/shm", "%s: ranks of one node talk over TCP", strerror(errno));
        return;
    }
    double mib = (double)v.f_bavail * (double)v.f_frsize / 0x1p20;
    say(mib >= 64 ? GOOD : SLOW, "/dev/shm", "mount -o remount,size=1G /dev/shm (docker: --shm-size 1g)",
        "%.0f MiB free%s", mib, mib >= 64 ? "" : ": too little for the shared memory of MPI");
}

static void check_system(void) {
    char a[256];
    struct utsname u;
    if (uname(&u) == 0) say(GOOD, "system", NULL, "%s %s, %s", u.sysname, u.release, u.machine);
    first_line("/sys/kernel/mm/transparent_hugepage/enabled", a, sizeof a);
    bool never = strstr(a, "[never]") != NULL;
    say(never ? SLOW : GOOD, "huge pages", "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled", "%s",
        *a ? a : "this kernel does not tell");
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r) == 0)
        say(r.rlim_cur >= 256 ? GOOD : SLOW, "open files", "ulimit -n 1024", "limit %llu",
            (unsigned long long)r.rlim_cur);
}

/* CPUs and memory that a run may use, and where each limit comes from. */
static void check_machine(void) {
    static sh_machine m;
    sh_buf text;
    sh_buf_init(&text, 0);
    if (sh_machine_read(NULL, &m) != SH_OK || sh_machine_print(&m, &text) != SH_OK) {
        say(MISSING, "machine", "mount /proc and /sys", "%s", sh_error_text());
    } else {
        char *rest = (char *)text.data;
        for (char *line = strsep(&rest, "\n"); line; line = strsep(&rest, "\n"))
            if (*line) printf("%-8s%s\n", "ok", line);
        const sh_memory_limit *least = &m.limit[m.memory_from];
        if (m.memory < (uint64_t)256 << 20)
            say(SLOW, "memory", "raise the limit named here, or end other programs", "%.0f MiB are left by %s (%s)",
                (double)m.memory / 0x1p20, least->name, least->source);
    }
    sh_buf_release(&text);
}

static void check_demo(void) {
    const char *model = sh_demo_model();
    if (model)
        say(GOOD, "demo model", NULL, "%s", model);
    else
        say(SLOW, "demo model", "set SHOAL_SHARE, or always give -m", "%s", sh_error_text());
}

int sh_cmd_doctor(int argc, char **argv) {
    int operands = 0, rc = sh_options_begin("doctor", usage, NULL, 0, argc, argv, &operands);
    if (rc >= 0) return rc;
    if (operands) {
        fprintf(stderr, "shoal doctor: '%s': takes no operands\n", argv[1]);
        return SH_EXIT_USAGE;
    }
    worst = GOOD;
    check_system();
    check_machine();
    check_libraries();
    check_mpirun();
    check_folders();
    check_demo();
    printf("\n%s\n", worst == MISSING ? "Something that a run needs is missing: see above."
                     : worst == SLOW  ? "A run can be started; see above what would make it faster."
                                      : "All is there.");
    return worst == MISSING ? SH_EXIT_RUN : SH_EXIT_OK;
}
