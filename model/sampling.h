/* What a request asks of the sampler: plain data, made at intake, carried by protobuf and by the batch descriptor. */
#ifndef SH_MODEL_SAMPLING_H
#define SH_MODEL_SAMPLING_H

#include <stdbool.h>
#include <stdint.h>
#include "common/limits.h"

typedef struct sh_sampling {
    float temperature; /* 0: greedy (ties go to the lower id) */
    float top_p;       /* 1: off */
    float min_p;       /* 0: off; relative to the largest probability */
    int32_t top_k;     /* 0: off */
    uint64_t seed;     /* key of the counter-based generator */
    int32_t choice;    /* index of the choice (n); part of the counter */
    int32_t max_tokens, min_tokens;
    bool ignore_eos;                     /* stop ids of the model do not end; stop_token_ids of the request still do */
    bool score_prompt;                   /* log-probabilities of the prompt tokens (echo with logprobs) */
    int32_t logprobs;                    /* −1: none; 0…: of the chosen token, plus this many alternatives */
    int32_t eos[SH_MAX_STOP_IDS], n_eos; /* the model's end tokens */
    int32_t stop_ids[SH_MAX_STOP_IDS], n_stop_ids; /* the request's own */
    int32_t suppress[SH_MAX_STOP_IDS], n_suppress; /* never chosen */
    int32_t n_stops;
    uint16_t stop_len[SH_MAX_STOPS];
    char stop[SH_MAX_STOPS][SH_MAX_STOP_BYTES]; /* stop strings, UTF-8, not 0-terminated */
} sh_sampling;

typedef enum sh_finish { SH_FINISH_NONE, SH_FINISH_STOP, SH_FINISH_LENGTH, SH_FINISH_CANCEL } sh_finish;

typedef struct sh_top_logprob {
    int32_t id;
    float logprob;
} sh_top_logprob;

/* One sampled token, or (score) the log-probability of one prompt token. */
typedef struct sh_token {
    uint64_t seq;
    int32_t index; /* place among generated tokens (from 0); for scores: place in the prompt (from 1) */
    int32_t id;
    float logprob;    /* natural log-softmax of the unscaled, soft-capped logits */
    bool score;       /* a prompt token's score, not a generated token */
    uint8_t finish;   /* sh_finish */
    int32_t text_len; /* with a finish: bytes of the detokenised output to keep (a stop string is cut); −1: all */
    int32_t n_top;
    sh_top_logprob top[SH_MAX_TOP_LOGPROBS];
} sh_token;

#endif
