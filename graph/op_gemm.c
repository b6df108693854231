/* graph/op_gemm.c - linear layers and matrix products: references, gradients, launches, builders.
 * Shaders, tiles and bands are gemm.c's. */
#include "graph/gemm.h"

#include <string.h>

/* Rows of a [*,k] shape. */
static int64_t rows_of(const ipt_shape *s)
{
    int64_t n = 1;
    for (int i = 0; i + 1 < s->rank; i++)
        n *= s->dim[i];
    return n;
}

static int32_t last_of(const ipt_shape *s) { return s->dim[s->rank - 1]; }

/* Values of another element type than the result's cannot be added in the epilogue. */
static const char *same_type(const ipt_node *n, int i)
{
    return i < n->n_in && n->in_shape[i].rank && n->in_shape[i].dtype != n->in_shape[0].dtype
               ? "the residual must have the element type of x"
               : NULL;
}

ipt_val ipt_grad_as_input(ipt_graph *g, const ipt_node *n, int i, ipt_val v)
{
    ipt_shape s = ipt_shape_of(g, v);
    if (!ipt_shape_same(&s, &n->in_shape[i])) {
        ipt_shape to = n->in_shape[i];
        to.dtype = s.dtype;
        v = ipt_reshape(g, v, to);
    }
    return s.dtype == n->in_shape[i].dtype ? v : ipt_cast(g, v, n->in_shape[i].dtype);
}

ipt_val ipt_grad_columns(ipt_graph *g, const ipt_node *n, int i, ipt_val dy, int first)
{
    ipt_shape s = ipt_shape_of(g, dy);
    for (int d = first; d + 1 < s.rank; d++)
        s.dim[d] = 1;
    return ipt_grad_as_input(g, n, i, ipt_sum_to(g, dy, s));
}

/* --- linear: y = x w^T (+ b + r + side), the columns of the side path in groups of p:
 * side[m, j p + c] = sum_k h[m, j k' + k] u[k, c], u [k',p] --------------------------------- */
enum { LINEAR_H = 4, LINEAR_U = 5 };

static bool has_side(const ipt_node *n) { return n->n_in > LINEAR_U && n->in_shape[LINEAR_H].rank; }
static void linear_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const int64_t rows = rows_of(&n->in_shape[0]);
    const int32_t K = n->in_shape[1].dim[1], O = n->in_shape[1].dim[0];
    const double *b = n->n_in > 2 ? in[2] : NULL, *r = n->n_in > 3 ? in[3] : NULL;
    const bool side = has_side(n);
    const int32_t J = side ? n->in_shape[LINEAR_U].dim[0] : 0,
                  P = side ? n->in_shape[LINEAR_U].dim[1] : O;
    for (int64_t m = 0; m < rows; m++)
        for (int32_t o = 0; o < O; o++) {
            double sum = (b ? b[o] : 0.0) + (r ? r[m * O + o] : 0.0);
            for (int32_t j = 0; j < J; j++)
                sum += in[LINEAR_H][(m * (O / P) + o / P) * J + j] *
                       in[LINEAR_U][(int64_t)j * P + o % P];
            const double *x = in[0] + m * K, *w = in[1] + (int64_t)o * K;
            for (int32_t k = 0; k < K; k++)
                sum += x[k] * w[k];
            out[0][m * O + o] = sum;
        }
}

