/* cli/explain.c - what each adapter did, as files: a heat map on the picture for each, a plot over
 * the steps and frequencies, the numbers as JSON, and all of it as layers. */
#include "cli/beside.h"
#include "cli/draw.h"
#include "cli/ora.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MARGIN = 16, STRIP = 14 };
static const uint8_t black[3] = {30, 30, 30}, grey[3] = {150, 150, 150}, light[3] = {225, 225, 225};

typedef struct sheet {
    ipt_arena *arena;
    const char *dir, *stem, *picture;
    const ipt_explanation *x;
    cli_list *files;
    char (*name)[CLI_NAME]; /* [x->n] of adapters, in names of files */
} sheet;

/* --- fields ----------------------------------------------------------------------------------- */
/* Values on cells of the picture. */
typedef struct field {
    float *v; /* [h,w] */
    int32_t h, w;
    double least, most;
} field;

/* The roots of energies are as large as what they change; attention stays what it is. */
static ipt_status make_field(ipt_ctx *ctx, const float *v, int32_t h, int32_t w, bool is_energy,
                             field *out)
{
    size_t n = (size_t)h * (size_t)w;
    field f = {ipt_calloc(ctx, n, sizeof *f.v), h, w, (double)INFINITY, 0};
    if (!f.v)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++) {
        f.v[i] = is_energy ? sqrtf(v[i]) : v[i];
        f.least = fmin(f.least, (double)f.v[i]);
        f.most = fmax(f.most, (double)f.v[i]);
    }
    *out = f;
    return IPT_OK;
}

/* 0..1 between the field's least and most at a place 0..1 of the picture, straight between the
 * middles of cells. */
static double read_field(const field *f, double y, double x)
{
    double cy = fmin(f->h - 1, fmax(0, y * f->h - 0.5)),
           cx = fmin(f->w - 1, fmax(0, x * f->w - 0.5)), ay = cy - floor(cy), ax = cx - floor(cx),
           sum = 0;
    size_t y0 = (size_t)cy, x0 = (size_t)cx, w = (size_t)f->w;
    size_t y1 = y0 + 1 < (size_t)f->h ? y0 + 1 : y0, x1 = x0 + 1 < w ? x0 + 1 : x0;
    sum += (1 - ay) * ((1 - ax) * (double)f->v[y0 * w + x0] + ax * (double)f->v[y0 * w + x1]);
    sum += ay * ((1 - ax) * (double)f->v[y1 * w + x0] + ax * (double)f->v[y1 * w + x1]);
    return f->most > f->least ? (sum - f->least) / (f->most - f->least) : 0;
}

/* --- where ------------------------------------------------------------------------------------ */
/* A text cut to what fits. */
static void label(ipt_image *im, int32_t x, int32_t y, int32_t scale, int32_t width,
                  const uint8_t rgb[3], const char *text)
{
    char cut[256];
    ipt_name(cut, sizeof cut, "%s", text);
    for (size_t n = strlen(cut); n > 2 && cli_draw_text_width(cut, scale) > width;
         n = strlen(cut)) {
        do
            n--;
        while (n > 2 && ((uint8_t)cut[n] & 0xc0) == 0x80);
        memcpy(cut + n - 2, "..", 3);
    }
    cli_draw_text(im, x, y, scale, rgb, cut);
}

/* The picture, greyer and lighter, under the colours of a field; each pixel k x k. */
static void draw_field(ipt_image *to, int32_t left, int32_t top, int32_t k, const ipt_image *im,
                       const field *f)
{
    int32_t w = im->w * k, h = im->h * k;
    for (int32_t y = 0; y < h; y++)
        for (int32_t x = 0; x < w; x++) {
            const uint8_t *p = im->rgb + ((size_t)(y / k) * (size_t)im->w + (size_t)(x / k)) * 3;
            double v = read_field(f, (y + 0.5) / h, (x + 0.5) / w), share = 0.25 + 0.5 * v,
                   luma = 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2];
            uint8_t rgb[3];
            cli_draw_heat(v, rgb);
            for (int c = 0; c < 3; c++) {
                double under = 0.35 * p[c] + 0.65 * luma;
                rgb[c] = (uint8_t)lrint(under + share * (rgb[c] - under));
            }
            cli_draw_fill(to, left + x, top + y, 1, 1, rgb);
        }
}

