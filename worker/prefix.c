/*
 * The tree of shared pages. See prefix.h.
 *
 * Why a page can always be had: who holds a node's page holds those of all nodes above it, so below a page that nobody
 * holds nobody holds one. Pages of a sequence are given back from its end, so in the lists of idle pages a node lies
 * before those above it: the first one of a list has nothing below it and can go by itself. What several sequences used
 * lies in a list of its own, and so does all that is above it; what falls out of that list goes to the end of the
 * first one.
 */
#include "worker/prefix.h"

#include <stdlib.h>
#include <string.h>

#include "common/hash.h"

enum { NONE = -1 };

/* Idle pages go in this order, of each kind the one that was unused for longest. */
enum {
    PLAIN,
    LIKELY, /* sliding pages before the end of a prompt: somebody may ask it again, or go on from there */
    USEFUL, /* another than its maker used it, or was seen to want it */
    LISTS
};

typedef struct link {
    int32_t before, after; /* nodes; NONE at an end */
} link;

typedef struct node {
    uint64_t serial;          /* never used again; 0: no node */
    uint64_t maker;           /* the sequence that filled it; 0: whoever uses it proves it */
    int32_t parent;           /* NONE: the page is a sequence's first */
    int32_t depth;            /* pages down to it, itself included */
    int32_t next;             /* in its bucket */
    int32_t below;            /* children */
    int32_t sliding;          /* the page of sliding layers, or NONE */
    int8_t list[SH_KV_KINDS]; /* which list each of its pages is in while idle, and where it would go */
    bool listed[SH_KV_KINDS];
    link link[SH_KV_KINDS];
    int32_t ids[SH_PAGE_TOKENS];
} node;

typedef struct list { /* idle pages; the first was unused for longest */
    int32_t first, last, n;
} list;

struct sh_prefix {
    sh_pages *pool;
    node *node;      /* [pages of the global pool] */
    int32_t *bucket; /* [n_buckets] */
    int32_t *filler; /* [pages of the sliding pool] the node that has it, or NONE */
    uint32_t n_buckets;
    list idle[SH_KV_KINDS][LISTS];
    bool slides;
    int window;
    int n_placeholders;
    int32_t placeholder[3];
    uint64_t next_serial, rows;
};

static int32_t max32(int32_t a, int32_t b) {
    return a > b ? a : b;
}

static int32_t min32(int32_t a, int32_t b) {
    return a < b ? a : b;
}

/* ---- life ---------------------------------------------------------------------------------------------------------
 */

bool sh_prefix_is_for(const sh_leader_options *o) {
    return o->share && o->members <= 1 && o->prefill == 0 && o->kind[SH_KV_GLOBAL];
}

sh_status sh_prefix_create(const sh_leader_options *o, sh_pages *pool, sh_prefix **out) {
    sh_prefix *p = calloc(1, sizeof *p);
    if (!p) SH_FAIL(SH_EMEMORY, "no memory for the tree of shared pages");
    size_t pages = (size_t)pool[SH_KV_GLOBAL].total, sliding = (size_t)pool[SH_KV_SLIDING].total;
    p->pool = pool;
    p->slides = o->kind[SH_KV_SLIDING];
    p->window = o->window;
    p->n_placeholders = o->n_placeholders;
    memcpy(p->placeholder, o->placeholder, sizeof p->placeholder);
    p->next_serial = 1;
    for (p->n_buckets = 16; p->n_buckets < pages && p->n_buckets < 1u << 30;) p->n_buckets *= 2;
    p->node = calloc(pages + 1, sizeof *p->node);
    p->bucket = malloc(p->n_buckets * sizeof *p->bucket);
    p->filler = malloc((sliding + 1) * sizeof *p->filler);
    if (!p->node || !p->bucket || !p->filler) {
        sh_prefix_destroy(&p);
        SH_FAIL(SH_EMEMORY, "no memory for the tree of %zu shared pages", pages);
    }
    for (uint32_t i = 0; i < p->n_buckets; i++) p->bucket[i] = NONE;
    for (size_t i = 0; i < sliding; i++) p->filler[i] = NONE;
    for (int k = 0; k < SH_KV_KINDS; k++)
        for (int i = 0; i < LISTS; i++) p->idle[k][i] = (list){NONE, NONE, 0};
    pool[SH_KV_SLIDING].each_pays = true; /* a prompt counts on the pages that it gives back as its window passes */
    *out = p;
    return SH_OK;
}

