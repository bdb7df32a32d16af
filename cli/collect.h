/* Results of a finished job, from the coordinator into a file that appears under its name only when complete. */
#ifndef SH_CLI_COLLECT_H
#define SH_CLI_COLLECT_H

#include "cli/progress.h"
#include "proto/client.h"

/*
 * Streams all rows of `job` to `output` ("-": standard output). ordered: by line number, through a file `spool`
 * (removed again) and 24 bytes of memory a row. SH_EPEER: the coordinator did not answer, try again; SH_EIO: the output
 * cannot be written.
 */
sh_status sh_collect(sh_client *c, uint64_t job, const char *output, bool ordered, const char *spool,
                     sh_outcomes *outcomes);

#endif
