/*
 * Attention as pieces of work: (span, KV head, block of rows), each over a run of segments. A piece reads every tile of
 * keys and values once for all its rows and all query heads of the KV head. When one piece would keep the others
 * waiting, its segments are split into aligned subtrees whose results join in a second round; the tree makes that the
 * same arithmetic. See attention.h.
 */
#include "model/attention.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include "common/mem.h"

#define BLOCK_ROWS 64  /* query rows (positions × heads of the group) that share a tile */
#define FEW_ROWS   16  /* rows at most for which a segment's keys and values are not made a tile */
#define JOIN_ALONE 256 /* rows to join below which waking the team costs more */

/* Query rows of one KV head of one span, and the run of segments they see. */
typedef struct piece {
    const sh_attn_rows *rows;
    int kv_head, first, n; /* positions first … first+n−1 of rows */
    int seg0, seg1;
    int block; /* for far rows: which of this member's blocks, from 0 */
    int part;  /* where the result goes: this part, or −1: finished */
} piece;

/* A piece that was split: parts [part, part+n_parts) are its subtrees of 2^level segments, ascending from `index`. */
typedef struct joint {
    piece whole;
    int part, n_parts, level, index;
} joint;

/* One thread's working memory. R: rows of a block, S: SH_SEGMENT_TOKENS, D: head dimension. */
typedef struct scratch {
    sh_arena arena;
    float *q;            /* [R, D] */
    float *k, *v;        /* [S, D]; of k at least SH_KV_TILE */
    float *s;            /* [R, S] */
    float *o, *m, *l;    /* [R, D], [R], [R]: one segment's result */
    float *to, *tm, *tl; /* [depth, R, D], [depth, R] twice: pending subtrees of each row */
    int *level, *n;      /* [depth, R], [R]: of the pending subtrees, by position */
    int *lo, *hi;        /* [R]: keys that a position sees in the segment at hand */
} scratch;

struct sh_attention {
    sh_team *team;
    const sh_kernels *kn;
    int threads, block_rows, max_dim, depth;
    scratch *scratch; /* [threads] */
    piece *pieces;
    joint *joints;
    int max_pieces, max_parts, n_pieces, n_joints, n_parts;
    float *parts; /* [max_parts][R, D + 2]: o, then m, then l; l = 0: the row saw nothing */
    size_t parts_bytes;
    /* the run at hand */
    const sh_kv_pool *kv;
    const sh_layer *layer;
    const float *k_norm;
    const sh_rope *rope;
    float *q;
    const sh_attn_far *far;       /* rows of which partials are made; NULL: none */
    const float *const *partials; /* of rows that are merged: [rows][members] */
    int members;
    int group; /* query heads per KV head */
    atomic_int next;
};

static int min_int(int a, int b) {
    return a < b ? a : b;
}

static int max_int(int a, int b) {
    return a > b ? a : b;
}

/* Positions that share a block. */
static int block_positions(int group) {
    return max_int(1, BLOCK_ROWS / group);
}

/* --- memory --------------------------------------------------------------------------------------------------------
 */

static sh_status scratch_create(scratch *t, int block_rows, int max_dim, int depth) {
    size_t f = sizeof(float), R = (size_t)block_rows, D = (size_t)max_dim, S = SH_SEGMENT_TOKENS, n = (size_t)depth;
    size_t tile = S * D > SH_KV_TILE ? S * D : SH_KV_TILE;
    size_t floats = R * D * (n + 2) + tile + S * D + R * S + R * (3 * n + 5);
    SH_TRY(sh_arena_create(floats * f + 14 * 64, "attention scratch", &t->arena));
    t->q = sh_arena_take(&t->arena, R * D * f);
    t->k = sh_arena_take(&t->arena, tile * f);
    t->v = sh_arena_take(&t->arena, S * D * f);
    t->s = sh_arena_take(&t->arena, R * S * f);
    t->o = sh_arena_take(&t->arena, R * D * f);
    t->m = sh_arena_take(&t->arena, R * f);
    t->l = sh_arena_take(&t->arena, R * f);
    t->to = sh_arena_take(&t->arena, n * R * D * f);
    t->tm = sh_arena_take(&t->arena, n * R * f);
    t->tl = sh_arena_take(&t->arena, n * R * f);
    t->level = sh_arena_take(&t->arena, n * R * sizeof(int));
    t->n = sh_arena_take(&t->arena, R * sizeof(int));
    t->lo = sh_arena_take(&t->arena, R * sizeof(int));
    t->hi = sh_arena_take(&t->arena, R * sizeof(int));
    return SH_OK;
}

