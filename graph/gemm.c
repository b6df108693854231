/* graph/gemm.c - describes matrix products and operand copies as dispatches: shader shape by
 * device, tile constants, bands that keep every binding within the device's range.  Knows no
 * operator. */
#include "graph/gemm.h"

#include "graph/coop.h"
#include "graph/winograd.h"

#include <string.h>

/* shaders/gemm_iface.glsl */
typedef struct gemm_push {
    int32_t rows, row0, cols, col0, quads, taps, panels, kw, ow, opix, h, w, vh, vw, stride, pad,
        spread, a_first, ldy, y0, turned, side, side_cols, mix_each, mix_gates, mix_slots, each,
        adds, shift;
} gemm_push;
/* shaders/pack.comp */
typedef struct pack_push {
    int32_t count, q0, n, taps, k, kpad, base, sn, st, sk, ow, opix, h, w, vh, vw, stride, pad,
        spread, ky, kx;
} pack_push;
_Static_assert(sizeof(gemm_push) <= IPT_MAX_PUSH, "gemm push block");
_Static_assert(sizeof(pack_push) <= IPT_MAX_PUSH, "pack push block");

enum { HAS_BIAS = 1, HAS_T = 2, HAS_R = 4, HAS_QUADS = 8, HAS_GROUPS = 16, HAS_NO_SIDE = 32 };
enum { TILE_ROWS = 64, TILE_COLS = 64, TILE_THREADS = 128, PACK_THREADS = 64 };
enum { MOST_PARTS = 64 << 20 }; /* bytes of the sums of a product that is made in parts */
/* Up to here all panels are walked for one tile of rows (they stream from the last-level cache);
 * beyond, all rows for one tile of columns. */
enum { CACHED_PANELS = 16 << 20 };
/* Of a tile, before and after its rows are mixed in the epilogue, and of one matrix: the code is
 * unrolled over them (128 rows after it take 8 s to compile). */
enum { MIX_ROWS = 40, MIX_OUTPUTS = 16 };

/* --- walks --------------------------------------------------------------------------------- */
ipt_walk ipt_walk_conv(const ipt_shape *x, const ipt_conv *c)
{
    ipt_walk w = {.mode = IPT_WALK_TAPS,
                  .kernel = c->kernel,
                  .stride = c->stride,
                  .pad = c->pad_lo,
                  .spread = 1,
                  .n = x->dim[0],
                  .h = x->dim[1],
                  .w = x->dim[2]};
    w.vh = c->up_h > 0 ? c->up_h : w.h;
    w.vw = c->up_w > 0 ? c->up_w : w.w;
    if (w.vh != w.h || w.vw != w.w)
        w.mode = IPT_WALK_ENLARGE;
    int64_t room_h = (int64_t)w.vh + c->pad_lo + c->pad_hi - c->kernel;
    int64_t room_w = (int64_t)w.vw + c->pad_lo + c->pad_hi - c->kernel;
    if (c->kernel > 0 && c->stride > 0 && room_h >= 0 && room_w >= 0) {
        w.oh = (int32_t)(room_h / c->stride + 1);
        w.ow = (int32_t)(room_w / c->stride + 1);
    }
    if (w.mode == IPT_WALK_TAPS && w.kernel == 1 && w.stride == 1 && w.oh == w.h && w.ow == w.w &&
        w.pad == 0)
        w.mode = IPT_WALK_PLAIN;
    return w;
}

ipt_walk ipt_walk_conv_dx(const ipt_shape *dy, const ipt_conv *c, int32_t vh, int32_t vw)
{
    ipt_walk w = {.mode = IPT_WALK_SPREAD,
                  .kernel = c->kernel,
                  .stride = 1,
                  .pad = c->kernel - 1 - c->pad_lo,
                  .spread = c->stride,
                  .n = dy->dim[0],
                  .h = dy->dim[1],
                  .w = dy->dim[2],
                  .oh = vh,
                  .ow = vw};
    w.vh = (w.h - 1) * c->stride + 1;
    w.vw = (w.w - 1) * c->stride + 1;
    if (c->stride == 1)
        w.mode = c->kernel == 1 && c->pad_lo == 0 && vh == w.h && vw == w.w ? IPT_WALK_PLAIN
                                                                            : IPT_WALK_TAPS;
    return w;
}

