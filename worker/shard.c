/*
 * Shards as bytes. Little-endian, as all ranks are (model/weights.c asserts it); the fields stand in the order of
 * `header`, which has no padding. See shard.h.
 */
#include "worker/shard.h"

#include <string.h>

#include "common/hash.h"
#include "common/mem.h"
#include "model/batch.h"

#define MAGIC 0x314b4853u /* "SHK1" */

typedef struct header {
    uint32_t magic, header_bytes; /* up to the payload */
    uint64_t payload_bytes, model, seq;
    uint32_t type;
    int32_t first, last, head, heads, head_dim, parts, pos, tokens, page0, n_pages, page_tokens;
    uint64_t checksum, zero;
} header;
_Static_assert(sizeof(header) == 96, "no padding");
_Static_assert(SH_SHARD_ALIGN == SH_MEM_ALIGN, "what travels is laid out with sh_mem_align");

static size_t header_bytes(int32_t n_pages) {
    return sh_mem_align(sizeof(header) + (size_t)n_pages * sizeof(int32_t));
}

size_t sh_shard_payload_bytes(const sh_shard *s) {
    return (size_t)(s->last - s->first) * (size_t)s->tokens * (size_t)s->parts * (size_t)s->heads *
           sh_kv_vec_bytes(s->type, s->head_dim);
}

size_t sh_shard_bytes(const sh_shard *s) {
    return header_bytes(s->n_pages) + sh_shard_payload_bytes(s);
}

void *sh_shard_begin(const sh_shard *s, void *to) {
    size_t n = header_bytes(s->n_pages), list = (size_t)s->n_pages * sizeof(int32_t);
    const header h = {.magic = MAGIC,
                      .header_bytes = (uint32_t)n,
                      .payload_bytes = sh_shard_payload_bytes(s),
                      .model = s->model,
                      .seq = s->seq,
                      .type = s->type,
                      .first = s->first,
                      .last = s->last,
                      .head = s->head,
                      .heads = s->heads,
                      .head_dim = s->head_dim,
                      .parts = s->parts,
                      .pos = s->pos,
                      .tokens = s->tokens,
                      .page0 = s->page0,
                      .n_pages = s->n_pages,
                      .page_tokens = SH_PAGE_TOKENS};
    uint8_t *p = to;
    memcpy(p, &h, sizeof h);
    if (list) memcpy(p + sizeof h, s->pages, list);
    memset(p + sizeof h + list, 0, n - sizeof h - list);
    return p + n;
}

/* Of the header with its checksum as 0, then of the payload. */
static uint64_t checksum(const uint8_t *p, const header *h) {
    header plain = *h;
    plain.checksum = 0;
    uint64_t sum = sh_hash64(0, &plain, sizeof plain);
    sum = sh_hash64(sum, p + sizeof plain, h->header_bytes - sizeof plain);
    return sh_hash64_long(sum, p + h->header_bytes, h->payload_bytes);
}

void sh_shard_seal(void *shard) {
    header h;
    memcpy(&h, shard, sizeof h);
    h.checksum = checksum(shard, &h);
    memcpy(shard, &h, sizeof h);
}

