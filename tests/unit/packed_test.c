/*
 * Packed folders: every vector and matrix of every share is that of the checkpoint, bit for bit; towers come through;
 * indexes that lie (with a right checksum), files that shrink and disks that fill are refused by place.
 */
#include <CUnit/Basic.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/file.h"
#include "model/kernels/quant.h"
#include "model/packed_int.h"
#include "tests/checkpoint.h"

/* A sanitizer sees the first and the last member of each width. */
#ifdef __SANITIZE_ADDRESS__
enum { FEW = 1 };
#else
enum { FEW = 0 };
#endif

static char dir[] = "/tmp/shoal-packed-XXXXXX";
static char folder[64]; /* inside dir */
static sh_team *team;

static int begin(void) {
    if (!mkdtemp(dir)) return 1;
    snprintf(folder, sizeof folder, "%s/packed", dir);
    return sh_team_create(2, NULL, 0, &team) != SH_OK;
}

static int end(void) {
    sh_team_destroy(&team);
    return sh_path_remove(dir) != SH_OK;
}

static const char *fixture(const char *name) {
    static char path[512];
    snprintf(path, sizeof path, SH_TEST_DATA "/%s", name);
    return path;
}

static sh_status pack(const char *model, sh_mode mode) {
    return sh_pack_write(model, folder, &(sh_pack_options){.mode = mode, .force = true}, team);
}

/* --- the same weights ----------------------------------------------------------------------------------------------
 */

typedef struct list {
    sh_slot slot[4096];
    int n;
} list;

static sh_status note(void *ctx, const sh_slot *s) {
    list *l = ctx;
    CU_ASSERT_FATAL(l->n < 4096);
    l->slot[l->n++] = *s;
    return SH_OK;
}

/* Output i as it is multiplied with. */
static void read_output(const sh_wmat *w, int i, float *to) {
    if (w->type != SH_W_BF16) {
        sh_quant_row(w, i, to);
        return;
    }
    const uint16_t *panel = (const uint16_t *)(const void *)w->data + (size_t)(i / SH_PANEL) * (size_t)w->k * SH_PANEL;
    for (int kk = 0; kk < w->k; kk++) {
        uint32_t u = (uint32_t)panel[kk * SH_PANEL + i % 16 * 2 + i % SH_PANEL / 16] << 16;
        memcpy(&to[kk], &u, sizeof u);
    }
}

/* Outputs one by one: what pads a panel says nothing. */
static bool same_matrix(const sh_wmat *a, const sh_wmat *b) {
    if (a->n != b->n || a->k != b->k || a->type != b->type || !a->data != !b->data) return false;
    if (!a->data || a->n == 0) return true;
    if ((uintptr_t)a->data % 64 || (uintptr_t)b->data % 64) return false;
    float *x = malloc(2 * (size_t)a->k * sizeof *x), *y = x + a->k;
    bool same = true;
    for (int i = 0; i < a->n && same; i++) {
        read_output(a, i, x);
        read_output(b, i, y);
        same = memcmp(x, y, (size_t)a->k * sizeof *x) == 0;
    }
    free(x);
    return same;
}

static bool same_slot(const sh_slot *a, const sh_slot *b) {
    if (strcmp(a->name, b->name) != 0) return false;
    if (a->scalar) return *a->scalar == *b->scalar;
    if (a->vector) return memcmp(*a->vector, *b->vector, (size_t)a->k * sizeof(float)) == 0;
    for (int e = 0; e < a->count; e++)
        if (!same_matrix(&a->mat[e], &b->mat[e])) return false;
    return true;
}

