/*
 * Giving out: what came back from lost groups, then what the store has, in the order of its lines and at the end of a
 * job longest first (tail.h); and at the end of all work from groups that have much to those that have nothing. Which
 * group gets what is allot.c's; the books are dispatch.c's. See dispatch.h.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "coordinator/dispatch_int.h"

#define FETCH        64   /* lines taken from the store at once */
#define WAITING_MOST 4096 /* requests in hand that fit no group with room: no more are taken from the store */
#define MOVE_AT_ONCE 64

typedef struct fetched { /* a line on its way from the store to a group */
    sh_stored_request r;
    char *text;
} fetched;

typedef struct fetching {
    sh_dispatch *d;
    fetched line[FETCH];
    int n;
    uint64_t last;
} fetching;

static sh_status fetch_line(void *ctx, const sh_stored_request *r) {
    fetching *f = ctx;
    f->last = r->key;
    if (r->done || sh_dispatch_find(f->d, r->key)) return SH_OK; /* adopted from a group, or came back from one */
    char *text = malloc(r->len + 1);
    if (!text) SH_FAIL(SH_EMEMORY, "no memory for a line of %zu bytes", r->len);
    memcpy(text, r->line, r->len);
    f->line[f->n] = (fetched){*r, text};
    f->line[f->n].r.line = text;
    f->line[f->n++].r.custom_id = NULL; /* of the statement that is open no longer; parsing gives it again */
    return SH_OK;
}

/* A leader that cannot be reached gets nothing more. Its group is not lost yet: the leader may have said why it went,
 * which waits to be heard, or come back over a new connection. sh_dispatch_watch waits a little for either. */
static sh_status give(sh_dispatch *d, sh_running *r, sh_group *g) {
    if (!sh_running_is_saved(r)) { /* tokens that its last group had sent already came while it waited */
        d->unsaved = true;
        SH_TRY(sh_dispatch_save_one(d, r));
        return sh_dispatch_wait(d, r);
    }
    sh_status st = sh_dispatch_send_work(d, r, g);
    if (st == SH_EPEER) {
        snprintf(g->gone_why, sizeof g->gone_why, "%s", sh_error_text());
        g->gone = sh_now();
        return sh_dispatch_wait(d, r);
    }
    SH_TRY(st);
    sh_dispatch_set_owner(d, r, g);
    return SH_OK;
}

/* Refuses and frees one that waits for a group that cannot be expected any more. */
static sh_status refuse_hopeless(sh_dispatch *d, sh_running *r, bool *refused) {
    char text[200];
    int most = 0;
    sh_allot s = sh_dispatch_allot(d);
    *refused = sh_allot_is_hopeless(&s, r, d->expected, &most);
    if (!*refused) return SH_OK;
    snprintf(text, sizeof text,
             "prompt of %zu tokens and max_tokens %d make %lld: the largest group can hold %d tokens of one sequence",
             r->request.prompt.n, r->request.sampling.max_tokens, (long long)sh_allot_need(r), most);
    SH_TRY(sh_dispatch_refuse(d, r, 413, "too_long", "prompt", text));
    sh_dispatch_remove(d, r);
    return SH_OK;
}

/* A parsed line: to a group, or answered at once where there is nothing to compute. */
static sh_status start(sh_dispatch *d, const sh_stored_request *q) {
    sh_job_entry *e = sh_jobs_find(d->jobs, q->job);
    sh_running *r = NULL;
    bool refused = false;
    if (!e || e->job.state == SH_JOB_CANCELLED) return SH_OK; /* since the last commit, which the query went by */
    sh_jobs_use(d->jobs, e);
    SH_TRY(sh_running_create(d->intake, d->store, q, &r));
    sh_dispatch_insert(d, r);
    if (q->length > 0) sh_tail_take(&e->tail, q->kind, q->length);
    if (r->request.status) {
        sh_stored_request bad = *q;
        bad.custom_id = r->request.custom_id;
        SH_TRY(sh_jobs_refuse(d->jobs, &bad, r->request.status, r->request.code, r->request.param, r->request.message));
        sh_dispatch_remove(d, r);
        return SH_OK;
    }
    if (r->request.sampling.max_tokens == 0 && !r->request.sampling.score_prompt) {
        r->finish = SH_FINISH_LENGTH;
        return sh_dispatch_answer(d, r);
    }
    sh_allot s = sh_dispatch_allot(d);
    sh_group *g = sh_allot_next(&s, r);
    if (g) return give(d, r, g);
    SH_TRY(sh_dispatch_wait(d, r));
    return refuse_hopeless(d, r, &refused);
}

