/* A plan in place of options. See planuse.h. */
#include "cli/planuse.h"

#include <stdlib.h>
#include <string.h>
#include "common/file.h"
#include "partition/explain.h"

#define PLAN_MOST ((size_t)64 << 20)

static sh_status left_to_plan(const char *option, bool given) {
    if (given) SH_FAIL(SH_EINPUT, "--plan: says how ranks share the model: leave %s away, or edit the plan", option);
    return SH_OK;
}

static sh_status same_number(const char *option, int given, int planned) {
    if (given && given != planned)
        SH_FAIL(SH_EINPUT, "%s: %d, but the plan says %d: leave it away, or edit the plan", option, given, planned);
    return SH_OK;
}

static sh_status check_options(const sh_shared_options *s, const Shoal__Plan *p) {
    SH_TRY(left_to_plan("--pp", s->pp));
    SH_TRY(left_to_plan("--ep", s->ep));
    SH_TRY(left_to_plan("--tp", s->tp));
    SH_TRY(left_to_plan("--cp", s->cp));
    SH_TRY(left_to_plan("--tp-reduce", s->tp_reduce_at));
    SH_TRY(left_to_plan("--prefill", s->prefill));
    SH_TRY(left_to_plan("--cuts", s->cuts));
    SH_TRY(left_to_plan("--prefill-cuts", s->prefill_cuts));
    SH_TRY(left_to_plan("--routing", s->routing));
    SH_TRY(same_number("-n", s->ranks, (int)p->n_rank));
    if (s->mode_at >= 0 && strcmp(sh_mode_name(sh_options_mode(s)), p->mode) != 0)
        SH_FAIL(SH_EINPUT, "--mode: %s, but the plan says %s: edit the plan", sh_mode_name(sh_options_mode(s)),
                p->mode);
    if (s->kv_at >= 0 && strcmp(sh_kv_type_name(sh_options_kv(s)), p->kv) != 0)
        SH_FAIL(SH_EINPUT, "--kv: %s, but the plan says %s: edit the plan", sh_kv_type_name(sh_options_kv(s)), p->kv);
    return SH_OK;
}

static sh_status take(sh_shared_options *s, const sh_config *c, Shoal__Plan *p) {
    sh_mode mode;
    sh_kv_type kv;
    SH_TRY(sh_mode_parse(p->mode, &mode));
    SH_TRY(sh_kv_type_parse(p->kv, &kv));
    s->mode_at = (int)mode;
    s->ranks = (int)p->n_rank;
    if (!s->replicas && p->has_replicas) s->replicas = p->replicas;
    s->kv_at = (int)kv;
    /* what is given beside the plan counts; the plan is changed to it */
    if (s->threads) p->threads = s->threads;
    if (s->max_seqs) p->max_seqs = s->max_seqs;
    if (s->chunk) p->chunk = s->chunk;
    if (s->max_context) p->max_context = s->max_context;
    if (s->kv_memory) p->kv_memory = s->kv_memory;
    if (s->no_prefix_sharing) p->has_no_prefix_sharing = p->no_prefix_sharing = true;
    if (s->share_weights) p->has_share_weights = p->share_weights = true;
    s->threads = p->threads;
    /* the usual one goes without saying: a job begun without this plan may go on with it */
    if (p->max_context != sh_config_usual_context(c)) s->max_context = p->max_context;
    return SH_OK;
}

sh_status sh_plan_use(sh_shared_options *s, const sh_config *c, Shoal__Plan **out) {
    char *text = NULL;
    size_t len = 0;
    Shoal__Plan *p = NULL;
    *out = NULL;
    if (!s->plan) return SH_OK;
    SH_TRY(sh_file_read(s->plan, PLAN_MOST, &text, &len));
    sh_status st = sh_plan_read(s->plan, text, len, c, &p);
    free(text);
    if (st == SH_OK) st = check_options(s, p);
    if (st == SH_OK) st = take(s, c, p);
    if (st == SH_OK) st = sh_plan_check(c, p);
    if (st != SH_OK) {
        sh_plan_free(&p);
        return st == SH_EIO || st == SH_EFORMAT ? sh_error_prefix(SH_EINPUT, "--plan") : sh_error_prefix(st, "--plan");
    }
    *out = p;
    return SH_OK;
}

