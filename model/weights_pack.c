/*
 * One job of loading: rows of a checkpoint's tensors become panels of a packed matrix, or a vector. See weights_int.h.
 * Each thread of the team brings a piece of the files into memory and packs it, then the next.
 */
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "model/blocks.h"
#include "model/kernels/quant.h"
#include "model/packed_int.h"
#include "model/values.h"
#include "model/weights_int.h"

#define READ_PIECE ((size_t)4 << 20) /* of the files, that a thread brings and packs at a time */

typedef struct packing {
    const sh_kernels *kn;
    const sh_load_job *j;
    uint8_t *to; /* of panels [first, last) of the matrix */
    int first, last;
    bool rounds;
    sh_loading *loading; /* NULL: pages come as they are touched */
    const sh_load_peers *peers;
    _Atomic sh_status stopped; /* what the peers say: the calling thread's last error */
    _Atomic bool unread;
    char why[512];
    /* lowest item of the matrix that bf16 cannot hold, and that is no finite number; INT64_MAX: none */
    _Atomic int64_t inexact, unfinite;
    _Atomic bool no_memory;
} packing;

static int64_t row_items(const sh_load_job *j) {
    return j->width ? j->width : j->k;
}

/* Where row `row` of the matrix comes from. */
static const sh_tensor *job_row(const sh_load_job *j, int row, int64_t *item) {
    int part = row >= j->n[0];
    int64_t from = j->row[part] + row - (part ? j->n[0] : 0);
    if (j->heads.layer) {
        int hd = j->heads.layer->head_dim;
        from = (int64_t)sh_share_kv_head(j->heads.share, j->heads.layer, row / hd) * hd + row % hd;
    }
    *item = from * row_items(j) + j->col;
    return j->t[part];
}

static bool packs_in_place(const sh_load_job *j) {
    return !j->t[1] && !j->heads.layer && j->t[0]->dtype == SH_BF16 && (uintptr_t)j->t[0]->data % 2 == 0;
}

static void note_lowest(_Atomic int64_t *lowest, int64_t item) {
    int64_t seen = atomic_load(lowest);
    while (item < seen && !atomic_compare_exchange_weak(lowest, &seen, item)) {
    }
}

/* Of row `row` of the matrix the first `finite` items are finite numbers, and the next, if there is one, is not. */
static void note_finite(packing *p, int row, int finite) {
    int k = p->j->mat->k;
    if (finite < k) note_lowest(&p->unfinite, (int64_t)row * k + finite);
}

/* How many of n bf16 items come before the first that is infinite or not a number: its exponent is all ones, so that
 * one more in its place carries into the sign's. */
static int count_finite(const uint16_t *x, int n) {
    const uint64_t exponents = 0x7f807f807f807f80, ones = 0x0080008000800080, signs = 0x8000800080008000;
    int i = 0;
    for (uint64_t w; n - i >= 4; i += 4) {
        memcpy(&w, x + i, sizeof w);
        if (((w & exponents) + ones) & signs) break;
    }
    while (i < n && (x[i] & 0x7f80) != 0x7f80) i++;
    return i;
}

/* Rows [row, row + n) of the matrix, ld items apart at x. */
static void check_finite(packing *p, const uint16_t *x, size_t ld, int row, int n) {
    for (int r = 0; r < n; r++) note_finite(p, row + r, count_finite(x + (size_t)r * ld, p->j->mat->k));
}

/* Panels [p0, p1) of n rows of src, whose first panel is at `to`. */
static void pack_panels(const sh_kernels *kn, const sh_wmat *m, uint8_t *to, const uint16_t *src, size_t ld, int n,
                        int p0, int p1) {
    if (m->type == SH_W_BF16)
        sh_pack_bf16((uint32_t *)(void *)to, src, ld, n, m->k, p0, p1);
    else
        sh_quant_pack(kn, m->type, to, src, ld, n, m->k, p0, p1);
}

