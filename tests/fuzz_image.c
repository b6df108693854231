/* tests/fuzz_image.c - libFuzzer target: any bytes as a picture.  A finding is a crash, a leak or a
 * sanitizer report; a refusal must carry a message of one line.
 *   fuzz_image -max_total_time=60 tests/data/image_fuzz */
#include "engine/impasto.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint32_t crc(const uint8_t *p, size_t n)
{
    uint32_t c = 0xffffffff;
    for (size_t i = 0; i < n; i++) {
        c ^= p[i];
        for (int k = 0; k < 8; k++)
            c = c >> 1 ^ (c & 1 ? 0xedb88320 : 0);
    }
    return ~c;
}

/* Makes the checksums of a PNG true, so that changed chunks reach the decoder. */
static void mend_png(uint8_t *d, size_t n)
{
    for (size_t at = 8; n > 12 && at <= n - 12;) {
        size_t len =
            (size_t)d[at] << 24 | (size_t)d[at + 1] << 16 | (size_t)d[at + 2] << 8 | d[at + 3];
        if (len > n - at - 12)
            return;
        uint32_t c = crc(d + at + 4, len + 4);
        for (int i = 0; i < 4; i++)
            d[at + 8 + len + (size_t)i] = (uint8_t)(c >> (24 - 8 * i));
        at += len + 12;
    }
}

static void load(const char *name, const uint8_t *data, size_t size)
{
    ipt_ctx *ctx = NULL;
    ipt_image im = {0};
    if (ipt_ctx_create(NULL, NULL, &ctx) != IPT_OK)
        abort();
    ipt_status s = ipt_image_load_memory(ctx, name, data, size, &im);
    if (s != IPT_OK && (strlen(ipt_last_error(ctx)) == 0 || strchr(ipt_last_error(ctx), '\n')))
        abort();
    if (s == IPT_OK && (im.w < 1 || im.h < 1 || !im.rgb))
        abort();
    if (s == IPT_OK && (int64_t)im.w * im.h <= 4096 && ipt_image_resize(ctx, &im, 7, 5) != IPT_OK)
        abort();
    ipt_image_finish(&im);
    ipt_ctx_destroy(&ctx);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    load("fuzz.tga", data, size);
    if (size > 8 && memcmp(data, "\x89PNG\r\n\x1a\n", 8) == 0) {
        uint8_t *copy = malloc(size);
        if (!copy)
            return 0;
        memcpy(copy, data, size);
        mend_png(copy, size);
        load("fuzz.png", copy, size);
        free(copy);
    }
    return 0;
}
