/*
 * safetensors files: headers read and checked, bytes mapped. See safetensors.h. Knows the format and nothing of Gemma.
 * The format: 8 bytes little-endian header length, a JSON object name → {dtype, shape, data_offsets}, then the bytes;
 * the tensors cover them without holes or overlap.
 */
#include "model/safetensors.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/file.h"
#include "common/hash.h"
#include "common/json.h"
#include "common/limits.h"
#include "model/gguf.h"
#include "model/tensors_int.h"

/* --- one header entry ----------------------------------------------------------------------------------------------
 */

static const struct {
    const char *name;
    int bits;
} dtypes[] = {{"BF16", 16},   {"F16", 16},    {"F32", 32},    {"F64", 64},    {"I64", 64}, {"I32", 32}, {"I16", 16},
              {"I8", 8},      {"U64", 64},    {"U32", 32},    {"U16", 16},    {"U8", 8},   {"BOOL", 8}, {"F8_E4M3", 8},
              {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4},   {"C64", 64}};

/* Blocks under the names that GGUF has for them: in files of ours alone. */
static bool read_blocks(const char *s, sh_tensor *t) {
    static const struct {
        const char *name;
        sh_dtype dtype;
    } known[] = {{"Q8_0", SH_Q8_0}, {"Q4_0", SH_Q4_0}, {"Q6_K", SH_Q6_K}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (strcmp(s, known[i].name) != 0) continue;
        snprintf(t->dtype_name, sizeof t->dtype_name, "%s", s);
        t->dtype = known[i].dtype;
        return true;
    }
    return false;
}

static sh_status read_dtype(const json_t *o, bool blocks, sh_tensor *t, int *bits) {
    const char *s = json_string_value(json_object_get(o, "dtype"));
    if (!s) SH_FAIL(SH_EFORMAT, "dtype: missing or not a string");
    if (blocks && read_blocks(s, t)) return SH_OK;
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        if (strcmp(s, dtypes[i].name) != 0) continue;
        snprintf(t->dtype_name, sizeof t->dtype_name, "%s", s);
        t->dtype = i == 0 ? SH_BF16 : i == 1 ? SH_F16 : i == 2 ? SH_F32 : SH_OTHER;
        *bits = dtypes[i].bits;
        return SH_OK;
    }
    SH_FAIL(SH_EFORMAT, "dtype: \"%.32s\" is not known", s);
}

static sh_status read_shape(const json_t *o, sh_tensor *t, uint64_t *elements) {
    const json_t *a = json_object_get(o, "shape");
    if (!json_is_array(a)) SH_FAIL(SH_EFORMAT, "shape: missing or not an array");
    size_t n = json_array_size(a);
    if (n > 8) SH_FAIL(SH_EFORMAT, "shape: %zu dimensions: at most 8", n);
    uint64_t product = 1;
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(a, i);
        if (!json_is_integer(v) || json_integer_value(v) < 0)
            SH_FAIL(SH_EFORMAT, "shape: dimension %zu is not a size", i);
        t->shape[i] = json_integer_value(v);
        if (__builtin_mul_overflow(product, (uint64_t)t->shape[i], &product))
            SH_FAIL(SH_EFORMAT, "shape: the product overflows");
    }
    t->rank = (int)n;
    *elements = product;
    return SH_OK;
}

static sh_status read_offsets(const json_t *o, uint64_t room, uint64_t off[2]) {
    const json_t *a = json_object_get(o, "data_offsets");
    if (!json_is_array(a) || json_array_size(a) != 2) SH_FAIL(SH_EFORMAT, "data_offsets: missing or not two numbers");
    for (size_t i = 0; i < 2; i++) {
        const json_t *v = json_array_get(a, i);
        if (!json_is_integer(v) || json_integer_value(v) < 0) SH_FAIL(SH_EFORMAT, "data_offsets: not two offsets");
        off[i] = (uint64_t)json_integer_value(v);
    }
    if (off[0] > off[1])
        SH_FAIL(SH_EFORMAT, "data_offsets: begin %llu is after end %llu", (unsigned long long)off[0],
                (unsigned long long)off[1]);
    if (off[1] > room)
        SH_FAIL(SH_EFORMAT,
                "data_offsets: end %llu lies beyond the file, which has %llu bytes of data: is it truncated?",
                (unsigned long long)off[1], (unsigned long long)room);
    return SH_OK;
}

