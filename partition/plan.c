/* Cuts: chosen, read, checked and printed. See plan.h. KV budgets are budget.c's. */
#include "partition/plan.h"
#include "partition/placement.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_CHUNK 512

/* --- balance -------------------------------------------------------------------------------------------------------
 */

int64_t sh_plan_cost(const sh_config *c, int first, int last) {
    int64_t n = sh_config_has_head(c, last) ? (int64_t)c->vocab * c->hidden : 0;
    for (int i = first; i < last; i++)
        n += sh_config_only_kv(c, i) ? sh_config_layer_count(c, i).kv : sh_layer_params(c, i);
    return n;
}

/* Best way to cut the first i layers into r stages: the dearest stage, and the sum of squares to choose among equals.
 */
typedef struct best {
    double worst, squares;
    int from; /* where the last of the r stages begins */
} best;

static best join(const best *before, const double *sum, int from, int to) {
    double cost = sum[to] - sum[from];
    best b = {.worst = cost > before->worst ? cost : before->worst, .from = from};
    b.squares = before->squares + cost * cost;
    return b;
}

static bool better(const best *a, const best *b) { /* of equals the later one: it was found by a lower cut */
    return b->from < 0 || a->worst < b->worst || (a->worst == b->worst && a->squares <= b->squares);
}

sh_status sh_plan_balance(const sh_config *c, int ranks, int *cut) {
    double cost[SH_MAX_LAYERS];
    int n = c->kv_end ? c->kv_end : c->n_layers;
    for (int i = 0; i < n; i++) cost[i] = (double)sh_plan_cost(c, i, i + 1); /* whole numbers: exact */
    return sh_plan_balance_by(cost, n, ranks, cut);
}

sh_status sh_plan_balance_by(const double *layer_cost, int n, int ranks, int *cut) {
    if (ranks < 1 || ranks > n) SH_FAIL(SH_EINPUT, "%d ranks: the model has %d layers: at most %d ranks", ranks, n, n);
    double sum[SH_MAX_LAYERS + 1] = {0}; /* cost of the layers below i; the last one's includes the head */
    for (int i = 0; i < n; i++) sum[i + 1] = sum[i] + layer_cost[i];
    best *t = calloc((size_t)(ranks + 1) * (size_t)(n + 1), sizeof *t);
    if (!t) SH_FAIL(SH_EMEMORY, "plan: no memory for balancing %d layers", n);
#define BEST(r, i) t[(size_t)(r) * (size_t)(n + 1) + (size_t)(i)]
    for (int r = 1; r <= ranks; r++)
        for (int i = r; i <= n; i++) {
            best b = {.from = -1};
            for (int from = r == 1 ? 0 : i - 1; from >= r - 1; from--) { /* the last stage grows */
                best x = join(&BEST(r - 1, from), sum, from, i);
                if (better(&x, &b)) b = x;
                if (sum[i] - sum[from] > b.worst) break;
            }
            BEST(r, i) = b;
        }
    for (int r = ranks, i = n; r > 1; r--) {
        i = BEST(r, i).from;
        cut[r - 2] = i;
    }
#undef BEST
    free(t);
    return SH_OK;
}

/* --- cuts as text --------------------------------------------------------------------------------------------------
 */

/* Of the first `layers` of a model, `whose` in words. */
static sh_status read_cuts(const char *option, const char *text, int layers, const char *whose, int *cut, int *count) {
    int n = 0, last = layers - 1;
    if (last == 0) SH_FAIL(SH_EINPUT, "%s %s: %s one layer: it cannot be cut", option, text, whose);
    for (const char *s = text;;) {
        char *end;
        errno = 0;
        long v = strtol(s, &end, 10);
        if (end == s || *s < '0' || *s > '9' || (*end && *end != ','))
            SH_FAIL(SH_EINPUT,
                    "%s %s: not a list of layers: allowed are numbers from 1 to %d, ascending, with commas between",
                    option, text, last);
        if (errno || v < 1 || v > last)
            SH_FAIL(SH_EINPUT, "%s %s: %.*s is not a cut: %s %d layers: allowed are 1 to %d", option, text,
                    (int)(end - s), s, whose, layers, last);
        if (n && v <= cut[n - 1])
            SH_FAIL(SH_EINPUT, "%s %s: not ascending: %ld follows %d: each is the first layer of the next stage",
                    option, text, v, cut[n - 1]);
        cut[n++] = (int)v; /* ascending below n_layers: never more than fit */
        if (!*end) break;
        s = end + 1;
    }
    *count = n;
    return SH_OK;
}

