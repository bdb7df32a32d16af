/*
 * Steady state of a plan with ranks that only read prompts. See forecast.h; formulas in docs/planning.md, "Ranks that
 * only read prompts".
 *
 * Of the S sequences that run, some are being read (the prefill ranks make their K/V) and the others decode. Both sides
 * have a pace that follows from how many decode: more of them make a step longer and ask for more prompts. The number
 * sought is the largest one at which prompts come as fast as they are asked for, and at which those that are read and
 * those that decode are no more than S.
 */
#include <math.h>
#include <stdlib.h>
#include "partition/cost_int.h"
#include "partition/forecast_int.h"
#include "partition/prefill_cost.h"

#define TRIES 24   /* of the number that decode */
#define CLOSE 1e-3 /* near enough */

/* The prompts' pipeline with pieces of some size. */
typedef struct pipe {
    double piece;   /* rows of a micro-batch */
    double busiest; /* seconds of the rank that takes longest, its links included */
    double through; /* seconds from its beginning on the first rank to its last rows' leaving */
    double into;    /* seconds that the links into a node that decodes need for its rows */
} pipe;

typedef struct scene {
    const sh_cost_model *m;
    const sh_workload *w;
    sh_plan_shape shape;
    double seqs, output, rows, chunk; /* output, rows: of a request; rows: of its prompt but the last */
    sh_cost_rank *decode;             /* [decode] */
    double *seconds, *link;           /* [pp] of each stage, and of the way to the next */
    double *taking;                   /* [decode] seconds per prompt row */
    double *out, *in;                 /* [n_rank] bytes to and from other nodes per prompt row */
    sh_cost_prompt_rank *prompt;      /* [prefill], and taken [decode]: as of the last call of look_at_prompts */
    sh_cost_taken *taken;
    pipe few, full;
} scene;

/* Both sides when `seqs` sequences decode. */
typedef struct pace {
    double seqs;
    sh_forecast_mix mix;
    sh_cost_cycle cycle;
    double rate;   /* requests per second that decode */
    double most;   /* requests per second whose prompts can be made */
    double first;  /* seconds from admission to the first decode row, while prompts need not queue */
    double period; /* of the prompts' micro-batches */
    double over;   /* > 0: more than can be */
    bool slower;   /* it is the prompts that cannot follow */
} pace;

static void release(scene *x) {
    free(x->decode);
    free(x->seconds);
    free(x->prompt);
    free(x->taken);
}

static sh_status make_scene(scene *x) {
    size_t decode = (size_t)x->shape.decode, stages = (size_t)x->shape.pp;
    x->decode = calloc(decode, sizeof *x->decode);
    x->seconds = calloc(2 * stages + decode + 2 * x->m->plan->n_rank, sizeof *x->seconds);
    x->prompt = calloc((size_t)x->shape.prefill, sizeof *x->prompt);
    x->taken = calloc(decode, sizeof *x->taken);
    if (!x->decode || !x->seconds || !x->prompt || !x->taken)
        SH_FAIL(SH_EMEMORY, "forecast: no memory for %zu ranks", x->m->plan->n_rank);
    x->link = x->seconds + stages;
    x->taking = x->link + stages;
    x->out = x->taking + decode;
    x->in = x->out + x->m->plan->n_rank;
    return SH_OK;
}

/* --- prompts -------------------------------------------------------------------------------------------------------
 */

static const sh_cost_link *way_from(const scene *x, int rank) {
    const sh_cost_net *n = &x->m->net;
    return sh_cost_node_of(x->m, rank) != 0 ? &n->between : &n->within;
}

/* Pieces of `piece` rows together, of prompts of each length in proportion to their rows. */
static int prompt_spans(const scene *x, double piece, sh_cost_span *span) {
    double sum = x->rows * x->w->requests;
    int n = 0;
    for (int i = 0; i < x->w->n; i++) {
        const sh_workload_bin *b = &x->w->bin[i];
        double all = b->prompt - 1, rows = all > 0 ? piece * b->requests * all / sum : 0, one = fmin(all, piece);
        if (rows > 0) span[n++] = (sh_cost_span){.seqs = rows / one, .rows = one, .lo = 0, .hi = all - one};
    }
    return n;
}

