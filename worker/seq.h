/* One sequence in the leader's hands: its tokens so far, its place in the schedule and the KV pages it holds. */
#ifndef SH_WORKER_SEQ_H
#define SH_WORKER_SEQ_H

#include "model/batch.h"

typedef enum sh_seq_state {
    SH_SEQ_WAITING, /* holds no pages: not begun, or paused to be recomputed */
    SH_SEQ_RUNNING,
    SH_SEQ_DEAD /* finished or cancelled; kept until the micro-batches that carry it are back */
} sh_seq_state;

/* Pages of one pool: page[i] is the pool page that holds the sequence's page first + i, of those that belong there. */
typedef struct sh_seq_pages {
    int32_t first, n, cap;
    int32_t promise; /* pool pages set aside for the rest of the prompt */
    int32_t *page;   /* [cap] */
} sh_seq_pages;

/* Where a sequence stands in the tree of shared pages (worker/prefix.h), counted in pages from its start. */
typedef struct sh_seq_prefix {
    int32_t recorded; /* of its own pages these are in the tree */
    bool sealed;      /* no further ones will be */
    int32_t known;    /* its tokens were found so far … */
    int32_t node;     /* … up to this node … */
    uint64_t serial;  /* … if it is still the same */
    int32_t parts;    /* where it was seen to part from another; 0: nowhere */
    int32_t counted;  /* rows below were computed, or counted as shared */
} sh_seq_prefix;

typedef struct sh_seq {
    struct sh_seq *next;
    uint64_t key; /* the coordinator's number */
    uint64_t id;  /* the leader's: order of arrival, never reused */
    sh_sampling sampling;
    int32_t n_prompt;  /* tokens [0, n_prompt) are the prompt */
    int32_t n_tokens;  /* known so far: prompt and generated */
    int32_t cap;       /* n_prompt + max_tokens */
    int32_t *tokens;   /* [cap] */
    int32_t scored;    /* prompt tokens 1 … scored have their log-probability */
    int32_t pos;       /* rows of positions below are scheduled */
    int32_t flights;   /* micro-batches on their way that carry a span of it */
    bool sampling_now; /* its next token is on its way */
    bool started;      /* the last stage has (or will have, in order) its sampler state */
    sh_seq_state state;
    int32_t level;    /* of the blocks by which members share its positions out (model/owner.h) */
    int n_pools;      /* 0 until a leader has it */
    sh_seq_pages *kv; /* [n_pools] */
    sh_seq_prefix prefix;
    /* While a prefill pipeline makes its rows below n_tokens − 1 (worker/prefill.h); pos counts those. */
    bool handing;                   /* from its admission until all of them are in place, or given up and landed */
    bool damaged;                   /* some arrived damaged: made again once nothing of it is out */
    int32_t safe;                   /* rows below are in place */
    int32_t repeats;                /* how often in a row they were damaged */
    sh_seq_pages made[SH_KV_KINDS]; /* of the prefill pool */
} sh_seq;

/* A copy of a request as it arrives; `generated` are tokens of an earlier life. Numbers are checked: n_prompt ≥ 1, ids
 * within vocab, n_generated < max_tokens. */
sh_status sh_seq_create(uint64_t key, const int32_t *prompt, size_t n_prompt, const int32_t *generated,
                        size_t n_generated, const sh_sampling *sampling, int scored, int vocab, sh_seq **out);
void sh_seq_destroy(sh_seq **s);
/* Rows that are known and not scheduled: 1 in decode. */
static inline int32_t sh_seq_pending(const sh_seq *s) {
    return s->n_tokens - s->pos;
}

#endif