static sh_status size_in_bits(const sh_tensor *t, uint64_t elements, int bits, uint64_t *size) {
    bool blocks = sh_dtype_is_blocks(t->dtype); /* of 4.5 to 8.5 bits an item: no overflow where 16 give none */
    int64_t row = t->rank > 0 ? t->shape[t->rank - 1] : 1;
    if (row % sh_dtype_block(t->dtype))
        SH_FAIL(SH_EFORMAT, "rows of %lld items: %s takes multiples of %d", (long long)row, t->dtype_name,
                sh_dtype_block(t->dtype));
    if (__builtin_mul_overflow(elements, (uint64_t)(blocks ? 16 : bits), size))
        SH_FAIL(SH_EFORMAT, "shape: the size in bytes overflows");
    if (blocks) *size = 8 * sh_dtype_bytes(t->dtype, elements);
    return SH_OK;
}

static sh_status read_entry(const json_t *o, bool blocks, const uint8_t *data, uint64_t room, sh_tensors_entry *e) {
    if (!json_is_object(o)) SH_FAIL(SH_EFORMAT, "%s is not an object", sh_json_type_name(o));
    int bits = 0;
    uint64_t elements = 0, off[2], size = 0;
    SH_TRY(read_dtype(o, blocks, &e->t, &bits));
    SH_TRY(read_shape(o, &e->t, &elements));
    SH_TRY(read_offsets(o, room, off));
    SH_TRY(size_in_bits(&e->t, elements, bits, &size));
    if (size % 8 || size / 8 != off[1] - off[0])
        SH_FAIL(SH_EFORMAT, "data_offsets: %llu bytes, but its shape needs %llu of %s",
                (unsigned long long)(off[1] - off[0]), (unsigned long long)((size + 7) / 8), e->t.dtype_name);
    e->begin = off[0];
    e->t.bytes = off[1] - off[0];
    e->t.data = data + off[0];
    return SH_OK;
}

/* --- one file ------------------------------------------------------------------------------------------------------
 */

static int by_offset(const void *a, const void *b) {
    const sh_tensors_entry *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    if (x->t.bytes != y->t.bytes) return x->t.bytes < y->t.bytes ? -1 : 1;
    return strcmp(x->t.name, y->t.name);
}

void sh_tensors_by_offset(sh_tensors_entry *e, int n) {
    if (n > 0) qsort(e, (size_t)n, sizeof *e, by_offset);
}

/* Entries of one file, in order of offset, must follow each other and fill the data. */
static sh_status check_cover(const char *path, sh_tensors_entry *e, int n, uint64_t room) {
    sh_tensors_by_offset(e, n);
    uint64_t at = 0;
    for (int i = 0; i < n; i++) {
        if (e[i].begin < at)
            SH_FAIL(SH_EFORMAT, "%s: %s: overlaps %s at offset %llu", path, e[i].t.name, e[i - 1].t.name,
                    (unsigned long long)e[i].begin);
        if (e[i].begin > at)
            SH_FAIL(SH_EFORMAT,
                    "%s: %s: begins at offset %llu, but the data before it ends at %llu: holes are not allowed", path,
                    e[i].t.name, (unsigned long long)e[i].begin, (unsigned long long)at);
        at = e[i].begin + e[i].t.bytes;
    }
    if (at != room)
        SH_FAIL(SH_EFORMAT, "%s: %llu bytes of data, but its tensors end at %llu", path, (unsigned long long)room,
                (unsigned long long)at);
    return SH_OK;
}

sh_status sh_tensors_add_entry(sh_tensors *t, const sh_tensors_entry *e, const char *name) {
    const char *path = t->file[e->file].path;
    if (t->n_entries == t->cap) {
        int cap = t->cap ? 2 * t->cap : 256;
        sh_tensors_entry *p = realloc(t->entry, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "%s: no memory for the tensor table", path);
        t->entry = p;
        t->cap = cap;
    }
    char *copy = strdup(name);
    if (!copy) SH_FAIL(SH_EMEMORY, "%s: no memory for tensor names", path);
    t->entry[t->n_entries] = *e;
    t->entry[t->n_entries++].t.name = copy;
    return SH_OK;
}

