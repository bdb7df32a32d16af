/* Strings and ids of a tokenizer. See vocab.h. */
#include "model/vocab.h"

#include <stdlib.h>
#include <string.h>

#include "common/hash.h"
#include "common/limits.h"

void sh_vocab_init(sh_vocab *v) {
    *v = (sh_vocab){0};
    sh_buf_init(&v->bytes, SH_MAX_TOKENIZER_BYTES);
}

void sh_vocab_release(sh_vocab *v) {
    sh_buf_release(&v->bytes);
    free(v->entry);
    free(v->slot);
    sh_vocab_init(v);
}

/* Slot of a string, or the empty one where it belongs. The table is never full. */
static uint32_t find_slot(const sh_vocab *v, const char *s, size_t n, uint64_t hash) {
    uint32_t mask = v->slots - 1;
    for (uint32_t i = (uint32_t)hash & mask;; i = (i + 1) & mask) {
        uint64_t e = v->slot[i];
        if (e == 0) return i;
        if (e >> 32 != hash >> 32) continue;
        const sh_vocab_entry *x = &v->entry[(uint32_t)e - 1];
        if (x->len == n && memcmp(v->bytes.data + x->at, s, n) == 0) return i;
    }
}

static sh_status grow_slots(sh_vocab *v) {
    sh_vocab w = *v;
    w.slots = v->slots ? v->slots * 2 : 1024;
    w.slot = calloc(w.slots, sizeof *w.slot);
    if (!w.slot) SH_FAIL(SH_EMEMORY, "no memory for a vocabulary of %u entries", w.slots);
    for (int32_t id = 0; id < v->size; id++) {
        const sh_vocab_entry *x = &v->entry[id];
        if (x->at == UINT32_MAX) continue;
        const char *s = (const char *)v->bytes.data + x->at;
        uint64_t hash = sh_hash64(0, s, x->len);
        w.slot[find_slot(&w, s, x->len, hash)] = (hash >> 32) << 32 | (uint32_t)(id + 1);
    }
    free(v->slot);
    *v = w;
    return SH_OK;
}

static sh_status grow_entries(sh_vocab *v, int32_t id) {
    if (id >= v->cap) {
        int64_t cap = v->cap ? v->cap : 1024;
        while (cap <= id) cap *= 2;
        sh_vocab_entry *p = realloc(v->entry, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for a vocabulary of %lld entries", (long long)cap);
        v->entry = p;
        v->cap = (int32_t)cap;
    }
    for (; v->size <= id; v->size++) v->entry[v->size] = (sh_vocab_entry){UINT32_MAX, 0};
    return SH_OK;
}

sh_status sh_vocab_add(sh_vocab *v, int32_t id, const char *s, size_t n) {
    if (id < 0 || id >= SH_MAX_VOCAB)
        SH_FAIL(SH_ELIMIT, "id %d is out of range: allowed are 0 to %d", id, SH_MAX_VOCAB - 1);
    size_t old_len;
    const char *old = sh_vocab_text(v, id, &old_len);
    if (old)
        SH_FAIL(SH_EFORMAT, "id %d is given to both '%.*s' and '%.*s'", id, (int)(old_len < 80 ? old_len : 80), old,
                (int)(n < 80 ? n : 80), s);
    if ((v->n + 1) * 2 > v->slots) SH_TRY(grow_slots(v));
    uint64_t hash = sh_hash64(0, s, n);
    uint32_t slot = find_slot(v, s, n, hash);
    if (v->slot[slot]) SH_FAIL(SH_EFORMAT, "'%.*s' occurs twice", (int)(n < 80 ? n : 80), s);
    SH_TRY(grow_entries(v, id));
    uint32_t at = (uint32_t)v->bytes.len;
    SH_TRY(sh_buf_add(&v->bytes, s, n));
    v->entry[id] = (sh_vocab_entry){at, (uint32_t)n};
    v->slot[slot] = (hash >> 32) << 32 | (uint32_t)(id + 1);
    v->n++;
    return SH_OK;
}

int32_t sh_vocab_find(const sh_vocab *v, const char *s, size_t n) {
    if (v->slots == 0) return -1;
    uint64_t hash = sh_hash64(0, s, n);
    return (int32_t)(uint32_t)v->slot[find_slot(v, s, n, hash)] - 1;
}

const char *sh_vocab_text(const sh_vocab *v, int32_t id, size_t *n) {
    if (id < 0 || id >= v->size || v->entry[id].at == UINT32_MAX) return NULL;
    *n = v->entry[id].len;
    return (const char *)v->bytes.data + v->entry[id].at;
}
