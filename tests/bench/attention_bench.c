/*
 * Times attention in decode steps, one layer at a time, with the head shapes of Gemma 4 and pages that come from
 * memory, and prints each as a share of what the cores can do (model/ceiling.h). The quickest of several calls, because
 * other work on the machine only ever adds. Not a test: nothing here can fail but memory.
 *
 *   attention_bench [--threads N] [--isa NAME] [--kv bf16,q8,f32] [--sequences 1,8,32] [--contexts 1024,8192,32768]
 *                   [--shapes e2b-global,26b-sliding,…] [--rows 1] [--tries N]
 *                   [--pool MiB] [--no-limits]
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "model/attention_rates.h"
#include "model/ceiling.h"

enum { LIST = 16 };

typedef struct shape {
    const char *name;
    sh_attn_work w;
} shape;

static const shape shapes[] = {
    {"e2b-sliding", {.heads = 8, .kv_heads = 1, .head_dim = 256, .window = 512}},
    {"e2b-global", {.heads = 8, .kv_heads = 1, .head_dim = 512}},
    {"e4b-global", {.heads = 8, .kv_heads = 2, .head_dim = 512}},
    {"26b-sliding", {.heads = 16, .kv_heads = 8, .head_dim = 256, .window = 1024}},
    {"26b-global", {.heads = 16, .kv_heads = 2, .head_dim = 512, .k_eq_v = true}},
    {"31b-sliding", {.heads = 32, .kv_heads = 16, .head_dim = 256, .window = 1024}},
    {"31b-global", {.heads = 32, .kv_heads = 4, .head_dim = 512, .k_eq_v = true}},
};

typedef struct options {
    int threads, tries, rows, pool, n_sequences, n_contexts, sequences[LIST], contexts[LIST];
    const char *isa, *kv, *shapes;
    bool limits;
} options;

static int numbers(const char *text, int *to) {
    int n = 0;
    for (char *end; n < LIST && *text; text = *end ? end + 1 : end) to[n++] = (int)strtol(text, &end, 10);
    return n;
}

static bool listed(const char *list, const char *name) {
    size_t n = strlen(name);
    for (const char *p = list; (p = strstr(p, name)); p += n)
        if ((p == list || p[-1] == ',') && (p[n] == ',' || !p[n])) return true;
    return false;
}

static options read_options(int argc, char **argv) {
    options o = {.threads = 2,
                 .tries = 12,
                 .rows = 1,
                 .pool = 384,
                 .n_sequences = 3,
                 .n_contexts = 3,
                 .kv = "bf16,q8,f32",
                 .sequences = {1, 8, 32},
                 .contexts = {1024, 8192, 32768},
                 .limits = true};
    static const struct option names[] = {{"threads", 1, NULL, 't'},
                                          {"isa", 1, NULL, 'i'},
                                          {"kv", 1, NULL, 'k'},
                                          {"sequences", 1, NULL, 's'},
                                          {"contexts", 1, NULL, 'c'},
                                          {"shapes", 1, NULL, 'n'},
                                          {"tries", 1, NULL, 'r'},
                                          {"rows", 1, NULL, 'm'},
                                          {"pool", 1, NULL, 'p'},
                                          {"no-limits", 0, NULL, 'l'},
                                          {0}};
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) >= 0;) {
        if (c == 't') o.threads = atoi(optarg);
        if (c == 'r') o.tries = atoi(optarg);
        if (c == 'm') o.rows = atoi(optarg);
        if (c == 'p') o.pool = atoi(optarg);
        if (c == 'i') o.isa = optarg;
        if (c == 'k') o.kv = optarg;
        if (c == 'n') o.shapes = optarg;
        if (c == 's') o.n_sequences = numbers(optarg, o.sequences);
        if (c == 'c') o.n_contexts = numbers(optarg, o.contexts);
        if (c == 'l') o.limits = false;
    }
    return o;
}

static sh_status one(const options *o, sh_team *t, const sh_kernels *kn, const sh_ceiling *lim, const shape *s,
                     sh_attn_work w) {
    double seconds = 0, flops = sh_attn_work_flops(&w), bytes = sh_attn_work_bytes(&w);
    if (bytes > 3e9) return SH_OK;
    int tries = flops > 4e9 ? (o->tries + 2) / 3 : o->tries;
    sh_attn_bench *b = NULL;
    SH_TRY(sh_attn_bench_create(t, kn, &w, (size_t)o->pool << 20, &b));
    sh_status st = sh_attn_bench_seconds(b, w.heads, w.rows, tries, &seconds);
    sh_attn_bench_destroy(&b);
    SH_TRY(st);
    printf("%-12s %5s %4d %6d %9.3f %7.1f %6.2f", s->name, sh_kv_type_name(w.kv), w.sequences, w.context, seconds * 1e3,
           flops / seconds * 1e-9, bytes / seconds * 1e-9);
    if (o->limits)
        printf(" %5.0f %5.0f", 100e-9 * flops / seconds / lim->fma_gflops, 100e-9 * bytes / seconds / lim->read_gbs);
    printf("\n");
    fflush(stdout);
    return SH_OK;
}

static sh_status all_of(const options *o, sh_team *t, const sh_kernels *kn, const sh_ceiling *lim, const shape *s) {
    for (int kv = 0; kv < SH_KV_TYPES; kv++) {
        if (!listed(o->kv, sh_kv_type_name((sh_kv_type)kv))) continue;
        for (int i = 0; i < o->n_sequences; i++)
            for (int k = 0; k < o->n_contexts; k++) {
                sh_attn_work w = s->w;
                if (w.window > 0 && k > 0) continue; /* no more keys than at the shortest */
                w.kv = (sh_kv_type)kv;
                w.sequences = o->sequences[i];
                w.context = o->contexts[k];
                w.rows = o->rows;
                SH_TRY(one(o, t, kn, lim, s, w));
            }
    }
    return SH_OK;
}

static sh_status run(const options *o) {
    sh_team *t = NULL;
    const sh_kernels *kn;
    sh_ceiling lim = {0};
    int cpus[LIST];
    for (int i = 0; i < LIST; i++) cpus[i] = i;
    if (o->isa)
        SH_TRY(sh_kernels_get(o->isa, &kn));
    else
        SH_TRY(sh_kernels_select(&kn));
    SH_TRY(sh_team_create(o->threads, cpus, o->threads < LIST ? o->threads : LIST, &t));
    if (o->limits) {
        SH_TRY(sh_ceiling_measure(t, (size_t)512 << 20, &lim));
        printf("%s, %d threads: reading %.1f GB/s, %.0f GFLOP/s\n", kn->isa, o->threads, lim.read_gbs, lim.fma_gflops);
    }
    printf("%-12s %5s %4s %6s %9s %7s %6s%s\n", "shape", "kv", "seqs", "tokens", "ms", "GFLOP/s", "GB/s",
           o->limits ? " %FMA %read" : "");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (!o->shapes || listed(o->shapes, shapes[i].name)) SH_TRY(all_of(o, t, kn, &lim, &shapes[i]));
    sh_team_destroy(&t);
    return SH_OK;
}

int main(int argc, char **argv) {
    sh_team_prepare(argv);
    options o = read_options(argc, argv);
    if (run(&o) == SH_OK) return 0;
    fprintf(stderr, "attention_bench: %s\n", sh_error_text());
    return 1;
}