static void compare(const sh_config *c, sh_weights *a, sh_weights *b, const char *what) {
    static list x, y;
    float row[2][8192];
    x.n = y.n = 0;
    CU_ASSERT_EQUAL_FATAL(sh_slots_each(a, note, &x), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_slots_each(b, note, &y), SH_OK);
    CU_ASSERT_TRUE_FATAL(x.n == y.n && x.n > 0);
    for (int i = 0; i < x.n; i++) {
        bool same = same_slot(&x.slot[i], &y.slot[i]);
        if (!same) printf("\n%s: %s differs\n", what, x.slot[i].name);
        CU_ASSERT_TRUE(same);
    }
    for (int id = 0; id < c->vocab && a->first == 0; id += c->vocab / 7) {
        sh_weights_embed(a, id, row[0]);
        sh_weights_embed(b, id, row[1]);
        CU_ASSERT_EQUAL(memcmp(row[0], row[1], (size_t)c->hidden * sizeof(float)), 0);
        if (!c->ple || id >= c->ple_vocab) continue;
        sh_weights_ple_row(a, a->first, id, row[0]);
        sh_weights_ple_row(b, a->first, id, row[1]);
        CU_ASSERT_EQUAL(memcmp(row[0], row[1], (size_t)c->ple * sizeof(float)), 0);
    }
}

static bool holds_some(const void *ctx, int layer, int expert) {
    (void)ctx;
    return (layer + expert) % 3 != 1;
}

static int refused_sums, compared_sums; /* of quantised matrices */

static void both(const char *model, const sh_config *c, const sh_weights_options *o) {
    sh_weights *a = NULL, *b = NULL;
    char what[600];
    snprintf(what, sizeof what, "%s %s, part %d of %d%s, layers %d to %d", model, sh_mode_name(o->mode), o->share.part,
             o->share.parts, o->share.sum ? " (sum)" : "", o->first, o->last);
    sh_status want = sh_weights_load(model, c, o, team, &a);
    sh_status got = sh_weights_load(folder, c, o, team, &b);
    if (o->share.sum && got == SH_EUNSUPPORTED) {
        CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "inputs share a scale"));
        CU_ASSERT_NOT_EQUAL(o->mode, SH_MODE_BF16);
        refused_sums++;
    } else {
        if (got != want) printf("\n%s: %s\n", what, sh_error_text());
        CU_ASSERT_EQUAL_FATAL(want, SH_OK);
        CU_ASSERT_EQUAL_FATAL(got, SH_OK);
        compare(c, a, b, what);
        compared_sums += o->share.sum && o->mode != SH_MODE_BF16;
    }
    sh_weights_destroy(&a);
    sh_weights_destroy(&b);
}

static void shares_of(const char *model, const sh_config *c, sh_mode mode) {
    int n = c->n_layers;
    both(model, c, &(sh_weights_options){.mode = mode, .last = n});
    both(model, c, &(sh_weights_options){.mode = mode, .last = n, .held = {.holds = holds_some}});
    if (n > 2) both(model, c, &(sh_weights_options){.mode = mode, .first = 1, .last = n - 1});
    for (int parts = 2; parts <= 8; parts += FEW && parts > 2 ? 5 : 1)
        for (int part = 0; part < parts && c->layer[0].heads % parts == 0; part++)
            for (int sum = 0; sum < 2 && !(FEW && part > 0 && part < parts - 1); sum++) {
                sh_share s = {.parts = parts, .part = part, .sum = sum};
                both(model, c, &(sh_weights_options){.mode = mode, .share = s, .last = n});
            }
    static sh_config prompts;
    prompts = *c;
    sh_config_prefill(&prompts);
    if (prompts.kv_end > 0 && prompts.kv_end <= n)
        both(model, &prompts, &(sh_weights_options){.mode = mode, .last = prompts.kv_end});
}

