/* graph/op_attention.c - softmax(scale q k^T) v in its tiled form (nothing of size T x S is kept) and in
 * its materialised form (probabilities are a value of the graph), with gradients.
 *
 * q, o [N,T,C], k, v [N,S,C], C = heads x d.  Three ways to run the tiled form: subgroup kernels for
 * CPU devices (attention_simd.comp), shared-memory tiles (attention_tile.comp), and for wide heads on
 * CPU devices chunks of scores in scratch with row-blocked products (attention_rows.comp). */
#include "graph/op.h"

#include <math.h>
#include <string.h>

enum { WG = 64, MAX_SIMD_D = 160, TILE = 64 };
static const uint64_t SCRATCH = UINT64_C(32) << 20; /* bytes of one matrix of scores */

typedef struct attn_geo {
    uint32_t n, t, s, c, heads, d;
    uint64_t elt; /* bytes */
    ipt_dtype dtype;
    float scale;
    uint32_t causal;
    bool whole; /* every tensor fits one binding */
} attn_geo;

/* --- shapes ------------------------------------------------------------------------------------- */
static bool dividing(const ipt_node *n, int32_t c)
{
    return n->attr.attn.heads >= 1 && c % n->attr.attn.heads == 0;
}

static const char *same_types(const ipt_node *n, int n_act)
{
    for (int i = 0; i < n_act; i++)
        if (n->in_shape[i].dtype != n->in_shape[0].dtype || n->in_shape[i].dtype == IPT_I32)
            return "operands differ in type";
    return NULL;
}

static const char *check_query(const ipt_node *n)
{
    const ipt_shape *q = &n->in_shape[0], *k = &n->in_shape[1];
    if (!dividing(n, q->dim[2]))
        return "channels are not a multiple of the heads";
    if (n->attr.attn.causal && q->dim[1] != k->dim[1])
        return "causal attention needs as many keys as queries";
    if (!(fabsf(n->attr.attn.scale) > 0) || isinf(n->attr.attn.scale))
        return "scale must be finite and not 0";
    return NULL;
}

static const char *attention_infer(const ipt_node *n, ipt_shape out[])
{
    const ipt_shape *q = &n->in_shape[0];
    const char *problem = check_query(n);
    if (problem)
        return problem;
    if (n->op == IPT_OP_ATTENTION) {
        out[1] = ipt_shape3(IPT_F32, q->dim[0], n->attr.attn.heads, q->dim[1]);
        return same_types(n, 3);
    }
    if (n->in_shape[4].dim[1] != n->attr.attn.heads || n->in_shape[4].dtype != IPT_F32 ||
        n->in_shape[5].dtype != q->dtype)
        return "lse or do does not fit";
    return same_types(n, 4);
}

static const char *probs_infer(const ipt_node *n, ipt_shape out[])
{
    const ipt_shape *q = &n->in_shape[0], *k = &n->in_shape[1];
    const char *problem = check_query(n);
    if (problem)
        return problem;
    if (n->op == IPT_OP_ATTN_PROBS) {
        out[0] = ipt_shape4(q->dtype, q->dim[0], n->attr.attn.heads, q->dim[1], k->dim[1]);
        return same_types(n, 2);
    }
    if (n->in_shape[2].dim[1] != n->attr.attn.heads)
        return "p does not fit the heads";
    return same_types(n, 4);
}

static const char *apply_infer(const ipt_node *n, ipt_shape out[])
{
    (void)out;
    if (!dividing(n, n->in_shape[1].dim[2]) || n->in_shape[0].dim[1] != n->attr.attn.heads)
        return "p or v does not fit the heads";
    return same_types(n, n->op == IPT_OP_ATTN_APPLY ? 2 : 3);
}

/* q, k: shapes of operands of those extents. */
static attn_geo geo_of(const ipt_node *n, const ipt_launch *l, const ipt_shape *q, const ipt_shape *k)
{
    attn_geo g = {.n = (uint32_t)k->dim[0],
                  .t = (uint32_t)q->dim[1],
                  .s = (uint32_t)k->dim[1],
                  .c = (uint32_t)k->dim[2],
                  .heads = (uint32_t)n->attr.attn.heads,
                  .dtype = k->dtype,
                  .scale = n->attr.attn.scale,
                  .causal = n->attr.attn.causal != 0};
    g.d = g.c / g.heads;
    g.elt = ipt_dtype_bytes(k->dtype);
    if (l) {
        uint64_t rows = g.t > g.s ? g.t : g.s, stat = (uint64_t)g.n * g.heads * g.t * 4;
        g.whole = g.n * rows * g.c * g.elt <= l->dev->max_range && stat <= l->dev->max_range;
    }
    return g;
}

/* False when an index or a binding of one batch element does not fit the device. */
static bool fits(const attn_geo *g, const ipt_launch *l)
{
    uint64_t rows = g->t > g->s ? g->t : g->s, limit = l->dev->max_group_count;
    uint64_t one = rows * g->c * g->elt + l->dev->align;
    return (uint64_t)g->n * rows * g->c <= UINT32_MAX && (g->whole || one <= l->dev->max_range) &&
           (uint64_t)g->heads * 32 <= limit && g->n <= limit && rows / 8 + 1 <= limit &&
           (uint64_t)g->n * g->heads * g->t * 4 <= l->dev->max_range;
}

/* --- references ------------------------------------------------------------------------------------ */
typedef struct ref_geo {
    size_t n, t, s, h, d, c;
    double scale;
    bool causal;
} ref_geo;

