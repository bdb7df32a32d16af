/* Finds the demo model and batch. See demo.h. */
#include "cli/demo.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "common/file.h"

/* FOLDER/name, if it exists. */
static bool at(char *out, size_t size, const char *folder, const char *name) {
    return (size_t)snprintf(out, size, "%s/%s", folder, name) < size && sh_file_exists(out);
}

static const char *find(const char *name, char *out, size_t size) {
    const char *share = getenv("SHOAL_SHARE");
    if (share && *share) {
        if (at(out, size, share, name)) return out;
        (void)sh_error_set(SH_EIO, __FILE__, __LINE__,
                           "SHOAL_SHARE: %s has no %s: allowed is the folder share/shoal of an installation", share,
                           name);
        return NULL;
    }
    char folder[PATH_MAX], below[PATH_MAX + 32];
    ssize_t n = readlink("/proc/self/exe", folder, sizeof folder - 1);
    folder[n > 0 ? n : 0] = 0;
    char program[PATH_MAX];
    memcpy(program, folder, sizeof program);
    for (int up = 0; up < 5; up++) { /* bin/.. when installed; build/PRESET[/tests]/.. when built */
        char *slash = strrchr(folder, '/');
        if (!slash) break;
        *slash = 0;
        snprintf(below, sizeof below, "%s/share/shoal", folder);
        if (at(out, size, below, name)) return out;
        snprintf(below, sizeof below, "%s/share", folder);
        if (at(out, size, below, name)) return out;
    }
    (void)sh_error_set(SH_EIO, __FILE__, __LINE__,
                       "%s: not found beside %s (share/shoal or share in the folders above it): "
                       "set SHOAL_SHARE to its folder, or give a model with -m",
                       name, program);
    return NULL;
}

const char *sh_demo_model(void) {
    static char path[PATH_MAX];
    return find("minnow", path, sizeof path);
}
