/*
 * Sequences and their ends: bans, scores, stop ids, stop strings, lengths. See sampler.h. The numbers of one choice are
 * in draw.c. Everything is allocated by create: starting, stepping and dropping sequences allocate nothing.
 */
#include "model/sampler.h"

#include <limits.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/mem.h"
#include "model/draw_int.h"

#define TEXT_ROOM                                                                                                      \
    (SH_MAX_STOP_BYTES + 4096) /* tail and one token's text; a longer piece makes the buffer grow once                 \
                                */

typedef struct state {
    uint64_t seq;
    bool used;
    int32_t n_prompt, n_tokens;
    int64_t text_bytes; /* of generated text so far, what detok still holds back left out */
    int32_t tail_len;   /* the end of that text, as long as a stop string that began there may need */
    int32_t longest;    /* bytes of the longest stop string */
    sh_detok detok;
    sh_sampling p;
    char tail[SH_MAX_STOP_BYTES];
} state;

/* What one thread works with, and what went wrong there. */
typedef struct desk {
    sh_draw *draw;
    sh_buf text; /* tail and new text of one token */
    int row;     /* the first that failed; −1: none */
    sh_status failed;
    char why[512];
} desk;

struct sh_sampler {
    const sh_tokenizer *tok;
    sh_team *team; /* NULL: one thread */
    desk *desks;   /* [n_desks]: of the team's first members; number 0 is the calling thread's */
    int n_desks;
    int vocab, max_seqs, max_context;
    bool quiet; /* texts are not followed */
    state *states;
    size_t state_bytes;
    int32_t *prompts; /* [max_seqs, max_context]: the prompts that are scored; pages of others are never touched */
    size_t prompt_bytes;
};

static sh_status create_desks(sh_sampler *s, const sh_kernels *kn) {
    int threads = s->team ? sh_team_size(s->team) : 1;
    s->n_desks = threads < SH_SAMPLE_THREADS ? threads : SH_SAMPLE_THREADS;
    s->desks = calloc((size_t)s->n_desks, sizeof *s->desks);
    if (!s->desks) SH_FAIL(SH_EMEMORY, "no memory for %d threads of a sampler", s->n_desks);
    for (int i = 0; i < s->n_desks; i++) sh_buf_init(&s->desks[i].text, 0);
    for (int i = 0; i < s->n_desks; i++) {
        SH_TRY(sh_draw_create(kn, s->vocab, &s->desks[i].draw));
        SH_TRY(sh_buf_reserve(&s->desks[i].text, TEXT_ROOM));
    }
    return SH_OK;
}

sh_status sh_sampler_create(const sh_kernels *kn, const sh_tokenizer *tok, int vocab, int max_seqs, int max_context,
                            sh_team *team, sh_sampler **out) {
    if (max_seqs < 1 || max_context < 1)
        SH_FAIL(SH_EINPUT, "sampler: %d sequences of %d tokens: at least 1 of each is needed", max_seqs, max_context);
    sh_sampler *s = calloc(1, sizeof *s);
    if (!s) SH_FAIL(SH_EMEMORY, "no memory for a sampler");
    s->tok = tok;
    s->team = team;
    s->vocab = vocab;
    s->max_seqs = max_seqs;
    s->max_context = max_context;
    s->state_bytes = (size_t)max_seqs * sizeof(state);
    s->prompt_bytes = (size_t)max_seqs * (size_t)max_context * sizeof(int32_t);
    sh_status st;
    void *states = NULL, *prompts = NULL;
    SH_TRY_OR(st, create_desks(s, kn), goto fail);
    SH_TRY_OR(st, sh_mem_alloc(s->state_bytes, "sampler states", &states), goto fail);
    s->states = states;
    SH_TRY_OR(st, sh_mem_alloc(s->prompt_bytes, "prompts to score", &prompts), goto fail);
    s->prompts = prompts;
    *out = s;
    return SH_OK;
fail:
    sh_sampler_destroy(&s);
    return st;
}

