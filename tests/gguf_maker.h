/* Writes small GGUF files for tests, key by key and tensor by tensor. Header-only; memory is not given back. */
#ifndef SH_TESTS_GGUF_MAKER_H
#define SH_TESTS_GGUF_MAKER_H

#include "common/json.h"
#include "tests/checkpoint.h"

typedef struct gm_bytes {
    uint8_t *p;
    size_t n, cap;
} gm_bytes;

typedef struct gm_file {
    gm_bytes keys, infos, data;
    uint64_t n_keys, n_tensors;
} gm_file;

static inline void gm_add(gm_bytes *b, const void *p, size_t n) {
    if (b->n + n > b->cap) {
        b->cap = 2 * (b->n + n);
        b->p = realloc(b->p, b->cap);
        if (!b->p) exit(1);
    }
    memcpy(b->p + b->n, p, n);
    b->n += n;
}

static inline void gm_num(gm_bytes *b, uint64_t v, size_t n) {
    gm_add(b, &v, n);
}

static inline void gm_text(gm_bytes *b, const char *s, size_t n) {
    gm_num(b, n, 8);
    gm_add(b, s, n);
}

static inline void gm_key(gm_file *f, const char *key, uint32_t type) {
    gm_text(&f->keys, key, strlen(key));
    gm_num(&f->keys, type, 4);
    f->n_keys++;
}

static inline void gm_u32(gm_file *f, const char *key, uint32_t v) {
    gm_key(f, key, 4);
    gm_num(&f->keys, v, 4);
}

static inline void gm_f32(gm_file *f, const char *key, float v) {
    gm_key(f, key, 6);
    gm_add(&f->keys, &v, 4);
}

static inline void gm_bool(gm_file *f, const char *key, int v) {
    gm_key(f, key, 7);
    gm_num(&f->keys, v != 0, 1);
}

static inline void gm_string(gm_file *f, const char *key, const char *s) {
    gm_key(f, key, 8);
    gm_text(&f->keys, s, strlen(s));
}

/* The head of an array: n values of a type, which follow. */
static inline void gm_array(gm_file *f, const char *key, uint32_t type, uint64_t n) {
    gm_key(f, key, 9);
    gm_num(&f->keys, type, 4);
    gm_num(&f->keys, n, 8);
}

static inline void gm_tensor(gm_file *f, const char *name, int rank, const int64_t *dims, uint32_t type, const void *p,
                             size_t n) {
    static const uint8_t zero[32];
    gm_text(&f->infos, name, strlen(name));
    gm_num(&f->infos, (uint64_t)rank, 4);
    for (int i = 0; i < rank; i++) gm_num(&f->infos, (uint64_t)dims[i], 8);
    gm_num(&f->infos, type, 4);
    gm_num(&f->infos, f->data.n, 8);
    gm_add(&f->data, p, n);
    gm_add(&f->data, zero, -n % 32);
    f->n_tensors++;
}

static inline gm_bytes gm_whole(const gm_file *f) {
    static const uint8_t zero[32];
    gm_bytes b = {0};
    gm_num(&b, 0x46554747, 4);
    gm_num(&b, 3, 4);
    gm_num(&b, f->n_tensors, 8);
    gm_num(&b, f->n_keys, 8);
    gm_add(&b, f->keys.p, f->keys.n);
    if (f->infos.n) gm_add(&b, f->infos.p, f->infos.n);
    gm_add(&b, zero, -b.n % 32);
    if (f->data.n) gm_add(&b, f->data.p, f->data.n);
    return b;
}

static inline void gm_release(gm_file *f) {
    free(f->keys.p);
    free(f->infos.p);
    free(f->data.p);
    *f = (gm_file){0};
}

/* The keys that llama.cpp's converter makes of a tokenizer.json of Gemma 4; special tokens are all of type 3, those of
 * `shown` (ends in NULL) of type 4. */
static inline void gm_tokenizer(gm_file *f, const json_t *tokenizer, const char *const *shown, int bos, int eos) {
    const json_t *model = json_object_get(tokenizer, "model"), *vocab = json_object_get(model, "vocab");
    const json_t *merges = json_object_get(model, "merges"), *added = json_object_get(tokenizer, "added_tokens");
    size_t n = json_object_size(vocab), i;
    const char *key, **text = calloc(n, sizeof *text);
    int32_t *type = calloc(n, sizeof *type);
    json_t *v;
    if (!text || !type) exit(1);
    json_object_foreach((json_t *)(uintptr_t)vocab, key, v) {
        text[json_integer_value(v)] = key;
        type[json_integer_value(v)] = strlen(key) == 6 && strncmp(key, "<0x", 3) == 0 ? 6 : 1;
    }
    json_array_foreach(added, i, v) {
        int64_t id = json_integer_value(json_object_get(v, "id"));
        type[id] = 3;
        for (int k = 0; shown[k]; k++)
            if (strcmp(shown[k], text[id]) == 0) type[id] = 4;
    }
    gm_string(f, "tokenizer.ggml.model", "gemma4");
    gm_array(f, "tokenizer.ggml.tokens", 8, n);
    for (i = 0; i < n; i++) gm_text(&f->keys, text[i], strlen(text[i]));
    gm_array(f, "tokenizer.ggml.token_type", 5, n);
    gm_add(&f->keys, type, 4 * n);
    gm_array(f, "tokenizer.ggml.merges", 8, json_array_size(merges));
    json_array_foreach(merges, i, v) {
        char pair[2048];
        snprintf(pair, sizeof pair, "%s %s", json_string_value(json_array_get(v, 0)),
                 json_string_value(json_array_get(v, 1)));
        gm_text(&f->keys, pair, strlen(pair));
    }
    gm_u32(f, "tokenizer.ggml.bos_token_id", (uint32_t)bos);
    gm_u32(f, "tokenizer.ggml.eos_token_id", (uint32_t)eos);
    gm_u32(
        f, "tokenizer.ggml.unknown_token_id",
        (uint32_t)json_integer_value(json_object_get(vocab, json_string_value(json_object_get(model, "unk_token")))));
    gm_bool(f, "tokenizer.ggml.add_bos_token", 1);
    free(text);
    free(type);
}

#endif
