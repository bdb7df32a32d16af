/* UTF-8, strictly (RFC 3629: no overlong forms, no surrogates, at most U+10FFFF). */
#ifndef SH_COMMON_UTF8_H
#define SH_COMMON_UTF8_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Bytes of the byte order mark with which files of some editors begin: 3, or 0 without one. */
static inline size_t sh_utf8_mark(const void *p, size_t n) {
    return n >= 3 && memcmp(p, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
}

/* Bytes a code point needs that starts with this byte; 0: no code point starts so. */
static inline int sh_utf8_need(uint8_t lead) {
    if (lead < 0x80) return 1;
    if (lead < 0xc2) return 0;
    return lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
}

/* Whether byte number `at` (1 to 3) may follow `lead` there. */
static inline int sh_utf8_follows(uint8_t lead, int at, uint8_t b) {
    if (b < 0x80 || b > 0xbf) return 0;
    if (at > 1) return 1;
    switch (lead) {
    case 0xe0:
        return b >= 0xa0;
    case 0xed:
        return b <= 0x9f;
    case 0xf0:
        return b >= 0x90;
    case 0xf4:
        return b <= 0x8f;
    default:
        return 1;
    }
}

/* Reads one code point of p[0..n), n > 0: its length, or 0 when the bytes are not valid, or −1 when they end too early
 * (more bytes may make them valid). *cp is set on success only. */
static inline int sh_utf8_next(const uint8_t *p, size_t n, uint32_t *cp) {
    int need = sh_utf8_need(p[0]);
    if (need == 1) {
        *cp = p[0];
        return 1;
    }
    if (need == 0) return 0;
    uint32_t c = p[0] & (0xffu >> (need + 1));
    for (int i = 1; i < need; i++) {
        if ((size_t)i >= n) return -1;
        if (!sh_utf8_follows(p[0], i, p[i])) return 0;
        c = c << 6 | (p[i] & 0x3fu);
    }
    *cp = c;
    return need;
}

/* Offset of the first byte that is not part of a valid code point; n when all are. */
static inline size_t sh_utf8_valid(const uint8_t *p, size_t n) {
    size_t i = 0;
    uint32_t cp;
    while (i < n) {
        int k = sh_utf8_next(p + i, n - i, &cp);
        if (k <= 0) return i;
        i += (size_t)k;
    }
    return n;
}

/* Writes cp as UTF-8: 1 to 4 bytes. */
static inline int sh_utf8_put(uint32_t cp, uint8_t out[4]) {
    if (cp < 0x80) {
        out[0] = (uint8_t)cp;
        return 1;
    }
    int n = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, cp >>= 6) out[i] = (uint8_t)(0x80 | (cp & 0x3f));
    out[0] = (uint8_t)((0xf00u >> n) | cp);
    return n;
}

#endif
