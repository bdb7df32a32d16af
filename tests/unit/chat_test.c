/* Chat templates: how they are found and recognised, and what is refused by which words. The text itself is compared in
 * tests/golden/chat_golden_test.c. */
#include <CUnit/Basic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/file.h"
#include "common/hash.h"
#include "model/chat.h"
#include "model/pytext.h"
#include "model/unicode.h"

static char dir[512];

static void write_file(const char *name, const char *text) {
    char path[600];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = text ? fopen(path, "w") : NULL;
    if (f) {
        CU_ASSERT_TRUE(fputs(text, f) >= 0);
        fclose(f);
    } else {
        unlink(path);
    }
}

static char *read_text(const char *path) {
    char *text = NULL;
    size_t n;
    CU_ASSERT_EQUAL_FATAL(sh_file_read(path, 1 << 20, &text, &n), SH_OK);
    return text;
}

static sh_chat load(const char *template, const char *config) {
    sh_chat c = {.form = 99};
    write_file("chat_template.jinja", template);
    write_file("tokenizer_config.json", config);
    CU_ASSERT_EQUAL_FATAL(sh_chat_load(dir, &c), SH_OK);
    return c;
}

static void test_recognition(void) {
    char *a = read_text(SH_TEST_DATA "/text/golden/chat_template_A.jinja");
    char *b = read_text(SH_TEST_DATA "/text/golden/chat_template_B.jinja");
    sh_chat c = load(NULL, NULL);
    CU_ASSERT_TRUE(c.form == SH_CHAT_NONE && c.known && strcmp(c.bos, "<bos>") == 0);
    c = load(a, "{\"bos_token\": {\"content\": \"<s>\"}, \"model_max_length\": 1000000000000000019884624838656}");
    CU_ASSERT_TRUE(c.form == SH_CHAT_A && c.known && strcmp(c.bos, "<s>") == 0 && !c.media);
    sh_buf changed = {0};
    CU_ASSERT_EQUAL(sh_buf_printf(&changed, "{#- changed -#}\n%s", a), SH_OK);
    c = load((char *)changed.data, NULL);
    CU_ASSERT_TRUE(c.form == SH_CHAT_A && !c.known);
    sh_buf_clear(&changed);
    CU_ASSERT_EQUAL(sh_buf_printf(&changed, "%s\n\n", b), SH_OK); /* white space at the ends does not count */
    c = load((char *)changed.data, NULL);
    CU_ASSERT_TRUE(c.form == SH_CHAT_B && c.known);
    sh_buf_clear(&changed);
    CU_ASSERT_EQUAL(sh_buf_printf(&changed, "%s!", b), SH_OK);
    c = load((char *)changed.data, NULL);
    CU_ASSERT_TRUE(c.form == SH_CHAT_B && !c.known);
    c = load("{{ '<|turn>' }}", NULL);
    CU_ASSERT_TRUE(c.form == SH_CHAT_COMPACT && !c.known);
    c = load("{{ '<start_of_turn>' }}", NULL);
    CU_ASSERT_TRUE(c.form == SH_CHAT_NONE && !c.known);
    sh_buf_release(&changed);
    free(a);
    free(b);
}

static void test_embedded(void) {
    char *b = read_text(SH_TEST_DATA "/text/golden/chat_template_B.jinja");
    json_t *config = json_pack("{s:s}", "chat_template", b);
    char *text = json_dumps(config, 0);
    sh_chat c = load(NULL, text);
    CU_ASSERT_TRUE(c.form == SH_CHAT_B && c.known);
    c = load("{{ '<|turn>' }}", text); /* the file of its own counts */
    CU_ASSERT_TRUE(c.form == SH_CHAT_COMPACT);
    free(text);
    json_decref(config);
    config = json_pack("{s:[{s:s,s:s},{s:s,s:s}]}", "chat_template", "name", "rag", "template", "x", "name", "default",
                       "template", b);
    text = json_dumps(config, 0);
    c = load(NULL, text);
    CU_ASSERT_TRUE(c.form == SH_CHAT_B && c.known);
    free(text);
    json_decref(config);
    free(b);
    write_file("tokenizer_config.json", "{\"bos_token\": ");
    CU_ASSERT_NOT_EQUAL(sh_chat_load(dir, &c), SH_OK);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "tokenizer_config.json"));
}

