/*
 * The page allocator of a group: numbers of KV pages of one kind, handed out by the leader and obeyed by every stage.
 * It keeps numbers only, never bytes. A promise sets pages aside without naming them, so that a prompt that was
 * admitted can always be finished. A page may have several holders, and one that has none may be kept for what is in
 * it until somebody wants the room (worker/prefix.h): such a page counts as open. Pure: no I/O, no clock.
 */
#ifndef SH_WORKER_PAGES_H
#define SH_WORKER_PAGES_H

#include <stdbool.h>
#include <stdint.h>
#include "common/status.h"

typedef struct sh_pages {
    int32_t total, free;
    int32_t promised; /* pages set aside for prompts under way; never more than can be had */
    int32_t idle;     /* kept pages that nobody holds */
    int32_t paid;     /* with each_pays: holders beside the first, over all pages */
    bool each_pays;   /* a further holder takes as much room as a page: whoever gives a page back opens one */
    int32_t *stack;   /* [total]; the first `free` entries are the free numbers */
    int32_t *holders; /* [total] */
    bool *kept;       /* [total] */
} sh_pages;

/* Numbers 0 … total−1, all free. total may be 0. */
sh_status sh_pages_create(int32_t total, sh_pages *out);
void sh_pages_release(sh_pages *p);
/* Pages that may still be taken or promised. */
static inline int32_t sh_pages_open(const sh_pages *p) {
    return p->free + p->idle - p->promised - p->paid;
}
/* Sets n pages aside; false (and nothing done) when fewer are open. */
bool sh_pages_promise(sh_pages *p, int32_t n);
/* Gives n promised pages up again. */
void sh_pages_unpromise(sh_pages *p, int32_t n);
/* Takes one page, from the promised ones or from the open ones; −1 when there is none, or none before one that is idle
 * is forgotten. */
int32_t sh_pages_take(sh_pages *p, bool promised);
/* One more holder of a page that is held or kept; −1 open page where nobody held it, or each pays. */
void sh_pages_hold(sh_pages *p, int32_t page);
/* A holder gives a page back. A number that nobody holds fails: the leader's books are wrong. */
sh_status sh_pages_give(sh_pages *p, int32_t page);
/* What is in a held page may be wanted again: it is kept when nobody holds it any more. */
void sh_pages_keep(sh_pages *p, int32_t page);
/* It will not: free again when nobody holds it. */
void sh_pages_forget(sh_pages *p, int32_t page);

#endif
