/*
 * What a rank finds under the model's path. Ranks look at the path on their own nodes, so before they load anything
 * they compare: one that has other weights than the others would compute without complaint, and wrong.
 */
#ifndef SH_WORKER_SIGHT_H
#define SH_WORKER_SIGHT_H

#include <stdint.h>
#include "common/status.h"

typedef struct sh_sight {
    uint64_t weights; /* sh_weights_fingerprint */
    uint64_t config;  /* hash of config.json; 0: there is none */
    uint64_t index;   /* hash of a packed folder's index, which has the checksums of its files; else 0 */
    int32_t kind;     /* −1: a checkpoint; else a folder that is packed for this sh_wtype */
    char host[108];
} sh_sight;

/* Reads headers and a page of each tensor, or the index of a packed folder. */
sh_status sh_sight_take(const char *model_dir, sh_sight *out);
/* all [n]: those of all ranks. SH_EFORMAT, the same on all: some rank finds something else than rank 0; names both,
 * their nodes, the folder and what differs. */
sh_status sh_sight_compare(const char *model_dir, const sh_sight *all, int n);

#endif
