/* tests/test_paste.c - inpainting keeps what the mask protects, to the bit, behind a soft edge. */
#include "tests/support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/internal.h"
#include "tests/golden.h"

/* SciPy 1.17: clip(2 * gaussian_filter(step, sigma, radius=int(2.5 * sigma + 0.5), mode='nearest'),
 * 0, 1) in front of a straight edge, and on the diagonal in front of a corner. */
static void edges(void **state)
{
    static const float four[] = {0.899410F, 0.704420F, 0.526880F, 0.375022F, 0.253F, 0.160893F,
                                 0.09558F,  0.052072F, 0.024845F, 0.008839F, 0};
    static const float two[] = {0.799435F, 0.445438F, 0.20214F, 0.071912F, 0.017624F, 0};
    static const float corner[] = {0.404469F, 0.248104F, 0.138801F, 0.070321F,
                                   0.032004F, 0.012943F, 0.004568F, 0.001356F};
    enum { N = 40, AT = 20 };
    (void)state;
    ipt_ctx *ctx = test_ctx();
    bool step[N * N], square[N * N];
    float a[N * N], b[N * N], c[N * N];
    for (int i = 0; i < N * N; i++) {
        step[i] = i % N >= AT;
        square[i] = i % N >= AT && i / N >= AT;
    }
    assert_ok(ctx, ipt_paste_edge(ctx, step, N, N, 4, a));
    assert_ok(ctx, ipt_paste_edge(ctx, step, N, N, 2, b));
    assert_ok(ctx, ipt_paste_edge(ctx, square, N, N, 4, c));
    for (int y = 0; y < N; y++) {
        for (int i = 0; i < (int)IPT_COUNT(four); i++)
            assert_true(fabsf(a[y * N + AT - 1 - i] - four[i]) < 1e-5F);
        for (int i = 0; i < (int)IPT_COUNT(two); i++)
            assert_true(fabsf(b[y * N + AT - 1 - i] - two[i]) < 1e-5F);
    }
    for (int i = 0; i < (int)IPT_COUNT(corner); i++)
        assert_true(fabsf(c[(AT - 1 - i) * N + AT - 1 - i] - corner[i]) < 1e-5F);
    for (int i = 0; i < N * N; i++) { /* exact zeros and ones, whatever the sums round to */
        bool far = i % N < AT - 10;
        assert_true(!step[i] || (a[i] >= 1 && a[i] <= 1));
        assert_true(!far || (a[i] >= 0 && a[i] <= 0));
    }
    ipt_ctx_destroy(&ctx);
}

/* Masks of one pixel, of all and of none; pictures smaller than the blur. */
static void corner_cases(void **state)
{
    static const int32_t sizes[][2] = {{1, 1}, {3, 1}, {1, 5}, {7, 9}, {40, 33}};
    (void)state;
    ipt_ctx *ctx = test_ctx();
    for (size_t k = 0; k < IPT_COUNT(sizes); k++)
        for (int kind = 0; kind < 3; kind++) {
            size_t n = (size_t)sizes[k][0] * (size_t)sizes[k][1];
            bool *repaint = calloc(n, sizeof *repaint);
            float *alpha = calloc(n, sizeof *alpha);
            uint8_t *own = malloc(n * 3), *rgb = malloc(n * 3);
            assert_true(repaint && alpha && own && rgb);
            for (size_t i = 0; i < n; i++)
                repaint[i] = kind == 1 || (kind == 2 && i == n / 2);
            memset(own, 10, n * 3);
            memset(rgb, 200, n * 3);
            assert_ok(ctx, ipt_paste_edge(ctx, repaint, sizes[k][0], sizes[k][1], 4, alpha));
            const ipt_paste p = {own, alpha};
            ipt_paste_apply(&p, n, rgb);
            for (size_t i = 0; i < n * 3; i++)
                assert_true(kind == 0   ? rgb[i] == 10
                            : kind == 1 ? rgb[i] == 200
                                        : rgb[i] >= 10 && rgb[i] <= 200);
            assert_true(kind != 2 || rgb[n / 2 * 3] == 200);
            free(repaint);
            free(alpha);
            free(own);
            free(rgb);
        }
    ipt_ctx_destroy(&ctx);
}

/* --- through the engine ----------------------------------------------------------------------- */
enum { SIDE = 64 };

typedef struct picture {
    uint8_t rgb[SIDE * SIDE * 3];
    char json[4096], text[4096];
} picture;

static ipt_status keep(void *user, int32_t index, const ipt_image *im, const char *text,
                       const char *json)
{
    picture *p = user;
    assert_int_equal(index, 0);
    assert_int_equal(im->w, SIDE);
    assert_int_equal(im->h, SIDE);
    memcpy(p->rgb, im->rgb, sizeof p->rgb);
    ipt_name(p->json, sizeof p->json, "%s", json);
    ipt_name(p->text, sizeof p->text, "%s", text);
    return IPT_OK;
}

/* Largest difference of two pictures over the pixels at a distance (in both directions, from the
 * repainted square 24..39) of lo..hi. */
static int difference(const uint8_t *a, const uint8_t *b, int lo, int hi)
{
    int most = 0;
    for (int i = 0; i < SIDE * SIDE; i++) {
        int x = i % SIDE, y = i / SIDE;
        int dx = x < 24 ? 24 - x : x > 39 ? x - 39 : 0, dy = y < 24 ? 24 - y : y > 39 ? y - 39 : 0;
        int d = dx > dy ? dx : dy;
        for (int c = 0; c < 3 && d >= lo && d <= hi; c++) {
            int v = abs(a[i * 3 + c] - b[i * 3 + c]);
            most = v > most ? v : most;
        }
    }
    return most;
}

