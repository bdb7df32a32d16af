/* The report of `shoal inspect`. See inspect.h. Formats numbers that config.h and safetensors.h give; computes none of
 * its own beyond sums. */
#include "model/inspect.h"

#include <stdio.h>
#include <string.h>

#include "common/file.h"
#include "model/beside.h"
#include "model/gguf.h"
#include "model/packed.h"
#include "model/safetensors.h"
#include "model/weights.h"

const char *sh_inspect_bytes(int64_t n, char to[24]) {
    static const char *const unit[] = {"KiB", "MiB", "GiB"};
    double x = (double)n / 1024;
    int u = 0;
    while (u < 2 && x >= 1000) x /= 1024, u++;
    if (n < 10 * 1024)
        snprintf(to, 24, "%lld B", (long long)n);
    else
        snprintf(to, 24, u == 2 ? "%.2f %s" : "%.1f %s", x, unit[u]);
    return to;
}

const char *sh_inspect_params(int64_t n, char to[24]) {
    if (n >= 1000000000)
        snprintf(to, 24, "%.3f B", (double)n / 1e9);
    else if (n >= 1000000)
        snprintf(to, 24, "%.2f M", (double)n / 1e6);
    else
        snprintf(to, 24, "%lld", (long long)n);
    return to;
}

int64_t sh_inspect_kv_sequence(const sh_config *c, sh_kv_type type, int first, int last, int64_t n) {
    int64_t bytes = (int64_t)sh_config_kv_bytes(c, type, SH_KV_GLOBAL, first, last) * n;
    int64_t window = 0;
    for (int i = 0; i < c->n_layers; i++)
        if (c->layer[i].kind == SH_KV_SLIDING) window = c->layer[i].window;
    return bytes + (int64_t)sh_config_kv_bytes(c, type, SH_KV_SLIDING, first, last) * (n < window ? n : window);
}

int64_t sh_inspect_active(const sh_config *c) {
    sh_param_count p = sh_config_count(c);
    int64_t idle = c->experts ? p.experts / c->experts * (c->experts - c->top_k) : 0;
    return p.total - p.ple_table - idle;
}

/* --- layers --------------------------------------------------------------------------------------------------------
 */

static bool same_layer(const sh_layer *a, const sh_layer *b) {
    return a->kind == b->kind && a->heads == b->heads && a->kv_heads == b->kv_heads && a->head_dim == b->head_dim &&
           a->has_kv == b->has_kv && a->k_eq_v == b->k_eq_v && a->ff == b->ff &&
           (a->has_kv || a->kv_from == b->kv_from);
}

/* "0-4, 6-10, 12": the layers equal to layer i. */
static void list_layers(const sh_config *c, int i, char *to, size_t size) {
    size_t n = 0;
    to[0] = 0;
    for (int a = i; a < c->n_layers && n < size; a++) {
        if (!same_layer(&c->layer[a], &c->layer[i])) continue;
        int b = a;
        while (b + 1 < c->n_layers && same_layer(&c->layer[b + 1], &c->layer[i])) b++;
        n += (size_t)snprintf(to + n, size - n, b > a ? "%s%d-%d" : "%s%d", n ? ", " : "", a, b);
        a = b;
    }
    if (n >= size) memcpy(to + size - 4, "...", 4);
}

static sh_status add_layer(const sh_config *c, int i, sh_buf *out) {
    const sh_layer *l = &c->layer[i];
    sh_layer_count n = sh_config_layer_count(c, i);
    char window[16] = "-", kv[24] = "own", ff[48], params[24], list[200];
    int count = 0;
    for (int a = 0; a < c->n_layers; a++) count += same_layer(&c->layer[a], l);
    if (l->window) snprintf(window, sizeof window, "%d", l->window);
    if (!l->has_kv)
        snprintf(kv, sizeof kv, "of layer %d", l->kv_from);
    else if (l->k_eq_v)
        snprintf(kv, sizeof kv, "own, K = V");
    snprintf(ff, sizeof ff, "%d", l->ff);
    if (l->moe) snprintf(ff, sizeof ff, "%d + %d of %d x %d", l->ff, c->top_k, c->experts, c->expert_ff);
    sh_inspect_params(n.qo + n.kv + n.mlp + n.experts + n.router + n.ple + n.norms, params);
    list_layers(c, i, list, sizeof list);
    return sh_buf_printf(out, "  %5d  %-8s %5d %8d %8d %6s  %-12s %-22s %10s  %s\n", count,
                         l->window ? "sliding" : "full", l->heads, l->kv_heads, l->head_dim, window, kv, ff, params,
                         list);
}

