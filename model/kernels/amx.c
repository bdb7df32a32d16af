/*
 * Products with quantised weights in tiles (AMX-INT8): 16 rows times 16 outputs, exact in 32 bits, a group of inputs at
 * a time. Few rows are left to AVX-512 VNNI. Same bits as ref.c (kernels.h, quant.h).
 */
#include <asm/prctl.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_ROWS   16
#define TILE_PASSES 2 /* one for each half of the panel */
#include "model/kernels/quant_blocks.h"

#define SH_INLINE static inline __attribute__((always_inline))

#define FEW_ROWS  17 /* fewer are left to VNNI */
#define TILE_DATA 18 /* of arch_prctl: the state component that holds tiles */
#define LINE      64 /* bytes of a row of a tile */

/* The tile intrinsics do not tell gcc 12 which memory they read. */
#define SETTLE() __asm__ volatile("" ::: "memory")

static void (*few_rows)(const sh_wmat *, int, int, const sh_qrows *, int, int, float *, size_t);

typedef struct tile_config {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
} tile_config;

/* Integer sums of four groups in turn: one is written out while another is read. */
typedef struct group_sums {
    int32_t s[4][TILE_ROWS][16];
} __attribute__((aligned(64))) group_sums;

/* Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights. */
static void block_begin(sh_wtype t, int rows) {
    const int group = sh_wtype_group(t);
    tile_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.bytes[i] = i == 4 || i == 5 ? (uint16_t)group : LINE;
        c.rows[i] = (uint8_t)(i < 6 ? rows : group / 4);
    }
    SETTLE();
    _tile_loadconfig(&c);
}

#define MULTIPLY(sum, rows, weights)                                                                                   \
    do {                                                                                                               \
        _tile_zero(sum);                                                                                               \
        _tile_loadd(rows, x, (size_t)group);                                                                           \
        _tile_loadd(weights, w, LINE);                                                                                 \
        _tile_dpbssd(sum, rows, weights);                                                                              \
    } while (0)

/* Begins the sums of a group, whose number modulo 4 is i, in tile i. */
SH_INLINE void multiply(int i, const int8_t *x, const int8_t *w, int group) {
    if (i == 0) MULTIPLY(0, 4, 6);
    if (i == 1) MULTIPLY(1, 5, 7);
    if (i == 2) MULTIPLY(2, 4, 6);
    if (i == 3) MULTIPLY(3, 5, 7);
}

SH_INLINE void write_out(int i, group_sums *to) {
    if (i == 0) _tile_stored(0, to->s[0], LINE);
    if (i == 1) _tile_stored(1, to->s[1], LINE);
    if (i == 2) _tile_stored(2, to->s[2], LINE);
    if (i == 3) _tile_stored(3, to->s[3], LINE);
}

SH_INLINE void scale_sums(__m512 acc[TILE_ROWS], int rows, int32_t s[TILE_ROWS][16], const float *x_scale,
                          const float *w_scale) {
    const __m512 d = _mm512_load_ps(w_scale);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        __m512 v = _mm512_cvtepi32_ps(_mm512_load_si512(s[r]));
        acc[r] = _mm512_fmadd_ps(v, _mm512_mul_ps(d, _mm512_set1_ps(x_scale[r])), acc[r]);
    }
}

/* Half h of the panel. */
typedef struct half_run {
    const int8_t *x, *w;
    const float *x_scale, *w_scale;
    const char *next;
    size_t step;
} half_run;

/* Group g, whose number modulo 4 is i: while it is scaled, the next one's sums are written out and those of the one
 * behind it begun. */
SH_INLINE void half_step(half_run *j, int g, int i, int n, __m512 acc[TILE_ROWS], int rows, int group,
                         group_sums *sums) {
    j->x += TILE_ROWS * group;
    j->w += SH_PANEL * group;
    if (g + 2 < n) multiply((i + 2) % 4, j->x + TILE_ROWS * group, j->w + SH_PANEL * group, group);
    if (g + 1 < n) write_out((i + 1) % 4, sums);
    for (const char *end = j->next + j->step; j->next < end; j->next += 64) _mm_prefetch(j->next, _MM_HINT_T0);
    scale_sums(acc, rows, sums->s[i], j->x_scale, j->w_scale);
    j->x_scale += TILE_ROWS;
    j->w_scale += SH_PANEL;
}

