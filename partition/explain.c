/* Plans in words. See explain.h; what goes into a plan's file is planfile.c's. */
#include "partition/explain.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GIB       0x1p30
#define MOST_ROWS 24 /* of a table of ranks; above, one row for each stage */

/* A number with three digits that never turns into powers of ten. */
typedef struct figure {
    char s[24];
} figure;
static figure show(double v) {
    figure f;
    if (fabs(v) >= 100)
        snprintf(f.s, sizeof f.s, "%.0f", v);
    else if (fabs(v) >= 10)
        snprintf(f.s, sizeof f.s, "%.1f", v);
    else
        snprintf(f.s, sizeof f.s, "%.2f", v);
    return f;
}

void sh_explain_time(double seconds, char *text, size_t size) {
    if (seconds < 100)
        snprintf(text, size, "%.3g s", seconds);
    else if (seconds < 5400)
        snprintf(text, size, "%.3g min", seconds / 60);
    else if (seconds < 100 * 3600)
        snprintf(text, size, "%.3g hours", seconds / 3600);
    else
        snprintf(text, size, "%.3g days", seconds / 86400);
}

sh_status sh_explain_shape(const sh_choice *x, sh_buf *out) {
    if (x->replicas > 1)
        SH_TRY(sh_buf_printf(out, "%d groups of %d rank%s: ", x->replicas, x->ranks, x->ranks == 1 ? "" : "s"));
    if (x->shape.pp == 1)
        SH_TRY(sh_buf_add_str(out, x->shape.width > 1     ? "one stage"
                                   : x->shape.prefill > 0 ? "one rank that decodes"
                                                          : "the whole model on each rank"));
    else
        SH_TRY(sh_buf_printf(out, "pipeline of %d stages", x->shape.pp));
    if (x->shape.ep > 1) SH_TRY(sh_buf_printf(out, " × %d ranks that divide sequences and experts", x->shape.ep));
    if (x->shape.tp > 1) SH_TRY(sh_buf_printf(out, " × %d ranks that divide heads and columns", x->shape.tp));
    if (x->shape.cp > 1) SH_TRY(sh_buf_printf(out, " × %d ranks that divide positions", x->shape.cp));
    if (x->shape.prefill > 0)
        SH_TRY(sh_buf_printf(out, " + %d rank%s only read%s prompts", x->shape.prefill,
                             x->shape.prefill > 1 ? "s that" : " that", x->shape.prefill > 1 ? "" : "s"));
    return SH_OK;
}

/* --- what limits a plan --------------------------------------------------------------------------------------------
 */

static double busy_of(const sh_forecast_rank *r) {
    double n = r->exchange;
    for (int i = 0; i < SH_CAUSES; i++) n += r->seconds[i];
    return n;
}

/* The rank whose stage has most to do. */
static const sh_forecast_rank *slowest(const sh_choice *x, const sh_forecast *f, const sh_forecast_rank *rank) {
    return &rank[f->cycle.slowest * x->shape.width];
}

static void limit_words(const sh_search_options *o, const sh_choice *x, const sh_forecast *f, const sh_forecast_rank *r,
                        char *text, size_t size) {
    double period = f->cycle.period, busy = busy_of(r), compute = busy - r->exchange;
    double rows = f->mix.decode * x->shape.ep;
    const char *where = x->ranks > x->ranks_per_node ? "between nodes" : "within the node";
    const sh_cost_link *l = x->ranks > x->ranks_per_node ? &o->cluster->between : &o->cluster->within;
    double read = (r->weight_bytes + r->kv_bytes) * 1e-9;
    if (f->prompts.slower)
        snprintf(
            text, size,
            "prompts: %d rank%s can read %s tokens/s of them, and %s could be answered; so %.0f sequences decode at "
            "a time",
            x->shape.prefill, x->shape.prefill > 1 ? "s" : "", show(f->prompts.rows).s, show(f->prompts.needed).s,
            f->mix.decode * f->mix.in_flight);
    else if (r->exchange > 0.3 * period)
        snprintf(text, size, "exchange: %s of %s ms of a step, on links of %s Gbit/s %s", show(r->exchange * 1e3).s,
                 show(period * 1e3).s, show(l->bandwidth * 8e-9).s, where);
    else if (r->idle > 0.25 * period)
        snprintf(text, size, "waiting: the busiest stage stands idle %.0f %% of the time%s", 100 * r->idle / period,
                 f->mix.in_flight < x->shape.pp ? ", too few sequences for all stages" : "");
    else if (r->memory_bound > 0.5 * compute)
        snprintf(text, size, "memory bandwidth: %s GB read for %.0f decode rows in a step of %s ms", show(read).s, rows,
                 show(period * 1e3).s);
    else
        snprintf(text, size, "arithmetic: %s of %s ms of a step with %.0f decode rows",
                 show((compute - r->memory_bound) * 1e3).s, show(period * 1e3).s, rows);
}

