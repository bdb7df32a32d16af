/* Appends pieces of timelines to a file. See tracelog.h. */
#include "coordinator/tracelog.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/file.h"
#include "common/log.h"
#include "proto/group.pb-c.h"

struct sh_tracelog {
    char path[PATH_MAX];
    int fd; /* −1: not made yet */
    uint64_t bytes;
    bool over; /* nothing more is kept */
    sh_buf buf;
};

sh_status sh_tracelog_create(const char *store, uint64_t epoch, sh_tracelog **out) {
    sh_tracelog *t = calloc(1, sizeof *t);
    if (!t) SH_FAIL(SH_EMEMORY, "no memory for a trace");
    snprintf(t->path, sizeof t->path, "%s/%" PRIu64 "/" SH_TRACE_FILE, store, epoch);
    t->fd = -1;
    sh_buf_init(&t->buf, 0);
    *out = t;
    return SH_OK;
}

void sh_tracelog_destroy(sh_tracelog **tp) {
    sh_tracelog *t = *tp;
    if (!t) return;
    if (t->fd >= 0) close(t->fd);
    sh_buf_release(&t->buf);
    free(t);
    *tp = NULL;
}

static sh_status pack(sh_tracelog *t, const Shoal__TraceRecord *m) {
    uint32_t n = (uint32_t)shoal__trace_record__get_packed_size(m);
    const uint8_t head[4] = {(uint8_t)n, (uint8_t)(n >> 8), (uint8_t)(n >> 16), (uint8_t)(n >> 24)};
    sh_buf_clear(&t->buf);
    SH_TRY(sh_buf_add(&t->buf, head, sizeof head));
    SH_TRY(sh_buf_reserve(&t->buf, n));
    t->buf.len += shoal__trace_record__pack(m, t->buf.data + t->buf.len);
    return SH_OK;
}

static sh_status append(sh_tracelog *t) {
    if (t->bytes + t->buf.len > SH_TRACE_MOST)
        SH_FAIL(SH_ELIMIT, "%s: %" PRIu64 " bytes of timelines are the limit: ask for fewer steps", t->path,
                SH_TRACE_MOST);
    if (t->fd < 0) t->fd = open(t->path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (t->fd < 0) SH_FAIL(SH_EIO, "%s: cannot be created: %s", t->path, strerror(errno));
    for (size_t at = 0; at < t->buf.len;) {
        ssize_t n = sh_file_ops.write(t->fd, t->buf.data + at, t->buf.len - at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) SH_FAIL(SH_EIO, "%s: cannot be written: %s", t->path, n < 0 ? strerror(errno) : "no progress");
        at += (size_t)n;
    }
    t->bytes += t->buf.len;
    return SH_OK;
}

void sh_tracelog_keep(sh_tracelog *t, const sh_group *g, int rank, Shoal__Trace *trace) {
    if (t->over) return;
    sh_plan_shape shape = sh_plan_shape_of(g->plan);
    Shoal__TraceRecord m = SHOAL__TRACE_RECORD__INIT;
    m.group = (char *)(uintptr_t)g->name;
    m.rank = rank;
    m.host = (char *)(uintptr_t)g->seat[rank].host;
    m.prompts = rank >= shape.decode;
    m.width = m.prompts ? 1 : shape.width;
    m.stage = (m.prompts ? rank - shape.decode : rank) / m.width;
    m.member = rank % m.width;
    m.trace = trace;
    sh_status st = pack(t, &m);
    if (st == SH_OK) st = append(t);
    if (st == SH_OK) return;
    t->over = true;
    sh_warn("the trace ends here: %s", sh_error_text());
}
