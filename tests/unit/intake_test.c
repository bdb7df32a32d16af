/* Intake: what requests become, every refusal with its exact words, and mutated lines that must never do harm. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include "common/buf.h"
#include "common/hash.h"
#include "coordinator/intake.h"

#define MODELS SH_TEST_DATA "/text/models/"

static sh_intake *in;

static sh_request read_line(const sh_intake *from, const char *text, size_t len) {
    sh_request r;
    CU_ASSERT_EQUAL_FATAL(sh_intake_line(from, text, len, 7, &r), SH_OK);
    return r;
}

/* A completion (url c) or chat (url h) whose body has a prompt, or a message, and the given members. */
static sh_request ask(const sh_intake *from, char url, const char *members) {
    sh_buf b = {0};
    const char *comma = members[0] ? ", " : "";
    CU_ASSERT_EQUAL_FATAL(
        url == 'h'
            ? sh_buf_printf(
                  &b,
                  "{\"custom_id\":\"a\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\",\"body\":{\"messages\":"
                  "[{\"role\":\"user\",\"content\":\"Hi\"}]%s%s}}",
                  comma, members)
            : sh_buf_printf(&b,
                            "{\"custom_id\":\"a\",\"method\":\"POST\",\"url\":\"/v1/"
                            "completions\",\"body\":{\"prompt\":[10,500,501]%s%s}}",
                            comma, members),
        SH_OK);
    sh_request r = read_line(from, (const char *)b.data, b.len);
    sh_buf_release(&b);
    return r;
}

static void expect(const sh_request *r, int status, const char *code, const char *param, const char *message,
                   const char *what) {
    bool ok = r->status == status && !strcmp(r->code, code) && !strcmp(r->param, param) && r->message &&
              !strcmp(r->message, message);
    if (!ok)
        printf("\n  %s\n   want %d %s [%s] %s\n   got  %d %s [%s] %s\n", what, status, code, param, message, r->status,
               r->code, r->param, r->message ? r->message : "(none)");
    CU_ASSERT(ok);
}

/* --- what is accepted --- */

static void test_defaults(void) {
    sh_request r = ask(in, 'c', "");
    CU_ASSERT(r.status == 0 && !r.chat && !strcmp(r.custom_id, "a") && r.prompt.n == 3 && r.prompt.id[1] == 500);
    CU_ASSERT(r.sampling.temperature == 1 && r.sampling.top_k == 64 &&
              fabsf(r.sampling.top_p - 0.95f) < 1e-7f); /* generation_config */
    CU_ASSERT(r.sampling.n_eos == 3 && r.sampling.eos[0] == 3 && r.sampling.logprobs == -1 &&
              r.sampling.min_tokens == 0);
    CU_ASSERT_EQUAL(r.sampling.max_tokens, 200 - 3);
    sh_request_release(&r);
    r = ask(in, 'h', "");
    CU_ASSERT(r.status == 0 && r.chat && r.prompt.n > 3);
    sh_request_release(&r);
    sh_request_release(&r); /* twice does no harm */
}

static void test_fields(void) {
    sh_request r = ask(
        in, 'c',
        "\"model\":\"x/"
        "e2b-like\",\"user\":\"u\",\"metadata\":{\"a\":1},\"stream\":false,\"max_tokens\":9,\"min_tokens\":2,"
        "\"temperature\":0,\"top_p\":0.5,\"top_k\":-1,\"min_p\":0.25,\"seed\":-5,\"n\":1,\"stop\":[\"a\",\"\xc3\xa9\"],"
        "\"stop_token_ids\":[7,2047],\"ignore_eos\":true,\"logprobs\":3,\"echo\":true,\"return_token_ids\":true,"
        "\"presence_penalty\":0,\"frequency_penalty\":0.0,\"repetition_penalty\":1,\"logit_bias\":{},"
        "\"response_format\":{\"type\":\"text\"},\"suffix\":null,\"best_of\":1");
    const sh_sampling *p = &r.sampling;
    CU_ASSERT_EQUAL(r.status, 0);
    CU_ASSERT(p->max_tokens == 9 && p->min_tokens == 2 && p->temperature == 0 && p->top_p == 0.5f && p->top_k == 0 &&
              p->min_p == 0.25f);
    CU_ASSERT(p->seed == (uint64_t)-5 && p->n_stops == 2 && p->stop_len[1] == 2 && !memcmp(p->stop[1], "\xc3\xa9", 2));
    CU_ASSERT(p->n_stop_ids == 2 && p->stop_ids[1] == 2047 && p->ignore_eos && p->logprobs == 3 && p->score_prompt);
    CU_ASSERT(r.echo && r.return_token_ids && !r.warning[0] && !strcmp(r.model, "x/e2b-like"));
    sh_request_release(&r);
    r = ask(in, 'h',
            "\"max_completion_tokens\":5,\"logprobs\":true,\"top_logprobs\":2,\"stop\":\"x\",\"model\":\"other\"");
    CU_ASSERT(r.status == 0 && r.sampling.max_tokens == 5 && r.sampling.logprobs == 2 && !r.sampling.score_prompt);
    CU_ASSERT_STRING_EQUAL(r.warning, "model: requests name \"other\", the answers are by e2b-like");
    sh_request_release(&r);
    r = ask(in, 'h', "\"logprobs\":true");
    CU_ASSERT_EQUAL(r.sampling.logprobs, 0);
    sh_request_release(&r);
    r = ask(in, 'c', "\"max_tokens\":0,\"echo\":true,\"logprobs\":1");
    CU_ASSERT(r.status == 0 && r.score_only && r.sampling.max_tokens == 1 && r.sampling.score_prompt);
    sh_request_release(&r);
}

