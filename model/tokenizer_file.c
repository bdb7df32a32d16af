/*
 * tokenizer.json → tokenizer. The vocabulary and the merges are read by a forward scanner, since as a tree they would
 * take seconds and half a gigabyte; all else is small and read as a tree. What is not understood is refused by name: a
 * tokenizer that is nearly right gives wrong ids without a word.
 */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/file.h"
#include "common/json.h"
#include "common/limits.h"
#include "common/scan.h"
#include "model/tokenizer_int.h"

/* --- small helpers --------------------------------------------------------------------------------------------------
 */

static sh_status unsupported(const char *field, const json_t *type) {
    const char *t = json_is_string(type) ? json_string_value(type) : sh_json_type_name(type);
    SH_FAIL(SH_EUNSUPPORTED, "%s: '%s' is not supported", field, t);
}

static sh_status read_text(const char *field, const json_t *j, sh_tok_text *out) {
    if (!json_is_string(j)) SH_FAIL(SH_EFORMAT, "%s: %s is not a string", field, sh_json_type_name(j));
    size_t n = json_string_length(j);
    if (n > SH_TOK_TEXT) SH_FAIL(SH_ELIMIT, "%s: %zu bytes: allowed are %d", field, n, SH_TOK_TEXT);
    memcpy(out->s, json_string_value(j), n);
    out->n = n;
    return SH_OK;
}

/* {"String": "…"}, not empty. */
static sh_status read_pattern(const char *field, const json_t *step, sh_tok_text *out) {
    char name[96];
    snprintf(name, sizeof name, "%s.pattern", field);
    const json_t *p = json_object_get(step, "pattern"), *s = json_object_get(p, "String");
    if (!s) SH_FAIL(SH_EUNSUPPORTED, "%s: only {\"String\": …} is supported", name);
    SH_TRY(read_text(name, s, out));
    if (out->n == 0) SH_FAIL(SH_EUNSUPPORTED, "%s: an empty string is not supported", name);
    return SH_OK;
}

/* Calls read(t, field, step) on a step, or on each of a Sequence under `list`. */
typedef sh_status step_reader(sh_tokenizer *t, const char *field, const json_t *step);
static sh_status read_steps(sh_tokenizer *t, const char *field, const char *list, const json_t *j, step_reader *read,
                            int depth) {
    const json_t *type = json_object_get(j, "type");
    if (!json_is_string(type)) return unsupported(field, type ? type : j);
    if (strcmp(json_string_value(type), "Sequence") != 0) return read(t, field, j);
    const json_t *steps = json_object_get(j, list);
    if (!json_is_array(steps) || depth > 4)
        SH_FAIL(SH_EFORMAT, "%s.%s: %s is not an array", field, list, sh_json_type_name(steps));
    for (size_t i = 0; i < json_array_size(steps); i++) {
        char name[96];
        snprintf(name, sizeof name, "%.40s.%.20s[%zu]", field, list, i);
        SH_TRY(read_steps(t, name, list, json_array_get(steps, i), read, depth + 1));
    }
    return SH_OK;
}

static sh_status full(const char *field) {
    SH_FAIL(SH_EUNSUPPORTED, "%s: more than %d steps are not supported", field, SH_TOK_STEPS);
}

static bool step_is(const json_t *step, const char *type) {
    return strcmp(json_string_value(json_object_get(step, "type")), type) == 0;
}

/* --- normalizer, pre_tokenizer, decoder, post_processor
 * --------------------------------------------------------------- */

static sh_status read_normalizer(sh_tokenizer *t, const char *field, const json_t *step) {
    if (t->n_normalizer == SH_TOK_STEPS) return full(field);
    sh_tok_replace r = {0};
    if (step_is(step, "Prepend")) {
        SH_TRY(read_text("normalizer.prepend", json_object_get(step, "prepend"), &r.to));
    } else if (step_is(step, "Replace")) {
        SH_TRY(read_pattern(field, step, &r.from));
        SH_TRY(read_text("normalizer.content", json_object_get(step, "content"), &r.to));
    } else {
        return unsupported(field, json_object_get(step, "type"));
    }
    t->normalizer[t->n_normalizer++] = r;
    return SH_OK;
}

