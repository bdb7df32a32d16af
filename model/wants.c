/* A sweep over each source: between the ends of wants the same members need all panels. See wants.h. */
#include "model/wants.h"

#include <stdlib.h>
#include <string.h>

_Static_assert(sizeof(sh_source) == 40, "sources are compared as bytes");

typedef struct entry {
    const sh_want *w;
    int32_t member, at; /* at: place in the member's list */
} entry;

/* Panels that the same members need. */
typedef struct run {
    int32_t lo, hi;
    int32_t first, members; /* who: in sweep.list, ascending */
} run;

typedef struct sweep {
    entry *entry, *active; /* of all members, by source; those that go on at the panel at hand */
    int n, n_active;
    run *run;
    int n_runs, run_cap;
    entry *list;
    int n_list, list_cap;
    uint64_t *load; /* [members]: bytes to read */
} sweep;

static int compare_sources(const sh_want *a, const sh_want *b) {
    if (a->source.layer != b->source.layer) return a->source.layer < b->source.layer ? -1 : 1;
    return memcmp(&a->source, &b->source, sizeof a->source);
}

static int by_place(const void *pa, const void *pb) {
    const entry *a = pa, *b = pb;
    int d = compare_sources(a->w, b->w);
    if (d) return d;
    if (a->w->lo != b->w->lo) return a->w->lo < b->w->lo ? -1 : 1;
    return (a->member > b->member) - (a->member < b->member);
}

static int by_member(const void *pa, const void *pb) {
    const entry *a = pa, *b = pb;
    return (a->member > b->member) - (a->member < b->member);
}

/* Room for `more` elements behind the first n. */
static sh_status grow(void **p, int n, int more, int *cap, size_t size) {
    if (n + more <= *cap) return SH_OK;
    int want = 2 * *cap > n + more ? 2 * *cap : n + more + 64;
    void *q = realloc(*p, (size_t)want * size);
    if (!q) SH_FAIL(SH_EMEMORY, "no memory for the list of what members need");
    *p = q;
    *cap = want;
    return SH_OK;
}

static sh_status collect(sweep *s, const sh_want *all, const int32_t *count, int members) {
    int n = 0;
    for (int m = 0; m < members; m++) n += count[m];
    s->entry = calloc((size_t)n + 1, sizeof *s->entry);
    s->active = calloc((size_t)n + 1, sizeof *s->active);
    /* unsigned: under the thread sanitizer gcc 12 warns of a negative count */
    s->load = calloc((size_t)(unsigned)members, sizeof *s->load);
    if (!s->entry || !s->active || !s->load) SH_FAIL(SH_EMEMORY, "no memory for the list of what members need");
    for (int m = 0; m < members; m++)
        for (int i = 0; i < count[m]; i++) s->entry[s->n++] = (entry){all++, m, i};
    qsort(s->entry, (size_t)s->n, sizeof *s->entry, by_place);
    return SH_OK;
}

/* Panels [lo, hi), which all that are active need. */
static sh_status add_run(sweep *s, int lo, int hi) {
    void *runs = s->run, *list = s->list;
    sh_status st = grow(&runs, s->n_runs, 1, &s->run_cap, sizeof *s->run);
    if (st == SH_OK) st = grow(&list, s->n_list, s->n_active, &s->list_cap, sizeof *s->list);
    s->run = runs;
    s->list = list;
    if (st != SH_OK) return sh_error_pass(st, __FILE__, __LINE__);
    qsort(s->active, (size_t)s->n_active, sizeof *s->active, by_member);
    s->run[s->n_runs++] = (run){lo, hi, s->n_list, s->n_active};
    for (int i = 0; i < s->n_active; i++) {
        if (i > 0 && s->active[i].member == s->active[i - 1].member)
            SH_FAIL(SH_ESTATE, "member %d needs panels %d to %d of tensor %d twice", s->active[i].member, lo, hi - 1,
                    s->active[i].w->source.tensor);
        s->list[s->n_list++] = s->active[i];
    }
    return SH_OK;
}

