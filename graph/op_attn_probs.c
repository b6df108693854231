/* graph/op_attn_probs.c - attention with its probabilities as a value of the graph:
 * p = softmax(scale q k^T) [N,heads,T,S], o = p v, and their gradients. */
#include "graph/attention.h"

#include <math.h>
#include <string.h>

static const char *probs_infer(const ipt_node *n, ipt_shape out[])
{
    const ipt_shape *q = &n->in_shape[0], *k = &n->in_shape[1];
    const char *problem = ipt_attn_check_query(n);
    if (problem)
        return problem;
    if (n->op == IPT_OP_ATTN_PROBS) {
        out[0] = ipt_shape4(q->dtype, q->dim[0], n->attr.attn.heads, q->dim[1], k->dim[1]);
        return ipt_attn_same_types(n, 2);
    }
    if (n->in_shape[2].dim[1] != n->attr.attn.heads)
        return "p does not fit the heads";
    return ipt_attn_same_types(n, 4);
}

static const char *apply_infer(const ipt_node *n, ipt_shape out[])
{
    (void)out;
    if (!ipt_attn_dividing(n, n->in_shape[1].dim[2]) || n->in_shape[0].dim[1] != n->attr.attn.heads)
        return "p or v does not fit the heads";
    return ipt_attn_same_types(n, n->op == IPT_OP_ATTN_APPLY ? 2 : 3);
}

static void probs_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ipt_attn_ref g = ipt_attn_ref_geo(n, &n->in_shape[0], &n->in_shape[1]);
    for (size_t r = 0; r < g.n * g.h * g.t; r++) {
        size_t b = r / g.t / g.h, h = r / g.t % g.h, i = r % g.t, lim = g.causal ? i + 1 : g.s;
        double lse = ipt_attn_log_sum(&g, in[0], in[1], b, h, i);
        for (size_t j = 0; j < g.s; j++)
            out[0][r * g.s + j] =
                j < lim ? exp(ipt_attn_score(&g, in[0], in[1], b, h, i, j) - lse) : 0;
    }
}

static void probs_bwd_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ipt_attn_ref g = ipt_attn_ref_geo(n, &n->in_shape[0], &n->in_shape[1]);
    for (int k = 0; k < 2; k++)
        memset(out[k], 0, ipt_shape_count(&n->out_shape[k]) * sizeof(double));
    for (size_t r = 0; r < g.n * g.h * g.t; r++) {
        size_t b = r / g.t / g.h, h = r / g.t % g.h, i = r % g.t,
               at = (b * g.t + i) * g.c + h * g.d;
        const double *p = in[2] + r * g.s, *dp = in[3] + r * g.s;
        double sum = ipt_attn_dot(p, dp, g.s);
        for (size_t j = 0; j < g.s; j++) {
            size_t key = (b * g.s + j) * g.c + h * g.d;
            double ds = g.scale * p[j] * (dp[j] - sum);
            ipt_attn_axpy(out[0] + at, ds, in[1] + key, g.d);
            ipt_attn_axpy(out[1] + key, ds, in[0] + at, g.d);
        }
    }
}

static ipt_attn_ref apply_geo(const ipt_node *n)
{
    ipt_shape q = n->in_shape[1];
    q.dim[1] = n->in_shape[0].dim[2];
    return ipt_attn_ref_geo(n, &q, &n->in_shape[1]);
}

static void apply_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ipt_attn_ref g = apply_geo(n);
    memset(out[0], 0, ipt_shape_count(&n->out_shape[0]) * sizeof(double));
    for (size_t r = 0; r < g.n * g.h * g.t; r++) {
        size_t b = r / g.t / g.h, h = r / g.t % g.h, i = r % g.t;
        for (size_t j = 0; j < g.s; j++)
            ipt_attn_axpy(out[0] + (b * g.t + i) * g.c + h * g.d, in[0][r * g.s + j],
                          ipt_attn_row(&g, in[1], g.s, b, h, j), g.d);
    }
}

static void apply_bwd_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    ipt_attn_ref g = apply_geo(n);
    memset(out[1], 0, ipt_shape_count(&n->out_shape[1]) * sizeof(double));
    for (size_t r = 0; r < g.n * g.h * g.t; r++) {
        size_t b = r / g.t / g.h, h = r / g.t % g.h, i = r % g.t;
        const double *grad = ipt_attn_row(&g, in[2], g.t, b, h, i);
        for (size_t j = 0; j < g.s; j++) {
            out[0][r * g.s + j] = ipt_attn_dot(grad, ipt_attn_row(&g, in[1], g.s, b, h, j), g.d);
            ipt_attn_axpy(out[1] + (b * g.s + j) * g.c + h * g.d, in[0][r * g.s + j], grad, g.d);
        }
    }
}