ipt_walk ipt_walk_plain(int64_t rows, int32_t n)
{
    int32_t each = (int32_t)(n > 0 ? rows / n : rows);
    return (ipt_walk){.mode = IPT_WALK_PLAIN,
                      .kernel = 1,
                      .stride = 1,
                      .spread = 1,
                      .n = n,
                      .h = 1,
                      .w = each,
                      .vh = 1,
                      .vw = each,
                      .oh = 1,
                      .ow = each};
}

static void walk_push(const ipt_walk *w, int32_t *ow, int32_t *opix, int32_t *geometry /* 7 */)
{
    *ow = w->ow;
    *opix = w->oh * w->ow;
    const int32_t g[7] = {w->h, w->w, w->vh, w->vw, w->stride, w->pad, w->spread};
    memcpy(geometry, g, sizeof g);
}

/* Rows of the stored input that results [m0, m1) may read, as pixel numbers [*lo, *hi). */
static void walk_reach(const ipt_walk *w, int64_t m0, int64_t m1, int64_t *lo, int64_t *hi)
{
    if (w->mode == IPT_WALK_PLAIN) {
        *lo = m0;
        *hi = m1;
        return;
    }
    int64_t opix = (int64_t)w->oh * w->ow, pix = (int64_t)w->h * w->w;
    int64_t line0 = m0 % opix / w->ow * w->stride - w->pad;
    int64_t line1 = (m1 - 1) % opix / w->ow * w->stride - w->pad + w->kernel - 1;
    int64_t first = line0 < 0 ? 0 : line0 * w->h / w->vh;
    int64_t last = line1 < 0 ? 0 : line1 * w->h / w->vh + 1;
    if (w->mode == IPT_WALK_SPREAD) {
        first = line0 < 0 ? 0 : line0 / w->spread;
        last = line1 < 0 ? 0 : line1 / w->spread + 1;
    }
    first = first < w->h ? first : w->h - 1;
    last = last < w->h ? last : w->h - 1;
    *lo = m0 / opix * pix + first * w->w;
    *hi = (m1 - 1) / opix * pix + (last + 1) * w->w;
}

/* --- one product --------------------------------------------------------------------------- */
typedef struct gemm_job {
    const ipt_gemm *g;
    bool simd, texel;
    uint32_t sg, tm;    /* simd */
    ipt_coop_tile coop; /* threads 0: not used */
    int32_t quads, taps, panels;
    uint64_t a_quad, elt, panel_bytes,
        tail; /* bytes: a quad of a, an element, a panel, zeros behind */
    uint64_t a_bytes;
    uint32_t has;
    int32_t adds; /* HAS_BIAS and HAS_T where they are no constants of the shader */
    ipt_walk_mode mode;
    int32_t shift; /* log2 of the enlargement, where mode is TAPS */
    int32_t side;  /* quads of k of h and u that this product adds itself */
} gemm_job;

/* Measured on llvmpipe: 32 rows.  Few rows: the smaller tile when it wastes less. */
static void simd_tile(gemm_job *j, int64_t rows)
{
    const int64_t t16 = (rows + 15) / 16 * 16, t32 = (rows + 31) / 32 * 32;
    j->tm = j->texel && t16 * 13 < t32 * 12 ? 16 : 32;
    if (rows <= (int64_t)j->sg || j->tm < j->sg)
        j->tm = j->sg;
}

static uint64_t gcd(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t r = a % b;
        a = b;
        b = r;
    }
    return a;
}

/* Rows of a tile that holds whole matrices of i rows, for every lane of the subgroup one or more;
 * 0: too many. */
static uint32_t mix_tile(uint32_t sg, int32_t i)
{
    const uint32_t each = sg * (uint32_t)i / (uint32_t)gcd(sg, (uint64_t)i);
    return each > MIX_ROWS ? 0 : each > 16 ? each : 32 / each * each;
}

/* Fewer pipelines, since each takes a second to compile on some CPU devices: what can be a number
 * of the push block is one. */
static void merge_variants(gemm_job *j)
{
    const ipt_gemm *g = j->g;
    const ipt_walk *w = &g->walk;
    j->mode = w->mode;
    if (w->mode == IPT_WALK_ENLARGE && w->vh == 2 * w->h && w->vw == 2 * w->w) {
        j->mode = IPT_WALK_TAPS;
        j->shift = 1;
    }
    if (!j->simd || g->mix.i > 0)
        return;
    j->adds = (int32_t)(j->has & HAS_BIAS);
    j->has &= ~(uint32_t)HAS_BIAS;
    if ((j->has & HAS_T) && (w->n <= 2 || (int64_t)w->oh * w->ow >= (int64_t)j->tm)) {
        j->adds |= HAS_T;
        j->has &= ~(uint32_t)HAS_T;
    }
}

