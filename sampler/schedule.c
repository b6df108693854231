/* sampler/schedule.c - from a configuration to numbers: cumulative alphas, the sigma table, and
 * the timesteps and sigmas of one run.
 *
 * The reference keeps its tables in f32; the same roundings are made here (rounded()), because a
 * published result depends on them in its seventh digit and a truncated timestep in its first.
 * Source: diffusers set_timesteps of each class; Karras et al. 2022 eq. 5; Sabour et al. 2024
 * (Align Your Steps) for its tables; ComfyUI for sgm_uniform, simple and beta. */
#include "sampler/internal.h"

static double rounded(double v) { return (double)(float)v; }

/* --- tables ---------------------------------------------------------------------------------- */
/* torch.linspace in f32: counted from both ends. */
static double linspace_f32(float start, float end, int32_t n, int32_t i)
{
    float step = n > 1 ? (end - start) / (float)(n - 1) : 0;
    /* the product joins the sum in one rounding there */
    return i < n / 2 ? rounded((double)start + (double)step * i)
                     : rounded((double)end - (double)step * (n - 1 - i));
}

static double alpha_bar_fn(ipt_beta_schedule kind, double t)
{
    const double half_pi = 1.5707963267948966;
    return kind == IPT_BETA_EXP ? exp(t * -12.0) : square(cos((t + 0.008) / 1.008 * half_pi));
}

static double beta_at(const ipt_sampler_config *c, int32_t i)
{
    int32_t T = c->num_train_timesteps;
    switch (c->beta_schedule) {
    case IPT_BETA_SCALED_LINEAR: {
        double root = linspace_f32((float)sqrt(c->beta_start), (float)sqrt(c->beta_end), T, i);
        return rounded(root * root);
    }
    case IPT_BETA_SQUAREDCOS:
    case IPT_BETA_EXP: {
        double now = alpha_bar_fn(c->beta_schedule, (double)i / T);
        double after = alpha_bar_fn(c->beta_schedule, (double)(i + 1) / T);
        double beta = 1 - after / now;
        return rounded(beta < 0.999 ? beta : 0.999);
    }
    case IPT_BETA_SIGMOID: {
        double s = 1 / (1 + exp(-linspace_f32(-6, 6, T, i)));
        return rounded(rounded(s) * (c->beta_end - c->beta_start) + c->beta_start);
    }
    case IPT_BETA_LINEAR:
    default:
        return linspace_f32((float)c->beta_start, (float)c->beta_end, T, i);
    }
}

/* abar[i] = product of (1 - beta); torch accumulates an f32 cumprod in double on the CPU. */
static void cumulate(const double *beta, int32_t T, double *abar)
{
    double product = 1;
    for (int32_t i = 0; i < T; i++) {
        product *= rounded(1 - beta[i]);
        abar[i] = rounded(product);
    }
}

/* Lin et al. 2023, algorithm 1: shift and scale sqrt(abar) so that the last is 0. */
static void rescale_zero_snr(double *beta, double *abar, int32_t T)
{
    cumulate(beta, T, abar);
    float first = sqrtf((float)abar[0]), last = sqrtf((float)abar[T - 1]);
    float scale = first / (first - last);
    for (int32_t i = 0; i < T; i++) {
        float root = (sqrtf((float)abar[i]) - last) * scale;
        abar[i] = (double)(root * root);
    }
    for (int32_t i = T - 1; i >= 0; i--) {
        float alpha = i > 0 ? (float)abar[i] / (float)abar[i - 1] : (float)abar[0];
        beta[i] = (double)(1.0f - alpha);
    }
    cumulate(beta, T, abar);
}

static ipt_status check_betas(ipt_sampler *s, const double *beta)
{
    int32_t T = s->cfg.num_train_timesteps;
    for (int32_t i = 0; i < T; i++)
        if (!(beta[i] > 0 && beta[i] < 1))
            return ipt_fail(s->ctx, IPT_ERR_FORMAT,
                            "noise schedule: beta %" PRId32 " of %" PRId32 " is %g, must lie "
                            "between 0 and 1; check beta_start and beta_end",
                            i, T, beta[i]);
    return IPT_OK;
}