sh_status sh_explain_limit(const sh_search_options *o, const sh_choice *x, char *text, size_t size) {
    sh_forecast f;
    sh_forecast_rank *rank = calloc((size_t)x->ranks, sizeof *rank);
    if (!rank) SH_FAIL(SH_EMEMORY, "planner: no memory for %d ranks", x->ranks);
    sh_status st = sh_search_forecast(o, x, &f, rank);
    if (st == SH_OK) limit_words(o, x, &f, slowest(x, &f, rank), text, size);
    free(rank);
    return st;
}

/* --- tables of ranks -----------------------------------------------------------------------------------------------
 */

static sh_status rank_name(const sh_choice *x, int rank, int n, sh_buf *out) {
    char s[32];
    if (n > 1)
        snprintf(s, sizeof s, "%d-%d", rank, rank + n - 1);
    else
        snprintf(s, sizeof s, "%d", rank);
    return sh_buf_printf(out, "  %-8s%5d  ", s, rank / x->ranks_per_node);
}

static sh_status layers_name(const Shoal__PlanRank *r, sh_buf *out) {
    char s[32];
    snprintf(s, sizeof s, r->last - r->first > 1 ? "%d-%d" : "%d", r->first, r->last - 1);
    return sh_buf_printf(out, "%-8s", s);
}

static int experts_of(const sh_config *c, const sh_choice *x, const Shoal__PlanRank *r) {
    int most = 0;
    if (x->shape.ep == 1) return c->experts;
    for (size_t i = 0; i < r->n_experts; i++)
        if ((int)r->experts[i]->n_expert > most) most = (int)r->experts[i]->n_expert;
    return most;
}

static sh_status memory_row(const sh_search_options *o, const sh_choice *x, int rank, int n, sh_buf *out) {
    const sh_config *c = o->config;
    const Shoal__PlanRank *r = x->plan->rank[rank];
    sh_plan_memory m = sh_choice_memory(o, x, rank);
    int member = rank % x->shape.width, tp = x->shape.tp, heads = c->layer[r->first].heads / tp;
    int ff = sh_cost_share(c->layer[r->first].ff, SH_SHARE_COLUMNS, member, tp);
    sh_range ids = sh_share_range_of((sh_share){.parts = tp}, member, c->vocab, SH_SHARE_VOCAB);
    char vocab[32] = "-", experts[16] = "-";
    if (c->experts) snprintf(experts, sizeof experts, "%d", experts_of(c, x, r));
    if (r->last == c->n_layers && rank < x->shape.decode && (x->shape.cp == 1 || member == 0))
        snprintf(vocab, sizeof vocab, "%d-%d", ids.lo, ids.hi - 1);
    double kv = x->plan->kv_memory ? (double)x->plan->kv_memory
                                   : (double)sh_cluster_memory(o->cluster, x->ranks_per_node) -
                                         (double)(m.weights + m.scratch + m.reserve);
    SH_TRY(rank_name(x, rank, n, out));
    SH_TRY(layers_name(r, out));
    return sh_buf_printf(out, "%5d %8d %8s  %-15s %8.2f %6.2f %8.2f\n", heads, ff, experts, vocab,
                         (double)m.weights / GIB, (double)m.scratch / GIB, kv / GIB);
}

static const char *rank_limit(const sh_choice *x, int rank, const sh_forecast_rank *r, double period) {
    double busy = busy_of(r), compute = busy - r->exchange;
    if (r->idle > 0.5 * period) return rank < x->shape.decode ? "waits for other stages" : "waits for prompts";
    if (r->exchange > 0.5 * busy) return "exchange";
    return r->memory_bound > 0.5 * compute ? "memory bandwidth" : "arithmetic";
}

