/*
 * Tool declarations and argument values in the notation of Gemma 4's chat templates. Each function is one macro of the
 * template and keeps its behaviour to the letter, oddities included (form B puts a comma before a nested object even
 * when nothing stands before it; a schema without a type is never closed): the model was trained on exactly this text.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/chat_int.h"
#include "model/pytext.h"

#define QUOTE "<|\"|>"

/* <|"|>str(v)<|"|>, upper-cased if asked. */
static sh_status add_quoted(const json_t *v, bool upper, sh_buf *out) {
    SH_TRY(sh_buf_add_str(out, QUOTE));
    size_t at = out->len;
    SH_TRY(sh_py_str(v, out));
    if (upper) sh_py_upper((char *)out->data + at, out->len - at);
    return sh_buf_add_str(out, QUOTE);
}

/* [<|"|>a<|"|>,…] */
static sh_status add_quoted_list(const char *where, const char *field, const json_t *list, bool upper, sh_buf *out) {
    if (!json_is_array(list)) SH_FAIL(SH_EINPUT, "%s: %s: %s is not an array", where, field, sh_json_type_name(list));
    SH_TRY(sh_buf_add_str(out, "["));
    for (size_t i = 0; i < json_array_size(list); i++) {
        if (i) SH_TRY(sh_buf_add_str(out, ","));
        SH_TRY(add_quoted(json_array_get(list, i), upper, out));
    }
    return sh_buf_add_str(out, "]");
}

sh_status sh_chat_add_members(const json_t *object, bool quote_keys, sh_buf *out) {
    SH_CLEANUP(sh_py_items_release) sh_py_items items = {0};
    SH_TRY(sh_py_dictsort(object, &items));
    for (size_t i = 0; i < items.n; i++) {
        const char *q = quote_keys ? QUOTE : "";
        SH_TRY(sh_buf_add_str(out, i ? "," : ""));
        SH_TRY(sh_buf_add_str(out, q));
        SH_TRY(sh_buf_add_str(out, items.item[i].key));
        SH_TRY(sh_buf_add_str(out, q));
        SH_TRY(sh_buf_add_str(out, ":"));
        SH_TRY(sh_chat_add_argument(items.item[i].value, quote_keys, out));
    }
    return SH_OK;
}

sh_status sh_chat_add_argument(const json_t *v, bool quote_keys, sh_buf *out) {
    if (json_is_string(v)) return add_quoted(v, false, out);
    if (json_is_boolean(v)) return sh_buf_add_str(out, json_is_true(v) ? "true" : "false");
    if (json_is_object(v)) {
        SH_TRY(sh_buf_add_str(out, "{"));
        SH_TRY(sh_chat_add_members(v, quote_keys, out));
        return sh_buf_add_str(out, "}");
    }
    if (!v) return sh_buf_add_str(out, "[]"); /* undefined counts as an empty sequence */
    if (!json_is_array(v)) return sh_py_str(v, out);
    SH_TRY(sh_buf_add_str(out, "["));
    for (size_t i = 0; i < json_array_size(v); i++) {
        if (i) SH_TRY(sh_buf_add_str(out, ","));
        SH_TRY(sh_chat_add_argument(json_array_get(v, i), quote_keys, out));
    }
    return sh_buf_add_str(out, "]");
}

/* The state of one property's declaration: where it goes, and whether a comma is due before the next field. */
typedef struct sh_property {
    sh_chat_form form;
    const char *where;
    const json_t *value;
    char type[16]; /* upper-cased; "" when it is none that the template asks for */
    bool comma;
    sh_buf *out;
} sh_property;

static sh_status add_properties(sh_chat_form form, const char *where, const json_t *properties, sh_buf *out);

static sh_status add_comma(sh_property *p) {
    if (p->comma) return sh_buf_add_str(p->out, ",");
    p->comma = true;
    return SH_OK;
}

static sh_status add_nullable(sh_property *p) {
    if (!sh_py_true(sh_py_get(p->value, "nullable"))) return SH_OK;
    SH_TRY(add_comma(p));
    return sh_buf_add_str(p->out, "nullable:true");
}

static sh_status add_enum(sh_property *p) {
    const json_t *list = sh_py_get(p->value, "enum");
    if (!sh_py_true(list)) return SH_OK;
    SH_TRY(add_comma(p));
    SH_TRY(sh_buf_add_str(p->out, "enum:"));
    return sh_chat_add_argument(list, true, p->out);
}

