/* graph/op_shape.c - moving elements: concat, slice, nearest upsampling, views, casts, embedding
 * tables, picked rows; each with its gradient. */
#include "graph/op.h"

#include <string.h>

enum { WG = 64 };

static int32_t last_dim(const ipt_shape *s) { return s->dim[s->rank - 1]; }

/* --- columns of the last axis: concat, slice and its gradient --------------------------------- */
struct cols_push {
    uint32_t n, width, src_width, src_at, dst_width, dst_at,
        fill; /* fill: zero what lies outside */
};

/* Copies `width` columns of each row from src_at to dst_at; with fill, writes the whole row. */
static ipt_status cols_dispatch(ipt_launch *l, const ipt_node *n, struct cols_push p)
{
    const uint32_t all = p.width | p.src_width | p.src_at | p.dst_width | p.dst_at;
    const uint32_t vec = all % 4 == 0, per = vec ? 4 : 1;
    const uint64_t rows = ipt_shape_count(&n->out_shape[0]) / p.dst_width,
                   elt = ipt_dtype_bytes(n->out_shape[0].dtype);
    const ipt_band_operand o[2] = {{IPT_SRC_IN, 0, false, p.src_width * elt},
                                   {IPT_SRC_OUT, 0, true, p.dst_width * elt}};
    p.width /= per;
    p.src_width /= per;
    p.src_at /= per;
    p.dst_width /= per;
    p.dst_at /= per;
    for (ipt_bands b = ipt_launch_bands(l, rows, o, 2); ipt_bands_next(&b);) {
        p.n = (uint32_t)(b.n * (p.fill ? p.dst_width : p.width));
        ipt_dispatch *d =
            ipt_launch_add(l, IPT_VARIANT("cols", n->out_shape[0].dtype), &p, sizeof p);
        ipt_launch_spec(d, vec);
        ipt_bands_bind(d, &b, 0);
        ipt_bands_bind(d, &b, 1);
        ipt_launch_linear(l, d, p.n, WG);
    }
    return l->status;
}

static const char *concat_infer(const ipt_node *n, ipt_shape out[])
{
    if (n->in_shape[0].dtype != n->in_shape[1].dtype)
        return "operands must have the same element type";
    out[0] = n->in_shape[0];
    out[0].dim[out[0].rank - 1] += last_dim(&n->in_shape[1]);
    return NULL;
}

static void concat_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t a = (size_t)last_dim(&n->in_shape[0]), b = (size_t)last_dim(&n->in_shape[1]);
    size_t rows = ipt_shape_count(&n->in_shape[0]) / a;
    for (size_t r = 0; r < rows; r++) {
        memcpy(out[0] + r * (a + b), in[0] + r * a, a * sizeof(double));
        memcpy(out[0] + r * (a + b) + a, in[1] + r * b, b * sizeof(double));
    }
}

static void concat_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                        ipt_val dx[])
{
    int a = last_dim(&n->in_shape[0]), b = last_dim(&n->in_shape[1]);
    if (want & 1)
        dx[0] = ipt_slice(g, dy[0], 0, a);
    if (want & 2)
        dx[1] = ipt_slice(g, dy[0], a, b);
}

struct concat_push {
    uint32_t n, wa, wb;
};

static ipt_status concat_kernel(const ipt_node *n, ipt_launch *l)
{
    uint32_t a = (uint32_t)last_dim(&n->in_shape[0]), b = (uint32_t)last_dim(&n->in_shape[1]);
    uint32_t vec = (a | b) % 4 == 0, per = vec ? 4 : 1;
    const uint64_t elt = ipt_dtype_bytes(n->out_shape[0].dtype), width = (uint64_t)a + b;
    const ipt_band_operand o[3] = {{IPT_SRC_IN, 0, false, a * elt},
                                   {IPT_SRC_IN, 1, false, b * elt},
                                   {IPT_SRC_OUT, 0, true, width * elt}};
    for (ipt_bands band = ipt_launch_bands(l, ipt_shape_count(&n->out_shape[0]) / width, o, 3);
         ipt_bands_next(&band);) {
        struct concat_push p = {(uint32_t)(band.n * width / per), a / per, b / per};
        ipt_dispatch *d =
            ipt_launch_add(l, IPT_VARIANT("concat", n->out_shape[0].dtype), &p, sizeof p);
        ipt_launch_spec(d, vec);
        for (int i = 0; i < 3; i++)
            ipt_bands_bind(d, &band, i);
        ipt_launch_linear(l, d, p.n, WG);
    }
    return l->status;
}

