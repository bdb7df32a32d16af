/*
 * Files of Hugging Face that the metadata of a GGUF model stand for: the texts that config.json,
 * generation_config.json, tokenizer.json and tokenizer_config.json would have. They go through the same readers as
 * files, and `shoal pack` writes them. Keys and rules: docs/model.md. Errors name the GGUF file, the key, the value and
 * what is allowed.
 */
#ifndef SH_MODEL_GGUF_FILES_H
#define SH_MODEL_GGUF_FILES_H

#include "common/buf.h"

/* Each appends to out what it makes of the GGUF model in dir. */
/* config.json, from the keys gemma4.* and from which tensors there are. */
sh_status sh_gguf_config(const char *dir, sh_buf *out);
/* generation_config.json, from general.sampling.*; nothing where none of them is there. */
sh_status sh_gguf_generation(const char *dir, sh_buf *out);
/* tokenizer.json, from tokenizer.ggml.*. */
sh_status sh_gguf_tokenizer(const char *dir, sh_buf *out);
/* tokenizer_config.json: what goes around text, and the chat template. */
sh_status sh_gguf_tokenizer_config(const char *dir, sh_buf *out);

#endif
