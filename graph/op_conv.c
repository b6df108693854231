/* graph/op_conv.c - convolution as an implicit matrix product: references, gradients, launches,
 * builders.  A convolution is a walk (gemm.h) over its input; its gradient of the input is a
 * convolution of dy with the taps in reverse order, its gradient of the weight one product per tap.
 */
#include "graph/gemm.h"

#include <string.h>

/* Sizes of a weight [O,k,k,I] or of a kernel leaf [k*k*I,O]. */
typedef struct kernel_dims {
    int32_t o, i, taps;
    bool leaf;
} kernel_dims;

static kernel_dims dims_of(const ipt_shape *w, const ipt_conv *c)
{
    kernel_dims d = {.taps = c->kernel * c->kernel, .leaf = w->rank == 2};
    d.o = d.leaf ? w->dim[1] : w->dim[0];
    d.i = d.leaf ? w->dim[0] / d.taps : w->dim[3];
    return d;
}

static const char *check(const ipt_shape *w, const ipt_conv *c)
{
    if (c->kernel < 1 || c->kernel > 64 || c->stride < 1 || c->stride > 64 || c->pad_lo < 0 ||
        c->pad_hi < 0 || c->pad_lo > 64 || c->pad_hi > 64 || c->up_h < 0 || c->up_w < 0)
        return "kernel, stride, padding or enlarged size out of range";
    if (w->rank == 2)
        return w->dim[0] % (c->kernel * c->kernel) == 0
                   ? NULL
                   : "rows of the kernel leaf are no multiple of the taps";
    return w->rank == 4 && w->dim[1] == c->kernel && w->dim[2] == c->kernel
               ? NULL
               : "the weight must be [O,kernel,kernel,I] or [kernel*kernel*I,O]";
}

/* Element of w: output o, tap, input i. */
static size_t at(const kernel_dims *d, int32_t o, int32_t tap, int32_t i)
{
    return d->leaf ? ((size_t)tap * (size_t)d->i + (size_t)i) * (size_t)d->o + (size_t)o
                   : ((size_t)o * (size_t)d->taps + (size_t)tap) * (size_t)d->i + (size_t)i;
}

/* Stored pixel under output (n, oy, ox) and tap, or -1. */
static int64_t pixel(const ipt_walk *w, int32_t n, int32_t oy, int32_t ox, int32_t tap)
{
    int32_t y = oy * w->stride - w->pad + tap / w->kernel,
            x = ox * w->stride - w->pad + tap % w->kernel;
    if (y < 0 || x < 0 || y >= w->vh || x >= w->vw)
        return -1;
    y = (int32_t)((int64_t)y * w->h / w->vh);
    x = (int32_t)((int64_t)x * w->w / w->vw);
    return ((int64_t)n * w->h + y) * w->w + x;
}

/* --- forward ------------------------------------------------------------------------------- */
static const char *conv_infer(const ipt_node *n, ipt_shape out[])
{
    const ipt_conv *c = &n->attr.conv;
    const ipt_shape *x = &n->in_shape[0];
    const char *problem = check(&n->in_shape[1], c);
    if (problem)
        return problem;
    const kernel_dims d = dims_of(&n->in_shape[1], c);
    const ipt_walk w = ipt_walk_conv(x, c);
    if (d.i != x->dim[3])
        return "channels of x and w differ";
    if (w.oh < 1 || w.ow < 1)
        return "the kernel is larger than the padded input";
    const ipt_shape y = ipt_shape4(x->dtype, x->dim[0], w.oh, w.ow, d.o);
    for (int i = 0; i < 4; i++)
        if (out[0].dim[i] && out[0].dim[i] != y.dim[i])
            return "bias, t or residual does not fit the result";
    for (int i = 3; i < n->n_in; i++)
        if (n->in_shape[i].rank && n->in_shape[i].dtype != x->dtype)
            return "t and residual must have the element type of x";
    out[0] = y;
    return NULL;
}

