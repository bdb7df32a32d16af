/*
 * Every entry of every kernel table this CPU has against plain C, bit for bit, on random shapes with odd tails. Inputs
 * end at an unmapped page (reading past them faults), outputs start as a pattern and are compared whole, gaps and
 * borders included. Also: elementary functions against the C library, packing and gemm against a plain sum, and the
 * invariance of sh_linear over threads and rows. Not here: speed (tests/bench/kernels_bench.c).
 */
#include <CUnit/Basic.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "model/kernels/kernels.h"
#include "model/kernels/quant.h"
#include "model/ceiling.h"
#include "model/linear.h"

#define ROUNDS     60
#define FEW_ROUNDS 8
#define BORDER     24 /* floats of pattern before and after an output */

/* ---- random numbers and guarded memory --------------------------------------------------------------------------- */

static uint64_t seed;

static uint32_t rnd(void) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (uint32_t)(seed >> 32);
}

static int upto(int n) { /* 1 … n */
    return 1 + (int)(rnd() % (uint32_t)n);
}

static float value(float size) {
    return size * ((float)(int32_t)rnd() * 0x1p-31f);
}

static float odd_value(void) { /* now and then something extreme */
    static const float odd[] = {0,      -0.0f, 1e-45f, -1e-40f, INFINITY, -INFINITY, NAN, 3e38f, -3e38f,
                                88.72f, -88,   -104,   -87.3f,  1e-7f,    20,        -20, 1e9f,  7e20f};
    return rnd() % 4 ? value(12) : odd[rnd() % (sizeof odd / sizeof *odd)];
}

static struct {
    void *base;
    size_t len;
} blocks[64];
static int n_blocks;

/* Memory that ends where an unmapped page begins. */
static void *guarded(size_t bytes) {
    size_t len = (bytes + 4095) / 4096 * 4096 + 4096;
    char *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + len - 4096, 4096, PROT_NONE) != 0 || n_blocks == 64) abort();
    blocks[n_blocks].base = p;
    blocks[n_blocks++].len = len;
    return p + len - 4096 - bytes;
}

static void release_all(void) {
    while (n_blocks > 0) {
        n_blocks--;
        munmap(blocks[n_blocks].base, blocks[n_blocks].len);
    }
}

static float *floats(int n, float size) {
    float *x = guarded((size_t)n * sizeof *x);
    for (int i = 0; i < n; i++) x[i] = value(size);
    return x;
}

static float *odd_floats(int n) {
    float *x = guarded((size_t)n * sizeof *x);
    for (int i = 0; i < n; i++) x[i] = odd_value();
    return x;
}

/* ---- cases: each draws its input from `seed`, runs one entry and leaves all it wrote in `result` -------------------
 */

static float *result;
static int n_result;

static float *output(int n) {
    n_result = n + 2 * BORDER;
    result = guarded((size_t)n_result * sizeof *result);
    for (int i = 0; i < n_result; i++) result[i] = 1000.0f + (float)(i % 97);
    return result + BORDER;
}

static sh_wmat random_wmat(int n, int k) {
    size_t words = sh_wmat_bytes(SH_W_BF16, n, k) / 4;
    uint16_t *src = guarded((size_t)n * (size_t)k * 2);
    for (size_t i = 0; i < (size_t)n * (size_t)k; i++) src[i] = (uint16_t)((rnd() & 0x80ff) | 0x3e00);
    uint32_t *d = guarded(words * 4);
    sh_pack_bf16(d, src, (size_t)k, n, k, 0, sh_wmat_panels(n));
    return (sh_wmat){.n = n, .k = k, .data = d};
}

static void case_gemm(const sh_kernels *kn) {
    int n = upto(230), k = rnd() % 3 ? upto(300) : upto(1200), m = (int)(rnd() % 45), m0 = m ? m : 1;
    sh_wmat w = random_wmat(n, k);
    int panels = sh_wmat_panels(n), p0 = (int)(rnd() % (uint32_t)panels), p1 = p0 + upto(panels - p0);
    int ldx = k + (int)(rnd() % 9), ldy = n + (int)(rnd() % 9);
    const float *x = floats((m0 - 1) * ldx + k, 3);
    float *y = output((m0 - 1) * ldy + n);
    kn->gemm(&w, p0, p1, x, (size_t)ldx, m, y, (size_t)ldy);
}

static void case_gemm_wide(const sh_kernels *kn) { /* more panels than one block of any level, several K blocks */
    int n = 32 * 26 + upto(64), k = 256 + upto(600), m = 5 + upto(30);
    sh_wmat w = random_wmat(n, k);
    const float *x = floats(m * k, 3);
    kn->gemm(&w, 0, sh_wmat_panels(n), x, (size_t)k, m, output(m * n), (size_t)n);
}

static const sh_kernels *ref_level(void) {
    const sh_kernels *ref = NULL;
    if (sh_kernels_get("ref", &ref) != SH_OK) abort();
    return ref;
}

static sh_wmat random_quant(sh_wtype t, int n, int k) {
    uint16_t *src = guarded((size_t)n * (size_t)k * 2);
    for (size_t i = 0; i < (size_t)n * (size_t)k; i++) src[i] = (uint16_t)((rnd() & 0x80ff) | 0x3c00);
    uint32_t *d = guarded(sh_wmat_bytes(t, n, k));
    sh_quant_pack(ref_level(), t, d, src, (size_t)k, n, k, 0, sh_wmat_panels(n));
    return (sh_wmat){.n = n, .k = k, .type = t, .data = d};
}

/* Rows of x quantised by plain C: levels are compared one entry at a time. */
static sh_qrows quantized(sh_wtype t, const float *x, int k, int m) {
    sh_qrows q = sh_qrows_place(t, k, m, guarded(sh_qrows_bytes(t, k, m)));
    const sh_kernels *ref = ref_level();
    for (int r = 0; r < m; r++) {
        size_t i = (size_t)r;
        ref->quantize(x + i * (size_t)k, k, sh_wtype_group(t), q.code + i * q.ld, q.scale + i * q.groups,
                      q.sum + i * q.groups);
    }
    return q;
}

