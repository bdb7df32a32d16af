/* shoal serve: a coordinator that stays. Parses options and runs it. */
#include <limits.h>
#include <stdio.h>
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/planuse.h"
#include "cli/tracefile.h"
#include "common/log.h"
#include "coordinator/coordinator.h"

static const char usage[] =
    "Usage: shoal serve -m MODEL --listen ENDPOINT [--keys DIR] [--store DIR] [options]\n"
    "A coordinator that stays: takes jobs (shoal submit), keeps them on disk, gives the work to groups of\n"
    "'shoal worker' ranks that connect to it, and hands out results. Ends on SIGTERM or Ctrl-C; started again\n"
    "with the same store it goes on where it was. One group is started by, for example:\n\n"
    "  mpirun -n 4 --bind-to none shoal worker --connect ENDPOINT\n\n"
    "--replicas R says that R groups are expected: what is too long for those that are up waits until there are R.\n\n"
    "ENDPOINT is ipc:///PATH (this node; the socket's folder must be yours and closed to others: mode 700) or\n"
    "tcp://ADDRESS:PORT (needs --keys; tcp://*:5555 listens on all interfaces).\n\n";

typedef struct serve_options {
    sh_shared_options shared;
    const char *listen, *keys, *store;
    int orphan, ready_fd; /* orphan 0: not given */
    bool run;
    const char *trace_steps;
    uint64_t trace_first, trace_count;
} serve_options;

static int parse(int argc, char **argv, serve_options *s) {
    sh_option t[SH_OPTIONS_MAX];
    int n = sh_options_shared(&s->shared, t), operands = 0;
    t[n++] = (sh_option){.kind = SH_OPTION_NOTE, .help = "Service:"};
    t[n++] = (sh_option){"listen", 0, SH_OPTION_TEXT, &s->listen, "ENDPOINT", "where clients and ranks connect"};
    t[n++] =
        (sh_option){"keys", 0, SH_OPTION_TEXT, &s->keys, "DIR", "key folder made by 'shoal keygen'; needed for tcp"};
    t[n++] = (sh_option){"store", 0, SH_OPTION_TEXT, &s->store, "DIR", "where jobs are kept (default: shoal.store)"};
    t[n++] = (sh_option){"orphan-timeout",
                         0,
                         SH_OPTION_INT,
                         &s->orphan,
                         "SECONDS",
                         "ranks leave when they hear nothing for so long (default 600; with --run 120)",
                         1,
                         1000000};
    t[n++] = (sh_option){"ready-fd",
                         0,
                         SH_OPTION_INT,
                         &s->ready_fd,
                         "N",
                         "write the endpoint as a line to this descriptor once requests are accepted",
                         0,
                         1 << 20};
    t[n++] =
        (sh_option){"run",   0,    SH_OPTION_FLAG,
                    &s->run, NULL, "one job of 'shoal run': ends with it; ranks of an older epoch are told to leave"};
    t[n++] = (sh_option){"trace-steps",   0,     SH_OPTION_TEXT,
                         &s->trace_steps, "A:B", "with --run: keep a timeline of these micro-batches in the store"};
    int rc = sh_options_begin("serve", usage, t, n, argc, argv, &operands);
    if (rc >= 0) return rc;
    if (operands) {
        fprintf(stderr, "shoal serve: %s: takes no operands\n", argv[1]);
        return SH_EXIT_USAGE;
    }
    if (s->trace_steps && sh_trace_window(s->trace_steps, &s->trace_first, &s->trace_count) != SH_OK)
        return sh_options_complain("serve", SH_EXIT_USAGE);
    if (s->trace_steps && !s->run) {
        fprintf(stderr, "shoal serve: --trace-steps: goes with --run: 'shoal run --trace FILE' uses both\n");
        return SH_EXIT_USAGE;
    }
    if (!s->listen) {
        fprintf(stderr, "shoal serve: --listen: not given: allowed are ipc:///PATH and tcp://ADDRESS:PORT\n");
        return SH_EXIT_USAGE;
    }
    return -1;
}

/* What the caller can mend by typing something else is bad usage; the rest could not run. */
static int exit_status(sh_status st, bool run) {
    if (st == SH_OK) return SH_EXIT_OK;
    if (st == SH_ESTATE) return run ? SH_EXIT_SUPERSEDED : SH_EXIT_INTERRUPTED; /* a newer one goes on */
    return st == SH_EINPUT || st == SH_ELIMIT ? SH_EXIT_USAGE : SH_EXIT_RUN;
}

static sh_status load_plan(sh_shared_options *s, const char *model, Shoal__Plan **out) {
    static sh_config config; /* a large table */
    if (!s->plan) return sh_options_packed(s, model);
    SH_TRY(sh_config_load(model, &config));
    SH_TRY(sh_plan_use(s, &config, out));
    return sh_options_packed(s, model);
}

int sh_cmd_serve(int argc, char **argv) {
    serve_options s = {.store = "shoal.store", .ready_fd = -1};
    char model[PATH_MAX];
    int rc = parse(argc, argv, &s);
    if (rc >= 0) return rc;
    if (!s.orphan) s.orphan = s.run ? 120 : 600;
    sh_log_setup(SH_LOG_INFO, "serve");
    sh_status st = sh_options_model(&s.shared, model, sizeof model);
    if (st != SH_OK) return sh_options_complain("serve", SH_EXIT_RUN);
    Shoal__Plan *plan = NULL;
    st = load_plan(&s.shared, model, &plan);
    if (st != SH_OK) return sh_options_complain("serve", exit_status(st, s.run));
    const sh_shared_options *o = &s.shared;
    sh_coordinator_options c = {
        .model = model,
        .endpoint = s.listen,
        .keys = s.keys,
        .store = s.store,
        .run = s.run,
        .plan = plan,
        .cuts = o->cuts,
        .prefill_cuts = o->prefill_cuts,
        .pp = o->pp,
        .ep = o->ep,
        .tp = o->tp,
        .cp = o->cp,
        .tp_sum = o->tp_reduce_at == 1,
        .no_prefix_sharing = o->no_prefix_sharing,
        .share_weights = o->share_weights,
        .prefill = o->prefill,
        .mode = sh_options_mode(o),
        .kv = sh_options_kv(o),
        .threads = o->threads,
        .max_seqs = o->max_seqs,
        .chunk = o->chunk,
        .max_context = o->max_context,
        .kv_memory = o->kv_memory,
        .routing = o->routing,
        .replicate = o->replicate,
        .groups = o->replicas,
        .trace_first = s.trace_first,
        .trace_steps = s.trace_count,
        .orphan_ms = s.orphan > INT_MAX / 1000 ? INT_MAX : s.orphan * 1000,
        .intake = {.seed = o->seed,
                   .default_max_tokens = o->default_max_tokens,
                   .max_context = o->max_context,
                   .lenient = o->lenient},
    };
    st = sh_coordinator_run(&c, s.ready_fd);
    sh_plan_free(&plan);
    return st == SH_OK ? SH_EXIT_OK : sh_options_complain("serve", exit_status(st, s.run));
}
