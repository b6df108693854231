/* sampler/solve_ve.c - k-diffusion's family: x = x0 + sigma z, derivative (x - x0) / sigma.
 * Source: Karras et al. 2022, algorithms 1 and 2; diffusers' classes of the same names. */
#include "sampler/internal.h"

#include <string.h>

/* s->work = derivative at noise level sigma. */
static void derivative(ipt_sampler *s, double sigma, const float *m, const float *x)
{
    double p, q;
    x0_coefficients_ve(s->cfg.prediction, sigma, &p, &q);
    const double c[2] = {(1 - p) / sigma, -q / sigma};
    const float *const v[2] = {x, m};
    combine(s->work, s->n, 2, c, v);
}

/* out = x + dt * slope (+ up * z) */
static void move(const ipt_sampler *s, float *out, const float *x, const float *slope, double dt,
                 const float *z, double up)
{
    const double c[3] = {1, dt, z != NULL ? up : 0};
    const float *const v[3] = {x, slope, z};
    combine(out, s->n, 3, c, v);
}

ipt_status step_euler(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    (void)z;
    derivative(s, s->sigma[k], m, x);
    move(s, x, x, s->work, s->sigma[k + 1] - s->sigma[k], NULL, 0);
    return IPT_OK;
}

/* --- ancestral Euler ------------------------------------------------------------------------- */
/* Splits the way down into a deterministic part and fresh noise.  In f32: for a long step the
 * difference below keeps few digits, and the reference's are the ones to match. */
void ancestral_split(double from, double to, double *up, double *down)
{
    float f = (float)from, t = (float)to;
    float u = t > 0 && f > t ? sqrtf(t * t * (f * f - t * t) / (f * f)) : 0;
    float rest = t * t - u * u;
    *up = (double)u;
    *down = rest > 0 ? (double)sqrtf(rest) : 0;
}

bool noise_euler_a(const ipt_sampler *s, int32_t k) { return s->sigma[k + 1] > 0; }

ipt_status step_euler_a(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    double from = s->sigma[k], to = s->sigma[k + 1], up, down;
    ancestral_split(from, to, &up, &down);
    derivative(s, from, m, x);
    move(s, x, x, s->work, down - from, z, up);
    return IPT_OK;
}

/* --- second order: even k predicts, odd k corrects from the saved start ----------------------- */
ipt_status step_heun(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    (void)z;
    bool second = k % 2 == 1;
    double level = second ? s->sigma_mid[k] : s->sigma[k], p, q;
    if (s->cfg.clip_sample) {
        x0_coefficients_ve(s->cfg.prediction, level, &p, &q);
        const double c[2] = {p, q};
        const float *const v[2] = {x, m};
        combine(s->work2, s->n, 2, c, v);
        clamp_values(s->work2, s->n, s->cfg.clip_sample_range);
        const double d[2] = {1 / level, -1 / level};
        const float *const w[2] = {x, s->work2};
        combine(s->work, s->n, 2, d, w);
    } else {
        derivative(s, level, m, x);
    }
    if (!second) {
        memcpy(s->saved, x, s->n * sizeof(*x));
        memcpy(s->hist[0], s->work, s->n * sizeof(*x));
        move(s, x, x, s->work, s->sigma[k + 1] - s->sigma[k], NULL, 0);
        return IPT_OK;
    }
    double dt = s->sigma[k] - s->sigma[k - 1];
    const double c[3] = {1, dt / 2, dt / 2};
    const float *const v[3] = {s->saved, s->hist[0], s->work};
    combine(x, s->n, 3, c, v);
    return IPT_OK;
}

ipt_status step_dpm_2(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    (void)z;
    if (k % 2 == 0) {
        memcpy(s->saved, x, s->n * sizeof(*x));
        derivative(s, s->sigma[k], m, x);
        move(s, x, x, s->work, s->sigma_mid[k] - s->sigma[k], NULL, 0);
        return IPT_OK;
    }
    derivative(s, s->sigma_mid[k], m, x);
    move(s, x, s->saved, s->work, s->sigma[k] - s->sigma[k - 1], NULL, 0);
    return IPT_OK;
}

bool noise_dpm_2_a(const ipt_sampler *s, int32_t k)
{
    (void)s;
    return k % 2 == 1;
}

ipt_status step_dpm_2_a(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    if (k % 2 == 0) {
        memcpy(s->saved, x, s->n * sizeof(*x));
        derivative(s, s->sigma[k], m, x);
        move(s, x, x, s->work, s->sigma_mid[k] - s->sigma[k], NULL, 0);
        return IPT_OK;
    }
    derivative(s, s->sigma_mid[k], m, x);
    move(s, x, s->saved, s->work, s->sigma_down[k] - s->sigma[k - 1], z, s->sigma_up[k]);
    return IPT_OK;
}