static void test_bare_lines(void) {
    static const char text[] = "{\"prompt\":\"Hello\",\"max_tokens\":3}";
    sh_request r = read_line(in, text, strlen(text));
    CU_ASSERT(r.status == 0 && !strcmp(r.custom_id, "7") && !r.chat && r.prompt.n > 0 && !r.prompt_text);
    sh_request_release(&r);
    static const char chat[] = "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"Hi\"}]}]}";
    r = read_line(in, chat, strlen(chat));
    CU_ASSERT(r.status == 0 && !strcmp(r.custom_id, "7") && r.chat);
    sh_request_release(&r);
    static const char named[] = "{\"custom_id\":\"mine\",\"prompt\":\"Hello\"}";
    r = read_line(in, named, strlen(named));
    CU_ASSERT(r.status == 0 && !strcmp(r.custom_id, "mine"));
    sh_request_release(&r);
}

static void test_seed_and_hash(void) {
    sh_request a = ask(in, 'c', "\"top_p\":0.5,\"temperature\":1"),
               b = ask(in, 'c', "\"temperature\" : 1, \"top_p\":0.5");
    sh_request c = ask(in, 'c', "\"top_p\":0.5,\"temperature\":0.5"),
               d = ask(in, 'c', "\"top_p\":0.5,\"temperature\":1,\"seed\":1");
    CU_ASSERT(a.hash == b.hash && a.sampling.seed == b.sampling.seed); /* order and spacing are not content */
    CU_ASSERT(a.hash != c.hash && a.hash != d.hash && a.sampling.seed == sh_hash64(0, "a", 1) && d.sampling.seed == 1);
    sh_intake *other = NULL;
    sh_intake_options o = {.seed = 9, .max_context = 200};
    CU_ASSERT_EQUAL_FATAL(sh_intake_create(MODELS "e2b-like", &o, &other), SH_OK);
    sh_request e = ask(other, 'c', "\"top_p\":0.5,\"temperature\":1"),
               f = ask(other, 'c', "\"top_p\":0.5,\"temperature\":1,\"seed\":1");
    CU_ASSERT(e.hash != a.hash && e.sampling.seed == sh_hash64(9, "a", 1));
    CU_ASSERT_EQUAL(f.hash, d.hash); /* the option does not matter to a request that brings its own seed */
    sh_request *all[] = {&a, &b, &c, &d, &e, &f};
    for (size_t i = 0; i < 6; i++) sh_request_release(all[i]);
    sh_intake_destroy(&other);
}

static void test_options(void) {
    sh_intake *lenient = NULL;
    sh_intake_options o = {.default_max_tokens = 12, .max_context = 40, .lenient = true};
    CU_ASSERT_EQUAL_FATAL(sh_intake_create(MODELS "e2b-like", &o, &lenient), SH_OK);
    sh_request r = ask(lenient, 'c', "\"frobnicate\":1");
    CU_ASSERT(r.status == 0 && r.sampling.max_tokens == 12);
    sh_request_release(&r);
    r = ask(lenient, 'c', "\"presence_penalty\":1"); /* known and not provided: still refused */
    CU_ASSERT_EQUAL(r.status, 400);
    sh_request_release(&r);
    sh_intake_destroy(&lenient);
}

