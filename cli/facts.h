/* Facts of this build and its libraries, for --version and doctor. Libraries are asked by name at run time, so that
 * their headers stay in the files that wrap them. */
#ifndef SH_CLI_FACTS_H
#define SH_CLI_FACTS_H

#include <stdio.h>

#define SH_FACTS_MAX 160

/* Each writes one line without a newline and returns its buffer; "not found" where a library does not answer. */
typedef struct sh_library_fact {
    const char *name;    /* as users know it */
    const char *package; /* Debian package that brings the headers */
    char version[SH_FACTS_MAX];
} sh_library_fact;
/* Fills at most max entries; returns how many. */
int sh_facts_libraries(sh_library_fact *f, int max);
/* "avx512 (this CPU: ref, avx2, avx512, blas)", or why none can be chosen. */
void sh_facts_isa(char *to, size_t size);
/* OpenBLAS's core name ("SkylakeX"); "" when the library does not tell. */
const char *sh_facts_blas_core(void);
const char *sh_facts_version(void);
void sh_facts_print_version(FILE *to);

#endif
