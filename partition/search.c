/* Candidates, what fits, what is fastest. See search.h; sentences for people are explain.c's. */
#include "partition/search.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "model/owner.h"

#define WORTH       1.02  /* more sequences at once must bring at least this */
#define ALIKE       1.005 /* a simpler plan wins against one that is faster by less */
#define LEAST_CHUNK 64
#define MOST_CHUNK  2048
#define ROUNDS      4   /* of refining */
#define IN_REACH    1.5 /* of the best so far: what refining may win */

const char *const sh_way_names[SH_WAYS] = {"replicas of one rank",
                                           "stages (pp)",
                                           "prompts on ranks of their own (prefill)",
                                           "experts divided (ep)",
                                           "heads and columns divided (tp)",
                                           "positions divided (cp)"};

void sh_choice_release(sh_choice *x) {
    sh_plan_free(&x->plan);
}

void sh_search_free(sh_search **s) {
    if (!*s) return;
    for (int i = 0; i < (*s)->n; i++) sh_choice_release(&(*s)->best[i]);
    for (int i = 0; i < SH_WAYS; i++) sh_choice_release(&(*s)->of_way[i]);
    free(*s);
    *s = NULL;
}

/* --- one plan ------------------------------------------------------------------------------------------------------
 */

static void model_of(const sh_search_options *o, const sh_choice *x, sh_cost_rates *rates, sh_cost_model *out) {
    *rates = sh_cluster_rates(o->cluster, x->ranks_per_node);
    *out = (sh_cost_model){
        .config = o->config,
        .plan = x->plan,
        .rates = rates,
        .alike = true,
        .net = {.within = o->cluster->within, .between = o->cluster->between, .ranks_per_node = x->ranks_per_node},
        .routing = o->routing,
        .prompts = x->reading};
}

sh_status sh_search_forecast(const sh_search_options *o, const sh_choice *x, sh_forecast *out, sh_forecast_rank *rank) {
    sh_cost_rates rates;
    sh_cost_model m;
    model_of(o, x, &rates, &m);
    return sh_cost_forecast(&m, o->workload, x->seqs, x->replicas, out, rank);
}

/* Tokens that a running sequence holds on average; the prompt's at once, the output's half. */
static double usual_tokens(const sh_workload *w) {
    double tokens = 0, weight = 0;
    for (int i = 0; i < w->n; i++) {
        const sh_workload_bin *b = &w->bin[i];
        tokens += b->requests * b->output * (b->prompt + b->output / 2);
        weight += b->requests * b->output;
    }
    return tokens / weight;
}

/* Sequences of this workload that the pages hold at once, in a group. */
static double sequences_that_fit(const sh_search_options *o, const sh_choice *x, const sh_kv_limits *l) {
    double pages = ceil(usual_tokens(o->workload) / SH_PAGE_TOKENS), n = l->max_seqs;
    int window = sh_config_widest_window(o->config);
    if (sh_config_kv_bytes(o->config, l->type, SH_KV_GLOBAL, 0, o->config->n_layers))
        n = fmin(n, x->kv.pages[SH_KV_GLOBAL] * (double)x->shape.cp / pages);
    if (window > 0 && sh_config_kv_bytes(o->config, l->type, SH_KV_SLIDING, 0, o->config->n_layers)) {
        double under_way = ceil((double)l->chunk / SH_PAGE_TOKENS) + 1;
        double held = fmin(pages + 1, (window - 1) / SH_PAGE_TOKENS + 2);
        n = fmin(n, fmax(1, (x->kv.pages[SH_KV_SLIDING] - under_way) / held));
    }
    return floor(fmax(n, 1)) * x->shape.ep;
}

/* Prompts of this workload that ranks which only read them hold at once: all pages of one, and of sliding layers those
 * from the window of its first row that is not yet confirmed to the last row out (sh_prefill_peak). */
