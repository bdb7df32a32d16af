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
#include "cli/logtail.h"
#include "common/clock.h"
#include "common/file.h"
#include "coordinator/supervise.h"
#include "proto/group.pb-c.h"

#define JOB_NAME       "run"
#define STATUS_CALL_MS 1000
#define SUBMIT_CALL_MS 10000
#define FAULT_WAIT     0.3 /* seconds for a group's last words to arrive by way of the coordinator */

/* One of the two supervised processes: its tries since the last progress. */
typedef struct attempt {
    int tries;
    uint64_t mark;     /* progress seen when it was last started */
    double not_before; /* pause before the next start */
    char reason[1024]; /* of the last failure */
} attempt;

typedef enum submit_state { SUBMIT_NONE, SUBMIT_RUNNING, SUBMIT_ENDED, SUBMIT_DONE } submit_state;

struct sh_session {
    sh_session_options o;
    bool over_tcp;
    char keys[PATH_MAX + 16];
    int coordinators, groups; /* started so far */
    sh_child coordinator, group;
    attempt of_coordinator, of_group;
    char endpoint[160];      /* as this process reaches it */
    char rank_endpoint[320]; /* as ranks reach it */
    char group_name[96], group_mark[112];
    sh_launch launch;
    double group_started, group_gone; /* gone: when its launcher was seen to have ended; 0: not yet */
    bool group_on;                    /* started, and not given up */
    bool group_seen, group_ready, said_first;
    sh_client *client;
    double heard;
    Shoal__JobReply *last; /* the last good status */
    uint64_t job;          /* 0: not known */
    uint64_t done, total, errors, tokens_in, tokens_out;
    uint64_t first_in, first_out; /* when this run began */
    bool have_counts, finished, superseded;
    double work_began, worked;
    sh_logtail tail;
    /* the submitting thread; state is guarded by lock */
    pthread_mutex_t lock;
    pthread_t submitter;
    submit_state submit;
    sh_status submit_status;
    char submit_text[1024], submit_endpoint[160];
    uint64_t submit_job, submit_mark; /* lines taken at the last failure */
    int submit_failures;
};

static uint64_t progress_mark(const sh_session *s) {
    return s->done + s->tokens_out;
}

/* Notes a failure; fails itself when there were too many without progress. */
static sh_status note_failure(sh_session *s, attempt *a, const char *who) {
    if (progress_mark(s) > a->mark) a->tries = 0;
    a->mark = progress_mark(s);
    a->tries++;
    if (a->tries >= SH_SESSION_TRIES)
        SH_FAIL(SH_EPEER, "%s: gave up after %d tries without progress: %s", who, a->tries, a->reason);
    a->not_before = sh_now() + 0.1 * (double)(1 << a->tries);
    sh_progress_warn(s->o.progress, "%s: %s; starting again", who, a->reason);
    return SH_OK;
}

