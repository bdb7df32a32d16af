/*
 * Rank-to-rank transport of one group: a table of functions with two members, link_mpi.c (the only file that sees MPI)
 * and link_local.c (ranks are threads of one process). Two-sided, non-blocking, explicit progress: nothing moves unless
 * somebody calls one of these. Messages between one pair with one tag arrive in the order sent. One thread per rank
 * uses its link. Not collective unless said.
 */
#ifndef SH_PROTO_LINK_H
#define SH_PROTO_LINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "common/status.h"

typedef enum sh_link_tag {
    SH_TAG_WEIGHTS = 0, /* while ranks load; on channel 1 words about them */
    SH_TAG_BATCH = 1,
    SH_TAG_TOKENS = 2,
    SH_TAG_CONTROL = 3,
    SH_TAG_EXPERTS = 4,
    SH_TAG_TENSOR = 5,
    SH_TAG_CONTEXT = 6,
    SH_TAG_SHARD = 7 /* K/V rows of prompts, and on channel 1 words about them */
} sh_link_tag;
#define SH_LINK_TAGS 8
/* A tag may have up to 100 channels, which messages pass each other on. */
static inline int sh_link_channel(sh_link_tag tag, int channel) {
    return (int)tag + SH_LINK_TAGS * channel;
}
#define SH_LINK_MAX_BYTES ((size_t)1 << 40)

typedef struct sh_link sh_link;
typedef struct sh_link_ops {
    const char *name;
    /* Starts sending; the bytes must stay until test says done. *req ≥ 0. At most SH_LINK_MAX_REQUESTS open. */
    sh_status (*send)(sh_link *l, int to, int tag, const void *p, size_t n, int *req);
    /* Progress; *done when the request's buffer is free again (the request is then closed). */
    sh_status (*test)(sh_link *l, int req, bool *done);
    /* If a message with this tag from `from` (−1: anyone) waits or is arriving: its source and length. */
    sh_status (*probe)(sh_link *l, int from, int tag, bool *found, int *source, size_t *len);
    /* Starts receiving the message just probed into p (len bytes); it is whole when test says done. */
    sh_status (*accept)(sh_link *l, int from, int tag, void *p, size_t len, int *req);
    /* Receives the message just probed into p (len bytes); returns when it is whole. */
    sh_status (*recv)(sh_link *l, int from, int tag, void *p, size_t len);
    sh_status (*barrier)(sh_link *l); /* Collective; for start-up and tests only */
    void (*destroy)(sh_link **l);
} sh_link_ops;
#define SH_LINK_MAX_REQUESTS 2048 /* sends and accepts */

struct sh_link {
    const sh_link_ops *ops;
    int rank, size;
    uint64_t sent_bytes, sent_messages;
    uint64_t sent_by_tag[SH_LINK_TAGS]; /* bytes, all channels of a tag together */
};
/* For transports: books a message of n bytes. */
static inline void sh_link_book(sh_link *l, int tag, size_t n) {
    l->sent_bytes += n;
    l->sent_messages++;
    if (tag >= 0) l->sent_by_tag[tag % SH_LINK_TAGS] += n;
}

/* Collective over the ranks of MPI_COMM_WORLD: initialises MPI (MPI_THREAD_FUNNELED). argc/argv may be NULL. */
sh_status sh_link_mpi_create(sh_link **out);
/* n connected ends for n threads of this process: out[0 … n−1]. */
sh_status sh_link_local_create(int n, sh_link **out);
static inline void sh_link_destroy(sh_link **l) {
    if (*l) (*l)->ops->destroy(l);
}

#endif
