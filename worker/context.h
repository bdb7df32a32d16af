/*
 * Messages between the members of a stage that share positions out (model/peers.h, context part; what is in them:
 * model/spread.h). Carried by the link with a header that both ends check. All buffers are made at creation.
 */
#ifndef SH_WORKER_CONTEXT_H
#define SH_WORKER_CONTEXT_H

#include "model/peers.h"
#include "proto/link.h"

typedef struct sh_context sh_context;

/* Members are ranks [first, first + members) of the link (borrowed), this one among them. bytes: of the longest
 * message. */
sh_status sh_context_create(sh_link *link, int first, int members, size_t bytes, sh_context **out);
void sh_context_destroy(sh_context **c); /* when it is idle: the link reads its buffers until then */
const sh_context_peers *sh_context_table(const sh_context *c); /* for the model; good as long as the context */
/* Progress of sends. */
sh_status sh_context_progress(sh_context *c);
bool sh_context_is_idle(const sh_context *c); /* no send is open */

#endif