static gemm_job job_of(const ipt_launch *l, const ipt_gemm *g)
{
    const ipt_traits *dev = l->dev;
    gemm_job j = {.g = g,
                  .quads = ipt_pad4(g->k) / 4,
                  .taps = g->walk.kernel * g->walk.kernel,
                  .panels = (g->cols + 31) / 32};
    j.elt = ipt_dtype_bytes(g->act);
    j.a_quad = 4 * j.elt;
    j.panel_bytes = ipt_panel_rows((uint64_t)j.taps * (uint64_t)j.quads * 4, g->b_type);
    j.tail = ipt_panel_rows(32, g->b_type);
    int64_t pixels =
        g->walk.mode == IPT_WALK_PLAIN ? g->rows : (int64_t)g->walk.n * g->walk.h * g->walk.w;
    j.a_bytes = (uint64_t)pixels * (uint64_t)j.quads * j.a_quad;
    j.simd = dev->simd && dev->subgroup_shuffle && dev->subgroup >= 4 && dev->subgroup <= 64;
    j.texel = j.simd && dev->texel && j.a_bytes / j.a_quad <= dev->max_texels &&
              ((uint64_t)j.panels * j.panel_bytes + j.tail) / 16 <= dev->max_texels;
    j.sg = dev->subgroup;
    simd_tile(&j, g->rows);
    if (g->mix.i > 0)
        j.tm = mix_tile(j.sg, g->mix.i);
    if (g->each > 0)
        j.tm = j.sg <= 32 && g->each % 32 == 0 ? 32 : j.sg > 16 ? j.sg : 16;
    if (!j.simd && g->act == IPT_F16 && g->b_type == IPT_F16 && g->mix.i == 0 && g->each == 0)
        j.coop = ipt_coop_choose(dev, g->rows, g->cols, j.taps, g->k);
    j.has = (g->bias.number >= 0 ? HAS_BIAS : 0u) | (g->t.number >= 0 ? HAS_T : 0u) |
            (g->r.number >= 0 ? HAS_R : 0u);
    if (g->mix.is_swapped ? g->mix.o % 4 == 0
                          : g->cols % 4 == 0 && g->ldy % 4 == 0 && g->y0 % 4 == 0)
        j.has |= HAS_QUADS;
    else if (j.simd && g->mix.i == 0 && g->each == 0 && j.sg <= 16 && j.tm > 16)
        j.tm = 16; /* stores column by column: half the code to compile; three columns, mostly */
    const uint64_t groups = g->side > 0 ? (uint64_t)(g->cols / g->side_cols) : 0;
    uint64_t h_texels = (uint64_t)g->rows * groups * (uint64_t)(g->side / 4);
    uint64_t u_texels =
        (uint64_t)((g->side_cols + 31) / 32) * (uint64_t)g->side * 32 * ipt_dtype_bytes(g->u_type);
    u_texels = (u_texels + (uint64_t)32 * 32 * 4) / 16; /* with the zeros behind the panels */
    if (j.texel && g->side > 0 && h_texels <= dev->max_texels && u_texels <= dev->max_texels)
        j.side = g->side / 4;
    if (j.side > 0 && groups > 1)
        j.has |= HAS_GROUPS;
    if (j.simd && g->each > 0) /* has a pipeline of its own in any case: weights of f32 */
        j.has |= HAS_NO_SIDE;
    merge_variants(&j);
    return j;
}

void ipt_gemm_bind_optional(ipt_dispatch *d, const ipt_gemm *g, ipt_operand o, uint64_t off,
                            uint64_t bytes)
{
    if (o.number >= 0)
        ipt_launch_bind_range(d, IPT_BIND_SSBO, o.src, o.number, false, off, bytes);
    else /* never read */
        ipt_launch_bind_range(d, IPT_BIND_SSBO, g->b.src, g->b.number, false, 0, 16);
}