static sh_status in_range(const char *name, int64_t v, int64_t min, int64_t max) {
    if (v >= min && v <= max) return SH_OK;
    SH_FAIL(SH_EINPUT, "%s: %lld is out of range: allowed are %lld to %lld", name, (long long)v, (long long)min,
            (long long)max);
}

sh_status sh_plan_check_division(int ep, int tp, int cp) {
    SH_TRY(in_range("--ep", ep, 1, SH_MAX_RANKS));
    SH_TRY(in_range("--tp", tp, 1, SH_MAX_RANKS));
    SH_TRY(in_range("--cp", cp, 1, SH_MAX_RANKS));
    if ((ep > 1) + (tp > 1) + (cp > 1) > 1)
        SH_FAIL(SH_EINPUT,
                "--ep %d, --tp %d, --cp %d: a stage is divided one way at a time: allowed is one of them above 1, with "
                "any --pp and --replicas",
                ep, tp, cp);
    return SH_OK;
}

sh_status sh_plan_check_prefill(int prefill, int ep, int tp, int cp) {
    if (prefill > 0 && (ep > 1 || tp > 1 || cp > 1))
        SH_FAIL(SH_EINPUT,
                "--prefill %d, --ep %d, --tp %d, --cp %d: prompts are handed over between stages of one rank: allowed "
                "with --prefill is 1 for each of the others",
                prefill, ep, tp, cp);
    return SH_OK;
}

void sh_plan_hint_prefill(int more, int width, int prefill, char text[SH_PLAN_HINT]) {
    text[0] = 0;
    if (more > 0 && width == 1)
        snprintf(text, SH_PLAN_HINT, ", or --prefill %d where %s read prompts", prefill + more,
                 prefill + more == 1 ? "one is only to" : "so many are only to");
}

/* Stages and width from what was asked for; every number that contradicts another is named. */
static sh_status choose_shape(const sh_plan_request *r, int n_cuts, sh_plan_shape *out) {
    sh_plan_shape s = {
        .pp = r->pp, .ep = r->ep > 0 ? r->ep : 1, .tp = r->tp > 0 ? r->tp : 1, .cp = r->cp > 0 ? r->cp : 1};
    SH_TRY(sh_plan_check_division(s.ep, s.tp, s.cp));
    s.width = s.ep * s.tp * s.cp;
    s.prefill = r->prefill;
    int ranks = r->ranks > 0 ? r->ranks - r->prefill : 0; /* that decode */
    if (r->prefill < 0 || (r->ranks > 0 && ranks < 1))
        SH_FAIL(SH_EINPUT, "--prefill: %d of %d ranks: allowed are 0 to %d: one at least must decode", r->prefill,
                r->ranks, r->ranks > 0 ? r->ranks - 1 : 0);
    if (n_cuts > 0 && s.pp > 0 && s.pp != n_cuts + 1)
        SH_FAIL(SH_EINPUT, "--cuts %s: %d stages, but --pp asks for %d: give %d cuts", r->cuts, n_cuts + 1, s.pp,
                s.pp - 1);
    if (n_cuts > 0) s.pp = n_cuts + 1;
    if (n_cuts > 0 && ranks > 0 && s.width == 1 && ranks != s.pp)
        SH_FAIL(SH_EINPUT, "--cuts %s: %d stages, but there are %d ranks%s: give %d cuts, or -n %d", r->cuts, s.pp,
                ranks, r->prefill ? " that decode" : "", ranks - 1, s.pp + r->prefill);
    char hint[SH_PLAN_HINT];
    sh_plan_hint_prefill(s.pp > 0 ? ranks - s.pp : 0, s.width, r->prefill, hint);
    if (ranks > 0 && s.pp > 0 && ranks != s.pp * s.width)
        SH_FAIL(SH_EINPUT, "%d ranks%s: %d stages of %d ranks (ep %d, tp %d, cp %d) need %d: give -n %d%s", ranks,
                r->prefill ? " that decode" : "", s.pp, s.width, s.ep, s.tp, s.cp, s.pp * s.width,
                s.pp * s.width + r->prefill, hint);
    if (ranks > 0 && ranks % s.width != 0)
        SH_FAIL(SH_EINPUT, "%d ranks: not a multiple of the %d ranks of a stage (ep %d, tp %d, cp %d)", ranks, s.width,
                s.ep, s.tp, s.cp);
    if (s.pp <= 0) s.pp = ranks > 0 ? ranks / s.width : 1;
    s.decode = s.pp * s.width;
    *out = s;
    return SH_OK;
}

