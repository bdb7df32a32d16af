/*
 * The link between ranks that are MPI processes; the only file that sees MPI. Non-blocking two-sided messages only:
 * what is left of a job whose peer died must never hang in a blocking call (docs/operations.md). Counts in MPI are int,
 * so a long message is one element of a derived type: whole blocks of 1 MiB, then the rest.
 */
#include "common/clock.h"
#include "proto/link.h"

#include <mpi.h>
#include <stdlib.h>

#define BLOCK ((size_t)1 << 20)
#define LONG  ((size_t)1 << 30) /* from here on by the derived type */

typedef struct mpi_link {
    sh_link base;
    MPI_Request req[SH_LINK_MAX_REQUESTS];
    bool open[SH_LINK_MAX_REQUESTS];
} mpi_link;

static sh_status check(int rc, const char *what) {
    if (rc == MPI_SUCCESS) return SH_OK;
    char text[MPI_MAX_ERROR_STRING];
    int n = 0;
    if (MPI_Error_string(rc, text, &n) != MPI_SUCCESS) n = 0;
    SH_FAIL(SH_EPEER, "%s: %.*s", what, n, text);
}

/* count elements of *type are n bytes. *made: the type is to be freed. */
static sh_status type_for(size_t n, int *count, MPI_Datatype *type, bool *made) {
    *made = n >= LONG;
    if (!*made) {
        *count = (int)n;
        *type = MPI_BYTE;
        return SH_OK;
    }
    if (n > SH_LINK_MAX_BYTES) SH_FAIL(SH_ELIMIT, "a message of %zu bytes: %zu are allowed", n, SH_LINK_MAX_BYTES);
    MPI_Datatype block = MPI_DATATYPE_NULL;
    SH_TRY(check(MPI_Type_contiguous((int)BLOCK, MPI_BYTE, &block), "MPI_Type_contiguous"));
    int lengths[2] = {(int)(n / BLOCK), (int)(n % BLOCK)};
    MPI_Aint at[2] = {0, (MPI_Aint)(n / BLOCK * BLOCK)};
    MPI_Datatype types[2] = {block, MPI_BYTE};
    int rc = MPI_Type_create_struct(2, lengths, at, types, type);
    MPI_Type_free(&block);
    SH_TRY(check(rc, "MPI_Type_create_struct"));
    SH_TRY(check(MPI_Type_commit(type), "MPI_Type_commit"));
    *count = 1;
    return SH_OK;
}

static sh_status free_request(const mpi_link *l, int *out) {
    int i = 0;
    while (i < SH_LINK_MAX_REQUESTS && l->open[i]) i++;
    if (i == SH_LINK_MAX_REQUESTS) SH_FAIL(SH_ELIMIT, "more than %d requests are open", SH_LINK_MAX_REQUESTS);
    *out = i;
    return SH_OK;
}

static sh_status mpi_send(sh_link *base, int to, int tag, const void *p, size_t n, int *req) {
    mpi_link *l = (mpi_link *)base;
    if (to < 0 || to >= base->size) SH_FAIL(SH_EINPUT, "send to rank %d: ranks are 0 to %d", to, base->size - 1);
    int i = 0, count = 0;
    bool made = false;
    MPI_Datatype type = MPI_BYTE;
    SH_TRY(free_request(l, &i));
    SH_TRY(type_for(n, &count, &type, &made));
    int rc = MPI_Isend(p, count, type, to, tag, MPI_COMM_WORLD, &l->req[i]);
    if (made) MPI_Type_free(&type); /* MPI keeps it until the request is done */
    SH_TRY(check(rc, "MPI_Isend"));
    l->open[i] = true;
    sh_link_book(base, tag, n);
    *req = i;
    return SH_OK;
}

static sh_status mpi_test(sh_link *base, int req, bool *done) {
    mpi_link *l = (mpi_link *)base;
    if (req < 0 || req >= SH_LINK_MAX_REQUESTS || !l->open[req]) SH_FAIL(SH_ESTATE, "request %d is not open", req);
    int flag = 0;
    SH_TRY(check(MPI_Test(&l->req[req], &flag, MPI_STATUS_IGNORE), "MPI_Test"));
    if (flag) l->open[req] = false;
    *done = flag != 0;
    return SH_OK;
}