/* Any codes, the ends of their ranges above all, and any finite scales: nothing may saturate on the way. */
static void extreme_codes(sh_wmat *w, sh_qrows *q, int m) {
    uint8_t *d = (uint8_t *)(uintptr_t)w->data;
    size_t bytes = sh_wmat_bytes(w->type, w->n, w->k), block = sh_wtype_block(w->type);
    uint8_t of[] = {0, 255, (uint8_t)rnd(), (uint8_t)rnd()};
    int8_t xs[] = {127, -127, -128, (int8_t)rnd()};
    uint32_t kinds = 1 + rnd() % 4; /* 1: all alike, the largest sums */
    for (size_t i = 0; i < bytes; i++) {
        bool scale = i % block < 2 * SH_PANEL;
        d[i] = scale ? (i % 2 ? rnd() & 0xbb : rnd()) & 0xff : of[rnd() % kinds];
    }
    for (size_t r = 0; r < (size_t)m; r++)
        for (size_t g = 0; g < q->groups; g++) {
            int size = sh_wtype_group(w->type);
            int8_t *code = q->code + r * q->ld + g * (size_t)size;
            int32_t *sum = q->sum + r * q->groups + g;
            *sum = 0;
            for (int i = 0; i < size; i++) *sum += code[i] = xs[rnd() % kinds];
        }
}

static void run_gemm_q(const sh_kernels *kn, sh_wtype t, int n, int k, int m) {
    int r0 = (int)(rnd() % 3);
    sh_wmat w = random_quant(t, n, k);
    int panels = sh_wmat_panels(n), p0 = (int)(rnd() % (uint32_t)panels), p1 = p0 + upto(panels - p0);
    int ldy = n + (int)(rnd() % 9);
    sh_qrows q = quantized(t, floats((r0 + m + 1) * k, 3), k, r0 + m + 1);
    if (rnd() % 3 == 0) extreme_codes(&w, &q, r0 + m + 1);
    kn->gemm_q(&w, p0, p1, &q, r0, m, output((m ? m - 1 : 0) * ldy + n), (size_t)ldy);
}

static sh_wtype random_type(void) {
    return rnd() % 2 ? SH_W_Q8 : SH_W_Q4;
}

static void case_gemm_q(const sh_kernels *kn) {
    sh_wtype t = random_type();
    int n = upto(150), k = rnd() % 3 ? upto(300) : upto(2500), m = (int)(rnd() % 20);
    run_gemm_q(kn, t, n, k, m);
}

/* More rows and panels than one block of any level, several runs of inputs. */
static void case_gemm_q_wide(const sh_kernels *kn) {
    sh_wtype t = random_type();
    int n = 32 * 26 + upto(64), k = 1024 + upto(1500), m = 12 + upto(40);
    run_gemm_q(kn, t, n, k, m);
}

/* More rows and inputs than are packed at once, for kernels that go through blocks. */
static void case_gemm_q_many(const sh_kernels *kn) {
    int n = upto(100), k = 1990 + upto(300), m = 60 + upto(140);
    run_gemm_q(kn, random_type(), n, k, m);
}

/* Few rows, more inputs than are packed at once. */
static void case_gemm_q_long(const sh_kernels *kn) {
    sh_wtype t = random_type();
    int m = upto(9), k = 65536 / m + upto(700), n = upto(70);
    run_gemm_q(kn, t, n, k, m);
}

static void case_quant_group(const sh_kernels *kn) {
    float *w = rnd() % 4 ? floats(SH_Q8_GROUP, ldexpf(1, -(int)(rnd() % 30))) : odd_floats(SH_Q8_GROUP);
    float *y = output(2 + (SH_Q8_GROUP + SH_Q4_GROUP) / 4);
    y[0] = kn->quant_q8(w, (uint8_t *)(y + 2));
    y[1] = kn->quant_q4(w, (uint8_t *)(y + 2 + SH_Q8_GROUP / 4));
}

static void case_quantize(const sh_kernels *kn) {
    int group = rnd() % 2 ? SH_Q8_GROUP : SH_Q4_GROUP, k = upto(500), groups = (k + group - 1) / group;
    const float *x = rnd() % 2 ? odd_floats(k) : floats(k, rnd() % 8 ? 4 : 1e-38f);
    float *y = output(groups * (2 + group / 4));
    kn->quantize(x, k, group, (int8_t *)(y + 2 * groups), y, (int32_t *)(void *)(y + groups));
}

static void case_rmsnorm(const sh_kernels *kn) {
    int n = upto(300);
    bool in_place = rnd() % 2, weighted = rnd() % 2;
    const float *w = floats(n, 2), *x = floats(n, rnd() % 4 ? 5 : 1e-22f);
    float *y = output(n);
    if (in_place) memcpy(y, x, (size_t)n * 4);
    kn->rmsnorm(y, in_place ? y : x, weighted ? w : NULL, n, 1e-6f);
}

static void case_rope(const sh_kernels *kn) {
    int half = upto(140), pairs = rnd() % 2 ? half : upto(half);
    const float *cs = floats(pairs, 1), *sn = floats(pairs, 1);
    float *x = output(2 * half);
    for (int i = 0; i < 2 * half; i++) x[i] = value(4);
    kn->rope(x, cs, sn, half, pairs);
}

static void case_gelu_mul(const sh_kernels *kn) {
    int n = upto(200), alias = (int)(rnd() % 3);
    const float *g = odd_floats(n), *u = odd_floats(n);
    float *y = output(n);
    if (alias) memcpy(y, alias == 1 ? g : u, (size_t)n * 4);
    kn->gelu_mul(y, alias == 1 ? y : g, alias == 2 ? y : u, n);
}

static void case_add(const sh_kernels *kn) {
    int n = upto(200);
    kn->add(output(n), odd_floats(n), n);
}

static void case_scale(const sh_kernels *kn) {
    int n = upto(200);
    const float *x = odd_floats(n);
    float *y = output(n), s = odd_value();
    bool in_place = rnd() % 2;
    kn->scale(y, in_place ? y : x, s, n);
}

static void case_axpy(const sh_kernels *kn) {
    int n = upto(200);
    float *y = output(n), a = odd_value();
    kn->axpy(y, a, odd_floats(n), n);
}

static void case_softcap(const sh_kernels *kn) {
    int n = upto(200);
    const float *x = odd_floats(n);
    float *y = output(n);
    memcpy(y, x, (size_t)n * 4);
    kn->softcap(y, rnd() % 2 ? 30.0f : 0.7f, n);
}

static void case_from_bf16(const sh_kernels *kn) {
    int n = upto(200);
    uint16_t *x = guarded((size_t)n * 2);
    for (int i = 0; i < n; i++) x[i] = (uint16_t)rnd();
    kn->from_bf16(output(n), x, n);
}

static void case_to_bf16(const sh_kernels *kn) {
    int n = upto(200);
    float *x = odd_floats(n);
    for (int i = 0; i < n; i++) {
        uint32_t u = rnd();
        if (rnd() % 2) memcpy(x + i, &u, 4);
    }
    kn->to_bf16((uint16_t *)(void *)output((n + 1) / 2), x, n);
}

