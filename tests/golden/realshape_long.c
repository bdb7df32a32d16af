/*
 * realshape_long DIR…: the invariance of invariance_test.c on checkpoints with real layer shapes
 * (tests/bench/make_shape.c), where K-blocking, weight panels, thread splits and 512-wide heads come into play: batches
 * of 1, 2, 7, 16, 17 and 40 sequences, chunks of 1, 64 and 511 rows, 1 and 2 threads give the same bytes of hidden
 * states, KV and logits. Takes minutes; not part of ctest.
 */
#include "tests/golden/golden.h"

#include "common/clock.h"

#define N_SEQS  40
#define SHORT   24  /* prompt of the sequences that batch */
#define DECODED 4   /* tokens decoded after it */
#define LONG    541 /* rows of the sequence that is chunked: past a window of 512 */
#define CONTEXT 576
#define ROWS    1024

/* What one sequence gave: final hidden states, logits of every row, KV bytes of all producers. */
typedef struct result {
    float *hidden, *logits;
    uint8_t *kv;
    size_t kv_bytes;
} result;

static const char *where;
static int32_t *ids[N_SEQS + 1]; /* the last one is the long one */

static int length(int i) {
    return i == N_SEQS ? LONG : SHORT + DECODED;
}

static result result_open(const chain *ch, int n) {
    return (result){.hidden = must_alloc((size_t)n * (size_t)ch->c.hidden * 4),
                    .logits = must_alloc((size_t)n * (size_t)ch->c.vocab * 4)};
}

static void result_close(result *r) {
    free(r->hidden);
    free(r->logits);
    free(r->kv);
}

static void collect_kv(chain *ch, const seq *s, result *r) {
    const sh_kv_pool *kv = sh_model_kv(ch->stage[0]);
    for (int j = 0; j < ch->c.n_layers; j++)
        if (sh_kv_holds(kv, j)) r->kv_bytes += (size_t)s->n * sh_kv_row_bytes(&ch->c, ch->kv, j);
    r->kv = must_alloc(r->kv_bytes);
    size_t at = 0;
    for (int j = 0; j < ch->c.n_layers; j++) {
        if (!sh_kv_holds(kv, j)) continue;
        sh_span span = {.rows = s->n, .n_pages = {s->n_pages, s->n_pages}, .pages = {s->pages, s->pages}};
        sh_kv_export(kv, j, &span, 0, s->n, r->kv + at);
        at += (size_t)s->n * sh_kv_row_bytes(&ch->c, ch->kv, j);
    }
}

/* Runs n sequences together: chunks of `chunk` rows up to `prompt`, then row by row. */
static void run(chain *ch, int32_t **tokens, int n, int len, int chunk, int prompt, result *r) {
    seq s[N_SEQS];
    float *logits = must_alloc((size_t)ROWS * (size_t)ch->c.vocab * 4);
    size_t H = (size_t)ch->c.hidden, V = (size_t)ch->c.vocab;
    for (int i = 0; i < n; i++) {
        s[i] = seq_open(ch, tokens[i], len);
        r[i] = result_open(ch, len);
    }
    for (int done = 0, take; done < len; done += take) {
        int takes[N_SEQS];
        take = done >= prompt ? 1 : chunk < prompt - done ? chunk : prompt - done;
        for (int i = 0; i < n; i++) takes[i] = take;
        int kept = chain_step(ch, s, n, takes, takes);
        sh_model_logits(chain_last(ch), ch->hidden, kept, logits);
        for (int i = 0; i < n; i++) {
            memcpy(r[i].hidden + (size_t)done * H, ch->hidden + (size_t)(i * take) * H, (size_t)take * H * 4);
            memcpy(r[i].logits + (size_t)done * V, logits + (size_t)(i * take) * V, (size_t)take * V * 4);
        }
    }
    for (int i = 0; i < n; i++) {
        collect_kv(ch, &s[i], &r[i]);
        seq_close(&s[i]);
    }
    free(logits);
}

