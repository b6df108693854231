/* tests/test_image.c - pictures in and out: round trips, metadata as other programs read it,
 * damaged files. */
#include "tests/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/image_internal.h"
#include "engine/impasto.h"

/* A 3 x 2 picture: BMP, 24 bits, bottom row first, rows padded to 4 bytes. */
static const uint8_t bmp[] = {
    'B', 'M', 78, 0, 0, 0,  0, 0, 0, 0, 54,  0,  0,   0, 40,  0, 0, 0, 3, 0, 0, 0, 2,
    0,   0,   0,  1, 0, 24, 0, 0, 0, 0, 0,   24, 0,   0, 0,   0, 0, 0, 0, 0, 0, 0, 0,
    0,   0,   0,  0, 0, 0,  0, 0, 0, 0, 255, 0,  255, 0, 255, 0, 0, 0, 0, 0, /* red, green, blue */
    9,   8,   7,  6, 5, 4,  3, 2, 1, 0, 0,   0};

/* A folder of its own for each test; removed by the test. */
static void temp_name(char *buf, size_t n, const char *name)
{
    const char *dir = getenv("TMPDIR");
    ipt_name(buf, n, "%s/impasto-%ld-%s", dir ? dir : "/tmp", (long)getpid(), name);
}

static ipt_image gradient(ipt_ctx *ctx, int32_t w, int32_t h)
{
    ipt_image im = {w, h, ipt_alloc(ctx, (size_t)w * (size_t)h * 3)};
    assert_non_null(im.rgb);
    for (int32_t y = 0; y < h; y++)
        for (int32_t x = 0; x < w; x++) {
            uint8_t *p = im.rgb + ((size_t)y * (size_t)w + (size_t)x) * 3;
            p[0] = (uint8_t)(x * 255 / (w > 1 ? w - 1 : 1));
            p[1] = (uint8_t)(y * 255 / (h > 1 ? h - 1 : 1));
            p[2] = (uint8_t)((x + y) % 256);
        }
    return im;
}

static void test_bmp(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_image im = {0};
    assert_ok(ctx, ipt_image_load_memory(ctx, "a.bmp", bmp, sizeof bmp, &im));
    assert_int_equal(im.w, 3);
    assert_int_equal(im.h, 2);
    static const uint8_t expected[] = {7, 8, 9, 4, 5, 6, 1, 2, 3, 255, 0, 0, 0, 255, 0, 0, 0, 255};
    assert_memory_equal(im.rgb, expected, sizeof expected);
    ipt_image_finish(&im);
    ipt_image_finish(&im);
    ipt_ctx_destroy(&ctx);
}

/* What stb_image cannot read is called by its name, not "unknown image type". */
static void test_compressed_bmp(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_image im = {0};
    uint8_t file[sizeof bmp];
    memcpy(file, bmp, sizeof bmp);
    file[30] = 1;
    assert_int_equal(ipt_image_load_memory(ctx, "a.bmp", file, sizeof file, &im), IPT_ERR_FORMAT);
    assert_non_null(strstr(ipt_last_error(ctx), "compressed BMP (run lengths)"));
    ipt_ctx_destroy(&ctx);
}

static void test_pnm_and_tga(void **state)
{
    (void)state;
    static const char ppm[] = "P6 # comment\n2 1\n255\nabcdef", pgm[] = "P5\n2 1\n255\nxy";
    static const uint8_t tga[] = {0, 0, 10, 0, 0, 0,  0,    0,    0, 0, 0,
                                  0, 3, 0,  1, 0, 24, 0x20, 0x82, 1, 2, 3};
    ipt_ctx *ctx = test_ctx();
    ipt_image im = {0};
    assert_ok(ctx, ipt_image_load_memory(ctx, "a.ppm", ppm, sizeof ppm - 1, &im));
    assert_memory_equal(im.rgb, "abcdef", 6);
    ipt_image_finish(&im);
    assert_ok(ctx, ipt_image_load_memory(ctx, "a.pgm", pgm, sizeof pgm - 1, &im));
    assert_memory_equal(im.rgb, "xxxyyy", 6);
    ipt_image_finish(&im);
    assert_ok(ctx, ipt_image_load_memory(ctx, "a.TGA", tga, sizeof tga, &im));
    assert_memory_equal(im.rgb, "\3\2\1\3\2\1\3\2\1", 9);
    ipt_image_finish(&im);
    assert_int_equal(ipt_image_load_memory(ctx, "a.ppm", ppm, sizeof ppm - 2, &im), IPT_ERR_FORMAT);
    assert_int_equal(ipt_image_load_memory(ctx, "b", "P6 123456789012 1 255 x", 23, &im),
                     IPT_ERR_FORMAT);
    assert_non_null(strstr(ipt_last_error(ctx), "PNM of 123456789012 x 1 pixels"));
    assert_int_equal(ipt_image_load_memory(ctx, "a.tga", tga, sizeof tga - 1, &im), IPT_ERR_FORMAT);
    ipt_ctx_destroy(&ctx);
}