static ipt_status build_tables(ipt_sampler *s, double *beta)
{
    const ipt_sampler_config *c = &s->cfg;
    int32_t T = c->num_train_timesteps;
    for (int32_t i = 0; i < T; i++)
        beta[i] = c->trained_betas != NULL ? (double)c->trained_betas[i] : beta_at(c, i);
    IPT_TRY(check_betas(s, beta));
    bool zero_snr = c->rescale_betas_zero_snr && s->cls->has_zero_snr;
    if (zero_snr)
        rescale_zero_snr(beta, s->abar, T);
    else
        cumulate(beta, T, s->abar);
    if (zero_snr && s->cls->frame != FRAME_ALPHA)
        s->abar[T - 1] = 0x1p-24; /* a finite sigma */
    if (!zero_snr && !(s->abar[T - 1] > 0))
        return ipt_fail(s->ctx, IPT_ERR_FORMAT,
                        "noise schedule: no signal is left after %" PRId32 " timesteps; beta_end "
                        "%g is too large",
                        T, c->beta_end);
    for (int32_t i = 0; i < T; i++) {
        float a = (float)s->abar[i];
        s->table[i] = a > 0 ? (double)sqrtf((1.0f - a) / a) : 4096.0;
        s->table_log[i] = rounded(log(s->table[i]));
    }
    s->final_abar = c->set_alpha_to_one ? 1 : s->abar[0];
    return IPT_OK;
}

/* --- between timesteps and sigmas ------------------------------------------------------------ */
/* numpy.interp of the table at t. */
static double sigma_at(const ipt_sampler *s, double t)
{
    int32_t T = s->cfg.num_train_timesteps;
    if (t <= 0)
        return s->table[0];
    if (t >= T - 1)
        return s->table[T - 1];
    int32_t i = (int32_t)t;
    return (s->table[i + 1] - s->table[i]) * (t - i) + s->table[i];
}

/* The same, straight in log sigma, as k-diffusion interpolates. */
static double log_sigma_at(const ipt_sampler *s, double t)
{
    int32_t i = (int32_t)t;
    if (t <= 0 || t == i || t >= s->cfg.num_train_timesteps - 1)
        return sigma_at(s, t);
    return exp((1 - (t - i)) * s->table_log[i] + (t - i) * s->table_log[i + 1]);
}

/* Timestep whose sigma this is, linear in log sigma. */
static double t_of_sigma(const ipt_sampler *s, double sigma)
{
    int32_t T = s->cfg.num_train_timesteps;
    double log_sigma = log(sigma > 1e-10 ? sigma : 1e-10);
    int32_t low = 0, high = T; /* last index whose logarithm is not above */
    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;
        if (log_sigma >= s->table_log[middle])
            low = middle;
        else
            high = middle;
    }
    low = low > T - 2 ? T - 2 : low;
    double span = rounded(s->table_log[low] - s->table_log[low + 1]);
    double w = span != 0 ? (s->table_log[low] - log_sigma) / span : 0;
    w = w < 0 ? 0 : w > 1 ? 1 : w;
    return (1 - w) * low + w * (low + 1);
}

/* --- timesteps of one run -------------------------------------------------------------------- */
static double ramp(int32_t n, int32_t i) /* numpy.linspace(0, 1, n)[i] */
{
    return n > 1 ? (i == n - 1 ? 1.0 : (double)i * (1.0 / (n - 1))) : 0.0;
}

/* numpy.linspace(0, last, n)[i] */
static double linspace0(double last, int32_t n, int32_t i)
{
    if (n < 2)
        return 0;
    return i == n - 1 ? last : (double)i * (last / (n - 1));
}

/* Number of timesteps whose log signal-to-noise is under lambda_min_clipped. */
static int32_t clipped_count(const ipt_sampler *s)
{
    int32_t T = s->cfg.num_train_timesteps, count = 0;
    if (s->kind != IPT_SAMPLER_DPMPP_2M && s->kind != IPT_SAMPLER_DPMPP_2M_SDE &&
        s->kind != IPT_SAMPLER_DPMPP_3M_SDE && s->kind != IPT_SAMPLER_DPM_SINGLE &&
        s->kind != IPT_SAMPLER_SA)
        return 0;
    while (count < T - 1 && -s->table_log[T - 1 - count] < s->cfg.lambda_min_clipped)
        count++;
    return count;
}

