/*
 * Tokens → rows. Everything in a row but `created` follows from the request and its tokens. See results.h. Does not
 * know the store or the order of rows. Sources: OpenAI's batch output, chat.completion and text_completion objects;
 * vLLM for reasoning_content, token_ids and prompt_token_ids.
 */
#include "coordinator/results.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/hash.h"
#include "coordinator/rowtext.h"
#include "coordinator/toolcall.h"

#define TRY_STR(to, s) SH_TRY(sh_buf_add_str((to), (s)))

/* What one row is made of; buffers are released by the caller of make(). */
typedef struct row {
    const sh_tokenizer *tok;
    const sh_request *r;
    const sh_output *o;
    int n; /* generated tokens */
    uint64_t key;
    sh_buf *to;
    sh_buf prompt, text, piece; /* echoed prompt; generated text; one token */
    sh_buf calls;               /* tool calls as members of a JSON array */
    size_t reasoning;           /* bytes of text that belong to the thought channel */
    bool thought;               /* the output begins with the thought channel */
} row;

/* --- text --- */

/* An id without text is no failure: the padding of the vocabulary has none, and a model may yet choose it. */
static sh_status unless_unknown(sh_status st) {
    return st == SH_EINPUT ? SH_OK : st;
}

/* Text of ids; those without one add none. */
static sh_status add_text(const sh_tokenizer *tok, const int32_t *ids, size_t n, bool skip_special, sh_buf *to) {
    sh_detok d;
    sh_detok_init(&d, tok, skip_special);
    for (size_t i = 0; i < n; i++) SH_TRY(unless_unknown(sh_detok_add(&d, ids[i], to)));
    return sh_detok_flush(&d, to);
}

static bool has_id(const int32_t *ids, int n, int32_t id) {
    for (int i = 0; i < n; i++)
        if (ids[i] == id) return true;
    return false;
}

/* Generated tokens whose text counts: the id that stopped the sequence is not output. */
static int text_tokens(const row *w) {
    const sh_sampling *p = &w->r->sampling;
    if (w->n == 0 || w->o->finish != SH_FINISH_STOP || w->o->text_len >= 0) return w->n;
    int32_t last = w->o->id[w->n - 1];
    bool stop = (!p->ignore_eos && has_id(p->eos, p->n_eos, last)) || has_id(p->stop_ids, p->n_stop_ids, last);
    return stop ? w->n - 1 : w->n;
}

/* One tool call's ids (without its marks) → w->calls, or, when they are none, their text → w->text. */
static sh_status add_call(row *w, const int32_t *id, int n) {
    SH_CLEANUP(sh_buf_release) sh_buf name = {0}, arguments = {0};
    bool ok;
    sh_buf_clear(&w->piece);
    SH_TRY(add_text(w->tok, id, (size_t)n, false, &w->piece));
    const char *s = w->piece.data ? (const char *)w->piece.data : "";
    SH_TRY(sh_toolcall_parse(s, w->piece.len, &name, &arguments, &ok));
    if (!ok) return add_text(w->tok, id, (size_t)n, true, &w->text);
    SH_TRY(sh_buf_printf(
        &w->calls, "%s{\"id\":\"call_%016llx\",\"type\":\"function\",\"function\":{\"name\":", w->calls.len ? "," : "",
        (unsigned long long)sh_hash64(w->key, &w->calls.len, sizeof w->calls.len)));
    SH_TRY(sh_row_string(&w->calls, name.data, name.len));
    SH_TRY(sh_buf_add_str(&w->calls, ",\"arguments\":"));
    SH_TRY(sh_row_string(&w->calls, arguments.data, arguments.len));
    return sh_buf_add_str(&w->calls, "}}");
}

/* What is said, ids [from, n), apart from the tool calls in it. */
static sh_status add_said(row *w, int from, int n) {
    const int32_t *id = w->o->id;
    int32_t open = sh_tokenizer_id(w->tok, "<|tool_call>"), close = sh_tokenizer_id(w->tok, "<tool_call|>");
    int i = from;
    while (i < n) {
        int begin = i, end;
        while (begin < n && id[begin] != open) begin++;
        for (end = begin; end < n && id[end] != close;) end++;
        if (open < 0 || end == n) break; /* no call that is whole */
        SH_TRY(add_text(w->tok, id + i, (size_t)(begin - i), true, &w->text));
        SH_TRY(add_call(w, id + begin + 1, end - begin - 1));
        i = end + 1;
    }
    return add_text(w->tok, id + i, (size_t)(n - i), true, &w->text);
}

