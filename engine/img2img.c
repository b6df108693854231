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

/* Luma of a pixel, as PIL turns colours into "L" (ITU-R 601-2). */
static uint32_t luma(const uint8_t *rgb)
{
    return (rgb[0] * 19595U + rgb[1] * 38470U + rgb[2] * 7471U + 0x8000U) >> 16;
}

static ipt_status prepare_mask(const job *j)
{
    const ipt_settings *set = j->set;
    size_t h = (size_t)set->h, w = (size_t)set->w, width = (size_t)set->width,
           n = (size_t)set->height * width;
    ipt_image m = {0};
    IPT_TRY(resized(j, j->r->mask, &m));
    float *mask = ipt_arena_alloc(j->arena, h * w * sizeof *mask);
    bool *repaint = ipt_arena_alloc(j->arena, n * sizeof *repaint);
    for (size_t i = 0; mask && repaint && i < n; i++)
        repaint[i] = luma(m.rgb + i * 3) >= 128;
    for (size_t i = 0; mask && repaint && i < h * w;
         i++) { /* nearest, as diffusers shrinks masks */
        size_t y = i / w * ((size_t)set->height / h), x = i % w * (width / w);
        mask[i] = repaint[y * width + x] ? 1.0F : 0.0F;
    }
    ipt_image_finish(&m);
    j->out->mask = mask;
    j->out->repaint = repaint;
    return mask && repaint ? IPT_OK : IPT_ERR_NOMEM;
}

/* The encoder's distribution for the picture; `hide`: pixels that become mid grey, or NULL. */
static ipt_status encode_picture(const job *j, const bool *hide, ipt_encoding *out)
{
    const ipt_settings *set = j->set;
    ipt_image im = {0};
    size_t n = (size_t)set->width * (size_t)set->height;
    IPT_TRY(resized(j, j->r->init, &im));
    float *rgb = ipt_calloc(j->e->ctx, n * 3, sizeof *rgb);
    float **one[] = {&out->mean, &out->deviation, &out->latent};
    ipt_status status = rgb ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t i = 0; i < IPT_COUNT(one); i++)
        if (!(*one[i] = ipt_arena_alloc(j->arena, set->n * sizeof(float))))
            status = IPT_ERR_NOMEM;
    for (size_t i = 0; status == IPT_OK && i < n * 3; i++)
        rgb[i] = hide && hide[i / 3] ? 0.0F : (float)im.rgb[i] / 127.5F - 1.0F;
    if (status == IPT_OK)
        status = ipt_encode_image(j->e, rgb, set->height, set->width, out->mean, out->deviation);
    ipt_free(rgb);
    ipt_image_finish(&im);
    return status;
}

ipt_status ipt_start_prepare(ipt_engine *e, const ipt_request *r, const ipt_settings *set,
                             ipt_arena *arena, ipt_start *out)
{
    const job j = {e, r, set, arena, out};
    *out = (ipt_start){.mask_channels = e->m->config.unet.in_channels != set->channels};
    if (!r->init)
        return IPT_OK;
    if (r->mask)
        IPT_TRY(prepare_mask(&j));
    /* a model that is shown the masked picture starts from noise alone at strength 1 */
    if (!(out->mask_channels && set->skip == 0))
        IPT_TRY(encode_picture(&j, NULL, &out->picture));
    if (out->mask_channels)
        IPT_TRY(encode_picture(&j, out->repaint, &out->masked));
    return IPT_OK;
}

/* --- one picture ------------------------------------------------------------------------------ */
/* A sample of the encoder's distribution; what is not encoded is drawn and left. */
static void sample(const ipt_encoding *p, const ipt_vae_config *v, ipt_noise *source, size_t n,
                   float *fresh)
{
    ipt_noise_draw(source, fresh, n);
    for (size_t i = 0; p->mean && i < n; i++)
        p->latent[i] =
            (p->mean[i] + p->deviation[i] * fresh[i] - v->shift_factor) * v->scaling_factor;
}

void ipt_start_draw(const ipt_start *start, const ipt_engine *e, const ipt_sampler *s,
                    const ipt_settings *set, ipt_noise *source, float *fresh, float *noise,
                    float *x)
{
    const ipt_vae_config *v = &e->m->config.vae;
    /* The order is that of diffusers' pipelines: the picture's latent, the noise, the masked
     * picture's latent, which theirs draw for UNets of four channels too. */
    if (start->picture.mean)
        sample(&start->picture, v, source, set->n, fresh);
    ipt_noise_draw(source, noise, set->n);
    if (start->mask)
        sample(&start->masked, v, source, set->n, fresh);
    if (start->picture.mean && !(start->mask && set->skip == 0)) {
        ipt_sampler_add_noise(s, 0, start->picture.latent, noise, x);
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
    ipt_sampler_add_noise(s, i, start->picture.latent, noise, keep);
    for (size_t k = 0; k < set->n; k++)
        x[k] = start->mask[k % hw] * x[k] + (1.0F - start->mask[k % hw]) * keep[k];
}
