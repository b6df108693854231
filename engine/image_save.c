/* engine/image_save.c - PNG and JPEG with the texts that other programs read back.  Everything is
 * encoded into memory and written by ipt_file_write, so that a file is either whole or not there.
 */
#include "engine/image_internal.h"
#include "engine/impasto.h"

#include <png.h>
#include <setjmp.h>
#include <string.h>
#include <strings.h>

#include <jpeglib.h>

/* [h,w,channels]: grey, RGB or RGBA. */
typedef struct pixels {
    const uint8_t *v;
    int32_t w, h, channels;
} pixels;

/* Bytes that grow; the state that survives a longjmp lives here and not in locals. */
typedef struct sink {
    ipt_ctx *ctx;
    uint8_t *data;
    size_t n, room;
    bool no_memory;
    jmp_buf jump;
    char why[JMSG_LENGTH_MAX];
} sink;

static bool put(sink *s, const void *p, size_t n)
{
    if (s->no_memory)
        return false;
    if (n > s->room - s->n) {
        size_t room = s->room + n + s->room / 2 + 4096;
        uint8_t *grown = ipt_regrow(s->ctx, s->data, s->room, room);
        if (!grown) {
            s->no_memory = true;
            return false;
        }
        s->data = grown;
        s->room = room;
    }
    memcpy(s->data + s->n, p, n);
    s->n += n;
    return true;
}

/* Latin-1 copy of a UTF-8 text into dst [strlen(s) + 1]; false when a character has none. */
static bool to_latin1(const char *s, char *dst)
{
    for (uint32_t c; (c = ipt_utf8_next(&s)) != 0; *dst++ = (char)c)
        if (c > 0xff)
            return false;
    *dst = 0;
    return true;
}

/* The text with U+FFFD where bytes are not UTF-8, into dst [3 * strlen(s) + 1]. */
static void to_clean_utf8(const char *s, char *dst)
{
    for (;;) {
        const char *from = s;
        uint32_t c = ipt_utf8_next(&s);
        if (c == 0)
            break;
        if (c == 0xfffd) {
            memcpy(dst, "\xef\xbf\xbd", 3);
            dst += 3;
        } else {
            memcpy(dst, from, (size_t)(s - from));
            dst += s - from;
        }
    }
    *dst = 0;
}

/* --- PNG -----------------------------------------------------------------------------------------
 */
static void png_failed(png_structp png, png_const_charp why)
{
    sink *s = png_get_error_ptr(png);
    ipt_name(s->why, sizeof s->why, "%s", why);
    longjmp(s->jump, 1);
}

static void png_warned(png_structp png, png_const_charp why)
{
    (void)png;
    (void)why;
}

static void png_put(png_structp png, png_bytep p, size_t n)
{
    if (!put(png_get_io_ptr(png), p, n))
        png_error(png, "out of memory");
}

static void png_flush_nothing(png_structp png) { (void)png; }

