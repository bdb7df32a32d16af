/* KV shards: round trips, every byte altered, bytes cut short, shapes that no model has. */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>
#include "common/hash.h"
#include "worker/shard.h"

static const int32_t pages[] = {9, 2, 5, 11};

static sh_shard example(void) {
    return (sh_shard){.model = 0x1122334455667788u,
                      .seq = 77,
                      .type = SH_KV_BF16,
                      .first = 3,
                      .last = 4,
                      .heads = 2,
                      .head_dim = 16,
                      .parts = 2,
                      .pos = 60,
                      .tokens = 70,
                      .page0 = 1,
                      .n_pages = 4,
                      .pages = pages};
}

/* A sealed shard; its payload is a pattern. Freed by the caller. */
static uint8_t *sealed(const sh_shard *s, size_t *len) {
    *len = sh_shard_bytes(s);
    uint8_t *p = aligned_alloc(SH_SHARD_ALIGN, (*len + SH_SHARD_ALIGN - 1) / SH_SHARD_ALIGN * SH_SHARD_ALIGN);
    uint8_t *to = sh_shard_begin(s, p);
    CU_ASSERT_EQUAL(((uintptr_t)to - (uintptr_t)p) % SH_SHARD_ALIGN, 0);
    for (size_t i = 0; i < sh_shard_payload_bytes(s); i++) to[i] = (uint8_t)(i * 31 + 7);
    sh_shard_seal(p);
    return p;
}

static void round_trip(const sh_shard *s) {
    size_t len = 0, used = 0;
    uint8_t *p = sealed(s, &len);
    sh_shard got;
    CU_ASSERT_EQUAL(sh_shard_open(p, len, &got, &used), SH_OK);
    CU_ASSERT_EQUAL(used, len);
    CU_ASSERT_EQUAL(got.model, s->model);
    CU_ASSERT_EQUAL(got.seq, s->seq);
    CU_ASSERT_EQUAL(got.type, s->type);
    CU_ASSERT(got.first == s->first && got.last == s->last && got.head == s->head && got.heads == s->heads);
    CU_ASSERT(got.head_dim == s->head_dim && got.parts == s->parts && got.pos == s->pos && got.tokens == s->tokens);
    CU_ASSERT(got.page0 == s->page0 && got.n_pages == s->n_pages);
    CU_ASSERT(memcmp(got.pages, pages, (size_t)got.n_pages * sizeof *pages) == 0);
    const uint8_t *payload = got.payload;
    for (size_t i = 0; i < sh_shard_payload_bytes(s); i++)
        if (payload[i] != (uint8_t)(i * 31 + 7)) CU_FAIL("payload");
    free(p);
}

static void test_round_trips(void) {
    sh_shard s = example();
    round_trip(&s);
    s.n_pages = s.page0 = 0; /* where it belongs is not known */
    round_trip(&s);
    s.type = SH_KV_F32;
    s.parts = 1;
    s.first = 0;
    s.last = 7;
    s.head = 3;
    s.tokens = 1;
    round_trip(&s);
    s.type = SH_KV_Q8;
    CU_ASSERT_EQUAL(sh_shard_payload_bytes(&s), 7u * 2 * (16 + 4));
    round_trip(&s);
}

/* Every bit counts: header, pages, padding and payload. */
static void altered(sh_kv_type type) {
    sh_shard s = example(), got;
    s.type = type;
    size_t len = 0, used = 0;
    uint8_t *p = sealed(&s, &len);
    for (size_t i = 0; i < len; i++) {
        uint8_t was = p[i];
        p[i] ^= (uint8_t)(1u << (i % 8));
        if (sh_shard_open(p, len, &got, &used) != SH_EFORMAT) {
            fprintf(stderr, "shard_test: byte %zu\n", i);
            CU_FAIL("an altered byte was not seen");
        }
        p[i] = was;
    }
    CU_ASSERT_EQUAL(sh_shard_open(p, len, &got, &used), SH_OK);
    for (size_t n = 0; n < len; n++) CU_ASSERT_EQUAL(sh_shard_open(p, n, &got, &used), SH_EFORMAT);
    CU_ASSERT_EQUAL(sh_shard_open(p + 4, len - 4, &got, &used), SH_EFORMAT); /* not aligned */
    free(p);
}

static void test_altered(void) {
    altered(SH_KV_BF16);
    altered(SH_KV_Q8);
}

/* Headers of random numbers are refused before anything outside is read. */
static void test_invented(void) {
    uint64_t rng = 5;
    sh_shard got;
    size_t used = 0;
    _Alignas(64) uint8_t p[512];
    for (int i = 0; i < 20000; i++) {
        sh_shard s = example();
        s.n_pages = 1;
        memset(p, 0, sizeof p);
        sh_shard_begin(&s, p);
        for (int j = 0; j < 3; j++) {
            rng = sh_mix64(rng);
            uint32_t value = (uint32_t)(rng >> (rng % 33)) >> (rng >> 8) % 32;
            memcpy(p + 32 + 4 * ((rng >> 16) % 12), &value, 4);
        }
        CU_ASSERT_EQUAL(sh_shard_open(p, sizeof p, &got, &used), SH_EFORMAT);
    }
}

static void refuse(const sh_config *c, sh_shard s, const char *words) {
    CU_ASSERT_EQUAL(sh_shard_check(&s, c, SH_KV_BF16, 0x1122334455667788u), SH_EFORMAT);
    if (!strstr(sh_error_text(), words)) {
        fprintf(stderr, "shard_test: \"%s\" has no \"%s\"\n", sh_error_text(), words);
        CU_FAIL("words");
    }
}

static void test_model(void) {
    sh_config *c = calloc(1, sizeof *c);
    CU_ASSERT_FATAL(c != NULL);
    c->n_layers = 6;
    for (int i = 0; i < 6; i++)
        c->layer[i] = (sh_layer){.kv_heads = 2, .head_dim = 16, .has_kv = i < 5, .k_eq_v = i == 4, .kv_from = i};
    sh_shard s = example(), x;
    CU_ASSERT_EQUAL(sh_shard_check(&s, c, SH_KV_BF16, s.model), SH_OK);
    x = s, x.model++;
    refuse(c, x, "of model");
    x = s, x.type = SH_KV_F32;
    refuse(c, x, "expected type bf16");
    x = s, x.type = SH_KV_Q8;
    refuse(c, x, "type q8, layers 3 to 3: expected type bf16");
    x = s, x.last = 7;
    refuse(c, x, "layers below 6");
    x = s, x.last = 5; /* layer 4 stores V alone */
    refuse(c, x, "layer 4");
    x = s, x.first = 5, x.last = 6;
    refuse(c, x, "layer 5");
    x = s, x.head = 1;
    refuse(c, x, "2 heads from 1");
    free(c);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("shard", NULL, NULL);
    CU_add_test(s, "round trips", test_round_trips);
    CU_add_test(s, "altered and cut short", test_altered);
    CU_add_test(s, "invented headers", test_invented);
    CU_add_test(s, "of another model", test_model);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed || CU_get_error() ? 1 : 0;
}
