/* Machines that are not here: synthetic topologies, and trees of /proc and /sys files written to a temporary folder. */
#include <CUnit/Basic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "common/file.h"
#include "partition/machine.h"

#define GIB ((uint64_t)1 << 30)
#define MIB ((uint64_t)1 << 20)
static char root[64];

static int begin(void) {
    snprintf(root, sizeof root, "/tmp/shoal-machine-XXXXXX");
    static const char *const slurm[] = {"SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"};
    for (int i = 0; i < 3; i++) unsetenv(slurm[i]);
    return mkdtemp(root) == NULL;
}

static int end(void) {
    return sh_path_remove(root) != SH_OK;
}

static void put(const char *path, const char *text) {
    char full[512], dir[512];
    snprintf(full, sizeof full, "%s%s", root, path);
    snprintf(dir, sizeof dir, "%s", full);
    *strrchr(dir, '/') = 0;
    CU_ASSERT_EQUAL_FATAL(sh_dir_make(dir), SH_OK);
    FILE *f = fopen(full, "w");
    CU_ASSERT_PTR_NOT_NULL_FATAL(f);
    fputs(text, f);
    fclose(f);
}

static void empty_root(void) {
    CU_ASSERT_EQUAL_FATAL(sh_path_remove(root), SH_OK);
    put("/proc/meminfo", "MemTotal:       100000000 kB\nMemFree:         1000 kB\nMemAvailable:   33554432 kB\n");
}

static sh_machine read_at(const char *topology) {
    static sh_machine m;
    memset(&m, 0, sizeof m);
    const sh_machine_origin o = {.root = root, .topology = topology};
    sh_status st = sh_machine_read(&o, &m);
    if (st != SH_OK) printf("%s\n", sh_error_text());
    CU_ASSERT_EQUAL_FATAL(st, SH_OK);
    return m;
}

static void test_cores(void) {
    empty_root();
    /* 2 packages with a NUMA node each, 4 cores of 2 threads; threads of a core are numbered side by side */
    sh_machine m = read_at("pack:2 [numa] core:4 pu:2");
    CU_ASSERT_EQUAL(m.n_packages, 2);
    CU_ASSERT_EQUAL(m.n_numa, 2);
    CU_ASSERT_EQUAL(m.n_allowed, 16);
    CU_ASSERT_EQUAL(m.n_cores, 8);
    CU_ASSERT_EQUAL_FATAL(m.n_cpus, 8);
    for (int i = 0; i < 8; i++) CU_ASSERT_EQUAL(m.cpus[i], 2 * i);
    CU_ASSERT_EQUAL(m.memory, 32 * GIB);
    CU_ASSERT_STRING_EQUAL(m.limit[m.memory_from].name, "MemAvailable");
    /* interleaved numbering: node 0 has the even CPUs; a share of half the ranks stays on one node */
    m = read_at("numa:2 core:2 pu:1(indexes=0,2,1,3)");
    CU_ASSERT_EQUAL_FATAL(m.n_cpus, 4);
    sh_machine_part p = sh_machine_share(&m, 0, 2);
    CU_ASSERT_EQUAL(p.n_cpus, 2);
    CU_ASSERT_EQUAL(p.cpus[0], 0);
    CU_ASSERT_EQUAL(p.cpus[1], 2);
    CU_ASSERT_EQUAL(p.memory, 16 * GIB);
}

