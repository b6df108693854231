/* engine/search.h - the lowest value of a function of a few numbers in a box, without its gradient:
 * a (1+1) evolution strategy with the 1/5 rule.  Pure functions; threads: any.
 * Sources: Rechenberg 1973; Kern et al. 2004 (the rule as a factor a step). */
#ifndef IPT_ENGINE_SEARCH_H
#define IPT_ENGINE_SEARCH_H
#include "core/core.h"

enum { IPT_SEARCH_MAX = 32 };
typedef struct ipt_search {
    size_t n, n_asked;
    double box, sigma;           /* half its side; deviation of the next step */
    double x[IPT_SEARCH_MAX];    /* asked for last */
    double best[IPT_SEARCH_MAX]; /* lowest so far; the start before any is told */
    double least;                /* its value; HUGE_VAL before */
    uint64_t random;
} ipt_search;
/* Over [-box, box]^n, n at most IPT_SEARCH_MAX, from 0 with steps of box / 3.  The same seed and
 * values, the same points (ipt_rng_normal). */
void ipt_search_begin(ipt_search *s, size_t n, double box, uint64_t seed);
/* The next point [n], which lives in s: the start first, then the best and a random step. */
const double *ipt_search_ask(ipt_search *s);
/* Its value; one that is no number is as bad as can be. */
void ipt_search_tell(ipt_search *s, double value);
#endif