static sh_status look_at_prompts(scene *x, double piece, pipe *out) {
    sh_cost_span span[SH_WORKLOAD_BINS];
    pipe p = {.piece = piece};
    SH_TRY(sh_cost_prompts(x->m, span, prompt_spans(x, piece, span), x->prompt, x->taken));
    for (int i = 0; i < x->shape.prefill; i++) {
        const sh_cost_prompt_rank *r = &x->prompt[i];
        double busy = r->step.seconds + r->copying + SH_STEP_SECONDS;
        p.busiest = fmax(p.busiest, fmax(busy + r->exposed, r->step.cut.seconds));
        p.through += busy + r->step.cut.seconds;
    }
    p.into = sh_cost_taken_wire(x->m, x->taken);
    *out = p;
    return SH_OK;
}

/* Between a usual piece and a full chunk seconds grow with the rows. */
static pipe pipe_of(const scene *x, double piece) {
    const pipe *a = &x->few, *b = &x->full;
    double f = b->piece > a->piece ? (piece - a->piece) / (b->piece - a->piece) : 1;
    return (pipe){.piece = piece,
                  .busiest = a->busiest + f * (b->busiest - a->busiest),
                  .through = a->through + f * (b->through - a->through),
                  .into = a->into + f * (b->into - a->into)};
}

/* Rank 0 hears of rows, and makes micro-batches of prompts, between two of its own steps: every `lead` seconds. As many
 * are out as there are ranks, and one that is being confirmed. */
static double pipe_period(const scene *x, const pipe *p, double lead, double landing) {
    return fmax(fmax(p->busiest, p->into), fmax(p->through + landing, lead) / (x->shape.prefill + 1));
}

/* Bytes between nodes for each row of a prompt. */
static void set_lines(scene *x) {
    int decode = x->shape.decode, all = (int)x->m->plan->n_rank;
    for (int d = 0; d < decode; d++) x->in[d] = x->taken[d].far / x->chunk;
    for (int r = decode; r < all; r++) {
        const sh_cost_prompt_rank *p = &x->prompt[r - decode];
        bool leaves = r + 1 < all && sh_cost_node_of(x->m, r + 1) != sh_cost_node_of(x->m, r);
        x->out[r] = (p->far + (leaves ? p->step.cut.bytes : 0)) / x->chunk;
        if (leaves) x->in[r + 1] = p->step.cut.bytes / x->chunk;
    }
}

static sh_status set_prompts(scene *x) {
    if (!(x->rows > 0)) return SH_OK;
    SH_TRY(look_at_prompts(x, sh_forecast_usual_piece(x->w, 1, x->chunk), &x->few));
    SH_TRY(look_at_prompts(x, x->chunk, &x->full));
    for (int d = 0; d < x->shape.decode; d++) x->taking[d] = x->taken[d].seconds / x->chunk;
    set_lines(x);
    return SH_OK;
}

/* --- decode --------------------------------------------------------------------------------------------------------
 */

/* The way to the next stage; the last one's answers are small: a latency. */
static double way(const scene *x, int stage) {
    if (x->shape.pp == 1) return 0;
    return stage + 1 < x->shape.pp ? x->decode[stage].cut.seconds : way_from(x, x->shape.decode - 1)->latency;
}

/* Seconds for which the busiest link of a node is at one micro-batch of decode rows and at the `rows` rows of prompts
 * for each of them: what crosses cuts and K/V go over the same one. */
