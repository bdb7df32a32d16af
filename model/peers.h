/*
 * What a layer that is cut across the members of a stage asks of the others. The model sees these tables, never a rank;
 * NULL means alone. worker/ fills them; docs/decisions/0005 says why nothing that crosses can change a bit.
 */
#ifndef SH_MODEL_PEERS_H
#define SH_MODEL_PEERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "common/status.h"

/* Rows that another member sent because they chose experts of this one. Rows and results are as they travel: f32 in
 * exact mode, else bf16. */
typedef struct sh_expert_guest {
    int n_rows, n_choices;
    const uint16_t (*choice)[2]; /* [n_choices]: row, expert; rows ascend */
    const void *rows;            /* [n_rows, hidden] */
    void *results;               /* [n_choices, hidden]: to be filled */
} sh_expert_guest;

#define SH_EXPERT_SLOTS 2 /* exchanges under way at once */

/*
 * Experts that other members hold. One exchange is one part of a step's rows in one layer: begin sends rows to the
 * members that hold their chosen experts, guests waits for the others' rows, reply sends their results, end waits for
 * the own ones. Every member of the stage makes the same exchanges in the same order, with 0 rows too. Each slot takes
 * one exchange at a time; an earlier failure of progress is told by the next call.
 */
typedef struct sh_expert_peers {
    void *ctx;
    int members;    /* of the stage, this one included */
    int part_rows;  /* most rows of a part: what the buffers hold */
    int split_rows; /* a step in which some member has this many rows is cut into parts that overlap */
    /* Whether this member computes an expert of a layer. */
    bool (*holds)(const void *ctx, int layer, int expert);
    /* rows [n, hidden] as they travel, ids [n, top_k]. answer [n, top_k]: for a choice that another member computes the
     * place where its result will be after end; NULL where this member does. Copies what it sends. */
    sh_status (*begin)(void *ctx, int slot, int layer, const void *rows, const int32_t *ids, int n,
                       const void **answer);
    /* Borrowed until reply. */
    sh_status (*guests)(void *ctx, int slot, const sh_expert_guest **guests, int *n);
    sh_status (*reply)(void *ctx, int slot);
    sh_status (*end)(void *ctx, int slot);
    void (*poll)(void *ctx); /* progress; cheap */
} sh_expert_peers;

/* What the members of a stage gather or add up in a layer. */
typedef enum sh_joint { SH_JOINT_HEADS, SH_JOINT_O, SH_JOINT_FF, SH_JOINT_DOWN } sh_joint;

/* Messages between `members` ranks that share the rows of every micro-batch and the K/V of global layers
 * (docs/decisions/0016); this is `member` of them. All of them run the same micro-batches in the same order, so both
 * ends of a message know when it comes and how long it is. */
typedef struct sh_context_peers {
    void *ctx;
    int members, member;
    /* Room for a message of n bytes to a member, 64-byte aligned; waits until an earlier one is gone. */
    sh_status (*room)(void *ctx, int to, size_t n, void **room);
    /* Starts sending what was put into that room; returns at once. */
    sh_status (*send)(void *ctx, int to);
    /* Waits for the next message of a member, which must have n bytes; borrowed until the next from the same one. */
    sh_status (*take)(void *ctx, int from, size_t n, const void **data);
} sh_context_peers;

/*
 * Members that load their weights together (docs/decisions/0033): what several of them need one reads and packs, and
 * sends to the others where it lies. All of them derive from the same list who sends what to whom and in which order,
 * so both ends of a message know how long it is and where it goes.
 */
typedef struct sh_load_peers {
    void *ctx;
    int members, member;
    uint64_t received; /* bytes of weights that have come so far */
    /* Collective: all [members][n] gets everybody's n bytes. */
    sh_status (*gather)(void *ctx, const void *mine, size_t n, void *all);
    /* Starts sending n bytes, n > 0, which stay as they are until finish or stop; may wait for earlier ones. */
    sh_status (*send)(void *ctx, int to, const void *p, size_t n);
    /* The next bytes of a member that have no place yet are n and go to p, by the time that finish returns. */
    sh_status (*expect)(void *ctx, int from, void *p, size_t n);
    /* Progress; cheap. Fails when a member has failed, with its status, its rank and text. So do send
     * and finish. */
    sh_status (*poll)(void *ctx);
    /* Waits until all that was sent and expected is where it belongs, and all members are as far. */
    sh_status (*finish)(void *ctx);
    /* Instead of finish after a failure st with its error text, this member's or one that it was told of: tells the
     * others, and waits until nobody reads this member's memory any more. False: somebody may, later. */
    bool (*stop)(void *ctx, sh_status st);
} sh_load_peers;

typedef struct sh_peers {
    void *ctx;
    /* Every member has all rows and computes some columns of each: from mine [n, its columns] every member gets
     * all [n, total]. Who has which columns: sh_share_range (share.h) of `total` in units of `unit`. */
    sh_status (*gather)(void *ctx, int layer, sh_joint what, const float *mine, int n, int total, int unit, float *all);
    /* y [n, width] becomes the sum of the members' y, added in the order of members. Bytes depend on their number. */
    sh_status (*sum)(void *ctx, int layer, sh_joint what, float *y, int n, int width);
    const sh_expert_peers *experts;  /* NULL: every expert is here */
    const sh_context_peers *context; /* NULL: all rows and positions are here */
    /* The K/V rows of the batch at hand are all in the pages of `layer`. Optional. */
    sh_status (*kv_written)(void *ctx, int layer);
} sh_peers;

#endif
