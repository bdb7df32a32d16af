/*
 * Plans in words: what each rank holds and does, what limits it, why the others lost, what a better machine would
 * bring. Text for people, appended to a buffer; decides nothing.
 */
#ifndef SH_PARTITION_EXPLAIN_H
#define SH_PARTITION_EXPLAIN_H

#include "partition/search.h"

/* "2 groups of 4 ranks: pipeline of 2 stages × 2 ranks that divide sequences and experts" */
sh_status sh_explain_shape(const sh_choice *x, sh_buf *out);
/* Tables of ranks (memory, then time of an average micro-batch), traffic, speed. */
sh_status sh_explain_plan(const sh_search_options *o, const sh_choice *x, sh_buf *out);
/* The best few, and of every way why it lost. */
sh_status sh_explain_search(const sh_search_options *o, sh_search *s, sh_buf *out);
/* The same plan with more bandwidth, arithmetic, faster links; then a new search with more memory and more nodes. */
sh_status sh_explain_better(const sh_search_options *o, const sh_choice *x, sh_buf *out);
/* In one sentence what costs a plan most. */
sh_status sh_explain_limit(const sh_search_options *o, const sh_choice *x, char *text, size_t size);
/* "3.2 hours", "41 s", "12 days" */
void sh_explain_time(double seconds, char *text, size_t size);

/* Fills plan->replicas, ->model and ->forecast: what is written to a file. */
sh_status sh_explain_annotate(const sh_search_options *o, const char *workload, sh_choice *x);
/* Whether a plan from a file was made for this model; names the field that differs. Plans without a model pass. */
sh_status sh_plan_check_model(const sh_config *c, const Shoal__Plan *p);
/* Reads a plan from JSON, checks it against the model. Freed by sh_plan_free. */
sh_status sh_plan_read(const char *what, const char *text, size_t len, const sh_config *c, Shoal__Plan **out);

#endif
