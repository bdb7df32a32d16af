/* Parts of chat rendering: shared by chat.c (messages) and chat_tools.c (tools); nobody else includes this. */
#ifndef SH_MODEL_CHAT_INT_H
#define SH_MODEL_CHAT_INT_H

#include "model/chat.h"

/* A value in the template's own notation: text between <|"|>, true, [a,b], {k:v} with keys in quotes if asked. */
sh_status sh_chat_add_argument(const json_t *v, bool quote_keys, sh_buf *out);
/* Members of an object as k:v,… in sorted order: a call's arguments, a response's fields. */
sh_status sh_chat_add_members(const json_t *object, bool quote_keys, sh_buf *out);
/* One tool's declaration, without the tokens around it. `where` names the tool in errors ("tools[0]"). */
sh_status sh_chat_add_declaration(sh_chat_form form, const char *where, const json_t *tool, sh_buf *out);

#endif