/* What the process wrote last before it ended, as far as it looks like a reason. */
static void describe(sh_session *s, const sh_child *c, attempt *a) {
    char how[128], why[768];
    sh_child_describe(c, how, sizeof how);
    if (sh_logtail_reason(&s->tail, WIFSIGNALED(c->status), why, sizeof why))
        snprintf(a->reason, sizeof a->reason, "%s: %s", how, why);
    else
        snprintf(a->reason, sizeof a->reason, "%s", how);
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
    FILE *f = fopen(s->o.input, "re");
    if (!f) SH_FAIL(SH_EINPUT, "-i: %s: cannot be opened: %s", s->o.input, strerror(errno));
    sh_status st = sh_client_open(s->submit_endpoint, s->over_tcp ? s->keys : NULL, SUBMIT_CALL_MS, &c);
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
        if (s->submit_status != SH_OK && s->submit_status != SH_EPEER) SH_FAIL(s->submit_status, "%s", s->submit_text);
        if (s->total > s->submit_mark) s->submit_failures = 0; /* slow, but it gets on */
        s->submit_mark = s->total;
        if (s->submit_status == SH_EPEER && s->coordinator.running && ++s->submit_failures >= SH_SESSION_TRIES)
            SH_FAIL(SH_EPEER, "the input cannot be submitted: %s", s->submit_text);
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
    if (o->cuts) add(a, "--cuts", o->cuts);
    add_number(a, "--pp", (uint64_t)o->pp, false);
    add_number(a, "--ep", (uint64_t)o->ep, false);
    add_number(a, "--tp", (uint64_t)o->tp, false);
    add_number(a, "--cp", (uint64_t)o->cp, false);
    if (o->tp_reduce_at) add(a, "--tp-reduce", "sum");
    add_number(a, "--threads", (uint64_t)o->threads, false);
    add_number(a, "--max-seqs", (uint64_t)o->max_seqs, false);
    add_number(a, "--chunk", (uint64_t)o->chunk, false);
    add_number(a, "--max-context", (uint64_t)o->max_context, false);
    add_number(a, "--kv-memory", o->kv_memory, false);
    add_number(a, "--seed", o->seed, false);
    add_number(a, "--default-max-tokens", (uint64_t)o->default_max_tokens, false);
    if (o->lenient) add(a, "--lenient", NULL);
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

static void end_group(sh_session *s) {
    sh_child_end(&s->group, SH_RUN_GRACE);
    if (s->group_mark[0]) (void)sh_process_end_marked(s->group_mark, 1.0); /* ranks whose launcher was killed */
    if (s->work_began > 0) s->worked += sh_now() - s->work_began;
    s->work_began = 0;
    s->group_on = s->group_seen = s->group_ready = false;
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
        end_group(s);
        if (WIFEXITED(s->coordinator.status) && WEXITSTATUS(s->coordinator.status) == SH_EXIT_SUPERSEDED)
            return superseded(s);
        SH_TRY(note_failure(s, &s->of_coordinator, "coordinator"));
        while (sh_now() < s->of_coordinator.not_before && !*s->o.interrupted) sh_sleep(0.02);
    }
    sh_status st = start_coordinator(s);
    if (st != SH_EPEER) return st;
    double until = sh_now() + 1;
    while (sh_child_poll(&s->coordinator) && sh_now() < until) sh_sleep(0.01); /* its pipe closes just before it ends */
    bool silent = s->coordinator.running;
    if (silent) sh_child_end(&s->coordinator, SH_RUN_GRACE);
    if (WIFEXITED(s->coordinator.status) && !silent) {
        describe(s, &s->coordinator,
                 &s->of_coordinator); /* ended by itself before it began: trying again would not help */
        if (WEXITSTATUS(s->coordinator.status) == SH_EXIT_SUPERSEDED) return superseded(s);
        SH_FAIL(SH_EPEER, "coordinator: %s", s->of_coordinator.reason);
    }
    if (silent)
        snprintf(s->of_coordinator.reason, sizeof s->of_coordinator.reason, "%.500s", sh_error_text());
    else
        describe(s, &s->coordinator, &s->of_coordinator);
    return SH_OK; /* the next round tries again */
}

/* --- the group ------------------------------------------------------------------------------------------------------
 */

static sh_status start_group(sh_session *s) {
    s->groups++;
    snprintf(s->group_name, sizeof s->group_name, "run-%d-%d", (int)getpid(), s->groups);
    snprintf(s->group_mark, sizeof s->group_mark, "SHOAL_GROUP=%s", s->group_name);
    sh_launch_options lo = {.program = s->o.program,
                            .endpoint = s->rank_endpoint,
                            .keys = s->over_tcp ? s->keys : NULL,
                            .group = s->group_name,
                            .mark = s->o.store->mark,
                            .launcher = s->o.launcher,
                            .hosts = s->o.hosts,
                            .tmp = s->o.store->ipc,
                            .shm = s->o.store->shm,
                            .ranks = s->o.ranks,
                            .threads = s->o.shared->threads,
                            .root = geteuid() == 0,
                            .crowded = s->o.ranks > s->o.cpus};
    sh_launch_release(&s->launch);
    SH_TRY(sh_launch_make(&lo, &s->launch));
    sh_child_spec spec = {
        .argv = s->launch.argv, .env = s->launch.env, .log = s->o.store->log, .keep_fd = -1, .death_signal = SIGTERM};
    sh_logtail_mark(&s->tail);
    s->group_started = sh_now();
    s->group_gone = 0;
    SH_TRY(sh_child_start(&spec, &s->group));
    s->group_on = true;
    return SH_OK;
}

