/* Rendered chats against recorded ones: chat.json (both released templates, text and ids), chat_extra.json (made by
 * make_chat_cases.py with the real templates, all three forms), and the prompts of the demo batch. */
#include <CUnit/Basic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/json.h"
#include "model/chat.h"
#include "model/tokenizer.h"

static int failures;

static void fail(const char *what, const char *name, const char *got, const char *want) {
    if (failures++ < 10) fprintf(stderr, "%s, %s:\n  got  %s\n  want %s\n", what, name, got, want);
    CU_FAIL("golden differs");
}

static json_t *read_json(const char *path) {
    json_t *j = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_json_read(path, 1 << 30, &j), SH_OK);
    return j;
}

static void check_ids(const sh_tokenizer *t, const char *what, const char *name, const sh_buf *text,
                      const json_t *want) {
    sh_ids ids = {0};
    CU_ASSERT_EQUAL(sh_tokenizer_encode(t, (const char *)text->data, text->len, false, &ids), SH_OK);
    bool same = ids.n == json_array_size(want);
    for (size_t i = 0; same && i < ids.n; i++) same = ids.id[i] == json_integer_value(json_array_get(want, i));
    if (!same) fail(what, name, "other ids", "those recorded");
    sh_ids_release(&ids);
}

static void check_case(const sh_chat *c, const sh_tokenizer *t, const char *what, const json_t *x) {
    const json_t *gen = json_object_get(x, "add_generation_prompt"), *text = json_object_get(x, "text");
    const char *name = json_string_value(json_object_get(x, "name"));
    sh_buf out = {0};
    sh_status st = sh_chat_render(c, json_object_get(x, "messages"), json_object_get(x, "tools"),
                                  json_is_true(json_object_get(x, "enable_thinking")), !json_is_false(gen), &out);
    if (json_object_get(x, "error")) {
        if (st == SH_OK) fail(what, name, (const char *)out.data, "a refusal");
    } else if (st != SH_OK)
        fail(what, name, sh_error_text(), json_string_value(text));
    else if (out.len != json_string_length(text) || memcmp(out.data, json_string_value(text), out.len) != 0)
        fail(what, name, (const char *)out.data, json_string_value(text));
    else if (t)
        check_ids(t, what, name, &out, json_object_get(x, "ids"));
    sh_buf_release(&out);
}

static sh_chat load_chat(const char *dir, sh_chat_form form) {
    sh_chat c;
    CU_ASSERT_EQUAL_FATAL(sh_chat_load(dir, &c), SH_OK);
    CU_ASSERT_TRUE(c.known);
    CU_ASSERT_EQUAL(c.form, form);
    CU_ASSERT_STRING_EQUAL(c.bos, "<bos>");
    c.media = true;
    return c;
}

/* `templates` of a case: "A", "B" or "compact". */
static size_t check_file(const char *path, const sh_tokenizer *t) {
    sh_chat a = load_chat(SH_TEST_DATA "/text/models/31b-like", SH_CHAT_A);
    sh_chat b = load_chat(SH_TEST_DATA "/text/models/e2b-like", SH_CHAT_B);
    sh_chat c = load_chat(SH_SOURCE_DIR "/share/minnow", SH_CHAT_COMPACT);
    json_t *g = read_json(path), *cases = json_object_get(g, "cases");
    size_t n = json_array_size(cases);
    for (size_t i = 0; i < n; i++) {
        const json_t *x = json_array_get(cases, i);
        const char *form = json_string_value(json_object_get(x, "template"));
        check_case(*form == 'A' ? &a : *form == 'B' ? &b : &c, t, path, x);
    }
    json_decref(g);
    return n;
}

static void test_recorded(void) {
    sh_tokenizer *t = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_tokenizer_load(SH_TEST_DATA "/text/models/31b-like", &t), SH_OK);
    CU_ASSERT_EQUAL(check_file(SH_TEST_DATA "/text/golden/chat.json", t), 42);
    sh_tokenizer_destroy(&t);
}

static void test_extra(void) {
    CU_ASSERT_TRUE(check_file(SH_TEST_DATA "/chat_extra.json", NULL) >= 60);
}

static const char *given;

static void test_given(void) {
    printf("%zu cases", check_file(given, NULL));
}

static void check_demo(const sh_chat *c, const sh_tokenizer *t, const json_t *request, const json_t *expected) {
    const char *name = json_string_value(json_object_get(request, "custom_id"));
    CU_ASSERT_STRING_EQUAL_FATAL(name, json_string_value(json_object_get(expected, "custom_id")));
    const json_t *body = json_object_get(request, "body"), *kw = json_object_get(body, "chat_template_kwargs");
    sh_buf out = {0};
    bool thinking = json_is_true(json_object_get(kw, "enable_thinking"));
    CU_ASSERT_EQUAL(sh_chat_render(c, json_object_get(body, "messages"), NULL, thinking, true, &out), SH_OK);
    check_ids(t, "demo batch", name, &out, json_object_get(expected, "prompt_ids"));
    sh_buf_release(&out);
}

static void test_demo(void) {
    sh_tokenizer *t = NULL;
    sh_chat c = load_chat(SH_SOURCE_DIR "/share/minnow", SH_CHAT_COMPACT);
    CU_ASSERT_EQUAL_FATAL(sh_tokenizer_load(SH_SOURCE_DIR "/share/minnow", &t), SH_OK);
    FILE *in = fopen(SH_SOURCE_DIR "/share/demo-batch.jsonl", "r");
    FILE *want = fopen(SH_TEST_DATA "/demo-tests/batch64.expected.jsonl", "r");
    CU_ASSERT_TRUE_FATAL(in && want);
    char *line = NULL, *other = NULL;
    size_t cap = 0, other_cap = 0, n = 0;
    for (ssize_t a, b; (a = getline(&line, &cap, in)) > 0 && (b = getline(&other, &other_cap, want)) > 0; n++) {
        json_t *request = NULL, *expected = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_json_parse("batch", line, (size_t)a, &request), SH_OK);
        CU_ASSERT_EQUAL_FATAL(sh_json_parse("expected", other, (size_t)b, &expected), SH_OK);
        check_demo(&c, t, request, expected);
        json_decref(request);
        json_decref(expected);
    }
    CU_ASSERT_EQUAL(n, 64);
    free(line);
    free(other);
    fclose(in);
    fclose(want);
    sh_tokenizer_destroy(&t);
}

/* With a file of cases as argument, only that is checked. */
int main(int argc, char **argv) {
    if (CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("chat goldens", NULL, NULL);
    if (argc > 1) {
        given = argv[1];
        CU_add_test(s, given, test_given);
        CU_basic_run_tests();
        return CU_get_number_of_failures() ? 1 : 0;
    }
    CU_add_test(s, "recorded conversations", test_recorded);
    CU_add_test(s, "generated conversations", test_extra);
    CU_add_test(s, "demo prompts", test_demo);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned bad = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    return bad ? 1 : 0;
}
