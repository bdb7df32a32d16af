/*
 * Context parallelism in one process: the members of a stage as threads over the local link give the bytes of one model
 * alone, in hidden states, logits and KV, for any number of members, chunk, level of blocks, cut and number of threads,
 * with rows in prompts and decoded; what they send is, byte for byte, what docs/decisions/0016 says. With names of
 * checkpoints as arguments: only these.
 */
#include <pthread.h>
#include "common/clock.h"
#include "tests/golden/golden.h"
#include "model/spread.h"
#include "worker/context.h"

enum { N_SEQS = 5, DECODED = 5, MAX_MEMBERS = 4, MAX_CUTS = 1, GUARD = 64 };

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SLOW = 1, THREADS = 1 };
#else
enum { SLOW = 0, THREADS = 2 };
#endif

static int lengths[N_SEQS] = {1, 7, 131, 300, SLOW ? 650 : 1100};

/* How a run goes about the sequences. */
typedef struct way {
    int members, chunk, threads, cut; /* first layer of a second stage; 0: one stage */
    int level;                        /* above the one that fits */
    bool last_only;                   /* only last prompt rows are kept; the last tokens are decoded one by one */
} way;

typedef struct result {
    float *hidden, *logits; /* [n, …] of kept rows; others zero */
    bool *kept;
} result;

typedef struct fixture {
    const char *name;
    char dir[512];
    sh_config c;
    sh_mode mode;
    sh_kv_type kv;
    int32_t *ids[N_SEQS];
    seq alone_seq[N_SEQS];
    chain alone; /* keeps the KV to compare with */
    result base[N_SEQS];
} fixture;

/* One member: its part of every stage. */
typedef struct member {
    sh_model *model[MAX_CUTS + 1];
    sh_context *context[MAX_CUTS + 1];
    sh_peers peers[MAX_CUTS + 1];
    uint8_t *block;
    float *hidden;
    const struct group *group;
    char error[1200];
    sh_status status;
} member;

typedef struct group {
    const fixture *f;
    const way *w;
    int stages, first[MAX_CUTS + 2];
    sh_link *link[MAX_CUTS + 1][MAX_MEMBERS];
    member member[MAX_MEMBERS];
    sh_batch batch;
    int32_t n_pages, next[MAX_MEMBERS + 1]; /* of each owner's pool, then of the sliding kind */
    int32_t *pages[SH_KV_KINDS][N_SEQS];
    int done[N_SEQS], level[N_SEQS];
    uint64_t traffic; /* bytes that members should have sent each other */
} group;

static int total_rows(void) {
    int n = 0;
    for (int i = 0; i < N_SEQS; i++) n += lengths[i];
    return n;
}

/* --- a group -------------------------------------------------------------------------------------------------------
 */

static void open_member(group *g, int at) {
    const fixture *f = g->f;
    member *m = &g->member[at];
    int rows = total_rows(), context = 2048;
    m->group = g;
    for (int s = 0; s < g->stages; s++) {
        size_t bytes = sh_spread_message_bytes(&f->c, f->kv, g->first[s], g->first[s + 1], rows, g->w->members);
        MUST(sh_context_create(g->link[s][at], 0, g->w->members, bytes, &m->context[s]));
        m->peers[s].context = sh_context_table(m->context[s]);
        sh_model_options o = {.mode = f->mode,
                              .kv_type = f->kv,
                              .first = g->first[s],
                              .last = g->first[s + 1],
                              .threads = g->w->threads,
                              .max_rows = rows,
                              .max_spans = N_SEQS,
                              .max_context = context,
                              .pages = {g->n_pages, g->n_pages},
                              .peers = &m->peers[s]};
        MUST(sh_model_create(f->dir, &f->c, &o, &m->model[s]));
    }
    m->block = must_alloc(sh_model_cut_bytes(&f->c, f->kv, g->first[1], rows, rows) + GUARD);
    m->hidden = must_alloc((size_t)rows * (size_t)f->c.hidden * sizeof(float));
}

static int owner_of(const group *g, int i, int pos) {
    return sh_owner_of(sh_owner_seen(pos, g->level[i]) - 1, (uint64_t)i + 1, g->w->members);
}