static sh_status choose_cuts(const sh_config *c, const sh_plan_request *r, int cut[SH_MAX_LAYERS],
                             sh_plan_shape *shape) {
    int count = 0;
    if (r->ranks < 0) SH_FAIL(SH_EINPUT, "%d ranks: at least 1", r->ranks);
    if (r->cuts && *r->cuts) SH_TRY(read_cuts("--cuts", r->cuts, c->n_layers, "the model has", cut, &count));
    SH_TRY(choose_shape(r, count, shape));
    if (count) return SH_OK;
    return r->layer_cost ? sh_plan_balance_by(r->layer_cost, c->n_layers, shape->pp, cut)
                         : sh_plan_balance(c, shape->pp, cut);
}

/* --- rules -----------------------------------------------------------------------------------------------------------
 */

/* The possible values of tp: what divides the query heads of every layer. */
static sh_status check_tp(const sh_config *c, int tp) {
    char allowed[256] = "";
    bool fits = true;
    for (int t = 1, at = 0; t <= SH_MAX_RANKS && at < (int)sizeof allowed - 8; t++) {
        bool divides = true;
        for (int i = 0; divides && i < c->n_layers; i++) divides = c->layer[i].heads % t == 0;
        if (divides) at += snprintf(allowed + at, sizeof allowed - (size_t)at, "%s%d", at ? ", " : "", t);
    }
    for (int i = 0; fits && i < c->n_layers; i++) fits = c->layer[i].heads % tp == 0;
    if (!fits)
        SH_FAIL(SH_EINPUT, "--tp: %d does not divide the %d query heads of the model: allowed are %s", tp,
                c->layer[0].heads, allowed);
    return SH_OK;
}

/* The rules of a layout, each by its name. */
static sh_status check_shape(const sh_config *c, const sh_plan_shape *s, int ranks) {
    SH_TRY(in_range("ranks of a group", ranks, 1, SH_MAX_RANKS));
    if (s->pp < 1 || s->pp > c->n_layers)
        SH_FAIL(SH_EINPUT, "%d stages: the model has %d layers: allowed are 1 to %d stages", s->pp, c->n_layers,
                c->n_layers);
    SH_TRY(in_range("--prefill", s->prefill, 0, c->first_shared < SH_MAX_RANKS ? c->first_shared : SH_MAX_RANKS - 1));
    SH_TRY(sh_plan_check_prefill(s->prefill, s->ep, s->tp, s->cp));
    if (s->ep > 1 && c->experts == 0) SH_FAIL(SH_EINPUT, "--ep: %d: the model has no experts: allowed is 1", s->ep);
    if (s->ep > 1 && s->ep > c->experts)
        SH_FAIL(SH_EINPUT, "--ep: %d: the model has %d experts: allowed are 1 to %d", s->ep, c->experts, c->experts);
    return check_tp(c, s->tp);
}

/* Experts of a rank: those of each layer that has any, ascending; `held` [experts] gets a mark for each. */
static sh_status check_rank_experts(const sh_config *c, int rank, const Shoal__PlanRank *r, int layer, bool *held) {
    const Shoal__PlanExperts *e = NULL;
    for (size_t i = 0; i < r->n_experts; i++)
        if (r->experts[i]->layer == layer) e = r->experts[i];
    if (!e) SH_FAIL(SH_EINPUT, "plan: rank %d: no experts are named for layer %d, which has them", rank, layer);
    for (size_t i = 0; i < e->n_expert; i++) {
        if (e->expert[i] < 0 || e->expert[i] >= c->experts || (i && e->expert[i] <= e->expert[i - 1]))
            SH_FAIL(SH_EINPUT, "plan: rank %d: layer %d: expert %d: allowed are 0 to %d, ascending", rank, layer,
                    e->expert[i], c->experts - 1);
        held[e->expert[i]] = true;
    }
    return SH_OK;
}

