/* The layer table of every fixture, both spellings, and a table of configurations that must be refused, with the
 * message. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/file.h"
#include "common/json.h"
#include "model/config.h"

static const char base[] =
    "{\"model_type\": \"gemma4_text\", \"vocab_size\": 100, \"hidden_size\": 32, \"intermediate_size\": 48, "
    "\"num_hidden_layers\": 6,"
    " \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 8, \"sliding_window\": 16, "
    "\"hidden_size_per_layer_input\": 0,"
    " \"vocab_size_per_layer_input\": 100, \"pad_token_id\": 0, \"bos_token_id\": 2, \"eos_token_id\": 1}";

/* base with some fields replaced: patch is a JSON object; a field "-name" removes one. */
static sh_status parse(const char *patch, sh_config *out) {
    json_t *c = json_loads(base, 0, NULL), *p = json_loads(patch, 0, NULL), *v;
    CU_ASSERT_PTR_NOT_NULL_FATAL(c);
    CU_ASSERT_PTR_NOT_NULL_FATAL(p);
    const char *k;
    json_object_foreach(p, k, v) {
        if (*k == '-')
            json_object_del(c, k + 1);
        else
            json_object_set(c, k, v);
    }
    char *text = json_dumps(c, 0);
    sh_status st = sh_config_parse("config.json", text, strlen(text), out);
    free(text);
    json_decref(c);
    json_decref(p);
    return st;
}

