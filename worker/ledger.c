/* Tokens by key, and the messages that carry them. See ledger.h. */
#include "worker/ledger.h"

#include <stdlib.h>
#include <string.h>

#include "common/hash.h"
#include "proto/group.pb-c.h"

#define BUCKETS 1024

typedef struct kept { /* of a token; its alternatives are top [top0, top0 + n_top) of the list */
    int32_t id;
    float logprob;
    int32_t text_len;
    uint32_t top0;
    uint8_t n_top, finish;
} kept;

typedef struct list { /* tokens or scores of one sequence, from place `first` on */
    kept *t;
    sh_top_logprob *top;
    int32_t first, n, cap, sent;
    uint32_t n_top, cap_top;
} list;

typedef struct entry {
    struct entry *next; /* in the bucket */
    uint64_t key;
    bool logprobs;
    list tokens, scores;
} entry;

struct sh_ledger {
    entry *bucket[BUCKETS];
};

sh_status sh_ledger_create(sh_ledger **out) {
    sh_ledger *l = calloc(1, sizeof *l);
    if (!l) SH_FAIL(SH_EMEMORY, "no memory for the ledger");
    *out = l;
    return SH_OK;
}

static void entry_free(entry *e) {
    free(e->tokens.t);
    free(e->tokens.top);
    free(e->scores.t);
    free(e->scores.top);
    free(e);
}

void sh_ledger_destroy(sh_ledger **l) {
    if (!*l) return;
    for (int i = 0; i < BUCKETS; i++)
        for (entry *e = (*l)->bucket[i], *next; e; e = next) {
            next = e->next;
            entry_free(e);
        }
    free(*l);
    *l = NULL;
}

static entry **find(const sh_ledger *l, uint64_t key) {
    entry **at = (entry **)&l->bucket[sh_mix64(key) % BUCKETS];
    while (*at && (*at)->key != key) at = &(*at)->next;
    return at;
}

bool sh_ledger_knows(const sh_ledger *l, uint64_t key) {
    return *find(l, key) != NULL;
}

sh_status sh_ledger_open(sh_ledger *l, uint64_t key, int32_t offset, int32_t scored, bool logprobs) {
    entry **at = find(l, key);
    if (*at) SH_FAIL(SH_ESTATE, "sequence %llu is known already", (unsigned long long)key);
    entry *e = calloc(1, sizeof *e);
    if (!e) SH_FAIL(SH_EMEMORY, "no memory for the tokens of a sequence");
    e->key = key;
    e->logprobs = logprobs;
    e->tokens.first = offset;
    e->scores.first = scored + 1;
    *at = e;
    return SH_OK;
}

