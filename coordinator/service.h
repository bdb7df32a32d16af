/* The job interface, coordinator's side: one JobRequest → one JobReply. Replies that acknowledge something are held
 * back until the loop has committed. */
#ifndef SH_COORDINATOR_SERVICE_H
#define SH_COORDINATOR_SERVICE_H

#include "coordinator/dispatch.h"

#define SH_RESULTS_BYTES ((size_t)4 << 20) /* rows of one reply, unless a single one is longer */
#define SH_RESULTS_ROWS  10000

typedef struct sh_service sh_service;

sh_status sh_service_create(sh_store *s, sh_jobs *jobs, sh_dispatch *d, sh_wire *wire, bool run, sh_service **out);
void sh_service_destroy(sh_service **v);
/* One message of a client. What is wrong with it is told to the client; failures are the store's. */
sh_status sh_service_hear(sh_service *v, const sh_wire_peer *from, const void *p, size_t n);
bool sh_service_has_replies(const sh_service *v); /* held back */
/* Sends what was held back. */
sh_status sh_service_after_commit(sh_service *v);
bool sh_service_must_end(const sh_service *v); /* a shutdown was asked for */

#endif
