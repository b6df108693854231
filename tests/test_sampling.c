/* tests/test_sampling.c - random numbers, schedules, solvers, guidance.
 *
 * Oracles: torch and numpy values written here as constants; published results of diffusers' own
 * tests; trajectories of diffusers 0.42 in data/sampler_golden.h (tools/fixtures_sampler.py). */
#include "core/core.h"
#include "sampler/sampler.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* --- helpers --------------------------------------------------------------------------------- */
static int setup(void **state)
{
    ipt_ctx *ctx = NULL;
    if (ipt_ctx_create(NULL, NULL, &ctx) != IPT_OK)
        return 1;
    *state = ctx;
    return 0;
}

static int teardown(void **state)
{
    ipt_ctx *ctx = *state;
    ipt_ctx_destroy(&ctx);
    return 0;
}

/* "key=value key=value" as a scheduler_config.json would say it. */
static void apply_config(ipt_ctx *ctx, const char *text, ipt_sampler_config *cfg)
{
    char copy[400];
    assert_true(strlen(text) < sizeof(copy));
    strcpy(copy, text);
    char *rest = NULL;
    for (char *pair = strtok_r(copy, " ", &rest); pair != NULL; pair = strtok_r(NULL, " ", &rest)) {
        char *value = strchr(pair, '=');
        assert_non_null(value);
        *value++ = '\0';
        char *end;
        double number = strtod(value, &end);
        bool is_true = strcmp(value, "true") == 0;
        if (strcmp(pair, "eta") == 0)
            cfg->eta = number;
        else if (strcmp(pair, "ays_sdxl") == 0)
            cfg->ays_sdxl = is_true;
        else if (strcmp(pair, "disable_corrector") == 0)
            cfg->disable_corrector = (uint64_t)number;
        else if (is_true || strcmp(value, "false") == 0)
            assert_int_equal(ipt_sampler_config_set_bool(ctx, cfg, pair, is_true), IPT_OK);
        else if (*end == '\0')
            assert_int_equal(ipt_sampler_config_set_num(ctx, cfg, pair, number), IPT_OK);
        else
            assert_int_equal(ipt_sampler_config_set_str(ctx, cfg, pair, value), IPT_OK);
    }
}

static ipt_sampler_kind kind_of(const char *name)
{
    ipt_sampler_kind kind = IPT_SAMPLER_DDIM;
    assert_true(ipt_sampler_from_name(name, &kind));
    return kind;
}

static ipt_sampler *make(ipt_ctx *ctx, const ipt_sampler_config *cfg, ipt_sampler_kind kind,
                         ipt_schedule schedule, int32_t steps, int32_t skip, size_t n)
{
    ipt_sampler_request request = {cfg, kind, schedule, steps, skip, n};
    ipt_sampler *s = NULL;
    if (ipt_sampler_create(ctx, &request, &s) != IPT_OK)
        fail_msg("%s: %s", ipt_sampler_name(kind), ipt_last_error(ctx));
    return s;
}

/* --- random numbers -------------------------------------------------------------------------- */
static void test_torch_randn(void **state)
{
    (void)state;
    /* torch.manual_seed(seed); torch.randn(n)[:3] and [-3:] for each n in turn */
    static const struct {
        uint64_t seed;
        size_t n[3];
        float first[3], last[3];
    } cases[] = {
#include "data/sampler_randn.h"
    };
    float v[16384];
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        ipt_rng_torch r;
        ipt_rng_torch_seed(&r, cases[i].seed);
        for (int j = 0; j < 3 && cases[i].n[j] > 0; j++) {
            size_t n = cases[i].n[j];
            ipt_rng_torch_randn(&r, v, n);
            bool final = j == 2 || cases[i].n[j + 1] == 0;
            for (size_t e = 0; final && e < 3 && e < n; e++) {
                assert_true(fabsf(v[e] - cases[i].first[e]) < 1e-6f);
                assert_true(fabsf(v[n - 1 - e] - cases[i].last[e]) < 1e-6f);
            }
        }
    }
}

static void test_philox_randn(void **state)
{
    (void)state;
    /* torch.manual_seed(0); torch.randn(3, 4, device="cuda"); its sines are approximate */
    static const float cuda[12] = {-0.92466259f, -0.42534415f, -2.6438457f,  0.14518388f,
                                   -0.12086647f, -0.57972564f, -0.62285122f, -0.32838709f,
                                   -1.07454231f, -0.36314407f, -1.67105067f, 2.26550497f};
    float v[12], again[12];
    ipt_rng_philox_randn(0, 0, v, 12);
    for (int i = 0; i < 12; i++)
        assert_true(fabsf(v[i] - cuda[i]) < 1e-6f);
    ipt_rng_philox_randn(0, 1, again, 12);
    assert_true(fabsf(v[0] - again[0]) > 1e-3f);
}

static void test_splitmix(void **state)
{
    (void)state;
    uint64_t s = 1234567; /* published first outputs for this seed */
    assert_true(ipt_rng_next(&s) == UINT64_C(6457827717110365317));
    assert_true(ipt_rng_next(&s) == UINT64_C(3203168211198807973));
    double sum = 0, squares = 0;
    for (int i = 0; i < 20000; i++) {
        float u = ipt_rng_uniform(&s), g = ipt_rng_normal(&s);
        assert_true(u >= 0 && u < 1);
        sum += (double)g;
        squares += (double)g * (double)g;
    }
    assert_true(fabs(sum / 20000) < 0.03 && fabs(squares / 20000 - 1) < 0.05);
}

/* --- published results of diffusers' scheduler tests ------------------------------------------ */
#define BATCH 4
#define ITEM 192 /* 3 x 8 x 8 */

typedef struct published_case {
    const char *sampler, *config;
    int32_t steps, noise_step; /* noise_step > 0: start there from sample and noise */
    double sum, mean;          /* sum 0: only the mean is published */
} published_case;

