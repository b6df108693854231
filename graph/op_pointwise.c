/* graph/op_pointwise.c - element by element: activations, GEGLU, sums, products, broadcasts,
 * reductions to a shape, the mean squared error; each with its gradient. */
#include "graph/op.h"

#include <math.h>
#include <string.h>

enum { WG = 64 };
enum { ELT_UNARY, ELT_UNARY_BWD, ELT_ADD, ELT_MUL };

/* --- activations ------------------------------------------------------------------------------ */
static double act(const ipt_attr *a, double x)
{
    switch ((ipt_unary_kind)a->unary.kind) {
    case IPT_SILU:
        return x / (1.0 + exp(-x));
    case IPT_GELU:
        return 0.5 * x * (1.0 + erf(x * 0.70710678118654752440));
    case IPT_QUICK_GELU:
        return x / (1.0 + exp(-1.702 * x));
    case IPT_RELU:
        return x > 0 ? x : 0;
    case IPT_TANH:
        return tanh(x);
    case IPT_AFFINE:
    default:
        return (double)a->unary.a * x + (double)a->unary.b;
    }
}

static double act_slope(const ipt_attr *a, double x)
{
    double s;
    switch ((ipt_unary_kind)a->unary.kind) {
    case IPT_SILU:
        s = 1.0 / (1.0 + exp(-x));
        return s * (1.0 + x * (1.0 - s));
    case IPT_GELU:
        return 0.5 * (1.0 + erf(x * 0.70710678118654752440)) +
               x * 0.39894228040143267794 * exp(-0.5 * x * x);
    case IPT_QUICK_GELU:
        s = 1.0 / (1.0 + exp(-1.702 * x));
        return s * (1.0 + 1.702 * x * (1.0 - s));
    case IPT_RELU:
        return x > 0 ? 1 : 0;
    case IPT_TANH:
        s = tanh(x);
        return 1.0 - s * s;
    case IPT_AFFINE:
    default:
        return (double)a->unary.a;
    }
}

struct elt_push {
    uint32_t n;
    float a, b;
};

static ipt_status elt_kernel(const ipt_node *n, ipt_launch *l, uint32_t mode, uint32_t kind,
                             float a, float b)
{
    size_t count = ipt_shape_count(&n->out_shape[0]);
    uint32_t vec = count % 4 == 0, per = vec ? 4 : 1;
    const uint64_t item = per * ipt_dtype_bytes(n->out_shape[0].dtype);
    const ipt_band_operand o[3] = {{IPT_SRC_IN, 0, false, item},
                                   {IPT_SRC_IN, mode == ELT_UNARY ? 0 : 1, false, item},
                                   {IPT_SRC_OUT, 0, true, item}};
    for (ipt_bands band = ipt_launch_bands(l, count / per, o, 3); ipt_bands_next(&band);) {
        struct elt_push push = {(uint32_t)band.n, a, b};
        ipt_dispatch *d =
            ipt_launch_add(l, IPT_VARIANT("eltwise", n->out_shape[0].dtype), &push, sizeof push);
        ipt_launch_spec(d, mode);
        ipt_launch_spec(d, kind);
        ipt_launch_spec(d, vec);
        for (int i = 0; i < 3; i++)
            ipt_bands_bind(d, &band, i);
        ipt_launch_linear(l, d, band.n, WG);
    }
    return l->status;
}

static void unary_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    for (size_t i = 0; i < ipt_shape_count(&n->out_shape[0]); i++)
        out[0][i] = act(&n->attr, in[0][i]);
}

static void unary_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                       ipt_val dx[])
{
    (void)want;
    ipt_val in[2] = {ipt_in(n, 0), dy[0]};
    dx[0] = n->attr.unary.kind == IPT_AFFINE
                ? ipt_unary(g, IPT_AFFINE, dy[0], n->attr.unary.a, 0.0F)
                : ipt_emit(g, IPT_OP_UNARY_BWD, n->name, in, 2, &n->attr, NULL);
}

static ipt_status unary_kernel(const ipt_node *n, ipt_launch *l)
{
    return elt_kernel(n, l, ELT_UNARY, (uint32_t)n->attr.unary.kind, n->attr.unary.a,
                      n->attr.unary.b);
}