static bool is_wanted(const sh_dispatch *d, const sh_running *r) {
    const sh_job_entry *e = sh_jobs_find(d->jobs, r->job);
    return e && e->job.state != SH_JOB_FAILED;
}

static bool is_proved(const sh_dispatch *d, const sh_running *r) {
    return d->progress > r->seen;
}

/* No other request is left that could show whether groups work without this one. */
static bool is_last(const sh_dispatch *d) {
    if (!d->exhausted) return false;
    for (int i = 0; i < d->n; i++)
        if (d->group[i]->given) return false;
    for (int i = 0; i < d->n_waiting; i++)
        if (!d->waiting[i]->convicted) return false;
    return true;
}

/* Groups end whenever they work on r, and others got something done meanwhile (or the job did before, where nothing
 * else is left): an error row. Where nothing ever worked, it is tried on, until the supervisor gives the groups up. */
static sh_status judge(sh_dispatch *d, sh_running *r, bool last, bool *gone) {
    const sh_job_entry *e = sh_jobs_find(d->jobs, r->job);
    *gone = is_proved(d, r) || (last && (d->progress > 0 || (e && e->job.done > e->job.errors)));
    if (!*gone && last) r->convicted = false;
    if (!*gone) return SH_OK;
    char text[1400];
    snprintf(text, sizeof text,
             "the worker ended %d times while working on this request, %d times on it alone: %.1000s", r->lost,
             r->alone, r->fault ? r->fault : "for no known reason");
    sh_warn("request %s (line %" PRIu64 ") is given up: %s",
            r->request.custom_id ? r->request.custom_id : "without a name", r->request.number, text);
    SH_TRY(sh_dispatch_refuse(d, r, 500, "worker_ended", "", text));
    sh_dispatch_remove(d, r);
    return SH_OK;
}

/* Answers what waits in vain. */
static sh_status give_up_waiting(sh_dispatch *d) {
    bool last = d->n_waiting > 0 && is_last(d);
    for (int i = 0; i < d->n_waiting;) {
        sh_running *r = d->waiting[i];
        bool gone = false;
        if (!is_wanted(d, r)) {
            i++;
            continue;
        }
        if (r->convicted)
            SH_TRY(judge(d, r, last, &gone));
        else
            SH_TRY(refuse_hopeless(d, r, &gone));
        i += !gone;
    }
    return SH_OK;
}

/* Chooses the tester, and gives it the oldest suspect once it has nothing else in hand that could be to blame. */
static sh_status give_suspect(sh_dispatch *d) {
    sh_running *first = NULL;
    for (int i = 0; i < d->n_waiting && !first; i++) {
        sh_running *r = d->waiting[i];
        if (sh_dispatch_is_suspect(r) && !r->convicted && is_wanted(d, r)) first = r;
    }
    sh_allot s = sh_dispatch_allot(d);
    sh_group *t = sh_allot_tester(&s, first);
    d->tester = t;
    if (!first || !t || t->unproven) return SH_OK;
    sh_dispatch_unwait(d, first);
    return give(d, first, t);
}

/* The group that it was taken from would do as well as the one that it was taken for. */
static sh_group *group_for(const sh_dispatch *d, const sh_allot *s, const sh_running *r) {
    sh_group *meant = r->meant ? sh_dispatch_group(d, r->meant) : NULL;
    return meant && sh_allot_has_room(s, meant) ? meant : sh_allot_next(s, r);
}

