/* A request in hand. See running.h. */
#include "coordinator/running.h"

#include <stdlib.h>
#include <string.h>

/* --- arrays --------------------------------------------------------------------------------------------------------
 */

static sh_status grow(void *array, size_t size, int32_t cap) {
    void **p = array, *q = realloc(*p, size * (size_t)cap);
    if (!q) SH_FAIL(SH_EMEMORY, "no memory for %d tokens", cap);
    *p = q;
    return SH_OK;
}

/* logprobs: as in sh_sampling (−1: no values are kept). */
static sh_status scores_reserve(sh_scores *s, int32_t n, int32_t logprobs) {
    if (n <= s->cap) return SH_OK;
    int32_t cap = s->cap ? s->cap : 32;
    while (cap < n) cap *= 2;
    if (logprobs >= 0) SH_TRY(grow(&s->logprob, sizeof *s->logprob, cap));
    if (logprobs > 0) {
        SH_TRY(grow(&s->n_top, sizeof *s->n_top, cap));
        SH_TRY(grow(&s->top, sizeof *s->top * SH_MAX_TOP_LOGPROBS, cap));
    }
    s->cap = cap;
    return SH_OK;
}

static void scores_release(sh_scores *s) {
    free(s->logprob);
    free(s->n_top);
    free(s->top);
}

static void scores_put(sh_scores *s, const Shoal__Tokens *t, size_t i) {
    if (s->logprob) s->logprob[s->n] = t->logprob[i];
    if (s->n_top) s->n_top[s->n] = 0;
    if (s->n_top && t->n_top) {
        const Shoal__TopLogprobs *top = t->top[i];
        sh_top_logprob *to = s->top + (size_t)s->n * SH_MAX_TOP_LOGPROBS;
        s->n_top[s->n] = (int32_t)top->n_id;
        for (size_t k = 0; k < top->n_id; k++) to[k] = (sh_top_logprob){top->id[k], top->logprob[k]};
    }
    s->n++;
}

/* --- taking tokens -------------------------------------------------------------------------------------------------
 */

static sh_status check_message(const sh_running *r, const Shoal__Tokens *t, int32_t have, int32_t first, int32_t most) {
    const sh_sampling *s = &r->request.sampling;
    bool score = t->has_score && t->score;
    size_t n = t->n_id;
    if (t->offset < first || n > (size_t)most || (size_t)t->offset > (size_t)most + (size_t)first - n)
        SH_FAIL(SH_EPEER, "tokens of request %llu: places %d + %zu are outside of %d to %d", (unsigned long long)r->key,
                t->offset, n, first, most + first - 1);
    if (t->offset > have + first)
        SH_FAIL(SH_EPEER, "tokens of request %llu begin at %d where %d is due", (unsigned long long)r->key, t->offset,
                have + first);
    bool values = s->logprobs >= 0 || score;
    if ((values && t->n_logprob != n) || (t->n_top && t->n_top != n))
        SH_FAIL(SH_EPEER, "tokens of request %llu come without the log-probabilities asked for",
                (unsigned long long)r->key);
    for (size_t i = 0; i < t->n_top; i++)
        if (t->top[i]->n_id != t->top[i]->n_logprob || t->top[i]->n_id > SH_MAX_TOP_LOGPROBS)
            SH_FAIL(SH_EPEER, "tokens of request %llu carry %zu alternatives", (unsigned long long)r->key,
                    t->top[i]->n_id);
    if (t->has_finish && (t->finish < SH_FINISH_NONE || t->finish > SH_FINISH_CANCEL))
        SH_FAIL(SH_EPEER, "tokens of request %llu end with %d", (unsigned long long)r->key, t->finish);
    return SH_OK;
}

