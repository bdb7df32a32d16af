/* SIGINT, SIGTERM and SIGHUP as a flag, for commands that leave things as they should be when they are told to end. */
#ifndef SH_CLI_INTERRUPT_H
#define SH_CLI_INTERRUPT_H

#include <signal.h>

extern volatile sig_atomic_t sh_interrupted; /* 0, or which of them came last */
void sh_interrupt_catch(void);

#endif
