/* Versions of what the program is made of. See facts.h. */
#include "cli/facts.h"

#include <dlfcn.h>
#include <stdint.h>
#include <string.h>
#include "common/status.h"
#include "model/kernels/kernels.h"

#ifndef SH_VERSION
#define SH_VERSION "0"
#endif
#ifndef SH_BUILD_TYPE
#define SH_BUILD_TYPE "unknown"
#endif
#ifndef SH_BUILD_FLAGS
#define SH_BUILD_FLAGS ""
#endif

#define ASK(type, name) ((type)(uintptr_t)dlsym(RTLD_DEFAULT, name))

static void from_string(char *to, const char *symbol) {
    const char *(*f)(void) = ASK(const char *(*)(void), symbol);
    snprintf(to, SH_FACTS_MAX, "%s", f ? f() : "not found");
}

static void mpi_version(char *to) {
    int (*f)(char *, int *) = ASK(int (*)(char *, int *), "MPI_Get_library_version");
    char text[8192] = "not found"; /* MPI_MAX_LIBRARY_VERSION_STRING of any MPI is smaller */
    int len = 0;
    if (f) f(text, &len);
    text[strcspn(text, ",\n")] = 0;
    snprintf(to, SH_FACTS_MAX, "%.150s", text);
}

static void zmq_version_of(char *to) {
    void (*f)(int *, int *, int *) = ASK(void (*)(int *, int *, int *), "zmq_version");
    int (*has)(const char *) = ASK(int (*)(const char *), "zmq_has");
    int v[3] = {0};
    if (f) f(&v[0], &v[1], &v[2]);
    if (!f)
        snprintf(to, SH_FACTS_MAX, "not found");
    else
        snprintf(to, SH_FACTS_MAX, "%d.%d.%d%s", v[0], v[1], v[2],
                 has && has("curve") ? ", with CURVE" : ", without CURVE: no TCP sockets");
}

static void hwloc_version(char *to) {
    unsigned (*f)(void) = ASK(unsigned (*)(void), "hwloc_get_api_version");
    unsigned v = f ? f() : 0;
    if (f)
        snprintf(to, SH_FACTS_MAX, "%u.%u (interface)", v >> 16, (v >> 8) & 255);
    else
        snprintf(to, SH_FACTS_MAX, "not found");
}

/* "OpenBLAS 0.3.21 …; core Haswell", "" when the library is missing; the library is opened only for this. */
static const char *openblas_line(void) {
    static char text[SH_FACTS_MAX];
    SH_IGNORE(sh_blas_check(text, sizeof text));
    return text;
}

static void openblas_version(char *to) {
    snprintf(to, SH_FACTS_MAX, "%s", *openblas_line() ? openblas_line() : "not found");
}

const char *sh_facts_blas_core(void) {
    const char *core = strstr(openblas_line(), "; core ");
    return core ? core + strlen("; core ") : "";
}

int sh_facts_libraries(sh_library_fact *f, int max) {
    sh_library_fact all[] = {{"MPI", "libopenmpi-dev", ""},           {"ZeroMQ", "libzmq3-dev", ""},
                             {"protobuf-c", "libprotobuf-c-dev", ""}, {"SQLite", "libsqlite3-dev", ""},
                             {"hwloc", "libhwloc-dev", ""},           {"OpenBLAS", "libopenblas-dev", ""},
                             {"jansson", "libjansson-dev", ""}};
    mpi_version(all[0].version);
    zmq_version_of(all[1].version);
    from_string(all[2].version, "protobuf_c_version");
    from_string(all[3].version, "sqlite3_libversion");
    hwloc_version(all[4].version);
    openblas_version(all[5].version);
    from_string(all[6].version, "jansson_version_str");
    int n = (int)(sizeof all / sizeof *all);
    if (n > max) n = max;
    memcpy(f, all, (size_t)n * sizeof *all);
    return n;
}

void sh_facts_isa(char *to, size_t size) {
    const char *const *levels = sh_kernels_levels;
    const sh_kernels *k = NULL;
    if (sh_kernels_select(&k) != SH_OK) {
        snprintf(to, size, "none: %s", sh_error_text());
        return;
    }
    size_t n = (size_t)snprintf(to, size, "%s (this CPU:", k->isa);
    const char *comma = " ";
    for (size_t i = 0; levels[i] && n < size; i++)
        if (sh_kernels_get(levels[i], &k) == SH_OK) {
            n += (size_t)snprintf(to + n, size - n, "%s%s", comma, levels[i]);
            comma = ", ";
        }
    if (n < size) snprintf(to + n, size - n, ")");
}

const char *sh_facts_version(void) {
    return SH_VERSION;
}

void sh_facts_print_version(FILE *to) {
    char isa[SH_FACTS_MAX];
    sh_facts_isa(isa, sizeof isa);
    fprintf(to, "shoal %s\n", SH_VERSION);
    fprintf(to, "  build      %s%s%s, gcc %s, C %ld\n", SH_BUILD_TYPE, *SH_BUILD_FLAGS ? ", sanitizers " : "",
            SH_BUILD_FLAGS, __VERSION__, (long)__STDC_VERSION__);
    fprintf(to, "  kernels    %s\n", isa);
    sh_library_fact f[16];
    int n = sh_facts_libraries(f, 16);
    for (int i = 0; i < n; i++) fprintf(to, "  %-11s%s\n", f[i].name, f[i].version);
}
