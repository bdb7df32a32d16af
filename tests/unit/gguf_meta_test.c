/* GGUF files alone: what configuration and tokenizer become of their metadata; a table of wrong keys with the message
 * each must give; every truncation; random damage; which files count before metadata. */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/file.h"
#include "model/beside.h"
#include "model/chat.h"
#include "model/config.h"
#include "model/tokenizer.h"
#include "tests/gguf_maker.h"
#include "tests/scratch_folder.h"

/* --- files made key by key -----------------------------------------------------------------------------------------
 */

typedef enum kind { U32, F32, BOOL, STRING, INTS, BOOLS, STRINGS, GONE } kind;

/* Arrays as numbers or words with commas between. */
typedef struct entry {
    const char *key;
    kind kind;
    double number;
    const char *text;
} entry;

/* Four layers, of which the last two share K/V; heads of 16 and 8; eight tokens. */
static const entry right[] = {
    {"general.architecture", STRING, 0, "gemma4"},
    {"general.sampling.temp", F32, 0.7, NULL},
    {"general.sampling.top_p", F32, 0.95, NULL},
    {"general.sampling.top_k", U32, 64, NULL},
    {"gemma4.block_count", U32, 4, NULL},
    {"gemma4.context_length", U32, 512, NULL},
    {"gemma4.embedding_length", U32, 24, NULL},
    {"gemma4.embedding_length_per_layer_input", U32, 8, NULL},
    {"gemma4.feed_forward_length", INTS, 0, "32,32,64,64"},
    {"gemma4.attention.head_count", U32, 4, NULL},
    {"gemma4.attention.head_count_kv", INTS, 0, "2,1,2,1"},
    {"gemma4.attention.key_length", U32, 16, NULL},
    {"gemma4.attention.value_length", U32, 16, NULL},
    {"gemma4.attention.key_length_swa", U32, 8, NULL},
    {"gemma4.attention.value_length_swa", U32, 8, NULL},
    {"gemma4.rope.dimension_count", U32, 16, NULL},
    {"gemma4.rope.dimension_count_swa", U32, 8, NULL},
    {"gemma4.rope.freq_base", F32, 1e6, NULL},
    {"gemma4.rope.freq_base_swa", F32, 1e4, NULL},
    {"gemma4.attention.sliding_window", U32, 32, NULL},
    {"gemma4.attention.sliding_window_pattern", BOOLS, 0, "1,0,1,0"},
    {"gemma4.attention.shared_kv_layers", U32, 2, NULL},
    {"gemma4.attention.layer_norm_rms_epsilon", F32, 1e-6, NULL},
    {"gemma4.final_logit_softcapping", F32, 30, NULL},
    {"gemma4.expert_count", U32, 4, NULL},
    {"gemma4.expert_used_count", U32, 2, NULL},
    {"gemma4.expert_feed_forward_length", U32, 16, NULL},
    {"tokenizer.ggml.model", STRING, 0, "gemma4"},
    {"tokenizer.ggml.tokens", STRINGS, 0, "<unk>,<eos>,<bos>,a,b,ab,<turn|>,<own>"},
    {"tokenizer.ggml.token_type", INTS, 0, "2,3,3,1,1,1,3,4"},
    {"tokenizer.ggml.merges", STRINGS, 0, "a b"},
    {"tokenizer.ggml.bos_token_id", U32, 2, NULL},
    {"tokenizer.ggml.eos_token_id", U32, 1, NULL},
    {"tokenizer.ggml.unknown_token_id", U32, 0, NULL},
    {"tokenizer.ggml.padding_token_id", U32, 0, NULL},
    {"tokenizer.ggml.add_bos_token", BOOL, 1, NULL},
    {"tokenizer.ggml.add_space_prefix", BOOL, 0, NULL},
    {"tokenizer.chat_template", STRING, 0, "<|turn>"},
};

