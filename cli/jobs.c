/* shoal submit, status, watch, results, cancel: a client of a coordinator that stays. Asks and prints; the protocol is
 * in proto/client.c. */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "cli/collect.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "common/clock.h"
#include "proto/client.h"

#define POLL_SECONDS  0.5
#define PATIENT_TRIES 120 /* × the time-out: how long a watch outlives a coordinator that restarts */

#define CONNECTION                                                                                                     \
    "ENDPOINT is what 'shoal serve --listen' was given: ipc:///PATH or tcp://HOST:PORT (with --keys DIR).\n"           \
    "JOB is the number that 'shoal submit' printed, or the job's name.\n\n"

typedef struct asking {
    const char *command, *connect, *keys;
    int timeout; /* seconds */
    const char *output;
    bool ordered;
    int style; /* sh_progress_style */
    sh_client *client;
} asking;

static int add_connection(asking *a, sh_option *t) {
    int n = 0;
    t[n++] = (sh_option){"connect", 0, SH_OPTION_TEXT, &a->connect, "ENDPOINT", "the coordinator"};
    t[n++] = (sh_option){"keys",   0,     SH_OPTION_TEXT,
                         &a->keys, "DIR", "folder with client.key, client.pub and server.pub; needed for tcp"};
    t[n++] = (sh_option){
        "timeout", 0, SH_OPTION_INT, &a->timeout, "SECONDS", "how long to wait for an answer (default 10)", 1, 86400};
    return n;
}

static int add_output(asking *a, sh_option *t) {
    t[0] = (sh_option){"output", 'o', SH_OPTION_TEXT, &a->output, "FILE", "results; - is standard output"};
    t[1] = (sh_option){"ordered", 0, SH_OPTION_FLAG, &a->ordered, NULL, "results in input order"};
    return 2;
}

static sh_option progress_option(asking *a) {
    return (sh_option){"progress",
                       0,
                       SH_OPTION_CHOICE,
                       &a->style,
                       "STYLE",
                       "auto, bar, plain, json or none, on standard error (default auto)",
                       .choices = sh_progress_styles};
}

static int usage_error(const asking *a, const char *text) {
    fprintf(stderr, "shoal %s: %s ('shoal %s --help' explains)\n", a->command, text, a->command);
    return SH_EXIT_USAGE;
}

static int complain(const asking *a, sh_status st) {
    return sh_options_complain(a->command, st == SH_EINPUT || st == SH_ELIMIT ? SH_EXIT_USAGE : SH_EXIT_RUN);
}

/* Parses; operands must be between least and most. −1: go on, with an open client. */
static int begin(asking *a, const char *usage, sh_option *t, int n, int argc, char **argv, int least, int most,
                 int *operands) {
    int rc = sh_options_begin(a->command, usage, t, n, argc, argv, operands);
    if (rc >= 0) return rc;
    if (*operands < least) return usage_error(a, "which JOB?");
    if (*operands > most) return usage_error(a, most ? "one JOB at a time" : "takes no operands");
    if (!a->connect) return usage_error(a, "--connect: not given: allowed are ipc:///PATH and tcp://HOST:PORT");
    sh_status st = sh_client_open(a->connect, a->keys, a->timeout * 1000, &a->client);
    return st == SH_OK ? -1 : complain(a, st);
}

static sh_status ask_status(asking *a, uint64_t job, Shoal__JobReply **reply) {
    Shoal__Request which = SHOAL__REQUEST__INIT;
    which.has_job = job != 0;
    which.job = job;
    Shoal__JobRequest q = SHOAL__JOB_REQUEST__INIT;
    q.status = &which;
    return sh_client_call(a->client, &q, reply);
}

