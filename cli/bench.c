/* shoal bench: how fast this machine runs a model, beside what its cores can do at best. Drives the model by drive.c,
 * measures the limits by model/ceiling.h in turn with it, and prints a table or JSON. Compares nothing with other
 * machines and stores nothing. docs/performance.md tells how to read the numbers. */
#include <libgen.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "cli/commands.h"
#include "cli/drive.h"
#include "cli/options.h"
#include "cli/tracefile.h"
#include "common/clock.h"
#include "common/json.h"
#include "model/ceiling.h"
#include "partition/machine.h"
#include "worker/trace.h"

#define MAX_BATCHES 32
#define MAX_ROUNDS  99

static const char usage[] =
    "Usage: shoal bench [-m MODEL] [options]\n"
    "Times a model on this machine: one process, one rank, prompts and decode steps of random tokens, no\n"
    "coordinator. Every round runs a prompt, then decode steps at each batch size, and measures before each what\n"
    "the same cores can do at best; the median round is printed.\n\n"
    "  prefill        one prompt of --prompt tokens; as in a run, only its last token asks for logits\n"
    "  decode         one token for each of `batch` sequences that already hold such a prompt\n"
    "  tokens/s       prompt tokens, or decoded tokens of all sequences, per second\n"
    "  ms             milliseconds of the whole prompt, or of the median decode step\n"
    "  GFLOP/s        10^9 multiplications and additions per second that the model needs (what was skipped and\n"
    "                 what was computed for nothing is not counted)\n"
    "  % of FMA       share of the f32 multiply-add rate measured on the same threads\n"
    "  weights GB/s   10^9 bytes/s of weights that the steps had to read\n"
    "  % of read      share of the memory read bandwidth measured on the same threads\n"
    "  KV GB/s        10^9 bytes/s of keys and values attended to\n"
    "  time in %      by cause: matrix products with weights (and the norms and activations that make their\n"
    "                 rows), attention, experts, other (other norms, embeddings, choice of the token)\n\n";

typedef struct options {
    const char *model, *batches, *layers, *trace, *trace_steps;
    int mode, kv, threads, prompt, generate, chunk, rounds;
    bool json, no_limits;
} options;

/* One line of the table: a prompt (batch 0) or decode at a batch size; a value per round. */
typedef struct line {
    int batch;
    sh_drive_count count[MAX_ROUNDS];
    double ms[MAX_ROUNDS];
    double fma[MAX_ROUNDS], read[MAX_ROUNDS]; /* shares of the limits as measured just before */
} line;

typedef struct bench {
    options o;
    char path[PATH_MAX];
    sh_config config;
    sh_machine machine;
    int first, last, threads, rounds;
    sh_drive *drive;
    double load_seconds, first_token; /* seconds; the second from the start of loading to the end of the first prompt */
    double read[MAX_ROUNDS * (MAX_BATCHES + 1)],
        fma[MAX_ROUNDS * (MAX_BATCHES + 1)]; /* limits, as they were measured */
    int n_limits;
    line lines[MAX_BATCHES + 1];
    int n_lines;
    uint64_t trace_first, trace_steps;
    sh_timeline *timeline;
    sh_trace *trace;
    sh_tracefile *trace_file;
} bench;

/* --- what was asked for --------------------------------------------------------------------------------------------
 */

/* "1,8,32" */
static sh_status parse_batches(bench *b) {
    for (const char *p = b->o.batches;; p++) {
        char *end;
        long v = *p >= '0' && *p <= '9' ? strtol(p, &end, 10) : 0;
        if (v < 1 || v > SH_MAX_SEQS || (*end && *end != ',') || b->n_lines > MAX_BATCHES)
            SH_FAIL(SH_EINPUT, "--batch: '%s': up to %d numbers from 1 to %d are allowed, such as 1,8,32", b->o.batches,
                    MAX_BATCHES, SH_MAX_SEQS);
        b->lines[b->n_lines++].batch = (int)v;
        if (!*end) return SH_OK;
        p = end;
    }
}

/* "0:6": layers 0 to 5 */
static sh_status parse_layers(bench *b) {
    b->first = 0;
    b->last = b->config.n_layers;
    if (!b->o.layers) return SH_OK;
    int used = 0;
    int n = sscanf(b->o.layers, "%d:%d%n", &b->first, &b->last, &used);
    if (n != 2 || b->o.layers[used] || b->first < 0 || b->last <= b->first || b->last > b->config.n_layers)
        SH_FAIL(SH_EINPUT, "--layers: '%s': A:B with 0 ≤ A < B ≤ %d is allowed, such as 0:%d", b->o.layers,
                b->config.n_layers, b->config.n_layers);
    return SH_OK;
}