static void test_shares(void) {
    static const char *const models[] = {
        "text/models/e2b-like", "text/models/31b-like", "text/models/26b-a4b-like", "text/models/26b-a4b-sharded",
        "odd/odd-widths",       "odd/shared-values",    "odd/all-experts",          "odd/one-layer"};
    static sh_config c;
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) /* few: of two with the same layers one */
        for (int mode = FEW && (i == 1 || i == 2) ? SH_MODE_Q4 : SH_MODE_BF16; mode <= SH_MODE_Q4; mode++) {
            const char *model = fixture(models[i]);
            CU_ASSERT_EQUAL_FATAL(sh_config_load(model, &c), SH_OK);
            sh_status st = pack(model, (sh_mode)mode);
            if (st != SH_OK) printf("\n%s: %s\n", model, sh_error_text());
            CU_ASSERT_EQUAL_FATAL(st, SH_OK);
            shares_of(model, &c, (sh_mode)mode);
        }
    CU_ASSERT_TRUE(refused_sums > 0);
    CU_ASSERT_TRUE(compared_sums > 0);
}

static void test_modes(void) {
    static sh_config c;
    const char *model = fixture("text/models/e2b-like");
    sh_weights *w = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_config_load(model, &c), SH_OK);
    CU_ASSERT_EQUAL_FATAL(pack(model, SH_MODE_BF16), SH_OK);
    sh_weights_options o = {.mode = SH_MODE_EXACT, .last = c.n_layers};
    CU_ASSERT_EQUAL(sh_weights_load(folder, &c, &o, team, &w), SH_OK);
    sh_weights_destroy(&w);
    o.mode = SH_MODE_Q4;
    CU_ASSERT_EQUAL(sh_weights_load(folder, &c, &o, team, &w), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "--mode: q4, but "));
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "packed for bf16 or exact"));
}

/* --- indexes -------------------------------------------------------------------------------------------------------
 */

static void put_index(json_t *index, bool sign) {
    char path[128], text[20];
    uint64_t h;
    if (sign) {
        CU_ASSERT_EQUAL_FATAL(sh_packed_index_checksum(index, &h), SH_OK);
        snprintf(text, sizeof text, "%016llx", (unsigned long long)h);
        json_object_set_new(index, "checksum", json_string(text));
    }
    snprintf(path, sizeof path, "%s/" SH_PACKED_INDEX, folder);
    char *dump = json_dumps(index, 0);
    CU_ASSERT_EQUAL_FATAL(sh_file_write(path, dump, strlen(dump)), SH_OK);
    free(dump);
}

/* What is at "tensors/head/offset" becomes a value in JSON; "" removes it. */
static void change(json_t *index, const char *where, const char *value) {
    char path[128], *key = path;
    snprintf(path, sizeof path, "%s", where);
    json_t *at = index;
    for (char *slash; (slash = strchr(key, '/')); key = slash + 1) {
        *slash = 0;
        at = json_is_array(at) ? json_array_get(at, (size_t)atoi(key)) : json_object_get(at, key);
        CU_ASSERT_PTR_NOT_NULL_FATAL(at);
    }
    json_t *v = *value ? json_loads(value, JSON_DECODE_ANY, NULL) : NULL;
    if (!*value)
        json_object_del(at, key);
    else if (json_is_array(at))
        json_array_set_new(at, (size_t)atoi(key), v);
    else
        json_object_set_new(at, key, v);
}

typedef struct lie {
    const char *where, *value, *want; /* want: in the message, "" where the change must be accepted */
} lie;

