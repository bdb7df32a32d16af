/*
 * Placing experts by counts. See placement.h. The heaviest first, each on the member with the least so far; before
 * that, copies for the heaviest ones, one at a time, as long as there are places and the busiest member gets a better
 * balance from it.
 */
#include "partition/placement.h"

#include <stdlib.h>
#include <string.h>

#define GOOD_ENOUGH 1.02 /* of the mean: further copies would only cost memory */

typedef struct item { /* one copy of an expert */
    int expert;
    double load;
} item;

typedef struct trial {
    const uint64_t *counts;
    int experts, members, room; /* experts per member at most */
    int *copies;                /* [experts] */
    item *items;                /* [members · room] */
    double *load;               /* [members] */
    int *used;                  /* [members] */
    bool *held;                 /* [members, experts] */
} trial;

static int heavier_first(const void *a, const void *b) {
    const item *x = a, *y = b;
    if (x->load != y->load) return x->load > y->load ? -1 : 1;
    return x->expert - y->expert;
}

/* The member for a copy: the least loaded that has room and does not hold the expert; −1: none. */
static int member_for(const trial *t, int expert) {
    int best = -1;
    for (int m = 0; m < t->members; m++) {
        if (t->used[m] == t->room || t->held[m * t->experts + expert]) continue;
        if (best < 0 || t->load[m] < t->load[best] || (t->load[m] == t->load[best] && t->used[m] < t->used[best]))
            best = m;
    }
    return best;
}

/* A first copy always finds a place, for there are at least as many places as copies; one that would lie beside itself
 * is left out. */
static void pack(trial *t) {
    int n = 0;
    for (int e = 0; e < t->experts; e++)
        for (int i = 0; i < t->copies[e]; i++) t->items[n++] = (item){e, (double)t->counts[e] / t->copies[e]};
    qsort(t->items, (size_t)n, sizeof *t->items, heavier_first);
    memset(t->held, 0, (size_t)(t->members * t->experts) * sizeof *t->held);
    for (int m = 0; m < t->members; m++) t->load[m] = 0, t->used[m] = 0;
    for (int i = 0; i < n; i++) {
        int m = member_for(t, t->items[i].expert);
        if (m < 0) continue;
        t->held[m * t->experts + t->items[i].expert] = true;
        t->load[m] += t->items[i].load;
        t->used[m]++;
    }
}

/* The expert whose copies have the most to do each, of those not yet everywhere; −1: none. */
static int heaviest(const trial *t) {
    int best = -1;
    for (int e = 0; e < t->experts; e++) {
        if (t->copies[e] == t->members) continue;
        if (best < 0 || (double)t->counts[e] / t->copies[e] > (double)t->counts[best] / t->copies[best]) best = e;
    }
    return best;
}

static void search(trial *t, int places, bool *best) {
    for (int e = 0; e < t->experts; e++) t->copies[e] = 1;
    pack(t);
    memcpy(best, t->held, (size_t)(t->members * t->experts) * sizeof *best);
    double balance = sh_placement_balance(t->counts, t->experts, t->members, best);
    for (int n = t->experts; n < places && balance > GOOD_ENOUGH; n++) {
        int e = heaviest(t);
        if (e < 0) break;
        t->copies[e]++;
        pack(t);
        double b = sh_placement_balance(t->counts, t->experts, t->members, t->held);
        if (b >= balance) continue;
        balance = b;
        memcpy(best, t->held, (size_t)(t->members * t->experts) * sizeof *best);
    }
}

double sh_placement_balance(const uint64_t *counts, int experts, int members, const bool *held) {
    double sum = 0, most = 0;
    for (int m = 0; m < members; m++) {
        double load = 0;
        for (int e = 0; e < experts; e++) {
            int copies = 0;
            for (int i = 0; i < members && held[m * experts + e]; i++) copies += held[i * experts + e];
            if (copies > 0) load += (double)counts[e] / copies;
        }
        sum += load;
        if (load > most) most = load;
    }
    return sum > 0 ? most * members / sum : 1;
}

sh_status sh_placement_make(const uint64_t *counts, int experts, int members, int extra, bool *held) {
    if (members < 1 || experts < members || extra < 0)
        SH_FAIL(SH_EINPUT, "placement: %d experts on %d members, %d more each: allowed are 1 to %d members", experts,
                members, extra, experts);
    int share = (experts + members - 1) / members, room = extra < experts - share ? share + extra : experts;
    trial t = {.counts = counts, .experts = experts, .members = members, .room = room};
    size_t n = (size_t)members;
    t.copies = calloc((size_t)experts, sizeof *t.copies);
    t.items = calloc(n * (size_t)room, sizeof *t.items);
    t.load = calloc(n, sizeof *t.load);
    t.used = calloc(n, sizeof *t.used);
    t.held = calloc(n * (size_t)experts, sizeof *t.held);
    bool ok = t.copies && t.items && t.load && t.used && t.held;
    if (ok) search(&t, extra > 0 ? members * room : experts, held);
    free(t.copies);
    free(t.items);
    free(t.load);
    free(t.used);
    free(t.held);
    if (!ok) SH_FAIL(SH_EMEMORY, "placement: no memory for %d experts on %d members", experts, members);
    return SH_OK;
}