void sh_sampler_destroy(sh_sampler **sp) {
    sh_sampler *s = *sp;
    if (!s) return;
    for (int i = 0; s->desks && i < s->n_desks; i++) {
        sh_draw_destroy(&s->desks[i].draw);
        sh_buf_release(&s->desks[i].text);
    }
    free(s->desks);
    if (s->states) sh_mem_free(s->states, s->state_bytes);
    if (s->prompts) sh_mem_free(s->prompts, s->prompt_bytes);
    free(s);
    *sp = NULL;
}

static state *find(const sh_sampler *s, uint64_t seq) {
    for (int i = 0; i < s->max_seqs; i++)
        if (s->states[i].used && s->states[i].seq == seq) return &s->states[i];
    return NULL;
}

static state *find_free(const sh_sampler *s) {
    for (int i = 0; i < s->max_seqs; i++)
        if (!s->states[i].used) return &s->states[i];
    return NULL;
}

void sh_sampler_drop(sh_sampler *s, uint64_t seq) {
    state *q = find(s, seq);
    if (q) q->used = false;
}

void sh_sampler_quiet(sh_sampler *s) {
    s->quiet = true;
}

/* --- generated text --- */

/* Where the earliest stop string begins among those that end after `old` bytes of text; −1: none. */
static int64_t find_stop(const sh_sampling *p, const char *text, size_t len, size_t old) {
    int64_t first = -1;
    for (int i = 0; i < p->n_stops; i++) {
        size_t n = p->stop_len[i];
        if (n == 0 || n > len) continue;
        size_t from = old + 1 > n ? old + 1 - n : 0; /* ends before that lie in text that was searched already */
        const char *hit = memmem(text + from, len - from, p->stop[i], n);
        if (hit && (first < 0 || hit - text < first)) first = hit - text;
    }
    return first;
}

/* Takes one generated token into the text (id < 0: the text that detok holds back, at an end). With `search`, *cut gets
 * the offset in the generated text at which a stop string begins, if one ends in the new part. */
static sh_status add_text(desk *d, state *q, int32_t id, bool search, int64_t *cut) {
    sh_buf_clear(&d->text);
    SH_TRY(sh_buf_add(&d->text, q->tail, (size_t)q->tail_len));
    sh_status st = id >= 0 ? sh_detok_add(&q->detok, id, &d->text) : sh_detok_flush(&q->detok, &d->text);
    if (st != SH_OK && st != SH_EINPUT)
        return sh_error_pass(st, __FILE__, __LINE__); /* EINPUT: padding, an id without text */
    const char *text = (const char *)d->text.data;
    size_t old = (size_t)q->tail_len, len = d->text.len;
    int64_t begin = q->text_bytes - (int64_t)old;
    if (search) {
        int64_t at = find_stop(&q->p, text, len, old);
        if (at >= 0) *cut = begin + at;
    }
    size_t keep = len < (size_t)q->longest - 1 ? len : (size_t)q->longest - 1;
    memcpy(q->tail, text + (len - keep), keep);
    q->tail_len = (int32_t)keep;
    q->text_bytes = begin + (int64_t)len;
    return SH_OK;
}

static bool has_id(const int32_t *ids, int n, int32_t id) {
    for (int i = 0; i < n; i++)
        if (ids[i] == id) return true;
    return false;
}

/* --- start --- */