static ref_geo ref_geo_of(const ipt_node *n, const ipt_shape *q, const ipt_shape *k)
{
    ref_geo g = {(size_t)k->dim[0],
                 (size_t)q->dim[1],
                 (size_t)k->dim[1],
                 (size_t)n->attr.attn.heads,
                 (size_t)(k->dim[2] / n->attr.attn.heads),
                 (size_t)k->dim[2],
                 (double)n->attr.attn.scale,
                 n->attr.attn.causal != 0};
    return g;
}

/* sum_c a[c] b[c] over one head. */
static double dot(const double *a, const double *b, size_t d)
{
    double sum = 0;
    for (size_t c = 0; c < d; c++)
        sum += a[c] * b[c];
    return sum;
}

/* Rows of head h of a [N,rows,C] tensor. */
static const double *row_of(const ref_geo *g, const double *x, size_t rows, size_t n, size_t h, size_t i)
{
    return x + (n * rows + i) * g->c + h * g->d;
}

static double score(const ref_geo *g, const double *q, const double *k, size_t n, size_t h, size_t i, size_t j)
{
    return g->scale * dot(row_of(g, q, g->t, n, h, i), row_of(g, k, g->s, n, h, j), g->d);
}

/* ln sum exp of the scores of one query. */
static double log_sum(const ref_geo *g, const double *q, const double *k, size_t n, size_t h, size_t i)
{
    size_t lim = g->causal ? i + 1 : g->s;
    double top = -HUGE_VAL, sum = 0;
    for (size_t j = 0; j < lim; j++)
        top = fmax(top, score(g, q, k, n, h, i, j));
    for (size_t j = 0; j < lim; j++)
        sum += exp(score(g, q, k, n, h, i, j) - top);
    return top + log(sum);
}

static void attention_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ref_geo g = ref_geo_of(n, &n->in_shape[0], &n->in_shape[1]);
    for (size_t r = 0; r < g.n * g.h * g.t; r++) {
        size_t b = r / g.t / g.h, h = r / g.t % g.h, i = r % g.t, lim = g.causal ? i + 1 : g.s;
        double lse = log_sum(&g, in[0], in[1], b, h, i);
        double *o = out[0] + (b * g.t + i) * g.c + h * g.d;
        memset(o, 0, g.d * sizeof *o);
        for (size_t j = 0; j < lim; j++) {
            double p = exp(score(&g, in[0], in[1], b, h, i, j) - lse);
            const double *v = row_of(&g, in[2], g.s, b, h, j);
            for (size_t c = 0; c < g.d; c++)
                o[c] += p * v[c];
        }
        out[1][r] = lse;
    }
}

/* dst += a x over one head. */
static void axpy(double *dst, double a, const double *x, size_t d)
{
    for (size_t c = 0; c < d; c++)
        dst[c] += a * x[c];
}

static void attention_bwd_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ref_geo g = ref_geo_of(n, &n->in_shape[0], &n->in_shape[1]);
    for (int k = 0; k < 3; k++)
        memset(out[k], 0, ipt_shape_count(&n->out_shape[k]) * sizeof(double));
    for (size_t r = 0; r < g.n * g.h * g.t; r++) {
        size_t b = r / g.t / g.h, h = r / g.t % g.h, i = r % g.t, lim = g.causal ? i + 1 : g.s;
        size_t at = (b * g.t + i) * g.c + h * g.d;
        double delta = dot(in[3] + at, in[5] + at, g.d);
        for (size_t j = 0; j < lim; j++) {
            size_t key = (b * g.s + j) * g.c + h * g.d;
            double p = exp(score(&g, in[0], in[1], b, h, i, j) - in[4][r]);
            double ds = g.scale * p * (dot(in[5] + at, in[2] + key, g.d) - delta);
            axpy(out[0] + at, ds, in[1] + key, g.d);
            axpy(out[1] + key, ds, in[0] + at, g.d);
            axpy(out[2] + key, p, in[5] + at, g.d);
        }
    }
}

static void probs_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ref_geo g = ref_geo_of(n, &n->in_shape[0], &n->in_shape[1]);
    for (size_t r = 0; r < g.n * g.h * g.t; r++) {
        size_t b = r / g.t / g.h, h = r / g.t % g.h, i = r % g.t, lim = g.causal ? i + 1 : g.s;
        double lse = log_sum(&g, in[0], in[1], b, h, i);
        for (size_t j = 0; j < g.s; j++)
            out[0][r * g.s + j] = j < lim ? exp(score(&g, in[0], in[1], b, h, i, j) - lse) : 0;
    }
}

static void probs_bwd_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ref_geo g = ref_geo_of(n, &n->in_shape[0], &n->in_shape[1]);
    for (int k = 0; k < 2; k++)
        memset(out[k], 0, ipt_shape_count(&n->out_shape[k]) * sizeof(double));
    for (size_t r = 0; r < g.n * g.h * g.t; r++) {
        size_t b = r / g.t / g.h, h = r / g.t % g.h, i = r % g.t, at = (b * g.t + i) * g.c + h * g.d;
        const double *p = in[2] + r * g.s, *dp = in[3] + r * g.s;
        double sum = dot(p, dp, g.s);
        for (size_t j = 0; j < g.s; j++) {
            size_t key = (b * g.s + j) * g.c + h * g.d;
            double ds = g.scale * p[j] * (dp[j] - sum);
            axpy(out[0] + at, ds, in[1] + key, g.d);
            axpy(out[1] + key, ds, in[0] + at, g.d);
        }
    }
}

static ref_geo apply_geo(const ipt_node *n)
{
    ipt_shape q = n->in_shape[1];
    q.dim[1] = n->in_shape[0].dim[2];
    return ref_geo_of(n, &q, &n->in_shape[1]);
}