/* w->text, cut before a stop string; for chat also how much of it is the thought channel, and the tool calls out of it.
 */
static sh_status make_text(row *w) {
    int n = text_tokens(w), close = 0;
    const int32_t *id = w->o->id;
    int32_t begin = sh_tokenizer_id(w->tok, "<|channel>"), end = sh_tokenizer_id(w->tok, "<channel|>");
    w->thought = w->r->chat && n > 0 && begin >= 0 && id[0] == begin;
    while (w->thought && close < n && id[close] != end) close++;
    SH_TRY(add_text(w->tok, id, (size_t)close, true, &w->text));
    w->reasoning = w->text.len;
    if (w->r->chat && w->r->tools && w->o->text_len < 0) return add_said(w, close, n);
    sh_buf_clear(&w->text); /* as one piece: bytes before and after the mark may make one character */
    SH_TRY(add_text(w->tok, id, (size_t)n, true, &w->text));
    if (w->o->text_len >= 0 && (size_t)w->o->text_len < w->text.len) w->text.len = (size_t)w->o->text_len;
    if (w->reasoning > w->text.len) w->reasoning = w->text.len;
    return SH_OK;
}

static sh_status make_prompt(row *w) {
    if (w->r->prompt_text) return sh_buf_add_str(&w->prompt, w->r->prompt_text);
    return add_text(w->tok, w->r->prompt.id, w->r->prompt.n, false, &w->prompt);
}

/* --- tokens in log-probabilities --- */

/* w->piece: the bytes of a token. */
static sh_status load_piece(row *w, int32_t id) {
    sh_buf_clear(&w->piece);
    return unless_unknown(sh_tokenizer_piece(w->tok, id, &w->piece));
}

/* A token as a JSON string; bytes that are no text as OpenAI writes them: bytes:\xe2\x80. So is NUL, since the string
 * may become a key and not every JSON library takes keys with it. */
static sh_status add_token(row *w, int32_t id) {
    SH_TRY(load_piece(w, id));
    const unsigned char *s = w->piece.data;
    size_t n = w->piece.len, i = 0;
    while (i < n && s[i] && sh_utf8_len(s + i, n - i)) i += sh_utf8_len(s + i, n - i);
    if (i == n) return sh_row_string(w->to, s, n);
    TRY_STR(w->to, "\"bytes:");
    for (i = 0; i < n; i++) SH_TRY(sh_buf_printf(w->to, "\\\\x%02x", s[i]));
    return sh_buf_add_str(w->to, "\"");
}

static sh_status add_chat_token(row *w, int32_t id, float logprob) {
    TRY_STR(w->to, "{\"token\":");
    SH_TRY(add_token(w, id));
    TRY_STR(w->to, ",\"logprob\":");
    SH_TRY(sh_row_float(w->to, logprob));
    TRY_STR(w->to, ",\"bytes\":[");
    for (size_t i = 0; i < w->piece.len; i++) SH_TRY(sh_buf_printf(w->to, i ? ",%d" : "%d", w->piece.data[i]));
    return sh_buf_add_str(w->to, "]");
}

static float logprob_at(const float *a, int i) {
    return a ? a[i] : 0;
}

static sh_status add_chat_logprobs(row *w) {
    const sh_output *o = w->o;
    TRY_STR(w->to, "{\"content\":[");
    for (int i = 0; i < w->n; i++) {
        if (i) TRY_STR(w->to, ",");
        SH_TRY(add_chat_token(w, o->id[i], logprob_at(o->logprob, i)));
        TRY_STR(w->to, ",\"top_logprobs\":[");
        const sh_top_logprob *top = o->top ? o->top + (size_t)i * SH_MAX_TOP_LOGPROBS : NULL;
        for (int k = 0, n = top && o->n_top ? o->n_top[i] : 0; k < n; k++) {
            if (k) TRY_STR(w->to, ",");
            SH_TRY(add_chat_token(w, top[k].id, top[k].logprob));
            TRY_STR(w->to, "}");
        }
        TRY_STR(w->to, "]}");
    }
    return sh_buf_add_str(w->to, "],\"refusal\":null}");
}

/* One entry of completions' top_logprobs: {token: logprob}, the likeliest first, the token itself always among them.
 * Two ids with one text: the likelier one counts. */
