/* cli/sheet.c - one picture that shows many. */
#include "cli/cli.h"

#include <string.h>

ipt_status cli_sheet(ipt_ctx *ctx, const ipt_image *im, size_t n, ipt_image *out)
{
    enum { GAP = 4, WHITE = 255 };
    size_t cols = 1, w = (size_t)im[0].w, h = (size_t)im[0].h;
    while (cols * cols < n)
        cols++;
    size_t rows = (n + cols - 1) / cols, W = cols * (w + GAP) - GAP, H = rows * (h + GAP) - GAP;
    if (W > 65500 || H > 65500)
        return ipt_fail(ctx, IPT_ERR_ARG, "a sheet of %zu pictures would have %zu x %zu pixels", n,
                        W, H);
    uint8_t *rgb = ipt_calloc(ctx, W * H, 3);
    if (!rgb)
        return IPT_ERR_NOMEM;
    memset(rgb, WHITE, W * H * 3);
    for (size_t i = 0; i < n; i++)
        for (size_t y = 0; y < h; y++)
            memcpy(rgb + ((i / cols * (h + GAP) + y) * W + i % cols * (w + GAP)) * 3,
                   im[i].rgb + y * w * 3, w * 3);
    *out = (ipt_image){(int32_t)W, (int32_t)H, rgb};
    return IPT_OK;
}