/* One output pixel, all channels. */
static void conv_ref_pixel(const ipt_node *n, const ipt_walk *w, const kernel_dims *d,
                           const double *const in[], const int32_t pos[3], double *y)
{
    for (int32_t tap = 0; tap < d->taps; tap++) {
        const int64_t p = pixel(w, pos[0], pos[1], pos[2], tap);
        if (p < 0)
            continue;
        const double *x = in[0] + p * d->i;
        if (d->leaf) {
            for (int32_t i = 0; i < d->i; i++) {
                const double *k = in[1] + at(d, 0, tap, i);
                for (int32_t o = 0; o < d->o; o++)
                    y[o] += x[i] * k[o];
            }
            continue;
        }
        for (int32_t o = 0; o < d->o; o++) {
            const double *k = in[1] + at(d, o, tap, 0);
            double sum = 0.0;
            for (int32_t i = 0; i < d->i; i++)
                sum += x[i] * k[i];
            y[o] += sum;
        }
    }
    (void)n;
}

static void conv_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_walk w = ipt_walk_conv(&n->in_shape[0], &n->attr.conv);
    const kernel_dims d = dims_of(&n->in_shape[1], &n->attr.conv);
    const double *b = n->n_in > 2 ? in[2] : NULL, *t = n->n_in > 3 ? in[3] : NULL;
    const double *r = n->n_in > 4 ? in[4] : NULL;
    int64_t m = 0;
    for (int32_t image = 0; image < w.n; image++)
        for (int32_t oy = 0; oy < w.oh; oy++)
            for (int32_t ox = 0; ox < w.ow; ox++, m++) {
                double *y = out[0] + m * d.o;
                for (int32_t o = 0; o < d.o; o++)
                    y[o] = (b ? b[o] : 0.0) + (t ? t[(int64_t)image * d.o + o] : 0.0) +
                           (r ? r[m * d.o + o] : 0.0);
                conv_ref_pixel(n, &w, &d, in, (int32_t[3]){image, oy, ox}, y);
            }
}

static void conv_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                      ipt_val dx[])
{
    const ipt_shape *x = &n->in_shape[0];
    if (want & 1) {
        ipt_attr a = n->attr;
        a.conv.up_h = a.conv.up_h > 0 ? a.conv.up_h : x->dim[1];
        a.conv.up_w = a.conv.up_w > 0 ? a.conv.up_w : x->dim[2];
        dx[0] =
            ipt_emit(g, IPT_OP_CONV2D_DX, n->name, (ipt_val[]){dy[0], ipt_in(n, 1)}, 2, &a, NULL);
        if (a.conv.up_h != x->dim[1] || a.conv.up_w != x->dim[2])
            dx[0] = ipt_emit(g, IPT_OP_UPSAMPLE_BWD, n->name, (ipt_val[]){dx[0], ipt_in(n, 0)}, 2,
                             NULL, NULL);
    }
    if (want & 2) {
        ipt_val in[3] = {ipt_in(n, 0), dy[0], ipt_in(n, 1)};
        dx[1] = ipt_grad_as_input(g, n, 1,
                                  ipt_emit(g, IPT_OP_CONV2D_DW, n->name, in, 3, &n->attr, NULL));
    }
    if (want & 4)
        dx[2] = ipt_grad_columns(g, n, 2, dy[0], 0);
    if (want & 8)
        dx[3] = ipt_grad_columns(g, n, 3, dy[0], 1);
    if (want & 16)
        dx[4] = dy[0];
}

static ipt_status conv_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *w = &n->in_shape[1];
    const kernel_dims d = dims_of(w, &n->attr.conv);
    ipt_gemm g = {.b = ipt_operand_in(1),
                  .y = ipt_operand_out(0),
                  .bias = ipt_operand_optional(n, 2),
                  .t = ipt_operand_optional(n, 3),
                  .r = ipt_operand_optional(n, 4),
                  .act = n->in_shape[0].dtype,
                  .b_type = w->dtype,
                  .walk = ipt_walk_conv(&n->in_shape[0], &n->attr.conv),
                  .cols = d.o,
                  .k = d.i,
                  .ldy = d.o};
    g.rows = (int64_t)g.walk.n * g.walk.oh * g.walk.ow;
    IPT_TRY(ipt_gemm_left(l, n, 0, &g.a));
    if (!n->in_is_panel[1]) {
        ipt_pack p = {.src = g.b,
                      .type = w->dtype,
                      .src_bytes = ipt_shape_bytes(w),
                      .n = d.o,
                      .taps = d.taps,
                      .k = d.i,
                      .st = d.i,
                      .sn = (int64_t)d.taps * d.i,
                      .sk = 1};
        if (d.leaf) {
            p.st = (int64_t)d.i * d.o;
            p.sn = 1;
            p.sk = d.o;
        }
        g.b_type = IPT_F32;
        IPT_TRY(ipt_gemm_pack(l, &p, &g.b));
    }
    return ipt_gemm_launch(l, &g);
}