/* Vectors as to_kv8 makes them, and codes and scales of any bits. */
static void case_from_kv8(const sh_kernels *kn) {
    int n = rnd() % 4 ? upto(200) : 512, rows = upto(5);
    size_t bytes = sh_kv8_bytes(n);
    uint8_t *x = guarded((size_t)rows * bytes);
    for (size_t i = 0; i < (size_t)rows * bytes; i++) x[i] = (uint8_t)rnd();
    for (int r = 0; r < rows && rnd() % 4; r++) ref_level()->to_kv8(x + (size_t)r * bytes, odd_floats(n), n);
    kn->from_kv8(output(rows * n), x, n, rows);
}

static void case_to_kv8(const sh_kernels *kn) {
    static const float sizes[] = {4, 1e-38f, 0x1p-100f, 3e38f, 0};
    int n = rnd() % 4 ? upto(200) : 256;
    const float *x = rnd() % 2 ? odd_floats(n) : floats(n, sizes[rnd() % 5]);
    kn->to_kv8((uint8_t *)output((int)(sh_kv8_bytes(n) + 3) / 4), x, n);
}

static void case_scores(const sh_kernels *kn) {
    int hd = rnd() % 4 ? upto(90) : 256, rows = upto(9), keys = upto(50);
    int ldq = hd + (int)(rnd() % 7), lds = keys + (int)(rnd() % 7);
    const float *q = floats((rows - 1) * ldq + hd, 2), *k = floats(keys * hd, rnd() % 8 ? 2 : 1e-38f);
    kn->scores(output((rows - 1) * lds + keys), (size_t)lds, q, (size_t)ldq, rows, k, keys, hd);
}

static const uint16_t *bf16s(int n) {
    uint16_t *x = guarded((size_t)n * sizeof *x);
    uint32_t size = rnd() % 8 ? 0x3e00 : 0; /* now and then denormal */
    for (int i = 0; i < n; i++) x[i] = (uint16_t)((rnd() & 0x80ff) | size);
    return x;
}

static void case_scores_bf16(const sh_kernels *kn) {
    int hd = rnd() % 4 ? upto(90) : 256, rows = upto(11), keys = upto(50);
    int ldq = hd + (int)(rnd() % 7), lds = keys + (int)(rnd() % 7);
    const float *q = floats((rows - 1) * ldq + hd, 2);
    kn->scores_bf16(output((rows - 1) * lds + keys), (size_t)lds, q, (size_t)ldq, rows, bf16s(keys * hd), keys, hd,
                    rnd() % 2 ? bf16s(keys * hd) : NULL);
}

/* Random sums to go on from. */
static float *begun(int rows, int ldo, int hd) {
    float *o = output((rows - 1) * ldo + hd);
    for (int r = 0; r < rows; r++)
        for (int d = 0; d < hd; d++) o[r * ldo + d] = value(3);
    return o;
}

static void case_add_weighted(const sh_kernels *kn) {
    int hd = upto(150), rows = upto(11), keys = upto(60), ldo = hd + (int)(rnd() % 7), lds = keys + (int)(rnd() % 7);
    const float *p = floats((rows - 1) * lds + keys, 1), *v = floats(keys * hd, 2);
    float *o = begun(rows, ldo, hd);
    kn->add_weighted(o, (size_t)ldo, p, (size_t)lds, rows, v, keys, hd);
}

static void case_mul(const sh_kernels *kn) {
    int n = upto(200);
    const float *a = odd_floats(n), *b = odd_floats(n);
    kn->mul(output(n), a, b, n);
}

static void case_add_weighted_bf16(const sh_kernels *kn) {
    int hd = upto(150), rows = upto(11), keys = upto(60), ldo = hd + (int)(rnd() % 7), lds = keys + (int)(rnd() % 7);
    const float *p = floats((rows - 1) * lds + keys, 1);
    float *o = begun(rows, ldo, hd);
    kn->add_weighted_bf16(o, (size_t)ldo, p, (size_t)lds, rows, bf16s(keys * hd), keys, hd,
                          rnd() % 2 ? bf16s(keys * hd) : NULL);
}

static void fill_scores(float *s, int n) {
    float size = rnd() % 2 ? 5 : 90;
    for (int i = 0; i < n; i++) s[i] = rnd() % 16 ? value(size) : -INFINITY;
    if (rnd() % 8 == 0) {
        for (int i = 0; i < n; i++) s[i] = -INFINITY;
    }
}

static void case_softmax_part(const sh_kernels *kn) {
    int keys = upto(150);
    float *y = output(keys + 2);
    fill_scores(y, keys);
    kn->softmax_part(y, keys, y + keys, y + keys + 1);
}

static void case_max_sum_exp(const sh_kernels *kn) {
    int n = upto(1024);
    float *x = floats(n, 1), *y = output(2);
    fill_scores(x, n);
    kn->max_sum_exp(x, n, y, y + 1);
}

static void case_weighted_sum(const sh_kernels *kn) {
    int hd = upto(150), rows = upto(9), keys = upto(60), ldo = hd + (int)(rnd() % 7), lds = keys + (int)(rnd() % 7);
    const float *p = floats((rows - 1) * lds + keys, 1), *v = floats(keys * hd, 2);
    kn->weighted_sum(output((rows - 1) * ldo + hd), (size_t)ldo, p, (size_t)lds, rows, v, keys, hd);
}

static void case_merge(const sh_kernels *kn) {
    int hd = upto(150);
    const float *ob = floats(hd, 3);
    float *oa = output(hd + 2);
    oa[hd] = value(50);
    oa[hd + 1] = 3.5f;
    float mb = rnd() % 4 ? value(50) : -INFINITY;
    kn->merge(oa, oa + hd, oa + hd + 1, ob, mb, 7.25f, hd);
}

static void case_exp(const sh_kernels *kn) {
    int n = upto(200);
    const float *x = odd_floats(n);
    kn->exp(output(n), x, n);
}

static void case_sincos(const sh_kernels *kn) {
    int n = upto(200);
    float *x = odd_floats(n), *y = output(2 * n);
    for (int i = 0; i < n; i++) x[i] *= rnd() % 2 ? 1.0f : 1e5f;
    kn->sincos(y, y + n, x, n);
}

