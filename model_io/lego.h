/* model_io/lego.h - LoRA-LEGO: the units of several adapters at one module, clustered into fewer.
 *
 * A unit is one rank: a row a of `down` and a column b of `up`, whose change is b a^T.  Units of
 * all adapters are one pool; k-means makes k clusters of it, and each cluster's centroid is a unit
 * of the result.  (a, b) and (g a, b / g) are the same change for every g: with `want_gauge` units
 * are balanced, |a| = |b|, and compared up to their sign, so that the result depends on changes
 * alone; without it they are taken as they are, with the root of their scale on both sides.
 *
 * Source: Zhao et al., Merging LoRAs like Playing LEGO (ICLR 2025, arXiv 2409.16167), from its
 * description; k-means: Lloyd 1982, k-means++: Arthur and Vassilvitskii 2007.
 *
 * Must not know: files, adapters.  Threads: a call belongs to the thread of its ctx. */
#ifndef IPT_MODEL_IO_LEGO_H
#define IPT_MODEL_IO_LEGO_H
#include "core/core.h"

enum { IPT_LEGO_MAX_UNITS = 4096 }; /* of one pool: two tables of that side squared are made */

typedef enum ipt_lego_norm { IPT_LEGO_NORM_2, IPT_LEGO_NORM_INF, IPT_LEGO_NORM_OFF } ipt_lego_norm;
typedef struct ipt_lego_opts {
    int32_t rank;       /* k; 0: the mean of the adapters' ranks by weight, rounded */
    ipt_lego_norm norm; /* a centroid gets the mean norm of its members; OFF: stays a mean */
    bool want_output;   /* times sqrt(mean rank / k) */
    bool want_gauge;
} ipt_lego_opts;

/* The units of one module, borrowed. */
typedef struct ipt_units {
    size_t n, fan, out, n_from;
    const double *down;  /* [n, fan] */
    const double *up;    /* [n, out], with scale and weight */
    const double *split; /* [n] > 0: without a gauge a unit is split a beside up / split */
    const int32_t *from; /* [n] which adapter's, 0 .. n_from - 1 */
    const double *omega; /* [n_from] >= 0: how much an adapter's units count */
} ipt_units;
typedef struct ipt_lego {
    size_t rank;     /* clusters; 0: all units are zero */
    bool is_clamped; /* opts.rank was more than there are units */
    double *down;    /* [rank, fan]; clusters in the order of their first units */
    double *up;      /* [rank, out] */
} ipt_lego;
/* Zero units are left out, also of their adapter's rank.  A cluster of one is the unit itself, to
 * the bit (but for the factor of want_output), so that k units of a pool of k stay what they are.
 * Units that are equal make no two clusters: then there are fewer than k.  k-means is the best of
 * ten starts of at most 300 rounds, drawn from ipt_rng_next with seed 0: the same pool, the same
 * result.  Ownership: *out, caller, ipt_lego_finish.  Errors: IPT_ERR_ARG (more units than
 * IPT_LEGO_MAX_UNITS, values that are not finite), IPT_ERR_NOMEM, IPT_ERR_CANCELLED. */
IPT_CHECKED ipt_status ipt_lego_merge(ipt_ctx *ctx, const ipt_units *u, const ipt_lego_opts *o,
                                      ipt_lego *out);
void ipt_lego_finish(ipt_lego *l); /* safe on zeroed */
#endif
