/*
 * shoal run: one job, start to end. Checks what the user gave, opens the run's store, has a session answer every
 * request, writes OUTPUT and the closing table, and removes the store.
 *
 * It decides nothing about requests or tokens: those are the coordinator's and the ranks'. Whatever is killed, the same
 * command goes on from the store; what an interrupted run left is ended first (runstore).
 */
#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "cli/commands.h"
#include "cli/hosts.h"
#include "cli/input.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/planuse.h"
#include "cli/workfile.h"
#include "cli/predict.h"
#include "cli/probe.h"
#include "cli/session.h"
#include "cli/tracefile.h"
#include "common/clock.h"
#include "common/file.h"
#include "common/hash.h"
#include "common/log.h"
#include "partition/machine.h"
#include "partition/plan.h"
#include "partition/routing.h"

#define LONG_JOB 300.0 /* seconds of work, by the cost model */

static const char usage[] =
    "Usage: shoal run -m MODEL -i requests.jsonl -o results.jsonl [-n RANKS] [options]\n"
    "Answers a file of requests in OpenAI's batch format and writes one row for each line. Starts all that it needs "
    "on\n"
    "this machine, shows progress, and ends. Interrupted or killed at any moment, the same command goes on.\n\n"
    "  shoal run -i share/demo-batch.jsonl -o answers.jsonl -n 4      64 chats, the demo model, 4 ranks\n\n";

typedef struct run {
    sh_shared_options shared;
    const char *input, *output, *store, *hosts, *launcher, *routing, *trace, *trace_steps;
    bool ordered, keep_store, resume;
    int style;
    char model[PATH_MAX], model_name[320], program[PATH_MAX], store_path[PATH_MAX], spool[PATH_MAX];
    char fresh[PATH_MAX + 8]; /* a stream as read now; becomes the spool when the store is this job's */
    bool spooled;             /* the input is a stream: what is submitted is the spool */
    int replicas, ranks, cpus;
    uint64_t memory;
    const sh_config *config;
    sh_routing *placed;   /* counts by which experts are placed; NULL: in even shares */
    Shoal__Plan *planned; /* of each group; the coordinator makes the same */
    sh_buf slurm_hosts;   /* of the allocation, where `hosts` names them */
    sh_input scanned;
    sh_workguess *lengths; /* of its lines; NULL: nobody asks */
    sh_plan_tuning tuning; /* what the planner chose for it */
    sh_cluster cluster;    /* these nodes, once they were looked at … */
    bool looked, measured; /* … and whether their speed is known */
    sh_runstore folder;
    sh_progress progress;
    double began;
    int argc;
    char **argv; /* as typed, for the command to resume */
} run;

static int option_table(run *r, sh_option *t) {
    int n = 0;
    t[n++] = (sh_option){.kind = SH_OPTION_NOTE, .help = "Files:"};
    t[n++] = (sh_option){"input",   'i',    SH_OPTION_TEXT,
                         &r->input, "FILE", "requests, one JSON object a line; - is standard input"};
    t[n++] = (sh_option){"output",   'o',    SH_OPTION_TEXT,
                         &r->output, "FILE", "results; appears when complete; - is standard output"};
    t[n++] =
        (sh_option){"store", 0, SH_OPTION_TEXT, &r->store, "DIR", "folder that keeps the job (default: OUTPUT.store)"};
    t[n++] = (sh_option){"keep-store", 0, SH_OPTION_FLAG, &r->keep_store, NULL, "keep it after exit status 0 too"};
    t[n++] = (sh_option){
        "resume",   0,    SH_OPTION_FLAG,
        &r->resume, NULL, "only go on with a job: refuse to begin one (a store that exists is always taken up)"};
    t[n++] = (sh_option){"ordered", 0, SH_OPTION_FLAG, &r->ordered, NULL, "results in the order of the input"};
    t[n++] = (sh_option){"save-routing", 0,      SH_OPTION_TEXT,
                         &r->routing,    "FILE", "write how often each expert was chosen, for --routing"};
    t[n++] =
        (sh_option){"trace",   0,      SH_OPTION_TEXT,
                    &r->trace, "FILE", "write a timeline of micro-batches per rank, for Perfetto or chrome://tracing"};
    t[n++] =
        (sh_option){"trace-steps",   0,     SH_OPTION_TEXT,
                    &r->trace_steps, "A:B", "with --trace: the micro-batches A to B-1 of each rank (default 0:200)"};
    t[n++] = (sh_option){"progress",
                         0,
                         SH_OPTION_CHOICE,
                         &r->style,
                         "STYLE",
                         "auto, bar, plain, json or none, on standard error (default auto)",
                         .choices = sh_progress_styles};
    n += sh_options_shared(&r->shared, t + n);
    t[n++] = (sh_option){.kind = SH_OPTION_NOTE, .help = "Starting ranks:"};
    t[n++] =
        (sh_option){"hosts",
                    0,
                    SH_OPTION_TEXT,
                    &r->hosts,
                    "LIST",
                    "hosts for mpirun, such as node1,node2:2; ranks then connect over TCP, with keys made for the run"};
    t[n++] = (sh_option){"launcher",
                         0,
                         SH_OPTION_TEXT,
                         &r->launcher,
                         "CMD",
                         "local: all ranks are threads of one process; else a command that starts $SHOAL_RANKS ranks "
                         "of the command line put behind it (default: mpirun; local for one rank)"};
    return n;
}