const ipt_op_def ipt_op_unary = {.name = "unary",
                                 .sig = "x:* -> y:*",
                                 .alias = 1,
                                 .ref = unary_ref,
                                 .grad = unary_grad,
                                 .kernel = unary_kernel};

static void unary_bwd_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    for (size_t i = 0; i < ipt_shape_count(&n->out_shape[0]); i++)
        out[0][i] = act_slope(&n->attr, in[0][i]) * in[1][i];
}

static ipt_status unary_bwd_kernel(const ipt_node *n, ipt_launch *l)
{
    return elt_kernel(n, l, ELT_UNARY_BWD, (uint32_t)n->attr.unary.kind, n->attr.unary.a,
                      n->attr.unary.b);
}

const ipt_op_def ipt_op_unary_bwd = {.name = "unary_bwd",
                                     .sig = "x:* dy:* -> dx:*",
                                     .alias = 3,
                                     .ref = unary_bwd_ref,
                                     .kernel = unary_bwd_kernel};

ipt_val ipt_unary(ipt_graph *g, ipt_unary_kind k, ipt_val x, float a, float b)
{
    ipt_attr at = {.unary = {(int32_t)k, a, b}};
    return ipt_emit(g, IPT_OP_UNARY, NULL, &x, 1, &at, NULL);
}

ipt_val ipt_silu(ipt_graph *g, ipt_val x) { return ipt_unary(g, IPT_SILU, x, 0, 0); }

/* --- GEGLU ------------------------------------------------------------------------------------ */
static const char *geglu_infer(const ipt_node *n, ipt_shape out[])
{
    out[0] = n->in_shape[0];
    int last = out[0].rank - 1;
    if (out[0].dim[last] % 2)
        return "the last axis must be even";
    out[0].dim[last] /= 2;
    return NULL;
}

static const ipt_attr gelu_attr = {.unary = {IPT_GELU, 0, 0}};

static void geglu_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t c = (size_t)n->out_shape[0].dim[n->out_shape[0].rank - 1];
    size_t rows = ipt_shape_count(&n->out_shape[0]) / c;
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < c; i++)
            out[0][r * c + i] = in[0][r * 2 * c + i] * act(&gelu_attr, in[0][r * 2 * c + c + i]);
}

static void geglu_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                       ipt_val dx[])
{
    (void)want;
    ipt_val in[2] = {ipt_in(n, 0), dy[0]};
    dx[0] = ipt_emit(g, IPT_OP_GEGLU_BWD, n->name, in, 2, NULL, NULL);
}

static void geglu_bwd_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t c = (size_t)n->out_shape[0].dim[n->out_shape[0].rank - 1] / 2;
    size_t rows = ipt_shape_count(&n->out_shape[0]) / (2 * c);
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < c; i++) {
            double a = in[0][r * 2 * c + i], b = in[0][r * 2 * c + c + i], dy = in[1][r * c + i];
            out[0][r * 2 * c + i] = dy * act(&gelu_attr, b);
            out[0][r * 2 * c + c + i] = dy * a * act_slope(&gelu_attr, b);
        }
}

struct geglu_push {
    uint32_t n, c;
};

static ipt_status geglu_launch(const ipt_node *n, ipt_launch *l, bool bwd)
{
    const ipt_shape *x = &n->in_shape[0];
    uint32_t c = (uint32_t)x->dim[x->rank - 1] / 2, vec = c % 4 == 0, per = vec ? 4 : 1;
    const uint64_t half = c * ipt_dtype_bytes(x->dtype);
    const ipt_band_operand o[3] = {{IPT_SRC_IN, 0, false, 2 * half},
                                   {IPT_SRC_IN, bwd ? 1 : 0, false, bwd ? half : 2 * half},
                                   {IPT_SRC_OUT, 0, true, bwd ? 2 * half : half}};
    for (ipt_bands b = ipt_launch_bands(l, ipt_shape_count(x) / 2 / c, o, 3); ipt_bands_next(&b);) {
        struct geglu_push push = {(uint32_t)(b.n * c / per), c / per};
        ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("geglu", x->dtype), &push, sizeof push);
        ipt_launch_spec(d, bwd);
        ipt_launch_spec(d, vec);
        for (int i = 0; i < 3; i++)
            ipt_bands_bind(d, &b, i);
        ipt_launch_linear(l, d, push.n, WG);
    }
    return l->status;
}

