/* eval/sheet.h - the contact sheet: a row for each of the first sets, a column for each method,
 * first seed. Threads: one. */
#ifndef IPT_EVAL_SHEET_H
#define IPT_EVAL_SHEET_H
#include "eval/run.h"

/* Writes OUT/sheet.png; nothing is picked: the sets are the file's first IPT_SHEET_ROWS.  "single"
 * has its pictures smaller, in one square.  Errors: those of reading pictures and writing. */
enum { IPT_SHEET_ROWS = 16 };
IPT_CHECKED ipt_status ipt_eval_sheet(const ipt_eval *v);
#endif