static sh_status prompts_that_fit(const sh_search_options *o, sh_choice *x, const sh_kv_limits *l, double *out) {
    double rows = fmax(1, sh_workload_mean_prompt(o->workload) - 1), longest = 0, n = l->max_seqs;
    double pages = ceil(rows / SH_PAGE_TOKENS);
    for (int i = 0; i < o->workload->n; i++) longest = fmax(longest, o->workload->bin[i].prompt - 1);
    if (x->prompts.tokens < fmin(longest, x->plan->max_context - 1))
        SH_FAIL(SH_EMEMORY,
                "ranks that only read prompts have KV for %d tokens left, and the longest prompt of the workload needs "
                "%.0f",
                x->prompts.tokens, longest);
    int window = sh_config_widest_window(o->config);
    if (x->prompts.pages[SH_KV_GLOBAL] > 0) n = fmin(n, x->prompts.pages[SH_KV_GLOBAL] / pages);
    if (x->prompts.pages[SH_KV_SLIDING] > 0) {
        double under_way = ceil((window + (double)l->chunk * (x->shape.prefill + 1) - 2) / SH_PAGE_TOKENS) + 2;
        n = fmin(n, x->prompts.pages[SH_KV_SLIDING] / fmin(pages, under_way));
    }
    *out = fmax(1, floor(n));
    return SH_OK;
}

/* Whether rank i has what the one before it has: other members of a stage do, but for heads and columns, which are
 * shared out unevenly. */
static bool same_memory(const Shoal__Plan *p, size_t i) {
    const Shoal__PlanRank *a = p->rank[i - 1], *b = p->rank[i];
    if (p->tp > 1 || (p->has_prefill && p->prefill > 0)) return false;
    if (a->first != b->first || a->last != b->last || a->n_experts != b->n_experts) return false;
    for (size_t k = 0; k < a->n_experts; k++)
        if (a->experts[k]->n_expert != b->experts[k]->n_expert) return false;
    return true;
}

static int threads_of(const sh_search_options *o, const sh_choice *x) {
    int own = o->cluster->cores / x->ranks_per_node;
    return x->plan->threads > 0 ? x->plan->threads : own > 1 ? own : 1;
}

sh_plan_memory sh_choice_memory(const sh_search_options *o, const sh_choice *x, int rank) {
    return sh_plan_rank_memory(o->config, x->plan, rank, threads_of(o, x));
}

/* Memory, KV pages and speed of x->plan. A failure's text is the reason. */
static sh_status judge(const sh_search_options *o, sh_choice *x, uint64_t *budget) {
    sh_kv_limits l;
    uint64_t least = UINT64_MAX, memory = sh_cluster_memory(o->cluster, x->ranks_per_node);
    for (size_t i = 0; i < x->plan->n_rank; i++) {
        if (i > 0 && same_memory(x->plan, i))
            budget[i] = budget[i - 1];
        else
            SH_TRY(sh_plan_kv_budget(o->config, x->plan, (int)i, threads_of(o, x), memory, &budget[i]));
        if (budget[i] < least) least = budget[i];
    }
    SH_TRY(sh_plan_kv_limits(x->plan, &l));
    SH_TRY(sh_plan_kv_group(o->config, &l, x->plan, budget, &x->kv));
    if (x->shape.prefill > 0) SH_TRY(sh_plan_kv_prefill(o->config, &l, x->plan, budget, &x->prompts));
    double longest = sh_workload_longest(o->workload);
    if (x->kv.tokens < fmin(longest, x->plan->max_context))
        SH_FAIL(SH_EMEMORY, "KV for %d tokens is left, and the longest request of the workload needs %.0f",
                x->kv.tokens, longest);
    x->kv_budget = least;
    x->seqs = sequences_that_fit(o, x, &l);
    if (x->shape.prefill > 0) SH_TRY(prompts_that_fit(o, x, &l, &x->reading));
    return sh_search_forecast(o, x, &x->forecast, NULL);
}

sh_status sh_search_judge(const sh_search_options *o, sh_choice *x) {
    uint64_t *budget = calloc(x->plan->n_rank, sizeof *budget);
    if (!budget) SH_FAIL(SH_EMEMORY, "planner: no memory for %zu ranks", x->plan->n_rank);
    sh_status st = judge(o, x, budget);
    free(budget);
    x->fits = st == SH_OK;
    x->why[0] = 0;
    if (st != SH_OK) snprintf(x->why, sizeof x->why, "%s", sh_error_text());
    return st == SH_EMEMORY || st == SH_OK ? SH_OK : st;
}

