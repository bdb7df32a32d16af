/* A 64-bit hash of bytes (splitmix-mixed FNV-like stream): for ids, content keys and checksums. Not cryptographic. */
#ifndef SH_COMMON_HASH_H
#define SH_COMMON_HASH_H

#include <stddef.h>
#include <stdint.h>

static inline uint64_t sh_mix64(uint64_t z) { /* splitmix64's finaliser: Steele, Lea, Flood, OOPSLA 2014 */
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Hash of n bytes continued from seed (0 to start). */
uint64_t sh_hash64(uint64_t seed, const void *p, size_t n);
/* The same for long inputs, several times faster: its words go to eight streams in turn, which do not wait for each
 * other. Another value than sh_hash64's. */
uint64_t sh_hash64_long(uint64_t seed, const void *p, size_t n);

#endif