static sh_status add_layers(const sh_config *c, sh_buf *out) {
    SH_TRY(sh_buf_printf(out, "\n  %5s  %-8s %5s %8s %8s %6s  %-12s %-22s %10s  %s\n", "count", "layer", "heads",
                         "KV heads", "head dim", "window", "K/V", "feed-forward", "parameters", "layers"));
    for (int i = 0; i < c->n_layers; i++) {
        bool known = false;
        for (int a = 0; a < i && !known; a++) known = same_layer(&c->layer[a], &c->layer[i]);
        if (!known) SH_TRY(add_layer(c, i, out));
    }
    return SH_OK;
}

/* --- parameters and memory -----------------------------------------------------------------------------------------
 */

static sh_status add_count(sh_buf *out, const char *name, int64_t n) {
    char text[24];
    if (n == 0) return SH_OK;
    return sh_buf_printf(out, "  %-34s %12s\n", name, sh_inspect_params(n, text));
}

static sh_status add_params(const sh_config *c, sh_buf *out) {
    sh_param_count p = sh_config_count(c);
    SH_TRY(sh_buf_add_str(out, "\nparameters\n"));
    SH_TRY(add_count(out, c->tied ? "embedding (= head)" : "embedding and head", p.embedding));
    SH_TRY(add_count(out, "per-layer embedding table", p.ple_table));
    SH_TRY(add_count(out, "per-layer context projection", p.ple_projection));
    SH_TRY(add_count(out, "attention", p.attention));
    SH_TRY(add_count(out, "dense feed-forward", p.mlp));
    SH_TRY(add_count(out, "experts", p.experts));
    SH_TRY(add_count(out, "routers", p.router));
    SH_TRY(add_count(out, "per-layer embedding in layers", p.ple_layers));
    SH_TRY(add_count(out, "norms", p.norms));
    SH_TRY(add_count(out, "total", p.total));
    if (p.ple_table) SH_TRY(add_count(out, "without the per-layer table", p.total - p.ple_table));
    if (c->experts) SH_TRY(add_count(out, "active per token", sh_inspect_active(c)));
    return SH_OK;
}

static sh_status add_memory(const sh_config *c, sh_buf *out) {
    sh_param_count p = sh_config_count(c);
    char a[24];
    SH_TRY(sh_buf_add_str(out, "\nweights\n"));
    SH_TRY(sh_buf_printf(out, "  %-34s %12s\n", "checkpoint in BF16", sh_inspect_bytes(2 * p.total, a)));
    for (sh_mode m = SH_MODE_BF16; m < SH_MODES; m++) {
        int64_t held = (int64_t)sh_weights_estimate(c, m, 0, c->n_layers);
        SH_TRY(sh_buf_printf(out, "  %-34s %12s  mode %s, repacked\n",
                             m == SH_MODE_BF16 ? "in memory, all ranks together" : "", sh_inspect_bytes(held, a),
                             m == SH_MODE_BF16 ? "exact or bf16" : sh_mode_name(m)));
    }
    SH_TRY(sh_buf_printf(out, "  %-34s %12s  rows are read where they are needed\n", "mapped from disk: embedding",
                         sh_inspect_bytes(2 * (int64_t)c->vocab * c->hidden, a)));
    if (!c->ple) return SH_OK;
    return sh_buf_printf(out, "  %-34s %12s  likewise\n", "mapped from disk: per-layer table",
                         sh_inspect_bytes(2 * p.ple_table, a));
}

/* --- KV ------------------------------------------------------------------------------------------------------------
 */

static const sh_kv_type shown[SH_KV_TYPES] = {SH_KV_Q8, SH_KV_BF16, SH_KV_F32};

