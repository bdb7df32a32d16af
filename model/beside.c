/* Files beside the weights, and what stands in for them. See beside.h. */
#include "model/beside.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/file.h"
#include "common/hash.h"
#include "common/limits.h"
#include "model/config.h"
#include "model/gguf.h"
#include "model/gguf_files.h"
#include "model/packed.h"

static const struct {
    const char *name, *with; /* made where neither is there as a file */
    sh_status (*make)(const char *dir, sh_buf *out);
} made[] = {{"config.json", "config.json", sh_gguf_config},
            {"generation_config.json", "config.json", sh_gguf_generation},
            {"tokenizer.json", "tokenizer.json", sh_gguf_tokenizer},
            {"tokenizer_config.json", "tokenizer.json", sh_gguf_tokenizer_config}};

enum { MADE = sizeof made / sizeof *made };

const char *const sh_beside_names[] = {"config.json", "generation_config.json", "tokenizer.json",
                                       "tokenizer_config.json", NULL};

static bool is_there(const char *dir, const char *name) {
    char path[4096];
    return snprintf(path, sizeof path, "%s/%s", dir, name) < (int)sizeof path && sh_file_exists(path);
}

/* Index into made; −1: no metadata stand in. */
static int stands_in(const char *dir, const char *name) {
    int i = 0;
    while (i < MADE && strcmp(made[i].name, name) != 0) i++;
    if (i == MADE || is_there(dir, name) || is_there(dir, made[i].with)) return -1;
    if (is_there(dir, "model.safetensors") || is_there(dir, "model.safetensors.index.json")) return -1;
    return !sh_packed_is(dir) && sh_gguf_is_there(dir) ? i : -1;
}

bool sh_beside_is_metadata(const char *dir, const char *name) {
    return stands_in(dir, name) >= 0;
}

static sh_status make(const char *dir, int i, size_t max, sh_beside *out) {
    SH_CLEANUP(sh_buf_release) sh_buf b;
    sh_buf_init(&b, max);
    SH_TRY(made[i].make(dir, &b));
    if (b.len) snprintf(out->what, sizeof out->what, "%s: metadata of GGUF, as %s", dir, made[i].name);
    out->len = b.len;
    out->text = b.len ? sh_buf_take(&b) : NULL;
    return SH_OK;
}

sh_status sh_beside_read(const char *dir, const char *name, size_t max, sh_beside *out) {
    char path[4096];
    *out = (sh_beside){0};
    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
        SH_FAIL(SH_ELIMIT, "%.64s…: path too long", dir);
    int i = stands_in(dir, name);
    snprintf(out->what, sizeof out->what, "%s", path);
    if (i >= 0) return make(dir, i, max, out);
    return sh_file_exists(path) ? sh_file_read(path, max, &out->text, &out->len) : SH_OK;
}

void sh_beside_release(sh_beside *b) {
    free(b->text);
    *b = (sh_beside){0};
}

sh_status sh_beside_members(const char *dir, const char *name, const char *const keys[], char what[4200],
                            json_t **out) {
    SH_CLEANUP(sh_beside_release) sh_beside b = {0};
    SH_TRY(sh_beside_read(dir, name, SH_MAX_CONFIG_BYTES, &b));
    memcpy(what, b.what, sizeof b.what);
    return b.text ? sh_json_parse_members(b.what, b.text, b.len, keys, out) : SH_OK;
}

sh_status sh_settings_hash(const char *dir, uint64_t *out) {
    static const char *const names[] = {"config.json", "generation_config.json", "tokenizer.json",
                                        "tokenizer_config.json", "chat_template.jinja"};
    uint64_t h = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        SH_CLEANUP(sh_beside_release) sh_beside b = {0};
        SH_TRY(sh_beside_read(dir, names[i], SH_MAX_TOKENIZER_BYTES, &b));
        if (b.text) h = sh_hash64(sh_hash64(h, names[i], strlen(names[i])), b.text, b.len);
    }
    *out = h;
    return SH_OK;
}
