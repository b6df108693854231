/* graph/winograd.c - Winograd convolutions as dispatches: the transforms of the weight (u), of the
 * picture (v), one product for each of 36 positions (m), and the way back.
 *
 * The weight is transformed anew each time, from the panels that lie on the device: kept, it would
 * be four times the weight, in f32 eight times.  It is made in chunks of columns, the picture's
 * transform in bands of lines of tiles, so that the three stay small beside a model. */
#include "graph/winograd.h"

/* shaders/winograd.glsl */
typedef struct winograd_push {
    int32_t n, tiles, each, tile0, tw, th, quads, h, w, vh, vw, pad, oh, ow, cols, col0, ldy, y0,
        first, panel0, depth, shift, adds;
} winograd_push;
_Static_assert(sizeof(winograd_push) <= IPT_MAX_PUSH, "winograd push block");

enum { HAS_BIAS = 1, HAS_T = 2 };
enum { POSITIONS = 36, PANEL = 32, WG = 64, TAIL = 32 * 32 * 4 };
enum { U_BYTES = 24 << 20, V_BYTES = 24 << 20, M_BYTES = 16 << 20 };
/* What an element of u, v and m costs beside the products, in multiply-adds (llvmpipe 22.3.6).  v,
 * m: counted, a load of four floats by each of eight lanes 5 ns, a store 24 ns, a multiply-add 0.05
 * ns. u, which passes through memory: so that 16 x 16 cells of 1280 channels come out as measured.
 */
enum { U_COST = 75, V_COST = 18, M_COST = 25 };

typedef struct winograd {
    const ipt_gemm *g;
    int32_t tw, th, lines;     /* tiles in a line, lines in an image, lines of all images */
    int32_t kpad, panels;      /* of the whole weight */
    int32_t chunk, band, unit; /* panels; lines; tiles come in multiples of unit */
} winograd;

static int64_t padded(const winograd *w, int64_t tiles)
{
    return (tiles + w->unit - 1) / w->unit * w->unit;
}

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Chunk and band; false: not even the smallest fits the device's bindings. */
static bool size_up(const ipt_launch *l, const ipt_gemm *g, winograd *w)
{
    const ipt_traits *dev = l->dev;
    const uint64_t limit = least(dev->max_range, dev->max_texels * 16);
    *w = (winograd){.g = g,
                    .tw = (g->walk.ow + 3) / 4,
                    .th = (g->walk.oh + 3) / 4,
                    .kpad = ipt_pad4(g->k),
                    .panels = (g->cols + PANEL - 1) / PANEL,
                    .unit = dev->subgroup > 16 ? (int32_t)dev->subgroup : 16};
    w->lines = w->th * g->walk.n;
    const uint64_t panel = (uint64_t)POSITIONS * (uint64_t)w->kpad * PANEL * 4;
    if (limit < panel + TAIL)
        return false;
    const uint64_t room = least(U_BYTES, limit - TAIL) / panel;
    w->chunk = (int32_t)(room < 1 ? 1 : least(room, (uint64_t)w->panels));
    /* Equal chunks: the last one is no rest of one panel. */
    const int32_t chunks = (w->panels + w->chunk - 1) / w->chunk;
    w->chunk = (w->panels + chunks - 1) / chunks;
    const uint64_t v_tile = (uint64_t)POSITIONS * (uint64_t)w->kpad * 4,
                   m_tile = (uint64_t)POSITIONS * (uint64_t)w->chunk * PANEL * 4;
    const uint64_t y_line =
        (uint64_t)4 * (uint64_t)g->walk.ow * (uint64_t)g->ldy * ipt_dtype_bytes(g->act);
    uint64_t tiles = least(least(V_BYTES, limit) / v_tile, least(M_BYTES, limit) / m_tile);
    tiles = tiles > (uint64_t)w->unit ? tiles - (uint64_t)w->unit : 0; /* of padding */
    uint64_t band = least(tiles / (uint64_t)w->tw, (uint64_t)w->lines);
    /* The binding of y begins at the aligned byte before its first line. */
    band = least(band, (dev->max_range - least(dev->max_range, dev->align)) / y_line);
    w->band = band < 1 ? 1 : (int32_t)band;
    const uint64_t one = (uint64_t)padded(w, w->tw);
    return one * v_tile <= limit && one * m_tile <= limit && y_line + dev->align <= dev->max_range;
}

/* Multiply-adds of one image, this way and directly. */
static bool is_faster(const winograd *w)
{
    const double k = w->kpad, o = w->g->cols,
                 pixels = (double)w->g->walk.oh * (double)w->g->walk.ow;
    const double tiles = (double)padded(w, (int64_t)w->tw * w->th);
    const double own =
        POSITIONS * (tiles * k * o + U_COST * k * o + V_COST * tiles * k + M_COST * tiles * o);
    return own < 0.9 * 9.0 * pixels * k * o;
}

