/* Log lines, each written by one write(2) so that processes do not mix within a line. See log.h. */
#include "common/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static sh_log_level max_level = SH_LOG_WARN;
static char prefix[64];

void sh_log_setup(sh_log_level max, const char *who) {
    static const char *names[] = {"error", "warn", "info", "debug"};
    max_level = max;
    const char *env = getenv("SHOAL_LOG");
    for (int i = 0; env && i < 4; i++)
        if (!strcmp(env, names[i])) max_level = (sh_log_level)i;
    snprintf(prefix, sizeof prefix, "%s", who ? who : "");
}

const char *sh_log_who(void) {
    return prefix;
}

void sh_log(sh_log_level level, const char *fmt, ...) {
    static const char *labels[] = {"error: ", "warning: ", "", ""};
    if (level > max_level) return;
    char line[2048];
    int n = snprintf(line, sizeof line, "shoal%s%s: %s", prefix[0] ? " " : "", prefix, labels[level]);
    va_list ap;
    va_start(ap, fmt);
    int m = vsnprintf(line + n, sizeof line - (size_t)n - 1, fmt, ap);
    va_end(ap);
    size_t len = (size_t)n + (size_t)(m < 0 ? 0 : m);
    if (len > sizeof line - 2) len = sizeof line - 2;
    line[len++] = '\n';
    ssize_t w = write(STDERR_FILENO, line, len);
    (void)w;
}