static bool is_free(const sh_shared_options *s) {
    return !s->ranks && !s->replicas && !s->pp && !s->ep && !s->tp && !s->cp && !s->prefill && !s->tp_reduce_at &&
           !s->cuts && !s->prefill_cuts && !s->plan && !s->routing;
}

static void tell(const sh_choice *x, sh_plan_tuning *out) {
    out->max_seqs = x->plan->max_seqs;
    out->chunk = x->plan->chunk;
    out->seconds = x->forecast.seconds;
    sh_plan_cuts(x->plan, false, out->cuts);
    sh_plan_cuts(x->plan, true, out->prefill_cuts);
}

void sh_plan_take(sh_shared_options *s, const sh_plan_tuning *t) {
    if (!t->max_seqs) return;
    if (!s->max_seqs) s->max_seqs = t->max_seqs;
    if (!s->chunk) s->chunk = t->chunk;
    if (!s->cuts && *t->cuts) s->cuts = t->cuts;
    if (!s->prefill_cuts && *t->prefill_cuts) s->prefill_cuts = t->prefill_cuts;
}

static void take_choice(sh_shared_options *s, const sh_choice *x) {
    s->ranks = x->ranks;
    s->replicas = x->replicas;
    s->pp = x->shape.pp;
    s->ep = x->shape.ep;
    s->tp = x->shape.tp;
    s->cp = x->shape.cp;
    s->prefill = x->shape.prefill;
}

sh_status sh_plan_choose(sh_shared_options *s, const sh_config *c, const sh_cluster *k, const sh_workload *w,
                         sh_plan_tuning *out, bool *chosen) {
    sh_search *found = NULL;
    *chosen = false;
    *out = (sh_plan_tuning){0};
    if (!is_free(s) || !(w->requests >= 1)) return SH_OK;
    /* Ranks that only read prompts share no beginnings of prompts, which lengths say nothing of: by the user's word
     * alone. */
    sh_search_options o = {.config = c, .cluster = k, .workload = w, .no_prefill = true};
    sh_options_plan(s, 0, &o.fixed);
    SH_TRY(sh_search_run(&o, &found));
    *chosen = found->n > 0 && found->best[0].replicas <= SH_MAX_REPLICAS;
    if (*chosen) {
        take_choice(s, &found->best[0]);
        tell(&found->best[0], out);
        sh_plan_take(s, out);
    }
    sh_search_free(&found);
    return SH_OK;
}

static int or_one(int v) {
    return v > 0 ? v : 1;
}

/* Whether batch and cuts are given as far as the layout has them. */
static bool all_given(const sh_shared_options *s, const sh_plan_request *q) {
    return s->max_seqs && s->chunk && (q->pp == 1 || s->cuts) && (q->prefill < 2 || s->prefill_cuts);
}

sh_status sh_plan_tune(const sh_shared_options *s, const sh_config *c, const sh_cluster *k, const sh_workload *w,
                       const sh_routing *routing, int ranks, int replicas, sh_plan_tuning *out) {
    *out = (sh_plan_tuning){0};
    sh_search_options o = {.config = c,
                           .cluster = k,
                           .workload = w,
                           .replicas = replicas,
                           .no_prefill = s->prefill == 0,
                           .routing = routing};
    sh_search *found = NULL;
    sh_options_plan(s, ranks, &o.fixed);
    sh_plan_request *q = &o.fixed; /* the one layout that will run, where a search would see others too */
    q->routing = routing;
    q->ep = or_one(q->ep);
    q->tp = or_one(q->tp);
    q->cp = or_one(q->cp);
    if (!q->pp) q->pp = or_one((int)((ranks - q->prefill) / ((int64_t)q->ep * q->tp * q->cp)));
    if (s->plan || !(w->requests >= 1) || all_given(s, q)) return SH_OK;
    if (sh_search_run(&o, &found) != SH_OK) return SH_OK; /* what is wrong with the layout is said by who checks it */
    if (found->n > 0) tell(&found->best[0], out);
    sh_search_free(&found);
    return SH_OK;
}
