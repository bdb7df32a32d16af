/*
 * Rows to experts and results back. See experts.h.
 *
 * One exchange is a message of rows to each other member, and one of results from each: always, also when empty, so
 * every member knows what to expect without being told. Each slot and kind has a channel of the link and buffers of its
 * own. A buffer is free when it is needed: a member sends rows in a slot only after it has had all results of that
 * slot's last exchange, so whoever gets them has long answered, and is done with the rows before.
 */
#include "worker/experts.h"

#include <stdlib.h>
#include <string.h>

#include "common/mem.h"
#include "model/moe.h"
#include "worker/backoff.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "messages are little-endian and used in place");

#define MAGIC 0x31584853u /* "SHX1" */

enum kind { ROWS, RESULTS };

typedef struct head {
    uint32_t magic;
    uint16_t kind, value_bytes;
    uint64_t turn; /* number of the exchange, from 0 */
    int32_t layer, slot, rows, choices;
} head;
_Static_assert(sizeof(head) == 32, "docs/protocol.md");

/* A message that comes in: its buffer, and how far it is. */
typedef struct incoming {
    uint8_t *data;
    size_t room, len; /* len: when HERE; results: what it must be */
    enum { CLOSED, AWAITED, ARRIVING, HERE } state;
    int req;
} incoming;

/* One that goes out. */
typedef struct outgoing {
    uint8_t *data;
    size_t len;
    int req; /* −1: not under way */
} outgoing;

/* What passes between this member and another in one slot. */
typedef struct peer {
    outgoing rows, results;
    incoming rows_in, results_in;
    int n_rows, n_choices; /* sent */
} peer;

typedef struct slot {
    enum { IDLE, SENT, ASKED, REPLIED } state;
    uint64_t turn;
    int layer;
    peer *peer;     /* [members]; the own one is unused */
    int awaited[2]; /* rows and results not yet whole, this exchange */
    double sent_at[2];
    uint8_t *out, *answers;  /* rows for all others; results from all others */
    sh_expert_guest *guests; /* [members − 1] */
} slot;

struct sh_experts {
    sh_experts_options o;
    sh_expert_peers peers;
    int part_rows, held;       /* most experts that this member holds in a layer */
    size_t value, row, result; /* bytes of a value of a row, of a row, of a result as they travel */
    int *holder0; /* [layers · experts + 1]: members that hold an expert are holder[holder0[i] … holder0[i+1]−1] */
    uint16_t *holder;
    bool *mine; /* [layers · experts] */
    slot slots[SH_EXPERT_SLOTS];
    uint64_t turns;
    sh_arena arena;
    /* scratch of begin */
    int16_t *to;          /* [part_rows, top_k]: member, −1: here */
    int *load, *last_row; /* [members]: choices given so far; the last row packed */
    sh_experts_times times;
    sh_status failed; /* of progress: told by the next call */
    char why[512];
};

static size_t align64(size_t n) {
    return (n + 63) / 64 * 64;
}

/* Where the rows begin in a message of rows, and the results in one of results. */
static size_t rows_offset(int choices) {
    return align64(sizeof(head) + (size_t)choices * 4);
}

static size_t results_offset(void) {
    return align64(sizeof(head));
}

static int channel(enum kind kind, int i) {
    return sh_link_channel(SH_TAG_EXPERTS, (int)kind * SH_EXPERT_SLOTS + i);
}

static int min_int(int a, int b) {
    return a < b ? a : b;
}

static int max_int(int a, int b) {
    return a > b ? a : b;
}

/* --- making --------------------------------------------------------------------------------------------------------
 */

static size_t place_of(const sh_experts *e, int layer, int expert) {
    return (size_t)(layer - e->o.first) * (size_t)e->o.config->experts + (size_t)expert;
}

