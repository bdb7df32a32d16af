/* Counting and hashing the input. See input.h. */
#include "cli/input.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "common/file.h"
#include "common/hash.h"

enum { BLOCK = 1 << 20 };

static void count_lines(const char *p, size_t n, bool *inside, uint64_t *lines) {
    for (size_t i = 0; i < n; i++) {
        if (p[i] == '\n')
            *inside = false;
        else if (!*inside && p[i] != ' ' && p[i] != '\t' && p[i] != '\r') {
            *inside = true;
            ++*lines;
        }
    }
}

/* Whole blocks are hashed, however short the reads are: the hash depends on the bytes alone. */
static ssize_t read_block(int fd, char *block) {
    size_t n = 0;
    while (n < BLOCK) {
        ssize_t r = read(fd, block + n, BLOCK - n);
        if (r < 0) return -1;
        if (r == 0) break;
        n += (size_t)r;
    }
    return (ssize_t)n;
}

static sh_status scan(int fd, const char *path, char *block, sh_file_writer *copy, sh_input *in) {
    bool inside = false;
    for (;;) {
        ssize_t n = read_block(fd, block);
        if (n < 0 && errno == EINTR) SH_FAIL(SH_ECANCELLED, "-i: %s: interrupted while it was read", path);
        if (n < 0) SH_FAIL(SH_EINPUT, "-i: %s: cannot be read: %s", path, strerror(errno));
        if (n == 0) return SH_OK;
        count_lines(block, (size_t)n, &inside, &in->lines);
        in->bytes += (uint64_t)n;
        in->hash = sh_hash64(in->hash, block, (size_t)n);
        if (copy) SH_TRY(sh_file_writer_add(copy, block, (size_t)n));
    }
}

bool sh_input_is_stream(const char *path) {
    struct stat sb;
    if (strcmp(path, "-") == 0) return true;
    return stat(path, &sb) == 0 && !S_ISREG(sb.st_mode) && !S_ISDIR(sb.st_mode);
}

sh_status sh_input_scan(const char *path, const char *spool, sh_input *out) {
    bool standard = strcmp(path, "-") == 0;
    int fd = standard ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) SH_FAIL(SH_EINPUT, "-i: %s: cannot be opened: %s", path, strerror(errno));
    struct stat sb;
    if (!standard && fstat(fd, &sb) == 0 && S_ISDIR(sb.st_mode)) {
        close(fd);
        SH_FAIL(SH_EINPUT, "-i: %s: is a folder: allowed is a file of requests, one JSON object a line", path);
    }
    sh_file_writer *copy = NULL;
    sh_input in = {0};
    char *block = malloc(BLOCK);
    sh_status st = block ? SH_OK : sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "-i: no memory to read %s", path);
    if (st == SH_OK && sh_input_is_stream(path)) st = sh_file_writer_open(spool, &copy);
    if (st == SH_OK) st = scan(fd, path, block, copy, &in);
    if (st == SH_OK && copy) st = sh_file_writer_commit(&copy);
    sh_file_writer_destroy(&copy);
    free(block);
    if (!standard) close(fd);
    if (st == SH_OK) *out = in;
    return st;
}
