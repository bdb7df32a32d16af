/*
 * Placing experts by counts. See placement.h. The heaviest first, each on the member with the least so far; before
 * that, copies for the heaviest ones, one at a time, as long as there are places and the busiest member gets a better
 * balance from it.
 */
#include "partition/placement.h"
#include "partition/plan.h"

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

/* --- a stage -------------------------------------------------------------------------------------------------------
 */

/* The layer furthest from balance that may have more copies; −1: none. */
static int worst_layer(const sh_config *c, int first, int last, const double *balance, const int *extra, int most) {
    int worst = -1;
    for (int i = 0; i < last - first; i++) {
        if (!c->layer[first + i].moe || balance[i] <= GOOD_ENOUGH || extra[i] >= most) continue;
        if (worst < 0 || balance[i] > balance[worst]) worst = i;
    }
    return worst;
}

static sh_status place_layer(const sh_config *c, const sh_routing *r, int layer, int members, int extra, bool *held,
                             double *balance) {
    const uint64_t *counts = sh_routing_of(r, layer);
    SH_TRY(sh_placement_make(counts, c->experts, members, extra, held));
    *balance = sh_placement_balance(counts, c->experts, members, held);
    return SH_OK;
}

static sh_status place_stage(const sh_config *c, const sh_routing *r, int first, int last, int members, uint64_t copies,
                             int *extra, double *balance, bool *held) {
    size_t size = (size_t)members * (size_t)c->experts;
    for (int i = 0; i < last - first; i++)
        if (c->layer[first + i].moe)
            SH_TRY(place_layer(c, r, first + i, members, 0, held + (size_t)i * size, &balance[i]));
    for (; copies > 0; copies--) {
        int i = worst_layer(c, first, last, balance, extra, c->experts - c->experts / members);
        if (i < 0) break;
        SH_TRY(place_layer(c, r, first + i, members, ++extra[i], held + (size_t)i * size, &balance[i]));
    }
    return SH_OK;
}

sh_status sh_placement_stage(const sh_config *c, const sh_routing *r, sh_mode mode, int first, int last, int members,
                             uint64_t bytes, bool *held) {
    int *extra = calloc((size_t)(last - first), sizeof *extra);
    double *balance = calloc((size_t)(last - first), sizeof *balance);
    sh_status st = extra && balance ? SH_OK
                                    : sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "placement: no memory for %d layers",
                                                   last - first);
    if (st == SH_OK)
        st = place_stage(c, r, first, last, members, bytes / sh_expert_bytes(c, mode), extra, balance, held);
    free(extra);
    free(balance);
    return st;
}

/* What a plan makes of the counts: the time of a layer is that of its busiest member. */
typedef struct outlook {
    double busiest, even, mean; /* choices, summed over layers; even: with even shares */
    int64_t copies;
} outlook;

static void look_at_layer(const sh_config *c, const sh_routing *r, const Shoal__Plan *p, int layer, int rank0,
                          bool *held, outlook *o) {
    const uint64_t *counts = sh_routing_of(r, layer);
    double mean = 0;
    o->copies -= c->experts;
    for (int e = 0; e < c->experts; e++) mean += (double)counts[e] / p->ep;
    for (int m = 0; m < p->ep; m++)
        for (int e = 0; e < c->experts; e++)
            o->copies += held[m * c->experts + e] = sh_plan_holds(p, rank0 + m, layer, e);
    o->busiest += mean * sh_placement_balance(counts, c->experts, p->ep, held);
    for (int m = 0; m < p->ep; m++)
        for (int e = 0; e < c->experts; e++)
            held[m * c->experts + e] = e >= (long)c->experts * m / p->ep && e < (long)c->experts * (m + 1) / p->ep;
    o->even += mean * sh_placement_balance(counts, c->experts, p->ep, held);
    o->mean += mean;
}

sh_status sh_placement_print(const sh_config *c, const sh_routing *r, const Shoal__Plan *p, sh_buf *out) {
    outlook o = {0};
    if (p->ep <= 1) return SH_OK;
    bool *held = calloc((size_t)p->ep * (size_t)c->experts, sizeof *held);
    if (!held) SH_FAIL(SH_EMEMORY, "placement: no memory for %d experts", c->experts);
    for (int rank = 0; rank < (int)p->n_rank; rank += p->ep)
        for (int layer = p->rank[rank]->first; layer < p->rank[rank]->last; layer++)
            if (c->layer[layer].moe) look_at_layer(c, r, p, layer, rank, held, &o);
    free(held);
    if (o.mean <= 0) return sh_buf_add_str(out, "; experts in even shares: nothing was counted");
    return sh_buf_printf(out, "; experts by counts, %lld copies: busiest rank %.2f of the mean, %.2f with even shares",
                         (long long)o.copies, o.busiest / o.mean, o.even / o.mean);
}
