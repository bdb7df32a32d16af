/*
 * ZeroMQ behind wire.h: a ROUTER or a DEALER, one context each. Keys (CURVE) and who may come in (ZAP) are settled
 * here. Knows nothing of what the messages mean. Handshakes are answered inside sh_wire_poll and sh_wire_recv: no
 * thread of its own.
 */
#include "proto/wire.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include <zmq.h>
#include "common/file.h"
#include "common/limits.h"

#define LINGER_MS     1000
#define HEARTBEAT_MS  2000
#define TIMEOUT_MS    10000
#define RECONNECT_MS  100
#define RECONNECT_MAX 2000
#define QUEUE         10000 /* messages per peer and direction */
#define KEY_TEXT      41    /* Z85 text of a key and its 0 byte */
#define ZAP_ENDPOINT  "inproc://zeromq.zap.01"
#define ZAP_FRAMES    7

struct sh_wire {
    void *ctx, *sock, *zap; /* zap: NULL where no keys are used */
    bool router;
    char endpoint[512];
    char keys[PATH_MAX];
};

/* --- keys ----------------------------------------------------------------------------------------------------------
 */

static sh_status key_path(const char *dir, const char *name, char out[PATH_MAX]) {
    if ((size_t)snprintf(out, PATH_MAX, "%s/%s", dir, name) >= PATH_MAX)
        SH_FAIL(SH_ELIMIT, "%s/%s: path is longer than %d bytes", dir, name, PATH_MAX - 1);
    return SH_OK;
}

static sh_status key_read(const char *dir, const char *name, bool secret, char out[KEY_TEXT]) {
    char path[PATH_MAX];
    SH_TRY(key_path(dir, name, path));
    struct stat sb;
    if (secret && stat(path, &sb) == 0 && (sb.st_mode & 077))
        SH_FAIL(SH_EINPUT, "%s: mode %03o lets others read it: allowed is 600 (chmod 600 it)", path,
                sb.st_mode & 0777u);
    char *text = NULL;
    size_t n = 0;
    if (!sh_file_exists(path))
        SH_FAIL(SH_EINPUT, "%s: is not there: allowed is a key folder, made by `shoal keygen`", path);
    SH_TRY(sh_file_read(path, 4096, &text, &n));
    while (n && (text[n - 1] == '\n' || text[n - 1] == '\r')) text[--n] = 0;
    uint8_t raw[32];
    bool good = n == KEY_TEXT - 1 && zmq_z85_decode(raw, text) != NULL;
    if (good) memcpy(out, text, KEY_TEXT);
    explicit_bzero(text, n);
    free(text);
    if (!good)
        SH_FAIL(SH_EFORMAT, "%s: not a key: allowed is one line of 40 Z85 characters (made by `shoal keygen`)", path);
    return SH_OK;
}

static sh_status key_write(const char *dir, const char *name, const char *key) {
    char path[PATH_MAX];
    SH_TRY(key_path(dir, name, path));
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) SH_FAIL(SH_EIO, "%s: cannot be created: %s", path, strerror(errno));
    char line[KEY_TEXT + 1];
    int n = snprintf(line, sizeof line, "%s\n", key);
    ssize_t w = sh_file_ops.write(fd, line, (size_t)n);
    int e = w < 0 ? errno : ENOSPC;
    bool synced = w == n && sh_file_ops.fsync(fd) == 0;
    if (w == n && !synced) e = errno;
    close(fd);
    explicit_bzero(line, sizeof line);
    if (!synced) {
        unlink(path);
        SH_FAIL(SH_EIO, "%s: cannot be written: %s", path, strerror(e));
    }
    return SH_OK;
}

static sh_status private_folder(const char *dir, mode_t forbidden, const char *why) {
    struct stat sb;
    if (stat(dir, &sb) != 0) SH_FAIL(SH_EIO, "%s: cannot be read: %s", dir, strerror(errno));
    if (!S_ISDIR(sb.st_mode)) SH_FAIL(SH_EINPUT, "%s: is not a directory", dir);
    if ((sb.st_mode & forbidden) || sb.st_uid != geteuid())
        SH_FAIL(SH_EINPUT,
                "%s: mode %03o, owner %u: %s must be a folder of your own that is closed to others (chmod 700)", dir,
                sb.st_mode & 0777u, (unsigned)sb.st_uid, why);
    return SH_OK;
}

