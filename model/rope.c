/* The table of rotations. See rope.h. */
#include "model/rope.h"

#include <math.h>
#include <string.h>
#include "common/mem.h"

static size_t table_bytes(const sh_rope *r) {
    return (size_t)r->max_context * (size_t)r->pairs * sizeof(float);
}

static size_t freq_bytes(const sh_rope *r) {
    return (size_t)r->pairs * sizeof(float);
}

/* base^exponent for base > 0 by additions, multiplications and divisions alone: the C library's pow takes another path
 * on CPUs with FMA, and its last bit may differ. Relative error below 2^-45, far below that of the float32 it becomes.
 * ln base = e·ln 2 + 2·atanh(s); exp(y) = 2^n · exp(r) by Taylor's series. */
static double power(double base, double exponent) {
    const double ln2 = 0x1.62e42fefa39efp-1;
    int e;
    double m = frexp(base, &e), s = (m - 1) / (m + 1), q = 0, sum = 1;
    for (int k = 39; k >= 3; k -= 2) q = (q + 1.0 / k) * s * s;
    double y = exponent * (e * ln2 + 2 * (s + s * q)), n = floor(y / ln2 + 0.5), r = y - n * ln2;
    for (int k = 16; k >= 1; k--) sum = 1 + r / k * sum;
    return ldexp(sum, (int)n);
}

/* f_j = θ^(−2j/head_dim) / factor, each operation rounded to float32 as the reference does. */
static void fill_frequencies(sh_rope *r) {
    float theta = (float)r->theta, factor = (float)r->factor;
    for (int j = 0; j < r->pairs; j++) {
        float exponent = (float)(2 * j) / (float)r->head_dim;
        r->freq[j] = 1.0f / (float)power((double)theta, (double)exponent) / factor;
    }
}

sh_status sh_rope_create(const sh_layer *l, int max_context, sh_rope *out) {
    sh_rope r = {.head_dim = l->head_dim,
                 .pairs = l->rotated_pairs,
                 .theta = l->theta,
                 .factor = l->rope_factor,
                 .max_context = max_context};
    sh_status st;
    SH_TRY_OR(st, sh_mem_alloc(freq_bytes(&r), "rope frequencies", (void **)&r.freq), goto fail);
    SH_TRY_OR(st, sh_mem_alloc(freq_bytes(&r), "rope angles", (void **)&r.angle), goto fail);
    SH_TRY_OR(st, sh_mem_alloc(table_bytes(&r), "rope cosines", (void **)&r.cs), goto fail);
    SH_TRY_OR(st, sh_mem_alloc(table_bytes(&r), "rope sines", (void **)&r.sn), goto fail);
    fill_frequencies(&r);
    *out = r;
    return SH_OK;
fail:
    sh_rope_release(&r);
    return st;
}

void sh_rope_release(sh_rope *r) {
    sh_mem_free(r->freq, freq_bytes(r));
    sh_mem_free(r->angle, freq_bytes(r));
    sh_mem_free(r->cs, table_bytes(r));
    sh_mem_free(r->sn, table_bytes(r));
    *r = (sh_rope){0};
}

bool sh_rope_fits(const sh_rope *r, const sh_layer *l) {
    return r->head_dim == l->head_dim && r->pairs == l->rotated_pairs && r->theta == l->theta &&
           r->factor == l->rope_factor;
}

void sh_rope_reach(sh_rope *r, const sh_kernels *kn, int n) {
    for (; r->filled < n; r->filled++) {
        for (int j = 0; j < r->pairs; j++) r->angle[j] = (float)r->filled * r->freq[j];
        size_t at = (size_t)r->filled * (size_t)r->pairs;
        kn->sincos(r->sn + at, r->cs + at, r->angle, r->pairs);
    }
}
