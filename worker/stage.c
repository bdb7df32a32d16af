/*
 * The stage: buffers, the step, the sampler at the end. See stage.h.
 *
 * A message is the descriptor as the leader encoded it, zeros up to a multiple of 64, then the cut block. No send can
 * wait for ever: rank 0 starts a step only when its buffers are free; the last stage has one answer buffer per
 * micro-batch in flight and one more, so it never waits; hence each stage between is waited for by nobody who waits for
 * it. An empty micro-batch of a lane travels and is computed like any other, but is not answered.
 */
#include "worker/stage.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/mem.h"
#include "model/spread.h"
#include "partition/plan.h"
#include "worker/backoff.h"
#include "worker/context.h"
#include "worker/load_link.h"
#include "worker/prefill.h"
#include "worker/tensor.h"
#include "worker/tokens.h"
#include "worker/vocabulary.h"

enum { SENDS = 2 };
#define POLL_SECONDS 100e-6 /* between two looks at what is under way, while a step computes */

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
    sh_experts *experts;      /* where members are lanes: what they send each other */
    sh_context *context;      /* where they share positions out */
    sh_kv_sender *sender;     /* a stage that makes the K/V of prompts */
    sh_kv_receiver *receiver; /* one that takes them; borrowed */
    sh_peers peers;           /* of these three */
    sh_model *model;
    size_t descriptor_max, recv_bytes, send_bytes;
    uint8_t *recv;   /* from the rank before; rank 0: answers of the last stage */
    size_t received; /* bytes of descriptor in it */
    sending *sends;
    int n_sends, next_send;
    sh_buf encoded;    /* rank 0: its own descriptor */
    handout *handouts; /* rank 0: [SENDS][width − 1] */
    int next_handout;
    handout *prompts; /* rank 0: [n_prompts] descriptors on their way to the first prefill rank */
    int n_prompts;
    int next_prompts;
    sh_batch batch;   /* ranks above 0: the descriptor decoded */
    sh_token *tokens; /* rank 0: [max_rows] */
    uint64_t steps;
    double exchange; /* seconds */
    double received_at;
    double polled_at; /* by poll, below */
    sh_status failed; /* of poll: told by the next progress */
    char why[512];
    /* last stage */
    sh_tokenizer *tokenizer;
    sh_sampler *sampler;
    sh_vocabulary *vocabulary; /* where members divide it; then all of them sample together */
    float *hidden, *logits;
    size_t hidden_bytes, logit_bytes;
    int waiting;   /* rank 0 as a last stage: answers not yet taken */
    int next_lane; /* rank 0: whom to ask first for an answer */
};

static size_t cut_bytes(const sh_stage *s, int cut, int rows, int kept) {
    return sh_model_cut_bytes(&s->part, s->o.kv_type, cut, rows, kept);
}

static size_t message_bytes(const sh_stage *s, int cut) {
    int rows = sh_leader_max_rows(s->o.schedule);
    return sh_mem_align(sh_leader_descriptor_bytes(s->o.schedule)) + cut_bytes(s, cut, rows, rows);
}

/* ---- creation -------------------------------------------------------------------------------------------------------
 */

static bool member_holds(const void *arg, int member, int layer, int expert) {
    const sh_stage *s = arg;
    return sh_plan_holds(s->o.plan, s->stage * s->o.width + member, layer, expert);
}

static sh_status create_experts(sh_stage *s) {
    const sh_stage_options *o = &s->o;
    sh_experts_options e = {.link = o->link,
                            .first_rank = s->stage * o->width,
                            .members = o->width,
                            .member = s->member,
                            .config = o->config,
                            .first = o->first,
                            .last = o->last,
                            .mode = o->mode,
                            .max_rows = sh_leader_max_rows(o->schedule),
                            .split_rows = o->plan->split_rows,
                            .holds = member_holds,
                            .arg = s,
                            .timeline = o->timeline};
    SH_TRY(sh_experts_create(&e, &s->experts));
    s->peers.experts = sh_experts_peers(s->experts);
    return SH_OK;
}

