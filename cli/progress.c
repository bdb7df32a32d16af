/* Progress and closing table on standard error. See progress.h. */
#include "cli/progress.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include "cli/predict.h"
#include "common/clock.h"
#include "common/json.h"
#include "proto/group.pb-c.h"

#define QUIET_START 3.0 /* seconds */

const char *const sh_progress_styles[] = {"auto", "bar", "plain", "json", "none", NULL};

void sh_progress_begin(sh_progress *p, sh_progress_style style) {
    if (style == SH_PROGRESS_AUTO) style = isatty(STDERR_FILENO) ? SH_PROGRESS_BAR : SH_PROGRESS_PLAIN;
    *p = (sh_progress){.style = style, .born = sh_now()};
}

/* One write per line, so that lines of several processes do not mix. */
static void put_line(sh_progress *p, const char *s) {
    char line[2304];
    int n = snprintf(line, sizeof line, "%s%s\n", p->bar_shown ? "\r\033[K" : "", s);
    if (n >= (int)sizeof line) n = (int)sizeof line - 1;
    p->bar_shown = false;
    ssize_t w = write(STDERR_FILENO, line, (size_t)n);
    (void)w;
}

static void put_event(sh_progress *p, const char *event, const char *text) {
    if (p->style != SH_PROGRESS_JSON) {
        put_line(p, text);
        return;
    }
    json_t *j = json_pack("{s:s, s:s}", "event", event, "text", text);
    char *s = j ? json_dumps(j, JSON_COMPACT) : NULL;
    if (s) put_line(p, s);
    free(s);
    json_decref(j);
}

void sh_progress_say(sh_progress *p, const char *event, const char *fmt, ...) {
    char text[2048];
    va_list ap;
    if (p->style == SH_PROGRESS_NONE) return;
    if (strcmp(event, "start") == 0) p->awaits_start = false;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    put_event(p, event, text);
}

void sh_progress_warn(sh_progress *p, const char *fmt, ...) {
    char text[2048];
    int n = snprintf(text, sizeof text, "%s", p->style == SH_PROGRESS_JSON ? "" : "shoal run: ");
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text + n, sizeof text - (size_t)n, fmt, ap);
    va_end(ap);
    put_event(p, "warning", text);
}

void sh_progress_end(sh_progress *p) {
    if (p->bar_shown) {
        ssize_t w = write(STDERR_FILENO, "\n", 1);
        (void)w;
    }
    p->bar_shown = false;
}

/* Rates smoothed over about five seconds; the first sample with work done starts them. */
static void sample(sh_progress *p, const sh_progress_view *v, double now) {
    if (!p->have_first) {
        p->have_first = true;
        p->first = p->sampled = *v;
        p->last_sampled = p->began = now;
        return;
    }
    double dt = now - p->last_sampled;
    if (dt < 0.5) return;
    if (v->tokens_in < p->sampled.tokens_in || v->tokens_out < p->sampled.tokens_out)
        p->sampled = *v; /* a new coordinator counts from what was saved */
    double keep = p->rate_out + p->rate_in > 0 ? 1 / (1 + dt / 5) : 0;
    p->rate_in = keep * p->rate_in + (1 - keep) * (double)(v->tokens_in - p->sampled.tokens_in) / dt;
    p->rate_out = keep * p->rate_out + (1 - keep) * (double)(v->tokens_out - p->sampled.tokens_out) / dt;
    p->sampled = *v;
    p->last_sampled = now;
}

/* Seconds left by the requests answered so far in this run; −1: not known yet. */
static double time_left(const sh_progress *p, const sh_progress_view *v, double now) {
    if (v->total && v->done == v->total) return 0;
    int64_t done = (int64_t)(v->done - p->first.done);
    if (done <= 0 || now - p->began < 1) return -1;
    return (double)(v->total - v->done) * (now - p->began) / (double)done;
}

