/* Memory: checked allocation with alignment (huge pages for large blocks) and a bump arena for one step's scratch. */
#ifndef SH_COMMON_MEM_H
#define SH_COMMON_MEM_H

#include <stddef.h>
#include "common/status.h"

#define SH_MEM_ALIGN 64 /* bytes: a cache line, and the widest vector */
/* The next multiple of it. */
static inline size_t sh_mem_align(size_t n) {
    return (n + SH_MEM_ALIGN - 1) / SH_MEM_ALIGN * SH_MEM_ALIGN;
}
/* Zeroed memory aligned to 64 bytes; blocks of 4 MiB and more are mapped and ask for huge pages, untouched pages cost
 * nothing. `what` names the use in errors ("KV pool"). Freed by sh_mem_free with the same size. */
sh_status sh_mem_alloc(size_t bytes, const char *what, void **out);
void sh_mem_free(void *p, size_t bytes);

/* A bump allocator: one block, reset as a whole. No growth: sized before the step loop begins. */
typedef struct sh_arena {
    char *base;
    size_t size, used, peak;
} sh_arena;
sh_status sh_arena_create(size_t bytes, const char *what, sh_arena *out);
void sh_arena_release(sh_arena *a);
/* 64-byte aligned; NULL when the arena is full (a programming error: sizes are computed beforehand). */
void *sh_arena_take(sh_arena *a, size_t bytes);
/* Everything taken is free again. */
static inline void sh_arena_reset(sh_arena *a) {
    a->used = 0;
}

#endif
