/* shoal plan: what would go where, what it costs, and why. Reads config.json, a machine and a workload; reads no
 * weights and starts nothing. Standard output has the plan in words, -o the plan itself. */
#include <glob.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/probe.h"
#include "cli/workfile.h"
#include "common/file.h"
#include "model/gguf.h"
#include "partition/explain.h"
#include "partition/protojson.h"

#define FILE_MOST   ((size_t)64 << 20)
#define TABLE_NODES 8 /* the table goes at least so far */

static const char usage[] =
    "Usage: shoal plan -m MODEL [--nodes N | --machine FILE] [--workload FILE] [options]\n"
    "Says, before a byte of weights is read, which rank would hold what, what that costs in memory, traffic and time,\n"
    "what limits it, why other layouts lose, and what a better machine would bring. MODEL may be a folder with\n"
    "config.json alone. With several -m it compares models: tokens/s and time by number of nodes and mode.\n\n"
    "  shoal plan -m MODEL                                     this machine\n"
    "  shoal plan -m MODEL --nodes 8 -o plan.json              eight like it; the plan for 'shoal run --plan'\n"
    "  shoal plan -m MODEL --plan plan.json                    a plan as it is, or as it was edited\n"
    "  shoal plan -m 26B -m 31B --nodes 16 --workload in.jsonl which model, how many nodes, how long\n\n";

typedef struct command {
    sh_shared_options shared;
    sh_option_texts models;
    const char *machine, *workload, *output, *save_machine;
    int nodes;
    bool probe, brief;
    sh_routing *routing;
    sh_cluster cluster;
    sh_workload work;
    char work_note[512];
} command;

typedef struct subject {
    char path[PATH_MAX], name[256];
    sh_config config;
    bool has_weights;
} subject;

/* --- what is planned for -------------------------------------------------------------------------------------------
 */

static sh_status load_subject(const char *model, subject *s) {
    sh_shared_options named = {.model = model};
    char copy[PATH_MAX], pattern[PATH_MAX + 16];
    glob_t found = {0};
    SH_TRY(sh_options_model(&named, s->path, sizeof s->path));
    SH_TRY(sh_config_load(s->path, &s->config));
    snprintf(copy, sizeof copy, "%s", s->path);
    snprintf(s->name, sizeof s->name, "%.200s", basename(copy));
    snprintf(pattern, sizeof pattern, "%s/*.safetensors", s->path);
    s->has_weights = glob(pattern, 0, NULL, &found) == 0 || sh_gguf_is_there(s->path);
    globfree(&found);
    return SH_OK;
}

static sh_status save_machine(const command *k, const Shoal__Machine *m) {
    SH_CLEANUP(sh_buf_release) sh_buf text;
    sh_buf_init(&text, 0);
    if (!k->save_machine) return SH_OK;
    SH_TRY(sh_protojson_write(&m->base, &text));
    return sh_file_write(k->save_machine, text.data, text.len);
}

static sh_status load_machine(command *k) {
    if (k->machine) {
        char *text = NULL;
        size_t len = 0;
        SH_TRY(sh_file_read(k->machine, FILE_MOST, &text, &len));
        sh_status st = sh_cluster_read(k->machine, text, len, k->nodes, &k->cluster);
        free(text);
        return st;
    }
    Shoal__Machine *m = NULL;
    SH_TRY(sh_probe_machine(k->probe ? SH_PROBE_AGAIN : SH_PROBE_MEASURE, &m));
    sh_status st = sh_cluster_of(m, k->nodes, &k->cluster);
    if (st == SH_OK) st = save_machine(k, m);
    shoal__machine__free_unpacked(m, NULL);
    return st;
}

static sh_status load_workload(command *k, const subject *s) {
    if (k->workload)
        return sh_workfile_read(k->workload, s->path, k->shared.default_max_tokens, &k->work, k->work_note,
                                sizeof k->work_note);
    k->work = sh_workload_default();
    snprintf(k->work_note, sizeof k->work_note, "assumed: give --workload");
    return SH_OK;
}