static const Shoal__GroupState *our_group(const sh_session *s) {
    for (size_t i = 0; s->last && i < s->last->n_group; i++)
        if (strcmp(s->last->group[i]->group, s->group_name) == 0) return s->last->group[i];
    return NULL;
}

static void say_first_line(sh_session *s, const Shoal__GroupState *g) {
    const sh_shared_options *o = s->o.shared;
    sh_progress_say(s->o.progress, "start", "%s, %s, mode %s, KV %s, %lld tokens of KV fit, %d in one sequence",
                    s->o.model_name, g->plan ? g->plan : "one stage", sh_mode_name(sh_options_mode(o)),
                    sh_kv_type_name(sh_options_kv(o)), (long long)g->kv_total, g->kv_tokens);
    for (size_t i = 0; i < g->n_note; i++) sh_progress_say(s->o.progress, "note", "%s", g->note[i]);
    s->said_first = true;
}

/* Ends and notes a group that is lost; the next round starts another, unless its fault would come again. */
static sh_status lose_group(sh_session *s, const char *why) {
    const Shoal__GroupState *g = our_group(s);
    bool ran = sh_child_poll(&s->group), lasting = g && g->has_lasting && g->lasting;
    snprintf(s->of_group.reason, sizeof s->of_group.reason, "%s", why);
    end_group(s);
    if (lasting) SH_FAIL(SH_EFORMAT, "%s", s->of_group.reason);
    if (!ran && !*why) describe(s, &s->group, &s->of_group);
    return note_failure(s, &s->of_group, "group");
}

/* The launcher has ended; why, its ranks have told the coordinator, if they could. */
static sh_status mourn_group(sh_session *s, const char *fault) {
    if (s->group_gone <= 0) s->group_gone = sh_now();
    if (!fault && sh_now() - s->group_gone < FAULT_WAIT) return SH_OK;
    return lose_group(s, fault ? fault : "");
}