static void clock_text(double seconds, char *to, size_t size) {
    long s = (long)(seconds + 0.5);
    if (seconds < 0)
        snprintf(to, size, "-:--");
    else if (s >= 3600)
        snprintf(to, size, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    else
        snprintf(to, size, "%ld:%02ld", s / 60, s % 60);
}

void sh_progress_add_load(sh_progress_view *v, const Shoal__GroupState *g) {
    for (size_t i = 0; i < g->n_times; i++) {
        Shoal__StageTimes *t = shoal__stage_times__unpack(NULL, g->times[i].len, g->times[i].data);
        if (!t) continue;
        v->load_bytes += t->load_bytes;
        v->load_total += t->load_total;
        if (t->load_seconds > v->load_seconds) v->load_seconds = t->load_seconds;
        shoal__stage_times__free_unpacked(t, NULL);
    }
}

/* Nothing is answered while ranks load: then the bar is theirs. */
static bool is_loading(const sh_progress_view *v) {
    return v->state && strcmp(v->state, "loading") == 0 && v->load_total > 0;
}

static void state_text(const sh_progress_view *v, char *to, size_t size) {
    char left[32];
    double rate = v->load_seconds > 0 ? (double)v->load_bytes / v->load_seconds : 0;
    to[0] = 0;
    if (!v->state || !*v->state) return;
    int n = snprintf(to, size, ", %s", v->state);
    if (!is_loading(v)) return;
    clock_text(rate > 0 ? (double)(v->load_total - v->load_bytes) / rate : -1, left, sizeof left);
    snprintf(to + n, size - (size_t)n, " %.2f of %.2f GB, %.2f GB/s, %s left", (double)v->load_bytes * 1e-9,
             (double)v->load_total * 1e-9, rate * 1e-9, left);
}

/* Rates are not known before half a second of work. */
static void rates_text(const sh_progress *p, char *to, size_t size) {
    if (p->rate_in + p->rate_out > 0)
        snprintf(to, size, "%.0f in %.0f out", p->rate_in, p->rate_out);
    else
        snprintf(to, size, "- in - out");
}

static void show_words(sh_progress *p, const sh_progress_view *v, double left) {
    char text[512], bar[32] = "", clock[32], now[128], rates[64];
    enum { CELLS = 20 };
    uint64_t done = is_loading(v) ? v->load_bytes : v->done, total = is_loading(v) ? v->load_total : v->total;
    int filled = total ? (int)((double)done * CELLS / (double)total) : 0;
    if (p->style == SH_PROGRESS_BAR) {
        bar[0] = '[';
        for (int i = 0; i < CELLS; i++) bar[1 + i] = i < filled ? '#' : '.';
        memcpy(bar + 1 + CELLS, "] ", 3);
    }
    clock_text(left, clock, sizeof clock);
    state_text(v, now, sizeof now);
    rates_text(p, rates, sizeof rates);
    int n = snprintf(text, sizeof text, "%s%s%llu/%llu requests, tokens/s %s, %s left, ranks %d/%d%s",
                     p->style == SH_PROGRESS_BAR ? "\r" : "", bar, (unsigned long long)v->done,
                     (unsigned long long)v->total, rates, clock, v->ranks_up, v->ranks, now);
    if (p->style == SH_PROGRESS_BAR) {
        n += snprintf(text + n, sizeof text - (size_t)n, "\033[K");
        ssize_t w = write(STDERR_FILENO, text, (size_t)n);
        (void)w;
        p->bar_shown = true;
    } else {
        put_line(p, text);
    }
}

static void show_json(sh_progress *p, const sh_progress_view *v, double left) {
    json_t *j =
        json_pack("{s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:i, s:i, s:s}", "event", "progress", "done",
                  (json_int_t)v->done, "total", (json_int_t)v->total, "errors", (json_int_t)v->errors, "tokens_in",
                  (json_int_t)v->tokens_in, "tokens_out", (json_int_t)v->tokens_out, "tokens_shared",
                  (json_int_t)v->tokens_shared, "tokens_in_per_s", p->rate_in, "tokens_out_per_s", p->rate_out,
                  "seconds_left", left, "ranks_up", v->ranks_up, "ranks", v->ranks, "state", v->state ? v->state : "");
    if (is_loading(v)) {
        json_object_set_new(j, "load_bytes", json_integer((json_int_t)v->load_bytes));
        json_object_set_new(j, "load_total", json_integer((json_int_t)v->load_total));
    }
    char *s = j ? json_dumps(j, JSON_COMPACT | JSON_REAL_PRECISION(6)) : NULL;
    if (s) put_line(p, s);
    free(s);
    json_decref(j);
}

void sh_progress_update(sh_progress *p, const sh_progress_view *v, bool at_once) {
    double now = sh_now(), every = p->style == SH_PROGRESS_BAR ? 0.2 : p->style == SH_PROGRESS_JSON ? 1 : 5;
    if (p->awaits_start && now - p->born < QUIET_START) return;
    sample(p, v, now);
    if (p->style == SH_PROGRESS_NONE || (!at_once && p->last_shown > 0 && now - p->last_shown < every)) return;
    p->last_shown = now;
    double left = time_left(p, v, now);
    if (p->style == SH_PROGRESS_JSON)
        show_json(p, v, left);
    else
        show_words(p, v, left);
}

void sh_outcomes_add(sh_outcomes *o, int status) {
    for (int i = 0; i < o->n; i++)
        if (o->status[i] == status) {
            o->rows[i]++;
            return;
        }
    if (o->n < 16) {
        o->status[o->n] = status;
        o->rows[o->n++] = 1;
    }
}

static const char *outcome_name(int status) {
    switch (status) {
    case 200:
        return "answered";
    case 400:
        return "refused (400)";
    case 413:
        return "too long (413)";
    case 422:
        return "bad media (422)";
    case 499:
        return "cancelled (499)";
    case 500:
        return "our fault (500)";
    default:
        return "other";
    }
}

/* What the loading of all ranks took, as the last start of each group tells it. */
typedef struct load_sums {
    double bytes, received;                     /* of all */
    double seconds, reading, packing, exchange; /* of the slowest rank */
    int rank;
    const char *group;
} load_sums;

static load_sums sum_loads(const sh_closing *c) {
    load_sums s = {0};
    for (size_t g = 0; c->last && g < c->last->n_group; g++)
        for (size_t i = 0; strcmp(c->last->group[g]->state, "lost") != 0 && i < c->last->group[g]->n_times; i++) {
            const ProtobufCBinaryData *b = &c->last->group[g]->times[i];
            Shoal__StageTimes *t = shoal__stage_times__unpack(NULL, b->len, b->data);
            if (!t) continue;
            s.bytes += (double)t->load_bytes;
            s.received += (double)t->load_received;
            if (t->load_seconds > s.seconds)
                s = (load_sums){.bytes = s.bytes,
                                .received = s.received,
                                .seconds = t->load_seconds,
                                .reading = t->load_reading,
                                .packing = t->load_packing,
                                .exchange = t->load_exchange,
                                .rank = t->rank,
                                .group = c->last->group[g]->group};
            shoal__stage_times__free_unpacked(t, NULL);
        }
    return s;
}

static sh_status load_line(const sh_closing *c, sh_buf *to) {
    load_sums s = sum_loads(c);
    if (s.seconds <= 0) return SH_OK;
    SH_TRY(sh_buf_printf(to, "  load       %.1f s, %.2f GB of files, %.2f GB/s", s.seconds, s.bytes * 1e-9,
                         s.bytes / s.seconds * 1e-9));
    if (s.received > 0) SH_TRY(sh_buf_printf(to, ", %.2f GB from rank to rank", s.received * 1e-9));
    SH_TRY(sh_buf_add_str(to, "; "));
    if (c->last->n_group > 1) SH_TRY(sh_buf_printf(to, "%s, ", s.group));
    SH_TRY(sh_buf_printf(to, "rank %d took longest: reading %.1f s, packing %.1f s", s.rank, s.reading, s.packing));
    if (s.received > 0) SH_TRY(sh_buf_printf(to, ", exchange %.1f s", s.exchange));
    return sh_buf_add_str(to, "\n");
}

/* One line per stage: shares of its time by cause, and what it read; each group under its name where there are several.
 */
static sh_status stage_lines(const sh_closing *c, sh_buf *to) {
    bool head = false;
    for (size_t g = 0; c->last && g < c->last->n_group; g++) {
        const Shoal__GroupState *gs = c->last->group[g];
        bool named = c->last->n_group < 2;
        for (size_t i = 0; i < gs->n_times; i++) {
            Shoal__StageTimes *t = shoal__stage_times__unpack(NULL, gs->times[i].len, gs->times[i].data);
            if (!t) continue;
            double all = t->weights + t->attention + t->experts + t->exchange + t->other + t->idle;
            sh_status st = SH_OK;
            if (all > 0 && !head) {
                st = sh_buf_add_str(
                    to, "  stage   weights  attention  experts  exchange  other   idle     steps    weights read\n");
                head = true;
            }
            if (st == SH_OK && all > 0 && !named) {
                st = sh_buf_printf(to, "  %s, %s\n", gs->group, gs->state);
                named = true;
            }
            double reading = t->weights + t->experts; /* of all weights: in a small batch not all experts' are read */
            double f = all > 0 ? 100 / all : 0, gbs = reading > 0 ? (double)t->bytes / reading * 1e-9 : 0;
            if (st == SH_OK && all > 0)
                st = sh_buf_printf(
                    to, "  %5d   %5.0f %%  %7.0f %%  %5.0f %%  %6.0f %%  %3.0f %%  %3.0f %%  %8llu  %5.1f GB/s",
                    t->rank, t->weights * f, t->attention * f, t->experts * f, t->exchange * f, t->other * f,
                    t->idle * f, (unsigned long long)t->steps, gbs);
            if (st == SH_OK && all > 0 && c->bandwidth > 0)
                st = sh_buf_printf(to, ", %.0f %% of this machine's", gbs * 1e11 / c->bandwidth);
            if (st == SH_OK && all > 0) st = sh_buf_add_str(to, "\n");
            shoal__stage_times__free_unpacked(t, NULL);
            SH_TRY(st);
        }
    }
    return SH_OK;
}

static sh_status seconds_row(const char *what, double weights, double attention, double experts, double exchange,
                             double other, double idle, sh_buf *to) {
    return sh_buf_printf(to, "%-12s%9.2f  %9.2f  %7.2f  %8.2f  %5.2f  %5.2f\n", what, weights, attention, experts,
                         exchange, other, idle);
}

static sh_status predicted_rows(const Shoal__StageTimes *t, const sh_prediction *p, sh_buf *to) {
    if (t->rank < 0 || t->rank >= p->ranks) return SH_OK;
    const sh_forecast_rank *r = &p->rank[t->rank];
    SH_TRY(sh_buf_printf(to, "  %5d   ", t->rank));
    SH_TRY(seconds_row("measured", t->weights, t->attention, t->experts, t->exchange, t->other, t->idle, to));
    SH_TRY(sh_buf_printf(to, "  %5s   ", ""));
    return seconds_row("predicted", r->seconds[SH_CAUSE_WEIGHTS], r->seconds[SH_CAUSE_ATTENTION],
                       r->seconds[SH_CAUSE_EXPERTS], r->exchange, r->seconds[SH_CAUSE_OTHER], r->idle, to);
}

/* Seconds by cause beside what the planner would have said of these tokens. Of the first group: all have the same plan.
 */
static sh_status predicted_lines(const sh_closing *c, sh_buf *to) {
    if (!c->predicted || !c->last || c->last->n_group == 0) return SH_OK;
    const Shoal__GroupState *gs = c->last->group[0];
    SH_TRY(sh_buf_printf(to, "  predicted  %.1f s at work, %s\n", c->predicted->seconds, c->predicted->from));
    if (gs->n_times)
        SH_TRY(sh_buf_add_str(to, "  stage   seconds       weights  attention  experts  exchange  other   idle\n"));
    for (size_t i = 0; i < gs->n_times; i++) {
        Shoal__StageTimes *t = shoal__stage_times__unpack(NULL, gs->times[i].len, gs->times[i].data);
        if (!t) continue;
        sh_status st = predicted_rows(t, c->predicted, to);
        shoal__stage_times__free_unpacked(t, NULL);
        SH_TRY(st);
    }
    return SH_OK;
}

/* What the ranks of a group tell of their experts, summed. */
typedef struct expert_sums {
    double busiest, rows;         /* rows that experts computed: the busiest member's of each stage; all */
    double exposed[2], travel[2]; /* seconds: global, sliding */
    double sent;
} expert_sums;

static void add_expert_times(const Shoal__GroupState *g, int ep, expert_sums *to) {
    double most = 0;
    for (size_t i = 0; i < g->n_times; i++) {
        Shoal__StageTimes *t = shoal__stage_times__unpack(NULL, g->times[i].len, g->times[i].data);
        if (!t) continue;
        if (t->rank % ep == 0) most = 0; /* the next stage */
        if ((double)t->expert_rows > most) {
            to->busiest += (double)t->expert_rows - most;
            most = (double)t->expert_rows;
        }
        to->rows += (double)t->expert_rows;
        to->exposed[0] += t->exposed_global, to->exposed[1] += t->exposed_sliding;
        to->travel[0] += t->travel_global, to->travel[1] += t->travel_sliding;
        to->sent += (double)t->sent_experts;
        shoal__stage_times__free_unpacked(t, NULL);
    }
}

/* How evenly the experts' work lay on the members of a stage, and how much of the exchange nothing was computed beside.
 */
static sh_status expert_line(const sh_closing *c, sh_buf *to) {
    expert_sums s = {0};
    for (size_t g = 0; c->ep > 1 && c->last && g < c->last->n_group; g++)
        add_expert_times(c->last->group[g], c->ep, &s);
    if (s.rows <= 0) return SH_OK;
    return sh_buf_printf(
        to,
        "  experts    busiest rank %.2f of the mean; %.1f MB between ranks; waited %.1f s of the %.1f s "
        "they took (sliding layers %.1f of %.1f, global %.1f of %.1f; all ranks together)\n",
        s.busiest * c->ep / s.rows, s.sent * 1e-6, s.exposed[0] + s.exposed[1], s.travel[0] + s.travel[1], s.exposed[1],
        s.travel[1], s.exposed[0], s.travel[0]);
}

uint64_t sh_closing_shared(const Shoal__JobReply *last) {
    uint64_t n = 0;
    for (size_t g = 0; last && g < last->n_group; g++)
        for (size_t i = 0; i < last->group[g]->n_times; i++) {
            const ProtobufCBinaryData *b = &last->group[g]->times[i];
            Shoal__StageTimes *t = shoal__stage_times__unpack(NULL, b->len, b->data);
            if (!t) continue;
            n += t->shared_rows;
            shoal__stage_times__free_unpacked(t, NULL);
        }
    return n;
}

static sh_status closing_words(const sh_closing *c, sh_buf *to) {
    uint64_t rows = 0;
    for (int i = 0; i < c->outcomes->n; i++) rows += c->outcomes->rows[i];
    SH_TRY(sh_buf_printf(to, "  requests   %llu: ", (unsigned long long)rows));
    for (int i = 0; i < c->outcomes->n; i++)
        SH_TRY(sh_buf_printf(to, "%s%llu %s", i ? ", " : "", (unsigned long long)c->outcomes->rows[i],
                             outcome_name(c->outcomes->status[i])));
    SH_TRY(sh_buf_printf(to, "\n  tokens     %llu in, %llu out\n", (unsigned long long)c->tokens_in,
                         (unsigned long long)c->tokens_out));
    uint64_t shared = sh_closing_shared(c->last);
    if (shared > 0)
        SH_TRY(sh_buf_printf(to, "  shared     %llu tokens of prompts that began like earlier ones were not computed\n",
                             (unsigned long long)shared));
    SH_TRY(sh_buf_printf(to, "  wall time  %.1f s, %.1f s of it with the ranks at work\n", c->wall, c->computing));
    double t = c->computing > 0 ? c->computing : c->wall;
    if (t > 0)
        SH_TRY(sh_buf_printf(to, "  speed      %.1f tokens/s in, %.1f tokens/s out\n", (double)c->tokens_in_now / t,
                             (double)c->tokens_out_now / t));
    SH_TRY(load_line(c, to));
    SH_TRY(stage_lines(c, to));
    SH_TRY(predicted_lines(c, to));
    SH_TRY(expert_line(c, to));
    return sh_buf_printf(to, "  results    %s\n", c->output);
}

static json_t *predicted_json(const sh_prediction *p) {
    json_t *ranks = json_array();
    for (int i = 0; i < p->ranks; i++) {
        const sh_forecast_rank *r = &p->rank[i];
        json_array_append_new(
            ranks, json_pack("{s:i, s:f, s:f, s:f, s:f, s:f, s:f}", "rank", i, "weights", r->seconds[SH_CAUSE_WEIGHTS],
                             "attention", r->seconds[SH_CAUSE_ATTENTION], "experts", r->seconds[SH_CAUSE_EXPERTS],
                             "exchange", r->exchange, "other", r->seconds[SH_CAUSE_OTHER], "idle", r->idle));
    }
    return json_pack("{s:f, s:b, s:s, s:o}", "seconds", p->seconds, "assumed", p->assumed, "from", p->from, "stages",
                     ranks);
}

static void add_expert_json(const Shoal__StageTimes *t, json_t *to) {
    json_object_set_new(to, "sent_experts", json_integer((json_int_t)t->sent_experts));
    json_object_set_new(to, "expert_rows", json_integer((json_int_t)t->expert_rows));
    json_object_set_new(to, "exposed_sliding", json_real(t->exposed_sliding));
    json_object_set_new(to, "exposed_global", json_real(t->exposed_global));
    json_object_set_new(to, "travel_sliding", json_real(t->travel_sliding));
    json_object_set_new(to, "travel_global", json_real(t->travel_global));
}

static void add_load_json(const Shoal__StageTimes *t, json_t *to) {
    json_object_set_new(to, "load",
                        json_pack("{s:f, s:I, s:I, s:f, s:f, s:f}", "seconds", t->load_seconds, "file_bytes",
                                  (json_int_t)t->load_bytes, "received_bytes", (json_int_t)t->load_received, "reading",
                                  t->load_reading, "packing", t->load_packing, "exchange", t->load_exchange));
}

static sh_status closing_json(const sh_closing *c, sh_buf *to) {
    SH_CLEANUP(sh_json_release) json_t *j = json_object();
    json_t *outcomes = json_object(), *stages = json_array();
    char key[16];
    for (int i = 0; i < c->outcomes->n; i++) {
        snprintf(key, sizeof key, "%d", c->outcomes->status[i]);
        json_object_set_new(outcomes, key, json_integer((json_int_t)c->outcomes->rows[i]));
    }
    for (size_t g = 0; c->last && g < c->last->n_group; g++)
        for (size_t i = 0; i < c->last->group[g]->n_times; i++) {
            const ProtobufCBinaryData *b = &c->last->group[g]->times[i];
            Shoal__StageTimes *t = shoal__stage_times__unpack(NULL, b->len, b->data);
            if (!t) continue;
            json_t *stage =
                json_pack("{s:s, s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:I}", "group", c->last->group[g]->group,
                          "rank", t->rank, "weights", t->weights, "attention", t->attention, "experts", t->experts,
                          "exchange", t->exchange, "other", t->other, "idle", t->idle, "bytes", (json_int_t)t->bytes,
                          "steps", (json_int_t)t->steps, "sent", (json_int_t)t->sent);
            add_load_json(t, stage);
            if (stage && c->ep > 1) add_expert_json(t, stage);
            json_array_append_new(stages, stage);
            shoal__stage_times__free_unpacked(t, NULL);
        }
    json_object_set_new(j, "event", json_string("end"));
    json_object_set_new(j, "requests", outcomes);
    json_object_set_new(j, "tokens_in", json_integer((json_int_t)c->tokens_in));
    json_object_set_new(j, "tokens_out", json_integer((json_int_t)c->tokens_out));
    json_object_set_new(j, "tokens_shared", json_integer((json_int_t)sh_closing_shared(c->last)));
    json_object_set_new(j, "seconds", json_real(c->wall));
    json_object_set_new(j, "seconds_at_work", json_real(c->computing));
    load_sums load = sum_loads(c);
    if (load.seconds > 0)
        json_object_set_new(j, "load",
                            json_pack("{s:f, s:I, s:I, s:f}", "seconds", load.seconds, "file_bytes",
                                      (json_int_t)load.bytes, "received_bytes", (json_int_t)load.received, "gbs",
                                      load.bytes / load.seconds * 1e-9));
    json_object_set_new(j, "stages", stages);
    if (c->predicted) json_object_set_new(j, "predicted", predicted_json(c->predicted));
    json_object_set_new(j, "output", json_string(c->output));
    char *s = json_dumps(j, JSON_COMPACT | JSON_REAL_PRECISION(6));
    if (!s) SH_FAIL(SH_EMEMORY, "no memory for the closing table");
    sh_status st = sh_buf_printf(to, "%s\n", s);
    free(s);
    return st;
}

sh_status sh_closing_text(const sh_closing *c, bool json, sh_buf *to) {
    return json ? closing_json(c, to) : closing_words(c, to);
}
