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
