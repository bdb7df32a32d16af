/* coordinator/store: what is committed survives any death, incarnations take over from each other and fence each other,
 * names and lines are unique, and damage or a full disk is told without harm. */
#include <CUnit/Basic.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "common/clock.h"
#include "common/file.h"
#include "coordinator/store.h"

static char dir[64], base[128];

static const char *fresh(const char *name) {
    snprintf(base, sizeof base, "%s/%s", dir, name);
    return base;
}

static sh_store *open_ok(const char *path) {
    sh_store *s = NULL;
    sh_status st = sh_store_open(path, &s);
    if (st != SH_OK) fprintf(stderr, "\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    return s;
}

static uint64_t new_job(sh_store *s, const char *name) {
    sh_job j = {.name = (char *)(uintptr_t)name, .options = (char[]){""}};
    CU_ASSERT_EQUAL_FATAL(sh_store_job_put(s, &j), SH_OK);
    return j.id;
}

static uint64_t add(sh_store *s, uint64_t job, uint64_t number, const char *id, bool *twice) {
    char line[300];
    uint64_t key = 0;
    snprintf(line, sizeof line, "{\"line\": %d, \"fill\": \"%0200d\"}", (int)number, (int)number);
    sh_stored_request r = {.job = job,
                           .number = number,
                           .hash = number * 0x9e3779b97f4a7c15u,
                           .custom_id = id,
                           .line = line,
                           .len = strlen(line)};
    sh_status st = sh_store_request_add(s, &r, &key, twice);
    if (st != SH_OK) fprintf(stderr, "\n%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    return key;
}

static sh_status count_request(void *ctx, const sh_stored_request *r) {
    char want[300];
    int n = snprintf(want, sizeof want, "{\"line\": %d, \"fill\": \"%0200d\"}", (int)r->number, (int)r->number);
    CU_ASSERT(r->len == (size_t)n && memcmp(r->line, want, r->len) == 0);
    CU_ASSERT_EQUAL(r->hash, r->number * 0x9e3779b97f4a7c15u);
    ++*(int *)ctx;
    return SH_OK;
}

static int pending(sh_store *s, uint64_t job) {
    int n = 0;
    CU_ASSERT_EQUAL(sh_store_pending(s, job, 0, 1 << 30, count_request, &n), SH_OK);
    return n;
}

static sh_status count_result(void *ctx, const sh_stored_result *r, bool *stop) {
    (void)stop;
    CU_ASSERT(r->len == 3 && memcmp(r->row, "row", 3) == 0);
    ++*(int *)ctx;
    return SH_OK;
}

static int results(sh_store *s, uint64_t job) {
    int n = 0;
    CU_ASSERT_EQUAL(sh_store_results(s, job, 0, count_result, &n), SH_OK);
    return n;
}

static sh_status take_progress(void *ctx, const void *p, size_t n) {
    return sh_buf_add(ctx, p, n);
}

static sh_status take_job(void *ctx, sh_job *j) {
    *(sh_job *)ctx = *j;
    return SH_OK;
}

static void test_rows(void) {
    const char *path = fresh("rows");
    sh_store *s = open_ok(path);
    CU_ASSERT_EQUAL(sh_store_epoch(s), 1);
    char wal[200];
    snprintf(wal, sizeof wal, "%s/1/store.db-wal", path);
    uint64_t job = new_job(s, "a"), other = new_job(s, "b");
    bool twice = true, added = false;
    uint64_t k1 = add(s, job, 1, "x", &twice);
    CU_ASSERT_FALSE(twice);
    uint64_t k2 = add(s, job, 2, "x", &twice);
    CU_ASSERT(twice && k2 > k1);
    add(s, other, 2, "x", &twice);
    CU_ASSERT_FALSE(twice);
    add(s, job, 4, NULL, &twice);
    CU_ASSERT_FALSE(twice);
    CU_ASSERT(sh_store_is_dirty(s));
    CU_ASSERT_EQUAL(sh_store_commit(s), SH_OK);
    CU_ASSERT_FALSE(sh_store_is_dirty(s));
    CU_ASSERT(sh_file_exists(wal)); /* the log is in use: nothing of store.db is overwritten by a commit */
    CU_ASSERT_EQUAL(pending(s, job), 3);
    CU_ASSERT_EQUAL(pending(s, 0), 4);
    CU_ASSERT_EQUAL(sh_store_progress_add(s, k1, false, 8, "cd", 2), SH_OK);
    CU_ASSERT_EQUAL(sh_store_progress_add(s, k1, false, 0, "ab", 2), SH_OK);
    CU_ASSERT_EQUAL(sh_store_progress_add(s, k1, false, 0, "no", 2), SH_OK); /* the first counts */
    sh_buf b;
    sh_buf_init(&b, 0);
    CU_ASSERT_EQUAL(sh_store_progress(s, k1, take_progress, &b), SH_OK);
    CU_ASSERT(b.len == 4 && memcmp(b.data, "abcd", 4) == 0);
    CU_ASSERT_EQUAL(sh_store_result_add(s, k1, job, 1, "row", 3, &added), SH_OK);
    CU_ASSERT(added);
    CU_ASSERT_EQUAL(sh_store_result_add(s, k1, job, 1, "row", 3, &added), SH_OK);
    CU_ASSERT_FALSE(added);
    sh_buf_clear(&b);
    CU_ASSERT_EQUAL(sh_store_progress(s, k1, take_progress, &b), SH_OK);
    CU_ASSERT_EQUAL(b.len, 0);
    sh_buf_release(&b);
    CU_ASSERT_EQUAL(pending(s, job), 2);
    CU_ASSERT_EQUAL(results(s, job), 1);
    CU_ASSERT_EQUAL(results(s, other), 0);
    sh_store_close(&s);
    CU_ASSERT_PTR_NULL(s);
}

static void test_takeover(void) {
    const char *path = fresh("takeover");
    sh_store *s = open_ok(path);
    uint64_t job = new_job(s, "name");
    bool b;
    uint64_t key = 0;
    for (int i = 1; i <= 5000; i++) key = add(s, job, (uint64_t)i, NULL, &b);
    CU_ASSERT_EQUAL(sh_store_result_add(s, key, job, 5000, "row", 3, &b), SH_OK);
    sh_job j = {.id = job,
                .name = (char[]){"name"},
                .options = (char[]){"00ff"},
                .state = SH_JOB_RUNNING,
                .closed = true,
                .accepted = 5000,
                .last = 5000,
                .chain = UINT64_MAX - 3,
                .done = 1,
                .errors = 2,
                .tokens_in = 3,
                .tokens_out = 4,
                .failure = (char[]){"why"}};
    CU_ASSERT_EQUAL(sh_store_job_put(s, &j), SH_OK);
    CU_ASSERT_EQUAL(sh_store_pin(s, "mode", "exact"), SH_OK);
    CU_ASSERT_EQUAL(sh_store_commit(s), SH_OK);
    add(s, job, 5001, NULL, &b); /* never committed */
    sh_store *t = open_ok(path); /* while the first still has its file open */
    CU_ASSERT_EQUAL(sh_store_epoch(t), 2);
    CU_ASSERT_EQUAL(sh_store_commit(s), SH_ESTATE);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "newer coordinator (epoch 2)"));
    sh_store_close(&s);
    CU_ASSERT_EQUAL(pending(t, job), 4999);
    CU_ASSERT_EQUAL(results(t, job), 1);
    sh_job k = {0};
    CU_ASSERT_EQUAL(sh_store_jobs(t, take_job, &k), SH_OK);
    CU_ASSERT(k.id == job && !strcmp(k.name, "name") && !strcmp(k.options, "00ff") && k.state == SH_JOB_RUNNING &&
              k.closed && k.accepted == 5000 && k.chain == UINT64_MAX - 3 && k.done == 1 && k.errors == 2 &&
              k.tokens_in == 3 && k.tokens_out == 4 && !strcmp(k.failure, "why"));
    sh_job_release(&k);
    CU_ASSERT_EQUAL(sh_store_pin(t, "mode", "exact"), SH_OK);
    CU_ASSERT_EQUAL(sh_store_pin(t, "mode", "bf16"), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "mode was exact when this store began"));
    CU_ASSERT(add(t, job, 5001, NULL, &b) > key);
    CU_ASSERT_EQUAL(sh_store_commit(t), SH_OK);
    sh_store_close(&t);
    s = open_ok(path);
    CU_ASSERT_EQUAL(pending(s, job), 5000);
    char old[200];
    snprintf(old, sizeof old, "%s/1", path);
    CU_ASSERT_FALSE(sh_file_exists(old)); /* two generations back: cleared away */
    snprintf(old, sizeof old, "%s/2/store.db", path);
    CU_ASSERT(sh_file_exists(old));
    sh_store_close(&s);
}

