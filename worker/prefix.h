/*
 * Pages that sequences share because their tokens begin alike (docs/decisions/0031-prefix-sharing.md): a tree of the
 * full pages that sequences have filled, found by their tokens. A node is one global page, numbered as that page; where
 * it is still known it also has the sliding page of the same positions. Whoever comes with the same tokens holds the
 * pages too and begins behind them, at a border whose window of sliding pages is there.
 *
 * A page that nobody holds stays in the tree until somebody needs the room: it counts as open, and sh_prefix_take
 * forgets the one unused for longest. What only one sequence ever used goes before what several did, and sliding pages
 * that no border is known to need before those of prompt ends and of places where prompts part.
 *
 * Part of the leader, and as pure: no I/O, no clock; it allocates when it is made and never after. Stages know nothing
 * of it: pages are recorded when the micro-batch that fills them is made, found when later ones are, and never written
 * again. Of no use where members share positions out or a prefill pipeline makes prompts: then there is none.
 */
#ifndef SH_WORKER_PREFIX_H
#define SH_WORKER_PREFIX_H

#include "worker/leader.h"

typedef struct sh_prefix sh_prefix;

/* Whether sequences of such a group can share pages. */
bool sh_prefix_is_for(const sh_leader_options *o);
/* pool [SH_KV_KINDS] is borrowed; its sliding one is made such that each holder pays. */
sh_status sh_prefix_create(const sh_leader_options *o, sh_pages *pool, sh_prefix **out);
void sh_prefix_destroy(sh_prefix **p);

/* As sh_pages_take and _give, for all pages of both pools. */
int32_t sh_prefix_take(sh_prefix *p, sh_kv_kind kind, bool promised);
sh_status sh_prefix_give(sh_prefix *p, sh_kv_kind kind, int32_t page);

/* Puts into the tree what s has filled since: pages below s->pos, whose rows are in micro-batches that were made. Where
 * the tree has the page already, s holds that one from now on and gives its own back. Ends for good at a page with a
 * placeholder of an image or of sound: its ids do not say what is in it. */
sh_status sh_prefix_record(sh_prefix *p, sh_seq *s);
/* Pages at the start of s that the tree has, and of those the most that s could begin behind (0: no more than it has):
 * its last known token is a row in any case, and so is every one whose logits are wanted. */
int32_t sh_prefix_known(sh_prefix *p, sh_seq *s);
int32_t sh_prefix_find(sh_prefix *p, sh_seq *s);
/* Open pages of the global pool that s takes with it when it holds the first `border` pages of the tree. */
int32_t sh_prefix_idle(const sh_prefix *p, const sh_seq *s, int32_t border);
/* s, which has no promises, holds the first `border` pages (as found just now) and goes on behind them. */
sh_status sh_prefix_attach(sh_prefix *p, sh_seq *s, int32_t border);
/* Whether `other`, which has rows in the micro-batch that is being made, fills the very page that s needs next. */
bool sh_prefix_awaits(const sh_prefix *p, const sh_seq *s, const sh_seq *other);

/* Rows of prompts that were not computed since their pages were there. */
uint64_t sh_prefix_rows(const sh_prefix *p);
/* Checks the books (tests). */
sh_status sh_prefix_audit(const sh_prefix *p);

#endif
