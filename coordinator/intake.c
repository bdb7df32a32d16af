/*
 * From a line to a request: the envelope of OpenAI's batch format, the fields (fields.c), then what only all of them
 * decide: prompt, lengths, seed, hash. See intake.h. Does not know jobs; whether a custom_id was seen before is the
 * store's question.
 */
#include "coordinator/intake.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/hash.h"
#include "common/utf8.h"
#include "coordinator/fields.h"
#include "model/chat.h"

struct sh_intake {
    sh_intake_options options;
    char *name; /* the checkpoint directory's own name */
    sh_config config;
    sh_generation generation;
    sh_tokenizer *tok;
    sh_chat chat;
    int max_context;
};

/* --- creation --- */

static char *last_part(const char *path) {
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    size_t at = n;
    while (at > 0 && path[at - 1] != '/') at--;
    return strndup(path + at, n - at);
}

void sh_intake_set_options(sh_intake *in, const sh_intake_options *o) {
    in->options = *o;
    in->max_context = o->max_context > 0 ? o->max_context : sh_config_usual_context(&in->config);
}

static sh_status load(sh_intake *in, const char *model_dir) {
    SH_TRY(sh_config_load(model_dir, &in->config));
    SH_TRY(sh_generation_load(model_dir, &in->config, &in->generation));
    SH_TRY(sh_tokenizer_load(model_dir, &in->tok));
    SH_TRY(sh_chat_load(model_dir, &in->chat));
    in->name = last_part(model_dir);
    if (!in->name) SH_FAIL(SH_EMEMORY, "no memory for a name");
    sh_intake_set_options(in, &in->options);
    return SH_OK;
}