/* One timestep more than asked is spread and the last left out: the VP classes. */
static void spread_timesteps_vp(const ipt_sampler *s, ipt_spacing spacing, int32_t n, double *t)
{
    int32_t T = s->cfg.num_train_timesteps, last = T - clipped_count(s);
    int32_t stride = last / (n + 1);
    double delta = ((double)last - (double)T / n) - last;
    for (int32_t i = 0; i < n; i++) {
        if (spacing == IPT_SPACING_LINSPACE)
            t[i] = rint(linspace0(last - 1, n + 1, n - i));
        else if (spacing == IPT_SPACING_LEADING)
            t[i] = (double)(n - i) * stride + s->cfg.steps_offset;
        else
            t[i] = rint(last + i * delta) - 1;
    }
}

static void spread_timesteps(const ipt_sampler *s, ipt_spacing spacing, int32_t n, double *t)
{
    int32_t T = s->cfg.num_train_timesteps;
    bool whole = s->cls->frame == FRAME_ALPHA;
    int32_t stride = T / n;
    double delta = (T - (double)T / n) - T; /* as numpy.arange finds its stride */
    for (int32_t i = 0; i < n; i++) {
        if (spacing == IPT_SPACING_LINSPACE)
            t[i] = linspace0(T - 1, n, n - 1 - i);
        else if (spacing == IPT_SPACING_LEADING)
            t[i] = (double)(n - 1 - i) * stride + s->cfg.steps_offset;
        else
            t[i] = rint(T + i * delta) - 1;
        t[i] = whole ? rint(t[i]) : rounded(t[i]);
    }
}

static void clamp_timesteps(const ipt_sampler *s, int32_t n, double *t)
{
    double last = s->cfg.num_train_timesteps - 1;
    for (int32_t i = 0; i < n; i++)
        t[i] = t[i] < 0 ? 0 : t[i] > last ? last : t[i];
}

/* --- sigmas of one run ----------------------------------------------------------------------- */
typedef enum spread { SPREAD_NONE, SPREAD_KARRAS, SPREAD_EXP, SPREAD_BETA, SPREAD_LU } spread;

static double spread_sigma(const ipt_sampler *s, spread how, double lo, double hi, int32_t n,
                           int32_t i)
{
    double r = ramp(n, i);
    switch (how) {
    case SPREAD_KARRAS: {
        double a = pow(hi, 1.0 / 7.0), b = pow(lo, 1.0 / 7.0);
        return pow(a + r * (b - a), 7.0);
    }
    case SPREAD_BETA:
        return lo + ipt_beta_ppf(1 - r, 0.6, 0.6) * (hi - lo);
    case SPREAD_LU: {
        double a = s->table_log[s->cfg.num_train_timesteps - 1], b = s->table_log[0];
        return exp(a + r * (b - a));
    }
    case SPREAD_EXP:
    case SPREAD_NONE:
    default: {
        double a = log(hi), b = log(lo);
        return exp(i == n - 1 && n > 1 ? b : a + i * (n > 1 ? (b - a) / (n - 1) : 0));
    }
    }
}

/* The reference makes timesteps integers by different means. */
static double cast_timestep(const ipt_sampler *s, spread how, double t)
{
    bool cosine = s->cfg.beta_schedule == IPT_BETA_SQUAREDCOS;
    bool multi = s->kind == IPT_SAMPLER_DPMPP_2M || s->kind == IPT_SAMPLER_DPMPP_2M_SDE ||
                 s->kind == IPT_SAMPLER_DPMPP_3M_SDE;
    bool rounds = how == SPREAD_KARRAS || how == SPREAD_LU;
    switch (s->cls->frame) {
    case FRAME_ALPHA:
        return rint(t);
    case FRAME_VP:
        if (how == SPREAD_NONE) /* ComfyUI's schedules: the nearest */
            return rint(t);
        return rounds && !(multi && cosine) ? rint(t) : floor(t + 1e-9);
    case FRAME_VE:
    default:
        if (how == SPREAD_KARRAS &&
            (s->kind == IPT_SAMPLER_DPM_2 || s->kind == IPT_SAMPLER_DPM_2_A))
            return rint(t);
        return s->kind == IPT_SAMPLER_DPMPP_SDE ? t : rounded(t);
    }
}