/* --- what is refused --- */

typedef struct refusal {
    const char *line, *code, *param, *message;
} refusal;

#define ENVELOPE(rest) "{\"custom_id\":\"a\",\"method\":\"POST\"," rest "}"

static void test_bad_lines(void) { /* custom_id is unusable in all of these */
    static const refusal t[] = {
        {"{\"custom_id\": \"broken\", \"method\": \"POST\", ", "invalid_json", "",
         "line 7: not valid JSON at column 42: string or '}' expected near end of file: allowed is one JSON object a "
         "line"},
        {"[]", "invalid_json", "", "line 7: an array is given: allowed is one JSON object a line"},
        {"\"text\"", "invalid_json", "", "line 7: a string is given: allowed is one JSON object a line"},
        {"{} {}", "invalid_json", "",
         "line 7: not valid JSON at column 4: end of file expected near '{': allowed is one JSON object a line"},
        {"{\"a\":1,\"a\":2}", "invalid_json", "",
         "line 7: not valid JSON at column 10: duplicate object key near '\"a\"': allowed is one JSON object a line"},
        {"{\"method\": \"POST\"}", "invalid_custom_id", "custom_id",
         "custom_id: is missing: allowed is a string of 1 to 512 bytes, unique in the file"},
        {"{\"custom_id\": 5, \"body\": {}}", "invalid_custom_id", "custom_id",
         "custom_id: an integer is given: allowed is a string of 1 to 512 bytes, unique in the file"},
        {"{\"custom_id\": \"\", \"body\": {}}", "invalid_custom_id", "custom_id",
         "custom_id: 0 bytes: allowed are 1 to 512"},
        {"{\"custom_id\": \"a\\u0000b\", \"body\": {}}", "invalid_custom_id", "custom_id",
         "custom_id: has a NUL character: allowed is text without one"},
    };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        sh_request r = read_line(in, t[i].line, strlen(t[i].line));
        expect(&r, 400, t[i].code, t[i].param, t[i].message, t[i].line);
        CU_ASSERT_PTR_NULL(r.custom_id);
        CU_ASSERT_EQUAL(r.number, 7);
        sh_request_release(&r);
    }
    static const char nul[] = "\0\1", utf8[] = "{\"custom_id\": \"utf8\", \"body\": {\"prompt\": \"\xff\xfe\"}}";
    sh_request r = read_line(in, nul, 2);
    CU_ASSERT(r.status == 400 && !r.custom_id && !strcmp(r.code, "invalid_json"));
    sh_request_release(&r);
    r = read_line(in, utf8, sizeof utf8 - 1);
    CU_ASSERT(r.status == 400 && !r.custom_id && strstr(r.message, "not valid UTF-8 at byte 43 (0xff)"));
    sh_request_release(&r);
    static const char marked[] = "\xef\xbb\xbf{\"custom_id\": \"\xff\"}"; /* bytes are counted from the line's first */
    CU_ASSERT_EQUAL_FATAL(sh_intake_line(in, marked, sizeof marked - 1, 1, &r), SH_OK);
    CU_ASSERT(r.status == 400 && strstr(r.message, "not valid UTF-8 at byte 19 (0xff)"));
    sh_request_release(&r);
    r = read_line(in, "", 0);
    CU_ASSERT(r.status == 400 && !r.custom_id);
    sh_request_release(&r);
}

