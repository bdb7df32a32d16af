/*
 * Expert parallelism on the local link. First the exchange alone, with made-up experts: every placement, empty members,
 * messages that are not what they should be, bytes on the link. Then whole models: the members of a stage, each with
 * sequences of its own, must compute what one model computes alone, bit for bit.
 */
#include <pthread.h>

#include "common/hash.h"
#include "partition/placement.h"
#include "tests/golden/golden.h"
#include "worker/experts.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif

enum { MOST_MEMBERS = 8, LAYERS = 3, EXPERTS = 24, TOP_K = 3, HIDDEN = 10, PART = 40 };

static uint64_t rng(uint64_t *state) {
    return *state = sh_mix64(*state + 0x9e3779b97f4a7c15u);
}

/* --- the exchange alone --------------------------------------------------------------------------------------------
 */

/* Who holds what: holds[layer][member][expert]. */
typedef struct placed {
    bool holds[LAYERS][MOST_MEMBERS][EXPERTS];
} placed;

static bool placed_holds(const void *arg, int member, int layer, int expert) {
    return ((const placed *)arg)->holds[layer][member][expert];
}

static sh_config tiny_config(void) {
    sh_config c = {.hidden = HIDDEN, .n_layers = LAYERS, .experts = EXPERTS, .top_k = TOP_K, .expert_ff = 4};
    for (int i = 0; i < LAYERS; i++) c.layer[i] = (sh_layer){.moe = true, .kind = i % 2 ? SH_KV_GLOBAL : SH_KV_SLIDING};
    return c;
}

typedef struct mate {
    sh_link *link;
    sh_experts *experts;
    int members, member, exchanges, skew; /* skew: rows of 100 that choose expert 0 */
    sh_mode mode;
    uint64_t seed;
    pthread_t thread;
    /* what came of it */
    char why[300];
    long computed;     /* choices computed here */
    uint64_t expected; /* bytes of rows sent and of results that come back */
    const placed *place;
} mate;

/* A part under way: what was sent, and what each choice must give. */
typedef struct under_way {
    int n;
    uint8_t rows[PART * HIDDEN * 4];
    int32_t ids[PART * TOP_K];
    const void *answer[PART * TOP_K];
} under_way;

static size_t value_of(const mate *m) {
    return m->mode == SH_MODE_BF16 ? 2 : 4;
}

/* A made-up expert: each byte of the row, moved by the expert's number. */
static void made_up(const uint8_t *row, int expert, size_t bytes, uint8_t *out) {
    for (size_t i = 0; i < bytes; i++) out[i] = (uint8_t)(row[i] * 3 + expert * 7 + (int)i);
}

static size_t pad64(size_t n) {
    return (n + 63) / 64 * 64;
}

/* Bytes on the link for one part, where each expert has one holder: the formula of docs/decisions/0013. */
static uint64_t formula(const mate *m, int layer, const under_way *u) {
    uint64_t sum = 0;
    size_t row = HIDDEN * value_of(m);
    for (int d = 0; d < m->members; d++) {
        size_t rows = 0, choices = 0;
        for (int r = 0; d != m->member && r < u->n; r++) {
            size_t before = choices;
            for (int j = 0; j < TOP_K; j++) choices += m->place->holds[layer][d][u->ids[r * TOP_K + j]];
            rows += choices > before;
        }
        if (d != m->member) sum += pad64(32 + 4 * choices) + rows * row + 64 + choices * row;
    }
    return sum;
}

static void make_part(mate *m, under_way *u) {
    u->n = rng(&m->seed) % 3 == 0 ? 0 : (int)(rng(&m->seed) % (PART + 1));
    if (m->skew == 100) u->n = PART; /* as much as fits */
    for (size_t i = 0; i < sizeof u->rows; i++) u->rows[i] = (uint8_t)rng(&m->seed);
    for (int r = 0; r < u->n; r++) {
        int32_t *ids = u->ids + r * TOP_K;
        for (int j = 0; j < TOP_K; j++) {
            bool again = true;
            while (again) {
                bool hot = j == 0 && (int)(rng(&m->seed) % 100) < m->skew;
                ids[j] = hot ? 0 : (int32_t)(rng(&m->seed) % EXPERTS);
                again = false;
                for (int i = 0; i < j; i++) again = again || ids[i] == ids[j];
            }
        }
    }
    memset(u->answer, 0, sizeof u->answer);
}

