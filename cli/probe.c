/* This machine, measured once. See probe.h. */
#include "cli/probe.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "cli/facts.h"
#include "common/clock.h"
#include "common/file.h"
#include "model/attention_rates.h"
#include "model/ceiling.h"
#include "model/product_rates.h"
#include "partition/protojson.h"

#define WEIGHTS      ((size_t)256 << 20)
#define PAGES        ((size_t)256 << 20)
#define MOST_TEXT    ((size_t)1 << 20)
#define LAYER_STARTS 14 /* team runs of a layer */
#define STARTS       20
#define TRIES        100

/* --- where measurements are kept -----------------------------------------------------------------------------------
 */

static bool cache_path(const sh_machine *m, char *folder, char *path, size_t size) {
    const char *base = getenv("XDG_CACHE_HOME"), *home = getenv("HOME"), *isa = getenv("SHOAL_ISA");
    char host[256] = "host";
    if (gethostname(host, sizeof host - 1) != 0) snprintf(host, sizeof host, "host");
    if (base && *base)
        snprintf(folder, size, "%s/shoal", base);
    else if (home && *home)
        snprintf(folder, size, "%s/.cache/shoal", home);
    else
        return false;
    int n = snprintf(path, size, "%.3000s/machine-%s-%s-%dof%d%s%.40s.json", folder, host, sh_facts_version(),
                     m->n_cpus, m->machine_cpus, isa ? "-" : "", isa ? isa : "");
    return n > 0 && (size_t)n < size;
}

static bool read_cache(const char *path, Shoal__Machine **out) {
    char *text = NULL;
    size_t len = 0;
    ProtobufCMessage *m = NULL;
    sh_status st = sh_file_read(path, MOST_TEXT, &text, &len);
    if (st == SH_OK) st = sh_protojson_read(path, text, len, &shoal__machine__descriptor, &m);
    free(text);
    if (st != SH_OK) return false;
    *out = (Shoal__Machine *)m;
    return true;
}

static sh_status write_cache(const char *folder, const char *path, const Shoal__Machine *m) {
    SH_CLEANUP(sh_buf_release) sh_buf text;
    sh_buf_init(&text, 0);
    SH_TRY(sh_protojson_write(&m->base, &text));
    SH_TRY(sh_dir_make(folder));
    return sh_file_write(path, text.data, text.len);
}

/* --- the message ---------------------------------------------------------------------------------------------------
 */

static sh_status set_text(const char *s, char **to) {
    free(*to);
    *to = strdup(s);
    if (!*to) SH_FAIL(SH_EMEMORY, "no memory for the description of this machine");
    return SH_OK;
}

static void cpu_name(char *to, size_t size) {
    char line[512];
    FILE *f = fopen("/proc/cpuinfo", "re");
    snprintf(to, size, "CPU");
    while (f && fgets(line, sizeof line, f)) {
        char *v = strncmp(line, "model name", 10) == 0 ? strchr(line, ':') : NULL;
        if (!v) continue;
        line[strcspn(line, "\n")] = 0;
        snprintf(to, size, "%s", v + 1 + strspn(v + 1, " \t"));
        break;
    }
    if (f) fclose(f);
}

static sh_status make(const sh_machine *m, Shoal__Machine **out) {
    char cpu[256];
    Shoal__Machine *x = calloc(1, sizeof *x);
    if (!x) SH_FAIL(SH_EMEMORY, "no memory for the description of this machine");
    shoal__machine__init(x);
    *out = x; /* the caller frees it, also when half made */
    x->node = calloc(1, sizeof(Shoal__MachineNode *));
    if (x->node) x->node[0] = calloc(1, sizeof(Shoal__MachineNode));
    if (!x->node || !x->node[0]) SH_FAIL(SH_EMEMORY, "no memory for the description of this machine");
    Shoal__MachineNode *n = x->node[0];
    shoal__machine_node__init(n);
    x->n_node = 1;
    n->has_packages = n->has_numa = n->has_cores = n->has_memory_gib = 1;
    n->packages = m->n_packages > 0 ? m->n_packages : 1;
    n->numa = m->n_numa;
    n->cores = m->n_cpus;
    n->memory_gib = (double)m->memory / 0x1p30;
    n->has_cache_mib = m->cache > 0;
    n->cache_mib = (double)m->cache / 0x1p20;
    cpu_name(cpu, sizeof cpu);
    SH_TRY(set_text(cpu, &n->cpu));
    return set_text("this machine", &x->name);
}

