/*
 * --workload FILE: a histogram (JSON with "lengths", docs/planning.md) or requests as 'shoal run' takes them, whose
 * lengths are counted by the model's tokenizer where there is one and estimated by their bytes where there is not.
 */
#ifndef SH_CLI_WORKFILE_H
#define SH_CLI_WORKFILE_H

#include <stdint.h>
#include "partition/workload.h"

/* note: where the lengths come from, in words. default_max_tokens 0: 256, said so in the note. */
sh_status sh_workfile_read(const char *path, const char *model_dir, int default_max_tokens, sh_workload *out,
                           char *note, size_t note_size);
/* The same of a file of requests that is known to have so many lines, prompts estimated by their bytes: costs
 * milliseconds. Lines that no length can be told of count as the others. out->n 0: there is none else. */
sh_status sh_workfile_guess(const char *path, uint64_t lines, int default_max_tokens, sh_workload *out);

#endif