static double lines(const scene *x, double rows) {
    int all = (int)x->m->plan->n_rank, decode = x->shape.decode;
    double most = 0, in = 0, out = 0;
    for (int r = 0; r < all; r++) {
        bool first = r == 0 || sh_cost_node_of(x->m, r - 1) != sh_cost_node_of(x->m, r);
        bool leaves = r + 1 < decode && sh_cost_node_of(x->m, r + 1) != sh_cost_node_of(x->m, r);
        if (first) in = out = 0;
        in += rows * x->in[r] + (first && r > 0 && r < decode ? x->decode[r - 1].cut.bytes : 0);
        out += rows * x->out[r] + (leaves ? x->decode[r].cut.bytes : 0);
        most = fmax(most, fmax(in, out));
    }
    return most / x->m->net.between.bandwidth;
}

/* sh_cost_ring for micro-batches that are all alike: nobody waits for a longer one, so the busiest stage or link sets
 * the pace, or there are too few of them to fill the ring. least: the period is no less. */
static sh_cost_cycle even_ring(const scene *x, double in_flight, double least) {
    double around = 0;
    sh_cost_cycle c = {.period = least};
    for (int s = 0; s < x->shape.pp; s++) {
        around += x->seconds[s] + x->link[s];
        c.period = fmax(c.period, fmax(x->seconds[s], x->link[s]));
        if (x->seconds[s] > x->seconds[c.slowest]) c.slowest = s;
    }
    c.period = fmax(c.period, around / in_flight);
    c.round_trip = c.period * in_flight;
    c.bubble = 1 - x->seconds[c.slowest] / c.period;
    return c;
}

/* Every token put out is a decode row, the first one included: it is the prompt's last token's. */
static sh_status look_at_decode(scene *x, double seqs, pace *out) {
    pace p = {.seqs = seqs};
    double running = fmax(1, seqs);
    p.mix.in_flight = fmin(x->shape.pp, running);
    p.mix.decode = running / p.mix.in_flight;
    p.mix.requests = p.mix.decode / x->output;
    sh_forecast_add_decode(&p.mix, x->w, 0);
    SH_TRY(sh_cost_step(x->m, p.mix.span, p.mix.n_decode, x->decode));
    for (int s = 0; s < x->shape.pp; s++) {
        x->seconds[s] = x->decode[s].seconds + SH_STEP_SECONDS + p.mix.requests * x->rows * x->taking[s];
        x->link[s] = way(x, s);
    }
    p.cycle = even_ring(x, p.mix.in_flight, lines(x, p.mix.requests * x->rows));
    if (seqs < 1) p.cycle.period /= seqs; /* now and then nothing decodes */
    p.rate = p.mix.requests / p.cycle.period;
    *out = p;
    return SH_OK;
}

/* --- both ----------------------------------------------------------------------------------------------------------
 */

/* Rows of a micro-batch of prompts: those of one prompt, and more where they come faster than micro-batches do. */
static pipe usual_pipe(const scene *x, double rate, double lead, double landing) {
    pipe p = x->few;
    for (int i = 0; i < 8; i++) {
        double came = rate * x->rows * pipe_period(x, &p, lead, landing);
        if (came <= p.piece || p.piece >= x->chunk) break;
        p = pipe_of(x, fmin(x->chunk, came));
    }
    return p;
}

/* Requests per second that can be read: full chunks one after the other, and no more prompts on their way than have
 * pages, each for as long as it takes alone. */
static double most_of(const scene *x, double lead, double landing) {
    double period = pipe_period(x, &x->full, lead, landing), most = x->chunk / (x->rows * period);
    double alone = x->full.through + landing + (fmax(1, x->rows / x->chunk) - 1) * period;
    return x->m->prompts > 0 ? fmin(most, fmax(1, x->m->prompts) / alone) : most;
}

