/* The ring of slices. See timeline.h. */
#include "common/timeline.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "common/mem.h"

struct sh_timeline {
    sh_slice *ring;
    size_t slices;
    uint64_t first, steps;
    /* the filling thread's own */
    size_t at; /* slices noted since creation, those of an open step included */
    bool on, in_step;
    /* of both: slices before `taken` are free again, those before `shown` can be taken */
    _Atomic size_t shown, taken;
    _Atomic uint64_t dropped;
};

sh_status sh_timeline_create(size_t slices, uint64_t first, uint64_t steps, sh_timeline **out) {
    sh_timeline *t = calloc(1, sizeof *t);
    void *ring = NULL;
    if (!t) SH_FAIL(SH_EMEMORY, "no memory for a timeline");
    t->slices = slices;
    t->first = first;
    t->steps = steps;
    t->on = first == 0 && steps > 0;
    sh_status st = sh_mem_alloc(slices * sizeof *t->ring, "timeline", &ring);
    t->ring = ring;
    if (st != SH_OK) {
        sh_timeline_destroy(&t);
        return st;
    }
    *out = t;
    return SH_OK;
}

void sh_timeline_destroy(sh_timeline **tp) {
    sh_timeline *t = *tp;
    if (!t) return;
    sh_mem_free(t->ring, t->slices * sizeof *t->ring);
    free(t);
    *tp = NULL;
}

/* --- filling -------------------------------------------------------------------------------------------------------
 */

static void show(sh_timeline *t) {
    if (!t->in_step) atomic_store_explicit(&t->shown, t->at, memory_order_release);
}

static void put(sh_timeline *t, const sh_slice *s) {
    if (t->at - atomic_load_explicit(&t->taken, memory_order_acquire) == t->slices) {
        atomic_fetch_add_explicit(&t->dropped, 1, memory_order_relaxed);
        return;
    }
    t->ring[t->at++ % t->slices] = *s;
    show(t);
}

void sh_timeline_begin(sh_timeline *t, uint64_t step) {
    if (!t) return;
    t->on = step >= t->first && step - t->first < t->steps;
    t->in_step = true;
}

bool sh_timeline_is_on(const sh_timeline *t) {
    return t && t->on;
}

void sh_timeline_note(sh_timeline *t, sh_slice_kind kind, double from, double to) {
    if (!t || !t->on) return;
    bool mine = t->at > atomic_load_explicit(&t->shown, memory_order_relaxed); /* nobody takes the last one yet */
    sh_slice *last = mine ? &t->ring[(t->at - 1) % t->slices] : NULL;
    if (last && last->kind == kind && last->to == from)
        last->to = to;
    else if (to - from >= SH_SLICE_LEAST)
        put(t, &(sh_slice){.from = from, .to = to, .kind = kind});
}

void sh_timeline_end(sh_timeline *t, double from, double to, const sh_slice_work *w) {
    if (!t) return;
    if (t->on) put(t, &(sh_slice){.from = from, .to = to, .kind = SH_SLICE_STEP, .work = *w});
    t->in_step = false;
    show(t);
}

void sh_timeline_queue(sh_timeline *t, double at, const sh_slice_work *w) {
    if (t && t->on) put(t, &(sh_slice){.from = at, .to = at, .kind = SH_SLICE_QUEUE, .work = *w});
}

/* --- emptying ------------------------------------------------------------------------------------------------------
 */

size_t sh_timeline_waiting(const sh_timeline *t) {
    if (!t) return 0;
    return atomic_load_explicit(&t->shown, memory_order_acquire) -
           atomic_load_explicit(&t->taken, memory_order_relaxed);
}

size_t sh_timeline_take(sh_timeline *t, sh_slice *to, size_t most) {
    size_t n = sh_timeline_waiting(t);
    if (n > most) n = most;
    if (n == 0) return 0;
    size_t from = atomic_load_explicit(&t->taken, memory_order_relaxed);
    for (size_t i = 0; i < n; i++) to[i] = t->ring[(from + i) % t->slices];
    atomic_store_explicit(&t->taken, from + n, memory_order_release);
    return n;
}

uint64_t sh_timeline_dropped(const sh_timeline *t) {
    return t ? atomic_load_explicit(&t->dropped, memory_order_relaxed) : 0;
}