static const published_case published[] = {
/* one-dimensional samples of 4 x 3 x 8 */
#define UNIPC "final_sigmas_type=sigma_min "
    {"unipc", "1d " UNIPC, 10, 0, 0, 0.2441},
    {"unipc", "1d " UNIPC "use_karras_sigmas=true", 10, 0, 0, 0.2898},
    {"unipc", "1d " UNIPC "use_karras_sigmas=true prediction_type=v_prediction", 10, 0, 0, 0.1944},
    {"unipc", "1d " UNIPC, 10, 8, 39.0870, 0.4072},
    {"unipc", "1d " UNIPC "prediction_type=v_prediction", 10, 0, 0, 0.1014},
    {"ddim", "", 10, 0, 172.0067, 0.223967},
    {"ddim", "set_alpha_to_one=false beta_start=0.01", 10, 0, 149.0784, 0.1941},
    {"ddim", "", 10, 8, 354.5418, 0.4616},
    {"ddim", "set_alpha_to_one=true beta_start=0.01", 10, 0, 149.8295, 0.1951},
    {"ddim", "prediction_type=v_prediction", 10, 0, 52.5302, 0.0684},
    {"ddim_inverse", "", 10, 0, 671.6816, 0.8746},
    {"ddim_inverse", "set_alpha_to_one=false beta_start=0.01", 10, 0, 542.6722, 0.7066},
    {"ddim_inverse", "set_alpha_to_one=true beta_start=0.01", 10, 0, 539.9622, 0.7031},
    {"ddim_inverse", "prediction_type=v_prediction", 10, 0, 1394.2185, 1.8154},
    {"ddpm", "", 1000, 0, 258.9606, 0.3372},
    {"ddpm", "", 1000, 998, 387.9466, 0.5051},
    {"ddpm", "prediction_type=v_prediction", 1000, 0, 202.0296, 0.2631},
    {"deis", "", 10, 0, 0, 0.23916},
    {"deis", "", 10, 8, 315.3016, 0.41054},
    {"deis", "prediction_type=v_prediction", 10, 0, 0, 0.091},
#define MULTI "lower_order_final=false final_sigmas_type=sigma_min "
    {"dpmpp_2m", MULTI, 10, 0, 0, 0.3301},
    {"dpmpp_2m", MULTI "thresholding=true dynamic_thresholding_ratio=0.87 sample_max_value=0.5", 10,
     0, 0, 1.1364},
    {"dpmpp_2m", MULTI "use_karras_sigmas=true prediction_type=v_prediction", 10, 0, 0, 0.2096},
    {"dpmpp_2m", MULTI "use_lu_lambdas=true prediction_type=v_prediction", 10, 0, 0, 0.1554},
    {"dpmpp_2m", MULTI, 10, 5, 318.4111, 0.4146},
    {"dpmpp_2m", MULTI "prediction_type=v_prediction", 10, 0, 0, 0.2251},
#define SINGLE "final_sigmas_type=sigma_min "
    {"dpm_single", SINGLE, 10, 0, 0, 0.2791},
    {"dpm_single", SINGLE "use_karras_sigmas=true", 10, 0, 0, 0.2248},
    {"dpm_single", SINGLE "use_karras_sigmas=true prediction_type=v_prediction", 10, 0, 0, 0.0649},
    {"dpm_single", SINGLE, 10, 5, 269.2187, 0.3505},
    {"dpm_single", SINGLE "prediction_type=v_prediction", 10, 0, 0, 0.1453},
    {"dpm_single", SINGLE, 50, 3, 0, 0.2574},
    {"edm_euler", "", 10, 0, 34.1855, 0.044},
    {"euler", "use_karras_sigmas=true", 10, 0, 124.52299499511719, 0.16213932633399963},
    {"euler", "", 10, 0, 10.0807, 0.0131},
    {"euler", "", 10, 8, 57062.9297, 74.3007},
    {"euler", "prediction_type=v_prediction", 10, 0, 0.0002, 2.2676e-06},
    {"euler_a", "", 10, 0, 152.3192, 0.1983},
    {"euler_a", "", 10, 8, 56163.0508, 73.1290},
    {"euler_a", "prediction_type=v_prediction", 10, 0, 108.4439, 0.1412},
    {"heun", "use_karras_sigmas=true", 10, 0, 0.00015, 1.9869554535034695e-07},
    {"heun", "", 10, 0, 0.1233, 0.0002},
    {"heun", "", 10, 8, 75074.8906, 97.7538},
    {"heun", "prediction_type=v_prediction", 10, 0, 4.6934e-07, 6.1112e-10},
    {"ipndm", "", 10, 0, 0, 2540529},
    {"dpm_2_a", "", 10, 0, 13979.9433, 18.2030},
    {"dpm_2_a", "", 10, 8, 93087.3437, 121.2074},
    {"dpm_2_a", "prediction_type=v_prediction", 10, 0, 331.8133, 0.4320},
    {"dpm_2", "", 10, 0, 20.4125, 0.0266},
    {"dpm_2", "", 10, 8, 70408.4062, 91.6776},
    {"dpm_2", "prediction_type=v_prediction", 10, 0, 4.6934e-07, 6.1112e-10},
    {"lcm", "", 10, 0, 197.7616, 0.2575},
    {"lcm", "", 1, 0, 18.7097, 0.0244},
    {"lms", "use_karras_sigmas=true", 10, 0, 3812.9927, 4.9648},
    {"lms", "", 10, 0, 1006.388, 1.31},
    {"lms", "", 10, 8, 27663.6895, 36.0204},
    {"lms", "prediction_type=v_prediction", 10, 0, 0.0017, 2.2676e-06},
    {"pndm", "", 10, 0, 198.1318, 0.2580},
    {"pndm", "set_alpha_to_one=false beta_start=0.01", 10, 0, 186.9482, 0.2434},
    {"pndm", "set_alpha_to_one=true beta_start=0.01", 10, 0, 230.0399, 0.2995},
    {"pndm", "prediction_type=v_prediction", 10, 0, 67.3986, 0.0878},
    {"sa", "use_karras_sigmas=true", 10, 0, 837.2554931640625, 1.0901764631271362},
    {"sa", "", 10, 0, 337.394287109375, 0.43931546807289124},
    {"sa", "prediction_type=v_prediction", 10, 0, 193.1467742919922, 0.2514931857585907},
    {"tcd", "eta=0", 10, 0, 181.2040, 0.2359},
    {"tcd", "eta=0", 1, 0, 29.8715, 0.0389},
    {"unipc", UNIPC, 10, 0, 0, 0.2464},
    {"unipc", UNIPC "use_karras_sigmas=true", 10, 0, 0, 0.2925},
    {"unipc", UNIPC "use_karras_sigmas=true prediction_type=v_prediction", 10, 0, 0, 0.1966},
    {"unipc", UNIPC, 10, 8, 315.5757, 0.4109},
    {"unipc", UNIPC "prediction_type=v_prediction", 10, 0, 0, 0.1014},
};