static size_t part_floats(const sh_attention *a) {
    return (size_t)a->block_rows * (size_t)(a->max_dim + 2);
}

/* The largest shapes among the stage's layers. */
static void measure(sh_attention *a, const sh_config *c, int first, int last, int max_rows, int max_spans) {
    for (int i = first; i < last; i++) {
        const sh_layer *l = &c->layer[i];
        int group = l->heads / l->kv_heads, positions = block_positions(group);
        a->block_rows = max_int(a->block_rows, positions * group);
        a->max_dim = max_int(a->max_dim, l->head_dim);
        a->max_pieces = max_int(a->max_pieces, SH_OWNER_BLOCKS * l->kv_heads * (max_spans + max_rows / positions));
    }
    /* A piece is split into about cost/target + 2 parts; costs over all pieces sum to 4·threads targets. */
    a->max_parts = a->threads > 1 ? 12 * a->threads : 0;
    a->max_pieces += a->max_parts;
}

static sh_status reserve(sh_attention *a) {
    a->scratch = calloc((size_t)a->threads, sizeof *a->scratch);
    a->pieces = calloc((size_t)a->max_pieces + 1, sizeof *a->pieces);
    a->joints = calloc((size_t)a->max_parts + 1, sizeof *a->joints);
    if (!a->scratch || !a->pieces || !a->joints) SH_FAIL(SH_EMEMORY, "attention: no memory for its work list");
    for (int i = 0; i < a->threads; i++) SH_TRY(scratch_create(&a->scratch[i], a->block_rows, a->max_dim, a->depth));
    size_t bytes = (size_t)a->max_parts * part_floats(a) * sizeof(float);
    SH_TRY(sh_mem_alloc(bytes, "attention parts", (void **)&a->parts));
    a->parts_bytes = bytes;
    return SH_OK;
}

