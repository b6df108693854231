/* engine/image_png.c - PNG files to pixels, by libpng: it inflates as many bytes as the picture has
 * rows for, whatever the file holds (stb_image inflates all of it: 2 GB from a file of 2 MB). */
#include "engine/image_internal.h"

#include <png.h>
#include <setjmp.h>
#include <string.h>

/* The state that survives a longjmp. */
typedef struct reader {
    png_structp png;
    png_infop info;
    uint8_t *rgba; /* [h,w,4] */
    size_t w, h;
    jmp_buf jump;
    char *why;
    size_t n_why;
} reader;

static void failed(png_structp png, png_const_charp why)
{
    reader *r = png_get_error_ptr(png);
    ipt_name(r->why, r->n_why, "%s", why);
    longjmp(r->jump, 1);
}

static void warned(png_structp png, png_const_charp why)
{
    (void)png;
    (void)why;
}

static void on_header(png_structp png, png_infop info)
{
    const reader *r = png_get_progressive_ptr(png);
    png_set_expand(png);
    png_set_strip_16(png);
    png_set_gray_to_rgb(png);
    png_set_add_alpha(png, 0xff, PNG_FILLER_AFTER);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    if (png_get_image_width(png, info) != r->w || png_get_image_height(png, info) != r->h ||
        png_get_rowbytes(png, info) != r->w * 4)
        png_error(png, "the header does not fit the rows");
}

static void on_row(png_structp png, png_bytep row, png_uint_32 y, int pass)
{
    reader *r = png_get_progressive_ptr(png);
    (void)pass;
    if (row && y < r->h)
        png_progressive_combine_row(png, r->rgba + (size_t)y * r->w * 4, row);
}

/* Everything that can jump. */
static bool decode(reader *r, const uint8_t *d, size_t n)
{
    if (setjmp(r->jump))
        return false;
    png_set_user_limits(r->png, IPT_IMAGE_MAX_SIDE, IPT_IMAGE_MAX_SIDE);
    /* Only what the pixels need: profiles and texts can be bombs of their own. */
    png_set_keep_unknown_chunks(r->png, PNG_HANDLE_CHUNK_NEVER, NULL, -1);
    png_set_chunk_malloc_max(r->png, 1 << 20);
    png_set_benign_errors(r->png, 0);
    /* The progressive reader stops behind the last row; the other one inflates all that follows. */
    png_set_progressive_read_fn(r->png, r, on_header, on_row, NULL);
    png_process_data(r->png, r->info, (png_bytep)(uintptr_t)d, n);
    bool adam7 = png_get_interlace_type(r->png, r->info) != PNG_INTERLACE_NONE;
    if (adam7 ? png_get_current_pass_number(r->png) < 7 : png_get_current_row_number(r->png) < r->h)
        png_error(r->png, "the picture data end too early");
    return true;
}

void ipt_png_info(const uint8_t *d, size_t n, int *w, int *h, bool *too_short)
{
    static const uint8_t channels[7] = {1, 0, 3, 1, 2, 0, 4}; /* of a colour type */
    *w = *h = 0;
    *too_short = true;
    if (n < 26)
        return;
    uint32_t side[2] = {0, 0};
    for (int i = 0; i < 8; i++)
        side[i / 4] = side[i / 4] << 8 | d[16 + i];
    if (side[0] > INT32_MAX || side[1] > INT32_MAX)
        return;
    *w = (int)side[0];
    *h = (int)side[1];
    uint64_t row = (uint64_t)side[0] * d[24] * channels[d[25] < 7 ? d[25] : 1];
    *too_short = (row + 7) / 8 * side[1] / 1032 > n;
}

ipt_status ipt_png_decode(ipt_ctx *ctx, const char *name, const uint8_t *d, size_t n, int w, int h,
                          uint8_t **rgba)
{
    char why[256] = "out of memory";
    reader *r = ipt_alloc(ctx, sizeof *r);
    uint8_t *out = r ? ipt_alloc(ctx, (size_t)w * (size_t)h * 4) : NULL;
    if (!out) {
        ipt_free(r);
        return IPT_ERR_NOMEM;
    }
    *r = (reader){.rgba = out, .w = (size_t)w, .h = (size_t)h, .why = why, .n_why = sizeof why};
    r->png = png_create_read_struct(PNG_LIBPNG_VER_STRING, r, failed, warned);
    r->info = r->png ? png_create_info_struct(r->png) : NULL;
    bool ok = r->info && decode(r, d, n);
    ipt_status status = IPT_OK;
    if (!r->info)
        status = ipt_fail(ctx, IPT_ERR_NOMEM, "%s: no memory for a PNG", name);
    else if (!ok)
        status = ipt_fail(ctx, IPT_ERR_FORMAT, "%s: damaged PNG: %s", name, why);
    png_destroy_read_struct(&r->png, &r->info, NULL);
    ipt_free(r);
    if (status == IPT_OK)
        *rgba = out;
    else
        ipt_free(out);
    return status;
}
