/* Byte-pair encoding. See bpe.h. */
#include "model/bpe.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/hash.h"
#include "common/utf8.h"

enum { SHORT_PART = 40 }; /* symbols up to which scanning beats a heap (measured on prose: parts are words) */

/* --- building -------------------------------------------------------------------------------------------------------
 */

/* Characters fall into classes: ASCII one each, ▁ its own, the others share the rest. Sharing only makes more borders
 * look crossable than are. */
static uint8_t char_class(uint32_t cp) {
    if (cp < 128) return (uint8_t)cp;
    return cp == 0x2581 ? 128 : (uint8_t)(129 + cp % 127);
}

static void classify(const char *s, size_t n, uint8_t *first, uint8_t *last) {
    uint32_t cp = 0;
    *first = *last = 0;
    if (n == 0) return;
    if (sh_utf8_next((const uint8_t *)s, n, &cp) > 0) *first = char_class(cp);
    size_t at = n - 1;
    while (at > 0 && ((uint8_t)s[at] & 0xc0) == 0x80) at--;
    if (sh_utf8_next((const uint8_t *)s + at, n - at, &cp) > 0) *last = char_class(cp);
}

static sh_status map_char(sh_bpe *b, uint32_t cp, int32_t id) {
    int32_t **page = &b->page[cp >> 8];
    if (!*page) *page = calloc(256, sizeof **page);
    if (!*page) SH_FAIL(SH_EMEMORY, "no memory for a table of characters");
    (*page)[cp & 0xff] = id + 1;
    return SH_OK;
}

static sh_status map_chars(sh_bpe *b, const sh_vocab *v) {
    for (int32_t id = 0; id < v->size; id++) {
        size_t n;
        const char *s = sh_vocab_text(v, id, &n);
        if (!s) continue;
        classify(s, n, &b->first[id], &b->last[id]);
        uint32_t cp = 0;
        if (n > 0 && sh_utf8_next((const uint8_t *)s, n, &cp) == (int)n) SH_TRY(map_char(b, cp, id));
    }
    for (int i = 0; i < 256; i++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", i);
        b->byte_id[i] = sh_vocab_find(v, name, 6);
    }
    return SH_OK;
}

sh_status sh_bpe_init(sh_bpe *b, const sh_vocab *v, uint64_t n_merges) {
    *b = (sh_bpe){.unk = -1, .size = v->size, .merges = 1024};
    while (b->merges < n_merges * 2) b->merges *= 2;
    b->merge = malloc(b->merges * sizeof *b->merge);
    b->first = calloc((size_t)v->size + 1, 1);
    b->last = calloc((size_t)v->size + 1, 1);
    if (!b->merge || !b->first || !b->last)
        SH_FAIL(SH_EMEMORY, "no memory for %llu merges", (unsigned long long)n_merges);
    memset(b->merge, 0xff, b->merges * sizeof *b->merge);
    return map_chars(b, v);
}

void sh_bpe_release(sh_bpe *b) {
    for (int i = 0; i < SH_BPE_PAGES; i++) free(b->page[i]);
    free(b->merge);
    free(b->first);
    free(b->last);
    *b = (sh_bpe){.unk = -1};
}

/* The pair's slot, or the empty one where it belongs. The table is at most half full. */
static inline const sh_merge *find_merge(const sh_bpe *b, uint64_t pair) {
    for (uint64_t i = sh_mix64(pair) & (b->merges - 1);; i = (i + 1) & (b->merges - 1)) {
        const sh_merge *m = &b->merge[i];
        if (m->pair == pair || m->pair == UINT64_MAX) return m;
    }
}