static sh_status look_at_both(scene *x, double seqs, pace *out) {
    SH_TRY(look_at_decode(x, seqs, out));
    if (!(x->rows > 0)) return SH_OK;
    double busy = fmin(1, x->seconds[0] / out->cycle.period), lead = busy * x->seconds[0];
    double landing = way_from(x, (int)x->m->plan->n_rank - 1)->latency + lead / 2;
    if (x->shape.decode > 1) landing += way_from(x, x->shape.decode - 1)->latency; /* the others' words to rank 0 */
    pipe p = usual_pipe(x, out->rate, lead, landing);
    out->mix.piece = p.piece;
    out->most = most_of(x, lead, landing);
    out->period = pipe_period(x, &p, lead, landing);
    out->first = p.through + landing + (fmax(1, x->rows / x->chunk) - 1) * out->period;
    double waits = out->rate / out->most - 1, places = (seqs + out->rate * out->first) / x->seqs - 1;
    out->slower = waits > places;
    out->over = fmax(waits, places);
    return SH_OK;
}

/* The number that decode: where `over` passes from below 0 to above. asked: requests per second if all did. */
static sh_status settle(scene *x, pace *out, double *asked) {
    double lo = 0, hi = x->seqs, below = -1;
    bool before = false; /* there were too many: where the rate is flat a straight line from 0 hardly moves, twice */
    SH_TRY(look_at_both(x, hi, out));
    *asked = out->rate;
    for (int i = 0; i < TRIES && x->rows > 0 && fabs(out->over) > CLOSE; i++) {
        bool over = out->over > 0;
        if (over)
            hi = out->seqs;
        else
            lo = out->seqs, below = out->over;
        double next = over && !before ? lo + (hi - lo) * below / (below - out->over) : (lo + hi) / 2;
        double least = lo + 0.05 * (hi - lo), most = hi - 0.05 * (hi - lo);
        before = over;
        SH_TRY(look_at_both(x, fmin(most, fmax(least, next)), out));
    }
    return out->over > CLOSE && lo > 0 ? look_at_both(x, lo, out) : SH_OK; /* never more than can be */
}

/* --- what it comes to ----------------------------------------------------------------------------------------------
 */

static double longest(const sh_workload *w) {
    double n = 0;
    for (int i = 0; i < w->n; i++) n = fmax(n, w->bin[i].output);
    return n;
}

/* What a job takes beyond its rate. Until the first prompts have come decode ranks fill up: half of them work, or none
 * where all sequences come at once. At the end the last sequences run out; where prompts set the pace the last one has
 * all of its output before it when the last prompt has been made. */
static double start_and_end(const scene *x, const pace *p, double replicas) {
    double trip = p->cycle.round_trip, first = x->rows > 0 ? p->first : 0;
    if (!(x->rows > 0)) return sh_forecast_tail(x->w, p->seqs * replicas) * trip;
    if (p->slower) return first + longest(x->w) * trip;
    double at_once = fmin(1, x->seqs * replicas / x->w->requests), fill = p->seqs / p->most;
    return first + fill * (1 + at_once) / 2 + sh_forecast_tail(x->w, x->seqs * replicas) * trip;
}

static void idle(double period, sh_forecast_rank *r) {
    double busy = r->exchange;
    for (int k = 0; k < SH_CAUSES; k++) busy += r->seconds[k];
    r->idle = fmax(0, period - busy);
}

static void tell_decode(const scene *x, const pace *p, int rank, sh_forecast_rank *out) {
    sh_forecast_rank r = {0};
    sh_forecast_add_rank(&x->decode[rank], 1, &r);
    r.seconds[SH_CAUSE_OTHER] += SH_STEP_SECONDS;
    r.exchange += p->mix.requests * x->rows * x->taking[rank];
    idle(p->cycle.period, &r);
    *out = r;
}

