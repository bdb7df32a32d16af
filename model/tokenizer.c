/*
 * Text ⇄ ids. See tokenizer.h; the stages and their order are those of Hugging Face tokenizers: added tokens are cut
 * out, what lies between is normalised, split and encoded (bpe.h); back again, each token's text goes through the
 * decoder's steps.
 */
#include "model/tokenizer.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/file.h"
#include "common/json.h"
#include "common/limits.h"
#include "common/utf8.h"
#include "model/beside.h"
#include "model/tokenizer_int.h"

/* --- loading
 * ---------------------------------------------------------------------------------------------------------- */

void sh_tokenizer_destroy(sh_tokenizer **tp) {
    sh_tokenizer *t = *tp;
    if (!t) return;
    sh_vocab_release(&t->vocab);
    sh_bpe_release(&t->bpe);
    sh_added_release(&t->plain);
    sh_added_release(&t->normalized);
    free(t->flags);
    free(t);
    *tp = NULL;
}

/* bos_token and eos_token: a string, or an object with "content". −1 when absent; a name without an id is an error. */
static sh_status named_token(const sh_tokenizer *t, const json_t *config, const char *key, int32_t *out) {
    const json_t *j = json_object_get(config, key);
    if (json_is_object(j)) j = json_object_get(j, "content");
    *out = -1;
    if (!json_is_string(j)) return SH_OK;
    *out = sh_vocab_find(&t->vocab, json_string_value(j), json_string_length(j));
    if (*out < 0) SH_FAIL(SH_EFORMAT, "%s: '%s' is not a token of tokenizer.json", key, json_string_value(j));
    return SH_OK;
}

/* add_bos_token and add_eos_token, where given, win over the post-processor, as in transformers. */
static sh_status apply_add(const json_t *config, const char *key, int32_t id, bool front, int32_t *list, int *n) {
    const json_t *j = json_object_get(config, key);
    if (!j || json_is_null(j)) return SH_OK;
    if (!json_is_boolean(j)) SH_FAIL(SH_EFORMAT, "%s: %s is not a boolean", key, sh_json_type_name(j));
    if (json_is_true(j) && id < 0) SH_FAIL(SH_EFORMAT, "%s: true, but no such token is named", key);
    int kept = 0;
    bool has = false;
    for (int i = 0; i < *n; i++) {
        has = has || list[i] == id;
        if (json_is_true(j) || list[i] != id) list[kept++] = list[i];
    }
    *n = kept;
    if (json_is_false(j) || has) return SH_OK;
    if (*n == SH_TOK_EXTRA) SH_FAIL(SH_EUNSUPPORTED, "%s: more than %d added tokens", key, SH_TOK_EXTRA);
    if (front) memmove(list + 1, list, (size_t)*n * sizeof *list);
    list[front ? 0 : *n] = id;
    (*n)++;
    return SH_OK;
}

static sh_status read_config(sh_tokenizer *t, const char *model_dir) {
    SH_CLEANUP(sh_json_release) json_t *config = NULL;
    char what[4200];
    t->bos = t->eos = -1;
    static const char *const keys[] = {"bos_token", "eos_token", "add_bos_token", "add_eos_token", NULL};
    SH_TRY(sh_beside_members(model_dir, "tokenizer_config.json", keys, what, &config));
    if (!config) return SH_OK;
    sh_status st = named_token(t, config, "bos_token", &t->bos);
    if (st == SH_OK) st = named_token(t, config, "eos_token", &t->eos);
    if (st == SH_OK) st = apply_add(config, "add_bos_token", t->bos, true, t->prefix, &t->n_prefix);
    if (st == SH_OK) st = apply_add(config, "add_eos_token", t->eos, false, t->suffix, &t->n_suffix);
    return st == SH_OK ? st : sh_error_prefix(st, "%s", what);
}

static sh_status load_file(sh_tokenizer *t, const char *model_dir) {
    SH_CLEANUP(sh_beside_release) sh_beside b = {0};
    SH_TRY(sh_beside_read(model_dir, "tokenizer.json", SH_MAX_TOKENIZER_BYTES, &b));
    if (!b.text) return sh_file_read(b.what, SH_MAX_TOKENIZER_BYTES, &b.text, &b.len); /* says what is wrong with it */
    sh_scan s;
    sh_scan_init(&s, b.what, b.text, b.len);
    sh_status st = sh_tokenizer_parse(t, &s);
    sh_scan_release(&s);
    if (st != SH_OK && strncmp(sh_error_text(), b.what, strlen(b.what)) != 0) st = sh_error_prefix(st, "%s", b.what);
    return st;
}