static void put_list(gm_file *f, const entry *e) {
    static const uint32_t type[] = {[INTS] = 5, [BOOLS] = 7, [STRINGS] = 8};
    uint64_t n = *e->text ? 1 : 0;
    for (const char *s = e->text; *s; s++) n += *s == ',';
    gm_array(f, e->key, type[e->kind], n);
    for (const char *s = e->text; n > 0; n--) {
        size_t len = strcspn(s, ",");
        if (e->kind == INTS) gm_num(&f->keys, (uint64_t)strtol(s, NULL, 10), 4);
        if (e->kind == BOOLS) gm_num(&f->keys, *s == '1', 1);
        if (e->kind == STRINGS) gm_text(&f->keys, s, len);
        s += len + 1;
    }
}

static void put_entry(gm_file *f, const entry *e) {
    if (e->kind == U32) gm_u32(f, e->key, (uint32_t)e->number);
    if (e->kind == F32) gm_f32(f, e->key, (float)e->number);
    if (e->kind == BOOL) gm_bool(f, e->key, e->number != 0);
    if (e->kind == STRING) gm_string(f, e->key, e->text);
    if (e->kind == INTS || e->kind == BOOLS || e->kind == STRINGS) put_list(f, e);
}

/* What of the tensors decides: rope_freqs with `rotated` of 8 pairs (−1: none), and attn_v in layer 0, in layer 1 too.
 */
typedef struct shape {
    int rotated, pairs;
    bool has_v;
    float huge;
} shape;

static const shape usual = {2, 8, true, 1e30f};

static gm_bytes make(const entry *change, const shape *s) {
    gm_file f = {0};
    bool seen = false;
    for (size_t i = 0; i < sizeof right / sizeof *right; i++) {
        bool same = change && strcmp(change->key, right[i].key) == 0;
        seen |= same;
        put_entry(&f, same ? change : &right[i]);
    }
    if (change && !seen) put_entry(&f, change);
    float freqs[64], v[4] = {0};
    for (int i = 0; i < s->pairs; i++) freqs[i] = i < s->rotated ? 1 : s->huge;
    if (s->rotated >= 0)
        gm_tensor(&f, "rope_freqs.weight", 1, (const int64_t[]){s->pairs}, 0, freqs, 4 * (size_t)s->pairs);
    gm_tensor(&f, "blk.0.attn_v.weight", 1, (const int64_t[]){4}, 0, v, sizeof v);
    if (s->has_v) gm_tensor(&f, "blk.1.attn_v.weight", 1, (const int64_t[]){4}, 0, v, sizeof v);
    gm_bytes b = gm_whole(&f);
    gm_release(&f);
    return b;
}

static void put(const entry *change, const shape *s) {
    gm_bytes b = make(change, s);
    ck_put(dir, "m.gguf", b.p, b.n);
    free(b.p);
}

/* --- right ones ----------------------------------------------------------------------------------------------------
 */

