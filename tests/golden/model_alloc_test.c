/* The step loop allocates nothing: every allocating call of the C library is counted while fixtures run prompts and
 * decode. Under a sanitizer, which brings its own allocator, nothing is counted and the test says so. */
#include "tests/golden/golden.h"

#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_int calls;
static atomic_bool counting;

static inline void note(void) {
    if (atomic_load(&counting)) atomic_fetch_add(&calls, 1);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define COUNTS false
#else
#define COUNTS true
void *__libc_malloc(size_t n);
void *__libc_calloc(size_t a, size_t b);
void *__libc_realloc(void *p, size_t n);
void *__libc_memalign(size_t align, size_t n);

void *malloc(size_t n) {
    note();
    return __libc_malloc(n);
}

void *calloc(size_t a, size_t b) {
    note();
    return __libc_calloc(a, b);
}

void *realloc(void *p, size_t n) {
    note();
    return __libc_realloc(p, n);
}

void *aligned_alloc(size_t align, size_t n) {
    note();
    return __libc_memalign(align, n);
}

void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset) {
    note();
    return (void *)syscall(SYS_mmap, at, n, prot, flags, fd, offset);
}
#endif

static void check_fixture(const char *name, int threads) {
    char dir[512];
    snprintf(dir, sizeof dir, "%s/text/models/%s", SH_TEST_DATA, name);
    chain ch = chain_open(&(chain_options){.dir = dir,
                                           .mode = SH_MODE_BF16,
                                           .kv = SH_KV_BF16,
                                           .threads = threads,
                                           .max_rows = 128,
                                           .max_context = 512,
                                           .max_seqs = 2});
    int32_t ids[400];
    for (int i = 0; i < 400; i++) ids[i] = 20 + (i * 37) % 1500;
    seq s[2] = {seq_open(&ch, ids, 400), seq_open(&ch, ids, 300)};
    float *logits = must_alloc(2 * (size_t)ch.c.vocab * 4);
    int keep[2] = {1, 1};
    for (int step = 0; step < 12; step++) {
        int take[2] = {step < 5 ? 64 : 1, step < 4 ? 50 : 1};
        atomic_store(&counting, step > 0); /* the first step wakes the threads */
        int kept = chain_step(&ch, s, 2, take, keep);
        sh_model_logits(chain_last(&ch), ch.hidden, kept, logits);
        atomic_store(&counting, false);
    }
    CHECK(atomic_load(&calls) == 0, "%s: %d threads: %d allocations in 11 steps", name, threads, atomic_load(&calls));
    atomic_store(&calls, 0);
    free(logits);
    for (int i = 0; i < 2; i++) seq_close(&s[i]);
    chain_close(&ch);
}

int main(void) {
    atomic_store(&counting, true); /* that counting works at all */
    free(must_alloc(10));
    atomic_store(&counting, false);
    CHECK(!COUNTS || atomic_load(&calls) == 1, "one allocation was counted as %d", atomic_load(&calls));
    atomic_store(&calls, 0);
    for (int i = 0; i < N_FIXTURES; i++)
        for (int threads = 1; threads <= 2; threads++) check_fixture(fixtures[i], threads);
    if (!COUNTS) printf("alloc: a sanitizer's allocator is not counted\n");
    return finish("alloc");
}
