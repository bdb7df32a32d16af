/*
 * A checkpoint directory's tensors: one model.safetensors, or shards named by model.safetensors.index.json, mapped and
 * checked (header length, JSON, dtype, shape against offsets, overlap, file length); where neither is there, those of
 * GGUF files under the names of Hugging Face (gguf.h). Nothing is read but headers until a tensor's bytes are touched.
 * Errors name file and tensor.
 */
#ifndef SH_MODEL_SAFETENSORS_H
#define SH_MODEL_SAFETENSORS_H

#include <stdbool.h>
#include <stdint.h>
#include "common/status.h"

/* SH_Q8_0, SH_Q4_0: blocks of SH_GGUF_BLOCK items of a row, a scale d (f16) and then their codes. Q8_0: d · q, q i8.
 * Q4_0: d · (q − 8), byte j of 16 has item j in its low half and item 16 + j in its high half. SH_Q6_K: blocks of
 * SH_GGUF_SUPER items: codes, a scale (i8) for each 16 items, d (blocks.c). */
typedef enum sh_dtype { SH_BF16, SH_F16, SH_F32, SH_Q8_0, SH_Q4_0, SH_Q6_K, SH_OTHER } sh_dtype;
#define SH_GGUF_BLOCK 32
#define SH_GGUF_SUPER 256

typedef struct sh_tensor {
    const char *name, *file; /* borrowed from the set */
    sh_dtype dtype;
    char dtype_name[12];
    int rank;
    int64_t shape[8];
    const uint8_t *data; /* mapped, little-endian, of any alignment; NULL once its file was let go */
    uint64_t bytes;
} sh_tensor;

typedef struct sh_tensors sh_tensors;

static inline bool sh_dtype_is_blocks(sh_dtype d) {
    return d == SH_Q8_0 || d == SH_Q4_0 || d == SH_Q6_K;
}
static inline int sh_dtype_block(sh_dtype d) { /* items that are stored together: rows have multiples of them */
    return d == SH_Q6_K ? SH_GGUF_SUPER : sh_dtype_is_blocks(d) ? SH_GGUF_BLOCK : 1;
}
static inline uint64_t sh_dtype_bytes(sh_dtype d, uint64_t items) { /* of known types; only whole blocks count */
    if (d == SH_Q6_K) return items / SH_GGUF_SUPER * (SH_GGUF_SUPER / 4 * 3 + SH_GGUF_SUPER / 16 + 2);
    if (sh_dtype_is_blocks(d)) return items / SH_GGUF_BLOCK * (2 + SH_GGUF_BLOCK / (d == SH_Q4_0 ? 2 : 1));
    return items * (d == SH_F32 ? 4 : 2);
}

sh_status sh_tensors_open(const char *model_dir, sh_tensors **out);
/* One file of a folder, whatever its name; the types Q8_0, Q4_0 and Q6_K, which safetensors has not, are known in it.
 */
sh_status sh_tensors_open_file(const char *dir, const char *name, sh_tensors **out);
void sh_tensors_close(sh_tensors **t);
int sh_tensors_count(const sh_tensors *t);
const sh_tensor *sh_tensors_at(const sh_tensors *t, int i);              /* sorted by name */
const sh_tensor *sh_tensors_find(const sh_tensors *t, const char *name); /* NULL: absent */
/* Marks the file of a tensor as needed; sh_tensors_trim unmaps every file that has no such mark. */
void sh_tensors_need(sh_tensors *t, const sh_tensor *tensor);
void sh_tensors_trim(sh_tensors *t);
uint64_t sh_tensors_bytes(const sh_tensors *t); /* of all tensors, headers not counted */
int sh_tensors_files(const sh_tensors *t);
/* A hash over names, dtypes, shapes and sampled bytes: two ranks, or two runs, compare it. Costs milliseconds. */
uint64_t sh_tensors_fingerprint(const sh_tensors *t);
/* A hash over names and lengths of the safetensors files of a folder, or where it has none of its GGUF files, without
 * opening any. */
sh_status sh_tensors_files_hash(const char *model_dir, uint64_t *out);

#endif
