/* Attention by segments: against plain double arithmetic, against its definition as a tree bit by bit, and the same
 * bytes for any cut of the rows and any number of threads. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "model/attention.h"

#define CONTEXT 1200

typedef struct shape {
    int heads, kv_heads, dim, window;
    bool k_eq_v;
} shape;

static const shape shapes[] = {{8, 1, 32, 0, false},  {4, 2, 24, 100, false}, {4, 4, 17, 0, false},
                               {8, 2, 64, 0, true},   {6, 2, 40, 513, false}, {1, 1, 16, 1, false},
                               {80, 1, 8, 130, false}};
#define N_SHAPES (sizeof shapes / sizeof shapes[0])

typedef struct setup {
    sh_config c;
    sh_kv_pool *kv;
    sh_rope rope;
    float *k_norm, *k, *v; /* [dim], [CONTEXT, kv_heads, dim] as attention sees them */
    float *q;              /* [CONTEXT, heads, dim] */
    sh_span span;
    int32_t pages[CONTEXT / SH_PAGE_TOKENS + 1];
} setup;

static const sh_kernels *kn;
static sh_kv_type kv_type = SH_KV_F32; /* of the pools that open_setup makes */

static uint64_t state;
static float noise(void) { /* about −1 to 1 */
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(state >> 11) / 4503599627370496.0 - 1.0);
}

static float *noises(size_t n) {
    float *p = malloc(n * sizeof *p);
    if (!p) exit(1);
    for (size_t i = 0; i < n; i++) p[i] = noise();
    return p;
}

static void open_setup(setup *s, const shape *sh) {
    memset(s, 0, sizeof *s);
    state = 42;
    s->c = (sh_config){.n_layers = 1, .first_shared = 1};
    s->c.layer[0] = (sh_layer){.kind = SH_KV_GLOBAL,
                               .heads = sh->heads,
                               .kv_heads = sh->kv_heads,
                               .head_dim = sh->dim,
                               .rotated_pairs = sh->dim / 4,
                               .theta = 1e4,
                               .rope_factor = 1,
                               .window = sh->window,
                               .has_kv = true,
                               .k_eq_v = sh->k_eq_v};
    int32_t n = CONTEXT / SH_PAGE_TOKENS + 1, counts[SH_KV_KINDS] = {n, n};
    CU_ASSERT_FATAL(sh_kv_create(&s->c, kv_type, 0, 1, counts, &s->kv) == SH_OK);
    CU_ASSERT_FATAL(sh_rope_create(&s->c.layer[0], CONTEXT, &s->rope) == SH_OK);
    sh_rope_reach(&s->rope, kn, CONTEXT);
    for (int i = 0; i < n; i++) s->pages[i] = n - 1 - i;
    s->span = (sh_span){.seq = 1, .rows = CONTEXT, .n_pages = {n, n}, .pages = {s->pages, s->pages}};
    size_t row = (size_t)sh->kv_heads * (size_t)sh->dim;
    s->k_norm = noises((size_t)sh->dim);
    s->k = noises(CONTEXT * row);
    s->v = noises(CONTEXT * row);
    s->q = noises(CONTEXT * (size_t)sh->heads * (size_t)sh->dim);
    for (int p = 0; p < CONTEXT; p++) {
        float *k = s->k + (size_t)p * row, *v = s->v + (size_t)p * row;
        sh_kv_write(s->kv, kn, 0, &s->span, p, k, v);
        for (int h = 0; sh->k_eq_v && h < sh->kv_heads; h++) {
            for (int d = 0; d < sh->dim; d++) k[h * sh->dim + d] = v[h * sh->dim + d] * s->k_norm[d];
            sh_rope_apply(&s->rope, kn, k + h * sh->dim, p);
        }
    }
}

static void close_setup(setup *s) {
    sh_kv_destroy(&s->kv);
    sh_rope_release(&s->rope);
    free(s->k_norm);
    free(s->k);
    free(s->v);
    free(s->q);
}

/* Attention of positions [pos, pos+n), in chunks, by a team; out [n, heads·dim]. */
static void attend(const setup *s, int pos, int n, int chunk, int threads, float *out) {
    const sh_layer *l = &s->c.layer[0];
    size_t width = (size_t)l->heads * (size_t)l->head_dim;
    sh_team *team = NULL;
    sh_attention *a = NULL;
    CU_ASSERT_FATAL(sh_team_create(threads, NULL, 0, &team) == SH_OK);
    CU_ASSERT_FATAL(sh_attention_create(&s->c, 0, 1, chunk, 1, CONTEXT, team, kn, &a) == SH_OK);
    memcpy(out, s->q + (size_t)pos * width, (size_t)n * width * sizeof(float));
    for (int i = 0; i < n; i += chunk) {
        int rows = n - i < chunk ? n - i : chunk;
        sh_attn_rows r = {.span = &s->span, .row = i, .n = rows, .pos = pos + i};
        sh_attention_run(a, s->kv, l, s->k_norm, &s->rope, &r, 1, out);
    }
    sh_attention_destroy(&a);
    sh_attention_destroy(&a);
    sh_team_destroy(&team);
}