static void apply_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ref_geo g = apply_geo(n);
    memset(out[0], 0, ipt_shape_count(&n->out_shape[0]) * sizeof(double));
    for (size_t r = 0; r < g.n * g.h * g.t; r++) {
        size_t b = r / g.t / g.h, h = r / g.t % g.h, i = r % g.t;
        for (size_t j = 0; j < g.s; j++)
            axpy(out[0] + (b * g.t + i) * g.c + h * g.d, in[0][r * g.s + j], row_of(&g, in[1], g.s, b, h, j), g.d);
    }
}

static void apply_bwd_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ref_geo g = apply_geo(n);
    memset(out[1], 0, ipt_shape_count(&n->out_shape[1]) * sizeof(double));
    for (size_t r = 0; r < g.n * g.h * g.t; r++) {
        size_t b = r / g.t / g.h, h = r / g.t % g.h, i = r % g.t;
        const double *grad = row_of(&g, in[2], g.t, b, h, i);
        for (size_t j = 0; j < g.s; j++) {
            out[0][r * g.s + j] = dot(grad, row_of(&g, in[1], g.s, b, h, j), g.d);
            axpy(out[1] + (b * g.s + j) * g.c + h * g.d, in[0][r * g.s + j], grad, g.d);
        }
    }
}

/* --- gradients and builder ---------------------------------------------------------------------------- */
static void attention_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want, ipt_val dx[])
{
    if (!dy[0].id || !(want & 7))
        return;
    ipt_val in[6] = {ipt_in(n, 0), ipt_in(n, 1), ipt_in(n, 2), ipt_out(n, 0), ipt_out(n, 1), dy[0]};
    ipt_emit(g, IPT_OP_ATTENTION_BWD, n->name, in, 6, &n->attr, dx);
}

static void probs_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want, ipt_val dx[])
{
    if (!dy[0].id || !(want & 3))
        return;
    ipt_val in[4] = {ipt_in(n, 0), ipt_in(n, 1), ipt_out(n, 0), dy[0]};
    ipt_emit(g, IPT_OP_ATTN_PROBS_BWD, n->name, in, 4, &n->attr, dx);
}

static void apply_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want, ipt_val dx[])
{
    if (!dy[0].id || !(want & 3))
        return;
    ipt_val in[3] = {ipt_in(n, 0), ipt_in(n, 1), dy[0]};
    ipt_emit(g, IPT_OP_ATTN_APPLY_BWD, n->name, in, 3, &n->attr, dx);
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

/* --- bindings ------------------------------------------------------------------------------------------- */
/* Binds elements first .. first + count, from the last aligned byte before them; returns the element
 * where the binding starts. */
static uint32_t bind_part(const ipt_launch *l, ipt_dispatch *d, ipt_bind_kind kind, ipt_src src, int index,
                          bool write, uint64_t first, uint64_t count, uint64_t elt)
{
    uint64_t off = first * elt / l->dev->align * l->dev->align;
    ipt_launch_bind_range(d, kind, src, index, write, off, (first + count) * elt - off);
    return (uint32_t)(off / elt);
}

static uint32_t aligned_below(const ipt_launch *l, uint64_t first, uint64_t elt)
{
    return (uint32_t)(first * elt / l->dev->align * l->dev->align / elt);
}

static void set_groups(ipt_dispatch *d, uint32_t x, uint32_t y, uint32_t z)
{
    if (d) {
        d->groups[0] = x;
        d->groups[1] = y;
        d->groups[2] = z;
    }
}

static uint32_t div_up(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }

/* --- tiled form: subgroup and shared-memory kernels -------------------------------------------------------- */
static bool simd_ok(const attn_geo *g, const ipt_traits *dev)
{
    return dev->simd && dev->subgroup_shuffle && dev->subgroup >= 4 && dev->subgroup <= 32 && g->d % 4 == 0 &&
           g->d <= MAX_SIMD_D;
}

static bool texel_ok(const attn_geo *g, const ipt_traits *dev)
{
    uint64_t rows = g->t > g->s ? g->t : g->s, count = g->n * rows * g->c / 4;
    return dev->texel && count <= dev->max_texels && count <= INT32_MAX;
}

static ipt_bind_kind quad_kind(const attn_geo *g, bool texel)
{
    return !texel ? IPT_BIND_SSBO : g->dtype == IPT_F16 ? IPT_BIND_TEXEL_RGBA16F : IPT_BIND_TEXEL_RGBA32F;
}

/* The variants of the subgroup kernels: [f16][texel]. */
#define QUAD_VARIANTS(name) {{name ".f32_ssbo", name ".f32"}, {name ".f16_ssbo", name ".f16"}}

/* The batch elements of one dispatch start at b and are `count` many. */
static uint32_t batch_step(const attn_geo *g) { return g->whole ? g->n : 1; }

static void forward_simd(const attn_geo *g, ipt_launch *l)
{
    static const char *const names[2][2] = QUAD_VARIANTS("attention_simd");
    const uint32_t sg = l->dev->subgroup, kb = sg >= 16 ? 8 : 4, tq = sg >= 16 && g->d <= 64 ? 4 : 2;
    const bool texel = texel_ok(g, l->dev);
    const ipt_bind_kind kind = quad_kind(g, texel);
    const uint64_t qn = (uint64_t)g->t * g->c, kn = (uint64_t)g->s * g->c, ln = (uint64_t)g->heads * g->t;
    for (uint32_t b = 0, step = batch_step(g); b < g->n; b += step) {
        struct {
            uint32_t t, s, heads, ld, q_off, k_off, v_off, o_off, lse_off;
            float scale;
        } push = {g->t, g->s, g->heads, g->c / 4, 0, 0, 0, 0, 0, g->scale * 1.44269504088896340736f};
        push.q_off = push.o_off = (uint32_t)(b * qn - aligned_below(l, b * qn, g->elt)) / 4;
        push.k_off = push.v_off = (uint32_t)(b * kn - aligned_below(l, b * kn, g->elt)) / 4;
        push.lse_off = (uint32_t)(b * ln);
        ipt_dispatch *d = ipt_launch_add(l, names[g->dtype == IPT_F16][texel], &push, sizeof push);
        const uint32_t spec[] = {sg, g->d / 4, kb, tq, g->causal};
        for (size_t i = 0; i < IPT_COUNT(spec); i++)
            ipt_launch_spec(d, spec[i]);
        bind_part(l, d, kind, IPT_SRC_IN, 0, false, b * qn, step * qn, g->elt);
        bind_part(l, d, kind, IPT_SRC_IN, 1, false, b * kn, step * kn, g->elt);
        bind_part(l, d, kind, IPT_SRC_IN, 2, false, b * kn, step * kn, g->elt);
        bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true, b * qn, step * qn, g->elt);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 1, true);
        set_groups(d, div_up(g->t, sg * tq), g->heads, step);
        if (d) {
            d->k.subgroup = sg;
            d->macs = 2.0 * step * (double)qn * g->s;
            d->no_wait = b != 0;
        }
    }
}

