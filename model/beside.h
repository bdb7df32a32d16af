/*
 * The files of Hugging Face that lie beside a model's weights, under their names: as they are, or as the metadata of
 * the GGUF model in the folder have them (gguf_files.h). A file counts where it is there. Of config.json and
 * tokenizer.json that are not there the metadata stand in, for generation_config.json only together with config.json,
 * and for tokenizer_config.json only together with tokenizer.json; not where safetensors lie in the folder, nor in a
 * packed one.
 */
#ifndef SH_MODEL_BESIDE_H
#define SH_MODEL_BESIDE_H

#include <stdbool.h>
#include <stddef.h>
#include "common/json.h"
#include "common/status.h"

typedef struct sh_beside {
    char *text; /* NULL: not there; else followed by a 0 byte */
    size_t len;
    char what[4200]; /* the file's path, or the GGUF folder's and what is made of it: for errors */
} sh_beside;

/* Reads DIR/NAME, or what stands in for it, of at most max bytes. */
sh_status sh_beside_read(const char *dir, const char *name, size_t max, sh_beside *out);
void sh_beside_release(sh_beside *b);
/* Some members of it, as sh_json_read_members; *out NULL: not there. what: as in sh_beside. */
sh_status sh_beside_members(const char *dir, const char *name, const char *const keys[], char what[4200], json_t **out);
/* Whether NAME is not there as a file and metadata stand in for it; the names for which that may be, NULL at the end.
 */
bool sh_beside_is_metadata(const char *dir, const char *name);
extern const char *const sh_beside_names[];

#endif