/* An object's members: its `properties`, or, where it has none, whatever else it holds. */
static sh_status add_object(sh_property *p) {
    const json_t *inner = sh_py_get(p->value, "properties"), *required = sh_py_get(p->value, "required");
    bool b = p->form == SH_CHAT_B;
    SH_TRY(b ? sh_buf_add_str(p->out, ",") : add_comma(p));
    SH_TRY(sh_buf_add_str(p->out, "properties:{"));
    SH_TRY(add_properties(p->form, p->where, json_is_object(inner) ? inner : p->value, p->out));
    SH_TRY(sh_buf_add_str(p->out, "}"));
    if (!sh_py_true(required)) return SH_OK;
    SH_TRY(b ? sh_buf_add_str(p->out, ",") : add_comma(p));
    SH_TRY(sh_buf_add_str(p->out, "required:"));
    return add_quoted_list(p->where, "required", required, false, p->out);
}

static sh_status add_item_field(sh_property *p, const char *key, const json_t *v) {
    if (strcmp(key, "properties") == 0) {
        SH_TRY(sh_buf_add_str(p->out, "properties:{"));
        if (json_is_object(v)) SH_TRY(add_properties(p->form, p->where, v, p->out));
        return sh_buf_add_str(p->out, "}");
    }
    if (strcmp(key, "required") == 0) {
        SH_TRY(sh_buf_add_str(p->out, "required:"));
        return add_quoted_list(p->where, "items.required", v, false, p->out);
    }
    if (strcmp(key, "type") == 0) {
        SH_TRY(sh_buf_add_str(p->out, "type:"));
        return json_is_string(v) ? add_quoted(v, true, p->out)
                                 : add_quoted_list(p->where, "items.type", v, true, p->out);
    }
    SH_TRY(sh_buf_add_str(p->out, key));
    SH_TRY(sh_buf_add_str(p->out, ":"));
    return sh_chat_add_argument(v, true, p->out);
}

static sh_status add_items(sh_property *p) {
    const json_t *of = sh_py_get(p->value, "items");
    if (!json_is_object(of) || json_object_size(of) == 0) return SH_OK;
    SH_CLEANUP(sh_py_items_release) sh_py_items items = {0};
    SH_TRY(p->form == SH_CHAT_B ? sh_buf_add_str(p->out, ",") : add_comma(p));
    SH_TRY(sh_buf_add_str(p->out, "items:{"));
    SH_TRY(sh_py_dictsort(of, &items));
    bool first = true;
    for (size_t i = 0; i < items.n; i++) {
        if (json_is_null(items.item[i].value)) continue;
        if (!first) SH_TRY(sh_buf_add_str(p->out, ","));
        first = false;
        SH_TRY(add_item_field(p, items.item[i].key, items.item[i].value));
    }
    return sh_buf_add_str(p->out, "}");
}

static sh_status add_property(sh_property *p) {
    const json_t *description = sh_py_get(p->value, "description");
    bool b = p->form == SH_CHAT_B;
    if (sh_py_true(description)) {
        SH_TRY(sh_buf_add_str(p->out, "description:"));
        SH_TRY(add_quoted(description, false, p->out));
        p->comma = true;
    }
    if (b) SH_TRY(add_nullable(p));
    if (strcmp(p->type, "STRING") == 0) SH_TRY(add_enum(p));
    if (strcmp(p->type, "ARRAY") == 0) SH_TRY(add_items(p));
    if (!b) SH_TRY(add_nullable(p));
    if (strcmp(p->type, "OBJECT") == 0) SH_TRY(add_object(p));
    SH_TRY(add_comma(p));
    SH_TRY(sh_buf_add_str(p->out, "type:"));
    SH_TRY(add_quoted(sh_py_get(p->value, "type"), true, p->out));
    return sh_buf_add_str(p->out, "}");
}

/* The upper-cased type, if it is text and short enough to be one of the known. */
static void type_of(const json_t *value, char out[16]) {
    const json_t *type = sh_py_get(value, "type");
    size_t n = json_is_string(type) ? json_string_length(type) : 0;
    memset(out, 0, 16);
    if (n > 15) return;
    if (n) memcpy(out, json_string_value(type), n);
    sh_py_upper(out, n);
}

