/*
 * How a group behaves towards its coordinator: work refused, cancelled and forgotten; a coordinator that falls silent,
 * comes back with a new epoch, or stays away; a KV pool so small that sequences are paused; faults that are told.
 */
#include "model/batch.h"
#include "partition/plan.h"
#include "tests/cluster/fake.h"

static const int two_cut[] = {0, 6, 15};
static char model_dir[600];

static void open_group(fake *f, int n) {
    static const int one_cut[] = {0, 15};
    snprintf(model_dir, sizeof model_dir, "%s/text/models/e2b-like", SH_TEST_DATA);
    fake_open(f, model_dir, n, n == 1 ? one_cut : two_cut, "exact", "f32");
}

/* Requests with prompts of made-up tokens: lengths and ends differ. */
static void add_some(fake *f, int n, int max_tokens) {
    int32_t ids[200];
    for (int i = 0; i < n; i++) {
        int len = 5 + 13 * (i % 9);
        for (int j = 0; j < len; j++) ids[j] = 20 + (i * 131 + j * 17) % 1900;
        fake_work *w = fake_add(f, ids, len, max_tokens + 3 * (i % 5));
        w->sampling.temperature = i % 2 ? 1 : 0;
        w->sampling.seed = (uint64_t)i;
    }
}

static void end_group(fake *f, sh_status expected) {
    fake_leave(f);
    fake_join(f);
    for (int i = 0; i < f->n; i++)
        CHECK(f->rank[i].status == expected, "rank %d ended with %d, not %d: %s", i, f->rank[i].status, expected,
              f->rank[i].error);
}

static void all_equal(const fake *a, const fake *b, const char *what) {
    for (int i = 0; i < a->n_work; i++) CHECK(fake_same(&a->work[i], &b->work[i]), "%s: request %d differs", what, i);
}

/* The answers that the other cases are compared with. */
static void undisturbed(fake *f) {
    open_group(f, 1);
    add_some(f, 20, 60);
    fake_start_threads(f);
    CHECK(fake_run(f, 60), "undisturbed: no answers: %s", f->fault);
    end_group(f, SH_OK);
}

/* The least KV memory on which a sequence of `tokens` runs. */
static uint64_t least_memory(const fake *f, int tokens) {
    sh_config *c = calloc(1, sizeof *c);
    sh_kv_limits limits;
    sh_kv_plan kv;
    uint64_t lo = 0, hi = (uint64_t)1 << 30;
    MUST(sh_config_load(f->model, c));
    MUST(sh_plan_kv_limits(&f->plan, &limits));
    while (lo + 1 < hi) {
        uint64_t mid = (lo + hi) / 2, budget[FAKE_RANKS];
        for (int i = 0; i < f->n; i++) budget[i] = mid;
        if (sh_plan_kv_group(c, &limits, &f->plan, budget, &kv) == SH_OK && kv.tokens >= tokens)
            hi = mid;
        else
            lo = mid;
    }
    free(c);
    return hi;
}

static void test_small_pool(const fake *base) {
    uint64_t steps[2];
    for (int small = 0; small < 2; small++) {
        fake f;
        open_group(&f, 2);
        f.plan.max_seqs = 20;
        f.plan.chunk = 16;
        if (small) f.plan.kv_memory = least_memory(&f, 256);
        add_some(&f, 20, 60);
        fake_start_threads(&f);
        CHECK(fake_run(&f, 60), "small pool: no answers: %s", f.fault);
        CHECK(f.kv_total >= f.kv_tokens && f.kv_total % SH_PAGE_TOKENS == 0,
              "%lld tokens of KV fit, %d in one sequence", (long long)f.kv_total, f.kv_tokens);
        if (small) CHECK(f.kv_tokens < 512, "the small pool holds %d tokens of a sequence", f.kv_tokens);
        for (double end = sh_now() + 0.5; sh_now() < end;) fake_pump(&f, 10); /* one more heartbeat */
        steps[small] = f.rank[1].step;
        end_group(&f, SH_OK);
        all_equal(&f, base, "small pool");
        fake_close(&f);
    }
    CHECK(steps[1] > steps[0] * 3 / 2, "steps with a small pool %llu, else %llu: nobody waited or was paused",
          (unsigned long long)steps[1], (unsigned long long)steps[0]);
}

static void test_refused(const fake *base) {
    fake f;
    int32_t ids[400];
    open_group(&f, 2);
    f.plan.max_context = 256;
    add_some(&f, 3, 60);
    for (int i = 0; i < 400; i++) ids[i] = 20 + i;
    fake_add(&f, ids, 200, 57);                  /* 257 tokens */
    fake_add(&f, ids, 200, 1)->prompt[3] = 2048; /* beyond the vocabulary */
    fake_add(&f, ids, 10, 5)->sampling.logprobs = 99;
    fake_start_threads(&f);
    CHECK(fake_run(&f, 60), "refused: no answers: %s", f.fault);
    static const char *const why[] = {
        "prompt of 200 tokens and max_tokens 57 make 257: this group can hold 256 tokens of one sequence",
        "prompt: token 3 is 2048: the vocabulary has ids 0 to 2047", "logprobs: 99: -1 to 20 are allowed"};
    for (int i = 0; i < 3; i++) {
        CHECK(f.work[3 + i].rejected && !strcmp(f.work[3 + i].reason, why[i]), "refusal %d: '%s'", i,
              f.work[3 + i].reason);
        CHECK(fake_same(&f.work[i], &base->work[i]), "refused: request %d differs", i);
    }
    end_group(&f, SH_OK);
    fake_close(&f);
}

