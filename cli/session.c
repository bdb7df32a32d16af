/* Supervision of a run. See session.h. */
#include "cli/session.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "cli/collect.h"
#include "cli/commands.h"
#include "cli/hosts.h"
#include "cli/logtail.h"
#include "cli/replica.h"
#include "common/clock.h"
#include "common/file.h"
#include "coordinator/supervise.h"
#include "partition/routing.h"
#include "proto/group.pb-c.h"

#define JOB_NAME       "run"
#define STATUS_CALL_MS 1000
#define SUBMIT_CALL_MS 10000
#define LAUNCHER_WAIT  3.0 /* seconds: mpirun takes 1 to 2 from SIGTERM to its end */
#define REPORT_WAIT    3.0 /* seconds: ranks answer within hundredths of one, a coordinator after its commit */

typedef enum submit_state { SUBMIT_NONE, SUBMIT_RUNNING, SUBMIT_ENDED, SUBMIT_DONE } submit_state;

struct sh_session {
    sh_session_options o;
    bool over_tcp;
    char keys[PATH_MAX + 16];
    int coordinators; /* started so far */
    sh_child coordinator;
    sh_attempt of_coordinator;
    uint64_t mark;           /* progress when a coordinator failed last */
    char endpoint[160];      /* as this process reaches it */
    char rank_endpoint[320]; /* as ranks reach it */
    sh_replica *replica;     /* [o.replicas] */
    char **hosts;            /* [o.replicas]: each one's share of o.hosts, or NULL */
    bool said_first;
    sh_client *client;
    double heard;
    Shoal__JobReply *last; /* the last good status */
    uint64_t job;          /* 0: not known */
    uint64_t done, total, errors, tokens_in, tokens_out;
    uint64_t first_in, first_out; /* when this run began */
    bool have_counts, finished, superseded;
    double work_began, worked;
    double idle_until; /* when no group was seen at work last */
    bool input_wrong;  /* the same command would meet the same input */
    sh_logtail tail;
    /* the submitting thread; state is guarded by lock */
    pthread_mutex_t lock;
    pthread_t submitter;
    submit_state submit;
    sh_status submit_status;
    bool submit_sent; /* its failure is of the input, or of what the coordinator makes of it */
    char submit_text[1024], submit_endpoint[160];
    uint64_t submit_job, submit_mark; /* lines taken at the last failure */
    int submit_failures;
};

static uint64_t progress_mark(const sh_session *s) {
    return s->done + s->tokens_out;
}

/* Notes a failure of the coordinator; fails itself when there were too many without progress. */
static sh_status note_failure(sh_session *s) {
    sh_attempt *a = &s->of_coordinator;
    bool progressed = progress_mark(s) > s->mark;
    s->mark = progress_mark(s);
    if (!sh_attempt_again(a, progressed, SH_SESSION_TRIES, sh_now()))
        SH_FAIL(SH_EPEER, "coordinator: gave up after %d tries without progress: %s", a->tries, a->reason);
    sh_progress_warn(s->o.progress, "coordinator: %s; starting again", a->reason);
    return SH_OK;
}

static void describe_coordinator(sh_session *s) {
    sh_child_reason(&s->coordinator, &s->tail, s->of_coordinator.reason, sizeof s->of_coordinator.reason);
}

/* --- the submitting thread ------------------------------------------------------------------------------------------
 */

static sh_status submit_all(sh_session *s, uint64_t *job) {
    Shoal__JobOptions options = SHOAL__JOB_OPTIONS__INIT;
    options.has_seed = options.has_default_max_tokens = options.has_lenient = options.has_ordered = 1;
    options.seed = s->o.shared->seed;
    options.default_max_tokens = s->o.shared->default_max_tokens;
    options.lenient = s->o.shared->lenient;
    options.ordered = s->o.ordered;
    sh_client *c = NULL;
    s->submit_sent = false;
    FILE *f = fopen(s->o.input, "re");
    if (!f) SH_FAIL(SH_EINPUT, "-i: %s: cannot be opened: %s", s->o.input, strerror(errno));
    sh_status st = sh_client_open(s->submit_endpoint, s->over_tcp ? s->keys : NULL, SUBMIT_CALL_MS, &c);
    s->submit_sent = st == SH_OK;
    if (st == SH_OK) st = sh_client_submit(c, JOB_NAME, &options, f, job);
    sh_client_close(&c);
    fclose(f);
    return st;
}

