/* Whole-file reads, maps and atomic writes. See file.h. */
#include "common/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/mapped.h"

sh_file_op_table sh_file_ops = {write, fsync, rename};

sh_status sh_file_read(const char *path, size_t max, char **text, size_t *len) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) SH_FAIL(SH_EIO, "%s: cannot be opened: %s", path, strerror(errno));
    size_t cap = 1 << 16, n = 0;
    char *buf = malloc(cap + 1);
    ssize_t r = buf ? 1 : -1;
    while (buf && (r = read(fd, buf + n, cap - n)) > 0) {
        n += (size_t)r;
        if (n > max) break;
        if (n == cap) {
            char *p = realloc(buf, cap * 2 + 1);
            if (!p) {
                r = -1;
                break;
            }
            buf = p;
            cap *= 2;
        }
    }
    int e = errno;
    close(fd);
    if (r < 0 || n > max) {
        free(buf);
        if (r < 0) SH_FAIL(SH_EIO, "%s: cannot be read: %s", path, strerror(e));
        SH_FAIL(SH_ELIMIT, "%s: larger than the limit of %zu bytes", path, max);
    }
    buf[n] = 0;
    *text = buf;
    *len = n;
    return SH_OK;
}

sh_status sh_map_open(const char *path, sh_map *out) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) SH_FAIL(SH_EIO, "%s: cannot be opened: %s", path, strerror(errno));
    struct stat sb;
    if (fstat(fd, &sb) != 0 || !S_ISREG(sb.st_mode)) {
        close(fd);
        SH_FAIL(SH_EIO, "%s: not a regular file", path);
    }
    sh_map m = {.len = (size_t)sb.st_size};
    if (m.len) {
        void *p = mmap(NULL, m.len, PROT_READ, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) {
            int e = errno;
            close(fd);
            SH_FAIL(SH_EIO, "%s: cannot be mapped: %s", path, strerror(e));
        }
        m.data = p;
    }
    close(fd);
    sh_status st = m.len ? sh_mapped_add(path, &sb, m.data) : SH_OK;
    if (st != SH_OK) {
        munmap((void *)(uintptr_t)m.data, m.len);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = m;
    return SH_OK;
}

void sh_map_close(sh_map *m) {
    if (m->data) {
        sh_mapped_remove(m->data);
        munmap((void *)(uintptr_t)m->data, m->len);
    }
    *m = (sh_map){0};
}

bool sh_file_exists(const char *path) {
    struct stat sb;
    return lstat(path, &sb) == 0;
}

sh_status sh_dir_make(const char *path) {
    char p[PATH_MAX];
    if ((size_t)snprintf(p, sizeof p, "%s", path) >= sizeof p) SH_FAIL(SH_ELIMIT, "%s: path too long", path);
    for (char *s = p + 1;; s++) {
        if (*s && *s != '/') continue;
        char c = *s;
        *s = 0;
        if (mkdir(p, 0700) != 0 && errno != EEXIST) SH_FAIL(SH_EIO, "%s: cannot be created: %s", p, strerror(errno));
        *s = c;
        if (!c) break;
    }
    struct stat sb;
    if (stat(path, &sb) != 0 || !S_ISDIR(sb.st_mode)) SH_FAIL(SH_EIO, "%s: is not a directory", path);
    return SH_OK;
}

static int remove_entry(const char *path, const struct stat *sb, int type, struct FTW *f) {
    (void)sb, (void)type, (void)f;
    return remove(path);
}

sh_status sh_path_remove(const char *path) {
    if (!sh_file_exists(path)) return SH_OK;
    if (nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS) != 0 && errno != ENOENT)
        SH_FAIL(SH_EIO, "%s: cannot be removed: %s", path, strerror(errno));
    return SH_OK;
}

struct sh_file_writer {
    int fd;
    char path[PATH_MAX], tmp[PATH_MAX + 32];
};

