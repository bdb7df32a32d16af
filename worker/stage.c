/*
 * The stage: buffers, the step, the sampler at the end. See stage.h.
 *
 * A message is the descriptor as the leader encoded it, zeros up to a multiple of 64, then the cut block. No send can
 * wait for ever: rank 0 starts a step only when its buffers are free; the last stage has one answer buffer per
 * micro-batch in flight and one more, so it never waits; hence each stage between is waited for by nobody who waits for
 * it. An empty micro-batch of a lane travels and is computed like any other, but is not answered.
 */
#include "worker/stage.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "worker/backoff.h"
#include "worker/tensor.h"
#include "worker/tokens.h"

enum { SENDS = 2, LOGIT_ROWS = 16 };

typedef struct sending {
    sh_buf answer;  /* last stage */
    uint8_t *block; /* other stages */
    int req;        /* −1: free */
} sending;

/* Rank 0: a descriptor on its way to one of the other members of its stage. */
typedef struct handout {
    sh_buf encoded;
    int req;
} handout;

struct sh_stage {
    sh_stage_options o;
    sh_link *link;
    int stage, member;
    bool leads, is_last, samples; /* rank 0; last stage; a member of it that samples */
    sh_config part;               /* the model as this member sees it (o.share) */
    sh_tensor_link *tensor;
    sh_model *model;
    size_t descriptor_max, recv_bytes, send_bytes;
    uint8_t *recv;   /* from the rank before; rank 0: answers of the last stage */
    size_t received; /* bytes of descriptor in it */
    sending *sends;
    int n_sends, next_send;
    sh_buf encoded;    /* rank 0: its own descriptor */
    handout *handouts; /* rank 0: [SENDS][width − 1] */
    int next_handout;
    sh_batch batch;   /* ranks above 0: the descriptor decoded */
    sh_token *tokens; /* rank 0: [max_rows] */
    uint64_t steps;
    double exchange; /* seconds */
    /* last stage */
    sh_tokenizer *tokenizer;
    sh_sampler *sampler;
    float *hidden, *logits, *own; /* own: logits of a share */
    size_t hidden_bytes, logit_bytes;
    int waiting;   /* rank 0 as a last stage: answers not yet taken */
    int next_lane; /* rank 0: whom to ask first for an answer */
};

static size_t align64(size_t n) {
    return (n + 63) / 64 * 64;
}

static size_t cut_bytes(const sh_stage *s, int cut, int rows, int kept) {
    return sh_model_cut_bytes(&s->part, s->o.kv_type, cut, rows, kept);
}

static size_t message_bytes(const sh_stage *s, int cut) {
    int rows = sh_leader_max_rows(s->o.schedule);
    return align64(sh_leader_descriptor_bytes(s->o.schedule)) + cut_bytes(s, cut, rows, rows);
}

/* ---- creation -------------------------------------------------------------------------------------------------------
 */

static sh_status create_peers(sh_stage *s) {
    const sh_stage_options *o = &s->o;
    sh_tensor_options t = {.link = o->link,
                           .first_rank = s->stage * o->width,
                           .share = o->share,
                           .config = o->config,
                           .max_rows = sh_leader_max_rows(o->schedule)};
    sh_config_share(o->config, o->share, &s->part);
    return o->share.parts > 1 ? sh_tensor_link_create(&t, &s->tensor) : SH_OK;
}

static sh_status create_model(sh_stage *s) {
    const sh_stage_options *o = &s->o;
    sh_model_options m = {.mode = o->mode,
                          .kv_type = o->kv_type,
                          .first = o->first,
                          .last = o->last,
                          .threads = o->threads,
                          .cpus = o->cpus,
                          .n_cpus = o->n_cpus,
                          .max_rows = sh_leader_max_rows(o->schedule),
                          .max_spans = o->schedule->max_seqs,
                          .max_context = o->schedule->max_context,
                          .share = o->share,
                          .peers = s->tensor ? sh_tensor_link_peers(s->tensor) : NULL};
    memcpy(m.pages, o->schedule->pages, sizeof m.pages);
    return sh_model_create(o->model_dir, o->config, &m, &s->model);
}

