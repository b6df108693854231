/* graph/op_share.c - sums by place: y[n,t,c] = share[t] b[n,t,c] + a[n,t,c].  What several texts
 * say of one picture, each where it has something to say. */
#include "graph/op.h"

enum { WG = 64 };

static bool has_a(const ipt_node *n) { return n->n_in > 2 && n->in_shape[2].rank > 0; }

static const char *share_infer(const ipt_node *n, ipt_shape out[])
{
    (void)out;
    if (n->in_shape[1].dtype != IPT_F32)
        return "shares must be f32";
    return has_a(n) && n->in_shape[2].dtype != n->in_shape[0].dtype ? "operands differ in type"
                                                                    : NULL;
}

static void share_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const ipt_shape *b = &n->in_shape[0];
    size_t t = (size_t)b->dim[1], c = (size_t)b->dim[2];
    for (size_t i = 0; i < ipt_shape_count(b); i++)
        out[0][i] = in[1][i / c % t] * in[0][i] + (has_a(n) ? in[2][i] : 0);
}

static void share_grad(ipt_graph *g, const ipt_node *n, const ipt_val dy[], uint32_t want,
                       ipt_val dx[])
{
    const ipt_shape *b = &n->in_shape[0];
    if (want & 1)
        dx[0] = ipt_share(g, dy[0], ipt_in(n, 1), (ipt_val){0});
    if (want & 2) {
        ipt_val sum =
            ipt_sum_to(g, ipt_mul(g, dy[0], ipt_in(n, 0)), ipt_shape3(IPT_F32, 1, b->dim[1], 1));
        dx[1] = ipt_reshape(g, sum, n->in_shape[1]);
    }
    if (want & 4)
        dx[2] = dy[0];
}

struct share_push {
    uint32_t n, c, t, first; /* items of 4 or 1; of a place; places; the binding's first */
};

static ipt_status share_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_shape *b = &n->in_shape[0];
    const uint32_t c = (uint32_t)b->dim[2], vec = c % 4 == 0, items = vec ? c / 4 : c;
    const uint64_t line = c * ipt_dtype_bytes(b->dtype);
    const ipt_band_operand o[3] = {{IPT_SRC_IN, 0, false, line},
                                   {IPT_SRC_IN, has_a(n) ? 2 : 0, false, line},
                                   {IPT_SRC_OUT, 0, true, line}};
    for (ipt_bands band = ipt_launch_bands(l, ipt_shape_count(b) / c, o, 3);
         ipt_bands_next(&band);) {
        const struct share_push push = {(uint32_t)(band.n * items), items, (uint32_t)b->dim[1],
                                        (uint32_t)band.first};
        ipt_dispatch *d = ipt_launch_add(l, IPT_VARIANT("share", b->dtype), &push, sizeof push);
        ipt_launch_spec(d, vec);
        ipt_launch_spec(d, has_a(n));
        ipt_bands_bind(d, &band, 0);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, 1, false);
        ipt_bands_bind(d, &band, 1);
        ipt_bands_bind(d, &band, 2);
        ipt_launch_linear(l, d, push.n, WG);
    }
    return l->status;
}

const ipt_op_def ipt_op_share = {.name = "share",
                                 .sig = "b:ntc share:t a?:ntc -> y:ntc",
                                 .alias = 5,
                                 .infer = share_infer,
                                 .ref = share_ref,
                                 .grad = share_grad,
                                 .kernel = share_kernel};

ipt_val ipt_share(ipt_graph *g, ipt_val b, ipt_val share, ipt_val a)
{
    return ipt_emit(g, IPT_OP_SHARE, NULL, (ipt_val[]){b, share, a}, 3, NULL, NULL);
}