static bool is_one(const ipt_gemm *g)
{
    const ipt_walk *w = &g->walk;
    return w->kernel == 3 && w->stride == 1 && w->spread == 1 &&
           (w->mode == IPT_WALK_TAPS || w->mode == IPT_WALK_ENLARGE) && g->mix.i == 0 &&
           g->side == 0 && g->cols % 4 == 0 && g->ldy % 4 == 0 && g->y0 % 4 == 0 && g->y0 < g->ldy;
}

bool ipt_winograd_fits(const ipt_launch *l, const ipt_gemm *g)
{
    const ipt_traits *dev = l->dev;
    const uint64_t pixels = (uint64_t)g->walk.n * (uint64_t)g->walk.h * (uint64_t)g->walk.w,
                   most = least(dev->max_texels, INT32_MAX / 4);
    winograd w;
    if (dev->winograd == 0 || !dev->simd || !dev->texel || !is_one(g) || !size_up(l, g, &w))
        return false;
    const uint64_t weight =
        ((uint64_t)w.panels * ipt_panel_rows(9 * (uint64_t)w.kpad, g->b_type) + TAIL) / 16;
    return pixels * (uint64_t)w.kpad / 4 <= most && weight <= most &&
           (uint64_t)g->rows * (uint64_t)g->ldy / 4 <= most && (dev->winograd > 1 || is_faster(&w));
}

static ipt_dispatch *add(ipt_launch *l, const char *shader, winograd_push *push, int64_t n)
{
    push->n = (int32_t)n;
    ipt_dispatch *d = ipt_launch_add(l, shader, push, sizeof *push);
    if (d) {
        ipt_launch_spec(d, WG);
        ipt_launch_linear(l, d, (uint64_t)n, WG);
    }
    return d;
}

static void add_g(ipt_launch *l, const winograd *w, winograd_push push, int32_t panels, int u)
{
    const ipt_dtype type = w->g->b_type;
    push.quads = panels * w->kpad * 8;
    ipt_dispatch *d = type == IPT_Q8
                          ? add(l, "winograd_g.q8", &push, push.quads / 4)
                          : add(l, "winograd_g.f", &push, push.quads / (type == IPT_F16 ? 2 : 1));
    if (!d)
        return;
    ipt_launch_spec(d, type == IPT_F16);
    ipt_launch_bind(d, IPT_BIND_TEXEL_RGBA32UI, w->g->b.src, w->g->b.number, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, u, true);
}

static void add_d(ipt_launch *l, const winograd *w, winograd_push push, int v)
{
    const bool half = w->g->act == IPT_F16;
    push.quads = w->kpad / 4;
    ipt_dispatch *d =
        add(l, half ? "winograd_d.f16" : "winograd_d.f32", &push, (int64_t)push.each * push.quads);
    if (!d)
        return;
    ipt_launch_spec(d, w->g->walk.mode == IPT_WALK_ENLARGE && push.shift == 0);
    ipt_launch_bind(d, ipt_gemm_view(w->g->act), w->g->a.src, w->g->a.number, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, v, true);
}

static ipt_status add_products(ipt_launch *l, const winograd *w, const winograd_push *push,
                               int32_t panels, const int scratch[3])
{
    ipt_gemm g = {.a = ipt_operand_scratch(scratch[1]),
                  .b = ipt_operand_scratch(scratch[0]),
                  .y = ipt_operand_scratch(scratch[2]),
                  .bias = ipt_operand_none(),
                  .t = ipt_operand_none(),
                  .r = ipt_operand_none(),
                  .act = IPT_F32,
                  .b_type = IPT_F32,
                  .rows = (int64_t)POSITIONS * push->each,
                  .each = push->each,
                  .cols = panels * PANEL,
                  .k = w->kpad,
                  .ldy = panels * PANEL};
    g.walk = ipt_walk_plain(g.rows, 1);
    IPT_TRY(ipt_gemm_launch(l, &g));
    /* Counted as the convolution's own: what a profile or a comparison of methods says of a model's
     * work does not depend on the device. */
    const double share = (double)push->tiles / ((double)w->lines * w->tw);
    const int32_t left = w->g->cols - push->col0;
    l->d[l->n_d - 1].macs = share * (double)w->g->rows * 9.0 * (double)w->g->k *
                            (double)(left < g.cols ? left : g.cols);
    return IPT_OK;
}

static void bind_y(ipt_launch *l, ipt_dispatch *d, const winograd *w, uint64_t from, uint64_t to)
{
    const ipt_gemm *g = w->g;
    const uint64_t line = (uint64_t)g->ldy * ipt_dtype_bytes(g->act);
    ipt_launch_bind_part(l, d,
                         &(ipt_bind){.kind = IPT_BIND_SSBO,
                                     .src = g->y.src,
                                     .index = (uint8_t)g->y.number,
                                     .write = true,
                                     .off = from * line,
                                     .bytes = (to - from) * line});
}

