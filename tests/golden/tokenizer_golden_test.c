/* Token ids and decoded text of the recorded goldens, every one equal: small tokenizers, the full Gemma 4 and Gemma 3
 * vocabularies (unpacked into a temporary folder), small random ones of all supported kinds (tokenizer_extra.json, made
 * by make_tokenizer_cases.py; a file made so may be given as argument), and the outputs of the demo batch. The same out
 * of the metadata of GGUF files that have what tokenizer.json has. */
#include <CUnit/Basic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/file.h"
#include "common/json.h"
#include "model/tokenizer.h"
#include "tests/gguf_maker.h"

static int failures;

static void fail(const char *what, size_t i, const char *text) {
    if (failures++ < 20) fprintf(stderr, "%s case %zu: %s\n", what, i, text);
    CU_FAIL("golden differs");
}

static void fail_text(const char *what, size_t i, const sh_buf *got, const json_t *want) {
    char text[512];
    snprintf(text, sizeof text, "decoded '%.200s', not '%.200s'", got->data ? (const char *)got->data : "",
             json_string_value(want));
    fail(what, i, text);
}

static json_t *read_json(const char *path) {
    json_t *j = NULL;
    if (sh_json_read(path, 1 << 30, &j) != SH_OK) fail(path, 0, sh_error_text());
    return j;
}

static bool ids_equal(const sh_ids *a, const json_t *b) {
    if (a->n != json_array_size(b)) return false;
    for (size_t i = 0; i < a->n; i++)
        if (a->id[i] != json_integer_value(json_array_get(b, i))) return false;
    return true;
}

static void check_encode(const sh_tokenizer *t, const char *what, size_t i, const json_t *c) {
    const json_t *text = json_object_get(c, "text");
    for (int special = 0; special < 2; special++) {
        const json_t *want = json_object_get(c, special ? "ids_special" : "ids");
        sh_ids ids = {0};
        if (sh_tokenizer_encode(t, json_string_value(text), json_string_length(text), special, &ids) != SH_OK)
            fail(what, i, sh_error_text());
        else if (want && !ids_equal(&ids, want))
            fail(what, i, json_string_value(text));
        sh_ids_release(&ids);
    }
}

/* decode() and the streaming form must both give `want`; what the stream has given is whole code points at each step.
 */
static void check_decode(const sh_tokenizer *t, const char *what, size_t i, const json_t *list, bool skip,
                         const json_t *want) {
    size_t n = json_array_size(list);
    int32_t *ids = calloc(n + 1, sizeof *ids);
    sh_buf whole = {0}, stream = {0};
    sh_detok d;
    sh_detok_init(&d, t, skip);
    for (size_t k = 0; k < n; k++) {
        ids[k] = (int32_t)json_integer_value(json_array_get(list, k));
        if (sh_detok_add(&d, ids[k], &stream) != SH_OK) fail(what, i, sh_error_text());
        json_t *valid = json_stringn((const char *)stream.data, stream.len);
        if (stream.len && !valid) fail(what, i, "half a code point was emitted");
        json_decref(valid);
    }
    if (sh_detok_flush(&d, &stream) != SH_OK || sh_tokenizer_decode(t, ids, n, skip, &whole) != SH_OK)
        fail(what, i, sh_error_text());
    if (whole.len != json_string_length(want) ||
        (whole.len && memcmp(whole.data, json_string_value(want), whole.len) != 0))
        fail_text(what, i, &whole, want);
    if (whole.len != stream.len || (whole.len && memcmp(whole.data, stream.data, whole.len) != 0))
        fail(what, i, "streamed text differs from decoded text");
    sh_buf_release(&whole);
    sh_buf_release(&stream);
    free(ids);
}

static void check_lists(const sh_tokenizer *t, const char *path, const json_t *g) {
    const json_t *cases = json_object_get(g, "cases"), *bytes = json_object_get(g, "byte_decode");
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *c = json_array_get(cases, i), *ids = json_object_get(c, "ids");
        check_encode(t, path, i, c);
        const json_t *text = json_object_get(c, "decoded");
        if (text) {
            check_decode(t, path, i, ids, false, text);
            check_decode(t, path, i, ids, true, json_object_get(c, "decoded_skip_special"));
        }
    }
    for (size_t i = 0; i < json_array_size(bytes); i++) {
        const json_t *c = json_array_get(bytes, i);
        check_decode(t, "byte_decode", i, json_object_get(c, "ids"), false, json_object_get(c, "decoded"));
    }
}

