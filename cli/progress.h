/* What `shoal run` and `shoal watch` show on standard error: the first line, the bar (or lines, or JSON objects),
 * warnings, and the closing table. One object per program; one thread. */
#ifndef SH_CLI_PROGRESS_H
#define SH_CLI_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>
#include "common/buf.h"
#include "proto/job.pb-c.h"

typedef enum sh_progress_style {
    SH_PROGRESS_AUTO,
    SH_PROGRESS_BAR,
    SH_PROGRESS_PLAIN,
    SH_PROGRESS_JSON,
    SH_PROGRESS_NONE
} sh_progress_style;
extern const char *const sh_progress_styles[]; /* names in that order, NULL at the end */

typedef struct sh_progress_view {
    uint64_t total, done, errors, tokens_in, tokens_out;
    uint64_t tokens_shared; /* prompt tokens that groups did not compute since an earlier prompt began alike */
    int ranks, ranks_up;
    const char *state;               /* a word for what happens while no rank is ready: "starting", "loading" */
    uint64_t load_bytes, load_total; /* of files, while ranks load */
    double load_seconds;
} sh_progress_view;

typedef struct sh_progress {
    sh_progress_style style; /* never AUTO */
    bool bar_shown;
    bool awaits_start; /* set by the owner: nothing is drawn for some seconds until the "start" line was said */
    double born, began, last_shown, last_sampled;
    sh_progress_view first, sampled; /* at the start of the rates, at the last sample */
    bool have_first;
    double rate_in, rate_out; /* tokens/s, smoothed over some seconds */
} sh_progress;

void sh_progress_begin(sh_progress *p, sh_progress_style style);
/* Adds how a group's loading gets on. */
void sh_progress_add_load(sh_progress_view *v, const Shoal__GroupState *g);
/* Redraws when it is time to; at_once: now. */
void sh_progress_update(sh_progress *p, const sh_progress_view *v, bool at_once);
/* A line above the bar: shown in every style but none; in JSON as {"event": …, "text": …}. */
void sh_progress_say(sh_progress *p, const char *event, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* The same for what must be seen even with none: warnings and errors. */
void sh_progress_warn(sh_progress *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Ends the bar; the cursor is at the start of a line. */
void sh_progress_end(sh_progress *p);

/* Rows of one outcome, by response.status_code. */
typedef struct sh_outcomes {
    int status[16];
    uint64_t rows[16];
    int n;
} sh_outcomes;
void sh_outcomes_add(sh_outcomes *o, int status);

typedef struct sh_closing {
    const char *output;
    const sh_outcomes *outcomes;
    uint64_t tokens_in, tokens_out;         /* of the whole job */
    uint64_t tokens_in_now, tokens_out_now; /* of this run, where the job was taken up again */
    double wall, computing;                 /* seconds: all, and with a group at work */
    const Shoal__JobReply *last;            /* its groups' stage times; may be NULL */
    double bandwidth;                       /* bytes/s this machine can read; 0: not known */
    const struct sh_prediction *predicted;  /* predict.h; NULL: none */
    int ep;                                 /* ranks that divide the experts of a stage; 0 or 1: none */
} sh_closing;
/* Prompt tokens that the groups of a reply shared, since each was started. last may be NULL. */
uint64_t sh_closing_shared(const Shoal__JobReply *last);
/* The table in words, or as one JSON object. Pure: appends to `to`. */
sh_status sh_closing_text(const sh_closing *c, bool json, sh_buf *to);

#endif
