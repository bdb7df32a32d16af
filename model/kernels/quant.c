/* Formats of quantised weights: scales, codes, packing. Plain C; runs at load. See quant.h. */
#include "model/kernels/quant.h"

#include <string.h>

float sh_half_to_float(uint16_t h) {
    _Float16 v;
    memcpy(&v, &h, sizeof v);
    return (float)v;
}

uint16_t sh_float_to_half(float f) {
    _Float16 v = (_Float16)f;
    uint16_t h;
    memcpy(&h, &v, sizeof h);
    return h;
}

static float from_bf16(uint16_t b) {
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* Puts the codes of output o (0 … 31) of a block in place. */
static void place_codes(sh_wtype t, uint8_t *codes, int o, const uint8_t *code) {
    uint8_t *half = codes + (o / 16) * 64 + (o % 16) * 4;
    if (t == SH_W_Q8) {
        for (int i = 0; i < SH_Q8_GROUP; i++) half[i / 4 * 128 + i % 4] = code[i];
        return;
    }
    for (int i = 0; i < SH_Q4_GROUP; i++) {
        uint8_t *at = &half[i / 8 * 128 + i % 4];
        *at = i % 8 < 4 ? code[i] : (uint8_t)(*at | code[i] << 4);
    }
}

void sh_quant_place(sh_wtype t, uint8_t *block, int o, uint16_t scale, const uint8_t *code) {
    memcpy(block + 2 * o, &scale, sizeof scale);
    place_codes(t, block + 2 * SH_PANEL, o, code);
}

/* The block of group g of panel p. */
static void pack_block(const sh_kernels *kn, sh_wtype t, uint8_t *block, const uint16_t *src, size_t ld, int n, int k,
                       int p, int g) {
    int size = sh_wtype_group(t), from = g * size, count = k - from < size ? k - from : size;
    for (int o = 0; o < SH_PANEL; o++) {
        int i = p * SH_PANEL + o;
        float w[SH_Q8_GROUP > SH_Q4_GROUP ? SH_Q8_GROUP : SH_Q4_GROUP] = {0};
        uint8_t code[sizeof w / sizeof *w];
        for (int j = 0; i < n && j < count; j++) w[j] = from_bf16(src[(size_t)i * ld + (size_t)(from + j)]);
        uint16_t scale = t == SH_W_Q8 ? kn->quant_q8(w, code) : kn->quant_q4(w, code);
        sh_quant_place(t, block, o, scale, code);
    }
}

void sh_quant_pack(const sh_kernels *kn, sh_wtype t, void *dst, const uint16_t *src, size_t ld, int n, int k, int p0,
                   int p1) {
    int groups = sh_wtype_groups(t, k);
    for (int p = p0; p < p1; p++)
        for (int g = 0; g < groups; g++)
            pack_block(kn, t, (uint8_t *)dst + ((size_t)p * (size_t)groups + (size_t)g) * sh_wtype_block(t), src, ld, n,
                       k, p, g);
}

static void copy_output_bf16(const uint16_t *from, int o, uint16_t *to, int q, int k) {
    for (int i = 0; i < k; i++) to[i * SH_PANEL + q % 16 * 2 + q / 16] = from[i * SH_PANEL + o % 16 * 2 + o / 16];
}

/* One block: the scale, then four bytes of codes in each 128. */
static void copy_output_block(const uint8_t *from, int o, uint8_t *to, int q, size_t block) {
    const uint8_t *codes = from + 2 * SH_PANEL + o / 16 * 64 + o % 16 * 4;
    uint8_t *here = to + 2 * SH_PANEL + q / 16 * 64 + q % 16 * 4;
    memcpy(to + 2 * q, from + 2 * o, 2);
    for (size_t at = 0; at < block - 2 * SH_PANEL; at += 128) memcpy(here + at, codes + at, 4);
}

void sh_wmat_copy_output(const sh_wmat *from, int i, void *to, int j) {
    size_t panel = sh_wmat_bytes(from->type, SH_PANEL, from->k), block = sh_wtype_block(from->type);
    const uint8_t *a = (const uint8_t *)from->data + (size_t)(i / SH_PANEL) * panel;
    uint8_t *b = (uint8_t *)to + (size_t)(j / SH_PANEL) * panel;
    if (from->type == SH_W_BF16) {
        copy_output_bf16((const uint16_t *)(const void *)a, i % SH_PANEL, (uint16_t *)(void *)b, j % SH_PANEL, from->k);
        return;
    }
    for (int g = 0; g < sh_wtype_groups(from->type, from->k); g++)
        copy_output_block(a + (size_t)g * block, i % SH_PANEL, b + (size_t)g * block, j % SH_PANEL, block);
}

static int read_code(sh_wtype t, const uint8_t *codes, int o, int i) {
    const uint8_t *half = codes + (o / 16) * 64 + (o % 16) * 4;
    if (t == SH_W_Q8) return half[i / 4 * 128 + i % 4] - SH_Q8_ZERO;
    int b = half[i / 8 * 128 + i % 4];
    return (i % 8 < 4 ? b & 15 : b >> 4) - SH_Q4_ZERO;
}

void sh_quant_row(const sh_wmat *w, int i, float *out) {
    int p = i / SH_PANEL, o = i % SH_PANEL, size = sh_wtype_group(w->type), groups = sh_wtype_groups(w->type, w->k);
    for (int k = 0; k < w->k; k++) {
        size_t at = (size_t)p * (size_t)groups + (size_t)(k / size);
        const uint8_t *block = (const uint8_t *)w->data + at * sh_wtype_block(w->type);
        uint16_t scale;
        memcpy(&scale, block + 2 * o, sizeof scale);
        out[k] = sh_half_to_float(scale) * (float)read_code(w->type, block + 2 * SH_PANEL, o, k % size);
    }
}
