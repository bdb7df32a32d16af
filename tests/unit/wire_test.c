/* proto/wire: addresses and answers over ipc and tcp, who is let in, limits, what is left behind. */
#include <CUnit/Basic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "common/clock.h"
#include "common/file.h"
#include "common/limits.h"
#include "proto/wire.h"

static char dir[64];

static void path(char *out, size_t n, const char *scheme, const char *name) {
    snprintf(out, n, "%s%s/%s", scheme, dir, name);
}

/* Waits for one message at `to` while both ends make progress. */
static bool receive(sh_wire *to, sh_wire *other, sh_wire_peer *from, char *kind, sh_buf *msg, double seconds) {
    bool got = false, readable;
    for (double end = sh_now() + seconds; !got && sh_now() < end;) {
        SH_IGNORE(sh_wire_poll(other, -1, 0, &readable));
        SH_IGNORE(sh_wire_poll(to, -1, 10, &readable));
        CU_ASSERT_EQUAL_FATAL(sh_wire_recv(to, from, kind, msg, &got), SH_OK);
    }
    return got;
}

static void exchange(sh_wire *s, sh_wire *c, size_t n) {
    sh_wire_peer from = {0};
    char kind = 0;
    sh_buf msg;
    sh_buf_init(&msg, 0);
    char *big = malloc(n + 1);
    memset(big, 'x', n);
    CU_ASSERT_EQUAL(sh_wire_send(c, NULL, SH_WIRE_JOB, big, n), SH_OK);
    CU_ASSERT_FATAL(receive(s, c, &from, &kind, &msg, 10));
    CU_ASSERT_EQUAL(kind, SH_WIRE_JOB);
    CU_ASSERT_EQUAL(msg.len, n);
    CU_ASSERT(n == 0 || memcmp(msg.data, big, n) == 0);
    CU_ASSERT(from.len > 0);
    CU_ASSERT_EQUAL(sh_wire_send(s, &from, SH_WIRE_GROUP, "back", 4), SH_OK);
    CU_ASSERT_FATAL(receive(c, s, NULL, &kind, &msg, 10));
    CU_ASSERT_EQUAL(kind, SH_WIRE_GROUP);
    CU_ASSERT(msg.len == 4 && memcmp(msg.data, "back", 4) == 0);
    sh_buf_release(&msg);
    free(big);
}

static void test_ipc(void) {
    char ep[200];
    path(ep, sizeof ep, "ipc://", "run/s");
    for (int round = 0; round < 2; round++) { /* the second finds no trouble in what the first left */
        sh_wire *s = NULL, *c = NULL, *again = NULL;
        CU_ASSERT_EQUAL_FATAL(sh_wire_connect(ep, NULL, &c), SH_OK); /* lazy: before the server */
        CU_ASSERT_EQUAL_FATAL(sh_wire_listen(ep, NULL, &s), SH_OK);
        CU_ASSERT_STRING_EQUAL(sh_wire_endpoint(s), ep);
        exchange(s, c, 5);
        exchange(s, c, 0);
        exchange(s, c, (size_t)33 << 20);
        CU_ASSERT_EQUAL(sh_wire_listen(ep, NULL, &again), SH_EINPUT);
        CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "another process listens"));
        sh_wire_close(&s);
        sh_wire_close(&c);
        CU_ASSERT_PTR_NULL(c);
    }
}

static void test_ipc_stale(void) {
    char ep[200], sock[200];
    path(ep, sizeof ep, "ipc://", "run/stale");
    path(sock, sizeof sock, "", "run/stale");
    pid_t pid = fork();
    if (pid == 0) { /* dies without closing: its socket file stays */
        sh_wire *s = NULL;
        _exit(sh_wire_listen(ep, NULL, &s) == SH_OK ? 7 : 8);
    }
    int status = 0;
    CU_ASSERT_EQUAL(waitpid(pid, &status, 0), pid);
    CU_ASSERT(WIFEXITED(status) && WEXITSTATUS(status) == 7);
    CU_ASSERT(sh_file_exists(sock));
    sh_wire *s = NULL, *c = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_wire_listen(ep, NULL, &s), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_wire_connect(ep, NULL, &c), SH_OK);
    exchange(s, c, 1);
    sh_wire_close(&c);
    sh_wire_close(&s);
}

static void refuse(const char *ep, const char *keys, sh_status want, const char *text) {
    sh_wire *w = NULL;
    CU_ASSERT_EQUAL(sh_wire_listen(ep, keys, &w), want);
    CU_ASSERT_PTR_NULL(w);
    if (!strstr(sh_error_text(), text)) fprintf(stderr, "\n%s: said \"%s\", not \"%s\"\n", ep, sh_error_text(), text);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), text));
}