static sh_status tend_group(sh_session *s) {
    if (!s->group_on) {
        if (s->groups && sh_now() < s->of_group.not_before) return SH_OK;
        return start_group(s);
    }
    const Shoal__GroupState *g = our_group(s);
    const char *fault = g && g->fault && *g->fault ? g->fault : NULL;
    if (!sh_child_poll(&s->group)) return mourn_group(s, fault);
    if (!g) {
        if (s->group_seen) return lose_group(s, "the coordinator has given it up");
        if (sh_now() - s->group_started <= SH_SESSION_CONNECT) return SH_OK;
        char why[400];
        snprintf(why, sizeof why, "no rank connected within %.0f s%s%.300s", SH_SESSION_CONNECT,
                 s->o.hosts ? " from " : "", s->o.hosts ? s->o.hosts : "");
        return lose_group(s, why);
    }
    s->group_seen = true;
    if (strcmp(g->state, "lost") == 0) return lose_group(s, fault ? fault : "fell silent");
    if (strcmp(g->state, "ready") == 0 && !s->group_ready) {
        s->group_ready = true;
        s->work_began = sh_now();
        if (!s->said_first) say_first_line(s, g);
    }
    return SH_OK;
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

/* Asks the coordinator; *answered false when it did not answer in time. Fails when the job can never finish. */
static sh_status ask_status(sh_session *s, bool *answered) {
    *answered = false;
    if (!s->client && sh_client_open(s->endpoint, s->over_tcp ? s->keys : NULL, STATUS_CALL_MS, &s->client) != SH_OK)
        return SH_OK;
    Shoal__Request all = SHOAL__REQUEST__INIT;
    Shoal__JobRequest request = SHOAL__JOB_REQUEST__INIT;
    request.status = &all;
    Shoal__JobReply *reply = NULL;
    if (sh_client_call(s->client, &request, &reply) != SH_OK) {
        sh_client_close(&s->client); /* a late answer must not be taken for the next one */
        return SH_OK;
    }
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
    const Shoal__GroupState *g = our_group(s);
    sh_progress_view v = {.total = s->total > s->o.lines ? s->total : s->o.lines,
                          .done = s->done,
                          .errors = s->errors,
                          .tokens_in = s->tokens_in,
                          .tokens_out = s->tokens_out,
                          .ranks = s->o.ranks,
                          .ranks_up = g ? g->ranks_up : 0,
                          .state = s->group_ready ? ""
                                   : g            ? g->state
                                                  : "starting"};
    sh_progress_update(s->o.progress, &v, at_once);
}

/* One round; *finished when every request has its row and all of the input was taken. */
static sh_status work_round(sh_session *s, bool *finished) {
    bool answered = false;
    if (s->coordinators == 0) return renew_coordinator(s);
    if (!sh_child_poll(&s->coordinator)) {
        describe(s, &s->coordinator, &s->of_coordinator);
        return renew_coordinator(s);
    }
    SH_TRY(ask_status(s, &answered));
    if (!answered && sh_now() - s->heard > SH_SESSION_SILENCE) {
        snprintf(s->of_coordinator.reason, sizeof s->of_coordinator.reason, "did not answer for %.0f s",
                 SH_SESSION_SILENCE);
        return renew_coordinator(s);
    }
    if (submit_now(s) != SUBMIT_DONE) SH_TRY(tend_submit(s));
    *finished = s->finished && submit_now(s) == SUBMIT_DONE;
    if (*finished && s->total != s->o.lines)
        SH_FAIL(SH_EINPUT, "-i: %s: changed while it was read: it had %llu requests, the job has %llu", s->o.input,
                (unsigned long long)s->o.lines, (unsigned long long)s->total);
    if (*finished || !answered) return SH_OK;
    if (!s->finished) SH_TRY(tend_group(s));
    show(s, false);
    const char *warning;
    while ((warning = sh_logtail_next_warning(&s->tail))) sh_progress_warn(s->o.progress, "%s", warning);
    return SH_OK;
}

/* Stages whose times show work. */
static int stages_reported(const Shoal__GroupState *g) {
    int n = 0;
    for (size_t i = 0; i < g->n_times; i++) {
        Shoal__StageTimes *t = shoal__stage_times__unpack(NULL, g->times[i].len, g->times[i].data);
        if (!t) continue;
        n += t->steps > 0;
        shoal__stage_times__free_unpacked(t, NULL);
    }
    return n;
}

/* Ranks report their times once a second: a job that was over sooner waits for the first report, if anybody will read
 * it. */
static void await_times(sh_session *s) {
    double until = sh_now() + 1.5;
    bool answered = true;
    while (s->o.progress->style != SH_PROGRESS_NONE && s->group_ready && sh_now() < until && answered) {
        const Shoal__GroupState *g = our_group(s);
        if (!g || stages_reported(g) >= s->o.ranks) return;
        sh_sleep(0.05);
        if (ask_status(s, &answered) != SH_OK) return;
    }
}

sh_status sh_session_drive(sh_session *s) {
    double began = sh_now();
    bool finished = false;
    while (!finished) {
        if (*s->o.interrupted) SH_FAIL(SH_ECANCELLED, "interrupted");
        SH_TRY(work_round(s, &finished));
        /* Short jobs are not made to wait for the next look; long ones are not looked at too often. */
        if (!finished) sh_sleep(sh_now() - began < 10 ? 0.02 : 0.1);
    }
    show(s, true);
    if (s->work_began > 0) s->worked += sh_now() - s->work_began;
    s->work_began = 0;
    await_times(s);
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

void sh_session_stop(sh_session *s, bool finished) {
    if (finished && s->coordinator.running) {
        Shoal__JobRequest request = SHOAL__JOB_REQUEST__INIT;
        request.has_shutdown = request.shutdown = 1;
        Shoal__JobReply *reply = NULL;
        if (!s->client)
            SH_IGNORE(sh_client_open(s->endpoint, s->over_tcp ? s->keys : NULL, STATUS_CALL_MS, &s->client));
        if (s->client && sh_client_call(s->client, &request, &reply) == SH_OK)
            shoal__job_reply__free_unpacked(reply, NULL);
        double until = sh_now() + (s->group_ready ? SH_RUN_GRACE : 0);
        while (sh_child_poll(&s->group) && sh_now() < until) sh_sleep(0.01);
    } else {
        if (sh_child_poll(&s->coordinator))
            kill(-s->coordinator.pid, SIGTERM); /* both at once: it saves while the ranks end */
    }
    sh_client_close(&s->client);
    end_group(s);
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
    sh_launch_release(&s->launch);
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
