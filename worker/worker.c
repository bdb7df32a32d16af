/*
 * One rank from hello to leave: welcome, resources, loading, then the leader's loop on rank 0 and the stage's loop
 * elsewhere. The scheduler, the stage and the uplink are files of their own; this one only connects them.
 */
#include "worker/worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/hash.h"
#include "common/keep.h"
#include "common/log.h"
#include "model/weights.h"
#include "partition/machine.h"
#include "partition/plan.h"
#include "worker/backoff.h"
#include "worker/lanes.h"
#include "worker/ranks.h"
#include "worker/sight.h"
#include "worker/stage.h"
#include "worker/uplink.h"

#define LEAVE_SECONDS 3.0 /* for what is in flight, and for the others */
#define BEAT_SECONDS  0.05

typedef struct rank {
    sh_link *link;
    const sh_worker_options *o;
    sh_uplink *uplink;
    const Shoal__Plan *plan; /* borrowed from the welcome, as is model_dir */
    const char *model_dir;
    sh_sight model; /* what is there, the same on all ranks */
    sh_config *config;
    sh_machine *machine;
    sh_machine_part part;
    sh_mode mode;
    sh_kv_type kv;
    sh_plan_shape shape;
    sh_leader_options schedule; /* of one lane */
    sh_stage *stage;
    sh_lanes *lanes; /* rank 0 */
    /* where some ranks make the K/V of prompts */
    sh_config *own; /* the model as this rank computes it */
    sh_kv_stream_options stream;
    sh_kv_receiver *receiver; /* the others */
    sh_backoff idle;
    double beat_at, routing_at;
    bool routing_told;
    uint64_t routing_steps;
    uint64_t reported; /* the last report that was asked for and given */
    uint64_t answers;  /* rank 0: micro-batches come back */
    /* where the coordinator asked for a timeline */
    sh_timeline *timeline;
    sh_trace *trace;
    bool served; /* all that may be wrong with files, plan and memory was found right */
} rank;

/* ---- start-up
 * --------------------------------------------------------------------------------------------------------- */

static sh_status check_alive(void *arg) {
    const rank *r = arg;
    sh_uplink_state s = sh_uplink_look(r->uplink);
    if (s == SH_UPLINK_LEAVE) SH_FAIL(SH_ECANCELLED, "told to leave: %s", sh_uplink_reason(r->uplink));
    if (s == SH_UPLINK_ORPHAN) SH_FAIL(SH_EPEER, "%s", sh_uplink_reason(r->uplink));
    return SH_OK;
}

/* Collective: all ranks find the same model, or all fail. */
static sh_status agree_model(rank *r) {
    const sh_alive alive = {check_alive, r};
    SH_TRY(sh_sight_take(r->model_dir, &r->model));
    sh_sight *all = calloc((size_t)r->link->size, sizeof *all);
    if (!all) SH_FAIL(SH_EMEMORY, "no memory for what ranks find");
    sh_status st = sh_ranks_exchange(r->link, &r->model, sizeof r->model, all, &alive);
    if (st == SH_OK) st = sh_sight_compare(r->model_dir, all, r->link->size);
    free(all);
    return st == SH_OK ? SH_OK : sh_error_pass(st, __FILE__, __LINE__);
}

static sh_status read_plan(rank *r) {
    const Shoal__Welcome *w = NULL;
    SH_TRY(sh_uplink_welcome(r->uplink, &w));
    r->plan = w->plan;
    r->model_dir = w->model;
    r->config = calloc(1, sizeof *r->config);
    if (!r->config) SH_FAIL(SH_EMEMORY, "no memory for the configuration");
    SH_TRY(sh_config_load(r->model_dir, r->config));
    SH_TRY(agree_model(r)); /* before it is believed that the plan is for it */
    SH_TRY(sh_plan_check(r->config, r->plan));
    if ((int)r->plan->n_rank != r->link->size)
        SH_FAIL(SH_EPEER, "plan: %zu ranks: this group has %d", r->plan->n_rank, r->link->size);
    SH_TRY(sh_mode_parse(r->plan->mode, &r->mode));
    SH_TRY(sh_kv_type_parse(r->plan->kv, &r->kv));
    r->shape = sh_plan_shape_of(r->plan);
    sh_kv_limits lane;
    SH_TRY(sh_plan_kv_limits(r->plan, &lane));
    r->schedule = (sh_leader_options){.stages = r->shape.pp,
                                      .max_seqs = lane.max_seqs,
                                      .chunk = lane.chunk,
                                      .max_context = lane.max_context,
                                      .members = r->shape.cp};
    sh_leader_options_model(&r->schedule, r->config);
    r->schedule.prefill = r->shape.prefill;
    r->schedule.confirms = r->shape.decode;
    r->schedule.share = !r->plan->no_prefix_sharing;
    return SH_OK;
}

