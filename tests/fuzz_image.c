/* tests/fuzz_image.c - libFuzzer target: any bytes as a picture, and what a request does with it:
 * its size chosen, resized, used as picture and as mask, pasted.  A finding is a crash, a leak, a
 * sanitizer report, a refusal without a message of one line, or more memory than the declared
 * pixels need: inputs are a few KiB here, so a bomb cannot reach the process's limit.
 *   fuzz_image -max_total_time=60 tests/data/image_fuzz */
#include <stdlib.h>
#include <string.h>

#include "engine/image_internal.h"
#include "engine/internal.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/allocator_interface.h>
#define COUNT_MEMORY 1
#endif
#endif

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* --- memory ----------------------------------------------------------------------------------- */
static size_t live, peak;

#ifdef COUNT_MEMORY
static void on_malloc(const volatile void *p, size_t n)
{
    (void)p;
    live += n;
    peak = live > peak ? live : peak;
}

static void on_free(const volatile void *p)
{
    size_t n = __sanitizer_get_allocated_size((const void *)(uintptr_t)p);
    live -= n < live ? n : live;
}
#endif

static void count_memory(void)
{
#ifdef COUNT_MEMORY
    static int installed;
    if (!installed)
        installed = __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
    if (!installed)
        abort();
#endif
    live = peak = 0;
}

/* What docs/ARCHITECTURE.md promises: 16 bytes a pixel and some for the decoder itself.  A decoder
 * works in whole blocks: sides count in steps of 32. */
static size_t allowance(ipt_ctx *ctx, const char *name, const uint8_t *data, size_t size)
{
    ipt_image_kind kind;
    int w = 0, h = 0;
    bool short_of = false;
    const char *why = "";
    size_t most = (size_t)2 << 20;
    if (ipt_image_check(ctx, name, data, size, &kind) != IPT_OK)
        return most;
    if (kind == IPT_IMAGE_PNG)
        ipt_png_info(data, size, &w, &h, &short_of);
    else if (!ipt_stb_info(data, size, &w, &h, &why))
        return most;
    if (short_of || w < 1 || h < 1 || (uint64_t)w * (uint64_t)h > IPT_IMAGE_MAX_PIXELS)
        return most;
    return most + 16 * ((size_t)w + 31) * ((size_t)h + 31);
}

/* --- inputs ----------------------------------------------------------------------------------- */
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

/* --- what a request does with it -------------------------------------------------------------- */
static void require(bool ok)
{
    if (!ok)
        abort();
}

/* As picture and as mask of one request, in the size that the engine chooses. */
static void paste(ipt_engine *e, const ipt_request *r, const ipt_settings *set)
{
    ipt_arena arena;
    ipt_paste p;
    size_t n = (size_t)set->width * (size_t)set->height;
    ipt_arena_init(&arena, e->ctx);
    bool *repaint = ipt_arena_alloc(&arena, n * sizeof *repaint);
    uint8_t *rgb = ipt_arena_alloc(&arena, n * 3);
    require(repaint && rgb);
    for (size_t i = 0; i < n; i++)
        repaint[i] = r->mask->rgb[i % ((size_t)r->mask->w * (size_t)r->mask->h) * 3] >= 128;
    memset(rgb, 77, n * 3);
    require(ipt_paste_prepare(e, r, set, repaint, &arena, &p) == IPT_OK);
    ipt_paste_apply(&p, n, rgb);
    for (size_t i = 0; i < n; i++) {
        require(p.alpha[i] >= 0 && p.alpha[i] <= 1);
        require(!repaint[i] || rgb[i * 3] == 77);
        require(p.alpha[i] > 0 || memcmp(rgb + i * 3, p.original + i * 3, 3) == 0);
    }
    ipt_arena_finish(&arena);
}

static void use(ipt_ctx *ctx, ipt_image *im)
{
    static const int32_t factors[] = {2, 4, 8, 1};
    ipt_model_config *c = ipt_alloc(ctx, sizeof *c);
    ipt_engine *e = ipt_alloc(ctx, sizeof *e);
    ipt_settings set;
    ipt_request r;
    require(c && e);
    e->ctx = ctx;
    ipt_request_init(&r);
    memset(&set, 0, sizeof set);
    int32_t f = factors[im->rgb[0] % IPT_COUNT(factors)];
    c->unet.sample_size = 64 / f;
    r.init = r.mask = im;
    if (im->rgb[1] % 3 == 1)
        r.width = f * (1 + im->rgb[2] % 8);
    if (ipt_size_choose(ctx, c, &r, f, &set.width, &set.height) == IPT_OK) {
        require(set.width % f == 0 && set.height % f == 0 && set.width >= f && set.height >= f);
        set.w = set.width / f;
        set.h = set.height / f;
        /* A picture of 1 x 9999 has sides in the thousands: right, but slow to blur here. */
        if ((int64_t)set.width * set.height <= 32768)
            paste(e, &r, &set);
    }
    require(ipt_image_resize(ctx, im, 7, 5) == IPT_OK && im->w == 7 && im->h == 5);
    require(ipt_image_resize(ctx, im, 16, 1) == IPT_OK);
    ipt_free(c);
    ipt_free(e);
}

static void load(const char *name, const uint8_t *data, size_t size)
{
    ipt_ctx *ctx = NULL;
    ipt_image im = {0};
    require(ipt_ctx_create(NULL, NULL, &ctx) == IPT_OK);
    size_t most = allowance(ctx, name, data, size);
    count_memory();
    ipt_status s = ipt_image_load_memory(ctx, name, data, size, &im);
    require(peak <= most);
    if (s != IPT_OK)
        require(strlen(ipt_last_error(ctx)) > 0 && !strchr(ipt_last_error(ctx), '\n'));
    else
        require(im.w >= 1 && im.h >= 1 && im.rgb);
    if (s == IPT_OK && (int64_t)im.w * im.h <= 4096)
        use(ctx, &im);
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