/* Everything whole: specialisation and operands of a product that mixes. */
static void bind_mixed(ipt_dispatch *d, const gemm_job *j)
{
    const ipt_gemm *g = j->g;
    const bool gated = g->mix.gates.number >= 0;
    const ipt_bind_kind view = ipt_gemm_view(g->act);
    const ipt_operand gates = gated ? g->mix.gates : g->mix.p,
                      slot = gated ? g->mix.slot : g->mix.p, r = g->r.number >= 0 ? g->r : g->a;
    ipt_launch_spec(d, (uint32_t)g->mix.i);
    ipt_launch_spec(d, (uint32_t)g->mix.o);
    ipt_launch_spec(d, g->mix.is_swapped);
    ipt_launch_spec(d, gated);
    ipt_launch_bind(d, view, g->a.src, g->a.number, false);
    ipt_launch_bind(d, IPT_BIND_TEXEL_RGBA32UI, g->b.src, g->b.number, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, g->y.src, g->y.number, true);
    ipt_launch_bind(d, IPT_BIND_SSBO, gates.src, gates.number, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, g->mix.p.src, g->mix.p.number, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, r.src, r.number, false);
    ipt_launch_bind(d, view, j->has & HAS_QUADS ? r.src : g->a.src,
                    j->has & HAS_QUADS ? r.number : g->a.number, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, slot.src, slot.number, false);
    d->macs = (double)g->rows * g->cols * (g->k + g->mix.o);
}

/* Of one dispatch: rows [m0, m1) and panels [p0, p1). */
typedef struct gemm_band {
    int64_t m0, m1;
    int32_t p0, p1;
    uint64_t a_off, a_len; /* bytes of a that it reads */
    uint32_t parts;        /* of the depth, > 1: sums go to scratch `sums` */
    int sums;
} gemm_band;

static gemm_push push_of(const gemm_job *j, const gemm_band *b)
{
    const ipt_gemm *g = j->g;
    gemm_push push = {.rows = (int32_t)(b->m1 - b->m0),
                      .row0 = (int32_t)b->m0,
                      .cols = g->cols,
                      .col0 = b->p0 * 32,
                      .quads = j->quads,
                      .taps = j->taps,
                      .panels = b->p1 - b->p0,
                      .kw = g->walk.kernel,
                      .a_first = (int32_t)(b->a_off / j->a_quad),
                      .ldy = g->ldy,
                      .y0 = g->y0,
                      .each = g->each,
                      .adds = j->adds,
                      .shift = j->shift,
                      .side = j->side,
                      .side_cols = g->side_cols};
    walk_push(&g->walk, &push.ow, &push.opix, &push.h);
    if (g->mix.i > 0) {
        push.mix_each = (int32_t)(g->rows / g->mix.i / g->mix.batch);
        push.mix_gates = g->mix.row * g->mix.batch;
        push.mix_slots = g->mix.slots;
    }
    push.turned = (uint64_t)j->panels * j->panel_bytes > CACHED_PANELS;
    return push;
}

static const char *shader_of(const ipt_launch *l, const gemm_job *j, const gemm_band *b)
{
    static const char *const coop[2][2] = {{"gemm_coop.f16", "gemm_coop.part"},
                                           {"gemm_emu.f16", "gemm_emu.part"}};
    static const char *const plain[][2][2] = {
        {{"gemm_tile.f32", "gemm_tile.f16"}, {"gemm_tile.q32", "gemm_tile.q16"}},
        {{"gemm.sb32", "gemm.sb16"}, {"gemm.sq32", "gemm.sq16"}},
        {{"gemm.tx32", "gemm.tx16"}, {"gemm.tq32", "gemm.tq16"}}};
    const bool half = j->g->act == IPT_F16;
    return j->coop.threads ? coop[l->dev->coop_emulated][b->parts > 1]
           : j->g->mix.i   ? (half ? "gemm.mx16" : "gemm.mx32")
                           : plain[j->simd + j->texel][j->g->b_type == IPT_Q8][half];
}

