/* engine/img2img.c - where a picture starts: noise in the reference's order, the latent of the
 * given picture, what a mask keeps. */
#include "engine/internal.h"

#include <string.h>

/* --- noise ------------------------------------------------------------------------------------ */
void ipt_noise_seed(ipt_noise *s, uint64_t seed, bool philox)
{
    *s = (ipt_noise){.seed = seed, .philox = philox};
    ipt_rng_torch_seed(&s->torch, seed);
}

void ipt_noise_draw(ipt_noise *s, float *out, size_t n)
{
    if (s->philox)
        ipt_rng_philox_randn(s->seed, s->calls++, out, n);
    else
        ipt_rng_torch_randn(&s->torch, out, n);
}

/* --- before the first step -------------------------------------------------------------------- */
typedef struct job {
    ipt_engine *e;
    const ipt_request *r;
    const ipt_settings *set;
    ipt_arena *arena;
    ipt_start *out;
} job;

static ipt_status resized(const job *j, const ipt_image *im, ipt_image *out)
{
    size_t n = (size_t)im->w * (size_t)im->h * 3;
    *out = (ipt_image){im->w, im->h, ipt_alloc(j->e->ctx, n)};
    if (!out->rgb)
        return IPT_ERR_NOMEM;
    memcpy(out->rgb, im->rgb, n);
    ipt_status status = IPT_OK;
    if (im->w != j->set->width || im->h != j->set->height)
        status = ipt_image_resize(j->e->ctx, out, j->set->width, j->set->height);
    if (status != IPT_OK)
        ipt_image_finish(out);
    return status;
}

static ipt_status prepare_mask(const job *j)
{
    const ipt_settings *set = j->set;
    ipt_image m = {0};
    size_t hw = (size_t)set->h * (size_t)set->w;
    IPT_TRY(resized(j, j->r->mask, &m));
    float *mask = ipt_arena_alloc(j->arena, hw * sizeof *mask);
    if (mask)
        for (int32_t y = 0; y < set->h; y++)
            for (int32_t x = 0; x < set->w; x++) { /* nearest, as diffusers shrinks masks */
                size_t at = ((size_t)(y * (set->height / set->h)) * (size_t)set->width +
                             (size_t)(x * (set->width / set->w))) *
                            3;
                mask[(size_t)y * (size_t)set->w + (size_t)x] = m.rgb[at] >= 128 ? 1.0F : 0.0F;
            }
    ipt_image_finish(&m);
    j->out->mask = mask;
    return mask ? IPT_OK : IPT_ERR_NOMEM;
}

/* Latent statistics of the picture (masked: with the part to repaint in mid grey). */
static ipt_status encode_picture(const job *j, bool masked, float **mean, float **deviation)
{
    const ipt_settings *set = j->set;
    ipt_image im = {0};
    size_t n = (size_t)set->width * (size_t)set->height;
    IPT_TRY(resized(j, j->r->init, &im));
    float *rgb = ipt_calloc(j->e->ctx, n * 3, sizeof *rgb);
    *mean = ipt_arena_alloc(j->arena, set->n * sizeof(float));
    *deviation = ipt_arena_alloc(j->arena, set->n * sizeof(float));
    ipt_status status = rgb && *mean && *deviation ? IPT_OK : IPT_ERR_NOMEM;
    int32_t f = set->width / set->w;
    for (size_t i = 0; status == IPT_OK && i < n; i++) {
        size_t y = i / (size_t)set->width / (size_t)f, x = i % (size_t)set->width / (size_t)f;
        bool hide = masked && j->out->mask[y * (size_t)set->w + x] > 0.5F;
        for (size_t c = 0; c < 3; c++)
            rgb[i * 3 + c] = hide ? 0.0F : (float)im.rgb[i * 3 + c] / 127.5F - 1.0F;
    }
    if (status == IPT_OK)
        status = ipt_encode_image(j->e, rgb, set->height, set->width, *mean, *deviation);
    ipt_free(rgb);
    ipt_image_finish(&im);
    return status;
}

ipt_status ipt_start_prepare(ipt_engine *e, const ipt_request *r, const ipt_settings *set,
                             ipt_arena *arena, ipt_start *out)
{
    const job j = {e, r, set, arena, out};
    *out = (ipt_start){0};
    if (!r->init)
        return IPT_OK;
    if (r->mask)
        IPT_TRY(prepare_mask(&j));
    IPT_TRY(encode_picture(&j, false, &out->mean, &out->deviation));
    out->latent = ipt_arena_alloc(arena, set->n * sizeof(float));
    if (!out->latent)
        return IPT_ERR_NOMEM;
    if (e->config.unet.in_channels != set->channels) {
        float *unused = NULL;
        IPT_TRY(encode_picture(&j, true, &out->masked_latent, &unused));
        const ipt_vae_config *v = &e->config.vae;
        for (size_t i = 0; i < set->n; i++)
            out->masked_latent[i] = (out->masked_latent[i] - v->shift_factor) * v->scaling_factor;
    }
    return IPT_OK;
}

/* --- one picture ------------------------------------------------------------------------------ */
void ipt_start_draw(const ipt_start *start, const ipt_engine *e, const ipt_sampler *s,
                    const ipt_settings *set, ipt_noise *source, float *fresh, float *noise,
                    float *x)
{
    const ipt_vae_config *v = &e->config.vae;
    if (start->mean) { /* the picture's latent for one seed: a sample of its distribution */
        ipt_noise_draw(source, fresh, set->n);
        for (size_t i = 0; i < set->n; i++)
            start->latent[i] = (start->mean[i] + start->deviation[i] * fresh[i] - v->shift_factor) *
                               v->scaling_factor;
    }
    ipt_noise_draw(source, noise, set->n);
    if (start->mean && !(start->mask && set->skip == 0)) {
        ipt_sampler_add_noise(s, 0, start->latent, noise, x);
    } else {
        float sigma = (float)ipt_sampler_init_noise_sigma(s);
        for (size_t i = 0; i < set->n; i++)
            x[i] = noise[i] * sigma;
    }
}

void ipt_start_keep(const ipt_start *start, const ipt_sampler *s, int32_t i,
                    const ipt_settings *set, const float *noise, float *keep, float *x)
{
    size_t hw = (size_t)set->h * (size_t)set->w;
    ipt_sampler_add_noise(s, i, start->latent, noise, keep);
    for (size_t k = 0; k < set->n; k++)
        x[k] = start->mask[k % hw] * x[k] + (1.0F - start->mask[k % hw]) * keep[k];
}
