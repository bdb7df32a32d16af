/* shoal keygen: keys for TCP sockets. */
#include <stdio.h>
#include "cli/commands.h"
#include "cli/options.h"
#include "proto/wire.h"

static const char usage[] =
    "Usage: shoal keygen DIR\n"
    "Makes the folder DIR (mode 700) with two key pairs (CURVE, mode 600): server.key and server.pub for\n"
    "'shoal serve --keys DIR', client.key and client.pub for everybody who connects to it. Clients and ranks on\n"
    "other nodes need client.key, client.pub and server.pub in a folder of theirs; server.key stays.\n"
    "The server admits the keys in DIR/*.pub, looked up at each connection: put another client's NAME.pub\n"
    "there to admit it, remove it to shut it out. Keys that exist are never overwritten.\n\n";

int sh_cmd_keygen(int argc, char **argv) {
    int operands = 0, rc = sh_options_begin("keygen", usage, NULL, 0, argc, argv, &operands);
    if (rc >= 0) return rc;
    if (operands != 1) {
        fprintf(stderr, "shoal keygen: %s: 'shoal keygen --help' explains\n",
                operands ? "one folder at a time" : "which folder? allowed is shoal keygen DIR");
        return SH_EXIT_USAGE;
    }
    sh_status st = sh_wire_keygen(argv[1]);
    if (st != SH_OK) return sh_options_complain("keygen", st == SH_EINPUT ? SH_EXIT_USAGE : SH_EXIT_RUN);
    return SH_EXIT_OK;
}