static void forward_tile(const attn_geo *g, ipt_launch *l)
{
    const uint32_t chunks = div_up(g->d, 16), slices = div_up(chunks, 8), nv = div_up(chunks, slices);
    const uint64_t qn = (uint64_t)g->t * g->c, kn = (uint64_t)g->s * g->c, ln = (uint64_t)g->heads * g->t;
    for (uint32_t b = 0, step = batch_step(g); b < g->n; b += step) {
        struct {
            uint32_t t, s, heads, d, ld, q_off, k_off, v_off, o_off, lse_off;
            float scale;
        } push = {g->t, g->s, g->heads, g->d, g->c, 0, 0, 0, 0, 0, g->scale * 1.44269504088896340736f};
        push.q_off = push.o_off = (uint32_t)(b * qn) - aligned_below(l, b * qn, g->elt);
        push.k_off = push.v_off = (uint32_t)(b * kn) - aligned_below(l, b * kn, g->elt);
        push.lse_off = (uint32_t)(b * ln);
        ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("attention_tile", g->dtype), &push, sizeof push);
        ipt_launch_spec(d, nv);
        ipt_launch_spec(d, g->causal);
        bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_IN, 0, false, b * qn, step * qn, g->elt);
        bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_IN, 1, false, b * kn, step * kn, g->elt);
        bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_IN, 2, false, b * kn, step * kn, g->elt);
        bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true, b * qn, step * qn, g->elt);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 1, true);
        set_groups(d, div_up(g->t, TILE), g->heads * slices, step);
        if (d) {
            d->macs = 2.0 * step * (double)qn * g->s;
            d->no_wait = b != 0;
        }
    }
}

/* --- tiled form, wide heads on CPU devices: scores in scratch ------------------------------------------------ */
typedef struct panel_geo {
    uint32_t sg, s_pad; /* lanes; keys rounded up to 16 (zeros) */
    uint64_t k_quads, v_quads;
    int k, v, scores; /* scratch numbers */
} panel_geo;

static bool rows_ok(const attn_geo *g, const ipt_traits *dev)
{
    return dev->simd && dev->subgroup_shuffle && dev->subgroup >= 4 && dev->subgroup <= 32 && g->d % 4 == 0 &&
           g->dtype == IPT_F32 && texel_ok(g, dev);
}

/* Keys (mode 0) or values (mode 1) of one head into panels. */
static void pack_panels(const attn_geo *g, ipt_launch *l, const panel_geo *p, uint32_t b, uint32_t h, uint32_t mode)
{
    const uint64_t kn = (uint64_t)g->s * g->c, quads = mode == 0 ? p->k_quads : p->v_quads;
    struct {
        uint32_t count, s, d, k_rows, off, ld, out_off;
    } push = {(uint32_t)quads, g->s, g->d, mode == 0 ? g->d : p->s_pad, 0, g->c, 0};
    push.off = (uint32_t)(b * kn) - aligned_below(l, b * kn, g->elt) + h * g->d;
    ipt_dispatch *d = ipt_launch_add(l, "attention_pack", &push, sizeof push);
    ipt_launch_spec(d, p->sg);
    ipt_launch_spec(d, mode);
    bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_IN, mode == 0 ? 1 : 2, false, b * kn, kn, g->elt);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, mode == 0 ? p->k : p->v, true);
    ipt_launch_linear(l, d, quads, WG);
}

struct rows_push { /* shaders/attention_rows.comp; quads */
    uint32_t m, n4, k4, a_off, a_ld, b_off, c_off, c_ld;
    float alpha;
};

static ipt_dispatch *add_rows(ipt_launch *l, const panel_geo *p, const struct rows_push *push)
{
    const uint32_t uk = push->k4 % 4 == 0 ? 4 : push->k4 % 2 == 0 ? 2 : 1, rb = p->sg >= 16 ? 2 : 16 / p->sg;
    ipt_dispatch *d = ipt_launch_add(l, "attention_rows", push, sizeof *push);
    ipt_launch_spec(d, p->sg);
    ipt_launch_spec(d, rb);
    ipt_launch_spec(d, uk);
    set_groups(d, div_up(push->m, p->sg * rb), div_up(push->n4, p->sg), 1);
    if (d) {
        d->k.subgroup = p->sg;
        d->macs = 16.0 * push->m * push->n4 * push->k4;
    }
    return d;
}

