/*
 * Groups on the local link in which some ranks read prompts and others decode. The answers must be the bytes of one
 * rank for every number of both, every cut, with pools so small that sequences are paused, with cancels, and with a
 * link that alters K/V rows on their way. What travels is counted against the formula of
 * docs/decisions/0017-prefill-and-decode.md.
 */
#include "common/hash.h"
#include "tests/cluster/mixed.h"
#include "worker/shard.h"

#if defined(__SANITIZE_THREAD__)
enum { STRIDE = 4, MODELS = 1 };
#elif defined(__SANITIZE_ADDRESS__)
enum { STRIDE = 2, MODELS = 2 };
#else
enum { STRIDE = 1, MODELS = 4 };
#endif

typedef struct setting {
    int decode, cut[9], prefill, prefill_cut[9];
    int max_seqs, chunk, tokens; /* tokens: KV memory for sequences of so many and no more; 0: plenty */
    int damage;                  /* one K/V message in so many is altered; 0: none */
    bool cancels;
    const char *mode, *kv;
} setting;

/* ---- the link: counts K/V rows, and alters some --------------------------------------------------------------------
 */

static const sh_link_ops *plain_ops;
static sh_link_ops faulty_ops;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int damage_one_in, n_messages, n_damaged;
static uint64_t payload, shards;
static void *copies[1 << 16]; /* of altered messages: they must stay until they are taken */
static int n_copies;

static void count_message(const uint8_t *p, size_t n) {
    for (size_t at = 64; at < n;) {
        sh_shard s;
        size_t used = 0;
        MUST(sh_shard_open(p + at, n - at, &s, &used));
        payload += sh_shard_payload_bytes(&s);
        shards++;
        at += (used + SH_SHARD_ALIGN - 1) / SH_SHARD_ALIGN * SH_SHARD_ALIGN;
    }
}

static sh_status faulty_send(sh_link *l, int to, int tag, const void *p, size_t n, int *req) {
    if (tag == SH_TAG_SHARD) {
        pthread_mutex_lock(&lock);
        count_message(p, n);
        uint64_t dice = sh_mix64((uint64_t)n_messages++);
        if (damage_one_in && dice % (uint64_t)damage_one_in == 0 && n_copies < 1 << 16) {
            uint8_t *copy = malloc(n);
            if (!copy) exit(1);
            memcpy(copy, p, n);
            copy[(dice >> 20) % n] ^= (uint8_t)(1u << (dice >> 8) % 8);
            p = copies[n_copies++] = copy;
            n_damaged++;
        }
        pthread_mutex_unlock(&lock);
    }
    return plain_ops->send(l, to, tag, p, n, req);
}

static void tamper(sh_link *l) {
    if (l->rank == 0) {
        plain_ops = l->ops;
        faulty_ops = *l->ops;
        faulty_ops.send = faulty_send;
    }
    l->ops = &faulty_ops;
}

/* ---- groups ---------------------------------------------------------------------------------------------------------
 */

static sh_config config;

/* Bytes of one prompt's rows on the link: of each layer that makes K/V, to each rank that stores it; of sliding layers
 * those that the last row still sees. */
static uint64_t rows_bytes(const fake *f, const sh_config *c, int n_tokens) {
    uint64_t sum = 0;
    sh_kv_type type;
    int window = 0, decode = (int)f->plan.n_rank - f->plan.prefill;
    MUST(sh_kv_type_parse(f->plan.kv, &type));
    for (int i = 0; i < c->n_layers; i++)
        if (c->layer[i].window > window) window = c->layer[i].window;
    for (int y = 0; y < c->first_shared; y++) {
        int rows = n_tokens - 1, holders = 0;
        if (c->layer[y].kind == SH_KV_SLIDING && rows > window - 1) rows = window - 1;
        for (int d = 0; d < decode; d++) {
            bool holds = false;
            for (int i = f->layer[d].first; i < f->layer[d].last; i++) holds = holds || c->layer[i].kv_from == y;
            holders += holds;
        }
        sum += (uint64_t)(holders * rows) * sh_layer_kv_bytes(&c->layer[y], type);
    }
    return sum;
}

