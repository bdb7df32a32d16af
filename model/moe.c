/* Router, experts, combination. See moe.h. */
#include "model/moe.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include "common/mem.h"
#include "model/linear.h"
#include "model/row_loop.h"

#define LEAST_PANELS 4   /* weight panels per piece of work: at least, and */
#define MOST_PANELS  24  /* at most */
#define UNITS_EACH   8   /* pieces per thread to aim at */
#define UNIT_ROWS    256 /* rows per matrix product */

/* A run of panels of one expert's matrix. */
typedef struct unit {
    int expert, p0, p1;
} unit;

/* A choice that is computed here: whose, and which of that guest's. Guest 0 are the own rows. */
typedef struct pair {
    int guest, choice;
} pair;

/* One part of a step between begin and end. */
typedef struct part {
    int n;
    int32_t *ids;          /* [n, top_k] */
    float *weights;        /* [n, top_k] */
    uint8_t *rows;         /* [n] rows as they travel: what the experts get */
    uint16_t (*choice)[2]; /* [n·top_k]: row and expert of the choices computed here */
    uint8_t *results;      /* [n·top_k] results as they travel */
    const void **answer;   /* [n, top_k]: where a choice's result is, here or with the peers */
} part;

struct sh_moe {
    const sh_config *config;
    sh_mode mode;
    sh_team *team;
    const sh_kernels *kn;
    const sh_expert_peers *peers;
    int n_slots, members;
    int max_pairs, max_places;      /* choices computed here at most; of those, at a time */
    sh_wtype type;                  /* of the experts' matrices */
    size_t row_bytes, result_bytes; /* as they travel */
    sh_arena arena;
    part slots[SH_EXPERT_SLOTS];
    float *norm, *logits;    /* [n, hidden]: the router's input, later rows for and from experts; [n, experts] */
    sh_expert_guest *guests; /* [members] */
    pair *pairs;             /* by expert */
    int *first;              /* [experts + 1]: pairs of expert e are first[e] … first[e+1]−1 */
    float *rows;             /* [places, hidden]: rows of the pairs at hand; then their results */
    uint8_t *codes;          /* rows in 8 bits, then activations: what a product with quantised experts takes */
    float *act;              /* [places, 2·expert_ff] */
    unit *units;
    uint64_t computed;
    /* the call at hand */
    const sh_layer_weights *w;
    part *s;
    const float *x;
    float *z;
    int n_guests, n_units;
    int place0, places; /* pairs [place0, place0 + places) are at hand */
    const sh_wmat *mats;
    const float *in;
    sh_qrows q; /* in, where the matrices are quantised */
    float *out;
    size_t ld_in, ld_out;
    atomic_int next;
};

/* --- what travels --------------------------------------------------------------------------------------------------
 */

/* The row's values as an expert's kernel takes them. */
static void pack_row(const sh_moe *m, void *to, const float *x) {
    int h = m->config->hidden;
    if (m->type != SH_W_BF16) {
        sh_qrows q = sh_qrows_place(m->type, h, 1, to);
        m->kn->quantize(x, h, sh_wtype_group(m->type), q.code, q.scale, q.sum);
    } else if (m->mode == SH_MODE_BF16) {
        m->kn->to_bf16(to, x, h);
    } else {
        memcpy(to, x, (size_t)h * sizeof(float));
    }
}

static void pack_result(const sh_moe *m, void *to, const float *x) {
    if (m->mode == SH_MODE_EXACT)
        memcpy(to, x, m->result_bytes);
    else
        m->kn->to_bf16(to, x, m->config->hidden);
}

static void unpack_result(const sh_moe *m, float *x, const void *from) {
    if (m->mode == SH_MODE_EXACT)
        memcpy(x, from, m->result_bytes);
    else
        m->kn->from_bf16(x, from, m->config->hidden);
}

/* --- making --------------------------------------------------------------------------------------------------------
 */

