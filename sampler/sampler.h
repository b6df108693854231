/* sampler/sampler.h - noise schedules, solvers and guidance on the host.
 *
 * A sampler owns the schedule and the solver's memory for ONE picture of n latent values; the
 * caller evaluates the model.  A batch is one sampler a picture (thresholding is per picture).
 *
 *     ipt_sampler_create(ctx, &request, &s);
 *     x = noise * ipt_sampler_init_noise_sigma(s)            text to image, or
 *     ipt_sampler_add_noise(s, 0, x0, noise, x)              image to image
 *     for (i = 0; i < ipt_sampler_n_evals(s); i++) {
 *         ipt_sampler_scale_input(s, i, x, model_in);
 *         model_out = model(model_in, ipt_sampler_timestep(s, i));
 *         fill z when ipt_sampler_needs_noise(s, i);
 *         ipt_sampler_step(s, i, model_out, x, z);
 *         if (ipt_sampler_completes_step(s, i)) one step of the user's count is done;
 *     }
 *
 * What every name means is what diffusers 0.42 means by it, to rounding; where diffusers has no
 * such thing (sgm_uniform, simple, beta, ays with other than 10 steps, dpmpp_3m_sde), what
 * k-diffusion and ComfyUI mean.  Coefficients are taken in double from the f32 tables the reference
 * uses.
 *
 * Must not know: GPU types, models, files.  Threads: one sampler, one thread at a time. */
#ifndef IPT_SAMPLER_SAMPLER_H
#define IPT_SAMPLER_SAMPLER_H
#include "core/core.h"
#include "core/model_config.h" /* ipt_prediction */

typedef enum ipt_sampler_kind {
    IPT_SAMPLER_DDIM,
    IPT_SAMPLER_EULER,
    IPT_SAMPLER_EULER_A,
    IPT_SAMPLER_HEUN,
    IPT_SAMPLER_DPM_2,
    IPT_SAMPLER_DPM_2_A,
    IPT_SAMPLER_LMS,
    IPT_SAMPLER_DPMPP_2M,
    IPT_SAMPLER_DPMPP_2M_SDE,
    IPT_SAMPLER_DPMPP_SDE,
    IPT_SAMPLER_DPMPP_3M_SDE,
    IPT_SAMPLER_DPM_SINGLE, /* DPM-Solver(++) singlestep */
    IPT_SAMPLER_UNIPC,
    IPT_SAMPLER_PNDM,
    IPT_SAMPLER_DEIS,
    IPT_SAMPLER_LCM,
    IPT_SAMPLER_TCD,
    IPT_SAMPLER_DDPM,
    IPT_SAMPLER_DDIM_INVERSE, /* picture to noise */
    IPT_SAMPLER_IPNDM,
    IPT_SAMPLER_EDM_EULER,
    IPT_SAMPLER_SA, /* SA-Solver, stochastic Adams */
    IPT_SAMPLER_COUNT
} ipt_sampler_kind;

typedef enum ipt_schedule {
    IPT_SCHEDULE_DEFAULT,     /* what the configuration says */
    IPT_SCHEDULE_NORMAL,      /* even timesteps from T-1 to 0 (timestep_spacing linspace) */
    IPT_SCHEDULE_KARRAS,      /* use_karras_sigmas */
    IPT_SCHEDULE_EXPONENTIAL, /* use_exponential_sigmas */
    IPT_SCHEDULE_SGM_UNIFORM, /* even timesteps from T-1, the one at 0 left out (ComfyUI) */
    IPT_SCHEDULE_SIMPLE,      /* every (T/N)-th sigma from the end (ComfyUI) */
    IPT_SCHEDULE_BETA,        /* timesteps at quantiles of Beta(0.6, 0.6) (ComfyUI); diffusers'
                                 use_beta_sigmas spreads sigmas and is DEFAULT's alone */
    IPT_SCHEDULE_AYS,         /* Align Your Steps tables of SD 1.5 or SDXL */
    IPT_SCHEDULE_TRAILING,    /* timestep_spacing trailing */
    IPT_SCHEDULE_COUNT
} ipt_schedule;

