/* Rows of results: their members, logprobs in both formats, echo, thinking, stop strings, errors; every row is one JSON
 * object. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "coordinator/results.h"
#include "coordinator/rowtext.h"

#define MODELS SH_TEST_DATA "/text/models/"

static sh_intake *in;

static sh_request request(const char *line) {
    sh_request r;
    CU_ASSERT_EQUAL_FATAL(sh_intake_line(in, line, strlen(line), 1, &r), SH_OK);
    if (r.status) printf("%s\n", r.message);
    CU_ASSERT_EQUAL_FATAL(r.status, 0);
    return r;
}

static json_t *parse(const sh_buf *b) {
    json_t *j = NULL;
    sh_status st = sh_json_parse("row", (const char *)b->data, b->len, &j);
    if (st != SH_OK) printf("%s\n%.*s\n", sh_error_text(), (int)b->len, (const char *)b->data);
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    CU_ASSERT_PTR_NULL(memchr(b->data, '\n', b->len));
    return j;
}

static json_t *row_of(const sh_request *r, const sh_output *o) {
    SH_CLEANUP(sh_buf_release) sh_buf b = {0};
    CU_ASSERT_EQUAL_FATAL(sh_result_row(in, r, o, 1700000000, &b), SH_OK);
    return parse(&b);
}

/* Follows a path of keys and numbers: "response.body.choices.0.text". */
static const json_t *at(const json_t *j, const char *path) {
    char p[128];
    snprintf(p, sizeof p, "%s", path);
    for (char *save, *k = strtok_r(p, ".", &save); k; k = strtok_r(NULL, ".", &save))
        j = json_is_array(j) ? json_array_get(j, (size_t)atoi(k)) : json_object_get(j, k);
    return j;
}

static const char *text_at(const json_t *j, const char *path) {
    const char *s = json_string_value(at(j, path));
    return s ? s : "(none)";
}

static void encode(const char *text, sh_ids *ids) {
    CU_ASSERT_EQUAL_FATAL(sh_tokenizer_encode(sh_intake_tokenizer(in), text, strlen(text), false, ids), SH_OK);
}

static sh_output output(const sh_ids *ids) {
    return (sh_output){.id = ids->id, .n = (int32_t)ids->n, .finish = SH_FINISH_LENGTH, .text_len = -1};
}

static void test_completion(void) {
    sh_request r = request("{\"custom_id\":\"c\\\"1\",\"prompt\":[10,500],\"max_tokens\":9,\"model\":\"m\"}");
    sh_ids ids = {0};
    encode("one \"two\"\n\xc3\xa9", &ids);
    sh_output o = output(&ids);
    json_t *j = row_of(&r, &o);
    CU_ASSERT_STRING_EQUAL(text_at(j, "custom_id"), "c\"1");
    CU_ASSERT(!strncmp(text_at(j, "id"), "batch_req_", 10) && !strncmp(text_at(j, "response.request_id"), "req_", 4));
    CU_ASSERT_EQUAL(json_integer_value(at(j, "response.status_code")), 200);
    CU_ASSERT(json_is_null(at(j, "error")));
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.object"), "text_completion");
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.model"), "m");
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.text"), "one \"two\"\n\xc3\xa9");
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.finish_reason"), "length");
    CU_ASSERT(json_is_null(at(j, "response.body.choices.0.logprobs")));
    CU_ASSERT_PTR_NULL(at(j, "response.body.choices.0.token_ids"));
    CU_ASSERT_EQUAL(json_integer_value(at(j, "response.body.usage.prompt_tokens")), 2);
    CU_ASSERT_EQUAL(json_integer_value(at(j, "response.body.usage.completion_tokens")), (json_int_t)ids.n);
    CU_ASSERT_EQUAL(json_integer_value(at(j, "response.body.usage.total_tokens")), (json_int_t)ids.n + 2);
    CU_ASSERT_EQUAL(json_integer_value(at(j, "response.body.created")), 1700000000);
    json_decref(j);
    sh_request_release(&r);
    sh_ids_release(&ids);
}

