/* GGUF files made here: good ones, whole and in parts; every truncation; a table of wrong ones with the message each
 * must give; random damage. Values of blocks, and what packing keeps of them. */
#include <CUnit/Basic.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/file.h"
#include "model/blocks.h"
#include "model/gguf.h"
#include "model/kernels/quant.h"
#include "tests/checkpoint.h"
#include "tests/scratch_folder.h"

/* --- files made field by field -------------------------------------------------------------------------------------
 */

typedef struct bytes {
    uint8_t p[8192];
    size_t n;
} bytes;

static void put(bytes *b, uint64_t v, int n) {
    for (int i = 0; i < n; i++) b->p[b->n++] = (uint8_t)(v >> 8 * i);
}

static void put_string(bytes *b, const char *s) {
    put(b, strlen(s), 8);
    memcpy(b->p + b->n, s, strlen(s));
    b->n += strlen(s);
}

static void put_u32(bytes *b, const char *key, uint32_t v) {
    put_string(b, key);
    put(b, 4, 4);
    put(b, v, 4);
}

static void put_tensor(bytes *b, const char *name, int rank, const int64_t *dims, uint32_t type, uint64_t offset) {
    put_string(b, name);
    put(b, (uint64_t)rank, 4);
    for (int i = 0; i < rank; i++) put(b, (uint64_t)dims[i], 8);
    put(b, type, 4);
    put(b, offset, 8);
}

/* What a file has; the defaults make a right one. */
typedef struct form {
    uint32_t magic, version, alignment, type;
    uint64_t tensors, keys, name_bytes, array, offset;
    const char *name, *key, *architecture;
    int64_t row;
    int rank, value_type, nested;
} form;

static const form right = {.magic = 0x46554747,
                           .version = 3,
                           .alignment = 64,
                           .type = 2,
                           .tensors = 4,
                           .keys = 6,
                           .array = 2,
                           .offset = 64,
                           .name = "blk.0.attn_q.weight",
                           .key = "general.name",
                           .architecture = "gemma4",
                           .row = 64,
                           .rank = 2,
                           .value_type = 8,
                           .nested = 1};

static void put_metadata(bytes *b, const form *f) {
    put_string(b, "general.architecture");
    put(b, 8, 4);
    put_string(b, f->architecture);
    put_string(b, f->key);
    put(b, (uint64_t)f->value_type, 4);
    put_string(b, "a name");
    put_u32(b, "general.alignment", f->alignment);
    put_string(b, "tokens");
    put(b, 9, 4);
    put(b, 8, 4);
    put(b, f->array, 8);
    put_string(b, "x");
    put_string(b, "");
    put_string(b, "numbers");
    put(b, 9, 4);
    for (int i = 0; i < f->nested; i++) {
        put(b, 9, 4);
        put(b, 1, 8);
    }
    put(b, 5, 4);
    put(b, 3, 8);
    for (int i = 0; i < 3; i++) put(b, 7, 4);
    put_string(b, "flag");
    put(b, 7, 4);
    put(b, 1, 1);
}

/* token_embd bf16 [2, 3] at 0; Q4_0 [2, 64] at 64: 72 bytes; Q8_0 [1, 32] at 192; rope_freqs F32 [4] at 256. */
static bytes make(const form *f) {
    bytes b = {0};
    put(&b, f->magic, 4);
    put(&b, f->version, 4);
    put(&b, f->tensors, 8);
    put(&b, f->keys, 8);
    put_metadata(&b, f);
    put_tensor(&b, "token_embd.weight", 2, (const int64_t[]){3, 2}, 30, 0);
    put_tensor(&b, f->name, f->rank, (const int64_t[]){f->row, 2, 1, 1, 1}, f->type, f->offset);
    if (f->name_bytes) /* a lie about the name's length */
        for (int i = 0; i < 8; i++)
            b.p[b.n - 8 - 4 - 8 * (size_t)f->rank - 4 - strlen(f->name) - 8 + (size_t)i] =
                (uint8_t)(f->name_bytes >> 8 * i);
    put_tensor(&b, "blk.12.ffn_down_exps.weight", 3, (const int64_t[]){32, 1, 1}, 8, 192);
    put_tensor(&b, "rope_freqs.weight", 1, (const int64_t[]){4}, 0, 256);
    while (b.n % 64) put(&b, 0, 1);
    for (int i = 0; i < 256 + 16; i++) put(&b, (uint64_t)(i * 37 + 1), 1);
    return b;
}

