/* Plans as files: what is written beside the plan itself, and what is refused when one is read. See explain.h. */
#include "partition/explain.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "partition/protojson.h"

static sh_status text(const char *s, char **to) {
    free(*to);
    *to = strdup(s);
    if (!*to) SH_FAIL(SH_EMEMORY, "plan: no memory");
    return SH_OK;
}

static sh_status set_model(const sh_config *c, Shoal__Plan *p) {
    Shoal__PlanModel *m = calloc(1, sizeof *m);
    if (!m) SH_FAIL(SH_EMEMORY, "plan: no memory");
    shoal__plan_model__init(m);
    if (p->model) shoal__plan_model__free_unpacked(p->model, NULL);
    p->model = m;
    m->has_layers = m->has_hidden = m->has_vocab = m->has_heads = m->has_experts = m->has_top_k = 1;
    m->layers = c->n_layers;
    m->hidden = c->hidden;
    m->vocab = c->vocab;
    m->heads = c->layer[0].heads;
    m->experts = c->experts;
    m->top_k = c->top_k;
    return text(c->variant, &m->variant);
}

static sh_status differs(const char *field, bool has, int plan, int model) {
    if (!has || plan == model) return SH_OK;
    SH_FAIL(SH_EINPUT, "plan: model.%s: %d: the plan was made for another model: this one has %d", field, plan, model);
}

sh_status sh_plan_check_model(const sh_config *c, const Shoal__Plan *p) {
    const Shoal__PlanModel *m = p->model;
    if (!m) return SH_OK;
    SH_TRY(differs("layers", m->has_layers, m->layers, c->n_layers));
    SH_TRY(differs("hidden", m->has_hidden, m->hidden, c->hidden));
    SH_TRY(differs("vocab", m->has_vocab, m->vocab, c->vocab));
    SH_TRY(differs("heads", m->has_heads, m->heads, c->layer[0].heads));
    SH_TRY(differs("experts", m->has_experts, m->experts, c->experts));
    SH_TRY(differs("top_k", m->has_top_k, m->top_k, c->top_k));
    if (m->variant && strcmp(m->variant, c->variant) != 0)
        SH_FAIL(SH_EINPUT, "plan: model.variant: '%s': the plan was made for another model: this one is '%s'",
                m->variant, c->variant);
    return SH_OK;
}

/* Five digits: a forecast has no more to say, and people read the file. */
static double brief(double v) {
    char s[32];
    snprintf(s, sizeof s, "%.5g", fabs(v) < 1e-12 ? 0 : v);
    return strtod(s, NULL);
}

static void set_times(const sh_forecast_rank *r, const sh_plan_memory *m, double kv, Shoal__PlanForecastRank *to) {
    to->has_weights = to->has_attention = to->has_experts = to->has_exchange = to->has_other = to->has_idle = 1;
    to->has_sent = to->has_memory_gib = 1;
    to->weights = brief(r->seconds[SH_CAUSE_WEIGHTS]);
    to->attention = brief(r->seconds[SH_CAUSE_ATTENTION]);
    to->experts = brief(r->seconds[SH_CAUSE_EXPERTS]);
    to->other = brief(r->seconds[SH_CAUSE_OTHER]);
    to->exchange = brief(r->exchange);
    to->idle = brief(r->idle);
    for (int i = 0; i < SH_FORECAST_WIRES; i++) to->sent += r->sent[i];
    to->sent = brief(to->sent);
    to->memory_gib = brief(((double)(m->weights + m->scratch) + kv) / 0x1p30);
}

static sh_status add_ranks(const sh_search_options *o, const sh_choice *x, const sh_forecast_rank *rank,
                           Shoal__PlanForecast *to) {
    uint64_t available = sh_cluster_memory(o->cluster, x->ranks_per_node);
    to->rank = calloc(x->plan->n_rank, sizeof(Shoal__PlanForecastRank *));
    if (!to->rank) SH_FAIL(SH_EMEMORY, "plan: no memory for %zu ranks", x->plan->n_rank);
    for (size_t i = 0; i < x->plan->n_rank; i++) {
        sh_plan_memory m = sh_choice_memory(o, x, (int)i);
        double kv = x->plan->kv_memory ? (double)x->plan->kv_memory
                                       : (double)available - (double)(m.weights + m.scratch + m.reserve);
        to->rank[i] = calloc(1, sizeof(Shoal__PlanForecastRank));
        if (!to->rank[i]) SH_FAIL(SH_EMEMORY, "plan: no memory for %zu ranks", x->plan->n_rank);
        shoal__plan_forecast_rank__init(to->rank[i]);
        to->n_rank++;
        set_times(&rank[i], &m, kv, to->rank[i]);
    }
    return SH_OK;
}

static sh_status set_forecast(const sh_search_options *o, const char *workload, const sh_forecast *f, sh_choice *x,
                              const sh_forecast_rank *rank) {
    Shoal__PlanForecast *p = calloc(1, sizeof *p);
    if (!p) SH_FAIL(SH_EMEMORY, "plan: no memory");
    shoal__plan_forecast__init(p);
    if (x->plan->forecast) shoal__plan_forecast__free_unpacked(x->plan->forecast, NULL);
    x->plan->forecast = p;
    p->has_assumed = p->has_tokens_out_per_s = p->has_tokens_in_per_s = p->has_seconds = p->has_step_ms = 1;
    p->assumed = *o->cluster->assumed != 0;
    p->tokens_out_per_s = brief(f->tokens_out);
    p->tokens_in_per_s = brief(f->tokens_in);
    p->seconds = brief(f->seconds);
    p->step_ms = brief(f->cycle.period * 1e3);
    SH_TRY(text(o->cluster->name, &p->machine));
    SH_TRY(text(workload, &p->workload));
    return add_ranks(o, x, rank, p);
}

sh_status sh_explain_annotate(const sh_search_options *o, const char *workload, sh_choice *x) {
    sh_forecast f;
    sh_forecast_rank *rank = calloc(x->plan->n_rank, sizeof *rank);
    if (!rank) SH_FAIL(SH_EMEMORY, "plan: no memory for %zu ranks", x->plan->n_rank);
    sh_status st = sh_search_forecast(o, x, &f, rank);
    if (st == SH_OK) st = set_model(o->config, x->plan);
    if (st == SH_OK) st = set_forecast(o, workload, &f, x, rank);
    free(rank);
    x->plan->has_replicas = 1;
    x->plan->replicas = x->replicas;
    return st;
}

sh_status sh_plan_read(const char *what, const char *json, size_t len, const sh_config *c, Shoal__Plan **out) {
    ProtobufCMessage *m = NULL;
    SH_TRY(sh_protojson_read(what, json, len, &shoal__plan__descriptor, &m));
    Shoal__Plan *p = (Shoal__Plan *)m;
    sh_status st = sh_plan_check_model(c, p);
    if (st == SH_OK) st = sh_plan_check(c, p);
    if (st != SH_OK) {
        sh_plan_free(&p);
        return sh_error_prefix(st, "%s", what);
    }
    *out = p;
    return SH_OK;
}
