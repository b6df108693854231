/* sampler/config.c - scheduler_config.json as plain numbers: defaults of each diffusers class and
 * the overlay of one member.  Knows no JSON library. */
#include "sampler/sampler.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

void ipt_sampler_config_default(ipt_sampler_kind kind, ipt_sampler_config *cfg)
{
    /* DDIM's, which most classes share */
    *cfg = (ipt_sampler_config){
        .num_train_timesteps = 1000,
        .beta_start = 1e-4,
        .beta_end = 0.02,
        .beta_schedule = IPT_BETA_LINEAR,
        .spacing = IPT_SPACING_LINSPACE,
        .clip_sample_range = 1,
        .dynamic_thresholding_ratio = 0.995,
        .sample_max_value = 1,
        .set_alpha_to_one = true,
        .solver_order = 2,
        .solver_type = IPT_SOLVER_MIDPOINT,
        .algorithm = IPT_ALGORITHM_DPMSOLVERPP,
        .lower_order_final = true,
        .predict_x0 = true,
        .lambda_min_clipped = (double)-INFINITY,
        .original_inference_steps = 50,
        .timestep_scaling = 10,
        .sigma_data = 0.5,
        .rho = 7,
        .predictor_order = 2,
        .corrector_order = 2,
        .tau = 1,
    };
    bool alpha =
        kind == IPT_SAMPLER_DDIM || kind == IPT_SAMPLER_DDIM_INVERSE || kind == IPT_SAMPLER_DDPM;
    bool distilled = kind == IPT_SAMPLER_LCM || kind == IPT_SAMPLER_TCD;
    bool narrow = kind == IPT_SAMPLER_HEUN || kind == IPT_SAMPLER_DPM_2 ||
                  kind == IPT_SAMPLER_DPM_2_A || kind == IPT_SAMPLER_DPMPP_SDE || distilled;
    if (narrow) {
        cfg->beta_start = 0.00085;
        cfg->beta_end = 0.012;
    }
    if (distilled)
        cfg->beta_schedule = IPT_BETA_SCALED_LINEAR;
    if (alpha || distilled || kind == IPT_SAMPLER_PNDM)
        cfg->spacing = IPT_SPACING_LEADING;
    cfg->clip_sample = alpha;
    if (kind == IPT_SAMPLER_PNDM)
        cfg->set_alpha_to_one = false;
    if (kind == IPT_SAMPLER_DPM_SINGLE)
        cfg->lower_order_final = false;
    if (kind == IPT_SAMPLER_UNIPC)
        cfg->solver_type = IPT_SOLVER_BH2;
    if (kind == IPT_SAMPLER_DPMPP_2M_SDE || kind == IPT_SAMPLER_DPMPP_3M_SDE)
        cfg->algorithm = IPT_ALGORITHM_SDE_DPMSOLVERPP;
    if (kind == IPT_SAMPLER_DPMPP_3M_SDE)
        cfg->solver_order = 3;
    if (kind == IPT_SAMPLER_EDM_EULER) {
        cfg->sigma_min = 0.002;
        cfg->sigma_max = 80;
    }
    if (kind == IPT_SAMPLER_TCD)
        cfg->eta = 0.3;
}

void ipt_sampler_config_single_file(ipt_sampler_kind kind, ipt_sampler_config *cfg)
{
    ipt_sampler_config_default(kind, cfg);
    cfg->beta_schedule = IPT_BETA_SCALED_LINEAR;
    cfg->beta_start = 0.00085;
    cfg->beta_end = 0.012;
    cfg->set_alpha_to_one = false;
    cfg->skip_prk_steps = true;
    cfg->steps_offset = 1;
    cfg->spacing = IPT_SPACING_LEADING;
    cfg->clip_sample = false;
}

/* --- one member ------------------------------------------------------------------------------ */
typedef struct field {
    const char *key;
    size_t offset;
} field;
#define FIELD(name)                                                                                \
    {                                                                                              \
#name, offsetof(ipt_sampler_config, name)                                                  \
    }