static sh_status list_holders(sh_experts *e) {
    const sh_experts_options *o = &e->o;
    const sh_config *c = o->config;
    size_t n = (size_t)(o->last - o->first) * (size_t)c->experts;
    e->holder0 = calloc(n + 1, sizeof *e->holder0);
    e->holder = calloc(n * (size_t)o->members + 1, sizeof *e->holder);
    e->mine = calloc(n + 1, sizeof *e->mine);
    if (!e->holder0 || !e->holder || !e->mine) SH_FAIL(SH_EMEMORY, "experts: no memory for who holds them");
    int used = 0;
    for (int layer = o->first; layer < o->last; layer++) {
        int held = 0;
        for (int x = 0; x < c->experts; x++) {
            size_t i = place_of(e, layer, x);
            e->holder0[i] = used;
            for (int m = 0; c->layer[layer].moe && m < o->members; m++)
                if (o->holds(o->arg, m, layer, x)) e->holder[used++] = (uint16_t)m;
            e->mine[i] = c->layer[layer].moe && o->holds(o->arg, o->member, layer, x);
            held += e->mine[i];
            if (c->layer[layer].moe && used == e->holder0[i])
                SH_FAIL(SH_EINPUT, "experts: expert %d of layer %d is on none of the %d members", x, layer, o->members);
            e->holder0[i + 1] = used;
        }
        e->held = max_int(e->held, held);
    }
    return SH_OK;
}

/* Bytes for B rows: what a guest may send and be answered, and what the own rows make for all others. */
typedef struct rooms {
    size_t rows_in, results, out, answers;
} rooms;

static rooms measure(const sh_experts *e) {
    size_t B = (size_t)e->part_rows, k = (size_t)e->o.config->top_k, others = (size_t)e->o.members - 1;
    size_t theirs = B * (size_t)min_int((int)k, e->held), copies = others < k ? others : k;
    return (rooms){.rows_in = rows_offset((int)theirs) + B * e->row,
                   .results = align64(results_offset() + theirs * e->result),
                   .out = others * (64 + 2 * 64) + 4 * B * k + B * copies * e->row,
                   .answers = others * (results_offset() + 64) + B * k * e->result};
}

/* Everything from the arena; with sum instead, only its size. */
static void *take(sh_experts *e, size_t *sum, size_t bytes) {
    if (!sum) return sh_arena_take(&e->arena, bytes);
    *sum += align64(bytes);
    return NULL;
}

static void lay_out(sh_experts *e, size_t *sum) {
    size_t members = (size_t)e->o.members;
    rooms r = measure(e);
    void *p;
    for (int i = 0; i < SH_EXPERT_SLOTS; i++) {
        slot *s = &e->slots[i];
        p = take(e, sum, members * sizeof *s->peer);
        if (!sum) s->peer = p;
        p = take(e, sum, members * sizeof *s->guests);
        if (!sum) s->guests = p;
        p = take(e, sum, r.out);
        if (!sum) s->out = p;
        p = take(e, sum, r.answers);
        if (!sum) s->answers = p;
        for (int m = 0; m < e->o.members; m++) {
            void *in = m == e->o.member ? NULL : take(e, sum, align64(r.rows_in));
            void *results = m == e->o.member ? NULL : take(e, sum, r.results);
            if (sum) continue;
            s->peer[m] = (peer){.rows.req = -1, .results = {.data = results, .req = -1}};
            s->peer[m].rows_in = (incoming){.data = in, .room = r.rows_in, .state = in ? AWAITED : CLOSED, .req = -1};
            s->peer[m].results_in.req = -1;
        }
        s->awaited[ROWS] = e->o.members - 1;
    }
    p = take(e, sum, (size_t)e->part_rows * (size_t)e->o.config->top_k * sizeof *e->to);
    if (!sum) e->to = p;
    p = take(e, sum, members * sizeof *e->load);
    if (!sum) e->load = p;
    p = take(e, sum, members * sizeof *e->last_row);
    if (!sum) e->last_row = p;
}

static sh_status create_buffers(sh_experts *e) {
    size_t bytes = 0;
    lay_out(e, &bytes);
    SH_TRY(sh_arena_create(bytes, "expert exchange", &e->arena));
    lay_out(e, NULL);
    return SH_OK;
}

