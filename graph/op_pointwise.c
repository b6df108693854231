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
    uint32_t vec = count % 4 == 0;
    struct elt_push push = {(uint32_t)(vec ? count / 4 : count), a, b};
    ipt_dispatch *d =
        ipt_launch_add(l, IPT_VARIANT("eltwise", n->out_shape[0].dtype), &push, sizeof push);
    ipt_launch_spec(d, mode);
    ipt_launch_spec(d, kind);
    ipt_launch_spec(d, vec);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 0, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, mode == ELT_UNARY ? 0 : 1, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true);
    ipt_launch_linear(l, d, push.n, WG);
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
    struct geglu_push push = {(uint32_t)(ipt_shape_count(x) / 2 / per), c / per};
    ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("geglu", x->dtype), &push, sizeof push);
    ipt_launch_spec(d, bwd);
    ipt_launch_spec(d, vec);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 0, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, bwd ? 1 : 0, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true);
    ipt_launch_linear(l, d, push.n, WG);
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
};

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
    ipt_dispatch *d = ipt_launch_add(l, shader, &push, sizeof push);
    ipt_launch_spec(d, mode);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 0, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 1, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true);
    ipt_launch_linear(l, d, push.n, WG);
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
};

static ipt_status sum_to_kernel(const ipt_node *n, ipt_launch *l)
{
    ipt_shape to;
    sum_dims(n, &to);
    const ipt_shape *x = &n->in_shape[0];
    struct sum_push push = {.n_out = (uint32_t)ipt_shape_count(&to)};
    push.n_red = (uint32_t)(ipt_shape_count(x) / push.n_out);
    for (int k = 0; k < 4; k++) {
        push.x_dim[k] = k < x->rank ? (uint32_t)x->dim[k] : 1;
        if (k < x->rank && to.dim[k] == 1)
            push.is_red |= 1u << k;
    }
    /* two stages when few results sum many elements: partial sums of `chunk` elements each */
    uint32_t parts = push.n_red > 512 ? (push.n_red + 255) / 256 : 1;
    parts = parts > 256 ? 256 : parts;
    push.chunk = (push.n_red + parts - 1) / parts;
    parts = (push.n_red + push.chunk - 1) / push.chunk;
    int scratch = parts > 1 ? ipt_launch_scratch(l, (uint64_t)parts * push.n_out * 4) : 0;
    bool to_f32 = parts > 1 || n->out_shape[0].dtype == IPT_F32;
    const char *first = x->dtype == IPT_F16 ? (to_f32 ? "sum_to.f16_f32" : "sum_to.f16")
                                            : (to_f32 ? "sum_to.f32" : "sum_to.f32_f16");
    ipt_dispatch *d = ipt_launch_add(l, first, &push, sizeof push);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 0, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, parts > 1 ? IPT_SRC_SCRATCH : IPT_SRC_OUT,
                    parts > 1 ? scratch : 0, true);
    ipt_launch_linear(l, d, (uint64_t)push.n_out * parts, WG);
    if (parts == 1)
        return l->status;
    struct sum_push last = {.n_out = push.n_out, .n_red = parts, .chunk = parts};
    last.x_dim[0] = parts;
    last.x_dim[1] = push.n_out;
    last.x_dim[2] = last.x_dim[3] = 1;
    last.is_red = 1;
    d = ipt_launch_add(l, n->out_shape[0].dtype == IPT_F16 ? "sum_to.f32_f16" : "sum_to.f32", &last,
                       sizeof last);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scratch, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true);
    ipt_launch_linear(l, d, push.n_out, WG);
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
};

static ipt_status mse_kernel(const ipt_node *n, ipt_launch *l)
{
    uint32_t count = (uint32_t)ipt_shape_count(&n->in_shape[0]), parts = (count + 1023) / 1024;
    parts = parts > 256 ? 256 : parts;
    struct mse_push push = {count, (count + parts - 1) / parts, 1.0F};
    parts = (count + push.chunk - 1) / push.chunk;
    int scratch = ipt_launch_scratch(l, parts * 4u);
    ipt_dispatch *d =
        ipt_launch_add(l, IPT_VARIANT("mse", n->in_shape[0].dtype), &push, sizeof push);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 0, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 1, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scratch, true);
    ipt_launch_linear(l, d, parts, WG);
    struct mse_push last = {parts, parts, 1.0F / (float)count};
    d = ipt_launch_add(l, "mse_sum", &last, sizeof last);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scratch, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true);
    return l->status;
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
    uint32_t count = (uint32_t)ipt_shape_count(&n->in_shape[0]);
    struct mse_push push = {count, 0, 2.0F / (float)count};
    ipt_dispatch *d =
        ipt_launch_add(l, IPT_VARIANT("mse_bwd", n->in_shape[0].dtype), &push, sizeof push);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 0, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 1, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 2, false);
    ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true);
    ipt_launch_linear(l, d, count, WG);
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