static const struct {
    const char *name;
    void (*run)(const sh_kernels *kn);
} cases[] = {
    {"gemm", case_gemm},
    {"gemm, wide", case_gemm_wide},
    {"gemm_q", case_gemm_q},
    {"gemm_q, wide", case_gemm_q_wide},
    {"gemm_q, many", case_gemm_q_many},
    {"gemm_q, long", case_gemm_q_long},
    {"quantize", case_quantize},
    {"quant_q8, quant_q4", case_quant_group},
    {"rmsnorm", case_rmsnorm},
    {"rope", case_rope},
    {"gelu_mul", case_gelu_mul},
    {"add", case_add},
    {"scale", case_scale},
    {"axpy", case_axpy},
    {"mul", case_mul},
    {"softcap", case_softcap},
    {"from_bf16", case_from_bf16},
    {"to_bf16", case_to_bf16},
    {"from_kv8", case_from_kv8},
    {"to_kv8", case_to_kv8},
    {"scores", case_scores},
    {"softmax_part", case_softmax_part},
    {"max_sum_exp", case_max_sum_exp},
    {"weighted_sum", case_weighted_sum},
    {"scores_bf16", case_scores_bf16},
    {"add_weighted", case_add_weighted},
    {"add_weighted_bf16", case_add_weighted_bf16},
    {"merge", case_merge},
    {"exp", case_exp},
    {"sincos", case_sincos},
};

/* ---- tests ------------------------------------------------------------------------------------------------------- */

static const sh_kernels *level(const char *name) {
    const sh_kernels *kn = NULL;
    return sh_kernels_get(name, &kn) == SH_OK ? kn : NULL;
}

static bool equal(const float *a, const float *b, int n, int *where) {
    for (int i = 0; i < n; i++) {
        if (memcmp(a + i, b + i, 4) != 0 && !(isnan(a[i]) && isnan(b[i]))) {
            *where = i;
            return false;
        }
    }
    return true;
}

static bool same_as_ref(const sh_kernels *kn, const sh_kernels *ref, int c, uint64_t s) {
    seed = s;
    cases[c].run(ref);
    float *want = result;
    int n = n_result, where = 0;
    seed = s;
    cases[c].run(kn);
    bool is = n == n_result && equal(want, result, n, &where);
    if (!is) {
        printf("\n    %s %s, seed %llu: at %d of %d: %a, plain C %a\n", kn->isa, cases[c].name, (unsigned long long)s,
               where - BORDER, n - 2 * BORDER, (double)result[where], (double)want[where]);
    }
    release_all();
    return is;
}

/* blas has its own order of sums in gemm: everything else must be equal there too. */
static void test_levels_equal_ref(void) {
    const sh_kernels *ref = level("ref");
    CU_ASSERT_PTR_NOT_NULL_FATAL(ref);
    for (int l = 1; sh_kernels_levels[l]; l++) {
        const sh_kernels *kn = level(sh_kernels_levels[l]);
        if (!kn) {
            printf("\n    %s: not on this CPU\n", sh_kernels_levels[l]);
            continue;
        }
        CU_ASSERT_STRING_EQUAL(kn->isa, sh_kernels_levels[l]);
        for (int c = 0; c < (int)(sizeof cases / sizeof *cases); c++) {
            bool sums = strncmp(cases[c].name, "gemm", 4) == 0;
            if (sums && strcmp(kn->isa, "blas") == 0) continue;
            int rounds = strchr(cases[c].name, ',') && sums ? FEW_ROUNDS : ROUNDS; /* the large ones */
            for (int i = 0; i < rounds; i++) {
                bool is = same_as_ref(kn, ref, c, 0x9e3779b97f4a7c15u * (uint64_t)(i + 1) + (uint64_t)c);
                CU_ASSERT(is);
                if (!is) break;
            }
        }
    }
}

/* A table whose add is wrong in one element past a tail must be caught: the comparison itself can fail. */
static void wrong_add(float *y, const float *x, int n) {
    for (int i = 0; i <= n; i++) y[i] += i < n ? x[i] : 1;
}

static void test_comparison_can_fail(void) {
    sh_kernels bad = *level("ref");
    bad.isa = "deliberately wrong";
    bad.add = wrong_add;
    for (int c = 0; c < (int)(sizeof cases / sizeof *cases); c++) {
        if (strcmp(cases[c].name, "add") == 0) CU_ASSERT_FALSE(same_as_ref(&bad, level("ref"), c, 12345));
    }
}

static float plain_dot(const float *x, const uint16_t *w, int k) {
    float acc = 0;
    for (int i = 0; i < k; i++) {
        uint32_t u = (uint32_t)w[i] << 16;
        float f;
        memcpy(&f, &u, 4);
        acc = fmaf(x[i], f, acc);
    }
    return acc;
}

/* The product is the sum in order of K of the matrix as it was before packing, packed in two pieces. */
static void test_gemm_is_the_plain_sum(void) {
    enum { N = 77, K = 131, LD = 140, M = 3 };
    static uint16_t src[N * LD];
    static float x[M * K], y[M * N];
    seed = 77;
    for (int i = 0; i < N * LD; i++) src[i] = (uint16_t)((rnd() & 0x80ff) | 0x3e00);
    for (int i = 0; i < M * K; i++) x[i] = value(2);
    uint32_t *d = guarded(sh_wmat_bytes(SH_W_BF16, N, K));
    sh_pack_bf16(d, src, LD, N, K, 1, 3);
    sh_pack_bf16(d, src, LD, N, K, 0, 1);
    sh_wmat w = {.n = N, .k = K, .data = d};
    for (int l = 0; sh_kernels_levels[l]; l++) {
        const sh_kernels *kn = level(sh_kernels_levels[l]);
        if (!kn) continue;
        bool exact = strcmp(kn->isa, "blas") != 0, is = true;
        kn->gemm(&w, 0, 3, x, K, M, y, N);
        for (int r = 0; r < M; r++) {
            for (int i = 0; i < N; i++) {
                float want = plain_dot(x + r * K, src + i * LD, K), got = y[r * N + i];
                is = is && (exact ? got == want : fabsf(got - want) < 1e-3f);
            }
        }
        CU_ASSERT(is);
    }
    release_all();
}

