/* engine/latent.c - pictures to latents and back, whole or in overlapping tiles. */
#include "engine/internal.h"

#include "vae/vae.h"

#include <math.h>
#include <string.h>

/* The VAE computes in f32 where the model says so (SDXL's overflows in f16), else as the UNet. */
static ipt_dtype vae_act(const ipt_engine *e)
{
    return e->m->config.vae.force_upcast || e->m->config.arch == IPT_ARCH_SDXL ? IPT_F32
                                                                               : e->m->act_type;
}

static ipt_status decode_plan(ipt_engine *e, int32_t h, int32_t w, ipt_plan **out)
{
    const ipt_plan_key key = {.kind = IPT_PLAN_DECODE,
                              .model = e->taesd ? e->taesd_id : e->m->id,
                              .vae = {h, w, vae_act(e), e->taesd || e->m->config.vae.tiny}};
    return ipt_plan_get(e, &key, 0, out);
}

/* Decodes z [h,w,C] (channels last) to rgb [fh,fw,3] in 0..1. */
static ipt_status decode_whole(ipt_engine *e, const float *z, int32_t h, int32_t w, float *rgb)
{
    ipt_plan *plan = NULL;
    size_t c = (size_t)e->m->config.unet.out_channels,
           f = (size_t)ipt_vae_factor(&e->m->config.vae);
    size_t n = (size_t)h * (size_t)w * f * f * 3;
    bool tiny = e->taesd || e->m->config.vae.tiny;
    IPT_TRY(decode_plan(e, h, w, &plan));
    IPT_TRY(ipt_plan_write(plan, "z", z, (size_t)h * (size_t)w * c * sizeof *z));
    IPT_TRY(ipt_plan_run(plan, 0));
    IPT_TRY(ipt_plan_read(plan, "rgb", rgb, n * sizeof *rgb));
    for (size_t i = 0; i < n; i++) {
        float v = tiny ? rgb[i] : rgb[i] * 0.5F + 0.5F;
        rgb[i] = v > 0.0F ? (v < 1.0F ? v : 1.0F) : 0.0F; /* NaN becomes 0 */
    }
    return IPT_OK;
}

/* Weight of a pixel at distance `i` from the start of a tile of `n` that overlaps its neighbours by
 * `overlap`: linear ramps at the sides that have a neighbour. */
static float ramp(int32_t i, int32_t n, int32_t overlap, bool before, bool after)
{
    float w = 1.0F;
    if (before && i < overlap)
        w = ((float)i + 0.5F) / (float)overlap;
    if (after && n - 1 - i < overlap) {
        float v = ((float)(n - 1 - i) + 0.5F) / (float)overlap;
        w = v < w ? v : w;
    }
    return w;
}

typedef struct tile {
    int32_t y, x, h, w; /* latent pixels */
} tile;

static void blend_tile(const tile *t, const float *part, int32_t f, int32_t overlap, int32_t h,
                       int32_t w, float *rgb, float *sum)
{
    int32_t th = t->h * f, tw = t->w * f, o = overlap * f;
    for (int32_t y = 0; y < th; y++)
        for (int32_t x = 0; x < tw; x++) {
            float k = ramp(y, th, o, t->y > 0, t->y + t->h < h) *
                      ramp(x, tw, o, t->x > 0, t->x + t->w < w);
            size_t at = (size_t)(t->y * f + y) * (size_t)(w * f) + (size_t)(t->x * f + x);
            for (size_t c = 0; c < 3; c++)
                rgb[at * 3 + c] += k * part[((size_t)y * (size_t)tw + (size_t)x) * 3 + c];
            sum[at] += k;
        }
}