sh_status sh_wire_keygen(const char *dir) {
    static const char *names[] = {"server.key", "server.pub", "client.key", "client.pub"};
    SH_TRY(sh_dir_make(dir));
    SH_TRY(private_folder(dir, 022, "a key folder"));
    for (int i = 0; i < 4; i++) {
        char path[PATH_MAX];
        SH_TRY(key_path(dir, names[i], path));
        if (sh_file_exists(path))
            SH_FAIL(SH_EINPUT, "%s: exists already: keys are never overwritten, remove them or name another folder",
                    path);
    }
    for (int i = 0; i < 4; i += 2) {
        char pub[KEY_TEXT], secret[KEY_TEXT];
        if (zmq_curve_keypair(pub, secret) != 0)
            SH_FAIL(SH_EUNSUPPORTED, "%s: this libzmq cannot make CURVE keys: %s", dir, zmq_strerror(zmq_errno()));
        sh_status st = key_write(dir, names[i], secret);
        if (st == SH_OK) st = key_write(dir, names[i + 1], pub);
        explicit_bzero(secret, sizeof secret);
        SH_TRY(st);
    }
    return SH_OK;
}

/* --- admission: RFC 27, the ZeroMQ Authentication Protocol ---------------------------------------------------------
 */

/* Whether some *.pub file of the folder other than server.pub holds this key. Read at each handshake, so that keys can
 * be added and withdrawn while the server runs. */
static bool key_admitted(const char *dir, const uint8_t raw[32]) {
    char want[KEY_TEXT], have[KEY_TEXT];
    if (!zmq_z85_encode(want, raw, 32)) return false;
    DIR *d = opendir(dir);
    if (!d) return false;
    bool found = false;
    for (struct dirent *e; !found && (e = readdir(d));) {
        size_t n = strlen(e->d_name);
        if (n < 5 || strcmp(e->d_name + n - 4, ".pub") != 0 || strcmp(e->d_name, "server.pub") == 0) continue;
        found = key_read(dir, e->d_name, false, have) == SH_OK && memcmp(have, want, KEY_TEXT) == 0;
    }
    closedir(d);
    return found;
}

typedef struct zap_request {
    size_t len[ZAP_FRAMES];
    uint8_t data[ZAP_FRAMES][256];
    int n;
} zap_request;

/* Takes one request; false when there is none. Frames longer than 255 bytes count as empty, which nobody is admitted
 * by. */
static bool zap_take(void *zap, zap_request *q) {
    *q = (zap_request){0};
    int more = 1;
    while (more) {
        uint8_t frame[256];
        int n = zmq_recv(zap, frame, sizeof frame, ZMQ_DONTWAIT);
        if (n < 0) return false;
        if (q->n < ZAP_FRAMES && (size_t)n < sizeof frame) {
            memcpy(q->data[q->n], frame, (size_t)n);
            q->len[q->n] = (size_t)n;
        }
        q->n++;
        size_t size = sizeof more;
        if (zmq_getsockopt(zap, ZMQ_RCVMORE, &more, &size) != 0) return false;
    }
    return true;
}

static void zap_serve(sh_wire *w) {
    zap_request q;
    while (w->zap && zap_take(w->zap, &q)) {
        bool ok = q.n == ZAP_FRAMES && strcmp((char *)q.data[0], "1.0") == 0 &&
                  strcmp((char *)q.data[5], "CURVE") == 0 && q.len[6] == 32 && key_admitted(w->keys, q.data[6]);
        const char *code = ok ? "200" : "400", *text = ok ? "OK" : "key is not in the server's folder";
        (void)zmq_send(w->zap, "1.0", 3, ZMQ_SNDMORE);
        (void)zmq_send(w->zap, q.data[1], q.len[1], ZMQ_SNDMORE);
        (void)zmq_send(w->zap, code, 3, ZMQ_SNDMORE);
        (void)zmq_send(w->zap, text, strlen(text), ZMQ_SNDMORE);
        (void)zmq_send(w->zap, "shoal", ok ? 5 : 0, ZMQ_SNDMORE);
        (void)zmq_send(w->zap, "", 0, 0);
    }
}

/* --- sockets -------------------------------------------------------------------------------------------------------
 */

static sh_status set_int(void *sock, int option, int value, const char *name) {
    if (zmq_setsockopt(sock, option, &value, sizeof value) != 0)
        SH_FAIL(SH_EUNSUPPORTED, "libzmq refuses %s = %d: %s", name, value, zmq_strerror(zmq_errno()));
    return SH_OK;
}
#define SET(sock, option, value) SH_TRY(set_int((sock), ZMQ_##option, (value), #option))

