/* What the two writers of make_shape.c share: the shape, its tensors and the random numbers that fill them. */
#ifndef SH_TESTS_BENCH_SHAPE_H
#define SH_TESTS_BENCH_SHAPE_H

#include <stddef.h>
#include <stdint.h>

typedef struct shape {
    const char *name;
    int layers, global_every, hidden, heads, kv, global_kv, hd, global_hd, ff, window, ple, shared, experts, top_k, eff;
    int k_eq_v, vocab;
} shape;

typedef struct tensor {
    char name[96];     /* as Hugging Face has it */
    size_t rows, cols; /* rows 0: a vector of cols */
    size_t experts;    /* a stack of matrices when > 0 */
    float scale, mean; /* of uniform values in mean ± scale */
} tensor;

int is_global(const shape *s, int layer);
size_t items(const tensor *t);
float noise(void); /* uniform in [-1, 1) */
uint16_t bf16(float x);

/* Writes DIR/model.gguf with matrices of that type; 0 and errno when it cannot. */
int write_gguf(const shape *s, const tensor *list, int n, const char *dir, const char *type);

#endif
