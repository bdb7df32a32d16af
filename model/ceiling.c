/* Measures memory reading and f32 multiply-adds of a team. See ceiling.h. */
#include "model/ceiling.h"

#include <stdint.h>
#include <string.h>
#include "common/clock.h"
#include "common/mem.h"

#define TRIES     9
#define SLICES    16      /* timed one by one: short enough to pass between what else the CPUs do */
#define STREAMS   8       /* the most parts that one member reads side by side */
#define FMA_STEPS 400000L /* about a millisecond */
#define CHAINS    16      /* independent sums: more than latency × throughput of any CPU so far */

typedef struct probe {
    const float *data;
    size_t n; /* floats */
    int streams, slice;
    float sink[1024]; /* one per member: results must be used */
} probe;

/* Reads `streams` parts of x side by side. */
static float read_plain(const float *x, size_t n, int streams) {
    float s = 0;
    size_t part = n / (size_t)streams;
    for (size_t i = 0; i < part; i++) {
        for (int k = 0; k < streams; k++) s += x[(size_t)k * part + i];
    }
    return s;
}

static double fma_plain(float *sink) { /* returns operations done */
    float a[CHAINS];
    for (int i = 0; i < CHAINS; i++) a[i] = *sink + (float)i;
    for (long r = 0; r < FMA_STEPS / 16; r++) {
        for (int i = 0; i < CHAINS; i++) a[i] = a[i] * 0.999f + 0.5f;
    }
    for (int i = 0; i < CHAINS; i++) *sink += a[i];
    return (double)(FMA_STEPS / 16) * CHAINS * 2;
}

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx512f"))) static float read_avx512(const float *x, size_t n, int streams) {
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    size_t part = n / (size_t)streams / 64 * 64;
    for (size_t i = 0; i < part; i += 64) {
        for (int k = 0; k < streams; k++) {
            const float *q = x + (size_t)k * part + i;
            s0 = _mm512_add_ps(s0, _mm512_loadu_ps(q));
            s1 = _mm512_add_ps(s1, _mm512_loadu_ps(q + 16));
            s2 = _mm512_add_ps(s2, _mm512_loadu_ps(q + 32));
            s3 = _mm512_add_ps(s3, _mm512_loadu_ps(q + 48));
        }
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
}

__attribute__((target("avx2"))) static float read_avx2(const float *x, size_t n, int streams) {
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    size_t part = n / (size_t)streams / 32 * 32;
    for (size_t i = 0; i < part; i += 32) {
        for (int k = 0; k < streams; k++) {
            const float *q = x + (size_t)k * part + i;
            s0 = _mm256_add_ps(s0, _mm256_loadu_ps(q));
            s1 = _mm256_add_ps(s1, _mm256_loadu_ps(q + 8));
            s2 = _mm256_add_ps(s2, _mm256_loadu_ps(q + 16));
            s3 = _mm256_add_ps(s3, _mm256_loadu_ps(q + 24));
        }
    }
    float lane[8];
    _mm256_storeu_ps(lane, _mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)));
    return lane[0] + lane[5];
}

__attribute__((target("avx512f"))) static double fma_avx512(float *sink) {
    __m512 a[CHAINS], m = _mm512_set1_ps(0.999f), c = _mm512_set1_ps(0.5f), s = _mm512_setzero_ps();
    for (int i = 0; i < CHAINS; i++) a[i] = _mm512_set1_ps(*sink + (float)i);
    for (long r = 0; r < FMA_STEPS; r++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) a[i] = _mm512_fmadd_ps(a[i], m, c);
    }
    for (int i = 0; i < CHAINS; i++) s = _mm512_add_ps(s, a[i]);
    *sink += _mm512_reduce_add_ps(s);
    return (double)FMA_STEPS * CHAINS * 32;
}

__attribute__((target("avx2,fma"))) static double fma_avx2(float *sink) {
    enum { N = 12 }; /* sixteen would not leave registers for the factors */
    __m256 a[N], m = _mm256_set1_ps(0.999f), c = _mm256_set1_ps(0.5f), s = _mm256_setzero_ps();
    for (int i = 0; i < N; i++) a[i] = _mm256_set1_ps(*sink + (float)i);
    for (long r = 0; r < FMA_STEPS; r++) {
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) a[i] = _mm256_fmadd_ps(a[i], m, c);
    }
    for (int i = 0; i < N; i++) s = _mm256_add_ps(s, a[i]);
    float lane[8];
    _mm256_storeu_ps(lane, s);
    *sink += lane[0] + lane[5];
    return (double)FMA_STEPS * N * 16;
}

