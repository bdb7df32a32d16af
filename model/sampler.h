/*
 * The sampler: logits → token. It sits in the last stage with everything that decides a token or an end. Its state is a
 * pure function of (request, tokens so far): start brings both, drop forgets them. Random numbers are counter-based,
 * keyed by (seed, choice, absolute position), so no order of work changes them.
 * Order: suppress / min_tokens bans → log-probabilities reported → temperature → top-k → top-p → min-p → draw
 * (gemma4-text §7; transformers' order).
 */
#ifndef SH_MODEL_SAMPLER_H
#define SH_MODEL_SAMPLER_H

#include "model/batch.h"
#include "model/digest.h"
#include "model/kernels/kernels.h"
#include "model/team.h"
#include "model/tokenizer.h"

typedef struct sh_sampler sh_sampler;

/* tokenizer: for stop strings; borrowed, may be NULL when no request has any. max_seqs states at once. team: whose
 * threads share the rows of sh_sampler_steps; borrowed; NULL: there is but the caller's. */
sh_status sh_sampler_create(const sh_kernels *kn, const sh_tokenizer *tok, int vocab, int max_seqs, int max_context,
                            sh_team *team, sh_sampler **out);
void sh_sampler_destroy(sh_sampler **s);
/* Copies what it needs. A sequence already known is replaced. */
sh_status sh_sampler_start(sh_sampler *s, const sh_seq_start *start);
void sh_sampler_drop(sh_sampler *s, uint64_t seq); /* unknown: nothing happens */
/* logits [vocab] (soft-capped; scratch: may be overwritten) are those after position `pos` of the sequence. Before the
 * last known token's position they only score (score_prompt) the token at pos + 1 and give at most one sh_token with
 * score set; at it they sample the next token. *n is 0 or 1. Allocates nothing. */
sh_status sh_sampler_step(sh_sampler *s, uint64_t seq, int pos, float *logits, sh_token *out, int *n);

/* A row of logits is that after position `pos` of a sequence. */
typedef struct sh_sampler_row {
    uint64_t seq;
    int pos;
} sh_sampler_row;
/* sh_sampler_step for n rows, logits [n, vocab], on the team's threads: out[i] is made when made[i] is 1. Rows of one
 * sequence follow each other, ascending. A failure is that of the first row that fails. */
sh_status sh_sampler_steps(sh_sampler *s, const sh_sampler_row *row, int n, float *logits, sh_token *out, int *made);

/*
 * A head that is cut by vocabulary: every part starts and drops the same sequences; one part chooses, the others, which
 * are made quiet, only tell of their ids. Same tokens as sh_sampler_step on the whole row.
 */
/* From now on texts are not followed: for a part that never steps. No tokenizer is needed. */
void sh_sampler_quiet(sh_sampler *s);
/* Bans and digest of x [n], the logits of ids base … base+n−1 after position `pos`. */
sh_status sh_sampler_digest(sh_sampler *s, uint64_t seq, int pos, float *x, int n, int base, uint8_t *to,
                            size_t *bytes);
/* What the row's digests leave open for the step below. Changes nothing. */
sh_status sh_sampler_ask(sh_sampler *s, uint64_t seq, int pos, sh_row *row, sh_row_ask *ask);
/* sh_sampler_step on a row in parts, which was given what was asked for. */
sh_status sh_sampler_step_row(sh_sampler *s, uint64_t seq, int pos, sh_row *row, sh_token *out, int *n);

#endif
