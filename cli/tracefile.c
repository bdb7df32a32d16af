/* Chrome's trace event format. See tracefile.h. */
#include "cli/tracefile.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "common/buf.h"
#include "common/file.h"
#include "common/json.h"
#include "common/timeline.h"
#include "coordinator/tracelog.h"

#define FLUSH_BYTES ((size_t)1 << 20)

static const char *const kind_names[SH_SLICE_KINDS] = {
    [SH_SLICE_STEP] = "step",         [SH_SLICE_WEIGHTS] = "weights",   [SH_SLICE_ATTENTION] = "attention",
    [SH_SLICE_EXPERTS] = "experts",   [SH_SLICE_EXCHANGE] = "exchange", [SH_SLICE_OTHER] = "other",
    [SH_SLICE_SAMPLING] = "sampling", [SH_SLICE_IDLE] = "idle",         [SH_SLICE_QUEUE] = "queue"};

typedef struct row { /* of a rank */
    char group[128];
    int process, rank;
    uint64_t dropped;
    int64_t clock_error;
} row;

typedef struct entry {
    int64_t start, length;
    int kind;
    const Shoal__TraceWork *work;
} entry;

struct sh_tracefile {
    sh_file_writer *file;
    int64_t zero;
    sh_buf text;
    bool any; /* an event was written */
    row *rows;
    int n_rows, cap_rows, processes;
    entry *entries; /* of the piece at hand */
    size_t cap_entries;
    sh_tracefile_count count;
};

/* --- options -------------------------------------------------------------------------------------------------------
 */

sh_status sh_trace_window(const char *text, uint64_t *first, uint64_t *steps) {
    unsigned long long a = 0, b = 0;
    int used = 0;
    bool digits = *text >= '0' && *text <= '9';
    if (!digits || strlen(text) > 30 || sscanf(text, "%llu:%llu%n", &a, &b, &used) != 2 || text[used] || a >= b ||
        strchr(text, '-'))
        SH_FAIL(SH_EINPUT, "--trace-steps: '%s': A:B with 0 ≤ A < B is allowed, such as 1000:1200", text);
    *first = a;
    *steps = b - a;
    return SH_OK;
}

sh_status sh_tracefile_check(const char *path) {
    struct stat sb;
    char folder[PATH_MAX];
    if ((size_t)snprintf(folder, sizeof folder, "%s", path) >= sizeof folder - 32)
        SH_FAIL(SH_EINPUT, "--trace: %.80s…: path too long", path);
    if (stat(path, &sb) == 0 && !S_ISREG(sb.st_mode))
        SH_FAIL(SH_EINPUT, "--trace: %s: is not a regular file: give a file", path);
    const char *dir = dirname(folder);
    if (stat(dir, &sb) != 0) SH_FAIL(SH_EINPUT, "--trace: %s: its folder: %s", path, strerror(errno));
    if (!S_ISDIR(sb.st_mode) || access(dir, W_OK | X_OK) != 0)
        SH_FAIL(SH_EINPUT, "--trace: %s: its folder cannot be written", path);
    sh_file_writer *w = NULL; /* what access(2) cannot know: a read-only or full file system */
    sh_status st = sh_file_writer_sweep(path);
    if (st == SH_OK) st = sh_file_writer_open(path, &w);
    sh_file_writer_destroy(&w);
    if (st == SH_OK) return SH_OK;
    char why[1024];
    snprintf(why, sizeof why, "%s", sh_error_text());
    SH_FAIL(SH_EINPUT, "--trace: %s", why);
}

/* --- text ----------------------------------------------------------------------------------------------------------
 */

static sh_status flush(sh_tracefile *t, size_t beyond) {
    if (t->text.len <= beyond) return SH_OK;
    SH_TRY(sh_file_writer_add(t->file, t->text.data, t->text.len));
    sh_buf_clear(&t->text);
    return SH_OK;
}

/* Every event begins with this. */
static sh_status begin(sh_tracefile *t) {
    SH_TRY(flush(t, FLUSH_BYTES));
    bool first = !t->any;
    t->any = true;
    return sh_buf_add_str(&t->text, first ? "\n" : ",\n");
}

