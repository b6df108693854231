/* tests/test_pictures.c - pictures in: every kind of PNG beside Pillow's pixels, bombs that must
 * not cost memory or time, formats that are named instead of read. */
#include "tests/support.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/image_internal.h"
#include "engine/impasto.h"

static const char *const PICTURES = IPT_TEST_DATA "/pictures";
static const char *const SEEDS = IPT_TEST_DATA "/image_fuzz";

static char *slurp(ipt_ctx *ctx, const char *dir, const char *name, size_t *n)
{
    char path[1024], *data = NULL;
    ipt_name(path, sizeof path, "%s/%s", dir, name);
    assert_ok(ctx, ipt_file_read(ctx, path, 1 << 24, &data, n));
    return data;
}

/* NAME.png and what Pillow read from it, NAME.ppm. */
static void every_png(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    size_t compared = 0;
    DIR *dir = opendir(PICTURES);
    assert_non_null(dir);
    for (const struct dirent *e; (e = readdir(dir)) != NULL;) {
        char path[1024];
        ipt_image im = {0}, want = {0};
        size_t n = strlen(e->d_name);
        if (n < 4 || strcmp(e->d_name + n - 4, ".ppm") != 0)
            continue;
        assert_ok(ctx, ipt_image_load(
                           ctx, ipt_name(path, sizeof path, "%s/%s", PICTURES, e->d_name), &want));
        ipt_name(path, sizeof path, "%s/%.*s.png", PICTURES, (int)(n - 4), e->d_name);
        assert_ok(ctx, ipt_image_load(ctx, path, &im));
        if (im.w != want.w || im.h != want.h ||
            memcmp(im.rgb, want.rgb, (size_t)im.w * (size_t)im.h * 3) != 0)
            fail_msg("%s: other pixels than Pillow's", path);
        ipt_image_finish(&im);
        ipt_image_finish(&want);
        compared++;
    }
    closedir(dir);
    assert_true(compared >= 28);
    ipt_ctx_destroy(&ctx);
}

/* An all-white mask of one bit a pixel: 8,000 pixels in a byte are no lie. */
static void dense_png(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_image im = {0};
    size_t n = 0;
    char *data = slurp(ctx, PICTURES, "white4096.png", &n);
    assert_true(n < 4096 * 4096 / 2048);
    assert_ok(ctx, ipt_image_load_memory(ctx, "white.png", data, n, &im));
    assert_int_equal(im.w, 4096);
    assert_int_equal(im.rgb[3 * 4096 * 4096 - 1], 255);
    ipt_image_finish(&im);
    ipt_free(data);
    ipt_ctx_destroy(&ctx);
}

/* --- bombs ------------------------------------------------------------------------------------ */
typedef struct bits {
    uint8_t *d;
    size_t n;
    unsigned have;
} bits;

static void put_bit(bits *b, unsigned bit)
{
    if (b->have == 0)
        b->d[b->n++] = 0;
    b->d[b->n - 1] = (uint8_t)(b->d[b->n - 1] | bit << b->have);
    b->have = (b->have + 1) & 7;
}

/* One zero and then `runs` runs of 258, with deflate's fixed codes: 13 bits each. */
static size_t deflate_zeros(uint8_t *out, size_t runs)
{
    bits b = {out, 0, 0};
    out[b.n++] = 0x78;
    out[b.n++] = 0x9c;
    put_bit(&b, 1); /* the last block, fixed codes */
    put_bit(&b, 1);
    put_bit(&b, 0);
    for (int i = 7; i >= 0; i--)
        put_bit(&b, 0x30 >> i & 1); /* 0 */
    for (size_t r = 0; r < runs; r++) {
        for (int i = 7; i >= 0; i--)
            put_bit(&b, 0xc5 >> i & 1); /* length 258 */
        for (int i = 0; i < 5; i++)
            put_bit(&b, 0); /* distance 1 */
    }
    for (int i = 0; i < 7; i++)
        put_bit(&b, 0); /* end of the block */
    memset(out + b.n, 0, 4);
    return b.n + 4;
}

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

static size_t put_chunk(uint8_t *at, const char *type, const void *body, size_t n)
{
    for (int i = 0; i < 4; i++)
        at[i] = (uint8_t)(n >> (24 - 8 * i));
    memmove(at + 8, body, n);
    memcpy(at + 4, type, 4);
    uint32_t sum = crc(at + 4, n + 4);
    for (int i = 0; i < 4; i++)
        at[8 + n + (size_t)i] = (uint8_t)(sum >> (24 - 8 * i));
    return n + 12;
}