static sh_status open_bytes(const bytes *b, size_t n, sh_tensors **t) {
    ck_put(dir, "model.gguf", b->p, n);
    *t = NULL;
    return sh_tensors_open(dir, t);
}

static void test_good(void) {
    empty();
    bytes b = make(&right);
    sh_tensors *t = NULL;
    sh_status st = open_bytes(&b, b.n, &t);
    if (st != SH_OK) printf("\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    CU_ASSERT_EQUAL(sh_tensors_count(t), 3); /* rope_freqs is left out */
    const sh_tensor *e = sh_tensors_find(t, "model.language_model.embed_tokens.weight");
    const sh_tensor *q = sh_tensors_find(t, "model.language_model.layers.0.self_attn.q_proj.weight");
    const sh_tensor *d = sh_tensors_find(t, "model.language_model.layers.12.experts.down_proj");
    CU_ASSERT_TRUE_FATAL(e && q && d);
    CU_ASSERT_EQUAL(e->dtype, SH_BF16);
    CU_ASSERT_EQUAL(e->shape[0], 2);
    CU_ASSERT_EQUAL(e->shape[1], 3);
    CU_ASSERT_EQUAL(e->data[0], 1);
    CU_ASSERT_EQUAL(q->dtype, SH_Q4_0);
    CU_ASSERT_EQUAL(q->shape[1], 64);
    CU_ASSERT_EQUAL(q->bytes, 72);
    CU_ASSERT_EQUAL(q->data[0], (uint8_t)(64 * 37 + 1));
    CU_ASSERT_EQUAL(d->dtype, SH_Q8_0);
    CU_ASSERT_EQUAL(d->bytes, 34);
    CU_ASSERT_STRING_EQUAL(d->dtype_name, "Q8_0");
    CU_ASSERT_STRING_EQUAL(d->file, "model.gguf");
    uint64_t before = sh_tensors_fingerprint(t);
    sh_tensors_close(&t);
    b.p[b.n - 272 + 64 + 36] ^= 1; /* the middle of Q4_0's bytes */
    CU_ASSERT_EQUAL_FATAL(open_bytes(&b, b.n, &t), SH_OK);
    CU_ASSERT_NOT_EQUAL(sh_tensors_fingerprint(t), before);
    sh_tensors_close(&t);
}

static void test_truncated(void) {
    empty();
    bytes b = make(&right);
    for (size_t n = 0; n < b.n; n++) {
        sh_tensors *t = NULL;
        sh_status st = open_bytes(&b, n, &t);
        CU_ASSERT_EQUAL(st, SH_EFORMAT);
        CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "model.gguf: "));
        sh_tensors_close(&t);
    }
}

static void refused(form f, sh_status code, const char *want) {
    bytes b = make(&f);
    sh_tensors *t = NULL;
    CU_ASSERT_EQUAL(open_bytes(&b, b.n, &t), code);
    CU_ASSERT_PTR_NULL(t);
    const char *found = strstr(sh_error_text(), "/model.gguf: ");
    bool same = found && strcmp(found + 13, want) == 0;
    if (!same) printf("\nfound  %s\nwanted %s\n", sh_error_text(), want);
    CU_ASSERT_TRUE(same);
}

#define WITH(...)                                                                                                      \
    ({                                                                                                                 \
        form f_ = right;                                                                                               \
        __VA_ARGS__;                                                                                                   \
        f_;                                                                                                            \
    })