struct soft_push { /* shaders/attention_soft.comp */
    uint32_t n_row, rows, row0, n, ld, ld_out, out_off, lse_off, lse_ld;
};

static ipt_status forward_rows(const attn_geo *g, ipt_launch *l)
{
    panel_geo p = {.sg = l->dev->subgroup, .s_pad = div_up(g->s, 16) * 16};
    p.k_quads = (uint64_t)div_up(p.s_pad, 4 * p.sg) * g->d * p.sg;
    p.v_quads = (uint64_t)div_up(g->d, 4 * p.sg) * p.s_pad * p.sg;
    const uint64_t slack = 4 * (uint64_t)p.sg, range = l->dev->max_range, row_bytes = (uint64_t)p.s_pad * 4;
    uint64_t chunk = (SCRATCH < range ? SCRATCH : range) / row_bytes;
    chunk = chunk < g->t ? chunk : g->t;
    if ((p.k_quads + slack) * 16 > range || (p.v_quads + slack) * 16 > range || chunk == 0)
        return IPT_ERR_UNSUPPORTED;
    p.k = ipt_launch_scratch(l, (p.k_quads + slack) * 16);
    p.v = ipt_launch_scratch(l, (p.v_quads + slack) * 16);
    p.scores = ipt_launch_scratch(l, chunk * row_bytes);
    const uint64_t qn = (uint64_t)g->t * g->c;
    for (uint32_t pair = 0; pair < g->n * g->heads; pair++) {
        const uint32_t b = pair / g->heads, h = pair % g->heads;
        const uint32_t at = ((uint32_t)(b * qn) - aligned_below(l, b * qn, g->elt) + h * g->d) / 4;
        pack_panels(g, l, &p, b, h, 0);
        pack_panels(g, l, &p, b, h, 1);
        for (uint32_t r = 0; r < g->t; r += (uint32_t)chunk) {
            const uint32_t rows = g->t - r < chunk ? g->t - r : (uint32_t)chunk;
            struct rows_push mul = {rows,        p.s_pad / 4, g->d / 4, at + r * (g->c / 4), g->c / 4, 0, 0,
                                    p.s_pad / 4, g->scale};
            ipt_dispatch *d = add_rows(l, &p, &mul);
            bind_part(l, d, IPT_BIND_TEXEL_RGBA32F, IPT_SRC_IN, 0, false, b * qn, qn, g->elt);
            ipt_launch_bind(d, IPT_BIND_TEXEL_RGBA32F, IPT_SRC_SCRATCH, p.k, false);
            ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, p.scores, true);
            struct soft_push soft = {rows, rows, r, g->s, p.s_pad, p.s_pad, 0, pair * g->t, 1};
            d = ipt_launch_add(l, "attention_soft.f32", &soft, sizeof soft);
            ipt_launch_spec(d, g->causal);
            ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, p.scores, true);
            ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, p.scores, true);
            ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 1, true);
            ipt_launch_linear(l, d, rows, 1);
            mul = (struct rows_push){rows, g->d / 4, p.s_pad / 4, 0, p.s_pad / 4, 0, at + r * (g->c / 4), g->c / 4, 1};
            d = add_rows(l, &p, &mul);
            ipt_launch_bind(d, IPT_BIND_TEXEL_RGBA32F, IPT_SRC_SCRATCH, p.scores, false);
            ipt_launch_bind(d, IPT_BIND_TEXEL_RGBA32F, IPT_SRC_SCRATCH, p.v, false);
            bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true, b * qn, qn, g->elt);
        }
    }
    return l->status;
}

static ipt_status attention_kernel(const ipt_node *n, ipt_launch *l)
{
    attn_geo g = geo_of(n, l, &n->in_shape[0], &n->in_shape[1]);
    if (!fits(&g, l))
        return IPT_ERR_UNSUPPORTED;
    if (simd_ok(&g, l->dev))
        forward_simd(&g, l);
    else if (rows_ok(&g, l->dev))
        return forward_rows(&g, l);
    else
        forward_tile(&g, l);
    return l->status;
}

/* --- products with free strides (attention_mm.comp) -------------------------------------------------------------- */
typedef struct operand { /* element (i, j) of a pair at off + batch sb + head sh + i s0 + j s1 */
    uint32_t off, sb, sh, s0, s1;
} operand;
typedef struct matrix {
    ipt_src src;
    int index;
    uint64_t batch; /* elements of one batch element; 0: scratch, bound whole */
    operand at;
} matrix;
typedef struct pairs { /* (batch, head) pairs first .. first + count - 1 */
    uint32_t first, count;
} pairs;

/* Head slices of a [N,rows,C] tensor from row `row0`. */
static matrix heads_of(const attn_geo *g, ipt_src src, int index, uint32_t rows, uint32_t row0)
{
    return (matrix){src, index, (uint64_t)rows * g->c, {row0 * g->c, rows * g->c, g->d, g->c, 1}};
}

/* Of a [N,heads,T,S] tensor. */
static matrix probs_of(const attn_geo *g, ipt_src src, int index, uint32_t row0)
{
    const uint32_t one = g->t * g->s;
    return (matrix){src, index, (uint64_t)one * g->heads, {row0 * g->s, one * g->heads, one, g->s, 1}};
}

/* Of scratch [count][rows][cols] that starts at pair p.first. */
static matrix scratch_of(const attn_geo *g, int index, const pairs *p, uint32_t rows, uint32_t cols)
{
    const uint32_t one = rows * cols;
    return (matrix){IPT_SRC_SCRATCH, index, 0, {0u - p->first * one, one * g->heads, one, cols, 1}};
}