sh_status sh_attention_create(const sh_config *c, int first, int last, int max_rows, int max_spans, int max_context,
                              sh_team *team, const sh_kernels *kn, sh_attention **out) {
    sh_attention *a = calloc(1, sizeof *a);
    if (!a) SH_FAIL(SH_EMEMORY, "attention: no memory");
    a->team = team;
    a->kn = kn;
    a->threads = sh_team_size(team);
    a->depth = 2;
    for (int segments = max_context / SH_SEGMENT_TOKENS + 1; segments > 0; segments /= 2) a->depth++;
    measure(a, c, first, last, max_rows, max_spans);
    sh_status st = reserve(a);
    if (st != SH_OK) {
        sh_attention_destroy(&a);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = a;
    return SH_OK;
}

void sh_attention_destroy(sh_attention **ap) {
    sh_attention *a = *ap;
    if (!a) return;
    for (int i = 0; a->scratch && i < a->threads; i++) sh_arena_release(&a->scratch[i].arena);
    sh_mem_free(a->parts, a->parts_bytes);
    free(a->scratch);
    free(a->pieces);
    free(a->joints);
    free(a);
    *ap = NULL;
}

/* --- the tree of segments ------------------------------------------------------------------------------------------
 */

/*
 * Adds the subtree (level, index) of one position's rows; subtrees come in ascending order. A right child joins its
 * left sibling, which waits on top of the pile unless it is empty, and the result rises; a left child waits. o, m, l:
 * [group, hd], [group], [group].
 */
static void tree_add(const sh_attention *a, scratch *t, int position, int level, int index, const float *o,
                     const float *m, const float *l) {
    int R = a->block_rows, g = a->group, hd = a->layer->head_dim, row = position * g;
    size_t plane = (size_t)R * (size_t)a->max_dim;
    bool waiting = false; /* whether the rising subtree is already on the pile */
    for (; index & 1; index >>= 1, level++) {
        int top = t->n[position] - 1 - (waiting ? 1 : 0);
        if (top < 0 || t->level[top * R + position] != level) continue;
        float *to = t->to + (size_t)top * plane + (size_t)row * (size_t)hd;
        const float *po = waiting ? to + plane : o, *pm = waiting ? t->tm + (top + 1) * R + row : m;
        const float *pl = waiting ? t->tl + (top + 1) * R + row : l;
        for (int h = 0; h < g; h++)
            a->kn->merge(to + (size_t)h * (size_t)hd, &t->tm[top * R + row + h], &t->tl[top * R + row + h],
                         po + (size_t)h * (size_t)hd, pm[h], pl[h], hd);
        t->n[position] = top + 1;
        waiting = true;
    }
    if (!waiting) {
        int top = t->n[position]++;
        memcpy(t->to + (size_t)top * plane + (size_t)row * (size_t)hd, o, (size_t)g * (size_t)hd * sizeof(float));
        memcpy(t->tm + top * R + row, m, (size_t)g * sizeof(float));
        memcpy(t->tl + top * R + row, l, (size_t)g * sizeof(float));
    }
    t->level[(t->n[position] - 1) * R + position] = level;
}

/* Joins what is pending, right to left: the siblings that are missing are empty. The result is plane 0. */
static void tree_close(const sh_attention *a, scratch *t, int position) {
    int R = a->block_rows, g = a->group, hd = a->layer->head_dim, row = position * g;
    size_t plane = (size_t)R * (size_t)a->max_dim;
    for (int top = t->n[position] - 1; top > 0; top--)
        for (int h = 0; h < g; h++) {
            float *to = t->to + (size_t)(top - 1) * plane + (size_t)(row + h) * (size_t)hd;
            int at = (top - 1) * R + row + h;
            a->kn->merge(to, &t->tm[at], &t->tl[at], to + plane, t->tm[at + R], t->tl[at + R], hd);
        }
    t->n[position] = min_int(t->n[position], 1);
}

/* --- one piece -----------------------------------------------------------------------------------------------------
 */

static int row_of(const piece *p, int position) {
    return p->rows->row + p->first + position;
}

/* A row's place in q: its queries, then its result. */
static float *place(const sh_attention *a, const piece *p, int position) {
    size_t hd = (size_t)a->layer->head_dim, row = (size_t)row_of(p, position);
    return a->q + (row * (size_t)a->layer->heads + (size_t)(p->kv_head * a->group)) * hd;
}

static const float *query(const sh_attention *a, const piece *p, int position) {
    if (!a->far) return place(a, p, position);
    return a->far->q[row_of(p, position)] + (size_t)(p->kv_head * a->group) * (size_t)a->layer->head_dim;
}

/* Keys [*lo, *hi) that position pos sees, causally and within the window. */
static void visible(const sh_layer *l, int pos, int *lo, int *hi) {
    *lo = l->window > 0 ? max_int(0, pos - l->window + 1) : 0;
    *hi = pos + 1;
}

/* The positions of the block that see something of the segment are [*p0, *p1); fills lo and hi. */
static void segment_ranges(const sh_attention *a, scratch *t, const piece *p, int seg, int *p0, int *p1) {
    int base = seg * SH_SEGMENT_TOKENS;
    *p0 = p->n;
    *p1 = 0;
    for (int i = 0; i < p->n; i++) {
        int lo, hi;
        visible(a->layer, p->rows->pos + p->first + i, &lo, &hi);
        t->lo[i] = max_int(lo, base);
        t->hi[i] = min_int(hi, base + SH_SEGMENT_TOKENS);
        if (t->lo[i] >= t->hi[i]) continue;
        *p0 = min_int(*p0, i);
        *p1 = i + 1;
    }
}

/* The keys of segment seg that the first position of the piece sees, when it is another one of the piece. */
static int next_keys(const sh_attention *a, const piece *p, int seg, int *from) {
    int lo, hi, base = seg * SH_SEGMENT_TOKENS;
    visible(a->layer, p->rows->pos + p->first, &lo, &hi);
    *from = max_int(lo, base);
    return seg < p->seg1 ? max_int(0, min_int(hi, base + SH_SEGMENT_TOKENS) - *from) : 0;
}

/* One position over one segment, straight from the pages: its few rows would not pay for a tile. */
static void segment_few(const sh_attention *a, scratch *t, const piece *p, int i, int seg) {
    int g = a->group, from = t->lo[i], n = t->hi[i] - from, layer = a->layer->kv_from;
    size_t row = (size_t)(i * g), dim = (size_t)a->layer->head_dim, S = SH_SEGMENT_TOKENS;
    sh_kv_rows rows = {.rows = g,
                       .q = t->q + row * dim,
                       .ldq = dim,
                       .s = t->s + row * S,
                       .lds = S,
                       .o = t->o + row * dim,
                       .ldo = dim,
                       .tile = t->k,
                       .k_norm = a->k_norm,
                       .rope = a->rope};
    rows.n_next = next_keys(a, p, seg + 1, &rows.next);
    sh_kv_scores(a->kv, a->kn, layer, p->rows->span, from, n, p->kv_head, &rows);
    for (size_t r = row; r < row + (size_t)g; r++) a->kn->softmax_part(t->s + r * S, n, &t->m[r], &t->l[r]);
    sh_kv_weigh(a->kv, a->kn, layer, p->rows->span, from, n, p->kv_head, &rows);
}

/* Positions [p0, p1) of the piece over one segment, each over the keys it sees: o, m, l of the segment. */
static void segment_run(const sh_attention *a, scratch *t, const piece *p, int p0, int p1) {
    const sh_kernels *kn = a->kn;
    int g = a->group, hd = a->layer->head_dim;
    int base = t->lo[p0], keys = t->hi[p1 - 1] - base; /* lo and hi ascend with the position */
    sh_kv_read(a->kv, kn, a->layer->kv_from, p->rows->span, base, keys, p->kv_head, a->k_norm, a->rope, t->k, t->v);
    size_t S = SH_SEGMENT_TOKENS, dim = (size_t)hd;
    kn->scores(t->s + (size_t)(p0 * g) * S, S, t->q + (size_t)(p0 * g) * dim, dim, (p1 - p0) * g, t->k, keys, hd);
    for (int i = p0, end; i < p1; i = end) {
        int from = t->lo[i] - base, n = t->hi[i] - t->lo[i];
        for (end = i + 1; end < p1 && t->lo[end] == t->lo[i] && t->hi[end] == t->hi[i];) end++;
        for (int r = i * g; r < end * g; r++) kn->softmax_part(t->s + (size_t)r * S + from, n, &t->m[r], &t->l[r]);
        kn->weighted_sum(t->o + (size_t)(i * g) * dim, dim, t->s + (size_t)(i * g) * S + from, S, (end - i) * g,
                         t->v + (size_t)from * dim, n, hd);
    }
}

/* Where a partial has the o, m and l of a KV head's group. */
typedef struct partial {
    size_t o, m, l;
} partial;

static partial partial_of(const sh_attention *a, int kv_head) {
    size_t h = (size_t)(kv_head * a->group), all = (size_t)a->layer->heads, hd = (size_t)a->layer->head_dim;
    return (partial){h * hd, all * hd + h, all * hd + all + h};
}

static void write_partial(const sh_attention *a, const scratch *t, const piece *p, int position) {
    size_t g = (size_t)a->group, hd = (size_t)a->layer->head_dim, row = (size_t)position * g;
    if (t->n[position] == 0) return; /* the row ends before this block */
    float *to = a->far->to[row_of(p, position)] + (size_t)p->block * SH_PARTIAL_FLOATS(a->layer);
    partial at = partial_of(a, p->kv_head);
    memcpy(to + at.o, t->to + row * hd, g * hd * sizeof(float));
    memcpy(to + at.m, t->tm + row, g * sizeof(float));
    memcpy(to + at.l, t->tl + row, g * sizeof(float));
}

/* Divides by the sum and puts the result in place of the query; of a far row, hands on what there is. */
static void write_result(const sh_attention *a, const scratch *t, const piece *p, int position) {
    int g = a->group, hd = a->layer->head_dim;
    if (a->far) {
        write_partial(a, t, p, position);
        return;
    }
    float *out = place(a, p, position);
    for (int h = 0; h < g; h++) {
        int row = position * g + h;
        a->kn->scale(out + (size_t)h * (size_t)hd, t->to + (size_t)row * (size_t)hd, 1.0f / t->tl[row], hd);
    }
}

static void write_part(const sh_attention *a, const scratch *t, const piece *p, int position) {
    size_t g = (size_t)a->group, row = (size_t)position * g, R = (size_t)a->block_rows, D = (size_t)a->max_dim;
    size_t hd = (size_t)a->layer->head_dim;
    float *o = a->parts + (size_t)p->part * part_floats(a), *m = o + R * D, *l = m + R;
    if (t->n[position] == 0) {
        memset(l + row, 0, g * sizeof(float));
        return;
    }
    memcpy(o + row * hd, t->to + row * hd, g * hd * sizeof(float));
    memcpy(m + row, t->tm + row, g * sizeof(float));
    memcpy(l + row, t->tl + row, g * sizeof(float));
}

static void piece_run(const sh_attention *a, scratch *t, const piece *p) {
    int g = a->group, hd = a->layer->head_dim;
    size_t row_floats = (size_t)g * (size_t)hd;
    for (int i = 0; i < p->n; i++) {
        memcpy(t->q + (size_t)i * row_floats, query(a, p, i), row_floats * sizeof(float));
        t->n[i] = 0;
    }
    for (int seg = p->seg0; seg < p->seg1; seg++) {
        int p0, p1;
        segment_ranges(a, t, p, seg, &p0, &p1);
        if (p0 >= p1) continue;
        if (p1 - p0 == 1 && g <= FEW_ROWS && sh_kv_few(a->kn))
            segment_few(a, t, p, p0, seg);
        else
            segment_run(a, t, p, p0, p1);
        for (int i = p0; i < p1; i++)
            tree_add(a, t, i, 0, seg, t->o + (size_t)i * row_floats, t->m + i * g, t->l + i * g);
    }
    for (int i = 0; i < p->n; i++) {
        tree_close(a, t, i);
        if (p->part < 0)
            write_result(a, t, p, i);
        else
            write_part(a, t, p, i);
    }
}

static void joint_run(const sh_attention *a, scratch *t, const joint *j) {
    size_t g = (size_t)a->group, R = (size_t)a->block_rows, D = (size_t)a->max_dim, hd = (size_t)a->layer->head_dim;
    for (int i = 0; i < j->whole.n; i++) {
        t->n[i] = 0;
        size_t row = (size_t)i * g;
        for (int k = 0; k < j->n_parts; k++) {
            const float *o = a->parts + (size_t)(j->part + k) * part_floats(a), *m = o + R * D, *l = m + R;
            if (l[row] != 0) tree_add(a, t, i, j->level, j->index + k, o + row * hd, m + row, l + row);
        }
        tree_close(a, t, i);
        write_result(a, t, &j->whole, i);
    }
}

/* Joins what the members made for each row: blocks in order, wherever they come from. */
static void merge_run(const sh_attention *a, scratch *t, const piece *p) {
    const sh_span *s = p->rows->span;
    partial at = partial_of(a, p->kv_head);
    for (int i = 0; i < p->n; i++) {
        const float *const *from = a->partials + (size_t)row_of(p, i) * (size_t)a->members;
        int blocks = sh_owner_seen(p->rows->pos + p->first + i, s->level);
        t->n[i] = 0;
        for (int b = 0; b < blocks; b++) {
            const float *f = from[sh_owner_of(b, s->seq, a->members)];
            f += (size_t)(b / a->members) * SH_PARTIAL_FLOATS(a->layer);
            tree_add(a, t, i, s->level, b, f + at.o, f + at.m, f + at.l);
        }
        tree_close(a, t, i);
        write_result(a, t, p, i);
    }
}

/* --- sharing out ---------------------------------------------------------------------------------------------------
 */

static long piece_cost(const piece *p) {
    return (long)(p->seg1 - p->seg0) * p->n;
}

/* Splits a piece into aligned subtrees of about `target` cost; leaves it whole when parts run out. */
static void add_split(sh_attention *a, const piece *whole, long target) {
    long want = (target + whole->n - 1) / whole->n; /* segments per part */
    int level = 0;
    while ((1L << level) < want) level++;
    int index = whole->seg0 >> level, n = ((whole->seg1 - 1) >> level) - index + 1;
    if (n < 2 || a->n_parts + n > a->max_parts) {
        a->pieces[a->n_pieces++] = *whole;
        return;
    }
    a->joints[a->n_joints++] =
        (joint){.whole = *whole, .part = a->n_parts, .n_parts = n, .level = level, .index = index};
    for (int k = 0; k < n; k++) {
        piece p = *whole;
        p.seg0 = max_int(whole->seg0, (index + k) << level);
        p.seg1 = min_int(whole->seg1, (index + k + 1) << level);
        p.part = a->n_parts++;
        a->pieces[a->n_pieces++] = p;
    }
}

/* A block of rows over segments [seg0, seg1), for every KV head: returns the cost (target 0), or lists the pieces with
 * the long ones split. */
static long list_heads(sh_attention *a, piece p, long target) {
    for (p.kv_head = 0; target > 0 && p.kv_head < a->layer->kv_heads; p.kv_head++) {
        if (piece_cost(&p) > target)
            add_split(a, &p, target);
        else
            a->pieces[a->n_pieces++] = p;
    }
    return piece_cost(&p) * a->layer->kv_heads;
}

/* The same for each block of segments that is here and that the rows of p see. */
static long list_blocks(sh_attention *a, const piece *whole, long target) {
    const sh_span *s = whole->rows->span;
    int level = s->level, place = sh_owner_place(a->far->member, s->seq, a->far->members);
    long total = 0;
    for (int b = place; b << level < whole->seg1; b += a->far->members) {
        piece p = *whole;
        p.block = b / a->far->members;
        p.seg0 = b << level;
        p.seg1 = min_int(whole->seg1, (b + 1) << level);
        total += list_heads(a, p, target);
    }
    return total;
}

/* Calls for every block of rows: adds up costs (target 0), or lists pieces. */
static long list_pieces(sh_attention *a, const sh_attn_rows *spans, int n_spans, long target) {
    int positions = block_positions(a->group);
    long total = 0;
    for (int s = 0; s < n_spans; s++)
        for (int first = 0; first < spans[s].n; first += positions) {
            piece p = {.rows = &spans[s], .first = first, .n = min_int(positions, spans[s].n - first), .part = -1};
            int lo, hi, unused;
            visible(a->layer, spans[s].pos + first, &lo, &unused);
            visible(a->layer, spans[s].pos + first + p.n - 1, &unused, &hi);
            p.seg0 = lo / SH_SEGMENT_TOKENS;
            p.seg1 = (hi - 1) / SH_SEGMENT_TOKENS + 1;
            total += a->far ? list_blocks(a, &p, target) : list_heads(a, p, target);
        }
    return total;
}

static void run_pieces(void *arg, int member, int size) {
    sh_attention *a = arg;
    (void)size;
    for (int i; (i = atomic_fetch_add(&a->next, 1)) < a->n_pieces;) {
        piece_run(a, &a->scratch[member], &a->pieces[i]);
        sh_team_poll(a->team, member);
    }
}

static void run_joints(void *arg, int member, int size) {
    sh_attention *a = arg;
    (void)size;
    for (int i; (i = atomic_fetch_add(&a->next, 1)) < a->n_joints;) joint_run(a, &a->scratch[member], &a->joints[i]);
}

static void run_merges(void *arg, int member, int size) {
    sh_attention *a = arg;
    (void)size;
    for (int i; (i = atomic_fetch_add(&a->next, 1)) < a->n_pieces;) merge_run(a, &a->scratch[member], &a->pieces[i]);
}

static void begin_run(sh_attention *a, const sh_layer *l) {
    a->layer = l;
    a->group = l->heads / l->kv_heads;
    a->far = NULL;
    a->n_pieces = a->n_joints = a->n_parts = 0;
    atomic_store(&a->next, 0);
}

static void run_all(sh_attention *a, const sh_attn_rows *spans, int n_spans) {
    long total = list_pieces(a, spans, n_spans, 0);
    if (total == 0) return;
    list_pieces(a, spans, n_spans, a->threads > 1 ? total / (4L * a->threads) + 1 : total + 1);
    sh_team_run(a->team, run_pieces, a);
    atomic_store(&a->next, 0);
    if (a->n_parts * a->group <= JOIN_ALONE)
        run_joints(a, 0, 1);
    else
        sh_team_run(a->team, run_joints, a);
}

void sh_attention_run(sh_attention *a, const sh_kv_pool *kv, const sh_layer *l, const float *k_norm,
                      const sh_rope *rope, const sh_attn_rows *spans, int n_spans, float *q) {
    begin_run(a, l);
    a->kv = kv;
    a->k_norm = k_norm;
    a->rope = rope;
    a->q = q;
    run_all(a, spans, n_spans);
}

void sh_attention_partials(sh_attention *a, const sh_kv_pool *kv, const sh_layer *l, const float *k_norm,
                           const sh_rope *rope, const sh_attn_rows *spans, int n_spans, const sh_attn_far *far) {
    begin_run(a, l);
    a->kv = kv;
    a->k_norm = k_norm;
    a->rope = rope;
    a->far = far;
    run_all(a, spans, n_spans);
}

void sh_attention_merge(sh_attention *a, const sh_layer *l, const sh_attn_rows *spans, int n_spans, int members,
                        const float *const *partials, float *q) {
    begin_run(a, l);
    a->q = q;
    a->partials = partials;
    a->members = members;
    int positions = block_positions(a->group), rows = 0;
    for (int s = 0; s < n_spans; s++)
        for (int first = 0; first < spans[s].n; first += positions) {
            piece p = {.rows = &spans[s], .first = first, .n = min_int(positions, spans[s].n - first), .part = -1};
            for (p.kv_head = 0; p.kv_head < l->kv_heads; p.kv_head++) a->pieces[a->n_pieces++] = p;
            rows += p.n * l->heads;
        }
    if (rows <= JOIN_ALONE)
        run_merges(a, 0, 1);
    else
        sh_team_run(a->team, run_merges, a);
}

/* --- rows of a batch -----------------------------------------------------------------------------------------------
 */

int sh_attn_rows_of(const sh_batch *b, int lo, int hi, bool kept, sh_attn_rows *out) {
    int count = 0;
    for (int i = 0; i < b->n_spans; i++) {
        const sh_span *s = &b->spans[i];
        int begin = kept ? s->row0 + s->rows - s->keep : s->row0;
        int from = max_int(begin, lo), to = min_int(s->row0 + s->rows, hi);
        if (from >= to) continue;
        out[count++] = (sh_attn_rows){.span = s,
                                      .row = (kept ? s->kept0 : s->row0) + from - begin,
                                      .n = to - from,
                                      .pos = s->pos + from - s->row0};
    }
    return count;
}
