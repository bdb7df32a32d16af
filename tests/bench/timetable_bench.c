/*
 * Writes the timetable (partition/simulate.h) of one layout of a model on a cluster, for tests/bench/replay.c. The
 * plan, its memory and its forecast are the planner's; what it predicts comes first, as comments "# name=value …".
 *
 *   timetable_bench -m MODEL --machine FILE [--workload FILE] [--groups G] [--pp S] [--ep W] [--seqs N] [--chunk N]
 *
 * MODEL needs config.json alone. Exit status 3: the layout does not fit, and why.
 */
#include <stdio.h>
#include <stdlib.h>
#include "cli/options.h"
#include "common/file.h"
#include "model/config.h"
#include "partition/search.h"
#include "partition/simulate.h"

typedef struct request {
    const char *model, *machine, *workload;
    int groups, pp, ep, seqs, chunk, per_node;
} request;

static sh_status read_cluster(const request *q, sh_cluster *out) {
    char *text = NULL;
    size_t len = 0;
    int ranks = q->groups * q->pp * q->ep;
    SH_TRY(sh_file_read(q->machine, 1 << 20, &text, &len));
    sh_status st = sh_cluster_read(q->machine, text, len, (ranks + q->per_node - 1) / q->per_node, out);
    free(text);
    return st;
}

static sh_status read_workload(const request *q, sh_workload *out) {
    char *text = NULL;
    size_t len = 0;
    *out = sh_workload_default();
    if (!q->workload) return SH_OK;
    SH_TRY(sh_file_read(q->workload, 1 << 20, &text, &len));
    sh_status st = sh_workload_read(q->workload, text, len, out);
    free(text);
    return st;
}

static sh_status predict(const sh_search_options *o, const sh_choice *x, sh_forecast_rank *rank, sh_buf *out) {
    sh_forecast f;
    SH_TRY(sh_search_forecast(o, x, &f, rank));
    double exchange = 0, idle = 0;
    for (int i = 0; i < x->ranks; i++) {
        exchange += rank[i].exchange / f.cycle.period / x->ranks;
        idle += rank[i].idle / f.cycle.period / x->ranks;
    }
    return sh_buf_printf(out,
                         "# tokens_per_second=%.6g period=%.6g exchange=%.6g idle=%.6g seqs=%.0f decode=%.6g "
                         "piece=%.6g mixed=%.6g in_flight=%.0f round_trip=%.6g bytes_per_token=%.6g kv_tokens=%d\n",
                         f.tokens_out, f.cycle.period, exchange, idle, f.seqs, f.mix.decode, f.mix.piece, f.mix.mixed,
                         f.mix.in_flight, f.cycle.round_trip, f.sent, x->kv.tokens);
}

static sh_status write_table(const request *q, const sh_config *c, sh_buf *out, const char **misfit) {
    static sh_choice x;
    sh_cluster cluster;
    sh_workload w;
    SH_TRY(read_cluster(q, &cluster));
    SH_TRY(read_workload(q, &w));
    sh_search_options o = {.config = c,
                           .cluster = &cluster,
                           .workload = &w,
                           .fixed = {.mode = SH_MODE_BF16, .kv = SH_KV_BF16, .max_seqs = q->seqs, .chunk = q->chunk},
                           .replicas = q->groups};
    x = (sh_choice){.way = q->ep > 1   ? SH_WAY_EXPERTS
                           : q->pp > 1 ? SH_WAY_STAGES
                                       : SH_WAY_ALONE,
                    .shape = {.pp = q->pp, .ep = q->ep, .tp = 1, .cp = 1, .width = q->ep},
                    .ranks = q->pp * q->ep,
                    .replicas = q->groups,
                    .ranks_per_node = q->per_node};
    SH_TRY(sh_search_try(&o, &x));
    if (!x.fits) {
        *misfit = x.why;
        return SH_OK;
    }
    sh_forecast_rank *rank = calloc((size_t)x.ranks, sizeof *rank);
    if (!rank) SH_FAIL(SH_EMEMORY, "no memory for %d ranks", x.ranks);
    sh_status st = predict(&o, &x, rank, out);
    free(rank);
    sh_cost_rates rates = sh_cluster_rates(&cluster, q->per_node);
    sh_cost_model m = {.config = c,
                       .plan = x.plan,
                       .rates = &rates,
                       .alike = true,
                       .net = {cluster.within, cluster.between, q->per_node}};
    const sh_forecast_mix *mix = &x.forecast.mix;
    if (st == SH_OK) st = sh_simulate_timetable(&m, mix, mix->requests * sh_workload_mean_output(&w), q->groups, out);
    sh_choice_release(&x);
    return st;
}

int main(int argc, char **argv) {
    static sh_config c;
    request q = {.groups = 1, .pp = 1, .ep = 1, .per_node = 1};
    sh_option t[SH_OPTIONS_MAX] = {
        {"model", 'm', SH_OPTION_TEXT, &q.model, .arg = "MODEL", .help = "folder with config.json"},
        {"machine", 0, SH_OPTION_TEXT, &q.machine, .arg = "FILE", .help = "description of the nodes"},
        {"workload", 0, SH_OPTION_TEXT, &q.workload, .arg = "FILE", .help = "lengths of requests"},
        {"groups", 0, SH_OPTION_INT, &q.groups, .arg = "G", .help = "replicas", .min = 1, .max = 4096},
        {"pp", 0, SH_OPTION_INT, &q.pp, .arg = "S", .help = "stages", .min = 1, .max = 512},
        {"ep", 0, SH_OPTION_INT, &q.ep, .arg = "W", .help = "members of a stage", .min = 1, .max = 1024},
        {"seqs", 0, SH_OPTION_INT, &q.seqs, .arg = "N", .help = "sequences of a group; 0: as is best", .max = 4096},
        {"chunk", 0, SH_OPTION_INT, &q.chunk, .arg = "N", .help = "prompt rows of a step", .max = 8192},
    };
    int operands = 0,
        rc = sh_options_begin("timetable_bench", "usage: timetable_bench -m MODEL --machine FILE [options]\n", t, 8,
                              argc, argv, &operands);
    if (rc >= 0) return rc;
    if (!q.model || !q.machine) {
        fprintf(stderr, "timetable_bench: -m and --machine are needed\n");
        return 2;
    }
    sh_buf out;
    const char *misfit = NULL;
    sh_buf_init(&out, 1 << 26);
    sh_status st = sh_config_load(q.model, &c);
    if (st == SH_OK) st = write_table(&q, &c, &out, &misfit);
    if (st != SH_OK) fprintf(stderr, "timetable_bench: %s\n", sh_error_text());
    if (misfit) fprintf(stderr, "timetable_bench: does not fit: %s\n", misfit);
    if (st == SH_OK && !misfit) fwrite(out.data, 1, out.len, stdout);
    sh_buf_release(&out);
    return st != SH_OK ? 1 : misfit ? 3 : 0;
}
