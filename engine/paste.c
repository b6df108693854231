/* engine/paste.c - inpainting gives back what the mask protects: the picture's own pixels over what
 * the VAE made of them, with a soft edge around the repainted part. */
#include "engine/internal.h"

#include <math.h>
#include <string.h>

/* Gaussian of deviation sigma, cut at 2.5 sigma: one side with its centre, summing to 1 on both. */
enum { MAX_RADIUS = 64 };
typedef struct kernel {
    int32_t radius;
    float k[MAX_RADIUS + 1];
} kernel;

static kernel make_kernel(float sigma)
{
    kernel g = {.radius = (int32_t)(2.5F * sigma + 0.5F)};
    g.radius = g.radius > MAX_RADIUS ? MAX_RADIUS : g.radius;
    float sum = 0;
    for (int32_t i = 0; i <= g.radius; i++) {
        g.k[i] = expf(-0.5F * (float)(i * i) / (sigma * sigma));
        sum += i ? 2 * g.k[i] : g.k[i];
    }
    for (int32_t i = 0; i <= g.radius; i++)
        g.k[i] /= sum;
    return g;
}

/* dst = src blurred along one direction: n values `step` apart; the edge's value goes on outside.
 */
static void blur_line(const kernel *g, const float *src, float *dst, int32_t n, size_t step)
{
    for (int32_t i = 0; i < n; i++) {
        float sum = g->k[0] * src[(size_t)i * step];
        for (int32_t d = 1; d <= g->radius; d++) {
            int32_t lo = i > d ? i - d : 0, hi = i + d < n ? i + d : n - 1;
            sum += g->k[d] * (src[(size_t)lo * step] + src[(size_t)hi * step]);
        }
        dst[(size_t)i * step] = sum;
    }
}

ipt_status ipt_paste_edge(ipt_ctx *ctx, const bool *repaint, int32_t w, int32_t h, float sigma,
                          float *alpha)
{
    size_t n = (size_t)w * (size_t)h;
    float *rows = ipt_calloc(ctx, n, sizeof *rows);
    if (!rows)
        return IPT_ERR_NOMEM;
    const kernel g = make_kernel(sigma);
    for (size_t i = 0; i < n; i++)
        alpha[i] = repaint[i] ? 1.0F : 0.0F;
    for (int32_t y = 0; y < h; y++)
        blur_line(&g, alpha + (size_t)y * (size_t)w, rows + (size_t)y * (size_t)w, w, 1);
    for (int32_t x = 0; x < w; x++)
        blur_line(&g, rows + x, alpha + x, h, (size_t)w);
    /* Twice the blurred mask, as A1111 does: a straight edge is softened outside only. */
    for (size_t i = 0; i < n; i++)
        alpha[i] = repaint[i] ? 1.0F : fminf(2 * alpha[i], 1.0F);
    ipt_free(rows);
    return IPT_OK;
}

ipt_status ipt_paste_prepare(ipt_engine *e, const ipt_request *r, const ipt_settings *set,
                             const bool *repaint, ipt_arena *arena, ipt_paste *out)
{
    size_t n = (size_t)set->width * (size_t)set->height, bytes = 0;
    *out = (ipt_paste){0};
    if (!repaint || !r->init || r->no_paste)
        return IPT_OK;
    bool any = false;
    for (size_t i = 0; i < n && !any; i++)
        any = repaint[i];
    if (!any)
        ipt_log(e->ctx, IPT_LOG_WARN,
                "the mask is black everywhere: nothing is repainted (white is what changes)");
    ipt_image im = {r->init->w, r->init->h, NULL};
    bytes = (size_t)im.w * (size_t)im.h * 3;
    im.rgb = ipt_alloc(e->ctx, bytes);
    out->alpha = ipt_arena_alloc(arena, n * sizeof *out->alpha);
    uint8_t *own = ipt_arena_alloc(arena, n * 3);
    ipt_status status = im.rgb && out->alpha && own ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        memcpy(im.rgb, r->init->rgb, bytes);
    if (status == IPT_OK && (im.w != set->width || im.h != set->height))
        status = ipt_image_resize(e->ctx, &im, set->width, set->height);
    if (status == IPT_OK) {
        memcpy(own, im.rgb, n * 3);
        out->original = own;
        status = ipt_paste_edge(e->ctx, repaint, set->width, set->height, ipt_paste_sigma(set),
                                out->alpha);
    }
    ipt_image_finish(&im);
    return status;
}

float ipt_paste_sigma(const ipt_settings *set)
{
    int32_t f = set->width / set->w;
    return 0.5F * (float)f;
}

void ipt_paste_apply(const ipt_paste *p, size_t pixels, uint8_t *rgb)
{
    for (size_t i = 0; p->original && i < pixels * 3; i++) {
        float a = p->alpha[i / 3];
        if (a < 1.0F)
            rgb[i] = (uint8_t)lrintf(a * (float)rgb[i] + (1.0F - a) * (float)p->original[i]);
    }
}
