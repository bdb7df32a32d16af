/* The batch descriptor: round trips, and bytes that are cut short, altered or invented. */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>
#include "model/batch.h"

static const int32_t pages_a[] = {5, 0, 77}, pages_b[] = {3}, tokens[] = {2, 9, 4, 1};

static void sampling_example(sh_sampling *s) {
    *s = (sh_sampling){.temperature = 0.7f, .top_p = 0.95f, .min_p = 0.01f, .top_k = 64, .seed = 0x123456789abcdef0u};
    s->choice = 3;
    s->max_tokens = 100;
    s->min_tokens = 2;
    s->ignore_eos = true;
    s->logprobs = 5;
    s->n_eos = 2;
    s->eos[0] = 1;
    s->eos[1] = 106;
    s->n_suppress = 1;
    s->suppress[0] = 258880;
    s->n_stops = 2;
    s->stop_len[0] = 3;
    memcpy(s->stop[0], "END", 3);
    s->stop_len[1] = SH_MAX_STOP_BYTES;
    memset(s->stop[1], 'x', SH_MAX_STOP_BYTES);
}

/* A batch with two spans, a start and a drop; everything borrowed from statics. */
static sh_batch example(void) {
    static int32_t ids[] = {10, 11, 12, 13};
    static sh_sampling sampling;
    static sh_span spans[2];
    static sh_seq_start start;
    static uint64_t drops[] = {7, UINT64_MAX};
    sampling_example(&sampling);
    spans[0] = (sh_span){.seq = 1, .pos = 64, .rows = 3, .keep = 1, .page0 = {0, 1}, .n_pages = {3, 2}};
    spans[0].pages[0] = pages_a;
    spans[0].pages[1] = pages_a + 1;
    spans[1] = (sh_span){.seq = 2, .pos = 5, .rows = 1, .keep = 1, .row0 = 3, .kept0 = 1, .n_pages = {1, 1}};
    spans[1].pages[0] = spans[1].pages[1] = pages_b;
    static sh_handoff handoffs[2];
    handoffs[0] = (sh_handoff){.from = {64, 66}, .page0 = {2, 1}, .n_pages = {1, 2}, .pages = {pages_a, pages_a}};
    handoffs[1] = (sh_handoff){.from = {5, 6}, .n_pages = {1, 0}, .pages = {pages_b, NULL}};
    start = (sh_seq_start){.seq = 2, .sampling = &sampling, .tokens = tokens, .n_prompt = 3, .n_tokens = 4};
    return (sh_batch){.step = 1ull << 40,
                      .n_rows = 4,
                      .n_kept = 2,
                      .n_spans = 2,
                      .n_starts = 1,
                      .n_drops = 2,
                      .ids = ids,
                      .spans = spans,
                      .starts = &start,
                      .drops = drops,
                      .n_handoffs = 2,
                      .after = 1234567890123,
                      .handoffs = handoffs};
}

static sh_buf encoded(void) {
    sh_batch b = example();
    sh_buf buf;
    sh_buf_init(&buf, 0);
    CU_ASSERT_FATAL(sh_batch_encode(&b, &buf) == SH_OK);
    return buf;
}

static void check_span(const sh_span *a, const sh_span *b) {
    CU_ASSERT_EQUAL(a->seq, b->seq);
    CU_ASSERT_EQUAL(a->pos, b->pos);
    CU_ASSERT_EQUAL(a->rows, b->rows);
    CU_ASSERT_EQUAL(a->keep, b->keep);
    CU_ASSERT_EQUAL(a->row0, b->row0);
    CU_ASSERT_EQUAL(a->kept0, b->kept0);
    for (int k = 0; k < SH_KV_KINDS; k++) {
        CU_ASSERT_EQUAL(a->page0[k], b->page0[k]);
        CU_ASSERT_EQUAL_FATAL(a->n_pages[k], b->n_pages[k]);
        CU_ASSERT(memcmp(a->pages[k], b->pages[k], (size_t)a->n_pages[k] * 4) == 0);
    }
}

static void check_handoff(const sh_handoff *a, const sh_handoff *b) {
    for (int k = 0; k < SH_KV_KINDS; k++) {
        CU_ASSERT_EQUAL(a->from[k], b->from[k]);
        CU_ASSERT_EQUAL(a->page0[k], b->page0[k]);
        CU_ASSERT_EQUAL_FATAL(a->n_pages[k], b->n_pages[k]);
        CU_ASSERT(a->n_pages[k] == 0 || memcmp(a->pages[k], b->pages[k], (size_t)a->n_pages[k] * 4) == 0);
    }
}