static int units_of(const sh_config *c) {
    int widest = sh_wmat_panels(2 * c->expert_ff), other = sh_wmat_panels(c->hidden);
    if (other > widest) widest = other;
    return c->experts * (widest / LEAST_PANELS + 1);
}

/* Rows in 8 bits: of the wider of the two products. */
static size_t codes_bytes(const sh_moe *m) {
    int h = m->config->hidden, ff = m->config->expert_ff;
    return m->type == SH_W_BF16 ? 0 : sh_qrows_bytes(m->type, h > ff ? h : ff, m->max_places);
}

/* Everything from the arena, which has scratch_bytes. */
static void lay_out(sh_moe *m, size_t n, sh_arena *a) {
    const sh_config *c = m->config;
    size_t h = (size_t)c->hidden, e = (size_t)c->experts, k = (size_t)c->top_k, f = sizeof(float);
    size_t places = (size_t)m->max_places;
    for (int i = 0; i < m->n_slots; i++) {
        part *s = &m->slots[i];
        s->ids = sh_arena_take(a, n * k * sizeof *s->ids);
        s->weights = sh_arena_take(a, n * k * f);
        s->rows = sh_arena_take(a, n * m->row_bytes);
        s->choice = sh_arena_take(a, n * k * sizeof *s->choice);
        s->results = sh_arena_take(a, n * k * m->result_bytes);
        s->answer = sh_arena_take(a, n * k * sizeof *s->answer);
    }
    m->norm = sh_arena_take(a, n * h * f);
    m->logits = sh_arena_take(a, n * e * f);
    m->guests = sh_arena_take(a, (size_t)m->members * sizeof *m->guests);
    m->pairs = sh_arena_take(a, (size_t)m->max_pairs * sizeof *m->pairs);
    m->first = sh_arena_take(a, (e + 1) * sizeof *m->first);
    m->rows = sh_arena_take(a, places * h * f);
    m->codes = sh_arena_take(a, codes_bytes(m));
    m->act = sh_arena_take(a, places * 2 * (size_t)c->expert_ff * f);
    m->units = sh_arena_take(a, (size_t)units_of(c) * sizeof *m->units);
}

static size_t scratch_bytes(const sh_moe *m, size_t n) {
    const sh_config *c = m->config;
    size_t h = (size_t)c->hidden, e = (size_t)c->experts, k = (size_t)c->top_k, f = sizeof(float);
    size_t places = (size_t)m->max_places, slots = (size_t)m->n_slots;
    size_t of_slot = n * k * (sizeof(int32_t) + f + 4 + m->result_bytes + sizeof(void *)) + n * m->row_bytes + 6 * 64;
    size_t common = n * (h + e) * f + (size_t)m->members * sizeof *m->guests + (size_t)m->max_pairs * sizeof *m->pairs +
                    (e + 1) * sizeof *m->first + places * (h + 2 * (size_t)c->expert_ff) * f + codes_bytes(m) +
                    (size_t)units_of(c) * sizeof *m->units + 9 * 64;
    return slots * of_slot + common;
}

