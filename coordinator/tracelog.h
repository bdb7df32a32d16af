/*
 * What ranks tell of their time, kept for the supervisor of a run: TraceRecord messages of proto/group.proto, one after
 * the other in STORE/<epoch>/trace. Nothing depends on it: what cannot be written is warned of once, and no more is
 * kept. Says nothing of what the slices mean.
 */
#ifndef SH_COORDINATOR_TRACELOG_H
#define SH_COORDINATOR_TRACELOG_H

#include "coordinator/group.h"

#define SH_TRACE_FILE "trace"             /* in an epoch's folder */
#define SH_TRACE_MOST ((uint64_t)1 << 30) /* bytes of such a file */

typedef struct sh_tracelog sh_tracelog;

/* Makes no file before something is kept. */
sh_status sh_tracelog_create(const char *store, uint64_t epoch, sh_tracelog **out);
void sh_tracelog_destroy(sh_tracelog **t);
void sh_tracelog_keep(sh_tracelog *t, const sh_group *g, int rank, Shoal__Trace *trace);

#endif
