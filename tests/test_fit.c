/* tests/test_fit.c - requests that pass what the device holds: the UNet's batch is halved, the VAE
 * goes over to tiles, and a real limit is one sentence with the size that fits.  The device is made
 * small (ipt_gpu_limit_traits, vram_limit) instead of the picture large. */
#include "tests/golden.h"

#include "engine/internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct fixture {
    ipt_ctx *ctx;
    ipt_engine *engine;
    ipt_gpu *gpu;
    ipt_traits full;
    char model[512];
    uint8_t *rgb; /* of the last picture */
    size_t bytes;
} fixture;

static fixture open_engine(uint64_t vram_limit)
{
    fixture f = {0};
    assert_int_equal(ipt_ctx_create(NULL, NULL, &f.ctx), IPT_OK);
    f.engine = test_engine(&f.ctx, IPT_PRECISION_F32, vram_limit);
    f.gpu = ipt_engine_gpu(f.engine);
    f.full = *ipt_gpu_traits(f.gpu);
    ipt_name(f.model, sizeof f.model, "%s/models/sd1", IPT_TEST_DATA);
    return f;
}

static void close_engine(fixture *f)
{
    ipt_free(f->rgb);
    test_engine_done(&f->engine, &f->ctx);
}

static void limit_binding(fixture *f, uint64_t bytes)
{
    ipt_traits t = f->full;
    t.max_range = bytes ? bytes : t.max_range;
    ipt_gpu_limit_traits(f->gpu, &t);
    ipt_plans_drop(f->engine, 0);
}

static ipt_status keep_picture(void *user, int32_t index, const ipt_image *im, const char *text,
                               const char *json)
{
    fixture *f = user;
    (void)index, (void)text, (void)json;
    ipt_free(f->rgb);
    f->bytes = (size_t)im->w * (size_t)im->h * 3;
    f->rgb = ipt_alloc(f->ctx, f->bytes);
    if (!f->rgb)
        return IPT_ERR_NOMEM;
    memcpy(f->rgb, im->rgb, f->bytes);
    return IPT_OK;
}

static ipt_status draw(fixture *f, int32_t width, int32_t height, int32_t batch)
{
    ipt_request r;
    ipt_request_init(&r);
    r.model = f->model;
    r.prompt = "a red circle";
    r.steps = 1;
    r.cfg = 7;
    r.width = width;
    r.height = height;
    r.batch = batch;
    return ipt_generate(f->engine, &r, keep_picture, f, NULL);
}

/* The size that the message names. */
static void named_size(fixture *f, int32_t *w, int32_t *h)
{
    const char *at = strstr(ipt_last_error(f->ctx), "-W ");
    if (!at || sscanf(at, "-W %d -H %d", w, h) != 2)
        fail_msg("no size in '%s'", ipt_last_error(f->ctx));
}

/* 32 x 32 latent pixels, 8 heads: the statistics of attention are 32 KiB a row of the batch. */
static void batch_is_halved(void **state)
{
    (void)state;
    fixture f = open_engine(0);
    assert_ok(f.ctx, draw(&f, 64, 64, 0));
    assert_int_equal(ipt_plan_latest(f.engine, IPT_PLAN_UNET)->unet.batch, 2);
    uint8_t *whole = f.rgb;
    f.rgb = NULL;
    for (int32_t asked = 0; asked <= 2; asked += 2) {
        limit_binding(&f, 50 << 10);
        assert_ok(f.ctx, draw(&f, 64, 64, asked));
        assert_int_equal(ipt_plan_latest(f.engine, IPT_PLAN_UNET)->unet.batch, 1);
        for (size_t i = 0; i < f.bytes; i++)
            if (abs(whole[i] - f.rgb[i]) > 1)
                fail_msg("byte %zu: %d in one batch, %d in two", i, whole[i], f.rgb[i]);
    }
    ipt_free(whole);
    close_engine(&f);
}

/* The first limit of some at which the size is refused and another fits.  Tiles for GPUs keep more
 * of attention in one binding than rows for CPUs do, and GPUs align what is bound. */
static void limit_to_a_size(fixture *f, int32_t w, int32_t h)
{
    static const uint64_t limit[] = {12 << 10, 16 << 10, 20 << 10, 25 << 10,
                                     28 << 10, 32 << 10, 36 << 10, 44 << 10};
    for (size_t i = 0; i < IPT_COUNT(limit); i++) {
        limit_binding(f, limit[i]);
        assert_int_equal(draw(f, w, h, 0), IPT_ERR_TOO_LARGE);
        if (strstr(ipt_last_error(f->ctx), "-W "))
            return;
    }
    fail_msg("no limit at which a size fits: %s", ipt_last_error(f->ctx));
}