/* A product of quantised rows and weights is the product of what their codes stand for. */
static void test_gemm_q_meaning(void) {
    enum { N = 70, K = 150, M = 3 };
    const sh_kernels *kn;
    CU_ASSERT_EQUAL_FATAL(sh_kernels_select(&kn), SH_OK);
    seed = 31;
    for (sh_wtype t = SH_W_Q8; t <= SH_W_Q4; t++) {
        float w_row[K], *x = floats(M * K, 2), y[M * N];
        sh_wmat w = random_quant(t, N, K);
        sh_qrows q = quantized(t, x, K, M);
        kn->gemm_q(&w, 0, sh_wmat_panels(N), &q, 0, M, y, N);
        for (int i = 0; i < N; i++) {
            sh_quant_row(&w, i, w_row);
            for (int r = 0; r < M; r++) {
                double want = 0, true_sum = 0, size = 0;
                for (int j = 0; j < K; j++) {
                    size_t g = (size_t)(j / sh_wtype_group(t));
                    double a = (double)q.scale[(size_t)r * q.groups + g] * q.code[(size_t)r * q.ld + (size_t)j];
                    want += a * (double)w_row[j];
                    true_sum += (double)x[r * K + j] * (double)w_row[j];
                    size += fabs((double)x[r * K + j] * (double)w_row[j]);
                }
                CU_ASSERT(fabs((double)y[r * N + i] - want) < 1e-5 * size);
                CU_ASSERT(fabs(want - true_sum) < 0.005 * size); /* activations lose little */
            }
        }
        release_all();
    }
}

/* What a group of weights becomes: within half a step, and unchanged where it lies on the grid already. */
static void test_quant_formats(void) {
    const sh_kernels *kn;
    uint8_t code[SH_Q8_GROUP];
    float w[SH_Q8_GROUP];
    CU_ASSERT_EQUAL_FATAL(sh_kernels_select(&kn), SH_OK);
    seed = 8;
    for (int round = 0; round < 500; round++) {
        float size = ldexpf(1, -(int)(rnd() % 12));
        for (int i = 0; i < SH_Q8_GROUP; i++) w[i] = value(size);
        float d = sh_half_to_float(kn->quant_q8(w, code));
        for (int i = 0; i < SH_Q8_GROUP; i++)
            CU_ASSERT(code[i] >= 1 && fabsf(w[i] - d * (float)(code[i] - SH_Q8_ZERO)) <= 0.51f * fabsf(d));
        d = sh_half_to_float(kn->quant_q4(w, code));
        float worst = 0, big = 0;
        for (int i = 0; i < SH_Q4_GROUP; i++) {
            worst = fmaxf(worst, fabsf(w[i] - d * (float)(code[i] - SH_Q4_ZERO)));
            big = fmaxf(big, fabsf(w[i]));
        }
        CU_ASSERT(worst <= big / 7);
        /* on a grid: any scale, any codes, as bf16 keeps them */
        float step = sh_half_to_float(sh_float_to_half(value(size)));
        for (int i = 0; i < SH_Q4_GROUP; i++) {
            float exact = step * (float)((int)(rnd() % 16) - 8);
            uint32_t u;
            memcpy(&u, &exact, 4);
            u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
            memcpy(w + i, &u, 4);
        }
        d = sh_half_to_float(kn->quant_q4(w, code));
        for (int i = 0; i < SH_Q4_GROUP; i++)
            CU_ASSERT(fabsf(w[i] - d * (float)(code[i] - SH_Q4_ZERO)) <= 0x1p-7f * fabsf(w[i]));
    }
    const float zero[SH_Q8_GROUP] = {0}, odd[SH_Q8_GROUP] = {1, NAN, 3}, big[SH_Q8_GROUP] = {INFINITY};
    CU_ASSERT(sh_half_to_float(kn->quant_q4(zero, code)) == 0 && code[5] == SH_Q4_ZERO);
    CU_ASSERT(sh_half_to_float(kn->quant_q8(zero, code)) == 0 && code[5] == SH_Q8_ZERO);
    CU_ASSERT(isnan(sh_half_to_float(kn->quant_q4(odd, code))));
    CU_ASSERT(isnan(sh_half_to_float(kn->quant_q8(big, code))));
}

/* Distance in units of the last place of f32. */
static double ulps(float got, double want) {
    if (got == (float)want) return 0;
    int e;
    (void)frexp(want, &e);
    return fabs((double)got - want) / ldexp(1, (e < -125 ? -125 : e) - 24);
}

static double worse(double a, double b) {
    return a > b ? a : b;
}

/* The stated errors (docs/decisions/0002-arithmetic.md): exp 1.1 ulp, tanh 2.5, sin and cos 0.51, log 0.51;
 * gelu 3e-7 of max(1, |x|). Other levels have the same bits. */
static void test_elementary_functions(void) {
    const sh_kernels *kn = level("ref");
    double e = 0, t = 0, g = 0, s = 0, l = 0;
    for (float x = -104; x < 89; x += 0.00217f) {
        float y;
        kn->exp(&y, &x, 1);
        e = worse(e, ulps(y, exp((double)x)));
    }
    for (float x = -12; x < 12; x += 0.00029f) {
        float y = x, one = 1;
        kn->softcap(&y, 1, 1);
        t = worse(t, ulps(y, tanh((double)x)));
        kn->gelu_mul(&y, &x, &one, 1);
        double u = sqrt(2 / M_PI) * ((double)x + 0.044715 * (double)x * (double)x * (double)x);
        g = worse(g, fabs((double)y - 0.5 * (double)x * (1 + tanh(u))) / fmax(1, fabs((double)x)));
    }
    for (float x = 1e-7f; x < 3e38f; x *= 1.0003f) {
        float sn, cs;
        kn->sincos(&sn, &cs, &x, 1);
        s = worse(s, worse(ulps(sn, sin((double)x)), ulps(cs, cos((double)x))));
    }
    for (int i = 1; i < 2000; i++) l = worse(l, ulps(sh_logf((float)i * 0x1p-149f), log(i * 0x1p-149)));
    for (float x = 1e-37f; x < 3e38f; x *= 1.0007f) l = worse(l, ulps(sh_logf(x), log((double)x)));
    printf("\n    ulp: exp %.3f, tanh %.3f, sin and cos %.3f, log %.3f; gelu %.2g\n", e, t, s, l, g);
    CU_ASSERT(e < 1.1 && t < 2.5 && s < 0.51 && l < 0.51 && g < 3e-7);
    CU_ASSERT(sh_expf(0) == 1 && sh_expf(-INFINITY) == 0 && sh_expf(INFINITY) == INFINITY && isnan(sh_expf(NAN)));
    CU_ASSERT(sh_logf(0) == -INFINITY && isnan(sh_logf(-1)) && sh_logf(1) == 0 && sh_logf(INFINITY) == INFINITY);
}

/* A key's weight is exp of its distance from the largest score, or 0; never, on any level, a subnormal number. Nor is
 * there one behind it: not in what the weights multiply, not in what segments merge to. */
