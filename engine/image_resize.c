/* engine/image_resize.c - Lanczos-3 in two passes over 8-bit values, columns first, then rows, with
 * 22 fractional bits.  The reference pipelines resize their inputs with Pillow's LANCZOS: the
 * result is the same bit by bit (Pillow 13 takes rows first for some sizes that only grow in one
 * direction). */
#include "engine/image_internal.h"
#include "engine/impasto.h"

#include <math.h>
#include <string.h>

enum { FRACTION = 22, LOBES = 3 };

/* Which source pixels make one target pixel. */
typedef struct tap {
    int32_t first, n;
} tap;

static double sinc(double x)
{
    const double pi = 3.14159265358979323846;
    return x == 0 ? 1 : sin(x * pi) / (x * pi);
}

static double lanczos(double x) { return x >= -LOBES && x < LOBES ? sinc(x) * sinc(x / LOBES) : 0; }

/* taps [to], k [to][*width]: fixed-point coefficients that sum to about 1 << FRACTION. */
static ipt_status make_taps(ipt_ctx *ctx, int32_t from, int32_t to, tap **taps, int32_t **k,
                            int32_t *width)
{
    double scale = (double)from / to, stretch = scale < 1 ? 1 : scale, support = LOBES * stretch;
    *width = (int32_t)ceil(support) * 2 + 1;
    double *row = ipt_calloc(ctx, (size_t)*width, sizeof *row);
    *taps = ipt_calloc(ctx, (size_t)to, sizeof **taps);
    *k = row && *taps ? ipt_calloc(ctx, (size_t)to * (size_t)*width, sizeof **k) : NULL;
    if (!*k) {
        ipt_free(row);
        ipt_free(*taps);
        return IPT_ERR_NOMEM;
    }
    for (int32_t i = 0; i < to; i++) {
        double centre = (i + 0.5) * scale, sum = 0;
        int32_t lo = (int32_t)(centre - support + 0.5), hi = (int32_t)(centre + support + 0.5);
        lo = lo < 0 ? 0 : lo;
        hi = hi > from ? from : hi;
        for (int32_t j = lo; j < hi; j++) {
            row[j - lo] = lanczos((j - centre + 0.5) / stretch);
            sum += row[j - lo];
        }
        (*taps)[i] = (tap){lo, hi - lo};
        for (int32_t j = 0; j < hi - lo; j++) {
            double v = (sum != 0 ? row[j] / sum : row[j]) * (1 << FRACTION);
            (*k)[(size_t)i * (size_t)*width + (size_t)j] = (int32_t)(v < 0 ? v - 0.5 : v + 0.5);
        }
    }
    ipt_free(row);
    return IPT_OK;
}

static uint8_t clip8(int64_t v)
{
    v >>= FRACTION;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

/* One pass: `lines` independent lines; element j of line l of src is at l * src_line + j *
 * src_step. */
typedef struct pass {
    int32_t from, to;
    size_t lines, src_line, src_step, dst_line, dst_step;
} pass;

static ipt_status run_pass(ipt_ctx *ctx, const pass *p, const uint8_t *src, uint8_t *dst)
{
    tap *taps = NULL;
    int32_t *k = NULL, width = 0;
    IPT_TRY(make_taps(ctx, p->from, p->to, &taps, &k, &width));
    for (size_t l = 0; l < p->lines; l++)
        for (int32_t i = 0; i < p->to; i++) {
            const int32_t *row = k + (size_t)i * (size_t)width;
            int64_t sum[3] = {1 << (FRACTION - 1), 1 << (FRACTION - 1), 1 << (FRACTION - 1)};
            for (int32_t j = 0; j < taps[i].n; j++) {
                const uint8_t *s =
                    src + l * p->src_line + (size_t)(taps[i].first + j) * p->src_step;
                for (int c = 0; c < 3; c++)
                    sum[c] += (int64_t)s[c] * row[j];
            }
            uint8_t *d = dst + l * p->dst_line + (size_t)i * p->dst_step;
            for (int c = 0; c < 3; c++)
                d[c] = clip8(sum[c]);
        }
    ipt_free(k);
    ipt_free(taps);
    return IPT_OK;
}

/* One pass of a whole picture, in place: to `w` columns, or else to `h` rows. */
static ipt_status resize_side(ipt_ctx *ctx, ipt_image *im, int32_t w, int32_t h)
{
    size_t sw = (size_t)im->w, sh = (size_t)im->h, dw = (size_t)w, dh = (size_t)h;
    if (w == im->w && h == im->h)
        return IPT_OK;
    pass p = w != im->w ? (pass){im->w, w, sh, sw * 3, 3, dw * 3, 3}
                        : (pass){im->h, h, dw, 3, dw * 3, 3, dw * 3};
    uint8_t *out = ipt_alloc(ctx, dw * dh * 3);
    ipt_status status = out ? run_pass(ctx, &p, im->rgb, out) : IPT_ERR_NOMEM;
    if (status != IPT_OK) {
        ipt_free(out);
        return status;
    }
    ipt_free(im->rgb);
    *im = (ipt_image){w, h, out};
    return IPT_OK;
}

ipt_status ipt_image_resize(ipt_ctx *ctx, ipt_image *im, int32_t w, int32_t h)
{
    if (w < 1 || h < 1 || (int64_t)w * h > IPT_IMAGE_MAX_PIXELS)
        return ipt_fail(ctx, IPT_ERR_ARG, "cannot resize a picture to %d x %d", w, h);
    /* Columns first, unless that takes more than either picture: 1 x 65536 to 16384 x 8. */
    if ((int64_t)w * im->h > IPT_IMAGE_MAX_PIXELS)
        IPT_TRY(resize_side(ctx, im, im->w, h));
    IPT_TRY(resize_side(ctx, im, w, im->h));
    return resize_side(ctx, im, w, h);
}