static void convert_sigmas(ipt_sampler *s, spread how, int32_t n)
{
    const ipt_sampler_config *c = &s->cfg;
    double lo = s->table[0], hi = s->table[c->num_train_timesteps - 1];
    if (s->cls->frame != FRAME_VP) { /* the span of the spread timesteps, not of the table */
        hi = s->sigma[0];
        lo = s->sigma[n - 1];
    }
    if (s->kind == IPT_SAMPLER_EULER || s->kind == IPT_SAMPLER_UNIPC) {
        lo = c->sigma_min > 0 ? c->sigma_min : lo;
        hi = c->sigma_max > 0 ? c->sigma_max : hi;
    }
    for (int32_t i = 0; i < n; i++) {
        s->sigma[i] = spread_sigma(s, how, lo, hi, n, i);
        s->t[i] = cast_timestep(s, how, t_of_sigma(s, s->sigma[i]));
    }
}

static double ays_sigma(bool sdxl, int32_t n, int32_t i)
{
    static const double table[2][11] = {
        {14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092,
         0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582},
        {14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141,
         0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582},
    };
    const double *v = table[sdxl];
    double at = 10.0 * i / n;
    int32_t j = (int32_t)at;
    return j >= 10 ? v[10] : exp(log(v[j]) + (at - j) * (log(v[j + 1]) - log(v[j])));
}

/* Quantiles of Beta(0.6, 0.6) over the timesteps: many at both ends, few in the middle.  Timesteps
 * that fall together at the ends are one step, as in ComfyUI: steps and skip shrink with them. */
static void beta_timesteps(ipt_sampler *s)
{
    int32_t n = s->steps, count = 0;
    double last = s->cfg.num_train_timesteps - 1;
    for (int32_t i = 0; i < n; i++) {
        double t = rint(ipt_beta_ppf(1 - i * (1.0 / n), 0.6, 0.6) * last);
        if (count == 0 || t < s->t[count - 1])
            s->t[count++] = t;
    }
    s->skip = (int32_t)((int64_t)s->skip * count / n);
    s->steps = count;
}

/* The schedules that diffusers does not build itself. */
static void foreign_sigmas(ipt_sampler *s, int32_t n)
{
    static const int16_t ays_t[2][10] = {
        {999, 850, 736, 645, 545, 455, 343, 233, 124, 24},
        {999, 845, 730, 587, 443, 310, 193, 116, 53, 13},
    };
    int32_t T = s->cfg.num_train_timesteps;
    for (int32_t i = 0; i < n; i++) {
        if (s->schedule == IPT_SCHEDULE_SIMPLE) {
            s->t[i] = T - 1 - (int32_t)(i * ((double)T / n));
        } else if (s->schedule == IPT_SCHEDULE_SGM_UNIFORM) {
            s->t[i] = cast_timestep(s, SPREAD_NONE, linspace0(T - 1, n + 1, n - i));
        } else if (s->schedule == IPT_SCHEDULE_BETA) {
            /* beta_timesteps has set t */
        } else if (n == 10 && T == 1000) {
            s->t[i] = ays_t[s->cfg.ays_sdxl][i];
        } else {
            s->sigma[i] = ays_sigma(s->cfg.ays_sdxl, n, i);
            s->t[i] = cast_timestep(s, SPREAD_NONE, t_of_sigma(s, s->sigma[i]));
            continue;
        }
        s->sigma[i] = log_sigma_at(s, s->t[i]);
    }
}

static spread spread_of(const ipt_sampler *s)
{
    const ipt_sampler_config *c = &s->cfg;
    switch (s->schedule) {
    case IPT_SCHEDULE_KARRAS:
        return SPREAD_KARRAS;
    case IPT_SCHEDULE_EXPONENTIAL:
        return SPREAD_EXP;
    case IPT_SCHEDULE_DEFAULT:
        if (s->kind == IPT_SAMPLER_EULER_A || s->cls->frame == FRAME_ALPHA)
            return SPREAD_NONE; /* the class has no such field */
        if (c->use_karras_sigmas)
            return SPREAD_KARRAS;
        if (c->use_lu_lambdas &&
            (s->kind == IPT_SAMPLER_DPMPP_2M || s->kind == IPT_SAMPLER_DPMPP_2M_SDE))
            return SPREAD_LU;
        return c->use_exponential_sigmas ? SPREAD_EXP
               : c->use_beta_sigmas      ? SPREAD_BETA
                                         : SPREAD_NONE;
    case IPT_SCHEDULE_NORMAL:
    case IPT_SCHEDULE_SGM_UNIFORM:
    case IPT_SCHEDULE_SIMPLE:
    case IPT_SCHEDULE_BETA:
    case IPT_SCHEDULE_AYS:
    case IPT_SCHEDULE_TRAILING:
    case IPT_SCHEDULE_COUNT:
    default:
        return SPREAD_NONE;
    }
}

