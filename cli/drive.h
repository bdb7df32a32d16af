/*
 * Drives one model with prompts and decode steps of its own making, and counts what it did: what `shoal bench` times.
 * One process, one rank, no coordinator, no sampler: random prompts from a fixed seed, the likeliest token goes on. The
 * batches have the leader's shape: prompts in chunks, of which only the last row is kept, so that layers that read
 * others' K/V skip the rest.
 */
#ifndef SH_CLI_DRIVE_H
#define SH_CLI_DRIVE_H

#include "model/gemma4.h"

typedef struct sh_drive sh_drive;

typedef struct sh_drive_options {
    const char *model_dir;
    const sh_config *config;
    sh_mode mode;
    sh_kv_type kv;
    int first, last; /* layers; where first is above 0, what comes in is random */
    int threads;
    const int *cpus;
    int n_cpus;
    int prompt, generate; /* tokens of a sequence */
    int max_batch;        /* sequences at once */
    int chunk;            /* prompt rows per step */
} sh_drive_options;

/* What a run took and did. */
typedef struct sh_drive_count {
    int tokens;                    /* rows: of the prompt, or decoded */
    int steps;                     /* micro-batches */
    double seconds;                /* of all steps */
    double median;                 /* seconds of the median step */
    double best;                   /* seconds of the quickest step, or of the whole prompt */
    double flops;                  /* floating-point operations, by the formula of docs/performance.md */
    double weight_bytes, kv_bytes; /* that decode steps had to read; 0 for a prompt */
    sh_model_times times;          /* by cause */
} sh_drive_count;

/* Loads the model and reserves everything. */
sh_status sh_drive_create(const sh_drive_options *o, sh_drive **out);
void sh_drive_destroy(sh_drive **d);
sh_model *sh_drive_model(sh_drive *d);

/* Steps as slices, counted from 0 over all that the drive does; NULL: off. Borrowed. */
void sh_drive_set_timeline(sh_drive *d, sh_timeline *t);

/* One prompt, from its first token to the token that follows it. */
sh_status sh_drive_prefill(sh_drive *d, sh_drive_count *out);
/* options.generate steps of `batch` sequences that all begin with the prompt of the last sh_drive_prefill, each with
 * keys and values of its own. */
sh_status sh_drive_decode(sh_drive *d, int batch, sh_drive_count *out);

/* Weight bytes that one step of few rows reads, experts not counted. */
double sh_drive_dense_bytes(const sh_config *c, sh_mode mode, int first, int last);
/* Operations of `rows` rows from position `pos` of which `kept` go through every layer and to the head. */
double sh_drive_flops(const sh_config *c, int first, int last, int pos, int rows, int kept);
/* Bytes of keys and values that a row at position `pos` attends to. */
double sh_drive_kv_bytes(const sh_config *c, sh_kv_type type, int first, int last, int pos);

#endif
