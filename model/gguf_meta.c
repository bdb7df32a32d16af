/* Metadata of GGUF by key. See gguf_meta.h. */
#include "model/gguf_meta.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/file.h"
#include "model/gguf.h"

typedef struct value {
    sh_gguf_text key;
    uint64_t type, each, n; /* arrays: type of the values, and how many */
    size_t at;              /* of the first byte of the value, of an array the first of its values */
} value;

struct sh_gguf_meta {
    char path[4096];
    sh_map map;
    value *v; /* sorted by key */
    uint64_t n;
};

/* --- opening -------------------------------------------------------------------------------------------------------
 */

static int compare(sh_gguf_text a, const char *s, size_t n) {
    int c = memcmp(a.s, s, a.n < n ? a.n : n);
    return c ? c : (a.n > n) - (a.n < n);
}

static int by_key(const void *a, const void *b) {
    const value *x = a, *y = b;
    return compare(x->key, y->key.s, y->key.n);
}

static sh_status read_value(sh_gguf_reader *r, value *v) {
    SH_TRY(sh_gguf_take_number(r, 4, &v->type));
    v->at = r->at;
    SH_TRY(sh_gguf_skip_value(r, v->type, 0));
    if (v->type != SH_GGUF_ARRAY) return SH_OK;
    sh_gguf_reader inside = *r;
    inside.at = v->at;
    SH_TRY(sh_gguf_take_number(&inside, 4, &v->each));
    SH_TRY(sh_gguf_take_number(&inside, 8, &v->n));
    v->at = inside.at;
    return SH_OK;
}

static sh_status read_values(sh_gguf_meta *m) {
    sh_gguf_reader r = {.data = m->map.data, .len = m->map.len};
    uint64_t tensors;
    SH_TRY(sh_gguf_take_counts(&r, &tensors, &m->n));
    m->v = calloc(m->n ? m->n : 1, sizeof *m->v);
    if (!m->v) SH_FAIL(SH_EMEMORY, "no memory for %llu keys", (unsigned long long)m->n);
    for (uint64_t i = 0; i < m->n; i++) {
        value *v = &m->v[i];
        SH_TRY(sh_gguf_take_name(&r, "metadata key", SH_GGUF_KEY_BYTES, &v->key));
        sh_status st = read_value(&r, v);
        if (st != SH_OK) return sh_error_prefix(st, "metadata %.*s", (int)(v->key.n > 200 ? 200 : v->key.n), v->key.s);
    }
    qsort(m->v, m->n, sizeof *m->v, by_key);
    for (uint64_t i = 1; i < m->n; i++)
        if (by_key(&m->v[i - 1], &m->v[i]) == 0)
            SH_FAIL(SH_EFORMAT, "metadata %.*s is there twice", (int)(m->v[i].key.n > 200 ? 200 : m->v[i].key.n),
                    m->v[i].key.s);
    return SH_OK;
}

sh_status sh_gguf_meta_open(const char *dir, sh_gguf_meta **out) {
    char first[300];
    bool found = false;
    SH_TRY(sh_gguf_first(dir, first, sizeof first, &found));
    if (!found) SH_FAIL(SH_EINPUT, "%s: no .gguf file is there", dir);
    SH_CLEANUP(sh_gguf_meta_close) sh_gguf_meta *m = calloc(1, sizeof *m);
    if (!m) SH_FAIL(SH_EMEMORY, "%s: no memory for metadata", dir);
    if (snprintf(m->path, sizeof m->path, "%s/%s", dir, first) >= (int)sizeof m->path)
        SH_FAIL(SH_ELIMIT, "%.64s…: path too long", dir);
    SH_TRY(sh_map_open(m->path, &m->map));
    sh_status st = read_values(m);
    if (st != SH_OK) return sh_error_prefix(st, "%s", m->path);
    *out = m;
    m = NULL;
    return SH_OK;
}

void sh_gguf_meta_close(sh_gguf_meta **mp) {
    sh_gguf_meta *m = *mp;
    if (!m) return;
    sh_map_close(&m->map);
    free(m->v);
    free(m);
    *mp = NULL;
}