static void test_config(void) {
    empty();
    put(NULL, &usual);
    sh_config c;
    sh_generation g;
    sh_status st = sh_config_load(dir, &c);
    if (st != SH_OK) printf("\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    CU_ASSERT_TRUE(c.vocab == 8 && c.hidden == 24 && c.n_layers == 4 && c.ple == 8 && c.max_context == 512 && c.tied);
    CU_ASSERT_TRUE(c.experts == 4 && c.top_k == 2 && c.expert_ff == 16 && c.first_shared == 2);
    CU_ASSERT_TRUE(c.eps == 1e-6f && c.softcap == 30 && c.bos_id == 2 && c.pad_id == 0 && c.image_id == -1);
    CU_ASSERT_TRUE(c.n_eos == 2 && c.eos_ids[0] == 1 && c.eos_ids[1] == 6); /* <turn|>: there is a chat template */
    const sh_layer *a = &c.layer[0], *b = &c.layer[1], *d = &c.layer[3];
    CU_ASSERT_TRUE(a->kind == SH_KV_SLIDING && a->window == 32 && a->head_dim == 8 && a->kv_heads == 2);
    CU_ASSERT_TRUE(a->rotated_pairs == 4 && a->theta == 1e4 && !a->k_eq_v && a->ff == 32 && a->moe && a->heads == 4);
    CU_ASSERT_TRUE(b->kind == SH_KV_GLOBAL && b->head_dim == 16 && b->kv_heads == 1 && b->rotated_pairs == 2);
    CU_ASSERT_TRUE(b->theta == 1e6 && !b->k_eq_v && b->ff == 32 && b->rope_factor == 1);
    CU_ASSERT_TRUE(d->ff == 64 && !d->has_kv && d->kv_from == 1);
    CU_ASSERT_EQUAL_FATAL(sh_generation_load(dir, &c, &g), SH_OK);
    CU_ASSERT_TRUE(g.temperature == 0.7 && g.top_p == 0.95 && g.top_k == 64 && g.do_sample && g.n_stop == 2);
    put(&(entry){"tokenizer.ggml.eos_token_id", U32, 6, NULL}, &usual); /* as in released files */
    CU_ASSERT_EQUAL_FATAL(sh_config_load(dir, &c), SH_OK);
    CU_ASSERT_TRUE(c.n_eos == 2 && c.eos_ids[0] == 6 && c.eos_ids[1] == 1);
    put(&(entry){"tokenizer.chat_template", GONE, 0, NULL}, &usual);
    CU_ASSERT_EQUAL_FATAL(sh_config_load(dir, &c), SH_OK);
    CU_ASSERT_TRUE(c.n_eos == 1 && c.eos_ids[0] == 1);
    put(NULL, &(shape){2, 8, false, 1e30f});
    CU_ASSERT_EQUAL_FATAL(sh_config_load(dir, &c), SH_OK);
    CU_ASSERT_TRUE(c.layer[1].k_eq_v && c.layer[3].k_eq_v && !c.layer[0].k_eq_v);
    for (int n = 0; n <= 25; n++) { /* a fraction comes back as the pairs it came from */
        const entry odd = {"gemma4.attention.key_length", U32, 50, NULL};
        gm_file f = {0};
        float freqs[25], v[4] = {0};
        for (size_t i = 0; i < sizeof right / sizeof *right; i++)
            if (strcmp(right[i].key, odd.key) != 0 && strcmp(right[i].key, "gemma4.attention.value_length") != 0 &&
                strcmp(right[i].key, "gemma4.rope.dimension_count") != 0)
                put_entry(&f, &right[i]);
        put_entry(&f, &odd);
        for (int i = 0; i < 25; i++) freqs[i] = i < n ? 1 : 1e30f;
        gm_tensor(&f, "rope_freqs.weight", 1, (const int64_t[]){25}, 0, freqs, sizeof freqs);
        gm_tensor(&f, "blk.1.attn_v.weight", 1, (const int64_t[]){4}, 0, v, sizeof v);
        gm_bytes whole = gm_whole(&f);
        ck_put(dir, "m.gguf", whole.p, whole.n);
        CU_ASSERT_EQUAL_FATAL(sh_config_load(dir, &c), SH_OK);
        CU_ASSERT_EQUAL(c.layer[1].rotated_pairs, n);
        free(whole.p);
        gm_release(&f);
    }
}

static void expect_ids(const sh_tokenizer *t, const char *text, const char *want) {
    sh_ids ids = {0};
    char got[200] = "";
    CU_ASSERT_EQUAL(sh_tokenizer_encode(t, text, strlen(text), true, &ids), SH_OK);
    for (size_t i = 0; i < ids.n; i++)
        snprintf(got + strlen(got), sizeof got - strlen(got), i ? " %d" : "%d", ids.id[i]);
    CU_ASSERT_STRING_EQUAL(got, want);
    sh_ids_release(&ids);
}

static void test_tokenizer(void) {
    empty();
    put(NULL, &usual);
    sh_tokenizer *t = NULL;
    sh_chat chat;
    sh_status st = sh_tokenizer_load(dir, &t);
    if (st != SH_OK) printf("\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    CU_ASSERT_EQUAL(sh_tokenizer_size(t), 8);
    CU_ASSERT_TRUE(sh_tokenizer_adds_bos(t));
    CU_ASSERT_TRUE(sh_tokenizer_is_special(t, 6) && sh_tokenizer_is_special(t, 0) && !sh_tokenizer_is_special(t, 7));
    expect_ids(t, "ab<turn|>ba<own>", "2 5 6 4 3 7");
    sh_tokenizer_destroy(&t);
    CU_ASSERT_EQUAL_FATAL(sh_chat_load(dir, &chat), SH_OK);
    CU_ASSERT_TRUE(chat.form == SH_CHAT_COMPACT && !chat.known && strcmp(chat.bos, "<bos>") == 0);
    put(&(entry){"tokenizer.ggml.token_type", INTS, 0, "3,1,3,1,1,1,4,1"}, &usual); /* types mislead */
    CU_ASSERT_EQUAL_FATAL(sh_tokenizer_load(dir, &t), SH_OK);
    CU_ASSERT_TRUE(sh_tokenizer_is_special(t, 1) && sh_tokenizer_is_special(t, 6) && !sh_tokenizer_is_special(t, 7));
    expect_ids(t, "<eos>ab<turn|>", "2 1 5 6");
    sh_tokenizer_destroy(&t);
    put(&(entry){"tokenizer.chat_template", GONE, 0, NULL}, &usual);
    CU_ASSERT_EQUAL_FATAL(sh_chat_load(dir, &chat), SH_OK);
    CU_ASSERT_EQUAL(chat.form, SH_CHAT_NONE);
    put(&(entry){"tokenizer.ggml.tokens", STRINGS, 0, "<unk>,<eos>,<bos>,\",\\,\"\\,<turn|>,\x01\n"}, &usual);
    CU_ASSERT_EQUAL(sh_tokenizer_load(dir, &t), SH_EFORMAT); /* "a b" is no merge any more */
    put(&(entry){"tokenizer.ggml.add_bos_token", GONE, 0, NULL}, &usual);
    CU_ASSERT_EQUAL_FATAL(sh_tokenizer_load(dir, &t), SH_OK);
    expect_ids(t, "ab", "5");
    sh_tokenizer_destroy(&t);
}

/* --- wrong ones ----------------------------------------------------------------------------------------------------
 */

static sh_status load_all(void) {
    sh_config c;
    sh_generation g;
    sh_tokenizer *t = NULL;
    sh_status st = sh_config_load(dir, &c);
    if (st == SH_OK) st = sh_generation_load(dir, &c, &g);
    if (st == SH_OK) st = sh_tokenizer_load(dir, &t);
    sh_tokenizer_destroy(&t);
    return st;
}

static void refused(entry e, shape s, const char *want) {
    put(&e, &s);
    CU_ASSERT_NOT_EQUAL(load_all(), SH_OK);
    bool same = strstr(sh_error_text(), want) != NULL;
    if (!same) printf("\nfound  %s\nwanted %s\n", sh_error_text(), want);
    CU_ASSERT_TRUE(same);
}

static void test_missing(void) {
    static const char *const keys[] = {"general.architecture",
                                       "gemma4.block_count",
                                       "gemma4.context_length",
                                       "gemma4.embedding_length",
                                       "gemma4.embedding_length_per_layer_input",
                                       "gemma4.feed_forward_length",
                                       "gemma4.attention.head_count",
                                       "gemma4.attention.head_count_kv",
                                       "gemma4.attention.key_length",
                                       "gemma4.attention.key_length_swa",
                                       "gemma4.rope.freq_base",
                                       "gemma4.rope.freq_base_swa",
                                       "gemma4.attention.sliding_window",
                                       "gemma4.attention.sliding_window_pattern",
                                       "gemma4.attention.layer_norm_rms_epsilon",
                                       "gemma4.expert_used_count",
                                       "gemma4.expert_feed_forward_length",
                                       "tokenizer.ggml.model",
                                       "tokenizer.ggml.token_type",
                                       "tokenizer.ggml.merges",
                                       "tokenizer.ggml.eos_token_id"};
    empty();
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        char want[200];
        snprintf(want, sizeof want, "/m.gguf: metadata %s: missing", keys[i]);
        refused((entry){keys[i], GONE, 0, NULL}, usual, want);
    }
    refused((entry){"tokenizer.ggml.tokens", GONE, 0, NULL}, usual, "/m.gguf: metadata gemma4.vocab_size: missing");
    refused((entry){"tokenizer.ggml.bos_token_id", GONE, 0, NULL}, usual,
            "metadata tokenizer.ggml.add_bos_token: true, but tokenizer.ggml.bos_token_id is missing");
}

static void test_wrong_config(void) {
    static const struct {
        entry e;
        const char *want;
    } wrong[] = {
        {{"general.architecture", STRING, 0, "gemma3"}, "metadata general.architecture: gemma3: allowed is gemma4"},
        {{"gemma4.block_count", U32, 513, NULL}, "block_count: 513 is out of range: allowed are 1 to 512"},
        {{"gemma4.block_count", U32, 0, NULL}, "block_count: 0 is out of range: allowed are 1 to 512"},
        {{"gemma4.block_count", STRING, 0, "4"}, "block_count: is string: allowed is an integer"},
        {{"gemma4.block_count", U32, 5, NULL},
         "attention.sliding_window_pattern: 4 values: allowed are 5, one for each of the layers"},
        {{"gemma4.block_count", U32, 3, NULL}, "sliding_window_pattern: 4 values: allowed are 3"},
        {{"gemma4.embedding_length", U32, 4e9, NULL}, "embedding_length: 4000000000 is out of range: allowed are 1 to"},
        {{"gemma4.attention.head_count_kv", INTS, 0, "2,1,-2,1"},
         "attention.head_count_kv: [2]: -2 is out of range: allowed are 1 to 16384"},
        {{"gemma4.attention.head_count_kv", INTS, 0, "2,1,2"}, "head_count_kv: 3 values: allowed are 4"},
        {{"gemma4.attention.head_count_kv", INTS, 0, "2,3,2,1"},
         "head_count_kv: 3 in layer 1 does not divide attention.head_count 4"},
        {{"gemma4.attention.head_count_kv", STRINGS, 0, "a"},
         "head_count_kv: is an array of string: allowed is an integer, or an array of them"},
        {{"gemma4.attention.head_count_kv", INTS, 0, "2,2,2,1"},
         "as config.json: num_kv_shared_layers: layer 3 (1 KV heads of 16) cannot read the K/V of layer 1 (2 of 16)"},
        {{"gemma4.attention.key_length", U32, 15, NULL}, "key_length: 15 is odd: rotation needs pairs"},
        {{"gemma4.attention.key_length", U32, 32, NULL},
         "value_length: 16, but gemma4.attention.key_length is 32: allowed is the same"},
        {{"gemma4.rope.dimension_count_swa", U32, 4, NULL},
         "rope.dimension_count_swa: 4, but gemma4.attention.key_length_swa is 8: allowed is the same"},
        {{"gemma4.rope.freq_base", F32, 0, NULL}, "rope.freq_base: 0 is out of range: allowed are 1 to 1e+12"},
        {{"gemma4.rope.freq_base", U32, 10000, NULL}, "rope.freq_base: is u32: allowed is f32 or f64"},
        {{"gemma4.rope.scaling.type", STRING, 0, "yarn"}, "rope.scaling.type: yarn: allowed is none"},
        {{"gemma4.rope.scaling.factor", F32, 8, NULL}, "rope.scaling.factor: 8: allowed is 1"},
        {{"gemma4.attention.causal", BOOL, 0, NULL}, "attention.causal: false: allowed is true"},
        {{"gemma4.attention.sliding_window_pattern", INTS, 0, "1,0,1,0"},
         "sliding_window_pattern: is an array of i32: allowed is an array of bool"},
        {{"gemma4.attention.shared_kv_layers", U32, 4, NULL},
         "shared_kv_layers: 4 is out of range: allowed are 0 to 3"},
        {{"gemma4.feed_forward_length", INTS, 0, "32,33,64,64"},
         "feed_forward_length: [1]: 33: allowed is 32: layers of one width, or those that share K/V of two"},
        {{"gemma4.feed_forward_length", INTS, 0, "32,32,48,48"}, "feed_forward_length: [2]: 48: allowed is 32"},
        {{"gemma4.final_logit_softcapping", F32, 1e-4, NULL}, "softcapping: 0.0001: allowed are 0, and 0.001 to 1e+06"},
        {{"gemma4.expert_used_count", U32, 5, NULL}, "expert_used_count: 5 is out of range: allowed are 1 to 4"},
        {{"gemma4.expert_feed_forward_length", INTS, 0, "16,16,8,16"},
         "expert_feed_forward_length: [2]: 8: allowed is 16 in all layers"},
        {{"gemma4.vocab_size", U32, 9, NULL},
         "gemma4.vocab_size: 9, but tokenizer.ggml.tokens has 8 values: allowed is the same"},
        {{"tokenizer.ggml.eos_token_id", U32, 8, NULL}, "eos_token_id: 8 is out of range: allowed are 0 to 7"},
        {{"general.sampling.top_p", F32, 2, NULL}, "metadata general.sampling.top_p: 2 is out of range"},
    };
    empty();
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) refused(wrong[i].e, usual, wrong[i].want);
    const entry none = {"none", GONE, 0, NULL};
    refused(none, (shape){-1, 8, true, 1e30f}, "m.gguf: missing tensor rope_freqs.weight");
    refused(none, (shape){2, 4, true, 1e30f},
            "rope_freqs.weight: F32 of 4 values: allowed is F32 of 8, half of gemma4.attention.key_length");
    refused(none, (shape){2, 8, true, 3}, "rope_freqs.weight: 3 of item 2: allowed are 1, and from some item on 1e30");
    refused((entry){"gemma4.attention.sliding_window_pattern", BOOLS, 0, "0,0,1,0"}, (shape){2, 8, false, 1e30f},
            "blk.1.attn_v.weight is missing, but blk.0.attn_v.weight is there: allowed is the same in all full layers");
}