static sh_status check_start(const sh_sampler *s, const sh_seq_start *b) {
    const sh_sampling *p = b->sampling;
    unsigned long long seq = b->seq;
    if (b->n_prompt < 1 || b->n_tokens < b->n_prompt || b->n_tokens > s->max_context)
        SH_FAIL(SH_EINPUT, "sequence %llu: %d prompt tokens of %d: allowed are 1 to %d tokens", seq, b->n_prompt,
                b->n_tokens, s->max_context);
    for (int i = 0; i < b->n_tokens; i++)
        if (b->tokens[i] < 0 || b->tokens[i] >= s->vocab)
            SH_FAIL(SH_EINPUT, "sequence %llu: token %d is id %d: allowed are 0 to %d", seq, i, b->tokens[i],
                    s->vocab - 1);
    if (p->n_eos < 0 || p->n_eos > SH_MAX_STOP_IDS || p->n_stop_ids < 0 || p->n_stop_ids > SH_MAX_STOP_IDS ||
        p->n_suppress < 0 || p->n_suppress > SH_MAX_STOP_IDS)
        SH_FAIL(SH_EINPUT, "sequence %llu: more stop ids than %d", seq, SH_MAX_STOP_IDS);
    if (p->n_stops < 0 || p->n_stops > SH_MAX_STOPS)
        SH_FAIL(SH_EINPUT, "sequence %llu: %d stop strings: allowed are 0 to %d", seq, p->n_stops, SH_MAX_STOPS);
    for (int i = 0; i < p->n_stops; i++)
        if (p->stop_len[i] > SH_MAX_STOP_BYTES)
            SH_FAIL(SH_EINPUT, "sequence %llu: a stop string of %d bytes: allowed are %d", seq, p->stop_len[i],
                    SH_MAX_STOP_BYTES);
    if (p->n_stops > 0 && !s->tok && !s->quiet) SH_FAIL(SH_ESTATE, "sequence %llu: stop strings need a tokenizer", seq);
    if (p->logprobs > SH_MAX_TOP_LOGPROBS)
        SH_FAIL(SH_EINPUT, "sequence %llu: %d alternatives: allowed are 0 to %d", seq, p->logprobs,
                SH_MAX_TOP_LOGPROBS);
    return SH_OK;
}

sh_status sh_sampler_start(sh_sampler *s, const sh_seq_start *b) {
    SH_TRY(check_start(s, b));
    state *q = find(s, b->seq);
    if (!q) q = find_free(s);
    if (!q)
        SH_FAIL(SH_ELIMIT, "sequence %llu: %d sequences run already: no more are allowed", (unsigned long long)b->seq,
                s->max_seqs);
    q->used = false; /* stays free if the text below fails */
    q->seq = b->seq;
    q->p = *b->sampling;
    q->n_prompt = b->n_prompt;
    q->n_tokens = b->n_tokens;
    q->text_bytes = 0;
    q->tail_len = 0;
    q->longest = 0;
    for (int i = 0; i < q->p.n_stops && !s->quiet; i++)
        if (q->p.stop_len[i] > q->longest) q->longest = q->p.stop_len[i];
    if (q->longest > 0) { /* the text so far, exactly as decoding its tokens went */
        sh_detok_init(&q->detok, s->tok, true);
        int64_t unused;
        for (int i = b->n_prompt; i < b->n_tokens; i++) SH_TRY(add_text(&s->desks[0], q, b->tokens[i], false, &unused));
    }
    if (q->p.score_prompt)
        memcpy(s->prompts + (size_t)(q - s->states) * (size_t)s->max_context, b->tokens,
               (size_t)b->n_prompt * sizeof(int32_t));
    q->used = true;
    return SH_OK;
}

/* --- one row --- */

/* A row of logits: all of it, or in parts; then `ask` gets what is not settled yet, and nothing else counts. */
typedef struct view {
    float *x;
    sh_row *parts;
    sh_row_ask ask;
} view;

static view view_of(sh_row *row) {
    return (view){.x = sh_row_all(row), .parts = row};
}

/* Ids [base, base + n). */
static void ban(float *x, int n, int base, const int32_t *ids, int n_ids) {
    for (int i = 0; i < n_ids; i++)
        if (ids[i] >= base && ids[i] < base + n) x[ids[i] - base] = -INFINITY;
}

