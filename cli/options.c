/* The option parser and the options that commands share. See options.h. */
#include "cli/options.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "cli/commands.h"
#include "cli/demo.h"
#include "common/file.h"
#include "model/beside.h"
#include "model/gguf.h"
#include "model/packed.h"

static bool takes_value(const sh_option *o) {
    return o->kind != SH_OPTION_FLAG;
}

/* A whole decimal number; no sign but '-', no blanks. */
static bool parse_i64(const char *s, int64_t *out) {
    if (!*s || (*s != '-' && (*s < '0' || *s > '9'))) return false;
    char *end;
    errno = 0;
    long long v = strtoll(s, &end, 10);
    if (errno || *end || end == s) return false;
    *out = v;
    return true;
}

sh_status sh_options_size(const char *text, uint64_t *out) {
    static const struct {
        const char *name;
        double bytes;
    } unit[] = {{"", 1},       {"B", 1},        {"K", 0x1p10},   {"M", 0x1p20},   {"G", 0x1p30},
                {"T", 0x1p40}, {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30}, {"TiB", 0x1p40},
                {"KB", 1e3},   {"MB", 1e6},     {"GB", 1e9},     {"TB", 1e12}};
    char *end = NULL;
    double v = *text >= '0' && *text <= '9' ? strtod(text, &end) : -1;
    for (size_t k = 0; end && k < sizeof unit / sizeof *unit; k++)
        if (strcmp(end, unit[k].name) == 0 && v * unit[k].bytes < 0x1p62) {
            *out = (uint64_t)(v * unit[k].bytes);
            return SH_OK;
        }
    SH_FAIL(SH_EINPUT, "'%s' is not a size: allowed are bytes with KiB, MiB, GiB, TiB, KB, MB, GB or TB, such as 8GiB",
            text);
}

static sh_status check_list(const char *s) {
    long last = 0;
    const char *p = s;
    for (;;) {
        char *end;
        errno = 0;
        long v = *p >= '0' && *p <= '9' ? strtol(p, &end, 10) : -1;
        if (v < 0 || errno || (*end && *end != ',')) break;
        if (v <= last) break;
        last = v;
        if (!*end) return SH_OK;
        p = end + 1;
    }
    SH_FAIL(SH_EINPUT, "'%s' is not a list of layers: allowed are increasing whole numbers from 1, such as 5,9", s);
}

static sh_status choose(const sh_option *o, const char *v) {
    char all[256] = "";
    size_t used = 0;
    for (int k = 0; o->choices[k]; k++) {
        if (strcmp(v, o->choices[k]) == 0) {
            *(int *)o->to = k;
            return SH_OK;
        }
        int w = snprintf(all + used, sizeof all - used, "%s%s", k ? ", " : "", o->choices[k]);
        used += w > 0 && (size_t)w < sizeof all - used ? (size_t)w : 0;
    }
    SH_FAIL(SH_EINPUT, "'%s' is not provided: allowed are %s", v, all);
}

static sh_status set_number(const sh_option *o, const char *v) {
    int64_t x;
    if (o->kind == SH_OPTION_U64) {
        char *end;
        errno = 0;
        unsigned long long u = *v >= '0' && *v <= '9' ? strtoull(v, &end, 10) : 0;
        if (*v < '0' || *v > '9' || errno || *end)
            SH_FAIL(SH_EINPUT, "'%s' is not a whole number: allowed are 0 to %llu", v, ULLONG_MAX);
        *(uint64_t *)o->to = u;
        return SH_OK;
    }
    if (!parse_i64(v, &x))
        SH_FAIL(SH_EINPUT, "'%s' is not a whole number: allowed are %lld to %lld", v, (long long)o->min,
                (long long)o->max);
    if (x < o->min || x > o->max)
        SH_FAIL(SH_EINPUT, "%s is out of range: allowed are %lld to %lld", v, (long long)o->min, (long long)o->max);
    *(int *)o->to = (int)x;
    return SH_OK;
}

static sh_status add_text(sh_option_texts *to, const sh_option *o, const char *v) {
    if (!*v) SH_FAIL(SH_EINPUT, "the value is empty: give %s", o->arg ? o->arg : "a value");
    if (to->n == SH_OPTION_TEXTS_MAX)
        SH_FAIL(SH_EINPUT, "is given more than %d times: that many are allowed", SH_OPTION_TEXTS_MAX);
    to->text[to->n++] = v;
    return SH_OK;
}