/* --- look-ups ------------------------------------------------------------------------------------------------------
 */

static const value *find(const sh_gguf_meta *m, const char *key) {
    uint64_t lo = 0, hi = m->n;
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        int c = compare(m->v[mid].key, key, strlen(key));
        if (c == 0) return &m->v[mid];
        if (c < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return NULL;
}

const char *sh_gguf_meta_path(const sh_gguf_meta *m) {
    return m->path;
}

bool sh_gguf_meta_has(const sh_gguf_meta *m, const char *key) {
    return find(m, key) != NULL;
}

sh_status sh_gguf_meta_fail(const sh_gguf_meta *m, sh_status code, const char *key, const char *fmt, ...) {
    char text[600];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    SH_FAIL(code, "%s: metadata %s: %s", m->path, key, text);
}

sh_status sh_gguf_meta_need(const sh_gguf_meta *m, const char *key) {
    if (sh_gguf_meta_has(m, key)) return SH_OK;
    return sh_gguf_meta_fail(m, SH_EFORMAT, key, "missing");
}

static const char *kind_of(const value *v, char to[48]) {
    static const char *const name[] = {"u8",   "i8",     "u16",      "i16", "u32", "i32", "f32",
                                       "bool", "string", "an array", "u64", "i64", "f64"};
    if (v->type != SH_GGUF_ARRAY) return name[v->type]; /* types were checked when the file was opened */
    snprintf(to, 48, "an array of %s", v->each <= SH_GGUF_F64 ? name[v->each] : "?");
    return to;
}

static sh_status wrong_type(const sh_gguf_meta *m, const char *key, const value *v, const char *want) {
    char kind[48];
    return sh_gguf_meta_fail(m, SH_EFORMAT, key, "is %s: allowed is %s", kind_of(v, kind), want);
}

static bool is_int(uint64_t type) {
    return type <= 5 || type == 10 || type == 11;
}

/* The number of a type at an offset. *big: a u64 beyond what an i64 holds. */
static int64_t number_at(const sh_gguf_meta *m, uint64_t type, size_t at, bool *big) {
    size_t n = sh_gguf_value_bytes(type);
    uint64_t u = 0;
    memcpy(&u, m->map.data + at, n);
    bool is_signed = type == 1 || type == 3 || type == 5 || type == 11;
    *big = !is_signed && u > INT64_MAX;
    if (is_signed && n < 8 && u >> (8 * n - 1)) u |= UINT64_MAX << 8 * n;
    return (int64_t)u;
}

static sh_status check_range(const sh_gguf_meta *m, const char *key, const char *place, int64_t x, bool big,
                             int64_t min, int64_t max) {
    if (!big && x >= min && x <= max) return SH_OK;
    char found[24];
    if (big)
        snprintf(found, sizeof found, "%llu", (unsigned long long)x);
    else
        snprintf(found, sizeof found, "%lld", (long long)x);
    return sh_gguf_meta_fail(m, SH_EFORMAT, key, "%s%s is out of range: allowed are %lld to %lld", place, found,
                             (long long)min, (long long)max);
}

sh_status sh_gguf_meta_int(const sh_gguf_meta *m, const char *key, int64_t min, int64_t max, int64_t *out) {
    const value *v = find(m, key);
    bool big = false;
    if (!v) return SH_OK;
    if (!is_int(v->type)) return wrong_type(m, key, v, "an integer");
    int64_t x = number_at(m, v->type, v->at, &big);
    SH_TRY(check_range(m, key, "", x, big, min, max));
    *out = x;
    return SH_OK;
}

sh_status sh_gguf_meta_ints(const sh_gguf_meta *m, const char *key, const char *of, int n, int64_t min, int64_t max,
                            int64_t *out) {
    const value *v = find(m, key);
    if (!v) return SH_OK;
    if (v->type != SH_GGUF_ARRAY) {
        int64_t one = 0;
        SH_TRY(sh_gguf_meta_int(m, key, min, max, &one));
        for (int i = 0; i < n; i++) out[i] = one;
        return SH_OK;
    }
    if (!is_int(v->each)) return wrong_type(m, key, v, "an integer, or an array of them");
    if (v->n != (uint64_t)n)
        return sh_gguf_meta_fail(m, SH_EFORMAT, key, "%llu values: allowed are %d, one for each of %s",
                                 (unsigned long long)v->n, n, of);
    for (int i = 0; i < n; i++) {
        char place[24];
        bool big = false;
        out[i] = number_at(m, v->each, v->at + (size_t)i * sh_gguf_value_bytes(v->each), &big);
        snprintf(place, sizeof place, "[%d]: ", i);
        SH_TRY(check_range(m, key, place, out[i], big, min, max));
    }
    return SH_OK;
}

sh_status sh_gguf_meta_bools(const sh_gguf_meta *m, const char *key, const char *of, int n, bool *out) {
    const value *v = find(m, key);
    if (!v) return SH_OK;
    if (v->type != SH_GGUF_ARRAY || v->each != SH_GGUF_BOOL) return wrong_type(m, key, v, "an array of bool");
    if (v->n != (uint64_t)n)
        return sh_gguf_meta_fail(m, SH_EFORMAT, key, "%llu values: allowed are %d, one for each of %s",
                                 (unsigned long long)v->n, n, of);
    for (int i = 0; i < n; i++) out[i] = m->map.data[v->at + (size_t)i] != 0;
    return SH_OK;
}

/* The shortest decimal that is read as this f32. */
static double decimal_of(float f) {
    char text[40];
    for (int digits = 6; digits < 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)f);
        if (strtof(text, NULL) == f) return strtod(text, NULL);
    }
    return (double)f;
}

