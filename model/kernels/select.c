/* Chooses the kernel table: what the CPU has, lowered by SHOAL_ISA. Tables are built once, bottom up: plain C first,
 * then each instruction set overwrites the entries it has. Knows nothing of what the entries do. */
#include "model/kernels/kernels.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { REF, AVX2, AVXVNNI, AVX512, AVX512VNNI, AMX, BLAS, LEVELS, MODEL = LEVELS, TABLES };

const char *const sh_kernels_levels[] = {"ref", "avx2", "avxvnni", "avx512", "avx512vnni", "amx", "blas", NULL};

static sh_kernels tables[TABLES];
static bool present[LEVELS];
static pthread_once_t once = PTHREAD_ONCE_INIT, once_blas = PTHREAD_ONCE_INIT;
static pthread_mutex_t model_lock = PTHREAD_MUTEX_INITIALIZER;

/* Fills `t` with the best native kernels up to `level` and says whether the CPU has that level. */
static bool fill_native(sh_kernels *t, int level) {
    sh_kernels_fill_ref(t);
    bool has[LEVELS] = {[REF] = true};
#if defined(__x86_64__)
    __builtin_cpu_init();
    has[AVX2] = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    has[AVXVNNI] = has[AVX2] && __builtin_cpu_supports("avxvnni");
    has[AVX512] = has[AVX2] && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    has[AVX512VNNI] = has[AVX512] && __builtin_cpu_supports("avx512vnni");
    has[AMX] = has[AVX512VNNI] && sh_kernels_amx_usable();
    if (level >= AVX2 && has[AVX2]) {
        sh_kernels_fill_avx2(t);
        sh_kernels_fill_avx2_quant(t);
    }
    if (level >= AVXVNNI && has[AVXVNNI]) sh_kernels_fill_avxvnni(t);
    if (level >= AVX512 && has[AVX512]) sh_kernels_fill_avx512(t);
    if (level >= AVX512VNNI && has[AVX512VNNI]) sh_kernels_fill_avx512vnni(t);
    if (level >= AMX && has[AMX]) sh_kernels_fill_amx(t);
#endif
    return has[level];
}

static int best_level(void) {
    int best = REF;
    for (int i = REF; i < BLAS; i++)
        if (present[i]) best = i;
    return best;
}

static void build(void) {
    for (int i = REF; i < BLAS; i++) {
        present[i] = fill_native(&tables[i], i);
        tables[i].isa = sh_kernels_levels[i];
    }
}

static void build_blas(void) {
    (void)fill_native(&tables[BLAS], AMX);
    sh_kernels_fill_blas(&tables[BLAS]);
    tables[BLAS].isa = sh_kernels_levels[BLAS];
}

static sh_status get_model(const char *spec, const sh_kernels **out) {
    sh_kernels t;
    (void)fill_native(&t, AVX512);
    t.isa = "model";
    SH_TRY(sh_kernels_fill_model(&t, spec));
    pthread_mutex_lock(&model_lock);
    if (!tables[MODEL].isa) tables[MODEL] = t; /* a later one would be the same */
    pthread_mutex_unlock(&model_lock);
    *out = &tables[MODEL];
    return SH_OK;
}

sh_status sh_kernels_get(const char *isa, const sh_kernels **out) {
    pthread_once(&once, build);
    if (strncmp(isa, "model:", 6) == 0) return get_model(isa + 6, out);
    for (int i = 0; i < LEVELS; i++) {
        if (strcmp(isa, sh_kernels_levels[i]) != 0) continue;
        if (i == BLAS) {
            SH_TRY(sh_blas_load());
            pthread_once(&once_blas, build_blas);
            *out = &tables[i];
            return SH_OK;
        }
        if (!present[i]) {
            SH_FAIL(SH_EUNSUPPORTED, "instruction set '%s': this CPU lacks it: the best here is %s", isa,
                    sh_kernels_levels[best_level()]);
        }
        *out = &tables[i];
        return SH_OK;
    }
    SH_FAIL(SH_EINPUT,
            "instruction set '%.40s' is unknown: allowed are ref, avx2, avxvnni, avx512, avx512vnni, amx, blas, "
            "model:FMA,BYTES",
            isa);
}

sh_status sh_kernels_select(const sh_kernels **out) {
    pthread_once(&once, build);
    const char *isa = getenv("SHOAL_ISA");
    if (isa && *isa) {
        sh_status st = sh_kernels_get(isa, out);
        return st == SH_OK ? st : sh_error_prefix(st, "SHOAL_ISA");
    }
    *out = &tables[best_level()];
    return SH_OK;
}
