/* What ranks find under the model's path: real folders are told apart, and what differs is named with rank and node. */
#include <CUnit/Basic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "common/file.h"
#include "model/packed.h"
#include "worker/sight.h"

#define MODEL(name) SH_TEST_DATA "/text/models/" name

static char folder[] = "/tmp/shoal-sight-XXXXXX";

static sh_sight take(const char *dir, const char *host) {
    sh_sight s = {0};
    CU_ASSERT_EQUAL(sh_sight_take(dir, &s), SH_OK);
    CU_ASSERT_TRUE(s.host[0] != 0);
    snprintf(s.host, sizeof s.host, "%s", host);
    return s;
}

static void refused(const sh_sight *all, int n, const char *text) {
    CU_ASSERT_EQUAL(sh_sight_compare("/m", all, n), SH_EFORMAT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), text);
}

static void real_folders(void) {
    char q4[100], q8[100], why[400];
    snprintf(q4, sizeof q4, "%s/q4", folder);
    snprintf(q8, sizeof q8, "%s/q8", folder);
    CU_ASSERT_EQUAL(sh_pack_write(MODEL("e2b-like"), q4, &(sh_pack_options){.mode = SH_MODE_Q4}, NULL), SH_OK);
    CU_ASSERT_EQUAL(sh_pack_write(MODEL("e2b-like"), q8, &(sh_pack_options){.mode = SH_MODE_Q8}, NULL), SH_OK);
    sh_sight a = take(MODEL("e2b-like"), "node0"), b = take(q4, "node1"), c = take(q8, "node2"),
             d = take(MODEL("31b-like"), "node3");
    CU_ASSERT_EQUAL(sh_sight_compare("/m", (const sh_sight[]){a, a, a}, 3), SH_OK);
    CU_ASSERT_EQUAL(sh_sight_compare("/m", (const sh_sight[]){b, b}, 2), SH_OK);
    CU_ASSERT_EQUAL(sh_sight_compare("/m", &a, 1), SH_OK);
    CU_ASSERT_TRUE(a.weights == b.weights && a.config == b.config && a.weights != d.weights);
    refused((const sh_sight[]){a, a, b, a}, 4,
            "/m: rank 2 (node1) finds a folder packed for q4 there, rank 0 (node0) finds a checkpoint: all ranks must "
            "find the same");
    refused((const sh_sight[]){b, a, a, c}, 4,
            "/m: rank 1 (node0) finds a checkpoint there, rank 0 (node1) finds a folder packed for q4: all ranks must "
            "find the same");
    refused((const sh_sight[]){b, c}, 2,
            "/m: rank 1 (node2) finds a folder packed for q8 there, rank 0 (node1) finds a folder packed for q4: all "
            "ranks must find the same");
    sh_sight other = b;
    CU_ASSERT_TRUE(a.index == 0 && b.index != 0 && b.index != c.index);
    other.index++;
    refused((const sh_sight[]){b, other}, 2,
            "/m/shoal-pack.json: rank 1 (node1) finds another one than rank 0 (node1): the folders have other weights, "
            "or were packed by other versions: all ranks must find the same");
    snprintf(why, sizeof why,
             "/m: rank 1 (node3) finds weights with fingerprint %016llx there, rank 0 (node0) with %016llx: all ranks "
             "must find the same",
             (unsigned long long)d.weights, (unsigned long long)a.weights);
    refused((const sh_sight[]){a, d}, 2, why);
}

static void other_configuration(void) {
    char to[200], from[200], *text = NULL;
    size_t len = 0;
    static const char *const files[] = {"config.json", "model.safetensors"};
    for (int i = 0; i < 2; i++) {
        snprintf(from, sizeof from, "%s/%s", MODEL("e2b-like"), files[i]);
        snprintf(to, sizeof to, "%s/%s", folder, files[i]);
        CU_ASSERT_EQUAL(sh_file_read(from, (size_t)1 << 30, &text, &len), SH_OK);
        text[len] = '\n';
        CU_ASSERT_EQUAL(sh_file_write(to, text, len + (i == 0)), SH_OK);
        free(text);
    }
    sh_sight a = take(MODEL("e2b-like"), "node0"), b = take(folder, "node1");
    CU_ASSERT_EQUAL(a.weights, b.weights);
    refused((const sh_sight[]){a, b}, 2,
            "/m/config.json: rank 1 (node1) finds another one than rank 0 (node0): all ranks must find the same");
}

int main(void) {
    if (!mkdtemp(folder)) return 1;
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("sight", NULL, NULL);
    CU_add_test(s, "real folders", real_folders);
    CU_add_test(s, "another configuration", other_configuration);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    SH_IGNORE(sh_path_remove(folder));
    return failed ? 1 : 0;
}
