/* Who reads what: everything that is needed is read exactly once, by one who needs it, and all members agree on who
 * sends what to whom in which order. Random lists, and a few whose answer is known. */
#include <CUnit/Basic.h>
#include <stdbool.h>
#include <string.h>
#include "model/wants.h"

enum { MEMBERS = 6, SOURCES = 5, PANELS = 40, LISTS = 4 * SOURCES };

static uint32_t seed = 1;

static int draw(int n) {
    seed = seed * 1664525u + 1013904223u;
    return (int)((seed >> 8) % (uint32_t)n);
}

typedef struct lists {
    sh_want all[MEMBERS * LISTS];
    int32_t count[MEMBERS];
    int members;
} lists;

static sh_want want(int source, int lo, int hi) {
    return (sh_want){.source = {.layer = source / 2, .tensor = source, .second = -1, .k = 64},
                     .lo = lo,
                     .hi = hi,
                     .packed_bytes = 100,
                     .bytes = 70};
}

/* Each member needs some runs of each source, which do not meet. */
static void make(lists *l, int members) {
    int n = 0;
    *l = (lists){.members = members};
    for (int m = 0; m < members; m++)
        for (int s = 0; s < SOURCES; s++)
            for (int at = draw(PANELS / 2), k = 0; at < PANELS - 1 && k < 3 && draw(4); k++) {
                int end = at + 1 + draw(PANELS - 1 - at);
                l->all[n++] = want(s, at, end);
                l->count[m]++;
                at = end + draw(3);
            }
}

static const sh_want *list_of(const lists *l, int member) {
    const sh_want *w = l->all;
    for (int m = 0; m < member; m++) w += l->count[m];
    return w;
}

/* What panels of whom are read by whom, and the bytes that readers say they read. */
typedef struct seen {
    int reader[MEMBERS][SOURCES][PANELS]; /* −1: nothing */
    uint64_t bytes;
} seen;

static void note(const lists *l, int m, const sh_pieces *p, uint64_t most, seen *s) {
    const sh_want *w = list_of(l, m);
    for (int i = 0; i < p->n; i++) {
        const sh_piece *x = &p->piece[i];
        bool among = false, mine = false;
        for (int k = 0; k < x->members; k++) {
            among = among || p->list[x->group + k] == x->reader;
            mine = mine || p->list[x->group + k] == m;
            CU_ASSERT(k == 0 || p->list[x->group + k] > p->list[x->group + k - 1]);
        }
        CU_ASSERT_TRUE(among && mine && x->n > 0 && x->first + x->n <= w[x->want].hi - w[x->want].lo);
        CU_ASSERT_TRUE(x->members == 1 || x->n == 1 || (uint64_t)x->n * w[x->want].packed_bytes <= most);
        for (int k = 0; k < x->n; k++) {
            int *r = &s->reader[m][w[x->want].source.tensor][w[x->want].lo + x->first + k];
            CU_ASSERT_EQUAL(*r, -1); /* once */
            *r = x->reader;
        }
    }
    s->bytes += p->bytes;
}

static void check_agreed(const lists *l, const seen *s) {
    uint64_t needed = 0;
    for (int t = 0; t < SOURCES; t++)
        for (int k = 0; k < PANELS; k++) {
            int reader = -1;
            for (int m = 0; m < l->members; m++) {
                int r = s->reader[m][t][k];
                CU_ASSERT_TRUE(r < 0 || reader < 0 || r == reader);
                if (r >= 0) reader = r;
            }
            CU_ASSERT_TRUE(reader < 0 || s->reader[reader][t][k] == reader);
            needed += reader >= 0;
        }
    CU_ASSERT_EQUAL(s->bytes, 70 * needed);
    for (int m = 0; m < l->members; m++) {
        int32_t n = 0, covered = 0;
        const sh_want *w = list_of(l, m);
        for (int i = 0; i < l->count[m]; i++) n += w[i].hi - w[i].lo;
        for (int t = 0; t < SOURCES; t++)
            for (int k = 0; k < PANELS; k++) covered += s->reader[m][t][k] >= 0;
        CU_ASSERT_EQUAL(covered, n);
    }
}

