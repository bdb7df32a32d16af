/* Loaded into ranks by a test (LD_PRELOAD): a process ends by SIGKILL when it hears a message that holds the bytes
 * named by $POISON (hexadecimal): a request that ends every worker it is given to. */
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

static size_t read_poison(unsigned char *to, size_t max) {
    const char *s = getenv("POISON");
    size_t n = 0;
    for (unsigned byte; s && n < max && sscanf(s + 2 * n, "%2x", &byte) == 1; n++) to[n] = (unsigned char)byte;
    return n;
}

int zmq_msg_recv(zmq_msg_t *msg, void *socket, int flags) {
    static int (*real)(zmq_msg_t *, void *, int);
    unsigned char poison[64];
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "zmq_msg_recv");
    int n = real(msg, socket, flags);
    if (n <= 0) return n; /* with errno as it is */
    size_t k = read_poison(poison, sizeof poison);
    if (k > 0 && memmem(zmq_msg_data(msg), (size_t)n, poison, k)) kill(getpid(), SIGKILL);
    return n;
}
