/* What the files that read and write packed folders share. See packed.h. */
#ifndef SH_MODEL_PACKED_INT_H
#define SH_MODEL_PACKED_INT_H

#include <limits.h>
#include "common/file.h"
#include "common/json.h"
#include "common/mem.h"
#include "model/packed.h"
#include "model/slots.h"

typedef struct sh_packed_file {
    const char *name; /* of the index */
    uint64_t bytes;
    const json_t *blocks; /* checksums */
    sh_map map;           /* once it was needed */
} sh_packed_file;

struct sh_packed {
    char *dir;
    json_t *index;
    sh_wtype type;
    uint64_t fingerprint, bytes;
    sh_packed_file *file;
    int n_files, n_slots;
    void *copies; /* of what a share cuts inside panels */
    size_t copied;
};

sh_status sh_packed_path(const sh_packed *p, const char *name, char path[PATH_MAX]);
sh_status sh_packed_index_checksum(const json_t *index, uint64_t *out);
size_t sh_packed_item_bytes(const sh_slot *s);           /* of one matrix of a stack, or of a vector */
int sh_packed_shape(const sh_slot *s, int64_t shape[3]); /* returns the rank */
sh_status sh_packed_locate(const sh_packed *p, const sh_slot *s, sh_packed_file **file, uint64_t *offset);
/* Brings mapped pages into memory; what cannot be read fails by the file's path and the range. start: of the map. */
sh_status sh_packed_bring(const char *path, const uint8_t *from, size_t bytes, const uint8_t *start);

#endif