/* A number, or the name of a job. */
static sh_status find_job(asking *a, const char *text, uint64_t *job) {
    char *end;
    errno = 0;
    unsigned long long number = strtoull(text, &end, 10);
    if (*text >= '0' && *text <= '9' && !*end && !errno && number > 0) {
        *job = number;
        return SH_OK;
    }
    Shoal__JobReply *r = NULL;
    SH_TRY(ask_status(a, 0, &r));
    uint64_t found = 0;
    for (size_t i = 0; i < r->n_counts && !found; i++)
        if (strcmp(r->counts[i]->name, text) == 0) found = r->counts[i]->job;
    shoal__job_reply__free_unpacked(r, NULL);
    if (!found) SH_FAIL(SH_EINPUT, "JOB: '%s' is neither a number nor the name of a job there", text);
    *job = found;
    return SH_OK;
}

/* --- following a job -----------------------------------------------------------------------------------------------
 */

static void show(sh_progress *p, const Shoal__JobReply *r) {
    const Shoal__JobCounts *c = r->counts[0];
    sh_progress_view v = {c->total,
                          c->done,
                          c->errors,
                          c->tokens_in,
                          c->tokens_out,
                          .tokens_shared = sh_closing_shared(r),
                          .state = "no group yet"};
    for (size_t i = 0; i < r->n_group; i++) {
        if (strcmp(r->group[i]->state, "lost") == 0) continue;
        v.ranks += r->group[i]->ranks;
        v.ranks_up += r->group[i]->ranks_up;
        if (strcmp(r->group[i]->state, "loading") == 0) sh_progress_add_load(&v, r->group[i]);
        v.state = strcmp(r->group[i]->state, "ready") == 0 ? "running" : "loading";
    }
    for (size_t i = 0; i < r->n_warning; i++) sh_progress_warn(p, "%s", r->warning[i]);
    sh_progress_update(p, &v, false);
}

static bool is_over(const Shoal__JobCounts *c) {
    if (strcmp(c->state, "cancelled") == 0) return c->done == c->total;
    return strcmp(c->state, "done") == 0 || strcmp(c->state, "failed") == 0;
}

/* A coordinator that restarts is waited for; one that was never heard is not. */
static sh_status ask_patiently(asking *a, bool heard, uint64_t job, Shoal__JobReply **reply) {
    sh_status st = SH_EPEER;
    for (int i = 0; i < (heard ? PATIENT_TRIES : 1) && st == SH_EPEER; i++) {
        if (!a->client) st = sh_client_open(a->connect, a->keys, a->timeout * 1000, &a->client);
        if (a->client) st = ask_status(a, job, reply);
        if (st == SH_EPEER) sh_client_close(&a->client); /* a late answer must not be taken for the next one */
    }
    return st;
}

/* Exit status of a job that is over. */
static int outcome(const asking *a, const Shoal__JobCounts *c) {
    if (strcmp(c->state, "failed") == 0) {
        fprintf(stderr, "shoal %s: job %s failed: %s\n", a->command, c->name,
                c->failure ? c->failure : "no reason is known");
        return SH_EXIT_RUN;
    }
    return c->errors ? SH_EXIT_ROWS : SH_EXIT_OK;
}

static int watch(asking *a, uint64_t job) {
    sh_progress p;
    sh_progress_begin(&p, (sh_progress_style)a->style);
    for (bool heard = false;; heard = true) {
        Shoal__JobReply *r = NULL;
        sh_status st = ask_patiently(a, heard, job, &r);
        if (st != SH_OK) {
            sh_progress_end(&p);
            return complain(a, st);
        }
        show(&p, r);
        bool over = is_over(r->counts[0]);
        if (over) sh_progress_end(&p);
        int rc = over ? outcome(a, r->counts[0]) : 0;
        shoal__job_reply__free_unpacked(r, NULL);
        if (over) return rc;
        sh_sleep(POLL_SECONDS);
    }
}