static void published_config(ipt_ctx *ctx, const published_case *c, ipt_sampler_config *cfg)
{
    ipt_sampler_kind kind = kind_of(c->sampler);
    ipt_sampler_config_default(kind, cfg);
    bool ve = kind == IPT_SAMPLER_EULER || kind == IPT_SAMPLER_EULER_A ||
              kind == IPT_SAMPLER_HEUN || kind == IPT_SAMPLER_LMS || kind == IPT_SAMPLER_DPM_2 ||
              kind == IPT_SAMPLER_DPM_2_A || kind == IPT_SAMPLER_SA;
    cfg->num_train_timesteps = ve ? 1100 : 1000;
    if (kind != IPT_SAMPLER_LCM && kind != IPT_SAMPLER_TCD) {
        cfg->beta_start = 1e-4;
        cfg->beta_end = 0.02;
    }
    apply_config(ctx, c->config + (strncmp(c->config, "1d ", 3) == 0 ? 3 : 0), cfg);
}

/* The published loops: k-diffusion classes (not EDM) carry the scaled sample into step(). */
static void run_published(ipt_ctx *ctx, const published_case *c, double *sum, double *mean)
{
    static float x[BATCH][ITEM], noise[BATCH * ITEM], model_out[ITEM], scaled[ITEM];
    ipt_sampler_config cfg;
    published_config(ctx, c, &cfg);
    ipt_sampler_kind kind = kind_of(c->sampler);
    bool ve = kind == IPT_SAMPLER_EULER || kind == IPT_SAMPLER_EULER_A ||
              kind == IPT_SAMPLER_HEUN || kind == IPT_SAMPLER_LMS || kind == IPT_SAMPLER_DPM_2 ||
              kind == IPT_SAMPLER_DPM_2_A || kind == IPT_SAMPLER_EDM_EULER;
    bool uneven = kind == IPT_SAMPLER_DPM_SINGLE && c->steps == 50; /* skips, adds no noise */
    int item = strncmp(c->config, "1d ", 3) == 0 ? 24 : ITEM, total = BATCH * item;
    ipt_sampler *s[BATCH];
    ipt_rng_torch rng;
    ipt_rng_torch_seed(&rng, 0);
    for (int b = 0; b < BATCH; b++) {
        s[b] = make(ctx, &cfg, kind, IPT_SCHEDULE_DEFAULT, c->steps, c->noise_step, (size_t)item);
        for (int i = 0; i < item; i++) {
            double v = (double)(i * BATCH + b) / total;
            x[b][i] = (float)v * (float)(ve ? ipt_sampler_init_noise_sigma(s[b]) : 1);
            noise[i] = (float)(total - 1 - (i * BATCH + b)) / (float)total;
        }
        if (c->noise_step > 0 && !uneven)
            ipt_sampler_add_noise(s[b], 0, x[b], noise, x[b]);
    }
    /* IPNDM's test runs its ten steps twice over */
    for (int pass = 0; pass < (kind == IPT_SAMPLER_IPNDM ? 2 : 1); pass++) {
        for (int32_t i = 0; i < ipt_sampler_n_evals(s[0]); i++) {
            bool needs = ipt_sampler_needs_noise(s[0], i);
            double t = ipt_sampler_timestep(s[0], i);
            bool draws = needs || kind == IPT_SAMPLER_SA;
            if (draws)
                ipt_rng_torch_randn(&rng, noise, (size_t)total);
            for (int b = 0; b < BATCH; b++) {
                float *in = kind == IPT_SAMPLER_EDM_EULER ? scaled : x[b];
                ipt_sampler_scale_input(s[b], i, x[b], in);
                for (int e = 0; e < item; e++)
                    model_out[e] = in[e] * (float)t / (float)(t + 1);
                assert_int_equal(ipt_sampler_step(s[b], i, model_out, x[b],
                                                  needs ? noise + (size_t)b * (size_t)item : NULL),
                                 IPT_OK);
            }
        }
        if (kind == IPT_SAMPLER_IPNDM && pass == 0)
            for (int b = 0; b < BATCH; b++)
                ipt_sampler_rewind(s[b]);
    }
    *sum = 0;
    for (int b = 0; b < BATCH; b++) {
        for (int e = 0; e < item; e++)
            *sum += fabs((double)x[b][e]);
        ipt_sampler_destroy(&s[b]);
    }
    *mean = *sum / total;
}

static void test_published(void **state)
{
    int bad = 0;
    for (size_t i = 0; i < IPT_COUNT(published); i++) {
        const published_case *c = &published[i];
        double sum, mean;
        run_published(*state, c, &sum, &mean);
        double mean_within = c->mean > 1e6 ? 10 : 1e-3; /* as diffusers' tests allow */
        bool ok = (c->sum == 0 || fabs(sum - c->sum) < 1e-2) && fabs(mean - c->mean) < mean_within;
        if (!ok) {
            print_error("%s [%s] noise %d: sum %.7g mean %.7g, published %.7g %.7g\n", c->sampler,
                        c->config, (int)c->noise_step, sum, mean, c->sum, c->mean);
            bad++;
        }
    }
    assert_int_equal(bad, 0);
}