static sh_status add_kv_kind(const sh_config *c, sh_kv_kind kind, sh_buf *out) {
    static const char *const name[SH_KV_KINDS] = {"full", "sliding"};
    int count = 0;
    size_t one[SH_KV_TYPES] = {0};
    bool k_eq_v = false;
    for (int i = 0; i < c->n_layers; i++) {
        const sh_layer *l = &c->layer[i];
        if (l->kind != kind || !l->has_kv) continue;
        for (int t = 0; t < SH_KV_TYPES; t++) {
            size_t bytes = sh_layer_kv_bytes(l, (sh_kv_type)t);
            one[t] = count == 0 || one[t] == bytes ? bytes : 0; /* layers of one kind may differ */
        }
        count++;
        k_eq_v = l->k_eq_v;
    }
    if (count == 0) return SH_OK;
    SH_TRY(sh_buf_printf(out, "  %-8s %6d", name[kind], count));
    for (int t = 0; t < SH_KV_TYPES; t++) {
        char text[24] = "differs";
        if (one[shown[t]] > 0) snprintf(text, sizeof text, "%zu", one[shown[t]]);
        SH_TRY(sh_buf_printf(out, " %12s", text));
    }
    for (int t = 0; t < SH_KV_TYPES; t++)
        SH_TRY(sh_buf_printf(out, " %12zu", sh_config_kv_bytes(c, shown[t], kind, 0, c->n_layers)));
    return sh_buf_printf(out, "%s\n", k_eq_v ? "  K = V: one tensor" : "");
}

static sh_status add_kv_length(const sh_config *c, int tokens, const char *note, sh_buf *out) {
    char bytes[24], n[24];
    snprintf(n, sizeof n, tokens % 1024 ? "%d" : "%dk", tokens % 1024 ? tokens : tokens / 1024);
    SH_TRY(sh_buf_printf(out, "  %-8s", n));
    for (int t = 0; t < SH_KV_TYPES; t++) {
        int64_t size = sh_inspect_kv_sequence(c, shown[t], 0, c->n_layers, tokens);
        SH_TRY(sh_buf_printf(out, " %12s", sh_inspect_bytes(size, bytes)));
    }
    return sh_buf_printf(out, "%s\n", note);
}

static sh_status add_kv(const sh_config *c, sh_buf *out) {
    SH_TRY(sh_buf_printf(out, "\nKV bytes per token\n  %-8s %6s", "layer", "stored"));
    for (int t = 0; t < 2 * SH_KV_TYPES; t++)
        SH_TRY(
            sh_buf_printf(out, " %6s, %4s", t < SH_KV_TYPES ? "one" : "all", sh_kv_type_name(shown[t % SH_KV_TYPES])));
    SH_TRY(sh_buf_printf(out, "\n"));
    SH_TRY(add_kv_kind(c, SH_KV_SLIDING, out));
    SH_TRY(add_kv_kind(c, SH_KV_GLOBAL, out));
    SH_TRY(sh_buf_printf(out, "\nKV of one sequence\n  %-8s", "tokens"));
    for (int t = 0; t < SH_KV_TYPES; t++) SH_TRY(sh_buf_printf(out, " %12s", sh_kv_type_name(shown[t])));
    SH_TRY(sh_buf_printf(out, "\n"));
    static const int length[] = {8192, 32768, 131072};
    for (int i = 0; i < 3; i++)
        if (length[i] < c->max_context) SH_TRY(add_kv_length(c, length[i], "", out));
    return add_kv_length(c, c->max_context, "  the model's longest", out);
}

sh_status sh_inspect_config(const sh_config *c, sh_buf *out) {
    SH_TRY(sh_buf_printf(out, "Gemma 4 %s: %d layers, hidden %d, vocabulary %d, context %d, head %s\n", c->variant,
                         c->n_layers, c->hidden, c->vocab, c->max_context,
                         c->tied ? "tied to the embedding" : "of its own"));
    if (c->first_shared < c->n_layers)
        SH_TRY(sh_buf_printf(out, "layers %d-%d have no K/V of their own\n", c->first_shared, c->n_layers - 1));
    if (c->ple) SH_TRY(sh_buf_printf(out, "per-layer embeddings of width %d\n", c->ple));
    SH_TRY(add_layers(c, out));
    SH_TRY(add_params(c, out));
    SH_TRY(add_memory(c, out));
    return add_kv(c, out);
}

/* --- files ---------------------------------------------------------------------------------------------------------
 */

