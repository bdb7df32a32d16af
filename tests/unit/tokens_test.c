/* The tokens message there and back, damaged in every way; and the ledger: what is sent once, again after a rewind, and
 * never after it was forgotten. */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>
#include "proto/group.pb-c.h"
#include "worker/ledger.h"
#include "worker/tokens.h"

enum { N = 7 };

static sh_token sample(int i) {
    sh_token t = {.seq = 1000000007ull * (uint64_t)(i + 1),
                  .index = i,
                  .id = 262143 - i,
                  .logprob = -0.125f * (float)i,
                  .score = i == 2,
                  .finish = i == 6 ? SH_FINISH_STOP : SH_FINISH_NONE,
                  .text_len = i == 6 ? 77 : -1,
                  .n_top = i % 2 ? 0 : i * 3};
    for (int k = 0; k < t.n_top; k++) t.top[k] = (sh_top_logprob){.id = k * i, .logprob = -1.5f * (float)k};
    return t;
}

static void make(sh_buf *b) {
    sh_buf_init(b, 0);
    CU_ASSERT_EQUAL(sh_tokens_begin(b, 99), SH_OK);
    for (int i = 0; i < N; i++) {
        sh_token t = sample(i);
        CU_ASSERT_EQUAL(sh_tokens_add(b, &t), SH_OK);
    }
    CU_ASSERT_EQUAL(sh_tokens_end(b, N), SH_OK);
}

static void test_round_trip(void) {
    sh_buf b;
    sh_token t[N];
    uint64_t step = 0;
    int n = 0;
    make(&b);
    CU_ASSERT(b.len <= sh_tokens_bytes(N));
    CU_ASSERT_EQUAL(sh_tokens_decode(b.data, b.len, t, N, &step, &n), SH_OK);
    CU_ASSERT(step == 99 && n == N);
    for (int i = 0; i < N; i++) {
        sh_token want = sample(i);
        CU_ASSERT(t[i].seq == want.seq && t[i].index == want.index && t[i].id == want.id && t[i].score == want.score);
        CU_ASSERT(t[i].finish == want.finish && t[i].text_len == want.text_len && t[i].n_top == want.n_top);
        CU_ASSERT(memcmp(&t[i].logprob, &want.logprob, sizeof(float)) == 0);
        CU_ASSERT(memcmp(t[i].top, want.top, (size_t)want.n_top * sizeof *t[i].top) == 0);
    }
    CU_ASSERT_EQUAL(sh_tokens_decode(b.data, b.len, t, N - 1, &step, &n), SH_EPEER);
    sh_buf_release(&b);
}

/* Every shorter message is refused; a message with any byte changed is refused or read, never overrun. */
static void test_damage(void) {
    sh_buf b;
    sh_token t[N];
    uint64_t step = 0;
    int n = 0, refused = 0;
    make(&b);
    for (size_t len = 0; len < b.len; len++) {
        uint8_t *cut = malloc(len + 1); /* its own block, so that a sanitizer sees a read past its end */
        memcpy(cut, b.data, len);
        CU_ASSERT_EQUAL(sh_tokens_decode(cut, len, t, N, &step, &n), SH_EPEER);
        free(cut);
    }
    for (size_t at = 0; at < b.len; at++)
        for (int bit = 0; bit < 8; bit++) {
            b.data[at] ^= (uint8_t)(1 << bit);
            refused += sh_tokens_decode(b.data, b.len, t, N, &step, &n) != SH_OK;
            b.data[at] ^= (uint8_t)(1 << bit);
        }
    CU_ASSERT(refused > 12 * 8); /* at least length, magic and count */
    sh_buf_release(&b);
}

static int pack(sh_ledger *l, int max, Shoal__FromRank **m) {
    sh_buf b;
    sh_buf_init(&b, 0);
    CU_ASSERT_EQUAL(sh_ledger_pack(l, max, &b), SH_OK);
    *m = b.len ? shoal__from_rank__unpack(NULL, b.len, b.data) : NULL;
    int n = 0;
    for (size_t i = 0; *m && i < (*m)->n_tokens; i++) n += (int)(*m)->tokens[i]->n_id;
    sh_buf_release(&b);
    return n;
}

static int pack_count(sh_ledger *l, int max) {
    Shoal__FromRank *m = NULL;
    int n = pack(l, max, &m);
    if (m) shoal__from_rank__free_unpacked(m, NULL);
    return n;
}

static void add(sh_ledger *l, uint64_t key, int from, int n, bool last) {
    for (int i = 0; i < n; i++) {
        sh_token t = {.index = from + i, .id = 10 * (from + i), .logprob = -1, .text_len = 5};
        if (last && i == n - 1) t.finish = SH_FINISH_LENGTH;
        CU_ASSERT_EQUAL(sh_ledger_add(l, key, &t), SH_OK);
    }
}

static void test_ledger(void) {
    sh_ledger *l = NULL;
    Shoal__FromRank *m = NULL;
    CU_ASSERT_FATAL(sh_ledger_create(&l) == SH_OK);
    CU_ASSERT_EQUAL(sh_ledger_open(l, 5, 3, 0, true), SH_OK);
    CU_ASSERT_EQUAL(sh_ledger_open(l, 5, 3, 0, true), SH_ESTATE);
    CU_ASSERT_EQUAL(sh_ledger_open(l, 6, 0, 0, false), SH_OK);
    CU_ASSERT_EQUAL(pack(l, 100, &m), 0);
    CU_ASSERT_PTR_NULL(m);
    add(l, 5, 3, 4, true);
    add(l, 6, 0, 10, false);
    sh_token gap = {.index = 99};
    CU_ASSERT_EQUAL(sh_ledger_add(l, 6, &gap), SH_ESTATE);
    CU_ASSERT_EQUAL(sh_ledger_add(l, 7, &gap), SH_OK); /* nobody's: cancelled */
    CU_ASSERT_EQUAL(pack_count(l, 6), 6);
    CU_ASSERT_EQUAL(pack_count(l, 100), 8);
    CU_ASSERT_EQUAL(pack_count(l, 100), 0);
    sh_ledger_rewind_key(l, 5);
    CU_ASSERT_EQUAL(pack(l, 100, &m), 4);
    CU_ASSERT_FATAL(m && m->n_tokens == 1);
    const Shoal__Tokens *t = m->tokens[0];
    CU_ASSERT(t->key == 5 && t->offset == 3 && t->id[0] == 30 && t->n_logprob == 4);
    CU_ASSERT(t->has_finish && t->finish == SH_FINISH_LENGTH && t->has_text_len && t->text_len == 5);
    shoal__from_rank__free_unpacked(m, NULL);
    sh_ledger_forget(l, 5);
    CU_ASSERT_FALSE(sh_ledger_knows(l, 5));
    sh_ledger_rewind(l);
    CU_ASSERT_EQUAL(pack(l, 100, &m), 10);
    CU_ASSERT_FATAL(m != NULL);
    CU_ASSERT(m->tokens[0]->n_logprob == 0 && !m->tokens[0]->has_finish); /* log-probabilities were not asked for */
    shoal__from_rank__free_unpacked(m, NULL);
    sh_ledger_destroy(&l);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("tokens", NULL, NULL);
    CU_add_test(s, "there and back", test_round_trip);
    CU_add_test(s, "damaged messages", test_damage);
    CU_add_test(s, "the ledger", test_ledger);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed || CU_get_error() ? 1 : 0;
}
