/*
 * Reading packed folders. See packed.h. The index is believed in nothing: names, shapes, ranges and lengths are checked
 * before anything is mapped, and pages are brought in by a call that reports what cannot be read.
 */
#include "model/packed.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "common/file.h"
#include "common/hash.h"
#include "common/json.h"
#include "common/limits.h"
#include "model/layout.h"
#include "model/packed_int.h"
#include "model/slots.h"

const char *sh_wtype_name(sh_wtype t) {
    return t == SH_W_Q8 ? "q8" : t == SH_W_Q4 ? "q4" : "bf16";
}

const char *sh_wtype_modes(sh_wtype t) {
    return t == SH_W_BF16 ? "bf16 or exact" : sh_wtype_name(t);
}

bool sh_packed_is(const char *dir) {
    char path[PATH_MAX];
    return snprintf(path, sizeof path, "%s/" SH_PACKED_INDEX, dir) < (int)sizeof path && sh_file_exists(path);
}

/* --- the index as a whole ------------------------------------------------------------------------------------------
 */

sh_status sh_packed_index_checksum(const json_t *index, uint64_t *out) {
    json_t *copy = json_copy((json_t *)(uintptr_t)index);
    if (copy) json_object_del(copy, "checksum");
    char *text = copy ? json_dumps(copy, JSON_COMPACT | JSON_SORT_KEYS) : NULL;
    json_decref(copy);
    if (!text) SH_FAIL(SH_EMEMORY, "no memory for the text of an index");
    *out = sh_hash64(0, text, strlen(text));
    free(text);
    return SH_OK;
}

/* 16 hexadecimal digits. */
static sh_status read_hash(const json_t *j, uint64_t *out) {
    const char *s = json_string_value(j);
    if (!s || strlen(s) != 16 || strspn(s, "0123456789abcdef") != 16)
        SH_FAIL(SH_EFORMAT, "%s: allowed are 16 hexadecimal digits", s ? s : sh_json_type_name(j));
    *out = strtoull(s, NULL, 16);
    return SH_OK;
}

static sh_status check_version(const json_t *index) {
    const char *format = "";
    int64_t version = 0;
    SH_TRY(sh_json_string(index, "format", &format));
    if (strcmp(format, SH_PACKED_FORMAT) != 0)
        SH_FAIL(SH_EFORMAT, "format: \"%.32s\": allowed is \"" SH_PACKED_FORMAT "\"", format);
    SH_TRY(sh_json_int(index, "version", 0, INT_MAX, &version));
    if (version != SH_PACKED_VERSION)
        SH_FAIL(SH_EUNSUPPORTED, "version: %lld: this program reads version %d: pack the checkpoint again",
                (long long)version, SH_PACKED_VERSION);
    return SH_OK;
}

static sh_status check_index(const json_t *index) {
    uint64_t stored = 0, actual = 0;
    if (!json_is_object(index)) SH_FAIL(SH_EFORMAT, "%s is not an object", sh_json_type_name(index));
    SH_TRY(check_version(index));
    sh_status st = read_hash(json_object_get(index, "checksum"), &stored);
    if (st != SH_OK) return sh_error_prefix(st, "checksum");
    SH_TRY(sh_packed_index_checksum(index, &actual));
    if (stored != actual)
        SH_FAIL(SH_EFORMAT, "checksum: says %016" PRIx64 ", but its text has %016" PRIx64 ": it is damaged: pack again",
                stored, actual);
    return SH_OK;
}

static sh_status index_path(const char *dir, char path[PATH_MAX]) {
    if (snprintf(path, PATH_MAX, "%s/" SH_PACKED_INDEX, dir) >= PATH_MAX)
        SH_FAIL(SH_ELIMIT, "%.64s…: path too long", dir);
    return SH_OK;
}

static sh_status read_index(const char *dir, json_t **out) {
    char path[PATH_MAX];
    SH_CLEANUP(sh_json_release) json_t *index = NULL;
    SH_TRY(index_path(dir, path));
    SH_TRY(sh_json_read(path, SH_MAX_ST_HEADER, &index));
    sh_status st = check_index(index);
    if (st != SH_OK) return sh_error_prefix(st, "%s", path);
    *out = index;
    index = NULL;
    return SH_OK;
}

