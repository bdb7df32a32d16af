/* What the readers of weight files (safetensors.c, gguf.c) share: the set of tensors that both fill. */
#ifndef SH_MODEL_TENSORS_INT_H
#define SH_MODEL_TENSORS_INT_H

#include <stdbool.h>
#include "common/file.h"
#include "model/safetensors.h"

typedef struct sh_tensors_file {
    char *path;
    const char *name; /* inside path */
    sh_map map;
    bool needed;
} sh_tensors_file;

typedef struct sh_tensors_entry {
    sh_tensor t; /* first: sh_tensors_at hands out its address */
    int file;
    uint64_t begin; /* offset among the data of its file */
} sh_tensors_entry;

struct sh_tensors {
    sh_tensors_file *file;
    sh_tensors_entry *entry;
    int n_files, n_entries, cap;
    bool blocks;          /* safetensors may hold Q8_0, Q4_0 and Q6_K too */
    sh_tensor rope_freqs; /* of GGUF, is none of the entries; bytes 0: not there */
};

/* Maps DIR/NAME as the last of the files. */
sh_status sh_tensors_add_file(sh_tensors *t, const char *dir, const char *name);
/* Adds an entry, whose name is copied. */
sh_status sh_tensors_add_entry(sh_tensors *t, const sh_tensors_entry *e, const char *name);
/* Sorts entries of one file by offset, smaller ones first. */
void sh_tensors_by_offset(sh_tensors_entry *e, int n);

#endif