/* A row that is longer than its buffer may be is not begun: the request is then refused. */
static void test_limit(void) {
    sh_request r = request("{\"custom_id\":\"c\",\"prompt\":[10,500],\"max_tokens\":9}");
    sh_ids ids = {0};
    encode("one two three four five six seven", &ids);
    sh_output o = output(&ids);
    for (size_t max = 1; max < 300; max += 7) {
        SH_CLEANUP(sh_buf_release) sh_buf b;
        sh_buf_init(&b, max);
        CU_ASSERT_EQUAL(sh_result_row(in, &r, &o, 1, &b), SH_ELIMIT);
        CU_ASSERT_EQUAL(b.len, 0);
    }
    sh_ids_release(&ids);
    sh_request_release(&r);
}

static void test_names_follow_content(void) {
    sh_request a = request("{\"custom_id\":\"a\",\"prompt\":[5]}"), b = request("{\"custom_id\":\"b\",\"prompt\":[5]}");
    sh_request c = request("{\"custom_id\":\"a\",\"prompt\":[6]}");
    sh_output o = {.finish = SH_FINISH_LENGTH, .text_len = -1};
    SH_CLEANUP(sh_buf_release) sh_buf x = {0}, y = {0};
    CU_ASSERT_EQUAL(sh_result_row(in, &a, &o, 1, &x), SH_OK);
    CU_ASSERT_EQUAL(sh_result_row(in, &a, &o, 1, &y), SH_OK);
    CU_ASSERT(x.len == y.len && !memcmp(x.data, y.data, x.len));
    json_t *ja = row_of(&a, &o), *jb = row_of(&b, &o), *jc = row_of(&c, &o);
    CU_ASSERT(strcmp(text_at(ja, "id"), text_at(jb, "id")) && strcmp(text_at(ja, "id"), text_at(jc, "id")));
    json_decref(ja), json_decref(jb), json_decref(jc);
    sh_request_release(&a), sh_request_release(&b), sh_request_release(&c);
}

static void test_stops(void) {
    sh_request r = request("{\"custom_id\":\"a\",\"prompt\":[5],\"return_token_ids\":true,\"stop_token_ids\":[600]}");
    sh_ids ids = {0};
    encode("abc def", &ids);
    CU_ASSERT_EQUAL(sh_ids_add(&ids, 600), SH_OK);
    sh_output o = output(&ids);
    o.finish = SH_FINISH_STOP;
    json_t *j = row_of(&r, &o); /* the stop id is counted and listed, its text is left out */
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.text"), "abc def");
    CU_ASSERT_EQUAL(json_array_size(at(j, "response.body.choices.0.token_ids")), ids.n);
    CU_ASSERT_EQUAL(json_integer_value(at(j, "response.body.prompt_token_ids.0")), 5);
    CU_ASSERT_EQUAL(json_integer_value(at(j, "response.body.choices.0.prompt_token_ids.0")), 5);
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.finish_reason"), "stop");
    json_decref(j);
    o.text_len = 3; /* cut before a stop string */
    j = row_of(&r, &o);
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.text"), "abc");
    json_decref(j);
    int32_t end[] = {600, -1};
    o = (sh_output){.id = end, .n = 2, .finish = SH_FINISH_LENGTH, .text_len = -1}; /* an end without a token */
    j = row_of(&r, &o);
    CU_ASSERT_EQUAL(json_integer_value(at(j, "response.body.usage.completion_tokens")), 1);
    json_decref(j);
    sh_request_release(&r);
    sh_ids_release(&ids);
}

