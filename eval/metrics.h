/* eval/metrics.h - what a judge's sight of a picture is worth: pure mathematics, no files, no
 * device.
 *
 * Places.  Each concept of a set is given one view of the picture, no two of them nearer than 16
 * pixels, so that as many concepts as possible are there and, among those ways, the sum of their
 * probabilities is greatest.  A mixture of two concepts in two places is so at most one of each.
 * Threads: everything here is pure. */
#ifndef IPT_EVAL_METRICS_H
#define IPT_EVAL_METRICS_H
#include "eval/judge.h"

enum { IPT_EVAL_MAX_K = 6 }; /* concepts of a set */

typedef struct ipt_scored {
    int view[IPT_EVAL_MAX_K];   /* the place of each concept */
    bool found[IPT_EVAL_MAX_K]; /* its probability there reaches the threshold */
    int n_found;
    double likeness[IPT_EVAL_MAX_K]; /* to its reference, at its place */
    double leak;      /* mean over concepts of their highest probability away from their place */
    bool duplicate;   /* one is there twice while another one is missing */
    double strangers; /* share of the judge's other concepts that reach their threshold somewhere */
} ipt_scored;

/* Distance of two views' centres along the longer axis, in pixels of the 64; the whole is 0 from
 * all. */
int ipt_view_apart(int a, int b);
/* concept [k]: numbers of classes, different ones; threshold [s->n_class]. */
void ipt_eval_score(const ipt_sight *s, const float *threshold, const int *concept, int k,
                    ipt_scored *out);

/* Root mean square distance, in levels of 255, of a picture's outermost pixels (a 16th of its
 * width) from the colour that was asked for. */
double ipt_eval_drift(const ipt_image *im, const uint8_t colour[3]);

/* --- intervals -------------------------------------------------------------------------------- */
typedef struct ipt_interval {
    double mean, low, high; /* 95 %; NAN: no values */
    size_t n;
} ipt_interval;
enum { IPT_BOOTSTRAP = 2000 };
/* Mean of values [n] (one for each set) and the percentile interval of IPT_BOOTSTRAP resamples of
 * sets; NANs are left out.  The same seed gives the same interval. */
ipt_interval ipt_eval_bootstrap(const double *value, size_t n, uint64_t seed);
/* Mean of a - b over the sets that have both, resampled together. */
ipt_interval ipt_eval_difference(const double *a, const double *b, size_t n, uint64_t seed);
/* Mean of a over mean of b, resampled together; infinite where b is 0. */
ipt_interval ipt_eval_ratio(const double *a, const double *b, size_t n, uint64_t seed);
double ipt_eval_median(double *value, size_t n); /* sorts them; NAN: none */
#endif
