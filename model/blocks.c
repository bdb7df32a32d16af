/* Blocks of GGUF: values and packing. See blocks.h. */
#include "model/blocks.h"

#include <string.h>
#include "model/kernels/quant.h"

enum { HALF = SH_GGUF_BLOCK / 2, SUPER_SCALE = 208 /* where the d of a block of Q6_K is */ };

_Static_assert(SH_GGUF_BLOCK == SH_Q4_GROUP && SH_Q4_ZERO == 8, "Q4_0's blocks are those of q4");

static const uint8_t *block_of(const sh_tensor *t, int64_t item, uint16_t *scale) {
    const uint8_t *p = t->data + sh_dtype_bytes(t->dtype, (uint64_t)item);
    memcpy(scale, p, sizeof *scale);
    return p + sizeof *scale;
}

/* Codes of a block of Q4_0, in the order of its items. */
static void read_codes(const uint8_t *q, uint8_t *code) {
    for (int i = 0; i < HALF; i++) {
        code[i] = q[i] & 15;
        code[HALF + i] = q[i] >> 4;
    }
}

/* SH_GGUF_BLOCK items of a block of Q6_K, 256 items in 210 bytes: 128 bytes of low halves of codes, 64 bytes of their
 * upper two bits, 16 scales (i8), d (f16). Each half of the block has 64 and 32 of these bytes for four runs of 32
 * items: run r takes the low (r < 2) or high half of byte 32·(r % 2) + i, and bits 2r, 2r + 1 of byte i. A value is
 * d · scale · (code − 32): 11, 7 and 5 bits, which f32 holds. */
static void read_super(const sh_tensor *t, int64_t item, float *to) {
    const uint8_t *p = t->data + sh_dtype_bytes(t->dtype, (uint64_t)item);
    int at = (int)(item % SH_GGUF_SUPER), half = at / 128, r = at % 128 / SH_GGUF_BLOCK;
    const uint8_t *low = p + 64 * half + 32 * (r % 2), *high = p + 128 + 32 * half;
    const int8_t *scale = (const int8_t *)p + 192 + at / 16;
    uint16_t d;
    memcpy(&d, p + SUPER_SCALE, sizeof d);
    float f = sh_half_to_float(d);
    for (int i = 0; i < SH_GGUF_BLOCK; i++) {
        int code = (r < 2 ? low[i] & 15 : low[i] >> 4) | (high[i] >> 2 * r & 3) << 4;
        to[i] = f * (float)scale[i / 16] * (float)(code - 32);
    }
}

static void read_block(const sh_tensor *t, int64_t item, float *to) {
    if (t->dtype == SH_Q6_K) {
        read_super(t, item, to);
        return;
    }
    uint16_t scale;
    const uint8_t *q = block_of(t, item, &scale);
    float d = sh_half_to_float(scale);
    if (t->dtype == SH_Q8_0) {
        for (int i = 0; i < SH_GGUF_BLOCK; i++) to[i] = d * (float)(int8_t)q[i];
        return;
    }
    uint8_t code[SH_GGUF_BLOCK];
    read_codes(q, code);
    for (int i = 0; i < SH_GGUF_BLOCK; i++) to[i] = d * (float)(code[i] - SH_Q4_ZERO);
}

void sh_blocks_floats(const sh_tensor *t, int64_t from, int n, float *to) {
    for (int i = 0; i < n;) {
        float w[SH_GGUF_BLOCK];
        int skip = (int)((from + i) % SH_GGUF_BLOCK), count = SH_GGUF_BLOCK - skip;
        if (count > n - i) count = n - i;
        read_block(t, from + i - skip, w);
        memcpy(to + i, w + skip, (size_t)count * sizeof *w);
        i += count;
    }
}

int sh_blocks_finite(const sh_tensor *t, int64_t from, int n) {
    int size = sh_dtype_block(t->dtype), at = t->dtype == SH_Q6_K ? SUPER_SCALE : 0;
    for (int i = 0; i < n;) {
        int64_t item = from + i;
        uint16_t d;
        memcpy(&d, t->data + sh_dtype_bytes(t->dtype, (uint64_t)item) + at, sizeof d);
        if ((d & 0x7c00) == 0x7c00) return i;
        i += size - (int)(item % size);
    }
    return n;
}

void sh_blocks_pack_row(const sh_kernels *kn, const sh_tensor *t, int64_t from, const sh_wmat *m, uint8_t *panel,
                        int row) {
    int size = sh_wtype_group(m->type), groups = sh_wtype_groups(m->type, m->k);
    bool moves =
        t && t->dtype == SH_Q4_0 && m->type == SH_W_Q4 && from % SH_GGUF_BLOCK == 0 && m->k % SH_GGUF_BLOCK == 0;
    for (int g = 0; g < groups; g++) {
        uint8_t code[SH_Q8_GROUP > SH_Q4_GROUP ? SH_Q8_GROUP : SH_Q4_GROUP];
        uint16_t scale;
        if (moves) {
            read_codes(block_of(t, from + (int64_t)g * size, &scale), code);
        } else {
            float w[sizeof code] = {0};
            int count = m->k - g * size < size ? m->k - g * size : size;
            if (t) sh_blocks_floats(t, from + (int64_t)g * size, count, w);
            scale = m->type == SH_W_Q8 ? kn->quant_q8(w, code) : kn->quant_q4(w, code);
        }
        sh_quant_place(m->type, panel + (size_t)g * sh_wtype_block(m->type), row, scale, code);
    }
}
