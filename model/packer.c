/*
 * Writing packed folders. See packed.h. One file after another, one piece of a matrix at a time: the checkpoint's side
 * is weights.c's (sh_supply), the list of what there is slots.c's. Every file is hashed on its way in blocks.
 */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/hash.h"
#include "common/limits.h"
#include "model/beside.h"
#include "model/packed_int.h"

typedef struct packer {
    const char *model, *dir;
    char tmp[PATH_MAX];
    const sh_pack_options *o;
    sh_supply *supply;
    json_t *files, *tensors;
    size_t done, total;
    /* the file at hand */
    sh_file_writer *writer;
    char name[NAME_MAX + 1];
    json_t *sums;
    uint8_t *block; /* [SH_PACKED_BLOCK] */
    size_t fill;
    uint64_t bytes; /* block included */
    int layer;      /* of the slots in it */
} packer;

static sh_status no_memory(const packer *x) {
    SH_FAIL(SH_EMEMORY, "%s: no memory for its index", x->dir);
}

/* --- one file ------------------------------------------------------------------------------------------------------
 */

static sh_status open_file(packer *x, const char *name) {
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/%s", x->tmp, name) >= (int)sizeof path)
        SH_FAIL(SH_ELIMIT, "%s: path too long", name);
    snprintf(x->name, sizeof x->name, "%s", name);
    x->fill = 0;
    x->bytes = 0;
    x->sums = json_array();
    if (!x->sums) return no_memory(x);
    return sh_file_writer_open(path, &x->writer);
}

static sh_status flush(packer *x) {
    char text[20];
    if (x->fill == 0) return SH_OK;
    snprintf(text, sizeof text, "%016" PRIx64, sh_hash64_long(0, x->block, x->fill));
    if (json_array_append_new(x->sums, json_string(text)) != 0) return no_memory(x);
    SH_TRY(sh_file_writer_add(x->writer, x->block, x->fill));
    x->done += x->fill;
    x->fill = 0;
    if (x->o->progress && !x->o->progress(x->o->arg, x->done < x->total ? x->done : x->total, x->total))
        SH_FAIL(SH_ECANCELLED, "%s: given up", x->dir);
    return SH_OK;
}

static sh_status add(void *ctx, const void *p, size_t n) {
    packer *x = ctx;
    const uint8_t *c = p;
    while (n > 0) {
        size_t room = SH_PACKED_BLOCK - x->fill, part = n < room ? n : room;
        memcpy(x->block + x->fill, c, part);
        x->fill += part;
        x->bytes += part;
        c += part;
        n -= part;
        if (x->fill == SH_PACKED_BLOCK) SH_TRY(flush(x));
    }
    return SH_OK;
}

static sh_status pad(packer *x) {
    static const uint8_t zero[SH_PACKED_ALIGN];
    return add(x, zero, (size_t)(-x->bytes % SH_PACKED_ALIGN));
}

static sh_status close_file(packer *x) {
    SH_TRY(flush(x));
    SH_TRY(sh_file_writer_commit(&x->writer));
    json_t *o = json_pack("{s:s, s:I, s:o}", "file", x->name, "bytes", (json_int_t)x->bytes, "checksums", x->sums);
    x->sums = NULL;
    if (!o || json_array_append_new(x->files, o) != 0) return no_memory(x);
    return SH_OK;
}

/* --- vectors and matrices ------------------------------------------------------------------------------------------
 */

static sh_status turn_to_layer(packer *x, int layer) {
    char name[40] = "pack-head.bin";
    if (x->writer && x->layer == layer) return SH_OK;
    if (x->writer) SH_TRY(close_file(x));
    x->layer = layer;
    if (layer >= 0) snprintf(name, sizeof name, "pack-layer-%03d.bin", layer);
    return open_file(x, name);
}

static sh_status note_tensor(packer *x, const sh_slot *s) {
    int64_t shape[3];
    json_t *a = json_array();
    for (int i = 0, n = sh_packed_shape(s, shape); i < n; i++)
        if (json_array_append_new(a, json_integer(shape[i])) != 0) {
            json_decref(a);
            return no_memory(x);
        }
    json_t *o = json_pack("{s:s, s:I, s:s, s:o}", "file", x->name, "offset", (json_int_t)x->bytes, "type",
                          s->count ? sh_wtype_name(s->type) : "f32", "shape", a);
    if (!o || json_object_set_new(x->tensors, s->name, o) != 0) return no_memory(x);
    return SH_OK;
}

