/*
 * The registry of mapped files and the handler of SIGBUS. See mapped.h. The handler only calls what POSIX allows in one
 * (stat, write, clock_gettime, nanosleep, pause, alarm, pthread_sigmask, sigaction, raise, _exit) and reads the
 * registry without a lock: entries are never freed, and that of a map which somebody reads does not change.
 */
#include "common/mapped.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/log.h"

typedef struct entry {
    struct entry *next;
    _Atomic uintptr_t from; /* 0: of no map; written last, and cleared first */
    size_t bytes;
    char *path;
    dev_t device; /* the file itself: another one may have its name by now */
    ino_t number;
} entry;

static _Atomic(entry *) all;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of who adds and removes */

static struct sigaction before; /* this handler */
static int exit_with;
static atomic_flag claimed = ATOMIC_FLAG_INIT;
#define PATH_SHOWN 800 /* bytes; what is wrong with the file has room behind it */
static char known[1024], text[1024];
static double since;                       /* when `first` was set */
static _Atomic(const char *) first, fault; /* `known`: what needs no look at the file; `text`: all */
static atomic_int listeners;
static atomic_bool told;

/* --- the registry --------------------------------------------------------------------------------------------------
 */

static entry *unused(void) {
    for (entry *e = atomic_load(&all); e; e = e->next)
        if (atomic_load(&e->from) == 0) return e;
    entry *e = calloc(1, sizeof *e);
    if (!e) return NULL;
    e->next = atomic_load(&all);
    atomic_store(&all, e);
    return e;
}

sh_status sh_mapped_add(const char *path, const struct stat *file, const void *p) {
    char *copy = strdup(path);
    pthread_mutex_lock(&lock);
    entry *e = copy ? unused() : NULL;
    if (e) {
        free(e->path);
        e->path = copy;
        e->bytes = (size_t)file->st_size;
        e->device = file->st_dev;
        e->number = file->st_ino;
        atomic_store(&e->from, (uintptr_t)p);
    }
    pthread_mutex_unlock(&lock);
    if (e) return SH_OK;
    free(copy);
    SH_FAIL(SH_EMEMORY, "%s: no memory for the note that it is mapped", path);
}

void sh_mapped_remove(const void *p) {
    pthread_mutex_lock(&lock);
    for (entry *e = atomic_load(&all); e; e = e->next)
        if (atomic_load(&e->from) == (uintptr_t)p) {
            atomic_store(&e->from, 0);
            break;
        }
    pthread_mutex_unlock(&lock);
}

static const entry *find(uintptr_t at) {
    for (const entry *e = atomic_load(&all); e; e = e->next) {
        uintptr_t from = atomic_load(&e->from);
        if (from && at >= from && at - from < e->bytes) return e;
    }
    return NULL;
}

/* --- the handler ---------------------------------------------------------------------------------------------------
 */

typedef struct line {
    char *to;
    size_t n, room;
} line;

static void add(line *l, const char *s) {
    while (*s && l->n < l->room) l->to[l->n++] = *s++;
}

static void add_number(line *l, uint64_t v) {
    char digits[21];
    int i = sizeof digits - 1;
    digits[i] = 0;
    do digits[--i] = (char)('0' + v % 10);
    while (v /= 10);
    add(l, digits + i);
}

static void describe_place(const entry *e, size_t at, line *l) {
    l->room = PATH_SHOWN;
    add(l, e->path);
    l->room = sizeof text - 1;
    add(l, ": byte ");
    add_number(l, at);
    add(l, " cannot be read any more");
}

