/*
 * One table of all body fields of /v1/chat/completions and /v1/completions: those provided, and those that are
 * understood and refused by name. See fields.h and docs/requests.md, which lists the same.
 */
#include "coordinator/fields.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { CHAT = 1, COMPLETION = 2, BOTH = 3 };

typedef struct field {
    const char *name;
    int where;
    sh_status (*take)(sh_reading *rd, const json_t *body, const char *name, const json_t *v);
} field;

sh_status sh_refuse(sh_reading *rd, int status, const char *code, const char *fmt, ...) {
    char text[1000];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    rd->status = status;
    rd->code = code;
    SH_FAIL(SH_EINPUT, "%s", text);
}

const char *sh_quote(const char *s, char out[72]) {
    size_t n = strlen(s), m = n > 64 ? 61 : n;
    while (m < n && m > 0 && ((unsigned char)s[m] & 0xc0) == 0x80) m--;
    for (size_t i = 0; i < m; i++) out[i] = (unsigned char)s[i] < 32 || s[i] == 127 ? '?' : s[i];
    memcpy(out + m, m < n ? "..." : "", m < n ? 4 : 1);
    return out;
}

bool sh_field_integer(const json_t *v, int64_t *out) {
    double x = json_number_value(v);
    bool whole = json_is_integer(v) || (json_is_real(v) && fabs(x) < 9e15 && x == floor(x));
    if (whole) *out = json_is_integer(v) ? json_integer_value(v) : (int64_t)x;
    return whole;
}

/* --- kinds of fields --- */

static sh_status take_int(sh_reading *rd, const json_t *body, const char *name, int64_t min, int64_t max,
                          int64_t *out) {
    if (sh_json_int(body, name, min, max, out) != SH_OK)
        return sh_refuse(rd, 400, "invalid_value", "%s", sh_error_text());
    return SH_OK;
}

static sh_status take_float(sh_reading *rd, const json_t *body, const char *name, double min, double max, float *out) {
    double x = (double)*out;
    if (sh_json_double(body, name, min, max, &x) != SH_OK)
        return sh_refuse(rd, 400, "invalid_value", "%s", sh_error_text());
    *out = (float)x;
    return SH_OK;
}

static sh_status take_bool(sh_reading *rd, const json_t *body, const char *name, bool *out) {
    if (sh_json_bool(body, name, out) != SH_OK) return sh_refuse(rd, 400, "invalid_value", "%s", sh_error_text());
    return SH_OK;
}

static sh_status wrong_type(sh_reading *rd, const char *name, const json_t *v, const char *allowed) {
    return sh_refuse(rd, 400, "invalid_value", "%s: %s is given: allowed is %s", name, sh_json_type_name(v), allowed);
}

/* A string without NUL characters (text is passed on as C strings). */
static sh_status check_text(sh_reading *rd, const char *name, const json_t *v) {
    if (!json_is_string(v)) return wrong_type(rd, name, v, "a string");
    if (strlen(json_string_value(v)) != json_string_length(v))
        return sh_refuse(rd, 400, "invalid_value", "%s: the text has a NUL character: allowed is text without one",
                         name);
    return SH_OK;
}

static sh_status not_provided(sh_reading *rd, const char *name, const char *allowed) {
    return sh_refuse(rd, 400, "unsupported_field", "%s: is not provided yet: %s", name, allowed);
}

/* --- accepted and without effect --- */

static sh_status take_model(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    return check_text(rd, name, v);
}

static sh_status take_metadata(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    return json_is_object(v) ? SH_OK : wrong_type(rd, name, v, "an object");
}

static sh_status take_stream(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    bool on = false;
    SH_TRY(take_bool(rd, body, name, &on));
    if (on)
        return sh_refuse(rd, 400, "unsupported_value", "%s: true is given: allowed is false, results are whole rows",
                         name);
    return SH_OK;
}

/* --- input --- */

static sh_status take_messages(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    (void)name;
    SH_TRY(sh_messages_check(rd, (json_t *)v));
    rd->messages = v;
    return SH_OK;
}

