/* See interrupt.h. */
#include "cli/interrupt.h"

volatile sig_atomic_t sh_interrupted;

static void on_signal(int sig) {
    sh_interrupted = sig;
}

void sh_interrupt_catch(void) {
    struct sigaction a = {.sa_handler = on_signal};
    sigemptyset(&a.sa_mask);
    sigaction(SIGINT, &a, NULL);
    sigaction(SIGTERM, &a, NULL);
    struct sigaction before;
    if (sigaction(SIGHUP, NULL, &before) == 0 && before.sa_handler != SIG_IGN) sigaction(SIGHUP, &a, NULL); /* nohup */
}
