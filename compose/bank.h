/* compose/bank.h - the bank's inside, as bank.c (beside the weights) and fold.c (into them) share
 * it.
 */
#ifndef IPT_COMPOSE_BANK_H
#define IPT_COMPOSE_BANK_H
#include "compose/compose.h"

struct ipt_bank {
    ipt_ctx *ctx;
    ipt_arena arena;
    const ipt_module *modules;
    ipt_adapter_file *const *file;
    size_t n_file;
    ipt_adapter_site *site[IPT_COMP_COUNT];
    size_t *from[IPT_COMP_COUNT]; /* module of each site */
    size_t n_site[IPT_COMP_COUNT];
};

/* The k-th part (0, 1, ...) of one module that acts in a way, over all files in turn; NULL after
 * the last.  *slot: its file. */
const ipt_adapter_module *ipt_bank_part(const ipt_bank *b, size_t module, ipt_adapter_act act,
                                        size_t k, size_t *slot);
/* The model's own values that a part needs; *out NULL: none.  The caller's, ipt_free.  Errors:
 * those of the store. */
IPT_CHECKED ipt_status ipt_bank_base(const ipt_bank *b, const ipt_adapter_module *a,
                                     ipt_weights *store, double **out);
/* The whole weight (or bias, or norm's weight) of a module as the files have it, or its change by a
 * part, n values; the caller's, ipt_free. */
IPT_CHECKED ipt_status ipt_bank_values(const ipt_bank *b, const ipt_module *m, bool is_bias,
                                       ipt_weights *store, double **out);
IPT_CHECKED ipt_status ipt_bank_delta(const ipt_bank *b, const ipt_adapter_module *a,
                                      ipt_weights *store, size_t n, double **out);
/* The low-rank columns of a site, R = n_rank of it. */
typedef struct ipt_columns {
    float *a, *b;    /* [K, R], [R, out] */
    int32_t *slot;   /* [R] whose column each is; -1: padding */
    size_t n_a, n_b; /* values */
} ipt_columns;
/* Ownership: caller, ipt_columns_finish, also after a failure. */
IPT_CHECKED ipt_status ipt_bank_columns(const ipt_bank *b, int comp, size_t site,
                                        ipt_weights *store, ipt_columns *out);
void ipt_columns_finish(ipt_columns *c);
#endif
