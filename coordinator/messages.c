/*
 * The structure of `messages`: what is wrong is named by its path (messages[2].content[0].text), so that the chat
 * format only ever sees well-formed conversations. Does not render. See fields.h.
 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "coordinator/fields.h"

#define PATH 160

static sh_status bad(sh_reading *rd, const char *path, const char *what, const char *allowed) {
    return sh_refuse(rd, 400, "invalid_value", "%s: %s: allowed is %s", path, what, allowed);
}

/* A path in the request, for messages. */
__attribute__((format(printf, 2, 3))) static const char *path_to(char out[PATH], const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(out, PATH, fmt, ap);
    va_end(ap);
    return out;
}

static sh_status check_text(sh_reading *rd, const char *path, const json_t *v) {
    if (!json_is_string(v)) return bad(rd, path, v ? "is not a string" : "is missing", "a string");
    if (strlen(json_string_value(v)) != json_string_length(v))
        return bad(rd, path, "has a NUL character", "text without one");
    return SH_OK;
}

static sh_status check_part(sh_reading *rd, const char *path, const json_t *part) {
    char at[PATH], q[72];
    if (!json_is_object(part)) return bad(rd, path, "is not an object", "{\"type\": \"text\", \"text\": \"...\"}");
    const char *type = json_string_value(json_object_get(part, "type"));
    path_to(at, "%s.type", path);
    if (!type) return bad(rd, at, "is missing", "\"text\"");
    if (strcmp(type, "text"))
        return sh_refuse(rd, 400, "unsupported_value", "%s: \"%s\" parts are not provided yet: allowed is \"text\"", at,
                         sh_quote(type, q));
    path_to(at, "%s.text", path);
    return check_text(rd, at, json_object_get(part, "text"));
}

/* content: a string, an array of parts, or nothing where something else stands in its place. */
static sh_status check_content(sh_reading *rd, const char *path, const json_t *v, bool optional) {
    if (!v || json_is_null(v))
        return optional ? SH_OK : bad(rd, path, "is missing", "a string or an array of text parts");
    if (json_is_string(v)) return check_text(rd, path, v);
    if (!json_is_array(v))
        return bad(rd, path, "is neither a string nor an array", "a string or an array of text parts");
    for (size_t i = 0; i < json_array_size(v); i++) {
        char at[PATH];
        path_to(at, "%s[%zu]", path, i);
        SH_TRY(check_part(rd, at, json_array_get(v, i)));
    }
    return SH_OK;
}

/* Arguments come as an object or, in OpenAI's form, as its JSON text; the latter is replaced by what it says. */
static sh_status check_arguments(sh_reading *rd, const char *path, json_t *function) {
    json_t *v = json_object_get(function, "arguments");
    if (!v || json_is_null(v) || json_is_object(v)) return SH_OK;
    if (!json_is_string(v)) return bad(rd, path, "is not an object", "an object or its JSON text");
    json_t *parsed = json_loadb(json_string_value(v), json_string_length(v), JSON_REJECT_DUPLICATES, NULL);
    if (!json_is_object(parsed)) {
        json_decref(parsed);
        return bad(rd, path, "is not the JSON text of an object", "an object or its JSON text");
    }
    if (json_object_set_new(function, "arguments", parsed)) SH_FAIL(SH_EMEMORY, "no memory for %s", path);
    return SH_OK;
}

static sh_status check_calls(sh_reading *rd, const char *path, json_t *calls) {
    if (!json_is_array(calls)) return bad(rd, path, "is not an array", "an array of calls");
    for (size_t i = 0; i < json_array_size(calls); i++) {
        char at[PATH];
        json_t *function = json_object_get(json_array_get(calls, i), "function");
        path_to(at, "%s[%zu].function", path, i);
        if (!json_is_object(function))
            return bad(rd, at, "is not an object", "{\"name\": \"...\", \"arguments\": {...}}");
        path_to(at, "%s[%zu].function.name", path, i);
        SH_TRY(check_text(rd, at, json_object_get(function, "name")));
        path_to(at, "%s[%zu].function.arguments", path, i);
        SH_TRY(check_arguments(rd, at, function));
    }
    return SH_OK;
}

static sh_status check_keys(sh_reading *rd, const char *path, json_t *message) {
    static const char *const known[] = {"role",         "content",           "name",      "tool_calls",
                                        "tool_call_id", "reasoning_content", "reasoning", "tool_responses"};
    const char *key;
    json_t *v;
    char q[72];
    json_object_foreach(message, key, v) {
        bool ok = rd->lenient || json_is_null(v);
        for (size_t i = 0; i < sizeof known / sizeof *known; i++) ok |= !strcmp(key, known[i]);
        if (!ok)
            return sh_refuse(rd, 400, "unknown_field",
                             "%s.%s: is not a known field: allowed are role, content, name, tool_calls, tool_call_id, "
                             "reasoning_content, tool_responses",
                             path, sh_quote(key, q));
    }
    return SH_OK;
}

static sh_status check_message(sh_reading *rd, const char *path, json_t *m) {
    static const char *const roles[] = {"system", "developer", "user", "assistant", "tool"};
    static const char *const texts[] = {"name", "tool_call_id", "reasoning_content", "reasoning"};
    char at[PATH], q[72];
    if (!json_is_object(m)) return bad(rd, path, "is not an object", "an object with role and content");
    const char *role = json_string_value(json_object_get(m, "role"));
    bool ok = false;
    for (size_t i = 0; i < sizeof roles / sizeof *roles; i++) ok |= role && !strcmp(role, roles[i]);
    path_to(at, "%s.role", path);
    if (!ok)
        return sh_refuse(rd, 400, "invalid_value",
                         "%s: %s is not a known role: allowed is system, developer, user, assistant or tool", at,
                         role ? sh_quote(role, q) : "no string");
    SH_TRY(check_keys(rd, path, m));
    json_t *calls = json_object_get(m, "tool_calls");
    bool has_calls = calls && !json_is_null(calls);
    path_to(at, "%s.content", path);
    SH_TRY(check_content(rd, at, json_object_get(m, "content"), has_calls || sh_json_is_set(m, "tool_responses")));
    path_to(at, "%s.tool_calls", path);
    if (has_calls) SH_TRY(check_calls(rd, at, calls));
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        path_to(at, "%s.%s", path, texts[i]);
        if (sh_json_is_set(m, texts[i])) SH_TRY(check_text(rd, at, json_object_get(m, texts[i])));
    }
    return SH_OK;
}

sh_status sh_messages_check(sh_reading *rd, json_t *messages) {
    if (!json_is_array(messages) || json_array_size(messages) == 0)
        return bad(rd, "messages", json_is_array(messages) ? "is empty" : "is not an array",
                   "an array of at least one message");
    for (size_t i = 0; i < json_array_size(messages); i++) {
        char path[PATH];
        path_to(path, "messages[%zu]", i);
        SH_TRY(check_message(rd, path, json_array_get(messages, i)));
    }
    return SH_OK;
}
