/* graph/op_norm.c - group norm (with silu) and layer norm, channels last, and their gradients.
 * Sums never use float atomics: per-channel partial sums over chunks of pixels, then one workgroup
 * per result adds the partials in a fixed order. */
#include "graph/op.h"

#include <math.h>
#include <string.h>

enum { WG = 64, MIN_CHUNK = 32, MAX_CHUNK = 128, MAX_CHUNKS = 256 };

/* The compiled variants of a kernel that reads activations, in the order of `variant_of`. */
#define ITEM_VARIANTS(name)                                                                        \
    {                                                                                              \
        name ".f32_texel", name ".f32", name ".f32_scalar", name ".f16_texel", name ".f16",        \
            name ".f16_scalar"                                                                     \
    }
enum { N_VARIANT = 6 };

static uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* Items are quads of channels, or single channels where C is not a multiple of 4; quads go through
 * texel views on CPU devices. */
static int variant_of(const ipt_shape *s, const ipt_traits *dev, uint32_t c)
{
    bool texel =
        dev->simd && dev->texel && ipt_shape_count(s) / 4 <= min_u64(dev->max_texels, INT32_MAX);
    int v = c % 4 ? 2 : texel ? 0 : 1;
    return s->dtype == IPT_F16 ? v + 3 : v;
}

static bool is_texel(int variant) { return variant == 0 || variant == 3; }

static ipt_bind_kind item_kind(int variant)
{
    return variant == 0   ? IPT_BIND_TEXEL_RGBA32F
           : variant == 3 ? IPT_BIND_TEXEL_RGBA16F
                          : IPT_BIND_SSBO;
}

/* --- group norm: geometry -------------------------------------------------------------------- */
struct span_push { /* shaders/norm_span.glsl */
    uint32_t n0, n_n, chunk0, n_chunk;
    uint32_t pixels, chunk, items, chunks;
    uint32_t groups, per_group, base;
    float inv_count;
};
struct group_geo {
    uint32_t n, c, groups;
    struct span_push push;
    uint64_t elt;   /* bytes */
    uint64_t chunk; /* elements of one chunk */
    int variant;
    uint64_t part_bytes;
    bool whole; /* one dispatch reaches the whole tensor */
};

static bool group_geo_init(const ipt_node *n, const ipt_launch *l, struct group_geo *g)
{
    const ipt_shape *s = &n->in_shape[0];
    memset(g, 0, sizeof *g);
    g->n = (uint32_t)s->dim[0];
    g->c = (uint32_t)s->dim[s->rank - 1];
    g->groups = (uint32_t)n->attr.norm.groups;
    g->elt = ipt_dtype_bytes(s->dtype);
    uint64_t count = ipt_shape_count(s), pixels = count / g->n / g->c;
    /* Long enough to repay the constants of a chunk, short enough that it stays in cache while its
     * columns are visited one after the other. */
    uint64_t chunk = min_u64(MAX_CHUNK, max_u64(MIN_CHUNK, pixels / 64));
    uint64_t chunks = (pixels + chunk - 1) / chunk;
    g->part_bytes = g->n * chunks * g->c * 8;
    g->whole = count * g->elt <= l->dev->max_range;
    g->chunk = chunk * g->c;
    g->variant = variant_of(s, l->dev, g->c);
    struct span_push *p = &g->push;
    p->pixels = (uint32_t)pixels;
    p->chunk = (uint32_t)chunk;
    p->chunks = (uint32_t)chunks;
    p->items = g->c % 4 ? g->c : g->c / 4;
    p->groups = g->groups;
    p->per_group = g->c / g->groups;
    p->inv_count = (float)(1.0 / ((double)pixels * p->per_group));
    return count <= UINT32_MAX && g->part_bytes <= l->dev->max_range &&
           (g->whole || g->chunk * g->elt + l->dev->align <= l->dev->max_range);
}

/* The next dispatch's share; n_n = 0 before the first call.  False after the last. */
static bool group_next(const ipt_launch *l, const struct group_geo *g, struct span_push *p)
{
    uint32_t n = p->n0, chunk = p->chunk0 + p->n_chunk;
    if (p->n_n == 0) {
        n = chunk = 0;
    } else if (chunk == p->chunks) {
        n += p->n_n;
        chunk = 0;
    }
    if (n >= g->n)
        return false;
    p->n0 = n;
    p->chunk0 = chunk;
    p->n_n = g->whole ? g->n : 1;
    uint64_t fit = g->whole ? p->chunks : (l->dev->max_range - l->dev->align) / (g->chunk * g->elt);
    p->n_chunk = (uint32_t)min_u64(fit, p->chunks - chunk);
    return true;
}

