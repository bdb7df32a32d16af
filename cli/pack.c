/* shoal pack: a checkpoint, once, in the kernels' own layout (model/packed.h). */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "cli/commands.h"
#include "cli/demo.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "common/clock.h"
#include "model/packed.h"
#include "model/team.h"
#include "partition/machine.h"

static const char usage[] =
    "Usage: shoal pack -m MODEL -o DIR [--mode bf16|q8|q4] [OPTION]...\n"
    "       shoal pack --verify DIR\n"
    "Writes a checkpoint once in the layout that ranks compute with. 'run', 'serve', 'bench', 'plan' and 'inspect'\n"
    "take DIR as MODEL: it is mapped, so a start reads nothing twice and quantises nothing, and ranks on a node\n"
    "share its pages. DIR serves every number of ranks and every way of dividing a model. Results are those of the\n"
    "checkpoint in the same mode, byte for byte.\n\n"
    "DIR appears when it is complete. It takes about as much disk as the weights take memory ('shoal inspect'), and\n"
    "the embedding tables besides.\n\n"
    "  shoal pack -m MODEL -o MODEL.q4 --mode q4\n"
    "  shoal run -m MODEL.q4 -i requests.jsonl -o results.jsonl -n 4\n\n";

typedef struct command {
    const char *model, *output, *verify;
    int mode, threads;
    bool force, quiet;
    double said;
} command;

static void say(command *k, const char *what, size_t done, size_t total) {
    double now = sh_now();
    bool terminal = isatty(STDERR_FILENO);
    if (k->quiet || now - k->said < (terminal ? 0.2 : 5)) return;
    k->said = now;
    fprintf(stderr, "%s%s: %.2f of %.2f GB, %d %%%s", terminal ? "\r" : "", what, (double)done / 1e9,
            (double)total / 1e9, (int)(100 * ((double)done / (double)(total ? total : 1))), terminal ? "  " : "\n");
}

static void end_line(const command *k) {
    if (!k->quiet && isatty(STDERR_FILENO)) fputs("\r\033[K", stderr);
}

static bool packed(void *arg, size_t done, size_t total) {
    say(arg, "packed", done, total);
    return !sh_interrupted;
}

static void verified(void *arg, size_t done, size_t total) {
    say(arg, "verified", done, total);
}

static sh_status make_team(const command *k, sh_team **out) {
    static sh_machine machine; /* a large table */
    SH_TRY(sh_machine_read(NULL, &machine));
    return sh_team_create(k->threads ? k->threads : machine.n_cpus, machine.cpus, machine.n_cpus, out);
}

/* DIR without slashes at its end: a folder with a name of its own beside it is written first. */
static sh_status folder(const char *given, char *path, size_t size) {
    size_t n = strlen(given);
    while (n > 1 && given[n - 1] == '/') n--;
    if (n >= size) SH_FAIL(SH_ELIMIT, "-o: %.64s…: path too long", given);
    snprintf(path, size, "%.*s", (int)n, given);
    const char *last = strrchr(path, '/');
    last = last ? last + 1 : path;
    if (!*last || strcmp(last, ".") == 0 || strcmp(last, "..") == 0)
        SH_FAIL(SH_EINPUT, "-o: %s: has no name of its own: allowed is a folder that is not there yet", given);
    return SH_OK;
}

static sh_status write_folder(command *k, sh_team *team) {
    char model[PATH_MAX], dir[PATH_MAX];
    sh_shared_options named = {.model = k->model};
    sh_pack_options o = {.mode = (sh_mode)k->mode, .force = k->force, .progress = packed, .arg = k};
    SH_TRY(sh_options_model(&named, model, sizeof model));
    SH_TRY(folder(k->output, dir, sizeof dir));
    double began = sh_now();
    sh_status st = sh_pack_write(model, dir, &o, team);
    end_line(k);
    SH_TRY(st);
    if (!k->quiet)
        fprintf(stderr, "%s: packed for %s in %.1f s\n", dir, sh_wtype_modes(sh_mode_wtype(o.mode)), sh_now() - began);
    return SH_OK;
}

static sh_status verify_folder(command *k, sh_team *team) {
    if (!sh_packed_is(k->verify))
        SH_FAIL(SH_EINPUT, "--verify: %s: has no " SH_PACKED_INDEX ": allowed is a packed folder", k->verify);
    sh_status st = sh_packed_verify(k->verify, team, verified, k);
    end_line(k);
    SH_TRY(st);
    if (!k->quiet) fprintf(stderr, "%s: every byte is as it was written\n", k->verify);
    return SH_OK;
}

static int exit_status(sh_status st) {
    return st == SH_OK ? SH_EXIT_OK : st == SH_EINPUT ? SH_EXIT_USAGE : SH_EXIT_RUN;
}

static int run(command *k) {
    sh_team *team = NULL;
    if (!k->verify) sh_interrupt_catch(); /* there is something to clear away */
    k->said = sh_now();
    sh_status st = make_team(k, &team);
    if (st == SH_OK) st = k->verify ? verify_folder(k, team) : write_folder(k, team);
    sh_team_destroy(&team);
    if (st == SH_ECANCELLED) {
        fprintf(stderr, "shoal pack: interrupted: nothing was kept, the same command begins again\n");
        return SH_EXIT_INTERRUPTED;
    }
    return st == SH_OK ? SH_EXIT_OK : sh_options_complain("pack", exit_status(st));
}

static int contradiction(const char *what) {
    fprintf(stderr, "shoal pack: %s: 'shoal pack --help' explains\n", what);
    return SH_EXIT_USAGE;
}

int sh_cmd_pack(int argc, char **argv) {
    command k = {.mode = SH_MODE_BF16};
    const sh_option t[] = {
        {"model", 'm', SH_OPTION_TEXT, &k.model, "MODEL", "checkpoint folder (default: the demo model)"},
        {"output", 'o', SH_OPTION_TEXT, &k.output, "DIR", "folder to write"},
        {"mode", 0, SH_OPTION_CHOICE, &k.mode, "MODE",
         "numeric mode to pack for: bf16 (exact reads it too), q8 or q4 (default bf16)", .choices = sh_options_modes},
        {"force", 0, SH_OPTION_FLAG, &k.force, NULL, "replace DIR if it is a packed folder, or empty"},
        {"verify", 0, SH_OPTION_TEXT, &k.verify, "DIR", "write nothing: check every byte of a packed folder"},
        {"threads", 0, SH_OPTION_INT, &k.threads, "N", "threads (default: all CPUs)", 1, 4096},
        {"quiet", 'q', SH_OPTION_FLAG, &k.quiet, NULL, "say nothing but errors"},
    };
    int operands = 0, rc = sh_options_begin("pack", usage, t, sizeof t / sizeof *t, argc, argv, &operands);
    if (rc >= 0) return rc;
    if (operands) return contradiction("takes no operands: the model is given with -m, the folder with -o");
    if (k.verify && (k.output || k.model || k.force)) return contradiction("--verify: stands alone");
    if (!k.verify && !k.output) return contradiction("-o: is missing: the folder to write");
    return run(&k);
}
