/* sampler/solve_vp.c - exponential integrators in lambda = log(alpha / sigma): DPM-Solver and
 * DPM-Solver++ multistep and singlestep, plain and stochastic, and DEIS.
 * Source: Lu et al. 2022 (DPM-Solver, DPM-Solver++); Zhang & Chen 2023 (DEIS); k-diffusion
 * sample_dpmpp_3m_sde; diffusers' classes. */
#include "sampler/internal.h"

#include <string.h>

/* One noise level: alpha^2 + sigma^2 = 1, lambda = +infinity where sigma = 0. */
typedef struct level {
    double alpha, sigma, lambda;
} level;

static level level_at(const ipt_sampler *s, int32_t k)
{
    double sigma = s->sigma[k], alpha = 1 / sqrt(square(sigma) + 1);
    return (level){alpha, sigma * alpha, sigma > 0 ? -log(sigma) : (double)INFINITY};
}

static bool is_stochastic(const ipt_sampler *s)
{
    return s->cfg.algorithm == IPT_ALGORITHM_SDE_DPMSOLVERPP ||
           s->cfg.algorithm == IPT_ALGORITHM_SDE_DPMSOLVER;
}

bool noise_dpm(const ipt_sampler *s, int32_t k) { return is_stochastic(s) && s->sigma[k + 1] > 0; }

/* Newest history entry = what the rule extrapolates: x0, or eps for the noise forms. */
static void push_prediction(ipt_sampler *s, int32_t k, bool want_eps, const float *m,
                            const float *x)
{
    double c[2];
    const float *const v[2] = {x, m};
    level now = level_at(s, k);
    if (want_eps && s->cfg.prediction == IPT_PRED_EPSILON && !s->cfg.thresholding) {
        history_push(s, m, s->t[k]);
        return;
    }
    x0_coefficients_vp(s->cfg.prediction, s->sigma[k], &c[0], &c[1]);
    combine(s->work, s->n, 2, c, v);
    if (s->cfg.thresholding)
        threshold_values(&s->cfg, s->work, s->n, s->work2);
    if (want_eps) {
        const double d[2] = {1 / now.sigma, -now.alpha / now.sigma};
        const float *const w[2] = {x, s->work};
        combine(s->work, s->n, 2, d, w);
    }
    history_push(s, s->work, s->t[k]);
}

/* Weights of one update x' = x_weight base + d[0] D0 + d[1] D1 + d[2] D2 + noise z, where the Dj
 * are divided differences of the predictions from `from` to `to`. */
typedef struct update {
    double base, d[3], noise;
} update;

/* phi functions of the interval with their signs, so that all four algorithms read alike:
 * first = integral of the kernel, second and third its moments. */
static update update_weights(const ipt_sampler *s, level to, level from)
{
    double h = to.lambda - from.lambda;
    bool midpoint = s->cfg.solver_type == IPT_SOLVER_MIDPOINT;
    update u = {0};
    switch (s->cfg.algorithm) {
    case IPT_ALGORITHM_DPMSOLVER: {
        double e = expm1(h);
        u.base = to.alpha / from.alpha;
        u.d[0] = -to.sigma * e;
        u.d[1] = midpoint ? 0.5 * u.d[0] : -to.sigma * (e / h - 1);
        u.d[2] = -to.sigma * ((e - h) / square(h) - 0.5);
        break;
    }
    case IPT_ALGORITHM_SDE_DPMSOLVER: {
        double e = expm1(h);
        u.base = to.alpha / from.alpha;
        u.d[0] = -2 * to.sigma * e;
        u.d[1] = midpoint ? -to.sigma * e : -2 * to.sigma * (e / h - 1);
        u.noise = to.sigma * sqrt(expm1(2 * h));
        break;
    }
    case IPT_ALGORITHM_SDE_DPMSOLVERPP: {
        double e = -expm1(-2 * h), g = 2 * h;
        u.base = to.sigma / from.sigma * exp(-h);
        u.d[0] = to.alpha * e;
        u.d[1] = midpoint ? 0.5 * u.d[0] : to.alpha * (1 - e / g);
        /* diffusers' sign of the constant, which k-diffusion has as + 0.5 */
        u.d[2] = to.alpha * ((e - g) / square(g) - 0.5);
        u.noise = to.sigma * sqrt(e);
        break;
    }
    case IPT_ALGORITHM_DPMSOLVERPP:
    default: {
        double e = expm1(-h);
        u.base = to.sigma / from.sigma;
        u.d[0] = -to.alpha * e;
        u.d[1] = midpoint ? 0.5 * u.d[0] : to.alpha * (e / h + 1);
        u.d[2] = -to.alpha * ((e + h) / square(h) - 0.5);
        break;
    }
    }
    return u;
}

