/*
 * SHOAL_ISA=model:FMA,BYTES[,LEAN]: kernels that take the time of a machine that is not here. Products and attention
 * compute next to nothing and sleep for what they would take with FMA multiply-adds and BYTES of memory reads per
 * second, so that many ranks share two cores while links, schedule and exchange between them are real. For comparing
 * layouts: the results are made up, though the same for the same call and never special (no NaN, no end of text).
 *
 * What costs time: a product takes the larger of reading its panels and its multiply-adds; a segment of attention the
 * larger of reading its K and V from bf16 pages and its multiply-adds. The rest (norms, activations, sampling) is done
 * for real or left out and costs what it costs here. With LEAN the first output of small matrices, so a router's first
 * expert, is the largest in that share of the rows. The rates are those of a rank: it has one compute thread here
 * whatever --threads says (sh_kernels.modelled).
 */
#include "model/kernels/kernels.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "common/clock.h"

#define LEAST_SLEEP 2e-4 /* seconds owed before a thread sleeps: shorter sleeps take longer than asked */
#define MOST_CREDIT 1e-3 /* seconds slept too long that are made good later */
#define FILL        4096 /* made-up numbers */
#define FEW_OUTPUTS 1024 /* matrices with more outputs than … */
#define SPECIAL     256  /* … keep their first ones small: in the head these end a text */

static struct {
    pthread_mutex_t lock;
    char spec[64]; /* "" until the first */
    double fma, bytes, lean;
    float fill[2 * FILL]; /* in (0, 1), the second half as the first */
} model = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- time -------------------------------------------------------------------------------------------------------- */

static _Thread_local double owed; /* seconds to sleep; below 0: slept too long */
/* Attention: seconds of the segment at hand, and when its keys were first read */
static _Thread_local double reading, adding, begun;

/* A kernel that began at `start` should take `seconds`. What it really took counts. */
static void take(double start, double seconds) {
    double now = sh_now();
    owed = fmax(owed + seconds - (now - start), -MOST_CREDIT);
    if (owed < LEAST_SLEEP) return;
    double until = now + owed;
    struct timespec t = {.tv_sec = (time_t)until, .tv_nsec = (long)((until - floor(until)) * 1e9)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) continue;
    owed = fmax(until - sh_now(), -MOST_CREDIT);
}

/* ---- numbers ----------------------------------------------------------------------------------------------------- */

/* Depends on the first, middle and last item of a row and on the matrix' shape. */
static size_t place_of(const float *x, int k, int n) {
    uint32_t a, b, c;
    memcpy(&a, x, sizeof a);
    memcpy(&b, x + k / 2, sizeof b);
    memcpy(&c, x + k - 1, sizeof c);
    uint32_t h = (a ^ (uint32_t)n) * 0x9e3779b1u;
    h = (h ^ h >> 15 ^ b) * 0x85ebca77u;
    h = (h ^ h >> 13 ^ c ^ (uint32_t)k) * 0xc2b2ae3du;
    return (h ^ h >> 16) % FILL;
}

/* Items [from, to) of the row that starts at `place`. */
static void made_up(float *y, size_t place, int from, int to) {
    for (int i = from, n; i < to; i += n) {
        size_t at = (place + (size_t)i) % FILL;
        n = to - i < FILL ? to - i : FILL;
        memcpy(y + i, model.fill + at, (size_t)n * sizeof *y);
    }
}

static void make_numbers(void) {
    uint64_t s = 0x9e3779b97f4a7c15u;
    for (int i = 0; i < FILL; i++) {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        model.fill[i] = model.fill[i + FILL] = (float)((s >> 41) + 1) * 0x1p-24f;
    }
}

/* ---- entries ----------------------------------------------------------------------------------------------------- */

static void gemm(const sh_wmat *w, int p0, int p1, const float *x, size_t ldx, int m, float *y, size_t ldy) {
    double start = sh_now();
    int from = p0 * SH_PANEL, to = p1 * SH_PANEL < w->n ? p1 * SH_PANEL : w->n;
    if (m <= 0 || from >= to) return;
    for (int r = 0; r < m; r++) {
        float *row = y + (size_t)r * ldy;
        size_t place = place_of(x + (size_t)r * ldx, w->k, w->n);
        made_up(row, place, from, to);
        if (from == 0 && w->n <= FEW_OUTPUTS && (double)place < model.lean * FILL) row[0] = 1;
        for (int i = from; w->n > FEW_OUTPUTS && i < to && i < SPECIAL; i++) row[i] *= 0.5f;
    }
    double read = (double)(p1 - p0) * (double)w->k * SH_PANEL * 2 / model.bytes;
    take(start, fmax(read, (double)m * (double)(to - from) * (double)w->k / model.fma));
    reading = adding = 0; /* rows that were widened before a product were no keys */
}

