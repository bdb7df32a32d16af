/* Tokenizer: what it refuses and how it says so, damaged files, any ids and any bytes, streaming against decoding at
 * once, and joining of long stretches against a plain reading of the definition. */
#include <CUnit/Basic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/file.h"
#include "common/hash.h"
#include "common/json.h"
#include "common/scan.h"
#include "common/utf8.h"
#include "model/bpe.h"
#include "model/tokenizer.h"

static const char sound[] =
    "{\"added_tokens\": [{\"id\": 8, \"content\": \"<s>\", \"special\": true, \"normalized\": false}],"
    " \"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"_\"},"
    " \"pre_tokenizer\": null,"
    " \"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"<s>\"}},"
    " {\"Sequence\": {\"id\": \"A\"}}], \"special_tokens\": {\"<s>\": {\"id\": \"<s>\", \"ids\": [8]}}},"
    " \"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", \"pattern\": {\"String\": \"_\"},"
    " \"content\": \" \"}, {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}]},"
    " \"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": \"u\", \"byte_fallback\": true, \"fuse_unk\": "
    "false,"
    " \"vocab\": {\"u\": 0, \"a\": 1, \"b\": 2, \"_\": 3, \"ab\": 4, \"ab_\": 5, \"<0xC3>\": 6, \"<0xA9>\": 7},"
    " \"merges\": [\"a b\", [\"ab\", \"_\"]]}}";

static char dir[512];

static void write_file(const char *name, const void *text, size_t n) {
    char path[600];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    CU_ASSERT_PTR_NOT_NULL_FATAL(f);
    CU_ASSERT_EQUAL(fwrite(text, 1, n, f), n);
    fclose(f);
}

static sh_status load_text(const char *text, size_t n, sh_tokenizer **out) {
    write_file("tokenizer.json", text, n);
    return sh_tokenizer_load(dir, out);
}

/* `sound` with its first `from` replaced. */
static sh_status load_changed(const char *from, const char *to, sh_tokenizer **out) {
    const char *at = strstr(sound, from);
    CU_ASSERT_PTR_NOT_NULL_FATAL(at);
    sh_buf b = {0};
    sh_status st = sh_buf_printf(&b, "%.*s%s%s", (int)(at - sound), sound, to, at + strlen(from));
    if (st == SH_OK) st = load_text((const char *)b.data, b.len, out);
    sh_buf_release(&b);
    return st;
}

static void expect_ids(const sh_tokenizer *t, const char *text, bool special, const char *want) {
    sh_ids ids = {0};
    sh_buf got = {0};
    CU_ASSERT_EQUAL(sh_tokenizer_encode(t, text, strlen(text), special, &ids), SH_OK);
    for (size_t i = 0; i < ids.n; i++) CU_ASSERT_EQUAL(sh_buf_printf(&got, i ? " %d" : "%d", ids.id[i]), SH_OK);
    CU_ASSERT_STRING_EQUAL(got.data ? (char *)got.data : "", want);
    sh_ids_release(&ids);
    sh_buf_release(&got);
}

static void test_basics(void) {
    sh_tokenizer *t = NULL;
    CU_ASSERT_EQUAL_FATAL(load_text(sound, strlen(sound), &t), SH_OK);
    CU_ASSERT_EQUAL(sh_tokenizer_size(t), 9);
    CU_ASSERT_EQUAL(sh_tokenizer_id(t, "ab_"), 5);
    CU_ASSERT_EQUAL(sh_tokenizer_id(t, "none"), -1);
    CU_ASSERT_TRUE(sh_tokenizer_is_special(t, 8));
    CU_ASSERT_FALSE(sh_tokenizer_is_special(t, 1));
    CU_ASSERT_FALSE(sh_tokenizer_is_special(t, -1));
    CU_ASSERT_FALSE(sh_tokenizer_is_special(t, 9));
    CU_ASSERT_TRUE(sh_tokenizer_adds_bos(t));
    expect_ids(t, "", true, "8");
    expect_ids(t, "", false, "");
    expect_ids(t, "ab b<s>aé", true, "8 5 2 8 1 6 7");
    expect_ids(t, "xx", false, "0 0");
    sh_buf piece = {0};
    CU_ASSERT_EQUAL(sh_tokenizer_piece(t, 5, &piece), SH_OK);
    CU_ASSERT_EQUAL(sh_tokenizer_piece(t, 6, &piece), SH_OK);
    CU_ASSERT_STRING_EQUAL((char *)piece.data, "ab \xc3");
    CU_ASSERT_EQUAL(sh_tokenizer_piece(t, 9, &piece), SH_EINPUT);
    CU_ASSERT_EQUAL(piece.len, 4);
    sh_buf_release(&piece);
    sh_tokenizer_destroy(&t);
    sh_tokenizer_destroy(&t);
}