/* A child adds lines and says through shared memory how many were committed; killed at a random moment, they are all
 * there. */
static void test_killed(void) {
    const char *path = fresh("killed");
    volatile int *said = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CU_ASSERT_FATAL(said != MAP_FAILED);
    unsigned seed = 7;
    for (int round = 0; round < 8; round++) {
        pid_t pid = fork();
        if (pid == 0) {
            sh_store *s = NULL;
            if (sh_store_open(path, &s) != SH_OK) _exit(9);
            uint64_t job = said[0] || said[1] ? 1 : new_job(s, "j");
            int have = 0;
            if (sh_store_pending(s, 0, 0, 1 << 30, count_request, &have) != SH_OK) _exit(8);
            if (have < *said) _exit(7);
            for (int n = have;;) {
                bool b;
                for (int i = 0; i < 40; i++) add(s, job, (uint64_t)++n, NULL, &b);
                said[1] = 1;
                if (sh_store_commit(s) != SH_OK) _exit(6);
                *said = n;
            }
        }
        for (int before = *said; *said == before;) { /* once it works, somewhere within the next commits */
            CU_ASSERT_EQUAL_FATAL(waitpid(pid, NULL, WNOHANG), 0);
            sh_sleep(0.002);
        }
        sh_sleep(1e-4 * (double)(rand_r(&seed) % 300));
        kill(pid, SIGKILL);
        CU_ASSERT_EQUAL(waitpid(pid, NULL, 0), pid);
    }
    sh_store *s = open_ok(path);
    int n = pending(s, 0);
    CU_ASSERT(n >= *said && n <= *said + 40 && n % 40 == 0 && *said > 0);
    CU_ASSERT_EQUAL(sh_store_epoch(s), 9);
    sh_store_close(&s);
    munmap((void *)(uintptr_t)said, 4096);
}

