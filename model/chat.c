/*
 * Messages → text in Gemma 4's chat format, mirroring the templates statement by statement (which is why some
 * conditions look odd: see chat_template_{A,B}.jinja beside the tests). Tool declarations are in chat_tools.c. No Jinja
 * is interpreted: a template that is not one of the known three is rendered as the nearest of them, and the caller is
 * told.
 */
#include "model/chat.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/file.h"
#include "common/hash.h"
#include "common/limits.h"
#include "model/beside.h"
#include "model/chat_int.h"
#include "model/pytext.h"

/* --- loading
 * ---------------------------------------------------------------------------------------------------------- */

/* Hashes (hash.h) of the known templates without white space at their ends. */
static const struct {
    uint64_t hash;
    sh_chat_form form;
} known_templates[] = {
    {0xea24aa51968faae9u, SH_CHAT_A},       /* current 31B */
    {0x5a76fde17ea54174u, SH_CHAT_B},       /* first release, 26B-A4B */
    {0x14c01a43bc137e62u, SH_CHAT_COMPACT}, /* the demo model's */
};

static void recognise(const char *text, size_t n, sh_chat *c) {
    sh_span s = sh_py_trim(text, n);
    uint64_t hash = sh_hash64(0, s.p, s.n);
    for (size_t i = 0; i < sizeof known_templates / sizeof *known_templates; i++)
        if (hash == known_templates[i].hash) {
            c->form = known_templates[i].form;
            c->known = true;
            return;
        }
    c->known = false;
    if (!memmem(s.p, s.n, "<|turn>", 7))
        c->form = SH_CHAT_NONE;
    else if (memmem(s.p, s.n, "format_tool_response_block", 26) || memmem(s.p, s.n, "continue_same_model_turn", 24))
        c->form = SH_CHAT_A;
    else
        c->form = memmem(s.p, s.n, "format_function_declaration", 27) ? SH_CHAT_B : SH_CHAT_COMPACT;
}

/* chat_template of tokenizer_config.json: a string, or a list of {"name", "template"} of which "default" counts. */
static const json_t *template_of(const json_t *config) {
    const json_t *j = json_object_get(config, "chat_template");
    for (size_t i = 0; json_is_array(j) && i < json_array_size(j); i++) {
        const json_t *item = json_array_get(j, i), *name = json_object_get(item, "name");
        if (json_is_string(name) && strcmp(json_string_value(name), "default") == 0)
            return json_object_get(item, "template");
    }
    return json_is_string(j) ? j : NULL;
}

static sh_status read_bos(const json_t *config, sh_chat *c) {
    const json_t *j = json_object_get(config, "bos_token");
    if (json_is_object(j)) j = json_object_get(j, "content");
    if (!json_is_string(j)) return SH_OK;
    if (json_string_length(j) >= sizeof c->bos)
        SH_FAIL(SH_ELIMIT, "bos_token: %zu bytes: allowed are %zu", json_string_length(j), sizeof c->bos - 1);
    snprintf(c->bos, sizeof c->bos, "%s", json_string_value(j));
    return SH_OK;
}

sh_status sh_chat_load(const char *model_dir, sh_chat *out) {
    static const char *const keys[] = {"bos_token", "chat_template", NULL};
    char file[PATH_MAX], what[4200];
    if (snprintf(file, sizeof file, "%s/chat_template.jinja", model_dir) >= PATH_MAX)
        SH_FAIL(SH_EINPUT, "%.100s…: a path that is too long", model_dir);
    SH_CLEANUP(sh_json_release) json_t *config = NULL;
    sh_chat c = {.form = SH_CHAT_NONE, .known = true, .bos = "<bos>"};
    SH_TRY(sh_beside_members(model_dir, "tokenizer_config.json", keys, what, &config));
    sh_status st = read_bos(config, &c);
    if (st != SH_OK) return sh_error_prefix(st, "%s", what);
    const json_t *embedded = template_of(config);
    if (sh_file_exists(file)) {
        char *text = NULL;
        size_t len = 0;
        SH_TRY(sh_file_read(file, SH_MAX_CONFIG_BYTES, &text, &len));
        recognise(text, len, &c);
        free(text);
    } else if (json_is_string(embedded)) {
        recognise(json_string_value(embedded), json_string_length(embedded), &c);
    }
    *out = c;
    return SH_OK;
}