static void test_endpoints(void) {
    char ep[400], name[200];
    refuse("tcp://127.0.0.1:*", NULL, SH_EINPUT, "needs a key folder");
    refuse("udp://1.2.3.4:5", NULL, SH_EINPUT, "allowed are ipc:///PATH and tcp://HOST:PORT");
    refuse("ipc://relative", NULL, SH_EINPUT, "absolute path");
    refuse("ipc://@abstract", NULL, SH_EINPUT, "absolute path");
    memset(name, 'p', sizeof name);
    name[0] = '/', name[108] = 0;
    snprintf(ep, sizeof ep, "ipc://%s", name);
    refuse(ep, NULL, SH_ELIMIT, "a socket path of 108 bytes: allowed are 107");
    refuse("ipc:///tmp/shoal-wire-test.sock", NULL, SH_EINPUT, "/tmp: mode");
    path(name, sizeof name, "", "file");
    FILE *f = fopen(name, "w");
    CU_ASSERT_PTR_NOT_NULL_FATAL(f);
    fclose(f);
    path(ep, sizeof ep, "ipc://", "file/s");
    refuse(ep, NULL, SH_EIO, "directory");
    path(ep, sizeof ep, "ipc://", "file");
    CU_ASSERT_EQUAL(chmod(dir, 0700), 0);
    refuse(ep, NULL, SH_EINPUT, "exists and is not a socket");
    path(name, sizeof name, "", "nokeys");
    refuse("tcp://127.0.0.1:*", name, SH_EIO, "nokeys");
}

static void test_keygen(void) {
    static const char *names[] = {"server.key", "server.pub", "client.key", "client.pub"};
    char keys[200], file[300];
    path(keys, sizeof keys, "", "keys");
    CU_ASSERT_EQUAL_FATAL(sh_wire_keygen(keys), SH_OK);
    struct stat sb;
    CU_ASSERT(stat(keys, &sb) == 0 && (sb.st_mode & 0777) == 0700);
    for (int i = 0; i < 4; i++) {
        snprintf(file, sizeof file, "%s/%s", keys, names[i]);
        CU_ASSERT(stat(file, &sb) == 0 && (sb.st_mode & 0777) == 0600 && sb.st_size == 41);
    }
    CU_ASSERT_EQUAL(sh_wire_keygen(keys), SH_EINPUT);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "exists already"));
}

static bool knock(sh_wire *s, sh_wire *x) {
    sh_wire_peer peer;
    char kind;
    sh_buf msg;
    sh_buf_init(&msg, 0);
    CU_ASSERT_EQUAL(sh_wire_send(x, NULL, SH_WIRE_JOB, "let me in", 9), SH_OK);
    bool in = receive(s, x, &peer, &kind, &msg, 0.7);
    sh_buf_release(&msg);
    return in;
}

static void test_tcp(void) {
    char keys[200], other[200], third[200], from[300], to[300];
    path(keys, sizeof keys, "", "keys");
    path(other, sizeof other, "", "keys2");
    path(third, sizeof third, "", "keys3");
    sh_wire *s = NULL, *c = NULL, *x = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_wire_listen("tcp://127.0.0.1:*", keys, &s), SH_OK);
    CU_ASSERT(strncmp(sh_wire_endpoint(s), "tcp://127.0.0.1:", 16) == 0 && atoi(sh_wire_endpoint(s) + 16) > 0);
    CU_ASSERT_EQUAL_FATAL(sh_wire_connect(sh_wire_endpoint(s), keys, &c), SH_OK);
    exchange(s, c, 100);

    /* a stranger who knows the server's public key, but whose own is not in the folder */
    CU_ASSERT_EQUAL_FATAL(sh_wire_keygen(other), SH_OK);
    snprintf(from, sizeof from, "%s/server.pub", keys);
    snprintf(to, sizeof to, "%s/server.pub", other);
    CU_ASSERT_EQUAL(unlink(to), 0);
    CU_ASSERT_EQUAL(link(from, to), 0);
    CU_ASSERT_EQUAL_FATAL(sh_wire_connect(sh_wire_endpoint(s), other, &x), SH_OK);
    CU_ASSERT_FALSE(knock(s, x));
    sh_wire_close(&x);
    /* admitted once its key is put there */
    snprintf(from, sizeof from, "%s/client.pub", other);
    snprintf(to, sizeof to, "%s/guest.pub", keys);
    CU_ASSERT_EQUAL(link(from, to), 0);
    CU_ASSERT_EQUAL_FATAL(sh_wire_connect(sh_wire_endpoint(s), other, &x), SH_OK);
    exchange(s, x, 10);
    sh_wire_close(&x);

    /* one with no keys of this server at all */
    CU_ASSERT_EQUAL_FATAL(sh_wire_keygen(third), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_wire_connect(sh_wire_endpoint(s), third, &x), SH_OK);
    CU_ASSERT_FALSE(knock(s, x));
    sh_wire_close(&x);
    sh_wire_close(&c);
    sh_wire_close(&s);
}

