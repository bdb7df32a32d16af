/* The scheduler. See leader.h for the rules that it keeps. */
#include "worker/leader.h"

#include <stdlib.h>
#include <string.h>

#include "worker/prefill.h"
#include "worker/prefix.h"

/* A micro-batch on its way round the ring. */
typedef struct flight {
    uint64_t step;
    int n;
    sh_seq **seq;  /* [max_seqs] in span order */
    bool *sampled; /* [max_seqs] the span ends with a row that yields a token */
} flight;

struct sh_leader {
    sh_leader_options o;
    sh_pages *pool; /* [n_pools]: see kind_of */
    int n_pools;
    sh_seq *waiting;  /* by age */
    sh_seq **running; /* [max_seqs] by age */
    sh_seq *dead;
    int n_running, n_waiting;
    uint64_t next_id, next_step, pauses;
    flight *flights; /* ring */
    int depth, oldest, n_flights;
    uint64_t *drops; /* [max_seqs] sampler states to end with the next micro-batch */
    int n_drops;
    sh_prefill *prefill; /* NULL: no such stages */
    sh_prefix *prefix;   /* NULL: sequences share no pages */
    int n_draining;      /* sequences that were stopped while rows of theirs are out: they still hold pages */
};

static int32_t pages_for(int32_t tokens) {
    return (tokens + SH_PAGE_TOKENS - 1) / SH_PAGE_TOKENS;
}

static int32_t min32(int32_t a, int32_t b) {
    return a < b ? a : b;
}

static int32_t max32(int32_t a, int32_t b) {
    return a > b ? a : b;
}

/* ---- pools ------------------------------------------------------------------------------------------------------- */

/* One pool of pages per kind. Where members share positions out, the first one of the global kind is member 0's, and
 * those of the members 1, 2, … follow the kinds. */
static sh_kv_kind kind_of(int pool) {
    return pool < SH_KV_KINDS ? (sh_kv_kind)pool : SH_KV_GLOBAL;
}

static int owner_of(int pool) {
    return pool < SH_KV_KINDS ? 0 : pool - SH_KV_KINDS + 1;
}

static int members_of(const sh_leader_options *o) {
    return o->members > 1 ? o->members : 1;
}

/* Of the first n pages of a sequence, those that belong to a pool. */
static int32_t share(const sh_leader *l, const sh_seq *s, int pool, int32_t n) {
    if (kind_of(pool) == SH_KV_SLIDING) return n;
    int members = members_of(&l->o);
    return sh_owner_pages(n, s->level, members, sh_owner_place(owner_of(pool), s->id, members));
}

/* ---- what the options imply -------------------------------------------------------------------------------------- */

void sh_leader_options_model(sh_leader_options *o, const sh_config *c) {
    o->vocab = c->vocab;
    o->window = 0;
    o->kind[SH_KV_GLOBAL] = o->kind[SH_KV_SLIDING] = false;
    const int placeholder[] = {c->image_id, c->audio_id, c->video_id};
    o->n_placeholders = 0;
    for (int i = 0; i < 3; i++)
        if (placeholder[i] >= 0) o->placeholder[o->n_placeholders++] = placeholder[i];
    for (int i = 0; i < c->n_layers; i++) {
        const sh_layer *l = &c->layer[i];
        o->kind[l->kind] = true;
        if (l->kind == SH_KV_SLIDING) o->window = max32(o->window, l->window);
    }
}

int32_t sh_leader_peak(const sh_leader_options *o, sh_kv_kind kind, int32_t n) {
    if (!o->kind[kind]) return 0;
    int32_t all = pages_for(n);
    if (kind == SH_KV_GLOBAL) return sh_owner_most(n, members_of(o));
    /* Rows [a, a + chunk) see positions a − window + 1 … a + chunk − 1, wherever the page borders fall. */
    return min32(all, (o->window + o->chunk - 2) / SH_PAGE_TOKENS + 2);
}

int32_t sh_leader_capacity(const sh_leader_options *o) {
    int32_t n = o->max_context;
    if (o->kind[SH_KV_GLOBAL]) n = sh_owner_capacity(o->pages[SH_KV_GLOBAL], members_of(o), n);
    int32_t have = o->pages[SH_KV_SLIDING];
    if (o->kind[SH_KV_SLIDING] && have < sh_leader_peak(o, SH_KV_SLIDING, n)) n = min32(n, have * SH_PAGE_TOKENS);
    return n;
}

int64_t sh_leader_total(const sh_leader_options *o) {
    if (!o->kind[SH_KV_GLOBAL]) return (int64_t)o->pages[SH_KV_SLIDING] * SH_PAGE_TOKENS;
    return (int64_t)o->pages[SH_KV_GLOBAL] * members_of(o) * SH_PAGE_TOKENS;
}

static size_t start_cost(const sh_seq *s) {
    return sizeof(sh_sampling) + sizeof(sh_seq_start) + 256 + (size_t)s->n_tokens * 4;
}

/* Room for starts in one descriptor: at least one of the longest. */
static size_t start_room(const sh_leader_options *o) {
    size_t one = sizeof(sh_sampling) + sizeof(sh_seq_start) + 256 + (size_t)o->max_context * 4;
    size_t some = (size_t)1 << 20;
    return one > some ? one : some;
}

