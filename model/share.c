/* Parts of a layer. See share.h. */
#include "model/share.h"

#include <stddef.h>
#include <string.h>
#include "model/config.h"

static int common_divisor(int a, int b) {
    return b == 0 ? a : common_divisor(b, a % b);
}

/* Query heads in a row, within a part and within a group: what shares a stored KV head. */
static int run_of_heads(sh_share s, const sh_layer *l) {
    return common_divisor(l->heads / s.parts, l->heads / l->kv_heads);
}

sh_layer sh_share_layer(sh_share s, const sh_layer *l) {
    sh_layer mine = *l;
    if (s.parts <= 1) return mine;
    sh_range ff = sh_share_range(s, l->ff, SH_SHARE_COLUMNS);
    mine.heads = l->heads / s.parts;
    mine.kv_heads = mine.heads / run_of_heads(s, l);
    mine.ff = ff.hi - ff.lo;
    return mine;
}

int sh_share_kv_head(sh_share s, const sh_layer *l, int j) {
    if (s.parts <= 1) return j;
    int head = s.part * (l->heads / s.parts) + j * run_of_heads(s, l);
    return head / (l->heads / l->kv_heads);
}

void sh_config_share(const sh_config *c, sh_share s, sh_config *out) {
    memcpy(out, c, offsetof(sh_config, layer)); /* and of the table only the model's layers */
    for (int i = 0; i < c->n_layers; i++) out->layer[i] = sh_share_layer(s, &c->layer[i]);
}