static ipt_spacing spacing_of(const ipt_sampler *s)
{
    if (s->schedule == IPT_SCHEDULE_NORMAL)
        return IPT_SPACING_LINSPACE;
    if (s->schedule == IPT_SCHEDULE_TRAILING)
        return IPT_SPACING_TRAILING;
    bool single = s->kind == IPT_SAMPLER_DPM_SINGLE; /* it knows no other */
    return single ? IPT_SPACING_LINSPACE : s->cfg.spacing;
}

static double final_sigma(const ipt_sampler *s, spread how, int32_t n)
{
    double tail = how != SPREAD_NONE ? s->sigma[n - 1] : s->table[0];
    if (s->kind == IPT_SAMPLER_DEIS || s->kind == IPT_SAMPLER_SA)
        return tail; /* their rules divide by it */
    if (!s->cfg.final_sigma_min)
        return 0;
    if (s->kind == IPT_SAMPLER_UNIPC)
        return tail;
    return s->kind == IPT_SAMPLER_EULER || s->cls->frame == FRAME_VP ? s->table[0] : 0;
}

/* t[n], sigma[n+1] of one evaluation a step, for every class but LCM, TCD, PNDM. */
static void base_schedule(ipt_sampler *s, int32_t n)
{
    spread how = spread_of(s);
    if (s->schedule == IPT_SCHEDULE_SIMPLE || s->schedule == IPT_SCHEDULE_SGM_UNIFORM ||
        s->schedule == IPT_SCHEDULE_BETA || s->schedule == IPT_SCHEDULE_AYS) {
        foreign_sigmas(s, n);
    } else {
        if (s->cls->frame == FRAME_VP)
            spread_timesteps_vp(s, spacing_of(s), n, s->t);
        else
            spread_timesteps(s, spacing_of(s), n, s->t);
        clamp_timesteps(s, n, s->t);
        for (int32_t i = 0; i < n; i++)
            s->sigma[i] = sigma_at(s, s->t[i]);
        if (how != SPREAD_NONE)
            convert_sigmas(s, how, n);
    }
    s->sigma[n] = final_sigma(s, how, n);
    for (int32_t i = 0; i <= n; i++)
        s->sigma[i] = rounded(s->sigma[i]);
    clamp_timesteps(s, n, s->t);
}

/* --- special cases --------------------------------------------------------------------------- */
static void euler_variants(ipt_sampler *s, int32_t n)
{
    const ipt_sampler_config *c = &s->cfg;
    int32_t T = c->num_train_timesteps;
    if (s->schedule == IPT_SCHEDULE_DEFAULT && c->interpolation_log_linear &&
        spread_of(s) == SPREAD_NONE) {
        double a = rounded(log(s->table[T - 1])), b = rounded(log(s->table[0]));
        for (int32_t i = 0; i <= n; i++) /* n + 1 values: the run ends at the table's least */
            s->sigma[i] = rounded(exp(a + i * (b - a) / n));
    }
    if (c->timestep_continuous && c->prediction == IPT_PRED_V)
        for (int32_t i = 0; i < n; i++)
            s->t[i] = rounded(0.25 * log(s->sigma[i]));
}

