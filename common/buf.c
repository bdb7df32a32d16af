/* Growing byte buffer. See buf.h. */
#include "common/buf.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void sh_buf_init(sh_buf *b, size_t max) {
    *b = (sh_buf){.max = max ? max : (size_t)1 << 30};
}

void sh_buf_release(sh_buf *b) {
    free(b->data);
    *b = (sh_buf){.max = b->max};
}

void sh_buf_clear(sh_buf *b) {
    b->len = 0;
    if (b->data) b->data[0] = 0;
}

sh_status sh_buf_reserve(sh_buf *b, size_t extra) {
    size_t max = b->max ? b->max : (size_t)1 << 30;
    if (extra > max || b->len > max - extra)
        SH_FAIL(SH_ELIMIT, "buffer of %zu bytes is over its limit of %zu", b->len + extra, max);
    size_t need = b->len + extra + 1;
    if (need <= b->cap) return SH_OK;
    size_t cap = b->cap ? b->cap : 64;
    while (cap < need) cap *= 2;
    uint8_t *p = realloc(b->data, cap);
    if (!p) SH_FAIL(SH_EMEMORY, "no memory for a buffer of %zu bytes", cap);
    b->data = p;
    b->cap = cap;
    return SH_OK;
}

sh_status sh_buf_add(sh_buf *b, const void *p, size_t n) {
    SH_TRY(sh_buf_reserve(b, n));
    if (n) memcpy(b->data + b->len, p, n);
    b->len += n;
    b->data[b->len] = 0;
    return SH_OK;
}

sh_status sh_buf_add_str(sh_buf *b, const char *s) {
    return sh_buf_add(b, s, strlen(s));
}

sh_status sh_buf_printf(sh_buf *b, const char *fmt, ...) {
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    sh_status st = sh_buf_reserve(b, (size_t)n);
    if (st == SH_OK) {
        vsnprintf((char *)b->data + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n;
    }
    va_end(again);
    return st;
}

char *sh_buf_take(sh_buf *b) {
    char *p = (char *)b->data;
    if (!p) p = calloc(1, 1);
    *b = (sh_buf){.max = b->max};
    return p;
}
