/* Added tokens. See added.h. */
#include "model/added.h"

#include <stdlib.h>

#include "common/limits.h"
#include "common/utf8.h"
#include "model/unicode.h"

void sh_added_init(sh_added *a) {
    *a = (sh_added){0};
    for (int i = 0; i < 256; i++) a->root[i] = -1;
}

void sh_added_release(sh_added *a) {
    free(a->token);
    free(a->node);
    sh_added_init(a);
}

static sh_status new_node(sh_added *a, uint8_t byte, int32_t sibling, int32_t *out) {
    if (a->n_nodes == a->node_cap) {
        int32_t cap = a->node_cap ? a->node_cap * 2 : 256;
        if (cap > 1 << 28) SH_FAIL(SH_ELIMIT, "added_tokens: over the limit of %d bytes in all", 1 << 28);
        sh_added_node *p = realloc(a->node, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for added tokens");
        a->node = p;
        a->node_cap = cap;
    }
    a->node[a->n_nodes] = (sh_added_node){.child = -1, .sibling = sibling, .token = -1, .byte = byte};
    *out = a->n_nodes++;
    return SH_OK;
}

static int32_t find_child(const sh_added *a, int32_t node, uint8_t byte) {
    int32_t c = a->node[node].child;
    while (c >= 0 && a->node[c].byte != byte) c = a->node[c].sibling;
    return c;
}

sh_status sh_added_add(sh_added *a, const sh_added_token *t, const char *text, size_t n) {
    if (n == 0 || n > SH_MAX_ADDED_TOKEN)
        SH_FAIL(SH_ELIMIT, "content: %zu bytes: allowed are 1 to %d", n, SH_MAX_ADDED_TOKEN);
    if (a->n == a->cap) {
        int32_t cap = a->cap ? a->cap * 2 : 64;
        sh_added_token *p = realloc(a->token, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for added tokens");
        a->token = p;
        a->cap = cap;
    }
    int32_t node = a->root[(uint8_t)text[0]];
    if (node < 0) {
        SH_TRY(new_node(a, (uint8_t)text[0], -1, &node));
        a->root[(uint8_t)text[0]] = node;
    }
    for (size_t i = 1; i < n; i++) {
        int32_t child = find_child(a, node, (uint8_t)text[i]);
        if (child < 0) {
            SH_TRY(new_node(a, (uint8_t)text[i], a->node[node].child, &child));
            a->node[node].child = child;
        }
        node = child;
    }
    a->token[a->n] = *t;
    if (a->node[node].token < 0) a->node[node].token = a->n;
    a->n++;
    return SH_OK;
}

/* The longest token that starts at p: its index and length; −1: none. */
static int32_t match_at(const sh_added *a, const char *p, size_t n, size_t *len) {
    int32_t best = -1, node = a->root[(uint8_t)p[0]];
    for (size_t i = 1; node >= 0; i++) {
        if (a->node[node].token >= 0) {
            best = a->node[node].token;
            *len = i;
        }
        if (i == n) break;
        node = find_child(a, node, (uint8_t)p[i]);
    }
    return best;
}

static bool word_before(const char *text, size_t at) {
    size_t i = at;
    while (i > 0 && ((uint8_t)text[i - 1] & 0xc0) == 0x80) i--;
    uint32_t cp = 0;
    return i > 0 && sh_utf8_next((const uint8_t *)text + i - 1, at - i + 1, &cp) > 0 && sh_unicode_is_word(cp);
}

static bool word_after(const char *text, size_t at, size_t n) {
    uint32_t cp = 0;
    return at < n && sh_utf8_next((const uint8_t *)text + at, n - at, &cp) > 0 && sh_unicode_is_word(cp);
}

static size_t space_before(const char *text, size_t at) {
    for (;;) {
        size_t i = at;
        uint32_t cp = 0;
        while (i > 0 && ((uint8_t)text[i - 1] & 0xc0) == 0x80) i--;
        if (i == 0 || sh_utf8_next((const uint8_t *)text + i - 1, at - i + 1, &cp) <= 0 || !sh_unicode_is_space(cp))
            return at;
        at = i - 1;
    }
}

static size_t space_after(const char *text, size_t at, size_t n) {
    uint32_t cp = 0;
    int k;
    while (at < n && (k = sh_utf8_next((const uint8_t *)text + at, n - at, &cp)) > 0 && sh_unicode_is_space(cp))
        at += (size_t)k;
    return at;
}

/* The next match from w->search on, with its white space; false: none. */
static bool find_match(const sh_added *a, sh_added_walk *w, const char *text, size_t n, sh_added_part *out) {
    if (a->n == 0) return false;
    while (w->search < n) {
        size_t begin = w->search, len = 0;
        int32_t k = match_at(a, text + begin, n - begin, &len);
        if (k < 0) {
            w->search++;
            continue;
        }
        const sh_added_token *t = &a->token[k];
        size_t end = begin + len;
        w->search = end;
        if (t->single_word && (word_before(text, begin) || word_after(text, end, n))) continue;
        if (t->lstrip) {
            begin = space_before(text, begin);
            if (begin < w->start) begin = w->start; /* an earlier match has taken them */
        }
        if (t->rstrip) end = space_after(text, end, n);
        if (begin >= end) continue; /* an earlier rstrip has swallowed it whole */
        *out = (sh_added_part){begin, end, t->id};
        return true;
    }
    return false;
}

bool sh_added_next(const sh_added *a, sh_added_walk *w, const char *text, size_t n, sh_added_part *out) {
    if (w->has_held) {
        w->has_held = false;
        *out = w->held;
        return true;
    }
    sh_added_part m;
    if (find_match(a, w, text, n, &m)) {
        bool text_first = w->start < m.begin;
        sh_added_part before = {w->start, m.begin, -1};
        w->start = m.end;
        w->held = m;
        w->has_held = text_first;
        *out = text_first ? before : m;
        return true;
    }
    if (w->start >= n) return false;
    *out = (sh_added_part){w->start, n, -1};
    w->start = n;
    return true;
}