typedef enum ipt_beta_schedule {
    IPT_BETA_LINEAR,
    IPT_BETA_SCALED_LINEAR,
    IPT_BETA_SQUAREDCOS, /* squaredcos_cap_v2 */
    IPT_BETA_EXP,        /* Heun's "exp" */
    IPT_BETA_SIGMOID,    /* DDPM's "sigmoid" */
} ipt_beta_schedule;
typedef enum ipt_spacing {
    IPT_SPACING_LINSPACE,
    IPT_SPACING_LEADING,
    IPT_SPACING_TRAILING
} ipt_spacing;
typedef enum ipt_algorithm {
    IPT_ALGORITHM_DPMSOLVERPP,
    IPT_ALGORITHM_DPMSOLVER,
    IPT_ALGORITHM_SDE_DPMSOLVERPP,
    IPT_ALGORITHM_SDE_DPMSOLVER
} ipt_algorithm;
/* One enum for the solver_type of all classes: a class takes its own default for a foreign one. */
typedef enum ipt_solver_type {
    IPT_SOLVER_MIDPOINT,
    IPT_SOLVER_HEUN,
    IPT_SOLVER_BH1,
    IPT_SOLVER_BH2,
    IPT_SOLVER_LOGRHO
} ipt_solver_type;
typedef enum ipt_variance {
    IPT_VARIANCE_FIXED_SMALL,
    IPT_VARIANCE_FIXED_SMALL_LOG,
    IPT_VARIANCE_FIXED_LARGE,
    IPT_VARIANCE_LEARNED /* learned, learned_range: refused by the classes that would need it */
} ipt_variance;

enum { IPT_MAX_TRAIN_STEPS = 100000 };

/* The fields of a diffusers scheduler_config.json.  Not meant to be zero-initialised: start from
 * ipt_sampler_config_default(kind), then overlay what the file says with
 * ipt_sampler_config_set_*.  A class ignores the fields its diffusers class does not have. */
typedef struct ipt_sampler_config {
    int32_t num_train_timesteps; /* T, 2..IPT_MAX_TRAIN_STEPS */
    double beta_start, beta_end;
    ipt_beta_schedule beta_schedule;
    const float *trained_betas; /* [n_trained_betas], borrowed during create; NULL: none */
    int32_t n_trained_betas;    /* then T */
    bool rescale_betas_zero_snr;
    ipt_prediction prediction;
    ipt_spacing spacing;
    int32_t steps_offset;
    bool set_alpha_to_one;
    bool clip_sample;
    double clip_sample_range;
    bool thresholding; /* dynamic thresholding of the predicted picture (Imagen) */
    double dynamic_thresholding_ratio;
    double sample_max_value;
    bool use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas;
    double sigma_min, sigma_max; /* Euler, UniPC, EDM; 0 = from the table */
    bool final_sigma_min;        /* final_sigmas_type: false "zero", true "sigma_min" */
    int32_t solver_order;        /* 1..3 */
    ipt_solver_type solver_type;
    ipt_algorithm algorithm;
    bool lower_order_final;
    bool euler_at_final;
    bool predict_x0;                  /* UniPC, SA */
    uint64_t disable_corrector;       /* UniPC: bit i = no correction after step i (i < 64) */
    double lambda_min_clipped;        /* DPM multistep, singlestep; -INFINITY = none */
    bool skip_prk_steps;              /* PNDM; under 4 steps and image to image always skip them */
    int32_t original_inference_steps; /* LCM, TCD */
    double timestep_scaling;          /* LCM */
    ipt_variance variance;            /* DDPM */
    bool interpolation_log_linear;    /* Euler: interpolation_type "log_linear" */
    bool timestep_continuous;         /* Euler: timestep_type "continuous" */
    double sigma_data, rho;           /* EDM */
    bool edm_exponential;             /* EDM: sigma_schedule "exponential" */
    int32_t predictor_order, corrector_order; /* SA */
    double tau;                               /* SA: 1 = full noise while 200 <= t <= 800 */
    double eta;    /* DDIM eta (0), TCD gamma (0.3); not in the files: the caller's choice */
    bool ays_sdxl; /* AYS table of SDXL instead of SD 1.5's; not in the files */
} ipt_sampler_config;

/* The defaults of the diffusers class behind `kind`.  An unknown kind gives those of DDIM. */
void ipt_sampler_config_default(ipt_sampler_kind kind, ipt_sampler_config *cfg);
/* The same for a single-file Stable Diffusion checkpoint, which carries no scheduler: scaled
 * linear 0.00085..0.012, leading timesteps from 1, no clipping (diffusers from_single_file). */