static sh_status read_pre_tokenizer(sh_tokenizer *t, const char *field, const json_t *step) {
    static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    if (!step_is(step, "Split")) return unsupported(field, json_object_get(step, "type"));
    if (t->n_split == SH_TOK_STEPS) return full(field);
    sh_tok_split s = {0};
    SH_TRY(read_pattern(field, step, &s.at));
    const char *mode = NULL;
    SH_TRY(sh_json_string(step, "behavior", &mode));
    SH_TRY(sh_json_bool(step, "invert", &s.invert));
    int m = 0;
    while (m < 5 && (!mode || strcmp(mode, names[m]) != 0)) m++;
    if (m == 5) SH_FAIL(SH_EUNSUPPORTED, "%s.behavior: '%s' is not supported", field, mode ? mode : "null");
    s.mode = (sh_split_mode)m;
    t->split[t->n_split++] = s;
    return SH_OK;
}

/* Steps before ByteFallback work token by token, steps behind Fuse on the whole text. `strip`'s count doubles as the
 * mark that Fuse was seen: −1 before. */
static sh_status read_decoder(sh_tokenizer *t, const char *field, const json_t *step) {
    bool fused = t->n_strip >= 0;
    if (step_is(step, "Replace") && !t->bytes && !fused) {
        if (t->n_decoder == SH_TOK_STEPS) return full(field);
        sh_tok_replace *r = &t->decoder[t->n_decoder];
        SH_TRY(read_pattern(field, step, &r->from));
        SH_TRY(read_text("decoder.content", json_object_get(step, "content"), &r->to));
        t->n_decoder++;
    } else if (step_is(step, "ByteFallback") && !t->bytes && !fused) {
        t->bytes = true;
    } else if (step_is(step, "Fuse") && !fused) {
        t->n_strip = 0;
    } else if (step_is(step, "Strip") && fused && t->n_strip == 0) {
        sh_tok_text c;
        int64_t start = 0, stop = 0;
        SH_TRY(read_text("decoder.content", json_object_get(step, "content"), &c));
        SH_TRY(sh_json_int(step, "start", 0, 1000, &start));
        SH_TRY(sh_json_int(step, "stop", 0, 1000, &stop));
        if (c.n != 1 || stop != 0)
            SH_FAIL(SH_EUNSUPPORTED, "%s: Strip is supported for one ASCII character at the start only", field);
        t->strip = c.s[0];
        t->n_strip = (int)start;
    } else {
        SH_FAIL(SH_EUNSUPPORTED,
                "%s: '%s' is not supported here (known: Replace …, ByteFallback, Fuse, Strip, in this order)", field,
                json_string_value(json_object_get(step, "type")));
    }
    return SH_OK;
}

static sh_status add_extra(int32_t *list, int *n, int64_t id, const char *field) {
    if (*n == SH_TOK_EXTRA) SH_FAIL(SH_EUNSUPPORTED, "%s: more than %d tokens are not supported", field, SH_TOK_EXTRA);
    list[(*n)++] = (int32_t)id;
    return SH_OK;
}

/* Ids of one {"SpecialToken": {"id": name}} are listed under special_tokens[name].ids. */
static sh_status read_special(sh_tokenizer *t, const json_t *p, const char *name, bool before) {
    const json_t *ids = json_object_get(json_object_get(json_object_get(p, "special_tokens"), name), "ids");
    if (!json_is_array(ids)) SH_FAIL(SH_EFORMAT, "post_processor.special_tokens: '%s' has no ids", name);
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);
        size_t n;
        json_int_t v = json_is_integer(id) ? json_integer_value(id) : -1;
        if (v < 0 || v >= t->vocab.size || !sh_vocab_text(&t->vocab, (int32_t)v, &n))
            SH_FAIL(SH_EFORMAT, "post_processor.special_tokens: an id of '%s' is not in the vocabulary", name);
        if (before)
            SH_TRY(add_extra(t->prefix, &t->n_prefix, v, "post_processor.single"));
        else
            SH_TRY(add_extra(t->suffix, &t->n_suffix, v, "post_processor.single"));
    }
    return SH_OK;
}

