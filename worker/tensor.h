/*
 * Tensor parallel: what the members of a stage that divide heads and columns tell each other in a layer, over the link
 * between ranks. Fills the members gather and sum of sh_peers (model/peers.h). All members call the same exchanges in
 * the same order; each message says which one it belongs to, and one that does not fit is an error. Exchanges return
 * when everything has come and everything sent has left, so that nobody waits for a rank that computes: links make no
 * progress by themselves. All buffers are made at creation. Traffic: docs/decisions/0015.
 */
#ifndef SH_WORKER_TENSOR_H
#define SH_WORKER_TENSOR_H

#include "model/config.h"
#include "model/peers.h"
#include "proto/link.h"

typedef struct sh_tensor_link sh_tensor_link;

typedef struct sh_tensor_options {
    sh_link *link;           /* borrowed */
    int first_rank;          /* of member 0; member m is rank first_rank + m */
    sh_share share;          /* parts ≥ 2 */
    const sh_config *config; /* of the whole model; used at creation */
    int max_rows;            /* of one exchange */
} sh_tensor_options;

/* Not collective. */
sh_status sh_tensor_link_create(const sh_tensor_options *o, sh_tensor_link **out);
void sh_tensor_link_destroy(sh_tensor_link **t);
const sh_peers *sh_tensor_link_peers(sh_tensor_link *t);

#endif
