/*
 * Shapes that no released model has (tests/golden/make_odd_models.py says which): logits against float64, in exact mode
 * and loosely in bf16 mode. That the bytes of these shapes do not depend on how they are run is invariance_test's.
 */
#include "tests/golden/golden.h"

#define ABS     1e-4
#define REL     1e-4
#define CONTEXT 640

/* The positions whose logits the golden has; worst difference beyond what is allowed. */
static double worst_of(const json_t *g, const float *logits, int n, int vocab, double abs_tol, const char *name) {
    const json_t *at = json_object_get(g, "positions"), *want = json_object_get(g, "logits");
    double worst = 0;
    CHECK(json_array_size(at) > 0 && json_array_size(at) == json_array_size(want), "%s: the golden is empty", name);
    for (size_t i = 0; i < json_array_size(at); i++) {
        json_int_t pos = json_integer_value(json_array_get(at, i));
        const json_t *row = json_array_get(want, i);
        CHECK(pos < n && json_array_size(row) == (size_t)vocab, "%s: position %lld of the golden", name, pos);
        for (int v = 0; v < vocab && pos < n; v++) {
            double x = (double)logits[(size_t)pos * (size_t)vocab + (size_t)v];
            double ref = json_number_value(json_array_get(row, (size_t)v)), d = fabs(x - ref);
            CHECK(d <= abs_tol + REL * fabs(ref), "%s: position %lld, token %d: %g, reference %g", name, pos, v, x,
                  ref);
            if (!(d <= worst)) worst = d;
        }
    }
    return worst;
}

static void check_mode(const char *dir, sh_mode mode, double abs_tol) {
    const char *slash = strrchr(dir, '/'), *name = slash ? slash + 1 : dir;
    char path[512];
    snprintf(path, sizeof path, "%s.json", dir);
    json_t *g = NULL;
    MUST(sh_json_read(path, (size_t)4 << 20, &g));
    int n;
    int32_t *ids = golden_ids(json_object_get(g, "ids"), &n);
    chain ch = chain_open(&(chain_options){.dir = dir,
                                           .mode = mode,
                                           .kv = mode == SH_MODE_EXACT ? SH_KV_F32 : SH_KV_BF16,
                                           .threads = 1,
                                           .max_rows = CONTEXT,
                                           .max_context = CONTEXT,
                                           .max_seqs = 1});
    seq s = seq_open(&ch, ids, n);
    CHECK(chain_step(&ch, &s, 1, &n, &n) == n, "%s: all rows are kept", name);
    float *logits = must_alloc((size_t)n * (size_t)ch.c.vocab * sizeof(float));
    sh_model_logits(chain_last(&ch), ch.hidden, n, logits);
    double worst = worst_of(g, logits, n, ch.c.vocab, abs_tol, name);
    printf("%-14s %-5s largest difference %.1e\n", name, sh_mode_name(mode), worst);
    free(logits);
    free(ids);
    seq_close(&s);
    chain_close(&ch);
    json_decref(g);
}

/* With arguments: these checkpoints instead, as make_odd_models.py --random writes them. */
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) check_mode(argv[i], SH_MODE_EXACT, ABS);
    for (int i = 0; argc < 2 && i < N_ODD; i++) {
        char dir[512];
        snprintf(dir, sizeof dir, "%s/odd/%s", SH_TEST_DATA, odd_fixtures[i]);
        check_mode(dir, SH_MODE_EXACT, ABS);
        check_mode(dir, SH_MODE_BF16, 0.3);
    }
    return finish("odd_golden");
}