/* Lists of experts name layers that the rank has and that have experts, in order. */
static sh_status check_lists(const sh_config *c, const sh_plan_shape *s, const Shoal__Plan *p) {
    for (int i = 0; i < (int)p->n_rank; i++) {
        const Shoal__PlanRank *r = p->rank[i];
        int before = -1;
        if (s->ep == 1 && r->n_experts)
            SH_FAIL(SH_EINPUT, "plan: rank %d: experts are named, but ep is 1: allowed are none", i);
        for (size_t k = 0; k < r->n_experts; k++) {
            int layer = r->experts[k]->layer;
            if (layer < r->first || layer >= r->last || layer <= before || !c->layer[layer].moe)
                SH_FAIL(
                    SH_EINPUT,
                    "plan: rank %d: experts of layer %d: allowed are its layers %d to %d as far as they have experts, "
                    "ascending",
                    i, layer, r->first, r->last - 1);
            before = layer;
        }
    }
    return SH_OK;
}

bool sh_plan_holds(const Shoal__Plan *p, int rank, int layer, int expert) {
    const Shoal__PlanRank *r = p->rank[rank];
    if (p->ep <= 1) return true;
    for (size_t i = 0; i < r->n_experts; i++)
        for (size_t j = 0; r->experts[i]->layer == layer && j < r->experts[i]->n_expert; j++)
            if (r->experts[i]->expert[j] == expert) return true;
    return false;
}

static sh_status check_experts(const sh_config *c, const sh_plan_shape *s, const Shoal__Plan *p) {
    SH_TRY(check_lists(c, s, p));
    for (int stage = 0; s->ep > 1 && stage < s->pp; stage++)
        for (int layer = p->rank[stage * s->width]->first; layer < p->rank[stage * s->width]->last; layer++) {
            bool held[SH_MAX_EXPERTS] = {0};
            if (!c->layer[layer].moe) continue;
            for (int m = 0; m < s->width; m++)
                SH_TRY(check_rank_experts(c, stage * s->width + m, p->rank[stage * s->width + m], layer, held));
            for (int e = 0; e < c->experts; e++)
                if (!held[e]) SH_FAIL(SH_EINPUT, "plan: layer %d: expert %d is on no rank", layer, e);
        }
    return SH_OK;
}

/* Ranks that make K/V: layers 0 to the last that has K/V of its own, in order. */
static sh_status check_prefill_layers(const sh_config *c, const sh_plan_shape *s, const Shoal__Plan *p) {
    int want = 0;
    for (int i = s->decode; i < s->decode + s->prefill; i++) {
        const Shoal__PlanRank *r = p->rank[i];
        if (r->first != want || r->last <= want || r->last > c->first_shared)
            SH_FAIL(
                SH_EINPUT,
                "plan: rank %d has layers %d to %d: it makes the K/V of prompts and must begin at layer %d, hold at "
                "least one and none behind layer %d",
                i, r->first, r->last - 1, want, c->first_shared - 1);
        want = r->last;
    }
    if (s->prefill > 0 && want != c->first_shared)
        SH_FAIL(SH_EINPUT, "plan: nobody makes the K/V of prompts for layers %d to %d", want, c->first_shared - 1);
    return SH_OK;
}

static sh_status check_layers(const sh_config *c, const sh_plan_shape *s, const Shoal__Plan *p) {
    for (int i = 0; i < s->decode; i++) {
        const Shoal__PlanRank *r = p->rank[i];
        int want = i >= s->width ? p->rank[i - s->width]->last : 0;
        if (r->first != want || r->last <= want || r->last > c->n_layers)
            SH_FAIL(SH_EINPUT, "plan: rank %d has layers %d to %d: it must begin at layer %d and hold at least one", i,
                    r->first, r->last - 1, want);
        if (r->last != p->rank[i / s->width * s->width]->last)
            SH_FAIL(SH_EINPUT, "plan: rank %d has layers %d to %d: the members of a stage have the same layers", i,
                    r->first, r->last - 1);
    }
    if (p->rank[s->decode - 1]->last != c->n_layers)
        SH_FAIL(SH_EINPUT, "plan: layers %d to %d are on no rank", p->rank[s->decode - 1]->last, c->n_layers - 1);
    return check_prefill_layers(c, s, p);
}

