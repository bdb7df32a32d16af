/*
 * Weights that ranks load together, on the local link: for every way of dividing a model and in every mode each rank
 * has the very bytes that it has when it loads alone, and all of them together read what one rank reads. What is wrong
 * with a checkpoint, or with one rank, is said on every rank, with the text that it has alone; nobody hangs.
 */
#include "tests/checkpoint.h"
#include "tests/cluster/fake.h"

#include <stdatomic.h>
#include "common/hash.h"
#include "model/weights_int.h"
#include "worker/load_link.h"

#define MODEL(name) SH_TEST_DATA "/text/models/" name

typedef struct layout {
    const char *what;
    int pp, ep, tp, cp, prefill;
    bool sum, hot; /* hot: the first experts are on all members */
} layout;

typedef struct group {
    const char *dir;
    sh_config config;
    sh_mode mode;
    bool hot;
    Shoal__Plan *plan;
    int elsewhere; /* this rank finds its checkpoint there; −1: none */
    const char *other_dir;
    /* what is done to a rank: before it gathers for the n-th time, which nobody leaves before it; and behind that */
    int victim;
    void (*before)(struct group *g, int gathered);
    void (*disturb)(struct group *g, int gathered);
    atomic_bool ended; /* the victim's alive check fails */
    /* the victim ends once it has sent a scalar, and the others take nothing until it is gone */
    bool silent;
    atomic_bool sent_scalar, gone;
} group;

typedef struct member {
    group *g;
    pthread_t thread;
    sh_link *link;
    int rank, gathered;
    sh_load_peers *real, table;
    sh_config config;
    sh_team *team;
    sh_weights *w;
    sh_status status;
    char error[1024];
} member;

static bool holds(const void *ctx, int layer, int expert) {
    const member *m = ctx;
    return sh_plan_holds(m->g->plan, m->rank, layer, expert) || (m->g->hot && expert < 3);
}

static sh_status gather(void *ctx, const void *mine, size_t n, void *all) {
    member *m = ctx;
    m->gathered++;
    if (m->rank == m->g->victim && m->g->before) m->g->before(m->g, m->gathered);
    SH_TRY(m->real->gather(m->real->ctx, mine, n, all));
    if (m->rank == m->g->victim && m->g->disturb) m->g->disturb(m->g, m->gathered);
    return SH_OK;
}

static sh_status is_alive(void *arg) {
    const member *m = arg;
    if (m->rank == m->g->victim && m->g->ended) SH_FAIL(SH_EPEER, "rank %d: nothing was heard", m->rank);
    return SH_OK;
}

/* The functions of the real table with the real context, gather between. */
static sh_status m_send(void *ctx, int to, const void *p, size_t n) {
    const member *m = ctx;
    group *g = m->g;
    SH_TRY(m->real->send(m->real->ctx, to, p, n));
    if (g->silent && m->rank == g->victim && n == sizeof(float)) g->sent_scalar = g->ended = true;
    return SH_OK;
}
static sh_status m_expect(void *ctx, int from, void *p, size_t n) {
    const member *m = ctx;
    return m->real->expect(m->real->ctx, from, p, n);
}
static sh_status m_poll(void *ctx) {
    member *m = ctx;
    const group *g = m->g;
    while (g->silent && m->rank != g->victim && !g->gone) sh_sleep(1e-3);
    sh_status st = m->real->poll(m->real->ctx);
    m->table.received = m->real->received;
    return st;
}
static sh_status m_finish(void *ctx) {
    member *m = ctx;
    sh_status st = m->real->finish(m->real->ctx);
    m->table.received = m->real->received;
    return st;
}
static bool m_stop(void *ctx, sh_status st) {
    const member *m = ctx;
    return m->real->stop(m->real->ctx, st);
}

static sh_status load(member *m, bool together) {
    const group *g = m->g;
    const Shoal__PlanRank *r = g->plan->rank[m->rank];
    sh_plan_rank_config(&g->config, g->plan, m->rank, &m->config);
    sh_weights_options o = {.mode = g->mode,
                            .share = sh_plan_share(g->plan, m->rank),
                            .first = r->first,
                            .last = r->last,
                            .peers = together ? &m->table : NULL};
    if (g->plan->ep > 1) o.held = (sh_held_experts){.holds = holds, .ctx = m};
    return sh_weights_load(m->rank == g->elsewhere ? g->other_dir : g->dir, &m->config, &o, m->team, &m->w);
}

