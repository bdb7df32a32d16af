/* Forward JSON scanner. See scan.h. */
#include "common/scan.h"

#include <string.h>

#include "common/limits.h"
#include "common/utf8.h"

void sh_scan_init(sh_scan *s, const char *what, const char *text, size_t len) {
    *s = (sh_scan){.what = what, .base = text, .p = text, .end = text + len};
    sh_buf_init(&s->text, 0);
}

void sh_scan_release(sh_scan *s) {
    sh_buf_release(&s->text);
}

sh_status sh_scan_fail(const sh_scan *s, const char *expected) {
    SH_FAIL(SH_EFORMAT, "%s: byte %zu: expected %s", s->what, (size_t)(s->p - s->base), expected);
}

char sh_scan_peek(sh_scan *s) {
    while (s->p < s->end && (*s->p == ' ' || *s->p == '\n' || *s->p == '\t' || *s->p == '\r')) s->p++;
    return s->p < s->end ? *s->p : 0;
}

sh_status sh_scan_end(sh_scan *s) {
    sh_scan_peek(s);
    return s->p == s->end ? SH_OK : sh_scan_fail(s, "the end of the text");
}

sh_status sh_scan_open(sh_scan *s, char bracket) {
    if (sh_scan_peek(s) != bracket) return sh_scan_fail(s, bracket == '{' ? "an object" : "an array");
    s->p++;
    s->first = true;
    return SH_OK;
}

bool sh_scan_more(sh_scan *s, char closing, sh_status *st) {
    *st = SH_OK;
    char c = sh_scan_peek(s);
    bool first = s->first;
    s->first = false;
    if (c && c == closing) {
        s->p++;
        return false;
    }
    if (first) return true;
    if (c != ',') {
        *st = sh_scan_fail(s, closing == '}' ? "',' or '}'" : "',' or ']'");
        return false;
    }
    s->p++;
    return true;
}

sh_status sh_scan_key(sh_scan *s, sh_span *out) {
    sh_span key;
    SH_TRY(sh_scan_string(s, &key));
    if (sh_scan_peek(s) != ':') return sh_scan_fail(s, "':'");
    s->p++;
    *out = key;
    return SH_OK;
}

static bool read_hex4(const char *p, const char *end, uint32_t *out) {
    if (end - p < 4) return false;
    uint32_t v = 0;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        int d = c >= '0' && c <= '9'   ? c - '0'
                : c >= 'a' && c <= 'f' ? c - 'a' + 10
                : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                       : -1;
        if (d < 0) return false;
        v = v << 4 | (uint32_t)d;
    }
    *out = v;
    return true;
}

/* Reads \uXXXX, joining surrogate pairs; s->p stands behind the 'u'. */
static sh_status scan_unicode_escape(sh_scan *s, uint32_t *out) {
    uint32_t hi, lo;
    if (!read_hex4(s->p, s->end, &hi)) return sh_scan_fail(s, "four hexadecimal digits");
    s->p += 4;
    if (hi >= 0xd800 && hi <= 0xdfff) {
        bool pair = hi < 0xdc00 && s->end - s->p >= 6 && s->p[0] == '\\' && s->p[1] == 'u' &&
                    read_hex4(s->p + 2, s->end, &lo) && lo >= 0xdc00 && lo <= 0xdfff;
        if (!pair) return sh_scan_fail(s, "a pair of surrogates");
        s->p += 6;
        hi = 0x10000 + ((hi - 0xd800) << 10) + (lo - 0xdc00);
    }
    *out = hi;
    return SH_OK;
}

/* One escape sequence; s->p stands behind the backslash. */
static sh_status scan_escape(sh_scan *s) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    char c = s->p < s->end ? *s->p : 0;
    const char *at = c ? strchr(names, c) : NULL;
    if (at) {
        s->p++;
        return sh_buf_add(&s->text, values + (at - names), 1);
    }
    if (c != 'u') return sh_scan_fail(s, "an escape sequence");
    s->p++;
    uint32_t cp = 0;
    SH_TRY(scan_unicode_escape(s, &cp));
    uint8_t utf8[4];
    int n = sh_utf8_put(cp, utf8);
    return sh_buf_add(&s->text, utf8, (size_t)n);
}

