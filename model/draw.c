/*
 * The numerics of choosing a token. See draw.h. Does not know sequences, stop rules or ranks.
 *
 * A vocabulary has up to 262,144 entries, so nothing here sorts all of it unless a request asks for a set that large:
 * maxima of 256-entry blocks bound the k-th value from below, only blocks that reach the bound are looked at, and
 * quickselect finishes. Order is that of 64-bit keys (value bits, then inverted id), all different, so every algorithm
 * gives one answer.
 */
#include "model/draw_int.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/hash.h"
#include "common/mem.h"

#define BLOCK      256 /* entries per maximum kept for selection */
#define LANES      16
#define FIRST_LOOK 256 /* candidates tried first when only top_p or min_p limits the set */

struct sh_draw {
    const sh_kernels *kn;
    int vocab, n_blocks, n_segments;
    size_t bytes;
    float *y;         /* [vocab] the row in the scale being looked at */
    float *weight;    /* [vocab] */
    uint64_t *key;    /* [vocab] */
    int32_t *id;      /* [vocab] */
    float *block_max; /* [n_blocks] */
    uint64_t *block_key;
    float *seg_max, *seg_sum; /* [n_segments] */
};

static void *carve(char **at, size_t bytes) {
    void *p = *at;
    *at += sh_mem_align(bytes);
    return p;
}

static size_t lay_out(sh_draw *d, char *base) {
    char *at = base;
    size_t v = (size_t)d->vocab, b = (size_t)d->n_blocks, s = (size_t)d->n_segments;
    d->y = carve(&at, v * sizeof *d->y);
    d->weight = carve(&at, v * sizeof *d->weight);
    d->key = carve(&at, v * sizeof *d->key);
    d->id = carve(&at, v * sizeof *d->id);
    d->block_max = carve(&at, b * sizeof *d->block_max);
    d->block_key = carve(&at, b * sizeof *d->block_key);
    d->seg_max = carve(&at, s * sizeof *d->seg_max);
    d->seg_sum = carve(&at, s * sizeof *d->seg_sum);
    return (size_t)(at - base);
}

sh_status sh_draw_create(const sh_kernels *kn, int vocab, sh_draw **out) {
    if (vocab < 1) SH_FAIL(SH_EINPUT, "vocabulary: %d entries: at least 1 is needed", vocab);
    sh_draw *d = calloc(1, sizeof *d);
    if (!d) SH_FAIL(SH_EMEMORY, "no memory for a sampler");
    d->kn = kn;
    d->vocab = vocab;
    d->n_blocks = (vocab + BLOCK - 1) / BLOCK;
    d->n_segments = (vocab + SH_DRAW_SEGMENT - 1) / SH_DRAW_SEGMENT;
    d->bytes = (size_t)vocab * 20 + (size_t)d->n_blocks * 12 + (size_t)d->n_segments * 8 + 8 * 64;
    void *base = NULL;
    sh_status st = sh_mem_alloc(d->bytes, "sampler scratch", &base);
    if (st != SH_OK) {
        free(d);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    lay_out(d, base);
    *out = d;
    return SH_OK;
}

void sh_draw_destroy(sh_draw **d) {
    if (!*d) return;
    sh_mem_free((*d)->y, (*d)->bytes);
    free(*d);
    *d = NULL;
}

/* --- order --- */

uint64_t sh_draw_key(float value, int32_t id) {
    uint32_t b;
    float v = value + 0.0f; /* makes −0 and 0 one value */
    memcpy(&b, &v, 4);
    b ^= b >> 31 ? 0xffffffffu : 0x80000000u;
    return (uint64_t)b << 32 | (uint32_t) ~(uint32_t)id;
}

int32_t sh_draw_key_id(uint64_t key) {
    return (int32_t) ~(uint32_t)key;
}

float sh_draw_key_value(uint64_t key) {
    uint32_t b = (uint32_t)(key >> 32);
    b ^= b >> 31 ? 0x80000000u : 0xffffffffu;
    float v;
    memcpy(&v, &b, 4);
    return v;
}

static inline void swap_keys(uint64_t *a, uint64_t *b) {
    uint64_t t = *a;
    *a = *b;
    *b = t;
}

/* Partitions key [lo, hi) in descending order around a pivot chosen by a hash of the bounds, so that no regular row of
 * logits makes it slow. Returns the pivot's final place. */
static int split(uint64_t *key, int lo, int hi) {
    int at = lo + (int)(sh_mix64((uint64_t)lo << 32 | (uint32_t)hi) % (uint64_t)(hi - lo));
    uint64_t pivot = key[at];
    swap_keys(&key[at], &key[hi - 1]);
    int end = lo;
    for (int i = lo; i < hi - 1; i++)
        if (key[i] > pivot) swap_keys(&key[i], &key[end++]);
    swap_keys(&key[end], &key[hi - 1]);
    return end;
}

/* Moves the k largest of n different keys to the front, in any order; the k-th largest is at key[k − 1]. */
static void select_keys(uint64_t *key, int n, int k) {
    int lo = 0, hi = n;
    while (hi - lo > 1) {
        int p = split(key, lo, hi);
        if (p == k - 1) return;
        if (p < k - 1)
            lo = p + 1;
        else
            hi = p;
    }
}

static void sort_keys(uint64_t *key, int lo, int hi) {
    while (hi - lo > 16) {
        int p = split(key, lo, hi);
        if (p - lo < hi - p - 1) { /* the shorter side by recursion: depth stays below log2(n) */
            sort_keys(key, lo, p);
            lo = p + 1;
        } else {
            sort_keys(key, p + 1, hi);
            hi = p;
        }
    }
    for (int i = lo + 1; i < hi; i++) {
        uint64_t k = key[i];
        int j = i;
        for (; j > lo && key[j - 1] < k; j--) key[j] = key[j - 1];
        key[j] = k;
    }
}

void sh_draw_sort(uint64_t *key, int n) {
    sort_keys(key, 0, n);
}

const uint64_t *sh_draw_keys(const sh_draw *d) {
    return d->key;
}

float *sh_draw_scratch(sh_draw *d) {
    return d->y;
}

const sh_kernels *sh_draw_kernels(const sh_draw *d) {
    return d->kn;
}

/* Largest entry by lanes (the compiler turns them into vectors); *bad becomes non-zero when an entry is NaN. */
static float lane_max(const float *x, int n, int *bad) {
    float m[LANES];
    int nan[LANES] = {0};
    for (int j = 0; j < LANES; j++) m[j] = -INFINITY;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            m[j] = x[i + j] > m[j] ? x[i + j] : m[j];
            nan[j] |= x[i + j] != x[i + j];
        }
    for (int j = 0; i + j < n; j++) {
        m[j] = x[i + j] > m[j] ? x[i + j] : m[j];
        nan[j] |= x[i + j] != x[i + j];
    }
    float best = m[0];
    for (int j = 0; j < LANES; j++) {
        best = m[j] > best ? m[j] : best;
        *bad |= nan[j];
    }
    return best;
}