static const field number_fields[] = {
    FIELD(beta_start),
    FIELD(beta_end),
    FIELD(clip_sample_range),
    FIELD(sample_max_value),
    FIELD(lambda_min_clipped),
    FIELD(timestep_scaling),
    FIELD(sigma_min),
    FIELD(sigma_max),
    FIELD(dynamic_thresholding_ratio),
    FIELD(sigma_data),
    FIELD(rho),
};
static const field int_fields[] = {
    FIELD(num_train_timesteps), FIELD(steps_offset),    FIELD(solver_order),
    FIELD(predictor_order),     FIELD(corrector_order), FIELD(original_inference_steps),
};
static const field bool_fields[] = {
    FIELD(rescale_betas_zero_snr), FIELD(set_alpha_to_one),  FIELD(clip_sample),
    FIELD(thresholding),           FIELD(use_karras_sigmas), FIELD(use_exponential_sigmas),
    FIELD(use_beta_sigmas),        FIELD(use_lu_lambdas),    FIELD(lower_order_final),
    FIELD(euler_at_final),         FIELD(predict_x0),        FIELD(skip_prk_steps),
};

static void *find_field(const field *fields, size_t count, ipt_sampler_config *cfg, const char *key)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(fields[i].key, key) == 0)
            return (char *)cfg + fields[i].offset;
    return NULL;
}

ipt_status ipt_sampler_config_set_num(ipt_ctx *ctx, ipt_sampler_config *cfg, const char *key,
                                      double value)
{
    double *number = find_field(number_fields, IPT_COUNT(number_fields), cfg, key);
    int32_t *integer = find_field(int_fields, IPT_COUNT(int_fields), cfg, key);
    if (number == NULL && integer == NULL)
        return IPT_OK;
    bool infinite_allowed = strcmp(key, "lambda_min_clipped") == 0;
    if (isnan(value) || (isinf(value) && !infinite_allowed))
        return ipt_fail(ctx, IPT_ERR_FORMAT, "scheduler: %s is not a finite number", key);
    if (integer != NULL && !(value == floor(value) && fabs(value) <= 1e9))
        return ipt_fail(ctx, IPT_ERR_FORMAT, "scheduler: %s is %.17g, expected a whole number%s",
                        key, value, fabs(value) > 1e9 ? " up to 10^9" : "");
    if (strcmp(key, "num_train_timesteps") == 0 && !(value >= 2 && value <= IPT_MAX_TRAIN_STEPS))
        return ipt_fail(ctx, IPT_ERR_FORMAT, "scheduler: %s is %.17g, expected 2 to %d", key, value,
                        IPT_MAX_TRAIN_STEPS);
    if (strcmp(key, "steps_offset") == 0 && !(value >= 0 && value <= IPT_MAX_TRAIN_STEPS))
        return ipt_fail(ctx, IPT_ERR_FORMAT, "scheduler: %s is %.17g, expected 0 to %d", key, value,
                        IPT_MAX_TRAIN_STEPS);
    if (number != NULL)
        *number = value;
    else
        *integer = (int32_t)value;
    return IPT_OK;
}

ipt_status ipt_sampler_config_set_bool(ipt_ctx *ctx, ipt_sampler_config *cfg, const char *key,
                                       bool value)
{
    if (value && (strcmp(key, "use_flow_sigmas") == 0 || strcmp(key, "use_dynamic_shifting") == 0))
        return ipt_fail(ctx, IPT_ERR_UNSUPPORTED,
                        "scheduler: %s: flow-matching models are not supported, only models of "
                        "the Stable Diffusion 1, 2 and XL kind",
                        key);
    bool *flag = find_field(bool_fields, IPT_COUNT(bool_fields), cfg, key);
    if (flag != NULL)
        *flag = value;
    return IPT_OK;
}

/* Position of value in a NULL-terminated list, -1 when absent. */
static int32_t choose(const char *const *list, const char *value)
{
    for (int32_t i = 0; list[i] != NULL; i++)
        if (strcmp(list[i], value) == 0)
            return i;
    return -1;
}

typedef struct choice {
    const char *key;
    const char *const *values;
    const char *help;
} choice;

static const char *const beta_schedules[] = {"linear", "scaled_linear", "squaredcos_cap_v2",
                                             "exp",    "sigmoid",       NULL};