static void test_bad_envelopes(void) {
    static const refusal t[] = {
        {ENVELOPE("\"url\":\"/v1/nothing\",\"body\":{}"), "invalid_value", "url",
         "url: /v1/nothing: allowed are \"/v1/chat/completions\" and \"/v1/completions\""},
        {ENVELOPE("\"body\":{}"), "invalid_value", "url",
         "url: no string is given: allowed are \"/v1/chat/completions\" and \"/v1/completions\""},
        {ENVELOPE("\"url\":\"/v1/completions\""), "invalid_value", "body", "body: is missing: allowed is an object"},
        {ENVELOPE("\"url\":\"/v1/completions\",\"body\":[]"), "invalid_value", "body",
         "body: is not an object: allowed is an object"},
        {ENVELOPE("\"url\":\"/v1/completions\",\"body\":{},\"colour\":1"), "unknown_field", "colour",
         "colour: is not a field of a request: allowed are custom_id, method, url, body"},
        {"{\"custom_id\":\"a\",\"method\":\"GET\",\"url\":\"/v1/completions\",\"body\":{}}", "invalid_value", "method",
         "method: GET: allowed is \"POST\""},
        {ENVELOPE("\"url\":\"/v1/completions\",\"body\":{}"), "invalid_value", "prompt",
         "prompt: is missing: allowed is a string or an array of token ids"},
        {ENVELOPE("\"url\":\"/v1/chat/completions\",\"body\":{}"), "invalid_value", "messages",
         "messages: is missing: allowed is an array of at least one message"},
        {ENVELOPE("\"url\":\"/v1/completions\",\"body\":{\"prompt\":[]}"), "invalid_value", "prompt",
         "prompt: no tokens: allowed are 1 or more"},
        {ENVELOPE("\"url\":\"/v1/completions\",\"body\":{\"prompt\":\"\"}"), "invalid_value", "prompt",
         "prompt: no tokens: allowed are 1 or more"},
        {ENVELOPE("\"url\":\"/v1/completions\",\"body\":{\"prompt\":[1000000000]}"), "invalid_value", "prompt",
         "prompt: item 0 is 1000000000: allowed are token ids from 0 to 2047"},
        {ENVELOPE("\"url\":\"/v1/completions\",\"body\":{\"prompt\":[5,-1]}"), "invalid_value", "prompt",
         "prompt: item 1 is -1: allowed are token ids from 0 to 2047"},
        {ENVELOPE("\"url\":\"/v1/completions\",\"body\":{\"prompt\":[\"a\",\"b\"]}"), "invalid_value", "prompt",
         "prompt: item 0 is a string: allowed is one string, or one array of token ids (integers from 0 to 2047)"},
        {ENVELOPE("\"url\":\"/v1/completions\",\"body\":{\"prompt\":{}}"), "invalid_value", "prompt",
         "prompt: an object is given: allowed is a string or an array of token ids"},
        {ENVELOPE("\"url\":\"/v1/completions\",\"body\":{\"prompt\":\"a\\u0000b\"}"), "invalid_value", "prompt",
         "prompt: the text has a NUL character: allowed is text without one"},
    };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        sh_request r = read_line(in, t[i].line, strlen(t[i].line));
        expect(&r, 400, t[i].code, t[i].param, t[i].message, t[i].line);
        CU_ASSERT(r.custom_id && !strcmp(r.custom_id, "a") && r.prompt.n == 0);
        sh_request_release(&r);
    }
}

typedef struct member {
    char url;
    int status;
    const char *members, *code, *param, *message;
} member;

static void check_members(const member *t, size_t n) {
    for (size_t i = 0; i < n; i++) {
        sh_request r = ask(in, t[i].url, t[i].members);
        expect(&r, t[i].status, t[i].code, t[i].param, t[i].message, t[i].members);
        sh_request_release(&r);
    }
}