static sh_status write_slot(void *ctx, const sh_slot *s) {
    packer *x = ctx;
    SH_TRY(turn_to_layer(x, s->layer));
    SH_TRY(pad(x));
    SH_TRY(note_tensor(x, s));
    if (s->scalar) return add(x, s->scalar, sizeof *s->scalar);
    if (s->vector) return sh_supply_give(x->supply, *s->vector, add, x);
    for (int e = 0; e < s->count; e++) SH_TRY(sh_supply_give(x->supply, &s->mat[e], add, x));
    return SH_OK;
}

static sh_status write_slots(packer *x) {
    SH_TRY(sh_slots_each(sh_supply_weights(x->supply), write_slot, x));
    SH_TRY(pad(x));
    return close_file(x);
}

/* --- tables and towers ---------------------------------------------------------------------------------------------
 */

static bool is_kept(const packer *x, const sh_tensor *t) {
    return t == sh_supply_embed(x->supply) || t == sh_supply_ple(x->supply) || sh_weights_is_tower(t->name);
}

static json_t *tables_header(const packer *x) {
    const sh_tensors *all = sh_supply_tensors(x->supply);
    json_t *header = json_object();
    json_int_t at = 0;
    for (int i = 0; header && i < sh_tensors_count(all); i++) {
        const sh_tensor *t = sh_tensors_at(all, i);
        if (!is_kept(x, t)) continue;
        json_t *shape = json_array();
        for (int d = 0; d < t->rank; d++) json_array_append_new(shape, json_integer(t->shape[d]));
        json_t *o = json_pack("{s:s, s:o, s:[I, I]}", "dtype", t->dtype_name, "shape", shape, "data_offsets", at,
                              at + (json_int_t)t->bytes);
        at += (json_int_t)t->bytes;
        if (!o || json_object_set_new(header, t->name, o) != 0) {
            json_decref(header);
            return NULL;
        }
    }
    return header;
}

/* As in every safetensors file: length, names and places, bytes. The bytes begin at a multiple of 64. */
static sh_status write_header(packer *x) {
    json_t *header = tables_header(x);
    char *text = header ? json_dumps(header, JSON_COMPACT) : NULL;
    json_decref(header);
    if (!text) return no_memory(x);
    uint64_t n = strlen(text), spaces = -(n + 8) % SH_PACKED_ALIGN, length = n + spaces;
    char blank[SH_PACKED_ALIGN];
    memset(blank, ' ', sizeof blank);
    sh_status st = length > SH_MAX_ST_HEADER ? no_memory(x) : add(x, &length, sizeof length);
    if (st == SH_OK) st = add(x, text, n);
    if (st == SH_OK) st = add(x, blank, spaces);
    free(text);
    return st;
}

static sh_status write_tables(packer *x) {
    const sh_tensors *all = sh_supply_tensors(x->supply);
    SH_TRY(open_file(x, SH_PACKED_TABLES));
    SH_TRY(write_header(x));
    for (int i = 0; i < sh_tensors_count(all); i++) {
        const sh_tensor *t = sh_tensors_at(all, i);
        if (is_kept(x, t)) SH_TRY(add(x, t->data, (size_t)t->bytes));
    }
    return close_file(x);
}

/* --- what lies beside the weights ----------------------------------------------------------------------------------
 */

static bool ends(const char *s, const char *with) {
    size_t n = strlen(s), m = strlen(with);
    return n >= m && strcmp(s + n - m, with) == 0;
}

/* Configuration, tokenizer, templates, licence and card; no weights in any format and no results of runs. */
static bool is_copied(const char *name) {
    static const char *const kinds[] = {".json", ".jinja", ".model", ".txt", ".md", "LICENSE"};
    if (name[0] == '.' || ends(name, ".index.json") || strcmp(name, SH_PACKED_INDEX) == 0) return false;
    if (strncmp(name, "pack-", 5) == 0) return false;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (ends(name, kinds[i])) return true;
    return false;
}

