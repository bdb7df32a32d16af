/* A growing log. See logtail.h. */
#include "cli/logtail.h"

#include <string.h>
#include <sys/stat.h>

#define PARAGRAPH    200
#define REASON_BYTES 65536 /* of the log's end that are searched */

static off_t size_of(const char *path) {
    struct stat sb;
    return stat(path, &sb) == 0 ? sb.st_size : 0;
}

void sh_logtail_open(sh_logtail *t, const char *path) {
    *t = (sh_logtail){0};
    snprintf(t->path, sizeof t->path, "%s", path);
    t->seen = t->mark = size_of(path);
}

void sh_logtail_close(sh_logtail *t) {
    t->path[0] = 0;
}

void sh_logtail_mark(sh_logtail *t) {
    t->mark = size_of(t->path);
}

/* Reads one line at *at; false at the end or when the line is not whole yet. Overlong lines are cut. */
static bool next_line(FILE *f, char *line, int size, off_t *at) {
    if (!fgets(line, size, f)) return false;
    size_t n = strlen(line);
    bool whole = n && line[n - 1] == '\n';
    int c = 0;
    while (!whole && (c = fgetc(f)) != EOF && c != '\n') {
    }
    if (!whole && c == EOF) return false;
    line[strcspn(line, "\n")] = 0;
    *at = ftello(f);
    return true;
}

const char *sh_logtail_next_warning(sh_logtail *t) {
    if (size_of(t->path) <= t->seen) return NULL;
    FILE *f = fopen(t->path, "re");
    const char *found = NULL;
    if (f && fseeko(f, t->seen, SEEK_SET) == 0)
        while (!found && next_line(f, t->line, sizeof t->line, &t->seen)) {
            const char *w = strncmp(t->line, "shoal", 5) == 0 ? strstr(t->line, ": warning: ") : NULL;
            if (w) found = w + 11;
        }
    if (f) fclose(f);
    return found;
}

/* mpirun says things in paragraphs between two rules: their lines belong together, up to a length one can read. */
static void join(const char *line, char *to, size_t size) {
    size_t n = strlen(to);
    bool gap = n > 0;
    for (const char *c = line; *c && n + 2 < size; c++) {
        if (*c == ' ') {
            gap = n > 0;
            continue;
        }
        if (gap) to[n++] = ' ';
        gap = false;
        to[n++] = *c;
    }
    to[n] = 0;
}

bool sh_logtail_reason(sh_logtail *t, bool errors_only, char *to, size_t size) {
    char line[1024];
    bool found = false, error = false, ruled = false, begun = false; /* ruled: between two rules; begun: and has text */
    off_t end = size_of(t->path), from = t->mark > end - REASON_BYTES ? t->mark : end - REASON_BYTES, at = from;
    FILE *f = fopen(t->path, "re");
    if (f && fseeko(f, from, SEEK_SET) == 0)
        while (next_line(f, line, sizeof line, &at)) {
            const char *e = strstr(line, "error: ");
            bool ours = strncmp(line, "shoal", 5) == 0 && e;
            if (!ours && (errors_only || error || !line[strspn(line, " ")])) continue;
            if (strspn(line, "-") > 20) {
                ruled = !ruled;
                begun = false;
                continue;
            }
            if (ruled && begun && !ours) {
                if (strlen(to) < PARAGRAPH) join(line, to, size);
                continue;
            }
            begun = ruled && !ours;
            const char *said = strncmp(line, "shoal ", 6) == 0 ? strstr(line, ": ") : NULL;
            snprintf(to, size, "%s", ours ? e + 7 : said ? said + 2 : line);
            found = true;
            error |= ours;
        }
    if (f) fclose(f);
    return found;
}
