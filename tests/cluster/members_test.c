/*
 * Stages whose members divide heads, columns and vocabulary: n models on n threads, joined by the local link, against
 * one model. Hidden states, logits and KV are the same bytes for every number of members that divides the heads, also
 * where KV heads are replicated or straddled, columns are few and uneven, and the pipeline is cut. Partial sums
 * (--tp-reduce sum) are close, the same on all members and from run to run. Bytes on the link are what
 * docs/decisions/0015 says.
 */
#include <pthread.h>

#include "tests/golden/golden.h"
#include "worker/tensor.h"

/* Sanitizers are slow: they see each shape once. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { ALL_MODES = 0, MOST = 4 };
#else
enum { ALL_MODES = 1, MOST = 8 };
#endif

enum { N_SEQS = 3, CONTEXT = 320, MAX_PARTS = 14 };
static const int lengths[N_SEQS] = {7, 131, 40};

typedef struct setting {
    const char *name;
    char dir[512];
    sh_mode mode;
    sh_kv_type kv;
    sh_share share; /* part: filled in per member */
    int cut;        /* 0: one stage */
    int chunk;
} setting;

/* What one member came to know. */
typedef struct member {
    const setting *set;
    sh_share share;
    sh_link *link;
    pthread_t thread;
    sh_config c, mine;
    float *hidden[N_SEQS], *logits[N_SEQS];
    uint8_t *kv[N_SEQS][SH_MAX_LAYERS];
    sh_range ids;
    int steps, rows, kept;
} member;

/* For a checkpoint without a golden: any ids. */
static void any_text(const sh_config *c, int32_t *to[N_SEQS]) {
    for (int i = 0; i < N_SEQS; i++) {
        to[i] = must_alloc((size_t)lengths[i] * 4);
        for (int t = 0; t < lengths[i]; t++) to[i][t] = (i * 131 + t * 977 + 7) % c->vocab;
    }
}

static void golden_text(const setting *s, int32_t *to[N_SEQS]) {
    char path[600];
    json_t *g = NULL;
    bool odd = strstr(s->dir, "/odd/") != NULL;
    snprintf(path, sizeof path, odd ? "%s/odd/%s.json" : "%s/text/golden/%s.json", SH_TEST_DATA, s->name);
    MUST(sh_json_read(path, (size_t)64 << 20, &g));
    int n;
    int32_t *ids = golden_ids(json_object_get(odd ? g : json_object_get(g, "loglik"), "ids"), &n);
    for (int i = 0; i < N_SEQS; i++) {
        to[i] = must_alloc((size_t)lengths[i] * 4);
        for (int t = 0; t < lengths[i]; t++) to[i][t] = ids[(t * (i + 1) + 5 * i) % n];
    }
    free(ids);
    json_decref(g);
}

/* All sequences together, in chunks; the last four tokens of each are decoded. */
static int next_take(const seq *s, int chunk) {
    int left = s->n - s->done, prompt = left - 4;
    if (left == 0) return 0;
    return prompt <= 0 ? 1 : prompt < chunk ? prompt : chunk;
}

static void record(member *m, const chain *ch, const seq *s, const int *take, const float *logits) {
    size_t H = (size_t)m->c.hidden, V = (size_t)(m->ids.hi - m->ids.lo), row = 0;
    for (int i = 0; i < N_SEQS; i++)
        for (int k = 0; k < take[i]; k++, row++) {
            size_t pos = (size_t)(s[i].done - take[i] + k);
            memcpy(m->hidden[i] + pos * H, ch->hidden + row * H, H * 4);
            memcpy(m->logits[i] + pos * V, logits + row * V, V * 4);
        }
}

static void run_steps(member *m, chain *ch, seq *s) {
    sh_model *last = chain_last(ch);
    m->ids = sh_model_ids(last);
    size_t V = (size_t)(m->ids.hi - m->ids.lo);
    float *logits = must_alloc((size_t)ch->max_rows * V * 4);
    for (int i = 0; i < N_SEQS; i++) {
        m->hidden[i] = must_alloc((size_t)lengths[i] * (size_t)m->c.hidden * 4);
        m->logits[i] = must_alloc((size_t)lengths[i] * V * 4);
    }
    for (;;) {
        int take[N_SEQS], rows = 0;
        for (int i = 0; i < N_SEQS; i++) rows += take[i] = next_take(&s[i], m->set->chunk);
        if (rows == 0) break;
        int kept = chain_step(ch, s, N_SEQS, take, take);
        sh_model_logits(last, ch->hidden, kept, logits);
        record(m, ch, s, take, logits);
        m->steps++;
        m->rows += rows;
    }
    free(logits);
}

