/* libshoal: the job interface for C programs; the CLI is its first user. Calls block up to their time-out and are not
 * thread-safe; one object per thread. */
#ifndef SH_PROTO_CLIENT_H
#define SH_PROTO_CLIENT_H

#include "proto/job.pb-c.h"
#include "proto/wire.h"

typedef struct sh_client sh_client;

/* keys as for sh_wire_connect. timeout_ms: how long each call waits for an answer (SH_EPEER, naming the endpoint, after
 * it). */
sh_status sh_client_open(const char *endpoint, const char *keys, int timeout_ms, sh_client **out);
void sh_client_close(sh_client **c);
/* Sends one request and waits for its reply; a reply with `error` becomes SH_EINPUT with that text. The reply is freed
 * by shoal__job_reply__free_unpacked(reply, NULL). */
sh_status sh_client_call(sh_client *c, const Shoal__JobRequest *request, Shoal__JobReply **reply);
/* What both ends agree on about the lines so far, so that a name is not continued with another file: the hash over all
 * lines accepted, in order (0 to start). */
uint64_t sh_line_chain(uint64_t chain, uint64_t number, const void *text, size_t len);
/* Submits a whole JSONL stream (FILE *, any size) under `name`; lines already accepted by an earlier call are skipped
 * over. Every line that is not blank is sent with its number; one that is longer than SH_MAX_LINE_BYTES is sent cut to
 * one byte more, which the coordinator refuses. Returns when all of it is on the coordinator's disk. SH_EINPUT when the
 * job of this name began with other lines, or the coordinator refuses it. */
sh_status sh_client_submit(sh_client *c, const char *name, const Shoal__JobOptions *options, void *file, uint64_t *job);

#endif
