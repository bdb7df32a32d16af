/* Messages as JSON. See protojson.h. */
#include "partition/protojson.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "common/json.h"

#define MOST_DEPTH 16
#define PATH_ROOM  256

typedef const ProtobufCFieldDescriptor field;

static const void *at_const(const void *base, size_t offset) {
    return (const char *)base + offset;
}

static void *at(void *base, size_t offset) {
    return (char *)base + offset;
}

static size_t size_of(const field *f) {
    switch (f->type) {
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_MESSAGE:
        return sizeof(void *);
    case PROTOBUF_C_TYPE_DOUBLE:
    case PROTOBUF_C_TYPE_INT64:
    case PROTOBUF_C_TYPE_UINT64:
        return 8;
    case PROTOBUF_C_TYPE_BOOL:
        return sizeof(protobuf_c_boolean);
    default:
        return 4;
    }
}

/* --- writing -------------------------------------------------------------------------------------------------------
 */

/* The shortest text that reads back as the same number. */
static sh_status write_double(double v, int digits, sh_buf *to) {
    char s[40];
    if (!isfinite(v)) return sh_buf_add_str(to, "null");
    for (int p = 6; p <= digits; p++) {
        snprintf(s, sizeof s, "%.*g", p, v);
        double back = strtod(s, NULL);
        if (back == v || (digits == 9 && (float)back == (float)v)) break;
    }
    return sh_buf_add_str(to, s);
}

static sh_status write_string(const char *s, sh_buf *to) {
    SH_CLEANUP(sh_json_release) json_t *j = json_string(s ? s : "");
    char *text = j ? json_dumps(j, JSON_ENCODE_ANY) : NULL;
    if (!text) SH_FAIL(SH_EFORMAT, "a string that is not UTF-8 cannot be written as JSON");
    sh_status st = sh_buf_add_str(to, text);
    free(text);
    return st;
}

static sh_status write_message(const ProtobufCMessage *m, int depth, sh_buf *to);

static sh_status write_value(const field *f, const void *v, int depth, sh_buf *to) {
    switch (f->type) {
    case PROTOBUF_C_TYPE_INT32:
    case PROTOBUF_C_TYPE_SINT32:
        return sh_buf_printf(to, "%d", *(const int32_t *)v);
    case PROTOBUF_C_TYPE_UINT32:
        return sh_buf_printf(to, "%u", *(const uint32_t *)v);
    case PROTOBUF_C_TYPE_INT64:
    case PROTOBUF_C_TYPE_SINT64:
        return sh_buf_printf(to, "%lld", (long long)*(const int64_t *)v);
    case PROTOBUF_C_TYPE_UINT64:
        return sh_buf_printf(to, "%llu", (unsigned long long)*(const uint64_t *)v);
    case PROTOBUF_C_TYPE_FLOAT:
        return write_double((double)*(const float *)v, 9, to);
    case PROTOBUF_C_TYPE_DOUBLE:
        return write_double(*(const double *)v, 17, to);
    case PROTOBUF_C_TYPE_BOOL:
        return sh_buf_add_str(to, *(const protobuf_c_boolean *)v ? "true" : "false");
    case PROTOBUF_C_TYPE_STRING:
        return write_string(*(const char *const *)v, to);
    case PROTOBUF_C_TYPE_MESSAGE:
        return write_message(*(const ProtobufCMessage *const *)v, depth, to);
    default:
        SH_FAIL(SH_EUNSUPPORTED, "%s: bytes and enumerations have no form in JSON here", f->name);
    }
}

static sh_status indent(int depth, sh_buf *to) {
    return sh_buf_printf(to, "\n%*s", 2 * depth, "");
}

static sh_status write_list(const field *f, const void *values, size_t n, int depth, sh_buf *to) {
    bool flat = f->type != PROTOBUF_C_TYPE_MESSAGE && f->type != PROTOBUF_C_TYPE_STRING;
    SH_TRY(sh_buf_add_str(to, "["));
    for (size_t i = 0; i < n; i++) {
        if (i) SH_TRY(sh_buf_add_str(to, flat ? ", " : ","));
        if (!flat) SH_TRY(indent(depth + 1, to));
        SH_TRY(write_value(f, at_const(values, i * size_of(f)), depth + 1, to));
    }
    if (!flat && n) SH_TRY(indent(depth, to));
    return sh_buf_add_str(to, "]");
}

static bool is_set(const ProtobufCMessage *m, const field *f) {
    const void *v = at_const(m, f->offset);
    if (f->label == PROTOBUF_C_LABEL_REPEATED) return *(const size_t *)at_const(m, f->quantifier_offset) > 0;
    if (f->type == PROTOBUF_C_TYPE_STRING || f->type == PROTOBUF_C_TYPE_MESSAGE)
        return *(const void *const *)v && *(const void *const *)v != f->default_value;
    return f->label == PROTOBUF_C_LABEL_REQUIRED || *(const protobuf_c_boolean *)at_const(m, f->quantifier_offset);
}