sh_status sh_intake_create(const char *model_dir, const sh_intake_options *o, sh_intake **out) {
    sh_intake *in = calloc(1, sizeof *in);
    if (!in) SH_FAIL(SH_EMEMORY, "no memory for intake");
    in->options = *o;
    sh_status st = load(in, model_dir);
    if (st != SH_OK) {
        sh_intake_destroy(&in);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = in;
    return SH_OK;
}

void sh_intake_destroy(sh_intake **in) {
    if (!*in) return;
    sh_tokenizer_destroy(&(*in)->tok);
    free((*in)->name);
    free(*in);
    *in = NULL;
}

const sh_tokenizer *sh_intake_tokenizer(const sh_intake *in) {
    return in->tok;
}

const char *sh_intake_model_name(const sh_intake *in) {
    return in->name;
}

void sh_request_release(sh_request *r) {
    free(r->custom_id);
    free(r->model);
    free(r->prompt_text);
    free(r->message);
    sh_ids_release(&r->prompt);
    *r = (sh_request){0};
}

/* --- the line --- */

static int depth(const json_t *j, int left) {
    if (left == 0) return 1;
    int most = 0;
    const char *key;
    json_t *v;
    size_t i;
    if (json_is_object(j)) {
        json_object_foreach((json_t *)j, key, v) {
            int d = depth(v, left - 1);
            if (d > most) most = d;
        }
    } else if (json_is_array(j)) {
        json_array_foreach((json_t *)j, i, v) {
            int d = depth(v, left - 1);
            if (d > most) most = d;
        }
    }
    return most + 1;
}

/* An integer too large for 64 bits is not a reason to lose the whole line: it is read as a real, and the field's own
 * check names it. */
static json_t *load_line(const char *text, size_t len, json_error_t *e) {
    const size_t flags = JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL;
    json_t *j = json_loadb(text, len, flags, e);
    if (!j && json_error_code(e) == json_error_numeric_overflow) {
        json_error_t again;
        j = json_loadb(text, len, flags | JSON_DECODE_INT_AS_REAL, &again);
    }
    return j;
}

/* A byte order mark is no part of the first line: its bytes. */
static size_t pass_mark(const char **text, size_t *len, uint64_t number) {
    size_t n = number == 1 ? sh_utf8_mark(*text, *len) : 0;
    *text += n;
    *len -= n;
    return n;
}

/* skipped: bytes of the line before text. */
static sh_status parse_line(sh_reading *rd, const char *text, size_t len, size_t skipped, uint64_t number,
                            json_t **out) {
    unsigned long long no = number;
    if (len > SH_MAX_LINE_BYTES)
        return sh_refuse(rd, 413, "line_too_long", "line %llu: is longer than may be: allowed are %zu bytes", no,
                         SH_MAX_LINE_BYTES);
    json_error_t e;
    json_t *j = load_line(text, len, &e);
    size_t whole = j ? len : sh_utf8_valid((const uint8_t *)text, len);
    if (whole < len)
        return sh_refuse(rd, 400, "invalid_json",
                         "line %llu: not valid UTF-8 at byte %zu (0x%02x): allowed is one JSON object a line", no,
                         skipped + whole + 1, (unsigned char)text[whole]);
    if (!j)
        return sh_refuse(rd, 400, "invalid_json",
                         "line %llu: not valid JSON at column %d: %s: allowed is one JSON object a line", no, e.column,
                         e.text);
    if (!json_is_object(j)) {
        sh_status st = sh_refuse(rd, 400, "invalid_json", "line %llu: %s is given: allowed is one JSON object a line",
                                 no, sh_json_type_name(j));
        json_decref(j);
        return st;
    }
    *out = j;
    if (depth(j, SH_MAX_JSON_DEPTH + 1) > SH_MAX_JSON_DEPTH)
        return sh_refuse(rd, 400, "invalid_json", "line %llu: nested too deeply: allowed are %d levels", no,
                         SH_MAX_JSON_DEPTH);
    return SH_OK;
}

/* --- the envelope --- */

static sh_status take_custom_id(sh_reading *rd, const json_t *line) {
    const json_t *v = json_object_get(line, "custom_id");
    if (!v || json_is_null(v))
        return sh_refuse(rd, 400, "invalid_custom_id",
                         "custom_id: is missing: allowed is a string of 1 to %d bytes, unique in the file",
                         SH_MAX_CUSTOM_ID);
    if (!json_is_string(v))
        return sh_refuse(rd, 400, "invalid_custom_id",
                         "custom_id: %s is given: allowed is a string of 1 to %d bytes, unique in the file",
                         sh_json_type_name(v), SH_MAX_CUSTOM_ID);
    size_t n = json_string_length(v);
    if (n < 1 || n > SH_MAX_CUSTOM_ID)
        return sh_refuse(rd, 400, "invalid_custom_id", "custom_id: %zu bytes: allowed are 1 to %d", n,
                         SH_MAX_CUSTOM_ID);
    if (strlen(json_string_value(v)) != n)
        return sh_refuse(rd, 400, "invalid_custom_id", "custom_id: has a NUL character: allowed is text without one");
    rd->r->custom_id = strdup(json_string_value(v));
    if (!rd->r->custom_id) SH_FAIL(SH_EMEMORY, "no memory for a custom_id");
    return SH_OK;
}

static void set_url(sh_reading *rd, bool chat) {
    rd->chat = rd->r->chat = chat;
    rd->url = chat ? "/v1/chat/completions" : "/v1/completions";
}

static sh_status read_envelope(sh_reading *rd, json_t *line, json_t **body) {
    static const char *const known[] = {"custom_id", "method", "url", "body"};
    const char *key, *method = "POST", *url;
    json_t *v;
    char q[72];
    json_object_foreach(line, key, v) {
        bool ok = rd->lenient;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++) ok |= !strcmp(key, known[i]);
        if (!ok)
            return sh_refuse(rd, 400, "unknown_field",
                             "%s: is not a field of a request: allowed are custom_id, method, url, body",
                             sh_quote(key, q));
    }
    if (sh_json_is_set(line, "method")) method = json_string_value(json_object_get(line, "method"));
    if (!method || strcmp(method, "POST"))
        return sh_refuse(rd, 400, "invalid_value", "method: %s: allowed is \"POST\"",
                         method ? sh_quote(method, q) : "no string is given");
    url = json_string_value(json_object_get(line, "url"));
    if (!url || (strcmp(url, "/v1/chat/completions") && strcmp(url, "/v1/completions")))
        return sh_refuse(rd, 400, "invalid_value",
                         "url: %s: allowed are \"/v1/chat/completions\" and \"/v1/completions\"",
                         url ? sh_quote(url, q) : "no string is given");
    set_url(rd, !strcmp(url, "/v1/chat/completions"));
    *body = json_object_get(line, "body");
    if (!json_is_object(*body))
        return sh_refuse(rd, 400, "invalid_value", "body: %s: allowed is an object",
                         *body ? "is not an object" : "is missing");
    return SH_OK;
}

