/* What a tokenizer is made of: shared by tokenizer_file.c (reads it) and tokenizer.c (uses it); nobody else includes
 * this. */
#ifndef SH_MODEL_TOKENIZER_INT_H
#define SH_MODEL_TOKENIZER_INT_H

#include "common/scan.h"
#include "model/added.h"
#include "model/bpe.h"
#include "model/tokenizer.h"
#include "model/vocab.h"

enum { SH_TOK_STEPS = 8, SH_TOK_TEXT = 64, SH_TOK_EXTRA = 8 };

/* A short string of the file. */
typedef struct sh_tok_text {
    char s[SH_TOK_TEXT];
    size_t n;
} sh_tok_text;

/* Normalizers: replace every `from` by `to`; with no `from`, put `to` in front of text that is not empty. */
typedef struct sh_tok_replace {
    sh_tok_text from, to;
} sh_tok_replace;

typedef enum sh_split_mode {
    SH_SPLIT_REMOVED,
    SH_SPLIT_ISOLATED,
    SH_SPLIT_PREVIOUS,
    SH_SPLIT_NEXT,
    SH_SPLIT_CONTIGUOUS
} sh_split_mode;

typedef struct sh_tok_split {
    sh_tok_text at;
    sh_split_mode mode;
    bool invert;
} sh_tok_split;

enum { SH_TOK_SPECIAL = 1, SH_TOK_ADDED = 2 };

struct sh_tokenizer {
    sh_vocab vocab; /* the model's and the added tokens */
    sh_bpe bpe;
    sh_added plain;      /* added tokens looked for in the text as given */
    sh_added normalized; /* those looked for in normalised text */
    uint8_t *flags;      /* [vocab.size]: SH_TOK_… */
    sh_tok_replace normalizer[SH_TOK_STEPS];
    sh_tok_split split[SH_TOK_STEPS];
    sh_tok_replace decoder[SH_TOK_STEPS]; /* per token, before bytes are joined */
    int n_normalizer, n_split, n_decoder;
    bool bytes; /* the decoder joins byte tokens */
    char strip; /* the decoder removes up to n_strip of this from the front of the text; 0: nothing */
    int n_strip;
    int32_t prefix[SH_TOK_EXTRA], suffix[SH_TOK_EXTRA]; /* added around text when special tokens are asked for */
    int n_prefix, n_suffix;
    int32_t bos, eos; /* −1: not named */
};

/* Reads a whole tokenizer.json into a zeroed tokenizer (tokenizer_file.c). On failure destroy it. */
sh_status sh_tokenizer_parse(sh_tokenizer *t, sh_scan *s);
/* Appends text with the normalizer's steps done (tokenizer.c). */
sh_status sh_tokenizer_normalize(const sh_tokenizer *t, const char *s, size_t n, sh_buf *out);

#endif