static void test_bad_values(void) {
    static const member t[] = {
        {'c', 400, "\"temperature\":\"hot\"", "invalid_value", "temperature",
         "temperature: \"hot\" is not a number: allowed are numbers from 0 to 2"},
        {'c', 400, "\"temperature\":2.5", "invalid_value", "temperature",
         "temperature: 2.5 is out of range: allowed are numbers from 0 to 2"},
        {'c', 400, "\"temperature\":true", "invalid_value", "temperature",
         "temperature: a boolean is not a number: allowed are numbers from 0 to 2"},
        {'c', 400, "\"max_tokens\":-3", "invalid_value", "max_tokens",
         "max_tokens: -3 is out of range: allowed are integers from 0 to 2147483647"},
        {'c', 400, "\"max_tokens\":1.5", "invalid_value", "max_tokens",
         "max_tokens: 1.5 is not an integer: allowed are integers from 0 to 2147483647"},
        {'c', 400, "\"max_tokens\":99999999999999999999", "invalid_value", "max_tokens",
         "max_tokens: 1e20 is not an integer: allowed are integers from 0 to 2147483647"},
        {'c', 400, "\"max_tokens\":0", "invalid_value", "max_tokens",
         "max_tokens: 0 generates nothing: allowed are 1 or more, or 0 together with echo"},
        {'c', 400, "\"max_tokens\":3,\"max_completion_tokens\":4", "invalid_value", "max_completion_tokens",
         "max_completion_tokens: 4 differs from max_tokens 3: allowed is one of them"},
        {'c', 413, "\"max_tokens\":198", "context_length_exceeded", "prompt",
         "prompt: 3 tokens and 198 to generate make 201: allowed are 200 together (--max-context)"},
        {'c', 400, "\"max_tokens\":3,\"min_tokens\":4", "invalid_value", "min_tokens",
         "min_tokens: 4: allowed are 0 to 3, the most that may be generated"},
        {'c', 400, "\"top_p\":1.01", "invalid_value", "top_p",
         "top_p: 1.01 is out of range: allowed are numbers from 0 to 1"},
        {'c', 400, "\"top_k\":-2", "invalid_value", "top_k",
         "top_k: -2 is out of range: allowed are integers from -1 to 2147483647"},
        {'c', 400, "\"min_p\":[]", "invalid_value", "min_p",
         "min_p: an array is not a number: allowed are numbers from 0 to 1"},
        {'c', 400, "\"seed\":\"x\"", "invalid_value", "seed",
         "seed: \"x\" is not an integer: allowed are integers from -9223372036854775808 to 9223372036854775807"},
        {'c', 400, "\"stop\":5", "invalid_value", "stop",
         "stop: an integer is given: allowed is a string or an array of strings"},
        {'c', 400, "\"stop\":\"\"", "invalid_value", "stop", "stop: a string of 0 bytes: allowed are 1 to 1024 bytes"},
        {'c', 400, "\"stop\":[\"a\",7]", "invalid_value", "stop[1]",
         "stop[1]: an integer is given: allowed is a string"},
        {'c', 400, "\"stop\":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]", "invalid_value", "stop",
         "stop: 17 strings: allowed are at most 16"},
        {'c', 400, "\"stop_token_ids\":[5,2048]", "invalid_value", "stop_token_ids",
         "stop_token_ids: item 1 is no token id: allowed are integers from 0 to 2047"},
        {'c', 400, "\"logprobs\":21", "invalid_value", "logprobs",
         "logprobs: 21 is out of range: allowed are integers from 0 to 20"},
        {'c', 400, "\"logprobs\":true", "invalid_value", "logprobs",
         "logprobs: a boolean is not an integer: allowed are integers from 0 to 20"},
        {'h', 400, "\"logprobs\":1", "invalid_value", "logprobs",
         "logprobs: 1 is not a boolean: allowed are true and false"},
        {'h', 400, "\"top_logprobs\":1", "invalid_value", "top_logprobs",
         "top_logprobs: is given without logprobs: allowed is with \"logprobs\": true"},
        {'c', 400, "\"echo\":1", "invalid_value", "echo", "echo: 1 is not a boolean: allowed are true and false"},
        {'c', 400, "\"model\":5", "invalid_value", "model", "model: an integer is given: allowed is a string"},
        {'c', 400, "\"metadata\":5", "invalid_value", "metadata",
         "metadata: an integer is given: allowed is an object"},
    };
    check_members(t, sizeof t / sizeof *t);
}

static void test_not_provided(void) {
    static const member t[] = {
        {'c', 400, "\"frobnicate\":1", "unknown_field", "frobnicate",
         "frobnicate: is not a field of /v1/completions: docs/requests.md lists what is allowed"},
        {'h', 400, "\"echo\":true", "unknown_field", "echo",
         "echo: is not a field of /v1/chat/completions: docs/requests.md lists what is allowed"},
        {'c', 400, "\"stream\":true", "unsupported_value", "stream",
         "stream: true is given: allowed is false, results are whole rows"},
        {'c', 400, "\"n\":2", "unsupported_value", "n", "n: 2 is not provided yet: allowed is 1"},
        {'c', 400, "\"presence_penalty\":0.5", "unsupported_value", "presence_penalty",
         "presence_penalty: 0.5 is not provided yet: allowed is 0, or leave it out"},
        {'c', 400, "\"repetition_penalty\":0", "unsupported_value", "repetition_penalty",
         "repetition_penalty: 0 is not provided yet: allowed is 1, or leave it out"},
        {'c', 400, "\"logit_bias\":{\"5\":1}", "unsupported_field", "logit_bias",
         "logit_bias: is not provided yet: allowed is an empty object, or leave it out"},
        {'c', 400, "\"prompt_logprobs\":1", "unsupported_field", "prompt_logprobs",
         "prompt_logprobs: is not provided yet: leave it out"},
        {'c', 400, "\"guided_regex\":\"a\"", "unsupported_field", "guided_regex",
         "guided_regex: is not provided yet: leave it out"},
        {'c', 400, "\"media\":[]", "unsupported_field", "media", "media: is not provided yet: leave it out"},
        {'h', 400, "\"response_format\":{\"type\":\"json_object\"}", "unsupported_field", "response_format",
         "response_format: is not provided yet: allowed is {\"type\": \"text\"}, or leave it out"},
        {'h', 400, "\"tool_choice\":\"required\"", "unsupported_value", "tool_choice",
         "tool_choice: required forces a choice, which is not provided yet: allowed are \"auto\" and \"none\""},
        {'h', 400, "\"tools\":[{\"type\":\"web\"}]", "invalid_value", "tools[0].type",
         "tools[0].type: is not \"function\": allowed is \"function\""},
        {'h', 400, "\"chat_template_kwargs\":{\"mood\":1}", "unknown_field", "chat_template_kwargs.mood",
         "chat_template_kwargs.mood: is not a known field: allowed is enable_thinking"},
        {'h', 400, "\"chat_template_kwargs\":{\"enable_thinking\":1}", "invalid_value",
         "chat_template_kwargs.enable_thinking",
         "chat_template_kwargs.enable_thinking: an integer is given: allowed is true or false"},
    };
    check_members(t, sizeof t / sizeof *t);
}