static void test_full(void) {
    const char *path = fresh("full");
    sh_store *s = open_ok(path);
    uint64_t job = new_job(s, "j"), key;
    bool b;
    add(s, job, 1, NULL, &b);
    CU_ASSERT_EQUAL(sh_store_commit(s), SH_OK);
    CU_ASSERT_EQUAL(sh_store_limit(s, 40), SH_OK);
    char *big = calloc(1, 4096);
    sh_status st = SH_OK;
    for (int i = 2; i < 100 && st == SH_OK; i++) {
        sh_stored_request r = {.job = job, .number = (uint64_t)i, .line = big, .len = 4096};
        st = sh_store_request_add(s, &r, &key, &b);
    }
    CU_ASSERT_EQUAL(st, SH_EIO);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "full/1/store.db: the disk is full"));
    free(big);
    sh_store_close(&s);
    s = open_ok(path);
    CU_ASSERT_EQUAL(pending(s, job), 1);
    sh_store_close(&s);
}

/* The system's own refusal to let files grow: in a child, as the limit cannot be undone. */
static void test_no_room(void) {
    const char *path = fresh("noroom");
    sh_store *s = open_ok(path);
    uint64_t job = new_job(s, "j"), key;
    bool b;
    for (int i = 1; i <= 2000; i++) key = add(s, job, (uint64_t)i, NULL, &b);
    (void)key;
    CU_ASSERT_EQUAL(sh_store_commit(s), SH_OK);
    sh_store_close(&s);
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGXFSZ, SIG_IGN);
        struct rlimit r = {.rlim_cur = 200000, .rlim_max = 200000};
        if (setrlimit(RLIMIT_FSIZE, &r) != 0) _exit(1);
        if (sh_store_open(path, &s) != SH_EIO) _exit(2);
        _exit(strstr(sh_error_text(), "cannot be written: File too large") && strstr(sh_error_text(), "noroom/2") ? 0
                                                                                                                  : 3);
    }
    int status = -1;
    CU_ASSERT_EQUAL(waitpid(pid, &status, 0), pid);
    CU_ASSERT_EQUAL(status, 0);
    char left[200];
    snprintf(left, sizeof left, "%s/2/taken.db", path);
    CU_ASSERT_FALSE(sh_file_exists(left));
    s = open_ok(path); /* the failed incarnation is passed over */
    CU_ASSERT_EQUAL(sh_store_epoch(s), 3);
    CU_ASSERT_EQUAL(pending(s, 1), 2000);
    sh_store_close(&s);
}

