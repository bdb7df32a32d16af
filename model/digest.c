/*
 * Digests, and choosing from them. See digest.h. What is known of a row is, besides sums, the entries above a frontier:
 * every part that has more than it told of tells at least those above its last key, so above the largest of these last
 * keys nothing is missing. Dividing by a temperature or taking a logarithm keeps the order of values but may make
 * neighbours equal; hence, in such a scale, only what lies strictly above the frontier counts.
 */
#include "model/digest.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/mem.h"
#include "model/draw_int.h"

_Static_assert(SH_SHARE_VOCAB == SH_DRAW_SEGMENT, "parts begin where segments do");

enum { BAD = 1, LSE = 2, HEAT = 4, ALL = 8, VALUE = 16 };

/* Then, as flagged: f32 max and sum of each segment, the same of x / temperature; then keys, u64 [n_best]. */
typedef struct header {
    int32_t lo, hi, n_best;
    uint32_t flags;
    float value; /* of the id that was wanted, if it is here */
    int32_t id;
} header;

static int segments_of(int n) {
    return (n + SH_DRAW_SEGMENT - 1) / SH_DRAW_SEGMENT;
}

static size_t sums_bytes(int n) {
    return 2 * (size_t)segments_of(n) * sizeof(float);
}

size_t sh_digest_bytes(int n) {
    return sizeof(header) + 2 * sums_bytes(n) + SH_DIGEST_MOST * sizeof(uint64_t);
}

/* --- making --------------------------------------------------------------------------------------------------------
 */

static uint8_t *put_sums(const sh_kernels *kn, const float *x, int n, uint8_t *to) {
    float *max = (float *)(void *)to;
    sh_draw_segments(kn, x, n, max, max + segments_of(n));
    return to + sums_bytes(n);
}

static uint8_t *put_best(sh_draw *d, const float *x, int n, int base, int want, header *h, uint8_t *to) {
    if (want > SH_DIGEST_MOST) want = SH_DIGEST_MOST;
    int found = n > 0 ? sh_draw_best(d, x, n, base, want) : 0;
    if (found < want) h->flags |= ALL; /* no other is possible */
    h->n_best = found < want ? found : want;
    memcpy(to, sh_draw_keys(d), (size_t)h->n_best * sizeof(uint64_t));
    return to + (size_t)h->n_best * sizeof(uint64_t);
}

void sh_digest_make(sh_draw *d, const float *x, int n, int base, const sh_digest_want *w, uint8_t *to, size_t *bytes) {
    header h = {.lo = base, .hi = base + n, .id = w->id};
    uint8_t *at = to + sizeof h;
    int bad = 0;
    if (w->lse) {
        h.flags |= LSE;
        at = put_sums(sh_draw_kernels(d), x, n, at);
    }
    if (w->temperature > 0) {
        float *y = sh_draw_scratch(d);
        for (int i = 0; i < n; i++) y[i] = x[i] / w->temperature;
        h.flags |= HEAT;
        at = put_sums(sh_draw_kernels(d), y, n, at);
    }
    if (w->id >= base && w->id < base + n) {
        h.flags |= VALUE;
        h.value = x[w->id - base];
    }
    (void)sh_draw_scan(d, x, n, &bad);
    if (bad) h.flags |= BAD;
    at = put_best(d, x, n, base, w->best, &h, at);
    memcpy(to, &h, sizeof h);
    *bytes = (size_t)(at - to);
}

/* --- collecting ----------------------------------------------------------------------------------------------------
 */

struct sh_row {
    int vocab, parts, next; /* next: id at which the next part begins */
    uint32_t flags;         /* LSE, HEAT: every part had them; BAD: some part; ALL: no other entry is possible */
    float *max, *sum;       /* [segments] */
    float *hot_max, *hot_sum;
    uint64_t *key; /* [parts · most], descending once joined */
    uint64_t *hot; /* the same in another scale */
    float *weight;
    int n, room;
    uint64_t frontier; /* below this, entries are missing */
    int32_t id;
    float value;
    int segment; /* −1: none was given */
    const float *entries;
    float *x;
    sh_arena arena;
};

