/* Items of tensors as numbers. See values.h. */
#include "model/values.h"

#include <math.h>
#include <string.h>

#include "model/blocks.h"

static float widen_bf16(uint16_t b) {
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static float widen_f16(uint16_t h) {
    int e = h >> 10 & 31, m = h & 1023;
    float f = e == 0 ? ldexpf((float)m, -24) : e < 31 ? ldexpf((float)(m + 1024), e - 25) : m ? NAN : INFINITY;
    return h >> 15 ? -f : f;
}

void sh_values_floats(const sh_tensor *t, int64_t from, int n, float *to) {
    if (sh_dtype_is_blocks(t->dtype)) {
        sh_blocks_floats(t, from, n, to);
        return;
    }
    const uint8_t *p = t->data + sh_dtype_bytes(t->dtype, (uint64_t)from);
    if (t->dtype == SH_F32) {
        memcpy(to, p, (size_t)n * 4);
        return;
    }
    for (int i = 0; i < n; i++) {
        uint16_t x;
        memcpy(&x, p + 2 * (size_t)i, 2);
        to[i] = t->dtype == SH_BF16 ? widen_bf16(x) : widen_f16(x);
    }
}

int sh_values_bf16(const sh_tensor *t, int64_t from, int n, uint16_t *to) {
    if (t->dtype == SH_BF16) {
        memcpy(to, t->data + 2 * (size_t)from, 2 * (size_t)n);
        return n;
    }
    for (int i = 0; i < n; i++) {
        float f;
        uint32_t u;
        sh_values_floats(t, from + i, 1, &f);
        memcpy(&u, &f, 4);
        if (u & 0xffff && !isnan(f)) return i;
        to[i] = (uint16_t)(u >> 16) | (isnan(f) ? 0x40 : 0);
    }
    return n;
}