/* --- trajectories ---------------------------------------------------------------------------- */
#define N 16
typedef struct golden_case {
    const char *sampler, *schedule, *config;
    int32_t steps, skip, n_evals;
    const float *data; /* timesteps, probe after each evaluation, first 8 final values */
} golden_case;
#include "data/sampler_golden.h"

static void toy(const float *x, double t, float *out)
{
    for (int e = 0; e < N; e++) {
        double v = (double)x[e];
        out[e] = (float)(0.8 * v * t / (fabs(t) + 1) + 0.1 * sin(4 * v) + 0.05 * cos(t / 200));
    }
}

static double nmse(const float *a, const float *ref, int n)
{
    double error = 0, power = 0;
    for (int i = 0; i < n; i++) {
        error += ((double)a[i] - (double)ref[i]) * ((double)a[i] - (double)ref[i]);
        power += (double)ref[i] * (double)ref[i];
    }
    return error / (power > 0 ? power : 1);
}

/* Worst of the relative errors of probes and final values; NAN where timesteps differ. */
static double run_golden(ipt_ctx *ctx, const golden_case *c)
{
    ipt_sampler_kind kind = kind_of(c->sampler);
    ipt_schedule schedule = IPT_SCHEDULE_DEFAULT;
    ipt_sampler_config cfg;
    assert_true(ipt_schedule_from_name(c->schedule, &schedule));
    ipt_sampler_config_single_file(kind, &cfg);
    apply_config(ctx, c->config, &cfg);
    ipt_sampler *s = make(ctx, &cfg, kind, schedule, c->steps, c->skip, N);
    float x[N], z[N], in[N], out[N], probes[128];
    ipt_rng_torch rng;
    ipt_rng_torch_seed(&rng, 0);
    ipt_rng_torch_randn(&rng, x, N);
    if (c->skip > 0) {
        ipt_rng_torch_randn(&rng, z, N);
        ipt_sampler_add_noise(s, 0, x, z, x);
    } else if (kind != IPT_SAMPLER_DDIM_INVERSE) {
        for (int e = 0; e < N; e++)
            x[e] = (float)((double)x[e] * ipt_sampler_init_noise_sigma(s));
    }
    bool same = ipt_sampler_n_evals(s) == c->n_evals;
    for (int32_t i = 0; same && i < c->n_evals; i++) {
        double t = ipt_sampler_timestep(s, i);
        same = fabs(t - (double)c->data[i]) <= 2e-3 + 2e-6 * fabs(t);
        if (!same)
            print_error("timestep %d: %.9g, reference %.9g\n", (int)i, t, (double)c->data[i]);
        if (ipt_sampler_needs_noise(s, i))
            ipt_rng_torch_randn(&rng, z, N);
        ipt_sampler_scale_input(s, i, x, in);
        toy(in, t, out);
        assert_int_equal(ipt_sampler_step(s, i, out, x, z), IPT_OK);
        probes[i] = x[7];
    }
    double worst = same ? nmse(x, c->data + 2 * c->n_evals, 8) : (double)NAN;
    double path = same ? nmse(probes, c->data + c->n_evals, c->n_evals) : (double)NAN;
    ipt_sampler_destroy(&s);
    return worst > path ? worst : path;
}

static void test_trajectories(void **state)
{
    int bad = 0;
    double worst = 0;
    for (size_t i = 0; i < IPT_COUNT(golden_cases); i++) {
        const golden_case *c = &golden_cases[i];
        double e = run_golden(*state, c);
        if (!(e <= 1e-9)) {
            print_error("%s %s [%s] steps %d skip %d: NMSE %.3g\n", c->sampler, c->schedule,
                        c->config, (int)c->steps, (int)c->skip, e);
            bad++;
        }
        worst = e > worst ? e : worst;
    }
    print_message("%zu trajectories, worst NMSE %.2g\n", IPT_COUNT(golden_cases), worst);
    assert_int_equal(bad, 0);
}

/* --- what holds without a reference ----------------------------------------------------------- */
/* The noise in `in`, for a model that knows the clean picture x0. */
static void oracle(const ipt_sampler *s, int32_t i, ipt_prediction pred, const float *in,
                   const float *x0, float *out)
{
    double sigma = ipt_sampler_sigma(s, i), a = 1 / sqrt(1 + sigma * sigma), b = sigma * a;
    for (int e = 0; e < N; e++) {
        double eps = ((double)in[e] - a * (double)x0[e]) / b;
        double v = a * eps - b * (double)x0[e];
        out[e] = (float)(pred == IPT_PRED_EPSILON ? eps : v);
    }
}

/* Runs a schedule with a perfect model; returns the largest distance of the result from x0. */
static double run_oracle(ipt_ctx *ctx, const ipt_sampler_config *cfg, ipt_sampler_kind kind,
                         ipt_schedule schedule, int32_t steps, int32_t skip)
{
    ipt_sampler *s = make(ctx, cfg, kind, schedule, steps, skip, N);
    float x0[N], x[N], z[N], in[N], out[N], guess[N];
    double worst = 0;
    ipt_rng_torch rng;
    ipt_rng_torch_seed(&rng, 5);
    ipt_rng_torch_randn(&rng, x0, N);
    ipt_rng_torch_randn(&rng, z, N);
    ipt_sampler_add_noise(s, 0, x0, z, x);
    int32_t completed = 0;
    for (int32_t i = 0; i < ipt_sampler_n_evals(s); i++) {
        assert_int_equal(ipt_sampler_step_of(s, i), completed);
        completed += ipt_sampler_completes_step(s, i);
        ipt_rng_torch_randn(&rng, z, N);
        ipt_sampler_scale_input(s, i, x, in);
        oracle(s, i, cfg->prediction, in, x0, out);
        ipt_sampler_predict_x0(s, i, out, x, guess);
        for (int e = 0; e < N; e++) /* in f32 the first levels hold a 150th of the picture */
            assert_true(fabs((double)guess[e] - (double)x0[e]) < 1e-3);
        assert_int_equal(ipt_sampler_step(s, i, out, x, z), IPT_OK);
    }
    assert_int_equal(completed, steps - skip);
    assert_int_equal(ipt_sampler_n_steps(s), steps - skip);
    for (int e = 0; e < N; e++) {
        assert_true(isfinite(x[e]));
        worst = fmax(worst, fabs((double)x[e] - (double)x0[e]));
    }
    ipt_sampler_destroy(&s);
    return worst;
}