static void test_bad_messages(void) {
    static const struct {
        const char *messages, *code, *param, *message;
    } t[] = {
        {"5", "invalid_value", "messages", "messages: is not an array: allowed is an array of at least one message"},
        {"[]", "invalid_value", "messages", "messages: is empty: allowed is an array of at least one message"},
        {"[5]", "invalid_value", "messages[0]",
         "messages[0]: is not an object: allowed is an object with role and content"},
        {"[{\"role\":\"user\"}]", "invalid_value", "messages[0].content",
         "messages[0].content: is missing: allowed is a string or an array of text parts"},
        {"[{\"role\":\"king\",\"content\":\"a\"}]", "invalid_value", "messages[0].role",
         "messages[0].role: king is not a known role: allowed is system, developer, user, assistant or tool"},
        {"[{\"role\":\"user\",\"content\":5}]", "invalid_value", "messages[0].content",
         "messages[0].content: is neither a string nor an array: allowed is a string or an array of text parts"},
        {"[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{\"url\":\"file:///a\"}}]}]",
         "unsupported_value", "messages[0].content[0].type",
         "messages[0].content[0].type: \"image_url\" parts are not provided yet: allowed is \"text\""},
        {"[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]", "invalid_value", "messages[0].content[0].text",
         "messages[0].content[0].text: is missing: allowed is a string"},
        {"[{\"role\":\"user\",\"content\":\"a\",\"mood\":1}]", "unknown_field", "messages[0].mood",
         "messages[0].mood: is not a known field: allowed are role, content, name, tool_calls, tool_call_id, "
         "reasoning_content, "
         "tool_responses"},
        {"[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":\"{\"}}]}]",
         "invalid_value", "messages[0].tool_calls[0].function.arguments",
         "messages[0].tool_calls[0].function.arguments: is not the JSON text of an object: allowed is an object or its "
         "JSON text"},
    };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        sh_buf b = {0};
        CU_ASSERT_EQUAL(sh_buf_printf(&b, "{\"messages\":%s}", t[i].messages), SH_OK);
        sh_request r = read_line(in, (const char *)b.data, b.len);
        expect(&r, 400, t[i].code, t[i].param, t[i].message, t[i].messages);
        sh_request_release(&r);
        sh_buf_release(&b);
    }
}

/* 31b-like allows 262,144 positions: without a stated context a line may have half of them (decision 0011), with one
 * all. */
static void test_usual_context(void) {
    sh_buf b = {0};
    CU_ASSERT_EQUAL(sh_buf_add_str(&b, "{\"max_tokens\":1,\"prompt\":[5"), SH_OK);
    for (int i = 1; i < SH_USUAL_CONTEXT; i++) CU_ASSERT_EQUAL_FATAL(sh_buf_add_str(&b, ",5"), SH_OK);
    CU_ASSERT_EQUAL(sh_buf_add_str(&b, "]}"), SH_OK);
    for (int stated = 0; stated <= 262144; stated += 262144) {
        sh_intake_options o = {.max_context = stated};
        sh_intake *big = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_intake_create(MODELS "31b-like", &o, &big), SH_OK);
        sh_request r = read_line(big, (const char *)b.data, b.len);
        if (stated) {
            CU_ASSERT_EQUAL(r.status, 0);
        } else {
            expect(&r, 413, "context_length_exceeded", "prompt",
                   "prompt: 131072 tokens: allowed are 131071, the context (--max-context) less one token to generate",
                   "runaway prompt");
        }
        sh_request_release(&r);
        sh_intake_destroy(&big);
    }
    sh_buf_release(&b);
}