/* Seconds of every layer, head with the last, in a micro-batch of each kind: without and with a piece of prompt. The
 * second kind's are those of ranks that only read prompts, where there are some. */
static sh_status layer_seconds(const sh_search_options *o, const sh_choice *x, double cost[2][SH_MAX_LAYERS]) {
    const sh_forecast_mix *mix = &x->forecast.mix;
    int decode = x->shape.decode, width = x->shape.width, last = o->config->n_layers - 1;
    sh_cost_rates rates;
    sh_cost_model m;
    model_of(o, x, &rates, &m);
    SH_TRY(sh_cost_layers(&m, 0, decode, width, mix->span, mix->n_decode, cost[0]));
    SH_TRY(sh_cost_head(&m, decode - width, mix->span, mix->n_decode, mix->n_spans, 0, &cost[0][last]));
    if (x->shape.prefill > 0)
        return sh_cost_layers(&m, decode, decode + x->shape.prefill, 1, mix->span + mix->n_decode,
                              mix->n_spans - mix->n_decode, cost[1]);
    SH_TRY(sh_cost_layers(&m, 0, decode, width, mix->span, mix->n_spans, cost[1]));
    return sh_cost_head(&m, decode - width, mix->span, mix->n_decode, mix->n_spans, 1, &cost[1][last]);
}

static sh_plan_request request_of(const sh_search_options *o, const sh_choice *x) {
    sh_plan_request q = o->fixed;
    q.ranks = x->ranks;
    q.pp = x->shape.pp;
    q.ep = x->shape.ep;
    q.tp = x->shape.tp;
    q.cp = x->shape.cp;
    q.prefill = x->shape.prefill;
    if (q.ep == 1) { /* nothing to place */
        q.routing = NULL;
        q.replicate = 0;
    }
    return q;
}

static bool same_cuts(const Shoal__Plan *a, const Shoal__Plan *b) {
    for (size_t i = 0; i < a->n_rank; i++)
        if (a->rank[i]->first != b->rank[i]->first) return false;
    return true;
}

/* x's plan cut as q says, in its place where that is faster and fits as well. */
static sh_status try_cuts(const sh_search_options *o, const sh_plan_request *q, sh_choice *x) {
    sh_choice y = *x;
    y.plan = NULL;
    SH_TRY(sh_plan_make(o->config, q, &y.plan));
    bool same = same_cuts(x->plan, y.plan);
    sh_status st = same ? SH_OK : sh_search_judge(o, &y);
    bool better = !same && st == SH_OK && y.fits && y.forecast.seconds < x->forecast.seconds;
    sh_choice_release(better ? x : &y);
    if (better) *x = y;
    return st;
}

/* Cuts by seconds. A stage's mean over both kinds of micro-batches is not what the others wait for: while most are of
 * one kind that kind sets the pace, so its seconds are balanced too. */
static sh_status recut(const sh_search_options *o, sh_choice *x) {
    double cost[2][SH_MAX_LAYERS], by[SH_MAX_LAYERS], mixed = x->forecast.mix.mixed;
    bool apart = x->shape.prefill > 0;
    sh_plan_request q = request_of(o, x);
    bool given = x->shape.pp == 1 || (q.cuts && *q.cuts);
    if (given && (x->shape.prefill < 2 || (q.prefill_cuts && *q.prefill_cuts))) return SH_OK;
    SH_TRY(layer_seconds(o, x, cost));
    q.max_seqs = x->plan->max_seqs;
    q.chunk = x->plan->chunk;
    q.prefill_cost = apart ? cost[1] : NULL;
    const double shares[] = {apart ? 0 : mixed, mixed < 0.5 ? 0 : 1};
    for (int k = 0; k < (apart ? 1 : 2); k++) {
        for (int i = 0; i < o->config->n_layers; i++)
            by[i] = apart ? cost[0][i] : (1 - shares[k]) * cost[0][i] + shares[k] * cost[1][i];
        q.layer_cost = given ? NULL : by;
        SH_TRY(try_cuts(o, &q, x));
    }
    return SH_OK;
}

/* Sequences at once that a group may have. */
static int most_seqs(const sh_search_options *o, const sh_choice *x) {
    return (int)fmin(SH_MAX_SEQS, ceil(o->workload->requests / x->replicas));
}