static sh_status add_entries(sh_tensors *t, int file, const json_t *header, const uint8_t *data, uint64_t room) {
    sh_tensors_file *f = &t->file[file];
    int first = t->n_entries;
    const char *name;
    json_t *o;
    json_object_foreach((json_t *)(uintptr_t)header, name, o) {
        if (strcmp(name, "__metadata__") == 0) continue;
        sh_tensors_entry e = {.file = file, .t.file = f->name};
        sh_status st = read_entry(o, t->blocks, data, room, &e);
        if (st != SH_OK) return sh_error_prefix(st, "%s: %s", f->path, name);
        SH_TRY(sh_tensors_add_entry(t, &e, name));
    }
    return check_cover(f->path, t->entry + first, t->n_entries - first, room);
}

static sh_status read_header(sh_tensors *t, int file) {
    const sh_tensors_file *f = &t->file[file];
    if (f->map.len < 8)
        SH_FAIL(SH_EFORMAT, "%s: %zu bytes: not a safetensors file, which begins with an 8-byte length", f->path,
                f->map.len);
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | f->map.data[i];
    if (n > SH_MAX_ST_HEADER)
        SH_FAIL(SH_EFORMAT, "%s: header length %llu: at most %zu: not a safetensors file?", f->path,
                (unsigned long long)n, SH_MAX_ST_HEADER);
    if (n > f->map.len - 8)
        SH_FAIL(SH_EFORMAT, "%s: header length %llu, but the file has only %zu bytes: is it truncated?", f->path,
                (unsigned long long)n, f->map.len);
    char what[4200];
    snprintf(what, sizeof what, "%s: header", f->path);
    SH_CLEANUP(sh_json_release) json_t *header = NULL;
    SH_TRY(sh_json_parse(what, (const char *)f->map.data + 8, (size_t)n, &header));
    if (!json_is_object(header))
        SH_FAIL(SH_EFORMAT, "%s: header: %s is not an object", f->path, sh_json_type_name(header));
    return add_entries(t, file, header, f->map.data + 8 + n, f->map.len - 8 - n);
}

sh_status sh_tensors_add_file(sh_tensors *t, const char *dir, const char *name) {
    sh_tensors_file *p = realloc(t->file, (size_t)(t->n_files + 1) * sizeof *p);
    if (!p) SH_FAIL(SH_EMEMORY, "%s: no memory for the file table", dir);
    t->file = p;
    sh_tensors_file f = {0};
    if (asprintf(&f.path, "%s/%s", dir, name) < 0) SH_FAIL(SH_EMEMORY, "%s: no memory for a path", dir);
    f.name = f.path + strlen(dir) + 1;
    t->file[t->n_files++] = f;
    return sh_map_open(f.path, &t->file[t->n_files - 1].map);
}

static sh_status open_file(sh_tensors *t, const char *dir, const char *name) {
    SH_TRY(sh_tensors_add_file(t, dir, name));
    return read_header(t, t->n_files - 1);
}

/* --- the directory -------------------------------------------------------------------------------------------------
 */

static int by_name(const void *a, const void *b) {
    const sh_tensors_entry *x = a, *y = b;
    int c = strcmp(x->t.name, y->t.name);
    return c ? c : (x->file > y->file) - (x->file < y->file);
}

static sh_status sort_by_name(sh_tensors *t) {
    if (t->n_entries) qsort(t->entry, (size_t)t->n_entries, sizeof *t->entry, by_name);
    for (int i = 1; i < t->n_entries; i++)
        if (strcmp(t->entry[i - 1].t.name, t->entry[i].t.name) == 0)
            SH_FAIL(SH_EFORMAT, "%s: %s: is in %s too", t->file[t->entry[i].file].path, t->entry[i].t.name,
                    t->file[t->entry[i - 1].file].path);
    return SH_OK;
}

static int find_file(const sh_tensors *t, const char *name) {
    for (int i = 0; i < t->n_files; i++)
        if (strcmp(t->file[i].name, name) == 0) return i;
    return -1;
}