static void check_cases(const sh_tokenizer *t, const char *path) {
    json_t *g = read_json(path);
    CU_ASSERT_TRUE(json_array_size(json_object_get(g, "cases")) >= 200);
    check_lists(t, path, g);
    json_decref(g);
}

static void make_folder(char *dir, size_t size) {
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, size, "%s/shoal-tokenizer-XXXXXX", tmp ? tmp : "/tmp");
    CU_ASSERT_PTR_NOT_NULL_FATAL(mkdtemp(dir));
}

static const char *extra = SH_TEST_DATA "/tokenizer_extra.json";

static void test_extra(void) {
    char dir[512], file[600];
    make_folder(dir, sizeof dir);
    snprintf(file, sizeof file, "%s/tokenizer.json", dir);
    json_t *g = read_json(extra), *files = json_object_get(g, "files");
    CU_ASSERT_TRUE(json_array_size(files) >= 20);
    for (size_t i = 0; i < json_array_size(files); i++) {
        const json_t *x = json_array_get(files, i);
        char name[32];
        snprintf(name, sizeof name, "file %zu", i);
        sh_tokenizer *t = NULL;
        CU_ASSERT_EQUAL_FATAL(json_dump_file(json_object_get(x, "tokenizer"), file, i % 2 ? JSON_ENSURE_ASCII : 0), 0);
        if (sh_tokenizer_load(dir, &t) == SH_OK)
            check_lists(t, name, x);
        else
            fail(name, 0, sh_error_text());
        sh_tokenizer_destroy(&t);
    }
    json_decref(g);
    CU_ASSERT_EQUAL(sh_path_remove(dir), SH_OK);
}

static void test_small(void) {
    static const char *const names[] = {"e2b-like", "e4b-like", "31b-like", "26b-a4b-like", "26b-a4b-sharded"};
    for (int i = 0; i < 5; i++) {
        char dir[512];
        snprintf(dir, sizeof dir, SH_TEST_DATA "/text/models/%s", names[i]);
        sh_tokenizer *t = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_tokenizer_load(dir, &t), SH_OK);
        CU_ASSERT_EQUAL(sh_tokenizer_adds_bos(t), i == 4);
        check_cases(t, SH_TEST_DATA "/text/golden/tokenizer_small.json");
        sh_tokenizer_destroy(&t);
    }
}

/* 4 MB of the goldens' own text, as one document: prints the rate, which is not judged here. */
static void time_encode(const sh_tokenizer *t, const char *golden) {
    json_t *g = read_json(golden), *cases = json_object_get(g, "cases");
    sh_buf text = {0};
    for (size_t i = 0; text.len < 4 << 20; i++) {
        const json_t *s = json_object_get(json_array_get(cases, i % json_array_size(cases)), "text");
        CU_ASSERT_EQUAL_FATAL(sh_buf_add(&text, json_string_value(s), json_string_length(s)), SH_OK);
    }
    sh_ids ids = {0};
    double start = sh_now();
    CU_ASSERT_EQUAL(sh_tokenizer_encode(t, (const char *)text.data, text.len, false, &ids), SH_OK);
    double took = sh_now() - start;
    printf(" %zu ids, %.1f MB/s", ids.n, (double)text.len / took / 1e6);
    sh_ids_release(&ids);
    sh_buf_release(&text);
    json_decref(g);
}

static void check_real(const char *name) {
    char dir[512], cmd[2048], golden[512];
    make_folder(dir, sizeof dir);
    snprintf(cmd, sizeof cmd, "gzip -dc '" SH_TEST_DATA "/real/%s_tokenizer.json.gz' > %s/tokenizer.json", name, dir);
    snprintf(golden, sizeof golden, SH_TEST_DATA "/text/golden/tokenizer_%s.json", name);
    CU_ASSERT_EQUAL_FATAL(system(cmd), 0);
    sh_tokenizer *t = NULL;
    double start = sh_now();
    sh_status st = sh_tokenizer_load(dir, &t);
    printf(" %s loaded in %.2f s", name, sh_now() - start);
    if (st != SH_OK) fail(name, 0, sh_error_text());
    if (t) {
        CU_ASSERT_TRUE(sh_tokenizer_size(t) >= 262144);
        check_cases(t, golden);
        time_encode(t, golden);
    }
    sh_tokenizer_destroy(&t);
    CU_ASSERT_EQUAL(sh_path_remove(dir), SH_OK);
}