static void *member_main(void *arg) {
    member *m = arg;
    const sh_alive alive = {is_alive, m};
    sh_load_link *x = NULL;
    m->status = sh_load_link_create(m->link, &alive, &x);
    if (m->status == SH_OK) {
        m->real = sh_load_link_peers(x);
        m->table = (sh_load_peers){m,      m->real->members, m->real->member, 0,        gather,
                                   m_send, m_expect,         m_poll,          m_finish, m_stop};
        m->status = load(m, true);
    }
    if (m->status != SH_OK) snprintf(m->error, sizeof m->error, "%s", sh_error_text());
    sh_load_link_destroy(&x);
    if (m->rank == m->g->victim) m->g->gone = true;
    return NULL;
}

static void open_group(group *g, const char *dir, const layout *y, sh_mode mode) {
    *g = (group){.dir = dir, .mode = mode, .hot = y->hot, .elsewhere = -1, .victim = -1};
    MUST(sh_config_load(dir, &g->config));
    sh_plan_request q = {
        .pp = y->pp, .ep = y->ep, .tp = y->tp, .cp = y->cp, .tp_sum = y->sum, .prefill = y->prefill, .mode = mode};
    MUST(sh_plan_make(&g->config, &q, &g->plan));
}

static void load_all(group *g, member *m) {
    sh_link *links[FAKE_RANKS];
    int n = (int)g->plan->n_rank;
    MUST(sh_link_local_create(n, links));
    for (int i = 0; i < n; i++) {
        m[i] = (member){.g = g, .rank = i, .link = links[i]};
#ifndef __SANITIZE_THREAD__ /* which does not know how OpenMP's threads wait for each other */
        if (i % 2) MUST(sh_team_create(1 + i % 3, NULL, 0, &m[i].team));
#endif
    }
    for (int i = 0; i < n; i++)
        if (pthread_create(&m[i].thread, NULL, member_main, &m[i])) exit(1);
    for (int i = 0; i < n; i++) pthread_join(m[i].thread, NULL);
}

static void close_all(group *g, member *m) {
    for (int i = 0; i < (int)g->plan->n_rank; i++) {
        sh_weights_destroy(&m[i].w);
        sh_team_destroy(&m[i].team);
        sh_link_destroy(&m[i].link);
    }
    sh_plan_free(&g->plan);
}

static bool same_weights(const sh_weights *a, const sh_weights *b) {
    const sh_weights_impl *x = a->impl, *y = b->impl;
    if (x->block_bytes != y->block_bytes || memcmp(x->block, y->block, x->block_bytes) != 0) return false;
    for (int i = 0; i < a->last - a->first; i++)
        if (memcmp(&a->layer[i].scalar, &b->layer[i].scalar, sizeof(float)) != 0) return false;
    return true;
}

/* Of a whole model on one rank. */
static uint64_t bytes_of_one(const char *dir, sh_mode mode) {
    sh_config c;
    sh_weights *w = NULL;
    MUST(sh_config_load(dir, &c));
    MUST(sh_weights_load(dir, &c, &(sh_weights_options){.mode = mode, .last = c.n_layers}, NULL, &w));
    uint64_t n = w->load.bytes;
    sh_weights_destroy(&w);
    return n;
}

static void compare(const char *dir, const layout *y, sh_mode mode) {
    group g;
    member m[FAKE_RANKS];
    open_group(&g, dir, y, mode);
    load_all(&g, m);
    uint64_t bytes = 0, alone = 0, received = 0, most = 0;
    int n = (int)g.plan->n_rank;
    for (int i = 0; i < n; i++) {
        CHECK(m[i].status == SH_OK, "%s %s: rank %d: %s", dir, y->what, i, m[i].error);
        if (m[i].status != SH_OK) continue;
        member one = {.g = &g, .rank = i};
        MUST(load(&one, false));
        CHECK(same_weights(m[i].w, one.w), "%s %s %s: weights of rank %d differ", dir, y->what, sh_mode_name(mode), i);
        CHECK(m[i].w->bytes == one.w->bytes, "%s %s: rank %d holds %zu bytes", dir, y->what, i, m[i].w->bytes);
        bytes += m[i].w->load.bytes;
        received += m[i].w->load.received;
        if (m[i].w->load.bytes > most) most = m[i].w->load.bytes;
        alone += one.w->load.bytes;
        sh_weights_destroy(&one.w);
    }
    uint64_t whole = bytes_of_one(dir, mode);
    CHECK(bytes == whole, "%s %s: %llu bytes were read, one rank reads %llu", dir, y->what, (unsigned long long)bytes,
          (unsigned long long)whole);
    CHECK((alone > whole) == (received > 0), "%s %s: %llu bytes were sent", dir, y->what, (unsigned long long)received);
    if (y->pp < 2 && !y->prefill) /* all need the same, or as much */
        CHECK(most < whole / (unsigned)n * 3 / 2, "%s %s: a rank reads %llu of %llu bytes", dir, y->what,
              (unsigned long long)most, (unsigned long long)whole);
    close_all(&g, m);
}