/* Either the envelope, or a bare body with `messages` or `prompt` at its top, whose name is its line number unless it
 * says otherwise. */
static sh_status open_line(sh_reading *rd, json_t *line, uint64_t number, json_t **body) {
    bool bare = !json_object_get(line, "body") && !json_object_get(line, "url") &&
                (json_object_get(line, "messages") || json_object_get(line, "prompt"));
    if (!bare || json_object_get(line, "custom_id")) {
        SH_TRY(take_custom_id(rd, line));
    } else {
        if (asprintf(&rd->r->custom_id, "%llu", (unsigned long long)number) < 0) {
            rd->r->custom_id = NULL;
            SH_FAIL(SH_EMEMORY, "no memory for a custom_id");
        }
    }
    if (!bare) return read_envelope(rd, line, body);
    set_url(rd, json_object_get(line, "messages") != NULL);
    json_object_del(line, "custom_id");
    *body = line;
    return SH_OK;
}

/* --- what the fields decide together --- */

static void set_defaults(const sh_intake *in, sh_sampling *p) {
    const sh_generation *g = &in->generation;
    *p = (sh_sampling){.temperature = g->do_sample ? (float)g->temperature : 0,
                       .top_p = (float)g->top_p,
                       .top_k = g->top_k,
                       .logprobs = -1,
                       .n_eos = g->n_stop,
                       .n_suppress = g->n_suppress};
    for (int i = 0; i < g->n_stop; i++) p->eos[i] = g->stop_ids[i];
    for (int i = 0; i < g->n_suppress; i++) p->suppress[i] = g->suppress[i];
}

static sh_status add_number_ids(sh_reading *rd, const json_t *ids) {
    for (size_t i = 0; i < json_array_size(ids); i++) {
        int64_t id = 0; /* checked when the field was read */
        if (sh_field_integer(json_array_get(ids, i), &id)) SH_TRY(sh_ids_add(&rd->r->prompt, (int32_t)id));
    }
    return SH_OK;
}

/* An error of the renderer or the tokenizer is the request's, unless memory ran out. */
static sh_status as_refusal(sh_reading *rd, sh_status st, const char *field) {
    if (st == SH_EMEMORY) return st;
    bool named = !strncmp(sh_error_text(), field, strlen(field)) || !strncmp(sh_error_text(), "tools", 5);
    char text[900];
    snprintf(text, sizeof text, "%s", sh_error_text());
    return sh_refuse(rd, 400, "invalid_value", "%s%s%s", named ? "" : field, named ? "" : ": ", text);
}

static sh_status make_chat_prompt(const sh_intake *in, sh_reading *rd) {
    if (!rd->messages)
        return sh_refuse(rd, 400, "invalid_value", "messages: is missing: allowed is an array of at least one message");
    if (in->chat.form == SH_CHAT_NONE)
        return sh_refuse(rd, 400, "unsupported_value",
                         "messages: %s has neither chat_template.jinja nor a chat_template in tokenizer_config.json: "
                         "allowed is `prompt` "
                         "with /v1/completions",
                         in->name);
    if (!in->chat.known)
        snprintf(
            rd->r->warning, sizeof rd->r->warning,
            "the chat template of %.64s is none of the known ones: messages are rendered as the nearest known form",
            in->name);
    sh_buf text;
    sh_buf_init(&text, (size_t)256 << 20);
    const json_t *tools = rd->no_tools ? NULL : rd->tools;
    rd->r->tools = tools != NULL;
    sh_status st = sh_chat_render(&in->chat, rd->messages, tools, rd->thinking, true, &text);
    if (st == SH_OK)
        st = sh_tokenizer_encode(in->tok, text.data ? (const char *)text.data : "", text.len, false, &rd->r->prompt);
    sh_buf_release(&text);
    return st == SH_OK ? SH_OK : as_refusal(rd, st, "messages");
}

