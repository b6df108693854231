/* graph/op_attention.c - softmax(scale q k^T) v in its tiled form (nothing of size T x S is kept),
 * its gradient, and the builder of both forms (the other one: op_attn_probs.c).
 *
 * q, o [N,T,C], k, v [N,S,C], C = heads x d.  Ways to run it: on CPU devices subgroup kernels
 * (attention_simd.comp), one query an invocation for odd widths (attention_any.comp), for wide
 * heads chunks of scores in scratch with row-blocked products (attention_rows.comp); else
 * shared-memory tiles (attention_tile.comp). */
#include "graph/attention.h"

#include <math.h>
#include <string.h>

enum { WG = 64, MAX_SIMD_D = 160, MAX_ANY_D = 16 };

/* --- shapes ---------------------------------------------------------------------------------- */
static const char *attention_infer(const ipt_node *n, ipt_shape out[])
{
    const ipt_shape *q = &n->in_shape[0];
    const char *problem = ipt_attn_check_query(n);
    if (problem)
        return problem;
    if (n->op == IPT_OP_ATTENTION) {
        out[1] = ipt_shape3(IPT_F32, q->dim[0], n->attr.attn.heads, q->dim[1]);
        return ipt_attn_same_types(n, 3);
    }
    if (n->in_shape[4].dim[1] != n->attr.attn.heads || n->in_shape[4].dtype != IPT_F32 ||
        n->in_shape[5].dtype != q->dtype)
        return "lse or do does not fit";
    return ipt_attn_same_types(n, 4);
}

/* --- references ------------------------------------------------------------------------------ */
static void attention_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ipt_attn_ref g = ipt_attn_ref_geo(n, &n->in_shape[0], &n->in_shape[1]);
    for (size_t r = 0; r < g.n * g.h * g.t; r++) {
        size_t b = r / g.t / g.h, h = r / g.t % g.h, i = r % g.t, lim = g.causal ? i + 1 : g.s;
        double lse = ipt_attn_log_sum(&g, in[0], in[1], b, h, i);
        double *o = out[0] + (b * g.t + i) * g.c + h * g.d;
        memset(o, 0, g.d * sizeof *o);
        for (size_t j = 0; j < lim; j++) {
            double p = exp(ipt_attn_score(&g, in[0], in[1], b, h, i, j) - lse);
            const double *v = ipt_attn_row(&g, in[2], g.s, b, h, j);
            for (size_t c = 0; c < g.d; c++)
                o[c] += p * v[c];
        }
        out[1][r] = lse;
    }
}

static void attention_bwd_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ipt_attn_ref g = ipt_attn_ref_geo(n, &n->in_shape[0], &n->in_shape[1]);
    for (int k = 0; k < 3; k++)
        memset(out[k], 0, ipt_shape_count(&n->out_shape[k]) * sizeof(double));
    for (size_t r = 0; r < g.n * g.h * g.t; r++) {
        size_t b = r / g.t / g.h, h = r / g.t % g.h, i = r % g.t, lim = g.causal ? i + 1 : g.s;
        size_t at = (b * g.t + i) * g.c + h * g.d;
        double delta = ipt_attn_dot(in[3] + at, in[5] + at, g.d);
        for (size_t j = 0; j < lim; j++) {
            size_t key = (b * g.s + j) * g.c + h * g.d;
            double p = exp(ipt_attn_score(&g, in[0], in[1], b, h, i, j) - in[4][r]);
            double ds = g.scale * p * (ipt_attn_dot(in[5] + at, in[2] + key, g.d) - delta);
            ipt_attn_axpy(out[0] + at, ds, in[1] + key, g.d);
            ipt_attn_axpy(out[1] + key, ds, in[0] + at, g.d);
            ipt_attn_axpy(out[2] + key, p, in[5] + at, g.d);
        }
    }
}

/* --- gradients and builder ------------------------------------------------------------------- */
static void attention_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                           ipt_val dx[])
{
    if (!dy[0].id || !(want & 7))
        return;
    ipt_val in[6] = {ipt_in(n, 0), ipt_in(n, 1), ipt_in(n, 2), ipt_out(n, 0), ipt_out(n, 1), dy[0]};
    ipt_emit(g, IPT_OP_ATTENTION_BWD, n->name, in, 6, &n->attr, dx);
}

