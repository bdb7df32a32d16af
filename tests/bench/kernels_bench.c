/*
 * Times the kernels on the shapes of Gemma 4 E2B (hidden 1536, 8 heads of 256 or 512, feed-forward 6144 or 12288) and
 * prints each as a share of what the cores can do (model/ceiling.h). Random weights; times are the best of several
 * passes, because other work on the machine only ever adds to them. Not a test: nothing here can fail but memory.
 *
 *   kernels_bench [--threads N] [--isa NAME] [--passes N] [--rows M,M,…] [--type bf16|q8|q4]
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "common/clock.h"
#include "common/mem.h"
#include "model/ceiling.h"
#include "model/linear.h"

enum { HIDDEN = 1536, HEADS = 8, MAX_ROWS = 512, WIDEST = 12288, LAYERS = 4 };

typedef struct layer {
    int hd, ff;
    sh_wmat q, k, v, o, gate, up, down;
} layer;

typedef struct bench {
    sh_team *team;
    const sh_kernels *kn;
    sh_ceiling lim;
    int passes;
    layer layers[LAYERS]; /* 420 MB: no cache holds them */
    sh_wtype type;
    double weights, bytes; /* elements, padding included; bytes of them */
    float *x, *a, *b, *c;  /* [MAX_ROWS, WIDEST] */
} bench;

/* CPU time used, per thread: what the wall clock would show on a machine with nothing else to do, as long as no member
 * sleeps (waiting members spin, which counts). */
static double used(const bench *b) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return ((double)t.tv_sec + 1e-9 * (double)t.tv_nsec) / sh_team_size(b->team);
}

static sh_status make_wmat(bench *b, int n, int k, sh_wmat *out) {
    void *p;
    size_t bytes = sh_wmat_bytes(b->type, n, k);
    SH_TRY(sh_mem_alloc(bytes, "weights", &p));
    uint32_t *w = p, s = 1;
    for (size_t i = 0; i < bytes / 4; i++) {
        s = s * 1664525u + 1013904223u;
        w[i] = b->type == SH_W_BF16 ? (s & 0x807f807fu) | 0x3c003c00u : s; /* about ±0.01 */
    }
    uint8_t *block = p;
    for (size_t i = 0; b->type != SH_W_BF16 && i < bytes; i += sh_wtype_block(b->type))
        for (int o = 0; o < SH_PANEL; o++) memcpy(block + i + 2 * o, (const uint16_t[]){0x1400}, 2); /* 0.001 */
    b->weights += (double)sh_wmat_panels(n) * SH_PANEL * k;
    b->bytes += (double)bytes;
    *out = (sh_wmat){.n = n, .k = k, .type = b->type, .data = w};
    return SH_OK;
}

static sh_status make_layer(bench *b, int hd, int ff, layer *l) {
    l->hd = hd;
    l->ff = ff;
    SH_TRY(make_wmat(b, HEADS * hd, HIDDEN, &l->q));
    SH_TRY(make_wmat(b, hd, HIDDEN, &l->k));
    SH_TRY(make_wmat(b, hd, HIDDEN, &l->v));
    SH_TRY(make_wmat(b, HIDDEN, HEADS * hd, &l->o));
    SH_TRY(make_wmat(b, ff, HIDDEN, &l->gate));
    SH_TRY(make_wmat(b, ff, HIDDEN, &l->up));
    SH_TRY(make_wmat(b, HIDDEN, ff, &l->down));
    return SH_OK;
}

static sh_status make_rows(float **out) {
    void *p;
    SH_TRY(sh_mem_alloc((size_t)MAX_ROWS * WIDEST * 4, "rows", &p));
    float *x = p;
    for (size_t i = 0; i < (size_t)MAX_ROWS * WIDEST; i++) x[i] = (float)(i % 251) * 0.008f - 1;
    *out = x;
    return SH_OK;
}