static sh_config good(const char *patch) {
    static sh_config c;
    sh_status st = parse(patch, &c);
    if (st != SH_OK) printf("\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    return c;
}

static void test_defaults(void) {
    sh_config c = good("{}");
    for (int i = 0; i < 6; i++) {
        const sh_layer *l = &c.layer[i];
        bool full = i == 5;
        CU_ASSERT_EQUAL(l->kind, full ? SH_KV_GLOBAL : SH_KV_SLIDING);
        CU_ASSERT_EQUAL(l->head_dim, full ? 512 : 8); /* global_head_dim is 512 when missing */
        CU_ASSERT_EQUAL(l->kv_heads, 2);
        CU_ASSERT_EQUAL(l->rotated_pairs, full ? 64 : 4);
        CU_ASSERT_EQUAL(l->theta, full ? 1e6 : 1e4);
        CU_ASSERT_EQUAL(l->window, full ? 0 : 16);
        CU_ASSERT_EQUAL(l->kv_from, i);
        CU_ASSERT_TRUE(l->has_kv && !l->k_eq_v && !l->moe);
        CU_ASSERT_EQUAL(l->ff, 48);
    }
    CU_ASSERT_TRUE(c.tied);
    CU_ASSERT_EQUAL(c.softcap, 0);
    CU_ASSERT_EQUAL(good("{\"final_logit_softcapping\": 0.0}").softcap, 0);
    CU_ASSERT_EQUAL(c.first_shared, 6);
    CU_ASSERT_EQUAL(c.image_id, -1);
    CU_ASSERT_STRING_EQUAL(c.variant, "custom");
    CU_ASSERT_EQUAL(good("{\"global_head_dim\": null}").layer[5].head_dim, 8);
    c = good("{\"hidden_size_per_layer_input\": null}");
    CU_ASSERT_EQUAL(c.ple, 0);
    c = good("{\"-hidden_size_per_layer_input\": 0}");
    CU_ASSERT_EQUAL(c.ple, 256);
}

static void test_spellings(void) {
    /* KV heads of the old spelling count only with K = V */
    sh_config c = good("{\"global_head_dim\": 16, \"num_global_key_value_heads\": 1}");
    CU_ASSERT_EQUAL(c.layer[5].kv_heads, 2);
    c = good("{\"global_head_dim\": 16, \"num_global_key_value_heads\": 1, \"attention_k_eq_v\": true}");
    CU_ASSERT_EQUAL(c.layer[5].kv_heads, 1);
    CU_ASSERT_TRUE(c.layer[5].k_eq_v && !c.layer[4].k_eq_v);
    CU_ASSERT_EQUAL(sh_layer_kv_values(&c.layer[5]), 16);
    CU_ASSERT_EQUAL(sh_layer_kv_values(&c.layer[4]), 32);
    /* an empty per_layer_config is not a missing one, and it shadows the old spelling */
    c = good("{\"per_layer_config\": {}, \"global_head_dim\": 16}");
    CU_ASSERT_EQUAL(c.layer[5].head_dim, 8);
    c = good("{\"per_layer_config\": {\"05\": {\"head_dim\": 32}, \"1\": {\"num_key_value_heads\": 4}}}");
    CU_ASSERT_EQUAL(c.layer[5].head_dim, 32);
    CU_ASSERT_EQUAL(c.layer[5].rotated_pairs, 4); /* a quarter of 16 pairs */
    CU_ASSERT_EQUAL(c.layer[1].kv_heads, 4);
    CU_ASSERT_EQUAL(c.layer[1].head_dim, 8);
    /* the last layer is full whatever the list says */
    c = good("{\"num_hidden_layers\": 2, \"layer_types\": [\"full_attention\", \"sliding_attention\"]}");
    CU_ASSERT_EQUAL(c.layer[0].kind, SH_KV_GLOBAL);
    CU_ASSERT_EQUAL(c.layer[1].kind, SH_KV_GLOBAL);
    /* a composite file: its own word on the head and on the end tokens */
    json_t *text = json_loads(base, 0, NULL), *root = json_object();
    json_object_set_new(root, "model_type", json_string("gemma4"));
    json_object_set_new(root, "text_config", text);
    json_object_set_new(root, "tie_word_embeddings", json_false());
    json_object_set_new(root, "eos_token_id", json_pack("[iii]", 1, 50, 6));
    json_object_set_new(root, "image_token_id", json_integer(99));
    json_object_set_new(root, "audio_token_id", json_integer(100)); /* beyond the vocabulary: never occurs */
    char *s = json_dumps(root, 0);
    CU_ASSERT_EQUAL_FATAL(sh_config_parse("x", s, strlen(s), &c), SH_OK);
    CU_ASSERT_FALSE(c.tied);
    CU_ASSERT_EQUAL(c.n_eos, 3);
    CU_ASSERT_EQUAL(c.eos_ids[1], 50);
    CU_ASSERT_EQUAL(c.image_id, 99);
    CU_ASSERT_EQUAL(c.audio_id, -1);
    free(s);
    json_decref(root);
}

static void test_sharing(void) {
    sh_config c =
        good("{\"num_hidden_layers\": 8, \"num_kv_shared_layers\": 4, \"use_double_wide_mlp\": true, "
             "\"global_head_dim\": 16,"
             " \"layer_types\": [\"full_attention\", \"sliding_attention\", \"sliding_attention\", \"full_attention\","
             " \"sliding_attention\", \"full_attention\", \"sliding_attention\", \"full_attention\"]}");
    static const int from[8] = {0, 1, 2, 3, 2, 3, 2, 3};
    for (int i = 0; i < 8; i++) {
        CU_ASSERT_EQUAL(c.layer[i].kv_from, from[i]);
        CU_ASSERT_EQUAL(c.layer[i].has_kv, i < 4);
        CU_ASSERT_EQUAL(c.layer[i].ff, i < 4 ? 48 : 96);
    }
    CU_ASSERT_EQUAL(c.first_shared, 4);
}

static void test_fixtures(void) {
    static const struct {
        const char *dir;
        int layers, hidden, experts, ple, first_shared, full, producer[2];
        bool vision;
    } row[] = {{"text/models/26b-a4b-like", 12, 96, 16, 0, 12, 2, {11, 10}, true},
               {"text/models/26b-a4b-sharded", 6, 96, 8, 0, 6, 1, {5, 4}, true},
               {"text/models/31b-like", 12, 96, 0, 0, 12, 2, {11, 10}, true},
               {"text/models/e2b-like", 15, 96, 0, 8, 5, 3, {4, 3}, false},
               {"text/models/e4b-like", 12, 128, 0, 16, 6, 2, {5, 4}, false}};
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        char dir[512];
        snprintf(dir, sizeof dir, "%s/%s", SH_TEST_DATA, row[i].dir);
        sh_config c;
        sh_generation g;
        CU_ASSERT_EQUAL_FATAL(sh_config_load(dir, &c), SH_OK);
        CU_ASSERT_EQUAL(c.n_layers, row[i].layers);
        CU_ASSERT_EQUAL(c.hidden, row[i].hidden);
        CU_ASSERT_EQUAL(c.experts, row[i].experts);
        CU_ASSERT_EQUAL(c.ple, row[i].ple);
        CU_ASSERT_EQUAL(c.first_shared, row[i].first_shared);
        CU_ASSERT_EQUAL(c.vision_bidirectional, row[i].vision);
        int full = 0;
        for (int y = 0; y < c.n_layers; y++) {
            full += c.layer[y].kind == SH_KV_GLOBAL;
            if (!c.layer[y].has_kv) CU_ASSERT_EQUAL(c.layer[y].kv_from, row[i].producer[c.layer[y].kind]);
        }
        CU_ASSERT_EQUAL(full, row[i].full);
        CU_ASSERT_EQUAL(c.layer[c.n_layers - 1].rotated_pairs, 4);
        CU_ASSERT_EQUAL(c.softcap, 30);
        CU_ASSERT_EQUAL_FATAL(sh_generation_load(dir, &c, &g), SH_OK);
        CU_ASSERT_TRUE(g.do_sample && g.temperature == 1 && g.top_k == 64 && fabs(g.top_p - 0.95) < 1e-12);
        CU_ASSERT_TRUE(g.n_stop >= 1 && g.n_suppress == 0);
    }
}

