/* See rowtext.h. */
#include "coordinator/rowtext.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

size_t sh_utf8_len(const unsigned char *s, size_t n) {
    if (n == 0) return 0;
    if (s[0] < 0x80) return 1;
    size_t len = s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : 2;
    if (s[0] < 0xc2 || s[0] > 0xf4 || n < len) return 0;
    for (size_t i = 1; i < len; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f)) return 0; /* overlong; surrogates */
    if ((s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f)) return 0;
    return len;
}

size_t sh_utf8_count(const void *text, size_t len) {
    const unsigned char *s = text;
    size_t n = 0;
    for (size_t i = 0, w; i < len; i += w, n++) {
        w = sh_utf8_len(s + i, len - i);
        if (w == 0) w = 1;
    }
    return n;
}

static sh_status add_escaped(sh_buf *to, unsigned char c) {
    static const char plain[] = "\"\"\\\\\bb\ff\nn\rr\tt";
    for (size_t i = 0; i + 1 < sizeof plain; i += 2)
        if ((unsigned char)plain[i] == c) {
            const char two[2] = {'\\', plain[i + 1]};
            return sh_buf_add(to, two, 2);
        }
    return sh_buf_printf(to, "\\u%04x", c);
}

sh_status sh_row_string(sh_buf *to, const void *text, size_t len) {
    const unsigned char *s = text;
    SH_TRY(sh_buf_reserve(to, len + 2));
    SH_TRY(sh_buf_add(to, "\"", 1));
    for (size_t i = 0; i < len;) {
        size_t run = i;
        while (run < len && s[run] >= 32 && s[run] < 127 && s[run] != '"' && s[run] != '\\') run++;
        SH_TRY(sh_buf_add(to, s + i, run - i));
        i = run;
        if (i == len) break;
        size_t w = sh_utf8_len(s + i, len - i);
        if (w == 0)
            SH_TRY(sh_buf_add(to, "\xef\xbf\xbd", 3));
        else if (w == 1)
            SH_TRY(add_escaped(to, s[i]));
        else
            SH_TRY(sh_buf_add(to, s + i, w));
        i += w ? w : 1;
    }
    return sh_buf_add(to, "\"", 1);
}

sh_status sh_row_float(sh_buf *to, float x) {
    char text[40];
    if (!isfinite(x)) x = x > 0 ? 9999.0f : -9999.0f;
    if (x == 0) x = 0; /* no −0 */
    for (int digits = 6; digits <= 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)x);
        if (strtof(text, NULL) == x) break;
    }
    return sh_buf_add_str(to, text);
}

sh_status sh_row_ids(sh_buf *to, const int32_t *ids, size_t n) {
    SH_TRY(sh_buf_add(to, "[", 1));
    for (size_t i = 0; i < n; i++) SH_TRY(sh_buf_printf(to, i ? ",%d" : "%d", ids[i]));
    return sh_buf_add(to, "]", 1);
}
