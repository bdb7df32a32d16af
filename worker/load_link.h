/*
 * Loading weights together over the link (model/peers.h, sh_load_peers): the members are all ranks of the group. Bytes
 * go from where the sender packed them to where the receiver will compute with them; nothing is copied between. At the
 * end each rank sends each other one word: that it has everything, or what it failed of.
 */
#ifndef SH_WORKER_LOAD_LINK_H
#define SH_WORKER_LOAD_LINK_H

#include "model/peers.h"
#include "worker/ranks.h"

typedef struct sh_load_link sh_load_link;

/* link and alive (may be NULL) are borrowed: for as long as the load link lives, which is until loading is over. */
sh_status sh_load_link_create(sh_link *link, const sh_alive *alive, sh_load_link **out);
void sh_load_link_destroy(sh_load_link **x);
sh_load_peers *sh_load_link_peers(sh_load_link *x);

#endif
