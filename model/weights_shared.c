/*
 * Loading together with other members (docs/decisions/0033). Everybody tells what it needs; wants.c divides it; then
 * each reads and packs its pieces, in place, and sends them from there, while those of others come to where they
 * belong: no byte is held twice. See weights_int.h.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/wants.h"
#include "model/weights_int.h"

#define SHARED_PIECE ((uint64_t)32 << 20) /* packed bytes of a message at most, or one panel */

/* How preparing went: the first thing that members tell each other. */
typedef struct record {
    uint64_t files; /* hash of names and lengths */
    int32_t status, wants;
    char text[1024];
} record;

typedef struct together {
    sh_loader *l;
    sh_team *team;
    sh_want *mine, *all;
    int n, cap;
    int32_t *count; /* [members] of all */
    sh_pieces pieces;
    bool met; /* all prepared well: from here on the others wait for this one */
} together;

/* --- what this member needs ----------------------------------------------------------------------------------------
 */

static void add_want(together *t, sh_want w, int lo, int n) {
    if (n == 0) return;
    w.lo = lo;
    w.hi = lo + n;
    t->mine[t->n++] = w;
}

static sh_want want_of(const sh_loader *l, int job) {
    const sh_load_job *j = &l->jobs[job];
    bool vector = j->to != NULL;
    return (sh_want){.source = {.layer = j->layer,
                                .tensor = sh_loader_index(l->tensors, j->t[0]),
                                .second = j->t[1] ? sh_loader_index(l->tensors, j->t[1]) : -1,
                                .type = vector ? -1 : (int32_t)j->mat->type,
                                .k = j->k,
                                .col = j->col},
                     .packed_bytes = vector ? (uint32_t)j->k * (uint32_t)sizeof(float)
                                            : (uint32_t)sh_wmat_bytes(j->mat->type, SH_PANEL, j->k),
                     .bytes = (uint32_t)sh_load_bytes(j, 0, SH_PANEL),
                     .job = job};
}

/* Panels that begin at the same rows of one tensor are the same ones, whatever part of the rows a member has; rows of
 * two tensors, or out of order, are compared as a whole. */
static void add_matrix(together *t, int job) {
    const sh_load_job *j = &t->l->jobs[job];
    sh_want w = want_of(t->l, job);
    int lo = 0, full = j->mat->n / SH_PANEL, tail = j->mat->n % SH_PANEL;
    if (j->mat->k == 0) return; /* more parts than columns: nothing for this one */
    w.source.row = j->row[0];
    if (j->heads.layer) {
        w.source.second = -2 - j->heads.share.part;
    } else if (!j->t[1]) {
        w.source.row = j->row[0] % SH_PANEL;
        lo = (int)(j->row[0] / SH_PANEL);
    }
    add_want(t, w, lo, full);
    w.source.tail = tail;
    w.bytes = (uint32_t)sh_load_bytes(j, 0, tail);
    w.panel = full;
    add_want(t, w, lo + full, tail > 0);
}

static sh_status list_wants(together *t) {
    const sh_loader *l = t->l;
    t->mine = calloc(2 * (size_t)l->n_jobs + 1, sizeof *t->mine);
    if (!t->mine) SH_FAIL(SH_EMEMORY, "%s: no memory for the list of tensors", l->dir);
    for (int i = 0; i < l->n_jobs; i++) {
        if (l->jobs[i].to)
            add_want(t, want_of(l, i), 0, 1);
        else
            add_matrix(t, i);
    }
    return SH_OK;
}

/* --- what all need -------------------------------------------------------------------------------------------------
 */

static sh_status gather(const together *t, const void *mine, size_t n, void *all) {
    const sh_load_peers *p = t->l->peers;
    double since = sh_now();
    sh_status st = p->gather(p->ctx, mine, n, all);
    t->l->loading->exchange += sh_now() - since;
    return st;
}