static sh_status check_options(const sh_experts_options *o) {
    int most = SH_LINK_MAX_REQUESTS / (4 * SH_EXPERT_SLOTS); /* sends and accepts of rows and of results */
    if (o->members < 2 || o->members > most || o->member < 0 || o->member >= o->members)
        SH_FAIL(SH_EINPUT, "experts: member %d of %d: allowed are 2 to %d members", o->member, o->members, most);
    if (o->first_rank < 0 || o->first_rank + o->member != o->link->rank || o->first_rank + o->members > o->link->size)
        SH_FAIL(SH_EINPUT, "experts: member %d of ranks %d to %d: this is rank %d of %d", o->member, o->first_rank,
                o->first_rank + o->members - 1, o->link->rank, o->link->size);
    if (o->config->experts < 1 || o->max_rows < 1)
        SH_FAIL(SH_EINPUT, "experts: %d experts, %d rows: 1 or more are allowed", o->config->experts, o->max_rows);
    return SH_OK;
}

static void fill_table(sh_experts *e);

sh_status sh_experts_create(const sh_experts_options *o, sh_experts **out) {
    SH_TRY(check_options(o));
    sh_experts *e = calloc(1, sizeof *e);
    if (!e) SH_FAIL(SH_EMEMORY, "no memory for the exchange of experts");
    e->o = *o;
    if (e->o.split_rows < 1) e->o.split_rows = SH_EXPERTS_SPLIT_ROWS;
    e->part_rows = sh_expert_part_rows(o->max_rows, o->members);
    e->row = sh_expert_row_bytes(o->config, o->mode);
    e->result = sh_expert_result_bytes(o->config, o->mode);
    e->value = e->row / (size_t)o->config->hidden;
    sh_status st = list_holders(e);
    if (st == SH_OK) st = create_buffers(e);
    if (st != SH_OK) {
        sh_experts_destroy(&e);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    fill_table(e);
    *out = e;
    return SH_OK;
}

void sh_experts_destroy(sh_experts **p) {
    sh_experts *e = *p;
    if (!e) return;
    sh_arena_release(&e->arena);
    free(e->holder0);
    free(e->holder);
    free(e->mine);
    free(e);
    *p = NULL;
}

/* --- progress ------------------------------------------------------------------------------------------------------
 */

static sh_status test_outgoing(sh_experts *e, outgoing *m) {
    bool done = false;
    if (m->req < 0) return SH_OK;
    SH_TRY(e->o.link->ops->test(e->o.link, m->req, &done));
    if (done) m->req = -1;
    return SH_OK;
}

static sh_status test_incoming(sh_experts *e, slot *s, enum kind kind, incoming *m) {
    bool done = false;
    if (m->state != ARRIVING) return SH_OK;
    SH_TRY(e->o.link->ops->test(e->o.link, m->req, &done));
    if (!done) return SH_OK;
    m->state = HERE;
    m->req = -1;
    if (--s->awaited[kind] == 0 && s->state == (kind == ROWS ? SENT : REPLIED))
        e->times.travel[e->o.config->layer[s->layer].kind] += sh_now() - s->sent_at[kind];
    return SH_OK;
}

static incoming *incoming_of(peer *p, enum kind kind) {
    return kind == ROWS ? &p->rows_in : &p->results_in;
}

/* Starts receiving what has come on one channel. */
static sh_status take_new(sh_experts *e, int i, enum kind kind) {
    slot *s = &e->slots[i];
    const sh_link_ops *ops = e->o.link->ops;
    static const char *const name[] = {"rows", "results"};
    for (bool found = true; found;) {
        int from = 0;
        size_t len = 0;
        SH_TRY(ops->probe(e->o.link, -1, channel(kind, i), &found, &from, &len));
        if (!found) break;
        int m = from - e->o.first_rank;
        if (m < 0 || m >= e->o.members || m == e->o.member)
            SH_FAIL(SH_EPEER, "experts: %s from rank %d: the members of this stage are ranks %d to %d", name[kind],
                    from, e->o.first_rank, e->o.first_rank + e->o.members - 1);
        incoming *in = incoming_of(&s->peer[m], kind);
        if (in->state != AWAITED)
            SH_FAIL(SH_EPEER, "experts: %s from rank %d in slot %d: the ones before are not done with", name[kind],
                    from, i);
        if (kind == ROWS ? len > in->room || len < sizeof(head) : len != in->len)
            SH_FAIL(SH_EPEER, "experts: %s from rank %d: %zu bytes: allowed are %zu to %zu", name[kind], from, len,
                    kind == ROWS ? sizeof(head) : in->len, kind == ROWS ? in->room : in->len);
        in->len = len;
        SH_TRY(ops->accept(e->o.link, from, channel(kind, i), in->data, len, &in->req));
        in->state = ARRIVING;
    }
    return SH_OK;
}

static sh_status progress(sh_experts *e) {
    for (int i = 0; i < SH_EXPERT_SLOTS; i++) {
        slot *s = &e->slots[i];
        for (int kind = ROWS; kind <= RESULTS; kind++)
            if (s->awaited[kind] > 0) SH_TRY(take_new(e, i, (enum kind)kind));
        for (int m = 0; m < e->o.members; m++) {
            peer *p = &s->peer[m];
            SH_TRY(test_outgoing(e, &p->rows));
            SH_TRY(test_outgoing(e, &p->results));
            SH_TRY(test_incoming(e, s, ROWS, &p->rows_in));
            SH_TRY(test_incoming(e, s, RESULTS, &p->results_in));
        }
    }
    return SH_OK;
}

static void experts_poll(void *ctx) {
    sh_experts *e = ctx;
    if (e->failed != SH_OK) return;
    e->failed = progress(e);
    if (e->failed == SH_OK) return;
    strncpy(e->why, sh_error_text(), sizeof e->why - 1);
}

/* Progress, or the failure of an earlier one. */
static sh_status step(sh_experts *e) {
    experts_poll(e);
    if (e->failed != SH_OK) SH_FAIL(e->failed, "%s", e->why);
    return SH_OK;
}

static bool sends_done(const sh_experts *e, const slot *s, enum kind kind) {
    for (int m = 0; m < e->o.members; m++)
        if ((kind == ROWS ? s->peer[m].rows.req : s->peer[m].results.req) >= 0) return false;
    return true;
}

static bool all_here(const sh_experts *e, const slot *s, enum kind kind) {
    (void)e;
    return s->awaited[kind] == 0;
}

/* Waits until ready says so; books the time as exposed. */
static sh_status wait_until(sh_experts *e, const slot *s, enum kind kind,
                            bool (*ready)(const sh_experts *e, const slot *s, enum kind kind)) {
    SH_TRY(step(e));
    if (ready(e, s, kind)) return SH_OK;
    double since = sh_now();
    for (sh_backoff wait = {0}; !ready(e, s, kind);) {
        sh_backoff_wait(&wait);
        SH_TRY(step(e));
    }
    double now = sh_now();
    e->times.exposed[e->o.config->layer[s->layer].kind] += now - since;
    sh_timeline_note(e->o.timeline, SH_SLICE_EXCHANGE, since, now);
    return SH_OK;
}

/* --- out: rows to their experts -------------------------------------------------------------------------------------
 */

/* The member that computes a choice: this one if it can, else of those that can the one with the fewest choices of this
 * part so far; of equal ones the next after this member, so that members do not all begin with the same. */
static int choose_member(const sh_experts *e, int layer, int expert) {
    size_t i = place_of(e, layer, expert);
    int best = -1, best_turn = 0, members = e->o.members;
    if (e->mine[i]) return -1;
    for (int h = e->holder0[i]; h < e->holder0[i + 1]; h++) {
        int m = e->holder[h], turn = (m - e->o.member + members) % members;
        if (best >= 0 && (e->load[m] > e->load[best] || (e->load[m] == e->load[best] && turn > best_turn))) continue;
        best = m;
        best_turn = turn;
    }
    return best;
}

/* Decides who computes what; counts rows and choices per member. */
static void assign(sh_experts *e, slot *s, const int32_t *ids, int n) {
    int k = e->o.config->top_k;
    for (int m = 0; m < e->o.members; m++) {
        s->peer[m].n_rows = s->peer[m].n_choices = e->load[m] = 0;
        e->last_row[m] = -1;
    }
    for (int i = 0; i < n * k; i++) {
        int m = choose_member(e, s->layer, ids[i]);
        e->to[i] = (int16_t)m;
        if (m < 0) continue;
        peer *p = &s->peer[m];
        e->load[m]++;
        p->n_choices++;
        p->n_rows += e->last_row[m] != i / k;
        e->last_row[m] = i / k;
    }
}

/* Gives each member's message and its answer their places, and writes the heads. */
static void place_messages(sh_experts *e, slot *s, int i) {
    size_t out = 0, answers = 0;
    for (int m = 0; m < e->o.members; m++) {
        peer *p = &s->peer[m];
        if (m == e->o.member) continue;
        p->rows.data = s->out + out;
        p->rows.len = rows_offset(p->n_choices) + (size_t)p->n_rows * e->row;
        out += align64(p->rows.len);
        p->results_in.data = s->answers + answers;
        p->results_in.len = results_offset() + (size_t)p->n_choices * e->result;
        answers += align64(p->results_in.len);
        head h = {MAGIC, ROWS, (uint16_t)e->value, s->turn, s->layer, i, p->n_rows, p->n_choices};
        memset(p->rows.data, 0, rows_offset(p->n_choices));
        memcpy(p->rows.data, &h, sizeof h);
        p->n_rows = p->n_choices = 0; /* counted again by pack */
        e->last_row[m] = -1;
    }
}

/* Each row once per member; the choices follow the head, with rows numbered as they lie in the message. */
static void pack(sh_experts *e, slot *s, const uint8_t *rows, const int32_t *ids, int n, const void **answer) {
    int k = e->o.config->top_k;
    for (int i = 0; i < n * k; i++) {
        int m = e->to[i], r = i / k;
        if (m < 0) continue;
        peer *p = &s->peer[m];
        const head *h = (const head *)(const void *)p->rows.data;
        if (e->last_row[m] != r)
            memcpy(p->rows.data + rows_offset(h->choices) + (size_t)p->n_rows++ * e->row, rows + (size_t)r * e->row,
                   e->row);
        e->last_row[m] = r;
        uint16_t choice[2] = {(uint16_t)(p->n_rows - 1), (uint16_t)ids[i]};
        memcpy(p->rows.data + sizeof(head) + (size_t)p->n_choices * sizeof choice, choice, sizeof choice);
        answer[i] = p->results_in.data + results_offset() + (size_t)p->n_choices++ * e->result;
    }
}

static sh_status send_all(sh_experts *e, slot *s, int i, enum kind kind) {
    s->sent_at[kind] = sh_now();
    for (int d = 1; d < e->o.members; d++) { /* beginning with the next, so that not all send to the same first */
        int m = (e->o.member + d) % e->o.members;
        outgoing *out = kind == ROWS ? &s->peer[m].rows : &s->peer[m].results;
        SH_TRY(e->o.link->ops->send(e->o.link, e->o.first_rank + m, channel(kind, i), out->data, out->len, &out->req));
    }
    return SH_OK;
}

static sh_status experts_begin(void *ctx, int i, int layer, const void *rows, const int32_t *ids, int n,
                               const void **answer) {
    sh_experts *e = ctx;
    slot *s = &e->slots[i];
    if (s->state != IDLE) SH_FAIL(SH_ESTATE, "experts: slot %d is in use", i);
    if (n < 0 || n > e->part_rows)
        SH_FAIL(SH_ELIMIT, "experts: a part of %d rows: 0 to %d are allowed", n, e->part_rows);
    s->layer = layer;
    SH_TRY(wait_until(e, s, ROWS, sends_done));
    s->turn = e->turns++;
    assign(e, s, ids, n);
    place_messages(e, s, i);
    pack(e, s, rows, ids, n, answer);
    for (int m = 0; m < e->o.members; m++)
        if (m != e->o.member) s->peer[m].results_in.state = AWAITED;
    s->awaited[RESULTS] = e->o.members - 1;
    s->state = SENT;
    SH_TRY(send_all(e, s, i, ROWS));
    return step(e);
}

/* --- here: rows of the others ---------------------------------------------------------------------------------------
 */

static sh_status check_choices(const sh_experts *e, const slot *s, int rank, const head *h,
                               const uint16_t (*choice)[2]) {
    for (int i = 0, row = -1; i < h->choices; i++) {
        if (choice[i][0] != row && choice[i][0] != row + 1)
            SH_FAIL(SH_EPEER, "experts: rows from rank %d: choice %d is of row %d after row %d", rank, i, choice[i][0],
                    row);
        row = choice[i][0];
        if (row >= h->rows)
            SH_FAIL(SH_EPEER, "experts: rows from rank %d: choice %d is of row %d: there are %d", rank, i, row,
                    h->rows);
        if (choice[i][1] >= e->o.config->experts || !e->mine[place_of(e, s->layer, choice[i][1])])
            SH_FAIL(SH_EPEER, "experts: rows from rank %d: choice %d is of expert %d, which member %d does not hold",
                    rank, i, choice[i][1], e->o.member);
        if (i + 1 == h->choices && row + 1 != h->rows)
            SH_FAIL(SH_EPEER, "experts: rows from rank %d: choices are of %d rows of %d", rank, row + 1, h->rows);
    }
    return SH_OK;
}

static sh_status check_head(const sh_experts *e, const slot *s, int i, enum kind kind, int rank, const head *h) {
    const char *name = kind == ROWS ? "rows" : "results";
    if (h->magic != MAGIC || h->kind != kind)
        SH_FAIL(SH_EPEER, "experts: %s from rank %d: magic %08x, kind %d: not what it should be", name, rank, h->magic,
                h->kind);
    if (h->value_bytes != e->value)
        SH_FAIL(SH_EPEER, "experts: %s from rank %d: values of %d bytes: this rank has %zu (another mode?)", name, rank,
                h->value_bytes, e->value);
    if (h->turn != s->turn || h->layer != s->layer || h->slot != i)
        SH_FAIL(SH_EPEER,
                "experts: %s from rank %d: exchange %llu, layer %d, slot %d: this rank is at exchange %llu, layer %d, "
                "slot %d",
                name, rank, (unsigned long long)h->turn, h->layer, h->slot, (unsigned long long)s->turn, s->layer, i);
    return SH_OK;
}

static sh_status read_guest(const sh_experts *e, const slot *s, int i, int m, sh_expert_guest *out) {
    const incoming *in = &s->peer[m].rows_in;
    const head *h = (const head *)(const void *)in->data;
    int rank = e->o.first_rank + m, most = e->part_rows * min_int(e->o.config->top_k, e->held);
    SH_TRY(check_head(e, s, i, ROWS, rank, h));
    if (h->rows < 0 || h->rows > e->part_rows || h->choices < h->rows || h->choices > most ||
        (h->rows == 0 && h->choices > 0) || in->len != rows_offset(h->choices) + (size_t)h->rows * e->row)
        SH_FAIL(SH_EPEER, "experts: rows from rank %d: %d rows, %d choices in %zu bytes: allowed are %d and %d", rank,
                h->rows, h->choices, in->len, e->part_rows, most);
    const uint16_t(*choice)[2] = (const uint16_t(*)[2])(const void *)(in->data + sizeof(head));
    SH_TRY(check_choices(e, s, rank, h, choice));
    *out = (sh_expert_guest){.n_rows = h->rows,
                             .n_choices = h->choices,
                             .choice = choice,
                             .rows = in->data + rows_offset(h->choices),
                             .results = s->peer[m].results.data + results_offset()};
    return SH_OK;
}

static sh_status experts_guests(void *ctx, int i, const sh_expert_guest **guests, int *n) {
    sh_experts *e = ctx;
    slot *s = &e->slots[i];
    if (s->state != SENT) SH_FAIL(SH_ESTATE, "experts: slot %d has no exchange to compute for", i);
    SH_TRY(wait_until(e, s, ROWS, all_here));
    SH_TRY(wait_until(e, s, RESULTS, sends_done)); /* of the slot's last exchange: their buffers are filled next */
    int count = 0;
    for (int m = 0; m < e->o.members; m++)
        if (m != e->o.member) SH_TRY(read_guest(e, s, i, m, &s->guests[count++]));
    s->state = ASKED;
    *guests = s->guests;
    *n = count;
    return SH_OK;
}

static sh_status experts_reply(void *ctx, int i) {
    sh_experts *e = ctx;
    slot *s = &e->slots[i];
    if (s->state != ASKED) SH_FAIL(SH_ESTATE, "experts: slot %d has nothing to answer", i);
    for (int m = 0, g = 0; m < e->o.members; m++) {
        peer *p = &s->peer[m];
        if (m == e->o.member) continue;
        int choices = s->guests[g++].n_choices;
        head h = {MAGIC, RESULTS, (uint16_t)e->value, s->turn, s->layer, i, 0, choices};
        memset(p->results.data, 0, results_offset());
        memcpy(p->results.data, &h, sizeof h);
        p->results.len = results_offset() + (size_t)choices * e->result;
        p->rows_in.state = AWAITED; /* of the slot's next exchange: may come any time from now on */
    }
    s->awaited[ROWS] = e->o.members - 1;
    s->state = REPLIED;
    SH_TRY(send_all(e, s, i, RESULTS));
    return step(e);
}

static sh_status experts_end(void *ctx, int i) {
    sh_experts *e = ctx;
    slot *s = &e->slots[i];
    if (s->state != REPLIED) SH_FAIL(SH_ESTATE, "experts: slot %d has no exchange to end", i);
    SH_TRY(wait_until(e, s, RESULTS, all_here));
    for (int m = 0; m < e->o.members; m++) {
        if (m == e->o.member) continue;
        incoming *in = &s->peer[m].results_in;
        const head *h = (const head *)(const void *)in->data;
        SH_TRY(check_head(e, s, i, RESULTS, e->o.first_rank + m, h));
        if (h->choices != s->peer[m].n_choices)
            SH_FAIL(SH_EPEER, "experts: results from rank %d: of %d choices: it was sent %d", e->o.first_rank + m,
                    h->choices, s->peer[m].n_choices);
        in->state = CLOSED;
    }
    s->state = IDLE;
    return SH_OK;
}

/* --- the rest ------------------------------------------------------------------------------------------------------
 */

static bool experts_holds(const void *ctx, int layer, int expert) {
    const sh_experts *e = ctx;
    return e->mine[place_of(e, layer, expert)];
}

static void fill_table(sh_experts *e) {
    e->peers = (sh_expert_peers){.ctx = e,
                                 .members = e->o.members,
                                 .part_rows = e->part_rows,
                                 .split_rows = e->o.split_rows,
                                 .holds = experts_holds,
                                 .begin = experts_begin,
                                 .guests = experts_guests,
                                 .reply = experts_reply,
                                 .end = experts_end,
                                 .poll = experts_poll};
}

const sh_expert_peers *sh_experts_peers(const sh_experts *e) {
    return &e->peers;
}

bool sh_experts_is_idle(const sh_experts *e) {
    for (int i = 0; i < SH_EXPERT_SLOTS; i++)
        for (int m = 0; m < e->o.members; m++) {
            const peer *p = &e->slots[i].peer[m];
            if (p->rows.req >= 0 || p->results.req >= 0 || p->rows_in.req >= 0 || p->results_in.req >= 0) return false;
        }
    return true;
}

sh_experts_times sh_experts_time(const sh_experts *e) {
    return e->times;
}
