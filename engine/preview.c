/* engine/preview.c - what a picture looks like before it is done: the predicted clean latent,
 * through a tiny VAE, or through a linear map from latent to colours that is fitted to the model's
 * own VAE. */
#include "engine/run.h"

#include "vae/vae.h"

#include <math.h>
#include <string.h>

enum { FIT_SIDE = 16, PATCH = 4, FIT_CELLS = FIT_SIDE * FIT_SIDE };

/* --- the map ---------------------------------------------------------------------------------- */
/* Patches of random latents, decoded: colours in -0.5..0.5 as means of what a latent cell becomes.
 */
static ipt_status decode_patches(ipt_engine *e, int32_t channels, float *latent, float *colour)
{
    int32_t f = ipt_vae_factor(&e->m->config.vae);
    size_t side = (size_t)f * FIT_SIDE, cells = FIT_CELLS;
    float *rgb = ipt_calloc(e->ctx, side * side * 3, sizeof *rgb);
    ipt_request r;
    uint64_t seed = 1;
    if (!rgb)
        return IPT_ERR_NOMEM;
    ipt_request_init(&r);
    for (int32_t c = 0; c < channels; c++)
        for (size_t y = 0; y < FIT_SIDE; y += PATCH)
            for (size_t x = 0; x < FIT_SIDE; x += PATCH) {
                float v = ipt_rng_normal(&seed);
                for (size_t k = 0; k < (size_t)PATCH * PATCH; k++)
                    latent[(size_t)c * cells + (y + k / PATCH) * FIT_SIDE + x + k % PATCH] = v;
            }
    ipt_status status = ipt_decode(e, &r, latent, FIT_SIDE, FIT_SIDE, rgb);
    for (size_t i = 0; i < side * side * 3; i++) {
        size_t px = i / 3, cell = px / side / (size_t)f * FIT_SIDE + px % side / (size_t)f;
        colour[cell * 3 + i % 3] += (rgb[i] - 0.5F) / (float)(f * f);
    }
    ipt_free(rgb);
    return status;
}

/* Solves a x = b for three right sides by Gauss's elimination; a [n][n], b [n][3]. */
static void solve(double *a, double *b, size_t n)
{
    for (size_t k = 0; k < n; k++)
        for (size_t i = 0; i < n; i++) {
            double q = i == k ? 0 : a[i * n + k] / a[k * n + k];
            for (size_t j = k; j < n && i != k; j++)
                a[i * n + j] -= q * a[k * n + j];
            for (size_t c = 0; c < 3 && i != k; c++)
                b[i * 3 + c] -= q * b[k * 3 + c];
        }
    for (size_t i = 0; i < n * 3; i++)
        b[i] /= a[i / 3 * n + i / 3];
}

/* The least squares of colour = sum of map[c] latent[c] + map[channels], a little towards 0, which
 * also keeps the elimination's pivots positive. */
static ipt_status fit(ipt_engine *e, ipt_preview_map *m)
{
    size_t n = (size_t)m->channels + 1;
    float *latent = ipt_calloc(e->ctx, (n - 1) * FIT_CELLS, sizeof *latent),
          *colour = ipt_calloc(e->ctx, (size_t)FIT_CELLS * 3, sizeof *colour);
    double *a = ipt_calloc(e->ctx, n * n + n * 3, sizeof *a), *b = a ? a + n * n : NULL;
    ipt_status status = latent && colour && a ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        status = decode_patches(e, m->channels, latent, colour);
    for (size_t cell = 0; status == IPT_OK && cell < FIT_CELLS; cell++)
        for (size_t i = 0; i < n; i++) {
            double vi = i < n - 1 ? (double)latent[i * FIT_CELLS + cell] : 1;
            for (size_t j = 0; j < n; j++)
                a[i * n + j] += vi * (j < n - 1 ? (double)latent[j * FIT_CELLS + cell] : 1);
            for (size_t c = 0; c < 3; c++)
                b[i * 3 + c] += vi * (double)colour[cell * 3 + c];
        }
    if (status == IPT_OK) {
        for (size_t i = 0; i < n; i++)
            a[i * n + i] += 1e-3 * FIT_CELLS;
        solve(a, b, n);
        for (size_t i = 0; i < n * 3; i++)
            m->value[i] = (float)b[i];
    }
    ipt_free(latent);
    ipt_free(colour);
    ipt_free(a);
    return status;
}

