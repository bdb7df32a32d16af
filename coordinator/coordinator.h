/*
 * The coordinator: one process, one loop. Accepts jobs, keeps them in the store, hands work to groups, collects tokens,
 * renders results. `shoal serve` and `shoal run` both run it.
 */
#ifndef SH_COORDINATOR_H
#define SH_COORDINATOR_H

#include "coordinator/intake.h"
#include "model/config.h"
#include "partition/plan.h"

typedef struct sh_coordinator_options {
    const char *model;    /* checkpoint directory, absolute */
    const char *endpoint; /* ipc://… or tcp://… */
    const char *keys;     /* key folder or NULL */
    const char *store;    /* store directory; this incarnation claims STORE/<epoch>/ */
    bool run; /* under `shoal run`: ranks of an older epoch are told to leave; a shutdown request is honoured */
    /* what a group's plan is made of; 0 or NULL: chosen here */
    const Shoal__Plan *plan;  /* checked, borrowed: used as it is; the rest of these is then its own */
    const char *cuts;         /* "5,9": first layers of stages 1, 2, … */
    const char *prefill_cuts; /* the same of the ranks that make the K/V of prompts */
    int pp, ep, tp, cp;
    bool tp_sum;
    bool no_prefix_sharing;
    bool share_weights;
    int prefill;
    sh_mode mode;
    sh_kv_type kv;
    int threads, max_seqs, chunk, max_context;
    uint64_t kv_memory;
    const char *routing;               /* file of counts to place experts by; NULL: even shares */
    uint64_t replicate;                /* bytes per rank for copies of hot experts */
    uint64_t trace_first, trace_steps; /* micro-batches that ranks tell the timeline of (tracelog.h); 0: of none */
    int groups; /* how many there will be, as far as anybody knows; a run's supervisor says it itself */
    int heartbeat_ms, orphan_ms;
    sh_intake_options intake;
    int load_ms;     /* for tests: in place of SH_LOAD_LEAST */
    int progress_ms; /* token progress is saved at least this often; 0: 2000 */
} sh_coordinator_options;

/* Runs until shut down by a client (run only), SIGTERM or SIGINT. ready_fd (−1: none): one line, the bound endpoint, is
 * written there once requests are accepted. */
sh_status sh_coordinator_run(const sh_coordinator_options *o, int ready_fd);

#endif
