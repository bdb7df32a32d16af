/* Gemma 4's chat format, written natively: messages → text with special tokens. Source: the checkpoint's template, of
 * which two released forms (A: current, B: first release) and the demo model's compact one are known by their content.
 */
#ifndef SH_MODEL_CHAT_H
#define SH_MODEL_CHAT_H

#include "common/buf.h"
#include "common/json.h"

typedef enum sh_chat_form { SH_CHAT_NONE, SH_CHAT_A, SH_CHAT_B, SH_CHAT_COMPACT } sh_chat_form;

typedef struct sh_chat {
    sh_chat_form form;
    bool known;   /* false: the template's text is none of the known ones; form is the nearest guess */
    bool media;   /* image, audio and video parts write their placeholder tokens; false (as loaded): such parts fail */
    char bos[64]; /* bos_token's text from tokenizer_config.json */
} sh_chat;

/* Reads chat_template.jinja or the chat_template of tokenizer_config.json, or of what stands in for it (beside.h). No
 * template at all: form SH_CHAT_NONE, success. A template without Gemma 4's turns gives form SH_CHAT_NONE too, and
 * known false. */
sh_status sh_chat_load(const char *model_dir, sh_chat *out);
/* Appends `messages` (array) and `tools` (array or NULL) as the template writes them: thinking on or off, with or
 * without the generation prompt. Errors name the field (messages[2].content: …). Content parts of type text only (see
 * media); others fail with "not supported yet" naming the part. Arguments of a call may be an object (sorted, in
 * Gemma's notation) or a string (taken as it stands). Two departures from the templates: parts of a system message are
 * joined, where forms A and B would print Python's notation of the list; and the compact form refuses tools, which its
 * template would silently drop. */
sh_status sh_chat_render(const sh_chat *c, const json_t *messages, const json_t *tools, bool thinking,
                         bool generation_prompt, sh_buf *out);

#endif
