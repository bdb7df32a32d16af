/*
 * protobuf over ZeroMQ: one ROUTER on the coordinator's side, DEALERs on the others'. Every message is two frames
 * behind the peer's identity: one byte saying which interface (SH_WIRE_JOB, SH_WIRE_GROUP), then the protobuf message.
 * The only file that sees ZeroMQ is wire.c. ipc:// relies on file permissions (the socket's folder is 0700); tcp://
 * needs a key folder (CURVE, with a ZAP handler that admits only the keys in it) and is refused without one. One thread
 * per object.
 */
#ifndef SH_PROTO_WIRE_H
#define SH_PROTO_WIRE_H

#include <stdbool.h>
#include <stdint.h>
#include "common/buf.h"

#define SH_WIRE_JOB   'J'
#define SH_WIRE_GROUP 'G'

typedef struct sh_wire sh_wire;
typedef struct sh_wire_peer { /* who sent a message, for the answer */
    uint8_t len;
    uint8_t id[255];
} sh_wire_peer;

/* Coordinator's end. keys: folder made by sh_wire_keygen, or NULL (ipc:// only). */
sh_status sh_wire_listen(const char *endpoint, const char *keys, sh_wire **out);
/* The other end. Connecting is lazy: an absent server shows as silence, so callers use time-outs. */
sh_status sh_wire_connect(const char *endpoint, const char *keys, sh_wire **out);
void sh_wire_close(sh_wire **w); /* what was sent just before still goes out, for at most one second */
/* The endpoint as bound (a tcp port of * or 0 becomes a real port). Borrowed. */
const char *sh_wire_endpoint(const sh_wire *w);
/* A file descriptor is not offered: wait with this. extra_fd (−1: none) also wakes it. */
sh_status sh_wire_poll(sh_wire *w, int extra_fd, int timeout_ms, bool *readable);
/* to: NULL on the connecting side. Never blocks; SH_EPEER when the peer is gone or its queue is full. */
sh_status sh_wire_send(sh_wire *w, const sh_wire_peer *to, char kind, const void *p, size_t n);
/* Takes one message if there is one (*got). from may be NULL on the connecting side. */
sh_status sh_wire_recv(sh_wire *w, sh_wire_peer *from, char *kind, sh_buf *msg, bool *got);
/* Makes a folder (0700) with a key pair for the server and one for clients, files 0600. Fails if keys are there
 * already. */
sh_status sh_wire_keygen(const char *dir);

#endif