sh_status sh_moe_create(const sh_config *c, sh_mode mode, int max_rows, sh_team *team, const sh_kernels *kn,
                        const sh_expert_peers *peers, sh_moe **out) {
    sh_moe *m = calloc(1, sizeof *m);
    if (!m) SH_FAIL(SH_EMEMORY, "experts: no memory");
    *m = (sh_moe){.config = c, .mode = mode, .team = team, .kn = kn, .peers = peers};
    m->type = sh_mode_wtype(mode);
    m->row_bytes = sh_expert_row_bytes(c, mode);
    m->result_bytes = sh_expert_result_bytes(c, mode);
    m->members = peers ? peers->members : 1;
    m->n_slots = peers ? SH_EXPERT_SLOTS : 1;
    /* Everybody's rows may choose experts of this member. The usual share is one member's; twice that goes in one
     * pass. */
    int own = max_rows * c->top_k;
    m->max_pairs = own * m->members;
    m->max_places = m->members > 1 ? 2 * own : own;
    sh_status st = sh_arena_create(scratch_bytes(m, (size_t)max_rows), "expert scratch", &m->arena);
    if (st != SH_OK) {
        sh_moe_destroy(&m);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    lay_out(m, (size_t)max_rows, &m->arena);
    *out = m;
    return SH_OK;
}

void sh_moe_destroy(sh_moe **m) {
    if (!*m) return;
    sh_arena_release(&(*m)->arena);
    free(*m);
    *m = NULL;
}

uint64_t sh_moe_computed(const sh_moe *m) {
    return m->computed;
}

const int32_t *sh_moe_ids(const sh_moe *m, int slot) {
    return m->slots[slot].ids;
}

const float *sh_moe_weights(const sh_moe *m, int slot) {
    return m->slots[slot].weights;
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
        float *p = m->logits + (size_t)r * (size_t)e, *w = m->s->weights + (size_t)r * (size_t)k;
        int32_t *ids = m->s->ids + (size_t)r * (size_t)k;
        float max, sum, chosen = 0;
        m->kn->softmax_part(p, e, &max, &sum);
        for (int i = 0; i < e; i++) p[i] /= sum;
        choose(p, e, k, ids);
        for (int i = 0; i < k; i++) chosen += p[ids[i]];
        for (int i = 0; i < k; i++) w[i] = p[ids[i]] / chosen * m->w->expert_scale[ids[i]];
        float *y = m->norm + (size_t)r * (size_t)h;
        m->kn->rmsnorm(y, m->x + (size_t)r * (size_t)h, m->w->pre_ff_norm_2, h, m->config->eps);
        pack_row(m, m->s->rows + (size_t)r * m->row_bytes, y);
    }
}

/* The choices that this member computes for its own rows, as if they had been sent. */
static void keep_own(sh_moe *m, part *s) {
    int k = m->config->top_k, n = 0;
    for (int i = 0; i < s->n * k; i++) {
        if (s->answer[i]) continue;
        s->answer[i] = s->results + (size_t)n * m->result_bytes;
        s->choice[n][0] = (uint16_t)(i / k);
        s->choice[n++][1] = (uint16_t)s->ids[i];
    }
    m->guests[0] =
        (sh_expert_guest){.n_rows = s->n, .n_choices = n, .choice = s->choice, .rows = s->rows, .results = s->results};
}

sh_status sh_moe_begin(sh_moe *m, int slot, int layer, const sh_layer_weights *w, const float *x, int n) {
    size_t h = (size_t)m->config->hidden;
    part *s = m->s = &m->slots[slot];
    m->w = w;
    m->x = x;
    s->n = n;
    sh_row_loop_run(m->team, n, h, router_input, m);
    sh_linear(m->team, m->kn, &w->router, m->norm, h, n, m->logits, (size_t)m->config->experts);
    sh_row_loop_run(m->team, n, h, route, m);
    memset(s->answer, 0, (size_t)(n * m->config->top_k) * sizeof *s->answer);
    if (!m->peers) return SH_OK;
    return m->peers->begin(m->peers->ctx, slot, layer, s->rows, s->ids, n, s->answer);
}

/* --- the experts of this member ------------------------------------------------------------------------------------
 */

/* Lists what is to be computed, so that the choices of one expert lie together. */
static void group_pairs(sh_moe *m) {
    int experts = m->config->experts;
    memset(m->first, 0, (size_t)(experts + 1) * sizeof *m->first);
    for (int g = 0; g < m->n_guests; g++)
        for (int i = 0; i < m->guests[g].n_choices; i++) m->first[m->guests[g].choice[i][1] + 1]++;
    for (int e = 0; e < experts; e++) m->first[e + 1] += m->first[e];
    for (int g = 0; g < m->n_guests; g++)
        for (int i = 0; i < m->guests[g].n_choices; i++) m->pairs[m->first[m->guests[g].choice[i][1]]++] = (pair){g, i};
    memmove(m->first + 1, m->first, (size_t)experts * sizeof *m->first);
    m->first[0] = 0;
}

