/* Private to draw.c and digest.c, which must choose alike: the order of entries, segments, and what filters leave. */
#ifndef SH_MODEL_DRAW_INT_H
#define SH_MODEL_DRAW_INT_H

#include "model/draw.h"

/* Entries as 64-bit keys: larger keys come first: larger value, then lower id. −0 and 0 are one value. */
uint64_t sh_draw_key(float value, int32_t id);
int32_t sh_draw_key_id(uint64_t key);
float sh_draw_key_value(uint64_t key);
/* Descending; keys are all different. */
void sh_draw_sort(uint64_t *key, int n);

/* The largest entry of x [n], n at most the vocabulary; *bad becomes non-zero when one is NaN. */
float sh_draw_scan(sh_draw *d, const float *x, int n, int *bad);
/* Fails unless that is a row to choose from: nothing NaN, the largest finite. */
sh_status sh_draw_check(float max, int bad);
/* After a scan of x: the entries that are at least as large as the want-th largest, impossible ones left out, as sorted
 * keys in sh_draw_keys, ids counted from `base`. Returns how many: want or more (ties), or fewer when fewer are
 * possible. */
int sh_draw_best(sh_draw *d, const float *x, int n, int base, int want);
const uint64_t *sh_draw_keys(const sh_draw *d);
float *sh_draw_scratch(sh_draw *d); /* [vocab], overwritten by whatever draws */
const sh_kernels *sh_draw_kernels(const sh_draw *d);

/* Max and sum of each segment of x [n]; a segment without a possible entry has max −∞ and sum 0. */
void sh_draw_segments(const sh_kernels *kn, const float *x, int n, float *max, float *sum);
sh_lse sh_draw_join(const float *max, const float *sum, int n_segments);
/* Σ exp(y − top) of a row, by its segments. */
double sh_draw_mass(const float *max, const float *sum, int n_segments, float top);
/* The segment in which `*rest` of that is reached; *rest becomes what is left of it there. */
int sh_draw_pick_segment(const float *max, const float *sum, int n_segments, float top, double *rest);
/* The entry of y [n] at which `rest` is reached; ids from `base`. */
int32_t sh_draw_pick_entry(const float *y, int n, int base, float top, double rest);

/* Whether p limits the set of candidates at all; whether its top_k does. */
bool sh_draw_is_filtered(const sh_sampling *p, int vocab);
bool sh_draw_has_top_k(const sh_sampling *p, int vocab);
/* weight[i] = exp(value of key[i] − top); returns their sum. */
double sh_draw_weigh(const uint64_t *key, int n, float top, float *weight);
/* How many of the n likeliest top_p (of the mass `whole`) and then min_p leave: at least 1; *total their weight. */
int sh_draw_keep(const sh_sampling *p, const float *weight, int n, double whole, double *total);
/* The place at which the running sum of the weights exceeds u · total. */
int sh_draw_pick(const float *weight, int n, double total, double u);

#endif