static void test_layouts(const char *dir, bool experts, bool some) {
    static const layout all[] = {{.what = "cp 2", .cp = 2},
                                 {.what = "tp 2", .tp = 2},
                                 {.what = "pp 2 prefill 1", .pp = 2, .prefill = 1},
                                 {.what = "tp 4", .tp = 4},
                                 {.what = "tp 2 sum", .tp = 2, .sum = true},
                                 {.what = "pp 3", .pp = 3},
                                 {.what = "pp 2 cp 3", .pp = 2, .cp = 3},
                                 {.what = "ep 2", .ep = 2},
                                 {.what = "pp 2 ep 2", .pp = 2, .ep = 2},
                                 {.what = "ep 5, hot experts", .ep = 5, .hot = true},
                                 {.what = "pp 3 prefill 2", .pp = 3, .prefill = 2}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if ((all[i].ep && !experts) || (some && i % 4 > 1)) continue;
        compare(dir, &all[i], some ? SH_MODE_BF16 : SH_MODE_Q4);
        if (!some) compare(dir, &all[i], i % 2 ? SH_MODE_BF16 : SH_MODE_Q8);
    }
}

/* ---- what goes wrong ------------------------------------------------------------------------------------------------
 */

static char dir[] = "/tmp/shoal-together-XXXXXX";
#define TENSOR "model.language_model.layers.3.mlp.down_proj"

/* The fixture with one tensor left out, or in F32 with a number that bf16 cannot hold. */
static void write_model(const char *from, bool drop) {
    sh_tensors *t = NULL;
    ck_file f = {0};
    char path[600];
    char *text = NULL;
    size_t len = 0;
    MUST(sh_tensors_open(from, &t));
    for (int i = 0; i < sh_tensors_count(t); i++) {
        const sh_tensor *x = sh_tensors_at(t, i);
        if (strcmp(x->name, TENSOR ".weight") != 0) {
            ck_add(&f, x->name, "BF16", x->rank, x->shape, x->data, x->bytes);
            continue;
        }
        if (drop) continue;
        float *wide = malloc(2 * x->bytes);
        for (size_t k = 0; k < x->bytes / 2; k++) wide[k] = 1;
        wide[x->bytes / 4 + 5] = 1 + 0x1p-20f;
        ck_add(&f, x->name, "F32", x->rank, x->shape, wide, 2 * x->bytes);
        free(wide);
    }
    ck_finish(&f, dir, "model.safetensors", 0);
    sh_tensors_close(&t);
    snprintf(path, sizeof path, "%s/config.json", from);
    MUST(sh_file_read(path, 1 << 20, &text, &len));
    ck_put(dir, "config.json", text, len);
    free(text);
}

/* All ranks fail with this status and text; the others than the culprit, if there is one (else −1), put its number in
 * front. */
static void fails(group *g, const char *what, int culprit, sh_status status, const char *text) {
    member m[FAKE_RANKS];
    double since = sh_now();
    load_all(g, m);
    for (int i = 0; i < (int)g->plan->n_rank; i++) {
        CHECK(m[i].status == status, "%s: rank %d ends with %d: %s", what, i, m[i].status, m[i].error);
        CHECK(strstr(m[i].error, text) != NULL, "%s: rank %d: %s: but: %s", what, i, m[i].error, text);
        if (culprit >= 0 && i != culprit) {
            char whose[32];
            int k = snprintf(whose, sizeof whose, "rank %d: ", culprit);
            CHECK(strncmp(m[i].error, whose, (size_t)k) == 0, "%s: rank %d: %s", what, i, m[i].error);
        }
        CHECK(!m[i].w, "%s: rank %d has weights", what, i);
    }
    CHECK(sh_now() - since < 60, "%s: %.1f s", what, sh_now() - since);
    close_all(g, m);
}

static void test_damaged(const char *from) {
    const layout four = {.what = "cp 4", .cp = 4}, ends = {.what = "pp 2 prefill 1", .pp = 2, .prefill = 1};
    for (int drop = 0; drop < 2; drop++)
        for (int y = 0; y < 2; y++) {
            char why[1024];
            group g;
            write_model(from, drop);
            open_group(&g, dir, y ? &ends : &four, SH_MODE_BF16);
            member one = {.g = &g, .rank = y ? 0 : 3};
            sh_status st = load(&one, false);
            CHECK(st != SH_OK, "a damaged checkpoint was loaded");
            snprintf(why, sizeof why, "%s", sh_error_text());
            CHECK(strstr(why, TENSOR) != NULL, "alone: %s", why);
            fails(&g, drop ? "a tensor is missing" : "a value cannot be held", -1, st, why);
        }
}

