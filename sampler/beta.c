/* sampler/beta.c - quantiles of the Beta distribution, for the "beta" schedule. */
#include "sampler/sampler.h"

#include <float.h>
#include <math.h>

/* Continued fraction of the incomplete beta function by Lentz's method.
 * Source: Abramowitz & Stegun 26.5.8; DLMF 8.17.22. */
static double beta_fraction(double x, double a, double b)
{
    const double tiny = 1e-300;
    double c = 1, d = 1 - (a + b) * x / (a + 1);
    d = 1 / (fabs(d) < tiny ? tiny : d);
    double result = d;
    for (int m = 1; m < 500; m++) {
        double even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
        d = 1 + even * d;
        c = 1 + even / c;
        d = 1 / (fabs(d) < tiny ? tiny : d);
        c = fabs(c) < tiny ? tiny : c;
        result *= d * c;
        double odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1));
        d = 1 + odd * d;
        c = 1 + odd / c;
        d = 1 / (fabs(d) < tiny ? tiny : d);
        c = fabs(c) < tiny ? tiny : c;
        result *= d * c;
        if (fabs(d * c - 1) < DBL_EPSILON)
            break;
    }
    return result;
}

/* Lower regularised incomplete beta function, for x where the fraction converges fast. */
static double beta_lower(double x, double a, double b, double log_norm)
{
    return exp(a * log(x) + b * log1p(-x) - log_norm) * beta_fraction(x, a, b) / a;
}

/* Root of I_x(a,b) = p for p at most I_split, by Newton steps kept inside a bracket; solved in
 * y = log x, where the lower tail is nearly straight. */
static double solve_lower(double p, double a, double b, double split, double log_norm)
{
    double high = log(split);
    double y = (log(p) + log(a) + log_norm) / a; /* from x^a / (a B) = p */
    double low = y - 1;
    while (beta_lower(exp(low), a, b, log_norm) > p && low > -700)
        low -= 2;
    if (y > high || y < low)
        y = 0.5 * (low + high);
    for (int i = 0; i < 200; i++) {
        double x = exp(y);
        double value = beta_lower(x, a, b, log_norm);
        if (value > p)
            high = y;
        else
            low = y;
        double slope = exp(a * y + (b - 1) * log1p(-x) - log_norm); /* dI/dy */
        double step = (value - p) / slope;
        double next = y - step;
        if (!(next > low && next < high))
            next = 0.5 * (low + high);
        if (fabs(next - y) <= 4 * DBL_EPSILON * (1 + fabs(y)))
            return exp(next);
        y = next;
    }
    return exp(y);
}

double ipt_beta_ppf(double p, double a, double b)
{
    if (!(a > 0 && b > 0) || isnan(p))
        return (double)NAN;
    if (p <= 0)
        return 0;
    if (p >= 1)
        return 1;
    double log_norm = lgamma(a) + lgamma(b) - lgamma(a + b);
    double split = (a + 1) / (a + b + 2); /* the fraction converges below it */
    double at_split = beta_lower(split, a, b, log_norm);
    if (p <= at_split)
        return solve_lower(p, a, b, split, log_norm);
    /* the other end is the mirror image */
    double mirror = (b + 1) / (a + b + 2);
    return 1 - solve_lower(1 - p, b, a, mirror, log_norm);
}
