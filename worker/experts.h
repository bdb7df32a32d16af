/*
 * The exchange of expert parallelism: the members of a stage send each other rows for the experts that they hold and
 * get results back. Implements sh_expert_peers (model/peers.h) over a link; the model computes. What travels, and why
 * it is rows and not sums: docs/decisions/0013; the bytes: docs/protocol.md. All buffers are made at creation.
 */
#ifndef SH_WORKER_EXPERTS_H
#define SH_WORKER_EXPERTS_H

#include "model/config.h"
#include "common/timeline.h"
#include "model/peers.h"
#include "proto/link.h"

typedef struct sh_experts sh_experts;

typedef struct sh_experts_options {
    sh_link *link;  /* borrowed */
    int first_rank; /* of the stage: member m is rank first_rank + m */
    int members, member;
    const sh_config *config; /* borrowed */
    int first, last;         /* layers of the stage */
    sh_mode mode;
    int max_rows;   /* of a member's micro-batch */
    int split_rows; /* from how many rows on a step is cut into parts that overlap; 0: SH_EXPERTS_SPLIT_ROWS */
    /* Who computes what; asked at creation only. Every expert has at least one member, the same answer on all. */
    bool (*holds)(const void *arg, int member, int layer, int expert);
    const void *arg;
    sh_timeline *timeline; /* waiting as slices; NULL: off */
} sh_experts_options;

/* Half of it is enough for matrix products to be bound by arithmetic, so that cutting a step costs next to nothing;
 * with fewer rows weights would be read twice to hide a wait that is shorter. */
#define SH_EXPERTS_SPLIT_ROWS 128

/* Not collective, but every member creates its own with the same options. */
sh_status sh_experts_create(const sh_experts_options *o, sh_experts **out);
void sh_experts_destroy(sh_experts **e);
/* For sh_model_options; valid for the life of e. */
const sh_expert_peers *sh_experts_peers(const sh_experts *e);
bool sh_experts_is_idle(const sh_experts *e); /* no message of its own is under way */

/* Seconds since creation, by kind of layer. */
typedef struct sh_experts_times {
    double exposed[SH_KV_KINDS]; /* waited for rows or results with nothing else to do */
    double travel[SH_KV_KINDS];  /* from sending rows or results to having the others': what could be exposed */
} sh_experts_times;
sh_experts_times sh_experts_time(const sh_experts *e);

#endif
