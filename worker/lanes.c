/* Lanes of a group. See lanes.h. */
#include "worker/lanes.h"

#include <stdlib.h>

/* A step on its way: lanes that still owe an answer. */
typedef struct step {
    bool *owes; /* [n] */
    int open;
} step;

struct sh_lanes {
    int n, depth;
    sh_leader **leader; /* [n] */
    sh_batch *batch;    /* [n] */
    sh_batch prompts;   /* for the prefill pipeline */
    step *steps;        /* ring [depth] */
    int oldest, n_steps;
};

sh_status sh_lanes_create(const sh_leader_options *o, int n, sh_lanes **out) {
    sh_lanes *l = calloc(1, sizeof *l);
    if (!l) SH_FAIL(SH_EMEMORY, "no memory for the schedule of %d lanes", n);
    l->n = n;
    l->depth = sh_leader_in_flight(o);
    l->leader = calloc((size_t)n, sizeof(sh_leader *));
    l->batch = calloc((size_t)n, sizeof *l->batch);
    l->steps = calloc((size_t)l->depth, sizeof *l->steps);
    bool ok = l->leader && l->batch && l->steps;
    for (int i = 0; ok && i < l->depth; i++) ok = (l->steps[i].owes = calloc((size_t)n, sizeof(bool))) != NULL;
    sh_status st =
        ok ? SH_OK : sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "no memory for the schedule of %d lanes", n);
    for (int i = 0; st == SH_OK && i < n; i++) {
        st = sh_leader_create(o, &l->leader[i]);
        if (st == SH_OK) st = sh_batch_create(sh_leader_descriptor_bytes(o), &l->batch[i]);
    }
    if (st == SH_OK && o->prefill > 0) st = sh_batch_create(sh_leader_descriptor_bytes(o), &l->prompts);
    if (st != SH_OK) {
        sh_lanes_destroy(&l);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = l;
    return SH_OK;
}

void sh_lanes_destroy(sh_lanes **p) {
    sh_lanes *l = *p;
    if (!l) return;
    for (int i = 0; l->leader && i < l->n; i++) sh_leader_destroy(&l->leader[i]);
    for (int i = 0; l->batch && i < l->n; i++) sh_batch_release(&l->batch[i]);
    sh_batch_release(&l->prompts);
    for (int i = 0; l->steps && i < l->depth; i++) free(l->steps[i].owes);
    free(l->leader);
    free(l->batch);
    free(l->steps);
    free(l);
    *p = NULL;
}

/* The lane that is done first if it gets s: with the fewest rows to compute, less those of s whose pages it has
 * already; of equal ones the first. */
static int least_loaded(const sh_lanes *l, sh_seq *s) {
    int best = 0;
    int64_t fewest = 0;
    for (int i = 0; i < l->n; i++) {
        int64_t rows = sh_leader_rows_to_go(l->leader[i]) - (l->n > 1 ? sh_leader_shared(l->leader[i], s) : 0);
        if (i > 0 && rows >= fewest) continue;
        best = i;
        fewest = rows;
    }
    return best;
}

sh_status sh_lanes_add(sh_lanes *l, sh_seq **s, bool *known) {
    for (int i = 0; i < l->n; i++)
        if (sh_leader_knows(l->leader[i], (*s)->key)) return sh_leader_add(l->leader[i], s, known); /* drops it */
    return sh_leader_add(l->leader[least_loaded(l, *s)], s, known);
}

void sh_lanes_cancel(sh_lanes *l, uint64_t key) {
    for (int i = 0; i < l->n; i++) sh_leader_cancel(l->leader[i], key);
}

static void make_empty(sh_batch *b) {
    *b = (sh_batch){.arena = b->arena};
}

static int32_t max32(int32_t a, int32_t b) {
    return a > b ? a : b;
}

static void tell_widest(sh_lanes *l) {
    int32_t rows = 0, kept = 0;
    for (int i = 0; i < l->n; i++) {
        rows = max32(rows, l->batch[i].n_rows);
        kept = max32(kept, l->batch[i].n_kept);
    }
    for (int i = 0; l->n > 1 && i < l->n; i++) {
        l->batch[i].widest_rows = rows;
        l->batch[i].widest_kept = kept;
    }
}

sh_status sh_lanes_next(sh_lanes *l, sh_batch **batches, bool *made) {
    *made = false;
    if (l->n_steps == l->depth) return SH_OK;
    step *s = &l->steps[(l->oldest + l->n_steps) % l->depth];
    s->open = 0;
    for (int i = 0; i < l->n; i++) {
        SH_TRY(sh_leader_next(l->leader[i], &l->batch[i], &s->owes[i]));
        s->open += s->owes[i];
        if (!s->owes[i]) make_empty(&l->batch[i]);
    }
    if (s->open == 0) return SH_OK;
    tell_widest(l);
    l->n_steps++;
    *batches = l->batch;
    *made = true;
    return SH_OK;
}

sh_status sh_lanes_apply(sh_lanes *l, int lane, uint64_t number, const sh_token *tokens, int n,
                         void (*emit)(void *arg, uint64_t key, const sh_token *t), void *arg) {
    SH_TRY(sh_leader_apply(l->leader[lane], number, tokens, n, emit, arg));
    int i = 0; /* a lane answers its steps in order, but lanes need not keep pace */
    while (i < l->n_steps && !l->steps[(l->oldest + i) % l->depth].owes[lane]) i++;
    if (i == l->n_steps) SH_FAIL(SH_ESTATE, "lane %d answered a step that is not in flight", lane);
    step *s = &l->steps[(l->oldest + i) % l->depth];
    s->owes[lane] = false;
    s->open--;
    while (l->n_steps > 0 && l->steps[l->oldest].open == 0) {
        l->oldest = (l->oldest + 1) % l->depth;
        l->n_steps--;
    }
    return SH_OK;
}

sh_status sh_lanes_next_prompts(sh_lanes *l, sh_batch **batch, bool *made) {
    *batch = &l->prompts;
    return sh_leader_next_prompts(l->leader[0], &l->prompts, made);
}

sh_status sh_lanes_confirm(sh_lanes *l, uint64_t number, bool ok) {
    return sh_leader_confirm(l->leader[0], number, ok);
}

sh_leader_state sh_lanes_look(const sh_lanes *l) {
    sh_leader_state sum = {.in_flight = l->n_steps};
    for (int i = 0; i < l->n; i++) {
        sh_leader_state s = sh_leader_look(l->leader[i]);
        sum.running += s.running;
        sum.waiting += s.waiting;
        sum.kv_free += s.kv_free;
        sum.pauses += s.pauses;
        sum.prompts_out += s.prompts_out;
        sum.redone += s.redone;
        sum.shared += s.shared;
        for (int k = 0; k < SH_KV_KINDS; k++) sum.free[k] += s.free[k];
    }
    return sum;
}
