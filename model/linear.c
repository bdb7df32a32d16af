/* Splits matrix products over a team. Knows nothing of the arithmetic: any split gives the same bits. */
#include "model/linear.h"

#include <stdatomic.h>

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
    const float *x;
    size_t ldx;
    float *const *y;
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
        if (a < b) p->kn->gemm(p->w[i], a, b, x, p->ldx, r1 - r0, p->y[i] + (size_t)r0 * p->ldy[i], p->ldy[i]);
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

void sh_linear_multi(sh_team *t, const sh_kernels *kn, int count, const sh_wmat *const *w, const float *x, size_t ldx,
                     int m, float *const *y, const size_t *ldy) {
    product p = {.team = t, .kn = kn, .count = count, .m = m, .w = w, .x = x, .ldx = ldx, .y = y, .ldy = ldy};
    for (int i = 0; i < count; i++) p.total += sh_wmat_panels(w[i]->n);
    if (m <= 0 || p.total == 0) return;
    int members = sh_team_size(t);
    if (m <= STREAM_ROWS)
        cut_runs(&p, members);
    else
        cut_pieces(&p, members);
    sh_team_run(t, p.pieces > 0 && (members > 1 || sh_team_polls(t)) ? pieces_run : share_run, &p);
}

void sh_linear(sh_team *t, const sh_kernels *kn, const sh_wmat *w, const float *x, size_t ldx, int m, float *y,
               size_t ldy) {
    sh_linear_multi(t, kn, 1, &w, x, ldx, m, &y, &ldy);
}
