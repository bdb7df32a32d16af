/* Python's and Jinja's view of JSON values. See pytext.h. */
#include "model/pytext.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/utf8.h"
#include "model/unicode.h"

/* repr(float): the shortest digits that read back as x, without an exponent from 1e-4 up to 1e16. */
static sh_status add_float(double x, sh_buf *out) {
    char e[40], digits[24];
    int precision = 0, n = 0, exponent = 0;
    do snprintf(e, sizeof e, "%.*e", precision, x);
    while (strtod(e, NULL) != x && ++precision < 17);
    const char *p = e;
    if (*p == '-') SH_TRY(sh_buf_add(out, p++, 1));
    for (; *p && *p != 'e'; p++)
        if (*p != '.') digits[n++] = *p;
    exponent = (int)strtol(p + 1, NULL, 10);
    if (exponent < -4 || exponent >= 16)
        return sh_buf_printf(out, "%c%s%.*se%c%02d", digits[0], n > 1 ? "." : "", n - 1, digits + 1,
                             exponent < 0 ? '-' : '+', abs(exponent));
    if (exponent < 0) return sh_buf_printf(out, "0.%.*s%.*s", -exponent - 1, "000", n, digits);
    if (n <= exponent + 1) return sh_buf_printf(out, "%.*s%.*s.0", n, digits, exponent + 1 - n, "0000000000000000");
    return sh_buf_printf(out, "%.*s.%.*s", exponent + 1, digits, n - exponent - 1, digits + exponent + 1);
}

/* repr(str): single quotes unless the text has some and no double ones. Characters that Python takes for unprintable
 * beyond the control characters, separators and marks of direction are written as they are. */
static sh_status add_repr(const char *s, size_t n, sh_buf *out) {
    char quote = memchr(s, '\'', n) && !memchr(s, '"', n) ? '"' : '\'';
    SH_TRY(sh_buf_add(out, &quote, 1));
    for (size_t i = 0; i < n;) {
        uint32_t cp = 0;
        int k = sh_utf8_next((const uint8_t *)s + i, n - i, &cp);
        if (k <= 0) SH_FAIL(SH_EINPUT, "byte %zu: not valid UTF-8", i);
        if (cp == '\n' || cp == '\r' || cp == '\t')
            SH_TRY(sh_buf_printf(out, "\\%c", cp == '\n' ? 'n' : cp == '\r' ? 'r' : 't'));
        else if (cp == '\\' || cp == (uint32_t)quote)
            SH_TRY(sh_buf_printf(out, "\\%c", (int)cp));
        else if (cp < 0x20 || (cp >= 0x7f && cp <= 0xa0) || cp == 0xad)
            SH_TRY(sh_buf_printf(out, "\\x%02x", cp));
        else if ((cp >= 0x2000 && cp <= 0x200f) || (cp >= 0x2028 && cp <= 0x202f) || (cp >= 0x205f && cp <= 0x206f) ||
                 cp == 0x1680 || cp == 0x3000 || cp == 0xfeff || (cp >= 0xe000 && cp <= 0xf8ff))
            SH_TRY(sh_buf_printf(out, "\\u%04x", cp));
        else
            SH_TRY(sh_buf_add(out, s + i, (size_t)k));
        i += (size_t)k;
    }
    return sh_buf_add(out, &quote, 1);
}

static sh_status add_value(const json_t *v, sh_buf *out);

static sh_status add_list(const json_t *v, sh_buf *out) {
    SH_TRY(sh_buf_add_str(out, "["));
    for (size_t i = 0; i < json_array_size(v); i++) {
        if (i) SH_TRY(sh_buf_add_str(out, ", "));
        SH_TRY(add_value(json_array_get(v, i), out));
    }
    return sh_buf_add_str(out, "]");
}

static sh_status add_dict(const json_t *v, sh_buf *out) {
    const char *key;
    json_t *value;
    bool first = true;
    SH_TRY(sh_buf_add_str(out, "{"));
    json_object_foreach((json_t *)(uintptr_t)v, key, value) {
        if (!first) SH_TRY(sh_buf_add_str(out, ", "));
        first = false;
        SH_TRY(add_repr(key, strlen(key), out));
        SH_TRY(sh_buf_add_str(out, ": "));
        SH_TRY(add_value(value, out));
    }
    return sh_buf_add_str(out, "}");
}