static void test_refused(void) {
    empty();
    refused(WITH(f_.magic = 0x46554748), SH_EFORMAT, "not a GGUF file: it does not begin with GGUF");
    refused(WITH(f_.version = 1), SH_EUNSUPPORTED, "GGUF version 1: allowed are 2 and 3, little-endian");
    refused(WITH(f_.version = 0x03000000), SH_EUNSUPPORTED,
            "GGUF version 50331648: allowed are 2 and 3, little-endian");
    refused(WITH(f_.tensors = UINT64_MAX), SH_EFORMAT, "18446744073709551615 tensors: at most 1048576");
    refused(WITH(f_.tensors = 1000), SH_EFORMAT, "1000 tensors, but the file has only 784 bytes: is it truncated?");
    refused(WITH(f_.keys = 1ull << 61), SH_EFORMAT, "2305843009213693952 metadata keys: at most 65536");
    refused(WITH(f_.keys = 5000), SH_EFORMAT, "5000 metadata keys, but the file has only 784 bytes: is it truncated?");
    refused(WITH(f_.alignment = 0), SH_EFORMAT,
            "metadata general.alignment: 0: allowed are multiples of 8 up to 1048576");
    refused(WITH(f_.alignment = 12), SH_EFORMAT,
            "metadata general.alignment: 12: allowed are multiples of 8 up to 1048576");
    refused(WITH(f_.architecture = "llama"), SH_EUNSUPPORTED,
            "metadata general.architecture: llama: allowed is gemma4");
    refused(WITH(f_.key = "general.alignment"), SH_EFORMAT,
            "metadata general.alignment: value type 8: an unsigned integer is wanted");
    refused(WITH(f_.key = "tokens"), SH_EFORMAT, "metadata tokens is there twice");
    refused(WITH(f_.key = "a b"), SH_EFORMAT, "metadata key at offset 70: empty, or not printable ASCII");
    refused(WITH(f_.value_type = 13), SH_EFORMAT, "metadata general.name: value type 13: allowed are 0 to 12");
    refused(WITH(f_.array = UINT64_MAX), SH_EFORMAT,
            "metadata tokens: an array of 18446744073709551615 values, but the file has only 613 bytes more: is it "
            "truncated?");
    refused(WITH(f_.nested = 5), SH_EFORMAT, "metadata numbers: arrays nested deeper than 4");
    refused(WITH(f_.name_bytes = UINT64_MAX), SH_EFORMAT,
            "tensor name at offset 317: 18446744073709551615 bytes: at most 64");
    refused(WITH(f_.name = ""), SH_EFORMAT, "tensor name at offset 317: empty, or not printable ASCII");
    refused(WITH(f_.name = "token_embd.weight"), SH_EFORMAT, "tensor token_embd.weight is there twice");
    refused(WITH(f_.type = 3), SH_EUNSUPPORTED,
            "blk.0.attn_q.weight: type 3 (Q4_1): allowed are F32, F16, BF16, Q8_0, Q6_K and Q4_0");
    refused(WITH(f_.type = 6), SH_EUNSUPPORTED,
            "blk.0.attn_q.weight: type 6 (Q5_0): allowed are F32, F16, BF16, Q8_0, Q6_K and Q4_0");
    refused(WITH(f_.type = 12), SH_EUNSUPPORTED,
            "blk.0.attn_q.weight: type 12 (Q4_K): allowed are F32, F16, BF16, Q8_0, Q6_K and Q4_0");
    refused(WITH(f_.type = 4000), SH_EUNSUPPORTED,
            "blk.0.attn_q.weight: type 4000 (?): allowed are F32, F16, BF16, Q8_0, Q6_K and Q4_0");
    refused(WITH(f_.type = 14), SH_EFORMAT, "blk.0.attn_q.weight: rows of 64 items: Q6_K takes multiples of 256");
    refused(WITH(f_.type = 14; f_.row = 256), SH_EFORMAT,
            "model.language_model.layers.0.self_attn.q_proj.weight: 420 bytes at offset 64 of 272 bytes of data: is "
            "the file truncated?");
    refused(WITH(f_.rank = 5), SH_EFORMAT, "blk.0.attn_q.weight: 5 dimensions: allowed are 1 to 4");
    refused(WITH(f_.row = 0), SH_EFORMAT, "blk.0.attn_q.weight: dimension 0: zero, or the product overflows");
    refused(WITH(f_.row = 1ll << 62), SH_EFORMAT,
            "blk.0.attn_q.weight: dimension 4611686018427387904: zero, or the product overflows");
    refused(WITH(f_.row = 48), SH_EFORMAT, "blk.0.attn_q.weight: rows of 48 items: Q4_0 takes multiples of 32");
    refused(WITH(f_.offset = 8), SH_EFORMAT,
            "blk.0.attn_q.weight: offset 8: allowed are multiples of the alignment 64");
    refused(WITH(f_.offset = 0), SH_EFORMAT,
            "model.language_model.layers.0.self_attn.q_proj.weight: overlaps "
            "model.language_model.embed_tokens.weight at offset 0");
    refused(
        WITH(f_.offset = 1ull << 63), SH_EFORMAT,
        "model.language_model.layers.0.self_attn.q_proj.weight: 72 bytes at offset 9223372036854775808 of 272 bytes "
        "of data: is the file truncated?");
}

