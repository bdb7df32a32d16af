/* From bytes to KV pages, and what a rank needs. See plan.h and docs/decisions/0006-plan-and-kv-budget.md. */
#include "partition/plan.h"

#include <stdlib.h>

#include "model/owner.h"

#define USUAL_TOKENS 2048 /* what a sequence is expected to hold when pages are divided between the kinds */
#define MIB          ((uint64_t)1 << 20)

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t pages_of(int64_t tokens) {
    return (tokens + SH_PAGE_TOKENS - 1) / SH_PAGE_TOKENS;
}

/* One stage: bytes of a page of each kind (0: the stage stores none of it), and what it may spend. */
typedef struct stage {
    int64_t page[SH_KV_KINDS];
    int64_t budget;
} stage;

/* Pages of one rank that matter for one sequence. */
typedef struct demand {
    int64_t longest; /* global pages of the longest sequence */
    int64_t usual;   /* global pages of a usual one */
    int64_t window;  /* sliding pages of a decoding sequence */
    int64_t chunk;   /* sliding pages that prompt rows under way need besides, for the group */
} demand;

static int members_of(const sh_kv_limits *l) {
    return l->members > 1 ? l->members : 1;
}

static demand demand_of(const sh_config *c, const sh_kv_limits *l) {
    int64_t w = sh_config_widest_window(c);
    int64_t all = pages_of(l->max_context);
    demand d = {.longest = sh_owner_most(l->max_context, members_of(l))};
    /* of many sequences each member stores the same */
    d.usual = (pages_of(min64(l->max_context, max64(2 * w, USUAL_TOKENS))) + members_of(l) - 1) / members_of(l);
    if (w == 0) return d;
    d.window = min64((w - 1) / SH_PAGE_TOKENS + 2, all); /* W positions, wherever the page borders fall */
    d.chunk = min64(pages_of(l->chunk) + 1, all - d.window);
    return d;
}

static stage stage_of(const sh_config *c, sh_kv_type type, int first, int last, uint64_t budget) {
    stage s = {.budget = budget > (uint64_t)1 << 60 ? (int64_t)1 << 60 : (int64_t)budget};
    for (int k = 0; k < SH_KV_KINDS; k++)
        s.page[k] = (int64_t)sh_config_kv_bytes(c, type, (sh_kv_kind)k, first, last) * SH_PAGE_TOKENS;
    return s;
}

/* Most pages of a kind that fit every stage beside n pages of the other kind. */
static int64_t most(const stage *s, int n_stages, sh_kv_kind kind, int64_t n_other, int64_t cap) {
    int64_t n = cap;
    for (int i = 0; i < n_stages; i++) {
        int64_t left = s[i].budget - n_other * s[i].page[1 - kind];
        if (s[i].page[kind]) n = min64(n, max64(left, 0) / s[i].page[kind]);
    }
    return n;
}

/* Sequences whose windows may have room: each with a usual number of global pages, and leaving a quarter of the budget
 * (or all the longest sequence wants) to global pages. */
static int64_t sequences(const stage *s, int n_stages, const demand *d, int max_seqs) {
    int64_t m = max_seqs;
    for (int i = 0; i < n_stages; i++) {
        int64_t slide = s[i].page[SH_KV_SLIDING], full = s[i].page[SH_KV_GLOBAL], b = s[i].budget - d->chunk * slide;
        int64_t each = d->window * slide + d->usual * full;
        if (each) m = min64(m, max64(b, 0) / each);
        b -= min64(d->longest * full, s[i].budget / 4);
        if (slide) m = min64(m, max64(b, 0) / (d->window * slide));
    }
    return max64(m, 1);
}

static sh_status refuse(const stage *s, int n_stages, int rank, const demand *d, int64_t full) {
    for (int i = 0; i < n_stages; i++) {
        int64_t least = (d->window + d->chunk) * s[i].page[SH_KV_SLIDING] + full * s[i].page[SH_KV_GLOBAL];
        if (least > s[i].budget)
            SH_FAIL(SH_EMEMORY,
                    "rank %d: %.1f MiB for KV are too few: one sequence needs at least %.1f MiB: raise --kv-memory, "
                    "lower --chunk or "
                    "--max-context, or use more ranks",
                    rank + i, (double)s[i].budget / (double)MIB, (double)least / (double)MIB);
    }
    return SH_OK;
}