static ipt_status geglu_kernel(const ipt_node *n, ipt_launch *l)
{
    return geglu_launch(n, l, false);
}
static ipt_status geglu_bwd_kernel(const ipt_node *n, ipt_launch *l)
{
    return geglu_launch(n, l, true);
}

const ipt_op_def ipt_op_geglu = {.name = "geglu",
                                 .sig = "x:*d -> y:*c",
                                 .infer = geglu_infer,
                                 .ref = geglu_ref,
                                 .grad = geglu_grad,
                                 .kernel = geglu_kernel};
const ipt_op_def ipt_op_geglu_bwd = {.name = "geglu_bwd",
                                     .sig = "x:*d dy:*c -> dx:*d",
                                     .ref = geglu_bwd_ref,
                                     .kernel = geglu_bwd_kernel};

ipt_val ipt_geglu(ipt_graph *g, ipt_val x)
{
    return ipt_emit(g, IPT_OP_GEGLU, NULL, &x, 1, NULL, NULL);
}

/* --- sums and products with broadcast --------------------------------------------------------- */
static const char *broadcast_infer(const ipt_node *n, ipt_shape out[])
{
    const ipt_shape *a = &n->in_shape[0], *b = &n->in_shape[1];
    if (b->rank > a->rank)
        return "the second operand has more axes than the first";
    for (int i = 0; i < b->rank; i++)
        if (b->dim[i] != a->dim[i + a->rank - b->rank] && b->dim[i] != 1)
            return "the second operand's axes must match or be 1";
    out[0] = *a;
    return NULL;
}

/* b with leading axes of 1, as many as a has. */
static ipt_shape aligned(const ipt_shape *a, const ipt_shape *b)
{
    ipt_shape s = *a;
    s.dtype = b->dtype;
    for (int i = 0; i < a->rank; i++) {
        int k = i - (a->rank - b->rank);
        s.dim[i] = k < 0 ? 1 : b->dim[k];
    }
    return s;
}

/* Element of b that belongs to element i of the result. */
static size_t broadcast_index(const ipt_shape *a, const ipt_shape *b, size_t i)
{
    size_t at = 0, stride = 1;
    for (int k = a->rank - 1; k >= 0; k--) {
        size_t x = i % (size_t)a->dim[k];
        i /= (size_t)a->dim[k];
        if (b->dim[k] != 1)
            at += x * stride;
        stride *= (size_t)b->dim[k];
    }
    return at;
}

static void add_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ipt_shape b = aligned(&n->in_shape[0], &n->in_shape[1]);
    for (size_t i = 0; i < ipt_shape_count(&n->out_shape[0]); i++)
        out[0][i] = (double)n->attr.add.sa * in[0][i] +
                    (double)n->attr.add.sb * in[1][broadcast_index(&n->in_shape[0], &b, i)];
}

static void mul_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ipt_shape b = aligned(&n->in_shape[0], &n->in_shape[1]);
    for (size_t i = 0; i < ipt_shape_count(&n->out_shape[0]); i++)
        out[0][i] = in[0][i] * in[1][broadcast_index(&n->in_shape[0], &b, i)];
}

static ipt_val scaled(ipt_graph *g, ipt_val v, float s)
{
    return s == 1.0F ? v : ipt_unary(g, IPT_AFFINE, v, s, 0);
}

static ipt_val reduce_like(ipt_graph *g, ipt_val v, const ipt_shape *s)
{
    ipt_shape have = ipt_shape_of(g, v);
    return ipt_shape_same(&have, s) && have.dtype == s->dtype ? v : ipt_sum_to(g, v, *s);
}

static void add_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                     ipt_val dx[])
{
    if (want & 1)
        dx[0] = scaled(g, dy[0], n->attr.add.sa);
    if (want & 2)
        dx[1] = scaled(g, reduce_like(g, dy[0], &n->in_shape[1]), n->attr.add.sb);
}