static void test_weights(void) {
    enum { KEYS = 45 };
    CU_ASSERT(sh_weightf(0) == 1 && sh_weightf(-64) > 0 && sh_weightf(-64.01f) == 0 && isnan(sh_weightf(NAN)));
    CU_ASSERT(sh_weightf(-INFINITY) == 0 && sh_weightf(-63) == sh_expf(-63));
    for (const char *const *isa = sh_kernels_levels; *isa; isa++) {
        const sh_kernels *kn = level(*isa);
        for (float far = -50; kn && far > -130; far -= 0.37f) {
            float s[KEYS] = {0}, x[KEYS], v[KEYS], m = 0, l = 0, o = 0, sum = 0;
            for (int i = 0; i < KEYS; i++) x[i] = s[i] = i % 2 ? far + 0.003f * (float)i : i < KEYS - 1 ? -INFINITY : 0;
            for (int i = 0; i < KEYS; i++) v[i] = 1e-6f;
            kn->softmax_part(s, KEYS, &m, &l);
            for (int i = 0; i < KEYS; i++) CU_ASSERT(s[i] == sh_weightf(x[i]) && fpclassify(s[i]) != FP_SUBNORMAL);
            kn->weighted_sum(&o, 1, s, KEYS, 1, v, KEYS - 1, 1);
            CU_ASSERT(fpclassify(o) != FP_SUBNORMAL);
            kn->merge(&sum, &m, &l, v, far, 1, 1); /* a segment whose largest score is far below */
            CU_ASSERT(fpclassify(sum) != FP_SUBNORMAL);
        }
    }
}

/* Attention entries mean what they say: against double precision. */
static void test_attention_meaning(void) {
    enum { HD = 40, KEYS = 37 };
    float q[HD], k[KEYS * HD], s[KEYS], o[HD], m, l;
    const sh_kernels *kn;
    CU_ASSERT_EQUAL_FATAL(sh_kernels_select(&kn), SH_OK);
    seed = 5;
    for (int i = 0; i < HD; i++) q[i] = value(1);
    for (int i = 0; i < KEYS * HD; i++) k[i] = value(1);
    kn->scores(s, KEYS, q, HD, 1, k, KEYS, HD);
    double want[HD] = {0}, sum = 0, top = -1e9;
    double d[KEYS];
    for (int j = 0; j < KEYS; j++) {
        d[j] = 0;
        for (int i = 0; i < HD; i++) d[j] += (double)q[i] * (double)k[j * HD + i];
        CU_ASSERT(fabs((double)s[j] - d[j]) < 1e-5);
        top = d[j] > top ? d[j] : top;
    }
    for (int j = 0; j < KEYS; j++) {
        sum += exp(d[j] - top);
        for (int i = 0; i < HD; i++) want[i] += exp(d[j] - top) * (double)k[j * HD + i];
    }
    /* in two segments, merged */
    float s2[KEYS], o2[HD], m2, l2;
    memcpy(s2, s, sizeof s2);
    kn->softmax_part(s, 20, &m, &l);
    kn->weighted_sum(o, HD, s, KEYS, 1, k, 20, HD);
    kn->softmax_part(s2 + 20, KEYS - 20, &m2, &l2);
    kn->weighted_sum(o2, HD, s2 + 20, KEYS, 1, k + 20 * HD, KEYS - 20, HD);
    kn->merge(o, &m, &l, o2, m2, l2, HD);
    CU_ASSERT(fabs((double)m - top) < 1e-5 && fabs((double)l / sum - 1) < 1e-5);
    for (int i = 0; i < HD; i++) CU_ASSERT(fabs((double)o[i] / (double)l - want[i] / sum) < 1e-5);
}

/* Keys and values as they are stored give what they give when widened, in one go or in pieces. */
static void test_attention_in_place(void) {
    enum { HD = 52, KEYS = 41, ROWS = 3, FIRST = 17 };
    float q[ROWS * HD], wide[KEYS * HD], s[ROWS * KEYS], s2[ROWS * KEYS], o[ROWS * HD], o2[ROWS * HD] = {0};
    seed = 11;
    for (int i = 0; i < ROWS * HD; i++) q[i] = value(1);
    const uint16_t *k = bf16s(KEYS * HD);
    for (const char *const *isa = sh_kernels_levels; *isa; isa++) {
        const sh_kernels *kn = level(*isa);
        if (!kn || !kn->scores_bf16 || strcmp(*isa, "blas") == 0) continue;
        kn->from_bf16(wide, k, KEYS * HD);
        kn->scores(s, KEYS, q, HD, ROWS, wide, KEYS, HD);
        kn->scores_bf16(s2, KEYS, q, HD, ROWS, k, FIRST, HD, NULL);
        kn->scores_bf16(s2 + FIRST, KEYS, q, HD, ROWS, k + FIRST * HD, KEYS - FIRST, HD, k);
        CU_ASSERT(memcmp(s, s2, sizeof s) == 0);
        kn->weighted_sum(o, HD, s, KEYS, ROWS, wide, KEYS, HD);
        memset(o2, 0, sizeof o2);
        kn->add_weighted_bf16(o2, HD, s, KEYS, ROWS, k, FIRST, HD, NULL);
        kn->add_weighted_bf16(o2, HD, s + FIRST, KEYS, ROWS, k + FIRST * HD, KEYS - FIRST, HD, k);
        CU_ASSERT(memcmp(o, o2, sizeof o) == 0);
    }
    release_all();
}

typedef struct making {
    const float *from;
    float *x;
    int k;
    atomic_int made;
} making;

static void make_rows(void *arg, int lo, int hi) {
    making *j = arg;
    memcpy(j->x + (size_t)lo * (size_t)j->k, j->from + (size_t)lo * (size_t)j->k, (size_t)(hi - lo) * (size_t)j->k * 4);
    atomic_fetch_add(&j->made, hi - lo);
}

/* Rows that are made on the way give `want`, and each is made once. */
static bool makes_rows(sh_team *team, const sh_kernels *kn, const sh_wmat *w, const float *x, int m,
                       const float *want) {
    size_t bytes = (size_t)m * (size_t)w->k * 4, out = (size_t)m * (size_t)w->n * 4, ld = (size_t)w->n;
    float *rows = calloc(1, bytes), *y = malloc(out);
    making j = {.from = x, .x = rows, .k = w->k};
    sh_row_maker make = {.fn = make_rows, .arg = &j, .width = ld};
    sh_linear_made(team, kn, 1, &w, &make, rows, (size_t)w->k, m, &y, &ld);
    bool same = memcmp(y, want, out) == 0 && j.made == m;
    free(rows);
    free(y);
    return same;
}