static void test_refusals(void) {
    static const struct {
        const char *messages, *tools, *named;
        sh_chat_form form;
    } cases[] = {
        {"[{\"role\":\"user\",\"content\":\"x\"}]", NULL, "chat_template.jinja", SH_CHAT_NONE},
        {"[]", NULL, "messages: an empty array", SH_CHAT_A},
        {"{}", NULL, "messages: an object", SH_CHAT_A},
        {"[7]", NULL, "messages[0]: an integer", SH_CHAT_A},
        {"[{\"content\":\"x\"}]", NULL, "messages[0].role", SH_CHAT_A},
        {"[{\"role\":\"wizard\",\"content\":\"x\"}]", NULL, "messages[0].role: 'wizard'", SH_CHAT_B},
        {"[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"user\"}]", NULL, "messages[1].content", SH_CHAT_A},
        {"[{\"role\":\"user\",\"content\":5}]", NULL, "messages[0].content: an integer", SH_CHAT_A},
        {"[{\"role\":\"system\",\"content\":null}]", NULL, "messages[0].content", SH_CHAT_A},
        {"[{\"role\":\"assistant\",\"content\":null}]", NULL, "messages[0].content", SH_CHAT_COMPACT},
        {"[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]", NULL,
         "messages[0].content[0]: part of type 'image_url' is not supported yet", SH_CHAT_A},
        {"[{\"role\":\"user\",\"content\":[{\"type\":\"image\"}]}]", NULL, "not supported yet", SH_CHAT_B},
        {"[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":1}]}]", NULL, "messages[0].content[0].text",
         SH_CHAT_A},
        {"[{\"role\":\"user\",\"content\":[\"x\"]}]", NULL, "messages[0].content[0].type", SH_CHAT_A},
        {"[{\"role\":\"assistant\",\"tool_calls\":{}}]", NULL, "messages[0].tool_calls", SH_CHAT_A},
        {"[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{}}]}]", NULL,
         "messages[0].tool_calls[0].function.name", SH_CHAT_B},
        {"[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":[]}}]}]", NULL,
         "tool_calls[0].function.arguments", SH_CHAT_A},
        {"[{\"role\":\"assistant\",\"content\":\"x\",\"tool_calls\":[{\"function\":{\"name\":\"f\"}}]}]", NULL,
         "knows no tools", SH_CHAT_COMPACT},
        {"[{\"role\":\"assistant\",\"tool_calls\":[{\"id\":\"a\",\"function\":{\"name\":\"f\"}}]},{\"role\":\"tool\","
         "\"tool_call_id\":\"b\",\"content\":\"\"}]",
         NULL, "messages[1].tool_call_id", SH_CHAT_A},
        {"[{\"role\":\"assistant\",\"tool_responses\":[1]}]", NULL, "messages[0].tool_responses[0]", SH_CHAT_A},
        {"[{\"role\":\"assistant\",\"reasoning\":1}]", NULL, "messages[0].reasoning", SH_CHAT_A},
        {"[{\"role\":\"user\",\"content\":\"x\"}]", "{}", "tools: an object", SH_CHAT_A},
        {"[{\"role\":\"user\",\"content\":\"x\"}]", "[{}]", "tools[0].function", SH_CHAT_A},
        {"[{\"role\":\"user\",\"content\":\"x\"}]", "[{\"function\":{\"name\":2}}]", "tools[0].function.name",
         SH_CHAT_B},
        {"[{\"role\":\"user\",\"content\":\"x\"}]", "[{\"function\":{\"name\":\"f\",\"parameters\":[1]}}]",
         "tools[0].function.parameters", SH_CHAT_A},
        {"[{\"role\":\"user\",\"content\":\"x\"}]", "[{\"function\":{\"name\":\"f\",\"parameters\":{\"required\":1}}}]",
         "tools[0]", SH_CHAT_A},
        {"[{\"role\":\"user\",\"content\":\"x\"}]", "[1]", "tools: this checkpoint", SH_CHAT_COMPACT},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *messages = json_loads(cases[i].messages, 0, NULL),
               *tools = cases[i].tools ? json_loads(cases[i].tools, 0, NULL) : NULL;
        CU_ASSERT_TRUE_FATAL(messages && (tools || !cases[i].tools));
        sh_chat c = {.form = cases[i].form, .known = true, .bos = "<bos>"};
        sh_buf out = {0};
        CU_ASSERT_EQUAL(sh_buf_add_str(&out, "kept"), SH_OK);
        CU_ASSERT_NOT_EQUAL(sh_chat_render(&c, messages, tools, false, true, &out), SH_OK);
        CU_ASSERT_STRING_EQUAL((char *)out.data, "kept");
        bool said = strstr(sh_error_text(), cases[i].named) != NULL;
        if (!said) fprintf(stderr, "%s: %s\n", cases[i].named, sh_error_text());
        CU_ASSERT_TRUE(said);
        sh_buf_release(&out);
        json_decref(messages);
        json_decref(tools);
    }
}

/* A departure from forms A and B: the parts of a system message are joined. */
static void test_system_parts(void) {
    sh_chat c = {.form = SH_CHAT_A, .known = true, .bos = "<bos>"};
    json_t *m = json_loads("[{\"role\":\"system\",\"content\":[{\"type\":\"text\",\"text\":\" Be "
                           "\"},{\"type\":\"text\",\"text\":\"terse\"}]}]",
                           0, NULL);
    sh_buf out = {0};
    CU_ASSERT_EQUAL(sh_chat_render(&c, m, NULL, true, false, &out), SH_OK);
    CU_ASSERT_STRING_EQUAL((char *)out.data, "<bos><|turn>system\n<|think|>\nBeterse<turn|>\n");
    sh_buf_release(&out);
    json_decref(m);
}

