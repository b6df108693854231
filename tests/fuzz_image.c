/* tests/fuzz_image.c - libFuzzer target: any bytes as a picture.  A finding is a crash, a leak or a
 * sanitizer report; a refusal must carry a message of one line. */
#include "engine/impasto.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const names[] = {"fuzz.png", "fuzz.tga"};
    for (size_t i = 0; i < IPT_COUNT(names); i++) {
        ipt_ctx *ctx = NULL;
        ipt_image im = {0};
        if (ipt_ctx_create(NULL, NULL, &ctx) != IPT_OK)
            abort();
        ipt_status s = ipt_image_load_memory(ctx, names[i], data, size, &im);
        if (s != IPT_OK && (strlen(ipt_last_error(ctx)) == 0 || strchr(ipt_last_error(ctx), '\n')))
            abort();
        if (s == IPT_OK && (im.w < 1 || im.h < 1 || !im.rgb))
            abort();
        if (s == IPT_OK && (int64_t)im.w * im.h <= 4096 && ipt_image_resize(ctx, &im, 7, 5) != IPT_OK)
            abort();
        ipt_image_finish(&im);
        ipt_ctx_destroy(&ctx);
    }
    return 0;
}