/* The messages from a to b: the same ones in the same order at both ends. */
static void check_order(const lists *l, const sh_pieces *p, int a, int b) {
    int i = 0, j = 0;
    for (;; i++, j++) {
        for (; i < p[a].n; i++) {
            bool to = false;
            for (int k = 0; k < p[a].piece[i].members; k++) to = to || p[a].list[p[a].piece[i].group + k] == b;
            if (to && p[a].piece[i].reader == a) break;
        }
        while (j < p[b].n && p[b].piece[j].reader != a) j++;
        if (i == p[a].n || j == p[b].n) break;
        const sh_piece *x = &p[a].piece[i], *y = &p[b].piece[j];
        const sh_want *w = &list_of(l, a)[x->want], *v = &list_of(l, b)[y->want];
        CU_ASSERT_TRUE(!memcmp(&w->source, &v->source, sizeof w->source) && w->lo + x->first == v->lo + y->first &&
                       x->n == y->n);
    }
    CU_ASSERT_TRUE(i == p[a].n && j == p[b].n);
}

static void random_lists(void) {
    for (int round = 0; round < 500; round++) {
        static lists l;
        static seen s;
        sh_pieces p[MEMBERS] = {0};
        uint64_t most = 50 + (uint64_t)draw(1000);
        make(&l, 1 + draw(MEMBERS));
        memset(&s, 0xff, sizeof s);
        s.bytes = 0;
        for (int m = 0; m < l.members; m++) {
            CU_ASSERT_EQUAL_FATAL(sh_wants_divide(l.all, l.count, l.members, m, most, &p[m]), SH_OK);
            note(&l, m, &p[m], most, &s);
        }
        check_agreed(&l, &s);
        for (int a = 0; a < l.members; a++)
            for (int b = 0; b < l.members; b++)
                if (a != b) check_order(&l, p, a, b);
        for (int m = 0; m < l.members; m++) sh_pieces_release(&p[m]);
    }
}

/* Reading is divided: of what both need each reads half, less what one has alone already. */
static void even(void) {
    const sh_want all[] = {want(0, 0, 100), want(1, 0, 20), want(0, 0, 100)};
    const int32_t count[] = {2, 1};
    sh_pieces p;
    CU_ASSERT_EQUAL_FATAL(sh_wants_divide(all, count, 2, 0, 100, &p), SH_OK);
    CU_ASSERT_EQUAL(p.bytes, 60 * 70);
    CU_ASSERT_EQUAL(p.n, 101);
    sh_pieces_release(&p);
    CU_ASSERT_EQUAL_FATAL(sh_wants_divide(all, count, 2, 1, 100, &p), SH_OK);
    CU_ASSERT_EQUAL(p.bytes, 60 * 70);
    CU_ASSERT_EQUAL(p.n, 100);
    sh_pieces_release(&p);
}

/* Sources that differ in anything are not the same; and nothing is needed twice by one. */
static void different(void) {
    sh_want a = want(0, 0, 4), pair[2] = {a, a};
    const int32_t count[] = {1, 1}, twice[] = {2, 0};
    sh_pieces p;
    for (int i = 0; i < 8; i++) {
        pair[1] = a;
        sh_source *s = &pair[1].source;
        if (i == 1) s->row = 16;
        if (i == 2) s->layer = 1;
        if (i == 3) s->tensor = 3;
        if (i == 4) s->second = -2;
        if (i == 5) s->type = 1;
        if (i == 6) s->k = 32;
        if (i == 7) s->tail = 5;
        CU_ASSERT_EQUAL_FATAL(sh_wants_divide(pair, count, 2, 0, 1000, &p), SH_OK);
        CU_ASSERT_EQUAL(p.piece[0].members, i == 0 ? 2 : 1);
        sh_pieces_release(&p);
    }
    pair[1] = want(0, 3, 5);
    CU_ASSERT_EQUAL(sh_wants_divide(pair, twice, 2, 0, 1000, &p), SH_ESTATE);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "member 0 needs panels 3 to 3 of tensor 0 twice");
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("wants", NULL, NULL);
    CU_add_test(s, "random lists", random_lists);
    CU_add_test(s, "reading is divided", even);
    CU_add_test(s, "sources that differ", different);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures();
    CU_cleanup_registry();
    return failed ? 1 : 0;
}