static void fitting_size_is_named(void **state)
{
    static const int32_t size[][2] = {{64, 64}, {48, 88}};
    (void)state;
    fixture f = open_engine(0);
    for (size_t i = 0; i < IPT_COUNT(size); i++) {
        int32_t w = 0, h = 0, from = 0, to = 0;
        limit_to_a_size(&f, size[i][0], size[i][1]);
        named_size(&f, &w, &h);
        assert_true(w < size[i][0] && h < size[i][1]);
        assert_true(abs(w * size[i][1] - h * size[i][0]) <= 2 * size[i][0]); /* the same aspect */
        assert_ok(f.ctx, draw(&f, w, h, 0));
        from = w > h ? w : h; /* and the next step of the longer side is too large */
        to = from + 16;
        assert_int_equal(draw(&f, w * to / from / 2 * 2, h * to / from / 2 * 2, 0),
                         IPT_ERR_TOO_LARGE);
    }
    close_engine(&f);
}

/* The working memory alone is too large; nothing runs at that size. */
static void memory_limit_names_a_size(void **state)
{
    (void)state;
    int32_t w = 0, h = 0;
    fixture f = open_engine(24 << 20);
    assert_int_equal(draw(&f, 1024, 512, 0), IPT_ERR_DEVICE_MEM);
    named_size(&f, &w, &h);
    assert_int_equal(w, 2 * h);
    ipt_unet_key key = {.batch = 1, .h = h / 2, .w = w / 2, .tokens = 77, .act = IPT_F32};
    ipt_plan *plan = NULL;
    assert_ok(f.ctx, ipt_unet_plan(f.engine, &key, &plan));
    assert_ok(f.ctx, draw(&f, 32, 32, 0));
    close_engine(&f);
}

enum { SIDE = 96 }; /* latent pixels */

static ipt_status decode(fixture *f, int32_t tile, float *rgb)
{
    static float latent[4 * SIDE * SIDE];
    ipt_request r;
    uint64_t seed = 3;
    ipt_request_init(&r);
    r.vae_tile = tile;
    for (size_t i = 0; i < IPT_COUNT(latent); i++)
        latent[i] = ipt_rng_normal(&seed);
    return ipt_decode(f->engine, &r, latent, SIDE, SIDE, rgb);
}

/* The VAE's attention holds 32 bytes a latent pixel: 288 KiB whole, 72 and 18 in tiles. */
static void vae_goes_to_tiles(void **state)
{
    static const struct {
        uint64_t range;
        int32_t asked, tile; /* pixels: --vae-tile, and what it must come to */
    } rows[] = {{200 << 10, 0, 96}, {50 << 10, 0, 48}, {50 << 10, 96, 48}};
    static float want[4 * SIDE * SIDE * 3], got[4 * SIDE * SIDE * 3];
    (void)state;
    fixture f = open_engine(0);
    assert_ok(f.ctx, draw(&f, 32, 32, 0)); /* loads the model */
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        limit_binding(&f, 0);
        assert_ok(f.ctx, decode(&f, rows[i].tile, want));
        limit_binding(&f, rows[i].range);
        assert_ok(f.ctx, decode(&f, rows[i].asked, got));
        golden_at_most(golden_max_diff(want, got, IPT_COUNT(want)), 1e-5, "tiles of %d",
                       rows[i].tile);
    }
    limit_binding(&f, 200 << 10);
    assert_int_equal(decode(&f, -1, got), IPT_ERR_TOO_LARGE);
    assert_non_null(strstr(ipt_last_error(f.ctx), "--vae-tile auto"));
    close_engine(&f);
}

static void encoder_names_a_size(void **state)
{
    static float rgb[4 * SIDE * SIDE * 3], mean[4 * SIDE * SIDE], deviation[4 * SIDE * SIDE];
    int32_t w = 0, h = 0;
    (void)state;
    fixture f = open_engine(0);
    assert_ok(f.ctx, draw(&f, 32, 32, 0));
    limit_binding(&f, 100 << 10);
    assert_int_equal(ipt_encode_image(f.engine, rgb, 2 * SIDE, 2 * SIDE, mean, deviation),
                     IPT_ERR_TOO_LARGE);
    named_size(&f, &w, &h);
    assert_ok(f.ctx, ipt_encode_image(f.engine, rgb, h, w, mean, deviation));
    close_engine(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(batch_is_halved),           cmocka_unit_test(fitting_size_is_named),
        cmocka_unit_test(memory_limit_names_a_size), cmocka_unit_test(vae_goes_to_tiles),
        cmocka_unit_test(encoder_names_a_size),
    };
    return cmocka_run_group_tests_name("fit", tests, NULL, NULL);
}
