/*
 * The step loop allocates nothing: malloc and its relatives are replaced by ones that count the calls of rank threads
 * and of their teams while a group is in full work (prompts, decode, pauses, ends). The uplink's and ZeroMQ's own
 * threads are not counted, nor is what happens when work arrives.
 */
#include "tests/cluster/fake.h"

#include <stdatomic.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
int main(void) {
    printf("skipped: a sanitizer has replaced malloc already\n");
    return 77; /* tests/run: skipped */
}
#else

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
void *malloc(size_t n);
void *calloc(size_t n, size_t m);
void *realloc(void *p, size_t n);
void *aligned_alloc(size_t a, size_t n);
int posix_memalign(void **p, size_t a, size_t n);

static atomic_bool armed;
static atomic_int counted;
static pthread_t test_thread;

static void note(void) {
    char name[16] = "";
    if (!atomic_load(&armed) || pthread_equal(pthread_self(), test_thread)) return;
    if (pthread_getname_np(pthread_self(), name, sizeof name) != 0) return;
    if (strcmp(name, "shoal-uplink") != 0 && strncmp(name, "ZMQ", 3) != 0) atomic_fetch_add(&counted, 1);
}

void *malloc(size_t n) {
    note();
    return __libc_malloc(n);
}

void *calloc(size_t n, size_t m) {
    note();
    return __libc_calloc(n, m);
}

void *realloc(void *p, size_t n) {
    note();
    return __libc_realloc(p, n);
}

void *aligned_alloc(size_t a, size_t n) {
    note();
    return __libc_memalign(a, n);
}

int posix_memalign(void **p, size_t a, size_t n) {
    note();
    *p = __libc_memalign(a, n);
    return *p ? 0 : 12;
}

static void *allocate_once(void *arg) {
    void *volatile p = malloc(10);
    free(p);
    return arg;
}

/* The counter itself: one malloc on a thread of its own is seen. */
static void test_counter(void) {
    pthread_t t;
    atomic_store(&counted, 0);
    atomic_store(&armed, true);
    if (pthread_create(&t, NULL, allocate_once, NULL)) exit(1);
    pthread_join(t, NULL);
    atomic_store(&armed, false);
    CHECK(atomic_load(&counted) > 0, "a malloc was not counted");
}

static void test_group(const char *name, int n, const int *cut, int threads, int ep, int tp, int cp, int prefill) {
    char model[600];
    fake f;
    int32_t ids[300];
    snprintf(model, sizeof model, "%s/text/models/%s", SH_TEST_DATA, name);
    fake_open(&f, model, n, cut, "bf16", "bf16");
    f.plan.max_seqs = 6;
    f.plan.chunk = 32;
    f.plan.threads = threads;
    f.prefill = prefill;
    f.trace_steps = n % 2 ? 0 : UINT64_MAX; /* a timeline allocates nothing either */
    fake_divide(&f, ep, tp, cp);
    n = f.n;
    int last = n - 1 - prefill; /* that samples */
    for (int i = 0; i < 30; i++) {
        int len = 5 + 40 * (i % 5);
        for (int j = 0; j < len; j++) ids[j] = 20 + (i * 131 + j * 17) % 1900;
        fake_work *w = fake_add(&f, ids, len, 60 + i);
        w->sampling.temperature = i % 2 ? 1 : 0;
        w->sampling.top_p = 0.9f;
        w->sampling.top_k = i % 3 ? 50 : 0;
        w->sampling.logprobs = i % 6;
        w->sampling.score_prompt = i % 4 == 0;
        if (i % 3 == 0) {
            w->stop[0] = (ProtobufCBinaryData){.len = 4, .data = (uint8_t *)"zzzz"};
            w->sampling.n_stop = 1;
            w->sampling.stop = w->stop;
        }
    }
    fake_start_threads(&f);
    if (fake_wait_ready(&f, 60)) {
        for (int i = 0; i < f.n_work; i++) fake_send_work(&f, i);
        while (f.work[0].n < 2 && !f.fault[0]) fake_pump(&f, 2);
        sh_sleep(0.05);
        uint64_t before = f.rank[last].step;
        atomic_store(&counted, 0);
        atomic_store(&armed, true);
        for (double end = sh_now() + 60; !fake_all_done(&f) && !f.fault[0] && sh_now() < end;) fake_pump(&f, 10);
        atomic_store(&armed, false);
        for (double end = sh_now() + 2; f.rank[last].step < before + 50 && sh_now() < end;) fake_pump(&f, 10);
        CHECK(fake_all_done(&f), "%s: no answers: %s", name, f.fault);
        CHECK(f.rank[last].step > before + 50, "%s: only %llu steps were watched", name,
              (unsigned long long)(f.rank[last].step - before));
        CHECK(atomic_load(&counted) == 0, "%s on %d ranks, %d threads: %d allocations in the step loop", name, n,
              threads, atomic_load(&counted));
    }
    fake_leave(&f);
    fake_join(&f);
    fake_close(&f);
}

int main(void) {
    test_thread = pthread_self();
    test_counter();
    test_group("e2b-like", 1, (int[]){0, 15}, 1, 1, 1, 1, 0);
    test_group("e2b-like", 3, (int[]){0, 4, 9, 15}, 1, 1, 1, 1, 0);
    test_group("26b-a4b-like", 2, (int[]){0, 6, 12}, 2, 1, 1, 1, 0);
    test_group("26b-a4b-like", 1, (int[]){0, 12}, 1, 3, 1, 1, 0);
    test_group("31b-like", 2, (int[]){0, 7, 12}, 1, 1, 2, 1, 0);
    test_group("31b-like", 1, (int[]){0, 12}, 1, 1, 1, 3, 0);
    test_group("e2b-like", 2, (int[]){0, 9, 15}, 1, 1, 1, 1, 2);
    printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
#endif