void sh_prefix_destroy(sh_prefix **pp) {
    sh_prefix *p = *pp;
    if (!p) return;
    free(p->node);
    free(p->bucket);
    free(p->filler);
    free(p);
    *pp = NULL;
}

uint64_t sh_prefix_rows(const sh_prefix *p) {
    return p->rows;
}

/* ---- lists of idle pages ------------------------------------------------------------------------------------------
 */

static void list_add(sh_prefix *p, int k, int32_t x) {
    node *n = &p->node[x];
    list *l = &p->idle[k][n->list[k]];
    n->link[k] = (link){l->last, NONE};
    if (l->last != NONE) p->node[l->last].link[k].after = x;
    if (l->first == NONE) l->first = x;
    l->last = x;
    l->n++;
    n->listed[k] = true;
}

static void list_remove(sh_prefix *p, int k, int32_t x) {
    node *n = &p->node[x];
    if (!n->listed[k]) return;
    list *l = &p->idle[k][n->list[k]];
    link at = n->link[k];
    if (at.before != NONE) p->node[at.before].link[k].after = at.after;
    if (at.after != NONE) p->node[at.after].link[k].before = at.before;
    if (l->first == x) l->first = at.after;
    if (l->last == x) l->last = at.before;
    l->n--;
    n->listed[k] = false;
}

/* A page has lost its last holder. No list but the first keeps more than half of the pool: the rest has to prove
 * itself again. */
static void list_enter(sh_prefix *p, int k, int32_t x) {
    int which = p->node[x].list[k];
    list_add(p, k, x);
    int32_t first = p->idle[k][which].first;
    if (which == PLAIN || p->idle[k][which].n <= p->pool[k].total / 2) return;
    list_remove(p, k, first);
    p->node[first].list[k] = PLAIN;
    if (k == SH_KV_GLOBAL) p->node[first].maker = 0; /* whoever uses it next proves it, with those below it */
    list_add(p, k, first);
}

static void promote(sh_prefix *p, int k, int32_t x, int to) {
    bool listed = p->node[x].listed[k];
    if (p->node[x].list[k] >= to) return;
    if (listed) list_remove(p, k, x);
    p->node[x].list[k] = (int8_t)to;
    if (listed) list_enter(p, k, x);
}

/* ---- the tree -----------------------------------------------------------------------------------------------------
 */

static uint32_t bucket_of(const sh_prefix *p, int32_t parent, const int32_t *ids) {
    uint64_t seed = parent == NONE ? 0 : p->node[parent].serial;
    return (uint32_t)(sh_hash64(seed, ids, SH_PAGE_TOKENS * sizeof *ids) & (p->n_buckets - 1));
}

/* The node below `parent` with these tokens: the hash only says where to look. */
static int32_t find_node(const sh_prefix *p, int32_t parent, const int32_t *ids) {
    int32_t x = p->bucket[bucket_of(p, parent, ids)];
    for (; x != NONE; x = p->node[x].next) {
        const node *n = &p->node[x];
        if (n->parent == parent && memcmp(n->ids, ids, sizeof n->ids) == 0) return x;
    }
    return NONE;
}

static void add_node(sh_prefix *p, int32_t page, int32_t parent, const int32_t *ids, uint64_t maker) {
    node *n = &p->node[page];
    int32_t *bucket = &p->bucket[bucket_of(p, parent, ids)];
    *n = (node){.serial = p->next_serial++, .maker = maker, .parent = parent, .next = *bucket, .sliding = NONE};
    n->depth = parent == NONE ? 1 : p->node[parent].depth + 1;
    memcpy(n->ids, ids, sizeof n->ids);
    *bucket = page;
    if (parent != NONE) p->node[parent].below++;
    sh_pages_keep(&p->pool[SH_KV_GLOBAL], page);
}