static char *slurp(ipt_ctx *ctx, const char *path, size_t *n)
{
    char *data = NULL;
    assert_ok(ctx, ipt_file_read(ctx, path, 1 << 24, &data, n));
    return data;
}

static bool contains(const char *data, size_t n, const void *what, size_t m)
{
    for (size_t i = 0; i + m <= n; i++)
        if (memcmp(data + i, what, m) == 0)
            return true;
    return false;
}

static void test_png(void **state)
{
    (void)state;
    static const char text[] = "a caf\xc3\xa9\nSteps: 20",
                      json[] = "{\"prompt\":\"a caf\xc3\xa9\"}";
    static const char latin[] = "tEXtparameters\0a caf\xe9\nSteps: 20";
    static const char other[] = "iTXtparameters\0\0\0\0\0\xe6\x97\xa5";
    char path[256];
    size_t n = 0;
    ipt_ctx *ctx = test_ctx();
    ipt_image im = gradient(ctx, 37, 21), back = {0};
    temp_name(path, sizeof path, "a.png");
    assert_ok(ctx, ipt_image_save(ctx, path, &im, text, json));
    assert_ok(ctx, ipt_image_load(ctx, path, &back));
    assert_int_equal(back.w, 37);
    assert_int_equal(back.h, 21);
    assert_memory_equal(back.rgb, im.rgb, 37 * 21 * 3);
    char *data = slurp(ctx, path, &n);
    assert_true(contains(data, n, latin, sizeof latin - 1));
    assert_true(contains(data, n, "sRGB", 4));
    assert_true(contains(data, n, "iTXtimpasto", 11));
    ipt_free(data);
    assert_ok(ctx, ipt_image_save(ctx, path, &im, "\xe6\x97\xa5", NULL)); /* not Latin-1 */
    data = slurp(ctx, path, &n);
    assert_true(contains(data, n, other, sizeof other - 1));
    ipt_free(data);
    unlink(path);
    ipt_image_finish(&back);
    ipt_image_finish(&im);
    ipt_ctx_destroy(&ctx);
}

static void test_jpeg(void **state)
{
    (void)state;
    static const uint8_t comment[] = {'U', 'N',  'I',  'C',  'O',  'D', 'E', 0, 0,
                                      'a', 0xd8, 0x3d, 0xde, 0x00, 0,   'b'}; /* a, U+1F600, b */
    char path[256];
    size_t n = 0;
    ipt_ctx *ctx = test_ctx();
    ipt_image im = gradient(ctx, 40, 24), back = {0};
    temp_name(path, sizeof path, "a.jpg");
    assert_ok(ctx, ipt_image_save(ctx, path, &im,
                                  "a\xf0\x9f\x98\x80"
                                  "b",
                                  "{}"));
    assert_ok(ctx, ipt_image_load(ctx, path, &back));
    assert_int_equal(back.w, 40);
    assert_int_equal(back.h, 24);
    for (size_t i = 0; i < 40 * 24 * 3; i++)
        assert_true(abs(back.rgb[i] - im.rgb[i]) <= 12);
    char *data = slurp(ctx, path, &n);
    assert_true(contains(data, n, comment, sizeof comment));
    ipt_free(data);
    size_t big = 200000; /* longer than a marker holds: cut, not refused */
    char *text = ipt_alloc(ctx, big + 1);
    memset(text, 'x', big);
    assert_ok(ctx, ipt_image_save(ctx, path, &im, text, text));
    ipt_image_finish(&back);
    assert_ok(ctx, ipt_image_load(ctx, path, &back));
    ipt_free(text);
    unlink(path);
    ipt_image_finish(&back);
    ipt_image_finish(&im);
    ipt_ctx_destroy(&ctx);
}

/* EXIF orientation: what follows the APP1 marker of a JPEG, both byte orders. */
static void test_orientation(void **state)
{
    (void)state;
    uint8_t j[] = {0xff, 0xd8, 0xff, 0xe1, 0,    34,   'E', 'x', 'i',  'f',  0,    0,    'M',  'M',
                   0,    42,   0,    0,    0,    8,    0,   1,   0x01, 0x12, 0,    3,    0,    0,
                   0,    1,    0,    6,    0,    0,    0,   0,   0,    0,    0xff, 0xc4, 0,    20,
                   0x00, 1,    0,    0,    0,    0,    0,   0,   0,    0,    0,    0,    0,    0,
                   0,    0,    0,    0,    0xff, 0xc4, 0,   20,  0x10, 1,    0,    0,    0,    0,
                   0,    0,    0,    0,    0,    0,    0,   0,   0,    0,    0,    0,    0xff, 0xda,
                   0,    8,    1,    1,    0,    0,    63,  0,   0x55, 0xff, 0,    0xff, 0xd9};
    assert_int_equal(ipt_image_orientation(j, sizeof j), 6);
    j[31] = 9;
    assert_int_equal(ipt_image_orientation(j, sizeof j), 1);
    j[31] = 3;
    j[19] = 200; /* directory outside */
    assert_int_equal(ipt_image_orientation(j, sizeof j), 1);
    assert_int_equal(ipt_image_orientation(j, 20), 1);
}

