/*
 * What it would cost to split the sums of o and down into 8 segments of K that join along a binary tree, so that 1, 2,
 * 4 or 8 ranks could add partial products to the same bytes (docs/decisions/0015). Times the matrices of Gemma 4 31B
 * both ways with the kernels as they are: one sum per output, and 8 products of K/8 with 7 additions. Best of several
 * passes. Not a test.
 *
 *   segments_bench [--threads N] [--passes N]
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "common/clock.h"
#include "common/mem.h"
#include "model/linear.h"

enum { HIDDEN = 5376, SEGMENTS = 8, MAX_ROWS = 512, ROWS = 256 };

typedef struct bench {
    sh_team *team;
    const sh_kernels *kn;
    sh_wmat whole, part[SEGMENTS]; /* the same weights twice: neither form finds the other's in a cache */
    float *x, *y[SEGMENTS];
    int m, k;
} bench;

static void *take(size_t bytes) {
    void *p = NULL;
    if (sh_mem_alloc(bytes, "bench", &p) != SH_OK) exit(1);
    return p;
}

static sh_wmat make(int n, int k) {
    uint32_t *w = take(sh_wmat_bytes(SH_W_BF16, n, k)), s = 1;
    for (size_t i = 0; i < sh_wmat_bytes(SH_W_BF16, n, k) / 4; i++) {
        s = s * 1664525u + 1013904223u;
        w[i] = (s & 0x807f807fu) | 0x3c003c00u;
    }
    return (sh_wmat){.n = n, .k = k, .data = w};
}

/* Rows [r0, r0 + n) of columns [c0, c1): y0 += y1, y2 += y3, …; then y0 += y2, …; then y0 += y4. */
static void join(const bench *b, int r0, int n, int c0, int c1) {
    for (int r = r0; r < r0 + n; r++)
        for (int step = 1; step < SEGMENTS; step *= 2)
            for (int i = 0; i + step < SEGMENTS; i += 2 * step) {
                size_t at = (size_t)r * HIDDEN + (size_t)c0;
                b->kn->add(b->y[i] + at, b->y[i + step] + at, c1 - c0);
            }
}

/* A member's panels, some rows at a time, so that partial sums are joined while they are near. */
static void share(void *arg, int member, int size) {
    const bench *b = arg;
    int lo, hi, k = b->k / SEGMENTS;
    sh_team_share(sh_wmat_panels(HIDDEN), member, size, &lo, &hi);
    for (int r = 0, n; r < b->m; r += n) {
        n = b->m - r < ROWS ? b->m - r : ROWS;
        for (int s = 0; s < SEGMENTS; s++)
            b->kn->gemm(&b->part[s], lo, hi, b->x + (size_t)r * (size_t)b->k + (size_t)(s * k), (size_t)b->k, n,
                        b->y[s] + (size_t)r * HIDDEN, HIDDEN);
        join(b, r, n, lo * SH_PANEL, hi * SH_PANEL);
    }
}

static void one_sum(bench *b) {
    sh_linear(b->team, b->kn, &b->whole, b->x, (size_t)b->k, b->m, b->y[0], HIDDEN);
}

static void eight_sums(bench *b) {
    sh_team_run(b->team, share, b);
}

/* CPU time per thread: other work on the machine does not count. */
static double used(const bench *b) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return ((double)t.tv_sec + 1e-9 * (double)t.tv_nsec) / sh_team_size(b->team);
}

static double best(bench *b, void (*run)(bench *), int passes) {
    double least = 1e9;
    run(b);
    for (int i = 0; i < passes; i++) {
        double t0 = used(b);
        run(b);
        double t = used(b) - t0;
        if (t < least) least = t;
    }
    return least;
}

int main(int argc, char **argv) {
    sh_team_prepare(argv);
    int threads = 1, passes = 10, c;
    static const struct option options[] = {
        {"threads", required_argument, NULL, 't'}, {"passes", required_argument, NULL, 'p'}, {0}};
    while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0) {
        if (c == 't') threads = atoi(optarg);
        if (c == 'p') passes = atoi(optarg);
    }
    bench b = {0};
    if (sh_kernels_select(&b.kn) != SH_OK || sh_team_create(threads, NULL, 0, &b.team) != SH_OK) return 1;
    static const struct {
        const char *name;
        int k;
    } mats[] = {{"o, sliding layers", 8192}, {"o, global layers", 16384}, {"down", 21504}};
    static const int rows[] = {1, 4, 16, 64, 512};
    b.x = take((size_t)MAX_ROWS * 21504 * 4);
    for (size_t i = 0; i < (size_t)MAX_ROWS * 21504; i++) b.x[i] = (float)(i % 251) * 0.008f - 1;
    for (int i = 0; i < SEGMENTS; i++) b.y[i] = take((size_t)MAX_ROWS * HIDDEN * 4);
    printf("%s, %d threads\n%-20s %6s %12s %12s %8s\n", b.kn->isa, threads, "matrix", "rows", "one sum ms", "8 sums ms",
           "cost");
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        b.k = mats[i].k;
        b.whole = make(HIDDEN, b.k);
        for (int s = 0; s < SEGMENTS; s++) b.part[s] = make(HIDDEN, b.k / SEGMENTS);
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            b.m = rows[r];
            int n = rows[r] > 64 ? passes / 3 + 1 : passes;
            double a = best(&b, one_sum, n), e = best(&b, eight_sums, n);
            printf("%-20s %6d %12.3f %12.3f %+7.1f%%\n", mats[i].name, b.m, 1e3 * a, 1e3 * e, 100 * (e / a - 1));
            fflush(stdout);
        }
        sh_mem_free((void *)(uintptr_t)b.whole.data, sh_wmat_bytes(SH_W_BF16, HIDDEN, b.k));
        for (int s = 0; s < SEGMENTS; s++)
            sh_mem_free((void *)(uintptr_t)b.part[s].data, sh_wmat_bytes(SH_W_BF16, HIDDEN, b.k / SEGMENTS));
    }
    return 0;
}
