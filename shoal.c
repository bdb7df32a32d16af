/* The front door: finds the subcommand and hands over. The only file that knows every command. */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include "cli/commands.h"
#include "cli/facts.h"
#include "common/mapped.h"
#include "model/team.h"

static const struct {
    const char *name, *help;
    int (*run)(int argc, char **argv);
    bool more; /* a blank line before it in the overview */
} commands[] = {
    {"run", "answer a file of requests, start to end", sh_cmd_run, false},
    {"plan", "what would go where on which machine, what it costs, and why", sh_cmd_plan, false},
    {"inspect", "what a checkpoint is: variant, layers, parameters, memory per mode", sh_cmd_inspect, false},
    {"pack", "a checkpoint once in the layout that ranks map", sh_cmd_pack, false},
    {"bench", "tokens/s, bytes/s and the share of this machine's limits", sh_cmd_bench, false},
    {"doctor", "what this machine has, what is missing, and the command that mends it", sh_cmd_doctor, false},
    {"tokenize", "text to token ids, one line each", sh_cmd_tokenize, false},
    {"detokenize", "token ids to text, one line each", sh_cmd_detokenize, false},
    {"serve", "a coordinator that stays", sh_cmd_serve, true},
    {"worker", "the ranks of a group; started by mpirun, by srun or by run", sh_cmd_worker, false},
    {"submit", "give a coordinator a file of requests", sh_cmd_submit, false},
    {"status", "its jobs and groups", sh_cmd_status, false},
    {"watch", "follow a job to its end", sh_cmd_watch, false},
    {"results", "fetch the results of a job", sh_cmd_results, false},
    {"cancel", "cancel a job", sh_cmd_cancel, false},
    {"keygen", "make a key pair for TCP sockets", sh_cmd_keygen, false},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static void print_overview(FILE *to) {
    fputs("shoal generates text with Gemma 4 on a cluster of CPU nodes.\n\n"
          "  shoal run -m MODEL -i requests.jsonl -o results.jsonl -n 4\n\n"
          "Without -m the demo model answers. Commands ('shoal COMMAND --help' explains each):\n\n",
          to);
    for (int i = 0; i < N_COMMANDS; i++)
        fprintf(to, "%s  %-12s%s\n", commands[i].more ? "\n" : "", commands[i].name, commands[i].help);
    fputs("\n  shoal --version       build, instruction set and libraries\n"
          "\nExit status: 0 all requests answered; 1 finished, some requests ended in an error row; 2 bad usage,\n"
          "unreadable input, an output that cannot be used, or a store that another run works on or has taken over;\n"
          "3 could not run; 4 interrupted, the same command goes on.\n",
          to);
}

/* Edit distance (Levenshtein 1966) of short words; longer ones count as far. */
static int distance(const char *a, const char *b) {
    enum { MOST = 24 };
    int n = (int)strlen(a), m = (int)strlen(b), row[MOST + 1];
    if (n > MOST || m > MOST) return MOST;
    for (int j = 0; j <= m; j++) row[j] = j;
    for (int i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= m; j++) {
            int change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            int best = change < row[j] + 1 ? change : row[j] + 1;
            row[j] = best < row[j - 1] + 1 ? best : row[j - 1] + 1;
        }
    }
    return row[m];
}

static int unknown_command(const char *name) {
    static const char *const later[][2] = {
        {"drain", "'shoal cancel' ends a job; a killed group's requests go on elsewhere"}};
    for (size_t i = 0; i < sizeof later / sizeof *later; i++)
        if (strcmp(name, later[i][0]) == 0) {
            fprintf(stderr, "shoal: '%s' is not provided yet: %s\n", name, later[i][1]);
            return SH_EXIT_USAGE;
        }
    int best = 0;
    for (int i = 1; i < N_COMMANDS; i++)
        if (distance(name, commands[i].name) < distance(name, commands[best].name)) best = i;
    fprintf(stderr, "shoal: '%s' is not a command: did you mean '%s'? 'shoal --help' lists them\n", name,
            commands[best].name);
    return SH_EXIT_USAGE;
}

/* Commands that compute, themselves or in processes they start. */
static bool runs_teams(const char *name) {
    static const char *const those[] = {"run", "serve", "worker", "bench", "plan", "pack"};
    for (size_t i = 0; i < sizeof those / sizeof *those; i++)
        if (strcmp(name, those[i]) == 0) return true;
    return false;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        print_overview(stderr);
        return SH_EXIT_USAGE;
    }
    const char *name = argv[1];
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        print_overview(stdout);
        return SH_EXIT_OK;
    }
    if (strcmp(name, "--version") == 0) {
        sh_facts_print_version(stdout);
        return SH_EXIT_OK;
    }
    if (runs_teams(name)) sh_team_prepare(argv);
    SH_IGNORE(sh_mapped_watch(SH_EXIT_RUN)); /* without it the signal ends the process all the same, unnamed */
    for (int i = 0; i < N_COMMANDS; i++)
        if (strcmp(name, commands[i].name) == 0) {
            int rc = commands[i].run(argc - 1, argv + 1);
            if (fflush(stdout) != 0 && rc == SH_EXIT_OK) { /* a full disk or a closed pipe must not look like success */
                perror("shoal: standard output");
                rc = SH_EXIT_RUN;
            }
            return rc;
        }
    return unknown_command(name);
}
