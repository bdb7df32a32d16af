/*
 * Mapping a rank's share of a packed folder. See packed.h. Runs of whole panels are used where they lie: layers,
 * experts, query heads, feed-forward columns, outputs and ids. Copied is what cuts panels: heads whose width is no
 * multiple of a panel, KV heads that come twice, and with share.sum ranges of inputs.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "model/kernels/quant.h"
#include "model/layout.h"
#include "model/packed_int.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

typedef struct placing {
    sh_packed *p;
    sh_weights *w;
    sh_team *team;
    char *copies; /* NULL: their bytes are only counted */
    size_t copied, mapped;
    sh_loading *loading;
} placing;

/* --- pages ---------------------------------------------------------------------------------------------------------
 */

/* What is read from now on comes in huge pages, where kernel and file system have them for files. Only what lies wholly
 * in the bytes wanted, and only long runs: a miss reads some megabytes, also of what is beside. */
static void want_huge(const uint8_t *from, size_t bytes, const uint8_t *start) {
    const size_t huge = (size_t)2 << 20, least = (size_t)16 << 20;
    size_t at = (size_t)(from - start), lo = (at + huge - 1) / huge * huge, hi = (at + bytes) / huge * huge;
    if (bytes >= least) (void)madvise((void *)(uintptr_t)(start + lo), hi - lo, MADV_HUGEPAGE);
}

sh_status sh_packed_bring(const char *path, const uint8_t *from, size_t bytes, const uint8_t *start) {
    const uintptr_t page = 4096;
    uintptr_t a = (uintptr_t)from & ~(page - 1), b = ((uintptr_t)from + bytes + page - 1) & ~(page - 1);
    if (bytes == 0 || madvise((void *)a, b - a, MADV_POPULATE_READ) == 0) return SH_OK;
    if (errno == EINVAL || errno == ENOSYS) { /* an older kernel: pages then come when they are touched */
        (void)madvise((void *)a, b - a, MADV_WILLNEED);
        return SH_OK;
    }
    size_t at = (size_t)(from - start);
    SH_FAIL(SH_EIO, "%s: bytes %zu to %zu cannot be read: %s: was it truncated?", path, at, at + bytes - 1,
            errno == EFAULT ? "beyond its end, or bad storage" : strerror(errno));
}

#define PIECE ((size_t)4 << 20) /* what a thread brings in at a time */

typedef struct bringing {
    const char *path;
    const uint8_t *from, *start;
    size_t bytes;
    _Atomic size_t next;
    sh_loading *loading;
    _Atomic int failed;
    char why[512];
} bringing;

static void bring_pieces(void *arg, int member, int size) {
    bringing *b = arg;
    sh_loading *l = b->loading;
    for (size_t at; (at = atomic_fetch_add(&b->next, PIECE)) < b->bytes;) {
        size_t n = b->bytes - at < PIECE ? b->bytes - at : PIECE;
        double since = sh_now();
        sh_status st = sh_packed_bring(b->path, b->from + at, n, b->start);
        double now = sh_now();
        l->reading += sh_loading_share(l, since, now, size);
        l->bytes += n;
        if (member == 0) sh_loading_tell(l, now);
        if (st == SH_OK || atomic_exchange(&b->failed, 1)) continue;
        snprintf(b->why, sizeof b->why, "%s", sh_error_text()); /* errors are a thread's own */
    }
}

static sh_status open_map(const sh_packed *p, sh_packed_file *f) {
    char path[PATH_MAX];
    if (f->map.data) return SH_OK;
    SH_TRY(sh_packed_path(p, f->name, path));
    SH_TRY(sh_map_open(path, &f->map));
    if (f->map.len == f->bytes) return SH_OK;
    size_t len = f->map.len;
    sh_map_close(&f->map);
    SH_FAIL(SH_EFORMAT, "%s: ends at offset %zu, but " SH_PACKED_INDEX " says %" PRIu64 " bytes", path, len, f->bytes);
}

/* Bytes that are used where they lie. */
static sh_status use(placing *x, sh_packed_file *f, const uint8_t *from, size_t bytes) {
    char path[PATH_MAX];
    SH_TRY(sh_packed_path(x->p, f->name, path));
    want_huge(from, bytes, f->map.data);
    bringing b = {.path = path, .from = from, .start = f->map.data, .bytes = bytes, .loading = x->loading};
    if (x->team && bytes > PIECE)
        sh_team_run(x->team, bring_pieces, &b);
    else
        bring_pieces(&b, 0, 1);
    if (b.failed) SH_FAIL(SH_EIO, "%s", b.why);
    x->mapped += bytes;
    return SH_OK;
}

/* --- what a share has of a matrix ----------------------------------------------------------------------------------
 */

