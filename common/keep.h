/*
 * What must stay to the end of the process, because somebody may still read or write it: buffers of messages that a
 * failed rank has under way.
 */
#ifndef SH_COMMON_KEEP_H
#define SH_COMMON_KEEP_H

/* Never frees p, and keeps it reachable, so that a leak checker tells it from what was lost. From any thread. NULL is
 * nothing. */
void sh_keep(const void *p);

#endif