static sh_status set_key(void *sock, int option, const char *key) {
    if (zmq_setsockopt(sock, option, key, KEY_TEXT) != 0)
        SH_FAIL(SH_EUNSUPPORTED, "libzmq refuses a CURVE key: %s", zmq_strerror(zmq_errno()));
    return SH_OK;
}

static sh_status set_common(sh_wire *w) {
    SET(w->sock, LINGER, LINGER_MS);
    SET(w->sock, HEARTBEAT_IVL, HEARTBEAT_MS);
    SET(w->sock, HEARTBEAT_TIMEOUT, TIMEOUT_MS);
    SET(w->sock, HEARTBEAT_TTL, TIMEOUT_MS);
    SET(w->sock, RECONNECT_IVL, RECONNECT_MS);
    SET(w->sock, RECONNECT_IVL_MAX, RECONNECT_MAX);
    SET(w->sock, SNDHWM, QUEUE);
    SET(w->sock, RCVHWM, QUEUE);
    int64_t max = (int64_t)SH_MAX_MESSAGE;
    if (zmq_setsockopt(w->sock, ZMQ_MAXMSGSIZE, &max, sizeof max) != 0)
        SH_FAIL(SH_EUNSUPPORTED, "libzmq refuses MAXMSGSIZE: %s", zmq_strerror(zmq_errno()));
    if (w->router) SET(w->sock, ROUTER_MANDATORY, 1);
    return SH_OK;
}

static sh_status set_server_keys(sh_wire *w) {
    /* The handler stands before the socket does and falls after it: libzmq lets everybody in while there is none. */
    char secret[KEY_TEXT];
    SH_TRY(private_folder(w->keys, 022, "a key folder"));
    SH_TRY(key_read(w->keys, "server.key", true, secret));
    w->zap = zmq_socket(w->ctx, ZMQ_REP);
    if (!w->zap) SH_FAIL(SH_EIO, "a socket cannot be made: %s", zmq_strerror(zmq_errno()));
    SET(w->zap, LINGER, 0);
    if (zmq_bind(w->zap, ZAP_ENDPOINT) != 0) SH_FAIL(SH_EIO, "%s: %s", ZAP_ENDPOINT, zmq_strerror(zmq_errno()));
    SET(w->sock, CURVE_SERVER, 1);
    sh_status st = set_key(w->sock, ZMQ_CURVE_SECRETKEY, secret);
    explicit_bzero(secret, sizeof secret);
    SH_TRY(st);
    if (zmq_setsockopt(w->sock, ZMQ_ZAP_DOMAIN, "shoal", 5) != 0)
        SH_FAIL(SH_EUNSUPPORTED, "libzmq refuses ZAP_DOMAIN: %s", zmq_strerror(zmq_errno()));
    return SH_OK;
}

static sh_status set_client_keys(sh_wire *w) {
    char server[KEY_TEXT], pub[KEY_TEXT], secret[KEY_TEXT];
    SH_TRY(key_read(w->keys, "server.pub", false, server));
    SH_TRY(key_read(w->keys, "client.pub", false, pub));
    SH_TRY(key_read(w->keys, "client.key", true, secret));
    SH_TRY(set_key(w->sock, ZMQ_CURVE_SERVERKEY, server));
    SH_TRY(set_key(w->sock, ZMQ_CURVE_PUBLICKEY, pub));
    sh_status st = set_key(w->sock, ZMQ_CURVE_SECRETKEY, secret);
    explicit_bzero(secret, sizeof secret);
    return st;
}

static sh_status check_endpoint(const char *endpoint, const char *keys, const char **path) {
    *path = NULL;
    if (strncmp(endpoint, "tcp://", 6) == 0) {
        if (!keys) SH_FAIL(SH_EINPUT, "%s: tcp needs a key folder (--keys DIR, made by `shoal keygen DIR`)", endpoint);
    } else if (strncmp(endpoint, "ipc://", 6) == 0) {
        const char *p = endpoint + 6;
        size_t max = sizeof((struct sockaddr_un *)0)->sun_path - 1;
        if (p[0] != '/')
            SH_FAIL(SH_EINPUT, "%s: the path of an ipc endpoint: allowed is an absolute path (ipc:///…)", endpoint);
        if (strlen(p) > max) SH_FAIL(SH_ELIMIT, "%s: a socket path of %zu bytes: allowed are %zu", p, strlen(p), max);
        *path = p;
    } else {
        SH_FAIL(SH_EINPUT, "endpoint \"%s\": allowed are ipc:///PATH and tcp://HOST:PORT", endpoint);
    }
    return SH_OK;
}

