/* Page numbers of one kind: a stack of free ones. See pages.h. */
#include "worker/pages.h"

#include <stdlib.h>

sh_status sh_pages_create(int32_t total, sh_pages *out) {
    if (total < 0) SH_FAIL(SH_EINPUT, "pages: %d: a pool has 0 or more", total);
    sh_pages p = {.total = total, .free = total};
    p.stack = calloc((size_t)total + 1, sizeof *p.stack);
    p.holders = calloc((size_t)total + 1, sizeof *p.holders);
    p.kept = calloc((size_t)total + 1, sizeof *p.kept);
    if (!p.stack || !p.holders || !p.kept) {
        sh_pages_release(&p);
        SH_FAIL(SH_EMEMORY, "pages: no memory for the numbers of %d pages", total);
    }
    for (int32_t i = 0; i < total; i++) p.stack[i] = total - 1 - i; /* the lowest number first */
    *out = p;
    return SH_OK;
}

void sh_pages_release(sh_pages *p) {
    free(p->stack);
    free(p->holders);
    free(p->kept);
    *p = (sh_pages){0};
}

bool sh_pages_promise(sh_pages *p, int32_t n) {
    if (n > sh_pages_open(p)) return false;
    p->promised += n;
    return true;
}

void sh_pages_unpromise(sh_pages *p, int32_t n) {
    p->promised -= n;
}

int32_t sh_pages_take(sh_pages *p, bool promised) {
    if (promised ? p->promised <= 0 : sh_pages_open(p) <= 0) return -1;
    if (p->free == 0) return -1;
    if (promised) p->promised--;
    int32_t page = p->stack[--p->free];
    p->holders[page] = 1;
    return page;
}

void sh_pages_hold(sh_pages *p, int32_t page) {
    if (p->holders[page]++ == 0)
        p->idle--;
    else if (p->each_pays)
        p->paid++;
}

static void put_back(sh_pages *p, int32_t page) {
    p->stack[p->free++] = page;
}

sh_status sh_pages_give(sh_pages *p, int32_t page) {
    if (page < 0 || page >= p->total || p->holders[page] == 0)
        SH_FAIL(SH_ESTATE, "pages: page %d of %d is given back and was not in use", page, p->total);
    if (--p->holders[page] > 0)
        p->paid -= p->each_pays;
    else if (p->kept[page])
        p->idle++;
    else
        put_back(p, page);
    return SH_OK;
}

void sh_pages_keep(sh_pages *p, int32_t page) {
    p->kept[page] = true;
}

void sh_pages_forget(sh_pages *p, int32_t page) {
    if (!p->kept[page]) return;
    p->kept[page] = false;
    if (p->holders[page] > 0) return;
    p->idle--;
    put_back(p, page);
}
