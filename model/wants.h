/*
 * Who reads what, where members load their weights together (docs/decisions/0033): from the lists of what each of them
 * needs, the pieces in which it is read, packed and sent, the same for everybody. Pure arithmetic: reads no file, knows
 * no rank.
 */
#ifndef SH_MODEL_WANTS_H
#define SH_MODEL_WANTS_H

#include <stdint.h>
#include "common/status.h"

/* What makes panels of equal bytes: equal sources and equal numbers. No gaps: compared as bytes. */
typedef struct sh_source {
    int64_t row;      /* of panel 0: the first row, in a whole matrix below SH_PANEL */
    int32_t layer;    /* that it is for; −1: none */
    int32_t tensor;   /* its place in the set */
    int32_t second;   /* −1, or the tensor whose rows follow; −2 − p: the heads of part p, in its order */
    int32_t type;     /* sh_wtype of the matrix; −1: a vector, which is one panel */
    int32_t k, col;   /* inputs; the first of them */
    int32_t tail;     /* 0: panels are full; else the one panel has so many rows */
    int32_t reserved; /* 0 */
} sh_source;

typedef struct sh_want {
    sh_source source;
    int32_t lo, hi;               /* panels [lo, hi), lo < hi; those of one member and source do not overlap */
    uint32_t packed_bytes, bytes; /* of a panel: packed; of files */
    int32_t job, panel;           /* the member's own: which job wants it, and where panel lo lies in its matrix */
} sh_want;

/* A piece in which a member has a part. */
typedef struct sh_piece {
    int32_t want, first, n; /* panels [first, first + n) of what that place in the member's own list wants */
    int32_t reader;         /* member that reads it */
    int32_t group, members; /* those who need it: list[group … group + members), ascending */
} sh_piece;

typedef struct sh_pieces {
    sh_piece *piece; /* by layer; the same order on all members */
    int n, cap;
    int32_t *list;
    int n_list, list_cap;
    uint64_t bytes; /* of files that this member reads */
} sh_pieces;

/*
 * The pieces of `member`. all: `count[m]` wants of each of the members, one list behind the other. What only one needs
 * it reads itself; the rest is cut into pieces of at most `most` packed bytes (or one panel), each of which goes to the
 * one among those who need it that has the least to read so far.
 */
sh_status sh_wants_divide(const sh_want *all, const int32_t *count, int members, int member, uint64_t most,
                          sh_pieces *out);
void sh_pieces_release(sh_pieces *p);

#endif
