/*
 * GGUF files: headers read and checked, bytes mapped. See gguf.h. The format: magic, version 3 (or 2, which differs in
 * nothing that is read here), counts, metadata, tensor infos, padding, then the data. All of it is hostile until
 * checked: every length is held against what is left of the file before it is used.
 */
#include "model/gguf.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/limits.h"
#include "model/gguf_read.h"
#include "model/tensors_int.h"

enum { NAME_BYTES = 64 };

typedef sh_gguf_reader reader;
typedef sh_gguf_text text;

/* What of the metadata counts. */
typedef struct header {
    uint64_t tensors, keys;
    uint64_t alignment, split_count, split_tensors;
} header;

/* --- reading -------------------------------------------------------------------------------------------------------
 */

static sh_status take_unsigned(reader *r, uint64_t type, uint64_t *out) {
    static const uint64_t unsigned_types[] = {0, 2, 4, 10};
    for (int i = 0; i < 4; i++)
        if (type == unsigned_types[i]) return sh_gguf_take_number(r, sh_gguf_value_bytes(type), out);
    if (type == 5) { /* i32, as some writers have it */
        SH_TRY(sh_gguf_take_number(r, 4, out));
        if (*out <= INT32_MAX) return SH_OK;
    }
    SH_FAIL(SH_EFORMAT, "value type %llu: an unsigned integer is wanted", (unsigned long long)type);
}

static sh_status take_value(reader *r, text key, header *h) {
    uint64_t type;
    text s;
    SH_TRY(sh_gguf_take_number(r, 4, &type));
    if (sh_gguf_is(key, "split.count")) return take_unsigned(r, type, &h->split_count);
    if (sh_gguf_is(key, "split.tensors.count")) return take_unsigned(r, type, &h->split_tensors);
    if (sh_gguf_is(key, "general.alignment")) {
        SH_TRY(take_unsigned(r, type, &h->alignment));
        if (h->alignment == 0 || h->alignment % 8 || h->alignment > 1 << 20)
            SH_FAIL(SH_EFORMAT, "%llu: allowed are multiples of 8 up to 1048576", (unsigned long long)h->alignment);
        return SH_OK;
    }
    if (!sh_gguf_is(key, "general.architecture")) return sh_gguf_skip_value(r, type, 0);
    if (type != SH_GGUF_STRING) SH_FAIL(SH_EFORMAT, "value type %llu: a string is wanted", (unsigned long long)type);
    SH_TRY(sh_gguf_take_name(r, "string", 64, &s));
    if (!sh_gguf_is(s, "gemma4")) SH_FAIL(SH_EUNSUPPORTED, "%.*s: allowed is gemma4", (int)s.n, s.s);
    return SH_OK;
}

static int by_text(const void *a, const void *b) {
    const text *x = a, *y = b;
    int c = memcmp(x->s, y->s, x->n < y->n ? x->n : y->n);
    return c ? c : (x->n > y->n) - (x->n < y->n);
}

static sh_status refuse_twice(const char *what, text *list, size_t n) {
    if (n) qsort(list, n, sizeof *list, by_text);
    for (size_t i = 1; i < n; i++)
        if (by_text(&list[i - 1], &list[i]) == 0)
            SH_FAIL(SH_EFORMAT, "%s %.*s is there twice", what, (int)(list[i].n > 200 ? 200 : list[i].n), list[i].s);
    return SH_OK;
}

static sh_status read_keys(reader *r, header *h, text *list) {
    for (uint64_t i = 0; i < h->keys; i++) {
        SH_TRY(sh_gguf_take_name(r, "metadata key", SH_GGUF_KEY_BYTES, &list[i]));
        sh_status st = take_value(r, list[i], h);
        if (st != SH_OK)
            return sh_error_prefix(st, "metadata %.*s", (int)(list[i].n > 200 ? 200 : list[i].n), list[i].s);
    }
    return refuse_twice("metadata", list, h->keys);
}

/* --- tensors -------------------------------------------------------------------------------------------------------
 */