/* Hand-offs that do not fit their spans. */
static void bad_handoffs(void) {
    for (int bad = 0; bad < 5; bad++) {
        sh_batch a = example(), b;
        sh_handoff h[2] = {a.handoffs[0], a.handoffs[1]};
        sh_buf buf;
        size_t used = 0;
        sh_buf_init(&buf, 0);
        a.handoffs = h;
        if (bad == 0) h[0].from[0] = 63;   /* before the span */
        if (bad == 1) h[1].from[1] = 7;    /* behind its end */
        if (bad == 2) h[0].page0[0] = 1;   /* pages that do not hold the last row */
        if (bad == 3) h[1].n_pages[0] = 0; /* no pages for a row that travels */
        if (bad == 4) a.n_handoffs = 1;    /* not all spans */
        CU_ASSERT_FATAL(sh_batch_encode(&a, &buf) == SH_OK);
        CU_ASSERT_FATAL(sh_batch_create(1 << 20, &b) == SH_OK);
        CU_ASSERT_EQUAL(sh_batch_decode(&b, buf.data, buf.len, &used), SH_EFORMAT);
        sh_batch_release(&b);
        sh_buf_release(&buf);
    }
}

static void round_trip(void) {
    sh_buf buf = encoded();
    CU_ASSERT_FATAL(sh_buf_add(&buf, "after", 5) == SH_OK); /* activations follow in the same message */
    sh_batch a = example(), b;
    size_t used = 0;
    CU_ASSERT_FATAL(sh_batch_create(1 << 20, &b) == SH_OK);
    for (int again = 0; again < 3; again++) {
        CU_ASSERT_FATAL(sh_batch_decode(&b, buf.data, buf.len, &used) == SH_OK);
        CU_ASSERT_EQUAL(used, buf.len - 5);
        CU_ASSERT_EQUAL(b.step, a.step);
        CU_ASSERT_EQUAL_FATAL(b.n_rows, 4);
        CU_ASSERT_EQUAL(b.n_kept, 2);
        CU_ASSERT(memcmp(a.ids, b.ids, 16) == 0);
        CU_ASSERT_EQUAL_FATAL(b.n_spans, 2);
        for (int i = 0; i < 2; i++) check_span(&a.spans[i], &b.spans[i]);
        CU_ASSERT_EQUAL_FATAL(b.n_starts, 1);
        CU_ASSERT(memcmp(a.starts[0].sampling, b.starts[0].sampling, sizeof(sh_sampling)) == 0);
        CU_ASSERT_EQUAL(b.starts[0].n_prompt, 3);
        CU_ASSERT_EQUAL_FATAL(b.starts[0].n_tokens, 4);
        CU_ASSERT(memcmp(b.starts[0].tokens, tokens, sizeof tokens) == 0);
        CU_ASSERT_EQUAL_FATAL(b.n_drops, 2);
        CU_ASSERT_EQUAL(b.drops[1], UINT64_MAX);
        CU_ASSERT_EQUAL(b.after, 1234567890123);
        CU_ASSERT_EQUAL_FATAL(b.n_handoffs, 2);
        for (int i = 0; i < 2; i++) check_handoff(&a.handoffs[i], &b.handoffs[i]);
    }
    sh_batch_release(&b);
    sh_batch_release(&b); /* again: harmless */
    sh_buf_release(&buf);
}

static void empty_batch(void) {
    sh_batch a = {.step = 9}, b;
    sh_buf buf;
    size_t used = 0;
    sh_buf_init(&buf, 0);
    CU_ASSERT_FATAL(sh_batch_encode(&a, &buf) == SH_OK);
    CU_ASSERT_FATAL(sh_batch_create(4096, &b) == SH_OK);
    CU_ASSERT(sh_batch_decode(&b, buf.data, buf.len, &used) == SH_OK);
    CU_ASSERT_EQUAL(b.step, 9);
    CU_ASSERT_EQUAL(b.n_rows, 0);
    sh_batch_release(&b);
    sh_buf_release(&buf);
}

/* A copy in memory of exactly this length, so that a sanitizer sees one byte read too many. */
static sh_status decode_copy(sh_batch *b, const uint8_t *data, size_t len) {
    uint8_t *p = malloc(len ? len : 1);
    if (!p) exit(1);
    memcpy(p, data, len);
    size_t used = 12345;
    sh_status st = sh_batch_decode(b, p, len, &used);
    if (st != SH_OK) {
        CU_ASSERT_EQUAL(used, 12345);
        CU_ASSERT(sh_error_text()[0] != 0);
    }
    free(p);
    return st;
}