static ipt_status decode_tiled(ipt_engine *e, const float *z, int32_t h, int32_t w, int32_t side,
                               float *rgb)
{
    int32_t f = ipt_vae_factor(&e->m->config.vae), overlap = side / 4 > 0 ? side / 4 : 1,
            step = side - overlap > 0 ? side - overlap : 1;
    size_t c = (size_t)e->m->config.unet.out_channels, n = (size_t)h * (size_t)w * (size_t)(f * f);
    size_t area = (size_t)side * (size_t)side;
    float *part = ipt_calloc(e->ctx, area * (size_t)(f * f) * 3, sizeof *part);
    float *in = ipt_calloc(e->ctx, area * c, sizeof *in), *sum = ipt_calloc(e->ctx, n, sizeof *sum);
    ipt_status status = part && in && sum ? IPT_OK : IPT_ERR_NOMEM;
    memset(rgb, 0, n * 3 * sizeof *rgb);
    for (int32_t y = 0; status == IPT_OK; y += step) {
        tile t = {.y = y + side < h ? y : (h > side ? h - side : 0), .h = side < h ? side : h};
        for (int32_t x = 0; status == IPT_OK; x += step) {
            t.x = x + side < w ? x : (w > side ? w - side : 0);
            t.w = side < w ? side : w;
            for (int32_t i = 0; i < t.h; i++)
                memcpy(in + (size_t)(i * t.w) * c,
                       z + ((size_t)(t.y + i) * (size_t)w + (size_t)t.x) * c,
                       (size_t)t.w * c * sizeof *in);
            status = decode_whole(e, in, t.h, t.w, part);
            if (status == IPT_OK)
                blend_tile(&t, part, f, overlap, h, w, rgb, sum);
            if (t.x + t.w >= w)
                break;
        }
        if (t.y + t.h >= h)
            break;
    }
    for (size_t i = 0; status == IPT_OK && i < n * 3; i++)
        rgb[i] /= sum[i / 3];
    ipt_free(part);
    ipt_free(in);
    ipt_free(sum);
    return status;
}

enum { AUTO_TILE = 512, AUTO_WHOLE = 1024 * 1024 }; /* pixels */
enum { MIN_TILE = 16 };                             /* latent pixels */

/* In tiles of `side` latent pixels, or of half as many again and again while they are too large. */
static ipt_status decode_fitting(ipt_engine *e, const float *z, int32_t h, int32_t w, int32_t side,
                                 float *rgb)
{
    ipt_status status = decode_tiled(e, z, h, w, side, rgb);
    for (; ipt_too_large(status) && side / 2 >= MIN_TILE;
         status = decode_tiled(e, z, h, w, side, rgb)) {
        side /= 2;
        ipt_log(e->ctx, IPT_LOG_WARN,
                "a tile does not fit the device: decoding in tiles of %d pixels",
                side * ipt_vae_factor(&e->m->config.vae));
    }
    return status;
}

/* The decoder's 3x3 convolutions and its attention; a tiny decoder's: one block of three and an
 * upsampler a level. */
double ipt_decode_macs(const ipt_engine *e, int32_t h, int32_t w)
{
    const ipt_vae_config *v = e->taesd ? &ipt_model_get_config(e->taesd)->vae : &e->m->config.vae;
    double px = (double)h * (double)w, top = v->channels[v->n_level - 1], before = top, macs = 0;
    if (!v->tiny) /* two resnets; four projections, scores and their sum */
        macs = px * (4 * 9 * top * top + 4 * top * top + 2 * px * top);
    for (int32_t i = v->n_level - 1; i >= 0; i--) {
        double c = v->channels[i], blocks = v->n_layer + (v->tiny ? 0 : 1);
        macs += px * 9 * (v->tiny ? 3 * blocks * c * c : before * c + (2 * blocks - 1) * c * c);
        if (i > 0) {
            px *= 4;
            macs += px * 9 * c * c;
        }
        before = c;
    }
    return macs;
}

/* Whether a latent is decoded at once; else in tiles of *side latent pixels. */
static bool is_whole(const ipt_engine *e, const ipt_request *r, int32_t h, int32_t w, int32_t *side)
{
    const int32_t f = ipt_vae_factor(&e->m->config.vae), longer = h > w ? h : w,
                  asked = r->vae_tile > 0 ? r->vae_tile / f : AUTO_TILE / f;
    *side = asked > 8 ? asked : 8;
    return r->vae_tile < 0 || longer <= asked ||
           (r->vae_tile == 0 && (size_t)h * (size_t)w * (size_t)(f * f) <= AUTO_WHOLE);
}

ipt_status ipt_decode_plan(ipt_engine *e, const ipt_request *r, int32_t h, int32_t w)
{
    ipt_plan *plan = NULL;
    int32_t side = 0;
    bool whole = is_whole(e, r, h, w, &side);
    return whole ? decode_plan(e, h, w, &plan)
                 : decode_plan(e, side < h ? side : h, side < w ? side : w, &plan);
}