static sh_status set_value(const sh_option *o, const char *v) {
    switch (o->kind) {
    case SH_OPTION_FLAG:
        *(bool *)o->to = true;
        return SH_OK;
    case SH_OPTION_TEXT:
        if (!*v) SH_FAIL(SH_EINPUT, "the value is empty: give %s", o->arg ? o->arg : "a value");
        *(const char **)o->to = v;
        return SH_OK;
    case SH_OPTION_TEXTS:
        return add_text(o->to, o, v);
    case SH_OPTION_SIZE:
        return sh_options_size(v, o->to);
    case SH_OPTION_LIST: {
        sh_status st = check_list(v);
        if (st == SH_OK) *(const char **)o->to = v;
        return st;
    }
    case SH_OPTION_CHOICE:
        return choose(o, v);
    case SH_OPTION_LATER:
        SH_FAIL(SH_EUNSUPPORTED, "is not provided yet: %s", o->help);
    default:
        return set_number(o, v);
    }
}

static sh_status set_named(const sh_option *o, const char *shown, const char *v) {
    sh_status st = set_value(o, v);
    return st == SH_OK ? st : sh_error_prefix(st, "%s", shown);
}

/* The entry with this name or the only one that starts with it. */
static sh_status find_long(const sh_option *t, int n, const char *name, size_t len, const sh_option **out) {
    const sh_option *found = NULL;
    for (int k = 0; k < n; k++) {
        if (t[k].kind == SH_OPTION_NOTE || strncmp(t[k].name, name, len) != 0) continue;
        if (!t[k].name[len]) {
            *out = &t[k];
            return SH_OK;
        }
        if (found)
            SH_FAIL(SH_EINPUT, "--%.*s: can mean --%s or --%s: write it out", (int)len, name, found->name, t[k].name);
        found = &t[k];
    }
    if (!found) SH_FAIL(SH_EINPUT, "--%.*s: no such option: --help lists them", (int)len, name);
    *out = found;
    return SH_OK;
}

static sh_status parse_long(const sh_option *t, int n, int argc, char **argv, int *at) {
    const char *name = argv[*at] + 2, *eq = strchr(name, '=');
    const sh_option *o = NULL;
    SH_TRY(find_long(t, n, name, eq ? (size_t)(eq - name) : strlen(name), &o));
    char shown[80];
    snprintf(shown, sizeof shown, "--%s", o->name);
    if (!takes_value(o)) {
        if (eq) SH_FAIL(SH_EINPUT, "%s: takes no value: '%s' was given", shown, eq + 1);
        return set_named(o, shown, "");
    }
    if (!eq && *at + 1 >= argc) SH_FAIL(SH_EINPUT, "%s: the value is missing: give %s", shown, o->arg ? o->arg : "one");
    return set_named(o, shown, eq ? eq + 1 : argv[++*at]);
}

static sh_status parse_short(const sh_option *t, int n, int argc, char **argv, int *at) {
    const char *s = argv[*at] + 1;
    for (; *s; s++) {
        const sh_option *o = NULL;
        for (int k = 0; k < n && !o; k++)
            if (t[k].letter == *s) o = &t[k];
        if (!o) SH_FAIL(SH_EINPUT, "-%c: no such option: --help lists them", *s);
        char shown[80];
        snprintf(shown, sizeof shown, "-%c", *s);
        if (!takes_value(o)) {
            SH_TRY(set_named(o, shown, ""));
            continue;
        }
        if (!s[1] && *at + 1 >= argc)
            SH_FAIL(SH_EINPUT, "%s: the value is missing: give %s", shown, o->arg ? o->arg : "one");
        return set_named(o, shown, s[1] ? s + 1 : argv[++*at]);
    }
    return SH_OK;
}

sh_status sh_options_parse(const sh_option *t, int n, int argc, char **argv, int *operands) {
    int kept = 0;
    bool only_operands = false;
    for (int at = 1; at < argc; at++) {
        char *a = argv[at];
        if (only_operands || a[0] != '-' || !a[1])
            argv[++kept] = a; /* kept < at, or equal: nothing unread is overwritten */
        else if (strcmp(a, "--") == 0)
            only_operands = true;
        else if (a[1] == '-')
            SH_TRY(parse_long(t, n, argc, argv, &at));
        else
            SH_TRY(parse_short(t, n, argc, argv, &at));
    }
    *operands = kept;
    return SH_OK;
}

