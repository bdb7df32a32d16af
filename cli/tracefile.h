/*
 * A timeline as a file: JSON in Chrome's trace event format, which Perfetto and chrome://tracing open. One process row
 * per group, one thread row per rank, a slice per micro-batch with its causes inside. Made of what ranks sent (worker/
 * trace.h), piece by piece: memory does not grow with the file.
 */
#ifndef SH_CLI_TRACEFILE_H
#define SH_CLI_TRACEFILE_H

#include "common/status.h"
#include "proto/group.pb-c.h"

/* "A:B" → steps A to B − 1. */
sh_status sh_trace_window(const char *text, uint64_t *first, uint64_t *steps);
/* Whether PATH can become such a file; asked before work begins. */
sh_status sh_tracefile_check(const char *path);

typedef struct sh_tracefile_count {
    uint64_t steps, slices, dropped; /* of all ranks together */
    int groups, ranks;
} sh_tracefile_count;

typedef struct sh_tracefile sh_tracefile;
/* zero: ns since 1970 that the file counts from. */
sh_status sh_tracefile_open(const char *path, int64_t zero, sh_tracefile **out);
/* Pieces of a rank in order. SH_EFORMAT: not a piece that a rank makes; the file goes on without it. */
sh_status sh_tracefile_add(sh_tracefile *t, const Shoal__TraceRecord *r);
/* The file appears under its name. Always frees. */
sh_status sh_tracefile_close(sh_tracefile **t, sh_tracefile_count *out);
void sh_tracefile_destroy(sh_tracefile **t); /* gives up */

/* The whole of what the coordinators of a store kept (coordinator/tracelog.h), a record that is cut off left out. */
sh_status sh_tracefile_of_store(const char *store, const char *path, sh_tracefile_count *out);

#endif
