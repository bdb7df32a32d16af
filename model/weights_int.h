/*
 * What the files that load weights share: weights.c resolves tensors and lists the jobs, weights_pack.c does one,
 * weights_shared.c does those of a member that loads together with others, weights_supply.c hands out one at a time.
 */
#ifndef SH_MODEL_WEIGHTS_INT_H
#define SH_MODEL_WEIGHTS_INT_H

#include "model/packed.h"
#include "model/peers.h"
#include "model/safetensors.h"
#include "model/weights.h"

typedef struct sh_weights_impl {
    sh_tensors *tensors;
    sh_packed *packed;                  /* NULL: weights are in the block */
    const sh_tensor *embed, *ple_table; /* kept mapped for look-ups */
    void *block;
    size_t block_bytes;
    sh_wmat *expert;
} sh_weights_impl;

/* Rows that are taken head by head, where a part's KV heads are not one run (sh_share_kv_head). */
typedef struct sh_head_map {
    const sh_layer *layer; /* NULL: rows follow each other */
    sh_share share;
} sh_head_map;

/* One thing to fill: a vector (to) or a packed matrix (mat) from the rows of up to two tensors. */
typedef struct sh_load_job {
    const sh_tensor *t[2];
    int64_t row[2]; /* first row taken of each */
    int n[2], k;
    int col, width; /* first item taken of each row; items of a row (0: k) */
    sh_head_map heads;
    float *to;
    const sh_wmat *mat;
    int layer; /* that it is for; −1: none */
} sh_load_job;

typedef struct sh_loader {
    const char *dir, *prefix;
    const sh_config *c;
    sh_weights *w;
    const sh_kernels *kn;
    sh_tensors *tensors;
    bool rounds;          /* blocks of GGUF to bf16; else what bf16 cannot hold is refused */
    bool *used;           /* per tensor of the set */
    sh_loading *loading;  /* NULL: nothing is counted */
    sh_load_peers *peers; /* NULL: alone */
    bool lent;            /* a peer may still read the weights although loading failed: their memory must stay */
    int layer;            /* that jobs are made for; −1: none */
    sh_load_job *jobs;
    int n_jobs, cap;
    char name[512]; /* of the last look-up */
} sh_loader;

/* ---- weights.c */
sh_status sh_loader_allocate(sh_weights *w); /* the tables, not the block */
sh_status sh_loader_open(sh_loader *l);      /* for the tensors that are set */
/* Resolves and checks all tensors; jobs are those of the layers of l->w. */
sh_status sh_loader_resolve(sh_loader *l);
/* The place of a tensor in its set. */
int sh_loader_index(const sh_tensors *t, const sh_tensor *x);

/* ---- weights_pack.c */
/* Panels [first, last) of a job's matrix → to. SH_EFORMAT, naming tensor and item: a weight is no finite number. */
sh_status sh_load_pack(const sh_loader *l, const sh_load_job *j, sh_team *team, int first, int last, uint8_t *to);
/* All of a job, to where it belongs. */
sh_status sh_load_run(const sh_loader *l, const sh_load_job *j, sh_team *team);
/* The first n items of a tensor as numbers, all of them finite. */
sh_status sh_load_vector(const char *dir, const sh_tensor *t, int n, float *to);
/* Packed: the source's pages need not stay in this process. */
void sh_load_let_go(const sh_load_job *j);
/* Advice on the pages that lie wholly inside a range: only a hint. */
void sh_load_advise(const uint8_t *data, size_t bytes, int advice);
/* Of the files, for rows [r0, r1) of a matrix, or for a vector. */
uint64_t sh_load_bytes(const sh_load_job *j, int r0, int r1);

/* ---- weights_shared.c */
/* With peers: fills everything together with them. st: how preparing went, with its error text. Collective: fails on
 * all members where one fails. */
sh_status sh_load_together(sh_loader *l, sh_status st, sh_team *team);

#endif