static void test_lies(void) {
    static const lie lies[] = {
        {"note", "\"more\"", ""},
        {"version", "2", "version: 2"},
        {"version", "", "version: 0"},
        {"format", "7", "format"},
        {"type", "\"q5\"", "type: \"q5\""},
        {"source/fingerprint", "\"xyz\"", "source.fingerprint"},
        {"source", "", "source.fingerprint"},
        {"files", "{}", "files"},
        {"files", "", "files"},
        {"files/1", "3", "files[1]"},
        {"files/1/file", "\"../secret\"", "is not a file name"},
        {"files/1/file", "\"/etc/passwd\"", "is not a file name"},
        {"files/1/file", "\"..\"", "is not a file name"},
        {"files/1/file", "\"pack-head.bin\"", "is there twice"},
        {"files/1/bytes", "-5", "bytes"},
        {"files/1/bytes", "9223372036854775807", "checksums"},
        {"files/1/checksums", "[]", "checksums"},
        {"tensors", "{}", "missing tensor"},
        {"tensors/extra", "{}", "tensors, but config.json implies"},
        {"tensors/head", "", "head: missing tensor"},
        {"tensors/head", "[1]", "head: is not an object"},
        {"tensors/head/type", "\"bf16\"", "type bf16: q8 is needed"},
        {"tensors/head/shape", "[4, 4]", "head: shape [4,4], but config.json implies ["},
        {"tensors/head/shape", "\"x\"", "shape"},
        {"tensors/head/file", "\"pack-none.bin\"", "pack-none.bin"},
        {"tensors/head/offset", "4611686018427387904", "offset 4611686018427387904"},
        {"tensors/head/offset", "9223372036854775807", "offset 9223372036854775807"},
        {"tensors/head/offset", "-64", "offset"},
        {"tensors/head/offset", "\"0\"", "offset"},
        {"tensors/norm/offset", "4", "multiples of 64"},
    };
    static sh_config c;
    const char *model = fixture("text/models/e2b-like");
    CU_ASSERT_EQUAL_FATAL(sh_config_load(model, &c), SH_OK);
    CU_ASSERT_EQUAL_FATAL(pack(model, SH_MODE_Q8), SH_OK);
    char path[128];
    snprintf(path, sizeof path, "%s/" SH_PACKED_INDEX, folder);
    SH_CLEANUP(sh_json_release) json_t *good = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_json_read(path, 1 << 24, &good), SH_OK);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        SH_CLEANUP(sh_json_release) json_t *index = json_deep_copy(good);
        sh_packed *p = NULL;
        change(index, lies[i].where, lies[i].value);
        put_index(index, true);
        sh_status st = sh_packed_open(folder, &c, &p);
        CU_ASSERT_EQUAL(st == SH_OK, !*lies[i].want);
        if (st != SH_OK && !(strstr(sh_error_text(), lies[i].want) && strstr(sh_error_text(), folder))) {
            printf("\n%s = %s: %s\n", lies[i].where, lies[i].value, sh_error_text());
            CU_FAIL("another message");
        }
        sh_packed_close(&p);
        put_index(index, false);
    }
    change(good, "tensors/head/offset", "0"); /* a right value, which is not what was signed */
    put_index(good, false);
    sh_packed *p = NULL;
    CU_ASSERT_EQUAL(sh_packed_open(folder, &c, &p), SH_EFORMAT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "checksum"));
}

/* Random bytes of the index changed, or the file cut: refused, or (where white space changed) the same as before. */
static void test_mutations(void) {
    static sh_config c;
    const char *model = fixture("odd/one-layer");
    CU_ASSERT_EQUAL_FATAL(sh_config_load(model, &c), SH_OK);
    CU_ASSERT_EQUAL_FATAL(pack(model, SH_MODE_Q4), SH_OK);
    char path[128], *text = NULL;
    size_t n = 0;
    snprintf(path, sizeof path, "%s/" SH_PACKED_INDEX, folder);
    CU_ASSERT_EQUAL_FATAL(sh_file_read(path, 1 << 24, &text, &n), SH_OK);
    char *copy = malloc(n);
    srand(11);
    for (int i = 0; i < 400; i++) {
        memcpy(copy, text, n);
        size_t at = (size_t)rand() % n, len = i % 4 == 3 ? at : n;
        copy[at] = (char)rand();
        CU_ASSERT_EQUAL_FATAL(sh_file_write(path, copy, len), SH_OK);
        sh_packed *p = NULL;
        if (sh_packed_open(folder, &c, &p) != SH_OK) {
            CU_ASSERT_EQUAL_FATAL(strncmp(sh_error_text(), folder, strlen(folder)), 0);
            continue;
        }
        CU_ASSERT_TRUE(copy[at] == text[at] || copy[at] <= ' ');
        sh_packed_close(&p);
    }
    free(copy);
    free(text);
}

