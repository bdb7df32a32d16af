/* Two properties of characters, as the regular expressions of Hugging Face tokenizers know them: \s and \w. */
#ifndef SH_MODEL_UNICODE_H
#define SH_MODEL_UNICODE_H

#include <stdbool.h>
#include <stdint.h>

bool sh_unicode_is_space(uint32_t cp); /* White_Space */
bool sh_unicode_is_word(uint32_t cp);  /* Alphabetic, marks, decimal digits, connectors, joiners */

#endif