static void test_wrong_tokenizer(void) {
    static const struct {
        entry e;
        const char *want;
    } wrong[] = {
        {{"tokenizer.ggml.model", STRING, 0, "gpt2"}, "metadata tokenizer.ggml.model: gpt2: allowed is gemma4"},
        {{"tokenizer.ggml.model", U32, 1, NULL}, "tokenizer.ggml.model: is u32: allowed is a string"},
        {{"tokenizer.ggml.pre", STRING, 0, "llama-bpe"}, "tokenizer.ggml.pre: llama-bpe: allowed is gemma4"},
        {{"tokenizer.ggml.add_space_prefix", BOOL, 1, NULL}, "add_space_prefix: true: allowed is false"},
        {{"tokenizer.ggml.normalizer.lowercase", BOOL, 1, NULL}, "normalizer.lowercase: true: allowed is false"},
        {{"tokenizer.ggml.precompiled_charsmap", INTS, 0, "1"}, "precompiled_charsmap: is there: allowed is none"},
        {{"tokenizer.ggml.tokens", STRINGS, 0, "<unk>,<eos>,<bos>,a,b,a,<turn|>,<own>"},
         "metadata tokenizer.ggml.tokens: [5]: "},
        {{"tokenizer.ggml.tokens", STRINGS, 0, "<unk>,<eos>,<bos>,a,b,\xc3,<turn|>,<own>"},
         "metadata tokenizer.ggml.tokens: [5]: not valid UTF-8"},
        {{"tokenizer.ggml.tokens", STRINGS, 0, "<unk>,<eos>,<bos>,a,b,ab,<turn|>"},
         "tokenizer.ggml.token_type: 8 values: allowed are 7, one for each of tokenizer.ggml.tokens"},
        {{"tokenizer.ggml.token_type", INTS, 0, "2,3,3,1,1,1,7,4"},
         "token_type: [6]: 7 is out of range: allowed are 1 to 6"},
        {{"tokenizer.ggml.token_type", STRINGS, 0, "2,3,3,1,1,1,3,4"}, "token_type: is an array of string"},
        {{"tokenizer.ggml.scores", INTS, 0, "1"}, "scores: 1 values: allowed are 8"},
        {{"tokenizer.ggml.merges", STRINGS, 0, ""}, "metadata tokenizer.ggml.merges: none: at least one is needed"},
        {{"tokenizer.ggml.merges", INTS, 0, "1"}, "merges: is an array of i32: allowed is an array of string"},
        {{"tokenizer.ggml.merges", STRINGS, 0, "a b,ab"}, "merges: [1]: 'ab' is not two tokens with one space between"},
        {{"tokenizer.ggml.merges", STRINGS, 0, "a b c"}, "merges: [0]: 'a b c' is not two tokens"},
        {{"tokenizer.ggml.merges", STRINGS, 0, "a x"}, "merges: [0]: 'x' is no token"},
        {{"tokenizer.ggml.merges", STRINGS, 0, "x a"}, "merges: [0]: 'x' is no token"},
        {{"tokenizer.ggml.merges", STRINGS, 0, "b a"}, "merges: [0]: 'b a' makes no token"},
        {{"tokenizer.ggml.unknown_token_id", U32, 8, NULL}, "unknown_token_id: 8 is out of range: allowed are 0 to 7"},
        {{"tokenizer.ggml.add_eos_token", U32, 1, NULL}, "add_eos_token: is u32: allowed is bool"},
        {{"tokenizer.chat_template", U32, 1, NULL}, "metadata tokenizer.chat_template: is u32: allowed is a string"},
    };
    empty();
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) refused(wrong[i].e, usual, wrong[i].want);
}