static void *submit_thread(void *arg) {
    sh_session *s = arg;
    uint64_t job = 0;
    sh_status st = submit_all(s, &job);
    pthread_mutex_lock(&s->lock);
    s->submit_status = st;
    s->submit_job = job;
    snprintf(s->submit_text, sizeof s->submit_text, "%s", st == SH_OK ? "" : sh_error_text());
    s->submit = SUBMIT_ENDED;
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static submit_state submit_now(sh_session *s) {
    pthread_mutex_lock(&s->lock);
    submit_state now = s->submit;
    pthread_mutex_unlock(&s->lock);
    return now;
}

/* Starts the thread, or takes its result: a coordinator that went away is asked again, a refusal ends the run. */
static sh_status tend_submit(sh_session *s) {
    submit_state now = submit_now(s);
    if (now == SUBMIT_NONE) {
        snprintf(s->submit_endpoint, sizeof s->submit_endpoint, "%s", s->endpoint);
        s->submit = SUBMIT_RUNNING;
        int e = pthread_create(&s->submitter, NULL, submit_thread, s);
        if (e) {
            s->submit = SUBMIT_NONE;
            SH_FAIL(SH_EMEMORY, "no thread to submit the input: %s", strerror(e));
        }
    } else if (now == SUBMIT_ENDED) {
        pthread_join(s->submitter, NULL);
        s->submit = s->submit_status == SH_OK ? SUBMIT_DONE : SUBMIT_NONE;
        if (s->submit_status == SH_OK) s->job = s->submit_job;
        s->input_wrong = s->submit_status == SH_EINPUT && s->submit_sent;
        if (s->submit_status != SH_OK && s->submit_status != SH_EPEER) SH_FAIL(s->submit_status, "%s", s->submit_text);
        if (s->total > s->submit_mark) s->submit_failures = 0; /* slow, but it gets on */
        s->submit_mark = s->total;
        if (s->submit_status == SH_EPEER && s->coordinator.running && ++s->submit_failures >= SH_SESSION_TRIES)
            SH_FAIL(SH_EPEER, "the input cannot be submitted: %s", s->submit_text);
    }
    return SH_OK;
}

/* --- the groups ----------------------------------------------------------------------------------------------------
 */

static const Shoal__GroupState *state_of(const sh_session *s, const sh_replica *r) {
    for (size_t i = 0; s->last && r->starts && i < s->last->n_group; i++)
        if (strcmp(s->last->group[i]->group, r->name) == 0) return s->last->group[i];
    return NULL;
}

static int count_state(const sh_session *s, sh_replica_state state) {
    int n = 0;
    for (int i = 0; i < s->o.replicas; i++) n += s->replica[i].state == state;
    return n;
}

static int living(const sh_session *s) {
    return s->o.replicas - count_state(s, SH_REPLICA_GIVEN_UP);
}

/* The clock of the work runs while a group is ready. */
static void keep_work_time(sh_session *s, bool at_work) {
    if (at_work && s->work_began <= 0) s->work_began = sh_now();
    if (at_work || s->work_began <= 0) return;
    s->worked += sh_now() - s->work_began;
    s->work_began = 0;
}

static void end_groups(sh_session *s) {
    for (int i = 0; i < s->o.replicas; i++) sh_replica_ask_end(&s->replica[i]); /* all at once */
    for (int i = 0; i < s->o.replicas; i++) sh_replica_end(&s->replica[i]);
    keep_work_time(s, false);
}

static void say_first_line(sh_session *s, const Shoal__GroupState *g) {
    const sh_shared_options *o = s->o.shared;
    char many[40] = "";
    if (s->o.replicas > 1) snprintf(many, sizeof many, "%d groups, each a ", s->o.replicas);
    sh_progress_say(s->o.progress, "start",
                    "%s, %s%s, mode %s, KV %s, %lld tokens of KV fit%s, %d in one sequence; %d sequences at once, %d "
                    "prompt tokens a step",
                    s->o.model_name, many, g->plan ? g->plan : "one stage", sh_mode_name(sh_options_mode(o)),
                    sh_kv_type_name(sh_options_kv(o)), (long long)g->kv_total, s->o.replicas > 1 ? " in the first" : "",
                    g->kv_tokens, s->o.plan->max_seqs, s->o.plan->chunk);
    for (size_t i = 0; i < g->n_note; i++) sh_progress_say(s->o.progress, "note", "%s", g->note[i]);
    s->said_first = true;
}

/* "group", or "group 2 (node3,node4)" where there are several. */
static const char *name_of(const sh_session *s, const sh_replica *r, char *to, size_t size) {
    const char *hosts = r->o.like.hosts;
    if (s->o.replicas == 1)
        snprintf(to, size, "group");
    else
        snprintf(to, size, "group %d%s%.80s%s", r->o.number, hosts ? " (" : "", hosts ? hosts : "", hosts ? ")" : "");
    return to;
}

/* The run goes on with the others, if there are any. */
static sh_status give_up(sh_session *s, const sh_replica *r) {
    char who[128], why[1200];
    if (r->lasting)
        snprintf(why, sizeof why, "%s", r->attempt.reason);
    else
        snprintf(why, sizeof why, "gave up after %d tries without progress: %s", r->attempt.tries, r->attempt.reason);
    name_of(s, r, who, sizeof who);
    if (living(s) > 0) {
        sh_progress_warn(s->o.progress, "%s: %s; the run goes on with %d of %d groups", who, why, living(s),
                         s->o.replicas);
        return SH_OK;
    }
    if (s->o.replicas > 1) SH_FAIL(SH_EPEER, "no group is left: %s: %s", who, why);
    SH_FAIL(r->lasting ? SH_EFORMAT : SH_EPEER, "%s%s%s", r->lasting ? "" : who, r->lasting ? "" : ": ", why);
}

static sh_status tend_group(sh_session *s, sh_replica *r) {
    const Shoal__GroupState *g = state_of(s, r);
    bool alone = s->last && s->last->has_suspects && s->last->suspects > 0;
    sh_replica_event event;
    char who[128];
    SH_TRY(sh_replica_tend(r, g, s->rank_endpoint, alone ? SH_SESSION_ALONE : SH_SESSION_TRIES, &event));
    if (event == SH_REPLICA_BECAME_READY && !s->said_first) say_first_line(s, g);
    if (event == SH_REPLICA_FAILED)
        sh_progress_warn(s->o.progress, "%s: %s; starting again", name_of(s, r, who, sizeof who), r->attempt.reason);
    return event == SH_REPLICA_GAVE_UP ? give_up(s, r) : SH_OK;
}

static sh_status tend_groups(sh_session *s) {
    for (int i = 0; i < s->o.replicas; i++) SH_TRY(tend_group(s, &s->replica[i]));
    keep_work_time(s, count_state(s, SH_REPLICA_READY) > 0);
    return SH_OK;
}

/* Who gets which hosts, and which part of a node. */
static sh_status make_groups(sh_session *s) {
    const sh_session_options *o = &s->o;
    s->replica = calloc((size_t)o->replicas, sizeof *s->replica);
    s->hosts = calloc((size_t)o->replicas, sizeof *s->hosts);
    if (!s->replica || !s->hosts) SH_FAIL(SH_EMEMORY, "no memory for %d groups", o->replicas);
    for (int i = 0; i < o->replicas; i++) {
        sh_replica_options ro = {.number = i + 1, .store = o->store};
        int part = i, parts = o->replicas;
        if (o->hosts) {
            sh_buf list;
            sh_buf_init(&list, 0);
            sh_status st = sh_hosts_divide(o->hosts, i, o->replicas, &list, &part, &parts);
            s->hosts[i] = sh_buf_take(&list);
            SH_TRY(st);
        }
        ro.like = (sh_launch_options){.program = o->program,
                                      .keys = s->over_tcp ? s->keys : NULL,
                                      .mark = o->store->mark,
                                      .launcher = o->launcher,
                                      .hosts = s->hosts[i],
                                      .tmp = o->store->ipc,
                                      .shm = o->store->shm,
                                      .ranks = o->ranks,
                                      .threads = o->shared->threads,
                                      .part = part,
                                      .parts = parts,
                                      .memory = parts > 1 && !o->hosts ? o->memory / (uint64_t)parts : 0,
                                      .root = geteuid() == 0,
                                      .crowded = o->ranks * parts > o->cpus};
        sh_replica_init(&s->replica[i], &ro);
    }
    return SH_OK;
}

/* --- the coordinator ------------------------------------------------------------------------------------------------
 */

typedef struct arguments {
    const char *argv[64];
    int n;
    char text[24][32];
    int n_text;
} arguments;

static void add(arguments *a, const char *name, const char *value) {
    a->argv[a->n++] = name;
    if (value) a->argv[a->n++] = value;
}

static void add_number(arguments *a, const char *name, uint64_t value, bool always) {
    if (!value && !always) return;
    char *t = a->text[a->n_text++];
    snprintf(t, sizeof a->text[0], "%llu", (unsigned long long)value);
    add(a, name, t);
}

static void coordinator_arguments(const sh_session *s, const char *listen, int ready_fd, arguments *a) {
    const sh_shared_options *o = s->o.shared;
    *a = (arguments){0};
    add(a, s->o.program, NULL);
    add(a, "serve", NULL);
    add(a, "--run", NULL);
    add_number(a, "--ready-fd", (uint64_t)ready_fd, true);
    add(a, "--listen", listen);
    if (s->over_tcp) add(a, "--keys", s->keys);
    add(a, "--store", s->o.store->path);
    add(a, "--model", s->o.model);
    add(a, "--mode", sh_mode_name(sh_options_mode(o)));
    add(a, "--kv", sh_kv_type_name(sh_options_kv(o)));
    if (o->plan) add(a, "--plan", o->plan);
    if (o->cuts) add(a, "--cuts", o->cuts);
    if (o->prefill_cuts) add(a, "--prefill-cuts", o->prefill_cuts);
    add_number(a, "--pp", (uint64_t)o->pp, false);
    add_number(a, "--ep", (uint64_t)o->ep, false);
    add_number(a, "--tp", (uint64_t)o->tp, false);
    add_number(a, "--cp", (uint64_t)o->cp, false);
    add_number(a, "--prefill", (uint64_t)o->prefill, false);
    if (o->tp_reduce_at) add(a, "--tp-reduce", "sum");
    add_number(a, "--threads", (uint64_t)o->threads, false);
    add_number(a, "--max-seqs", (uint64_t)o->max_seqs, false);
    add_number(a, "--chunk", (uint64_t)o->chunk, false);
    add_number(a, "--max-context", (uint64_t)o->max_context, false);
    add_number(a, "--kv-memory", o->kv_memory, false);
    if (o->routing) add(a, "--routing", o->routing);
    add_number(a, "--replicate", o->replicate, false);
    if (o->no_prefix_sharing) add(a, "--no-prefix-sharing", NULL);
    if (o->share_weights) add(a, "--share-weights", NULL);
    add_number(a, "--seed", o->seed, false);
    add_number(a, "--default-max-tokens", (uint64_t)o->default_max_tokens, false);
    if (o->lenient) add(a, "--lenient", NULL);
    if (s->o.trace_steps) add(a, "--trace-steps", s->o.trace_steps);
}

/* Seconds in which a coordinator that takes over the store may honestly be busy with it. */
static double ready_patience(const sh_session *s) {
    double bytes = 0;
    DIR *d = opendir(s->o.store->path);
    for (struct dirent *e; d && (e = readdir(d));)
        for (int i = 0; i < 2 && e->d_name[0] >= '1' && e->d_name[0] <= '9'; i++) {
            char path[PATH_MAX + 300];
            struct stat sb;
            snprintf(path, sizeof path, "%s/%s/store.db%s", s->o.store->path, e->d_name, i ? "-wal" : "");
            if (stat(path, &sb) == 0) bytes += (double)sb.st_size;
        }
    if (d) closedir(d);
    return SH_SESSION_READY + bytes / SH_SESSION_TAKING;
}

/* The endpoint's line from the new coordinator; SH_EPEER when it ends or stays silent, SH_ECANCELLED when interrupted.
 */
static sh_status await_ready(sh_session *s, int fd, char *line, size_t size) {
    double patience = ready_patience(s), until = sh_now() + patience;
    size_t n = 0;
    while (sh_now() < until) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        if (*s->o.interrupted) SH_FAIL(SH_ECANCELLED, "interrupted");
        if (poll(&p, 1, 100) <= 0) continue;
        ssize_t r = read(fd, line + n, size - 1 - n);
        if (r < 0 && errno == EINTR) continue;
        if (r <= 0) break;
        n += (size_t)r;
        line[n] = 0;
        char *end = strchr(line, '\n');
        if (end) {
            *end = 0;
            return SH_OK;
        }
        if (n == size - 1) break;
    }
    SH_FAIL(SH_EPEER, "took no requests within %.0f s", patience);
}

