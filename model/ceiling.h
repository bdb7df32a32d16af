/*
 * What the cores at hand can do at best: the read bandwidth and the f32 multiply-add rate that kernels are judged by
 * (shoal bench, docs/performance.md). Measured with the widest instructions of the CPU, whatever SHOAL_ISA says.
 */
#ifndef SH_MODEL_CEILING_H
#define SH_MODEL_CEILING_H

#include "common/status.h"
#include "model/team.h"

typedef struct sh_ceiling {
    double read_gbs;   /* 10⁹ bytes/s read from memory by the whole team */
    double fma_gflops; /* 10⁹ f32 operations/s, a multiply-add counting as two, operands in registers */
} sh_ceiling;

#define SH_CEILING_BLOCK ((size_t)512 << 20) /* bytes that are usual */

/* Reads a block of `bytes` (at least twice the last cache), held only during the call, and runs
 * multiply-adds; the best of several short tries on every member of the team. Takes about a second. */
sh_status sh_ceiling_measure(sh_team *t, size_t bytes, sh_ceiling *out);

#endif