static void test_perfect_model(void **state)
{
    for (int k = 0; k < IPT_SAMPLER_COUNT; k++) {
        ipt_sampler_kind kind = (ipt_sampler_kind)k;
        if (kind == IPT_SAMPLER_DDIM_INVERSE || kind == IPT_SAMPLER_IPNDM ||
            kind == IPT_SAMPLER_EDM_EULER)
            continue; /* other ends, other scalings */
        ipt_sampler_config cfg;
        ipt_sampler_config_single_file(kind, &cfg);
        cfg.set_alpha_to_one = true;
        /* these stop at the table's least sigma, mix a little input into the last prediction, or
         * extrapolate v, which is not constant along the path */
        bool ends_noisy = kind == IPT_SAMPLER_DEIS || kind == IPT_SAMPLER_SA ||
                          kind == IPT_SAMPLER_LCM || kind == IPT_SAMPLER_TCD ||
                          kind == IPT_SAMPLER_PNDM;
        for (int v = 0; v < 2; v++) {
            cfg.prediction = v ? IPT_PRED_V : IPT_PRED_EPSILON;
            double e = run_oracle(*state, &cfg, kind, IPT_SCHEDULE_DEFAULT, 12, 0);
            if (!(e < (ends_noisy ? 0.3 : 2e-3)))
                fail_msg("%s: %g from the picture", ipt_sampler_name(kind), e);
            e = run_oracle(*state, &cfg, kind, IPT_SCHEDULE_DEFAULT, 12, 7);
            /* the reference's PNDM and LMS start in the middle with the coefficients of a full
             * history: off the ideal, but what its pictures show */
            bool quirk = kind == IPT_SAMPLER_PNDM || kind == IPT_SAMPLER_LMS;
            if (!quirk && !(e < (ends_noisy ? 0.3 : 2e-3)))
                fail_msg("%s image to image: %g from the picture", ipt_sampler_name(kind), e);
        }
    }
}

static void test_every_combination_is_finite(void **state)
{
    static const int32_t steps[] = {1, 2, 3, 4, 20, 1000};
    for (int k = 0; k < IPT_SAMPLER_COUNT; k++) {
        for (int h = 0; h < IPT_SCHEDULE_COUNT; h++) {
            for (size_t n = 0; n < IPT_COUNT(steps); n++) {
                ipt_sampler_config cfg;
                ipt_sampler_kind kind = (ipt_sampler_kind)k;
                ipt_sampler_config_single_file(kind, &cfg);
                ipt_sampler_request r = {&cfg, kind, (ipt_schedule)h, steps[n], 0, N};
                ipt_sampler *s = NULL;
                ipt_status status = ipt_sampler_create(*state, &r, &s);
                if (status != IPT_OK) {
                    assert_int_equal(status, IPT_ERR_ARG);
                    assert_true(strlen(ipt_last_error(*state)) > 30);
                    continue;
                }
                float x[N], z[N], in[N], out[N];
                for (int e = 0; e < N; e++) {
                    x[e] = (float)(sin(e) * ipt_sampler_init_noise_sigma(s));
                    z[e] = (float)cos(e);
                }
                for (int32_t i = 0; i < ipt_sampler_n_evals(s); i++) {
                    double t = ipt_sampler_timestep(s, i);
                    assert_true(t >= -2 && t <= 999);
                    ipt_sampler_scale_input(s, i, x, in);
                    toy(in, t, out);
                    assert_int_equal(ipt_sampler_step(s, i, out, x, z), IPT_OK);
                }
                for (int e = 0; e < N; e++)
                    if (!isfinite(x[e]))
                        fail_msg("%s %s %d steps: not finite", ipt_sampler_name(kind),
                                 ipt_schedule_name(r.schedule), (int)steps[n]);
                ipt_sampler_destroy(&s);
            }
        }
    }
}

static void expect_refusal(ipt_ctx *ctx, ipt_sampler_request r, ipt_status status, const char *says)
{
    ipt_sampler *s = NULL;
    assert_int_equal(ipt_sampler_create(ctx, &r, &s), status);
    assert_null(s);
    if (strstr(ipt_last_error(ctx), says) == NULL)
        fail_msg("\"%s\" does not say \"%s\"", ipt_last_error(ctx), says);
}