static uint64_t rng_state = 1;
static uint32_t rnd(uint32_t n) {
    rng_state++;
    return (uint32_t)(sh_mix64(rng_state) >> 32) % n;
}

static json_t *odd_value(void) {
    switch (rnd(8)) {
    case 0:
        return json_null();
    case 1:
        return json_true();
    case 2:
        return json_integer(7);
    case 3:
        return json_real(-1.5);
    case 4:
        return json_string("");
    case 5:
        return json_array();
    case 6:
        return json_object();
    default:
        return json_pack("[{s:s}]", "type", "object");
    }
}

/* A copy in which now and then a value is another. */
static json_t *changed_copy(const json_t *j) {
    if (rnd(25) == 0) return odd_value();
    if (json_is_array(j)) {
        json_t *a = json_array();
        for (size_t i = 0; i < json_array_size(j); i++) json_array_append_new(a, changed_copy(json_array_get(j, i)));
        return a;
    }
    if (!json_is_object(j)) return json_copy((json_t *)(uintptr_t)j);
    json_t *o = json_object(), *value;
    const char *key;
    json_object_foreach((json_t *)(uintptr_t)j, key, value) json_object_set_new(o, key, changed_copy(value));
    return o;
}

/* Whatever stands in the fields, a chat is rendered or refused with a reason; nothing else happens. */
static void test_odd_fields(void) {
    json_t *g = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_json_read(SH_TEST_DATA "/chat_extra.json", 1 << 24, &g), SH_OK);
    const json_t *cases = json_object_get(g, "cases");
    size_t refused = 0, rendered = 0;
    for (size_t i = 0; i < 4000; i++) {
        const json_t *x = json_array_get(cases, i % json_array_size(cases));
        const json_t *tools = json_object_get(x, "tools");
        json_t *messages = changed_copy(json_object_get(x, "messages")), *other = tools ? changed_copy(tools) : NULL;
        sh_chat c = {.form = SH_CHAT_A + (sh_chat_form)rnd(3), .media = rnd(2), .bos = "<bos>"};
        sh_buf out = {0};
        if (sh_chat_render(&c, messages, other, rnd(2), rnd(2), &out) == SH_OK)
            rendered++;
        else if (strncmp(sh_error_text(), "messages", 8) == 0 || strncmp(sh_error_text(), "tools", 5) == 0)
            refused++;
        else
            fprintf(stderr, "no field named: %s\n", sh_error_text());
        sh_buf_release(&out);
        json_decref(messages);
        json_decref(other);
    }
    CU_ASSERT_EQUAL(refused + rendered, 4000);
    CU_ASSERT_TRUE(refused > 500 && rendered > 500);
    json_decref(g);
}

/* What Python's str() makes of JSON. */
static void test_str(void) {
    static const char *const cases[][2] = {
        {"1", "1"},
        {"-0.0", "-0.0"},
        {"1.0", "1.0"},
        {"0.1", "0.1"},
        {"1e16", "1e+16"},
        {"123456789012345680.0", "1.2345678901234568e+17"},
        {"9999999999999998.0", "9999999999999998.0"},
        {"0.0001", "0.0001"},
        {"0.00001", "1e-05"},
        {"1.5e300", "1.5e+300"},
        {"true", "True"},
        {"null", "None"},
        {"[1, \"a'b\", [], {}]", "[1, \"a'b\", [], {}]"},
        {"{\"k\\n\": [false, \"\\\"'\"]}", "{'k\\n': [False, '\"\\'']}"},
        {"\"as it is\"", "as it is"},
        {"[\"\\u00a0\\u0007\\u2028é\"]", "['\\xa0\\x07\\u2028é']"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *j = json_loads(cases[i][0], JSON_DECODE_ANY, NULL);
        sh_buf out = {0};
        CU_ASSERT_EQUAL(sh_py_str(j, &out), SH_OK);
        CU_ASSERT_STRING_EQUAL((char *)out.data, cases[i][1]);
        sh_buf_release(&out);
        json_decref(j);
    }
    CU_ASSERT_TRUE(sh_unicode_is_word(0xe9) && sh_unicode_is_word('_') && !sh_unicode_is_word('-') &&
                   !sh_unicode_is_word(0x1f600));
    CU_ASSERT_TRUE(sh_unicode_lower(0xc4) == 0xe4 && sh_unicode_lower(0x100) == 0x101 &&
                   sh_unicode_lower(0x101) == 0x101);
}

int main(void) {
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/shoal-chat-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(dir) || CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("chat", NULL, NULL);
    CU_add_test(s, "recognition", test_recognition);
    CU_add_test(s, "templates in tokenizer_config.json", test_embedded);
    CU_add_test(s, "refusals", test_refusals);
    CU_add_test(s, "system parts", test_system_parts);
    CU_add_test(s, "odd fields", test_odd_fields);
    CU_add_test(s, "Python's text of values", test_str);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned bad = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    SH_IGNORE(sh_path_remove(dir));
    return bad ? 1 : 0;
}