static sh_status make_prompt(const sh_intake *in, sh_reading *rd) {
    if (rd->chat) return make_chat_prompt(in, rd);
    if (!rd->prompt)
        return sh_refuse(rd, 400, "invalid_value", "prompt: is missing: allowed is a string or an array of token ids");
    if (json_is_array(rd->prompt)) return add_number_ids(rd, rd->prompt);
    const char *s = json_string_value(rd->prompt);
    sh_status st = sh_tokenizer_encode(in->tok, s, json_string_length(rd->prompt), true, &rd->r->prompt);
    if (st != SH_OK) return as_refusal(rd, st, "prompt");
    if (rd->r->echo && !(rd->r->prompt_text = strdup(s))) SH_FAIL(SH_EMEMORY, "no memory for a prompt");
    return SH_OK;
}

static sh_status settle_logprobs(sh_reading *rd) {
    sh_sampling *p = &rd->r->sampling;
    if (rd->chat) {
        if (rd->top_logprobs >= 0 && !rd->chat_logprobs)
            return sh_refuse(rd, 400, "invalid_value",
                             "top_logprobs: is given without logprobs: allowed is with \"logprobs\": true");
        if (rd->chat_logprobs) p->logprobs = rd->top_logprobs > 0 ? (int32_t)rd->top_logprobs : 0;
    }
    p->score_prompt = rd->r->echo && p->logprobs >= 0;
    return SH_OK;
}

static sh_status settle_lengths(const sh_intake *in, sh_reading *rd) {
    sh_sampling *p = &rd->r->sampling;
    const char *input = rd->chat ? "messages" : "prompt";
    long long n = (long long)rd->r->prompt.n, room = in->max_context - n;
    if (n == 0) return sh_refuse(rd, 400, "invalid_value", "%s: no tokens: allowed are 1 or more", input);
    if (rd->max_tokens >= 0 && rd->max_completion_tokens >= 0 && rd->max_tokens != rd->max_completion_tokens)
        return sh_refuse(rd, 400, "invalid_value",
                         "max_completion_tokens: %lld differs from max_tokens %lld: allowed is one of them",
                         (long long)rd->max_completion_tokens, (long long)rd->max_tokens);
    long long max = rd->max_tokens >= 0 ? rd->max_tokens : rd->max_completion_tokens;
    if (max == 0 && !rd->r->echo)
        return sh_refuse(rd, 400, "invalid_value",
                         "%s: 0 generates nothing: allowed are 1 or more, or 0 together with echo",
                         rd->max_tokens >= 0 ? "max_tokens" : "max_completion_tokens");
    if (room < 1)
        return sh_refuse(rd, 413, "context_length_exceeded",
                         "%s: %lld tokens: allowed are %d, the context (--max-context) less one token to generate",
                         input, n, in->max_context - 1);
    if (max > room)
        return sh_refuse(rd, 413, "context_length_exceeded",
                         "%s: %lld tokens and %lld to generate make %lld: allowed are %d together (--max-context)",
                         input, n, max, n + max, in->max_context);
    bool by_default = in->options.default_max_tokens > 0 && in->options.default_max_tokens < room;
    rd->r->unlimited = max < 0 && !by_default;
    if (max < 0) max = by_default ? in->options.default_max_tokens : room;
    rd->r->score_only = max == 0; /* a step ends with a token, so one is made and left out of the row */
    p->max_tokens = max == 0 ? 1 : (int32_t)max;
    if (p->min_tokens > p->max_tokens)
        return sh_refuse(rd, 400, "invalid_value",
                         "min_tokens: %d: allowed are 0 to %d, the most that may be generated", p->min_tokens,
                         p->max_tokens);
    return SH_OK;
}