static sh_status create_hidden(sh_stage *s) {
    void *p = NULL;
    s->hidden_bytes = (size_t)sh_leader_max_rows(s->o.schedule) * (size_t)s->o.config->hidden * sizeof(float);
    SH_TRY(sh_mem_alloc(s->hidden_bytes, "final hidden states", &p));
    s->hidden = p;
    return SH_OK;
}

static sh_status create_logits(sh_stage *s) {
    const sh_stage_options *o = &s->o;
    void *p = NULL;
    s->logit_bytes = LOGIT_ROWS * (size_t)o->config->vocab * sizeof(float);
    SH_TRY(sh_mem_alloc(s->logit_bytes, "logits", &p));
    s->logits = p;
    if (!s->tensor) return SH_OK;
    SH_TRY(sh_mem_alloc(s->logit_bytes, "logits", &p));
    s->own = p;
    return SH_OK;
}

static sh_status create_sampler(sh_stage *s) {
    const sh_stage_options *o = &s->o;
    SH_TRY(sh_tokenizer_load(o->model_dir, &s->tokenizer));
    return sh_sampler_create(sh_model_kernels(s->model), s->tokenizer, o->config->vocab, o->schedule->max_seqs,
                             o->schedule->max_context, &s->sampler);
}

/* Rank 0: descriptors for the other members of its stage, and its own. */
static sh_status create_handouts(sh_stage *s) {
    int n = SENDS * (s->o.width - 1);
    SH_TRY(sh_buf_reserve(&s->encoded, s->descriptor_max));
    s->handouts = calloc((size_t)n + 1, sizeof *s->handouts);
    if (!s->handouts) SH_FAIL(SH_EMEMORY, "no memory for %d descriptors", n);
    for (int i = 0; i < n; i++) s->handouts[i].req = -1;
    for (int i = 0; i < n; i++) SH_TRY(sh_buf_reserve(&s->handouts[i].encoded, s->descriptor_max));
    return SH_OK;
}

static sh_status create_buffers(sh_stage *s) {
    const sh_stage_options *o = &s->o;
    int rows = sh_leader_max_rows(o->schedule);
    void *p = NULL;
    s->descriptor_max = sh_leader_descriptor_bytes(o->schedule);
    s->recv_bytes = s->leads ? sh_tokens_bytes(rows) : message_bytes(s, o->first);
    SH_TRY(sh_mem_alloc(s->recv_bytes, "receive buffer", &p));
    s->recv = p;
    s->n_sends = s->is_last ? sh_leader_in_flight(o->schedule) + 1 : SENDS;
    s->sends = calloc((size_t)s->n_sends, sizeof *s->sends);
    if (!s->sends) SH_FAIL(SH_EMEMORY, "no memory for send buffers");
    for (int i = 0; i < s->n_sends; i++) s->sends[i].req = -1;
    if (!s->is_last) s->send_bytes = message_bytes(s, o->last);
    for (int i = 0; i < s->n_sends; i++) {
        if (s->is_last) {
            SH_TRY(sh_buf_reserve(&s->sends[i].answer, sh_tokens_bytes(rows)));
            continue;
        }
        SH_TRY(sh_mem_alloc(s->send_bytes, "send buffer", &p));
        s->sends[i].block = p;
    }
    if (!s->leads) return sh_batch_create(2 * s->descriptor_max, &s->batch);
    SH_TRY(create_handouts(s));
    s->tokens = calloc((size_t)rows, sizeof *s->tokens);
    if (!s->tokens) SH_FAIL(SH_EMEMORY, "no memory for %d tokens", rows);
    return SH_OK;
}

