/* Splits matrix products over a team. Knows nothing of the arithmetic: any split gives the same bits. */
#include "model/linear.h"

#include <stdatomic.h>
#include <string.h>

/*
 * Work is cut into pieces that members take as they come, so that one that is held up by other work on its CPU does not
 * hold up the rest. Few rows are bound by memory: a piece is a run of panels, long enough to stream. Many rows are
 * bound by arithmetic: a piece is some panels × some rows. Matrices too small for that are shared out evenly.
 */
#define STREAM_ROWS  24 /* up to here runs of panels */
#define RUNS_EACH    8  /* runs per member */
#define LEAST_RUN    4  /* panels: what the kernels read side by side */
#define PIECE_PANELS 24 /* most panels of a piece; fewer when that leaves members idle, but not less than … */
#define LEAST_PANELS 8
#define LEAST_ROWS   48
#define PIECES_EACH  4 /* pieces per member to aim at */

typedef struct product {
    const sh_team *team;
    const sh_kernels *kn;
    int count, m, total; /* total: panels of all matrices */
    const sh_wmat *const *w;
    const sh_row_maker *make; /* NULL: x is there */
    const float *x;
    size_t ldx;
    sh_qrows q; /* x in the codes of the matrices' type, when they are quantised */
    float *y[SH_LINEAR_MOST];
    const size_t *ldy;
    int panels, rows, across, pieces; /* of a piece; pieces side by side along panels; all */
    atomic_int next;
} product;

/* Panels [lo, hi) of the matrices laid end to end, rows [r0, r1). */
static void run_part(const product *p, int lo, int hi, int r0, int r1) {
    const float *x = p->x + (size_t)r0 * p->ldx;
    for (int i = 0, first = 0; i < p->count; i++) {
        int n = sh_wmat_panels(p->w[i]->n);
        int a = lo > first ? lo - first : 0, b = hi - first < n ? hi - first : n;
        float *y = p->y[i] + (size_t)r0 * p->ldy[i];
        if (a < b && p->q.code)
            p->kn->gemm_q(p->w[i], a, b, &p->q, r0, r1 - r0, y, p->ldy[i]);
        else if (a < b)
            p->kn->gemm(p->w[i], a, b, x, p->ldx, r1 - r0, y, p->ldy[i]);
        first += n;
    }
}

static void share_run(void *arg, int member, int size) {
    const product *p = arg;
    int lo, hi;
    sh_team_share(p->total, member, size, &lo, &hi);
    run_part(p, lo, hi, 0, p->m);
}

static void pieces_run(void *arg, int member, int size) {
    product *p = arg;
    (void)size;
    for (;;) {
        int i = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
        if (i >= p->pieces) return;
        int lo = i % p->across * p->panels, r0 = i / p->across * p->rows;
        run_part(p, lo, lo + p->panels < p->total ? lo + p->panels : p->total, r0,
                 r0 + p->rows < p->m ? r0 + p->rows : p->m);
        sh_team_poll(p->team, member);
    }
}

static int clamp(int v, int lo, int hi) {
    return v < lo ? lo : v > hi ? hi : v;
}

static int parts(int n, int of) {
    return (n + of - 1) / of;
}

static void cut_pieces(product *p, int members) {
    int want = members * PIECES_EACH;
    p->panels = clamp(parts(p->total, want), LEAST_PANELS, PIECE_PANELS);
    p->across = parts(p->total, p->panels);
    p->rows = clamp(parts(p->m, parts(want, p->across)), LEAST_ROWS, p->m > LEAST_ROWS ? p->m : LEAST_ROWS);
    p->pieces = p->across * parts(p->m, p->rows);
}

static void cut_runs(product *p, int members) {
    p->panels = p->total / (members * RUNS_EACH) / LEAST_RUN * LEAST_RUN;
    p->rows = p->m;
    if (p->panels > 0) p->across = p->pieces = parts(p->total, p->panels);
}

static void multiply(sh_team *t, product *p) {
    int members = sh_team_size(t);
    p->pieces = 0;
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    if (p->m <= STREAM_ROWS)
        cut_runs(p, members);
    else
        cut_pieces(p, members);
    sh_team_run(t, p->pieces > 0 && (members > 1 || sh_team_polls(t)) ? pieces_run : share_run, p);
}