struct item_bind { /* one binding of a span kernel; items: the tensor is reached by share */
    ipt_src src;
    int index;
    bool write, items;
};

/* One kernel over all chunks. */
static void group_pass(const ipt_node *n, ipt_launch *l, const struct group_geo *g,
                       const char *const names[], const struct item_bind *b, int n_b)
{
    struct span_push p = g->push;
    while (group_next(l, g, &p)) {
        uint64_t image = (uint64_t)p.pixels * g->c;
        uint64_t first = p.n0 * image + p.chunk0 * g->chunk;
        uint64_t last =
            (p.n0 + p.n_n - 1) * image + min_u64(image, (p.chunk0 + p.n_chunk) * g->chunk);
        uint64_t base = first * g->elt / l->dev->align * l->dev->align / g->elt;
        p.base = (uint32_t)(g->c % 4 ? base : base / 4);
        ipt_dispatch *d = ipt_launch_add(l, names[g->variant], &p, sizeof p);
        ipt_launch_spec(d, WG);
        ipt_launch_spec(d, (uint32_t)n->attr.norm.silu);
        for (int i = 0; i < n_b; i++) {
            if (b[i].items)
                ipt_launch_bind_part(l, d,
                                     &(ipt_bind){b[i].write ? IPT_BIND_SSBO : item_kind(g->variant),
                                                 b[i].src, (uint8_t)(b[i].index), b[i].write,
                                                 first * g->elt, (last - first) * g->elt});
            else
                ipt_launch_bind(d, IPT_BIND_SSBO, b[i].src, b[i].index, b[i].write);
        }
        ipt_launch_linear(l, d, (uint64_t)p.n_n * p.n_chunk * p.items, WG);
        if (d) {
            d->macs = (double)(last - first);
            d->no_wait = first != 0;
        }
    }
}

/* --- group norm: forward --------------------------------------------------------------------- */
static const char *group_infer(const ipt_node *n, ipt_shape out[])
{
    const ipt_shape *s = &n->in_shape[0];
    int32_t c = s->dim[s->rank - 1], groups = n->attr.norm.groups;
    if (groups < 1 || c % groups)
        return "channels are not a multiple of the groups";
    if (n->in_shape[1].dtype != IPT_F32 || n->in_shape[2].dtype != IPT_F32)
        return "gamma and beta must be f32";
    if (s->dtype == IPT_I32)
        return "x must be a float tensor";
    if (n->op == IPT_OP_GROUP_NORM) {
        out[1] = ipt_shape3(IPT_F32, s->dim[0], groups, 2);
        return NULL;
    }
    if (n->in_shape[3].dim[1] != groups || n->in_shape[3].dtype != IPT_F32)
        return "stat does not fit the groups";
    if (n->in_shape[4].dtype != s->dtype)
        return "dy and x differ in type";
    if (n->op == IPT_OP_GROUP_NORM_DP)
        out[0] = out[1] = ipt_shape1(IPT_F32, c);
    return NULL;
}

static void group_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_shape *s = &n->in_shape[0];
    size_t N = (size_t)s->dim[0], C = (size_t)s->dim[s->rank - 1], P = ipt_shape_count(s) / N / C;
    size_t G = (size_t)n->attr.norm.groups, per = C / G;
    for (size_t i = 0; i < N * G; i++) {
        const double *x = in[0] + i / G * P * C + i % G * per;
        double mean = 0, var = 0, count = (double)(P * per);
        for (size_t e = 0; e < P * per; e++)
            mean += x[e / per * C + e % per];
        mean /= count;
        for (size_t e = 0; e < P * per; e++)
            var += (x[e / per * C + e % per] - mean) * (x[e / per * C + e % per] - mean);
        double rstd = 1.0 / sqrt(var / count + (double)n->attr.norm.eps);
        out[1][2 * i] = mean;
        out[1][2 * i + 1] = rstd;
        for (size_t e = 0; e < P * per; e++) {
            size_t c = i % G * per + e % per;
            double z = (x[e / per * C + e % per] - mean) * rstd * in[1][c] + in[2][c];
            out[0][i / G * P * C + e / per * C + c] = n->attr.norm.silu ? z / (1.0 + exp(-z)) : z;
        }
    }
}