/* rank: of the first of the stages, for messages */
static sh_status divide(const sh_config *c, const sh_kv_limits *l, const stage *s, int n_stages, int rank,
                        sh_kv_plan *out) {
    demand d = demand_of(c, l);
    int64_t least = sh_owner_most(l->chunk < l->max_context ? l->chunk : l->max_context, members_of(l)); /* a chunk */
    SH_TRY(refuse(s, n_stages, rank, &d, least));
    int64_t m = sequences(s, n_stages, &d, l->max_seqs);
    int64_t slide_cap = d.window ? min64(l->max_seqs * d.window + d.chunk, INT32_MAX / 2) : 0;
    int64_t full_cap = min64(l->max_seqs * d.longest, INT32_MAX / 2);
    int64_t slide = min64(m * d.window + d.chunk, slide_cap);
    int64_t full = most(s, n_stages, SH_KV_GLOBAL, slide, full_cap);
    if (d.window) slide = most(s, n_stages, SH_KV_SLIDING, full, slide_cap); /* what rounding and caps left over */
    *out = (sh_kv_plan){.pages = {[SH_KV_GLOBAL] = (int32_t)full, [SH_KV_SLIDING] = (int32_t)slide},
                        .tokens = sh_owner_capacity((int)full, members_of(l), l->max_context),
                        .seqs = (int32_t)m};
    return SH_OK;
}

sh_status sh_plan_kv(const sh_config *c, const sh_kv_limits *l, int first, int last, uint64_t budget, sh_kv_plan *out) {
    stage s = stage_of(c, l->type, first, last, budget);
    return divide(c, l, &s, 1, 0, out);
}

/* Pages for ranks [from, to). */
static sh_status pages_of_ranks(const sh_config *c, const sh_kv_limits *l, const Shoal__Plan *p, int from, int to,
                                const uint64_t *budget, sh_kv_plan *out) {
    stage *s = calloc((size_t)(to - from), sizeof *s);
    if (!s) SH_FAIL(SH_EMEMORY, "plan: no memory for %d ranks", to - from);
    sh_config mine; /* the heads of a member: every member's are alike */
    sh_config_share(c, sh_plan_share(p, from), &mine);
    for (int i = from; i < to; i++)
        s[i - from] = stage_of(&mine, l->type, p->rank[i]->first, p->rank[i]->last, budget[i]);
    sh_status st = divide(c, l, s, to - from, from, out);
    free(s);
    return st;
}

sh_status sh_plan_kv_group(const sh_config *c, const sh_kv_limits *l, const Shoal__Plan *p, const uint64_t *budget,
                           sh_kv_plan *out) {
    return pages_of_ranks(c, l, p, 0, sh_plan_shape_of(p).decode, budget, out);
}

/* Rows of a prompt are kept until they are confirmed: as many chunks as can be out. */
sh_status sh_plan_kv_prefill(const sh_config *c, const sh_kv_limits *l, const Shoal__Plan *p, const uint64_t *budget,
                             sh_kv_plan *out) {
    sh_plan_shape s = sh_plan_shape_of(p);
    sh_kv_limits wide = *l;
    wide.chunk = (int)min64((int64_t)l->chunk * (s.prefill + 1), l->max_context);
    return pages_of_ranks(c, &wide, p, s.decode, s.decode + s.prefill, budget, out);
}

sh_status sh_plan_kv_limits(const Shoal__Plan *p, sh_kv_limits *out) {
    int lanes = p->ep > 1 ? p->ep : 1; /* each has sequences, prompt rows and pages of its own */
    sh_kv_limits l = {.max_seqs = (p->max_seqs + lanes - 1) / lanes,
                      .max_context = p->max_context,
                      .chunk = (p->chunk + lanes - 1) / lanes,
                      .members = p->cp};
    SH_TRY(sh_kv_type_parse(p->kv, &l.type));
    *out = l;
    return SH_OK;
}

uint64_t sh_plan_kv_bytes(const sh_config *c, sh_kv_type type, int first, int last, const int32_t pages[SH_KV_KINDS]) {
    uint64_t n = 0;
    for (int k = 0; k < SH_KV_KINDS; k++)
        n += sh_config_kv_bytes(c, type, (sh_kv_kind)k, first, last) * SH_PAGE_TOKENS * (uint64_t)pages[k];
    return n;
}

/* --- a rank's memory -----------------------------------------------------------------------------------------------
 */

/* Floats that one row needs at once in the layers of a stage: the streams, the widest projections, the experts' rows.
 */
static uint64_t row_floats(const sh_config *c, int first, int last) {
    uint64_t widest = 0;
    for (int i = first; i < last; i++) {
        const sh_layer *l = &c->layer[i];
        uint64_t n = (uint64_t)l->head_dim * (uint64_t)(2 * l->heads + 2 * l->kv_heads) + 2 * (uint64_t)l->ff;
        if (l->moe) n += (uint64_t)c->top_k * (uint64_t)(2 * c->expert_ff + 2 * c->hidden) + (uint64_t)c->experts;
        if (n > widest) widest = n;
    }
    return widest + 10 * (uint64_t)c->hidden + 4 * (uint64_t)c->ple;
}

