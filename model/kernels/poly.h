/*
 * Constants of the elementary functions, shared by every instruction set so that all evaluate the same polynomial. The
 * order of operations is defined by ref.c; nothing here computes.
 */
#ifndef SH_MODEL_KERNELS_POLY_H
#define SH_MODEL_KERNELS_POLY_H

/* exp(x) = 2^n · (1 + p), x = n·ln 2 + r, |r| ≤ ln 2 / 2, p = r + r²·(c2 + c3·r + … + c6·r⁴), Chebyshev fit of
 * degree 4. */
#define SH_EXP_MIN -104.0f /* below: 0; the smallest denormal is exp(−103.28) */
#define SH_EXP_MAX 89.0f   /* above: infinity */
/* Below it sh_weightf is 0: 2^−92 of the largest term is far below what a sum of them can show, and neither weights nor
 * their products with values become subnormal, on which some CPUs spend a hundred cycles each. */
#define SH_WEIGHT_MIN -64.0f
#define SH_LOG2E      0x1.715476p+0f
#define SH_LN2_HI     0x1.62ep-1f /* 12 significant bits: n · SH_LN2_HI is exact */
#define SH_LN2_LO     0x1.0bfbe8p-15f
#define SH_EXP_C2     0.5f
#define SH_EXP_C3     0x1.5554dep-3f
#define SH_EXP_C4     0x1.55551ap-5f
#define SH_EXP_C5     0x1.120b64p-7f
#define SH_EXP_C6     0x1.6d10fep-10f
#define SH_ROUND_F    0x1.8p23f /* adding and subtracting it rounds |x| < 2²² to an integer, ties to even */

#define SH_TANH_MAX 20.0f /* of 2·|x|: tanh(10) is 1 in f32 */

/* gelu_tanh(x) = x / (1 + exp(w · (x + 0.044715·x³))), w = −2·sqrt(2/π): the tanh form rewritten without cancellation.
 */
#define SH_GELU_W -0x1.988454p+0f
#define SH_GELU_C 0x1.6e4e26p-5f

/* sin and cos: x = k·π/2 + r in double, |r| ≤ π/4; Taylor series to r¹¹ and r¹². Above SH_TRIG_BIG: by bits of 2/π. */
#define SH_TRIG_BIG    0x1p28f
#define SH_TWO_OVER_PI 0x1.45f306dc9c883p-1
#define SH_PIO2_HI     0x1.921fb54442d18p+0
#define SH_PIO2_LO     0x1.1a62633145c07p-54
#define SH_ROUND_D     0x1.8p52
#define SH_SIN_3       -0x1.5555555555555p-3
#define SH_SIN_5       0x1.1111111111111p-7
#define SH_SIN_7       -0x1.a01a01a01a01ap-13
#define SH_SIN_9       0x1.71de3a556c734p-19
#define SH_SIN_11      -0x1.ae64567f544e4p-26
#define SH_COS_2       -0.5
#define SH_COS_4       0x1.5555555555555p-5
#define SH_COS_6       -0x1.6c16c16c16c17p-10
#define SH_COS_8       0x1.a01a01a01a01ap-16
#define SH_COS_10      -0x1.27e4fb7789f5cp-22
#define SH_COS_12      0x1.1eed8eff8d898p-29

#endif