static void test_completion_logprobs(void) {
    sh_request r = request("{\"custom_id\":\"a\",\"prompt\":\"ab cd\",\"echo\":true,\"logprobs\":2,\"max_tokens\":5}");
    sh_ids ids = {0};
    encode("ef gh", &ids);
    enum { MOST = 64 };
    static sh_top_logprob top[MOST * SH_MAX_TOP_LOGPROBS];
    float lp[MOST], score[MOST];
    int32_t n_top[MOST];
    for (int i = 0; i < MOST; i++) {
        lp[i] = score[i] = -0.1f * (float)(i + 1);
        n_top[i] = 2;
        top[i * SH_MAX_TOP_LOGPROBS] = (sh_top_logprob){.id = 700, .logprob = -0.25f};
        top[i * SH_MAX_TOP_LOGPROBS + 1] = (sh_top_logprob){.id = 701, .logprob = -1e-9f};
    }
    int np = (int)r.prompt.n, n = (int)ids.n;
    CU_ASSERT_FATAL(np > 1 && np < MOST && n < MOST);
    sh_output o = output(&ids);
    o.logprob = lp, o.n_top = n_top, o.top = top, o.score = score, o.score_n_top = n_top, o.score_top = top,
    o.n_scores = np - 1;
    json_t *j = row_of(&r, &o);
    const json_t *l = at(j, "response.body.choices.0.logprobs");
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.text"), "ab cdef gh");
    CU_ASSERT_EQUAL(json_array_size(at(l, "tokens")), (size_t)(np + n));
    CU_ASSERT_EQUAL(json_array_size(at(l, "token_logprobs")), (size_t)(np + n));
    CU_ASSERT_EQUAL(json_array_size(at(l, "top_logprobs")), (size_t)(np + n));
    CU_ASSERT_EQUAL(json_array_size(at(l, "text_offset")), (size_t)(np + n));
    CU_ASSERT(json_is_null(at(l, "token_logprobs.0")) && json_is_null(at(l, "top_logprobs.0")));
    CU_ASSERT_EQUAL((float)json_number_value(json_array_get(at(l, "token_logprobs"), 1)), score[0]);
    CU_ASSERT_EQUAL((float)json_number_value(json_array_get(at(l, "token_logprobs"), (size_t)np)), lp[0]);
    CU_ASSERT_EQUAL(json_object_size(json_array_get(at(l, "top_logprobs"), (size_t)np)),
                    3); /* two, and the token itself */
    CU_ASSERT_EQUAL(json_integer_value(json_array_get(at(l, "text_offset"), 0)), 0);
    CU_ASSERT_EQUAL(json_integer_value(json_array_get(at(l, "text_offset"), (size_t)np)), 5);
    char all[256] = ""; /* the tokens make up the text */
    for (size_t i = 0; i < json_array_size(at(l, "tokens")); i++)
        strcat(all, json_string_value(json_array_get(at(l, "tokens"), i)));
    CU_ASSERT_STRING_EQUAL(all, "ab cdef gh");
    json_decref(j);
    sh_request_release(&r);
    sh_ids_release(&ids);
}

/* A begin token that the tokenizer put before the string is among the tokens, not in the text. */
static void test_echo_with_bos(void) {
    sh_intake *base = NULL, *keep = in;
    sh_intake_options o = {0};
    CU_ASSERT_EQUAL_FATAL(sh_intake_create(MODELS "26b-a4b-sharded", &o, &base), SH_OK);
    in = base;
    sh_request r = request("{\"custom_id\":\"a\",\"prompt\":\"ab cd\",\"echo\":true,\"logprobs\":0,\"max_tokens\":0}");
    sh_output out = {.finish = SH_FINISH_LENGTH, .text_len = -1};
    json_t *j = row_of(&r, &out);
    const json_t *l = at(j, "response.body.choices.0.logprobs");
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.text"), "ab cd");
    CU_ASSERT_STRING_EQUAL(text_at(l, "tokens.0"), "<bos>");
    CU_ASSERT_EQUAL(json_integer_value(at(l, "text_offset.0")), 0);
    CU_ASSERT_EQUAL(json_integer_value(at(l, "text_offset.1")), 0);
    CU_ASSERT(json_integer_value(at(l, "text_offset.2")) > 0);
    json_decref(j);
    sh_request_release(&r);
    in = keep;
    sh_intake_destroy(&base);
}