sh_status sh_tokenizer_load(const char *model_dir, sh_tokenizer **out) {
    SH_CLEANUP(sh_tokenizer_destroy) sh_tokenizer *t = calloc(1, sizeof *t);
    if (!t) SH_FAIL(SH_EMEMORY, "no memory for a tokenizer");
    sh_vocab_init(&t->vocab);
    sh_added_init(&t->plain);
    sh_added_init(&t->normalized);
    SH_TRY(load_file(t, model_dir));
    SH_TRY(read_config(t, model_dir));
    *out = t;
    t = NULL;
    return SH_OK;
}

/* --- questions
 * -------------------------------------------------------------------------------------------------------- */

int sh_tokenizer_size(const sh_tokenizer *t) {
    return t->vocab.size;
}

int sh_tokenizer_id(const sh_tokenizer *t, const char *token) {
    return sh_vocab_find(&t->vocab, token, strlen(token));
}

bool sh_tokenizer_is_special(const sh_tokenizer *t, int id) {
    return id >= 0 && id < t->vocab.size && t->flags[id] & SH_TOK_SPECIAL;
}

bool sh_tokenizer_adds_bos(const sh_tokenizer *t) {
    if (t->bos < 0) return t->n_prefix > 0;
    for (int i = 0; i < t->n_prefix; i++)
        if (t->prefix[i] == t->bos) return true;
    return false;
}

void sh_ids_release(sh_ids *ids) {
    free(ids->id);
    *ids = (sh_ids){0};
}