ipt_val ipt_attention(ipt_graph *g, ipt_val q, ipt_val k, ipt_val v, ipt_attn a, ipt_val *probs)
{
    ipt_shape s = ipt_shape_of(g, q);
    ipt_attr attr = {.attn = {a.heads, a.causal, a.scale}};
    if (!(fabsf(a.scale) > 0) && a.heads > 0 && s.rank == 3)
        attr.attn.scale = (float)(1.0 / sqrt((double)s.dim[2] / a.heads));
    ipt_val in[3] = {q, k, v}, out[2] = {{0}, {0}};
    if (!probs) {
        ipt_emit(g, IPT_OP_ATTENTION, "attention", in, 3, &attr, out);
        return out[0];
    }
    in[0] = *probs = ipt_emit(g, IPT_OP_ATTN_PROBS, "attention", in, 2, &attr, NULL);
    in[1] = v;
    return ipt_emit(g, IPT_OP_ATTN_APPLY, "attention", in, 2, &attr, NULL);
}

/* --- tiled form: subgroup and shared-memory kernels ------------------------------------------ */
static bool simd_ok(const ipt_attn_geo *g, const ipt_traits *dev)
{
    return dev->simd && dev->subgroup_shuffle && dev->subgroup >= 4 && dev->subgroup <= 32 &&
           g->d % 4 == 0 && g->d <= MAX_SIMD_D;
}

static bool texel_ok(const ipt_attn_geo *g, const ipt_traits *dev)
{
    uint64_t rows = g->t > g->s ? g->t : g->s, count = g->n * rows * g->c / 4;
    return dev->texel && count <= dev->max_texels && count <= INT32_MAX;
}

static ipt_bind_kind quad_kind(const ipt_attn_geo *g, bool texel)
{
    return !texel                ? IPT_BIND_SSBO
           : g->dtype == IPT_F16 ? IPT_BIND_TEXEL_RGBA16F
                                 : IPT_BIND_TEXEL_RGBA32F;
}

/* The variants of the subgroup kernels: [f16][texel]. */
#define QUAD_VARIANTS(name)                                                                        \
    {                                                                                              \
        {name ".f32_ssbo", name ".f32"}, { name ".f16_ssbo", name ".f16" }                         \
    }

/* The batch elements of one dispatch start at b and are `count` many. */
static uint32_t batch_step(const ipt_attn_geo *g) { return g->whole ? g->n : 1; }

static void forward_simd(const ipt_attn_geo *g, ipt_launch *l)
{
    static const char *const names[2][2] = QUAD_VARIANTS("attention_simd");
    const uint32_t sg = l->dev->subgroup, kb = sg >= 16 ? 8 : 4,
                   tq = sg >= 16 && g->d <= 64 ? 4 : 2;
    const bool texel = texel_ok(g, l->dev);
    const ipt_bind_kind kind = quad_kind(g, texel);
    const uint64_t qn = (uint64_t)g->t * g->c, kn = (uint64_t)g->s * g->c,
                   ln = (uint64_t)g->heads * g->t;
    for (uint32_t b = 0, step = batch_step(g); b < g->n; b += step) {
        struct {
            uint32_t t, s, heads, ld, q_off, k_off, v_off, o_off, lse_off;
            float scale;
            uint32_t causal;
        } push = {g->t,     g->s, g->heads, g->c / 4, 0,
                  0,        0,    0,        0,        g->scale * 1.44269504088896340736f,
                  g->causal};
        push.q_off = push.o_off = (uint32_t)(b * qn - ipt_attn_below(l, b * qn, g->elt)) / 4;
        push.k_off = push.v_off = (uint32_t)(b * kn - ipt_attn_below(l, b * kn, g->elt)) / 4;
        push.lse_off = (uint32_t)(b * ln);
        ipt_dispatch *d = ipt_launch_add(l, names[g->dtype == IPT_F16][texel], &push, sizeof push);
        const uint32_t spec[] = {sg, g->d / 4, kb, tq};
        for (size_t i = 0; i < IPT_COUNT(spec); i++)
            ipt_launch_spec(d, spec[i]);
        ipt_launch_bind_part(
            l, d, &(ipt_bind){kind, IPT_SRC_IN, 0, false, (b * qn) * g->elt, (step * qn) * g->elt});
        ipt_launch_bind_part(
            l, d, &(ipt_bind){kind, IPT_SRC_IN, 1, false, (b * kn) * g->elt, (step * kn) * g->elt});
        ipt_launch_bind_part(
            l, d, &(ipt_bind){kind, IPT_SRC_IN, 2, false, (b * kn) * g->elt, (step * kn) * g->elt});
        ipt_launch_bind_part(l, d,
                             &(ipt_bind){IPT_BIND_SSBO, IPT_SRC_OUT, 0, true, (b * qn) * g->elt,
                                         (step * qn) * g->elt});
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 1, true);
        ipt_attn_groups(d, ipt_attn_div_up(g->t, sg * tq), g->heads, step);
        if (d) {
            d->k.subgroup = sg;
            d->macs = 2.0 * step * (double)qn * g->s;
            d->no_wait = b != 0;
        }
    }
}

