/*
 * Errors. Every function that can fail returns sh_status, which must be used; its outputs come last and are untouched
 * on failure. The text is made where the fault is first seen (SH_FAIL) and names the file, field or tensor, the value
 * found and what is allowed. It is kept per thread until the next failure; SH_TRY adds file:line of each frame it
 * passes. Libraries do not print and never exit.
 */
#ifndef SH_COMMON_STATUS_H
#define SH_COMMON_STATUS_H

#include <stddef.h>

typedef enum [[nodiscard]] sh_status{SH_OK = 0,       SH_EINPUT, /* the user's input or option is wrong */
                                     SH_EFORMAT,                 /* a file is damaged or not what it claims to be */
                                     SH_EIO,          /* the operating system refused: read, write, map, disk full */
                                     SH_EMEMORY,      /* not enough memory, or more than a stated budget */
                                     SH_ELIMIT,       /* a stated limit is exceeded */
                                     SH_EUNSUPPORTED, /* understood, and not provided */
                                     SH_EPEER,        /* another process does not answer or broke the protocol */
                                     SH_ESTATE, /* called in the wrong order; also: claimed by a newer incarnation */
                                     SH_ECANCELLED} sh_status;

/* Text of this thread's last failure ("" when none); valid until the next failure on this thread. */
const char *sh_error_text(void);
/* file:line trail of this thread's last failure, newest frame last. */
const char *sh_error_trail(void);

/* Records a failure and returns `code`; use through SH_FAIL. printf-style; the text is cut at 1,023 bytes. */
sh_status sh_error_set(sh_status code, const char *file, int line, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* Prefixes this thread's text ("prefix: text"); returns `code`. For callers that know the file's or field's name. */
sh_status sh_error_prefix(sh_status code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
sh_status sh_error_pass(sh_status code, const char *file, int line);

#define SH_FAIL(code, ...) return sh_error_set((code), __FILE__, __LINE__, __VA_ARGS__)
#define SH_TRY(expr)                                                                                                   \
    do {                                                                                                               \
        sh_status sh_try_ = (expr);                                                                                    \
        if (sh_try_ != SH_OK) return sh_error_pass(sh_try_, __FILE__, __LINE__);                                       \
    } while (0)
/* The same with a clean-up statement or goto before leaving: SH_TRY_OR(call(), goto out) with `sh_status st` in scope.
 */
#define SH_TRY_OR(st, expr, leave)                                                                                     \
    do {                                                                                                               \
        (st) = (expr);                                                                                                 \
        if ((st) != SH_OK) {                                                                                           \
            (st) = sh_error_pass((st), __FILE__, __LINE__);                                                            \
            leave;                                                                                                     \
        }                                                                                                              \
    } while (0)
#define SH_IGNORE(expr)                                                                                                \
    do {                                                                                                               \
        sh_status sh_ignored_ = (expr);                                                                                \
        (void)sh_ignored_;                                                                                             \
    } while (0)
/* Calls x_destroy(&p) when p leaves scope: SH_CLEANUP(sh_x_destroy) sh_x *p = NULL; */
#define SH_CLEANUP(fn) __attribute__((cleanup(fn)))

#endif