/* The last level there is, of all caches that the CPUs reach; what is measured over is twice that, or the usual. */
static void test_caches(void) {
    empty_root();
    sh_machine m = read_at("pack:2 l3:2(size=33554432) l2:2(size=1048576) pu:1");
    CU_ASSERT_EQUAL(m.cache, 4 * 32 * MIB);
    CU_ASSERT_EQUAL(sh_machine_block(&m, 256 * MIB), 256 * MIB);
    CU_ASSERT_EQUAL(sh_machine_block(&m, 64 * MIB), 256 * MIB);
    m.cache = 300 * MIB;
    CU_ASSERT_EQUAL(sh_machine_block(&m, 512 * MIB), 1024 * MIB);
    m.memory = 1024 * MIB; /* a quarter at most */
    CU_ASSERT_EQUAL(sh_machine_block(&m, 512 * MIB), 256 * MIB);
    m.memory = 16 * MIB;
    CU_ASSERT_EQUAL(sh_machine_block(&m, 512 * MIB), 64 * MIB);
    m = read_at("pack:1 l2:4(size=2097152) pu:1");
    CU_ASSERT_EQUAL(m.cache, 4 * 2 * MIB);
    m = read_at("core:4 pu:1");
    CU_ASSERT_EQUAL(sh_machine_block(&m, 512 * MIB), 512 * MIB);
}

static void test_shares(void) {
    empty_root();
    sh_machine m = read_at("core:7 pu:1");
    for (int n = 1; n <= 7; n++) {
        int next = 0;
        for (int i = 0; i < n; i++) { /* every CPU once, every rank at least one */
            sh_machine_part p = sh_machine_share(&m, i, n);
            CU_ASSERT_TRUE(p.n_cpus >= 7 / n && p.n_cpus <= 7 / n + 1);
            for (int k = 0; k < p.n_cpus; k++) CU_ASSERT_EQUAL(p.cpus[k], next++);
        }
        CU_ASSERT_EQUAL(next, 7);
    }
    for (int i = 0; i < 20; i++) {
        sh_machine_part p = sh_machine_share(&m, i, 20);
        CU_ASSERT_EQUAL(p.n_cpus, 1);
        CU_ASSERT_EQUAL(p.cpus[0], i % 7);
        CU_ASSERT_EQUAL(p.memory, 32 * GIB / 20);
    }
    CU_ASSERT_EQUAL(sh_machine_share_bound(&m, 0, 1, 4).n_cpus, 7);
    CU_ASSERT_EQUAL(sh_machine_share_bound(&m, 0, 1, 4).memory, 8 * GIB);
    sh_machine_part p = sh_machine_share_bound(&m, 1, 2, 4); /* two to a socket, as mpirun binds them */
    CU_ASSERT_EQUAL(p.n_cpus, 4);
    CU_ASSERT_EQUAL(p.cpus[0], 3);
    CU_ASSERT_EQUAL(p.memory, 8 * GIB);
}