static sh_status time_row(const sh_choice *x, int rank, int n, const sh_forecast_rank *r, double period, sh_buf *out) {
    double sent = 0;
    for (int i = 0; i < SH_FORECAST_WIRES; i++) sent += r->sent[i];
    SH_TRY(rank_name(x, rank, n, out));
    return sh_buf_printf(out, "%9.2f %9.2f %8.2f %9.2f %7.2f %7.2f  %9.3f  %s\n", r->seconds[SH_CAUSE_WEIGHTS] * 1e3,
                         r->seconds[SH_CAUSE_ATTENTION] * 1e3, r->seconds[SH_CAUSE_EXPERTS] * 1e3, r->exchange * 1e3,
                         r->seconds[SH_CAUSE_OTHER] * 1e3, r->idle * 1e3, sent * 1e-6, rank_limit(x, rank, r, period));
}

static sh_status rank_tables(const sh_search_options *o, const sh_choice *x, const sh_forecast *f,
                             const sh_forecast_rank *rank, sh_buf *out) {
    int step = x->ranks > MOST_ROWS ? x->shape.width : 1;
    SH_TRY(sh_buf_printf(
        out, "\n  rank%s     node  layers  heads  columns  experts  vocabulary       weights   work   KV GiB\n",
        step > 1 ? "s" : " "));
    for (int i = 0; i < x->ranks; i += step) SH_TRY(memory_row(o, x, i, step, out));
    SH_TRY(sh_buf_printf(out,
                         "\n  milliseconds of a step by cause, MB sent in it, and what limits the rank:\n"
                         "  rank%s     node    weights attention  experts  exchange   other    idle      MB\n",
                         step > 1 ? "s" : " "));
    for (int i = 0; i < x->ranks; i += step) SH_TRY(time_row(x, i, step, &rank[i], f->cycle.period, out));
    return SH_OK;
}

static sh_status traffic(const sh_choice *x, const sh_forecast *f, const sh_forecast_rank *rank, sh_buf *out) {
    double sum[SH_FORECAST_WIRES] = {0}, hidden = 0, waiting = 0;
    if (x->ranks == 1) return SH_OK;
    for (int i = 0; i < x->ranks; i++) {
        for (int k = 0; k < SH_FORECAST_WIRES; k++) sum[k] += rank[i].sent[k];
        hidden += rank[i].overlapped / x->ranks;
        waiting += rank[i].exchange / x->ranks;
    }
    SH_TRY(
        sh_buf_printf(out, "  traffic    %s kB per token put out; MB per step of the group:", show(f->sent * 1e-3).s));
    bool any = false;
    for (int k = 0; k < SH_FORECAST_WIRES; k++)
        if (sum[k] > 0) {
            SH_TRY(sh_buf_printf(out, "%s %s %s", any ? "," : "", sh_forecast_wires[k], show(sum[k] * 1e-6).s));
            any = true;
        }
    SH_TRY(sh_buf_add_str(out, "\n"));
    if (x->shape.width == 1) return SH_OK;
    return sh_buf_printf(out, "  exchange   %s ms of a step hide behind computing, %s ms are waited for\n",
                         show(hidden * 1e3).s, show(waiting * 1e3).s);
}

/* Both pipelines, where prompts have one of their own. */
static sh_status two_paces(const sh_forecast *f, sh_buf *out) {
    const sh_forecast_prompts *p = &f->prompts;
    char first[32];
    sh_explain_time(p->first, first, sizeof first);
    SH_TRY(sh_buf_printf(out, "  rows       %.0f micro-batches in flight, each with %.0f decode rows\n",
                         f->mix.in_flight, f->mix.decode));
    SH_TRY(sh_buf_printf(out,
                         "  step       every %s ms; the slowest stage computes %s; a sequence's next token comes after "
                         "%s\n",
                         show(f->cycle.period * 1e3).s, show(f->step_decode * 1e3).s,
                         show(f->cycle.round_trip * 1e3).s));
    SH_TRY(sh_buf_printf(out,
                         "  prompts    %.0f rows at a time, one after the other every %s ms; in full chunks up to %s "
                         "tokens/s, and %s could be answered: %s set%s the pace\n",
                         f->mix.piece, show(p->period * 1e3).s, show(p->rows).s, show(p->needed).s,
                         p->slower ? "reading" : "the ranks that decode", p->slower ? "s" : ""));
    return sh_buf_printf(out,
                         "             %.1f of %.0f sequences are being read, %s each; the busiest rank waits %s ms of "
                         "a micro-batch for its links\n",
                         p->handing, f->seqs, first, show(p->exposed * 1e3).s);
}