static sh_status copy_one(packer *x, const char *name) {
    char path[PATH_MAX];
    struct stat sb;
    sh_map m = {0};
    if (snprintf(path, sizeof path, "%s/%s", x->model, name) >= (int)sizeof path)
        SH_FAIL(SH_ELIMIT, "%s: path too long", name);
    if (stat(path, &sb) != 0 || !S_ISREG(sb.st_mode)) return SH_OK;
    SH_TRY(sh_map_open(path, &m));
    sh_status st = open_file(x, name);
    if (st == SH_OK) st = add(x, m.data, m.len);
    if (st == SH_OK) st = close_file(x);
    sh_map_close(&m);
    return st;
}

/* What the metadata of GGUF stand in for becomes files: the packed folder has no metadata. */
static sh_status write_metadata(packer *x, const char *name) {
    SH_CLEANUP(sh_beside_release) sh_beside b = {0};
    if (!sh_beside_is_metadata(x->model, name)) return SH_OK;
    SH_TRY(sh_beside_read(x->model, name, SH_MAX_TOKENIZER_BYTES, &b));
    if (!b.text) return SH_OK;
    SH_TRY(open_file(x, name));
    SH_TRY(add(x, b.text, b.len));
    return close_file(x);
}

static int is_entry_copied(const struct dirent *e) {
    return is_copied(e->d_name);
}

static sh_status copy_beside(packer *x) {
    struct dirent **entry = NULL;
    int n = scandir(x->model, &entry, is_entry_copied, alphasort);
    if (n < 0) SH_FAIL(SH_EIO, "%s: cannot be read: %s", x->model, strerror(errno));
    sh_status st = SH_OK;
    for (int i = 0; i < n; i++) {
        if (st == SH_OK) st = copy_one(x, entry[i]->d_name);
        free(entry[i]);
    }
    free(entry);
    return st;
}

/* --- the index -----------------------------------------------------------------------------------------------------
 */

static sh_status describe(packer *x, const sh_config *c, json_t **out) {
    char print[20], files[20], sum[20];
    uint64_t h;
    SH_TRY(sh_tensors_files_hash(x->model, &h));
    snprintf(files, sizeof files, "%016" PRIx64, h);
    snprintf(print, sizeof print, "%016" PRIx64, sh_tensors_fingerprint(sh_supply_tensors(x->supply)));
    SH_CLEANUP(sh_json_release)
    json_t *o = json_pack("{s:s, s:i, s:s, s:{s:s, s:i, s:i, s:i}, s:{s:s, s:s}, s:O, s:O}", "format", SH_PACKED_FORMAT,
                          "version", SH_PACKED_VERSION, "type", sh_wtype_name(sh_mode_wtype(x->o->mode)), "model",
                          "variant", c->variant, "layers", c->n_layers, "hidden", c->hidden, "vocabulary", c->vocab,
                          "source", "fingerprint", print, "files", files, "files", x->files, "tensors", x->tensors);
    if (!o) return no_memory(x);
    SH_TRY(sh_packed_index_checksum(o, &h));
    snprintf(sum, sizeof sum, "%016" PRIx64, h);
    if (json_object_set_new(o, "checksum", json_string(sum)) != 0) return no_memory(x);
    *out = o;
    o = NULL;
    return SH_OK;
}

static sh_status write_index(packer *x, const sh_config *c) {
    char path[PATH_MAX];
    SH_CLEANUP(sh_json_release) json_t *index = NULL;
    SH_TRY(describe(x, c, &index));
    if (snprintf(path, sizeof path, "%s/" SH_PACKED_INDEX, x->tmp) >= (int)sizeof path)
        SH_FAIL(SH_ELIMIT, "%s: path too long", x->tmp);
    char *text = json_dumps(index, JSON_INDENT(1));
    if (!text) return no_memory(x);
    sh_status st = sh_file_write(path, text, strlen(text));
    free(text);
    return st;
}

/* --- the folder ----------------------------------------------------------------------------------------------------
 */

static bool is_empty(const char *dir) {
    struct dirent **entry = NULL;
    int n = scandir(dir, &entry, NULL, NULL);
    for (int i = 0; i < n; i++) free(entry[i]);
    free(entry);
    return n == 2;
}

