/* The end of a job. See tail.h. */
#include "coordinator/tail.h"

void sh_tail_init(sh_tail *t) {
    *t = (sh_tail){0};
    for (int k = 0; k < SH_TAIL_KINDS; k++) t->next[k].length = INT64_MAX;
}

sh_tail_kind sh_tail_kind_of(const sh_request *r) {
    const sh_sampling *s = &r->sampling;
    bool stops = !s->ignore_eos || s->n_stop_ids > 0 || s->n_stops > 0;
    if (!stops || s->min_tokens >= s->max_tokens || s->max_tokens <= 1) return SH_TAIL_FIXED;
    return r->unlimited ? SH_TAIL_OPEN : SH_TAIL_LIMITED;
}

static int64_t of_prompt(const sh_request *r) {
    return ((int64_t)r->prompt.n + SH_TAIL_PROMPT - 1) / SH_TAIL_PROMPT;
}

/* Up to one of 8 numbers in each octave: the store then has few places in its order where requests come and go, and
 * those that are about alike stay in the order of their lines. */
static int64_t rounded(int64_t n) {
    int64_t step = 1;
    while (n / step >= 16) step *= 2;
    return (n + step - 1) / step * step;
}

int64_t sh_tail_length_of(const sh_request *r) {
    int64_t most = r->sampling.max_tokens;
    if (r->unlimited) most += (int64_t)r->prompt.n; /* the context: a long prompt does not make the answer shorter */
    return rounded(most + of_prompt(r));
}

void sh_tail_add(sh_tail *t, int kind, int64_t sum, int64_t longest) {
    if (kind < 0 || kind >= SH_TAIL_KINDS) return;
    t->waits[kind] += sum;
    if (longest > t->longest[kind]) t->longest[kind] = longest;
}

void sh_tail_take(sh_tail *t, int kind, int64_t length) {
    if (kind < 0 || kind >= SH_TAIL_KINDS) return;
    t->waits[kind] = length < t->waits[kind] ? t->waits[kind] - length : 0;
}

void sh_tail_end(sh_tail *t, const sh_request *r, int64_t tokens) {
    sh_tail_kind k = sh_tail_kind_of(r);
    t->ended[k].took += tokens + of_prompt(r);
    t->ended[k].length += sh_tail_length_of(r);
    t->ended[k].n++;
}

double sh_tail_expected(const sh_tail *t, int kind, int64_t length) {
    if (kind == SH_TAIL_FIXED || t->ended[kind].n < SH_TAIL_SEEN) return (double)length;
    return (double)length * (double)t->ended[kind].took / (double)t->ended[kind].length;
}

bool sh_tail_has_begun(const sh_tail *t, double longest, int places) {
    double waits = 0;
    for (int k = 0; k < SH_TAIL_KINDS; k++) waits += sh_tail_expected(t, k, t->waits[k]);
    return places > 0 && longest > 0 && SH_TAIL_ROUNDS * longest >= waits / places;
}

bool sh_tail_may_have_begun(const sh_tail *t, int places) {
    double longest = 0;
    for (int k = 0; k < SH_TAIL_KINDS; k++) {
        double e = t->waits[k] > 0 ? sh_tail_expected(t, k, t->longest[k]) : 0;
        if (e > longest) longest = e;
    }
    return sh_tail_has_begun(t, longest, places);
}

int sh_tail_longest(const sh_tail *t) {
    int best = -1;
    double most = 0;
    for (int k = 0; k < SH_TAIL_KINDS; k++) {
        if (t->next[k].none || t->next[k].key == 0) continue;
        double e = sh_tail_expected(t, k, t->next[k].length);
        if (best >= 0 && (e < most || (e == most && t->next[k].key > t->next[best].key))) continue;
        best = k;
        most = e;
    }
    return best;
}
