/* engine/image_stb.c - the only file that compiles stb_image, with the formats impasto.h names but
 * PNG, which image_png.c reads. The header is a system include, so that the house's warnings stay
 * out of it. */
#include "engine/image_internal.h"

#include <limits.h>
#include <stdlib.h>

/* Memory starts as zeros: some of the decoder's paths over damaged files read what nobody wrote. */
#define STBI_MALLOC(n) calloc(1, n)
#define STBI_REALLOC(p, n) realloc(p, n)
#define STBI_FREE(p) free(p)
/* Damaged files reach its assertions; what they guard is checked by image_check.c. */
#define STBI_ASSERT(x) ((void)0)
/* No STBI_NO_PSD: without PNG and PSD the stb of Debian 13 leaves out a function that its PNM
 * reader calls. Photoshop's files are refused by image_check.c. */
#define STB_IMAGE_STATIC
#define STBI_NO_STDIO
#define STBI_NO_PNG
#define STBI_NO_HDR
#define STBI_NO_LINEAR
#define STBI_NO_PIC
#define STBI_MAX_DIMENSIONS 65536
#define STB_IMAGE_IMPLEMENTATION
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wnull-dereference"
#endif
#include <stb_image.h>

bool ipt_stb_info(const uint8_t *d, size_t n, int *w, int *h, const char **why)
{
    int channels = 0;
    *why = "too large";
    if (n > INT_MAX)
        return false;
    if (stbi_info_from_memory(d, (int)n, w, h, &channels) && *w > 0 && *h != 0 && *h > INT_MIN) {
        *h = *h < 0 ? -*h : *h; /* a BMP whose top row comes first */
        return true;
    }
    *why = stbi_failure_reason() ? stbi_failure_reason() : "damaged";
    return false;
}

bool ipt_stb_decode(const uint8_t *d, size_t n, int *w, int *h, uint8_t **rgba, const char **why)
{
    int channels = 0;
    *rgba = stbi_load_from_memory(d, (int)n, w, h, &channels, 4);
    if (*rgba)
        return true;
    *why = stbi_failure_reason() ? stbi_failure_reason() : "damaged";
    return false;
}

void ipt_stb_free(uint8_t *rgba) { stbi_image_free(rgba); }