/* Bytes do not depend on threads, on the number of rows, or on whether matrices run together. */
static void test_linear_invariance(void) {
    enum { N = 150, N2 = 70, K = 333, M = 130 };
    const sh_kernels *kn;
    CU_ASSERT_EQUAL_FATAL(sh_kernels_select(&kn), SH_OK);
    seed = 99;
    sh_wmat w = random_wmat(N, K), w2 = random_wmat(N2, K);
    const float *x = floats(M * K, 2);
    float *want = guarded(M * N * 4), *want2 = guarded(M * N2 * 4), *y = guarded(M * N * 4), *y2 = guarded(M * N2 * 4);
    level("ref")->gemm(&w, 0, sh_wmat_panels(N), x, K, M, want, N);
    level("ref")->gemm(&w2, 0, sh_wmat_panels(N2), x, K, M, want2, N2);
    static const int threads[] = {1, 2, 3, 7};
    static const int rows[] = {1, 2, 5, 7, 13, 41, 100, 130}; /* shares, pieces, pieces of rows */
    for (int t = 0; t < 4; t++) {
        sh_team *team;
        CU_ASSERT_EQUAL_FATAL(sh_team_create(threads[t], NULL, 0, &team), SH_OK);
        CU_ASSERT_EQUAL(sh_team_size(team), threads[t]);
        for (int i = 0; i < 8; i++) {
            int first = M - rows[i];
            memset(y, 0, M * N * 4);
            sh_linear(team, kn, &w, x + first * K, K, rows[i], y + first * N, N);
            CU_ASSERT(memcmp(y + first * N, want + first * N, (size_t)(rows[i] * N) * 4) == 0);
            memset(y, 0, M * N * 4);
            memset(y2, 0, M * N2 * 4);
            sh_linear_multi(team, kn, 2, (const sh_wmat *const[]){&w, &w2}, x, K, rows[i], (float *const[]){y, y2},
                            (const size_t[]){N, N2});
            CU_ASSERT(memcmp(y, want, (size_t)(rows[i] * N) * 4) == 0);
            CU_ASSERT(memcmp(y2, want2, (size_t)(rows[i] * N2) * 4) == 0);
            CU_ASSERT(makes_rows(team, kn, &w, x, rows[i], want));
        }
        sh_team_destroy(&team);
        CU_ASSERT_PTR_NULL(team);
    }
    release_all();
}

/* The same for quantised matrices, and for any amount of scratch. */
static void test_linear_quantized(void) {
    enum { N = 150, N2 = 70, K = 333, M = 60 };
    static const int rooms[] = {1, 5, 9, 30, M}; /* rows at a time: runs and pieces, in one go and in several */
    const sh_kernels *kn;
    CU_ASSERT_EQUAL_FATAL(sh_kernels_select(&kn), SH_OK);
    seed = 17;
    for (sh_wtype t = SH_W_Q8; t <= SH_W_Q4; t++) {
        sh_wmat w = random_quant(t, N, K), w2 = random_quant(t, N2, K);
        float *x = floats(M * K, 2);
        float *want = guarded(M * N * 4), *want2 = guarded(M * N2 * 4), *y = guarded(M * N * 4);
        float *y2 = guarded(M * N2 * 4);
        sh_qrows q = quantized(t, x, K, M);
        level("ref")->gemm_q(&w, 0, sh_wmat_panels(N), &q, 0, M, want, N);
        level("ref")->gemm_q(&w2, 0, sh_wmat_panels(N2), &q, 0, M, want2, N2);
        for (int threads = 1; threads <= 3; threads += 2)
            for (int i = 0; i < 5; i++) {
                sh_team *team;
                CU_ASSERT_EQUAL_FATAL(sh_team_create(threads, NULL, 0, &team), SH_OK);
                CU_ASSERT_EQUAL_FATAL(sh_team_reserve(team, sh_qrows_bytes(t, K, rooms[i])), SH_OK);
                memset(y, 0, M * N * 4);
                memset(y2, 0, M * N2 * 4);
                sh_linear_multi(team, kn, 2, (const sh_wmat *const[]){&w, &w2}, x, K, M, (float *const[]){y, y2},
                                (const size_t[]){N, N2});
                CU_ASSERT(memcmp(y, want, M * N * 4) == 0 && memcmp(y2, want2, M * N2 * 4) == 0);
                CU_ASSERT(makes_rows(team, kn, &w, x, M, want));
                sh_team_destroy(&team);
            }
        release_all();
    }
}

static void note_member(void *arg, int member, int size) {
    int *seen = arg;
    seen[member] += size;
}

static void test_team(void) {
    sh_team *team = NULL;
    CU_ASSERT_EQUAL(sh_team_create(0, NULL, 0, &team), SH_EINPUT);
    CU_ASSERT_EQUAL(sh_team_create(2, (const int[]){-3}, 1, &team), SH_EINPUT);
    CU_ASSERT_PTR_NULL(team);
    int seen[3] = {0};
    CU_ASSERT_EQUAL_FATAL(sh_team_create(3, (const int[]){0}, 1, &team), SH_OK);
    for (int i = 0; i < 100; i++) sh_team_run(team, note_member, seen);
    CU_ASSERT(seen[0] == 300 && seen[1] == 300 && seen[2] == 300);
    sh_team_destroy(&team);
    int covered = 0;
    for (int i = 0; i < 7; i++) {
        int lo, hi;
        sh_team_share(100, i, 7, &lo, &hi);
        CU_ASSERT(lo == covered && hi - lo >= 14 && hi - lo <= 15);
        covered = hi;
    }
    CU_ASSERT_EQUAL(covered, 100);
}

static void note_binding(void *arg, int member, int size) {
    int *cpu = arg;
    cpu_set_t set;
    cpu[member] = -1;
    if (pthread_getaffinity_np(pthread_self(), sizeof set, &set) != 0 || CPU_COUNT(&set) != 1) return;
    for (int i = 0; i < CPU_SETSIZE; i++) {
        if (CPU_ISSET((size_t)i, &set)) cpu[member] = i;
    }
    (void)size;
}

/* A rank: its own team, on one CPU after the other; *arg is the last CPU of the process's set. */
static void *bound_rank(void *arg) {
    int last = *(int *)arg, bad = 0, cpu[3];
    for (int i = 0; i < 4; i++) {
        sh_team *team;
        const int cpus[] = {i % 2 ? last : 0, last};
        if (sh_team_create(3, cpus, 2, &team) != SH_OK) return arg;
        for (int k = 0; k < 5; k++) {
            sh_team_run(team, note_binding, cpu);
            bad += cpu[0] != cpus[0] || cpu[1] != last || cpu[2] != cpus[0];
        }
        sh_team_destroy(&team);
    }
    return bad ? arg : NULL;
}