sh_status sh_file_writer_open(const char *path, sh_file_writer **out) {
    sh_file_writer *w = calloc(1, sizeof *w);
    if (!w) SH_FAIL(SH_EMEMORY, "%s: no memory for a writer", path);
    snprintf(w->path, sizeof w->path, "%s", path);
    snprintf(w->tmp, sizeof w->tmp, "%s.tmp.%d", path, (int)getpid());
    w->fd = open(w->tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (w->fd < 0) {
        int e = errno;
        free(w);
        SH_FAIL(SH_EIO, "%s: cannot be written: %s", path, strerror(e));
    }
    *out = w;
    return SH_OK;
}

sh_status sh_file_writer_add(sh_file_writer *w, const void *p, size_t n) {
    const char *c = p;
    while (n) {
        ssize_t r = sh_file_ops.write(w->fd, c, n);
        if (r < 0 && errno == EINTR) continue;
        if (r <= 0) SH_FAIL(SH_EIO, "%s: cannot be written: %s", w->path, strerror(r < 0 ? errno : ENOSPC));
        c += r;
        n -= (size_t)r;
    }
    return SH_OK;
}

static void sync_directory(const char *path) {
    char dir[PATH_MAX];
    snprintf(dir, sizeof dir, "%s", path);
    char *slash = strrchr(dir, '/');
    if (slash && slash != dir)
        *slash = 0;
    else
        snprintf(dir, sizeof dir, "%s", slash ? "/" : ".");
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    (void)sh_file_ops.fsync(fd); /* some file systems refuse this; the rename itself already happened */
    close(fd);
}

sh_status sh_file_writer_commit(sh_file_writer **wp) {
    sh_file_writer *w = *wp;
    const char *step = NULL;
    if (sh_file_ops.fsync(w->fd) != 0)
        step = "synced";
    else if (sh_file_ops.rename(w->tmp, w->path) != 0)
        step = "renamed into place";
    if (step) {
        sh_status st = sh_error_set(SH_EIO, __FILE__, __LINE__, "%s: cannot be %s: %s", w->path, step, strerror(errno));
        sh_file_writer_destroy(wp);
        return st;
    }
    sync_directory(w->path);
    close(w->fd);
    free(w);
    *wp = NULL;
    return SH_OK;
}

/* Two names for each other, or where the file system cannot do that, one after the other. */
static int exchange(const char *tmp, const char *path) {
    char aside[PATH_MAX + 8];
    if (renameat2(AT_FDCWD, tmp, AT_FDCWD, path, RENAME_EXCHANGE) == 0) return 0;
    if (errno != EINVAL && errno != ENOSYS) return -1;
    snprintf(aside, sizeof aside, "%s.old", tmp);
    if (sh_file_ops.rename(path, aside) != 0) return -1;
    if (sh_file_ops.rename(tmp, path) == 0) return sh_file_ops.rename(aside, tmp);
    int e = errno;
    (void)sh_file_ops.rename(aside, path);
    errno = e;
    return -1;
}

sh_status sh_dir_publish(const char *tmp, const char *path) {
    int fd = open(tmp, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) SH_FAIL(SH_EIO, "%s: cannot be opened: %s", tmp, strerror(errno));
    (void)sh_file_ops.fsync(fd); /* some file systems refuse this */
    close(fd);
    bool replaces = sh_file_exists(path);
    if ((replaces ? exchange(tmp, path) : sh_file_ops.rename(tmp, path)) != 0)
        SH_FAIL(SH_EIO, "%s: cannot be renamed into place: %s", path, strerror(errno));
    sync_directory(path);
    return replaces ? sh_path_remove(tmp) : SH_OK;
}

sh_status sh_file_write(const char *path, const void *p, size_t n) {
    SH_CLEANUP(sh_file_writer_destroy) sh_file_writer *w = NULL;
    SH_TRY(sh_file_writer_open(path, &w));
    SH_TRY(sh_file_writer_add(w, p, n));
    return sh_file_writer_commit(&w);
}

/* The pid of "NAME.tmp.PID"; 0: something else. */
static pid_t writer_of(const char *entry, const char *name) {
    size_t n = strlen(name);
    if (strncmp(entry, name, n) != 0 || strncmp(entry + n, ".tmp.", 5) != 0) return 0;
    const char *digits = entry + n + 5;
    size_t k = strspn(digits, "0123456789");
    return k > 0 && k < 10 && !digits[k] ? (pid_t)atoi(digits) : 0;
}

sh_status sh_file_writer_sweep(const char *path) {
    char dir[PATH_MAX];
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    snprintf(dir, sizeof dir, "%.*s", slash ? (int)(slash - path + 1) : 1, slash ? path : ".");
    DIR *d = opendir(dir);
    if (!d) SH_FAIL(SH_EIO, "%s: cannot be read: %s", dir, strerror(errno));
    sh_status st = SH_OK;
    for (struct dirent *e; (e = readdir(d));) {
        pid_t pid = writer_of(e->d_name, name);
        if (!pid || (pid != getpid() && (kill(pid, 0) == 0 || errno != ESRCH))) continue;
        char left[PATH_MAX + 256];
        snprintf(left, sizeof left, "%s%s", slash ? dir : "", e->d_name);
        sh_status removed = sh_path_remove(left);
        if (removed != SH_OK) st = removed;
    }
    closedir(d);
    return st;
}

void sh_file_writer_destroy(sh_file_writer **wp) {
    if (!*wp) return;
    close((*wp)->fd);
    unlink((*wp)->tmp);
    free(*wp);
    *wp = NULL;
}