const ipt_op_def ipt_op_concat = {.name = "concat",
                                  .sig = "a:*c b:*d -> y:*e",
                                  .infer = concat_infer,
                                  .ref = concat_ref,
                                  .grad = concat_grad,
                                  .kernel = concat_kernel};

ipt_val ipt_concat(ipt_graph *g, ipt_val a, ipt_val b)
{
    ipt_val in[2] = {a, b};
    return ipt_emit(g, IPT_OP_CONCAT, NULL, in, 2, NULL, NULL);
}

static const char *slice_infer(const ipt_node *n, ipt_shape out[])
{
    int32_t w = last_dim(&n->in_shape[0]), start = n->attr.slice.start, len = n->attr.slice.len;
    if (start < 0 || len < 1 || start > w - len)
        return "slice out of range";
    out[0] = n->in_shape[0];
    out[0].dim[out[0].rank - 1] = len;
    return NULL;
}

static void slice_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t w = (size_t)last_dim(&n->in_shape[0]), len = (size_t)n->attr.slice.len;
    size_t rows = ipt_shape_count(&n->in_shape[0]) / w;
    for (size_t r = 0; r < rows; r++)
        memcpy(out[0] + r * len, in[0] + r * w + n->attr.slice.start, len * sizeof(double));
}

static void slice_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                       ipt_val dx[])
{
    (void)want;
    ipt_attr at = {.slice = {n->attr.slice.start, last_dim(&n->in_shape[0])}};
    dx[0] = ipt_emit(g, IPT_OP_SLICE_BWD, n->name, dy, 1, &at, NULL);
}

static ipt_status slice_kernel(const ipt_node *n, ipt_launch *l)
{
    uint32_t len = (uint32_t)n->attr.slice.len;
    return cols_dispatch(l, n,
                         (struct cols_push){.width = len,
                                            .src_width = (uint32_t)last_dim(&n->in_shape[0]),
                                            .src_at = (uint32_t)n->attr.slice.start,
                                            .dst_width = len});
}

const ipt_op_def ipt_op_slice = {.name = "slice",
                                 .sig = "x:*c -> y:*d",
                                 .picks = 1,
                                 .infer = slice_infer,
                                 .ref = slice_ref,
                                 .grad = slice_grad,
                                 .kernel = slice_kernel};

ipt_val ipt_slice(ipt_graph *g, ipt_val x, int start, int len)
{
    ipt_attr at = {.slice = {start, len}};
    return ipt_emit(g, IPT_OP_SLICE, NULL, &x, 1, &at, NULL);
}

/* attr.slice.len is the width of the result. */
static const char *slice_bwd_infer(const ipt_node *n, ipt_shape out[])
{
    int32_t w = n->attr.slice.len, start = n->attr.slice.start, len = last_dim(&n->in_shape[0]);
    if (start < 0 || len > w || start > w - len)
        return "slice out of range";
    out[0] = n->in_shape[0];
    out[0].dim[out[0].rank - 1] = w;
    return NULL;
}

static void slice_bwd_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t len = (size_t)last_dim(&n->in_shape[0]), w = (size_t)n->attr.slice.len;
    size_t rows = ipt_shape_count(&n->in_shape[0]) / len;
    memset(out[0], 0, rows * w * sizeof(double));
    for (size_t r = 0; r < rows; r++)
        memcpy(out[0] + r * w + n->attr.slice.start, in[0] + r * len, len * sizeof(double));
}

static ipt_status slice_bwd_kernel(const ipt_node *n, ipt_launch *l)
{
    uint32_t len = (uint32_t)last_dim(&n->in_shape[0]);
    return cols_dispatch(l, n,
                         (struct cols_push){.width = len,
                                            .src_width = len,
                                            .dst_width = (uint32_t)n->attr.slice.len,
                                            .dst_at = (uint32_t)n->attr.slice.start,
                                            .fill = 1});
}