static void test_bad_text(void) {
    sh_tokenizer *t = NULL;
    CU_ASSERT_EQUAL_FATAL(load_text(sound, strlen(sound), &t), SH_OK);
    sh_ids ids = {0};
    CU_ASSERT_EQUAL(sh_ids_add(&ids, 3), SH_OK);
    CU_ASSERT_EQUAL(sh_tokenizer_encode(t, "ab\xc3(", 4, true, &ids), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "byte 2"));
    CU_ASSERT_EQUAL(ids.n, 1);
    sh_buf out = {0};
    int32_t bad[] = {1, 77};
    CU_ASSERT_EQUAL(sh_buf_add_str(&out, "x"), SH_OK);
    CU_ASSERT_EQUAL(sh_tokenizer_decode(t, bad, 2, false, &out), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "77"));
    CU_ASSERT_STRING_EQUAL((char *)out.data, "x");
    sh_ids_release(&ids);
    sh_buf_release(&out);
    sh_tokenizer_destroy(&t);
}

/* tokenizer_config.json has the last word on <bos> and <eos>. */
static void test_config(void) {
    static const struct {
        const char *config, *ids;
        bool bos;
    } cases[] = {
        {"{\"model_max_length\": 1000000000000000019884624838656, \"bos_token\": \"<s>\"}", "8 1", true},
        {"{\"bos_token\": {\"content\": \"<s>\"}, \"add_bos_token\": false}", "1", false},
        {"{\"bos_token\": \"<s>\", \"eos_token\": \"b\", \"add_eos_token\": true}", "8 1 2", true},
        {"{\"bos_token\": \"u\", \"add_bos_token\": true}", "0 8 1", true},
        {"{\"bos_token\": null}", "8 1", true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        sh_tokenizer *t = NULL;
        write_file("tokenizer_config.json", cases[i].config, strlen(cases[i].config));
        CU_ASSERT_EQUAL_FATAL(load_text(sound, strlen(sound), &t), SH_OK);
        expect_ids(t, "a", true, cases[i].ids);
        CU_ASSERT_EQUAL(sh_tokenizer_adds_bos(t), cases[i].bos);
        sh_tokenizer_destroy(&t);
    }
    sh_tokenizer *t = NULL;
    static const char *const bad[] = {"{\"bos_token\": \"none\"}", "{\"add_bos_token\": true}",
                                      "{\"add_bos_token\": 1}", "[]", "{"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_file("tokenizer_config.json", bad[i], strlen(bad[i]));
        CU_ASSERT_NOT_EQUAL(load_text(sound, strlen(sound), &t), SH_OK);
        CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "tokenizer_config.json"));
    }
    CU_ASSERT_PTR_NULL(t);
    char path[600];
    snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
    CU_ASSERT_EQUAL(unlink(path), 0);
}