static void test_limits(void) {
    sh_buf b = {0};
    CU_ASSERT_EQUAL(sh_buf_add_str(&b, "{\"prompt\":[5"), SH_OK);
    for (int i = 0; i < 20000; i++) CU_ASSERT_EQUAL_FATAL(sh_buf_add_str(&b, ",5"), SH_OK);
    CU_ASSERT_EQUAL(sh_buf_add_str(&b, "]}"), SH_OK);
    sh_request r = read_line(in, (const char *)b.data, b.len);
    expect(&r, 413, "context_length_exceeded", "prompt",
           "prompt: 20001 tokens: allowed are 199, the context (--max-context) less one token to generate",
           "long prompt");
    sh_request_release(&r);
    sh_buf_clear(&b);
    for (int i = 0; i < 200; i++) CU_ASSERT_EQUAL(sh_buf_add_str(&b, "{\"prompt\":"), SH_OK);
    CU_ASSERT_EQUAL(sh_buf_add_str(&b, "1"), SH_OK);
    for (int i = 0; i < 200; i++) CU_ASSERT_EQUAL(sh_buf_add_str(&b, "}"), SH_OK);
    r = read_line(in, (const char *)b.data, b.len);
    expect(&r, 400, "invalid_json", "", "line 7: nested too deeply: allowed are 64 levels", "deep");
    sh_request_release(&r);
    sh_buf_clear(&b);
    CU_ASSERT_EQUAL(sh_buf_printf(&b, "{\"custom_id\":\"%0513d\",\"body\":{}}", 1), SH_OK);
    r = read_line(in, (const char *)b.data, b.len);
    expect(&r, 400, "invalid_custom_id", "custom_id", "custom_id: 513 bytes: allowed are 1 to 512", "long id");
    sh_request_release(&r);
    CU_ASSERT_EQUAL_FATAL(sh_buf_reserve(&b, (size_t)50 << 20), SH_OK);
    memset(b.data, ' ', (size_t)50 << 20);
    r = read_line(in, (const char *)b.data, (size_t)50 << 20);
    expect(&r, 413, "line_too_long", "", "line 7: is longer than may be: allowed are 33554432 bytes", "50 MB");
    sh_request_release(&r);
    sh_buf_release(&b);
}

static void test_no_template(void) {
    sh_intake *base = NULL;
    sh_intake_options o = {0};
    CU_ASSERT_EQUAL_FATAL(sh_intake_create(MODELS "26b-a4b-sharded", &o, &base), SH_OK);
    sh_request r = ask(base, 'h', "");
    expect(&r, 400, "unsupported_value", "messages",
           "messages: 26b-a4b-sharded has neither chat_template.jinja nor a chat_template in tokenizer_config.json: "
           "allowed is `prompt` "
           "with /v1/completions",
           "no template");
    sh_request_release(&r);
    static const char text[] = "{\"prompt\":\"Hello\"}";
    r = read_line(base, text, strlen(text));
    CU_ASSERT(r.status == 0 && r.prompt.n > 1 && r.prompt.id[0] == 10); /* this tokenizer adds <bos> */
    sh_request_release(&r);
    sh_intake_destroy(&base);
    CU_ASSERT_NOT_EQUAL(sh_intake_create("/nonexistent/model", &o, &base), SH_OK);
    CU_ASSERT(strstr(sh_error_text(), "/nonexistent/model") != NULL);
}

/* --- mutated lines --- */

