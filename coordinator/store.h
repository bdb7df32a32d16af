/*
 * The store: jobs, request lines, token progress and results on disk, for one incarnation of the coordinator. The only
 * file that sees SQLite is store.c. docs/decisions/0007 says why it is made this way.
 *
 *     STORE/<epoch>/store.db     one file per incarnation; the epoch is claimed by mkdir
 *
 * An incarnation starts with a private copy of its predecessor's file and never writes in a folder that is not its own
 * (it removes those older than its predecessor's). Everything written belongs to one open transaction until
 * sh_store_commit; nothing may be acknowledged to anybody before that returned SH_OK: then it is synced, and no newer
 * incarnation had begun. Text returned through callbacks is borrowed until the callback returns. One thread.
 */
#ifndef SH_COORDINATOR_STORE_H
#define SH_COORDINATOR_STORE_H

#include <stdbool.h>
#include <stdint.h>
#include "common/buf.h"

typedef struct sh_store sh_store;

/* Claims the next epoch in `dir` (made if absent) and takes over what the highest older one holds. SH_EFORMAT: damaged;
 * SH_EIO: the disk refused; both name the file, and nothing was overwritten. */
sh_status sh_store_open(const char *dir, sh_store **out);
/* What was not committed is forgotten. */
void sh_store_close(sh_store **s);
uint64_t sh_store_epoch(const sh_store *s);
/* SH_ESTATE when a newer incarnation has claimed a higher epoch. */
sh_status sh_store_check_fence(const sh_store *s);
/* Makes all that was written durable, then checks the fence: SH_OK means it is safe to acknowledge. */
sh_status sh_store_commit(sh_store *s);
bool sh_store_is_dirty(const sh_store *s);
/* Writes `value` under `key`; once anything was computed, a different value fails with SH_EINPUT:
 * "STORE: KEY was A when this store began: it cannot go on with B". */
sh_status sh_store_pin(sh_store *s, const char *key, const char *value);
/* For tests of a full disk: the file may not grow beyond this many pages (4 KiB each). */
sh_status sh_store_limit(sh_store *s, int pages);

typedef enum sh_job_state {
    SH_JOB_RECEIVING,
    SH_JOB_RUNNING,
    SH_JOB_DONE,
    SH_JOB_CANCELLED,
    SH_JOB_FAILED
} sh_job_state;
const char *sh_job_state_name(sh_job_state s);

typedef struct sh_job {
    uint64_t id; /* from 1; 0: not stored yet */
    char *name;
    char *options; /* what decides the answers, as text: compared when the name is used again */
    sh_job_state state;
    bool closed;       /* all lines are there */
    uint64_t accepted; /* non-empty lines on disk */
    uint64_t last;     /* number of the last of them */
    uint64_t chain;    /* hash over all of them: sh_line_chain of proto/client.h */
    uint64_t done, errors, tokens_in, tokens_out;
    char *failure; /* why it cannot go on, or NULL */
} sh_job;

void sh_job_release(sh_job *j);
/* Inserts (id 0: gets one) or replaces. */
sh_status sh_store_job_put(sh_store *s, sh_job *j);
/* Calls with every job in order of id; the callback may keep the pointers of *j (it then owns them). */
typedef sh_status sh_job_fn(void *ctx, sh_job *j);
sh_status sh_store_jobs(sh_store *s, sh_job_fn *fn, void *ctx);

typedef struct sh_stored_request {
    uint64_t key; /* the store's number of the sequence; ascending, kept over incarnations */
    uint64_t job, number, hash;
    const char *custom_id; /* NULL: none that is usable */
    const char *line;
    size_t len;
    bool done;
    int kind;       /* how far its length is known, and … */
    int64_t length; /* … what it is expected to take: coordinator/tail.h; 0: not told */
} sh_stored_request;

/* Adds a line. *duplicate: the job has this custom_id already; the line is then stored without one. */
sh_status sh_store_request_add(sh_store *s, const sh_stored_request *r, uint64_t *key, bool *duplicate);
typedef sh_status sh_request_fn(void *ctx, const sh_stored_request *r);
/* The request with this key; *found false when there is none. */
sh_status sh_store_request_get(sh_store *s, uint64_t key, sh_request_fn *fn, void *ctx, bool *found);
/* Up to `most` unanswered requests with key > after, of one job or (0) of all that are not cancelled, in order of key.
 */
sh_status sh_store_pending(sh_store *s, uint64_t job, uint64_t after, int most, sh_request_fn *fn, void *ctx);

/* The key of the first of those requests behind `after`, and its job; *key 0: there is none. */
sh_status sh_store_front(sh_store *s, uint64_t after, uint64_t *key, uint64_t *job);
/* Of the unanswered requests of a job and kind whose length was told, in the order longest first, of equal ones by key:
 * the one behind (*length, *key). To begin with INT64_MAX, 0. *found false when there is none. */
sh_status sh_store_longest(sh_store *s, uint64_t job, int kind, int64_t *length, uint64_t *key, bool *found);
/* Calls with every kind that unanswered requests of a job have: the sum of their lengths and the longest. */
typedef void sh_lengths_fn(void *ctx, int kind, int64_t sum, int64_t longest);
sh_status sh_store_lengths(sh_store *s, uint64_t job, sh_lengths_fn *fn, void *ctx);

/* Token progress: packed Tokens messages of group.proto, by place. */
sh_status sh_store_progress_add(sh_store *s, uint64_t key, bool score, int32_t offset, const void *p, size_t n);
typedef sh_status sh_progress_fn(void *ctx, const void *p, size_t n);
sh_status sh_store_progress(sh_store *s, uint64_t key, sh_progress_fn *fn, void *ctx);

/* The one result of a request: marks it answered and drops its progress. *added false: it has one already. */
sh_status sh_store_result_add(sh_store *s, uint64_t key, uint64_t job, uint64_t number, const void *row, size_t n,
                              bool *added);
typedef struct sh_stored_result {
    uint64_t cursor, number;
    const void *row;
    size_t len;
} sh_stored_result;
/* The callback sets *stop to end early; the row it was called with then counts as not taken. */
typedef sh_status sh_result_fn(void *ctx, const sh_stored_result *r, bool *stop);
sh_status sh_store_results(sh_store *s, uint64_t job, uint64_t after, sh_result_fn *fn, void *ctx);

/* How often experts were chosen: a packed Routing message of group.proto for each rank that ever lived, under a name of
 * its own; the newest counts of a rank replace the older. */
sh_status sh_store_routing_put(sh_store *s, const char *rank, const void *p, size_t n);
sh_status sh_store_routing(sh_store *s, sh_progress_fn *fn, void *ctx);

#endif
