/* Comparing what ranks find. See sight.h. */
#include "worker/sight.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "common/file.h"
#include "common/hash.h"
#include "common/limits.h"
#include "model/packed.h"

static sh_status hash_file(const char *dir, const char *name, size_t most, uint64_t *out) {
    char path[PATH_MAX], *text = NULL;
    size_t len = 0;
    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
        SH_FAIL(SH_ELIMIT, "%.64s…: path too long", dir);
    *out = 0;
    if (!sh_file_exists(path)) return SH_OK; /* config.json beside GGUF: its metadata stand in */
    SH_TRY(sh_file_read(path, most, &text, &len));
    *out = sh_hash64(1, text, len);
    free(text);
    return SH_OK;
}

sh_status sh_sight_take(const char *model_dir, sh_sight *out) {
    sh_sight s = {.kind = -1};
    if (gethostname(s.host, sizeof s.host - 1) != 0) snprintf(s.host, sizeof s.host, "unknown");
    if (sh_packed_is(model_dir)) {
        sh_wtype type;
        SH_TRY(sh_packed_read_type(model_dir, &type));
        s.kind = (int32_t)type;
    }
    SH_TRY(sh_weights_fingerprint(model_dir, &s.weights));
    SH_TRY(hash_file(model_dir, "config.json", SH_MAX_CONFIG_BYTES, &s.config));
    if (s.kind >= 0) SH_TRY(hash_file(model_dir, SH_PACKED_INDEX, SH_MAX_ST_HEADER, &s.index));
    *out = s;
    return SH_OK;
}

static const char *name_of(const sh_sight *s, char *to, size_t size) {
    if (s->kind < 0)
        snprintf(to, size, "a checkpoint");
    else
        snprintf(to, size, "a folder packed for %s", sh_wtype_modes((sh_wtype)s->kind));
    return to;
}

sh_status sh_sight_compare(const char *model_dir, const sh_sight *all, int n) {
    const sh_sight *a = &all[0];
    char one[64], other[64];
    for (int r = 1; r < n; r++) {
        const sh_sight *b = &all[r];
        if (a->kind != b->kind)
            SH_FAIL(SH_EFORMAT, "%s: rank %d (%s) finds %s there, rank 0 (%s) finds %s: all ranks must find the same",
                    model_dir, r, b->host, name_of(b, one, sizeof one), a->host, name_of(a, other, sizeof other));
        if (a->weights != b->weights)
            SH_FAIL(SH_EFORMAT,
                    "%s: rank %d (%s) finds weights with fingerprint %016" PRIx64 " there, rank 0 (%s) with %016" PRIx64
                    ": all ranks must find the same",
                    model_dir, r, b->host, b->weights, a->host, a->weights);
        if (a->index != b->index)
            SH_FAIL(SH_EFORMAT,
                    "%s/" SH_PACKED_INDEX ": rank %d (%s) finds another one than rank 0 (%s): the folders have other "
                    "weights, or were packed by other versions: all ranks must find the same",
                    model_dir, r, b->host, a->host);
        if (a->config != b->config)
            SH_FAIL(SH_EFORMAT,
                    "%s/config.json: rank %d (%s) finds another one than rank 0 (%s): all ranks must "
                    "find the same",
                    model_dir, r, b->host, a->host);
    }
    return SH_OK;
}