static void mul_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                     ipt_val dx[])
{
    if (want & 1)
        dx[0] = ipt_mul(g, dy[0], ipt_in(n, 1));
    if (want & 2)
        dx[1] = reduce_like(g, ipt_mul(g, dy[0], ipt_in(n, 0)), &n->in_shape[1]);
}

struct broadcast_push {
    uint32_t n, dim[4], stride[4];
    float a, b;
    uint32_t first, b0; /* elements of a and of b before their bindings */
};

/* Elements [*lo, *hi) of b that elements first .. last of a meet: outside the outermost axis on
 * which the two differ nothing moves, inside it anything may. */
static void broadcast_reach(const struct broadcast_push *p, uint64_t first, uint64_t last,
                            uint64_t *lo, uint64_t *hi)
{
    uint64_t inner = 1, top = 0;
    for (int k = 0; k < 4; k++)
        inner *= p->dim[k];
    *lo = *hi = 0;
    for (int k = 0; k < 4; k++) {
        inner /= p->dim[k];
        uint64_t x = first / inner, y = last / inner;
        first -= x * inner;
        last -= y * inner;
        *lo += x * p->stride[k];
        *hi += y * p->stride[k];
        if (x == y)
            continue;
        for (int j = k + 1; j < 4; j++)
            top += (uint64_t)(p->dim[j] - 1) * p->stride[j];
        break;
    }
    *hi += top + 1;
}

static ipt_status broadcast_kernel(const ipt_node *n, ipt_launch *l, uint32_t mode, float sa,
                                   float sb)
{
    const ipt_shape *a = &n->in_shape[0];
    ipt_shape shape_b = aligned(a, &n->in_shape[1]);
    const ipt_shape *b = &shape_b;
    if (b->dtype == a->dtype && ipt_shape_same(a, b))
        return elt_kernel(n, l, mode, 0, sa, sb);
    struct broadcast_push push = {.n = (uint32_t)ipt_shape_count(a), .a = sa, .b = sb};
    uint32_t stride = 1;
    for (int k = 3; k >= 0; k--) {
        push.dim[k] = k < a->rank ? (uint32_t)a->dim[k] : 1;
        bool same = k < a->rank && b->dim[k] != 1;
        push.stride[k] = same ? stride : 0;
        stride *= k < a->rank ? (uint32_t)b->dim[k] : 1;
    }
    const char *shader = a->dtype == IPT_F16
                             ? b->dtype == IPT_F16 ? "broadcast.f16" : "broadcast.f16_f32"
                         : b->dtype == IPT_F16 ? NULL
                                               : "broadcast.f32";
    if (!shader)
        return IPT_ERR_UNSUPPORTED;
    const uint64_t elt = ipt_dtype_bytes(a->dtype), b_elt = ipt_dtype_bytes(b->dtype);
    const bool whole = ipt_shape_bytes(b) <= l->dev->max_range;
    const ipt_band_operand o[2] = {{IPT_SRC_IN, 0, false, elt}, {IPT_SRC_OUT, 0, true, elt}};
    for (ipt_bands band = ipt_launch_bands(l, ipt_shape_count(a), o, 2); ipt_bands_next(&band);) {
        uint64_t lo = 0, hi = ipt_shape_count(b);
        while (!whole) {
            broadcast_reach(&push, band.first, band.first + band.n - 1, &lo, &hi);
            lo = lo * b_elt / l->dev->align * l->dev->align / b_elt;
            if ((hi - lo) * b_elt <= l->dev->max_range)
                break;
            if (!ipt_bands_halve(&band))
                return IPT_ERR_TOO_LARGE;
        }
        push.n = (uint32_t)band.n;
        push.first = (uint32_t)band.first;
        push.b0 = (uint32_t)lo;
        ipt_dispatch *d = ipt_launch_add(l, shader, &push, sizeof push);
        ipt_launch_spec(d, mode);
        ipt_bands_bind(d, &band, 0);
        ipt_launch_bind_range(d, IPT_BIND_SSBO, IPT_SRC_IN, 1, false, lo * b_elt,
                              (hi - lo) * b_elt);
        ipt_bands_bind(d, &band, 1);
        ipt_launch_linear(l, d, push.n, WG);
    }
    return l->status;
}

