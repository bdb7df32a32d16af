/*
 * What the planner's cost model says of a run that has ended, for its closing table: seconds by cause for each rank of
 * a group, for the tokens that there were. Measures nothing: takes the speeds that 'shoal plan' measured earlier, or
 * assumed ones, and says which.
 */
#ifndef SH_CLI_PREDICT_H
#define SH_CLI_PREDICT_H

#include "partition/forecast.h"

typedef struct sh_prediction {
    sh_forecast_rank *rank; /* [ranks] seconds of the whole run */
    int ranks;
    double seconds; /* of the run */
    bool assumed;
    char from[160]; /* where the speeds come from */
} sh_prediction;

typedef struct sh_predict_options {
    const sh_config *config;
    const Shoal__Plan *plan;
    int replicas, nodes;
    double requests, tokens_in, tokens_out;
} sh_predict_options;

sh_status sh_predict_run(const sh_predict_options *o, sh_prediction *out);
void sh_prediction_release(sh_prediction *p);

#endif
