/* sampler/sampler.c - the life of a sampler and the questions a caller asks it; which class is
 * which.  The rules themselves are in solve_*.c, the numbers in schedule.c. */
#include "sampler/internal.h"

#include <string.h>

static bool noise_never(const ipt_sampler *s, int32_t k)
{
    (void)s;
    (void)k;
    return false;
}

/* In the order of ipt_sampler_kind. */
static const sampler_class classes[IPT_SAMPLER_COUNT] = {
    {"ddim", "DDIMScheduler", FRAME_ALPHA, true, 1, step_ddim, noise_ddim},
    {"euler", "EulerDiscreteScheduler", FRAME_VE, true, 1, step_euler, noise_never},
    {"euler_a", "EulerAncestralDiscreteScheduler", FRAME_VE, true, 1, step_euler_a, noise_euler_a},
    {"heun", "HeunDiscreteScheduler", FRAME_VE, false, 2, step_heun, noise_never},
    {"dpm_2", "KDPM2DiscreteScheduler", FRAME_VE, false, 2, step_dpm_2, noise_never},
    {"dpm_2_a", "KDPM2AncestralDiscreteScheduler", FRAME_VE, false, 2, step_dpm_2_a, noise_dpm_2_a},
    {"lms", "LMSDiscreteScheduler", FRAME_VE, false, 1, step_lms, noise_never},
    {"dpmpp_2m", "DPMSolverMultistepScheduler", FRAME_VP, true, 1, step_dpm_multi, noise_never},
    {"dpmpp_2m_sde", "", FRAME_VP, true, 1, step_dpm_multi, noise_dpm},
    {"dpmpp_sde", "DPMSolverSDEScheduler", FRAME_VE, false, 2, step_dpmpp_sde, noise_dpmpp_sde},
    {"dpmpp_3m_sde", "", FRAME_VP, true, 1, step_dpm_multi, noise_dpm},
    {"dpm_single", "DPMSolverSinglestepScheduler", FRAME_VP, false, 1, step_dpm_single, noise_dpm},
    {"unipc", "UniPCMultistepScheduler", FRAME_VP, true, 1, step_unipc, noise_never},
    {"pndm", "PNDMScheduler", FRAME_ALPHA, false, 1, step_pndm, noise_never},
    {"deis", "DEISMultistepScheduler", FRAME_VP, false, 1, step_deis, noise_never},
    {"lcm", "LCMScheduler", FRAME_ALPHA, true, 1, step_lcm, noise_lcm},
    {"tcd", "TCDScheduler", FRAME_ALPHA, true, 1, step_tcd, noise_tcd},
    {"ddpm", "DDPMScheduler", FRAME_ALPHA, true, 1, step_ddpm, noise_ddpm},
    {"ddim_inverse", "DDIMInverseScheduler", FRAME_ALPHA, true, 1, step_ddim_inverse, noise_never},
    {"ipndm", "IPNDMScheduler", FRAME_ALPHA, false, 1, step_ipndm, noise_never},
    {"edm_euler", "EDMEulerScheduler", FRAME_VE, false, 1, step_edm_euler, noise_never},
    {"sa", "SASolverScheduler", FRAME_VP, false, 1, step_sa, noise_sa},
};

static const char *const schedule_names[IPT_SCHEDULE_COUNT] = {
    "default", "normal", "karras", "exponential", "sgm_uniform",
    "simple",  "beta",   "ays",    "trailing",
};

const sampler_class *sampler_class_of(ipt_sampler_kind kind)
{
    return &classes[(unsigned)kind < IPT_SAMPLER_COUNT ? kind : IPT_SAMPLER_DDIM];
}

/* --- names ----------------------------------------------------------------------------------- */
const char *ipt_sampler_name(ipt_sampler_kind kind)
{
    return (unsigned)kind < IPT_SAMPLER_COUNT ? classes[kind].name : "?";
}

bool ipt_sampler_from_name(const char *name, ipt_sampler_kind *out)
{
    for (int i = 0; name != NULL && i < IPT_SAMPLER_COUNT; i++) {
        if (strcmp(name, classes[i].name) == 0) {
            *out = (ipt_sampler_kind)i;
            return true;
        }
    }
    return false;
}

