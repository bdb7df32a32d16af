/*
 * config.json → one table per layer. Both spellings (per_layer_config, or global_head_dim and
 * num_global_key_value_heads), text-only and composite files. Source: gemma4-text §1; reference class Config.
 * Code elsewhere reads this table and never asks which variant it runs.
 */
#ifndef SH_MODEL_CONFIG_H
#define SH_MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>
#include "common/limits.h"
#include "common/status.h"
#include "model/share.h"

typedef enum sh_kv_kind { SH_KV_GLOBAL, SH_KV_SLIDING, SH_KV_KINDS } sh_kv_kind;
typedef enum sh_kv_type { SH_KV_F32, SH_KV_BF16, SH_KV_Q8, SH_KV_TYPES } sh_kv_type;
typedef enum sh_mode { SH_MODE_EXACT, SH_MODE_BF16, SH_MODE_Q8, SH_MODE_Q4, SH_MODES } sh_mode;

typedef struct sh_layer {
    sh_kv_kind kind;
    int heads, kv_heads, head_dim;
    int rotated_pairs;  /* RoPE pairs (j, j + head_dim/2), j < rotated_pairs */
    double theta;       /* RoPE base */
    double rope_factor; /* divides the frequencies */
    int window;         /* keys a query sees, itself included; 0: all */
    int kv_from;        /* the layer whose K/V this one reads: itself, or its producer */
    bool has_kv;        /* computes and stores K/V (kv_from == own index) */
    bool k_eq_v;        /* no v_proj: the raw key projection is the value; only V is cached */
    int ff;             /* dense feed-forward width */
    bool moe;           /* router and experts beside the dense feed-forward */
} sh_layer;

typedef struct sh_config {
    char variant[32]; /* "E2B", "E4B", "31B", "26B-A4B" for the released shapes, else "custom" */
    int vocab, hidden, n_layers;
    int ple;       /* P, per-layer embedding width; 0: none */
    int ple_vocab; /* rows of the per-layer table */
    int experts, top_k, expert_ff;
    int first_shared; /* layers from here on have no K/V of their own; n_layers when none */
    int kv_end; /* > 0: only K/V of layers [0, kv_end) are made: no head, and the last of them has no more than K/V */
    int max_context;
    float eps, softcap; /* softcap 0: none */
    bool tied;          /* the head is embed_tokens */
    bool vision_bidirectional;
    int pad_id, bos_id;
    int eos_ids[SH_MAX_STOP_IDS], n_eos; /* from config.json */
    int image_id, audio_id, video_id;    /* soft-token placeholders; −1: none */
    sh_layer layer[SH_MAX_LAYERS];
} sh_config;

/* The longest context unless the user asks for another: the model's, at most SH_USUAL_CONTEXT (docs/decisions/0011). */
int sh_config_usual_context(const sh_config *c);

/* Sets kv_end: the same model for ranks that make the K/V of prompts and nothing else. Layers without K/V of their own
 * are not theirs. */
static inline void sh_config_prefill(sh_config *c) {
    c->kv_end = c->first_shared;
}
/* Whether a stage that ends before `last` ends the model, and has the head; whether of a layer only K/V are made. */
static inline bool sh_config_has_head(const sh_config *c, int last) {
    return last == c->n_layers && c->kv_end == 0;
}
static inline bool sh_config_only_kv(const sh_config *c, int layer) {
    return layer == c->kv_end - 1;
}

/* Defaults for requests: generation_config.json, where absent the values of config.json and neutral sampling. */
typedef struct sh_generation {
    double temperature, top_p;
    int top_k;                             /* 0: off */
    bool do_sample;                        /* false: temperature defaults to 0 */
    int stop_ids[SH_MAX_STOP_IDS], n_stop; /* eos_token_id of the file, else config.json's */
    int suppress[SH_MAX_STOP_IDS], n_suppress;
} sh_generation;

/* Reads MODEL/config.json, or what stands in for it (beside.h). Errors name the file, the field, the value and what is
 * allowed. */
sh_status sh_config_load(const char *model_dir, sh_config *out);
sh_status sh_config_parse(const char *what, const char *json, size_t len, sh_config *out);
sh_status sh_generation_load(const char *model_dir, const sh_config *c, sh_generation *out);

/* A hash over names and lengths of the files that a model's weights come from: the checkpoint's own, also where the
 * folder is a packed one (packed.h). */