static void probs_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                       ipt_val dx[])
{
    if (!dy[0].id || !(want & 3))
        return;
    ipt_val in[4] = {ipt_in(n, 0), ipt_in(n, 1), ipt_out(n, 0), dy[0]};
    ipt_emit(g, IPT_OP_ATTN_PROBS_BWD, n->name, in, 4, &n->attr, dx);
}

static void apply_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                       ipt_val dx[])
{
    if (!dy[0].id || !(want & 3))
        return;
    ipt_val in[3] = {ipt_in(n, 0), ipt_in(n, 1), dy[0]};
    ipt_emit(g, IPT_OP_ATTN_APPLY_BWD, n->name, in, 3, &n->attr, dx);
}

/* [N,heads,T,S] tensors: bound by batch element. */
static bool probs_fit(ipt_attn_geo *g, const ipt_launch *l)
{
    uint64_t batch = (uint64_t)g->heads * g->t * g->s, range = l->dev->max_range;
    if (batch * g->n * g->elt > range)
        g->whole = false;
    return ipt_attn_fits(g, l) && batch * g->n <= UINT32_MAX &&
           (g->whole || batch * g->elt + l->dev->align <= range);
}

static ipt_status probs_kernel(const ipt_node *n, ipt_launch *l)
{
    ipt_attn_geo g = ipt_attn_geo_of(n, l, &n->in_shape[0], &n->in_shape[1]);
    ipt_attn_pairs p;
    if (!probs_fit(&g, l))
        return IPT_ERR_TOO_LARGE;
    const uint32_t chunk = ipt_attn_plan(&g, l, g.t, g.s, &p), count = p.count;
    if (chunk == 0)
        return IPT_ERR_TOO_LARGE;
    int scores = ipt_launch_scratch(l, (uint64_t)count * chunk * g.s * 4);
    do {
        for (uint32_t r = 0; r < g.t; r += chunk) {
            const uint32_t rows = g.t - r < chunk ? g.t - r : chunk;
            ipt_attn_mm(&g, l, IPT_ATTN_HHF, &p, (const uint32_t[]){rows, g.s, g.d}, g.scale,
                        ipt_attn_heads(&g, IPT_SRC_IN, 0, g.t, r),
                        ipt_attn_transposed(ipt_attn_heads(&g, IPT_SRC_IN, 1, g.s, 0)),
                        ipt_attn_scratch(&g, scores, &p, rows, g.s));
            const uint64_t first = ((uint64_t)p.first * g.t + r) * g.s,
                           size = (uint64_t)p.count * rows * g.s;
            ipt_attn_soft soft = {p.count * rows, rows, r, g.s, g.s, g.s, 0, 0, 0};
            soft.out_off = (uint32_t)first - ipt_attn_below(l, first, g.elt);
            ipt_dispatch *d =
                ipt_launch_add(l,
                               l->dev->simd ? IPT_VARIANT("attention_soft_any", g.dtype)
                                            : IPT_VARIANT("attention_soft", g.dtype),
                               &soft, sizeof soft);
            ipt_launch_spec(d, g.causal);
            ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scores, false);
            ipt_launch_bind_part(
                l, d,
                &(ipt_bind){IPT_BIND_SSBO, IPT_SRC_OUT, 0, true, first * g.elt, size * g.elt});
            if (!l->dev->simd)
                ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, scores,
                                false); /* no lse wanted */
            ipt_launch_linear(l, d, soft.n_row, l->dev->simd ? 64 : 1);
        }
    } while (ipt_attn_next(&g, &p, count));
    return l->status;
}