/* A child's resident memory may grow by so much, in bytes, and it may take so long, in seconds. */
static void load_within(ipt_ctx *ctx, const char *name, const void *data, size_t n, size_t most,
                        unsigned seconds)
{
    int status = -1;
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        ipt_image im = {0};
        uint64_t before = ipt_peak_host_bytes();
        alarm(seconds);
        ipt_status s = ipt_image_load_memory(ctx, name, data, n, &im);
        _exit(s != IPT_OK && s != IPT_ERR_FORMAT ? 3 : ipt_peak_host_bytes() - before > most);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (status != 0)
        fail_msg("%s: %s", name,
                 WIFSIGNALED(status)        ? "killed: too slow, or crashed"
                 : WEXITSTATUS(status) == 1 ? "took too much memory"
                                            : "another status");
}

/* One pixel whose data, profile or text inflate to 160 MB each. */
static void png_bombs(void **state)
{
    static const uint8_t ihdr[13] = {0, 0, 0, 1, 0, 0, 0, 1, 8, 2, 0, 0, 0};
    static const uint8_t pixel[] = {0x78, 0x9c, 0x63, 0x60, 0x60, 0x60, 0, 0, 0, 4, 0, 1};
    static const char *const kinds[] = {"IDAT", "iCCP", "zTXt", "iTXt", "eXIf"};
    enum { RUNS = 620000, ROOM = RUNS * 13 / 8 + 1000 };
    (void)state;
    ipt_ctx *ctx = test_ctx();
    uint8_t *png = malloc(ROOM), *body = malloc(ROOM);
    assert_true(png && body);
    for (size_t k = 0; k < IPT_COUNT(kinds); k++) {
        static const char text[] = "x\0\1\0\0\0";
        size_t head = k == 0 || k == 4 ? 0 : k == 3 ? 6 : 3, at = 8;
        memcpy(body, k == 3 ? text : "x\0\0", k == 3 ? 6 : 3);
        size_t n = head + deflate_zeros(body + head, RUNS);
        memcpy(png, "\x89PNG\r\n\x1a\n", 8);
        at += put_chunk(png + at, "IHDR", ihdr, sizeof ihdr);
        at += put_chunk(png + at, kinds[k], body, n);
        if (k > 0)
            at += put_chunk(png + at, "IDAT", pixel, sizeof pixel);
        at += put_chunk(png + at, "IEND", "", 0);
        load_within(ctx, kinds[k], png, at, 32u << 20, 20);
    }
    free(png);
    free(body);
    ipt_ctx_destroy(&ctx);
}

/* The last scan of a progressive JPEG, n times. */
static void scans_are_counted(void **state)
{
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_image im = {0};
    size_t n = 0;
    char *data = slurp(ctx, SEEDS, "bomb_scans.jpg", &n);
    assert_int_equal(ipt_image_load_memory(ctx, "scans.jpg", data, n, &im), IPT_ERR_FORMAT);
    assert_non_null(strstr(ipt_last_error(ctx), "100 scans"));
    ipt_free(data);
    data = slurp(ctx, SEEDS, "p.jpg", &n); /* a usual one */
    assert_ok(ctx, ipt_image_load_memory(ctx, "p.jpg", data, n, &im));
    ipt_image_finish(&im);
    ipt_free(data);
    ipt_ctx_destroy(&ctx);
}

/* Headers of the largest pictures over next to no data. */
static void giants(void **state)
{
    static const struct {
        const char *name, *data;
        size_t n;
    } rows[] = {
        {"a.gif", "GIF89a\x00\x20\x00\x20\0\0\0,\0\0\0\0\x00\x20\x00\x20\0\x02\x02L\x01\0;", 30},
        {"a.tga", "\0\0\x0a\0\0\0\0\0\0\0\0\0\x00\x20\x00\x20\x18\0\xff\1\2\3", 22},
        {"a.ppm", "P6\n8192 8192\n255\n", 17},
    };
    (void)state;
    ipt_ctx *ctx = test_ctx();
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        ipt_image im = {0};
        assert_int_equal(ipt_image_load_memory(ctx, rows[i].name, rows[i].data, rows[i].n, &im),
                         IPT_ERR_FORMAT);
        load_within(ctx, rows[i].name, rows[i].data, rows[i].n, 8u << 20, 5);
    }
    ipt_ctx_destroy(&ctx);
}

/* The two passes in the order that needs less between them: 3 GB the other way round. */
static void resize_between(void **state)
{
    static const int32_t tall[2] = {1, 65536}, flat[2] = {65536, 1};
    int status = -1;
    (void)state;
    ipt_ctx *ctx = test_ctx();
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        bool ok = true;
        for (int k = 0; k < 2; k++) {
            const int32_t *side = k ? flat : tall;
            ipt_image im = {side[0], side[1], ipt_alloc(ctx, 65536 * 3)};
            uint64_t before = ipt_peak_host_bytes();
            ok = ok && im.rgb && ipt_image_resize(ctx, &im, k ? 8 : 16384, k ? 16384 : 8) == IPT_OK;
            ok = ok && ipt_peak_host_bytes() - before < 64u << 20;
            ipt_image_finish(&im);
        }
        _exit(!ok);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    ipt_ctx_destroy(&ctx);
}

