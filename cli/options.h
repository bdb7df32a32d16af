/*
 * Command-line options: a table per command, GNU long options (--name value, --name=value, unique prefixes, -x value,
 * --), values checked where they are read. An error names the option, the value and what is allowed.
 *
 *     sh_option t[SH_OPTIONS_MAX];
 *     int n = sh_options_shared(&shared, t);
 *     t[n++] = (sh_option){"wait", 0, SH_OPTION_FLAG, &wait, .help = "until all requests are answered"};
 *     int rc = sh_options_begin("submit", usage, t, n, argc, argv, &operands);
 *     if (rc >= 0) return rc;   (help was printed, or the usage is wrong)
 *     … operands are argv[1] … argv[operands]
 */
#ifndef SH_CLI_OPTIONS_H
#define SH_CLI_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include "model/config.h"
#include "partition/plan.h"

#define SH_OPTIONS_MAX 64

typedef enum sh_option_kind {
    SH_OPTION_FLAG,   /* bool *: takes no value */
    SH_OPTION_TEXT,   /* const char **: borrowed from argv, not empty */
    SH_OPTION_TEXTS,  /* sh_option_texts *: each time it is given, one more */
    SH_OPTION_INT,    /* int *: min to max */
    SH_OPTION_U64,    /* uint64_t * */
    SH_OPTION_SIZE,   /* uint64_t *: bytes, with KiB, MiB, GiB, TiB, KB, MB, GB, TB, or K, M, G, T (binary) */
    SH_OPTION_LIST,   /* const char **: increasing whole numbers, "5,9" */
    SH_OPTION_CHOICE, /* int *: place in `choices` */
    SH_OPTION_LATER,  /* part of the contract, not provided yet: refused */
    SH_OPTION_NOTE    /* no option: a line of help between the others */
} sh_option_kind;

typedef struct sh_option {
    const char *name; /* without dashes */
    char letter;      /* 0: none */
    sh_option_kind kind;
    void *to;
    const char *arg;  /* how help calls the value */
    const char *help; /* for SH_OPTION_LATER: what to use instead */
    int64_t min, max;
    const char *const *choices; /* ends with NULL */
} sh_option;

#define SH_OPTION_TEXTS_MAX 16
typedef struct sh_option_texts {
    const char *text[SH_OPTION_TEXTS_MAX]; /* borrowed from argv, not empty */
    int n;
} sh_option_texts;

/* Parses argv[1 …]; operands are moved to argv[1 … *operands], in order. */
sh_status sh_options_parse(const sh_option *t, int n, int argc, char **argv, int *operands);
void sh_options_help(FILE *to, const sh_option *t, int n);
/* The above with --help: returns −1 to go on; else the exit status, everything said. `usage` ends with a newline. */
int sh_options_begin(const char *command, const char *usage, const sh_option *t, int n, int argc, char **argv,
                     int *operands);
/* Says "shoal COMMAND: the last error" on standard error; returns `status`. */
int sh_options_complain(const char *command, int status);

#define SH_MAX_REPLICAS 256

/* What run, serve, plan and bench share. */
typedef struct sh_shared_options {
    const char *model;               /* as given; NULL: the demo model */
    int ranks;                       /* of a group; 0: not given */
    int replicas;                    /* groups; 0: not given */
    int pp, ep, tp, cp;              /* 0: not given */
    int prefill;                     /* ranks besides; 0: not given */
    int tp_reduce_at;                /* place in the choices: 0 gather, 1 sum */
    const char *cuts, *prefill_cuts; /* NULL: not given */
    const char *plan;                /* file, see planuse.h; NULL: not given */
    int mode_at, kv_at;              /* place in the choices; −1: not given */
    uint64_t kv_memory;
    bool no_prefix_sharing;
    bool share_weights;
    const char *routing; /* NULL: not given */
    uint64_t replicate;
    int max_context, threads, max_seqs, chunk;
    uint64_t seed;
    int default_max_tokens;
    bool lenient;
} sh_shared_options;

/* Sets defaults and writes the table's entries; returns how many. */
int sh_options_shared(sh_shared_options *s, sh_option *t);
sh_mode sh_options_mode(const sh_shared_options *s);
/* As given, else by mode: f32 with exact, bf16 with bf16. */
sh_kv_type sh_options_kv(const sh_shared_options *s);
/* The ranks of a group that -n, --pp, --cuts, --ep, --tp, --cp and --prefill ask for together; 0 where none of them was
 * given. */
int sh_options_ranks(const sh_shared_options *s);
/* What the options ask of a plan for so many ranks. Texts are borrowed. */
void sh_options_plan(const sh_shared_options *s, int ranks, sh_plan_request *out);
/* Choices of --mode and --kv, in the order of sh_mode and sh_kv_type. */
extern const char *const sh_options_modes[];
extern const char *const sh_options_kv_types[];
/* What was given for a model, or where that is a GGUF file the folder that names it (it may be a link to elsewhere), in
 * which no other weights may lie: SH_EINPUT (two GGUF models: model/gguf.h). */
sh_status sh_options_folder(const char *given, char *folder, size_t size);
/* The model's folder as an absolute path (the demo model without -m); checks that config.json is there, or
 * what stands in for it. */
sh_status sh_options_model(const sh_shared_options *s, char *path, size_t size);
/* Where the model's folder is a packed one, its mode is the default, and another is refused. */
sh_status sh_options_packed(sh_shared_options *s, const char *path);
/* "8GiB" → bytes. */
sh_status sh_options_size(const char *text, uint64_t *out);

#endif
