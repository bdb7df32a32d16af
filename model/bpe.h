/*
 * Byte-pair encoding as Hugging Face tokenizers' BPE model does it (models/bpe/{model,word}.rs): text of one piece
 * becomes one symbol per character (or per byte, byte_fallback), then the neighbouring pair of lowest rank, leftmost
 * first, is joined until no pair is in the table. Immutable once built; any number of threads may encode.
 *
 * Gemma 4's file does not cut text into words, so a piece is a whole document. Two things keep that fast and change
 * nothing:
 * - A join across a border between two symbols needs a merge whose left part ends as the left symbol does and whose
 * right part begins as the right one does. Borders where no merge fits are never crossed, so the parts between them are
 *   independent (they turn out to be about the words of the text).
 * - Short parts are scanned for the lowest rank, long ones use a heap over a linked list: O(n log n).
 */
#ifndef SH_MODEL_BPE_H
#define SH_MODEL_BPE_H

#include <stdbool.h>
#include <stdint.h>
#include "common/status.h"
#include "model/tokenizer.h"
#include "model/vocab.h"

typedef struct sh_merge {
    uint64_t pair; /* left id << 32 | right id; UINT64_MAX: empty slot */
    uint32_t rank;
    int32_t id; /* what the pair becomes */
} sh_merge;

enum { SH_BPE_CLASSES = 256, SH_BPE_PAGES = 0x1100 };

typedef struct sh_bpe {
    bool byte_fallback, fuse_unk, ignore_merges;
    int32_t unk;                 /* −1: characters that are in no token are dropped, as the original does */
    int32_t size;                /* ids of the model are below (added tokens may be above) */
    int32_t byte_id[256];        /* ids of <0x00> … <0xFF>; −1: none */
    int32_t *page[SH_BPE_PAGES]; /* [code point / 256][code point % 256] → id + 1; 0: none */
    sh_merge *merge;             /* open addressing, [merges], a power of two */
    uint64_t merges, n_merges;
    uint8_t *first, *last; /* [size]: class of the first and last character of each id's text */
    uint64_t crosses[SH_BPE_CLASSES][SH_BPE_CLASSES / 64]; /* bit (last, first): some merge may join across */
} sh_bpe;

/* Prepares for at most n_merges merges over the vocabulary as it stands (before added tokens). On failure release it.
 */
sh_status sh_bpe_init(sh_bpe *b, const sh_vocab *v, uint64_t n_merges);
void sh_bpe_release(sh_bpe *b);
/* The rank-th merge; a pair given twice keeps the later rank. SH_EFORMAT when the joined text is not in the vocabulary.
 */
sh_status sh_bpe_add_merge(sh_bpe *b, const sh_vocab *v, uint32_t rank, int32_t left, int32_t right);
/* Appends the ids of one piece: valid UTF-8. */
sh_status sh_bpe_encode(const sh_bpe *b, const sh_vocab *v, const char *s, size_t n, sh_ids *out);

#endif
