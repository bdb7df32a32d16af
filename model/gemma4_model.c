/* A model's making and unmaking, the check of what a batch claims, and the block of bytes that crosses a cut. The
 * arithmetic is in gemma4.c. */
#include "model/gemma4_model.h"

#include <stdlib.h>
#include <string.h>

#include "model/linear.h"

/* --- making --------------------------------------------------------------------------------------------------------
 */

static int max_int(int a, int b) {
    return a > b ? a : b;
}

static int min_int(int a, int b) {
    return a < b ? a : b;
}

static sh_status create_ropes(sh_model *m) {
    m->ropes = calloc((size_t)(m->options.last - m->options.first), sizeof *m->ropes);
    if (!m->ropes) SH_FAIL(SH_EMEMORY, "model: no memory for its rotation tables");
    for (int i = m->options.first; i < m->options.last; i++) {
        const sh_layer *l = &m->config.layer[i];
        int r = 0;
        while (r < m->n_ropes && !sh_rope_fits(&m->ropes[r], l)) r++;
        m->rope_of[i] = r;
        if (r < m->n_ropes) continue;
        SH_TRY(sh_rope_create(l, m->options.max_context, &m->ropes[r]));
        m->n_ropes++;
    }
    return SH_OK;
}

typedef struct widths {
    size_t q, kv, ff;
    size_t all_q, all_ff, own; /* of all members together; outputs of a shared matrix */
    bool moe;
} widths;

static widths measure(const sh_model *m) {
    widths w = {0};
    sh_range own = sh_share_range(m->options.share, m->config.hidden, SH_SHARE_COLUMNS);
    w.own = (size_t)(own.hi - own.lo);
    for (int i = m->options.first; i < m->options.last; i++) {
        const sh_layer *l = &m->config.layer[i], *all = &m->whole.layer[i];
        size_t q = (size_t)l->heads * (size_t)l->head_dim, kv = (size_t)l->kv_heads * (size_t)l->head_dim;
        if (q > w.q) w.q = q;
        if (kv > w.kv) w.kv = kv;
        if ((size_t)l->ff > w.ff) w.ff = (size_t)l->ff;
        if ((size_t)all->heads * (size_t)l->head_dim > w.all_q) w.all_q = (size_t)all->heads * (size_t)l->head_dim;
        if ((size_t)all->ff > w.all_ff) w.all_ff = (size_t)all->ff;
        w.moe = w.moe || (l->moe && !sh_config_only_kv(&m->config, i));
    }
    if ((size_t)m->config.ple > w.ff) w.ff = (size_t)m->config.ple; /* its gate uses the same scratch */
    return w;
}

/* Room for the rows of the widest product in 8 bits. */
static sh_status reserve_quantized(sh_model *m, const widths *w) {
    sh_wtype type = sh_mode_wtype(m->options.mode);
    size_t widest = (size_t)m->config.hidden;
    if (type == SH_W_BF16) return SH_OK;
    if (w->all_q > widest) widest = w->all_q;
    if (w->all_ff > widest) widest = w->all_ff;
    if ((size_t)m->config.ple > widest) widest = (size_t)m->config.ple;
    return sh_team_reserve(m->team, sh_qrows_bytes(type, (int)widest, m->part_rows));
}

