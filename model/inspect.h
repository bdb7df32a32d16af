/*
 * What a checkpoint is, as text: `shoal inspect`. Works from config.json alone; where weights are, their headers are
 * checked against it too.
 */
#ifndef SH_MODEL_INSPECT_H
#define SH_MODEL_INSPECT_H

#include "common/buf.h"
#include "model/config.h"

/* Appends the whole report of MODEL: variant, layers, parameters, memory, KV, weights. Fails as sh_config_load,
 * sh_tensors_open and sh_weights_check do; absent weights are no failure, the report says so. */
sh_status sh_inspect_model(const char *model_dir, sh_buf *out);
/* The part that follows from the configuration. */
sh_status sh_inspect_config(const sh_config *c, sh_buf *out);

/* Bytes of KV that one sequence of n positions needs over layers [first, last): windows counted, pages not. */
int64_t sh_inspect_kv_sequence(const sh_config *c, sh_kv_type type, int first, int last, int64_t n);
/* Parameters that one token's computation uses: all but the per-layer table and the experts not chosen. */
int64_t sh_inspect_active(const sh_config *c);
/* "4.25 GiB", "11.3 MiB", "512 B" and "2.280 B", "36.18 M", "6144" into to [24]; return to. */
const char *sh_inspect_bytes(int64_t n, char to[24]);
const char *sh_inspect_params(int64_t n, char to[24]);

#endif
