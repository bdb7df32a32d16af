/* Timetables. See simulate.h. */
#include "partition/simulate.h"

#include <math.h>
#include "model/owner.h"
#include "partition/cost_int.h"

/* Bytes of messages, from docs/protocol.md: the descriptor's head, a row, a span beside its pages, a sequence that
 * starts beside its tokens; the answer's head and a token; the head of an exchange's message and a choice. */
enum {
    DESCRIPTOR = 40,
    DESCRIPTOR_ROW = 4,
    SPAN = 36,
    PAGE = 4,
    START = 88,
    TOKEN_ID = 4,
    ANSWER = 20,
    TOKEN = 28,
    EXCHANGE = 64,
    CHOICE = 4
};
#define PAGE_TOKENS ((double)SH_PAGE_TOKENS)

static sh_status check(const sh_cost_model *m, sh_plan_shape s) {
    if (s.tp > 1 || s.cp > 1)
        SH_FAIL(SH_EUNSUPPORTED, "timetable: tp %d, cp %d: only stages that are divided by experts are laid out", s.tp,
                s.cp);
    if (s.prefill > 0)
        SH_FAIL(SH_EUNSUPPORTED, "timetable: prefill %d: only ranks that decode what they read are laid out",
                s.prefill);
    if (m->routing || !m->alike) SH_FAIL(SH_EUNSUPPORTED, "timetable: experts and ranks must be alike");
    for (int i = 0; i < s.pp; i++)
        if (!sh_cost_once(m, i))
            SH_FAIL(SH_EUNSUPPORTED, "timetable: stage %d has an expert twice: one owner each is laid out", i);
    return SH_OK;
}

/* Experts in order, as the members of the first stage hold those of its first such layer. */
static sh_status put_owned(const sh_cost_model *m, sh_plan_shape s, sh_buf *out) {
    int before = 0;
    SH_TRY(sh_buf_printf(out, "owned 0"));
    for (int i = 0; i < s.ep; i++) {
        const Shoal__PlanRank *r = m->plan->rank[i];
        before += s.ep > 1 ? r->n_experts ? (int)r->experts[0]->n_expert : 0 : m->config->experts;
        SH_TRY(sh_buf_printf(out, " %d", before));
    }
    return sh_buf_printf(out, "\n");
}

static sh_status put_exchange(const sh_cost_model *m, sh_plan_shape s, sh_buf *out) {
    const sh_config *c = m->config;
    const sh_cost_rates *r = sh_cost_rates_of(m, 0);
    sh_mode mode;
    sh_kv_limits lane;
    SH_TRY(sh_mode_parse(m->plan->mode, &mode));
    SH_TRY(sh_plan_kv_limits(m->plan, &lane));
    double elements = 3.0 * c->expert_ff * c->hidden, row = (double)sh_expert_row_bytes(c, mode);
    SH_TRY(sh_buf_printf(out, "experts %d %d\n", c->experts, c->top_k));
    SH_TRY(put_owned(m, s, out));
    SH_TRY(sh_buf_printf(out, "part_rows %d %d\n", sh_expert_part_rows(lane.max_seqs + lane.chunk, s.ep),
                         SH_COST_SPLIT_ROWS));
    SH_TRY(sh_buf_printf(out, "expert %.6g %.6g\n",
                         elements * sh_mode_weight_bytes(mode) / sh_cost_weights_read(r, mode),
                         2 * elements / sh_cost_products_rate(r, mode)));
    SH_TRY(sh_buf_printf(out, "message %d %d\n", EXCHANGE, CHOICE));
    return sh_buf_printf(out, "row %.0f %.0f\n", row, (double)sh_expert_result_bytes(c, mode));
}