static void test_gemma4(void) {
    check_real("gemma4");
}

/* A tokenizer out of a GGUF file alone that has the keys which llama.cpp's converter makes of this tokenizer.json.
 * Where tokenizer.json adds no <bos>, the keys do all the same (the converter always says so): a tokenizer_config.json
 * beside the file says what counts. */
static void check_metadata(const char *file, const char *golden, bool adds_bos, int bos, int eos) {
    static const char *const shown[] = {"<|channel>",       "<channel|>",       "<|tool_call>", "<tool_call|>",
                                        "<|tool_response>", "<tool_response|>", "<|\"|>",       NULL};
    char dir[512];
    make_folder(dir, sizeof dir);
    json_t *j = read_json(file);
    gm_file f = {0};
    gm_tokenizer(&f, j, shown, bos, eos);
    gm_bytes b = gm_whole(&f);
    ck_put(dir, "m.gguf", b.p, b.n);
    if (!adds_bos) ck_put(dir, "tokenizer_config.json", "{\"add_bos_token\": false}", 24);
    sh_tokenizer *t = NULL;
    double start = sh_now();
    sh_status st = sh_tokenizer_load(dir, &t);
    printf(" %zu bytes of keys loaded in %.2f s", b.n, sh_now() - start);
    if (st != SH_OK) fail(file, 0, sh_error_text());
    if (t) {
        CU_ASSERT_EQUAL(sh_tokenizer_adds_bos(t), adds_bos);
        check_cases(t, golden);
    }
    sh_tokenizer_destroy(&t);
    free(b.p);
    gm_release(&f);
    json_decref(j);
    CU_ASSERT_EQUAL(sh_path_remove(dir), SH_OK);
}

static void test_metadata(void) {
    char dir[512], cmd[2048], file[600];
    static const char *const golden = SH_TEST_DATA "/text/golden/tokenizer_small.json";
    check_metadata(SH_TEST_DATA "/text/models/e2b-like/tokenizer.json", golden, false, 10, 3);
    check_metadata(SH_TEST_DATA "/text/models/26b-a4b-sharded/tokenizer.json", golden, true, 10, 3);
    make_folder(dir, sizeof dir);
    snprintf(file, sizeof file, "%s/t.json", dir);
    snprintf(cmd, sizeof cmd, "gzip -dc '" SH_TEST_DATA "/real/gemma4_tokenizer.json.gz' > %s", file);
    CU_ASSERT_EQUAL_FATAL(system(cmd), 0);
    check_metadata(file, SH_TEST_DATA "/text/golden/tokenizer_gemma4.json", false, 2, 1);
    CU_ASSERT_EQUAL(sh_path_remove(dir), SH_OK);
}

static void test_gemma3(void) {
    check_real("gemma3");
}

/* The demo model's recorded outputs: ids → text. */
static void test_demo(void) {
    sh_tokenizer *t = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_tokenizer_load(SH_SOURCE_DIR "/share/minnow", &t), SH_OK);
    CU_ASSERT_TRUE(sh_tokenizer_adds_bos(t));
    FILE *f = fopen(SH_TEST_DATA "/demo-tests/batch64.expected.jsonl", "r");
    CU_ASSERT_PTR_NOT_NULL_FATAL(f);
    char *line = NULL;
    size_t cap = 0, n = 0;
    for (ssize_t len; (len = getline(&line, &cap, f)) > 0; n++) {
        json_t *row = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_json_parse("expected", line, (size_t)len, &row), SH_OK);
        check_decode(t, "demo", n, json_object_get(row, "output_ids"), true, json_object_get(row, "content"));
        json_decref(row);
    }
    CU_ASSERT_EQUAL(n, 64);
    free(line);
    fclose(f);
    sh_tokenizer_destroy(&t);
}

int main(int argc, char **argv) {
    if (CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("tokenizer goldens", NULL, NULL);
    if (argc > 1) extra = argv[1];
    CU_add_test(s, "random tokenizers", test_extra);
    CU_add_test(s, "small tokenizers", test_small);
    CU_add_test(s, "Gemma 4", test_gemma4);
    CU_add_test(s, "Gemma 3", test_gemma3);
    CU_add_test(s, "metadata of GGUF", test_metadata);
    CU_add_test(s, "demo outputs", test_demo);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned bad = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    return bad ? 1 : 0;
}
