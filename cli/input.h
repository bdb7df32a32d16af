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

/* Whether it can be read only once: standard input ("-"), a pipe, a device. */
bool sh_input_is_stream(const char *path);
/* Reads `path` to its end; a stream is copied to `spool`, which then is the file to submit. SH_EINPUT when it cannot be
 * read as lines at all: absent, a folder, no permission, a read error. SH_ECANCELLED: a signal came while it waited. */
sh_status sh_input_scan(const char *path, const char *spool, sh_input *out);

#endif