static sh_status give_waiting(sh_dispatch *d) {
    SH_TRY(give_up_waiting(d));
    if (!d->unsaved) SH_TRY(give_suspect(d));
    for (int i = 0; i < d->n_waiting && !d->unsaved;) { /* a group lost just now: what came back is committed first */
        sh_running *r = d->waiting[i];
        sh_allot s = sh_dispatch_allot(d);
        if (!sh_allot_next(&s, NULL)) return SH_OK;
        sh_group *g = sh_dispatch_is_suspect(r) || !is_wanted(d, r) ? NULL : group_for(d, &s, r);
        if (!g) {
            i++;
            continue;
        }
        sh_dispatch_unwait(d, r);
        SH_TRY(give(d, r, g));
    }
    return SH_OK;
}

static void release_lines(fetching *f) {
    for (int i = 0; i < f->n; i++) free(f->line[i].text);
    f->n = 0;
}

/* The job of the oldest request that nobody took from the store yet: the next place is its. None: exhausted. */
static sh_status find_front(sh_dispatch *d, sh_job_entry **e) {
    uint64_t key = 0, job = 0;
    for (;;) {
        SH_TRY(sh_store_front(d->store, d->cursor, &key, &job));
        if (key == 0 || !sh_dispatch_find(d, key)) break;
        d->cursor = key; /* adopted, came back, or one that went first as the longest */
    }
    if (key == 0) d->exhausted = true;
    if (key) d->cursor = key - 1; /* lines of cancelled jobs before it are not walked again */
    *e = key ? sh_jobs_find(d->jobs, job) : NULL;
    return SH_OK;
}

static sh_status pass_longest(const sh_dispatch *d, sh_job_entry *e, int kind) {
    bool found = false;
    SH_TRY(sh_store_longest(d->store, e->job.id, kind, &e->tail.next[kind].length, &e->tail.next[kind].key, &found));
    e->tail.next[kind].none = !found;
    return SH_OK;
}

/* Each request is passed over once in its life: all of a job are known, and who is in hand comes back here no more. */
static sh_status find_longest(const sh_dispatch *d, sh_job_entry *e) {
    for (int k = 0; k < SH_TAIL_KINDS; k++)
        while (!e->tail.next[k].none && (e->tail.next[k].key == 0 || sh_dispatch_find(d, e->tail.next[k].key)))
            SH_TRY(pass_longest(d, e, k));
    return SH_OK;
}

static sh_status give_this(sh_dispatch *d, sh_job_entry *e, int kind) {
    fetching f = {.d = d};
    bool found;
    sh_status st = sh_store_request_get(d->store, e->tail.next[kind].key, fetch_line, &f, &found);
    if (st == SH_OK) st = f.n ? start(d, &f.line[0].r) : pass_longest(d, e, kind); /* none: answered meanwhile */
    release_lines(&f);
    return st;
}

/* At the end of a job that is known as a whole, its longest request goes out of turn. */
static sh_status give_longest(sh_dispatch *d, sh_job_entry *e, bool *given) {
    sh_allot s = sh_dispatch_allot(d);
    sh_tail *t = &e->tail;
    int places = sh_allot_places(&s);
    *given = false;
    if (e->job.state != SH_JOB_RUNNING || !e->job.closed || !sh_tail_may_have_begun(t, places)) return SH_OK;
    SH_TRY(find_longest(d, e));
    int k = sh_tail_longest(t);
    if (k < 0 || !sh_tail_has_begun(t, sh_tail_expected(t, k, t->next[k].length), places)) return SH_OK;
    *given = true;
    return give_this(d, e, k);
}