/* Words of `text` from column `indent`, wrapped at 100. */
static void print_wrapped(FILE *to, const char *text, int column, int indent) {
    while (*text) {
        size_t word = strcspn(text, " ");
        if (column + 1 + (int)word > 100 && column > indent) {
            fprintf(to, "\n%*s", indent, "");
            column = indent;
        } else if (column > indent) {
            fputc(' ', to);
            column++;
        }
        fprintf(to, "%.*s", (int)word, text);
        column += (int)word;
        text += word + (text[word] == ' ');
    }
    fputc('\n', to);
}

void sh_options_help(FILE *to, const sh_option *t, int n) {
    enum { INDENT = 30 };
    for (int k = 0; k < n; k++) {
        if (t[k].kind == SH_OPTION_LATER || !t[k].help) continue;
        if (t[k].kind == SH_OPTION_NOTE) {
            fprintf(to, "%s%s\n", k ? "\n" : "", t[k].help);
            continue;
        }
        char head[96];
        int w = t[k].letter ? snprintf(head, sizeof head, "  -%c, --%s", t[k].letter, t[k].name)
                            : snprintf(head, sizeof head, "      --%s", t[k].name);
        if (t[k].arg) w += snprintf(head + w, sizeof head - (size_t)w, " %s", t[k].arg);
        if (w > INDENT - 2)
            fprintf(to, "%s\n%*s", head, INDENT, "");
        else
            fprintf(to, "%-*s", INDENT, head);
        print_wrapped(to, t[k].help, INDENT, INDENT);
    }
}

int sh_options_complain(const char *command, int status) {
    fprintf(stderr, "shoal %s: %s\n", command, sh_error_text());
    return status;
}

int sh_options_begin(const char *command, const char *usage, const sh_option *t, int n, int argc, char **argv,
                     int *operands) {
    for (int k = 1; k < argc && strcmp(argv[k], "--") != 0; k++)
        if (strcmp(argv[k], "--help") == 0 || strcmp(argv[k], "-h") == 0) {
            fputs(usage, stdout);
            sh_options_help(stdout, t, n);
            return SH_EXIT_OK;
        }
    if (sh_options_parse(t, n, argc, argv, operands) == SH_OK) return -1;
    sh_options_complain(command, SH_EXIT_USAGE);
    fprintf(stderr, "'shoal %s --help' explains the options.\n", command);
    return SH_EXIT_USAGE;
}

const char *const sh_options_modes[] = {"exact", "bf16", "q8", "q4", NULL};
const char *const sh_options_kv_types[] = {"f32", "bf16", "q8", NULL};
static const char *const reduce_names[] = {"gather", "sum", NULL};