static const char *const predictions[] = {"epsilon", "v_prediction", "sample", "original_sample",
                                          NULL};
static const char *const spacings[] = {"linspace", "leading", "trailing", NULL};
static const char *const solvers[] = {"midpoint", "heun", "bh1", "bh2", "logrho", NULL};
static const char *const algorithms[] = {
    "dpmsolver++",     "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis",
    "data_prediction", NULL};
static const char *const finals[] = {"zero", "sigma_min", NULL};
static const char *const interpolations[] = {"linear", "log_linear", NULL};
static const char *const timestep_types[] = {"discrete", "continuous", NULL};
static const char *const sigma_schedules[] = {"karras", "exponential", NULL};
static const char *const variances[] = {"fixed_small", "fixed_small_log", "fixed_large",
                                        "learned",     "learned_range",   NULL};

static const choice choices[] = {
    {"beta_schedule", beta_schedules, "linear, scaled_linear, squaredcos_cap_v2, exp, sigmoid"},
    {"prediction_type", predictions, "epsilon, v_prediction, sample"},
    {"timestep_spacing", spacings, "linspace, leading, trailing"},
    {"solver_type", solvers, "midpoint, heun, bh1, bh2, logrho"},
    {"algorithm_type", algorithms, "dpmsolver++, dpmsolver, sde-dpmsolver++, sde-dpmsolver, deis"},
    {"final_sigmas_type", finals, "zero, sigma_min"},
    {"interpolation_type", interpolations, "linear, log_linear"},
    {"timestep_type", timestep_types, "discrete, continuous"},
    {"sigma_schedule", sigma_schedules, "karras, exponential"},
    {"variance_type", variances, "fixed_small, fixed_small_log, fixed_large"},
};

static void apply_choice(ipt_sampler_config *cfg, size_t which, int32_t v)
{
    static const ipt_variance variance_of[] = {
        IPT_VARIANCE_FIXED_SMALL, IPT_VARIANCE_FIXED_SMALL_LOG, IPT_VARIANCE_FIXED_LARGE,
        IPT_VARIANCE_LEARNED, IPT_VARIANCE_LEARNED};
    switch (which) {
    case 0:
        cfg->beta_schedule = (ipt_beta_schedule)v;
        break;
    case 1:
        cfg->prediction = v == 3 ? IPT_PRED_SAMPLE : (ipt_prediction)v;
        break;
    case 2:
        cfg->spacing = (ipt_spacing)v;
        break;
    case 3:
        cfg->solver_type = (ipt_solver_type)v;
        break;
    case 4:
        if (v < 4) /* other classes' names leave the solver's own */
            cfg->algorithm = (ipt_algorithm)v;
        break;
    case 5:
        cfg->final_sigma_min = v == 1;
        break;
    case 6:
        cfg->interpolation_log_linear = v == 1;
        break;
    case 7:
        cfg->timestep_continuous = v == 1;
        break;
    case 8:
        cfg->edm_exponential = v == 1;
        break;
    default:
        cfg->variance = variance_of[v];
        break;
    }
}

ipt_status ipt_sampler_config_set_str(ipt_ctx *ctx, ipt_sampler_config *cfg, const char *key,
                                      const char *value)
{
    for (size_t i = 0; i < IPT_COUNT(choices); i++) {
        if (strcmp(choices[i].key, key) != 0)
            continue;
        if (strcmp(key, "prediction_type") == 0 && strcmp(value, "flow_prediction") == 0)
            return ipt_fail(ctx, IPT_ERR_UNSUPPORTED,
                            "scheduler: prediction_type flow_prediction: flow-matching models are "
                            "not supported");
        if (strcmp(value, "noise_prediction") == 0)
            return ipt_fail(ctx, IPT_ERR_UNSUPPORTED,
                            "scheduler: algorithm_type noise_prediction (SA-Solver) is not "
                            "supported; use data_prediction");
        int32_t v = choose(choices[i].values, value);
        if (v < 0)
            return ipt_fail(ctx, IPT_ERR_FORMAT, "scheduler: %s is \"%.60s\", expected one of: %s",
                            key, value, choices[i].help);
        apply_choice(cfg, i, v);
        return IPT_OK;
    }
    return IPT_OK;
}