/* As many sequences at once as are worth it: each doubling must bring something. */
static sh_status choose_seqs(const sh_search_options *o, sh_choice *x) {
    double most = most_seqs(o, x);
    sh_choice best = *x;
    best.fits = false;
    int n = o->fixed.max_seqs ? o->fixed.max_seqs : (int)fmin(most, 8.0 * x->ranks), kept = n;
    for (;;) {
        x->plan->max_seqs = n;
        SH_TRY(sh_search_judge(o, x));
        bool better = x->fits && (!best.fits || best.forecast.seconds > x->forecast.seconds * WORTH);
        if (!best.fits || better) {
            best = *x;
            kept = n;
        }
        if (o->fixed.max_seqs || !better || n >= most) break;
        n = (int)fmin(most, 2.0 * n);
    }
    *x = best;
    x->plan->max_seqs = kept;
    return SH_OK;
}

/* Prompt rows per step: fewer leave stages waiting less for each other, more read weights less often. */
static sh_status choose_chunk(const sh_search_options *o, sh_choice *x) {
    if (o->fixed.chunk) return SH_OK;
    for (int way = 0; way < 2; way++) {
        bool moved = false;
        for (int n = way ? 2 * x->plan->chunk : x->plan->chunk / 2; n >= LEAST_CHUNK && n <= MOST_CHUNK;
             n = way ? 2 * n : n / 2) {
            sh_choice y = *x;
            int before = x->plan->chunk;
            x->plan->chunk = n;
            SH_TRY(sh_search_judge(o, &y));
            if (!y.fits || y.forecast.seconds * WORTH > x->forecast.seconds) {
                x->plan->chunk = before;
                break;
            }
            *x = y;
            moved = true;
        }
        if (moved) break;
    }
    return SH_OK;
}

/* The same with other numbers and the cuts that go with them, in its place where that is worth it. */
static sh_status try_numbers(const sh_search_options *o, const sh_choice *from, int seqs, int chunk, sh_choice *best) {
    sh_choice y = *from;
    y.plan = NULL;
    SH_TRY(sh_plan_copy(from->plan, &y.plan));
    y.plan->max_seqs = seqs;
    y.plan->chunk = chunk;
    sh_status st = sh_search_judge(o, &y);
    if (st == SH_OK && y.fits) st = recut(o, &y);
    bool better = st == SH_OK && y.fits && y.forecast.seconds * WORTH < best->forecast.seconds;
    sh_choice_release(better ? best : &y);
    if (better) *best = y;
    return st;
}

/* Other chunks, and more sequences, with all else as it is in x. */
static sh_status refine_one(const sh_search_options *o, sh_choice *x, bool chunk) {
    int most = chunk ? MOST_CHUNK : most_seqs(o, x);
    sh_choice from = *x;
    sh_status st = SH_OK;
    SH_TRY(sh_plan_copy(x->plan, &from.plan));
    int seqs = from.plan->max_seqs, rows = from.plan->chunk;
    for (int n = LEAST_CHUNK; st == SH_OK && chunk && n <= most; n *= 2)
        if (n != rows) st = try_numbers(o, &from, seqs, n, x);
    for (int n = seqs; st == SH_OK && !chunk && n < most;) {
        n = 2 * n < most ? 2 * n : most;
        st = try_numbers(o, &from, n, rows, x);
    }
    sh_choice_release(&from);
    return st;
}

/* Sequences, chunk and cuts depend on each other: one after the other, all values of one with the others as they are,
 * until nothing is worth it. */
static sh_status refine(const sh_search_options *o, sh_choice *x) {
    for (int round = 0; round < ROUNDS; round++) {
        double before = x->forecast.seconds;
        if (!o->fixed.chunk) SH_TRY(refine_one(o, x, true));
        if (!o->fixed.max_seqs) SH_TRY(refine_one(o, x, false));
        if (!(x->forecast.seconds < before)) break;
    }
    return SH_OK;
}