/* The command as typed, quoted for a shell. */
static void print_command(const run *r, FILE *to) {
    fprintf(to, "  shoal run");
    for (int i = 1; i < r->argc; i++) {
        bool plain = *r->argv[i] &&
                     strspn(r->argv[i], "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=.,:/@%") ==
                         strlen(r->argv[i]);
        fputc(' ', to);
        if (plain) {
            fputs(r->argv[i], to);
            continue;
        }
        fputc('\'', to);
        for (const char *p = r->argv[i]; *p; p++) fputs(*p == '\'' ? "'\\''" : (char[]){*p, 0}, to);
        fputc('\'', to);
    }
    fputc('\n', to);
}

/* Started once per task by mpirun or srun, every task would start a job of its own. */
static sh_status refuse_tasks(void) {
    static const char *const sizes[] = {"OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE"};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const char *v = getenv(sizes[i]);
        if (v && atoi(v) > 1)
            SH_FAIL(SH_EINPUT,
                    "was started as one of %d tasks (%s): start it once, without mpirun or srun; it starts its ranks "
                    "itself "
                    "with -n %d",
                    atoi(v), sizes[i], atoi(v));
    }
    return SH_OK;
}

/* Results on standard output have no name to keep the job beside: the same command in the same folder finds the same
 * store. */
static void name_by_command(const run *r, char *to, size_t size) {
    char here[PATH_MAX];
    uint64_t h = getcwd(here, sizeof here) ? sh_hash64(0, here, strlen(here)) : 0;
    for (int i = 0; i < r->argc; i++) h = sh_hash64(h, r->argv[i], strlen(r->argv[i]) + 1);
    const char *tmp = getenv("TMPDIR");
    snprintf(to, size, "%s/shoal-run-%016llx", tmp && *tmp ? tmp : "/tmp", (unsigned long long)h);
}

/* A store that was named here lies where everybody may write: nobody else's folder is taken for it. */
static sh_status check_own(const run *r) {
    struct stat sb;
    if (r->store || strcmp(r->output, "-") != 0 || lstat(r->store_path, &sb) != 0) return SH_OK;
    if (!S_ISDIR(sb.st_mode) || sb.st_uid != geteuid() || (sb.st_mode & 022))
        SH_FAIL(SH_EINPUT, "%s: is not a folder of your own that is closed to others: name one with --store",
                r->store_path);
    return SH_OK;
}