static void group_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                       ipt_val dx[])
{
    if (!dy[0].id)
        return;
    ipt_val in[5] = {ipt_in(n, 0), ipt_in(n, 1), ipt_in(n, 2), ipt_out(n, 1), dy[0]};
    if (want & 1)
        dx[0] = ipt_emit(g, IPT_OP_GROUP_NORM_DX, n->name, in, 5, &n->attr, NULL);
    if (want & 6) {
        ipt_val out[2] = {{0}, {0}};
        ipt_emit(g, IPT_OP_GROUP_NORM_DP, n->name, in, 5, &n->attr, out);
        dx[1] = out[0];
        dx[2] = out[1];
    }
}

static ipt_status group_kernel(const ipt_node *n, ipt_launch *l)
{
    static const char *const stat_names[N_VARIANT] = ITEM_VARIANTS("norm_stat");
    static const char *const apply_names[N_VARIANT] = ITEM_VARIANTS("norm_apply");
    struct group_geo g;
    if (!group_geo_init(n, l, &g))
        return IPT_ERR_TOO_LARGE;
    int part = ipt_launch_scratch(l, g.part_bytes);
    const struct item_bind stat[] = {{IPT_SRC_IN, 0, false, true},
                                     {IPT_SRC_SCRATCH, part, true, false}};
    group_pass(n, l, &g, stat_names, stat, 2);
    struct {
        uint32_t n_row, groups, per_group, chunks, pixels, chunk;
        float inv_count, eps;
    } push = {g.n * g.groups, g.groups,     g.push.per_group, g.push.chunks,
              g.push.pixels,  g.push.chunk, g.push.inv_count, n->attr.norm.eps};
    ipt_dispatch *d = ipt_launch_add(l, "norm_stat2", &push, sizeof push);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, part, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 1, true);
    ipt_launch_linear(l, d, push.n_row, 1);
    const struct item_bind apply[] = {{IPT_SRC_IN, 0, false, true},
                                      {IPT_SRC_IN, 1, false, false},
                                      {IPT_SRC_IN, 2, false, false},
                                      {IPT_SRC_OUT, 1, false, false},
                                      {IPT_SRC_OUT, 0, true, true}};
    group_pass(n, l, &g, apply_names, apply, 5);
    return l->status;
}

/* --- group norm: gradients ------------------------------------------------------------------- */
/* dL/dz (z = xhat gamma + beta) and xhat of one element. */
static double group_dz(const ipt_node *n, const double *const in[], size_t image, size_t c,
                       size_t at, size_t per, double *xhat)
{
    const double *stat = in[3] + (image * (size_t)n->attr.norm.groups + c / per) * 2;
    *xhat = (in[0][at] - stat[0]) * stat[1];
    if (!n->attr.norm.silu)
        return in[4][at];
    double z = *xhat * in[1][c] + in[2][c], s = 1.0 / (1.0 + exp(-z));
    return in[4][at] * s * (1.0 + z * (1.0 - s));
}

static void group_dx_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_shape *s = &n->in_shape[0];
    size_t N = (size_t)s->dim[0], C = (size_t)s->dim[s->rank - 1], P = ipt_shape_count(s) / N / C;
    size_t G = (size_t)n->attr.norm.groups, per = C / G;
    for (size_t i = 0; i < N * G; i++) {
        double s1 = 0, s2 = 0, count = (double)(P * per), xhat;
        for (int pass = 0; pass < 2; pass++) {
            for (size_t e = 0; e < P * per; e++) {
                size_t c = i % G * per + e % per, at = (i / G * P + e / per) * C + c;
                double dz = group_dz(n, in, i / G, c, at, per, &xhat) * in[1][c];
                if (pass == 0) {
                    s1 += dz / count;
                    s2 += dz * xhat / count;
                } else {
                    out[0][at] = in[3][2 * i + 1] * (dz - s1 - xhat * s2);
                }
            }
        }
    }
}

static void group_dp_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_shape *s = &n->in_shape[0];
    size_t N = (size_t)s->dim[0], C = (size_t)s->dim[s->rank - 1], P = ipt_shape_count(s) / N / C;
    size_t per = C / (size_t)n->attr.norm.groups;
    for (size_t c = 0; c < C; c++) {
        out[0][c] = out[1][c] = 0;
        for (size_t p = 0; p < N * P; p++) {
            double xhat, dz = group_dz(n, in, p / P, c, p * C + c, per, &xhat);
            out[0][c] += dz * xhat;
            out[1][c] += dz;
        }
    }
}

