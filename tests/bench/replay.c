/*
 * Replays a timetable (partition/simulate.h): every rank does what a rank of a group does in a step, with real MPI
 * messages of the right sizes and with sleep in place of arithmetic. One source, two programs:
 *
 *   smpicc -DSIMULATED   time is simulated by SimGrid: hundreds of nodes and any network on one machine
 *   mpicc                time is real: a check of the simulation on real links (virtual nodes)
 *
 * It is no part of the product and includes nothing of it; what it repeats of worker/ is the order of messages: the
 * leader's descriptor, the block that crosses a cut, rows to experts and their results, answers to the leader.
 *
 * usage: replay TIMETABLE STEPS [SEED]
 * Prints one line "name=value …": see report().
 */
#include <mpi.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifndef SIMULATED
#include <sys/prctl.h>
#endif

enum { MAX_LAYERS = 512, MAX_MEMBERS = 1024, MAX_STAGES = 512, MAX_EXPERTS = 4096, MAX_CHOSEN = 64, MAX_DEPTH = 512 };
enum { SENDS = 2, SLOTS = 2 };
enum { TAG_BATCH = 1, TAG_TOKENS = 2 };
enum { WAIT_ROWS, WAIT_RESULTS, WAIT_BATCH, WAIT_ANSWER, WAITS };

/* ---- the timetable --------------------------------------------------------------------------------------------------
 */

typedef struct layer {
    bool moe;
    double before, dense, experts, after; /* seconds */
} layer;

typedef struct kind { /* of micro-batches: with and without a piece of prompt */
    double rows;      /* of a lane */
    size_t descriptor, answer;
    size_t cut[MAX_STAGES];                      /* bytes to the next stage */
    double enter[MAX_STAGES], leave[MAX_STAGES]; /* seconds before the first and after the last layer */
    layer layer[MAX_LAYERS];
} kind;

typedef struct table {
    int groups, stages, members, in_flight;
    double mixed, tokens; /* share of micro-batches of kind 1; tokens of a lane's micro-batch */
    int experts, top_k;
    int owned[MAX_MEMBERS + 1]; /* member m has experts [owned[m], owned[m + 1]) */
    int part_rows, split;
    double expert_read, expert_row;   /* seconds */
    size_t head, choice, row, result; /* bytes of the exchange's messages */
    int first[MAX_STAGES + 1];        /* stage s has layers [first[s], first[s + 1]) */
    kind kind[2];
} table;

static void stop(const char *what, const char *more) {
    fprintf(stderr, "replay: %s%s\n", what, more);
    MPI_Abort(MPI_COMM_WORLD, 2);
    exit(2);
}

static int limited(const char *name, double v, double most) {
    if (!(v >= 0 && v <= most)) stop("timetable: out of range: ", name);
    return (int)v;
}

static void read_whole(table *t, const char *name, const double *v, int n) {
    if (!strcmp(name, "groups"))
        t->groups = limited(name, v[0], 4096);
    else if (!strcmp(name, "stages"))
        t->stages = limited(name, v[0], MAX_STAGES);
    else if (!strcmp(name, "members"))
        t->members = limited(name, v[0], MAX_MEMBERS);
    else if (!strcmp(name, "in_flight"))
        t->in_flight = limited(name, v[0], MAX_DEPTH);
    else if (!strcmp(name, "mixed"))
        t->mixed = v[0];
    else if (!strcmp(name, "tokens"))
        t->tokens = v[0];
    else if (!strcmp(name, "experts"))
        t->experts = limited(name, v[0], MAX_EXPERTS), t->top_k = limited(name, v[1], MAX_CHOSEN);
    else if (!strcmp(name, "owned"))
        for (int i = 0; i < n && i <= MAX_MEMBERS; i++) t->owned[i] = limited(name, v[i], MAX_EXPERTS);
    else if (!strcmp(name, "part_rows"))
        t->part_rows = limited(name, v[0], 1 << 20), t->split = limited(name, v[1], 1 << 20);
    else if (!strcmp(name, "expert"))
        t->expert_read = v[0], t->expert_row = v[1];
    else if (!strcmp(name, "message"))
        t->head = (size_t)v[0], t->choice = (size_t)v[1];
    else if (!strcmp(name, "row"))
        t->row = (size_t)v[0], t->result = (size_t)v[1];
    else
        stop("timetable: unknown line: ", name);
}