const ipt_op_def ipt_op_slice_bwd = {.name = "slice_bwd",
                                     .sig = "dy:*d -> dx:*c",
                                     .infer = slice_bwd_infer,
                                     .ref = slice_bwd_ref,
                                     .kernel = slice_bwd_kernel};

/* --- nearest upsampling ----------------------------------------------------------------------- */
static const char *upsample_infer(const ipt_node *n, ipt_shape out[])
{
    out[0] = n->in_shape[0];
    out[0].dim[1] = n->attr.to.dim[0];
    out[0].dim[2] = n->attr.to.dim[1];
    if (out[0].dim[1] < n->in_shape[0].dim[1] || out[0].dim[2] < n->in_shape[0].dim[2])
        return "the result must not be smaller than the operand";
    return NULL;
}

static size_t pixel_at(const ipt_shape *s, size_t b, size_t y, size_t x)
{
    return ((b * (size_t)s->dim[1] + y) * (size_t)s->dim[2] + x) * (size_t)s->dim[3];
}

static void upsample_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_shape *x = &n->in_shape[0], *y = &n->out_shape[0];
    size_t h = (size_t)x->dim[1], w = (size_t)x->dim[2], oh = (size_t)y->dim[1],
           ow = (size_t)y->dim[2];
    for (size_t b = 0; b < (size_t)y->dim[0]; b++)
        for (size_t i = 0; i < oh; i++)
            for (size_t j = 0; j < ow; j++)
                memcpy(out[0] + pixel_at(y, b, i, j),
                       in[0] + pixel_at(x, b, i * h / oh, j * w / ow),
                       (size_t)y->dim[3] * sizeof(double));
}

static void upsample_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                          ipt_val dx[])
{
    (void)want;
    ipt_val in[2] = {dy[0], ipt_in(n, 0)};
    dx[0] = ipt_emit(g, IPT_OP_UPSAMPLE_BWD, n->name, in, 2, NULL, NULL);
}

struct up_push {
    uint32_t n, c, h, w, oh, ow;
    uint32_t first, src0; /* items of the result and of the source before their bindings */
};

/* Lines [*lo, *hi) of the source that lines first .. last of the result meet; 1 line of the low
 * picture is y0 .. y1 - 1 of the high one, y0 = ceil(line oh / h). */
static void upsample_reach(const struct up_push *p, bool bwd, uint64_t first, uint64_t last,
                           uint64_t *lo, uint64_t *hi)
{
    const uint64_t h = p->h, oh = p->oh;
    if (!bwd) {
        *lo = first / oh * h + first % oh * h / oh;
        *hi = last / oh * h + last % oh * h / oh + 1;
    } else {
        *lo = first / h * oh + (first % h * oh + h - 1) / h;
        *hi = last / h * oh + ((last % h + 1) * oh + h - 1) / h;
    }
}