/* Collective: all ranks were asked, or none. */
static sh_status prepare_trace(rank *r) {
    const sh_alive alive = {check_alive, r};
    const Shoal__Welcome *w = NULL;
    sh_rank_clock clock;
    SH_TRY(sh_uplink_welcome(r->uplink, &w));
    if (w->trace_steps == 0) return SH_OK;
    SH_TRY(sh_timeline_create(SH_TRACE_RING, w->trace_first, w->trace_steps, &r->timeline));
    SH_TRY(sh_ranks_clock(r->link, &alive, &clock));
    SH_TRY(sh_trace_create(r->timeline, clock, &r->trace));
    sh_uplink_trace(r->uplink, r->trace);
    return SH_OK;
}

static bool makes_prompts(const rank *r) {
    return r->link->rank >= r->shape.decode;
}

typedef struct neighbour { /* what ranks tell each other to share a node */
    char host[128];
    uint64_t cpu_set; /* hash of the CPUs that the process may use */
} neighbour;

/* Leaves this group its part of a node that other groups use, too. Their memory is gone already when this group is
 * started again, so what was measured then says little: a stated limit goes before it. */
static void leave_others(rank *r, bool bound) {
    const sh_worker_options *o = r->o;
    if (o->parts > 1 && !bound) sh_machine_keep_cpus(r->machine, o->part, o->parts);
    if (o->memory && o->memory < r->machine->memory) r->machine->memory = o->memory;
    if (o->parts > 1 && !o->memory) r->machine->memory /= (uint64_t)o->parts;
}

/* This rank's CPUs and memory. Ranks of one node share what the process may use; where the launcher bound them, those
 * that were bound to the same CPUs share these. */
static sh_status share_node(rank *r) {
    const sh_alive alive = {check_alive, r};
    neighbour me = {0};
    r->machine = calloc(1, sizeof *r->machine);
    neighbour *all = calloc((size_t)r->link->size, sizeof *all);
    sh_status st = SH_OK;
    if (!r->machine || !all) st = sh_error_set(SH_EMEMORY, __FILE__, __LINE__, "no memory for the machine description");
    if (st == SH_OK) st = sh_machine_read(NULL, r->machine);
    if (st == SH_OK && r->o->n_cpus > 0) {
        r->machine->n_cpus = r->o->n_cpus < SH_MAX_CPUS ? r->o->n_cpus : SH_MAX_CPUS;
        memcpy(r->machine->cpus, r->o->cpus, (size_t)r->machine->n_cpus * sizeof(int));
        memset(r->machine->numa, 0, sizeof r->machine->numa);
    }
    if (st == SH_OK) {
        if (gethostname(me.host, sizeof me.host - 1) != 0) snprintf(me.host, sizeof me.host, "unknown");
        me.cpu_set = sh_hash64(0, r->machine->cpus, (size_t)r->machine->n_cpus * sizeof(int));
        st = sh_ranks_exchange(r->link, &me, sizeof me, all, &alive);
    }
    int n = 0, same = 0, own = 0; /* ranks on this node; with these CPUs; before this one among those */
    for (int i = 0; st == SH_OK && i < r->link->size; i++) {
        if (strncmp(all[i].host, me.host, sizeof me.host) != 0) continue;
        n++;
        if (all[i].cpu_set != me.cpu_set) continue;
        own += i < r->link->rank;
        same++;
    }
    free(all);
    if (st != SH_OK) return sh_error_pass(st, __FILE__, __LINE__);
    leave_others(r, same < n);
    r->part = sh_machine_share_bound(r->machine, own, same, n);
    return SH_OK;
}

