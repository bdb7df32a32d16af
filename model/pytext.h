/*
 * What Jinja templates do to values, in C: str(), trim, sorting of keys, truth. Chat templates are Python's behaviour
 * made text, so rendering them natively needs these to the letter. NULL stands for Jinja's `undefined`.
 */
#ifndef SH_MODEL_PYTEXT_H
#define SH_MODEL_PYTEXT_H

#include "common/buf.h"
#include "common/json.h"
#include "common/scan.h"

/* Appends str(value): text as it is, None, True, 1.0, [1, 'a'], {'k': None}; undefined is nothing. */
sh_status sh_py_str(const json_t *v, sh_buf *out);
/* bool(value): empty text, lists and objects, zero, None and undefined are false. */
bool sh_py_true(const json_t *v);
/* The member of an object; NULL where the value is no object or has no such member. */
static inline const json_t *sh_py_get(const json_t *v, const char *key) {
    return json_object_get(v, key);
}
/* Text without white space at either end (str.strip()). Borrowed from s. */
sh_span sh_py_trim(const char *s, size_t n);
/* Upper-cases ASCII letters in place. */
void sh_py_upper(char *s, size_t n);

/* Members of an object in the order of Jinja's dictsort: by lower-cased key, otherwise as they stand. */
typedef struct sh_py_item {
    const char *key;
    const json_t *value;
    char *folded; /* the key in lower case; private */
    size_t place;
} sh_py_item;
typedef struct sh_py_items {
    sh_py_item *item;
    size_t n;
} sh_py_items;
sh_status sh_py_dictsort(const json_t *object, sh_py_items *out);
void sh_py_items_release(sh_py_items *items);

#endif