/* Narrow heads of any width on CPU devices (attention_any.comp). */
static bool any_ok(const ipt_attn_geo *g, const ipt_traits *dev)
{
    return dev->simd && dev->subgroup_shuffle && dev->subgroup >= 4 && dev->subgroup <= 32 &&
           g->d <= MAX_ANY_D;
}

/* A dispatch for batch elements b .. b + step - 1 of attention_tile.comp, or of one that takes the
 * same: push block, constants, bindings. */
static ipt_dispatch *add_tile(const ipt_attn_geo *g, ipt_launch *l, const char *shader, uint32_t b,
                              uint32_t step, const uint32_t *spec, size_t n_spec)
{
    const uint64_t qn = (uint64_t)g->t * g->c, kn = (uint64_t)g->s * g->c;
    const uint64_t at[4] = {b * qn, b * kn, b * kn, b * qn}, each[4] = {qn, kn, kn, qn};
    struct {
        uint32_t t, s, heads, d, ld, q_off, k_off, v_off, o_off, lse_off;
        float scale;
    } push = {g->t, g->s, g->heads, g->d, g->c, 0, 0, 0, 0, 0, g->scale * 1.44269504088896340736f};
    push.q_off = push.o_off = (uint32_t)(b * qn) - ipt_attn_below(l, b * qn, g->elt);
    push.k_off = push.v_off = (uint32_t)(b * kn) - ipt_attn_below(l, b * kn, g->elt);
    push.lse_off = b * g->heads * g->t;
    ipt_dispatch *d = ipt_launch_add(l, shader, &push, sizeof push);
    for (size_t i = 0; i < n_spec; i++)
        ipt_launch_spec(d, spec[i]);
    for (uint8_t i = 0; i < 4; i++)
        ipt_launch_bind_part(l, d,
                             &(ipt_bind){.kind = IPT_BIND_SSBO,
                                         .src = i < 3 ? IPT_SRC_IN : IPT_SRC_OUT,
                                         .index = i < 3 ? i : 0,
                                         .write = i == 3,
                                         .off = at[i] * g->elt,
                                         .bytes = step * each[i] * g->elt});
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 1, true);
    if (d) {
        d->macs = 2.0 * step * (double)qn * g->s;
        d->no_wait = b != 0;
    }
    return d;
}

/* attention_tile.comp, or attention_any.comp. */
static void forward_tile(const ipt_attn_geo *g, ipt_launch *l, bool any)
{
    const uint32_t sg = l->dev->subgroup;
    const uint32_t chunks = ipt_attn_div_up(g->d, 16), slices = ipt_attn_div_up(chunks, 8),
                   nv = ipt_attn_div_up(chunks, slices);
    const uint32_t spec_any[] = {sg, g->d, g->causal}, spec_tile[] = {nv, g->causal};
    for (uint32_t b = 0, step = batch_step(g); b < g->n; b += step) {
        ipt_dispatch *d =
            any ? add_tile(g, l, IPT_VARIANT("attention_any", g->dtype), b, step, spec_any, 3)
                : add_tile(g, l, IPT_VARIANT("attention_tile", g->dtype), b, step, spec_tile, 2);
        ipt_attn_groups(d, ipt_attn_div_up(g->t, any ? sg : IPT_ATTN_TILE),
                        any ? g->heads : g->heads * slices, step);
        if (d)
            d->k.subgroup = any ? sg : 0;
    }
}

