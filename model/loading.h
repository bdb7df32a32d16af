/*
 * How the loading of weights gets on: bytes of files, and the team's seconds by phase. Kept by weights*.c and
 * packed_load.c, told to whoever asked. Reads and packs nothing itself.
 *
 * Phases overlap, since each thread reads and packs its own pieces in turn: a phase's seconds are those that the
 * threads spent in it, divided by their number; exchange is the loading thread's. What is left of `seconds` is the
 * rest: headers, memory, and threads that wait for the slowest.
 */
#ifndef SH_MODEL_LOADING_H
#define SH_MODEL_LOADING_H

#include <stdint.h>
#include "common/clock.h"

typedef struct sh_load_times {
    uint64_t bytes, total; /* of the files: brought so far; in all (of a packed folder about so many until the end) */
    double seconds;        /* since loading began */
    double reading;        /* until bytes of the files were there: from storage, or mapped from the page cache */
    double packing;        /* rearranged, quantised or copied for the kernels */
    uint64_t received;     /* bytes of packed weights that other members sent */
    double exchange;       /* waiting for them, and sending to them, with nothing else to do */
} sh_load_times;

/* Called on the loading thread, at most ten times a second, and at the end. */
typedef void sh_load_told(void *arg, const sh_load_times *t);

typedef struct sh_loading {
    sh_load_told *tell; /* NULL: nobody asked */
    void *arg;
    int threads;
    uint64_t total;
    double began, told;
    uint64_t received; /* this and the next: the loading thread's */
    double exchange;
    _Atomic uint64_t bytes, reading, packing; /* nanoseconds of all threads together */
} sh_loading;

static inline void sh_loading_begin(sh_loading *l, int threads, sh_load_told *tell, void *arg) {
    *l = (sh_loading){.tell = tell, .arg = arg, .threads = threads, .began = sh_now()};
}

/* Seconds from `since` to `now` of a thread that works beside `size − 1` others. */
static inline uint64_t sh_loading_share(const sh_loading *l, double since, double now, int size) {
    return (uint64_t)((now - since) * 1e9 * l->threads / size);
}

static inline sh_load_times sh_loading_times(const sh_loading *l) {
    return (sh_load_times){.bytes = l->bytes,
                           .total = l->total,
                           .seconds = sh_now() - l->began,
                           .reading = 1e-9 * (double)l->reading / l->threads,
                           .packing = 1e-9 * (double)l->packing / l->threads,
                           .received = l->received,
                           .exchange = l->exchange};
}

/* The loading thread alone. */
static inline void sh_loading_tell(sh_loading *l, double now) {
    if (!l->tell || now - l->told < 0.1) return;
    l->told = now;
    sh_load_times t = sh_loading_times(l);
    l->tell(l->arg, &t);
}

static inline sh_load_times sh_loading_end(sh_loading *l) {
    l->total = l->bytes;
    sh_load_times t = sh_loading_times(l);
    if (l->tell) l->tell(l->arg, &t);
    return t;
}

#endif
