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

/* Collective: `all` [link->size][bytes] gets every rank's record. */
sh_status sh_ranks_exchange(sh_link *l, const void *mine, size_t bytes, void *all, const sh_alive *alive);
/* Tells the next rank, if there is one, to leave; returns when the message is gone, SH_EPEER after `seconds`. */
sh_status sh_ranks_pass_leave(sh_link *l, double seconds);
/* Whether the rank before has told this one to leave. */
sh_status sh_ranks_told_leave(sh_link *l, bool *told);

#endif