const char *ipt_schedule_name(ipt_schedule schedule)
{
    return (unsigned)schedule < IPT_SCHEDULE_COUNT ? schedule_names[schedule] : "?";
}

bool ipt_schedule_from_name(const char *name, ipt_schedule *out)
{
    for (int i = 0; name != NULL && i < IPT_SCHEDULE_COUNT; i++) {
        if (strcmp(name, schedule_names[i]) == 0) {
            *out = (ipt_schedule)i;
            return true;
        }
    }
    return false;
}

const char *ipt_sampler_names(void)
{
    return "ddim euler euler_a heun dpm_2 dpm_2_a lms dpmpp_2m dpmpp_2m_sde dpmpp_sde "
           "dpmpp_3m_sde dpm_single unipc pndm deis lcm tcd ddpm ddim_inverse ipndm edm_euler sa";
}

const char *ipt_schedule_names(void)
{
    return "default normal karras exponential sgm_uniform simple beta ays trailing";
}

bool ipt_sampler_from_class(const char *class_name, const char *algorithm_type,
                            ipt_sampler_kind *out)
{
    if (class_name == NULL || class_name[0] == '\0')
        return false;
    for (int i = 0; i < IPT_SAMPLER_COUNT; i++) {
        if (strcmp(class_name, classes[i].class_name) != 0)
            continue;
        *out = (ipt_sampler_kind)i;
        if (i == IPT_SAMPLER_DPMPP_2M && algorithm_type != NULL &&
            strncmp(algorithm_type, "sde-", 4) == 0)
            *out = IPT_SAMPLER_DPMPP_2M_SDE;
        return true;
    }
    return false;
}

/* --- life ------------------------------------------------------------------------------------ */
ipt_status ipt_sampler_skip(ipt_ctx *ctx, int32_t steps, double strength, int32_t *skip)
{
    if (!(strength >= 0 && strength <= 1))
        return ipt_fail(ctx, IPT_ERR_ARG, "strength is %g, must lie in 0..1", strength);
    if (steps < 1)
        return ipt_fail(ctx, IPT_ERR_ARG, "%" PRId32 " steps: must be at least 1", steps);
    int32_t run = (int32_t)(steps * strength);
    if (run < 1)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "strength %g of %" PRId32 " steps leaves no step to run: use a strength "
                        "of at least %g, or more steps",
                        strength, steps, ceil(1e4 / steps) / 1e4);
    *skip = steps - (run < steps ? run : steps);
    return IPT_OK;
}

/* What a class fixes of its configuration, whatever the file says. */
static void settle_config(ipt_sampler *s)
{
    ipt_sampler_config *c = &s->cfg;
    bool midpoint_or_heun =
        c->solver_type == IPT_SOLVER_MIDPOINT || c->solver_type == IPT_SOLVER_HEUN;
    bool bh = c->solver_type == IPT_SOLVER_BH1 || c->solver_type == IPT_SOLVER_BH2;
    bool sde = c->algorithm == IPT_ALGORITHM_SDE_DPMSOLVERPP ||
               c->algorithm == IPT_ALGORITHM_SDE_DPMSOLVER;
    if (s->kind == IPT_SAMPLER_UNIPC)
        c->solver_type = bh ? c->solver_type : IPT_SOLVER_BH2;
    else
        c->solver_type = midpoint_or_heun ? c->solver_type : IPT_SOLVER_MIDPOINT;
    if (s->kind == IPT_SAMPLER_DPMPP_2M && sde)
        c->algorithm = IPT_ALGORITHM_DPMSOLVERPP;
    if (s->kind == IPT_SAMPLER_DPMPP_2M_SDE && !sde)
        c->algorithm = IPT_ALGORITHM_SDE_DPMSOLVERPP;
    if (s->kind == IPT_SAMPLER_DPMPP_3M_SDE)
        c->algorithm = IPT_ALGORITHM_SDE_DPMSOLVERPP;
    if (s->kind == IPT_SAMPLER_DPM_SINGLE && c->algorithm == IPT_ALGORITHM_SDE_DPMSOLVER)
        c->algorithm = IPT_ALGORITHM_SDE_DPMSOLVERPP;
    if (s->kind == IPT_SAMPLER_SA)
        c->predict_x0 = true; /* its data_prediction */
    c->eta = c->eta > 0 ? (c->eta < 1 ? c->eta : 1) : 0;
}