static ipt_image make_image(int32_t w, int32_t h, bool mask)
{
    ipt_image im = {w, h, ipt_alloc(NULL, (size_t)w * (size_t)h * 3)};
    uint64_t seed = 5;
    assert_non_null(im.rgb);
    for (int32_t i = 0; i < w * h; i++)
        for (int c = 0; c < 3; c++) {
            int x = i % w, y = i / w;
            bool in = x >= 24 && x < 40 && y >= 24 && y < 40;
            uint64_t v = mask ? (in ? 255 : 0)
                              : (uint64_t)((x * 3 + y * c) % 256) ^ (ipt_rng_next(&seed) & 7);
            im.rgb[i * 3 + c] = (uint8_t)v;
        }
    return im;
}

/* The trace's `image`, as 8-bit values. */
static void traced_image(ipt_ctx *ctx, const char *path, uint8_t *rgb)
{
    ipt_safetensors *st = NULL;
    size_t n = 0;
    assert_ok(ctx, ipt_safetensors_open(ctx, path, &st));
    float *v = golden_f32(ctx, st, "image", &n);
    assert_int_equal(n, SIDE * SIDE * 3);
    for (size_t i = 0; i < n; i++)
        rgb[i] = (uint8_t)lrintf(v[i] * 255.0F);
    ipt_free(v);
    ipt_safetensors_close(&st);
}

static void protected_part_is_kept(void **state)
{
    enum { EDGE = 3 }; /* 2.5 sigma, rounded, of models/sd1, whose VAE enlarges by 2: sigma 1 */
    char model[512], trace[128];
    static picture pasted, raw, other;
    uint8_t traced[SIDE * SIDE * 3];
    ipt_request r;
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_engine *e = test_engine(&ctx, IPT_PRECISION_F32, 0);
    ipt_image init = make_image(SIDE, SIDE, false), mask = make_image(SIDE, SIDE, true);
    ipt_request_init(&r);
    ipt_name(model, sizeof model, "%s/models/sd1", IPT_TEST_DATA);
    ipt_name(trace, sizeof trace, "/tmp/impasto-paste-%ld.safetensors", (long)getpid());
    r.model = model;
    r.prompt = "a cat";
    r.steps = 3;
    r.seed = 7;
    r.sampler = "ddim";
    r.init = &init;
    r.mask = &mask;
    r.width = r.height = SIDE;
    r.trace = trace;
    assert_ok(ctx, ipt_generate(e, &r, keep, &pasted, NULL));
    traced_image(ctx, trace, traced);
    r.no_paste = true;
    assert_ok(ctx, ipt_generate(e, &r, keep, &raw, NULL));
    assert_memory_equal(raw.rgb, traced, sizeof traced); /* the trace stays raw */
    print_message("raw result: %d of 255 from the protected picture\n",
                  difference(raw.rgb, init.rgb, EDGE + 1, SIDE));
    assert_true(difference(raw.rgb, init.rgb, EDGE + 1, SIDE) > 9);
    assert_int_equal(difference(pasted.rgb, init.rgb, EDGE + 1, SIDE), 0);
    assert_int_equal(difference(pasted.rgb, raw.rgb, 0, 0), 0);
    assert_true(difference(pasted.rgb, raw.rgb, 1, EDGE) > 0);
    assert_non_null(strstr(pasted.json, "\"paste\":true"));
    assert_non_null(strstr(raw.json, "\"paste\":false"));
    assert_non_null(strstr(pasted.text, "Mask blur: 1"));
    assert_null(strstr(raw.text, "Mask blur"));

    r.no_paste = false;
    r.trace = NULL;
    memset(mask.rgb, 0, sizeof pasted.rgb); /* nothing to repaint: the picture itself */
    assert_ok(ctx, ipt_generate(e, &r, keep, &other, NULL));
    assert_memory_equal(other.rgb, init.rgb, sizeof other.rgb);
    memset(mask.rgb, 255, sizeof pasted.rgb); /* all: the raw result */
    assert_ok(ctx, ipt_generate(e, &r, keep, &other, NULL));
    r.no_paste = true;
    assert_ok(ctx, ipt_generate(e, &r, keep, &raw, NULL));
    assert_memory_equal(other.rgb, raw.rgb, sizeof other.rgb);

    /* a picture of another size: as it was resized */
    ipt_image_finish(&init);
    ipt_image_finish(&mask);
    init = make_image(100, 90, false);
    mask = make_image(SIDE, SIDE, true);
    r.no_paste = false;
    assert_ok(ctx, ipt_generate(e, &r, keep, &other, NULL));
    assert_ok(ctx, ipt_image_resize(ctx, &init, SIDE, SIDE));
    assert_int_equal(difference(other.rgb, init.rgb, EDGE + 1, SIDE), 0);
    ipt_image_finish(&init);
    ipt_image_finish(&mask);
    unlink(trace);
    test_engine_done(&e, &ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(edges),
        cmocka_unit_test(corner_cases),
        cmocka_unit_test(protected_part_is_kept),
    };
    return cmocka_run_group_tests_name("paste", tests, NULL, NULL);
}
