/* eval/report.h - an evaluation's results: eval.json, table.md, pictures.csv and sheet.png in its
 * folder. Threads: one. */
#ifndef IPT_EVAL_REPORT_H
#define IPT_EVAL_REPORT_H
#include "eval/run.h"

struct json_t;

/* Figure f of a method in a group of sets: each set's mean over seeds and judges (judge -1) or by
 * one judge, NAN for sets that are not in the group; out [v->n_set]. */
void ipt_eval_of_sets(const ipt_eval *v, size_t method, int judge, const ipt_eval_group *g,
                      ipt_figure f, double *out);
/* Everything as one object; ownership: caller.  Errors: IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_eval_json(const ipt_eval *v, struct json_t **out);
/* Writes all four files.  Errors: IPT_ERR_OUTPUT, IPT_ERR_NOMEM, those of reading pictures. */
IPT_CHECKED ipt_status ipt_eval_report(const ipt_eval *v, const struct json_t *json);
#endif