static void test_refusals(void) {
    static const struct {
        const char *from, *to, *named;
    } cases[] = {
        {"\"BPE\"", "\"Unigram\"", "model.type"},
        {"\"dropout\": null", "\"dropout\": 0.1", "model.dropout"},
        {"\"dropout\": null", "\"end_of_word_suffix\": \"x\"", "model.end_of_word_suffix"},
        {"\"unk_token\": \"u\"", "\"unk_token\": \"zz\"", "model.unk_token"},
        {"\"byte_fallback\": true", "\"byte_fallback\": 3", "byte_fallback"},
        {"\"a\": 1", "\"a\": 2", "model.vocab"},
        {"\"b\": 2", "\"a\": 2", "model.vocab"},
        {"\"a\": 1", "\"a\": -1", "byte"},
        {"\"a\": 1", "\"a\": 99999999999", "limit"},
        {"\"a\": 1", "\"\\ud800\": 1", "surrogates"},
        {"\"a b\"", "\"ab\"", "model.merges[0]"},
        {"\"a b\"", "\"a  b\"", "model.merges[0]"},
        {"\"a b\"", "\"a x\"", "model.merges[0]"},
        {"\"a b\"", "\"b a\"", "model.merges[0]"},
        {"[\"ab\", \"_\"]", "[\"ab\", \"_\", \"a\"]", "model.merges[1]"},
        {"[\"ab\", \"_\"]", "7", "array"},
        {"\"Replace\"", "\"NFKC\"", "normalizer: 'NFKC'"},
        {"{\"String\": \" \"}", "{\"Regex\": \" +\"}", "normalizer.pattern"},
        {"\"pre_tokenizer\": null", "\"pre_tokenizer\": {\"type\": \"ByteLevel\"}", "pre_tokenizer: 'ByteLevel'"},
        {"\"TemplateProcessing\"", "\"RobertaProcessing\"", "post_processor: 'RobertaProcessing'"},
        {"\"ids\": [8]", "\"ids\": [88]", "post_processor.special_tokens"},
        {"{\"type\": \"Fuse\"}", "{\"type\": \"CTC\"}", "decoder.decoders[2]: 'CTC'"},
        {"{\"type\": \"Fuse\"}", "{\"type\": \"Strip\", \"content\": \" \", \"start\": 1}",
         "decoder.decoders[2]: 'Strip'"},
        {"\"decoder\"", "\"coder\"", "decoder"},
        {"\"id\": 8", "\"id\": 1", "added_tokens[0]"},
        {"\"content\": \"<s>\"", "\"content\": \"a\"", "added_tokens[0]"},
        {"\"special\": true", "\"special\": 1", "added_tokens[0]"},
        {"\"model\"", "\"midel\"", "model: missing"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        sh_tokenizer *t = NULL;
        CU_ASSERT_NOT_EQUAL(load_changed(cases[i].from, cases[i].to, &t), SH_OK);
        CU_ASSERT_PTR_NULL(t);
        bool said = strstr(sh_error_text(), cases[i].named) && strstr(sh_error_text(), "tokenizer.json");
        if (!said) fprintf(stderr, "%s: %s\n", cases[i].to, sh_error_text());
        CU_ASSERT_TRUE(said);
    }
}

static uint64_t rng_state = 1;
static uint32_t rnd(uint32_t n) {
    rng_state++;
    return (uint32_t)(sh_mix64(rng_state) >> 32) % n;
}

/* Cut anywhere, or with any byte changed, a file loads or is refused; nothing else happens. */
static void test_damage(void) {
    size_t n = strlen(sound), refused = 0;
    char copy[sizeof sound];
    sh_tokenizer *t = NULL;
    for (size_t cut = 0; cut < n; cut++) {
        CU_ASSERT_NOT_EQUAL(load_text(sound, cut, &t), SH_OK);
        CU_ASSERT_PTR_NULL(t);
    }
    for (size_t i = 0; i < 3000; i++) {
        memcpy(copy, sound, n);
        for (uint32_t k = rnd(3) + 1; k > 0; k--) copy[rnd((uint32_t)n)] = (char)rnd(256);
        if (load_text(copy, n, &t) != SH_OK) refused++;
        if (t) expect_ids(t, "", false, "");
        sh_tokenizer_destroy(&t);
    }
    CU_ASSERT_TRUE(refused > 1000);
}

/* Any ids: the stream equals decoding at once, and each of its pieces is whole code points. */
static void check_stream(const sh_tokenizer *t, const int32_t *ids, size_t n, bool skip) {
    sh_buf whole = {0}, stream = {0};
    sh_detok d;
    size_t checked = 0;
    sh_detok_init(&d, t, skip);
    for (size_t i = 0; i <= n; i++) {
        CU_ASSERT_EQUAL(i < n ? sh_detok_add(&d, ids[i], &stream) : sh_detok_flush(&d, &stream), SH_OK);
        CU_ASSERT_EQUAL(sh_utf8_valid(stream.data + checked, stream.len - checked), stream.len - checked);
        checked = stream.len;
    }
    CU_ASSERT_EQUAL(sh_tokenizer_decode(t, ids, n, skip, &whole), SH_OK);
    CU_ASSERT_EQUAL_FATAL(whole.len, stream.len);
    if (whole.len) CU_ASSERT_EQUAL(memcmp(whole.data, stream.data, whole.len), 0);
    sh_buf_release(&whole);
    sh_buf_release(&stream);
}

static void test_random_ids(void) {
    sh_tokenizer *t = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_tokenizer_load(SH_SOURCE_DIR "/share/minnow", &t), SH_OK);
    int first_byte = sh_tokenizer_id(t, "<0x00>"), size = sh_tokenizer_size(t);
    CU_ASSERT_TRUE_FATAL(first_byte > 0);
    int32_t ids[700];
    for (int round = 0; round < 400; round++) {
        size_t n = rnd(round % 20 == 0 ? 700 : 40);
        uint32_t bytes = rnd(101);
        for (size_t i = 0; i < n; i++)
            ids[i] = rnd(100) < bytes ? first_byte + (int32_t)rnd(256) : (int32_t)rnd((uint32_t)size);
        check_stream(t, ids, n, round % 2);
    }
    sh_tokenizer_destroy(&t);
}

