/*
 * Kernels for AVX2 with FMA: sixteen lanes in two registers. Same bits as ref.c (kernels.h). gemm and scores are here;
 * the other entries are rows.h.
 */
#include "model/kernels/vec256.h"

#define SH_WS_ROWS 3
#define SH_WS_VECS 2
#define SH_WS_MANY 2
#include "model/kernels/rows.h"

#define FEW_ROWS    2    /* up to here weights are streamed once */
#define TILE_ROWS   6    /* 12 sums of half a panel, two weight registers, one broadcast */
#define TILE_STRIDE 8    /* of packed rows */
#define K_BLOCK     256  /* inputs per pass: 16 KiB of a panel and 6 KiB of packed rows stay in L1 */
#define PANEL_BLOCK 12   /* panels whose K_BLOCK stays in L2 while all rows pass */
#define AHEAD       2048 /* bytes that are fetched into L1, and */
#define FAR         8192 /* into L2 */

SH_INLINE __m256i load8(const uint32_t *p) {
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}
SH_INLINE __m256 widen_lo(__m256i u) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
}
SH_INLINE __m256 widen_hi(__m256i u) {
    return _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32((int)0xffff0000u)));
}

/* Stores the first n (≤ 0: none, ≥ 8: all) of eight lanes. */
SH_INLINE void store8(float *y, __m256 a, int n) {
    if (n >= 8) {
        _mm256_storeu_ps(y, a);
    } else if (n > 0) {
        _mm256_maskstore_ps(y, lanes8(n), a);
    }
}
SH_INLINE __m256 load8_n(const float *y, int n) {
    return n >= 8 ? _mm256_loadu_ps(y) : n > 0 ? _mm256_maskload_ps(y, lanes8(n)) : _mm256_setzero_ps();
}

/* ---- few rows: bound by memory ----------------------------------------------------------------------------------- */

/* `rows` rows times `panels` neighbouring panels over all of k; rows · panels ≤ 3. */
SH_INLINE void stream_tile(const sh_wmat *w, int p, int panels, const float *x, size_t ldx, int rows, float *y,
                           size_t ldy) {
    size_t k = (size_t)w->k;
    const uint32_t *d = w->data + (size_t)p * k * SH_LANES;
    __m256 acc[FEW_ROWS][2][4]; /* outputs 0–7, 8–15, 16–23, 24–31 */
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 8
        for (int i = 0; i < panels * 4; i++) acc[r][i / 4][i % 4] = _mm256_setzero_ps();
    }
    for (size_t kk = 0; kk < k; kk++) {
#pragma GCC unroll 2
        for (int i = 0; i < panels; i++) {
            const uint32_t *q = d + ((size_t)i * k + kk) * SH_LANES;
            _mm_prefetch((const char *)q + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)q + FAR, _MM_HINT_T1);
            __m256i u = load8(q), v = load8(q + 8);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                __m256 b = _mm256_set1_ps(x[(size_t)r * ldx + kk]);
                acc[r][i][0] = _mm256_fmadd_ps(b, widen_lo(u), acc[r][i][0]);
                acc[r][i][1] = _mm256_fmadd_ps(b, widen_lo(v), acc[r][i][1]);
                acc[r][i][2] = _mm256_fmadd_ps(b, widen_hi(u), acc[r][i][2]);
                acc[r][i][3] = _mm256_fmadd_ps(b, widen_hi(v), acc[r][i][3]);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < panels * 4; i++) {
        int first = (p + i / 4) * SH_PANEL + i % 4 * 8;
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) store8(y + (size_t)r * ldy + first, acc[r][i / 4][i % 4], w->n - first);
    }
}

SH_INLINE void stream_rows(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int rows, int panels, float *y,
                           size_t ldy) {
    int p = p0;
    for (; p + panels <= p1; p += panels) stream_tile(w, p, panels, x, ldx, rows, y, ldy);
    for (; p < p1; p++) stream_tile(w, p, 1, x, ldx, rows, y, ldy);
}

static void gemm_few(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int m, float *y, size_t ldy) {
    switch (m) {
    case 1:
        stream_rows(w, p0, p1, x, ldx, 1, 2, y, ldy);
        break;
    case 2:
        stream_rows(w, p0, p1, x, ldx, 2, 1, y, ldy);
        break;
    default:
        break;
    }
}

/* ---- many rows: bound by arithmetic ------------------------------------------------------------------------------ */

/* `rows` packed rows (xt[kk · TILE_STRIDE + r]) times one K block of half a panel (8 words of each 16: outputs h·8 …
 * and 16 + h·8 …, of which lo and hi exist); the sums wait in y between blocks. `ahead`: bytes to the weights that come
 * next, fetched meanwhile; 0 when they are near already. */