static void test_refused(void) {
    static const struct {
        sh_status code;
        const char *patch, *message;
    } row[] = {
        {SH_EUNSUPPORTED, "{\"model_type\": \"gemma3\"}",
         "model_type: \"gemma3\" is not known: allowed are gemma4 and gemma4_text"},
        {SH_EINPUT, "{\"-model_type\": 0}", "model_type: missing: allowed are gemma4 and gemma4_text"},
        {SH_EINPUT, "{\"model_type\": \"gemma4\"}", "text_config: missing: model_type gemma4 needs it"},
        {SH_EINPUT, "{\"text_config\": 3}", "text_config: an integer is not an object"},
        {SH_EUNSUPPORTED, "{\"text_config\": {\"model_type\": \"llama\"}}",
         "text_config.model_type: \"llama\" is not known: allowed are gemma4_text"},
        {SH_EUNSUPPORTED, "{\"architectures\": [\"LlamaForCausalLM\"]}",
         "architectures: \"LlamaForCausalLM\" is not known: allowed are Gemma4ForConditionalGeneration and "
         "Gemma4ForCausalLM"},
        {SH_EUNSUPPORTED, "{\"attention_bias\": true}", "attention_bias: true is not supported: allowed is false"},
        {SH_EUNSUPPORTED, "{\"hidden_activation\": \"silu\"}",
         "hidden_activation: \"silu\" is not supported: allowed is gelu_pytorch_tanh"},
        {SH_EUNSUPPORTED, "{\"use_bidirectional_attention\": \"all\"}",
         "use_bidirectional_attention: \"all\" is not supported: allowed are null and \"vision\""},
        {SH_EUNSUPPORTED, "{\"use_bidirectional_attention\": true}",
         "use_bidirectional_attention: a boolean is not supported: allowed are null and \"vision\""},
        {SH_EUNSUPPORTED, "{\"rope_scaling\": {}}",
         "rope_scaling: not supported: allowed is rope_parameters per layer type"},
        {SH_EUNSUPPORTED, "{\"quantization_config\": {\"bits\": 4}}",
         "quantization_config: quantised checkpoints are not supported: use the BF16 checkpoint"},
        {SH_EUNSUPPORTED,
         "{\"rope_parameters\": {\"sliding_attention\": {\"rope_type\": \"yarn\"}, \"full_attention\": {\"rope_type\": "
         "\"default\"}}}",
         "rope_parameters.sliding_attention: rope_type: \"yarn\" is not supported: allowed are default and "
         "proportional"},
        {SH_EINPUT, "{\"rope_parameters\": {\"sliding_attention\": {}}}",
         "rope_parameters.full_attention: missing: an object is needed"},
        {SH_EINPUT, "{\"rope_parameters\": {\"sliding_attention\": {\"rope_theta\": -1}, \"full_attention\": {}}}",
         "rope_parameters.sliding_attention: rope_theta: -1 is out of range: allowed are numbers from 1 to 1e+12"},
        {SH_EINPUT, "{\"hidden_size\": -5}", "hidden_size: -5 is out of range: allowed are integers from 1 to 1048576"},
        {SH_EINPUT, "{\"hidden_size\": 1.5}",
         "hidden_size: 1.5 is not an integer: allowed are integers from 1 to 1048576"},
        {SH_EINPUT, "{\"hidden_size\": \"32\"}",
         "hidden_size: \"32\" is not an integer: allowed are integers from 1 to 1048576"},
        {SH_EINPUT, "{\"num_hidden_layers\": 1000000}",
         "num_hidden_layers: 1000000 is out of range: allowed are integers from 1 to 512"},
        {SH_EINPUT, "{\"num_hidden_layers\": 0}",
         "num_hidden_layers: 0 is out of range: allowed are integers from 1 to 512"},
        {SH_EINPUT, "{\"vocab_size\": 9223372036854775807}",
         "vocab_size: 9223372036854775807 is out of range: allowed are integers from 1 to 16777216"},
        {SH_EINPUT, "{\"hidden_size_per_layer_input\": 8, \"vocab_size_per_layer_input\": 50}",
         "vocab_size_per_layer_input: 50 is less than vocab_size 100: each token needs a row"},
        {SH_EINPUT, "{\"num_key_value_heads\": 3}",
         "num_key_value_heads: 3 in layer 0 does not divide num_attention_heads 4"},
        {SH_EINPUT, "{\"head_dim\": 7}", "head_dim: 7 in layer 0 is odd: rotation needs pairs"},
        {SH_EINPUT, "{\"num_attention_heads\": 16384, \"num_key_value_heads\": 1, \"head_dim\": 256}",
         "num_attention_heads: 16384 × head_dim 256 in layer 0 is too large: allowed is a product of 1048576"},
        {SH_EINPUT, "{\"layer_types\": [\"full_attention\"]}", "layer_types: 1 entries: num_hidden_layers is 6"},
        {SH_EINPUT, "{\"num_hidden_layers\": 2, \"layer_types\": [\"linear_attention\", 5]}",
         "layer_types[0]: \"linear_attention\" is not known: allowed are sliding_attention and full_attention"},
        {SH_EINPUT, "{\"layer_types\": \"all\"}", "layer_types: a string is not an array"},
        {SH_EINPUT, "{\"per_layer_config\": {\"6\": {}}}",
         "per_layer_config: \"6\" is not a layer: allowed are 0 to 5"},
        {SH_EINPUT, "{\"per_layer_config\": {\"-1\": {}}}",
         "per_layer_config: \"-1\" is not a layer: allowed are 0 to 5"},
        {SH_EINPUT, "{\"per_layer_config\": {\"5\": {}, \"05\": {}}}", "per_layer_config: layer 5 appears twice"},
        {SH_EUNSUPPORTED, "{\"per_layer_config\": {\"5\": {\"window\": 3}}}",
         "per_layer_config.5.window: not known: allowed are head_dim and num_key_value_heads"},
        {SH_EINPUT, "{\"per_layer_config\": {\"5\": {\"head_dim\": 0}}}",
         "per_layer_config.5: head_dim: 0 is out of range: allowed are integers from 2 to 16384"},
        {SH_EINPUT, "{\"num_kv_shared_layers\": 6}",
         "num_kv_shared_layers: 6 is out of range: allowed are integers from 0 to 5"},
        {SH_EINPUT, "{\"num_kv_shared_layers\": 5}",
         "num_kv_shared_layers: 5 leaves no full_attention layer to give K/V to layer 5"},
        {SH_EINPUT, "{\"num_kv_shared_layers\": 3, \"per_layer_config\": {\"4\": {\"head_dim\": 16}}}",
         "num_kv_shared_layers: layer 4 (2 KV heads of 16) cannot read the K/V of layer 2 (2 of 8)"},
        {SH_EINPUT, "{\"enable_moe_block\": true}", "num_experts: missing: enable_moe_block needs it"},
        {SH_EINPUT, "{\"enable_moe_block\": true, \"num_experts\": 4, \"top_k_experts\": 5}",
         "top_k_experts: 5 is out of range: allowed are integers from 1 to 4"},
        {SH_EINPUT, "{\"enable_moe_block\": true, \"num_local_experts\": 4, \"num_experts_per_tok\": 2}",
         "moe_intermediate_size: missing: enable_moe_block needs it"},
        {SH_EINPUT, "{\"rms_norm_eps\": 0}", "rms_norm_eps: 0 is out of range: allowed are numbers from 1e-12 to 1"},
        {SH_EINPUT, "{\"final_logit_softcapping\": -30}",
         "final_logit_softcapping: -30 is out of range: allowed are numbers from 0 to 1e+06"},
        {SH_EINPUT, "{\"final_logit_softcapping\": 0.0001}",
         "final_logit_softcapping: 0.0001: allowed are null, 0, and 0.001 to 1e+06"},
        {SH_EINPUT, "{\"eos_token_id\": 100}", "eos_token_id: 100 is out of range: allowed are 0 to 99"},
        {SH_EINPUT, "{\"eos_token_id\": [1, \"x\"]}",
         "eos_token_id: a string is not an id: allowed are integers from 0 to 99, or a list of them"},
        {SH_EINPUT, "{\"vocab_size\": 2}", "bos_token_id: 2 is out of range: allowed are 0 to 1"},
        {SH_EINPUT, "{\"tie_word_embeddings\": 1}",
         "tie_word_embeddings: 1 is not a boolean: allowed are true and false"},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        sh_config c = {.hidden = 77};
        if (strstr(row[i].patch, "num_kv_shared_layers\": 3")) {
            /* needs a producer of the full type below the consumers */
            char patch[400];
            snprintf(patch, sizeof patch,
                     "{\"layer_types\": [\"full_attention\", \"sliding_attention\", \"sliding_attention\","
                     "\"sliding_attention\", \"sliding_attention\", \"full_attention\"], %s",
                     row[i].patch + 1);
            CU_ASSERT_EQUAL(parse(patch, &c), row[i].code);
        } else {
            CU_ASSERT_EQUAL(parse(row[i].patch, &c), row[i].code);
        }
        char want[400];
        snprintf(want, sizeof want, "config.json: %s", row[i].message);
        if (strcmp(sh_error_text(), want) != 0) printf("\nfound  %s\nwanted %s\n", sh_error_text(), want);
        CU_ASSERT_STRING_EQUAL(sh_error_text(), want);
        CU_ASSERT_EQUAL(c.hidden, 77); /* outputs are untouched on failure */
    }
}