/* tcp://0.0.0.0:41234 → as this node (client) and as others (ranks) call it. */
static void name_endpoints(sh_session *s, const char *bound) {
    const char *port = strrchr(bound, ':');
    if (!s->over_tcp || !port) {
        snprintf(s->endpoint, sizeof s->endpoint, "%s", bound);
        snprintf(s->rank_endpoint, sizeof s->rank_endpoint, "%s", bound);
        return;
    }
    char host[256] = "localhost";
    if (gethostname(host, sizeof host - 1) != 0) snprintf(host, sizeof host, "localhost");
    snprintf(s->endpoint, sizeof s->endpoint, "tcp://127.0.0.1%.8s", port);
    snprintf(s->rank_endpoint, sizeof s->rank_endpoint, "tcp://%s%.8s", host, port);
}

static sh_status start_coordinator(sh_session *s) {
    char listen[PATH_MAX + 32], bound[160] = "";
    int ready[2];
    s->coordinators++;
    if (s->over_tcp)
        snprintf(listen, sizeof listen, "tcp://0.0.0.0:*");
    else
        snprintf(listen, sizeof listen, "ipc://%s/c%d", s->o.store->ipc, s->coordinators);
    if (pipe2(ready, O_CLOEXEC) != 0) SH_FAIL(SH_EIO, "no pipe for the coordinator: %s", strerror(errno));
    arguments a;
    coordinator_arguments(s, listen, ready[1], &a);
    const char *env[] = {s->o.store->mark, NULL};
    sh_child_spec spec = {
        .argv = a.argv, .env = env, .log = s->o.store->log, .keep_fd = ready[1], .death_signal = SIGTERM};
    sh_logtail_mark(&s->tail);
    sh_status st = sh_child_start(&spec, &s->coordinator);
    close(ready[1]);
    if (st == SH_OK) st = await_ready(s, ready[0], bound, sizeof bound);
    close(ready[0]);
    s->heard = sh_now();
    if (st == SH_OK) name_endpoints(s, bound);
    return st;
}