static sh_status check(bench *b) {
    sh_shared_options named = {.model = b->o.model, .mode_at = b->o.mode};
    SH_TRY(sh_options_model(&named, b->path, sizeof b->path));
    SH_TRY(sh_options_packed(&named, b->path));
    b->o.mode = (int)sh_options_mode(&named);
    SH_TRY(sh_config_load(b->path, &b->config));
    SH_TRY(parse_batches(b));
    SH_TRY(parse_layers(b));
    if (b->o.prompt + b->o.generate >= b->config.max_context)
        SH_FAIL(SH_EINPUT, "--prompt: %d tokens and %d more: the model's context is %d", b->o.prompt, b->o.generate,
                b->config.max_context);
    if (b->o.trace) SH_TRY(sh_trace_window(b->o.trace_steps, &b->trace_first, &b->trace_steps));
    if (b->o.trace) SH_TRY(sh_tracefile_check(b->o.trace));
    SH_TRY(sh_machine_read(NULL, &b->machine));
    b->threads = b->o.threads ? b->o.threads : b->machine.n_cpus;
    return SH_OK;
}

static sh_mode mode_of(const bench *b) {
    return (sh_mode)b->o.mode; /* the choices are in its order */
}

static sh_kv_type kv_of(const bench *b) {
    return b->o.kv < 0 ? sh_kv_type_of_mode(mode_of(b)) : (sh_kv_type)b->o.kv;
}

static sh_status load(bench *b) {
    sh_drive_options d = {.model_dir = b->path,
                          .config = &b->config,
                          .mode = mode_of(b),
                          .kv = kv_of(b),
                          .first = b->first,
                          .last = b->last,
                          .threads = b->threads,
                          .cpus = b->machine.cpus,
                          .n_cpus = b->machine.n_cpus,
                          .prompt = b->o.prompt,
                          .generate = b->o.generate,
                          .max_batch = 1,
                          .chunk = b->o.chunk};
    for (int i = 1; i < b->n_lines; i++)
        if (b->lines[i].batch > d.max_batch) d.max_batch = b->lines[i].batch;
    double t0 = sh_now();
    SH_TRY(sh_drive_create(&d, &b->drive));
    b->load_seconds = sh_now() - t0;
    return SH_OK;
}

/* --- the timeline ---------------------------------------------------------------------------------------------------
 */

#define TIMELINE_SLICES ((size_t)1 << 20) /* between two lines of the table; room that is not used costs nothing */

static sh_status trace_open(bench *b) {
    struct timespec now;
    if (!b->o.trace) return SH_OK;
    clock_gettime(CLOCK_REALTIME, &now);
    int64_t zero = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    sh_rank_clock clock = {.offset = zero - (int64_t)(sh_now() * 1e9)};
    SH_TRY(sh_timeline_create(TIMELINE_SLICES, b->trace_first, b->trace_steps, &b->timeline));
    SH_TRY(sh_trace_create(b->timeline, clock, &b->trace));
    SH_TRY(sh_tracefile_open(b->o.trace, zero, &b->trace_file));
    sh_drive_set_timeline(b->drive, b->timeline);
    return SH_OK;
}

/* A timeline that cannot be written takes nothing from the figures. */
static void trace_give_up(bench *b) {
    fprintf(stderr, "shoal bench: --trace: %s\n", sh_error_text());
    sh_tracefile_destroy(&b->trace_file);
}

/* Between two lines, so that it is not measured. */
static void trace_take(bench *b) {
    char host[128] = "";
    if (gethostname(host, sizeof host - 1) != 0) host[0] = 0;
    Shoal__TraceRecord r = SHOAL__TRACE_RECORD__INIT;
    r.group = (char *)"bench";
    r.host = host;
    r.width = 1;
    while (b->trace_file && (r.trace = sh_trace_next(b->trace)))
        if (sh_tracefile_add(b->trace_file, &r) != SH_OK) trace_give_up(b);
}

static void trace_close(bench *b, bool good) {
    sh_tracefile_count n;
    if (b->trace_file && good && sh_tracefile_close(&b->trace_file, &n) != SH_OK) trace_give_up(b);
    sh_tracefile_destroy(&b->trace_file);
    sh_trace_destroy(&b->trace);
    sh_timeline_destroy(&b->timeline);
}