static inline uint64_t pair_of(int32_t left, int32_t right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

sh_status sh_bpe_add_merge(sh_bpe *b, const sh_vocab *v, uint32_t rank, int32_t left, int32_t right) {
    char small[256], *joined = small;
    size_t nl, nr;
    const char *l = sh_vocab_text(v, left, &nl), *r = sh_vocab_text(v, right, &nr);
    if (b->n_merges * 2 >= b->merges) SH_FAIL(SH_ESTATE, "more merges than announced");
    if (nl + nr > sizeof small) joined = malloc(nl + nr);
    if (!joined) SH_FAIL(SH_EMEMORY, "no memory for a token of %zu bytes", nl + nr);
    memcpy(joined, l, nl);
    memcpy(joined + nl, r, nr);
    int32_t id = sh_vocab_find(v, joined, nl + nr);
    if (joined != small) free(joined);
    if (id < 0)
        SH_FAIL(SH_EFORMAT, "'%.*s' + '%.*s' is not in the vocabulary", (int)(nl < 80 ? nl : 80), l,
                (int)(nr < 80 ? nr : 80), r);
    sh_merge *m = &b->merge[find_merge(b, pair_of(left, right)) - b->merge];
    if (m->pair == UINT64_MAX) b->n_merges++;
    *m = (sh_merge){pair_of(left, right), rank, id};
    uint8_t x = b->last[left], y = b->first[right];
    b->crosses[x][y / 64] |= (uint64_t)1 << (y % 64);
    return SH_OK;
}

/* --- encoding: characters to symbols --------------------------------------------------------------------------------
 */

static inline int32_t char_id(const sh_bpe *b, uint32_t cp) {
    const int32_t *page = b->page[cp >> 8];
    return page ? page[cp & 0xff] - 1 : -1;
}

/* Appends the symbols of one character that is no token; *pending counts unknown characters not yet written. The
 * original writes a pending unknown in front of the next character that is a token, but behind bytes; so does this. */
static sh_status add_unknown(const sh_bpe *b, const uint8_t *s, int n, size_t *pending, sh_ids *out) {
    bool bytes = b->byte_fallback;
    for (int i = 0; i < n; i++) bytes = bytes && b->byte_id[s[i]] >= 0;
    if (bytes) {
        for (int i = 0; i < n; i++) SH_TRY(sh_ids_add(out, b->byte_id[s[i]]));
        return SH_OK;
    }
    if (b->unk < 0) return SH_OK;
    if (*pending && !b->fuse_unk) SH_TRY(sh_ids_add(out, b->unk));
    *pending = 1;
    return SH_OK;
}

static sh_status to_symbols(const sh_bpe *b, const uint8_t *s, size_t n, sh_ids *out) {
    size_t pending = 0;
    for (size_t i = 0; i < n;) {
        uint32_t cp = 0;
        int k = sh_utf8_next(s + i, n - i, &cp);
        if (k <= 0) SH_FAIL(SH_EINPUT, "byte %zu: not valid UTF-8", i);
        int32_t id = char_id(b, cp);
        if (id < 0) {
            SH_TRY(add_unknown(b, s + i, k, &pending, out));
        } else {
            if (pending) SH_TRY(sh_ids_add(out, b->unk));
            pending = 0;
            SH_TRY(sh_ids_add(out, id));
        }
        i += (size_t)k;
    }
    if (pending) SH_TRY(sh_ids_add(out, b->unk));
    return SH_OK;
}

/* --- encoding: joining ----------------------------------------------------------------------------------------------
 */

/* Joins in place by scanning for the lowest rank; returns how many ids remain. n ≤ SHORT_PART. */
static size_t join_short(const sh_bpe *b, int32_t *id, size_t n) {
    const sh_merge *m[SHORT_PART];
    for (size_t i = 0; i + 1 < n; i++) m[i] = find_merge(b, pair_of(id[i], id[i + 1]));
    while (n > 1) {
        uint32_t best = UINT32_MAX; /* an empty slot's rank: never chosen */
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++)
            if (m[i]->rank < best) {
                best = m[i]->rank;
                at = i;
            }
        if (best == UINT32_MAX) break;
        id[at] = m[at]->id;
        memmove(id + at + 1, id + at + 2, (n - at - 2) * sizeof *id);
        if (at + 2 < n) memmove(m + at, m + at + 1, (n - at - 2) * sizeof *m);
        n--;
        if (at > 0) m[at - 1] = find_merge(b, pair_of(id[at - 1], id[at]));
        if (at + 1 < n) m[at] = find_merge(b, pair_of(id[at], id[at + 1]));
    }
    return n;
}

/* A pair that may be joined; stale when either symbol changed meanwhile, which the joined id tells (as in the original:
 * the text from a symbol's start to the end of its neighbour only grows, so an equal joined id means an unchanged
 * pair). */
typedef struct sh_join {
    uint32_t rank, at;
    int32_t id;
} sh_join;

typedef struct sh_joiner {
    const sh_bpe *b;
    int32_t *id;           /* −1: joined into an earlier one */
    uint32_t *prev, *next; /* UINT32_MAX: none */
    sh_join *heap;
    size_t n_heap;
} sh_joiner;

static inline bool join_before(const sh_join *x, const sh_join *y) {
    return x->rank != y->rank ? x->rank < y->rank : x->at < y->at;
}