static void test_truncated(void) {
    empty();
    gm_bytes b = make(NULL, &usual);
    for (size_t n = 0; n < b.n; n++) {
        if (n > b.n - 64 && n % 32) continue; /* padding behind the last tensor */
        ck_put(dir, "m.gguf", b.p, n);
        sh_config c;
        sh_status st = sh_config_load(dir, &c);
        if (n < b.n - 32) CU_ASSERT_NOT_EQUAL(st, SH_OK);
        if (st != SH_OK) CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "m.gguf: "));
        sh_tokenizer *t = NULL;
        st = sh_tokenizer_load(dir, &t); /* needs the metadata alone */
        if (st != SH_OK) CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "m.gguf: "));
        sh_tokenizer_destroy(&t);
    }
    free(b.p);
}

static void test_damage(void) {
    empty();
    srand(11);
    int good = 0;
    for (int i = 0; i < 3000; i++) {
        gm_bytes b = make(NULL, &usual);
        for (int k = rand() % 3; k >= 0; k--) b.p[(size_t)rand() % b.n] = (uint8_t)rand();
        ck_put(dir, "m.gguf", b.p, b.n);
        good += load_all() == SH_OK;
        free(b.p);
    }
    CU_ASSERT_TRUE(good > 0 && good < 3000);
}

