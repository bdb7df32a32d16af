/*
 * The fields of a request's body, one by one: type, range, and what is provided. Private to intake. What several fields
 * decide together (lengths, prompt, seed) is settled by intake.c afterwards.
 */
#ifndef SH_COORDINATOR_FIELDS_H
#define SH_COORDINATOR_FIELDS_H

#include "coordinator/intake.h"

/* A body being read. */
typedef struct sh_reading {
    int vocab, max_context;
    bool chat, lenient;
    const char *url;
    sh_request *r; /* flags and r->sampling are filled in as fields are read */
    /* the refusal, when a function fails: its text is sh_error_text() */
    int status;
    const char *code;
    /* fields that are settled together; borrowed from the body */
    const json_t *messages, *tools, *prompt;
    bool thinking, no_tools;
    bool has_seed;
    int64_t seed;
    int64_t max_tokens, max_completion_tokens; /* −1: absent */
    bool chat_logprobs;
    int64_t top_logprobs; /* −1: absent */
} sh_reading;

/* Records status and code of a refusal and fails with the text; use as: return sh_refuse(rd, 400, "invalid_value",
 * "…"). */
sh_status sh_refuse(sh_reading *rd, int status, const char *code, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* Reads every field of `body` in its order; the first one that is wrong, unknown or not provided fails. */
sh_status sh_fields_read(sh_reading *rd, const json_t *body);
/* The structure of messages[]: roles, contents, parts, tool calls. Arguments of calls given as JSON text become
 * objects. */
sh_status sh_messages_check(sh_reading *rd, json_t *messages);
/* An integer, also one written as 3.0 (as sh_json_int accepts it). */
bool sh_field_integer(const json_t *v, int64_t *out);
/* Text for messages: at most 64 bytes of a user's string, cut between code points, control characters as '?'. */
const char *sh_quote(const char *s, char out[72]);

#endif