static ipt_status check_class(const ipt_sampler *s)
{
    const ipt_sampler_config *c = &s->cfg;
    bool multi = s->kind == IPT_SAMPLER_DPMPP_2M || s->kind == IPT_SAMPLER_DPMPP_2M_SDE ||
                 s->kind == IPT_SAMPLER_DPM_SINGLE;
    bool noise_form =
        c->algorithm == IPT_ALGORITHM_DPMSOLVER || c->algorithm == IPT_ALGORITHM_SDE_DPMSOLVER;
    if (((multi && noise_form) || (s->kind == IPT_SAMPLER_UNIPC && !c->predict_x0)) &&
        !c->final_sigma_min)
        return ipt_fail(s->ctx, IPT_ERR_FORMAT,
                        "sampler %s: algorithm_type dpmsolver and predict_x0 false need "
                        "final_sigmas_type \"sigma_min\", as they divide by the last sigma; or use "
                        "algorithm_type \"dpmsolver++\", predict_x0 true",
                        s->cls->name);
    if (s->kind == IPT_SAMPLER_DPMPP_2M_SDE && c->solver_order == 3 &&
        c->algorithm == IPT_ALGORITHM_SDE_DPMSOLVER)
        return ipt_fail(s->ctx, IPT_ERR_UNSUPPORTED,
                        "algorithm_type sde-dpmsolver has no third order; use solver_order 2");
    bool sample = c->prediction == IPT_PRED_SAMPLE;
    if (sample && s->kind == IPT_SAMPLER_PNDM)
        return ipt_fail(s->ctx, IPT_ERR_UNSUPPORTED,
                        "sampler pndm extrapolates noise and takes models of prediction_type "
                        "epsilon or v_prediction, not sample; use ddim or dpmpp_2m");
    if (s->kind == IPT_SAMPLER_DDPM && c->variance == IPT_VARIANCE_LEARNED)
        return ipt_fail(s->ctx, IPT_ERR_UNSUPPORTED,
                        "sampler ddpm: variance_type learned needs a model with a second output; "
                        "use ddim");
    if (s->kind == IPT_SAMPLER_SA && (c->predictor_order < 1 || c->predictor_order > 3 ||
                                      c->corrector_order < 1 || c->corrector_order > 4))
        return ipt_fail(s->ctx, IPT_ERR_FORMAT,
                        "SA-Solver: predictor_order must lie in 1..3, corrector_order in 1..4");
    return IPT_OK;
}

static ipt_status alloc_buffers(ipt_sampler *s)
{
    for (int j = 0; j < SAMPLER_HISTORY; j++) {
        s->hist[j] = ipt_calloc(s->ctx, s->n, sizeof(float));
        if (s->hist[j] == NULL)
            return IPT_ERR_NOMEM;
    }
    s->saved = ipt_calloc(s->ctx, s->n, sizeof(float));
    s->work = ipt_calloc(s->ctx, s->n, sizeof(float));
    s->work2 = ipt_calloc(s->ctx, s->n, sizeof(float));
    return s->saved != NULL && s->work != NULL && s->work2 != NULL ? IPT_OK : IPT_ERR_NOMEM;
}

ipt_status ipt_sampler_create(ipt_ctx *ctx, const ipt_sampler_request *request, ipt_sampler **out)
{
    if (request == NULL || out == NULL || request->n == 0 ||
        (unsigned)request->kind >= IPT_SAMPLER_COUNT ||
        (unsigned)request->schedule >= IPT_SCHEDULE_COUNT)
        return ipt_fail(ctx, IPT_ERR_ARG, "sampler request: unknown kind or schedule, or n = 0");
    ipt_sampler *s = ipt_alloc(ctx, sizeof(*s));
    if (s == NULL)
        return IPT_ERR_NOMEM;
    ipt_status status;
    s->ctx = ctx;
    s->kind = request->kind;
    s->schedule = request->schedule;
    s->cls = sampler_class_of(s->kind);
    s->steps = request->steps;
    s->skip = request->skip;
    s->n = request->n;
    if (request->config != NULL)
        s->cfg = *request->config;
    else
        ipt_sampler_config_default(s->kind, &s->cfg);
    settle_config(s);
    IPT_TRY_GOTO(check_class(s), fail);
    IPT_TRY_GOTO(schedule_build(s), fail);
    IPT_TRY_GOTO(alloc_buffers(s), fail);
    s->cfg.trained_betas = NULL; /* was borrowed for this call */
    ipt_sampler_reset(s);
    *out = s;
    return IPT_OK;
fail:
    ipt_sampler_destroy(&s);
    return status;
}