/* Lengths and counts that lie, in every key: first the length of the key, then what follows its type. */
static void test_lengths(void) {
    empty();
    gm_bytes b = make(NULL, &usual);
    static const uint64_t lies[] = {UINT64_MAX, 1ull << 63, 1ull << 40, 1ull << 32, 0xffffffff, 100000};
    for (size_t at = 8; at + 8 < b.n; at++)
        for (size_t k = 0; k < sizeof lies / sizeof *lies; k++) {
            uint8_t kept[8];
            memcpy(kept, b.p + at, 8);
            if (at % 7 && k) continue; /* a part of them is plenty */
            memcpy(b.p + at, &lies[k], 8);
            ck_put(dir, "m.gguf", b.p, b.n);
            SH_IGNORE(load_all());
            memcpy(b.p + at, kept, 8);
        }
    ck_put(dir, "m.gguf", b.p, b.n);
    CU_ASSERT_EQUAL(load_all(), SH_OK);
    free(b.p);
}

/* --- files beside --------------------------------------------------------------------------------------------------
 */

static void put_text(const char *name, const char *text) {
    ck_put(dir, name, text, strlen(text));
}

static void test_files_count(void) {
    empty();
    put(NULL, &usual);
    sh_config c;
    sh_generation g;
    sh_tokenizer *t = NULL;
    uint64_t alone = 0, h = 0;
    CU_ASSERT_EQUAL_FATAL(sh_settings_hash(dir, &alone), SH_OK);
    put_text("generation_config.json", "{\"temperature\": 0.5}");
    CU_ASSERT_EQUAL_FATAL(sh_config_load(dir, &c), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_generation_load(dir, &c, &g), SH_OK);
    CU_ASSERT_TRUE(g.temperature == 0.5 && g.top_k == 0 && g.n_stop == 2);
    CU_ASSERT_EQUAL_FATAL(sh_settings_hash(dir, &h), SH_OK);
    CU_ASSERT_NOT_EQUAL(h, alone);
    put_text("config.json", "{\"model_type\": \"gemma4_text\", \"hidden_size\": 40}");
    CU_ASSERT_FALSE(sh_beside_is_metadata(dir, "config.json"));
    CU_ASSERT_TRUE(sh_beside_is_metadata(dir, "tokenizer.json"));
    CU_ASSERT_EQUAL_FATAL(sh_config_load(dir, &c), SH_OK);
    CU_ASSERT_EQUAL(c.hidden, 40);
    put_text("tokenizer_config.json", "{\"bos_token\": \"<bos>\", \"add_bos_token\": false}");
    CU_ASSERT_EQUAL_FATAL(sh_tokenizer_load(dir, &t), SH_OK);
    expect_ids(t, "ab", "5");
    sh_tokenizer_destroy(&t);
    put_text("tokenizer.json", "{}");
    CU_ASSERT_FALSE(sh_beside_is_metadata(dir, "tokenizer.json"));
    CU_ASSERT_EQUAL(sh_tokenizer_load(dir, &t), SH_EFORMAT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "tokenizer.json: model: missing"));
    empty();
    put(NULL, &usual);
    CU_ASSERT_EQUAL_FATAL(sh_settings_hash(dir, &h), SH_OK);
    CU_ASSERT_EQUAL(h, alone);
    put_text("model.safetensors", ""); /* counts before GGUF: its metadata say nothing of these weights */
    CU_ASSERT_EQUAL(sh_config_load(dir, &c), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "config.json: missing"));
    empty();
    put(NULL, &usual);
    put_text("n.gguf", "");
    CU_ASSERT_EQUAL(sh_config_load(dir, &c), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "two models: m.gguf and n.gguf"));
}

int main(void) {
    if (CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("gguf metadata", begin, end);
    if (!s || !CU_add_test(s, "configuration", test_config) || !CU_add_test(s, "tokenizer", test_tokenizer) ||
        !CU_add_test(s, "missing keys", test_missing) || !CU_add_test(s, "wrong configuration", test_wrong_config) ||
        !CU_add_test(s, "wrong tokenizer", test_wrong_tokenizer) ||
        !CU_add_test(s, "truncated everywhere", test_truncated) || !CU_add_test(s, "random damage", test_damage) ||
        !CU_add_test(s, "lengths that lie", test_lengths) || !CU_add_test(s, "which files count", test_files_count))
        return 1;
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    int failed = (int)CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed != 0;
}