static sh_status part_begin(mate *m, int slot, int layer, under_way *u) {
    const sh_expert_peers *p = sh_experts_peers(m->experts);
    make_part(m, u);
    m->expected += formula(m, layer, u);
    SH_TRY(p->begin(p->ctx, slot, layer, u->rows, u->ids, u->n, u->answer));
    for (int i = 0; i < u->n * TOP_K; i++) {
        bool here = m->place->holds[layer][m->member][u->ids[i]];
        if (here != (u->answer[i] == NULL)) SH_FAIL(SH_ESTATE, "choice %d: held %d, answered %d", i, here, !here);
        m->computed += here;
    }
    return SH_OK;
}

static sh_status part_compute(mate *m, int slot) {
    const sh_expert_peers *p = sh_experts_peers(m->experts);
    const sh_expert_guest *g = NULL;
    int n = 0;
    size_t row = HIDDEN * value_of(m);
    SH_TRY(p->guests(p->ctx, slot, &g, &n));
    if (n != m->members - 1) SH_FAIL(SH_ESTATE, "%d guests", n);
    for (int i = 0; i < n; i++) {
        for (int c = 0; c < g[i].n_choices; c++)
            made_up((const uint8_t *)g[i].rows + g[i].choice[c][0] * row, g[i].choice[c][1], row,
                    (uint8_t *)g[i].results + (size_t)c * row);
        m->computed += g[i].n_choices;
    }
    return p->reply(p->ctx, slot);
}

static sh_status part_end(mate *m, int slot, const under_way *u) {
    const sh_expert_peers *p = sh_experts_peers(m->experts);
    size_t row = HIDDEN * value_of(m);
    SH_TRY(p->end(p->ctx, slot));
    for (int i = 0; i < u->n * TOP_K; i++) {
        uint8_t want[HIDDEN * 4];
        if (!u->answer[i]) continue;
        made_up(u->rows + (size_t)(i / TOP_K) * row, u->ids[i], row, want);
        if (memcmp(want, u->answer[i], row) != 0) SH_FAIL(SH_ESTATE, "choice %d has another's result", i);
    }
    return SH_OK;
}

/* As gemma4.c does it, two parts under way or one. */
static sh_status exchange_all(mate *m) {
    static _Thread_local under_way u[SH_EXPERT_SLOTS];
    bool open[SH_EXPERT_SLOTS] = {0};
    for (int x = 0; x < m->exchanges; x++) {
        int slots = x % 3 == 2 ? 1 : SH_EXPERT_SLOTS, layer = x % LAYERS;
        for (int s = 0; s < slots; s++) {
            if (open[s]) SH_TRY(part_end(m, s, &u[s]));
            SH_TRY(part_begin(m, s, layer, &u[s]));
            open[s] = true;
        }
        for (int s = 0; s < slots; s++) SH_TRY(part_compute(m, s));
    }
    for (int s = 0; s < SH_EXPERT_SLOTS; s++)
        if (open[s]) SH_TRY(part_end(m, s, &u[s]));
    return SH_OK;
}

static void *mate_main(void *arg) {
    mate *m = arg;
    if (exchange_all(m) != SH_OK) snprintf(m->why, sizeof m->why, "%s", sh_error_text());
    while (!m->why[0] && !sh_experts_is_idle(m->experts)) sh_experts_peers(m->experts)->poll(m->experts);
    return NULL;
}

/* Runs it; loads [members] gets the choices that each member computed. */
static void exchange(const char *what, int members, sh_mode mode, const placed *place, int skew, bool single,
                     long *loads) {
    static const sh_config none;
    sh_config *c = must_alloc(sizeof *c);
    sh_link *link[MOST_MEMBERS];
    static mate m[MOST_MEMBERS];
    *c = none;
    *c = tiny_config();
    MUST(sh_link_local_create(members, link));
    for (int i = 0; i < members; i++) {
        m[i] = (mate){.link = link[i],
                      .members = members,
                      .member = i,
                      .exchanges = SANITIZED ? 12 : 60,
                      .skew = skew,
                      .mode = mode,
                      .seed = (uint64_t)(members * 100 + i),
                      .place = place};
        sh_experts_options o = {.link = link[i],
                                .members = members,
                                .member = i,
                                .config = c,
                                .last = LAYERS,
                                .mode = mode,
                                .max_rows = PART,
                                .holds = placed_holds,
                                .arg = place};
        MUST(sh_experts_create(&o, &m[i].experts));
    }
    for (int i = 0; i < members; i++)
        if (pthread_create(&m[i].thread, NULL, mate_main, &m[i]) != 0) exit(1);
    uint64_t sent = 0, expected = 0;
    for (int i = 0; i < members; i++) {
        pthread_join(m[i].thread, NULL);
        CHECK(!m[i].why[0], "%s, %d members: member %d: %s", what, members, i, m[i].why);
        sent += link[i]->sent_by_tag[SH_TAG_EXPERTS];
        expected += m[i].expected;
        if (loads) loads[i] = m[i].computed;
    }
    if (single)
        CHECK(sent == expected, "%s, %d members: %llu bytes on the link, %llu by the formula", what, members,
              (unsigned long long)sent, (unsigned long long)expected);
    for (int i = 0; i < members; i++) {
        sh_experts_destroy(&m[i].experts);
        sh_link_destroy(&link[i]);
    }
    free(c);
}

