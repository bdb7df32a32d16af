/*
 * Kernels for AVX-512 (F, BW, DQ, VL): sixteen lanes in one register. Same bits as ref.c (kernels.h). gemm and scores
 * are here; the other entries are rows.h.
 */
#include "model/kernels/vec512.h"

#define SH_WS_ROWS 4
#define SH_WS_VECS 4
#define SH_WS_MANY 8 /* rows of values in bf16, two vectors at a time */
#include "model/kernels/rows.h"

#define FEW_ROWS    6    /* up to here weights are streamed once, whole panels at a time; measured on Zen 5 */
#define TILE_ROWS   12   /* 24 sums, two weight registers, one broadcast */
#define K_BLOCK     256  /* inputs per pass: 16 KiB of a panel and 12 KiB of packed rows stay in L1 */
#define PANEL_BLOCK 24   /* panels whose K_BLOCK stays in L2 while all rows pass */
#define AHEAD       2048 /* bytes that are fetched into L1, and */
#define FAR         8192 /* into L2 */

/* Outputs of one panel that exist: masks of its low and high half. */
typedef struct halves {
    __mmask16 lo, hi;
} halves;

static halves panel_masks(const sh_wmat *w, int p) {
    int n = w->n - p * SH_PANEL;
    return (halves){n >= 16 ? 0xffff : lanes(n), n >= 32 ? 0xffff : n > 16 ? lanes(n - 16) : 0};
}

SH_INLINE __m512 widen_lo(__m512i u) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
}
SH_INLINE __m512 widen_hi(__m512i u) {
    return _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32((int)0xffff0000u)));
}

/* ---- few rows: bound by memory ----------------------------------------------------------------------------------- */

/* `rows` rows times `panels` neighbouring panels over all of k. */
SH_INLINE void stream_tile(const sh_wmat *w, int p, int panels, const float *x, size_t ldx, int rows, float *y,
                           size_t ldy) {
    size_t k = (size_t)w->k;
    const uint32_t *d = w->data + (size_t)p * k * SH_LANES;
    __m512 acc[FEW_ROWS][4][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) acc[r][i][0] = acc[r][i][1] = _mm512_setzero_ps();
    }
    for (size_t kk = 0; kk < k; kk++) {
        __m512 b[FEW_ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) b[r] = _mm512_set1_ps(x[(size_t)r * ldx + kk]);
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            const uint32_t *q = d + ((size_t)i * k + kk) * SH_LANES;
            _mm_prefetch((const char *)q + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)q + FAR, _MM_HINT_T1);
            __m512i u = _mm512_loadu_si512(q);
            __m512 lo = widen_lo(u), hi = widen_hi(u);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                acc[r][i][0] = _mm512_fmadd_ps(b[r], lo, acc[r][i][0]);
                acc[r][i][1] = _mm512_fmadd_ps(b[r], hi, acc[r][i][1]);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
        halves mask = panel_masks(w, p + i);
        float *out = y + (size_t)(p + i) * SH_PANEL;
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            _mm512_mask_storeu_ps(out + (size_t)r * ldy, mask.lo, acc[r][i][0]);
            _mm512_mask_storeu_ps(out + (size_t)r * ldy + 16, mask.hi, acc[r][i][1]);
        }
    }
}

/* At least eight sums at once hide the latency of the multiply-add; several streams keep the prefetchers busy. */
SH_INLINE void stream_rows(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int rows, int panels, float *y,
                           size_t ldy) {
    int p = p0;
    for (; p + panels <= p1; p += panels) stream_tile(w, p, panels, x, ldx, rows, y, ldy);
    for (; p < p1; p++) stream_tile(w, p, 1, x, ldx, rows, y, ldy);
}

static void gemm_few(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int m, float *y, size_t ldy) {
#define ROWS(n, panels)                                                                                                \
    case n:                                                                                                            \
        stream_rows(w, p0, p1, x, ldx, n, panels, y, ldy);                                                             \
        break
    switch (m) {
        ROWS(1, 4);
        ROWS(2, 4);
        ROWS(3, 2);
        ROWS(4, 2);
        ROWS(5, 2);
        ROWS(6, 2);
    default:
        break;
    }
#undef ROWS
}

/* ---- many rows: bound by arithmetic ------------------------------------------------------------------------------ */

/* `rows` packed rows (xt[kk · TILE_ROWS + r]) times one K block of one panel; the sums wait in y between blocks.
 * `ahead`: bytes to the weights that come next, fetched meanwhile; 0 when they are near already. */