static void collect_kv(member *m, const chain *ch, const seq *s, int i) {
    for (int st = 0; st < ch->n_stages; st++)
        for (int j = 0; j < m->c.n_layers; j++) {
            const sh_kv_pool *kv = sh_model_kv(ch->stage[st]);
            if (!sh_kv_holds(kv, j) || m->kv[i][j]) continue;
            sh_span span = {.rows = s->n, .n_pages = {s->n_pages, s->n_pages}, .pages = {s->pages, s->pages}};
            m->kv[i][j] = must_alloc((size_t)s->n * sh_kv_row_bytes(&m->mine, sh_kv_pool_type(kv), j));
            sh_kv_export(kv, j, &span, 0, s->n, m->kv[i][j]);
        }
}

static void *member_main(void *arg) {
    member *m = arg;
    const setting *set = m->set;
    sh_tensor_link *t = NULL;
    int32_t *text[N_SEQS];
    int rows = 0;
    for (int i = 0; i < N_SEQS; i++) rows += lengths[i];
    MUST(sh_config_load(set->dir, &m->c));
    sh_config_share(&m->c, m->share, &m->mine);
    if (m->link) {
        sh_tensor_options o = {.link = m->link, .share = m->share, .config = &m->c, .max_rows = rows};
        MUST(sh_tensor_link_create(&o, &t));
    }
    chain ch = chain_open(&(chain_options){.dir = set->dir,
                                           .mode = set->mode,
                                           .kv = set->kv,
                                           .threads = 1,
                                           .max_rows = rows,
                                           .max_context = CONTEXT,
                                           .max_seqs = N_SEQS,
                                           .cuts = &set->cut,
                                           .n_cuts = set->cut ? 1 : 0,
                                           .share = m->share,
                                           .peers = t ? sh_tensor_link_peers(t) : NULL});
    if (strchr(set->name, '/'))
        any_text(&m->c, text);
    else
        golden_text(set, text);
    seq s[N_SEQS];
    for (int i = 0; i < N_SEQS; i++) s[i] = seq_open(&ch, text[i], lengths[i]);
    run_steps(m, &ch, s);
    for (int i = 0; i < N_SEQS; i++) {
        collect_kv(m, &ch, &s[i], i);
        seq_close(&s[i]);
        free(text[i]);
    }
    chain_close(&ch);
    sh_tensor_link_destroy(&t);
    return NULL;
}

static void member_close(member *m) {
    for (int i = 0; i < N_SEQS; i++) {
        free(m->hidden[i]);
        free(m->logits[i]);
        for (int j = 0; j < SH_MAX_LAYERS; j++) free(m->kv[i][j]);
    }
    free(m);
}

static member *run_alone(const setting *set) {
    member *m = must_alloc(sizeof *m);
    m->set = set;
    member_main(m);
    return m;
}

/* Bytes that a member sends in all, heads of 32 bytes included: the formulas of docs/decisions/0015. */
static uint64_t bytes_expected(const member *m) {
    const sh_share s = m->share;
    uint64_t others = (uint64_t)s.parts - 1, n = (uint64_t)m->rows, exchanges = 0, columns = 0;
    sh_range o = sh_share_range(s, m->c.hidden, SH_SHARE_COLUMNS);
    uint64_t own = (uint64_t)(o.hi - o.lo), H = (uint64_t)m->c.hidden;
    for (int i = 0; i < m->c.n_layers; i++) {
        const sh_layer *l = &m->mine.layer[i];
        uint64_t q = (uint64_t)(l->heads * l->head_dim), ff = (uint64_t)l->ff;
        if (s.sum && s.parts == 2) {
            columns += 2 * H;
            exchanges += 2;
        } else if (s.sum) { /* to each its columns of mine; then the sums of mine to all */
            columns += 2 * own * others;
            exchanges += own ? 2 * others : 0;
            for (int p = 0; p < s.parts; p++) {
                sh_range r = sh_share_range_of(s, p, m->c.hidden, SH_SHARE_COLUMNS);
                if (p == s.part) continue;
                columns += 2 * (uint64_t)(r.hi - r.lo);
                exchanges += r.hi > r.lo ? 2 : 0;
            }
        } else {
            columns += others * (q + ff + 2 * own);
            exchanges += others * (1 + (ff > 0) + 2 * (own > 0));
        }
    }
    return columns * n * 4 + exchanges * (uint64_t)m->steps * 32;
}