static void scores(float *s, size_t lds, const float *q, size_t ldq, int rows, const float *k, int keys, int hd) {
    (void)s, (void)lds, (void)q, (void)ldq, (void)k; /* nobody looks at them: softmax_part and weighted_sum are below */
    adding += (double)rows * (double)keys * (double)hd / model.fma;
}

/* As if all keys scored 0, or a router's experts their scores. */
static void softmax_part(float *s, int keys, float *m, float *l) {
    (void)s;
    *m = 0;
    *l = (float)keys;
}

/* Every row takes the last value it sees. */
static void weighted_sum(float *o, size_t ldo, const float *p, size_t lds, int rows, const float *v, int keys, int hd) {
    double start = reading > 0 ? begun : sh_now();
    (void)p, (void)lds;
    for (int r = 0; r < rows; r++)
        memcpy(o + (size_t)r * ldo, v + (size_t)(keys - 1) * (size_t)hd, (size_t)hd * sizeof *o);
    adding += (double)rows * (double)keys * (double)hd / model.fma;
    take(start, fmax(reading, adding));
    reading = adding = 0;
}

static void (*native_from_bf16)(float *y, const uint16_t *x, int n);
static void from_bf16(float *y, const uint16_t *x, int n) {
    if (reading <= 0) begun = sh_now();
    native_from_bf16(y, x, n);
    reading += 2.0 * n / model.bytes;
}

static void (*native_from_kv8)(float *y, const uint8_t *x, int n, int rows);
static void from_kv8(float *y, const uint8_t *x, int n, int rows) {
    if (reading <= 0) begun = sh_now();
    native_from_kv8(y, x, n, rows);
    reading += (double)rows * (double)sh_kv8_bytes(n) / model.bytes;
}

static void rmsnorm(float *y, const float *x, const float *w, int n, float eps) {
    (void)w, (void)eps;
    if (y != x) memcpy(y, x, (size_t)n * sizeof *y);
}

static void gelu_mul(float *y, const float *gate, const float *up, int n) {
    (void)up;
    if (y != gate) memcpy(y, gate, (size_t)n * sizeof *y);
}

static void softcap(float *x, float cap, int n) {
    (void)x, (void)cap, (void)n;
}

/* ---- rates ------------------------------------------------------------------------------------------------------- */

/* "50G" → 5e10; *end after it. 0: none. */
static double rate(const char *s, char **end) {
    static const char units[] = "kMGT";
    double v = *s >= '0' && *s <= '9' ? strtod(s, end) : 0;
    if (!(v > 0)) return 0;
    const char *u = **end ? strchr(units, **end) : NULL;
    if (u) ++*end;
    for (const char *i = units; u && i <= u; i++) v *= 1e3;
    return v >= 1e6 && v <= 1e18 ? v : 0;
}

sh_status sh_kernels_fill_model(sh_kernels *t, const char *spec) {
    char *end = NULL;
    double fma = rate(spec, &end), bytes = fma > 0 && *end == ',' ? rate(end + 1, &end) : 0, lean = 0;
    if (bytes > 0 && end[0] == ',' && end[1] >= '0' && end[1] <= '9') lean = strtod(end + 1, &end);
    if (!(bytes > 0) || !(lean <= 1) || *end || strlen(spec) >= sizeof model.spec)
        SH_FAIL(
            SH_EINPUT,
            "'model:%.60s': what is wanted is model:FMA,BYTES, the multiply-adds and the bytes of memory that a "
            "rank does per second, each from 1M, for example model:50G,20G, and where experts are to be hot the share "
            "of rows, 0 to 1, that choose the first: model:50G,20G,0.5",
            spec);
    pthread_mutex_lock(&model.lock);
    bool first = !model.spec[0], same = first || strcmp(model.spec, spec) == 0;
    if (first) {
        model.fma = fma;
        model.bytes = bytes;
        model.lean = lean;
        make_numbers();
        native_from_bf16 = t->from_bf16;
        native_from_kv8 = t->from_kv8;
        memcpy(model.spec, spec, strlen(spec) + 1); /* it fits */
    }
    pthread_mutex_unlock(&model.lock);
    if (!same) SH_FAIL(SH_EINPUT, "'model:%s': this process has model:%s already", spec, model.spec);
    t->modelled = true;
    t->gemm = gemm;
    t->scores = scores;
    t->softmax_part = softmax_part;
    t->weighted_sum = weighted_sum;
    t->add_weighted = NULL; /* time is taken where tiles are widened */
    t->scores_bf16 = NULL;
    t->add_weighted_bf16 = NULL;
    t->from_bf16 = from_bf16;
    t->from_kv8 = from_kv8;
    t->rmsnorm = rmsnorm;
    t->gelu_mul = gelu_mul;
    t->softcap = softcap;
    return SH_OK;
}
