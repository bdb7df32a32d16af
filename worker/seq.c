/* Making and freeing sequences. Their pages are the leader's business. See seq.h. */
#include "worker/seq.h"

#include <stdlib.h>
#include <string.h>

static sh_status check_ids(const int32_t *ids, size_t n, int vocab, const char *what) {
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab)
            SH_FAIL(SH_EINPUT, "%s: token %zu is %d: the vocabulary has ids 0 to %d", what, i, ids[i], vocab - 1);
    return SH_OK;
}

sh_status sh_seq_create(uint64_t key, const int32_t *prompt, size_t n_prompt, const int32_t *generated,
                        size_t n_generated, const sh_sampling *sampling, int scored, int vocab, sh_seq **out) {
    const size_t most = (size_t)1 << 29; /* the sum of two is an int32_t, with pages to spare */
    if (n_prompt < 1 || n_prompt > most) SH_FAIL(SH_EINPUT, "prompt: %zu tokens: 1 or more are allowed", n_prompt);
    if (sampling->max_tokens < 1 || (size_t)sampling->max_tokens > most)
        SH_FAIL(SH_EINPUT, "max_tokens: %d: 1 or more are allowed", sampling->max_tokens);
    if (n_generated >= (size_t)sampling->max_tokens)
        SH_FAIL(SH_EINPUT, "generated: %zu tokens are there already: max_tokens is %d", n_generated,
                sampling->max_tokens);
    if (scored < 0 || (size_t)scored >= n_prompt)
        SH_FAIL(SH_EINPUT, "scored: %d: the prompt has %zu tokens", scored, n_prompt);
    SH_TRY(check_ids(prompt, n_prompt, vocab, "prompt"));
    SH_TRY(check_ids(generated, n_generated, vocab, "generated"));
    sh_seq *s = calloc(1, sizeof *s);
    size_t cap = n_prompt + (size_t)sampling->max_tokens;
    if (s) s->tokens = malloc(cap * sizeof *s->tokens);
    if (!s || !s->tokens) {
        sh_seq_destroy(&s);
        SH_FAIL(SH_EMEMORY, "no memory for a sequence of %zu tokens", cap);
    }
    memcpy(s->tokens, prompt, n_prompt * sizeof *prompt);
    if (n_generated) memcpy(s->tokens + n_prompt, generated, n_generated * sizeof *generated);
    s->key = key;
    s->sampling = *sampling;
    s->n_prompt = (int32_t)n_prompt;
    s->n_tokens = (int32_t)(n_prompt + n_generated);
    s->cap = (int32_t)cap;
    s->scored = scored;
    *out = s;
    return SH_OK;
}

void sh_seq_destroy(sh_seq **s) {
    if (!*s) return;
    for (int k = 0; k < (*s)->n_pools; k++) free((*s)->kv[k].page);
    for (int k = 0; k < SH_KV_KINDS; k++) free((*s)->made[k].page);
    free((*s)->kv);
    free((*s)->tokens);
    free(*s);
    *s = NULL;
}
