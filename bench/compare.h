/* bench/compare.h - two results of ipt_bench_run side by side.
 *
 * Must not know: devices. */
#ifndef IPT_BENCH_COMPARE_H
#define IPT_BENCH_COMPARE_H
#include "core/core.h"

#include <jansson.h>

/* Reads what an earlier `impasto bench WHAT --json` printed.  Ownership: caller, json_decref.
 * Errors: those of ipt_json_load; IPT_ERR_FORMAT: not such a result, of another bench, or without a
 * row that has a time. */
IPT_CHECKED ipt_status ipt_bench_load(ipt_ctx *ctx, const char *path, const char *what,
                                      json_t **out);
/* {rows: [{name, ms, earlier_ms, ratio}], only_now: [name], only_earlier: [name],
 *  differs: [{what, now, earlier}]}: ratio is new / old; a row of several batches or operators has
 * them in its name; differs: device, sizes and whatever else makes times incomparable.  Both as
 * ipt_bench_load leaves them.  Ownership: caller, json_decref; NULL: no memory. */
json_t *ipt_bench_compare(const json_t *now, const json_t *earlier);
#endif