sh_status sh_row_create(int vocab, int parts, sh_row **out) {
    sh_row *r = calloc(1, sizeof *r);
    if (!r) SH_FAIL(SH_EMEMORY, "no memory for a row in %d parts", parts);
    size_t s = (size_t)segments_of(vocab) * sizeof(float), n = (size_t)parts * SH_DIGEST_MOST;
    sh_status st =
        sh_arena_create(4 * s + n * (2 * sizeof(uint64_t) + sizeof(float)) + 8 * 64, "row in parts", &r->arena);
    if (st != SH_OK) {
        sh_row_destroy(&r);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    r->vocab = vocab;
    r->parts = parts;
    r->room = (int)n;
    r->max = sh_arena_take(&r->arena, s);
    r->sum = sh_arena_take(&r->arena, s);
    r->hot_max = sh_arena_take(&r->arena, s);
    r->hot_sum = sh_arena_take(&r->arena, s);
    r->key = sh_arena_take(&r->arena, n * sizeof *r->key);
    r->hot = sh_arena_take(&r->arena, n * sizeof *r->hot);
    r->weight = sh_arena_take(&r->arena, n * sizeof *r->weight);
    sh_row_clear(r);
    *out = r;
    return SH_OK;
}

void sh_row_destroy(sh_row **r) {
    if (!*r) return;
    sh_arena_release(&(*r)->arena);
    free(*r);
    *r = NULL;
}

void sh_row_clear(sh_row *r) {
    r->next = r->n = 0;
    r->flags = LSE | HEAT | ALL;
    r->frontier = 0;
    r->id = r->segment = -1;
    r->entries = NULL;
    r->x = NULL;
}

static void take_sums(const uint8_t *from, int n, float *max, float *sum) {
    size_t s = (size_t)segments_of(n) * sizeof(float);
    memcpy(max, from, s);
    memcpy(sum, from + s, s);
}

static sh_status check_header(const sh_row *r, const header *h, sh_range ids) {
    if (h->lo != ids.lo || h->hi != ids.hi || h->lo != r->next || h->hi > r->vocab)
        SH_FAIL(SH_EPEER, "digest of ids %d to %d: %d to %d were expected", h->lo, h->hi - 1, ids.lo, ids.hi - 1);
    if (h->n_best < 0 || h->n_best > SH_DIGEST_MOST || h->n_best > h->hi - h->lo || r->n + h->n_best > r->room)
        SH_FAIL(SH_EPEER, "digest of ids %d to %d: %d entries", h->lo, h->hi - 1, h->n_best);
    if (h->n_best == 0 && !(h->flags & ALL))
        SH_FAIL(SH_EPEER, "digest of ids %d to %d: no entry, but there are some", h->lo, h->hi - 1);
    return SH_OK;
}

static sh_status check_keys(const sh_row *r, const header *h) {
    const uint64_t *key = r->key + r->n;
    for (int i = 0; i < h->n_best; i++) {
        int32_t id = sh_draw_key_id(key[i]);
        if (id < h->lo || id >= h->hi || (i > 0 && key[i] >= key[i - 1]))
            SH_FAIL(SH_EPEER, "digest of ids %d to %d: entry %d has id %d: allowed are its ids, descending", h->lo,
                    h->hi - 1, i, id);
    }
    return SH_OK;
}

sh_status sh_row_add(sh_row *r, sh_range ids, const uint8_t *digest, size_t len, size_t *used) {
    header h;
    if (len < sizeof h) SH_FAIL(SH_EPEER, "digest of %zu bytes: at least %zu are needed", len, sizeof h);
    memcpy(&h, digest, sizeof h);
    SH_TRY(check_header(r, &h, ids));
    int n = h.hi - h.lo, at = h.lo / SH_DRAW_SEGMENT;
    size_t need = sizeof h + (size_t)h.n_best * sizeof(uint64_t);
    need += (h.flags & LSE ? sums_bytes(n) : 0) + (h.flags & HEAT ? sums_bytes(n) : 0);
    if (len < need) SH_FAIL(SH_EPEER, "digest of %zu bytes: %zu are needed", len, need);
    const uint8_t *from = digest + sizeof h;
    if (h.flags & LSE) {
        take_sums(from, n, r->max + at, r->sum + at);
        from += sums_bytes(n);
    }
    if (h.flags & HEAT) {
        take_sums(from, n, r->hot_max + at, r->hot_sum + at);
        from += sums_bytes(n);
    }
    memcpy(r->key + r->n, from, (size_t)h.n_best * sizeof(uint64_t));
    SH_TRY(check_keys(r, &h));
    if (h.flags & VALUE) {
        r->id = h.id;
        r->value = h.value;
    }
    r->n += h.n_best;
    if (!(h.flags & ALL) && r->key[r->n - 1] > r->frontier) r->frontier = r->key[r->n - 1];
    r->flags = (r->flags & h.flags) | ((r->flags | h.flags) & BAD);
    r->next = h.hi;
    *used = need;
    return SH_OK;
}

sh_status sh_row_join(sh_row *r) {
    if (r->next != r->vocab) SH_FAIL(SH_EPEER, "digests end at id %d of %d", r->next, r->vocab);
    sh_draw_sort(r->key, r->n);
    while (r->n > 0 && r->key[r->n - 1] < r->frontier) r->n--;
    return SH_OK;
}

void sh_row_give_segment(sh_row *r, int segment, const float *x) {
    r->segment = segment;
    r->entries = x;
}

void sh_row_give_all(sh_row *r, float *x) {
    r->x = x;
}

float *sh_row_all(const sh_row *r) {
    return r->x;
}

/* --- answering -----------------------------------------------------------------------------------------------------
 */

static sh_status check_row(const sh_row *r) {
    return sh_draw_check(r->n > 0 ? sh_draw_key_value(r->key[0]) : -INFINITY, r->flags & BAD);
}

sh_status sh_row_lse(const sh_row *r, sh_lse *out) {
    SH_TRY(check_row(r));
    if (!(r->flags & LSE)) SH_FAIL(SH_EPEER, "digests without the sums that log-probabilities need");
    *out = sh_draw_join(r->max, r->sum, segments_of(r->vocab));
    return SH_OK;
}

/* How many of r->hot (sorted) count in its scale: those strictly above the last, unless all are known. */
static int count_known(const sh_row *r) {
    if (r->flags & ALL || r->n == 0) return r->n;
    int n = r->n;
    float last = sh_draw_key_value(r->hot[n - 1]);
    while (n > 0 && sh_draw_key_value(r->hot[n - 1]) == last) n--;
    return n;
}

int sh_row_top(sh_row *r, sh_lse l, int k, sh_top_logprob *out, sh_row_ask *ask) {
    *ask = (sh_row_ask){0};
    if (k < 1) return 0;
    for (int i = 0; i < r->n; i++)
        r->hot[i] = sh_draw_key(sh_lse_logprob(l, sh_draw_key_value(r->key[i])), sh_draw_key_id(r->key[i]));
    sh_draw_sort(r->hot, r->n);
    int n = count_known(r);
    if (n < k && !(r->flags & ALL)) ask->kind = SH_ASK_ALL;
    if (n > k) n = k;
    for (int i = 0; i < n; i++)
        out[i] = (sh_top_logprob){.id = sh_draw_key_id(r->hot[i]), .logprob = sh_draw_key_value(r->hot[i])};
    return n;
}

/* The first n places that top_k keeps: ties with the k-th value too. */
static int with_ties(const sh_row *r, int known, int k) {
    if (known <= k) return known;
    float least = sh_draw_key_value(r->hot[k - 1]);
    while (k < known && sh_draw_key_value(r->hot[k]) == least) k++;
    return k;
}

/* Whether the set that top_p and min_p leave ends among the n entries that are known. */
static bool is_closed(const sh_row *r, const sh_sampling *p, int n, double seen, double whole) {
    if (p->top_p < 1 && seen >= (double)p->top_p * whole) return true;
    return n > 1 && r->weight[n - 1] < p->min_p;
}

static void draw_filtered(sh_row *r, const sh_sampling *p, double u, float top, int32_t *id, sh_row_ask *ask) {
    for (int i = 0; i < r->n; i++)
        r->hot[i] = sh_draw_key(sh_draw_key_value(r->key[i]) / p->temperature, sh_draw_key_id(r->key[i]));
    sh_draw_sort(r->hot, r->n);
    bool top_k = sh_draw_has_top_k(p, r->vocab), all = r->flags & ALL;
    int n = count_known(r);
    if (top_k) {
        if (n < p->top_k && !all) ask->kind = SH_ASK_ALL;
        n = with_ties(r, n, p->top_k);
    }
    double seen = sh_draw_weigh(r->hot, n, top, r->weight), total = 0;
    double whole = seen;
    if (!top_k && p->top_p < 1) whole = sh_draw_mass(r->hot_max, r->hot_sum, segments_of(r->vocab), top);
    if (!top_k && !all && !is_closed(r, p, n, seen, whole)) ask->kind = SH_ASK_ALL;
    if (ask->kind != SH_ASK_NOTHING) return;
    int kept = sh_draw_keep(p, r->weight, n, whole, &total);
    *id = sh_draw_key_id(r->hot[sh_draw_pick(r->weight, kept, total, u)]);
}

static void draw_unfiltered(const sh_row *r, const sh_sampling *p, double u, float top, int32_t *id, sh_row_ask *ask) {
    int segments = segments_of(r->vocab);
    double rest = u * sh_draw_mass(r->hot_max, r->hot_sum, segments, top);
    int s = sh_draw_pick_segment(r->hot_max, r->hot_sum, segments, top, &rest);
    if (s != r->segment) {
        *ask = (sh_row_ask){.kind = SH_ASK_SEGMENT, .segment = s};
        return;
    }
    int at = s * SH_DRAW_SEGMENT, n = r->vocab - at < SH_DRAW_SEGMENT ? r->vocab - at : SH_DRAW_SEGMENT;
    float y[SH_DRAW_SEGMENT];
    for (int i = 0; i < n; i++) y[i] = r->entries[i] / p->temperature;
    *id = sh_draw_pick_entry(y, n, at, top, rest);
}

sh_status sh_row_id(sh_row *r, const sh_sampling *p, double u, int32_t *id, sh_row_ask *ask) {
    SH_TRY(check_row(r));
    *ask = (sh_row_ask){0};
    if (!(p->temperature >= SH_DRAW_GREEDY)) {
        *id = sh_draw_key_id(r->key[0]);
        return SH_OK;
    }
    float top = sh_draw_key_value(r->key[0]) / p->temperature;
    SH_TRY(sh_draw_check(top, 0));
    bool filtered = sh_draw_is_filtered(p, r->vocab), sums = !filtered || !sh_draw_has_top_k(p, r->vocab);
    if (sums && (!filtered || p->top_p < 1) && !(r->flags & HEAT))
        SH_FAIL(SH_EPEER, "digests without the sums that drawing needs");
    if (filtered)
        draw_filtered(r, p, u, top, id, ask);
    else
        draw_unfiltered(r, p, u, top, id, ask);
    return SH_OK;
}

sh_status sh_row_value(const sh_row *r, int32_t id, float *out) {
    if (id == r->id) {
        *out = r->value;
        return SH_OK;
    }
    if (r->entries && id / SH_DRAW_SEGMENT == r->segment) {
        *out = r->entries[id % SH_DRAW_SEGMENT];
        return SH_OK;
    }
    for (int i = 0; i < r->n; i++) {
        if (sh_draw_key_id(r->key[i]) != id) continue;
        *out = sh_draw_key_value(r->key[i]);
        return SH_OK;
    }
    SH_FAIL(SH_ESTATE, "the logit of id %d is in no digest", id);
}