static void test_refusals(void **state)
{
    ipt_ctx *ctx = *state;
    ipt_sampler_config cfg;
    ipt_sampler_request r = {&cfg, IPT_SAMPLER_DDIM, IPT_SCHEDULE_DEFAULT, 20, 0, N};
    ipt_sampler_config_single_file(IPT_SAMPLER_DDIM, &cfg);
    r.steps = 0;
    expect_refusal(ctx, r, IPT_ERR_ARG, "1..1000");
    r.steps = 1001;
    expect_refusal(ctx, r, IPT_ERR_ARG, "1001 steps");
    r.steps = 20;
    r.skip = 20;
    expect_refusal(ctx, r, IPT_ERR_ARG, "none is left");
    r.skip = 0;
    r.kind = IPT_SAMPLER_LCM;
    r.steps = 51;
    expect_refusal(ctx, r, IPT_ERR_ARG, "distilled");
    r.steps = 20;
    r.kind = IPT_SAMPLER_PNDM;
    r.schedule = IPT_SCHEDULE_KARRAS;
    expect_refusal(ctx, r, IPT_ERR_ARG, "evenly spaced");
    r.kind = IPT_SAMPLER_DDIM;
    r.schedule = IPT_SCHEDULE_DEFAULT;
    cfg.beta_end = 2;
    expect_refusal(ctx, r, IPT_ERR_FORMAT, "beta");
    cfg.beta_end = (double)NAN;
    expect_refusal(ctx, r, IPT_ERR_FORMAT, "beta");
    ipt_sampler_config_single_file(IPT_SAMPLER_DDIM, &cfg);
    cfg.num_train_timesteps = 0;
    expect_refusal(ctx, r, IPT_ERR_FORMAT, "num_train_timesteps");
    cfg.num_train_timesteps = 1000;
    cfg.rescale_betas_zero_snr = true;
    cfg.spacing = IPT_SPACING_TRAILING;
    expect_refusal(ctx, r, IPT_ERR_ARG, "rescale_betas_zero_snr");
    const float few[2] = {0.1f, 0.2f};
    ipt_sampler_config_single_file(IPT_SAMPLER_DDIM, &cfg);
    cfg.trained_betas = few;
    cfg.n_trained_betas = 2;
    expect_refusal(ctx, r, IPT_ERR_FORMAT, "trained_betas");
}

static void test_trained_betas(void **state)
{
    float betas[1000];
    for (int i = 0; i < 1000; i++) {
        double root = sqrt(0.00085) + i * (sqrt(0.012) - sqrt(0.00085)) / 999;
        betas[i] = (float)(root * root);
    }
    ipt_sampler_config cfg;
    ipt_sampler_config_single_file(IPT_SAMPLER_EULER, &cfg);
    ipt_sampler *computed = make(*state, &cfg, IPT_SAMPLER_EULER, IPT_SCHEDULE_DEFAULT, 9, 0, N);
    cfg.trained_betas = betas;
    cfg.n_trained_betas = 1000;
    ipt_sampler *given = make(*state, &cfg, IPT_SAMPLER_EULER, IPT_SCHEDULE_DEFAULT, 9, 0, N);
    for (int32_t i = 0; i < 9; i++)
        assert_true(fabs(ipt_sampler_sigma(given, i) - ipt_sampler_sigma(computed, i)) < 1e-4);
    ipt_sampler_destroy(&given);
    ipt_sampler_destroy(&computed);
}

static void test_step_protocol(void **state)
{
    ipt_sampler *s = make(*state, NULL, IPT_SAMPLER_EULER_A, IPT_SCHEDULE_DEFAULT, 3, 0, N);
    float x[N] = {1}, m[N] = {0}, z[N] = {0.5f}, first[N], clean[N] = {2};
    assert_true(ipt_sampler_needs_noise(s, 0));
    assert_int_equal(ipt_sampler_step(s, 1, m, x, z), IPT_ERR_ARG);
    assert_int_equal(ipt_sampler_step(s, 0, m, x, NULL), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(*state), "noise"));
    assert_true(x[0] == 1.0f);
    assert_int_equal(ipt_sampler_step(s, 0, m, x, z), IPT_OK);
    memcpy(first, x, sizeof(x));
    assert_int_equal(ipt_sampler_step(s, 0, m, x, z), IPT_ERR_ARG);
    ipt_sampler_reset(s);
    memset(x, 0, sizeof(x));
    x[0] = 1;
    assert_int_equal(ipt_sampler_step(s, 0, m, x, z), IPT_OK);
    assert_memory_equal(x, first, sizeof(x));
    ipt_sampler_add_noise(s, ipt_sampler_n_evals(s), clean, z, x);
    assert_memory_equal(x, clean, sizeof(x));
    ipt_sampler_destroy(&s);
    ipt_sampler_destroy(&s);
    ipt_sampler_destroy(NULL);
}

static void test_strength(void **state)
{
    static const struct {
        int32_t steps;
        double strength;
        int32_t skip; /* diffusers get_timesteps */
    } cases[] = {{20, 1, 0}, {20, 0.75, 5}, {50, 0.8, 10}, {10, 0.55, 5}, {3, 0.5, 2}, {1, 1, 0}};
    int32_t skip = -1;
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        assert_int_equal(ipt_sampler_skip(*state, cases[i].steps, cases[i].strength, &skip),
                         IPT_OK);
        assert_int_equal(skip, cases[i].skip);
    }
    assert_int_equal(ipt_sampler_skip(*state, 20, 0, &skip), IPT_ERR_ARG);
    assert_non_null(strstr(ipt_last_error(*state), "0.05"));
    assert_int_equal(ipt_sampler_skip(*state, 20, 1.5, &skip), IPT_ERR_ARG);
    assert_int_equal(ipt_sampler_skip(*state, 20, (double)NAN, &skip), IPT_ERR_ARG);
}

static void test_names_and_classes(void **state)
{
    static const char *const wanted[] = {
        "ddim",         "euler",     "euler_a",      "heun",  "dpm_2", "dpm_2_a", "lms", "dpmpp_2m",
        "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_3m_sde", "unipc", "pndm",  "deis",    "lcm", "tcd"};
    static const char *const schedules[] = {"normal", "karras", "exponential", "sgm_uniform",
                                            "simple", "beta",   "ays",         "trailing"};
    ipt_sampler_kind kind;
    ipt_schedule schedule;
    for (size_t i = 0; i < IPT_COUNT(wanted); i++) {
        assert_true(ipt_sampler_from_name(wanted[i], &kind));
        assert_string_equal(ipt_sampler_name(kind), wanted[i]);
        assert_non_null(strstr(ipt_sampler_names(), wanted[i]));
    }
    for (size_t i = 0; i < IPT_COUNT(schedules); i++) {
        assert_true(ipt_schedule_from_name(schedules[i], &schedule));
        assert_string_equal(ipt_schedule_name(schedule), schedules[i]);
        assert_non_null(strstr(ipt_schedule_names(), schedules[i]));
    }
    assert_false(ipt_sampler_from_name("eular", &kind));
    assert_false(ipt_sampler_from_name(NULL, &kind));
    assert_false(ipt_schedule_from_name("", &schedule));
    assert_true(ipt_sampler_from_class("DPMSolverMultistepScheduler", "sde-dpmsolver++", &kind));
    assert_int_equal(kind, IPT_SAMPLER_DPMPP_2M_SDE);
    assert_true(ipt_sampler_from_class("DPMSolverMultistepScheduler", NULL, &kind));
    assert_int_equal(kind, IPT_SAMPLER_DPMPP_2M);
    assert_true(ipt_sampler_from_class("PNDMScheduler", NULL, &kind));
    assert_int_equal(kind, IPT_SAMPLER_PNDM);
    assert_false(ipt_sampler_from_class("FlowMatchEulerDiscreteScheduler", NULL, &kind));
    assert_false(ipt_sampler_from_class("", NULL, &kind));
    (void)state;
}

