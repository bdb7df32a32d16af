/* A folder of its own for the programs whose cases each fill it anew; the suite's begin and end make and remove it. */
#ifndef SH_TESTS_SCRATCH_FOLDER_H
#define SH_TESTS_SCRATCH_FOLDER_H

#include <CUnit/Basic.h>
#include <stdlib.h>
#include "common/file.h"

static char dir[] = "/tmp/shoal-test-XXXXXX";

static int begin(void) {
    return mkdtemp(dir) == NULL;
}

static int end(void) {
    return sh_path_remove(dir) != SH_OK;
}

static void empty(void) {
    CU_ASSERT_EQUAL_FATAL(sh_path_remove(dir), SH_OK);
    CU_ASSERT_EQUAL_FATAL(sh_dir_make(dir), SH_OK);
}

#endif
