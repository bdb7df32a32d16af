/*
 * Any protobuf message as JSON that people edit, and back: by protobuf-c's descriptors, so that a field added to a
 * message needs no code here. Names are those of the .proto file. Numbers, booleans, strings, messages, and lists of
 * them; bytes and enumerations are not used by such files and are refused.
 */
#ifndef SH_PARTITION_PROTOJSON_H
#define SH_PARTITION_PROTOJSON_H

#include <protobuf-c/protobuf-c.h>
#include "common/buf.h"

/* Appends the message as indented JSON with a newline at the end; lists of numbers stand on one line. Numbers are
 * written so that they read back equal. */
sh_status sh_protojson_write(const ProtobufCMessage *m, sh_buf *to);
/* Reads a message of this type; `what` names the text in errors, which give the path of the field ("rank[2].first"),
 * what was found and what is allowed. Unknown fields are errors. Free with protobuf_c_message_free_unpacked. */
sh_status sh_protojson_read(const char *what, const char *text, size_t len, const ProtobufCMessageDescriptor *type,
                            ProtobufCMessage **out);

#endif