/* The folder is private, and no living process listens at the path; what a dead one left is replaced by the bind. */
static sh_status prepare_path(const char *path) {
    char dir[sizeof((struct sockaddr_un *)0)->sun_path];
    snprintf(dir, sizeof dir, "%s", path);
    char *slash = strrchr(dir, '/');
    slash[slash == dir] = 0;
    SH_TRY(sh_dir_make(dir));
    SH_TRY(private_folder(dir, 077, "the folder of an ipc socket"));
    struct stat sb;
    if (lstat(path, &sb) != 0) return SH_OK;
    if (!S_ISSOCK(sb.st_mode)) SH_FAIL(SH_EINPUT, "%s: exists and is not a socket", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) SH_FAIL(SH_EIO, "%s: %s", path, strerror(errno));
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    memcpy(a.sun_path, path, strlen(path) + 1);
    bool alive = connect(fd, (struct sockaddr *)&a, sizeof a) == 0 || errno == EAGAIN;
    close(fd);
    if (alive) SH_FAIL(SH_EINPUT, "%s: another process listens there", path);
    return SH_OK;
}

static sh_status wire_start(sh_wire *w, const char *endpoint, const char *keys, bool router) {
    const char *path = NULL;
    SH_TRY(check_endpoint(endpoint, keys, &path));
    w->router = router;
    w->ctx = zmq_ctx_new();
    w->sock = w->ctx ? zmq_socket(w->ctx, router ? ZMQ_ROUTER : ZMQ_DEALER) : NULL;
    if (!w->sock) SH_FAIL(SH_EIO, "%s: a socket cannot be made: %s", endpoint, zmq_strerror(zmq_errno()));
    SH_TRY(set_common(w));
    if (!path) { /* keys are for tcp: on ipc the file's permissions decide */
        if ((size_t)snprintf(w->keys, sizeof w->keys, "%s", keys) >= sizeof w->keys)
            SH_FAIL(SH_ELIMIT, "%s: path is longer than %d bytes", keys, PATH_MAX - 1);
        SH_TRY(router ? set_server_keys(w) : set_client_keys(w));
    } else if (router) {
        SH_TRY(prepare_path(path));
    }
    if ((router ? zmq_bind : zmq_connect)(w->sock, endpoint) != 0)
        SH_FAIL(SH_EINPUT, "%s: cannot %s: %s", endpoint, router ? "listen" : "connect", zmq_strerror(zmq_errno()));
    size_t n = sizeof w->endpoint;
    if (zmq_getsockopt(w->sock, ZMQ_LAST_ENDPOINT, w->endpoint, &n) != 0)
        SH_FAIL(SH_EIO, "%s: %s", endpoint, zmq_strerror(zmq_errno()));
    return SH_OK;
}

static sh_status wire_open(const char *endpoint, const char *keys, bool router, sh_wire **out) {
    sh_wire *w = calloc(1, sizeof *w);
    if (!w) SH_FAIL(SH_EMEMORY, "%s: no memory for a socket", endpoint);
    sh_status st = wire_start(w, endpoint, keys, router);
    if (st != SH_OK) {
        sh_wire_close(&w);
        return sh_error_pass(st, __FILE__, __LINE__);
    }
    *out = w;
    return SH_OK;
}

sh_status sh_wire_listen(const char *endpoint, const char *keys, sh_wire **out) {
    return wire_open(endpoint, keys, true, out);
}

sh_status sh_wire_connect(const char *endpoint, const char *keys, sh_wire **out) {
    return wire_open(endpoint, keys, false, out);
}

void sh_wire_close(sh_wire **wp) {
    sh_wire *w = *wp;
    if (!w) return;
    if (w->sock) zmq_close(w->sock);
    if (w->zap) zmq_close(w->zap);
    while (w->ctx && zmq_ctx_term(w->ctx) != 0 && zmq_errno() == EINTR) {
    }
    free(w);
    *wp = NULL;
}

const char *sh_wire_endpoint(const sh_wire *w) {
    return w->endpoint;
}