/* Outputs [rows.lo, rows.hi) of all inputs; with `heads` those of KV heads, head by head; or all outputs of `inputs`.
 */
typedef struct piece {
    sh_range rows, inputs;
    const sh_layer *heads; /* NULL: rows follow each other */
    bool by_inputs;
} piece;

static piece of_kv(const sh_weights *w, const sh_layer *l) {
    int n = sh_share_layer(w->share, l).kv_heads, hd = l->head_dim;
    int first = sh_share_kv_head(w->share, l, 0), last = sh_share_kv_head(w->share, l, n - 1);
    if (last - first + 1 == n) return (piece){.rows = {first * hd, (last + 1) * hd}};
    return (piece){.rows = {0, n * hd}, .heads = l};
}

static piece of_mixing(const sh_weights *w, int n, sh_range mine) {
    if (w->share.sum) return (piece){.rows = {0, n}, .inputs = mine, .by_inputs = true};
    return (piece){.rows = sh_share_range(w->share, n, SH_SHARE_COLUMNS)};
}

static piece piece_of(const sh_weights *w, const sh_slot *s) {
    const sh_layer *l = s->layer < 0 ? NULL : &w->config->layer[s->layer];
    switch (s->part) {
    case SH_SLOT_QUERIES:
        return (piece){.rows = sh_share_range(w->share, s->n, l->head_dim)};
    case SH_SLOT_KV:
        return of_kv(w, l);
    case SH_SLOT_COLUMNS:
        return (piece){.rows = sh_share_range(w->share, s->n, SH_SHARE_COLUMNS)};
    case SH_SLOT_MIX_QUERIES:
        return of_mixing(w, s->n, sh_share_range(w->share, s->k, l->head_dim));
    case SH_SLOT_MIX_COLUMNS:
        return of_mixing(w, s->n, sh_share_range(w->share, s->k, SH_SHARE_COLUMNS));
    case SH_SLOT_VOCABULARY:
        return (piece){.rows = sh_share_range(w->share, s->n, SH_SHARE_VOCAB)};
    case SH_SLOT_WHOLE:
    case SH_SLOT_EXPERTS:
        break;
    }
    return (piece){.rows = {0, s->n}};
}

/* Whole panels, so that the padding of the last one is the model's own. */
static bool is_run_of_panels(const piece *y, const sh_slot *s) {
    if (y->by_inputs) return y->inputs.lo == 0 && y->inputs.hi == s->k;
    return !y->heads && y->rows.lo % SH_PANEL == 0 && (y->rows.hi % SH_PANEL == 0 || y->rows.hi == s->n);
}

/* The range of inputs in panels: a run of bytes in each. Groups that share a scale must not be cut, because the
 * checkpoint's own values, from which the halves would get scales of their own, are not here. */
static sh_status copy_inputs(const placing *x, const sh_slot *s, const uint8_t *from, const piece *y, uint8_t *to) {
    int group = sh_wtype_group(s->type), lo = y->inputs.lo, hi = y->inputs.hi;
    if (lo % group || (hi % group && hi != s->k))
        SH_FAIL(
            SH_EUNSUPPORTED,
            "%s: %s: inputs %d to %d of part %d of %d: in %s %d inputs share a scale, and a packed folder cannot be "
            "cut between them: use --tp-reduce gather, another --tp, or the checkpoint",
            x->p->dir, s->name, lo, hi - 1, x->w->share.part, x->w->share.parts, sh_wtype_name(s->type), group);
    size_t unit = sh_wmat_bytes(s->type, SH_PANEL, group), whole = sh_wmat_bytes(s->type, SH_PANEL, s->k);
    size_t skip = (size_t)(lo / group) * unit, bytes = sh_wmat_bytes(s->type, SH_PANEL, hi - lo);
    for (int p = 0; to && p < sh_wmat_panels(s->n); p++)
        memcpy(to + (size_t)p * bytes, from + (size_t)p * whole + skip, bytes);
    return SH_OK;
}

static void copy_rows(const placing *x, const sh_slot *s, const uint8_t *from, const piece *y, uint8_t *to) {
    const sh_wmat source = {.n = s->n, .k = s->k, .type = s->type, .data = (const uint32_t *)(const void *)from};
    for (int r = 0; r < y->rows.hi - y->rows.lo; r++) {
        int row = y->rows.lo + r;
        if (y->heads) {
            int hd = y->heads->head_dim;
            row = sh_share_kv_head(x->w->share, y->heads, r / hd) * hd + r % hd;
        }
        sh_wmat_copy_output(&source, row, to, r);
    }
}

