/* engine/image.c - pictures from files and memory: checks, decoding, transparency, orientation. */
#include "engine/image_internal.h"
#include "engine/impasto.h"

#include <limits.h>
#include <string.h>

void ipt_image_finish(ipt_image *im)
{
    if (!im)
        return;
    ipt_free(im->rgb);
    memset(im, 0, sizeof *im);
}

static uint8_t over_white(uint32_t v, uint32_t alpha)
{
    return (uint8_t)((v * alpha + 255 * (255 - alpha) + 127) / 255);
}

/* Source pixel of pixel (x, y) of the upright picture.  EXIF 2.3 orientation: 2 mirrored, 3 turned
 * by 180 degrees, 4 upside down, 5..8 the same with rows and columns exchanged. */
static size_t source_pixel(int orientation, size_t w, size_t h, size_t x, size_t y)
{
    switch (orientation) { /* w, h: of the stored picture */
    case 2:
        return y * w + (w - 1 - x);
    case 3:
        return (h - 1 - y) * w + (w - 1 - x);
    case 4:
        return (h - 1 - y) * w + x;
    case 5:
        return x * w + y;
    case 6:
        return (h - 1 - x) * w + y;
    case 7:
        return (h - 1 - x) * w + (w - 1 - y);
    case 8:
        return x * w + (w - 1 - y);
    default:
        return y * w + x;
    }
}

/* Transparency over white, orientation undone. */
static ipt_status upright(ipt_ctx *ctx, const uint8_t *rgba, int w, int h, int orientation,
                          ipt_image *out)
{
    bool turned = orientation >= 5;
    size_t ow = (size_t)(turned ? h : w), oh = (size_t)(turned ? w : h);
    uint8_t *rgb = ipt_alloc(ctx, ow * oh * 3);
    if (!rgb)
        return IPT_ERR_NOMEM;
    for (size_t y = 0; y < oh; y++)
        for (size_t x = 0; x < ow; x++) {
            const uint8_t *s = rgba + 4 * source_pixel(orientation, (size_t)w, (size_t)h, x, y);
            for (size_t c = 0; c < 3; c++)
                rgb[(y * ow + x) * 3 + c] = over_white(s[c], s[3]);
        }
    *out = (ipt_image){.w = (int32_t)ow, .h = (int32_t)oh, .rgb = rgb};
    return IPT_OK;
}

/* Size as the header has it, and that the file can hold so many pixels. */
static ipt_status measure(ipt_ctx *ctx, const char *name, ipt_image_kind kind, const uint8_t *d,
                          size_t n, int *w, int *h)
{
    const char *why = "";
    bool too_short = false;
    if (kind == IPT_IMAGE_PNG)
        ipt_png_info(d, n, w, h, &too_short);
    else if (!ipt_stb_info(d, n, w, h, &why))
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: cannot read this picture: %s", name, why);
    uint64_t pixels = (uint64_t)*w * (uint64_t)*h;
    if (*w < 1 || *h < 1 || pixels > IPT_IMAGE_MAX_PIXELS || *w > IPT_IMAGE_MAX_SIDE ||
        *h > IPT_IMAGE_MAX_SIDE)
        return ipt_fail(ctx, IPT_ERR_FORMAT,
                        "%s: found %d x %d pixels, expected 1 to %d a side and at most %d in all",
                        name, *w, *h, IPT_IMAGE_MAX_SIDE, IPT_IMAGE_MAX_PIXELS);
    /* No other format packs more than about 1,800 pixels into a byte (GIF's longest codes). */
    if (kind != IPT_IMAGE_PNG)
        too_short = pixels / 2048 > n;
    return too_short ? ipt_fail(ctx, IPT_ERR_FORMAT,
                                "%s: found %zu bytes, too few for %d x %d pixels", name, n, *w, *h)
                     : IPT_OK;
}

ipt_status ipt_image_load_memory(ipt_ctx *ctx, const char *name, const void *data, size_t n,
                                 ipt_image *out)
{
    ipt_image_kind kind;
    const char *why = "";
    uint8_t *rgba = NULL;
    int w = 0, h = 0;
    if (n > IPT_IMAGE_MAX_BYTES)
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: %zu bytes, expected at most %d", name, n,
                        IPT_IMAGE_MAX_BYTES);
    IPT_TRY(ipt_image_check(ctx, name, data, n, &kind));
    IPT_TRY(measure(ctx, name, kind, data, n, &w, &h));
    if (kind == IPT_IMAGE_PNG) {
        IPT_TRY(ipt_png_decode(ctx, name, data, n, w, h, &rgba));
    } else if (!ipt_stb_decode(data, n, &w, &h, &rgba, &why)) {
        if (strcmp(why, "outofmem") == 0)
            return ipt_fail(ctx, IPT_ERR_NOMEM, "%s: no memory for %d x %d pixels", name, w, h);
        return ipt_fail(ctx, IPT_ERR_FORMAT, "%s: damaged picture: %s", name, why);
    }
    ipt_status status = upright(ctx, rgba, w, h, ipt_image_orientation(data, n), out);
    if (kind == IPT_IMAGE_PNG)
        ipt_free(rgba);
    else
        ipt_stb_free(rgba);
    return status;
}

ipt_status ipt_image_load(ipt_ctx *ctx, const char *path, ipt_image *out)
{
    char *data = NULL;
    size_t n = 0;
    IPT_TRY(ipt_file_read(ctx, path, IPT_IMAGE_MAX_BYTES, &data, &n));
    ipt_status status = ipt_image_load_memory(ctx, path, data, n, out);
    ipt_free(data);
    return status;
}
