/*
 * A plan as a timetable: what each rank of a group does in a micro-batch, in seconds of computing and bytes of
 * messages, written as text. Replayed over MPI by tests/bench/replay.c, in a simulator or with sleeps, it shows what a
 * cluster would do that nobody here has: how much of the exchange hides, who waits for whom (docs/scaling.md). The
 * seconds and bytes are the cost model's (cost.h), the rows those of the forecast (forecast.h); here they are only put
 * in the order of worker/ and model/gemma4.c. Pure.
 *
 * Lines of a timetable, "name value …"; # begins a comment:
 *
 *   groups G                 replicas, each of stages · members ranks
 *   stages S                 rank = (group · S + stage) · members + member
 *   members W                of a stage, who divide experts and sequences among them
 *   in_flight D              micro-batches at once
 *   mixed X                  share of micro-batches of kind 1, which have a piece of prompt; the others are of kind 0
 *   tokens X                 put out by one lane per micro-batch, on average
 *   experts E K              experts of a layer, and how many a row chooses
 *   owned n …                W + 1 numbers: member m has experts [n_m, n_{m+1})
 *   part_rows B SPLIT        most rows of a part, and from how many rows on two parts are under way
 *   expert READ ROW          seconds to read one expert's weights, and to compute one row of one
 *   message HEAD CHOICE      bytes of an exchange's message beside rows: once, and per chosen expert
 *   row DISPATCH RESULT      bytes of a row to experts, and of a result
 *   stage S FIRST LAST       layers
 *   kind K ROWS DESCRIPTOR ANSWER                      rows of a lane; bytes to the first stage and from the last
 *   edge K S CUT ENTER LEAVE                           bytes to the next stage; seconds before and after the layers
 *   layer K I MOE BEFORE DENSE EXPERTS AFTER           seconds: up to the router, dense branch, experts of a rank that
 *                                                      has them all, the rest; MOE 0: nothing is exchanged
 */
#ifndef SH_PARTITION_SIMULATE_H
#define SH_PARTITION_SIMULATE_H

#include "partition/forecast.h"

/* The timetable of a plan for the rows of `mix`. tokens: of one lane and micro-batch. SH_EUNSUPPORTED where a stage is
 * divided otherwise than by experts, or its members are not alike. */
sh_status sh_simulate_timetable(const sh_cost_model *m, const sh_forecast_mix *mix, double tokens, int groups,
                                sh_buf *out);

#endif