sh_status sh_plan_check(const sh_config *c, const Shoal__Plan *p) {
    sh_mode mode;
    sh_kv_type kv;
    SH_TRY(sh_plan_check_division(p->ep, p->tp, p->cp));
    SH_TRY(in_range("--prefill", p->has_prefill ? p->prefill : 0, 0, SH_MAX_RANKS));
    sh_plan_shape s = sh_plan_shape_of(p);
    SH_TRY(check_shape(c, &s, (int)p->n_rank));
    if ((int)p->n_rank != s.decode + s.prefill)
        SH_FAIL(SH_EINPUT, "plan: %zu ranks: not a multiple of the %d ranks of a stage", p->n_rank, s.width);
    SH_TRY(check_layers(c, &s, p));
    SH_TRY(check_experts(c, &s, p));
    SH_TRY(sh_mode_parse(p->mode, &mode));
    SH_TRY(sh_kv_type_parse(p->kv, &kv));
    SH_TRY(in_range("plan: replicas", p->has_replicas ? p->replicas : 1, 1, SH_MAX_RANKS));
    SH_TRY(in_range("--threads", p->threads, 0, 4096));
    SH_TRY(in_range("--max-seqs", p->max_seqs, 1, SH_MAX_SEQS));
    SH_TRY(in_range("--chunk", p->chunk, 1, SH_MAX_CHUNK));
    SH_TRY(in_range("plan: split_rows", p->split_rows, 0, SH_MAX_CHUNK + SH_MAX_SEQS));
    return in_range("--max-context", p->max_context, 1, c->max_context);
}

/* --- the message ---------------------------------------------------------------------------------------------------
 */

void sh_plan_free(Shoal__Plan **p) {
    if (*p) shoal__plan__free_unpacked(*p, NULL);
    *p = NULL;
}

sh_status sh_plan_copy(const Shoal__Plan *p, Shoal__Plan **out) {
    size_t n = shoal__plan__get_packed_size(p);
    uint8_t *bytes = malloc(n + 1);
    Shoal__Plan *x = bytes ? shoal__plan__unpack(NULL, shoal__plan__pack(p, bytes), bytes) : NULL;
    free(bytes);
    if (!x) SH_FAIL(SH_EMEMORY, "plan: no memory for a copy");
    *out = x;
    return SH_OK;
}

/* Everything by malloc, so that protobuf's own free fits. */
static sh_status allocate(int ranks, const char *mode, const char *kv, Shoal__Plan **out) {
    Shoal__Plan *p = calloc(1, sizeof *p);
    if (!p) SH_FAIL(SH_EMEMORY, "plan: no memory");
    shoal__plan__init(p);
    p->mode = strdup(mode);
    p->kv = strdup(kv);
    p->rank = calloc((size_t)ranks, sizeof(Shoal__PlanRank *));
    for (int i = 0; p->rank && i < ranks; i++) {
        p->rank[i] = calloc(1, sizeof *p->rank[i]);
        if (!p->rank[i]) break;
        shoal__plan_rank__init(p->rank[i]);
        p->n_rank++;
    }
    if (!p->mode || !p->kv || p->n_rank != (size_t)ranks) {
        sh_plan_free(&p);
        SH_FAIL(SH_EMEMORY, "plan: no memory for %d ranks", ranks);
    }
    *out = p;
    return SH_OK;
}

sh_plan_shape sh_plan_shape_of(const Shoal__Plan *p) {
    sh_plan_shape s = {.ep = p->ep, .tp = p->tp, .cp = p->cp};
    s.width = s.ep * s.tp * s.cp;
    s.prefill = p->has_prefill ? p->prefill : 0;
    s.pp = ((int)p->n_rank - s.prefill) / s.width;
    s.decode = s.pp * s.width;
    return s;
}

void sh_plan_rank_config(const sh_config *c, const Shoal__Plan *p, int rank, sh_config *out) {
    sh_config_share(c, (sh_share){0}, out);
    if (rank >= sh_plan_shape_of(p).decode) sh_config_prefill(out);
}

sh_share sh_plan_share(const Shoal__Plan *p, int rank) {
    if (p->tp <= 1) return (sh_share){0};
    return (sh_share){.parts = p->tp, .part = rank % p->tp, .sum = p->tp_sum};
}