static void test_cgroup_v1(void) {
    empty_root();
    put("/proc/self/cgroup", "5:cpu,cpuacct:/a/b\n4:memory:/a/b\n0::/\n");
    put("/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n");
    put("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "8589934592\n"); /* 8 GiB, on the parent */
    put("/sys/fs/cgroup/memory/a/memory.usage_in_bytes", "3221225472\n"); /* 3 GiB, 1 of them cached files */
    put("/sys/fs/cgroup/memory/a/memory.stat", "cache 1\ntotal_inactive_file 805306368\ntotal_active_file 268435456\n");
    put("/sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us", "-1\n");
    put("/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "250000\n");
    put("/sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n");
    sh_machine m = read_at("core:8 pu:1");
    CU_ASSERT_EQUAL(m.memory, 6 * GIB);
    CU_ASSERT_STRING_EQUAL(m.limit[m.memory_from].name, "cgroup v1");
    CU_ASSERT_PTR_NOT_NULL(strstr(m.limit[m.memory_from].source, "/sys/fs/cgroup/memory/a/memory.limit_in_bytes"));
    CU_ASSERT_DOUBLE_EQUAL(m.quota, 2.5, 1e-9);
    CU_ASSERT_EQUAL(m.n_cpus, 2);
    CU_ASSERT_EQUAL(m.n_cores, 8);
}

static void test_cgroup_v2(void) {
    empty_root();
    put("/proc/self/cgroup", "0::/job/step\n");
    put("/sys/fs/cgroup/job/step/memory.max", "max\n");
    put("/sys/fs/cgroup/job/memory.max", "4294967296\n");
    put("/sys/fs/cgroup/job/memory.current", "5368709120\n"); /* beyond the limit for a moment */
    put("/sys/fs/cgroup/job/step/cpu.max", "max 100000\n");
    put("/sys/fs/cgroup/job/cpu.max", "50000 100000\n");
    sh_machine m = read_at("core:4 pu:1");
    CU_ASSERT_EQUAL(m.memory, 0);
    CU_ASSERT_STRING_EQUAL(m.limit[m.memory_from].name, "cgroup v2");
    CU_ASSERT_DOUBLE_EQUAL(m.quota, 0.5, 1e-9);
    CU_ASSERT_EQUAL(m.n_cpus, 1); /* half a CPU still gets a thread */
    put("/sys/fs/cgroup/job/memory.current", "1073741824\n");
    CU_ASSERT_EQUAL(read_at("core:4 pu:1").memory, 3 * GIB);
    put("/sys/fs/cgroup/job/cpu.max", "600000 100000\n"); /* six CPUs, which are on two of the eight nodes */
    m = read_at("numa:8 core:4 pu:1");
    CU_ASSERT_EQUAL(m.n_cpus, 6);
    CU_ASSERT_EQUAL(m.n_numa, 2);
    /* inside a container the group's own path is not there: the mount's own files count */
    empty_root();
    put("/proc/self/cgroup", "0::/../../elsewhere\n");
    put("/sys/fs/cgroup/memory.max", "2147483648\n");
    CU_ASSERT_EQUAL(read_at("core:4 pu:1").memory, 2 * GIB);
}

static void test_slurm(void) {
    empty_root();
    setenv("SLURM_MEM_PER_NODE", "2048", 1);
    CU_ASSERT_EQUAL(read_at("core:4 pu:1").memory, 2 * GIB);
    setenv("SLURM_MEM_PER_NODE", "0", 1); /* all of the node */
    CU_ASSERT_EQUAL(read_at("core:4 pu:1").memory, 32 * GIB);
    setenv("SLURM_MEM_PER_NODE", "many", 1);
    CU_ASSERT_EQUAL(read_at("core:4 pu:1").memory, 32 * GIB);
    unsetenv("SLURM_MEM_PER_NODE");
    setenv("SLURM_MEM_PER_CPU", "1024", 1);
    setenv("SLURM_CPUS_ON_NODE", "4", 1);
    sh_machine m = read_at("core:4 pu:1");
    CU_ASSERT_EQUAL(m.memory, 4 * GIB);
    CU_ASSERT_STRING_EQUAL(m.limit[m.memory_from].source, "SLURM_MEM_PER_CPU x SLURM_CPUS_ON_NODE");
    unsetenv("SLURM_MEM_PER_CPU");
    unsetenv("SLURM_CPUS_ON_NODE");
}

static void test_rlimit(void) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    CU_PASS("sanitizers map more than any limit");
#else
    empty_root();
    put("/proc/self/statm", "1000 10 10 0 0 0 0\n");
    struct rlimit old, r;
    CU_ASSERT_EQUAL_FATAL(getrlimit(RLIMIT_AS, &old), 0);
    r = old;
    r.rlim_cur = 24 * GIB;
    CU_ASSERT_EQUAL_FATAL(setrlimit(RLIMIT_AS, &r), 0);
    sh_machine m = read_at("core:4 pu:1");
    CU_ASSERT_EQUAL(m.memory, 24 * GIB - 1000u * (uint64_t)sysconf(_SC_PAGESIZE));
    CU_ASSERT_STRING_EQUAL(m.limit[m.memory_from].name, "address space");
    setrlimit(RLIMIT_AS, &old);
#endif
}

static void test_failures(void) {
    sh_machine m = {.n_cpus = -1};
    empty_root();
    const sh_machine_origin bad = {.root = root, .topology = "nonsense:("};
    CU_ASSERT_EQUAL(sh_machine_read(&bad, &m), SH_EIO);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "hwloc: no CPUs found in nonsense"));
    const sh_machine_origin nothing = {.root = "/nonexistent", .topology = "core:1 pu:1"};
    CU_ASSERT_EQUAL(sh_machine_read(&nothing, &m), SH_EIO);
    CU_ASSERT_STRING_EQUAL(sh_error_text(), "memory: neither /proc/meminfo nor a cgroup tells how much there is");
    CU_ASSERT_EQUAL(m.n_cpus, -1);
}