static void test_resize(void **state)
{
    (void)state;
    /* Pillow 13.0: Image.new of [0, 60, 120, 180, 240] in one row, resize((3, 1), LANCZOS) and
     * resize((8, 1), LANCZOS). */
    static const uint8_t row[5] = {0, 60, 120, 180, 240};
    static const uint8_t small[3] = {19, 120, 221}, large[8] = {0, 18, 65, 104, 136, 175, 222, 244};
    ipt_ctx *ctx = test_ctx();
    for (int k = 0; k < 2; k++) {
        ipt_image im = {5, 1, ipt_alloc(ctx, 15)};
        const uint8_t *expected = k ? large : small;
        int32_t w = k ? 8 : 3;
        for (int i = 0; i < 15; i++)
            im.rgb[i] = row[i / 3];
        assert_ok(ctx, ipt_image_resize(ctx, &im, w, 1));
        assert_int_equal(im.w, w);
        for (int i = 0; i < 3 * w; i++)
            assert_int_equal(im.rgb[i], expected[i / 3]);
        ipt_image_finish(&im);
    }
    ipt_image im = gradient(ctx, 9, 7);
    assert_ok(ctx, ipt_image_resize(ctx, &im, 4, 20));
    assert_int_equal(im.h, 20);
    assert_int_equal(ipt_image_resize(ctx, &im, 0, 5), IPT_ERR_ARG);
    assert_int_equal(ipt_image_resize(ctx, &im, 1 << 20, 1 << 20), IPT_ERR_ARG);
    ipt_image_finish(&im);
    ipt_ctx_destroy(&ctx);
}

/* Every cut of a whole file is refused with one line that names it, and nothing is left allocated.
 */
static void check_cuts(ipt_ctx *ctx, const char *name, const char *data, size_t n)
{
    for (size_t cut = 0; cut < n; cut += cut < 200 ? 1 : 13) {
        ipt_image im = {0};
        char *copy = malloc(cut + 1); /* its own block: a read past the end is seen by ASan */
        assert_non_null(copy);
        memcpy(copy, data, cut);
        assert_int_equal(ipt_image_load_memory(ctx, name, copy, cut, &im), IPT_ERR_FORMAT);
        assert_non_null(strstr(ipt_last_error(ctx), name));
        assert_null(strchr(ipt_last_error(ctx), '\n'));
        free(copy);
    }
}

static void test_truncated(void **state)
{
    (void)state;
    char path[256];
    size_t n = 0;
    ipt_ctx *ctx = test_ctx();
    ipt_image im = gradient(ctx, 33, 17);
    static const char *const names[] = {"cut.png", "cut.jpg"};
    for (size_t i = 0; i < IPT_COUNT(names); i++) {
        temp_name(path, sizeof path, names[i]);
        assert_ok(ctx, ipt_image_save(ctx, path, &im, "text", NULL));
        char *data = slurp(ctx, path, &n);
        check_cuts(ctx, names[i], data, n);
        ipt_free(data);
        unlink(path);
    }
    check_cuts(ctx, "cut.bmp", (const char *)bmp, sizeof bmp);
    ipt_image_finish(&im);
    ipt_ctx_destroy(&ctx);
}

static void test_not_pictures(void **state)
{
    (void)state;
    static const struct {
        const char *data;
        size_t n;
        const char *said;
    } cases[] = {
        {"", 0, "an empty file"},
        {"just some text\n", 15, "a text file"},
        {"PK\3\4........", 12, "zip"},
        {"\x80\2}q\0.", 6, "pickle"},
        {"GGUF\3\0\0\0", 8, "GGUF"},
        {"\x08\0\0\0\0\0\0\0{\"a\":{}}", 16, "safetensors"},
        {"RIFF\0\0\0\0WEBPVP8 ", 16, "WebP"},
        {"P6\n70000 70000\n255\n", 19, "70000"},
        {"P6\n2 2\n65535\n", 13, "65535"},
        {"GIF89a\1\0\1\0\0\0\0\x2c\0\0\0\0\5\0\5\0\0\2", 24, "inside"},
    };
    ipt_ctx *ctx = test_ctx();
    ipt_image im = {0};
    for (size_t i = 0; i < IPT_COUNT(cases); i++) {
        assert_int_equal(ipt_image_load_memory(ctx, "x", cases[i].data, cases[i].n, &im),
                         IPT_ERR_FORMAT);
        if (!strstr(ipt_last_error(ctx), cases[i].said))
            fail_msg("case %zu: '%s' lacks '%s'", i, ipt_last_error(ctx), cases[i].said);
    }
    char path[512];
    assert_int_equal(ipt_image_load(ctx, test_nowhere(path, sizeof path, "a.png"), &im),
                     IPT_ERR_IO);
    assert_int_equal(ipt_image_load(ctx, "/tmp", &im), IPT_ERR_IO);
    ipt_ctx_destroy(&ctx);
}