static void forget_sliding(sh_prefix *p, int32_t x) {
    node *n = &p->node[x];
    if (n->sliding == NONE) return;
    list_remove(p, SH_KV_SLIDING, x);
    p->filler[n->sliding] = NONE;
    sh_pages_forget(&p->pool[SH_KV_SLIDING], n->sliding);
    n->sliding = NONE;
    n->list[SH_KV_SLIDING] = PLAIN;
}

static void forget_node(sh_prefix *p, int32_t x) {
    node *n = &p->node[x];
    int32_t *at = &p->bucket[bucket_of(p, n->parent, n->ids)];
    while (*at != x) at = &p->node[*at].next;
    *at = n->next;
    forget_sliding(p, x);
    list_remove(p, SH_KV_GLOBAL, x);
    if (n->parent != NONE) p->node[n->parent].below--;
    n->serial = 0;
    sh_pages_forget(&p->pool[SH_KV_GLOBAL], x);
}

/* ---- pages --------------------------------------------------------------------------------------------------------
 */

static void make_free(sh_prefix *p, sh_kv_kind k) {
    int32_t x = NONE;
    for (int i = 0; i < LISTS && x == NONE; i++) x = p->idle[k][i].first;
    if (x == NONE) return;
    if (k == SH_KV_SLIDING)
        forget_sliding(p, x);
    else if (p->node[x].below == 0)
        forget_node(p, x);
}

int32_t sh_prefix_take(sh_prefix *p, sh_kv_kind kind, bool promised) {
    sh_pages *pool = &p->pool[kind];
    if (pool->free == 0 && (promised || sh_pages_open(pool) > 0)) make_free(p, kind);
    return sh_pages_take(pool, promised);
}

static int32_t node_of(const sh_prefix *p, sh_kv_kind kind, int32_t page) {
    return kind == SH_KV_GLOBAL ? page : p->filler[page];
}

sh_status sh_prefix_give(sh_prefix *p, sh_kv_kind kind, int32_t page) {
    sh_pages *pool = &p->pool[kind];
    SH_TRY(sh_pages_give(pool, page));
    if (pool->kept[page] && pool->holders[page] == 0) list_enter(p, kind, node_of(p, kind, page));
    return SH_OK;
}

static void hold(sh_prefix *p, sh_kv_kind kind, int32_t page) {
    list_remove(p, kind, node_of(p, kind, page));
    sh_pages_hold(&p->pool[kind], page);
}

/* ---- recording ----------------------------------------------------------------------------------------------------
 */

/* First page of the window that a row behind `border` pages sees. */
static int32_t first_seen(const sh_prefix *p, int32_t border) {
    return max32(0, border * SH_PAGE_TOKENS - p->window + 1) / SH_PAGE_TOKENS;
}

static bool names_all(const sh_prefix *p, const int32_t *ids) {
    for (int i = 0; i < p->n_placeholders; i++)
        for (int t = 0; t < SH_PAGE_TOKENS; t++)
            if (ids[t] == p->placeholder[i]) return false;
    return true;
}

/* For what page i of sliding layers is kept: somebody may begin where s parted from another, or behind its prompt, one
 * page earlier where that ends with a page (its last token is a row). */
static int worth(const sh_prefix *p, const sh_seq *s, int32_t i) {
    int32_t end = s->n_prompt / SH_PAGE_TOKENS, last = (s->n_prompt - 1) / SH_PAGE_TOKENS, parts = s->prefix.parts;
    if (i >= first_seen(p, parts) && i < parts) return USEFUL;
    return i >= first_seen(p, last) && i < end ? LIKELY : PLAIN;
}