static sh_status check_output(run *r) {
    if (!r->output) SH_FAIL(SH_EINPUT, "-o: is missing: give the file for the results, or - for standard output");
    bool standard = strcmp(r->output, "-") == 0;
    char named[PATH_MAX];
    if (standard && !r->store) name_by_command(r, named, sizeof named);
    const char *base = r->store ? r->store : standard ? named : r->output;
    int n = snprintf(r->store_path, sizeof r->store_path, "%s%s", base, r->store ? "" : ".store");
    if (n >= (int)sizeof r->store_path - 16) SH_FAIL(SH_EINPUT, "-o: %.80s…: path too long", r->output);
    snprintf(r->spool, sizeof r->spool, "%.*s/" SH_RUN_SPOOL, PATH_MAX - 16, r->store_path);
    snprintf(r->fresh, sizeof r->fresh, "%s.new", r->spool);
    bool store_there = sh_file_exists(r->store_path);
    if (r->resume && !store_there) SH_FAIL(SH_EINPUT, "--resume: there is no %s to go on from", r->store_path);
    if (standard) return SH_OK;
    struct stat out, in;
    char folder[PATH_MAX];
    snprintf(folder, sizeof folder, "%s", r->output);
    if (stat(r->output, &out) == 0) {
        if (S_ISDIR(out.st_mode)) SH_FAIL(SH_EINPUT, "-o: %s: is a folder: give a file", r->output);
        if (stat(r->input, &in) == 0 && in.st_dev == out.st_dev && in.st_ino == out.st_ino)
            SH_FAIL(SH_EINPUT, "-o: %s: is the input: give another file", r->output);
        if (!store_there)
            SH_FAIL(SH_EINPUT, "-o: %s: exists already and has no %s to go on from: remove it or give another file",
                    r->output, r->store_path);
    }
    if (access(dirname(folder), W_OK | X_OK) != 0)
        SH_FAIL(SH_EINPUT, "-o: %s: its folder cannot be written: %s", r->output, strerror(errno));
    return SH_OK;
}

/* The coordinator makes the same plan; what is wrong with it is better said before anything is started. */
static sh_status check_plan(run *r, const sh_config *config) {
    sh_plan_request q;
    if (r->routing && config->experts == 0) SH_FAIL(SH_EINPUT, "--save-routing: the model has no experts to count");
    if (r->planned) return SH_OK; /* read and checked already */
    sh_options_plan(&r->shared, r->ranks, &q);
    q.routing = r->placed;
    return sh_plan_make(config, &q, &r->planned);
}

/* Inside an allocation of several nodes the groups are on all of them; mpirun knows the first component of a job of
 * several. */
static sh_status take_allocation(run *r) {
    const char *nodes = getenv("SLURM_JOB_NODELIST"), *n = getenv("SLURM_JOB_NUM_NODES"),
               *components = getenv("SLURM_HET_SIZE");
    if (r->launcher || !nodes) return SH_OK;
    if (r->hosts) return getenv("OMPI_MCA_ras") ? SH_OK : sh_hosts_within(r->hosts, nodes); /* ras: who tells mpirun */
    if (components && atoi(components) > 1)
        sh_progress_say(&r->progress, "note",
                        "a job of %d components (SLURM_HET_SIZE): the nodes of the first are used, %s, and no others",
                        atoi(components), nodes);
    if (!n || atoi(n) < 2) return SH_OK;
    sh_buf_init(&r->slurm_hosts, 0);
    SH_TRY(sh_hosts_expand(nodes, &r->slurm_hosts));
    r->hosts = (const char *)r->slurm_hosts.data;
    return SH_OK;
}

/* One rank for each NUMA node, on each node of an allocation (taken to be like this one); less where groups share a
 * node. */
static sh_status choose_ranks(run *r, int numa, int most) {
    int part = 0, parts = r->replicas;
    sh_buf list;
    sh_buf_init(&list, 0);
    sh_status st = r->hosts ? sh_hosts_divide(r->hosts, 0, r->replicas, &list, &part, &parts) : SH_OK;
    int nodes = r->slurm_hosts.len ? sh_hosts_count((const char *)list.data) : 1;
    sh_buf_release(&list);
    r->ranks = numa > parts ? numa / parts : 1;
    r->ranks = r->ranks > most / nodes ? most : r->ranks * nodes;
    return st;
}

/* The lengths of the job's own requests, as far as they can be told without the tokenizer. */
static void guess_workload(const run *r, sh_workload *w) {
    if (sh_workguess_end(r->lengths, r->scanned.lines, w) != SH_OK || w->n == 0) {
        *w = sh_workload_default(); /* every line may be wrong: rows will say so */
        w->requests = w->bin[0].requests = (double)r->scanned.lines;
    }
}