/* A kernel leaf [k*k*I,O] is the weight [O,k,k,I]. */
static ipt_shape conv_packs(const ipt_node *n, int operand)
{
    const ipt_shape *w = &n->in_shape[operand];
    const int32_t k = n->attr.conv.kernel;
    return operand == 1 && w->rank == 2 ? ipt_shape4(w->dtype, w->dim[1], k, k, w->dim[0] / (k * k))
                                        : (ipt_shape){.rank = 0};
}

const ipt_op_def ipt_op_conv2d = {
    .name = "conv2d",
    .sig = "x:nhwi w:* b?:o t?:no r?:npqo -> y:npqo",
    .alias = 1u << 4,
    .panel = 1u << 1,
    .infer = conv_infer,
    .ref = conv_ref,
    .grad = conv_grad,
    .packs = conv_packs,
    .kernel = conv_kernel,
};

/* --- gradient of the (enlarged) input: attr.conv.up_h, up_w are its size, always given ----- */
static ipt_walk forward_walk(const ipt_node *n)
{
    const ipt_conv *c = &n->attr.conv;
    const ipt_shape x = ipt_shape4(IPT_F32, n->in_shape[0].dim[0], c->up_h, c->up_w, 1);
    return ipt_walk_conv(&x, c);
}

static const char *conv_dx_infer(const ipt_node *n, ipt_shape out[])
{
    const ipt_shape *dy = &n->in_shape[0];
    const char *problem = check(&n->in_shape[1], &n->attr.conv);
    if (problem)
        return problem;
    const kernel_dims d = dims_of(&n->in_shape[1], &n->attr.conv);
    const ipt_walk w = forward_walk(n);
    if (w.oh != dy->dim[1] || w.ow != dy->dim[2] || d.o != dy->dim[3])
        return "dy is no result of this convolution";
    out[0] = ipt_shape4(dy->dtype, dy->dim[0], w.h, w.w, d.i);
    return NULL;
}

static void conv_dx_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_walk w = forward_walk(n);
    const kernel_dims d = dims_of(&n->in_shape[1], &n->attr.conv);
    memset(out[0], 0, ipt_shape_count(&n->out_shape[0]) * sizeof(double));
    const double *dy = in[0];
    for (int32_t image = 0; image < w.n; image++)
        for (int32_t oy = 0; oy < w.oh; oy++)
            for (int32_t ox = 0; ox < w.ow; ox++, dy += d.o)
                for (int32_t tap = 0; tap < d.taps; tap++) {
                    const int64_t p = pixel(&w, image, oy, ox, tap);
                    for (int32_t o = 0; p >= 0 && o < d.o; o++)
                        for (int32_t i = 0; i < d.i; i++)
                            out[0][p * d.i + i] += dy[o] * in[1][at(&d, o, tap, i)];
                }
}