/* Moves over characters that stand for themselves. */
static sh_status scan_plain(sh_scan *s) {
    while (s->p < s->end && *s->p != '"' && *s->p != '\\') {
        uint8_t c = (uint8_t)*s->p;
        if (c < 0x20) return sh_scan_fail(s, "an escaped control character");
        if (c < 0x80) {
            s->p++;
            continue;
        }
        uint32_t cp;
        int k = sh_utf8_next((const uint8_t *)s->p, (size_t)(s->end - s->p), &cp);
        if (k <= 0) return sh_scan_fail(s, "valid UTF-8");
        s->p += k;
    }
    return s->p < s->end ? SH_OK : sh_scan_fail(s, "the end of a string");
}

sh_status sh_scan_string(sh_scan *s, sh_span *out) {
    if (sh_scan_peek(s) != '"') return sh_scan_fail(s, "a string");
    const char *from = ++s->p;
    SH_TRY(scan_plain(s));
    if (*s->p == '"') { /* no escapes: the text itself */
        *out = (sh_span){from, (size_t)(s->p - from)};
        s->p++;
        return SH_OK;
    }
    sh_buf_clear(&s->text);
    for (;;) {
        SH_TRY(sh_buf_add(&s->text, from, (size_t)(s->p - from)));
        if (*s->p++ == '"') break;
        SH_TRY(scan_escape(s));
        from = s->p;
        SH_TRY(scan_plain(s));
    }
    *out = (sh_span){(const char *)s->text.data, s->text.len};
    return SH_OK;
}

sh_status sh_scan_uint(sh_scan *s, uint64_t max, uint64_t *out) {
    char c = sh_scan_peek(s);
    if (c < '0' || c > '9') return sh_scan_fail(s, "a whole number from 0");
    uint64_t v = 0;
    while (s->p < s->end && *s->p >= '0' && *s->p <= '9') {
        uint64_t d = (uint64_t)(*s->p - '0');
        if (d > max || v > (max - d) / 10)
            SH_FAIL(SH_EFORMAT, "%s: byte %zu: a number is over the limit of %llu", s->what, (size_t)(s->p - s->base),
                    (unsigned long long)max);
        v = v * 10 + d;
        s->p++;
    }
    if (s->p < s->end && (*s->p == '.' || *s->p == 'e' || *s->p == 'E')) return sh_scan_fail(s, "a whole number");
    *out = v;
    return SH_OK;
}

sh_status sh_scan_skip(sh_scan *s, sh_span *out) {
    char first = sh_scan_peek(s);
    const char *from = s->p;
    char open[SH_MAX_JSON_DEPTH];
    int depth = 0;
    if (first == 0) return sh_scan_fail(s, "a value");
    do {
        char c = sh_scan_peek(s);
        if (c == 0) return sh_scan_fail(s, "a closing bracket");
        if (c == '"') {
            sh_span ignored;
            SH_TRY(sh_scan_string(s, &ignored));
            continue;
        }
        if (c == '{' || c == '[') {
            if (depth == SH_MAX_JSON_DEPTH) return sh_scan_fail(s, "fewer nested brackets");
            open[depth++] = c == '{' ? '}' : ']';
        } else if (c == '}' || c == ']') {
            if (depth == 0 || open[--depth] != c) return sh_scan_fail(s, "a matching bracket");
        } else if (depth == 0) { /* a number or a word: up to what ends it */
            while (s->p < s->end && !strchr(",}] \t\r\n", *s->p)) s->p++;
            break;
        }
        s->p++;
    } while (depth > 0);
    if (s->p == from) return sh_scan_fail(s, "a value");
    *out = (sh_span){from, (size_t)(s->p - from)};
    return SH_OK;
}
