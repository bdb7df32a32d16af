/* Counts of chosen experts, and their file. See routing.h. */
#include "partition/routing.h"

#include <errno.h>
#include <stdlib.h>
#include "common/json.h"

#define MAX_FILE  ((size_t)64 << 20)
#define MAX_COUNT ((json_int_t)1 << 53) /* exact in every JSON reader */

sh_status sh_routing_create(const sh_config *c, sh_routing **out) {
    if (c->experts < 1) SH_FAIL(SH_EINPUT, "routing: the model has no experts");
    sh_routing *r = calloc(1, sizeof *r);
    if (r) r->chosen = calloc((size_t)c->n_layers * (size_t)c->experts, sizeof *r->chosen);
    if (!r || !r->chosen) {
        free(r);
        SH_FAIL(SH_EMEMORY, "routing: no memory for %d layers of %d experts", c->n_layers, c->experts);
    }
    r->layers = c->n_layers;
    r->experts = c->experts;
    *out = r;
    return SH_OK;
}

void sh_routing_destroy(sh_routing **r) {
    if (!*r) return;
    free((*r)->chosen);
    free(*r);
    *r = NULL;
}

sh_status sh_routing_add(sh_routing *r, const Shoal__Routing *m) {
    for (size_t i = 0; i < m->n_layer; i++)
        if (m->layer[i]->layer < 0 || m->layer[i]->layer >= r->layers || m->layer[i]->n_chosen != (size_t)r->experts)
            SH_FAIL(SH_EFORMAT, "routing: layer %d has %zu experts: allowed are layers 0 to %d with %d",
                    m->layer[i]->layer, m->layer[i]->n_chosen, r->layers - 1, r->experts);
    for (size_t i = 0; i < m->n_layer; i++) {
        uint64_t *to = r->chosen + (size_t)m->layer[i]->layer * (size_t)r->experts;
        for (int e = 0; e < r->experts; e++) to[e] += m->layer[i]->chosen[e];
    }
    return SH_OK;
}

static bool any(const uint64_t *counts, int n) {
    for (int i = 0; i < n; i++)
        if (counts[i]) return true;
    return false;
}

sh_status sh_routing_pack(const sh_routing *r, sh_buf *to) {
    for (int layer = 0; layer < r->layers; layer++) { /* messages one after the other are one: repeated fields add up */
        const uint64_t *chosen = sh_routing_of(r, layer);
        Shoal__ExpertCounts c = SHOAL__EXPERT_COUNTS__INIT, *list[] = {&c};
        Shoal__Routing m = SHOAL__ROUTING__INIT;
        if (!any(chosen, r->experts)) continue;
        c.layer = layer;
        c.n_chosen = (size_t)r->experts;
        c.chosen = (uint64_t *)(uintptr_t)chosen;
        m.n_layer = 1;
        m.layer = list;
        SH_TRY(sh_buf_reserve(to, to->len + shoal__routing__get_packed_size(&m) + 1));
        to->len += shoal__routing__pack(&m, to->data + to->len);
    }
    return SH_OK;
}

sh_status sh_routing_print(const sh_routing *r, sh_buf *to) {
    const char *between = "";
    SH_TRY(sh_buf_printf(to, "{\"experts\": %d, \"layers\": {", r->experts));
    for (int layer = 0; layer < r->layers; layer++) {
        const uint64_t *c = sh_routing_of(r, layer);
        if (!any(c, r->experts)) continue;
        SH_TRY(sh_buf_printf(to, "%s\n  \"%d\": [", between, layer));
        for (int e = 0; e < r->experts; e++)
            SH_TRY(sh_buf_printf(to, "%s%llu", e ? ", " : "", (unsigned long long)c[e]));
        SH_TRY(sh_buf_add_str(to, "]"));
        between = ",";
    }
    return sh_buf_add_str(to, "\n}}\n");
}

static sh_status read_layer(const char *path, const char *key, const json_t *v, const sh_config *c, sh_routing *r) {
    char *end;
    errno = 0;
    long layer = strtol(key, &end, 10);
    if (errno || *end || end == key || layer < 0 || layer >= c->n_layers || !c->layer[layer].moe)
        SH_FAIL(SH_EINPUT, "%s: layers.%.40s: not a layer with experts: the model has %d layers", path, key,
                c->n_layers);
    if (!json_is_array(v) || json_array_size(v) != (size_t)c->experts)
        SH_FAIL(SH_EINPUT, "%s: layers.%ld: %zu counts: the model has %d experts", path, layer, json_array_size(v),
                c->experts);
    for (int e = 0; e < c->experts; e++) {
        const json_t *n = json_array_get(v, (size_t)e);
        if (!json_is_integer(n) || json_integer_value(n) < 0 || json_integer_value(n) > MAX_COUNT)
            SH_FAIL(SH_EINPUT, "%s: layers.%ld[%d]: not a count: allowed are whole numbers from 0 to %lld", path, layer,
                    e, (long long)MAX_COUNT);
        r->chosen[(size_t)layer * (size_t)c->experts + (size_t)e] = (uint64_t)json_integer_value(n);
    }
    return SH_OK;
}

static sh_status read_layers(const char *path, const json_t *root, const sh_config *c, sh_routing *r) {
    const json_t *layers = json_object_get(root, "layers");
    if (!json_is_object(layers))
        SH_FAIL(SH_EINPUT, "%s: layers: is missing or no object: allowed is what --save-routing writes", path);
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)layers, key, v) SH_TRY(read_layer(path, key, v, c, r));
    return SH_OK;
}

sh_status sh_routing_load(const char *path, const sh_config *c, sh_routing **out) {
    SH_CLEANUP(sh_json_release) json_t *root = NULL;
    SH_CLEANUP(sh_routing_destroy) sh_routing *r = NULL;
    SH_TRY(sh_routing_create(c, &r));
    SH_TRY(sh_json_read(path, MAX_FILE, &root));
    SH_TRY(read_layers(path, root, c, r));
    *out = r;
    r = NULL;
    return SH_OK;
}
