/* Error text and trail, one record per thread. See status.h. */
#include "common/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local struct {
    char text[1024];
    char trail[512];
} last;

const char *sh_error_text(void) {
    return last.text;
}

const char *sh_error_trail(void) {
    return last.trail;
}

static void add_frame(const char *file, int line) {
    size_t n = strlen(last.trail);
    snprintf(last.trail + n, sizeof last.trail - n, "%s%s:%d", n ? " < " : "", file, line);
}

sh_status sh_error_set(sh_status code, const char *file, int line, const char *fmt, ...) {
    char text[sizeof last.text]; /* fmt's arguments may point into last.text */
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    memcpy(last.text, text, sizeof text);
    last.trail[0] = 0;
    add_frame(file, line);
    return code;
}

sh_status sh_error_prefix(sh_status code, const char *fmt, ...) {
    char text[sizeof last.text];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (n < 0 || (size_t)n >= sizeof text) return code;
    snprintf(text + n, sizeof text - (size_t)n, ": %.*s", (int)(sizeof text - (size_t)n - 3), last.text);
    memcpy(last.text, text, sizeof text);
    return code;
}

sh_status sh_error_pass(sh_status code, const char *file, int line) {
    add_frame(file, line);
    return code;
}
