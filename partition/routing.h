/*
 * How often the router chose each expert of each layer: what ranks count (Shoal__Routing of proto/group.proto), what
 * --save-routing writes and --routing reads: {"experts": E, "layers": {"0": [E counts], …}}, layers without experts
 * left out. A guess of the traffic to come, nothing more: no result depends on it.
 */
#ifndef SH_PARTITION_ROUTING_H
#define SH_PARTITION_ROUTING_H

#include "common/buf.h"
#include "model/config.h"
#include "proto/group.pb-c.h"

typedef struct sh_routing {
    int layers, experts;
    uint64_t *chosen; /* [layers, experts] */
} sh_routing;

/* All zero. SH_EINPUT: the model has no experts. */
sh_status sh_routing_create(const sh_config *c, sh_routing **out);
void sh_routing_destroy(sh_routing **r);
static inline const uint64_t *sh_routing_of(const sh_routing *r, int layer) {
    return r->chosen + (size_t)layer * (size_t)r->experts;
}
/* Adds a rank's counts. SH_EFORMAT names what is not of this model; nothing was added then. */
sh_status sh_routing_add(sh_routing *r, const Shoal__Routing *m);
/* Appends a packed Shoal__Routing. */
sh_status sh_routing_pack(const sh_routing *r, sh_buf *to);
sh_status sh_routing_print(const sh_routing *r, sh_buf *to);
/* Errors name the file, the layer, the value and what is allowed. */
sh_status sh_routing_load(const char *path, const sh_config *c, sh_routing **out);

#endif
