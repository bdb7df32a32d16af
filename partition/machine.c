/* See machine.h. The only file that includes hwloc. */
#include "partition/machine.h"

#include <hwloc.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define NO_LIMIT ((uint64_t)1 << 60) /* cgroup v1 writes a number near 2^63 for none */
#define GIB      0x1p30

#define LEAST_CACHES 2
#define LEAST_BLOCK  ((size_t)64 << 20)

/* --- small files ----------------------------------------------------------------------------------------------------
 */

/* The whole text of ROOT PATH, or "" when it cannot be read. */
static void read_text(const char *root, const char *path, char *to, size_t size) {
    char full[PATH_MAX];
    to[0] = 0;
    if (snprintf(full, sizeof full, "%s%s", root, path) >= (int)sizeof full) return;
    FILE *f = fopen(full, "re");
    if (!f) return;
    size_t n = fread(to, 1, size - 1, f);
    to[n] = 0;
    fclose(f);
}

/* The number after a key at the start of a line; false when absent. */
static bool number_after(const char *text, const char *key, uint64_t *out) {
    for (const char *s = text; s; s = strchr(s, '\n') ? strchr(s, '\n') + 1 : NULL) {
        if (strncmp(s, key, strlen(key)) != 0) continue;
        char *end;
        s += strlen(key);
        unsigned long long v = strtoull(s, &end, 10);
        if (end == s) return false;
        *out = v;
        return true;
    }
    return false;
}

static bool read_number(const char *root, const char *path, uint64_t *out) {
    char text[128];
    read_text(root, path, text, sizeof text);
    return number_after(text, "", out);
}

/* --- control groups -------------------------------------------------------------------------------------------------
 */

