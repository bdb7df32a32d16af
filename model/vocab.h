/*
 * Strings ⇄ ids, for a tokenizer's vocabulary: a hash table over one block of bytes. Ids need not come in order and may
 * have gaps. Strings are bytes with a length and may hold zeros.
 */
#ifndef SH_MODEL_VOCAB_H
#define SH_MODEL_VOCAB_H

#include <stdbool.h>
#include <stdint.h>
#include "common/buf.h"
#include "common/status.h"

typedef struct sh_vocab_entry {
    uint32_t at, len; /* in bytes.data; at == UINT32_MAX: no such id */
} sh_vocab_entry;

typedef struct sh_vocab {
    sh_buf bytes;
    sh_vocab_entry *entry; /* [cap]; ids 0 … size−1 */
    int32_t size, cap;
    uint32_t n;     /* ids that exist */
    uint64_t *slot; /* [slots]: hash's upper half << 32 | id + 1; 0: empty */
    uint32_t slots; /* a power of two */
} sh_vocab;

void sh_vocab_init(sh_vocab *v);
void sh_vocab_release(sh_vocab *v);
/* Adds a string under an id. Fails with SH_EFORMAT when either is taken; the text says which. */
sh_status sh_vocab_add(sh_vocab *v, int32_t id, const char *s, size_t n);
/* Id of a string, −1 when there is none. */
int32_t sh_vocab_find(const sh_vocab *v, const char *s, size_t n);
/* Text of an id: borrowed, not 0-terminated; NULL when there is none. */
const char *sh_vocab_text(const sh_vocab *v, int32_t id, size_t *n);

#endif
