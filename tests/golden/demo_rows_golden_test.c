/* The demo batch without the model: intake gives the reference's prompt ids, and the reference's output ids give its
 * texts. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "common/file.h"
#include "coordinator/results.h"

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

static bool same_ids(const json_t *want, const sh_ids *got) {
    bool same = json_array_size(want) == got->n;
    for (size_t i = 0; same && i < got->n; i++) same = json_integer_value(json_array_get(want, i)) == got->id[i];
    return same;
}

static void check_row(const sh_intake *in, const sh_request *r, const json_t *want) {
    const char *id = r->custom_id, *finish = json_string_value(json_object_get(want, "finish_reason"));
    const json_t *out = json_object_get(want, "output_ids");
    sh_ids ids = {0};
    for (size_t i = 0; i < json_array_size(out); i++)
        SH_IGNORE(sh_ids_add(&ids, (int32_t)json_integer_value(json_array_get(out, i))));
    sh_output o = {.id = ids.id,
                   .n = (int32_t)ids.n,
                   .text_len = -1,
                   .finish = strcmp(finish, "stop") ? SH_FINISH_LENGTH : SH_FINISH_STOP};
    SH_CLEANUP(sh_buf_release) sh_buf b = {0};
    json_t *row = NULL;
    CHECK(sh_result_row(in, r, &o, 0, &b) == SH_OK, "%s: %s", id, sh_error_text());
    CHECK(sh_json_parse(id, (const char *)b.data, b.len, &row) == SH_OK, "%s", sh_error_text());
    const json_t *body = json_object_get(json_object_get(row, "response"), "body"),
                 *usage = json_object_get(body, "usage");
    const json_t *choice = json_array_get(json_object_get(body, "choices"), 0);
    CHECK(json_equal(json_object_get(json_object_get(choice, "message"), "content"), json_object_get(want, "content")),
          "%s: %s", id, json_string_value(json_object_get(json_object_get(choice, "message"), "content")));
    CHECK(json_equal(json_object_get(choice, "finish_reason"), json_object_get(want, "finish_reason")),
          "%s: finish_reason", id);
    CHECK(json_equal(json_object_get(usage, "prompt_tokens"), json_object_get(want, "prompt_tokens")),
          "%s: prompt_tokens", id);
    CHECK(json_equal(json_object_get(usage, "completion_tokens"), json_object_get(want, "completion_tokens")),
          "%s: completion_tokens", id);
    json_decref(row);
    sh_ids_release(&ids);
}

int main(void) {
    char *batch = NULL, *expected = NULL, *save_b = NULL, *save_e = NULL;
    size_t len;
    sh_intake *in = NULL;
    sh_intake_options options = {0};
    if (sh_intake_create(SH_SOURCE_DIR "/share/minnow", &options, &in) != SH_OK ||
        sh_file_read(SH_SOURCE_DIR "/share/demo-batch.jsonl", (size_t)16 << 20, &batch, &len) != SH_OK ||
        sh_file_read(SH_TEST_DATA "/demo-tests/batch64.expected.jsonl", (size_t)16 << 20, &expected, &len) != SH_OK) {
        fprintf(stderr, "%s\n", sh_error_text());
        return 1;
    }
    int n = 0;
    char *e = strtok_r(expected, "\n", &save_e);
    for (char *line = strtok_r(batch, "\n", &save_b); line && e;
         line = strtok_r(NULL, "\n", &save_b), e = strtok_r(NULL, "\n", &save_e)) {
        sh_request r;
        json_t *want = NULL;
        n++;
        CHECK(sh_json_parse("expected", e, strlen(e), &want) == SH_OK, "%s", sh_error_text());
        CHECK(sh_intake_line(in, line, strlen(line), (uint64_t)n, &r) == SH_OK, "%s", sh_error_text());
        CHECK(r.status == 0, "line %d: %s", n, r.message ? r.message : "");
        CHECK(r.custom_id && !strcmp(r.custom_id, json_string_value(json_object_get(want, "custom_id"))),
              "line %d: custom_id", n);
        CHECK(same_ids(json_object_get(want, "prompt_ids"), &r.prompt), "line %d: prompt ids differ", n);
        if (r.status == 0) check_row(in, &r, want);
        sh_request_release(&r);
        json_decref(want);
    }
    CHECK(n == 64, "%d rows, not 64", n);
    free(batch);
    free(expected);
    sh_intake_destroy(&in);
    printf("%d checks, %d failures\n", checks, failures);
    return failures ? 1 : 0;
}