/* --- checking
 * --------------------------------------------------------------------------------------------------------- */

static bool is_role(const json_t *message, const char *role) {
    const json_t *r = sh_py_get(message, "role");
    return json_is_string(r) && strcmp(json_string_value(r), role) == 0;
}

static bool is_system(const json_t *message) {
    return is_role(message, "system") || is_role(message, "developer");
}

/* The placeholder of a media part in the template's words; NULL for other types. */
static const char *media_text(sh_chat_form form, const char *type) {
    bool b = form == SH_CHAT_B;
    if (strcmp(type, "image") == 0) return b ? "\n\n<|image|>\n\n" : "<|image|>";
    if (strcmp(type, "audio") == 0) return "<|audio|>";
    if (strcmp(type, "video") == 0) return b ? "\n\n<|video|>\n\n" : "<|video|>";
    return NULL;
}

static sh_status check_part(const sh_chat *c, const json_t *part, size_t i, size_t k) {
    const json_t *type = sh_py_get(part, "type");
    if (!json_is_string(type))
        SH_FAIL(SH_EINPUT, "messages[%zu].content[%zu].type: not a string: allowed is \"text\"", i, k);
    const char *t = json_string_value(type);
    if (strcmp(t, "text") == 0) {
        if (json_is_string(sh_py_get(part, "text"))) return SH_OK;
        SH_FAIL(SH_EINPUT, "messages[%zu].content[%zu].text: %s is not a string", i, k,
                sh_json_type_name(sh_py_get(part, "text")));
    }
    bool media = c->media && c->form != SH_CHAT_COMPACT && media_text(c->form, t);
    if (!media)
        SH_FAIL(SH_EUNSUPPORTED,
                "messages[%zu].content[%zu]: part of type '%.40s' is not supported yet: allowed is \"text\"", i, k, t);
    return SH_OK;
}

static sh_status check_content(const sh_chat *c, const json_t *message, size_t i) {
    const json_t *content = sh_py_get(message, "content");
    if (json_is_string(content)) return SH_OK;
    if (json_is_array(content)) {
        for (size_t k = 0; k < json_array_size(content); k++) SH_TRY(check_part(c, json_array_get(content, k), i, k));
        return SH_OK;
    }
    bool may_lack = c->form != SH_CHAT_COMPACT &&
                    (is_role(message, "assistant") || is_role(message, "model") || is_role(message, "tool"));
    if (content && !json_is_null(content))
        SH_FAIL(SH_EINPUT, "messages[%zu].content: %s: allowed are a string and an array of parts", i,
                sh_json_type_name(content));
    if (!may_lack) SH_FAIL(SH_EINPUT, "messages[%zu].content: missing: allowed are a string and an array of parts", i);
    return SH_OK;
}

static sh_status check_calls(const sh_chat *c, const json_t *message, size_t i) {
    const json_t *calls = sh_py_get(message, "tool_calls");
    if (!calls || json_is_null(calls)) return SH_OK;
    if (!json_is_array(calls))
        SH_FAIL(SH_EINPUT, "messages[%zu].tool_calls: %s is not an array", i, sh_json_type_name(calls));
    if (c->form == SH_CHAT_COMPACT && json_array_size(calls) > 0)
        SH_FAIL(SH_EUNSUPPORTED, "messages[%zu].tool_calls: this checkpoint's chat template knows no tools", i);
    for (size_t k = 0; k < json_array_size(calls); k++) {
        const json_t *f = sh_py_get(json_array_get(calls, k), "function"), *args = sh_py_get(f, "arguments");
        if (!json_is_string(sh_py_get(f, "name")))
            SH_FAIL(SH_EINPUT, "messages[%zu].tool_calls[%zu].function.name: not a string", i, k);
        if (args && !json_is_object(args) && !json_is_string(args) && !json_is_null(args))
            SH_FAIL(SH_EINPUT,
                    "messages[%zu].tool_calls[%zu].function.arguments: %s: allowed are an object and a string", i, k,
                    sh_json_type_name(args));
    }
    return SH_OK;
}

