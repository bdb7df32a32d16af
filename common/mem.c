/* Aligned blocks, huge pages, arenas. See mem.h. */
#include "common/mem.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MAP_FROM ((size_t)4 << 20)

sh_status sh_mem_alloc(size_t bytes, const char *what, void **out) {
    if (bytes == 0) bytes = 64;
    void *p = NULL;
    if (bytes >= MAP_FROM) {
        p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) p = NULL;
        if (p) (void)madvise(p, bytes, MADV_HUGEPAGE); /* a hint: refused on kernels without it */
    } else {
        p = aligned_alloc(SH_MEM_ALIGN, sh_mem_align(bytes));
        if (p) memset(p, 0, bytes);
    }
    if (!p) SH_FAIL(SH_EMEMORY, "%s: no memory for %zu bytes: %s", what, bytes, strerror(errno));
    *out = p;
    return SH_OK;
}

void sh_mem_free(void *p, size_t bytes) {
    if (!p) return;
    if (bytes >= MAP_FROM)
        munmap(p, bytes);
    else
        free(p);
}

sh_status sh_arena_create(size_t bytes, const char *what, sh_arena *out) {
    void *p = NULL;
    SH_TRY(sh_mem_alloc(bytes, what, &p));
    *out = (sh_arena){.base = p, .size = bytes};
    return SH_OK;
}

void sh_arena_release(sh_arena *a) {
    sh_mem_free(a->base, a->size);
    *a = (sh_arena){0};
}

void *sh_arena_take(sh_arena *a, size_t bytes) {
    size_t n = sh_mem_align(bytes);
    if (n > a->size - a->used) return NULL;
    void *p = a->base + a->used;
    a->used += n;
    if (a->used > a->peak) a->peak = a->used;
    return p;
}