/* ---- quantised matrices ------------------------------------------------------------------------------------------ */

size_t sh_qrows_bytes(sh_wtype type, int k, int rows) {
    size_t groups = (size_t)sh_wtype_groups(type, k), ld = groups * (size_t)sh_wtype_group(type);
    return (size_t)rows * (ld + groups * (sizeof(float) + sizeof(int32_t)));
}

sh_qrows sh_qrows_place(sh_wtype type, int k, int rows, void *memory) {
    size_t n = (size_t)rows, groups = (size_t)sh_wtype_groups(type, k), ld = groups * (size_t)sh_wtype_group(type);
    int8_t *code = memory; /* rows of codes are multiples of 32 bytes, so what follows is aligned */
    float *scale = (float *)(void *)(code + n * ld);
    return (sh_qrows){
        .code = code, .scale = scale, .sum = (int32_t *)(void *)(scale + n * groups), .ld = ld, .groups = groups};
}

typedef struct quantizing {
    const product *p;
    int first, k, group; /* first: the product's row that is row 0 here */
} quantizing;

static void quantize_rows(void *arg, int lo, int hi) {
    const quantizing *j = arg;
    const sh_qrows *q = &j->p->q;
    for (int r = lo; r < hi; r++) {
        size_t i = (size_t)r;
        if (j->p->make) j->p->make->fn(j->p->make->arg, j->first + r, j->first + r + 1);
        j->p->kn->quantize(j->p->x + i * j->p->ldx, j->k, j->group, q->code + i * q->ld, q->scale + i * q->groups,
                           q->sum + i * q->groups);
    }
}

/* Rows are quantised in the team's scratch, as many at a time as it holds. */
static void multiply_quantized(sh_team *t, product *p, int m) {
    size_t room = 0;
    void *memory = sh_team_scratch(t, &room);
    sh_wtype type = p->w[0]->type;
    int k = p->w[0]->k, most = (int)(room / sh_qrows_bytes(type, k, 1));
    for (int r = 0; r < m; r += p->m) {
        p->m = m - r < most ? m - r : most;
        p->q = sh_qrows_place(type, k, p->m, memory);
        quantizing j = {.p = p, .first = r, .k = k, .group = sh_wtype_group(type)};
        sh_row_loop_run(t, p->m, (size_t)k + (p->make ? p->make->width : 0), quantize_rows, &j);
        multiply(t, p);
        p->x += (size_t)p->m * p->ldx;
        for (int i = 0; i < p->count; i++) p->y[i] += (size_t)p->m * p->ldy[i];
    }
}

void sh_linear_made(sh_team *t, const sh_kernels *kn, int count, const sh_wmat *const *w, const sh_row_maker *make,
                    const float *x, size_t ldx, int m, float *const *y, const size_t *ldy) {
    product p = {.team = t, .kn = kn, .count = count, .m = m, .w = w, .make = make, .x = x, .ldx = ldx, .ldy = ldy};
    for (int i = 0; i < count; i++) {
        p.total += sh_wmat_panels(w[i]->n);
        p.y[i] = y[i];
    }
    if (m <= 0 || p.total == 0) return;
    if (w[0]->k == 0) { /* a part that has none of the inputs */
        for (int i = 0; i < count; i++)
            for (int r = 0; r < m; r++) memset(y[i] + (size_t)r * ldy[i], 0, (size_t)w[i]->n * sizeof(float));
        return;
    }
    if (w[0]->type != SH_W_BF16) {
        multiply_quantized(t, &p, m);
        return;
    }
    if (make) sh_row_loop_run(t, m, make->width, make->fn, make->arg);
    multiply(t, &p);
}

void sh_linear_multi(sh_team *t, const sh_kernels *kn, int count, const sh_wmat *const *w, const float *x, size_t ldx,
                     int m, float *const *y, const size_t *ldy) {
    sh_linear_made(t, kn, count, w, NULL, x, ldx, m, y, ldy);
}

void sh_linear(sh_team *t, const sh_kernels *kn, const sh_wmat *w, const float *x, size_t ldx, int m, float *y,
               size_t ldy) {
    sh_linear_multi(t, kn, 1, &w, x, ldx, m, &y, &ldy);
}