/* Descriptor and answer of a lane: every span brings its pages, a prompt's last piece its tokens. */
static sh_status put_kind(const sh_config *c, int kind, const sh_cost_span *span, int n, sh_buf *out) {
    double rows = 0, kept = 0, bytes = DESCRIPTOR;
    int window = sh_config_widest_window(c);
    for (int i = 0; i < n; i++) {
        const sh_cost_span *s = &span[i];
        double end = (s->lo + s->hi) / 2 + s->rows, near = window > 0 ? fmin(end, window) : 0;
        double starts = s->rows > 1 ? s->seqs * s->kept : 0; /* decode rows are of sequences that have started */
        rows += s->seqs * s->rows;
        kept += s->seqs * s->kept;
        bytes +=
            s->seqs * (SPAN + s->rows * DESCRIPTOR_ROW + (ceil(end / PAGE_TOKENS) + ceil(near / PAGE_TOKENS)) * PAGE);
        bytes += starts * (START + (s->hi + s->rows) * TOKEN_ID);
    }
    return sh_buf_printf(out, "kind %d %.6g %.0f %.0f\n", kind, rows, bytes, ANSWER + kept * TOKEN);
}

static sh_status put_edge(const sh_cost_model *m, sh_plan_shape s, int kind, int stage, const sh_cost_span *span, int n,
                          sh_buf *out) {
    const Shoal__PlanRank *r = m->plan->rank[stage * s.width];
    sh_cost_load d = sh_cost_load_of(span, n, false, 0);
    double cut = 0, head = 0;
    sh_kv_type kv;
    SH_TRY(sh_kv_type_parse(m->plan->kv, &kv));
    if (stage + 1 < s.pp)
        cut = sh_cost_cut_bytes(m->config, kv, r->last, d.rows, d.kept);
    else
        SH_TRY(sh_cost_head(m, stage * s.width, span, n, n, 0, &head));
    return sh_buf_printf(out, "edge %d %d %.0f %.6g %.6g\n", kind, stage, cut, SH_STEP_SECONDS, head);
}

static sh_status put_layers(const sh_cost_model *m, sh_plan_shape s, int kind, int stage, const sh_cost_span *span,
                            int n, sh_buf *out) {
    const Shoal__PlanRank *r = m->plan->rank[stage * s.width];
    for (int i = r->first; i < r->last; i++) {
        sh_cost_layer l;
        SH_TRY(sh_cost_layer_of(m, stage * s.width, i, span, n, &l));
        double half = l.rest.seconds / 2; /* norms, activations: on both sides of the exchange */
        SH_TRY(sh_buf_printf(out, "layer %d %d %d %.6g %.6g %.6g %.6g\n", kind, i, m->config->layer[i].moe,
                             l.project.seconds + l.attention.seconds + l.router.seconds + half, l.dense.seconds,
                             l.experts.seconds, l.ple.seconds + half));
    }
    return SH_OK;
}

sh_status sh_simulate_timetable(const sh_cost_model *m, const sh_forecast_mix *mix, double tokens, int groups,
                                sh_buf *out) {
    sh_plan_shape s = sh_plan_shape_of(m->plan);
    SH_TRY(check(m, s));
    SH_TRY(sh_buf_printf(out, "groups %d\nstages %d\nmembers %d\n", groups, s.pp, s.width));
    SH_TRY(sh_buf_printf(out, "in_flight %.0f\nmixed %.6g\ntokens %.6g\n", fmax(1, floor(mix->in_flight + 0.5)),
                         mix->mixed, tokens));
    SH_TRY(put_exchange(m, s, out));
    for (int i = 0; i < s.pp; i++) {
        const Shoal__PlanRank *r = m->plan->rank[i * s.width];
        SH_TRY(sh_buf_printf(out, "stage %d %d %d\n", i, r->first, r->last));
    }
    for (int kind = 0; kind < 2; kind++) {
        int n = kind ? mix->n_spans : mix->n_decode;
        SH_TRY(put_kind(m->config, kind, mix->span, n, out));
        for (int i = 0; i < s.pp; i++) {
            SH_TRY(put_edge(m, s, kind, i, mix->span, n, out));
            SH_TRY(put_layers(m, s, kind, i, mix->span, n, out));
        }
    }
    return SH_OK;
}