static uint64_t all_rows_bytes(const fake *f, const sh_config *c) {
    uint64_t sum = 0;
    for (int i = 0; i < f->n_work; i++) {
        const fake_work *w = &f->work[i];
        bool wants_logits = w->sampling.score_prompt && w->scored < w->n_prompt - 1;
        if (!wants_logits) sum += rows_bytes(f, c, w->n_prompt + w->n_given);
    }
    return sum;
}

/* The least KV memory on which a sequence of `tokens` runs, and prompts are read at all. */
static uint64_t least_memory(const fake *f, const sh_config *c, int tokens) {
    sh_kv_limits limits;
    sh_kv_plan kv, prompts;
    uint64_t lo = 0, hi = (uint64_t)1 << 30;
    MUST(sh_plan_kv_limits(&f->plan, &limits));
    while (lo + 1 < hi) {
        uint64_t mid = (lo + hi) / 2, budget[FAKE_RANKS];
        for (int i = 0; i < f->n; i++) budget[i] = mid;
        bool fits = sh_plan_kv_group(c, &limits, &f->plan, budget, &kv) == SH_OK && kv.tokens >= tokens;
        if (fits && f->plan.prefill > 0) fits = sh_plan_kv_prefill(c, &limits, &f->plan, budget, &prompts) == SH_OK;
        if (fits)
            hi = mid;
        else
            lo = mid;
    }
    return hi;
}

static void open_group(fake *f, const char *name, const setting *s) {
    char model[600];
    int cut[FAKE_RANKS + 1] = {0};
    snprintf(model, sizeof model, "%s/text/models/%s", SH_TEST_DATA, name);
    fake_open(f, model, s->decode + s->prefill, cut, s->mode, s->kv);
    for (int i = 0; i < s->decode; i++) {
        f->layer[i].first = s->cut[i];
        f->layer[i].last = s->cut[i + 1];
    }
    for (int i = 0; i < s->prefill; i++) {
        f->layer[s->decode + i].first = s->prefill_cut[i];
        f->layer[s->decode + i].last = s->prefill_cut[i + 1];
    }
    f->plan.has_prefill = true;
    f->plan.prefill = s->prefill;
    f->plan.max_seqs = s->max_seqs;
    f->plan.chunk = s->chunk;
    MUST(sh_config_load(f->model, &config));
    MUST(sh_plan_check(&config, &f->plan));
    if (s->tokens) f->plan.kv_memory = least_memory(f, &config, s->tokens);
    f->on_link = tamper;
    damage_one_in = s->damage;
    payload = shards = 0;
    n_damaged = n_messages = 0;
}

/* All work, some of which is called off while it is read, waits or decodes. */
static bool run_with_cancels(fake *f) {
    if (!fake_wait_ready(f, 60)) return false;
    for (int i = 0; i < f->n_work; i++) {
        fake_send_work(f, i);
        if (i % 3 == 2) fake_pump(f, 1);
        for (int j = i - 2; j >= 0 && j % 4 == 1; j = -1) {
            fake_send_key(f, j, true);
            f->work[j].done = true;
        }
    }
    for (double end = sh_now() + 120; !fake_all_done(f) && !f->fault[0] && sh_now() < end;) fake_pump(f, 10);
    return fake_all_done(f);
}

static bool run_setting(const char *name, const json_t *g, const setting *s, fake *f) {
    open_group(f, name, s);
    mixed_add(f, g);
    fake_start_threads(f);
    bool ok = s->cancels ? run_with_cancels(f) : fake_run(f, 120);
    CHECK(ok, "%s on %d + %d ranks did not answer: %s", name, s->decode, s->prefill, f->fault);
    fake_leave(f);
    fake_join(f);
    for (int i = 0; i < f->n; i++)
        CHECK(f->rank[i].status == SH_OK, "rank %d of %d ended with %d: %s", i, f->n, f->rank[i].status,
              f->rank[i].error);
    for (; n_copies > 0; n_copies--) free(copies[n_copies - 1]);
    return ok;
}

static bool is_prefix(const fake_work *a, const fake_work *of) {
    return a->n <= of->n && a->tokens.len <= of->tokens.len && a->scores.len <= of->scores.len &&
           (a->tokens.len == 0 || !memcmp(a->tokens.data, of->tokens.data, a->tokens.len)) &&
           (a->scores.len == 0 || !memcmp(a->scores.data, of->scores.data, a->scores.len));
}