static sh_search_options options_of(const command *k, const subject *s) {
    sh_search_options o = {
        .config = &s->config, .cluster = &k->cluster, .workload = &k->work, .replicas = k->shared.replicas};
    /* Beside ranks that only read prompts a stage is one rank: with both numbers the group is given. */
    int asked = sh_options_ranks(&k->shared);
    bool given = k->shared.ranks || (k->shared.prefill && (k->shared.pp || k->shared.cuts));
    sh_options_plan(&k->shared, given ? asked : 0, &o.fixed);
    o.least = asked > 0 ? asked : 1;
    o.routing = o.fixed.routing = k->routing;
    return o;
}

/* --- telling -------------------------------------------------------------------------------------------------------
 */

static sh_status head(const command *k, const subject *s, const char *mode, const char *kv, sh_buf *out) {
    sh_param_count n = sh_config_count(&s->config);
    SH_TRY(sh_buf_printf(out, "model      %s (%s, %d layers), %.2f GiB of weights, mode %s, KV %s\n", s->name,
                         s->config.variant, s->config.n_layers, (double)n.total * 2 / 0x1p30, mode, kv));
    if (!s->has_weights)
        SH_TRY(sh_buf_add_str(out, "           from config.json alone: there are no weights in this folder\n"));
    SH_TRY(sh_buf_add_str(out, "machine    "));
    SH_TRY(sh_cluster_print(&k->cluster, out));
    if (*k->cluster.measured) SH_TRY(sh_buf_printf(out, "           figures: %s\n", k->cluster.measured));
    return sh_buf_printf(out, "workload   %.0f requests of %.0f prompt and %.0f output tokens (%s)\n", k->work.requests,
                         sh_workload_mean_prompt(&k->work), sh_workload_mean_output(&k->work), k->work_note);
}

static sh_status write_plan(const command *k, const sh_search_options *o, sh_choice *x) {
    SH_CLEANUP(sh_buf_release) sh_buf text;
    char note[700];
    sh_buf_init(&text, 0);
    snprintf(note, sizeof note, "%.0f requests of %.0f prompt and %.0f output tokens (%s)", k->work.requests,
             sh_workload_mean_prompt(&k->work), sh_workload_mean_output(&k->work), k->work_note);
    SH_TRY(sh_explain_annotate(o, note, x));
    SH_TRY(sh_protojson_write(&x->plan->base, &text));
    if (strcmp(k->output, "-") != 0) return sh_file_write(k->output, text.data, text.len);
    fwrite(text.data, 1, text.len, stdout);
    return SH_OK;
}

static void flush(sh_buf *b, bool to_stderr) {
    if (b->len) fwrite(b->data, 1, b->len, to_stderr ? stderr : stdout);
    sh_buf_clear(b);
}

/* --- the table by nodes and mode -----------------------------------------------------------------------------------
 */

static sh_status table_cell(const command *k, const subject *s, int nodes, sh_mode mode, sh_buf *out) {
    sh_search_options o = options_of(k, s);
    sh_cluster c = k->cluster;
    sh_search *found = NULL;
    c.nodes = nodes;
    o.cluster = &c;
    o.fixed.mode = mode;
    if (k->shared.kv_at < 0) o.fixed.kv = sh_kv_type_of_mode(mode);
    SH_TRY(sh_search_run(&o, &found));
    sh_status st;
    if (found->n == 0) {
        st = sh_buf_printf(out, "%23s", "does not fit");
    } else {
        char whole[32];
        sh_explain_time(found->best[0].forecast.seconds, whole, sizeof whole);
        st = sh_buf_printf(out, "%10.1f %12s", found->best[0].forecast.tokens_out, whole);
    }
    sh_search_free(&found);
    return st;
}