static void mutate(char *s, size_t *len, size_t room, uint64_t *rng) {
    static const char *const bits[] = {"\"",
                                       "{",
                                       "}",
                                       "[",
                                       "]",
                                       ",",
                                       ":",
                                       "-",
                                       "1e999",
                                       "null",
                                       "true",
                                       "\\u0000",
                                       "\\ud800",
                                       "\xff",
                                       "99999999999999999999",
                                       "\"max_tokens\":",
                                       "\"messages\":",
                                       "\"prompt\":"};
    *rng = sh_mix64(*rng);
    for (int k = 0, n_changes = 1 + (int)(*rng >> 62); k < n_changes; k++) {
        *rng = sh_mix64(*rng);
        size_t at = *rng % *len;
        const char *bit = bits[(*rng >> 32) % (sizeof bits / sizeof *bits)];
        size_t n = strlen(bit);
        if ((*rng >> 60) < 5 && *len > 2) { /* cut a piece */
            size_t cut = 1 + (*rng >> 40) % 8;
            if (at + cut > *len) cut = *len - at;
            if (cut >= *len) cut = *len - 1;
            memmove(s + at, s + at + cut, *len - at - cut);
            *len -= cut;
        } else if ((*rng >> 60) < 10 && *len + n < room) { /* put one in */
            memmove(s + at + n, s + at, *len - at);
            memcpy(s + at, bit, n);
            *len += n;
        } else
            s[at] = (char)((*rng >> 59 & 1) ? *rng >> 24 : 32 + (*rng >> 24) % 95);
    }
}

static void test_mutations(void) {
    static const char *const seeds[] = {
        "{\"custom_id\":\"a\",\"method\":\"POST\",\"url\":\"/v1/chat/"
        "completions\",\"body\":{\"messages\":[{\"role\":\"user\",\"content\":"
        "[{\"type\":\"text\",\"text\":\"Hi\"}]},{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"f\","
        "\"arguments\":"
        "\"{\\\"a\\\":1}\"}}]},{\"role\":\"tool\",\"content\":\"7\"}],\"logprobs\":true,\"top_logprobs\":3,\"tools\":[]"
        "}}",
        "{\"custom_id\":\"a\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{\"prompt\":\"Hello "
        "\xc3\xa9\",\"stop\":[\"a\",\"b\"],"
        "\"max_tokens\":5,\"temperature\":0.5,\"stop_token_ids\":[1,2,3],\"logit_bias\":{},\"seed\":5,\"echo\":true,"
        "\"logprobs\":1}}",
        "{\"prompt\":[1,2,3,4,5],\"min_p\":0.1,\"top_k\":5,\"response_format\":{\"type\":\"text\"}}"};
    enum { ROOM = 1024, ROUNDS = 20000 };
    uint64_t rng = 1;
    for (int i = 0; i < 3; i++) {
        sh_request r = read_line(in, seeds[i], strlen(seeds[i]));
        CU_ASSERT_EQUAL(r.status, 0);
        sh_request_release(&r);
    }
    int fine = 0, refused = 0, bad = 0;
    for (int i = 0; i < ROUNDS; i++) {
        char s[ROOM];
        size_t len = strlen(seeds[i % 3]);
        memcpy(s, seeds[i % 3], len);
        mutate(s, &len, ROOM, &rng);
        char *exact = malloc(len); /* so that a sanitizer sees a read past the end */
        memcpy(exact, s, len);
        sh_request r = read_line(in, exact, len);
        free(exact);
        if (r.status == 0)
            fine++;
        else
            refused++;
        bad += r.status == 0 ? r.prompt.n == 0 || r.message || !r.custom_id : !r.message || !r.code[0];
        sh_request_release(&r);
    }
    CU_ASSERT_EQUAL(bad, 0);
    CU_ASSERT(fine > ROUNDS / 1000 && refused > ROUNDS / 2);
}

int main(void) {
    sh_intake_options o = {.max_context = 200};
    if (sh_intake_create(MODELS "e2b-like", &o, &in) != SH_OK) {
        fprintf(stderr, "%s\n", sh_error_text());
        return 1;
    }
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("intake", NULL, NULL);
    CU_add_test(s, "defaults", test_defaults);
    CU_add_test(s, "fields", test_fields);
    CU_add_test(s, "bare lines", test_bare_lines);
    CU_add_test(s, "seed and hash", test_seed_and_hash);
    CU_add_test(s, "options", test_options);
    CU_add_test(s, "bad lines", test_bad_lines);
    CU_add_test(s, "bad envelopes", test_bad_envelopes);
    CU_add_test(s, "bad values", test_bad_values);
    CU_add_test(s, "not provided", test_not_provided);
    CU_add_test(s, "bad messages", test_bad_messages);
    CU_add_test(s, "usual context", test_usual_context);
    CU_add_test(s, "limits", test_limits);
    CU_add_test(s, "no template", test_no_template);
    CU_add_test(s, "mutations", test_mutations);
    CU_basic_run_tests();
    int failed = (int)CU_get_number_of_failures();
    CU_cleanup_registry();
    sh_intake_destroy(&in);
    return failed ? 1 : 0;
}