static sh_status write_message(const ProtobufCMessage *m, int depth, sh_buf *to) {
    bool first = true;
    if (depth > MOST_DEPTH) SH_FAIL(SH_ELIMIT, "a message in more than %d others", MOST_DEPTH);
    SH_TRY(sh_buf_add_str(to, "{"));
    for (unsigned i = 0; i < m->descriptor->n_fields; i++) {
        const field *f = &m->descriptor->fields[i];
        const void *v = at_const(m, f->offset);
        if (!is_set(m, f)) continue;
        if (!first) SH_TRY(sh_buf_add_str(to, ","));
        first = false;
        SH_TRY(indent(depth + 1, to));
        SH_TRY(sh_buf_printf(to, "\"%s\": ", f->name));
        if (f->label == PROTOBUF_C_LABEL_REPEATED)
            SH_TRY(write_list(f, *(const void *const *)v, *(const size_t *)at_const(m, f->quantifier_offset), depth + 1,
                              to));
        else
            SH_TRY(write_value(f, v, depth + 1, to));
    }
    if (!first) SH_TRY(indent(depth, to));
    return sh_buf_add_str(to, "}");
}

sh_status sh_protojson_write(const ProtobufCMessage *m, sh_buf *to) {
    SH_TRY(write_message(m, 0, to));
    return sh_buf_add_str(to, "\n");
}

/* --- reading -------------------------------------------------------------------------------------------------------
 */

typedef struct reader {
    const char *what;
    char path[PATH_ROOM];
} reader;

static sh_status wrong(const reader *r, const json_t *j, const char *allowed) {
    SH_FAIL(SH_EINPUT, "%s: %s: is %s: allowed is %s", r->what, r->path, sh_json_type_name(j), allowed);
}

static sh_status read_integer(const reader *r, const field *f, const json_t *j, void *to) {
    bool small = size_of(f) == 4;
    bool positive = f->type == PROTOBUF_C_TYPE_UINT32 || f->type == PROTOBUF_C_TYPE_UINT64;
    if (!json_is_integer(j)) return wrong(r, j, "a whole number");
    long long v = json_integer_value(j), most = !small ? INT64_MAX : positive ? UINT32_MAX : INT32_MAX;
    if (v > most || v < (positive ? 0 : -most - 1))
        SH_FAIL(SH_EINPUT, "%s: %s: %lld is out of range: allowed are %lld to %lld", r->what, r->path, v,
                positive ? 0 : -most - 1, most);
    if (small)
        *(uint32_t *)to = (uint32_t)v;
    else
        *(uint64_t *)to = (uint64_t)v;
    return SH_OK;
}

static sh_status read_message(reader *r, const json_t *j, const ProtobufCMessageDescriptor *type, int depth,
                              ProtobufCMessage **out);

static sh_status read_text(const reader *r, const json_t *j, char **to) {
    if (!json_is_string(j)) return wrong(r, j, "a string");
    *to = strdup(json_string_value(j));
    if (!*to) SH_FAIL(SH_EMEMORY, "%s: no memory", r->what);
    return SH_OK;
}

static sh_status read_value(reader *r, const field *f, const json_t *j, int depth, void *to) {
    switch (f->type) {
    case PROTOBUF_C_TYPE_INT32:
    case PROTOBUF_C_TYPE_SINT32:
    case PROTOBUF_C_TYPE_UINT32:
    case PROTOBUF_C_TYPE_INT64:
    case PROTOBUF_C_TYPE_SINT64:
    case PROTOBUF_C_TYPE_UINT64:
        return read_integer(r, f, j, to);
    case PROTOBUF_C_TYPE_DOUBLE:
        if (!json_is_number(j)) return wrong(r, j, "a number");
        *(double *)to = json_number_value(j);
        return SH_OK;
    case PROTOBUF_C_TYPE_FLOAT:
        if (!json_is_number(j)) return wrong(r, j, "a number");
        *(float *)to = (float)json_number_value(j);
        return SH_OK;
    case PROTOBUF_C_TYPE_BOOL:
        if (!json_is_boolean(j)) return wrong(r, j, "true or false");
        *(protobuf_c_boolean *)to = json_is_true(j);
        return SH_OK;
    case PROTOBUF_C_TYPE_STRING:
        return read_text(r, j, to);
    case PROTOBUF_C_TYPE_MESSAGE:
        return read_message(r, j, f->descriptor, depth + 1, to);
    default:
        SH_FAIL(SH_EUNSUPPORTED, "%s: %s: bytes and enumerations have no form in JSON here", r->what, r->path);
    }
}

