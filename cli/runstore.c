/* The folder of a run. See runstore.h. */
#include "cli/runstore.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#include "common/file.h"
#include "coordinator/supervise.h"

#define SOCKET_PATH_MOST 107 /* sun_path less its 0 */
#define SOCKET_NAME_MOST 8   /* "/c99999" */

static sh_status write_json(const char *path, const json_t *j) {
    char *text = json_dumps(j, JSON_INDENT(1) | JSON_PRESERVE_ORDER);
    if (!text) SH_FAIL(SH_EMEMORY, "%s: no memory to write it", path);
    sh_status st = sh_file_write(path, text, strlen(text));
    free(text);
    return st;
}

/* job.json of the folder against the job at hand: the first member that differs is named. */
static sh_status check_job(const char *store, const char *path, const json_t *job) {
    SH_CLEANUP(sh_json_release) json_t *old = NULL;
    SH_TRY(sh_json_read(path, 1 << 20, &old));
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)job, key, value) {
        const char *was = json_string_value(json_object_get(old, key)), *now = json_string_value(value);
        if (!was || strcmp(was, now) != 0)
            SH_FAIL(SH_EINPUT,
                    "%s: belongs to another job: its %s was %.120s, now it is %.120s: finish that job, "
                    "remove the folder, or name another one with --store",
                    store, key, was ? was : "not set", now);
    }
    return SH_OK;
}

/* But for what a run puts there before it has the folder. */
static bool folder_is_empty(const char *path) {
    DIR *d = opendir(path);
    int n = 0;
    for (struct dirent *e; d && (e = readdir(d));)
        n += e->d_name[0] != '.' && strncmp(e->d_name, "job.json.tmp.", 13) != 0 &&
             strncmp(e->d_name, SH_RUN_SPOOL, strlen(SH_RUN_SPOOL)) != 0;
    if (d) closedir(d);
    return d && n == 0;
}

static void this_host(char *to, size_t size) {
    if (gethostname(to, size) != 0) to[0] = 0;
    to[size - 1] = 0;
}

/* What the owner's note says of a run on this node: alive → refused; dead → what it left is removed. */
static sh_status settle_owner(const char *note, sh_runstore *s) {
    if (!sh_file_exists(note)) return SH_OK;
    SH_CLEANUP(sh_json_release) json_t *j = NULL;
    SH_TRY(sh_json_read(note, 1 << 16, &j));
    const char *host = "", *ipc = "", *shm = "";
    int64_t pid = 0, started = 0;
    SH_TRY(sh_json_string(j, "host", &host));
    SH_TRY(sh_json_string(j, "ipc", &ipc));
    SH_TRY(sh_json_string(j, "shm", &shm));
    SH_TRY(sh_json_int(j, "pid", 0, INT_MAX, &pid));
    SH_TRY(sh_json_int(j, "started", 0, INT64_MAX, &started));
    char here[256];
    this_host(here, sizeof here);
    if (strcmp(host, here) != 0) return SH_OK; /* another node's: its run is fenced by the newer epoch */
    if (pid && pid != getpid() && sh_process_started((pid_t)pid) == (uint64_t)started)
        SH_FAIL(SH_EINPUT, "%s: shoal run with pid %d works on it: wait for it, or end it first (kill %d)", s->path,
                (int)pid, (int)pid);
    s->ended = sh_process_end_marked(s->mark, SH_RUN_GRACE);
    if (strstr(ipc, "/shoal-")) SH_TRY(sh_path_remove(ipc));
    if (strncmp(shm, "/dev/shm/shoal-", 15) == 0) SH_TRY(sh_path_remove(shm));
    return SH_OK;
}

/* Puts six random characters in place of the template's last six. */
static sh_status pick_name(char *template) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    unsigned char r[6];
    if (getrandom(r, sizeof r, 0) != (ssize_t)sizeof r) SH_FAIL(SH_EIO, "no random numbers: %s", strerror(errno));
    char *at = template + strlen(template) - sizeof r;
    for (size_t i = 0; i < sizeof r; i++) at[i] = letters[r[i] % (sizeof letters - 1)];
    return SH_OK;
}

/* Names the private folders: sockets and MPI's session files under TMPDIR, MPI's shared memory under /dev/shm. */
static sh_status name_private(sh_runstore *s, bool mpi) {
    const char *tmp = getenv("TMPDIR");
    if (!tmp || !*tmp) tmp = "/tmp";
    int n = snprintf(s->ipc, sizeof s->ipc, "%s/shoal-XXXXXX", tmp);
    if (n < 0 || n + SOCKET_NAME_MOST > SOCKET_PATH_MOST) {
        s->ipc[0] = 0;
        SH_FAIL(SH_ELIMIT, "TMPDIR: %s makes socket paths of %d bytes: allowed are %d: set TMPDIR to a shorter path",
                tmp, n + SOCKET_NAME_MOST, SOCKET_PATH_MOST);
    }
    SH_TRY(pick_name(s->ipc));
    if (!mpi) return SH_OK;
    snprintf(s->shm, sizeof s->shm, "/dev/shm/shoal-XXXXXX");
    return pick_name(s->shm);
}