static sh_status create_sender(sh_stage *s) {
    SH_TRY(sh_kv_sender_create(s->o.stream, &s->sender));
    s->peers = (sh_peers){.ctx = s->sender, .kv_written = sh_kv_sender_written};
    return SH_OK;
}

static sh_status create_context(sh_stage *s) {
    const sh_stage_options *o = &s->o;
    size_t bytes =
        sh_spread_message_bytes(o->config, o->kv_type, o->first, o->last, sh_leader_max_rows(o->schedule), o->width);
    SH_TRY(sh_context_create(o->link, s->stage * o->width, o->width, bytes, &s->context));
    s->peers.context = sh_context_table(s->context);
    return SH_OK;
}

static sh_status create_peers(sh_stage *s) {
    const sh_stage_options *o = &s->o;
    int rows = sh_leader_max_rows(o->schedule);
    sh_tensor_options t = {.link = o->link,
                           .first_rank = s->stage * o->width,
                           .share = o->share,
                           .config = o->config,
                           .max_rows = rows < SH_PART_ROWS ? rows : SH_PART_ROWS};
    sh_config_share(o->config, o->share, &s->part);
    if (o->lanes && o->width > 1) return create_experts(s);
    if (o->share.parts > 1) return sh_tensor_link_create(&t, &s->tensor);
    if (o->root > 0) return create_sender(s);
    return o->spread ? create_context(s) : SH_OK;
}

static void poll(void *arg);

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
                          .load_told = o->load_told,
                          .load_arg = o->load_arg,
                          .peers = s->tensor                               ? sh_tensor_link_peers(s->tensor)
                                   : s->experts || s->context || s->sender ? &s->peers
                                                                           : NULL};
    sh_load_link *together = NULL;
    if (o->load_together && o->link->size > 1) {
        SH_TRY(sh_load_link_create(o->link, o->alive, &together));
        m.load_peers = sh_load_link_peers(together);
    }
    memcpy(m.pages, s->sender ? o->schedule->prefill_pages : o->schedule->pages, sizeof m.pages);
    sh_status st = sh_model_create(o->model_dir, o->config, &m, &s->model);
    sh_load_link_destroy(&together);
    if (st != SH_OK) return sh_error_pass(st, __FILE__, __LINE__);
    sh_model_set_timeline(s->model, o->timeline);
    if (o->stages > 1 || o->stream) sh_team_set_poll(sh_model_team(s->model), poll, s);
    return SH_OK;
}

static sh_status create_hidden(sh_stage *s) {
    void *p = NULL;
    s->hidden_bytes = (size_t)sh_leader_max_rows(s->o.schedule) * (size_t)s->o.config->hidden * sizeof(float);
    SH_TRY(sh_mem_alloc(s->hidden_bytes, "final hidden states", &p));
    s->hidden = p;
    return SH_OK;
}

/* Sampler and logits; of a member that divides the vocabulary with others, its part of both. */
static sh_status create_sampler(sh_stage *s) {
    const sh_stage_options *o = &s->o;
    void *logits = NULL;
    sh_range ids = sh_model_ids(s->model);
    if (s->samples) SH_TRY(sh_tokenizer_load(o->model_dir, &s->tokenizer));
    SH_TRY(sh_sampler_create(sh_model_kernels(s->model), s->tokenizer, o->config->vocab, o->schedule->max_seqs,
                             o->schedule->max_context, sh_model_team(s->model), &s->sampler));
    s->logit_bytes = SH_LOGIT_ROWS * (size_t)(ids.hi - ids.lo) * sizeof(float);
    SH_TRY(sh_mem_alloc(s->logit_bytes, "logits", &logits));
    s->logits = logits;
    sh_vocabulary_options v = {.link = o->link,
                               .first_rank = s->stage * o->width,
                               .share = o->share,
                               .vocab = o->config->vocab,
                               .max_rows = SH_LOGIT_ROWS,
                               .sampler = s->sampler,
                               .timeline = o->timeline};
    return o->share.parts > 1 ? sh_vocabulary_create(&v, &s->vocabulary) : SH_OK;
}