/* The constants of the shader and how many workgroups it takes. */
static void shape(const ipt_launch *l, ipt_dispatch *d, const gemm_job *j, const gemm_band *b,
                  bool is_turned)
{
    const ipt_gemm *g = j->g;
    const uint32_t rows = (uint32_t)(b->m1 - b->m0), cols = (uint32_t)(b->p1 - b->p0) * 32;
    const ipt_coop_tile *c = &j->coop;
    d->groups[2] = 1;
    if (j->simd) {
        ipt_launch_spec(d, j->sg);
        ipt_launch_spec(d, j->tm);
        d->k.subgroup = j->sg;
        d->groups[is_turned ? 0 : 1] = (rows + j->tm - 1) / j->tm;
        d->groups[is_turned ? 1 : 0] = (cols + 4 * j->sg - 1) / (4 * j->sg);
    } else {
        const uint32_t tile_rows = c->threads ? c->bm : TILE_ROWS,
                       tile_cols = c->threads ? c->bn : TILE_COLS;
        d->groups[0] = (rows + tile_rows - 1) / tile_rows;
        d->groups[1] = (cols + tile_cols - 1) / tile_cols;
    }
    if (c->threads) {
        d->is_matrix = true;
        const uint32_t spec[] = {
            c->threads, l->dev->coop_m, l->dev->coop_n, l->dev->coop_k, c->bm,
            c->bn,      c->bk,          c->down,        c->across,      j->quads % 2 == 0};
        for (size_t i = 0; i < IPT_COUNT(spec); i++)
            ipt_launch_spec(d, spec[i]);
        d->k.subgroup = j->sg;
        d->groups[2] = b->parts;
    } else {
        ipt_launch_spec(d, g->b_type == IPT_F16);
    }
    ipt_launch_spec(d, (uint32_t)j->mode);
    ipt_launch_spec(d, j->has);
    if (j->simd)
        ipt_launch_spec(d, g->side > 0 ? g->u_type == IPT_F16 : g->act == IPT_F16);
}

/* Bindings 2 to 5 of every shape, the result's rows among them. */
static ipt_status bind_result(const ipt_launch *l, ipt_dispatch *d, const gemm_job *j,
                              const gemm_band *b)
{
    const ipt_gemm *g = j->g;
    const uint64_t line = (uint64_t)g->ldy * j->elt;
    const uint64_t lead =
        g->y0 >= g->ldy ? (uint64_t)g->y0 * j->elt : 0; /* the result starts rows further down */
    const uint64_t off = (uint64_t)b->m0 * line, len = (uint64_t)(b->m1 - b->m0) * line + lead;
    if (len > l->dev->max_range)
        return IPT_ERR_TOO_LARGE;
    ipt_launch_bind_range(d, IPT_BIND_SSBO, g->y.src, g->y.number, true, off, len);
    ipt_gemm_bind_optional(d, g, g->bias, 0, (uint64_t)g->cols * 4);
    ipt_gemm_bind_optional(d, g, g->t, 0, (uint64_t)g->walk.n * (uint64_t)g->cols * j->elt);
    ipt_gemm_bind_optional(d, g, g->r, off, len);
    if (j->texel && g->r.number >= 0 && (j->has & HAS_QUADS))
        ipt_launch_bind_range(d, ipt_gemm_view(g->act), g->r.src, g->r.number, false, off, len);
    else if (j->texel) /* never read */
        ipt_launch_bind(d, ipt_gemm_view(g->act), g->a.src, g->a.number, false);
    return IPT_OK;
}

static void bind_b(ipt_dispatch *d, const gemm_job *j, const gemm_band *b)
{
    ipt_launch_bind_range(d, IPT_BIND_SSBO, j->g->b.src, j->g->b.number, false,
                          (uint64_t)b->p0 * j->panel_bytes,
                          (uint64_t)(b->p1 - b->p0) * j->panel_bytes + j->tail);
}

/* Adds up the sums of all parts, and what the product's epilogue adds. */
static ipt_status add_parts(ipt_launch *l, const gemm_job *j, const gemm_band *b, gemm_push push,
                            const uint32_t groups[3])
{
    push.each = (int32_t)(groups[0] * j->coop.bm);
    push.side_cols = (int32_t)(groups[1] * j->coop.bn);
    ipt_dispatch *d = ipt_launch_add(l, "gemm_parts.f16", &push, sizeof push);
    if (!d)
        return l->status;
    ipt_launch_spec(d, PACK_THREADS);
    ipt_launch_spec(d, b->parts);
    ipt_launch_spec(d, j->has);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, b->sums, false);
    bind_b(d, j, b); /* never read */
    IPT_TRY(bind_result(l, d, j, b));
    ipt_launch_linear(l, d, (uint64_t)push.rows * (uint64_t)((j->g->cols + 3) / 4), PACK_THREADS);
    return IPT_OK;
}

