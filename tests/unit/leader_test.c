/*
 * The scheduler against a model of the stages that remembers what every KV page holds: random requests, pools, windows
 * and depths, with and without a prefill pipeline, whose rows arrive late, out of step with decode, and sometimes
 * damaged, with and without requests that begin alike and share pages. Each row must find every position that it may
 * see in the pages that its span names, made from the very tokens that come before it, every sequence must end, the
 * pool is never exceeded, nobody is overtaken for ever, and the last stage must know every sequence it samples.
 */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>
#include "common/hash.h"
#include "worker/prefill.h"

enum {
    VOCAB = 1000,
    PLACEHOLDER = 999,
    MAX_SEQS = 4000,
    MAX_LEN = 700,
    MAX_PAGES = 400,
    MAX_DEPTH = 16,
    MAX_KNOWN = 64,
    MAX_MEMBERS = 4
};

typedef struct request {
    int n_prompt, max_tokens, stop_after; /* ends after stop_after tokens */
    int given;                            /* generated in an earlier life */
    bool score, cancelled;
    int got, scores;
    bool finished;
} request;

typedef struct answer {
    uint64_t step;
    int n;
    sh_token *t;
} answer;

/* For each member, page and slot what was written last: a hash of the tokens up to that position, and of whose they are
 * where a placeholder is among them. Sliding pages are the same on all members. */
typedef uint64_t memory[SH_KV_KINDS][MAX_MEMBERS][MAX_PAGES][SH_PAGE_TOKENS];

/* Micro-batches on their way, as bytes. */
typedef struct line {
    sh_buf bytes[2 * MAX_DEPTH];
    int head, n;
} line;

typedef struct world {
    sh_leader_options o;
    sh_leader *leader;
    sh_batch batch, decode;
    request r[MAX_SEQS];
    int n;
    memory slot, made; /* what a decode stage holds, and what a prefill stage holds */
    sh_buf encoded;
    int32_t level[MAX_SEQS]; /* of each request, plus 1 */
    /* what the last stage's sampler knows */
    struct {
        uint64_t id, key;
        int n_tokens, n_prompt;
    } known[MAX_KNOWN];
    int n_known;
    answer queue[MAX_DEPTH];
    int head, count;
    line to_stages, to_prefill, to_import; /* the last: prefill steps whose rows were made */
    int said;                              /* ranks that have confirmed the first of those */
    uint64_t decoded;                      /* last step that the stages have done */
    int damage, damaged, handed;           /* one confirmation in `damage` is bad; how many were; rows handed over */
    int families;                          /* requests of one begin alike; 0: all differ */
    int held_most, steps, wide;
    uint64_t step, rows, schedule; /* rows computed; hash of all spans */
} world;

static uint64_t rng;
static int draw(int n) {
    rng = sh_mix64(rng);
    return (int)(rng % (uint64_t)n);
}

/* Tokens of a request and, for each, a hash of all up to it. */
typedef struct text {
    int32_t *token;
    uint64_t *upto;
} text;
static text texts[MAX_SEQS];

static int32_t plain_token(uint64_t key, int place) {
    return (int32_t)(sh_mix64(key * 7919 + (uint64_t)place) % (VOCAB - 1));
}

static int32_t token_of(uint64_t key, int place) {
    return texts[key - 100].token[place];
}

/* A text that begins like others of its family, goes on like some of those, and ends like none; sometimes with a
 * picture. */
static void write_text(uint64_t key, int families, int total) {
    text *t = &texts[key - 100];
    int family = families ? draw(families) : 0, part = draw(3), most = (int)(sh_mix64((uint64_t)family) % 400);
    int common = families ? draw(4) ? most : draw(most + 1) : 0, second = families && draw(2) ? common + draw(150) : 0;
    int picture = families && draw(6) == 0 ? draw(total) : -1;
    uint64_t hash = 1;
    t->token = realloc(t->token, (size_t)total * sizeof *t->token);
    t->upto = realloc(t->upto, (size_t)total * sizeof *t->upto);
    for (int i = 0; i < total; i++) {
        uint64_t from = i < common ? 5000 + (uint64_t)family : i < second ? 6000 + (uint64_t)(3 * family + part) : key;
        bool same = i < common && family % 3 == 0; /* page after page: told apart by what is before them */
        t->token[i] = i == picture ? PLACEHOLDER : plain_token(from, same ? i % SH_PAGE_TOKENS : i);
        hash = sh_mix64(hash * 31 + (uint64_t)t->token[i]);
        if (i == picture) hash = sh_mix64(hash + key);
        t->upto[i] = hash;
    }
}

