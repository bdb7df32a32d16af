/*
 * Sending and receiving K/V rows of prompts. See kv_stream.h; the bytes are in docs/protocol.md, "K/V rows of prompts".
 *
 * Nobody waits for ever: a rank that decodes never waits for one that does not; it takes a message at any time and
 * keeps it until its own steps allow the import, and those steps need no rows that are not confirmed. A prefill rank
 * waits for buffers, which are emptied so. Words to rank 0 have a buffer for each micro-batch that can be out.
 */
#include "worker/kv_stream.h"

#include <stdlib.h>
#include <string.h>

#include "common/hash.h"
#include "common/log.h"
#include "common/mem.h"
#include "worker/backoff.h"
#include "worker/prefill.h"
#include "worker/shard.h"

enum { SENDS = 4, RECEIVES = 3 };

#define ENVELOPE_MAGIC 0x31564b53u /* "SKV1" */
#define WORD_MAGIC     0x31444c53u /* "SLD1" */
#define TAG_WORD       sh_link_channel(SH_TAG_SHARD, 1)

typedef struct envelope {
    uint32_t magic, shards;
    uint64_t step, after, bytes; /* bytes: of the whole message */
    int32_t layer;
    uint32_t zero[4];
    uint64_t checksum; /* of the envelope with 0 here */
} envelope;
_Static_assert(sizeof(envelope) == SH_SHARD_ALIGN, "shards follow aligned");

typedef struct word {
    uint32_t magic, ok;
    uint64_t step;
} word;
_Static_assert(sizeof(word) == 16, "no padding");

static uint64_t envelope_sum(const envelope *e) {
    envelope plain = *e;
    plain.checksum = 0;
    return sh_hash64(0, &plain, sizeof plain);
}

static int decode_ranks(const sh_kv_stream_options *o) {
    return (int)o->plan->n_rank - o->schedule->prefill;
}

bool sh_kv_stream_holds(const sh_kv_stream_options *o, int rank, int layer) {
    for (int i = o->plan->rank[rank]->first; i < o->plan->rank[rank]->last; i++)
        if (o->config->layer[i].kv_from == layer) return true;
    return false;
}

/* Rows of one span as the shard that they make; 0 tokens: nothing of it travels. */
static sh_shard shard_of(const sh_kv_stream_options *o, const sh_batch *b, int span, int layer) {
    const sh_span *s = &b->spans[span];
    const sh_handoff *h = &b->handoffs[span];
    const sh_layer *l = &o->config->layer[layer];
    return (sh_shard){.model = o->model,
                      .seq = s->seq,
                      .type = o->type,
                      .first = layer,
                      .last = layer + 1,
                      .heads = l->kv_heads,
                      .head_dim = l->head_dim,
                      .parts = l->k_eq_v ? 1 : 2,
                      .pos = h->from[l->kind],
                      .tokens = s->pos + s->rows - h->from[l->kind],
                      .page0 = h->page0[l->kind],
                      .n_pages = h->n_pages[l->kind],
                      .pages = h->pages[l->kind]};
}

/* Bytes of the longest message: every row of a chunk travels, each in a span of its own at worst. */
static size_t message_bytes(const sh_kv_stream_options *o, int layer) {
    size_t chunk = (size_t)o->schedule->chunk, seqs = (size_t)o->schedule->max_seqs;
    size_t spans = chunk < seqs ? chunk : seqs, pages = chunk / SH_PAGE_TOKENS + 2 * spans;
    const sh_shard none = {.type = o->type, .last = 1, .heads = 1, .head_dim = 1, .parts = 1};
    return sizeof(envelope) + spans * (sh_shard_bytes(&none) + 2 * SH_SHARD_ALIGN) + 4 * pages +
           chunk * sh_kv_row_bytes(o->config, o->type, layer);
}

/* ---- sending --------------------------------------------------------------------------------------------------------
 */

typedef struct sending {
    uint8_t *block;
    int *req; /* [decode ranks]; −1: not open */
} sending;

struct sh_kv_sender {
    sh_kv_stream_options o;
    int first, last; /* own layers */
    int decode;
    bool *holds; /* [last − first][decode] */
    size_t block_bytes;
    sending sends[SENDS];
    int next;
    const sh_kv_pool *pool;
    const sh_batch *batch;
};