static sh_status check_target(const char *dir, bool force) {
    if (!sh_file_exists(dir)) return SH_OK;
    if (!force) SH_FAIL(SH_EINPUT, "-o: %s: exists: --force replaces a packed folder", dir);
    if (!sh_packed_is(dir) && !is_empty(dir))
        SH_FAIL(SH_EINPUT, "-o: %s: is no packed folder: --force replaces no others", dir);
    return SH_OK;
}

/* A folder in bf16 serves mode exact too, which rounds nothing: not even what bf16 cannot hold of blocks. */
static sh_status refuse_blocks(const packer *x) {
    const sh_tensors *all = sh_supply_tensors(x->supply);
    for (int i = 0; sh_mode_wtype(x->o->mode) == SH_W_BF16 && i < sh_tensors_count(all); i++) {
        const sh_tensor *t = sh_tensors_at(all, i);
        if (sh_dtype_is_blocks(t->dtype))
            SH_FAIL(SH_EUNSUPPORTED,
                    "%s/%s: %s: is %s: allowed in a packed folder of mode bf16 are BF16, F16 and F32; modes q8 and q4 "
                    "take blocks",
                    x->model, t->file, t->name, t->dtype_name);
    }
    return SH_OK;
}

static sh_status write_all(packer *x, const sh_config *c, sh_team *team) {
    SH_TRY(sh_supply_open(x->model, c, x->o->mode, team, &x->supply));
    SH_TRY(refuse_blocks(x));
    const sh_tensor *table[] = {sh_supply_embed(x->supply), sh_supply_ple(x->supply)};
    x->total = sh_weights_estimate(c, x->o->mode, 0, c->n_layers);
    for (int i = 0; i < 2; i++) x->total += table[i] ? (size_t)table[i]->bytes : 0;
    if (mkdir(x->tmp, 0777) != 0) SH_FAIL(SH_EIO, "%s: cannot be created: %s", x->tmp, strerror(errno));
    SH_TRY(copy_beside(x));
    for (int i = 0; sh_beside_names[i]; i++) SH_TRY(write_metadata(x, sh_beside_names[i]));
    SH_TRY(write_slots(x));
    SH_TRY(write_tables(x));
    SH_TRY(write_index(x, c));
    SH_TRY(check_target(x->dir, x->o->force)); /* somebody else may have been here meanwhile */
    return sh_dir_publish(x->tmp, x->dir);
}

static sh_status prepare(packer *x) {
    x->block = malloc(SH_PACKED_BLOCK);
    x->files = json_array();
    x->tensors = json_object();
    if (!x->block || !x->files || !x->tensors) return no_memory(x);
    if (snprintf(x->tmp, sizeof x->tmp, "%s.tmp.%d", x->dir, (int)getpid()) >= (int)sizeof x->tmp)
        SH_FAIL(SH_ELIMIT, "-o: %.64s…: path too long", x->dir);
    return sh_file_writer_sweep(x->dir);
}

sh_status sh_pack_write(const char *model_dir, const char *dir, const sh_pack_options *o, sh_team *team) {
    SH_TRY(check_target(dir, o->force));
    if (sh_packed_is(model_dir))
        SH_FAIL(SH_EINPUT, "-m: %s: is a packed folder: a checkpoint is needed, whose values it no longer has",
                model_dir);
    sh_config *c = malloc(sizeof *c);
    if (!c) SH_FAIL(SH_EMEMORY, "%s: no memory for its configuration", model_dir);
    packer x = {.model = model_dir, .dir = dir, .o = o};
    sh_status st = sh_config_load(model_dir, c);
    if (st == SH_OK) st = prepare(&x);
    if (st == SH_OK) st = write_all(&x, c, team);
    sh_file_writer_destroy(&x.writer);
    sh_supply_close(&x.supply);
    json_decref(x.sums);
    json_decref(x.files);
    json_decref(x.tensors);
    free(x.block);
    free(c);
    if (st != SH_OK && x.tmp[0]) { /* what went wrong counts, not whether the rest could be cleared away */
        char why[1024];
        snprintf(why, sizeof why, "%s", sh_error_text());
        if (sh_path_remove(x.tmp) != SH_OK) return st;
        return sh_error_set(st, __FILE__, __LINE__, "%s", why);
    }
    return st;
}