/* Opens the shards that the index names: each once. */
static sh_status open_shards(sh_tensors *t, const char *dir, const char *index, const json_t *map) {
    const char *name;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)map, name, v) {
        const char *shard = json_string_value(v);
        if (!shard) SH_FAIL(SH_EFORMAT, "%s: %s: %s is not a file name", index, name, sh_json_type_name(v));
        if (!*shard || strchr(shard, '/') || strcmp(shard, "..") == 0)
            SH_FAIL(SH_EFORMAT, "%s: %s: \"%s\" is not a file name in the same directory", index, name, shard);
        if (find_file(t, shard) >= 0) continue;
        char path[4096];
        if (snprintf(path, sizeof path, "%s/%s", dir, shard) >= (int)sizeof path)
            SH_FAIL(SH_ELIMIT, "%s: path too long", shard);
        if (!sh_file_exists(path)) SH_FAIL(SH_EIO, "%s: missing: %s names it for %s", path, index, name);
        SH_TRY(open_file(t, dir, shard));
    }
    return SH_OK;
}

static sh_status check_index(const sh_tensors *t, const char *index, const json_t *map) {
    const char *name;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)map, name, v) {
        const sh_tensor *x = sh_tensors_find(t, name);
        if (!x) SH_FAIL(SH_EFORMAT, "%s: %s: not in %s, where the index puts it", index, name, json_string_value(v));
        if (strcmp(x->file, json_string_value(v)) != 0)
            SH_FAIL(SH_EFORMAT, "%s: %s: is in %s, but the index says %s", index, name, x->file, json_string_value(v));
    }
    for (int i = 0; i < t->n_entries; i++)
        if (!json_object_get(map, t->entry[i].t.name))
            SH_FAIL(SH_EFORMAT, "%s: %s: is in %s, but not in the index", index, t->entry[i].t.name,
                    t->entry[i].t.file);
    return SH_OK;
}

static sh_status open_index(sh_tensors *t, const char *dir, const char *index) {
    SH_CLEANUP(sh_json_release) json_t *root = NULL;
    SH_TRY(sh_json_read(index, SH_MAX_ST_HEADER, &root));
    const json_t *map = json_object_get(root, "weight_map");
    if (!json_is_object(map) || json_object_size(map) == 0)
        SH_FAIL(SH_EFORMAT, "%s: weight_map: missing or empty", index);
    SH_TRY(open_shards(t, dir, index, map));
    SH_TRY(sort_by_name(t));
    return check_index(t, index, map);
}

static sh_status open_all(sh_tensors *t, const char *dir) {
    char path[4096];
    if (snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir) >= (int)sizeof path)
        SH_FAIL(SH_ELIMIT, "%.64s…: path too long", dir);
    char *suffix = strstr(path + strlen(dir), ".index.json");
    *suffix = 0;
    if (sh_file_exists(path)) {
        SH_TRY(open_file(t, dir, "model.safetensors"));
        return sort_by_name(t);
    }
    *suffix = '.';
    if (sh_file_exists(path)) return open_index(t, dir, path);
    bool found = false;
    SH_TRY(sh_gguf_open(t, dir, &found));
    if (found) return sort_by_name(t);
    SH_FAIL(SH_EINPUT,
            "%s: no weights: neither model.safetensors nor model.safetensors.index.json nor a .gguf file is there",
            dir);
}

/* name NULL: the whole folder. */
static sh_status open_set(const char *dir, const char *name, sh_tensors **out) {
    sh_tensors *t = calloc(1, sizeof *t);
    if (!t) SH_FAIL(SH_EMEMORY, "%s: no memory for the tensor table", dir);
    t->blocks = name != NULL;
    sh_status st = name ? open_file(t, dir, name) : open_all(t, dir);
    if (st == SH_OK && name) st = sort_by_name(t);
    if (st != SH_OK) {
        sh_tensors_close(&t);
        return st;
    }
    *out = t;
    return SH_OK;
}

sh_status sh_tensors_open(const char *model_dir, sh_tensors **out) {
    return open_set(model_dir, NULL, out);
}

sh_status sh_tensors_open_file(const char *dir, const char *name, sh_tensors **out) {
    return open_set(dir, name, out);
}

