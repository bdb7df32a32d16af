/* Command lines of launchers. See launch.h. */
#include "cli/launch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void arg(sh_launch *l, const char *s) {
    if (l->argc < SH_LAUNCH_MOST - 1) l->argv[l->argc++] = s;
}

static void env(sh_launch *l, const char *s) {
    if (l->n_env < SH_LAUNCH_MOST - 1) l->env[l->n_env++] = s;
}

__attribute__((format(printf, 2, 3))) static const char *text(sh_launch *l, const char *fmt, ...) {
    char *s = NULL;
    __builtin_va_list ap;
    __builtin_va_start(ap, fmt);
    if (vasprintf(&s, fmt, ap) < 0) s = NULL;
    __builtin_va_end(ap);
    if (s && l->n_owned < SH_LAUNCH_MOST) l->owned[l->n_owned++] = s;
    return s ? s : "";
}

static void rank_command(sh_launch *l, const sh_launch_options *o, bool local) {
    arg(l, o->program);
    arg(l, "worker");
    arg(l, "--connect"), arg(l, o->endpoint);
    arg(l, "--group"), arg(l, o->group);
    if (o->keys) arg(l, "--keys"), arg(l, o->keys);
    if (o->threads) arg(l, "--threads"), arg(l, text(l, "%d", o->threads));
    if (o->parts > 1) arg(l, "--part"), arg(l, text(l, "%d/%d", o->part + 1, o->parts));
    if (o->memory) arg(l, "--memory"), arg(l, text(l, "%llu", (unsigned long long)o->memory));
    if (local) arg(l, "--link"), arg(l, "local"), arg(l, "-n"), arg(l, text(l, "%d", o->ranks));
}

static void mca(sh_launch *l, const char *name, const char *value) {
    env(l, text(l, "OMPI_MCA_%s=%s", name, value));
}

/* Settings go through the environment: one given twice on mpirun's command line is an error, and the user's must win.
 */
static void default_mca(sh_launch *l, const char *name, const char *value) {
    char var[96];
    snprintf(var, sizeof var, "OMPI_MCA_%s", name);
    if (!getenv(var)) mca(l, name, value);
}

/* Under Slurm mpirun starts its daemons as job steps, by srun, which by itself waits until no other step has the node
 * (several groups of it would never come up) and, in a job with --export=NONE, gives them no environment to find MPI
 * by. */
static void slurm_settings(sh_launch *l) {
    if (!getenv("SLURM_JOB_ID")) return;
    if (!getenv("SLURM_OVERLAP")) env(l, "SLURM_OVERLAP=1");
    env(l, "SLURM_EXPORT_ENV=ALL");
}

static void mpi_settings(sh_launch *l, const sh_launch_options *o) {
    default_mca(l, "pml", "ob1");
    default_mca(l, "btl", o->hosts ? "self,vader,tcp" : "self,vader");
    if (o->crowded) default_mca(l, "mpi_yield_when_idle", "1");
    /* A peer that vanishes without closing its sockets is noticed after 2 + 3 × 1 seconds instead of minutes. */
    default_mca(l, "oob_tcp_keepalive_time", "2");
    default_mca(l, "oob_tcp_keepalive_intvl", "1");
    default_mca(l, "oob_tcp_keepalive_probes", "3");
    /* What mpirun leaves when it is killed lies in the run's private folders, where the next run removes it. */
    if (o->tmp && *o->tmp && !o->hosts) mca(l, "orte_tmpdir_base", o->tmp);
    if (o->shm && *o->shm && !o->hosts) mca(l, "btl_vader_backing_directory", o->shm);
    slurm_settings(l);
    if (o->root) env(l, "OMPI_ALLOW_RUN_AS_ROOT=1"), env(l, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1");
}

static void mpirun_command(sh_launch *l, const sh_launch_options *o) {
    arg(l, "mpirun");
    arg(l, "--oversubscribe");
    arg(l, "--bind-to"), arg(l, "none"); /* ranks bind their own threads */
    if (o->hosts) {
        arg(l, "--host"), arg(l, o->hosts);
        const char *const pass[] = {"SHOAL_RUN", "SHOAL_GROUP", "SHOAL_ISA", "SHOAL_LOG"};
        for (size_t i = 0; i < sizeof pass / sizeof *pass; i++)
            if (i < 2 || getenv(pass[i])) arg(l, "-x"), arg(l, pass[i]); /* the first two are set above */
    }
    arg(l, "-n"), arg(l, text(l, "%d", o->ranks));
}

bool sh_launch_is_mpi(const char *launcher, const char *hosts, int ranks) {
    return launcher ? strcmp(launcher, "local") != 0 : ranks > 1 || hosts;
}

sh_status sh_launch_make(const sh_launch_options *o, sh_launch *out) {
    sh_launch l = {0};
    bool local = !sh_launch_is_mpi(o->launcher, o->hosts, o->ranks);
    if (local && o->hosts)
        SH_FAIL(SH_EINPUT, "--hosts: '%s' does not go with --launcher local: leave one of them out", o->hosts);
    if (o->mark) env(&l, o->mark);
    env(&l, text(&l, "SHOAL_GROUP=%s", o->group));
    env(&l, text(&l, "SHOAL_RANKS=%d", o->ranks));
    if (o->launcher && o->hosts) env(&l, text(&l, "SHOAL_HOSTS=%s", o->hosts));
    if (!local) mpi_settings(&l, o);
    if (!local && o->launcher) {
        /* The shell splits the command as the user would expect; the rank's command line follows as it is. */
        arg(&l, "/bin/sh"), arg(&l, "-c"), arg(&l, text(&l, "exec %s \"$@\"", o->launcher)), arg(&l, "shoal");
    } else if (!local) {
        mpirun_command(&l, o);
    }
    rank_command(&l, o, local);
    for (int i = 0; i < l.n_owned; i++)
        if (!l.owned[i]) SH_FAIL(SH_EMEMORY, "no memory for the launcher's command line");
    *out = l;
    return SH_OK;
}

void sh_launch_release(sh_launch *l) {
    for (int i = 0; i < l->n_owned; i++) free(l->owned[i]);
    *l = (sh_launch){0};
}
