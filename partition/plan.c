/* Cuts: chosen, read, checked and printed. See plan.h. KV budgets are budget.c's. */
#include "partition/plan.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_CHUNK 512

/* --- balance -------------------------------------------------------------------------------------------------------
 */

int64_t sh_plan_cost(const sh_config *c, int first, int last) {
    int64_t n = last == c->n_layers ? (int64_t)c->vocab * c->hidden : 0;
    for (int i = first; i < last; i++) n += sh_layer_params(c, i);
    return n;
}

/* Best way to cut the first i layers into r stages: the dearest stage, and the sum of squares to choose among equals.
 */
typedef struct best {
    int64_t worst;
    double squares;
    int from; /* where the last of the r stages begins */
} best;

static best join(const best *before, const int64_t *sum, int from, int to) {
    int64_t cost = sum[to] - sum[from];
    best b = {.worst = cost > before->worst ? cost : before->worst, .from = from};
    b.squares = before->squares + (double)cost * (double)cost;
    return b;
}

static bool better(const best *a, const best *b) {
    return b->from < 0 || a->worst < b->worst || (a->worst == b->worst && a->squares < b->squares);
}

sh_status sh_plan_balance(const sh_config *c, int ranks, int *cut) {
    int n = c->n_layers;
    if (ranks < 1 || ranks > n) SH_FAIL(SH_EINPUT, "%d ranks: the model has %d layers: at most %d ranks", ranks, n, n);
    int64_t sum[SH_MAX_LAYERS + 1] = {0}; /* cost of the layers below i; the last one's includes the head */
    for (int i = 0; i < n; i++) sum[i + 1] = sum[i] + sh_plan_cost(c, i, i + 1);
    best *t = calloc((size_t)(ranks + 1) * (size_t)(n + 1), sizeof *t);
    if (!t) SH_FAIL(SH_EMEMORY, "plan: no memory for balancing %d layers", n);
#define BEST(r, i) t[(size_t)(r) * (size_t)(n + 1) + (size_t)(i)]
    for (int r = 1; r <= ranks; r++)
        for (int i = r; i <= n; i++) {
            best b = {.from = -1};
            for (int from = r - 1; from < i; from++) {
                if (r == 1 && from > 0) break;
                best x = join(&BEST(r - 1, from), sum, from, i);
                if (better(&x, &b)) b = x;
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

static sh_status read_cuts(const sh_config *c, const char *text, int *cut, int *count) {
    int n = 0, last = c->n_layers - 1;
    if (last == 0) SH_FAIL(SH_EINPUT, "--cuts %s: the model has one layer: it cannot be cut", text);
    for (const char *s = text;;) {
        char *end;
        errno = 0;
        long v = strtol(s, &end, 10);
        if (end == s || *s < '0' || *s > '9' || (*end && *end != ','))
            SH_FAIL(SH_EINPUT,
                    "--cuts %s: not a list of layers: allowed are numbers from 1 to %d, ascending, with commas between",
                    text, last);
        if (errno || v < 1 || v > last)
            SH_FAIL(SH_EINPUT, "--cuts %s: %.*s is not a cut: the model has %d layers: allowed are 1 to %d", text,
                    (int)(end - s), s, c->n_layers, last);
        if (n && v <= cut[n - 1])
            SH_FAIL(SH_EINPUT, "--cuts %s: not ascending: %ld follows %d: each is the first layer of the next stage",
                    text, v, cut[n - 1]);
        cut[n++] = (int)v; /* ascending below n_layers: never more than fit */
        if (!*end) break;
        s = end + 1;
    }
    *count = n;
    return SH_OK;
}

static sh_status choose_cuts(const sh_config *c, const sh_plan_request *r, int cut[SH_MAX_LAYERS], int *ranks) {
    int n = r->ranks ? r->ranks : 1;
    if (r->cuts && *r->cuts) {
        int count = 0;
        SH_TRY(read_cuts(c, r->cuts, cut, &count));
        if (r->ranks && r->ranks != count + 1)
            SH_FAIL(SH_EINPUT, "--cuts %s: %d stages, but there are %d ranks: give %d cuts, or -n %d", r->cuts,
                    count + 1, r->ranks, r->ranks - 1, count + 1);
        n = count + 1;
    } else if (n < 0) {
        SH_FAIL(SH_EINPUT, "%d ranks: at least 1", n);
    } else {
        SH_TRY(sh_plan_balance(c, n, cut));
    }
    *ranks = n;
    return SH_OK;
}

/* --- the message ---------------------------------------------------------------------------------------------------
 */

void sh_plan_free(Shoal__Plan **p) {
    if (*p) shoal__plan__free_unpacked(*p, NULL);
    *p = NULL;
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

sh_status sh_plan_make(const sh_config *c, const sh_plan_request *r, Shoal__Plan **out) {
    int cut[SH_MAX_LAYERS], ranks = 0;
    Shoal__Plan *p = NULL;
    SH_TRY(choose_cuts(c, r, cut, &ranks));
    SH_TRY(allocate(ranks, sh_mode_name(r->mode), sh_kv_type_name(r->kv), &p));
    for (int i = 0; i < ranks; i++) {
        p->rank[i]->first = i ? cut[i - 1] : 0;
        p->rank[i]->last = i + 1 < ranks ? cut[i] : c->n_layers;
    }
    p->threads = r->threads;
    p->max_seqs = r->max_seqs ? r->max_seqs : ranks < 8 ? 32 * ranks : 256;
    p->chunk = r->chunk ? r->chunk : DEFAULT_CHUNK;
    p->max_context = r->max_context ? r->max_context : sh_config_usual_context(c);
    p->kv_memory = r->kv_memory;
    sh_status st = sh_plan_check(c, p);
    if (st != SH_OK) {
        sh_plan_free(&p);
        return st;
    }
    *out = p;
    return SH_OK;
}

static sh_status in_range(const char *name, int64_t v, int64_t min, int64_t max) {
    if (v >= min && v <= max) return SH_OK;
    SH_FAIL(SH_EINPUT, "%s: %lld is out of range: allowed are %lld to %lld", name, (long long)v, (long long)min,
            (long long)max);
}

sh_status sh_plan_check(const sh_config *c, const Shoal__Plan *p) {
    sh_mode mode;
    sh_kv_type kv;
    if (p->n_rank < 1 || p->n_rank > (size_t)c->n_layers)
        SH_FAIL(SH_EINPUT, "%zu ranks: the model has %d layers: allowed are 1 to %d ranks", p->n_rank, c->n_layers,
                c->n_layers);
    for (size_t i = 0; i < p->n_rank; i++) {
        int want = i ? p->rank[i - 1]->last : 0;
        if (p->rank[i]->first != want || p->rank[i]->last <= want || p->rank[i]->last > c->n_layers)
            SH_FAIL(SH_EINPUT, "plan: rank %zu has layers %d to %d: it must begin at layer %d and hold at least one", i,
                    p->rank[i]->first, p->rank[i]->last - 1, want);
    }
    if (p->rank[p->n_rank - 1]->last != c->n_layers)
        SH_FAIL(SH_EINPUT, "plan: layers %d to %d are on no rank", p->rank[p->n_rank - 1]->last, c->n_layers - 1);
    SH_TRY(sh_mode_parse(p->mode, &mode));
    SH_TRY(sh_kv_type_parse(p->kv, &kv));
    SH_TRY(in_range("--threads", p->threads, 0, 4096));
    SH_TRY(in_range("--max-seqs", p->max_seqs, 1, SH_MAX_SEQS));
    SH_TRY(in_range("--chunk", p->chunk, 1, SH_MAX_CHUNK));
    return in_range("--max-context", p->max_context, 1, c->max_context);
}

sh_status sh_plan_print(const sh_config *c, const Shoal__Plan *p, sh_buf *out) {
    if (p->n_rank == 1)
        SH_TRY(sh_buf_add_str(out, "one stage: layers "));
    else
        SH_TRY(sh_buf_printf(out, "pipeline of %zu stages: layers ", p->n_rank));
    for (size_t i = 0; i < p->n_rank; i++) {
        int a = p->rank[i]->first, b = p->rank[i]->last;
        SH_TRY(sh_buf_add_str(out, i ? " | " : ""));
        SH_TRY(b - a > 1 ? sh_buf_printf(out, "%d-%d", a, b - 1) : sh_buf_printf(out, "%d", a));
        if (b == c->n_layers) SH_TRY(sh_buf_add_str(out, " + head"));
    }
    return SH_OK;
}
