/*
 * The OpenBLAS path: only gemm, weights widened to f32 a few panels at a time and multiplied by sgemm. For CPUs without
 * kernels of their own; its sums are in OpenBLAS's order, so results depend on the CPU and on the shapes (never chosen
 * by itself). The library is opened at run time: the choice of its kernels is made by an environment variable that it
 * reads while loading, and ranks that do not use it do not pay for it.
 */
#include "model/kernels/kernels.h"

#include <cblas.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define K_BLOCK 256 /* inputs and … */
#define N_BLOCK 4   /* … panels widened at once: 128 KiB of stack */

static struct {
    pthread_mutex_t lock;
    void *handle; /* never closed once it is kept */
    __typeof__(cblas_sgemm) *sgemm;
    char *(*corename)(void), *(*config)(void);
} lib = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- loading ----------------------------------------------------------------------------------------------------- */

/* What OpenBLAS takes when it does not know the CPU. */
static bool is_old_core(const char *core) {
    static const char *const old[] = {"Prescott", "Core2",  "Katmai",     "Coppermine", "Northwood",
                                      "Banias",   "Penryn", "Dunnington", "Nehalem",    "Generic"};
    for (size_t i = 0; i < sizeof old / sizeof *old; i++) {
        if (strcasecmp(core, old[i]) == 0) return true;
    }
    return false;
}

/* OpenBLAS's name for kernels this CPU can run; NULL: nothing better is known. */
static const char *best_core(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
        return "SkylakeX";
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "Haswell";
#endif
    return NULL;
}

static sh_status open_library(void) {
    setenv("OPENBLAS_NUM_THREADS", "1", 1); /* threads are linear.c's */
    void *h = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!h) h = dlopen("libopenblas.so", RTLD_NOW | RTLD_LOCAL);
    if (!h) SH_FAIL(SH_EUNSUPPORTED, "OpenBLAS: %s: install libopenblas0, or use another SHOAL_ISA", dlerror());
    void *gemm = dlsym(h, "cblas_sgemm"), *core = dlsym(h, "openblas_get_corename");
    void *config = dlsym(h, "openblas_get_config");
    if (!gemm || !core || !config) {
        dlclose(h);
        SH_FAIL(SH_EUNSUPPORTED,
                "OpenBLAS: the library lacks cblas_sgemm or openblas_get_*: another BLAS under its name?");
    }
    lib.handle = h;
    memcpy(&lib.sgemm, &gemm, sizeof gemm); /* ISO C has no cast from object to function pointer */
    memcpy(&lib.corename, &core, sizeof core);
    memcpy(&lib.config, &config, sizeof config);
    return SH_OK;
}

static sh_status load_locked(void) {
    if (lib.handle) return SH_OK;
    SH_TRY(open_library());
    const char *better = best_core();
    if (is_old_core(lib.corename()) && better && !getenv("OPENBLAS_CORETYPE")) {
        dlclose(lib.handle);
        lib.handle = NULL;
        setenv("OPENBLAS_CORETYPE", better, 1);
        SH_TRY(open_library());
    }
    return SH_OK;
}

sh_status sh_blas_load(void) {
    pthread_mutex_lock(&lib.lock);
    sh_status st = load_locked();
    pthread_mutex_unlock(&lib.lock);
    return st;
}

sh_status sh_blas_check(char *text, size_t n) {
    SH_TRY(sh_blas_load());
    const char *core = lib.corename(), *better = best_core();
    snprintf(text, n, "%s; core %s", lib.config(), core);
    if (better && is_old_core(core)) {
        SH_FAIL(SH_EUNSUPPORTED,
                "OpenBLAS runs kernels of an old CPU (%s), several times slower: set OPENBLAS_CORETYPE=%s", core,
                better);
    }
    return SH_OK;
}

/* ---- product ----------------------------------------------------------------------------------------------------- */

static float widen(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* K rows [0, kb) of panel data d to columns [0, 32) of wide (row length N_BLOCK panels). */
static void widen_panel(float *wide, const uint32_t *d, int kb) {
    for (int i = 0; i < kb; i++, d += SH_LANES, wide += N_BLOCK * SH_PANEL) {
        for (int j = 0; j < SH_LANES; j++) {
            wide[j] = widen(d[j] << 16);
            wide[j + SH_LANES] = widen(d[j] & 0xffff0000u);
        }
    }
}

static void blas_gemm(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int m, float *y, size_t ldy) {
    float wide[K_BLOCK * N_BLOCK * SH_PANEL] __attribute__((aligned(64)));
    for (int p = p0; p < p1 && m > 0; p += N_BLOCK) {
        int end = p1 - p < N_BLOCK ? p1 : p + N_BLOCK, first = p * SH_PANEL;
        int n = (end * SH_PANEL < w->n ? end * SH_PANEL : w->n) - first;
        for (int k0 = 0; k0 < w->k; k0 += K_BLOCK) {
            int kb = w->k - k0 < K_BLOCK ? w->k - k0 : K_BLOCK;
            for (int i = p; i < end; i++) {
                widen_panel(wide + (i - p) * SH_PANEL, w->data + ((size_t)i * (size_t)w->k + (size_t)k0) * SH_LANES,
                            kb);
            }
            lib.sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, kb, 1.0f, x + k0, (int)ldx, wide,
                      N_BLOCK * SH_PANEL, k0 ? 1.0f : 0.0f, y + first, (int)ldy);
        }
    }
}

void sh_kernels_fill_blas(sh_kernels *t) {
    t->gemm = blas_gemm;
}