/* A row as it travels → place i of the input of a product. */
static void place_row(sh_moe *m, int i, const void *from) {
    size_t h = (size_t)m->config->hidden, at = (size_t)i;
    if (m->type == SH_W_BF16) {
        float *x = m->rows + at * h;
        unpack_result(m, x, from); /* rows and results travel alike */
        return;
    }
    sh_qrows r = sh_qrows_place(m->type, m->config->hidden, 1, (void *)(uintptr_t)from);
    memcpy(m->q.code + at * m->q.ld, r.code, m->q.ld);
    memcpy(m->q.scale + at * m->q.groups, r.scale, m->q.groups * sizeof *r.scale);
    memcpy(m->q.sum + at * m->q.groups, r.sum, m->q.groups * sizeof *r.sum);
}

static void gather(void *arg, int lo, int hi) {
    sh_moe *m = arg;
    for (int i = lo; i < hi; i++) {
        const pair *p = &m->pairs[m->place0 + i];
        const sh_expert_guest *g = &m->guests[p->guest];
        place_row(m, i, (const uint8_t *)g->rows + (size_t)g->choice[p->choice][0] * m->row_bytes);
    }
}

/* Places of an expert among those at hand: [*lo, *hi). */
static void places_of(const sh_moe *m, int expert, int *lo, int *hi) {
    *lo = m->first[expert] > m->place0 ? m->first[expert] - m->place0 : 0;
    *hi = m->first[expert + 1] - m->place0;
    if (*hi > m->places) *hi = m->places;
}

static void run_units(void *arg, int member, int size) {
    sh_moe *m = arg;
    (void)size;
    for (int i; (i = atomic_fetch_add(&m->next, 1)) < m->n_units;) {
        const unit *u = &m->units[i];
        int r, end, n;
        for (places_of(m, u->expert, &r, &end); r < end; r += n) {
            n = end - r < UNIT_ROWS ? end - r : UNIT_ROWS;
            const sh_wmat *w = &m->mats[u->expert];
            float *y = m->out + (size_t)r * m->ld_out;
            if (m->type == SH_W_BF16)
                m->kn->gemm(w, u->p0, u->p1, m->in + (size_t)r * m->ld_in, m->ld_in, n, y, m->ld_out);
            else
                m->kn->gemm_q(w, u->p0, u->p1, &m->q, r, n, y, m->ld_out);
            sh_team_poll(m->team, member);
        }
    }
}

static int panels_of(const sh_moe *m, int e) {
    int lo, hi;
    places_of(m, e, &lo, &hi);
    return lo < hi ? sh_wmat_panels(m->mats[e].n) : 0;
}

/* Long runs of panels stream better, and pack rows less often; all threads shall have some. */
static void cut_units(sh_moe *m) {
    int total = 0;
    for (int e = 0; e < m->config->experts; e++) total += panels_of(m, e);
    int run = total / (sh_team_size(m->team) * UNITS_EACH) / LEAST_PANELS * LEAST_PANELS;
    run = run < LEAST_PANELS ? LEAST_PANELS : run > MOST_PANELS ? MOST_PANELS : run;
    m->n_units = 0;
    for (int e = 0; e < m->config->experts; e++) {
        int panels = panels_of(m, e);
        for (int p = 0; p < panels; p += run)
            m->units[m->n_units++] = (unit){e, p, p + run < panels ? p + run : panels};
    }
}

/* out [places, mats[e].n] = in [places, mats[e].k] · mats[e]ᵀ, each place by its expert. */
static void by_expert(sh_moe *m, const sh_wmat *mats, const float *in, size_t ld_in, float *out, size_t ld_out) {
    m->mats = mats;
    m->in = in;
    m->ld_in = ld_in;
    m->out = out;
    m->ld_out = ld_out;
    cut_units(m);
    atomic_store(&m->next, 0);
    sh_team_run(m->team, run_units, m);
}