/* Nodes that the job is on, taken to be like this one; 0: somebody else decides. */
static int nodes_of(const run *r) {
    if (r->launcher) return sh_launch_is_mpi(r->launcher, r->hosts, r->ranks) ? 0 : 1;
    return sh_hosts_count(r->hosts);
}

static sh_status look_at_machine(run *r, sh_probe_how how) {
    if (r->looked && how == SH_PROBE_CACHED) return SH_OK;
    SH_TRY(sh_probe_cluster(how, nodes_of(r), &r->cluster, &r->measured));
    r->looked = true;
    return SH_OK;
}

/* Where nothing is said and there is a choice: what the planner takes, with what is known of this machine's speed. */
static sh_status choose_plan(run *r, const sh_machine *machine, const sh_workload *w) {
    bool chosen = false;
    if (r->launcher || (r->hosts && !r->slurm_hosts.len)) return SH_OK; /* somebody else's choice */
    if (nodes_of(r) * machine->n_numa < 2) return SH_OK;
    SH_TRY(look_at_machine(r, SH_PROBE_CACHED));
    return sh_plan_choose(&r->shared, r->config, &r->cluster, w, &r->tuning, &chosen);
}

static sh_status tune(const run *r, const sh_workload *w, sh_plan_tuning *out) {
    return sh_plan_tune(&r->shared, r->config, &r->cluster, w, r->placed, r->ranks, r->replicas, out);
}

/* Sequences at once, rows of a chunk and cuts, where they are not given and the planner did not choose them with the
 * ranks: by the cost model, which is worth some seconds of measuring for a job that takes minutes. Without measured
 * speeds they stay the usual ones. */
static sh_status choose_details(run *r, const sh_workload *w) {
    sh_plan_tuning t;
    if (nodes_of(r) < 1 || r->tuning.max_seqs) return SH_OK;
    SH_TRY(look_at_machine(r, SH_PROBE_CACHED));
    SH_TRY(tune(r, w, &t));
    if (!r->measured && t.seconds > LONG_JOB) {
        sh_progress_say(&r->progress, "note", "measuring the speed of this machine, once");
        SH_TRY(look_at_machine(r, SH_PROBE_MEASURE));
        SH_TRY(tune(r, w, &t));
    }
    if (!r->measured) return SH_OK;
    r->tuning = t;
    sh_plan_take(&r->shared, &r->tuning);
    return SH_OK;
}

static sh_status load_routing(run *r) {
    sh_status st = r->shared.routing ? sh_routing_load(r->shared.routing, r->config, &r->placed) : SH_OK;
    return st == SH_OK ? st : sh_error_prefix(st, "--routing");
}

static sh_status check_ranks(run *r) {
    static sh_config config; /* a large table */
    SH_TRY(sh_config_load(r->model, &config));
    r->config = &config;
    SH_TRY(sh_plan_use(&r->shared, &config, &r->planned));
    SH_TRY(sh_options_packed(&r->shared, r->model));
    static sh_machine machine;
    SH_TRY(sh_machine_read(NULL, &machine));
    r->cpus = machine.n_cpus;
    r->memory = machine.memory;
    SH_TRY(take_allocation(r));
    sh_workload w = sh_workload_default();
    if (r->lengths) guess_workload(r, &w);
    SH_TRY(choose_plan(r, &machine, &w));
    r->ranks = sh_options_ranks(&r->shared);
    r->replicas = r->shared.replicas ? r->shared.replicas : 1;
    if (!r->ranks) SH_TRY(choose_ranks(r, machine.n_numa, config.n_layers));
    SH_TRY(load_routing(r));
    SH_TRY(choose_details(r, &w));
    SH_TRY(check_plan(r, &config));
    char copy[PATH_MAX];
    snprintf(copy, sizeof copy, "%s", r->model);
    snprintf(r->model_name, sizeof r->model_name, "%.240s (%s, %d layers)", basename(copy), config.variant,
             config.n_layers);
    return SH_OK;
}