static sh_status read_type(const json_t *index, sh_wtype *out) {
    const char *s = "";
    SH_TRY(sh_json_string(index, "type", &s));
    for (int t = 0; t < SH_W_TYPES; t++)
        if (strcmp(s, sh_wtype_name((sh_wtype)t)) == 0) {
            *out = (sh_wtype)t;
            return SH_OK;
        }
    SH_FAIL(SH_EFORMAT, "type: \"%.32s\": allowed are bf16, q8 and q4", s);
}

sh_status sh_packed_read_type(const char *dir, sh_wtype *out) {
    SH_CLEANUP(sh_json_release) json_t *index = NULL;
    SH_TRY(read_index(dir, &index));
    sh_status st = read_type(index, out);
    return st == SH_OK ? SH_OK : sh_error_prefix(st, "%s/" SH_PACKED_INDEX, dir);
}

sh_status sh_packed_check_type(const char *dir, sh_wtype packed, sh_wtype wanted, const char *mode) {
    if (packed == wanted) return SH_OK;
    SH_FAIL(SH_EINPUT, "--mode: %s, but %s is packed for %s: use that mode, or the checkpoint itself", mode, dir,
            sh_wtype_modes(packed));
}

/* --- files ---------------------------------------------------------------------------------------------------------
 */

