/*
 * GGUF files of Gemma 4 as llama.cpp's converter names their tensors: one FILE.gguf, or FILE-00001-of-0000N.gguf …, in
 * a checkpoint directory. Tensors come out under the names of Hugging Face. Layout and names: docs/model.md.
 */
#ifndef SH_MODEL_GGUF_H
#define SH_MODEL_GGUF_H

#include <stdbool.h>
#include "model/safetensors.h"

/* Whether a file of this name may hold weights of a text model: *.gguf, but not mmproj-* and mtp-*, which hold other
 * modalities and draft heads. */
bool sh_gguf_is_name(const char *name);
/* Whether the directory has such a file. */
bool sh_gguf_is_there(const char *dir);
/* Of the directory's files the first part, or the only one, as a name: other parts of the same model are passed over.
 * More than one model is SH_EINPUT. */
sh_status sh_gguf_first(const char *dir, char *first, size_t size, bool *found);
/* Adds the tensors of the directory's GGUF files to t. *found: there are any. More than one model is SH_EINPUT. */
sh_status sh_gguf_open(sh_tensors *t, const char *dir, bool *found);
/* The Hugging Face name of one of llama.cpp's, as far as it is known: else the name itself. */
void sh_gguf_name(const char *name, char *to, size_t size);

#endif
