/* Machine descriptions: filled up, checked, printed. See cluster.h. */
#include "partition/cluster.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "partition/protojson.h"

/* What is assumed where nothing is said: on the poor side of what such machines have. */
#define CORE_READ_GBS   6.0  /* a core's share of its socket's memory channels */
#define CORE_FMA_GFLOPS 60.0 /* AVX2 at 2 GHz */
#define WITHIN_GBIT     40.0 /* shared memory, one copy in and one out */
#define WITHIN_US       2.0
#define BETWEEN_GBIT    10.0
#define BETWEEN_US      50.0 /* TCP */
#define SPANNING        0.7
#define GIB             0x1p30

static const sh_cost_rates usual_kernels = {
    .weights_read = 0.88, .weights_fma = 0.75, .attention = {.read = 0.6, .fma = 0.5}, .layer = 20e-6, .sample = 1e-9};

__attribute__((format(printf, 2, 3))) static void assume(sh_cluster *c, const char *fmt, ...) {
    size_t n = strlen(c->assumed);
    va_list ap;
    if (n && n + 2 < sizeof c->assumed) n += (size_t)snprintf(c->assumed + n, sizeof c->assumed - n, ", ");
    va_start(ap, fmt);
    if (n < sizeof c->assumed) vsnprintf(c->assumed + n, sizeof c->assumed - n, fmt, ap);
    va_end(ap);
}

static sh_status number(const char *name, bool has, double v, double min, double max, double usual, double *to) {
    if (!has) {
        *to = usual;
        return SH_OK;
    }
    if (!(v >= min && v <= max))
        SH_FAIL(SH_EINPUT, "machine: %s: %g is out of range: allowed are %g to %g", name, v, min, max);
    *to = v;
    return SH_OK;
}

static sh_status link_of(sh_cluster *c, const char *name, const Shoal__MachineLink *l, double gbit, double us,
                         bool matters, sh_cost_link *to) {
    char field[64];
    double g = 0, u = 0;
    snprintf(field, sizeof field, "%s.gbit", name);
    SH_TRY(number(field, l && l->has_gbit, l ? l->gbit : 0, 1e-3, 1e6, gbit, &g));
    snprintf(field, sizeof field, "%s.latency_us", name);
    SH_TRY(number(field, l && l->has_latency_us, l ? l->latency_us : 0, 0, 1e7, us, &u));
    if (matters && !(l && l->has_gbit)) assume(c, "%s %g Gbit/s", name, g);
    if (matters && !(l && l->has_latency_us)) assume(c, "%s %g µs", name, u);
    *to = (sh_cost_link){.latency = u * 1e-6, .bandwidth = g * 1e9 / 8};
    return SH_OK;
}

/* The rates with few rows of many's, as rows of many that take as long. */
static sh_status few_of(const char *name, const double *share, size_t n, double *to) {
    for (size_t i = 0; i < SH_COST_FEW; i++) to[i] = 0;
    if (n == 0) return SH_OK;
    if (n != SH_COST_FEW)
        SH_FAIL(SH_EINPUT, "machine: kernels.%s: %zu numbers: allowed are %d, for 1, 2, 4, 8, 16 and 32 rows", name, n,
                SH_COST_FEW);
    for (size_t i = SH_COST_FEW; i-- > 0;) {
        double rows = (double)(1 << i), next = i + 1 < SH_COST_FEW ? to[i + 1] : SH_COST_MANY, least = rows / next;
        if (!(share[i] >= least * (1 - 1e-9) && share[i] <= SH_COST_FEW_MOST))
            SH_FAIL(
                SH_EINPUT,
                "machine: kernels.%s[%zu]: %g is out of range: allowed are %g to %d: %g rows take no longer than %g",
                name, i, share[i], least, SH_COST_FEW_MOST, rows, 2 * rows);
        to[i] = rows / share[i];
    }
    return SH_OK;
}