/* --- measuring -----------------------------------------------------------------------------------------------------
 */

/* Seconds that a line's figures are about, and how many tokens and steps they cover. */
static double seconds_of(const line *l, const sh_drive_count *n) {
    return l->batch ? n->median * n->steps : n->seconds;
}

/* The limits first, each time: on a machine that is not ours alone they change from second to second. */
static sh_status line_run(bench *b, line *l, int r) {
    sh_ceiling lim = {0};
    size_t block = sh_machine_block(&b->machine, SH_CEILING_BLOCK);
    if (!b->o.no_limits) SH_TRY(sh_ceiling_measure(sh_model_team(sh_drive_model(b->drive)), block, &lim));
    b->read[b->n_limits] = lim.read_gbs;
    b->fma[b->n_limits++] = lim.fma_gflops;
    sh_drive_count *n = &l->count[r];
    if (l->batch)
        SH_TRY(sh_drive_decode(b->drive, l->batch, n));
    else
        SH_TRY(sh_drive_prefill(b->drive, n));
    double s = seconds_of(l, n);
    l->ms[r] = s * 1e3 / (l->batch ? n->steps : 1);
    if (b->o.no_limits) return SH_OK;
    l->fma[r] = n->flops / s * 1e-9 / lim.fma_gflops;
    l->read[r] = n->weight_bytes / s * 1e-9 / lim.read_gbs;
    return SH_OK;
}

