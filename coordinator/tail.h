/*
 * The end of a job: which of its requests goes next. Pure; the store sorts, dispatch gives out.
 *
 * A job ends with its last sequence. When one that generates long is begun last, a group runs almost empty for all its
 * length. So requests go in the order of their lines, until what waits would be worked off in SH_TAIL_ROUNDS times what
 * its longest one takes; from there on the longest goes first. Only where all lines of the job are known.
 *
 * A length is in tokens to generate; a prompt counts too. It is a bound where a request may stop by itself: requests of
 * a kind take the same share of theirs as those that ended did. docs/decisions/0035 has the reasons.
 */
#ifndef SH_COORDINATOR_TAIL_H
#define SH_COORDINATOR_TAIL_H

#include "coordinator/intake.h"

#define SH_TAIL_ROUNDS 2
#define SH_TAIL_PROMPT 64 /* prompt tokens that take about as long as one that is generated */
/* Requests of a kind that must have ended before their share is believed; until then it is 1. */
#define SH_TAIL_SEEN 16

typedef enum sh_tail_kind {
    SH_TAIL_FIXED,   /* generates max_tokens whatever comes */
    SH_TAIL_LIMITED, /* may stop before max_tokens, which the request or the job names */
    SH_TAIL_OPEN,    /* … which nobody named: it is what the context leaves */
    SH_TAIL_KINDS
} sh_tail_kind;

typedef struct sh_tail {
    int64_t waits[SH_TAIL_KINDS];   /* sum of the lengths of requests that nobody took from the store yet */
    int64_t longest[SH_TAIL_KINDS]; /* of all that there ever were */
    struct {
        int64_t length;
        uint64_t key;      /* 0: before the first */
        bool none;         /* behind the last */
    } next[SH_TAIL_KINDS]; /* the longest of those; where not, that is found out when it is looked at */
    struct {
        int64_t took, length; /* of requests that ended: tokens made, and lengths; sums */
        int64_t n;
    } ended[SH_TAIL_KINDS];
} sh_tail;

void sh_tail_init(sh_tail *t);
/* What is known of a request that can run. */
sh_tail_kind sh_tail_kind_of(const sh_request *r);
/* ≥ 1; up to an eighth too long, so that there are few different ones. */
int64_t sh_tail_length_of(const sh_request *r);
/* A sum over requests of a kind that wait, and the longest of them: more of them are there. */
void sh_tail_add(sh_tail *t, int kind, int64_t sum, int64_t longest);
/* A request was taken from the store. */
void sh_tail_take(sh_tail *t, int kind, int64_t length);
/* It ended by itself, with so many tokens. */
void sh_tail_end(sh_tail *t, const sh_request *r, int64_t tokens);
/* What a length of a kind comes to, in tokens. */
double sh_tail_expected(const sh_tail *t, int kind, int64_t length);
/* Whether, with one that is expected to take so long among those that wait, the longest should go first. places:
 * sequences that all groups run at once. */
bool sh_tail_has_begun(const sh_tail *t, double longest, int places);
/* The same for the longest that could still wait: false says that it need not be looked for. */
bool sh_tail_may_have_begun(const sh_tail *t, int places);
/* Of the kinds whose next is known, the one whose next is expected to take longest; of equal ones the older. −1: none.
 */
int sh_tail_longest(const sh_tail *t);

#endif