static void test_key_files(void) {
    char keys[200], file[300];
    path(keys, sizeof keys, "", "keys3");
    snprintf(file, sizeof file, "%s/server.key", keys);
    CU_ASSERT_EQUAL(chmod(file, 0644), 0);
    refuse("tcp://127.0.0.1:*", keys, SH_EINPUT, "lets others read it");
    CU_ASSERT_EQUAL(chmod(file, 0600), 0);
    CU_ASSERT_EQUAL(truncate(file, 20), 0);
    refuse("tcp://127.0.0.1:*", keys, SH_EFORMAT, "not a key");
    CU_ASSERT_EQUAL(chmod(keys, 0777), 0);
    refuse("tcp://127.0.0.1:*", keys, SH_EINPUT, "closed to others");
    CU_ASSERT_EQUAL(chmod(keys, 0700), 0);
}

static void test_gone(void) {
    char ep[200], kind;
    path(ep, sizeof ep, "ipc://", "run/gone");
    sh_wire *s = NULL, *c = NULL;
    CU_ASSERT_EQUAL_FATAL(sh_wire_listen(ep, NULL, &s), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_wire_connect(ep, NULL, &c), SH_OK);
    sh_wire_peer from;
    sh_buf msg;
    sh_buf_init(&msg, 0);
    CU_ASSERT_EQUAL(sh_wire_send(c, NULL, SH_WIRE_JOB, "a", 1), SH_OK);
    CU_ASSERT_FATAL(receive(s, c, &from, &kind, &msg, 10));
    sh_wire_close(&c);
    sh_status st = SH_OK;
    for (int i = 0; i < 100 && st == SH_OK; i++) { /* noticed by the socket's own thread, soon */
        st = sh_wire_send(s, &from, SH_WIRE_JOB, "b", 1);
        sh_sleep(0.01);
    }
    CU_ASSERT_EQUAL(st, SH_EPEER);
    CU_ASSERT_PTR_NOT_NULL(strstr(sh_error_text(), "gone"));
    char *big = calloc(1, SH_MAX_MESSAGE + 1);
    CU_ASSERT_EQUAL(sh_wire_send(s, &from, SH_WIRE_JOB, big, SH_MAX_MESSAGE + 1), SH_ELIMIT);
    free(big);
    int pipes[2];
    CU_ASSERT_EQUAL_FATAL(pipe(pipes), 0);
    CU_ASSERT_EQUAL(write(pipes[1], "x", 1), 1);
    bool readable = true;
    double t = sh_now();
    CU_ASSERT_EQUAL(sh_wire_poll(s, pipes[0], 5000, &readable), SH_OK);
    CU_ASSERT(sh_now() - t < 2 && !readable); /* woken by the other descriptor */
    close(pipes[0]);
    close(pipes[1]);
    sh_buf_release(&msg);
    sh_wire_close(&s);
}

int main(void) {
    snprintf(dir, sizeof dir, "/tmp/shoal-wire-XXXXXX");
    if (!mkdtemp(dir) || CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite s = CU_add_suite("wire", NULL, NULL);
    CU_add_test(s, "ipc: exchange, in use, again", test_ipc);
    CU_add_test(s, "ipc: stale socket replaced", test_ipc_stale);
    CU_add_test(s, "endpoints refused", test_endpoints);
    CU_add_test(s, "keygen", test_keygen);
    CU_add_test(s, "tcp: only known keys", test_tcp);
    CU_add_test(s, "damaged key folders", test_key_files);
    CU_add_test(s, "peer gone, limits, waking", test_gone);
    CU_basic_set_mode(CU_BRM_NORMAL);
    CU_basic_run_tests();
    unsigned failed = CU_get_number_of_failures() + CU_get_number_of_tests_failed();
    CU_cleanup_registry();
    SH_IGNORE(sh_path_remove(dir));
    return failed != 0;
}
