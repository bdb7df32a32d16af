/*
 * Scale and codes of one group of weights: written once in plain C, in loops that compilers turn into vectors, and
 * included by ref.c and by the files of instruction sets, each compiled with its own flags. Every step is exact or
 * rounds once, and sums follow the lanes of kernels.h, so all give the same bits. See quant.h.
 */
#include <math.h>
#include <string.h>
#include "model/kernels/quant.h"

/* The weight of largest magnitude, with its sign; NaN when there is one that is not finite. */
static inline float group_extreme(const float *w, int n) {
    uint32_t top = 0;
    float lo = 0, hi = 0;
    for (int i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, w + i, sizeof u);
        u &= 0x7fffffffu;
        top = u > top ? u : top;
        lo = w[i] < lo ? w[i] : lo;
        hi = w[i] > hi ? w[i] : hi;
    }
    return top >= 0x7f800000u ? NAN : -lo > hi ? lo : hi;
}

static inline uint16_t group_zero(int n, int zero, float scale, uint8_t *code) {
    memset(code, zero, (size_t)n);
    return sh_float_to_half(scale);
}

static inline float group_code(float w, float inv, float lo, float hi) {
    float q = rintf(w * inv);
    q = q < lo ? lo : q;
    return q > hi ? hi : q;
}

static uint16_t group_q8(const float *w, uint8_t *code) {
    float big = fabsf(group_extreme(w, SH_Q8_GROUP));
    if (!(big >= 0x1p-24f)) return group_zero(SH_Q8_GROUP, SH_Q8_ZERO, isnan(big) ? NAN : 0, code);
    uint16_t half = sh_float_to_half(big / 127);
    if (sh_half_to_float(half) * 127 < big) half++; /* the next larger: the largest weight must not be clamped */
    float d = sh_half_to_float(half), inv = 1 / d;
    if (isinf(d)) return group_zero(SH_Q8_GROUP, SH_Q8_ZERO, NAN, code);
    for (int i = 0; i < SH_Q8_GROUP; i++) code[i] = (uint8_t)((int)group_code(w[i], inv, -127, 127) + SH_Q8_ZERO);
    return half;
}

/* Codes q, less their zero point, with scale d; returns the squared error. */
static inline float group_try(const float *w, float d, float *q) {
    float lane[SH_LANES], inv = 1 / d;
    for (int i = 0; i < SH_Q4_GROUP; i++) q[i] = group_code(w[i], inv, -SH_Q4_ZERO, SH_Q4_ZERO - 1);
    for (int i = 0; i < SH_LANES; i++) {
        float a = fmaf(-d, q[i], w[i]), b = fmaf(-d, q[i + SH_LANES], w[i + SH_LANES]);
        lane[i] = fmaf(b, b, a * a);
    }
    for (int step = SH_LANES / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) lane[i] += lane[i + step];
    return lane[0];
}

static uint16_t group_q4(const float *w, uint8_t *code) {
    float big = group_extreme(w, SH_Q4_GROUP), least = INFINITY, best_q[SH_Q4_GROUP] = {0};
    uint16_t best = 0;
    if (!(fabsf(big) >= 0x1p-24f)) return group_zero(SH_Q4_GROUP, SH_Q4_ZERO, isnan(big) ? NAN : 0, code);
    /* The largest weight on code −8, the only one of its magnitude, or on −7 … −1: of these either sign will do. */
    for (int at = -SH_Q4_ZERO; at < 0 && least > 0; at++) {
        float q[SH_Q4_GROUP];
        uint16_t half = sh_float_to_half(big / (float)at);
        float d = sh_half_to_float(half);
        if (d == 0 || isinf(d)) continue;
        float error = group_try(w, d, q);
        if (error >= least) continue;
        least = error;
        best = half;
        memcpy(best_q, q, sizeof q);
    }
    if (isinf(least)) return group_zero(SH_Q4_GROUP, SH_Q4_ZERO, isinf(big / -8) ? NAN : 0, code);
    for (int i = 0; i < SH_Q4_GROUP; i++) code[i] = (uint8_t)((int)best_q[i] + SH_Q4_ZERO);
    return best;
}
