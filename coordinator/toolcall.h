/* What a model writes between <|tool_call> and <tool_call|> → OpenAI's name and arguments. Private to results. */
#ifndef SH_COORDINATOR_TOOLCALL_H
#define SH_COORDINATOR_TOOLCALL_H

#include <stdbool.h>
#include "common/buf.h"

/* text: "call:NAME{key:value,…}" with special tokens written out; values are <|"|>text<|"|>, {…}, […], numbers, true,
 * false, null; a bare word counts as text. Appends the name, and the arguments as compact JSON. *ok false: not in this
 * notation; nothing is appended. */
sh_status sh_toolcall_parse(const char *text, size_t len, sh_buf *name, sh_buf *arguments, bool *ok);

#endif