/* A name of somebody else's choice, quoted. */
static sh_status add_name(sh_tracefile *t, const char *name) {
    json_t *j = json_string(name);
    char *s = j ? json_dumps(j, JSON_ENCODE_ANY) : NULL;
    sh_status st = sh_buf_add_str(&t->text, s ? s : "\"?\"");
    free(s);
    json_decref(j);
    return st;
}

static sh_status add_meta(sh_tracefile *t, const row *r, bool process, const char *name, int order) {
    const char *of = process ? "process" : "thread";
    SH_TRY(begin(t));
    SH_TRY(sh_buf_printf(&t->text, "{\"ph\":\"M\",\"pid\":%d,\"tid\":%d,\"name\":\"%s_name\",\"args\":{\"name\":",
                         r->process, process ? 0 : r->rank, of));
    SH_TRY(add_name(t, name));
    SH_TRY(sh_buf_add_str(&t->text, "}}"));
    SH_TRY(begin(t));
    return sh_buf_printf(&t->text,
                         "{\"ph\":\"M\",\"pid\":%d,\"tid\":%d,\"name\":\"%s_sort_index\",\"args\":{\"sort_index\":%d}}",
                         r->process, process ? 0 : r->rank, of, order);
}

/* Nanoseconds as the format's microseconds. */
static sh_status add_time(sh_tracefile *t, const char *key, int64_t ns) {
    return sh_buf_printf(&t->text, ",\"%s\":%s%" PRId64 ".%03d", key, ns < 0 ? "-" : "", (ns < 0 ? -ns : ns) / 1000,
                         (int)((ns < 0 ? -ns : ns) % 1000));
}

static sh_status add_queue(sh_tracefile *t, const row *r, const entry *e) {
    const Shoal__TraceWork *w = e->work;
    SH_TRY(begin(t));
    SH_TRY(sh_buf_printf(&t->text, "{\"ph\":\"C\",\"pid\":%d,\"name\":\"sequences\"", r->process));
    SH_TRY(add_time(t, "ts", e->start - t->zero));
    SH_TRY(sh_buf_printf(&t->text, ",\"args\":{\"running\":%d,\"waiting\":%d}}", w->decode, w->prompt));
    SH_TRY(begin(t));
    SH_TRY(sh_buf_printf(&t->text, "{\"ph\":\"C\",\"pid\":%d,\"name\":\"in flight\"", r->process));
    SH_TRY(add_time(t, "ts", e->start - t->zero));
    return sh_buf_printf(&t->text, ",\"args\":{\"micro-batches\":%d}}", w->rows);
}

static sh_status add_slice(sh_tracefile *t, const row *r, const entry *e) {
    const Shoal__TraceWork *w = e->work;
    if (e->kind == SH_SLICE_QUEUE) return add_queue(t, r, e);
    SH_TRY(begin(t));
    SH_TRY(sh_buf_printf(&t->text, "{\"ph\":\"X\",\"pid\":%d,\"tid\":%d,\"name\":\"%s", r->process, r->rank,
                         kind_names[e->kind]));
    SH_TRY(w ? sh_buf_printf(&t->text, " %" PRIu64 "\"", w->step) : sh_buf_add_str(&t->text, "\""));
    SH_TRY(add_time(t, "ts", e->start - t->zero));
    SH_TRY(add_time(t, "dur", e->length));
    t->count.slices++;
    t->count.steps += w != NULL;
    if (!w) return sh_buf_add_str(&t->text, "}");
    return sh_buf_printf(&t->text,
                         ",\"args\":{\"step\":%" PRIu64 ",\"rows\":%d,\"decode_rows\":%d,\"prompt_rows\":%d}}", w->step,
                         w->rows, w->decode, w->prompt);
}

/* --- pieces --------------------------------------------------------------------------------------------------------
 */

static sh_status name_row(sh_tracefile *t, const row *r, const Shoal__TraceRecord *m, bool new_group) {
    char name[400], stage[64], group[160];
    snprintf(stage, sizeof stage, m->width > 1 ? "stage %d member %d" : "stage %d", m->stage, m->member);
    snprintf(name, sizeof name, "rank %d: %s%s, %.250s", m->rank, m->prompts ? "prompts, " : "", stage, m->host);
    snprintf(group, sizeof group, "group %s", m->group);
    if (new_group) SH_TRY(add_meta(t, r, true, group, r->process));
    return add_meta(t, r, false, name, m->rank);
}