void sh_tensors_close(sh_tensors **tp) {
    sh_tensors *t = *tp;
    if (!t) return;
    for (int i = 0; i < t->n_entries; i++) free((char *)(uintptr_t)t->entry[i].t.name);
    for (int i = 0; i < t->n_files; i++) {
        sh_map_close(&t->file[i].map);
        free(t->file[i].path);
    }
    free(t->entry);
    free(t->file);
    free(t);
    *tp = NULL;
}

int sh_tensors_count(const sh_tensors *t) {
    return t->n_entries;
}

int sh_tensors_files(const sh_tensors *t) {
    return t->n_files;
}

uint64_t sh_tensors_bytes(const sh_tensors *t) {
    uint64_t n = 0;
    for (int i = 0; i < t->n_entries; i++) n += t->entry[i].t.bytes;
    return n;
}

const sh_tensor *sh_tensors_at(const sh_tensors *t, int i) {
    return &t->entry[i].t;
}

const sh_tensor *sh_tensors_find(const sh_tensors *t, const char *name) {
    int lo = 0, hi = t->n_entries;
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2, c = strcmp(t->entry[mid].t.name, name);
        if (c == 0) return &t->entry[mid].t;
        if (c < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return NULL;
}

void sh_tensors_need(sh_tensors *t, const sh_tensor *tensor) {
    const sh_tensors_entry *e = (const sh_tensors_entry *)tensor;
    t->file[e->file].needed = true;
}

void sh_tensors_trim(sh_tensors *t) {
    for (int i = 0; i < t->n_entries; i++)
        if (!t->file[t->entry[i].file].needed) t->entry[i].t.data = NULL;
    for (int i = 0; i < t->n_files; i++)
        if (!t->file[i].needed) sh_map_close(&t->file[i].map);
}

#define SAMPLE 64

static const uint8_t *sample_of(const sh_tensor *x, size_t *n) {
    *n = x->bytes < SAMPLE ? (size_t)x->bytes : SAMPLE;
    return x->data + (x->bytes - *n) / 2;
}

/* All pages at once: one after the other they cost a disk's whole way each, seconds for a large checkpoint. */
static void fetch_samples(const sh_tensors *t) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < t->n_entries; i++) {
        size_t n;
        if (!t->entry[i].t.data) continue;
        uintptr_t a = (uintptr_t)sample_of(&t->entry[i].t, &n), from = a / page * page;
        if (n) (void)madvise((void *)from, a + n - from, MADV_WILLNEED); /* a hint */
    }
}

uint64_t sh_tensors_fingerprint(const sh_tensors *t) {
    uint64_t h = 0;
    fetch_samples(t);
    for (int i = 0; i < t->n_entries; i++) {
        const sh_tensor *x = &t->entry[i].t;
        h = sh_hash64(h, x->name, strlen(x->name) + 1);
        h = sh_hash64(h, x->dtype_name, strlen(x->dtype_name) + 1);
        h = sh_hash64(h, x->shape, (size_t)x->rank * sizeof x->shape[0]);
        if (!x->data) continue; /* its file was let go: callers hash before they trim */
        size_t n;
        const uint8_t *p = sample_of(x, &n);
        h = sh_hash64(h, p, n); /* one page of each tensor: fine-tunes differ in all of them */
    }
    return h;
}

sh_status sh_tensors_files_hash(const char *dir, uint64_t *out) {
    uint64_t files = 0, ggufs = 0;
    DIR *d = opendir(dir);
    if (!d) SH_FAIL(SH_EIO, "%s: cannot be read: %s", dir, strerror(errno));
    for (struct dirent *e; (e = readdir(d));) { /* the order of a folder's entries does not matter */
        char path[PATH_MAX];
        struct stat sb;
        size_t n = strlen(e->d_name);
        bool is_safe = n >= 12 && strcmp(e->d_name + n - 12, ".safetensors") == 0;
        if (!is_safe && !sh_gguf_is_name(e->d_name)) continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        if (stat(path, &sb) != 0) continue;
        *(is_safe ? &files : &ggufs) += sh_hash64((uint64_t)sb.st_size, e->d_name, n);
    }
    closedir(d);
    *out = files ? files : ggufs; /* GGUF files are read where there are no others */
    return SH_OK;
}