/* Between the check of the headers and the reading: a rank that reads already would end with a signal. */
static void cut_file(group *g, int gathered) {
    char path[600];
    snprintf(path, sizeof path, "%s/model.safetensors", g->dir);
    if (gathered == 2 && truncate(path, 40960) != 0) exit(1);
}

static void vanish(group *g, int gathered) {
    g->ended = gathered == 2;
}

static sh_status tell_other_files(void *ctx, const void *mine, size_t n, void *all) {
    member *m = ctx;
    uint8_t changed[2048];
    memcpy(changed, mine, n);
    if (m->rank == 1) changed[0] ^= 1; /* of the hash over the files */
    return m->real->gather(m->real->ctx, changed, n, all);
}

static void *other_files_main(void *arg) {
    member *m = arg;
    sh_load_link *x = NULL;
    MUST(sh_load_link_create(m->link, NULL, &x));
    m->real = sh_load_link_peers(x);
    m->table = *m->real;
    m->table.ctx = m;
    m->table.gather = tell_other_files;
    m->status = load(m, true);
    snprintf(m->error, sizeof m->error, "%s", sh_error_text());
    sh_load_link_destroy(&x);
    return NULL;
}

static void test_others_files(const char *from) {
    const layout two = {.what = "cp 2", .cp = 2};
    group g;
    member m[2];
    sh_link *links[2];
    open_group(&g, from, &two, SH_MODE_BF16);
    MUST(sh_link_local_create(2, links));
    for (int i = 0; i < 2; i++) {
        m[i] = (member){.g = &g, .rank = i, .link = links[i]};
        if (pthread_create(&m[i].thread, NULL, other_files_main, &m[i])) exit(1);
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(m[i].thread, NULL);
        CHECK(m[i].status == SH_EFORMAT && strstr(m[i].error, "finds other files there than member 0"),
              "other files: rank %d ends with %d: %s", i, m[i].status, m[i].error);
    }
    close_all(&g, m);
}

static void test_failing_rank(const char *from) {
    const layout three = {.what = "cp 3", .cp = 3};
    group g;
    write_model(from, false);
    open_group(&g, dir, &three, SH_MODE_Q4); /* rounds: the value is fine */
    g.victim = 1;
    g.before = cut_file;
    fails(&g, "the file is cut while it is read", -1, SH_EIO, "was it truncated?");
    open_group(&g, from, &three, SH_MODE_Q4);
    g.victim = 2;
    g.disturb = vanish;
    fails(&g, "a rank is lost", 2, SH_EPEER, "rank 2: nothing was heard");
}

/* What one rank finds in headers, and the others not. */
static void test_one_headers(const char *from) {
    const layout three = {.what = "cp 3", .cp = 3};
    for (int r = 0; r < 3; r++) {
        group g;
        write_model(from, true);
        open_group(&g, from, &three, SH_MODE_BF16);
        g.elsewhere = r;
        g.other_dir = dir;
        fails(&g, "a tensor is missing on one rank", r, SH_EFORMAT, "missing tensor " TENSOR);
    }
}

/* The others take what a rank sent when that has given up: bytes of a scalar of a layer among them. */
static void test_silent(const char *from) {
    const layout two = {.what = "cp 2", .cp = 2};
    group g;
    open_group(&g, from, &two, SH_MODE_Q4);
    g.victim = 0;
    g.silent = true;
    fails(&g, "a rank is silent", 0, SH_EPEER, "rank 0: nothing was heard");
    CHECK(g.sent_scalar, "a rank is silent: no scalar was under way");
}

int main(void) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
    const bool some = true;
#else
    const bool some = false;
#endif
    if (!mkdtemp(dir)) return 1;
    test_layouts(MODEL("26b-a4b-like"), true, some);
    if (!some) test_layouts(MODEL("e2b-like"), false, some);
    if (!some) test_layouts(MODEL("31b-like"), false, some);
    if (!some) test_layouts(MODEL("26b-a4b-sharded"), true, some);
    test_damaged(MODEL("e2b-like"));
    test_failing_rank(MODEL("31b-like"));
    test_others_files(MODEL("31b-like"));
    test_one_headers(MODEL("e2b-like"));
    test_silent(MODEL("26b-a4b-like"));
    SH_IGNORE(sh_path_remove(dir));
    printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
