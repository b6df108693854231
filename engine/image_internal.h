/* engine/image_internal.h - between the image_*.c files. */
#ifndef IPT_ENGINE_IMAGE_INTERNAL_H
#define IPT_ENGINE_IMAGE_INTERNAL_H
#include "core/core.h"

typedef enum ipt_image_kind {
    IPT_IMAGE_PNG,
    IPT_IMAGE_JPEG,
    IPT_IMAGE_BMP,
    IPT_IMAGE_GIF,
    IPT_IMAGE_PNM,
    IPT_IMAGE_TGA,
} ipt_image_kind;

enum {
    IPT_IMAGE_MAX_PIXELS = 1 << 26,
    IPT_IMAGE_MAX_SIDE = 1 << 16,
    IPT_IMAGE_MAX_BYTES = 256 << 20,
    IPT_IMAGE_MAX_SCANS = 100 /* of a progressive JPEG: each one visits the whole picture */
};

/* Finds the format and walks its structure: a file that ends too early or whose parts do not fit
 * is refused here, because the decoder fills what is missing with zeros.  TGA has no mark of its
 * own: it is told by the ending of `name`.
 * Errors: IPT_ERR_FORMAT. */
IPT_CHECKED ipt_status ipt_image_check(ipt_ctx *ctx, const char *name, const uint8_t *d, size_t n,
                                       ipt_image_kind *kind);
/* EXIF orientation 1..8 of a checked JPEG or PNG; 1 when it has none. */
int ipt_image_orientation(const uint8_t *d, size_t n);

/* Size of a checked PNG and whether its file is too short for it (deflate packs 1032 : 1 at best).
 */
void ipt_png_info(const uint8_t *d, size_t n, int *w, int *h, bool *too_short);
/* Pixels of a checked PNG of w x h.  *rgba [h,w,4]: caller, ipt_free.  Errors: IPT_ERR_FORMAT,
 * IPT_ERR_NOMEM. */
IPT_CHECKED ipt_status ipt_png_decode(ipt_ctx *ctx, const char *name, const uint8_t *d, size_t n,
                                      int w, int h, uint8_t **rgba);
/* The decoder of the other formats (image_stb.c).  *rgba: [h,w,4], freed with ipt_stb_free.  *why:
 * reason of a failure, a static text. */
IPT_CHECKED bool ipt_stb_info(const uint8_t *d, size_t n, int *w, int *h, const char **why);
IPT_CHECKED bool ipt_stb_decode(const uint8_t *d, size_t n, int *w, int *h, uint8_t **rgba,
                                const char **why);
void ipt_stb_free(uint8_t *rgba);
#endif
