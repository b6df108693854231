/* graph/op_kron.c - what Kronecker adapters need beside products: a small matrix from the left of
 * every row's matrix (mix), and two axes changing places (swap).
 * (P kron Q) x with x viewed [I1,I2] is P X Q^T: mix with P, then a product with Q. */
#include "graph/gemm.h"

enum {
    WG = 64,
    MAX_OUTPUTS = 8 /* of one invocation, and a known matrix's inputs, shaders/mix.comp */
};

/* --- mix: y[r,o,c] = g sum_i p[i,o] x[r,i,c], g = gates[row,b,slot[0]] of the row's batch element
 * b (g = 1 without gates) ---------------------------------------------------------------------- */
static bool has_gates(const ipt_node *n) { return n->n_in > 2 && n->in_shape[2].rank > 0; }

/* Rows of one batch element. */
static int32_t rows_each(const ipt_node *n)
{
    return has_gates(n) ? n->in_shape[0].dim[0] / n->in_shape[2].dim[1] : n->in_shape[0].dim[0];
}

static double gate_of(const ipt_node *n, const double *const in[], size_t r)
{
    const ipt_shape *g = &n->in_shape[2];
    if (!has_gates(n))
        return 1;
    int64_t slot = (int64_t)in[3][0], b = (int64_t)r / rows_each(n);
    return slot < 0 || slot >= g->dim[2]
               ? 0
               : in[2][((int64_t)n->attr.gate.row * g->dim[1] + b) * g->dim[2] + slot];
}

static void mix_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_shape *x = &n->in_shape[0];
    size_t ni = (size_t)x->dim[1], nc = (size_t)x->dim[2], no = (size_t)n->in_shape[1].dim[1];
    for (size_t r = 0; r < (size_t)x->dim[0]; r++)
        for (size_t o = 0; o < no; o++)
            for (size_t c = 0; c < nc; c++) {
                double sum = 0;
                for (size_t i = 0; i < ni; i++)
                    sum += in[1][i * no + o] * in[0][(r * ni + i) * nc + c];
                out[0][(r * no + o) * nc + c] = gate_of(n, in, r) * sum;
            }
}

/* [R,a,c] as rows of a: [R*c,a]. */
static ipt_val rows_of(ipt_graph *g, ipt_val v)
{
    ipt_shape s = ipt_shape_of(g, v);
    v = ipt_swap(g, ipt_reshape(g, v, ipt_shape4(s.dtype, s.dim[0], s.dim[1], s.dim[2], 1)));
    return ipt_reshape(g, v, ipt_shape2(s.dtype, s.dim[0] * s.dim[2], s.dim[1]));
}

/* [R,a,c] as [N,*,1], the view that one slot gates. */
static ipt_val by_batch(ipt_graph *g, const ipt_node *n, ipt_val v)
{
    ipt_shape s = ipt_shape_of(g, v);
    int32_t batch = n->in_shape[2].dim[1];
    return ipt_reshape(
        g, v, ipt_shape3(s.dtype, batch, (int32_t)(ipt_shape_count(&s) / (size_t)batch), 1));
}

static void mix_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                     ipt_val dx[])
{
    const ipt_shape *p = &n->in_shape[1];
    ipt_val in[4] = {dy[0], {0}, {0}, {0}}, gated = dy[0];
    if (has_gates(n)) {
        in[2] = ipt_in(n, 2);
        in[3] = ipt_in(n, 3);
    }
    if (want & 1) {
        ipt_val t = ipt_reshape(g, ipt_in(n, 1), ipt_shape4(p->dtype, 1, p->dim[0], p->dim[1], 1));
        in[1] = ipt_reshape(g, ipt_swap(g, t), ipt_shape2(p->dtype, p->dim[1], p->dim[0]));
        dx[0] = ipt_emit(g, IPT_OP_MIX, n->name, in, 4, &n->attr, NULL);
    }
    if (want & 2) {
        const ipt_attr ta = {.matmul = {.ta = 1}};
        if (has_gates(n))
            gated = ipt_reshape(
                g, ipt_gate_mul(g, by_batch(g, n, dy[0]), in[2], in[3], n->attr.gate.row),
                n->out_shape[0]);
        ipt_val ab[2] = {rows_of(g, ipt_in(n, 0)), rows_of(g, gated)};
        dx[1] = ipt_grad_as_input(g, n, 1, ipt_emit(g, IPT_OP_MATMUL, n->name, ab, 2, &ta, NULL));
    }
    if (want & 4) {
        ipt_val free[4] = {ipt_in(n, 0), ipt_in(n, 1), {0}, {0}};
        ipt_val y = ipt_emit(g, IPT_OP_MIX, n->name, free, 4, NULL, NULL);
        ipt_val h[4] = {by_batch(g, n, y), by_batch(g, n, dy[0]), in[2], in[3]};
        dx[2] = ipt_emit(g, IPT_OP_GATE_GRAD, n->name, h, 4, &n->attr, NULL);
    }
}

struct mix_push {
    uint32_t n, n_i, n_o, n_c; /* invocations; columns counted in items of 4 or 1 */
    uint32_t first, each;      /* row of the tensor, rows of a batch element */
    uint32_t batch, n_slot, row;
};

/* Whether the kernel is made for a matrix of ni inputs, which wants whole workgroups. */
static bool is_known(const ipt_launch *l, uint32_t ni, uint32_t invocations)
{
    return ni <= MAX_OUTPUTS && invocations % WG == 0 &&
           invocations / WG <= l->dev->max_group_count;
}