/* Pixels of the result before line `line` of tiles, of all images' lines. */
static uint64_t pixels_before(const winograd *w, int32_t line)
{
    const ipt_walk *k = &w->g->walk;
    const uint64_t image = (uint64_t)(line / w->th), y = (uint64_t)(line % w->th) * 4;
    return (image * (uint64_t)k->oh + y) * (uint64_t)k->ow;
}

static void add_m(ipt_launch *l, const winograd *w, winograd_push push, int32_t panels, int m,
                  uint64_t from, uint64_t to)
{
    const ipt_gemm *g = w->g;
    const int32_t left = g->cols - push.col0, cols = left < panels * PANEL ? left : panels * PANEL;
    const uint64_t line = (uint64_t)g->ldy * ipt_dtype_bytes(g->act);
    push.quads = panels * PANEL / 4;
    push.first = (int32_t)(from * line / l->dev->align * l->dev->align / ipt_dtype_bytes(g->act));
    ipt_dispatch *d = add(l, g->act == IPT_F16 ? "winograd_m.f16" : "winograd_m.f32", &push,
                          (int64_t)push.tiles * (cols / 4));
    if (!d)
        return;
    const ipt_operand r = g->r.number >= 0 ? g->r : g->a; /* a: never read */
    ipt_launch_spec(d, g->r.number >= 0);
    ipt_launch_bind(d, IPT_BIND_TEXEL_RGBA32F, IPT_SRC_SCRATCH, m, false);
    bind_y(l, d, w, from, to);
    ipt_gemm_bind_optional(d, g, g->bias, 0, (uint64_t)g->cols * 4);
    ipt_gemm_bind_optional(d, g, g->t, 0,
                           (uint64_t)g->walk.n * (uint64_t)g->cols * ipt_dtype_bytes(g->act));
    ipt_launch_bind(d, ipt_gemm_view(g->act), r.src, r.number, false);
}

static ipt_status add_band(ipt_launch *l, const winograd *w, winograd_push *push, int32_t line0,
                           int32_t panels, bool has_v, const int scratch[3])
{
    const int32_t line1 = line0 + w->band < w->lines ? line0 + w->band : w->lines;
    push->tile0 = line0 * w->tw;
    push->tiles = (line1 - line0) * w->tw;
    push->each = (int32_t)padded(w, push->tiles);
    if (!has_v)
        add_d(l, w, *push, scratch[1]);
    IPT_TRY(add_products(l, w, push, panels, scratch));
    add_m(l, w, *push, panels, scratch[2], pixels_before(w, line0), pixels_before(w, line1));
    return l->status;
}

ipt_status ipt_winograd_launch(ipt_launch *l, const ipt_gemm *g)
{
    const ipt_walk *k = &g->walk;
    winograd w;
    if (!size_up(l, g, &w))
        return IPT_ERR_TOO_LARGE;
    const uint64_t each = (uint64_t)padded(&w, (int64_t)w.band * w.tw), elt = POSITIONS * 4;
    const int scratch[3] = {
        ipt_launch_scratch(l, elt * (uint64_t)w.kpad * (uint64_t)w.chunk * PANEL + TAIL),
        ipt_launch_scratch(l, elt * (uint64_t)w.kpad * each),
        ipt_launch_scratch(l, elt * (uint64_t)w.chunk * PANEL * each)};
    winograd_push push = {.tw = w.tw,
                          .th = w.th,
                          .h = k->h,
                          .w = k->w,
                          .vh = k->vh,
                          .vw = k->vw,
                          .pad = k->pad,
                          .oh = k->oh,
                          .ow = k->ow,
                          .cols = g->cols,
                          .ldy = g->ldy,
                          .y0 = g->y0,
                          .depth = w.kpad,
                          .shift = k->vh == 2 * k->h && k->vw == 2 * k->w,
                          .adds = (g->bias.number >= 0 ? HAS_BIAS : 0) |
                                  (g->t.number >= 0 ? HAS_T : 0)};
    for (int32_t p0 = 0; p0 < w.panels; p0 += w.chunk) {
        const int32_t panels = p0 + w.chunk < w.panels ? w.chunk : w.panels - p0;
        push.panel0 = p0;
        push.col0 = p0 * PANEL;
        add_g(l, &w, push, panels, scratch[0]);
        for (int32_t line = 0; line < w.lines && l->status == IPT_OK; line += w.band)
            IPT_TRY(add_band(l, &w, &push, line, panels, p0 > 0 && w.band == w.lines, scratch));
    }
    return l->status;
}
