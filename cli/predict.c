/* The cost model beside a run. See predict.h. */
#include "cli/predict.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "cli/probe.h"

void sh_prediction_release(sh_prediction *p) {
    free(p->rank);
    *p = (sh_prediction){0};
}

/* Fewer threads than the rank's share of the cores do less. */
static sh_cost_rates rates_of(const sh_cluster *c, const Shoal__Plan *p, int per_node) {
    sh_cost_rates r = sh_cluster_rates(c, per_node);
    double used = p->threads ? (double)p->threads * per_node / c->cores : 1;
    if (used < 1) {
        r.fma *= used;
        r.read *= used;
    }
    return r;
}

static void scale(sh_forecast_rank *r, double steps) {
    for (int i = 0; i < SH_CAUSES; i++) r->seconds[i] *= steps;
    r->exchange *= steps;
    r->idle *= steps;
}

sh_status sh_predict_run(const sh_predict_options *o, sh_prediction *out) {
    sh_cluster c;
    sh_forecast f;
    if (!(o->requests >= 1)) SH_FAIL(SH_EINPUT, "no requests were answered");
    bool known;
    SH_TRY(sh_probe_cluster(SH_PROBE_CACHED, o->nodes, &c, &known));
    sh_workload w = {.bin = {{.prompt = fmax(1, o->tokens_in / o->requests),
                              .output = fmax(1, o->tokens_out / o->requests),
                              .requests = o->requests}},
                     .n = 1,
                     .requests = o->requests};
    int per_node = ((int)o->plan->n_rank * o->replicas + o->nodes - 1) / o->nodes, ranks = (int)o->plan->n_rank;
    sh_cost_rates rates = rates_of(&c, o->plan, per_node);
    const sh_cost_model m = {.config = o->config,
                             .plan = o->plan,
                             .rates = &rates,
                             .alike = true,
                             .net = {.within = c.within, .between = c.between, .ranks_per_node = per_node}};
    sh_prediction p = {.ranks = ranks, .assumed = !*c.measured || o->nodes > 1};
    p.rank = calloc((size_t)ranks, sizeof *p.rank);
    if (!p.rank) SH_FAIL(SH_EMEMORY, "no memory to predict for %d ranks", ranks);
    sh_status st = sh_cost_forecast(&m, &w, o->plan->max_seqs, o->replicas, &f, p.rank);
    if (st != SH_OK) {
        free(p.rank);
        return st;
    }
    double steps = o->requests / o->replicas / (f.mix.requests * sh_plan_shape_of(o->plan).ep);
    for (int i = 0; i < ranks; i++) scale(&p.rank[i], steps);
    p.seconds = steps * f.cycle.period;
    if (*c.measured)
        snprintf(p.from, sizeof p.from, "with this machine's speeds of %.80s%s", c.measured,
                 o->nodes > 1 ? ", assumed of the others, and assumed links" : "");
    else
        snprintf(p.from, sizeof p.from, "with assumed speeds: 'shoal plan' measures this machine");
    *out = p;
    return SH_OK;
}