static int collect(asking *a, uint64_t job) {
    char spool[PATH_MAX];
    sh_outcomes outcomes = {0};
    const char *tmp = getenv("TMPDIR");
    if (strcmp(a->output, "-") != 0)
        snprintf(spool, sizeof spool, "%s.spool.%d", a->output, (int)getpid());
    else
        snprintf(spool, sizeof spool, "%s/shoal.spool.%d", tmp ? tmp : "/tmp", (int)getpid());
    sh_status st = sh_collect(a->client, job, a->output, a->ordered, spool, &outcomes);
    return st == SH_OK ? SH_EXIT_OK : complain(a, st);
}

static int end(asking *a, int rc) {
    sh_client_close(&a->client);
    return rc;
}

/* --- submit --------------------------------------------------------------------------------------------------------
 */

static const char submit_usage[] =
    "Usage: shoal submit --connect ENDPOINT -i requests.jsonl [--name NAME] [--wait [-o results.jsonl]]\n"
    "Gives a file of requests (OpenAI batch format, one JSON object a line) to a coordinator and prints the job's\n"
    "number once all lines are on its disk. Submitting the same file under the same --name goes on with that job:\n"
    "so an interrupted submit is simply repeated. With --wait, follows the job to its end; with -o, writes the\n"
    "results as well.\n\n" CONNECTION;

typedef struct submission {
    const char *input, *name;
    uint64_t seed;
    int default_max_tokens;
    bool lenient, wait;
} submission;

static sh_status send_file(asking *a, const submission *s, FILE *f, const char *name, uint64_t *job) {
    Shoal__JobOptions o = SHOAL__JOB_OPTIONS__INIT;
    o.has_seed = s->seed != UINT64_MAX;
    o.seed = s->seed;
    o.has_default_max_tokens = s->default_max_tokens > 0;
    o.default_max_tokens = s->default_max_tokens;
    o.has_lenient = s->lenient;
    o.lenient = s->lenient;
    o.has_ordered = o.ordered = a->ordered;
    return sh_client_submit(a->client, name, &o, f, job);
}

static int submit(asking *a, const submission *s) {
    bool from_stdin = strcmp(s->input, "-") == 0;
    FILE *f = from_stdin ? stdin : fopen(s->input, "r");
    struct stat sb;
    if (!f || fstat(fileno(f), &sb) != 0 || S_ISDIR(sb.st_mode)) {
        fprintf(stderr, "shoal submit: -i: %s: %s\n", s->input, f ? "is a directory" : strerror(errno));
        if (f && !from_stdin) fclose(f);
        return SH_EXIT_USAGE;
    }
    char made[300];
    const char *base = strrchr(s->input, '/');
    snprintf(made, sizeof made, "%.200s-%lld-%d",
             from_stdin ? "stdin"
             : base     ? base + 1
                        : s->input,
             (long long)time(NULL), (int)getpid());
    const char *name = s->name ? s->name : made;
    uint64_t job = 0;
    sh_status st = send_file(a, s, f, name, &job);
    if (!from_stdin) fclose(f);
    if (st != SH_OK) {
        int rc = complain(a, st);
        if (st == SH_EPEER && !from_stdin)
            fprintf(stderr, "To go on: shoal submit --connect %s -i %s --name '%s'\n", a->connect, s->input, name);
        return rc;
    }
    bool mixed = a->output && strcmp(a->output, "-") == 0; /* standard output is for the results then */
    fprintf(mixed ? stderr : stdout, "%" PRIu64 "\n", job);
    fflush(stdout);
    if (!s->wait) return SH_EXIT_OK;
    int rc = watch(a, job);
    if (!a->output || rc > SH_EXIT_ROWS) return rc;
    int wrote = collect(a, job);
    return wrote ? wrote : rc;
}