static const char *type_name(uint64_t type) {
    static const char *const name[] = {"F32",     "F16",    "Q4_0",    "Q4_1",  NULL,     NULL,    "Q5_0",  "Q5_1",
                                       "Q8_0",    "Q8_1",   "Q2_K",    "Q3_K",  "Q4_K",   "Q5_K",  "Q6_K",  "Q8_K",
                                       "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS",
                                       "I8",      "I16",    "I32",     "I64",   "F64",    "IQ1_M", "BF16",  NULL,
                                       NULL,      NULL,     "TQ1_0",   "TQ2_0", NULL,     NULL,    NULL,    "MXFP4"};
    return type < sizeof name / sizeof *name && name[type] ? name[type] : "?";
}

static sh_status read_type(reader *r, sh_tensor *t) {
    static const struct {
        uint64_t type;
        sh_dtype dtype;
    } known[] = {{0, SH_F32}, {1, SH_F16}, {2, SH_Q4_0}, {8, SH_Q8_0}, {14, SH_Q6_K}, {30, SH_BF16}};
    uint64_t type;
    size_t i = 0, n = sizeof known / sizeof *known;
    SH_TRY(sh_gguf_take_number(r, 4, &type));
    while (i < n && known[i].type != type) i++;
    if (i == n)
        SH_FAIL(SH_EUNSUPPORTED, "type %llu (%s): allowed are F32, F16, BF16, Q8_0, Q6_K and Q4_0",
                (unsigned long long)type, type_name(type));
    t->dtype = known[i].dtype;
    snprintf(t->dtype_name, sizeof t->dtype_name, "%s", type_name(type));
    return SH_OK;
}

/* GGUF writes the dimension that runs fastest first, Hugging Face last. */
static sh_status read_shape(reader *r, sh_tensor *t, uint64_t *items) {
    uint64_t n, d;
    SH_TRY(sh_gguf_take_number(r, 4, &n));
    if (n < 1 || n > 4) SH_FAIL(SH_EFORMAT, "%llu dimensions: allowed are 1 to 4", (unsigned long long)n);
    t->rank = (int)n;
    *items = 1;
    for (int i = t->rank - 1; i >= 0; i--) {
        SH_TRY(sh_gguf_take_number(r, 8, &d));
        if (d < 1 || d > INT64_MAX || __builtin_mul_overflow(*items, d, items) || *items > INT64_MAX / 8)
            SH_FAIL(SH_EFORMAT, "dimension %llu: zero, or the product overflows", (unsigned long long)d);
        t->shape[i] = (int64_t)d;
    }
    return SH_OK;
}

static sh_status read_info(reader *r, const header *h, sh_tensors_entry *e) {
    uint64_t items = 0;
    SH_TRY(read_shape(r, &e->t, &items));
    SH_TRY(read_type(r, &e->t));
    SH_TRY(sh_gguf_take_number(r, 8, &e->begin));
    int64_t row = e->t.shape[e->t.rank - 1];
    if (row % sh_dtype_block(e->t.dtype))
        SH_FAIL(SH_EFORMAT, "rows of %lld items: %s takes multiples of %d", (long long)row, e->t.dtype_name,
                sh_dtype_block(e->t.dtype));
    if (e->begin % h->alignment)
        SH_FAIL(SH_EFORMAT, "offset %llu: allowed are multiples of the alignment %llu", (unsigned long long)e->begin,
                (unsigned long long)h->alignment);
    e->t.bytes = sh_dtype_bytes(e->t.dtype, items);
    return SH_OK;
}

/* Derived from config.json by the converter: kept apart, for where config.json is not there (gguf_config.c). */
static const char derived[] = "rope_freqs.weight";

static bool is_derived(text name) {
    return sh_gguf_is(name, derived);
}

