/*
 * The descriptor as bytes, and back. Little-endian; layout (docs/protocol.md, "Batch descriptor"):
 *   u32 length of the whole, u32 magic "SHB1", u64 step, i32 n_rows n_spans n_starts n_drops
 *   i32 ids[n_rows]
 *   per span:  u64 seq, i32 pos rows keep level, per KV kind: i32 page0 n_pages, i32 pages[n_pages]
 *   per start: u64 seq, sampling, i32 n_prompt n_tokens, i32 tokens[n_tokens]
 *   u64 drops[n_drops]
 *   i32 n_handoffs (0 or n_spans); where any: u64 after, per span and KV kind: i32 from page0 n_pages, i32
 * pages[n_pages] row0, kept0 and n_kept follow from the spans. Reading trusts nothing: every count is checked against
 * the bytes that are left before memory is taken for it. What only a model can know (vocabulary, pool size)
 * sh_model_forward checks.
 */
#include "model/batch.h"

#include <math.h>
#include <string.h>

#define MAGIC    0x31424853u /* "SHB1" */
#define MAX_ROWS (SH_MAX_CHUNK + SH_MAX_SEQS)
#define MAX_POS  (1 << 30)

sh_status sh_batch_create(size_t bytes, sh_batch *out) {
    sh_arena a;
    SH_TRY(sh_arena_create(bytes, "batch descriptor", &a));
    *out = (sh_batch){.arena = a};
    return SH_OK;
}

void sh_batch_release(sh_batch *b) {
    sh_arena_release(&b->arena);
    *b = (sh_batch){0};
}

/* --- writing -------------------------------------------------------------------------------------------------------
 */

static sh_status put_u16(sh_buf *to, uint16_t v) {
    uint8_t b[2] = {(uint8_t)v, (uint8_t)(v >> 8)};
    return sh_buf_add(to, b, sizeof b);
}

static sh_status put_u32(sh_buf *to, uint32_t v) {
    uint8_t b[4] = {(uint8_t)v, (uint8_t)(v >> 8), (uint8_t)(v >> 16), (uint8_t)(v >> 24)};
    return sh_buf_add(to, b, sizeof b);
}

static sh_status put_i32(sh_buf *to, int32_t v) {
    return put_u32(to, (uint32_t)v);
}

static sh_status put_u64(sh_buf *to, uint64_t v) {
    SH_TRY(put_u32(to, (uint32_t)v));
    return put_u32(to, (uint32_t)(v >> 32));
}

static sh_status put_f32(sh_buf *to, float v) {
    uint32_t u = 0;
    memcpy(&u, &v, sizeof u);
    return put_u32(to, u);
}

static sh_status put_ints(sh_buf *to, const int32_t *v, int n) {
    for (int i = 0; i < n; i++) SH_TRY(put_i32(to, v[i]));
    return SH_OK;
}

static sh_status put_list(sh_buf *to, const int32_t *v, int n) {
    SH_TRY(put_i32(to, n));
    return put_ints(to, v, n);
}

static sh_status put_sampling(sh_buf *to, const sh_sampling *s) {
    SH_TRY(put_f32(to, s->temperature));
    SH_TRY(put_f32(to, s->top_p));
    SH_TRY(put_f32(to, s->min_p));
    SH_TRY(put_i32(to, s->top_k));
    SH_TRY(put_u64(to, s->seed));
    SH_TRY(put_i32(to, s->choice));
    SH_TRY(put_i32(to, s->max_tokens));
    SH_TRY(put_i32(to, s->min_tokens));
    SH_TRY(put_i32(to, (s->ignore_eos ? 1 : 0) | (s->score_prompt ? 2 : 0)));
    SH_TRY(put_i32(to, s->logprobs));
    SH_TRY(put_list(to, s->eos, s->n_eos));
    SH_TRY(put_list(to, s->stop_ids, s->n_stop_ids));
    SH_TRY(put_list(to, s->suppress, s->n_suppress));
    SH_TRY(put_i32(to, s->n_stops));
    for (int i = 0; i < s->n_stops; i++) {
        SH_TRY(put_u16(to, s->stop_len[i]));
        SH_TRY(sh_buf_add(to, s->stop[i], s->stop_len[i]));
    }
    return SH_OK;
}

