/* Fetching rows and writing them. See collect.h. */
#include "cli/collect.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "common/file.h"

#define ROWS_PER_CALL 512

typedef struct row_place {
    uint64_t number;
    int64_t offset;
    uint64_t len;
} row_place;

typedef struct collect {
    sh_file_writer *file; /* NULL: standard output */
    FILE *spool;          /* ordered only */
    row_place *place;
    size_t n_places, cap;
    sh_outcomes outcomes;
} collect;

/* A signal that ends the command ends a write that a full pipe holds up, too. */
static sh_status stdout_failed(void) {
    sh_status st = errno == EINTR ? SH_ECANCELLED : SH_EIO;
    SH_FAIL(st, "-o -: standard output cannot be written: %s", strerror(errno));
}

static sh_status put(collect *k, const void *p, size_t n) {
    if (k->file) return sh_file_writer_add(k->file, p, n);
    return fwrite(p, 1, n, stdout) == n ? SH_OK : stdout_failed();
}

/* The row's response.status_code. Within JSON strings quotes are escaped, so this text is always the member itself. */
static int row_status(const uint8_t *row, size_t len) {
    static const char key[] = "\"status_code\":";
    const char *p = memmem(row, len, key, sizeof key - 1);
    if (!p) return 500;
    int status = 0;
    for (p += sizeof key - 1; p < (const char *)row + len && (*p == ' ' || (*p >= '0' && *p <= '9')); p++)
        if (*p != ' ') status = status * 10 + (*p - '0');
    return status;
}

static sh_status remember(collect *k, uint64_t number, size_t len) {
    if (k->n_places == k->cap) {
        size_t cap = k->cap ? 2 * k->cap : 4096;
        row_place *p = realloc(k->place, cap * sizeof *p);
        if (!p) SH_FAIL(SH_EMEMORY, "no memory to order %zu rows", k->n_places);
        k->place = p;
        k->cap = cap;
    }
    int64_t at = k->n_places ? k->place[k->n_places - 1].offset + (int64_t)k->place[k->n_places - 1].len : 0;
    k->place[k->n_places++] = (row_place){number, at, len};
    return SH_OK;
}

static sh_status take_row(collect *k, const Shoal__ResultRow *r) {
    sh_outcomes_add(&k->outcomes, row_status(r->text.data, r->text.len));
    if (!k->spool) {
        SH_TRY(put(k, r->text.data, r->text.len));
        return put(k, "\n", 1);
    }
    SH_TRY(remember(k, r->number, r->text.len));
    if (fwrite(r->text.data, 1, r->text.len, k->spool) != r->text.len)
        SH_FAIL(SH_EIO, "the rows cannot be spooled in the store: %s", strerror(errno));
    return SH_OK;
}

static sh_status fetch_all(collect *k, sh_client *c, uint64_t job) {
    Shoal__ResultsRequest which = SHOAL__RESULTS_REQUEST__INIT;
    Shoal__JobRequest request = SHOAL__JOB_REQUEST__INIT;
    which.job = job;
    which.has_most = 1;
    which.most = ROWS_PER_CALL;
    request.results = &which;
    for (bool more = true; more;) {
        Shoal__JobReply *reply = NULL;
        SH_TRY(sh_client_call(c, &request, &reply));
        sh_status st = SH_OK;
        for (size_t i = 0; i < reply->n_row && st == SH_OK; i++) {
            st = take_row(k, reply->row[i]);
            which.after = reply->row[i]->cursor;
        }
        more = reply->n_row > 0;
        shoal__job_reply__free_unpacked(reply, NULL);
        SH_TRY(st);
    }
    return SH_OK;
}

static int by_number(const void *a, const void *b) {
    const row_place *x = a, *y = b;
    return (x->number > y->number) - (x->number < y->number);
}

static sh_status write_spooled(collect *k, bool sort) {
    if (sort) qsort(k->place, k->n_places, sizeof *k->place, by_number);
    sh_buf row;
    sh_buf_init(&row, 0);
    sh_status st = SH_OK;
    for (size_t i = 0; i < k->n_places && st == SH_OK; i++) {
        sh_buf_clear(&row);
        st = sh_buf_reserve(&row, k->place[i].len + 1);
        if (st != SH_OK) break;
        if (fseeko(k->spool, k->place[i].offset, SEEK_SET) != 0 ||
            fread(row.data, 1, k->place[i].len, k->spool) != k->place[i].len) {
            st = sh_error_set(SH_EIO, __FILE__, __LINE__, "the spooled rows cannot be read: %s", strerror(errno));
            break;
        }
        row.data[k->place[i].len] = '\n';
        st = put(k, row.data, k->place[i].len + 1);
    }
    sh_buf_release(&row);
    return st;
}

static sh_status run(collect *k, sh_client *c, uint64_t job, const char *output, const char *spool, bool ordered) {
    /* Standard output cannot be taken back: nothing is written to it before all rows are here. */
    bool to_stdout = strcmp(output, "-") == 0;
    if (!to_stdout) SH_TRY(sh_file_writer_open(output, &k->file));
    if (ordered || to_stdout) {
        SH_IGNORE(sh_path_remove(spool)); /* of a run that was killed here; a link that somebody else put there stays */
        k->spool = fopen(spool, "w+ex");
        if (!k->spool) SH_FAIL(SH_EIO, "%s: cannot be written: %s", spool, strerror(errno));
    }
    SH_TRY(fetch_all(k, c, job));
    if (k->spool) SH_TRY(write_spooled(k, ordered));
    if (k->file) return sh_file_writer_commit(&k->file);
    return fflush(stdout) == 0 ? SH_OK : stdout_failed();
}

sh_status sh_collect(sh_client *c, uint64_t job, const char *output, bool ordered, const char *spool,
                     sh_outcomes *outcomes) {
    collect k = {0};
    sh_status st = run(&k, c, job, output, spool, ordered);
    sh_file_writer_destroy(&k.file);
    if (k.spool) {
        fclose(k.spool);
        SH_IGNORE(sh_path_remove(spool));
    }
    free(k.place);
    if (st == SH_OK) *outcomes = k.outcomes;
    return st;
}