static sh_status read_infos(sh_tensors *t, int file, reader *r, const header *h, text *list) {
    for (uint64_t i = 0; i < h->tensors; i++) {
        char name[NAME_BYTES + 1], hf[200];
        sh_tensors_entry e = {.file = file, .t.file = t->file[file].name};
        SH_TRY(sh_gguf_take_name(r, "tensor name", NAME_BYTES, &list[i]));
        snprintf(name, sizeof name, "%.*s", (int)list[i].n, list[i].s);
        sh_status st = read_info(r, h, &e);
        if (st != SH_OK) return sh_error_prefix(st, "%s", name);
        sh_gguf_name(name, hf, sizeof hf);
        SH_TRY(sh_tensors_add_entry(t, &e, is_derived(list[i]) ? name : hf));
    }
    return refuse_twice("tensor", list, h->tensors);
}

/* Holds the tensors against the data: inside it, and none over another. */
static sh_status place(sh_tensors_entry *e, int n, const uint8_t *data, uint64_t room) {
    sh_tensors_by_offset(e, n);
    for (int i = 0; i < n; i++) {
        if (e[i].begin > room || e[i].t.bytes > room - e[i].begin)
            SH_FAIL(SH_EFORMAT, "%s: %llu bytes at offset %llu of %llu bytes of data: is the file truncated?",
                    e[i].t.name, (unsigned long long)e[i].t.bytes, (unsigned long long)e[i].begin,
                    (unsigned long long)room);
        if (i > 0 && e[i].begin < e[i - 1].begin + e[i - 1].t.bytes)
            SH_FAIL(SH_EFORMAT, "%s: overlaps %s at offset %llu", e[i].t.name, e[i - 1].t.name,
                    (unsigned long long)e[i].begin);
        e[i].t.data = data + e[i].begin;
    }
    return SH_OK;
}

static void drop_derived(sh_tensors *t, int first) {
    int n = first;
    for (int i = first; i < t->n_entries; i++) {
        const char *s = t->entry[i].t.name;
        if (is_derived((text){s, strlen(s)})) {
            free((char *)(uintptr_t)s);
            t->rope_freqs = t->entry[i].t;
            t->rope_freqs.name = derived;
        } else {
            t->entry[n++] = t->entry[i];
        }
    }
    t->n_entries = n;
}

/* --- one file ------------------------------------------------------------------------------------------------------
 */

static sh_status read_body(sh_tensors *t, int file, reader *r, header *h, text *list) {
    int first = t->n_entries;
    SH_TRY(read_keys(r, h, list));
    SH_TRY(sh_gguf_check_tensors(r, h->tensors));
    SH_TRY(read_infos(t, file, r, h, list));
    uint64_t data = r->at + (h->alignment - r->at % h->alignment) % h->alignment;
    if (data > r->len && h->tensors > 0)
        SH_FAIL(SH_EFORMAT, "data begin at offset %llu, but the file has only %zu bytes: is it truncated?",
                (unsigned long long)data, r->len);
    if (data > r->len) data = r->len;
    SH_TRY(place(t->entry + first, t->n_entries - first, r->data + data, r->len - data));
    drop_derived(t, first);
    return SH_OK;
}

static sh_status read_file(sh_tensors *t, int file, header *h) {
    reader r = {.data = t->file[file].map.data, .len = t->file[file].map.len};
    *h = (header){.alignment = 32, .split_count = 1};
    SH_TRY(sh_gguf_take_counts(&r, &h->tensors, &h->keys));
    size_t most = h->keys > h->tensors ? h->keys : h->tensors;
    text *list = calloc(most ? most : 1, sizeof *list);
    if (!list) SH_FAIL(SH_EMEMORY, "no memory for %zu names", most);
    sh_status st = read_body(t, file, &r, h, list);
    free(list);
    return st;
}

static sh_status open_file(sh_tensors *t, const char *dir, const char *name, header *h) {
    SH_TRY(sh_tensors_add_file(t, dir, name));
    sh_status st = read_file(t, t->n_files - 1, h);
    return st == SH_OK ? st : sh_error_prefix(st, "%s/%s", dir, name);
}

/* --- the directory -------------------------------------------------------------------------------------------------
 */