static void compare(const char *name, const json_t *g, const setting *s, const fake *base) {
    fake f;
    if (run_setting(name, g, s, &f)) {
        for (int i = 0; i < f.n_work; i++) {
            bool called_off = s->cancels && i % 4 == 1 && i + 2 < f.n_work;
            CHECK(called_off ? is_prefix(&f.work[i], &base->work[i]) : fake_same(&f.work[i], &base->work[i]),
                  "%s request %d: %d + %d ranks, cuts %d and %d, max_seqs %d, chunk %d, KV for %d, damage %d differ",
                  name, i, s->decode, s->prefill, s->cut[1], s->prefill_cut[1], s->max_seqs, s->chunk, s->tokens,
                  s->damage);
        }
        CHECK(shards > 0 && (n_damaged > 0) == (s->damage > 0), "%llu shards, %d damaged", (unsigned long long)shards,
              n_damaged);
        if (!s->tokens && !s->cancels && !s->damage)
            CHECK(payload == all_rows_bytes(&f, &config), "%s: %llu bytes of rows travelled, the formula says %llu",
                  name, (unsigned long long)payload, (unsigned long long)all_rows_bytes(&f, &config));
    }
    fake_close(&f);
}

/* ---- settings -------------------------------------------------------------------------------------------------------
 */

static setting even(const sh_config *c, int decode, int prefill) {
    setting s = {.decode = decode, .prefill = prefill, .max_seqs = 8, .chunk = 64, .mode = "exact", .kv = "f32"};
    for (int i = 0; i <= decode; i++) s.cut[i] = c->n_layers * i / decode;
    for (int i = 1; i <= prefill; i++) s.prefill_cut[i] = c->first_shared * i / prefill;
    return s;
}

static void test_model(const char *name) {
    json_t *g = mixed_golden(name);
    fake base;
    char dir[600];
    snprintf(dir, sizeof dir, "%s/text/models/%s", SH_TEST_DATA, name);
    MUST(sh_config_load(dir, &config));
    sh_config c = config;
    setting one = even(&c, 1, 0);
    if (run_setting(name, g, &one, &base)) {
        mixed_check_greedy(name, g, &base);
        CHECK(shards == 0, "%llu shards without a prefill rank", (unsigned long long)shards);
        setting s[10];
        int n = 0;
        s[n++] = even(&c, 1, 1);
        s[n] = even(&c, 2, 2);
        s[n++].tokens = 200; /* and some prompts do not fit the prefill pool */
        s[n] = even(&c, 2, 2), s[n].damage = 40, s[n++].chunk = 32;
        s[n] = even(&c, 3, 2), s[n].tokens = 200, s[n].cancels = true, s[n].chunk = 7, s[n++].max_seqs = 5;
        s[n] = even(&c, 2, 2), s[n].chunk = 16, s[n].max_seqs = 20;
        s[n].cut[1] = 1, s[n++].prefill_cut[1] = c.first_shared - 1; /* the last one makes K/V of one layer */
        s[n] = even(&c, 2, 1), s[n].cut[1] = c.n_layers - 1, s[n++].chunk = 5;
        s[n] = even(&c, 1, 3), s[n].prefill_cut[1] = 1, s[n].prefill_cut[2] = 2, s[n++].max_seqs = 40;
        s[n] = even(&c, 1, 2), s[n].damage = 25, s[n].tokens = 300, s[n].cancels = true, s[n++].chunk = 16;
        s[n] = even(&c, 4, 3), s[n++].chunk = 1;
        for (int i = 0; i < n; i += STRIDE) compare(name, g, &s[i], &base);
    }
    fake_close(&base);
    one.mode = "bf16";
    for (int q8 = 0; q8 < 2 && STRIDE == 1; q8++) {
        one.kv = q8 ? "q8" : "bf16";
        if (run_setting(name, g, &one, &base)) {
            setting s = even(&c, 2, 2);
            s.mode = one.mode, s.kv = one.kv;
            compare(name, g, &s, &base);
        }
        fake_close(&base);
    }
    json_decref(g);
}

int main(void) {
    static const char *const models[] = {"e2b-like", "26b-a4b-like", "31b-like", "e4b-like"};
    for (int i = 0; i < MODELS; i++) test_model(models[i]);
    printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