/* The first moment as orders above 2 use it, whatever solver_type says. */
static double exact_first_moment(const ipt_sampler *s, level to, level from)
{
    double h = to.lambda - from.lambda;
    switch (s->cfg.algorithm) {
    case IPT_ALGORITHM_DPMSOLVER:
        return -to.sigma * (expm1(h) / h - 1);
    case IPT_ALGORITHM_SDE_DPMSOLVERPP:
        return to.alpha * (expm1(-2 * h) / (2 * h) + 1);
    case IPT_ALGORITHM_SDE_DPMSOLVER:
    case IPT_ALGORITHM_DPMSOLVERPP:
    default:
        return to.alpha * (expm1(-h) / h + 1);
    }
}

/* x = u.base * base + sum over history of w[j] hist[j] + noise. */
static void apply(const ipt_sampler *s, const update *u, const double w[3], const float *base,
                  const float *z, float *x)
{
    const double c[5] = {u->base, w[0], w[1], w[2], z != NULL ? u->noise : 0};
    const float *const v[5] = {base, s->hist[0], s->hist[1], s->hist[2], z};
    combine(x, s->n, 5, c, v);
}

/* --- multistep ------------------------------------------------------------------------------- */
static int32_t multistep_order(const ipt_sampler *s, int32_t k)
{
    const ipt_sampler_config *c = &s->cfg;
    bool k_diffusion = s->kind == IPT_SAMPLER_DPMPP_3M_SDE;
    int32_t most = k_diffusion ? 3 : c->solver_order, left = s->n_all - k;
    int32_t order = s->n_hist < most ? s->n_hist : most;
    bool few = c->lower_order_final && s->n_all < 15 && !k_diffusion;
    if (left == 1 &&
        (few || (s->kind != IPT_SAMPLER_DEIS && (c->euler_at_final || !c->final_sigma_min))))
        order = 1;
    if (left == 2 && few && order > 2)
        order = 2;
    for (int32_t j = 1; j < order; j++) /* equal levels of a crowded schedule */
        if (!(s->sigma[k - j] > s->sigma[k - j + 1]))
            order = j;
    return s->sigma[k + 1] > 0 ? order : 1;
}

ipt_status step_dpm_multi(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    bool want_eps = s->cfg.algorithm == IPT_ALGORITHM_DPMSOLVER ||
                    s->cfg.algorithm == IPT_ALGORITHM_SDE_DPMSOLVER;
    bool k_diffusion = s->kind == IPT_SAMPLER_DPMPP_3M_SDE;
    push_prediction(s, k, want_eps, m, x);
    int32_t order = multistep_order(s, k);
    level to = level_at(s, k + 1), from = level_at(s, k);
    double h = to.lambda - from.lambda, w[3] = {0};
    if (!(h > 0))
        return IPT_OK; /* no distance, no change */
    update u = update_weights(s, to, from);
    w[0] = u.d[0];
    if (order == 2) {
        double r0 = (from.lambda - level_at(s, k - 1).lambda) / h;
        double d1 = k_diffusion ? exact_first_moment(s, to, from) : u.d[1];
        w[0] += d1 / r0;
        w[1] -= d1 / r0;
    } else if (order == 3) {
        double l1 = level_at(s, k - 1).lambda, l2 = level_at(s, k - 2).lambda;
        double r0 = (from.lambda - l1) / h, r1 = (l1 - l2) / h;
        double d1 = exact_first_moment(s, to, from);
        double d2 = k_diffusion ? u.d[2] + to.alpha : u.d[2]; /* its constant is + 0.5 */
        /* D1 = D10 + r0/(r0+r1) (D10 - D11), D2 = (D10 - D11)/(r0+r1) */
        double slope = d1 * r0 / (r0 + r1) + d2 / (r0 + r1);
        double d10 = (d1 + slope) / r0, d11 = -slope / r1;
        w[0] += d10;
        w[1] += d11 - d10;
        w[2] -= d11;
    }
    apply(s, &u, w, x, z, x);
    return IPT_OK;
}