static void open_group(group *g, const fixture *f, const way *w) {
    *g = (group){.f = f, .w = w, .stages = w->cut ? 2 : 1};
    g->first[1] = w->cut ? w->cut : f->c.n_layers;
    g->first[g->stages] = f->c.n_layers;
    for (int i = 0; i < N_SEQS; i++) g->n_pages += lengths[i] / SH_PAGE_TOKENS + 1;
    for (int s = 0; s < g->stages; s++) MUST(sh_link_local_create(w->members, g->link[s]));
    for (int m = 0; m < w->members; m++) open_member(g, m);
    g->batch.ids = must_alloc((size_t)total_rows() * sizeof(int32_t));
    g->batch.spans = must_alloc(N_SEQS * sizeof(sh_span));
    for (int i = 0; i < N_SEQS; i++) {
        int n = lengths[i] / SH_PAGE_TOKENS + 1;
        g->level[i] = sh_owner_level(lengths[i], w->members) + w->level;
        for (int k = 0; k < SH_KV_KINDS; k++) {
            g->pages[k][i] = must_alloc((size_t)n * sizeof(int32_t));
            for (int p = 0; p < n; p++) {
                int owner = owner_of(g, i, p * SH_PAGE_TOKENS);
                int32_t *next = &g->next[k == SH_KV_GLOBAL ? owner : MAX_MEMBERS];
                g->pages[k][i][p] = g->n_pages - 1 - (*next)++;
            }
        }
    }
}

static void close_group(group *g) {
    for (int m = 0; m < g->w->members; m++) {
        for (int s = 0; s < g->stages; s++) {
            while (!sh_context_is_idle(g->member[m].context[s])) MUST(sh_context_progress(g->member[m].context[s]));
            sh_model_destroy(&g->member[m].model[s]);
            sh_context_destroy(&g->member[m].context[s]);
        }
        free(g->member[m].block);
        free(g->member[m].hidden);
    }
    for (int s = 0; s < g->stages; s++)
        for (int m = 0; m < g->w->members; m++) sh_link_destroy(&g->link[s][m]);
    for (int i = 0; i < N_SEQS; i++)
        for (int k = 0; k < SH_KV_KINDS; k++) free(g->pages[k][i]);
    free(g->batch.ids);
    free(g->batch.spans);
}

/* --- a step --------------------------------------------------------------------------------------------------------
 */

static sh_status forward(member *m) {
    const group *g = m->group;
    if (g->stages == 1) return sh_model_forward(m->model[0], &g->batch, NULL, m->hidden);
    size_t bytes = sh_model_block_bytes(m->model[0], g->first[1], &g->batch);
    if (bytes != sh_model_block_bytes(m->model[1], g->first[1], &g->batch))
        SH_FAIL(SH_ESTATE, "the two ends of a cut disagree about its block");
    memset(m->block + bytes, 0xa5, GUARD);
    SH_TRY(sh_model_forward(m->model[0], &g->batch, NULL, m->block));
    for (int i = 0; i < GUARD; i++)
        if (m->block[bytes + (size_t)i] != 0xa5) SH_FAIL(SH_ESTATE, "a block is longer than it says");
    return sh_model_forward(m->model[1], &g->batch, m->block, m->hidden);
}

static void *member_run(void *arg) {
    member *m = arg;
    m->status = forward(m);
    if (m->status != SH_OK) snprintf(m->error, sizeof m->error, "%s\n%s", sh_error_text(), sh_error_trail());
    return NULL;
}

static void run_batch(group *g) {
    pthread_t t[MAX_MEMBERS];
    g->batch.step++;
    for (int m = 0; m < g->w->members; m++)
        if (pthread_create(&t[m], NULL, member_run, &g->member[m]) != 0) exit(1);
    for (int m = 0; m < g->w->members; m++) pthread_join(t[m], NULL);
    for (int m = 0; m < g->w->members; m++)
        if (g->member[m].status != SH_OK) {
            fprintf(stderr, "%s: member %d: %s\n", g->f->name, m, g->member[m].error);
            exit(1);
        }
}

static void add_span(group *g, int i, int rows, int keep) {
    sh_batch *b = &g->batch;
    sh_span *s = &b->spans[b->n_spans++];
    *s = (sh_span){.seq = (uint64_t)i + 1,
                   .pos = g->done[i],
                   .rows = rows,
                   .keep = keep,
                   .row0 = b->n_rows,
                   .kept0 = b->n_kept,
                   .level = g->level[i]};
    for (int k = 0; k < SH_KV_KINDS; k++) {
        s->n_pages[k] = (g->done[i] + rows - 1) / SH_PAGE_TOKENS + 1;
        s->pages[k] = g->pages[k][i];
    }
    memcpy(b->ids + b->n_rows, g->f->ids[i] + g->done[i], (size_t)rows * sizeof(int32_t));
    b->n_rows += rows;
    b->n_kept += keep;
    g->done[i] += rows;
}