static void record_sliding(sh_prefix *p, const sh_seq *s, int32_t i, int32_t x) {
    const sh_seq_pages *t = &s->kv[SH_KV_SLIDING];
    if (!p->slides) return;
    node *n = &p->node[x];
    if (i >= t->first && i < t->first + t->n && n->sliding == NONE && p->filler[t->page[i - t->first]] == NONE) {
        n->sliding = t->page[i - t->first];
        p->filler[n->sliding] = x;
        sh_pages_keep(&p->pool[SH_KV_SLIDING], n->sliding);
    }
    if (n->sliding != NONE) promote(p, SH_KV_SLIDING, x, worth(p, s, i));
}

/* Another than its maker uses a node. Nobody does so without using those above it, too. */
static void note_use(sh_prefix *p, const sh_seq *s, sh_kv_kind kind, int32_t x) {
    if (p->node[x].maker != s->id) promote(p, kind, x, USEFUL);
}

/* The full page i of s becomes the node x, or x is that node already: then its page takes the place of s's own. */
static sh_status record_global(sh_prefix *p, sh_seq *s, int32_t i, int32_t *x) {
    int32_t *page = &s->kv[SH_KV_GLOBAL].page[i], parent = i ? page[-1] : NONE;
    const int32_t *ids = s->tokens + (size_t)i * SH_PAGE_TOKENS;
    *x = find_node(p, parent, ids);
    if (*x == NONE) {
        *x = *page;
        add_node(p, *page, parent, ids, s->id);
        return SH_OK;
    }
    hold(p, SH_KV_GLOBAL, *x);
    note_use(p, s, SH_KV_GLOBAL, *x);
    SH_TRY(sh_prefix_give(p, SH_KV_GLOBAL, *page));
    *page = *x;
    return SH_OK;
}

sh_status sh_prefix_record(sh_prefix *p, sh_seq *s) {
    sh_seq_prefix *q = &s->prefix;
    for (int32_t full = s->pos / SH_PAGE_TOKENS; q->recorded < full && !q->sealed; q->recorded++) {
        int32_t x = NONE;
        q->sealed = !names_all(p, s->tokens + (size_t)q->recorded * SH_PAGE_TOKENS);
        if (q->sealed) break;
        SH_TRY(record_global(p, s, q->recorded, &x));
        record_sliding(p, s, q->recorded, x);
    }
    q->counted = max32(q->counted, s->pos);
    return SH_OK;
}

/* ---- finding ------------------------------------------------------------------------------------------------------
 */

int32_t sh_prefix_known(sh_prefix *p, sh_seq *s) {
    sh_seq_prefix *q = &s->prefix;
    int32_t full = s->n_tokens / SH_PAGE_TOKENS;
    if (q->known <= q->recorded || p->node[q->node].serial != q->serial) {
        q->known = q->recorded;
        q->node = q->known ? s->kv[SH_KV_GLOBAL].page[q->known - 1] : NONE;
    }
    while (q->known < full) {
        int32_t x = find_node(p, q->node, s->tokens + (size_t)q->known * SH_PAGE_TOKENS);
        if (x == NONE) break;
        q->node = x;
        q->known++;
    }
    q->serial = q->node == NONE ? 0 : p->node[q->node].serial;
    if (q->known > 0 && q->known < full && p->node[q->node].below > 0)
        q->parts = q->known; /* others went on otherwise */
    return q->known;
}

/* Pages that s may leave out: not the row of its last known token, nor rows whose logits score its prompt. */
static int32_t most_border(const sh_seq *s) {
    int32_t rows = s->n_tokens - 1;
    if (s->sampling.score_prompt && s->scored < s->n_prompt - 1) rows = min32(rows, s->scored);
    return rows / SH_PAGE_TOKENS;
}

static int32_t up_to(const sh_prefix *p, int32_t x, int32_t depth) {
    while (x != NONE && p->node[x].depth > depth) x = p->node[x].parent;
    return x;
}