/* One whose preparing failed says so, and everybody fails with its number and words. */
static sh_status check_records(const together *t, const record *r) {
    for (int m = 0; m < t->l->peers->members; m++)
        if (r[m].status != SH_OK)
            SH_FAIL((sh_status)r[m].status, "rank %d: %.*s", m, (int)sizeof r->text - 1, r[m].text);
    for (int m = 1; m < t->l->peers->members; m++)
        if (r[m].files != r[0].files)
            SH_FAIL(SH_EFORMAT,
                    "%s: member %d of the group finds other files there than member 0: weights can be shared only "
                    "among those "
                    "that have the same checkpoint",
                    t->l->dir, m);
    return SH_OK;
}

static sh_status meet(together *t, sh_status st, record *all) {
    record mine = {0};
    if (st == SH_OK) st = list_wants(t);
    if (st == SH_OK) st = sh_tensors_files_hash(t->l->dir, &mine.files);
    mine.status = (int32_t)st;
    mine.wants = t->n;
    if (st != SH_OK) snprintf(mine.text, sizeof mine.text, "%s", sh_error_text());
    SH_TRY(gather(t, &mine, sizeof mine, all));
    if (st != SH_OK) SH_FAIL(st, "%s", mine.text);
    SH_TRY(check_records(t, all));
    for (int m = 0; m < t->l->peers->members; m++) t->count[m] = all[m].wants;
    return SH_OK;
}

/* Lists of all members: as long as the longest on their way, then one behind the other. */
static sh_status gather_wants(together *t) {
    int members = t->l->peers->members, most = 1, n = 0;
    for (int m = 0; m < members; m++)
        if (t->count[m] > most) most = t->count[m];
    sh_want *mine = realloc(t->mine, (size_t)most * sizeof *mine);
    t->all = malloc((size_t)members * (size_t)most * sizeof *t->all);
    if (mine) t->mine = mine;
    if (!mine || !t->all) SH_FAIL(SH_EMEMORY, "%s: no memory for the lists of all ranks' tensors", t->l->dir);
    memset(t->mine + t->n, 0, (size_t)(most - t->n) * sizeof *t->mine);
    SH_TRY(gather(t, t->mine, (size_t)most * sizeof *t->mine, t->all));
    for (int m = 0; m < members; m++) {
        memmove(t->all + n, t->all + (size_t)m * (size_t)most, (size_t)t->count[m] * sizeof *t->all);
        n += t->count[m];
    }
    return SH_OK;
}

static sh_status agree(together *t, sh_status st) {
    const sh_load_peers *p = t->l->peers;
    record *all = calloc((size_t)p->members, sizeof *all);
    t->count = calloc((size_t)p->members, sizeof *t->count);
    if (!all || !t->count) {
        free(all);
        SH_FAIL(SH_EMEMORY, "%s: no memory for the list of ranks", t->l->dir);
    }
    st = meet(t, st, all);
    free(all);
    if (st != SH_OK) return sh_error_pass(st, __FILE__, __LINE__);
    t->met = true;
    SH_TRY(gather_wants(t));
    return sh_wants_divide(t->all, t->count, p->members, p->member, SHARED_PIECE, &t->pieces);
}

/* --- pieces --------------------------------------------------------------------------------------------------------
 */

static const sh_load_job *job_of(const together *t, const sh_piece *p) {
    return &t->l->jobs[t->mine[p->want].job];
}

/* Where a piece lies in the weights, and how many bytes it has there. */
static uint8_t *place_of(const together *t, const sh_piece *p, size_t *bytes) {
    const sh_want *w = &t->mine[p->want];
    const sh_load_job *j = job_of(t, p);
    *bytes = (size_t)p->n * w->packed_bytes;
    if (j->to) return (uint8_t *)(void *)j->to;
    return (uint8_t *)(uintptr_t)j->mat->data + (size_t)(w->panel + p->first) * w->packed_bytes;
}

