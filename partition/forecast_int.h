/* What the two forecasts share: of plans whose stages read prompts themselves, and of those where other ranks do.
 * Private to forecast.c and prefill_forecast.c. */
#ifndef SH_PARTITION_FORECAST_INT_H
#define SH_PARTITION_FORECAST_INT_H

#include "partition/forecast.h"

/* Decode rows of each length in proportion to the tokens that requests of it put out, but the first `first` of them. */
void sh_forecast_add_decode(sh_forecast_mix *x, const sh_workload *w, double first);
/* Rows of a micro-batch that a usual row of a prompt travels with: those of its prompt but the last `less`, at most a
 * chunk. */
double sh_forecast_usual_piece(const sh_workload *w, double less, double chunk);
/* Adds a share of what a micro-batch costs. */
void sh_forecast_add_rank(const sh_cost_rank *c, double share, sh_forecast_rank *r);
/* Tokens by which the last sequences outlast full ranks. In a long job they are anywhere in their lives when the queue
 * is empty, in one that runs all at once at the beginning. seqs: at once, all replicas. */
double sh_forecast_tail(const sh_workload *w, double seqs);
/* sh_cost_forecast for plans with ranks that only read prompts. */
sh_status sh_forecast_with_prefill(const sh_cost_model *m, const sh_workload *w, double seqs, double replicas,
                                   sh_forecast *out, sh_forecast_rank *rank);

#endif