static int threads_of(const rank *r) {
    int given = r->o->threads > 0 ? r->o->threads : r->plan->threads;
    return given > 0 ? given : r->part.n_cpus;
}

/* What this rank may spend on KV; a refusal also tells which limit it met. */
static sh_status kv_budget(const rank *r, uint64_t *out) {
    sh_status st = sh_plan_kv_budget(r->config, r->plan, r->link->rank, threads_of(r), r->part.memory, out);
    if (st != SH_EMEMORY) return st;
    const sh_memory_limit *l = &r->machine->limit[r->machine->memory_from];
    char why[768];
    snprintf(why, sizeof why, "%s", sh_error_text());
    SH_FAIL(st, "%s (the node's limit is %s: %s)", why, l->name, l->source);
}

/* The same page counts on every rank, from every rank's budget. */
static sh_status agree_pages(rank *r) {
    const sh_alive alive = {check_alive, r};
    uint64_t mine = 0;
    sh_kv_limits limits;
    sh_kv_plan kv, prompts = {0};
    SH_TRY(kv_budget(r, &mine));
    SH_TRY(sh_plan_kv_limits(r->plan, &limits));
    uint64_t *all = calloc((size_t)r->link->size, sizeof *all);
    if (!all) SH_FAIL(SH_EMEMORY, "no memory for the budgets");
    sh_status st = sh_ranks_exchange(r->link, &mine, sizeof mine, all, &alive);
    if (st == SH_OK) st = sh_plan_kv_group(r->config, &limits, r->plan, all, &kv);
    if (st == SH_OK && r->shape.prefill > 0) st = sh_plan_kv_prefill(r->config, &limits, r->plan, all, &prompts);
    free(all);
    if (st != SH_OK) return sh_error_pass(st, __FILE__, __LINE__);
    memcpy(r->schedule.pages, kv.pages, sizeof kv.pages);
    memcpy(r->schedule.prefill_pages, prompts.pages, sizeof prompts.pages);
    return SH_OK;
}

static const sh_kernels *kernels_of(const rank *r) {
    return sh_model_kernels(sh_stage_model(r->stage));
}

/* Hash of the checkpoint and of what else decides a group's results beside the requests. */
static uint64_t fingerprint(const rank *r) {
    uint64_t h = sh_hash64(r->model.weights, r->plan->mode, strlen(r->plan->mode));
    return sh_hash64(h, r->plan->kv, strlen(r->plan->kv));
}

/* Before the stage is made: what it needs to send K/V rows, or to take them. */
static sh_status prepare_stream(rank *r) {
    r->stream = (sh_kv_stream_options){
        .link = r->link, .config = r->config, .plan = r->plan, .schedule = &r->schedule, .type = r->kv};
    r->own = calloc(1, sizeof *r->own);
    if (!r->own) SH_FAIL(SH_EMEMORY, "no memory for the configuration");
    sh_plan_rank_config(r->config, r->plan, r->link->rank, r->own);
    r->stream.model = fingerprint(r);
    return SH_OK;
}

static void told_of_load(void *arg, const sh_load_times *t) {
    const rank *r = arg;
    sh_uplink_load(r->uplink, t);
}

static sh_status load(rank *r) {
    const Shoal__PlanRank *layers = r->plan->rank[r->link->rank];
    const sh_alive alive = {check_alive, r};
    SH_TRY(prepare_stream(r));
    sh_stage_options o = {.model_dir = r->model_dir,
                          .config = r->own,
                          .mode = r->mode,
                          .kv_type = r->kv,
                          .first = layers->first,
                          .last = layers->last,
                          .threads = threads_of(r),
                          .cpus = r->part.cpus,
                          .n_cpus = r->part.n_cpus,
                          .schedule = &r->schedule,
                          .stages = makes_prompts(r) ? r->shape.prefill : r->shape.pp,
                          .root = makes_prompts(r) ? r->shape.decode : 0,
                          .stream = r->shape.prefill > 0 ? &r->stream : NULL,
                          .width = r->shape.width,
                          .lanes = r->shape.ep > 1,
                          .spread = r->shape.cp > 1,
                          .share = sh_plan_share(r->plan, r->link->rank),
                          .plan = r->plan,
                          .link = r->link,
                          .load_together = r->plan->share_weights,
                          .alive = &alive,
                          .load_told = told_of_load,
                          .load_arg = r,
                          .timeline = r->timeline};
    SH_TRY(sh_stage_create(&o, &r->stage));
    if (o.stream && !makes_prompts(r)) {
        SH_TRY(sh_kv_receiver_create(o.stream, sh_stage_kv(r->stage), &r->receiver));
        sh_stage_take_rows(r->stage, r->receiver);
    }
    return r->link->rank > 0 ? SH_OK : sh_lanes_create(&r->schedule, sh_stage_lanes(&o), &r->lanes);
}

