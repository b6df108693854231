/* engine/settings.c - what a request leaves open, from the model and its files; what cannot be,
 * refused. */
#include "engine/internal.h"

#include "vae/vae.h"

#include <jansson.h>
#include <math.h>
#include <string.h>

static ipt_status overlay_scheduler(ipt_ctx *ctx, ipt_arena *arena, const json_t *scheduler,
                                    ipt_settings *s)
{
    json_t *o = (json_t *)(uintptr_t)scheduler; /* jansson iterates over non-const objects only */
    for (void *it = json_object_iter(o); it; it = json_object_iter_next(o, it)) {
        const char *key = json_object_iter_key(it);
        const json_t *v = json_object_iter_value(it);
        if (json_is_boolean(v))
            IPT_TRY(ipt_sampler_config_set_bool(ctx, &s->config, key, json_is_true(v)));
        else if (json_is_number(v))
            IPT_TRY(ipt_sampler_config_set_num(ctx, &s->config, key, json_number_value(v)));
        else if (json_is_string(v) && key[0] != '_')
            IPT_TRY(ipt_sampler_config_set_str(ctx, &s->config, key, json_string_value(v)));
    }
    const json_t *betas = json_object_get(o, "trained_betas");
    size_t n = json_array_size(betas);
    if (n > 0) {
        float *b = ipt_arena_alloc(arena, n * sizeof *b);
        if (!b)
            return IPT_ERR_NOMEM;
        for (size_t i = 0; i < n; i++)
            b[i] = (float)json_number_value(json_array_get(betas, i));
        s->config.trained_betas = b;
        s->config.n_trained_betas = (int32_t)n;
    }
    return IPT_OK;
}

static ipt_status choose_sampler(const ipt_engine *e, const ipt_request *r, ipt_arena *arena,
                                 ipt_settings *s)
{
    ipt_ctx *ctx = e->ctx;
    const json_t *json = ipt_model_scheduler(e->m->model);
    const char *sampler = r->sampler && strcmp(r->sampler, "default") != 0 ? r->sampler : NULL;
    s->kind = IPT_SAMPLER_DPMPP_2M; /* single files name no scheduler: what their users take */
    s->schedule = IPT_SCHEDULE_DEFAULT;
    ipt_schedule asked = IPT_SCHEDULE_DEFAULT;
    if (sampler && ipt_sampler_read(sampler, &s->kind, &s->schedule) != IPT_NAME_KNOWN)
        return ipt_fail(ctx, IPT_ERR_ARG, "unknown sampler '%.80s'; there are: %s", sampler,
                        ipt_sampler_names());
    if (!sampler && json) {
        const char *name = ipt_json_str(json, "_class_name", "");
        if (!ipt_sampler_from_class(name, ipt_json_str(json, "algorithm_type", NULL), &s->kind))
            return ipt_fail(ctx, IPT_ERR_UNSUPPORTED,
                            "%s: scheduler %s is not known; choose one with --sampler",
                            ipt_model_path(e->m->model), name);
    }
    if (!sampler && !json && !r->schedule)
        s->schedule = IPT_SCHEDULE_KARRAS;
    if (r->schedule && ipt_schedule_read(r->schedule, &asked) != IPT_NAME_KNOWN)
        return ipt_fail(ctx, IPT_ERR_ARG, "unknown schedule '%.80s'; there are: %s", r->schedule,
                        ipt_schedule_names());
    if (asked != IPT_SCHEDULE_DEFAULT && s->schedule != IPT_SCHEDULE_DEFAULT &&
        asked != s->schedule)
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "sampler '%.80s' names the schedule %s, schedule '%.80s' another one; give "
                        "one of them",
                        sampler, ipt_schedule_name(s->schedule), r->schedule);
    if (asked != IPT_SCHEDULE_DEFAULT)
        s->schedule = asked;
    if (json) {
        ipt_sampler_config_default(s->kind, &s->config);
        IPT_TRY(overlay_scheduler(e->ctx, arena, json, s));
    } else {
        ipt_sampler_config_single_file(s->kind, &s->config);
        s->config.rescale_betas_zero_snr = e->m->config.zero_snr;
    }
    /* asked for by name, PNDM means PLMS as in every SD tool, without the Runge-Kutta start */
    bool prk_unsaid = s->kind == IPT_SAMPLER_PNDM && !json_object_get(json, "skip_prk_steps");
    s->is_unnamed = prk_unsaid && !sampler;
    if (prk_unsaid && sampler)
        s->config.skip_prk_steps = true;
    if (e->m->config.arch !=
        IPT_ARCH_SDXL) { /* diffusers' SD pipeline corrects old configurations so */
        s->config.steps_offset = 1;
        s->config.clip_sample = false;
    }
    if (!json || !json_object_get(json, "prediction_type"))
        s->config.prediction = e->m->config.prediction;
    if (r->prediction)
        IPT_TRY(ipt_sampler_config_set_str(ctx, &s->config, "prediction_type", r->prediction));
    s->config.ays_sdxl = e->m->config.arch == IPT_ARCH_SDXL;
    return IPT_OK;
}