static int group_grad_part(const ipt_node *n, ipt_launch *l, const struct group_geo *g)
{
    static const char *const names[N_VARIANT] = ITEM_VARIANTS("norm_gpart");
    int part = ipt_launch_scratch(l, g->part_bytes);
    const struct item_bind b[] = {
        {IPT_SRC_IN, 0, false, true},  {IPT_SRC_IN, 1, false, false},
        {IPT_SRC_IN, 2, false, false}, {IPT_SRC_IN, 3, false, false},
        {IPT_SRC_IN, 4, false, true},  {IPT_SRC_SCRATCH, part, true, false}};
    group_pass(n, l, g, names, b, 6);
    return part;
}

static ipt_status group_dx_kernel(const ipt_node *n, ipt_launch *l)
{
    static const char *const names[N_VARIANT] = ITEM_VARIANTS("norm_gdx");
    struct group_geo g;
    if (!group_geo_init(n, l, &g))
        return IPT_ERR_TOO_LARGE;
    int part = group_grad_part(n, l, &g),
        sums = ipt_launch_scratch(l, (uint64_t)g.n * g.groups * 8);
    struct {
        uint32_t n_row, groups, per_group, chunks;
        float inv_count;
    } push = {g.n * g.groups, g.groups, g.push.per_group, g.push.chunks, g.push.inv_count};
    ipt_dispatch *d = ipt_launch_add(l, "norm_gsum", &push, sizeof push);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, part, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 1, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, sums, true);
    ipt_launch_linear(l, d, push.n_row, 1);
    const struct item_bind b[] = {
        {IPT_SRC_IN, 0, false, true},  {IPT_SRC_IN, 1, false, false},
        {IPT_SRC_IN, 2, false, false}, {IPT_SRC_IN, 3, false, false},
        {IPT_SRC_IN, 4, false, true},  {IPT_SRC_SCRATCH, sums, false, false},
        {IPT_SRC_OUT, 0, true, true}};
    group_pass(n, l, &g, names, b, 7);
    return l->status;
}

/* part [rows][c] of pairs -> dgamma, dbeta. */
static void channel_sums(ipt_launch *l, int part, uint32_t c, uint32_t rows)
{
    struct {
        uint32_t channels, rows;
    } push = {c, rows};
    ipt_dispatch *d = ipt_launch_add(l, "norm_csum", &push, sizeof push);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, part, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 1, true);
    ipt_launch_linear(l, d, c, WG);
}

static ipt_status group_dp_kernel(const ipt_node *n, ipt_launch *l)
{
    struct group_geo g;
    if (!group_geo_init(n, l, &g))
        return IPT_ERR_TOO_LARGE;
    int part = group_grad_part(n, l, &g);
    channel_sums(l, part, g.c, g.n * g.push.chunks);
    return l->status;
}

const ipt_op_def ipt_op_group_norm = {
    .name = "group_norm",
    .sig = "x:n*c gamma:c beta:c -> y:n*c stat:ng2",
    .alias = 1,
    .infer = group_infer,
    .ref = group_ref,
    .grad = group_grad,
    .kernel = group_kernel,
};
const ipt_op_def ipt_op_group_norm_dx = {
    .name = "group_norm_dx",
    .sig = "x:n*c gamma:c beta:c stat:ng2 dy:n*c -> dx:n*c",
    .infer = group_infer,
    .ref = group_dx_ref,
    .kernel = group_dx_kernel,
};
const ipt_op_def ipt_op_group_norm_dp = {
    .name = "group_norm_dp",
    .sig = "x:n*c gamma:c beta:c stat:ng2 dy:n*c -> dgamma:c dbeta:c",
    .infer = group_infer,
    .ref = group_dp_ref,
    .kernel = group_dp_kernel,
};