/* What may not be chosen after `made` tokens. */
static void ban_all(const state *q, int made, float *x, int n, int base) {
    ban(x, n, base, q->p.suppress, q->p.n_suppress);
    if (made >= q->p.min_tokens) return;
    if (!q->p.ignore_eos) ban(x, n, base, q->p.eos, q->p.n_eos);
    ban(x, n, base, q->p.stop_ids, q->p.n_stop_ids);
}

static sh_status find_lse(desk *d, const view *v, sh_lse *out) {
    return v->x ? sh_draw_lse(d->draw, v->x, out) : sh_row_lse(v->parts, out);
}

/* Log-probability of `id` and of the alternatives asked for. */
static sh_status report(desk *d, const state *q, view *v, int32_t id, const sh_lse *lse, sh_token *t) {
    float logit = 0;
    if (v->x)
        logit = v->x[id];
    else
        SH_TRY(sh_row_value(v->parts, id, &logit));
    t->logprob = sh_lse_logprob(*lse, logit);
    t->n_top = v->x ? sh_draw_top(d->draw, v->x, *lse, q->p.logprobs, t->top)
                    : sh_row_top(v->parts, *lse, q->p.logprobs, t->top, &v->ask);
    return SH_OK;
}

/* The prompt token after position pos: what is scored there. */
static int32_t scored_id(const sh_sampler *s, const state *q, int pos) {
    return s->prompts[(size_t)(q - s->states) * (size_t)s->max_context + (size_t)pos + 1];
}

static bool is_scored(const state *q, int pos) {
    return q->p.score_prompt && pos + 1 < q->n_prompt;
}

static sh_status score(const sh_sampler *s, desk *d, const state *q, int pos, view *v, sh_token *out) {
    int32_t id = scored_id(s, q, pos);
    sh_lse lse;
    SH_TRY(find_lse(d, v, &lse));
    sh_token t = {.seq = q->seq, .index = pos + 1, .id = id, .score = true, .finish = SH_FINISH_NONE, .text_len = -1};
    SH_TRY(report(d, q, v, id, &lse, &t));
    *out = t;
    return SH_OK;
}

/* Chooses the next id. */
static sh_status choose(const sh_sampler *s, desk *d, const state *q, view *v, sh_token *t) {
    if (v->x) ban_all(q, q->n_tokens - q->n_prompt, v->x, s->vocab, 0);
    sh_lse lse = {0};
    if (q->p.logprobs >= 0) SH_TRY(find_lse(d, v, &lse));
    double u = sh_draw_uniform(q->p.seed, (uint32_t)q->p.choice, (uint32_t)q->n_tokens);
    SH_TRY(v->x ? sh_draw_id(d->draw, v->x, &q->p, u, &t->id) : sh_row_id(v->parts, &q->p, u, &t->id, &v->ask));
    if (q->p.logprobs < 0 || v->ask.kind != SH_ASK_NOTHING) return SH_OK;
    return report(d, q, v, t->id, &lse, t);
}

/* --- step --- */

/* Whether token t (already counted) ends the sequence, and how much text stays. */
static sh_status conclude(const sh_sampler *s, desk *d, state *q, sh_token *t) {
    int made = q->n_tokens - q->n_prompt;
    bool stop =
        (!q->p.ignore_eos && has_id(q->p.eos, q->p.n_eos, t->id)) || has_id(q->p.stop_ids, q->p.n_stop_ids, t->id);
    bool full = made >= q->p.max_tokens || q->n_tokens >= s->max_context;
    t->finish = stop ? SH_FINISH_STOP : full ? SH_FINISH_LENGTH : SH_FINISH_NONE;
    if (q->longest == 0) return SH_OK;
    int64_t cut = -1;
    bool search = made > q->p.min_tokens;
    if (!stop) SH_TRY(add_text(d, q, t->id, search, &cut)); /* the text of a stop id is no part of the output */
    if (cut < 0 && t->finish != SH_FINISH_NONE) SH_TRY(add_text(d, q, -1, search, &cut));
    if (cut >= 0) {
        t->finish = SH_FINISH_STOP;
        t->text_len = cut > INT32_MAX ? INT32_MAX : (int32_t)cut;
    }
    return SH_OK;
}

