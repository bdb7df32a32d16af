/* Router, experts, combination. See moe.h. */
#include "model/moe.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include "common/mem.h"
#include "model/linear.h"
#include "model/row_loop.h"

#define UNIT_PANELS 4   /* weight panels per piece of work */
#define UNIT_ROWS   256 /* rows per matrix product */

/* A run of panels of one expert's matrix. */
typedef struct unit {
    int expert, p0, p1;
} unit;

struct sh_moe {
    const sh_config *config;
    sh_mode mode;
    sh_team *team;
    const sh_kernels *kn;
    const sh_peers *peers;
    int max_rows, max_units;
    sh_arena arena;
    float *norm, *logits; /* [n, hidden]: the router's input, later the experts' rows; [n, experts] */
    int32_t *ids;         /* [n, top_k] */
    float *weights;       /* [n, top_k] */
    int *first;           /* [experts + 1]: rows of expert e are places first[e] … first[e+1]−1 */
    int *place;           /* [n, top_k]: place of a row's choice */
    float *rows;          /* [n·top_k, hidden]: rows by expert; then their results */
    float *act;           /* [n·top_k, 2·expert_ff] */
    uint16_t *narrow;     /* [n·top_k, hidden] of scratch to round through bf16 */
    unit *units;
    /* the call at hand */
    const sh_layer_weights *w;
    const float *x;
    float *z;
    int n, n_units;
    const sh_wmat *mats;
    const float *in;
    float *out;
    size_t ld_in, ld_out;
    atomic_int next;
};

static int units_of(const sh_config *c) {
    int widest = sh_wmat_panels(2 * c->expert_ff), other = sh_wmat_panels(c->hidden);
    if (other > widest) widest = other;
    return c->experts * (widest / UNIT_PANELS + 1);
}