bool sh_gguf_is_name(const char *name) {
    size_t n = strlen(name);
    return n > 5 && strcmp(name + n - 5, ".gguf") == 0 && strncmp(name, "mmproj", 6) != 0 &&
           strncmp(name, "mtp-", 4) != 0;
}

/* NAME-00002-of-00005.gguf: part and parts; the length of NAME. 0: no such name. */
static size_t split_of(const char *name, int *part, int *parts) {
    size_t n = strlen(name), tail = strlen("-00001-of-00001.gguf");
    int used = 0;
    if (n <= tail || sscanf(name + n - tail, "-%5d-of-%5d.gguf%n", part, parts, &used) != 2) return 0;
    return used == (int)tail && *part >= 1 && *part <= *parts ? n - tail : 0;
}

sh_status sh_gguf_first(const char *dir, char *first, size_t size, bool *found) {
    DIR *d = opendir(dir);
    *found = false;
    if (!d) return SH_OK; /* whoever reads config.json says what is wrong */
    sh_status st = SH_OK;
    for (struct dirent *e; st == SH_OK && (e = readdir(d));) {
        int p = 1, n = 1, fp = 1, fn = 1;
        if (!sh_gguf_is_name(e->d_name)) continue;
        size_t base = split_of(e->d_name, &p, &n);
        bool same =
            *found && base && split_of(first, &fp, &fn) == base && memcmp(first, e->d_name, base) == 0 && fn == n;
        if (*found && !same) {
            bool less = strcmp(first, e->d_name) < 0; /* the same sentence whatever the folder's order */
            st = sh_error_set(SH_EINPUT, __FILE__, __LINE__,
                              "%s: two models: %s and %s: leave one, or make a folder for each", dir,
                              less ? first : e->d_name, less ? e->d_name : first);
        }
        if (!*found || strcmp(e->d_name, first) < 0) snprintf(first, size, "%s", e->d_name);
        *found = true;
    }
    closedir(d);
    return st;
}

bool sh_gguf_is_there(const char *dir) {
    char first[300];
    bool found = false;
    return sh_gguf_first(dir, first, sizeof first, &found) != SH_OK || found;
}

static sh_status open_parts(sh_tensors *t, const char *dir, const char *first, size_t base, int parts) {
    uint64_t want = 0, have = 0;
    for (int i = 1; i <= parts; i++) {
        char name[300], path[4096];
        header h;
        snprintf(name, sizeof name, "%.*s-%05d-of-%05d.gguf", (int)base, first, i, parts);
        if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
            SH_FAIL(SH_ELIMIT, "%s: path too long", name);
        if (!sh_file_exists(path)) SH_FAIL(SH_EIO, "%s: missing: part %d of %d", path, i, parts);
        SH_TRY(open_file(t, dir, name, &h));
        if (h.split_count != (uint64_t)parts)
            SH_FAIL(SH_EFORMAT, "%s: split.count %llu: its name says %d", path, (unsigned long long)h.split_count,
                    parts);
        if (h.split_tensors) want = h.split_tensors;
        have += h.tensors;
    }
    if (want && want != have)
        SH_FAIL(SH_EFORMAT, "%s/%s: split.tensors.count %llu, but the parts have %llu", dir, first,
                (unsigned long long)want, (unsigned long long)have);
    return SH_OK;
}

sh_status sh_gguf_open(sh_tensors *t, const char *dir, bool *found) {
    char first[300];
    int part = 1, parts = 1;
    header h;
    SH_TRY(sh_gguf_first(dir, first, sizeof first, found));
    if (!*found) return SH_OK;
    size_t base = split_of(first, &part, &parts);
    if (base) return open_parts(t, dir, first, base, parts);
    SH_TRY(open_file(t, dir, first, &h));
    if (h.split_count > 1)
        SH_FAIL(SH_EFORMAT, "%s/%s: one of %llu parts: its name must end in -00001-of-%05llu.gguf", dir, first,
                (unsigned long long)h.split_count, (unsigned long long)h.split_count);
    return SH_OK;
}