/* From here on everything that bears the store's mark is the newer run's. */
static sh_status superseded(sh_session *s) {
    s->superseded = true;
    SH_FAIL(SH_ESTATE, "%s: a newer run has taken it over", s->o.store->path);
}

/* The coordinator is not there (any more): ends what is left of it and its group, and starts the next. */
static sh_status renew_coordinator(sh_session *s) {
    bool first = s->coordinators == 0;
    sh_client_close(&s->client);
    if (!first) {
        sh_child_end(&s->coordinator, 0); /* one that does not answer cannot save anything either */
        end_groups(s);
        if (WIFEXITED(s->coordinator.status) && WEXITSTATUS(s->coordinator.status) == SH_EXIT_SUPERSEDED)
            return superseded(s);
        bool mine; /* one more incarnation of this run would take the store from the newer one */
        sh_status looked = sh_runstore_owned(s->o.store, &mine);
        if (looked == SH_OK && !mine) return superseded(s);
        if (looked != SH_OK) sh_progress_warn(s->o.progress, "whose store it is cannot be seen: %s", sh_error_text());
        SH_TRY(note_failure(s));
        while (sh_now() < s->of_coordinator.not_before && !*s->o.interrupted) sh_sleep(0.02);
    }
    sh_status st = start_coordinator(s);
    if (st != SH_EPEER) return st;
    double until = sh_now() + 1;
    while (sh_child_poll(&s->coordinator) && sh_now() < until) sh_sleep(0.01); /* its pipe closes just before it ends */
    bool silent = s->coordinator.running;
    if (silent) sh_child_end(&s->coordinator, SH_RUN_GRACE);
    if (WIFEXITED(s->coordinator.status) && !silent) {
        describe_coordinator(s); /* ended by itself before it began: trying again would not help */
        if (WEXITSTATUS(s->coordinator.status) == SH_EXIT_SUPERSEDED) return superseded(s);
        SH_FAIL(SH_EPEER, "coordinator: %s", s->of_coordinator.reason);
    }
    if (silent)
        snprintf(s->of_coordinator.reason, sizeof s->of_coordinator.reason, "%.500s", sh_error_text());
    else
        describe_coordinator(s);
    return SH_OK; /* the next round tries again */
}

