/*
 * The store in SQLite. See store.h and docs/decisions/0007-store.md.
 *
 * Invariants:
 *   1. Only the process that made the folder by mkdir writes in it.
 *   2. store.db appears in its folder by rename, whole: a folder without it never held anything.
 *   3. Write-ahead log, synced at each commit; its index is in this process's memory (exclusive mode), no file is
 * locked (VFS unix-none): nothing is asked of the file system but write, fsync, rename and mkdir.
 *   4. A commit counts only if no higher epoch exists after it. A newer incarnation makes its folder first and copies
 * then, so what counts is in its copy.
 */
#include "coordinator/store.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "common/clock.h"
#include "common/file.h"

#define FORMAT     "1" /* of the tables below */
#define COPY_TRIES 20
#define COPY_WAIT  0.25 /* seconds between them: a predecessor that still writes is about to notice and to end */
#define FILE_NAME  "store.db"
#define TAKEN_NAME "taken.db"
#define CACHE_KIB  65536

enum {
    Q_BEGIN,
    Q_COMMIT,
    Q_META_GET,
    Q_META_PUT,
    Q_BEGUN,
    Q_JOB_INSERT,
    Q_JOB_UPDATE,
    Q_JOBS,
    Q_REQUEST_ADD,
    Q_LINE_ADD,
    Q_REQUEST_GET,
    Q_PENDING,
    Q_PENDING_JOB,
    Q_FRONT,
    Q_LENGTH_ADD,
    Q_LENGTH_DROP,
    Q_AS_LONG,
    Q_SHORTER,
    Q_LENGTHS,
    Q_PROGRESS_ADD,
    Q_PROGRESS_GET,
    Q_PROGRESS_DROP,
    Q_RESULT_ADD,
    Q_REQUEST_DONE,
    Q_RESULTS,
    Q_ROUTING_PUT,
    Q_ROUTING,
    Q_COUNT
};

/* In the order in which read_request takes its columns. */
#define REQUEST                                                                                                        \
    "SELECT r.key, r.job, r.number, r.hash, r.custom_id, l.text, r.done, n.kind, n.length FROM request r JOIN line l " \
    "ON l.key = r.key LEFT JOIN length n ON n.key = r.key "

static const char *const sql[Q_COUNT] = {
    [Q_BEGIN] = "BEGIN IMMEDIATE",
    [Q_COMMIT] = "COMMIT",
    [Q_META_GET] = "SELECT value FROM meta WHERE key = ?1",
    [Q_META_PUT] = "INSERT OR REPLACE INTO meta(key, value) VALUES(?1, ?2)",
    [Q_BEGUN] = "SELECT EXISTS(SELECT 1 FROM result) OR EXISTS(SELECT 1 FROM progress)",
    [Q_JOB_INSERT] =
        "INSERT INTO job(name, options, state, closed, accepted, last, chain, done, errors, tokens_in, tokens_out, "
        "failure) VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
    [Q_JOB_UPDATE] =
        "UPDATE job SET name = ?1, options = ?2, state = ?3, closed = ?4, accepted = ?5, last = ?6, chain = ?7, "
        "done = ?8, errors = ?9, tokens_in = ?10, tokens_out = ?11, failure = ?12 WHERE id = ?13",
    [Q_JOBS] =
        "SELECT id, name, options, state, closed, accepted, last, chain, done, errors, tokens_in, tokens_out, failure "
        "FROM job ORDER BY id",
    [Q_REQUEST_ADD] = "INSERT INTO request(job, number, hash, custom_id, done) VALUES(?1, ?2, ?3, ?4, 0)",
    [Q_LINE_ADD] = "INSERT INTO line(key, text) VALUES(?1, ?2)",
    [Q_REQUEST_GET] = REQUEST "WHERE r.key = ?1",
    [Q_PENDING] = REQUEST "JOIN job j ON j.id = r.job WHERE r.done = 0 AND r.key > ?1 AND j.state NOT IN (3, 4) "
                          "ORDER BY r.key LIMIT ?2",
    [Q_PENDING_JOB] = REQUEST "WHERE r.done = 0 AND r.key > ?1 AND +r.job = ?3 ORDER BY r.key LIMIT ?2",
    /* + : not by the index on jobs, which would sort the whole rest of the job for each page */
    [Q_FRONT] = "SELECT r.key, r.job FROM request r JOIN job j ON j.id = r.job WHERE r.done = 0 AND r.key > ?1 AND "
                "j.state NOT IN (3, 4) ORDER BY r.key LIMIT 1",
    [Q_LENGTH_ADD] = "INSERT INTO length(key, job, kind, length) VALUES(?1, ?2, ?3, ?4)",
    [Q_LENGTH_DROP] = "DELETE FROM length WHERE key = ?1",
    [Q_AS_LONG] = "SELECT length, key FROM length WHERE job = ?1 AND kind = ?2 AND length = ?3 AND key > ?4 "
                  "ORDER BY key LIMIT 1",
    [Q_SHORTER] = "SELECT length, key FROM length WHERE job = ?1 AND kind = ?2 AND length < ?3 "
                  "ORDER BY length DESC, key LIMIT 1",
    [Q_LENGTHS] = "SELECT kind, sum(length), max(length) FROM length WHERE job = ?1 GROUP BY kind",
    [Q_PROGRESS_ADD] = "INSERT OR IGNORE INTO progress(key, score, place, tokens) VALUES(?1, ?2, ?3, ?4)",
    [Q_PROGRESS_GET] = "SELECT tokens FROM progress WHERE key = ?1 ORDER BY score, place",
    [Q_PROGRESS_DROP] = "DELETE FROM progress WHERE key = ?1",
    [Q_RESULT_ADD] = "INSERT OR IGNORE INTO result(key, job, number, row) VALUES(?1, ?2, ?3, ?4)",
    [Q_REQUEST_DONE] = "UPDATE request SET done = 1 WHERE key = ?1",
    [Q_RESULTS] = "SELECT cursor, number, row FROM result WHERE job = ?1 AND cursor > ?2 ORDER BY cursor",
    [Q_ROUTING_PUT] = "INSERT OR REPLACE INTO routing(rank, counts) VALUES(?1, ?2)",
    [Q_ROUTING] = "SELECT counts FROM routing ORDER BY rank",
};