static bool has_weights(const char *dir) {
    static const char *const name[] = {"model.safetensors", "model.safetensors.index.json"};
    for (int i = 0; i < 2; i++) {
        char path[4096];
        if (snprintf(path, sizeof path, "%s/%s", dir, name[i]) < (int)sizeof path && sh_file_exists(path)) return true;
    }
    return sh_gguf_is_there(dir);
}

/* "types: BF16 in 120 tensors (1.2 MiB), F32 in 30 (4.0 KiB)". */
static sh_status add_types(const sh_tensors *t, sh_buf *out) {
    char seen[32][12], size[24];
    int n = 0;
    for (int i = 0; i < sh_tensors_count(t) && n < 32; i++) {
        const char *type = sh_tensors_at(t, i)->dtype_name;
        int count = 0, s = 0;
        uint64_t bytes = 0;
        while (s < n && strcmp(seen[s], type) != 0) s++;
        if (s < n) continue;
        memcpy(seen[n++], type, sizeof seen[0]);
        for (int k = i; k < sh_tensors_count(t); k++) {
            bool same = strcmp(sh_tensors_at(t, k)->dtype_name, type) == 0;
            count += same;
            bytes += same ? sh_tensors_at(t, k)->bytes : 0;
        }
        SH_TRY(sh_buf_printf(out, "%s %s in %d%s (%s)", n == 1 ? "types:" : ",", type, count,
                             n > 1        ? ""
                             : count == 1 ? " tensor"
                                          : " tensors",
                             sh_inspect_bytes((int64_t)bytes, size)));
    }
    return n ? sh_buf_printf(out, "\n") : SH_OK;
}

/* What a packed folder has; the checkpoint's own fingerprint. */
static sh_status add_packed(const char *dir, const sh_config *c, sh_buf *out) {
    SH_CLEANUP(sh_packed_close) sh_packed *p = NULL;
    SH_CLEANUP(sh_tensors_close) sh_tensors *t = NULL;
    char a[24];
    SH_TRY(sh_packed_open(dir, c, &p));
    SH_TRY(sh_packed_tables(p, &t));
    SH_TRY(sh_weights_check_tables(dir, c, t));
    return sh_buf_printf(
        out,
        "\npacked for %s: %d tensors and %d as the checkpoint has them in %d files, %s, as config.json "
        "implies; fingerprint %016llx\n",
        sh_wtype_modes(sh_packed_type(p)), sh_packed_tensors(p), sh_tensors_count(t), sh_packed_files(p),
        sh_inspect_bytes((int64_t)sh_packed_bytes(p), a), (unsigned long long)sh_packed_fingerprint(p));
}

static sh_status add_files(const char *dir, const sh_config *c, sh_buf *out) {
    if (sh_packed_is(dir)) return add_packed(dir, c, out);
    if (!has_weights(dir))
        return sh_buf_printf(out, "\nno weights in %s: the above follows from config.json alone\n", dir);
    SH_CLEANUP(sh_tensors_close) sh_tensors *t = NULL;
    SH_TRY(sh_tensors_open(dir, &t));
    SH_TRY(sh_weights_check(dir, c, t));
    char a[24];
    int files = sh_tensors_files(t);
    SH_TRY(sh_buf_printf(out, "\n%d tensors in %d file%s, %s, as config.json implies; fingerprint %016llx\n",
                         sh_tensors_count(t), files, files == 1 ? "" : "s",
                         sh_inspect_bytes((int64_t)sh_tensors_bytes(t), a),
                         (unsigned long long)sh_tensors_fingerprint(t)));
    return add_types(t, out);
}

/* Which files the metadata of GGUF stand in for. */
static sh_status add_metadata(const char *dir, sh_buf *out) {
    bool config = sh_beside_is_metadata(dir, "config.json"), tokenizer = sh_beside_is_metadata(dir, "tokenizer.json");
    if (!config && !tokenizer) return SH_OK;
    return sh_buf_printf(out, "from the metadata of GGUF: %s%s%s\n", config ? "configuration" : "",
                         config && tokenizer ? " and " : "", tokenizer ? "tokenizer" : "");
}

sh_status sh_inspect_model(const char *model_dir, sh_buf *out) {
    sh_config c;
    SH_TRY(sh_config_load(model_dir, &c));
    SH_TRY(sh_inspect_config(&c, out));
    SH_TRY(add_files(model_dir, &c, out));
    return add_metadata(model_dir, out);
}