sh_status sh_gguf_meta_real(const sh_gguf_meta *m, const char *key, double min, double max, double *out) {
    const value *v = find(m, key);
    double x = 0;
    if (!v) return SH_OK;
    if (v->type == SH_GGUF_F64) {
        memcpy(&x, m->map.data + v->at, sizeof x);
    } else if (v->type == SH_GGUF_F32) {
        float f;
        memcpy(&f, m->map.data + v->at, sizeof f);
        x = decimal_of(f);
    } else {
        return wrong_type(m, key, v, "f32 or f64");
    }
    if (!(x >= min && x <= max))
        return sh_gguf_meta_fail(m, SH_EFORMAT, key, "%g is out of range: allowed are %g to %g", x, min, max);
    *out = x;
    return SH_OK;
}

sh_status sh_gguf_meta_bool(const sh_gguf_meta *m, const char *key, bool *out) {
    const value *v = find(m, key);
    if (!v) return SH_OK;
    if (v->type != SH_GGUF_BOOL) return wrong_type(m, key, v, "bool");
    *out = m->map.data[v->at] != 0;
    return SH_OK;
}

sh_status sh_gguf_meta_text(const sh_gguf_meta *m, const char *key, sh_gguf_text *out) {
    const value *v = find(m, key);
    if (!v) return SH_OK;
    if (v->type != SH_GGUF_STRING) return wrong_type(m, key, v, "a string");
    sh_gguf_reader r = {.data = m->map.data, .len = m->map.len, .at = v->at};
    return sh_gguf_take_text(&r, "string", r.len, out);
}

sh_status sh_gguf_meta_strings(const sh_gguf_meta *m, const char *key, sh_gguf_strings *out) {
    SH_TRY(sh_gguf_meta_need(m, key));
    const value *v = find(m, key);
    if (v->type != SH_GGUF_ARRAY || v->each != SH_GGUF_STRING) return wrong_type(m, key, v, "an array of string");
    *out = (sh_gguf_strings){.r = {.data = m->map.data, .len = m->map.len, .at = v->at}, .n = v->n};
    return SH_OK;
}

sh_gguf_text sh_gguf_next(sh_gguf_strings *s) {
    sh_gguf_text t = {"", 0};
    SH_IGNORE(sh_gguf_take_text(&s->r, "string", s->r.len, &t)); /* passed once already, when the file was opened */
    return t;
}

uint64_t sh_gguf_meta_count(const sh_gguf_meta *m, const char *key) {
    const value *v = find(m, key);
    return v && v->type == SH_GGUF_ARRAY ? v->n : 0;
}
