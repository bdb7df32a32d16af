/*
 * What the last stage answers to a micro-batch: the tokens and scores that its kept rows gave, in span order. Bytes,
 * little-endian, starting with a length and a magic (docs/protocol.md, "Tokens message").
 */
#ifndef SH_WORKER_TOKENS_H
#define SH_WORKER_TOKENS_H

#include "common/buf.h"
#include "model/sampling.h"

/* Bytes of a message with n tokens at most. */
size_t sh_tokens_bytes(int n);
/* Begins a message in an empty buffer; add appends to it; end writes the counts in. */
sh_status sh_tokens_begin(sh_buf *to, uint64_t step);
sh_status sh_tokens_add(sh_buf *to, const sh_token *t);
sh_status sh_tokens_end(sh_buf *to, int n);
/* Reads a whole message into tokens [max]. Everything is checked; SH_EPEER says what is wrong. */
sh_status sh_tokens_decode(const void *data, size_t len, sh_token *tokens, int max, uint64_t *step, int *n);

#endif