/* One of the four products of a layer. */
static void run_product(const bench *b, const layer *l, int which, int m) {
    size_t qd = (size_t)(HEADS * l->hd), kd = (size_t)l->hd, ff = (size_t)l->ff;
    switch (which) {
    case 0:
        sh_linear_multi(b->team, b->kn, 3, (const sh_wmat *const[]){&l->q, &l->k, &l->v}, b->x, HIDDEN, m,
                        (float *const[]){b->a, b->b, b->c}, (const size_t[]){qd, kd, kd});
        break;
    case 1:
        sh_linear(b->team, b->kn, &l->o, b->a, qd, m, b->c, HIDDEN);
        break;
    case 2:
        sh_linear_multi(b->team, b->kn, 2, (const sh_wmat *const[]){&l->gate, &l->up}, b->x, HIDDEN, m,
                        (float *const[]){b->a, b->b}, (const size_t[]){ff, ff});
        break;
    default:
        sh_linear(b->team, b->kn, &l->down, b->a, ff, m, b->c, HIDDEN);
    }
}

/* All layers in turn, so that no cache keeps weights from pass to pass; each product counts with its best time. */
static void bench_rows(const bench *b, int m) {
    double wall[LAYERS * 4], cpu[LAYERS * 4], wall_sum = 0, cpu_sum = 0;
    int passes = m > 64 ? (b->passes + 1) / 2 : b->passes;
    for (int i = 0; i < passes * LAYERS * 4; i++) {
        int p = i % (LAYERS * 4);
        double c0 = used(b), t0 = sh_now();
        run_product(b, &b->layers[p / 4], p % 4, m);
        double t = sh_now() - t0, c = used(b) - c0;
        if (i == p || t < wall[p]) wall[p] = t;
        if (i == p || c < cpu[p]) cpu[p] = c;
    }
    for (int p = 0; p < LAYERS * 4; p++) {
        wall_sum += wall[p];
        cpu_sum += cpu[p];
    }
    double gbs = b->bytes / wall_sum * 1e-9, gf = b->weights * 2 * m / wall_sum * 1e-9;
    printf("layers, %3d rows  %8.2f ms  %6.1f GB/s %5.1f %%  %7.1f GFLOP/s %5.1f %%", m, wall_sum * 1e3, gbs,
           100 * gbs / b->lim.read_gbs, gf, 100 * gf / b->lim.fma_gflops);
    if (m > 64) printf(", by CPU time %.1f %%", 100 * gf / b->lim.fma_gflops * wall_sum / cpu_sum);
    printf("\n");
}

/* One thread, one segment of 256 keys, `rows` query rows; work in floating-point operations. */
static void bench_attention(const bench *b, int hd, int rows) {
    enum { KEYS = 256, REPEAT = 20 };
    double scores = 1e30, sums = 1e30, soft = 1e30;
    float *m = b->c, *l = b->c + 4096;
    for (int i = 0; i < b->passes * 4; i++) {
        double t0 = sh_now();
        for (int r = 0; r < REPEAT; r++)
            b->kn->scores(b->a, KEYS, b->x, (size_t)hd, rows, b->b + (size_t)r * KEYS * (size_t)hd, KEYS, hd);
        double t1 = sh_now();
        for (int r = 0; r < rows; r++) b->kn->softmax_part(b->a + r * KEYS, KEYS, m + r, l + r);
        double t2 = sh_now();
        for (int r = 0; r < REPEAT; r++)
            b->kn->weighted_sum(b->c, (size_t)hd, b->a, KEYS, rows, b->b + (size_t)r * KEYS * (size_t)hd, KEYS, hd);
        double t3 = sh_now();
        if (t1 - t0 < scores) scores = t1 - t0;
        if (t2 - t1 < soft) soft = t2 - t1;
        if (t3 - t2 < sums) sums = t3 - t2;
    }
    double work = 2.0 * KEYS * rows * hd * REPEAT * 1e-9, peak = b->lim.fma_gflops / sh_team_size(b->team);
    printf("head %3d, %3d rows  scores %6.1f GFLOP/s %5.1f %%  weighted_sum %6.1f GFLOP/s %5.1f %%  softmax %5.2f "
           "ns/key\n",
           hd, rows, work / scores, 100 * work / scores / peak, work / sums, 100 * work / sums / peak,
           soft * 1e9 / (rows * KEYS));
}