static sh_status copy_piece(placing *x, const sh_slot *s, const uint8_t *from, const piece *y) {
    uint8_t *to = x->copies ? (uint8_t *)x->copies + x->copied : NULL;
    if (y->by_inputs)
        SH_TRY(copy_inputs(x, s, from, y, to));
    else if (to)
        copy_rows(x, s, from, y, to);
    x->copied += sh_mem_align(sh_wmat_bytes(s->type, s->mat->n, s->mat->k));
    if (to) s->mat->data = (const uint32_t *)(const void *)to;
    return SH_OK;
}

/* --- slots ---------------------------------------------------------------------------------------------------------
 */

static bool is_held(const sh_weights *w, const sh_slot *s, int e) {
    return s->part != SH_SLOT_EXPERTS || !w->held.holds || w->held.holds(w->held.ctx, s->layer, e);
}

/* Those that are held; what lies together is brought in together. */
static sh_status point_stack(placing *x, const sh_slot *s, sh_packed_file *f, const uint8_t *at) {
    size_t one = sh_packed_item_bytes(s);
    int run = 0;
    for (int e = 0; e <= s->count; e++) {
        if (e < s->count && is_held(x->w, s, e)) {
            s->mat[e].data = (const uint32_t *)(const void *)(at + (size_t)e * one);
            run++;
            continue;
        }
        if (run) SH_TRY(use(x, f, at + (size_t)(e - run) * one, (size_t)run * one));
        run = 0;
    }
    return SH_OK;
}

static sh_status point_matrix(placing *x, const sh_slot *s, sh_packed_file *f, const uint8_t *at) {
    piece y = piece_of(x->w, s);
    if (s->part == SH_SLOT_EXPERTS) return point_stack(x, s, f, at);
    if (s->mat->n == 0 || s->mat->k == 0) { /* more parts than panels: nothing for this one */
        s->mat->data = (const uint32_t *)(const void *)at;
        return SH_OK;
    }
    if (!is_run_of_panels(&y, s)) return copy_piece(x, s, at, &y);
    at += (size_t)(y.rows.lo / SH_PANEL) * sh_wmat_bytes(s->type, SH_PANEL, s->k);
    s->mat->data = (const uint32_t *)(const void *)at;
    return use(x, f, at, sh_wmat_bytes(s->type, y.rows.hi - y.rows.lo, s->k));
}

static sh_status point(void *ctx, const sh_slot *s) {
    placing *x = ctx;
    sh_packed_file *f;
    uint64_t offset;
    SH_TRY(sh_packed_locate(x->p, s, &f, &offset));
    SH_TRY(open_map(x->p, f));
    const uint8_t *at = f->map.data + offset;
    if (s->count) return point_matrix(x, s, f, at);
    SH_TRY(use(x, f, at, (size_t)s->k * sizeof(float)));
    if (s->scalar)
        memcpy(s->scalar, at, sizeof *s->scalar);
    else
        *s->vector = (const float *)(const void *)at;
    return SH_OK;
}

/* The second time, with room for them. */
static sh_status fill_copy(void *ctx, const sh_slot *s) {
    placing *x = ctx;
    sh_packed_file *f;
    uint64_t offset;
    if (!s->count || s->part == SH_SLOT_EXPERTS || s->mat->n == 0 || s->mat->k == 0) return SH_OK;
    piece y = piece_of(x->w, s);
    if (is_run_of_panels(&y, s)) return SH_OK;
    SH_TRY(sh_packed_locate(x->p, s, &f, &offset));
    char path[PATH_MAX];
    SH_TRY(sh_packed_path(x->p, f->name, path));
    sh_loading *l = x->loading;
    double since = sh_now();
    SH_TRY(sh_packed_bring(path, f->map.data + offset, sh_packed_item_bytes(s), f->map.data));
    double there = sh_now();
    SH_TRY(copy_piece(x, s, f->map.data + offset, &y));
    l->reading += sh_loading_share(l, since, there, 1);
    l->packing += sh_loading_share(l, there, sh_now(), 1);
    l->bytes += sh_packed_item_bytes(s);
    return SH_OK;
}

sh_status sh_packed_load(sh_packed *p, sh_weights *w, sh_wmat *expert, sh_team *team, sh_loading *l) {
    placing x = {.p = p, .w = w, .team = team, .loading = l};
    SH_TRY(sh_packed_check_type(p->dir, p->type, w->type, sh_wtype_modes(w->type)));
    l->total = sh_weights_layout(w, expert, NULL);
    SH_TRY(sh_slots_each(w, point, &x));
    size_t bytes = x.copied;
    if (bytes > 0) {
        SH_TRY(sh_mem_alloc(bytes, "weights", &p->copies));
        p->copied = bytes;
        x.copies = p->copies;
        x.copied = 0;
        SH_TRY(sh_slots_each(w, fill_copy, &x));
    }
    w->bytes = x.mapped + bytes + sh_weights_table_bytes(w->config, w->first, w->last);
    return SH_OK;
}