static ipt_status add_kernel(const ipt_node *n, ipt_launch *l)
{
    return broadcast_kernel(n, l, ELT_ADD, n->attr.add.sa, n->attr.add.sb);
}
static ipt_status mul_kernel(const ipt_node *n, ipt_launch *l)
{
    return broadcast_kernel(n, l, ELT_MUL, 1, 1);
}

const ipt_op_def ipt_op_add = {.name = "add",
                               .sig = "a:* b: -> y:*",
                               .alias = 1,
                               .infer = broadcast_infer,
                               .ref = add_ref,
                               .grad = add_grad,
                               .kernel = add_kernel};
const ipt_op_def ipt_op_mul = {.name = "mul",
                               .sig = "a:* b: -> y:*",
                               .alias = 1,
                               .infer = broadcast_infer,
                               .ref = mul_ref,
                               .grad = mul_grad,
                               .kernel = mul_kernel};

ipt_val ipt_add_scaled(ipt_graph *g, ipt_val a, float sa, ipt_val b, float sb)
{
    ipt_attr at = {.add = {sa, sb}};
    ipt_val in[2] = {a, b};
    return ipt_emit(g, IPT_OP_ADD, NULL, in, 2, &at, NULL);
}

ipt_val ipt_add(ipt_graph *g, ipt_val a, ipt_val b) { return ipt_add_scaled(g, a, 1, b, 1); }

ipt_val ipt_mul(ipt_graph *g, ipt_val a, ipt_val b)
{
    ipt_val in[2] = {a, b};
    return ipt_emit(g, IPT_OP_MUL, NULL, in, 2, NULL, NULL);
}

ipt_val ipt_add_weight(ipt_graph *g, ipt_val x, const char *site, ipt_shape s)
{
    return ipt_add(g, x, ipt_weight_leaf(g, site, "weight", s));
}

/* --- sum to a shape --------------------------------------------------------------------------- */
static const char *sum_to_infer(const ipt_node *n, ipt_shape out[])
{
    const ipt_shape *x = &n->in_shape[0], *to = &n->attr.to;
    int lead = x->rank - to->rank; /* missing leading axes count as 1 */
    if (lead < 0)
        return "the result may not have more axes than the operand";
    for (int i = 0; i < to->rank; i++)
        if (to->dim[i] != x->dim[i + lead] && to->dim[i] != 1)
            return "each axis of the result must match or be 1";
    out[0] = *to;
    return NULL;
}

/* Result dims padded to the operand's rank. */
static void sum_dims(const ipt_node *n, ipt_shape *to)
{
    int lead = n->in_shape[0].rank - n->attr.to.rank;
    *to = n->in_shape[0];
    for (int i = 0; i < to->rank; i++)
        to->dim[i] = i < lead ? 1 : n->attr.to.dim[i - lead];
}

static void sum_to_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ipt_shape to;
    sum_dims(n, &to);
    memset(out[0], 0, ipt_shape_count(&to) * sizeof(double));
    for (size_t i = 0; i < ipt_shape_count(&n->in_shape[0]); i++)
        out[0][broadcast_index(&n->in_shape[0], &to, i)] += in[0][i];
}

/* d(sum)/dx copies dy along the summed axes: zero times x plus broadcast dy. */
static void sum_to_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                        ipt_val dx[])
{
    (void)want;
    ipt_shape to;
    sum_dims(n, &to);
    ipt_val d = ipt_shape_of(g, dy[0]).dtype == n->in_shape[0].dtype
                    ? dy[0]
                    : ipt_cast(g, dy[0], n->in_shape[0].dtype);
    to.dtype = n->in_shape[0].dtype;
    dx[0] = ipt_add_scaled(g, ipt_in(n, 0), 0.0F, ipt_reshape(g, d, to), 1.0F);
}

struct sum_push {
    uint32_t n_out, n_red, chunk, x_dim[4], is_red; /* is_red: bit k set: axis k is summed */
    uint32_t parts, add;                            /* add: to what an earlier band left */
};

/* One reduction of a tensor or of a band of it. */
typedef struct sum_job {
    const ipt_node *n;
    struct sum_push push;
    int scratch;  /* of partial sums; -1: results are written at once */
    ipt_bands *b; /* operand 0: x; operand 1, if any: y */
    bool y_bands; /* each band has results of its own */
} sum_job;