/* The path of this process's group in a hierarchy: controller "memory" (v1), or "" (v2). False when there is none. */
static bool cgroup_path(const char *root, const char *controller, char *to, size_t size) {
    char text[8192];
    read_text(root, "/proc/self/cgroup", text, sizeof text);
    for (char *line = text, *next; line && *line; line = next) { /* "4:memory:/path", "0::/path" */
        next = strchr(line, '\n');
        if (next) *next++ = 0;
        char *list = strchr(line, ':'), *path = list ? strchr(list + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        bool match = !*controller && !list[1];
        for (char *save, *name = strtok_r(list + 1, ",", &save); name && *controller; name = strtok_r(NULL, ",", &save))
            match |= strcmp(name, controller) == 0;
        if (match && snprintf(to, size, "%s", path) < (int)size) return true;
    }
    return false;
}

/* Calls visit on the group's folder and on each above it, up to the mount. Inside a container the group's own path may
 * not exist below the mount: then only the mount is visited. */
static void walk_up(const char *mount, const char *group, void (*visit)(void *arg, const char *folder), void *arg) {
    char folder[PATH_MAX];
    if (snprintf(folder, sizeof folder, "%s%s", mount, group) >= (int)sizeof folder) return;
    for (size_t min = strlen(mount); strlen(folder) >= min;) {
        size_t n = strlen(folder);
        if (n > min && folder[n - 1] == '/') {
            folder[n - 1] = 0;
            continue;
        }
        visit(arg, folder);
        char *slash = strrchr(folder, '/');
        if (n <= min || !slash) break;
        *slash = 0;
    }
}

typedef struct scan {
    const char *root;
    bool v1;
    sh_memory_limit *memory;
    sh_machine *machine;
} scan;

/* Page cache counts as used and is given back when asked: what is free is limit − (usage − cached files). */
static void visit_memory(void *arg, const char *folder) {
    const scan *s = arg;
    char path[PATH_MAX + 32], text[8192];
    uint64_t limit, used = 0, active = 0, inactive = 0;
    snprintf(path, sizeof path, "%s/%s", folder, s->v1 ? "memory.limit_in_bytes" : "memory.max");
    if (!read_number(s->root, path, &limit) || limit >= NO_LIMIT) return;
    char from[sizeof path];
    memcpy(from, path, sizeof path);
    snprintf(path, sizeof path, "%s/%s", folder, s->v1 ? "memory.usage_in_bytes" : "memory.current");
    (void)read_number(s->root, path, &used);
    snprintf(path, sizeof path, "%s/memory.stat", folder);
    read_text(s->root, path, text, sizeof text);
    (void)number_after(text, s->v1 ? "total_active_file " : "active_file ", &active);
    (void)number_after(text, s->v1 ? "total_inactive_file " : "inactive_file ", &inactive);
    uint64_t cached = active + inactive < used ? active + inactive : used, held = used - cached;
    uint64_t left = held < limit ? limit - held : 0;
    if (s->memory->set && s->memory->bytes <= left) return;
    s->memory->set = true;
    s->memory->bytes = left;
    snprintf(s->memory->source, sizeof s->memory->source, "%.200s, less what is used", from);
}

static void visit_quota(void *arg, const char *folder) {
    const scan *s = arg;
    char path[PATH_MAX + 32], text[128];
    uint64_t quota, period = 0;
    snprintf(path, sizeof path, "%s/%s", folder, s->v1 ? "cpu.cfs_quota_us" : "cpu.max");
    read_text(s->root, path, text, sizeof text);
    if (!*text || *text == '-' || strncmp(text, "max", 3) == 0 || !number_after(text, "", &quota)) return;
    char from[sizeof path];
    memcpy(from, path, sizeof path);
    if (s->v1) {
        snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
        (void)read_number(s->root, path, &period);
    } else if (strchr(text, ' ')) {
        (void)number_after(strchr(text, ' ') + 1, "", &period);
    }
    if (!period || !quota) return;
    double cpus = (double)quota / (double)period;
    if (s->machine->quota > 0 && s->machine->quota <= cpus) return;
    s->machine->quota = cpus;
    snprintf(s->machine->quota_source, sizeof s->machine->quota_source, "%.240s", from);
}

static void scan_cgroups(const char *root, sh_machine *m, sh_memory_limit *v1, sh_memory_limit *v2) {
    char group[PATH_MAX];
    scan s = {.root = root, .machine = m, .v1 = true, .memory = v1};
    if (cgroup_path(root, "memory", group, sizeof group)) walk_up("/sys/fs/cgroup/memory", group, visit_memory, &s);
    if (cgroup_path(root, "cpu", group, sizeof group)) walk_up("/sys/fs/cgroup/cpu", group, visit_quota, &s);
    if (!cgroup_path(root, "", group, sizeof group)) return;
    static const char *const mount[] = {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}; /* alone, or beside v1 */
    s.v1 = false;
    s.memory = v2;
    for (int i = 0; i < 2; i++) {
        walk_up(mount[i], group, visit_memory, &s);
        walk_up(mount[i], group, visit_quota, &s);
    }
}

/* --- memory ---------------------------------------------------------------------------------------------------------
 */

static void read_available(const char *root, sh_memory_limit *l) {
    char text[8192];
    uint64_t kib;
    read_text(root, "/proc/meminfo", text, sizeof text);
    if (!number_after(text, "MemAvailable:", &kib)) return;
    l->set = true;
    l->bytes = kib * 1024;
    snprintf(l->source, sizeof l->source, "/proc/meminfo");
}

static bool environment_number(const char *name, uint64_t *out) {
    const char *s = getenv(name);
    char *end;
    if (!s || *s < '0' || *s > '9') return false;
    unsigned long long v = strtoull(s, &end, 10);
    if (*end || v == 0 || v > (uint64_t)1 << 40) return false; /* 0 means all of the node's */
    *out = v;
    return true;
}

/* Slurm states MiB per node, or per CPU. */
static void read_slurm(sh_memory_limit *l) {
    uint64_t mib, cpus;
    if (environment_number("SLURM_MEM_PER_NODE", &mib)) {
        snprintf(l->source, sizeof l->source, "SLURM_MEM_PER_NODE");
    } else if (environment_number("SLURM_MEM_PER_CPU", &mib) && environment_number("SLURM_CPUS_ON_NODE", &cpus) &&
               cpus <= 1 << 16) {
        mib *= cpus;
        snprintf(l->source, sizeof l->source, "SLURM_MEM_PER_CPU x SLURM_CPUS_ON_NODE");
    } else {
        return;
    }
    l->set = true;
    l->bytes = mib < (uint64_t)1 << 40 ? mib << 20 : NO_LIMIT;
}

static void read_rlimit(const char *root, sh_memory_limit *l) {
    struct rlimit r;
    if (getrlimit(RLIMIT_AS, &r) != 0 || r.rlim_cur == RLIM_INFINITY) return;
    uint64_t pages = 0;
    (void)read_number(root, "/proc/self/statm", &pages);
    uint64_t used = pages * (uint64_t)sysconf(_SC_PAGESIZE);
    l->set = true;
    l->bytes = used < r.rlim_cur ? r.rlim_cur - used : 0;
    snprintf(l->source, sizeof l->source, "ulimit -v (RLIMIT_AS), less what is mapped");
}

static sh_status read_memory(const char *root, sh_machine *m) {
    static const char *const name[SH_MEMORY_LIMITS] = {"MemAvailable", "cgroup v1", "cgroup v2", "Slurm",
                                                       "address space"};
    for (int i = 0; i < SH_MEMORY_LIMITS; i++) m->limit[i] = (sh_memory_limit){.name = name[i]};
    read_available(root, &m->limit[0]);
    scan_cgroups(root, m, &m->limit[1], &m->limit[2]);
    read_slurm(&m->limit[3]);
    read_rlimit(root, &m->limit[4]);
    m->memory_from = -1;
    for (int i = 0; i < SH_MEMORY_LIMITS; i++)
        if (m->limit[i].set && (m->memory_from < 0 || m->limit[i].bytes < m->memory)) {
            m->memory = m->limit[i].bytes;
            m->memory_from = i;
        }
    if (m->memory_from < 0) SH_FAIL(SH_EIO, "memory: neither /proc/meminfo nor a cgroup tells how much there is");
    return SH_OK;
}

/* --- CPUs -----------------------------------------------------------------------------------------------------------
 */

/* The first logical CPU of each core in the set that lies in `within`, ascending. */
static void add_cores(hwloc_topology_t t, hwloc_const_cpuset_t set, hwloc_const_cpuset_t within, hwloc_bitmap_t taken,
                      int numa, sh_machine *m) {
    hwloc_obj_t core = NULL;
    hwloc_bitmap_t own = hwloc_bitmap_alloc();
    while (own && (core = hwloc_get_next_obj_by_type(t, HWLOC_OBJ_CORE, core))) {
        hwloc_bitmap_and(own, core->cpuset, set);
        hwloc_bitmap_and(own, own, within);
        int cpu = hwloc_bitmap_first(own);
        if (cpu < 0 || hwloc_bitmap_intersects(taken, core->cpuset) || m->n_cpus == SH_MAX_CPUS) continue;
        hwloc_bitmap_or(taken, taken, core->cpuset);
        m->numa[m->n_cpus] = (uint16_t)numa;
        m->cpus[m->n_cpus++] = cpu;
    }
    hwloc_bitmap_free(own);
}

static int count_inside(hwloc_topology_t t, hwloc_obj_type_t type, hwloc_const_cpuset_t set) {
    int n = 0;
    for (hwloc_obj_t o = NULL; (o = hwloc_get_next_obj_by_type(t, type, o));)
        n += hwloc_bitmap_intersects(o->cpuset, set);
    return n;
}

static uint64_t last_cache(hwloc_topology_t t, hwloc_const_cpuset_t set) {
    static const hwloc_obj_type_t level[] = {HWLOC_OBJ_L5CACHE, HWLOC_OBJ_L4CACHE, HWLOC_OBJ_L3CACHE,
                                             HWLOC_OBJ_L2CACHE};
    uint64_t bytes = 0;
    for (size_t i = 0; bytes == 0 && i < sizeof level / sizeof *level; i++)
        for (hwloc_obj_t o = NULL; (o = hwloc_get_next_obj_by_type(t, level[i], o));)
            if (hwloc_bitmap_intersects(o->cpuset, set)) bytes += o->attr->cache.size;
    return bytes;
}

static void list_cpus(hwloc_topology_t t, hwloc_const_cpuset_t set, hwloc_bitmap_t taken, sh_machine *m) {
    m->n_allowed = hwloc_bitmap_weight(set);
    m->n_packages = count_inside(t, HWLOC_OBJ_PACKAGE, set);
    m->cache = last_cache(t, set);
    m->machine_cpus = hwloc_bitmap_weight(hwloc_topology_get_complete_cpuset(t));
    int numa = 0;
    for (hwloc_obj_t node = NULL; (node = hwloc_get_next_obj_by_type(t, HWLOC_OBJ_NUMANODE, node));) {
        int before = m->n_cpus;
        add_cores(t, set, node->cpuset, taken, numa, m);
        numa += m->n_cpus > before;
    }
    add_cores(t, set, set, taken, numa, m); /* cores that no node claims */
    if (m->n_cpus == 0)                     /* no cores told, as in some containers: the logical CPUs themselves */
        for (int i = hwloc_bitmap_first(set); i >= 0 && m->n_cpus < SH_MAX_CPUS; i = hwloc_bitmap_next(set, i))
            m->cpus[m->n_cpus++] = i;
    m->n_cores = m->n_cpus;
}

static sh_status read_cpus(const char *synthetic, sh_machine *m) {
    hwloc_topology_t t;
    if (hwloc_topology_init(&t) != 0) SH_FAIL(SH_EIO, "hwloc: cannot start");
    bool ok = !synthetic || hwloc_topology_set_synthetic(t, synthetic) == 0;
    ok = ok && hwloc_topology_load(t) == 0;
    hwloc_bitmap_t set = hwloc_bitmap_alloc(), taken = hwloc_bitmap_alloc();
    ok = ok && set && taken;
    if (ok) {
        bool bound = !synthetic && hwloc_get_cpubind(t, set, HWLOC_CPUBIND_PROCESS) == 0 && !hwloc_bitmap_iszero(set);
        if (!bound) ok = hwloc_bitmap_copy(set, hwloc_topology_get_allowed_cpuset(t)) == 0;
        hwloc_bitmap_and(set, set, hwloc_topology_get_allowed_cpuset(t));
    }
    if (ok) list_cpus(t, set, taken, m);
    hwloc_bitmap_free(set);
    hwloc_bitmap_free(taken);
    hwloc_topology_destroy(t);
    if (!ok || m->n_cpus == 0)
        SH_FAIL(SH_EIO, "hwloc: no CPUs found%s%s", synthetic ? " in " : "", synthetic ? synthetic : "");
    return SH_OK;
}

/* More threads than the quota pays for would be stopped in the middle of each period. */
static void apply_quota(sh_machine *m) {
    if (m->quota <= 0) return;
    int n = m->quota < 1 ? 1 : m->quota < SH_MAX_CPUS ? (int)(m->quota + 1e-6) : SH_MAX_CPUS;
    if (n < m->n_cpus) m->n_cpus = n;
}

/* Nodes that have some of the CPUs that are left, not those that have memory alone. */
static int count_numa(const sh_machine *m) {
    return m->n_cpus > 0 ? m->numa[m->n_cpus - 1] + 1 : 1;
}

sh_status sh_machine_read(const sh_machine_origin *origin, sh_machine *out) {
    const char *root = origin && origin->root ? origin->root : "";
    sh_machine *m = calloc(1, sizeof *m);
    if (!m) SH_FAIL(SH_EMEMORY, "machine: no memory");
    sh_status st = read_cpus(origin ? origin->topology : NULL, m);
    if (st == SH_OK) st = read_memory(root, m);
    if (st == SH_OK) {
        apply_quota(m);
        m->n_numa = count_numa(m);
        *out = *m;
    }
    free(m);
    return st;
}

/* --- text and shares ------------------------------------------------------------------------------------------------
 */

sh_status sh_machine_print(const sh_machine *m, sh_buf *out) {
    SH_TRY(sh_buf_printf(out, "CPUs           %d cores of %d package%s; %d of %d logical CPUs (CPU set)\n", m->n_cores,
                         m->n_packages, m->n_packages == 1 ? "" : "s", m->n_allowed, m->machine_cpus));
    if (m->quota > 0)
        SH_TRY(sh_buf_printf(out, "CPU quota      %.2f CPUs (%s)\n", m->quota, m->quota_source));
    else
        SH_TRY(sh_buf_add_str(out, "CPU quota      none\n"));
    SH_TRY(
        sh_buf_printf(out, "threads        %d, on %d NUMA node%s\n", m->n_cpus, m->n_numa, m->n_numa == 1 ? "" : "s"));
    for (int i = 0; i < SH_MEMORY_LIMITS; i++)
        if (m->limit[i].set)
            SH_TRY(sh_buf_printf(out, "%-14s %.2f GiB (%s)%s\n", m->limit[i].name, (double)m->limit[i].bytes / GIB,
                                 m->limit[i].source, i == m->memory_from ? ": the least, so what counts" : ""));
    return SH_OK;
}

/* The run of CPUs [*lo, *hi) that lies in NUMA nodes [first, last). */
static void numa_run(const sh_machine *m, int first, int last, int *lo, int *hi) {
    for (*lo = 0; *lo < m->n_cpus && m->numa[*lo] < first;) ++*lo;
    for (*hi = *lo; *hi < m->n_cpus && m->numa[*hi] < last;) ++*hi;
}

size_t sh_machine_block(const sh_machine *m, size_t usual) {
    size_t bytes = usual;
    while (bytes < LEAST_CACHES * m->cache) bytes *= 2;
    while (bytes > LEAST_BLOCK && bytes > m->memory / 4) bytes /= 2;
    return bytes;
}

void sh_machine_keep_cpus(sh_machine *m, int k, int n) {
    int nodes = count_numa(m), lo = 0, hi = m->n_cpus;
    if (nodes % n == 0) {
        numa_run(m, k * (nodes / n), (k + 1) * (nodes / n), &lo, &hi);
        k = 0, n = 1;
    } else if (n % nodes == 0) {
        numa_run(m, k / (n / nodes), k / (n / nodes) + 1, &lo, &hi);
        n /= nodes;
        k %= n;
    }
    int all = hi - lo, from = lo + (int)((long)all * k / n), to = lo + (int)((long)all * (k + 1) / n);
    if (n > all) {
        from = lo + k % all;
        to = from + 1;
    }
    memmove(m->cpus, m->cpus + from, (size_t)(to - from) * sizeof *m->cpus);
    memmove(m->numa, m->numa + from, (size_t)(to - from) * sizeof *m->numa);
    m->n_cpus = to - from;
}

sh_machine_part sh_machine_share(const sh_machine *m, int i, int n) {
    int lo = (int)((long)m->n_cpus * i / n), hi = (int)((long)m->n_cpus * (i + 1) / n);
    sh_machine_part p = {.memory = m->memory / (uint64_t)n};
    if (n > m->n_cpus) {
        lo = i % m->n_cpus;
        hi = lo + 1;
    }
    p.cpus = m->cpus + lo;
    p.n_cpus = hi - lo;
    return p;
}

sh_machine_part sh_machine_share_bound(const sh_machine *m, int i, int same, int n) {
    sh_machine_part p = sh_machine_share(m, i, same);
    p.memory = m->memory / (uint64_t)n;
    return p;
}
