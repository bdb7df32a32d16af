/*
 * Metadata of GGUF → tokenizer.json and tokenizer_config.json. See gguf_files.h. GGUF gives the vocabulary and the
 * merges; the stages around them only as the name of an implementation, "gemma4", which stands for the stages of
 * Gemma 4's tokenizer.json and for no others. Whatever says something else is refused by its key.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/json.h"
#include "common/limits.h"
#include "common/utf8.h"
#include "model/gguf_files.h"
#include "model/gguf_meta.h"
#include "model/vocab.h"

#define KEY(name) "tokenizer.ggml." name

enum { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE }; /* types of tokens */

typedef struct source {
    const sh_gguf_meta *m;
    sh_vocab vocab;
    uint8_t *type; /* of each token */
} source;

/* --- what the stages are -------------------------------------------------------------------------------------------
 */

static const char stages[] =
    "\"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"\xe2\x96\x81\"},\n"
    "\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"String\": \" \"}, \"behavior\": \"MergedWithPrevious\", "
    "\"invert\": false},\n"
    "\"post_processor\": null,\n"
    "\"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", \"pattern\": {\"String\": "
    "\"\xe2\x96\x81\"}, \"content\": \" \"}, {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}]},\n";

static sh_status want_name(const sh_gguf_meta *m, const char *key, bool needed) {
    sh_gguf_text name = {"gemma4", 6};
    if (needed) SH_TRY(sh_gguf_meta_need(m, key));
    SH_TRY(sh_gguf_meta_text(m, key, &name));
    if (sh_gguf_is(name, "gemma4")) return SH_OK;
    return sh_gguf_meta_fail(m, SH_EUNSUPPORTED, key, "%.*s: allowed is gemma4", (int)(name.n < 64 ? name.n : 64),
                             name.s);
}

static sh_status check_stages(const sh_gguf_meta *m) {
    static const char *const off[] = {KEY("add_space_prefix"), KEY("remove_extra_whitespaces"),
                                      "tokenizer.ggml.normalizer.lowercase", "tokenizer.ggml.normalizer.strip_accents"};
    SH_TRY(want_name(m, KEY("model"), true));
    SH_TRY(want_name(m, KEY("pre"), false));
    for (size_t i = 0; i < sizeof off / sizeof *off; i++) {
        bool on = false;
        SH_TRY(sh_gguf_meta_bool(m, off[i], &on));
        if (on) return sh_gguf_meta_fail(m, SH_EUNSUPPORTED, off[i], "true: allowed is false");
    }
    if (sh_gguf_meta_has(m, KEY("precompiled_charsmap")))
        return sh_gguf_meta_fail(m, SH_EUNSUPPORTED, KEY("precompiled_charsmap"), "is there: allowed is none");
    return SH_OK;
}

/* --- vocabulary ----------------------------------------------------------------------------------------------------
 */

/* The number of tokens and their types. */
static sh_status read_types(source *s, const sh_gguf_strings *tokens) {
    if (tokens->n < 1 || tokens->n > SH_MAX_VOCAB)
        return sh_gguf_meta_fail(s->m, SH_EFORMAT, KEY("tokens"), "%llu values: allowed are 1 to %d",
                                 (unsigned long long)tokens->n, SH_MAX_VOCAB);
    int n = (int)tokens->n;
    uint64_t scores = sh_gguf_meta_count(s->m, KEY("scores"));
    if (sh_gguf_meta_has(s->m, KEY("scores")) && scores != tokens->n)
        return sh_gguf_meta_fail(s->m, SH_EFORMAT, KEY("scores"),
                                 "%llu values: allowed are %d, one for each of " KEY("tokens"),
                                 (unsigned long long)scores, n);
    SH_TRY(sh_gguf_meta_need(s->m, KEY("token_type")));
    if (sh_gguf_meta_count(s->m, KEY("token_type")) != tokens->n)
        return sh_gguf_meta_fail(s->m, SH_EFORMAT, KEY("token_type"),
                                 "%llu values: allowed are %d, one for each of " KEY("tokens"),
                                 (unsigned long long)sh_gguf_meta_count(s->m, KEY("token_type")), n);
    int64_t *type = calloc(tokens->n, sizeof *type);
    s->type = calloc(tokens->n, 1);
    sh_status st = SH_OK;
    if (!type || !s->type) st = sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "no memory for %d tokens", n);
    if (st == SH_OK) st = sh_gguf_meta_ints(s->m, KEY("token_type"), KEY("tokens"), n, NORMAL, BYTE, type);
    for (int i = 0; st == SH_OK && i < n; i++) s->type[i] = (uint8_t)type[i];
    free(type);
    return st;
}