/* Bands are lines of the result. */
static ipt_status upsample_launch(const ipt_node *n, ipt_launch *l, bool bwd)
{
    const ipt_shape *x = bwd ? &n->out_shape[0] : &n->in_shape[0],
                    *y = bwd ? &n->in_shape[0] : &n->out_shape[0];
    const ipt_shape *dst = &n->out_shape[0], *src = &n->in_shape[0];
    const uint32_t vec = x->dim[3] % 4 == 0, per = vec ? 4 : 1;
    const uint64_t elt = ipt_dtype_bytes(x->dtype), align = l->dev->align,
                   line = (uint64_t)dst->dim[2] * (uint64_t)dst->dim[3],
                   src_line = (uint64_t)src->dim[2] * (uint64_t)src->dim[3];
    struct up_push p = {.c = (uint32_t)x->dim[3] / per,
                        .h = (uint32_t)x->dim[1],
                        .w = (uint32_t)x->dim[2],
                        .oh = (uint32_t)y->dim[1],
                        .ow = (uint32_t)y->dim[2]};
    const ipt_band_operand o = {IPT_SRC_OUT, 0, true, line * elt};
    for (ipt_bands b = ipt_launch_bands(l, ipt_shape_count(dst) / line, &o, 1);
         ipt_bands_next(&b);) {
        uint64_t lo, hi, from;
        for (;;) {
            upsample_reach(&p, bwd, b.first, b.first + b.n - 1, &lo, &hi);
            from = lo * src_line * elt / align * align / elt;
            if ((hi * src_line - from) * elt <= l->dev->max_range)
                break;
            if (!ipt_bands_halve(&b))
                return IPT_ERR_TOO_LARGE;
        }
        p.n = (uint32_t)(b.n * line / per);
        p.first = (uint32_t)(b.first * line / per);
        p.src0 = (uint32_t)(from / per);
        ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("upsample", x->dtype), &p, sizeof p);
        ipt_launch_spec(d, bwd);
        ipt_launch_spec(d, vec);
        ipt_launch_bind_range(d, IPT_BIND_SSBO, IPT_SRC_IN, 0, false, from * elt,
                              (hi * src_line - from) * elt);
        ipt_bands_bind(d, &b, 0);
        ipt_launch_linear(l, d, p.n, WG);
    }
    return l->status;
}

static ipt_status upsample_kernel(const ipt_node *n, ipt_launch *l)
{
    return upsample_launch(n, l, false);
}
static ipt_status upsample_bwd_kernel(const ipt_node *n, ipt_launch *l)
{
    return upsample_launch(n, l, true);
}

static const char *upsample_bwd_infer(const ipt_node *n, ipt_shape out[])
{
    out[0] = n->in_shape[1];
    return NULL;
}

/* dx of a pixel = sum of dy over the pixels that were copied from it. */
static void upsample_bwd_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_shape *y = &n->in_shape[0], *x = &n->out_shape[0];
    size_t h = (size_t)x->dim[1], w = (size_t)x->dim[2], oh = (size_t)y->dim[1],
           ow = (size_t)y->dim[2];
    memset(out[0], 0, ipt_shape_count(x) * sizeof(double));
    for (size_t b = 0; b < (size_t)y->dim[0]; b++)
        for (size_t i = 0; i < oh; i++)
            for (size_t j = 0; j < ow; j++)
                for (size_t c = 0; c < (size_t)y->dim[3]; c++)
                    out[0][pixel_at(x, b, i * h / oh, j * w / ow) + c] +=
                        in[0][pixel_at(y, b, i, j) + c];
}

const ipt_op_def ipt_op_upsample = {.name = "upsample",
                                    .sig = "x:nhwc -> y:nijc",
                                    .infer = upsample_infer,
                                    .ref = upsample_ref,
                                    .grad = upsample_grad,
                                    .kernel = upsample_kernel};
const ipt_op_def ipt_op_upsample_bwd = {.name = "upsample_bwd",
                                        .sig = "dy:nijc x:nhwc -> dx:nhwc",
                                        .infer = upsample_bwd_infer,
                                        .ref = upsample_bwd_ref,
                                        .kernel = upsample_bwd_kernel};

ipt_val ipt_upsample(ipt_graph *g, ipt_val x, int h, int w)
{
    ipt_attr at = {.to = ipt_shape2(IPT_F32, h, w)};
    return ipt_emit(g, IPT_OP_UPSAMPLE, NULL, &x, 1, &at, NULL);
}

/* --- views and casts -------------------------------------------------------------------------- */
static const char *reshape_infer(const ipt_node *n, ipt_shape out[])
{
    out[0] = n->attr.to;
    out[0].dtype = n->in_shape[0].dtype;
    if (ipt_shape_count(&out[0]) != ipt_shape_count(&n->in_shape[0]))
        return "element counts differ";
    return NULL;
}

static void copy_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    memcpy(out[0], in[0], ipt_shape_count(&n->out_shape[0]) * sizeof(double));
}

static void reshape_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                         ipt_val dx[])
{
    (void)want;
    dx[0] = ipt_reshape(g, dy[0], n->in_shape[0]);
}