SH_INLINE void block_tile(const uint32_t *d, const float *xt, int kb, int rows, float *y, size_t ldy, halves mask,
                          bool first, size_t ahead) {
    __m512 acc[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        if (first) {
            acc[r][0] = acc[r][1] = _mm512_setzero_ps();
        } else {
            acc[r][0] = _mm512_maskz_loadu_ps(mask.lo, y + (size_t)r * ldy);
            acc[r][1] = _mm512_maskz_loadu_ps(mask.hi, y + (size_t)r * ldy + 16);
        }
    }
    for (int kk = 0; kk < kb; kk++, d += SH_LANES, xt += TILE_ROWS) {
        _mm_prefetch((const char *)d + ahead, _MM_HINT_T0);
        __m512i u = _mm512_loadu_si512(d);
        __m512 lo = widen_lo(u), hi = widen_hi(u);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            __m512 b = _mm512_set1_ps(xt[r]);
            acc[r][0] = _mm512_fmadd_ps(b, lo, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(b, hi, acc[r][1]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        _mm512_mask_storeu_ps(y + (size_t)r * ldy, mask.lo, acc[r][0]);
        _mm512_mask_storeu_ps(y + (size_t)r * ldy + 16, mask.hi, acc[r][1]);
    }
}

static void block_rows(int rows, const uint32_t *d, const float *xt, int kb, float *y, size_t ldy, halves mask,
                       bool first, size_t ahead) {
#define TILE(n)                                                                                                        \
    case n:                                                                                                            \
        block_tile(d, xt, kb, n, y, ldy, mask, first, ahead);                                                          \
        break;
    switch (rows) {
        TILE(1)
        TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) default : break;
    }
#undef TILE
}

static void gemm_many(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int m, float *y, size_t ldy) {
    float xt[K_BLOCK * TILE_ROWS] __attribute__((aligned(64)));
    int tiles = (m + TILE_ROWS - 1) / TILE_ROWS; /* as even as possible, so that no short tile is left over */
    for (int k0 = 0; k0 < w->k; k0 += K_BLOCK) {
        int kb = w->k - k0 < K_BLOCK ? w->k - k0 : K_BLOCK;
        for (int t = 0; t < tiles; t++) {
            int r0 = (int)((long)m * t / tiles), rows = (int)((long)m * (t + 1) / tiles) - r0;
            pack_rows(xt, TILE_ROWS, x + (size_t)r0 * ldx + (size_t)k0, ldx, rows, kb);
            for (int p = p0; p < p1; p++) {
                block_rows(rows, w->data + ((size_t)p * (size_t)w->k + (size_t)k0) * SH_LANES, xt, kb,
                           y + (size_t)r0 * ldy + (size_t)p * SH_PANEL, ldy, panel_masks(w, p), k0 == 0,
                           t == 0 ? (size_t)w->k * 64 : 0);
            }
        }
    }
}

static void x86_gemm(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int m, float *y, size_t ldy) {
    if (m <= FEW_ROWS) {
        gemm_few(w, p0, p1, x, ldx, m, y, ldy);
        return;
    }
    for (int p = p0; p < p1; p += PANEL_BLOCK) {
        gemm_many(w, p, p1 - p < PANEL_BLOCK ? p1 : p + PANEL_BLOCK, x, ldx, m, y, ldy);
    }
}

/* ---- scores ------------------------------------------------------------------------------------------------------ */

/* Which of the sixteen sums is that of row r and key j: where its lane in the joined vector is r · keys + j. */
SH_INLINE int sum_of(int r, int keys, int j) {
    int lane = r * keys + j;
    return lane % 4 * 4 + lane / 4;
}

/* `rows` rows times `keys` keys from number j0, rows · keys ≤ 16; the first `some` keys exist, the rest read the last
 * one again. next: asked for meanwhile, unless it is NULL. */
SH_INLINE void score_tile(float *s, size_t lds, const float *q, size_t ldq, int rows, const void *k, bool bf16,
                          const uint16_t *next, unsigned blocks, int j0, int keys, int some, int hd) {
    __m512 acc[SH_LANES];
    size_t at[8];
#pragma GCC unroll 16
    for (int i = 0; i < SH_LANES; i++) acc[i] = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int j = 0; j < keys; j++) at[j] = (size_t)(j0 + (j < some ? j : some - 1)) * (size_t)hd;
    int d = 0;
    for (; d + SH_LANES <= hd; d += SH_LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < keys / 2; i++) { /* 32 values to a line */
            if (next && 2 * i < some)
                ask_line(next, (size_t)((j0 * (hd / SH_LANES) + d / SH_LANES * keys) / 2 + i), blocks);
        }
        __m512 b[8];
#pragma GCC unroll 16
        for (int j = 0; j < keys; j++) b[j] = v_stored(k, at[j] + (size_t)d, bf16, SH_LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512 a = _mm512_loadu_ps(q + (size_t)r * ldq + d);
#pragma GCC unroll 16
            for (int j = 0; j < keys; j++) acc[sum_of(r, keys, j)] = _mm512_fmadd_ps(a, b[j], acc[sum_of(r, keys, j)]);
        }
    }
    if (d < hd) {
        __mmask16 m = lanes(hd - d);
#pragma GCC unroll 16
        for (int j = 0; j < keys; j++) {
            __m512 b = v_stored(k, at[j] + (size_t)d, bf16, hd - d);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                int i = sum_of(r, keys, j);
                acc[i] = _mm512_mask3_fmadd_ps(_mm512_maskz_loadu_ps(m, q + (size_t)r * ldq + d), b, acc[i], m);
            }
        }
    }
    __m512 sums = v_join16(acc);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) /* lanes r · keys and so many from there */
        _mm512_mask_storeu_ps(s + (size_t)r * lds - r * keys, (__mmask16)(lanes(some) << (r * keys)), sums);
}