/* gelu(gate) ⊙ up, in place of gate; in 8 bits for quantised experts */
static void activate(void *arg, int lo, int hi) {
    sh_moe *m = arg;
    int ff = m->config->expert_ff;
    for (int i = lo; i < hi; i++) {
        size_t row = (size_t)i;
        float *a = m->act + row * 2 * (size_t)ff;
        m->kn->gelu_mul(a, a, a + ff, ff);
        if (m->type != SH_W_BF16)
            m->kn->quantize(a, ff, sh_wtype_group(m->type), m->q.code + row * m->q.ld, m->q.scale + row * m->q.groups,
                            m->q.sum + row * m->q.groups);
    }
}

static void scatter(void *arg, int lo, int hi) {
    sh_moe *m = arg;
    for (int i = lo; i < hi; i++) {
        const pair *p = &m->pairs[m->place0 + i];
        uint8_t *to = (uint8_t *)m->guests[p->guest].results + (size_t)p->choice * m->result_bytes;
        pack_result(m, to, m->rows + (size_t)i * (size_t)m->config->hidden);
    }
}

sh_status sh_moe_compute(sh_moe *m, int slot, const sh_layer_weights *w) {
    size_t h = (size_t)m->config->hidden, ff = (size_t)m->config->expert_ff;
    const sh_expert_guest *others = NULL;
    int n = 0;
    keep_own(m, &m->slots[slot]);
    if (m->peers) SH_TRY(m->peers->guests(m->peers->ctx, slot, &others, &n));
    if (n > 0) memcpy(m->guests + 1, others, (size_t)n * sizeof *others);
    m->n_guests = 1 + n;
    m->w = w;
    group_pairs(m);
    int total = m->first[m->config->experts];
    m->computed += (uint64_t)total;
    for (m->place0 = 0; m->place0 < total; m->place0 += m->places) {
        m->places = total - m->place0 < m->max_places ? total - m->place0 : m->max_places;
        if (m->type != SH_W_BF16) m->q = sh_qrows_place(m->type, m->config->hidden, m->places, m->codes);
        sh_row_loop_run(m->team, m->places, h, gather, m);
        by_expert(m, w->expert_gate_up, m->rows, h, m->act, 2 * ff);
        if (m->type != SH_W_BF16) m->q = sh_qrows_place(m->type, m->config->expert_ff, m->places, m->codes);
        sh_row_loop_run(m->team, m->places, 2 * ff, activate, m);
        by_expert(m, w->expert_down, m->act, 2 * ff, m->rows, h);
        sh_row_loop_run(m->team, m->places, h, scatter, m);
    }
    return m->peers ? m->peers->reply(m->peers->ctx, slot) : SH_OK;
}

/* --- combination ---------------------------------------------------------------------------------------------------
 */

static void combine(void *arg, int lo, int hi) {
    sh_moe *m = arg;
    const part *s = m->s;
    size_t h = (size_t)m->config->hidden;
    int k = m->config->top_k;
    for (int r = lo; r < hi; r++) {
        float *z = m->z + (size_t)r * h, *result = m->norm + (size_t)r * h;
        memset(z, 0, h * sizeof(float));
        for (int j = 0; j < k; j++) {
            unpack_result(m, result, s->answer[r * k + j]);
            m->kn->axpy(z, s->weights[r * k + j], result, (int)h);
        }
    }
}

sh_status sh_moe_end(sh_moe *m, int slot, float *z) {
    m->s = &m->slots[slot];
    m->z = z;
    if (m->peers) SH_TRY(m->peers->end(m->peers->ctx, slot));
    sh_row_loop_run(m->team, m->s->n, (size_t)m->config->hidden * (size_t)m->config->top_k, combine, m);
    return SH_OK;
}