/* As many as may be out: none waits for the one before to be taken. */
static sh_status create_prompts(sh_stage *s) {
    int n = sh_prefill_in_flight(s->o.schedule);
    s->prompts = calloc((size_t)n, sizeof *s->prompts);
    if (!s->prompts) SH_FAIL(SH_EMEMORY, "no memory for %d descriptors", n);
    s->n_prompts = n;
    for (int i = 0; i < n; i++) s->prompts[i].req = -1;
    for (int i = 0; i < n; i++) SH_TRY(sh_buf_reserve(&s->prompts[i].encoded, s->descriptor_max));
    return SH_OK;
}

/* Rank 0: descriptors for the other members of its stage, and its own. */
static sh_status create_handouts(sh_stage *s) {
    int n = SENDS * (s->o.width - 1);
    SH_TRY(sh_buf_reserve(&s->encoded, s->descriptor_max));
    s->handouts = calloc((size_t)n + 1, sizeof *s->handouts);
    if (!s->handouts) SH_FAIL(SH_EMEMORY, "no memory for %d descriptors", n);
    for (int i = 0; i < n; i++) s->handouts[i].req = -1;
    for (int i = 0; i < n; i++) SH_TRY(sh_buf_reserve(&s->handouts[i].encoded, s->descriptor_max));
    return s->o.stream ? create_prompts(s) : SH_OK;
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
    s->stage = (o->link->rank - o->root) / o->width;
    s->member = (o->link->rank - o->root) % o->width;
    s->leads = o->link->rank == 0;
    s->is_last = s->stage == o->stages - 1;
    s->samples = s->is_last && o->root == 0 && (o->lanes || s->member == 0);
    sh_status st = create_peers(s);
    if (st == SH_OK) st = create_model(s);
    if (st == SH_OK) st = create_buffers(s);
    if (st == SH_OK && s->is_last && !s->sender) st = create_hidden(s);
    if (st == SH_OK && (s->samples || (s->is_last && s->tensor))) st = create_sampler(s);
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
    for (int i = 0; i < s->n_prompts; i++) sh_buf_release(&s->prompts[i].encoded);
    free(s->prompts);
    free(s->handouts);
    free(s->sends);
    free(s->tokens);
    sh_mem_free(s->recv, s->recv_bytes);
    sh_mem_free(s->hidden, s->hidden_bytes);
    sh_mem_free(s->logits, s->logit_bytes);
    sh_buf_release(&s->encoded);
    sh_batch_release(&s->batch);
    sh_vocabulary_destroy(&s->vocabulary);
    sh_sampler_destroy(&s->sampler);
    sh_tokenizer_destroy(&s->tokenizer);
    sh_model_destroy(&s->model);
    sh_kv_sender_destroy(&s->sender);
    sh_tensor_link_destroy(&s->tensor);
    sh_experts_destroy(&s->experts);
    sh_context_destroy(&s->context);
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

static sh_status test_sends(sh_stage *s) {
    for (int i = 0; i < s->n_sends; i++) SH_TRY(test_send(s, &s->sends[i].req));
    for (int i = 0; i < n_handouts(s); i++) SH_TRY(test_send(s, &s->handouts[i].req));
    for (int i = 0; i < s->n_prompts; i++) SH_TRY(test_send(s, &s->prompts[i].req));
    return SH_OK;
}

/* Between the matrix products of a step: a block of the step before leaves only while somebody calls the link, and the
 * next stage may have nothing else to do. K/V rows of prompts likewise, of which there is a message for each layer: who
 * took them between steps alone would hold up those that make them. */
static void poll(void *arg) {
    sh_stage *s = arg;
    double now = sh_now();
    bool worked = false;
    if (s->experts) s->peers.experts->poll(s->experts);
    if (s->failed != SH_OK || now - s->polled_at < POLL_SECONDS) return;
    s->polled_at = now;
    s->failed = test_sends(s);
    if (s->failed == SH_OK && s->sender) s->failed = sh_kv_sender_progress(s->sender);
    if (s->failed == SH_OK && s->receiver) s->failed = sh_kv_receiver_poll(s->receiver, s->steps, &worked);
    if (s->failed != SH_OK) snprintf(s->why, sizeof s->why, "%s", sh_error_text());
}

sh_status sh_stage_progress(sh_stage *s) {
    if (s->failed != SH_OK) SH_FAIL(s->failed, "%s", s->why);
    SH_TRY(test_sends(s));
    if (s->experts) s->peers.experts->poll(s->experts); /* a failure is told by the next exchange */
    if (s->sender) SH_TRY(sh_kv_sender_progress(s->sender));
    return s->context ? sh_context_progress(s->context) : SH_OK;
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
    for (int i = 0; i < s->n_prompts; i++)
        if (s->prompts[i].req >= 0) return false;
    if (s->sender && !sh_kv_sender_is_idle(s->sender)) return false;
    return (!s->experts || sh_experts_is_idle(s->experts)) && (!s->context || sh_context_is_idle(s->context));
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

static void exchanged_since(sh_stage *s, double t0) {
    double now = sh_now();
    s->exchange += now - t0;
    sh_timeline_note(s->o.timeline, SH_SLICE_EXCHANGE, t0, now);
}

static sh_status forward_on(sh_stage *s, const sh_batch *b, const void *descriptor, size_t len, const void *in) {
    sending *to = NULL;
    double t0 = sh_now();
    SH_TRY(claim_send(s, &to));
    exchanged_since(s, t0);
    size_t at = sh_mem_align(len), n = sh_model_block_bytes(s->model, s->o.last, b);
    memcpy(to->block, descriptor, len);
    memset(to->block + len, 0, at - len);
    SH_TRY(sh_model_forward(s->model, b, in, to->block + at));
    SH_TRY(sh_stage_progress(s));
    return s->link->ops->send(s->link, s->link->rank + s->o.width, SH_TAG_BATCH, to->block, at + n, &to->req);
}

/* Where kept rows are: row `row` of span `span` comes next. */
typedef struct cursor {
    int span, row;
} cursor;

static sh_sampler_row next_row(const sh_batch *b, cursor *at) {
    while (at->row == b->spans[at->span].keep) {
        at->span++;
        at->row = 0;
    }
    const sh_span *p = &b->spans[at->span];
    return (sh_sampler_row){.seq = p->seq, .pos = p->pos + p->rows - p->keep + at->row++};
}

/* Samples n kept rows from their logits. Members that divide the vocabulary do it together, for member 0. */
static sh_status sample_rows(sh_stage *s, const sh_batch *b, int n, cursor *at, sh_buf *answer, int *count) {
    sh_sampler_row rows[SH_LOGIT_ROWS];
    sh_token token[SH_LOGIT_ROWS];
    int made[SH_LOGIT_ROWS] = {0};
    for (int i = 0; i < n; i++) rows[i] = next_row(b, at);
    if (s->vocabulary)
        SH_TRY(sh_vocabulary_sample(s->vocabulary, rows, n, s->logits, token, made));
    else
        SH_TRY(sh_sampler_steps(s->sampler, rows, n, s->logits, token, made));
    for (int i = 0; i < n; i++) {
        if (made[i]) SH_TRY(sh_tokens_add(answer, &token[i]));
        *count += made[i];
    }
    return SH_OK;
}

/* Logits and tokens of the kept rows, as the answer to rank 0 (NULL: another member answers). */
static sh_status sample_batch(sh_stage *s, const sh_batch *b, sending *to) {
    cursor at = {0};
    int count = 0;
    if (to) {
        sh_buf_clear(&to->answer);
        SH_TRY(sh_tokens_begin(&to->answer, b->step));
    }
    for (int k = 0; k < b->n_kept; k += SH_LOGIT_ROWS) {
        int n = b->n_kept - k < SH_LOGIT_ROWS ? b->n_kept - k : SH_LOGIT_ROWS;
        sh_model_logits(s->model, s->hidden + (size_t)k * (size_t)s->o.config->hidden, n, s->logits);
        double t0 = sh_now();
        SH_TRY(sample_rows(s, b, n, &at, to ? &to->answer : NULL, &count));
        sh_timeline_note(s->o.timeline, SH_SLICE_SAMPLING, t0, sh_now());
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
    for (int i = 0; s->sampler && i < b->n_drops; i++) sh_sampler_drop(s->sampler, b->drops[i]);
    for (int i = 0; s->sampler && i < b->n_starts; i++) SH_TRY(sh_sampler_start(s->sampler, &b->starts[i]));
    SH_TRY(sh_model_forward(s->model, b, in, s->hidden));
    if (!s->sampler || b->n_spans == 0) return SH_OK;
    if (s->samples) SH_TRY(claim_send(s, &to));
    return sample_batch(s, b, to);
}

/* Members of a group count their micro-batches alike, while the leaders of lanes count their own. */
static void note_step(const sh_stage *s, const sh_batch *b, double from) {
    sh_slice_work w = {.step = s->steps, .rows = b->n_rows};
    for (int i = 0; i < b->n_spans && sh_timeline_is_on(s->o.timeline); i++)
        if (b->spans[i].rows == 1 && b->spans[i].keep == 1) w.decode++;
    w.prompt = w.rows - w.decode;
    sh_timeline_end(s->o.timeline, from, sh_now(), &w);
}

static sh_status step(sh_stage *s, const sh_batch *b, const void *descriptor, size_t len, const void *in) {
    double from = sh_now();
    sh_timeline_begin(s->o.timeline, s->steps);
    if (s->sender) sh_kv_sender_begin(s->sender, sh_model_kv(s->model), b);
    SH_TRY(s->is_last ? finish(s, b, in) : forward_on(s, b, descriptor, len, in));
    note_step(s, b, from);
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

bool sh_stage_has_room_for_prompts(const sh_stage *s) {
    return s->n_prompts > 0 && s->prompts[s->next_prompts].req < 0;
}

sh_status sh_stage_send_prompts(sh_stage *s, const sh_batch *b) {
    handout *h = &s->prompts[s->next_prompts];
    s->next_prompts = (s->next_prompts + 1) % s->n_prompts;
    SH_TRY(encode(s, b, &h->encoded));
    return s->link->ops->send(s->link, s->o.stages * s->o.width, SH_TAG_BATCH, h->encoded.data, h->encoded.len,
                              &h->req);
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
    s->received_at = t0;
    exchanged_since(s, t0);
    SH_TRY(sh_batch_decode(&s->batch, s->recv, len, &used));
    const sh_batch *b = &s->batch;
    size_t need = sh_model_block_bytes(s->model, s->o.first, b);
    if (b->n_rows > sh_leader_max_rows(s->o.schedule) || b->n_spans > s->o.schedule->max_seqs ||
        used > s->descriptor_max || len != (s->stage ? sh_mem_align(used) + need : used))
        SH_FAIL(SH_EPEER,
                "micro-batch of %d rows, %zu bytes of descriptor and %zu in all from rank %d: not what it should be",
                b->n_rows, used, len, from);
    s->received = used;
    return SH_OK;
}

sh_status sh_stage_serve(sh_stage *s) {
    return step(s, &s->batch, s->recv, s->received, s->stage ? s->recv + sh_mem_align(s->received) : NULL);
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

double sh_stage_received_at(const sh_stage *s) {
    return s->received_at;
}

double sh_stage_exchange_seconds(const sh_stage *s) {
    double head = s->vocabulary ? sh_vocabulary_seconds(s->vocabulary) : 0;
    return s->exchange + sh_model_time(s->model).exchange + head;
}

sh_experts_times sh_stage_experts_time(const sh_stage *s) {
    return s->experts ? sh_experts_time(s->experts) : (sh_experts_times){0};
}

uint64_t sh_stage_steps(const sh_stage *s) {
    return s->steps;
}

void sh_stage_take_rows(sh_stage *s, sh_kv_receiver *r) {
    s->receiver = r;
}

sh_kv_pool *sh_stage_kv(sh_stage *s) {
    return sh_model_kv(s->model);
}

const sh_model *sh_stage_model(const sh_stage *s) {
    return s->model;
}