static void test_config_members(void **state)
{
    ipt_ctx *ctx = *state;
    ipt_sampler_config cfg;
    ipt_sampler_config_default(IPT_SAMPLER_PNDM, &cfg);
    assert_int_equal(ipt_sampler_config_set_num(ctx, &cfg, "steps_offset", 1), IPT_OK);
    assert_int_equal(cfg.steps_offset, 1);
    assert_int_equal(ipt_sampler_config_set_num(ctx, &cfg, "_unknown", 1), IPT_OK);
    assert_int_equal(ipt_sampler_config_set_num(ctx, &cfg, "steps_offset", 0.5), IPT_ERR_FORMAT);
    assert_int_equal(ipt_sampler_config_set_num(ctx, &cfg, "steps_offset", 1e9), IPT_ERR_FORMAT);
    assert_int_equal(ipt_sampler_config_set_num(ctx, &cfg, "num_train_timesteps", 0),
                     IPT_ERR_FORMAT);
    assert_string_equal(ipt_last_error(ctx),
                        "scheduler: num_train_timesteps is 0, expected 2 to 100000");
    assert_int_equal(ipt_sampler_config_set_num(ctx, &cfg, "num_train_timesteps", 2147483647),
                     IPT_ERR_FORMAT);
    assert_non_null(strstr(ipt_last_error(ctx), "2147483647"));
    assert_int_equal(ipt_sampler_config_set_num(ctx, &cfg, "beta_end", (double)INFINITY),
                     IPT_ERR_FORMAT);
    assert_int_equal(ipt_sampler_config_set_str(ctx, &cfg, "beta_schedule", "cubic"),
                     IPT_ERR_FORMAT);
    assert_non_null(strstr(ipt_last_error(ctx), "scaled_linear"));
    assert_int_equal(ipt_sampler_config_set_str(ctx, &cfg, "prediction_type", "flow_prediction"),
                     IPT_ERR_UNSUPPORTED);
    assert_int_equal(ipt_sampler_config_set_bool(ctx, &cfg, "use_flow_sigmas", true),
                     IPT_ERR_UNSUPPORTED);
    assert_int_equal(ipt_sampler_config_set_bool(ctx, &cfg, "use_flow_sigmas", false), IPT_OK);
    assert_int_equal(ipt_sampler_config_set_str(ctx, &cfg, "_class_name", "PNDMScheduler"), IPT_OK);
}

static void test_out_of_memory(void **state)
{
    ipt_ctx *ctx = *state;
    ipt_sampler_request r = {NULL, IPT_SAMPLER_HEUN, IPT_SCHEDULE_KARRAS, 5, 0, N};
    for (uint64_t n = 1; n < 100; n++) {
        ipt_sampler *s = NULL;
        ipt_alloc_fail_after(ctx, n);
        ipt_status status = ipt_sampler_create(ctx, &r, &s);
        ipt_alloc_fail_after(ctx, 0);
        if (status == IPT_OK) {
            assert_true(n > 10);
            ipt_sampler_destroy(&s);
            return;
        }
        assert_int_equal(status, IPT_ERR_NOMEM);
        assert_null(s);
    }
    fail_msg("creation never succeeds");
}

/* --- guidance and embeddings: values of torch with diffusers' functions ----------------------- */
static void expect_close(const float *got, const float *want, int n, double within)
{
    for (int i = 0; i < n; i++)
        if (!(fabs((double)got[i] - (double)want[i]) <= within))
            fail_msg("value %d: %.9g, expected %.9g", i, (double)got[i], (double)want[i]);
}

static void test_guidance(void **state)
{
    (void)state;
    float u[8], c[8], out[8];
    static const float plain[8] = {4.875f,       9.5610323f,   8.44473076f,  1.05840003f,
                                   -7.30101919f, -10.4419327f, -6.97061634f, -1.5726006f};
    static const float rescaled[8] = {1.78242135f,  3.49575138f,  3.08760381f,  0.386977404f,
                                      -2.66943455f, -3.81783056f, -2.54863095f, -0.574981928f};
    for (int i = 0; i < 8; i++) {
        u[i] = (float)(i - 3) / 4;
        c[i] = sinf((float)i);
    }
    ipt_cfg(u, c, 8, 7.5, 0, out);
    expect_close(out, plain, 8, 2e-6);
    ipt_cfg(u, c, 8, 7.5, 0.7, out);
    expect_close(out, rescaled, 8, 2e-6);
    ipt_cfg(u, c, 8, 7.5, 0.7, c); /* in place */
    expect_close(c, rescaled, 8, 2e-6);
    const float flat[2] = {1, 1};
    ipt_cfg(flat, flat, 2, 7.5, 0.7, out); /* no deviation: no division by it */
    assert_true(out[0] == 1.0f && out[1] == 1.0f);
    ipt_cfg(flat, flat, 1, 7.5, 0.7, out);
    assert_true(out[0] == 1.0f);
}