static sh_status one_pace(const sh_choice *x, const sh_forecast *f, sh_buf *out) {
    SH_TRY(sh_buf_printf(out,
                         "  rows       %.0f micro-batches in flight%s, each with %.0f decode rows, %.0f %% of them "
                         "with %.0f prompt rows\n",
                         f->mix.in_flight, x->shape.ep > 1 ? " on each rank" : "", f->mix.decode, 100 * f->mix.mixed,
                         f->mix.piece));
    return sh_buf_printf(out,
                         "  step       every %s ms; the slowest stage computes %s without and %s with prompt rows; a "
                         "sequence's next token comes after %s\n",
                         show(f->cycle.period * 1e3).s, show(f->step_decode * 1e3).s, show(f->step_mixed * 1e3).s,
                         show(f->cycle.round_trip * 1e3).s);
}

static sh_status speed(const sh_search_options *o, const sh_choice *x, const sh_forecast *f, sh_buf *out) {
    char whole[32];
    sh_explain_time(f->seconds, whole, sizeof whole);
    SH_TRY(sh_buf_printf(
        out, "  runs with  --max-seqs %d --chunk %d: KV for %.0f sequences at once, and up to %d tokens in one\n",
        x->plan->max_seqs, x->plan->chunk, x->seqs, x->kv.tokens));
    SH_TRY(x->shape.prefill > 0 ? two_paces(f, out) : one_pace(x, f, out));
    return sh_buf_printf(out, "  speed      %s tokens/s out, %s in; %.0f requests take %s\n", show(f->tokens_out).s,
                         show(f->tokens_in).s, o->workload->requests, whole);
}

/* What placing by counts brings, by the counts. */
static sh_status placement(const sh_search_options *o, const sh_choice *x, const sh_forecast *f, sh_buf *out) {
    sh_forecast even;
    if (!o->routing || !o->fixed.routing || x->shape.ep == 1) return SH_OK;
    SH_TRY(sh_search_unplaced(o, x, &even));
    return sh_buf_printf(out, "  placement  by counts: a step every %s ms; with even shares in order %s (%+.0f %%)\n",
                         show(f->cycle.period * 1e3).s, show(even.cycle.period * 1e3).s,
                         100 * (even.cycle.period / f->cycle.period - 1));
}

sh_status sh_explain_plan(const sh_search_options *o, const sh_choice *x, sh_buf *out) {
    char limit[512];
    sh_forecast f;
    SH_TRY(sh_buf_add_str(out, "plan       "));
    SH_TRY(sh_explain_shape(x, out));
    SH_TRY(sh_buf_add_str(out, "\n"));
    sh_forecast_rank *rank = calloc((size_t)x->ranks, sizeof *rank);
    if (!rank) SH_FAIL(SH_EMEMORY, "planner: no memory for %d ranks", x->ranks);
    sh_status st = sh_search_forecast(o, x, &f, rank);
    if (st == SH_OK) st = rank_tables(o, x, &f, rank, out);
    if (st == SH_OK) st = sh_buf_add_str(out, "\n");
    if (st == SH_OK) st = speed(o, x, &f, out);
    if (st == SH_OK) st = traffic(x, &f, rank, out);
    if (st == SH_OK) st = placement(o, x, &f, out);
    if (st == SH_OK) limit_words(o, x, &f, slowest(x, &f, rank), limit, sizeof limit);
    if (st == SH_OK) st = sh_buf_printf(out, "  limit      %s\n", limit);
    free(rank);
    return st;
}

/* --- the others ----------------------------------------------------------------------------------------------------
 */