#define RANGE(name, least, most, usual, to)                                                                            \
    SH_TRY(number("kernels." #name, k && k->has_##name, k ? k->name : 0, least, most, usual, to))

static sh_status attention_of(sh_cluster *c, const Shoal__MachineKernels *k) {
    const sh_cost_attention *u = &usual_kernels.attention;
    sh_cost_attention *a = &c->kernels.attention, *q8 = &c->kernels.attention_q8;
    RANGE(attention_read, 0.001, 1, u->read, &a->read);
    RANGE(attention_fma, 0.001, 1, u->fma, &a->fma);
    RANGE(attention_both, 0, 1, 0, &a->both);
    RANGE(attention_formed, 0, SH_COST_MANY, 0, &a->formed);
    RANGE(attention_q8_read, 0.001, 1, 0, &q8->read);
    RANGE(attention_q8_fma, 0.001, 1, a->fma, &q8->fma);
    RANGE(attention_q8_both, 0, 1, 0, &q8->both);
    RANGE(attention_q8_formed, 0, SH_COST_MANY, 0, &q8->formed);
    if (k) SH_TRY(few_of("attention_few", k->attention_few, k->n_attention_few, a->few));
    return k ? few_of("attention_q8_few", k->attention_q8_few, k->n_attention_q8_few, q8->few) : SH_OK;
}

static sh_status kernels_of(sh_cluster *c, const Shoal__MachineKernels *k) {
    sh_cost_rates u = usual_kernels;
    double layer = 0, sample = 0;
    RANGE(weights_read, 0.001, 1, u.weights_read, &c->kernels.weights_read);
    RANGE(weights_fma, 0.001, 1, u.weights_fma, &c->kernels.weights_fma);
    RANGE(q8_read, 0.001, 1, 0, &c->kernels.q8_read);
    RANGE(q4_read, 0.001, 1, 0, &c->kernels.q4_read);
    RANGE(q8_fma, 0.001, 64, 0, &c->kernels.q8_fma);
    RANGE(q4_fma, 0.001, 64, 0, &c->kernels.q4_fma);
    RANGE(weights_both, 0, 1, 0, &c->kernels.weights_both);
    RANGE(q8_both, 0, 1, 0, &c->kernels.q8_both);
    RANGE(q4_both, 0, 1, 0, &c->kernels.q4_both);
    if (k) SH_TRY(few_of("weights_few", k->weights_few, k->n_weights_few, c->kernels.weights_few));
    if (k) SH_TRY(few_of("q8_few", k->q8_few, k->n_q8_few, c->kernels.q8_few));
    if (k) SH_TRY(few_of("q4_few", k->q4_few, k->n_q4_few, c->kernels.q4_few));
    SH_TRY(attention_of(c, k));
    RANGE(spanning, 0.001, 1, SPANNING, &c->spanning);
    RANGE(layer_us, 0, 1e6, u.layer * 1e6, &layer);
    RANGE(sample_ns, 0, 1e6, u.sample * 1e9, &sample);
    c->kernels.layer = layer * 1e-6;
    c->kernels.sample = sample * 1e-9;
    return SH_OK;
}
#undef RANGE

static sh_status count(const char *name, int v, int min, int max) {
    if (v < min || v > max)
        SH_FAIL(SH_EINPUT, "machine: %s: %d is out of range: allowed are %d to %d", name, v, min, max);
    return SH_OK;
}

static sh_status read_node(sh_cluster *c, const Shoal__MachineNode *n, sh_cluster *one) {
    double gib = 0, mib = 0, read = 0, fma = 0;
    one->packages = n->has_packages ? n->packages : 1;
    one->numa = n->has_numa ? n->numa : one->packages;
    one->cores = n->cores;
    one->nodes = n->count;
    SH_TRY(count("node.count", n->count, 1, SH_CLUSTER_NODES));
    SH_TRY(count("node.packages", one->packages, 1, 64));
    SH_TRY(count("node.numa", one->numa, 1, 256));
    if (!n->has_cores) SH_FAIL(SH_EINPUT, "machine: node.cores: is missing");
    SH_TRY(count("node.cores", one->cores, 1, 65536));
    if (!n->has_memory_gib) SH_FAIL(SH_EINPUT, "machine: node.memory_gib: is missing");
    SH_TRY(number("node.memory_gib", true, n->memory_gib, 0.001, 1e6, 0, &gib));
    SH_TRY(number("node.cache_mib", n->has_cache_mib, n->cache_mib, 0, 1e6, 0, &mib));
    SH_TRY(number("node.read_gbs", n->has_read_gbs, n->read_gbs, 1e-3, 1e6, one->cores * CORE_READ_GBS, &read));
    SH_TRY(number("node.fma_gflops", n->has_fma_gflops, n->fma_gflops, 1e-3, 1e9, one->cores * CORE_FMA_GFLOPS, &fma));
    if (!n->has_read_gbs) assume(c, "reading %g GB/s", read);
    if (!n->has_fma_gflops) assume(c, "multiply-adds %g GFLOP/s", fma);
    snprintf(one->cpu, sizeof one->cpu, "%s", n->cpu ? n->cpu : "CPU");
    one->memory = gib * GIB;
    one->cache = mib * 0x1p20;
    one->read = read * 1e9;
    one->fma = fma * 1e9;
    return link_of(c, "within", n->within, WITHIN_GBIT, WITHIN_US, one->numa > 1, &one->within);
}

static int least(int a, int b) {
    return a < b ? a : b;
}

/* Nodes of several kinds: each number is that of the poorest. */
static void join(sh_cluster *c, const sh_cluster *one) {
    c->mixed = true;
    c->nodes += one->nodes;
    c->packages = least(c->packages, one->packages);
    c->numa = least(c->numa, one->numa);
    c->cores = least(c->cores, one->cores);
    c->cache = fmin(c->cache, one->cache);
    c->memory = fmin(c->memory, one->memory);
    c->read = fmin(c->read, one->read);
    c->fma = fmin(c->fma, one->fma);
    c->within.bandwidth = fmin(c->within.bandwidth, one->within.bandwidth);
    c->within.latency = fmax(c->within.latency, one->within.latency);
}

static sh_status nodes_of(sh_cluster *c, const Shoal__Machine *m) {
    sh_cluster all = {0};
    for (size_t i = 0; i < m->n_node; i++) {
        sh_cluster one = {0};
        SH_TRY(read_node(c, m->node[i], &one));
        if (i == 0)
            all = one;
        else
            join(&all, &one);
    }
    memcpy(all.name, c->name, sizeof all.name);
    memcpy(all.measured, c->measured, sizeof all.measured);
    memcpy(all.assumed, c->assumed, sizeof all.assumed);
    *c = all;
    return SH_OK;
}

sh_status sh_cluster_of(const Shoal__Machine *m, int nodes, sh_cluster *out) {
    sh_cluster c = {0};
    snprintf(c.name, sizeof c.name, "%s", m->name ? m->name : "unnamed");
    snprintf(c.measured, sizeof c.measured, "%s", m->measured ? m->measured : "");
    if (m->n_node == 0) SH_FAIL(SH_EINPUT, "machine: node: is missing: at least one kind of node is needed");
    SH_TRY(nodes_of(&c, m));
    if (nodes > 0) c.nodes = nodes;
    SH_TRY(count("nodes", c.nodes, 1, SH_CLUSTER_NODES));
    SH_TRY(link_of(&c, "between", m->between, BETWEEN_GBIT, BETWEEN_US, c.nodes > 1, &c.between));
    SH_TRY(kernels_of(&c, m->kernels));
    *out = c;
    return SH_OK;
}

sh_status sh_cluster_read(const char *what, const char *text, size_t len, int nodes, sh_cluster *out) {
    ProtobufCMessage *m = NULL;
    SH_TRY(sh_protojson_read(what, text, len, &shoal__machine__descriptor, &m));
    sh_status st = sh_cluster_of((const Shoal__Machine *)m, nodes, out);
    if (st != SH_OK) st = sh_error_prefix(st, "%s", what);
    protobuf_c_message_free_unpacked(m, NULL);
    return st;
}

sh_cost_rates sh_cluster_rates(const sh_cluster *c, int ranks) {
    sh_cost_rates r = c->kernels;
    r.read = c->read / ranks * (ranks < c->numa ? c->spanning : 1);
    r.fma = c->fma / ranks;
    r.threads = (double)c->cores / ranks;
    return r;
}

uint64_t sh_cluster_memory(const sh_cluster *c, int ranks) {
    return (uint64_t)(c->memory / ranks);
}

sh_status sh_cluster_print(const sh_cluster *c, sh_buf *out) {
    SH_TRY(sh_buf_printf(
        out, "%s: %d node%s of %d × %s, %d cores in %d NUMA node%s, %.1f GiB, reading %.0f GB/s, %.0f GFLOP/s", c->name,
        c->nodes, c->nodes == 1 ? "" : "s", c->packages, c->cpu, c->cores, c->numa, c->numa == 1 ? "" : "s",
        c->memory / GIB, c->read * 1e-9, c->fma * 1e-9));
    if (c->nodes > 1)
        SH_TRY(sh_buf_printf(out, ", links of %.4g Gbit/s and %.3g µs", c->between.bandwidth * 8e-9,
                             c->between.latency * 1e6));
    SH_TRY(sh_buf_add_str(out, "\n"));
    if (c->mixed) SH_TRY(sh_buf_add_str(out, "           nodes differ: each number is that of the poorest\n"));
    if (*c->assumed) SH_TRY(sh_buf_printf(out, "           assumed: %s\n", c->assumed));
    return SH_OK;
}

sh_status sh_workload_read(const char *what, const char *text, size_t len, sh_workload *out) {
    ProtobufCMessage *m = NULL;
    sh_workload w = {0};
    SH_TRY(sh_protojson_read(what, text, len, &shoal__workload__descriptor, &m));
    const Shoal__Workload *x = (const Shoal__Workload *)m;
    for (size_t i = 0; i < x->n_lengths && i < SH_WORKLOAD_BINS; i++)
        w.bin[w.n++] = (sh_workload_bin){
            .prompt = x->lengths[i]->prompt, .output = x->lengths[i]->output, .requests = x->lengths[i]->requests};
    w.requests = x->requests;
    size_t n = x->n_lengths;
    protobuf_c_message_free_unpacked(m, NULL);
    if (n > SH_WORKLOAD_BINS) SH_FAIL(SH_EINPUT, "%s: lengths: %zu: allowed are %d", what, n, SH_WORKLOAD_BINS);
    sh_status st = sh_workload_check(&w);
    if (st != SH_OK) return sh_error_prefix(st, "%s", what);
    *out = w;
    return SH_OK;
}
