/* Steady state of a workload on a plan. See forecast.h. */
#include "partition/forecast.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "partition/forecast_int.h"

#define LAPS        16 /* of the ring that are played */
#define LEAST_BEATS 256

const char *const sh_forecast_wires[SH_FORECAST_WIRES] = {
    "rows to experts", "results of experts", "gathers", "positions", "cuts", "K/V of prompts"};

/* --- rows of a micro-batch -----------------------------------------------------------------------------------------
 */

void sh_forecast_add_decode(sh_forecast_mix *x, const sh_workload *w, double first) {
    double sum = 0;
    for (int i = 0; i < w->n; i++) sum += w->bin[i].requests * (w->bin[i].output - first);
    for (int i = 0; i < w->n && sum > 0; i++) {
        const sh_workload_bin *b = &w->bin[i];
        double part = b->requests * (b->output - first) / sum;
        if (!(part > 0)) continue;
        x->span[x->n_spans++] = (sh_cost_span){.seqs = x->decode * part,
                                               .rows = 1,
                                               .kept = 1,
                                               .lo = b->prompt - 1 + first,
                                               .hi = b->prompt + b->output - 1};
    }
    x->n_decode = x->n_spans;
}

/* Prompt rows of each length in proportion to the tokens of its prompts. */
static void add_prompts(sh_forecast_mix *x, const sh_workload *w, double chunk) {
    double sum = sh_workload_mean_prompt(w) * w->requests;
    for (int i = 0; i < w->n && x->piece > 0; i++) {
        const sh_workload_bin *b = &w->bin[i];
        double rows = x->piece * b->requests * b->prompt / sum, piece = fmin(b->prompt, fmin(chunk, x->piece));
        x->span[x->n_spans++] = (sh_cost_span){.seqs = rows / piece,
                                               .rows = piece,
                                               .kept = piece / b->prompt,
                                               .lo = 0,
                                               .hi = b->prompt - piece,
                                               .tokens = b->prompt + b->output};
    }
}

double sh_forecast_usual_piece(const sh_workload *w, double less, double chunk) {
    double rows = 0, sum = 0;
    for (int i = 0; i < w->n; i++) {
        double all = w->bin[i].prompt - less, n = w->bin[i].requests * all;
        rows += n * fmin(all, chunk);
        sum += n;
    }
    return rows / sum;
}

sh_forecast_mix sh_forecast_mix_of(const Shoal__Plan *p, const sh_workload *w, double seqs) {
    sh_plan_shape s = sh_plan_shape_of(p);
    double lane = fmax(seqs / s.ep, 1), chunk = ceil((double)p->chunk / s.ep), prompt = sh_workload_mean_prompt(w);
    double per_request = sh_workload_mean_output(w) - 1; /* the first token is the prompt's last row's */
    sh_forecast_mix x = {.in_flight = fmin(s.pp, lane)};
    x.decode = lane / x.in_flight;
    x.requests = per_request > 0 ? x.decode / per_request : INFINITY;
    if (x.requests * prompt > chunk) { /* prompts are the limit: fewer sequences run than could */
        x.requests = chunk / prompt;
        x.decode = fmin(x.decode, x.requests * per_request);
    }
    double rows = x.requests * prompt;
    x.piece = fmin(chunk, fmax(rows, sh_forecast_usual_piece(w, 0, chunk)));
    x.mixed = fmin(1, rows / x.piece);
    sh_forecast_add_decode(&x, w, 1);
    add_prompts(&x, w, chunk);
    return x;
}

/* --- the ring ------------------------------------------------------------------------------------------------------
 */

typedef struct ring {
    int stages, depth, beats;
    const double *seconds, *link;
    double mixed;
    double *stage_free, *link_free; /* [stages] */
    double *back;                   /* [beats] when its answer is there */
} ring;

/* Kinds by the golden ratio: as even as any fixed pattern, for every share. */
static bool is_mixed(int beat, double share) {
    double x = beat * 0.61803398874989485;
    return x - floor(x) < share;
}

static void play(ring *r) {
    for (int i = 0; i < r->beats; i++) {
        size_t at = is_mixed(i, r->mixed) ? (size_t)r->stages : 0;
        double now = i >= r->depth ? r->back[i - r->depth] : 0;
        for (int s = 0; s < r->stages; s++) {
            now = fmax(now, r->stage_free[s]) + r->seconds[at + (size_t)s];
            r->stage_free[s] = now;
            now = fmax(now, r->link_free[s]) + r->link[at + (size_t)s];
            r->link_free[s] = now;
        }
        r->back[i] = now;
    }
}