static void test_damage(void) {
    empty();
    srand(7);
    for (int i = 0; i < 3000; i++) {
        bytes b = make(&right);
        sh_tensors *t = NULL;
        for (int k = rand() % 4; k >= 0; k--) b.p[(size_t)rand() % (b.n - 272)] = (uint8_t)rand();
        if (open_bytes(&b, b.n, &t) != SH_OK) continue;
        int sum = 0;
        for (int x = 0; x < sh_tensors_count(t); x++) { /* every byte that is promised is there */
            const sh_tensor *y = sh_tensors_at(t, x);
            for (uint64_t k = 0; k < y->bytes; k++) sum += y->data[k];
        }
        CU_ASSERT_TRUE(sum >= 0);
        sh_tensors_close(&t);
    }
}

/* --- folders -------------------------------------------------------------------------------------------------------
 */

static void put_part(const char *name, uint32_t count, uint32_t all, const char *tensor) {
    bytes b = {0};
    put(&b, 0x46554747, 4);
    put(&b, 3, 4);
    put(&b, 1, 8);
    put(&b, 2, 8);
    put_u32(&b, "split.count", count);
    put_u32(&b, "split.tensors.count", all);
    put_tensor(&b, tensor, 1, (const int64_t[]){2}, 0, 0);
    while (b.n % 32) put(&b, 0, 1);
    put(&b, 0, 8);
    ck_put(dir, name, b.p, b.n);
}

static void folder_says(sh_status code, const char *want) {
    sh_tensors *t = NULL;
    CU_ASSERT_EQUAL(sh_tensors_open(dir, &t), code);
    if (code != SH_OK && !strstr(sh_error_text(), want)) printf("\nfound  %s\nwanted %s\n", sh_error_text(), want);
    if (code != SH_OK) CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), want));
    if (t) CU_ASSERT_EQUAL(sh_tensors_files(t), 2);
    sh_tensors_close(&t);
}

static void test_parts(void) {
    empty();
    put_part("m-00002-of-00002.gguf", 2, 2, "blk.0.attn_norm.weight");
    folder_says(SH_EIO, "m-00001-of-00002.gguf: missing: part 1 of 2");
    put_part("m-00001-of-00002.gguf", 2, 2, "output_norm.weight");
    ck_put(dir, "mmproj-m.gguf", "", 0); /* another modality's: not looked at */
    folder_says(SH_OK, NULL);
    put_part("m-00001-of-00002.gguf", 2, 3, "output_norm.weight");
    put_part("m-00002-of-00002.gguf", 2, 3, "blk.0.attn_norm.weight");
    folder_says(SH_EFORMAT, "split.tensors.count 3, but the parts have 2");
    put_part("m-00001-of-00002.gguf", 3, 2, "output_norm.weight");
    folder_says(SH_EFORMAT, "m-00001-of-00002.gguf: split.count 3: its name says 2");
    put_part("m-00001-of-00002.gguf", 2, 2, "blk.0.attn_norm.weight");
    put_part("m-00002-of-00002.gguf", 2, 2, "blk.0.attn_norm.weight");
    folder_says(SH_EFORMAT, "/m-00001-of-00002.gguf too");
    put_part("n.gguf", 1, 1, "output_norm.weight");
    folder_says(SH_EINPUT, ": two models: m-0000");
    empty();
    put_part("n.gguf", 2, 2, "output_norm.weight");
    folder_says(SH_EFORMAT, "n.gguf: one of 2 parts: its name must end in -00001-of-00002.gguf");
}