static matrix transposed(matrix m)
{
    const uint32_t s = m.at.s0;
    m.at.s0 = m.at.s1;
    m.at.s1 = s;
    return m;
}

/* What of the matrix a dispatch over these pairs reaches. */
static uint64_t first_of(const attn_geo *g, const matrix *m, const pairs *p)
{
    return p->first / g->heads * m->batch;
}

static void bind_matrix(const attn_geo *g, ipt_launch *l, ipt_dispatch *d, const matrix *m, const pairs *p,
                        bool write)
{
    uint64_t first = first_of(g, m, p), last = (p->first + p->count - 1) / g->heads + 1;
    if (m->batch == 0)
        ipt_launch_bind(d, IPT_BIND_SSBO, m->src, m->index, write);
    else
        bind_part(l, d, IPT_BIND_SSBO, m->src, m->index, write, first, last * m->batch - first, g->elt);
}

static void add_mm(const attn_geo *g, ipt_launch *l, const char *name, const pairs *p, const uint32_t mnk[3],
                   float alpha, matrix a, matrix b, matrix c)
{
    struct {
        uint32_t m, n, k, heads, pair0;
        float alpha;
        operand at[3];
    } push = {mnk[0], mnk[1], mnk[2], g->heads, p->first, alpha, {a.at, b.at, c.at}};
    const matrix *all[3] = {&a, &b, &c};
    for (int i = 0; i < 3; i++)
        if (all[i]->batch)
            push.at[i].off -= aligned_below(l, first_of(g, all[i], p), g->elt);
    ipt_dispatch *d = ipt_launch_add(l, g->dtype == IPT_F16 ? name : "attention_mm.f32", &push, sizeof push);
    for (int i = 0; i < 3; i++)
        bind_matrix(g, l, d, all[i], p, i == 2);
    set_groups(d, div_up(mnk[1], TILE), div_up(mnk[0], TILE), p->count);
    if (d)
        d->macs = (double)mnk[0] * mnk[1] * mnk[2] * p->count;
}

/* How many pairs and how many of `extent` lines of `other` scores each fit the scratch. */
static uint32_t plan_chunk(const attn_geo *g, const ipt_launch *l, uint32_t extent, uint32_t other, pairs *p)
{
    uint64_t limit = (SCRATCH < l->dev->max_range ? SCRATCH : l->dev->max_range) / 4;
    uint64_t one = (uint64_t)extent * other;
    p->first = 0;
    p->count = 1;
    if (one > limit)
        return (uint32_t)(limit / other);
    uint64_t fit = limit / one, all = (uint64_t)g->n * g->heads;
    if (fit > all)
        fit = all;
    if (fit > l->dev->max_group_count)
        fit = l->dev->max_group_count;
    if (!g->whole && fit > 1) /* inside one batch element: a divisor of the heads */
        for (fit = fit < g->heads ? fit : g->heads; g->heads % fit; fit--)
            ;
    p->count = (uint32_t)fit;
    return extent;
}

static bool next_pairs(const attn_geo *g, pairs *p, uint32_t count)
{
    p->first += p->count;
    uint32_t left = p->first < g->n * g->heads ? g->n * g->heads - p->first : 0;
    p->count = left < count ? left : count;
    return left > 0;
}

/* --- materialised probabilities -------------------------------------------------------------------------------------- */
/* [N,heads,T,S] tensors: bound by batch element. */
static bool probs_fit(attn_geo *g, const ipt_launch *l)
{
    uint64_t batch = (uint64_t)g->heads * g->t * g->s, range = l->dev->max_range;
    if (batch * g->n * g->elt > range)
        g->whole = false;
    return fits(g, l) && batch * g->n <= UINT32_MAX && (g->whole || batch * g->elt + l->dev->align <= range);
}

static ipt_status probs_kernel(const ipt_node *n, ipt_launch *l)
{
    attn_geo g = geo_of(n, l, &n->in_shape[0], &n->in_shape[1]);
    pairs p;
    if (!probs_fit(&g, l))
        return IPT_ERR_UNSUPPORTED;
    const uint32_t chunk = plan_chunk(&g, l, g.t, g.s, &p), count = p.count;
    if (chunk == 0)
        return IPT_ERR_UNSUPPORTED;
    int scores = ipt_launch_scratch(l, (uint64_t)count * chunk * g.s * 4);
    do {
        for (uint32_t r = 0; r < g.t; r += chunk) {
            const uint32_t rows = g.t - r < chunk ? g.t - r : chunk;
            add_mm(&g, l, "attention_mm.hhf", &p, (const uint32_t[]){rows, g.s, g.d}, g.scale,
                   heads_of(&g, IPT_SRC_IN, 0, g.t, r), transposed(heads_of(&g, IPT_SRC_IN, 1, g.s, 0)),
                   scratch_of(&g, scores, &p, rows, g.s));
            const uint64_t first = ((uint64_t)p.first * g.t + r) * g.s, size = (uint64_t)p.count * rows * g.s;
            struct soft_push soft = {p.count * rows, rows, r, g.s, g.s, g.s, 0, 0, 0};
            soft.out_off = (uint32_t)first - aligned_below(l, first, g.elt);
            ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("attention_soft", g.dtype), &soft, sizeof soft);
            ipt_launch_spec(d, g.causal);
            ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scores, false);
            bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true, first, size, g.elt);
            ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scores, false); /* no lse wanted */
            ipt_launch_linear(l, d, soft.n_row, 1);
        }
    } while (next_pairs(&g, &p, count));
    return l->status;
}

