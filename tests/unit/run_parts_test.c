/* The parts of `shoal run` that need no process: launcher command lines, counting the input, reading the log, the
 * closing table. */
#include <CUnit/Basic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "cli/attempt.h"
#include "cli/hosts.h"
#include "cli/input.h"
#include "cli/workfile.h"
#include "cli/launch.h"
#include "cli/logtail.h"
#include "cli/progress.h"
#include "cli/runstore.h"
#include "common/file.h"
#include "common/json.h"
#include "proto/group.pb-c.h"

static char folder[4096];

static const char *path_of(const char *name) {
    static char path[4200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void write_file(const char *name, const void *p, size_t n, const char *mode) {
    FILE *f = fopen(path_of(name), mode);
    CU_ASSERT_PTR_NOT_NULL_FATAL(f);
    CU_ASSERT_EQUAL(fwrite(p, 1, n, f), n);
    fclose(f);
}

/* argv as one line. */
static const char *joined(const sh_launch *l, char *to, size_t size) {
    to[0] = 0;
    for (int i = 0; i < l->argc; i++) {
        size_t n = strlen(to);
        snprintf(to + n, size - n, "%s%s", i ? " " : "", l->argv[i]);
    }
    return to;
}

static bool has_env(const sh_launch *l, const char *entry) {
    for (int i = 0; i < l->n_env; i++)
        if (strcmp(l->env[i], entry) == 0) return true;
    return false;
}

static void test_launch(void) {
    char line[2048];
    sh_launch l;
    sh_launch_options o = {.program = "/bin/shoal",
                           .endpoint = "ipc:///t/c1",
                           .group = "g",
                           .mark = "SHOAL_RUN=/s",
                           .ranks = 1,
                           .tmp = "/t",
                           .shm = "/dev/shm/x"};
    CU_ASSERT_EQUAL_FATAL(sh_launch_make(&o, &l), SH_OK);
    CU_ASSERT_STRING_EQUAL(joined(&l, line, sizeof line),
                           "/bin/shoal worker --connect ipc:///t/c1 --group g --link local -n 1");
    CU_ASSERT_TRUE(has_env(&l, "SHOAL_RUN=/s"));
    CU_ASSERT_TRUE(has_env(&l, "SHOAL_GROUP=g"));
    CU_ASSERT_PTR_NULL(l.argv[l.argc]);
    sh_launch_release(&l);

    o.ranks = 4, o.threads = 2, o.root = o.crowded = true;
    CU_ASSERT_EQUAL_FATAL(sh_launch_make(&o, &l), SH_OK);
    CU_ASSERT_STRING_EQUAL(joined(&l, line, sizeof line),
                           "mpirun --oversubscribe --bind-to none -n 4 /bin/shoal worker --connect ipc:///t/c1 "
                           "--group g --threads 2");
    CU_ASSERT_TRUE(has_env(&l, "OMPI_ALLOW_RUN_AS_ROOT=1"));
    CU_ASSERT_TRUE(has_env(&l, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"));
    CU_ASSERT_TRUE(has_env(&l, "OMPI_MCA_mpi_yield_when_idle=1"));
    CU_ASSERT_TRUE(has_env(&l, "OMPI_MCA_btl=self,vader"));
    CU_ASSERT_TRUE(has_env(&l, "OMPI_MCA_orte_tmpdir_base=/t"));
    sh_launch_release(&l);

    setenv("OMPI_MCA_btl", "self,tcp", 1); /* the user's setting wins */
    o.hosts = "a,b:2", o.keys = "/s/keys";
    CU_ASSERT_EQUAL_FATAL(sh_launch_make(&o, &l), SH_OK);
    CU_ASSERT_PTR_NOT_NULL(strstr(joined(&l, line, sizeof line), "--host a,b:2 -x SHOAL_RUN -x SHOAL_GROUP"));
    CU_ASSERT_PTR_NOT_NULL(strstr(line, "--keys /s/keys"));
    CU_ASSERT_FALSE(has_env(&l, "OMPI_MCA_btl=self,vader,tcp"));
    CU_ASSERT_FALSE(has_env(&l, "OMPI_MCA_orte_tmpdir_base=/t")); /* the other hosts have no such folder */
    sh_launch_release(&l);
    unsetenv("OMPI_MCA_btl");

    o.launcher = "local";
    CU_ASSERT_EQUAL(sh_launch_make(&o, &l), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(),
                           "--hosts: 'a,b:2' does not go with --launcher local: leave one of them out");
    o.hosts = NULL, o.launcher = "srun --mpi=pmix -n $SHOAL_RANKS";
    CU_ASSERT_EQUAL_FATAL(sh_launch_make(&o, &l), SH_OK);
    CU_ASSERT_STRING_EQUAL(l.argv[2], "exec srun --mpi=pmix -n $SHOAL_RANKS \"$@\"");
    CU_ASSERT_TRUE(has_env(&l, "SHOAL_RANKS=4"));
    sh_launch_release(&l);
}

/* A group that shares its node with others; a launcher of the user's that is told its hosts. */
static void test_launch_share(void) {
    char line[2048];
    sh_launch l;
    sh_launch_options o = {.program = "/bin/shoal",
                           .endpoint = "ipc:///t/c1",
                           .group = "g",
                           .ranks = 2,
                           .part = 1,
                           .parts = 4,
                           .memory = 123456,
                           .launcher = "start-ranks",
                           .hosts = "n1,n2"};
    CU_ASSERT_EQUAL_FATAL(sh_launch_make(&o, &l), SH_OK);
    CU_ASSERT_PTR_NOT_NULL(strstr(joined(&l, line, sizeof line), " --part 2/4 --memory 123456"));
    CU_ASSERT_TRUE(has_env(&l, "SHOAL_HOSTS=n1,n2"));
    sh_launch_release(&l);
}

/* An older run that ends, even well, leaves the folder to the newer one that has taken it over. */
static void test_taken_over(void) {
    char store[4200], note[4300];
    snprintf(store, sizeof store, "%s", path_of("s"));
    snprintf(note, sizeof note, "%s/owner", store);
    json_t *job = json_pack("{s:s}", "model", "m");
    sh_runstore old, new;
    CU_ASSERT_EQUAL_FATAL(sh_runstore_open(store, job, false, &old), SH_OK);
    CU_ASSERT_FALSE(old.existed);
    bool mine = false;
    CU_ASSERT_EQUAL(sh_runstore_owned(&old, &mine), SH_OK);
    CU_ASSERT_TRUE(mine);
    CU_ASSERT_EQUAL_FATAL(sh_runstore_open(store, job, false, &new), SH_OK);
    CU_ASSERT_TRUE(new.existed);
    CU_ASSERT_EQUAL(sh_runstore_owned(&old, &mine), SH_OK);
    CU_ASSERT_FALSE(mine);
    CU_ASSERT_EQUAL(sh_runstore_close(&old, true), SH_OK);
    CU_ASSERT_TRUE(sh_file_exists(note));
    CU_ASSERT_EQUAL(sh_runstore_close(&new, false), SH_OK);
    CU_ASSERT_FALSE(sh_file_exists(note));
    CU_ASSERT_EQUAL(sh_runstore_close(&old, true), SH_OK); /* nor when that one has left again */
    CU_ASSERT_TRUE(sh_file_exists(store));
    CU_ASSERT_EQUAL_FATAL(sh_runstore_open(store, job, false, &new), SH_OK);
    CU_ASSERT_EQUAL(sh_runstore_close(&new, true), SH_OK);
    CU_ASSERT_FALSE(sh_file_exists(store));
    json_decref(job);
}

/* Inside an allocation the steps of several groups share nodes, and get the environment whatever the job was given. */
static void test_launch_slurm(void) {
    sh_launch l;
    sh_launch_options o = {
        .program = "/bin/shoal", .endpoint = "tcp://a:1", .group = "g", .ranks = 2, .hosts = "a,b", .keys = "/k"};
    CU_ASSERT_EQUAL_FATAL(sh_launch_make(&o, &l), SH_OK);
    CU_ASSERT_FALSE(has_env(&l, "SLURM_OVERLAP=1"));
    CU_ASSERT_FALSE(has_env(&l, "SLURM_EXPORT_ENV=ALL"));
    sh_launch_release(&l);
    setenv("SLURM_JOB_ID", "7", 1);
    setenv("SLURM_EXPORT_ENV", "NONE", 1);
    CU_ASSERT_EQUAL_FATAL(sh_launch_make(&o, &l), SH_OK);
    CU_ASSERT_TRUE(has_env(&l, "SLURM_OVERLAP=1"));
    CU_ASSERT_TRUE(has_env(&l, "SLURM_EXPORT_ENV=ALL"));
    sh_launch_release(&l);
    setenv("SLURM_OVERLAP", "0", 1); /* the user's setting wins */
    CU_ASSERT_EQUAL_FATAL(sh_launch_make(&o, &l), SH_OK);
    CU_ASSERT_FALSE(has_env(&l, "SLURM_OVERLAP=1"));
    sh_launch_release(&l);
    unsetenv("SLURM_OVERLAP");
    unsetenv("SLURM_EXPORT_ENV");
    unsetenv("SLURM_JOB_ID");
}

static void test_hosts(void) {
    static const struct {
        const char *list;
        int groups;
        const char *shares; /* LIST@PART/PARTS of each group */
    } all[] = {
        {"a,b,c,d", 2, "a,b@0/1 c,d@0/1"},
        {"a:2,b,c:4", 2, "a:2@0/1 b,c:4@0/1"},
        {"a,b", 1, "a,b@0/1"},
        {"a", 3, "a@0/3 a@1/3 a@2/3"},
        {"a:8,b:8", 4, "a:8@0/2 a:8@1/2 b:8@0/2 b:8@1/2"},
        {"a,b", 3, "a@0/2 a@1/2 b@0/1"},
        {"a,a,b,a", 2, "a,a,a@0/1 b@0/1"}, /* one host named thrice */
        {"n1,n10", 2, "n1@0/1 n10@0/1"},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        sh_buf got;
        sh_buf_init(&got, 0);
        for (int k = 0; k < all[i].groups; k++) {
            sh_buf share;
            int part = -1, parts = -1;
            sh_buf_init(&share, 0);
            CU_ASSERT_EQUAL_FATAL(sh_hosts_divide(all[i].list, k, all[i].groups, &share, &part, &parts), SH_OK);
            CU_ASSERT_EQUAL(sh_buf_printf(&got, "%s%s@%d/%d", k ? " " : "", (const char *)share.data, part, parts),
                            SH_OK);
            sh_buf_release(&share);
        }
        CU_ASSERT_STRING_EQUAL((const char *)got.data, all[i].shares);
        sh_buf_release(&got);
    }
    sh_buf b;
    int part, parts;
    sh_buf_init(&b, 0);
    CU_ASSERT_EQUAL(sh_hosts_count("a,b:2,c"), 3);
    CU_ASSERT_EQUAL(sh_hosts_count("a:4,b,a:2"), 2);
    CU_ASSERT_EQUAL(sh_hosts_count(""), 1);
    CU_ASSERT_EQUAL(sh_hosts_count(NULL), 1);
    CU_ASSERT_EQUAL(sh_hosts_divide("a,,b", 0, 2, &b, &part, &parts), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "--hosts: 'a,,b' has an entry without a name");
    sh_buf_release(&b);
    CU_ASSERT_EQUAL(sh_hosts_within("n3,n1:4,n1", "n[1-3],gpu"), SH_OK);
    CU_ASSERT_EQUAL(sh_hosts_within("n2.cluster:2,gpu,localhost", "n[1-3],gpu.cluster"), SH_OK);
    CU_ASSERT_EQUAL(sh_hosts_within("n1,n30:2", "n[1-3]"), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(),
                           "--hosts: 'n30' is not in this Slurm job: its nodes are n[1-3] (SLURM_JOB_NODELIST)");
    CU_ASSERT_EQUAL(sh_hosts_within("n", "n1"), SH_EINPUT);
    CU_ASSERT_EQUAL(sh_hosts_within("127.0.0.1:2,10.1.2.3,+n1,+e:2", "n[1-3]"), SH_OK); /* not by name */
    CU_ASSERT_EQUAL(sh_hosts_within("n1.a", "n1.b"), SH_EINPUT);
    CU_ASSERT_EQUAL(sh_hosts_within("n1.a:3", "n1.a"), SH_OK);
}

static void test_nodelist(void) {
    static const char *const good[][2] = {{"a", "a"},
                                          {"a,b", "a,b"},
                                          {"n[1-3]", "n1,n2,n3"},
                                          {"n[08-10,7],login1", "n08,n09,n10,n7,login1"},
                                          {"x[1],y[2-2]", "x1,y2"}};
    static const char *const bad[] = {"n[", "n[1-", "n[3-1]", "n[a]", "n[1]x", "n[1,]", "n[1-999999]"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        sh_buf b;
        sh_buf_init(&b, 0);
        CU_ASSERT_EQUAL_FATAL(sh_hosts_expand(good[i][0], &b), SH_OK);
        CU_ASSERT_STRING_EQUAL((const char *)b.data, good[i][1]);
        sh_buf_release(&b);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        sh_buf b;
        sh_buf_init(&b, 0);
        CU_ASSERT_EQUAL(sh_hosts_expand(bad[i], &b), SH_EINPUT);
        sh_buf_release(&b);
    }
}

static void test_attempts(void) {
    sh_attempt a = {0};
    CU_ASSERT_TRUE(sh_attempt_again(&a, false, 3, 10));
    CU_ASSERT_DOUBLE_EQUAL(a.not_before, 10.2, 1e-9);
    CU_ASSERT_TRUE(sh_attempt_again(&a, false, 3, 20));
    CU_ASSERT_DOUBLE_EQUAL(a.not_before, 20.4, 1e-9);
    CU_ASSERT_TRUE(sh_attempt_again(&a, true, 3, 30)); /* got something done: counted from here */
    CU_ASSERT_DOUBLE_EQUAL(a.not_before, 30.2, 1e-9);
    CU_ASSERT_TRUE(sh_attempt_again(&a, false, 3, 40));
    CU_ASSERT_FALSE(sh_attempt_again(&a, false, 3, 50));
    CU_ASSERT_EQUAL(a.tries, 3);
    CU_ASSERT_TRUE(sh_attempt_again(&a, false, 7, 60)); /* more patience, meanwhile */
}

/* Every second line, joined by |, and how long they were. */
typedef struct seen {
    char text[64];
    size_t longest;
    int n;
} seen;

static bool want_even(void *ctx, uint64_t number) {
    (void)ctx;
    return number % 2 == 0;
}

static void take_line(void *ctx, const char *line, size_t len) {
    seen *s = ctx;
    size_t at = strlen(s->text);
    snprintf(s->text + at, sizeof s->text - at, "%.*s|", len > 8 ? 8 : (int)len, line);
    if (len > s->longest) s->longest = len;
    s->n++;
}

/* Lines are shown whole, whatever block they begin in, the last one without an end too; empty ones do not count. */
static void test_passing_lines(void) {
    seen s = {0};
    sh_input in;
    const sh_input_reader reader = {&s, want_even, take_line};
    size_t n = 5 << 20, at = 0;
    char *text = malloc(n);
    memset(text, 'x', n);
    static const char begin[] = "first\n\n \t\n  no\nthird\r\n";
    memcpy(text, begin, at = sizeof begin - 1);
    text[at += 100] = '\n';       /* line 3: not wanted */
    text[at += (3 << 20)] = '\n'; /* line 4: over several blocks */
    text[at += 200] = '\n';       /* line 5 */
    text[(at += (1 << 20)) - 1] = 'z';
    write_file("in", text, at, "w"); /* line 6 has no end */
    CU_ASSERT_EQUAL_FATAL(sh_input_scan(path_of("in"), "", &reader, &in), SH_OK);
    CU_ASSERT_EQUAL(in.lines, 7);
    CU_ASSERT_EQUAL(s.n, 4);
    CU_ASSERT_STRING_EQUAL(s.text, "first|third\r|xxxxxxxx|xxxxxxxx|");
    CU_ASSERT_EQUAL(s.longest, (3 << 20) - 1);
    free(text);
}

/* Lengths of lines that pass: few are all taken, of many every n-th; bad ones count as the others. */
static void test_lengths(void) {
    for (uint64_t lines = 1000; lines <= 125000; lines *= 5) {
        sh_workguess *g = NULL;
        sh_workload w;
        uint64_t taken = 0;
        CU_ASSERT_EQUAL_FATAL(sh_workguess_create(77, &g), SH_OK);
        sh_input_reader r = sh_workguess_reader(g);
        for (uint64_t i = 0; i < lines; i++) {
            char line[100];
            if (!r.wants(r.ctx, i)) continue;
            taken++;
            int n = i % 16 == 8 ? snprintf(line, sizeof line, "{\"prompt\": ")
                                : snprintf(line, sizeof line, "{\"prompt\": [1, 2, 3], \"max_tokens\": %d}",
                                           (int)(100 + 900 * i / lines));
            r.take(r.ctx, line, (size_t)n);
        }
        CU_ASSERT(lines <= 10000 ? taken == lines : taken >= 5000 && taken <= 10000 + 5000 * lines / 10000);
        CU_ASSERT_EQUAL(sh_workguess_end(g, lines, &w), SH_OK);
        CU_ASSERT_DOUBLE_EQUAL(w.requests, (double)lines, 1e-6 * (double)lines);
        CU_ASSERT_DOUBLE_EQUAL(sh_workload_mean_prompt(&w), 3, 1e-9);
        CU_ASSERT_DOUBLE_EQUAL(sh_workload_mean_output(&w), 550, 5); /* of the whole file, not of its beginning */
        sh_workguess_destroy(&g);
    }
    sh_workguess *g = NULL;
    sh_workload w;
    CU_ASSERT_EQUAL_FATAL(sh_workguess_create(77, &g), SH_OK);
    sh_input_reader r = sh_workguess_reader(g);
    CU_ASSERT_TRUE(r.wants(r.ctx, 0));
    r.take(r.ctx, "[]", 2);
    CU_ASSERT(sh_workguess_end(g, 1, &w) == SH_OK && w.n == 0);
    CU_ASSERT_TRUE(r.wants(r.ctx, 1));
    r.take(r.ctx, "{\"prompt\": [1]}", 15);
    CU_ASSERT(sh_workguess_end(g, 2, &w) == SH_OK && w.n == 1 && w.requests == 2);
    CU_ASSERT_DOUBLE_EQUAL(sh_workload_mean_output(&w), 77, 1e-9);
    sh_workguess_destroy(&g);
}

static void test_input(void) {
    static const char text[] = "{}\n\n  \t\r\nlast without end";
    sh_input a, b;
    write_file("in", text, sizeof text - 1, "w");
    CU_ASSERT_EQUAL_FATAL(sh_input_scan(path_of("in"), "", NULL, &a), SH_OK);
    CU_ASSERT_EQUAL(a.lines, 2);
    CU_ASSERT_EQUAL(a.bytes, sizeof text - 1);
    write_file("in", "x", 1, "a");
    CU_ASSERT_EQUAL_FATAL(sh_input_scan(path_of("in"), "", NULL, &b), SH_OK);
    CU_ASSERT_NOT_EQUAL(a.hash, b.hash);
    write_file("in", "\n \n\n", 4, "w");
    CU_ASSERT_EQUAL_FATAL(sh_input_scan(path_of("in"), "", NULL, &a), SH_OK);
    CU_ASSERT_EQUAL(a.lines, 0);
    CU_ASSERT_FALSE(sh_input_is_stream(path_of("in")));
    CU_ASSERT_TRUE(sh_input_is_stream("-"));
    CU_ASSERT_TRUE(sh_input_is_stream("/dev/null"));
    CU_ASSERT_FALSE(sh_input_is_stream("/no/such/file"));
    CU_ASSERT_EQUAL(sh_input_scan("/no/such/file", "", NULL, &a), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "-i: /no/such/file: cannot be opened: No such file or directory");
    CU_ASSERT_EQUAL(sh_input_scan("/", "", NULL, &a), SH_EINPUT);
    CU_ASSERT_STRING_EQUAL(sh_error_text(),
                           "-i: /: is a folder: allowed is a file of requests, one JSON object a line");

    test_passing_lines();

    /* the hash is of the bytes, however a pipe cuts them */
    char *big = malloc(3 << 20);
    for (int i = 0; i < 3 << 20; i++) big[i] = (char)(i * 31 % 127);
    write_file("in", big, 3 << 20, "w");
    CU_ASSERT_EQUAL_FATAL(sh_input_scan(path_of("in"), "", NULL, &a), SH_OK);
    char command[9000], spool[4200];
    snprintf(command, sizeof command, "{ head -c 100001; sleep 0.05; cat; } < %s", path_of("in"));
    snprintf(spool, sizeof spool, "%s/spool", folder);
    FILE *p = popen(command, "r");
    CU_ASSERT_PTR_NOT_NULL_FATAL(p);
    int kept = dup(0);
    dup2(fileno(p), 0);
    CU_ASSERT_EQUAL(sh_input_scan("-", spool, NULL, &b), SH_OK);
    dup2(kept, 0);
    close(kept);
    pclose(p);
    CU_ASSERT_EQUAL(a.hash, b.hash);
    CU_ASSERT_EQUAL(a.lines, b.lines);
    char *copy = NULL;
    size_t n = 0;
    CU_ASSERT_EQUAL_FATAL(sh_file_read(spool, 4 << 20, &copy, &n), SH_OK);
    CU_ASSERT_EQUAL(n, 3 << 20);
    CU_ASSERT_EQUAL(memcmp(copy, big, n), 0);
    free(copy);
    free(big);
}

static void add_log(const char *text) {
    write_file("log", text, strlen(text), "a");
}

static void test_logtail(void) {
    sh_logtail t;
    char why[200];
    add_log("shoal: warning: old\n");
    sh_logtail_open(&t, path_of("log"));
    CU_ASSERT_PTR_NULL(sh_logtail_next_warning(&t));
    CU_ASSERT_FALSE(sh_logtail_reason(&t, false, why, sizeof why));
    add_log("mpirun: noise\nshoal rank 1: warning: first\nshoal: warning: sec");
    CU_ASSERT_STRING_EQUAL(sh_logtail_next_warning(&t), "first");
    CU_ASSERT_PTR_NULL(sh_logtail_next_warning(&t)); /* not whole yet */
    add_log("ond\n");
    CU_ASSERT_STRING_EQUAL(sh_logtail_next_warning(&t), "second");
    sh_logtail_mark(&t);
    add_log(
        "noise\n------------------------------\nThere are\n\n  not   enough slots\n------------------------------\n");
    CU_ASSERT_TRUE(sh_logtail_reason(&t, false, why, sizeof why));
    CU_ASSERT_STRING_EQUAL(why, "There are not enough slots");
    CU_ASSERT_FALSE(sh_logtail_reason(&t, true, why, sizeof why));
    add_log("------------------------------\nA node is lost.\n");
    CU_ASSERT_TRUE(sh_logtail_reason(&t, false, why, sizeof why));
    CU_ASSERT_STRING_EQUAL(why, "A node is lost.");
    add_log("------------------------------\n");
    add_log("shoal serve: the disk is full\n");
    CU_ASSERT_TRUE(sh_logtail_reason(&t, false, why, sizeof why));
    CU_ASSERT_STRING_EQUAL(why, "the disk is full");
    add_log("shoal rank 0: error: model.safetensors: cut short\nmpirun has exited\n");
    CU_ASSERT_TRUE(sh_logtail_reason(&t, false, why, sizeof why));
    CU_ASSERT_STRING_EQUAL(why, "model.safetensors: cut short");
    sh_logtail_close(&t);
}

static void test_closing(void) {
    sh_outcomes o = {0};
    sh_outcomes_add(&o, 200), sh_outcomes_add(&o, 400), sh_outcomes_add(&o, 200);
    Shoal__StageTimes times = SHOAL__STAGE_TIMES__INIT;
    times.rank = 1, times.has_weights = times.has_idle = times.has_bytes = 1;
    times.weights = 3, times.idle = 1, times.bytes = 6000000000u;
    times.has_load_seconds = times.has_load_bytes = times.has_load_reading = times.has_load_packing = 1;
    times.load_seconds = 2.5, times.load_bytes = 5000000000u, times.load_reading = 1.5, times.load_packing = 0.75;
    uint8_t packed[128];
    ProtobufCBinaryData b = {shoal__stage_times__pack(&times, packed), packed};
    Shoal__GroupState g = SHOAL__GROUP_STATE__INIT;
    g.group = (char *)"g", g.state = (char *)"ready";
    g.times = &b, g.n_times = 1;
    Shoal__GroupState *gp = &g;
    Shoal__JobReply r = SHOAL__JOB_REPLY__INIT;
    r.group = &gp, r.n_group = 1;
    sh_closing c = {.output = "out",
                    .outcomes = &o,
                    .tokens_in = 100,
                    .tokens_out = 50,
                    .tokens_in_now = 100,
                    .tokens_out_now = 50,
                    .wall = 6,
                    .computing = 5,
                    .last = &r,
                    .bandwidth = 4e9};
    sh_buf text;
    sh_buf_init(&text, 0);
    CU_ASSERT_EQUAL_FATAL(sh_closing_text(&c, false, &text), SH_OK);
    const char *s = (const char *)text.data;
    CU_ASSERT_PTR_NOT_NULL(strstr(s, "requests   3: 2 answered, 1 refused (400)\n"));
    CU_ASSERT_PTR_NOT_NULL(strstr(s, "speed      20.0 tokens/s in, 10.0 tokens/s out\n"));
    CU_ASSERT_PTR_NOT_NULL(strstr(s,
                                  "load       2.5 s, 5.00 GB of files, 2.00 GB/s; rank 1 took longest: reading 1.5 s, "
                                  "packing 0.8 s\n"));
    CU_ASSERT_PTR_NOT_NULL(strstr(s, "75 %"));
    CU_ASSERT_PTR_NOT_NULL(strstr(s, "2.0 GB/s, 50 % of this machine's"));
    sh_buf_clear(&text);
    CU_ASSERT_EQUAL_FATAL(sh_closing_text(&c, true, &text), SH_OK);
    json_t *j = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_json_parse("closing", (const char *)text.data, text.len - 1, &j), SH_OK);
    CU_ASSERT_EQUAL(json_integer_value(json_object_get(json_object_get(j, "requests"), "400")), 1);
    CU_ASSERT_EQUAL(json_integer_value(json_object_get(json_object_get(j, "load"), "file_bytes")), 5000000000);
    json_decref(j);
    sh_buf_release(&text);
}

/* Two stages of two ranks each: busiest 30 + 60 of (20 + 30) / 2 + (60 + 20) / 2. */
static void test_closing_experts(void) {
    static const int rows[] = {20, 30, 60, 20};
    sh_outcomes o = {0};
    uint8_t packed[4][128];
    ProtobufCBinaryData b[4];
    for (int i = 0; i < 4; i++) {
        Shoal__StageTimes t = SHOAL__STAGE_TIMES__INIT;
        t.rank = i, t.has_expert_rows = t.has_sent_experts = t.has_exposed_sliding = t.has_travel_global = 1;
        t.expert_rows = (uint64_t)rows[i], t.sent_experts = 500000, t.exposed_sliding = 0.25, t.travel_global = 1;
        b[i] = (ProtobufCBinaryData){shoal__stage_times__pack(&t, packed[i]), packed[i]};
    }
    Shoal__GroupState g = SHOAL__GROUP_STATE__INIT, *gp = &g;
    Shoal__JobReply r = SHOAL__JOB_REPLY__INIT;
    g.group = "g", g.state = "ready";
    g.times = b, g.n_times = 4;
    r.group = &gp, r.n_group = 1;
    sh_closing c = {.output = "out", .outcomes = &o, .last = &r, .ep = 2};
    sh_buf text;
    sh_buf_init(&text, 0);
    CU_ASSERT_EQUAL_FATAL(sh_closing_text(&c, false, &text), SH_OK);
    CU_ASSERT_PTR_NOT_NULL(strstr((const char *)text.data,
                                  "experts    busiest rank 1.38 of the mean; 2.0 MB between ranks; waited 1.0 s of the "
                                  "4.0 s they took (sliding layers 1.0 of 0.0, global 0.0 of 4.0;"));
    sh_buf_clear(&text);
    CU_ASSERT_EQUAL_FATAL(sh_closing_text(&c, true, &text), SH_OK);
    CU_ASSERT_PTR_NOT_NULL(strstr((const char *)text.data, "\"expert_rows\":60"));
    c.ep = 1;
    sh_buf_clear(&text);
    CU_ASSERT_EQUAL_FATAL(sh_closing_text(&c, false, &text), SH_OK);
    CU_ASSERT_PTR_NULL(strstr((const char *)text.data, "experts    busiest"));
    sh_buf_release(&text);
}

int main(void) {
    const char *tmp = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/parts-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(folder)) return 1;
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("parts of run", NULL, NULL);
    CU_add_test(s, "launch", test_launch);
    CU_add_test(s, "launch beside others", test_launch_share);
    CU_add_test(s, "launch under Slurm", test_launch_slurm);
    CU_add_test(s, "a store taken over", test_taken_over);
    CU_add_test(s, "hosts", test_hosts);
    CU_add_test(s, "node list", test_nodelist);
    CU_add_test(s, "attempts", test_attempts);
    CU_add_test(s, "input", test_input);
    CU_add_test(s, "lengths of lines that pass", test_lengths);
    CU_add_test(s, "log", test_logtail);
    CU_add_test(s, "closing", test_closing);
    CU_add_test(s, "closing with experts", test_closing_experts);
    CU_basic_set_mode(CU_BRM_VERBOSE);
    CU_basic_run_tests();
    unsigned bad = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    SH_IGNORE(sh_path_remove(folder));
    return bad ? 1 : 0;
}