static sh_status read_post_processor(sh_tokenizer *t, const json_t *p) {
    const json_t *type = json_object_get(p, "type");
    if (!json_is_string(type) || strcmp(json_string_value(type), "TemplateProcessing") != 0)
        return unsupported("post_processor", type ? type : p);
    const json_t *single = json_object_get(p, "single");
    if (!json_is_array(single)) SH_FAIL(SH_EUNSUPPORTED, "post_processor.single: only an array is supported");
    bool before = true;
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *item = json_array_get(single, i), *special = json_object_get(item, "SpecialToken");
        const json_t *name = json_object_get(special, "id");
        if (json_is_string(name))
            SH_TRY(read_special(t, p, json_string_value(name), before));
        else if (json_object_get(item, "Sequence") && before)
            before = false;
        else
            SH_FAIL(SH_EUNSUPPORTED, "post_processor.single[%zu]: not a SpecialToken nor the one Sequence", i);
    }
    if (before) SH_FAIL(SH_EFORMAT, "post_processor.single: no Sequence");
    return SH_OK;
}

/* --- model
 * ------------------------------------------------------------------------------------------------------------ */

static sh_status read_vocab(sh_tokenizer *t, sh_scan *s) {
    sh_status st;
    SH_TRY(sh_scan_open(s, '{'));
    while (sh_scan_more(s, '}', &st)) {
        sh_span key;
        uint64_t id = 0;
        SH_TRY(sh_scan_key(s, &key));
        /* The key may live in the scanner's buffer; a number does not disturb it. */
        SH_TRY(sh_scan_uint(s, SH_MAX_VOCAB - 1, &id));
        st = sh_vocab_add(&t->vocab, (int32_t)id, key.p, key.n);
        if (st != SH_OK) return sh_error_prefix(st, "model.vocab");
    }
    return st;
}

static sh_status find_part(const sh_tokenizer *t, sh_span part, uint32_t rank, int32_t *id) {
    *id = sh_vocab_find(&t->vocab, part.p, part.n);
    if (*id < 0)
        SH_FAIL(SH_EFORMAT, "model.merges[%u]: '%.*s' is not in the vocabulary", rank, (int)(part.n < 80 ? part.n : 80),
                part.p);
    return SH_OK;
}

/* "a b" (neither part holds a space) or ["a", "b"]. */
static sh_status read_merge(sh_tokenizer *t, sh_scan *s, uint32_t rank) {
    sh_span a;
    sh_status st;
    int32_t left = -1, right = -1;
    if (sh_scan_peek(s) == '"') {
        SH_TRY(sh_scan_string(s, &a));
        const char *space = memchr(a.p, ' ', a.n);
        size_t n = space ? (size_t)(space - a.p) : 0;
        if (!space || memchr(space + 1, ' ', a.n - n - 1))
            SH_FAIL(SH_EFORMAT, "model.merges[%u]: not two tokens with one space between", rank);
        SH_TRY(find_part(t, (sh_span){a.p, n}, rank, &left));
        SH_TRY(find_part(t, (sh_span){space + 1, a.n - n - 1}, rank, &right));
    } else {
        int k = 0;
        SH_TRY(sh_scan_open(s, '['));
        for (; sh_scan_more(s, ']', &st); k++) {
            SH_TRY(sh_scan_string(s, &a));
            SH_TRY(find_part(t, a, rank, k ? &right : &left));
        }
        SH_TRY(st);
        if (k != 2) SH_FAIL(SH_EFORMAT, "model.merges[%u]: %d tokens in place of two", rank, k);
    }
    st = sh_bpe_add_merge(&t->bpe, &t->vocab, rank, left, right);
    return st == SH_OK ? st : sh_error_prefix(st, "model.merges[%u]", rank);
}

/* `span` holds the merges; they are counted first, so that the table is made once. */
static sh_status read_merges(sh_tokenizer *t, const char *what, sh_span span) {
    sh_scan s;
    sh_status st;
    sh_span ignored;
    uint64_t n = 0;
    sh_scan_init(&s, what, span.p, span.n);
    st = sh_scan_open(&s, '[');
    for (; st == SH_OK && sh_scan_more(&s, ']', &st); n++) st = sh_scan_skip(&s, &ignored);
    sh_scan_release(&s);
    SH_TRY(st);
    SH_TRY(sh_bpe_init(&t->bpe, &t->vocab, n));
    sh_scan_init(&s, what, span.p, span.n);
    st = sh_scan_open(&s, '[');
    for (uint32_t rank = 0; st == SH_OK && sh_scan_more(&s, ']', &st); rank++) st = read_merge(t, &s, rank);
    sh_scan_release(&s);
    return st;
}