/* k items of a tensor of blocks as bf16, rounded. */
static void round_blocks(const packing *p, const sh_tensor *t, int64_t item, int k, uint16_t *to) {
    float w[SH_GGUF_BLOCK];
    for (int i = 0; i < k; i += SH_GGUF_BLOCK) {
        int n = k - i < SH_GGUF_BLOCK ? k - i : SH_GGUF_BLOCK;
        sh_blocks_floats(t, item + i, n, w);
        p->kn->to_bf16(to + i, w, n);
    }
}

/* Whether a job's blocks go into q8 or q4 without a way through bf16. */
static bool packs_blocks(const sh_load_job *j) {
    return j->mat->type != SH_W_BF16 && sh_dtype_is_blocks(j->t[0]->dtype) &&
           (!j->t[1] || sh_dtype_is_blocks(j->t[1]->dtype));
}

static void pack_panel(packing *p, int panel, uint16_t *rows) {
    const sh_load_job *j = p->j;
    const sh_wmat *m = j->mat;
    uint8_t *to = p->to + (size_t)(panel - p->first) * sh_wmat_bytes(m->type, SH_PANEL, m->k);
    int r0 = panel * SH_PANEL, n = m->n - r0 < SH_PANEL ? m->n - r0 : SH_PANEL;
    for (int r = 0; packs_blocks(j) && r < SH_PANEL; r++) {
        int64_t item = 0;
        const sh_tensor *t = r < n ? job_row(j, r0 + r, &item) : NULL;
        if (t) note_finite(p, r0 + r, sh_blocks_finite(t, item, m->k));
        sh_blocks_pack_row(p->kn, t, item, m, to, r);
    }
    if (packs_blocks(j)) return;
    for (int r = 0; r < n; r++) {
        int64_t item;
        const sh_tensor *t = job_row(j, r0 + r, &item);
        if (sh_dtype_is_blocks(t->dtype) && p->rounds) {
            round_blocks(p, t, item, m->k, rows + (size_t)r * (size_t)m->k);
            continue;
        }
        int ok = sh_values_bf16(t, item, m->k, rows + (size_t)r * (size_t)m->k);
        if (ok < m->k) {
            note_lowest(&p->inexact, (int64_t)(r0 + r) * m->k + ok);
            return;
        }
    }
    check_finite(p, rows, (size_t)m->k, r0, n);
    pack_panels(p->kn, m, to, rows, (size_t)m->k, n, 0, 1);
}

static sh_status bring_run(const sh_tensor *t, const uint8_t *from, const uint8_t *end) {
    char what[600];
    snprintf(what, sizeof what, "%s: %s", t->file, t->name);
    return from == end ? SH_OK : sh_packed_bring(what, from, (size_t)(end - from), t->data);
}

/* Rows [r0, r1) of the matrix come into memory, run by run. */
static sh_status bring_rows(const sh_load_job *j, int r0, int r1) {
    const sh_tensor *t = NULL;
    const uint8_t *from = NULL, *end = NULL;
    for (int r = r0; r < r1; r++) {
        int64_t item;
        const sh_tensor *of = job_row(j, r, &item);
        const uint8_t *a = of->data + sh_dtype_bytes(of->dtype, (uint64_t)item);
        int64_t block = sh_dtype_block(of->dtype), past = (item + j->k + block - 1) / block * block;
        const uint8_t *b = of->data + sh_dtype_bytes(of->dtype, (uint64_t)past);
        if (t && a != end) SH_TRY(bring_run(t, from, end));
        if (!t || a != end) from = a;
        t = of;
        end = b;
    }
    return t ? bring_run(t, from, end) : SH_OK;
}

