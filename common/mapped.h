/*
 * What happens when bytes of a mapped file cannot be read any more, because the file was cut or its storage failed: the
 * system tells by a signal, SIGBUS, in the thread that reads. Files that sh_map_open maps are known here, so that the
 * process can say which it was before it ends (docs/decisions/0036).
 */
#ifndef SH_COMMON_MAPPED_H
#define SH_COMMON_MAPPED_H

#include <sys/stat.h>
#include "common/status.h"

/* A map of a whole file, as fstat found it; path as messages name it. */
sh_status sh_mapped_add(const char *path, const struct stat *file, const void *p);
void sh_mapped_remove(const void *p); /* before it is unmapped; one that is not known is ignored */

/* For programs, not libraries: from here on such a fault writes a line to standard error that names the file and the
 * byte, as sh_error does, and then, when the file was looked at, one that says what is wrong as well, waits for whoever
 * carries it on (below), and ends the process with this exit status, whatever thread it happens in. A SIGBUS from
 * anywhere else takes the way that it had. May be called again, when somebody else has taken the signal since. Where
 * the look at the file does not end, SIGALRM ends the process. */
sh_status sh_mapped_watch(int exit_status);

/* Threads that carry the text to another process. Between begin and end each looks at sh_mapped_fault now and then,
 * and when it is not NULL delivers it and calls sh_mapped_told: the process ends when one has, at the latest after
 * SH_MAPPED_WAIT seconds, twice that where the file's server is silent. The fault is without what is wrong when the
 * look at the file has not ended after SH_MAPPED_LOOK seconds; then sh_mapped_told does not return. */
#define SH_MAPPED_WAIT 2
#define SH_MAPPED_LOOK 0.5
void sh_mapped_listen_begin(void);
void sh_mapped_listen_end(void);
const char *sh_mapped_fault(void);
void sh_mapped_told(void);

#endif
