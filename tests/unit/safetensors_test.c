/* Good files, a table of damaged ones with the message each must give, and random damage to real headers. */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/file.h"
#include "model/safetensors.h"
#include "tests/checkpoint.h"
#include "tests/scratch_folder.h"

#define ONE   "model.safetensors"
#define INDEX "model.safetensors.index.json"
/* Opening must fail; the message begins with the folder, then want. Where want ends in "…" only that beginning counts.
 */
static void refused(sh_status code, const char *want) {
    sh_tensors *t = NULL;
    char full[600];
    snprintf(full, sizeof full, "%s%s", dir, want);
    char *dots = strstr(full, "…");
    if (dots) *dots = 0;
    CU_ASSERT_EQUAL(sh_tensors_open(dir, &t), code);
    CU_ASSERT_PTR_NULL(t);
    bool same = dots ? strncmp(sh_error_text(), full, strlen(full)) == 0 : strcmp(sh_error_text(), full) == 0;
    if (!same) printf("\nfound  %s\nwanted %s\n", sh_error_text(), full);
    CU_ASSERT_TRUE(same);
}

static void test_good(void) {
    empty();
    ck_put_header(dir, ONE,
                  "{\"__metadata__\": {\"format\": \"pt\"}, \"b\": {\"dtype\": \"F32\", \"shape\": [2], "
                  "\"data_offsets\": [12, 20]},"
                  "\"a\": {\"dtype\": \"BF16\", \"shape\": [2, 3], \"data_offsets\": [0, 12]},"
                  "\"none\": {\"dtype\": \"I64\", \"shape\": [0, 5], \"data_offsets\": [12, 12]},"
                  "\"scalar\": {\"dtype\": \"F16\", \"shape\": [], \"data_offsets\": [20, 22]}}",
                  22, -1);
    sh_tensors *t = NULL;
    sh_status st = sh_tensors_open(dir, &t);
    if (st != SH_OK) printf("\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    CU_ASSERT_EQUAL(sh_tensors_count(t), 4);
    CU_ASSERT_EQUAL(sh_tensors_bytes(t), 22);
    static const char *const name[] = {"a", "b", "none", "scalar"};
    static const sh_dtype dtype[] = {SH_BF16, SH_F32, SH_OTHER, SH_F16};
    static const int rank[] = {2, 1, 2, 0};
    for (int i = 0; i < 4; i++) {
        const sh_tensor *x = sh_tensors_at(t, i);
        CU_ASSERT_STRING_EQUAL(x->name, name[i]);
        CU_ASSERT_STRING_EQUAL(x->file, ONE);
        CU_ASSERT_EQUAL(x->dtype, dtype[i]);
        CU_ASSERT_EQUAL(x->rank, rank[i]);
        CU_ASSERT_PTR_EQUAL(sh_tensors_find(t, name[i]), x);
    }
    CU_ASSERT_EQUAL(sh_tensors_find(t, "b")->data[0], (uint8_t)(12 * 37 + 1));
    CU_ASSERT_EQUAL(sh_tensors_find(t, "a")->shape[1], 3);
    CU_ASSERT_PTR_NULL(sh_tensors_find(t, "c"));
    CU_ASSERT_PTR_NULL(sh_tensors_find(t, ""));
    sh_tensors_close(&t);
    CU_ASSERT_PTR_NULL(t);
    sh_tensors_close(&t);
}

#define T(name, dtype, shape, offsets)                                                                                 \
    "\"" name "\": {\"dtype\": \"" dtype "\", \"shape\": " shape ", \"data_offsets\": " offsets "}"

static void test_damaged(void) {
    static const struct {
        const char *header;
        size_t data;
        int64_t length;
        const char *message;
    } row[] = {
        {"{}", 0, (int64_t)1 << 62,
         "/" ONE ": header length 4611686018427387904: at most 104857600: not a safetensors file?"},
        {"{}", 0, 3, "/" ONE ": header length 3, but the file has only 10 bytes: is it truncated?"},
        {"{]", 0, -1, "/" ONE ": header: not valid JSON at line 1, column 2: …"},
        {"[]", 0, -1, "/" ONE ": header: an array is not an object"},
        {"{" T("x", "BF16", "[2]", "[0, 4]") "} trailing", 4, -1,
         "/" ONE ": header: not valid JSON at line 1, column …"},
        {"{\"x\": 5}", 0, -1, "/" ONE ": x: an integer is not an object"},
        {"{" T("x", "BF17", "[2]", "[0, 4]") "}", 4, -1, "/" ONE ": x: dtype: \"BF17\" is not known"},
        {"{\"x\": {\"shape\": [2], \"data_offsets\": [0, 4]}}", 4, -1, "/" ONE ": x: dtype: missing or not a string"},
        {"{\"x\": {\"dtype\": \"BF16\", \"data_offsets\": [0, 4]}}", 4, -1,
         "/" ONE ": x: shape: missing or not an array"},
        {"{\"x\": {\"dtype\": \"BF16\", \"shape\": [2]}}", 4, -1,
         "/" ONE ": x: data_offsets: missing or not two numbers"},
        {"{" T("x", "BF16", "[1,1,1,1,1,1,1,1,2]", "[0, 4]") "}", 4, -1, "/" ONE ": x: shape: 9 dimensions: at most 8"},
        {"{" T("x", "BF16", "[-2]", "[0, 4]") "}", 4, -1, "/" ONE ": x: shape: dimension 0 is not a size"},
        {"{" T("x", "BF16", "[2, 1.5]", "[0, 4]") "}", 4, -1, "/" ONE ": x: shape: dimension 1 is not a size"},
        {"{" T("x", "BF16", "[4294967296, 4294967296]", "[0, 4]") "}", 4, -1,
         "/" ONE ": x: shape: the product overflows"},
        {"{" T("x", "BF16", "[4294967296, 536870912]", "[0, 4]") "}", 4, -1,
         "/" ONE ": x: shape: the size in bytes overflows"},
        {"{" T("x", "BF16", "[2]", "[0, -4]") "}", 4, -1, "/" ONE ": x: data_offsets: not two offsets"},
        {"{" T("x", "BF16", "[2]", "[4, 0]") "}", 4, -1, "/" ONE ": x: data_offsets: begin 4 is after end 0"},
        {"{" T("x", "BF16", "[3]", "[0, 4]") "}", 4, -1,
         "/" ONE ": x: data_offsets: 4 bytes, but its shape needs 6 of BF16"},
        {"{" T("x", "F4", "[3]", "[0, 1]") "}", 1, -1,
         "/" ONE ": x: data_offsets: 1 bytes, but its shape needs 2 of F4"},
        {"{" T("x", "BF16", "[4]", "[0, 8]") "}", 4, -1,
         "/" ONE ": x: data_offsets: end 8 lies beyond the file, which has 4 bytes of data: is it truncated?"},
        {"{" T("x", "BF16", "[2]", "[0, 4]") ", " T("y", "BF16", "[2]", "[2, 6]") "}", 6, -1,
         "/" ONE ": y: overlaps x at offset 2"},
        {"{" T("x", "BF16", "[2]", "[0, 4]") ", " T("y", "BF16", "[2]", "[0, 4]") "}", 4, -1,
         "/" ONE ": y: overlaps x at offset 0"},
        {"{" T("x", "BF16", "[2]", "[0, 4]") ", " T("y", "BF16", "[2]", "[6, 10]") "}", 10, -1,
         "/" ONE ": y: begins at offset 6, but the data before it ends at 4: holes are not allowed"},
        {"{" T("x", "BF16", "[2]", "[0, 4]") "}", 9, -1, "/" ONE ": 9 bytes of data, but its tensors end at 4"},
        {"{" T("x", "BF16", "[2]", "[0, 4]") ", " T("x", "BF16", "[2]", "[4, 8]") "}", 8, -1,
         "/" ONE ": header: not valid JSON at line 1, column 66: duplicate object key…"},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        empty();
        ck_put_header(dir, ONE, row[i].header, row[i].data, row[i].length);
        refused(SH_EFORMAT, row[i].message);
    }
    empty();
    ck_put(dir, ONE, "short", 5);
    refused(SH_EFORMAT, "/" ONE ": 5 bytes: not a safetensors file, which begins with an 8-byte length");
    ck_put(dir, ONE, "", 0);
    refused(SH_EFORMAT, "/" ONE ": 0 bytes: not a safetensors file, which begins with an 8-byte length");
    empty();
    refused(SH_EINPUT,
            ": no weights: neither model.safetensors nor model.safetensors.index.json nor a .gguf file is there");
    char path[200];
    snprintf(path, sizeof path, "%s/" ONE, dir);
    CU_ASSERT_EQUAL(sh_dir_make(path), SH_OK);
    refused(SH_EIO, "/" ONE ": not a regular file");
}

static void shards(const char *index) {
    empty();
    ck_put_header(dir, "s1", "{" T("x", "BF16", "[2]", "[0, 4]") "}", 4, -1);
    ck_put_header(dir, "s2", "{" T("y", "BF16", "[2]", "[0, 4]") "}", 4, -1);
    ck_put(dir, INDEX, index, strlen(index));
}

static void test_index(void) {
    sh_tensors *t = NULL;
    shards("{\"weight_map\": {\"x\": \"s1\", \"y\": \"s2\"}}");
    CU_ASSERT_EQUAL_FATAL(sh_tensors_open(dir, &t), SH_OK);
    CU_ASSERT_EQUAL(sh_tensors_files(t), 2);
    CU_ASSERT_STRING_EQUAL(sh_tensors_find(t, "y")->file, "s2");
    /* letting go of the files that nobody needs */
    sh_tensors_need(t, sh_tensors_find(t, "y"));
    sh_tensors_trim(t);
    CU_ASSERT_PTR_NULL(sh_tensors_find(t, "x")->data);
    CU_ASSERT_PTR_NOT_NULL_FATAL(sh_tensors_find(t, "y")->data);
    CU_ASSERT_EQUAL(sh_tensors_find(t, "y")->data[1], 38);
    sh_tensors_close(&t);
    static const struct {
        sh_status code;
        const char *index, *message;
    } row[] = {
        {SH_EFORMAT, "{\"weight_map\": {\"x\": \"s1\", \"y\": \"s2\", \"z\": \"s2\"}}",
         "/" INDEX ": z: not in s2, where the index puts it"},
        {SH_EFORMAT, "{\"weight_map\": {\"x\": \"s2\", \"y\": \"s1\"}}",
         "/" INDEX ": x: is in s1, but the index says s2"},
        {SH_EFORMAT, "{\"weight_map\": {\"x\": \"s1\", \"q\": \"s2\"}}",
         "/" INDEX ": q: not in s2, where the index puts it"},
        {SH_EFORMAT, "{\"weight_map\": {\"x\": \"../s1\"}}",
         "/" INDEX ": x: \"../s1\" is not a file name in the same directory"},
        {SH_EFORMAT, "{\"weight_map\": {\"x\": \"..\"}}",
         "/" INDEX ": x: \"..\" is not a file name in the same directory"},
        {SH_EFORMAT, "{\"weight_map\": {\"x\": 1}}", "/" INDEX ": x: an integer is not a file name"},
        {SH_EFORMAT, "{\"weight_map\": {}}", "/" INDEX ": weight_map: missing or empty"},
        {SH_EFORMAT, "[]", "/" INDEX ": weight_map: missing or empty"},
        {SH_EFORMAT, "{", "/" INDEX ": not valid JSON at line 1, column …"},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        shards(row[i].index);
        refused(row[i].code, row[i].message);
    }
    char want[300];
    shards("{\"weight_map\": {\"x\": \"s1\", \"y\": \"s3\"}}");
    snprintf(want, sizeof want, "/s3: missing: %s/" INDEX " names it for y", dir);
    refused(SH_EIO, want);
    shards("{\"weight_map\": {\"y\": \"s2\"}}");
    ck_put_header(dir, "s2", "{" T("y", "BF16", "[2]", "[0, 4]") ", " T("w", "BF16", "[2]", "[4, 8]") "}", 8, -1);
    refused(SH_EFORMAT, "/" INDEX ": w: is in s2, but not in the index");
    shards("{\"weight_map\": {\"x\": \"s1\", \"y\": \"s2\"}}");
    ck_put_header(dir, "s2", "{" T("x", "BF16", "[2]", "[0, 4]") "}", 4, -1);
    snprintf(want, sizeof want, "/s2: x: is in %s/s1 too", dir);
    refused(SH_EFORMAT, want);
}

static void test_fingerprint(void) {
    const char *const header = "{" T("x", "BF16", "[2]", "[0, 4]") "}";
    uint64_t f[4];
    for (int i = 0; i < 4; i++) {
        sh_tensors *t = NULL;
        empty();
        ck_put_header(dir, ONE, i == 2 ? "{" T("x", "F32", "[1]", "[0, 4]") "}" : header, 4, -1);
        if (i == 3) {
            char path[200];
            snprintf(path, sizeof path, "%s/" ONE, dir);
            FILE *p = fopen(path, "r+b");
            fseek(p, -1, SEEK_END);
            fputc(99, p);
            fclose(p);
        }
        CU_ASSERT_EQUAL_FATAL(sh_tensors_open(dir, &t), SH_OK);
        f[i] = sh_tensors_fingerprint(t);
        sh_tensors_close(&t);
    }
    CU_ASSERT_EQUAL(f[0], f[1]);
    CU_ASSERT_NOT_EQUAL(f[0], f[2]);
    CU_ASSERT_NOT_EQUAL(f[0], f[3]);
}

/* Random damage to the header of a real file: an answer, and every tensor inside its file. */
static void test_mutations(void) {
    char *text = NULL;
    size_t len = 0;
    empty();
    CU_ASSERT_EQUAL_FATAL(sh_file_read(SH_TEST_DATA "/text/models/26b-a4b-sharded/model-00004-of-00004.safetensors",
                                       1 << 24, &text, &len),
                          SH_OK);
    size_t header = 8 + ((size_t)(uint8_t)text[0] | (size_t)(uint8_t)text[1] << 8);
    char *copy = malloc(len);
    uint64_t seed = 7;
    int accepted = 0;
    for (int i = 0; i < 3000; i++) {
        memcpy(copy, text, len);
        size_t n = len;
        for (int k = 0; k < 1 + i % 3; k++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            size_t at = (seed >> 33) % header;
            static const char byte[] = "0123456789\"{}[],:-e";
            copy[at] = i % 5 == 0 ? (char)(seed >> 24) : byte[(seed >> 20) % (sizeof byte - 1)];
        }
        if (i % 7 == 0) n = (seed >> 13) % len;
        ck_put(dir, ONE, copy, n);
        sh_tensors *t = NULL;
        if (sh_tensors_open(dir, &t) != SH_OK) {
            CU_ASSERT_EQUAL_FATAL(strncmp(sh_error_text(), dir, strlen(dir)), 0);
            continue;
        }
        accepted++;
        volatile uint8_t sink = 0;
        for (int x = 0; x < sh_tensors_count(t); x++) {
            const sh_tensor *p = sh_tensors_at(t, x);
            if (p->bytes) sink ^= p->data[0] ^ p->data[p->bytes - 1];
        }
        (void)sh_tensors_fingerprint(t);
        sh_tensors_close(&t);
    }
    CU_ASSERT_TRUE(accepted > 10);
    free(copy);
    free(text);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("safetensors", begin, end);
    CU_add_test(s, "good", test_good);
    CU_add_test(s, "damaged", test_damaged);
    CU_add_test(s, "index", test_index);
    CU_add_test(s, "fingerprint", test_fingerprint);
    CU_add_test(s, "mutations", test_mutations);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + (CU_get_number_of_suites_failed() != 0);
    CU_cleanup_registry();
    return failed != 0;
}