static void test_scoring(void) {
    sh_request r =
        request("{\"custom_id\":\"a\",\"prompt\":[10,500,501],\"echo\":true,\"logprobs\":0,\"max_tokens\":0}");
    float score[2] = {-1.5f, -2.25f};
    int32_t extra = 600; /* what is generated beyond the scores is no part of the row */
    sh_output o = {.id = &extra, .n = 1, .finish = SH_FINISH_STOP, .text_len = -1, .score = score, .n_scores = 2};
    json_t *j = row_of(&r, &o);
    const json_t *l = at(j, "response.body.choices.0.logprobs");
    CU_ASSERT_EQUAL(json_array_size(at(l, "token_logprobs")), 3);
    CU_ASSERT(json_is_null(at(l, "token_logprobs.0")) && json_number_value(at(l, "token_logprobs.2")) == -2.25);
    CU_ASSERT(json_is_null(at(l, "top_logprobs")));
    CU_ASSERT_EQUAL(json_integer_value(at(j, "response.body.usage.completion_tokens")), 0);
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.finish_reason"), "length");
    CU_ASSERT(!strncmp(text_at(j, "response.body.choices.0.text"), "<bos>", 5)); /* nothing of the prompt is hidden */
    json_decref(j);
    sh_request_release(&r);
}

static void test_chat(void) {
    sh_request r = request("{\"custom_id\":\"a\",\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}],\"logprobs\":"
                           "true,\"top_logprobs\":1}");
    sh_ids ids = {0};
    encode("<|channel>thought\nhmm<channel|>So be it<turn|>", &ids);
    static sh_top_logprob top[64 * SH_MAX_TOP_LOGPROBS];
    float lp[64] = {0};
    int32_t n_top[64];
    for (int i = 0; i < 64; i++) n_top[i] = 1;
    sh_output o = output(&ids);
    o.finish = SH_FINISH_STOP, o.logprob = lp, o.n_top = n_top, o.top = top;
    json_t *j = row_of(&r, &o);
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.object"), "chat.completion");
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.message.role"), "assistant");
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.message.content"), "So be it");
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.message.reasoning_content"), "hmm");
    const json_t *c = at(j, "response.body.choices.0.logprobs.content");
    CU_ASSERT_EQUAL(json_array_size(c), ids.n);
    CU_ASSERT_STRING_EQUAL(text_at(c, "0.token"), "<|channel>");
    CU_ASSERT_EQUAL(json_array_size(at(c, "0.bytes")), 10);
    CU_ASSERT_EQUAL(json_array_size(at(c, "0.top_logprobs")), 1);
    json_decref(j);
    o.text_len = 14; /* "thought\nhmmSo be it" cut after "So " */
    j = row_of(&r, &o);
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.message.content"), "So ");
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.message.reasoning_content"), "hmm");
    json_decref(j);
    ids.n = 3; /* still thinking when the length ended it */
    o = output(&ids);
    o.logprob = lp;
    j = row_of(&r, &o);
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.message.content"), "");
    json_decref(j);
    ids.n = 0;
    encode("Plain", &ids);
    o = output(&ids);
    j = row_of(&r, &o);
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.message.content"), "Plain");
    CU_ASSERT_PTR_NULL(at(j, "response.body.choices.0.message.reasoning_content"));
    json_decref(j);
    sh_request_release(&r);
    sh_ids_release(&ids);
}

static json_t *chat_row(const char *text, const char *body) {
    char line[512];
    snprintf(line, sizeof line, "{\"custom_id\":\"a\",\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]%s}", body);
    sh_request r = request(line);
    sh_ids ids = {0};
    encode(text, &ids);
    sh_output o = output(&ids);
    o.finish = SH_FINISH_STOP;
    json_t *j = row_of(&r, &o);
    sh_request_release(&r);
    sh_ids_release(&ids);
    return j;
}

