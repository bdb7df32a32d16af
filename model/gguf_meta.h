/*
 * The metadata of a directory's GGUF model (of its first part): look-ups by key. Errors name the file, the key, the
 * value found and what is allowed. What configuration and tokenizer make of it: gguf_files.h.
 */
#ifndef SH_MODEL_GGUF_META_H
#define SH_MODEL_GGUF_META_H

#include "model/gguf_read.h"

typedef struct sh_gguf_meta sh_gguf_meta;

/* Strings of an array, one after the other. */
typedef struct sh_gguf_strings {
    sh_gguf_reader r;
    uint64_t n;
} sh_gguf_strings;

/* Maps DIR's model and reads its keys. SH_EINPUT where there is none. */
sh_status sh_gguf_meta_open(const char *dir, sh_gguf_meta **out);
void sh_gguf_meta_close(sh_gguf_meta **m);
const char *sh_gguf_meta_path(const sh_gguf_meta *m);
bool sh_gguf_meta_has(const sh_gguf_meta *m, const char *key);
/* Fails with "PATH: metadata KEY: …". */
sh_status sh_gguf_meta_fail(const sh_gguf_meta *m, sh_status code, const char *key, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* Fails where the key is not there. */
sh_status sh_gguf_meta_need(const sh_gguf_meta *m, const char *key);

/* A key that is not there leaves *out as it is; a wrong type or a value out of [min, max] fails. Integers of any width;
 * f32 comes out as the shortest decimal that means it, as 1e-06 for what its writer had as 1e-06. */
sh_status sh_gguf_meta_int(const sh_gguf_meta *m, const char *key, int64_t min, int64_t max, int64_t *out);
sh_status sh_gguf_meta_real(const sh_gguf_meta *m, const char *key, double min, double max, double *out);
sh_status sh_gguf_meta_bool(const sh_gguf_meta *m, const char *key, bool *out);
sh_status sh_gguf_meta_text(const sh_gguf_meta *m, const char *key, sh_gguf_text *out);
/* n integers out of an array of as many, or of one number that counts for all. `of` names what there is one for. */
sh_status sh_gguf_meta_ints(const sh_gguf_meta *m, const char *key, const char *of, int n, int64_t min, int64_t max,
                            int64_t *out);
/* n booleans out of an array of as many. */
sh_status sh_gguf_meta_bools(const sh_gguf_meta *m, const char *key, const char *of, int n, bool *out);
/* An array of strings, which must be there. */
sh_status sh_gguf_meta_strings(const sh_gguf_meta *m, const char *key, sh_gguf_strings *out);
sh_gguf_text sh_gguf_next(sh_gguf_strings *s);
/* How many values an array has; 0: it is not there, or is no array. */
uint64_t sh_gguf_meta_count(const sh_gguf_meta *m, const char *key);

#endif
