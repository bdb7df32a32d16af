/* The schedule of a prefill pipeline. See prefill.h. */
#include "worker/prefill.h"

#include <stdlib.h>
#include <string.h>

/* A sequence whose rows arrive damaged this often in a row will not get better: the link or a rank is broken. */
enum { MOST_REPEATS = 16 };

typedef struct flight {
    uint64_t step;
    int n, open; /* spans; confirmations not yet here */
    bool damaged;
    sh_seq **seq; /* [max_seqs] in span order */
    int32_t *end; /* [max_seqs] behind the last row of the span */
} flight;

struct sh_prefill {
    sh_leader_options o;
    sh_pages pool[SH_KV_KINDS];
    flight *flights; /* ring [depth] */
    int depth, oldest, n_flights;
    uint64_t next_step, redone;
};

static int32_t min32(int32_t a, int32_t b) {
    return a < b ? a : b;
}

static int32_t max32(int32_t a, int32_t b) {
    return a > b ? a : b;
}

static int32_t pages_for(int32_t tokens) {
    return (tokens + SH_PAGE_TOKENS - 1) / SH_PAGE_TOKENS;
}

/* ---- life ---------------------------------------------------------------------------------------------------------
 */

sh_status sh_prefill_create(const sh_leader_options *o, sh_prefill **out) {
    sh_prefill *p = calloc(1, sizeof *p);
    if (!p) SH_FAIL(SH_EMEMORY, "no memory for the schedule of prompts");
    p->o = *o;
    p->depth = sh_prefill_in_flight(o);
    p->next_step = 1;
    size_t seqs = (size_t)o->max_seqs;
    sh_status st = SH_OK;
    for (int k = 0; st == SH_OK && k < SH_KV_KINDS; k++) st = sh_pages_create(o->prefill_pages[k], &p->pool[k]);
    p->flights = calloc((size_t)p->depth, sizeof *p->flights);
    bool ok = p->flights != NULL;
    for (int i = 0; ok && i < p->depth; i++) {
        p->flights[i].seq = calloc(seqs, sizeof(sh_seq *));
        p->flights[i].end = calloc(seqs, sizeof(int32_t));
        ok = p->flights[i].seq && p->flights[i].end;
    }
    if (st == SH_OK && !ok)
        st = sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "no memory for the schedule of %d prompts", o->max_seqs);
    if (st != SH_OK) {
        sh_prefill_destroy(&p);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = p;
    return SH_OK;
}

void sh_prefill_destroy(sh_prefill **pp) {
    sh_prefill *p = *pp;
    if (!p) return;
    for (int i = 0; p->flights && i < p->depth; i++) {
        free(p->flights[i].seq);
        free(p->flights[i].end);
    }
    for (int k = 0; k < SH_KV_KINDS; k++) sh_pages_release(&p->pool[k]);
    free(p->flights);
    free(p);
    *pp = NULL;
}

/* ---- pages --------------------------------------------------------------------------------------------------------
 */

int32_t sh_prefill_peak(const sh_leader_options *o, sh_kv_kind kind, int32_t n) {
    if (!o->kind[kind]) return 0;
    int32_t all = pages_for(n);
    if (kind == SH_KV_GLOBAL) return all;
    /* From the window of the first row that is not confirmed to the last row out. */
    int64_t rows = (int64_t)o->window + (int64_t)o->chunk * sh_prefill_in_flight(o);
    return rows < n ? min32(all, ((int32_t)rows - 2) / SH_PAGE_TOKENS + 2) : all;
}

sh_status sh_prefill_prepare(const sh_prefill *p, sh_seq *s) {
    for (int k = 0; k < SH_KV_KINDS; k++) {
        s->made[k].cap = min32(sh_prefill_peak(&p->o, (sh_kv_kind)k, s->cap), p->pool[k].total);
        s->made[k].page = calloc((size_t)s->made[k].cap + 1, sizeof(int32_t));
        if (!s->made[k].page) SH_FAIL(SH_EMEMORY, "no memory for the page table of a sequence of %d tokens", s->cap);
    }
    return SH_OK;
}

bool sh_prefill_wants(const sh_prefill *p, const sh_seq *s) {
    if (sh_seq_pending(s) < 2) return false;
    if (s->sampling.score_prompt && s->scored < s->n_prompt - 1) return false; /* logits are a decode stage's */
    for (int k = 0; k < SH_KV_KINDS; k++)
        if (sh_prefill_peak(&p->o, (sh_kv_kind)k, s->n_tokens - 1) > p->pool[k].total) return false;
    return true;
}

bool sh_prefill_admit(sh_prefill *p, sh_seq *s) {
    int32_t need[SH_KV_KINDS];
    for (int k = 0; k < SH_KV_KINDS; k++) {
        need[k] = sh_prefill_peak(&p->o, (sh_kv_kind)k, s->n_tokens - 1);
        if (need[k] > sh_pages_open(&p->pool[k])) return false;
    }
    for (int k = 0; k < SH_KV_KINDS; k++)
        if (sh_pages_promise(&p->pool[k], need[k])) s->made[k].promise = need[k];
    return true;
}

