/* shoal inspect: what a checkpoint is. The report is model/inspect.c's; here it is only asked for and printed. */
#include <limits.h>
#include <stdio.h>
#include "cli/commands.h"
#include "cli/demo.h"
#include "cli/options.h"
#include "common/buf.h"
#include "model/inspect.h"

static const char usage[] =
    "Usage: shoal inspect [MODEL]\n"
    "Prints what the checkpoint folder MODEL (default: the demo model) holds: variant, layer table,\n"
    "parameters by component, memory by numeric mode, KV bytes per token, tensors by type. config.json alone is "
    "enough.\n\n";

int sh_cmd_inspect(int argc, char **argv) {
    const char *model = NULL;
    sh_option t[] = {{"model", 'm', SH_OPTION_TEXT, &model, "MODEL", "the same as the operand"}};
    int operands = 0, rc = sh_options_begin("inspect", usage, t, 1, argc, argv, &operands);
    if (rc >= 0) return rc;
    if (operands > 1 || (operands && model)) {
        fprintf(stderr, "shoal inspect: %s: one model at a time\n", argv[operands]);
        return SH_EXIT_USAGE;
    }
    if (operands) model = argv[1];
    if (!model && !(model = sh_demo_model())) return sh_options_complain("inspect", SH_EXIT_RUN);
    char folder[PATH_MAX];
    if (sh_options_folder(model, folder, sizeof folder) != SH_OK) return sh_options_complain("inspect", SH_EXIT_RUN);
    sh_buf report;
    sh_buf_init(&report, 0);
    rc = sh_inspect_model(folder, &report) == SH_OK ? SH_EXIT_OK : sh_options_complain("inspect", SH_EXIT_RUN);
    if (rc == SH_EXIT_OK) fwrite(report.data, 1, report.len, stdout);
    sh_buf_release(&report);
    return rc;
}