static sh_status add_top_map(row *w, int32_t id, float logprob, const sh_top_logprob *top, int n) {
    int32_t seen[SH_MAX_TOP_LOGPROBS + 1];
    int m = 0;
    SH_CLEANUP(sh_buf_release) sh_buf other;
    sh_buf_init(&other, 0);
    TRY_STR(w->to, "{");
    for (int k = 0; k <= n; k++) {
        int32_t t = k < n ? top[k].id : id;
        bool again = has_id(seen, m, t);
        for (int j = 0; j < m && !again; j++) {
            sh_buf_clear(&other);
            SH_TRY(load_piece(w, seen[j]));
            SH_TRY(sh_buf_add(&other, w->piece.data, w->piece.len));
            SH_TRY(load_piece(w, t));
            again = other.len == w->piece.len && !memcmp(other.data, w->piece.data, other.len);
        }
        if (again) continue;
        if (m) TRY_STR(w->to, ",");
        SH_TRY(add_token(w, t));
        TRY_STR(w->to, ":");
        SH_TRY(sh_row_float(w->to, k < n ? top[k].logprob : logprob));
        seen[m++] = t;
    }
    return sh_buf_add_str(w->to, "}");
}

/* The tokens that a completion's logprobs speak of: the prompt's when echoed, then the generated ones. */
typedef struct spoken {
    int32_t id;
    bool known; /* has a log-probability (the first prompt token has none) */
    float logprob;
    const sh_top_logprob *top;
    int n_top;
} spoken;

static spoken spoken_at(const row *w, int i, int n_prompt) {
    const sh_output *o = w->o;
    if (i < n_prompt) {
        int k = i - 1;
        spoken s = {.id = w->r->prompt.id[i], .known = k >= 0 && k < o->n_scores && o->score};
        if (!s.known) return s;
        s.logprob = o->score[k];
        s.top = o->score_top ? o->score_top + (size_t)k * SH_MAX_TOP_LOGPROBS : NULL;
        s.n_top = s.top && o->score_n_top ? o->score_n_top[k] : 0;
        return s;
    }
    int k = i - n_prompt;
    spoken s = {.id = o->id[k], .known = true, .logprob = logprob_at(o->logprob, k)};
    s.top = o->top ? o->top + (size_t)k * SH_MAX_TOP_LOGPROBS : NULL;
    s.n_top = s.top && o->n_top ? o->n_top[k] : 0;
    return s;
}

/* Offsets of tokens in the text, in characters: what stood there before the token. */
static sh_status add_offsets(row *w, int n_prompt) {
    sh_detok d;
    sh_buf_clear(&w->piece);
    size_t at = 0, end = sh_utf8_count(w->prompt.data, w->prompt.len) + sh_utf8_count(w->text.data, w->text.len);
    sh_detok_init(&d, w->tok, false);
    for (int i = 0; i < n_prompt + w->n; i++) {
        if (i == n_prompt) {
            at = sh_utf8_count(w->prompt.data, w->prompt.len);
            sh_detok_init(&d, w->tok, true);
        }
        SH_TRY(sh_buf_printf(w->to, i ? ",%zu" : "%zu", at < end ? at : end));
        int32_t id = i < n_prompt ? w->r->prompt.id[i] : w->o->id[i - n_prompt];
        sh_buf_clear(&w->piece);
        SH_TRY(unless_unknown(sh_detok_add(&d, id, &w->piece)));
        /* a begin token that the tokenizer itself put before a string is not in that string */
        bool hidden = i == 0 && n_prompt && w->r->prompt_text && sh_tokenizer_is_special(w->tok, id) &&
                      strncmp(w->r->prompt_text, w->piece.data ? (const char *)w->piece.data : "", w->piece.len);
        if (!hidden) at += sh_utf8_count(w->piece.data, w->piece.len);
    }
    return SH_OK;
}