size_t sh_leader_descriptor_bytes(const sh_leader_options *o) {
    size_t seqs = (size_t)o->max_seqs;
    size_t pages = (size_t)o->pages[SH_KV_GLOBAL] * (size_t)members_of(o) + (size_t)o->pages[SH_KV_SLIDING];
    if (sh_prefix_is_for(o)) /* each may name the same ones; of the sliding ones each has paid for its own */
        pages += (seqs - 1) * (size_t)min32(o->pages[SH_KV_GLOBAL], pages_for(o->max_context));
    if (o->prefill > 0) {
        pages += (size_t)o->prefill_pages[SH_KV_GLOBAL] + (size_t)o->prefill_pages[SH_KV_SLIDING];
        seqs *= 2; /* a hand-off takes less than a span */
    }
    return 4096 + (size_t)sh_leader_max_rows(o) * 4 + seqs * (sizeof(sh_span) + 256 + sizeof(sh_seq_start) + 8) +
           pages * 4 + start_room(o);
}

/* ---- life ---------------------------------------------------------------------------------------------------------
 */

static sh_status check_options(const sh_leader_options *o) {
    if (o->stages < 1 || o->stages > SH_MAX_RANKS)
        SH_FAIL(SH_EINPUT, "stages: %d: 1 to %d are allowed", o->stages, SH_MAX_RANKS);
    if (o->max_seqs < 1 || o->max_seqs > SH_MAX_SEQS)
        SH_FAIL(SH_EINPUT, "max_seqs: %d: 1 to %d are allowed", o->max_seqs, SH_MAX_SEQS);
    if (o->chunk < 1 || o->chunk > SH_MAX_CHUNK)
        SH_FAIL(SH_EINPUT, "chunk: %d: 1 to %d are allowed", o->chunk, SH_MAX_CHUNK);
    if (o->max_context < 1) SH_FAIL(SH_EINPUT, "max_context: %d: 1 or more are allowed", o->max_context);
    if (o->members < 0 || o->members > SH_MAX_RANKS)
        SH_FAIL(SH_EINPUT, "members: %d: 1 to %d are allowed", o->members, SH_MAX_RANKS);
    if (o->in_flight < 0) SH_FAIL(SH_EINPUT, "in_flight: %d: 0 or more are allowed", o->in_flight);
    if (o->prefill > 0 && o->members > 1)
        SH_FAIL(SH_EINPUT, "prefill: %d stages, %d members of a stage: allowed beside the former is 1", o->prefill,
                o->members);
    if (o->prefill < 0 || o->prefill > SH_MAX_RANKS || (o->prefill > 0 && o->confirms < 1))
        SH_FAIL(SH_EINPUT, "prefill: %d stages, %d ranks that confirm: 0 to %d stages are allowed, with 1 or more",
                o->prefill, o->confirms, SH_MAX_RANKS);
    if (o->vocab < 1) SH_FAIL(SH_EINPUT, "vocab: %d: 1 or more are allowed", o->vocab);
    return SH_OK;
}

static sh_status allocate(sh_leader *l) {
    size_t seqs = (size_t)l->o.max_seqs;
    l->pool = calloc((size_t)l->n_pools, sizeof *l->pool);
    if (!l->pool) SH_FAIL(SH_EMEMORY, "no memory for %d pools of pages", l->n_pools);
    for (int k = 0; k < l->n_pools; k++) SH_TRY(sh_pages_create(l->o.pages[kind_of(k)], &l->pool[k]));
    l->running = calloc(seqs, sizeof *l->running);
    l->drops = calloc(seqs, sizeof *l->drops);
    l->flights = calloc((size_t)l->depth, sizeof *l->flights);
    bool ok = l->running && l->drops && l->flights;
    for (int i = 0; ok && i < l->depth; i++) {
        l->flights[i].seq = calloc(seqs, sizeof *l->flights[i].seq);
        l->flights[i].sampled = calloc(seqs, sizeof *l->flights[i].sampled);
        ok = l->flights[i].seq && l->flights[i].sampled;
    }
    if (!ok) SH_FAIL(SH_EMEMORY, "no memory for the schedule of %d sequences", l->o.max_seqs);
    if (sh_prefix_is_for(&l->o)) SH_TRY(sh_prefix_create(&l->o, l->pool, &l->prefix));
    return l->o.prefill > 0 ? sh_prefill_create(&l->o, &l->prefill) : SH_OK;
}