static sh_status check_responses(const json_t *message, size_t i) {
    const json_t *list = sh_py_get(message, "tool_responses");
    if (!list || json_is_null(list)) return SH_OK;
    if (!json_is_array(list))
        SH_FAIL(SH_EINPUT, "messages[%zu].tool_responses: %s is not an array", i, sh_json_type_name(list));
    for (size_t k = 0; k < json_array_size(list); k++) {
        const json_t *r = json_array_get(list, k), *name = sh_py_get(r, "name");
        if (!json_is_object(r) || (name && !json_is_string(name)))
            SH_FAIL(SH_EINPUT, "messages[%zu].tool_responses[%zu].name: not a string", i, k);
    }
    return SH_OK;
}

static sh_status check_message(const sh_chat *c, const json_t *message, size_t i) {
    static const char *const roles[] = {"system", "developer", "user", "assistant", "model", "tool"};
    if (!json_is_object(message))
        SH_FAIL(SH_EINPUT, "messages[%zu]: %s is not an object", i, sh_json_type_name(message));
    const json_t *role = sh_py_get(message, "role");
    bool good = false;
    for (size_t k = 0; k < sizeof roles / sizeof *roles; k++) good = good || is_role(message, roles[k]);
    if (!good)
        SH_FAIL(SH_EINPUT,
                "messages[%zu].role: '%.40s': allowed are system, developer, user, assistant, model and tool", i,
                json_is_string(role) ? json_string_value(role) : sh_json_type_name(role));
    SH_TRY(check_content(c, message, i));
    SH_TRY(check_calls(c, message, i));
    SH_TRY(check_responses(message, i));
    for (int k = 0; k < 2; k++) {
        const char *key = k ? "reasoning_content" : "reasoning";
        const json_t *v = sh_py_get(message, key);
        if (v && !json_is_string(v) && !json_is_null(v))
            SH_FAIL(SH_EINPUT, "messages[%zu].%s: %s is not a string", i, key, sh_json_type_name(v));
    }
    return SH_OK;
}

static sh_status check_all(const sh_chat *c, const json_t *messages, const json_t *tools) {
    if (c->form == SH_CHAT_NONE)
        SH_FAIL(SH_EINPUT,
                "messages: the checkpoint has no chat template (chat_template.jinja) that is known: use prompt");
    if (!json_is_array(messages) || json_array_size(messages) == 0)
        SH_FAIL(SH_EINPUT, "messages: %s: allowed is an array with at least one message",
                json_is_array(messages) ? "an empty array" : sh_json_type_name(messages));
    for (size_t i = 0; i < json_array_size(messages); i++) SH_TRY(check_message(c, json_array_get(messages, i), i));
    if (tools && !json_is_null(tools) && !json_is_array(tools))
        SH_FAIL(SH_EINPUT, "tools: %s is not an array", sh_json_type_name(tools));
    if (c->form == SH_CHAT_COMPACT && json_array_size(tools) > 0)
        SH_FAIL(SH_EUNSUPPORTED, "tools: this checkpoint's chat template knows no tools");
    return SH_OK;
}

/* --- messages
 * --------------------------------------------------------------------------------------------------------- */

/* What the last message ended with (the template's prev_message_type), as far as anything depends on it. */
typedef enum sh_chat_last { LAST_OTHER, LAST_CALL, LAST_RESPONSE } sh_chat_last;

typedef struct sh_render {
    const sh_chat *c;
    const json_t *messages;
    size_t first, n;   /* messages[first … n−1] follow the system turn */
    size_t after_user; /* index behind the last user message */
    bool thinking;
    sh_chat_last last;
    sh_buf *out;
} sh_render;

static sh_status add_trimmed(const char *s, size_t n, sh_buf *out) {
    sh_span t = sh_py_trim(s, n);
    return sh_buf_add(out, t.p, t.n);
}

