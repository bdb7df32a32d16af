/*
 * Intake: one JSON line → a request that can run, or the reason why not. A pure function of (line, model's files,
 * options): the same line always gives the same request, so only the line need be stored. Validates every field of the
 * OpenAI batch format that is provided, refuses the others by name, renders chat, tokenises.
 */
#ifndef SH_COORDINATOR_INTAKE_H
#define SH_COORDINATOR_INTAKE_H

#include "common/json.h"
#include "model/config.h"
#include "model/sampling.h"
#include "model/tokenizer.h"

typedef struct sh_intake_options {
    uint64_t seed;          /* for requests without one: hashed with custom_id */
    int default_max_tokens; /* 0: what the context leaves */
    int max_context;        /* 0: the model's */
    bool lenient;           /* unknown fields are ignored */
} sh_intake_options;

typedef struct sh_intake sh_intake;
sh_status sh_intake_create(const char *model_dir, const sh_intake_options *o, sh_intake **out);
void sh_intake_destroy(sh_intake **in);
/* Other options from here on: jobs differ in theirs, and share the model's files. */
void sh_intake_set_options(sh_intake *in, const sh_intake_options *o);
const sh_tokenizer *sh_intake_tokenizer(const sh_intake *in);
const char *sh_intake_model_name(const sh_intake *in); /* the checkpoint directory's own name */

typedef struct sh_request {
    char *custom_id; /* NULL: the line has no usable one */
    uint64_t
        hash; /* of the line's content (and the options that decide the answer): with custom_id, the key of a result */
    uint64_t number; /* line number, from 1 */
    bool chat;       /* /v1/chat/completions, else /v1/completions */
    bool echo, return_token_ids;
    bool tools;        /* tools were offered: calls in the output are read */
    bool unlimited;    /* nobody said how many tokens: max_tokens is what the context leaves */
    bool score_only;   /* max_tokens 0: one token is generated (sampling.max_tokens is 1) and left out of the row */
    char *model;       /* as the request names it, or NULL */
    char *prompt_text; /* completions with a string prompt, for echo; else NULL */
    sh_ids prompt;
    sh_sampling sampling;
    /* why it cannot run; status 0: it can */
    int status;        /* 400, 413, 422 */
    char code[48];     /* e.g. "invalid_value", "unknown_field", "context_length_exceeded" */
    char param[128];   /* the field; "" when none */
    char *message;     /* field: what is wrong: what is allowed */
    char warning[256]; /* "" or a line worth telling the user once (e.g. another model's name) */
} sh_request;

/* Never fails for bad input: that is in r->status. Fails only for lack of memory. Always release. */
sh_status sh_intake_line(const sh_intake *in, const char *text, size_t len, uint64_t number, sh_request *r);
void sh_request_release(sh_request *r);

#endif
