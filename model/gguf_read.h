/*
 * Reading the header of a GGUF file value by value: what gguf.c (tensors) and gguf_meta.c (metadata) share. Every
 * length is held against what is left of the file before it is used; errors say the offset, not the file.
 */
#ifndef SH_MODEL_GGUF_READ_H
#define SH_MODEL_GGUF_READ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "common/status.h"

/* Types of values: 0 … 12. */
enum { SH_GGUF_F32 = 6, SH_GGUF_BOOL = 7, SH_GGUF_STRING = 8, SH_GGUF_ARRAY = 9, SH_GGUF_F64 = 12 };
enum { SH_GGUF_KEY_BYTES = 65535 };

typedef struct sh_gguf_reader {
    const uint8_t *data;
    size_t len, at;
} sh_gguf_reader;

typedef struct sh_gguf_text {
    const char *s; /* borrowed from the file, not ended by a 0 byte */
    size_t n;
} sh_gguf_text;

/* A little-endian number of 1 to 8 bytes. */
sh_status sh_gguf_take_number(sh_gguf_reader *r, size_t bytes, uint64_t *out);
/* A string of at most `most` bytes; `what` names it in errors. */
sh_status sh_gguf_take_text(sh_gguf_reader *r, const char *what, size_t most, sh_gguf_text *out);
/* A string that may stand in messages: printable ASCII without spaces, 1 … most bytes. */
sh_status sh_gguf_take_name(sh_gguf_reader *r, const char *what, size_t most, sh_gguf_text *out);
/* Magic, version, and how many tensors and keys there are. */
sh_status sh_gguf_take_counts(sh_gguf_reader *r, uint64_t *tensors, uint64_t *keys);
/* Whether so many tensors fit into what is left. */
sh_status sh_gguf_check_tensors(const sh_gguf_reader *r, uint64_t n);
/* Bytes of a value of a type; 0: strings, arrays and unknown types. */
size_t sh_gguf_value_bytes(uint64_t type);
/* Passes over a value; depth: 0 where it is not inside an array. */
sh_status sh_gguf_skip_value(sh_gguf_reader *r, uint64_t type, int depth);
bool sh_gguf_is(sh_gguf_text a, const char *b);

#endif
