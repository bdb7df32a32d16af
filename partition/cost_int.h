/* What the files of the cost model share: where a rank stands, rows as a layer sees them, routes to experts. Private to
 * cost.c, traffic.c, forecast.c, prefill_cost.c and prefill_forecast.c. */
#ifndef SH_PARTITION_COST_INT_H
#define SH_PARTITION_COST_INT_H

#include "partition/cost.h"

/* A rank in its stage. */
typedef struct sh_cost_place {
    int rank, member;
    sh_plan_shape shape;
    sh_mode mode;
    sh_kv_type kv;
    bool sums;     /* tp by partial sums */
    bool once;     /* no expert of the stage is on two ranks */
    int near, far; /* other members on its node, on others */
    int sharers;   /* ranks of the group on its node */
    const sh_cost_rates *rates;
} sh_cost_place;
sh_status sh_cost_place_of(const sh_cost_model *m, int rank, sh_cost_place *out);
/* Whether each expert of a stage is on one of its ranks alone. */
bool sh_cost_once(const sh_cost_model *m, int stage);
/* f32 operations/s of products with weights in a mode, a multiply-add counting as two. */
double sh_cost_products_rate(const sh_cost_rates *r, sh_mode mode);
double sh_cost_weights_read(const sh_cost_rates *r, sh_mode mode);
double sh_cost_both(const sh_cost_rates *r, sh_mode mode);
/* How many rows of SH_COST_MANY take as long to compute as `rows`: what kernels make for nothing where rows are few.
 * Grows with rows, without jumps. */
double sh_cost_paid_rows(const sh_cost_rates *r, sh_mode mode, double rows);
const sh_cost_rates *sh_cost_rates_of(const sh_cost_model *m, int rank);

#define SH_COST_POSITIONS 8 /* samples of a span's first position */

/* Rows of a micro-batch as a layer sees them. */
typedef struct sh_cost_load {
    double all;   /* rows of the micro-batch */
    double rows;  /* that pass the layer */
    double kept;  /* that go to the sampler */
    double pairs; /* Σ over those rows of the keys they see */
    double keys;  /* Σ over sequences of the keys that some row of theirs sees: what is read */
} sh_cost_load;
sh_cost_load sh_cost_load_of(const sh_cost_span *span, int n_spans, bool kept_only, int window);

/* A micro-batch on its way through all ranks: what layers of a kind see of it is the same in each of them. */
#define SH_COST_LOADS 4
typedef struct sh_cost_batch {
    const sh_cost_span *span;
    int n_spans, n;
    struct {
        bool kept_only;
        int window;
        sh_cost_load load;
    } known[SH_COST_LOADS];
    struct {
        bool known;
        double blocks, owners;
    } seen[2]; /* of all rows, of kept ones: blocks_seen of traffic.c */
} sh_cost_batch;
/* sh_cost_load_of its spans, worked out when it is first asked for. */
sh_cost_load sh_cost_batch_load(sh_cost_batch *b, bool kept_only, int window);

/* What the router does to a rank, for `rows` rows of all members together. */
typedef struct sh_cost_routes {
    double rows;    /* rows × choices that this rank's experts compute */
    double touched; /* its experts that some row chose */
    double owned;   /* share of all choices that fall on this rank */
    double reach;   /* other members that a row of this rank goes to */
} sh_cost_routes;
sh_cost_routes sh_cost_routes_of(const sh_cost_model *m, const sh_cost_place *p, int layer, double rows);
/* Whether all ranks of the stage hold as many experts of layer a as of layer b. */
bool sh_cost_experts_alike(const Shoal__Plan *plan, const sh_cost_place *p, int a, int b);
static inline int sh_cost_ranks_per_node(const sh_cost_model *m) {
    return m->net.ranks_per_node > 0 ? m->net.ranks_per_node : 1;
}
static inline int sh_cost_node_of(const sh_cost_model *m, int rank) {
    return rank / sh_cost_ranks_per_node(m);
}

/* An earlier member of the stage whose cost is this one's; −1: none. */
int sh_cost_twin(const sh_cost_model *m, const sh_cost_place *p);

/* The layers of a stage, as one of its members sees them; took [layers of the stage] gets the seconds of each. */
void sh_cost_member_layers(const sh_cost_model *m, const sh_cost_place *p, sh_cost_batch *b, double *took,
                           sh_cost_rank *out);

/* Parts that the rows of a layer are cut into: blocks that bound the scratch; with experts elsewhere an even number of
 * them once there are enough rows, so that one computes while the other's rows travel (model/gemma4.c). */
double sh_cost_parts(const sh_cost_model *m, const sh_cost_place *p, double rows);

void sh_cost_wire_experts(const sh_cost_model *m, const sh_cost_place *p, double rows, const sh_cost_routes *e,
                          sh_cost_layer *out);
void sh_cost_wire_tensor(const sh_cost_model *m, const sh_cost_place *p, int layer, double rows, sh_cost_layer *out);
void sh_cost_wire_context(const sh_cost_model *m, const sh_cost_place *p, int layer, sh_cost_batch *b,
                          sh_cost_layer *out);
void sh_cost_wire_head(const sh_cost_model *m, const sh_cost_place *p, double kept, sh_cost_wire *out);
void sh_cost_wire_cut(const sh_cost_model *m, const sh_cost_place *p, double rows, double kept, sh_cost_wire *out);

#endif