/* Partial sums of `chunk` elements each, as many as give enough invocations and fit `range`. */
static void sum_parts(struct sum_push *p, uint64_t range)
{
    uint64_t parts = p->n_red > 512 ? (p->n_red + 255) / 256 : 1;
    parts = parts > 256 ? 256 : parts;
    uint64_t most = range / 4 / p->n_out;
    parts = parts < most ? parts : most > 0 ? most : 1;
    p->chunk = (uint32_t)((p->n_red + parts - 1) / parts);
    p->parts = (p->n_red + p->chunk - 1) / p->chunk;
}

static void sum_bind_y(const sum_job *j, ipt_dispatch *d)
{
    if (j->y_bands)
        ipt_bands_bind(d, j->b, 1);
    else
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true);
    if (d)
        d->no_wait = false; /* bands share the partial sums, or add to what is there */
}

static void sum_stage(ipt_launch *l, const sum_job *j)
{
    const bool half = j->n->in_shape[0].dtype == IPT_F16;
    const bool to_f32 = j->scratch >= 0 || j->n->out_shape[0].dtype == IPT_F32;
    ipt_dispatch *d = ipt_launch_add(l,
                                     half ? (to_f32 ? "sum_to.f16_f32" : "sum_to.f16")
                                          : (to_f32 ? "sum_to.f32" : "sum_to.f32_f16"),
                                     &j->push, sizeof j->push);
    ipt_bands_bind(d, j->b, 0);
    if (j->scratch >= 0)
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, j->scratch, true);
    else
        sum_bind_y(j, d);
    if (d)
        d->no_wait = false;
    ipt_launch_linear(l, d, (uint64_t)j->push.n_out * j->push.parts, WG);
}

/* Adds the partial sums [parts, n_out]. */
static void sum_last(ipt_launch *l, const sum_job *j)
{
    struct sum_push last = {.n_out = j->push.n_out,
                            .n_red = j->push.parts,
                            .chunk = j->push.parts,
                            .x_dim = {j->push.parts, j->push.n_out, 1, 1},
                            .is_red = 1,
                            .parts = 1};
    ipt_dispatch *d =
        ipt_launch_add(l, j->n->out_shape[0].dtype == IPT_F16 ? "sum_to.f32_f16" : "sum_to.f32",
                       &last, sizeof last);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, j->scratch, false);
    sum_bind_y(j, d);
    ipt_launch_linear(l, d, last.n_out, WG);
}

/* Bands run along the first axis that is longer than 1: kept, each has results of its own; summed,
 * each adds to the partial sums of those before. */
static ipt_status sum_to_kernel(const ipt_node *n, ipt_launch *l)
{
    ipt_shape to;
    sum_dims(n, &to);
    const ipt_shape *x = &n->in_shape[0];
    sum_job j = {.n = n, .scratch = -1};
    int axis = 0;
    uint64_t inner = 1, inner_out = 1;
    while (axis < x->rank - 1 && x->dim[axis] == 1)
        axis++;
    for (int k = 0; k < 4; k++) {
        j.push.x_dim[k] = k < x->rank ? (uint32_t)x->dim[k] : 1;
        if (k < x->rank && to.dim[k] == 1)
            j.push.is_red |= 1u << k;
        inner *= k > axis ? j.push.x_dim[k] : 1;
        inner_out *= k > axis && k < x->rank ? (uint64_t)to.dim[k] : 1;
    }
    j.y_bands = to.dim[axis] != 1;
    const ipt_band_operand o[2] = {
        {IPT_SRC_IN, 0, false, inner * ipt_dtype_bytes(x->dtype)},
        {IPT_SRC_OUT, 0, true, inner_out * ipt_dtype_bytes(n->out_shape[0].dtype)}};
    ipt_bands b = ipt_launch_bands(l, (uint64_t)x->dim[axis], o, j.y_bands ? 2 : 1);
    const uint64_t others = inner / inner_out; /* elements of a result in one index of the axis */
    j.b = &b;
    j.push.n_out = (uint32_t)(inner_out * (j.y_bands ? b.size : 1));
    j.push.n_red = (uint32_t)(others * (j.y_bands ? 1 : b.size));
    if (b.size == 0)
        return l->status;
    sum_parts(&j.push, l->dev->max_range);
    if (j.push.parts > 1 || (!j.y_bands && b.size < b.rows && n->out_shape[0].dtype == IPT_F16))
        j.scratch = ipt_launch_scratch(l, (uint64_t)j.push.parts * j.push.n_out * 4);
    while (ipt_bands_next(&b)) {
        j.push.x_dim[axis] = (uint32_t)b.n;
        j.push.n_out = (uint32_t)(inner_out * (j.y_bands ? b.n : 1));
        j.push.n_red = (uint32_t)(others * (j.y_bands ? 1 : b.n));
        j.push.add = !j.y_bands && b.first > 0;
        sum_stage(l, &j);
        if (j.scratch >= 0 && (j.y_bands || b.first + b.n == b.rows))
            sum_last(l, &j);
    }
    return l->status;
}