static void pndm_schedule(ipt_sampler *s, int32_t n, double *ts)
{
    /* ts descends.  The Runge-Kutta start needs four of them and the beginning of the run: fewer
     * steps and image to image start with the linear multistep. */
    int32_t T = s->cfg.num_train_timesteps, at = 0;
    if (s->cfg.skip_prk_steps || n < 4 || s->skip > 0) {
        s->cfg.skip_prk_steps = true;
        for (int32_t i = 0; i < n; i++) {
            s->t[at++] = ts[i];
            if (i == 1)
                s->t[at++] = ts[i]; /* evaluated twice */
        }
        s->n_all = at;
        return;
    }
    int32_t half = T / n / 2;
    double pairs[8];
    for (size_t i = 0; i < 4; i++) { /* ascending, as the reference lists them */
        pairs[2 * i] = ts[3 - i];
        pairs[2 * i + 1] = ts[3 - i] + half;
    }
    for (int32_t i = 12; i >= 1; i--) /* the inner 12 of 7 values doubled */
        s->t[at++] = pairs[i / 2];
    s->n_prk = at;
    for (int32_t i = 3; i < n; i++)
        s->t[at++] = ts[i];
    s->n_all = at;
}

static ipt_status distilled_schedule(ipt_sampler *s, int32_t n)
{
    int32_t T = s->cfg.num_train_timesteps, original = s->cfg.original_inference_steps;
    if (original < 1 || original > T)
        return ipt_fail(s->ctx, IPT_ERR_FORMAT,
                        "original_inference_steps is %" PRId32 ", must lie in 1..%" PRId32,
                        original, T);
    if (n > original)
        return ipt_fail(s->ctx, IPT_ERR_ARG,
                        "%" PRId32 " steps: sampler %s takes at most the %" PRId32
                        " steps its model was distilled on (original_inference_steps); use 1 to 8",
                        n, s->cls->name, original);
    int32_t stride = T / original;
    for (int32_t i = 0; i < n; i++) {
        int32_t index = (int32_t)floor((double)i * ((double)original / n));
        s->t[i] = (double)(original - index) * stride - 1;
    }
    return IPT_OK;
}

static void edm_schedule(ipt_sampler *s, int32_t n)
{
    const ipt_sampler_config *c = &s->cfg;
    double a = pow(c->sigma_max, 1 / c->rho), b = pow(c->sigma_min, 1 / c->rho);
    for (int32_t i = 0; i < n; i++) {
        double r = ramp(n, i);
        s->sigma[i] = rounded(c->edm_exponential
                                  ? exp(log(c->sigma_max) + r * log(c->sigma_min / c->sigma_max))
                                  : pow(a + r * (b - a), c->rho));
        s->t[i] = rounded(0.25 * log(s->sigma[i]));
    }
    s->sigma[n] = c->final_sigma_min ? s->sigma[n - 1] : 0;
    s->init_sigma = sqrt(square(c->sigma_max) + 1);
}

static void ipndm_schedule(ipt_sampler *s, int32_t n)
{
    const double half_pi = 1.5707963267948966;
    for (int32_t i = 0; i <= n; i++) /* sigma: the sine part; up: the cosine part */
    {
        double at = linspace_f32(1, 0, n + 1, i);
        s->sigma[i] = i == n ? 0 : rounded(square(sin(at * half_pi)));
        s->sigma_up[i] = rounded(sqrt(1 - square(s->sigma[i])));
        if (i < n)
            s->t[i] = rounded(atan2(s->sigma[i], s->sigma_up[i]) / half_pi);
    }
}

/* Second-order classes: doubles the lists and adds the levels in between. */
static void interleave(ipt_sampler *s, int32_t n, double *t0, double *s0)
{
    for (int32_t i = 0; i <= n; i++) {
        s0[i] = s->sigma[i];
        t0[i] = i < n ? s->t[i] : 0;
    }
    s->n_all = 2 * n - 1;
    for (int32_t i = 0; i < n; i++) {
        int32_t k = 2 * i;
        double now = s0[i], next = s0[i + 1], up, down;
        ancestral_split(now, next, &up, &down);
        double end = s->kind == IPT_SAMPLER_DPM_2_A ? down : next;
        double mid = s->kind == IPT_SAMPLER_HEUN ? next : i + 1 < n ? sqrt(now * end) : 0;
        s->t[k] = t0[i];
        s->sigma[k] = now;
        s->sigma[k + 1] = next;
        s->sigma_mid[k] = s->sigma_mid[k + 1] = rounded(mid);
        s->sigma_up[k] = s->sigma_up[k + 1] = rounded(up);
        s->sigma_down[k] = s->sigma_down[k + 1] = rounded(down);
        if (i + 1 < n)
            s->t[k + 1] = s->kind == IPT_SAMPLER_HEUN ? t0[i + 1] : t_of_sigma(s, mid);
    }
}