/* macro strip_thinking: of each stretch up to <channel|>, what stands before <|channel>. */
static sh_status add_without_thoughts(const char *s, size_t n, sh_buf *out) {
    static const char open[] = "<|channel>", close[] = "<channel|>";
    SH_CLEANUP(sh_buf_release) sh_buf kept = {0};
    const char *end = s + n;
    for (const char *next; s; s = next) {
        const char *hit = memmem(s, (size_t)(end - s), close, sizeof close - 1), *stop = hit ? hit : end;
        next = hit ? hit + sizeof close - 1 : NULL;
        const char *thought = memmem(s, (size_t)(stop - s), open, sizeof open - 1);
        SH_TRY(sh_buf_add(&kept, s, (size_t)((thought ? thought : stop) - s)));
    }
    return add_trimmed((const char *)kept.data, kept.len, out);
}

static sh_status add_text(const json_t *text, bool model, sh_buf *out) {
    const char *s = json_string_value(text);
    size_t n = json_string_length(text);
    return model ? add_without_thoughts(s, n, out) : add_trimmed(s, n, out);
}

static sh_status add_content(sh_render *r, const json_t *message, bool model) {
    const json_t *content = sh_py_get(message, "content");
    if (json_is_string(content)) return add_text(content, model, r->out);
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *part = json_array_get(content, i);
        const char *media = media_text(r->c->form, json_string_value(sh_py_get(part, "type")));
        if (!media) {
            SH_TRY(add_text(sh_py_get(part, "text"), model, r->out));
            continue;
        }
        SH_TRY(sh_buf_add_str(r->out, media));
        r->last = LAST_OTHER;
    }
    return SH_OK;
}

static sh_status add_calls(sh_render *r, const json_t *message) {
    const json_t *calls = sh_py_get(message, "tool_calls");
    for (size_t i = 0; i < json_array_size(calls); i++) {
        const json_t *f = sh_py_get(json_array_get(calls, i), "function"), *args = sh_py_get(f, "arguments");
        SH_TRY(sh_buf_add_str(r->out, "<|tool_call>call:"));
        SH_TRY(sh_py_str(sh_py_get(f, "name"), r->out));
        SH_TRY(sh_buf_add_str(r->out, "{"));
        if (json_is_object(args)) SH_TRY(sh_chat_add_members(args, false, r->out));
        if (json_is_string(args)) SH_TRY(sh_py_str(args, r->out));
        SH_TRY(sh_buf_add_str(r->out, "}<tool_call|>"));
        r->last = LAST_CALL;
    }
    return SH_OK;
}

/* macro format_tool_response_block */
static sh_status add_response(sh_render *r, const char *name, const json_t *response) {
    SH_TRY(sh_buf_printf(r->out, "<|tool_response>response:%s{", name));
    if (json_is_object(response)) {
        SH_TRY(sh_chat_add_members(response, false, r->out));
    } else {
        SH_TRY(sh_buf_add_str(r->out, "value:"));
        SH_TRY(sh_chat_add_argument(response, false, r->out));
    }
    r->last = LAST_RESPONSE;
    return sh_buf_add_str(r->out, "}<tool_response|>");
}

/* Responses that ride on the message that called. */
static sh_status add_own_responses(sh_render *r, const json_t *message) {
    const json_t *list = sh_py_get(message, "tool_responses");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *x = json_array_get(list, i), *name = sh_py_get(x, "name");
        SH_TRY(add_response(r, name ? json_string_value(name) : "unknown", sh_py_get(x, "response")));
    }
    return SH_OK;
}