static ipt_status conv_dx_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *w = &n->in_shape[1], *dy = &n->in_shape[0];
    const ipt_conv *c = &n->attr.conv;
    const kernel_dims d = dims_of(w, c);
    ipt_gemm g = {.y = ipt_operand_out(0),
                  .bias = ipt_operand_none(),
                  .t = ipt_operand_none(),
                  .r = ipt_operand_none(),
                  .act = dy->dtype,
                  .b_type = IPT_F32,
                  .walk = ipt_walk_conv_dx(dy, c, c->up_h, c->up_w),
                  .cols = d.i,
                  .k = d.o,
                  .ldy = d.i};
    g.rows = (int64_t)g.walk.n * g.walk.oh * g.walk.ow;
    if (n->in_is_back[1]) {
        g.b = ipt_operand_in(1);
        g.b_type = w->dtype;
        IPT_TRY(ipt_gemm_left(l, n, 0, &g.a));
        return ipt_gemm_launch(l, &g);
    }
    ipt_pack p = {.src = ipt_operand_in(1),
                  .type = w->dtype,
                  .src_bytes = ipt_shape_bytes(w),
                  .n = d.i,
                  .taps = d.taps,
                  .k = d.o};
    if (n->in_is_panel[1]) {
        p.mode = IPT_PACK_PANEL;
        p.src_bytes = ipt_panel_bytes(w, w->dtype);
        p.sn = ipt_pad4(d.i);
        p.sk = p.sn * d.taps;
    } else if (d.leaf) { /* taps in reverse order */
        p.st = -(int64_t)d.i * d.o;
        p.base = -p.st * (d.taps - 1);
        p.sn = d.o;
        p.sk = 1;
    } else {
        p.st = -d.i;
        p.base = -p.st * (d.taps - 1);
        p.sn = 1;
        p.sk = (int64_t)d.taps * d.i;
    }
    IPT_TRY(ipt_gemm_left(l, n, 0, &g.a));
    IPT_TRY(ipt_gemm_pack(l, &p, &g.b));
    return ipt_gemm_launch(l, &g);
}

const ipt_op_def ipt_op_conv2d_dx = {
    .name = "conv2d_dx",
    .back = 1u << 1,
    .sig = "dy:npqo w:* -> dx:nhwi",
    .panel = 1u << 1,
    .infer = conv_dx_infer,
    .ref = conv_dx_ref,
    .kernel = conv_dx_kernel,
};

/* --- gradient of the weight, in the shape of w --------------------------------------------- */
static const char *conv_dw_infer(const ipt_node *n, ipt_shape out[])
{
    const ipt_shape *x = &n->in_shape[0], *dy = &n->in_shape[1];
    const char *problem = check(&n->in_shape[2], &n->attr.conv);
    if (problem)
        return problem;
    const kernel_dims d = dims_of(&n->in_shape[2], &n->attr.conv);
    const ipt_walk w = ipt_walk_conv(x, &n->attr.conv);
    if (w.oh != dy->dim[1] || w.ow != dy->dim[2] || d.o != dy->dim[3] || d.i != x->dim[3])
        return "x, dy and w do not belong to one convolution";
    if (x->dtype != dy->dtype)
        return "x and dy must have one element type";
    (void)out;
    return NULL;
}

static void conv_dw_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_walk w = ipt_walk_conv(&n->in_shape[0], &n->attr.conv);
    const kernel_dims d = dims_of(&n->in_shape[2], &n->attr.conv);
    memset(out[0], 0, ipt_shape_count(&n->out_shape[0]) * sizeof(double));
    const double *dy = in[1];
    for (int32_t image = 0; image < w.n; image++)
        for (int32_t oy = 0; oy < w.oh; oy++)
            for (int32_t ox = 0; ox < w.ow; ox++, dy += d.o)
                for (int32_t tap = 0; tap < d.taps; tap++) {
                    const int64_t p = pixel(&w, image, oy, ox, tap);
                    for (int32_t o = 0; p >= 0 && o < d.o; o++)
                        for (int32_t i = 0; i < d.i; i++)
                            out[0][at(&d, o, tap, i)] += dy[o] * in[0][p * d.i + i];
                }
}

/* Per tap: [k*k*I,O]: (x under the tap)^T dy; [O,k,k,I]: dy^T (x under the tap).  dy is copied
 * once. */
