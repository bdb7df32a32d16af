/*
 * A request in hand: parsed, with its tokens so far. It exists from the moment the request is given to a group until
 * its result is in the store. Takes Tokens messages idempotently, keeps progress in the store, makes Work and the
 * result row.
 */
#ifndef SH_COORDINATOR_RUNNING_H
#define SH_COORDINATOR_RUNNING_H

#include "coordinator/intake.h"
#include "coordinator/results.h"
#include "coordinator/store.h"
#include "proto/group.pb-c.h"

/* Log-probabilities with alternatives, by place; the arrays exist only as far as the request asks for them. */
typedef struct sh_scores {
    float *logprob;
    int32_t *n_top;
    sh_top_logprob *top; /* [n][SH_MAX_TOP_LOGPROBS] */
    int32_t n, saved, cap;
} sh_scores;

typedef struct sh_running {
    struct sh_running *next; /* in its owner's hash chain */
    uint64_t key, job;
    uint64_t turn; /* how many were taken from the store before it */
    int group;     /* number of the group that has it; −1: none, waits to be given out */
    int meant;     /* number of the group that shall have it, as it idles; 0: any */
    /* about that group, and those before it */
    bool unproven, testing, moved; /* nothing came of it yet; it is a suspect there; it was taken over once */
    int lost, alone;               /* groups that ended in a row with it in hand and unproven; … when it was alone */
    bool convicted;                /* not given out any more: its error row comes when others show that groups work */
    uint64_t seen;                 /* convicted: what others had got done until then */
    char *fault;                   /* why the last of them ended, or NULL */
    sh_request request;
    sh_ids ids;       /* generated tokens */
    sh_scores tokens; /* of generated tokens; tokens.n == ids.n */
    sh_scores prompt; /* of prompt tokens 1 … prompt.n */
    sh_finish finish;
    int32_t text_len;
} sh_running;

/* Parses the line (as at intake) and takes up stored progress. */
sh_status sh_running_create(const sh_intake *in, sh_store *s, const sh_stored_request *r, sh_running **out);
void sh_running_destroy(sh_running **r);
/* Takes the places that are new; *added tokens. SH_EPEER: a gap, or numbers that cannot be; nothing was taken then. */
sh_status sh_running_take(sh_running *r, const Shoal__Tokens *t, int *added);
/* Writes what is not stored yet; *saved tokens. */
sh_status sh_running_save(sh_running *r, sh_store *s, int *saved);
static inline bool sh_running_is_saved(const sh_running *r) {
    return r->tokens.saved == r->tokens.n && r->prompt.saved == r->prompt.n;
}
/* Appends a packed ToRank with one Work. */
sh_status sh_running_work(const sh_running *r, sh_buf *to);
sh_status sh_running_row(const sh_running *r, const sh_intake *in, int64_t created, sh_buf *to);

#endif
