/*
 * Jobs: their names, lines, counts and answers. Everything here is written through the store's open transaction; counts
 * are kept in memory, so that a status costs nothing. Knows nothing of groups.
 */
#ifndef SH_COORDINATOR_JOBS_H
#define SH_COORDINATOR_JOBS_H

#include "coordinator/intake.h"
#include "coordinator/store.h"
#include "coordinator/tail.h"
#include "proto/job.pb-c.h"

#define SH_MAX_JOBS     100000
#define SH_MAX_JOB_NAME 255
#define SH_WARNINGS     64 /* the last ones are kept */

typedef struct sh_job_entry {
    sh_job job;
    sh_intake_options options;
    uint64_t live;  /* tokens that came in and are not in job.tokens_out: not stored yet */
    bool dirty;     /* the stored row is older than this one */
    bool warned;    /* once per job and incarnation */
    uint64_t sweep; /* cancelled: requests up to this key are answered; UINT64_MAX: all */
    sh_tail tail;   /* what of it waits to be given out; dispatch says what does not any more */
} sh_job_entry;

typedef struct sh_jobs sh_jobs;

/* Borrows all; reads the jobs of former incarnations from the store. defaults: for what a submit does not say. */
sh_status sh_jobs_create(sh_store *s, sh_intake *in, const sh_intake_options *defaults, sh_jobs **out);
void sh_jobs_destroy(sh_jobs **j);
int sh_jobs_count(const sh_jobs *j);
sh_job_entry *sh_jobs_at(sh_jobs *j, int i);
sh_job_entry *sh_jobs_find(sh_jobs *j, uint64_t id); /* NULL: no such job */

/* Opens a job or goes on with the one of this name. SH_EINPUT when it cannot go on (the text is for the client). */
sh_status sh_jobs_submit_open(sh_jobs *j, const char *name, const Shoal__JobOptions *o, sh_job_entry **out);
/* Takes lines in order; those that cannot run are answered at once. A line that is there already is passed over. */
sh_status sh_jobs_submit_lines(sh_jobs *j, sh_job_entry *e, Shoal__Line *const *line, size_t n);
sh_status sh_jobs_submit_close(sh_jobs *j, sh_job_entry *e);
/* Lines were added that are not committed yet: they must not be given to a group. */
bool sh_jobs_has_uncommitted(const sh_jobs *j);

/* Intake speaks with this job's options from here on. */
void sh_jobs_use(sh_jobs *j, const sh_job_entry *e);
/* The result of a request. ok: not an error row. */
sh_status sh_jobs_answer(sh_jobs *j, uint64_t key, uint64_t job, uint64_t number, const sh_buf *row, bool ok,
                         uint64_t tokens_in);
sh_status sh_jobs_refuse(sh_jobs *j, const sh_stored_request *r, int status, const char *code, const char *param,
                         const char *message);
/* Nothing more of this job is given out; its waiting requests are answered by sh_jobs_sweep, some at a time. */
sh_status sh_jobs_cancel(sh_jobs *j, sh_job_entry *e);
/* *more: call again. */
sh_status sh_jobs_sweep(sh_jobs *j, bool *more);
/* Marks all unfinished jobs as failed. They go on when submitted again. */
sh_status sh_jobs_fail(sh_jobs *j, const char *why);
/* Takes all of these up again. */
void sh_jobs_retry(sh_jobs *j);

bool sh_jobs_is_dirty(const sh_jobs *j);
/* Writes counts that changed, then commits. */
sh_status sh_jobs_commit(sh_jobs *j);
void sh_jobs_fill(const sh_job_entry *e, Shoal__JobCounts *c); /* texts borrowed */
/* Warnings since number `after`; *last is the number of the newest. Borrowed. */
int sh_jobs_warnings(const sh_jobs *j, uint64_t after, char *text[SH_WARNINGS], uint64_t *last);

#endif