/* The experts of one layer that a rank holds; held [experts]. */
static sh_status add_experts(Shoal__PlanRank *r, int layer, const bool *held, int experts) {
    Shoal__PlanExperts *e = calloc(1, sizeof *e);
    Shoal__PlanExperts **list = realloc(r->experts, (r->n_experts + 1) * sizeof *list);
    if (list) r->experts = list;
    if (!e || !list) {
        free(e);
        SH_FAIL(SH_EMEMORY, "plan: no memory for the experts of layer %d", layer);
    }
    shoal__plan_experts__init(e);
    r->experts[r->n_experts++] = e;
    e->layer = layer;
    e->expert = calloc((size_t)experts + 1, sizeof *e->expert);
    if (!e->expert) SH_FAIL(SH_EMEMORY, "plan: no memory for the experts of layer %d", layer);
    for (int i = 0; i < experts; i++)
        if (held[i]) e->expert[e->n_expert++] = i;
    return SH_OK;
}

/* Who holds what of one stage: even shares of every layer's experts, in order, or by counts. held [layers of the
 * stage, members, experts]. */
static sh_status place_stage(const sh_config *c, const sh_plan_request *q, int ep, int first, int last, bool *held) {
    size_t layer = (size_t)ep * (size_t)c->experts;
    if (q->routing) return sh_placement_stage(c, q->routing, q->mode, first, last, ep, q->replicate, held);
    for (int i = 0; i < last - first; i++)
        for (int m = 0; m < ep; m++)
            for (int e = (int)((long)c->experts * m / ep); e < (int)((long)c->experts * (m + 1) / ep); e++)
                held[(size_t)i * layer + (size_t)(m * c->experts + e)] = true;
    return SH_OK;
}

static sh_status spread_stage(const sh_config *c, const sh_plan_request *q, int ep, Shoal__PlanRank **members) {
    int first = members[0]->first, last = members[0]->last;
    bool *held = calloc((size_t)(last - first) * (size_t)ep * (size_t)c->experts, sizeof *held);
    if (!held) SH_FAIL(SH_EMEMORY, "plan: no memory for placing experts");
    sh_status st = place_stage(c, q, ep, first, last, held);
    for (int layer = first; layer < last; layer++)
        for (int m = 0; st == SH_OK && c->layer[layer].moe && m < ep; m++)
            st = add_experts(members[m], layer, held + (size_t)((layer - first) * ep + m) * (size_t)c->experts,
                             c->experts);
    free(held);
    return st;
}

static sh_status spread_experts(const sh_config *c, const sh_plan_request *q, const sh_plan_shape *s, Shoal__Plan *p) {
    for (int stage = 0; s->ep > 1 && stage < s->pp; stage++)
        SH_TRY(spread_stage(c, q, s->ep, p->rank + stage * s->width));
    return SH_OK;
}

/* The ranks that make K/V: cut as given, else balanced. */
static sh_status cut_prefill(const sh_config *c, const sh_plan_request *r, const sh_plan_shape *s, Shoal__Plan *p) {
    int cut[SH_MAX_LAYERS], count = 0;
    const char *given = r->prefill_cuts && *r->prefill_cuts ? r->prefill_cuts : NULL;
    if (!given && s->prefill == 0) return SH_OK;
    sh_config made = *c; /* of the layers that there are */
    sh_config_prefill(&made);
    if (given) SH_TRY(read_cuts("--prefill-cuts", given, made.kv_end, "K/V of their own have", cut, &count));
    if (given && count + 1 != s->prefill)
        SH_FAIL(SH_EINPUT, "--prefill-cuts %s: %d ranks that read prompts, but there are %d: give --prefill %d", given,
                count + 1, s->prefill, count + 1);
    if (!given)
        SH_TRY(r->prefill_cost ? sh_plan_balance_by(r->prefill_cost, made.kv_end, s->prefill, cut)
                               : sh_plan_balance(&made, s->prefill, cut));
    for (int i = 0; i < s->prefill; i++) {
        p->rank[s->decode + i]->first = i ? cut[i - 1] : 0;
        p->rank[s->decode + i]->last = i + 1 < s->prefill ? cut[i] : made.kv_end;
    }
    return SH_OK;
}