/* What a rank that reads prompts does while one micro-batch of decode rows goes by. */
static void tell_prompts(const scene *x, const pace *p, int i, sh_forecast_rank *out) {
    const sh_cost_prompt_rank *c = &x->prompt[i];
    sh_forecast_rank r = {0};
    double share = p->mix.mixed;
    sh_forecast_add_rank(&c->step, share, &r);
    r.seconds[SH_CAUSE_OTHER] += share * SH_STEP_SECONDS;
    r.exchange += share * (c->copying + c->exposed);
    r.overlapped += share * (c->rows.seconds - c->exposed);
    r.sent[SH_FORECAST_WIRES - 1] = share * c->rows.bytes;
    idle(p->cycle.period, &r);
    *out = r;
}

static double tell_ranks(const scene *x, const pace *p, sh_forecast_rank *rank) {
    double sent = 0;
    for (int i = 0; i < (int)x->m->plan->n_rank; i++) {
        sh_forecast_rank r;
        if (i < x->shape.decode)
            tell_decode(x, p, i, &r);
        else
            tell_prompts(x, p, i - x->shape.decode, &r);
        for (int k = 0; k < SH_FORECAST_WIRES; k++) sent += r.sent[k];
        if (rank) rank[i] = r;
    }
    return sent;
}

static void tell_prompts_side(const scene *x, const pace *p, sh_forecast_prompts *out) {
    out->rows = p->most * x->rows;
    out->slower = p->slower;
    out->period = p->period;
    out->handing = x->seqs - p->seqs;
    out->first = p->slower ? out->handing / p->rate : p->first;
    for (int i = 0; i < x->shape.prefill; i++) out->exposed = fmax(out->exposed, x->prompt[i].exposed);
}

/* The span of prompts joins the mixture, as the last look at them had it. */
static sh_status finish_mix(scene *x, pace *p) {
    pipe last;
    if (!(x->rows > 0)) {
        p->mix.n_spans = p->mix.n_decode;
        return SH_OK;
    }
    if (p->slower) p->mix.piece = x->chunk;
    SH_TRY(look_at_prompts(x, p->mix.piece, &last));
    p->mix.mixed = p->mix.requests * x->rows / p->mix.piece;
    p->mix.n_spans = p->mix.n_decode + prompt_spans(x, p->mix.piece, p->mix.span + p->mix.n_decode);
    return SH_OK;
}

static sh_status tell(scene *x, double replicas, sh_forecast *f, sh_forecast_rank *rank) {
    pace p;
    double asked = 0;
    SH_TRY(settle(x, &p, &asked));
    SH_TRY(finish_mix(x, &p));
    f->mix = p.mix;
    f->cycle = p.cycle;
    f->requests = p.rate * replicas;
    f->tokens_out = f->requests * x->output;
    f->tokens_in = f->requests * sh_workload_mean_prompt(x->w);
    f->step_decode = f->step_mixed = x->seconds[p.cycle.slowest];
    f->seconds = x->w->requests / f->requests + start_and_end(x, &p, replicas);
    f->sent = tell_ranks(x, &p, rank) / (p.mix.requests * x->output);
    tell_prompts_side(x, &p, &f->prompts);
    f->prompts.needed = asked * x->rows;
    return SH_OK;
}

sh_status sh_forecast_with_prefill(const sh_cost_model *m, const sh_workload *w, double seqs, double replicas,
                                   sh_forecast *out, sh_forecast_rank *rank) {
    scene x = {.m = m, .w = w, .shape = sh_plan_shape_of(m->plan)};
    sh_forecast f = {.seqs = fmax(1, fmin(seqs, w->requests / replicas))};
    x.seqs = f.seqs;
    x.output = sh_workload_mean_output(w);
    x.rows = sh_workload_mean_prompt(w) - 1;
    x.chunk = m->plan->chunk;
    if (m->prompts > 0) x.chunk = fmin(x.chunk, fmax(1, m->prompts) * x.rows); /* that have pages at once */
    sh_status st = make_scene(&x);
    if (st == SH_OK) st = set_prompts(&x);
    if (st == SH_OK) st = tell(&x, replicas, &f, rank);
    release(&x);
    if (st == SH_OK) *out = f;
    return st;
}
