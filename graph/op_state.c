/* graph/op_state.c - operators that change parameters in place: stores, sums, optimisers.
 * They have no results and no gradients (ADR 14). */
#include "graph/op.h"

#include <math.h>
#include <string.h>

enum { WG = 64 };

/* --- leaf = v, or zeros without v ------------------------------------------------------------- */
static bool has_source(const ipt_node *n) { return n->n_in > 1 && n->in[1]; }

static const char *store_infer(const ipt_node *n, ipt_shape out[])
{
    (void)out;
    return has_source(n) || n->in_shape[0].dtype == IPT_F32 ? NULL : "zeros are f32";
}

static void store_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    if (!has_source(n))
        memset(out[0], 0, ipt_shape_count(&n->in_shape[0]) * sizeof(double));
    else
        memcpy(out[0], in[1], ipt_shape_count(&n->in_shape[0]) * sizeof(double));
}

static ipt_status store_kernel(const ipt_node *n, ipt_launch *l)
{
    const bool copies = has_source(n);
    const ipt_dtype to = n->in_shape[0].dtype, from = copies ? n->in_shape[1].dtype : to;
    const char *shader = !copies         ? "clear"
                         : to == from    ? IPT_VARIANT("cast", to)
                         : to == IPT_F16 ? "cast.f32_f16"
                                         : "cast.f16_f32";
    const ipt_band_operand o[2] = {{IPT_SRC_IN, 0, true, ipt_dtype_bytes(to)},
                                   {IPT_SRC_IN, 1, false, ipt_dtype_bytes(from)}};
    for (ipt_bands b = ipt_launch_bands(l, ipt_shape_count(&n->in_shape[0]), o, copies ? 2 : 1);
         ipt_bands_next(&b);) {
        const uint32_t count = (uint32_t)b.n;
        ipt_dispatch *d = ipt_launch_add(l, shader, &count, sizeof count);
        if (copies)
            ipt_bands_bind(d, &b, 1);
        ipt_bands_bind(d, &b, 0);
        ipt_launch_linear(l, d, b.n, WG);
    }
    return l->status;
}

const ipt_op_def ipt_op_store = {.name = "store",
                                 .sig = "leaf:* v?:* ->",
                                 .writes = 1,
                                 .infer = store_infer,
                                 .ref = store_ref,
                                 .kernel = store_kernel};

void ipt_put(ipt_graph *g, ipt_val leaf, ipt_val v)
{
    ipt_emit(g, IPT_OP_STORE, NULL, (ipt_val[]){leaf, v}, 2, NULL, NULL);
}

/* --- leaf += v -------------------------------------------------------------------------------- */
static const char *accumulate_infer(const ipt_node *n, ipt_shape out[])
{
    (void)out;
    return n->in_shape[0].dtype == IPT_F32 && n->in_shape[1].dtype == IPT_F32 ? NULL
                                                                              : "sums are of f32";
}

static void accumulate_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    for (size_t i = 0; i < ipt_shape_count(&n->in_shape[0]); i++)
        out[0][i] += in[1][i];
}

static ipt_status accumulate_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_band_operand o[2] = {{IPT_SRC_IN, 0, true, 4}, {IPT_SRC_IN, 1, false, 4}};
    for (ipt_bands b = ipt_launch_bands(l, ipt_shape_count(&n->in_shape[0]), o, 2);
         ipt_bands_next(&b);) {
        const uint32_t count = (uint32_t)b.n;
        ipt_dispatch *d = ipt_launch_add(l, "accumulate", &count, sizeof count);
        ipt_bands_bind(d, &b, 0);
        ipt_bands_bind(d, &b, 1);
        ipt_launch_linear(l, d, b.n, WG);
    }
    return l->status;
}

const ipt_op_def ipt_op_accumulate = {.name = "accumulate",
                                      .sig = "leaf:* v:* ->",
                                      .writes = 1,
                                      .infer = accumulate_infer,
                                      .ref = accumulate_ref,
                                      .kernel = accumulate_kernel};

void ipt_accumulate(ipt_graph *g, ipt_val leaf, ipt_val v)
{
    v = ipt_cast(g, v, IPT_F32);
    ipt_emit(g, IPT_OP_ACCUMULATE, NULL, (ipt_val[]){leaf, v}, 2, NULL, NULL);
}

/* --- AdamW ------------------------------------------------------------------------------------ */
enum { W, D, M, V, HYPER };
enum { RATE, B1, B2, EPS, DECAY, UNBIAS_M, UNBIAS_V, FACTOR };

static const char *adamw_infer(const ipt_node *n, ipt_shape out[])
{
    (void)out;
    for (int i = 0; i < n->n_in; i++)
        if (n->in_shape[i].dtype != IPT_F32)
            return "all operands are f32";
    return NULL;
}

static void adamw_ref(const ipt_node *n, const double *const in[], double *const out[])
{
    const double *h = in[HYPER];
    double *w = out[0], *m = out[1], *v = out[2];
    for (size_t i = 0; i < ipt_shape_count(&n->in_shape[W]); i++) {
        const double d = in[D][i] * h[FACTOR];
        m[i] = h[B1] * m[i] + (1 - h[B1]) * d;
        v[i] = h[B2] * v[i] + (1 - h[B2]) * d * d;
        w[i] = w[i] * (1 - h[RATE] * h[DECAY]) -
               h[RATE] * h[UNBIAS_M] * m[i] / (sqrt(v[i]) * h[UNBIAS_V] + h[EPS]);
    }
}

static ipt_status adamw_kernel(const ipt_node *n, ipt_launch *l)
{
    const ipt_band_operand o[4] = {{IPT_SRC_IN, W, true, 4},
                                   {IPT_SRC_IN, D, false, 4},
                                   {IPT_SRC_IN, M, true, 4},
                                   {IPT_SRC_IN, V, true, 4}};
    for (ipt_bands b = ipt_launch_bands(l, ipt_shape_count(&n->in_shape[W]), o, 4);
         ipt_bands_next(&b);) {
        const uint32_t count = (uint32_t)b.n;
        ipt_dispatch *d = ipt_launch_add(l, "adamw", &count, sizeof count);
        for (int i = 0; i < 4; i++)
            ipt_bands_bind(d, &b, i);
        ipt_launch_bind(d, IPT_BIND_SSBO, IPT_SRC_IN, HYPER, false);
        ipt_launch_linear(l, d, b.n, WG);
    }
    return l->status;
}

const ipt_op_def ipt_op_adamw = {.name = "adamw",
                                 .sig = "w:* d:* m:* v:* hyper:8 ->",
                                 .writes = 1u << W | 1u << M | 1u << V,
                                 .infer = adamw_infer,
                                 .ref = adamw_ref,
                                 .kernel = adamw_kernel};

void ipt_adamw(ipt_graph *g, ipt_val w, ipt_val d, ipt_val m, ipt_val v, ipt_val hyper)
{
    ipt_emit(g, IPT_OP_ADAMW, NULL, (ipt_val[]){w, d, m, v, hyper}, 5, NULL, NULL);
}
