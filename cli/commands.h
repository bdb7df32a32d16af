/* The subcommands: each parses its own options (GNU long options), does its work and returns the exit status of
 * docs/operations.md: 0 all answered, 1 some error rows, 2 bad usage, 3 could not run, 4 interrupted and resumable. */
/*
 * What `shoal run` asks of the two commands that it starts (cli/session.c, cli/launch.c):
 *   shoal serve --run --ready-fd FD --listen ENDPOINT [--keys DIR] --store DIR --model DIR --mode M --kv T [--cuts L]
 * [--pp N]
 *               [--threads N] [--max-seqs N] [--chunk N] [--max-context N] [--kv-memory BYTES] [--seed N]
 *               [--default-max-tokens N] [--lenient]
 *     writes the bound endpoint and a newline to FD; exit status SH_EXIT_SUPERSEDED: a newer incarnation has claimed
 * the store. shoal worker --connect ENDPOINT --group NAME [--keys DIR] [--threads N] [--link local -n RANKS] without
 * --link: one MPI rank. Both log to standard error (common/log.h).
 */
#ifndef SH_CLI_COMMANDS_H
#define SH_CLI_COMMANDS_H

enum {
    SH_EXIT_OK = 0,
    SH_EXIT_ROWS = 1,
    SH_EXIT_USAGE = 2,
    SH_EXIT_RUN = 3,
    SH_EXIT_INTERRUPTED = 4,
    SH_EXIT_SUPERSEDED = 75
};

int sh_cmd_run(int argc, char **argv);
int sh_cmd_plan(int argc, char **argv);
int sh_cmd_serve(int argc, char **argv);
int sh_cmd_worker(int argc, char **argv);
int sh_cmd_submit(int argc, char **argv);
int sh_cmd_status(int argc, char **argv);
int sh_cmd_watch(int argc, char **argv);
int sh_cmd_results(int argc, char **argv);
int sh_cmd_cancel(int argc, char **argv);
int sh_cmd_inspect(int argc, char **argv);
int sh_cmd_pack(int argc, char **argv);
int sh_cmd_tokenize(int argc, char **argv);
int sh_cmd_detokenize(int argc, char **argv);
int sh_cmd_bench(int argc, char **argv);
int sh_cmd_keygen(int argc, char **argv);
int sh_cmd_doctor(int argc, char **argv);

#endif
