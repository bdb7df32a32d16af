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
#include "common/limits.h"
#include "common/buf.h"
#include "common/utf8.h"

enum { BLOCK = 1 << 20 };

/* Lines as they pass in blocks. */
typedef struct passing {
    const sh_input_reader *reader;
    uint64_t lines;
    bool inside, wanted; /* a line that is not empty has begun; somebody wants it */
    sh_buf part;         /* of it, as far as it came in earlier blocks */
} passing;

static sh_status end_line(passing *l, const char *p, size_t n) {
    bool whole = l->part.len == 0, fits = l->part.len + n <= SH_MAX_LINE_BYTES;
    if (l->wanted && fits && !whole) SH_TRY(sh_buf_add(&l->part, p, n));
    if (l->wanted && fits)
        l->reader->take(l->reader->ctx, whole ? p : (const char *)l->part.data, whole ? n : l->part.len);
    sh_buf_clear(&l->part);
    l->inside = l->wanted = false;
    return SH_OK;
}

/* Bytes of one line, without its end. */
static void pass_begin(passing *l, const char **p, const char *end) {
    while (!l->inside && *p < end && (**p == ' ' || **p == '\t' || **p == '\r')) ++*p;
    if (l->inside || *p == end) return;
    l->inside = true;
    l->wanted = l->reader && l->reader->wants(l->reader->ctx, l->lines);
    l->lines++;
}

static sh_status pass_block(passing *l, const char *p, size_t n) {
    for (const char *stop = p + n; p < stop;) {
        const char *line_end = memchr(p, '\n', (size_t)(stop - p)), *end = line_end ? line_end : stop;
        pass_begin(l, &p, end);
        if (line_end)
            SH_TRY(end_line(l, p, (size_t)(end - p)));
        else if (l->wanted && l->part.len + (size_t)(end - p) <= SH_MAX_LINE_BYTES)
            SH_TRY(sh_buf_add(&l->part, p, (size_t)(end - p)));
        else
            l->wanted = false; /* too long, or nobody's */
        p = end + 1;
    }
    return SH_OK;
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

static sh_status scan(int fd, const char *path, char *block, sh_file_writer *copy, passing *l, sh_input *in) {
    for (;;) {
        ssize_t n = read_block(fd, block);
        if (n < 0 && errno == EINTR) SH_FAIL(SH_ECANCELLED, "-i: %s: interrupted while it was read", path);
        if (n < 0) SH_FAIL(SH_EINPUT, "-i: %s: cannot be read: %s", path, strerror(errno));
        if (n == 0) return end_line(l, "", 0);
        size_t mark = in->bytes == 0 ? sh_utf8_mark(block, (size_t)n) : 0;
        SH_TRY(pass_block(l, block + mark, (size_t)n - mark));
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

sh_status sh_input_scan(const char *path, const char *spool, const sh_input_reader *reader, sh_input *out) {
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
    passing l = {.reader = reader};
    sh_buf_init(&l.part, SH_MAX_LINE_BYTES + 1);
    char *block = malloc(BLOCK);
    sh_status st = block ? SH_OK : sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "-i: no memory to read %s", path);
    if (st == SH_OK && sh_input_is_stream(path)) st = sh_file_writer_open(spool, &copy);
    if (st == SH_OK) st = scan(fd, path, block, copy, &l, &in);
    in.lines = l.lines;
    sh_buf_release(&l.part);
    if (st == SH_OK && copy) st = sh_file_writer_commit(&copy);
    sh_file_writer_destroy(&copy);
    free(block);
    if (!standard) close(fd);
    if (st == SH_OK) *out = in;
    return st;
}