static sh_status not_given(void) {
    SH_FAIL(SH_ESTATE, "the row was not given what it needs");
}

/* Whether another token may be generated. */
static bool has_room(const sh_sampler *s, const state *q) {
    return q->n_tokens - q->n_prompt < q->p.max_tokens && q->n_tokens < s->max_context;
}

static sh_status next(const sh_sampler *s, desk *d, state *q, view *v, sh_token *out) {
    int made = q->n_tokens - q->n_prompt;
    sh_token t = {.seq = q->seq, .index = made, .id = -1, .finish = SH_FINISH_LENGTH, .text_len = -1};
    if (has_room(s, q)) {
        SH_TRY(choose(s, d, q, v, &t));
        if (v->ask.kind != SH_ASK_NOTHING) return not_given();
        q->n_tokens++;
        SH_TRY(conclude(s, d, q, &t));
    } /* else an end without a token */
    *out = t;
    return SH_OK;
}

/* The sequence of a step at position pos. */
static sh_status find_step(const sh_sampler *s, uint64_t seq, int pos, state **out) {
    state *q = find(s, seq);
    if (!q) SH_FAIL(SH_ESTATE, "sequence %llu: a step before its start", (unsigned long long)seq);
    if (pos < 0 || (pos >= q->n_tokens && !s->quiet))
        SH_FAIL(SH_ESTATE, "sequence %llu: a step at position %d of %d", (unsigned long long)seq, pos, q->n_tokens);
    *out = q;
    return SH_OK;
}

static sh_status step(const sh_sampler *s, desk *d, uint64_t seq, int pos, view *v, sh_token *out, int *n) {
    state *q = NULL;
    SH_TRY(find_step(s, seq, pos, &q));
    int made = 1;
    sh_status st = SH_OK;
    if (pos + 1 == q->n_tokens)
        st = next(s, d, q, v, out);
    else if (is_scored(q, pos)) {
        sh_token t;
        st = score(s, d, q, pos, v, &t);
        if (st == SH_OK && v->ask.kind != SH_ASK_NOTHING) st = not_given();
        if (st == SH_OK) *out = t;
    } else
        made = 0;
    if (st != SH_OK) return sh_error_prefix(st, "sequence %llu, position %d", (unsigned long long)seq, pos);
    *n = made;
    return SH_OK;
}

sh_status sh_sampler_step(sh_sampler *s, uint64_t seq, int pos, float *logits, sh_token *out, int *n) {
    view v = {.x = logits};
    return step(s, &s->desks[0], seq, pos, &v, out, n);
}

/* --- many rows --- */

typedef struct rows_job {
    sh_sampler *s;
    const sh_sampler_row *row;
    int n;
    float *logits;
    sh_token *out;
    int *made;
    atomic_int next;
} rows_job;

/* The rows of one sequence, from row k: they follow each other, and each leaves the state that the next one needs. */
static void step_sequence(rows_job *j, desk *d, int k) {
    uint64_t seq = j->row[k].seq;
    for (; k < j->n && j->row[k].seq == seq; k++) {
        view v = {.x = j->logits + (size_t)k * (size_t)j->s->vocab};
        sh_status st = step(j->s, d, seq, j->row[k].pos, &v, &j->out[k], &j->made[k]);
        if (st == SH_OK) continue;
        if (d->row >= 0 && d->row < k) return;
        d->row = k;
        d->failed = st;
        snprintf(d->why, sizeof d->why, "%s", sh_error_text());
        return;
    }
}

