/* Lengths out of a file. See workfile.h. */
#include "cli/workfile.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cli/input.h"
#include "common/file.h"
#include "common/json.h"
#include "coordinator/intake.h"
#include "partition/cluster.h"

#define HISTOGRAM_MOST  ((size_t)16 << 20)
#define READ_MOST       5000 /* requests whose lengths are counted; of more every n-th */
#define USUAL_OUTPUT    256
#define BYTES_PER_TOKEN 4.0
#define TURN_TOKENS     8 /* what the chat format puts around a message */

static bool is_histogram(const char *path, sh_workload *out, sh_status *st) {
    SH_CLEANUP(sh_json_release) json_t *j = NULL;
    char *text = NULL;
    size_t len = 0;
    if (sh_file_read(path, HISTOGRAM_MOST, &text, &len) != SH_OK) return false;
    bool is = sh_json_parse(path, text, len, &j) == SH_OK && json_is_object(j) && json_object_get(j, "lengths");
    if (is) *st = sh_workload_read(path, text, len, out);
    free(text);
    return is;
}

/* Bytes of all strings under messages or prompt; a list of numbers counts as so many tokens. */
static double text_tokens(const json_t *j) {
    double n = 0;
    size_t i;
    const char *key;
    json_t *v, *object = (json_t *)(uintptr_t)j;
    if (json_is_string(j)) return (double)json_string_length(j) / BYTES_PER_TOKEN;
    if (json_is_integer(j)) return 1;
    json_array_foreach(object, i, v) n += text_tokens(v);
    json_object_foreach(object, key, v) {
        if (strcmp(key, "content") == 0 || strcmp(key, "text") == 0) n += text_tokens(v);
    }
    return n + (json_is_object(j) ? TURN_TOKENS : 0);
}

static bool estimate(const char *line, size_t len, int usual, sh_workload_bin *to) {
    SH_CLEANUP(sh_json_release) json_t *j = NULL;
    int64_t most = usual, choices = 1;
    if (sh_json_parse("request", line, len, &j) != SH_OK || !json_is_object(j)) return false;
    const json_t *body = json_object_get(j, "body");
    if (!body) body = j;
    const json_t *prompt = json_object_get(body, "messages");
    if (!prompt) prompt = json_object_get(body, "prompt");
    if (!prompt) return false;
    SH_IGNORE(sh_json_int(body, "max_tokens", 0, 1 << 30, &most));
    SH_IGNORE(sh_json_int(body, "max_completion_tokens", 0, 1 << 30, &most));
    SH_IGNORE(sh_json_int(body, "n", 1, 1024, &choices));
    *to = (sh_workload_bin){.prompt = text_tokens(prompt), .output = (double)most, .requests = (double)choices};
    return true;
}

static bool count(const sh_intake *in, const char *line, size_t len, uint64_t number, sh_workload *w) {
    sh_request r;
    if (sh_intake_line(in, line, len, number, &r) != SH_OK) return false;
    bool good = r.status == 0;
    if (good) sh_workload_add(w, (double)r.prompt.n, r.sampling.max_tokens, 1);
    sh_request_release(&r);
    return good;
}

static void add(sh_workload *w, const sh_workload_bin *b) {
    sh_workload_add(w, b->prompt, b->output, b->requests);
}

static sh_status read_lines(FILE *f, const sh_intake *in, uint64_t every, int usual, sh_workload *w, uint64_t *bad) {
    char *line = NULL;
    size_t room = 0;
    uint64_t number = 0;
    ssize_t n;
    while ((n = getline(&line, &room, f)) > 0) {
        if (strspn(line, " \t\r\n") == (size_t)n || number++ % every) continue;
        sh_workload_bin b;
        bool good = in ? count(in, line, (size_t)n, number, w) : estimate(line, (size_t)n, usual, &b);
        if (good && !in) add(w, &b);
        *bad += !good;
    }
    free(line);
    return SH_OK;
}