static const char tables[] =
    "CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;"
    "CREATE TABLE job(id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, options TEXT NOT NULL, state "
    "INTEGER NOT "
    "NULL, closed INTEGER NOT NULL, accepted INTEGER NOT NULL, last INTEGER NOT NULL, chain INTEGER NOT NULL, done "
    "INTEGER NOT "
    "NULL, errors INTEGER NOT NULL, tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, failure TEXT);"
    "CREATE TABLE request(key INTEGER PRIMARY KEY AUTOINCREMENT, job INTEGER NOT NULL, number INTEGER NOT NULL, hash "
    "INTEGER NOT "
    "NULL, custom_id TEXT, done INTEGER NOT NULL);"
    "CREATE UNIQUE INDEX request_number ON request(job, number);"
    "CREATE UNIQUE INDEX request_custom_id ON request(job, custom_id) WHERE custom_id IS NOT NULL;"
    "CREATE INDEX request_pending ON request(key) WHERE done = 0;"
    "CREATE TABLE line(key INTEGER PRIMARY KEY, text BLOB NOT NULL);" /* apart: marking a request done rewrites no text
                                                                       */
    "CREATE TABLE progress(key INTEGER, score INTEGER, place INTEGER, tokens BLOB NOT NULL, PRIMARY KEY(key, score, "
    "place)) "
    "WITHOUT ROWID;"
    "CREATE TABLE result(cursor INTEGER PRIMARY KEY AUTOINCREMENT, key INTEGER NOT NULL UNIQUE, job INTEGER NOT NULL, "
    "number "
    "INTEGER NOT NULL, row BLOB NOT NULL);"
    "CREATE INDEX result_job ON result(job, cursor);"
    "INSERT INTO meta VALUES('format', '" FORMAT "');";

/* Came later: a store that is taken up may lack it. */
static const char later_tables[] =
    "CREATE TABLE IF NOT EXISTS routing(rank TEXT PRIMARY KEY, counts BLOB NOT NULL) WITHOUT ROWID;"
    "CREATE TABLE IF NOT EXISTS length(key INTEGER PRIMARY KEY, job INTEGER NOT NULL, kind INTEGER NOT NULL, length "
    "INTEGER NOT NULL);" /* of unanswered requests */
    "CREATE INDEX IF NOT EXISTS length_longest ON length(job, kind, length DESC, key);"
    /* A program that knows no lengths, and had this store for a while, has left those of what it answered. */
    "DELETE FROM length WHERE NOT EXISTS (SELECT 1 FROM request r WHERE r.key = length.key AND r.done = 0);";

struct sh_store {
    sqlite3 *db;
    sqlite3_stmt *q[Q_COUNT];
    uint64_t epoch;
    bool dirty;
    char dir[PATH_MAX - 64];
    char path[PATH_MAX];
};

/* --- errors --------------------------------------------------------------------------------------------------------
 */

static sh_status fail(sqlite3 *db, const char *path, const char *doing) {
    int code = db ? sqlite3_errcode(db) : SQLITE_NOMEM, os = db ? sqlite3_system_errno(db) : 0;
    switch (code & 0xff) {
    case SQLITE_FULL:
        SH_FAIL(SH_EIO, "%s: the disk is full: nothing was lost, make room and go on", path);
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
        SH_FAIL(SH_EFORMAT, "%s: damaged (%s): nothing was overwritten", path, sqlite3_errmsg(db));
    case SQLITE_NOMEM:
        SH_FAIL(SH_EMEMORY, "%s: no memory for %s", path, doing);
    default:
        if (os == ENOSPC || os == EDQUOT || os == EFBIG)
            SH_FAIL(SH_EIO, "%s: cannot grow (%s): nothing was lost, make room and go on", path, strerror(os));
        if (code == SQLITE_IOERR_WRITE || code == SQLITE_IOERR_FSYNC)
            SH_FAIL(SH_EIO, "%s: %s: a write was refused (file size limit, quota or device): nothing was lost", path,
                    doing);
        SH_FAIL(SH_EIO, "%s: %s: %s%s%s", path, doing, sqlite3_errmsg(db), os ? ": " : "", os ? strerror(os) : "");
    }
}

