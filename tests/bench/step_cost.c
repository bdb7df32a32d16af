/*
 * What the cost model says of steps of one rank that has a whole model, for tests/bench/cost.py: decode steps of so
 * many sequences behind so many tokens each, or the reading of a prompt in chunks. As `shoal bench` measures them:
 * without leader and sampler.
 *
 * usage: step_cost MODEL MACHINE.json MODE KV decode:BATCH:CONTEXT | prompt:CHUNK:TOKENS …
 * Prints one JSON object a line: ms, the same by cause, GB of weights outside of experts, and experts that a layer of a
 * step touches.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "common/file.h"
#include "partition/cluster.h"
#include "partition/cost.h"

enum { FILE_MOST = 1 << 20 };

#define TRY(expr)                                                                                                      \
    do {                                                                                                               \
        if ((expr) != SH_OK) {                                                                                         \
            fprintf(stderr, "step_cost: %s\n", sh_error_text());                                                       \
            return 1;                                                                                                  \
        }                                                                                                              \
    } while (0)

static sh_config config;
static sh_cluster cluster;

static sh_status load(char **arg, Shoal__Plan **plan) {
    char *text = NULL;
    size_t len = 0;
    sh_plan_request q = {.ranks = 1, .max_context = 1 << 20};
    SH_TRY(sh_config_load(arg[0], &config));
    SH_TRY(sh_file_read(arg[1], FILE_MOST, &text, &len));
    sh_status st = sh_cluster_read(arg[1], text, len, 1, &cluster);
    free(text);
    SH_TRY(st);
    SH_TRY(sh_mode_parse(arg[2], &q.mode));
    SH_TRY(sh_kv_type_parse(arg[3], &q.kv));
    if (q.max_context > config.max_context) q.max_context = config.max_context;
    return sh_plan_make(&config, &q, plan);
}

typedef struct sum {
    double seconds, part[SH_CAUSES], dense, touched;
    int layers;
} sum;

/* One step of these rows. */
static sh_status add_step(const sh_cost_model *m, const sh_cost_span *span, sum *to) {
    sh_cost_rank r = {0};
    SH_TRY(sh_cost_step(m, span, 1, &r));
    to->seconds += r.seconds;
    for (int i = 0; i < SH_CAUSES; i++) to->part[i] += r.part[i].seconds;
    to->dense += r.part[SH_CAUSE_WEIGHTS].bytes;
    for (int l = 0; l < config.n_layers; l++) {
        sh_cost_layer y = {0};
        if (!config.layer[l].moe) continue;
        SH_TRY(sh_cost_layer_of(m, 0, l, span, 1, &y));
        to->touched += y.experts_touched;
        to->layers++;
    }
    return SH_OK;
}

static sh_status cost(const sh_cost_model *m, const char *what, sum *to) {
    int rows = 0, tokens = 0;
    if (sscanf(what, "decode:%d:%d", &rows, &tokens) == 2 && rows > 0 && tokens > 0)
        return add_step(m, &(sh_cost_span){.seqs = rows, .rows = 1, .kept = 1, .lo = tokens, .hi = tokens}, to);
    if (sscanf(what, "prompt:%d:%d", &rows, &tokens) != 2 || rows < 1 || tokens < 1)
        SH_FAIL(SH_EINPUT, "%s: allowed are decode:BATCH:CONTEXT and prompt:CHUNK:TOKENS", what);
    for (int at = 0; at < tokens; at += rows) {
        int n = tokens - at < rows ? tokens - at : rows;
        SH_TRY(add_step(m, &(sh_cost_span){.seqs = 1, .rows = n, .kept = at + n == tokens, .lo = at, .hi = at}, to));
    }
    return SH_OK;
}

int main(int argc, char **argv) {
    Shoal__Plan *plan = NULL;
    if (argc < 6) {
        fprintf(stderr, "usage: step_cost MODEL MACHINE.json MODE KV decode:BATCH:CONTEXT | prompt:CHUNK:TOKENS ...\n");
        return 2;
    }
    TRY(load(argv + 1, &plan));
    sh_cost_rates rates = sh_cluster_rates(&cluster, 1);
    rates.sample = 0;
    const sh_cost_model m = {.config = &config, .plan = plan, .rates = &rates, .alike = true, .net.ranks_per_node = 1};
    for (int i = 5; i < argc; i++) {
        sum s = {0};
        TRY(cost(&m, argv[i], &s));
        printf("{\"what\": \"%s\", \"ms\": %.6g, \"weights\": %.6g, \"attention\": %.6g, \"experts\": %.6g, \"other\": "
               "%.6g, "
               "\"dense_gb\": %.6g, \"touched\": %.6g}\n",
               argv[i], s.seconds * 1e3, s.part[SH_CAUSE_WEIGHTS] * 1e3, s.part[SH_CAUSE_ATTENTION] * 1e3,
               s.part[SH_CAUSE_EXPERTS] * 1e3, s.part[SH_CAUSE_OTHER] * 1e3, s.dense * 1e-9,
               s.layers ? s.touched / s.layers : 0);
    }
    sh_plan_free(&plan);
    return 0;
}