static void test_exchange(void) {
    static placed even, one, twice, all;
    for (int members = 2; members <= MOST_MEMBERS; members += members < 5 ? 1 : 3)
        for (int mode = SH_MODE_EXACT; mode <= SH_MODE_BF16; mode++) {
            memset(&even, 0, sizeof even), memset(&one, 0, sizeof one), memset(&twice, 0, sizeof twice);
            memset(&all, 1, sizeof all);
            for (int layer = 0; layer < LAYERS; layer++)
                for (int e = 0; e < EXPERTS; e++) {
                    int m = (e + layer) % members;
                    even.holds[layer][m][e] = twice.holds[layer][m][e] = true;
                    if (e % 2) twice.holds[layer][(m + 1 + e / 2 % (members - 1)) % members][e] = true;
                    one.holds[layer][layer % members][e] = true;
                }
            exchange("each expert once", members, (sh_mode)mode, &even, 20, true, NULL);
            exchange("some twice", members, (sh_mode)mode, &twice, 20, false, NULL);
            exchange("everything everywhere", members, (sh_mode)mode, &all, 20, false, NULL);
            exchange("all on one", members, (sh_mode)mode, &one, 100, true, NULL);
        }
}

/* --- messages that are not what they should be ---------------------------------------------------------------------
 */

typedef struct head { /* docs/protocol.md */
    uint32_t magic;
    uint16_t kind, value_bytes;
    uint64_t turn;
    int32_t layer, slot, rows, choices;
} head;

enum { ROW = HIDDEN * 4 };
typedef struct message {
    head h;
    uint16_t choice[8][2];
    uint8_t rows[4 * ROW];
} message;

/* Member 0 is asked for its guests after member 1 sent `bytes` of m on the channel. */
static void refuse(const char *what, const message *m, size_t bytes, int kind, const char *text) {
    static placed p;
    sh_link *link[2];
    sh_config *c = must_alloc(sizeof *c);
    sh_experts *e = NULL;
    *c = tiny_config();
    memset(&p, 0, sizeof p);
    for (int x = 0; x < EXPERTS; x++) p.holds[0][x % 2][x] = p.holds[1][x % 2][x] = p.holds[2][x % 2][x] = true;
    MUST(sh_link_local_create(2, link));
    sh_experts_options o = {.link = link[0],
                            .members = 2,
                            .config = c,
                            .last = LAYERS,
                            .mode = SH_MODE_EXACT,
                            .max_rows = 4,
                            .holds = placed_holds,
                            .arg = &p};
    MUST(sh_experts_create(&o, &e));
    const sh_expert_peers *t = sh_experts_peers(e);
    uint8_t rows[ROW] = {0};
    const void *answer[TOP_K] = {0};
    const sh_expert_guest *g;
    int n, req;
    MUST(link[1]->ops->send(link[1], 0, sh_link_channel(SH_TAG_EXPERTS, kind * SH_EXPERT_SLOTS), m, bytes, &req));
    sh_status st = t->begin(t->ctx, 0, 0, rows, (const int32_t[]){0, 1, 2}, 1, answer);
    if (st == SH_OK && kind == 0) st = t->guests(t->ctx, 0, &g, &n);
    if (text) {
        CHECK(st == SH_EPEER, "%s: status %d", what, st);
        CHECK(strstr(sh_error_text(), text) && strstr(sh_error_text(), "rank 1"), "%s: \"%s\"", what, sh_error_text());
    } else {
        CHECK(st == SH_OK, "%s: %s", what, sh_error_text());
    }
    sh_experts_destroy(&e);
    sh_link_destroy(&link[0]);
    sh_link_destroy(&link[1]);
    free(c);
}