/* One line, "name value …"; unknown names are refused: a timetable is made for this program. */
static void read_line(table *t, char *line) {
    char *rest = line, *name = strsep(&rest, " ");
    double v[MAX_MEMBERS + 2] = {0};
    int n = 0;
    for (char *p; n < MAX_MEMBERS + 2 && (p = strsep(&rest, " "));)
        if (*p) v[n++] = strtod(p, NULL);
    if (!strcmp(name, "stage")) {
        int s = limited(name, v[0], MAX_STAGES - 1);
        t->first[s] = limited(name, v[1], MAX_LAYERS);
        t->first[s + 1] = limited(name, v[2], MAX_LAYERS);
    } else if (!strcmp(name, "kind")) {
        kind *k = &t->kind[limited(name, v[0], 1)];
        k->rows = v[1];
        k->descriptor = (size_t)v[2];
        k->answer = (size_t)v[3];
    } else if (!strcmp(name, "edge")) {
        kind *k = &t->kind[limited(name, v[0], 1)];
        int s = limited(name, v[1], MAX_STAGES - 1);
        k->cut[s] = (size_t)v[2];
        k->enter[s] = v[3];
        k->leave[s] = v[4];
    } else if (!strcmp(name, "layer")) {
        t->kind[limited(name, v[0], 1)].layer[limited(name, v[1], MAX_LAYERS - 1)] =
            (layer){v[2] > 0, v[3], v[4], v[5], v[6]};
    } else {
        read_whole(t, name, v, n);
    }
}

static void read_table(table *t, const char *path) {
    FILE *f = fopen(path, "r");
    char *line = NULL;
    size_t room = 0;
    if (!f) stop("cannot read ", path);
    while (getline(&line, &room, f) > 0) {
        line[strcspn(line, "#\n")] = 0;
        if (*line) read_line(t, line);
    }
    free(line);
    fclose(f);
    if (t->groups < 1 || t->stages < 1 || t->members < 1 || t->in_flight < 1 || t->part_rows < 1)
        stop("timetable: incomplete: ", path);
}

/* ---- steps: what every rank can tell of any micro-batch -------------------------------------------------------------
 */

typedef struct step {
    int number;
    int widest; /* most rows of any lane */
} step;

/* Lanes get their prompts when sequences of theirs end, so they are not in step with each other: kinds and rows are
 * strewn evenly over each lane's micro-batches, beginning at a place of its own. */
static double place_of(int lane) {
    double x = (lane + 1) * 0.61803398874989485;
    return x - floor(x);
}

static int kind_of(const table *t, int number, int lane) {
    double x = number * t->mixed + place_of(lane);
    return floor(x + t->mixed) > floor(x);
}

static int rows_of(const table *t, int number, int lane) {
    double n = t->kind[kind_of(t, number, lane)].rows, x = number * (n - floor(n)) + place_of(lane);
    return (int)(floor(n) + floor(x + n - floor(n)) - floor(x));
}

static step step_of(const table *t, int number) {
    step s = {.number = number};
    for (int lane = 0; lane < t->members; lane++) {
        int n = rows_of(t, number, lane);
        s.widest = n > s.widest ? n : s.widest;
    }
    return s;
}

/* Parts that a layer's rows are cut into, the same on all members (model/gemma4_model.c). */
static int parts_of(const table *t, const step *s) {
    if (s->widest <= t->part_rows && s->widest < t->split) return s->widest > 0;
    return SLOTS * ((s->widest + SLOTS * t->part_rows - 1) / (SLOTS * t->part_rows));
}

/* ---- time -----------------------------------------------------------------------------------------------------------
 */

enum { ROWS, RESULTS };

/* One part of a step's rows in one layer, as worker/experts.c has it under way. */
typedef struct exchange {
    bool open, away; /* away: rows are with other members */
    const layer *layer;
    double share;           /* of the lane's rows */
    MPI_Comm comm[2];       /* of the stage; the tag of a message of rows is the number of experts they chose */
    MPI_Request *from, *to; /* [members] */
    int *rows_to, *choices_to, *choices_from;
} exchange;

typedef struct rank {
    const table *t;
    int group, stage, member;
    uint64_t random;
    double debt;                  /* real time: seconds slept too long, taken off the next */
    double computed, wait[WAITS]; /* seconds since the first step that counts */
    double sent;                  /* bytes, of the same steps */
    char *out, *in;               /* buffers whose contents do not matter */
    size_t stride;                /* from one peer's part of them to the next */
    exchange slot[SLOTS];
    MPI_Request sends[SENDS];
    MPI_Status *status; /* [members + 1] */
} rank;

