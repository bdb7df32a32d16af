/* shoal tokenize and shoal detokenize: lines of text ⇄ lines of token ids. */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cli/commands.h"
#include "cli/demo.h"
#include "cli/options.h"
#include "common/json.h"
#include "model/tokenizer.h"

static const char tokenize_usage[] =
    "Usage: shoal tokenize [OPTION]... [FILE]...\n"
    "Writes one line of token ids for each line of UTF-8 text in FILE ('-' or none: standard input).\n"
    "Special tokens written in the text, like <|turn>, are recognised. Nothing is added to it: chats are\n"
    "rendered by 'run', not here.\n\n"
    "  echo 'Hello there' | shoal tokenize -m MODEL\n"
    "  shoal tokenize -m MODEL prompts.txt | awk '{print NF}'     tokens in each line\n\n";

static const char detokenize_usage[] =
    "Usage: shoal detokenize [OPTION]... [FILE]...\n"
    "Writes the text of each line of token ids in FILE ('-' or none: standard input). Ids are separated by\n"
    "white space or commas. Text that holds newlines takes several lines; with --json it stays on one.\n\n"
    "  echo 'Hello there' | shoal tokenize -m MODEL | shoal detokenize -m MODEL\n\n";

typedef struct sh_lines {
    const char *command;
    const sh_tokenizer *tok;
    bool json, special;
    sh_ids ids;
    sh_buf text;
} sh_lines;

typedef sh_status line_fn(sh_lines *x, const char *line, size_t n);

static sh_status tokenize_line(sh_lines *x, const char *line, size_t n) {
    SH_CLEANUP(sh_json_release) json_t *j = NULL;
    if (x->json) {
        SH_TRY(sh_json_parse("JSON", line, n, &j));
        if (!json_is_string(j)) SH_FAIL(SH_EINPUT, "%s is not a string", sh_json_type_name(j));
        line = json_string_value(j);
        n = json_string_length(j);
    }
    SH_TRY(sh_tokenizer_encode(x->tok, line, n, x->special, &x->ids));
    const char *between = x->json ? "," : " ";
    if (x->json) putchar('[');
    for (size_t i = 0; i < x->ids.n; i++) printf("%s%d", i ? between : "", x->ids.id[i]);
    fputs(x->json ? "]\n" : "\n", stdout);
    return SH_OK;
}

/* Ids between white space, commas and, so that JSON is read too, brackets. */
static sh_status parse_ids(const char *line, size_t n, bool json, sh_ids *out) {
    static const char hint[] = "is not a token id: allowed are whole numbers with white space or commas between";
    for (size_t i = 0; i < n;) {
        char c = line[i];
        if (c == ' ' || c == '\t' || c == '\r' || c == ',' || (json && (c == '[' || c == ']'))) {
            i++;
            continue;
        }
        size_t end = i;
        int64_t id = 0;
        while (end < n && line[end] >= '0' && line[end] <= '9' && id < INT32_MAX) id = id * 10 + (line[end++] - '0');
        bool whole = end > i && (end == n || strchr(" \t\r,", line[end]) || (json && line[end] == ']'));
        if (!whole) {
            while (end < n && !strchr(" \t\r,", line[end])) end++;
            SH_FAIL(SH_EINPUT, "'%.*s' %s", (int)(end - i < 40 ? end - i : 40), line + i, hint);
        }
        if (id > INT32_MAX) SH_FAIL(SH_EINPUT, "'%lld' %s", (long long)id, hint);
        SH_TRY(sh_ids_add(out, (int32_t)id));
        i = end;
    }
    return SH_OK;
}

static sh_status detokenize_line(sh_lines *x, const char *line, size_t n) {
    SH_TRY(parse_ids(line, n, x->json, &x->ids));
    SH_TRY(sh_tokenizer_decode(x->tok, x->ids.id, x->ids.n, x->special, &x->text));
    const char *text = x->text.data ? (const char *)x->text.data : "";
    if (!x->json) {
        fwrite(text, 1, x->text.len, stdout);
        putchar('\n');
        return SH_OK;
    }
    SH_CLEANUP(sh_json_release) json_t *j = json_stringn(text, x->text.len);
    if (!j) SH_FAIL(SH_EFORMAT, "the tokens' text is not valid UTF-8");
    if (json_dumpf(j, stdout, JSON_ENCODE_ANY) != 0) SH_FAIL(SH_EIO, "standard output: cannot be written");
    putchar('\n');
    return SH_OK;
}