/* Names that the template takes for parts of a schema, never for properties. */
static bool is_standard(const char *key) {
    static const char *const names[] = {"description", "type", "properties", "required", "nullable"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(key, names[i]) == 0) return true;
    return false;
}

/* macro format_parameters */
static sh_status add_properties(sh_chat_form form, const char *where, const json_t *properties, sh_buf *out) {
    SH_CLEANUP(sh_py_items_release) sh_py_items items = {0};
    SH_TRY(sh_py_dictsort(properties, &items));
    bool first = true;
    for (size_t i = 0; i < items.n; i++) {
        if (is_standard(items.item[i].key)) continue;
        sh_property p = {.form = form, .where = where, .value = items.item[i].value, .out = out};
        type_of(p.value, p.type);
        if (!first) SH_TRY(sh_buf_add_str(out, ","));
        first = false;
        SH_TRY(sh_buf_add_str(out, items.item[i].key));
        SH_TRY(sh_buf_add_str(out, ":{"));
        SH_TRY(add_property(&p));
    }
    return SH_OK;
}

static sh_status add_parameters(sh_chat_form form, const char *where, const json_t *params, sh_buf *out) {
    const json_t *properties = sh_py_get(params, "properties"), *required = sh_py_get(params, "required");
    SH_TRY(sh_buf_add_str(out, ",parameters:{"));
    if (sh_py_true(properties)) {
        if (!json_is_object(properties))
            SH_FAIL(SH_EINPUT, "%s.function.parameters.properties: %s is not an object", where,
                    sh_json_type_name(properties));
        SH_TRY(sh_buf_add_str(out, "properties:{"));
        SH_TRY(add_properties(form, where, properties, out));
        SH_TRY(sh_buf_add_str(out, "},"));
    }
    if (sh_py_true(required)) {
        SH_TRY(sh_buf_add_str(out, "required:"));
        SH_TRY(add_quoted_list(where, "function.parameters.required", required, false, out));
        SH_TRY(sh_buf_add_str(out, ","));
    }
    if (!sh_py_true(sh_py_get(params, "type"))) return SH_OK;
    SH_TRY(sh_buf_add_str(out, "type:"));
    SH_TRY(add_quoted(sh_py_get(params, "type"), true, out));
    return sh_buf_add_str(out, "}");
}

static sh_status add_response(const json_t *response, sh_buf *out) {
    char type[16];
    type_of(response, type);
    SH_TRY(sh_buf_add_str(out, ",response:{"));
    if (sh_py_true(sh_py_get(response, "description"))) {
        SH_TRY(sh_buf_add_str(out, "description:"));
        SH_TRY(add_quoted(sh_py_get(response, "description"), false, out));
        SH_TRY(sh_buf_add_str(out, ","));
    }
    return strcmp(type, "OBJECT") == 0 ? sh_buf_add_str(out, "type:" QUOTE "OBJECT" QUOTE "}") : SH_OK;
}

/* macro format_function_declaration, trimmed */
sh_status sh_chat_add_declaration(sh_chat_form form, const char *where, const json_t *tool, sh_buf *out) {
    const json_t *f = sh_py_get(tool, "function"), *params = sh_py_get(f, "parameters");
    if (!json_is_object(f)) SH_FAIL(SH_EINPUT, "%s.function: %s is not an object", where, sh_json_type_name(f));
    if (!json_is_string(sh_py_get(f, "name"))) SH_FAIL(SH_EINPUT, "%s.function.name: not a string", where);
    SH_TRY(sh_buf_add_str(out, "declaration:"));
    SH_TRY(sh_py_str(sh_py_get(f, "name"), out));
    SH_TRY(sh_buf_add_str(out, "{description:"));
    SH_TRY(add_quoted(sh_py_get(f, "description"), false, out));
    if (sh_py_true(params)) {
        if (!json_is_object(params))
            SH_FAIL(SH_EINPUT, "%s.function.parameters: %s is not an object", where, sh_json_type_name(params));
        SH_TRY(add_parameters(form, where, params, out));
    }
    if (json_object_get(f, "response")) SH_TRY(add_response(sh_py_get(f, "response"), out));
    return sh_buf_add_str(out, "}");
}
