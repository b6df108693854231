/* engine/size.c - how large a picture is when the request leaves it open, and which size would do
 * when it asks for one that cannot be. */
#include "engine/image_internal.h"
#include "engine/internal.h"

#include <math.h>

enum { MAX_SIDE = 16384 };

/* The multiple of f nearest to v, from f to the largest side. */
static int32_t side_of(double v, int32_t f)
{
    double n = floor(v / f + 0.5), most = floor((double)MAX_SIDE / f);
    return (int32_t)(n < 1 ? 1 : n > most ? most : n) * f;
}

static void size_of_area(double aspect, double area, int32_t f, int32_t *w, int32_t *h)
{
    *w = side_of(sqrt(area * aspect), f);
    *h = side_of(sqrt(area / aspect), f);
}

void ipt_size_within(double aspect, double area, int32_t f, int32_t *w, int32_t *h)
{
    size_of_area(aspect, area, f, w, h);
    while ((double)*w * *h > area && (*w > f || *h > f)) { /* rounding came out above */
        int32_t *longer = *w >= *h ? w : h;
        *longer -= f;
    }
}

/* A picture that the model could have made itself stays as it is: nothing is lost to resampling. */
static bool is_models_own(const ipt_image *im, double native, int32_t f)
{
    double area = (double)im->w * im->h;
    return im->w % f == 0 && im->h % f == 0 && area >= native / 2 && area <= native * 2;
}

static void choose(const ipt_request *r, int32_t native, int32_t f, int32_t *w, int32_t *h)
{
    double aspect = r->init ? (double)r->init->w / r->init->h : 1;
    *w = r->width ? r->width : native;
    *h = r->height ? r->height : native;
    if (!r->init || (r->width && r->height))
        return;
    if (r->width)
        *h = side_of(r->width / aspect, f);
    else if (r->height)
        *w = side_of(r->height * aspect, f);
    else if (is_models_own(r->init, (double)native * native, f)) {
        *w = r->init->w;
        *h = r->init->h;
    } else {
        size_of_area(aspect, (double)native * native, f, w, h);
    }
}

ipt_status ipt_size_choose(ipt_ctx *ctx, const ipt_model_config *c, const ipt_request *r, int32_t f,
                           int32_t *width, int32_t *height)
{
    int32_t native = c->unet.sample_size * f, w = 0, h = 0, fit_w = 0, fit_h = 0;
    choose(r, native > 0 ? native : 512, f, &w, &h);
    bool on_grid = w > 0 && h > 0 && w % f == 0 && h % f == 0;
    double pixels = (double)w * h;
    if (on_grid && w <= MAX_SIDE && h <= MAX_SIDE && pixels <= IPT_IMAGE_MAX_PIXELS) {
        *width = w;
        *height = h;
        return IPT_OK;
    }
    fit_w = side_of(w, f);
    fit_h = side_of(h, f);
    if ((double)fit_w * fit_h > IPT_IMAGE_MAX_PIXELS)
        ipt_size_within((double)fit_w / fit_h, IPT_IMAGE_MAX_PIXELS, f, &fit_w, &fit_h);
    return ipt_fail(ctx, IPT_ERR_ARG,
                    "picture size %dx%d: sides must be multiples of %d, from %d to %d, with at "
                    "most %d pixels in all; -W %d -H %d would do",
                    w, h, f, f, MAX_SIDE, IPT_IMAGE_MAX_PIXELS, fit_w, fit_h);
}