static ipt_status add_band(ipt_launch *l, const gemm_job *j, const gemm_band *b)
{
    const ipt_gemm *g = j->g;
    const gemm_push push = push_of(j, b);
    const ipt_bind_kind act_view = ipt_gemm_view(g->act);
    ipt_dispatch *d = ipt_launch_add(l, shader_of(l, j, b), &push, sizeof push);
    if (!d)
        return l->status;
    shape(l, d, j, b, push.turned);
    if (g->mix.i > 0) {
        bind_mixed(d, j);
        return IPT_OK;
    }
    if (j->texel) {
        ipt_launch_bind(d, act_view, g->a.src, g->a.number, false);
        ipt_launch_bind(d, IPT_BIND_TEXEL_RGBA32UI, g->b.src, g->b.number, false);
    } else {
        ipt_launch_bind_range(d, IPT_BIND_SSBO, g->a.src, g->a.number, false, b->a_off, b->a_len);
        bind_b(d, j, b);
    }
    IPT_TRY(bind_result(l, d, j, b));
    if (b->parts > 1)
        d->bind[2] = (ipt_bind){.kind = IPT_BIND_SSBO,
                                .src = IPT_SRC_SCRATCH,
                                .index = (uint8_t)b->sums,
                                .write = true};
    if (j->texel) {
        const ipt_operand h = j->side ? g->h : g->a, u = j->side ? g->u : g->b;
        ipt_launch_bind(d, act_view, h.src, h.number, false);
        ipt_launch_bind(d, IPT_BIND_TEXEL_RGBA32UI, u.src, u.number, false);
    }
    const int32_t left = g->cols - b->p0 * 32, cols = (b->p1 - b->p0) * 32;
    d->macs = (double)push.rows * (double)(cols < left ? cols : left) *
              ((double)j->taps * (double)g->k + 4.0 * j->side);
    d->no_wait = b->m0 > 0 || b->p0 > 0;
    if (b->parts <= 1)
        return IPT_OK;
    const uint32_t groups[3] = {d->groups[0], d->groups[1], d->groups[2]};
    return add_parts(l, j, b, push, groups);
}

/* Parts of the depth only where one dispatch makes the whole result and the node has scratch left.
 */
static void cut_depth(ipt_launch *l, const gemm_job *j, gemm_band *b)
{
    const ipt_coop_tile *c = &j->coop;
    b->parts = 1;
    if (c->parts <= 1 || b->m1 - b->m0 < j->g->rows || b->p1 - b->p0 < j->panels ||
        l->n_scratch + 2 > IPT_MAX_SCRATCH)
        return;
    const uint64_t cols = (uint64_t)j->panels * 32,
                   bytes = c->parts * (((uint64_t)j->g->rows + c->bm - 1) / c->bm * c->bm) *
                           ((cols + c->bn - 1) / c->bn * c->bn) * 4;
    if (bytes > MOST_PARTS || bytes > l->dev->max_range)
        return;
    b->parts = c->parts;
    b->sums = ipt_launch_scratch(l, bytes);
}

/* Bytes [*off, *off + *len) of a that rows [m0, m1) read. */
static void a_range(const ipt_launch *l, const gemm_job *j, int64_t m0, int64_t m1, uint64_t *off,
                    uint64_t *len)
{
    *off = 0;
    *len = j->a_bytes;
    if (j->texel || j->a_bytes <= l->dev->max_range)
        return;
    int64_t lo, hi;
    walk_reach(&j->g->walk, m0, m1, &lo, &hi);
    uint64_t pixel = (uint64_t)j->quads * j->a_quad;
    uint64_t from = (uint64_t)lo * pixel;
    from -= from % (l->dev->align > 16 ? l->dev->align : 16);
    *off = from;
    *len = (uint64_t)hi * pixel - from;
}

bool ipt_gemm_can_mix(const ipt_launch *l, const ipt_gemm *g)
{
    const ipt_traits *dev = l->dev;
    const gemm_job j = job_of(l, g);
    const uint64_t results =
                       (uint64_t)(g->rows / g->mix.i) * (uint64_t)g->mix.o * (uint64_t)g->cols,
                   most = dev->max_range / j.elt;
    return j.texel && g->walk.mode == IPT_WALK_PLAIN && j.tm > 0 && g->mix.o <= MIX_OUTPUTS &&
           (int32_t)j.tm / g->mix.i * g->mix.o <= MIX_ROWS && g->rows <= INT32_MAX &&
           results <= most && results <= INT32_MAX && results / 4 <= dev->max_texels &&
           (uint64_t)g->rows / j.tm < dev->max_group_count;
}

