/* Lists of hosts. See hosts.h. */
#include "cli/hosts.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HOSTS_MOST 65536

/* --- division ------------------------------------------------------------------------------------------------------
 */

/* "node1:2,…" → the length of the name, and of the whole entry. */
static size_t name_len(const char *s) {
    return strcspn(s, ":,");
}

static const char *next_entry(const char *s) {
    s += strcspn(s, ",");
    return *s ? s + 1 : NULL;
}

static bool same_host(const char *a, const char *b) {
    size_t n = name_len(a);
    return n == name_len(b) && strncmp(a, b, n) == 0;
}

/* Whether no entry before this one names its host. */
static bool is_first(const char *list, const char *entry) {
    for (const char *s = list; s != entry; s = next_entry(s))
        if (same_host(s, entry)) return false;
    return true;
}

int sh_hosts_count(const char *list) {
    int n = 0;
    if (!list || !*list) return 1;
    for (const char *s = list; s; s = next_entry(s)) n += is_first(list, s);
    return n;
}

static sh_status add_host(const char *list, const char *host, sh_buf *out) {
    for (const char *s = list; s; s = next_entry(s)) {
        if (!same_host(s, host)) continue;
        if (out->len) SH_TRY(sh_buf_add_str(out, ","));
        SH_TRY(sh_buf_add(out, s, strcspn(s, ",")));
    }
    return SH_OK;
}

sh_status sh_hosts_divide(const char *list, int k, int groups, sh_buf *out, int *part, int *parts) {
    long hosts = sh_hosts_count(list), at = 0;
    for (const char *s = list; s; s = next_entry(s))
        if (name_len(s) == 0) SH_FAIL(SH_EINPUT, "--hosts: '%s' has an entry without a name", list);
    long first = hosts * k / groups, last = hosts * (k + 1) / groups;
    *part = 0;
    *parts = 1;
    if (hosts < groups) {
        last = first + 1;
        *parts = 0;
        for (int i = 0; i < groups; i++) {
            if (hosts * i / groups != first) continue;
            if (i == k) *part = *parts;
            ++*parts;
        }
    }
    for (const char *s = list; s; s = next_entry(s)) {
        if (!is_first(list, s)) continue;
        if (at >= first && at < last) SH_TRY(add_host(list, s, out));
        at++;
    }
    return SH_OK;
}

/* --- Slurm's notation ----------------------------------------------------------------------------------------------
 */

static sh_status add_name(const char *prefix, size_t n, const char *number, sh_buf *out) {
    if (out->len) SH_TRY(sh_buf_add_str(out, ","));
    SH_TRY(sh_buf_add(out, prefix, n));
    return sh_buf_add_str(out, number);
}

/* "01-03,7" up to the bracket; numbers keep the width of the first. */
static sh_status add_numbers(const char *list, const char *prefix, size_t n, const char **end, sh_buf *out) {
    const char *s = list;
    while (*s >= '0' && *s <= '9') {
        char *e, number[32];
        int width = (int)strspn(s, "0123456789");
        long lo = strtol(s, &e, 10), hi = lo;
        if (*e == '-' && e[1] >= '0' && e[1] <= '9') hi = strtol(e + 1, &e, 10);
        if (width > 18 || hi < lo || hi - lo >= HOSTS_MOST) break;
        for (; lo <= hi; lo++) {
            snprintf(number, sizeof number, "%0*ld", width, lo);
            SH_TRY(add_name(prefix, n, number, out));
        }
        s = e + (*e == ',');
        if (*e == ']') {
            *end = e + 1;
            return SH_OK;
        }
    }
    SH_FAIL(SH_EINPUT, "SLURM_JOB_NODELIST: '[%s' is not a list of numbers", list);
}

sh_status sh_hosts_expand(const char *nodelist, sh_buf *out) {
    for (const char *s = nodelist; *s;) {
        size_t n = strcspn(s, "[,");
        const char *end = s + n;
        if (*end == '[')
            SH_TRY(add_numbers(end + 1, s, n, &end, out));
        else if (n)
            SH_TRY(add_name(s, n, "", out));
        if (*end && *end != ',')
            SH_FAIL(SH_EINPUT, "SLURM_JOB_NODELIST: '%s': one pair of brackets a name is allowed", nodelist);
        s = end + (*end == ',');
    }
    return SH_OK;
}

/* Names of one machine: "node1" and "node1.cluster" are, "node1.a" and "node1.b" are not. */
static bool same_machine(const char *a, const char *b) {
    size_t n = strcspn(a, ":,"), m = strcspn(b, ":,"), short_a = strcspn(a, ".:,"), short_b = strcspn(b, ".:,");
    if (short_a < n && short_b < m) return n == m && strncmp(a, b, n) == 0;
    return short_a == short_b && strncmp(a, b, short_a) == 0;
}

/* An address, or a relative name of Open MPI's (+n1, +e): no name to compare. */
static bool not_a_name(const char *s) {
    size_t n = strcspn(s, ","), digits = strspn(s, "0123456789.:");
    return *s == '+' || (n > 0 && digits >= n && memchr(s, '.', n));
}

sh_status sh_hosts_within(const char *list, const char *nodelist) {
    SH_CLEANUP(sh_buf_release) sh_buf all;
    sh_buf_init(&all, 0);
    SH_TRY(sh_hosts_expand(nodelist, &all));
    for (const char *s = list; s; s = next_entry(s)) {
        bool there = not_a_name(s) || same_machine(s, "localhost");
        for (const char *h = (const char *)all.data; h && !there; h = next_entry(h)) there = same_machine(s, h);
        if (!there)
            SH_FAIL(SH_EINPUT, "--hosts: '%.*s' is not in this Slurm job: its nodes are %s (SLURM_JOB_NODELIST)",
                    (int)name_len(s), s, nodelist);
    }
    return SH_OK;
}