static void run_group(const setting *set, member **m) {
    int T = set->share.parts;
    sh_link *link[MAX_PARTS];
    MUST(sh_link_local_create(T, link));
    for (int p = 0; p < T; p++) {
        m[p] = must_alloc(sizeof **m);
        *m[p] = (member){.set = set, .share = set->share, .link = link[p]};
        m[p]->share.part = p;
        if (pthread_create(&m[p]->thread, NULL, member_main, m[p])) exit(1);
    }
    for (int p = 0; p < T; p++) pthread_join(m[p]->thread, NULL);
    for (int p = 0; p < T; p++) {
        CHECK(link[p]->sent_bytes == bytes_expected(m[p]), "%s: tp %d%s: member %d sent %llu bytes: %llu expected",
              set->name, T, set->share.sum ? " (sum)" : "", p, (unsigned long long)link[p]->sent_bytes,
              (unsigned long long)bytes_expected(m[p]));
        sh_link_destroy(&link[p]);
    }
}

/* Every KV head that the member stores, against the head of the whole. */
static void compare_kv(const member *m, const member *base, int i, int j) {
    const sh_layer *all = &m->c.layer[j], *mine = &m->mine.layer[j];
    size_t vec = sh_kv_vec_bytes(m->set->kv, all->head_dim);
    size_t kinds = all->k_eq_v ? 1 : 2;
    for (size_t t = 0; t < (size_t)lengths[i]; t++)
        for (size_t kind = 0; kind < kinds; kind++)
            for (int h = 0; h < mine->kv_heads; h++) {
                size_t a = ((t * kinds + kind) * (size_t)mine->kv_heads + (size_t)h) * vec;
                size_t from = (size_t)sh_share_kv_head(m->share, all, h);
                size_t b = ((t * kinds + kind) * (size_t)all->kv_heads + from) * vec;
                CHECK(memcmp(m->kv[i][j] + a, base->kv[i][j] + b, vec) == 0,
                      "%s: tp %d: member %d: sequence %d: layer %d: position %zu: KV of head %d differs", m->set->name,
                      m->share.parts, m->share.part, i, j, t, h);
            }
}

static void compare(const member *m, const member *base) {
    size_t H = (size_t)m->c.hidden, V = (size_t)(m->ids.hi - m->ids.lo), all = (size_t)m->c.vocab;
    for (int i = 0; i < N_SEQS; i++) {
        for (size_t t = 0; t < (size_t)lengths[i]; t++) {
            CHECK(memcmp(m->hidden[i] + t * H, base->hidden[i] + t * H, H * 4) == 0,
                  "%s: tp %d, cut %d: member %d: sequence %d: hidden state %zu differs", m->set->name, m->share.parts,
                  m->set->cut, m->share.part, i, t);
            CHECK(memcmp(m->logits[i] + t * V, base->logits[i] + t * all + m->ids.lo, V * 4) == 0,
                  "%s: tp %d, cut %d: member %d: sequence %d: logits %zu differ", m->set->name, m->share.parts,
                  m->set->cut, m->share.part, i, t);
        }
        for (int j = 0; j < m->c.n_layers; j++) {
            CHECK(!m->kv[i][j] == !base->kv[i][j], "%s: layer %d: KV is missing", m->set->name, j);
            if (m->kv[i][j] && base->kv[i][j]) compare_kv(m, base, i, j);
        }
    }
}

static void check_gather(const setting *set, const member *base) {
    member *m[MAX_PARTS];
    int covered = 0;
    run_group(set, m);
    for (int p = 0; p < set->share.parts; p++) {
        compare(m[p], base);
        covered += m[p]->ids.hi - m[p]->ids.lo;
        member_close(m[p]);
    }
    CHECK(covered == base->c.vocab, "%s: tp %d: %d logits of %d", set->name, set->share.parts, covered, base->c.vocab);
}