const ipt_op_def ipt_op_reshape = {.name = "reshape",
                                   .sig = "x: -> y:",
                                   .view = true,
                                   .infer = reshape_infer,
                                   .ref = copy_ref,
                                   .grad = reshape_grad};

ipt_val ipt_reshape(ipt_graph *g, ipt_val x, ipt_shape s)
{
    ipt_attr at = {.to = s};
    ipt_shape have = ipt_shape_of(g, x);
    return ipt_shape_same(&have, &s) ? x : ipt_emit(g, IPT_OP_RESHAPE, NULL, &x, 1, &at, NULL);
}

static const char *cast_infer(const ipt_node *n, ipt_shape out[])
{
    out[0] = n->in_shape[0];
    out[0].dtype = n->attr.to.dtype;
    return out[0].dtype == IPT_I32 || n->in_shape[0].dtype == IPT_I32 ? "no cast to or from i32"
                                                                      : NULL;
}

static void cast_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                      ipt_val dx[])
{
    (void)want;
    dx[0] = ipt_cast(g, dy[0], n->in_shape[0].dtype);
}

static ipt_status cast_kernel(const ipt_node *n, ipt_launch *l)
{
    const char *shader = n->in_shape[0].dtype == IPT_F16    ? "cast.f16_f32"
                         : n->out_shape[0].dtype == IPT_F16 ? "cast.f32_f16"
                                                            : "cast.f32";
    const ipt_band_operand o[2] = {{IPT_SRC_IN, 0, false, ipt_dtype_bytes(n->in_shape[0].dtype)},
                                   {IPT_SRC_OUT, 0, true, ipt_dtype_bytes(n->out_shape[0].dtype)}};
    for (ipt_bands b = ipt_launch_bands(l, ipt_shape_count(&n->out_shape[0]), o, 2);
         ipt_bands_next(&b);) {
        const uint32_t count = (uint32_t)b.n;
        ipt_dispatch *d = ipt_launch_add(l, shader, &count, sizeof count);
        ipt_bands_bind(d, &b, 0);
        ipt_bands_bind(d, &b, 1);
        ipt_launch_linear(l, d, b.n, WG);
    }
    return l->status;
}

const ipt_op_def ipt_op_cast = {.name = "cast",
                                .sig = "x:* -> y:*",
                                .infer = cast_infer,
                                .ref = copy_ref,
                                .grad = cast_grad,
                                .kernel = cast_kernel};

ipt_val ipt_cast(ipt_graph *g, ipt_val x, ipt_dtype t)
{
    ipt_attr at = {.to = {.dtype = t}};
    return ipt_shape_of(g, x).dtype == t ? x : ipt_emit(g, IPT_OP_CAST, NULL, &x, 1, &at, NULL);
}

/* --- embedding tables and picked rows --------------------------------------------------------- */
static const char *embedding_infer(const ipt_node *n, ipt_shape out[])
{
    if (n->in_shape[0].dtype != IPT_I32)
        return "ids must be i32";
    out[0].dtype = IPT_F32;
    return NULL;
}

/* Row of an id; ids outside the table take row 0, as the kernel does. */
static size_t row_of(double id, int32_t rows) { return id >= 0 && id < rows ? (size_t)id : 0; }

static void embedding_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t c = (size_t)n->in_shape[1].dim[1];
    for (size_t i = 0; i < ipt_shape_count(&n->in_shape[0]); i++)
        memcpy(out[0] + i * c, in[1] + row_of(in[0][i], n->in_shape[1].dim[0]) * c,
               c * sizeof(double));
}

static void embedding_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                           ipt_val dx[])
{
    if (!(want & 2))
        return;
    ipt_attr at = {.to = n->in_shape[1]};
    at.to.dtype = IPT_F32;
    ipt_val in[2] = {ipt_in(n, 0), dy[0]};
    dx[1] = ipt_emit(g, IPT_OP_EMBEDDING_DW, n->name, in, 2, &at, NULL);
}

struct rows_push {
    uint32_t n, c, rows, t;
    uint32_t first, end; /* embedding: rows of the table that are bound; others: first result */
};