#ifdef SIMULATED
#define FLOPS_OF_A_HOST 1e12 /* as the platform file says */
static void compute(rank *r, double seconds) {
    if (seconds > 0) smpi_execute_flops(seconds * FLOPS_OF_A_HOST);
    r->computed += seconds;
}

static void *big(size_t bytes) {
    return SMPI_SHARED_MALLOC(bytes);
}

/* A waiting rank of shoal polls for 50 µs and then naps, longer each time (worker/backoff.h): it notices what happened
 * `waited` seconds after it began at the end of the nap. */
static double noticed(double waited) {
    double at = 50e-6, nap = 20e-6;
    if (waited <= at) return waited;
    while (at < waited) {
        double most = at < 20e-3 ? 0.2e-3 : 1e-3;
        at += nap;
        nap = nap * 1.5 < most ? nap * 1.5 : most;
    }
    return at;
}

static void finish(rank *r, int n, MPI_Request *q, MPI_Status *status, int cause) {
    double t0 = MPI_Wtime();
    MPI_Waitall(n, q, status);
    double waited = MPI_Wtime() - t0, late = noticed(waited);
    if (late > waited) smpi_execute_flops((late - waited) * FLOPS_OF_A_HOST);
    r->wait[cause] += late;
}
#else
static void nap(double seconds) {
    struct timespec s = {(time_t)seconds, (long)((seconds - floor(seconds)) * 1e9)};
    nanosleep(&s, NULL);
}

/* Sleeps, and lets MPI move what travels meanwhile, as shoal does between kernels. */
static void compute(rank *r, double seconds) {
    double t0 = MPI_Wtime(), until = t0 + seconds - r->debt;
    for (double left; (left = until - MPI_Wtime()) > 0;) {
        int flag;
        nap(left < 250e-6 ? left : 250e-6);
        MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_WORLD, &flag, MPI_STATUS_IGNORE);
    }
    r->debt = MPI_Wtime() - until;
    r->computed += seconds;
}

static void *big(size_t bytes) {
    return calloc(1, bytes);
}

static void finish(rank *r, int n, MPI_Request *q, MPI_Status *status, int cause) {
    double t0 = MPI_Wtime(), length = 20e-6;
    for (int done = 0; MPI_Testall(n, q, &done, status), !done;) {
        double waited = MPI_Wtime() - t0, most = waited < 20e-3 ? 0.2e-3 : 1e-3;
        if (waited < 50e-6) continue;
        nap(length);
        length = length * 1.5 < most ? length * 1.5 : most;
    }
    double waited = MPI_Wtime() - t0;
    r->wait[cause] += waited;
    r->debt -= fmin(r->debt, waited); /* who waited anyway has lost nothing by having slept too long */
}
#endif

static size_t buffer_part(const rank *r, int peer) {
    return r->stride * (size_t)peer;
}

/* ---- the experts' exchange ------------------------------------------------------------------------------------------
 */