/* The count grows with what has been read, so that a half-read message can be freed. */
static sh_status read_list(reader *r, const field *f, const json_t *j, int depth, ProtobufCMessage *m) {
    size_t *count = at(m, f->quantifier_offset), n = json_array_size(j), end = strlen(r->path);
    if (!json_is_array(j)) return wrong(r, j, "a list");
    void *values = n ? calloc(n, size_of(f)) : NULL;
    if (n && !values) SH_FAIL(SH_EMEMORY, "%s: %s: no memory for %zu values", r->what, r->path, n);
    *(void **)at(m, f->offset) = values;
    for (size_t i = 0; i < n; i++) {
        snprintf(r->path + end, sizeof r->path - end, "[%zu]", i);
        SH_TRY(read_value(r, f, json_array_get(j, i), depth, at(values, i * size_of(f))));
        *count = i + 1;
        r->path[end] = 0;
    }
    return SH_OK;
}

static sh_status read_field(reader *r, const field *f, const json_t *j, int depth, ProtobufCMessage *m) {
    if (f->label == PROTOBUF_C_LABEL_REPEATED) return read_list(r, f, j, depth, m);
    SH_TRY(read_value(r, f, j, depth, at(m, f->offset)));
    if (f->label == PROTOBUF_C_LABEL_OPTIONAL && f->type != PROTOBUF_C_TYPE_STRING &&
        f->type != PROTOBUF_C_TYPE_MESSAGE)
        *(protobuf_c_boolean *)at(m, f->quantifier_offset) = 1;
    return SH_OK;
}

/* An object must have the fields of the message and no others. */
static sh_status check_names(const reader *r, const json_t *j, const ProtobufCMessageDescriptor *type) {
    const char *key;
    json_t *value, *object = (json_t *)(uintptr_t)j;
    json_object_foreach(object, key, value) {
        char all[512] = "";
        size_t used = 0;
        if (protobuf_c_message_descriptor_get_field_by_name(type, key)) continue;
        for (unsigned i = 0; i < type->n_fields && used < sizeof all; i++)
            used += (size_t)snprintf(all + used, sizeof all - used, "%s%s", i ? ", " : "", type->fields[i].name);
        SH_FAIL(SH_EINPUT, "%s: %s%s%s: no such field: allowed are %s", r->what, r->path, *r->path ? "." : "", key,
                all);
    }
    return SH_OK;
}

static sh_status fill(reader *r, const json_t *j, int depth, ProtobufCMessage *m) {
    size_t end = strlen(r->path);
    SH_TRY(check_names(r, j, m->descriptor));
    for (unsigned i = 0; i < m->descriptor->n_fields; i++) {
        const field *f = &m->descriptor->fields[i];
        const json_t *v = json_object_get(j, f->name);
        snprintf(r->path + end, sizeof r->path - end, "%s%s", end ? "." : "", f->name);
        if (v && !json_is_null(v))
            SH_TRY(read_field(r, f, v, depth, m));
        else if (f->label == PROTOBUF_C_LABEL_REQUIRED)
            SH_FAIL(SH_EINPUT, "%s: %s: is missing", r->what, r->path);
        r->path[end] = 0;
    }
    return SH_OK;
}

static sh_status read_message(reader *r, const json_t *j, const ProtobufCMessageDescriptor *type, int depth,
                              ProtobufCMessage **out) {
    if (!json_is_object(j)) return wrong(r, j, "an object");
    if (depth > MOST_DEPTH)
        SH_FAIL(SH_ELIMIT, "%s: %s: an object in more than %d others", r->what, r->path, MOST_DEPTH);
    ProtobufCMessage *m = calloc(1, type->sizeof_message);
    if (!m) SH_FAIL(SH_EMEMORY, "%s: no memory", r->what);
    protobuf_c_message_init(type, m);
    sh_status st = fill(r, j, depth, m);
    if (st == SH_OK)
        *out = m;
    else
        protobuf_c_message_free_unpacked(m, NULL);
    return st;
}

sh_status sh_protojson_read(const char *what, const char *text, size_t len, const ProtobufCMessageDescriptor *type,
                            ProtobufCMessage **out) {
    SH_CLEANUP(sh_json_release) json_t *j = NULL;
    SH_TRY(sh_json_parse(what, text, len, &j));
    reader r = {.what = what};
    if (!json_is_object(j)) SH_FAIL(SH_EINPUT, "%s: is %s: allowed is an object", what, sh_json_type_name(j));
    return read_message(&r, j, type, 0, out);
}
