/* Properties of characters: \s and \w as the regular expressions of Hugging Face tokenizers know them, and lower case.
 */
#ifndef SH_MODEL_UNICODE_H
#define SH_MODEL_UNICODE_H

#include <stdbool.h>
#include <stdint.h>

bool sh_unicode_is_space(uint32_t cp); /* White_Space */
bool sh_unicode_is_word(uint32_t cp);  /* Alphabetic, marks, decimal digits, connectors, joiners */
/* The lower-case form where that is one character, else cp itself. */
uint32_t sh_unicode_lower(uint32_t cp);

#endif