static sh_status put_span(sh_buf *to, const sh_span *s) {
    SH_TRY(put_u64(to, s->seq));
    SH_TRY(put_i32(to, s->pos));
    SH_TRY(put_i32(to, s->rows));
    SH_TRY(put_i32(to, s->keep));
    SH_TRY(put_i32(to, s->level));
    for (int k = 0; k < SH_KV_KINDS; k++) {
        SH_TRY(put_i32(to, s->page0[k]));
        SH_TRY(put_list(to, s->pages[k], s->n_pages[k]));
    }
    return SH_OK;
}

static sh_status put_start(sh_buf *to, const sh_seq_start *s) {
    SH_TRY(put_u64(to, s->seq));
    SH_TRY(put_sampling(to, s->sampling));
    SH_TRY(put_i32(to, s->n_prompt));
    return put_list(to, s->tokens, s->n_tokens);
}

static sh_status put_handoffs(sh_buf *to, const sh_batch *b) {
    SH_TRY(put_i32(to, b->n_handoffs));
    if (b->n_handoffs == 0) return SH_OK;
    SH_TRY(put_u64(to, b->after));
    for (int i = 0; i < b->n_handoffs; i++)
        for (int k = 0; k < SH_KV_KINDS; k++) {
            const sh_handoff *h = &b->handoffs[i];
            SH_TRY(put_i32(to, h->from[k]));
            SH_TRY(put_i32(to, h->page0[k]));
            SH_TRY(put_list(to, h->pages[k], h->n_pages[k]));
        }
    return SH_OK;
}

static sh_status put_body(sh_buf *to, const sh_batch *b) {
    SH_TRY(put_u32(to, 0)); /* length: filled in afterwards */
    SH_TRY(put_u32(to, MAGIC));
    SH_TRY(put_u64(to, b->step));
    SH_TRY(put_i32(to, b->n_rows));
    SH_TRY(put_i32(to, b->n_spans));
    SH_TRY(put_i32(to, b->n_starts));
    SH_TRY(put_i32(to, b->n_drops));
    SH_TRY(put_i32(to, b->widest_rows));
    SH_TRY(put_i32(to, b->widest_kept));
    SH_TRY(put_ints(to, b->ids, b->n_rows));
    for (int i = 0; i < b->n_spans; i++) SH_TRY(put_span(to, &b->spans[i]));
    for (int i = 0; i < b->n_starts; i++) SH_TRY(put_start(to, &b->starts[i]));
    for (int i = 0; i < b->n_drops; i++) SH_TRY(put_u64(to, b->drops[i]));
    return put_handoffs(to, b);
}