static void settle_seed(const sh_intake *in, sh_reading *rd) {
    const char *id = rd->r->custom_id;
    rd->r->sampling.seed = rd->has_seed ? (uint64_t)rd->seed : sh_hash64(in->options.seed, id, strlen(id));
}

static sh_status name_model(const sh_intake *in, sh_reading *rd, const json_t *body) {
    const char *m = json_string_value(json_object_get(body, "model"));
    if (!m) return SH_OK;
    if (!(rd->r->model = strdup(m))) SH_FAIL(SH_EMEMORY, "no memory for a name");
    size_t n = strlen(m), own = strlen(in->name);
    bool same = n >= own && !strcmp(m + n - own, in->name) && (n == own || m[n - own - 1] == '/');
    char q[72];
    if (!same && !rd->r->warning[0])
        snprintf(rd->r->warning, sizeof rd->r->warning, "model: requests name \"%s\", the answers are by %.64s",
                 sh_quote(m, q), in->name);
    return SH_OK;
}

/* The content as parsed, in one spelling; the options that decide the answer come in through what they decided. */
static sh_status hash_body(const json_t *body, uint64_t seed, uint64_t *out) {
    char *s = json_dumps(body, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17) | JSON_ENCODE_ANY);
    if (!s) SH_FAIL(SH_EMEMORY, "no memory to hash a request");
    *out = sh_hash64(seed, s, strlen(s));
    free(s);
    return SH_OK;
}

static sh_status read_body(const sh_intake *in, sh_reading *rd, json_t *body) {
    SH_TRY(hash_body(body, rd->chat, &rd->r->hash));
    set_defaults(in, &rd->r->sampling);
    SH_TRY(sh_fields_read(rd, body));
    SH_TRY(settle_logprobs(rd));
    SH_TRY(make_prompt(in, rd));
    SH_TRY(settle_lengths(in, rd));
    settle_seed(in, rd);
    SH_TRY(name_model(in, rd, body));
    const uint64_t decided[3] = {rd->r->hash, rd->r->sampling.seed, (uint64_t)rd->r->sampling.max_tokens};
    rd->r->hash = sh_hash64(0, decided, sizeof decided);
    return SH_OK;
}

/* --- entry --- */

/* The text up to the first colon, when it looks like a field. */
static void find_param(const char *message, char *param, size_t size) {
    size_t n = strcspn(message, ":");
    param[0] = 0;
    if (message[n] != ':' || n >= size || memchr(message, ' ', n)) return;
    memcpy(param, message, n);
    param[n] = 0;
}

static sh_status read_line(const sh_intake *in, sh_reading *rd, const char *text, size_t len, uint64_t number) {
    json_t *line = NULL, *body = NULL;
    size_t skipped = pass_mark(&text, &len, number);
    rd->r->hash = sh_hash64(number, text, len < SH_MAX_LINE_BYTES ? len : SH_MAX_LINE_BYTES);
    sh_status st = parse_line(rd, text, len, skipped, number, &line);
    if (st == SH_OK) st = open_line(rd, line, number, &body);
    if (st == SH_OK) st = read_body(in, rd, body);
    json_decref(line);
    return st;
}

sh_status sh_intake_line(const sh_intake *in, const char *text, size_t len, uint64_t number, sh_request *r) {
    *r = (sh_request){.number = number};
    sh_reading rd = {.vocab = in->config.vocab,
                     .max_context = in->max_context,
                     .lenient = in->options.lenient,
                     .r = r,
                     .url = "",
                     .max_tokens = -1,
                     .max_completion_tokens = -1,
                     .top_logprobs = -1};
    sh_status st = read_line(in, &rd, text, len, number);
    if (st == SH_OK) return SH_OK;
    if (rd.status) { /* a refusal */
        r->status = rd.status;
        snprintf(r->code, sizeof r->code, "%s", rd.code);
        find_param(sh_error_text(), r->param, sizeof r->param);
        r->message = strdup(sh_error_text());
        sh_ids_release(&r->prompt);
        if (r->message) return SH_OK;
    }
    sh_request_release(r);
    SH_FAIL(SH_EMEMORY, "no memory for request %llu", (unsigned long long)number);
}