int32_t sh_prefix_find(sh_prefix *p, sh_seq *s) {
    int32_t border = min32(sh_prefix_known(p, s), most_border(s)), least = s->pos / SH_PAGE_TOKENS;
    int32_t x = up_to(p, s->prefix.node, border);
    /* The last border all of whose window is there: where a page is missing, the border is before it. */
    while (p->slides && border > least && x != NONE && p->node[x].depth > first_seen(p, border)) {
        if (p->node[x].sliding == NONE) border = p->node[x].depth - 1;
        x = p->node[x].parent;
    }
    return border > least ? border : 0;
}

int32_t sh_prefix_idle(const sh_prefix *p, const sh_seq *s, int32_t border) {
    int32_t n = 0, x = up_to(p, s->prefix.node, border);
    for (; x != NONE && p->pool[SH_KV_GLOBAL].holders[x] == 0; x = p->node[x].parent) n++; /* held from there up */
    return n;
}

/* ---- sharing ------------------------------------------------------------------------------------------------------
 */

static sh_status give_all(sh_prefix *p, sh_seq *s, sh_kv_kind kind, int32_t keep) {
    sh_seq_pages *t = &s->kv[kind];
    while (t->n > keep) SH_TRY(sh_prefix_give(p, kind, t->page[--t->n]));
    return SH_OK;
}

sh_status sh_prefix_attach(sh_prefix *p, sh_seq *s, int32_t border) {
    sh_seq_prefix *q = &s->prefix;
    sh_seq_pages *global = &s->kv[SH_KV_GLOBAL], *sliding = &s->kv[SH_KV_SLIDING];
    int32_t from = first_seen(p, border), end = border * SH_PAGE_TOKENS;
    SH_TRY(give_all(p, s, SH_KV_GLOBAL, q->recorded));
    SH_TRY(give_all(p, s, SH_KV_SLIDING, 0));
    if (border > global->cap || (p->slides && border - from > sliding->cap))
        SH_FAIL(SH_ESTATE, "leader: %d shared pages of a sequence of %d tokens", border, s->n_tokens);
    global->n = border;
    for (int32_t i = border, x = up_to(p, q->node, border); i > 0; i--, x = p->node[x].parent) {
        if (p->slides && i > from) {
            hold(p, SH_KV_SLIDING, p->node[x].sliding);
            note_use(p, s, SH_KV_SLIDING, x);
            sliding->page[i - 1 - from] = p->node[x].sliding;
        }
        if (i <= q->recorded) continue;
        hold(p, SH_KV_GLOBAL, x);
        note_use(p, s, SH_KV_GLOBAL, x);
        global->page[i - 1] = x;
    }
    if (p->slides) {
        sliding->first = from;
        sliding->n = border - from;
    }
    int32_t counted = max32(q->counted, s->pos);
    p->rows += (uint64_t)max32(0, min32(end, s->n_prompt) - counted);
    q->counted = max32(counted, end);
    q->recorded = border;
    s->pos = end;
    return SH_OK;
}

bool sh_prefix_awaits(const sh_prefix *p, const sh_seq *s, const sh_seq *other) {
    const sh_seq_prefix *q = &s->prefix, *o = &other->prefix;
    int32_t d = q->known;
    size_t at = (size_t)d * SH_PAGE_TOKENS;
    if (q->recorded != d || o->recorded != d || o->sealed || d >= most_border(s)) return false;
    if (other->pos / SH_PAGE_TOKENS <= d || (d && other->kv[SH_KV_GLOBAL].page[d - 1] != q->node)) return false;
    return memcmp(s->tokens + at, other->tokens + at, SH_PAGE_TOKENS * sizeof *s->tokens) == 0 &&
           names_all(p, s->tokens + at);
}

/* ---- looking on ---------------------------------------------------------------------------------------------------
 */