/* --- files ---------------------------------------------------------------------------------------------------------
 */

static void test_shrinking(void) {
    static sh_config c;
    const char *model = fixture("text/models/31b-like");
    char path[128];
    CU_ASSERT_EQUAL_FATAL(sh_config_load(model, &c), SH_OK);
    CU_ASSERT_EQUAL_FATAL(pack(model, SH_MODE_BF16), SH_OK);
    snprintf(path, sizeof path, "%s/pack-layer-000.bin", folder);
    sh_map m;
    CU_ASSERT_EQUAL_FATAL(sh_map_open(path, &m), SH_OK);
    CU_ASSERT_EQUAL_FATAL(truncate(path, 4096), 0); /* after it was mapped */
    sh_status st = sh_packed_bring(path, m.data, m.len, m.data);
    bool old_kernel = madvise((void *)(uintptr_t)m.data, 4096, 22) != 0 && errno == EINVAL;
    if (!old_kernel) {
        CU_ASSERT_EQUAL(st, SH_EIO);
        CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), path));
        CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "truncated"));
    }
    sh_map_close(&m);
    sh_weights *w = NULL;
    sh_weights_options o = {.mode = SH_MODE_BF16, .last = c.n_layers};
    CU_ASSERT_EQUAL(sh_weights_load(folder, &c, &o, team, &w), SH_EFORMAT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "ends at offset 4096"));
}

/* A checkpoint with towers, whose types need not be the model's. */
static void test_towers(void) {
    static sh_config c;
    char source[80];
    const char *model = fixture("odd/one-layer");
    SH_CLEANUP(sh_tensors_close) sh_tensors *t = NULL;
    snprintf(source, sizeof source, "%s/source", dir);
    CU_ASSERT_EQUAL_FATAL(sh_dir_make(source), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_tensors_open(model, &t), SH_OK);
    ck_file f = {0};
    for (int i = 0; i < sh_tensors_count(t); i++) {
        const sh_tensor *x = sh_tensors_at(t, i);
        ck_add(&f, x->name, x->dtype_name, x->rank, x->shape, x->data, (size_t)x->bytes);
    }
    static const uint8_t odd[] = {1, 2, 3, 4, 5, 6, 7};
    ck_add(&f, "model.vision_tower.patch", "U8", 1, (const int64_t[]){7}, odd, 7);
    ck_add(&f, "model.embed_audio.scale", "F32", 0, NULL, "\1\2\3\4", 4);
    ck_finish(&f, source, "model.safetensors", 1);
    char path[600], *text = NULL;
    size_t n = 0;
    snprintf(path, sizeof path, "%s/config.json", model);
    CU_ASSERT_EQUAL_FATAL(sh_file_read(path, 1 << 20, &text, &n), SH_OK);
    ck_put(source, "config.json", text, n);
    free(text);
    CU_ASSERT_EQUAL_FATAL(sh_config_load(source, &c), SH_OK);
    CU_ASSERT_EQUAL_FATAL(pack(source, SH_MODE_Q4), SH_OK);
    SH_CLEANUP(sh_packed_close) sh_packed *p = NULL;
    SH_CLEANUP(sh_tensors_close) sh_tensors *there = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_packed_open(folder, &c, &p), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_packed_tables(p, &there), SH_OK);
    CU_ASSERT_EQUAL(sh_weights_check_tables(folder, &c, there), SH_OK);
    const sh_tensor *v = sh_tensors_find(there, "model.vision_tower.patch");
    const sh_tensor *a = sh_tensors_find(there, "model.embed_audio.scale");
    CU_ASSERT_TRUE_FATAL(v && a);
    CU_ASSERT_TRUE(strcmp(v->dtype_name, "U8") == 0 && v->rank == 1 && v->bytes == 7 && memcmp(v->data, odd, 7) == 0);
    CU_ASSERT_TRUE(a->rank == 0 && a->bytes == 4 && memcmp(a->data, "\1\2\3\4", 4) == 0);
    CU_ASSERT_EQUAL(sh_packed_verify(folder, team, NULL, NULL), SH_OK);
    both(source, &c, &(sh_weights_options){.mode = SH_MODE_Q4, .last = c.n_layers});
}

