/* One line per message on standard error, with a level. Only programs (cli, worker and coordinator main loops) log. */
#ifndef SH_COMMON_LOG_H
#define SH_COMMON_LOG_H

typedef enum sh_log_level { SH_LOG_ERROR, SH_LOG_WARN, SH_LOG_INFO, SH_LOG_DEBUG } sh_log_level;

/* Messages above `max` are dropped; `who` (e.g. "rank 2") stands before each. The environment's SHOAL_LOG
 * (error|warn|info|debug) wins. `who` is copied. */
void sh_log_setup(sh_log_level max, const char *who);
/* What stands before each message; "" when nothing was set up. */
const char *sh_log_who(void);
void sh_log(sh_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
#define sh_error(...) sh_log(SH_LOG_ERROR, __VA_ARGS__)
#define sh_warn(...)  sh_log(SH_LOG_WARN, __VA_ARGS__)
#define sh_info(...)  sh_log(SH_LOG_INFO, __VA_ARGS__)
#define sh_debug(...) sh_log(SH_LOG_DEBUG, __VA_ARGS__)

#endif
