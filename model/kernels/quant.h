/*
 * Quantised weights. A matrix [n, k] in panels of 32 outputs (kernels.h), each panel in groups along k, each group in
 * one block: 32 scales in IEEE half precision, then unsigned codes, outputs side by side as the integer dot products
 * want them.
 *
 *   q8  groups of SH_Q8_GROUP; w ≈ scale · (code − 128), code 1 … 255. For each four inputs 4u … 4u+3 64 bytes for
 *       outputs 0–15 (byte 4·o + j: input 4u+j), then 64 for outputs 16–31.
 *   q4  groups of 32, the blocks of Q4_0 (w = scale · (code − 8), code 0 … 15), which is what Gemma's checkpoints from
 *       quantisation-aware training were trained for. For each eight inputs 8u … 8u+7 64 bytes for outputs 0–15 (byte
 *       4·o + j: input 8u+j in the low half, input 8u+4+j in the high half), then 64 for outputs 16–31.
 */
#ifndef SH_MODEL_KERNELS_QUANT_H
#define SH_MODEL_KERNELS_QUANT_H

#include "model/kernels/kernels.h"

#define SH_Q8_ZERO 128
#define SH_Q4_ZERO 8

float sh_half_to_float(uint16_t h);
uint16_t sh_float_to_half(float f); /* to nearest even */

/* Packs a row-major bf16 matrix [n, k] with row stride ld (elements) into panels [p0, p1) of dst. */
void sh_quant_pack(const sh_kernels *kn, sh_wtype t, void *dst, const uint16_t *src, size_t ld, int n, int k, int p0,
                   int p1);
/* Output i of a packed matrix of any type → output j of another of as many inputs, whose panels begin at `to`: bits. */
void sh_wmat_copy_output(const sh_wmat *from, int i, void *to, int j);
/* Puts scale and codes of output o (0 … 31) into the block of a group of a panel. */
void sh_quant_place(sh_wtype t, uint8_t *block, int o, uint16_t scale, const uint8_t *code);
/* Row i of a packed matrix as f32 [k]. */
void sh_quant_row(const sh_wmat *w, int i, float *out);

#endif