/* The norm with what adapters add to it; id 0 when none does.  The activation comes after. */
static ipt_val adapted_norm(ipt_graph *g, ipt_op op, const char *site, const ipt_val in[3],
                            ipt_attr attr)
{
    ipt_val normed[3] = {in[0], {0}, {0}}, z = {0};
    ipt_shape s = ipt_shape_of(g, in[0]);
    if (s.rank == 0 || !ipt_adapter_norm_operands(g, site, s.dim[s.rank - 1], normed + 1))
        return z;
    const bool silu = attr.norm.silu != 0;
    attr.norm.silu = 0;
    ipt_val y = ipt_emit(g, op, site, in, 3, &attr, NULL);
    if (normed[1].id)
        z = ipt_emit(g, op, site, normed, 3, &attr, NULL);
    y = ipt_adapter_norm_path(g, site, y, z);
    return silu ? ipt_silu(g, y) : y;
}

ipt_val ipt_group_norm(ipt_graph *g, ipt_val x, const char *site, int groups, float eps, bool silu)
{
    ipt_shape s = ipt_shape_of(g, x), c = ipt_shape1(IPT_F32, s.rank ? s.dim[s.rank - 1] : 1);
    ipt_attr attr = {.norm = {groups, eps, silu}};
    ipt_val in[3] = {x, ipt_weight_leaf(g, site, "weight", c), ipt_weight_leaf(g, site, "bias", c)};
    ipt_val y = adapted_norm(g, IPT_OP_GROUP_NORM, site, in, attr);
    return y.id ? y : ipt_emit(g, IPT_OP_GROUP_NORM, site, in, 3, &attr, NULL);
}

/* --- layer norm ------------------------------------------------------------------------------ */
struct layer_push { /* shaders/norm_layer.comp */
    uint32_t n_row, items, base, row0;
    float inv_c, eps;
};

static const char *layer_infer(const ipt_node *n, ipt_shape out[])
{
    int32_t c = n->in_shape[0].dim[n->in_shape[0].rank - 1];
    if (n->in_shape[0].dtype == IPT_I32)
        return "x must be a float tensor";
    if (n->op == IPT_OP_LAYER_NORM && n->in_shape[2].dtype != IPT_F32)
        return "beta must be f32";
    if (n->op != IPT_OP_LAYER_NORM_DP && n->in_shape[1].dtype != IPT_F32)
        return "gamma must be f32";
    if (n->op != IPT_OP_LAYER_NORM && n->in_shape[n->n_in - 1].dtype != n->in_shape[0].dtype)
        return "dy and x differ in type";
    if (n->op == IPT_OP_LAYER_NORM_DP)
        out[0] = out[1] = ipt_shape1(IPT_F32, c);
    return NULL;
}

static void row_stat(const double *x, size_t C, float eps, double *mean, double *rstd)
{
    double sum = 0, var = 0;
    for (size_t c = 0; c < C; c++)
        sum += x[c];
    *mean = sum / (double)C;
    for (size_t c = 0; c < C; c++)
        var += (x[c] - *mean) * (x[c] - *mean);
    *rstd = 1.0 / sqrt(var / (double)C + (double)eps);
}

static void layer_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t C = ipt_shape_count(&n->in_shape[1]), R = ipt_shape_count(&n->in_shape[0]) / C;
    for (size_t r = 0; r < R; r++) {
        double mean, rstd;
        row_stat(in[0] + r * C, C, n->attr.norm.eps, &mean, &rstd);
        for (size_t c = 0; c < C; c++)
            out[0][r * C + c] = (in[0][r * C + c] - mean) * rstd * in[1][c] + in[2][c];
    }
}

static void layer_dx_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t C = ipt_shape_count(&n->in_shape[1]), R = ipt_shape_count(&n->in_shape[0]) / C;
    for (size_t r = 0; r < R; r++) {
        const double *x = in[0] + r * C, *dy = in[2] + r * C;
        double mean, rstd, s1 = 0, s2 = 0;
        row_stat(x, C, n->attr.norm.eps, &mean, &rstd);
        for (size_t c = 0; c < C; c++) {
            s1 += dy[c] * in[1][c] / (double)C;
            s2 += dy[c] * in[1][c] * (x[c] - mean) * rstd / (double)C;
        }
        for (size_t c = 0; c < C; c++)
            out[0][r * C + c] = rstd * (dy[c] * in[1][c] - s1 - (x[c] - mean) * rstd * s2);
    }
}

static void layer_dp_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t C = ipt_shape_count(&n->out_shape[0]), R = ipt_shape_count(&n->in_shape[0]) / C;
    memset(out[0], 0, C * sizeof(double));
    memset(out[1], 0, C * sizeof(double));
    for (size_t r = 0; r < R; r++) {
        double mean, rstd;
        row_stat(in[0] + r * C, C, n->attr.norm.eps, &mean, &rstd);
        for (size_t c = 0; c < C; c++) {
            out[0][c] += in[1][r * C + c] * (in[0][r * C + c] - mean) * rstd;
            out[1][c] += in[1][r * C + c];
        }
    }
}