static sh_cost_cycle judge(const ring *r) {
    int half = r->beats / 2;
    double most = -1, trip = 0;
    sh_cost_cycle c = {.period = (r->back[r->beats - 1] - r->back[half - 1]) / (r->beats - half)};
    for (int s = 0; s < r->stages; s++) {
        double mean = (1 - r->mixed) * r->seconds[s] + r->mixed * r->seconds[r->stages + s];
        if (mean > most) {
            most = mean;
            c.slowest = s;
        }
    }
    for (int i = half; i < r->beats; i++) trip += (r->back[i] - r->back[i - r->depth]) / (r->beats - half);
    c.round_trip = trip;
    c.bubble = c.period > 0 ? fmax(0, 1 - most / c.period) : 0;
    return c;
}

sh_status sh_cost_ring(int stages, const double *seconds, const double *link, double mixed, double in_flight,
                       sh_cost_cycle *out) {
    ring r = {
        .stages = stages, .seconds = seconds, .link = link, .mixed = mixed, .depth = (int)fmax(1, in_flight + 0.5)};
    r.beats = 2 * ((LAPS * r.depth > LEAST_BEATS ? LAPS * r.depth : LEAST_BEATS) / 2);
    double *room = calloc((size_t)(2 * stages + r.beats), sizeof *room);
    if (!room) SH_FAIL(SH_EMEMORY, "forecast: no memory for %d stages", stages);
    r.stage_free = room;
    r.link_free = room + stages;
    r.back = room + 2 * stages;
    play(&r);
    *out = judge(&r);
    free(room);
    return SH_OK;
}

/* --- the forecast --------------------------------------------------------------------------------------------------
 */

typedef struct scene {
    const sh_cost_model *m;
    sh_plan_shape shape;
    sh_cost_rank *cost[2];  /* [n_rank] without and with a piece of prompt */
    double *seconds, *link; /* [2][stages] */
    const sh_forecast_mix *mix;
} scene;

/* The way to the next stage; the last one's answers are small: a latency. */
static double way(const scene *x, int kind, int stage) {
    const sh_cost_net *n = &x->m->net;
    double most = 0;
    if (x->shape.pp == 1) return 0;
    if (stage + 1 == x->shape.pp)
        return (int)x->m->plan->n_rank > n->ranks_per_node ? n->between.latency : n->within.latency;
    for (int i = 0; i < x->shape.width; i++) most = fmax(most, x->cost[kind][stage * x->shape.width + i].cut.seconds);
    return most;
}

static sh_status set_scene(scene *x) {
    size_t ranks = x->m->plan->n_rank, stages = (size_t)x->shape.pp;
    x->cost[0] = calloc(2 * ranks, sizeof *x->cost[0]);
    x->seconds = calloc(4 * stages, sizeof *x->seconds);
    if (!x->cost[0] || !x->seconds) SH_FAIL(SH_EMEMORY, "forecast: no memory for %zu ranks", ranks);
    x->cost[1] = x->cost[0] + ranks;
    x->link = x->seconds + 2 * stages;
    for (int kind = 0; kind < 2; kind++) {
        SH_TRY(sh_cost_step(x->m, x->mix->span, kind ? x->mix->n_spans : x->mix->n_decode, x->cost[kind]));
        for (int s = 0; s < x->shape.pp; s++) {
            size_t at = (size_t)kind * stages + (size_t)s;
            x->seconds[at] = x->cost[kind][s * x->shape.width].seconds + SH_STEP_SECONDS;
            x->link[at] = way(x, kind, s);
        }
    }
    return SH_OK;
}

void sh_forecast_add_rank(const sh_cost_rank *c, double share, sh_forecast_rank *r) {
    const double sent[] = {c->dispatch.bytes, c->results.bytes, c->gather.bytes + c->head.bytes, c->context.bytes,
                           c->cut.bytes};
    for (int i = 0; i < SH_CAUSES; i++) r->seconds[i] += share * c->part[i].seconds;
    for (int i = 0; i < (int)(sizeof sent / sizeof *sent); i++) r->sent[i] += share * sent[i];
    r->exchange += share * (c->exposed + c->waits);
    r->memory_bound += share * c->memory_bound;
    r->overlapped += share * c->hidden;
    r->weight_bytes += share * (c->part[SH_CAUSE_WEIGHTS].bytes + c->part[SH_CAUSE_EXPERTS].bytes);
    r->kv_bytes += share * c->part[SH_CAUSE_ATTENTION].bytes;
}