/* --- the round ------------------------------------------------------------------------------------------------------
 */

static void take_counts(sh_session *s, const Shoal__JobCounts *c) {
    s->job = c->job;
    s->total = c->total, s->done = c->done, s->errors = c->errors;
    s->tokens_in = c->tokens_in, s->tokens_out = c->tokens_out;
    /* A new coordinator counts from what was saved: less than was seen before. */
    if (!s->have_counts || c->tokens_in < s->first_in) s->first_in = c->tokens_in;
    if (!s->have_counts || c->tokens_out < s->first_out) s->first_out = c->tokens_out;
    s->have_counts = true;
}

typedef struct supervision {
    Shoal__Supervision message;
    Shoal__EndedGroup ended[SH_MAX_REPLICAS], *list[SH_MAX_REPLICAS];
} supervision;

/* How many groups the coordinator may count on, and which ones it need not wait for. */
static void tell_groups(sh_session *s, supervision *to) {
    shoal__supervision__init(&to->message);
    to->message.groups = living(s);
    to->message.ended = to->list;
    for (int i = 0; i < s->o.replicas; i++) {
        sh_replica *r = &s->replica[i];
        if (!r->ended[0]) continue;
        size_t k = to->message.n_ended++;
        shoal__ended_group__init(&to->ended[k]);
        to->ended[k].group = r->ended;
        to->ended[k].reason = r->ended_reason;
        to->list[k] = &to->ended[k];
    }
}

/* Asks the coordinator, which is to ask the ranks for a report where that is true; *answered false when it did not
 * answer in time. Fails when the job can never finish. */