static void every_truncation(void) {
    sh_buf buf = encoded();
    sh_batch b;
    CU_ASSERT_FATAL(sh_batch_create(1 << 20, &b) == SH_OK);
    for (size_t n = 0; n < buf.len; n++) {
        CU_ASSERT_EQUAL(decode_copy(&b, buf.data, n), SH_EFORMAT);
        if (n < 8) continue;
        uint32_t len = (uint32_t)n; /* the same with a length that claims to be right */
        uint8_t *p = malloc(n);
        if (!p) exit(1);
        memcpy(p, buf.data, n);
        memcpy(p, &len, 4);
        CU_ASSERT_EQUAL(decode_copy(&b, p, n), SH_EFORMAT);
        free(p);
    }
    sh_batch_release(&b);
    sh_buf_release(&buf);
}

static uint64_t state = 88172645463325252u;
static uint32_t rnd(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}

/* What decodes must make sense, whatever the bytes were. */
static void check_sane(const sh_batch *b) {
    int row = 0, kept = 0;
    for (int i = 0; i < b->n_spans; i++) {
        const sh_span *s = &b->spans[i];
        CU_ASSERT(s->pos >= 0 && s->rows >= 1 && s->keep >= 0 && s->keep <= s->rows);
        CU_ASSERT(s->row0 == row && s->kept0 == kept);
        row += s->rows;
        kept += s->keep;
        for (int k = 0; k < SH_KV_KINDS; k++)
            for (int p = 0; p < s->n_pages[k]; p++) CU_ASSERT(s->pages[k][p] >= 0);
    }
    CU_ASSERT(row == b->n_rows && kept == b->n_kept);
    for (int i = 0; i < b->n_starts; i++) {
        const sh_seq_start *s = &b->starts[i];
        CU_ASSERT(s->n_prompt >= 0 && s->n_prompt <= s->n_tokens && s->sampling->n_stops <= SH_MAX_STOPS);
    }
}

static void altered_bytes(void) {
    sh_buf buf = encoded();
    sh_batch b;
    CU_ASSERT_FATAL(sh_batch_create(1 << 20, &b) == SH_OK);
    uint8_t *p = malloc(buf.len);
    if (!p) exit(1);
    int refused = 0, rounds = 20000;
    for (int i = 0; i < rounds; i++) {
        memcpy(p, buf.data, buf.len);
        for (uint32_t n = 1 + rnd() % 4; n > 0; n--) {
            size_t at = rnd() % buf.len;
            uint32_t how = rnd() % 3;
            p[at] = how == 0 ? (uint8_t)rnd() : how == 1 ? 0xff : (uint8_t)(p[at] ^ 1u << rnd() % 8);
        }
        if (decode_copy(&b, p, buf.len) == SH_OK)
            check_sane(&b);
        else
            refused++;
    }
    CU_ASSERT(refused > rounds / 50);
    for (int i = 0; i < 2000; i++) { /* nothing but noise behind a right beginning */
        size_t n = 8 + rnd() % 200;
        for (size_t k = 8; k < n; k++) p[k] = (uint8_t)(rnd() % 4 ? 0 : rnd());
        uint32_t len = (uint32_t)n;
        memcpy(p, &len, 4);
        memcpy(p + 4, buf.data + 4, 4);
        if (decode_copy(&b, p, n) == SH_OK) check_sane(&b);
    }
    free(p);
    sh_batch_release(&b);
    sh_buf_release(&buf);
}

static void too_small(void) {
    sh_buf buf = encoded();
    sh_batch b;
    CU_ASSERT_FATAL(sh_batch_create(1024, &b) == SH_OK);
    CU_ASSERT_EQUAL(decode_copy(&b, buf.data, buf.len), SH_ELIMIT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "1024"));
    sh_batch_release(&b);
    sh_buf small; /* encoding into a full buffer leaves it as it was */
    sh_buf_init(&small, 100);
    sh_batch a = example();
    CU_ASSERT(sh_buf_add(&small, "before", 6) == SH_OK);
    CU_ASSERT(sh_batch_encode(&a, &small) != SH_OK);
    CU_ASSERT_EQUAL(small.len, 6);
    sh_buf_release(&small);
    sh_buf_release(&buf);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("batch", NULL, NULL);
    CU_add_test(s, "round trip", round_trip);
    CU_add_test(s, "hand-offs that do not fit", bad_handoffs);
    CU_add_test(s, "empty batch", empty_batch);
    CU_add_test(s, "every truncation", every_truncation);
    CU_add_test(s, "altered bytes", altered_bytes);
    CU_add_test(s, "too small", too_small);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