sh_status sh_leader_create(const sh_leader_options *o, sh_leader **out) {
    SH_TRY(check_options(o));
    sh_leader *l = calloc(1, sizeof *l);
    if (!l) SH_FAIL(SH_EMEMORY, "no memory for the leader");
    l->o = *o;
    l->n_pools = SH_KV_KINDS + members_of(o) - 1;
    l->depth = sh_leader_in_flight(o);
    l->next_id = l->next_step = 1;
    sh_status st = allocate(l);
    if (st != SH_OK) {
        sh_leader_destroy(&l);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = l;
    return SH_OK;
}

static void destroy_list(sh_seq *s) {
    while (s) {
        sh_seq *next = s->next;
        sh_seq_destroy(&s);
        s = next;
    }
}

void sh_leader_destroy(sh_leader **p) {
    sh_leader *l = *p;
    if (!l) return;
    destroy_list(l->waiting);
    destroy_list(l->dead);
    for (int i = 0; i < l->n_running; i++) sh_seq_destroy(&l->running[i]);
    for (int i = 0; l->flights && i < l->depth; i++) {
        free(l->flights[i].seq);
        free(l->flights[i].sampled);
    }
    for (int k = 0; l->pool && k < l->n_pools; k++) sh_pages_release(&l->pool[k]);
    sh_prefill_destroy(&l->prefill);
    sh_prefix_destroy(&l->prefix);
    free(l->pool);
    free(l->flights);
    free(l->running);
    free(l->drops);
    free(l);
    *p = NULL;
}

/* Pages of a pool that a sequence of n tokens holds at most at any time. */
static int32_t peak(const sh_leader *l, const sh_seq *s, int pool, int32_t n) {
    sh_kv_kind kind = kind_of(pool);
    if (kind == SH_KV_SLIDING || !l->o.kind[kind]) return sh_leader_peak(&l->o, kind, n);
    return share(l, s, pool, pages_for(n));
}

sh_status sh_leader_check(const sh_leader *l, const sh_seq *s) {
    int32_t most = sh_leader_capacity(&l->o);
    if (s->cap > most)
        SH_FAIL(SH_ELIMIT,
                "prompt of %d tokens and max_tokens %d make %d: this group can hold %d tokens of one sequence",
                s->n_prompt, s->sampling.max_tokens, s->cap, most);
    for (int32_t i = 0; i < s->n_tokens; i++)
        if (s->tokens[i] < 0 || s->tokens[i] >= l->o.vocab)
            SH_FAIL(SH_ELIMIT, "token %d is %d: the vocabulary has ids 0 to %d", i, s->tokens[i], l->o.vocab - 1);
    return SH_OK;
}

static bool known_key(const sh_leader *l, uint64_t key) {
    for (int i = 0; i < l->n_running; i++)
        if (l->running[i]->key == key) return true;
    for (const sh_seq *s = l->waiting; s; s = s->next)
        if (s->key == key) return true;
    return false;
}

static void enqueue(sh_leader *l, sh_seq *s) {
    sh_seq **at = &l->waiting;
    while (*at && (*at)->id < s->id) at = &(*at)->next;
    s->next = *at;
    *at = s;
    s->state = SH_SEQ_WAITING;
    l->n_waiting++;
}

bool sh_leader_knows(const sh_leader *l, uint64_t key) {
    return known_key(l, key);
}

int32_t sh_leader_shared(const sh_leader *l, sh_seq *s) {
    if (!l->prefix) return 0;
    s->prefix = (sh_seq_prefix){0}; /* what it knows of another leader's tree */
    int32_t n = sh_prefix_known(l->prefix, s) * SH_PAGE_TOKENS;
    s->prefix = (sh_seq_prefix){0};
    return n;
}

int64_t sh_leader_rows_to_go(const sh_leader *l) {
    int64_t n = 0;
    for (int i = 0; i < l->n_running; i++) n += l->running[i]->cap - l->running[i]->pos;
    for (const sh_seq *s = l->waiting; s; s = s->next) n += s->cap - s->prefix.known * SH_PAGE_TOKENS;
    return n;
}

sh_status sh_leader_add(sh_leader *l, sh_seq **p, bool *known) {
    sh_seq *s = *p;
    if (known_key(l, s->key)) {
        sh_seq_destroy(p);
        *known = true;
        return SH_OK;
    }
    SH_TRY(sh_leader_check(l, s));
    s->id = l->next_id++;
    s->prefix = (sh_seq_prefix){0};
    s->level = sh_owner_level(s->cap, members_of(&l->o));
    s->kv = calloc((size_t)l->n_pools, sizeof *s->kv);
    if (s->kv) s->n_pools = l->n_pools;
    for (int k = 0; k < l->n_pools; k++) {
        if (s->kv) s->kv[k].cap = peak(l, s, k, s->cap);
        if (s->kv) s->kv[k].page = calloc((size_t)s->kv[k].cap + 1, sizeof *s->kv[k].page);
        if (!s->kv || !s->kv[k].page)
            SH_FAIL(SH_EMEMORY, "no memory for the page table of a sequence of %d tokens", s->cap);
    }
    if (l->prefill) SH_TRY(sh_prefill_prepare(l->prefill, s));
    if (l->prefix) (void)sh_prefix_known(l->prefix, s);
    enqueue(l, s);
    *p = NULL;
    *known = false;
    return SH_OK;
}

/* ---- pages of a sequence --------------------------------------------------------------------------------------------
 */

static int32_t take_page(sh_leader *l, int k, bool promised) {
    return l->prefix ? sh_prefix_take(l->prefix, kind_of(k), promised) : sh_pages_take(&l->pool[k], promised);
}

/* Gives the first n pages back; the last of them first, as the tree of shared pages wants it. */
static sh_status give_front(sh_leader *l, sh_seq *s, int k, int32_t n) {
    sh_seq_pages *p = &s->kv[k];
    for (int32_t i = n; i-- > 0;)
        SH_TRY(l->prefix ? sh_prefix_give(l->prefix, kind_of(k), p->page[i]) : sh_pages_give(&l->pool[k], p->page[i]));
    memmove(p->page, p->page + n, (size_t)(p->n - n) * sizeof *p->page);
    p->first += n;
    p->n -= n;
    return SH_OK;
}

static void set_promise(sh_leader *l, sh_seq *s, int k, int32_t want) {
    sh_seq_pages *p = &s->kv[k];
    if (want > p->promise) {
        if (!sh_pages_promise(&l->pool[k], want - p->promise)) return; /* open pages were counted before */
    } else {
        sh_pages_unpromise(&l->pool[k], p->promise - want);
    }
    p->promise = want;
}

/* Pages that the rest of the known tokens still needs at the same time as those held. */
static int32_t outstanding(const sh_leader *l, const sh_seq *s, int k) {
    if (!l->o.kind[kind_of(k)]) return 0;
    const sh_seq_pages *p = &s->kv[k];
    int32_t rest = share(l, s, k, pages_for(s->n_tokens)) - (p->first + p->n);
    return max32(0, min32(peak(l, s, k, s->n_tokens) - p->n, rest));
}

static sh_status release_pages(sh_leader *l, sh_seq *s) {
    for (int k = 0; k < l->n_pools; k++) {
        set_promise(l, s, k, 0);
        SH_TRY(give_front(l, s, k, s->kv[k].n));
        s->kv[k].first = 0;
    }
    return SH_OK;
}

/* First page of sliding layers that a row at pos sees. */
static int32_t first_seen(const sh_leader *l, int32_t pos) {
    return l->o.kind[SH_KV_SLIDING] ? max32(0, pos - l->o.window + 1) / SH_PAGE_TOKENS : 0;
}

/* Frees pages that no later row sees. A prompt under way may need them again for its next rows: the promise follows. */
static sh_status pass_window(sh_leader *l, sh_seq *s) {
    const int k = SH_KV_SLIDING;
    if (!l->o.kind[k]) return SH_OK;
    int32_t n = min32(first_seen(l, s->pos) - s->kv[k].first, s->kv[k].n);
    if (n <= 0) return SH_OK;
    SH_TRY(give_front(l, s, k, n));
    set_promise(l, s, k, min32(outstanding(l, s, k), s->kv[k].promise + n));
    return SH_OK;
}

/* Whether pages for positions below `end` are held or can be taken. */
static bool can_cover(const sh_leader *l, const sh_seq *s, int32_t end) {
    for (int k = 0; k < l->n_pools; k++) {
        if (!l->o.kind[kind_of(k)]) continue;
        int32_t need = share(l, s, k, pages_for(end)) - (s->kv[k].first + s->kv[k].n);
        if (need > sh_pages_open(&l->pool[k]) + s->kv[k].promise) return false;
    }
    return true;
}

static sh_status cover(sh_leader *l, sh_seq *s, int32_t end) {
    for (int k = 0; k < l->n_pools; k++) {
        sh_seq_pages *p = &s->kv[k];
        int32_t pages = l->o.kind[kind_of(k)] ? share(l, s, k, pages_for(end)) : 0;
        while (p->first + p->n < pages) {
            int32_t page = take_page(l, k, p->promise > 0);
            if (page < 0 || p->n == p->cap)
                SH_FAIL(SH_ESTATE, "leader: no page for position %d of a sequence of %d tokens", end - 1, s->n_tokens);
            if (p->promise > 0) p->promise--;
            p->page[p->n++] = page;
        }
    }
    return SH_OK;
}

/* ---- coming and going
 * ------------------------------------------------------------------------------------------------ */

static void remove_running(sh_leader *l, const sh_seq *s) {
    int i = 0;
    while (l->running[i] != s) i++;
    memmove(l->running + i, l->running + i + 1, (size_t)(l->n_running - i - 1) * sizeof *l->running);
    l->n_running--;
}

/* Gives back all that a stopped sequence holds. */
static sh_status let_go(sh_leader *l, sh_seq *s) {
    if (l->prefix) SH_TRY(sh_prefix_record(l->prefix, s)); /* who waits for it finds all that it filled */
    s->pos = s->prefix.recorded = 0;
    s->prefix.sealed = false;
    s->handing = s->damaged = false;
    if (l->prefill) SH_TRY(sh_prefill_release(l->prefill, s));
    return release_pages(l, s);
}

static sh_status stop_running(sh_leader *l, sh_seq *s) {
    remove_running(l, s);
    if (s->started) l->drops[l->n_drops++] = s->id;
    s->started = false;
    if (!s->handing || s->flights == 0) return let_go(l, s);
    l->n_draining++; /* rows on their way will still be written into its pages */
    return SH_OK;
}

static void bury(sh_leader *l, sh_seq *s) {
    s->state = SH_SEQ_DEAD;
    if (s->flights == 0) {
        sh_seq_destroy(&s);
        return;
    }
    s->next = l->dead;
    l->dead = s;
}

void sh_leader_cancel(sh_leader *l, uint64_t key) {
    for (int i = 0; i < l->n_running; i++) {
        sh_seq *s = l->running[i];
        if (s->key != key) continue;
        SH_IGNORE(stop_running(l, s)); /* can only fail when the books are wrong, which the next call will say */
        bury(l, s);
        return;
    }
    for (sh_seq **at = &l->waiting; *at; at = &(*at)->next) {
        sh_seq *s = *at;
        if (s->key != key) continue;
        *at = s->next;
        l->n_waiting--;
        bury(l, s);
        return;
    }
}

static sh_status pause_youngest(sh_leader *l) {
    sh_seq *s = l->running[l->n_running - 1];
    SH_TRY(stop_running(l, s));
    enqueue(l, s);
    l->pauses++;
    return SH_OK;
}

/* Running sequences that will hold more pages of a pool than they do now. */
static int32_t growing(const sh_leader *l, int k) {
    int32_t n = 0, window = kind_of(k) == SH_KV_SLIDING ? (l->o.window - 1) / SH_PAGE_TOKENS + 2 : INT32_MAX;
    for (int i = 0; i < l->n_running; i++) {
        const sh_seq *s = l->running[i];
        n += s->kv[k].n + s->kv[k].promise < min32(window, share(l, s, k, pages_for(s->cap)));
    }
    return n;
}

/* Open pages that s needs to have all that is known of it, when it begins behind `border` shared pages. */
static int32_t need(const sh_leader *l, const sh_seq *s, int k, int32_t border) {
    if (border == 0) return outstanding(l, s, k);
    int32_t all = pages_for(s->n_tokens);
    if (kind_of(k) == SH_KV_GLOBAL) return all - border + sh_prefix_idle(l->prefix, s, border);
    return min32(peak(l, s, k, s->n_tokens), all - first_seen(l, border * SH_PAGE_TOKENS));
}

/* Whether the pages of all that is known of s are open; with a prefill pipeline also there, and set aside. */
static bool pages_open(sh_leader *l, sh_seq *s, int32_t border) {
    s->handing = l->prefill && sh_prefill_wants(l->prefill, s);
    s->kv[SH_KV_SLIDING].first = s->handing ? first_seen(l, s->n_tokens - 1) : 0; /* rows before do not travel */
    s->safe = s->repeats = 0;
    bool open = true;
    for (int k = 0; k < l->n_pools; k++)
        if (l->o.kind[kind_of(k)] && need(l, s, k, border) + growing(l, k) > sh_pages_open(&l->pool[k])) open = false;
    if (open && (!s->handing || sh_prefill_admit(l->prefill, s))) return true;
    s->handing = false;
    s->kv[SH_KV_SLIDING].first = 0;
    return false;
}

/* Admits waiting sequences by age while the pages of their known tokens are open. A page for each sequence that grows
 * must be left, so that who comes in is not paused by the next page border of its elders. */
static sh_status admit(sh_leader *l) {
    while (l->waiting && l->n_running < l->o.max_seqs) {
        sh_seq *s = l->waiting;
        if (s->flights > 0) return SH_OK; /* paused a moment ago: its last token is still on its way */
        int32_t border = l->prefix ? sh_prefix_find(l->prefix, s) : 0;
        if (!pages_open(l, s, border)) return SH_OK;
        if (border > 0) SH_TRY(sh_prefix_attach(l->prefix, s, border));
        for (int k = 0; k < l->n_pools; k++) set_promise(l, s, k, outstanding(l, s, k));
        l->waiting = s->next;
        l->n_waiting--;
        s->next = NULL;
        s->state = SH_SEQ_RUNNING;
        int i = l->n_running++; /* by age: a paused one may be older than some that run */
        for (; i > 0 && l->running[i - 1]->id > s->id; i--) l->running[i] = l->running[i - 1];
        l->running[i] = s;
    }
    return SH_OK;
}

/* ---- making a micro-batch
 * ---------------------------------------------------------------------------------------------- */

typedef struct making {
    sh_leader *l;
    sh_batch *b;
    flight *f;
    int first_prompt;   /* spans from here on are of prompts */
    size_t starts_left; /* bytes */
} making;

static sh_status begin(making *m) {
    const sh_leader_options *o = &m->l->o;
    sh_batch *b = m->b;
    sh_arena *a = &b->arena;
    sh_arena_reset(a);
    size_t seqs = (size_t)o->max_seqs;
    b->step = m->l->next_step;
    b->n_rows = b->n_kept = b->n_spans = b->n_starts = b->n_drops = b->widest_rows = b->widest_kept = b->n_handoffs = 0;
    b->ids = sh_arena_take(a, (size_t)sh_leader_max_rows(o) * sizeof *b->ids);
    b->spans = sh_arena_take(a, seqs * sizeof *b->spans);
    b->starts = sh_arena_take(a, seqs * sizeof *b->starts);
    b->drops = sh_arena_take(a, seqs * sizeof *b->drops);
    if (!b->ids || !b->spans || !b->starts || !b->drops)
        SH_FAIL(SH_ESTATE, "leader: the batch has %zu bytes, fewer than sh_leader_descriptor_bytes", a->size);
    return SH_OK;
}

/* Rows at the end of [pos, pos + rows) that must go through every layer. */
static int32_t rows_to_keep(const sh_seq *s, int32_t rows) {
    int32_t end = s->pos + rows, keep = end == s->n_tokens ? 1 : 0;
    int32_t from = max32(s->pos, s->scored); /* the logits of row p score token p + 1 */
    if (s->sampling.score_prompt && from <= min32(end - 1, s->n_prompt - 2)) keep = max32(keep, end - from);
    return keep;
}

static void add_start(making *m, sh_seq *s) {
    sh_batch *b = m->b;
    b->starts[b->n_starts++] = (sh_seq_start){
        .seq = s->id, .sampling = &s->sampling, .tokens = s->tokens, .n_prompt = s->n_prompt, .n_tokens = s->n_tokens};
    m->starts_left -= start_cost(s);
    s->started = true;
}

/* The global pages of s in the order of its positions, whichever member's they are. */
static sh_status list_pages(const making *m, const sh_seq *s, sh_span *p) {
    const sh_leader *l = m->l;
    int32_t n = 0, each = (SH_SEGMENT_TOKENS / SH_PAGE_TOKENS) << s->level; /* pages of a block */
    for (int k = 0; k < l->n_pools; k++) n += kind_of(k) == SH_KV_GLOBAL ? s->kv[k].n : 0;
    int32_t *list = sh_arena_take(&m->b->arena, (size_t)n * sizeof *list);
    if (!list) SH_FAIL(SH_ESTATE, "leader: no room for %d pages in the batch", n);
    for (int k = 0; k < l->n_pools; k++) {
        if (kind_of(k) != SH_KV_GLOBAL) continue;
        int place = sh_owner_place(owner_of(k), s->id, l->o.members);
        for (int32_t i = 0; i < s->kv[k].n; i++) /* the i-th of a member lies in its block i / each */
            list[(i / each * l->o.members + place) * each + i % each] = s->kv[k].page[i];
    }
    p->n_pages[SH_KV_GLOBAL] = n;
    p->pages[SH_KV_GLOBAL] = list;
    return SH_OK;
}

/* Adds rows [pos, pos + rows) of s, whose pages are covered. */
static sh_status add_span(making *m, sh_seq *s, int32_t rows, int32_t keep) {
    sh_batch *b = m->b;
    if (keep > 0 && !s->started) add_start(m, s);
    sh_span *p = &b->spans[b->n_spans];
    *p = (sh_span){.seq = s->id,
                   .pos = s->pos,
                   .rows = rows,
                   .keep = keep,
                   .row0 = b->n_rows,
                   .kept0 = b->n_kept,
                   .level = s->level};
    for (int k = 0; k < SH_KV_KINDS; k++) {
        p->page0[k] = s->kv[k].first;
        p->n_pages[k] = s->kv[k].n;
        p->pages[k] = s->kv[k].page;
    }
    if (m->l->o.members > 1) SH_TRY(list_pages(m, s, p));
    memcpy(b->ids + b->n_rows, s->tokens + s->pos, (size_t)rows * sizeof *b->ids);
    m->f->seq[b->n_spans] = s;
    m->f->sampled[b->n_spans] = s->pos + rows == s->n_tokens;
    s->sampling_now = m->f->sampled[b->n_spans];
    b->n_spans++;
    b->n_rows += rows;
    b->n_kept += keep;
    s->pos += rows;
    s->flights++;
    return SH_OK;
}

/* Pauses the youngest until there is a page for the next row of s. *room false: not now, or it was paused itself. */
static sh_status make_room(sh_leader *l, const sh_seq *s, bool *room) {
    bool paused_itself = false;
    while (!paused_itself && l->n_draining == 0 && !can_cover(l, s, s->n_tokens)) {
        paused_itself = l->running[l->n_running - 1] == s; /* everyone younger waits already */
        SH_TRY(pause_youngest(l));
    }
    *room = !paused_itself && can_cover(l, s, s->n_tokens);
    return SH_OK;
}

/* Sequences with one known row to go (decode, or the end of a prompt): one row each of up to `most` of them, oldest
 * first. */
static sh_status add_decodes(making *m, int most) {
    sh_leader *l = m->l;
    for (int i = 0; i < l->n_running && m->b->n_spans < most; i++) {
        sh_seq *s = l->running[i];
        if (s->handing || sh_seq_pending(s) != 1) continue;
        if (!s->started && start_cost(s) > m->starts_left) continue;
        SH_TRY(pass_window(l, s));
        bool room = false;
        SH_TRY(make_room(l, s, &room));
        if (!room) break;
        SH_TRY(cover(l, s, s->n_tokens));
        SH_TRY(add_span(m, s, 1, rows_to_keep(s, 1)));
    }
    return SH_OK;
}

/* A prompt under way goes on behind what others have filled meanwhile. */
static sh_status jump(sh_leader *l, sh_seq *s) {
    int32_t border = sh_prefix_find(l->prefix, s);
    if (border == 0) return SH_OK;
    for (int k = 0; k < l->n_pools; k++) set_promise(l, s, k, 0);
    SH_TRY(sh_prefix_attach(l->prefix, s, border));
    for (int k = 0; k < l->n_pools; k++) set_promise(l, s, k, outstanding(l, s, k)); /* never more than it had */
    return SH_OK;
}

/* Whether this micro-batch fills the page that s needs next: in the next one it can share it. */
static bool awaits(const making *m, const sh_seq *s) {
    for (int i = m->first_prompt; i < m->b->n_spans; i++)
        if (sh_prefix_awaits(m->l->prefix, s, m->f->seq[i])) return true;
    return false;
}

/* Chunks of prompts (and of what paused sequences had generated), oldest first, within the row budget. Several chunks
 * of one prompt may be in flight: each stage meets them in order. */
static sh_status add_prompts(making *m) {
    sh_leader *l = m->l;
    int32_t left = l->o.chunk;
    m->first_prompt = m->b->n_spans;
    for (int i = 0; i < l->n_running && left > 0; i++) {
        sh_seq *s = l->running[i];
        if (s->handing || sh_seq_pending(s) < 2) continue;
        if (l->prefix) SH_TRY(jump(l, s));
        if (l->prefix && awaits(m, s)) continue;
        int32_t rows = min32(sh_seq_pending(s), left), keep = rows_to_keep(s, rows);
        if (keep > 0 && !s->started && start_cost(s) > m->starts_left) continue;
        SH_TRY(pass_window(l, s));
        SH_TRY(cover(l, s, s->pos + rows));
        SH_TRY(add_span(m, s, rows, keep));
        left -= rows;
    }
    return SH_OK;
}

/* Decode rows of one micro-batch: a fair share, so that the pipeline is full when there are enough sequences. */
static int decode_share(const sh_leader *l) {
    int n = 0;
    for (int i = 0; i < l->n_running; i++) n += !l->running[i]->handing && sh_seq_pending(l->running[i]) <= 1;
    return (n + l->depth - 1) / l->depth;
}

sh_status sh_leader_next(sh_leader *l, sh_batch *b, bool *made) {
    *made = false;
    if (l->n_flights == l->depth) return SH_OK;
    making m = {
        .l = l, .b = b, .f = &l->flights[(l->oldest + l->n_flights) % l->depth], .starts_left = start_room(&l->o)};
    for (int i = 0; l->prefix && i < l->n_running; i++) SH_TRY(sh_prefix_record(l->prefix, l->running[i]));
    SH_TRY(admit(l));
    if (l->n_running == 0) return SH_OK;
    SH_TRY(begin(&m));
    SH_TRY(add_decodes(&m, decode_share(l)));
    SH_TRY(add_prompts(&m));
    if (b->n_spans == 0) return SH_OK;
    memcpy(b->drops, l->drops, (size_t)l->n_drops * sizeof *b->drops);
    b->n_drops = l->n_drops;
    l->n_drops = 0;
    m.f->step = l->next_step++;
    m.f->n = b->n_spans;
    l->n_flights++;
    *made = true;
    return SH_OK;
}

/* ---- taking the answer
 * -------------------------------------------------------------------------------------------------- */

static sh_status finish(sh_leader *l, sh_seq *s) {
    if (s->state == SH_SEQ_RUNNING) {
        SH_TRY(stop_running(l, s));
    } else { /* paused while its last token was on its way */
        sh_seq **at = &l->waiting;
        while (*at != s) at = &(*at)->next;
        *at = s->next;
        l->n_waiting--;
    }
    s->state = SH_SEQ_DEAD;
    s->next = l->dead;
    l->dead = s;
    return SH_OK;
}

static sh_status take_score(sh_seq *s, const sh_token *t, bool *fresh) {
    if (t->index < 1 || t->index >= s->n_prompt || t->index > s->scored + 1)
        SH_FAIL(SH_EPEER, "score of prompt token %d: %d of %d are known", t->index, s->scored, s->n_prompt - 1);
    *fresh = t->index == s->scored + 1;
    if (*fresh) s->scored++;
    return SH_OK;
}

static sh_status take_token(sh_leader *l, sh_seq *s, const sh_token *t, bool *expected) {
    if (!*expected) SH_FAIL(SH_EPEER, "a token for a sequence that asked for none");
    if (t->index != s->n_tokens - s->n_prompt || s->n_tokens >= s->cap)
        SH_FAIL(SH_EPEER, "token %d of a sequence that has %d of %d", t->index, s->n_tokens - s->n_prompt,
                s->cap - s->n_prompt);
    if (t->id < 0 || t->id >= l->o.vocab)
        SH_FAIL(SH_EPEER, "token id %d: the vocabulary has 0 to %d", t->id, l->o.vocab - 1);
    if (t->finish == SH_FINISH_NONE && s->n_tokens + 1 == s->cap)
        SH_FAIL(SH_EPEER, "token %d is the last that was asked for and does not end its sequence", t->index);
    *expected = false;
    s->sampling_now = false;
    s->tokens[s->n_tokens++] = t->id;
    return t->finish != SH_FINISH_NONE ? finish(l, s) : SH_OK;
}

/* Forgets the dead that nothing on its way carries any more. */
static void free_dead(sh_leader *l) {
    for (sh_seq **at = &l->dead; *at;) {
        sh_seq *s = *at;
        if (s->flights > 0) {
            at = &s->next;
            continue;
        }
        *at = s->next;
        sh_seq_destroy(&s);
    }
}

static void land(sh_leader *l, const flight *f) {
    for (int i = 0; i < f->n; i++) f->seq[i]->flights--;
    free_dead(l);
    l->oldest = (l->oldest + 1) % l->depth;
    l->n_flights--;
}

sh_status sh_leader_apply(sh_leader *l, uint64_t step, const sh_token *tokens, int n,
                          void (*emit)(void *arg, uint64_t key, const sh_token *t), void *arg) {
    flight *f = &l->flights[l->oldest];
    if (l->n_flights == 0 || f->step != step)
        SH_FAIL(SH_EPEER, "an answer to micro-batch %llu: %s is next", (unsigned long long)step,
                l->n_flights ? "another" : "none");
    int at = 0; /* answers come in span order */
    for (int i = 0; i < n; i++) {
        const sh_token *t = &tokens[i];
        while (at < f->n && f->seq[at]->id != t->seq) at++;
        if (at == f->n)
            SH_FAIL(SH_EPEER, "a token for a sequence that is not in micro-batch %llu", (unsigned long long)step);
        sh_seq *s = f->seq[at];
        if (s->state == SH_SEQ_DEAD) { /* cancelled meanwhile */
            f->sampled[at] = false;
            continue;
        }
        bool fresh = true;
        if (t->score)
            SH_TRY(take_score(s, t, &fresh));
        else
            SH_TRY(take_token(l, s, t, &f->sampled[at]));
        if (fresh) emit(arg, s->key, t);
    }
    for (int i = 0; i < f->n; i++)
        if (f->sampled[i] && f->seq[i]->state != SH_SEQ_DEAD)
            SH_FAIL(SH_EPEER, "micro-batch %llu came back without a token that was asked for",
                    (unsigned long long)step);
    land(l, f);
    return SH_OK;
}

/* ---- the prefill pipeline
 * ---------------------------------------------------------------------------------------------------------- */

static sh_status cover_handed(void *arg, sh_seq *s, int32_t end) {
    return cover(arg, s, end);
}

sh_status sh_leader_next_prompts(sh_leader *l, sh_batch *b, bool *made) {
    *made = false;
    if (!l->prefill) return SH_OK;
    SH_TRY(admit(l));
    return sh_prefill_next(l->prefill, l->running, l->n_running, l->next_step - 1, cover_handed, l, b, made);
}

static sh_status landed(void *arg, sh_seq *s) {
    sh_leader *l = arg;
    if (s->state == SH_SEQ_RUNNING) {
        if (!s->handing || s->safe < s->n_tokens - 1) return SH_OK;
        s->handing = false; /* from here on its last token is a decode row */
        return sh_prefill_release(l->prefill, s);
    }
    if (s->flights > 0) return SH_OK;
    SH_TRY(let_go(l, s)); /* paused or cancelled meanwhile */
    l->n_draining--;
    if (s->state == SH_SEQ_DEAD) free_dead(l);
    return SH_OK;
}

sh_status sh_leader_confirm(sh_leader *l, uint64_t step, bool ok) {
    if (!l->prefill) SH_FAIL(SH_EPEER, "rows of prompts are confirmed: this group hands none over");
    return sh_prefill_confirm(l->prefill, step, ok, landed, l);
}

/* ---- looking on
 * ---------------------------------------------------------------------------------------------------------- */

sh_leader_state sh_leader_look(const sh_leader *l) {
    sh_leader_state s = {
        .running = l->n_running, .waiting = l->n_waiting, .in_flight = l->n_flights, .pauses = l->pauses};
    sh_kv_kind kind = l->o.kind[SH_KV_GLOBAL] ? SH_KV_GLOBAL : SH_KV_SLIDING;
    for (int k = 0; k < l->n_pools; k++) {
        s.free[kind_of(k)] += l->pool[k].free + l->pool[k].idle;
        if (kind_of(k) == kind) s.kv_free += (int64_t)sh_pages_open(&l->pool[k]) * SH_PAGE_TOKENS;
    }
    if (l->prefix) s.shared = sh_prefix_rows(l->prefix);
    for (int k = 0; l->prefill && k < SH_KV_KINDS; k++) s.prefill_free[k] = sh_prefill_free(l->prefill, (sh_kv_kind)k);
    if (l->prefill) {
        s.prompts_out = sh_prefill_out(l->prefill);
        s.redone = sh_prefill_redone(l->prefill);
    }
    return s;
}

/* Holders of each page as the sequences of a list say. */
static sh_status count_list(const sh_seq *s, int k, const sh_pages *p, int32_t *holders, int32_t *promised) {
    for (; s; s = s->next) {
        const sh_seq_pages *q = &s->kv[k];
        *promised += q->promise;
        for (int32_t j = 0; j < q->n; j++) {
            if (q->page[j] < 0 || q->page[j] >= p->total) SH_FAIL(SH_ESTATE, "page %d is held, of none", q->page[j]);
            holders[q->page[j]]++;
        }
    }
    return SH_OK;
}

static sh_status audit_pool(const sh_leader *l, int k, int32_t *holders) {
    const sh_pages *p = &l->pool[k];
    int32_t held = 0, idle = 0, paid = 0, promised = 0;
    for (int i = 0; i < l->n_running; i++) SH_TRY(count_list(l->running[i], k, p, holders, &promised));
    SH_TRY(count_list(l->waiting, k, p, holders, &promised));
    SH_TRY(count_list(l->dead, k, p, holders, &promised));
    for (int32_t i = 0; i < p->total; i++) {
        if (holders[i] != p->holders[i])
            SH_FAIL(SH_ESTATE, "pool %d: page %d has %d holders, %d on the books", k, i, holders[i], p->holders[i]);
        if (holders[i] > 1 && !l->prefix) SH_FAIL(SH_ESTATE, "pool %d: page %d is shared", k, i);
        held += holders[i] > 0;
        idle += p->kept[i] && holders[i] == 0;
        paid += p->each_pays && holders[i] > 1 ? holders[i] - 1 : 0;
    }
    if (held + p->free + idle != p->total || idle != p->idle || paid != p->paid || promised != p->promised ||
        sh_pages_open(p) < 0)
        SH_FAIL(SH_ESTATE, "pool %d: %d pages held, %d idle, %d free of %d; %d promised, %d on the books", k, held,
                idle, p->free, p->total, promised, p->promised);
    return SH_OK;
}

sh_status sh_leader_audit(const sh_leader *l) {
    for (int k = 0; k < l->n_pools; k++) {
        int32_t *holders = calloc((size_t)l->pool[k].total + 1, sizeof *holders);
        if (!holders) SH_FAIL(SH_EMEMORY, "no memory for an audit");
        sh_status st = audit_pool(l, k, holders);
        free(holders);
        if (st != SH_OK) return sh_error_pass(st, __FILE__, __LINE__);
    }
    const sh_seq *const lists[] = {l->waiting, l->dead};
    if (l->prefix) SH_TRY(sh_prefix_audit(l->prefix));
    return l->prefill ? sh_prefill_audit(l->prefill, l->running, l->n_running, lists, 2) : SH_OK;
}
