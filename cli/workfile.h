/*
 * --workload FILE: a histogram (JSON with "lengths", docs/planning.md) or requests as 'shoal run' takes them, whose
 * lengths are counted by the model's tokenizer where there is one and estimated by their bytes where there is not.
 */
#ifndef SH_CLI_WORKFILE_H
#define SH_CLI_WORKFILE_H

#include <stdint.h>
#include "cli/input.h"
#include "partition/workload.h"

/* note: where the lengths come from, in words. default_max_tokens 0: 256, said so in the note. */
sh_status sh_workfile_read(const char *path, const char *model_dir, int default_max_tokens, sh_workload *out,
                           char *note, size_t note_size);
/* The same of lines that pass in sh_input_scan, prompts estimated by their bytes: of long inputs every n-th, 5,000 to
 * 10,000 in all. Lines that no length can be told of count as the others. */
typedef struct sh_workguess sh_workguess;
sh_status sh_workguess_create(int default_max_tokens, sh_workguess **out);
void sh_workguess_destroy(sh_workguess **g);
sh_input_reader sh_workguess_reader(sh_workguess *g);
/* lines: in all. out->n 0: no length could be told of any. */
sh_status sh_workguess_end(const sh_workguess *g, uint64_t lines, sh_workload *out);

#endif