static sh_status audit_node(const sh_prefix *p, int32_t x) {
    const node *n = &p->node[x];
    const sh_pages *global = &p->pool[SH_KV_GLOBAL], *sliding = &p->pool[SH_KV_SLIDING];
    bool idle = n->serial && global->holders[x] == 0;
    if ((n->serial > 0) != global->kept[x]) SH_FAIL(SH_ESTATE, "page %d is kept, or a node, and not both", x);
    if (!n->serial) return SH_OK;
    if (find_node(p, n->parent, n->ids) != x) SH_FAIL(SH_ESTATE, "node %d is not found by its tokens", x);
    if (idle != n->listed[SH_KV_GLOBAL]) SH_FAIL(SH_ESTATE, "node %d: %d holders", x, global->holders[x]);
    if (n->sliding != NONE) {
        if (p->filler[n->sliding] != x || !sliding->kept[n->sliding])
            SH_FAIL(SH_ESTATE, "node %d: sliding page %d is another's", x, n->sliding);
        if (n->listed[SH_KV_SLIDING] != (sliding->holders[n->sliding] == 0))
            SH_FAIL(SH_ESTATE, "node %d: sliding page %d has %d holders", x, n->sliding, sliding->holders[n->sliding]);
    } else if (n->listed[SH_KV_SLIDING]) {
        SH_FAIL(SH_ESTATE, "node %d is listed for a sliding page that it lacks", x);
    }
    if (n->parent == NONE) return SH_OK;
    const node *up = &p->node[n->parent];
    if (!up->serial || up->depth != n->depth - 1 || up->below < 1)
        SH_FAIL(SH_ESTATE, "node %d: the one above it is gone", x);
    if (!idle && global->holders[n->parent] == 0) SH_FAIL(SH_ESTATE, "node %d is held, the one above is not", x);
    if (idle && n->list[SH_KV_GLOBAL] > up->list[SH_KV_GLOBAL] && up->listed[SH_KV_GLOBAL])
        SH_FAIL(SH_ESTATE, "node %d is kept for longer than the one above it", x);
    return SH_OK;
}

/* Nodes of a list in order, each before those above it. seen [nodes]: false. */
static sh_status audit_list(const sh_prefix *p, int k, int which, bool *seen, int32_t *n) {
    int32_t length = 0, before = NONE;
    for (int32_t x = p->idle[k][which].first; x != NONE; before = x, x = p->node[x].link[k].after, length++) {
        const node *at = &p->node[x];
        if (at->list[k] != which || !at->listed[k] || at->link[k].before != before)
            SH_FAIL(SH_ESTATE, "list %d of kind %d: node %d is out of place", which, k, x);
        if (k != SH_KV_GLOBAL) continue;
        if (at->parent != NONE && seen[at->parent])
            SH_FAIL(SH_ESTATE, "node %d goes before node %d, which is below it", at->parent, x);
        seen[x] = true;
    }
    if (length != p->idle[k][which].n)
        SH_FAIL(SH_ESTATE, "list %d of kind %d: %d, not %d", which, k, length, p->idle[k][which].n);
    *n += length;
    return SH_OK;
}

static sh_status audit_lists(const sh_prefix *p, bool *seen) {
    for (int k = 0; k < SH_KV_KINDS; k++) {
        int32_t n = 0;
        for (int i = 0; i < LISTS; i++) SH_TRY(audit_list(p, k, i, seen, &n));
        if (n != p->pool[k].idle) SH_FAIL(SH_ESTATE, "kind %d: %d idle pages are listed of %d", k, n, p->pool[k].idle);
    }
    return SH_OK;
}

sh_status sh_prefix_audit(const sh_prefix *p) {
    int32_t below = 0, children = 0;
    for (int32_t x = 0; x < p->pool[SH_KV_GLOBAL].total; x++) {
        SH_TRY(audit_node(p, x));
        if (!p->node[x].serial) continue;
        below += p->node[x].below;
        children += p->node[x].parent != NONE;
    }
    if (below != children) SH_FAIL(SH_ESTATE, "%d nodes are below others, %d on the books", children, below);
    bool *seen = calloc((size_t)p->pool[SH_KV_GLOBAL].total + 1, sizeof *seen);
    if (!seen) SH_FAIL(SH_EMEMORY, "no memory for an audit");
    sh_status st = audit_lists(p, seen);
    free(seen);
    return st;
}
