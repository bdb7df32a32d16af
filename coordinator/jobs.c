/* Jobs and their lines. See jobs.h. */
#include "coordinator/jobs.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "coordinator/results.h"
#include "proto/client.h"

#define SWEEP_ROWS 500

struct sh_jobs {
    sh_store *store;
    sh_intake *intake;
    sh_intake_options defaults;
    sh_job_entry **entry; /* by id; stable addresses */
    int n, cap;
    bool uncommitted;
    char *warning[SH_WARNINGS]; /* ring: number w is at w % SH_WARNINGS */
    uint64_t n_warnings;
    sh_buf row;
};

/* --- options as text -----------------------------------------------------------------------------------------------
 */

static const char *const option_names[] = {"--seed", "--default-max-tokens", "--max-context", "--lenient"};
enum { N_OPTIONS = 4 };

static void options_split(const sh_intake_options *o, long long v[N_OPTIONS]) {
    v[0] = (long long)o->seed, v[1] = o->default_max_tokens, v[2] = o->max_context, v[3] = o->lenient;
}

static char *options_text(const sh_intake_options *o) {
    long long v[N_OPTIONS];
    char text[200];
    options_split(o, v);
    snprintf(text, sizeof text, "%lld %lld %lld %lld", v[0], v[1], v[2], v[3]);
    return strdup(text);
}

static sh_status options_read(const char *text, sh_intake_options *o) {
    long long v[N_OPTIONS];
    if (sscanf(text, "%lld %lld %lld %lld", &v[0], &v[1], &v[2], &v[3]) != N_OPTIONS)
        SH_FAIL(SH_EFORMAT, "options of a stored job: \"%s\" is not four numbers", text);
    *o = (sh_intake_options){(uint64_t)v[0], (int)v[1], (int)v[2], v[3] != 0};
    return SH_OK;
}

static sh_status options_compare(const char *name, const sh_intake_options *have, const sh_intake_options *want) {
    long long a[N_OPTIONS], b[N_OPTIONS];
    options_split(have, a);
    options_split(want, b);
    for (int i = 0; i < N_OPTIONS; i++)
        if (a[i] != b[i])
            SH_FAIL(SH_EINPUT, "job %s: %s was %lld when it began: it cannot go on with %lld", name, option_names[i],
                    a[i], b[i]);
    return SH_OK;
}

/* --- life ----------------------------------------------------------------------------------------------------------
 */

