/*
 * Which group gets which request. Pure functions over what dispatch knows: they send nothing and move nothing.
 *
 *   room     a leader holds up to twice what it can run, so that it never waits for the next request
 *   size     a request goes only to a group whose KV can hold it; it waits for one that may come
 *   suspects requests that were in hand when groups ended, several times in a row and without a token of their own: one
 *            at a time is given to one group (the tester), which gets nothing else until that one has made progress
 *   the end  when nothing waits any more, an idle group takes over what others have not begun, and what slow ones would
 *            be long about
 */
#ifndef SH_COORDINATOR_ALLOT_H
#define SH_COORDINATOR_ALLOT_H

#include "coordinator/group.h"
#include "coordinator/running.h"

#define SH_ALLOT_WINDOW 2   /* requests a leader holds: so many times what it can run at once */
#define SH_SUSPECT_AT   3   /* groups that ended in a row with a request in hand: it is run alone from then on */
#define SH_CONVICT_AT   2   /* groups that ended with it alone: it is not given out any more */
#define SH_PACE_TOKENS  32  /* a group's pace is measured over so many tokens */
#define SH_PACE_RATIO   1.5 /* so much slower a group must be before another takes over what it runs … */
#define SH_PACE_GAIN    2.0 /* … and so many seconds must be won */

#define SH_SPLIT_LEAST 8   /* sequences of a batch of which half is worth moving, if … */
#define SH_SPLIT_LEFT  8.0 /* … each has so many seconds to go */

/* The groups at hand; NULL entries are not allowed. tester: the one that is set apart for suspects, or NULL. */
typedef struct sh_allot {
    sh_group *const *group;
    int n;
    const sh_group *tester;
} sh_allot;

/* Places of a sequence that a group must hold for this request. */
int64_t sh_allot_need(const sh_running *r);
bool sh_allot_fits(const sh_group *g, const sh_running *r);
/* Whether it may get one more request that is no suspect. */
bool sh_allot_has_room(const sh_allot *s, const sh_group *g);
/* Requests that leaders would take, up to `most`. */
int sh_allot_room(const sh_allot *s, int most);
/* Sequences that the groups that are up run at once. */
int sh_allot_places(const sh_allot *s);
/* The neediest leader that may get r (NULL: any request); NULL: none. */
sh_group *sh_allot_next(const sh_allot *s, const sh_running *r);
/* No group that is up can hold r, and none that could is to be expected: `expected` groups are up or will come. *most:
 * what the largest can hold. */
bool sh_allot_is_hopeless(const sh_allot *s, const sh_running *r, int expected, int *most);
/* Who runs the suspects: the one that has one in hand; else, for the suspect `first` (NULL: none waits), the one that
 * is rid soonest of requests that have not shown progress. */
sh_group *sh_allot_tester(const sh_allot *s, const sh_running *first);
/* Nothing waits: from whom to whom requests that were not begun should go. False: all is even. */
bool sh_allot_uneven(const sh_allot *s, sh_group **from, sh_group **to);
/* Nothing waits: a group that has nothing at all, or NULL. */
sh_group *sh_allot_idle(const sh_allot *s);
/* Whether `to`, which has nothing, should take over r, which `from` is running: it is quicker, or it takes half of a
 * large batch. */
bool sh_allot_is_quicker(const sh_group *to, const sh_group *from, const sh_running *r);
bool sh_allot_is_half(const sh_group *to, const sh_group *from, const sh_running *r);
/* Takes note of what came from the group until now. */
void sh_allot_measure(sh_group *g, double now);

#endif