static int blocks_of(int n) {
    return (n + BLOCK - 1) / BLOCK;
}

static int block_len(int n, int b) {
    return n - b * BLOCK < BLOCK ? n - b * BLOCK : BLOCK;
}

float sh_draw_scan(sh_draw *d, const float *x, int n, int *bad) {
    float best = -INFINITY;
    for (int b = 0; b < blocks_of(n); b++) {
        d->block_max[b] = lane_max(x + (size_t)b * BLOCK, block_len(n, b), bad);
        if (d->block_max[b] > best) best = d->block_max[b];
    }
    return best;
}

sh_status sh_draw_check(float best, int bad) {
    if (bad) SH_FAIL(SH_EFORMAT, "logits: one is not a number: allowed are finite numbers");
    if (best == INFINITY) SH_FAIL(SH_EFORMAT, "logits: one is infinite: allowed are finite numbers");
    if (best == -INFINITY)
        SH_FAIL(SH_EFORMAT, "logits: no token is possible: at least one must be left to choose from");
    return SH_OK;
}

/* Of the whole row. */
static sh_status scan(sh_draw *d, const float *x, float *max) {
    int bad = 0;
    float best = sh_draw_scan(d, x, d->vocab, &bad);
    SH_TRY(sh_draw_check(best, bad));
    *max = best;
    return SH_OK;
}

int sh_draw_best(sh_draw *d, const float *x, int len, int base, int want) {
    float bound = -INFINITY;
    int blocks = blocks_of(len);
    if (want <=
        blocks) { /* each of the `want` largest maxima is an entry, so the want-th largest entry is no smaller */
        for (int b = 0; b < blocks; b++) d->block_key[b] = sh_draw_key(d->block_max[b], b);
        select_keys(d->block_key, blocks, want);
        bound = sh_draw_key_value(d->block_key[want - 1]);
    }
    int n = 0;
    for (int b = 0; b < blocks; b++) {
        if (d->block_max[b] < bound) continue;
        const float *y = x + (size_t)b * BLOCK;
        for (int i = 0; i < block_len(len, b); i++)
            if (y[i] >= bound && y[i] > -INFINITY) d->key[n++] = sh_draw_key(y[i], base + b * BLOCK + i);
    }
    if (n > want) {
        select_keys(d->key, n, want);
        float least = sh_draw_key_value(d->key[want - 1]);
        int kept = want;
        for (int i = want; i < n; i++)
            if (sh_draw_key_value(d->key[i]) == least) swap_keys(&d->key[kept++], &d->key[i]);
        n = kept;
    }
    sort_keys(d->key, 0, n);
    return n;
}