static void linear_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                        ipt_val dx[])
{
    if (want & 1)
        dx[0] =
            ipt_emit(g, IPT_OP_LINEAR_DX, n->name, (ipt_val[]){dy[0], ipt_in(n, 1)}, 2, NULL, NULL);
    if (want & 2) {
        const ipt_attr ta = {.matmul = {.ta = 1}};
        ipt_shape flat = ipt_shape2(n->in_shape[0].dtype, (int32_t)rows_of(&n->in_shape[0]),
                                    last_of(&n->in_shape[0]));
        ipt_val dw[2] = {dy[0], ipt_reshape(g, ipt_in(n, 0), flat)};
        dx[1] = ipt_grad_as_input(g, n, 1, ipt_emit(g, IPT_OP_MATMUL, n->name, dw, 2, &ta, NULL));
    }
    if (want & 4)
        dx[2] = ipt_grad_columns(g, n, 2, dy[0], 0);
    if (want & 8)
        dx[3] = dy[0];
    if (!(want & (1u << LINEAR_H | 1u << LINEAR_U)))
        return;
    /* groups as rows */
    const ipt_shape *u = &n->in_shape[LINEAR_U];
    const int32_t rows = (int32_t)rows_of(&n->in_shape[0]) * (n->in_shape[1].dim[0] / u->dim[1]);
    ipt_val d = ipt_reshape(g, dy[0], ipt_shape2(u->dtype, rows, u->dim[1]));
    if (want & 1u << LINEAR_H)
        dx[LINEAR_H] =
            ipt_grad_as_input(g, n, LINEAR_H,
                              ipt_emit(g, IPT_OP_MATMUL_NT, n->name,
                                       (ipt_val[]){d, ipt_in(n, LINEAR_U)}, 2, NULL, NULL));
    if (want & 1u << LINEAR_U) {
        const ipt_attr ta = {.matmul = {.ta = 1}};
        ipt_val h = ipt_reshape(g, ipt_in(n, LINEAR_H), ipt_shape2(u->dtype, rows, u->dim[0]));
        dx[LINEAR_U] = ipt_grad_as_input(
            g, n, LINEAR_U, ipt_emit(g, IPT_OP_MATMUL, n->name, (ipt_val[]){h, d}, 2, &ta, NULL));
    }
}

static ipt_status linear_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *x = &n->in_shape[0];
    ipt_gemm g = {.y = ipt_operand_out(0),
                  .bias = ipt_operand_optional(n, 2),
                  .t = ipt_operand_none(),
                  .r = ipt_operand_optional(n, 3),
                  .act = x->dtype,
                  .rows = rows_of(x),
                  .cols = n->in_shape[1].dim[0],
                  .k = last_of(x)};
    g.walk = ipt_walk_plain(g.rows, 1);
    g.ldy = g.cols;
    IPT_TRY(ipt_gemm_left(l, n, 0, &g.a));
    IPT_TRY(ipt_gemm_right(l, n, 1, false, &g.b, &g.b_type));
    if (has_side(n)) {
        g.side = n->in_shape[LINEAR_U].dim[0];
        g.side_cols = n->in_shape[LINEAR_U].dim[1];
        g.h = ipt_operand_in(LINEAR_H);
        IPT_TRY(ipt_gemm_right(l, n, LINEAR_U, true, &g.u, &g.u_type));
    }
    return ipt_gemm_launch(l, &g);
}

static const char *linear_infer(const ipt_node *n, ipt_shape out[])
{
    (void)out;
    const char *problem = same_type(n, 3);
    if (problem || !has_side(n))
        return problem;
    const ipt_shape *h = &n->in_shape[LINEAR_H], *u = &n->in_shape[LINEAR_U];
    const int32_t cols = n->in_shape[1].dim[0], groups = cols / u->dim[1];
    if (rows_of(h) != rows_of(&n->in_shape[0]) || u->dim[0] % 4)
        return "the side path has other rows than x, or no multiple of 4 columns";
    if (groups * u->dim[1] != cols || last_of(h) != groups * u->dim[0] ||
        (groups > 1 && u->dim[1] % 4))
        return "the groups of the side path do not fit";
    return h->dtype == n->in_shape[0].dtype && u->dtype == n->in_shape[0].dtype
               ? NULL
               : "the side path must have the element type of x";
}

/* A right operand [K,N] is the weight [N,K]. */
static ipt_shape transposed(const ipt_shape *w)
{
    return w->rank == 2 ? ipt_shape2(w->dtype, w->dim[1], w->dim[0]) : (ipt_shape){.rank = 0};
}

static ipt_shape linear_packs(const ipt_node *n, int operand)
{
    return operand == LINEAR_U ? transposed(&n->in_shape[LINEAR_U]) : (ipt_shape){.rank = 0};
}