static void bench_elementwise(const bench *b) {
    enum { N = 12288 };
    double gelu = 1e30, norm = 1e30;
    for (int i = 0; i < b->passes * 20; i++) {
        double t0 = sh_now();
        b->kn->gelu_mul(b->c, b->b, b->b + N, N);
        double t1 = sh_now();
        b->kn->rmsnorm(b->c, b->x, b->b, HIDDEN, 1e-6f);
        double t2 = sh_now();
        if (t1 - t0 < gelu) gelu = t1 - t0;
        if (t2 - t1 < norm) norm = t2 - t1;
    }
    printf("gelu_mul %.2f ns/element, rmsnorm of %d: %.2f µs\n", gelu * 1e9 / N, HIDDEN, norm * 1e6);
}

static sh_status run(bench *b, int threads, const char *isa, const char *rows) {
    int cpus[1024];
    for (int i = 0; i < threads && i < 1024; i++) cpus[i] = i;
    SH_TRY(sh_team_create(threads, cpus, threads < 1024 ? threads : 0, &b->team));
    if (isa) {
        SH_TRY(sh_kernels_get(isa, &b->kn));
    } else {
        SH_TRY(sh_kernels_select(&b->kn));
    }
    SH_TRY(sh_team_reserve(b->team, sh_qrows_bytes(SH_W_Q4, WIDEST, MAX_ROWS)));
    SH_TRY(sh_ceiling_measure(b->team, (size_t)512 << 20, &b->lim));
    printf("%d threads, %s; limits: read %.1f GB/s, f32 multiply-add %.0f GFLOP/s\n", threads, b->kn->isa,
           b->lim.read_gbs, b->lim.fma_gflops);
    for (int i = 0; i < LAYERS; i++) SH_TRY(make_layer(b, i % 2 ? 512 : 256, i < 2 ? 6144 : 12288, &b->layers[i]));
    SH_TRY(make_rows(&b->x));
    SH_TRY(make_rows(&b->a));
    SH_TRY(make_rows(&b->b));
    SH_TRY(make_rows(&b->c));
    for (const char *p = rows; *p;) {
        char *end;
        long m = strtol(p, &end, 10);
        if (end == p) break;
        if (m >= 1 && m <= MAX_ROWS) bench_rows(b, (int)m);
        p = *end ? end + 1 : end;
    }
    SH_TRY(make_rows(&b->a)); /* the products grew; attention wants ordinary numbers */
    SH_TRY(make_rows(&b->b));
    for (int hd = 256; hd <= 512; hd += 256) {
        for (int r = 1; r <= 64; r *= 8) bench_attention(b, hd, r);
    }
    bench_elementwise(b);
    return SH_OK;
}

int main(int argc, char **argv) {
    sh_team_prepare(argv);
    static bench b = {.passes = 12};
    static const struct option options[] = {
        {"threads", required_argument, NULL, 't'}, {"isa", required_argument, NULL, 'i'},
        {"passes", required_argument, NULL, 'p'},  {"rows", required_argument, NULL, 'r'},
        {"type", required_argument, NULL, 'w'},    {0}};
    int c, threads = 1;
    const char *isa = NULL, *rows = "1,2,4,6,8,12,16,32,64,512";
    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (c == 't')
            threads = atoi(optarg);
        else if (c == 'i')
            isa = optarg;
        else if (c == 'p')
            b.passes = atoi(optarg);
        else if (c == 'w')
            b.type = strcmp(optarg, "q8") == 0 ? SH_W_Q8 : strcmp(optarg, "q4") == 0 ? SH_W_Q4 : SH_W_BF16;
        else if (c == 'r')
            rows = optarg;
        else
            return 2;
    }
    sh_status st = run(&b, threads, isa, rows);
    if (st != SH_OK) fprintf(stderr, "kernels_bench: %s\n", sh_error_text());
    return st == SH_OK ? 0 : 1; /* memory goes with the process */
}