static sh_status read_tokens(source *s) {
    sh_gguf_strings tokens;
    SH_TRY(sh_gguf_meta_strings(s->m, KEY("tokens"), &tokens));
    SH_TRY(read_types(s, &tokens));
    for (uint64_t i = 0; i < tokens.n; i++) {
        sh_gguf_text t = sh_gguf_next(&tokens);
        if (sh_utf8_valid((const uint8_t *)t.s, t.n) < t.n)
            return sh_gguf_meta_fail(s->m, SH_EFORMAT, KEY("tokens"), "[%llu]: not valid UTF-8", (unsigned long long)i);
        sh_status st = sh_vocab_add(&s->vocab, (int32_t)i, t.s, t.n);
        if (st != SH_OK)
            return sh_error_prefix(st, "%s: metadata " KEY("tokens") ": [%llu]", sh_gguf_meta_path(s->m),
                                   (unsigned long long)i);
    }
    return SH_OK;
}

/* --- text ----------------------------------------------------------------------------------------------------------
 */

static sh_status add_string(sh_buf *out, const char *s, size_t n) {
    SH_TRY(sh_buf_add(out, "\"", 1));
    for (size_t i = 0, from = 0; i <= n; i++) {
        bool plain = i < n && s[i] != '"' && s[i] != '\\' && (uint8_t)s[i] >= ' ';
        if (plain) continue;
        if (i > from) SH_TRY(sh_buf_add(out, s + from, i - from));
        if (i < n) SH_TRY(sh_buf_printf(out, "\\u%04x", (unsigned)(uint8_t)s[i]));
        from = i + 1;
    }
    return sh_buf_add(out, "\"", 1);
}

static sh_status add_vocab(const source *s, sh_buf *out) {
    for (int32_t i = 0; i < s->vocab.size; i++) {
        size_t n = 0;
        const char *text = sh_vocab_text(&s->vocab, i, &n);
        SH_TRY(sh_buf_add_str(out, i ? ",\n" : "{"));
        SH_TRY(add_string(out, text, n));
        SH_TRY(sh_buf_printf(out, ": %d", i));
    }
    return sh_buf_add_str(out, "}");
}

static sh_status merge_fails(const source *s, uint64_t i, const char *what, const char *text, size_t n) {
    return sh_gguf_meta_fail(s->m, SH_EFORMAT, KEY("merges"), "[%llu]: '%.*s' %s", (unsigned long long)i,
                             (int)(n < 80 ? n : 80), text, what);
}

/* "a b": two tokens which make a third. */
static sh_status check_merge(const source *s, uint64_t i, sh_gguf_text t, sh_buf *joined) {
    if (sh_utf8_valid((const uint8_t *)t.s, t.n) < t.n)
        return sh_gguf_meta_fail(s->m, SH_EFORMAT, KEY("merges"), "[%llu]: not valid UTF-8", (unsigned long long)i);
    const char *space = memchr(t.s, ' ', t.n);
    size_t a = space ? (size_t)(space - t.s) : 0, b = space ? t.n - a - 1 : 0;
    if (!space || memchr(space + 1, ' ', b))
        return merge_fails(s, i, "is not two tokens with one space between", t.s, t.n);
    if (sh_vocab_find(&s->vocab, t.s, a) < 0) return merge_fails(s, i, "is no token", t.s, a);
    if (sh_vocab_find(&s->vocab, space + 1, b) < 0) return merge_fails(s, i, "is no token", space + 1, b);
    sh_buf_clear(joined);
    SH_TRY(sh_buf_add(joined, t.s, a));
    SH_TRY(sh_buf_add(joined, space + 1, b));
    if (sh_vocab_find(&s->vocab, (const char *)joined->data, joined->len) < 0)
        return merge_fails(s, i, "makes no token", t.s, t.n);
    return SH_OK;
}