sh_status sh_search_unplaced(const sh_search_options *o, const sh_choice *x, sh_forecast *out) {
    sh_plan_request q = request_of(o, x);
    sh_choice y = *x;
    char cuts[SH_PLAN_CUTS];
    sh_plan_cuts(x->plan, false, cuts);
    q.cuts = cuts;
    q.routing = NULL;
    q.replicate = 0;
    q.max_seqs = x->plan->max_seqs;
    q.chunk = x->plan->chunk;
    y.plan = NULL;
    SH_TRY(sh_plan_make(o->config, &q, &y.plan));
    sh_status st = sh_search_forecast(o, &y, out, NULL);
    sh_choice_release(&y);
    return st;
}

sh_status sh_search_try(const sh_search_options *o, sh_choice *x) {
    sh_plan_request q = request_of(o, x);
    x->fits = false;
    x->shape.decode = x->shape.pp * x->shape.width;
    sh_status st = sh_plan_make(o->config, &q, &x->plan);
    if (st == SH_EMEMORY) return st;
    if (st != SH_OK) {
        snprintf(x->why, sizeof x->why, "%s", sh_error_text());
        return SH_OK;
    }
    SH_TRY(choose_seqs(o, x));
    if (x->fits) SH_TRY(choose_chunk(o, x));
    if (x->fits) return recut(o, x);
    sh_choice_release(x);
    return SH_OK;
}

/* --- which is better -----------------------------------------------------------------------------------------------
 */

static bool same_shape(const sh_choice *a, const sh_choice *b) {
    return a->way == b->way && a->shape.pp == b->shape.pp && a->shape.width == b->shape.width &&
           a->shape.prefill == b->shape.prefill;
}

static bool simpler(const sh_choice *a, const sh_choice *b) {
    return a->ranks != b->ranks ? a->ranks < b->ranks : a->way < b->way;
}

static bool better(const sh_choice *a, const sh_choice *b) {
    if (a->fits != b->fits) return a->fits;
    if (!a->fits) return a->ranks > b->ranks; /* the most ranks come nearest to fitting */
    return a->forecast.seconds < b->forecast.seconds;
}

/* Of what is as fast as the first the simplest goes first: fewer ranks to a group, ways in their order. */
static void prefer_simple(sh_search *s) {
    int best = 0;
    for (int i = 1; i < s->n && s->best[i].forecast.seconds < s->best[0].forecast.seconds * ALIKE; i++)
        if (simpler(&s->best[i], &s->best[best])) best = i;
    sh_choice first = s->best[best];
    memmove(&s->best[1], &s->best[0], (size_t)best * sizeof *s->best);
    s->best[0] = first;
}

static sh_status copy(const sh_choice *from, sh_choice *to) {
    sh_choice x = *from;
    x.plan = NULL;
    if (from->plan) SH_TRY(sh_plan_copy(from->plan, &x.plan));
    sh_choice_release(to);
    *to = x;
    return SH_OK;
}

/* Keeps x among the best; one for each shape and count of replicas. */
static sh_status keep(sh_search *s, const sh_choice *x) {
    int at = s->n;
    for (int i = 0; i < s->n; i++)
        if (same_shape(x, &s->best[i])) {
            if (!better(x, &s->best[i])) return SH_OK;
            sh_choice_release(&s->best[i]);
            memmove(&s->best[i], &s->best[i + 1], (size_t)(s->n - i - 1) * sizeof *s->best);
            s->n--;
            break;
        }
    at = s->n;
    while (at > 0 && better(x, &s->best[at - 1])) at--;
    if (at == SH_SEARCH_BEST) return SH_OK;
    if (s->n == SH_SEARCH_BEST) sh_choice_release(&s->best[--s->n]);
    memmove(&s->best[at + 1], &s->best[at], (size_t)(s->n - at) * sizeof *s->best);
    s->best[at] = (sh_choice){0};
    s->n++;
    return copy(x, &s->best[at]);
}

/* Takes *x over. */
static sh_status note(sh_search *s, sh_choice *x) {
    sh_status st = SH_OK;
    s->tried++;
    s->fitting += x->fits;
    if (x->fits) st = keep(s, x);
    if (st == SH_OK && (!s->has_way[x->way] || better(x, &s->of_way[x->way]))) {
        sh_choice_release(&s->of_way[x->way]);
        s->of_way[x->way] = *x;
        s->has_way[x->way] = true;
    } else {
        sh_choice_release(x);
    }
    return st;
}

