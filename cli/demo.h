/* Where the demo model lies: $SHOAL_SHARE, else beside the installed program
 * (…/share/shoal), else in the source tree above the build (share). */
#ifndef SH_CLI_DEMO_H
#define SH_CLI_DEMO_H

/* Folder of the demo model; NULL when it cannot be found (sh_error_text says where it was looked for). Valid until the
 * next call. Not for several threads. */
const char *sh_demo_model(void);

#endif