static void plain(const setup *s, int pos, int head, double *out) {
    const sh_layer *l = &s->c.layer[0];
    int hd = l->head_dim, g = head / (l->heads / l->kv_heads), from = l->window ? pos - l->window + 1 : 0;
    if (from < 0) from = 0;
    double sum = 0, max = -1e300, p[CONTEXT];
    const float *q = s->q + (size_t)(pos * l->heads + head) * (size_t)hd;
    for (int j = from; j <= pos; j++) {
        const float *k = s->k + (size_t)(j * l->kv_heads + g) * (size_t)hd;
        p[j] = 0;
        for (int d = 0; d < hd; d++) p[j] += (double)q[d] * k[d];
        max = fmax(max, p[j]);
    }
    for (int d = 0; d < hd; d++) out[d] = 0;
    for (int j = from; j <= pos; j++) {
        const float *v = s->v + (size_t)(j * l->kv_heads + g) * (size_t)hd;
        double e = exp(p[j] - max);
        sum += e;
        for (int d = 0; d < hd; d++) out[d] += e * v[d];
    }
    for (int d = 0; d < hd; d++) out[d] /= sum;
}

static void against_plain(void) {
    for (size_t i = 0; i < N_SHAPES; i++) {
        setup s;
        open_setup(&s, &shapes[i]);
        int hd = shapes[i].dim, heads = shapes[i].heads;
        float *out = malloc(CONTEXT * (size_t)(heads * hd) * sizeof *out);
        if (!out) exit(1);
        attend(&s, 0, CONTEXT, CONTEXT, 1, out);
        double worst = 0, want[64];
        for (int pos = 0; pos < CONTEXT; pos += pos < 140 ? 1 : 53)
            for (int h = 0; h<heads; h += heads> 8 ? 13 : 1) {
                plain(&s, pos, h, want);
                for (int d = 0; d < hd; d++)
                    worst = fmax(worst, fabs(want[d] - out[(size_t)(pos * heads + h) * (size_t)hd + (size_t)d]));
            }
        CU_ASSERT(worst < 5e-6);
        free(out);
        close_setup(&s);
    }
}

/* The definition: a node of the tree over segments, recursively; l = 0 is the empty one. */
typedef struct part {
    float m, l, o[64];
} part;

static part leaf(const setup *s, int pos, int head, int seg) {
    const sh_layer *l = &s->c.layer[0];
    part r = {0};
    int hd = l->head_dim, from = seg * SH_SEGMENT_TOKENS, to = from + SH_SEGMENT_TOKENS;
    if (l->window && pos - l->window + 1 > from) from = pos - l->window + 1;
    if (pos + 1 < to) to = pos + 1;
    if (from >= to) return r;
    float k[SH_SEGMENT_TOKENS * 64], v[SH_SEGMENT_TOKENS * 64], p[SH_SEGMENT_TOKENS];
    sh_kv_read(s->kv, kn, 0, &s->span, from, to - from, head / (l->heads / l->kv_heads), s->k_norm, &s->rope, k, v);
    const float *q = s->q + (size_t)(pos * l->heads + head) * (size_t)hd;
    kn->scores(p, SH_SEGMENT_TOKENS, q, (size_t)hd, 1, k, to - from, hd);
    kn->softmax_part(p, to - from, &r.m, &r.l);
    kn->weighted_sum(r.o, (size_t)hd, p, SH_SEGMENT_TOKENS, 1, v, to - from, hd);
    return r;
}

static part node(const setup *s, int pos, int head, int level, int index) {
    if (level == 0) return leaf(s, pos, head, index);
    part a = node(s, pos, head, level - 1, 2 * index), b = node(s, pos, head, level - 1, 2 * index + 1);
    if (a.l == 0) return b;
    if (b.l == 0) return a;
    kn->merge(a.o, &a.m, &a.l, b.o, b.m, b.l, s->c.layer[0].head_dim);
    return a;
}