/* A valid run of bytes longer than what is held comes out whole; if it ends badly, what was good already stays. */
static void test_long_runs(void) {
    sh_tokenizer *t = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_tokenizer_load(SH_SOURCE_DIR "/share/minnow", &t), SH_OK);
    int32_t zero = sh_tokenizer_id(t, "<0x00>"), ids[1000];
    static const uint8_t fish[4] = {0xf0, 0x9f, 0x90, 0x9f};
    for (int i = 0; i < 1000; i++) ids[i] = zero + fish[i % 4];
    sh_buf out = {0};
    CU_ASSERT_EQUAL(sh_tokenizer_decode(t, ids, 1000, false, &out), SH_OK);
    CU_ASSERT_EQUAL(out.len, 1000);
    CU_ASSERT_EQUAL(sh_utf8_valid(out.data, out.len), 1000);
    sh_buf_clear(&out);
    CU_ASSERT_EQUAL(sh_tokenizer_decode(t, ids, 999, false, &out), SH_OK);
    CU_ASSERT_EQUAL(sh_utf8_valid(out.data, out.len), out.len);
    CU_ASSERT_EQUAL(memcmp(out.data, fish, 4), 0);
    sh_buf_clear(&out);
    CU_ASSERT_EQUAL(sh_tokenizer_decode(t, ids, 7, false, &out), SH_OK);
    CU_ASSERT_EQUAL(out.len, 7 * 3); /* short: one U+FFFD per byte, valid parts included */
    for (size_t n = 0; n < 1000; n += 37) check_stream(t, ids, n, false);
    sh_buf_release(&out);
    sh_tokenizer_destroy(&t);
}

/* Random text of any code points comes back from its ids. */
static void test_round_trip(void) {
    sh_tokenizer *t = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_tokenizer_load(SH_SOURCE_DIR "/share/minnow", &t), SH_OK);
    for (int round = 0; round < 500; round++) {
        sh_buf text = {0}, back = {0};
        sh_ids ids = {0};
        for (uint32_t k = rnd(60); k > 0; k--) {
            uint8_t u[4];
            uint32_t cp = rnd(2) ? rnd(128) : rnd(0x110000);
            if ((cp >= 0xd800 && cp <= 0xdfff) || cp == 0x2581) cp = 'x'; /* ▁ comes back as a space */
            CU_ASSERT_EQUAL(sh_buf_add(&text, u, (size_t)sh_utf8_put(cp, u)), SH_OK);
        }
        const char *s = text.data ? (const char *)text.data : "";
        CU_ASSERT_EQUAL(sh_tokenizer_encode(t, s, text.len, false, &ids), SH_OK);
        CU_ASSERT_EQUAL(sh_tokenizer_decode(t, ids.id, ids.n, false, &back), SH_OK);
        CU_ASSERT_EQUAL_FATAL(back.len, text.len);
        if (text.len) CU_ASSERT_EQUAL(memcmp(back.data, text.data, text.len), 0);
        sh_ids_release(&ids);
        sh_buf_release(&text);
        sh_buf_release(&back);
    }
    sh_tokenizer_destroy(&t);
}