/* What the kernels of some rank take from all results. */
typedef struct reservation {
    bool blas, modelled;
} reservation;

static void add_note(char *to, size_t room, const char *text) {
    size_t n = strlen(to);
    snprintf(to + n, room - n, "%s%s", n ? "; " : "", text);
}

static sh_status announce(rank *r) {
    const sh_alive alive = {check_alive, r};
    const char *isa = kernels_of(r)->isa;
    reservation mine = {.blas = strcmp(isa, "blas") == 0, .modelled = kernels_of(r)->modelled}, any = mine;
    reservation *all = calloc((size_t)r->link->size, sizeof *all);
    if (!all) SH_FAIL(SH_EMEMORY, "no memory for the notes");
    sh_status st = sh_ranks_exchange(r->link, &mine, sizeof mine, all, &alive); /* also: everyone has loaded */
    for (int i = 0; st == SH_OK && i < r->link->size; i++) {
        any.blas = any.blas || all[i].blas;
        any.modelled = any.modelled || all[i].modelled;
    }
    free(all);
    if (st != SH_OK) return sh_error_pass(st, __FILE__, __LINE__);
    const Shoal__PlanRank *p = r->plan->rank[r->link->rank];
    sh_load_times l = sh_model_load(sh_stage_model(r->stage));
    sh_info(
        "layers %d-%d loaded: %.1f MiB of weights, %d threads, %s kernels; %.2f GB of files and %.2f GB of other ranks "
        "in %.1f s (reading %.1f s, packing %.1f s, exchange %.1f s)",
        p->first, p->last - 1, (double)sh_model_weight_bytes(sh_stage_model(r->stage)) / 1048576.0,
        sh_team_size(sh_model_team((sh_model *)sh_stage_model(r->stage))), isa, (double)l.bytes * 1e-9,
        (double)l.received * 1e-9, l.seconds, l.reading, l.packing, l.exchange);
    if (r->link->rank > 0) return SH_OK;
    char note[256] = "";
    if (any.blas) add_note(note, sizeof note, "SHOAL_ISA=blas: results are not invariant");
    if (any.modelled) add_note(note, sizeof note, "SHOAL_ISA=model: results are made up, only the times are of use");
    if (r->shape.tp > 1 && r->plan->tp_sum)
        add_note(note, sizeof note, "--tp-reduce sum: results are not invariant: they depend on --tp");
    if (r->plan->share_weights && r->link->size > 1 && r->model.kind >= 0)
        add_note(note, sizeof note, "--share-weights does nothing here: ranks map the packed folder");
    uint64_t print = fingerprint(r);
    if (mine.modelled) print = sh_hash64(print, "modelled", 8); /* never a row of these among the model's */
    int lanes = r->shape.ep;
    return sh_uplink_ready(r->uplink, sh_leader_capacity(&r->schedule), lanes * sh_leader_total(&r->schedule),
                           lanes * r->schedule.max_seqs, print, r->config->vocab, *note ? note : NULL);
}

/* ---- both loops
 * ----------------------------------------------------------------------------------------------------------- */

/* Tells the uplink what was routed where: about once a second, and when the rank has come to rest. The first time,
 * before the loop, makes the room. */
