/* Files and typed fields on top of jansson. See json.h. */
#include "common/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/file.h"
#include "common/scan.h"

void sh_json_release(json_t **j) {
    json_decref(*j);
    *j = NULL;
}

sh_status sh_json_parse(const char *what, const char *text, size_t len, json_t **out) {
    json_error_t e;
    json_t *j = json_loadb(text, len, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL, &e);
    if (!j) SH_FAIL(SH_EFORMAT, "%s: not valid JSON at line %d, column %d: %s", what, e.line, e.column, e.text);
    *out = j;
    return SH_OK;
}

sh_status sh_json_read(const char *path, size_t max_bytes, json_t **out) {
    char *text = NULL;
    size_t len = 0;
    SH_TRY(sh_file_read(path, max_bytes, &text, &len));
    sh_status st = sh_json_parse(path, text, len, out);
    free(text);
    return st;
}

static sh_status read_member(sh_scan *s, const char *const keys[], json_t *out) {
    sh_span key, value;
    int k = 0;
    SH_TRY(sh_scan_key(s, &key));
    while (keys[k] && !sh_span_is(key, keys[k])) k++;
    SH_TRY(sh_scan_skip(s, &value));
    if (!keys[k]) return SH_OK;
    json_t *j = NULL;
    sh_status st = sh_json_parse(keys[k], value.p, value.n, &j);
    if (st != SH_OK) return sh_error_prefix(st, "%s", s->what);
    if (json_object_set_new(out, keys[k], j) != 0) SH_FAIL(SH_EMEMORY, "%s: no memory for %s", s->what, keys[k]);
    return SH_OK;
}

static sh_status read_members(sh_scan *s, const char *const keys[], json_t *out) {
    sh_status st;
    SH_TRY(sh_scan_open(s, '{'));
    while (sh_scan_more(s, '}', &st)) SH_TRY(read_member(s, keys, out));
    SH_TRY(st);
    return sh_scan_end(s);
}

sh_status sh_json_parse_members(const char *what, const char *text, size_t len, const char *const keys[],
                                json_t **out) {
    sh_scan s;
    sh_scan_init(&s, what, text, len);
    SH_CLEANUP(sh_json_release) json_t *j = json_object();
    sh_status st = read_members(&s, keys, j);
    sh_scan_release(&s);
    if (st == SH_OK) {
        *out = j;
        j = NULL;
    }
    return st;
}

sh_status sh_json_read_members(const char *path, size_t max_bytes, const char *const keys[], json_t **out) {
    char *text = NULL;
    size_t len = 0;
    SH_TRY(sh_file_read(path, max_bytes, &text, &len));
    sh_status st = sh_json_parse_members(path, text, len, keys, out);
    free(text);
    return st;
}

const char *sh_json_type_name(const json_t *j) {
    switch (j ? json_typeof(j) : JSON_NULL) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a number";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    default:
        return "null";
    }
}

/* A number or a text as it stands there, as far as it fits into `to`; of anything else its kind. */
static const char *found(const json_t *v, char to[48]) {
    if (!json_is_real(v) && !json_is_integer(v) && !json_is_string(v)) return sh_json_type_name(v);
    char *s = json_dumps(v, JSON_ENCODE_ANY | JSON_ENSURE_ASCII | JSON_REAL_PRECISION(15));
    if (!s) return sh_json_type_name(v);
    size_t n = strlen(s);
    snprintf(to, 48, "%.40s%s", s, n > 40 ? "…" : "");
    free(s);
    return to;
}

sh_status sh_json_int(const json_t *object, const char *key, int64_t min, int64_t max, int64_t *out) {
    const json_t *v = json_object_get(object, key);
    if (!v || json_is_null(v)) return SH_OK;
    int64_t x;
    char text[48];
    if (json_is_integer(v))
        x = json_integer_value(v);
    else if (json_is_real(v) && json_real_value(v) == floor(json_real_value(v)) && fabs(json_real_value(v)) < 9e15)
        x = (int64_t)json_real_value(v);
    else
        SH_FAIL(SH_EINPUT, "%s: %s is not an integer: allowed are integers from %lld to %lld", key, found(v, text),
                (long long)min, (long long)max);
    if (x < min || x > max)
        SH_FAIL(SH_EINPUT, "%s: %lld is out of range: allowed are integers from %lld to %lld", key, (long long)x,
                (long long)min, (long long)max);
    *out = x;
    return SH_OK;
}

sh_status sh_json_double(const json_t *object, const char *key, double min, double max, double *out) {
    const json_t *v = json_object_get(object, key);
    if (!v || json_is_null(v)) return SH_OK;
    char text[48];
    if (!json_is_number(v))
        SH_FAIL(SH_EINPUT, "%s: %s is not a number: allowed are numbers from %g to %g", key, found(v, text), min, max);
    double x = json_number_value(v);
    if (!(x >= min && x <= max))
        SH_FAIL(SH_EINPUT, "%s: %g is out of range: allowed are numbers from %g to %g", key, x, min, max);
    *out = x;
    return SH_OK;
}

sh_status sh_json_bool(const json_t *object, const char *key, bool *out) {
    const json_t *v = json_object_get(object, key);
    if (!v || json_is_null(v)) return SH_OK;
    char text[48];
    if (!json_is_boolean(v))
        SH_FAIL(SH_EINPUT, "%s: %s is not a boolean: allowed are true and false", key, found(v, text));
    *out = json_is_true(v);
    return SH_OK;
}

sh_status sh_json_string(const json_t *object, const char *key, const char **out) {
    const json_t *v = json_object_get(object, key);
    if (!v || json_is_null(v)) return SH_OK;
    if (!json_is_string(v)) SH_FAIL(SH_EINPUT, "%s: %s is not a string", key, sh_json_type_name(v));
    *out = json_string_value(v);
    return SH_OK;
}