static sh_status give_front(sh_prefill *p, sh_seq *s, int k, int32_t n) {
    sh_seq_pages *t = &s->made[k];
    for (int32_t i = 0; i < n; i++) SH_TRY(sh_pages_give(&p->pool[k], t->page[i]));
    memmove(t->page, t->page + n, (size_t)(t->n - n) * sizeof *t->page);
    t->first += n;
    t->n -= n;
    return SH_OK;
}

sh_status sh_prefill_release(sh_prefill *p, sh_seq *s) {
    for (int k = 0; k < SH_KV_KINDS; k++) {
        sh_seq_pages *t = &s->made[k];
        sh_pages_unpromise(&p->pool[k], t->promise);
        t->promise = 0;
        SH_TRY(give_front(p, s, k, t->n));
        t->first = 0;
    }
    return SH_OK;
}

/* Frees pages that no row sees which may have to be made (again); the promise keeps them for this sequence. */
static sh_status pass_window(sh_prefill *p, sh_seq *s) {
    const int k = SH_KV_SLIDING;
    sh_seq_pages *t = &s->made[k];
    int32_t seen = max32(0, s->safe - p->o.window + 1) / SH_PAGE_TOKENS, n = min32(seen - t->first, t->n);
    if (!p->o.kind[k] || n <= 0) return SH_OK;
    SH_TRY(give_front(p, s, k, n));
    if (sh_pages_promise(&p->pool[k], n)) t->promise += n;
    return SH_OK;
}

static sh_status cover_rows(sh_prefill *p, sh_seq *s, int32_t end) {
    for (int k = 0; k < SH_KV_KINDS; k++) {
        sh_seq_pages *t = &s->made[k];
        while (p->o.kind[k] && (t->first + t->n) * SH_PAGE_TOKENS < end) {
            int32_t page = t->promise > 0 && t->n < t->cap ? sh_pages_take(&p->pool[k], true) : -1;
            if (page < 0)
                SH_FAIL(SH_ESTATE, "leader: no prefill page for position %d of %d tokens", end - 1, s->n_tokens);
            t->promise--;
            t->page[t->n++] = page;
        }
    }
    return SH_OK;
}

/* ---- making a micro-batch -----------------------------------------------------------------------------------------
 */

static sh_status begin(const sh_prefill *p, sh_batch *b) {
    sh_arena *a = &b->arena;
    size_t seqs = (size_t)p->o.max_seqs;
    sh_arena_reset(a);
    *b = (sh_batch){.step = p->next_step, .arena = *a};
    b->ids = sh_arena_take(&b->arena, (size_t)p->o.chunk * sizeof *b->ids);
    b->spans = sh_arena_take(&b->arena, seqs * sizeof *b->spans);
    b->handoffs = sh_arena_take(&b->arena, seqs * sizeof *b->handoffs);
    if (!b->ids || !b->spans || !b->handoffs)
        SH_FAIL(SH_ESTATE, "leader: the batch has %zu bytes, fewer than sh_leader_descriptor_bytes", b->arena.size);
    return SH_OK;
}

/* Rows [pos, end) of a kind: those that decode can still see, and the decode pages that they go to. */
static void hand_over(const sh_prefill *p, const sh_seq *s, int k, int32_t end, sh_handoff *h) {
    int32_t from = s->pos;
    if (k == SH_KV_SLIDING) from = min32(end, max32(from, s->n_tokens - p->o.window));
    if (!p->o.kind[k]) from = end;
    h->from[k] = from;
    h->page0[k] = from / SH_PAGE_TOKENS;
    h->n_pages[k] = from < end ? pages_for(end) - h->page0[k] : 0;
    h->pages[k] = from < end ? s->kv[k].page + (h->page0[k] - s->kv[k].first) : NULL;
}

static void add_span(sh_prefill *p, sh_batch *b, flight *f, sh_seq *s, int32_t rows) {
    sh_span *at = &b->spans[b->n_spans];
    *at = (sh_span){.seq = s->id, .pos = s->pos, .rows = rows, .row0 = b->n_rows};
    for (int k = 0; k < SH_KV_KINDS; k++) {
        at->page0[k] = s->made[k].first;
        at->n_pages[k] = s->made[k].n;
        at->pages[k] = s->made[k].page;
        hand_over(p, s, k, s->pos + rows, &b->handoffs[b->n_spans]);
    }
    memcpy(b->ids + b->n_rows, s->tokens + s->pos, (size_t)rows * sizeof *b->ids);
    s->pos += rows;
    s->flights++;
    f->seq[b->n_spans] = s;
    f->end[b->n_spans] = s->pos;
    b->n_rows += rows;
    b->n_handoffs = ++b->n_spans;
}