void ipt_sampler_config_single_file(ipt_sampler_kind kind, ipt_sampler_config *cfg);
/* Overlay one member of scheduler_config.json.  Keys that no class knows, null and keys that
 * mean nothing here are ignored: a reader may pass every member it finds.
 *   number: JSON numbers; bools through _bool; strings through _str
 * Errors: IPT_ERR_FORMAT when a known key has a value outside its set (message lists the set);
 *         IPT_ERR_UNSUPPORTED for flow matching, learned variances and dynamic shifting. */
IPT_CHECKED ipt_status ipt_sampler_config_set_num(ipt_ctx *ctx, ipt_sampler_config *cfg,
                                                  const char *key, double value);
IPT_CHECKED ipt_status ipt_sampler_config_set_bool(ipt_ctx *ctx, ipt_sampler_config *cfg,
                                                   const char *key, bool value);
IPT_CHECKED ipt_status ipt_sampler_config_set_str(ipt_ctx *ctx, ipt_sampler_config *cfg,
                                                  const char *key, const char *value);

/* The names of this program.  _from_name: false when unknown (out untouched). */
const char *ipt_sampler_name(ipt_sampler_kind kind);
IPT_CHECKED bool ipt_sampler_from_name(const char *name, ipt_sampler_kind *out);
const char *ipt_schedule_name(ipt_schedule schedule);
IPT_CHECKED bool ipt_schedule_from_name(const char *name, ipt_schedule *out);
/* Space-separated lists for messages and --help; static strings. */
const char *ipt_sampler_names(void);
const char *ipt_schedule_names(void);
/* The same in the words of A1111, ComfyUI, stable-diffusion.cpp and diffusers ("Euler a",
 * "euler_ancestral", "dpm++2m", "DPMSolverMultistepScheduler"), in any case and punctuation; a
 * sampler's name may end in a schedule ("DPM++ 2M Karras"), else *schedule is untouched. */
typedef enum ipt_name_is {
    IPT_NAME_UNKNOWN,
    IPT_NAME_KNOWN,
    IPT_NAME_ELSEWHERE, /* another program's, and there is nothing like it here */
} ipt_name_is;
IPT_CHECKED ipt_name_is ipt_sampler_read(const char *name, ipt_sampler_kind *kind,
                                         ipt_schedule *schedule);
IPT_CHECKED ipt_name_is ipt_schedule_read(const char *name, ipt_schedule *schedule);
/* A name as these two compare it, "dpmpp2m", for suggestions; "" when longer than buf [n]. */
const char *ipt_plain_name(const char *name, char *buf, size_t n);
/* What A1111's texts call it; own words for what A1111 does not have.  The schedule's is NULL when
 * there is nothing to say; c (NULL allowed) tells what the default one is. */
const char *ipt_sampler_label(ipt_sampler_kind kind);
const char *ipt_schedule_label(ipt_schedule schedule, const ipt_sampler_config *c);
/* For whom a sampler is, when it is not for everyone; else NULL. */
const char *ipt_sampler_note(ipt_sampler_kind kind);
/* The kind of a diffusers "_class_name"; algorithm_type (NULL allowed) tells the stochastic from
 * the plain multistep solver.  False when the class is unknown. */
IPT_CHECKED bool ipt_sampler_from_class(const char *class_name, const char *algorithm_type,
                                        ipt_sampler_kind *out);

typedef struct ipt_sampler ipt_sampler;
typedef struct ipt_sampler_request {
    const ipt_sampler_config *config; /* NULL: the kind's defaults; copied */
    ipt_sampler_kind kind;
    ipt_schedule schedule;
    int32_t steps; /* the user's count, 1..num_train_timesteps */
    int32_t skip;  /* steps left out at the start: 0 for text to image, else from
                      ipt_sampler_skip() */
    size_t n;      /* latent values of one picture, > 0 */
} ipt_sampler_request;

/* How many of `steps` image-to-image leaves out: steps - min((int)(steps * strength), steps), as
 * diffusers' img2img pipelines count.
 * Errors: IPT_ERR_ARG when strength is outside [0,1] or leaves no step to run (the message names
 *         the smallest strength that does). */
IPT_CHECKED ipt_status ipt_sampler_skip(ipt_ctx *ctx, int32_t steps, double strength,
                                        int32_t *skip);
/* Creates a sampler; it is owned by the caller (ipt_sampler_destroy) and keeps nothing of the
 * request.
 * Errors: IPT_ERR_ARG (steps, skip, a schedule that the kind cannot follow), IPT_ERR_FORMAT
 * (configuration outside its ranges), IPT_ERR_UNSUPPORTED, IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_sampler_create(ipt_ctx *ctx, const ipt_sampler_request *request,
                                          ipt_sampler **out);
void ipt_sampler_destroy(ipt_sampler **s);
/* Forgets the solver's history: the next step is evaluation 0 again. */
void ipt_sampler_reset(ipt_sampler *s);
/* The same with the history kept, as a diffusers scheduler run twice without set_timesteps. */
void ipt_sampler_rewind(ipt_sampler *s);