/* 16 / rows keys at a time. */
SH_INLINE void score_rows(float *s, size_t lds, const float *q, size_t ldq, int rows, const void *k, bool bf16,
                          const uint16_t *next, unsigned blocks, int j0, int keys, int hd) {
    int step = rows > 1 ? SH_LANES / rows : 8;
    for (int j = 0; j < keys; j += step) {
        score_tile(s + j, lds, q, ldq, rows, k, bf16, next, blocks, j0 + j, step, keys - j < step ? keys - j : step,
                   hd);
    }
}

#define KEY_BLOCK 16 /* keys that stay in L1 while all rows pass: 32 KiB at 512 wide heads */

/* `most` rows at a time, then two, then one. */
SH_INLINE void score_block(float *s, size_t lds, const float *q, size_t ldq, int rows, int most, const void *k,
                           bool bf16, const uint16_t *next, unsigned blocks, int j0, int keys, int hd) {
    int r = 0;
    for (; r + most <= rows; r += most)
        score_rows(s + (size_t)r * lds, lds, q + (size_t)r * ldq, ldq, most, k, bf16, next, blocks, j0, keys, hd);
    for (; r + 2 <= rows; r += 2)
        score_rows(s + (size_t)r * lds, lds, q + (size_t)r * ldq, ldq, 2, k, bf16, next, blocks, j0, keys, hd);
    if (r < rows)
        score_rows(s + (size_t)r * lds, lds, q + (size_t)r * ldq, ldq, 1, k, bf16, next, blocks, j0, keys, hd);
}

static void x86_scores(float *s, size_t lds, const float *q, size_t ldq, int rows, const float *k, int keys, int hd) {
    for (int j = 0; j < keys; j += KEY_BLOCK) {
        int n = keys - j < KEY_BLOCK ? keys - j : KEY_BLOCK;
        score_block(s + j, lds, q, ldq, rows, 4, k, false, NULL, 0, j, n, hd);
    }
}

static void x86_scores_bf16(float *s, size_t lds, const float *q, size_t ldq, int rows, const uint16_t *k, int keys,
                            int hd, const uint16_t *next) {
    unsigned blocks = blocks_of((size_t)keys * (size_t)hd * sizeof *k);
    int many = rows - rows % 8; /* with eight rows a key is widened once for all, with four twice */
    score_block(s, lds, q, ldq, many, 8, k, true, next, blocks, 0, keys, hd);
    score_block(s + (size_t)many * lds, lds, q + (size_t)many * ldq, ldq, rows - many, 4, k, true, next, blocks, 0,
                keys, hd);
}

void sh_kernels_fill_avx512(sh_kernels *t) {
    fill_rows(t);
    t->gemm = x86_gemm;
    t->scores = x86_scores;
    t->scores_bf16 = x86_scores_bf16;
    t->plain_rows = 16;
}
