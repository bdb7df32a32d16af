/*
 * tokenizer.json (byte-fallback BPE, as Gemma's) → ids, and back. Added and special tokens by id from the files;
 * nothing is hard-coded. Immutable after loading: any number of threads may use one.
 */
#ifndef SH_MODEL_TOKENIZER_H
#define SH_MODEL_TOKENIZER_H

#include <stdbool.h>
#include "common/buf.h"
#include "common/status.h"

typedef struct sh_tokenizer sh_tokenizer;

/* Reads MODEL/tokenizer.json and, if present, tokenizer_config.json (add_bos_token), or what stands in for them
 * (beside.h). */
sh_status sh_tokenizer_load(const char *model_dir, sh_tokenizer **out);
void sh_tokenizer_destroy(sh_tokenizer **t);
int sh_tokenizer_size(const sh_tokenizer *t); /* ids are 0 … size−1 */
/* Id of a token's exact text (special tokens too), −1 when there is none. */
int sh_tokenizer_id(const sh_tokenizer *t, const char *token);
bool sh_tokenizer_is_special(const sh_tokenizer *t, int id);
/* Whether the tokenizer's own configuration adds <bos> in front (base models). */
bool sh_tokenizer_adds_bos(const sh_tokenizer *t);

typedef struct sh_ids {
    int32_t *id;
    size_t n, cap;
} sh_ids;
void sh_ids_release(sh_ids *ids);
sh_status sh_ids_add(sh_ids *ids, int32_t id);

/* Appends the ids of UTF-8 text; special tokens written in it are recognised. add_bos: as the configuration says when
 * true, never when false. Invalid UTF-8 fails with the byte offset. */
sh_status sh_tokenizer_encode(const sh_tokenizer *t, const char *text, size_t len, bool add_special, sh_ids *out);
/* Appends the text of ids; skip_special leaves special tokens out. A run of byte tokens that is not valid UTF-8 as a
 * whole becomes one U+FFFD per byte (a run longer than SH_DETOK_BYTES is judged in pieces of that size, so that it can
 * be streamed: what was already good stays). Unknown ids fail. */
sh_status sh_tokenizer_decode(const sh_tokenizer *t, const int32_t *ids, size_t n, bool skip_special, sh_buf *out);
/* Bytes that one token stands for by itself (for logprobs' `bytes` and `token` fields): a byte token gives its byte,
 * which may be half a character; a special token its name. Appends. */
sh_status sh_tokenizer_piece(const sh_tokenizer *t, int id, sh_buf *out);

/* Streaming detokenisation: equal to decode() of all ids once flushed; never emits half a code point. Owns nothing. */
enum { SH_DETOK_BYTES = 256 };
typedef struct sh_detok {
    const sh_tokenizer *tok;
    bool skip_special, any; /* any: something was emitted (a leading space rule may depend on it) */
    bool bad;               /* the open run of byte tokens is known not to be valid: each further byte is a U+FFFD */
    int n_stripped;         /* characters the decoder's Strip has removed from the front */
    int n_pending;
    uint8_t pending[SH_DETOK_BYTES]; /* bytes of an open run of byte tokens, valid so far */
} sh_detok;
void sh_detok_init(sh_detok *d, const sh_tokenizer *t, bool skip_special);
sh_status sh_detok_add(sh_detok *d, int id, sh_buf *out);
sh_status sh_detok_flush(sh_detok *d, sh_buf *out);

#endif
