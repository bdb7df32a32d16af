/*
 * What a layer that is cut across ranks asks of the others. The model sees this table, never a rank; NULL means alone.
 * The members are filled by worker/ once expert and tensor parallelism exist; docs/decisions/0005 says what each will
 * carry.
 */
#ifndef SH_MODEL_PEERS_H
#define SH_MODEL_PEERS_H

#include <stddef.h>
#include <stdint.h>
#include "common/status.h"

typedef struct sh_peers {
    void *ctx;
    /* Starts sending rows [n, hidden] to the owners of their chosen experts (ids [n, top_k]); returns at once. */
    void (*experts_begin)(void *ctx, int layer, const float *rows, const int32_t *ids, int n);
    /* Waits for one result row per chosen expert: [n, top_k, hidden]. */
    void (*experts_end)(void *ctx, int layer, float *results, int n);

    /* Context parallel (docs/decisions/0016): context_members ranks share the rows of every micro-batch and the K/V of
     * global layers; this is context_member of them. 0: not so. All of them run the same micro-batches in the same
     * order, so both ends of a message know when it comes and how long it is. */
    void *context;
    int context_members, context_member;
    /* Room for a message of n bytes to a member; waits until an earlier one is gone. 64-byte aligned. */
    sh_status (*context_room)(void *context, int to, size_t n, void **room);
    /* Starts sending what was put into that room; returns at once. */
    sh_status (*context_send)(void *context, int to);
    /* Waits for the next message of a member, which must have n bytes; borrowed until the next from the same one. */
    sh_status (*context_take)(void *context, int from, size_t n, const void **data);
} sh_peers;

#endif