static void is_the_tree(void) {
    for (size_t i = 0; i < N_SHAPES; i++) {
        setup s;
        open_setup(&s, &shapes[i]);
        int hd = shapes[i].dim, heads = shapes[i].heads, wrong = 0;
        float *out = malloc(CONTEXT * (size_t)(heads * hd) * sizeof *out), want[64];
        if (!out) exit(1);
        attend(&s, 0, CONTEXT, CONTEXT, 1, out);
        for (int pos = 0; pos < CONTEXT; pos += 37)
            for (int h = 0; h<heads; h += heads> 8 ? 29 : 1) {
                part p = node(&s, pos, h, 4, 0);
                kn->scale(want, p.o, 1.0f / p.l, hd);
                wrong += memcmp(want, out + (size_t)(pos * heads + h) * (size_t)hd, (size_t)hd * sizeof(float)) != 0;
            }
        CU_ASSERT_EQUAL(wrong, 0);
        free(out);
        close_setup(&s);
    }
}

static void same_bytes_of(const shape *sh) {
    static const struct {
        int pos, n, chunk, threads;
    } ways[] = {{0, CONTEXT, 7, 1}, {0, CONTEXT, 129, 2}, {1150, 50, 1, 3}, {1199, 1, 1, 2}, {640, 100, 100, 8}};
    setup s;
    open_setup(&s, sh);
    size_t width = (size_t)(sh->heads * sh->dim);
    float *base = malloc(CONTEXT * width * sizeof *base), *out = malloc(CONTEXT * width * sizeof *out);
    if (!base || !out) exit(1);
    attend(&s, 0, CONTEXT, CONTEXT, 1, base);
    for (size_t w = 0; w < sizeof ways / sizeof ways[0]; w++) {
        attend(&s, ways[w].pos, ways[w].n, ways[w].chunk, ways[w].threads, out);
        CU_ASSERT(memcmp(out, base + (size_t)ways[w].pos * width, (size_t)ways[w].n * width * sizeof *out) == 0);
    }
    free(base);
    free(out);
    close_setup(&s);
}

static void same_bytes(void) {
    for (size_t i = 0; i < N_SHAPES; i++) same_bytes_of(&shapes[i]);
}

/* The last row of all alone, straight from the pages, is what it is among many, whose keys and values are widened
 * first: in each type, with as many heads to a key as there are ways to take them, and at real widths. */
static void few_rows(void) {
    static const shape few[] = {{1, 1, 24, 0, false},  {2, 1, 256, 1024, false}, {3, 1, 40, 130, true},
                                {4, 1, 48, 0, false},  {7, 1, 33, 0, false},     {8, 1, 512, 0, false},
                                {16, 2, 512, 0, true}, {11, 1, 64, 200, false},  {16, 1, 17, 0, false}};
    for (kv_type = 0; kv_type < SH_KV_TYPES; kv_type++)
        for (size_t i = 0; i < sizeof few / sizeof few[0]; i++) {
            setup s;
            open_setup(&s, &few[i]);
            size_t width = (size_t)(few[i].heads * few[i].dim);
            float *base = malloc(50 * width * sizeof *base), *out = malloc(50 * width * sizeof *out);
            if (!base || !out) exit(1);
            attend(&s, CONTEXT - 50, 50, 50, 1, base);
            for (int threads = 1; threads < 4; threads++) {
                attend(&s, CONTEXT - 50, 50, 1, threads, out);
                CU_ASSERT(memcmp(out, base, 50 * width * sizeof *out) == 0);
            }
            free(base);
            free(out);
            close_setup(&s);
        }
    kv_type = SH_KV_F32;
}

/* Attention of positions [pos, CONTEXT) in two halves: partials of each member's blocks, all from one pool, then the
 * join. */
