/*
 * Files: whole reads, maps, durable writes. Writing goes through a table of operations so that tests can make the n-th
 * write fail. Paths in errors are as given.
 */
#ifndef SH_COMMON_FILE_H
#define SH_COMMON_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include "common/status.h"

/* What durable writing asks of the system; sh_file_ops points to the real calls. Tests may replace members. */
typedef struct sh_file_op_table {
    ssize_t (*write)(int fd, const void *p, size_t n);
    int (*fsync)(int fd);
    int (*rename)(const char *from, const char *to);
} sh_file_op_table;
extern sh_file_op_table sh_file_ops;

/* Reads a whole file of at most max bytes; *text is malloc'ed and followed by a 0 byte. */
sh_status sh_file_read(const char *path, size_t max, char **text, size_t *len);
/* A read-only map of a whole file. Borrowed bytes live until sh_map_close. An empty file maps to len 0. */
typedef struct sh_map {
    const uint8_t *data;
    size_t len;
} sh_map;
sh_status sh_map_open(const char *path, sh_map *out);
void sh_map_close(sh_map *m);
bool sh_file_exists(const char *path);
/* mkdir -p with mode 0700 for what is made. */
sh_status sh_dir_make(const char *path);
/* Removes a file or a directory tree; absent is success. Does not follow links. */
sh_status sh_path_remove(const char *path);

/* A file that appears under its name only when complete: written to PATH.tmp.PID, synced, renamed, directory synced. */
typedef struct sh_file_writer sh_file_writer;
sh_status sh_file_writer_open(const char *path, sh_file_writer **out);
sh_status sh_file_writer_add(sh_file_writer *w, const void *p, size_t n);
/* A folder of synced files, written as TMP beside PATH, gets that name: synced, renamed, its parent synced. A folder
 * that PATH was is exchanged with it and removed. On failure PATH is as it was and TMP is left. */
sh_status sh_dir_publish(const char *tmp, const char *path);
/* Removes what writers of PATH left that were killed: files and folders PATH.tmp.PID of processes that are not on this
 * node any more (and of the caller's own pid: call it before opening a writer). */
sh_status sh_file_writer_sweep(const char *path);
/* Syncs and renames; on failure the temporary file is removed and PATH is as it was. Always frees. */
sh_status sh_file_writer_commit(sh_file_writer **w);
void sh_file_writer_destroy(sh_file_writer **w); /* gives up: PATH is as it was */
/* A whole file at once. */
sh_status sh_file_write(const char *path, const void *p, size_t n);

#endif