static sh_status tell_routing(rank *r, bool busy) {
    const uint64_t *chosen = sh_model_chosen(sh_stage_model(r->stage));
    uint64_t steps = sh_stage_steps(r->stage);
    double now = sh_now();
    if (!chosen || (r->routing_told && (steps == r->routing_steps || (busy && now - r->routing_at < 1)))) return SH_OK;
    const Shoal__PlanRank *p = r->plan->rank[r->link->rank];
    SH_TRY(sh_uplink_routing(r->uplink, p->first, p->last - p->first, r->config->experts, chosen));
    r->routing_told = true;
    r->routing_steps = steps;
    r->routing_at = now;
    return SH_OK;
}

/* Something to do has come, at `at` or just now: the wait for it is over. */
static void rested(rank *r, double at) {
    if (r->idle.since > 0) sh_timeline_note(r->timeline, SH_SLICE_IDLE, r->idle.since, at > 0 ? at : sh_now());
    sh_backoff_reset(&r->idle);
}

/* Refreshes the heartbeat: around every step, and now and then while waiting. */
static void beat(rank *r, bool busy, bool now_please) {
    double now = sh_now();
    uint64_t asked = sh_uplink_asked(r->uplink);
    bool wanted = asked != r->reported;
    if (!now_please && !wanted && now - r->beat_at < BEAT_SECONDS) return;
    r->beat_at = now;
    r->reported = asked;
    sh_model_times t = sh_model_time(sh_stage_model(r->stage));
    uint64_t steps = sh_stage_steps(r->stage);
    sh_experts_times x = sh_stage_experts_time(r->stage);
    double waited = x.exposed[SH_KV_GLOBAL] + x.exposed[SH_KV_SLIDING]; /* the model books it as its experts' */
    sh_beat b = {.report = asked,
                 .step = steps + r->answers,
                 .steps = steps,
                 .busy = busy,
                 .weights = t.weights,
                 .attention = t.attention,
                 .experts = t.experts - waited,
                 .expert_rows = sh_model_expert_rows(sh_stage_model(r->stage)),
                 .other = t.other,
                 .exchange = sh_stage_exchange_seconds(r->stage) + waited,
                 .idle = r->idle.idle,
                 .bytes = steps * sh_model_weight_bytes(sh_stage_model(r->stage)),
                 .sent = r->link->sent_bytes - r->link->sent_by_tag[SH_TAG_WEIGHTS]};
    if (r->lanes) {
        sh_leader_state s = sh_lanes_look(r->lanes);
        b.leader = true;
        b.busy = busy || s.in_flight > 0 || s.prompts_out > 0;
        b.running = s.running;
        b.waiting = s.waiting;
        b.kv_free = s.kv_free;
        b.shared_rows = s.shared;
    }
    memcpy(b.exposed, x.exposed, sizeof b.exposed);
    memcpy(b.travel, x.travel, sizeof b.travel);
    memcpy(b.sent_by_tag, r->link->sent_by_tag, sizeof b.sent_by_tag);
    SH_IGNORE(tell_routing(r, busy && !wanted)); /* cannot fail any more: the first one made the room */
    sh_uplink_beat(r->uplink, &b);
}

/* ---- rank 0
 * ----------------------------------------------------------------------------------------------------------------- */

static void emit(void *arg, uint64_t key, const sh_token *t) {
    const rank *r = arg;
    sh_uplink_token(r->uplink, key, t);
}

static sh_status take_inbox(rank *r) {
    sh_inbox in;
    while (sh_uplink_take(r->uplink, &in)) {
        if (in.kind == SH_INBOX_CANCEL) {
            sh_lanes_cancel(r->lanes, in.key);
            continue;
        }
        bool known = false;
        sh_status st = sh_lanes_add(r->lanes, &in.seq, &known);
        if (st == SH_ELIMIT) sh_uplink_reject(r->uplink, in.key, sh_error_text());
        sh_seq_destroy(&in.seq); /* NULL when the leader took it */
        if (st != SH_OK && st != SH_ELIMIT) return sh_error_pass(st, __FILE__, __LINE__);
    }
    return SH_OK;
}

static void note_queue(const rank *r) {
    if (!sh_timeline_is_on(r->timeline)) return;
    sh_leader_state s = sh_lanes_look(r->lanes);
    sh_slice_work w = {.rows = s.in_flight, .decode = s.running, .prompt = s.waiting};
    sh_timeline_queue(r->timeline, sh_now(), &w);
}

