/* Items of a checkpoint's tensors as numbers, whatever type they have there and however they are aligned. */
#ifndef SH_MODEL_VALUES_H
#define SH_MODEL_VALUES_H

#include "model/safetensors.h"

/* Items [from, from + n) of a tensor as f32. */
void sh_values_floats(const sh_tensor *t, int64_t from, int n, float *to);
/* The same as bf16; returns the first item that bf16 cannot hold, or n. NaN counts as held. */
int sh_values_bf16(const sh_tensor *t, int64_t from, int n, uint16_t *to);

#endif
