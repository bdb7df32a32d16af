/* A list that only grows. See keep.h. */
#include "common/keep.h"

#include <stdatomic.h>
#include <stdlib.h>

typedef struct kept {
    struct kept *next;
    const void *p;
} kept;

static _Atomic(kept *) all;

void sh_keep(const void *p) {
    kept *k = p ? calloc(1, sizeof *k) : NULL;
    if (!k) return; /* no memory for the note: p stays all the same */
    *k = (kept){.p = p, .next = atomic_load(&all)};
    while (!atomic_compare_exchange_weak(&all, &k->next, k)) continue;
}
