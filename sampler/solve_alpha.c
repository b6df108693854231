/* sampler/solve_alpha.c - classes that move between the cumulative alphas of integer timesteps:
 * DDIM and its inverse, DDPM, PNDM, LCM, TCD; and IPNDM, which has its own two curves. */
#include "sampler/internal.h"

#include <string.h>

/* 1 - a/b in f32: near the end of the run the two are so close that the reference's rounding is
 * visible in the result, and the reference is what a result is compared with. */
static double one_minus_ratio(double a, double b) { return (double)(1.0f - (float)a / (float)b); }

static double abar_at(const ipt_sampler *s, double t)
{
    int32_t last = s->cfg.num_train_timesteps - 1; /* a stride past a clamped first timestep */
    return t >= 0 ? s->abar[t < last ? (int32_t)t : last] : s->final_abar;
}

/* s->work = predicted clean picture, thresholded or clipped where the class does that. */
static void predict_x0(ipt_sampler *s, double abar, const float *m, const float *x, bool may_clip)
{
    double c[2];
    x0_coefficients_alpha(s->cfg.prediction, abar, &c[0], &c[1]);
    const float *const v[2] = {x, m};
    combine(s->work, s->n, 2, c, v);
    if (may_clip && s->cfg.thresholding)
        threshold_values(&s->cfg, s->work, s->n, s->work2);
    else if (may_clip && s->cfg.clip_sample)
        clamp_values(s->work, s->n, s->cfg.clip_sample_range);
}

/* Coefficients of eps = p x + q m. */
static void eps_coefficients(ipt_prediction pred, double abar, double *p, double *q)
{
    double a = sqrt(abar), b = sqrt(1 - abar);
    *p = pred == IPT_PRED_EPSILON ? 0 : pred == IPT_PRED_V ? b : 1 / b;
    *q = pred == IPT_PRED_EPSILON ? 1 : pred == IPT_PRED_V ? a : -a / b;
}

/* Timesteps between steps of an even run. */
static int32_t stride_of(const ipt_sampler *s) { return s->cfg.num_train_timesteps / s->steps; }

/* The timestep after k: DDIM and PNDM take an even stride whatever the spacing is. */
static double strided_prev(const ipt_sampler *s, int32_t k)
{
    if (s->list_prev)
        return k + 1 < s->n_all ? s->t[k + 1] : -1;
    return s->t[k] - stride_of(s);
}

static double ddim_deviation(const ipt_sampler *s, int32_t k)
{
    double a = s->abar[(int32_t)s->t[k]], b = abar_at(s, strided_prev(s, k));
    double variance = (1 - b) / (1 - a) * one_minus_ratio(a, b);
    return variance > 0 ? s->cfg.eta * sqrt(variance) : 0;
}

bool noise_ddim(const ipt_sampler *s, int32_t k) { return ddim_deviation(s, k) > 0; }

/* Song et al. 2021, eq. 12. */
ipt_status step_ddim(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    double a = s->abar[(int32_t)s->t[k]], b = abar_at(s, strided_prev(s, k)), p, q;
    double deviation = ddim_deviation(s, k);
    double direction = sqrt(fmax(1 - b - square(deviation), 0));
    predict_x0(s, a, m, x, true);
    eps_coefficients(s->cfg.prediction, a, &p, &q);
    const double c[4] = {sqrt(b), direction * p, direction * q, z != NULL ? deviation : 0};
    const float *const v[4] = {s->work, x, m, z};
    combine(x, s->n, 4, c, v);
    return IPT_OK;
}