sh_status sh_ids_add(sh_ids *ids, int32_t id) {
    if (ids->n == ids->cap) {
        size_t cap = ids->cap ? ids->cap * 2 : 64;
        int32_t *p = realloc(ids->id, cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for %zu ids", cap);
        ids->id = p;
        ids->cap = cap;
    }
    ids->id[ids->n++] = id;
    return SH_OK;
}

/* --- encoding
 * --------------------------------------------------------------------------------------------------------- */

static sh_status replace_all(const char *s, size_t n, const sh_tok_text *from, const sh_tok_text *to, sh_buf *out) {
    const char *end = s + n;
    for (const char *hit; s < end && (hit = memmem(s, (size_t)(end - s), from->s, from->n)); s = hit + from->n) {
        SH_TRY(sh_buf_add(out, s, (size_t)(hit - s)));
        SH_TRY(sh_buf_add(out, to->s, to->n));
    }
    return sh_buf_add(out, s, (size_t)(end - s));
}

sh_status sh_tokenizer_normalize(const sh_tokenizer *t, const char *s, size_t n, sh_buf *out) {
    SH_CLEANUP(sh_buf_release) sh_buf a = {0};
    SH_CLEANUP(sh_buf_release) sh_buf b = {0};
    for (int i = 0; i < t->n_normalizer; i++) {
        const sh_tok_replace *r = &t->normalizer[i];
        sh_buf *to = i + 1 == t->n_normalizer ? out : i % 2 ? &b : &a;
        if (to != out) sh_buf_clear(to);
        if (r->from.n) {
            SH_TRY(replace_all(s, n, &r->from, &r->to, to));
        } else {
            if (n) SH_TRY(sh_buf_add(to, r->to.s, r->to.n));
            SH_TRY(sh_buf_add(to, s, n));
        }
        s = (const char *)to->data;
        n = to->len;
    }
    return t->n_normalizer ? SH_OK : sh_buf_add(out, s, n);
}

static sh_status encode_piece(const sh_tokenizer *t, int step, const char *s, size_t n, sh_ids *out);

/* The splitter's open piece: grows as long as the mode says, then goes to the next step. */
typedef struct sh_split_state {
    size_t begin, end;
    bool any, was_match;
} sh_split_state;

static sh_status split_segment(const sh_tokenizer *t, int step, const char *s, size_t begin, size_t end, bool match,
                               sh_split_state *x, sh_ids *out) {
    const sh_tok_split *sp = &t->split[step];
    if (begin == end) return SH_OK;
    match = match != sp->invert;
    bool joined = (sp->mode == SH_SPLIT_PREVIOUS && match && !x->was_match) ||
                  (sp->mode == SH_SPLIT_NEXT && !match && x->was_match) ||
                  (sp->mode == SH_SPLIT_CONTIGUOUS && match == x->was_match);
    x->was_match = match;
    if (x->any && joined) {
        x->end = end;
        return SH_OK;
    }
    if (x->any) SH_TRY(encode_piece(t, step + 1, s + x->begin, x->end - x->begin, out));
    x->any = !(sp->mode == SH_SPLIT_REMOVED && match);
    x->begin = begin;
    x->end = end;
    return SH_OK;
}

static sh_status encode_piece(const sh_tokenizer *t, int step, const char *s, size_t n, sh_ids *out) {
    if (step == t->n_split) return sh_bpe_encode(&t->bpe, &t->vocab, s, n, out);
    const sh_tok_text *at = &t->split[step].at;
    sh_split_state x = {0};
    size_t i = 0;
    for (const char *hit; i < n && (hit = memmem(s + i, n - i, at->s, at->n));) {
        size_t h = (size_t)(hit - s);
        SH_TRY(split_segment(t, step, s, i, h, false, &x, out));
        SH_TRY(split_segment(t, step, s, h, h + at->n, true, &x, out));
        i = h + at->n;
    }
    SH_TRY(split_segment(t, step, s, i, n, false, &x, out));
    return x.any ? encode_piece(t, step + 1, s + x.begin, x.end - x.begin, out) : SH_OK;
}

/* Text between added tokens that are looked for in the text as given. `scratch` holds it normalised. */
static sh_status encode_text(const sh_tokenizer *t, const char *s, size_t n, sh_buf *scratch, sh_ids *out) {
    sh_buf_clear(scratch);
    SH_TRY(sh_tokenizer_normalize(t, s, n, scratch));
    const char *text = (const char *)scratch->data;
    sh_added_walk w = {0};
    sh_added_part p;
    while (sh_added_next(&t->normalized, &w, text, scratch->len, &p)) {
        if (p.id >= 0)
            SH_TRY(sh_ids_add(out, p.id));
        else
            SH_TRY(encode_piece(t, 0, text + p.begin, p.end - p.begin, out));
    }
    return SH_OK;
}

static sh_status encode_all(const sh_tokenizer *t, const char *text, size_t len, bool add_special, sh_ids *out) {
    SH_CLEANUP(sh_buf_release) sh_buf scratch = {0};
    for (int i = 0; add_special && i < t->n_prefix; i++) SH_TRY(sh_ids_add(out, t->prefix[i]));
    sh_added_walk w = {0};
    sh_added_part p;
    while (sh_added_next(&t->plain, &w, text, len, &p)) {
        if (p.id >= 0)
            SH_TRY(sh_ids_add(out, p.id));
        else
            SH_TRY(encode_text(t, text + p.begin, p.end - p.begin, &scratch, out));
    }
    for (int i = 0; add_special && i < t->n_suffix; i++) SH_TRY(sh_ids_add(out, t->suffix[i]));
    return SH_OK;
}

sh_status sh_tokenizer_encode(const sh_tokenizer *t, const char *text, size_t len, bool add_special, sh_ids *out) {
    size_t good = sh_utf8_valid((const uint8_t *)text, len), n = out->n;
    if (good < len) SH_FAIL(SH_EINPUT, "byte %zu (0x%02x): not valid UTF-8", good, (uint8_t)text[good]);
    sh_status st = encode_all(t, text, len, add_special, out);
    if (st != SH_OK) out->n = n;
    return st;
}

/* --- decoding
 * --------------------------------------------------------------------------------------------------------- */

/* The byte of a byte token (<0xE2>); −1 for other texts. */
static int byte_of(const char *s, size_t n) {
    if (n != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>') return -1;
    int v = 0;
    for (int i = 3; i < 5; i++) {
        char c = s[i];
        int d = c >= '0' && c <= '9'   ? c - '0'
                : c >= 'A' && c <= 'F' ? c - 'A' + 10
                : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                       : -1;
        if (d < 0) return -1;
        v = v * 16 + d;
    }
    return v;
}

/* Room for a token's text after replacements: on the stack for all but absurd tokens, since the step loop must not
 * allocate. */
typedef struct sh_piece_room {
    char small[2][256];
    char *large[2];
} sh_piece_room;

static void release_room(sh_piece_room *r) {
    free(r->large[0]);
    free(r->large[1]);
}

static size_t count_hits(const char *s, size_t n, const sh_tok_text *what) {
    size_t hits = 0;
    for (const char *end = s + n; (s = memmem(s, (size_t)(end - s), what->s, what->n)); s += what->n) hits++;
    return hits;
}

static void replace_into(char *to, const char *s, size_t n, const sh_tok_replace *r) {
    const char *end = s + n;
    for (const char *hit; (hit = memmem(s, (size_t)(end - s), r->from.s, r->from.n)); s = hit + r->from.n) {
        memcpy(to, s, (size_t)(hit - s));
        to += hit - s;
        memcpy(to, r->to.s, r->to.n);
        to += r->to.n;
    }
    memcpy(to, s, (size_t)(end - s));
}

/* Text of a token after the decoder's replacements: in the vocabulary itself when none applies, else in `room`. */
static sh_status piece_text(const sh_tokenizer *t, int id, sh_piece_room *room, const char **s, size_t *n) {
    room->large[0] = room->large[1] = NULL;
    const char *p = sh_vocab_text(&t->vocab, id, n);
    if (!p) SH_FAIL(SH_EINPUT, "token id %d: not in the vocabulary: allowed are 0 to %d", id, t->vocab.size - 1);
    for (int i = 0, k = 0; i < t->n_decoder; i++) {
        const sh_tok_replace *r = &t->decoder[i];
        size_t hits = count_hits(p, *n, &r->from), size = *n - hits * r->from.n + hits * r->to.n;
        if (hits == 0) continue;
        char *to = room->small[k];
        if (size > sizeof room->small[k]) {
            to = realloc(room->large[k], size);
            if (!to) SH_FAIL(SH_EMEMORY, "no memory for a token of %zu bytes", size);
            room->large[k] = to;
        }
        replace_into(to, p, *n, r);
        p = to;
        *n = size;
        k = 1 - k;
    }
    *s = p;
    return SH_OK;
}

sh_status sh_tokenizer_piece(const sh_tokenizer *t, int id, sh_buf *out) {
    SH_CLEANUP(release_room) sh_piece_room room;
    const char *s;
    size_t n;
    SH_TRY(piece_text(t, id, &room, &s, &n));
    int b = t->bytes ? byte_of(s, n) : -1;
    uint8_t byte = (uint8_t)b;
    return b >= 0 ? sh_buf_add(out, &byte, 1) : sh_buf_add(out, s, n);
}

void sh_detok_init(sh_detok *d, const sh_tokenizer *t, bool skip_special) {
    *d = (sh_detok){.tok = t, .skip_special = skip_special};
}

static sh_status emit(sh_detok *d, const char *s, size_t n, sh_buf *out) {
    const sh_tokenizer *t = d->tok;
    while (!d->any && n && d->n_stripped < t->n_strip && *s == t->strip) {
        d->n_stripped++;
        s++;
        n--;
    }
    if (n) d->any = true;
    return sh_buf_add(out, s, n);
}

static sh_status emit_bad(sh_detok *d, int n, sh_buf *out) {
    for (int i = 0; i < n; i++) SH_TRY(emit(d, "\xef\xbf\xbd", 3, out));
    return SH_OK;
}

/* Ends a run of byte tokens: what is pending is valid so far, and whole or not. */
sh_status sh_detok_flush(sh_detok *d, sh_buf *out) {
    int n = d->n_pending;
    bool whole = sh_utf8_valid(d->pending, (size_t)n) == (size_t)n;
    d->n_pending = 0;
    d->bad = false;
    return whole ? emit(d, (const char *)d->pending, (size_t)n, out) : emit_bad(d, n, out);
}

static sh_status add_byte(sh_detok *d, uint8_t byte, sh_buf *out) {
    if (d->bad) return emit_bad(d, 1, out);
    d->pending[d->n_pending++] = byte;
    size_t n = (size_t)d->n_pending, good = sh_utf8_valid(d->pending, n);
    uint32_t cp = 0;
    if (good < n && sh_utf8_next(d->pending + good, n - good, &cp) == 0) {
        d->bad = true;
        d->n_pending = 0;
        return emit_bad(d, (int)n, out);
    }
    if (n < SH_DETOK_BYTES) return SH_OK;
    SH_TRY(emit(d, (const char *)d->pending, good, out));
    memmove(d->pending, d->pending + good, n - good);
    d->n_pending = (int)(n - good);
    return SH_OK;
}

sh_status sh_detok_add(sh_detok *d, int id, sh_buf *out) {
    const sh_tokenizer *t = d->tok;
    if (d->skip_special && sh_tokenizer_is_special(t, id)) return SH_OK; /* an open run of bytes goes on behind it */
    SH_CLEANUP(release_room) sh_piece_room room;
    const char *s;
    size_t n;
    SH_TRY(piece_text(t, id, &room, &s, &n));
    int byte = t->bytes ? byte_of(s, n) : -1;
    if (byte >= 0) return add_byte(d, (uint8_t)byte, out);
    if (d->n_pending || d->bad) SH_TRY(sh_detok_flush(d, out));
    return emit(d, s, n, out);
}

sh_status sh_tokenizer_decode(const sh_tokenizer *t, const int32_t *ids, size_t n, bool skip_special, sh_buf *out) {
    sh_detok d;
    size_t len = out->len;
    sh_status st = SH_OK;
    sh_detok_init(&d, t, skip_special);
    for (size_t i = 0; i < n && st == SH_OK; i++) st = sh_detok_add(&d, ids[i], out);
    if (st == SH_OK) st = sh_detok_flush(&d, out);
    if (st != SH_OK && out->data) {
        out->len = len;
        out->data[len] = 0;
    }
    return st;
}
