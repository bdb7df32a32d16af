/* The header of a GGUF file, value by value. See gguf_read.h; the format: docs/model.md. */
#include "model/gguf_read.h"

#include <string.h>

#include "common/limits.h"

enum { NESTED = 4, LEAST_KEY = 13, LEAST_INFO = 24 };

static sh_status take(sh_gguf_reader *r, size_t n, const uint8_t **out) {
    if (n > r->len - r->at)
        SH_FAIL(SH_EFORMAT, "header: needs %zu bytes at offset %zu, but the file has only %zu: is it truncated?", n,
                r->at, r->len);
    *out = r->data + r->at;
    r->at += n;
    return SH_OK;
}

sh_status sh_gguf_take_number(sh_gguf_reader *r, size_t bytes, uint64_t *out) {
    const uint8_t *p = NULL;
    *out = 0;
    SH_TRY(take(r, bytes, &p));
    memcpy(out, p, bytes);
    return SH_OK;
}

sh_status sh_gguf_take_text(sh_gguf_reader *r, const char *what, size_t most, sh_gguf_text *out) {
    uint64_t n;
    const uint8_t *p = NULL;
    size_t at = r->at;
    SH_TRY(sh_gguf_take_number(r, 8, &n));
    if (n > most)
        SH_FAIL(SH_EFORMAT, "%s at offset %zu: %llu bytes: at most %zu", what, at, (unsigned long long)n, most);
    SH_TRY(take(r, (size_t)n, &p));
    *out = (sh_gguf_text){(const char *)p, (size_t)n};
    return SH_OK;
}

/* A name that may stand in messages: printable, of 1 … most bytes. */
sh_status sh_gguf_take_name(sh_gguf_reader *r, const char *what, size_t most, sh_gguf_text *out) {
    size_t at = r->at;
    SH_TRY(sh_gguf_take_text(r, what, most, out));
    bool good = out->n > 0;
    for (size_t i = 0; i < out->n; i++) good = good && out->s[i] > ' ' && out->s[i] < 127;
    if (!good) SH_FAIL(SH_EFORMAT, "%s at offset %zu: empty, or not printable ASCII", what, at);
    return SH_OK;
}

/* --- metadata ------------------------------------------------------------------------------------------------------
 */

size_t sh_gguf_value_bytes(uint64_t type) {
    static const uint8_t bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < sizeof bytes ? bytes[type] : 0;
}

static sh_status skip_array(sh_gguf_reader *r, int depth) {
    uint64_t type, n;
    const uint8_t *p = NULL;
    SH_TRY(sh_gguf_take_number(r, 4, &type));
    SH_TRY(sh_gguf_take_number(r, 8, &n));
    size_t each = sh_gguf_value_bytes(type), least = each ? each : type == SH_GGUF_STRING ? 8 : 12;
    if (depth == NESTED) SH_FAIL(SH_EFORMAT, "arrays nested deeper than %d", NESTED);
    if (n > (r->len - r->at) / least)
        SH_FAIL(SH_EFORMAT, "an array of %llu values, but the file has only %zu bytes more: is it truncated?",
                (unsigned long long)n, r->len - r->at);
    if (each) return take(r, each * (size_t)n, &p);
    for (uint64_t i = 0; i < n; i++) SH_TRY(sh_gguf_skip_value(r, type, depth + 1));
    return SH_OK;
}

sh_status sh_gguf_skip_value(sh_gguf_reader *r, uint64_t type, int depth) {
    sh_gguf_text ignored;
    const uint8_t *p = NULL;
    if (type == SH_GGUF_STRING) return sh_gguf_take_text(r, "string", r->len, &ignored);
    if (type == SH_GGUF_ARRAY) return skip_array(r, depth);
    size_t n = sh_gguf_value_bytes(type);
    if (n == 0) SH_FAIL(SH_EFORMAT, "value type %llu: allowed are 0 to 12", (unsigned long long)type);
    return take(r, n, &p);
}

bool sh_gguf_is(sh_gguf_text a, const char *b) {
    return a.n == strlen(b) && memcmp(a.s, b, a.n) == 0;
}

static sh_status check_count(const sh_gguf_reader *r, const char *what, uint64_t n, uint64_t most,
                             uint64_t least_bytes) {
    if (n > most) SH_FAIL(SH_EFORMAT, "%llu %s: at most %llu", (unsigned long long)n, what, (unsigned long long)most);
    if (n > (r->len - r->at) / least_bytes)
        SH_FAIL(SH_EFORMAT, "%llu %s, but the file has only %zu bytes: is it truncated?", (unsigned long long)n, what,
                r->len);
    return SH_OK;
}

sh_status sh_gguf_check_tensors(const sh_gguf_reader *r, uint64_t n) {
    return check_count(r, "tensors", n, SH_MAX_GGUF_TENSORS, LEAST_INFO);
}

sh_status sh_gguf_take_counts(sh_gguf_reader *r, uint64_t *tensors, uint64_t *keys) {
    uint64_t magic, version;
    SH_TRY(sh_gguf_take_number(r, 4, &magic));
    if (magic != 0x46554747) SH_FAIL(SH_EFORMAT, "not a GGUF file: it does not begin with GGUF");
    SH_TRY(sh_gguf_take_number(r, 4, &version));
    if (version != 2 && version != 3)
        SH_FAIL(SH_EUNSUPPORTED, "GGUF version %llu: allowed are 2 and 3, little-endian", (unsigned long long)version);
    SH_TRY(sh_gguf_take_number(r, 8, tensors));
    SH_TRY(sh_gguf_take_number(r, 8, keys));
    SH_TRY(sh_gguf_check_tensors(r, *tensors));
    return check_count(r, "metadata keys", *keys, SH_MAX_GGUF_KEYS, LEAST_KEY);
}
