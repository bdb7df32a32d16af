/*
 * A packed folder: a checkpoint written once in the kernels' own layout (kernels.h, quant.h), which ranks map in place
 * of reading, widening and quantising it (docs/decisions/0028). It is independent of any plan. It holds
 *
 *   config.json, …                   copied as they were
 *   pack-layer-N.bin, pack-head.bin  vectors as f32 and matrices in panels of 32 outputs, each at a multiple of 64
 *   pack-tables.safetensors          the embedding tables, and towers of other modalities, as they were
 *   shoal-pack.json                  the index: format, version, type of the matrices, the source, each file's length
 *                                    and checksums, each tensor's place, and a checksum of the index itself
 */
#ifndef SH_MODEL_PACKED_H
#define SH_MODEL_PACKED_H

#include "model/safetensors.h"
#include "model/weights.h"

#define SH_PACKED_INDEX   "shoal-pack.json"
#define SH_PACKED_TABLES  "pack-tables.safetensors"
#define SH_PACKED_FORMAT  "shoal-pack"
#define SH_PACKED_VERSION 1                  /* of the layout and of how weights are quantised */
#define SH_PACKED_BLOCK   ((size_t)16 << 20) /* bytes of a file that have a checksum of their own */
#define SH_PACKED_ALIGN   64

typedef struct sh_packed sh_packed;

/* Whether a folder has the index of a packed one. */
bool sh_packed_is(const char *dir);
/* Reads the index and checks all of it: version, its checksum, every tensor against config.json, every range against
 * its file, every file's length. Maps nothing yet. */
sh_status sh_packed_open(const char *dir, const sh_config *c, sh_packed **out);
void sh_packed_close(sh_packed **p);
sh_wtype sh_packed_type(const sh_packed *p);
uint64_t sh_packed_bytes(const sh_packed *p); /* of all files that the index names */
int sh_packed_files(const sh_packed *p);
int sh_packed_tensors(const sh_packed *p); /* the tables' not counted */
/* As sh_tensors_fingerprint of the checkpoint that it was made from. */
uint64_t sh_packed_fingerprint(const sh_packed *p);
/* Points everything that w needs (config, type, share, held, first, last given; laid out with base NULL) into maps,
 * and brings their pages into memory on the team. What a share cuts where panels are not is copied. w->bytes gets what
 * is mapped and copied. SH_EINPUT: w->type is not the folder's; SH_EUNSUPPORTED: --tp-reduce sum cuts a group of
 * inputs that share a scale. l gets the bytes and the times. Maps live until close. */
sh_status sh_packed_load(sh_packed *p, sh_weights *w, sh_wmat *expert, sh_team *team, sh_loading *l);
/* The tables, to be closed by the caller. */
sh_status sh_packed_tables(const sh_packed *p, sh_tensors **out);

/* From the index alone (checked by its own checksum): the type of the matrices. */
sh_status sh_packed_read_type(const char *dir, sh_wtype *out);
const char *sh_wtype_name(sh_wtype t);  /* "bf16", "q8", "q4" */
const char *sh_wtype_modes(sh_wtype t); /* for messages: the modes that read it: "bf16 or exact", … */
/* SH_EINPUT where a mode (its name, for the message) needs matrices of another type than a folder has. */
sh_status sh_packed_check_type(const char *dir, sh_wtype packed, sh_wtype wanted, const char *mode);
/* Reads every byte of every file that the index names. The first that is not as it was written fails by file and range
 * of bytes. progress may be NULL. */
sh_status sh_packed_verify(const char *dir, sh_team *team, void (*progress)(void *arg, size_t done, size_t total),
                           void *arg);

/* --- writing (packer.c) ------------------------------------------------------------------------------------------ */

typedef struct sh_pack_options {
    sh_mode mode;
    bool force; /* replace DIR if it is a packed folder, or empty */
    /* Called now and then with bytes of weights written, of about so many; false: give up (SH_ECANCELLED). May be NULL.
     */
    bool (*progress)(void *arg, size_t done, size_t total);
    void *arg;
} sh_pack_options;

/* Writes DIR from a checkpoint, in a folder beside that gets its name when everything is on the disk. Memory: one piece
 * of a matrix. On failure DIR is as it was. SH_EINPUT: DIR exists. */
sh_status sh_pack_write(const char *model_dir, const char *dir, const sh_pack_options *o, sh_team *team);

#endif
