/*
 * Logits → one id: log-sum-exp, log-probabilities, the filters temperature → top-k → top-p → min-p, and the draw. Pure
 * numbers: no sequences, no stop rules (sampler.h has those). Source: transformers' LogitsProcessors (TopKLogitsWarper
 * keeps ties with the k-th value, TopPLogitsWarper keeps the smallest set of the likeliest tokens whose probability
 * reaches top_p, MinPLogitsWarper drops what is less likely than min_p times the likeliest); docs/decisions/0009.
 *
 * Every result depends on the logits alone: sums run in a fixed order, and entries are ordered by value, then by lower
 * id. One sh_draw serves one thread at a time; it owns scratch for one row of logits and allocates only in
 * sh_draw_create.
 */
#ifndef SH_MODEL_DRAW_H
#define SH_MODEL_DRAW_H

#include "model/kernels/kernels.h"
#include "model/sampling.h"

#define SH_DRAW_SEGMENT 1024  /* entries per segment of a log-sum-exp */
#define SH_DRAW_GREEDY  1e-5f /* temperatures below this are greedy */

typedef struct sh_draw sh_draw;

sh_status sh_draw_create(const sh_kernels *kn, int vocab, sh_draw **out);
void sh_draw_destroy(sh_draw **d);

/* max and log Σ exp(x − max) over x [vocab], by segments merged in ascending order. Entries of −∞ count as impossible.
 * NaN, +∞ or no possible entry at all fail. */
typedef struct sh_lse {
    float max, log_sum;
} sh_lse;
sh_status sh_draw_lse(sh_draw *d, const float *x, sh_lse *out);
static inline float sh_lse_logprob(sh_lse l, float x) {
    return (x + 0.0f - l.max) - l.log_sum; /* −0 counts as 0, as in the order of entries */
}

/* The k likeliest ids with their log-probabilities (logprob descending, id ascending) → out [k]; fewer when fewer are
 * possible. Returns how many. */
int sh_draw_top(sh_draw *d, const float *x, sh_lse l, int k, sh_top_logprob *out);

/* The largest entry's lowest id. Fails when no entry is finite or one is NaN. */
sh_status sh_draw_greedy(sh_draw *d, const float *x, int32_t *id);

/* What remains after the filters of p: n candidates (value descending, id ascending), their weights exp(y − y_max) with
 * y = x / temperature, and the sum of the weights. The arrays live until the next call on d. */
typedef struct sh_support {
    int n;
    const int32_t *id;
    const float *weight;
    double total;
} sh_support;
sh_status sh_draw_support(sh_draw *d, const float *x, const sh_sampling *p, sh_support *out);

/* One id for u in [0, 1): the first candidate at which the running sum of weights exceeds u · total. Greedy when p asks
 * for it. Without any filter the candidates stand in order of id, else in order of weight. */
sh_status sh_draw_id(sh_draw *d, const float *x, const sh_sampling *p, double u, int32_t *id);

/* The random number of one draw: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
 * 3", SC 2011) with key = seed and counter = (position, choice, 0, 0); its first 53 bits as a fraction in [0, 1). */
double sh_draw_uniform(uint64_t seed, uint32_t choice, uint32_t position);
/* The generator itself, for known-answer tests. */
void sh_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

#endif