/* On matrix units (attention_coop.comp). */
enum { COOP_SUBGROUPS = 4, COOP_KEYS = 32, MAX_COOP_D = 160 };

/* d rounded up to whole matrices. */
static uint32_t coop_width(const ipt_attn_geo *g, const ipt_traits *dev)
{
    const uint32_t unit = dev->coop_n > dev->coop_k ? dev->coop_n : dev->coop_k;
    return ipt_attn_div_up(g->d, unit) * unit;
}

static bool coop_ok(const ipt_attn_geo *g, const ipt_traits *dev)
{
    const uint32_t m = dev->coop_m, n = dev->coop_n, k = dev->coop_k;
    if (m == 0 || dev->coop_emulated || g->dtype != IPT_F16 || !dev->subgroup_shuffle ||
        dev->subgroup % m || n % (dev->subgroup / m) || COOP_KEYS % n || COOP_KEYS % k || n % 8 ||
        k % 8 || COOP_SUBGROUPS * dev->subgroup > dev->max_invocations)
        return false;
    const uint32_t width = coop_width(g, dev),
                   shared = 2 * COOP_KEYS * (width / 8 + 1) * 16 +
                            COOP_SUBGROUPS * m * ((COOP_KEYS + 4) * 4 + (COOP_KEYS / 8 + 1) * 16);
    return g->d % 8 == 0 && g->d <= MAX_COOP_D && dev->align % 16 == 0 &&
           shared <= dev->shared_bytes;
}

static void forward_coop(const ipt_attn_geo *g, ipt_launch *l)
{
    const ipt_traits *dev = l->dev;
    const uint32_t spec[] = {COOP_SUBGROUPS * dev->subgroup,
                             dev->coop_m,
                             dev->coop_n,
                             dev->coop_k,
                             dev->subgroup,
                             coop_width(g, dev),
                             COOP_KEYS,
                             (uint32_t)g->causal};
    for (uint32_t b = 0, step = batch_step(g); b < g->n; b += step) {
        ipt_dispatch *d = add_tile(g, l, "attention_coop", b, step, spec, IPT_COUNT(spec));
        ipt_attn_groups(d, ipt_attn_div_up(g->t, COOP_SUBGROUPS * dev->coop_m), g->heads, step);
        if (d) {
            d->k.subgroup = dev->subgroup;
            d->is_matrix = true;
        }
    }
}

/* --- tiled form, wide heads on CPU devices: scores in scratch -------------------------------- */
typedef struct panel_geo {
    uint32_t sg, s_pad; /* lanes; keys rounded up to 16 (zeros) */
    uint64_t k_quads, v_quads;
    int k, v, scores; /* scratch numbers */
} panel_geo;

static bool rows_ok(const ipt_attn_geo *g, const ipt_traits *dev)
{
    return dev->simd && dev->subgroup_shuffle && dev->subgroup >= 4 && dev->subgroup <= 32 &&
           g->d % 4 == 0 && g->dtype == IPT_F32 && texel_ok(g, dev);
}

/* Keys (mode 0) or values (mode 1) of one head into panels. */
static void pack_panels(const ipt_attn_geo *g, ipt_launch *l, const panel_geo *p, uint32_t b,
                        uint32_t h, uint32_t mode)
{
    const uint64_t kn = (uint64_t)g->s * g->c, quads = mode == 0 ? p->k_quads : p->v_quads;
    struct {
        uint32_t count, s, d, k_rows, off, ld, out_off;
    } push = {(uint32_t)quads, g->s, g->d, mode == 0 ? g->d : p->s_pad, 0, g->c, 0};
    push.off = (uint32_t)(b * kn) - ipt_attn_below(l, b * kn, g->elt) + h * g->d;
    ipt_dispatch *d = ipt_launch_add(l, "attention_pack", &push, sizeof push);
    ipt_launch_spec(d, p->sg);
    ipt_launch_spec(d, mode);
    ipt_launch_bind_part(l, d,
                         &(ipt_bind){IPT_BIND_SSBO, IPT_SRC_IN, (uint8_t)(mode == 0 ? 1 : 2), false,
                                     (b * kn) * g->elt, kn * g->elt});
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, mode == 0 ? p->k : p->v, true);
    ipt_launch_linear(l, d, quads, WG);
}