static void step_member(void *arg, int member, int size) {
    rows_job *j = arg;
    (void)size;
    for (int k; member < j->s->n_desks && (k = atomic_fetch_add(&j->next, 1)) < j->n;) {
        if (k == 0 || j->row[k].seq != j->row[k - 1].seq) step_sequence(j, &j->s->desks[member], k);
        if (j->s->team) sh_team_poll(j->s->team, member);
    }
}

sh_status sh_sampler_steps(sh_sampler *s, const sh_sampler_row *row, int n, float *logits, sh_token *out, int *made) {
    rows_job j = {.s = s, .row = row, .n = n, .logits = logits, .out = out, .made = made};
    const desk *first = NULL;
    for (int i = 0; i < s->n_desks; i++) s->desks[i].row = -1;
    if (s->team && n > 1)
        sh_team_run(s->team, step_member, &j);
    else
        step_member(&j, 0, 1);
    for (int i = 0; i < s->n_desks; i++) {
        const desk *d = &s->desks[i];
        if (d->row >= 0 && (!first || d->row < first->row)) first = d;
    }
    return first ? sh_error_set(first->failed, __FILE__, __LINE__, "%s", first->why) : SH_OK;
}

/* --- parts --- */

/* What will be asked of the row: every part finds the same. `samples`: the next token is chosen. */
static sh_digest_want want_of(const sh_sampler *s, const state *q, int pos, bool samples) {
    const sh_sampling *p = &q->p;
    bool scores = !samples && is_scored(q, pos), drawn = samples && p->temperature >= SH_DRAW_GREEDY;
    bool filtered = sh_draw_is_filtered(p, s->vocab), top_k = sh_draw_has_top_k(p, s->vocab);
    sh_digest_want w = {.best = 1, .id = scores ? scored_id(s, q, pos) : -1};
    w.lse = (samples && p->logprobs >= 0) || scores;
    if (drawn && (!filtered || (!top_k && p->top_p < 1))) w.temperature = p->temperature;
    if (p->logprobs > 0 || (drawn && filtered)) w.best = SH_DIGEST_BEST;
    if (drawn && top_k && w.best < p->top_k + SH_DIGEST_MARGIN)
        w.best = p->top_k < SH_DIGEST_MOST - SH_DIGEST_MARGIN ? p->top_k + SH_DIGEST_MARGIN : SH_DIGEST_MOST;
    return w;
}

sh_status sh_sampler_digest(sh_sampler *s, uint64_t seq, int pos, float *x, int n, int base, uint8_t *to,
                            size_t *bytes) {
    state *q = NULL;
    SH_TRY(find_step(s, seq, pos, &q));
    bool samples = pos + 1 >= q->n_tokens; /* a quiet part counts no tokens */
    if (samples) ban_all(q, pos + 1 - q->n_prompt, x, n, base);
    sh_digest_want w = want_of(s, q, pos, samples);
    sh_digest_make(s->desks[0].draw, x, n, base, &w, to, bytes);
    return SH_OK;
}

sh_status sh_sampler_ask(sh_sampler *s, uint64_t seq, int pos, sh_row *row, sh_row_ask *ask) {
    state *q = NULL;
    view v = view_of(row);
    sh_token t;
    sh_status st = SH_OK;
    SH_TRY(find_step(s, seq, pos, &q));
    if (pos + 1 == q->n_tokens) {
        if (has_room(s, q)) st = choose(s, &s->desks[0], q, &v, &t);
    } else if (is_scored(q, pos))
        st = score(s, &s->desks[0], q, pos, &v, &t);
    if (st != SH_OK) return sh_error_prefix(st, "sequence %llu, position %d", (unsigned long long)seq, pos);
    *ask = v.ask;
    return SH_OK;
}

sh_status sh_sampler_step_row(sh_sampler *s, uint64_t seq, int pos, sh_row *row, sh_token *out, int *n) {
    view v = view_of(row);
    return step(s, &s->desks[0], seq, pos, &v, out, n);
}
