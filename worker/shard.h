/*
 * A KV shard: the rows of one sequence for a range of layers, KV heads and positions, as bytes that describe
 * themselves and carry a checksum. Independent of the plan that made them: whoever has the same checkpoint, mode and KV
 * type can take them (docs/protocol.md, "KV shard"). Pure: it reads and writes memory, no pool and no link.
 */
#ifndef SH_WORKER_SHARD_H
#define SH_WORKER_SHARD_H

#include <stddef.h>
#include "model/config.h"

typedef struct sh_shard {
    uint64_t model; /* fingerprint of checkpoint, mode and KV type */
    uint64_t seq;
    sh_kv_type type;
    int32_t first, last; /* layers [first, last), all of one shape */
    int32_t head, heads; /* KV heads [head, head + heads) */
    int32_t head_dim;
    int32_t parts;       /* 2: K and V; 1: V alone, K is formed from it */
    int32_t pos, tokens; /* positions [pos, pos + tokens) */
    /* Where the rows belong, if whoever made the shard knew: the sequence's pages page0 … in the pool of who takes it.
     * They hold the positions; 0 pages: unknown. */
    int32_t page0, n_pages;
    const int32_t *pages; /* borrowed */
    /* Per layer and position: K of all heads, then V of all heads (V alone with one part), in the KV type. Borrowed. */
    const void *payload;
} sh_shard;

#define SH_SHARD_ALIGN 64 /* shards in a message or file begin at multiples of this, as payloads do within a shard */

/* Bytes of the payload, and of the whole shard. The fields must be in range (small, positive counts). */
size_t sh_shard_payload_bytes(const sh_shard *s);
size_t sh_shard_bytes(const sh_shard *s);
/* Writes everything but the payload to `to` (aligned to 8, room for sh_shard_bytes) and returns where that goes. */
void *sh_shard_begin(const sh_shard *s, void *to);
/* The payload is there: puts in the checksum of all of it. */
void sh_shard_seal(void *shard);
/* Reads the shard at data (aligned to 8), of len bytes or fewer: *used. Everything is checked, the checksum too;
 * SH_EFORMAT says what is wrong. *out borrows from data. */
sh_status sh_shard_open(const void *data, size_t len, sh_shard *out, size_t *used);
/* Whether a shard is of this model and its shape is that of its layers. SH_EFORMAT. */
sh_status sh_shard_check(const sh_shard *s, const sh_config *c, sh_kv_type type, uint64_t model);

#endif