struct rows_push { /* shaders/attention_rows.comp; quads */
    uint32_t m, n4, k4, a_off, a_ld, b_off, c_off, c_ld;
    float alpha;
};

static ipt_dispatch *add_rows(ipt_launch *l, const panel_geo *p, const struct rows_push *push)
{
    const uint32_t uk = push->k4 % 4 == 0   ? 4
                        : push->k4 % 2 == 0 ? 2
                                            : 1,
                   rb = p->sg >= 16 ? 2 : 16 / p->sg;
    ipt_dispatch *d = ipt_launch_add(l, "attention_rows", push, sizeof *push);
    ipt_launch_spec(d, p->sg);
    ipt_launch_spec(d, rb);
    ipt_launch_spec(d, uk);
    ipt_attn_groups(d, ipt_attn_div_up(push->m, p->sg * rb), ipt_attn_div_up(push->n4, p->sg), 1);
    if (d) {
        d->k.subgroup = p->sg;
        d->macs = 16.0 * push->m * push->n4 * push->k4;
    }
    return d;
}

static ipt_status forward_rows(const ipt_attn_geo *g, ipt_launch *l)
{
    panel_geo p = {.sg = l->dev->subgroup, .s_pad = ipt_attn_div_up(g->s, 16) * 16};
    p.k_quads = (uint64_t)ipt_attn_div_up(p.s_pad, 4 * p.sg) * g->d * p.sg;
    p.v_quads = (uint64_t)ipt_attn_div_up(g->d, 4 * p.sg) * p.s_pad * p.sg;
    const uint64_t slack = 4 * (uint64_t)p.sg, range = l->dev->max_range,
                   row_bytes = (uint64_t)p.s_pad * 4;
    uint64_t chunk = (IPT_ATTN_SCRATCH < range ? IPT_ATTN_SCRATCH : range) / row_bytes;
    chunk = chunk < g->t ? chunk : g->t;
    if ((p.k_quads + slack) * 16 > range || (p.v_quads + slack) * 16 > range || chunk == 0)
        return IPT_ERR_TOO_LARGE;
    p.k = ipt_launch_scratch(l, (p.k_quads + slack) * 16);
    p.v = ipt_launch_scratch(l, (p.v_quads + slack) * 16);
    p.scores = ipt_launch_scratch(l, chunk * row_bytes);
    const uint64_t qn = (uint64_t)g->t * g->c;
    for (uint32_t pair = 0; pair < g->n * g->heads; pair++) {
        const uint32_t b = pair / g->heads, h = pair % g->heads;
        const uint32_t at = ((uint32_t)(b * qn) - ipt_attn_below(l, b * qn, g->elt) + h * g->d) / 4;
        pack_panels(g, l, &p, b, h, 0);
        pack_panels(g, l, &p, b, h, 1);
        for (uint32_t r = 0; r < g->t; r += (uint32_t)chunk) {
            const uint32_t rows = g->t - r < chunk ? g->t - r : (uint32_t)chunk;
            struct rows_push mul = {rows, p.s_pad / 4, g->d / 4, at + r * (g->c / 4), g->c / 4, 0,
                                    0,    p.s_pad / 4, g->scale};
            ipt_dispatch *d = add_rows(l, &p, &mul);
            ipt_launch_bind_part(l, d,
                                 &(ipt_bind){IPT_BIND_TEXEL_RGBA32F, IPT_SRC_IN, 0, false,
                                             (b * qn) * g->elt, qn * g->elt});
            ipt_launch_bind(d, IPT_BIND_TEXEL_RGBA32F, IPT_SRC_SCRATCH, p.k, false);
            ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, p.scores, true);
            ipt_attn_soft soft = {rows, rows, r, g->s, p.s_pad, p.s_pad, 0, pair * g->t, 1};
            d = ipt_launch_add(l, "attention_soft.f32", &soft, sizeof soft);
            ipt_launch_spec(d, g->causal);
            ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, p.scores, true);
            ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, p.scores, true);
            ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 1, true);
            ipt_launch_linear(l, d, rows, 1);
            mul = (struct rows_push){
                rows, g->d / 4, p.s_pad / 4, 0, p.s_pad / 4, 0, at + r * (g->c / 4), g->c / 4, 1};
            d = add_rows(l, &p, &mul);
            ipt_launch_bind(d, IPT_BIND_TEXEL_RGBA32F, IPT_SRC_SCRATCH, p.scores, false);
            ipt_launch_bind(d, IPT_BIND_TEXEL_RGBA32F, IPT_SRC_SCRATCH, p.v, false);
            ipt_launch_bind_part(
                l, d,
                &(ipt_bind){IPT_BIND_SSBO, IPT_SRC_OUT, 0, true, (b * qn) * g->elt, qn * g->elt});
        }
    }
    return l->status;
}