static ipt_status probs_bwd_kernel(const ipt_node *n, ipt_launch *l)
{
    attn_geo g = geo_of(n, l, &n->in_shape[0], &n->in_shape[1]);
    pairs p;
    if (!probs_fit(&g, l) || (uint64_t)g.t * g.s * 4 > l->dev->max_range)
        return IPT_ERR_UNSUPPORTED;
    if (plan_chunk(&g, l, g.t, g.s, &p) < g.t)
        p = (pairs){0, 1}; /* dk needs every query: one whole pair at a time */
    const uint32_t count = p.count;
    int ds = ipt_launch_scratch(l, (uint64_t)count * g.t * g.s * 4);
    do {
        const uint64_t first = (uint64_t)p.first * g.t * g.s, size = (uint64_t)p.count * g.t * g.s;
        const uint32_t off = (uint32_t)first - aligned_below(l, first, g.elt);
        struct {
            uint32_t n_row, n, p_off, dp_off;
            float scale;
        } push = {p.count * g.t, g.s, off, off, g.scale};
        ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("attention_pds", g.dtype), &push, sizeof push);
        bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_IN, 2, false, first, size, g.elt);
        bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_IN, 3, false, first, size, g.elt);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, ds, true);
        ipt_launch_linear(l, d, push.n_row, 1);
        const matrix m = scratch_of(&g, ds, &p, g.t, g.s);
        add_mm(&g, l, "attention_mm.fhh", &p, (const uint32_t[]){g.t, g.d, g.s}, 1, m,
               heads_of(&g, IPT_SRC_IN, 1, g.s, 0), heads_of(&g, IPT_SRC_OUT, 0, g.t, 0));
        add_mm(&g, l, "attention_mm.fhh", &p, (const uint32_t[]){g.s, g.d, g.t}, 1, transposed(m),
               heads_of(&g, IPT_SRC_IN, 0, g.t, 0), heads_of(&g, IPT_SRC_OUT, 1, g.s, 0));
    } while (next_pairs(&g, &p, count));
    return l->status;
}

static ipt_status apply_kernel(const ipt_node *n, ipt_launch *l)
{
    ipt_shape q = n->in_shape[1];
    q.dim[1] = n->in_shape[0].dim[2];
    attn_geo g = geo_of(n, l, &q, &n->in_shape[1]);
    if (!probs_fit(&g, l))
        return IPT_ERR_UNSUPPORTED;
    const bool bwd = n->op == IPT_OP_ATTN_APPLY_BWD;
    const uint32_t all = g.n * g.heads, limit = l->dev->max_group_count / g.heads * g.heads;
    const uint32_t count = !g.whole ? g.heads : all < limit ? all : limit;
    pairs p = {0, count};
    do {
        const matrix probs = probs_of(&g, IPT_SRC_IN, 0, 0), v = heads_of(&g, IPT_SRC_IN, 1, g.s, 0);
        if (!bwd) {
            add_mm(&g, l, "attention_mm.hhh", &p, (const uint32_t[]){g.t, g.d, g.s}, 1, probs, v,
                   heads_of(&g, IPT_SRC_OUT, 0, g.t, 0));
            continue;
        }
        const matrix grad = heads_of(&g, IPT_SRC_IN, 2, g.t, 0);
        add_mm(&g, l, "attention_mm.hhh", &p, (const uint32_t[]){g.t, g.s, g.d}, 1, grad, transposed(v),
               probs_of(&g, IPT_SRC_OUT, 0, 0));
        add_mm(&g, l, "attention_mm.hhh", &p, (const uint32_t[]){g.s, g.d, g.t}, 1, transposed(probs), grad,
               heads_of(&g, IPT_SRC_OUT, 1, g.s, 0));
    } while (next_pairs(&g, &p, count));
    return l->status;
}

/* --- gradient of the tiled form ---------------------------------------------------------------------------------------- */
/* delta [N,heads,T] = rowsum(do o) into scratch. */
static int add_delta(const attn_geo *g, ipt_launch *l)
{
    const uint64_t qn = (uint64_t)g->t * g->c;
    int delta = ipt_launch_scratch(l, (uint64_t)g->n * g->heads * g->t * 4);
    for (uint32_t b = 0, step = batch_step(g); b < g->n; b += step) {
        const uint32_t off = (uint32_t)(b * qn) - aligned_below(l, b * qn, g->elt);
        struct {
            uint32_t count, t, heads, d, o_off, do_off, delta_off;
        } push = {step * g->heads * g->t, g->t, g->heads, g->d, off, off, b * g->heads * g->t};
        ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("attention_delta", g->dtype), &push, sizeof push);
        bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_IN, 3, false, b * qn, step * qn, g->elt);
        bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_IN, 5, false, b * qn, step * qn, g->elt);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, delta, true);
        ipt_launch_linear(l, d, push.count, WG);
        if (d)
            d->no_wait = b != 0;
    }
    return delta;
}