static int writes_left;

static ssize_t full(int fd, const void *p, size_t n) {
    if (writes_left-- > 0) return write(fd, p, n);
    errno = ENOSPC;
    return -1;
}

static int no_rename(const char *from, const char *to) {
    (void)from, (void)to;
    errno = EACCES;
    return -1;
}

/* Each write fails once: the folder that was there stays, and nothing else is left. */
static void test_full_disk(void) {
    const char *model = fixture("odd/one-layer");
    sh_file_op_table real = sh_file_ops;
    char path[160];
    CU_ASSERT_EQUAL_FATAL(pack(model, SH_MODE_BF16), SH_OK);
    snprintf(path, sizeof path, "%s.tmp.%d", folder, (int)getpid());
    sh_status st = SH_EIO;
    int n = 0;
    for (; st != SH_OK && n < 100; n++) {
        writes_left = n;
        sh_file_ops.write = full;
        st = pack(model, SH_MODE_Q4);
        sh_file_ops = real;
        CU_ASSERT_TRUE(st == SH_OK || (st == SH_EIO && strstr(sh_error_text(), "space")));
        CU_ASSERT_FALSE(sh_file_exists(path));
        sh_wtype type = SH_W_TYPES;
        CU_ASSERT_EQUAL(sh_packed_read_type(folder, &type), SH_OK);
        CU_ASSERT_EQUAL(type, st == SH_OK ? SH_W_Q4 : SH_W_BF16);
        CU_ASSERT_EQUAL(sh_packed_verify(folder, team, NULL, NULL), SH_OK);
    }
    CU_ASSERT_TRUE(n > 4 && n < 100);
    sh_file_ops.rename = no_rename;
    CU_ASSERT_EQUAL(pack(model, SH_MODE_Q8), SH_EIO);
    sh_file_ops = real;
    CU_ASSERT_FALSE(sh_file_exists(path));
    CU_ASSERT_EQUAL(sh_packed_verify(folder, team, NULL, NULL), SH_OK);
}

static bool give_up(void *arg, size_t done, size_t total) {
    (void)total;
    CU_ASSERT_TRUE(done > 0);
    return --*(int *)arg > 0;
}

static void test_given_up(void) {
    int calls = 3;
    char other[96];
    snprintf(other, sizeof other, "%s/other", dir);
    sh_pack_options o = {.mode = SH_MODE_Q8, .progress = give_up, .arg = &calls};
    CU_ASSERT_EQUAL(sh_pack_write(fixture("odd/one-layer"), other, &o, team), SH_ECANCELLED);
    CU_ASSERT_FALSE(sh_file_exists(other));
    CU_ASSERT_EQUAL(sh_pack_write(fixture("no-such-model"), other, &(sh_pack_options){0}, team), SH_EINPUT);
    CU_ASSERT_FALSE(sh_file_exists(other));
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("packed", begin, end);
    CU_add_test(s, "shares", test_shares);
    CU_add_test(s, "modes", test_modes);
    CU_add_test(s, "lies", test_lies);
    CU_add_test(s, "mutations", test_mutations);
    CU_add_test(s, "shrinking", test_shrinking);
    CU_add_test(s, "towers", test_towers);
    CU_add_test(s, "full disk", test_full_disk);
    CU_add_test(s, "given up", test_given_up);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + (CU_get_number_of_suites_failed() != 0);
    CU_cleanup_registry();
    return failed != 0;
}