/* Memory is where the thread is that touches it first: the one that will compute with it, not the one that receives. */
static void touch(void *arg, int member, int size) {
    const together *t = arg;
    for (int i = 0; i < t->pieces.n; i++) {
        const sh_piece *p = &t->pieces.piece[i];
        const sh_want *w = &t->mine[p->want];
        const sh_load_job *j = job_of(t, p);
        if (p->reader == t->l->peers->member || j->to) continue;
        int lo, hi, first = w->panel + p->first, last = first + p->n;
        sh_team_share(sh_wmat_panels(j->mat->n), member, size, &lo, &hi);
        lo = lo > first ? lo : first;
        hi = hi < last ? hi : last;
        uint8_t *base = (uint8_t *)(uintptr_t)j->mat->data;
        for (size_t at = (size_t)lo * w->packed_bytes; lo < hi && at < (size_t)hi * w->packed_bytes; at += 4096)
            base[at] = 0;
    }
}

static sh_status expect_pieces(together *t) {
    const sh_load_peers *peers = t->l->peers;
    if (t->team)
        sh_team_run(t->team, touch, t);
    else
        touch(t, 0, 1);
    for (int i = 0; i < t->pieces.n; i++) {
        const sh_piece *p = &t->pieces.piece[i];
        size_t bytes;
        uint8_t *to = place_of(t, p, &bytes);
        if (p->reader != peers->member) SH_TRY(peers->expect(peers->ctx, p->reader, to, bytes));
    }
    return SH_OK;
}

static sh_status send_piece(const together *t, const sh_piece *p) {
    const sh_load_peers *peers = t->l->peers;
    size_t bytes;
    const uint8_t *from = place_of(t, p, &bytes);
    double since = sh_now();
    for (int i = 0; i < p->members; i++) {
        int to = t->pieces.list[p->group + i];
        if (to != peers->member) SH_TRY(peers->send(peers->ctx, to, from, bytes));
    }
    t->l->loading->exchange += sh_now() - since;
    return SH_OK;
}

static sh_status read_piece(together *t, const sh_piece *p) {
    const sh_load_job *j = job_of(t, p);
    size_t bytes;
    uint8_t *to = place_of(t, p, &bytes);
    if (j->to) return sh_load_run(t->l, j, t->team);
    int first = t->mine[p->want].panel + p->first;
    SH_TRY(sh_load_pack(t->l, j, t->team, first, first + p->n, to));
    sh_load_let_go(j);
    return SH_OK;
}

static sh_status fill(together *t) {
    const sh_load_peers *peers = t->l->peers;
    sh_loading *loading = t->l->loading;
    loading->total = t->pieces.bytes;
    SH_TRY(expect_pieces(t));
    for (int i = 0; i < t->pieces.n; i++) {
        const sh_piece *p = &t->pieces.piece[i];
        SH_TRY(peers->poll(peers->ctx));
        loading->received = peers->received;
        if (p->reader != peers->member) continue;
        SH_TRY(read_piece(t, p));
        SH_TRY(send_piece(t, p));
    }
    double since = sh_now();
    SH_TRY(peers->finish(peers->ctx));
    loading->exchange += sh_now() - since;
    loading->received = peers->received;
    return SH_OK;
}

/* After a failure: with the text that it had, whatever happens while the others are told. */
static sh_status give_up(sh_loader *l, sh_status st) {
    char why[1024];
    snprintf(why, sizeof why, "%s", sh_error_text());
    l->lent = !l->peers->stop(l->peers->ctx, st);
    SH_FAIL(st, "%s", why);
}

sh_status sh_load_together(sh_loader *l, sh_status st, sh_team *team) {
    together t = {.l = l, .team = team};
    st = agree(&t, st);
    if (st == SH_OK) st = fill(&t);
    if (st != SH_OK && t.met) st = give_up(l, st);
    free(t.mine);
    free(t.all);
    free(t.count);
    sh_pieces_release(&t.pieces);
    return st;
}