static void layer_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                       ipt_val dx[])
{
    if (!dy[0].id)
        return;
    if (want & 1) {
        ipt_val in[3] = {ipt_in(n, 0), ipt_in(n, 1), dy[0]};
        dx[0] = ipt_emit(g, IPT_OP_LAYER_NORM_DX, n->name, in, 3, &n->attr, NULL);
    }
    if (want & 6) {
        ipt_val in[2] = {ipt_in(n, 0), dy[0]}, out[2] = {{0}, {0}};
        ipt_emit(g, IPT_OP_LAYER_NORM_DP, n->name, in, 2, &n->attr, out);
        dx[1] = out[0];
        dx[2] = out[1];
    }
}

enum layer_mode { LAYER_Y, LAYER_DX, LAYER_STAT };

/* One workgroup per row; as many dispatches as the binding range asks for. */
static ipt_status layer_pass(const ipt_node *n, ipt_launch *l, enum layer_mode mode, int stat)
{
    static const char *const names[3][4] = {
        {"norm_layer.f32", "norm_layer.f32_texel", "norm_layer.f16", "norm_layer.f16_texel"},
        {"norm_layer.dx_f32", "norm_layer.dx_f32_texel", "norm_layer.dx_f16",
         "norm_layer.dx_f16_texel"},
        {"norm_layer.stat_f32", NULL, "norm_layer.stat_f16", NULL},
    };
    const ipt_shape *s = &n->in_shape[0];
    const ipt_traits *dev = l->dev;
    uint64_t c = (uint64_t)s->dim[s->rank - 1], count = ipt_shape_count(s), rows = count / c;
    uint64_t elt = ipt_dtype_bytes(s->dtype), fit = rows;
    bool simd = mode != LAYER_STAT && is_texel(variant_of(s, dev, (uint32_t)c)) &&
                dev->subgroup_shuffle && dev->subgroup;
    if (count * elt > dev->max_range)
        fit = (dev->max_range - dev->align) / (c * elt);
    if (fit == 0 || count > UINT32_MAX)
        return IPT_ERR_TOO_LARGE;
    uint32_t vec = simd ? 4 : 1, wg = simd ? dev->subgroup : WG;
    ipt_bind_kind kind = !simd                 ? IPT_BIND_SSBO
                         : s->dtype == IPT_F16 ? IPT_BIND_TEXEL_RGBA16F
                                               : IPT_BIND_TEXEL_RGBA32F;
    const char *name = names[mode][(s->dtype == IPT_F16 ? 2 : 0) + (simd ? 1 : 0)];
    for (uint64_t r = 0; r < rows; r += fit) {
        uint64_t k = min_u64(fit, rows - r), first = r * c;
        uint64_t base = first * elt / dev->align * dev->align / elt;
        struct layer_push push = {
            (uint32_t)k, (uint32_t)(c / vec),      (uint32_t)((first - base) / vec),
            (uint32_t)r, (float)(1.0 / (double)c), n->attr.norm.eps};
        ipt_dispatch *d = ipt_launch_add(l, name, &push, sizeof push);
        ipt_launch_spec(d, wg);
        ipt_launch_bind_part(l, d,
                             &(ipt_bind){kind, IPT_SRC_IN, 0, false, first * elt, (k * c) * elt});
        if (mode == LAYER_STAT) {
            ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, stat, true);
        } else {
            ipt_bind_kind param = simd ? IPT_BIND_TEXEL_RGBA32F : IPT_BIND_SSBO;
            ipt_launch_bind(d, param, IPT_SRC_IN, 1, false);
            if (mode == LAYER_DX)
                ipt_launch_bind_part(
                    l, d, &(ipt_bind){kind, IPT_SRC_IN, 2, false, first * elt, (k * c) * elt});
            else
                ipt_launch_bind(d, param, IPT_SRC_IN, 2, false);
            ipt_launch_bind_part(
                l, d, &(ipt_bind){IPT_BIND_SSBO, IPT_SRC_OUT, 0, true, first * elt, (k * c) * elt});
        }
        ipt_launch_linear(l, d, k, 1);
        if (d) {
            d->k.subgroup = simd ? wg : 0;
            d->macs = (double)(k * c);
            d->no_wait = r != 0;
        }
    }
    return l->status;
}

