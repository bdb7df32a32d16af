/* Writes small safetensors files for tests, right ones and deliberately wrong ones. Header-only. */
#ifndef SH_TESTS_CHECKPOINT_H
#define SH_TESTS_CHECKPOINT_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* DIR/NAME with these bytes. */
static inline void ck_put(const char *dir, const char *name, const void *p, size_t n) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(p, 1, n, f) != n) {
        perror(path);
        exit(1);
    }
    fclose(f);
}

/* A file with this header text and `data` bytes of a fixed pattern; length: what the first 8 bytes say, −1: the truth.
 */
static inline void ck_put_header(const char *dir, const char *name, const char *header, size_t data, int64_t length) {
    size_t n = strlen(header);
    uint8_t *p = malloc(8 + n + data);
    uint64_t len = length < 0 ? n : (uint64_t)length;
    for (int i = 0; i < 8; i++) p[i] = (uint8_t)(len >> (8 * i));
    memcpy(p + 8, header, n);
    for (size_t i = 0; i < data; i++) p[8 + n + i] = (uint8_t)(i * 37 + 1);
    ck_put(dir, name, p, 8 + n + data);
    free(p);
}

/* A file made tensor by tensor. */
typedef struct ck_file {
    char *header;
    uint8_t *data;
    size_t n, len;
} ck_file;

static inline void ck_add(ck_file *f, const char *name, const char *dtype, int rank, const int64_t *shape,
                          const void *p, size_t bytes) {
    size_t old = f->header ? strlen(f->header) : 0;
    f->header = realloc(f->header, old + strlen(name) + 400);
    char *s = f->header + old;
    s += sprintf(s, "%s\"%s\": {\"dtype\": \"%s\", \"shape\": [", f->n++ ? ", " : "{", name, dtype);
    for (int i = 0; i < rank; i++) s += sprintf(s, "%s%lld", i ? ", " : "", (long long)shape[i]);
    sprintf(s, "], \"data_offsets\": [%zu, %zu]}", f->len, f->len + bytes);
    f->data = realloc(f->data, f->len + bytes + 1);
    memcpy(f->data + f->len, p, bytes);
    f->len += bytes;
}

/* Writes and forgets. odd: the data begins at an odd offset. */
static inline void ck_finish(ck_file *f, const char *dir, const char *name, int odd) {
    size_t n = strlen(f->header) + 1, pad = (n + 8) % 2 == (size_t)(odd != 0) ? 0 : 1;
    uint8_t *p = malloc(8 + n + pad + f->len);
    for (int i = 0; i < 8; i++) p[i] = (uint8_t)((uint64_t)(n + pad) >> (8 * i));
    memcpy(p + 8, f->header, n - 1);
    memcpy(p + 8 + n - 1, "}  ", 1 + pad);
    memcpy(p + 8 + n + pad, f->data, f->len);
    ck_put(dir, name, p, 8 + n + pad + f->len);
    free(p);
    free(f->header);
    free(f->data);
    *f = (ck_file){0};
}

#endif