static sh_status take_answers(rank *r, bool *worked) {
    for (bool got = true; got;) {
        uint64_t step = 0;
        const sh_token *tokens = NULL;
        int n = 0, lane = 0;
        SH_TRY(sh_stage_answer(r->stage, &got, &lane, &step, &tokens, &n));
        if (!got) break;
        SH_TRY(sh_lanes_apply(r->lanes, lane, step, tokens, n, emit, r));
        note_queue(r);
        r->answers++;
        *worked = true;
    }
    return SH_OK;
}

/* K/V rows of prompts that have come, and what the ranks say of theirs. */
static sh_status take_rows(rank *r, bool *worked) {
    if (!r->receiver) return SH_OK;
    SH_TRY(sh_kv_receiver_poll(r->receiver, sh_stage_steps(r->stage), worked));
    for (bool got = r->lanes != NULL; got;) {
        uint64_t step = 0;
        bool ok = false;
        SH_TRY(sh_kv_receiver_landed(r->receiver, &got, &step, &ok));
        if (!got) break;
        SH_TRY(sh_lanes_confirm(r->lanes, step, ok));
        r->answers++;
        *worked = true;
    }
    return SH_OK;
}

/* As many micro-batches of prompts as may be out: a step of rank 0's own can take longer than one of these. */
static sh_status lead_prompts(rank *r, bool *worked) {
    for (bool made = true; made && r->receiver && sh_stage_has_room_for_prompts(r->stage);) {
        sh_batch *batch = NULL;
        SH_TRY(sh_lanes_next_prompts(r->lanes, &batch, &made));
        if (!made) break;
        *worked = true;
        SH_TRY(sh_stage_send_prompts(r->stage, batch));
    }
    return SH_OK;
}

static sh_status lead_step(rank *r, bool *worked) {
    bool made = false;
    sh_batch *batches = NULL;
    if (!sh_stage_has_room(r->stage)) return SH_OK;
    SH_TRY(sh_lanes_next(r->lanes, &batches, &made));
    if (!made) return SH_OK;
    rested(r, 0); /* the step is not waiting */
    note_queue(r);
    beat(r, true, true); /* busy from here on, should the step get stuck */
    SH_TRY(sh_stage_lead(r->stage, batches));
    *worked = true;
    return SH_OK;
}

static bool is_busy(const rank *r) {
    sh_leader_state s = sh_lanes_look(r->lanes);
    return s.in_flight > 0 || s.prompts_out > 0;
}

/* Told to leave: what is in flight comes home, then the word goes down the pipeline. */
static sh_status lead_out(rank *r) {
    sh_backoff wait = {0};
    for (double until = sh_now() + LEAVE_SECONDS; is_busy(r);) {
        bool worked = false;
        SH_TRY(sh_stage_progress(r->stage));
        SH_TRY(take_answers(r, &worked));
        SH_TRY(take_rows(r, &worked));
        if (sh_now() > until) SH_FAIL(SH_ECANCELLED, "left with micro-batches in flight");
        if (!worked) sh_backoff_wait(&wait);
    }
    if (sh_ranks_pass_leave(r->link, LEAVE_SECONDS) != SH_OK) SH_FAIL(SH_ECANCELLED, "left before the next rank did");
    return SH_OK;
}

static sh_status lead(rank *r) {
    for (;;) {
        bool worked = false;
        sh_uplink_state s = sh_uplink_look(r->uplink);
        if (s == SH_UPLINK_ORPHAN) SH_FAIL(SH_EPEER, "%s", sh_uplink_reason(r->uplink));
        if (s == SH_UPLINK_LEAVE) return lead_out(r);
        SH_TRY(take_inbox(r));
        SH_TRY(sh_stage_progress(r->stage));
        SH_TRY(take_answers(r, &worked));
        SH_TRY(take_rows(r, &worked));
        SH_TRY(lead_prompts(r, &worked));
        SH_TRY(lead_step(r, &worked));
        beat(r, false, worked);
        if (worked)
            rested(r, 0);
        else
            sh_backoff_wait(&r->idle);
    }
}