/* --- entry ----------------------------------------------------------------------------------- */
static ipt_status check_request(const ipt_sampler *s)
{
    const ipt_sampler_config *c = &s->cfg;
    int32_t T = c->num_train_timesteps;
    if (T < 2 || T > IPT_MAX_TRAIN_STEPS)
        return ipt_fail(s->ctx, IPT_ERR_FORMAT,
                        "num_train_timesteps is %" PRId32 ", must lie in 2..%d", T,
                        IPT_MAX_TRAIN_STEPS);
    if (s->steps < 1 || s->steps > T)
        return ipt_fail(s->ctx, IPT_ERR_ARG,
                        "%" PRId32 " steps: must lie in 1..%" PRId32
                        ", the number of timesteps the model was trained on",
                        s->steps, T);
    if (s->skip < 0 || s->skip >= s->steps)
        return ipt_fail(s->ctx, IPT_ERR_ARG,
                        "%" PRId32 " of %" PRId32 " steps skipped: none is left to run", s->skip,
                        s->steps);
    if (c->trained_betas != NULL && c->n_trained_betas != T)
        return ipt_fail(s->ctx, IPT_ERR_FORMAT,
                        "trained_betas holds %" PRId32 " values, num_train_timesteps is %" PRId32,
                        c->n_trained_betas, T);
    if (c->solver_order < 1 || c->solver_order > 3)
        return ipt_fail(s->ctx, IPT_ERR_FORMAT, "solver_order is %" PRId32 ", must be 1, 2 or 3",
                        c->solver_order);
    if (!(c->clip_sample_range > 0 && c->sample_max_value > 0 &&
          c->dynamic_thresholding_ratio >= 0 && c->dynamic_thresholding_ratio <= 1))
        return ipt_fail(s->ctx, IPT_ERR_FORMAT,
                        "clip_sample_range and sample_max_value must be positive and "
                        "dynamic_thresholding_ratio lie in 0..1");
    if (c->steps_offset < 0 || c->steps_offset >= T)
        return ipt_fail(s->ctx, IPT_ERR_FORMAT,
                        "steps_offset is %" PRId32 ", must lie in 0..%" PRId32, c->steps_offset,
                        T - 1);
    bool spreads = s->schedule != IPT_SCHEDULE_DEFAULT && s->schedule != IPT_SCHEDULE_NORMAL &&
                   s->schedule != IPT_SCHEDULE_TRAILING;
    bool own = s->kind == IPT_SAMPLER_EDM_EULER || s->kind == IPT_SAMPLER_IPNDM;
    bool even = s->kind == IPT_SAMPLER_PNDM || s->kind == IPT_SAMPLER_DDIM_INVERSE;
    if ((own && s->schedule != IPT_SCHEDULE_DEFAULT) || (even && spreads))
        return ipt_fail(s->ctx, IPT_ERR_ARG,
                        "schedule %s does not go with sampler %s, whose rule needs %s; use "
                        "--schedule default, or another sampler",
                        ipt_schedule_name(s->schedule), s->cls->name,
                        own ? "its own noise levels" : "evenly spaced timesteps");
    if (s->kind == IPT_SAMPLER_EDM_EULER &&
        !(c->sigma_min > 0 && c->sigma_max > c->sigma_min && c->sigma_data > 0 && c->rho > 0))
        return ipt_fail(s->ctx, IPT_ERR_FORMAT,
                        "EDM needs 0 < sigma_min < sigma_max, sigma_data and rho above 0");
    return IPT_OK;
}

static double init_noise_sigma(const ipt_sampler *s)
{
    if (s->cls->frame != FRAME_VE)
        return 1;
    double most = 0;
    for (int32_t k = 0; k <= s->n_all; k++)
        most = s->sigma[k] > most ? s->sigma[k] : most;
    return spacing_of(s) == IPT_SPACING_LEADING ? sqrt(square(most) + 1) : most;
}