/* The runs between panels *from and `to`. */
static sh_status pass(sweep *s, int32_t *from, int32_t to) {
    while (s->n_active > 0 && *from < to) {
        int32_t end = to;
        int left = 0;
        for (int i = 0; i < s->n_active; i++)
            if (s->active[i].w->hi < end) end = s->active[i].w->hi;
        SH_TRY(add_run(s, *from, end));
        for (int i = 0; i < s->n_active; i++)
            if (s->active[i].w->hi > end) s->active[left++] = s->active[i];
        s->n_active = left;
        *from = end;
    }
    *from = to;
    return SH_OK;
}

static sh_status find_runs(sweep *s) {
    int32_t from = 0;
    for (int i = 0; i < s->n; i++) {
        const entry *e = &s->entry[i];
        if (i > 0 && compare_sources(e[-1].w, e->w) != 0) SH_TRY(pass(s, &from, INT32_MAX));
        if (i == 0 || compare_sources(e[-1].w, e->w) != 0) from = e->w->lo;
        SH_TRY(pass(s, &from, e->w->lo));
        s->active[s->n_active++] = *e;
    }
    return pass(s, &from, INT32_MAX);
}

/* Panels [lo, hi) of a run are read by `reader`: a piece, if this member needs them. */
static sh_status add_piece(const sweep *s, const run *r, int lo, int hi, int reader, int member, sh_pieces *out) {
    const entry *of = s->list + r->first, *mine = NULL;
    for (int i = 0; i < r->members; i++)
        if (of[i].member == member) mine = &of[i];
    if (!mine) return SH_OK;
    void *pieces = out->piece, *list = out->list;
    sh_status st = grow(&pieces, out->n, 1, &out->cap, sizeof *out->piece);
    if (st == SH_OK) st = grow(&list, out->n_list, r->members, &out->list_cap, sizeof *out->list);
    out->piece = pieces;
    out->list = list;
    if (st != SH_OK) return sh_error_pass(st, __FILE__, __LINE__);
    out->piece[out->n++] = (sh_piece){.want = mine->at,
                                      .first = lo - mine->w->lo,
                                      .n = hi - lo,
                                      .reader = reader,
                                      .group = out->n_list,
                                      .members = r->members};
    for (int i = 0; i < r->members; i++) out->list[out->n_list++] = of[i].member;
    return SH_OK;
}

static sh_status divide_run(sweep *s, const run *r, int member, uint64_t most, sh_pieces *out) {
    const entry *of = s->list + r->first;
    const sh_want *w = of->w;
    if (r->members == 1) return add_piece(s, r, r->lo, r->hi, of->member, member, out);
    int32_t step = most > w->packed_bytes ? (int32_t)(most / w->packed_bytes) : 1;
    for (int32_t lo = r->lo, hi; lo < r->hi; lo = hi) {
        hi = r->hi - lo < step ? r->hi : lo + step;
        int reader = of->member;
        for (int i = 1; i < r->members; i++)
            if (s->load[of[i].member] < s->load[reader]) reader = of[i].member;
        s->load[reader] += (uint64_t)(hi - lo) * w->bytes;
        SH_TRY(add_piece(s, r, lo, hi, reader, member, out));
    }
    return SH_OK;
}

static sh_status divide(sweep *s, int member, uint64_t most, sh_pieces *out) {
    SH_TRY(find_runs(s));
    for (int i = 0; i < s->n_runs; i++) {
        const run *r = &s->run[i];
        const entry *e = &s->list[r->first];
        if (r->members == 1) s->load[e->member] += (uint64_t)(r->hi - r->lo) * e->w->bytes;
    }
    for (int i = 0; i < s->n_runs; i++) SH_TRY(divide_run(s, &s->run[i], member, most, out));
    out->bytes = s->load[member];
    return SH_OK;
}

sh_status sh_wants_divide(const sh_want *all, const int32_t *count, int members, int member, uint64_t most,
                          sh_pieces *out) {
    sweep s = {0};
    sh_pieces p = {0};
    sh_status st = collect(&s, all, count, members);
    if (st == SH_OK) st = divide(&s, member, most, &p);
    free(s.entry);
    free(s.active);
    free(s.run);
    free(s.list);
    free(s.load);
    if (st != SH_OK) {
        sh_pieces_release(&p);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = p;
    return SH_OK;
}

void sh_pieces_release(sh_pieces *p) {
    free(p->piece);
    free(p->list);
    *p = (sh_pieces){0};
}