ipt_status ipt_decode(ipt_engine *e, const ipt_request *r, const float *latent, int32_t h,
                      int32_t w, float *rgb)
{
    size_t c = (size_t)e->m->config.unet.out_channels, hw = (size_t)h * (size_t)w;
    const ipt_vae_config *v = &e->m->config.vae;
    float *z = ipt_calloc(e->ctx, hw * c, sizeof *z);
    if (!z)
        return IPT_ERR_NOMEM;
    for (size_t k = 0; k < c; k++)
        for (size_t i = 0; i < hw; i++)
            z[i * c + k] = e->taesd || v->tiny
                               ? latent[k * hw + i]
                               : latent[k * hw + i] / v->scaling_factor + v->shift_factor;
    int32_t f = ipt_vae_factor(v), side = 0, longer = h > w ? h : w;
    bool whole = is_whole(e, r, h, w, &side);
    ipt_status status = whole ? decode_whole(e, z, h, w, rgb) : IPT_OK;
    if (whole && ipt_too_large(status) && r->vae_tile < 0) {
        char why[800];
        ipt_name(why, sizeof why, "%s", ipt_last_error(e->ctx));
        status = ipt_fail(e->ctx, status,
                          "the picture cannot be decoded whole, --vae-tile auto "
                          "decodes it in tiles (%s)",
                          why);
    } else if (!whole || (ipt_too_large(status) && longer > MIN_TILE)) {
        if (longer <= side)
            side = longer / 2;
        if (whole)
            ipt_log(e->ctx, IPT_LOG_WARN,
                    "the picture does not fit the device at once: decoding in tiles of %d pixels",
                    side * f);
        status = decode_fitting(e, z, h, w, side, rgb);
    }
    ipt_free(z);
    return status;
}

/* --- pictures to latents ---------------------------------------------------------------------- */
static ipt_plan_key encode_key(const ipt_engine *e, int32_t width, int32_t height)
{
    const int32_t f = ipt_vae_factor(&e->m->config.vae);
    return (ipt_plan_key){.kind = IPT_PLAN_ENCODE,
                          .model = e->m->id,
                          .vae = {.h = height / f, .w = width / f, .act = vae_act(e)}};
}

static ipt_status encode_fits(ipt_engine *e, const ipt_plan_key *failed, int32_t width,
                              int32_t height)
{
    const ipt_plan_key key = encode_key(e, width, height);
    (void)failed;
    return ipt_plan_dry(e, &key);
}

ipt_status ipt_encode_image(ipt_engine *e, const float *rgb, int32_t H, int32_t W, float *mean,
                            float *deviation)
{
    ipt_plan *plan = NULL;
    int32_t f = ipt_vae_factor(&e->m->config.vae);
    size_t c = (size_t)e->m->config.vae.latent_channels, hw = (size_t)(H / f) * (size_t)(W / f);
    if (e->m->config.vae.tiny)
        return ipt_fail(e->ctx, IPT_ERR_UNSUPPORTED,
                        "the model's tiny VAE cannot encode pictures; give one with --vae");
    const ipt_plan_key key = encode_key(e, W, H);
    ipt_status status = ipt_plan_get(e, &key, 0, &plan);
    if (ipt_too_large(status))
        return ipt_fit_advise(e, status, &key, W, H, encode_fits);
    IPT_TRY(status);
    float *m = ipt_calloc(e->ctx, hw * 2 * c, sizeof *m);
    if (!m)
        return IPT_ERR_NOMEM;
    status = ipt_plan_write(plan, "picture", rgb, (size_t)H * (size_t)W * 3 * sizeof *rgb);
    if (status == IPT_OK)
        status = ipt_plan_run(plan, 0);
    if (status == IPT_OK)
        status = ipt_plan_read(plan, "moments", m, hw * 2 * c * sizeof *m);
    for (size_t i = 0; status == IPT_OK && i < hw; i++)
        for (size_t k = 0; k < c; k++) {
            float lv = m[i * 2 * c + c + k];
            lv = lv < -30.0F  ? -30.0F
                 : lv > 20.0F ? 20.0F
                              : lv; /* diffusers DiagonalGaussianDistribution */
            mean[k * hw + i] = m[i * 2 * c + k];
            deviation[k * hw + i] = expf(0.5F * lv);
        }
    ipt_free(m);
    return status;
}
