/* Which group gets which request. See allot.h. */
#include "coordinator/allot.h"

int64_t sh_allot_need(const sh_running *r) {
    return (int64_t)r->request.prompt.n + r->request.sampling.max_tokens;
}

bool sh_allot_fits(const sh_group *g, const sh_running *r) {
    return g->kv_tokens <= 0 || sh_allot_need(r) <= g->kv_tokens;
}

bool sh_allot_has_room(const sh_allot *s, const sh_group *g) {
    return sh_group_serves(g) && g != s->tester && g->testing == 0 && g->given < SH_ALLOT_WINDOW * g->max_seqs;
}

int sh_allot_room(const sh_allot *s, int most) {
    int n = 0;
    for (int i = 0; i < s->n && n < most; i++)
        if (sh_allot_has_room(s, s->group[i])) n += SH_ALLOT_WINDOW * s->group[i]->max_seqs - s->group[i]->given;
    return n < most ? n : most;
}

int sh_allot_places(const sh_allot *s) {
    int n = 0;
    for (int i = 0; i < s->n; i++)
        if (sh_group_serves(s->group[i])) n += s->group[i]->max_seqs;
    return n;
}

sh_group *sh_allot_next(const sh_allot *s, const sh_running *r) {
    sh_group *best = NULL;
    for (int i = 0; i < s->n; i++) {
        sh_group *g = s->group[i];
        if (!sh_allot_has_room(s, g) || (r && !sh_allot_fits(g, r))) continue;
        if (!best || (int64_t)g->given * best->max_seqs < (int64_t)best->given * g->max_seqs) best = g;
    }
    return best;
}

bool sh_allot_is_hopeless(const sh_allot *s, const sh_running *r, int expected, int *most) {
    int ready = 0, largest = 0;
    for (int i = 0; i < s->n; i++) {
        const sh_group *g = s->group[i];
        if (g->state == SH_GROUP_LOST) continue;
        if (!sh_group_serves(g)) return false;
        if (sh_allot_fits(g, r)) return false;
        if (g->kv_tokens > largest) largest = g->kv_tokens;
        ready++;
    }
    *most = largest;
    return ready > 0 && ready >= expected;
}

sh_group *sh_allot_tester(const sh_allot *s, const sh_running *first) {
    sh_group *best = NULL;
    for (int i = 0; i < s->n; i++) {
        sh_group *g = s->group[i];
        if (!sh_group_serves(g)) continue;
        if (g->testing) return g;
        if (first && sh_allot_fits(g, first) && (!best || g->unproven < best->unproven)) best = g;
    }
    return best;
}

bool sh_allot_uneven(const sh_allot *s, sh_group **from, sh_group **to) {
    sh_group *most = NULL, *least = NULL;
    for (int i = 0; i < s->n; i++) {
        sh_group *g = s->group[i];
        if (!sh_group_serves(g) || g == s->tester || g->testing) continue;
        if (g->unproven > 0 && (!most || g->given > most->given)) most = g;
        if (g->given < g->max_seqs && (!least || g->given < least->given)) least = g;
    }
    if (!most || !least || most->given < least->given + 2) return false;
    *from = most, *to = least;
    return true;
}

sh_group *sh_allot_idle(const sh_allot *s) {
    for (int i = 0; i < s->n; i++) {
        sh_group *g = s->group[i];
        if (sh_group_serves(g) && g != s->tester && g->given == 0) return g;
    }
    return NULL;
}

bool sh_allot_is_quicker(const sh_group *to, const sh_group *from, const sh_running *r) {
    double left = r->request.sampling.max_tokens - r->tokens.n;
    return to->pace > 0 && from->pace > SH_PACE_RATIO * to->pace && left * (from->pace - to->pace) > SH_PACE_GAIN &&
           sh_allot_fits(to, r);
}

bool sh_allot_is_half(const sh_group *to, const sh_group *from, const sh_running *r) {
    return from->given + to->given >= SH_SPLIT_LEAST && to->given + 1 < from->given &&
           (r->request.sampling.max_tokens - r->tokens.n) * from->pace > SH_SPLIT_LEFT && sh_allot_fits(to, r);
}

/* Seconds per token of one sequence, what it waits for its prompt included; smoothed. */
void sh_allot_measure(sh_group *g, double now) {
    int running = g->given < g->max_seqs ? g->given : g->max_seqs;
    if (g->measured > 0) g->spent += running * (now - g->measured);
    g->measured = now;
    uint64_t tokens = g->taken - g->paced;
    if (tokens < SH_PACE_TOKENS) return;
    double pace = g->spent / (double)tokens;
    g->pace = g->pace > 0 ? 0.5 * (g->pace + pace) : pace;
    g->spent = 0;
    g->paced = g->taken;
}
