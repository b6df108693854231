/* compose/compose.h - several adapters in one picture: the bank of loaded adapters; policy.h has
 * the methods that say which UNet rows to evaluate, with which gates, and how to blend them.
 * Threads: everything here belongs to one thread at a time. */
#ifndef IPT_COMPOSE_COMPOSE_H
#define IPT_COMPOSE_COMPOSE_H
#include "compose/policy.h"
#include "core/core.h"
#include "graph/graph.h"
#include "model_io/model_io.h"

/* --- bank: adapters stacked beside the weights, one slot each --------------------------------- */
typedef struct ipt_bank ipt_bank;
/* Stacks files (slot i = file[i]); the files and modules stay the caller's and outlive the bank.
 * Errors: IPT_ERR_ARG (more than IPT_MAX_SLOT), IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_bank_create(ipt_ctx *ctx, const ipt_module *modules, size_t n_modules,
                                       ipt_adapter_file *const *file, size_t n_file,
                                       ipt_bank **out);
void ipt_bank_destroy(ipt_bank **b);
size_t ipt_bank_n_slot(const ipt_bank *b);
/* Sites of a component for ipt_graph_adapters; borrowed. */
const ipt_adapter_site *ipt_bank_sites(const ipt_bank *b, int comp, size_t *n);
/* True when both give the same graph: same sites, ranks and slots; only values may differ. */
bool ipt_bank_same_layout(const ipt_bank *a, const ipt_bank *b, int comp);
/* Writes the factors of a component into a plan built with ipt_bank_sites; adds bytes to *uploaded.
 * Text layers that the plan leaves out (clip skip) are passed over. */
IPT_CHECKED ipt_status ipt_bank_write(const ipt_bank *b, int comp, ipt_plan *p, uint64_t *uploaded);
bool ipt_bank_has(const ipt_bank *b, int comp); /* some adapter has modules there */

/* --- folding: adapters into the weights on the device, and back (fold.c, ADR 8) -----------------
 */
/* W += sum over slots of gate times change, for a site that is not folded; gate [rows][n_slot] by
 * the site's gate row.  The weights are on the device.  A failure leaves the site as unfold mends
 * it.  Errors: those of ipt_weights_add and _replace; IPT_ERR_IO. */
IPT_CHECKED ipt_status ipt_bank_fold(const ipt_bank *b, int comp, size_t site, const float *gate,
                                     ipt_weights *store);
/* The site's weights are the file's again, bit for bit. */
IPT_CHECKED ipt_status ipt_bank_unfold(const ipt_bank *b, int comp, size_t site,
                                       ipt_weights *store);
/* Rows (tokens, pixels) of one picture that a site sees in one evaluation. */
typedef struct ipt_site_rows {
    double (*of)(const void *user, const char *site);
    const void *user;
} ipt_site_rows;
/* Work that the gates cost in each evaluation of one picture's row; work of folding and the bytes
 * of the weights that it rewrites, once on the way in and once on the way out. */
typedef struct ipt_fold_cost {
    double step_macs, fold_macs, bytes;
} ipt_fold_cost;
ipt_fold_cost ipt_bank_cost(const ipt_bank *b, int comp, const ipt_site_rows *rows,
                            ipt_dtype weight_type);

/* Block weights "down:1/mid:0/up:0.5", also "down.1:0.5" for one level; unnamed blocks are 1.
 * Errors: IPT_ERR_ARG quoting the text. */
IPT_CHECKED ipt_status ipt_block_weights(ipt_ctx *ctx, const char *text, float row[IPT_GATE_ROWS]);
#endif