static ipt_status attention_kernel(const ipt_node *n, ipt_launch *l)
{
    ipt_attn_geo g = ipt_attn_geo_of(n, l, &n->in_shape[0], &n->in_shape[1]);
    if (!ipt_attn_fits(&g, l))
        return IPT_ERR_TOO_LARGE;
    if (simd_ok(&g, l->dev))
        forward_simd(&g, l);
    else if (rows_ok(&g, l->dev))
        return forward_rows(&g, l);
    else if (coop_ok(&g, l->dev))
        forward_coop(&g, l);
    else
        forward_tile(&g, l, any_ok(&g, l->dev));
    return l->status;
}

/* --- gradient of the tiled form -------------------------------------------------------------- */
/* delta [N,heads,T] = rowsum(do o) into scratch. */
static int add_delta(const ipt_attn_geo *g, ipt_launch *l)
{
    const uint64_t qn = (uint64_t)g->t * g->c;
    int delta = ipt_launch_scratch(l, (uint64_t)g->n * g->heads * g->t * 4);
    for (uint32_t b = 0, step = batch_step(g); b < g->n; b += step) {
        const uint32_t off = (uint32_t)(b * qn) - ipt_attn_below(l, b * qn, g->elt);
        struct {
            uint32_t count, t, heads, d, o_off, do_off, delta_off;
        } push = {step * g->heads * g->t, g->t, g->heads, g->d, off, off, b * g->heads * g->t};
        ipt_dispatch *d =
            ipt_launch_add(l, IPT_VARIANT("attention_delta", g->dtype), &push, sizeof push);
        ipt_launch_bind_part(l, d,
                             &(ipt_bind){IPT_BIND_SSBO, IPT_SRC_IN, 3, false, (b * qn) * g->elt,
                                         (step * qn) * g->elt});
        ipt_launch_bind_part(l, d,
                             &(ipt_bind){IPT_BIND_SSBO, IPT_SRC_IN, 5, false, (b * qn) * g->elt,
                                         (step * qn) * g->elt});
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, delta, true);
        ipt_launch_linear(l, d, push.count, WG);
        if (d)
            d->no_wait = b != 0;
    }
    return delta;
}

