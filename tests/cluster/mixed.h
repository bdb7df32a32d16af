/* Mixed requests for whole groups, made of a fixture's goldens: short and long, greedy and drawn, with scores, ends and
 * earlier lives. Test code only. */
#ifndef SH_TESTS_MIXED_H
#define SH_TESTS_MIXED_H

#include "tests/cluster/fake.h"

enum { MIXED_IDS = 4096 };

static inline json_t *mixed_golden(const char *name) {
    char path[600];
    json_t *j = NULL;
    snprintf(path, sizeof path, "%s/text/golden/%s.json", SH_TEST_DATA, name);
    MUST(sh_json_read(path, (size_t)64 << 20, &j));
    return j;
}

/* The six greedy prompts; then the same prompts with temperatures, seeds, filters, scores, ends and earlier lives; then
 * longer ones cut from the likelihood text. */
static inline void mixed_add(fake *f, const json_t *g) {
    int32_t ids[MIXED_IDS];
    const json_t *greedy = json_object_get(g, "greedy");
    int n_greedy = (int)json_array_size(greedy);
    for (int i = 0; i < n_greedy; i++) {
        int n = fake_ids(json_object_get(json_array_get(greedy, (size_t)i), "ids"), ids, MIXED_IDS);
        fake_add(f, ids, n, 32);
    }
    for (int i = 0; i < n_greedy; i++) {
        int n = fake_ids(json_object_get(json_array_get(greedy, (size_t)i), "ids"), ids, MIXED_IDS);
        fake_work *w = fake_add(f, ids, n, 20 + 9 * i);
        w->sampling.temperature = 0.7f + 0.2f * (float)i;
        w->sampling.top_k = i % 2 ? 40 : 0;
        w->sampling.top_p = i % 3 ? 0.95f : 1;
        w->sampling.seed = 77 + (uint64_t)i;
        w->sampling.score_prompt = i % 2;
        w->sampling.logprobs = i % 3 == 2 ? -1 : i;
        if (i == 2 || i == 3) w->n_given = 5, memcpy(w->given, ids, 5 * sizeof *ids);
        if (i == 3) w->scored = 7;
    }
    int32_t text[MIXED_IDS];
    int n = fake_ids(json_object_get(json_object_get(g, "loglik"), "ids"), text, MIXED_IDS);
    CHECK(n >= 150, "the likelihood text has %d tokens", n);
    for (int i = 0; i < 6 && n >= 150; i++) {
        fake_work *w = fake_add(f, text + i, n - 20 * i - i, 12 + 20 * (i % 2));
        w->sampling.temperature = i % 2 ? 1 : 0;
        w->sampling.seed = (uint64_t)i;
        w->sampling.score_prompt = i == 4;
    }
}

/* The first requests are greedy: their tokens are the reference's. */
static inline void mixed_check_greedy(const char *name, const json_t *g, const fake *f) {
    const json_t *greedy = json_object_get(g, "greedy");
    for (size_t i = 0; i < json_array_size(greedy); i++) {
        int32_t ids[64];
        int n = fake_ids(json_object_get(json_array_get(greedy, i), "output_ids"), ids, 64);
        CHECK(f->work[i].n == n && !memcmp(f->work[i].ids, ids, (size_t)n * sizeof *ids),
              "%s greedy %zu: not the reference's", name, i);
    }
}

#endif