static void test_damaged(void) {
    const char *path = fresh("damaged");
    sh_store *s = open_ok(path);
    uint64_t job = new_job(s, "j");
    bool b;
    for (int i = 1; i <= 500; i++) add(s, job, (uint64_t)i, NULL, &b);
    CU_ASSERT_EQUAL(sh_store_commit(s), SH_OK);
    sh_store_close(&s);
    char file[200];
    snprintf(file, sizeof file, "%s/1/store.db", path);
    int fd = open(file, O_RDWR);
    CU_ASSERT_FATAL(fd >= 0);
    char junk[9000];
    memset(junk, 0x5a, sizeof junk);
    CU_ASSERT_EQUAL(pwrite(fd, junk, sizeof junk, 4096 * 4), (ssize_t)sizeof junk);
    close(fd);
    struct stat before, after;
    CU_ASSERT_EQUAL(stat(file, &before), 0);
    CU_ASSERT_EQUAL(sh_store_open(path, &s), SH_EFORMAT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "damaged/1/store.db: damaged"));
    CU_ASSERT(stat(file, &after) == 0 && after.st_mtime == before.st_mtime && after.st_size == before.st_size);
    fd = open(file, O_RDWR | O_TRUNC);
    CU_ASSERT_EQUAL(write(fd, "not a database at all, but text", 31), 31);
    close(fd);
    CU_ASSERT_EQUAL(sh_store_open(path, &s), SH_EFORMAT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "damaged/1/store.db"));
    CU_ASSERT_PTR_NULL(s);
}

static void
test_many_claims(void) { /* incarnations that start at once get different epochs, and the highest one stays */
    const char *path = fresh("claims");
    enum { N = 6 };
    pid_t pid[N];
    for (int i = 0; i < N; i++) {
        pid[i] = fork();
        if (pid[i] == 0) {
            sh_store *s = NULL;
            sh_status st = sh_store_open(path, &s);
            if (st == SH_ESTATE) _exit(100);
            if (st != SH_OK) {
                fprintf(stderr, "\n%s\n", sh_error_text());
                _exit(101);
            }
            _exit((int)sh_store_epoch(s));
        }
    }
    int seen[N + 1] = {0};
    for (int i = 0; i < N; i++) {
        int status = 0;
        CU_ASSERT_EQUAL(waitpid(pid[i], &status, 0), pid[i]);
        int code = WEXITSTATUS(status);
        CU_ASSERT(code != 101);
        if (code >= 1 && code <= N) CU_ASSERT_EQUAL(seen[code]++, 0);
    }
    CU_ASSERT_EQUAL(seen[N], 1);
}

static uint64_t add_long(sh_store *s, uint64_t job, uint64_t number, int kind, int64_t length) {
    sh_stored_request r = {.job = job, .number = number, .line = "{}", .len = 2, .kind = kind, .length = length};
    uint64_t key = 0;
    bool twice;
    CU_ASSERT_EQUAL_FATAL(sh_store_request_add(s, &r, &key, &twice), SH_OK);
    return key;
}

static uint64_t longest(sh_store *s, uint64_t job, int kind, int64_t *length, uint64_t key) {
    bool found = false;
    CU_ASSERT_EQUAL(sh_store_longest(s, job, kind, length, &key, &found), SH_OK);
    return found ? key : 0;
}

static void take_lengths(void *ctx, int kind, int64_t sum, int64_t most) {
    int64_t(*to)[2] = ctx;
    to[kind][0] = sum, to[kind][1] = most;
}