static sh_status table(const command *k, const subject *s, int n, sh_buf *out) {
    int most = k->cluster.nodes > TABLE_NODES ? k->cluster.nodes : TABLE_NODES;
    SH_TRY(sh_buf_printf(
        out, "\ntokens/s out and time for %.0f requests, by nodes and mode:\n  %-24s nodes  %23s%23s%23s%23s\n",
        k->work.requests, "model", "bf16", "q8", "q4", "exact"));
    for (int i = 0; i < n; i++)
        for (int nodes = 1; nodes <= most; nodes = nodes < most && 2 * nodes > most ? most : 2 * nodes) {
            SH_TRY(sh_buf_printf(out, "  %-24s %5d  ", s[i].name, nodes));
            for (int mode = SH_MODE_BF16; mode < SH_MODES; mode++)
                SH_TRY(table_cell(k, &s[i], nodes, (sh_mode)mode, out));
            SH_TRY(table_cell(k, &s[i], nodes, SH_MODE_EXACT, out));
            SH_TRY(sh_buf_add_str(out, "\n"));
        }
    return SH_OK;
}

/* --- the command ---------------------------------------------------------------------------------------------------
 */

/* A plan from a file in place of a search. */
static sh_status explain_file(command *k, const subject *s, sh_buf *out, bool *fits) {
    char *text = NULL;
    size_t len = 0;
    sh_search_options o = options_of(k, s);
    sh_choice x = {.replicas = 1};
    SH_TRY(sh_file_read(k->shared.plan, FILE_MOST, &text, &len));
    sh_status st = sh_plan_read(k->shared.plan, text, len, &s->config, &x.plan);
    free(text);
    SH_TRY(st);
    x.shape = sh_plan_shape_of(x.plan);
    x.ranks = (int)x.plan->n_rank;
    if (k->shared.replicas || x.plan->has_replicas)
        x.replicas = k->shared.replicas ? k->shared.replicas : x.plan->replicas;
    int all = x.ranks * x.replicas, nodes = k->cluster.nodes;
    x.ranks_per_node = (all + nodes - 1) / nodes;
    st = sh_search_judge(&o, &x);
    *fits = x.fits;
    if (st == SH_OK) st = head(k, s, x.plan->mode, x.plan->kv, out);
    if (st == SH_OK && x.fits) st = sh_explain_plan(&o, &x, out);
    if (st == SH_OK && !x.fits) st = sh_buf_printf(out, "\nthe plan does not fit: %s\n", x.why);
    if (st == SH_OK && x.fits && k->output) st = write_plan(k, &o, &x);
    sh_choice_release(&x);
    return st;
}

static sh_status explain_one(command *k, const subject *s, sh_buf *out, bool *fits) {
    sh_search_options o = options_of(k, s);
    sh_search *found = NULL;
    SH_TRY(head(k, s, sh_mode_name(o.fixed.mode), sh_kv_type_name(o.fixed.kv), out));
    SH_TRY(sh_search_run(&o, &found));
    sh_status st = SH_OK;
    *fits = found->n > 0;
    if (found->n) st = sh_explain_plan(&o, &found->best[0], out);
    if (st == SH_OK) st = sh_explain_search(&o, found, out);
    if (st == SH_OK && found->n && !k->brief) st = sh_explain_better(&o, &found->best[0], out);
    if (st == SH_OK && found->n && k->output) st = write_plan(k, &o, &found->best[0]);
    sh_search_free(&found);
    if (st == SH_OK && !k->brief) st = table(k, s, 1, out);
    return st;
}

static sh_status plan(command *k, subject *s, int n, sh_buf *out, bool *fits) {
    for (int i = 0; i < n; i++) {
        SH_TRY(load_subject(k->models.n ? k->models.text[i] : NULL, &s[i]));
        SH_TRY(sh_options_packed(&k->shared, s[i].path));
    }
    SH_TRY(load_machine(k));
    SH_TRY(load_workload(k, &s[0]));
    if (k->shared.routing) {
        sh_status st = sh_routing_load(k->shared.routing, &s[0].config, &k->routing);
        if (st != SH_OK) return sh_error_prefix(st, "--routing");
    }
    if (k->shared.plan) return explain_file(k, &s[0], out, fits);
    if (n == 1) return explain_one(k, &s[0], out, fits);
    for (int i = 0; i < n; i++)
        SH_TRY(
            head(k, &s[i], sh_mode_name(sh_options_mode(&k->shared)), sh_kv_type_name(sh_options_kv(&k->shared)), out));
    return table(k, s, n, out);
}