/* --- candidates ----------------------------------------------------------------------------------------------------
 */

static bool wanted(int fixed, int value) {
    return fixed == 0 || fixed == value;
}

/* Why a shape cannot be, before any plan is made; "" when it may. */
static const char *illegal(const sh_config *c, sh_way way, int pp, int width, int prefill) {
    if (pp > c->n_layers) return "fewer layers than stages";
    if (prefill > c->first_shared) return "fewer layers with K/V of their own than ranks that read prompts";
    if (way == SH_WAY_EXPERTS && c->experts == 0) return "the model has no experts";
    if (way == SH_WAY_EXPERTS && width > c->experts) return "fewer experts than ranks";
    for (int i = 0; i < c->n_layers && way == SH_WAY_TENSOR; i++)
        if (c->layer[i].heads % width) return "the number of ranks does not divide the query heads";
    return "";
}

/* What the groups of a search are made of. */
typedef struct groups {
    int ranks, replicas, per_node;
} groups;

static sh_status try_shape(const sh_search_options *o, sh_search *s, sh_way way, const groups *g, int width,
                           int prefill) {
    int decode = g->ranks - prefill;
    sh_choice x = {
        .way = way,
        .shape =
            {.pp = decode / width, .ep = 1, .tp = 1, .cp = 1, .width = width, .decode = decode, .prefill = prefill},
        .ranks = g->ranks,
        .replicas = g->replicas,
        .ranks_per_node = g->per_node};
    if (way == SH_WAY_EXPERTS) x.shape.ep = width;
    if (way == SH_WAY_TENSOR) x.shape.tp = width;
    if (way == SH_WAY_CONTEXT) x.shape.cp = width;
    if (!wanted(o->fixed.pp, x.shape.pp) || !wanted(o->fixed.ep, x.shape.ep) || !wanted(o->fixed.tp, x.shape.tp) ||
        !wanted(o->fixed.cp, x.shape.cp) || !wanted(o->fixed.prefill, prefill))
        return SH_OK;
    const char *why = illegal(o->config, way, x.shape.pp, width, prefill);
    if (*why) {
        if (!s->has_way[way]) snprintf(s->of_way[way].why, sizeof s->of_way[way].why, "%s", why);
        return SH_OK;
    }
    sh_status st = sh_search_try(o, &x);
    bool near = x.fits && (s->n == 0 || x.forecast.seconds < IN_REACH * s->best[0].forecast.seconds);
    if (st == SH_OK && near) st = refine(o, &x);
    if (st != SH_OK) {
        sh_choice_release(&x);
        return st;
    }
    return note(s, &x);
}

/* Numbers of ranks that read prompts, or that do not: all up to 8, then steps of a seventh to a quarter. */
static bool worth_trying(int n) {
    while (n > 15 && n % 2 == 0) n /= 2;
    return n <= 8 || n == 10 || n == 12 || n == 14;
}

static sh_status try_prefill(const sh_search_options *o, sh_search *s, const groups *g) {
    if (o->no_prefill) return SH_OK;
    for (int n = 1; n < g->ranks; n++) {
        if (n != o->fixed.prefill && !worth_trying(n) && !worth_trying(g->ranks - n)) continue;
        SH_TRY(try_shape(o, s, SH_WAY_PREFILL, g, 1, n));
    }
    return SH_OK;
}

static sh_status try_group(const sh_search_options *o, sh_search *s, const groups *g) {
    if (g->ranks == 1) return try_shape(o, s, SH_WAY_ALONE, g, 1, 0);
    SH_TRY(try_shape(o, s, SH_WAY_STAGES, g, 1, 0));
    SH_TRY(try_prefill(o, s, g));
    for (int width = 2; width <= g->ranks; width++)
        for (int way = SH_WAY_EXPERTS; way < SH_WAYS && g->ranks % width == 0; way++)
            SH_TRY(try_shape(o, s, (sh_way)way, g, width, 0));
    return SH_OK;
}