/* --- linear multistep ------------------------------------------------------------------------ */
/* Integral over the step of the j-th Lagrange polynomial through the last `order` levels; two
 * Gauss points are exact for the cubic that order 4 gives. */
static double lms_coefficient(const ipt_sampler *s, int32_t k, int32_t order, int32_t j)
{
    double a = s->sigma[k], b = s->sigma[k + 1], sum = 0;
    for (int32_t side = -1; side <= 1; side += 2) {
        double tau = 0.5 * (a + b) + side * 0.5 * (b - a) * 0.57735026918962576451;
        double product = 1;
        for (int32_t i = 0; i < order; i++)
            if (i != j)
                product *= (tau - s->sigma[k - i]) / (s->sigma[k - j] - s->sigma[k - i]);
        sum += product;
    }
    return sum * 0.5 * (b - a);
}

ipt_status step_lms(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    (void)z;
    derivative(s, s->sigma[k], m, x);
    history_push(s, s->work, s->t[k]);
    int32_t order = k + 1 < 4 ? k + 1 : 4;
    for (int32_t i = 1; i < order; i++) /* equal levels of a degenerate schedule */
        if (!(s->sigma[k - i] > s->sigma[k - i + 1]))
            order = i;
    double c[1 + SAMPLER_HISTORY] = {1};
    const float *v[1 + SAMPLER_HISTORY] = {x};
    int32_t count = 1;
    /* image to image starts with the order of the full run and the history there is, as the
     * reference does */
    for (int32_t j = 0; j < order && j < s->n_hist; j++) {
        c[count] = lms_coefficient(s, k, order, j);
        v[count++] = s->hist[j];
    }
    combine(x, s->n, count, c, v);
    return IPT_OK;
}

/* --- DPM-Solver++ SDE ------------------------------------------------------------------------ */
bool noise_dpmpp_sde(const ipt_sampler *s, int32_t k)
{
    return s->sigma[k % 2 == 0 ? k + 1 : k] > 0;
}

/* x = (down/from) base + (1 - down/from) x0 + up * (brown z1 + fresh z2) */
static void sde_move(ipt_sampler *s, float *x, const float *base, double from, double to,
                     const double weight[2], const float *const noise[2])
{
    double up, down;
    ancestral_split(from, to, &up, &down);
    double ratio = down / from;
    const double c[4] = {ratio, 1 - ratio, up * weight[0], up * weight[1]};
    const float *const v[4] = {base, s->work, noise[0], noise[1]};
    combine(x, s->n, 4, c, v);
}

ipt_status step_dpmpp_sde(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    bool second = k % 2 == 1;
    double level = second ? s->sigma_mid[k] : s->sigma[k], c[2];
    x0_coefficients_ve(s->cfg.prediction, level, &c[0], &c[1]);
    const float *const v[2] = {x, m};
    combine(s->work, s->n, 2, c, v);
    if (!second && !(s->sigma[k + 1] > 0)) {
        memcpy(x, s->work, s->n * sizeof(*x)); /* Euler to zero is the prediction */
        return IPT_OK;
    }
    if (!second) {
        memcpy(s->saved, x, s->n * sizeof(*x));
        memcpy(s->hist[0], z, s->n * sizeof(*z));
        const double weight[2] = {1, 0};
        const float *const noise[2] = {z, z};
        sde_move(s, x, s->saved, s->sigma[k], s->sigma_mid[k], weight, noise);
        return IPT_OK;
    }
    /* W(to) - W(from) = [W(mid) - W(from)] + [W(to) - W(mid)], each with variance |d sigma| */
    double from = s->sigma[k - 1], mid = s->sigma_mid[k], to = s->sigma[k];
    double span = from - to;
    const double weight[2] = {span > 0 ? sqrt((from - mid) / span) : 0,
                              span > 0 ? sqrt((mid - to) / span) : 0};
    const float *const noise[2] = {s->hist[0], z};
    sde_move(s, x, s->saved, from, to, weight, noise);
    return IPT_OK;
}

/* --- EDM ------------------------------------------------------------------------------------- */
ipt_status step_edm_euler(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z)
{
    (void)z;
    double sigma = s->sigma[k];
    ipt_sampler_predict_x0(s, k - s->begin, m, x, s->work);
    double dt = (s->sigma[k + 1] - sigma) / sigma;
    const double c[2] = {1 + dt, -dt};
    const float *const v[2] = {x, s->work};
    combine(x, s->n, 2, c, v);
    return IPT_OK;
}