/* The source of panels [p0, p1): waiting for storage is not work, and a file that ends early is an error, no signal. */
static bool bring(packing *p, int p0, int p1, int member, int size) {
    const sh_load_job *j = p->j;
    sh_loading *l = p->loading;
    if (!l) return true;
    int r0 = p0 * SH_PANEL, r1 = p1 * SH_PANEL < j->mat->n ? p1 * SH_PANEL : j->mat->n;
    double since = sh_now();
    sh_status st = bring_rows(j, r0, r1);
    double now = sh_now();
    l->reading += sh_loading_share(l, since, now, size);
    l->bytes += sh_load_bytes(j, r0, r1);
    if (member == 0 && p->peers) {
        p->stopped = p->peers->poll(p->peers->ctx);
        l->received = p->peers->received;
    }
    if (member == 0) sh_loading_tell(l, now);
    if (st != SH_OK && !atomic_exchange(&p->unread, true)) snprintf(p->why, sizeof p->why, "%s", sh_error_text());
    return st == SH_OK && !p->stopped;
}

/* Panels [lo, hi), counted from the first. */
static void pack_piece(packing *p, int lo, int hi, uint16_t *rows) {
    const sh_wmat *m = p->j->mat;
    if (packs_in_place(p->j)) {
        size_t ld = (size_t)row_items(p->j);
        int skip = p->first * SH_PANEL;
        const uint16_t *src = (const uint16_t *)(const void *)p->j->t[0]->data;
        src += ((size_t)p->j->row[0] + (size_t)skip) * ld + (size_t)p->j->col;
        for (int i = lo; i < hi; i++) {
            int r = i * SH_PANEL, n = m->n - skip - r < SH_PANEL ? m->n - skip - r : SH_PANEL;
            check_finite(p, src + (size_t)r * ld, ld, skip + r, n);
            pack_panels(p->kn, m, p->to, src, ld, m->n - skip, i, i + 1);
        }
        return;
    }
    for (int i = lo; i < hi; i++) pack_panel(p, p->first + i, rows);
}

static void pack_member(void *arg, int member, int size) {
    packing *p = arg;
    int lo, hi, k = p->j->mat->k;
    sh_team_share(p->last - p->first, member, size, &lo, &hi);
    if (lo == hi) return;
    bool in_place = packs_in_place(p->j);
    uint16_t *rows = in_place ? NULL : malloc(SH_PANEL * (size_t)k * sizeof *rows);
    if (!rows && !in_place) {
        atomic_store(&p->no_memory, true);
        return;
    }
    int step = (int)(READ_PIECE / (SH_PANEL * sh_dtype_bytes(p->j->t[0]->dtype, (uint64_t)k) + 1)) + 1;
    for (int at = lo; at < hi; at += step) {
        int end = hi - at < step ? hi : at + step;
        if (!bring(p, p->first + at, p->first + end, member, size)) break;
        double since = sh_now();
        pack_piece(p, at, end, rows);
        if (p->loading) p->loading->packing += sh_loading_share(p->loading, since, sh_now(), size);
    }
    free(rows);
}

/* The tensor and its item that lie at item `at` of the matrix, and the value. */
static const sh_tensor *value_at(const packing *p, int64_t at, int64_t *item, float *value) {
    const sh_tensor *t = job_row(p->j, (int)(at / p->j->mat->k), item);
    *item += at % p->j->mat->k;
    sh_values_floats(t, *item, 1, value);
    return t;
}

static sh_status refuse_inexact(const packing *p, const char *dir) {
    int64_t item;
    float f;
    const sh_tensor *t = value_at(p, p->inexact, &item, &f);
    if (sh_dtype_is_blocks(t->dtype))
        SH_FAIL(
            SH_EUNSUPPORTED,
            "%s/%s: %s: the %s value %.9g of item %lld is not exact in BF16, and mode exact rounds nothing: allowed "
            "are bf16 (which rounds it), q8 and q4",
            dir, t->file, t->name, t->dtype_name, (double)f, (long long)item);
    SH_FAIL(SH_EUNSUPPORTED,
            "%s/%s: %s: the %s value %.9g of item %lld is not exact in BF16: convert the checkpoint to BF16 first", dir,
            t->file, t->name, t->dtype_name, (double)f, (long long)item);
}

