/* sampler/solve_unipc.c - predictor-correctors: UniPC (Zhao et al. 2023) and SA-Solver (Xue et
 * al. 2023).  Both correct the latent they were given with the output just computed for it, then
 * predict the next one; a step costs one evaluation. */
#include "sampler/internal.h"

#include <string.h>

static double lambda_at(const ipt_sampler *s, int32_t k)
{
    return s->sigma[k] > 0 ? -log(s->sigma[k]) : (double)INFINITY;
}

static double alpha_at(const ipt_sampler *s, int32_t k)
{
    return 1 / sqrt(square(s->sigma[k]) + 1);
}

/* s->work = what the rule extrapolates: x0, or eps when predict_x0 is off. */
static void convert(ipt_sampler *s, int32_t k, const float *m, const float *x)
{
    double c[2], alpha = alpha_at(s, k), sigma = s->sigma[k] * alpha;
    const float *const v[2] = {x, m};
    if (s->cfg.predict_x0) {
        x0_coefficients_vp(s->cfg.prediction, s->sigma[k], &c[0], &c[1]);
    } else if (s->cfg.prediction == IPT_PRED_EPSILON) {
        c[0] = 0;
        c[1] = 1;
    } else if (s->cfg.prediction == IPT_PRED_V) {
        c[0] = sigma;
        c[1] = alpha;
    } else {
        c[0] = 1 / sigma;
        c[1] = -alpha / sigma;
    }
    combine(s->work, s->n, 2, c, v);
    if (s->cfg.predict_x0 && s->cfg.thresholding)
        threshold_values(&s->cfg, s->work, s->n, s->work2);
}

/* --- UniPC ----------------------------------------------------------------------------------- */
/* R and b of the paper's eq. 10 for `order` points; returns B(h). */
static double unipc_system(const ipt_sampler *s, int32_t order, double hh, const double *rk,
                           double *R, double *b)
{
    double B = s->cfg.solver_type == IPT_SOLVER_BH1 ? hh : expm1(hh);
    double phi = expm1(hh) / hh - 1, factorial = 1;
    for (int32_t i = 0; i < order; i++) {
        for (int32_t j = 0; j < order; j++)
            R[i * order + j] = pow(rk[j], i);
        b[i] = phi * factorial / B;
        factorial *= i + 2;
        phi = phi / hh - 1 / factorial;
    }
    return B;
}

/* x = the update from level `from` to level `to`, starting at `base`, with the newest history
 * entry as m0 and older ones at levels from-1, from-2, ...; corrector when m_t is not NULL. */
static void unipc_update(ipt_sampler *s, int32_t from, int32_t to, int32_t order, const float *base,
                         const float *m_t, float *x)
{
    bool x0 = s->cfg.predict_x0;
    double h = lambda_at(s, to) - lambda_at(s, from), hh = x0 ? -h : h;
    double at = alpha_at(s, to), af = alpha_at(s, from);
    double scale = x0 ? at : s->sigma[to] * at;
    double c[2 + SAMPLER_HISTORY] = {0};
    const float *v[2 + SAMPLER_HISTORY] = {base, m_t};
    for (int32_t j = 0; j < SAMPLER_HISTORY; j++)
        v[2 + j] = s->hist[j];
    if (!(h > 0)) { /* no distance */
        memmove(x, base, s->n * sizeof(*x));
        return;
    }
    c[0] = x0 ? s->sigma[to] * at / (s->sigma[from] * af) : at / af;
    c[2] = -scale * expm1(hh);
    double rk[3] = {1, 1, 1}, R[9], b[3], rho[3] = {0.5, 0, 0}, B = expm1(hh);
    for (int32_t i = 1; i < order; i++)
        rk[i - 1] = (lambda_at(s, from - i) - lambda_at(s, from)) / h;
    rk[order - 1] = 1;
    if (order > 1 || m_t != NULL) {
        int32_t points = m_t != NULL ? order : order - 1;
        B = unipc_system(s, order, hh, rk, R, b);
        bool fixed = m_t != NULL ? order == 1 : order == 2; /* the paper's 1/2 */
        if (!fixed) {
            for (int32_t i = 0; i < points; i++) /* the predictor drops the last row and column */
                for (int32_t j = 0; j < points; j++)
                    R[i * points + j] = R[i * order + j];
            if (!solve_small(points, R, b, rho))
                rho[0] = rho[1] = rho[2] = 0;
        }
    }
    for (int32_t i = 1; i < order; i++) { /* D = (m_i - m0) / rk */
        double w = -scale * B * rho[i - 1] / rk[i - 1];
        c[2 + i] += w;
        c[2] -= w;
    }
    if (m_t != NULL) {
        double w = -scale * B * rho[order - 1];
        c[1] += w;
        c[2] -= w;
    }
    combine(x, s->n, 2 + SAMPLER_HISTORY, c, v);
}