static sh_status take_tools(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    if (!json_is_array(v)) return wrong_type(rd, name, v, "an array of tools");
    for (size_t i = 0; i < json_array_size(v); i++) {
        const json_t *t = json_array_get(v, i), *f = json_object_get(t, "function");
        const char *type = json_string_value(json_object_get(t, "type"));
        if (!type || strcmp(type, "function"))
            return sh_refuse(rd, 400, "invalid_value", "%s[%zu].type: is not \"function\": allowed is \"function\"",
                             name, i);
        if (!json_is_string(json_object_get(f, "name")))
            return sh_refuse(rd, 400, "invalid_value", "%s[%zu].function.name: is missing: allowed is a string", name,
                             i);
    }
    if (json_array_size(v)) rd->tools = v;
    return SH_OK;
}

static sh_status take_tool_choice(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    const char *s = json_string_value(v);
    char q[72];
    if (s && !strcmp(s, "none"))
        rd->no_tools = true;
    else if (!s || strcmp(s, "auto"))
        return sh_refuse(rd, 400, "unsupported_value",
                         "%s: %s forces a choice, which is not provided yet: allowed are \"auto\" and \"none\"", name,
                         s ? sh_quote(s, q) : sh_json_type_name(v));
    return SH_OK;
}

static sh_status take_template_kwargs(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    if (!json_is_object(v)) return wrong_type(rd, name, v, "an object with enable_thinking");
    const char *key;
    json_t *x;
    char q[72];
    json_object_foreach((json_t *)v, key, x) {
        if (!strcmp(key, "enable_thinking")) {
            if (!json_is_boolean(x)) return wrong_type(rd, "chat_template_kwargs.enable_thinking", x, "true or false");
            rd->thinking = json_is_true(x);
        } else if (!rd->lenient)
            return sh_refuse(rd, 400, "unknown_field", "%s.%s: is not a known field: allowed is enable_thinking", name,
                             sh_quote(key, q));
    }
    return SH_OK;
}

static sh_status take_prompt(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    if (json_is_string(v)) {
        SH_TRY(check_text(rd, name, v));
    } else if (json_is_array(v)) {
        for (size_t i = 0; i < json_array_size(v); i++) {
            const json_t *x = json_array_get(v, i);
            int64_t id;
            if (!sh_field_integer(x, &id))
                return sh_refuse(
                    rd, 400, "invalid_value",
                    "%s: item %zu is %s: allowed is one string, or one array of token ids (integers from 0 to %d)",
                    name, i, sh_json_type_name(x), rd->vocab - 1);
            if (id < 0 || id >= rd->vocab)
                return sh_refuse(rd, 400, "invalid_value", "%s: item %zu is %lld: allowed are token ids from 0 to %d",
                                 name, i, (long long)id, rd->vocab - 1);
        }
    } else
        return wrong_type(rd, name, v, "a string or an array of token ids");
    rd->prompt = v;
    return SH_OK;
}

/* --- lengths and sampling --- */

static sh_status take_max_tokens(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    int64_t *to = strcmp(name, "max_tokens") ? &rd->max_completion_tokens : &rd->max_tokens;
    return take_int(rd, body, name, 0, INT32_MAX, to);
}

static sh_status take_min_tokens(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    int64_t x = 0;
    SH_TRY(take_int(rd, body, name, 0, INT32_MAX, &x));
    rd->r->sampling.min_tokens = (int32_t)x;
    return SH_OK;
}

static sh_status take_temperature(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    return take_float(rd, body, name, 0, 2, &rd->r->sampling.temperature);
}

static sh_status take_top_p(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    return take_float(rd, body, name, 0, 1, &rd->r->sampling.top_p);
}

static sh_status take_min_p(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    return take_float(rd, body, name, 0, 1, &rd->r->sampling.min_p);
}

static sh_status take_top_k(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    int64_t x = 0;
    SH_TRY(take_int(rd, body, name, -1, INT32_MAX, &x)); /* −1 and 0: off, as in vLLM and transformers */
    rd->r->sampling.top_k = x < 0 ? 0 : (int32_t)x;
    return SH_OK;
}