static sh_status create_sends(sh_kv_sender *s) {
    void *p = NULL;
    for (int i = s->first; i < s->last; i++) {
        size_t n = message_bytes(&s->o, i);
        if (n > s->block_bytes) s->block_bytes = n;
    }
    for (int i = 0; i < SENDS; i++) {
        s->sends[i].req = calloc((size_t)s->decode, sizeof(int));
        if (!s->sends[i].req) SH_FAIL(SH_EMEMORY, "no memory for requests to %d ranks", s->decode);
        for (int d = 0; d < s->decode; d++) s->sends[i].req[d] = -1;
        SH_TRY(sh_mem_alloc(s->block_bytes, "K/V send buffer", &p));
        s->sends[i].block = p;
    }
    s->holds = calloc((size_t)(s->last - s->first) * (size_t)s->decode, sizeof(bool));
    if (!s->holds) SH_FAIL(SH_EMEMORY, "no memory for the routes of %d layers", s->last - s->first);
    for (int i = s->first; i < s->last; i++)
        for (int d = 0; d < s->decode; d++) s->holds[(i - s->first) * s->decode + d] = sh_kv_stream_holds(&s->o, d, i);
    return SH_OK;
}

sh_status sh_kv_sender_create(const sh_kv_stream_options *o, sh_kv_sender **out) {
    sh_kv_sender *s = calloc(1, sizeof *s);
    if (!s) SH_FAIL(SH_EMEMORY, "no memory for a sender of K/V rows");
    s->o = *o;
    s->first = o->plan->rank[o->link->rank]->first;
    s->last = o->plan->rank[o->link->rank]->last;
    s->decode = decode_ranks(o);
    sh_status st = create_sends(s);
    if (st != SH_OK) {
        sh_kv_sender_destroy(&s);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = s;
    return SH_OK;
}

void sh_kv_sender_destroy(sh_kv_sender **p) {
    sh_kv_sender *s = *p;
    if (!s) return;
    for (int i = 0; i < SENDS; i++) {
        if (s->sends[i].block) sh_mem_free(s->sends[i].block, s->block_bytes);
        free(s->sends[i].req);
    }
    free(s->holds);
    free(s);
    *p = NULL;
}

void sh_kv_sender_begin(sh_kv_sender *s, const sh_kv_pool *pool, const sh_batch *b) {
    s->pool = pool;
    s->batch = b;
}

static bool is_free(const sh_kv_sender *s, const sending *to) {
    for (int d = 0; d < s->decode; d++)
        if (to->req[d] >= 0) return false;
    return true;
}

sh_status sh_kv_sender_progress(sh_kv_sender *s) {
    for (int i = 0; i < SENDS; i++)
        for (int d = 0; d < s->decode; d++) {
            bool done = false;
            if (s->sends[i].req[d] < 0) continue;
            SH_TRY(s->o.link->ops->test(s->o.link, s->sends[i].req[d], &done));
            if (done) s->sends[i].req[d] = -1;
        }
    return SH_OK;
}

bool sh_kv_sender_is_idle(const sh_kv_sender *s) {
    for (int i = 0; i < SENDS; i++)
        if (!is_free(s, &s->sends[i])) return false;
    return true;
}

static sh_status claim(sh_kv_sender *s, sending **out) {
    sending *to = &s->sends[s->next];
    SH_TRY(sh_kv_sender_progress(s));
    for (sh_backoff wait = {0}; !is_free(s, to);) {
        sh_backoff_wait(&wait);
        SH_TRY(sh_kv_sender_progress(s));
    }
    s->next = (s->next + 1) % SENDS;
    *out = to;
    return SH_OK;
}

/* Writes the message of a layer into block; returns its bytes. */
static size_t write_message(const sh_kv_sender *s, int layer, uint8_t *block) {
    const sh_batch *b = s->batch;
    envelope e = {.magic = ENVELOPE_MAGIC, .step = b->step, .after = b->after, .layer = layer};
    size_t at = sizeof e;
    for (int i = 0; i < b->n_spans; i++) {
        sh_shard shard = shard_of(&s->o, b, i, layer);
        if (shard.tokens == 0) continue;
        size_t n = sh_shard_bytes(&shard);
        void *rows = sh_shard_begin(&shard, block + at);
        sh_kv_export(s->pool, layer, &b->spans[i], shard.pos - b->spans[i].pos, shard.tokens, rows);
        sh_shard_seal(block + at);
        memset(block + at + n, 0, sh_mem_align(n) - n);
        at += sh_mem_align(n);
        e.shards++;
    }
    e.bytes = at;
    e.checksum = envelope_sum(&e);
    memcpy(block, &e, sizeof e);
    return at;
}

sh_status sh_kv_sender_written(void *sender, int layer) {
    sh_kv_sender *s = sender;
    sending *to = NULL;
    SH_TRY(claim(s, &to));
    size_t n = write_message(s, layer, to->block);
    for (int d = 0; d < s->decode; d++)
        if (s->holds[(layer - s->first) * s->decode + d])
            SH_TRY(s->o.link->ops->send(s->o.link, d, SH_TAG_SHARD, to->block, n, &to->req[d]));
    return SH_OK;
}

/* ---- receiving ------------------------------------------------------------------------------------------------------
 */

/* What comes next from a prefill rank: its layers that this rank holds, in every step of the pipeline. */
typedef struct source {
    int rank, n, next;
    int *layer; /* [n], ascending */
    uint64_t step;
} source;

typedef struct message {
    enum { EMPTY, COMING, WHOLE } state;
    uint8_t *block;
    size_t len;
    int req;
    int from, layer; /* as the order says */
    uint64_t step;
} message;

/* A micro-batch whose rows are coming. */
typedef struct coming {
    int here; /* messages */
    bool damaged;
} coming;

typedef struct saying {
    word word;
    int req; /* −1: free */
} saying;

struct sh_kv_receiver {
    sh_kv_stream_options o;
    sh_kv_pool *pool;
    int per_step; /* messages */
    int n_sources, next_source;
    source *sources;
    size_t block_bytes;
    message messages[RECEIVES];
    int depth;
    uint64_t oldest; /* first step that is not complete */
    coming *coming;  /* [depth] by step % depth */
    saying *says;    /* [depth + 1], in turn; rank 0: words to itself */
    int next_say, unheard;
};

static sh_status create_sources(sh_kv_receiver *r) {
    const sh_kv_stream_options *o = &r->o;
    int decode = decode_ranks(o), me = o->link->rank;
    r->n_sources = o->schedule->prefill;
    r->sources = calloc((size_t)r->n_sources, sizeof *r->sources);
    if (!r->sources) SH_FAIL(SH_EMEMORY, "no memory for %d senders of K/V rows", r->n_sources);
    for (int i = 0; i < r->n_sources; i++) {
        const Shoal__PlanRank *p = o->plan->rank[decode + i];
        source *s = &r->sources[i];
        s->rank = decode + i;
        s->step = 1;
        s->layer = calloc((size_t)(p->last - p->first), sizeof *s->layer);
        if (!s->layer) SH_FAIL(SH_EMEMORY, "no memory for %d layers", p->last - p->first);
        for (int layer = p->first; layer < p->last; layer++) {
            if (!sh_kv_stream_holds(o, me, layer)) continue;
            s->layer[s->n++] = layer;
            size_t n = message_bytes(o, layer);
            if (n > r->block_bytes) r->block_bytes = n;
        }
        r->per_step += s->n;
    }
    return SH_OK;
}

static sh_status create_receives(sh_kv_receiver *r) {
    void *p = NULL;
    r->depth = sh_prefill_in_flight(r->o.schedule);
    r->oldest = 1;
    r->coming = calloc((size_t)r->depth, sizeof *r->coming);
    r->says = calloc((size_t)r->depth + 1, sizeof *r->says);
    if (!r->coming || !r->says) SH_FAIL(SH_EMEMORY, "no memory for %d micro-batches", r->depth);
    for (int i = 0; i <= r->depth; i++) r->says[i].req = -1;
    for (int i = 0; i < RECEIVES; i++) {
        SH_TRY(sh_mem_alloc(r->block_bytes, "K/V receive buffer", &p));
        r->messages[i].block = p;
    }
    return SH_OK;
}

sh_status sh_kv_receiver_create(const sh_kv_stream_options *o, sh_kv_pool *pool, sh_kv_receiver **out) {
    sh_kv_receiver *r = calloc(1, sizeof *r);
    if (!r) SH_FAIL(SH_EMEMORY, "no memory for a receiver of K/V rows");
    r->o = *o;
    r->pool = pool;
    sh_status st = create_sources(r);
    if (st == SH_OK) st = create_receives(r);
    if (st != SH_OK) {
        sh_kv_receiver_destroy(&r);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = r;
    return SH_OK;
}

void sh_kv_receiver_destroy(sh_kv_receiver **p) {
    sh_kv_receiver *r = *p;
    if (!r) return;
    for (int i = 0; r->sources && i < r->n_sources; i++) free(r->sources[i].layer);
    for (int i = 0; i < RECEIVES; i++)
        if (r->messages[i].block) sh_mem_free(r->messages[i].block, r->block_bytes);
    free(r->sources);
    free(r->coming);
    free(r->says);
    free(r);
    *p = NULL;
}

bool sh_kv_receiver_is_idle(const sh_kv_receiver *r) {
    for (int i = 0; i < RECEIVES; i++)
        if (r->messages[i].state == COMING) return false;
    for (int i = 0; i <= r->depth; i++)
        if (r->says[i].req >= 0) return false;
    return true;
}

/* Starts receiving the next message of whoever has one, and notes what it must be. */
static sh_status start_receive(sh_kv_receiver *r, message *m, bool *worked) {
    for (int i = 0; i < r->n_sources && m->state == EMPTY; i++) {
        source *s = &r->sources[(r->next_source + i) % r->n_sources];
        bool found = false;
        int from = 0;
        if (s->n == 0) continue;
        SH_TRY(r->o.link->ops->probe(r->o.link, s->rank, SH_TAG_SHARD, &found, &from, &m->len));
        if (!found) continue;
        if (m->len > r->block_bytes)
            SH_FAIL(SH_EPEER, "K/V message of %zu bytes from rank %d: room is %zu", m->len, s->rank, r->block_bytes);
        SH_TRY(r->o.link->ops->accept(r->o.link, s->rank, SH_TAG_SHARD, m->block, m->len, &m->req));
        m->state = COMING;
        m->from = s->rank;
        m->layer = s->layer[s->next];
        m->step = s->step;
        s->next = (s->next + 1) % s->n;
        s->step += s->next == 0;
        r->next_source = (r->next_source + i + 1) % r->n_sources;
        *worked = true;
    }
    return SH_OK;
}

/* The next free buffer for a word to rank 0. There is one: it hears each before it makes as many micro-batches. */
static sh_status say(sh_kv_receiver *r, uint64_t step, bool ok) {
    saying *s = &r->says[r->next_say];
    sh_link *l = r->o.link;
    for (sh_backoff wait = {0}; s->req >= 0;) {
        bool done = false;
        SH_TRY(l->ops->test(l, s->req, &done));
        if (done)
            s->req = -1;
        else
            sh_backoff_wait(&wait);
    }
    r->next_say = (r->next_say + 1) % (r->depth + 1);
    s->word = (word){.magic = WORD_MAGIC, .ok = ok, .step = step};
    if (l->rank > 0) return l->ops->send(l, 0, TAG_WORD, &s->word, sizeof s->word, &s->req);
    r->unheard++;
    return SH_OK;
}

/* A message is done with; complete micro-batches are told to rank 0 in order. */
static sh_status tick_off(sh_kv_receiver *r, const message *m, bool ok) {
    if (m->step < r->oldest || m->step >= r->oldest + (uint64_t)r->depth)
        SH_FAIL(SH_EPEER, "K/V rows of micro-batch %llu from rank %d: %llu to %llu are expected",
                (unsigned long long)m->step, m->from, (unsigned long long)r->oldest,
                (unsigned long long)(r->oldest + (uint64_t)r->depth - 1));
    coming *c = &r->coming[m->step % (uint64_t)r->depth];
    c->here++;
    c->damaged = c->damaged || !ok;
    for (c = &r->coming[r->oldest % (uint64_t)r->depth]; c->here == r->per_step;
         c = &r->coming[r->oldest % (uint64_t)r->depth]) {
        SH_TRY(say(r, r->oldest++, !c->damaged));
        *c = (coming){0};
    }
    return SH_OK;
}

static sh_status import_shard(sh_kv_receiver *r, const message *m, const sh_shard *s) {
    const sh_kv_stream_options *o = &r->o;
    SH_TRY(sh_shard_check(s, o->config, o->type, o->model));
    const sh_layer *l = &o->config->layer[m->layer];
    if (s->first != m->layer || s->last != m->layer + 1 || s->head != 0 || s->heads != l->kv_heads || s->n_pages < 1)
        SH_FAIL(SH_EPEER,
                "K/V message from rank %d: layers %d to %d, %d heads from %d in %d pages: not those of layer %d",
                m->from, s->first, s->last - 1, s->heads, s->head, s->n_pages, m->layer);
    for (int i = 0; i < s->n_pages; i++)
        if (s->pages[i] < 0 || s->pages[i] >= o->schedule->pages[l->kind])
            SH_FAIL(SH_EPEER, "K/V message from rank %d: page %d: the pool has %d", m->from, s->pages[i],
                    o->schedule->pages[l->kind]);
    sh_span span = {.seq = s->seq, .pos = s->pos, .rows = s->tokens};
    span.page0[l->kind] = s->page0;
    span.n_pages[l->kind] = s->n_pages;
    span.pages[l->kind] = s->pages;
    sh_kv_import(r->pool, m->layer, &span, 0, s->tokens, s->payload);
    return SH_OK;
}

/* *damaged: some checksum is wrong; its shard, and what stands behind it, was left alone. */
static sh_status import_message(sh_kv_receiver *r, const message *m, uint32_t shards, bool *damaged) {
    size_t at = sizeof(envelope);
    for (uint32_t i = 0; i < shards; i++) {
        sh_shard s;
        size_t used = 0;
        if (at > m->len || sh_shard_open(m->block + at, m->len - at, &s, &used) != SH_OK) {
            sh_warn("micro-batch %llu of prompts: %s: its rows are made again", (unsigned long long)m->step,
                    at > m->len ? "a message ends early" : sh_error_text());
            *damaged = true;
            return SH_OK;
        }
        SH_TRY(import_shard(r, m, &s));
        at += sh_mem_align(used);
    }
    return SH_OK;
}

/* A whole message: into the pool, or left where it is while micro-batches before `after` are not done. */
static sh_status use(sh_kv_receiver *r, message *m, uint64_t done, bool *worked) {
    envelope e = {0};
    bool damaged = false;
    if (m->len >= sizeof e) memcpy(&e, m->block, sizeof e);
    if (e.magic != ENVELOPE_MAGIC || e.bytes != m->len || envelope_sum(&e) != e.checksum) {
        sh_warn(
            "micro-batch %llu of prompts: the envelope of layer %d from rank %d is damaged: its rows are made again",
            (unsigned long long)m->step, m->layer, m->from);
        damaged = true;
    } else {
        if (e.step != m->step || e.layer != m->layer)
            SH_FAIL(SH_EPEER, "K/V message from rank %d: micro-batch %llu, layer %d: %llu and %d come next", m->from,
                    (unsigned long long)e.step, e.layer, (unsigned long long)m->step, m->layer);
        if (e.after > done) return SH_OK;
        SH_TRY(import_message(r, m, e.shards, &damaged));
    }
    SH_TRY(tick_off(r, m, !damaged));
    m->state = EMPTY;
    *worked = true;
    return SH_OK;
}

sh_status sh_kv_receiver_poll(sh_kv_receiver *r, uint64_t done, bool *worked) {
    for (int i = 0; i <= r->depth; i++) { /* progress of the words */
        bool sent = false;
        if (r->says[i].req < 0) continue;
        SH_TRY(r->o.link->ops->test(r->o.link, r->says[i].req, &sent));
        if (sent) r->says[i].req = -1;
    }
    for (int i = 0; i < RECEIVES; i++) {
        message *m = &r->messages[i];
        if (m->state == EMPTY) SH_TRY(start_receive(r, m, worked));
        if (m->state == COMING) {
            bool whole = false;
            SH_TRY(r->o.link->ops->test(r->o.link, m->req, &whole));
            if (whole) m->state = WHOLE;
        }
        if (m->state == WHOLE) SH_TRY(use(r, m, done, worked));
    }
    return SH_OK;
}

sh_status sh_kv_receiver_landed(sh_kv_receiver *r, bool *got, uint64_t *step, bool *ok) {
    sh_link *l = r->o.link;
    word w = {0};
    int from = 0;
    size_t len = 0;
    *got = r->unheard > 0;
    if (*got) {
        w = r->says[(r->next_say + r->depth + 1 - r->unheard) % (r->depth + 1)].word;
        r->unheard--;
    } else {
        SH_TRY(l->ops->probe(l, -1, TAG_WORD, got, &from, &len));
        if (!*got) return SH_OK;
        if (len != sizeof w)
            SH_FAIL(SH_EPEER, "word of %zu bytes from rank %d: %zu were expected", len, from, sizeof w);
        SH_TRY(l->ops->recv(l, from, TAG_WORD, &w, len));
    }
    if (w.magic != WORD_MAGIC || w.ok > 1) SH_FAIL(SH_EPEER, "word %08x from rank %d: no such word", w.magic, from);
    *step = w.step;
    *ok = w.ok != 0;
    return SH_OK;
}