static ipt_status probs_bwd_kernel(const ipt_node *n, ipt_launch *l)
{
    ipt_attn_geo g = ipt_attn_geo_of(n, l, &n->in_shape[0], &n->in_shape[1]);
    ipt_attn_pairs p;
    if (!probs_fit(&g, l) || (uint64_t)g.t * g.s * 4 > l->dev->max_range)
        return IPT_ERR_TOO_LARGE;
    if (ipt_attn_plan(&g, l, g.t, g.s, &p) < g.t)
        p = (ipt_attn_pairs){0, 1}; /* dk needs every query: one whole pair at a time */
    const uint32_t count = p.count;
    int ds = ipt_launch_scratch(l, (uint64_t)count * g.t * g.s * 4);
    do {
        const uint64_t first = (uint64_t)p.first * g.t * g.s, size = (uint64_t)p.count * g.t * g.s;
        const uint32_t off = (uint32_t)first - ipt_attn_below(l, first, g.elt);
        struct {
            uint32_t n_row, n, p_off, dp_off;
            float scale;
        } push = {p.count * g.t, g.s, off, off, g.scale};
        ipt_dispatch *d = ipt_launch_add(l,
                                         l->dev->simd ? IPT_VARIANT("attention_pds_any", g.dtype)
                                                      : IPT_VARIANT("attention_pds", g.dtype),
                                         &push, sizeof push);
        ipt_launch_bind_part(
            l, d, &(ipt_bind){IPT_BIND_SSBO, IPT_SRC_IN, 2, false, first * g.elt, size * g.elt});
        ipt_launch_bind_part(
            l, d, &(ipt_bind){IPT_BIND_SSBO, IPT_SRC_IN, 3, false, first * g.elt, size * g.elt});
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_SCRATCH, ds, true);
        ipt_launch_linear(l, d, push.n_row, l->dev->simd ? 64 : 1);
        const ipt_attn_matrix m = ipt_attn_scratch(&g, ds, &p, g.t, g.s);
        ipt_attn_mm(&g, l, IPT_ATTN_FHH, &p, (const uint32_t[]){g.t, g.d, g.s}, 1, m,
                    ipt_attn_heads(&g, IPT_SRC_IN, 1, g.s, 0),
                    ipt_attn_heads(&g, IPT_SRC_OUT, 0, g.t, 0));
        ipt_attn_mm(&g, l, IPT_ATTN_FHH, &p, (const uint32_t[]){g.s, g.d, g.t}, 1,
                    ipt_attn_transposed(m), ipt_attn_heads(&g, IPT_SRC_IN, 0, g.t, 0),
                    ipt_attn_heads(&g, IPT_SRC_OUT, 1, g.s, 0));
    } while (ipt_attn_next(&g, &p, count));
    return l->status;
}

static ipt_status apply_kernel(const ipt_node *n, ipt_launch *l)
{
    ipt_shape q = n->in_shape[1];
    q.dim[1] = n->in_shape[0].dim[2];
    ipt_attn_geo g = ipt_attn_geo_of(n, l, &q, &n->in_shape[1]);
    if (!probs_fit(&g, l))
        return IPT_ERR_TOO_LARGE;
    const bool bwd = n->op == IPT_OP_ATTN_APPLY_BWD;
    const uint32_t all = g.n * g.heads, limit = l->dev->max_group_count / g.heads * g.heads;
    const uint32_t count = !g.whole ? g.heads : all < limit ? all : limit;
    ipt_attn_pairs p = {0, count};
    do {
        const ipt_attn_matrix probs = ipt_attn_probs(&g, IPT_SRC_IN, 0, 0),
                              v = ipt_attn_heads(&g, IPT_SRC_IN, 1, g.s, 0);
        if (!bwd) {
            ipt_attn_mm(&g, l, IPT_ATTN_HHH, &p, (const uint32_t[]){g.t, g.d, g.s}, 1, probs, v,
                        ipt_attn_heads(&g, IPT_SRC_OUT, 0, g.t, 0));
            continue;
        }
        const ipt_attn_matrix grad = ipt_attn_heads(&g, IPT_SRC_IN, 2, g.t, 0);
        ipt_attn_mm(&g, l, IPT_ATTN_HHH, &p, (const uint32_t[]){g.t, g.s, g.d}, 1, grad,
                    ipt_attn_transposed(v), ipt_attn_probs(&g, IPT_SRC_OUT, 0, 0));
        ipt_attn_mm(&g, l, IPT_ATTN_HHH, &p, (const uint32_t[]){g.s, g.d, g.t}, 1,
                    ipt_attn_transposed(probs), grad, ipt_attn_heads(&g, IPT_SRC_OUT, 1, g.s, 0));
    } while (ipt_attn_next(&g, &p, count));
    return l->status;
}

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
