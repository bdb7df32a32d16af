/*
 * Which part of a layer is whose, where the members of a stage divide query heads, feed-forward columns, outputs and
 * vocabulary among themselves (tensor parallel). All members have all rows. Outputs are cut and gathered, sums are not,
 * so bytes are those of one rank; with `sum` the products that mix heads or columns are cut along their inputs instead
 * and partial results are added, which is not (docs/decisions/0015). Pure arithmetic on shapes: knows no rank.
 */
#ifndef SH_MODEL_SHARE_H
#define SH_MODEL_SHARE_H

#include <stdbool.h>

typedef struct sh_share {
    int parts, part; /* part `part` of `parts`; parts ≤ 1: all of it */
    bool sum;        /* o and down: inputs are cut and partial results added */
} sh_share;

typedef struct sh_range {
    int lo, hi; /* [lo, hi) */
} sh_range;

#define SH_SHARE_COLUMNS 32   /* feed-forward columns and outputs are cut at whole weight panels */
#define SH_SHARE_VOCAB   1024 /* the vocabulary at whole segments of a log-sum-exp */

/* This part of `total` columns, cut at multiples of `unit` as evenly as that allows. May be empty. */
static inline sh_range sh_share_range(sh_share s, int total, int unit) {
    long units = ((long)total + unit - 1) / unit, lo, hi;
    if (s.parts <= 1) return (sh_range){0, total};
    lo = units * s.part / s.parts * unit;
    hi = units * (s.part + 1) / s.parts * unit;
    return (sh_range){(int)(lo < total ? lo : total), (int)(hi < total ? hi : total)};
}

/* The same for every part of a stage. */
static inline sh_range sh_share_range_of(sh_share s, int part, int total, int unit) {
    s.part = part;
    return sh_share_range(s, total, unit);
}

struct sh_layer;
/*
 * The layer as this part computes it: its query heads, the KV heads that these read, its feed-forward columns. parts
 * divides the query heads. KV heads are replicated where there are fewer than parts; where the part's heads straddle
 * the groups of KV heads, a KV head is stored once per run of query heads that lie in one group.
 */
struct sh_layer sh_share_layer(sh_share s, const struct sh_layer *l);
/* Which KV head of the whole layer is the part's j-th. */
int sh_share_kv_head(sh_share s, const struct sh_layer *l, int j);

#endif