/* --- epochs --------------------------------------------------------------------------------------------------------
 */

static uint64_t epoch_of(const char *name) {
    if (name[0] < '1' || name[0] > '9' || strlen(name) > 18) return 0;
    for (const char *c = name; *c; c++)
        if (*c < '0' || *c > '9') return 0;
    return strtoull(name, NULL, 10);
}

/* The highest epoch below `below` (0: any), of those with a store.db when `whole`; 0: none. */
static sh_status highest_epoch(const char *dir, uint64_t below, bool whole, uint64_t *out) {
    DIR *d = opendir(dir);
    if (!d) SH_FAIL(SH_EIO, "%s: cannot be read: %s", dir, strerror(errno));
    uint64_t best = 0;
    for (struct dirent *e; (e = readdir(d));) {
        uint64_t n = epoch_of(e->d_name);
        if (n <= best || (below && n >= below)) continue;
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s/%" PRIu64 "/" FILE_NAME, dir, n);
        if (!whole || sh_file_exists(path)) best = n;
    }
    closedir(d);
    *out = best;
    return SH_OK;
}

static sh_status claim_epoch(sh_store *s) {
    for (;;) {
        uint64_t top = 0;
        SH_TRY(highest_epoch(s->dir, 0, false, &top));
        snprintf(s->path, sizeof s->path, "%s/%" PRIu64, s->dir, top + 1);
        if (mkdir(s->path, 0700) == 0) {
            s->epoch = top + 1;
            return SH_OK;
        }
        if (errno != EEXIST) SH_FAIL(SH_EIO, "%s: cannot be created: %s", s->path, strerror(errno));
    }
}

sh_status sh_store_check_fence(const sh_store *s) {
    uint64_t top = 0;
    SH_TRY(highest_epoch(s->dir, 0, false, &top));
    if (top > s->epoch)
        SH_FAIL(SH_ESTATE,
                "%s: a newer coordinator (epoch %" PRIu64 ") has taken over from this one (epoch %" PRIu64 ")", s->dir,
                top, s->epoch);
    if (top < s->epoch) SH_FAIL(SH_EIO, "%s: this coordinator's folder is gone", s->path);
    return SH_OK;
}

/* --- taking over ---------------------------------------------------------------------------------------------------
 */

static void sync_folder(const char *path) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    (void)sh_file_ops.fsync(fd); /* some file systems refuse this for folders */
    close(fd);
}

static sh_status copy_bytes(int from, int to, const char *source, const char *target) {
    enum { CHUNK = 1 << 20 };
    char *buf = malloc(CHUNK);
    if (!buf) SH_FAIL(SH_EMEMORY, "%s: no memory to copy it", source);
    sh_status st = SH_OK;
    for (ssize_t n; st == SH_OK && (n = read(from, buf, CHUNK)) != 0;) {
        if (n < 0) st = sh_error_set(SH_EIO, __FILE__, __LINE__, "%s: cannot be read: %s", source, strerror(errno));
        for (ssize_t done = 0, w; st == SH_OK && done < n; done += w) {
            w = sh_file_ops.write(to, buf + done, (size_t)(n - done));
            if (w <= 0) {
                st = sh_error_set(SH_EIO, __FILE__, __LINE__, "%s: cannot be written: %s", target,
                                  strerror(w < 0 ? errno : ENOSPC));
                w = 0;
            }
        }
    }
    if (st == SH_OK && sh_file_ops.fsync(to) != 0)
        st = sh_error_set(SH_EIO, __FILE__, __LINE__, "%s: cannot be synced: %s", target, strerror(errno));
    free(buf);
    return st;
}

