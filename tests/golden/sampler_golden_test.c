/*
 * The sampler against transformers: log-probabilities of the 20 likeliest tokens, and support and probabilities after
 * temperature → top-k → top-p, from the golden logits of every text fixture. Does not run a model.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/file.h"
#include "common/json.h"
#include "model/draw.h"

#define TOLERANCE 2e-3 /* of the fixtures' README, for log-probabilities */

static int checks, failures;

#define CHECK(cond, ...)                                                                                               \
    do {                                                                                                               \
        checks++;                                                                                                      \
        if (!(cond)) {                                                                                                 \
            failures++;                                                                                                \
            printf("%s:%d: ", __FILE__, __LINE__);                                                                     \
            printf(__VA_ARGS__);                                                                                       \
            printf("\n");                                                                                              \
        }                                                                                                              \
    } while (0)

/* The last row of float32 tensor forward.PROMPT.logits in a mapped safetensors file, copied to 4-byte alignment. */
static float *last_row(const sh_map *m, const char *prompt, int *vocab) {
    uint64_t header;
    memcpy(&header, m->data, 8);
    json_t *h = NULL;
    if (sh_json_parse("golden", (const char *)m->data + 8, header, &h) != SH_OK) return NULL;
    char name[64];
    snprintf(name, sizeof name, "forward.%s.logits", prompt);
    const json_t *t = json_object_get(h, name), *shape = json_object_get(t, "shape");
    const json_t *at = json_object_get(t, "data_offsets");
    float *row = NULL;
    if (json_array_size(shape) == 2 && !strcmp(json_string_value(json_object_get(t, "dtype")), "F32")) {
        int n = (int)json_integer_value(json_array_get(shape, 1));
        size_t end = (size_t)json_integer_value(json_array_get(at, 1)), bytes = (size_t)n * sizeof(float);
        row = malloc(bytes);
        memcpy(row, m->data + 8 + header + end - bytes, bytes);
        *vocab = n;
    }
    json_decref(h);
    return row;
}

static void check_top(sh_draw *d, const float *x, const json_t *dist, const char *what) {
    sh_lse l;
    sh_top_logprob top[20];
    CHECK(sh_draw_lse(d, x, &l) == SH_OK, "%s: %s", what, sh_error_text());
    CHECK(sh_draw_top(d, x, l, 20, top) == 20, "%s: fewer than 20", what);
    for (size_t i = 0; i < 20; i++) {
        int id = (int)json_integer_value(json_array_get(json_object_get(dist, "top20_ids"), i));
        double lp = json_number_value(json_array_get(json_object_get(dist, "top20_logprobs"), i));
        CHECK(top[i].id == id, "%s: place %zu is %d, not %d", what, i, top[i].id, id);
        CHECK(fabs((double)top[i].logprob - lp) < 1e-4, "%s: place %zu: %g, not %g", what, i, (double)top[i].logprob,
              lp);
    }
}

static void check_sampler(sh_draw *d, const float *x, const json_t *g, const char *what) {
    sh_sampling p = {.temperature = (float)json_number_value(json_object_get(g, "temperature")),
                     .top_p = (float)json_number_value(json_object_get(g, "top_p")),
                     .top_k = (int32_t)json_integer_value(json_object_get(g, "top_k"))};
    const json_t *ids = json_object_get(g, "ids"), *probs = json_object_get(g, "probs");
    sh_support s;
    CHECK(sh_draw_support(d, x, &p, &s) == SH_OK, "%s: %s", what, sh_error_text());
    CHECK((size_t)s.n == json_array_size(ids), "%s T %g k %d p %g: %d left, not %zu", what, (double)p.temperature,
          p.top_k, (double)p.top_p, s.n, json_array_size(ids));
    for (size_t i = 0; i < json_array_size(ids) && (int)i < s.n; i++) {
        int id = (int)json_integer_value(json_array_get(ids, i));
        double q = (double)s.weight[i] / s.total, want = json_number_value(json_array_get(probs, i));
        CHECK(s.id[i] == id, "%s: place %zu is %d, not %d", what, i, s.id[i], id);
        CHECK(fabs(q - want) < TOLERANCE * want + 1e-6, "%s: place %zu: %g, not %g", what, i, q, want);
    }
}

static void check_model(const sh_kernels *kn, const char *model) {
    char path[512];
    json_t *g = NULL;
    sh_map m;
    snprintf(path, sizeof path, SH_TEST_DATA "/text/golden/%s.json", model);
    CHECK(sh_json_read(path, (size_t)64 << 20, &g) == SH_OK, "%s", sh_error_text());
    snprintf(path, sizeof path, SH_TEST_DATA "/text/golden/%s.safetensors", model);
    CHECK(sh_map_open(path, &m) == SH_OK, "%s", sh_error_text());
    const json_t *all = json_object_get(g, "distributions");
    CHECK(json_array_size(all) >= 1, "%s: no distributions", model);
    for (size_t i = 0; i < json_array_size(all); i++) {
        const json_t *dist = json_array_get(all, i), *samplers = json_object_get(dist, "samplers");
        int vocab = 0;
        float *x = last_row(&m, json_string_value(json_object_get(dist, "prompt")), &vocab);
        sh_draw *d = NULL;
        CHECK(x && sh_draw_create(kn, vocab, &d) == SH_OK, "%s: no logits", model);
        if (d) {
            check_top(d, x, dist, model);
            for (size_t k = 0; k < json_array_size(samplers); k++)
                check_sampler(d, x, json_array_get(samplers, k), model);
        }
        sh_draw_destroy(&d);
        free(x);
    }
    sh_map_close(&m);
    json_decref(g);
}

int main(void) {
    static const char *const models[] = {"e2b-like", "e4b-like", "31b-like", "26b-a4b-like", "26b-a4b-sharded"};
    const sh_kernels *kn = NULL;
    CHECK(sh_kernels_select(&kn) == SH_OK, "%s", sh_error_text());
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) check_model(kn, models[i]);
    printf("%d checks, %d failures\n", checks, failures);
    return failures ? 1 : 0;
}
