/*
 * What a group has produced and the coordinator has not yet acknowledged: tokens and scores by the coordinator's key,
 * kept until `done`, so that a coordinator that comes back hears everything again. Makes the Tokens messages. Pure: no
 * I/O.
 */
#ifndef SH_WORKER_LEDGER_H
#define SH_WORKER_LEDGER_H

#include <stdbool.h>
#include "common/buf.h"
#include "model/sampling.h"

typedef struct sh_ledger sh_ledger;
sh_status sh_ledger_create(sh_ledger **out);
void sh_ledger_destroy(sh_ledger **l);
/* A sequence begins: its first token here has place `offset`, its first score place scored + 1. logprobs:
 * log-probabilities were asked for. A key that is known already fails. */
sh_status sh_ledger_open(sh_ledger *l, uint64_t key, int32_t offset, int32_t scored, bool logprobs);
bool sh_ledger_knows(const sh_ledger *l, uint64_t key);
/* Keeps one token or score; of an unknown key (cancelled meanwhile): nothing happens. */
sh_status sh_ledger_add(sh_ledger *l, uint64_t key, const sh_token *t);
void sh_ledger_forget(sh_ledger *l, uint64_t key); /* done or cancelled */
/* Everything kept (of one key) counts as unsent again. */
void sh_ledger_rewind(sh_ledger *l);
void sh_ledger_rewind_key(sh_ledger *l, uint64_t key);
/* One packed FromRank with up to max unsent tokens, which then count as sent; an empty `out` when there are none. */
sh_status sh_ledger_pack(sh_ledger *l, int max, sh_buf *out);

#endif
