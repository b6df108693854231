/* tests/test_size.c - the size of a picture where the request leaves it open: the model's area in
 * the aspect of the picture to start from; sizes that cannot be name one that can. */
#include "tests/support.h"

#include <string.h>

#include "engine/internal.h"

typedef struct row {
    int32_t native, f;    /* of the latent; what the VAE enlarges by */
    int32_t iw, ih, w, h; /* picture to start from (0: none), request */
    int32_t want_w, want_h;
} row;

static void sizes(void **state)
{
    static const row rows[] = {
        {64, 8, 0, 0, 0, 0, 512, 512},
        {64, 8, 0, 0, 768, 0, 768, 512}, /* without a picture there is no aspect */
        {16, 4, 0, 0, 0, 0, 64, 64},
        {0, 8, 0, 0, 0, 0, 512, 512}, /* a folder that does not say */
        /* photos: the model's area */
        {64, 8, 4000, 3000, 0, 0, 592, 440},
        {64, 8, 3000, 4000, 0, 0, 440, 592},
        {128, 8, 4000, 3000, 0, 0, 1184, 888},
        {16, 4, 4000, 3000, 0, 0, 72, 56},
        {64, 8, 4032, 3024, 0, 0, 592, 440},
        {64, 8, 300, 300, 0, 0, 512, 512},
        {64, 8, 500, 700, 0, 0, 432, 608}, /* not on the grid */
        {64, 8, 65536, 1, 0, 0, 16384, 8}, /* no side is empty or too long */
        {64, 8, 1, 65536, 0, 0, 8, 16384},
        /* what the model could have made stays */
        {64, 8, 512, 768, 0, 0, 512, 768},
        {64, 8, 512, 512, 0, 0, 512, 512},
        {64, 8, 704, 704, 0, 0, 704, 704},
        {64, 8, 1024, 1024, 0, 0, 512, 512},
        {128, 8, 1024, 1024, 0, 0, 1024, 1024},
        {128, 8, 512, 512, 0, 0, 1024, 1024},
        /* what is asked for wins */
        {64, 8, 4000, 3000, 640, 480, 640, 480},
        {64, 8, 4000, 3000, 1024, 0, 1024, 768},
        {64, 8, 4000, 3000, 0, 768, 1024, 768},
        {64, 8, 512, 512, 768, 0, 768, 768},
        {64, 8, 10, 60000, 512, 0, 512, 16384},
    };
    (void)state;
    ipt_ctx *ctx = test_ctx();
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        const row *t = &rows[i];
        ipt_model_config c = {0};
        ipt_image init = {t->iw, t->ih, NULL};
        ipt_request r;
        int32_t w = 0, h = 0;
        c.unet.sample_size = t->native;
        ipt_request_init(&r);
        r.width = t->w;
        r.height = t->h;
        r.init = t->iw ? &init : NULL;
        assert_ok(ctx, ipt_size_choose(ctx, &c, &r, t->f, &w, &h));
        if (w != t->want_w || h != t->want_h)
            fail_msg("row %zu: %d x %d, expected %d x %d", i, w, h, t->want_w, t->want_h);
    }
    ipt_ctx_destroy(&ctx);
}

static void refusals_name_a_size(void **state)
{
    static const struct {
        int32_t f, w, h;
        const char *said;
    } rows[] = {
        {8, 500, 512, "-W 504 -H 512 would do"},
        {8, 512, 3, "-W 512 -H 8 would do"},
        {8, 20000, 512, "-W 16384 -H 512 would do"},
        {8, 16384, 16384, "-W 8192 -H 8192 would do"},
        {8, 16384, 8192, "-W 11584 -H 5792 would do"},
        {4, -4, 64, "-W 4 -H 64 would do"},
    };
    (void)state;
    ipt_ctx *ctx = test_ctx();
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_model_config c = {0};
        ipt_request r;
        int32_t w = 7, h = 7;
        ipt_request_init(&r);
        r.width = rows[i].w;
        r.height = rows[i].h;
        assert_int_equal(ipt_size_choose(ctx, &c, &r, rows[i].f, &w, &h), IPT_ERR_ARG);
        if (!strstr(ipt_last_error(ctx), rows[i].said))
            fail_msg("row %zu: '%s' lacks '%s'", i, ipt_last_error(ctx), rows[i].said);
        assert_int_equal(w, 7);
    }
    ipt_ctx_destroy(&ctx);
}

/* Never more than the area asked for, whatever the aspect; and not much less. */
static void within_an_area(void **state)
{
    (void)state;
    for (double aspect = 1.0 / 40; aspect <= 40; aspect *= 1.07)
        for (double area = 4096; area < 1e8; area *= 3) {
            int32_t w = 0, h = 0;
            ipt_size_within(aspect, area, 8, &w, &h);
            assert_true((double)w * h <= area && w % 8 == 0 && h % 8 == 0);
            assert_true((double)(w + 8) * (h + 8) > area || w == 16384 || h == 16384);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes),
        cmocka_unit_test(refusals_name_a_size),
        cmocka_unit_test(within_an_area),
    };
    return cmocka_run_group_tests_name("size", tests, NULL, NULL);
}
