/* A worker group as the coordinator knows it. See group.h. */
#include "coordinator/group.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

sh_status sh_group_create(const char *name, int size, int number, sh_group **out) {
    sh_group *g = calloc(1, sizeof *g);
    if (g) g->seat = calloc((size_t)size, sizeof *g->seat);
    if (!g || !g->seat) {
        free(g);
        SH_FAIL(SH_EMEMORY, "no memory for a group of %d ranks", size);
    }
    snprintf(g->name, sizeof g->name, "%s", name);
    g->size = size;
    g->number = number;
    g->said_running = -1;
    *out = g;
    return SH_OK;
}

void sh_group_destroy(sh_group **gp) {
    sh_group *g = *gp;
    if (!g) return;
    sh_plan_free(&g->plan);
    for (int i = 0; i < g->n_notes; i++) free(g->note[i]);
    free(g->plan_text);
    free(g->fault);
    free(g->done);
    for (int i = 0; i < g->size; i++) sh_buf_release(&g->seat[i].routing);
    free(g->seat);
    free(g);
    *gp = NULL;
}

sh_status sh_group_keep_routing(sh_group *g, int rank, const Shoal__Routing *m) {
    sh_rank_seat *s = &g->seat[rank];
    size_t n = shoal__routing__get_packed_size(m);
    sh_buf_clear(&s->routing);
    SH_TRY(sh_buf_reserve(&s->routing, n + 1));
    s->routing.len = shoal__routing__pack(m, s->routing.data);
    s->routing_news = true;
    return SH_OK;
}

sh_status sh_group_save_routing(sh_group *g, sh_store *store) {
    for (int i = 0; i < g->size; i++) {
        sh_rank_seat *s = &g->seat[i];
        char life[320];
        if (!s->routing_news) continue;
        snprintf(life, sizeof life, "%s %d %s %d", g->name, i, s->host, s->pid);
        SH_TRY(sh_store_routing_put(store, life, s->routing.data, s->routing.len));
        s->routing_news = false;
    }
    return SH_OK;
}

sh_status sh_group_add_done(sh_group *g, uint64_t key) {
    if (g->n_done == g->cap_done) {
        int cap = g->cap_done ? g->cap_done * 2 : 64;
        uint64_t *p = realloc(g->done, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for answers");
        g->done = p;
        g->cap_done = cap;
    }
    g->done[g->n_done++] = key;
    return SH_OK;
}

void sh_group_set_fault(sh_group *g, const char *text, bool lasting) {
    if (g->fault && (g->lasting || !lasting)) return;
    char *copy = strdup(text);
    if (!copy) return;
    free(g->fault);
    g->fault = copy;
    g->lasting = lasting;
}

void sh_group_add_note(sh_group *g, const char *text) {
    for (int i = 0; i < g->n_notes; i++)
        if (strcmp(g->note[i], text) == 0) return;
    char *copy = g->n_notes < SH_MAX_NOTES ? strdup(text) : NULL;
    if (copy) g->note[g->n_notes++] = copy;
}

int sh_group_seat(const sh_group *g, const sh_wire_peer *p) {
    for (int i = 0; i < g->size; i++)
        if (g->seat[i].peer.len == p->len && memcmp(g->seat[i].peer.id, p->id, p->len) == 0) return i;
    return -1;
}

const char *sh_group_state_name(sh_group_state s) {
    static const char *const names[] = {"starting", "loading", "ready", "lost"};
    return names[s];
}

bool sh_group_serves(const sh_group *g) {
    return g->state == SH_GROUP_READY && g->gone == 0;
}

bool sh_group_is_dead(const sh_group *g, double now, double silent, char *text, size_t size) {
    for (int i = 0; i < g->size; i++) {
        const sh_rank_seat *r = &g->seat[i];
        if (!r->peer.len) continue;
        double quiet = now - r->heard, still = now - r->moved;
        bool stuck = g->state == SH_GROUP_READY && r->busy && still > g->stall;
        if (quiet <= silent && !stuck) continue;
        if (quiet > silent)
            snprintf(text, size, "rank %d (%s, pid %d): nothing heard for %.1f s: %.1f are allowed", i, r->host, r->pid,
                     quiet, silent);
        else
            snprintf(text, size,
                     "rank %d (%s, pid %d): busy at step %llu for %.1f s without getting on: %.1f are allowed", i,
                     r->host, r->pid, (unsigned long long)r->step, still, g->stall);
        return true;
    }
    return false;
}

static bool has_reported(const sh_group *g) {
    bool all = g->report > 0;
    for (int i = 0; all && i < g->size; i++) all = g->seat[i].report == g->report;
    return all;
}

static sh_status fill_times(const sh_group *g, Shoal__GroupState *out) {
    out->times = calloc((size_t)g->size, sizeof *out->times);
    if (!out->times) SH_FAIL(SH_EMEMORY, "no memory for a status");
    for (int i = 0; i < g->size; i++) {
        if (!g->seat[i].has_times) continue;
        size_t n = shoal__stage_times__get_packed_size(&g->seat[i].times);
        uint8_t *p = malloc(n + 1);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for a status");
        shoal__stage_times__pack(&g->seat[i].times, p);
        out->times[out->n_times++] = (ProtobufCBinaryData){n, p};
    }
    return SH_OK;
}

sh_status sh_group_fill(const sh_group *g, Shoal__GroupState *out) {
    Shoal__GroupState s = SHOAL__GROUP_STATE__INIT;
    s.group = (char *)(uintptr_t)g->name;
    s.ranks = g->size;
    s.ranks_up = g->here;
    s.state = (char *)(uintptr_t)sh_group_state_name(g->state);
    s.has_kv_tokens = g->state == SH_GROUP_READY;
    s.kv_tokens = g->kv_tokens;
    s.has_kv_total = s.has_kv_tokens && g->kv_total > 0;
    s.kv_total = g->kv_total;
    s.has_running = true;
    s.running = g->said_running >= 0 ? g->said_running : g->given;
    s.n_note = (size_t)g->n_notes;
    s.note = (char **)(uintptr_t)g->note;
    s.fault = g->fault;
    s.plan = g->plan_text;
    s.has_lasting = s.lasting = g->lasting;
    s.has_progress = true;
    s.progress = g->taken;
    s.has_reported = true;
    s.reported = has_reported(g);
    sh_status st = fill_times(g, &s);
    if (st != SH_OK) {
        sh_group_release_state(&s);
        return st;
    }
    *out = s;
    return SH_OK;
}

void sh_group_release_state(Shoal__GroupState *g) {
    for (size_t i = 0; i < g->n_times; i++) free(g->times[i].data);
    free(g->times);
    g->times = NULL;
    g->n_times = 0;
}