/* Lines of the store in their order; those that found no room are fetched again later. */
static sh_status give_page(sh_dispatch *d) {
    fetching f = {.d = d};
    sh_allot s = sh_dispatch_allot(d);
    sh_status st = sh_store_pending(d->store, 0, d->cursor, sh_allot_room(&s, FETCH), fetch_line, &f);
    int i = 0;
    for (; st == SH_OK && i < f.n && !d->unsaved && sh_allot_next(&s, NULL); i++) {
        st = start(d, &f.line[i].r);
        if (st == SH_OK) d->cursor = f.line[i].r.key;
    }
    if (st == SH_OK && i == f.n) {
        if (f.last) d->cursor = f.last;
        d->exhausted = f.last == 0;
    }
    release_lines(&f);
    return st;
}

static sh_status give_fresh(sh_dispatch *d) {
    sh_allot s = sh_dispatch_allot(d);
    while (!d->exhausted && !d->unsaved && d->n_waiting < WAITING_MOST && sh_allot_next(&s, NULL)) {
        sh_job_entry *e = NULL;
        bool given = false;
        SH_TRY(find_front(d, &e));
        if (e) SH_TRY(give_longest(d, e, &given));
        if (!given && !d->exhausted) SH_TRY(give_page(d));
    }
    return SH_OK;
}

/* The request that was taken up last, of those that `from` has not begun and `to` can hold; none that was taken over
 * from somebody slow. */
static sh_running *last_unproven(const sh_dispatch *d, const sh_group *from, const sh_group *to) {
    sh_running *best = NULL;
    for (int i = 0; i < SH_DISPATCH_BUCKETS; i++)
        for (sh_running *r = d->bucket[i]; r; r = r->next)
            if (r->group == from->number && r->unproven && !r->moved && sh_running_is_saved(r) &&
                sh_allot_fits(to, r) && (!best || r->turn > best->turn))
                best = r;
    return best;
}

/* What others run goes to a group that has nothing, where that is worth it, and each but once. Tokens must be on disk
 * before it is given out again, so it goes by way of the waiting list. */
static sh_status take_over(sh_dispatch *d, const sh_group *to) {
    sh_group half = *to; /* counts what it will have */
    for (int i = 0; i < SH_DISPATCH_BUCKETS; i++)
        for (sh_running *r = d->bucket[i]; r && half.given < to->max_seqs; r = r->next) {
            sh_group *from = sh_dispatch_group(d, r->group);
            if (!from || from == to || r->moved || r->testing) continue;
            if (!sh_allot_is_quicker(&half, from, r) && !sh_allot_is_half(&half, from, r)) continue;
            sh_dispatch_say_cancel(d, from, r->key);
            sh_dispatch_set_owner(d, r, NULL);
            r->moved = true;
            r->meant = to->number;
            SH_TRY(sh_dispatch_save_one(d, r));
            SH_TRY(sh_dispatch_wait(d, r));
            d->unsaved = true;
            half.given++;
        }
    return SH_OK;
}

/* Nothing is left to give out: the end of the work should not wait for one group while others have nothing to do. */
static sh_status even_out(sh_dispatch *d) {
    sh_allot s = sh_dispatch_allot(d);
    sh_group *from = NULL, *to = NULL;
    if (!d->exhausted || d->n_waiting > 0) return SH_OK;
    for (int k = 0; k < MOVE_AT_ONCE && !d->unsaved && sh_allot_uneven(&s, &from, &to); k++) {
        sh_running *r = last_unproven(d, from, to);
        if (!r) break;
        sh_dispatch_say_cancel(d, from, r->key);
        sh_dispatch_set_owner(d, r, NULL);
        SH_TRY(give(d, r, to));
    }
    to = sh_allot_idle(&s);
    return to && !d->unsaved ? take_over(d, to) : SH_OK;
}

sh_status sh_dispatch_give(sh_dispatch *d) {
    SH_TRY(give_waiting(d));
    if (!d->unsaved) SH_TRY(give_fresh(d));
    return d->unsaved ? SH_OK : even_out(d);
}
