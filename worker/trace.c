/* Slices to messages. See trace.h. */
#include "worker/trace.h"

#include <math.h>
#include <stdlib.h>

#include "common/mem.h"

struct sh_trace {
    sh_timeline *timeline;
    sh_rank_clock clock;
    uint64_t lost;
    Shoal__Trace message;
    sh_slice slice[SH_TRACE_PIECE];
    int32_t kind[SH_TRACE_PIECE];
    int64_t start[SH_TRACE_PIECE], length[SH_TRACE_PIECE];
    Shoal__TraceWork work[SH_TRACE_PIECE], *works[SH_TRACE_PIECE];
};

sh_status sh_trace_create(sh_timeline *t, sh_rank_clock clock, sh_trace **out) {
    void *p = NULL;
    SH_TRY(sh_mem_alloc(sizeof(sh_trace), "trace", &p));
    sh_trace *x = p;
    x->timeline = t;
    x->clock = clock;
    *out = x;
    return SH_OK;
}

void sh_trace_destroy(sh_trace **x) {
    sh_mem_free(*x, sizeof **x);
    *x = NULL;
}

bool sh_trace_is_full(const sh_trace *x) {
    return sh_timeline_waiting(x->timeline) >= SH_TRACE_PIECE;
}

static int64_t nanoseconds(double seconds) {
    return llround(seconds * 1e9);
}

static void add_work(sh_trace *x, Shoal__Trace *m, const sh_slice_work *w) {
    Shoal__TraceWork *to = &x->work[m->n_work];
    shoal__trace_work__init(to);
    to->step = w->step;
    to->rows = w->rows;
    to->decode = w->decode;
    to->prompt = w->prompt;
    x->works[m->n_work++] = to;
}

Shoal__Trace *sh_trace_next(sh_trace *x) {
    size_t n = sh_timeline_take(x->timeline, x->slice, SH_TRACE_PIECE);
    Shoal__Trace *m = &x->message;
    shoal__trace__init(m);
    m->n_kind = m->n_start = m->n_length = n;
    if (n == 0) return NULL;
    m->kind = x->kind, m->start = x->start, m->length = x->length, m->work = x->works;
    int64_t before = nanoseconds(x->slice[0].from);
    m->origin = before + x->clock.offset;
    for (size_t i = 0; i < n; i++) {
        const sh_slice *s = &x->slice[i];
        int64_t from = nanoseconds(s->from);
        x->kind[i] = (int32_t)s->kind;
        x->start[i] = from - before;
        x->length[i] = nanoseconds(s->to) - from;
        before = from;
        if (s->kind == SH_SLICE_STEP || s->kind == SH_SLICE_QUEUE) add_work(x, m, &s->work);
    }
    m->has_dropped = m->has_clock_error = true;
    m->dropped = sh_timeline_dropped(x->timeline) + x->lost;
    m->clock_error = x->clock.error;
    return m;
}

void sh_trace_lost(sh_trace *x) {
    x->lost += x->message.n_kind;
}
