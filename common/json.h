/*
 * JSON, by jansson: the one place that includes it. Adds reading of files with the position in the error, and typed
 * look-ups whose errors name the field. A `json_t *` returned by sh_json_* look-ups is borrowed; by parsers owned
 * (json_decref, or SH_CLEANUP(sh_json_release)).
 */
#ifndef SH_COMMON_JSON_H
#define SH_COMMON_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include "common/status.h"

/* Parses a whole file of at most max_bytes. Errors name the file, line and column. */
sh_status sh_json_read(const char *path, size_t max_bytes, json_t **out);
/* Reads the named members of the object in a file (absent ones stay absent) and passes over all others unread: for
 * files whose other members jansson refuses, such as tokenizer_config.json with its model_max_length of 10^30. `keys`
 * ends in NULL. */
sh_status sh_json_read_members(const char *path, size_t max_bytes, const char *const keys[], json_t **out);
/* The same of a text. `what` names it in errors. */
sh_status sh_json_parse_members(const char *what, const char *text, size_t len, const char *const keys[], json_t **out);
/* Parses text that need not end in 0; duplicate keys and trailing text are errors. `what` names the text in errors. */
sh_status sh_json_parse(const char *what, const char *text, size_t len, json_t **out);
void sh_json_release(json_t **j);
static inline bool sh_json_is_set(const json_t *object, const char *key) {
    const json_t *v = json_object_get(object, key);
    return v && !json_is_null(v);
}
/* Typed look-ups: absent or null leaves *out as it is; a wrong type or a value outside [min, max] fails with
 * "key: <found> is not <what>: allowed are min to max". Integers written as 3.0 are accepted. */
sh_status sh_json_int(const json_t *object, const char *key, int64_t min, int64_t max, int64_t *out);
sh_status sh_json_double(const json_t *object, const char *key, double min, double max, double *out);
sh_status sh_json_bool(const json_t *object, const char *key, bool *out);
/* *out borrowed from object. */
sh_status sh_json_string(const json_t *object, const char *key, const char **out);
/* "a number", "a string", …: for messages. */
const char *sh_json_type_name(const json_t *j);

#endif