/* The map of the model that is loaded, fitted once. */
static ipt_status prepare_map(ipt_engine *e)
{
    ipt_preview_map *m = &e->m->preview;
    if (m->channels == 0) {
        ipt_preview_map made = {.channels = e->m->config.unet.out_channels};
        if (made.channels > IPT_PREVIEW_CHANNELS)
            return ipt_fail(e->ctx, IPT_ERR_UNSUPPORTED,
                            "previews of a latent of %d channels: expected at most %d",
                            made.channels, IPT_PREVIEW_CHANNELS);
        IPT_TRY(fit(e, &made));
        *m = made;
    }
    return IPT_OK;
}

static uint8_t byte_of(float v)
{
    v = v > 0.0F ? (v < 1.0F ? v : 1.0F) : 0.0F;
    return (uint8_t)lrintf(v * 255.0F);
}

static bool is_tiny(const ipt_engine *e) { return e->taesd || e->m->config.vae.tiny; }

ipt_status ipt_preview_fit(ipt_run *u)
{
    return u->r->preview && !is_tiny(u->e) ? prepare_map(u->e) : IPT_OK;
}

ipt_status ipt_preview_plan(ipt_run *u)
{
    return u->r->preview && is_tiny(u->e) ? ipt_decode_plan(u->e, u->r, u->set.h, u->set.w)
                                          : IPT_OK;
}

/* --- pictures --------------------------------------------------------------------------------- */
static ipt_status draw_map(ipt_run *u, const float *x0, ipt_image *im)
{
    const ipt_preview_map *m = &u->e->m->preview;
    size_t hw = (size_t)u->set.h * (size_t)u->set.w;
    const float *bias = m->value + (size_t)m->channels * 3;
    uint8_t *rgb = ipt_alloc(u->e->ctx, hw * 3);
    if (!rgb)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < hw * 3; i++) {
        float v = bias[i % 3] + 0.5F;
        for (size_t c = 0; c < (size_t)m->channels; c++)
            v += m->value[c * 3 + i % 3] * x0[c * hw + i / 3];
        rgb[i] = byte_of(v);
    }
    *im = (ipt_image){u->set.w, u->set.h, rgb};
    return IPT_OK;
}

static ipt_status draw_decoded(ipt_run *u, const float *x0, ipt_image *im)
{
    size_t n = (size_t)u->set.width * (size_t)u->set.height * 3;
    float *rgb = ipt_calloc(u->e->ctx, n, sizeof *rgb);
    ipt_status status = rgb ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        status = ipt_decode(u->e, u->r, x0, u->set.h, u->set.w, rgb);
    uint8_t *bytes = status == IPT_OK ? ipt_alloc(u->e->ctx, n) : NULL;
    for (size_t i = 0; bytes && i < n; i++)
        bytes[i] = byte_of(rgb[i]);
    ipt_free(rgb);
    if (status != IPT_OK || !bytes)
        return status == IPT_OK ? IPT_ERR_NOMEM : status;
    *im = (ipt_image){u->set.width, u->set.height, bytes};
    return IPT_OK;
}

ipt_status ipt_preview_show(ipt_run *u, const ipt_sampler *s, int32_t eval, int32_t image)
{
    const ipt_buffers *b = &u->buf;
    const ipt_request *r = u->r;
    int32_t done = ipt_sampler_step_of(s, eval) + 1, every = r->preview_every;
    if (!r->preview || !ipt_sampler_completes_step(s, eval) || (every > 1 && done % every != 0))
        return IPT_OK;
    ipt_image im = {0};
    ipt_sampler_predict_x0(s, eval, b->eps, b->x, b->x0);
    IPT_TRY(is_tiny(u->e) ? draw_decoded(u, b->x0, &im) : draw_map(u, b->x0, &im));
    const ipt_preview p = {
        .image = image, .step = done, .n_step = ipt_sampler_n_steps(s), .im = &im};
    ipt_status status = r->preview(r->user, &p);
    ipt_image_finish(&im);
    return status;
}