static void in_halves(const setup *s, int pos, int members, int level, int threads, float *out) {
    const sh_layer *l = &s->c.layer[0];
    size_t width = (size_t)l->heads * (size_t)l->head_dim, n = (size_t)(CONTEXT - pos), P = SH_PARTIAL_FLOATS(l);
    sh_team *team = NULL;
    sh_attention *a = NULL;
    CU_ASSERT_FATAL(sh_team_create(threads, NULL, 0, &team) == SH_OK);
    CU_ASSERT_FATAL(sh_attention_create(&s->c, 0, 1, (int)n, 1, CONTEXT, team, kn, &a) == SH_OK);
    const float **q = calloc(n, sizeof *q), **made = calloc(n * (size_t)members, sizeof *made);
    float **to = calloc(n, sizeof *to), *room = noises(n * SH_OWNER_BLOCKS * (size_t)members * P), *next = room;
    if (!q || !made || !to) exit(1);
    sh_span span = s->span;
    span.level = level;
    for (int m = 0; m < members; m++) {
        int place = sh_owner_place(m, span.seq, members), first = place * (SH_SEGMENT_TOKENS << level);
        int skip = first > pos ? first - pos : 0;
        if (skip >= (int)n) continue; /* no row sees a block of this member */
        for (size_t r = (size_t)skip; r < n; r++) {
            q[r] = s->q + ((size_t)pos + r) * width;
            to[r] = next;
            made[r * (size_t)members + (size_t)m] = next;
            next += P * (size_t)((sh_owner_seen(pos + (int)r, level) - place - 1) / members + 1);
        }
        sh_attn_rows rows = {.span = &span, .row = skip, .n = (int)n - skip, .pos = pos + skip};
        sh_attn_far far = {.members = members, .member = m, .q = q, .to = to};
        sh_attention_partials(a, s->kv, l, s->k_norm, &s->rope, &rows, 1, &far);
    }
    sh_attn_rows all = {.span = &span, .row = 0, .n = (int)n, .pos = pos};
    sh_attention_merge(a, l, &all, 1, members, made, out);
    sh_attention_destroy(&a);
    sh_team_destroy(&team);
    free(q);
    free(made);
    free(to);
    free(room);
}

/* The last rows at the widths of a global layer of 26B-A4B. */
static void halves_at_real_width(void) {
    static const shape real = {16, 2, 512, 0, true};
    setup s;
    open_setup(&s, &real);
    const int pos = 1150;
    size_t n = (size_t)(CONTEXT - pos) * 16 * 512;
    float *base = malloc(n * sizeof *base), *out = malloc(n * sizeof *out);
    if (!base || !out) exit(1);
    attend(&s, pos, CONTEXT - pos, CONTEXT - pos, 2, base);
    in_halves(&s, pos, 5, 0, 2, out);
    CU_ASSERT(memcmp(out, base, n * sizeof *out) == 0);
    in_halves(&s, pos, 4, 1, 1, out);
    CU_ASSERT(memcmp(out, base, n * sizeof *out) == 0);
    free(base);
    free(out);
    close_setup(&s);
}

static void halves_are_the_whole(void) {
    static const struct {
        int pos, members, level, threads;
    } ways[] = {{0, 1, 3, 1},    {0, 2, 2, 2},     {0, 3, 1, 1}, {1100, 3, 1, 2},
                {1199, 5, 0, 2}, {1199, 16, 0, 8}, {40, 2, 2, 3}};
    for (size_t i = 0; i < N_SHAPES; i++) {
        if (shapes[i].window) continue; /* sliding layers are not cut */
        setup s;
        open_setup(&s, &shapes[i]);
        size_t width = (size_t)(shapes[i].heads * shapes[i].dim);
        float *base = malloc(CONTEXT * width * sizeof *base), *out = malloc(CONTEXT * width * sizeof *out);
        if (!base || !out) exit(1);
        attend(&s, 0, CONTEXT, CONTEXT, 1, base);
        for (size_t w = 0; w < sizeof ways / sizeof ways[0]; w++) {
            in_halves(&s, ways[w].pos, ways[w].members, ways[w].level, ways[w].threads, out);
            size_t n = (size_t)(CONTEXT - ways[w].pos) * width;
            CU_ASSERT(memcmp(out, base + (size_t)ways[w].pos * width, n * sizeof *out) == 0);
        }
        free(base);
        free(out);
        close_setup(&s);
    }
}

/* Scores of thousands overflow nothing. */
static void large_scores(void) {
    setup s;
    open_setup(&s, &shapes[0]);
    size_t width = (size_t)(shapes[0].heads * shapes[0].dim);
    float *out = malloc(CONTEXT * width * sizeof *out);
    if (!out) exit(1);
    for (size_t i = 0; i < CONTEXT * width; i++) s.q[i] *= 1000;
    attend(&s, 0, CONTEXT, 64, 2, out);
    int bad = 0;
    for (size_t i = 0; i < CONTEXT * width; i++) bad += !(fabsf(out[i]) <= 1.0001f);
    CU_ASSERT_EQUAL(bad, 0);
    free(out);
    close_setup(&s);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("attention", NULL, NULL);
    if (sh_kernels_select(&kn) != SH_OK) return 1;
    CU_add_test(s, "against plain arithmetic", against_plain);
    CU_add_test(s, "is the tree of segments", is_the_tree);
    CU_add_test(s, "same bytes", same_bytes);
    CU_add_test(s, "few rows", few_rows);
    CU_add_test(s, "in two halves", halves_are_the_whole);
    CU_add_test(s, "in two halves, real widths", halves_at_real_width);
    CU_add_test(s, "large scores", large_scores);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