/* Orders above 1 need strictly falling levels behind them. */
static int32_t falling_order(const ipt_sampler *s, int32_t k, int32_t order)
{
    for (int32_t j = 1; j < order; j++)
        if (k - j < 0 || !(s->sigma[k - j] > s->sigma[k - j + 1]))
            return j;
    return order;
}

ipt_status step_unipc(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    (void)z;
    const ipt_sampler_config *c = &s->cfg;
    bool disabled = k > 0 && k - 1 < 64 && (c->disable_corrector >> (k - 1) & 1) != 0;
    convert(s, k, m, x);
    if (k > 0 && s->has_saved && !disabled) {
        int32_t order = falling_order(s, k - 1, s->this_order);
        unipc_update(s, k - 1, k, order, s->saved, s->work, x);
    }
    history_push(s, s->work, s->t[k]);
    int32_t left = s->n_all - k, order = c->solver_order;
    if ((c->lower_order_final || !(s->sigma[k + 1] > 0)) && left < order)
        order = left;
    if (s->lower_order + 1 < order)
        order = s->lower_order + 1;
    s->this_order = order;
    memcpy(s->saved, x, s->n * sizeof(*x));
    s->has_saved = true;
    unipc_update(s, k, k + 1, falling_order(s, k, order), s->saved, NULL, x);
    if (s->lower_order < c->solver_order)
        s->lower_order++;
    return IPT_OK;
}

/* --- SA-Solver ------------------------------------------------------------------------------- */
static double sa_tau(const ipt_sampler *s, double t)
{
    return t >= 200 && t <= 800 ? s->cfg.tau : 0;
}

/* The reference draws at every step and lets tau weigh the noise, with 0 outside its interval. */
bool noise_sa(const ipt_sampler *s, int32_t k)
{
    (void)s;
    (void)k;
    return true;
}

/* Integral over [a, b] of exp(q (x - b)) x^p, by the recursion of partial integration. */
static double power_integral(int32_t p, double q, double a, double b)
{
    double start = exp(q * (a - b)), value = (1 - start) / q, pa = 1, pb = 1;
    for (int32_t i = 1; i <= p; i++) {
        pa *= a;
        pb *= b;
        value = (pb - pa * start) / q - i / q * value;
    }
    return value;
}

/* w[i] = integral of exp(q (x - b)) times the i-th Lagrange polynomial through `at`. */
static void sa_weights(int32_t order, const double *at, double q, double a, double b, double *w)
{
    for (int32_t i = 0; i < order; i++) {
        double poly[4] = {1, 0, 0, 0}, scale = 1; /* ascending powers */
        int32_t degree = 0;
        for (int32_t j = 0; j < order; j++) {
            if (j == i)
                continue;
            scale *= at[i] - at[j];
            for (int32_t p = ++degree; p >= 0; p--)
                poly[p] = (p > 0 ? poly[p - 1] : 0) - at[j] * poly[p];
        }
        w[i] = 0;
        for (int32_t p = 0; p <= degree; p++)
            w[i] += poly[p] / scale * power_integral(p, q, a, b);
    }
}