static void test_files(void) {
    char dir[] = "/tmp/shoal-config-XXXXXX", path[64], want[200];
    CU_ASSERT_PTR_NOT_NULL_FATAL(mkdtemp(dir));
    sh_config c;
    CU_ASSERT_EQUAL(sh_config_load("/nonexistent/model", &c), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "/nonexistent/model: no such directory: a checkpoint directory is needed");
    CU_ASSERT_EQUAL(sh_config_load(dir, &c), SH_EINPUT);
    snprintf(want, sizeof want, "%s/config.json: missing: not a Hugging Face checkpoint directory", dir);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), want);
    snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *f = fopen(path, "w");
    fputs("{\"model_type\": ", f);
    fclose(f);
    CU_ASSERT_EQUAL(sh_config_load(dir, &c), SH_EFORMAT);
    snprintf(want, sizeof want, "%s/config.json: not valid JSON at line 1, column 15: ", dir);
    CU_ASSERT_EQUAL(strncmp(sh_error_text(), want, strlen(want)), 0);
    /* no generation_config.json: neutral sampling, and the end tokens of config.json */
    sh_generation g;
    c = good("{\"eos_token_id\": [7, 8]}");
    CU_ASSERT_EQUAL_FATAL(sh_generation_load(dir, &c, &g), SH_OK);
    CU_ASSERT_TRUE(g.temperature == 1 && g.top_p == 1 && g.top_k == 0 && g.do_sample && g.n_stop == 2 &&
                   g.stop_ids[1] == 8);
    snprintf(path, sizeof path, "%s/generation_config.json", dir);
    f = fopen(path, "w");
    fputs("{\"do_sample\": false, \"top_k\": 5, \"suppress_tokens\": [3, 4], \"eos_token_id\": 9}", f);
    fclose(f);
    CU_ASSERT_EQUAL_FATAL(sh_generation_load(dir, &c, &g), SH_OK);
    CU_ASSERT_TRUE(g.temperature == 0 && g.top_k == 5 && g.n_suppress == 2 && g.n_stop == 1 && g.stop_ids[0] == 9);
    f = fopen(path, "w");
    fputs("{\"top_p\": 1.5}", f);
    fclose(f);
    CU_ASSERT_EQUAL(sh_generation_load(dir, &c, &g), SH_EINPUT);
    snprintf(want, sizeof want, "%s: top_p: 1.5 is out of range: allowed are numbers from 0 to 1", path);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), want);
    CU_ASSERT_EQUAL(sh_path_remove(dir), SH_OK);
}