void ipt_sampler_destroy(ipt_sampler **s)
{
    if (s == NULL || *s == NULL)
        return;
    ipt_sampler *p = *s;
    double *const doubles[] = {p->abar,  p->table,     p->table_log, p->t,
                               p->sigma, p->sigma_mid, p->sigma_up,  p->sigma_down};
    for (size_t i = 0; i < IPT_COUNT(doubles); i++)
        ipt_free(doubles[i]);
    for (int j = 0; j < SAMPLER_HISTORY; j++)
        ipt_free(p->hist[j]);
    ipt_free(p->order);
    ipt_free(p->saved);
    ipt_free(p->work);
    ipt_free(p->work2);
    ipt_free(p);
    *s = NULL;
}

void ipt_sampler_reset(ipt_sampler *s)
{
    s->next = s->begin;
    s->n_hist = 0;
    s->has_saved = false;
    s->lower_order = 0;
    s->counter = 0;
    s->this_order = 0;
    s->this_corrector = 0;
}

void ipt_sampler_rewind(ipt_sampler *s) { s->next = s->begin; }

/* --- questions ------------------------------------------------------------------------------- */
/* Index of the whole schedule for the caller's evaluation i, kept inside the arrays. */
static int32_t at_eval(const ipt_sampler *s, int32_t i)
{
    int32_t k = s->begin + (i > 0 ? i : 0);
    return k < s->n_all ? k : s->n_all - 1;
}

int32_t ipt_sampler_n_evals(const ipt_sampler *s) { return s->n_all - s->begin; }

/* Step of the whole schedule that evaluation k works for. */
static int32_t step_of_index(const ipt_sampler *s, int32_t k)
{
    if (s->cls->evals_a_step == 2)
        return k / 2;
    if (s->kind != IPT_SAMPLER_PNDM)
        return k;
    if (s->n_prk > 0)
        return k < s->n_prk ? k / 4 : k - s->n_prk + s->n_prk / 4;
    return k > s->begin ? k - 1 : k; /* wherever it starts, the first step is evaluated twice */
}

int32_t ipt_sampler_step_of(const ipt_sampler *s, int32_t i)
{
    return step_of_index(s, at_eval(s, i)) - step_of_index(s, s->begin);
}

bool ipt_sampler_completes_step(const ipt_sampler *s, int32_t i)
{
    int32_t k = at_eval(s, i);
    return k + 1 >= s->n_all || step_of_index(s, k + 1) != step_of_index(s, k);
}

int32_t ipt_sampler_n_steps(const ipt_sampler *s)
{
    return ipt_sampler_step_of(s, s->n_all - s->begin - 1) + 1;
}

double ipt_sampler_timestep(const ipt_sampler *s, int32_t i) { return s->t[at_eval(s, i)]; }

/* Level of the latent that evaluation k takes, between the two halves of a step too. */
static double level_of_input(const ipt_sampler *s, int32_t k)
{
    bool second = s->cls->evals_a_step == 2 && k % 2 == 1;
    return second ? s->sigma_mid[k] : s->sigma[k];
}

double ipt_sampler_sigma(const ipt_sampler *s, int32_t i)
{
    int32_t k = s->begin + (i > 0 ? i : 0);
    bool end = k >= s->n_all;
    if (s->kind == IPT_SAMPLER_IPNDM)
        return s->sigma[end ? s->n_all : k];
    if (s->cls->frame != FRAME_ALPHA)
        return end ? s->sigma[s->n_all] : level_of_input(s, k);
    double a = end ? s->final_abar : s->abar[(int32_t)s->t[k]];
    return a > 0 ? sqrt((1 - a) / a) : s->table[s->cfg.num_train_timesteps - 1];
}

double ipt_sampler_init_noise_sigma(const ipt_sampler *s) { return s->init_sigma; }