sh_status sh_running_take(sh_running *r, const Shoal__Tokens *t, int *added) {
    bool score = t->has_score && t->score;
    const sh_sampling *p = &r->request.sampling;
    sh_scores *s = score ? &r->prompt : &r->tokens;
    int32_t first = score ? 1 : 0; /* scores count prompt places, from 1 */
    int32_t most = score ? (p->score_prompt ? (int32_t)r->request.prompt.n - 1 : 0) : p->max_tokens;
    SH_TRY(check_message(r, t, s->n, first, most));
    int32_t values = score && p->logprobs < 0 ? 0 : p->logprobs;
    SH_TRY(scores_reserve(s, t->offset - first + (int32_t)t->n_id, values));
    int n = 0;
    for (size_t i = (size_t)(s->n + first - t->offset); i < t->n_id; i++) {
        if (!score) {
            SH_TRY(sh_ids_add(&r->ids, t->id[i]));
            n++;
        }
        scores_put(s, t, i);
    }
    if (t->has_finish && t->finish != SH_FINISH_NONE && t->offset - first + (int32_t)t->n_id == s->n) {
        r->finish = (sh_finish)t->finish;
        r->text_len = t->has_text_len ? t->text_len : -1;
    }
    *added = n;
    return SH_OK;
}

/* --- storing -------------------------------------------------------------------------------------------------------
 */

/* The entries [from, n) as one Tokens message; the parts are borrowed from r, the tops from `tops`. */
static sh_status fill_message(sh_running *r, bool score, Shoal__Tokens *t, Shoal__TopLogprobs **list,
                              Shoal__TopLogprobs *top, int32_t *flat_id, float *flat_logprob) {
    sh_scores *s = score ? &r->prompt : &r->tokens;
    int32_t from = s->saved, n = s->n - from;
    t->key = r->key;
    t->has_score = t->score = score;
    t->offset = from + (score ? 1 : 0);
    t->n_id = (size_t)n;
    t->id = score ? r->request.prompt.id + from + 1 : r->ids.id + from;
    if (s->logprob) t->n_logprob = (size_t)n, t->logprob = s->logprob + from;
    if (!s->n_top) return SH_OK;
    t->n_top = (size_t)n;
    t->top = list;
    for (int32_t i = 0; i < n; i++) {
        size_t at = (size_t)i * SH_MAX_TOP_LOGPROBS;
        const sh_top_logprob *e = s->top + (size_t)(from + i) * SH_MAX_TOP_LOGPROBS;
        shoal__top_logprobs__init(&top[i]);
        top[i].n_id = top[i].n_logprob = (size_t)s->n_top[from + i];
        top[i].id = flat_id + at;
        top[i].logprob = flat_logprob + at;
        list[i] = &top[i];
        for (size_t k = 0; k < top[i].n_id; k++) flat_id[at + k] = e[k].id, flat_logprob[at + k] = e[k].logprob;
    }
    return SH_OK;
}

static sh_status save_part(sh_running *r, sh_store *st, bool score) {
    sh_scores *s = score ? &r->prompt : &r->tokens;
    size_t n = (size_t)(s->n - s->saved), tops = s->n_top ? n : 0;
    if (n == 0) return SH_OK;
    Shoal__Tokens t = SHOAL__TOKENS__INIT;
    Shoal__TopLogprobs **list = calloc(tops + 1, sizeof *list), *top = calloc(tops + 1, sizeof *top);
    int32_t *ids = calloc(tops * SH_MAX_TOP_LOGPROBS + 1, sizeof *ids);
    float *values = calloc(tops * SH_MAX_TOP_LOGPROBS + 1, sizeof *values);
    uint8_t *packed = NULL;
    sh_status rc = SH_OK;
    if (!list || !top || !ids || !values)
        rc = sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "no memory to save progress");
    else
        rc = fill_message(r, score, &t, list, top, ids, values);
    size_t len = rc == SH_OK ? shoal__tokens__get_packed_size(&t) : 0;
    if (rc == SH_OK && !(packed = malloc(len + 1)))
        rc = sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "no memory to save progress");
    if (rc == SH_OK) shoal__tokens__pack(&t, packed);
    if (rc == SH_OK) rc = sh_store_progress_add(st, r->key, score, t.offset, packed, len);
    if (rc == SH_OK) s->saved = s->n;
    free(list);
    free(top);
    free(ids);
    free(values);
    free(packed);
    return rc;
}

sh_status sh_running_save(sh_running *r, sh_store *s, int *saved) {
    int before = r->tokens.saved;
    SH_TRY(save_part(r, s, true));
    SH_TRY(save_part(r, s, false));
    *saved = r->tokens.saved - before;
    return SH_OK;
}