/* Sums: the same on every member and in other chunks, and near the whole. */
static void check_sum(const setting *set, const member *base) {
    member *m[MAX_PARTS], *other[MAX_PARTS];
    setting chunks = *set;
    chunks.chunk = 11;
    run_group(set, m);
    run_group(&chunks, other);
    double worst = 0;
    for (int i = 0; i < N_SEQS; i++) {
        size_t bytes = (size_t)lengths[i] * (size_t)m[0]->c.hidden * 4;
        for (int p = 0; p < set->share.parts; p++) {
            CHECK(memcmp(m[p]->hidden[i], m[0]->hidden[i], bytes) == 0, "%s: sums differ between members", set->name);
            CHECK(memcmp(m[p]->hidden[i], other[p]->hidden[i], bytes) == 0, "%s: sums depend on chunks", set->name);
        }
        for (size_t k = 0; k < bytes / 4; k++) {
            double d = fabs((double)m[0]->hidden[i][k] - (double)base->hidden[i][k]);
            if (!(d <= worst)) worst = d;
        }
    }
    if (set->kv == SH_KV_F32) /* with K/V rounded a last bit may become the choice of another expert */
        CHECK(worst < 1e-3, "%s: sums over %d members are off by %g", set->name, set->share.parts, worst);
    for (int p = 0; p < set->share.parts; p++) {
        member_close(m[p]);
        member_close(other[p]);
    }
}

static void check_fixture(const char *name, bool odd, sh_mode mode, sh_kv_type kv, int most) {
    setting set = {.name = name, .mode = mode, .kv = kv, .chunk = 64};
    bool path = strchr(name, '/') != NULL;
    if (path)
        snprintf(set.dir, sizeof set.dir, "%s", name);
    else
        snprintf(set.dir, sizeof set.dir, "%s/%s/%s", SH_TEST_DATA, odd ? "odd" : "text/models", name);
    member *base = run_alone(&set);
    int heads = base->c.layer[0].heads, layers = base->c.n_layers;
    for (int T = 2; T <= most && T <= heads; T++) {
        if (heads % T != 0) continue;
        set.share = (sh_share){.parts = T};
        set.cut = 0;
        set.chunk = 64;
        check_gather(&set, base);
        set.cut = layers > 1 ? 1 + T % (layers - 1) : 0;
        set.chunk = 9;
        if (set.cut && (T == 2 || T == heads)) check_gather(&set, base);
        set.cut = 0;
        set.chunk = 64;
        set.share.sum = true;
        if (T <= 4 && (T < 4 || mode == SH_MODE_EXACT)) check_sum(&set, base);
    }
    member_close(base);
}

static void check_modes(const char *name, bool odd, int most) {
    for (int mode = SH_MODE_EXACT; mode <= (ALL_MODES ? SH_MODE_BF16 : SH_MODE_EXACT); mode++)
        check_fixture(name, odd, (sh_mode)mode, sh_kv_type_of_mode((sh_mode)mode), most);
}

static bool wanted(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], name) == 0) return true;
    return argc < 2;
}

/* With arguments: only these fixtures; a folder: that checkpoint, such as tests/bench/make_shape.c writes. */
int main(int argc, char **argv) {
#ifdef __SANITIZE_THREAD__
    check_modes(fixtures[0], false, MOST); /* threads meet alike in all of them */
    return finish("members");
#endif
    for (int i = 1; i < argc; i++)
        if (strchr(argv[i], '/')) check_fixture(argv[i], false, SH_MODE_BF16, SH_KV_BF16, 4);
    for (int i = 0; i < N_FIXTURES; i++)
        if (wanted(fixtures[i], argc, argv)) check_modes(fixtures[i], false, MOST);
    if (wanted(fixtures[0], argc, argv)) check_fixture(fixtures[0], false, SH_MODE_EXACT, SH_KV_Q8, 2);
    for (int i = 0; i < N_ODD; i++)
        if (wanted(odd_fixtures[i], argc, argv)) check_modes(odd_fixtures[i], true, ALL_MODES ? MAX_PARTS : MOST);
    return finish("members");
}
