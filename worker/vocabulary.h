/*
 * The head of a last stage whose members divide the vocabulary: from everybody's logits to tokens, at member 0. Each
 * member sends the digests of some rows (model/digest.h); member 0 answers with what it lacks until nothing is missing.
 * Tokens are those of whole rows. All buffers are made at creation.
 */
#ifndef SH_WORKER_VOCABULARY_H
#define SH_WORKER_VOCABULARY_H

#include "common/timeline.h"
#include "model/sampler.h"
#include "proto/link.h"

typedef struct sh_vocabulary sh_vocabulary;

typedef struct sh_vocabulary_options {
    sh_link *link;         /* borrowed */
    int first_rank;        /* of member 0; member m is rank first_rank + m */
    sh_share share;        /* parts ≥ 2 */
    int vocab, max_rows;   /* of a call */
    sh_sampler *sampler;   /* borrowed; of this member */
    sh_timeline *timeline; /* waiting for others as slices; NULL: off */
} sh_vocabulary_options;

sh_status sh_vocabulary_create(const sh_vocabulary_options *o, sh_vocabulary **out);
void sh_vocabulary_destroy(sh_vocabulary **v);
/* Collective over the members, which have the same rows [n]. logits [n, own ids]; overwritten by bans. At member 0 the
 * sampler steps: made[i] tells whether token[i] is one. The other members leave token and made as they are. */
sh_status sh_vocabulary_sample(sh_vocabulary *v, const sh_sampler_row *rows, int n, float *logits, sh_token *token,
                               int *made);
double sh_vocabulary_seconds(const sh_vocabulary *v); /* waiting for others */

#endif
