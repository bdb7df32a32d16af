/*
 * What the ranks of a group tell each other outside the step loop: a record each before they begin, and to leave at the
 * end. All on the control tag, by polling, so that a rank that waits still notices when it must end.
 */
#ifndef SH_WORKER_RANKS_H
#define SH_WORKER_RANKS_H

#include "proto/link.h"

/* Called while waiting; a failure ends the wait and is passed on. */
typedef struct sh_alive {
    sh_status (*check)(void *arg);
    void *arg;
} sh_alive;

/* Collective: `all` [link->size][bytes] gets every rank's record. What a failure leaves under way is a copy: both
 * buffers are the caller's again in any case. */
sh_status sh_ranks_exchange(sh_link *l, const void *mine, size_t bytes, void *all, const sh_alive *alive);
/* What to add to sh_now() for nanoseconds since 1970 by the leader's clock, and by how much it may be wrong. */
typedef struct sh_rank_clock {
    int64_t offset, error;
} sh_rank_clock;
/* Collective. Ranks of the leader's node have its clock; others ask it some times and take the quickest answer's half
 * way for the moment at which it looked. */
sh_status sh_ranks_clock(sh_link *l, const sh_alive *alive, sh_rank_clock *out);
/* Tells the next rank, if there is one, to leave; returns when the message is gone, SH_EPEER after `seconds`. */
sh_status sh_ranks_pass_leave(sh_link *l, double seconds);
/* Whether the rank before has told this one to leave. */
sh_status sh_ranks_told_leave(sh_link *l, bool *told);

#endif