/* --- singlestep ------------------------------------------------------------------------------ */
void single_orders(ipt_sampler *s)
{
    int32_t n = s->n_all, order = s->cfg.solver_order;
    for (int32_t k = 0; k < n; k++)
        s->order[k] = 1 + k % order;
    /* the last group steps down, ...,1,2,1 or ...,1,1; an unfinished one does so by itself */
    if (!s->cfg.final_sigma_min || (s->cfg.lower_order_final && n % order == 0))
        s->order[n - 1] = 1;
}

ipt_status step_dpm_single(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    push_prediction(s, k, s->cfg.algorithm == IPT_ALGORITHM_DPMSOLVER, m, x);
    int32_t order = s->order[k] < s->n_hist ? s->order[k] : s->n_hist;
    if (order == 1)
        memcpy(s->saved, x, s->n * sizeof(*x));
    int32_t start = k + 1 - order; /* the step spans from the level of its first evaluation */
    level to = level_at(s, k + 1), from = level_at(s, start);
    double h = to.lambda - from.lambda, w[3] = {0};
    if (!(h > 0) || (order > 1 && !(s->sigma[k] < s->sigma[start])))
        return IPT_OK;
    update u = update_weights(s, to, from);
    if (order == 1) {
        w[0] = u.d[0];
    } else if (order == 2) {
        double r0 = (level_at(s, k).lambda - from.lambda) / h;
        w[0] = u.d[1] / r0;
        w[1] = u.d[0] - u.d[1] / r0;
    } else {
        double r0 = (level_at(s, k).lambda - from.lambda) / h;
        double r1 = (level_at(s, k - 1).lambda - from.lambda) / h;
        double d1 = exact_first_moment(s, to, from), d11 = d1, d10 = 0;
        if (s->cfg.solver_type == IPT_SOLVER_HEUN) {
            d10 = (d1 * r0 - 2 * u.d[2]) / (r0 - r1);
            d11 = (-d1 * r1 + 2 * u.d[2]) / (r0 - r1);
        }
        /* D10 = (m1 - m2)/r1, D11 = (m0 - m2)/r0 */
        w[0] = d11 / r0;
        w[1] = d10 / r1;
        w[2] = u.d[0] - w[0] - w[1];
    }
    apply(s, &u, w, s->saved, z, x);
    return IPT_OK;
}

/* --- DEIS ------------------------------------------------------------------------------------ */
/* Integral from 0 to t of the Lagrange basis in log rho that is 1 at b and 0 at c (and d). */
static double deis_integral2(double t, double b, double c)
{
    return t * (-log(c) + log(t) - 1) / (log(b) - log(c));
}

static double deis_integral3(double t, double b, double c, double d)
{
    double lt = log(t), lb = log(b), lc = log(c), ld = log(d);
    return t * (lc * (ld - lt + 1) - ld * lt + ld + lt * lt - 2 * lt + 2) / ((lb - lc) * (lb - ld));
}

ipt_status step_deis(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    (void)z;
    push_prediction(s, k, true, m, x);
    int32_t order = multistep_order(s, k);
    level to = level_at(s, k + 1), from = level_at(s, k);
    double t = s->sigma[k + 1], a = s->sigma[k], w[3] = {0};
    update u = {.base = to.alpha / from.alpha};
    if (order == 1) {
        w[0] = to.alpha * (t - a); /* -sigma_t (exp h - 1) */
    } else if (order == 2) {
        double b = s->sigma[k - 1];
        w[0] = to.alpha * (deis_integral2(t, a, b) - deis_integral2(a, a, b));
        w[1] = to.alpha * (deis_integral2(t, b, a) - deis_integral2(a, b, a));
    } else {
        double b = s->sigma[k - 1], c = s->sigma[k - 2];
        w[0] = to.alpha * (deis_integral3(t, a, b, c) - deis_integral3(a, a, b, c));
        w[1] = to.alpha * (deis_integral3(t, b, c, a) - deis_integral3(a, b, c, a));
        w[2] = to.alpha * (deis_integral3(t, c, a, b) - deis_integral3(a, c, a, b));
    }
    apply(s, &u, w, x, NULL, x);
    return IPT_OK;
}