/* Byte-pair encoding by its definition: the pair of lowest rank, leftmost first, until there is none. */
enum { LETTERS = 4, MERGES = 120 };
typedef struct merge_list {
    int32_t left[MERGES], right[MERGES], id[MERGES];
    int n;
} merge_list;

static size_t join_plainly(const merge_list *m, int32_t *id, size_t n) {
    for (;;) {
        int best = m->n;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++)
            for (int k = 0; k < best; k++)
                if (m->left[k] == id[i] && m->right[k] == id[i + 1]) {
                    best = k;
                    at = i;
                }
        if (best == m->n) return n;
        id[at] = m->id[best];
        memmove(id + at + 1, id + at + 2, (n - at - 2) * sizeof *id);
        n--;
    }
}

static void make_merges(sh_vocab *v, merge_list *m) {
    sh_vocab_init(v);
    for (int i = 0; i < LETTERS; i++) CU_ASSERT_EQUAL(sh_vocab_add(v, i, &"abcd"[i], 1), SH_OK);
    for (m->n = 0; m->n < MERGES;) {
        int32_t l = (int32_t)rnd((uint32_t)v->size), r = (int32_t)rnd((uint32_t)v->size);
        size_t nl, nr;
        char joined[64];
        const char *a = sh_vocab_text(v, l, &nl), *b = sh_vocab_text(v, r, &nr);
        bool twice = false;
        for (int k = 0; k < m->n; k++) twice = twice || (m->left[k] == l && m->right[k] == r);
        if (twice || nl + nr > 40) continue;
        memcpy(joined, a, nl);
        memcpy(joined + nl, b, nr);
        int32_t id = sh_vocab_find(v, joined, nl + nr);
        if (id < 0) {
            id = v->size;
            CU_ASSERT_EQUAL(sh_vocab_add(v, id, joined, nl + nr), SH_OK);
        }
        m->left[m->n] = l;
        m->right[m->n] = r;
        m->id[m->n++] = id;
    }
}

static void check_joins(const sh_bpe *b, const sh_vocab *v, const merge_list *m) {
    char text[300];
    int32_t want[300];
    size_t n = rnd(2) ? rnd(300) : rnd(50), left;
    for (size_t i = 0; i < n; i++) {
        want[i] = (int32_t)rnd(LETTERS);
        text[i] = "abcd"[want[i]];
    }
    left = join_plainly(m, want, n);
    sh_ids ids = {0};
    CU_ASSERT_EQUAL(sh_bpe_encode(b, v, text, n, &ids), SH_OK);
    CU_ASSERT_EQUAL_FATAL(ids.n, left);
    if (left) CU_ASSERT_EQUAL(memcmp(ids.id, want, left * sizeof *want), 0);
    sh_ids_release(&ids);
}

static void test_joins(void) {
    for (int round = 0; round < 15; round++) {
        sh_vocab v;
        sh_bpe b;
        merge_list m;
        make_merges(&v, &m);
        CU_ASSERT_EQUAL_FATAL(sh_bpe_init(&b, &v, MERGES), SH_OK);
        for (int k = 0; k < m.n; k++)
            CU_ASSERT_EQUAL(sh_bpe_add_merge(&b, &v, (uint32_t)k, m.left[k], m.right[k]), SH_OK);
        CU_ASSERT_EQUAL(sh_bpe_add_merge(&b, &v, 999, 0, v.size - 1) == SH_OK,
                        false); /* "a" + the last: surely no token */
        for (int i = 0; i < 25; i++) check_joins(&b, &v, &m);
        sh_bpe_release(&b);
        sh_vocab_release(&v);
    }
}