SH_INLINE void run_half(const block_tile *j, int h, int rows, int group, group_sums *sums) {
    const int n = j->groups;
    half_run at = {.x = j->code,
                   .w = j->w->code + h * 16 * group,
                   .x_scale = j->scale,
                   .w_scale = j->w->scale[0] + 16 * h,
                   .next = j->next + (size_t)(h * n) * j->step,
                   .step = j->step};
    float(*sum)[SH_PANEL] = j->sum;
    __m512 acc[TILE_ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) acc[r] = _mm512_load_ps(sum[r] + 16 * h);
    SETTLE();
    multiply(0, at.x, at.w, group);
    if (n > 1) multiply(1, at.x + TILE_ROWS * group, at.w + SH_PANEL * group, group);
    write_out(0, sums);
    int g = 0;
    for (; g + 3 < n; g += 4) {
        half_step(&at, g, 0, n, acc, rows, group, sums);
        half_step(&at, g + 1, 1, n, acc, rows, group, sums);
        half_step(&at, g + 2, 2, n, acc, rows, group, sums);
        half_step(&at, g + 3, 3, n, acc, rows, group, sums);
    }
    if (g < n) half_step(&at, g, 0, n, acc, rows, group, sums);
    if (g + 1 < n) half_step(&at, g + 1, 1, n, acc, rows, group, sums);
    if (g + 2 < n) half_step(&at, g + 2, 2, n, acc, rows, group, sums);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) _mm512_store_ps(sum[r] + 16 * h, acc[r]);
}

SH_INLINE void run_tile(const block_tile *j, int rows, int group) {
    group_sums sums;
    run_half(j, 0, rows, group, &sums);
    run_half(j, 1, rows, group, &sums);
}

/* Rows are rounded up to fours: those that are not there are scaled too, and not used. */
static void block_tile_run(sh_wtype t, const block_tile *j, int rows) {
#define ROWS(n)                                                                                                        \
    case n:                                                                                                            \
        t == SH_W_Q8 ? run_tile(j, 4 * (n), SH_Q8_GROUP) : run_tile(j, 4 * (n), SH_Q4_GROUP);                          \
        break;
    switch ((rows + 3) / 4) {
        ROWS(1)
        ROWS(2)
        ROWS(3)
        ROWS(4)
    default:
        break;
    }
#undef ROWS
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

SH_INLINE void unpack_q8(const uint8_t *codes, int8_t *to) {
    const __m512i zero = _mm512_set1_epi8((char)SH_Q8_ZERO); /* code − 128 as a signed byte */
#pragma GCC unroll 4
    for (int u = 0; u < SH_Q8_GROUP / 4; u++)
        for (int h = 0; h < 2; h++)
            _mm512_store_si512(to + h * 16 * SH_Q8_GROUP + u * LINE,
                               _mm512_xor_si512(_mm512_loadu_si512(codes + u * 128 + h * 64), zero));
}

SH_INLINE void unpack_q4(const uint8_t *codes, int8_t *to) {
    const __m512i low = _mm512_set1_epi8(15), zero = _mm512_set1_epi8(SH_Q4_ZERO);
#pragma GCC unroll 4
    for (int u = 0; u < SH_Q4_GROUP / 8; u++)
        for (int h = 0; h < 2; h++) {
            __m512i v = _mm512_loadu_si512(codes + u * 128 + h * 64), top = _mm512_srli_epi16(v, 4);
            int8_t *at = to + h * 16 * SH_Q4_GROUP + u * 2 * LINE;
            _mm512_store_si512(at, _mm512_sub_epi8(_mm512_and_si512(v, low), zero));
            _mm512_store_si512(at + LINE, _mm512_sub_epi8(_mm512_and_si512(top, low), zero));
        }
}

static void block_unpack(sh_wtype t, const uint8_t *block, size_t groups, block_weights *to) {
    int8_t *code = to->code;
    for (size_t g = 0; g < groups; g++, block += sh_wtype_block(t), code += SH_PANEL * sh_wtype_group(t)) {
        for (int h = 0; h < 2; h++) {
            __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)(block + 32 * h));
            _mm512_store_ps(to->scale[g] + 16 * h, _mm512_cvtph_ps(half));
        }
        if (t == SH_W_Q8)
            unpack_q8(block + 2 * SH_PANEL, code);
        else
            unpack_q4(block + 2 * SH_PANEL, code);
    }
}

static void amx_gemm_q(const sh_wmat *w, int p0, int p1, const sh_qrows *x, int r0, int m, float *y, size_t ldy) {
    if (m < FEW_ROWS) {
        few_rows(w, p0, p1, x, r0, m, y, ldy);
        return;
    }
    block_gemm(w, p0, p1, x, r0, m, y, ldy);
    _tile_release();
}

bool sh_kernels_amx_usable(void) {
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}

void sh_kernels_fill_amx(sh_kernels *t) {
    if (!few_rows) few_rows = t->gemm_q;
    t->gemm_q = amx_gemm_q;
}