static sh_status best_line(const sh_choice *x, int place, sh_buf *out) {
    char whole[32];
    sh_explain_time(x->forecast.seconds, whole, sizeof whole);
    SH_TRY(sh_buf_printf(out, "  %d. %9s tokens/s out, %-10s  ", place, show(x->forecast.tokens_out).s, whole));
    SH_TRY(sh_explain_shape(x, out));
    return sh_buf_add_str(out, "\n");
}

static sh_status lost_line(const sh_search_options *o, sh_choice *x, bool tried, const sh_choice *winner, sh_buf *out) {
    SH_TRY(sh_buf_printf(out, "  %s: ", sh_way_names[x->way]));
    if (!tried) return sh_buf_printf(out, "not possible: %s\n", x->why);
    if (!x->fits) return sh_buf_printf(out, "does not fit: %s\n", x->why);
    SH_TRY(sh_explain_limit(o, x, x->why, sizeof x->why));
    SH_TRY(sh_buf_printf(out, "slower, %s tokens/s (%.0f %%) with ", show(x->forecast.tokens_out).s,
                         100 * winner->forecast.seconds / x->forecast.seconds));
    SH_TRY(sh_explain_shape(x, out));
    return sh_buf_printf(out, ": %s\n", x->why);
}

sh_status sh_explain_search(const sh_search_options *o, sh_search *s, sh_buf *out) {
    SH_TRY(sh_buf_printf(out, "\nthe best of %d layouts (%d fit):\n", s->tried, s->fitting));
    for (int i = 0; i < s->n; i++) SH_TRY(best_line(&s->best[i], i + 1, out));
    SH_TRY(sh_buf_add_str(out, "\nwhy the other ways lost:\n"));
    for (int i = 0; i < SH_WAYS; i++) {
        s->of_way[i].way = (sh_way)i;
        if (s->n && s->best[0].way == (sh_way)i) continue;
        SH_TRY(lost_line(o, &s->of_way[i], s->has_way[i], s->n ? &s->best[0] : &s->of_way[i], out));
    }
    return SH_OK;
}

/* --- better machines -----------------------------------------------------------------------------------------------
 */

static sh_status gain_line(const char *what, double before, double after, sh_buf *out) {
    return sh_buf_printf(out, "  %-32s %+.0f %%\n", what, 100 * (before / after - 1));
}

/* The same plan on another machine. */
static sh_status same_plan(const sh_search_options *o, const sh_choice *x, const char *what, const sh_cluster *c,
                           sh_buf *out) {
    sh_search_options other = *o;
    sh_forecast f;
    other.cluster = c;
    SH_TRY(sh_search_forecast(&other, x, &f, NULL));
    return gain_line(what, x->forecast.seconds, f.seconds, out);
}

static sh_status new_search(const sh_search_options *o, const sh_choice *x, const char *what, const sh_cluster *c,
                            sh_buf *out) {
    sh_search_options other = *o;
    sh_search *s = NULL;
    other.cluster = c;
    SH_TRY(sh_search_run(&other, &s));
    sh_status st = s->n ? gain_line(what, x->forecast.seconds, s->best[0].forecast.seconds, out) : SH_OK;
    sh_search_free(&s);
    return st;
}

sh_status sh_explain_better(const sh_search_options *o, const sh_choice *x, sh_buf *out) {
    sh_cluster c = *o->cluster;
    SH_TRY(sh_buf_add_str(out, "\nwhat a better machine would bring:\n"));
    c.read *= 2;
    SH_TRY(same_plan(o, x, "twice the memory bandwidth", &c, out));
    c = *o->cluster;
    c.fma *= 2;
    SH_TRY(same_plan(o, x, "twice the arithmetic", &c, out));
    if (x->ranks > x->ranks_per_node) {
        c = *o->cluster;
        c.between.bandwidth *= 4;
        c.between.latency /= 4;
        SH_TRY(same_plan(o, x, "links four times as fast", &c, out));
    }
    c = *o->cluster;
    c.memory *= 2;
    SH_TRY(new_search(o, x, "twice the memory, planned again", &c, out));
    c = *o->cluster;
    c.nodes *= 2;
    return c.nodes <= SH_CLUSTER_NODES ? new_search(o, x, "twice the nodes, planned again", &c, out) : SH_OK;
}