/* The colours from a field's least to its most, with both numbers and what they mean. */
static void draw_scale(ipt_image *to, int32_t left, int32_t top, int32_t w, int32_t scale,
                       const field *f, const char *what)
{
    char text[32];
    int32_t line = top + STRIP + 6;
    for (int32_t x = 0; x < w; x++) {
        uint8_t rgb[3];
        cli_draw_heat((x + 0.5) / w, rgb);
        cli_draw_fill(to, left + x, top, 1, STRIP, rgb);
    }
    ipt_name(text, sizeof text, "%.3g", f->least);
    cli_draw_text(to, left, line, scale, black, text);
    ipt_name(text, sizeof text, "%.3g", f->most);
    cli_draw_text(to, left + w - cli_draw_text_width(text, scale), line, scale, black, text);
    label(to, left, line + (CLI_TEXT_H + 2) * scale, scale, w, grey, what);
}

static const char *called(const ipt_effect *f, char *buf, size_t n)
{
    return f->word ? ipt_name(buf, n, "%.*s (%s)", (int)strcspn(f->word, "#="), f->word, f->name)
                   : ipt_name(buf, n, "%s", f->name);
}

/* Panels side by side: what the adapter did, and what its words looked at. */
static ipt_status draw_where(ipt_ctx *ctx, const ipt_explanation *x, const ipt_effect *f,
                             const field *energy, const field *words, ipt_image *out)
{
    enum { LEAST = 384 };
    int32_t side = x->im->w > x->im->h ? x->im->w : x->im->h, k = side < LEAST ? LEAST / side : 1,
            w = x->im->w * k, h = x->im->h * k, scale = w < 800 ? 2 : 3,
            text = (CLI_TEXT_H + 2) * scale, top = MARGIN + text;
    char name[256];
    IPT_TRY(cli_draw_create(ctx, MARGIN + (w + MARGIN) * (words ? 2 : 1),
                            top + h + STRIP + 2 * text + 2 * MARGIN, out));
    label(out, MARGIN, MARGIN, scale, out->w - 2 * MARGIN, black, called(f, name, sizeof name));
    const field *const panel[] = {energy, words};
    static const char *const what[] = {"where it acted (RMS per cell)", "what its words looked at"};
    for (int i = 0; i < 2 && panel[i]; i++) {
        draw_field(out, MARGIN + i * (w + MARGIN), top, k, x->im, panel[i]);
        draw_scale(out, MARGIN + i * (w + MARGIN), top + h + 8, w, scale, panel[i], what[i]);
    }
    return IPT_OK;
}

static ipt_status save_image(const sheet *s, const char *rest, const ipt_image *im)
{
    uint8_t *png = NULL;
    size_t n = 0;
    IPT_TRY(ipt_png_encode(s->arena->ctx, im->rgb, im->w, im->h, 3, &png, &n));
    ipt_status status = cli_beside_write(s->arena, s->dir, s->stem, rest, png, n, s->files);
    ipt_free(png);
    return status;
}

static ipt_status save_where(const sheet *s, size_t k)
{
    const ipt_effect *f = &s->x->effect[k];
    ipt_ctx *ctx = s->arena->ctx;
    field energy = {0}, words = {0};
    ipt_image im = {0};
    char rest[CLI_NAME + 16];
    ipt_status status = make_field(ctx, f->energy, s->x->h, s->x->w, true, &energy);
    if (status == IPT_OK && f->words)
        status = make_field(ctx, f->words, f->words_h, f->words_w, false, &words);
    if (status == IPT_OK)
        status = draw_where(ctx, s->x, f, &energy, f->words ? &words : NULL, &im);
    if (status == IPT_OK)
        status =
            save_image(s, ipt_name(rest, sizeof rest, "-%s" CLI_WHERE ".png", s->name[k]), &im);
    ipt_image_finish(&im);
    ipt_free(energy.v);
    ipt_free(words.v);
    return status;
}

/* --- when, and at which frequencies ----------------------------------------------------------- */
enum { PLOT_W = 900, PANEL = 220, AXIS = 96, LINE = 2 * (CLI_TEXT_H + 2) };

typedef struct frame {
    ipt_image *im;
    int32_t left, top, w, h;
    double most;
} frame;

