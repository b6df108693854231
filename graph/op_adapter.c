/* graph/op_adapter.c - the gate of the adapters' side path: y[n,t,r] = h[n,t,r]
 * gates[row,n,slot[r]]. Which adapter acts on which batch element at this step is data, never a
 * change of commands. */
#include "graph/op.h"

#include <string.h>

enum { WG = 64 };

static const char *gate_infer(const ipt_node *n, ipt_shape out[])
{
    (void)out;
    if (n->in_shape[2].dtype != IPT_I32 || n->in_shape[1].dtype != IPT_F32)
        return "gates must be f32 and slots i32";
    return n->attr.gate.row < 0 || n->attr.gate.row >= n->in_shape[1].dim[0] ? "no such gate row"
                                                                             : NULL;
}

/* Index of the gate of (batch element, rank column), or -1 for a padding column. */
static int64_t gate_at(const ipt_node *n, const ipt_shape *gates, const double *slot, size_t b,
                       size_t r)
{
    int64_t s = (int64_t)slot[r];
    if (s < 0 || s >= gates->dim[2])
        return -1;
    return ((int64_t)n->attr.gate.row * gates->dim[1] + (int64_t)b) * gates->dim[2] + s;
}

static void gate_mul_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_shape *h = &n->in_shape[0];
    size_t t = (size_t)h->dim[1], r = (size_t)h->dim[2];
    for (size_t b = 0; b < (size_t)h->dim[0]; b++)
        for (size_t i = 0; i < t; i++)
            for (size_t k = 0; k < r; k++) {
                int64_t at = gate_at(n, &n->in_shape[1], in[2], b, k);
                size_t e = (b * t + i) * r + k;
                out[0][e] = at < 0 ? 0.0 : in[0][e] * in[1][at];
            }
}

static void gate_mul_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                          ipt_val dx[])
{
    if (want & 1)
        dx[0] = ipt_gate_mul(g, dy[0], ipt_in(n, 1), ipt_in(n, 2), n->attr.gate.row);
    if (want & 2) {
        ipt_val in[4] = {ipt_in(n, 0), dy[0], ipt_in(n, 1), ipt_in(n, 2)};
        dx[1] = ipt_emit(g, IPT_OP_GATE_GRAD, n->name, in, 4, &n->attr, NULL);
    }
}

struct gate_push {
    uint32_t n, t, r, batch, n_slot, row, n_row;
    uint32_t first, count, add; /* tokens of this dispatch; add to what is there (gate_grad) */
};

static struct gate_push gate_push(const ipt_node *n, const ipt_shape *h, const ipt_shape *gates)
{
    return (struct gate_push){(uint32_t)ipt_shape_count(&n->out_shape[0]),
                              (uint32_t)h->dim[1],
                              (uint32_t)h->dim[2],
                              (uint32_t)gates->dim[1],
                              (uint32_t)gates->dim[2],
                              (uint32_t)n->attr.gate.row,
                              (uint32_t)gates->dim[0],
                              0,
                              0,
                              0};
}

static ipt_status gate_mul_kernel(const ipt_node *n, ipt_launch *l)
{
    struct gate_push p = gate_push(n, &n->in_shape[0], &n->in_shape[1]);
    const uint64_t line = p.r * ipt_dtype_bytes(n->in_shape[0].dtype);
    const uint32_t vec = p.r % 4 == 0;
    const ipt_band_operand o[2] = {{IPT_SRC_IN, 0, false, line}, {IPT_SRC_OUT, 0, true, line}};
    for (ipt_bands b = ipt_launch_bands(l, ipt_shape_count(&n->out_shape[0]) / p.r, o, 2);
         ipt_bands_next(&b);) {
        p.n = (uint32_t)(b.n * p.r);
        p.first = (uint32_t)b.first;
        ipt_dispatch *d =
            ipt_launch_add(l, IPT_VARIANT("gate_mul", n->in_shape[0].dtype), &p, sizeof p);
        ipt_launch_spec(d, vec);
        ipt_bands_bind(d, &b, 0);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 1, false);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 2, false);
        ipt_bands_bind(d, &b, 1);
        ipt_launch_linear(l, d, vec ? p.n / 4 : p.n, WG);
    }
    return l->status;
}

const ipt_op_def ipt_op_gate_mul = {.name = "gate_mul",
                                    .sig = "h:ntr gates:wns slot:r -> y:ntr",
                                    .alias = 1,
                                    .infer = gate_infer,
                                    .ref = gate_mul_ref,
                                    .grad = gate_mul_grad,
                                    .kernel = gate_mul_kernel};

ipt_val ipt_gate_mul(ipt_graph *g, ipt_val h, ipt_val gates, ipt_val slot, int row)
{
    ipt_attr at = {.gate = {.row = row}};
    ipt_val in[3] = {h, gates, slot};
    return ipt_emit(g, IPT_OP_GATE_MUL, NULL, in, 3, &at, NULL);
}

/* dgates[row,n,s] = sum over t and the columns r of slot s of h dy; other rows are 0. */
static const char *gate_grad_infer(const ipt_node *n, ipt_shape out[])
{
    out[0] = n->in_shape[2];
    return NULL;
}

static void gate_grad_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_shape *h = &n->in_shape[0];
    size_t t = (size_t)h->dim[1], r = (size_t)h->dim[2];
    memset(out[0], 0, ipt_shape_count(&n->out_shape[0]) * sizeof(double));
    for (size_t b = 0; b < (size_t)h->dim[0]; b++)
        for (size_t i = 0; i < t; i++)
            for (size_t k = 0; k < r; k++) {
                int64_t at = gate_at(n, &n->in_shape[2], in[3], b, k);
                size_t e = (b * t + i) * r + k;
                if (at >= 0)
                    out[0][at] += in[0][e] * in[1][e];
            }
}

static ipt_status gate_grad_kernel(const ipt_node *n, ipt_launch *l)
{
    struct gate_push p = gate_push(n, &n->in_shape[0], &n->in_shape[2]);
    const uint64_t line = p.r * ipt_dtype_bytes(n->in_shape[0].dtype);
    const ipt_band_operand o[2] = {{IPT_SRC_IN, 0, false, line}, {IPT_SRC_IN, 1, false, line}};
    for (ipt_bands b = ipt_launch_bands(l, ipt_shape_count(&n->in_shape[0]) / p.r, o, 2);
         ipt_bands_next(&b);) {
        p.first = (uint32_t)b.first;
        p.count = (uint32_t)b.n;
        p.add = b.first > 0;
        ipt_dispatch *d =
            ipt_launch_add(l, IPT_VARIANT("gate_grad", n->in_shape[0].dtype), &p, sizeof p);
        ipt_bands_bind(d, &b, 0);
        ipt_bands_bind(d, &b, 1);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 3, false);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_OUT, 0, true);
        ipt_launch_linear(l, d, p.n, WG);
        if (d)
            d->no_wait = false; /* a band adds to the one before */
    }
    return l->status;
}

const ipt_op_def ipt_op_gate_grad = {.name = "gate_grad",
                                     .sig = "h:ntr dy:ntr gates:wns slot:r -> dgates:wns",
                                     .infer = gate_grad_infer,
                                     .ref = gate_grad_ref,
                                     .kernel = gate_grad_kernel};