sh_status sh_batch_encode(const sh_batch *b, sh_buf *to) {
    size_t start = to->len;
    sh_status st = put_body(to, b);
    if (st == SH_OK && to->len - start > UINT32_MAX)
        st = sh_error_set(SH_ELIMIT, __FILE__, __LINE__, "batch: descriptor of more than 4 GiB");
    if (st != SH_OK) {
        to->len = start;
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    uint32_t len = (uint32_t)(to->len - start);
    for (int i = 0; i < 4; i++) to->data[start + (size_t)i] = (uint8_t)(len >> (8 * i));
    return SH_OK;
}

/* --- reading -------------------------------------------------------------------------------------------------------
 */

typedef struct reader {
    const uint8_t *p;
    size_t left;
    sh_arena *arena;
} reader;

static sh_status get_bytes(reader *r, void *to, size_t n) {
    if (n > r->left) SH_FAIL(SH_EFORMAT, "batch: descriptor ends early: %zu bytes left, %zu needed", r->left, n);
    memcpy(to, r->p, n);
    r->p += n;
    r->left -= n;
    return SH_OK;
}

static sh_status get_u16(reader *r, uint16_t *out) {
    uint8_t b[2] = {0};
    SH_TRY(get_bytes(r, b, sizeof b));
    *out = (uint16_t)(b[0] | b[1] << 8);
    return SH_OK;
}

static sh_status get_u32(reader *r, uint32_t *out) {
    uint8_t b[4] = {0};
    SH_TRY(get_bytes(r, b, sizeof b));
    *out = (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
    return SH_OK;
}

static sh_status get_u64(reader *r, uint64_t *out) {
    uint32_t lo = 0, hi = 0;
    SH_TRY(get_u32(r, &lo));
    SH_TRY(get_u32(r, &hi));
    *out = (uint64_t)hi << 32 | lo;
    return SH_OK;
}

static sh_status get_f32(reader *r, const char *field, float *out) {
    uint32_t u = 0;
    SH_TRY(get_u32(r, &u));
    float v;
    memcpy(&v, &u, sizeof v);
    if (!isfinite(v)) SH_FAIL(SH_EFORMAT, "batch: %s: not a finite number", field);
    *out = v;
    return SH_OK;
}

static sh_status get_i32(reader *r, const char *field, int32_t min, int32_t max, int32_t *out) {
    uint32_t u = 0;
    SH_TRY(get_u32(r, &u));
    int32_t v = (int32_t)u;
    if (v < min || v > max) SH_FAIL(SH_EFORMAT, "batch: %s: %d: allowed are %d to %d", field, v, min, max);
    *out = v;
    return SH_OK;
}

static sh_status get_ints(reader *r, const char *field, int n, int32_t min, int32_t *to) {
    for (int i = 0; i < n; i++) SH_TRY(get_i32(r, field, min, INT32_MAX, &to[i]));
    return SH_OK;
}

/* Room for n items of `size` bytes in the batch; each takes at least `encoded` bytes of the descriptor. */
static sh_status take(reader *r, const char *field, int n, size_t size, size_t encoded, void **out) {
    if ((size_t)n > r->left / encoded) SH_FAIL(SH_EFORMAT, "batch: %s: %d items in %zu bytes", field, n, r->left);
    void *p = sh_arena_take(r->arena, (size_t)n * size);
    if (!p)
        SH_FAIL(SH_ELIMIT, "batch: %s: descriptor needs more than the %zu bytes reserved for it", field,
                r->arena->size);
    *out = p;
    return SH_OK;
}

static sh_status get_list(reader *r, const char *field, int max, int32_t *to, int32_t *n) {
    SH_TRY(get_i32(r, field, 0, max, n));
    return get_ints(r, field, *n, 0, to);
}

static sh_status get_stops(reader *r, sh_sampling *s) {
    SH_TRY(get_i32(r, "stop strings", 0, SH_MAX_STOPS, &s->n_stops));
    for (int i = 0; i < s->n_stops; i++) {
        SH_TRY(get_u16(r, &s->stop_len[i]));
        if (s->stop_len[i] > SH_MAX_STOP_BYTES)
            SH_FAIL(SH_EFORMAT, "batch: stop string of %d bytes: at most %d", s->stop_len[i], SH_MAX_STOP_BYTES);
        SH_TRY(get_bytes(r, s->stop[i], s->stop_len[i]));
    }
    return SH_OK;
}

static sh_status get_sampling(reader *r, sh_sampling *s) {
    memset(s, 0, sizeof *s);
    SH_TRY(get_f32(r, "temperature", &s->temperature));
    SH_TRY(get_f32(r, "top_p", &s->top_p));
    SH_TRY(get_f32(r, "min_p", &s->min_p));
    SH_TRY(get_i32(r, "top_k", 0, INT32_MAX, &s->top_k));
    SH_TRY(get_u64(r, &s->seed));
    SH_TRY(get_i32(r, "choice", 0, INT32_MAX, &s->choice));
    SH_TRY(get_i32(r, "max_tokens", 0, INT32_MAX, &s->max_tokens));
    SH_TRY(get_i32(r, "min_tokens", 0, INT32_MAX, &s->min_tokens));
    int32_t flags = 0;
    SH_TRY(get_i32(r, "flags", 0, 3, &flags));
    s->ignore_eos = flags & 1;
    s->score_prompt = flags & 2;
    SH_TRY(get_i32(r, "logprobs", -1, SH_MAX_TOP_LOGPROBS, &s->logprobs));
    SH_TRY(get_list(r, "end tokens", SH_MAX_STOP_IDS, s->eos, &s->n_eos));
    SH_TRY(get_list(r, "stop tokens", SH_MAX_STOP_IDS, s->stop_ids, &s->n_stop_ids));
    SH_TRY(get_list(r, "suppressed tokens", SH_MAX_STOP_IDS, s->suppress, &s->n_suppress));
    return get_stops(r, s);
}

static sh_status get_pages(reader *r, int32_t *page0, int32_t *n_pages, const int32_t **out) {
    SH_TRY(get_i32(r, "first page", 0, MAX_POS / SH_PAGE_TOKENS, page0));
    SH_TRY(get_i32(r, "pages", 0, MAX_POS / SH_PAGE_TOKENS, n_pages));
    int32_t *pages = NULL;
    SH_TRY(take(r, "pages", *n_pages, sizeof *pages, 4, (void **)&pages));
    SH_TRY(get_ints(r, "page", *n_pages, 0, pages));
    *out = pages;
    return SH_OK;
}

static sh_status get_span(reader *r, sh_batch *b, sh_span *s, int32_t *row, int32_t *kept) {
    *s = (sh_span){.row0 = *row, .kept0 = *kept};
    SH_TRY(get_u64(r, &s->seq));
    SH_TRY(get_i32(r, "position", 0, MAX_POS, &s->pos));
    SH_TRY(get_i32(r, "rows of a span", 1, b->n_rows - *row, &s->rows));
    SH_TRY(get_i32(r, "kept rows of a span", 0, s->rows, &s->keep));
    SH_TRY(get_i32(r, "level of a span", 0, SH_MAX_LEVEL, &s->level));
    for (int k = 0; k < SH_KV_KINDS; k++) SH_TRY(get_pages(r, &s->page0[k], &s->n_pages[k], &s->pages[k]));
    *row += s->rows;
    *kept += s->keep;
    return SH_OK;
}

static sh_status get_start(reader *r, sh_seq_start *s) {
    sh_sampling *sampling = NULL;
    SH_TRY(get_u64(r, &s->seq));
    SH_TRY(take(r, "sampling", 1, sizeof *sampling, 1, (void **)&sampling));
    SH_TRY(get_sampling(r, sampling));
    s->sampling = sampling;
    SH_TRY(get_i32(r, "prompt tokens", 0, MAX_POS, &s->n_prompt));
    SH_TRY(get_i32(r, "tokens of a sequence", s->n_prompt, MAX_POS, &s->n_tokens));
    int32_t *tokens = NULL;
    SH_TRY(take(r, "tokens of a sequence", s->n_tokens, sizeof *tokens, 4, (void **)&tokens));
    SH_TRY(get_ints(r, "token", s->n_tokens, 0, tokens));
    s->tokens = tokens;
    return SH_OK;
}

static sh_status get_handoff(reader *r, const sh_span *s, sh_handoff *h) {
    for (int k = 0; k < SH_KV_KINDS; k++) {
        int32_t end = s->pos + s->rows;
        SH_TRY(get_i32(r, "first position handed over", s->pos, end, &h->from[k]));
        SH_TRY(get_pages(r, &h->page0[k], &h->n_pages[k], &h->pages[k]));
        if (h->from[k] < end &&
            (h->page0[k] > h->from[k] / SH_PAGE_TOKENS || h->page0[k] + h->n_pages[k] <= (end - 1) / SH_PAGE_TOKENS))
            SH_FAIL(SH_EFORMAT, "batch: pages %d to %d do not hold positions %d to %d that are handed over",
                    h->page0[k], h->page0[k] + h->n_pages[k] - 1, h->from[k], end - 1);
    }
    return SH_OK;
}

static sh_status get_handoffs(reader *r, sh_batch *b) {
    SH_TRY(get_i32(r, "spans handed over", 0, b->n_spans, &b->n_handoffs));
    if (b->n_handoffs == 0) return SH_OK;
    if (b->n_handoffs != b->n_spans)
        SH_FAIL(SH_EFORMAT, "batch: %d of %d spans handed over: all or none", b->n_handoffs, b->n_spans);
    SH_TRY(get_u64(r, &b->after));
    SH_TRY(take(r, "spans handed over", b->n_handoffs, sizeof *b->handoffs, 24, (void **)&b->handoffs));
    for (int i = 0; i < b->n_handoffs; i++) SH_TRY(get_handoff(r, &b->spans[i], &b->handoffs[i]));
    return SH_OK;
}

static sh_status get_counts(reader *r, sh_batch *b) {
    SH_TRY(get_u64(r, &b->step));
    SH_TRY(get_i32(r, "rows", 0, MAX_ROWS, &b->n_rows));
    SH_TRY(get_i32(r, "spans", 0, b->n_rows, &b->n_spans));
    SH_TRY(get_i32(r, "starting sequences", 0, SH_MAX_SEQS, &b->n_starts));
    SH_TRY(get_i32(r, "ending sequences", 0, SH_MAX_SEQS, &b->n_drops));
    SH_TRY(get_i32(r, "most rows", 0, MAX_ROWS, &b->widest_rows));
    return get_i32(r, "most kept rows", 0, MAX_ROWS, &b->widest_kept);
}

static sh_status get_body(reader *r, sh_batch *b) {
    SH_TRY(get_counts(r, b));
    SH_TRY(take(r, "token ids", b->n_rows, sizeof *b->ids, 4, (void **)&b->ids));
    SH_TRY(get_ints(r, "token id", b->n_rows, 0, b->ids));
    SH_TRY(take(r, "spans", b->n_spans, sizeof *b->spans, 40, (void **)&b->spans));
    int32_t row = 0;
    for (int i = 0; i < b->n_spans; i++) SH_TRY(get_span(r, b, &b->spans[i], &row, &b->n_kept));
    if (row != b->n_rows) SH_FAIL(SH_EFORMAT, "batch: spans hold %d rows of %d", row, b->n_rows);
    SH_TRY(take(r, "starting sequences", b->n_starts, sizeof *b->starts, 64, (void **)&b->starts));
    for (int i = 0; i < b->n_starts; i++) SH_TRY(get_start(r, &b->starts[i]));
    SH_TRY(take(r, "ending sequences", b->n_drops, sizeof *b->drops, 8, (void **)&b->drops));
    for (int i = 0; i < b->n_drops; i++) SH_TRY(get_u64(r, &b->drops[i]));
    SH_TRY(get_handoffs(r, b));
    if (r->left != 0) SH_FAIL(SH_EFORMAT, "batch: %zu bytes too many in the descriptor", r->left);
    return SH_OK;
}

sh_status sh_batch_decode(sh_batch *b, const void *data, size_t len, size_t *used) {
    reader r = {.p = data, .left = len};
    uint32_t total = 0, magic = 0;
    SH_TRY(get_u32(&r, &total));
    SH_TRY(get_u32(&r, &magic));
    if (magic != MAGIC) SH_FAIL(SH_EFORMAT, "batch: magic %08x: not a batch descriptor", magic);
    if (total > len || total < 8)
        SH_FAIL(SH_EFORMAT, "batch: a descriptor of %u bytes in a message of %zu", total, len);
    r.left = total - 8;
    sh_batch got = {.arena = b->arena};
    sh_arena_reset(&got.arena);
    r.arena = &got.arena;
    sh_status st = get_body(&r, &got);
    if (st != SH_OK) {
        sh_arena_reset(&b->arena); /* the old content is overwritten */
        *b = (sh_batch){.arena = b->arena};
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *b = got;
    *used = total;
    return SH_OK;
}
