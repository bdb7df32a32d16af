/* A growing byte buffer with a hard cap: the one way to build text or messages of unknown length. */
#ifndef SH_COMMON_BUF_H
#define SH_COMMON_BUF_H

#include <stdint.h>
#include "common/status.h"

typedef struct sh_buf {
    uint8_t *data; /* always followed by a 0 byte once something was added */
    size_t len, cap, max;
} sh_buf;

/* An empty buffer that may grow to max bytes (0: 1 GiB). */
void sh_buf_init(sh_buf *b, size_t max);
void sh_buf_release(sh_buf *b); /* frees; b is empty and usable again */
void sh_buf_clear(sh_buf *b);   /* forgets the content, keeps the memory */
sh_status sh_buf_reserve(sh_buf *b, size_t extra);
sh_status sh_buf_add(sh_buf *b, const void *p, size_t n);
sh_status sh_buf_add_str(sh_buf *b, const char *s);
sh_status sh_buf_printf(sh_buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Hands the memory to the caller (free()); b is empty afterwards. Never NULL. */
char *sh_buf_take(sh_buf *b);

#endif