ipt_status step_ddim_inverse(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    (void)z;
    double from = s->t[k] - stride_of(s), p, q;
    double a = abar_at(s, from), b = s->abar[(int32_t)s->t[k]];
    predict_x0(s, a, m, x, false);
    if (s->cfg.clip_sample)
        clamp_values(s->work, s->n, s->cfg.clip_sample_range);
    if (a < 1 || s->cfg.prediction != IPT_PRED_SAMPLE)
        eps_coefficients(s->cfg.prediction, a, &p, &q);
    else
        p = q = 0; /* a clean picture holds no noise to read off */
    const double c[3] = {sqrt(b), sqrt(1 - b) * p, sqrt(1 - b) * q};
    const float *const v[3] = {s->work, x, m};
    combine(x, s->n, 3, c, v);
    return IPT_OK;
}

bool noise_ddpm(const ipt_sampler *s, int32_t k) { return s->t[k] > 0; }

/* Ho et al. 2020, eq. 7. */
ipt_status step_ddpm(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    double a = s->abar[(int32_t)s->t[k]];
    double b = k + 1 < s->n_all ? s->abar[(int32_t)s->t[k + 1]] : 1;
    double alpha = a / b, beta = one_minus_ratio(a, b);
    double variance = fmax((1 - b) / (1 - a) * beta, 1e-20), deviation = sqrt(variance);
    if (s->cfg.variance == IPT_VARIANCE_FIXED_LARGE)
        deviation = sqrt(beta);
    predict_x0(s, a, m, x, true);
    const double c[3] = {sqrt(b) * beta / (1 - a), sqrt(alpha) * (1 - b) / (1 - a),
                         z != NULL ? deviation : 0};
    const float *const v[3] = {s->work, x, z};
    combine(x, s->n, 3, c, v);
    return IPT_OK;
}

/* --- PNDM (Liu et al. 2022) ------------------------------------------------------------------ */
/* eq. 9: from timestep t to prev with output e, in place. */
static void pndm_transfer(const ipt_sampler *s, double t, double prev, const float *e,
                          const float *from, float *x)
{
    double a = abar_at(s, t), b = abar_at(s, prev), p, q;
    eps_coefficients(s->cfg.prediction, a, &p, &q);
    double scale = -(b - a) / (a * sqrt(1 - b) + sqrt(a * (1 - a) * b));
    const double c[2] = {sqrt(b / a) + scale * p, scale * q};
    const float *const v[2] = {from, e};
    combine(x, s->n, 2, c, v);
}

static void pndm_runge_kutta(ipt_sampler *s, int32_t k, const float *m, float *x)
{
    static const double weight[4] = {1.0 / 6, 1.0 / 3, 1.0 / 3, 1.0 / 6};
    int32_t quarter = s->counter % 4;
    int32_t half = s->counter % 2 ? 0 : stride_of(s) / 2;
    double prev = s->t[k] - half, t = s->t[k - quarter];
    if (quarter == 0) {
        history_push(s, m, s->t[k]);
        memcpy(s->saved, x, s->n * sizeof(*x));
        memset(s->work, 0, s->n * sizeof(*x));
    }
    const double c[2] = {1, weight[quarter]};
    const float *const v[2] = {s->work, m};
    combine(s->work, s->n, 2, c, v);
    pndm_transfer(s, t, prev, quarter == 3 ? s->work : m, s->saved, x);
}

static void pndm_multistep(ipt_sampler *s, int32_t k, const float *m, float *x)
{
    static const double adams[5][4] = {
        {0, 0, 0, 0},
        {1, 0, 0, 0},
        {1.5, -0.5, 0, 0},
        {23.0 / 12, -16.0 / 12, 5.0 / 12, 0},
        {55.0 / 24, -59.0 / 24, 37.0 / 24, -9.0 / 24},
    };
    double stride = stride_of(s);
    double t = s->t[k], prev = t - stride;
    bool again = s->counter == 1 && s->n_hist == 1; /* the first step, with its end's slope */
    const float *const *hist = (const float *const *)s->hist;
    if (again) {
        prev = t;
        t = t + stride;
        const double c[2] = {0.5, 0.5};
        const float *const v[2] = {m, s->hist[0]};
        combine(s->work, s->n, 2, c, v);
        pndm_transfer(s, t, prev, s->work, s->saved, x);
        return;
    }
    history_push(s, m, t);
    if (s->counter == 0)
        memcpy(s->saved, x, s->n * sizeof(*x));
    combine(s->work, s->n, s->n_hist, adams[s->n_hist], hist);
    pndm_transfer(s, t, prev, s->work, x, x);
}