static void test_tool_calls(void) {
    static const char tools[] = ",\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]";
    static const char two[] =
        "<|channel>thought\nhm<channel|><|tool_call>call:get{city:<|\"|>S\xc3\xa3o "
        "{1}<|\"|>,days:3,x:{a:[1.5,true,<|\"|>q<|\"|>],"
        "<|\"|>b c<|\"|>:null},w:word}<tool_call|><|tool_call>call:g{}<tool_call|><|tool_response>";
    json_t *j = chat_row(two, tools);
    const json_t *m = at(j, "response.body.choices.0.message");
    CU_ASSERT(json_is_null(at(m, "content")));
    CU_ASSERT_STRING_EQUAL(text_at(m, "reasoning_content"), "hm");
    CU_ASSERT_EQUAL(json_array_size(at(m, "tool_calls")), 2);
    CU_ASSERT_STRING_EQUAL(text_at(m, "tool_calls.0.type"), "function");
    CU_ASSERT_STRING_EQUAL(text_at(m, "tool_calls.0.function.name"), "get");
    CU_ASSERT_STRING_EQUAL(
        text_at(m, "tool_calls.0.function.arguments"),
        "{\"city\":\"S\xc3\xa3o {1}\",\"days\":3,\"x\":{\"a\":[1.5,true,\"q\"],\"b c\":null},\"w\":\"word\"}");
    CU_ASSERT_STRING_EQUAL(text_at(m, "tool_calls.1.function.arguments"), "{}");
    CU_ASSERT(strcmp(text_at(m, "tool_calls.0.id"), text_at(m, "tool_calls.1.id")));
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.finish_reason"), "tool_calls");
    json_decref(j);
    j = chat_row("Look: <|tool_call>call:g{a:1}<tool_call|>", ""); /* nobody offered tools */
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.message.content"), "Look: call:g{a:1}");
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.finish_reason"), "stop");
    json_decref(j);
    static const char *const broken[] = {
        "call:g{a:1",        "call:g{a}",    "call:{a:1}",   "g{a:1}",    "call:g{a:[1}",
        "call:g{a:<|\"|>x}", "call:g{a:1}x", "call:g{a:1,}", "call:g{,}", ""};
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        char text[128];
        snprintf(text, sizeof text, "So: <|tool_call>%s<tool_call|>", broken[i]);
        j = chat_row(text, tools); /* no call: it stays text */
        CU_ASSERT_PTR_NULL(at(j, "response.body.choices.0.message.tool_calls"));
        CU_ASSERT(!strncmp(text_at(j, "response.body.choices.0.message.content"), "So: ", 4));
        json_decref(j);
    }
    j = chat_row("So: <|tool_call>call:g{a:1}", tools); /* cut off */
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.choices.0.message.content"), "So: call:g{a:1}");
    json_decref(j);
}

/* Every id, alone and after another one, makes a row that is valid JSON; also ids without text and unfinished UTF-8. */
static void test_all_tokens(void) {
    sh_request r = request("{\"custom_id\":\"a\",\"prompt\":[5],\"logprobs\":1}");
    for (int32_t id = 0; id < 2048; id++) {
        int32_t two[2] = {id, (id * 7 + 3) % 2048};
        float lp[2] = {-INFINITY, NAN};
        int32_t n_top[2] = {1, 1};
        static sh_top_logprob top[2 * SH_MAX_TOP_LOGPROBS];
        top[0].id = two[1];
        sh_output o = {
            .id = two, .n = 2, .logprob = lp, .n_top = n_top, .top = top, .finish = SH_FINISH_LENGTH, .text_len = -1};
        json_t *j = row_of(&r, &o);
        CU_ASSERT_EQUAL(json_number_value(at(j, "response.body.choices.0.logprobs.token_logprobs.0")), -9999);
        json_decref(j);
    }
    int32_t odd[3] = {2100, 5, 1 << 30};
    sh_output o = {.id = odd, .n = 3, .finish = SH_FINISH_LENGTH, .text_len = -1};
    json_t *j = row_of(&r, &o);
    json_decref(j);
    sh_request_release(&r);
}