static sh_status ask(sh_session *s, bool report, bool *answered) {
    *answered = false;
    if (!s->client && sh_client_open(s->endpoint, s->over_tcp ? s->keys : NULL, STATUS_CALL_MS, &s->client) != SH_OK)
        return SH_OK;
    Shoal__Request all = SHOAL__REQUEST__INIT;
    Shoal__JobRequest request = SHOAL__JOB_REQUEST__INIT;
    request.status = &all;
    request.has_report = request.report = report;
    supervision said;
    tell_groups(s, &said);
    request.supervision = &said.message;
    Shoal__JobReply *reply = NULL;
    if (sh_client_call(s->client, &request, &reply) != SH_OK) {
        sh_client_close(&s->client); /* a late answer must not be taken for the next one */
        return SH_OK;
    }
    for (int i = 0; i < s->o.replicas; i++) s->replica[i].ended[0] = 0;
    if (s->last) shoal__job_reply__free_unpacked(s->last, NULL);
    s->last = reply;
    s->heard = sh_now();
    *answered = true;
    for (size_t i = 0; i < reply->n_warning; i++) sh_progress_warn(s->o.progress, "%s", reply->warning[i]);
    for (size_t i = 0; i < reply->n_counts; i++) {
        const Shoal__JobCounts *c = reply->counts[i];
        if (strcmp(c->name, JOB_NAME) != 0) continue;
        take_counts(s, c);
        s->finished = strcmp(c->state, "done") == 0;
        if (strcmp(c->state, "failed") == 0)
            SH_FAIL(SH_EMEMORY, "%s", c->failure && *c->failure ? c->failure : "the job failed");
        if (strcmp(c->state, "cancelled") == 0) SH_FAIL(SH_EINPUT, "the job was cancelled");
    }
    return SH_OK;
}

static void show(sh_session *s, bool at_once) {
    const char *state = "starting";
    sh_progress_view v = {.total = s->total > s->o.lines ? s->total : s->o.lines,
                          .done = s->done,
                          .errors = s->errors,
                          .tokens_in = s->tokens_in,
                          .tokens_out = s->tokens_out,
                          .tokens_shared = sh_closing_shared(s->last),
                          .ranks = s->o.ranks * s->o.replicas};
    for (int i = 0; i < s->o.replicas; i++) {
        const Shoal__GroupState *g = state_of(s, &s->replica[i]);
        if (!g || s->replica[i].state < SH_REPLICA_STARTING || !sh_replica_lives(&s->replica[i])) continue;
        v.ranks_up += g->ranks_up;
        if (strcmp(g->state, "loading") == 0) sh_progress_add_load(&v, g);
        state = g->state;
    }
    v.state = count_state(s, SH_REPLICA_READY) ? "" : state;
    sh_progress_update(s->o.progress, &v, at_once);
}

static void show_warnings(sh_session *s) {
    const char *warning;
    while ((warning = sh_logtail_next_warning(&s->tail))) sh_progress_warn(s->o.progress, "%s", warning);
    for (int i = 1; i < s->o.replicas; i++) /* the first group's are in the run's own log */
        while ((warning = sh_logtail_next_warning(&s->replica[i].tail)))
            sh_progress_warn(s->o.progress, "group %d: %s", i + 1, warning);
}

static bool any_ready(const sh_session *s) {
    for (size_t i = 0; s->last && i < s->last->n_group; i++)
        if (strcmp(s->last->group[i]->state, "ready") == 0) return true;
    return false;
}

/* One round; *finished when every request has its row and all of the input was taken. */
static sh_status work_round(sh_session *s, bool *finished) {
    bool answered = false;
    if (s->coordinators == 0) return renew_coordinator(s);
    bool ran = s->coordinator.running; /* not: it was ended, and it is known why */
    if (!sh_child_poll(&s->coordinator)) {
        if (ran) describe_coordinator(s);
        return renew_coordinator(s);
    }
    SH_TRY(ask(s, false, &answered));
    if (!answered && sh_now() - s->heard > SH_SESSION_SILENCE) {
        snprintf(s->of_coordinator.reason, sizeof s->of_coordinator.reason, "did not answer for %.0f s",
                 SH_SESSION_SILENCE);
        return renew_coordinator(s);
    }
    if (submit_now(s) != SUBMIT_DONE) SH_TRY(tend_submit(s));
    *finished = s->finished && submit_now(s) == SUBMIT_DONE;
    if (*finished && s->total != s->o.lines) {
        s->input_wrong = true;
        SH_FAIL(SH_EINPUT,
                "-i: %s: changed while it was read: it had %llu requests, the job has %llu: remove %s and begin again",
                s->o.input, (unsigned long long)s->o.lines, (unsigned long long)s->total, s->o.store->path);
    }
    if (answered && count_state(s, SH_REPLICA_READY) == 0 && !any_ready(s)) s->idle_until = sh_now();
    if (*finished || !answered) return SH_OK;
    if (!s->finished) SH_TRY(tend_groups(s));
    show(s, false);
    show_warnings(s);
    return SH_OK;
}

