/* Private to gemma4.c (the layer) and gemma4_model.c (making a model, checking batches, the block that crosses a cut):
 * what a model holds. Everybody else uses gemma4.h. */
#ifndef SH_MODEL_GEMMA4_MODEL_H
#define SH_MODEL_GEMMA4_MODEL_H

#include "model/attention.h"
#include "model/gemma4.h"
#include "model/moe.h"
#include "model/spread.h"

/* A part of the step's rows on its way through a layer: its attention is done and its rows are with the experts, or
 * its feed-forward is done and results are on their way. */
typedef struct sh_part {
    bool open;
    int layer, row0, n; /* rows [row0, row0 + n) */
    float *y;           /* [B, H] the dense branch's output */
} sh_part;

/* H: hidden, P: per-layer embedding width, R: most rows of a micro-batch that are computed here, B: rows of a part. */
struct sh_model {
    sh_config whole;  /* the model */
    sh_config config; /* as this share of it is computed: fewer heads and feed-forward columns */
    sh_model_options options;
    sh_team *team;
    const sh_kernels *kn;
    sh_weights *weights;
    sh_kv_pool *kv;
    sh_attention *attention;
    sh_moe *moe;                    /* NULL: no layer has experts */
    uint64_t *chosen;               /* [layers here, experts]; NULL: the same */
    const sh_expert_peers *experts; /* NULL: every expert is here */
    sh_spread *spread;              /* NULL: all positions are here */
    int members, member;            /* that share positions out; 1, 0 */
    sh_rope *ropes;                 /* one per kind of rotation */
    int n_ropes;
    int rope_of[SH_MAX_LAYERS];
    int windows[SH_KV_KINDS]; /* the longest window among the stage's layers of a kind; 0: all positions; −1: none */
    sh_model_probe probe;
    sh_model_times times;
    double mark;  /* when the cause being timed began, waiting that was booked apart left out … */
    double since; /* … and in */
    sh_timeline *timeline;

    sh_arena arena;
    float *x;         /* [R, H] residual stream */
    float *x0;        /* [R, H] scaled embeddings; NULL when P = 0 */
    float *h;         /* [B, H] normed rows, results of projections */
    float *q;         /* [B, heads·head_dim] queries, then attention output */
    float *k, *v;     /* [B, kv_heads·head_dim] */
    float *gate, *up; /* [B, ff] */
    float *z;         /* [B, H] output of the experts */
    float *ctx, *ple; /* [B, P] gate of the per-layer embedding; the embedding itself */
    int32_t *ids;     /* [R] */
    float *all, *own; /* of a share: [B, all columns] gathered; [B, own outputs] */
    int part_rows;    /* B */
    sh_part part[SH_EXPERT_SLOTS];
    int n_parts; /* under way at once: 1, or SH_EXPERT_SLOTS where experts are with peers */

    /* the step at hand */
    const sh_batch *batch;
    int lo, hi;         /* rows of the batch that are computed here */
    int n;              /* of these rows: all, or the kept ones */
    bool kept;          /* rows that are not kept are gone */
    sh_attn_rows *rows; /* [n_row_spans] which rows of x belong to which span */
    int n_row_spans;
    sh_attn_rows *part_spans; /* [n_part_spans] the same for the rows of one part, counted from its first */
    int n_part_spans;
};

/* Checks a batch against this stage: rows, ids, positions, pages. */
sh_status sh_model_check(const sh_model *m, const sh_batch *b);
/* Which rows of x are whose, all of them or the kept ones. */
void sh_model_view(sh_model *m, bool kept);
/* Into how many parts the rows are cut: the same on every member of the stage. */
int sh_model_parts(const sh_model *m);
/* Whose the rows of a part are: part_spans. */
void sh_model_clip(sh_model *m, const sh_part *p);
/* Drops the rows that nobody wants to see further. Does nothing the second time. */
void sh_model_keep(sh_model *m);
/* Reads and writes the block of a cut (gemma4.h). `in` has been read when out is written; they may not overlap. */
void sh_model_receive(sh_model *m, const uint8_t *in);
void sh_model_send(sh_model *m, const uint8_t *in, uint8_t *out);

#endif