/* A PNG whose header promises far more pixels than its bytes can hold, with valid checksums. */
static void test_bomb(void **state)
{
    (void)state;
    static const uint8_t png[] = {0x89, 'P', 'N', 'G', 13,  10,  26,   10,   0,   0,    0,    13,
                                  'I',  'H', 'D', 'R', 0,   0,   0x1f, 0xff, 0,   0,    0x1f, 0xff,
                                  8,    2,   0,   0,   0,   0,   0,    0,    0, /* 8191 x 8191 */
                                  0,    0,   0,   1,   'I', 'D', 'A',  'T',  0,   0,    0,    0,
                                  0,    0,   0,   0,   0,   'I', 'E',  'N',  'D', 0xae, 0x42, 0x60,
                                  0x82};
    ipt_ctx *ctx = test_ctx();
    ipt_image im = {0};
    assert_int_equal(ipt_image_load_memory(ctx, "bomb.png", png, sizeof png, &im), IPT_ERR_FORMAT);
    assert_non_null(strstr(ipt_last_error(ctx), "CRC"));
    ipt_ctx_destroy(&ctx);
    static const char wide[] =
        "BM\x36\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\xff\xff\0\0\xff\xff\0\0\1\0\x18\0\0\0\0\0"
        "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    ctx = test_ctx();
    assert_int_equal(ipt_image_load_memory(ctx, "bomb.bmp", wide, sizeof wide, &im),
                     IPT_ERR_FORMAT);
    assert_non_null(strstr(ipt_last_error(ctx), "expected at least"));
    ipt_ctx_destroy(&ctx);
}

static void test_save_fails(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_image im = gradient(ctx, 4, 4), none = {0};
    char path[512];
    assert_int_equal(ipt_image_save(ctx, test_nowhere(path, sizeof path, "a.png"), &im, NULL, NULL),
                     IPT_ERR_OUTPUT);
    assert_int_equal(ipt_image_save(ctx, test_nowhere(path, sizeof path, "a.jpg"), &im, NULL, NULL),
                     IPT_ERR_OUTPUT);
    assert_int_equal(ipt_image_save(ctx, "a.gif", &im, NULL, NULL), IPT_ERR_ARG);
    assert_int_equal(ipt_image_save(ctx, "png", &im, NULL, NULL), IPT_ERR_ARG);
    assert_int_equal(ipt_image_save(ctx, "a.png", &none, NULL, NULL), IPT_ERR_ARG);
    ipt_image_finish(&im);
    ipt_ctx_destroy(&ctx);
}

/* Every allocation of a save and a load fails in turn: a status, no leak (ASan watches), no file.
 */
static void test_no_memory(void **state)
{
    (void)state;
    static const char *const names[] = {"oom.png", "oom.jpg"};
    char path[256];
    ipt_ctx *ctx = test_ctx();
    ipt_image im = gradient(ctx, 64, 64);
    for (size_t k = 0; k < IPT_COUNT(names); k++) {
        temp_name(path, sizeof path, names[k]);
        bool done = false;
        for (uint64_t i = 1; !done && i < 100; i++) {
            ipt_image back = {0};
            ipt_alloc_fail_after(ctx, i);
            ipt_status s = ipt_image_save(ctx, path, &im, "text \xe6\x97\xa5", "{}");
            done = s == IPT_OK;
            if (!done)
                assert_false(ipt_is_file(path));
            if (done && ipt_image_load(ctx, path, &back) != IPT_OK)
                done = false;
            ipt_image_finish(&back);
            ipt_alloc_fail_after(ctx, 0);
            unlink(path);
        }
        assert_true(done);
    }
    ipt_image_finish(&im);
    ipt_ctx_destroy(&ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bmp),          cmocka_unit_test(test_compressed_bmp),
        cmocka_unit_test(test_pnm_and_tga),  cmocka_unit_test(test_png),
        cmocka_unit_test(test_jpeg),         cmocka_unit_test(test_orientation),
        cmocka_unit_test(test_resize),       cmocka_unit_test(test_truncated),
        cmocka_unit_test(test_not_pictures), cmocka_unit_test(test_bomb),
        cmocka_unit_test(test_save_fails),   cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