static int read_lines(sh_lines *x, const char *name, FILE *f, line_fn *handle) {
    char *line = NULL;
    size_t cap = 0, number = 0;
    int rc = SH_EXIT_OK;
    errno = 0;
    for (ssize_t n; rc == SH_EXIT_OK && (n = getline(&line, &cap, f)) >= 0;) {
        number++;
        if (n > 0 && line[n - 1] == '\n') n--;
        x->ids.n = 0;
        sh_buf_clear(&x->text);
        if (handle(x, line, (size_t)n) == SH_OK) continue;
        fprintf(stderr, "shoal %s: %s: line %zu: %s\n", x->command, name, number, sh_error_text());
        rc = SH_EXIT_USAGE;
    }
    if (rc == SH_EXIT_OK && ferror(f)) {
        fprintf(stderr, "shoal %s: %s: cannot be read: %s\n", x->command, name, strerror(errno));
        rc = SH_EXIT_USAGE;
    }
    free(line);
    return rc;
}

static int read_files(sh_lines *x, int n, char **files, line_fn *handle) {
    char *standard[] = {"-"};
    if (n == 0) {
        n = 1;
        files = standard;
    }
    for (int i = 0; i < n; i++) {
        bool in = strcmp(files[i], "-") == 0;
        FILE *f = in ? stdin : fopen(files[i], "r");
        if (!f) {
            fprintf(stderr, "shoal %s: %s: cannot be opened: %s\n", x->command, files[i], strerror(errno));
            return SH_EXIT_USAGE;
        }
        int rc = read_lines(x, in ? "standard input" : files[i], f, handle);
        if (!in) fclose(f);
        if (rc != SH_EXIT_OK) return rc;
    }
    return SH_EXIT_OK;
}

static int convert(sh_lines *x, const char *usage, sh_option special, int argc, char **argv, line_fn *handle) {
    const char *model = NULL;
    sh_option t[] = {
        {"model", 'm', SH_OPTION_TEXT, &model, "MODEL",
         "checkpoint folder with tokenizer.json, or a GGUF file (default: the demo model)"},
        {"json", 0, SH_OPTION_FLAG, &x->json, .help = "texts are JSON strings and ids JSON arrays, one each line"},
        special,
    };
    int files = 0, rc = sh_options_begin(x->command, usage, t, sizeof t / sizeof *t, argc, argv, &files);
    if (rc >= 0) return rc;
    if (!model && !(model = sh_demo_model())) return sh_options_complain(x->command, SH_EXIT_RUN);
    SH_CLEANUP(sh_tokenizer_destroy) sh_tokenizer *tok = NULL;
    char folder[PATH_MAX];
    if (sh_options_folder(model, folder, sizeof folder) != SH_OK || sh_tokenizer_load(folder, &tok) != SH_OK)
        return sh_options_complain(x->command, SH_EXIT_RUN);
    x->tok = tok;
    rc = read_files(x, files, argv + 1, handle);
    sh_ids_release(&x->ids);
    sh_buf_release(&x->text);
    return rc;
}

int sh_cmd_tokenize(int argc, char **argv) {
    sh_lines x = {.command = "tokenize"};
    sh_option special = {"add-special", 0, SH_OPTION_FLAG, &x.special,
                         .help = "add what the tokenizer's configuration adds to a prompt (<bos> for base models)"};
    return convert(&x, tokenize_usage, special, argc, argv, tokenize_line);
}

int sh_cmd_detokenize(int argc, char **argv) {
    sh_lines x = {.command = "detokenize"};
    sh_option special = {"skip-special", 0, SH_OPTION_FLAG, &x.special, .help = "leave special tokens out of the text"};
    return convert(&x, detokenize_usage, special, argc, argv, detokenize_line);
}