sh_status sh_stage_create(const sh_stage_options *o, sh_stage **out) {
    sh_stage *s = calloc(1, sizeof *s);
    if (!s) SH_FAIL(SH_EMEMORY, "no memory for a stage");
    s->o = *o;
    s->link = o->link;
    s->stage = o->link->rank / o->width;
    s->member = o->link->rank % o->width;
    s->leads = o->link->rank == 0;
    s->is_last = s->stage == o->stages - 1;
    s->samples = s->is_last && (o->lanes || s->member == 0);
    sh_status st = create_peers(s);
    if (st == SH_OK) st = create_model(s);
    if (st == SH_OK) st = create_buffers(s);
    if (st == SH_OK && s->is_last) st = create_hidden(s);
    if (st == SH_OK && (s->samples || (s->is_last && s->tensor))) st = create_logits(s);
    if (st == SH_OK && s->samples) st = create_sampler(s);
    if (st != SH_OK) {
        sh_stage_destroy(&s);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = s;
    return SH_OK;
}

void sh_stage_destroy(sh_stage **p) {
    sh_stage *s = *p;
    if (!s) return;
    for (int i = 0; s->sends && i < s->n_sends; i++) {
        sh_buf_release(&s->sends[i].answer);
        if (s->sends[i].block) sh_mem_free(s->sends[i].block, s->send_bytes);
    }
    for (int i = 0; s->handouts && i < SENDS * (s->o.width - 1); i++) sh_buf_release(&s->handouts[i].encoded);
    free(s->handouts);
    free(s->sends);
    free(s->tokens);
    sh_mem_free(s->recv, s->recv_bytes);
    sh_mem_free(s->hidden, s->hidden_bytes);
    sh_mem_free(s->logits, s->logit_bytes);
    sh_mem_free(s->own, s->logit_bytes);
    sh_buf_release(&s->encoded);
    sh_batch_release(&s->batch);
    sh_sampler_destroy(&s->sampler);
    sh_tokenizer_destroy(&s->tokenizer);
    sh_model_destroy(&s->model);
    sh_tensor_link_destroy(&s->tensor);
    free(s);
    *p = NULL;
}

/* ---- sending
 * ----------------------------------------------------------------------------------------------------------- */

static int n_handouts(const sh_stage *s) {
    return s->leads ? SENDS * (s->o.width - 1) : 0;
}

static sh_status test_send(sh_stage *s, int *req) {
    bool done = false;
    if (*req < 0) return SH_OK;
    SH_TRY(s->link->ops->test(s->link, *req, &done));
    if (done) *req = -1;
    return SH_OK;
}

sh_status sh_stage_progress(sh_stage *s) {
    for (int i = 0; i < s->n_sends; i++) SH_TRY(test_send(s, &s->sends[i].req));
    for (int i = 0; i < n_handouts(s); i++) SH_TRY(test_send(s, &s->handouts[i].req));
    return SH_OK;
}

bool sh_stage_has_room(const sh_stage *s) {
    for (int m = 1; m < s->o.width && s->leads; m++)
        if (s->handouts[s->next_handout * (s->o.width - 1) + m - 1].req >= 0) return false;
    return s->sends[s->next_send].req < 0;
}

bool sh_stage_is_idle(const sh_stage *s) {
    for (int i = 0; i < s->n_sends; i++)
        if (s->sends[i].req >= 0) return false;
    for (int i = 0; i < n_handouts(s); i++)
        if (s->handouts[i].req >= 0) return false;
    return true;
}

/* The next buffer in turn, once the stage after has taken what it held. */
static sh_status claim_send(sh_stage *s, sending **out) {
    sh_backoff wait = {0};
    while (s->sends[s->next_send].req >= 0) {
        SH_TRY(sh_stage_progress(s));
        if (s->sends[s->next_send].req >= 0) sh_backoff_wait(&wait);
    }
    *out = &s->sends[s->next_send];
    s->next_send = (s->next_send + 1) % s->n_sends;
    return SH_OK;
}

/* ---- the step
 * ------------------------------------------------------------------------------------------------------------ */

static sh_status forward_on(sh_stage *s, const sh_batch *b, const void *descriptor, size_t len, const void *in) {
    sending *to = NULL;
    double t0 = sh_now();
    SH_TRY(claim_send(s, &to));
    s->exchange += sh_now() - t0;
    size_t at = align64(len), n = cut_bytes(s, s->o.last, b->n_rows, b->n_kept);
    memcpy(to->block, descriptor, len);
    memset(to->block + len, 0, at - len);
    SH_TRY(sh_model_forward(s->model, b, in, to->block + at));
    SH_TRY(sh_stage_progress(s));
    return s->link->ops->send(s->link, s->link->rank + s->o.width, SH_TAG_BATCH, to->block, at + n, &to->req);
}

/* Samples kept rows [k, k + n) of the batch; *span and *row are where row k lies. */
static sh_status sample_rows(sh_stage *s, const sh_batch *b, int n, int *span, int *row, sh_buf *answer, int *count) {
    size_t vocab = (size_t)s->o.config->vocab;
    for (int i = 0; i < n; i++) {
        while (*row == b->spans[*span].keep) {
            ++*span;
            *row = 0;
        }
        const sh_span *p = &b->spans[*span];
        sh_token t;
        int got = 0;
        int pos = p->pos + p->rows - p->keep + *row;
        SH_TRY(sh_sampler_step(s->sampler, p->seq, pos, s->logits + (size_t)i * vocab, &t, &got));
        if (got) SH_TRY(sh_tokens_add(answer, &t));
        *count += got;
        ++*row;
    }
    return SH_OK;
}

static sh_status logits_of(sh_stage *s, int k, int n) {
    const float *hidden = s->hidden + (size_t)k * (size_t)s->o.config->hidden;
    sh_model_logits(s->model, hidden, n, s->tensor ? s->own : s->logits);
    if (!s->tensor) return SH_OK;
    const sh_peers *p = sh_tensor_link_peers(s->tensor);
    return p->gather(p->ctx, -1, SH_JOINT_LOGITS, s->own, n, s->o.config->vocab, SH_SHARE_VOCAB, s->logits);
}

/* Logits and tokens of the kept rows, as the answer to rank 0. */
static sh_status sample_batch(sh_stage *s, const sh_batch *b, sending *to) {
    if (to) {
        sh_buf_clear(&to->answer);
        SH_TRY(sh_tokens_begin(&to->answer, b->step));
    }
    int span = 0, row = 0, count = 0;
    for (int k = 0; k < b->n_kept; k += LOGIT_ROWS) {
        int n = b->n_kept - k < LOGIT_ROWS ? b->n_kept - k : LOGIT_ROWS;
        SH_TRY(logits_of(s, k, n));
        if (!s->samples) continue;
        SH_TRY(sample_rows(s, b, n, &span, &row, &to->answer, &count));
        SH_TRY(sh_stage_progress(s));
    }
    if (!to) return SH_OK;
    SH_TRY(sh_tokens_end(&to->answer, count));
    if (!s->leads) return s->link->ops->send(s->link, 0, SH_TAG_TOKENS, to->answer.data, to->answer.len, &to->req);
    s->waiting++;
    return SH_OK;
}

static sh_status finish(sh_stage *s, const sh_batch *b, const void *in) {
    sending *to = NULL;
    for (int i = 0; s->samples && i < b->n_drops; i++) sh_sampler_drop(s->sampler, b->drops[i]);
    for (int i = 0; s->samples && i < b->n_starts; i++) SH_TRY(sh_sampler_start(s->sampler, &b->starts[i]));
    SH_TRY(sh_model_forward(s->model, b, in, s->hidden));
    if ((!s->samples && !s->tensor) || b->n_spans == 0) return SH_OK;
    if (s->samples) SH_TRY(claim_send(s, &to));
    return sample_batch(s, b, to);
}

static sh_status step(sh_stage *s, const sh_batch *b, const void *descriptor, size_t len, const void *in) {
    SH_TRY(s->is_last ? finish(s, b, in) : forward_on(s, b, descriptor, len, in));
    s->steps++;
    return SH_OK;
}

static sh_status encode(const sh_stage *s, const sh_batch *b, sh_buf *to) {
    sh_buf_clear(to);
    SH_TRY(sh_batch_encode(b, to));
    if (to->len > s->descriptor_max)
        SH_FAIL(SH_ESTATE, "descriptor of %zu bytes: room is %zu", to->len, s->descriptor_max);
    return SH_OK;
}

/* Gives the other members of the first stage their micro-batches; sh_stage_has_room said that there are buffers. */
static sh_status hand_out(sh_stage *s, const sh_batch *batches) {
    handout *h = s->handouts + s->next_handout * (s->o.width - 1);
    s->next_handout = (s->next_handout + 1) % SENDS;
    for (int m = 1; m < s->o.width; m++) {
        SH_TRY(encode(s, s->o.lanes ? &batches[m] : batches, &h[m - 1].encoded));
        SH_TRY(
            s->link->ops->send(s->link, m, SH_TAG_BATCH, h[m - 1].encoded.data, h[m - 1].encoded.len, &h[m - 1].req));
    }
    return SH_OK;
}

sh_status sh_stage_lead(sh_stage *s, const sh_batch *batches) {
    SH_TRY(hand_out(s, batches));
    sh_buf_clear(&s->encoded);
    if (!s->is_last) SH_TRY(encode(s, batches, &s->encoded));
    return step(s, batches, s->encoded.data, s->encoded.len, NULL);
}

sh_status sh_stage_receive(sh_stage *s, bool *got) {
    int source = 0, from = s->stage ? s->link->rank - s->o.width : 0;
    size_t len = 0, used = 0;
    bool found = false;
    SH_TRY(sh_stage_progress(s));
    SH_TRY(s->link->ops->probe(s->link, from, SH_TAG_BATCH, &found, &source, &len));
    *got = found;
    if (!found) return SH_OK;
    if (len > s->recv_bytes)
        SH_FAIL(SH_EPEER, "micro-batch of %zu bytes from rank %d: room is %zu", len, from, s->recv_bytes);
    double t0 = sh_now();
    SH_TRY(s->link->ops->recv(s->link, from, SH_TAG_BATCH, s->recv, len));
    s->exchange += sh_now() - t0;
    SH_TRY(sh_batch_decode(&s->batch, s->recv, len, &used));
    const sh_batch *b = &s->batch;
    size_t need = cut_bytes(s, s->o.first, b->n_rows, b->n_kept);
    if (b->n_rows > sh_leader_max_rows(s->o.schedule) || b->n_spans > s->o.schedule->max_seqs ||
        used > s->descriptor_max || len != (s->stage ? align64(used) + need : used))
        SH_FAIL(SH_EPEER,
                "micro-batch of %d rows, %zu bytes of descriptor and %zu in all from rank %d: not what it should be",
                b->n_rows, used, len, from);
    s->received = used;
    return SH_OK;
}

sh_status sh_stage_serve(sh_stage *s) {
    return step(s, &s->batch, s->recv, s->received, s->stage ? s->recv + align64(s->received) : NULL);
}

/* A message with an answer, of any lane: who was heard last is asked last. */
static sh_status receive_answer(sh_stage *s, bool *found, int *lane, size_t *len) {
    int n = sh_stage_lanes(&s->o), source = 0;
    for (int i = 0; i < n && !*found; i++) {
        int m = (s->next_lane + i) % n, from = (s->o.stages - 1) * s->o.width + m;
        if (from == 0) continue; /* its own answers are in `waiting` */
        SH_TRY(s->link->ops->probe(s->link, from, SH_TAG_TOKENS, found, &source, len));
        if (!*found) continue;
        if (*len > s->recv_bytes)
            SH_FAIL(SH_EPEER, "answer of %zu bytes from rank %d: room is %zu", *len, from, s->recv_bytes);
        SH_TRY(s->link->ops->recv(s->link, from, SH_TAG_TOKENS, s->recv, *len));
        *lane = m;
        s->next_lane = (m + 1) % n;
    }
    return SH_OK;
}

sh_status sh_stage_answer(sh_stage *s, bool *got, int *lane, uint64_t *at, const sh_token **tokens, int *n) {
    const void *data = s->recv;
    size_t len = 0;
    bool found = s->waiting > 0;
    if (found) { /* taken before the next step is made: the last buffer filled holds it */
        const sh_buf *b = &s->sends[(s->next_send + s->n_sends - 1) % s->n_sends].answer;
        data = b->data;
        len = b->len;
        s->waiting--;
        *lane = 0;
    } else {
        SH_TRY(receive_answer(s, &found, lane, &len));
    }
    if (found) {
        SH_TRY(sh_tokens_decode(data, len, s->tokens, sh_leader_max_rows(s->o.schedule), at, n));
        *tokens = s->tokens;
    }
    *got = found;
    return SH_OK;
}

double sh_stage_exchange_seconds(const sh_stage *s) {
    return s->exchange + sh_model_time(s->model).exchange;
}

uint64_t sh_stage_steps(const sh_stage *s) {
    return s->steps;
}

const sh_model *sh_stage_model(const sh_stage *s) {
    return s->model;
}
