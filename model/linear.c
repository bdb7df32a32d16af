/* Splits matrix products over a team. Knows nothing of the arithmetic: any split gives the same bits. */
#include "model/linear.h"

#define ROW_BLOCK 512 /* rows per piece of work */

typedef struct product {
    const sh_kernels *kn;
    int count, m, total; /* total: panels of all matrices */
    const sh_wmat *const *w;
    const float *x;
    size_t ldx;
    float *const *y;
    const size_t *ldy;
} product;

/* Panels [lo, hi) of the matrices laid end to end. */
static void run_panels(const product *p, int lo, int hi) {
    for (int i = 0, first = 0; i < p->count; i++) {
        int n = sh_wmat_panels(p->w[i]->n);
        int a = lo > first ? lo - first : 0, b = hi - first < n ? hi - first : n;
        if (a < b) {
            for (int r = 0; r < p->m; r += ROW_BLOCK) {
                int rows = p->m - r < ROW_BLOCK ? p->m - r : ROW_BLOCK;
                p->kn->gemm(p->w[i], a, b, p->x + (size_t)r * p->ldx, p->ldx, rows, p->y[i] + (size_t)r * p->ldy[i],
                            p->ldy[i]);
            }
        }
        first += n;
    }
}

static void member_run(void *arg, int member, int size) {
    const product *p = arg;
    int lo, hi;
    sh_team_share(p->total, member, size, &lo, &hi);
    run_panels(p, lo, hi);
}

void sh_linear_multi(sh_team *t, const sh_kernels *kn, int count, const sh_wmat *const *w, const float *x, size_t ldx,
                     int m, float *const *y, const size_t *ldy) {
    product p = {.kn = kn, .count = count, .m = m, .w = w, .x = x, .ldx = ldx, .y = y, .ldy = ldy};
    for (int i = 0; i < count; i++) p.total += sh_wmat_panels(w[i]->n);
    if (m > 0) sh_team_run(t, member_run, &p);
}

void sh_linear(sh_team *t, const sh_kernels *kn, const sh_wmat *w, const float *x, size_t ldx, int m, float *y,
               size_t ldy) {
    sh_linear_multi(t, kn, 1, &w, x, ldx, m, &y, &ldy);
}