/* Copies a file; *made false when there is none. */
static sh_status copy_file(const char *source, const char *target, bool *made) {
    *made = false;
    int from = open(source, O_RDONLY | O_CLOEXEC);
    if (from < 0 && errno == ENOENT) return SH_OK;
    if (from < 0) SH_FAIL(SH_EIO, "%s: cannot be opened: %s", source, strerror(errno));
    int to = open(target, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    sh_status st = to < 0
                       ? sh_error_set(SH_EIO, __FILE__, __LINE__, "%s: cannot be created: %s", target, strerror(errno))
                       : copy_bytes(from, to, source, target);
    close(from);
    if (to >= 0) close(to);
    *made = st == SH_OK;
    return st;
}

typedef struct file_stamp {
    off_t size;
    struct timespec changed;
    ino_t inode;
} file_stamp;

static file_stamp stamp(const char *path) {
    struct stat sb;
    if (stat(path, &sb) != 0) return (file_stamp){.size = -1};
    return (file_stamp){sb.st_size, sb.st_mtim, sb.st_ino};
}

static bool stamp_equal(file_stamp a, file_stamp b) {
    return a.size == b.size && a.inode == b.inode && a.changed.tv_sec == b.changed.tv_sec &&
           a.changed.tv_nsec == b.changed.tv_nsec;
}

/* A predecessor that still runs may move pages from log to file while they are copied: copied again until nothing
 * moved. */
static sh_status copy_store(const char *source, const char *target) {
    char source_wal[PATH_MAX + 80], target_wal[PATH_MAX + 80];
    snprintf(source_wal, sizeof source_wal, "%s-wal", source);
    snprintf(target_wal, sizeof target_wal, "%s-wal", target);
    for (int i = 0; i < COPY_TRIES; i++) {
        file_stamp db = stamp(source), wal = stamp(source_wal);
        bool made, made_wal;
        SH_TRY(copy_file(source, target, &made));
        if (!made) SH_FAIL(SH_EIO, "%s: has gone while it was copied", source);
        SH_TRY(copy_file(source_wal, target_wal, &made_wal));
        if (!made_wal) unlink(target_wal);
        if (stamp_equal(db, stamp(source)) && stamp_equal(wal, stamp(source_wal))) return SH_OK;
        sh_sleep(COPY_WAIT);
    }
    SH_FAIL(SH_ESTATE, "%s: another coordinator keeps writing it", source);
}

/* --- opening -------------------------------------------------------------------------------------------------------
 */

static sh_status execute(sqlite3 *db, const char *path, const char *text) {
    if (sqlite3_exec(db, text, NULL, NULL, NULL) != SQLITE_OK) return fail(db, path, "cannot be set up");
    return SH_OK;
}

static sh_status open_db(const char *path, bool create, sqlite3 **out) {
    sqlite3 *db = NULL;
    int flags = SQLITE_OPEN_READWRITE | (create ? SQLITE_OPEN_CREATE : 0) | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE;
    sh_status st = SH_OK;
    if (sqlite3_open_v2(path, &db, flags, "unix-none") != SQLITE_OK) st = fail(db, path, "cannot be opened");
    if (st == SH_OK)
        st = execute(db, path,
                     "PRAGMA locking_mode = EXCLUSIVE; PRAGMA page_size = 4096; PRAGMA journal_mode = WAL;"
                     "PRAGMA synchronous = FULL; PRAGMA temp_store = MEMORY;");
    if (st != SH_OK) {
        sqlite3_close(db);
        return st;
    }
    *out = db;
    return SH_OK;
}

static int first_text(void *to, int n, char **value, char **name) {
    (void)name;
    char *text = to;
    if (n > 0) snprintf(text, 200, "%s", value[0] ? value[0] : "");
    for (char *end; (end = strchr(text, '\n'));) *end = ' '; /* an error is one line */
    return 1;                                                /* the first row is enough */
}

static sh_status check_db(sqlite3 *db, const char *source) {
    char said[200] = "";
    int rc = sqlite3_exec(db, "PRAGMA quick_check(1)", first_text, said, NULL);
    if (rc != SQLITE_OK && rc != SQLITE_ABORT) return fail(db, source, "cannot be read");
    if (strcmp(said, "ok") != 0) SH_FAIL(SH_EFORMAT, "%s: damaged (%s): nothing was overwritten", source, said);
    rc = sqlite3_exec(db, "SELECT value FROM meta WHERE key = 'format'", first_text, said, NULL);
    if (rc != SQLITE_OK && rc != SQLITE_ABORT) return fail(db, source, "is not a store of shoal");
    if (strcmp(said, FORMAT) != 0) SH_FAIL(SH_EFORMAT, "%s: format %s: this program reads " FORMAT, source, said);
    return SH_OK;
}

/* Fills taken.db, by copy or anew, and gives it its name. */
static sh_status fill_folder(sh_store *s, const char *folder, uint64_t before) {
    char taken[PATH_MAX + 64], source[PATH_MAX + 64];
    snprintf(taken, sizeof taken, "%s/" TAKEN_NAME, folder);
    snprintf(source, sizeof source, "%s/%" PRIu64 "/" FILE_NAME, s->dir, before);
    if (before) SH_TRY(copy_store(source, taken));
    sqlite3 *db = NULL;
    sh_status st = open_db(taken, !before, &db);
    if (st == SH_OK) st = before ? check_db(db, source) : execute(db, taken, tables);
    if (st == SH_OK) st = execute(db, taken, "PRAGMA wal_checkpoint(TRUNCATE)");
    if (db && sqlite3_close(db) != SQLITE_OK && st == SH_OK) st = fail(db, taken, "cannot be closed");
    if (st != SH_OK && before) return sh_error_prefix(st, "taking over %s", source);
    SH_TRY(st);
    if (sh_file_ops.rename(taken, s->path) != 0) SH_FAIL(SH_EIO, "%s: cannot be renamed: %s", taken, strerror(errno));
    sync_folder(folder);
    sync_folder(s->dir);
    return SH_OK;
}

static void remove_older(const sh_store *s, uint64_t before) {
    for (uint64_t n = before; n;) {
        char path[PATH_MAX];
        if (highest_epoch(s->dir, n, false, &n) != SH_OK || !n) return;
        snprintf(path, sizeof path, "%s/%" PRIu64, s->dir, n);
        SH_IGNORE(sh_path_remove(path));
    }
}

static sh_status open_own(sh_store *s) {
    char pragma[64];
    SH_TRY(open_db(s->path, false, &s->db));
    snprintf(pragma, sizeof pragma, "PRAGMA cache_size = -%d", CACHE_KIB);
    SH_TRY(execute(s->db, s->path, pragma));
    SH_TRY(execute(s->db, s->path, later_tables));
    for (int i = 0; i < Q_COUNT; i++)
        if (sqlite3_prepare_v3(s->db, sql[i], -1, SQLITE_PREPARE_PERSISTENT, &s->q[i], NULL) != SQLITE_OK)
            return fail(s->db, s->path, "its tables are not as expected");
    return SH_OK;
}

/* A newer incarnation removes the folders of older ones, also while these begin: that is why, then. */
static sh_status unless_superseded(const sh_store *s, sh_status st) {
    char why[1024];
    snprintf(why, sizeof why, "%s", sh_error_text());
    return sh_store_check_fence(s) == SH_ESTATE ? SH_ESTATE : sh_error_set(st, __FILE__, __LINE__, "%s", why);
}

static sh_status store_start(sh_store *s, const char *dir) {
    if ((size_t)snprintf(s->dir, sizeof s->dir, "%s", dir) >= sizeof s->dir)
        SH_FAIL(SH_ELIMIT, "%s: path too long", dir);
    SH_TRY(sh_dir_make(dir));
    SH_TRY(claim_epoch(s));
    char folder[PATH_MAX];
    memcpy(folder, s->path, sizeof folder);
    snprintf(s->path, sizeof s->path, "%s/%" PRIu64 "/" FILE_NAME, s->dir, s->epoch);
    uint64_t before = 0;
    SH_TRY(highest_epoch(s->dir, s->epoch, true, &before));
    sh_status st = fill_folder(s, folder, before);
    if (st != SH_OK) { /* what is left of a copy is of no use and may fill the disk; the epoch stays claimed */
        char path[PATH_MAX + 64];
        for (int i = 0; i < 2; i++) {
            snprintf(path, sizeof path, "%s/" TAKEN_NAME "%s", folder, i ? "-wal" : "");
            unlink(path);
        }
        return unless_superseded(s, st);
    }
    st = open_own(s);
    if (st != SH_OK) return unless_superseded(s, st);
    SH_TRY(sh_store_check_fence(s));
    remove_older(s, before);
    return SH_OK;
}

sh_status sh_store_open(const char *dir, sh_store **out) {
    sh_store *s = calloc(1, sizeof *s);
    if (!s) SH_FAIL(SH_EMEMORY, "%s: no memory for the store", dir);
    sh_status st = store_start(s, dir);
    if (st != SH_OK) {
        sh_store_close(&s);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = s;
    return SH_OK;
}

void sh_store_close(sh_store **sp) {
    sh_store *s = *sp;
    if (!s) return;
    for (int i = 0; i < Q_COUNT; i++) sqlite3_finalize(s->q[i]);
    if (s->db && s->dirty) (void)sqlite3_exec(s->db, "ROLLBACK", NULL, NULL, NULL);
    sqlite3_close(s->db);
    free(s);
    *sp = NULL;
}

uint64_t sh_store_epoch(const sh_store *s) {
    return s->epoch;
}

bool sh_store_is_dirty(const sh_store *s) {
    return s->dirty;
}

sh_status sh_store_limit(sh_store *s, int pages) {
    char text[64];
    snprintf(text, sizeof text, "PRAGMA max_page_count = %d", pages);
    return execute(s->db, s->path, text);
}

/* --- statements ----------------------------------------------------------------------------------------------------
 */

static sqlite3_stmt *query(sh_store *s, int which) {
    sqlite3_reset(s->q[which]);
    sqlite3_clear_bindings(s->q[which]);
    return s->q[which];
}

/* Hashes use all 64 bits; SQLite's integers are signed. */
static void bind_u64(sqlite3_stmt *q, int at, uint64_t v) {
    (void)sqlite3_bind_int64(q, at, (sqlite3_int64)v);
}

static void bind_text(sqlite3_stmt *q, int at, const char *text) {
    if (text) (void)sqlite3_bind_text(q, at, text, -1, SQLITE_STATIC);
}

static void bind_blob(sqlite3_stmt *q, int at, const void *p, size_t n) {
    (void)sqlite3_bind_blob64(q, at, p ? p : "", n, SQLITE_STATIC);
}

static uint64_t column_u64(sqlite3_stmt *q, int at) {
    return (uint64_t)sqlite3_column_int64(q, at);
}

/* Runs a statement without rows; bindings are released. */
static sh_status run(sh_store *s, sqlite3_stmt *q, const char *doing) {
    int rc = sqlite3_step(q);
    sh_status st = rc == SQLITE_DONE ? SH_OK : fail(s->db, s->path, doing);
    sqlite3_reset(q);
    sqlite3_clear_bindings(q);
    return st;
}

/* Steps to the next row. */
static sh_status next(sh_store *s, sqlite3_stmt *q, const char *doing, bool *row) {
    int rc = sqlite3_step(q);
    *row = rc == SQLITE_ROW;
    if (rc == SQLITE_ROW || rc == SQLITE_DONE) return SH_OK;
    sh_status st = fail(s->db, s->path, doing);
    sqlite3_reset(q);
    return st;
}

static sh_status begin(sh_store *s) {
    if (s->dirty) return SH_OK;
    SH_TRY(run(s, query(s, Q_BEGIN), "a transaction cannot begin"));
    s->dirty = true;
    return SH_OK;
}

sh_status sh_store_commit(sh_store *s) {
    if (s->dirty) {
        SH_TRY(sh_store_check_fence(s));
        SH_TRY(run(s, query(s, Q_COMMIT), "cannot be committed"));
        s->dirty = false;
    }
    return sh_store_check_fence(s);
}

/* Whether anything was computed: until then a store is bound to nothing. */
static sh_status has_begun(sh_store *s, bool *begun) {
    sqlite3_stmt *q = query(s, Q_BEGUN);
    bool row;
    SH_TRY(next(s, q, "cannot be read", &row));
    *begun = row && sqlite3_column_int(q, 0);
    sqlite3_reset(q);
    return SH_OK;
}

sh_status sh_store_pin(sh_store *s, const char *key, const char *value) {
    sqlite3_stmt *q = query(s, Q_META_GET);
    bind_text(q, 1, key);
    bool row, begun = false;
    SH_TRY(next(s, q, "cannot be read", &row));
    char have[512] = "";
    if (row) snprintf(have, sizeof have, "%s", (const char *)sqlite3_column_text(q, 0));
    sqlite3_reset(q);
    if (row && strcmp(have, value) == 0) return SH_OK;
    if (row) SH_TRY(has_begun(s, &begun));
    if (begun)
        SH_FAIL(SH_EINPUT, "%s: %s was %s when this store began: it cannot go on with %s", s->dir, key, have, value);
    SH_TRY(begin(s));
    q = query(s, Q_META_PUT);
    bind_text(q, 1, key);
    bind_text(q, 2, value);
    return run(s, q, "cannot be written");
}

/* --- jobs ----------------------------------------------------------------------------------------------------------
 */

const char *sh_job_state_name(sh_job_state s) {
    static const char *const names[] = {"receiving", "running", "done", "cancelled", "failed"};
    return names[s];
}

void sh_job_release(sh_job *j) {
    free(j->name);
    free(j->options);
    free(j->failure);
    *j = (sh_job){0};
}

sh_status sh_store_job_put(sh_store *s, sh_job *j) {
    SH_TRY(begin(s));
    sqlite3_stmt *q = query(s, j->id ? Q_JOB_UPDATE : Q_JOB_INSERT);
    const uint64_t number[] = {(uint64_t)j->state, j->closed,    j->accepted,  j->last, j->chain, j->done,
                               j->errors,          j->tokens_in, j->tokens_out};
    bind_text(q, 1, j->name);
    bind_text(q, 2, j->options);
    for (int i = 0; i < 9; i++) bind_u64(q, 3 + i, number[i]);
    bind_text(q, 12, j->failure);
    if (j->id) bind_u64(q, 13, j->id);
    SH_TRY(run(s, q, "a job cannot be written"));
    if (!j->id) j->id = (uint64_t)sqlite3_last_insert_rowid(s->db);
    return SH_OK;
}

static char *column_copy(sqlite3_stmt *q, int at) {
    const char *t = (const char *)sqlite3_column_text(q, at);
    return t ? strdup(t) : NULL;
}

static sh_job read_job(sqlite3_stmt *q) {
    return (sh_job){.id = column_u64(q, 0),
                    .name = column_copy(q, 1),
                    .options = column_copy(q, 2),
                    .state = (sh_job_state)(sqlite3_column_int(q, 3) % (SH_JOB_FAILED + 1)),
                    .closed = sqlite3_column_int(q, 4) != 0,
                    .accepted = column_u64(q, 5),
                    .last = column_u64(q, 6),
                    .chain = column_u64(q, 7),
                    .done = column_u64(q, 8),
                    .errors = column_u64(q, 9),
                    .tokens_in = column_u64(q, 10),
                    .tokens_out = column_u64(q, 11),
                    .failure = column_copy(q, 12)};
}

sh_status sh_store_jobs(sh_store *s, sh_job_fn *fn, void *ctx) {
    sqlite3_stmt *q = query(s, Q_JOBS);
    sh_status st;
    for (bool row = true;;) {
        SH_TRY_OR(st, next(s, q, "jobs cannot be read", &row), break);
        if (!row) break;
        sh_job j = read_job(q);
        SH_TRY_OR(st, fn(ctx, &j), break);
    }
    sqlite3_reset(q);
    return st;
}

/* --- requests ------------------------------------------------------------------------------------------------------
 */

static int insert_request(sh_store *s, const sh_stored_request *r, const char *custom_id) {
    sqlite3_stmt *q = query(s, Q_REQUEST_ADD);
    bind_u64(q, 1, r->job);
    bind_u64(q, 2, r->number);
    bind_u64(q, 3, r->hash);
    bind_text(q, 4, custom_id);
    int rc = sqlite3_step(q);
    sqlite3_reset(q);
    return rc;
}

static sh_status add_length(sh_store *s, const sh_stored_request *r, uint64_t key) {
    sqlite3_stmt *q = query(s, Q_LENGTH_ADD);
    bind_u64(q, 1, key);
    bind_u64(q, 2, r->job);
    (void)sqlite3_bind_int(q, 3, r->kind);
    (void)sqlite3_bind_int64(q, 4, r->length);
    return run(s, q, "a length cannot be written");
}

sh_status sh_store_request_add(sh_store *s, const sh_stored_request *r, uint64_t *key, bool *duplicate) {
    SH_TRY(begin(s));
    bool twice = false;
    int rc = insert_request(s, r, r->custom_id);
    if (rc == SQLITE_CONSTRAINT_UNIQUE &&
        r->custom_id) { /* the number is new (the caller's order), so it is the name */
        twice = true;
        rc = insert_request(s, r, NULL);
    }
    if (rc != SQLITE_DONE) return fail(s->db, s->path, "a request cannot be written");
    uint64_t id = (uint64_t)sqlite3_last_insert_rowid(s->db);
    sqlite3_stmt *q = query(s, Q_LINE_ADD);
    bind_u64(q, 1, id);
    bind_blob(q, 2, r->line, r->len);
    SH_TRY(run(s, q, "a line cannot be written"));
    if (r->length > 0) SH_TRY(add_length(s, r, id));
    *key = id;
    *duplicate = twice;
    return SH_OK;
}

static sh_stored_request read_request(sqlite3_stmt *q) {
    return (sh_stored_request){.key = column_u64(q, 0),
                               .job = column_u64(q, 1),
                               .number = column_u64(q, 2),
                               .hash = column_u64(q, 3),
                               .custom_id = (const char *)sqlite3_column_text(q, 4),
                               .line = sqlite3_column_blob(q, 5),
                               .len = (size_t)sqlite3_column_bytes(q, 5),
                               .done = sqlite3_column_int(q, 6) != 0,
                               .kind = sqlite3_column_int(q, 7),
                               .length = sqlite3_column_int64(q, 8)};
}

sh_status sh_store_request_get(sh_store *s, uint64_t key, sh_request_fn *fn, void *ctx, bool *found) {
    sqlite3_stmt *q = query(s, Q_REQUEST_GET);
    bind_u64(q, 1, key);
    bool row;
    SH_TRY(next(s, q, "a request cannot be read", &row));
    sh_status st = SH_OK;
    if (row) {
        sh_stored_request r = read_request(q);
        st = fn(ctx, &r);
    }
    sqlite3_reset(q);
    if (st == SH_OK) *found = row;
    return st;
}

sh_status sh_store_pending(sh_store *s, uint64_t job, uint64_t after, int most, sh_request_fn *fn, void *ctx) {
    sqlite3_stmt *q = query(s, job ? Q_PENDING_JOB : Q_PENDING);
    bind_u64(q, 1, after);
    (void)sqlite3_bind_int(q, 2, most);
    if (job) bind_u64(q, 3, job);
    sh_status st;
    for (bool row = true;;) {
        SH_TRY_OR(st, next(s, q, "requests cannot be read", &row), break);
        if (!row) break;
        sh_stored_request r = read_request(q);
        SH_TRY_OR(st, fn(ctx, &r), break);
    }
    sqlite3_reset(q);
    return st;
}

sh_status sh_store_front(sh_store *s, uint64_t after, uint64_t *key, uint64_t *job) {
    sqlite3_stmt *q = query(s, Q_FRONT);
    bind_u64(q, 1, after);
    bool row;
    SH_TRY(next(s, q, "requests cannot be read", &row));
    *key = row ? column_u64(q, 0) : 0;
    if (row) *job = column_u64(q, 1);
    sqlite3_reset(q);
    return SH_OK;
}

sh_status sh_store_longest(sh_store *s, uint64_t job, int kind, int64_t *length, uint64_t *key, bool *found) {
    bool row = false;
    for (int which = Q_AS_LONG; !row && which <= Q_SHORTER; which++) {
        sqlite3_stmt *q = query(s, which);
        bind_u64(q, 1, job);
        (void)sqlite3_bind_int(q, 2, kind);
        (void)sqlite3_bind_int64(q, 3, *length);
        if (which == Q_AS_LONG) bind_u64(q, 4, *key);
        SH_TRY(next(s, q, "lengths cannot be read", &row));
        if (row) *length = sqlite3_column_int64(q, 0), *key = column_u64(q, 1);
        sqlite3_reset(q);
    }
    *found = row;
    return SH_OK;
}

sh_status sh_store_lengths(sh_store *s, uint64_t job, sh_lengths_fn *fn, void *ctx) {
    sqlite3_stmt *q = query(s, Q_LENGTHS);
    bind_u64(q, 1, job);
    sh_status st;
    for (bool row = true;;) {
        SH_TRY_OR(st, next(s, q, "lengths cannot be read", &row), break);
        if (!row) break;
        fn(ctx, sqlite3_column_int(q, 0), sqlite3_column_int64(q, 1), sqlite3_column_int64(q, 2));
    }
    sqlite3_reset(q);
    return st;
}

/* --- progress and results ------------------------------------------------------------------------------------------
 */

sh_status sh_store_progress_add(sh_store *s, uint64_t key, bool score, int32_t offset, const void *p, size_t n) {
    SH_TRY(begin(s));
    sqlite3_stmt *q = query(s, Q_PROGRESS_ADD);
    bind_u64(q, 1, key);
    (void)sqlite3_bind_int(q, 2, score);
    (void)sqlite3_bind_int(q, 3, offset);
    bind_blob(q, 4, p, n);
    return run(s, q, "progress cannot be written");
}

sh_status sh_store_progress(sh_store *s, uint64_t key, sh_progress_fn *fn, void *ctx) {
    sqlite3_stmt *q = query(s, Q_PROGRESS_GET);
    bind_u64(q, 1, key);
    sh_status st;
    for (bool row = true;;) {
        SH_TRY_OR(st, next(s, q, "progress cannot be read", &row), break);
        if (!row) break;
        SH_TRY_OR(st, fn(ctx, sqlite3_column_blob(q, 0), (size_t)sqlite3_column_bytes(q, 0)), break);
    }
    sqlite3_reset(q);
    return st;
}

sh_status sh_store_result_add(sh_store *s, uint64_t key, uint64_t job, uint64_t number, const void *row, size_t n,
                              bool *added) {
    SH_TRY(begin(s));
    sqlite3_stmt *q = query(s, Q_RESULT_ADD);
    bind_u64(q, 1, key);
    bind_u64(q, 2, job);
    bind_u64(q, 3, number);
    bind_blob(q, 4, row, n);
    SH_TRY(run(s, q, "a result cannot be written"));
    bool is_new = sqlite3_changes(s->db) > 0;
    static const int drops[] = {Q_REQUEST_DONE, Q_PROGRESS_DROP, Q_LENGTH_DROP};
    for (size_t i = 0; is_new && i < sizeof drops / sizeof *drops; i++) {
        q = query(s, drops[i]);
        bind_u64(q, 1, key);
        SH_TRY(run(s, q, "a request cannot be marked as answered"));
    }
    *added = is_new;
    return SH_OK;
}

sh_status sh_store_results(sh_store *s, uint64_t job, uint64_t after, sh_result_fn *fn, void *ctx) {
    sqlite3_stmt *q = query(s, Q_RESULTS);
    bind_u64(q, 1, job);
    bind_u64(q, 2, after);
    sh_status st = SH_OK;
    bool stop = false;
    for (bool row = true; !stop;) {
        SH_TRY_OR(st, next(s, q, "results cannot be read", &row), break);
        if (!row) break;
        sh_stored_result r = {.cursor = column_u64(q, 0),
                              .number = column_u64(q, 1),
                              .row = sqlite3_column_blob(q, 2),
                              .len = (size_t)sqlite3_column_bytes(q, 2)};
        SH_TRY_OR(st, fn(ctx, &r, &stop), break);
    }
    sqlite3_reset(q);
    return st;
}

sh_status sh_store_routing_put(sh_store *s, const char *rank, const void *p, size_t n) {
    SH_TRY(begin(s));
    sqlite3_stmt *q = query(s, Q_ROUTING_PUT);
    bind_text(q, 1, rank);
    bind_blob(q, 2, p, n);
    return run(s, q, "routing counts cannot be written");
}

sh_status sh_store_routing(sh_store *s, sh_progress_fn *fn, void *ctx) {
    sqlite3_stmt *q = query(s, Q_ROUTING);
    sh_status st;
    for (bool row = true;;) {
        SH_TRY_OR(st, next(s, q, "routing counts cannot be read", &row), break);
        if (!row) break;
        SH_TRY_OR(st, fn(ctx, sqlite3_column_blob(q, 0), (size_t)sqlite3_column_bytes(q, 0)), break);
    }
    sqlite3_reset(q);
    return st;
}