/* mode 0: rows are queries, dq; mode 1: rows are keys, dk and dv (shaders/attention_bwd.comp). */
static void backward_simd(const ipt_attn_geo *g, ipt_launch *l, int delta, uint32_t mode)
{
    static const char *const names[2][2] = QUAD_VARIANTS("attention_bwd");
    static const int in[2][4] = {{0, 5, 1, 2}, {1, 2, 0, 5}}, out[2][2] = {{0, 0}, {1, 2}};
    const uint32_t sg = l->dev->subgroup, kb = sg >= 16 ? 8 : 4, tq = g->d <= 80 ? 2 : 1;
    const uint32_t rows = mode == 0 ? g->t : g->s, other = mode == 0 ? g->s : g->t;
    const bool texel = texel_ok(g, l->dev);
    const ipt_bind_kind kind = quad_kind(g, texel);
    const uint64_t an = (uint64_t)rows * g->c, bn = (uint64_t)other * g->c;
    for (uint32_t b = 0, step = batch_step(g); b < g->n; b += step) {
        const uint32_t a = (uint32_t)(b * an - ipt_attn_below(l, b * an, g->elt)) / 4;
        const uint32_t o = (uint32_t)(b * bn - ipt_attn_below(l, b * bn, g->elt)) / 4;
        const uint32_t stat = b * g->heads * g->t;
        struct {
            uint32_t rows, other, heads, ld, a1, a2, b1, b2, o1, o2, lse, delta;
            float scale;
        } push = {rows, other, g->heads, g->c / 4, a, a, o, o, a, a, stat, stat, g->scale};
        ipt_dispatch *d = ipt_launch_add(l, names[g->dtype == IPT_F16][texel], &push, sizeof push);
        const uint32_t spec[] = {sg, g->d / 4, kb, tq, g->causal, mode};
        for (size_t i = 0; i < IPT_COUNT(spec); i++)
            ipt_launch_spec(d, spec[i]);
        for (int i = 0; i < 4; i++) {
            const uint64_t n = i < 2 ? an : bn;
            ipt_launch_bind_part(l, d,
                                 &(ipt_bind){kind, IPT_SRC_IN, (uint8_t)(in[mode][i]), false,
                                             (b * n) * g->elt, (step * n) * g->elt});
        }
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 4, false);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, delta, false);
        for (int i = 0; i < 2; i++)
            ipt_launch_bind_part(l, d,
                                 &(ipt_bind){IPT_BIND_SSBO, IPT_SRC_OUT, (uint8_t)(out[mode][i]),
                                             true, (b * an) * g->elt, (step * an) * g->elt});
        ipt_attn_groups(d, ipt_attn_div_up(rows, sg * tq), g->heads, step);
        if (d) {
            d->k.subgroup = sg;
            d->macs = (mode == 0 ? 3.0 : 4.0) * step * (double)an * other;
            d->no_wait = b != 0;
        }
    }
}

typedef struct block { /* part of the score matrix: rows (queries) and columns (keys) */
    uint32_t row0, rows, col0, cols;
} block;

/* Scratch s := p and dp := ds of a block of scores. */
static void add_block(const ipt_attn_geo *g, ipt_launch *l, const ipt_attn_pairs *p, const block *k,
                      const int scratch[3])
{
    const uint32_t mnk[3] = {k->rows, k->cols, g->d};
    ipt_attn_mm(g, l, IPT_ATTN_HHF, p, mnk, g->scale,
                ipt_attn_heads(g, IPT_SRC_IN, 0, g->t, k->row0),
                ipt_attn_transposed(ipt_attn_heads(g, IPT_SRC_IN, 1, g->s, k->col0)),
                ipt_attn_scratch(g, scratch[0], p, k->rows, k->cols));
    ipt_attn_mm(g, l, IPT_ATTN_HHF, p, mnk, 1, ipt_attn_heads(g, IPT_SRC_IN, 5, g->t, k->row0),
                ipt_attn_transposed(ipt_attn_heads(g, IPT_SRC_IN, 2, g->s, k->col0)),
                ipt_attn_scratch(g, scratch[1], p, k->rows, k->cols));
    struct {
        uint32_t count, rows, cols, row0, col0, t, pair0, lse_off;
        float scale;
    } push = {p->count * k->rows * k->cols,
              k->rows,
              k->cols,
              k->row0,
              k->col0,
              g->t,
              p->first,
              0,
              g->scale};
    ipt_dispatch *d = ipt_launch_add(l, "attention_ds", &push, sizeof push);
    ipt_launch_spec(d, g->causal);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scratch[0], true);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scratch[1], true);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 4, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scratch[2], false);
    ipt_launch_linear(l, d, push.count, WG);
}

static void add_dq(const ipt_attn_geo *g, ipt_launch *l, const ipt_attn_pairs *p, const block *k,
                   const int scratch[3])
{
    ipt_attn_mm(g, l, IPT_ATTN_FHH, p, (const uint32_t[]){k->rows, g->d, k->cols}, 1,
                ipt_attn_scratch(g, scratch[1], p, k->rows, k->cols),
                ipt_attn_heads(g, IPT_SRC_IN, 1, g->s, k->col0),
                ipt_attn_heads(g, IPT_SRC_OUT, 0, g->t, k->row0));
}