/* --- measuring -----------------------------------------------------------------------------------------------------
 */

static void nothing(void *arg, int member, int size) {
    (void)arg, (void)member, (void)size;
}

static double within(double v, double most) {
    return v < 0.001 ? 0.001 : v > most ? most : v;
}

static sh_status set_few(const double *few, double **to, size_t *n) {
    *to = calloc(SH_PRODUCT_FEWS, sizeof **to);
    if (!*to) SH_FAIL(SH_EMEMORY, "no memory for the description of this machine");
    for (*n = 0; *n < SH_PRODUCT_FEWS; (*n)++) (*to)[*n] = few[*n];
    return SH_OK;
}

_Static_assert(SH_PRODUCT_FEWS == SH_COST_FEW && SH_PRODUCT_ROWS == SH_COST_MANY && SH_PRODUCT_MOST == SH_COST_FEW_MOST,
               "what is measured is what is asked");

/* What the kernels reach of the limits. Those that only take the time of a rate are left to what is assumed. */
static sh_status measure_products(sh_team *t, const sh_machine *m, const sh_ceiling *c, Shoal__MachineKernels *k) {
    const sh_kernels *kn;
    sh_product_rates p;
    SH_TRY(sh_kernels_select(&kn));
    if (kn->modelled || m->memory / 4 < WEIGHTS) return SH_OK;
    SH_TRY(sh_product_rates_measure(t, kn, sh_machine_block(m, WEIGHTS), &p));
    double read = c->read_gbs * 1e9, fma = c->fma_gflops * 1e9;
    k->has_weights_read = k->has_q8_read = k->has_q4_read = 1;
    k->weights_read = within(p.read[SH_W_BF16] / read, 1);
    k->q8_read = within(p.read[SH_W_Q8] / read, 1);
    k->q4_read = within(p.read[SH_W_Q4] / read, 1);
    k->has_weights_fma = k->has_q8_fma = k->has_q4_fma = 1;
    k->weights_fma = within(p.flops[SH_W_BF16] / fma, 1);
    k->q8_fma = within(p.flops[SH_W_Q8] / fma, 64);
    k->q4_fma = within(p.flops[SH_W_Q4] / fma, 64);
    k->has_weights_both = k->has_q8_both = k->has_q4_both = 1;
    k->weights_both = p.both[SH_W_BF16];
    k->q8_both = p.both[SH_W_Q8];
    k->q4_both = p.both[SH_W_Q4];
    SH_TRY(set_few(p.few[SH_W_BF16], &k->weights_few, &k->n_weights_few));
    SH_TRY(set_few(p.few[SH_W_Q8], &k->q8_few, &k->n_q8_few));
    return set_few(p.few[SH_W_Q4], &k->q4_few, &k->n_q4_few);
}

/* The same for attention over pages of both types that serve. */
static sh_status measure_attention(sh_team *t, const sh_machine *m, const sh_ceiling *c, Shoal__MachineKernels *k) {
    const sh_kernels *kn;
    sh_attention_rates a, q;
    double read = c->read_gbs * 1e9, fma = c->fma_gflops * 1e9;
    SH_TRY(sh_kernels_select(&kn));
    if (kn->modelled || m->memory / 4 < PAGES) return SH_OK;
    SH_TRY(sh_attention_rates_measure(t, kn, SH_KV_BF16, sh_machine_block(m, PAGES), &a));
    SH_TRY(sh_attention_rates_measure(t, kn, SH_KV_Q8, sh_machine_block(m, PAGES), &q));
    k->has_attention_read = k->has_attention_fma = k->has_attention_both = k->has_attention_formed = 1;
    k->attention_read = within(a.read / read, 1);
    k->attention_fma = within(a.flops / fma, 1);
    k->attention_both = a.both;
    k->attention_formed = a.formed;
    k->has_attention_q8_read = k->has_attention_q8_fma = k->has_attention_q8_both = k->has_attention_q8_formed = 1;
    k->attention_q8_read = within(q.read / read, 1);
    k->attention_q8_fma = within(q.flops / fma, 1);
    k->attention_q8_both = q.both;
    k->attention_q8_formed = q.formed;
    SH_TRY(set_few(a.few, &k->attention_few, &k->n_attention_few));
    return set_few(q.few, &k->attention_q8_few, &k->n_attention_q8_few);
}