static sh_status take_seed(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    SH_TRY(take_int(rd, body, name, INT64_MIN, INT64_MAX, &rd->seed));
    rd->has_seed = true;
    return SH_OK;
}

static sh_status take_one(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    int64_t x = 1;
    SH_TRY(take_int(rd, body, name, 1, 1024, &x));
    if (x != 1)
        return sh_refuse(rd, 400, "unsupported_value", "%s: %lld is not provided yet: allowed is 1", name,
                         (long long)x);
    return SH_OK;
}

static sh_status take_ignore_eos(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    return take_bool(rd, body, name, &rd->r->sampling.ignore_eos);
}

/* --- ends --- */

static sh_status add_stop(sh_reading *rd, const char *name, const json_t *v) {
    sh_sampling *p = &rd->r->sampling;
    SH_TRY(check_text(rd, name, v));
    size_t n = json_string_length(v);
    if (n < 1 || n > SH_MAX_STOP_BYTES)
        return sh_refuse(rd, 400, "invalid_value", "%s: a string of %zu bytes: allowed are 1 to %d bytes", name, n,
                         SH_MAX_STOP_BYTES);
    memcpy(p->stop[p->n_stops], json_string_value(v), n);
    p->stop_len[p->n_stops++] = (uint16_t)n;
    return SH_OK;
}

static sh_status take_stop(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    if (json_is_string(v)) return add_stop(rd, name, v);
    if (!json_is_array(v)) return wrong_type(rd, name, v, "a string or an array of strings");
    if (json_array_size(v) > SH_MAX_STOPS)
        return sh_refuse(rd, 400, "invalid_value", "%s: %zu strings: allowed are at most %d", name, json_array_size(v),
                         SH_MAX_STOPS);
    for (size_t i = 0; i < json_array_size(v); i++) {
        char item[32];
        snprintf(item, sizeof item, "%s[%zu]", name, i);
        SH_TRY(add_stop(rd, item, json_array_get(v, i)));
    }
    return SH_OK;
}

static sh_status take_stop_ids(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    sh_sampling *p = &rd->r->sampling;
    if (!json_is_array(v)) return wrong_type(rd, name, v, "an array of token ids");
    if (json_array_size(v) > SH_MAX_STOP_IDS)
        return sh_refuse(rd, 400, "invalid_value", "%s: %zu ids: allowed are at most %d", name, json_array_size(v),
                         SH_MAX_STOP_IDS);
    for (size_t i = 0; i < json_array_size(v); i++) {
        int64_t id = -1;
        if (!sh_field_integer(json_array_get(v, i), &id) || id < 0 || id >= rd->vocab)
            return sh_refuse(rd, 400, "invalid_value", "%s: item %zu is no token id: allowed are integers from 0 to %d",
                             name, i, rd->vocab - 1);
        p->stop_ids[p->n_stop_ids++] = (int32_t)id;
    }
    return SH_OK;
}

/* --- what is reported --- */

static sh_status take_logprobs(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    if (rd->chat) return take_bool(rd, body, name, &rd->chat_logprobs);
    int64_t x = -1;
    SH_TRY(take_int(rd, body, name, 0, SH_MAX_TOP_LOGPROBS, &x));
    rd->r->sampling.logprobs = (int32_t)x;
    return SH_OK;
}

static sh_status take_top_logprobs(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    return take_int(rd, body, name, 0, SH_MAX_TOP_LOGPROBS, &rd->top_logprobs);
}

static sh_status take_echo(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    return take_bool(rd, body, name, &rd->r->echo);
}

static sh_status take_return_ids(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    return take_bool(rd, body, name, &rd->r->return_token_ids);
}

/* --- understood and not provided, neutral values apart --- */

static sh_status neutral(sh_reading *rd, const json_t *body, const char *name, double value) {
    double x = value;
    if (sh_json_double(body, name, -1e300, 1e300, &x) != SH_OK)
        return sh_refuse(rd, 400, "invalid_value", "%s", sh_error_text());
    if (x != value)
        return sh_refuse(rd, 400, "unsupported_value", "%s: %g is not provided yet: allowed is %g, or leave it out",
                         name, x, value);
    return SH_OK;
}