SH_INLINE void block_tile(const uint32_t *d, const float *xt, int kb, int rows, float *y, size_t ldy, int lo, int hi,
                          bool first, size_t ahead) {
    __m256 acc[TILE_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        acc[r][0] = first ? _mm256_setzero_ps() : load8_n(y + (size_t)r * ldy, lo);
        acc[r][1] = first ? _mm256_setzero_ps() : load8_n(y + (size_t)r * ldy + 16, hi);
    }
    for (int kk = 0; kk < kb; kk++, d += SH_LANES, xt += TILE_STRIDE) {
        _mm_prefetch((const char *)d + ahead, _MM_HINT_T0);
        __m256i u = load8(d);
        __m256 a = widen_lo(u), c = widen_hi(u);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m256 b = _mm256_set1_ps(xt[r]);
            acc[r][0] = _mm256_fmadd_ps(b, a, acc[r][0]);
            acc[r][1] = _mm256_fmadd_ps(b, c, acc[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        store8(y + (size_t)r * ldy, acc[r][0], lo);
        store8(y + (size_t)r * ldy + 16, acc[r][1], hi);
    }
}

static void block_rows(int rows, const uint32_t *d, const float *xt, int kb, float *y, size_t ldy, int n, bool first,
                       size_t ahead) {
    for (int h = 0; h < 16; h += 8) { /* n: outputs of the panel that exist */
        int lo = n - h, hi = n - h - 16;
#define TILE(c)                                                                                                        \
    case c:                                                                                                            \
        block_tile(d + h, xt, kb, c, y + h, ldy, lo, hi, first, ahead);                                                \
        break;
        switch (rows) { TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) default : break; }
#undef TILE
    }
}

static void gemm_many(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int m, float *y, size_t ldy) {
    float xt[K_BLOCK * TILE_STRIDE] __attribute__((aligned(64)));
    int tiles = (m + TILE_ROWS - 1) / TILE_ROWS; /* as even as possible, so that no short tile is left over */
    for (int k0 = 0; k0 < w->k; k0 += K_BLOCK) {
        int kb = w->k - k0 < K_BLOCK ? w->k - k0 : K_BLOCK;
        for (int t = 0; t < tiles; t++) {
            int r0 = (int)((long)m * t / tiles), rows = (int)((long)m * (t + 1) / tiles) - r0;
            pack_rows(xt, TILE_STRIDE, x + (size_t)r0 * ldx + (size_t)k0, ldx, rows, kb);
            for (int p = p0; p < p1; p++) {
                block_rows(rows, w->data + ((size_t)p * (size_t)w->k + (size_t)k0) * SH_LANES, xt, kb,
                           y + (size_t)r0 * ldy + (size_t)p * SH_PANEL, ldy, w->n - p * SH_PANEL, k0 == 0,
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

#define KEYS      4  /* keys at once for one row: eight sums */
#define KEY_BLOCK 12 /* keys that stay in L1 while all rows pass: 24 KiB at 512 wide heads */

/* One row times four keys from number j0, of which the first `some` exist; the rest read the last one again. */
SH_INLINE void score_tile(float *s, const float *q, const void *k, bool bf16, int j0, int some, int hd) {
    v16 acc[KEYS] = {v_zero(), v_zero(), v_zero(), v_zero()};
    size_t at[KEYS];
    for (int j = 0; j < KEYS; j++) at[j] = (size_t)(j0 + (j < some ? j : some - 1)) * (size_t)hd;
    int d = 0;
    for (; d + SH_LANES <= hd; d += SH_LANES) {
        v16 a = v_load(q + d);
#pragma GCC unroll 4
        for (int j = 0; j < KEYS; j++) acc[j] = v_fma(a, v_stored(k, at[j] + (size_t)d, bf16, SH_LANES), acc[j]);
    }
    if (d < hd) {
        v16 a = v_load_n(q + d, hd - d);
#pragma GCC unroll 4
        for (int j = 0; j < KEYS; j++)
            acc[j] = v_fma_n(a, v_stored(k, at[j] + (size_t)d, bf16, hd - d), acc[j], hd - d);
    }
    __m256 e[KEYS];
#pragma GCC unroll 4
    for (int j = 0; j < KEYS; j++) e[j] = _mm256_add_ps(acc[j].a, acc[j].b);
    __m128 sums = join4(e);
    if (some == KEYS) {
        _mm_storeu_ps(s, sums);
    } else {
        _mm_maskstore_ps(s, _mm256_castsi256_si128(lanes8(some)), sums);
    }
}

SH_INLINE void score_keys(float *s, size_t lds, const float *q, size_t ldq, int rows, const void *k, bool bf16,
                          int keys, int hd) {
    for (int j0 = 0; j0 < keys; j0 += KEY_BLOCK) {
        int end = keys - j0 < KEY_BLOCK ? keys : j0 + KEY_BLOCK;
        for (int r = 0; r < rows; r++) {
            for (int j = j0; j < end; j += KEYS) {
                score_tile(s + (size_t)r * lds + j, q + (size_t)r * ldq, k, bf16, j, end - j < KEYS ? end - j : KEYS,
                           hd);
            }
        }
    }
}

static void x86_scores(float *s, size_t lds, const float *q, size_t ldq, int rows, const float *k, int keys, int hd) {
    score_keys(s, lds, q, ldq, rows, k, false, keys, hd);
}

static void x86_scores_bf16(float *s, size_t lds, const float *q, size_t ldq, int rows, const uint16_t *k, int keys,
                            int hd, const uint16_t *next) {
    sh_prefetch(next, (size_t)keys * (size_t)hd * sizeof *next);
    score_keys(s, lds, q, ldq, rows, k, true, keys, hd);
}

void sh_kernels_fill_avx2(sh_kernels *t) {
    fill_rows(t);
    t->gemm = x86_gemm;
    t->scores = x86_scores;
    t->scores_bf16 = x86_scores_bf16;
    t->plain_rows = 4;
}