/* --- log-sum-exp --- */

void sh_draw_segments(const sh_kernels *kn, const float *x, int n, float *max, float *sum) {
    for (int at = 0; at < n; at += SH_DRAW_SEGMENT, max++, sum++) {
        kn->max_sum_exp(x + at, n - at < SH_DRAW_SEGMENT ? n - at : SH_DRAW_SEGMENT, max, sum);
        if (*max == -INFINITY) *sum = 0;
    }
}

sh_lse sh_draw_join(const float *max, const float *sum, int n_segments) {
    float m = -INFINITY, all = 0;
    for (int s = 0; s < n_segments; s++) {
        float b = max[s];
        if (b == -INFINITY) continue;
        if (m == -INFINITY) {
            m = b;
            all = sum[s];
        } else if (b > m) {
            all = fmaf(sh_expf(m - b), all, sum[s]);
            m = b;
        } else
            all = fmaf(sh_expf(b - m), sum[s], all);
    }
    return (sh_lse){.max = m, .log_sum = sh_logf(all)};
}

sh_status sh_draw_lse(sh_draw *d, const float *x, sh_lse *out) {
    float max = 0;
    SH_TRY(scan(d, x, &max));
    sh_draw_segments(d->kn, x, d->vocab, d->seg_max, d->seg_sum);
    *out = sh_draw_join(d->seg_max, d->seg_sum, d->n_segments);
    return SH_OK;
}

int sh_draw_top(sh_draw *d, const float *x, sh_lse l, int k, sh_top_logprob *out) {
    if (k < 1) return 0;
    if (k > d->vocab) k = d->vocab;
    for (int i = 0; i < d->vocab; i++) d->y[i] = sh_lse_logprob(l, x[i]);
    int bad = 0;
    (void)sh_draw_scan(d, d->y, d->vocab, &bad);
    int n = sh_draw_best(d, d->y, d->vocab, 0, k);
    if (n > k) n = k;
    for (int i = 0; i < n; i++)
        out[i] = (sh_top_logprob){.id = sh_draw_key_id(d->key[i]), .logprob = sh_draw_key_value(d->key[i])};
    return n;
}

/* --- choice --- */

sh_status sh_draw_greedy(sh_draw *d, const float *x, int32_t *id) {
    float max = 0;
    SH_TRY(scan(d, x, &max));
    int i = 0;
    while (x[i] != max) i++;
    *id = i;
    return SH_OK;
}

/* d->y = x / temperature and its block maxima. */
static sh_status heat(sh_draw *d, const float *x, float temperature, float *max) {
    for (int i = 0; i < d->vocab; i++) d->y[i] = x[i] / temperature;
    SH_TRY(scan(d, d->y, max));
    return SH_OK;
}

double sh_draw_mass(const float *max, const float *sum, int n_segments, float top) {
    double z = 0;
    for (int s = 0; s < n_segments; s++)
        if (sum[s] > 0) z += (double)sum[s] * (double)sh_expf(max[s] - top);
    return z;
}

/* Σ exp(y − max) over the whole row, segment by segment. */
static double row_mass(sh_draw *d, float max) {
    sh_draw_segments(d->kn, d->y, d->vocab, d->seg_max, d->seg_sum);
    return sh_draw_mass(d->seg_max, d->seg_sum, d->n_segments, max);
}

double sh_draw_weigh(const uint64_t *key, int n, float top, float *weight) {
    double total = 0;
    for (int i = 0; i < n; i++) {
        weight[i] = sh_expf(sh_draw_key_value(key[i]) - top);
        total += (double)weight[i];
    }
    return total;
}

/* The first place at which the sum of the weights reaches `share`, as a count; n when none does. */
static int count_mass(const float *w, int n, double share) {
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += (double)w[i];
        if (sum >= share) return i + 1;
    }
    return n;
}

bool sh_draw_has_top_k(const sh_sampling *p, int vocab) {
    return p->top_k > 0 && p->top_k < vocab;
}

bool sh_draw_is_filtered(const sh_sampling *p, int vocab) {
    return sh_draw_has_top_k(p, vocab) || p->top_p < 1 || p->min_p > 0;
}