/* Looks at the file, which may take as long as its server pleases. */
static void describe(const entry *e, size_t at, int code) {
    line l = {.to = text};
    struct stat sb;
    describe_place(e, at, &l);
    if (code == BUS_MCEERR_AR || code == BUS_MCEERR_AO) {
        add(&l, ": the memory that it was in is faulty");
    } else if (stat(e->path, &sb) != 0 || sb.st_dev != e->device || sb.st_ino != e->number) {
        add(&l, ": the file is not there now, or another has its name");
    } else if ((uint64_t)sb.st_size < e->bytes) {
        add(&l, ": the file was cut while it was in use: it had ");
        add_number(&l, e->bytes);
        add(&l, " bytes, and ends at offset ");
        add_number(&l, (uint64_t)sb.st_size);
    } else {
        add(&l, ": the storage that the file is on failed");
    }
    text[l.n] = 0;
}

static void write_line(const char *what) {
    char whole[sizeof text + 128];
    line l = {.to = whole, .room = sizeof whole - 1};
    const char *who = sh_log_who();
    add(&l, *who ? "shoal " : "shoal");
    add(&l, who);
    add(&l, ": error: ");
    add(&l, what);
    whole[l.n++] = '\n';
    ssize_t written = write(STDERR_FILENO, whole, l.n);
    (void)written;
}

/* What needs no look is said first, since the look may never end. */
static void say_place(const entry *e, size_t at) {
    line l = {.to = known};
    describe_place(e, at, &l);
    known[l.n] = 0;
    write_line(known);
    since = sh_now();
    atomic_store(&first, known);
}

/* The process ends in this time, if only by SIGALRM: that ends waits for a dead server, too. */
static void bound_wait(void) {
    sigset_t one;
    const struct sigaction ends = {.sa_handler = SIG_DFL};
    sigemptyset(&one);
    sigaddset(&one, SIGALRM);
    sigaction(SIGALRM, &ends, NULL);
    pthread_sigmask(SIG_UNBLOCK, &one, NULL);
    alarm(2 * SH_MAPPED_WAIT);
}

static void wait_for_listeners(void) {
    const struct timespec nap = {.tv_nsec = 5000000};
    for (int i = 0; i < SH_MAPPED_WAIT * 200 && atomic_load(&listeners) > 0 && !atomic_load(&told); i++)
        nanosleep(&nap, NULL);
}

static void on_bus(int sig, siginfo_t *info, void *context) {
    uintptr_t at = (uintptr_t)info->si_addr;
    const entry *e = info->si_code > 0 ? find(at) : NULL; /* else a process sent it */
    (void)context;
    if (!e) { /* as if this handler were not there: a fault comes again at once */
        sigaction(sig, &before, NULL);
        if (info->si_code <= 0) raise(sig);
        return;
    }
    while (atomic_flag_test_and_set(&claimed)) pause(); /* another thread is at it, and will end this one too */
    at -= atomic_load(&e->from);
    bound_wait();
    say_place(e, at);
    describe(e, at, info->si_code);
    write_line(text);
    atomic_store(&fault, text);
    wait_for_listeners();
    _exit(exit_with);
}

sh_status sh_mapped_watch(int exit_status) {
    struct sigaction mine = {.sa_sigaction = on_bus, .sa_flags = SA_SIGINFO}, found;
    sigemptyset(&mine.sa_mask);
    exit_with = exit_status;
    if (sigaction(SIGBUS, &mine, &found) != 0) SH_FAIL(SH_EIO, "SIGBUS: no handler can be set");
    if (!(found.sa_flags & SA_SIGINFO) || found.sa_sigaction != on_bus) before = found;
    return SH_OK;
}

void sh_mapped_listen_begin(void) {
    atomic_fetch_add(&listeners, 1);
}

void sh_mapped_listen_end(void) {
    atomic_fetch_sub(&listeners, 1);
}

const char *sh_mapped_fault(void) {
    const char *whole = atomic_load(&fault), *part = atomic_load(&first);
    if (whole || !part || sh_now() - since < SH_MAPPED_LOOK) return whole;
    return part;
}

void sh_mapped_told(void) {
    if (!atomic_load(&fault)) _exit(exit_with); /* the handler still waits for the file's server */
    atomic_store(&told, true);
}
