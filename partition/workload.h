/*
 * What a job asks for, as the planner sees it: lengths of prompts and outputs, and how many. A histogram; no text, no
 * tokens. Pure.
 */
#ifndef SH_PARTITION_WORKLOAD_H
#define SH_PARTITION_WORKLOAD_H

#include "common/status.h"

#define SH_WORKLOAD_BINS 64

typedef struct sh_workload_bin {
    double prompt, output; /* tokens: the mean of what is counted here; both ≥ 1 */
    double requests;       /* how many are like that; > 0 */
} sh_workload_bin;

typedef struct sh_workload {
    sh_workload_bin bin[SH_WORKLOAD_BINS];
    int n;           /* ≥ 1 */
    double requests; /* of the job: the bins' requests are shares of it */
} sh_workload;

/* A million requests of 512 prompt tokens and 256 output tokens: what is planned for when nothing is said. */
sh_workload sh_workload_default(void);
/* Adds requests of one length. Joins the bin of the same powers of √2; never fails for want of room. */
void sh_workload_add(sh_workload *w, double prompt, double output, double requests);
/* Scales the bins so that they add up to `requests`; refuses an empty or senseless histogram by name. */
sh_status sh_workload_check(sh_workload *w);
double sh_workload_mean_prompt(const sh_workload *w);
double sh_workload_mean_output(const sh_workload *w);
double sh_workload_longest(const sh_workload *w); /* prompt + output */

#endif