static void test_names(void) {
    static const char *const pair[][2] = {
        {"output.weight", "lm_head.weight"},
        {"blk.7.layer_output_scale.weight", "model.language_model.layers.7.layer_scalar"},
        {"blk.x.attn_q.weight", "blk.x.attn_q.weight"},
        {"blk.1", "blk.1"},
        {"blk.3.attn_q.bias", "blk.3.attn_q.bias"}};
    for (size_t i = 0; i < sizeof pair / sizeof *pair; i++) {
        char to[200];
        sh_gguf_name(pair[i][0], to, sizeof to);
        CU_ASSERT_STRING_EQUAL(to, pair[i][1]);
    }
    CU_ASSERT_FALSE(sh_gguf_is_name("mmproj-model.gguf"));
    CU_ASSERT_FALSE(sh_gguf_is_name(".gguf"));
    CU_ASSERT_TRUE(sh_gguf_is_name("a.gguf"));
}

/* --- values --------------------------------------------------------------------------------------------------------
 */

enum { K = 160, ROWS = 3 };

static sh_tensor random_blocks(sh_dtype type, uint8_t *data) {
    sh_tensor t = {.dtype = type, .rank = 2, .shape = {ROWS, K}, .data = data};
    size_t each = type == SH_Q8_0 ? 34 : 18;
    t.bytes = each * ROWS * K / 32;
    for (size_t i = 0; i < t.bytes; i++) data[i] = (uint8_t)rand();
    for (size_t i = 0; i < t.bytes; i += each) data[i + 1] = (uint8_t)((data[i + 1] & 0x83) | (rand() % 16) << 2);
    return t;
}

static float value(const sh_tensor *t, int i) {
    uint16_t d;
    const uint8_t *p = t->data + (size_t)(i / 32) * (t->dtype == SH_Q8_0 ? 34 : 18);
    memcpy(&d, p, 2);
    int j = i % 32, q = t->dtype == SH_Q8_0 ? (int8_t)p[2 + j] : (j < 16 ? p[2 + j] & 15 : p[2 + j - 16] >> 4) - 8;
    return sh_half_to_float(d) * (float)q;
}

static void test_values(void) {
    uint8_t data[34 * ROWS * K / 32];
    static const sh_dtype type[] = {SH_Q8_0, SH_Q4_0};
    for (int i = 0; i < 400; i++) {
        sh_tensor t = random_blocks(type[i % 2], data);
        int from = rand() % (ROWS * K), n = rand() % (ROWS * K - from + 1), bad = 0;
        float out[ROWS * K];
        sh_blocks_floats(&t, from, n, out);
        for (int k = 0; k < n; k++) bad += out[k] != value(&t, from + k);
        CU_ASSERT_EQUAL(bad, 0);
    }
}

/* Row 5 of a panel from row 1 of the tensor. Returns the largest error in steps of its group. */
static float pack_error(const sh_kernels *kn, const sh_tensor *t, sh_wtype type) {
    uint32_t room[2 * 16 * 64 * 5 + 2 * 64 * 5];
    sh_wmat m = {.n = 32, .k = K, .type = type, .data = room};
    float got[K], worst = 0;
    CU_ASSERT_TRUE_FATAL(sh_wmat_bytes(type, 32, K) <= sizeof room);
    for (int r = 0; r < 32; r++) sh_blocks_pack_row(kn, r == 5 ? t : NULL, K, &m, (uint8_t *)room, r);
    sh_quant_row(&m, 4, got);
    for (int k = 0; k < K; k++) CU_ASSERT_EQUAL(got[k], 0);
    sh_quant_row(&m, 5, got);
    for (int k = 0; k < K; k++) {
        int group = sh_wtype_group(type), first = k / group * group;
        float big = 0;
        for (int j = first; j < first + group && j < K; j++) big = fmaxf(big, fabsf(value(t, K + j)));
        float error = fabsf(got[k] - value(t, K + k));
        if (error > 0) worst = fmaxf(worst, error / (big / (type == SH_W_Q8 ? 127 : 8)));
    }
    return worst;
}