static ipt_status conv_dw_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *x = &n->in_shape[0], *dy = &n->in_shape[1];
    const kernel_dims d = dims_of(&n->in_shape[2], &n->attr.conv);
    const ipt_walk walk = ipt_walk_conv(x, &n->attr.conv);
    const int64_t pixels = (int64_t)walk.n * walk.oh * walk.ow;
    ipt_operand dy_copy, x_copy;
    ipt_pack of_dy = {.src = ipt_operand_in(1),
                      .type = dy->dtype,
                      .src_bytes = ipt_shape_bytes(dy),
                      .rows = !d.leaf,
                      .n = d.o,
                      .taps = 1,
                      .k = (int32_t)pixels,
                      .sn = 1,
                      .sk = d.o};
    IPT_TRY(ipt_gemm_pack(l, &of_dy, &dy_copy));
    ipt_pack of_x = {.src = ipt_operand_in(0),
                     .type = x->dtype,
                     .src_bytes = ipt_shape_bytes(x),
                     .mode = IPT_PACK_GATHER,
                     .rows = d.leaf,
                     .n = d.i,
                     .taps = 1,
                     .k = (int32_t)pixels,
                     .sn = d.i,
                     .walk = walk};
    ipt_gemm g = {.y = ipt_operand_out(0),
                  .bias = ipt_operand_none(),
                  .t = ipt_operand_none(),
                  .r = ipt_operand_none(),
                  .act = x->dtype,
                  .b_type = IPT_F32,
                  .rows = d.leaf ? d.i : d.o,
                  .cols = d.leaf ? d.o : d.i,
                  .k = (int32_t)pixels,
                  .ldy = d.leaf ? d.o : d.taps * d.i};
    g.walk = ipt_walk_plain(g.rows, 1);
    for (int32_t tap = 0; tap < d.taps; tap++) {
        of_x.tap0 = tap;
        IPT_TRY(ipt_gemm_pack(l, &of_x, &x_copy));
        of_x.reuse = x_copy.number + 1;
        g.a = d.leaf ? x_copy : dy_copy;
        g.b = d.leaf ? dy_copy : x_copy;
        g.y0 = d.leaf ? tap * d.i * d.o : tap * d.i;
        IPT_TRY(ipt_gemm_launch(l, &g));
    }
    return l->status;
}

const ipt_op_def ipt_op_conv2d_dw = {
    .name = "conv2d_dw",
    .sig = "x:nhwi dy:npqo w:* -> dw:*",
    .panel = 1u << 2,
    .infer = conv_dw_infer,
    .ref = conv_dw_ref,
    .kernel = conv_dw_kernel,
};

/* --- builders ------------------------------------------------------------------------------ */
ipt_val ipt_conv2d_add(ipt_graph *g, ipt_val x, const char *site, int out, ipt_conv c, ipt_val t,
                       ipt_val residual)
{
    if (ipt_graph_status(g) != IPT_OK)
        return (ipt_val){0};
    const ipt_shape s = ipt_shape_of(g, x);
    if (s.rank != 4 || out < 1 || c.kernel < 1) {
        ipt_poison(g, IPT_ERR_SHAPE, "%s: conv2d: the input is no [N,H,W,C], or sizes below 1",
                   site);
        return (ipt_val){0};
    }
    ipt_val w =
        ipt_weight_leaf(g, site, "weight", ipt_shape4(IPT_F32, out, c.kernel, c.kernel, s.dim[3]));
    ipt_val b = {0};
    if (!c.no_bias)
        b = ipt_weight_leaf(g, site, "bias", ipt_shape1(IPT_F32, out));
    const ipt_attr attr = {.conv = c};
    ipt_val y = ipt_emit(g, IPT_OP_CONV2D, site, (ipt_val[]){x, w, b, t, residual}, 5, &attr, NULL);
    return ipt_adapter_path(g, x, y, site, &c);
}

ipt_val ipt_conv2d(ipt_graph *g, ipt_val x, const char *site, int out, ipt_conv c)
{
    return ipt_conv2d_add(g, x, site, out, c, (ipt_val){0}, (ipt_val){0});
}

ipt_val ipt_conv2d_leaf(ipt_graph *g, ipt_val x, ipt_val w, ipt_conv c)
{
    const ipt_attr attr = {.conv = c};
    return ipt_emit(g, IPT_OP_CONV2D, NULL, (ipt_val[]){x, w}, 2, &attr, NULL);
}