static sh_status write_owner(const char *note, const sh_runstore *s) {
    char host[256];
    this_host(host, sizeof host);
    json_t *j = json_pack("{s:i, s:I, s:s, s:s, s:s}", "pid", (int)getpid(), "started",
                          (json_int_t)sh_process_started(getpid()), "host", host, "ipc", s->ipc, "shm", s->shm);
    if (!j) SH_FAIL(SH_EMEMORY, "%s: no memory to write it", note);
    sh_status st = write_json(note, j);
    json_decref(j);
    return st;
}

/* The note names the folders before they exist, so that whoever comes after a kill, at any moment, can remove them. */
static sh_status make_private(sh_runstore *s, const char *note, bool mpi) {
    sh_runstore named = *s;
    SH_TRY(name_private(&named, mpi));
    SH_TRY(write_owner(note, &named));
    if (mkdir(named.ipc, 0700) != 0)
        SH_FAIL(SH_EIO, "TMPDIR: %s: no folder can be made in it: %s", named.ipc, strerror(errno));
    memcpy(s->ipc, named.ipc, sizeof s->ipc);
    if (mpi && mkdir(named.shm, 0700) == 0) memcpy(s->shm, named.shm, sizeof s->shm); /* else MPI chooses by itself */
    return SH_OK;
}

sh_status sh_runstore_open(const char *path, const json_t *job, bool mpi, sh_runstore *out) {
    sh_runstore s = {0};
    char file[PATH_MAX + 32], note[PATH_MAX + 32], gone[PATH_MAX + 32];
    s.existed = sh_file_exists(path);
    if (!s.existed) {
        snprintf(gone, sizeof gone, "%s.removed", path);
        SH_TRY(sh_path_remove(gone)); /* a removal that was cut short */
        SH_TRY(sh_dir_make(path));
    }
    if (!realpath(path, s.path)) SH_FAIL(SH_EIO, "%s: %s", path, strerror(errno));
    snprintf(s.log, sizeof s.log, "%s/run.log", s.path);
    snprintf(s.mark, sizeof s.mark, "SHOAL_RUN=%s", s.path);
    snprintf(file, sizeof file, "%s/job.json", s.path);
    snprintf(note, sizeof note, "%s/owner", s.path);
    if (sh_file_exists(file)) {
        SH_TRY(settle_owner(note, &s));
        SH_TRY(check_job(path, file, job));
        SH_TRY(sh_file_writer_sweep(note));
    } else if (folder_is_empty(s.path)) {
        s.existed = false;
        SH_TRY(write_json(file, job));
    } else {
        SH_FAIL(SH_EINPUT, "%s: is not the store of a run: name another folder with --store", path);
    }
    sh_status st = make_private(&s, note, mpi);
    if (st != SH_OK) {
        if (s.ipc[0]) SH_IGNORE(sh_path_remove(s.ipc));
        if (s.shm[0]) SH_IGNORE(sh_path_remove(s.shm));
        return st;
    }
    *out = s;
    return SH_OK;
}

sh_status sh_runstore_owned(const sh_runstore *s, bool *yes) {
    char note[PATH_MAX + 32];
    SH_CLEANUP(sh_json_release) json_t *j = NULL;
    const char *ipc = "";
    *yes = false;
    snprintf(note, sizeof note, "%s/owner", s->path);
    if (!sh_file_exists(note)) return SH_OK; /* the newer run has left again, and its note with it */
    SH_TRY(sh_json_read(note, 1 << 16, &j));
    SH_TRY(sh_json_string(j, "ipc", &ipc));
    *yes = strcmp(ipc, s->ipc) == 0;
    return SH_OK;
}

sh_status sh_runstore_close(sh_runstore *s, bool remove_all) {
    char path[PATH_MAX + 32];
    bool mine;
    sh_status st = sh_runstore_owned(s, &mine);
    if (s->ipc[0]) SH_TRY(sh_path_remove(s->ipc));
    if (s->shm[0]) SH_TRY(sh_path_remove(s->shm));
    s->ipc[0] = s->shm[0] = 0;
    if (st != SH_OK || !mine) return st;
    snprintf(path, sizeof path, "%s/owner", s->path);
    if (!remove_all) return sh_path_remove(path); /* last: until then it names what there is to remove */
    snprintf(path, sizeof path, "%s.removed", s->path);
    SH_TRY(sh_path_remove(path));
    if (rename(s->path, path) != 0) SH_FAIL(SH_EIO, "%s: cannot be removed: %s", s->path, strerror(errno));
    return sh_path_remove(path);
}