static void test_here(void) {
    static sh_machine m;
    CU_ASSERT_EQUAL_FATAL(sh_machine_read(NULL, &m), SH_OK);
    CU_ASSERT_TRUE(m.n_cpus >= 1 && m.n_cpus <= m.n_allowed && m.n_allowed <= sysconf(_SC_NPROCESSORS_CONF));
    CU_ASSERT_TRUE(m.memory > 0);
    sh_buf b;
    sh_buf_init(&b, 0);
    CU_ASSERT_EQUAL(sh_machine_print(&m, &b), SH_OK);
    CU_ASSERT_PTR_NOT_NULL(strstr((const char *)b.data, ": the least, so what counts\n"));
    CU_ASSERT_PTR_NOT_NULL(strstr((const char *)b.data, "threads        "));
    sh_buf_release(&b);
}

/* Groups that share a node: which CPUs each keeps, as "first+count" of the synthetic machine's numbers. */
static void test_groups(void) {
    static const struct {
        const char *topology;
        int groups;
        const char *kept;
    } all[] = {
        {"numa:2 core:4 pu:1", 1, "0+8"},
        {"numa:2 core:4 pu:1", 2, "0+4 4+4"},
        {"numa:4 core:2 pu:1", 2, "0+4 4+4"},
        {"numa:2 core:4 pu:1", 4, "0+2 2+2 4+2 6+2"},
        {"numa:2 core:3 pu:1", 4, "0+1 1+2 3+1 4+2"}, /* none over two nodes */
        {"numa:2 core:4 pu:1", 3, "0+2 2+3 5+3"},     /* no whole nodes */
        {"core:2 pu:1", 3, "0+1 1+1 0+1"},
        {"core:2 pu:1", 5, "0+1 1+1 0+1 1+1 0+1"},
    };
    empty_root();
    put("/proc/meminfo", "MemAvailable: 1048576 kB\n");
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        char text[200] = "";
        for (int k = 0; k < all[i].groups; k++) {
            sh_machine m = read_at(all[i].topology);
            sh_machine_keep_cpus(&m, k, all[i].groups);
            CU_ASSERT_FATAL(m.n_cpus > 0);
            CU_ASSERT_EQUAL(m.cpus[m.n_cpus - 1], m.cpus[0] + m.n_cpus - 1);
            size_t n = strlen(text);
            snprintf(text + n, sizeof text - n, "%s%d+%d", k ? " " : "", m.cpus[0], m.n_cpus);
        }
        CU_ASSERT_STRING_EQUAL(text, all[i].kept);
    }
}

int main(void) {
    CU_initialize_registry();
    CU_pSuite s = CU_add_suite("machine", begin, end);
    CU_add_test(s, "cores", test_cores);
    CU_add_test(s, "caches", test_caches);
    CU_add_test(s, "shares", test_shares);
    CU_add_test(s, "groups that share a node", test_groups);
    CU_add_test(s, "cgroup v1", test_cgroup_v1);
    CU_add_test(s, "cgroup v2", test_cgroup_v2);
    CU_add_test(s, "slurm", test_slurm);
    CU_add_test(s, "rlimit", test_rlimit);
    CU_add_test(s, "failures", test_failures);
    CU_add_test(s, "here", test_here);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + (CU_get_number_of_suites_failed() != 0);
    CU_cleanup_registry();
    return failed != 0;
}