static sh_status check_file_name(const char *name) {
    if (!name || !*name || strchr(name, '/') || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
        SH_FAIL(SH_EFORMAT, "file: \"%.64s\" is not a file name in the same folder", name ? name : "");
    return SH_OK;
}

static sh_status read_file_entry(const json_t *o, sh_packed_file *f) {
    const char *name = NULL;
    int64_t bytes = -1;
    if (!json_is_object(o)) SH_FAIL(SH_EFORMAT, "%s is not an object", sh_json_type_name(o));
    SH_TRY(sh_json_string(o, "file", &name));
    SH_TRY(check_file_name(name));
    SH_TRY(sh_json_int(o, "bytes", 0, INT64_MAX, &bytes));
    f->name = name;
    f->blocks = json_object_get(o, "checksums");
    f->bytes = (uint64_t)bytes;
    if (bytes < 0) SH_FAIL(SH_EFORMAT, "%s: bytes: missing", name);
    uint64_t need = f->bytes / SH_PACKED_BLOCK + (f->bytes % SH_PACKED_BLOCK != 0);
    if (!json_is_array(f->blocks) || json_array_size(f->blocks) != need)
        SH_FAIL(SH_EFORMAT, "%s: checksums: %zu: %" PRIu64 " bytes need %" PRIu64 ", one for each %zu", name,
                json_array_size(f->blocks), f->bytes, need, SH_PACKED_BLOCK);
    return SH_OK;
}

static sh_packed_file *find_file(const sh_packed *p, const char *name) {
    for (int i = 0; i < p->n_files; i++)
        if (strcmp(p->file[i].name, name) == 0) return &p->file[i];
    return NULL;
}

static sh_status read_files(sh_packed *p) {
    const json_t *list = json_object_get(p->index, "files");
    if (!json_is_array(list) || json_array_size(list) > 4 * SH_MAX_LAYERS)
        SH_FAIL(SH_EFORMAT, "files: missing, no array, or of more than %d", 4 * SH_MAX_LAYERS);
    p->file = calloc(json_array_size(list) + 1, sizeof *p->file);
    if (!p->file) SH_FAIL(SH_EMEMORY, "no memory for the table of files");
    for (size_t i = 0; i < json_array_size(list); i++) {
        sh_packed_file f = {0};
        sh_status st = read_file_entry(json_array_get(list, i), &f);
        if (st != SH_OK) return sh_error_prefix(st, "files[%zu]", i);
        if (find_file(p, f.name)) SH_FAIL(SH_EFORMAT, "files[%zu]: %s: is there twice", i, f.name);
        p->file[p->n_files++] = f;
        if (__builtin_add_overflow(p->bytes, f.bytes, &p->bytes)) SH_FAIL(SH_EFORMAT, "files: their sum overflows");
    }
    return SH_OK;
}

sh_status sh_packed_path(const sh_packed *p, const char *name, char path[PATH_MAX]) {
    if (snprintf(path, PATH_MAX, "%s/%s", p->dir, name) >= PATH_MAX) SH_FAIL(SH_ELIMIT, "%s: path too long", name);
    return SH_OK;
}

static sh_status check_length(const sh_packed *p, const sh_packed_file *f) {
    char path[PATH_MAX];
    struct stat sb;
    SH_TRY(sh_packed_path(p, f->name, path));
    if (stat(path, &sb) != 0)
        SH_FAIL(SH_EIO, "%s: %s: " SH_PACKED_INDEX " names it", path, errno == ENOENT ? "is missing" : strerror(errno));
    if (!S_ISREG(sb.st_mode)) SH_FAIL(SH_EIO, "%s: not a regular file", path);
    if ((uint64_t)sb.st_size != f->bytes)
        SH_FAIL(SH_EFORMAT, "%s: ends at offset %lld, but " SH_PACKED_INDEX " says %" PRIu64 " bytes%s", path,
                (long long)sb.st_size, f->bytes, (uint64_t)sb.st_size < f->bytes ? ": is it truncated?" : "");
    return SH_OK;
}

/* --- tensors -------------------------------------------------------------------------------------------------------
 */

/* Bytes of one matrix of a stack, or of a vector. */
size_t sh_packed_item_bytes(const sh_slot *s) {
    return s->count ? sh_wmat_bytes(s->type, s->n, s->k) : (size_t)s->k * sizeof(float);
}

int sh_packed_shape(const sh_slot *s, int64_t shape[3]) {
    int rank = 0;
    if (s->count > 1 || s->part == SH_SLOT_EXPERTS) shape[rank++] = s->count;
    if (s->count) shape[rank++] = s->n;
    shape[rank++] = s->k;
    return rank;
}

static sh_status check_shape(const json_t *o, const sh_slot *s) {
    int64_t want[3];
    int rank = sh_packed_shape(s, want);
    const json_t *a = json_object_get(o, "shape");
    bool same = json_is_array(a) && json_array_size(a) == (size_t)rank;
    for (int i = 0; same && i < rank; i++) same = json_integer_value(json_array_get(a, (size_t)i)) == want[i];
    if (same) return SH_OK;
    char *found = a ? json_dumps(a, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
    sh_status st =
        sh_error_set(SH_EFORMAT, __FILE__, __LINE__, "shape %.100s, but config.json implies [%lld%s%.0lld%s%.0lld]",
                     found ? found : "missing", (long long)want[0], rank > 1 ? ", " : "",
                     rank > 1 ? (long long)want[1] : 0LL, rank > 2 ? ", " : "", rank > 2 ? (long long)want[2] : 0LL);
    free(found);
    return st;
}

static sh_status check_type(const json_t *o, const sh_slot *s) {
    const char *type = "missing", *want = s->count ? sh_wtype_name(s->type) : "f32";
    SH_TRY(sh_json_string(o, "type", &type));
    if (strcmp(type, want) != 0) SH_FAIL(SH_EFORMAT, "type %.32s: %s is needed", type, want);
    return SH_OK;
}

/* Where a slot lies: *file and *offset, all of it inside the file. */
static sh_status locate_entry(const sh_packed *p, const json_t *o, const sh_slot *s, sh_packed_file **file,
                              uint64_t *offset) {
    const char *name = "";
    int64_t at = -1;
    if (!json_is_object(o)) SH_FAIL(SH_EFORMAT, "%s", o ? "is not an object" : "missing tensor");
    SH_TRY(check_type(o, s));
    SH_TRY(check_shape(o, s));
    SH_TRY(sh_json_string(o, "file", &name));
    SH_TRY(sh_json_int(o, "offset", 0, INT64_MAX, &at));
    sh_packed_file *f = find_file(p, name);
    if (!f) SH_FAIL(SH_EFORMAT, "file: \"%.64s\" is none of the files", name);
    uint64_t size, end;
    if (__builtin_mul_overflow((uint64_t)(s->count ? s->count : 1), (uint64_t)sh_packed_item_bytes(s), &size) ||
        at < 0 || __builtin_add_overflow((uint64_t)at, size, &end) || end > f->bytes)
        SH_FAIL(SH_EFORMAT, "%s: offset %lld: its %" PRIu64 " bytes do not lie in the file's %" PRIu64, name,
                (long long)at, size, f->bytes);
    if (at % SH_PACKED_ALIGN)
        SH_FAIL(SH_EFORMAT, "%s: offset %lld: allowed are multiples of %d", name, (long long)at, SH_PACKED_ALIGN);
    *file = f;
    *offset = (uint64_t)at;
    return SH_OK;
}

sh_status sh_packed_locate(const sh_packed *p, const sh_slot *s, sh_packed_file **file, uint64_t *offset) {
    const json_t *o = json_object_get(json_object_get(p->index, "tensors"), s->name);
    sh_status st = locate_entry(p, o, s, file, offset);
    return st == SH_OK ? SH_OK : sh_error_prefix(st, "%s/" SH_PACKED_INDEX ": %s", p->dir, s->name);
}

static sh_status check_slot(void *ctx, const sh_slot *s) {
    sh_packed *p = ctx;
    sh_packed_file *f;
    uint64_t offset;
    p->n_slots++;
    return sh_packed_locate(p, s, &f, &offset);
}

/* Every tensor of the whole model, whatever this rank needs of it. */
static sh_status check_tensors(sh_packed *p, const sh_config *c) {
    sh_config *whole = malloc(sizeof *whole);
    sh_weights w = {.config = whole, .type = p->type, .last = c->n_layers};
    w.layer = calloc((size_t)c->n_layers, sizeof *w.layer);
    sh_wmat *expert = calloc((size_t)c->n_layers * 2 * (size_t)c->experts + 1, sizeof *expert);
    sh_status st = SH_OK;
    if (!whole || !w.layer || !expert)
        st = sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "%s: no memory for the list of tensors", p->dir);
    if (st == SH_OK) {
        *whole = *c;
        whole->kv_end = 0;
        sh_weights_layout(&w, expert, NULL);
        st = sh_slots_each(&w, check_slot, p);
    }
    free(expert);
    free(w.layer);
    free(whole);
    SH_TRY(st);
    size_t found = json_object_size(json_object_get(p->index, "tensors"));
    if (found != (size_t)p->n_slots)
        SH_FAIL(SH_EFORMAT, "%s/" SH_PACKED_INDEX ": %zu tensors, but config.json implies %d", p->dir, found,
                p->n_slots);
    return SH_OK;
}

/* --- the object ----------------------------------------------------------------------------------------------------
 */

static sh_status read_source(sh_packed *p) {
    sh_status st = read_hash(json_object_get(json_object_get(p->index, "source"), "fingerprint"), &p->fingerprint);
    return st == SH_OK ? SH_OK : sh_error_prefix(st, "source.fingerprint");
}

static sh_status read_all(sh_packed *p) {
    SH_TRY(read_type(p->index, &p->type));
    SH_TRY(read_source(p));
    return read_files(p);
}

static sh_status open_folder(const char *dir, sh_packed *p) {
    p->dir = strdup(dir);
    if (!p->dir) SH_FAIL(SH_EMEMORY, "%s: no memory for its index", dir);
    SH_TRY(read_index(dir, &p->index));
    sh_status st = read_all(p);
    return st == SH_OK ? SH_OK : sh_error_prefix(st, "%s/" SH_PACKED_INDEX, dir);
}

static sh_status open_all(const char *dir, const sh_config *c, sh_packed *p) {
    SH_TRY(open_folder(dir, p));
    SH_TRY(check_tensors(p, c));
    if (!find_file(p, SH_PACKED_TABLES))
        SH_FAIL(SH_EFORMAT, "%s/" SH_PACKED_INDEX ": files: " SH_PACKED_TABLES " is missing", dir);
    /* what was copied beside the weights may be edited */
    for (int i = 0; i < p->n_files; i++)
        if (strncmp(p->file[i].name, "pack-", 5) == 0) SH_TRY(check_length(p, &p->file[i]));
    return SH_OK;
}

sh_status sh_packed_open(const char *dir, const sh_config *c, sh_packed **out) {
    sh_packed *p = calloc(1, sizeof *p);
    if (!p) SH_FAIL(SH_EMEMORY, "%s: no memory for its index", dir);
    sh_status st = open_all(dir, c, p);
    if (st != SH_OK) {
        sh_packed_close(&p);
        return st;
    }
    *out = p;
    return SH_OK;
}

void sh_packed_close(sh_packed **pp) {
    sh_packed *p = *pp;
    if (!p) return;
    for (int i = 0; i < p->n_files; i++) sh_map_close(&p->file[i].map);
    sh_mem_free(p->copies, p->copied);
    json_decref(p->index);
    free(p->file);
    free(p->dir);
    free(p);
    *pp = NULL;
}

sh_wtype sh_packed_type(const sh_packed *p) {
    return p->type;
}

uint64_t sh_packed_bytes(const sh_packed *p) {
    return p->bytes;
}

int sh_packed_files(const sh_packed *p) {
    return p->n_files;
}

int sh_packed_tensors(const sh_packed *p) {
    return p->n_slots;
}

uint64_t sh_packed_fingerprint(const sh_packed *p) {
    return p->fingerprint;
}

sh_status sh_packed_tables(const sh_packed *p, sh_tensors **out) {
    return sh_tensors_open_file(p->dir, SH_PACKED_TABLES, out);
}

/* --- what a store compares -----------------------------------------------------------------------------------------
 */

sh_status sh_weight_files_hash(const char *dir, uint64_t *out) {
    if (!sh_packed_is(dir)) return sh_tensors_files_hash(dir, out);
    SH_CLEANUP(sh_json_release) json_t *index = NULL;
    SH_TRY(read_index(dir, &index));
    sh_status st = read_hash(json_object_get(json_object_get(index, "source"), "files"), out);
    return st == SH_OK ? SH_OK : sh_error_prefix(st, "%s/" SH_PACKED_INDEX ": source.files", dir);
}

sh_status sh_weights_fingerprint(const char *dir, uint64_t *out) {
    if (!sh_packed_is(dir)) {
        SH_CLEANUP(sh_tensors_close) sh_tensors *t = NULL;
        SH_TRY(sh_tensors_open(dir, &t));
        *out = sh_tensors_fingerprint(t);
        return SH_OK;
    }
    SH_CLEANUP(sh_json_release) json_t *index = NULL;
    SH_TRY(read_index(dir, &index));
    sh_packed p = {.index = index};
    SH_TRY(read_source(&p));
    *out = p.fingerprint;
    return SH_OK;
}

/* --- every byte ----------------------------------------------------------------------------------------------------
 */

typedef struct check {
    const sh_packed_file *f;
    _Atomic uint64_t bad; /* lowest block that differs; UINT64_MAX: none */
} check;

static void check_blocks(void *arg, int member, int size) {
    check *x = arg;
    int lo, hi;
    sh_team_share((int)json_array_size(x->f->blocks), member, size, &lo, &hi);
    for (int i = lo; i < hi; i++) {
        size_t at = (size_t)i * SH_PACKED_BLOCK, left = x->f->map.len - at;
        uint64_t want = 0,
                 got = sh_hash64_long(0, x->f->map.data + at, left < SH_PACKED_BLOCK ? left : SH_PACKED_BLOCK);
        bool same = read_hash(json_array_get(x->f->blocks, (size_t)i), &want) == SH_OK && want == got;
        uint64_t seen = atomic_load(&x->bad);
        while (!same && (uint64_t)i < seen && !atomic_compare_exchange_weak(&x->bad, &seen, (uint64_t)i)) {
        }
    }
}

static sh_status verify_file(sh_packed *p, sh_packed_file *f, sh_team *team) {
    char path[PATH_MAX];
    SH_TRY(check_length(p, f));
    SH_TRY(sh_packed_path(p, f->name, path));
    SH_TRY(sh_map_open(path, &f->map));
    if (f->map.len != f->bytes) SH_FAIL(SH_EFORMAT, "%s: its length changes while it is read", path);
    SH_TRY(sh_packed_bring(path, f->map.data, f->map.len, f->map.data));
    check x = {.f = f, .bad = UINT64_MAX};
    if (team)
        sh_team_run(team, check_blocks, &x);
    else
        check_blocks(&x, 0, 1);
    sh_map_close(&f->map);
    if (x.bad == UINT64_MAX) return SH_OK;
    uint64_t from = x.bad * SH_PACKED_BLOCK, to = from + SH_PACKED_BLOCK < f->bytes ? from + SH_PACKED_BLOCK : f->bytes;
    SH_FAIL(SH_EFORMAT, "%s: bytes %" PRIu64 " to %" PRIu64 " are not as they were written: pack the checkpoint again",
            path, from, to - 1);
}

static sh_status verify_all(sh_packed *p, sh_team *team, void (*progress)(void *, size_t, size_t), void *arg) {
    size_t done = 0;
    for (int i = 0; i < p->n_files; i++) {
        SH_TRY(verify_file(p, &p->file[i], team));
        done += p->file[i].bytes;
        if (progress) progress(arg, done, p->bytes);
    }
    return SH_OK;
}

sh_status sh_packed_verify(const char *dir, sh_team *team, void (*progress)(void *, size_t, size_t), void *arg) {
    sh_packed *p = calloc(1, sizeof *p);
    if (!p) SH_FAIL(SH_EMEMORY, "%s: no memory for its index", dir);
    sh_status st = open_folder(dir, p);
    if (st == SH_OK) st = verify_all(p, team, progress, arg);
    sh_packed_close(&p);
    return st;
}