sh_status sh_plan_make(const sh_config *c, const sh_plan_request *r, Shoal__Plan **out) {
    int cut[SH_MAX_LAYERS];
    sh_plan_shape shape = {0};
    Shoal__Plan *p = NULL;
    SH_TRY(choose_cuts(c, r, cut, &shape));
    int ranks = shape.decode;
    SH_TRY(check_shape(c, &shape, ranks + shape.prefill));
    if ((r->routing || r->replicate) && shape.ep == 1)
        SH_FAIL(SH_EINPUT, "%s: places experts on the ranks of a stage: give --ep too",
                r->routing ? "--routing" : "--replicate");
    if (r->replicate && !r->routing)
        SH_FAIL(SH_EINPUT, "--replicate: which experts are hot is not known: give --routing too");
    SH_TRY(allocate(ranks + shape.prefill, sh_mode_name(r->mode), sh_kv_type_name(r->kv), &p));
    for (int i = 0; i < ranks; i++) {
        int stage = i / shape.width;
        p->rank[i]->first = stage ? cut[stage - 1] : 0;
        p->rank[i]->last = stage + 1 < shape.pp ? cut[stage] : c->n_layers;
    }
    p->has_ep = p->has_tp = p->has_cp = 1;
    p->ep = shape.ep;
    p->tp = shape.tp;
    p->cp = shape.cp;
    p->has_tp_sum = p->tp_sum = r->tp_sum && shape.tp > 1;
    p->has_no_prefix_sharing = p->no_prefix_sharing = r->no_prefix_sharing;
    p->has_share_weights = p->share_weights = r->share_weights;
    p->threads = r->threads;
    p->max_seqs = r->max_seqs ? r->max_seqs : ranks < 8 ? 32 * ranks : 256;
    p->chunk = r->chunk ? r->chunk : DEFAULT_CHUNK;
    p->max_context = r->max_context ? r->max_context : sh_config_usual_context(c);
    p->kv_memory = r->kv_memory;
    p->has_prefill = shape.prefill > 0;
    p->prefill = shape.prefill;
    sh_status st = cut_prefill(c, r, &shape, p);
    if (st == SH_OK) st = spread_experts(c, r, &shape, p);
    if (st == SH_OK) st = sh_plan_check(c, p);
    if (st != SH_OK) {
        sh_plan_free(&p);
        return st;
    }
    *out = p;
    return SH_OK;
}

void sh_plan_cuts(const Shoal__Plan *p, bool prompts, char text[SH_PLAN_CUTS]) {
    sh_plan_shape s = sh_plan_shape_of(p);
    int from = prompts ? s.decode : 0, step = prompts ? 1 : s.width, to = prompts ? s.decode + s.prefill : s.decode;
    size_t n = 0;
    text[0] = 0;
    for (int i = from + step; i < to && n < SH_PLAN_CUTS; i += step)
        n += (size_t)snprintf(text + n, SH_PLAN_CUTS - n, "%s%d", n ? "," : "", p->rank[i]->first);
}

static sh_status print_layers(const Shoal__PlanRank *r, bool first, sh_buf *out) {
    SH_TRY(sh_buf_add_str(out, first ? "" : " | "));
    return r->last - r->first > 1 ? sh_buf_printf(out, "%d-%d", r->first, r->last - 1)
                                  : sh_buf_printf(out, "%d", r->first);
}

sh_status sh_plan_print(const sh_config *c, const Shoal__Plan *p, sh_buf *out) {
    sh_plan_shape s = sh_plan_shape_of(p);
    if (s.pp == 1)
        SH_TRY(sh_buf_add_str(out, "one stage"));
    else
        SH_TRY(sh_buf_printf(out, "pipeline of %d stages", s.pp));
    if (s.ep > 1) SH_TRY(sh_buf_printf(out, " × %d ranks that divide sequences and experts", s.ep));
    if (s.tp > 1)
        SH_TRY(sh_buf_printf(out, " × %d ranks that divide heads and columns%s", s.tp,
                             p->tp_sum ? " (summed: results are not invariant)" : ""));
    if (s.cp > 1) SH_TRY(sh_buf_printf(out, " × %d ranks that divide positions", s.cp));
    SH_TRY(sh_buf_add_str(out, ": layers "));
    for (int i = 0; i < s.pp; i++) {
        SH_TRY(print_layers(p->rank[i * s.width], i == 0, out));
        if (p->rank[i * s.width]->last == c->n_layers) SH_TRY(sh_buf_add_str(out, " + head"));
    }
    if (s.prefill == 0) return SH_OK;
    SH_TRY(sh_buf_printf(out, "; prompts on %d more: layers ", s.prefill));
    for (int i = 0; i < s.prefill; i++) SH_TRY(print_layers(p->rank[s.decode + i], i == 0, out));
    return SH_OK;
}
