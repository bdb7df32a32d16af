/* The notation of Gemma 4's tool calls (what model/chat_tools.c writes), read. See toolcall.h. */
#include "coordinator/toolcall.h"

#include <stdlib.h>
#include <string.h>

#include "common/json.h"
#include "common/limits.h"

#define QUOTE     "<|\"|>"
#define QUOTE_LEN (sizeof QUOTE - 1)

typedef struct reader {
    const char *p, *end;
    int depth;
} reader;

static bool take(reader *r, const char *s) {
    size_t n = strlen(s);
    if ((size_t)(r->end - r->p) < n || memcmp(r->p, s, n)) return false;
    r->p += n;
    return true;
}

static void skip_space(reader *r) {
    while (r->p < r->end && strchr(" \t\r\n", *r->p)) r->p++;
}

/* The text up to the closing quote, which is passed. */
static bool take_quoted(reader *r, const char **s, size_t *n) {
    const char *close = memmem(r->p, (size_t)(r->end - r->p), QUOTE, QUOTE_LEN);
    if (!close) return false;
    *s = r->p;
    *n = (size_t)(close - r->p);
    r->p = close + QUOTE_LEN;
    return true;
}

/* Everything up to one of the characters in `ends`, without the space around it. */
static void take_bare(reader *r, const char *ends, const char **s, size_t *n) {
    const char *from = r->p;
    while (r->p < r->end && !strchr(ends, *r->p)) r->p++;
    const char *to = r->p;
    while (to > from && strchr(" \t\r\n", to[-1])) to--;
    *s = from;
    *n = (size_t)(to - from);
}

static json_t *read_value(reader *r);

static json_t *read_members(reader *r) {
    json_t *o = json_object();
    skip_space(r);
    if (take(r, "}")) return o;
    for (;;) {
        const char *k;
        size_t n;
        skip_space(r);
        if (!take(r, QUOTE))
            take_bare(r, ":,{}[]", &k, &n);
        else if (!take_quoted(r, &k, &n))
            break;
        skip_space(r);
        json_t *v = n > 0 && !memchr(k, 0, n) && take(r, ":") ? read_value(r) : NULL;
        if (!v || json_object_setn_new(o, k, n, v)) break;
        skip_space(r);
        if (take(r, "}")) return o;
        if (!take(r, ",")) break;
    }
    json_decref(o);
    return NULL;
}

static json_t *read_items(reader *r) {
    json_t *a = json_array();
    skip_space(r);
    if (take(r, "]")) return a;
    for (;;) {
        json_t *v = read_value(r);
        if (!v || json_array_append_new(a, v)) break;
        skip_space(r);
        if (take(r, "]")) return a;
        if (!take(r, ",")) break;
    }
    json_decref(a);
    return NULL;
}

/* A number, true, false or null; other words are text. */
static json_t *read_word(reader *r) {
    const char *s;
    size_t n;
    take_bare(r, ",{}[]", &s, &n);
    if (n == 0) return NULL;
    if (n == 4 && !memcmp(s, "None", 4)) return json_null();
    json_t *v = *s == '"' ? NULL : json_loadb(s, n, JSON_DECODE_ANY, NULL);
    return v ? v : json_stringn(s, n);
}

static json_t *read_value(reader *r) {
    const char *s;
    size_t n;
    json_t *v = NULL;
    skip_space(r);
    if (++r->depth <= SH_MAX_JSON_DEPTH) {
        if (take(r, QUOTE))
            v = take_quoted(r, &s, &n) ? json_stringn(s, n) : NULL;
        else if (take(r, "{"))
            v = read_members(r);
        else if (take(r, "["))
            v = read_items(r);
        else
            v = read_word(r);
    }
    r->depth--;
    return v;
}

sh_status sh_toolcall_parse(const char *text, size_t len, sh_buf *name, sh_buf *arguments, bool *ok) {
    reader r = {.p = text, .end = text + len};
    const char *s = text;
    size_t n = 0;
    *ok = false;
    skip_space(&r);
    if (!take(&r, "call:")) return SH_OK;
    take_bare(&r, "{", &s, &n);
    if (n == 0 || !take(&r, "{")) return SH_OK;
    json_t *o = read_members(&r);
    skip_space(&r);
    char *dump = o && r.p == r.end ? json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(15)) : NULL;
    json_decref(o);
    if (!dump) return SH_OK;
    sh_status st = sh_buf_add(name, s, n);
    if (st == SH_OK) st = sh_buf_add_str(arguments, dump);
    free(dump);
    *ok = st == SH_OK;
    return st;
}
