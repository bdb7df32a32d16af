/*
 * A row of logits whose vocabulary lies in parts. Each part tells in a digest (bytes that travel) what its ids weigh:
 * sums of its segments and its likeliest entries. A row collects the digests and answers as draw.h does on the whole
 * row, with the same bytes; where they do not settle a question it says what to ask for: the entries of one segment, or
 * everything. Parts begin at multiples of SH_DRAW_SEGMENT, so that segments are those of the whole.
 */
#ifndef SH_MODEL_DIGEST_H
#define SH_MODEL_DIGEST_H

#include "model/draw.h"
#include "model/share.h"

#define SH_DIGEST_BEST   64   /* entries that a part tells of at least, where more than the first may matter */
#define SH_DIGEST_MARGIN 8    /* more than top_k: ties */
#define SH_DIGEST_MOST   1024 /* entries at most: who asks for more needs the row */

/* What a row will be asked, known to every part beforehand. */
typedef struct sh_digest_want {
    bool lse;          /* log-probabilities */
    float temperature; /* sums of x / temperature; 0: none */
    int best;          /* likeliest entries, 1 … SH_DIGEST_MOST */
    int32_t id;        /* the value of this one; −1: none */
} sh_digest_want;

/* Bytes of a digest of n ids at most. */
size_t sh_digest_bytes(int n);
/* The digest of x [n], ids base … base+n−1, bans applied; *bytes ≤ sh_digest_bytes(n). d is scratch, made for n ids or
 * more. n may be 0. */
void sh_digest_make(sh_draw *d, const float *x, int n, int base, const sh_digest_want *w, uint8_t *to, size_t *bytes);

typedef struct sh_row sh_row;
typedef struct sh_row_ask {
    enum { SH_ASK_NOTHING, SH_ASK_SEGMENT, SH_ASK_ALL } kind;
    int segment;
} sh_row_ask;

sh_status sh_row_create(int vocab, int parts, sh_row **out);
void sh_row_destroy(sh_row **r);
/* Collecting: clear, add the digest of each part in the order of ids (all is checked: SH_EPEER), then join. *used: its
 * bytes of the `len` given. */
void sh_row_clear(sh_row *r);
sh_status sh_row_add(sh_row *r, sh_range ids, const uint8_t *digest, size_t len, size_t *used);
sh_status sh_row_join(sh_row *r);
/* What was asked for, after the bans; borrowed until clear. */
void sh_row_give_segment(sh_row *r, int segment, const float *x);
void sh_row_give_all(sh_row *r, float *x);
float *sh_row_all(const sh_row *r); /* [vocab]; NULL until given: then draw.h answers */

/* As their namesakes in draw.h. With ask->kind other than SH_ASK_NOTHING there is no answer yet. */
sh_status sh_row_lse(const sh_row *r, sh_lse *out);
int sh_row_top(sh_row *r, sh_lse l, int k, sh_top_logprob *out, sh_row_ask *ask);
sh_status sh_row_id(sh_row *r, const sh_sampling *p, double u, int32_t *id, sh_row_ask *ask);
/* The logit of an id that sh_row_id chose, or that was wanted. SH_ESTATE: not among what is known. */
sh_status sh_row_value(const sh_row *r, int32_t id, float *out);

#endif