static sh_status find_row(sh_tracefile *t, const Shoal__TraceRecord *m, row **out) {
    int process = 0;
    for (int i = 0; i < t->n_rows; i++) {
        row *r = &t->rows[i];
        if (strcmp(r->group, m->group) != 0) continue;
        process = r->process;
        if (r->rank != m->rank) continue;
        *out = r;
        return SH_OK;
    }
    if (t->n_rows == t->cap_rows) {
        int cap = t->cap_rows ? 2 * t->cap_rows : 64;
        row *p = realloc(t->rows, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for the rows of a trace");
        t->rows = p;
        t->cap_rows = cap;
    }
    row *r = &t->rows[t->n_rows++];
    *r = (row){.rank = m->rank, .process = process ? process : ++t->processes};
    snprintf(r->group, sizeof r->group, "%s", m->group);
    *out = r;
    return name_row(t, r, m, process == 0);
}

/* What encloses another comes before it: viewers rely on it where both begin together. */
static int by_start(const void *a, const void *b) {
    const entry *x = a, *y = b;
    if (x->start != y->start) return x->start < y->start ? -1 : 1;
    if (x->length != y->length) return x->length > y->length ? -1 : 1;
    return (x->kind > y->kind) - (x->kind < y->kind);
}

static bool has_work(int kind) {
    return kind == SH_SLICE_STEP || kind == SH_SLICE_QUEUE;
}

static sh_status read_piece(sh_tracefile *t, const Shoal__TraceRecord *m) {
    const Shoal__Trace *x = m->trace;
    size_t works = 0;
    if (x->n_start != x->n_kind || x->n_length != x->n_kind)
        SH_FAIL(SH_EFORMAT, "trace of %s, rank %d: %zu kinds, %zu starts, %zu lengths", m->group, m->rank, x->n_kind,
                x->n_start, x->n_length);
    if (x->n_kind > t->cap_entries) {
        entry *p = realloc(t->entries, x->n_kind * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for %zu slices", x->n_kind);
        t->entries = p;
        t->cap_entries = x->n_kind;
    }
    int64_t at = x->origin;
    for (size_t i = 0; i < x->n_kind; i++) {
        int kind = x->kind[i];
        if (kind < 0 || kind >= SH_SLICE_KINDS || x->length[i] < 0 || (has_work(kind) && works == x->n_work))
            SH_FAIL(SH_EFORMAT, "trace of %s, rank %d: slice %zu of kind %d, %" PRId64 " ns", m->group, m->rank, i,
                    kind, x->length[i]);
        at += x->start[i];
        t->entries[i] = (entry){at, x->length[i], kind, has_work(kind) ? x->work[works++] : NULL};
    }
    qsort(t->entries, x->n_kind, sizeof *t->entries, by_start);
    return SH_OK;
}

sh_status sh_tracefile_add(sh_tracefile *t, const Shoal__TraceRecord *m) {
    row *r = NULL;
    SH_TRY(read_piece(t, m));
    SH_TRY(find_row(t, m, &r));
    r->dropped = m->trace->dropped;
    r->clock_error = m->trace->clock_error;
    for (size_t i = 0; i < m->trace->n_kind; i++) SH_TRY(add_slice(t, r, &t->entries[i]));
    return SH_OK;
}

sh_status sh_tracefile_open(const char *path, int64_t zero, sh_tracefile **out) {
    sh_tracefile *t = calloc(1, sizeof *t);
    if (!t) SH_FAIL(SH_EMEMORY, "%s: no memory for a trace", path);
    t->zero = zero;
    sh_buf_init(&t->text, 0);
    sh_status st = sh_file_writer_open(path, &t->file);
    if (st == SH_OK) st = sh_buf_add_str(&t->text, "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[");
    if (st != SH_OK) {
        sh_tracefile_destroy(&t);
        return st;
    }
    *out = t;
    return SH_OK;
}

/* What a viewer does not draw: how far to trust it. */
static sh_status add_end(sh_tracefile *t) {
    int64_t error = 0;
    for (int i = 0; i < t->n_rows; i++) {
        t->count.dropped += t->rows[i].dropped;
        if (t->rows[i].clock_error > error) error = t->rows[i].clock_error;
    }
    t->count.groups = t->processes;
    t->count.ranks = t->n_rows;
    SH_TRY(sh_buf_printf(&t->text, "\n],\"otherData\":{\"program\":\"shoal\",\"begins_unix_ns\":\"%" PRId64 "\"",
                         t->zero));
    SH_TRY(sh_buf_printf(&t->text, ",\"dropped_slices\":%" PRIu64, t->count.dropped));
    SH_TRY(add_time(t, "clock_error_us", error));
    return sh_buf_add_str(&t->text, "}}\n");
}

sh_status sh_tracefile_close(sh_tracefile **tp, sh_tracefile_count *out) {
    sh_tracefile *t = *tp;
    sh_status st = add_end(t);
    if (st == SH_OK) st = flush(t, 0);
    if (st == SH_OK) st = sh_file_writer_commit(&t->file);
    if (st == SH_OK) *out = t->count;
    sh_tracefile_destroy(tp);
    return st;
}

void sh_tracefile_destroy(sh_tracefile **tp) {
    sh_tracefile *t = *tp;
    if (!t) return;
    sh_file_writer_destroy(&t->file);
    sh_buf_release(&t->text);
    free(t->rows);
    free(t->entries);
    free(t);
    *tp = NULL;
}

/* --- a store -------------------------------------------------------------------------------------------------------
 */

typedef sh_status record_fn(void *ctx, const Shoal__TraceRecord *m);

static sh_status each_in_file(const char *path, record_fn *fn, void *ctx) {
    sh_map m;
    sh_status st = SH_OK;
    SH_TRY(sh_map_open(path, &m));
    for (size_t at = 0; st == SH_OK && m.len - at >= 4;) {
        const uint8_t *p = m.data + at;
        size_t n = (size_t)p[0] | (size_t)p[1] << 8 | (size_t)p[2] << 16 | (size_t)p[3] << 24;
        if (n > m.len - at - 4) break; /* its coordinator was killed while it wrote */
        Shoal__TraceRecord *r = shoal__trace_record__unpack(NULL, n, p + 4);
        if (!r) break;
        st = fn(ctx, r);
        shoal__trace_record__free_unpacked(r, NULL);
        at += 4 + n;
    }
    sh_map_close(&m);
    return st;
}

static int by_number(const void *a, const void *b) {
    unsigned long x = *(const unsigned long *)a, y = *(const unsigned long *)b;
    return (x > y) - (x < y);
}

static sh_status each_in_store(const char *store, record_fn *fn, void *ctx) {
    enum { MOST = 4096 };
    unsigned long epoch[MOST];
    int n = 0;
    DIR *d = opendir(store);
    if (!d) SH_FAIL(SH_EIO, "%s: cannot be read: %s", store, strerror(errno));
    for (struct dirent *e; n < MOST && (e = readdir(d));) {
        char *end;
        unsigned long v = *e->d_name >= '1' && *e->d_name <= '9' ? strtoul(e->d_name, &end, 10) : 0;
        if (v && !*end) epoch[n++] = v;
    }
    closedir(d);
    qsort(epoch, (size_t)n, sizeof *epoch, by_number);
    for (int i = 0; i < n; i++) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s/%lu/" SH_TRACE_FILE, store, epoch[i]);
        if (sh_file_exists(path)) SH_TRY(each_in_file(path, fn, ctx));
    }
    return SH_OK;
}

static sh_status find_zero(void *ctx, const Shoal__TraceRecord *m) {
    int64_t *zero = ctx, at = m->trace->origin;
    for (size_t i = 0; i < m->trace->n_start; i++) {
        at += m->trace->start[i];
        if (at < *zero) *zero = at;
    }
    return SH_OK;
}

static sh_status add_record(void *ctx, const Shoal__TraceRecord *m) {
    sh_tracefile *t = ctx;
    sh_status st = sh_tracefile_add(t, m);
    if (st != SH_EFORMAT) return st;
    t->count.dropped += m->trace->n_kind; /* a rank of another build */
    return SH_OK;
}

sh_status sh_tracefile_of_store(const char *store, const char *path, sh_tracefile_count *out) {
    int64_t zero = INT64_MAX;
    sh_tracefile *t = NULL;
    SH_TRY(each_in_store(store, find_zero, &zero));
    SH_TRY(sh_tracefile_open(path, zero == INT64_MAX ? 0 : zero, &t));
    sh_status st = each_in_store(store, add_record, t);
    if (st == SH_OK) return sh_tracefile_close(&t, out);
    sh_tracefile_destroy(&t);
    return st;
}