static ipt_status mix_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *x = &n->in_shape[0], *g = &n->in_shape[2];
    uint32_t ni = (uint32_t)x->dim[1], nc = (uint32_t)x->dim[2],
             no = (uint32_t)n->in_shape[1].dim[1], vec = nc % 4 == 0, items = vec ? nc / 4 : nc,
             gated = has_gates(n), blocks = (no + MAX_OUTPUTS - 1) / MAX_OUTPUTS,
             per = (no + blocks - 1) / blocks;
    const uint64_t line = (uint64_t)nc * ipt_dtype_bytes(x->dtype);
    const ipt_band_operand o[2] = {{IPT_SRC_IN, 0, false, ni * line},
                                   {IPT_SRC_OUT, 0, true, no * line}};
    for (ipt_bands b = ipt_launch_bands(l, (uint64_t)x->dim[0], o, 2); ipt_bands_next(&b);) {
        struct mix_push p = {.n = (uint32_t)b.n * items,
                             .n_i = ni,
                             .n_o = no,
                             .n_c = items,
                             .first = (uint32_t)b.first,
                             .each = (uint32_t)rows_each(n)};
        if (gated) {
            p.batch = (uint32_t)g->dim[1];
            p.n_slot = (uint32_t)g->dim[2];
            p.row = (uint32_t)n->attr.gate.row;
        }
        ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("mix", x->dtype), &p, sizeof p);
        ipt_launch_spec(d, vec);
        ipt_launch_spec(d, per);
        ipt_launch_spec(d, gated);
        ipt_launch_spec(d, blocks == 1 && is_known(l, ni, p.n) ? ni : 0);
        ipt_bands_bind(d, &b, 0);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 1, false);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, gated ? 2 : 1, false);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, gated ? 3 : 1, false);
        ipt_bands_bind(d, &b, 1);
        ipt_launch_linear(l, d, p.n, WG);
        if (d) {
            d->groups[2] = blocks;
            d->macs = (double)b.n * ni * no * nc;
        }
    }
    return l->status;
}

static const char *mix_infer(const ipt_node *n, ipt_shape out[])
{
    (void)out;
    if (n->in_shape[1].dtype != n->in_shape[0].dtype)
        return "p must have the type of x";
    if (!has_gates(n))
        return NULL;
    const ipt_shape *g = &n->in_shape[2];
    if (g->dtype != IPT_F32 || n->n_in < 4 || n->in_shape[3].dtype != IPT_I32)
        return "gates must be f32 and slots i32";
    if (n->attr.gate.row < 0 || n->attr.gate.row >= g->dim[0])
        return "no such gate row";
    return n->in_shape[0].dim[0] % g->dim[1] ? "rows are no multiple of the gates' batch" : NULL;
}

const ipt_op_def ipt_op_mix = {.name = "mix",
                               .sig = "x:ric p:io gates?:wns slot?:1 -> y:roc",
                               .infer = mix_infer,
                               .ref = mix_ref,
                               .grad = mix_grad,
                               .kernel = mix_kernel};

ipt_val ipt_mix(ipt_graph *g, ipt_val x, ipt_val p, ipt_val gates, ipt_val slot, int row)
{
    ipt_attr at = {.gate = {row}};
    return ipt_emit(g, IPT_OP_MIX, NULL, (ipt_val[]){x, p, gates, slot}, 4, &at, NULL);
}

/* --- swap: y[a,c,b,d] = x[a,b,c,d] ------------------------------------------------------------ */
static void swap_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const int32_t *s = n->in_shape[0].dim;
    size_t nb = (size_t)s[1], nc = (size_t)s[2], nd = (size_t)s[3];
    for (size_t i = 0; i < ipt_shape_count(&n->in_shape[0]); i++) {
        size_t d = i % nd, c = i / nd % nc, b = i / (nd * nc) % nb, a = i / (nd * nc * nb);
        out[0][((a * nc + c) * nb + b) * nd + d] = in[0][i];
    }
}

static void swap_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                      ipt_val dx[])
{
    (void)n, (void)want;
    dx[0] = ipt_swap(g, dy[0]);
}

struct swap_push {
    uint32_t n, n_b, n_c, n_d; /* invocations; the last axis counted in items of 4 or 1 */
};

static ipt_status swap_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *x = &n->in_shape[0];
    uint32_t d4 = (uint32_t)x->dim[3], vec = d4 % 4 == 0, items = vec ? d4 / 4 : d4;
    const uint64_t per = (uint64_t)x->dim[1] * (uint64_t)x->dim[2],
                   line = per * d4 * ipt_dtype_bytes(x->dtype);
    const ipt_band_operand o[2] = {{IPT_SRC_IN, 0, false, line}, {IPT_SRC_OUT, 0, true, line}};
    for (ipt_bands b = ipt_launch_bands(l, (uint64_t)x->dim[0], o, 2); ipt_bands_next(&b);) {
        struct swap_push p = {(uint32_t)(b.n * per * items), (uint32_t)x->dim[1],
                              (uint32_t)x->dim[2], items};
        ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("swap", x->dtype), &p, sizeof p);
        ipt_launch_spec(d, vec);
        ipt_bands_bind(d, &b, 0);
        ipt_bands_bind(d, &b, 1);
        ipt_launch_linear(l, d, p.n, WG);
    }
    return l->status;
}

const ipt_op_def ipt_op_swap = {.name = "swap",
                                .sig = "x:abcd -> y:acbd",
                                .ref = swap_ref,
                                .grad = swap_grad,
                                .kernel = swap_kernel};

ipt_val ipt_swap(ipt_graph *g, ipt_val x)
{
    return ipt_emit(g, IPT_OP_SWAP, NULL, &x, 1, NULL, NULL);
}