/* x = the stochastic Adams update from level k to k + 1, starting at `base`; v[0] newest of the
 * `order` outputs at levels `newest`, newest - 1, ... */
/* NOLINTNEXTLINE(readability-function-size): the letters of the paper's update */
static void sa_update(ipt_sampler *s, int32_t k, int32_t newest, int32_t order, double tau,
                      const float *base, const float *const *v, const float *z, float *x)
{
    double lambda_s = lambda_at(s, k), lambda_t = lambda_at(s, k + 1), h = lambda_t - lambda_s;
    double alpha_t = alpha_at(s, k + 1), sigma_t = s->sigma[k + 1] * alpha_t;
    double sigma_s = s->sigma[k] * alpha_at(s, k);
    double at[4], w[4] = {0}, q = 1 + square(tau);
    double c[6] = {0};
    const float *all[6] = {base, z, v[0], v[1], v[2], v[3]};
    if (!(h > 0)) {
        memmove(x, base, s->n * sizeof(*x));
        return;
    }
    for (int32_t i = 0; i < order; i++)
        at[i] = lambda_at(s, newest - i);
    sa_weights(order, at, q, lambda_s, lambda_t, w);
    if (order == 2) { /* the reference's second-order correction, predictor and corrector */
        bool corrects = newest == k + 1;
        double tail = (h * q - 1 + exp(-q * h)) / square(q);
        double extra =
            corrects ? h / 2 - tail / h : (square(h) / 2 - tail) / (lambda_s - lambda_at(s, k - 1));
        w[0] += extra;
        w[1] -= extra;
    }
    c[0] = exp(-square(tau) * h) * (sigma_t / sigma_s);
    c[1] = z != NULL ? sigma_t * sqrt(-expm1(-2 * square(tau) * h)) : 0;
    /* sigma_t exp(-tau^2 lambda_t) exp(q lambda_t) = sigma_t exp(lambda_t) = alpha_t */
    for (int32_t i = 0; i < order; i++)
        c[2 + i] = q * alpha_t * w[i];
    combine(x, s->n, 6, c, all);
}

static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

ipt_status step_sa(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    const ipt_sampler_config *c = &s->cfg;
    int32_t left = s->n_all - k;
    convert(s, k, m, x);
    if (k > 0 && s->has_saved) {
        double tau = sa_tau(s, s->t[k - 1]);
        const float *const v[4] = {s->work, s->hist[0], s->hist[1], s->hist[2]};
        int32_t order = 1 + falling_order(s, k - 1, s->this_corrector - 1);
        order = smaller(order, s->this_corrector);
        sa_update(s, k - 1, k, order, tau, s->saved, v, tau > 0 ? s->hist[3] : NULL, x);
    }
    history_push(s, s->work, s->t[k]);
    int32_t most =
        c->predictor_order > c->corrector_order - 1 ? c->predictor_order : c->corrector_order - 1;
    int32_t predictor =
        c->lower_order_final ? smaller(c->predictor_order, left) : c->predictor_order;
    int32_t corrector =
        c->lower_order_final ? smaller(c->corrector_order, left + 1) : c->corrector_order;
    s->this_order = smaller(predictor, s->lower_order + 1);
    s->this_corrector = smaller(corrector, s->lower_order + 2);
    memcpy(s->saved, x, s->n * sizeof(*x));
    s->has_saved = true;
    if (z != NULL) /* the fourth entry is never an output of these orders: it holds the noise */
        memcpy(s->hist[3], z, s->n * sizeof(*z));
    const float *const v[4] = {s->hist[0], s->hist[1], s->hist[2], s->hist[3]};
    sa_update(s, k, k, falling_order(s, k, s->this_order), sa_tau(s, s->t[k]), s->saved, v, z, x);
    if (s->lower_order < most)
        s->lower_order++;
    return IPT_OK;
}