static sh_status take_penalty(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    return neutral(rd, body, name, 0);
}

static sh_status take_repetition(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)v;
    return neutral(rd, body, name, 1);
}

static sh_status take_logit_bias(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    if (!json_is_object(v)) return wrong_type(rd, name, v, "an empty object");
    return json_object_size(v) == 0 ? SH_OK : not_provided(rd, name, "allowed is an empty object, or leave it out");
}

static sh_status take_response_format(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    const char *type = json_string_value(json_object_get(v, "type"));
    if (type && !strcmp(type, "text")) return SH_OK;
    return not_provided(rd, name, "allowed is {\"type\": \"text\"}, or leave it out");
}

static sh_status take_suffix(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    if (json_is_string(v) && json_string_length(v) == 0) return SH_OK;
    return not_provided(rd, name, "leave it out");
}

static sh_status take_refused(sh_reading *rd, const json_t *body, const char *name, const json_t *v) {
    (void)body;
    (void)v;
    return not_provided(rd, name, "leave it out");
}

static const field fields[] = {
    {"model", BOTH, take_model},
    {"user", BOTH, take_model},
    {"metadata", BOTH, take_metadata},
    {"stream", BOTH, take_stream},
    {"messages", CHAT, take_messages},
    {"tools", CHAT, take_tools},
    {"tool_choice", CHAT, take_tool_choice},
    {"chat_template_kwargs", CHAT, take_template_kwargs},
    {"prompt", COMPLETION, take_prompt},
    {"max_tokens", BOTH, take_max_tokens},
    {"max_completion_tokens", BOTH, take_max_tokens},
    {"min_tokens", BOTH, take_min_tokens},
    {"temperature", BOTH, take_temperature},
    {"top_p", BOTH, take_top_p},
    {"top_k", BOTH, take_top_k},
    {"min_p", BOTH, take_min_p},
    {"seed", BOTH, take_seed},
    {"n", BOTH, take_one},
    {"best_of", COMPLETION, take_one},
    {"stop", BOTH, take_stop},
    {"stop_token_ids", BOTH, take_stop_ids},
    {"ignore_eos", BOTH, take_ignore_eos},
    {"logprobs", BOTH, take_logprobs},
    {"top_logprobs", CHAT, take_top_logprobs},
    {"echo", COMPLETION, take_echo},
    {"return_token_ids", BOTH, take_return_ids},
    {"presence_penalty", BOTH, take_penalty},
    {"frequency_penalty", BOTH, take_penalty},
    {"repetition_penalty", BOTH, take_repetition},
    {"logit_bias", BOTH, take_logit_bias},
    {"response_format", BOTH, take_response_format},
    {"suffix", COMPLETION, take_suffix},
    {"prompt_logprobs", BOTH, take_refused},
    {"media", COMPLETION, take_refused},
    {"vision_tokens", BOTH, take_refused},
    {"guided_json", BOTH, take_refused},
    {"guided_regex", BOTH, take_refused},
    {"guided_choice", BOTH, take_refused},
    {"guided_grammar", BOTH, take_refused},
    {"functions", CHAT, take_refused},
    {"function_call", CHAT, take_refused},
};

static const field *find_field(const char *name) {
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (!strcmp(fields[i].name, name)) return &fields[i];
    return NULL;
}

sh_status sh_fields_read(sh_reading *rd, const json_t *body) {
    const char *key;
    json_t *v;
    char q[72];
    int here = rd->chat ? CHAT : COMPLETION;
    json_object_foreach((json_t *)body, key, v) {
        const field *f = find_field(key);
        if (!f || !(f->where & here)) {
            if (rd->lenient) continue;
            return sh_refuse(rd, 400, "unknown_field",
                             "%s: is not a field of %s: docs/requests.md lists what is allowed", sh_quote(key, q),
                             rd->url);
        }
        if (json_is_null(v)) continue; /* as if absent */
        SH_TRY(f->take(rd, body, key, v));
    }
    return SH_OK;
}
