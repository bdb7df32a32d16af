/*
 * What a layer that is cut across ranks asks of the others. The model sees this table, never a rank; NULL means alone.
 * The members are filled by worker/ once expert and tensor parallelism exist; docs/decisions/0005 says what each will
 * carry.
 */
#ifndef SH_MODEL_PEERS_H
#define SH_MODEL_PEERS_H

#include <stdint.h>
#include "common/status.h"

/* What the members of a stage gather or add up in a layer. */
typedef enum sh_joint { SH_JOINT_HEADS, SH_JOINT_O, SH_JOINT_FF, SH_JOINT_DOWN, SH_JOINT_LOGITS } sh_joint;

typedef struct sh_peers {
    void *ctx;
    /* Every member has all rows and computes some columns of each: from mine [n, its columns] every member gets
     * all [n, total]. Who has which columns: sh_share_range (share.h) of `total` in units of `unit`. */
    sh_status (*gather)(void *ctx, int layer, sh_joint what, const float *mine, int n, int total, int unit, float *all);
    /* y [n, width] becomes the sum of the members' y, added in the order of members. Bytes depend on their number. */
    sh_status (*sum)(void *ctx, int layer, sh_joint what, float *y, int n, int width);
    /* Starts sending rows [n, hidden] to the owners of their chosen experts (ids [n, top_k]); returns at once. */
    void (*experts_begin)(void *ctx, int layer, const float *rows, const int32_t *ids, int n);
    /* Waits for one result row per chosen expert: [n, top_k, hidden]. */
    void (*experts_end)(void *ctx, int layer, float *results, int n);
} sh_peers;

#endif