/* Everything that can jump; returns false after a jump. */
static bool png_encode(png_structp png, png_infop info, sink *s, const pixels *px, png_text *text,
                       int n_text)
{
    static const int colour[] = {0, PNG_COLOR_TYPE_GRAY, 0, PNG_COLOR_TYPE_RGB,
                                 PNG_COLOR_TYPE_RGB_ALPHA};
    if (setjmp(s->jump))
        return false;
    png_set_write_fn(png, s, png_put, png_flush_nothing);
    png_set_user_limits(png, 0x7fffffff, 0x7fffffff);
    png_set_IHDR(png, info, (png_uint_32)px->w, (png_uint_32)px->h, 8, colour[px->channels],
                 PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    if (px->channels > 1) /* grey is a number here, and no colour */
        png_set_sRGB(png, info, PNG_sRGB_INTENT_PERCEPTUAL);
    if (n_text)
        png_set_text(png, info, text, n_text);
    png_write_info(png, info);
    for (int32_t y = 0; y < px->h; y++)
        png_write_row(png, px->v + (size_t)y * (size_t)px->w * (size_t)px->channels);
    png_write_end(png, info);
    return true;
}

/* "parameters" as A1111 writes it (tEXt, or iTXt where Latin-1 does not suffice) and "impasto". */
static ipt_status encode_png(sink *s, const pixels *px, const char *text, const char *json)
{
    static char key_text[] = "parameters", key_json[] = "impasto", none[] = "";
    png_text chunk[2];
    int n = 0;
    char *a = text ? ipt_alloc(s->ctx, 3 * strlen(text) + 1) : NULL;
    char *b = json ? ipt_alloc(s->ctx, 3 * strlen(json) + 1) : NULL;
    png_structp png = NULL;
    png_infop info = NULL;
    bool ok = false;
    s->no_memory = (text && !a) || (json && !b);
    if (s->no_memory)
        goto end;
    memset(chunk, 0, sizeof chunk);
    if (a) {
        bool latin = to_latin1(text, a);
        if (!latin)
            to_clean_utf8(text, a);
        chunk[n++] =
            (png_text){.compression = latin ? PNG_TEXT_COMPRESSION_NONE : PNG_ITXT_COMPRESSION_NONE,
                       .key = key_text,
                       .text = a,
                       .lang = none,
                       .lang_key = none};
    }
    if (b) {
        to_clean_utf8(json, b);
        chunk[n++] = (png_text){.compression = PNG_ITXT_COMPRESSION_NONE,
                                .key = key_json,
                                .text = b,
                                .lang = none,
                                .lang_key = none};
    }
    png = png_create_write_struct(PNG_LIBPNG_VER_STRING, s, png_failed, png_warned);
    info = png ? png_create_info_struct(png) : NULL;
    s->no_memory = !info;
    ok = info && png_encode(png, info, s, px, chunk, n);
end:
    png_destroy_write_struct(&png, &info);
    ipt_free(a);
    ipt_free(b);
    return ok             ? IPT_OK
           : s->no_memory ? ipt_fail(s->ctx, IPT_ERR_NOMEM, "no memory for a PNG")
                          : IPT_ERR_OUTPUT;
}

ipt_status ipt_png_encode(ipt_ctx *ctx, const uint8_t *px, int32_t w, int32_t h, int32_t channels,
                          uint8_t **out, size_t *n)
{
    const pixels p = {px, w, h, channels};
    if (w < 1 || h < 1 || (channels != 1 && channels != 3 && channels != 4))
        return ipt_fail(ctx, IPT_ERR_ARG, "a PNG of %d x %d pixels and %d channels", w, h,
                        channels);
    sink *s = ipt_calloc(ctx, 1, sizeof *s);
    if (!s)
        return IPT_ERR_NOMEM;
    s->ctx = ctx;
    ipt_status status = encode_png(s, &p, NULL, NULL);
    if (status == IPT_ERR_OUTPUT)
        ipt_fail(ctx, status, "a PNG cannot be made: %s", s->why);
    if (status == IPT_OK) {
        *out = s->data;
        *n = s->n;
    } else {
        ipt_free(s->data);
    }
    ipt_free(s);
    return status;
}

/* --- JPEG ----------------------------------------------------------------------------------------
 */
enum { MARKER_ROOM = 65533 }; /* bytes that one marker can hold */

typedef struct jpeg_errors {
    struct jpeg_error_mgr base;
    sink *s;
} jpeg_errors;

static void jpeg_failed(j_common_ptr c)
{
    jpeg_errors *e = (jpeg_errors *)c->err;
    e->base.format_message(c, e->s->why);
    longjmp(e->s->jump, 1);
}

static void jpeg_warned(j_common_ptr c, int level)
{
    (void)c;
    (void)level;
}

/* EXIF with one field, UserComment: "UNICODE", NUL, UTF-16 big endian, which is what piexif writes
 * for A1111.  Cut at whole characters where the marker is full. */
static bool put_exif(sink *s, const char *text)
{
    static const uint8_t head[] = {
        'E', 'x', 'i',  'f',  0,   0,   'M', 'M', 0, 42, 0, 0, 0, 8, /* TIFF, first directory at 8
                                                                      */
        0,   1,   0x87, 0x69, 0,   4,   0,   0,   0, 1,  0, 0, 0, 26, 0,
        0,   0,   0, /* 0x8769: Exif directory at 26 */
        0,   1,   0x92, 0x86, 0,   7,   0,   0,   0, 0,  0, 0, 0, 44, 0,
        0,   0,   0, /* 0x9286: n bytes at 44 */
        'U', 'N', 'I',  'C',  'O', 'D', 'E', 0};
    enum { AT_COUNT = 38, AT_VALUE = 50 };
    if (!put(s, head, sizeof head))
        return false;
    for (uint32_t c; (c = ipt_utf8_next(&text)) != 0;) {
        uint8_t u[4] = {(uint8_t)(c >> 8), (uint8_t)c, 0, 0};
        size_t n = 2;
        if (c > 0xffff) {
            uint32_t high = 0xd800 + ((c - 0x10000) >> 10), low = 0xdc00 + ((c - 0x10000) & 0x3ff);
            u[0] = (uint8_t)(high >> 8);
            u[1] = (uint8_t)high;
            u[2] = (uint8_t)(low >> 8);
            u[3] = (uint8_t)low;
            n = 4;
        }
        if (s->n + n > MARKER_ROOM)
            break;
        if (!put(s, u, n))
            return false;
    }
    size_t count = s->n - AT_VALUE;
    for (int i = 0; i < 4; i++)
        s->data[AT_COUNT + i] = (uint8_t)(count >> (24 - 8 * i));
    return true;
}

typedef struct jpeg_job {
    struct jpeg_compress_struct c;
    jpeg_errors errors;
    struct jpeg_destination_mgr dest;
    sink out;
    JOCTET buf[8192];
} jpeg_job;

static void jpeg_put_start(j_compress_ptr c)
{
    jpeg_job *j = c->client_data;
    j->dest.next_output_byte = j->buf;
    j->dest.free_in_buffer = sizeof j->buf;
}

static boolean jpeg_put_full(j_compress_ptr c)
{
    jpeg_job *j = c->client_data;
    if (!put(&j->out, j->buf, sizeof j->buf)) {
        ipt_name(j->errors.s->why, sizeof j->errors.s->why, "out of memory");
        longjmp(j->errors.s->jump, 1);
    }
    jpeg_put_start(c);
    return TRUE;
}

static void jpeg_put_end(j_compress_ptr c)
{
    jpeg_job *j = c->client_data;
    if (!put(&j->out, j->buf, sizeof j->buf - j->dest.free_in_buffer)) {
        ipt_name(j->errors.s->why, sizeof j->errors.s->why, "out of memory");
        longjmp(j->errors.s->jump, 1);
    }
}

static bool jpeg_encode(jpeg_job *j, sink *exif, const ipt_image *im, const char *json)
{
    if (setjmp(exif->jump))
        return false;
    jpeg_create_compress(&j->c);
    j->c.client_data = j;
    j->c.dest = &j->dest;
    j->c.image_width = (JDIMENSION)im->w;
    j->c.image_height = (JDIMENSION)im->h;
    j->c.input_components = 3;
    j->c.in_color_space = JCS_RGB;
    jpeg_set_defaults(&j->c);
    jpeg_set_quality(&j->c, 95, TRUE);
    j->c.optimize_coding = TRUE;
    j->c.comp_info[0].h_samp_factor = j->c.comp_info[0].v_samp_factor =
        1; /* full colour resolution */
    jpeg_start_compress(&j->c, TRUE);
    if (exif->n)
        jpeg_write_marker(&j->c, JPEG_APP0 + 1, exif->data, (unsigned)exif->n);
    if (json && strlen(json) <= MARKER_ROOM)
        jpeg_write_marker(&j->c, JPEG_COM, (const JOCTET *)json, (unsigned)strlen(json));
    while (j->c.next_scanline < j->c.image_height) {
        JSAMPROW row = im->rgb + (size_t)j->c.next_scanline * (size_t)im->w * 3;
        jpeg_write_scanlines(&j->c, &row, 1);
    }
    jpeg_finish_compress(&j->c);
    return true;
}

static ipt_status save_jpeg(sink *s, const char *path, const ipt_image *im, const char *text,
                            const char *json)
{
    ipt_status status = IPT_OK;
    jpeg_job *j = ipt_calloc(s->ctx, 1, sizeof *j);
    if (!j)
        return IPT_ERR_NOMEM;
    j->c.err = jpeg_std_error(&j->errors.base);
    j->errors.base.error_exit = jpeg_failed;
    j->errors.base.emit_message = jpeg_warned;
    j->errors.s = s;
    j->dest.init_destination = jpeg_put_start;
    j->dest.empty_output_buffer = jpeg_put_full;
    j->dest.term_destination = jpeg_put_end;
    j->out.ctx = s->ctx;
    if (im->w > JPEG_MAX_DIMENSION || im->h > JPEG_MAX_DIMENSION)
        status =
            ipt_fail(s->ctx, IPT_ERR_OUTPUT, "%s: cannot write: a JPEG side is at most %ld pixels",
                     path, JPEG_MAX_DIMENSION);
    else if (text && !put_exif(s, text))
        status = IPT_ERR_NOMEM;
    else if (!jpeg_encode(j, s, im, json))
        status = ipt_fail(s->ctx, IPT_ERR_OUTPUT, "%s: cannot write: %s", path, s->why);
    jpeg_destroy_compress(&j->c);
    if (status == IPT_OK)
        status = ipt_file_write(s->ctx, path, j->out.data, j->out.n);
    ipt_free(j->out.data);
    ipt_free(j);
    return status;
}

ipt_status ipt_image_save(ipt_ctx *ctx, const char *path, const ipt_image *im, const char *text,
                          const char *json)
{
    const char *dot = strrchr(path, '.');
    bool is_png = dot && strcasecmp(dot, ".png") == 0;
    bool is_jpeg = dot && (strcasecmp(dot, ".jpg") == 0 || strcasecmp(dot, ".jpeg") == 0);
    if (!is_png && !is_jpeg)
        is_png = ipt_file_is_direct(path); /* a name without choice: /dev/stdout */
    if (!is_png && !is_jpeg)
        return ipt_fail(ctx, IPT_ERR_ARG, "%s: the name of a picture ends in .png, .jpg or .jpeg",
                        path);
    if (!im->rgb || im->w < 1 || im->h < 1)
        return ipt_fail(ctx, IPT_ERR_ARG, "%s: an empty picture", path);
    sink *s = ipt_calloc(ctx, 1, sizeof *s);
    if (!s)
        return IPT_ERR_NOMEM;
    s->ctx = ctx;
    ipt_status status;
    if (is_png) {
        const pixels px = {im->rgb, im->w, im->h, 3};
        status = encode_png(s, &px, text, json);
        if (status == IPT_ERR_OUTPUT)
            ipt_fail(ctx, status, "%s: cannot write: %s", path, s->why);
        if (status == IPT_OK)
            status = ipt_file_write(ctx, path, s->data, s->n);
    } else {
        status = save_jpeg(s, path, im, text, json);
    }
    ipt_free(s->data);
    ipt_free(s);
    return status;
}
