/* Reading a run's log while it grows: warnings as they come, and the reason why a process ended. */
#ifndef SH_CLI_LOGTAIL_H
#define SH_CLI_LOGTAIL_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

typedef struct sh_logtail {
    char path[4128];
    off_t seen; /* warnings before this place were given out */
    off_t mark; /* reasons are looked for from here on */
    char line[1024];
} sh_logtail;

/* Starts at the present end of the file, which need not exist yet. */
void sh_logtail_open(sh_logtail *t, const char *path);
void sh_logtail_close(sh_logtail *t);
/* What is written from now on may be a reason. */
void sh_logtail_mark(sh_logtail *t);
/* The next whole line with a warning, without its end, or NULL. Valid until the next call. */
const char *sh_logtail_next_warning(sh_logtail *t);
/* The last line since the mark in which shoal says "error:"; else, unless errors_only, the last one that says anything,
 * or the paragraph between two rules that it belongs to.
 * The name of the program in front is left out. False when there is none. */
bool sh_logtail_reason(sh_logtail *t, bool errors_only, char *to, size_t size);

#endif
