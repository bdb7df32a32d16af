/* The job interface for C programs. See client.h. Knows the messages, not what becomes of them. */
#include "proto/client.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "common/clock.h"
#include "common/hash.h"
#include "common/utf8.h"
#include "common/limits.h"

#define BATCH_LINES 512
#define BATCH_BYTES ((size_t)1 << 20)
#define WINDOW      4 /* batches on their way before their acknowledgement */

struct sh_client {
    sh_wire *wire;
    char *endpoint;
    int timeout_ms;
    sh_buf out, in;
};

uint64_t sh_line_chain(uint64_t chain, uint64_t number, const void *text, size_t len) {
    return sh_hash64(sh_mix64(chain ^ number), text, len);
}

sh_status sh_client_open(const char *endpoint, const char *keys, int timeout_ms, sh_client **out) {
    sh_client *c = calloc(1, sizeof *c);
    if (!c || !(c->endpoint = strdup(endpoint))) {
        free(c);
        SH_FAIL(SH_EMEMORY, "%s: no memory for a client", endpoint);
    }
    c->timeout_ms = timeout_ms;
    sh_buf_init(&c->out, 0);
    sh_buf_init(&c->in, 0);
    sh_status st = sh_wire_connect(endpoint, keys, &c->wire);
    if (st != SH_OK) {
        sh_client_close(&c);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = c;
    return SH_OK;
}

void sh_client_close(sh_client **cp) {
    sh_client *c = *cp;
    if (!c) return;
    sh_wire_close(&c->wire);
    sh_buf_release(&c->out);
    sh_buf_release(&c->in);
    free(c->endpoint);
    free(c);
    *cp = NULL;
}

static sh_status send_request(sh_client *c, const Shoal__JobRequest *request) {
    sh_buf_clear(&c->out);
    SH_TRY(sh_buf_reserve(&c->out, shoal__job_request__get_packed_size(request)));
    c->out.len = shoal__job_request__pack(request, c->out.data);
    return sh_wire_send(c->wire, NULL, SH_WIRE_JOB, c->out.data, c->out.len);
}

/* Waits for the next reply. */
static sh_status take_reply(sh_client *c, Shoal__JobReply **reply) {
    double end = sh_now() + 1e-3 * c->timeout_ms;
    for (;;) {
        bool got = false, readable;
        char kind = 0;
        SH_TRY(sh_wire_recv(c->wire, NULL, &kind, &c->in, &got));
        if (got && kind == SH_WIRE_JOB) break;
        double left = end - sh_now();
        if (left <= 0)
            SH_FAIL(SH_EPEER,
                    "%s: no answer within %.3g s: is a coordinator listening there (shoal serve), with these keys?",
                    c->endpoint, 1e-3 * c->timeout_ms);
        if (!got) SH_TRY(sh_wire_poll(c->wire, -1, (int)(left * 1e3) + 1, &readable));
    }
    Shoal__JobReply *r = shoal__job_reply__unpack(NULL, c->in.len, c->in.data);
    if (!r) SH_FAIL(SH_EPEER, "%s: an answer that cannot be read: is it a coordinator of shoal?", c->endpoint);
    if (r->error) {
        sh_status st = sh_error_set(SH_EINPUT, __FILE__, __LINE__, "%s", r->error);
        shoal__job_reply__free_unpacked(r, NULL);
        return st;
    }
    *reply = r;
    return SH_OK;
}

sh_status sh_client_call(sh_client *c, const Shoal__JobRequest *request, Shoal__JobReply **reply) {
    SH_TRY(send_request(c, request));
    return take_reply(c, reply);
}

/* --- submitting a file ---------------------------------------------------------------------------------------------
 */

typedef struct reader {
    FILE *f;
    uint64_t number; /* of the last line */
    uint64_t chain;  /* over the lines so far that are not blank */
    bool end;
    sh_buf line;
} reader;

/* The next line without its end, cut to SH_MAX_LINE_BYTES + 1; *got false at the end of the file. */
static sh_status next_line(reader *r, bool *got) {
    sh_buf_clear(&r->line);
    if (r->end) {
        *got = false;
        return SH_OK;
    }
    size_t room = SH_MAX_LINE_BYTES + 1;
    bool any = false;
    char part[4096];
    size_t n = 0;
    int ch;
    while ((ch = getc_unlocked(r->f)) != EOF) {
        any = true;
        if (ch == '\n') break;
        if (r->line.len + n < room) part[n++] = (char)ch;
        if (n < sizeof part) continue;
        SH_TRY(sh_buf_add(&r->line, part, n));
        n = 0;
    }
    SH_TRY(sh_buf_add(&r->line, part, n));
    if (ch == EOF && ferror(r->f))
        SH_FAIL(SH_EIO, "input: cannot be read after line %llu", (unsigned long long)r->number);
    r->end = ch == EOF;
    r->number += any;
    while (r->line.len && r->line.data[r->line.len - 1] == '\r') r->line.data[--r->line.len] = 0;
    *got = any;
    return SH_OK;
}

static bool is_blank(const reader *r) {
    const sh_buf *b = &r->line;
    for (size_t i = r->number == 1 ? sh_utf8_mark(b->data, b->len) : 0; i < b->len; i++)
        if (b->data[i] != ' ' && b->data[i] != '\t' && b->data[i] != '\r') return false;
    return true;
}

typedef struct batch {
    Shoal__Line line[BATCH_LINES], *list[BATCH_LINES];
    size_t start[BATCH_LINES], n;
    sh_buf text;
} batch;

static sh_status batch_add(batch *b, uint64_t number, const sh_buf *line) {
    shoal__line__init(&b->line[b->n]);
    b->line[b->n].number = number;
    b->line[b->n].text.len = line->len;
    b->start[b->n] = b->text.len;
    b->list[b->n] = &b->line[b->n];
    SH_TRY(sh_buf_add(&b->text, line->data, line->len));
    b->n++;
    return SH_OK;
}

static void add_to_chain(reader *r) {
    r->chain = sh_line_chain(r->chain, r->number, r->line.data, r->line.len);
}

/* Adds up to a batch of lines; false in *more at the end of the file. Blank lines are counted and left out. */
static sh_status fill_batch(reader *r, batch *b, bool *more) {
    b->n = 0;
    sh_buf_clear(&b->text);
    *more = true;
    while (b->n < BATCH_LINES && b->text.len < BATCH_BYTES) {
        SH_TRY(next_line(r, more));
        if (!*more) break;
        if (is_blank(r)) continue;
        add_to_chain(r);
        SH_TRY(batch_add(b, r->number, &r->line));
    }
    for (size_t i = 0; i < b->n; i++) b->line[i].text.data = b->text.data + b->start[i]; /* the text moves no more */
    return SH_OK;
}

/* *chain: over all lines of the job, as the coordinator has it. */
static sh_status take_ack(sh_client *c, int *open, uint64_t *chain) {
    Shoal__JobReply *reply = NULL;
    SH_TRY(take_reply(c, &reply));
    *chain = reply->chain;
    shoal__job_reply__free_unpacked(reply, NULL);
    --*open;
    return SH_OK;
}

static sh_status send_submit(sh_client *c, const Shoal__Submit *s, int *open, uint64_t *chain) {
    Shoal__JobRequest q = SHOAL__JOB_REQUEST__INIT;
    q.submit = (Shoal__Submit *)(uintptr_t)s;
    while (*open >= WINDOW) SH_TRY(take_ack(c, open, chain));
    SH_TRY(send_request(c, &q));
    ++*open;
    return SH_OK;
}

/* Reads past what the coordinator has, and checks that it is the same. */
static sh_status skip_accepted(reader *r, const char *name, uint64_t accepted, uint64_t want) {
    bool got = true;
    for (uint64_t n = 0; n < accepted && got;) {
        SH_TRY(next_line(r, &got));
        if (!got || is_blank(r)) continue;
        add_to_chain(r);
        n++;
    }
    if (!got || r->chain != want)
        SH_FAIL(SH_EINPUT,
                "job %s began with another file: its first %llu lines differ from this one's (choose another name)",
                name, (unsigned long long)accepted);
    return SH_OK;
}

static sh_status submit_lines(sh_client *c, reader *r, batch *b, const char *name, uint64_t job) {
    int open = 0;
    uint64_t chain = r->chain;
    for (bool more = true; more;) {
        SH_TRY(fill_batch(r, b, &more));
        Shoal__Submit s = SHOAL__SUBMIT__INIT;
        s.has_job = true, s.job = job;
        s.n_line = b->n, s.line = b->list;
        if (b->n) SH_TRY(send_submit(c, &s, &open, &chain));
    }
    while (open) SH_TRY(take_ack(c, &open, &chain)); /* a file of which a part was refused is not closed */
    if (chain != r->chain)
        SH_FAIL(SH_EINPUT, "job %s: lines of another file came in meanwhile: choose another name for this one", name);
    Shoal__Submit last = SHOAL__SUBMIT__INIT;
    last.has_job = true, last.job = job;
    last.has_close = last.close = true;
    SH_TRY(send_submit(c, &last, &open, &chain));
    while (open) SH_TRY(take_ack(c, &open, &chain));
    return SH_OK;
}

sh_status sh_client_submit(sh_client *c, const char *name, const Shoal__JobOptions *options, void *file,
                           uint64_t *job) {
    Shoal__Submit open = SHOAL__SUBMIT__INIT;
    open.name = (char *)(uintptr_t)name;
    open.options = (Shoal__JobOptions *)(uintptr_t)options;
    Shoal__JobRequest q = SHOAL__JOB_REQUEST__INIT;
    q.submit = &open;
    Shoal__JobReply *reply = NULL;
    SH_TRY(sh_client_call(c, &q, &reply));
    uint64_t id = reply->job, accepted = reply->accepted, chain = reply->chain;
    shoal__job_reply__free_unpacked(reply, NULL);
    reader r = {.f = file};
    sh_buf_init(&r.line, SH_MAX_LINE_BYTES + 2);
    batch *b = calloc(1, sizeof *b);
    sh_status st = b ? skip_accepted(&r, name, accepted, chain)
                     : sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "no memory to submit");
    if (st == SH_OK) sh_buf_init(&b->text, 0);
    if (st == SH_OK) st = submit_lines(c, &r, b, name, id);
    if (b) sh_buf_release(&b->text);
    free(b);
    sh_buf_release(&r.line);
    SH_TRY(st);
    *job = id;
    return SH_OK;
}