/* Of a block whose scale is infinite an item may be 0 times that: not a number. */
static sh_status refuse_value(const char *dir, const sh_tensor *t, float f, int64_t item) {
    SH_FAIL(SH_EFORMAT, "%s/%s: %s: the %s value of item %lld is %s: allowed are finite numbers", dir, t->file, t->name,
            t->dtype_name, (long long)item, isnan(f) ? "not a number" : "infinite");
}

static sh_status refuse_unfinite(const packing *p, const char *dir) {
    int64_t item;
    float f;
    const sh_tensor *t = value_at(p, p->unfinite, &item, &f);
    return refuse_value(dir, t, f, item);
}

sh_status sh_load_vector(const char *dir, const sh_tensor *t, int n, float *to) {
    sh_values_floats(t, 0, n, to);
    for (int i = 0; i < n; i++)
        if (!isfinite(to[i])) return refuse_value(dir, t, to[i], i);
    return SH_OK;
}

sh_status sh_load_pack(const sh_loader *l, const sh_load_job *j, sh_team *team, int first, int last, uint8_t *to) {
    packing p = {.kn = l->kn,
                 .j = j,
                 .to = to,
                 .first = first,
                 .last = last,
                 .rounds = l->rounds,
                 .inexact = INT64_MAX,
                 .unfinite = INT64_MAX,
                 .loading = l->loading,
                 .peers = l->peers};
    if (team)
        sh_team_run(team, pack_member, &p);
    else
        pack_member(&p, 0, 1);
    if (p.stopped) return sh_error_pass(p.stopped, __FILE__, __LINE__);
    if (p.unread) SH_FAIL(SH_EIO, "%s/%s", l->dir, p.why);
    if (p.no_memory) SH_FAIL(SH_EMEMORY, "%s: no memory for packing", j->t[0]->name);
    if (p.inexact != INT64_MAX) return refuse_inexact(&p, l->dir);
    return p.unfinite == INT64_MAX ? SH_OK : refuse_unfinite(&p, l->dir);
}

void sh_load_advise(const uint8_t *data, size_t bytes, int advice) {
    const uintptr_t page = 4096;
    uintptr_t a = ((uintptr_t)data + page - 1) & ~(page - 1), b = ((uintptr_t)data + bytes) & ~(page - 1);
    if (a < b) (void)madvise((void *)a, b - a, advice);
}

void sh_load_let_go(const sh_load_job *j) {
    if (j->heads.layer) return; /* a head may be stored several times: the rows are no run of the tensor */
    for (int s = 0; s < 2 && j->t[s]; s++) {
        size_t row = sh_dtype_bytes(j->t[s]->dtype, (uint64_t)row_items(j));
        sh_load_advise(j->t[s]->data + (size_t)j->row[s] * row, (size_t)j->n[s] * row, MADV_DONTNEED);
    }
}

/* Like a matrix it comes into memory first: what cannot be read is an error, no signal. */
static sh_status run_vector(const sh_loader *l, const sh_load_job *j) {
    const sh_tensor *t = j->t[0];
    char why[512];
    if (l->loading && bring_run(t, t->data, t->data + sh_load_bytes(j, 0, 1)) != SH_OK) {
        snprintf(why, sizeof why, "%s", sh_error_text());
        SH_FAIL(SH_EIO, "%s/%s", l->dir, why);
    }
    SH_TRY(sh_load_vector(l->dir, t, j->k, j->to));
    if (l->loading) l->loading->bytes += sh_load_bytes(j, 0, 1);
    return SH_OK;
}

sh_status sh_load_run(const sh_loader *l, const sh_load_job *j, sh_team *team) {
    if (j->to)
        SH_TRY(run_vector(l, j));
    else
        SH_TRY(sh_load_pack(l, j, team, 0, sh_wmat_panels(j->mat->n), (uint8_t *)(uintptr_t)j->mat->data));
    sh_load_let_go(j);
    return SH_OK;
}

uint64_t sh_load_bytes(const sh_load_job *j, int r0, int r1) {
    return (uint64_t)(j->to ? 1 : r1 - r0) * sh_dtype_bytes(j->t[0]->dtype, (uint64_t)j->k);
}