const ipt_op_def ipt_op_linear = {
    .name = "linear",
    .sig = "x:*k w:ok b?:o r?:*o h?:*j u?:ip -> y:*o",
    .alias = 1u << 3,
    .panel = 1u << 1,
    .infer = linear_infer,
    .ref = linear_ref,
    .grad = linear_grad,
    .packs = linear_packs,
    .kernel = linear_kernel,
};

/* --- linear, gradient of x: dx = dy W ------------------------------------------------------ */
static void linear_dx_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const int64_t rows = rows_of(&n->in_shape[0]);
    const int32_t O = n->in_shape[1].dim[0], K = n->in_shape[1].dim[1];
    memset(out[0], 0, (size_t)rows * (size_t)K * sizeof(double));
    for (int64_t m = 0; m < rows; m++)
        for (int32_t o = 0; o < O; o++) {
            const double d = in[0][m * O + o], *w = in[1] + (int64_t)o * K;
            double *y = out[0] + m * K;
            for (int32_t k = 0; k < K; k++)
                y[k] += d * w[k];
        }
}

static ipt_status linear_dx_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *dy = &n->in_shape[0], *w = &n->in_shape[1];
    const int32_t O = w->dim[0], K = w->dim[1];
    ipt_gemm g = {.y = ipt_operand_out(0),
                  .bias = ipt_operand_none(),
                  .t = ipt_operand_none(),
                  .r = ipt_operand_none(),
                  .act = dy->dtype,
                  .b_type = IPT_F32,
                  .rows = rows_of(dy),
                  .cols = K,
                  .k = O,
                  .ldy = K};
    g.walk = ipt_walk_plain(g.rows, 1);
    ipt_pack p = {.src = ipt_operand_in(1), .type = w->dtype, .n = K, .taps = 1, .k = O};
    if (n->in_is_back[1]) {
        g.b = ipt_operand_in(1);
        g.b_type = w->dtype;
        IPT_TRY(ipt_gemm_left(l, n, 0, &g.a));
        return ipt_gemm_launch(l, &g);
    }
    if (n->in_is_panel[1]) {
        p.mode = IPT_PACK_PANEL;
        p.src_bytes = ipt_panel_bytes(w, w->dtype);
        p.sn = p.sk = ipt_pad4(K);
    } else {
        p.src_bytes = ipt_shape_bytes(w);
        p.sn = 1;
        p.sk = K;
    }
    IPT_TRY(ipt_gemm_left(l, n, 0, &g.a));
    IPT_TRY(ipt_gemm_pack(l, &p, &g.b));
    return ipt_gemm_launch(l, &g);
}

const ipt_op_def ipt_op_linear_dx = {
    .name = "linear_dx",
    .back = 1u << 1,
    .sig = "dy:*o w:ok -> dx:*k",
    .panel = 1u << 1,
    .ref = linear_dx_ref,
    .kernel = linear_dx_kernel,
};

/* --- matmul: c = a b, or c = a^T b --------------------------------------------------------- */
static const char *matmul_infer(const ipt_node *n, ipt_shape out[])
{
    const ipt_shape *a = &n->in_shape[0], *b = &n->in_shape[1];
    if (!n->attr.matmul.ta)
        return last_of(a) == b->dim[0] ? same_type(n, 2) : "inner sizes of a and b differ";
    if (n->n_in > 2 && n->in_shape[2].rank)
        return "the transposed form takes no residual";
    if (rows_of(a) != b->dim[0])
        return "row counts of a and b differ";
    out[0] = ipt_shape2(a->dtype, last_of(a), b->dim[1]);
    return NULL;
}

static void matmul_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const int32_t N = n->in_shape[1].dim[1];
    const int64_t rows = rows_of(&n->in_shape[0]);
    const int32_t K = last_of(&n->in_shape[0]);
    const bool ta = n->attr.matmul.ta != 0;
    const double *r = n->n_in > 2 ? in[2] : NULL;
    const size_t count = ipt_shape_count(&n->out_shape[0]);
    if (r)
        memcpy(out[0], r, count * sizeof(double));
    else
        memset(out[0], 0, count * sizeof(double));
    /* a[m][k] meets row k of b for c row m; transposed: row m of b for c row k */
    for (int64_t m = 0; m < rows; m++)
        for (int32_t k = 0; k < K; k++) {
            const double a = in[0][m * K + k];
            const double *b = in[1] + (ta ? m : k) * N;
            double *c = out[0] + (ta ? k : m) * N;
            for (int32_t j = 0; j < N; j++)
                c[j] += a * b[j];
        }
}