int sh_cmd_submit(int argc, char **argv) {
    asking a = {.command = "submit", .timeout = 10};
    submission s = {.seed = UINT64_MAX};
    sh_option t[SH_OPTIONS_MAX];
    int n = add_connection(&a, t), operands = 0;
    t[n++] = (sh_option){"input", 'i', SH_OPTION_TEXT, &s.input, "FILE", "requests; - is standard input"};
    t[n++] = (sh_option){"name", 0, SH_OPTION_TEXT, &s.name, "NAME", "of the job (default: made up)"};
    t[n++] = (sh_option){"wait", 0, SH_OPTION_FLAG, &s.wait, NULL, "until all requests are answered"};
    n += add_output(&a, t + n);
    t[n++] = progress_option(&a);
    t[n++] =
        (sh_option){"seed", 0, SH_OPTION_U64, &s.seed, "N", "for requests without a seed (default: the coordinator's)"};
    t[n++] = (sh_option){"default-max-tokens",
                         0,
                         SH_OPTION_INT,
                         &s.default_max_tokens,
                         "N",
                         "for requests without max_tokens (default: the coordinator's)",
                         1,
                         INT_MAX};
    t[n++] = (sh_option){"lenient", 0, SH_OPTION_FLAG, &s.lenient, NULL, "ignore unknown fields of requests"};
    int rc = begin(&a, submit_usage, t, n, argc, argv, 0, 0, &operands);
    if (rc >= 0) return end(&a, rc);
    if (!s.input) return end(&a, usage_error(&a, "-i: not given: allowed is a file or -"));
    if (a.output && !s.wait) return end(&a, usage_error(&a, "-o: only with --wait (or use 'shoal results' later)"));
    return end(&a, submit(&a, &s));
}

/* --- status --------------------------------------------------------------------------------------------------------
 */

static const char status_usage[] = "Usage: shoal status --connect ENDPOINT [JOB]\n"
                                   "Prints jobs (all, or one) and groups of a coordinator.\n\n" CONNECTION;

static void print_jobs(const Shoal__JobReply *r) {
    printf("%6s  %-10s %10s %10s %8s %12s %12s  %s\n", "JOB", "STATE", "DONE", "TOTAL", "ERRORS", "TOKENS IN",
           "TOKENS OUT", "NAME");
    for (size_t i = 0; i < r->n_counts; i++) {
        const Shoal__JobCounts *c = r->counts[i];
        printf("%6" PRIu64 "  %-10s %10" PRIu64 " %10" PRIu64 " %8" PRIu64 " %12" PRIu64 " %12" PRIu64 "  %s\n", c->job,
               c->state, c->done, c->total, c->errors, c->tokens_in, c->tokens_out, c->name);
        if (c->failure) printf("        %s\n", c->failure);
    }
}

static void print_groups(const Shoal__JobReply *r) {
    if (r->n_group == 0)
        printf("\nNo group is connected: start one with 'mpirun -n RANKS --bind-to none shoal worker --connect "
               "ENDPOINT'\n");
    for (size_t i = 0; i < r->n_group; i++) {
        const Shoal__GroupState *g = r->group[i];
        printf("\ngroup %s: %s, %d of %d ranks up", g->group, g->state, g->ranks_up, g->ranks);
        if (g->has_kv_tokens) printf(", %d running, %d tokens of KV for one sequence", g->running, g->kv_tokens);
        printf("\n");
        if (g->plan) printf("  %s\n", g->plan);
        for (size_t k = 0; k < g->n_note; k++) printf("  %s\n", g->note[k]);
        if (g->fault) printf("  %s\n", g->fault);
    }
}

int sh_cmd_status(int argc, char **argv) {
    asking a = {.command = "status", .timeout = 10};
    sh_option t[SH_OPTIONS_MAX];
    int operands = 0, rc = begin(&a, status_usage, t, add_connection(&a, t), argc, argv, 0, 1, &operands);
    if (rc >= 0) return end(&a, rc);
    uint64_t job = 0;
    sh_status st = operands ? find_job(&a, argv[1], &job) : SH_OK;
    Shoal__JobReply *r = NULL;
    if (st == SH_OK) st = ask_status(&a, job, &r);
    if (st != SH_OK) return end(&a, complain(&a, st));
    print_jobs(r);
    print_groups(r);
    shoal__job_reply__free_unpacked(r, NULL);
    return end(&a, SH_EXIT_OK);
}