static void add_dkv(const ipt_attn_geo *g, ipt_launch *l, const ipt_attn_pairs *p, const block *k,
                    const int scratch[3])
{
    const uint32_t mnk[3] = {k->cols, g->d, k->rows};
    ipt_attn_mm(g, l, IPT_ATTN_FHH, p, mnk, 1,
                ipt_attn_transposed(ipt_attn_scratch(g, scratch[1], p, k->rows, k->cols)),
                ipt_attn_heads(g, IPT_SRC_IN, 0, g->t, k->row0),
                ipt_attn_heads(g, IPT_SRC_OUT, 1, g->s, k->col0));
    ipt_attn_mm(g, l, IPT_ATTN_FHH, p, mnk, 1,
                ipt_attn_transposed(ipt_attn_scratch(g, scratch[0], p, k->rows, k->cols)),
                ipt_attn_heads(g, IPT_SRC_IN, 5, g->t, k->row0),
                ipt_attn_heads(g, IPT_SRC_OUT, 2, g->s, k->col0));
}

/* Any head width: scores in scratch.  Whole pairs at once when they fit; else blocks of queries for
 * dq, then blocks of keys for dk and dv. */
static ipt_status backward_mm(const ipt_attn_geo *g, ipt_launch *l, int delta)
{
    ipt_attn_pairs p;
    const uint32_t rows = ipt_attn_plan(g, l, g->t, g->s, &p),
                   cols = ipt_attn_plan(g, l, g->s, g->t, &p);
    const uint32_t count = p.count;
    if (rows == 0 || cols == 0)
        return IPT_ERR_TOO_LARGE;
    const uint64_t a = (uint64_t)rows * g->s, b = (uint64_t)cols * g->t,
                   bytes = count * (a > b ? a : b) * 4;
    int scratch[3] = {0, 0, delta};
    scratch[0] = ipt_launch_scratch(l, bytes);
    scratch[1] = ipt_launch_scratch(l, bytes);
    do {
        for (uint32_t r = 0; r < g->t; r += rows) {
            const block k = {r, g->t - r < rows ? g->t - r : rows, 0, g->s};
            add_block(g, l, &p, &k, scratch);
            add_dq(g, l, &p, &k, scratch);
            if (rows == g->t)
                add_dkv(g, l, &p, &k, scratch);
        }
        for (uint32_t c = 0; c < g->s && rows < g->t; c += cols) {
            const block k = {0, g->t, c, g->s - c < cols ? g->s - c : cols};
            add_block(g, l, &p, &k, scratch);
            add_dkv(g, l, &p, &k, scratch);
        }
    } while (ipt_attn_next(g, &p, count));
    return l->status;
}

static ipt_status attention_bwd_kernel(const ipt_node *n, ipt_launch *l)
{
    ipt_attn_geo g = ipt_attn_geo_of(n, l, &n->in_shape[0], &n->in_shape[1]);
    if (!ipt_attn_fits(&g, l))
        return IPT_ERR_TOO_LARGE;
    int delta = add_delta(&g, l);
    if (!simd_ok(&g, l->dev))
        return backward_mm(&g, l, delta);
    backward_simd(&g, l, delta, 0);
    backward_simd(&g, l, delta, 1);
    return l->status;
}

const ipt_op_def ipt_op_attention = {
    .name = "attention",
    .sig = "q:ntc k:nsc v:nsc -> o:ntc lse:nht",
    .infer = attention_infer,
    .ref = attention_ref,
    .grad = attention_grad,
    .kernel = attention_kernel,
};
const ipt_op_def ipt_op_attention_bwd = {
    .name = "attention_bwd",
    .sig = "q:ntc k:nsc v:nsc o:ntc lse:nht do:ntc -> dq:ntc dk:nsc dv:nsc",
    .infer = attention_infer,
    .ref = attention_bwd_ref,
    .kernel = attention_bwd_kernel,
};