/* mode 0: rows are queries, dq; mode 1: rows are keys, dk and dv (shaders/attention_bwd.comp). */
static void backward_simd(const attn_geo *g, ipt_launch *l, int delta, uint32_t mode)
{
    static const char *const names[2][2] = QUAD_VARIANTS("attention_bwd");
    static const int in[2][4] = {{0, 5, 1, 2}, {1, 2, 0, 5}}, out[2][2] = {{0, 0}, {1, 2}};
    const uint32_t sg = l->dev->subgroup, kb = sg >= 16 ? 8 : 4, tq = g->d <= 80 ? 2 : 1;
    const uint32_t rows = mode == 0 ? g->t : g->s, other = mode == 0 ? g->s : g->t;
    const bool texel = texel_ok(g, l->dev);
    const ipt_bind_kind kind = quad_kind(g, texel);
    const uint64_t an = (uint64_t)rows * g->c, bn = (uint64_t)other * g->c;
    for (uint32_t b = 0, step = batch_step(g); b < g->n; b += step) {
        const uint32_t a = (uint32_t)(b * an - aligned_below(l, b * an, g->elt)) / 4;
        const uint32_t o = (uint32_t)(b * bn - aligned_below(l, b * bn, g->elt)) / 4;
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
            bind_part(l, d, kind, IPT_SRC_IN, in[mode][i], false, b * n, step * n, g->elt);
        }
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 4, false);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, delta, false);
        for (int i = 0; i < 2; i++)
            bind_part(l, d, IPT_BIND_SSBO, IPT_SRC_OUT, out[mode][i], true, b * an, step * an, g->elt);
        set_groups(d, div_up(rows, sg * tq), g->heads, step);
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
static void add_block(const attn_geo *g, ipt_launch *l, const pairs *p, const block *k, const int scratch[3])
{
    const uint32_t mnk[3] = {k->rows, k->cols, g->d};
    add_mm(g, l, "attention_mm.hhf", p, mnk, g->scale, heads_of(g, IPT_SRC_IN, 0, g->t, k->row0),
           transposed(heads_of(g, IPT_SRC_IN, 1, g->s, k->col0)), scratch_of(g, scratch[0], p, k->rows, k->cols));
    add_mm(g, l, "attention_mm.hhf", p, mnk, 1, heads_of(g, IPT_SRC_IN, 5, g->t, k->row0),
           transposed(heads_of(g, IPT_SRC_IN, 2, g->s, k->col0)), scratch_of(g, scratch[1], p, k->rows, k->cols));
    struct {
        uint32_t count, rows, cols, row0, col0, t, pair0, lse_off;
        float scale;
    } push = {p->count * k->rows * k->cols, k->rows, k->cols, k->row0, k->col0, g->t, p->first, 0, g->scale};
    ipt_dispatch *d = ipt_launch_add(l, "attention_ds", &push, sizeof push);
    ipt_launch_spec(d, g->causal);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scratch[0], true);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scratch[1], true);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 4, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scratch[2], false);
    ipt_launch_linear(l, d, push.count, WG);
}

static void add_dq(const attn_geo *g, ipt_launch *l, const pairs *p, const block *k, const int scratch[3])
{
    add_mm(g, l, "attention_mm.fhh", p, (const uint32_t[]){k->rows, g->d, k->cols}, 1,
           scratch_of(g, scratch[1], p, k->rows, k->cols), heads_of(g, IPT_SRC_IN, 1, g->s, k->col0),
           heads_of(g, IPT_SRC_OUT, 0, g->t, k->row0));
}

static void add_dkv(const attn_geo *g, ipt_launch *l, const pairs *p, const block *k, const int scratch[3])
{
    const uint32_t mnk[3] = {k->cols, g->d, k->rows};
    add_mm(g, l, "attention_mm.fhh", p, mnk, 1, transposed(scratch_of(g, scratch[1], p, k->rows, k->cols)),
           heads_of(g, IPT_SRC_IN, 0, g->t, k->row0), heads_of(g, IPT_SRC_OUT, 1, g->s, k->col0));
    add_mm(g, l, "attention_mm.fhh", p, mnk, 1, transposed(scratch_of(g, scratch[0], p, k->rows, k->cols)),
           heads_of(g, IPT_SRC_IN, 5, g->t, k->row0), heads_of(g, IPT_SRC_OUT, 2, g->s, k->col0));
}

/* Any head width: scores in scratch.  Whole pairs at once when they fit; else blocks of queries for dq,
 * then blocks of keys for dk and dv. */
static ipt_status backward_mm(const attn_geo *g, ipt_launch *l, int delta)
{
    pairs p;
    const uint32_t rows = plan_chunk(g, l, g->t, g->s, &p), cols = plan_chunk(g, l, g->s, g->t, &p);
    const uint32_t count = p.count;
    if (rows == 0 || cols == 0)
        return IPT_ERR_UNSUPPORTED;
    const uint64_t a = (uint64_t)rows * g->s, b = (uint64_t)cols * g->t, bytes = count * (a > b ? a : b) * 4;
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
    } while (next_pairs(g, &p, count));
    return l->status;
}

static ipt_status attention_bwd_kernel(const ipt_node *n, ipt_launch *l)
{
    attn_geo g = geo_of(n, l, &n->in_shape[0], &n->in_shape[1]);
    if (!fits(&g, l))
        return IPT_ERR_UNSUPPORTED;
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
const ipt_op_def ipt_op_attn_probs = {
    .name = "attn_probs",
    .sig = "q:ntc k:nsc -> p:nhts",
    .infer = probs_infer,
    .ref = probs_ref,
    .grad = probs_grad,
    .kernel = probs_kernel,
};
const ipt_op_def ipt_op_attn_probs_bwd = {
    .name = "attn_probs_bwd",
    .sig = "q:ntc k:nsc p:nhts dp:nhts -> dq:ntc dk:nsc",
    .infer = probs_infer,
    .ref = probs_bwd_ref,
    .kernel = probs_bwd_kernel,
};
const ipt_op_def ipt_op_attn_apply = {
    .name = "attn_apply",
    .sig = "p:nhts v:nsc -> o:ntc",
    .infer = apply_infer,
    .ref = apply_ref,
    .grad = apply_grad,
    .kernel = apply_kernel,
};
const ipt_op_def ipt_op_attn_apply_bwd = {
    .name = "attn_apply_bwd",
    .sig = "p:nhts v:nsc do:ntc -> dp:nhts dv:nsc",
    .infer = apply_infer,
    .ref = apply_bwd_ref,
    .kernel = apply_kernel,
};