/* One micro-batch as it crosses a cut: hidden states, embeddings, K/V rows of producers. */
static uint64_t block_bytes(const sh_config *c, int cut, uint64_t rows) {
    uint64_t n = 4 * (uint64_t)c->hidden * (c->ple ? 2 : 1);
    for (int i = 0; i < cut; i++)
        if (sh_config_kv_crosses(c, i, cut)) n += 4 * (uint64_t)sh_layer_kv_values(&c->layer[i]);
    return rows * n;
}

/* Cosines and sines of every position, one table per layer kind. */
static uint64_t rope_bytes(const sh_config *c, uint64_t positions) {
    uint64_t pairs[SH_KV_KINDS] = {0};
    for (int i = 0; i < c->n_layers; i++) {
        uint64_t n = (uint64_t)c->layer[i].rotated_pairs;
        if (n > pairs[c->layer[i].kind]) pairs[c->layer[i].kind] = n;
    }
    return 8 * positions * (pairs[0] + pairs[1]);
}

static uint64_t widest_head(const sh_config *c) {
    int n = 0;
    for (int i = 0; i < c->n_layers; i++)
        if (c->layer[i].head_dim > n) n = c->layer[i].head_dim;
    return (uint64_t)n;
}

/* What the members of a stage that divides heads and columns send each other: messages both ways, gathered columns. */
static uint64_t exchange_bytes(const sh_config *c, sh_share s, int first, int last, uint64_t rows) {
    uint64_t widest = 0, parts = (uint64_t)s.parts;
    if (s.parts <= 1) return 0;
    if (rows > SH_PART_ROWS) rows = SH_PART_ROWS;
    for (int i = first; i < last; i++) {
        const sh_layer *l = &c->layer[i];
        uint64_t q = (uint64_t)l->heads * (uint64_t)l->head_dim, n = q > (uint64_t)l->ff ? q : (uint64_t)l->ff;
        if (n > widest) widest = n;
    }
    uint64_t message = 4 * rows * (s.sum ? (uint64_t)c->hidden : widest / parts + SH_SHARE_COLUMNS);
    return 2 * parts * message + 4 * rows * (widest + (uint64_t)c->hidden / parts + SH_SHARE_COLUMNS);
}

static sh_mode mode_of(const Shoal__Plan *p) {
    sh_mode m = SH_MODE_BF16;
    SH_IGNORE(sh_mode_parse(p->mode, &m)); /* sh_plan_check has seen it */
    return m;
}

/* K/V rows of prompts on their way: a layer's rows of a chunk, in each of the buffers of who sends or takes them. */
static uint64_t stream_bytes(const sh_config *c, const Shoal__Plan *p) {
    uint64_t widest = 0;
    if (!p->has_prefill || p->prefill == 0) return 0;
    for (int i = 0; i < c->first_shared; i++) {
        uint64_t n = 4 * (uint64_t)sh_layer_kv_values(&c->layer[i]);
        if (n > widest) widest = n;
    }
    return 4 * ((uint64_t)p->chunk * (widest + 64) + 512 * (uint64_t)p->max_seqs);
}

/* Experts of all layers that a rank does not hold, in bytes of weights; *most gets the most that it holds in a layer.
 */
static uint64_t absent_bytes(const sh_config *c, const Shoal__Plan *p, int rank, uint64_t *most) {
    const Shoal__PlanRank *r = p->rank[rank];
    uint64_t absent = 0;
    *most = p->ep > 1 ? 0 : (uint64_t)c->experts;
    for (int layer = r->first; layer < r->last && p->ep > 1; layer++)
        if (c->layer[layer].moe) absent += (uint64_t)c->experts;
    for (size_t i = 0; i < r->n_experts; i++) {
        uint64_t held = r->experts[i]->n_expert;
        absent -= held < absent ? held : absent;
        if (held > *most) *most = held;
    }
    return absent * sh_expert_bytes(c, mode_of(p));
}

/* What the members of a stage that divides experts send each other (worker/experts.c), and the experts' scratch
 * (model/moe.c): two parts of a step, each with everybody's rows. */
static uint64_t expert_exchange_bytes(const sh_config *c, const Shoal__Plan *p, uint64_t rows, uint64_t held) {
    if (p->ep <= 1) return 0;
    uint64_t part = (uint64_t)sh_expert_part_rows((int)rows, p->ep), k = (uint64_t)c->top_k, h = (uint64_t)c->hidden;
    uint64_t others = (uint64_t)p->ep - 1, row = sh_expert_result_bytes(c, mode_of(p));
    uint64_t theirs = part * (k < held ? k : held), copies = others < k ? others : k;
    uint64_t of_slot = others * (part * row + theirs * (row + 4)) + part * copies * row + 2 * part * k * (row + 16);
    uint64_t scratch = 2 * part * k * (h + 2 * (uint64_t)c->expert_ff) * 4 + part * k * (others + 1) * 8;
    return 2 * of_slot + scratch;
}

