/* The input of a run as bytes: read once to count its lines and to know it again. Says nothing about what the lines
 * mean. */
#ifndef SH_CLI_INPUT_H
#define SH_CLI_INPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "common/status.h"

typedef struct sh_input {
    uint64_t bytes, lines; /* lines that are not empty (blanks count as empty) */
    uint64_t hash;         /* of all bytes */
} sh_input;

/* Who wants to see lines while they pass: those that are not empty, numbered from 0. A line that no request may be as
 * long as (SH_MAX_LINE_BYTES) is not shown. */
typedef struct sh_input_reader {
    void *ctx;
    bool (*wants)(void *ctx, uint64_t number);
    void (*take)(void *ctx, const char *line, size_t len); /* one that was wanted, without its end; borrowed */
} sh_input_reader;

/* Whether it can be read only once: standard input ("-"), a pipe, a device. */
bool sh_input_is_stream(const char *path);
/* Reads `path` to its end, with a reader or NULL; a stream is copied to `spool`, which then is the file to submit.
 * SH_EINPUT when it cannot be read as lines at all: absent, a folder, no permission, a read error. SH_ECANCELLED: a
 * signal came while it waited. */
sh_status sh_input_scan(const char *path, const char *spool, const sh_input_reader *reader, sh_input *out);

#endif