static sh_status create_scratch(sh_model *m) {
    widths w = measure(m);
    size_t R = (size_t)sh_spread_rows(m->options.max_rows, m->members), H = (size_t)m->config.hidden;
    size_t P = (size_t)m->config.ple;
    size_t B = (size_t)m->part_rows, f = sizeof(float), spans = (size_t)m->options.max_spans;
    size_t parts = (size_t)m->n_parts;
    size_t rows = R * (H + (P ? H : 0) + 1);
    size_t of_part = B * (2 * H + w.q + 2 * w.kv + 2 * w.ff + 2 * P + parts * H);
    bool gathers = m->options.share.parts > 1 && !m->options.share.sum;
    size_t all = !gathers ? 0 : B * (w.all_q > w.all_ff ? w.all_q : w.all_ff), own = gathers ? B * w.own : 0;
    size_t bytes = (rows + of_part + all + own) * f + 2 * spans * sizeof *m->rows + (16 + parts) * 64;
    SH_TRY(sh_arena_create(bytes, "scratch of the layers", &m->arena));
    sh_arena *a = &m->arena;
    m->x = sh_arena_take(a, R * H * f);
    m->x0 = P ? sh_arena_take(a, R * H * f) : NULL;
    m->h = sh_arena_take(a, B * H * f);
    m->q = sh_arena_take(a, B * w.q * f);
    m->k = sh_arena_take(a, B * w.kv * f);
    m->v = sh_arena_take(a, B * w.kv * f);
    m->gate = sh_arena_take(a, B * w.ff * f);
    m->up = sh_arena_take(a, B * w.ff * f);
    for (int i = 0; i < m->n_parts; i++) m->part[i].y = sh_arena_take(a, B * H * f);
    m->z = sh_arena_take(a, B * H * f);
    m->ctx = sh_arena_take(a, B * P * f);
    m->ple = sh_arena_take(a, B * P * f);
    m->ids = sh_arena_take(a, R * sizeof *m->ids);
    m->rows = sh_arena_take(a, spans * sizeof *m->rows);
    m->part_spans = sh_arena_take(a, spans * sizeof *m->part_spans);
    m->all = gathers ? sh_arena_take(a, all * f) : NULL;
    m->own = gathers ? sh_arena_take(a, own * f) : NULL;
    SH_TRY(reserve_quantized(m, &w));
    if (!w.moe) return SH_OK;
    size_t counts = (size_t)(m->options.last - m->options.first) * (size_t)m->config.experts;
    m->chosen = calloc(counts, sizeof *m->chosen);
    if (!m->chosen) SH_FAIL(SH_EMEMORY, "model: no memory for %zu counts", counts);
    return sh_moe_create(&m->config, m->options.mode, m->part_rows, m->team, m->kn, m->experts, &m->moe);
}

/* The furthest that any layer of a kind looks back. */
static void find_windows(sh_model *m) {
    for (int k = 0; k < SH_KV_KINDS; k++) m->windows[k] = -1;
    for (int i = m->options.first; i < m->options.last; i++) {
        const sh_layer *l = &m->config.layer[i];
        int *w = &m->windows[l->kind];
        *w = l->window == 0 || *w == 0 ? 0 : max_int(*w, l->window);
    }
}

static sh_status check_options(const sh_config *c, const sh_model_options *o) {
    if (o->first < 0 || o->first >= o->last || o->last > c->n_layers)
        SH_FAIL(SH_EINPUT, "layers %d to %d: the model has layers 0 to %d", o->first, o->last - 1, c->n_layers - 1);
    if (o->max_rows < 1 || o->max_spans < 1 || o->max_context < 1)
        SH_FAIL(SH_EINPUT, "model: %d rows, %d spans, context %d: 1 or more are allowed", o->max_rows, o->max_spans,
                o->max_context);
    const sh_share *s = &o->share;
    if (s->parts > 1 && (s->part < 0 || s->part >= s->parts || c->layer[0].heads % s->parts != 0))
        SH_FAIL(SH_EINPUT, "model: part %d of %d: the %d query heads must divide evenly", s->part, s->parts,
                c->layer[0].heads);
    if (s->parts > 1 && (!o->peers || !o->peers->gather || !o->peers->sum))
        SH_FAIL(SH_ESTATE, "model: part %d of %d needs its peers", s->part, s->parts);
    return SH_OK;
}