/* --- messages ------------------------------------------------------------------------------------------------------
 */

sh_status sh_wire_poll(sh_wire *w, int extra_fd, int timeout_ms, bool *readable) {
    zmq_pollitem_t item[3] = {{.socket = w->sock, .events = ZMQ_POLLIN}};
    int n = 1, extra = -1;
    if (w->zap) item[n++] = (zmq_pollitem_t){.socket = w->zap, .events = ZMQ_POLLIN};
    if (extra_fd >= 0) {
        extra = n;
        item[n++] = (zmq_pollitem_t){.fd = extra_fd, .events = ZMQ_POLLIN};
    }
    int rc = zmq_poll(item, n, timeout_ms);
    if (rc < 0 && zmq_errno() != EINTR) SH_FAIL(SH_EIO, "%s: cannot wait: %s", w->endpoint, zmq_strerror(zmq_errno()));
    zap_serve(w);
    (void)extra; /* the caller knows its own descriptor: waking up is all that is promised */
    *readable = rc > 0 && (item[0].revents & ZMQ_POLLIN);
    return SH_OK;
}

sh_status sh_wire_send(sh_wire *w, const sh_wire_peer *to, char kind, const void *p, size_t n) {
    if (n > SH_MAX_MESSAGE) SH_FAIL(SH_ELIMIT, "a message of %zu bytes: allowed are %zu", n, SH_MAX_MESSAGE);
    if (w->router && !to) SH_FAIL(SH_ESTATE, "a message without an address");
    int rc = 0;
    if (w->router) rc = zmq_send(w->sock, to->id, to->len, ZMQ_DONTWAIT | ZMQ_SNDMORE);
    if (rc >= 0) rc = zmq_send(w->sock, &kind, 1, ZMQ_DONTWAIT | ZMQ_SNDMORE);
    if (rc >= 0) rc = zmq_send(w->sock, p, n, ZMQ_DONTWAIT);
    if (rc < 0)
        SH_FAIL(SH_EPEER, "%s: %s", w->endpoint,
                zmq_errno() == EHOSTUNREACH ? "the peer is gone"
                : zmq_errno() == EAGAIN     ? "the peer takes nothing: its queue is full"
                                            : zmq_strerror(zmq_errno()));
    return SH_OK;
}

typedef struct frames {
    sh_wire_peer from;
    char kind;
    int n;
    bool bad;
} frames;

static void take_frame(const sh_wire *w, frames *f, const void *p, size_t n, sh_buf *msg, sh_status *st) {
    int place = f->n++ + (w->router ? 0 : 1);
    if (place == 0 && n > 0 && n <= sizeof f->from.id) {
        f->from.len = (uint8_t)n;
        memcpy(f->from.id, p, n);
    } else if (place == 1 && n == 1) {
        memcpy(&f->kind, p, 1);
    } else if (place == 2) {
        sh_buf_clear(msg);
        *st = sh_buf_add(msg, p, n);
    } else {
        f->bad = true;
    }
}

/* One whole message, well formed or not. */
static sh_status recv_message(sh_wire *w, frames *f, sh_buf *msg, bool *any) {
    sh_status st = SH_OK;
    *f = (frames){0};
    *any = false;
    for (int more = 1; more;) {
        zmq_msg_t m;
        zmq_msg_init(&m);
        if (zmq_msg_recv(&m, w->sock, ZMQ_DONTWAIT) < 0) {
            int e = zmq_errno();
            zmq_msg_close(&m);
            if (e == EAGAIN || e == EINTR) return st;
            SH_FAIL(SH_EIO, "%s: cannot receive: %s", w->endpoint, zmq_strerror(e));
        }
        *any = true;
        more = zmq_msg_more(&m);
        take_frame(w, f, zmq_msg_data(&m), zmq_msg_size(&m), msg, &st);
        zmq_msg_close(&m);
    }
    return st;
}

sh_status sh_wire_recv(sh_wire *w, sh_wire_peer *from, char *kind, sh_buf *msg, bool *got) {
    zap_serve(w);
    for (;;) {
        frames f;
        bool any;
        SH_TRY(recv_message(w, &f, msg, &any));
        if (any && (f.bad || f.n != (w->router ? 3 : 2))) continue; /* not ours: dropped */
        if (any && from && w->router) *from = f.from;
        if (any) *kind = f.kind;
        *got = any;
        return SH_OK;
    }
}