sh_status sh_weight_files_hash(const char *model_dir, uint64_t *out);
/* A hash over configuration, tokenizer and chat template: the files, and what stands in for them. */
sh_status sh_settings_hash(const char *model_dir, uint64_t *out);

/* Values (not bytes) that one position of a producing layer stores: kv_heads·head_dim, twice unless k_eq_v. */
int sh_layer_kv_values(const sh_layer *l);
/* Bytes of one vector, the key or the value of one position and KV head, in a KV type: as it lies in a page and
 * travels, scales of q8 included. */
size_t sh_kv_vec_bytes(sh_kv_type t, int head_dim);
/* Bytes of these values: what one position of the layer stores. */
size_t sh_layer_kv_bytes(const sh_layer *l, sh_kv_type t);
/* The same for a whole stage [first, last): bytes per token of one KV kind over the layers it must hold (its producers
 * and mirrors of earlier producers that its consumers read). */
size_t sh_config_kv_bytes(const sh_config *c, sh_kv_type type, sh_kv_kind kind, int first, int last);
/* Whether K/V of producer `layer` must cross a cut before layer `cut` (layer < cut and some consumer ≥ cut, below
 * kv_end if that is set). */
bool sh_config_kv_crosses(const sh_config *c, int layer, int cut);
/* The widest window of the sliding layers; 0: there are none. */
int sh_config_widest_window(const sh_config *c);
const char *sh_mode_name(sh_mode m);
const char *sh_kv_type_name(sh_kv_type t);
/* The type where none is asked for. */
sh_kv_type sh_kv_type_of_mode(sh_mode m);
sh_status sh_mode_parse(const char *s, sh_mode *out);
sh_status sh_kv_type_parse(const char *s, sh_kv_type *out);

/* Parameters by component, for inspect and the planner. Counts elements. */
typedef struct sh_param_count {
    int64_t embedding, ple_table, ple_projection, attention, mlp, experts, router, ple_layers, norms, total;
} sh_param_count;
sh_param_count sh_config_count(const sh_config *c);
/* The same for one layer, as the checkpoint stores it: norms includes q_norm and k_norm, router its scales, ple the
 * gate and the projection inside the layer. layer_scalar is a buffer and not counted. */
typedef struct sh_layer_count {
    int64_t qo, kv, mlp, experts, router, ple, norms;
} sh_layer_count;
sh_layer_count sh_config_layer_count(const sh_config *c, int layer);
/* Elements of the matrices of one layer (what a decode step reads of it, its rows of per_layer_model_projection
 * included); experts counted whole. */
int64_t sh_layer_params(const sh_config *c, int layer);
/* Bytes of anonymous memory that sh_weights_load (weights.h) holds for layers [first, last): for budgets, before
 * loading. */
size_t sh_weights_estimate(const sh_config *c, sh_mode mode, int first, int last);
/* Of these, the bytes of one expert of one layer: a member that does not hold it has them less. */
size_t sh_expert_bytes(const sh_config *c, sh_mode mode);
/* Bytes of one weight of a large matrix, its part of the scales included. */
double sh_mode_weight_bytes(sh_mode mode);
/* Bytes of a row on its way to an expert, as the expert's kernel takes it: f32 in exact mode, bf16 in bf16 mode, in q8
 * and q4 the codes, scales and sums of sh_qrows. Bytes of a result: f32 in exact mode, else bf16. */
size_t sh_expert_row_bytes(const sh_config *c, sh_mode mode);
size_t sh_expert_result_bytes(const sh_config *c, sh_mode mode);
#define SH_PART_ROWS 512 /* rows that pass a layer at a time: bounds its scratch, and is plenty for speed */
/* Where experts are spread over so many members: the most rows of a member that pass a layer at a time. All members'
 * together bound what the exchange and the experts' scratch take. */
int sh_expert_part_rows(int max_rows, int members);
/* The same for one of the members that divide a stage. */
size_t sh_weights_estimate_share(const sh_config *c, sh_mode mode, sh_share s, int first, int last);
/* The configuration as one of these members sees it: every layer as sh_share_layer says, the rest unchanged. Its KV
 * pages, rows that cross cuts and scratch follow from it as from any other. */
void sh_config_share(const sh_config *c, sh_share s, sh_config *out);

#endif
