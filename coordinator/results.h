/* Results: a request and its tokens → one row in OpenAI's batch output format. Each row but its `created` is a function
 * of request, weights, mode and KV type. */
#ifndef SH_COORDINATOR_RESULTS_H
#define SH_COORDINATOR_RESULTS_H

#include "coordinator/intake.h"

/* Everything known about the generated tokens (and scores of prompt tokens 1 … n_scores). Arrays borrowed; logprob,
 * n_top, top may be NULL when not asked for. top has SH_MAX_TOP_LOGPROBS entries per token. */
typedef struct sh_output {
    const int32_t *id;
    const float *logprob;
    const int32_t *n_top;
    const sh_top_logprob *top;
    int32_t n;
    const float *score; /* [n_scores] of prompt tokens 1 … */
    const int32_t *score_n_top;
    const sh_top_logprob *score_top;
    int32_t n_scores;
    sh_finish finish;
    int32_t text_len; /* −1: all */
} sh_output;

/* Appends one JSON object without a newline. created: Unix seconds. */
sh_status sh_result_row(const sh_intake *in, const sh_request *r, const sh_output *o, int64_t created, sh_buf *to);
/* A row for a request that was not run. custom_id may be NULL (then error.line tells the line). */
sh_status sh_result_error_row(const char *custom_id, uint64_t hash, uint64_t number, int status, const char *code,
                              const char *message, const char *param, int64_t created, sh_buf *to);

#endif