static sh_status measure(bench *b) {
    sh_drive_count warm;
    SH_TRY(sh_drive_prefill(b->drive, &warm)); /* touches the scratch, and starts the threads */
    b->first_token = b->load_seconds + warm.seconds;
    for (int r = 0; r < b->rounds; r++)
        for (int i = 0; i < b->n_lines; i++) {
            SH_TRY(line_run(b, &b->lines[i], r));
            trace_take(b);
        }
    return SH_OK;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(const double *x, int n) {
    double sorted[MAX_ROUNDS * (MAX_BATCHES + 1)];
    memcpy(sorted, x, (size_t)n * sizeof *x);
    qsort(sorted, (size_t)n, sizeof *sorted, by_value);
    return n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
}

/* What is shown of a line: medians over the rounds. */
typedef struct summary {
    double tokens_per_s, ms, gflops, fma_share, weight_gbs, read_share, kv_gbs;
    double mean_ms, best_ms; /* over all steps of all rounds; of the best step (or prompt) */
    sh_model_times time;     /* shares */
} summary;

static summary summarize(const line *l, int rounds) {
    const sh_drive_count *n = &l->count[0]; /* tokens, steps and operations are the same in every round */
    int units = l->batch ? n->steps : 1;
    double ms = median(l->ms, rounds), s = ms * 1e-3 * units, all = 0, weights = 0, best = 1e30;
    summary x = {.tokens_per_s = n->tokens / s,
                 .ms = ms,
                 .gflops = n->flops / s * 1e-9,
                 .fma_share = median(l->fma, rounds),
                 .read_share = median(l->read, rounds),
                 .kv_gbs = n->kv_bytes / s * 1e-9};
    for (int r = 0; r < rounds; r++) {
        const sh_drive_count *c = &l->count[r];
        x.time.weights += c->times.weights / c->seconds / rounds;
        x.time.attention += c->times.attention / c->seconds / rounds;
        x.time.experts += c->times.experts / c->seconds / rounds;
        all += c->seconds;
        weights += c->weight_bytes / rounds;
        if (c->best < best) best = c->best;
    }
    x.weight_gbs = weights / s * 1e-9;
    x.time.other = 1 - x.time.weights - x.time.attention - x.time.experts;
    x.mean_ms = all * 1e3 / rounds / units;
    x.best_ms = best * 1e3;
    return x;
}

/* --- telling -------------------------------------------------------------------------------------------------------
 */

static void print_table(const bench *b) {
    sh_model *m = sh_drive_model(b->drive);
    double bytes = (double)sh_model_weight_bytes(m);
    char copy[PATH_MAX];
    snprintf(copy, sizeof copy, "%s", b->path);
    printf("%s (%s), layers %d to %d of %d, %s, KV in %s, %d thread%s, %s kernels\n", basename(copy), b->config.variant,
           b->first, b->last - 1, b->config.n_layers, sh_mode_name(mode_of(b)), sh_kv_type_name(kv_of(b)), b->threads,
           b->threads == 1 ? "" : "s", sh_model_kernels(m)->isa);
    printf("loaded %.2f GB of weights in %.1f s (%.2f GB/s); first token after %.1f s\n", bytes * 1e-9, b->load_seconds,
           bytes * 1e-9 / b->load_seconds, b->first_token);
    sh_load_times t = sh_model_load(m);
    printf("  the weights' part: %.1f s: %.2f GB of files, %.2f GB/s; reading %.1f s, packing %.1f s\n", t.seconds,
           (double)t.bytes * 1e-9, (double)t.bytes / t.seconds * 1e-9, t.reading, t.packing);
    if (b->o.no_limits)
        printf("limits not measured: shares of them are 0\n\n");
    else
        printf("limits of these threads: reading %.1f GB/s, f32 multiply-add %.0f GFLOP/s (medians of %d round%s)\n\n",
               median(b->read, b->n_limits), median(b->fma, b->n_limits), b->rounds, b->rounds == 1 ? "" : "s");
    printf("                                             %% of   weights  %% of      KV           time in %%\n");
    printf(
        "               tokens/s        ms  GFLOP/s    FMA      GB/s  read    GB/s  weights attention experts other\n");
    for (int i = 0; i < b->n_lines; i++) {
        const line *l = &b->lines[i];
        summary x = summarize(l, b->rounds);
        printf("%-8s%5d  %9.1f %9.2f %8.1f %6.1f ", l->batch ? "decode" : "prefill", l->batch ? l->batch : b->o.prompt,
               x.tokens_per_s, x.ms, x.gflops, 100 * x.fma_share);
        if (l->batch)
            printf("%9.1f %5.1f %7.2f", x.weight_gbs, 100 * x.read_share, x.kv_gbs);
        else
            printf("%9s %5s %7s", "-", "-", "-");
        printf("  %7.1f %9.1f %7.1f %5.1f\n", 100 * x.time.weights, 100 * x.time.attention, 100 * x.time.experts,
               100 * x.time.other);
    }
}

static json_t *line_json(const bench *b, const line *l) {
    summary x = summarize(l, b->rounds);
    json_t *j =
        json_pack("{s:i, s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:{s:f, s:f, s:f, s:f}}", "tokens", l->count[0].tokens,
                  "steps", l->count[0].steps, "tokens_per_s", x.tokens_per_s, l->batch ? "step_ms" : "ms", x.ms,
                  l->batch ? "mean_step_ms" : "mean_ms", x.mean_ms, l->batch ? "best_step_ms" : "best_ms", x.best_ms,
                  "gflops", x.gflops, "fma_share", x.fma_share, "time_share", "weights", x.time.weights, "attention",
                  x.time.attention, "experts", x.time.experts, "other", x.time.other);
    if (!j || !l->batch) return j;
    int bad = json_object_set_new(j, "batch", json_integer(l->batch));
    bad += json_object_set_new(j, "weight_gbs", json_real(x.weight_gbs));
    bad += json_object_set_new(j, "read_share", json_real(x.read_share));
    bad += json_object_set_new(j, "kv_gbs", json_real(x.kv_gbs));
    if (bad) sh_json_release(&j);
    return j;
}

static sh_status print_json(const bench *b) {
    sh_model *m = sh_drive_model(b->drive);
    SH_CLEANUP(sh_json_release)
    json_t *j =
        json_pack("{s:s, s:s, s:[i,i], s:s, s:s, s:i, s:s, s:i, s:i, s:i, s:{s:f, s:f, s:f}, s:{s:f, s:f}, s:o, s:[]}",
                  "model", b->path, "variant", b->config.variant, "layers", b->first, b->last, "mode",
                  sh_mode_name(mode_of(b)), "kv", sh_kv_type_name(kv_of(b)), "threads", b->threads, "isa",
                  sh_model_kernels(m)->isa, "prompt", b->o.prompt, "generate", b->o.generate, "rounds", b->rounds,
                  "load", "seconds", b->load_seconds, "first_token_seconds", b->first_token, "weight_bytes",
                  (double)sh_model_weight_bytes(m), "limits", "read_gbs", median(b->read, b->n_limits), "fma_gflops",
                  median(b->fma, b->n_limits), "prefill", line_json(b, &b->lines[0]), "decode");
    sh_load_times t = sh_model_load(m);
    json_t *l = json_pack("{s:f, s:f, s:f, s:f}", "seconds", t.seconds, "file_bytes", (double)t.bytes,
                          "reading_seconds", t.reading, "packing_seconds", t.packing);
    if (!j || json_object_set_new(json_object_get(j, "load"), "weights", l) != 0)
        SH_FAIL(SH_EMEMORY, "bench: no memory for the report");
    for (int i = 1; i < b->n_lines; i++)
        if (json_array_append_new(json_object_get(j, "decode"), line_json(b, &b->lines[i])) != 0)
            SH_FAIL(SH_EMEMORY, "bench: no memory for the report");
    if (json_dumpf(j, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(6)) != 0)
        SH_FAIL(SH_EIO, "standard output: cannot be written");
    putchar('\n');
    return SH_OK;
}

static int run(bench *b) {
    b->n_lines = 1; /* the prompt */
    if (check(b) != SH_OK) return sh_options_complain("bench", SH_EXIT_USAGE);
    sh_status st = load(b);
    if (st == SH_OK) st = trace_open(b);
    if (st == SH_OK) st = measure(b);
    trace_close(b, st == SH_OK);
    if (st == SH_OK && b->o.json)
        st = print_json(b);
    else if (st == SH_OK)
        print_table(b);
    sh_drive_destroy(&b->drive);
    return st == SH_OK ? SH_EXIT_OK : sh_options_complain("bench", SH_EXIT_RUN);
}

int sh_cmd_bench(int argc, char **argv) {
    options o = {.batches = "1,8,32",
                 .mode = -1,
                 .kv = -1,
                 .prompt = 512,
                 .generate = 128,
                 .chunk = 512,
                 .rounds = 3,
                 .trace_steps = "0:1000"};
    sh_option t[] = {
        {"model", 'm', SH_OPTION_TEXT, &o.model, "MODEL",
         "Hugging Face checkpoint folder of a Gemma 4 model; tokenizer files are not needed (default: the demo model)"},
        {"mode", 0, SH_OPTION_CHOICE, &o.mode, "MODE",
         "numeric mode: exact, bf16, q8 or q4 (default bf16, or the packed folder's)", .choices = sh_options_modes},
        {"kv", 0, SH_OPTION_CHOICE, &o.kv, "TYPE",
         "type of the KV cache: f32, bf16 or q8 (default f32 with exact, else bf16)", .choices = sh_options_kv_types},
        {"threads", 0, SH_OPTION_INT, &o.threads, "N", "compute threads (default: the cores of the CPU set)", 1, 1024},
        {"prompt", 0, SH_OPTION_INT, &o.prompt, "N", "tokens of the prompt (default 512)", 1, 1 << 20},
        {"generate", 0, SH_OPTION_INT, &o.generate, "N", "decode steps per round and batch size (default 128)", 1,
         1 << 20},
        {"batch", 0, SH_OPTION_TEXT, &o.batches, "LIST", "sequences decoded at once (default 1,8,32)"},
        {"chunk", 0, SH_OPTION_INT, &o.chunk, "N", "prompt tokens per step (default 512)", 1, SH_MAX_CHUNK},
        {"layers", 0, SH_OPTION_TEXT, &o.layers, "A:B",
         "only layers A to B-1, as a pipeline stage would hold them: for models larger than memory"},
        {"rounds", 0, SH_OPTION_INT, &o.rounds, "N", "rounds to take the median of (default 3)", 1, MAX_ROUNDS},
        {"no-limits", 0, SH_OPTION_FLAG, &o.no_limits,
         .help = "do not measure the limits, which takes a moment before every line and half a gigabyte"},
        {"trace", 0, SH_OPTION_TEXT, &o.trace, "FILE",
         "write a timeline of the steps, for Perfetto or chrome://tracing"},
        {"trace-steps", 0, SH_OPTION_TEXT, &o.trace_steps, "A:B", "with --trace: the steps A to B-1 (default 0:1000)"},
        {"json", 0, SH_OPTION_FLAG, &o.json, .help = "print one JSON object instead of the table"},
    };
    int operands = 0, rc = sh_options_begin("bench", usage, t, sizeof t / sizeof *t, argc, argv, &operands);
    if (rc >= 0) return rc;
    if (operands > 0) {
        fprintf(stderr, "shoal bench: '%s': no operands are allowed: give -m MODEL\n", argv[1]);
        return SH_EXIT_USAGE;
    }
    bench *b = calloc(1, sizeof *b);
    if (!b) {
        fprintf(stderr, "shoal bench: no memory\n");
        return SH_EXIT_RUN;
    }
    b->o = o;
    b->rounds = o.rounds;
    rc = run(b);
    free(b);
    return rc;
}