static float read_best(const float *x, size_t n, int streams) {
    if (__builtin_cpu_supports("avx512f")) return read_avx512(x, n, streams);
    if (__builtin_cpu_supports("avx2")) return read_avx2(x, n, streams);
    return read_plain(x, n, streams);
}

static double fma_best(float *sink) {
    if (__builtin_cpu_supports("avx512f")) return fma_avx512(sink);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fma_avx2(sink);
    return fma_plain(sink);
}
#else
static float read_best(const float *x, size_t n, int streams) {
    return read_plain(x, n, streams);
}

static double fma_best(float *sink) {
    return fma_plain(sink);
}
#endif

static void share(const probe *p, int member, int size, size_t *lo, size_t *n) {
    *n = p->n / (size_t)size;
    *lo = *n * (size_t)member;
}

/* Each member touches its part first, so that the pages lie on its own memory node. */
static void touch(void *arg, int member, int size) {
    probe *p = arg;
    size_t lo, n;
    share(p, member, size, &lo, &n);
    memset((void *)(uintptr_t)(p->data + lo), 0, n * sizeof(float));
}

static void read_part(void *arg, int member, int size) {
    probe *p = arg;
    size_t lo, n;
    share(p, member, size, &lo, &n);
    n /= SLICES;
    p->sink[member] += read_best(p->data + lo + n * (size_t)p->slice, n, p->streams);
}

static void fma_part(void *arg, int member, int size) {
    (void)size;
    probe *p = arg;
    float sink = p->sink[member]; /* not in the shared array while the loop runs */
    (void)fma_best(&sink);
    p->sink[member] = sink;
}

static double best_seconds(sh_team *t, void (*fn)(void *, int, int), probe *p, int tries) {
    double best = 1e30;
    for (int i = 0; i < tries; i++) {
        double t0 = sh_now();
        sh_team_run(t, fn, p);
        double d = sh_now() - t0;
        if (d < best) best = d;
    }
    return best;
}

/* All slices in turn, so that no cache keeps them until the next try; each counts with its best time. */
static double read_seconds(sh_team *t, probe *p) {
    double best[SLICES], sum = 0;
    for (int i = 0; i < TRIES * SLICES; i++) {
        p->slice = i % SLICES;
        double d = best_seconds(t, read_part, p, 1);
        if (i < SLICES || d < best[p->slice]) best[p->slice] = d;
    }
    for (int i = 0; i < SLICES; i++) sum += best[i];
    return sum;
}

sh_status sh_ceiling_measure(sh_team *t, size_t bytes, sh_ceiling *out) {
    size_t least = (size_t)sh_team_size(t) * SLICES * STREAMS * 4096;
    if (bytes < least) SH_FAIL(SH_EINPUT, "limits: a block of %zu bytes: at least %zu are needed", bytes, least);
    probe p = {.n = bytes / sizeof(float), .streams = 1};
    if (sh_team_size(t) > (int)(sizeof p.sink / sizeof *p.sink)) {
        SH_FAIL(SH_ELIMIT, "limits: a team of %d: 1,024 are allowed", sh_team_size(t));
    }
    void *data;
    SH_TRY(sh_mem_alloc(bytes, "bandwidth measurement", &data));
    p.data = data;
    sh_team_run(t, touch, &p);
    double read = 1e30;
    for (p.streams = 1; p.streams <= STREAMS; p.streams *= 2) {
        double d = read_seconds(t, &p);
        if (d < read) read = d;
    }
    sh_mem_free(data, bytes);
    float sink = 0;
    double operations = fma_best(&sink) * sh_team_size(t);
    double fma = best_seconds(t, fma_part, &p, 3 * TRIES);
    *out = (sh_ceiling){.read_gbs = (double)(p.n * sizeof(float)) / read * 1e-9, .fma_gflops = operations / fma * 1e-9};
    return SH_OK;
}