ipt_status ipt_gemm_launch(ipt_launch *l, const ipt_gemm *g)
{
    if (ipt_winograd_fits(l, g))
        return ipt_winograd_launch(l, g);
    const gemm_job j = job_of(l, g);
    const uint64_t range = l->dev->max_range, align = l->dev->align ? l->dev->align : 1;
    const uint64_t line = (uint64_t)g->ldy * j.elt;
    const int64_t granule = (int64_t)(align / gcd(align, line));
    int64_t band = (int64_t)(range / line);
    int64_t most = (int64_t)l->dev->max_group_count * (j.simd ? j.tm : TILE_ROWS);
    band = band < most ? band : most;
    if (band < g->rows)
        band -= band % granule;
    int32_t panels = j.panels;
    if (g->rows > INT32_MAX || j.a_bytes / j.a_quad > INT32_MAX)
        return IPT_ERR_TOO_LARGE; /* the kernels count in 32 bits */
    if (!j.texel && (uint64_t)panels * j.panel_bytes + j.tail > range)
        panels = range > j.tail ? (int32_t)((range - j.tail) / j.panel_bytes) : 0;
    if (panels < j.panels) { /* bands begin where a binding may, and at whole tiles */
        const int32_t each = (int32_t)(align / gcd(align, j.panel_bytes));
        panels -= panels % (panels > 1 && each < 2 ? 2 : each);
    }
    if (panels < 1)
        return IPT_ERR_TOO_LARGE;
    for (int64_t m0 = 0; m0 < g->rows;) {
        if (band < 1)
            return IPT_ERR_TOO_LARGE;
        int64_t m1 = m0 + band < g->rows ? m0 + band : g->rows;
        uint64_t off, len;
        a_range(l, &j, m0, m1, &off, &len);
        if (len > range && !j.texel) {
            band = (m1 - m0) / 2;
            band -= band % granule;
            continue;
        }
        for (int32_t p0 = 0; p0 < j.panels; p0 += panels) {
            const int32_t p1 = p0 + panels < j.panels ? p0 + panels : j.panels;
            gemm_band b = {.m0 = m0, .m1 = m1, .p0 = p0, .p1 = p1, .a_off = off, .a_len = len};
            cut_depth(l, &j, &b);
            IPT_TRY(add_band(l, &j, &b));
        }
        m0 = m1;
    }
    if (g->side == 0 || j.side)
        return l->status;
    ipt_gemm second = *g; /* these kernels know one product: the other is added to its result, its
                             groups are rows */
    second.rows = g->rows * (g->cols / g->side_cols);
    second.cols = second.ldy = g->side_cols;
    second.walk = ipt_walk_plain(second.rows, 1);
    second.a = g->h;
    second.b = g->u;
    second.b_type = g->u_type;
    second.k = g->side;
    second.side = 0;
    second.bias = second.t = ipt_operand_none();
    second.r = g->y;
    return ipt_gemm_launch(l, &second);
}

/* --- operand copies ------------------------------------------------------------------------ */
/* Rows of the result are rows of the source. */
static bool pack_by_rows(const ipt_pack *p)
{
    return p->rows && p->mode == IPT_PACK_STRIDED && p->taps == 1 && p->sk == 1 && p->base == 0 &&
           p->sn >= p->k;
}

/* Quads of the result that one dispatch may make: what they are made from fits a binding as well.
 * 0: it does not. */
static uint64_t pack_most(const ipt_launch *l, const ipt_pack *p, uint64_t depth, uint64_t elt)
{
    uint64_t most = l->dev->max_range / (4 * elt) & ~(uint64_t)63;
    if (p->src_bytes <= l->dev->max_range)
        return most;
    if (!pack_by_rows(p) || l->dev->max_range <= l->dev->align)
        return 0;
    uint64_t rows = (l->dev->max_range - l->dev->align) / ((uint64_t)p->sn * elt);
    uint64_t fit = rows * (depth / 4) & ~(uint64_t)63;
    return fit < most ? fit : most;
}

/* Binds the source of quads q .. q + n - 1 of the result and tells the push block where it starts.
 */
static void pack_source(ipt_launch *l, ipt_dispatch *d, const ipt_pack *p, pack_push *push,
                        uint64_t depth)
{
    const uint64_t elt = ipt_dtype_bytes(p->type);
    uint64_t from = 0, to = p->src_bytes;
    if (p->src_bytes > l->dev->max_range) {
        uint64_t line = (uint64_t)p->sn * elt, q = (uint64_t)push->q0, n = (uint64_t)push->count;
        from = q / (depth / 4) * line / l->dev->align * l->dev->align;
        to = ((q + n - 1) / (depth / 4) + 1) * line;
    }
    ipt_launch_bind_range(d, IPT_BIND_SSBO, p->src.src, p->src.number, false, from, to - from);
    push->base = (int32_t)(p->base - (int64_t)(from / elt));
}