/* What decides the rows, as text: a store made for other values is not taken up. */
static sh_status describe_job(const run *r, json_t **out) {
    char input[64], context[16], tokens[16], seed[24];
    snprintf(input, sizeof input, "%llu bytes, hash %016llx", (unsigned long long)r->scanned.bytes,
             (unsigned long long)r->scanned.hash);
    snprintf(context, sizeof context, "%d", r->shared.max_context);
    snprintf(tokens, sizeof tokens, "%d", r->shared.default_max_tokens);
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)r->shared.seed);
    json_t *j = json_pack("{s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s}", "model", r->model, "--mode",
                          sh_mode_name(sh_options_mode(&r->shared)), "--kv", sh_kv_type_name(sh_options_kv(&r->shared)),
                          "--max-context", context, "--default-max-tokens", tokens, "--seed", seed, "--lenient",
                          r->shared.lenient ? "yes" : "no", "input", input);
    if (!j) SH_FAIL(SH_EINPUT, "%s: not a path that can be written down", r->model);
    *out = j;
    return SH_OK;
}

static bool is_same_file(const char *a, const char *b) {
    struct stat x, y;
    if (strcmp(a, b) == 0) return true;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

static sh_status check_trace(run *r) {
    uint64_t first, steps;
    if (r->trace_steps && !r->trace) SH_FAIL(SH_EINPUT, "--trace-steps: goes with --trace FILE");
    if (!r->trace) return SH_OK;
    if (!r->trace_steps) r->trace_steps = "0:200";
    SH_TRY(sh_trace_window(r->trace_steps, &first, &steps));
    if (is_same_file(r->trace, r->output) || is_same_file(r->trace, r->input))
        SH_FAIL(SH_EINPUT, "--trace: %s: is the input or the output: give another file", r->trace);
    return sh_tracefile_check(r->trace);
}

static sh_status check_all(run *r) {
    SH_TRY(refuse_tasks());
    if (!r->input) SH_FAIL(SH_EINPUT, "-i: is missing: give a file of requests, or - for standard input");
    SH_TRY(check_output(r));
    SH_TRY(check_trace(r));
    r->spooled = sh_input_is_stream(r->input);
    if (!sh_file_exists(r->store_path) && r->spooled) SH_TRY(sh_dir_make(r->store_path));
    SH_TRY(check_own(r));
    if (r->shared.plan) return sh_input_scan(r->input, r->fresh, NULL, &r->scanned);
    SH_TRY(sh_workguess_create(r->shared.default_max_tokens, &r->lengths));
    const sh_input_reader reader = sh_workguess_reader(r->lengths);
    return sh_input_scan(r->input, r->fresh, &reader, &r->scanned);
}

static int complain(const run *r, sh_status st) {
    (void)r;
    const char *env = getenv("SHOAL_LOG");
    if (env && strcmp(env, "debug") == 0) fprintf(stderr, "%s\n", sh_error_trail());
    return sh_options_complain("run", st == SH_EINPUT || st == SH_EUNSUPPORTED ? SH_EXIT_USAGE : SH_EXIT_RUN);
}

/* Removes what was read of a stream, and the folder made for it unless there is a job in it. */
static void drop_stream(const run *r) {
    if (!r->spooled) return;
    SH_IGNORE(sh_path_remove(r->fresh));
    (void)rmdir(r->store_path);
}

static int answer_nothing(run *r) {
    sh_progress_warn(&r->progress, "-i: %s: is empty: nothing to answer", r->input);
    drop_stream(r);
    if (strcmp(r->output, "-") == 0) return SH_EXIT_OK;
    sh_status st = sh_file_write(r->output, "", 0);
    return st == SH_OK ? SH_EXIT_OK : complain(r, st);
}

/* s NULL: before anything began. */
static int say_interrupted(run *r, sh_session *s) {
    uint64_t total = 0, done = s ? sh_session_done(s, &total) : 0;
    sh_progress_end(&r->progress);
    fprintf(stderr, "shoal run: interrupted: %llu of %llu requests are answered and kept in %s. To go on:\n",
            (unsigned long long)done, (unsigned long long)(total ? total : r->scanned.lines), r->store_path);
    print_command(r, stderr);
    return SH_EXIT_INTERRUPTED;
}

/* What the planner would have said of these tokens; nothing where it cannot say. */
static void predict(const run *r, sh_closing *c, sh_prediction *p) {
    double share = c->tokens_out > 0 ? (double)c->tokens_out_now / (double)c->tokens_out : 1; /* of this run */
    sh_predict_options o = {.config = r->config,
                            .plan = r->planned,
                            .replicas = r->replicas,
                            .nodes = sh_hosts_count(r->hosts),
                            .tokens_in = (double)c->tokens_in_now,
                            .tokens_out = (double)c->tokens_out_now};
    for (int i = 0; i < c->outcomes->n; i++)
        if (c->outcomes->status[i] == 200) o.requests += share * (double)c->outcomes->rows[i];
    if (sh_predict_run(&o, p) == SH_OK) c->predicted = p;
}

static void print_closing(run *r, sh_session *s, const sh_outcomes *outcomes) {
    sh_closing c = {.output = r->output,
                    .outcomes = outcomes,
                    .wall = sh_now() - r->began,
                    .ep = r->planned ? sh_plan_shape_of(r->planned).ep : r->shared.ep};
    if (r->progress.style == SH_PROGRESS_NONE) return;
    sh_session_closing(s, &c);
    sh_prediction prediction = {0};
    predict(r, &c, &prediction);
    sh_buf text;
    sh_buf_init(&text, 0);
    if (sh_closing_text(&c, r->progress.style == SH_PROGRESS_JSON, &text) == SH_OK) {
        sh_progress_end(&r->progress);
        fwrite(text.data, 1, text.len, stderr);
    }
    sh_prediction_release(&prediction);
    sh_buf_release(&text);
}

/* However the run ends: what there is may tell why. Its failure is no failure of the run. */
static void write_trace(run *r) {
    sh_tracefile_count n;
    char dropped[64] = "";
    if (!r->trace) return;
    if (sh_tracefile_of_store(r->store_path, r->trace, &n) != SH_OK) {
        sh_progress_warn(&r->progress, "--trace: %s", sh_error_text());
        return;
    }
    if (n.dropped) snprintf(dropped, sizeof dropped, "; %llu were dropped", (unsigned long long)n.dropped);
    sh_progress_say(&r->progress, "trace", "%s: %llu slices of %llu steps on %d rank%s (micro-batches %s of each)%s",
                    r->trace, (unsigned long long)n.slices, (unsigned long long)n.steps, n.ranks,
                    n.ranks == 1 ? "" : "s", r->trace_steps, dropped);
}

/* With the store open: drives the session to its end, whatever that is. */
static int answer(run *r, sh_session *s, bool *complete) {
    sh_outcomes outcomes = {0};
    sh_status st = sh_session_drive(s);
    bool finished = st == SH_OK;
    if (finished) st = sh_session_collect(s, r->output, &outcomes);
    if (finished && st == SH_OK && r->routing) st = sh_session_save_routing(s, r->routing);
    char reason[1024];
    snprintf(reason, sizeof reason, "%s", sh_error_text());
    sh_session_stop(s, finished && st == SH_OK);
    sh_progress_end(&r->progress);
    write_trace(r);
    if (st == SH_ECANCELLED) return say_interrupted(r, s);
    if (st == SH_ESTATE) { /* no failure that another start could mend: the newer run does the job */
        fprintf(stderr, "shoal run: %s\n", reason);
        return SH_EXIT_USAGE;
    }
    if (st != SH_OK) {
        uint64_t total, done = sh_session_done(s, &total);
        fprintf(stderr, "shoal run: %s\n", reason);
        if (sh_session_input_is_wrong(s)) return SH_EXIT_USAGE;
        if (done)
            fprintf(stderr, "shoal run: %llu of %llu requests are answered and kept in %s; the same command goes on.\n",
                    (unsigned long long)done, (unsigned long long)total, r->store_path);
        return SH_EXIT_RUN;
    }
    print_closing(r, s, &outcomes);
    *complete = true;
    for (int i = 0; i < outcomes.n; i++)
        if (outcomes.status[i] != 200) return SH_EXIT_ROWS;
    return SH_EXIT_OK;
}

static int run_with_store(run *r) {
    sh_session *s = NULL;
    if (r->folder.existed)
        sh_progress_say(&r->progress, "resume", "going on from %s%s", r->store_path,
                        r->folder.ended ? ", after ending what an interrupted run left" : "");
    sh_session_options so = {.program = r->program,
                             .model = r->model,
                             .input = r->spooled ? r->spool : r->input,
                             .lines = r->scanned.lines,
                             .shared = &r->shared,
                             .store = &r->folder,
                             .ordered = r->ordered,
                             .reports = r->progress.style != SH_PROGRESS_NONE || r->routing || r->trace,
                             .trace_steps = r->trace ? r->trace_steps : NULL,
                             .replicas = r->replicas,
                             .ranks = r->ranks,
                             .cpus = r->cpus,
                             .memory = r->memory,
                             .launcher = r->launcher,
                             .hosts = r->hosts,
                             .progress = &r->progress,
                             .model_name = r->model_name,
                             .plan = r->planned,
                             .interrupted = &sh_interrupted};
    bool complete = false;
    sh_status st = sh_session_create(&so, &s);
    int rc = st == SH_OK ? answer(r, s, &complete) : complain(r, st);
    sh_session_destroy(&s);
    st = sh_runstore_close(&r->folder, complete && rc == SH_EXIT_OK && !r->keep_store);
    if (st != SH_OK) sh_progress_warn(&r->progress, "%s", sh_error_text());
    return rc;
}

static int run_job(run *r) {
    SH_CLEANUP(sh_json_release) json_t *job = NULL;
    sh_status st = check_all(r);
    if (st != SH_OK) {
        int rc = st == SH_ECANCELLED ? say_interrupted(r, NULL) : complain(r, st);
        if (r->store_path[0]) drop_stream(r);
        return rc;
    }
    if (r->scanned.lines == 0) return answer_nothing(r);
    st = sh_options_model(&r->shared, r->model, sizeof r->model);
    if (st != SH_OK) return sh_options_complain("run", SH_EXIT_RUN);
    st = check_ranks(r);
    if (st == SH_OK) st = describe_job(r, &job);
    ssize_t n = readlink("/proc/self/exe", r->program, sizeof r->program - 1);
    if (st == SH_OK && n <= 0) st = sh_error_set(SH_EIO, __FILE__, __LINE__, "/proc/self/exe: %s", strerror(errno));
    if (st == SH_OK)
        st = sh_runstore_open(r->store_path, job, sh_launch_is_mpi(r->launcher, r->hosts, r->ranks), &r->folder);
    if (st == SH_OK) st = check_own(r);
    if (st == SH_OK && strcmp(r->output, "-") != 0) st = sh_file_writer_sweep(r->output);
    if (st == SH_OK && r->spooled && rename(r->fresh, r->spool) != 0)
        st = sh_error_set(SH_EIO, __FILE__, __LINE__, "%s: cannot be renamed: %s", r->fresh, strerror(errno));
    if (st == SH_OK) return run_with_store(r);
    int rc = complain(r, st);
    drop_stream(r);
    return rc;
}

int sh_cmd_run(int argc, char **argv) {
    run r = {.began = sh_now(), .argc = argc};
    char **typed = calloc((size_t)argc + 1, sizeof *typed);
    if (!typed) return SH_EXIT_RUN;
    memcpy(typed, argv, (size_t)argc * sizeof *typed);
    r.argv = typed;
    sh_option t[SH_OPTIONS_MAX];
    int n = option_table(&r, t), operands = 0;
    int rc = sh_options_begin("run", usage, t, n, argc, argv, &operands);
    if (rc < 0 && operands) {
        fprintf(stderr, "shoal run: '%s': takes no operands: the input is given with -i\n", argv[1]);
        rc = SH_EXIT_USAGE;
    }
    if (rc < 0) {
        sh_interrupt_catch();
        signal(SIGPIPE, SIG_IGN);
        sh_progress_begin(&r.progress, (sh_progress_style)r.style);
        r.progress.awaits_start = true;
        rc = run_job(&r);
    }
    sh_buf_release(&r.slurm_hosts);
    sh_workguess_destroy(&r.lengths);
    sh_plan_free(&r.planned);
    sh_routing_destroy(&r.placed);
    free(typed);
    return rc;
}
