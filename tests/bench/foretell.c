/*
 * foretell MODEL key=value …: what the cost model says of one plan and one workload of equal requests, as one JSON
 * object, for tests/bench/predicted.py. Keys: ranks pp ep tp cp seqs chunk sum (0 or 1), requests prompt output, fma
 * read (multiply-adds and bytes per second), sample (seconds per row and entry of the vocabulary), layer (seconds),
 * latency bandwidth (seconds, bytes per second) of the links between nodes, per_node (ranks). Every rank alike.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "partition/forecast.h"

static int n_args;
static char **args;

static double value(const char *key, double without) {
    size_t n = strlen(key);
    for (int i = 0; i < n_args; i++)
        if (strncmp(args[i], key, n) == 0 && args[i][n] == '=') return strtod(args[i] + n + 1, NULL);
    return without;
}

static int whole(const char *key) {
    return (int)value(key, 0);
}

static sh_status foretell(const char *model) {
    static sh_config c;
    Shoal__Plan *plan = NULL;
    sh_forecast f;
    SH_TRY(sh_config_load(model, &c));
    const sh_plan_request q = {.ranks = whole("ranks"),
                               .pp = whole("pp"),
                               .ep = whole("ep"),
                               .tp = whole("tp"),
                               .cp = whole("cp"),
                               .tp_sum = whole("sum"),
                               .mode = SH_MODE_BF16,
                               .kv = SH_KV_BF16,
                               .max_seqs = whole("seqs"),
                               .chunk = whole("chunk")};
    SH_TRY(sh_plan_make(&c, &q, &plan));
    const sh_cost_rates rates = {.read = value("read", 1e9),
                                 .fma = 2 * value("fma", 1e9),
                                 .weights_read = 1,
                                 .weights_fma = value("fma_share", 1),
                                 .attention_read = 1,
                                 .attention_fma = 1,
                                 .layer = value("layer", 0),
                                 .sample = value("sample", 0)};
    const sh_cost_link far = {.latency = value("latency", 0), .bandwidth = value("bandwidth", 1e9)};
    const sh_cost_link near = {.latency = 1e-5, .bandwidth = 5e9};
    const sh_cost_model m = {.config = &c,
                             .plan = plan,
                             .rates = &rates,
                             .alike = true,
                             .net = {.within = near, .between = far, .ranks_per_node = (int)value("per_node", 1)}};
    sh_workload w = {0};
    sh_workload_add(&w, value("prompt", 32), value("output", 16), value("requests", 256));
    w.requests = value("requests", 256);
    SH_TRY(sh_workload_check(&w));
    sh_forecast_rank *rank = calloc(plan->n_rank, sizeof *rank);
    if (!rank) SH_FAIL(SH_EMEMORY, "no memory");
    SH_TRY(sh_cost_forecast(&m, &w, plan->max_seqs, 1, &f, rank));
    printf("{\"tokens_out\": %.6g, \"seconds\": %.6g, \"seqs\": %g, \"period\": %.6g, \"step_decode\": %.6g, "
           "\"step_mixed\": %.6g, \"mixed\": %.4f, \"rank\": [",
           f.tokens_out, f.seconds, f.seqs, f.cycle.period, f.step_decode, f.step_mixed, f.mix.mixed);
    for (size_t i = 0; i < plan->n_rank; i++) {
        const sh_forecast_rank *r = &rank[i];
        printf("%s{\"weights\": %.6g, \"attention\": %.6g, \"experts\": %.6g, \"other\": %.6g, \"exchange\": %.6g, "
               "\"idle\": %.6g, \"overlapped\": %.6g, \"sent\": %.6g}",
               i ? ", " : "", r->seconds[0], r->seconds[1], r->seconds[2], r->seconds[3], r->exchange, r->idle,
               r->overlapped, r->sent[0] + r->sent[1] + r->sent[2] + r->sent[3] + r->sent[4]);
    }
    printf("]}\n");
    free(rank);
    sh_plan_free(&plan);
    return SH_OK;
}

int main(int argc, char **argv) {
    n_args = argc - 2;
    args = argv + 2;
    if (argc >= 2 && foretell(argv[1]) == SH_OK) return 0;
    fprintf(stderr, "%s\n", argc < 2 ? "usage: foretell MODEL key=value …" : sh_error_text());
    return 2;
}