/* A job of a moment may be done before its group was seen at work: it was so since it was seen idle, at most. */
static void note_late(sh_session *s) {
    for (int i = 0; i < s->o.replicas; i++) {
        sh_replica *r = &s->replica[i];
        const Shoal__GroupState *g = state_of(s, r);
        if (r->state != SH_REPLICA_STARTING || !g || strcmp(g->state, "ready") != 0) continue;
        r->state = SH_REPLICA_READY;
        if (!s->said_first) say_first_line(s, g);
        if (s->work_began <= 0 && s->worked <= 0) s->work_began = s->idle_until;
    }
}

static bool all_reported(const sh_session *s) {
    for (size_t i = 0; s->last && i < s->last->n_group; i++) {
        const Shoal__GroupState *g = s->last->group[i];
        if (strcmp(g->state, "ready") == 0 && !g->reported) return false;
    }
    return true;
}

/* The last times, counts and pieces of the timeline: ranks tell them once a second, and now because they are asked. */
static void await_reports(sh_session *s) {
    double until = sh_now() + REPORT_WAIT;
    bool asked = false, answered = false;
    while (s->o.reports && sh_now() < until) {
        if (ask(s, !asked, &answered) != SH_OK) break;
        asked |= answered;
        if (asked && all_reported(s)) return;
        sh_sleep(0.005);
    }
    if (s->o.reports)
        sh_progress_warn(s->o.progress,
                         "not all ranks told their last times: times, counts and timeline may lack the last "
                         "second");
}

static sh_status write_routing(const sh_session *s, const Shoal__Routing *m, const char *path) {
    static sh_config c;
    SH_CLEANUP(sh_routing_destroy) sh_routing *r = NULL;
    SH_CLEANUP(sh_buf_release) sh_buf text;
    sh_buf_init(&text, 0);
    SH_TRY(sh_config_load(s->o.model, &c));
    SH_TRY(sh_routing_create(&c, &r));
    SH_TRY(sh_routing_add(r, m));
    SH_TRY(sh_routing_print(r, &text));
    return sh_file_write(path, text.data, text.len);
}

sh_status sh_session_save_routing(sh_session *s, const char *path) {
    if (!s->client) SH_TRY(sh_client_open(s->endpoint, s->over_tcp ? s->keys : NULL, STATUS_CALL_MS, &s->client));
    Shoal__JobRequest request = SHOAL__JOB_REQUEST__INIT;
    request.has_routing = request.routing = true;
    Shoal__JobReply *reply = NULL;
    SH_TRY(sh_client_call(s->client, &request, &reply));
    Shoal__Routing *m = shoal__routing__unpack(NULL, reply->routing.len, reply->routing.data);
    sh_status st = m ? write_routing(s, m, path)
                     : sh_error_set(SH_EPEER, __FILE__, __LINE__, "the coordinator's counts cannot be read");
    if (m) shoal__routing__free_unpacked(m, NULL);
    shoal__job_reply__free_unpacked(reply, NULL);
    return st == SH_OK ? SH_OK : sh_error_prefix(st, "--save-routing");
}

sh_status sh_session_drive(sh_session *s) {
    double began = s->idle_until = sh_now();
    bool finished = false;
    while (!finished) {
        if (*s->o.interrupted) SH_FAIL(SH_ECANCELLED, "interrupted");
        SH_TRY(work_round(s, &finished));
        /* Short jobs are not made to wait for the next look; long ones are not looked at too often. */
        if (!finished) sh_sleep(sh_now() - began < 10 ? 0.02 : 0.1);
    }
    note_late(s);
    show(s, true);
    keep_work_time(s, false);
    await_reports(s);
    return SH_OK;
}

sh_status sh_session_collect(sh_session *s, const char *output, sh_outcomes *outcomes) {
    char spool[PATH_MAX + 16];
    snprintf(spool, sizeof spool, "%s/rows.tmp", s->o.store->path);
    for (;;) {
        sh_client *c = NULL;
        sh_status st = sh_client_open(s->endpoint, s->over_tcp ? s->keys : NULL, (int)(SH_SESSION_SILENCE * 1000), &c);
        if (st == SH_OK) st = sh_collect(c, s->job, output, s->o.ordered, spool, outcomes);
        sh_client_close(&c);
        if (st != SH_EPEER) return st;
        if (*s->o.interrupted) SH_FAIL(SH_ECANCELLED, "interrupted");
        snprintf(s->of_coordinator.reason, sizeof s->of_coordinator.reason, "%.900s", sh_error_text());
        SH_TRY(renew_coordinator(s));
    }
}