int sh_draw_keep(const sh_sampling *p, const float *weight, int n, double whole, double *total) {
    if (p->top_p < 1) n = count_mass(weight, n, (double)p->top_p * whole);
    int kept = 1; /* weights fall, so what min_p leaves is a prefix; the first always stays */
    while (kept < n && weight[kept] >= p->min_p) kept++;
    double sum = 0;
    for (int i = 0; i < kept; i++) sum += (double)weight[i];
    *total = sum;
    return kept;
}

sh_status sh_draw_support(sh_draw *d, const float *x, const sh_sampling *p, sh_support *out) {
    float max = 0;
    SH_TRY(heat(d, x, p->temperature, &max));
    bool top_k = sh_draw_has_top_k(p, d->vocab), top_p = p->top_p < 1;
    double whole = !top_k && top_p ? row_mass(d, max) : 0;
    int n, want = top_k ? p->top_k : FIRST_LOOK;
    for (;; want *= 8) { /* without top_k: look at more until the set that top_p or min_p leaves is among them */
        if (want > d->vocab) want = d->vocab;
        n = sh_draw_best(d, d->y, d->vocab, 0, want);
        double seen = sh_draw_weigh(d->key, n, max, d->weight);
        if (top_k) whole = seen;
        bool all = top_k || want == d->vocab;
        if (all || (top_p ? seen >= (double)p->top_p * whole : d->weight[n - 1] < p->min_p)) break;
    }
    double total = 0;
    int kept = sh_draw_keep(p, d->weight, n, whole, &total);
    for (int i = 0; i < kept; i++) d->id[i] = sh_draw_key_id(d->key[i]);
    *out = (sh_support){.n = kept, .id = d->id, .weight = d->weight, .total = total};
    return SH_OK;
}

int sh_draw_pick_segment(const float *max, const float *sum, int n_segments, float top, double *rest) {
    int seg = -1;
    for (int s = 0; s < n_segments; s++) {
        if (!(sum[s] > 0)) continue;
        double mass = (double)sum[s] * (double)sh_expf(max[s] - top);
        if (!(mass > 0)) continue;
        seg = s; /* the last one that has weight takes what rounding leaves over */
        if (*rest < mass) break;
        *rest -= mass;
    }
    return seg;
}

int32_t sh_draw_pick_entry(const float *y, int n, int base, float top, double rest) {
    int last = base;
    for (int i = 0; i < n; i++) {
        double w = y[i] > -INFINITY ? (double)sh_expf(y[i] - top) : 0;
        if (!(w > 0)) continue;
        last = base + i;
        if (rest < w) break;
        rest -= w;
    }
    return last;
}

/* No filter: the segment is found by the segments' sums, the entry by walking it. */
static sh_status draw_unfiltered(sh_draw *d, const float *x, const sh_sampling *p, double u, int32_t *id) {
    float max = 0;
    SH_TRY(heat(d, x, p->temperature, &max));
    double rest = u * row_mass(d, max);
    int at = sh_draw_pick_segment(d->seg_max, d->seg_sum, d->n_segments, max, &rest) * SH_DRAW_SEGMENT;
    int n = d->vocab - at < SH_DRAW_SEGMENT ? d->vocab - at : SH_DRAW_SEGMENT;
    *id = sh_draw_pick_entry(d->y + at, n, at, max, rest);
    return SH_OK;
}

int sh_draw_pick(const float *weight, int n, double total, double u) {
    double at = u * total, sum = 0;
    int i = 0;
    for (; i < n - 1; i++) {
        sum += (double)weight[i];
        if (sum > at) break;
    }
    return i;
}

sh_status sh_draw_id(sh_draw *d, const float *x, const sh_sampling *p, double u, int32_t *id) {
    if (!(p->temperature >= SH_DRAW_GREEDY)) return sh_draw_greedy(d, x, id);
    if (!sh_draw_is_filtered(p, d->vocab)) return draw_unfiltered(d, x, p, u, id);
    sh_support s;
    SH_TRY(sh_draw_support(d, x, p, &s));
    *id = s.id[sh_draw_pick(s.weight, s.n, s.total, u)];
    return SH_OK;
}

/* --- random numbers --- */

void sh_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]}, k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xd2511f53u * c[0], b = (uint64_t)0xcd9e8d57u * c[2];
        uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ k0, n2 = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[0] = n0;
        c[1] = (uint32_t)b;
        c[2] = n2;
        c[3] = (uint32_t)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    memcpy(out, c, sizeof c);
}

double sh_draw_uniform(uint64_t seed, uint32_t choice, uint32_t position) {
    const uint32_t counter[4] = {position, choice, 0, 0}, key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t r[4];
    sh_philox4x32(counter, key, r);
    return (double)(((uint64_t)r[0] << 32 | r[1]) >> 11) * 0x1p-53;
}