/* Q6_K, by its definition in ggml: of 128 items in each half of a block, item l of run r (32 items each) has the low
 * bits of byte 64·half + 32·(r mod 2) + l, low half of it for r < 2, and bits 2r of byte 128 + 32·half + l. */
static float super_value(const uint8_t *data, int i) {
    const uint8_t *p = data + (size_t)(i / 256) * 210;
    int at = i % 256, half = at / 128, r = at % 128 / 32, l = at % 32;
    uint16_t d;
    memcpy(&d, p + 208, 2);
    int low = p[64 * half + 32 * (r & 1) + l], high = p[128 + 32 * half + l];
    int q = ((r >= 2 ? low >> 4 : low & 15) | ((high >> (2 * r)) & 3) << 4) - 32;
    return (float)((double)sh_half_to_float(d) * (double)(int8_t)p[192 + at / 16] * (double)q);
}

static void test_super_values(void) {
    enum { N = 3 * 256 };
    uint8_t data[N / 256 * 210];
    sh_tensor t = {.dtype = SH_Q6_K, .rank = 2, .shape = {1, N}, .data = data, .bytes = sizeof data};
    for (int i = 0; i < 300; i++) {
        for (size_t k = 0; k < sizeof data; k++) data[k] = (uint8_t)rand();
        for (size_t k = 209; k < sizeof data; k += 210) data[k] = (uint8_t)((data[k] & 0x83) | (rand() % 16) << 2);
        int from = rand() % N, n = rand() % (N - from + 1), bad = 0;
        float out[N];
        sh_blocks_floats(&t, from, n, out);
        for (int k = 0; k < n; k++) bad += out[k] != super_value(data, from + k);
        CU_ASSERT_EQUAL(bad, 0);
        CU_ASSERT_EQUAL(sh_blocks_finite(&t, from, n), n);
        int block = rand() % 3; /* an infinite scale: all items of its block are none */
        data[210 * block + 209] |= 0x7c;
        int before = 256 * block - from;
        if (before < 0) before = from < 256 * (block + 1) ? 0 : n;
        CU_ASSERT_EQUAL(sh_blocks_finite(&t, from, n), before < n ? before : n);
    }
}

static void test_packing(void) {
    uint8_t data[34 * ROWS * K / 32];
    const sh_kernels *kn = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_kernels_get("ref", &kn), SH_OK);
    for (int i = 0; i < 200; i++) {
        sh_tensor t = random_blocks(SH_Q4_0, data);
        CU_ASSERT_EQUAL(pack_error(kn, &t, SH_W_Q4), 0); /* scales and codes move: nothing is lost */
        for (size_t k = 1; k < t.bytes; k += 18)
            data[k] = (uint8_t)((data[k] & 0x83) | 0x30); /* normal, not near overflow */
        CU_ASSERT_TRUE(pack_error(kn, &t, SH_W_Q8) <= 0.51f);
        t = random_blocks(SH_Q8_0, data);
        for (size_t k = 1; k < t.bytes; k += 34) data[k] = (uint8_t)((data[k] & 0x83) | 0x30);
        CU_ASSERT_TRUE(pack_error(kn, &t, SH_W_Q8) <= 0.51f);
        CU_ASSERT_TRUE(pack_error(kn, &t, SH_W_Q4) <= 1.01f);
    }
}

int main(void) {
    if (CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("gguf", begin, end);
    if (!s || !CU_add_test(s, "a good file", test_good) || !CU_add_test(s, "truncated everywhere", test_truncated) ||
        !CU_add_test(s, "refused", test_refused) || !CU_add_test(s, "random damage", test_damage) ||
        !CU_add_test(s, "parts and folders", test_parts) || !CU_add_test(s, "names", test_names) ||
        !CU_add_test(s, "values of blocks", test_values) || !CU_add_test(s, "values of Q6_K", test_super_values) ||
        !CU_add_test(s, "packing", test_packing))
        return 1;
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    int failed = (int)CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed != 0;
}
