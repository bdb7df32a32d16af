/* The tokens message as bytes, and back. See tokens.h. */
#include "worker/tokens.h"

#include <string.h>

#define MAGIC  0x314b5453u /* "STK1" */
#define HEADER 20          /* u32 length, u32 magic, u64 step, u32 n */
#define FIXED  28          /* of one token; each alternative adds 8 */

static void put32(uint8_t *p, uint32_t v) {
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(v >> (8 * i));
}

static void put64(uint8_t *p, uint64_t v) {
    for (int i = 0; i < 8; i++) p[i] = (uint8_t)(v >> (8 * i));
}

static uint32_t get32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t get64(const uint8_t *p) {
    return get32(p) | (uint64_t)get32(p + 4) << 32;
}

static uint32_t bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float number(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

size_t sh_tokens_bytes(int n) {
    return HEADER + (size_t)n * (FIXED + 8 * SH_MAX_TOP_LOGPROBS);
}

sh_status sh_tokens_begin(sh_buf *to, uint64_t step) {
    uint8_t h[HEADER] = {0};
    put32(h + 4, MAGIC);
    put64(h + 8, step);
    return sh_buf_add(to, h, sizeof h);
}

sh_status sh_tokens_add(sh_buf *to, const sh_token *t) {
    uint8_t b[FIXED + 8 * SH_MAX_TOP_LOGPROBS];
    if (t->n_top < 0 || t->n_top > SH_MAX_TOP_LOGPROBS)
        SH_FAIL(SH_ESTATE, "token with %d alternatives: 0 to %d are allowed", t->n_top, SH_MAX_TOP_LOGPROBS);
    put64(b, t->seq);
    put32(b + 8, (uint32_t)t->index);
    put32(b + 12, (uint32_t)t->id);
    put32(b + 16, bits(t->logprob));
    put32(b + 20, (uint32_t)t->text_len);
    b[24] = t->score;
    b[25] = t->finish;
    b[26] = (uint8_t)t->n_top;
    b[27] = 0;
    for (int i = 0; i < t->n_top; i++) {
        put32(b + FIXED + 8 * i, (uint32_t)t->top[i].id);
        put32(b + FIXED + 8 * i + 4, bits(t->top[i].logprob));
    }
    return sh_buf_add(to, b, FIXED + 8 * (size_t)t->n_top);
}

sh_status sh_tokens_end(sh_buf *to, int n) {
    if (to->len < HEADER || to->len > UINT32_MAX) SH_FAIL(SH_ESTATE, "tokens message of %zu bytes", to->len);
    put32(to->data, (uint32_t)to->len);
    put32(to->data + 16, (uint32_t)n);
    return SH_OK;
}

static sh_status get_token(const uint8_t *p, size_t left, sh_token *t, size_t *used) {
    if (left < FIXED) SH_FAIL(SH_EPEER, "tokens message ends within a token");
    int n_top = p[26];
    size_t size = FIXED + 8 * (size_t)n_top;
    if (p[24] > 1 || p[25] > SH_FINISH_CANCEL || n_top > SH_MAX_TOP_LOGPROBS || left < size)
        SH_FAIL(SH_EPEER, "tokens message: a token with score %d, finish %d and %d alternatives", p[24], p[25], n_top);
    *t = (sh_token){.seq = get64(p),
                    .index = (int32_t)get32(p + 8),
                    .id = (int32_t)get32(p + 12),
                    .logprob = number(get32(p + 16)),
                    .text_len = (int32_t)get32(p + 20),
                    .score = p[24] != 0,
                    .finish = p[25],
                    .n_top = n_top};
    for (int i = 0; i < n_top; i++)
        t->top[i] =
            (sh_top_logprob){.id = (int32_t)get32(p + FIXED + 8 * i), .logprob = number(get32(p + FIXED + 8 * i + 4))};
    *used = size;
    return SH_OK;
}

sh_status sh_tokens_decode(const void *data, size_t len, sh_token *tokens, int max, uint64_t *step, int *n) {
    const uint8_t *p = data;
    if (len < HEADER || get32(p + 4) != MAGIC || get32(p) != len)
        SH_FAIL(SH_EPEER, "tokens message of %zu bytes: no such message, or cut short", len);
    uint32_t count = get32(p + 16);
    if (max < 0 || count > (uint32_t)max)
        SH_FAIL(SH_EPEER, "tokens message with %u tokens: %d were possible", count, max);
    size_t at = HEADER;
    for (uint32_t i = 0; i < count; i++) {
        size_t used = 0;
        SH_TRY(get_token(p + at, len - at, &tokens[i], &used));
        at += used;
    }
    if (at != len) SH_FAIL(SH_EPEER, "tokens message: %zu bytes after the last token", len - at);
    *step = get64(p + 8);
    *n = (int)count;
    return SH_OK;
}