static bool ok; /* one assertion per run keeps CUnit's list short */
#define MUST(x)                                                                                                        \
    do {                                                                                                               \
        if (!(x) && ok) {                                                                                              \
            ok = false;                                                                                                \
            fprintf(stderr, "leader_test: line %d: %s\n", __LINE__, #x);                                               \
        }                                                                                                              \
    } while (0)

static uint64_t key_of_id(const world *w, uint64_t id) { /* ids are given in the order of arrival; keys too, from 100 */
    (void)w;
    return id + 99;
}

/* The member that stores a position. */
static int member_of(const world *w, const sh_span *s, int k, int pos) {
    return k == SH_KV_GLOBAL && w->o.members > 1 ? sh_owner_of(sh_owner_seen(pos, s->level) - 1, s->seq, w->o.members)
                                                 : 0;
}

/* Blocks are few enough, and stay where they are. */
static void check_level(world *w, const sh_span *s) {
    int32_t *level = &w->level[key_of_id(w, s->seq) - 100];
    MUST(*level == 0 || *level == s->level + 1);
    MUST(w->o.members < 2 ? s->level == 0
                          : sh_owner_seen(s->pos + s->rows - 1, s->level) <= SH_OWNER_BLOCKS * w->o.members);
    *level = s->level + 1;
}

/* Runs one span as a stage would: writes its rows, then looks for everything that they see. */
static void run_span(world *w, memory at, const int32_t *pages, const sh_batch *b, const sh_span *s) {
    uint64_t key = key_of_id(w, s->seq);
    for (int k = 0; k < SH_KV_KINDS; k++) {
        if (!w->o.kind[k]) {
            MUST(s->n_pages[k] == 0);
            continue;
        }
        for (int i = 0; i < s->rows; i++) {
            int pos = s->pos + i, page = pos / SH_PAGE_TOKENS - s->page0[k];
            MUST(page >= 0 && page < s->n_pages[k]);
            if (!ok) return;
            int32_t pool = s->pages[k][page];
            MUST(pool >= 0 && pool < pages[k]);
            if (!ok) return;
            at[k][member_of(w, s, k, pos)][pool][pos % SH_PAGE_TOKENS] = texts[key - 100].upto[pos];
        }
    }
    for (int i = 0; i < s->rows; i++) MUST(b->ids[s->row0 + i] == token_of(key, s->pos + i));
}

static void see_span(const world *w, memory at, const sh_span *s) {
    uint64_t key = key_of_id(w, s->seq);
    for (int k = 0; k < SH_KV_KINDS; k++) {
        if (!w->o.kind[k]) continue;
        int from = k == SH_KV_SLIDING && s->pos - w->o.window + 1 > 0 ? s->pos - w->o.window + 1 : 0;
        for (int pos = from, n; pos < s->pos + s->rows; pos += n) { /* what of a page it sees */
            int page = pos / SH_PAGE_TOKENS - s->page0[k], slot = pos % SH_PAGE_TOKENS;
            n = SH_PAGE_TOKENS - slot;
            if (n > s->pos + s->rows - pos) n = s->pos + s->rows - pos;
            MUST(page >= 0 && page < s->n_pages[k]);
            if (!ok) return;
            const uint64_t *there = at[k][member_of(w, s, k, pos)][s->pages[k][page]] + slot;
            MUST(memcmp(there, texts[key - 100].upto + pos, (size_t)n * sizeof *there) == 0);
        }
    }
}

static int find_known(const world *w, uint64_t id) {
    for (int i = 0; i < w->n_known; i++)
        if (w->known[i].id == id) return i;
    return -1;
}

static void sampler_news(world *w, const sh_batch *b) {
    for (int i = 0; i < b->n_drops; i++) {
        int at = find_known(w, b->drops[i]);
        MUST(at >= 0);
        if (at >= 0) w->known[at] = w->known[--w->n_known];
    }
    for (int i = 0; i < b->n_starts; i++) {
        const sh_seq_start *s = &b->starts[i];
        MUST(find_known(w, s->seq) < 0 && w->n_known < w->o.max_seqs);
        if (!ok) return;
        w->known[w->n_known].id = s->seq;
        w->known[w->n_known].key = key_of_id(w, s->seq);
        w->known[w->n_known].n_tokens = s->n_tokens;
        w->known[w->n_known++].n_prompt = s->n_prompt;
        for (int j = 0; j < s->n_tokens; j++) MUST(s->tokens[j] == token_of(key_of_id(w, s->seq), j));
    }
}

/* What sh_sampler_step would give for the kept rows. */
static void sample_span(world *w, const sh_span *s, answer *a) {
    uint64_t key = key_of_id(w, s->seq);
    request *r = &w->r[key - 100];
    for (int i = s->rows - s->keep; i < s->rows; i++) {
        int pos = s->pos + i, at = find_known(w, s->seq);
        MUST(at >= 0);
        if (at < 0) return;
        if (pos < w->known[at].n_tokens - 1) {
            if (r->score && pos + 1 < r->n_prompt)
                a->t[a->n++] = (sh_token){.seq = s->seq, .index = pos + 1, .score = true, .text_len = -1};
            continue;
        }
        int place = w->known[at].n_tokens - r->n_prompt;
        bool last = place + 1 == r->stop_after || place + 1 == r->max_tokens;
        a->t[a->n++] = (sh_token){.seq = s->seq,
                                  .index = place,
                                  .id = token_of(key, r->n_prompt + place),
                                  .finish = last ? SH_FINISH_STOP : SH_FINISH_NONE,
                                  .text_len = -1};
        w->known[at].n_tokens++;
    }
}

static void run_batch(world *w, const sh_batch *b) {
    int rows = 0, kept = 0, decodes = 0;
    sampler_news(w, b);
    MUST(b->step == w->decoded + 1);
    w->decoded = b->step;
    answer *a = &w->queue[(w->head + w->count++) % MAX_DEPTH];
    *a = (answer){.step = b->step, .t = calloc((size_t)b->n_kept + 1, sizeof *a->t)};
    MUST(b->n_spans <= w->o.max_seqs && b->n_rows <= sh_leader_max_rows(&w->o));
    for (int i = 0; i < b->n_spans && ok; i++) {
        const sh_span *s = &b->spans[i];
        MUST(s->rows >= 1 && s->keep >= 0 && s->keep <= s->rows && s->row0 == rows && s->kept0 == kept);
        for (int j = 0; j < i; j++) MUST(b->spans[j].seq != s->seq);
        rows += s->rows;
        kept += s->keep;
        w->schedule = sh_mix64(w->schedule * 31 + s->seq) + (uint64_t)s->pos * 1000003 + (uint64_t)s->rows;
        decodes += s->rows == 1;
        check_level(w, s);
        run_span(w, w->slot, w->o.pages, b, s);
    }
    for (int i = 0; i < b->n_spans && ok; i++)
        see_span(w, w->slot, &b->spans[i]); /* after all writes, as the layers do */
    for (int i = 0; i < b->n_spans && ok; i++) sample_span(w, &b->spans[i], a);
    MUST(rows == b->n_rows && kept == b->n_kept);
    w->rows += (uint64_t)rows;
    w->schedule = sh_mix64(w->schedule);
    sh_buf_clear(&w->encoded);
    MUST(sh_batch_encode(b, &w->encoded) == SH_OK && w->encoded.len <= sh_leader_descriptor_bytes(&w->o));
    if (decodes > w->wide) w->wide = decodes;
}

/* ---- lines of micro-batches ---- */

static void line_put(line *l, const sh_batch *b) {
    MUST(l->n < 2 * MAX_DEPTH);
    if (!ok) return;
    sh_buf *to = &l->bytes[(l->head + l->n++) % (2 * MAX_DEPTH)];
    sh_buf_clear(to);
    MUST(sh_batch_encode(b, to) == SH_OK);
}

static void line_look(const line *l, sh_batch *b) {
    size_t used = 0;
    const sh_buf *from = &l->bytes[l->head];
    MUST(sh_batch_decode(b, from->data, from->len, &used) == SH_OK && used == from->len);
    if (!ok) fprintf(stderr, "leader_test: %s\n", sh_error_text());
}

static void line_drop(line *l) {
    l->head = (l->head + 1) % (2 * MAX_DEPTH);
    l->n--;
}

static void line_free(line *l) {
    for (int i = 0; i < 2 * MAX_DEPTH; i++) sh_buf_release(&l->bytes[i]);
}

/* ---- the prefill pipeline ---- */

static void make_rows(world *w) {
    sh_batch *b = &w->decode;
    line_look(&w->to_prefill, b);
    MUST(ok && b->n_handoffs == b->n_spans && b->n_kept == 0 && b->n_rows <= w->o.chunk);
    for (int i = 0; i < b->n_spans && ok; i++) run_span(w, w->made, w->o.prefill_pages, b, &b->spans[i]);
    for (int i = 0; i < b->n_spans && ok; i++) see_span(w, w->made, &b->spans[i]);
    line_put(&w->to_import, b);
    line_drop(&w->to_prefill);
}

static void import_span(world *w, const sh_span *s, const sh_handoff *h) {
    uint64_t key = key_of_id(w, s->seq);
    for (int k = 0; k < SH_KV_KINDS; k++)
        for (int32_t pos = h->from[k]; pos < s->pos + s->rows && ok; pos++) {
            int32_t i = pos / SH_PAGE_TOKENS - h->page0[k];
            MUST(w->o.kind[k] && i >= 0 && i < h->n_pages[k]);
            if (!ok) return;
            w->slot[k][0][h->pages[k][i]][pos % SH_PAGE_TOKENS] = texts[key - 100].upto[pos];
            w->handed++;
        }
}

/* The next rank takes the rows of the oldest step, as soon as it has decoded what may still read their pages. */
static void import_rows(world *w) {
    sh_batch *b = &w->decode;
    line_look(&w->to_import, b);
    if (!ok || w->decoded < b->after) return;
    bool good = !w->damage || draw(w->damage) > 0;
    uint64_t step = b->step;
    w->damaged += !good;
    for (int i = 0; good && w->said == 0 && i < b->n_spans; i++) import_span(w, &b->spans[i], &b->handoffs[i]);
    MUST(sh_leader_confirm(w->leader, step, good) == SH_OK);
    if (++w->said < w->o.confirms) return;
    w->said = 0;
    line_drop(&w->to_import);
}

static void emit(void *arg, uint64_t key, const sh_token *t) {
    world *w = arg;
    request *r = &w->r[key - 100];
    MUST(!r->cancelled && !r->finished);
    if (t->score) {
        MUST(t->index == r->scores + 1);
        r->scores++;
        return;
    }
    MUST(t->index == r->got && t->id == token_of(key, r->n_prompt + r->got));
    r->got++;
    if (t->finish) {
        r->finished = true;
        MUST(!r->score || r->scores == r->n_prompt - 1);
    }
}

static void add_request(world *w, int max_len) {
    request *r = &w->r[w->n];
    int total = 2 + draw(max_len - 1);
    *r = (request){.n_prompt = 1 + draw(total - 1), .score = draw(5) == 0};
    r->max_tokens = total - r->n_prompt;
    r->stop_after = draw(2) ? 1 + draw(r->max_tokens) : r->max_tokens;
    if (draw(4) == 0) r->given = r->got = draw(r->stop_after);
    uint64_t key = 100 + (uint64_t)w->n;
    write_text(key, w->families, total);
    const int32_t *tokens = texts[key - 100].token;
    sh_sampling sampling = {.max_tokens = r->max_tokens, .score_prompt = r->score, .logprobs = -1};
    if (r->score && r->n_prompt > 1 && draw(2)) r->scores = draw(r->n_prompt);
    sh_seq *s = NULL;
    bool known = true;
    MUST(sh_seq_create(key, tokens, (size_t)r->n_prompt, tokens + r->n_prompt, (size_t)r->given, &sampling, r->scores,
                       VOCAB, &s) == SH_OK);
    if (!ok) return;
    MUST(sh_leader_add(w->leader, &s, &known) == SH_OK && !known && !s);
    if (s) sh_seq_destroy(&s);
    w->n++;
}

static void take_answer(world *w) {
    answer *a = &w->queue[w->head];
    MUST(sh_leader_apply(w->leader, a->step, a->t, a->n, emit, w) == SH_OK);
    if (!ok) fprintf(stderr, "leader_test: %s\n", sh_error_text());
    free(a->t);
    w->head = (w->head + 1) % MAX_DEPTH;
    w->count--;
}

static bool all_done(const world *w) {
    for (int i = 0; i < w->n; i++)
        if (!w->r[i].finished && !w->r[i].cancelled) return false;
    return true;
}

static void run_next(world *w) {
    line_look(&w->to_stages, &w->decode);
    if (ok) run_batch(w, &w->decode);
    line_drop(&w->to_stages);
}

static int in_flight(const world *w) {
    return w->to_stages.n + w->count;
}

static void play(world *w, int requests, int max_len, bool cancels) {
    int idle = 0;
    while (ok && (w->n < requests || !all_done(w) || in_flight(w) || w->to_prefill.n || w->to_import.n)) {
        if (w->n < requests && draw(3) == 0) add_request(w, max_len);
        if (cancels && w->n && draw(40) == 0) {
            int i = draw(w->n);
            if (!w->r[i].finished) w->r[i].cancelled = true;
            sh_leader_cancel(w->leader, 100 + (uint64_t)i);
        }
        bool made = false, prompts = false;
        if (draw(2) && in_flight(w) < MAX_DEPTH) {
            MUST(sh_leader_next(w->leader, &w->batch, &made) == SH_OK);
            if (!ok) fprintf(stderr, "leader_test: %s\n", sh_error_text());
            if (made) line_put(&w->to_stages, &w->batch);
            w->steps += made;
        }
        if (draw(2)) {
            MUST(sh_leader_next_prompts(w->leader, &w->batch, &prompts) == SH_OK);
            if (!ok) fprintf(stderr, "leader_test: %s\n", sh_error_text());
            if (prompts) line_put(&w->to_prefill, &w->batch);
        }
        if (ok && w->to_stages.n && draw(2)) run_next(w);
        if (ok && w->to_prefill.n && draw(2)) make_rows(w);
        if (ok && w->to_import.n && draw(2)) import_rows(w);
        if (w->count && draw(2)) take_answer(w);
        if (requests < 100 || draw(20) == 0) MUST(sh_leader_audit(w->leader) == SH_OK);
        if (!ok) fprintf(stderr, "leader_test: %s\n", sh_error_text());
        sh_leader_state s = sh_leader_look(w->leader);
        MUST(s.in_flight == in_flight(w) && s.in_flight <= sh_leader_in_flight(&w->o));
        MUST(s.prompts_out == w->to_prefill.n + w->to_import.n && s.prompts_out <= w->o.prefill + 1);
        idle = made || prompts || in_flight(w) || s.prompts_out || w->n < requests ? 0 : idle + 1;
        MUST(idle < 1000); /* work in hand and nothing moves */
        MUST(w->steps < 400000);
    }
}

typedef struct totals {
    uint64_t pauses, redone, shared, rows, schedule;
    int handed;
} totals;

static void families_run(const sh_leader_options *o, uint64_t seed, int requests, bool cancels, int families,
                         totals *sum) {
    world *w = calloc(1, sizeof *w);
    ok = true;
    rng = seed;
    w->o = *o;
    w->families = families;
    MUST(sh_leader_create(o, &w->leader) == SH_OK);
    MUST(sh_batch_create(sh_leader_descriptor_bytes(o), &w->batch) == SH_OK);
    MUST(sh_batch_create(2 * sh_leader_descriptor_bytes(o), &w->decode) == SH_OK);
    w->damage = o->prefill && seed % 2 ? 6 : 0;
    int most = sh_leader_capacity(o);
    if (ok) play(w, requests, most < MAX_LEN ? most : MAX_LEN, cancels);
    if (!ok) fprintf(stderr, "leader_test: seed %llu\n", (unsigned long long)seed);
    CU_ASSERT_TRUE(ok);
    sh_leader_state s = sh_leader_look(w->leader);
    int members = o->members > 1 ? o->members : 1;
    for (int k = 0; k < SH_KV_KINDS; k++) /* all pages are back */
        CU_ASSERT_EQUAL(s.free[k], o->pages[k] * (k == SH_KV_GLOBAL ? members : 1));
    for (int k = 0; k < SH_KV_KINDS; k++) CU_ASSERT_EQUAL(s.prefill_free[k], o->prefill ? o->prefill_pages[k] : 0);
    CU_ASSERT_EQUAL(s.running + s.waiting, 0);
    CU_ASSERT_EQUAL(s.redone > 0, w->damaged > 0);
    sum->pauses += s.pauses;
    sum->redone += s.redone;
    sum->handed += w->handed;
    sum->shared += s.shared;
    sum->rows += w->rows;
    sum->schedule = sh_mix64(sum->schedule + w->schedule);
    while (w->count) {
        free(w->queue[w->head].t);
        w->head = (w->head + 1) % MAX_DEPTH;
        w->count--;
    }
    line_free(&w->to_stages), line_free(&w->to_prefill), line_free(&w->to_import);
    sh_batch_release(&w->batch);
    sh_batch_release(&w->decode);
    sh_buf_release(&w->encoded);
    sh_leader_destroy(&w->leader);
    free(w);
}

static void world_run(const sh_leader_options *o, uint64_t seed, int requests, bool cancels, totals *sum) {
    families_run(o, seed, requests, cancels, 0, sum);
}

static sh_leader_options random_options(uint64_t seed, int members) {
    rng = seed * 31 + 5;
    sh_leader_options o = {.stages = 1 + draw(6), .max_seqs = 1 + draw(20), .vocab = VOCAB};
    static const int chunks[] = {1, 7, 32, 64, 200};
    static const int windows[] = {1, 16, 24, 33, 100};
    o.chunk = chunks[draw(5)];
    o.window = windows[draw(5)];
    o.max_context = 40 + draw(members > 1 ? MAX_LEN : 400);
    o.members = members;
    o.in_flight = draw(2) ? 0 : 1 + draw(12);
    int kinds = draw(4);
    o.kind[SH_KV_GLOBAL] = kinds != 1;
    o.kind[SH_KV_SLIDING] = kinds != 2;
    for (int k = 0; k < SH_KV_KINDS; k++) {
        int peak = sh_leader_peak(&o, (sh_kv_kind)k, o.max_context);
        o.pages[k] = peak + draw(3 * peak + 2);
    }
    return o;
}

static void test_random_worlds(void) {
    totals sum = {0};
    for (uint64_t seed = 1; seed <= 60; seed++) {
        sh_leader_options o = random_options(seed, 1);
        world_run(&o, seed, 25, seed % 3 == 0, &sum);
    }
    CU_ASSERT(sum.pauses > 0); /* small pools did run full */
    CU_ASSERT(sum.handed == 0);
}

/* A prefill pool that holds one of the longest prompts, or several, or not even one: then the others make its rows. */
static void add_prefill(sh_leader_options *o) {
    o->prefill = 1 + draw(4);
    o->confirms = 1 + draw(3);
    int size = draw(4);
    for (int k = 0; k < SH_KV_KINDS; k++) {
        int peak = sh_prefill_peak(o, (sh_kv_kind)k, o->max_context);
        o->prefill_pages[k] = size == 0 ? (peak + 1) / 2 : peak + draw(size * peak + 1);
        if (o->prefill_pages[k] > MAX_PAGES) o->prefill_pages[k] = MAX_PAGES;
    }
}

static void test_worlds_with_prefill(void) {
    totals sum = {0};
    for (uint64_t seed = 1; seed <= 120; seed++) {
        sh_leader_options o = random_options(seed, 1);
        add_prefill(&o);
        world_run(&o, seed, 25, seed % 3 == 0, &sum);
    }
    CU_ASSERT(sum.pauses > 0);
    CU_ASSERT(sum.handed > 0);
    CU_ASSERT(sum.redone > 0);
}

/* Global pages in pools of several members. */
static void test_members(void) {
    totals sum = {0};
    for (uint64_t seed = 1; seed <= 60; seed++) {
        sh_leader_options o = random_options(seed, 2 + (int)(seed % 3));
        world_run(&o, seed, 25, seed % 3 == 0, &sum);
    }
    CU_ASSERT(sum.pauses > 0);
}

/* What a group can hold is exact: the longest sequence just fits the pools, one of one token more does not. */
static void test_members_capacity(void) {
    for (int members = 1; members <= 5; members++)
        for (int pages = 1; pages < 200; pages += 1 + pages / 5) {
            sh_leader_options o = {.stages = 1,
                                   .max_seqs = 1,
                                   .chunk = 64,
                                   .max_context = 1 << 20,
                                   .vocab = VOCAB,
                                   .kind = {true, false},
                                   .pages = {pages, 0},
                                   .members = members};
            int n = sh_leader_capacity(&o), most[2] = {0};
            for (int longer = 0; longer < 2; longer++) {
                int level = sh_owner_level(n + longer, members), count[5] = {0};
                for (int p = 0; p * SH_PAGE_TOKENS < n + longer; p++) {
                    int owner = sh_owner_of(sh_owner_seen(p * SH_PAGE_TOKENS, level) - 1, 7, members);
                    if (++count[owner] > most[longer]) most[longer] = count[owner];
                }
                for (int m = 0; m < members; m++)
                    CU_ASSERT_EQUAL(count[m], sh_owner_pages((n + longer - 1) / SH_PAGE_TOKENS + 1, level, members,
                                                             sh_owner_place(m, 7, members)));
            }
            CU_ASSERT(most[0] <= pages && most[1] > pages);
            CU_ASSERT_EQUAL(sh_leader_total(&o), (int64_t)pages * members * SH_PAGE_TOKENS);
        }
}

/* One page more than the longest sequence needs: everybody is paused again and again, and everybody ends. */
static void tight_pool(bool prefill) {
    totals sum = {0};
    for (uint64_t seed = 1; seed <= 10; seed++) {
        sh_leader_options o = {.stages = 3,
                               .max_seqs = 12,
                               .chunk = 16,
                               .max_context = 400,
                               .vocab = VOCAB,
                               .window = 40,
                               .kind = {true, true}};
        for (int k = 0; k < SH_KV_KINDS; k++) o.pages[k] = sh_leader_peak(&o, (sh_kv_kind)k, 400) + 1;
        if (prefill) add_prefill(&o);
        world_run(&o, seed, 40, seed % 5 == 4, &sum);
    }
    CU_ASSERT(sum.pauses > 10);
}

static void test_tight_pool(void) {
    tight_pool(false);
    tight_pool(true);
}

static sh_leader_options sharing(sh_leader_options o) {
    o.share = true;
    o.n_placeholders = 1;
    o.placeholder[0] = PLACEHOLDER;
    return o;
}

/* Requests that begin alike, in pools of all sizes: fewer rows for the same answers, and all books right. */
static void test_sharing(void) {
    totals with = {0}, without = {0};
    for (uint64_t seed = 1; seed <= 80; seed++) {
        sh_leader_options o = random_options(seed, 1), s = sharing(o);
        int families = 1 + (int)(seed % 4);
        families_run(&s, seed, 60, seed % 3 == 0, families, &with);
        families_run(&o, seed, 60, seed % 3 == 0, families, &without);
    }
    CU_ASSERT(with.pauses > 0);
    CU_ASSERT(with.shared > 0 && without.shared == 0);
    CU_ASSERT(with.rows < without.rows * 9 / 10);
}

/* Thousands of sequences through pools that hold two or three of them. */
static void test_sharing_when_tight(void) {
    totals sum = {0};
    for (uint64_t seed = 1; seed <= 4; seed++) {
        sh_leader_options o = sharing((sh_leader_options){.stages = 1 + (int)seed,
                                                          .max_seqs = 12,
                                                          .chunk = seed % 2 ? 64 : 500,
                                                          .max_context = 600,
                                                          .vocab = VOCAB,
                                                          .window = seed % 2 ? 40 : 200,
                                                          .kind = {true, true}});
        for (int k = 0; k < SH_KV_KINDS; k++)
            o.pages[k] = (int32_t)(1 + seed / 3) * sh_leader_peak(&o, (sh_kv_kind)k, 600) + (int32_t)seed;
        families_run(&o, seed, 2000, seed == 4, 5, &sum);
    }
    CU_ASSERT(sum.pauses > 100);
    CU_ASSERT(sum.shared > 10000);
}

/* Where nothing begins alike, what is kept costs nothing: the same micro-batches in the same order, in pools that are
 * full of it. (A paused sequence finds its own pages again: runs with pauses differ.) */
static void test_kept_pages_cost_nothing(void) {
    int same = 0;
    for (uint64_t seed = 1; seed <= 120; seed++) {
        totals with = {0}, without = {0};
        sh_leader_options o = random_options(seed, 1), s = sharing(o);
        world_run(&o, seed, 40, false, &without);
        if (without.pauses > 0) continue;
        world_run(&s, seed, 40, false, &with);
        CU_ASSERT_EQUAL(with.pauses, 0);
        CU_ASSERT_EQUAL(with.rows, without.rows);
        CU_ASSERT_EQUAL(with.schedule, without.schedule);
        same++;
    }
    CU_ASSERT(same > 20);
}

static sh_status add_plain(sh_leader *l, uint64_t key, int n_prompt, int max_tokens) {
    int32_t tokens[MAX_LEN];
    for (int i = 0; i < n_prompt; i++) tokens[i] = plain_token(key, i);
    sh_sampling sampling = {.max_tokens = max_tokens, .logprobs = -1};
    sh_seq *s = NULL;
    bool known = false;
    SH_TRY(sh_seq_create(key, tokens, (size_t)n_prompt, NULL, 0, &sampling, 0, VOCAB, &s));
    sh_status st = sh_leader_add(l, &s, &known);
    if (s) sh_seq_destroy(&s);
    return st;
}

static void test_never_fits(void) {
    sh_leader_options o = {.stages = 1,
                           .max_seqs = 4,
                           .chunk = 8,
                           .max_context = 1000,
                           .vocab = VOCAB,
                           .window = 16,
                           .kind = {true, true},
                           .pages = {4, 10}};
    sh_leader *l = NULL;
    CU_ASSERT_FATAL(sh_leader_create(&o, &l) == SH_OK);
    CU_ASSERT_EQUAL(sh_leader_capacity(&o), 128);
    CU_ASSERT_EQUAL(add_plain(l, 100, 100, 28), SH_OK);
    CU_ASSERT_EQUAL(add_plain(l, 101, 100, 29), SH_ELIMIT);
    CU_ASSERT_STRING_EQUAL(
        sh_error_text(),
        "prompt of 100 tokens and max_tokens 29 make 129: this group can hold 128 tokens of one sequence");
    CU_ASSERT_EQUAL(sh_leader_look(l).waiting, 1);
    sh_leader_destroy(&l);
}

/* Twelve sequences in decode over three stages: three micro-batches of four rows, not one of twelve. */
static void test_spread(void) {
    sh_leader_options o = {.stages = 3,
                           .max_seqs = 12,
                           .chunk = 64,
                           .max_context = 100,
                           .vocab = VOCAB,
                           .kind = {true, false},
                           .pages = {100, 0}};
    sh_leader *l = NULL;
    sh_batch b = {0};
    CU_ASSERT_FATAL(sh_leader_create(&o, &l) == SH_OK);
    CU_ASSERT_FATAL(sh_batch_create(sh_leader_descriptor_bytes(&o), &b) == SH_OK);
    for (int i = 0; i < 12; i++) CU_ASSERT_EQUAL(add_plain(l, 100 + (uint64_t)i, 1, 50), SH_OK);
    bool made = false;
    for (int i = 0; i < 3; i++) {
        CU_ASSERT_EQUAL(sh_leader_next(l, &b, &made), SH_OK);
        CU_ASSERT_TRUE(made);
        CU_ASSERT_EQUAL(b.n_rows, 4);
    }
    CU_ASSERT_EQUAL(sh_leader_next(l, &b, &made), SH_OK);
    CU_ASSERT_FALSE(made);
    sh_batch_release(&b);
    sh_leader_destroy(&l);
}

static void ignore(void *arg, uint64_t key, const sh_token *t) {
    (void)arg, (void)key, (void)t;
}

static void test_wrong_answers(void) {
    sh_leader_options o = {.stages = 2,
                           .max_seqs = 4,
                           .chunk = 64,
                           .max_context = 100,
                           .vocab = VOCAB,
                           .kind = {true, false},
                           .pages = {100, 0}};
    for (int wrong = 0; wrong < 6; wrong++) {
        sh_leader *l = NULL;
        sh_batch b = {0};
        bool made = false;
        CU_ASSERT_FATAL(sh_leader_create(&o, &l) == SH_OK);
        CU_ASSERT_FATAL(sh_batch_create(sh_leader_descriptor_bytes(&o), &b) == SH_OK);
        CU_ASSERT_EQUAL(add_plain(l, 100, 10, 1), SH_OK);
        CU_ASSERT_EQUAL(sh_leader_next(l, &b, &made), SH_OK);
        sh_token t = {.seq = b.spans[0].seq, .id = 5, .finish = SH_FINISH_LENGTH, .text_len = -1};
        if (wrong == 1) t.seq++;
        if (wrong == 2) t.index = 1;
        if (wrong == 3) t.id = VOCAB;
        if (wrong == 4) t.finish = SH_FINISH_NONE; /* past max_tokens */
        sh_status st = sh_leader_apply(l, b.step + (wrong == 5), &t, 1, ignore, NULL);
        CU_ASSERT_EQUAL(st, wrong ? SH_EPEER : SH_OK);
        sh_batch_release(&b);
        sh_leader_destroy(&l);
    }
}

/* Rows that arrive damaged for ever end the group; what nobody asked for is refused. */
static void test_damage_without_end(void) {
    sh_leader_options o = {.stages = 1,
                           .max_seqs = 4,
                           .chunk = 64,
                           .max_context = 100,
                           .vocab = VOCAB,
                           .kind = {true, false},
                           .pages = {100, 0},
                           .prefill = 1,
                           .confirms = 1,
                           .prefill_pages = {100, 0}};
    sh_leader *l = NULL;
    sh_batch b = {0};
    bool made = false;
    CU_ASSERT_FATAL(sh_leader_create(&o, &l) == SH_OK);
    CU_ASSERT_FATAL(sh_batch_create(sh_leader_descriptor_bytes(&o), &b) == SH_OK);
    CU_ASSERT_EQUAL(add_plain(l, 100, 10, 1), SH_OK);
    CU_ASSERT_EQUAL(sh_leader_confirm(l, 1, true), SH_EPEER);
    int times = 0;
    sh_status st = SH_OK;
    for (; st == SH_OK && times < 100; times++) {
        CU_ASSERT_EQUAL(sh_leader_next(l, &b, &made), SH_OK);
        CU_ASSERT_FALSE(made); /* no decode row before its rows are in place */
        CU_ASSERT_EQUAL(sh_leader_next_prompts(l, &b, &made), SH_OK);
        CU_ASSERT_TRUE_FATAL(made);
        CU_ASSERT_EQUAL(b.spans[0].rows, 9);
        st = sh_leader_confirm(l, b.step, false);
    }
    CU_ASSERT_EQUAL(st, SH_EPEER);
    CU_ASSERT_EQUAL(times, 17);
    sh_batch_release(&b);
    sh_leader_destroy(&l);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("leader", NULL, NULL);
    CU_add_test(s, "random worlds", test_random_worlds);
    CU_add_test(s, "random worlds with a prefill pipeline", test_worlds_with_prefill);
    CU_add_test(s, "damage without end", test_damage_without_end);
    CU_add_test(s, "a tight pool", test_tight_pool);
    CU_add_test(s, "sequences that begin alike", test_sharing);
    CU_add_test(s, "thousands that begin alike, in tight pools", test_sharing_when_tight);
    CU_add_test(s, "pages that are kept cost nothing", test_kept_pages_cost_nothing);
    CU_add_test(s, "pools of several members", test_members);
    CU_add_test(s, "what pools of several members can hold", test_members_capacity);
    CU_add_test(s, "what can never fit is refused", test_never_fits);
    CU_add_test(s, "decode rows spread over the stages", test_spread);
    CU_add_test(s, "wrong answers are errors", test_wrong_answers);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed || CU_get_error() ? 1 : 0;
}