/* Counts small enough that no product of them overflows, and consistent with the lengths. */
static sh_status check_counts(const header *h, size_t len) {
    const int32_t most = 1 << 30;
    if (h->magic != MAGIC || h->zero != 0) SH_FAIL(SH_EFORMAT, "KV shard: magic %08x: no shard", h->magic);
    if (h->type >= SH_KV_TYPES || h->first < 0 || h->last <= h->first || h->last > SH_MAX_LAYERS || h->head < 0 ||
        h->heads < 1 || h->heads > 65536 - h->head || h->head_dim < 1 || h->head_dim > 65536 || h->parts < 1 ||
        h->parts > 2)
        SH_FAIL(SH_EFORMAT, "KV shard: type %u, layers %d to %d, %d heads from %d of %d values, %d parts: no such rows",
                h->type, h->first, h->last - 1, h->heads, h->head, h->head_dim, h->parts);
    if (h->pos < 0 || h->tokens < 1 || h->tokens > most - h->pos || h->page0 < 0 || h->n_pages < 0 ||
        h->n_pages > most / SH_PAGE_TOKENS || h->page_tokens != SH_PAGE_TOKENS)
        SH_FAIL(SH_EFORMAT, "KV shard: %d positions from %d in %d pages of %d from %d: no such rows", h->tokens, h->pos,
                h->n_pages, h->page_tokens, h->page0);
    if (h->n_pages > 0 &&
        (h->page0 > h->pos / SH_PAGE_TOKENS || h->page0 + h->n_pages <= (h->pos + h->tokens - 1) / SH_PAGE_TOKENS))
        SH_FAIL(SH_EFORMAT, "KV shard: pages %d to %d do not hold positions %d to %d", h->page0,
                h->page0 + h->n_pages - 1, h->pos, h->pos + h->tokens - 1);
    if (h->header_bytes != header_bytes(h->n_pages) || h->header_bytes > len ||
        h->payload_bytes > len - h->header_bytes)
        SH_FAIL(SH_EFORMAT, "KV shard: header of %u and payload of %llu bytes in %zu", h->header_bytes,
                (unsigned long long)h->payload_bytes, len);
    return SH_OK;
}

sh_status sh_shard_open(const void *data, size_t len, sh_shard *out, size_t *used) {
    const uint8_t *p = data;
    header h;
    if (len < sizeof h || (uintptr_t)data % 8 != 0) SH_FAIL(SH_EFORMAT, "KV shard: no shard in %zu bytes", len);
    memcpy(&h, p, sizeof h);
    SH_TRY(check_counts(&h, len));
    sh_shard s = {.model = h.model,
                  .seq = h.seq,
                  .type = (sh_kv_type)h.type,
                  .first = h.first,
                  .last = h.last,
                  .head = h.head,
                  .heads = h.heads,
                  .head_dim = h.head_dim,
                  .parts = h.parts,
                  .pos = h.pos,
                  .tokens = h.tokens,
                  .page0 = h.page0,
                  .n_pages = h.n_pages,
                  .pages = (const int32_t *)(const void *)(p + sizeof h),
                  .payload = p + h.header_bytes};
    double exact = (double)(h.last - h.first) * h.tokens * h.parts * h.heads; /* far below 2^53, or not equal */
    if (exact * (double)sh_kv_vec_bytes(s.type, h.head_dim) != (double)h.payload_bytes)
        SH_FAIL(SH_EFORMAT, "KV shard: payload of %llu bytes: its shape implies another length",
                (unsigned long long)h.payload_bytes);
    if (checksum(p, &h) != h.checksum)
        SH_FAIL(SH_EFORMAT, "KV shard: the checksum of layers %d to %d, positions %d to %d of sequence %llu is wrong",
                h.first, h.last - 1, h.pos, h.pos + h.tokens - 1, (unsigned long long)h.seq);
    *out = s;
    *used = h.header_bytes + h.payload_bytes;
    return SH_OK;
}

sh_status sh_shard_check(const sh_shard *s, const sh_config *c, sh_kv_type type, uint64_t model) {
    if (s->model != model)
        SH_FAIL(SH_EFORMAT, "KV shard: of model %016llx: this is %016llx", (unsigned long long)s->model,
                (unsigned long long)model);
    if (s->type != type || s->last > c->n_layers)
        SH_FAIL(SH_EFORMAT, "KV shard: type %s, layers %d to %d: expected type %s, layers below %d",
                sh_kv_type_name(s->type), s->first, s->last - 1, sh_kv_type_name(type), c->n_layers);
    for (int i = s->first; i < s->last; i++) {
        const sh_layer *l = &c->layer[i];
        if (!l->has_kv || s->head_dim != l->head_dim || s->parts != (l->k_eq_v ? 1 : 2) ||
            s->head + s->heads > l->kv_heads)
            SH_FAIL(SH_EFORMAT, "KV shard: %d heads from %d of %d values in %d parts: layer %d has no such rows",
                    s->heads, s->head, s->head_dim, s->parts, i);
    }
    return SH_OK;
}
