/* eval/sheet.c - pictures side by side, with what they are in small letters. */
#include "eval/sheet.h"

#include <limits.h>
#include <string.h>

enum { CELL = 96, GAP = 4, LINE = 14, ZOOM = 2, ADVANCE = 7 };

/* Letters of 3 x 5 points: rows from the top, three bits each. */
static const struct {
    char c;
    uint8_t row[5];
} font[] = {
    {'a', {2, 5, 7, 5, 5}}, {'b', {6, 5, 6, 5, 6}}, {'c', {3, 4, 4, 4, 3}}, {'d', {6, 5, 5, 5, 6}},
    {'e', {7, 4, 6, 4, 7}}, {'f', {7, 4, 6, 4, 4}}, {'g', {3, 4, 5, 5, 3}}, {'h', {5, 5, 7, 5, 5}},
    {'i', {7, 2, 2, 2, 7}}, {'j', {1, 1, 1, 5, 2}}, {'k', {5, 5, 6, 5, 5}}, {'l', {4, 4, 4, 4, 7}},
    {'m', {5, 7, 7, 5, 5}}, {'n', {6, 5, 5, 5, 5}}, {'o', {2, 5, 5, 5, 2}}, {'p', {6, 5, 6, 4, 4}},
    {'q', {2, 5, 5, 7, 3}}, {'r', {6, 5, 6, 5, 5}}, {'s', {3, 4, 2, 1, 6}}, {'t', {7, 2, 2, 2, 2}},
    {'u', {5, 5, 5, 5, 7}}, {'v', {5, 5, 5, 5, 2}}, {'w', {5, 5, 7, 7, 5}}, {'x', {5, 5, 2, 5, 5}},
    {'y', {5, 5, 2, 2, 2}}, {'z', {7, 1, 2, 4, 7}}, {'0', {7, 5, 5, 5, 7}}, {'1', {2, 6, 2, 2, 7}},
    {'2', {7, 1, 7, 4, 7}}, {'3', {7, 1, 7, 1, 7}}, {'4', {5, 5, 7, 1, 1}}, {'5', {7, 4, 7, 1, 7}},
    {'6', {7, 4, 7, 5, 7}}, {'7', {7, 1, 2, 2, 2}}, {'8', {7, 5, 7, 5, 7}}, {'9', {7, 5, 7, 1, 7}},
    {':', {0, 2, 0, 2, 0}}, {'=', {0, 7, 0, 7, 0}}, {'-', {0, 0, 7, 0, 0}}, {'+', {0, 2, 7, 2, 0}},
    {'.', {0, 0, 0, 0, 2}}, {';', {0, 2, 0, 2, 4}}, {',', {0, 0, 0, 2, 4}},
};

static void draw_letter(ipt_image *im, const uint8_t row[5], int32_t left, int32_t top)
{
    for (int32_t y = 0; y < 5 * ZOOM; y++)
        for (int32_t x = 0; x < 3 * ZOOM; x++)
            if (row[y / ZOOM] & 4 >> x / ZOOM)
                memset(im->rgb + ((size_t)(top + y) * (size_t)im->w + (size_t)(left + x)) * 3, 60,
                       3);
}

/* As much of the text as fits into `width` pixels. */
static void draw_text(ipt_image *im, const char *text, int32_t left, int32_t top, int32_t width)
{
    for (int32_t x = left; *text && x + 3 * ZOOM <= left + width; text++, x += ADVANCE)
        for (size_t i = 0; i < IPT_COUNT(font); i++)
            if (font[i].c == *text)
                draw_letter(im, font[i].row, x, top);
}

/* One picture of a file, in a square of `edge`. */
static ipt_status paste(const ipt_eval *v, const char *path, ipt_image *sheet, int32_t left,
                        int32_t top, int32_t edge)
{
    ipt_image im = {0};
    IPT_TRY(ipt_image_load(v->ctx, path, &im));
    ipt_status status =
        im.w == edge && im.h == edge ? IPT_OK : ipt_image_resize(v->ctx, &im, edge, edge);
    for (int32_t y = 0; y < edge && status == IPT_OK; y++)
        memcpy(sheet->rgb + ((size_t)(top + y) * (size_t)sheet->w + (size_t)left) * 3,
               im.rgb + (size_t)y * (size_t)edge * 3, (size_t)edge * 3);
    ipt_image_finish(&im);
    return status;
}

static ipt_status paste_method(const ipt_eval *v, size_t method, size_t set, ipt_image *sheet,
                               int32_t left, int32_t top)
{
    const int parts = v->method[method].kind == IPT_EVAL_SINGLE ? v->world.set[set].k : 1;
    const int side = parts == 1 ? 1 : parts <= 4 ? 2 : 3;
    char path[PATH_MAX];
    for (int p = 0; p < parts; p++) {
        if (!ipt_eval_file(v, method, set, 0, p, ".png", path, sizeof path))
            return ipt_fail(v->ctx, IPT_ERR_OUTPUT, "%.100s...: path too long", v->o.out);
        IPT_TRY(paste(v, path, sheet, left + p % side * (CELL / side),
                      top + p / side * (CELL / side), CELL / side));
    }
    return IPT_OK;
}

static void name_set(const ipt_eval *v, const ipt_world_set *s, char *buf, size_t n)
{
    size_t at = 0;
    buf[0] = 0;
    for (int i = 0; i < s->k && at < n; i++)
        at += (size_t)snprintf(buf + at, n - at, "%s%s", i ? " + " : "",
                               v->world.concept[s->concept[i]].name);
    if (s->style_adapter >= 0 && at < n)
        snprintf(buf + at, n - at, ", %s", s->style);
}

static ipt_status fill(const ipt_eval *v, size_t rows, ipt_image *sheet)
{
    char name[256];
    for (size_t m = 0; m < v->n_method; m++)
        draw_text(sheet, v->method[m].label, (int32_t)m * (CELL + GAP), 0, CELL);
    for (size_t s = 0; s < rows; s++) {
        const int32_t top = LINE + (int32_t)s * (CELL + LINE);
        name_set(v, &v->world.set[s], name, sizeof name);
        draw_text(sheet, name, 0, top + 1, sheet->w);
        for (size_t m = 0; m < v->n_method; m++)
            IPT_TRY(paste_method(v, m, s, sheet, (int32_t)m * (CELL + GAP), top + LINE - 1));
    }
    return IPT_OK;
}

ipt_status ipt_eval_sheet(const ipt_eval *v)
{
    char path[PATH_MAX];
    const size_t rows = v->n_set < IPT_SHEET_ROWS ? v->n_set : IPT_SHEET_ROWS,
                 w = v->n_method * (CELL + GAP) - GAP, h = LINE + rows * (CELL + LINE);
    ipt_image sheet = {(int32_t)w, (int32_t)h, ipt_calloc(v->ctx, w * h, 3)};
    if (!sheet.rgb)
        return IPT_ERR_NOMEM;
    memset(sheet.rgb, 255, w * h * 3);
    ipt_status status = fill(v, rows, &sheet);
    if (status == IPT_OK && !ipt_path_join(path, sizeof path, v->o.out, "sheet.png"))
        status = ipt_fail(v->ctx, IPT_ERR_OUTPUT, "%.100s...: path too long", v->o.out);
    if (status == IPT_OK)
        status = ipt_image_save(v->ctx, path, &sheet, NULL, NULL);
    ipt_image_finish(&sheet);
    return status;
}