static void test_errors(void) {
    SH_CLEANUP(sh_buf_release) sh_buf b = {0};
    CU_ASSERT_EQUAL(sh_result_error_row("x", 5, 9, 413, "context_length_exceeded", "prompt: long\xff", "prompt", 1, &b),
                    SH_OK);
    json_t *j = parse(&b);
    CU_ASSERT_STRING_EQUAL(text_at(j, "custom_id"), "x");
    CU_ASSERT_EQUAL(json_integer_value(at(j, "response.status_code")), 413);
    CU_ASSERT_STRING_EQUAL(text_at(j, "error.code"), "context_length_exceeded");
    CU_ASSERT_STRING_EQUAL(text_at(j, "error.message"), "prompt: long\xef\xbf\xbd");
    CU_ASSERT_STRING_EQUAL(text_at(j, "error.param"), "prompt");
    CU_ASSERT_PTR_NULL(at(j, "error.line"));
    CU_ASSERT_STRING_EQUAL(text_at(j, "response.body.error.type"), "invalid_request_error");
    json_decref(j);
    sh_buf_clear(&b);
    CU_ASSERT_EQUAL(sh_result_error_row(NULL, 5, 9, 400, "invalid_json", "line 9: bad", "", 1, &b), SH_OK);
    j = parse(&b);
    CU_ASSERT(json_is_null(at(j, "custom_id")) && json_is_null(at(j, "error.param")));
    CU_ASSERT_EQUAL(json_integer_value(at(j, "error.line")), 9);
    json_decref(j);
}

static void expect_float(float x, const char *want) {
    SH_CLEANUP(sh_buf_release) sh_buf b = {0};
    CU_ASSERT_EQUAL(sh_row_float(&b, x), SH_OK);
    CU_ASSERT_STRING_EQUAL((const char *)b.data, want);
}

static void test_numbers_and_text(void) {
    expect_float(0.1f, "0.1");
    expect_float(-0.0f, "0");
    expect_float(-2.52427f, "-2.52427");
    expect_float(1.0f / 3, "0.33333334");
    expect_float(1e-9f, "1e-09");
    expect_float(-INFINITY, "-9999");
    SH_CLEANUP(sh_buf_release) sh_buf b = {0};
    static const char text[] = "a\"\\\n\x01\x7f\xc3\xa9\xed\xa0\x80\xf0\x9f\x98\x80\xc3";
    CU_ASSERT_EQUAL(sh_row_string(&b, text, sizeof text - 1), SH_OK);
    CU_ASSERT_STRING_EQUAL(
        (const char *)b.data,
        "\"a\\\"\\\\\\n\\u0001\\u007f\xc3\xa9\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xf0\x9f\x98\x80\xef\xbf\xbd\"");
}

int main(void) {
    sh_intake_options o = {0};
    if (sh_intake_create(MODELS "e2b-like", &o, &in) != SH_OK) {
        fprintf(stderr, "%s\n", sh_error_text());
        return 1;
    }
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("results", NULL, NULL);
    CU_add_test(s, "completion", test_completion);
    CU_add_test(s, "limit", test_limit);
    CU_add_test(s, "names follow content", test_names_follow_content);
    CU_add_test(s, "stops", test_stops);
    CU_add_test(s, "completion logprobs", test_completion_logprobs);
    CU_add_test(s, "echo with bos", test_echo_with_bos);
    CU_add_test(s, "scoring", test_scoring);
    CU_add_test(s, "chat", test_chat);
    CU_add_test(s, "tool calls", test_tool_calls);
    CU_add_test(s, "all tokens", test_all_tokens);
    CU_add_test(s, "errors", test_errors);
    CU_add_test(s, "numbers and text", test_numbers_and_text);
    CU_basic_run_tests();
    int failed = (int)CU_get_number_of_failures();
    CU_cleanup_registry();
    sh_intake_destroy(&in);
    return failed ? 1 : 0;
}