static void test_malformed(void) {
    const message good = {.h = {0x31584853u, 0, 4, 0, 0, 0, 2, 3}, .choice = {{0, 0}, {1, 2}, {1, 4}}};
    size_t bytes = 64 + 2 * ROW;
    message m = good;
    refuse("a good message", &m, bytes, 0, NULL);
#define BAD(field, value, text)                                                                                        \
    m = good;                                                                                                          \
    m.field = value;                                                                                                   \
    refuse(#field " " #value, &m, bytes, 0, text)
    BAD(h.magic, 7, "magic 00000007");
    BAD(h.kind, 1, "kind 1");
    BAD(h.value_bytes, 2, "values of 2 bytes");
    BAD(h.turn, 5, "exchange 5");
    BAD(h.layer, 1, "layer 1");
    BAD(h.slot, 1, "slot 1");
    BAD(h.rows, 3, "3 rows");
    BAD(h.rows, -1, "-1 rows");
    BAD(h.rows, 0, "0 rows");
    BAD(h.choices, 1, "1 choices");
    BAD(h.choices, 1 << 30, "choices in");
    BAD(choice[0][1], 1, "expert 1, which member 0 does not hold");
    BAD(choice[0][1], EXPERTS, "does not hold");
    BAD(choice[0][0], 1, "row 1 after row -1");
    BAD(choice[2][0], 0, "row 0 after row 1");
    BAD(choice[2][0], 2, "row 2: there are 2");
    m = good;
    m.choice[1][0] = m.choice[2][0] = 0;
    refuse("a row that chose nothing", &m, bytes, 0, "1 rows of 2");
    m = good;
    refuse("short", &m, bytes - 1, 0, "in 143 bytes");
    refuse("shorter than a head", &m, 31, 0, "31 bytes");
    refuse("longer than the room", &m, 4096, 0, "4096 bytes");
    refuse("results of another length", &m, 64, 1, "64 bytes");
}

/* --- one expert takes half the rows --------------------------------------------------------------------------------
 */

/* Busiest member against the mean, with experts placed by their counts. */
static double busiest(int members, int extra, int skew, const uint64_t *counts) {
    static placed p;
    bool held[MOST_MEMBERS * EXPERTS];
    long loads[MOST_MEMBERS], sum = 0, most = 0;
    MUST(sh_placement_make(counts, EXPERTS, members, extra, held));
    memset(&p, 0, sizeof p);
    for (int layer = 0; layer < LAYERS; layer++) memcpy(p.holds[layer], held, (size_t)(members * EXPERTS));
    exchange("skewed", members, SH_MODE_BF16, &p, skew, false, loads);
    for (int i = 0; i < members; i++) {
        sum += loads[i];
        if (loads[i] > most) most = loads[i];
    }
    return (double)most * members / (double)sum;
}

static void test_skew(void) {
    for (int members = 2; members <= MOST_MEMBERS; members *= 2) {
        uint64_t counts[EXPERTS];
        /* Half of the rows choose expert 0 first; the other choices are spread. */
        for (int e = 0; e < EXPERTS; e++) counts[e] = e == 0 ? 500 : 2500 / (EXPERTS - 1);
        double without = busiest(members, 0, 50, counts),
               with = busiest(members, 1 + EXPERTS / members / 4, 50, counts);
        printf("one expert takes half the rows, %d members: busiest %.2f of the mean, with replicas %.2f\n", members,
               without, with);
        CHECK(with <= 1.25, "%d members: the busiest has %.2f of the mean with replicas", members, with);
    }
}

/* --- whole models --------------------------------------------------------------------------------------------------
 */

enum { N_SEQS = 7, CONTEXT = 320 };
static const int lengths[N_SEQS] = {1, 3, 150, 9, 40, 17, 64};

typedef struct layout {
    const char *what;
    int members, copies; /* of each expert, at least */
    int chunk, split_rows, threads;
    bool idle; /* the last member has no sequences */
} layout;

typedef struct stage {
    const char *dir;
    sh_mode mode;
    int32_t *ids[N_SEQS];
    float *hidden[N_SEQS]; /* [length, hidden]: of one model alone */
    sh_config c;
    const layout *l;
} stage;

typedef struct member {
    const stage *s;
    int index;
    sh_link *link;
    pthread_t thread;
    int wrong; /* rows that differ */
    sh_experts_times times;
} member;

static bool stage_holds(const void *arg, int m, int layer, int expert) {
    const layout *l = arg;
    int first = (expert * 5 + layer) % l->members;
    return (m - first + l->members) % l->members < l->copies;
}

static int home_of(const layout *l, int i) {
    return i % (l->idle ? l->members - 1 : l->members);
}

static void run_member(member *me, sh_experts *experts) {
    const stage *s = me->s;
    const layout *l = s->l;
    sh_peers peers = {.experts = sh_experts_peers(experts)};
    chain ch = chain_open(&(chain_options){.dir = s->dir,
                                           .mode = s->mode,
                                           .kv = s->mode == SH_MODE_EXACT ? SH_KV_F32 : SH_KV_BF16,
                                           .threads = l->threads,
                                           .max_rows = N_SEQS * l->chunk,
                                           .max_context = CONTEXT,
                                           .max_seqs = N_SEQS,
                                           .peers = &peers});
    seq q[N_SEQS];
    for (int i = 0; i < N_SEQS; i++) q[i] = seq_open(&ch, s->ids[i], lengths[i]);
    size_t H = (size_t)ch.c.hidden;
    for (int done = 0;; done += l->chunk) {
        int take[N_SEQS] = {0}, rows[MOST_MEMBERS] = {0}, all = 0;
        for (int i = 0; i < N_SEQS; i++) {
            int left = lengths[i] - done, n = left < 0 ? 0 : left < l->chunk ? left : l->chunk, home = home_of(l, i);
            rows[home] += n;
            all += n;
            if (home == me->index) take[i] = n;
        }
        if (all == 0) break;
        ch.widest_rows = 0;
        for (int m = 0; m < l->members; m++)
            if (rows[m] > ch.widest_rows) ch.widest_rows = rows[m];
        ch.widest_kept = ch.widest_rows;
        int kept = chain_step(&ch, q, N_SEQS, take, take), at = 0;
        for (int i = 0; i < N_SEQS; i++)
            for (int r = 0; r < take[i]; r++, at++)
                me->wrong += memcmp(ch.hidden + (size_t)at * H, s->hidden[i] + (size_t)(done + r) * H, H * 4) != 0;
        if (kept != rows[me->index]) me->wrong++;
    }
    while (!sh_experts_is_idle(experts)) peers.experts->poll(experts);
    for (int i = 0; i < N_SEQS; i++) seq_close(&q[i]);
    chain_close(&ch);
}

static void *member_main(void *arg) {
    member *me = arg;
    const layout *l = me->s->l;
    sh_experts *experts = NULL;
    sh_experts_options o = {.link = me->link,
                            .members = l->members,
                            .member = me->index,
                            .config = &me->s->c,
                            .last = me->s->c.n_layers,
                            .mode = me->s->mode,
                            .max_rows = N_SEQS * l->chunk,
                            .split_rows = l->split_rows,
                            .holds = stage_holds,
                            .arg = l};
    MUST(sh_experts_create(&o, &experts));
    run_member(me, experts);
    me->times = sh_experts_time(experts);
    sh_experts_destroy(&experts);
    return NULL;
}

static void run_alone(stage *s) {
    chain ch = chain_open(&(chain_options){.dir = s->dir,
                                           .mode = s->mode,
                                           .kv = s->mode == SH_MODE_EXACT ? SH_KV_F32 : SH_KV_BF16,
                                           .threads = 1,
                                           .max_rows = CONTEXT,
                                           .max_context = CONTEXT,
                                           .max_seqs = N_SEQS});
    for (int i = 0; i < N_SEQS; i++) {
        seq q = seq_open(&ch, s->ids[i], lengths[i]);
        chain_step(&ch, &q, 1, &lengths[i], &lengths[i]);
        size_t bytes = (size_t)lengths[i] * (size_t)ch.c.hidden * 4;
        s->hidden[i] = must_alloc(bytes);
        memcpy(s->hidden[i], ch.hidden, bytes);
        seq_close(&q);
    }
    chain_close(&ch);
}

static void run_layout(stage *s, const char *name, const layout *l) {
    sh_link *link[MOST_MEMBERS];
    member m[MOST_MEMBERS] = {0};
    double exposed = 0;
    s->l = l;
    MUST(sh_link_local_create(l->members, link));
    for (int i = 0; i < l->members; i++) {
        m[i] = (member){.s = s, .index = i, .link = link[i]};
        if (pthread_create(&m[i].thread, NULL, member_main, &m[i]) != 0) exit(1);
    }
    uint64_t sent = 0;
    for (int i = 0; i < l->members; i++) {
        pthread_join(m[i].thread, NULL);
        CHECK(m[i].wrong == 0, "%s, %d members, %s: member %d: %d rows differ", name, l->members, l->what, i,
              m[i].wrong);
        for (int k = 0; k < SH_KV_KINDS; k++) exposed += m[i].times.exposed[k] / l->members;
        sent += link[i]->sent_by_tag[SH_TAG_EXPERTS];
    }
    CHECK(sent > 0, "%s, %d members, %s: nothing was sent", name, l->members, l->what);
    printf("%-16s %-5s %d members, %-22s exposed %.3f s, %.2f MB\n", name, sh_mode_name(s->mode), l->members, l->what,
           exposed, (double)sent / 1e6);
    for (int i = 0; i < l->members; i++) sh_link_destroy(&link[i]);
}

static int32_t *golden_text(const char *name, bool odd, int *n) {
    if (!odd) {
        golden g = golden_open(name);
        int32_t *ids = golden_ids(json_object_get(json_object_get(g.info, "loglik"), "ids"), n);
        golden_close(&g);
        return ids;
    }
    char path[512];
    json_t *g = NULL;
    snprintf(path, sizeof path, "%s/odd/%s.json", SH_TEST_DATA, name);
    MUST(sh_json_read(path, (size_t)4 << 20, &g));
    int32_t *ids = golden_ids(json_object_get(g, "ids"), n);
    json_decref(g);
    return ids;
}

/* The model in dir; text [n] are ids to make sequences of. */
static void test_folder(const char *dir, const char *name, sh_mode mode, const int32_t *text, int n) {
    stage s = {.dir = dir, .mode = mode};
    MUST(sh_config_load(dir, &s.c));
    for (int i = 0; i < N_SEQS; i++) {
        s.ids[i] = must_alloc((size_t)lengths[i] * 4);
        for (int t = 0; t < lengths[i]; t++) s.ids[i][t] = text[(t * (i + 1) + 3 * i) % n];
    }
    run_alone(&s);
    static const layout layouts[] = {
        {"one part", 2, 1, 20, 100000, 1, false},    {"two parts", 2, 1, 20, 1, 1, false},
        {"two threads", 2, 1, 150, 1, 2, false},     {"three members", 3, 1, 1, 100000, 1, false},
        {"an idle member", 4, 1, 33, 2, 1, true},    {"experts twice", 4, 2, 64, 20, 1, false},
        {"an uneven share", 5, 1, 50, 30, 1, false}, {"many parts", 8, 1, 150, 1, 1, false},
        {"replicas, idle", 8, 3, 20, 60, 1, true},
    };
    for (size_t i = 0; i < sizeof layouts / sizeof layouts[0]; i++) {
        const layout *l = &layouts[i];
        if (l->members > s.c.experts || (SANITIZED && (i % 3 != 1 || l->threads > 1))) continue;
        run_layout(&s, name, l);
    }
    for (int i = 0; i < N_SEQS; i++) {
        free(s.ids[i]);
        free(s.hidden[i]);
    }
}

static void test_model(const char *name, bool odd, sh_mode mode) {
    char dir[512];
    int n;
    snprintf(dir, sizeof dir, "%s/%s/%s", SH_TEST_DATA, odd ? "odd" : "text/models", name);
    int32_t *text = golden_text(name, odd, &n);
    test_folder(dir, name, mode, text, n);
    free(text);
}

/* A checkpoint of make_shape: random ids. */
static void test_shape(const char *dir) {
    static int32_t text[1000];
    uint64_t seed = 5;
    for (int i = 0; i < 1000; i++) text[i] = (int32_t)(rng(&seed) % 30000);
    test_folder(dir, "real shape", SH_MODE_BF16, text, 1000);
}

/* With a folder: only that model. */
int main(int argc, char **argv) {
    if (argc > 1) {
        test_shape(argv[1]);
        return finish("experts");
    }
    test_malformed();
    test_exchange();
    test_skew();
    static const struct {
        const char *name;
        bool odd;
    } models[] = {{"26b-a4b-like", false}, {"26b-a4b-sharded", false}, {"one-expert", true}, {"all-experts", true}};
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++)
        for (int mode = SH_MODE_EXACT; mode <= SH_MODE_BF16; mode++)
            if (!SANITIZED || i == 0) test_model(models[i].name, models[i].odd, (sh_mode)mode);
    return finish("experts");
}