static void test_names(void) {
    sh_mode m;
    sh_kv_type t;
    CU_ASSERT_TRUE(sh_mode_parse("exact", &m) == SH_OK && m == SH_MODE_EXACT);
    CU_ASSERT_TRUE(sh_mode_parse("bf16", &m) == SH_OK && m == SH_MODE_BF16);
    CU_ASSERT_EQUAL(sh_mode_parse("q7", &m), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "mode: \"q7\" is not known: allowed are exact, bf16, q8 and q4");
    CU_ASSERT_TRUE(sh_kv_type_parse("f32", &t) == SH_OK && t == SH_KV_F32);
    CU_ASSERT_TRUE(sh_kv_type_parse("bf16", &t) == SH_OK && t == SH_KV_BF16);
    CU_ASSERT_TRUE(sh_kv_type_parse("q8", &t) == SH_OK && t == SH_KV_Q8);
    CU_ASSERT_EQUAL(sh_kv_type_parse("", &t), SH_EINPUT);
    CU_ASSERT_EQUAL(sh_kv_type_parse("q4", &t), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "kv: \"q4\" is not known: allowed are f32, bf16 and q8");
    CU_ASSERT_EQUAL(sh_kv_type_of_mode(SH_MODE_EXACT), SH_KV_F32);
    CU_ASSERT_EQUAL(sh_kv_type_of_mode(SH_MODE_Q8), SH_KV_BF16);
}

