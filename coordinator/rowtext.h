/* JSON as it is written into result rows: strings of any bytes, numbers that always print alike. Private to results. */
#ifndef SH_COORDINATOR_ROWTEXT_H
#define SH_COORDINATOR_ROWTEXT_H

#include "common/buf.h"

/* A JSON string. Bytes that are not UTF-8 become U+FFFD, one each. */
sh_status sh_row_string(sh_buf *to, const void *text, size_t len);
/* The shortest decimal that reads back as the same float; what JSON cannot say (NaN, ±∞) is clamped to ±9999, as vLLM
 * does. */
sh_status sh_row_float(sh_buf *to, float x);
/* [1, 2, 3] without spaces. */
sh_status sh_row_ids(sh_buf *to, const int32_t *ids, size_t n);
/* Bytes of the UTF-8 code point at s (1 to 4), 0 when there is no valid one. */
size_t sh_utf8_len(const unsigned char *s, size_t n);
/* Code points in valid UTF-8; each stray byte counts as one. */
size_t sh_utf8_count(const void *text, size_t len);

#endif