sh_status sh_moe_create(const sh_config *c, sh_mode mode, int max_rows, sh_team *team, const sh_kernels *kn,
                        const sh_peers *peers, sh_moe **out) {
    sh_moe *m = calloc(1, sizeof *m);
    if (!m) SH_FAIL(SH_EMEMORY, "experts: no memory");
    *m = (sh_moe){.config = c, .mode = mode, .team = team, .kn = kn, .max_rows = max_rows};
    if (peers && peers->experts_begin) m->peers = peers; /* else every member computes all experts */
    size_t n = (size_t)max_rows, h = (size_t)c->hidden, e = (size_t)c->experts, k = (size_t)c->top_k;
    size_t ff = (size_t)c->expert_ff, units = (size_t)units_of(c), f = sizeof(float);
    size_t bytes = f * (n * h + n * e + n * k * (3 + h + 2 * ff) + e + 1) + 2 * n * k * h + units * sizeof(unit);
    sh_status st = sh_arena_create(bytes + 10 * 64, "expert scratch", &m->arena);
    if (st != SH_OK) {
        sh_moe_destroy(&m);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    m->norm = sh_arena_take(&m->arena, n * h * f);
    m->logits = sh_arena_take(&m->arena, n * e * f);
    m->ids = sh_arena_take(&m->arena, n * k * sizeof *m->ids);
    m->weights = sh_arena_take(&m->arena, n * k * f);
    m->first = sh_arena_take(&m->arena, (e + 1) * sizeof *m->first);
    m->place = sh_arena_take(&m->arena, n * k * sizeof *m->place);
    m->rows = sh_arena_take(&m->arena, n * k * h * f);
    m->act = sh_arena_take(&m->arena, n * k * 2 * ff * f);
    m->narrow = sh_arena_take(&m->arena, n * k * h * sizeof *m->narrow);
    m->units = sh_arena_take(&m->arena, units * sizeof *m->units);
    m->max_units = (int)units;
    *out = m;
    return SH_OK;
}

void sh_moe_destroy(sh_moe **m) {
    if (!*m) return;
    sh_arena_release(&(*m)->arena);
    free(*m);
    *m = NULL;
}

const int32_t *sh_moe_ids(const sh_moe *m) {
    return m->ids;
}

const float *sh_moe_weights(const sh_moe *m) {
    return m->weights;
}

/* In bf16 mode rows travel to and from experts in bf16. */
static void round_row(const sh_moe *m, float *x, uint16_t *narrow) {
    if (m->mode != SH_MODE_BF16) return;
    m->kn->to_bf16(narrow, x, m->config->hidden);
    m->kn->from_bf16(x, narrow, m->config->hidden);
}

/* --- router --------------------------------------------------------------------------------------------------------
 */

/* r = rms(x) ⊙ router.scale · hidden^(−1/2) */
static void router_input(void *arg, int lo, int hi) {
    sh_moe *m = arg;
    int h = m->config->hidden;
    float factor = (float)(1.0 / sqrt((double)h));
    for (int r = lo; r < hi; r++) {
        float *y = m->norm + (size_t)r * (size_t)h;
        m->kn->rmsnorm(y, m->x + (size_t)r * (size_t)h, m->w->router_scale, h, m->config->eps);
        m->kn->scale(y, y, factor, h);
    }
}

static bool taken(const int32_t *ids, int n, int e) {
    for (int i = 0; i < n; i++)
        if (ids[i] == e) return true;
    return false;
}

/* The largest probabilities, descending; equal ones go to the lower expert. */
static void choose(const float *p, int experts, int k, int32_t *ids) {
    for (int i = 0; i < k; i++) {
        int best = -1;
        for (int e = 0; e < experts; e++)
            if (!taken(ids, i, e) && (best < 0 || p[e] > p[best])) best = e;
        ids[i] = best;
    }
}

/* p = softmax over all experts; the chosen ones renormalised, then scaled per expert. Then the experts' input:
 * rms(x, pre_feedforward_layernorm_2), as it would travel. */
static void route(void *arg, int lo, int hi) {
    sh_moe *m = arg;
    int h = m->config->hidden, e = m->config->experts, k = m->config->top_k;
    for (int r = lo; r < hi; r++) {
        float *p = m->logits + (size_t)r * (size_t)e, *w = m->weights + (size_t)r * (size_t)k;
        int32_t *ids = m->ids + (size_t)r * (size_t)k;
        float max, sum, chosen = 0;
        m->kn->softmax_part(p, e, &max, &sum);
        for (int i = 0; i < e; i++) p[i] /= sum;
        choose(p, e, k, ids);
        for (int i = 0; i < k; i++) chosen += p[ids[i]];
        for (int i = 0; i < k; i++) w[i] = p[ids[i]] / chosen * m->w->expert_scale[ids[i]];
        float *y = m->norm + (size_t)r * (size_t)h;
        m->kn->rmsnorm(y, m->x + (size_t)r * (size_t)h, m->w->pre_ff_norm_2, h, m->config->eps);
        round_row(m, y, m->narrow + (size_t)r * (size_t)h);
    }
}

void sh_moe_begin(sh_moe *m, int layer, const sh_layer_weights *w, const float *x, int n) {
    size_t h = (size_t)m->config->hidden;
    m->w = w;
    m->x = x;
    m->n = n;
    sh_row_loop_run(m->team, n, h, router_input, m);
    sh_linear(m->team, m->kn, &w->router, m->norm, h, n, m->logits, (size_t)m->config->experts);
    sh_row_loop_run(m->team, n, h, route, m);
    if (m->peers) m->peers->experts_begin(m->peers->ctx, layer, m->norm, m->ids, n);
}

/* --- local experts -------------------------------------------------------------------------------------------------
 */

/* Gives every (row, choice) a place, so that the rows of one expert lie together. */
static void group_rows(sh_moe *m) {
    int experts = m->config->experts, total = m->n * m->config->top_k;
    memset(m->first, 0, (size_t)(experts + 1) * sizeof *m->first);
    for (int i = 0; i < total; i++) m->first[m->ids[i] + 1]++;
    for (int e = 0; e < experts; e++) m->first[e + 1] += m->first[e];
    for (int i = 0; i < total; i++) m->place[i] = m->first[m->ids[i]]++;
    memmove(m->first + 1, m->first, (size_t)experts * sizeof *m->first);
    m->first[0] = 0;
}

static void gather(void *arg, int lo, int hi) {
    sh_moe *m = arg;
    size_t h = (size_t)m->config->hidden;
    int k = m->config->top_k;
    for (int r = lo; r < hi; r++)
        for (int j = 0; j < k; j++)
            memcpy(m->rows + (size_t)m->place[r * k + j] * h, m->norm + (size_t)r * h, h * sizeof(float));
}

static void run_units(void *arg, int member, int size) {
    sh_moe *m = arg;
    (void)member, (void)size;
    for (int i; (i = atomic_fetch_add(&m->next, 1)) < m->n_units;) {
        const unit *u = &m->units[i];
        for (int r = m->first[u->expert], end = m->first[u->expert + 1], n; r < end; r += n) {
            n = end - r < UNIT_ROWS ? end - r : UNIT_ROWS;
            m->kn->gemm(&m->mats[u->expert], u->p0, u->p1, m->in + (size_t)r * m->ld_in, m->ld_in, n,
                        m->out + (size_t)r * m->ld_out, m->ld_out);
        }
    }
}

/* out [places, mats[e].n] = in [places, mats[e].k] · mats[e]ᵀ, each place by its expert. */
static void by_expert(sh_moe *m, const sh_wmat *mats, const float *in, size_t ld_in, float *out, size_t ld_out) {
    m->mats = mats;
    m->in = in;
    m->ld_in = ld_in;
    m->out = out;
    m->ld_out = ld_out;
    m->n_units = 0;
    for (int e = 0; e < m->config->experts; e++) {
        int panels = m->first[e] < m->first[e + 1] ? sh_wmat_panels(mats[e].n) : 0;
        for (int p = 0; p < panels; p += UNIT_PANELS)
            m->units[m->n_units++] = (unit){e, p, p + UNIT_PANELS < panels ? p + UNIT_PANELS : panels};
    }
    atomic_store(&m->next, 0);
    sh_team_run(m->team, run_units, m);
}

/* gelu(gate) ⊙ up, in place of gate */
static void activate(void *arg, int lo, int hi) {
    sh_moe *m = arg;
    int ff = m->config->expert_ff;
    for (int i = lo; i < hi; i++) {
        float *a = m->act + (size_t)i * 2 * (size_t)ff;
        m->kn->gelu_mul(a, a, a + ff, ff);
    }
}

static void round_results(void *arg, int lo, int hi) {
    sh_moe *m = arg;
    size_t h = (size_t)m->config->hidden;
    for (int i = lo; i < hi; i++) round_row(m, m->rows + (size_t)i * h, m->narrow + (size_t)i * h);
}

/* Fills rows with one result per (row, choice), in the order of places. */
static void experts_local(sh_moe *m) {
    size_t h = (size_t)m->config->hidden, ff = (size_t)m->config->expert_ff;
    int places = m->n * m->config->top_k;
    group_rows(m);
    sh_row_loop_run(m->team, m->n, h * (size_t)m->config->top_k, gather, m);
    by_expert(m, m->w->expert_gate_up, m->rows, h, m->act, 2 * ff);
    sh_row_loop_run(m->team, places, 2 * ff, activate, m);
    by_expert(m, m->w->expert_down, m->act, 2 * ff, m->rows, h);
    if (m->mode == SH_MODE_BF16) sh_row_loop_run(m->team, places, h, round_results, m);
}

/* --- combination ---------------------------------------------------------------------------------------------------
 */

static void combine(void *arg, int lo, int hi) {
    sh_moe *m = arg;
    size_t h = (size_t)m->config->hidden;
    int k = m->config->top_k;
    for (int r = lo; r < hi; r++) {
        float *z = m->z + (size_t)r * h;
        memset(z, 0, h * sizeof(float));
        for (int j = 0; j < k; j++) {
            int at = r * k + j, place = m->peers ? at : m->place[at];
            m->kn->axpy(z, m->weights[at], m->rows + (size_t)place * h, (int)h);
        }
    }
}

void sh_moe_end(sh_moe *m, int layer, const sh_layer_weights *w, float *z) {
    m->w = w;
    m->z = z;
    if (m->peers)
        m->peers->experts_end(m->peers->ctx, layer, m->rows, m->n);
    else
        experts_local(m);
    sh_row_loop_run(m->team, m->n, (size_t)m->config->hidden * (size_t)m->config->top_k, combine, m);
}
