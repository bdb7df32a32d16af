/*
 * Added tokens: words that are looked for in the text itself before it is tokenised, as Hugging Face tokenizers'
 * AddedVocabulary does. Leftmost match first, the longest of those that start there; then the token's own conditions
 * (single_word) and the white space it swallows (lstrip, rstrip).
 */
#ifndef SH_MODEL_ADDED_H
#define SH_MODEL_ADDED_H

#include <stdbool.h>
#include <stdint.h>
#include "common/status.h"

typedef struct sh_added_token {
    int32_t id;
    bool special, normalized, lstrip, rstrip, single_word;
} sh_added_token;

typedef struct sh_added_node {
    int32_t child, sibling; /* −1: none */
    int32_t token;          /* index of the token that ends here; −1: none */
    uint8_t byte;
} sh_added_node;

typedef struct sh_added {
    sh_added_token *token;
    int32_t n, cap;
    sh_added_node *node;
    int32_t n_nodes, node_cap;
    int32_t root[256]; /* node of each first byte; −1: none */
} sh_added;

/* A stretch of text: an added token's (id ≥ 0) or ordinary text (id −1). */
typedef struct sh_added_part {
    size_t begin, end;
    int32_t id;
} sh_added_part;

void sh_added_init(sh_added *a);
void sh_added_release(sh_added *a);
/* Adds a token under the text that is to be looked for (1 to SH_MAX_ADDED_TOKEN bytes; the earlier of two equal texts
 * counts). */
sh_status sh_added_add(sh_added *a, const sh_added_token *t, const char *text, size_t n);
/* Where a walk over a text stands; {0} at first. */
typedef struct sh_added_walk {
    size_t search, start; /* where to look on; where text not yet handed out begins */
    sh_added_part held;   /* a match found behind ordinary text */
    bool has_held;
} sh_added_walk;
/* The next stretch of text[0..n); false at the end. Matches may overlap what an earlier rstrip has swallowed, as they
 * do in the original. */
bool sh_added_next(const sh_added *a, sh_added_walk *w, const char *text, size_t n, sh_added_part *out);

#endif