/* The axis with two lines across, numbers at its ends and half way, and a title above. */
static void draw_frame(const frame *f, const char *title, const char *format)
{
    char text[32];
    cli_draw_text(f->im, f->left, f->top - LINE - 6, 2, black, title);
    for (int i = 0; i <= 2; i++) {
        int32_t y = f->top + f->h - f->h * i / 2;
        cli_draw_fill(f->im, f->left, y, f->w, i == 0 ? 2 : 1, i == 0 ? black : light);
        ipt_name(text, sizeof text, "%.3g%s", f->most * i / 2, format);
        cli_draw_text(f->im, f->left - 8 - cli_draw_text_width(text, 2), y - CLI_TEXT_H, 2, grey,
                      text);
    }
}

static const uint8_t *colour_of(size_t k) { return cli_series[k % CLI_SERIES].rgb; }

/* As large as what changes: the root of the share of the energy, in percent. */
static double share_of(const ipt_effect *f, int32_t step)
{
    return 100 * sqrt((double)f->share[step]);
}

static void draw_steps(const ipt_explanation *x, const frame *f)
{
    char text[32];
    for (int32_t i = 0; i < x->n_step; i += (x->n_step + 9) / 10) {
        ipt_name(text, sizeof text, "%d", x->step[i] + 1);
        cli_draw_text(f->im,
                      (int32_t)(f->left + (i + 0.5) * f->w / x->n_step) -
                          cli_draw_text_width(text, 2) / 2,
                      f->top + f->h + 8, 2, grey, text);
    }
}

static void draw_when(const ipt_explanation *x, frame *f)
{
    for (size_t k = 0; k < x->n; k++)
        for (int32_t i = 0; i < x->n_step; i++)
            f->most = fmax(f->most, share_of(&x->effect[k], i));
    draw_frame(f, "when: RMS in each step, of the prediction's", "%");
    draw_steps(x, f);
    double high = f->most > 0 ? f->h / f->most : 0, wide = f->w / (double)x->n_step;
    for (size_t k = 0; k < x->n; k++)
        for (int32_t i = 0; i < x->n_step; i++) {
            int32_t to = i + 1 < x->n_step ? i + 1 : i;
            cli_draw_line(f->im, f->left + (i + 0.5) * wide,
                          f->top + f->h - share_of(&x->effect[k], i) * high,
                          f->left + (to + 0.5) * wide,
                          f->top + f->h - share_of(&x->effect[k], to) * high, 3, colour_of(k));
        }
}

static void draw_bands(const ipt_explanation *x, frame *f)
{
    for (size_t i = 0; i < x->n * IPT_BANDS; i++)
        f->most = fmax(f->most, (double)x->effect[i / IPT_BANDS].band[i % IPT_BANDS]);
    draw_frame(f, "at which frequencies: amplitude, from coarse to fine", "");
    int32_t group = f->w / IPT_BANDS, bar = (int32_t)(0.8 * group / (double)x->n);
    bar = bar > 0 ? bar : 1;
    for (int32_t b = 0; b < IPT_BANDS; b++) {
        char text[32];
        for (size_t k = 0; k < x->n && f->most > 0; k++) {
            int32_t h = (int32_t)lrint((double)x->effect[k].band[b] / f->most * f->h);
            cli_draw_fill(f->im, f->left + b * group + group / 10 + (int32_t)k * bar,
                          f->top + f->h - h, bar, h, colour_of(k));
        }
        ipt_name(text, sizeof text, b == 0 ? "coarse" : b + 1 == IPT_BANDS ? "fine" : "%d/8", b);
        cli_draw_text(f->im, f->left + b * group + (group - cli_draw_text_width(text, 2)) / 2,
                      f->top + f->h + 8, 2, grey, text);
    }
}

/* A square of its colour, its name, and how much it did in all. */
static void draw_legend(const ipt_explanation *x, size_t k, ipt_image *im)
{
    const ipt_effect *f = &x->effect[k];
    char name[256], text[512];
    int32_t y = MARGIN + (int32_t)k * LINE;
    double energy = 0, power = 0;
    for (int32_t i = 0; i < x->n_step; i++) {
        energy += (double)f->when[i];
        power += (double)x->power[i];
    }
    ipt_name(text, sizeof text, "%3.0f%% RMS, %3.0f%% of energy fine: %s",
             power > 0 ? 100 * sqrt(energy / power) : 0, 100 * (double)f->high,
             called(f, name, sizeof name));
    cli_draw_fill(im, MARGIN, y, 14, 14, colour_of(k));
    label(im, MARGIN + 24, y, 2, PLOT_W - 2 * MARGIN - 24, black, text);
}