/* A million equal letters are one stretch; a quadratic way would take hours. */
static void test_long_stretch(void) {
    sh_vocab v;
    sh_bpe b;
    sh_vocab_init(&v);
    for (int i = 0; i < 3; i++) CU_ASSERT_EQUAL(sh_vocab_add(&v, i, "aaaa", (size_t)1 << i), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_bpe_init(&b, &v, 2), SH_OK);
    for (int i = 0; i < 2; i++) CU_ASSERT_EQUAL(sh_bpe_add_merge(&b, &v, (uint32_t)i, i, i), SH_OK);
    size_t n = 1000003;
    char *text = malloc(n);
    memset(text, 'a', n);
    sh_ids ids = {0};
    double start = sh_now();
    CU_ASSERT_EQUAL(sh_bpe_encode(&b, &v, text, n, &ids), SH_OK);
    CU_ASSERT_TRUE(sh_now() - start < 60);
    CU_ASSERT_EQUAL_FATAL(ids.n, n / 4 + 2);
    CU_ASSERT_EQUAL(ids.id[0], 2);
    CU_ASSERT_EQUAL(ids.id[n / 4], 1);
    CU_ASSERT_EQUAL(ids.id[n / 4 + 1], 0);
    sh_ids_release(&ids);
    free(text);
    sh_bpe_release(&b);
    sh_vocab_release(&v);
}

static void test_scan(void) {
    static const char *const bad[] = {"",          "{",     "[1,]x", "\"a",      "\"\\q\"",  "\"\\u12\"",
                                      "{\"a\" 1}", "[1 2]", "[}",    "\"\x01\"", "\"\xff\"", ","};
    sh_span span;
    sh_scan s;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        sh_scan_init(&s, "text", bad[i], strlen(bad[i]));
        sh_status st = sh_scan_skip(&s, &span);
        if (st == SH_OK) st = sh_scan_end(&s);
        if (st == SH_OK) { /* brackets balance: a reader of the elements must see it */
            json_t *j = NULL;
            st = sh_json_parse("text", bad[i], strlen(bad[i]), &j);
            json_decref(j);
        }
        CU_ASSERT_NOT_EQUAL(st, SH_OK);
        sh_scan_release(&s);
    }
    static const char good[] = " \"a\\n\\\"\\u00e9\\ud83d\\ude00\\/\" ";
    sh_scan_init(&s, "text", good, strlen(good));
    CU_ASSERT_EQUAL(sh_scan_string(&s, &span), SH_OK);
    CU_ASSERT_TRUE(sh_span_is(span, "a\n\"é😀/"));
    CU_ASSERT_EQUAL(sh_scan_end(&s), SH_OK);
    sh_scan_release(&s);
    char deep[200];
    memset(deep, '[', sizeof deep);
    sh_scan_init(&s, "text", deep, sizeof deep);
    CU_ASSERT_EQUAL(sh_scan_skip(&s, &span), SH_EFORMAT);
    sh_scan_release(&s);
}

int main(void) {
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/shoal-tokenizer-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(dir) || CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("tokenizer", NULL, NULL);
    CU_add_test(s, "scanner", test_scan);
    CU_add_test(s, "basics", test_basics);
    CU_add_test(s, "bad text and ids", test_bad_text);
    CU_add_test(s, "tokenizer_config.json", test_config);
    CU_add_test(s, "refusals", test_refusals);
    CU_add_test(s, "damaged files", test_damage);
    CU_add_test(s, "random ids", test_random_ids);
    CU_add_test(s, "long runs of bytes", test_long_runs);
    CU_add_test(s, "round trip", test_round_trip);
    CU_add_test(s, "joins", test_joins);
    CU_add_test(s, "a long stretch", test_long_stretch);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned bad = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    SH_IGNORE(sh_path_remove(dir));
    return bad ? 1 : 0;
}