static sh_status measure_with(sh_team *t, const sh_machine *m, Shoal__Machine *x) {
    sh_ceiling c;
    SH_TRY(sh_ceiling_measure(t, sh_machine_block(m, SH_CEILING_BLOCK), &c));
    double start = 1e9; /* the best run: other work on the CPUs can only add */
    for (int k = 0; k < TRIES; k++) {
        double t0 = sh_now();
        for (int i = 0; i < STARTS; i++) sh_team_run(t, nothing, NULL);
        double d = (sh_now() - t0) / STARTS;
        if (d < start) start = d;
    }
    Shoal__MachineNode *n = x->node[0];
    n->has_read_gbs = n->has_fma_gflops = 1;
    n->read_gbs = c.read_gbs;
    n->fma_gflops = c.fma_gflops;
    x->kernels = calloc(1, sizeof *x->kernels);
    if (!x->kernels) SH_FAIL(SH_EMEMORY, "no memory for the description of this machine");
    shoal__machine_kernels__init(x->kernels);
    x->kernels->has_layer_us = 1;
    x->kernels->layer_us = LAYER_STARTS * start * 1e6;
    SH_TRY(measure_products(t, m, &c, x->kernels));
    return measure_attention(t, m, &c, x->kernels);
}

static sh_status measure(const sh_machine *m, Shoal__Machine *x) {
    sh_team *t = NULL;
    char text[128], day[32];
    time_t now = time(NULL);
    struct tm tm;
    SH_TRY(sh_team_create(m->n_cpus, m->cpus, m->n_cpus, &t));
    sh_status st = measure_with(t, m, x);
    sh_team_destroy(&t);
    SH_TRY(st);
    strftime(day, sizeof day, "%Y-%m-%d %H:%M", localtime_r(&now, &tm));
    snprintf(text, sizeof text, "%s, shoal %s, %d threads", day, sh_facts_version(), m->n_cpus);
    return set_text(text, &x->measured);
}

/* What was measured earlier goes into what the machine says of itself today: memory changes, speeds do not. */
static void take_speeds(Shoal__Machine *from, Shoal__Machine *to) {
    if (from->n_node != 1) return;
    to->node[0]->has_read_gbs = from->node[0]->has_read_gbs;
    to->node[0]->read_gbs = from->node[0]->read_gbs;
    to->node[0]->has_fma_gflops = from->node[0]->has_fma_gflops;
    to->node[0]->fma_gflops = from->node[0]->fma_gflops;
    to->kernels = from->kernels;
    to->measured = from->measured;
    from->kernels = NULL;
    from->measured = NULL;
}

sh_status sh_probe_machine(sh_probe_how how, Shoal__Machine **out) {
    static sh_machine m; /* a large table */
    char folder[PATH_MAX], path[PATH_MAX];
    Shoal__Machine *x = NULL, *old = NULL;
    SH_TRY(sh_machine_read(NULL, &m));
    bool keeps = cache_path(&m, folder, path, sizeof path);
    sh_status st = make(&m, &x);
    if (st == SH_OK && how != SH_PROBE_AGAIN && keeps && read_cache(path, &old)) {
        take_speeds(old, x);
        shoal__machine__free_unpacked(old, NULL);
    } else if (st == SH_OK && how != SH_PROBE_CACHED) {
        st = measure(&m, x);
        if (st == SH_OK && keeps) SH_IGNORE(write_cache(folder, path, x));
    }
    if (st != SH_OK) {
        if (x) shoal__machine__free_unpacked(x, NULL);
        return st;
    }
    *out = x;
    return SH_OK;
}

sh_status sh_probe_cluster(sh_probe_how how, int nodes, sh_cluster *out, bool *known) {
    Shoal__Machine *m = NULL;
    SH_TRY(sh_probe_machine(how, &m));
    *known = m->measured != NULL;
    sh_status st = sh_cluster_of(m, nodes, out);
    shoal__machine__free_unpacked(m, NULL);
    return st;
}