static ipt_status save_when(const sheet *s)
{
    const ipt_explanation *x = s->x;
    ipt_image im = {0};
    int32_t top = 2 * MARGIN + LINE * ((int32_t)x->n + 1), next = top + PANEL + 3 * LINE;
    IPT_TRY(cli_draw_create(s->arena->ctx, PLOT_W, next + PANEL + 2 * LINE, &im));
    for (size_t k = 0; k < x->n; k++)
        draw_legend(x, k, &im);
    frame when = {&im, AXIS, top, PLOT_W - AXIS - MARGIN, PANEL, 0},
          bands = {&im, AXIS, next, PLOT_W - AXIS - MARGIN, PANEL, 0};
    draw_when(x, &when);
    draw_bands(x, &bands);
    ipt_status status = save_image(s, CLI_WHEN ".png", &im);
    ipt_image_finish(&im);
    return status;
}

/* --- numbers ---------------------------------------------------------------------------------- */
static json_t *list_of(const float *v, size_t n)
{
    json_t *a = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(a, json_real((double)v[i]));
    return a;
}

/* Rows of cells, from the top; null for NULL. */
static json_t *rows_of(const float *v, int32_t h, int32_t w)
{
    json_t *a = v ? json_array() : json_null();
    for (int32_t y = 0; v && y < h; y++)
        json_array_append_new(a, list_of(v + (size_t)y * (size_t)w, (size_t)w));
    return a;
}

static json_t *effect_json(const ipt_explanation *x, const ipt_effect *f)
{
    json_t *o = json_object();
    size_t steps = (size_t)x->n_step;
    json_object_set_new(o, "name", ipt_json_text(f->name));
    json_object_set_new(o, "file", ipt_json_text(f->file));
    json_object_set_new(o, "word", ipt_json_text(f->word));
    json_object_set_new(o, "energy", rows_of(f->energy, x->h, x->w));
    json_object_set_new(o, "energy_of_step", list_of(f->when, steps));
    json_object_set_new(o, "share_of_step", list_of(f->share, steps));
    json_object_set_new(o, "amplitude_of_band", list_of(f->band, IPT_BANDS));
    json_object_set_new(o, "high", json_real((double)f->high));
    json_object_set_new(o, "words", rows_of(f->words, f->words_h, f->words_w));
    json_object_set_new(o, "mask", rows_of(f->mask, x->h, x->w));
    return o;
}

/* What the numbers mean, for who finds the file. */
static json_t *units_json(void)
{
    static const char *const unit[][2] = {
        {"contribution", "the guided noise prediction of a step's first evaluation less what it is "
                         "without the adapter in the rows in which it acts"},
        {"power", "mean square of the guided prediction, by step"},
        {"energy", "mean over channels and steps of the contribution's square, by latent cell"},
        {"energy_of_step", "mean over channels and cells of the contribution's square"},
        {"share_of_step", "energy_of_step over power; interactions make sums unlike 1"},
        {"amplitude_of_band",
         "mean amplitude of the contribution's unitary Fourier transform, root of the mean square "
         "over channels, in 8 equal rings from the lowest frequency to the highest, mean of steps"},
        {"high", "share of the energy at radii from 0.2 of the largest on"},
        {"words", "attention that the adapter's words drew, by cell of the attention's grid, mean "
                  "of heads, layers, tokens and steps; null: not read"},
        {"mask", "of the method at the last evaluation, by latent cell; null: it has none"},
    };
    json_t *o = json_object();
    for (size_t i = 0; i < IPT_COUNT(unit); i++)
        json_object_set_new(o, unit[i][0], ipt_json_text(unit[i][1]));
    return o;
}

static ipt_status save_json(const sheet *s)
{
    const ipt_explanation *x = s->x;
    json_t *o = json_object(), *steps = json_array(), *adapters = json_array();
    for (int32_t i = 0; i < x->n_step; i++)
        json_array_append_new(steps, json_integer(x->step[i] + 1));
    for (size_t k = 0; k < x->n; k++)
        json_array_append_new(adapters, effect_json(x, &x->effect[k]));
    json_object_set_new(o, "picture", ipt_json_text(s->picture));
    json_object_set_new(o, "width", json_integer(x->im->w));
    json_object_set_new(o, "height", json_integer(x->im->h));
    json_object_set_new(o, "latent_width", json_integer(x->w));
    json_object_set_new(o, "latent_height", json_integer(x->h));
    json_object_set_new(o, "units", units_json());
    json_object_set_new(o, "steps", steps);
    json_object_set_new(o, "power", list_of(x->power, (size_t)x->n_step));
    json_object_set_new(o, "adapters", adapters);
    char *text = json_dumps(o, JSON_INDENT(1) | JSON_REAL_PRECISION(7));
    json_decref(o);
    if (!text)
        return ipt_fail(s->arena->ctx, IPT_ERR_NOMEM, "no memory for an explanation");
    ipt_status status =
        cli_beside_write(s->arena, s->dir, s->stem, ".json", text, strlen(text), s->files);
    free(text);
    return status;
}