static double input_scale(const ipt_sampler *s, int32_t i)
{
    double data = s->kind == IPT_SAMPLER_EDM_EULER ? s->cfg.sigma_data : 1;
    return s->cls->frame == FRAME_VE
               ? 1 / sqrt(square(level_of_input(s, at_eval(s, i))) + square(data))
               : 1;
}

void ipt_sampler_scale_input(const ipt_sampler *s, int32_t i, const float *x, float *out)
{
    double c = input_scale(s, i);
    const float *const v[1] = {x};
    combine(out, s->n, 1, &c, v);
}

void ipt_sampler_unscale_input(const ipt_sampler *s, int32_t i, const float *in, float *x)
{
    double c = 1 / input_scale(s, i);
    const float *const v[1] = {in};
    combine(x, s->n, 1, &c, v);
}

bool ipt_sampler_needs_noise(const ipt_sampler *s, int32_t i)
{
    return s->cls->needs_noise(s, at_eval(s, i));
}

ipt_status ipt_sampler_step(ipt_sampler *s, int32_t i, const float *model_out, float *x,
                            const float *noise)
{
    int32_t k = s->begin + i;
    if (i < 0 || k != s->next || k >= s->n_all)
        return ipt_fail(s->ctx, IPT_ERR_ARG,
                        "sampler %s: evaluation %" PRId32 " given, %" PRId32 " of %" PRId32
                        " expected",
                        s->cls->name, i, s->next - s->begin, s->n_all - s->begin);
    bool wants = s->cls->needs_noise(s, k);
    if (wants && noise == NULL)
        return ipt_fail(s->ctx, IPT_ERR_ARG, "sampler %s: evaluation %" PRId32 " needs noise",
                        s->cls->name, i);
    IPT_TRY(s->cls->step(s, k, model_out, x, wants ? noise : NULL));
    s->next = k + 1;
    return IPT_OK;
}

void ipt_sampler_add_noise(const ipt_sampler *s, int32_t i, const float *x0, const float *noise,
                           float *out)
{
    int32_t k = s->begin + (i > 0 ? i : 0);
    double c[2] = {1, 0};
    if (k < s->n_all && s->cls->frame == FRAME_VE) {
        c[1] = s->sigma[k]; /* between halves the reference, too, takes the step's end */
    } else if (k < s->n_all && s->cls->frame == FRAME_VP && s->kind != IPT_SAMPLER_SA) {
        c[0] = 1 / sqrt(square(s->sigma[k]) + 1);
        c[1] = s->sigma[k] * c[0];
    } else if (k < s->n_all && s->kind == IPT_SAMPLER_IPNDM) {
        c[0] = s->sigma_up[k];
        c[1] = s->sigma[k];
    } else if (k < s->n_all) { /* SA-Solver, too, goes by the timestep, not by its sigma */
        double a = s->abar[(int32_t)s->t[k]];
        c[0] = sqrt(a);
        c[1] = sqrt(1 - a);
    }
    const float *const v[2] = {x0, noise};
    combine(out, s->n, 2, c, v);
}

void ipt_sampler_predict_x0(const ipt_sampler *s, int32_t i, const float *model_out, const float *x,
                            float *x0)
{
    int32_t k = at_eval(s, i);
    double c[2];
    if (s->kind == IPT_SAMPLER_EDM_EULER) {
        double total = square(s->sigma[k]) + square(s->cfg.sigma_data);
        double sign = s->cfg.prediction == IPT_PRED_V ? -1 : 1;
        c[0] = square(s->cfg.sigma_data) / total;
        c[1] = sign * s->sigma[k] * s->cfg.sigma_data / sqrt(total);
    } else if (s->kind == IPT_SAMPLER_IPNDM) {
        c[0] = s->sigma_up[k];
        c[1] = -s->sigma[k];
    } else if (s->cls->frame == FRAME_VE) {
        x0_coefficients_ve(s->cfg.prediction, level_of_input(s, k), &c[0], &c[1]);
    } else if (s->cls->frame == FRAME_VP) {
        x0_coefficients_vp(s->cfg.prediction, s->sigma[k], &c[0], &c[1]);
    } else {
        x0_coefficients_alpha(s->cfg.prediction, s->abar[(int32_t)s->t[k]], &c[0], &c[1]);
    }
    const float *const v[2] = {x, model_out};
    combine(x0, s->n, 2, c, v);
}