/* Random changes to a real config: whatever they do, an answer and a table within its bounds. */
static void test_mutations(void) {
    char *text = NULL;
    size_t len = 0;
    CU_ASSERT_EQUAL_FATAL(sh_file_read(SH_TEST_DATA "/text/models/26b-a4b-like/config.json", 1 << 20, &text, &len),
                          SH_OK);
    char *copy = malloc(len);
    uint64_t seed = 1;
    int accepted = 0;
    for (int i = 0; i < 4000; i++) {
        memcpy(copy, text, len);
        for (int k = 0; k < 1 + i % 3; k++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            static const char byte[] = "0123456789-\"{}[],:.e tf";
            copy[(seed >> 33) % len] = byte[(seed >> 20) % (sizeof byte - 1)];
        }
        sh_config c;
        if (sh_config_parse("x", copy, len, &c) != SH_OK) {
            CU_ASSERT_EQUAL_FATAL(strncmp(sh_error_text(), "x: ", 3), 0);
            continue;
        }
        accepted++;
        sh_param_count n = sh_config_count(&c);
        CU_ASSERT_TRUE_FATAL(n.total > 0 && c.n_layers >= 1 && c.n_layers <= SH_MAX_LAYERS);
        for (int y = 0; y < c.n_layers; y++) {
            const sh_layer *l = &c.layer[y];
            CU_ASSERT_TRUE_FATAL(l->kv_from >= 0 && l->kv_from <= y && l->heads % l->kv_heads == 0 &&
                                 2 * l->rotated_pairs <= l->head_dim);
        }
    }
    CU_ASSERT_TRUE(accepted > 100);
    free(copy);
    free(text);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("config", NULL, NULL);
    CU_add_test(s, "defaults", test_defaults);
    CU_add_test(s, "spellings", test_spellings);
    CU_add_test(s, "sharing", test_sharing);
    CU_add_test(s, "fixtures", test_fixtures);
    CU_add_test(s, "refused", test_refused);
    CU_add_test(s, "files", test_files);
    CU_add_test(s, "names", test_names);
    CU_add_test(s, "mutations", test_mutations);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed != 0;
}
