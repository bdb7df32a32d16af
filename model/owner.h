/*
 * Who stores what, and who computes which rows, when the members of a stage share positions out (context parallelism,
 * docs/decisions/0016). Arithmetic alone: the leader, the planner and the model must agree on it. Positions fall into
 * segments, segments into aligned blocks of 2^level segments, and block b of sequence s is stored by member
 * (b + s) mod `members`, so that first blocks do not all lie with one member. A block is a node of the tree along which
 * attention joins segments (0003). One member stores everything.
 */
#ifndef SH_MODEL_OWNER_H
#define SH_MODEL_OWNER_H

#include <stdint.h>

#define SH_PAGE_TOKENS    32  /* tokens per KV page; page i of a sequence holds positions 32i … 32i+31 */
#define SH_SEGMENT_TOKENS 128 /* keys that attention takes at a time (0003); a multiple of SH_PAGE_TOKENS */
#define SH_MAX_LEVEL      23  /* of a block: positions are below 2^30 */

/* Blocks of one sequence per member, at most. */
#define SH_OWNER_BLOCKS 2

/* The level for a sequence of `tokens` at most: the lowest that gives no more than 2·members blocks. */
static inline int sh_owner_level(int tokens, int members) {
    int segments = (tokens - 1) / SH_SEGMENT_TOKENS + 1, level = 0;
    if (members == 1) return 0;
    while ((segments - 1) >> level >= SH_OWNER_BLOCKS * members) level++;
    return level;
}

/* Blocks that a row at position `pos` sees, its own included: it sees them from the first on. */
static inline int sh_owner_seen(int pos, int level) {
    return (pos / SH_SEGMENT_TOKENS >> level) + 1;
}

/* A member's place in the round in which blocks of a sequence are dealt: that of place p stores p, p + members, … */
static inline int sh_owner_place(int member, uint64_t seq, int members) {
    int first = (int)(seq % (uint64_t)members);
    return member >= first ? member - first : member - first + members;
}

/* Who stores a block. */
static inline int sh_owner_of(int block, uint64_t seq, int members) {
    return (int)(((uint64_t)block + seq) % (uint64_t)members);
}

/* Positions below `end` that the member at `place` stores. */
static inline int sh_owner_below(int end, int level, int members, int place) {
    int64_t block = (int64_t)SH_SEGMENT_TOKENS << level, round = block * members;
    int64_t rest = end % round - place * block;
    return (int)(end / round * block + (rest < 0 ? 0 : rest < block ? rest : block));
}

/* Of the first n pages those that the member at `place` stores. */
static inline int sh_owner_pages(int n, int level, int members, int place) {
    return sh_owner_below(n * SH_PAGE_TOKENS, level, members, place) / SH_PAGE_TOKENS;
}

/* Pages of a sequence of `tokens` at most on the member that stores most of it: the one at place 0. */
static inline int sh_owner_most(int tokens, int members) {
    return sh_owner_pages((tokens - 1) / SH_PAGE_TOKENS + 1, sh_owner_level(tokens, members), members, 0);
}

/* Tokens of the longest sequence, up to `most`, for which `pages` pages per member are enough. */
static inline int sh_owner_capacity(int pages, int members, int most) {
    int lo = 0; /* fits */
    for (int hi = most + 1; lo + 1 < hi;) {
        int mid = lo + (hi - lo) / 2;
        if (sh_owner_most(mid, members) <= pages)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

/* Member `member` computes rows [first(member), first(member + 1)) of n. */
static inline int sh_owner_first_row(int n, int members, int member) {
    return (int)((int64_t)n * member / members);
}

#endif
