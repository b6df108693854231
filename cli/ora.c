/* cli/ora.c - see ora.h. */
#include "cli/ora.h"

#include "engine/impasto.h"

#include <math.h>
#include <string.h>

ipt_status cli_ora_begin(ipt_ctx *ctx, int32_t w, int32_t h, cli_ora *o)
{
    static const char type[] = "image/openraster";
    *o = (cli_ora){.zip.ctx = ctx, .w = w, .h = h};
    o->merged = ipt_calloc(ctx, (size_t)w * (size_t)h, 3);
    o->stack = ipt_strdup(ctx, "");
    if (!o->merged || !o->stack)
        return IPT_ERR_NOMEM;
    memset(o->merged, 255, (size_t)w * (size_t)h * 3);
    return cli_zip_add(&o->zip, "mimetype", type, sizeof type - 1);
}

static ipt_status add_png(cli_ora *o, const char *name, const uint8_t *px, int32_t w, int32_t h,
                          int32_t channels)
{
    uint8_t *png = NULL;
    size_t n = 0;
    IPT_TRY(ipt_png_encode(o->zip.ctx, px, w, h, channels, &png, &n));
    ipt_status status = cli_zip_add(&o->zip, name, png, n);
    ipt_free(png);
    return status;
}

/* --- layers ----------------------------------------------------------------------------------- */
/* A text as the value of an attribute, into out [6 * IPT_PRINTABLE * strlen(text) + 1]. */
static void to_xml(const char *text, char *out)
{
    char piece[IPT_PRINTABLE];
    for (size_t n; (n = ipt_printable_next(&text, piece)) > 0;) {
        if (n == 3 && memcmp(piece, "\xef\xbf", 2) == 0 && (uint8_t)piece[2] >= 0xbe)
            piece[0] = '?', n = 1; /* U+FFFE, U+FFFF: no characters of XML */
        for (size_t i = 0; i < n; i++) {
            const char *as = piece[i] == '&'   ? "&amp;"
                             : piece[i] == '<' ? "&lt;"
                             : piece[i] == '>' ? "&gt;"
                             : piece[i] == '"' ? "&quot;"
                                               : NULL;
            size_t len = as ? strlen(as) : 1;
            memcpy(out, as ? as : &piece[i], len);
            out += len;
        }
    }
    *out = 0;
}

/* One more element before those that are there: the topmost comes first. */
static ipt_status describe(cli_ora *o, const cli_layer *l, const char *src)
{
    ipt_ctx *ctx = o->zip.ctx;
    size_t room = (size_t)6 * IPT_PRINTABLE * strlen(l->name) + 1,
           all = room + strlen(o->stack) + 256;
    char *name = ipt_alloc(ctx, room), *stack = ipt_alloc(ctx, all);
    if (name && stack) {
        to_xml(l->name, name);
        ipt_name(stack, all,
                 "  <layer name=\"%s\" src=\"%s\" x=\"0\" y=\"0\" opacity=\"%.2f\" "
                 "visibility=\"%s\" composite-op=\"svg:src-over\"/>\n%s",
                 name, src, l->opacity, l->is_hidden ? "hidden" : "visible", o->stack);
        ipt_free(o->stack);
        o->stack = stack;
    } else {
        ipt_free(stack);
    }
    ipt_free(name);
    return name && stack ? IPT_OK : IPT_ERR_NOMEM;
}

static void merge(cli_ora *o, const cli_layer *l)
{
    size_t n = (size_t)o->w * (size_t)o->h, c = (size_t)l->channels;
    for (size_t i = 0; i < n * 3; i++) {
        const uint8_t *p = l->px + i / 3 * c;
        double share = l->opacity * (c == 4 ? p[3] / 255.0 : 1);
        uint8_t *to = &o->merged[i];
        *to = (uint8_t)lrint(*to + share * (p[c == 1 ? 0 : i % 3] - *to));
    }
}

ipt_status cli_ora_add(cli_ora *o, const cli_layer *l)
{
    char src[32];
    ipt_name(src, sizeof src, "data/layer%d.png", o->n_layer);
    IPT_TRY(add_png(o, src, l->px, o->w, o->h, l->channels));
    IPT_TRY(describe(o, l, src));
    o->n_layer++;
    if (!l->is_hidden)
        merge(o, l);
    return IPT_OK;
}

/* --- the end ---------------------------------------------------------------------------------- */
/* Within 256 x 256, never enlarged. */
static ipt_status add_thumbnail(cli_ora *o)
{
    enum { SIDE = 256 };
    double by = fmin(1, (double)SIDE / (o->w > o->h ? o->w : o->h));
    int32_t w = (int32_t)fmax(1, o->w * by), h = (int32_t)fmax(1, o->h * by);
    size_t n = (size_t)o->w * (size_t)o->h * 3;
    ipt_image im = {o->w, o->h, ipt_alloc(o->zip.ctx, n)};
    if (!im.rgb)
        return IPT_ERR_NOMEM;
    memcpy(im.rgb, o->merged, n);
    ipt_status status = ipt_image_resize(o->zip.ctx, &im, w, h);
    if (status == IPT_OK)
        status = add_png(o, "Thumbnails/thumbnail.png", im.rgb, w, h, 3);
    ipt_image_finish(&im);
    return status;
}

ipt_status cli_ora_end(cli_ora *o)
{
    size_t room = strlen(o->stack) + 256;
    char *xml = ipt_alloc(o->zip.ctx, room);
    if (!xml)
        return IPT_ERR_NOMEM;
    ipt_name(xml, room,
             "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
             "<image version=\"0.0.3\" w=\"%d\" h=\"%d\">\n <stack>\n%s </stack>\n</image>\n",
             o->w, o->h, o->stack);
    ipt_status status = cli_zip_add(&o->zip, "stack.xml", xml, strlen(xml));
    ipt_free(xml);
    IPT_TRY(status);
    IPT_TRY(add_png(o, "mergedimage.png", o->merged, o->w, o->h, 3));
    IPT_TRY(add_thumbnail(o));
    return cli_zip_end(&o->zip);
}

void cli_ora_finish(cli_ora *o)
{
    cli_zip_finish(&o->zip);
    ipt_free(o->merged);
    ipt_free(o->stack);
    *o = (cli_ora){0};
}