static void matmul_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                        ipt_val dx[])
{
    const bool ta = n->attr.matmul.ta != 0;
    const ipt_attr transposed = {.matmul = {.ta = 1}};
    ipt_val a = ipt_in(n, 0), b = ipt_in(n, 1), d = dy[0];
    if (want & 1) /* a b: da = dc b^T; a^T b: da = b dc^T, in the rows of a */
        dx[0] =
            ipt_grad_as_input(g, n, 0,
                              ipt_emit(g, IPT_OP_MATMUL_NT, n->name,
                                       ta ? (ipt_val[]){b, d} : (ipt_val[]){d, b}, 2, NULL, NULL));
    if (want & 2) {
        if (ta) {
            ipt_shape flat =
                ipt_shape2(n->in_shape[0].dtype, n->in_shape[1].dim[0], last_of(&n->in_shape[0]));
            dx[1] = ipt_emit(g, IPT_OP_MATMUL, n->name, (ipt_val[]){ipt_reshape(g, a, flat), d}, 2,
                             NULL, NULL);
        } else {
            ipt_shape flat = ipt_shape2(n->in_shape[0].dtype, (int32_t)rows_of(&n->in_shape[0]),
                                        n->in_shape[1].dim[1]);
            dx[1] = ipt_emit(g, IPT_OP_MATMUL, n->name, (ipt_val[]){a, ipt_reshape(g, d, flat)}, 2,
                             &transposed, NULL);
        }
        dx[1] = ipt_grad_as_input(g, n, 1, dx[1]);
    }
    if (want & 4)
        dx[2] = d;
}

static ipt_status matmul_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *a = &n->in_shape[0], *b = &n->in_shape[1];
    const int32_t N = b->dim[1], depth = b->dim[0];
    const bool ta = n->attr.matmul.ta != 0;
    ipt_gemm g = {.y = ipt_operand_out(0),
                  .bias = ipt_operand_none(),
                  .t = ipt_operand_none(),
                  .r = ipt_operand_optional(n, 2),
                  .act = a->dtype,
                  .b_type = IPT_F32,
                  .rows = ta ? last_of(a) : rows_of(a),
                  .cols = N,
                  .k = depth,
                  .ldy = N};
    g.walk = ipt_walk_plain(g.rows, 1);
    if (ta) {
        ipt_pack p = {.src = ipt_operand_in(0),
                      .type = a->dtype,
                      .src_bytes = ipt_shape_bytes(a),
                      .rows = true,
                      .n = last_of(a),
                      .taps = 1,
                      .k = depth,
                      .sn = 1,
                      .sk = last_of(a)};
        IPT_TRY(ipt_gemm_pack(l, &p, &g.a));
    } else {
        IPT_TRY(ipt_gemm_left(l, n, 0, &g.a));
    }
    IPT_TRY(ipt_gemm_right(l, n, 1, true, &g.b, &g.b_type));
    return ipt_gemm_launch(l, &g);
}

static ipt_shape matmul_packs(const ipt_node *n, int operand)
{
    return operand == 1 && !n->attr.matmul.ta ? transposed(&n->in_shape[1])
                                              : (ipt_shape){.rank = 0};
}

const ipt_op_def ipt_op_matmul = {
    .name = "matmul",
    .sig = "a:*k b:jn r?:*n -> c:*n",
    .alias = 1u << 2,
    .infer = matmul_infer,
    .ref = matmul_ref,
    .grad = matmul_grad,
    .packs = matmul_packs,
    .kernel = matmul_kernel,
};

