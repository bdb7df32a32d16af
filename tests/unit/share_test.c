/* Parts of a layer (model/share.h): every column, head and id is somebody's once; a part's queries read the KV head
 * that the whole layer gives them; nothing is replicated without need; budgets follow. */
#include <CUnit/Basic.h>
#include <string.h>

#include "model/config.h"

static void ranges(void) {
    static const int totals[] = {1, 19, 31, 32, 33, 96, 1024, 5376, 21504, 262144};
    static const int units[] = {1, 32, 256, 1024};
    for (size_t t = 0; t < sizeof totals / sizeof *totals; t++)
        for (size_t u = 0; u < sizeof units / sizeof *units; u++)
            for (int parts = 2; parts < 20; parts++) {
                int at = 0, least = totals[t], most = 0;
                for (int p = 0; p < parts; p++) {
                    sh_range r = sh_share_range((sh_share){.parts = parts, .part = p}, totals[t], units[u]);
                    CU_ASSERT(r.lo == at && r.hi >= r.lo && (r.lo % units[u] == 0 || r.lo == totals[t]));
                    at = r.hi;
                    least = r.hi - r.lo < least ? r.hi - r.lo : least;
                    most = r.hi - r.lo > most ? r.hi - r.lo : most;
                }
                CU_ASSERT(at == totals[t]);
                CU_ASSERT(most - least <= units[u]);
            }
    sh_range all = sh_share_range((sh_share){0}, 77, 32);
    CU_ASSERT(all.lo == 0 && all.hi == 77);
}

static void heads(void) {
    for (int heads = 1; heads <= 24; heads++)
        for (int kv = 1; kv <= heads; kv++)
            for (int parts = 1; parts <= heads && heads % kv == 0; parts++) {
                if (heads % parts) continue;
                sh_layer l = {.heads = heads, .kv_heads = kv, .head_dim = 8, .ff = 100};
                int group = heads / kv, columns = 0;
                for (int p = 0; p < parts; p++) {
                    sh_share s = {.parts = parts, .part = p};
                    sh_layer mine = sh_share_layer(s, &l);
                    columns += mine.ff;
                    CU_ASSERT_EQUAL(mine.heads * parts, heads);
                    CU_ASSERT_EQUAL_FATAL(mine.heads % mine.kv_heads, 0);
                    for (int h = 0; h < mine.heads; h++) { /* as attention groups them */
                        int j = h / (mine.heads / mine.kv_heads);
                        CU_ASSERT_EQUAL(sh_share_kv_head(s, &l, j), (p * mine.heads + h) / group);
                    }
                    if (mine.heads % group == 0) CU_ASSERT_EQUAL(mine.kv_heads * parts, kv); /* nothing twice */
                    if (group % mine.heads == 0) CU_ASSERT_EQUAL(mine.kv_heads, 1);
                }
                CU_ASSERT_EQUAL(columns, 100);
            }
}

/* Members together hold the shared matrices once (panels filled up), and each the small ones. */
static void memory(void) {
    static sh_config c, mine;
    char dir[512];
    snprintf(dir, sizeof dir, "%s/configs/31b", SH_TEST_DATA);
    CU_ASSERT_EQUAL_FATAL(sh_config_load(dir, &c), SH_OK);
    size_t whole = sh_weights_estimate(&c, SH_MODE_BF16, 0, c.n_layers);
    for (int parts = 2; parts <= 16; parts *= 2)
        for (int sum = 0; sum < 2; sum++) {
            size_t all = 0;
            for (int p = 0; p < parts; p++) {
                sh_share s = {.parts = parts, .part = p, .sum = sum};
                size_t one = sh_weights_estimate_share(&c, SH_MODE_BF16, s, 0, c.n_layers);
                CU_ASSERT(one < whole / (size_t)parts + whole / 50);
                all += one;
            }

            CU_ASSERT(all >= whole && all < whole + whole / 30);
        }
    size_t kv = sh_config_kv_bytes(&c, SH_KV_BF16, SH_KV_GLOBAL, 0, c.n_layers);
    sh_config_share(&c, (sh_share){.parts = 4, .part = 1}, &mine);
    CU_ASSERT_EQUAL(sh_config_kv_bytes(&mine, SH_KV_BF16, SH_KV_GLOBAL, 0, c.n_layers), kv / 4);
    sh_config_share(&c, (sh_share){.parts = 8, .part = 7}, &mine); /* 4 KV heads: each is on two members */
    CU_ASSERT_EQUAL(sh_config_kv_bytes(&mine, SH_KV_BF16, SH_KV_GLOBAL, 0, c.n_layers), kv / 4);
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("share", NULL, NULL);
    CU_add_test(s, "ranges", ranges);
    CU_add_test(s, "heads", heads);
    CU_add_test(s, "memory", memory);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