static void test_cancel(const fake *base) {
    fake f;
    open_group(&f, 2);
    add_some(&f, 20, 60);
    fake_start_threads(&f);
    if (fake_wait_ready(&f, 60)) {
        for (int i = 0; i < 20; i++) fake_send_work(&f, i);
        while (f.work[1].n < 3) fake_pump(&f, 5);
        for (int i = 1; i < 20; i += 2) fake_send_key(&f, i, true);
        double end = sh_now() + 60;
        for (bool all = false; !all && sh_now() < end; fake_pump(&f, 10)) {
            all = true;
            for (int i = 0; i < 20; i += 2) all = all && f.work[i].done;
        }
        for (int i = 0; i < 20; i += 2) CHECK(fake_same(&f.work[i], &base->work[i]), "cancel: request %d differs", i);
        int unfinished = 0;
        for (int i = 1; i < 20; i += 2) unfinished += !f.work[i].done;
        CHECK(unfinished > 0, "every cancelled request ran to its end");
    }
    end_group(&f, SH_OK);
    fake_close(&f);
}

/* The coordinator falls silent, and another takes its place that has lost every second answer: it hears all again. */
static void test_restart(const fake *base) {
    fake f;
    open_group(&f, 2);
    add_some(&f, 20, 60);
    fake_start_threads(&f);
    if (fake_wait_ready(&f, 60)) {
        for (int i = 0; i < 20; i++) fake_send_work(&f, i);
        while (!f.work[0].done) fake_pump(&f, 5);
        fake_send_key(&f, 0, false); /* stored: need not be said again */
        fake_pump(&f, 50);
        sh_wire_close(&f.wire);
        sh_sleep(0.6);
        for (int i = 1; i < 20; i += 2) {
            sh_buf_clear(&f.work[i].tokens);
            f.work[i].n = 0;
            f.work[i].done = false;
        }
        for (int i = 0; i < f.n; i++) f.rank[i].known = false, f.rank[i].hellos = 0;
        f.epoch++;
        f.ready = false;
        MUST(sh_wire_listen(f.endpoint, NULL, &f.wire));
        CHECK(fake_run(&f, 60), "restart: no answers after it: %s", f.fault); /* sends the work again, too */
        for (double end = sh_now() + 5; !f.rank[1].hellos && sh_now() < end;) fake_pump(&f, 10);
        CHECK(f.rank[0].hellos >= 1 && f.rank[1].hellos >= 1, "restart: a rank did not say hello again");
        all_equal(&f, base, "restart");
    }
    end_group(&f, SH_OK);
    fake_close(&f);
}

static void test_orphan(void) {
    fake f;
    open_group(&f, 2);
    f.orphan_ms = 700;
    add_some(&f, 2, 60);
    fake_start_threads(&f);
    CHECK(fake_run(&f, 60), "orphan: no answers: %s", f.fault);
    double since = sh_now();
    fake_join(&f); /* nobody answers heartbeats now */
    CHECK(sh_now() - since < 8, "orphan: the ranks took %.1f s to leave", sh_now() - since);
    for (int i = 0; i < 2; i++)
        CHECK(f.rank[i].status == SH_EPEER && strstr(f.rank[i].error, "nothing heard from the coordinator"),
              "orphan: rank %d ended with %d: %s", i, f.rank[i].status, f.rank[i].error);
    fake_close(&f);
}

/* In the middle of work, with messages under way, whose buffers the ranks must keep. */
static void test_orphan_at_work(void) {
    fake f;
    open_group(&f, 2);
    f.orphan_ms = 300;
    add_some(&f, 40, 300);
    fake_start_threads(&f);
    if (fake_wait_ready(&f, 60)) {
        for (int i = 0; i < 40; i++) fake_send_work(&f, i);
        for (double end = sh_now() + 60; f.work[3].n < 2 && sh_now() < end;) fake_pump(&f, 5);
    }
    fake_join(&f);
    for (int i = 0; i < 2; i++)
        CHECK(f.rank[i].status == SH_EPEER && strstr(f.rank[i].error, "nothing heard from the coordinator"),
              "orphan at work: rank %d ended with %d: %s", i, f.rank[i].status, f.rank[i].error);
    fake_close(&f);
}

static void test_leave(void) {
    for (int when = 0; when < 2; when++) { /* at rest; in the middle of work */
        fake f;
        open_group(&f, 2);
        add_some(&f, 20, 60);
        fake_start_threads(&f);
        CHECK(fake_wait_ready(&f, 60), "leave: not ready: %s", f.fault);
        for (int i = 0; when && i < 20; i++) fake_send_work(&f, i);
        while (when && f.work[3].n < 2) fake_pump(&f, 5);
        double since = sh_now();
        end_group(&f, SH_OK);
        CHECK(sh_now() - since < 8, "leave: it took %.1f s", sh_now() - since);
        fake_close(&f);
    }
}

static void test_fault(void) {
    fake f;
    open_group(&f, 1);
    snprintf(f.model, sizeof f.model, "%s/no-such-model", f.dir);
    fake_start_threads(&f);
    CHECK(!fake_wait_ready(&f, 20), "fault: ready without a model");
    CHECK(strstr(f.fault, "no-such-model: no such directory"), "fault: '%s'", f.fault);
    fake_join(&f);
    CHECK(f.rank[0].status != SH_OK, "fault: the rank ended well");
    fake_close(&f);
}

int main(void) {
    fake base;
    undisturbed(&base);
    test_small_pool(&base);
    test_refused(&base);
    test_cancel(&base);
    test_restart(&base);
    test_orphan();
    test_orphan_at_work();
    test_leave();
    test_fault();
    fake_close(&base);
    printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