/* A member of `model` other than vocab and merges, which must say what it always says in files like Gemma's. */
static sh_status check_absent(const json_t *model, const char *key) {
    const json_t *v = json_object_get(model, key);
    bool none = !v || json_is_null(v) || json_is_false(v) || (json_is_string(v) && json_string_length(v) == 0) ||
                (json_is_number(v) && json_number_value(v) == 0);
    if (!none) SH_FAIL(SH_EUNSUPPORTED, "model.%s: only null is supported", key);
    return SH_OK;
}

static sh_status read_model_options(sh_tokenizer *t, const json_t *model) {
    const json_t *type = json_object_get(model, "type");
    if (type && (!json_is_string(type) || strcmp(json_string_value(type), "BPE") != 0))
        return unsupported("model.type", type);
    SH_TRY(check_absent(model, "dropout"));
    SH_TRY(check_absent(model, "continuing_subword_prefix"));
    SH_TRY(check_absent(model, "end_of_word_suffix"));
    SH_TRY(sh_json_bool(model, "byte_fallback", &t->bpe.byte_fallback));
    SH_TRY(sh_json_bool(model, "fuse_unk", &t->bpe.fuse_unk));
    SH_TRY(sh_json_bool(model, "ignore_merges", &t->bpe.ignore_merges));
    const char *unk = NULL;
    SH_TRY(sh_json_string(model, "unk_token", &unk));
    if (!unk) return SH_OK;
    t->bpe.unk = sh_vocab_find(&t->vocab, unk, strlen(unk));
    if (t->bpe.unk < 0) SH_FAIL(SH_EFORMAT, "model.unk_token: '%s' is not in the vocabulary", unk);
    return SH_OK;
}

/* Members of `model`: vocab is read in passing, merges are kept for later (they need it), the rest goes into options.
 */
static sh_status read_model_members(sh_tokenizer *t, sh_scan *s, sh_span *merges, json_t *options) {
    sh_status st;
    SH_TRY(sh_scan_open(s, '{'));
    while (sh_scan_more(s, '}', &st)) {
        sh_span key, value;
        char name[64];
        SH_TRY(sh_scan_key(s, &key));
        snprintf(name, sizeof name, "%.*s", (int)(key.n < 60 ? key.n : 60), key.p);
        if (strcmp(name, "vocab") == 0) {
            SH_TRY(read_vocab(t, s));
            continue;
        }
        SH_TRY(sh_scan_skip(s, &value));
        if (strcmp(name, "merges") == 0) {
            *merges = value;
            continue;
        }
        json_t *j = NULL;
        st = sh_json_parse(name, value.p, value.n, &j);
        if (st != SH_OK) return sh_error_prefix(st, "%s: model", s->what);
        if (json_object_set_new(options, name, j) != 0) SH_FAIL(SH_EMEMORY, "no memory for model.%s", name);
    }
    return st;
}

static sh_status read_model(sh_tokenizer *t, sh_scan *s) {
    SH_CLEANUP(sh_json_release) json_t *options = json_object();
    sh_span merges = {"[]", 2};
    SH_TRY(read_model_members(t, s, &merges, options));
    if (t->vocab.size == 0) SH_FAIL(SH_EFORMAT, "%s: model.vocab is empty or missing", s->what);
    SH_TRY(read_merges(t, s->what, merges));
    return read_model_options(t, options);
}

/* --- added tokens and the file as a whole
 * ----------------------------------------------------------------------------- */

