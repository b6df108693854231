/* sampler/internal.h - what the files of this folder share: the sampler's memory and its pieces.
 * Nothing outside the folder includes it. */
#ifndef IPT_SAMPLER_INTERNAL_H
#define IPT_SAMPLER_INTERNAL_H
#include "sampler/sampler.h"

#include <math.h>

#define SAMPLER_HISTORY 4 /* most earlier model outputs a solver keeps */

/* How a class measures noise: by abar at integer timesteps, by sigma with x = x0 + sigma z
 * (k-diffusion's frame), or by sigma with x = alpha x0 + sigma alpha z. */
typedef enum sampler_frame { FRAME_ALPHA, FRAME_VE, FRAME_VP } sampler_frame;

typedef struct sampler_class {
    const char *name;       /* as typed */
    const char *class_name; /* of diffusers */
    sampler_frame frame;
    bool has_zero_snr;    /* knows rescale_betas_zero_snr */
    int32_t evals_a_step; /* 2: first and second order alternate; diffusers' `order` */
    ipt_status (*step)(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
    bool (*needs_noise)(const ipt_sampler *s, int32_t k);
} sampler_class;
const sampler_class *sampler_class_of(ipt_sampler_kind kind);

struct ipt_sampler {
    ipt_ctx *ctx;
    const sampler_class *cls;
    ipt_sampler_kind kind;
    ipt_schedule schedule;
    ipt_sampler_config cfg;
    size_t n;
    int32_t steps, skip;
    int32_t n_all;  /* evaluations of the whole schedule; arrays below are indexed by k < n_all */
    int32_t begin;  /* k of the caller's evaluation 0 */
    int32_t next;   /* k expected by the next step */
    int32_t n_prk;  /* PNDM: Runge-Kutta evaluations at the start */
    bool list_prev; /* DDIM: the earlier timestep is the next of the list, not t - T/N */

    double *abar;      /* [T] cumulative alpha products, f32 values */
    double *table;     /* [T] sigma of every timestep, f32 values */
    double *table_log; /* [T] its logarithm, f32 values */
    double final_abar; /* after the last step */

    double *t;          /* [n_all] */
    double *sigma;      /* [n_all + 1], f32 values; FRAME_ALPHA: unused */
    double *sigma_mid;  /* [n_all + 1] level of second evaluations */
    double *sigma_up;   /* [n_all + 1] DPM_2_A */
    double *sigma_down; /* [n_all + 1] DPM_2_A */
    int32_t *order;     /* [n_all] singlestep */
    double init_sigma;

    /* the solver's memory */
    float *hist[SAMPLER_HISTORY]; /* [n] each, newest first */
    double hist_t[SAMPLER_HISTORY];
    int32_t n_hist;
    float *saved; /* [n] */
    bool has_saved;
    float *work;         /* [n] */
    float *work2;        /* [n] */
    int32_t lower_order; /* steps done, as far as orders care */
    int32_t counter;     /* PNDM */
    int32_t this_order;  /* UniPC, SA: order of the last prediction */
    int32_t this_corrector;
};

/* schedule.c */
IPT_CHECKED ipt_status schedule_build(ipt_sampler *s);
/* solve_alpha.c: classes that step between integer timesteps */
ipt_status step_ddim(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_ddim_inverse(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_ddpm(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_pndm(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_lcm(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_tcd(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_ipndm(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
bool noise_ddim(const ipt_sampler *s, int32_t k);
bool noise_ddpm(const ipt_sampler *s, int32_t k);
bool noise_lcm(const ipt_sampler *s, int32_t k);
bool noise_tcd(const ipt_sampler *s, int32_t k);
/* solve_ve.c: k-diffusion's family */
ipt_status step_euler(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_euler_a(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_heun(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_dpm_2(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_dpm_2_a(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_lms(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_dpmpp_sde(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_edm_euler(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
void ancestral_split(double from, double to, double *up, double *down);
bool noise_euler_a(const ipt_sampler *s, int32_t k);
bool noise_dpm_2_a(const ipt_sampler *s, int32_t k);
bool noise_dpmpp_sde(const ipt_sampler *s, int32_t k);
/* solve_vp.c: exponential integrators in log signal-to-noise */
ipt_status step_dpm_multi(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_dpm_single(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_deis(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
bool noise_dpm(const ipt_sampler *s, int32_t k);
void single_orders(ipt_sampler *s);
/* solve_unipc.c: predictor-correctors */
ipt_status step_unipc(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
ipt_status step_sa(ipt_sampler *s, int32_t k, const float *m, float *x, const float *z);
bool noise_sa(const ipt_sampler *s, int32_t k);

/* vector.c */
/* out[n] = sum of c[j] * v[j][.], summed in double; out may be one of v. */
void combine(float *out, size_t n, int32_t count, const double *c, const float *const *v);
void clamp_values(float *v, size_t n, double range);
/* Imagen's dynamic thresholding of x0, per picture; `work` [n] is scratch. */
void threshold_values(const ipt_sampler_config *cfg, float *x0, size_t n, float *work);
/* Shifts the history and copies v in as the newest. */
void history_push(ipt_sampler *s, const float *v, double t);
/* Coefficients p, q of x0 = p x + q m for the configured prediction. */
void x0_coefficients_alpha(ipt_prediction pred, double abar, double *p, double *q);
void x0_coefficients_ve(ipt_prediction pred, double sigma, double *p, double *q);
void x0_coefficients_vp(ipt_prediction pred, double sigma, double *p, double *q);
/* Solves the n x n system a y = b (row-major, destroyed) by elimination; false when singular. */
IPT_CHECKED bool solve_small(int32_t n, double *a, double *b, double *y);

static inline double square(double v) { return v * v; }
#endif