ipt_status ipt_gemm_pack(ipt_launch *l, const ipt_pack *p, ipt_operand *out)
{
    const int32_t kpad = ipt_pad4(p->k);
    const uint64_t depth = (uint64_t)p->taps * (uint64_t)kpad;
    const uint64_t elt = p->rows ? ipt_dtype_bytes(p->type) : 4;
    const uint64_t quads =
        p->rows ? (uint64_t)p->n * depth / 4 : (uint64_t)((p->n + 31) / 32) * depth * 8 + 256;
    const uint64_t most = pack_most(l, p, depth, elt);
    if (most == 0 || quads > INT32_MAX)
        return IPT_ERR_TOO_LARGE;
    *out = ipt_operand_scratch(p->reuse ? p->reuse - 1 : ipt_launch_scratch(l, quads * 4 * elt));
    pack_push push = {.n = p->n,
                      .taps = p->taps,
                      .k = p->k,
                      .kpad = kpad,
                      .base = (int32_t)p->base,
                      .sn = (int32_t)p->sn,
                      .st = (int32_t)p->st,
                      .sk = (int32_t)p->sk};
    if (p->mode == IPT_PACK_GATHER) {
        walk_push(&p->walk, &push.ow, &push.opix, &push.h);
        push.ky = p->tap0 / p->walk.kernel;
        push.kx = p->tap0 % p->walk.kernel;
    }
    for (uint64_t q = 0; q < quads; q += most) {
        uint64_t n = quads - q < most ? quads - q : most;
        push.q0 = (int32_t)q;
        push.count = (int32_t)n;
        ipt_dispatch *d =
            ipt_launch_add(l,
                           p->type == IPT_Q8                                 ? "pack.q8"
                           : p->type == IPT_F16 && p->mode != IPT_PACK_PANEL ? "pack.f16"
                                                                             : "pack.f32",
                           &push, sizeof push);
        if (!d)
            return l->status;
        pack_source(l, d, p, &push, depth);
        memcpy(d->push, &push, sizeof push);
        ipt_launch_spec(d, PACK_THREADS);
        ipt_launch_spec(d, (uint32_t)p->mode);
        ipt_launch_spec(d, p->rows);
        ipt_launch_spec(d, p->type == IPT_F16);
        ipt_launch_spec(d, p->mode == IPT_PACK_GATHER ? (uint32_t)p->walk.mode : 0);
        ipt_launch_bind_range(d, IPT_BIND_SSBO, out->src, out->number, true, q * 4 * elt,
                              n * 4 * elt);
        ipt_launch_linear(l, d, n, PACK_THREADS);
        d->no_wait = q > 0;
    }
    return l->status;
}

ipt_status ipt_gemm_left(ipt_launch *l, const ipt_node *n, int i, ipt_operand *out)
{
    const ipt_shape *s = &n->in_shape[i];
    const int32_t k = s->dim[s->rank - 1];
    *out = ipt_operand_in(i);
    if (k % 4 == 0)
        return IPT_OK;
    ipt_pack p = {.src = *out,
                  .type = s->dtype,
                  .src_bytes = ipt_shape_bytes(s),
                  .rows = true,
                  .n = (int32_t)(ipt_shape_count(s) / (size_t)k),
                  .taps = 1,
                  .k = k,
                  .sn = k,
                  .sk = 1};
    return ipt_gemm_pack(l, &p, out);
}

ipt_status ipt_gemm_right(ipt_launch *l, const ipt_node *n, int number, bool by_depth,
                          ipt_operand *b, ipt_dtype *type)
{
    const ipt_shape *w = &n->in_shape[number];
    *b = ipt_operand_in(number);
    *type = w->dtype;
    if (n->in_is_panel[number])
        return IPT_OK;
    *type = IPT_F32;
    ipt_pack p = {.src = *b,
                  .type = w->dtype,
                  .src_bytes = ipt_shape_bytes(w),
                  .n = w->dim[by_depth ? 1 : 0],
                  .taps = 1,
                  .k = w->dim[by_depth ? 0 : 1],
                  .sn = by_depth ? 1 : w->dim[1],
                  .sk = by_depth ? w->dim[1] : 1};
    return ipt_gemm_pack(l, &p, b);
}