static sh_status read_requests(const char *path, const sh_intake *in, uint64_t lines, int usual, sh_workload *w,
                               uint64_t *bad) {
    FILE *f = fopen(path, "re");
    if (!f) SH_FAIL(SH_EINPUT, "%s: cannot be opened: %s", path, strerror(errno));
    sh_status st = read_lines(f, in, lines / READ_MOST + 1, usual, w, bad);
    fclose(f);
    return st;
}

sh_status sh_workfile_read(const char *path, const char *model_dir, int default_max_tokens, sh_workload *out,
                           char *note, size_t note_size) {
    sh_status st = SH_OK;
    sh_workload w = {0};
    sh_input scanned;
    uint64_t bad = 0;
    int usual = default_max_tokens ? default_max_tokens : USUAL_OUTPUT;
    if (sh_input_is_stream(path)) SH_FAIL(SH_EINPUT, "--workload: %s: is a stream: give a file", path);
    if (is_histogram(path, out, &st)) {
        snprintf(note, note_size, "histogram %s", path);
        return st == SH_OK ? st : sh_error_prefix(st, "--workload");
    }
    SH_TRY(sh_input_scan(path, NULL, NULL, &scanned));
    sh_intake *in = NULL;
    const sh_intake_options io = {.default_max_tokens = usual};
    bool counted = sh_intake_create(model_dir, &io, &in) == SH_OK;
    st = read_requests(path, in, scanned.lines, usual, &w, &bad);
    sh_intake_destroy(&in);
    if (st != SH_OK) return sh_error_prefix(st, "--workload");
    if (w.n == 0) SH_FAIL(SH_EINPUT, "--workload: %s: has no request that could be read", path);
    w.requests = (double)scanned.lines * w.requests / (w.requests + (double)bad);
    SH_TRY(sh_workload_check(&w));
    int used = snprintf(note, note_size,
                        "requests of %s, prompts %s, outputs as long as max_tokens allows (%d where it is absent)",
                        path, counted ? "counted by the tokenizer" : "estimated: there is no tokenizer here", usual);
    if (scanned.lines > READ_MOST && used > 0 && (size_t)used < note_size)
        snprintf(note + used, note_size - (size_t)used, ", every %llu-th was read",
                 (unsigned long long)(scanned.lines / READ_MOST + 1));
    *out = w;
    return SH_OK;
}

/* --- of lines that pass --------------------------------------------------------------------------------------------
 */

struct sh_workguess {
    int usual, n;
    uint64_t every;                    /* line i · every is at i; twice that when there is no more room */
    sh_workload_bin at[2 * READ_MOST]; /* requests 0: no length could be told */
};

sh_status sh_workguess_create(int default_max_tokens, sh_workguess **out) {
    sh_workguess *g = malloc(sizeof *g);
    if (!g) SH_FAIL(SH_EMEMORY, "no memory for the lengths of %d requests", 2 * READ_MOST);
    g->usual = default_max_tokens ? default_max_tokens : USUAL_OUTPUT;
    g->n = 0;
    g->every = 1;
    *out = g;
    return SH_OK;
}

void sh_workguess_destroy(sh_workguess **g) {
    free(*g);
    *g = NULL;
}

static bool wants(void *ctx, uint64_t number) {
    sh_workguess *g = ctx;
    if (number % g->every) return false;
    if (g->n < 2 * READ_MOST) return true;
    g->n = READ_MOST;
    g->every *= 2;
    for (int i = 1; i < g->n; i++) g->at[i] = g->at[2 * i];
    return number % g->every == 0;
}

static void take(void *ctx, const char *line, size_t len) {
    sh_workguess *g = ctx;
    sh_workload_bin *to = &g->at[g->n++];
    if (!estimate(line, len, g->usual, to)) *to = (sh_workload_bin){0};
}

sh_input_reader sh_workguess_reader(sh_workguess *g) {
    return (sh_input_reader){.ctx = g, .wants = wants, .take = take};
}

sh_status sh_workguess_end(const sh_workguess *g, uint64_t lines, sh_workload *out) {
    *out = (sh_workload){0};
    for (int i = 0; i < g->n; i++)
        if (g->at[i].requests > 0) add(out, &g->at[i]);
    if (out->n) out->requests = (double)lines;
    return out->n ? sh_workload_check(out) : SH_OK;
}