/* repr(value). */
static sh_status add_value(const json_t *v, sh_buf *out) {
    switch (json_typeof(v)) {
    case JSON_STRING:
        return add_repr(json_string_value(v), json_string_length(v), out);
    case JSON_INTEGER:
        return sh_buf_printf(out, "%lld", (long long)json_integer_value(v));
    case JSON_REAL:
        return add_float(json_real_value(v), out);
    case JSON_TRUE:
        return sh_buf_add_str(out, "True");
    case JSON_FALSE:
        return sh_buf_add_str(out, "False");
    case JSON_ARRAY:
        return add_list(v, out);
    case JSON_OBJECT:
        return add_dict(v, out);
    default:
        return sh_buf_add_str(out, "None");
    }
}

sh_status sh_py_str(const json_t *v, sh_buf *out) {
    if (!v) return SH_OK;
    if (json_is_string(v)) return sh_buf_add(out, json_string_value(v), json_string_length(v));
    return add_value(v, out);
}

bool sh_py_true(const json_t *v) {
    if (!v) return false;
    switch (json_typeof(v)) {
    case JSON_STRING:
        return json_string_length(v) > 0;
    case JSON_ARRAY:
        return json_array_size(v) > 0;
    case JSON_OBJECT:
        return json_object_size(v) > 0;
    case JSON_INTEGER:
        return json_integer_value(v) != 0;
    case JSON_REAL:
        return json_real_value(v) != 0;
    case JSON_TRUE:
        return true;
    default:
        return false;
    }
}

static bool is_space(uint32_t cp) { /* str.isspace(): White_Space and the four separators of ASCII */
    return sh_unicode_is_space(cp) || (cp >= 0x1c && cp <= 0x1f);
}

sh_span sh_py_trim(const char *s, size_t n) {
    const uint8_t *u = (const uint8_t *)s;
    size_t begin = 0, end = n;
    uint32_t cp = 0;
    int k;
    while (begin < end && (k = sh_utf8_next(u + begin, end - begin, &cp)) > 0 && is_space(cp)) begin += (size_t)k;
    while (end > begin) {
        size_t at = end - 1;
        while (at > begin && (u[at] & 0xc0) == 0x80) at--;
        if (sh_utf8_next(u + at, end - at, &cp) <= 0 || !is_space(cp)) break;
        end = at;
    }
    return (sh_span){s + begin, end - begin};
}

void sh_py_upper(char *s, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (s[i] >= 'a' && s[i] <= 'z') s[i] = (char)(s[i] - 32);
}

static sh_status fold(const char *s, char **out) {
    size_t n = strlen(s);
    sh_buf b;
    sh_buf_init(&b, 0);
    SH_TRY(sh_buf_reserve(&b, n));
    for (size_t i = 0; i < n;) {
        uint32_t cp = 0;
        uint8_t low[4];
        int k = sh_utf8_next((const uint8_t *)s + i, n - i, &cp);
        sh_status st = k <= 0 ? sh_error_set(SH_EINPUT, __FILE__, __LINE__, "a key is not valid UTF-8")
                              : sh_buf_add(&b, low, (size_t)sh_utf8_put(sh_unicode_lower(cp), low));
        if (st != SH_OK) {
            sh_buf_release(&b);
            return st;
        }
        i += (size_t)k;
    }
    *out = sh_buf_take(&b);
    return SH_OK;
}

static int compare(const void *x, const void *y) {
    const sh_py_item *a = x, *b = y;
    int c = strcmp(a->folded, b->folded); /* bytes of UTF-8 sort as code points do */
    return c ? c : a->place < b->place ? -1 : a->place > b->place;
}

void sh_py_items_release(sh_py_items *items) {
    for (size_t i = 0; i < items->n; i++) free(items->item[i].folded);
    free(items->item);
    *items = (sh_py_items){0};
}

sh_status sh_py_dictsort(const json_t *object, sh_py_items *out) {
    sh_py_items items = {.item = calloc(json_object_size(object) + 1, sizeof *items.item)};
    const char *key;
    json_t *value;
    if (!items.item) SH_FAIL(SH_EMEMORY, "no memory to sort %zu keys", json_object_size(object));
    json_object_foreach((json_t *)(uintptr_t)object, key, value) {
        sh_py_item *x = &items.item[items.n];
        *x = (sh_py_item){.key = key, .value = value, .place = items.n};
        sh_status st = fold(key, &x->folded);
        if (st != SH_OK) {
            sh_py_items_release(&items);
            return st;
        }
        items.n++;
    }
    qsort(items.item, items.n, sizeof *items.item, compare);
    *out = items;
    return SH_OK;
}