sh_status sh_prefill_next(sh_prefill *p, sh_seq **running, int n, uint64_t after,
                          sh_status (*cover)(void *arg, sh_seq *s, int32_t end), void *arg, sh_batch *b, bool *made) {
    *made = false;
    if (p->n_flights == p->depth) return SH_OK;
    flight *f = &p->flights[(p->oldest + p->n_flights) % p->depth];
    int32_t left = p->o.chunk;
    SH_TRY(begin(p, b));
    for (int i = 0; i < n && left > 0; i++) {
        sh_seq *s = running[i];
        int32_t rows = s->handing && !s->damaged ? min32(s->n_tokens - 1 - s->pos, left) : 0;
        if (rows == 0) continue;
        SH_TRY(pass_window(p, s));
        SH_TRY(cover_rows(p, s, s->pos + rows));
        SH_TRY(cover(arg, s, s->pos + rows));
        add_span(p, b, f, s, rows);
        left -= rows;
    }
    if (b->n_spans == 0) return SH_OK;
    b->after = after;
    f->step = p->next_step++;
    f->n = b->n_spans;
    f->open = p->o.confirms;
    f->damaged = false;
    p->n_flights++;
    *made = true;
    return SH_OK;
}

/* ---- what the decode ranks say ------------------------------------------------------------------------------------
 */

/* Rows of a span are in place, or not: what follows a damaged one is made again with it. */
static sh_status land_span(sh_prefill *p, const flight *f, int i) {
    sh_seq *s = f->seq[i];
    s->flights--;
    s->damaged = s->damaged || f->damaged;
    if (!s->damaged) {
        s->safe = f->end[i];
        s->repeats = 0;
    }
    if (!s->damaged || s->flights > 0) return SH_OK;
    if (++s->repeats > MOST_REPEATS)
        SH_FAIL(SH_EPEER, "K/V rows from position %d of a sequence arrived damaged %d times in a row", s->safe,
                MOST_REPEATS + 1);
    s->damaged = false;
    s->pos = s->safe;
    p->redone++;
    return SH_OK;
}

sh_status sh_prefill_confirm(sh_prefill *p, uint64_t step, bool ok, sh_status (*landed)(void *arg, sh_seq *s),
                             void *arg) {
    flight *f = NULL;
    for (int i = 0; i < p->n_flights && !f; i++) {
        f = &p->flights[(p->oldest + i) % p->depth];
        if (f->step != step) f = NULL;
    }
    if (!f || f->open == 0)
        SH_FAIL(SH_EPEER, "rows of micro-batch %llu of prompts are confirmed: none were expected",
                (unsigned long long)step);
    f->open--;
    f->damaged = f->damaged || !ok;
    while (p->n_flights > 0 && p->flights[p->oldest].open == 0) {
        f = &p->flights[p->oldest];
        p->oldest = (p->oldest + 1) % p->depth;
        p->n_flights--;
        for (int i = 0; i < f->n; i++) {
            SH_TRY(land_span(p, f, i));
            SH_TRY(landed(arg, f->seq[i]));
        }
    }
    return SH_OK;
}

/* ---- looking on ---------------------------------------------------------------------------------------------------
 */

int sh_prefill_out(const sh_prefill *p) {
    return p->n_flights;
}

uint64_t sh_prefill_redone(const sh_prefill *p) {
    return p->redone;
}

int32_t sh_prefill_free(const sh_prefill *p, sh_kv_kind kind) {
    return p->pool[kind].free;
}

static sh_status count(const sh_pages *pool, const sh_seq *s, int k, int32_t *held, int32_t *promised) {
    *held += s->made[k].n;
    *promised += s->made[k].promise;
    for (int32_t i = 0; i < s->made[k].n; i++)
        if (pool->holders[s->made[k].page[i]] != 1)
            SH_FAIL(SH_ESTATE, "prefill page %d is held and free", s->made[k].page[i]);
    return SH_OK;
}

sh_status sh_prefill_audit(const sh_prefill *p, sh_seq *const *running, int n, const sh_seq *const *lists,
                           int n_lists) {
    for (int k = 0; k < SH_KV_KINDS; k++) {
        const sh_pages *pool = &p->pool[k];
        int32_t held = 0, promised = 0;
        for (int i = 0; i < n; i++) SH_TRY(count(pool, running[i], k, &held, &promised));
        for (int i = 0; i < n_lists; i++)
            for (const sh_seq *s = lists[i]; s; s = s->next) SH_TRY(count(pool, s, k, &held, &promised));
        if (held + pool->free != pool->total || promised != pool->promised || promised > pool->free)
            SH_FAIL(SH_ESTATE, "prefill, kind %d: %d pages held, %d free of %d; %d promised, %d on the books", k, held,
                    pool->free, pool->total, promised, pool->promised);
    }
    return SH_OK;
}
