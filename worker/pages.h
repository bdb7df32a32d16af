/*
 * The page allocator of a group: numbers of KV pages of one kind, handed out by the leader and obeyed by every stage.
 * It keeps numbers only, never bytes. A promise sets pages aside without naming them, so that a prompt that was
 * admitted can always be finished. Pure: no I/O, no clock.
 */
#ifndef SH_WORKER_PAGES_H
#define SH_WORKER_PAGES_H

#include <stdbool.h>
#include <stdint.h>
#include "common/status.h"

typedef struct sh_pages {
    int32_t total, free;
    int32_t promised; /* ≤ free; pages set aside for prompts under way */
    int32_t *stack;   /* [total]; the first `free` entries are the free numbers */
    bool *used;       /* [total] */
} sh_pages;

/* Numbers 0 … total−1, all free. total may be 0. */
sh_status sh_pages_create(int32_t total, sh_pages *out);
void sh_pages_release(sh_pages *p);
/* Pages that may still be taken or promised. */
static inline int32_t sh_pages_open(const sh_pages *p) {
    return p->free - p->promised;
}
/* Sets n pages aside; false (and nothing done) when fewer are open. */
bool sh_pages_promise(sh_pages *p, int32_t n);
/* Gives n promised pages up again. */
void sh_pages_unpromise(sh_pages *p, int32_t n);
/* Takes one page, from the promised ones or from the open ones; −1 when there is none. */
int32_t sh_pages_take(sh_pages *p, bool promised);
/* Gives a page back. A number that is not in use fails: the leader's books are wrong. */
sh_status sh_pages_give(sh_pages *p, int32_t page);

#endif
