/* See hash.h. */
#include "common/hash.h"

#include <string.h>

uint64_t sh_hash64(uint64_t seed, const void *p, size_t n) {
    const unsigned char *c = p;
    uint64_t h = sh_mix64(seed ^ (uint64_t)n);
    for (; n >= 8; c += 8, n -= 8) {
        uint64_t w;
        memcpy(&w, c, 8);
        h = sh_mix64(h ^ w);
    }
    uint64_t w = 0;
    memcpy(&w, c, n);
    return sh_mix64(h ^ w);
}

uint64_t sh_hash64_long(uint64_t seed, const void *p, size_t n) {
    enum { STREAMS = 8 };
    const unsigned char *c = p;
    size_t blocks = n / (8 * STREAMS), done = blocks * 8 * STREAMS;
    uint64_t h[STREAMS];
    for (int i = 0; i < STREAMS; i++) h[i] = sh_mix64(seed ^ (uint64_t)n ^ (uint64_t)i << 56);
    for (; blocks > 0; blocks--, c += 8 * STREAMS)
        for (int i = 0; i < STREAMS; i++) {
            uint64_t w;
            memcpy(&w, c + 8 * i, 8);
            h[i] = sh_mix64(h[i] ^ w);
        }
    return sh_hash64(sh_hash64(0, h, sizeof h), c, n - done);
}