static int next_rows(const way *w, int done, int n) {
    int prompt = w->last_only && n > DECODED ? n - DECODED : n;
    if (done >= prompt) return done < n ? 1 : 0;
    return w->chunk < prompt - done ? w->chunk : prompt - done;
}

static int next_keep(const way *w, int done, int n, int rows) {
    int prompt = n > DECODED ? n - DECODED : n;
    return !w->last_only ? rows : done + rows >= prompt ? 1 : 0;
}

/* --- traffic, counted row by row -----------------------------------------------------------------------------------
 */

/* What member `c` asks of member `d` in a layer, or in its answer. */
typedef struct asked {
    uint64_t kv, queries, partials;
} asked;

static asked count_rows(const group *g, int layer, int c, int d) {
    const sh_layer *l = &g->f->c.layer[layer];
    const sh_batch *b = &g->batch;
    int members = g->w->members, row = 0;
    asked a = {0};
    for (int i = 0; i < b->n_spans; i++)
        for (int k = 0; k < b->spans[i].rows; k++, row++) {
            const sh_span *s = &b->spans[i];
            bool kept = k >= s->rows - s->keep,
                 own = row >= b->n_rows * c / members && row < b->n_rows * (c + 1) / members;
            if (!own || (layer >= g->f->c.first_shared && !kept)) continue;
            int block = (s->pos + k) / (SH_SEGMENT_TOKENS << s->level), seen = 0;
            for (int x = 0; x <= block; x++) seen += ((uint64_t)x + s->seq) % (uint64_t)members == (uint64_t)d;
            a.kv += l->kind == SH_KV_SLIDING || ((uint64_t)block + s->seq) % (uint64_t)members == (uint64_t)d;
            a.queries += seen > 0;
            a.partials += (uint64_t)seen;
        }
    return a;
}

static uint64_t message(uint64_t bytes) {
    return bytes ? bytes + 64 : 0;
}

static void count_traffic(group *g) {
    const sh_config *c = &g->f->c;
    for (int j = 0; j < c->n_layers; j++)
        for (int m = 0; m < g->w->members * g->w->members; m++) {
            int from = m / g->w->members, to = m % g->w->members;
            const sh_layer *l = &c->layer[j];
            if (from == to) continue;
            asked a = count_rows(g, j, from, to);
            uint64_t heads = (uint64_t)l->heads, hd = (uint64_t)l->head_dim;
            uint64_t rows = l->has_kv ? (a.kv * sh_kv_row_bytes(c, g->f->kv, j) + 63) / 64 * 64 : 0;
            if (l->kind == SH_KV_GLOBAL) rows += a.queries * heads * hd * 4;
            g->traffic += message(rows);
            if (l->kind == SH_KV_GLOBAL) g->traffic += message(a.partials * heads * (hd + 2) * 4);
        }
    int row = 0, kept[MAX_MEMBERS] = {0};
    for (int i = 0; i < g->batch.n_spans; i++)
        for (int k = 0; k < g->batch.spans[i].rows; k++, row++)
            for (int m = 1; m < g->w->members; m++)
                kept[m] += row >= g->batch.n_rows * m / g->w->members &&
                           row < g->batch.n_rows * (m + 1) / g->w->members &&
                           k >= g->batch.spans[i].rows - g->batch.spans[i].keep;
    for (int m = 1; m < g->w->members; m++) g->traffic += message((uint64_t)kept[m] * (uint64_t)c->hidden * 4);
}

static void compare_traffic(const group *g) {
    uint64_t sent = 0;
    for (int s = 0; s < g->stages; s++)
        for (int m = 0; m < g->w->members; m++) sent += g->link[s][m]->sent_by_tag[SH_TAG_CONTEXT];
    CHECK(sent == g->traffic, "%s: %d members, chunk %d, cut %d: %llu bytes sent, %llu expected", g->f->name,
          g->w->members, g->w->chunk, g->w->cut, (unsigned long long)sent, (unsigned long long)g->traffic);
}

/* --- comparing -----------------------------------------------------------------------------------------------------
 */