static sh_status add_completion_logprobs(row *w) {
    int n_prompt = w->r->echo ? (int)w->r->prompt.n : 0, n = n_prompt + w->n;
    TRY_STR(w->to, "{\"tokens\":[");
    for (int i = 0; i < n; i++) {
        if (i) TRY_STR(w->to, ",");
        SH_TRY(add_token(w, spoken_at(w, i, n_prompt).id));
    }
    TRY_STR(w->to, "],\"token_logprobs\":[");
    for (int i = 0; i < n; i++) {
        spoken s = spoken_at(w, i, n_prompt);
        if (i) TRY_STR(w->to, ",");
        if (s.known)
            SH_TRY(sh_row_float(w->to, s.logprob));
        else
            TRY_STR(w->to, "null");
    }
    TRY_STR(w->to, "],\"top_logprobs\":");
    if (w->r->sampling.logprobs == 0) TRY_STR(w->to, "null");
    for (int i = 0; i < n && w->r->sampling.logprobs > 0; i++) {
        spoken s = spoken_at(w, i, n_prompt);
        TRY_STR(w->to, i ? "," : "[");
        if (s.known)
            SH_TRY(add_top_map(w, s.id, s.logprob, s.top, s.n_top));
        else
            TRY_STR(w->to, "null");
    }
    if (w->r->sampling.logprobs > 0) TRY_STR(w->to, n ? "]" : "[]");
    TRY_STR(w->to, ",\"text_offset\":[");
    SH_TRY(add_offsets(w, n_prompt));
    return sh_buf_add_str(w->to, "]}");
}

/* --- objects --- */

/* The message of a chat: what was thought apart from what is said. The channel's name, "thought" and a line break, is
 * markup. */
static sh_status add_message(row *w) {
    const char *s = w->text.data ? (const char *)w->text.data : "";
    TRY_STR(w->to, "\"message\":{\"role\":\"assistant\",\"content\":");
    if (w->calls.len && w->text.len == w->reasoning)
        TRY_STR(w->to, "null");
    else
        SH_TRY(sh_row_string(w->to, s + w->reasoning, w->text.len - w->reasoning));
    if (w->thought) {
        static const char name[] = "thought\n";
        size_t skip = w->reasoning >= sizeof name - 1 && !memcmp(s, name, sizeof name - 1) ? sizeof name - 1 : 0;
        TRY_STR(w->to, ",\"reasoning_content\":");
        SH_TRY(sh_row_string(w->to, s + skip, w->reasoning - skip));
    }
    if (w->calls.len) {
        TRY_STR(w->to, ",\"tool_calls\":[");
        SH_TRY(sh_buf_add(w->to, w->calls.data, w->calls.len));
        TRY_STR(w->to, "]");
    }
    return sh_buf_add_str(w->to, "}");
}

static sh_status add_completion_text(row *w) {
    SH_CLEANUP(sh_buf_release) sh_buf all;
    sh_buf_init(&all, 0);
    SH_TRY(sh_buf_add(&all, w->prompt.data, w->prompt.len));
    SH_TRY(sh_buf_add(&all, w->text.data, w->text.len));
    TRY_STR(w->to, "\"text\":");
    return sh_row_string(w->to, all.data, all.len);
}

static const char *finish_name(const row *w) {
    if (w->r->score_only || w->o->finish == SH_FINISH_LENGTH) return "length";
    if (w->o->finish == SH_FINISH_CANCEL) return "cancelled";
    return w->calls.len ? "tool_calls" : "stop";
}

static sh_status add_choice(row *w) {
    SH_TRY(sh_buf_printf(w->to, "{\"index\":%d,", w->r->sampling.choice));
    SH_TRY(w->r->chat ? add_message(w) : add_completion_text(w));
    TRY_STR(w->to, ",\"logprobs\":");
    if (w->r->sampling.logprobs < 0)
        TRY_STR(w->to, "null");
    else
        SH_TRY(w->r->chat ? add_chat_logprobs(w) : add_completion_logprobs(w));
    SH_TRY(sh_buf_printf(w->to, ",\"finish_reason\":\"%s\"", finish_name(w)));
    if (w->r->return_token_ids) {
        TRY_STR(w->to, ",\"token_ids\":");
        SH_TRY(sh_row_ids(w->to, w->o->id, (size_t)w->n));
        if (!w->r->chat) {
            TRY_STR(w->to, ",\"prompt_token_ids\":");
            SH_TRY(sh_row_ids(w->to, w->r->prompt.id, w->r->prompt.n));
        }
    }
    return sh_buf_add_str(w->to, "}");
}

/* The names of a row follow from custom_id and content. */
static uint64_t row_key(const char *custom_id, uint64_t hash) {
    return sh_hash64(hash, custom_id ? custom_id : "", custom_id ? strlen(custom_id) : 0);
}

static sh_status open_row(const char *custom_id, uint64_t key, int status, sh_buf *to) {
    SH_TRY(sh_buf_printf(to, "{\"id\":\"batch_req_%016llx\",\"custom_id\":", (unsigned long long)key));
    if (custom_id)
        SH_TRY(sh_row_string(to, custom_id, strlen(custom_id)));
    else
        TRY_STR(to, "null");
    return sh_buf_printf(to, ",\"response\":{\"status_code\":%d,\"request_id\":\"req_%016llx\",\"body\":", status,
                         (unsigned long long)sh_mix64(key));
}