static sh_status create_members(sh_model *m, const char *model_dir) {
    const sh_model_options *o = &m->options;
    SH_TRY(sh_kernels_select(&m->kn));
    SH_TRY(sh_team_create(m->kn->modelled ? 1 : o->threads, o->cpus, o->n_cpus, &m->team));
    const sh_expert_peers *e = m->experts;
    if (e) sh_team_set_poll(m->team, e->poll, e->ctx);
    sh_weights_options w = {.mode = o->mode,
                            .share = o->share,
                            .first = o->first,
                            .last = o->last,
                            .peers = o->load_peers,
                            .tell = o->load_told,
                            .tell_arg = o->load_arg};
    if (e) w.held = (sh_held_experts){.holds = e->holds, .ctx = e->ctx};
    SH_TRY(sh_weights_load(model_dir, &m->whole, &w, m->team, &m->weights));
    SH_TRY(sh_kv_create(&m->config, o->kv_type, o->first, o->last, o->pages, &m->kv));
    SH_TRY(create_ropes(m));
    int rows = m->members > 1 ? o->max_rows : m->part_rows, spans = o->max_spans + m->members - 1;
    SH_TRY(
        sh_attention_create(&m->config, o->first, o->last, rows, spans, o->max_context, m->team, m->kn, &m->attention));
    if (m->members > 1)
        SH_TRY(sh_spread_create(&m->config, o->first, o->last, o->max_rows, o->max_spans, m->kv, m->attention, m->kn,
                                o->peers->context, &m->spread));
    return create_scratch(m);
}