/* A table larger than one binding may be (CLIP's in f32) is read in parts; each id lies in one. */
static ipt_status embedding_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *table = &n->in_shape[1];
    const uint64_t c = (uint64_t)table->dim[1];
    const ipt_band_operand of_table = {IPT_SRC_IN, 1, false, c * ipt_dtype_bytes(table->dtype)};
    const ipt_band_operand o[2] = {{IPT_SRC_IN, 0, false, 4}, {IPT_SRC_OUT, 0, true, 4 * c}};
    for (ipt_bands b = ipt_launch_bands(l, ipt_shape_count(&n->in_shape[0]), o, 2);
         ipt_bands_next(&b);)
        for (ipt_bands t = ipt_launch_bands(l, (uint64_t)table->dim[0], &of_table, 1);
             ipt_bands_next(&t);) {
            struct rows_push p = {(uint32_t)(b.n * c), (uint32_t)c,
                                  (uint32_t)t.rows,    0,
                                  (uint32_t)t.first,   (uint32_t)(t.first + t.n)};
            ipt_dispatch *d = ipt_launch_add(
                l, table->dtype == IPT_F16 ? "embedding.f16" : "embedding.f32", &p, sizeof p);
            ipt_bands_bind(d, &b, 0);
            ipt_bands_bind(d, &t, 0);
            if (d && t.first + t.n == t.rows)
                d->bind[1].bytes = 0; /* with what the store keeps behind the last row */
            ipt_bands_bind(d, &b, 1);
            ipt_launch_linear(l, d, p.n, WG);
            if (d)
                d->no_wait = b.first + t.first > 0;
        }
    return l->status;
}

const ipt_op_def ipt_op_embedding = {.name = "embedding",
                                     .sig = "ids:nt table:vc -> y:ntc",
                                     .picks = 2,
                                     .table = 2,
                                     .infer = embedding_infer,
                                     .ref = embedding_ref,
                                     .grad = embedding_grad,
                                     .kernel = embedding_kernel};

ipt_val ipt_embedding(ipt_graph *g, ipt_val ids, const char *site, int vocab, int width)
{
    ipt_val in[2] = {ids, ipt_weight_leaf(g, site, "weight", ipt_shape2(IPT_F32, vocab, width))};
    return ipt_emit(g, IPT_OP_EMBEDDING, site, in, 2, NULL, NULL);
}

static const char *embedding_dw_infer(const ipt_node *n, ipt_shape out[])
{
    out[0] = n->attr.to;
    return NULL;
}

static void embedding_dw_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t c = (size_t)n->out_shape[0].dim[1];
    memset(out[0], 0, ipt_shape_count(&n->out_shape[0]) * sizeof(double));
    for (size_t i = 0; i < ipt_shape_count(&n->in_shape[0]); i++)
        for (size_t k = 0; k < c; k++)
            out[0][row_of(in[0][i], n->out_shape[0].dim[0]) * c + k] += in[1][i * c + k];
}

static ipt_status embedding_dw_kernel(const ipt_node *n, ipt_launch *l)
{
    const uint32_t c = (uint32_t)n->out_shape[0].dim[1], rows = (uint32_t)n->out_shape[0].dim[0];
    const ipt_band_operand o = {IPT_SRC_OUT, 0, true, 4 * (uint64_t)c};
    for (ipt_bands b = ipt_launch_bands(l, rows, &o, 1); ipt_bands_next(&b);) {
        struct rows_push p = {
            (uint32_t)(b.n * c), c, rows, (uint32_t)ipt_shape_count(&n->in_shape[0]),
            (uint32_t)b.first,   0};
        ipt_dispatch *d = ipt_launch_add(l, "embedding_dw", &p, sizeof p);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 0, false);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 1, false);
        ipt_bands_bind(d, &b, 0);
        ipt_launch_linear(l, d, p.n, WG);
    }
    return l->status;
}

const ipt_op_def ipt_op_embedding_dw = {.name = "embedding_dw",
                                        .sig = "ids:nt dy:ntc -> dtable:vc",
                                        .infer = embedding_dw_infer,
                                        .ref = embedding_dw_ref,
                                        .kernel = embedding_dw_kernel};