/* The name of the function that tool message i answers: that of the last call with its id, else its own name. */
static sh_status response_name(const json_t *calls, const json_t *tool, size_t i, const char **out) {
    const json_t *name = sh_py_get(tool, "name"), *id = sh_py_get(tool, "tool_call_id");
    for (size_t k = 0; k < json_array_size(calls); k++) {
        const json_t *call = json_array_get(calls, k), *call_id = sh_py_get(call, "id");
        bool none = (!id || json_is_null(id)) && (!call_id || json_is_null(call_id));
        if (none || (id && call_id && json_equal(id, call_id))) name = sh_py_get(sh_py_get(call, "function"), "name");
    }
    if (!json_is_string(name))
        SH_FAIL(SH_EINPUT, "messages[%zu].tool_call_id: answers no call of the message before, and there is no name",
                i);
    *out = json_string_value(name);
    return SH_OK;
}

/* Form A: the tool messages that follow a call become responses inside its turn. */
static sh_status add_following_responses(sh_render *r, const json_t *calls, size_t i) {
    for (size_t k = i + 1; k < r->n; k++) {
        const json_t *tool = json_array_get(r->messages, k), *body = sh_py_get(tool, "content");
        const char *name = NULL;
        if (!is_role(tool, "tool")) break;
        SH_TRY(response_name(calls, tool, k, &name));
        if (!json_is_array(body)) {
            SH_CLEANUP(sh_json_release) json_t *none = json_null();
            SH_TRY(add_response(r, name, body ? body : none));
            continue;
        }
        SH_CLEANUP(sh_buf_release) sh_buf text = {0};
        for (size_t p = 0; p < json_array_size(body); p++)
            SH_TRY(sh_py_str(sh_py_get(json_array_get(body, p), "text"), &text));
        SH_CLEANUP(sh_json_release) json_t *joined = json_stringn(text.data ? (const char *)text.data : "", text.len);
        if (!joined) SH_FAIL(SH_EMEMORY, "no memory for messages[%zu].content", k);
        SH_TRY(add_response(r, name, joined));
    }
    return SH_OK;
}

static sh_status open_turn(const char *role, sh_buf *out) {
    return sh_buf_printf(out, "<|turn>%s\n", role);
}

static const char *turn_role(const json_t *message) {
    const char *role = json_string_value(sh_py_get(message, "role"));
    return strcmp(role, "assistant") == 0 ? "model" : role;
}

/* Form A: whether message i goes on in the turn of an assistant message before it (tool messages between do not count).
 */
static bool continues_turn(const sh_render *r, size_t i) {
    for (size_t k = i; k > r->first; k--) {
        const json_t *before = json_array_get(r->messages, k - 1);
        if (!is_role(before, "tool")) return is_role(before, "assistant");
    }
    return false;
}

static sh_status add_thought(sh_render *r, const json_t *message, size_t i) {
    const json_t *text = sh_py_get(message, "reasoning");
    if (!sh_py_true(text)) text = sh_py_get(message, "reasoning_content");
    if (!sh_py_true(text) || i < r->after_user || !sh_py_true(sh_py_get(message, "tool_calls"))) return SH_OK;
    SH_TRY(sh_buf_add_str(r->out, "<|channel>thought\n"));
    SH_TRY(sh_py_str(text, r->out));
    return sh_buf_add_str(r->out, "\n<channel|>");
}

static sh_status add_message_a(sh_render *r, size_t i) {
    const json_t *message = json_array_get(r->messages, i), *calls = sh_py_get(message, "tool_calls");
    if (is_role(message, "tool")) return SH_OK;
    const char *role = turn_role(message);
    bool model = strcmp(role, "model") == 0;
    r->last = LAST_OTHER;
    if (!model || !continues_turn(r, i)) SH_TRY(open_turn(role, r->out));
    SH_TRY(add_thought(r, message, i));
    SH_TRY(add_calls(r, message));
    if (sh_py_true(sh_py_get(message, "tool_responses")))
        SH_TRY(add_own_responses(r, message));
    else if (sh_py_true(calls))
        SH_TRY(add_following_responses(r, calls, i));
    bool answered = r->last == LAST_RESPONSE;
    SH_TRY(add_content(r, message, model));
    if (r->last == LAST_CALL && !answered) return sh_buf_add_str(r->out, "<|tool_response>");
    if (answered && !sh_py_true(sh_py_get(message, "content"))) return SH_OK;
    return sh_buf_add_str(r->out, "<turn|>\n");
}