/* What is no file is refused at once, as a picture and as a mask. */
static void no_files(void **state)
{
    char path[256];
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_image im = {0};
    ipt_name(path, sizeof path, "/tmp/impasto-fifo-%ld.png", (long)getpid());
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    const char *const names[] = {path, "/tmp", "/dev/zero", "/dev/null"};
    alarm(20);
    for (size_t i = 0; i < IPT_COUNT(names); i++) {
        assert_int_equal(ipt_image_load(ctx, names[i], &im), IPT_ERR_IO);
        assert_non_null(strstr(ipt_last_error(ctx), names[i]));
    }
    alarm(0);
    unlink(path);
    ipt_ctx_destroy(&ctx);
}

/* --- right results and right names ------------------------------------------------------------ */
static void topdown_bmp(void **state)
{
    /* 3 x 2, 24 bits, height -2: red, green, blue first */
    static const uint8_t bmp[] = {
        'B', 'M', 78,   0,    0,    0,    0, 0, 0,  0, 54, 0, 0, 0, 40, 0, 0,   0, 3,   0,
        0,   0,   0xfe, 0xff, 0xff, 0xff, 1, 0, 24, 0, 0,  0, 0, 0, 24, 0, 0,   0, 0,   0,
        0,   0,   0,    0,    0,    0,    0, 0, 0,  0, 0,  0, 0, 0, 0,  0, 255, 0, 255, 0,
        255, 0,   0,    0,    0,    0,    9, 8, 7,  6, 5,  4, 3, 2, 1,  0, 0,   0};
    static const uint8_t expected[] = {255, 0, 0, 0, 255, 0, 0, 0, 255, 7, 8, 9, 4, 5, 6, 1, 2, 3};
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_image im = {0};
    assert_ok(ctx, ipt_image_load_memory(ctx, "a.bmp", bmp, sizeof bmp, &im));
    assert_int_equal(im.w, 3);
    assert_int_equal(im.h, 2);
    assert_memory_equal(im.rgb, expected, sizeof expected);
    ipt_image_finish(&im);
    ipt_ctx_destroy(&ctx);
}

static void foreign_formats_are_named(void **state)
{
    static const struct {
        const char *data;
        size_t n;
        const char *said;
        bool convert;
    } rows[] = {
        {"RIFF\0\0\0\0WEBPVP8 ", 16, "a WebP picture", true},
        {"\0\0\0\x20"
         "ftypavif\0\0\0\0",
         16, "an AVIF picture", true},
        {"\0\0\0\x18"
         "ftypheic\0\0\0\0",
         16, "a HEIC picture", true},
        {"\0\0\0\x18"
         "ftypmif1\0\0\0\0",
         16, "a HEIF picture", true},
        {"\0\0\0\x18"
         "ftypisom\0\0\0\0",
         16, "a video file", false},
        {"II*\0\x08\0\0\0", 8, "a TIFF picture", true},
        {"MM\0*\0\0\0\x08", 8, "a TIFF picture", true},
        {"8BPS\0\1", 6, "a Photoshop picture", true},
        {"\0\0\0\x0cJXL \r\n\x87\n", 12, "a JPEG XL picture", true},
        {"\xff\x0a\0\0", 4, "a JPEG XL picture", true},
        {"#?RADIANCE\n", 11, "a Radiance HDR picture", true},
        {"P3\n1 1\n255\n1 2 3\n", 17, "P5 and P6", true},
        {"%PDF-1.7", 8, "a PDF", true},
        {"GGUF\3\0\0\0", 8, "a GGUF model", false},
    };
    (void)state;
    ipt_ctx *ctx = test_ctx();
    ipt_image im = {0};
    for (size_t i = 0; i < IPT_COUNT(rows); i++) {
        assert_int_equal(ipt_image_load_memory(ctx, "x", rows[i].data, rows[i].n, &im),
                         IPT_ERR_FORMAT);
        const char *said = ipt_last_error(ctx);
        if (!strstr(said, rows[i].said) ||
            !strstr(said, rows[i].convert ? "convert it to PNG or JPEG" : "expected a PNG"))
            fail_msg("row %zu: '%s' lacks '%s'", i, said, rows[i].said);
    }
    ipt_ctx_destroy(&ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_png),
        cmocka_unit_test(dense_png),
        cmocka_unit_test(png_bombs),
        cmocka_unit_test(scans_are_counted),
        cmocka_unit_test(giants),
        cmocka_unit_test(topdown_bmp),
        cmocka_unit_test(foreign_formats_are_named),
        cmocka_unit_test(resize_between),
        cmocka_unit_test(no_files),
    };
    return cmocka_run_group_tests_name("pictures", tests, NULL, NULL);
}