/* Members sit where they were told, in two teams at once and in one after the other. */
static void test_binding(void) {
    cpu_set_t set;
    CU_ASSERT_EQUAL_FATAL(sched_getaffinity(0, sizeof set, &set), 0);
    if (!CPU_ISSET(0, &set)) return; /* a CPU set without CPU 0: nothing to bind to by that number */
    int last = 0;
    for (int i = 0; i < CPU_SETSIZE; i++) last = CPU_ISSET((size_t)i, &set) ? i : last;
    pthread_t a, b;
    void *wrong_a, *wrong_b;
    CU_ASSERT_EQUAL_FATAL(pthread_create(&a, NULL, bound_rank, &last), 0);
    CU_ASSERT_EQUAL_FATAL(pthread_create(&b, NULL, bound_rank, &last), 0);
    pthread_join(a, &wrong_a);
    pthread_join(b, &wrong_b);
    CU_ASSERT(!wrong_a && !wrong_b);
}

static void test_limits(void) {
    sh_team *team;
    sh_ceiling lim = {0};
    CU_ASSERT_EQUAL_FATAL(sh_team_create(2, NULL, 0, &team), SH_OK);
    CU_ASSERT_EQUAL(sh_ceiling_measure(team, 1000, &lim), SH_EINPUT);
    CU_ASSERT(lim.read_gbs == 0);
    CU_ASSERT_EQUAL(sh_ceiling_measure(team, (size_t)8 << 20, &lim), SH_OK);
    CU_ASSERT(lim.read_gbs > 0.05 && lim.read_gbs < 1e5 && lim.fma_gflops > 0.05 && lim.fma_gflops < 1e5);
    sh_team_destroy(&team);
}

static void test_select(void) {
    const sh_kernels *kn = NULL;
    CU_ASSERT_EQUAL(sh_kernels_get("mmx", &kn), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(
        sh_error_text(),
        "instruction set 'mmx' is unknown: allowed are ref, avx2, avxvnni, avx512, avx512vnni, amx, blas, "
        "model:FMA,BYTES");
    setenv("SHOAL_ISA", "ref", 1);
    CU_ASSERT_EQUAL(sh_kernels_select(&kn), SH_OK);
    CU_ASSERT_STRING_EQUAL(kn->isa, "ref");
    setenv("SHOAL_ISA", "sse9", 1);
    CU_ASSERT_EQUAL(sh_kernels_select(&kn), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "SHOAL_ISA"));
    char line[300] = "";
    CU_ASSERT_EQUAL(sh_blas_check(line, sizeof line), SH_OK);
    CU_ASSERT_PTR_NOT_NULL(strstr(line, "; core "));
    unsetenv("SHOAL_ISA");
    CU_ASSERT_EQUAL(sh_kernels_select(&kn), SH_OK);
    CU_ASSERT_STRING_NOT_EQUAL(kn->isa, "blas");
}

static float kv8_scale(const uint8_t *y, int n, int group) {
    float s;
    memcpy(&s, y + n + 4 * group, sizeof s);
    return s;
}

/* Half a step of its group away at most; what cannot be kept is 0 or NaN, in its group alone. */
static void test_kv8_meaning(void) {
    enum { N = 3 * SH_KV8_GROUP + 10 };
    float x[N], z[N];
    uint8_t y[N + 16];
    CU_ASSERT_EQUAL_FATAL(sh_kv8_bytes(N), N + 16);
    CU_ASSERT_EQUAL(sh_kv8_bytes(SH_KV8_GROUP), SH_KV8_GROUP + 4);
    for (int l = 0; sh_kernels_levels[l]; l++) {
        const sh_kernels *kn = level(sh_kernels_levels[l]);
        if (!kn) continue;
        seed = 11;
        for (int i = 0; i < N; i++) x[i] = value(i / SH_KV8_GROUP == 1 ? 50 : 2);
        x[5] = -4; /* the largest of its group: code −127 */
        kn->to_kv8(y, x, N);
        kn->from_kv8(z, y, N, 1);
        CU_ASSERT_EQUAL((int8_t)y[5], -127);
        CU_ASSERT_DOUBLE_EQUAL(kv8_scale(y, N, 0), 4 / 127.0, 1e-8);
        for (int i = 0; i < N; i++) CU_ASSERT(fabsf(z[i] - x[i]) <= 0.5001f * kv8_scale(y, N, i / SH_KV8_GROUP));
        for (int i = 0; i < SH_KV8_GROUP; i++) x[i] = i % 2 ? 0x1p-101f : -0.0f;
        x[SH_KV8_GROUP + 3] = -INFINITY;
        x[2 * SH_KV8_GROUP] = NAN;
        kn->to_kv8(y, x, N);
        kn->from_kv8(z, y, N, 1);
        for (int i = 0; i < N; i++) {
            int g = i / SH_KV8_GROUP;
            CU_ASSERT(g == 0 ? z[i] == 0 : g < 3 ? isnan(z[i]) : fabsf(z[i] - x[i]) <= 0.5001f * kv8_scale(y, N, 3));
        }
    }
}

int main(void) {
    if (CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("kernels", NULL, NULL);
    CU_add_test(s, "levels equal plain C", test_levels_equal_ref);
    CU_add_test(s, "the comparison can fail", test_comparison_can_fail);
    CU_add_test(s, "gemm is the plain sum", test_gemm_is_the_plain_sum);
    CU_add_test(s, "gemm_q means the codes' product", test_gemm_q_meaning);
    CU_add_test(s, "quantised formats", test_quant_formats);
    CU_add_test(s, "keys and values in 8 bits", test_kv8_meaning);
    CU_add_test(s, "sh_linear, quantised", test_linear_quantized);
    CU_add_test(s, "elementary functions", test_elementary_functions);
    CU_add_test(s, "weights", test_weights);
    CU_add_test(s, "attention entries", test_attention_meaning);
    CU_add_test(s, "attention in place", test_attention_in_place);
    CU_add_test(s, "sh_linear invariance", test_linear_invariance);
    CU_add_test(s, "team", test_team);
    CU_add_test(s, "binding", test_binding);
    CU_add_test(s, "limits", test_limits);
    CU_add_test(s, "selection", test_select);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + CU_get_number_of_suites_failed();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