const ipt_op_def ipt_op_sum_to = {.name = "sum_to",
                                  .sig = "x:* -> y:",
                                  .infer = sum_to_infer,
                                  .ref = sum_to_ref,
                                  .grad = sum_to_grad,
                                  .kernel = sum_to_kernel};

ipt_val ipt_sum_to(ipt_graph *g, ipt_val x, ipt_shape to)
{
    ipt_attr at = {.to = to};
    return ipt_emit(g, IPT_OP_SUM_TO, NULL, &x, 1, &at, NULL);
}

/* --- mean squared error ----------------------------------------------------------------------- */
static const char *mse_infer(const ipt_node *n, ipt_shape out[])
{
    (void)n;
    out[0] = ipt_shape1(IPT_F32, 1);
    return NULL;
}

static void mse_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t count = ipt_shape_count(&n->in_shape[0]);
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += (in[0][i] - in[1][i]) * (in[0][i] - in[1][i]);
    out[0][0] = sum / (double)count;
}

static void mse_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                     ipt_val dx[])
{
    for (int k = 0; k < 2; k++)
        if (want >> k & 1) {
            ipt_val in[3] = {ipt_in(n, k), ipt_in(n, 1 - k), dy[0]};
            dx[k] = ipt_emit(g, IPT_OP_MSE_BWD, n->name, in, 3, NULL, NULL);
        }
}

struct mse_push {
    uint32_t n, chunk;
    float scale;
    uint32_t part0;
};

/* A sum over pairs of elements times scale, in two stages. */
static ipt_status sum_kernel(const ipt_node *n, ipt_launch *l, const char *shader, float scale)
{
    const uint64_t count = ipt_shape_count(&n->in_shape[0]),
                   elt = ipt_dtype_bytes(n->in_shape[0].dtype);
    uint64_t parts = (count + 1023) / 1024;
    parts = parts > 256 ? 256 : parts;
    uint64_t chunk = (count + parts - 1) / parts, fit = count;
    if (count * elt > l->dev->max_range) { /* whole chunks, each aligned, to a binding */
        const uint64_t most = l->dev->max_range / elt / 128 * 128;
        chunk = (chunk + 127) / 128 * 128;
        chunk = chunk < most ? chunk : most;
        if (chunk == 0)
            return IPT_ERR_TOO_LARGE;
        fit = l->dev->max_range / elt / chunk * chunk;
    }
    parts = (count + chunk - 1) / chunk;
    int scratch = ipt_launch_scratch(l, parts * 4u);
    for (uint64_t at = 0; at < count; at += fit) {
        const uint64_t some = count - at < fit ? count - at : fit;
        struct mse_push push = {(uint32_t)some, (uint32_t)chunk, 1.0F, (uint32_t)(at / chunk)};
        ipt_dispatch *d = ipt_launch_add(l, shader, &push, sizeof push);
        for (int i = 0; i < 2; i++)
            ipt_launch_bind_range(d, IPT_BIND_SSBO, IPT_SRC_IN, i, false, at * elt, some * elt);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scratch, true);
        ipt_launch_linear(l, d, (some + chunk - 1) / chunk, WG);
        if (d)
            d->no_wait = at > 0;
    }
    struct mse_push last = {(uint32_t)parts, (uint32_t)parts, scale, 0};
    ipt_dispatch *d = ipt_launch_add(l, "mse_sum", &last, sizeof last);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scratch, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true);
    return l->status;
}