/* With zero terminal signal a noise prediction says nothing about the picture: x0 = 0/0. */
static ipt_status check_signal(const ipt_sampler *s)
{
    if (s->cls->frame != FRAME_ALPHA || s->kind == IPT_SAMPLER_IPNDM ||
        s->cfg.prediction != IPT_PRED_EPSILON)
        return IPT_OK;
    for (int32_t k = 0; k < s->n_all; k++)
        if (!(s->abar[(int32_t)s->t[k]] > 0))
            return ipt_fail(s->ctx, IPT_ERR_ARG,
                            "sampler %s starts at timestep %g, where rescale_betas_zero_snr "
                            "leaves no signal and a noise prediction (epsilon) cannot be "
                            "inverted; choose an euler, dpmpp or unipc sampler, or --schedule "
                            "default with leading timesteps",
                            s->cls->name, s->t[k]);
    return IPT_OK;
}

static ipt_status run_schedule(ipt_sampler *s, double *scratch)
{
    if (s->schedule == IPT_SCHEDULE_BETA)
        beta_timesteps(s);
    int32_t n = s->steps;
    s->n_all = n;
    bool distilled = s->kind == IPT_SAMPLER_LCM || s->kind == IPT_SAMPLER_TCD;
    if (s->kind == IPT_SAMPLER_EDM_EULER) {
        edm_schedule(s, n);
    } else if (s->kind == IPT_SAMPLER_IPNDM) {
        ipndm_schedule(s, n);
    } else if (distilled && s->schedule == IPT_SCHEDULE_DEFAULT) {
        IPT_TRY(distilled_schedule(s, n));
    } else {
        base_schedule(s, n);
    }
    if (s->kind == IPT_SAMPLER_EULER)
        euler_variants(s, n);
    if (s->kind == IPT_SAMPLER_PNDM) {
        for (int32_t i = 0; i < n; i++)
            scratch[i] = s->t[i];
        pndm_schedule(s, n, scratch);
        clamp_timesteps(s, s->n_all, s->t);
    }
    if (s->kind == IPT_SAMPLER_DDIM_INVERSE)
        for (int32_t i = 0; i < n / 2; i++) {
            double swap = s->t[i];
            s->t[i] = s->t[n - 1 - i];
            s->t[n - 1 - i] = swap;
        }
    s->list_prev = s->schedule != IPT_SCHEDULE_DEFAULT && s->schedule != IPT_SCHEDULE_TRAILING &&
                   s->schedule != IPT_SCHEDULE_NORMAL;
    if (s->cls->evals_a_step == 2)
        interleave(s, n, scratch, scratch + n + 1);
    if (s->kind != IPT_SAMPLER_EDM_EULER)
        s->init_sigma = init_noise_sigma(s);
    return check_signal(s);
}

ipt_status schedule_build(ipt_sampler *s)
{
    IPT_TRY(check_request(s));
    size_t T = (size_t)s->cfg.num_train_timesteps;
    size_t most = 2 * (size_t)s->steps + 16; /* evaluations: PNDM adds 9, second order doubles */
    s->abar = ipt_calloc(s->ctx, T, sizeof(double));
    s->table = ipt_calloc(s->ctx, T, sizeof(double));
    s->table_log = ipt_calloc(s->ctx, T, sizeof(double));
    s->t = ipt_calloc(s->ctx, most, sizeof(double));
    s->sigma = ipt_calloc(s->ctx, most, sizeof(double));
    s->sigma_mid = ipt_calloc(s->ctx, most, sizeof(double));
    s->sigma_up = ipt_calloc(s->ctx, most, sizeof(double));
    s->sigma_down = ipt_calloc(s->ctx, most, sizeof(double));
    s->order = ipt_calloc(s->ctx, most, sizeof(int32_t));
    double *scratch = ipt_calloc(s->ctx, T > most ? T : most, sizeof(double));
    ipt_status status = IPT_ERR_NOMEM;
    if (s->abar == NULL || s->table == NULL || s->table_log == NULL || s->t == NULL ||
        s->sigma == NULL || s->sigma_mid == NULL || s->sigma_up == NULL || s->sigma_down == NULL ||
        s->order == NULL || scratch == NULL)
        goto fail;
    IPT_TRY_GOTO(build_tables(s, scratch), fail);
    IPT_TRY_GOTO(run_schedule(s, scratch), fail);
    if (s->kind == IPT_SAMPLER_DPM_SINGLE)
        single_orders(s);
    s->begin = s->skip * s->cls->evals_a_step;
fail:
    ipt_free(scratch);
    return status;
}