/* What members that share positions out send each other: two messages to each other one and one from it, partials of
 * own rows, final hidden states; rows: of a micro-batch, own: of a member (model/spread.c). */
static uint64_t spread_bytes(const sh_config *c, uint64_t members, int first, int last, uint64_t rows, uint64_t own) {
    uint64_t widest = 0;
    if (members <= 1) return 0;
    for (int i = first; i < last; i++) {
        const sh_layer *l = &c->layer[i];
        uint64_t n = (uint64_t)sh_layer_kv_values(l) + (uint64_t)l->heads * (uint64_t)l->head_dim;
        uint64_t partials = SH_OWNER_BLOCKS * (uint64_t)l->heads * (uint64_t)(l->head_dim + 2);
        if (l->kind == SH_KV_GLOBAL && partials > n) n = partials;
        if (n > widest) widest = n;
    }
    return 4 * own * widest * (3 * (members - 1) + 2) + rows * (4 * (uint64_t)c->hidden + 32);
}

sh_plan_memory sh_plan_rank_memory(const sh_config *config, const Shoal__Plan *p, int rank, int given) {
    sh_share share = sh_plan_share(p, rank);
    sh_config whole, mine, *all = &whole, *c = &mine;
    sh_plan_rank_config(config, p, rank, all);
    sh_config_share(all, share, c);
    int first = p->rank[rank]->first, last = p->rank[rank]->last;
    uint64_t seqs = (uint64_t)p->max_seqs, rows = seqs + (uint64_t)p->chunk, context = (uint64_t)p->max_context;
    uint64_t threads = given > 0 ? (uint64_t)given : p->threads ? (uint64_t)p->threads : 16, vocab = (uint64_t)c->vocab;
    sh_mode mode = mode_of(p);
    uint64_t held, absent = absent_bytes(all, p, rank, &held);
    uint64_t members = p->cp > 1 ? (uint64_t)p->cp : 1, own = (rows + members - 1) / members;
    sh_plan_memory m = {.weights = sh_weights_estimate_share(all, mode, share, first, last) - absent};
    m.scratch = own * 4 * row_floats(c, first, last) + rope_bytes(c, context);
    if (mode >= SH_MODE_Q8) m.scratch += own * 2 * row_floats(c, first, last); /* rows in 8 bits, with their scales */
    m.scratch += threads * 8192 * widest_head(c); /* attention: blocks of rows, keys and partial sums */
    m.scratch += 4 * (MIB + seqs * 1024 + rows * 8 + context * 4); /* descriptors of micro-batches */
    m.scratch += stream_bytes(c, p);
    m.scratch += exchange_bytes(all, share, first, last, rows) + spread_bytes(c, members, first, last, rows, own);
    m.scratch += expert_exchange_bytes(all, p, rows, held);
    m.scratch += block_bytes(c, first, rows) + 4 * block_bytes(c, last, rows); /* in, and out until sent */
    if (sh_config_has_head(c, last)) {
        uint64_t samplers = threads < SH_SAMPLE_THREADS ? threads : SH_SAMPLE_THREADS;
        m.scratch += 4 * SH_LOGIT_ROWS * vocab + (512 + 20 * samplers) * (uint64_t)all->vocab; /* logits, tokenizer */
        if (p->tp > 1) m.scratch += 4 * SH_LOGIT_ROWS * (uint64_t)all->vocab;                  /* whole rows of them */
        m.scratch += seqs * context * 4;                                                       /* scored prompts */
    }
    m.reserve = 64 * MIB + m.weights / 50;
    return m;
}

sh_status sh_plan_kv_budget(const sh_config *c, const Shoal__Plan *p, int rank, int threads, uint64_t available,
                            uint64_t *out) {
    sh_plan_memory m = sh_plan_rank_memory(c, p, rank, threads);
    uint64_t need = m.weights + m.scratch + m.reserve + p->kv_memory;
    if (need < p->kv_memory || need >= available)
        SH_FAIL(SH_EMEMORY,
                "rank %d (layers %d to %d): needs %.1f MiB of memory (weights %.1f, work %.1f, reserve %.1f, KV "
                "%s%.1f) and may use "
                "%.1f MiB: use more ranks or more memory",
                rank, p->rank[rank]->first, p->rank[rank]->last - 1, (double)need / (double)MIB,
                (double)m.weights / (double)MIB, (double)m.scratch / (double)MIB, (double)m.reserve / (double)MIB,
                p->kv_memory ? "" : "more than ", (double)p->kv_memory / (double)MIB, (double)available / (double)MIB);
    *out = p->kv_memory ? p->kv_memory : available - need;
    return SH_OK;
}