/* Slurm sends SIGTERM to all processes of a job at once. Launchers that had theirs tidy up on all hosts and end by
 * themselves; a second one would make mpirun leave its files there, so they get time before it. */
static void await_launchers(sh_session *s) {
    double until = sh_now() + LAUNCHER_WAIT;
    bool runs = s->over_tcp && *s->o.interrupted == SIGTERM;
    while (runs && sh_now() < until) {
        sh_sleep(0.01);
        runs = false;
        for (int i = 0; i < s->o.replicas; i++) runs |= sh_child_poll(&s->replica[i].child);
    }
}

/* Those that are told to leave; others would not hear it. */
static bool any_ready_runs(sh_session *s) {
    bool runs = false;
    for (int i = 0; i < s->o.replicas; i++)
        runs |= s->replica[i].state == SH_REPLICA_READY && sh_child_poll(&s->replica[i].child);
    return runs;
}

void sh_session_stop(sh_session *s, bool finished) {
    if (finished && s->coordinator.running) {
        Shoal__JobRequest request = SHOAL__JOB_REQUEST__INIT;
        request.has_shutdown = request.shutdown = 1;
        Shoal__JobReply *reply = NULL;
        if (!s->client)
            SH_IGNORE(sh_client_open(s->endpoint, s->over_tcp ? s->keys : NULL, STATUS_CALL_MS, &s->client));
        if (s->client && sh_client_call(s->client, &request, &reply) == SH_OK)
            shoal__job_reply__free_unpacked(reply, NULL);
        double until = sh_now() + SH_RUN_GRACE;
        while (any_ready_runs(s) && sh_now() < until) sh_sleep(0.01);
    } else {
        sh_child_ask(&s->coordinator); /* it saves while the ranks end */
        await_launchers(s);
    }
    sh_client_close(&s->client);
    end_groups(s);
    double until = sh_now() + SH_RUN_GRACE;
    while (finished && sh_child_poll(&s->coordinator) && sh_now() < until) sh_sleep(0.01);
    sh_child_end(&s->coordinator, SH_RUN_GRACE);
    if (!s->superseded) (void)sh_process_end_marked(s->o.store->mark, 1.0);
}

void sh_session_closing(const sh_session *s, sh_closing *c) {
    c->tokens_in = s->tokens_in, c->tokens_out = s->tokens_out;
    c->tokens_in_now = s->tokens_in - s->first_in, c->tokens_out_now = s->tokens_out - s->first_out;
    c->computing = s->worked;
    c->last = s->last;
}

uint64_t sh_session_done(const sh_session *s, uint64_t *total) {
    *total = s->total;
    return s->done;
}

bool sh_session_input_is_wrong(const sh_session *s) {
    return s->input_wrong;
}

sh_status sh_session_create(const sh_session_options *o, sh_session **out) {
    sh_session *s = calloc(1, sizeof *s);
    if (!s) SH_FAIL(SH_EMEMORY, "no memory for the run");
    s->o = *o;
    s->over_tcp = o->hosts != NULL;
    pthread_mutex_init(&s->lock, NULL);
    snprintf(s->keys, sizeof s->keys, "%s/keys", o->store->path);
    sh_logtail_open(&s->tail, o->store->log);
    sh_status st = SH_OK;
    if (s->over_tcp) {
        st = sh_path_remove(s->keys); /* keys are made for each run */
        if (st == SH_OK) st = sh_wire_keygen(s->keys);
    }
    if (st == SH_OK) st = make_groups(s);
    if (st != SH_OK) {
        sh_session_destroy(&s);
        return st;
    }
    *out = s;
    return SH_OK;
}

void sh_session_destroy(sh_session **sp) {
    sh_session *s = *sp;
    if (!s) return;
    sh_client_close(&s->client);
    for (int i = 0; s->replica && s->hosts && i < s->o.replicas; i++) {
        sh_replica_release(&s->replica[i]);
        free(s->hosts[i]);
    }
    free(s->replica);
    free(s->hosts);
    sh_logtail_close(&s->tail);
    if (s->last) shoal__job_reply__free_unpacked(s->last, NULL);
    if (submit_now(s) == SUBMIT_RUNNING || submit_now(s) == SUBMIT_ENDED) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        t.tv_sec += 1;
        *sp = NULL;
        if (pthread_timedjoin_np(s->submitter, NULL, &t) != 0)
            return; /* still waits for a coordinator that is gone: left to exit() */
    }
    pthread_mutex_destroy(&s->lock);
    free(s);
    *sp = NULL;
}