/* --- layers ----------------------------------------------------------------------------------- */
/* A field as the opacity of one colour. */
static void tint(const ipt_image *im, const field *f, const uint8_t rgb[3], uint8_t *px)
{
    for (int32_t y = 0; y < im->h; y++)
        for (int32_t x = 0; x < im->w; x++, px += 4) {
            memcpy(px, rgb, 3);
            px[3] = (uint8_t)lrint(255 * read_field(f, (y + 0.5) / im->h, (x + 0.5) / im->w));
        }
}

static ipt_status add_field(const sheet *s, cli_ora *o, size_t k, bool is_energy, uint8_t *px)
{
    const ipt_effect *f = &s->x->effect[k];
    char name[256], title[320];
    field v = {0};
    ipt_status status =
        is_energy ? make_field(s->arena->ctx, f->energy, s->x->h, s->x->w, true, &v)
                  : make_field(s->arena->ctx, f->words, f->words_h, f->words_w, false, &v);
    IPT_TRY(status);
    tint(s->x->im, &v, colour_of(k), px);
    ipt_free(v.v);
    ipt_name(title, sizeof title, is_energy ? "%s acted here" : "%s: its words looked here",
             called(f, name, sizeof name));
    const cli_layer l = {title, px, 4, 0.8, !is_energy};
    return cli_ora_add(o, &l);
}

static ipt_status add_mask(const sheet *s, cli_ora *o, size_t k, uint8_t *px)
{
    const ipt_effect *f = &s->x->effect[k];
    char name[256], title[320];
    cli_mask_pixels(f->mask, s->x->h, s->x->w, s->x->im, px);
    ipt_name(title, sizeof title, "%s: mask", called(f, name, sizeof name));
    const cli_layer l = {title, px, 1, 0.6, true};
    return cli_ora_add(o, &l);
}

static ipt_status add_layers(const sheet *s, cli_ora *o, uint8_t *px)
{
    const ipt_explanation *x = s->x;
    const cli_layer picture = {"picture", x->im->rgb, 3, 1, false};
    IPT_TRY(cli_ora_add(o, &picture));
    for (size_t k = 0; k < x->n; k++)
        if (x->effect[k].mask)
            IPT_TRY(add_mask(s, o, k, px));
    for (size_t k = 0; k < x->n; k++)
        if (x->effect[k].words)
            IPT_TRY(add_field(s, o, k, false, px));
    for (size_t k = 0; k < x->n; k++)
        IPT_TRY(add_field(s, o, k, true, px));
    return cli_ora_end(o);
}

static ipt_status save_layers(const sheet *s)
{
    const ipt_image *im = s->x->im;
    cli_ora o = {0};
    uint8_t *px = ipt_calloc(s->arena->ctx, (size_t)im->w * (size_t)im->h, 4);
    ipt_status status = px ? cli_ora_begin(s->arena->ctx, im->w, im->h, &o) : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        status = add_layers(s, &o, px);
    if (status == IPT_OK)
        status = cli_beside_write(s->arena, s->dir, s->stem, ".ora", o.zip.data, o.zip.n, s->files);
    cli_ora_finish(&o);
    ipt_free(px);
    return status;
}

ipt_status cli_explain_save(ipt_arena *arena, const char *dir, const char *stem,
                            const char *picture, const ipt_explanation *x, cli_list *files)
{
    sheet s = {arena, dir, stem, picture, x, files, ipt_calloc(arena->ctx, x->n, sizeof *s.name)};
    ipt_status status = s.name ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t k = 0; k < x->n && status == IPT_OK; k++) {
        cli_adapter_name(x->effect[k].name, x->effect[k].word, s.name, k, s.name[k]);
        status = save_where(&s, k);
    }
    if (status == IPT_OK)
        status = save_when(&s);
    if (status == IPT_OK)
        status = save_json(&s);
    if (status == IPT_OK)
        status = save_layers(&s);
    ipt_free(s.name);
    return status;
}