/* Model evaluations from the start (after `skip`) to the end; at least 1. */
int32_t ipt_sampler_n_evals(const ipt_sampler *s);
/* Steps of the user's count that these make: steps - skip (fewer only where timesteps of the beta
 * schedule fall together, from about 150 steps; PNDM's doubled first
 * evaluation and second-order halves are not steps). */
int32_t ipt_sampler_n_steps(const ipt_sampler *s);
/* Whether evaluation i ends a step of the user's count, and which step (0-based) it is part of. */
bool ipt_sampler_completes_step(const ipt_sampler *s, int32_t i);
int32_t ipt_sampler_step_of(const ipt_sampler *s, int32_t i);
/* Timestep for the model at evaluation i, 0..T-1, fractional for sigma schedules. */
double ipt_sampler_timestep(const ipt_sampler *s, int32_t i);
/* Noise over signal (sigma = sqrt((1-abar)/abar)) of the input of evaluation i; i = n_evals gives
 * the level of the result. */
double ipt_sampler_sigma(const ipt_sampler *s, int32_t i);
/* Factor of unit noise at the start of text to image. */
double ipt_sampler_init_noise_sigma(const ipt_sampler *s);
/* out[n] = what the model takes for latent x[n] at evaluation i; out may be x. */
void ipt_sampler_scale_input(const ipt_sampler *s, int32_t i, const float *x, float *out);
/* The other way: the latent of which `in` is what the model takes; x may be in. */
void ipt_sampler_unscale_input(const ipt_sampler *s, int32_t i, const float *in, float *x);
bool ipt_sampler_needs_noise(const ipt_sampler *s, int32_t i);
/* One solver step, in place.
 *   i          evaluations in order: 0, 1, 2, ...
 *   model_out  [n] the model's (guided) output of the configured prediction type
 *   x          [n] latent at evaluation i (not the scaled input); on return at evaluation i+1
 *   noise      [n] fresh unit noise when ipt_sampler_needs_noise(s, i), else ignored (NULL)
 * dpmpp_sde draws twice a step: its second value joins the first half's noise with fresh noise as
 * increments of one Brownian path in sigma.
 * Errors: IPT_ERR_ARG: out of order, or noise missing. */
IPT_CHECKED ipt_status ipt_sampler_step(ipt_sampler *s, int32_t i, const float *model_out, float *x,
                                        const float *noise);
/* out[n] = clean x0[n] brought to the level of evaluation i with unit noise[n]; i = n_evals copies
 * x0.  For the start of image to image (i = 0) and for masks (after step i: i + 1).  out may be
 * x0 or noise. */
void ipt_sampler_add_noise(const ipt_sampler *s, int32_t i, const float *x0, const float *noise,
                           float *out);
/* Predicted clean picture at evaluation i, for previews: x0[n] from latent x and model output. */
void ipt_sampler_predict_x0(const ipt_sampler *s, int32_t i, const float *model_out, const float *x,
                            float *x0);

/* --- guidance and embeddings ----------------------------------------------------------------- */
/* out[n] = u + scale (c - u) of ONE picture; with rescale phi > 0 mixed with the same scaled to
 * the deviation of c (unbiased, over all n values).  out may be u or c.
 * Source: Ho & Salimans 2022; Lin et al. 2023 section 3.4; diffusers rescale_noise_cfg. */
void ipt_cfg(const float *uncond, const float *cond, size_t n, double scale, double rescale,
             float *out);
/* out[dim] = sinusoids of the guidance value, as LCM's time_cond_proj expects; w is the guidance
 * scale minus 1.  Source: diffusers get_guidance_scale_embedding. */
void ipt_guidance_embedding(double w, int32_t dim, float *out);
/* out[dim] = sinusoids of timestep t; an odd last value is 0.
 * Source: diffusers get_timestep_embedding with downscale_freq_shift = freq_shift. */
void ipt_timestep_embedding(double t, int32_t dim, bool flip_sin_to_cos, double freq_shift,
                            float *out);
/* Quantile of the Beta(a, b) distribution, p in [0,1]; relative error about 1e-12. */
double ipt_beta_ppf(double p, double a, double b);
#endif