static double tell_ranks(const scene *x, const sh_cost_cycle *cycle, sh_forecast_rank *rank) {
    double sent = 0;
    for (size_t i = 0; i < x->m->plan->n_rank; i++) {
        sh_forecast_rank r = {0};
        sh_forecast_add_rank(&x->cost[0][i], 1 - x->mix->mixed, &r);
        sh_forecast_add_rank(&x->cost[1][i], x->mix->mixed, &r);
        r.seconds[SH_CAUSE_OTHER] += SH_STEP_SECONDS;
        double busy = r.exchange;
        for (int k = 0; k < SH_CAUSES; k++) busy += r.seconds[k];
        r.idle = fmax(0, cycle->period - busy);
        for (int k = 0; k < SH_FORECAST_WIRES; k++) sent += r.sent[k];
        if (rank) rank[i] = r;
    }
    return sent;
}

double sh_forecast_tail(const sh_workload *w, double seqs) {
    double sum = 0, squares = 0, longest = 0, at_once = fmin(1, seqs / w->requests);
    for (int i = 0; i < w->n; i++) {
        const sh_workload_bin *b = &w->bin[i];
        sum += b->requests * b->output;
        squares += b->requests * b->output * b->output;
        longest = fmax(longest, b->output);
    }
    double left = at_once * sum / w->requests + (1 - at_once) * squares / (2 * sum);
    return fmax(0, longest - left);
}

/* What a job takes beyond its rate: prompts of the first sequences come a chunk at a time, meanwhile half of them run,
 * and the last ones run out alone. */
static double start_and_end(const scene *x, const sh_workload *w, const sh_forecast *f, double replicas) {
    double lane = f->mix.decode * f->mix.in_flight, chunk = ceil((double)x->m->plan->chunk / x->shape.ep);
    double begin = lane * sh_workload_mean_prompt(w) / chunk * f->cycle.period / 2;
    double plain = f->step_decode / ((1 - f->mix.mixed) * f->step_decode + f->mix.mixed * f->step_mixed);
    return begin + sh_forecast_tail(w, lane * x->shape.ep * replicas) * f->cycle.round_trip * plain;
}

static sh_status tell(const scene *x, const sh_workload *w, double replicas, sh_forecast *f, sh_forecast_rank *rank) {
    double output = sh_workload_mean_output(w);
    SH_TRY(sh_cost_ring(x->shape.pp, x->seconds, x->link, f->mix.mixed, f->mix.in_flight, &f->cycle));
    double per_group = f->mix.requests * x->shape.ep / f->cycle.period;
    f->requests = per_group * replicas;
    f->tokens_out = f->requests * output;
    f->tokens_in = f->requests * sh_workload_mean_prompt(w);
    f->step_decode = x->seconds[f->cycle.slowest];
    f->step_mixed = x->seconds[x->shape.pp + f->cycle.slowest];
    f->seconds = w->requests / f->requests + start_and_end(x, w, f, replicas);
    f->sent = tell_ranks(x, &f->cycle, rank) / (f->mix.requests * x->shape.ep * output);
    return SH_OK;
}

sh_status sh_cost_forecast(const sh_cost_model *m, const sh_workload *w, double seqs, double replicas, sh_forecast *out,
                           sh_forecast_rank *rank) {
    scene x = {.m = m, .shape = sh_plan_shape_of(m->plan)};
    if (x.shape.prefill > 0) return sh_forecast_with_prefill(m, w, seqs, replicas, out, rank);
    sh_forecast f = {.seqs = fmax(1, fmin(seqs, w->requests / replicas))};
    f.mix = sh_forecast_mix_of(m->plan, w, f.seqs);
    x.mix = &f.mix;
    sh_status st = set_scene(&x);
    if (st == SH_OK) st = tell(&x, w, replicas, &f, rank);
    free(x.cost[0]);
    free(x.seconds);
    if (st == SH_OK) *out = f;
    return st;
}