static sh_status add_entry(void *ctx, sh_job *job) {
    sh_jobs *j = ctx;
    if (j->n == j->cap) {
        int cap = j->cap ? j->cap * 2 : 16;
        sh_job_entry **p = realloc(j->entry, (size_t)cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory for jobs");
        j->entry = p;
        j->cap = cap;
    }
    sh_job_entry *e = calloc(1, sizeof *e);
    if (!e) SH_FAIL(SH_EMEMORY, "no memory for a job");
    e->job = *job;
    sh_tail_init(&e->tail);
    j->entry[j->n++] = e;
    if (!job->name || !job->options) SH_FAIL(SH_EMEMORY, "no memory for a job");
    return options_read(job->options, &e->options);
}

static void add_lengths(void *ctx, int kind, int64_t sum, int64_t longest) {
    sh_tail_add(ctx, kind, sum, longest);
}

sh_status sh_jobs_create(sh_store *s, sh_intake *in, const sh_intake_options *defaults, sh_jobs **out) {
    sh_jobs *j = calloc(1, sizeof *j);
    if (!j) SH_FAIL(SH_EMEMORY, "no memory for jobs");
    j->store = s;
    j->intake = in;
    j->defaults = *defaults;
    sh_buf_init(&j->row, 0);
    sh_status st = sh_store_jobs(s, add_entry, j);
    for (int i = 0; st == SH_OK && i < j->n; i++)
        if (j->entry[i]->job.state != SH_JOB_DONE)
            st = sh_store_lengths(s, j->entry[i]->job.id, add_lengths, &j->entry[i]->tail);
    if (st != SH_OK) {
        sh_jobs_destroy(&j);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = j;
    return SH_OK;
}

void sh_jobs_destroy(sh_jobs **jp) {
    sh_jobs *j = *jp;
    if (!j) return;
    for (int i = 0; i < j->n; i++) {
        sh_job_release(&j->entry[i]->job);
        free(j->entry[i]);
    }
    for (int i = 0; i < SH_WARNINGS; i++) free(j->warning[i]);
    sh_buf_release(&j->row);
    free(j->entry);
    free(j);
    *jp = NULL;
}

int sh_jobs_count(const sh_jobs *j) {
    return j->n;
}

sh_job_entry *sh_jobs_at(sh_jobs *j, int i) {
    return j->entry[i];
}

sh_job_entry *sh_jobs_find(sh_jobs *j, uint64_t id) {
    int low = 0, high = j->n; /* ids ascend */
    while (low < high) {
        int mid = (low + high) / 2;
        if (j->entry[mid]->job.id < id)
            low = mid + 1;
        else
            high = mid;
    }
    return low < j->n && j->entry[low]->job.id == id ? j->entry[low] : NULL;
}

void sh_jobs_use(sh_jobs *j, const sh_job_entry *e) {
    sh_intake_set_options(j->intake, &e->options);
}

bool sh_jobs_has_uncommitted(const sh_jobs *j) {
    return j->uncommitted;
}

static void warn(sh_jobs *j, sh_job_entry *e, const char *text) {
    if (!text[0] || e->warned) return;
    e->warned = true;
    char **slot = &j->warning[++j->n_warnings % SH_WARNINGS];
    free(*slot);
    *slot = strdup(text);
}

int sh_jobs_warnings(const sh_jobs *j, uint64_t after, char *text[SH_WARNINGS], uint64_t *last) {
    int n = 0;
    uint64_t from = j->n_warnings >= SH_WARNINGS ? j->n_warnings - SH_WARNINGS + 1 : 1;
    for (uint64_t w = after + 1 > from ? after + 1 : from; w <= j->n_warnings; w++)
        if (j->warning[w % SH_WARNINGS]) text[n++] = j->warning[w % SH_WARNINGS];
    *last = j->n_warnings;
    return n;
}

/* --- answers -------------------------------------------------------------------------------------------------------
 */

static void settle(sh_job_entry *e) {
    sh_job *job = &e->job;
    if (job->state == SH_JOB_RUNNING && job->closed && job->done == job->accepted) job->state = SH_JOB_DONE;
}

sh_status sh_jobs_answer(sh_jobs *j, uint64_t key, uint64_t job, uint64_t number, const sh_buf *row, bool ok,
                         uint64_t tokens_in) {
    sh_job_entry *e = sh_jobs_find(j, job);
    bool added = false;
    SH_TRY(sh_store_result_add(j->store, key, job, number, row->data, row->len, &added));
    if (!added || !e) return SH_OK;
    e->job.done++;
    e->job.errors += !ok;
    e->job.tokens_in += tokens_in;
    e->dirty = true;
    settle(e);
    return SH_OK;
}

sh_status sh_jobs_refuse(sh_jobs *j, const sh_stored_request *r, int status, const char *code, const char *param,
                         const char *message) {
    sh_buf_clear(&j->row);
    SH_TRY(sh_result_error_row(r->custom_id, r->hash, r->number, status, code, message, param, (int64_t)time(NULL),
                               &j->row));
    return sh_jobs_answer(j, r->key, r->job, r->number, &j->row, false, 0);
}

/* --- submit --------------------------------------------------------------------------------------------------------
 */

static sh_status check_name(const char *name) {
    size_t n = strlen(name);
    if (n < 1 || n > SH_MAX_JOB_NAME) SH_FAIL(SH_EINPUT, "name: %zu bytes: allowed are 1 to %d", n, SH_MAX_JOB_NAME);
    for (const char *c = name; *c; c++)
        if ((unsigned char)*c < 32 || *c == 127)
            SH_FAIL(SH_EINPUT, "name: a control character at byte %td is not allowed", c - name);
    return SH_OK;
}

/* A job that failed is tried again. */
static void take_up(sh_job_entry *e) {
    sh_job *job = &e->job;
    job->state = job->closed ? SH_JOB_RUNNING : SH_JOB_RECEIVING;
    free(job->failure);
    job->failure = NULL;
    e->dirty = true;
    settle(e);
}

static sh_status go_on(sh_job_entry *e, const sh_intake_options *want) {
    sh_job *job = &e->job;
    SH_TRY(options_compare(job->name, &e->options, want));
    if (job->state == SH_JOB_CANCELLED)
        SH_FAIL(SH_EINPUT, "job %s was cancelled: submit it under another name", job->name);
    if (job->state == SH_JOB_FAILED) take_up(e);
    return SH_OK;
}

sh_status sh_jobs_submit_open(sh_jobs *j, const char *name, const Shoal__JobOptions *o, sh_job_entry **out) {
    SH_TRY(check_name(name));
    sh_intake_options want = j->defaults;
    if (o && o->has_seed) want.seed = o->seed;
    if (o && o->has_default_max_tokens) want.default_max_tokens = o->default_max_tokens;
    if (o && o->has_lenient) want.lenient = o->lenient;
    if (want.default_max_tokens < 0)
        SH_FAIL(SH_EINPUT, "default_max_tokens: %d: allowed are 0 or more", want.default_max_tokens);
    for (int i = 0; i < j->n; i++)
        if (strcmp(j->entry[i]->job.name, name) == 0) {
            SH_TRY(go_on(j->entry[i], &want));
            *out = j->entry[i];
            return SH_OK;
        }
    if (j->n >= SH_MAX_JOBS) SH_FAIL(SH_ELIMIT, "this store has %d jobs: no more are allowed", SH_MAX_JOBS);
    sh_job job = {.name = strdup(name), .options = options_text(&want), .state = SH_JOB_RECEIVING};
    sh_status st = job.name && job.options ? sh_store_job_put(j->store, &job)
                                           : sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "no memory for a job");
    if (st != SH_OK) {
        sh_job_release(&job);
        return st;
    }
    SH_TRY(add_entry(j, &job));
    *out = j->entry[j->n - 1];
    return SH_OK;
}

/* Stores a parsed line; one that cannot run is answered at once, and its text is not kept. */
static sh_status add_request(sh_jobs *j, sh_job_entry *e, const Shoal__Line *line, const sh_request *r) {
    bool bad = r->status != 0, twice = false;
    sh_stored_request q = {.job = e->job.id,
                           .number = line->number,
                           .hash = r->hash,
                           .custom_id = r->custom_id,
                           .line = (const char *)line->text.data,
                           .len = bad ? 0 : line->text.len,
                           .kind = bad ? 0 : (int)sh_tail_kind_of(r),
                           .length = bad ? 0 : sh_tail_length_of(r)};
    SH_TRY(sh_store_request_add(j->store, &q, &q.key, &twice));
    e->job.accepted++;
    e->job.last = line->number;
    e->job.chain = sh_line_chain(e->job.chain, line->number, line->text.data, line->text.len);
    e->dirty = true;
    warn(j, e, r->warning);
    if (twice) {
        char text[SH_MAX_CUSTOM_ID + 100];
        snprintf(text, sizeof text, "custom_id: \"%s\" is that of an earlier line: allowed is each once in a job",
                 q.custom_id);
        q.custom_id = NULL;
        return sh_jobs_refuse(j, &q, 400, "duplicate_custom_id", "custom_id", text);
    }
    if (bad) return sh_jobs_refuse(j, &q, r->status, r->code, r->param, r->message ? r->message : "");
    sh_tail_add(&e->tail, q.kind, q.length, q.length);
    return SH_OK;
}

sh_status sh_jobs_submit_lines(sh_jobs *j, sh_job_entry *e, Shoal__Line *const *line, size_t n) {
    sh_jobs_use(j, e);
    for (size_t i = 0; i < n; i++) {
        if (line[i]->number <= e->job.last) continue;
        if (e->job.state == SH_JOB_FAILED)
            SH_FAIL(SH_EINPUT, "job %s: %s", e->job.name, e->job.failure ? e->job.failure : "failed");
        if (e->job.state != SH_JOB_RECEIVING)
            SH_FAIL(SH_EINPUT, "job %s is %s: it takes no more lines", e->job.name, sh_job_state_name(e->job.state));
        sh_request r = {0};
        sh_status st =
            sh_intake_line(j->intake, (const char *)line[i]->text.data, line[i]->text.len, line[i]->number, &r);
        j->uncommitted = true;
        if (st == SH_OK) st = add_request(j, e, line[i], &r);
        sh_request_release(&r);
        SH_TRY(st);
    }
    return SH_OK;
}

sh_status sh_jobs_submit_close(sh_jobs *j, sh_job_entry *e) {
    (void)j;
    if (e->job.state != SH_JOB_RECEIVING) return SH_OK;
    e->job.closed = true;
    e->job.state = SH_JOB_RUNNING;
    e->dirty = true;
    settle(e);
    return SH_OK;
}

/* --- ends ----------------------------------------------------------------------------------------------------------
 */

sh_status sh_jobs_cancel(sh_jobs *j, sh_job_entry *e) {
    (void)j;
    if (e->job.state == SH_JOB_DONE || e->job.state == SH_JOB_CANCELLED) return SH_OK;
    e->job.state = SH_JOB_CANCELLED;
    e->job.closed = true;
    e->job.tokens_out += e->live;
    e->live = 0;
    e->sweep = 0;
    e->dirty = true;
    return SH_OK;
}

typedef struct sweep {
    int n;
    uint64_t last;
    struct {
        uint64_t key, number, hash;
        char *custom_id;
    } row[SWEEP_ROWS];
} sweep;

static sh_status collect(void *ctx, const sh_stored_request *r) {
    sweep *s = ctx;
    char *id = r->custom_id ? strdup(r->custom_id) : NULL;
    if (r->custom_id && !id) SH_FAIL(SH_EMEMORY, "no memory for a request");
    s->row[s->n].key = s->last = r->key;
    s->row[s->n].number = r->number;
    s->row[s->n].hash = r->hash;
    s->row[s->n++].custom_id = id;
    return SH_OK;
}

static sh_status sweep_job(sh_jobs *j, sh_job_entry *e, sweep *s) {
    *s = (sweep){0};
    sh_status st = sh_store_pending(j->store, e->job.id, e->sweep, SWEEP_ROWS, collect, s);
    for (int i = 0; i < s->n; i++) {
        sh_stored_request q = {.key = s->row[i].key,
                               .job = e->job.id,
                               .number = s->row[i].number,
                               .hash = s->row[i].hash,
                               .custom_id = s->row[i].custom_id};
        if (st == SH_OK)
            st = sh_jobs_refuse(j, &q, 499, "cancelled", "", "the job was cancelled before this request was answered");
        free(s->row[i].custom_id);
    }
    SH_TRY(st);
    e->sweep = s->n ? s->last : UINT64_MAX;
    return SH_OK;
}

sh_status sh_jobs_sweep(sh_jobs *j, bool *more) {
    *more = false;
    for (int i = 0; i < j->n; i++) {
        sh_job_entry *e = j->entry[i];
        if (e->job.state != SH_JOB_CANCELLED || e->sweep == UINT64_MAX) continue;
        if (e->job.done == e->job.accepted) {
            e->sweep = UINT64_MAX;
            continue;
        }
        sweep *s = malloc(sizeof *s);
        if (!s) SH_FAIL(SH_EMEMORY, "no memory to cancel a job");
        sh_status st = sweep_job(j, e, s);
        free(s);
        *more = true;
        return st;
    }
    return SH_OK;
}

sh_status sh_jobs_fail(sh_jobs *j, const char *why) {
    for (int i = 0; i < j->n; i++) {
        sh_job_entry *e = j->entry[i];
        if (e->job.state != SH_JOB_RUNNING && e->job.state != SH_JOB_RECEIVING) continue;
        char *text = strdup(why);
        if (!text) SH_FAIL(SH_EMEMORY, "no memory for a job");
        free(e->job.failure);
        e->job.failure = text;
        e->job.state = SH_JOB_FAILED;
        e->dirty = true;
    }
    return SH_OK;
}

void sh_jobs_retry(sh_jobs *j) {
    for (int i = 0; i < j->n; i++)
        if (j->entry[i]->job.state == SH_JOB_FAILED) take_up(j->entry[i]);
}

bool sh_jobs_is_dirty(const sh_jobs *j) {
    bool dirty = sh_store_is_dirty(j->store);
    for (int i = 0; !dirty && i < j->n; i++) dirty = j->entry[i]->dirty;
    return dirty;
}

sh_status sh_jobs_commit(sh_jobs *j) {
    for (int i = 0; i < j->n; i++) {
        if (!j->entry[i]->dirty) continue;
        SH_TRY(sh_store_job_put(j->store, &j->entry[i]->job));
        j->entry[i]->dirty = false;
    }
    SH_TRY(sh_store_commit(j->store));
    j->uncommitted = false;
    return SH_OK;
}

void sh_jobs_fill(const sh_job_entry *e, Shoal__JobCounts *c) {
    shoal__job_counts__init(c);
    c->job = e->job.id;
    c->name = e->job.name;
    c->state = (char *)(uintptr_t)sh_job_state_name(e->job.state);
    c->total = e->job.accepted;
    c->done = e->job.done;
    c->errors = e->job.errors;
    c->tokens_in = e->job.tokens_in;
    c->tokens_out = e->job.tokens_out + e->live;
    c->failure = e->job.failure;
}