static ipt_status mse_kernel(const ipt_node *n, ipt_launch *l)
{
    return sum_kernel(n, l, IPT_VARIANT("mse", n->in_shape[0].dtype),
                      1.0F / (float)ipt_shape_count(&n->in_shape[0]));
}

const ipt_op_def ipt_op_mse = {.name = "mse",
                               .sig = "a:* b:* -> loss:1",
                               .infer = mse_infer,
                               .ref = mse_ref,
                               .grad = mse_grad,
                               .kernel = mse_kernel};

static void mse_bwd_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    size_t count = ipt_shape_count(&n->in_shape[0]);
    for (size_t i = 0; i < count; i++)
        out[0][i] = 2.0 / (double)count * (in[0][i] - in[1][i]) * in[2][0];
}

static ipt_status mse_bwd_kernel(const ipt_node *n, ipt_launch *l)
{
    const uint64_t count = ipt_shape_count(&n->in_shape[0]),
                   elt = ipt_dtype_bytes(n->in_shape[0].dtype);
    const ipt_band_operand o[3] = {
        {IPT_SRC_IN, 0, false, elt}, {IPT_SRC_IN, 1, false, elt}, {IPT_SRC_OUT, 0, true, elt}};
    for (ipt_bands b = ipt_launch_bands(l, count, o, 3); ipt_bands_next(&b);) {
        struct mse_push push = {(uint32_t)b.n, 0, 2.0F / (float)count, 0};
        ipt_dispatch *d =
            ipt_launch_add(l, IPT_VARIANT("mse_bwd", n->in_shape[0].dtype), &push, sizeof push);
        ipt_bands_bind(d, &b, 0);
        ipt_bands_bind(d, &b, 1);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 2, false);
        ipt_bands_bind(d, &b, 2);
        ipt_launch_linear(l, d, b.n, WG);
    }
    return l->status;
}

const ipt_op_def ipt_op_mse_bwd = {.name = "mse_bwd",
                                   .sig = "a:* b:* dloss:1 -> da:*",
                                   .alias = 3,
                                   .ref = mse_bwd_ref,
                                   .kernel = mse_bwd_kernel};

ipt_val ipt_mse(ipt_graph *g, ipt_val a, ipt_val b)
{
    ipt_val in[2] = {a, b};
    return ipt_emit(g, IPT_OP_MSE, NULL, in, 2, NULL, NULL);
}

/* --- sum of products -------------------------------------------------------------------------- */
static const char *dot_infer(const ipt_node *n, ipt_shape out[])
{
    out[0] = ipt_shape1(IPT_F32, 1);
    return n->in_shape[0].dtype == n->in_shape[1].dtype ? NULL : "element types differ";
}

static void dot_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    double sum = 0;
    for (size_t i = 0; i < ipt_shape_count(&n->in_shape[0]); i++)
        sum += in[0][i] * in[1][i];
    out[0][0] = sum;
}

static void dot_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                     ipt_val dx[])
{
    ipt_shape one = n->in_shape[0]; /* dy, to be broadcast */
    for (int i = 0; i < one.rank; i++)
        one.dim[i] = 1;
    one.dtype = IPT_F32;
    ipt_val d = ipt_cast(g, ipt_reshape(g, dy[0], one), n->in_shape[0].dtype);
    for (int k = 0; k < 2; k++)
        if (want >> k & 1)
            dx[k] = ipt_mul(g, ipt_in(n, 1 - k), d);
}

static ipt_status dot_kernel(const ipt_node *n, ipt_launch *l)
{
    return sum_kernel(n, l, n->in_shape[0].dtype == IPT_F16 ? "mse.dot_f16" : "mse.dot_f32", 1.0F);
}

const ipt_op_def ipt_op_dot = {.name = "dot",
                               .sig = "a:* b:* -> y:1",
                               .infer = dot_infer,
                               .ref = dot_ref,
                               .grad = dot_grad,
                               .kernel = dot_kernel};

ipt_val ipt_dot(ipt_graph *g, ipt_val a, ipt_val b)
{
    return ipt_emit(g, IPT_OP_DOT, NULL, (ipt_val[]){a, b}, 2, NULL, NULL);
}