static sh_status add_body(row *w, const char *model, int64_t created) {
    SH_TRY(sh_buf_printf(
        w->to, "{\"id\":\"%s-%016llx\",\"object\":\"%s\",\"created\":%lld,\"model\":", w->r->chat ? "chatcmpl" : "cmpl",
        (unsigned long long)w->key, w->r->chat ? "chat.completion" : "text_completion", (long long)created));
    SH_TRY(sh_row_string(w->to, model, strlen(model)));
    TRY_STR(w->to, ",\"choices\":[");
    SH_TRY(add_choice(w));
    SH_TRY(sh_buf_printf(w->to, "],\"usage\":{\"prompt_tokens\":%zu,\"completion_tokens\":%d,\"total_tokens\":%zu}",
                         w->r->prompt.n, w->n, w->r->prompt.n + (size_t)w->n));
    if (w->r->return_token_ids) {
        TRY_STR(w->to, ",\"prompt_token_ids\":");
        SH_TRY(sh_row_ids(w->to, w->r->prompt.id, w->r->prompt.n));
    }
    return sh_buf_add_str(w->to, "}");
}

static sh_status make(row *w, const char *model, int64_t created) {
    if (w->r->echo) SH_TRY(make_prompt(w));
    SH_TRY(make_text(w));
    SH_TRY(open_row(w->r->custom_id, w->key, 200, w->to));
    SH_TRY(add_body(w, model, created));
    return sh_buf_add_str(w->to, "},\"error\":null}");
}

sh_status sh_result_row(const sh_intake *in, const sh_request *r, const sh_output *o, int64_t created, sh_buf *to) {
    row w = {
        .tok = sh_intake_tokenizer(in), .r = r, .o = o, .to = to, .n = o->n, .key = row_key(r->custom_id, r->hash)};
    while (w.n > 0 && o->id[w.n - 1] < 0) w.n--; /* an end without a token */
    if (r->score_only) w.n = 0;
    sh_buf_init(&w.prompt, 0);
    sh_buf_init(&w.text, 0);
    sh_buf_init(&w.piece, 0);
    sh_buf_init(&w.calls, 0);
    size_t before = to->len;
    sh_status st = make(&w, r->model ? r->model : sh_intake_model_name(in), created);
    if (st != SH_OK) to->len = before; /* no half row */
    sh_buf_release(&w.prompt);
    sh_buf_release(&w.text);
    sh_buf_release(&w.piece);
    sh_buf_release(&w.calls);
    return st;
}

/* --- errors --- */

static const char *error_type(int status) {
    return status >= 500 ? "server_error" : status == 499 ? "cancelled" : "invalid_request_error";
}

/* The members that both spellings of an error have. */
static sh_status add_error(const char *code, const char *message, const char *param, sh_buf *to) {
    TRY_STR(to, "\"code\":");
    SH_TRY(sh_row_string(to, code, strlen(code)));
    TRY_STR(to, ",\"message\":");
    SH_TRY(sh_row_string(to, message, strlen(message)));
    TRY_STR(to, ",\"param\":");
    return param && param[0] ? sh_row_string(to, param, strlen(param)) : sh_buf_add_str(to, "null");
}

static sh_status make_error(const char *custom_id, uint64_t key, uint64_t number, int status, const char *code,
                            const char *message, const char *param, sh_buf *to) {
    SH_TRY(open_row(custom_id, key, status, to));
    SH_TRY(sh_buf_printf(to, "{\"error\":{\"type\":\"%s\",", error_type(status)));
    SH_TRY(add_error(code, message, param, to));
    TRY_STR(to, "}}},\"error\":{");
    SH_TRY(add_error(code, message, param, to));
    if (!custom_id) SH_TRY(sh_buf_printf(to, ",\"line\":%llu", (unsigned long long)number));
    return sh_buf_add_str(to, "}}");
}

sh_status sh_result_error_row(const char *custom_id, uint64_t hash, uint64_t number, int status, const char *code,
                              const char *message, const char *param, int64_t created, sh_buf *to) {
    (void)created; /* an error object has no such member */
    size_t before = to->len;
    sh_status st = make_error(custom_id, row_key(custom_id, hash), number, status, code ? code : "",
                              message ? message : "", param, to);
    if (st != SH_OK) to->len = before;
    return st;
}