static sh_status keep_top(list *to, const sh_token *t) {
    uint32_t n = to->n_top + (uint32_t)t->n_top;
    if (n > to->cap_top) {
        uint32_t cap = 2 * n;
        sh_top_logprob *p = realloc(to->top, cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for %u alternatives", cap);
        to->top = p;
        to->cap_top = cap;
    }
    if (t->n_top) memcpy(to->top + to->n_top, t->top, (size_t)t->n_top * sizeof *t->top);
    to->n_top = n;
    return SH_OK;
}

sh_status sh_ledger_add(sh_ledger *l, uint64_t key, const sh_token *t) {
    entry *e = *find(l, key);
    if (!e) return SH_OK;
    list *to = t->score ? &e->scores : &e->tokens;
    if (t->index != to->first + to->n)
        SH_FAIL(SH_ESTATE, "token %d of a sequence that has %d", t->index, to->first + to->n);
    if (to->n == to->cap) {
        int32_t cap = to->cap ? to->cap * 2 : 16;
        kept *p = realloc(to->t, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for %d tokens", cap);
        to->t = p;
        to->cap = cap;
    }
    to->t[to->n] = (kept){.id = t->id,
                          .logprob = t->logprob,
                          .text_len = t->text_len,
                          .top0 = to->n_top,
                          .n_top = (uint8_t)t->n_top,
                          .finish = t->finish};
    SH_TRY(keep_top(to, t));
    to->n++;
    return SH_OK;
}

void sh_ledger_forget(sh_ledger *l, uint64_t key) {
    entry **at = find(l, key), *e = *at;
    if (!e) return;
    *at = e->next;
    entry_free(e);
}

void sh_ledger_rewind_key(sh_ledger *l, uint64_t key) {
    entry *e = *find(l, key);
    if (e) e->tokens.sent = e->scores.sent = 0;
}

void sh_ledger_rewind(sh_ledger *l) {
    for (int i = 0; i < BUCKETS; i++)
        for (entry *e = l->bucket[i]; e; e = e->next) e->tokens.sent = e->scores.sent = 0;
}

/* ---- messages -----------------------------------------------------------------------------------------------------
 */

typedef struct part { /* one Tokens message with the arrays that it points to */
    Shoal__Tokens m;
    Shoal__TopLogprobs **tops;
} part;

static void part_free(part *p) {
    for (size_t i = 0; p->tops && i < p->m.n_top; i++) {
        if (!p->tops[i]) continue;
        free(p->tops[i]->id);
        free(p->tops[i]->logprob);
        free(p->tops[i]);
    }
    free(p->tops);
    free(p->m.id);
    free(p->m.logprob);
    free(p);
}

static sh_status fill_top(const sh_top_logprob *from, int n, Shoal__TopLogprobs **out) {
    Shoal__TopLogprobs *top = malloc(sizeof *top);
    if (!top) SH_FAIL(SH_EMEMORY, "no memory for a message");
    shoal__top_logprobs__init(top);
    *out = top;
    top->id = calloc((size_t)n + 1, sizeof *top->id);
    top->logprob = calloc((size_t)n + 1, sizeof *top->logprob);
    if (!top->id || !top->logprob) SH_FAIL(SH_EMEMORY, "no memory for a message");
    top->n_id = top->n_logprob = (size_t)n;
    for (int i = 0; i < n; i++) {
        top->id[i] = from[i].id;
        top->logprob[i] = from[i].logprob;
    }
    return SH_OK;
}

static sh_status fill_part(part *p, const list *from, int n, bool logprobs) {
    const kept *t = from->t + from->sent;
    p->m.id = calloc((size_t)n, sizeof *p->m.id);
    p->m.logprob = calloc((size_t)n, sizeof *p->m.logprob);
    p->tops = calloc((size_t)n, sizeof *p->tops);
    if (!p->m.id || !p->m.logprob || !p->tops) SH_FAIL(SH_EMEMORY, "no memory for a message");
    p->m.n_id = (size_t)n;
    p->m.n_logprob = logprobs ? (size_t)n : 0;
    bool any_top = false;
    for (int i = 0; i < n; i++) {
        p->m.id[i] = t[i].id;
        p->m.logprob[i] = t[i].logprob;
        any_top = any_top || t[i].n_top > 0;
    }
    if (logprobs && any_top) {
        p->m.n_top = (size_t)n;
        p->m.top = p->tops;
        for (int i = 0; i < n; i++) SH_TRY(fill_top(from->top + t[i].top0, t[i].n_top, &p->tops[i]));
    }
    return SH_OK;
}

static sh_status make_part(const entry *e, const list *from, bool score, int n, part **out) {
    part *p = calloc(1, sizeof *p);
    if (!p) SH_FAIL(SH_EMEMORY, "no memory for a message");
    shoal__tokens__init(&p->m);
    sh_status st = fill_part(p, from, n, e->logprobs || score);
    if (st != SH_OK) {
        part_free(p);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    const kept *last = &from->t[from->sent + n - 1];
    p->m.key = e->key;
    p->m.offset = from->first + from->sent;
    p->m.has_score = score;
    p->m.score = score;
    if (last->finish != SH_FINISH_NONE) {
        p->m.has_finish = true;
        p->m.finish = last->finish;
        p->m.has_text_len = last->text_len >= 0;
        p->m.text_len = last->text_len;
    }
    *out = p;
    return SH_OK;
}

enum { MOST_PARTS = 512 };

typedef struct packing {
    part *part[MOST_PARTS];
    int n, left;
} packing;

static sh_status take(packing *k, const entry *e, list *from, bool score) {
    int n = from->n - from->sent;
    if (n > k->left) n = k->left;
    if (n <= 0 || k->n == MOST_PARTS) return SH_OK;
    SH_TRY(make_part(e, from, score, n, &k->part[k->n]));
    k->n++;
    k->left -= n;
    from->sent += n;
    return SH_OK;
}

static sh_status collect(sh_ledger *l, packing *k) {
    for (int i = 0; i < BUCKETS && k->left > 0; i++)
        for (entry *e = l->bucket[i]; e && k->left > 0; e = e->next) {
            SH_TRY(take(k, e, &e->scores, true)); /* before the tokens: a finish comes last */
            if (e->scores.sent == e->scores.n) SH_TRY(take(k, e, &e->tokens, false));
        }
    return SH_OK;
}

sh_status sh_ledger_pack(sh_ledger *l, int max, sh_buf *out) {
    packing k = {.left = max};
    Shoal__Tokens *list_of[MOST_PARTS];
    sh_status st = collect(l, &k);
    if (st == SH_OK && k.n > 0) {
        Shoal__FromRank m = SHOAL__FROM_RANK__INIT;
        for (int i = 0; i < k.n; i++) list_of[i] = &k.part[i]->m;
        m.n_tokens = (size_t)k.n;
        m.tokens = list_of;
        st = sh_buf_reserve(out, shoal__from_rank__get_packed_size(&m));
        if (st == SH_OK) out->len += shoal__from_rank__pack(&m, out->data + out->len);
    }
    for (int i = 0; i < k.n; i++) part_free(k.part[i]);
    return st;
}