ipt_status ipt_settings_sampler(ipt_ctx *ctx, const ipt_settings *s, ipt_sampler **out)
{
    const ipt_sampler_request q = {&s->config, s->kind, s->schedule, s->steps, s->skip, s->n};
    return ipt_sampler_create(ctx, &q, out);
}

static ipt_status choose_size(const ipt_engine *e, const ipt_request *r, ipt_settings *s)
{
    const ipt_model_config *c = &e->m->config;
    int32_t f = ipt_vae_factor(&c->vae);
    IPT_TRY(ipt_size_choose(e->ctx, c, r, f, &s->width, &s->height));
    s->w = s->width / f;
    s->h = s->height / f;
    s->channels = c->unet.out_channels;
    if (c->vae.latent_channels != s->channels)
        return ipt_fail(e->ctx, IPT_ERR_SHAPE,
                        "the unet gives %d latent channels, the vae takes %d", s->channels,
                        c->vae.latent_channels);
    if (c->unet.in_channels != s->channels && c->unet.in_channels != 2 * s->channels + 1)
        return ipt_fail(e->ctx, IPT_ERR_UNSUPPORTED,
                        "a unet with %d input channels is not supported (4 or 9)",
                        c->unet.in_channels);
    s->n = (size_t)s->channels * (size_t)s->h * (size_t)s->w;
    return IPT_OK;
}

/* What a picture loses without a word otherwise. */
static void warn_of_stretching(ipt_ctx *ctx, const ipt_request *r, const ipt_settings *s)
{
    const ipt_image *i = r->init, *m = r->mask;
    int32_t f = s->width / s->w;
    double grid = f;
    if (i && fabs((double)s->width * i->h / i->w - s->height) > grid &&
        fabs((double)s->height * i->w / i->h - s->width) > grid)
        ipt_log(ctx, IPT_LOG_WARN,
                "the picture of %d x %d is stretched to %d x %d; -W or -H alone keeps its shape",
                i->w, i->h, s->width, s->height);
    if (i && m && fabs((double)m->w * i->h / i->w - m->h) > 1 + 0.01 * m->h)
        ipt_log(ctx, IPT_LOG_WARN,
                "the mask of %d x %d has not the shape of the picture, %d x %d: it is stretched",
                m->w, m->h, i->w, i->h);
}

ipt_status ipt_settings_choose(const ipt_engine *e, const ipt_request *r, ipt_arena *arena,
                               ipt_settings *s)
{
    ipt_ctx *ctx = e->ctx;
    IPT_TRY(choose_sampler(e, r, arena, s));
    IPT_TRY(choose_size(e, r, s));
    bool few = s->kind == IPT_SAMPLER_LCM || s->kind == IPT_SAMPLER_TCD;
    s->steps = r->steps ? r->steps : few ? 4 : 20;
    s->count = r->count ? r->count : 1;
    if (s->steps < 1 || s->steps > s->config.num_train_timesteps)
        return ipt_fail(ctx, IPT_ERR_ARG, "%d steps: expected 1 to %d", s->steps,
                        s->config.num_train_timesteps);
    if (s->count < 1 || s->count > 10000)
        return ipt_fail(ctx, IPT_ERR_ARG, "%d pictures: expected 1 to 10000", s->count);
    s->cfg = isnan(r->cfg) ? (few ? 1.5 : 7.0) : r->cfg;
    if (!(s->cfg >= -100 && s->cfg <= 1000) || !(r->cfg_rescale >= 0 && r->cfg_rescale <= 1))
        return ipt_fail(ctx, IPT_ERR_ARG,
                        "guidance %g (expected -100 to 1000), rescale %g (0 to 1)", s->cfg,
                        r->cfg_rescale);
    if (r->clip_skip < 0 || r->clip_skip > 64)
        return ipt_fail(ctx, IPT_ERR_ARG, "clip skip %d: expected 0 to 64", r->clip_skip);
    s->lcm_guidance = e->m->config.unet.time_cond_dim > 0;
    s->two_rows = s->cfg > 1.0 && !s->lcm_guidance;
    const char *rng = r->rng ? r->rng : "torch-cpu";
    s->philox = strcmp(rng, "philox") == 0;
    if (!s->philox && strcmp(rng, "torch-cpu") != 0)
        return ipt_fail(ctx, IPT_ERR_ARG, "unknown noise source '%s'; there are: torch-cpu philox",
                        rng);
    bool inpaint_model = e->m->config.unet.in_channels != s->channels;
    if (r->mask && !r->init)
        return ipt_fail(ctx, IPT_ERR_ARG, "a mask needs a picture to change: give --init");
    if (inpaint_model && (!r->init || !r->mask))
        return ipt_fail(ctx, IPT_ERR_ARG, "%s is an inpainting model: give --init and --mask",
                        ipt_model_path(e->m->model));
    if (r->init) {
        s->strength = isnan(r->strength) ? (r->mask ? 1.0 : 0.75) : r->strength;
        IPT_TRY(ipt_sampler_skip(ctx, s->steps, s->strength, &s->skip));
        warn_of_stretching(ctx, r, s);
    }
    return IPT_OK;
}