int sh_options_shared(sh_shared_options *s, sh_option *t) {
    *s = (sh_shared_options){.mode_at = -1, .kv_at = -1};
    const sh_option all[] = {
        {.kind = SH_OPTION_NOTE, .help = "Model and numbers:"},
        {"model", 'm', SH_OPTION_TEXT, &s->model, "MODEL",
         "checkpoint folder of a Gemma 4 model, a GGUF file, or what 'shoal pack' made (default: the demo "
         "model)"},
        {"mode", 0, SH_OPTION_CHOICE, &s->mode_at, "MODE",
         "numeric mode: exact, bf16, q8 or q4 (default bf16, or the plan's, or the packed folder's)",
         .choices = sh_options_modes},
        {"kv", 0, SH_OPTION_CHOICE, &s->kv_at, "TYPE",
         "type of the KV cache: f32, bf16 or q8 (default f32 with exact, else bf16; or the plan's)",
         .choices = sh_options_kv_types},
        {"max-context", 0, SH_OPTION_INT, &s->max_context, "N",
         "longest prompt and output together, in tokens (default: the model's, at most 131072)", 1, INT_MAX},
        {"seed", 0, SH_OPTION_U64, &s->seed, "N", "for requests without a seed (default 0)"},
        {"default-max-tokens", 0, SH_OPTION_INT, &s->default_max_tokens, "N",
         "for requests without max_tokens (default: what the context leaves)", 1, INT_MAX},
        {"lenient", 0, SH_OPTION_FLAG, &s->lenient, NULL, "ignore unknown fields of requests instead of refusing them"},
        {.kind = SH_OPTION_NOTE, .help = "Ranks and memory:"},
        {"ranks", 'n', SH_OPTION_INT, &s->ranks, "N",
         "ranks of a group (default: what the next options need; where none is given, planned)", 1, SH_MAX_RANKS},
        {"replicas", 0, SH_OPTION_INT, &s->replicas, "R",
         "groups, each with the whole model; they share hosts, CPUs and memory evenly (default 1, or planned with the "
         "ranks)",
         1, SH_MAX_REPLICAS},
        {"pp", 0, SH_OPTION_INT, &s->pp, "P", "pipeline stages (default: the ranks, divided by the next three)", 1,
         SH_MAX_RANKS},
        {"ep", 0, SH_OPTION_INT, &s->ep, "E", "ranks of a stage that divide sequences and experts", 1, SH_MAX_RANKS},
        {"tp", 0, SH_OPTION_INT, &s->tp, "T", "ranks of a stage that divide heads and columns", 1, SH_MAX_RANKS},
        {"cp", 0, SH_OPTION_INT, &s->cp, "C", "ranks of a stage that divide the positions of each sequence", 1,
         SH_MAX_RANKS},
        {"prefill", 0, SH_OPTION_INT, &s->prefill, "P",
         "ranks besides that read prompts and hand their K/V to the others, which decode", 1, SH_MAX_RANKS - 1},
        {"tp-reduce", 0, SH_OPTION_CHOICE, &s->tp_reduce_at, "HOW",
         "with --tp: gather (default: the same bytes for any layout) or sum (less traffic; results then depend on T)",
         .choices = reduce_names},
        {"cuts", 0, SH_OPTION_LIST, &s->cuts, "LIST",
         "first layers of stages 1, 2, …, such as 5,9 (default: balanced)"},
        {"prefill-cuts", 0, SH_OPTION_LIST, &s->prefill_cuts, "LIST",
         "first layers of the second, third … rank of --prefill (default: balanced)"},
        {"threads", 0, SH_OPTION_INT, &s->threads, "N",
         "compute threads per rank (default: the rank's share of the CPU set)", 1, 4096},
        {"max-seqs", 0, SH_OPTION_INT, &s->max_seqs, "N", "sequences at once", 1, SH_MAX_SEQS},
        {"chunk", 0, SH_OPTION_INT, &s->chunk, "N", "prompt tokens per step", 1, SH_MAX_CHUNK},
        {"kv-memory", 0, SH_OPTION_SIZE, &s->kv_memory, "SIZE",
         "KV budget per rank, such as 8GiB (default: what is left after weights)"},
        {"no-prefix-sharing", 0, SH_OPTION_FLAG, &s->no_prefix_sharing, NULL,
         "compute every prompt from its first token, also where an earlier one began alike (results are the same)"},
        {"share-weights", 0, SH_OPTION_FLAG, &s->share_weights, NULL,
         "what several ranks of a group need is read and packed by one of them, which sends it to the others"},
        {"routing", 0, SH_OPTION_TEXT, &s->routing, "FILE",
         "with --ep: place experts by counts that --save-routing wrote (default: even shares)"},
        {"replicate", 0, SH_OPTION_SIZE, &s->replicate, "SIZE",
         "with --routing: memory per rank for copies of hot experts, such as 2GiB (default 0)"},
        {"plan", 0, SH_OPTION_TEXT, &s->plan, "FILE",
         "a plan made by 'shoal plan -o', in place of -n, --pp, --ep, --tp, --cp and --cuts"},
        {"report", 0, SH_OPTION_LATER, NULL, "FILE", "the closing table and --progress json tell what happened"},
        {"vision-tokens", 0, SH_OPTION_LATER, NULL, "LIST", "text only for now"},
    };
    memcpy(t, all, sizeof all);
    return (int)(sizeof all / sizeof *all);
}

sh_mode sh_options_mode(const sh_shared_options *s) {
    return s->mode_at >= 0 ? (sh_mode)s->mode_at : SH_MODE_BF16; /* the choices are in its order */
}