static void compare_rows(const group *g, float *logits) {
    const fixture *f = g->f;
    const sh_batch *b = &g->batch;
    size_t H = (size_t)f->c.hidden, V = (size_t)f->c.vocab;
    const float *hidden = g->member[0].hidden;
    if (b->n_kept) sh_model_logits(g->member[0].model[g->stages - 1], hidden, b->n_kept, logits);
    for (int i = 0; i < b->n_spans; i++) {
        const sh_span *s = &b->spans[i];
        const result *r = &f->base[s->seq - 1];
        for (int k = 0; k < s->keep; k++) {
            size_t pos = (size_t)(s->pos + s->rows - s->keep + k), row = (size_t)(s->kept0 + k);
            CHECK(r->kept[pos] && !memcmp(hidden + row * H, r->hidden + pos * H, H * sizeof(float)) &&
                      !memcmp(logits + row * V, r->logits + pos * V, V * sizeof(float)),
                  "%s: %d members, chunk %d, level +%d, cut %d: sequence %d: row %zu differs", f->name, g->w->members,
                  g->w->chunk, g->w->level, g->w->cut, i, pos);
        }
    }
}

/* The KV bytes of one sequence in one layer, wherever they are stored; sliding ones are on every member. */
static void compare_kv(const group *g, int stage, int layer, int i) {
    const fixture *f = g->f;
    size_t row = sh_kv_row_bytes(&f->c, f->kv, layer);
    int n = lengths[i], wrong = 0, pages = n / SH_PAGE_TOKENS + 1;
    uint8_t *want = must_alloc(row), *got = must_alloc(row);
    const seq *a = &f->alone_seq[i];
    sh_span alone = {.rows = n, .n_pages = {a->n_pages, a->n_pages}, .pages = {a->pages, a->pages}};
    sh_span s = {.rows = n, .n_pages = {pages, pages}, .pages = {g->pages[0][i], g->pages[1][i]}};
    for (int m = 0; m < g->w->members; m++)
        for (int p = 0; p < n; p++) {
            bool global = f->c.layer[layer].kind == SH_KV_GLOBAL;
            if (global && owner_of(g, i, p) != m) continue;
            sh_kv_export(sh_model_kv(f->alone.stage[0]), layer, &alone, p, 1, want);
            sh_kv_export(sh_model_kv(g->member[m].model[stage]), layer, &s, p, 1, got);
            wrong += memcmp(want, got, row) != 0;
        }
    CHECK(wrong == 0, "%s: %d members, chunk %d: layer %d, sequence %d: %d KV rows differ", f->name, g->w->members,
          g->w->chunk, layer, i, wrong);
    free(want);
    free(got);
}

static void compare(const fixture *f, const way *w) {
    group g;
    open_group(&g, f, w);
    double start = sh_now();
    float *logits = must_alloc((size_t)total_rows() * (size_t)f->c.vocab * sizeof(float));
    for (;;) {
        g.batch.n_rows = g.batch.n_kept = g.batch.n_spans = 0;
        for (int i = 0; i < N_SEQS; i++) {
            int rows = next_rows(w, g.done[i], lengths[i]);
            if (rows > 0) add_span(&g, i, rows, next_keep(w, g.done[i], lengths[i], rows));
        }
        if (g.batch.n_rows == 0) break;
        run_batch(&g);
        count_traffic(&g);
        compare_rows(&g, logits);
    }
    compare_traffic(&g);
    for (int s = 0; s < g.stages; s++)
        for (int j = 0; j < f->c.n_layers; j++)
            for (int i = 0; i < N_SEQS; i++)
                if (sh_kv_holds(sh_model_kv(g.member[0].model[s]), j)) compare_kv(&g, s, j, i);
    printf("%-16s %d members, chunk %4d, level +%d, cut %2d, %d threads%s %5.2f s\n", f->name, w->members, w->chunk,
           w->level, w->cut, w->threads, w->last_only ? ", decoded" : "", sh_now() - start);
    fflush(stdout);
    free(logits);
    close_group(&g);
}

/* A level that makes more blocks than there is room for is refused before anything is sent. */
static void refuse_level(const fixture *f) {
    const way w = {.members = 2, .chunk = 2048, .threads = 1};
    group g;
    open_group(&g, f, &w);
    g.level[4] = 0;
    add_span(&g, 4, 600, 1);
    for (int m = 0; m < 2; m++) {
        sh_status st = forward(&g.member[m]);
        CHECK(st == SH_EFORMAT && strstr(sh_error_text(), "level 0 makes 5 blocks of 600 positions: at most 4"),
              "member %d: a level that is too fine: %d: %s", m, st, sh_error_text());
        CHECK(g.link[0][m]->sent_bytes == 0, "member %d sent something all the same", m);
    }
    close_group(&g);
}

/* --- one model alone -----------------------------------------------------------------------------------------------
 */