/* Timesteps of ComfyUI's beta_scheduler with scipy 1.17: rint(beta.ppf(1 - i/n, 0.6, 0.6) * 999),
 * those that fall together once. */
static void test_beta_schedule(void **state)
{
    static const int16_t twenty[] = {999, 986, 959, 922, 876, 823, 765, 703, 637, 569,
                                     500, 430, 362, 296, 234, 176, 123, 77,  40,  13};
    static const struct {
        int32_t steps, skip, evals;
        double sum, last;
    } cases[] = {{1, 0, 1, 999, 999},       {2, 0, 2, 1499, 500},    {4, 0, 4, 2498, 176},
                 {20, 0, 20, 10490, 13},    {150, 0, 149, 74426, 0}, {300, 0, 293, 146354, 0},
                 {1000, 0, 847, 423077, 0}, {300, 150, 147, -1, 0}};
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        ipt_sampler_config cfg;
        ipt_sampler_config_single_file(IPT_SAMPLER_DDIM, &cfg);
        ipt_sampler *s = make(*state, &cfg, IPT_SAMPLER_DDIM, IPT_SCHEDULE_BETA, cases[i].steps,
                              cases[i].skip, N);
        double sum = 0;
        assert_int_equal(ipt_sampler_n_evals(s), cases[i].evals);
        for (int32_t k = 0; k < cases[i].evals; k++) {
            double t = ipt_sampler_timestep(s, k);
            sum += t;
            if (cases[i].steps == 20)
                assert_int_equal((int)t, twenty[k]);
            assert_true(k == 0 || t < ipt_sampler_timestep(s, k - 1));
        }
        if (cases[i].sum > 0)
            assert_int_equal((int)sum, (int)cases[i].sum);
        assert_int_equal((int)ipt_sampler_timestep(s, cases[i].evals - 1), (int)cases[i].last);
        ipt_sampler_destroy(&s);
    }
}

static void test_embeddings(void **state)
{
    (void)state;
    float out[320];
    static const float t999[8] = {0.999649823f,   0.807455063f,  -0.844469786f, 0.541143537f,
                                  -0.0264607519f, -0.589929104f, -0.535603166f, 0.840930223f};
    static const float t500[9] = {-0.671897709f, -0.941953003f, 0.880897939f,
                                  0.0500041321f, -0.740643919f, -0.335744709f,
                                  0.473306239f,  0.998749018f,  0};
    static const int at320[9] = {0, 1, 5, 40, 159, 160, 161, 200, 319};
    static const float t981[9] = {0.679957211f,  -0.798429191f, 0.871001422f,
                                  -0.757958531f, 0.994605899f,  0.73325181f,
                                  0.60208869f,   -0.652302742f, 0.10372588f};
    static const int at256[9] = {0, 1, 2, 50, 127, 128, 129, 200, 255};
    static const float w75[9] = {-0.851235867f, 0.842131197f,  0.011876259f,
                                 -0.988206267f, 0.681638718f,  -0.524783254f,
                                 0.539272726f,  -0.939037085f, 0.731688917f};
    static const float w3[7] = {
        0.219189972f, -0.988031626f, 0.295520186f, -0.975682199f, 0.154251456f, 0.955336511f, 0};
    float picked[9];
    ipt_timestep_embedding(999, 8, true, 0, out);
    expect_close(out, t999, 8, 1e-4);
    ipt_timestep_embedding(500.25, 9, false, 1, out);
    expect_close(out, t500, 9, 1e-4);
    ipt_timestep_embedding(981, 320, true, 0, out);
    for (int i = 0; i < 9; i++)
        picked[i] = out[at320[i]];
    expect_close(picked, t981, 9, 1e-4);
    ipt_guidance_embedding(7.5, 256, out);
    for (int i = 0; i < 9; i++)
        picked[i] = out[at256[i]];
    expect_close(picked, w75, 9, 1e-3);
    ipt_guidance_embedding(3, 7, out);
    expect_close(out, w3, 7, 1e-3);
    ipt_timestep_embedding(3, 2, false, 1, out); /* half - shift = 0 */
    assert_true(isfinite(out[0]) && isfinite(out[1]));
    ipt_guidance_embedding(3, 2, out);
    assert_true(isfinite(out[0]) && isfinite(out[1]));
}

static void test_beta_quantiles(void **state)
{
    (void)state;
    static const double cases[][4] = {/* p, a, b, scipy.stats.beta.ppf */
                                      {0.05, 0.6, 0.6, 0.012554456873611399},
                                      {0.5, 0.6, 0.6, 0.5},
                                      {0.3, 2, 5, 0.18180347131894917},
                                      {0.95, 0.6, 0.6, 0.98744554312638855},
                                      {0.001, 0.6, 0.6, 1.855873851745199e-05},
                                      {0, 0.6, 0.6, 0},
                                      {1, 0.6, 0.6, 1}};
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        double v = ipt_beta_ppf(cases[i][0], cases[i][1], cases[i][2]);
        assert_true(fabs(v - cases[i][3]) <= 1e-12 * (1e-3 + cases[i][3]));
    }
    assert_true(isnan(ipt_beta_ppf(0.5, 0, 1)));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_torch_randn),
        cmocka_unit_test(test_philox_randn),
        cmocka_unit_test(test_splitmix),
        cmocka_unit_test(test_published),
        cmocka_unit_test(test_trajectories),
        cmocka_unit_test(test_perfect_model),
        cmocka_unit_test(test_every_combination_is_finite),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_trained_betas),
        cmocka_unit_test(test_step_protocol),
        cmocka_unit_test(test_strength),
        cmocka_unit_test(test_names_and_classes),
        cmocka_unit_test(test_config_members),
        cmocka_unit_test(test_out_of_memory),
        cmocka_unit_test(test_guidance),
        cmocka_unit_test(test_embeddings),
        cmocka_unit_test(test_beta_quantiles),
        cmocka_unit_test(test_beta_schedule),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