static int run(command *k) {
    int n = k->models.n ? k->models.n : 1;
    bool fits = true;
    sh_buf out;
    subject *s = calloc((size_t)n, sizeof *s);
    if (!s) {
        fprintf(stderr, "shoal plan: no memory\n");
        return SH_EXIT_RUN;
    }
    sh_buf_init(&out, 0);
    sh_status st = plan(k, s, n, &out, &fits);
    flush(&out, k->output && strcmp(k->output, "-") == 0);
    sh_buf_release(&out);
    sh_routing_destroy(&k->routing);
    free(s);
    if (st != SH_OK)
        return sh_options_complain("plan", st == SH_EINPUT || st == SH_EFORMAT ? SH_EXIT_USAGE : SH_EXIT_RUN);
    return fits ? SH_EXIT_OK : SH_EXIT_RUN;
}

static int contradiction(const char *what) {
    fprintf(stderr, "shoal plan: %s\n", what);
    return SH_EXIT_USAGE;
}

int sh_cmd_plan(int argc, char **argv) {
    static command k; /* large tables */
    sh_option t[SH_OPTIONS_MAX];
    int n = sh_options_shared(&k.shared, t), operands = 0;
    for (int i = 0; i < n; i++) {
        if (t[i].name && strcmp(t[i].name, "model") == 0) {
            t[i].kind = SH_OPTION_TEXTS;
            t[i].to = &k.models;
            t[i].help =
                "checkpoint folder, or one with config.json alone; several are compared (default: the demo model)";
        }
        if (t[i].name && strcmp(t[i].name, "plan") == 0)
            t[i] = (sh_option){"plan",         0,      SH_OPTION_TEXT,
                               &k.shared.plan, "FILE", "explain this plan instead of searching for one"};
    }
    const sh_option own[] = {
        {.kind = SH_OPTION_NOTE, .help = "What is planned for:"},
        {"nodes", 0, SH_OPTION_INT, &k.nodes, "N", "so many nodes like this one, or like those of --machine", 1,
         SH_CLUSTER_NODES},
        {"machine", 0, SH_OPTION_TEXT, &k.machine, "FILE",
         "description of the nodes (docs/planning.md) in place of this machine"},
        {"save-machine", 0, SH_OPTION_TEXT, &k.save_machine, "FILE",
         "write down what was measured here, for --machine"},
        {"probe", 0, SH_OPTION_FLAG, &k.probe, NULL, "measure this machine again (it is measured once, and kept)"},
        {"workload", 0, SH_OPTION_TEXT, &k.workload, "FILE",
         "requests as for 'shoal run', or a histogram of lengths (default: a million of 512 and 256 tokens)"},
        {"output", 'o', SH_OPTION_TEXT, &k.output, "FILE",
         "write the best plan as JSON, to be edited and run; - is standard output"},
        {"brief", 0, SH_OPTION_FLAG, &k.brief, NULL,
         "the plan and why others lost, without better machines and the table"},
    };
    memcpy(t + n, own, sizeof own);
    int rc = sh_options_begin("plan", usage, t, n + (int)(sizeof own / sizeof *own), argc, argv, &operands);
    if (rc >= 0) return rc;
    if (operands) {
        fprintf(stderr, "shoal plan: '%s': takes no operands: the model is given with -m\n", argv[1]);
        return SH_EXIT_USAGE;
    }
    if (k.models.n > 1 && k.shared.routing) return contradiction("--routing: is for one model: give -m once");
    if (k.models.n > 1 && (k.shared.plan || k.output))
        return contradiction("--plan, -o: are for one model: give -m once");
    if (k.machine && (k.probe || k.save_machine))
        return contradiction("--probe, --save-machine: are about this machine: leave --machine away");
    return run(&k);
}