static void same(const chain *ch, const char *what, int number, int i, int len, const result *a, const result *b) {
    size_t H = (size_t)ch->c.hidden * 4, V = (size_t)ch->c.vocab * 4;
    for (size_t p = 0; p < (size_t)len; p++) {
        CHECK(memcmp((char *)a->hidden + p * H, (char *)b->hidden + p * H, H) == 0,
              "%s: %s %d: sequence %d: hidden state %zu differs", where, what, number, i, p);
        CHECK(memcmp((char *)a->logits + p * V, (char *)b->logits + p * V, V) == 0,
              "%s: %s %d: sequence %d: logits %zu differ", where, what, number, i, p);
    }
    CHECK(a->kv_bytes == b->kv_bytes && memcmp(a->kv, b->kv, a->kv_bytes) == 0, "%s: %s %d: sequence %d: KV differs",
          where, what, number, i);
}

static void check_batches(chain *ch, const result *base) {
    static const int sizes[] = {1, 2, 7, 16, 17, 40};
    for (size_t b = 0; b < sizeof sizes / sizeof sizes[0]; b++) {
        result r[N_SEQS];
        double start = sh_now();
        run(ch, ids, sizes[b], length(0), SHORT, SHORT, r);
        printf("%s: batch of %d: %.1f s\n", where, sizes[b], sh_now() - start);
        fflush(stdout);
        for (int i = 0; i < sizes[b]; i++) {
            same(ch, "batch", sizes[b], i, length(0), &r[i], &base[i]);
            result_close(&r[i]);
        }
    }
}

static void check_chunks(chain *ch, const result *base) {
    static const int chunks[] = {1, 64, 511};
    for (size_t c = 0; c < sizeof chunks / sizeof chunks[0]; c++) {
        result r;
        double start = sh_now();
        if (chunks[c] == 1) { /* a whole short sequence, and the end of the long one behind chunks of 64 */
            run(ch, ids, 1, length(0), 1, length(0), &r);
            same(ch, "chunk", 1, 0, length(0), &r, &base[0]);
            result_close(&r);
            run(ch, ids + N_SEQS, 1, LONG, 64, LONG - 20, &r);
        } else {
            run(ch, ids + N_SEQS, 1, LONG, chunks[c], LONG, &r);
        }
        printf("%s: chunks of %d: %.1f s\n", where, chunks[c], sh_now() - start);
        fflush(stdout);
        same(ch, "chunk", chunks[c], N_SEQS, LONG, &r, &base[N_SEQS]);
        result_close(&r);
    }
}

static void check_dir(const char *dir, sh_mode mode) {
    result base[N_SEQS + 1];
    where = dir;
    for (int threads = 1; threads <= 2; threads++) {
        chain ch = chain_open(&(chain_options){.dir = dir,
                                               .mode = mode,
                                               .kv = mode == SH_MODE_EXACT ? SH_KV_F32 : SH_KV_BF16,
                                               .threads = threads,
                                               .max_rows = ROWS,
                                               .max_context = CONTEXT,
                                               .max_seqs = N_SEQS});
        printf("%s: %s, %d threads\n", where, sh_mode_name(mode), threads);
        if (threads == 1) /* each sequence alone, as one prompt */
            for (int i = 0; i <= N_SEQS; i++) run(&ch, ids + i, 1, length(i), length(i), length(i), &base[i]);
        check_batches(&ch, base);
        check_chunks(&ch, base);
        chain_close(&ch);
    }
    for (int i = 0; i <= N_SEQS; i++) result_close(&base[i]);
}

int main(int argc, char **argv) {
    uint32_t state = 12345;
    for (int i = 0; i <= N_SEQS; i++) {
        ids[i] = must_alloc((size_t)length(i) * sizeof(int32_t));
        for (int t = 0; t < length(i); t++) {
            state = state * 1664525 + 1013904223;
            ids[i][t] = (int32_t)(state >> 17); /* below 32,768 */
        }
    }
    for (int i = 1; i < argc; i++) check_dir(argv[i], SH_MODE_BF16);
    for (int i = 0; i <= N_SEQS; i++) free(ids[i]);
    if (argc < 2) fprintf(stderr, "usage: realshape_long DIR…   (DIR by make_shape)\n");
    return argc < 2 ? 2 : finish("realshape");
}