static ipt_status layer_kernel(const ipt_node *n, ipt_launch *l)
{
    return layer_pass(n, l, n->op == IPT_OP_LAYER_NORM ? LAYER_Y : LAYER_DX, 0);
}

static ipt_status layer_dp_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *s = &n->in_shape[0];
    uint64_t c = (uint64_t)s->dim[s->rank - 1], count = ipt_shape_count(s), rows = count / c;
    uint64_t elt = ipt_dtype_bytes(s->dtype), range = l->dev->max_range;
    uint64_t chunk = max_u64(MIN_CHUNK, (rows + MAX_CHUNKS - 1) / MAX_CHUNKS);
    uint64_t chunks = (rows + chunk - 1) / chunk, fit = chunks;
    if (count * elt > range)
        fit = (range - l->dev->align) / (chunk * c * elt);
    if (fit == 0 || count > UINT32_MAX || rows * 8 > range || chunks * c * 8 > range)
        return IPT_ERR_TOO_LARGE;
    int stat = ipt_launch_scratch(l, rows * 8), part = ipt_launch_scratch(l, chunks * c * 8);
    ipt_status status = layer_pass(n, l, LAYER_STAT, stat);
    if (status != IPT_OK)
        return status;
    for (uint64_t i = 0; i < chunks; i += fit) {
        uint64_t k = min_u64(fit, chunks - i), first = i * chunk * c;
        uint64_t end = min_u64(count, (i + k) * chunk * c);
        struct {
            uint32_t chunk0, n_chunk, chunk, rows, channels, base;
        } push = {(uint32_t)i,     (uint32_t)k,
                  (uint32_t)chunk, (uint32_t)rows,
                  (uint32_t)c,     (uint32_t)(first * elt / l->dev->align * l->dev->align / elt)};
        ipt_dispatch *d =
            ipt_launch_add(l, IPT_VARIANT("norm_lpart", s->dtype), &push, sizeof push);
        ipt_launch_bind_part(
            l, d,
            &(ipt_bind){IPT_BIND_SSBO, IPT_SRC_IN, 0, false, first * elt, (end - first) * elt});
        ipt_launch_bind_part(
            l, d,
            &(ipt_bind){IPT_BIND_SSBO, IPT_SRC_IN, 1, false, first * elt, (end - first) * elt});
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, stat, false);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, part, true);
        ipt_launch_linear(l, d, k * c, WG);
        if (d) {
            d->macs = (double)(end - first);
            d->no_wait = i != 0;
        }
    }
    channel_sums(l, part, (uint32_t)c, (uint32_t)chunks);
    return l->status;
}

const ipt_op_def ipt_op_layer_norm = {
    .name = "layer_norm",
    .sig = "x:*c gamma:c beta:c -> y:*c",
    .alias = 1,
    .infer = layer_infer,
    .ref = layer_ref,
    .grad = layer_grad,
    .kernel = layer_kernel,
};
const ipt_op_def ipt_op_layer_norm_dx = {
    .name = "layer_norm_dx",
    .sig = "x:*c gamma:c dy:*c -> dx:*c",
    .infer = layer_infer,
    .ref = layer_dx_ref,
    .kernel = layer_kernel,
};
const ipt_op_def ipt_op_layer_norm_dp = {
    .name = "layer_norm_dp",
    .sig = "x:*c dy:*c -> dgamma:c dbeta:c",
    .infer = layer_infer,
    .ref = layer_dp_ref,
    .kernel = layer_dp_kernel,
};

ipt_val ipt_layer_norm(ipt_graph *g, ipt_val x, const char *site, float eps)
{
    ipt_shape s = ipt_shape_of(g, x), c = ipt_shape1(IPT_F32, s.rank ? s.dim[s.rank - 1] : 1);
    ipt_attr attr = {.norm = {.eps = eps}};
    ipt_val in[3] = {x, ipt_weight_leaf(g, site, "weight", c), ipt_weight_leaf(g, site, "bias", c)};
    ipt_val y = adapted_norm(g, IPT_OP_LAYER_NORM, site, in, attr);
    return y.id ? y : ipt_emit(g, IPT_OP_LAYER_NORM, site, in, 3, &attr, NULL);
}