/* splitmix64 */
static uint64_t draw(rank *r) {
    uint64_t z = r->random += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static int below(rank *r, int n) {
    return (int)((draw(r) >> 32) * (uint64_t)n >> 32);
}

static int owner(const table *t, int expert) {
    int m = (int)((int64_t)expert * t->members / t->experts);
    while (expert < t->owned[m]) m--;
    while (expert >= t->owned[m + 1]) m++;
    return m;
}

/* Which members n rows of this rank go to: every row chooses top_k different experts, all alike. */
static void route(rank *r, exchange *x, int n) {
    const table *t = r->t;
    memset(x->rows_to, 0, (size_t)t->members * sizeof(int));
    memset(x->choices_to, 0, (size_t)t->members * sizeof(int));
    for (int i = 0; i < n; i++) {
        int chosen[MAX_CHOSEN], to[MAX_CHOSEN];
        for (int k = 0; k < t->top_k; k++) {
            bool again = true, first = true;
            while (again) {
                chosen[k] = below(r, t->experts);
                again = false;
                for (int j = 0; j < k; j++) again = again || chosen[j] == chosen[k];
            }
            to[k] = owner(t, chosen[k]);
            for (int j = 0; j < k; j++) first = first && to[j] != to[k];
            x->rows_to[to[k]] += first;
            x->choices_to[to[k]]++;
        }
    }
}

/* Seconds for so many rows over the experts of this rank: each that is chosen is read once. */
static double experts_seconds(rank *r, int choices) {
    const table *t = r->t;
    int n = t->owned[r->member + 1] - t->owned[r->member], touched = 0;
    char seen[MAX_EXPERTS] = {0};
    for (int i = 0; i < choices && n > 0 && touched < n; i++) {
        char *s = &seen[below(r, n)];
        touched += !*s;
        *s = 1;
    }
    return fmax(touched * t->expert_read, choices * t->expert_row);
}

static void send_rows(rank *r, exchange *x) {
    const table *t = r->t;
    size_t most = t->head + (size_t)t->part_rows * (t->row + (size_t)t->top_k * t->choice);
    x->from[r->member] = x->to[r->member] = MPI_REQUEST_NULL;
    for (int i = 1; i < t->members; i++) { /* not everyone to the same one at once */
        int p = (r->member + i) % t->members;
        size_t bytes = t->head + (size_t)x->rows_to[p] * t->row + (size_t)x->choices_to[p] * t->choice;
        MPI_Irecv(r->in + buffer_part(r, p), (int)most, MPI_BYTE, p, MPI_ANY_TAG, x->comm[ROWS], &x->from[p]);
        r->sent += (double)bytes;
        MPI_Isend(r->out + buffer_part(r, p), (int)bytes, MPI_BYTE, p, x->choices_to[p], x->comm[ROWS], &x->to[p]);
    }
}

static void take_rows(rank *r, exchange *x) {
    const table *t = r->t;
    finish(r, t->members, x->from, r->status, WAIT_ROWS);
    for (int p = 0; p < t->members; p++) x->choices_from[p] = p == r->member ? 0 : r->status[p].MPI_TAG;
    finish(r, t->members, x->to, r->status, WAIT_ROWS);
}

static void send_results(rank *r, exchange *x) {
    const table *t = r->t;
    for (int i = 1; i < t->members; i++) {
        int p = (r->member + i) % t->members;
        size_t coming = t->head + (size_t)x->choices_to[p] * t->result;
        size_t going = t->head + (size_t)x->choices_from[p] * t->result;
        MPI_Irecv(r->in + buffer_part(r, p), (int)coming, MPI_BYTE, p, 0, x->comm[RESULTS], &x->from[p]);
        r->sent += (double)going;
        MPI_Isend(r->out + buffer_part(r, p), (int)going, MPI_BYTE, p, 0, x->comm[RESULTS], &x->to[p]);
    }
}

/* ---- a layer, as model/gemma4.c runs it -----------------------------------------------------------------------------
 */

static void part_end(rank *r, exchange *x) {
    if (!x->open) return;
    if (x->away) {
        finish(r, r->t->members, x->from, r->status, WAIT_RESULTS);
        finish(r, r->t->members, x->to, r->status, WAIT_RESULTS);
    }
    compute(r, x->layer->after * x->share);
    x->open = false;
}

static void part_begin(rank *r, exchange *x, const layer *l, int rows, int index, int parts) {
    int n = (int)((int64_t)rows * (index + 1) / parts - (int64_t)rows * index / parts);
    x->open = true;
    x->layer = l;
    x->share = rows > 0 ? (double)n / rows : 1.0 / parts;
    x->away = l->moe && r->t->members > 1;
    compute(r, l->before * x->share);
    if (!x->away) return;
    route(r, x, n);
    send_rows(r, x);
}

static void feed_forward(rank *r, exchange *x) {
    const table *t = r->t;
    int choices = x->choices_to[r->member];
    compute(r, x->layer->dense * x->share);
    if (!x->away) {
        compute(r, x->layer->experts * x->share);
        return;
    }
    take_rows(r, x);
    for (int p = 0; p < t->members; p++) choices += x->choices_from[p];
    compute(r, experts_seconds(r, choices));
    send_results(r, x);
}

static void run_layer(rank *r, const layer *l, int rows, int parts) {
    for (int i = 0; i < parts; i += SLOTS) {
        int here = parts - i < SLOTS ? parts - i : SLOTS;
        for (int s = 0; s < here; s++) {
            part_end(r, &r->slot[s]);
            part_begin(r, &r->slot[s], l, rows, i + s, parts);
        }
        for (int s = 0; s < here; s++) feed_forward(r, &r->slot[s]);
    }
}

/* ---- a group --------------------------------------------------------------------------------------------------------
 */

static int world_rank(const rank *r, int stage, int member) {
    return (r->group * r->t->stages + stage) * r->t->members + member;
}

static void forget(rank *r) {
    memset(r->wait, 0, sizeof r->wait);
    r->computed = r->sent = 0;
}

static void send_to(rank *r, int to, int tag, size_t bytes, MPI_Request *q) {
    r->sent += (double)bytes;
    MPI_Isend(r->out, (int)bytes, MPI_BYTE, to, tag, MPI_COMM_WORLD, q);
}

/* Layers of this stage for one micro-batch, and what goes on: to the next stage, or as an answer to the leader. */
static void run_stage(rank *r, int number) {
    const table *t = r->t;
    const kind *k = &t->kind[kind_of(t, number, r->member)];
    step now = step_of(t, number);
    int s = r->stage, rows = rows_of(t, number, r->member), parts = t->members > 1 ? parts_of(t, &now) : 1;
    MPI_Request *q = &r->sends[number % SENDS];
    finish(r, 1, q, r->status, WAIT_BATCH);
    compute(r, k->enter[s]);
    for (int i = t->first[s]; i < t->first[s + 1]; i++) run_layer(r, &k->layer[i], rows, parts);
    for (int i = 0; i < SLOTS; i++) part_end(r, &r->slot[i]);
    compute(r, k->leave[s]);
    if (s + 1 < t->stages)
        send_to(r, world_rank(r, s + 1, r->member), TAG_BATCH, k->descriptor + k->cut[s], q);
    else if (s > 0 || r->member > 0)
        send_to(r, world_rank(r, 0, 0), TAG_TOKENS, k->answer, q);
}

static void serve(rank *r, int steps, int warm) {
    const table *t = r->t;
    int from = r->stage ? world_rank(r, r->stage - 1, r->member) : world_rank(r, 0, 0);
    for (int i = 0; i < steps; i++) {
        const kind *k = &t->kind[kind_of(t, i, r->member)];
        size_t bytes = k->descriptor + (r->stage ? k->cut[r->stage - 1] : 0);
        MPI_Request q;
        if (i == warm) forget(r);
        MPI_Irecv(r->in, (int)bytes, MPI_BYTE, from, TAG_BATCH, MPI_COMM_WORLD, &q);
        finish(r, 1, &q, r->status, WAIT_BATCH);
        run_stage(r, i);
    }
}

/* Rank 0 of a group: a step goes out when the answers to the step `in_flight` before are in. Returns the seconds
 * between the answers to step warm − 1 and to the last. */
static double lead(rank *r, int steps, int warm) {
    const table *t = r->t;
    int W = t->members, D = t->in_flight, mine = world_rank(r, 0, 0);
    MPI_Request *answers = malloc(sizeof *answers * (size_t)(D * W)), *handed = malloc(sizeof *handed * (size_t)W);
    double began = 0;
    for (int i = 0; i < D * W; i++) answers[i] = MPI_REQUEST_NULL;
    for (int i = 0; i < W; i++) handed[i] = MPI_REQUEST_NULL;
    for (int i = 0; i < steps + D; i++) {
        MPI_Request *a = answers + i % D * W;
        if (i == warm) forget(r);
        finish(r, W, a, r->status, WAIT_ANSWER);
        if (i - D == warm - 1) began = MPI_Wtime();
        if (i >= steps) continue;
        finish(r, W, handed, r->status, WAIT_BATCH);
        for (int m = 0; m < W; m++) {
            const kind *k = &t->kind[kind_of(t, i, m)];
            int last = world_rank(r, t->stages - 1, m);
            if (last != mine) MPI_Irecv(r->in, (int)k->answer, MPI_BYTE, last, TAG_TOKENS, MPI_COMM_WORLD, &a[m]);
            if (m > 0) send_to(r, world_rank(r, 0, m), TAG_BATCH, k->descriptor, &handed[m]);
        }
        run_stage(r, i);
    }
    MPI_Waitall(W, handed, MPI_STATUSES_IGNORE);
    free(answers);
    free(handed);
    return MPI_Wtime() - began;
}

/* period: seconds from step to step, mean of the groups; tokens_per_second: of all groups. Then shares of the ranks'
 * time: computing; waiting for rows, for results, for the stage before, for answers; and bytes sent per step. */
static void report(rank *r, double period, int counted) {
    bool leads = r->stage == 0 && r->member == 0;
    double mine[4 + WAITS] = {leads ? r->t->tokens * r->t->members / period : 0, leads ? period : 0, r->computed,
                              r->sent},
                    all[4 + WAITS];
    int size;
    memcpy(mine + 4, r->wait, sizeof r->wait);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Reduce(mine, all, 4 + WAITS, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD);
    if (world_rank(r, r->stage, r->member) != 0) return;
    double mean = all[1] / r->t->groups, time = mean * counted * size;
    printf("ranks=%d period=%.9g tokens_per_second=%.9g compute=%.6f rows=%.6f results=%.6f batch=%.6f answers=%.6f "
           "bytes_per_step=%.0f\n",
           size, mean, all[0], all[2] / time, all[4 + WAIT_ROWS] / time, all[4 + WAIT_RESULTS] / time,
           all[4 + WAIT_BATCH] / time, all[4 + WAIT_ANSWER] / time, all[3] / counted);
    fflush(stdout);
}

static void create_slot(rank *r, exchange *x, MPI_Comm stage) {
    size_t W = (size_t)r->t->members;
    for (int k = ROWS; k <= RESULTS; k++) MPI_Comm_dup(stage, &x->comm[k]);
    x->from = malloc(sizeof *x->from * W);
    x->to = malloc(sizeof *x->to * W);
    x->rows_to = calloc(W * 3, sizeof(int));
    x->choices_to = x->rows_to + W;
    x->choices_from = x->choices_to + W;
}

static size_t largest_message(const table *t) {
    size_t most = t->head + (size_t)t->part_rows * (t->row + (size_t)t->top_k * (t->choice + t->result));
    for (int k = 0; k < 2; k++)
        for (int s = 0; s < t->stages; s++) {
            size_t n = t->kind[k].descriptor + t->kind[k].cut[s] + t->kind[k].answer;
            most = n > most ? n : most;
        }
    return most;
}

static void create(rank *r, const table *t, uint64_t seed) {
    int me, W = t->members;
    MPI_Comm stage;
    MPI_Comm_rank(MPI_COMM_WORLD, &me);
    *r = (rank){.t = t, .group = me / (t->stages * W), .stage = me / W % t->stages, .member = me % W};
    r->random = seed * 0x2545f4914f6cdd1du + (uint64_t)me;
    MPI_Comm_split(MPI_COMM_WORLD, me / W, r->member, &stage);
    for (int i = 0; i < SLOTS; i++) create_slot(r, &r->slot[i], stage);
    for (int i = 0; i < SENDS; i++) r->sends[i] = MPI_REQUEST_NULL;
    r->status = malloc(sizeof *r->status * (size_t)(W + 1));
#ifdef SIMULATED
    r->stride = 0; /* nobody reads what is in them */
    r->out = big(largest_message(t));
    r->in = big(largest_message(t));
#else
    r->stride = largest_message(t);
    r->out = big(r->stride * (size_t)W);
    r->in = big(r->stride * (size_t)W);
#endif
}

int main(int argc, char **argv) {
    int size;
    MPI_Init(&argc, &argv);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (argc < 3) stop("usage: replay TIMETABLE STEPS [SEED]", "");
#ifndef SIMULATED
    prctl(PR_SET_TIMERSLACK, 1);
#endif
    table *t = calloc(1, sizeof *t);
    read_table(t, argv[1]);
    if (size != t->groups * t->stages * t->members) stop("not as many ranks as the timetable needs: ", argv[1]);
    rank r;
    create(&r, t, argc > 3 ? strtoull(argv[3], NULL, 10) : 1);
    int counted = atoi(argv[2]), warm = t->stages > 1 ? t->in_flight + t->stages : 1;
    double seconds = 1;
    MPI_Barrier(MPI_COMM_WORLD);
    if (r.stage == 0 && r.member == 0)
        seconds = lead(&r, warm + counted, warm);
    else
        serve(&r, warm + counted, warm);
    MPI_Waitall(SENDS, r.sends, MPI_STATUSES_IGNORE);
    report(&r, seconds / counted, counted);
    MPI_Finalize();
    return 0;
}