/* Groups of every size that uses the ranks as well as that number of groups can. */
static sh_status try_all(const sh_search_options *o, sh_search *s, int per_node) {
    int total = o->cluster->nodes * per_node, last = 0;
    for (int r = 1; r <= total; r++) {
        int ranks = total / r;
        if (ranks == last || (o->replicas && total / o->replicas < ranks)) continue;
        last = ranks;
        const groups g = {ranks, o->replicas ? o->replicas : total / ranks, per_node};
        SH_TRY(try_group(o, s, &g));
    }
    return SH_OK;
}

/* -n was given: that many ranks to a group, on as many ranks per node as it takes. */
static sh_status try_fixed(const sh_search_options *o, sh_search *s, int ranks) {
    int nodes = o->cluster->nodes, numa = o->cluster->numa, replicas = o->replicas;
    if (ranks > SH_MAX_RANKS)
        SH_FAIL(SH_EINPUT, "%d ranks of a group: out of range: allowed are 1 to %d", ranks, SH_MAX_RANKS);
    if (!replicas) replicas = nodes * numa > ranks ? nodes * numa / ranks : 1;
    int per_node = (ranks * replicas + nodes - 1) / nodes;
    const groups g = {ranks, replicas, per_node > 1 ? per_node : 1};
    return try_group(o, s, &g);
}

static int or_one(int v) {
    return v > 0 ? v : 1;
}

/* What is asked for contradicts itself: said as it is for a run, not as a search that found nothing. */
static sh_status check_fixed(const sh_plan_request *r) {
    int pp = or_one(r->pp), ep = or_one(r->ep), tp = or_one(r->tp), cp = or_one(r->cp);
    SH_TRY(sh_plan_check_division(ep, tp, cp));
    SH_TRY(sh_plan_check_prefill(r->prefill, ep, tp, cp));
    if (r->prefill > 0 && r->ranks > 0 && r->prefill >= r->ranks)
        SH_FAIL(SH_EINPUT, "--prefill: %d of %d ranks: allowed are 0 to %d: one at least must decode", r->prefill,
                r->ranks, r->ranks - 1);
    int64_t decode = r->ranks - r->prefill, whole = (int64_t)pp * ep * tp * cp, below = decode / whole * whole;
    char hint[SH_PLAN_HINT], fewer[32] = "";
    if (r->ranks <= 0 || decode % whole == 0) return SH_OK;
    sh_plan_hint_prefill((int)(decode - below), ep * tp * cp, r->prefill, hint);
    if (below == 0) hint[0] = 0; /* too few ranks for the stages alone */
    if (below > 0) snprintf(fewer, sizeof fewer, "%lld or ", (long long)(below + r->prefill));
    SH_FAIL(SH_EINPUT, "%lld ranks%s: %d stages of %d ranks (ep %d, tp %d, cp %d) do not divide them: give -n %s%lld%s",
            (long long)decode, r->prefill ? " that decode" : "", pp, ep * tp * cp, ep, tp, cp, fewer,
            (long long)(below + whole + r->prefill), hint);
}

/* Ranks of a group that are not searched for; 0: they are. */
static int given_ranks(const sh_search_options *o) {
    bool share = (int64_t)o->least * or_one(o->replicas) > o->cluster->nodes * o->cluster->numa;
    return o->fixed.ranks ? o->fixed.ranks : share ? o->least : 0;
}

sh_status sh_search_run(const sh_search_options *o, sh_search **out) {
    SH_TRY(check_fixed(&o->fixed));
    sh_search *s = calloc(1, sizeof *s);
    if (!s) SH_FAIL(SH_EMEMORY, "planner: no memory");
    for (int i = 0; i < SH_WAYS; i++)
        snprintf(s->of_way[i].why, sizeof s->of_way[i].why, "%s",
                 o->cluster->nodes * o->cluster->numa > 1 || o->fixed.ranks > 1
                     ? "not asked for"
                     : "there is one NUMA node, so one rank: -n or --nodes gives more");
    sh_status st = SH_OK;
    int ranks = given_ranks(o);
    if (ranks) {
        st = try_fixed(o, s, ranks);
    } else {
        st = try_all(o, s, o->cluster->numa);
        if (st == SH_OK && o->cluster->numa > 1) st = try_all(o, s, 1); /* one rank over all of a node */
    }
    if (st != SH_OK) {
        sh_search_free(&s);
        return st;
    }
    if (s->n) prefer_simple(s);
    *out = s;
    return SH_OK;
}