static sh_status add_merges(const source *s, sh_buf *out) {
    SH_CLEANUP(sh_buf_release) sh_buf joined = {0};
    sh_gguf_strings merges;
    SH_TRY(sh_gguf_meta_strings(s->m, KEY("merges"), &merges));
    if (merges.n == 0) return sh_gguf_meta_fail(s->m, SH_EFORMAT, KEY("merges"), "none: at least one is needed");
    for (uint64_t i = 0; i < merges.n; i++) {
        sh_gguf_text t = sh_gguf_next(&merges);
        SH_TRY(check_merge(s, i, t, &joined));
        SH_TRY(sh_buf_add_str(out, i ? ",\n" : "["));
        SH_TRY(add_string(out, t.s, t.n));
    }
    return sh_buf_add_str(out, "]");
}

static sh_status read_id(const source *s, const char *key, int64_t *id) {
    *id = -1;
    return sh_gguf_meta_int(s->m, key, 0, s->vocab.size - 1, id);
}

static sh_status add_model(const source *s, sh_buf *out) {
    int64_t unk;
    size_t n = 0;
    SH_TRY(read_id(s, KEY("unknown_token_id"), &unk));
    SH_TRY(sh_buf_add_str(out, "\"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": "));
    const char *text = unk < 0 ? NULL : sh_vocab_text(&s->vocab, (int32_t)unk, &n);
    SH_TRY(text ? add_string(out, text, n) : sh_buf_add_str(out, "null"));
    SH_TRY(sh_buf_add_str(out, ", \"continuing_subword_prefix\": null, \"end_of_word_suffix\": null, \"fuse_unk\": "
                               "true, \"byte_fallback\": true, \"ignore_merges\": false,\n\"vocab\": "));
    SH_TRY(add_vocab(s, out));
    SH_TRY(sh_buf_add_str(out, ",\n\"merges\": "));
    SH_TRY(add_merges(s, out));
    return sh_buf_add_str(out, "}}\n");
}

/* The added tokens of Gemma 4's tokenizer.json, all of them special. The types of a file are no sure guide to them:
 * llama.cpp's converter marks some as the user's own, so that its readers of chats get to see them, and those that
 * tokenizer_config.json does not name (<eos>, in released files) as ordinary ones. */
static bool is_gemmas(const char *s, size_t n) {
    static const char *const added[] = {
        "<pad>",     "<eos>",     "<bos>",     "<unk>",      "<mask>",     "<|tool>",          "<tool|>",
        "<|turn>",   "<turn|>",   "<|think|>", "<|channel>", "<channel|>", "<|tool_call>",     "<tool_call|>",
        "<|image>",  "<image|>",  "<|image|>", "<|audio>",   "<audio|>",   "<|tool_response>", "<tool_response|>",
        "<|audio|>", "<|video|>", "<|\"|>"};
    for (size_t i = 0; i < sizeof added / sizeof *added; i++)
        if (sh_gguf_is((sh_gguf_text){s, n}, added[i])) return true;
    return false;
}

static sh_status add_added(const source *s, sh_buf *out) {
    bool any = false;
    SH_TRY(sh_buf_add_str(out, "{\"version\": \"1.0\", \"truncation\": null, \"padding\": null,\n\"added_tokens\": ["));
    for (int32_t i = 0; i < s->vocab.size; i++) {
        size_t n = 0;
        const char *text = sh_vocab_text(&s->vocab, i, &n);
        bool special = s->type[i] == UNKNOWN || s->type[i] == CONTROL || is_gemmas(text, n);
        if (!special && s->type[i] != USER_DEFINED) continue;
        SH_TRY(sh_buf_printf(out, "%s{\"id\": %d, \"content\": ", any ? ",\n" : "", i));
        SH_TRY(add_string(out, text, n));
        SH_TRY(sh_buf_printf(out,
                             ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, "
                             "\"special\": %s}",
                             special ? "true" : "false"));
        any = true;
    }
    return sh_buf_add_str(out, "],\n");
}

/* A file may say that it has none: then nothing stands in for the tokenizer's files. */
static sh_status has_tokenizer(const sh_gguf_meta *m, bool *has) {
    sh_gguf_text name = {NULL, 0};
    SH_TRY(sh_gguf_meta_text(m, KEY("model"), &name));
    *has = !name.s || !sh_gguf_is(name, "none");
    return SH_OK;
}

/* --- entry points --------------------------------------------------------------------------------------------------
 */

static sh_status add_tokenizer(source *s, sh_buf *out) {
    SH_TRY(check_stages(s->m));
    SH_TRY(read_tokens(s));
    SH_TRY(add_added(s, out));
    SH_TRY(sh_buf_add_str(out, stages));
    return add_model(s, out);
}

sh_status sh_gguf_tokenizer(const char *dir, sh_buf *out) {
    SH_CLEANUP(sh_gguf_meta_close) sh_gguf_meta *m = NULL;
    bool has = false;
    SH_TRY(sh_gguf_meta_open(dir, &m));
    SH_TRY(has_tokenizer(m, &has));
    if (!has) return SH_OK;
    source s = {.m = m};
    sh_vocab_init(&s.vocab);
    sh_status st = add_tokenizer(&s, out);
    sh_vocab_release(&s.vocab);
    free(s.type);
    return st;
}

/* A token by its id, as Hugging Face has it: by its text. */
static sh_status set_token(const sh_gguf_meta *m, const char *key, const char *add_key, const char *name,
                           const char *add_name, json_t *o) {
    sh_gguf_strings tokens;
    int64_t id = -1;
    bool add = false;
    SH_TRY(sh_gguf_meta_strings(m, KEY("tokens"), &tokens));
    SH_TRY(sh_gguf_meta_int(m, key, 0, (int64_t)tokens.n - 1, &id));
    SH_TRY(sh_gguf_meta_bool(m, add_key, &add));
    if (add && id < 0) return sh_gguf_meta_fail(m, SH_EFORMAT, add_key, "true, but %s is missing", key);
    json_object_set_new(o, add_name, json_boolean(add));
    sh_gguf_text t = {"", 0};
    for (int64_t i = 0; i <= id; i++) t = sh_gguf_next(&tokens);
    if (id >= 0 && json_object_set_new(o, name, json_stringn(t.s, t.n)) != 0)
        return sh_gguf_meta_fail(m, SH_EFORMAT, KEY("tokens"), "[%lld]: not valid UTF-8", (long long)id);
    return SH_OK;
}

sh_status sh_gguf_tokenizer_config(const char *dir, sh_buf *out) {
    SH_CLEANUP(sh_gguf_meta_close) sh_gguf_meta *m = NULL;
    SH_CLEANUP(sh_json_release) json_t *o = json_object();
    sh_gguf_text chat = {NULL, 0};
    bool has = false;
    SH_TRY(sh_gguf_meta_open(dir, &m));
    SH_TRY(has_tokenizer(m, &has));
    if (!has) return SH_OK;
    SH_TRY(set_token(m, KEY("bos_token_id"), KEY("add_bos_token"), "bos_token", "add_bos_token", o));
    SH_TRY(set_token(m, KEY("eos_token_id"), KEY("add_eos_token"), "eos_token", "add_eos_token", o));
    SH_TRY(sh_gguf_meta_text(m, "tokenizer.chat_template", &chat));
    if (chat.s && json_object_set_new(o, "chat_template", json_stringn(chat.s, chat.n)) != 0)
        return sh_gguf_meta_fail(m, SH_EFORMAT, "tokenizer.chat_template", "not valid UTF-8");
    char *text = json_dumps(o, JSON_INDENT(1));
    if (!text) SH_FAIL(SH_EMEMORY, "%s: no memory for what the metadata say", sh_gguf_meta_path(m));
    sh_status st = sh_buf_add_str(out, text);
    free(text);
    return st;
}