static sh_status read_added_token(sh_tokenizer *t, const json_t *j) {
    const json_t *content = json_object_get(j, "content");
    int64_t id = -1;
    sh_added_token a = {0};
    SH_TRY(sh_json_int(j, "id", 0, SH_MAX_VOCAB - 1, &id));
    if (id < 0 || !json_is_string(content)) SH_FAIL(SH_EFORMAT, "id and content are needed");
    a.id = (int32_t)id;
    SH_TRY(sh_json_bool(j, "special", &a.special));
    a.normalized = !a.special;
    SH_TRY(sh_json_bool(j, "normalized", &a.normalized));
    SH_TRY(sh_json_bool(j, "lstrip", &a.lstrip));
    SH_TRY(sh_json_bool(j, "rstrip", &a.rstrip));
    SH_TRY(sh_json_bool(j, "single_word", &a.single_word));
    const char *s = json_string_value(content);
    size_t n = json_string_length(content);
    int32_t known = sh_vocab_find(&t->vocab, s, n);
    if (known >= 0 && known != a.id) SH_FAIL(SH_EFORMAT, "'%s' has id %d here and %d in model.vocab", s, a.id, known);
    if (known < 0) SH_TRY(sh_vocab_add(&t->vocab, a.id, s, n));
    if (n == 0) return SH_OK;
    if (!a.normalized) return sh_added_add(&t->plain, &a, s, n);
    sh_buf text;
    sh_buf_init(&text, 0);
    sh_status st = sh_tokenizer_normalize(t, s, n, &text);
    if (st == SH_OK) st = sh_added_add(&t->normalized, &a, (const char *)text.data, text.len);
    sh_buf_release(&text);
    return st;
}

static sh_status read_added_tokens(sh_tokenizer *t, const json_t *list) {
    if (list && !json_is_null(list) && !json_is_array(list)) SH_FAIL(SH_EFORMAT, "added_tokens: not an array");
    for (size_t i = 0; i < json_array_size(list); i++) {
        sh_status st = read_added_token(t, json_array_get(list, i));
        if (st != SH_OK) return sh_error_prefix(st, "added_tokens[%zu]", i);
    }
    t->flags = calloc((size_t)t->vocab.size + 1, 1);
    if (!t->flags) SH_FAIL(SH_EMEMORY, "no memory for %d tokens", t->vocab.size);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *j = json_array_get(list, i);
        json_int_t id = (json_int_t)json_number_value(json_object_get(j, "id"));
        t->flags[id] = (uint8_t)(SH_TOK_ADDED | (json_is_true(json_object_get(j, "special")) ? SH_TOK_SPECIAL : 0));
    }
    return SH_OK;
}

/* The members of the file other than `model`. */
static sh_status read_parts(sh_tokenizer *t, const json_t *parts) {
    const json_t *j = json_object_get(parts, "normalizer");
    if (j && !json_is_null(j)) SH_TRY(read_steps(t, "normalizer", "normalizers", j, read_normalizer, 0));
    j = json_object_get(parts, "pre_tokenizer");
    if (j && !json_is_null(j)) SH_TRY(read_steps(t, "pre_tokenizer", "pretokenizers", j, read_pre_tokenizer, 0));
    SH_TRY(read_added_tokens(t, json_object_get(parts, "added_tokens")));
    j = json_object_get(parts, "decoder");
    t->n_strip = -1;
    if (!j || json_is_null(j)) SH_FAIL(SH_EUNSUPPORTED, "decoder: null is not supported");
    SH_TRY(read_steps(t, "decoder", "decoders", j, read_decoder, 0));
    if (t->n_strip < 0) t->n_strip = 0;
    j = json_object_get(parts, "post_processor");
    return j && !json_is_null(j) ? read_post_processor(t, j) : SH_OK;
}

sh_status sh_tokenizer_parse(sh_tokenizer *t, sh_scan *s) {
    SH_CLEANUP(sh_json_release) json_t *parts = json_object();
    sh_status st;
    bool model = false;
    SH_TRY(sh_scan_open(s, '{'));
    while (sh_scan_more(s, '}', &st)) {
        sh_span key, value;
        char name[64];
        SH_TRY(sh_scan_key(s, &key));
        snprintf(name, sizeof name, "%.*s", (int)(key.n < 60 ? key.n : 60), key.p);
        if (strcmp(name, "model") == 0) {
            if (model) SH_FAIL(SH_EFORMAT, "model: given twice");
            model = true;
            SH_TRY(read_model(t, s));
            continue;
        }
        SH_TRY(sh_scan_skip(s, &value));
        json_t *j = NULL;
        SH_TRY(sh_json_parse(name, value.p, value.n, &j));
        if (json_object_set_new(parts, name, j) != 0) SH_FAIL(SH_EMEMORY, "no memory for %s", name);
    }
    SH_TRY(st);
    SH_TRY(sh_scan_end(s));
    if (!model) SH_FAIL(SH_EFORMAT, "model: missing");
    return read_parts(t, parts);
}
