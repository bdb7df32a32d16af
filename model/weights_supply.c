/* A whole checkpoint, one vector or matrix at a time. See sh_supply in weights.h. */
#include <stdlib.h>
#include <sys/mman.h>

#include "common/mem.h"
#include "model/layout.h"
#include "model/values.h"
#include "model/weights_int.h"

#define SUPPLY_PIECE ((size_t)32 << 20)

struct sh_supply {
    sh_loader l;
    sh_team *team;
    void *room; /* address space for the layout: never touched */
    size_t room_bytes;
    uint8_t *piece;
};

static uintptr_t place_of(const sh_load_job *j) {
    return j->to ? (uintptr_t)j->to : (uintptr_t)j->mat;
}

static int by_place(const void *a, const void *b) {
    uintptr_t x = place_of(a), y = place_of(b);
    return (x > y) - (x < y);
}

static sh_status open_supply(sh_supply *s) {
    sh_loader *l = &s->l;
    SH_TRY(sh_kernels_select(&l->kn));
    SH_TRY(sh_loader_allocate(l->w));
    sh_weights_impl *m = l->w->impl;
    s->room_bytes = sh_weights_layout(l->w, m->expert, NULL);
    s->room = mmap(NULL, s->room_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (s->room == MAP_FAILED) {
        s->room = NULL;
        SH_FAIL(SH_EMEMORY, "%s: no addresses for %zu bytes of weights", l->dir, s->room_bytes);
    }
    sh_weights_layout(l->w, m->expert, s->room);
    SH_TRY(sh_tensors_open(l->dir, &m->tensors));
    l->tensors = m->tensors;
    SH_TRY(sh_loader_open(l));
    SH_TRY(sh_loader_resolve(l));
    qsort(l->jobs, (size_t)l->n_jobs, sizeof *l->jobs, by_place);
    for (int i = 0; i < l->n_jobs; i++) /* layer_scalar: lies in the tables of layers, not in the room */
        if (l->jobs[i].to &&
            ((char *)l->jobs[i].to < (char *)s->room || (char *)l->jobs[i].to >= (char *)s->room + s->room_bytes))
            SH_TRY(sh_load_vector(l->dir, l->jobs[i].t[0], 1, l->jobs[i].to));
    return sh_mem_alloc(SUPPLY_PIECE, "a piece of a matrix", (void **)&s->piece);
}

sh_status sh_supply_open(const char *model_dir, const sh_config *c, sh_mode mode, sh_team *team, sh_supply **out) {
    sh_supply *s = calloc(1, sizeof *s);
    sh_weights *w = calloc(1, sizeof *w);
    if (!s || !w) {
        free(s);
        free(w);
        SH_FAIL(SH_EMEMORY, "weights: no memory");
    }
    *w = (sh_weights){.config = c, .type = sh_mode_wtype(mode), .last = c->n_layers};
    *s = (sh_supply){.l = {.dir = model_dir, .c = c, .w = w}, .team = team};
    sh_status st = open_supply(s);
    if (st != SH_OK) {
        sh_supply_close(&s);
        return st;
    }
    *out = s;
    return SH_OK;
}

void sh_supply_close(sh_supply **sp) {
    sh_supply *s = *sp;
    if (!s) return;
    sh_mem_free(s->piece, SUPPLY_PIECE);
    if (s->room) munmap(s->room, s->room_bytes);
    free(s->l.used);
    free(s->l.jobs);
    sh_weights_destroy(&s->l.w);
    free(s);
    *sp = NULL;
}

sh_weights *sh_supply_weights(sh_supply *s) {
    return s->l.w;
}

static sh_status give_vector(sh_supply *s, const sh_load_job *j, sh_supply_fn *put, void *ctx) {
    size_t bytes = (size_t)j->k * sizeof(float);
    if (bytes > SUPPLY_PIECE) SH_FAIL(SH_ELIMIT, "%s: %d values: at most %zu", j->t[0]->name, j->k, SUPPLY_PIECE / 4);
    SH_TRY(sh_load_vector(s->l.dir, j->t[0], j->k, (float *)(void *)s->piece));
    return put(ctx, s->piece, bytes);
}

sh_status sh_supply_give(sh_supply *s, const void *place, sh_supply_fn *put, void *ctx) {
    const sh_load_job *j = NULL;
    int lo = 0, hi = s->l.n_jobs;
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2;
        if (place_of(&s->l.jobs[mid]) < (uintptr_t)place)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo < s->l.n_jobs && place_of(&s->l.jobs[lo]) == (uintptr_t)place) j = &s->l.jobs[lo];
    if (!j) SH_FAIL(SH_ESTATE, "%s: nothing is known of this place", s->l.dir);
    if (j->to) return give_vector(s, j, put, ctx);
    size_t panel = sh_wmat_bytes(j->mat->type, SH_PANEL, j->mat->k);
    int all = sh_wmat_panels(j->mat->n), n = (int)(SUPPLY_PIECE / panel);
    if (n == 0) SH_FAIL(SH_ELIMIT, "%s: a panel of %zu bytes: at most %zu", j->t[0]->name, panel, SUPPLY_PIECE);
    for (int p = 0; p < all; p += n) {
        int end = all - p < n ? all : p + n;
        SH_TRY(sh_load_pack(&s->l, j, s->team, p, end, s->piece));
        SH_TRY(put(ctx, s->piece, (size_t)(end - p) * panel));
    }
    sh_load_let_go(j);
    return SH_OK;
}

const sh_tensors *sh_supply_tensors(const sh_supply *s) {
    return s->l.tensors;
}

const sh_tensor *sh_supply_embed(const sh_supply *s) {
    return ((sh_weights_impl *)s->l.w->impl)->embed;
}

const sh_tensor *sh_supply_ple(const sh_supply *s) {
    return ((sh_weights_impl *)s->l.w->impl)->ple_table;
}
