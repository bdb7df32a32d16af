/*
 * Where the time of one thread goes, slice by slice: a ring that it fills and another thread empties. Room is made at
 * creation; nothing waits or allocates afterwards, and a slice that finds no room is dropped and counted. Records the
 * steps of a window alone. Knows no file format: cli/tracefile.c writes what was taken.
 *
 * A step's slice is noted at its end, after the slices within it; whoever takes gets whole steps. Slices of one
 * timeline nest or are apart, as the code does that notes them. A NULL timeline is off: every function takes it.
 */
#ifndef SH_COMMON_TIMELINE_H
#define SH_COMMON_TIMELINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "common/status.h"

#define SH_SLICE_LEAST 0.25e-6 /* seconds */

typedef enum sh_slice_kind { /* numbers go into messages: append only */
                             SH_SLICE_STEP,
                             SH_SLICE_WEIGHTS,
                             SH_SLICE_ATTENTION,
                             SH_SLICE_EXPERTS,
                             SH_SLICE_EXCHANGE,
                             SH_SLICE_OTHER,
                             SH_SLICE_SAMPLING,
                             SH_SLICE_IDLE,
                             SH_SLICE_QUEUE, /* no time: how much is in hand at `from` */
                             SH_SLICE_KINDS
} sh_slice_kind;

/* What a STEP computed, or what a QUEUE holds; else zeros. */
typedef struct sh_slice_work {
    uint64_t step;
    int32_t rows;   /* of the micro-batch; QUEUE: micro-batches in flight */
    int32_t decode; /* of them rows that continue a sequence; QUEUE: sequences that run */
    int32_t prompt; /* of them rows of prompts; QUEUE: sequences that wait */
} sh_slice_work;

typedef struct sh_slice {
    double from, to; /* sh_now() */
    sh_slice_kind kind;
    sh_slice_work work;
} sh_slice;

typedef struct sh_timeline sh_timeline;

/* Room for `slices` at a time; steps [first, first + steps) are recorded, and what happens between them. */
sh_status sh_timeline_create(size_t slices, uint64_t first, uint64_t steps, sh_timeline **out);
void sh_timeline_destroy(sh_timeline **t);

/* --- the thread that fills --- */
void sh_timeline_begin(sh_timeline *t, uint64_t step); /* a step begins: in the window or not */
bool sh_timeline_is_on(const sh_timeline *t);
/* One that goes on where the last one of its kind ended becomes one with it. Shorter ones than SH_SLICE_LEAST are left
 * out. */
void sh_timeline_note(sh_timeline *t, sh_slice_kind kind, double from, double to);
void sh_timeline_end(sh_timeline *t, double from, double to, const sh_slice_work *w); /* the step of the last begin */
void sh_timeline_queue(sh_timeline *t, double at, const sh_slice_work *w);

/* --- the thread that empties --- */
size_t sh_timeline_waiting(const sh_timeline *t); /* slices that can be taken */
size_t sh_timeline_take(sh_timeline *t, sh_slice *to, size_t most);
uint64_t sh_timeline_dropped(const sh_timeline *t); /* since creation */

#endif