/* --- watch, results, cancel ----------------------------------------------------------------------------------------
 */

static const char watch_usage[] = "Usage: shoal watch --connect ENDPOINT JOB\n"
                                  "Follows a job to its end. Exit status: 0 all requests answered, 1 some in an error "
                                  "row, 3 the job failed.\n\n" CONNECTION;

int sh_cmd_watch(int argc, char **argv) {
    asking a = {.command = "watch", .timeout = 10};
    sh_option t[SH_OPTIONS_MAX];
    int n = add_connection(&a, t), operands = 0;
    t[n++] = progress_option(&a);
    int rc = begin(&a, watch_usage, t, n, argc, argv, 1, 1, &operands);
    if (rc >= 0) return end(&a, rc);
    uint64_t job = 0;
    sh_status st = find_job(&a, argv[1], &job);
    return end(&a, st == SH_OK ? watch(&a, job) : complain(&a, st));
}

static const char results_usage[] = "Usage: shoal results --connect ENDPOINT JOB [-o FILE] [--ordered]\n"
                                    "Writes the results of a job (OpenAI batch output format); FILE appears when "
                                    "complete. Exit status: 0 all requests\n"
                                    "answered, 1 some in an error row, 3 the job failed, 4 it is not finished: what is "
                                    "written are the rows so far.\n\n" CONNECTION;

int sh_cmd_results(int argc, char **argv) {
    asking a = {.command = "results", .timeout = 10, .output = "-"};
    sh_option t[SH_OPTIONS_MAX];
    int n = add_connection(&a, t), operands = 0;
    n += add_output(&a, t + n);
    int rc = begin(&a, results_usage, t, n, argc, argv, 1, 1, &operands);
    if (rc >= 0) return end(&a, rc);
    uint64_t job = 0;
    Shoal__JobReply *r = NULL;
    sh_status st = find_job(&a, argv[1], &job);
    if (st == SH_OK) st = ask_status(&a, job, &r);
    if (st != SH_OK) return end(&a, complain(&a, st));
    rc = collect(&a, job);
    if (rc == SH_EXIT_OK && !is_over(r->counts[0])) {
        fprintf(stderr, "shoal results: the job is not finished: %" PRIu64 " of %" PRIu64 " requests are answered\n",
                r->counts[0]->done, r->counts[0]->total);
        rc = SH_EXIT_INTERRUPTED;
    } else if (rc == SH_EXIT_OK) {
        rc = outcome(&a, r->counts[0]);
    }
    shoal__job_reply__free_unpacked(r, NULL);
    return end(&a, rc);
}

static const char cancel_usage[] =
    "Usage: shoal cancel --connect ENDPOINT JOB\n"
    "Ends a job: requests without an answer get an error row (status 499). Answers that are there stay.\n\n" CONNECTION;

int sh_cmd_cancel(int argc, char **argv) {
    asking a = {.command = "cancel", .timeout = 10};
    sh_option t[SH_OPTIONS_MAX];
    int operands = 0, rc = begin(&a, cancel_usage, t, add_connection(&a, t), argc, argv, 1, 1, &operands);
    if (rc >= 0) return end(&a, rc);
    uint64_t job = 0;
    sh_status st = find_job(&a, argv[1], &job);
    Shoal__Request which = SHOAL__REQUEST__INIT;
    which.has_job = true;
    which.job = job;
    Shoal__JobRequest q = SHOAL__JOB_REQUEST__INIT;
    q.cancel = &which;
    Shoal__JobReply *r = NULL;
    if (st == SH_OK) st = sh_client_call(a.client, &q, &r);
    if (st != SH_OK) return end(&a, complain(&a, st));
    shoal__job_reply__free_unpacked(r, NULL);
    return end(&a, SH_EXIT_OK);
}
