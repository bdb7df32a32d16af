/* Times sh_linear_multi on made-up weights. See product_rates.h. */
#include "model/product_rates.h"

#include <stdint.h>
#include "common/clock.h"
#include "common/mem.h"
#include "model/linear.h"

#define OUTPUTS     6144 /* of a feed-forward of E2B, four at a time so that many threads have panels enough */
#define INPUTS      1536
#define FILL        0x1400 /* a small normal number as bf16 and as a half: weights, codes and scales alike */
#define MOST_PLACES 512    /* 10 GiB in 4 bits */
#define TRIES       3
#define SECONDS     0.3 /* after so much time no further try begins */
#define MANY        32  /* rows from which on arithmetic is what takes the time */
#define FEW_AT      3   /* of the numbers of rows: that of SH_PRODUCT_FEW */
#define ROUNDS      8

typedef struct bench {
    sh_team *team;
    const sh_kernels *kn;
    uint16_t *weights;
    size_t bytes;
    float *x, *y; /* [SH_PRODUCT_ROWS, INPUTS], SH_LINEAR_MOST × [SH_PRODUCT_ROWS, OUTPUTS] */
} bench;

/* Each member touches its part first, so that the pages lie on its own memory node. */
static void fill(void *arg, int member, int size) {
    bench *b = arg;
    size_t n = b->bytes / 2, lo = n * (size_t)member / (size_t)size, hi = n * ((size_t)member + 1) / (size_t)size;
    for (size_t i = lo; i < hi; i++) b->weights[i] = FILL;
}

/* SH_LINEAR_MOST matrices that begin at the k-th place. */
static double seconds_of(const bench *b, sh_wtype type, int k, int rows) {
    size_t one = sh_wmat_bytes(type, OUTPUTS, INPUTS), at = (size_t)k * SH_LINEAR_MOST * one;
    sh_wmat w[SH_LINEAR_MOST];
    const sh_wmat *list[SH_LINEAR_MOST];
    float *y[SH_LINEAR_MOST];
    size_t ldy[SH_LINEAR_MOST];
    for (int i = 0; i < SH_LINEAR_MOST; i++, at += one) {
        w[i] = (sh_wmat){.n = OUTPUTS, .k = INPUTS, .type = type, .data = (const uint32_t *)(b->weights + at / 2)};
        list[i] = &w[i];
        y[i] = b->y + (size_t)i * SH_PRODUCT_ROWS * OUTPUTS;
        ldy[i] = OUTPUTS;
    }
    double t0 = sh_now();
    sh_linear_multi(b->team, b->kn, SH_LINEAR_MOST, list, b->x, INPUTS, rows, y, ldy);
    return sh_now() - t0;
}

/* Seconds of `places` in turn, so that no cache keeps weights from pass to pass. */
static double best_of(const bench *b, sh_wtype type, int places, int rows) {
    double best[MOST_PLACES], sum = 0, begin = sh_now();
    for (int i = 0; i < TRIES * places && (i < places || sh_now() - begin < SECONDS); i++) {
        double d = seconds_of(b, type, i % places, rows);
        if (i < places || d < best[i % places]) best[i % places] = d;
    }
    for (int i = 0; i < places; i++) sum += best[i];
    return sum;
}

/* Seconds of 1, 2, 4, … 64 rows, each for one place. Those of fewer rows are no longer: what says otherwise is a
 * disturbance. Where arithmetic is all that counts a quarter of the weights will do. */
static void measure_times(const bench *b, sh_wtype type, int places, double *t) {
    for (int i = SH_PRODUCT_FEWS; i >= 0; i--) {
        int rows = 1 << i, n = rows < MANY || places < 4 ? places : places / 4;
        t[i] = best_of(b, type, n, rows) / n;
        if (i < SH_PRODUCT_FEWS && t[i] > t[i + 1]) t[i] = t[i + 1];
    }
}

/* Reading alone takes r, computing c, both together t: the seconds that c must be. */
static double computing(double r, double both, double t) {
    if (t > (1 + both) * r) return t - both * r;
    return both > 0 && t > r ? (t - r) / both : 0;
}

void sh_product_rates_of(const double *t, double bytes, double flops, sh_wtype type, sh_product_rates *out) {
    double *few = out->few[type], r = t[0], many = t[SH_PRODUCT_FEWS], part = 0, c = 0;
    for (int i = 0; i < ROUNDS; i++) { /* the two depend on each other, little */
        c = many - part * r > many / 2 ? many - part * r : many / 2;
        double eight = c * SH_PRODUCT_FEW / SH_PRODUCT_ROWS, longer = r > eight ? r : eight;
        part = (t[FEW_AT] - longer) / (r + eight - longer);
        part = part < 0 ? 0 : part > 1 ? 1 : part;
    }
    out->read[type] = bytes / r;
    out->flops[type] = flops * SH_PRODUCT_ROWS / c;
    out->both[type] = part;
    for (int i = SH_PRODUCT_FEWS; i-- > 0;) {
        double share = (double)(1 << i) / SH_PRODUCT_ROWS, next = i + 1 < SH_PRODUCT_FEWS ? few[i + 1] : 1;
        double least = next / 2, own = computing(r, part, t[i]); /* more rows take no less time */
        few[i] = own * SH_PRODUCT_MOST > c * share ? c * share / own : SH_PRODUCT_MOST;
        if (few[i] < least) few[i] = least;
    }
}

static void measure_type(const bench *b, sh_wtype type, sh_product_rates *out) {
    double t[SH_PRODUCT_FEWS + 1];
    size_t group = SH_LINEAR_MOST * sh_wmat_bytes(type, OUTPUTS, INPUTS);
    int places = (int)(b->bytes / group);
    measure_times(b, type, places < MOST_PLACES ? places : MOST_PLACES, t);
    sh_product_rates_of(t, (double)group, 2.0 * SH_LINEAR_MOST * OUTPUTS * INPUTS, type, out);
}

sh_status sh_product_rates_measure(sh_team *t, const sh_kernels *kn, size_t bytes, sh_product_rates *out) {
    size_t least = SH_LINEAR_MOST * sh_wmat_bytes(SH_W_BF16, OUTPUTS, INPUTS);
    size_t nx = (size_t)SH_PRODUCT_ROWS * INPUTS, ny = (size_t)SH_LINEAR_MOST * SH_PRODUCT_ROWS * OUTPUTS;
    void *weights = NULL, *rows = NULL;
    if (bytes < least) SH_FAIL(SH_EINPUT, "product rates: %zu bytes of weights: at least %zu are needed", bytes, least);
    for (sh_wtype type = SH_W_Q8; type < SH_W_TYPES; type++)
        SH_TRY(sh_team_reserve(t, sh_qrows_bytes(type, INPUTS, SH_PRODUCT_ROWS)));
    SH_TRY(sh_mem_alloc(bytes, "product rates", &weights));
    sh_status st = sh_mem_alloc((nx + ny) * sizeof(float), "product rates", &rows);
    if (st == SH_OK) {
        bench b = {.team = t, .kn = kn, .weights = weights, .bytes = bytes, .x = rows, .y = (float *)rows + nx};
        for (size_t i = 0; i < nx; i++) b.x[i] = (float)(i % 251) * 0.008f - 1;
        sh_team_run(t, fill, &b);
        for (sh_wtype type = SH_W_BF16; type < SH_W_TYPES; type++) measure_type(&b, type, out);
        sh_mem_free(rows, (nx + ny) * sizeof(float));
    }
    sh_mem_free(weights, bytes);
    return st;
}