/* ---- the other ranks
 * -------------------------------------------------------------------------------------------------------- */

/* The word to leave comes from the rank before, after the last micro-batch. One who hears only the coordinator's waits
 * a little for it. */
static sh_status serve(rank *r) {
    double told_at = 0;
    for (;;) {
        bool worked = false, leave = false;
        sh_uplink_state s = sh_uplink_look(r->uplink);
        if (s == SH_UPLINK_ORPHAN) SH_FAIL(SH_EPEER, "%s", sh_uplink_reason(r->uplink));
        if (s == SH_UPLINK_LEAVE && told_at <= 0) told_at = sh_now();
        SH_TRY(sh_stage_receive(r->stage, &worked));
        if (worked) {
            rested(r, sh_stage_received_at(r->stage)); /* the step is not waiting */
            beat(r, true, true);                       /* busy from here on, should the step get stuck */
            SH_TRY(sh_stage_serve(r->stage));
        }
        SH_TRY(take_rows(r, &worked));
        if (!worked) SH_TRY(sh_ranks_told_leave(r->link, &leave));
        if (leave) break;
        if (told_at > 0 && sh_now() - told_at > 2 * LEAVE_SECONDS) SH_FAIL(SH_ECANCELLED, "left alone");
        beat(r, false, worked);
        if (worked)
            rested(r, 0);
        else
            sh_backoff_wait(&r->idle);
    }
    if (sh_ranks_pass_leave(r->link, LEAVE_SECONDS) != SH_OK) SH_FAIL(SH_ECANCELLED, "left before the next rank did");
    return SH_OK;
}

/* ---- life
 * ---------------------------------------------------------------------------------------------------------------------
 */

static sh_status live(rank *r) {
    SH_TRY(read_plan(r));
    SH_TRY(share_node(r));
    SH_TRY(agree_pages(r));
    SH_TRY(prepare_trace(r));
    SH_TRY(load(r));
    SH_TRY(tell_routing(r, false));
    SH_TRY(announce(r));
    r->served = true;
    return r->link->rank == 0 ? lead(r) : serve(r);
}

static void release(rank *r, bool ended_well) {
    sh_lanes_destroy(&r->lanes);
    if (r->receiver && sh_kv_receiver_is_idle(r->receiver)) sh_kv_receiver_destroy(&r->receiver);
    if (r->stage && !r->receiver && sh_stage_is_idle(r->stage))
        sh_stage_destroy(&r->stage); /* else the link still reads its buffers */
    sh_trace_destroy(&r->trace);
    if (!r->stage) sh_timeline_destroy(&r->timeline);
    if (r->stage && !ended_well) {
        sh_keep(r->stage);
        sh_keep(r->receiver);
        sh_keep(r->timeline);
    }
    free(r->own);
    free(r->config);
    free(r->machine);
}

/* What would happen again to ranks that are started again. */
static bool is_lasting(const rank *r, sh_status st) {
    return !r->served &&
           (st == SH_EINPUT || st == SH_EFORMAT || st == SH_EMEMORY || st == SH_ELIMIT || st == SH_EUNSUPPORTED);
}

sh_status sh_worker_run(sh_link *link, const sh_worker_options *o) {
    rank *r = calloc(1, sizeof *r);
    if (!r) SH_FAIL(SH_EMEMORY, "no memory for a rank");
    r->link = link;
    r->o = o;
    sh_uplink_options up = {.endpoint = o->endpoint,
                            .keys = o->keys,
                            .group = o->group,
                            .first_wait_ms = o->first_wait_ms,
                            .rank = link->rank,
                            .size = link->size};
    sh_status st = sh_uplink_start(&up, &r->uplink);
    if (st == SH_OK) st = live(r);
    char fault[1200];
    snprintf(fault, sizeof fault, "%s", sh_error_text());
    bool failed = st != SH_OK && st != SH_ECANCELLED;
    if (failed) sh_debug("rank %d: %s (%s)", link->rank, fault, sh_error_trail());
    sh_uplink_stop(&r->uplink, failed ? fault : NULL, is_lasting(r, st));
    release(r, st == SH_OK);
    free(r);
    if (failed) return sh_error_prefix(st, "rank %d", link->rank);
    return st;
}
