/*
 * A forward scanner over JSON text that is too large for a tree of nodes (a tokenizer's 32 MB of vocabulary and
 * merges). It reads values in the order of the file; what needs looking at as a whole is cut out with sh_scan_skip and
 * parsed by json.h, which also checks it: skipping only balances brackets and strings. Errors name the text and the
 * byte.
 *
 *     SH_TRY(sh_scan_open(&s, '{'));
 *     while (sh_scan_more(&s, '}', &st)) { sh_scan_key(&s, &key); …read or skip the value… }   then check st
 */
#ifndef SH_COMMON_SCAN_H
#define SH_COMMON_SCAN_H

#include <stdbool.h>
#include <stdint.h>
#include "common/buf.h"
#include "common/status.h"

typedef struct sh_scan {
    const char *what; /* for errors; borrowed */
    const char *base, *p, *end;
    bool first;  /* nothing read yet inside the innermost open bracket */
    sh_buf text; /* the last string that had escapes */
} sh_scan;

/* Bytes borrowed from the text, or from the scanner until its next string. */
typedef struct sh_span {
    const char *p;
    size_t n;
} sh_span;

/* Scans text[0..len), which must outlive the scanner. */
void sh_scan_init(sh_scan *s, const char *what, const char *text, size_t len);
void sh_scan_release(sh_scan *s);
/* Fails with the place: "WHAT: byte N: expected …". */
sh_status sh_scan_fail(const sh_scan *s, const char *expected);
/* Enters an object or an array: bracket is '{' or '['. */
sh_status sh_scan_open(sh_scan *s, char bracket);
/* True when another element follows (the comma is consumed); false at the closing bracket, which is consumed, or when
 * the text is wrong: then *st says so. Call it again only after reading the element. */
bool sh_scan_more(sh_scan *s, char closing, sh_status *st);
/* A member's name and its colon. */
sh_status sh_scan_key(sh_scan *s, sh_span *out);
/* A string, unescaped. It must be valid UTF-8 without lone surrogates. */
sh_status sh_scan_string(sh_scan *s, sh_span *out);
/* An integer from 0 to max. */
sh_status sh_scan_uint(sh_scan *s, uint64_t max, uint64_t *out);
/* The next value of any type as a span of the text. */
sh_status sh_scan_skip(sh_scan *s, sh_span *out);
/* The next character that is not white space; 0 at the end. Does not move. */
char sh_scan_peek(sh_scan *s);
/* Fails unless only white space is left. */
sh_status sh_scan_end(sh_scan *s);
static inline bool sh_span_is(sh_span a, const char *s) {
    size_t i = 0;
    while (i < a.n && s[i] && s[i] == a.p[i]) i++;
    return i == a.n && s[i] == 0;
}

#endif