static void run_alone(fixture *f) {
    chain *ch = &f->alone;
    *ch = chain_open(&(chain_options){.dir = f->dir,
                                      .mode = f->mode,
                                      .kv = f->kv,
                                      .threads = THREADS,
                                      .max_rows = total_rows(),
                                      .max_context = 2048,
                                      .max_seqs = N_SEQS});
    size_t H = (size_t)f->c.hidden, V = (size_t)f->c.vocab, row = 0;
    for (int i = 0; i < N_SEQS; i++) f->alone_seq[i] = seq_open(ch, f->ids[i], lengths[i]);
    int kept = chain_step(ch, f->alone_seq, N_SEQS, lengths, lengths);
    float *logits = must_alloc((size_t)kept * V * sizeof(float));
    sh_model_logits(chain_last(ch), ch->hidden, kept, logits);
    for (int i = 0; i < N_SEQS; row += (size_t)lengths[i++]) {
        size_t n = (size_t)lengths[i];
        f->base[i] = (result){must_alloc(n * H * sizeof(float)), must_alloc(n * V * sizeof(float)), must_alloc(n)};
        memcpy(f->base[i].hidden, ch->hidden + row * H, n * H * sizeof(float));
        memcpy(f->base[i].logits, logits + row * V, n * V * sizeof(float));
        memset(f->base[i].kept, 1, n);
    }
    free(logits);
}

static void check_fixture(const char *name, bool odd, sh_mode mode, sh_kv_type kv) {
    fixture f = {.name = name, .mode = mode, .kv = kv};
    snprintf(f.dir, sizeof f.dir, "%s/%s/%s", SH_TEST_DATA, odd ? "odd" : "text/models", name);
    MUST(sh_config_load(f.dir, &f.c));
    for (int i = 0; i < N_SEQS; i++) {
        f.ids[i] = must_alloc((size_t)lengths[i] * sizeof(int32_t));
        for (int t = 0; t < lengths[i]; t++) f.ids[i][t] = 5 + (t * (i + 3) * 7 + t * t + i) % (f.c.vocab / 2);
    }
    run_alone(&f);
    int L = f.c.n_layers;
    compare(&f, &(way){.members = 4, .chunk = 2048, .threads = THREADS, .last_only = true});
    if (!SLOW) compare(&f, &(way){.members = 2, .chunk = 64, .threads = 1});
    if (!odd) refuse_level(&f);
    if (!SLOW && mode == SH_MODE_BF16) { /* sharing out does not look at the mode */
        compare(&f, &(way){.members = 3, .chunk = 7, .threads = 1, .last_only = true});
        compare(&f, &(way){.members = 2, .chunk = 100, .threads = 1, .level = 1});
        if (L > 1) compare(&f, &(way){.members = 2, .chunk = 64, .threads = 1, .cut = L / 2, .last_only = true});
        if (L > 1) compare(&f, &(way){.members = 3, .chunk = 64, .threads = 1, .cut = L - 1});
        bool one = !odd && f.c.first_shared < L; /* a long run: for one model */
        if (one) compare(&f, &(way){.members = 4, .chunk = 1, .threads = 1, .last_only = true});
    }
    for (int i = 0; i < N_SEQS; i++) {
        free(f.ids[i]);
        free(f.base[i].hidden);
        free(f.base[i].logits);
        free(f.base[i].kept);
        seq_close(&f.alone_seq[i]);
    }
    chain_close(&f.alone);
}

static bool wanted(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], name) == 0) return true;
    return argc < 2;
}

int main(int argc, char **argv) {
#ifdef __SANITIZE_THREAD__
    check_fixture(fixtures[0], false, SH_MODE_BF16, SH_KV_BF16); /* threads meet alike in all of them */
    return finish("context");
#endif
    for (int i = 0; i < N_FIXTURES; i++)
        for (int exact = 0; exact < 2; exact++)
            if (wanted(fixtures[i], argc, argv))
                check_fixture(fixtures[i], false, exact ? SH_MODE_EXACT : SH_MODE_BF16, exact ? SH_KV_F32 : SH_KV_BF16);
    if (wanted(fixtures[0], argc, argv)) check_fixture(fixtures[0], false, SH_MODE_EXACT, SH_KV_Q8);
    for (int i = 0; i < N_ODD; i++)
        if (wanted(odd_fixtures[i], argc, argv))
            check_fixture(odd_fixtures[i], true, i % 2 ? SH_MODE_EXACT : SH_MODE_BF16, i % 2 ? SH_KV_F32 : SH_KV_BF16);
    return finish("context");
}