ipt_status step_pndm(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    (void)z;
    if (s->counter < s->n_prk && k < s->n_prk)
        pndm_runge_kutta(s, k, m, x);
    else
        pndm_multistep(s, k, m, x);
    s->counter++;
    return IPT_OK;
}

/* --- distilled models ------------------------------------------------------------------------ */
bool noise_lcm(const ipt_sampler *s, int32_t k) { return k + 1 < s->n_all; }

/* Luo et al. 2023, algorithm 3 with the boundary scalings of its eq. 9. */
ipt_status step_lcm(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    double a = s->abar[(int32_t)s->t[k]];
    double b = z != NULL ? s->abar[(int32_t)s->t[k + 1]] : 1;
    double scaled = s->t[k] * s->cfg.timestep_scaling, data = square(s->cfg.sigma_data);
    double skip = data / (square(scaled) + data), out = scaled / sqrt(square(scaled) + data);
    predict_x0(s, a, m, x, true);
    const double c[3] = {sqrt(b) * out, sqrt(b) * skip, z != NULL ? sqrt(1 - b) : 0};
    const float *const v[3] = {s->work, x, z};
    combine(x, s->n, 3, c, v);
    return IPT_OK;
}

bool noise_tcd(const ipt_sampler *s, int32_t k) { return s->cfg.eta > 0 && k + 1 < s->n_all; }

/* Zheng et al. 2024, algorithm 4: eta is the paper's gamma. */
ipt_status step_tcd(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    double prev = k + 1 < s->n_all ? s->t[k + 1] : 0, p, q;
    /* in f32, as the floor of a product sits on an edge for round numbers */
    float mid = floorf((float)(1 - s->cfg.eta) * (float)prev);
    double a = s->abar[(int32_t)s->t[k]], b = s->abar[(int32_t)prev];
    double c_mid = s->abar[(int32_t)mid];
    predict_x0(s, a, m, x, false);
    eps_coefficients(s->cfg.prediction, a, &p, &q);
    double keep = z != NULL ? sqrt(b / c_mid) : 1;
    double fresh = z != NULL ? sqrt(one_minus_ratio(b, c_mid)) : 0;
    double noise = keep * sqrt(1 - c_mid);
    const double c[4] = {keep * sqrt(c_mid), noise * p, noise * q, fresh};
    const float *const v[4] = {s->work, x, m, z};
    combine(x, s->n, 4, c, v);
    return IPT_OK;
}

/* --- IPNDM: sigma[] the sine, sigma_up[] the cosine of the level ------------------------------ */
ipt_status step_ipndm(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    static const double adams[5][4] = {
        {0, 0, 0, 0},
        {1, 0, 0, 0},
        {1.5, -0.5, 0, 0},
        {23.0 / 12, -16.0 / 12, 5.0 / 12, 0},
        {55.0 / 24, -59.0 / 24, 37.0 / 24, -9.0 / 24},
    };
    (void)z;
    const double c[2] = {s->sigma[k], s->sigma_up[k]};
    const float *const v[2] = {x, m};
    combine(s->work, s->n, 2, c, v);
    history_push(s, s->work, s->t[k]);
    combine(s->work, s->n, s->n_hist, adams[s->n_hist], (const float *const *)s->hist);
    double cosine = s->sigma_up[k] > 1e-8 ? s->sigma_up[k] : 1e-8;
    double ratio = s->sigma_up[k + 1] / cosine;
    const double d[2] = {ratio, s->sigma[k + 1] - ratio * s->sigma[k]};
    const float *const w[2] = {x, s->work};
    combine(x, s->n, 2, d, w);
    return IPT_OK;
}