sh_status sh_model_create(const char *model_dir, const sh_config *c, const sh_model_options *o, sh_model **out) {
    SH_TRY(check_options(c, o));
    sh_model *m = calloc(1, sizeof *m);
    if (!m) SH_FAIL(SH_EMEMORY, "model: no memory");
    m->whole = *c;
    sh_config_share(c, o->share, &m->config);
    m->options = *o;
    m->experts = o->peers ? o->peers->experts : NULL;
    m->n_parts = m->experts ? SH_EXPERT_SLOTS : 1;
    m->part_rows = min_int(o->max_rows, m->experts ? min_int(m->experts->part_rows, SH_PART_ROWS) : SH_PART_ROWS);
    m->members = o->peers && o->peers->context ? o->peers->context->members : 1;
    m->member = m->members > 1 ? o->peers->context->member : 0;
    if (m->members > 1) m->part_rows = sh_spread_rows(o->max_rows, m->members); /* one part: see sh_model_parts */
    find_windows(m);
    sh_status st = create_members(m, model_dir);
    if (st != SH_OK) {
        sh_model_destroy(&m);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    m->options.cpus = NULL; /* the caller's */
    m->options.n_cpus = 0;
    m->options.load_peers = NULL;
    *out = m;
    return SH_OK;
}

void sh_model_destroy(sh_model **mp) {
    sh_model *m = *mp;
    if (!m) return;
    sh_moe_destroy(&m->moe);
    free(m->chosen);
    sh_spread_destroy(&m->spread);
    sh_attention_destroy(&m->attention);
    for (int i = 0; i < m->n_ropes; i++) sh_rope_release(&m->ropes[i]);
    free(m->ropes);
    sh_kv_destroy(&m->kv);
    sh_weights_destroy(&m->weights);
    sh_team_destroy(&m->team);
    sh_arena_release(&m->arena);
    free(m);
    *mp = NULL;
}

sh_load_times sh_model_load(const sh_model *m) {
    return m->weights->load;
}

void sh_model_set_probe(sh_model *m, const sh_model_probe *p) {
    m->probe = p ? *p : (sh_model_probe){0};
}

sh_model_times sh_model_time(const sh_model *m) {
    return m->times;
}

void sh_model_set_timeline(sh_model *m, sh_timeline *t) {
    m->timeline = t;
    if (m->spread) sh_spread_set_timeline(m->spread, t);
}

sh_range sh_model_ids(const sh_model *m) {
    return sh_share_range(m->options.share, m->config.vocab, SH_SHARE_VOCAB);
}

const uint64_t *sh_model_chosen(const sh_model *m) {
    return m->chosen;
}

uint64_t sh_model_expert_rows(const sh_model *m) {
    return m->moe ? sh_moe_computed(m->moe) : 0;
}

const sh_kernels *sh_model_kernels(const sh_model *m) {
    return m->kn;
}

sh_team *sh_model_team(sh_model *m) {
    return m->team;
}

size_t sh_model_weight_bytes(const sh_model *m) {
    return m->weights->bytes;
}

sh_kv_pool *sh_model_kv(const sh_model *m) {
    return m->kv;
}

/* --- checking ------------------------------------------------------------------------------------------------------
 */

/* Every position that the span reads or writes in layers of a kind has a page of the pool. */
static sh_status check_pages(const sh_model *m, int kind, const sh_span *s) {
    int end = s->pos + s->rows, window = m->windows[kind];
    int from = window > 0 ? max_int(0, s->pos - window + 1) : 0;
    if (s->page0[kind] > from / SH_PAGE_TOKENS || s->page0[kind] + s->n_pages[kind] < (end - 1) / SH_PAGE_TOKENS + 1)
        SH_FAIL(SH_EFORMAT, "batch: sequence %llu: pages %d to %d do not hold positions %d to %d",
                (unsigned long long)s->seq, s->page0[kind], s->page0[kind] + s->n_pages[kind] - 1, from, end - 1);
    for (int i = 0; i < s->n_pages[kind]; i++)
        if (s->pages[kind][i] < 0 || s->pages[kind][i] >= m->options.pages[kind])
            SH_FAIL(SH_EFORMAT, "batch: sequence %llu: page %d: the pool has %d", (unsigned long long)s->seq,
                    s->pages[kind][i], m->options.pages[kind]);
    return SH_OK;
}

static sh_status check_span(const sh_model *m, const sh_span *s, int row, int kept) {
    if (s->row0 != row || s->kept0 != kept || s->rows < 1 || s->keep < 0 || s->keep > s->rows)
        SH_FAIL(SH_EFORMAT, "batch: sequence %llu: rows %d+%d, kept %d+%d: do not follow %d and %d",
                (unsigned long long)s->seq, s->row0, s->rows, s->kept0, s->keep, row, kept);
    if (s->pos < 0 || s->pos > m->options.max_context - s->rows)
        SH_FAIL(SH_EFORMAT, "batch: sequence %llu: positions %d to %lld: the context is %d", (unsigned long long)s->seq,
                s->pos, (long long)s->pos + s->rows - 1, m->options.max_context);
    int blocks = sh_owner_seen(s->pos + s->rows - 1, s->level);
    if (m->members > 1 && blocks > SH_OWNER_BLOCKS * m->members)
        SH_FAIL(SH_EFORMAT, "batch: sequence %llu: level %d makes %d blocks of %d positions: at most %d for %d members",
                (unsigned long long)s->seq, s->level, blocks, s->pos + s->rows, SH_OWNER_BLOCKS * m->members,
                m->members);
    for (int kind = 0; kind < SH_KV_KINDS; kind++)
        if (m->windows[kind] >= 0) SH_TRY(check_pages(m, kind, s));
    return SH_OK;
}

sh_status sh_model_check(const sh_model *m, const sh_batch *b) {
    if (b->n_rows > m->options.max_rows || b->n_spans > m->options.max_spans)
        SH_FAIL(SH_ELIMIT, "batch: %d rows in %d spans: at most %d and %d were announced", b->n_rows, b->n_spans,
                m->options.max_rows, m->options.max_spans);
    if (b->widest_rows > m->options.max_rows || b->widest_kept > m->options.max_rows)
        SH_FAIL(SH_ELIMIT, "batch: %d rows, %d kept in another member's: at most %d were announced", b->widest_rows,
                b->widest_kept, m->options.max_rows);
    int row = 0, kept = 0;
    for (int i = 0; i < b->n_spans; i++) {
        SH_TRY(check_span(m, &b->spans[i], row, kept));
        row += b->spans[i].rows;
        kept += b->spans[i].keep;
    }
    if (row != b->n_rows || kept != b->n_kept)
        SH_FAIL(SH_EFORMAT, "batch: spans hold %d rows, %d kept, of %d and %d", row, kept, b->n_rows, b->n_kept);
    int vocab = m->config.vocab;
    if (m->config.ple && m->config.ple_vocab < vocab) vocab = m->config.ple_vocab;
    for (int i = 0; i < b->n_rows; i++)
        if (b->ids[i] < 0 || b->ids[i] >= vocab)
            SH_FAIL(SH_EFORMAT, "batch: row %d: token %d: 0 to %d are allowed", i, b->ids[i], vocab - 1);
    return SH_OK;
}

/* --- rows ----------------------------------------------------------------------------------------------------------
 */

void sh_model_view(sh_model *m, bool kept) {
    const sh_batch *b = m->batch;
    m->lo = sh_owner_first_row(b->n_rows, m->members, m->member);
    m->hi = sh_owner_first_row(b->n_rows, m->members, m->member + 1);
    m->kept = kept;
    m->n_row_spans = sh_attn_rows_of(b, m->lo, m->hi, kept, m->rows);
    m->n = 0;
    for (int i = 0; i < m->n_row_spans; m->n += m->rows[i++].n) m->rows[i].row = m->n;
    if (m->spread) sh_spread_view(m->spread, b, kept);
}

int sh_model_parts(const sh_model *m) {
    const sh_batch *b = m->batch;
    if (m->members > 1) return 1; /* members meet once in each layer, those without rows too */
    int widest = max_int(m->n, m->kept ? b->widest_kept : b->widest_rows), B = m->part_rows;
    if (m->n_parts == 1) return (widest + B - 1) / B;
    if (widest <= B && widest < m->experts->split_rows) return widest > 0;
    return m->n_parts * ((widest + m->n_parts * B - 1) / (m->n_parts * B));
}

void sh_model_clip(sh_model *m, const sh_part *p) {
    m->n_part_spans = 0;
    for (int i = 0; i < m->n_row_spans; i++) {
        const sh_attn_rows *s = &m->rows[i];
        int lo = max_int(s->row, p->row0), hi = min_int(s->row + s->n, p->row0 + p->n);
        if (lo < hi)
            m->part_spans[m->n_part_spans++] =
                (sh_attn_rows){.span = s->span, .row = lo - p->row0, .n = hi - lo, .pos = s->pos + lo - s->row};
    }
}

void sh_model_keep(sh_model *m) {
    if (m->kept) return;
    size_t row = (size_t)m->config.hidden * sizeof(float), to = 0;
    for (int i = 0; i < m->n_row_spans; i++) { /* rows only move down, so ascending order is safe */
        const sh_attn_rows *p = &m->rows[i];
        int beyond = p->pos + p->n - (p->span->pos + p->span->rows - p->span->keep);
        size_t n = (size_t)(beyond < 0 ? 0 : beyond < p->n ? beyond : p->n), from = (size_t)(p->row + p->n) - n;
        memmove((uint8_t *)m->x + to * row, (uint8_t *)m->x + from * row, n * row);
        if (m->x0) memmove((uint8_t *)m->x0 + to * row, (uint8_t *)m->x0 + from * row, n * row);
        memmove(m->ids + to, m->ids + from, n * sizeof *m->ids);
        to += n;
    }
    sh_model_view(m, true);
}

/* --- the block of a cut --------------------------------------------------------------------------------------------
 */

/* What of a batch crosses a cut: rows that are computed here, of them kept ones, rows whose K/V are stored here. */
typedef struct crossing {
    int rows, kept, stored[SH_KV_KINDS];
} crossing;

/* Kept rows among the first n. */
static int kept_below(const sh_batch *b, int n) {
    int kept = 0;
    for (int i = 0; i < b->n_spans; i++) {
        const sh_span *s = &b->spans[i];
        int k = n - (s->row0 + s->rows - s->keep);
        kept += k < 0 ? 0 : k < s->keep ? k : s->keep;
    }
    return kept;
}

static int stored_of(const sh_model *m, const sh_span *s) {
    int place = sh_owner_place(m->member, s->seq, m->members);
    return sh_owner_below(s->pos + s->rows, s->level, m->members, place) -
           sh_owner_below(s->pos, s->level, m->members, place);
}

static crossing crossing_of(const sh_model *m, const sh_batch *b) {
    int lo = sh_owner_first_row(b->n_rows, m->members, m->member);
    int hi = sh_owner_first_row(b->n_rows, m->members, m->member + 1);
    crossing n = {.rows = hi - lo, .kept = kept_below(b, hi) - kept_below(b, lo), .stored = {0, b->n_rows}};
    for (int i = 0; i < b->n_spans; i++) n.stored[SH_KV_GLOBAL] += stored_of(m, &b->spans[i]);
    return n;
}

static size_t hidden_bytes(const sh_config *c, int cut, const crossing *n) {
    return (size_t)(cut >= c->first_shared ? n->kept : n->rows) * (size_t)c->hidden * sizeof(float);
}

/* Where the rows of producer `layer` lie in the block of a cut; with n_layers: its end. */
static size_t kv_offset(const sh_config *c, sh_kv_type type, int cut, int layer, const crossing *n) {
    size_t at = hidden_bytes(c, cut, n) * (c->ple ? 2 : 1);
    for (int j = 0; j < layer; j++)
        if (sh_config_kv_crosses(c, j, cut)) at += (size_t)n->stored[c->layer[j].kind] * sh_kv_row_bytes(c, type, j);
    return at;
}

static size_t block_bytes(const sh_config *c, sh_kv_type type, int cut, const crossing *n) {
    if (cut <= 0 || (c->kv_end && cut >= c->kv_end)) return 0; /* behind kv_end nobody reads more than the K/V */
    if (cut >= c->n_layers) return (size_t)n->kept * (size_t)c->hidden * sizeof(float);
    return kv_offset(c, type, cut, cut, n);
}

size_t sh_model_cut_bytes(const sh_config *c, sh_kv_type type, int cut, int n_rows, int n_kept) {
    return block_bytes(c, type, cut, &(crossing){n_rows, n_kept, {n_rows, n_rows}});
}

size_t sh_model_block_bytes(const sh_model *m, int cut, const sh_batch *b) {
    crossing n = crossing_of(m, b);
    return block_bytes(&m->config, m->options.kv_type, cut, &n);
}

/* Copies K/V of a span's rows that are stored here between pages and packed rows; returns where the next are. */
static uint8_t *copy_kv(sh_model *m, int layer, const sh_span *s, uint8_t *packed, bool out) {
    bool all = m->config.layer[layer].kind == SH_KV_SLIDING;
    size_t row = sh_kv_row_bytes(&m->config, m->options.kv_type, layer);
    int block = SH_SEGMENT_TOKENS << s->level;
    for (int r = 0, n; r < s->rows; r += n) {
        int pos = s->pos + r, left = block - pos % block;
        n = all || m->members == 1 || left > s->rows - r ? s->rows - r : left;
        if (!all && sh_owner_of(pos / block, s->seq, m->members) != m->member) continue;
        if (out)
            sh_kv_export(m->kv, layer, s, r, n, packed);
        else
            sh_kv_import(m->kv, layer, s, r, n, packed);
        packed += (size_t)n * row;
    }
    return packed;
}

void sh_model_receive(sh_model *m, const uint8_t *in) {
    const sh_batch *b = m->batch;
    const sh_config *c = &m->config;
    int cut = m->options.first;
    crossing n = crossing_of(m, b);
    size_t bytes = hidden_bytes(c, cut, &n);
    memcpy(m->x, in, bytes);
    if (m->x0) memcpy(m->x0, in + bytes, bytes);
    for (int j = 0; j < cut; j++) {
        if (!sh_config_kv_crosses(c, j, cut) || !sh_kv_holds(m->kv, j)) continue;
        uint8_t *from = (uint8_t *)in + kv_offset(c, m->options.kv_type, cut, j, &n); /* is only read */
        for (int i = 0; i < b->n_spans; i++) from = copy_kv(m, j, &b->spans[i], from, false);
    }
}

void sh_model_send(sh_model *m, const uint8_t *in, uint8_t *out) {
    const sh_batch *b = m->batch;
    const sh_config *c = &m->config;
    sh_kv_type type = m->options.kv_type;
    int cut = m->options.last;
    crossing n = crossing_of(m, b);
    size_t bytes = hidden_bytes(c, cut, &n);
    memcpy(out, m->x, bytes);
    if (m->x0) memcpy(out + bytes, m->x0, bytes);
    for (int j = 0; j < cut; j++) {
        if (!sh_config_kv_crosses(c, j, cut)) continue;
        uint8_t *to = out + kv_offset(c, type, cut, j, &n);
        if (j < m->options.first) { /* an earlier stage's: passed on as it came */
            memcpy(to, in + kv_offset(c, type, m->options.first, j, &n),
                   (size_t)n.stored[c->layer[j].kind] * sh_kv_row_bytes(c, type, j));
            continue;
        }
        for (int i = 0; i < b->n_spans; i++) to = copy_kv(m, j, &b->spans[i], to, true);
    }
}
