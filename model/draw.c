/*
 * The numerics of choosing a token. See draw.h. Does not know sequences, stop rules or ranks.
 *
 * A vocabulary has up to 262,144 entries, so nothing here sorts all of it unless a request asks for a set that large:
 * maxima of 256-entry blocks bound the k-th value from below, only blocks that reach the bound are looked at, and
 * quickselect finishes. Order is that of 64-bit keys (value bits, then inverted id), all different, so every algorithm
 * gives one answer.
 */
#include "model/draw.h"

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
    *at += (bytes + 63) & ~(size_t)63;
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

/* Larger keys come first: larger value, then lower id. Adding 0 makes −0 and 0 one value. */
static uint64_t key_of(float value, int32_t id) {
    uint32_t b;
    float v = value + 0.0f;
    memcpy(&b, &v, 4);
    b ^= b >> 31 ? 0xffffffffu : 0x80000000u;
    return (uint64_t)b << 32 | (uint32_t) ~(uint32_t)id;
}

static int32_t key_id(uint64_t key) {
    return (int32_t) ~(uint32_t)key;
}

static float key_value(uint64_t key) {
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

static int block_len(const sh_draw *d, int b) {
    return b + 1 < d->n_blocks ? BLOCK : d->vocab - b * BLOCK;
}

/* Maxima of the blocks of x, and over all. Fails unless the maximum is finite and nothing is NaN. */
static sh_status scan(sh_draw *d, const float *x, float *max) {
    float best = -INFINITY;
    int bad = 0;
    for (int b = 0; b < d->n_blocks; b++) {
        d->block_max[b] = lane_max(x + (size_t)b * BLOCK, block_len(d, b), &bad);
        if (d->block_max[b] > best) best = d->block_max[b];
    }
    if (bad) SH_FAIL(SH_EFORMAT, "logits: one is not a number: allowed are finite numbers");
    if (best == INFINITY) SH_FAIL(SH_EFORMAT, "logits: one is infinite: allowed are finite numbers");
    if (best == -INFINITY)
        SH_FAIL(SH_EFORMAT, "logits: no token is possible: at least one must be left to choose from");
    *max = best;
    return SH_OK;
}

/* The entries of d->y (whose block maxima are known) that are at least as large as the want-th largest, impossible ones
 * left out → d->key, sorted. Returns how many: want or more (ties), or fewer when fewer are possible. */
static int best_keys(sh_draw *d, int want) {
    float bound = -INFINITY;
    if (want <=
        d->n_blocks) { /* each of the `want` largest maxima is an entry, so the want-th largest entry is no smaller */
        for (int b = 0; b < d->n_blocks; b++) d->block_key[b] = key_of(d->block_max[b], b);
        select_keys(d->block_key, d->n_blocks, want);
        bound = key_value(d->block_key[want - 1]);
    }
    int n = 0;
    for (int b = 0; b < d->n_blocks; b++) {
        if (d->block_max[b] < bound) continue;
        const float *y = d->y + (size_t)b * BLOCK;
        for (int i = 0, len = block_len(d, b); i < len; i++)
            if (y[i] >= bound && y[i] > -INFINITY) d->key[n++] = key_of(y[i], b * BLOCK + i);
    }
    if (n > want) {
        select_keys(d->key, n, want);
        float least = key_value(d->key[want - 1]);
        int kept = want;
        for (int i = want; i < n; i++)
            if (key_value(d->key[i]) == least) swap_keys(&d->key[kept++], &d->key[i]);
        n = kept;
    }
    sort_keys(d->key, 0, n);
    return n;
}

/* --- log-sum-exp --- */

/* Max and sum of each segment of x; a segment without a possible entry has max −∞ and sum 0. */
static void segments(sh_draw *d, const float *x) {
    for (int s = 0; s < d->n_segments; s++) {
        int at = s * SH_DRAW_SEGMENT, n = d->vocab - at < SH_DRAW_SEGMENT ? d->vocab - at : SH_DRAW_SEGMENT;
        d->kn->max_sum_exp(x + at, n, &d->seg_max[s], &d->seg_sum[s]);
        if (d->seg_max[s] == -INFINITY) d->seg_sum[s] = 0;
    }
}

sh_status sh_draw_lse(sh_draw *d, const float *x, sh_lse *out) {
    float max;
    SH_TRY(scan(d, x, &max));
    segments(d, x);
    float m = -INFINITY, sum = 0;
    for (int s = 0; s < d->n_segments; s++) {
        float b = d->seg_max[s];
        if (b == -INFINITY) continue;
        if (m == -INFINITY) {
            m = b;
            sum = d->seg_sum[s];
        } else if (b > m) {
            sum = fmaf(sh_expf(m - b), sum, d->seg_sum[s]);
            m = b;
        } else
            sum = fmaf(sh_expf(b - m), d->seg_sum[s], sum);
    }
    *out = (sh_lse){.max = m, .log_sum = sh_logf(sum)};
    return SH_OK;
}

int sh_draw_top(sh_draw *d, const float *x, sh_lse l, int k, sh_top_logprob *out) {
    if (k < 1) return 0;
    if (k > d->vocab) k = d->vocab;
    for (int i = 0; i < d->vocab; i++) d->y[i] = sh_lse_logprob(l, x[i]);
    int bad = 0;
    for (int b = 0; b < d->n_blocks; b++) d->block_max[b] = lane_max(d->y + (size_t)b * BLOCK, block_len(d, b), &bad);
    int n = best_keys(d, k);
    if (n > k) n = k;
    for (int i = 0; i < n; i++) out[i] = (sh_top_logprob){.id = key_id(d->key[i]), .logprob = key_value(d->key[i])};
    return n;
}

/* --- choice --- */

sh_status sh_draw_greedy(sh_draw *d, const float *x, int32_t *id) {
    float max;
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

/* Σ exp(y − max) over the whole row, segment by segment. */
static double row_weight(sh_draw *d, float max) {
    segments(d, d->y);
    double z = 0;
    for (int s = 0; s < d->n_segments; s++)
        if (d->seg_sum[s] > 0) z += (double)d->seg_sum[s] * (double)sh_expf(d->seg_max[s] - max);
    return z;
}

static double weigh(sh_draw *d, int n, float max) {
    double total = 0;
    for (int i = 0; i < n; i++) {
        d->weight[i] = sh_expf(key_value(d->key[i]) - max);
        total += (double)d->weight[i];
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

sh_status sh_draw_support(sh_draw *d, const float *x, const sh_sampling *p, sh_support *out) {
    float max;
    SH_TRY(heat(d, x, p->temperature, &max));
    bool top_k = p->top_k > 0 && p->top_k < d->vocab, top_p = p->top_p < 1;
    double whole = !top_k && top_p ? row_weight(d, max) : 0;
    int n, want = top_k ? p->top_k : FIRST_LOOK;
    for (;; want *= 8) { /* without top_k: look at more until the set that top_p or min_p leaves is among them */
        if (want > d->vocab) want = d->vocab;
        n = best_keys(d, want);
        double seen = weigh(d, n, max);
        if (top_k) whole = seen;
        bool all = top_k || want == d->vocab;
        if (all || (top_p ? seen >= (double)p->top_p * whole : d->weight[n - 1] < p->min_p)) break;
    }
    if (top_p) n = count_mass(d->weight, n, (double)p->top_p * whole);
    int kept = 1; /* weights fall, so what min_p leaves is a prefix; the first always stays */
    while (kept < n && d->weight[kept] >= p->min_p) kept++;
    double total = 0;
    for (int i = 0; i < kept; i++) {
        d->id[i] = key_id(d->key[i]);
        total += (double)d->weight[i];
    }
    *out = (sh_support){.n = kept, .id = d->id, .weight = d->weight, .total = total};
    return SH_OK;
}

/* No filter: the segment is found by the segments' sums, the entry by walking it. */
static sh_status draw_unfiltered(sh_draw *d, const float *x, const sh_sampling *p, double u, int32_t *id) {
    float max;
    SH_TRY(heat(d, x, p->temperature, &max));
    double rest = u * row_weight(d, max);
    int seg = -1;
    for (int s = 0; s < d->n_segments; s++) {
        if (!(d->seg_sum[s] > 0)) continue;
        double mass = (double)d->seg_sum[s] * (double)sh_expf(d->seg_max[s] - max);
        if (!(mass > 0)) continue;
        seg = s; /* the last one that has weight takes what rounding leaves over */
        if (rest < mass) break;
        rest -= mass;
    }
    int at = seg * SH_DRAW_SEGMENT, n = d->vocab - at < SH_DRAW_SEGMENT ? d->vocab - at : SH_DRAW_SEGMENT;
    int last = at;
    for (int i = at; i < at + n; i++) {
        double w = d->y[i] > -INFINITY ? (double)sh_expf(d->y[i] - max) : 0;
        if (!(w > 0)) continue;
        last = i;
        if (rest < w) break;
        rest -= w;
    }
    *id = last;
    return SH_OK;
}

sh_status sh_draw_id(sh_draw *d, const float *x, const sh_sampling *p, double u, int32_t *id) {
    if (!(p->temperature >= SH_DRAW_GREEDY)) {
        SH_TRY(sh_draw_greedy(d, x, id));
        return SH_OK;
    }
    bool filtered = (p->top_k > 0 && p->top_k < d->vocab) || p->top_p < 1 || p->min_p > 0;
    if (!filtered) {
        SH_TRY(draw_unfiltered(d, x, p, u, id));
        return SH_OK;
    }
    sh_support s;
    SH_TRY(sh_draw_support(d, x, p, &s));
    double at = u * s.total, sum = 0;
    int i = 0;
    for (; i < s.n - 1; i++) {
        sum += (double)s.weight[i];
        if (sum > at) break;
    }
    *id = s.id[i];
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