static void heap_push(sh_joiner *j, sh_join x) {
    size_t i = j->n_heap++;
    for (; i > 0 && join_before(&x, &j->heap[(i - 1) / 2]); i = (i - 1) / 2) j->heap[i] = j->heap[(i - 1) / 2];
    j->heap[i] = x;
}

static sh_join heap_pop(sh_joiner *j) {
    sh_join top = j->heap[0], x = j->heap[--j->n_heap];
    size_t i = 0;
    for (size_t c; (c = 2 * i + 1) < j->n_heap; i = c) {
        if (c + 1 < j->n_heap && join_before(&j->heap[c + 1], &j->heap[c])) c++;
        if (!join_before(&j->heap[c], &x)) break;
        j->heap[i] = j->heap[c];
    }
    j->heap[i] = x;
    return top;
}

static void offer(sh_joiner *j, uint32_t at) {
    uint32_t next = j->next[at];
    if (next == UINT32_MAX) return;
    const sh_merge *m = find_merge(j->b, pair_of(j->id[at], j->id[next]));
    if (m->pair != UINT64_MAX) heap_push(j, (sh_join){m->rank, at, m->id});
}

static void join_all(sh_joiner *j, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        j->prev[i] = i ? i - 1 : UINT32_MAX;
        j->next[i] = i + 1 < n ? i + 1 : UINT32_MAX;
    }
    for (uint32_t i = 0; i < n; i++) offer(j, i);
    while (j->n_heap) {
        sh_join x = heap_pop(j);
        uint32_t next = j->id[x.at] < 0 ? UINT32_MAX : j->next[x.at];
        if (next == UINT32_MAX) continue;
        const sh_merge *m = find_merge(j->b, pair_of(j->id[x.at], j->id[next]));
        if (m->pair == UINT64_MAX || m->id != x.id) continue;
        j->id[x.at] = x.id;
        j->id[next] = -1;
        uint32_t after = j->next[next];
        j->next[x.at] = after;
        if (after != UINT32_MAX) j->prev[after] = x.at;
        if (j->prev[x.at] != UINT32_MAX) offer(j, j->prev[x.at]);
        offer(j, x.at);
    }
}

/* Joins n symbols in place by a heap; *left: how many ids remain. */
static sh_status join_long(const sh_bpe *b, int32_t *id, size_t n, size_t *left) {
    sh_joiner j = {.b = b, .id = id};
    j.prev = malloc(n * sizeof *j.prev);
    j.next = malloc(n * sizeof *j.next);
    j.heap = malloc(3 * n * sizeof *j.heap); /* n − 1 at first and at most two per join */
    bool ok = j.prev && j.next && j.heap;
    if (ok) {
        join_all(&j, (uint32_t)n);
        size_t k = 0;
        for (size_t i = 0; i < n; i++)
            if (id[i] >= 0) id[k++] = id[i];
        *left = k;
    }
    free(j.prev);
    free(j.next);
    free(j.heap);
    if (!ok) SH_FAIL(SH_EMEMORY, "no memory to tokenise %zu characters", n);
    return SH_OK;
}

static inline bool may_cross(const sh_bpe *b, int32_t left, int32_t right) {
    uint8_t x = b->last[left], y = b->first[right];
    return b->crosses[x][y / 64] >> (y % 64) & 1;
}

sh_status sh_bpe_encode(const sh_bpe *b, const sh_vocab *v, const char *s, size_t n, sh_ids *out) {
    if (n >= UINT32_MAX) SH_FAIL(SH_ELIMIT, "text of %zu bytes: allowed are %u", n, UINT32_MAX - 1);
    if (b->ignore_merges) {
        int32_t whole = sh_vocab_find(v, s, n);
        if (whole >= 0 && whole < b->size) return sh_ids_add(out, whole);
    }
    size_t begin = out->n, write = begin;
    SH_TRY(to_symbols(b, (const uint8_t *)s, n, out));
    for (size_t i = begin; i < out->n;) {
        size_t end = i + 1, left = 0;
        while (end < out->n && may_cross(b, out->id[end - 1], out->id[end])) end++;
        if (end - i <= SHORT_PART)
            left = join_short(b, out->id + i, end - i);
        else
            SH_TRY(join_long(b, out->id + i, end - i, &left));
        memmove(out->id + write, out->id + i, left * sizeof *out->id);
        write += left;
        i = end;
    }
    out->n = write;
    return SH_OK;
}
