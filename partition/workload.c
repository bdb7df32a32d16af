/* Histograms of lengths. See workload.h. */
#include "partition/workload.h"

#include <math.h>
#include <stdlib.h>

sh_workload sh_workload_default(void) {
    return (sh_workload){.bin = {{.prompt = 512, .output = 256, .requests = 1e6}}, .n = 1, .requests = 1e6};
}

/* Lengths within a factor of √2 share a bin. */
static int step_of(double tokens) {
    return (int)floor(2 * log2(tokens < 1 ? 1 : tokens));
}

static void join(sh_workload_bin *b, double prompt, double output, double requests) {
    double sum = b->requests + requests;
    b->prompt += (prompt - b->prompt) * requests / sum;
    b->output += (output - b->output) * requests / sum;
    b->requests = sum;
}

void sh_workload_add(sh_workload *w, double prompt, double output, double requests) {
    int best = -1;
    double nearest = INFINITY;
    if (!(requests > 0)) return;
    prompt = prompt < 1 ? 1 : prompt;
    output = output < 1 ? 1 : output;
    for (int i = 0; i < w->n; i++) {
        int dp = abs(step_of(w->bin[i].prompt) - step_of(prompt)),
            dd = abs(step_of(w->bin[i].output) - step_of(output));
        if (dp + dd < nearest) {
            nearest = dp + dd;
            best = i;
        }
    }
    w->requests += requests;
    if (best >= 0 && (nearest == 0 || w->n == SH_WORKLOAD_BINS))
        join(&w->bin[best], prompt, output, requests);
    else
        w->bin[w->n++] = (sh_workload_bin){.prompt = prompt, .output = output, .requests = requests};
}

static double sum(const sh_workload *w) {
    double n = 0;
    for (int i = 0; i < w->n; i++) n += w->bin[i].requests;
    return n;
}

sh_status sh_workload_check(sh_workload *w) {
    if (w->n < 1 || w->n > SH_WORKLOAD_BINS)
        SH_FAIL(SH_EINPUT, "workload: %d lengths: allowed are 1 to %d", w->n, SH_WORKLOAD_BINS);
    for (int i = 0; i < w->n; i++) {
        const sh_workload_bin *b = &w->bin[i];
        if (!(b->prompt >= 1 && b->prompt < 1e9) || !(b->output >= 1 && b->output < 1e9))
            SH_FAIL(SH_EINPUT, "workload: lengths[%d]: prompt %g, output %g: allowed are 1 to 10^9 tokens", i,
                    b->prompt, b->output);
        if (!(b->requests > 0 && b->requests < 1e15))
            SH_FAIL(SH_EINPUT, "workload: lengths[%d]: requests: %g: more than 0 are needed", i, b->requests);
    }
    double all = sum(w);
    if (!(w->requests > 0)) w->requests = all;
    if (!(w->requests < 1e15)) SH_FAIL(SH_EINPUT, "workload: requests: %g: fewer than 10^15 are allowed", w->requests);
    for (int i = 0; i < w->n; i++) w->bin[i].requests *= w->requests / all;
    return SH_OK;
}

double sh_workload_mean_prompt(const sh_workload *w) {
    double n = 0;
    for (int i = 0; i < w->n; i++) n += w->bin[i].requests * w->bin[i].prompt;
    return n / sum(w);
}

double sh_workload_mean_output(const sh_workload *w) {
    double n = 0;
    for (int i = 0; i < w->n; i++) n += w->bin[i].requests * w->bin[i].output;
    return n / sum(w);
}

double sh_workload_longest(const sh_workload *w) {
    double n = 0;
    for (int i = 0; i < w->n; i++)
        if (w->bin[i].prompt + w->bin[i].output > n) n = w->bin[i].prompt + w->bin[i].output;
    return n;
}