sh_kv_type sh_options_kv(const sh_shared_options *s) {
    return s->kv_at >= 0 ? (sh_kv_type)s->kv_at : sh_kv_type_of_mode(sh_options_mode(s)); /* choices in its order */
}

int sh_options_ranks(const sh_shared_options *s) {
    if (s->ranks) return s->ranks;
    int stages = s->pp;
    int64_t width = (int64_t)(s->ep ? s->ep : 1) * (s->tp ? s->tp : 1) * (s->cp ? s->cp : 1);
    if (s->cuts) {
        stages = 2;
        for (const char *p = s->cuts; *p; p++) stages += *p == ',';
    }
    if (!stages && width == 1 && !s->prefill) return 0;
    int64_t ranks = (stages ? stages : 1) * width + s->prefill;
    return ranks < INT_MAX ? (int)ranks : INT_MAX; /* the plan will refuse it */
}

void sh_options_plan(const sh_shared_options *s, int ranks, sh_plan_request *out) {
    *out = (sh_plan_request){.ranks = ranks,
                             .pp = s->pp,
                             .ep = s->ep,
                             .tp = s->tp,
                             .cp = s->cp,
                             .tp_sum = s->tp_reduce_at == 1,
                             .no_prefix_sharing = s->no_prefix_sharing,
                             .share_weights = s->share_weights,
                             .prefill = s->prefill,
                             .cuts = s->cuts,
                             .prefill_cuts = s->prefill_cuts,
                             .mode = sh_options_mode(s),
                             .kv = sh_options_kv(s),
                             .threads = s->threads,
                             .max_seqs = s->max_seqs,
                             .chunk = s->chunk,
                             .max_context = s->max_context,
                             .kv_memory = s->kv_memory,
                             .replicate = s->replicate};
}

sh_status sh_options_folder(const char *given, char *folder, size_t size) {
    static const char *const other[] = {"model.safetensors", "model.safetensors.index.json"};
    const char *slash = strrchr(given, '/');
    char path[PATH_MAX + 32];
    struct stat sb;
    if ((size_t)snprintf(folder, size, "%s", given) >= size) SH_FAIL(SH_ELIMIT, "-m: %s: path too long", given);
    if (!sh_gguf_is_name(slash ? slash + 1 : given) || stat(given, &sb) != 0 || !S_ISREG(sb.st_mode)) return SH_OK;
    snprintf(folder, size, "%.*s", slash ? (int)(slash - given + 1) : 1, slash ? given : ".");
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, other[i]);
        if (sh_file_exists(path))
            SH_FAIL(SH_EINPUT, "-m: %s: %s lies beside it and counts before GGUF: give each a folder of its own", given,
                    other[i]);
    }
    return SH_OK;
}

sh_status sh_options_model(const sh_shared_options *s, char *path, size_t size) {
    const char *given = s->model;
    if (!given) {
        given = sh_demo_model();
        if (!given) return SH_EIO;
    }
    char folder[PATH_MAX], real[PATH_MAX], config[PATH_MAX + 16];
    SH_TRY(sh_options_folder(given, folder, sizeof folder));
    if (!realpath(folder, real)) SH_FAIL(SH_EIO, "-m: %s: %s: allowed is a checkpoint folder", given, strerror(errno));
    snprintf(config, sizeof config, "%s/config.json", real);
    if (!sh_file_exists(config) && !sh_beside_is_metadata(real, "config.json"))
        SH_FAIL(SH_EIO, "-m: %s: has no config.json: allowed is a checkpoint folder", given);
    if ((size_t)snprintf(path, size, "%s", real) >= size) SH_FAIL(SH_ELIMIT, "-m: %s: path too long", given);
    return SH_OK;
}

sh_status sh_options_packed(sh_shared_options *s, const char *path) {
    sh_wtype type;
    if (!sh_packed_is(path)) return SH_OK;
    SH_TRY(sh_packed_read_type(path, &type));
    sh_mode own = type == SH_W_Q8 ? SH_MODE_Q8 : type == SH_W_Q4 ? SH_MODE_Q4 : SH_MODE_BF16;
    if (s->mode_at < 0) s->mode_at = (int)own;
    return sh_packed_check_type(path, type, sh_mode_wtype(sh_options_mode(s)), sh_mode_name(sh_options_mode(s)));
}