static const char *take_rows_infer(const ipt_node *n, ipt_shape out[])
{
    (void)out;
    return n->in_shape[1].dtype == IPT_I32 ? NULL : "row numbers must be i32";
}

static void take_rows_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t t = (size_t)n->in_shape[0].dim[1], c = (size_t)n->in_shape[0].dim[2];
    for (size_t b = 0; b < (size_t)n->in_shape[0].dim[0]; b++)
        memcpy(out[0] + b * c, in[0] + (b * t + row_of(in[1][b], (int32_t)t)) * c,
               c * sizeof(double));
}

static void take_rows_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                           ipt_val dx[])
{
    if (!(want & 1))
        return;
    ipt_attr at = {.to = n->in_shape[0]};
    ipt_val in[2] = {dy[0], ipt_in(n, 1)};
    dx[0] = ipt_emit(g, IPT_OP_TAKE_ROWS_BWD, n->name, in, 2, &at, NULL);
}

/* Bands are batch elements. */
static ipt_status take_rows_launch(const ipt_node *n, ipt_launch *l, uint32_t bwd)
{
    const ipt_shape *x = bwd ? &n->out_shape[0] : &n->in_shape[0];
    const uint64_t c = (uint64_t)x->dim[2], t = (uint64_t)x->dim[1],
                   elt = ipt_dtype_bytes(x->dtype);
    const ipt_band_operand o[2] = {{IPT_SRC_IN, 0, false, (bwd ? 1 : t) * c * elt},
                                   {IPT_SRC_OUT, 0, true, (bwd ? t : 1) * c * elt}};
    for (ipt_bands b = ipt_launch_bands(l, (uint64_t)x->dim[0], o, 2); ipt_bands_next(&b);) {
        struct rows_push p = {
            (uint32_t)(b.n * c * (bwd ? t : 1)), (uint32_t)c, (uint32_t)t, 0, (uint32_t)b.first, 0};
        ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("take_rows", x->dtype), &p, sizeof p);
        ipt_launch_spec(d, bwd);
        ipt_bands_bind(d, &b, 0);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 1, false);
        ipt_bands_bind(d, &b, 1);
        ipt_launch_linear(l, d, p.n, WG);
    }
    return l->status;
}

static ipt_status take_rows_kernel(const ipt_node *n, ipt_launch *l)
{
    return take_rows_launch(n, l, 0);
}

const ipt_op_def ipt_op_take_rows = {.name = "take_rows",
                                     .sig = "x:ntc idx:n -> y:nc",
                                     .picks = 1,
                                     .infer = take_rows_infer,
                                     .ref = take_rows_ref,
                                     .grad = take_rows_grad,
                                     .kernel = take_rows_kernel};

ipt_val ipt_take_rows(ipt_graph *g, ipt_val x, ipt_val idx)
{
    ipt_val in[2] = {x, idx};
    return ipt_emit(g, IPT_OP_TAKE_ROWS, NULL, in, 2, NULL, NULL);
}

static const char *take_rows_bwd_infer(const ipt_node *n, ipt_shape out[])
{
    out[0] = n->attr.to;
    return NULL;
}

static void take_rows_bwd_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t t = (size_t)n->out_shape[0].dim[1], c = (size_t)n->out_shape[0].dim[2];
    memset(out[0], 0, ipt_shape_count(&n->out_shape[0]) * sizeof(double));
    for (size_t b = 0; b < (size_t)n->out_shape[0].dim[0]; b++)
        memcpy(out[0] + (b * t + row_of(in[1][b], (int32_t)t)) * c, in[0] + b * c,
               c * sizeof(double));
}

static ipt_status take_rows_bwd_kernel(const ipt_node *n, ipt_launch *l)
{
    return take_rows_launch(n, l, 1);
}

const ipt_op_def ipt_op_take_rows_bwd = {.name = "take_rows_bwd",
                                         .sig = "dy:nc idx:n -> dx:ntc",
                                         .infer = take_rows_bwd_infer,
                                         .ref = take_rows_bwd_ref,
                                         .kernel = take_rows_bwd_kernel};