static sh_status mpi_probe(sh_link *base, int from, int tag, bool *found, int *source, size_t *len) {
    if (from >= base->size) SH_FAIL(SH_EINPUT, "probe rank %d: ranks are 0 to %d", from, base->size - 1);
    int flag = 0;
    MPI_Status s;
    SH_TRY(check(MPI_Iprobe(from < 0 ? MPI_ANY_SOURCE : from, tag, MPI_COMM_WORLD, &flag, &s), "MPI_Iprobe"));
    if (flag) {
        MPI_Count n = 0;
        SH_TRY(check(MPI_Get_elements_x(&s, MPI_BYTE, &n), "MPI_Get_elements_x"));
        if (n < 0) SH_FAIL(SH_EPEER, "a message from rank %d has no length", s.MPI_SOURCE);
        *source = s.MPI_SOURCE;
        *len = (size_t)n;
    }
    *found = flag != 0;
    return SH_OK;
}

static sh_status mpi_accept(sh_link *base, int from, int tag, void *p, size_t len, int *req) {
    mpi_link *l = (mpi_link *)base;
    if (from < 0 || from >= base->size)
        SH_FAIL(SH_EINPUT, "receive from rank %d: ranks are 0 to %d", from, base->size - 1);
    int i = 0, count = 0;
    bool made = false;
    MPI_Datatype type = MPI_BYTE;
    SH_TRY(free_request(l, &i));
    SH_TRY(type_for(len, &count, &type, &made));
    int rc = MPI_Irecv(p, count, type, from, tag, MPI_COMM_WORLD, &l->req[i]);
    if (made) MPI_Type_free(&type);
    SH_TRY(check(rc, "MPI_Irecv"));
    l->open[i] = true;
    *req = i;
    return SH_OK;
}

static sh_status mpi_recv(sh_link *base, int from, int tag, void *p, size_t len) {
    int req = 0;
    bool done = false;
    SH_TRY(mpi_accept(base, from, tag, p, len, &req));
    double since = sh_now();
    while (!done) {
        SH_TRY(mpi_test(base, req, &done));
        if (!done && sh_now() - since > 1e-3) sh_sleep(50e-6); /* long messages: leave the core to who sends */
    }
    return SH_OK;
}

static sh_status mpi_barrier(sh_link *base) {
    (void)base;
    MPI_Request req;
    int flag = 0;
    SH_TRY(check(MPI_Ibarrier(MPI_COMM_WORLD, &req), "MPI_Ibarrier"));
    while (!flag) {
        SH_TRY(check(MPI_Test(&req, &flag, MPI_STATUS_IGNORE), "MPI_Test"));
        if (!flag) sh_sleep(200e-6);
    }
    return SH_OK;
}

/* Collective: MPI_Finalize waits for the others. After a failure leave with _exit instead. */
static void mpi_destroy(sh_link **p) {
    free(*p);
    *p = NULL;
    MPI_Finalize();
}

static const sh_link_ops mpi_ops = {.name = "mpi",
                                    .send = mpi_send,
                                    .test = mpi_test,
                                    .probe = mpi_probe,
                                    .accept = mpi_accept,
                                    .recv = mpi_recv,
                                    .barrier = mpi_barrier,
                                    .destroy = mpi_destroy};

sh_status sh_link_mpi_create(sh_link **out) {
    int provided = 0;
    mpi_link *l = calloc(1, sizeof *l);
    if (!l) SH_FAIL(SH_EMEMORY, "no memory for the MPI link");
    int rc = MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided);
    if (rc != MPI_SUCCESS || provided < MPI_THREAD_FUNNELED) {
        free(l);
        SH_FAIL(SH_EPEER, "MPI_Init_thread: code %d, thread level %d: MPI_THREAD_FUNNELED (%d) is needed", rc, provided,
                MPI_THREAD_FUNNELED);
    }
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    l->base.ops = &mpi_ops;
    MPI_Comm_rank(MPI_COMM_WORLD, &l->base.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &l->base.size);
    *out = &l->base;
    return SH_OK;
}
