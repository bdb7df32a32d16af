/* Tensors of Q8_0, Q4_0 and Q6_K blocks (safetensors.h): their values, and packing without a way through bf16. */
#ifndef SH_MODEL_BLOCKS_H
#define SH_MODEL_BLOCKS_H

#include "model/kernels/kernels.h"
#include "model/safetensors.h"

/* Items [from, from + n) of a tensor of blocks: the values as the format defines them, exact in f32. */
void sh_blocks_floats(const sh_tensor *t, int64_t from, int n, float *to);
/* How many of n items lie before the first block whose scale is infinite or not a number; n: there is none. */
int sh_blocks_finite(const sh_tensor *t, int64_t from, int n);
/* Row `row` of a panel of a q8 or q4 matrix from items [from, from + k): Q4_0 into q4 moves scales and codes as they
 * are where `from` begins a block; everything else is quantised anew from the f32 values. panel: its first byte. t
 * NULL: zeros. */
void sh_blocks_pack_row(const sh_kernels *kn, const sh_tensor *t, int64_t from, const sh_wmat *m, uint8_t *panel,
                        int row);

#endif