static sh_status add_message_b(sh_render *r, size_t i) {
    const json_t *message = json_array_get(r->messages, i);
    const char *role = turn_role(message);
    r->last = LAST_OTHER;
    SH_TRY(open_turn(role, r->out));
    SH_TRY(add_calls(r, message));
    SH_TRY(add_own_responses(r, message));
    SH_TRY(add_content(r, message, strcmp(role, "model") == 0));
    bool open = sh_py_true(sh_py_get(message, "tool_responses")) && !sh_py_true(sh_py_get(message, "content"));
    return open ? SH_OK : sh_buf_add_str(r->out, "<turn|>\n");
}

static sh_status add_message_compact(sh_render *r, size_t i) {
    const json_t *message = json_array_get(r->messages, i);
    SH_TRY(open_turn(turn_role(message), r->out));
    SH_TRY(add_content(r, message, false));
    return sh_buf_add_str(r->out, "<turn|>\n");
}

/* --- the whole
 * -------------------------------------------------------------------------------------------------------- */

/* The system turn: thinking mark, the first message if it is a system's, tools. Moves r->first behind it. */
static sh_status add_system(sh_render *r, const json_t *tools) {
    const json_t *message = json_array_get(r->messages, 0);
    sh_chat_form form = r->c->form;
    bool think = r->thinking && form != SH_CHAT_COMPACT;
    if (!think && json_array_size(tools) == 0 && !is_system(message)) return SH_OK;
    SH_TRY(open_turn("system", r->out));
    if (think) SH_TRY(sh_buf_add_str(r->out, form == SH_CHAT_A ? "<|think|>\n" : "<|think|>"));
    if (is_system(message)) {
        SH_TRY(add_content(r, message, false));
        r->first = 1;
    }
    for (size_t i = 0; i < json_array_size(tools); i++) {
        char where[32];
        snprintf(where, sizeof where, "tools[%zu]", i);
        SH_TRY(sh_buf_add_str(r->out, "<|tool>"));
        SH_TRY(sh_chat_add_declaration(form, where, json_array_get(tools, i), r->out));
        SH_TRY(sh_buf_add_str(r->out, "<tool|>"));
    }
    return sh_buf_add_str(r->out, "<turn|>\n");
}

static sh_status add_generation_prompt(sh_render *r) {
    bool a = r->c->form == SH_CHAT_A, compact = r->c->form == SH_CHAT_COMPACT;
    bool open = r->last == LAST_OTHER || compact || (!a && r->last == LAST_CALL);
    if (open) SH_TRY(sh_buf_add_str(r->out, "<|turn>model\n"));
    if (r->thinking || (a && !open)) return SH_OK;
    return sh_buf_add_str(r->out, "<|channel>thought\n<channel|>");
}

static sh_status render(sh_render *r, const json_t *tools, bool generation_prompt) {
    static sh_status (*const add[])(sh_render *, size_t) = {
        [SH_CHAT_A] = add_message_a, [SH_CHAT_B] = add_message_b, [SH_CHAT_COMPACT] = add_message_compact};
    SH_TRY(sh_buf_add_str(r->out, r->c->bos));
    SH_TRY(add_system(r, tools));
    for (size_t i = r->first; i < r->n; i++)
        if (is_role(json_array_get(r->messages, i), "user")) r->after_user = i + 1;
    for (size_t i = r->first; i < r->n; i++) SH_TRY(add[r->c->form](r, i));
    return generation_prompt ? add_generation_prompt(r) : SH_OK;
}

sh_status sh_chat_render(const sh_chat *c, const json_t *messages, const json_t *tools, bool thinking,
                         bool generation_prompt, sh_buf *out) {
    SH_TRY(check_all(c, messages, tools));
    sh_render r = {.c = c, .messages = messages, .n = json_array_size(messages), .thinking = thinking, .out = out};
    size_t len = out->len;
    sh_status st = render(&r, tools, generation_prompt);
    if (st != SH_OK && out->data) {
        out->len = len;
        out->data[len] = 0;
    }
    return st;
}