/* An older program answers requests and knows nothing of lengths: what it leaves is gone when the store is taken up. */
static void test_lengths_left(void) {
    const char *path = fresh("left");
    char command[1000];
    sh_store *s = open_ok(path);
    uint64_t job = new_job(s, "a");
    uint64_t a = add_long(s, job, 1, 1, 10), b = add_long(s, job, 2, 1, 30), c = add_long(s, job, 3, 1, 99);
    CU_ASSERT_EQUAL(sh_store_commit(s), SH_OK);
    sh_store_close(&s);
    snprintf(command, sizeof command,
             "python3 -c 'import glob, sqlite3; d = sqlite3.connect(glob.glob(\"%s/*/store.db\")[0]); "
             "d.execute(\"UPDATE request SET done = 1 WHERE key IN (%llu, %llu)\"); d.commit(); d.close()'",
             path, (unsigned long long)b, (unsigned long long)c);
    CU_ASSERT_EQUAL_FATAL(system(command), 0);
    s = open_ok(path);
    int64_t length = INT64_MAX, sums[3][2] = {{0}};
    CU_ASSERT(longest(s, job, 1, &length, 0) == a && length == 10);
    CU_ASSERT_EQUAL(longest(s, job, 1, &length, a), 0);
    CU_ASSERT_EQUAL(sh_store_lengths(s, job, take_lengths, sums), SH_OK);
    CU_ASSERT(sums[1][0] == 10 && sums[1][1] == 10);
    sh_store_close(&s);
}

/* Longest first, of equal ones by age; answered ones and other jobs' are not among them; the next incarnation knows. */
static void test_lengths(void) {
    const char *path = fresh("lengths");
    sh_store *s = open_ok(path);
    uint64_t job = new_job(s, "a"), other = new_job(s, "b");
    bool added;
    uint64_t a = add_long(s, job, 1, 1, 10), b = add_long(s, job, 2, 1, 30), c = add_long(s, job, 3, 1, 10),
             d = add_long(s, job, 4, 1, 30), e = add_long(s, job, 5, 2, 99);
    add_long(s, other, 1, 1, 50);
    add_long(s, job, 6, 0, 0); /* not told */
    CU_ASSERT_EQUAL(sh_store_result_add(s, d, job, 4, "row", 3, &added), SH_OK);
    uint64_t f = add_long(s, job, 7, 1, 30);
    CU_ASSERT_EQUAL(sh_store_commit(s), SH_OK);
    sh_store_close(&s);
    s = open_ok(path);
    int64_t length = INT64_MAX, sums[3][2] = {{0}};
    const uint64_t want[] = {b, f, a, c, 0};
    uint64_t key = 0;
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        key = longest(s, job, 1, &length, key);
        CU_ASSERT_EQUAL(key, want[i]);
        CU_ASSERT_EQUAL(length, i < 2 ? 30 : 10);
    }
    length = INT64_MAX;
    CU_ASSERT(longest(s, job, 2, &length, 0) == e && length == 99);
    CU_ASSERT_EQUAL(sh_store_lengths(s, job, take_lengths, sums), SH_OK);
    CU_ASSERT(sums[0][0] == 0 && sums[1][0] == 80 && sums[1][1] == 30 && sums[2][0] == 99);
    uint64_t front = 0, whose = 0;
    CU_ASSERT_EQUAL(sh_store_front(s, c, &front, &whose), SH_OK);
    CU_ASSERT(front == e && whose == job); /* d is answered */
    CU_ASSERT_EQUAL(sh_store_front(s, f, &front, &whose), SH_OK);
    CU_ASSERT_EQUAL(front, 0);
    sh_store_close(&s);
}

int main(void) {
    snprintf(dir, sizeof dir, "/tmp/shoal-store-XXXXXX");
    if (!mkdtemp(dir) || CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("store", NULL, NULL);
    CU_add_test(s, "rows, names, progress, results", test_rows);
    CU_add_test(s, "lengths", test_lengths);
    CU_add_test(s, "lengths that were left", test_lengths_left);
    CU_add_test(s, "takeover and fence", test_takeover);
    CU_add_test(s, "killed at random moments", test_killed);
    CU_add_test(s, "full disk while writing", test_full);
    CU_add_test(s, "no room for taking over", test_no_room);
    CU_add_test(s, "damaged predecessor", test_damaged);
    CU_add_test(s, "many claims at once", test_many_claims);
    CU_basic_set_mode(CU_BRM_NORMAL);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    SH_IGNORE(sh_path_remove(dir));
    return failed != 0;
}