/* --- matmul_nt: c = a b^T ------------------------------------------------------------------ */
static void matmul_nt_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const int64_t rows = rows_of(&n->in_shape[0]);
    const int32_t N = n->in_shape[1].dim[0], K = n->in_shape[1].dim[1];
    for (int64_t m = 0; m < rows; m++)
        for (int32_t j = 0; j < N; j++) {
            const double *a = in[0] + m * K, *b = in[1] + (int64_t)j * K;
            double sum = 0.0;
            for (int32_t k = 0; k < K; k++)
                sum += a[k] * b[k];
            out[0][m * N + j] = sum;
        }
}

static void matmul_nt_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                           ipt_val dx[])
{
    const ipt_attr transposed = {.matmul = {.ta = 1}};
    const ipt_shape *a = &n->in_shape[0];
    if (want & 1)
        dx[0] =
            ipt_emit(g, IPT_OP_MATMUL, n->name, (ipt_val[]){dy[0], ipt_in(n, 1)}, 2, NULL, NULL);
    if (want & 2) {
        ipt_shape flat = ipt_shape2(a->dtype, (int32_t)rows_of(a), last_of(a));
        ipt_val d =
            ipt_emit(g, IPT_OP_MATMUL, n->name,
                     (ipt_val[]){dy[0], ipt_reshape(g, ipt_in(n, 0), flat)}, 2, &transposed, NULL);
        dx[1] = ipt_grad_as_input(g, n, 1, d);
    }
}

static ipt_status matmul_nt_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *a = &n->in_shape[0], *b = &n->in_shape[1];
    const int32_t N = b->dim[0], K = b->dim[1];
    ipt_gemm g = {.y = ipt_operand_out(0),
                  .bias = ipt_operand_none(),
                  .t = ipt_operand_none(),
                  .r = ipt_operand_none(),
                  .act = a->dtype,
                  .b_type = IPT_F32,
                  .rows = rows_of(a),
                  .cols = N,
                  .k = K,
                  .ldy = N};
    g.walk = ipt_walk_plain(g.rows, 1);
    IPT_TRY(ipt_gemm_left(l, n, 0, &g.a));
    IPT_TRY(ipt_gemm_right(l, n, 1, false, &g.b, &g.b_type));
    return ipt_gemm_launch(l, &g);
}

const ipt_op_def ipt_op_matmul_nt = {
    .name = "matmul_nt",
    .sig = "a:*k b:nk -> c:*n",
    .ref = matmul_nt_ref,
    .grad = matmul_nt_grad,
    .kernel = matmul_nt_kernel,
};

/* --- builders ------------------------------------------------------------------------------ */
ipt_val ipt_linear_add(ipt_graph *g, ipt_val x, const char *site, int out, bool bias,
                       ipt_val residual)
{
    if (ipt_graph_status(g) != IPT_OK)
        return (ipt_val){0};
    const ipt_shape s = ipt_shape_of(g, x);
    if (s.rank == 0 || out < 1) {
        ipt_poison(g, IPT_ERR_SHAPE, "%s: linear: no input, or %d outputs", site, out);
        return (ipt_val){0};
    }
    ipt_val w = ipt_weight_leaf(g, site, "weight", ipt_shape2(IPT_F32, out, last_of(&s)));
    ipt_val b = bias ? ipt_weight_leaf(g, site, "bias", ipt_shape1(IPT_F32, out)) : (ipt_val){0};
    ipt_val u = {0}, h = ipt_adapter_hidden(g, x, out, site, &u);
    ipt_val y = ipt_emit(g, IPT_OP_LINEAR, site, (ipt_val[]){x, w, b, residual, h, u}, h.id ? 6 : 4,
                         NULL, NULL);
    return ipt_adapter_path(g, x, y, site, NULL);
}

ipt_val ipt_linear(ipt_graph *g, ipt_val x, const char *site, int out, bool bias)
{
    return ipt_linear_add(g, x, site, out, bias, (ipt_val){0});
}

ipt_val ipt_matmul(ipt_graph *g, ipt_val a, ipt_val b, ipt_val residual)
{
    return ipt_emit(g, IPT_OP_MATMUL, NULL, (ipt_val[]){a, b, residual}, 3, NULL, NULL);
}