static sh_status load_part(void *ctx, const void *p, size_t n) {
    sh_running *r = ctx;
    Shoal__Tokens *t = shoal__tokens__unpack(NULL, n, p);
    if (!t) SH_FAIL(SH_EFORMAT, "stored progress of request %llu cannot be read", (unsigned long long)r->key);
    int added;
    sh_status st = sh_running_take(r, t, &added);
    shoal__tokens__free_unpacked(t, NULL);
    return st;
}

/* --- life ----------------------------------------------------------------------------------------------------------
 */

sh_status sh_running_create(const sh_intake *in, sh_store *s, const sh_stored_request *q, sh_running **out) {
    sh_running *r = calloc(1, sizeof *r);
    if (!r) SH_FAIL(SH_EMEMORY, "no memory for a request");
    r->key = q->key;
    r->job = q->job;
    r->group = -1;
    r->text_len = -1;
    sh_status st = sh_intake_line(in, q->line, q->len, q->number, &r->request);
    if (st == SH_OK) st = sh_store_progress(s, r->key, load_part, r);
    if (st != SH_OK) {
        sh_running_destroy(&r);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    r->tokens.saved = r->tokens.n;
    r->prompt.saved = r->prompt.n;
    *out = r;
    return SH_OK;
}

void sh_running_destroy(sh_running **rp) {
    sh_running *r = *rp;
    if (!r) return;
    sh_request_release(&r->request);
    sh_ids_release(&r->ids);
    scores_release(&r->tokens);
    scores_release(&r->prompt);
    free(r->fault);
    free(r);
    *rp = NULL;
}

/* --- what is made of it --------------------------------------------------------------------------------------------
 */

static void fill_sampling(const sh_sampling *s, Shoal__Sampling *to, ProtobufCBinaryData stop[SH_MAX_STOPS]) {
    to->temperature = s->temperature;
    to->top_p = s->top_p;
    to->min_p = s->min_p;
    to->top_k = s->top_k;
    to->seed = s->seed;
    to->choice = s->choice;
    to->max_tokens = s->max_tokens;
    to->min_tokens = s->min_tokens;
    to->ignore_eos = s->ignore_eos;
    to->score_prompt = s->score_prompt;
    to->logprobs = s->logprobs;
    to->n_eos = (size_t)s->n_eos, to->eos = (int32_t *)(uintptr_t)s->eos;
    to->n_stop_ids = (size_t)s->n_stop_ids, to->stop_ids = (int32_t *)(uintptr_t)s->stop_ids;
    to->n_suppress = (size_t)s->n_suppress, to->suppress = (int32_t *)(uintptr_t)s->suppress;
    to->n_stop = (size_t)s->n_stops, to->stop = stop;
    for (int i = 0; i < s->n_stops; i++)
        stop[i] = (ProtobufCBinaryData){s->stop_len[i], (uint8_t *)(uintptr_t)s->stop[i]};
}

sh_status sh_running_work(const sh_running *r, sh_buf *to) {
    ProtobufCBinaryData stop[SH_MAX_STOPS];
    Shoal__Sampling s = SHOAL__SAMPLING__INIT;
    fill_sampling(&r->request.sampling, &s, stop);
    Shoal__Work w = SHOAL__WORK__INIT, *list = &w;
    w.key = r->key;
    w.n_prompt = r->request.prompt.n, w.prompt = r->request.prompt.id;
    w.n_generated = r->ids.n, w.generated = r->ids.id;
    w.sampling = &s;
    w.has_scored = r->prompt.n > 0, w.scored = r->prompt.n;
    Shoal__ToRank m = SHOAL__TO_RANK__INIT;
    m.n_work = 1, m.work = &list;
    SH_TRY(sh_buf_reserve(to, shoal__to_rank__get_packed_size(&m)));
    to->len += shoal__to_rank__pack(&m, to->data + to->len);
    return SH_OK;
}

sh_status sh_running_row(const sh_running *r, const sh_intake *in, int64_t created, sh_buf *to) {
    sh_output o = {.id = r->ids.id,
                   .logprob = r->tokens.logprob,
                   .n_top = r->tokens.n_top,
                   .top = r->tokens.top,
                   .n = (int32_t)r->ids.n,
                   .score = r->prompt.logprob,
                   .score_n_top = r->prompt.n_top,
                   .score_top = r->prompt.top,
                   .n_scores = r->prompt.n,
                   .finish = r->finish,
                   .text_len = r->text_len};
    return sh_result_row(in, &r->request, &o, created, to);
}
