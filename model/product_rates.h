/*
 * How fast products with weights run on a team, for the planner: each storage type with the shapes of a decode step
 * (one row: weights are what takes the time) and of a prompt (many rows: arithmetic is).
 */
#ifndef SH_MODEL_PRODUCT_RATES_H
#define SH_MODEL_PRODUCT_RATES_H

#include "common/status.h"
#include "model/kernels/kernels.h"
#include "model/team.h"

#define SH_PRODUCT_ROWS 64
#define SH_PRODUCT_FEW  8
#define SH_PRODUCT_FEWS 6 /* 1, 2, 4, … 32 rows */
#define SH_PRODUCT_MOST 16

/* The longer of reading and computing, and `both` times the shorter, are the seconds that were measured. */
typedef struct sh_product_rates {
    double read[SH_W_TYPES];  /* bytes/s of weights with one row */
    double flops[SH_W_TYPES]; /* operations/s with SH_PRODUCT_ROWS rows, a multiplication and an addition counting as
                                 two, less what reading adds */
    double both[SH_W_TYPES];  /* with SH_PRODUCT_FEW rows, where both take about as long: the part of the shorter time
                                 that adds to the longer; 0 to 1 */
    double few[SH_W_TYPES][SH_PRODUCT_FEWS]; /* with 1 << i rows: operations/s over `flops`; SH_PRODUCT_MOST at most */
} sh_product_rates;

/* Made-up weights of `bytes` (at least twice the last cache), held only during the call; each matrix counts with
 * the best of several tries. Takes about a second. Leaves the team's scratch large enough for what it ran. */
sh_status sh_product_rates_measure(sh_team *t, const sh_kernels *kn, size_t bytes, sh_product_rates *out);

/* What follows for one type from the seconds of 1, 2, 4, … 64 rows, t [SH_PRODUCT_FEWS + 1] ascending, with weights of
 * `bytes` and `flops` operations for a row. */
void sh_product_rates_of(const double *t, double bytes, double flops, sh_wtype type, sh_product_rates *out);

#endif
