/* graph/adapter.c - adapters beside the weights: finds a module's name in the list of sites and
 * appends what acts there, gated.  Built of ordinary operators, so that gradients and host runs
 * come from the table. Must not know: which kind of file a part came from. */
#include "graph/internal.h"

#include <stdlib.h>
#include <string.h>

static int by_site(const void *a, const void *b)
{
    const ipt_adapter_site *x = a, *y = b;
    return strcmp(x->site, y->site);
}

/* The list's own copies of what a site points to; false when out of memory. */
static bool copy_site(ipt_graph *g, ipt_adapter_site *s)
{
    size_t n = s->n_kron * sizeof *s->kron;
    ipt_adapter_kron *kron = ipt_arena_alloc(&g->arena, n + 1);
    s->site = ipt_arena_strdup(&g->arena, s->site);
    if (kron && n)
        memcpy(kron, s->kron, n);
    s->kron = kron;
    return kron && s->site;
}

void ipt_graph_adapters(ipt_graph *g, const ipt_adapter_site *s, size_t n, int n_row, int n_batch,
                        int n_slot)
{
    if (g->status != IPT_OK || n == 0)
        return;
    g->site = ipt_arena_alloc(&g->arena, n * sizeof *s);
    for (size_t i = 0; g->site && i < n; i++) {
        g->site[i] = s[i];
        if (!copy_site(g, &g->site[i]))
            g->site = NULL;
    }
    if (!g->site) {
        g->status = IPT_ERR_NOMEM;
        return;
    }
    qsort(g->site, n, sizeof *g->site, by_site);
    g->n_site = n;
    g->gate_rows = n_row;
    g->gate_batch = n_batch;
    g->gate_slots = n_slot;
}

static const ipt_adapter_site *find_site(const ipt_graph *g, const char *site)
{
    char full[256];
    if (g->status != IPT_OK || g->n_site == 0)
        return NULL;
    ipt_name(full, sizeof full, "%s%s", g->prefix, site);
    ipt_adapter_site key = {.site = full};
    return bsearch(&key, g->site, g->n_site, sizeof key, by_site);
}

/* "<site>.<kind>" or "<site>.<kind><k><end>" (k >= 0) as a parameter. */
static ipt_val param(ipt_graph *g, const ipt_adapter_site *s, const char *kind, int k,
                     const char *end, ipt_shape shape)
{
    char name[320], number[16] = "";
    if (k >= 0)
        ipt_name(number, sizeof number, "%d", k);
    ipt_name(name, sizeof name, "%s.%s%s%s", s->site, kind, number, end);
    return ipt_leaf(g, IPT_PARAM, name, shape);
}

void ipt_graph_gates(ipt_graph *g, const char *name, bool placed)
{
    g->gates = name ? ipt_arena_strdup(&g->arena, name) : NULL;
    g->is_placed = placed;
    if (name && !g->gates)
        g->status = IPT_ERR_NOMEM;
}

static ipt_val gates_of(ipt_graph *g)
{
    return ipt_leaf(g, IPT_INPUT, g->gates ? g->gates : "gates",
                    ipt_shape3(IPT_F32, g->gate_rows, g->gate_batch, g->gate_slots));
}

/* Pixels or tokens of one batch element of v [N,..,C]. */
static int32_t places_in(const ipt_shape *v)
{
    int32_t t = 1;
    for (int i = 1; i + 1 < v->rank; i++)
        t *= v->dim[i];
    return t;
}

static ipt_val place_leaf(ipt_graph *g, int32_t batch, int32_t t)
{
    char name[32];
    ipt_name(name, sizeof name, "place%d", t);
    return ipt_leaf(g, IPT_INPUT, name, ipt_shape3(IPT_F32, 1, batch * t, g->gate_slots));
}

/* v [N,..,C], whose columns belong to slots (slot [R], R dividing C), times how much of each slot
 * there is at each place. */
static ipt_val placed(ipt_graph *g, ipt_val v, ipt_val slot)
{
    ipt_shape s = ipt_shape_of(g, v), of = ipt_shape_of(g, slot);
    if (!g->is_placed || s.rank < 2 || of.rank != 1)
        return v;
    int32_t t = places_in(&s), c = s.dim[s.rank - 1], r = of.dim[0];
    ipt_val p = place_leaf(g, s.dim[0], t);
    v = ipt_reshape(g, v, ipt_shape3(s.dtype, s.dim[0] * t, c / r, r));
    return ipt_reshape(g, ipt_gate_mul(g, v, p, slot, 0), s);
}

static bool has_kernel(const ipt_conv *c)
{
    return c && (c->kernel > 1 || c->stride > 1 || c->up_h > 0);
}

/* --- low rank --------------------------------------------------------------------------------- */
static ipt_val low_rank(ipt_graph *g, ipt_val x, int32_t out, const ipt_adapter_site *s,
                        const ipt_conv *conv, ipt_val *up)
{
    ipt_shape xs = ipt_shape_of(g, x);
    int32_t in = xs.dim[xs.rank - 1], batch = xs.dim[0], rank = s->n_rank;
    int32_t taps = conv ? conv->kernel * conv->kernel : 1;
    ipt_val a = param(g, s, "lora_a", -1, "", ipt_shape2(xs.dtype, taps * in, rank));
    *up = param(g, s, "lora_b", -1, "", ipt_shape2(xs.dtype, rank, out));
    ipt_val slot = param(g, s, "lora_slot", -1, "", ipt_shape1(IPT_I32, rank));
    ipt_val gates = gates_of(g);
    ipt_val h =
        has_kernel(conv) ? ipt_conv2d_leaf(g, x, a, *conv) : ipt_matmul(g, x, a, (ipt_val){0});
    ipt_shape hs = ipt_shape_of(g, h);
    if (hs.rank != 3) {
        int64_t t = 1;
        for (int i = 1; i < hs.rank - 1; i++)
            t *= hs.dim[i];
        h = ipt_reshape(g, h, ipt_shape3(hs.dtype, batch, (int32_t)t, rank));
        h = ipt_gate_mul(g, h, gates, slot, s->row);
        h = ipt_reshape(g, h, hs);
    } else {
        h = ipt_gate_mul(g, h, gates, slot, s->row);
    }
    return placed(g, h, slot);
}

/* --- dense and Kronecker ---------------------------------------------------------------------- */
/* x with the gate of one slot: cheaper on this side than on the result's, and the product that
 * follows adds to y in its epilogue. */
static ipt_val gated(ipt_graph *g, ipt_val x, const ipt_adapter_site *s, int k)
{
    ipt_shape xs = ipt_shape_of(g, x);
    int32_t in = xs.rank ? xs.dim[xs.rank - 1] : 1, per = in % 4 ? 1 : 4;
    ipt_val slot = param(g, s, "dense", k, "_slot", ipt_shape1(IPT_I32, per));
    size_t each = ipt_shape_count(&xs) / (size_t)xs.dim[0] / (size_t)per;
    ipt_val v = ipt_reshape(g, x, ipt_shape3(xs.dtype, xs.dim[0], (int32_t)each, per));
    v = ipt_reshape(g, ipt_gate_mul(g, v, gates_of(g), slot, s->row), xs);
    return placed(g, v, slot);
}

static ipt_val add_dense(ipt_graph *g, ipt_val x, ipt_val y, const ipt_adapter_site *s,
                         const ipt_conv *conv, int k)
{
    ipt_shape xs = ipt_shape_of(g, x), ys = ipt_shape_of(g, y);
    int32_t taps = conv ? conv->kernel * conv->kernel : 1;
    ipt_val v = gated(g, x, s, k);
    ipt_val d = param(g, s, "dense", k, "",
                      ipt_shape2(xs.dtype, taps * xs.dim[xs.rank - 1], ys.dim[ys.rank - 1]));
    if (!has_kernel(conv))
        return ipt_matmul(g, v, d, y);
    const ipt_attr attr = {.conv = *conv};
    ipt_val none = {0};
    return ipt_emit(g, IPT_OP_CONV2D, NULL, (ipt_val[]){v, d, none, none, y}, 5, &attr, NULL);
}

/* The leaves of one Kronecker part. */
typedef struct kron {
    const ipt_adapter_kron *d;
    ipt_val p, q, slot;
    int row;
} kron;

static ipt_val mix(ipt_graph *g, ipt_val v, int32_t rows, int32_t cols, const kron *k)
{
    ipt_shape s = ipt_shape3(ipt_shape_of(g, v).dtype, rows, k->d->i1, cols);
    return ipt_mix(g, ipt_reshape(g, v, s), k->p, gates_of(g), k->slot, k->row);
}

static kron kron_leaves(ipt_graph *g, const ipt_adapter_site *s, int i, ipt_dtype t, int32_t taps)
{
    const ipt_adapter_kron *d = &s->kron[i];
    return (kron){.d = d,
                  .p = param(g, s, "kron", i, "_p", ipt_shape2(t, d->i1, d->o1)),
                  .q = param(g, s, "kron", i, "_q", ipt_shape2(t, taps * d->i2, d->o2)),
                  .slot = param(g, s, "kron", i, "_slot", ipt_shape1(IPT_I32, 1)),
                  .row = s->row};
}

static bool mix_first(const ipt_adapter_kron *d)
{
    return (int64_t)d->i2 * d->o1 * (d->i1 + (int64_t)d->o2) <
           (int64_t)d->i1 * d->o2 * (d->i2 + (int64_t)d->o1);
}

/* Whether a linear adds the first Kronecker part in its own product: P goes first, the products
 * with Q are groups of the side path, which has room when there is no low-rank part. */
static bool kron_is_side(const ipt_adapter_site *s)
{
    const ipt_adapter_kron *d = s->kron;
    return s->n_rank == 0 && s->n_kron > 0 && mix_first(d) && !d->is_shuffled && d->i2 % 4 == 0 &&
           d->o2 % 4 == 0;
}

/* y += g (P kron Q) v for a plain product: v [R,I1,I2] -> Q -> P from the left -> y in one
 * operator, or first P, where that costs fewer multiply-adds. */
static ipt_val kron_plain(ipt_graph *g, ipt_val v, ipt_val y, const kron *k)
{
    const ipt_adapter_kron *d = k->d;
    ipt_shape ys = ipt_shape_of(g, y);
    int32_t rows = (int32_t)(ipt_shape_count(&ys) / ((size_t)d->o1 * (size_t)d->o2));
    ipt_dtype t = ys.dtype;
    if (!mix_first(d)) {
        const ipt_kron_factors f = {k->p, k->q, gates_of(g), k->slot, k->row, d->is_shuffled};
        ipt_shape to =
            d->is_shuffled ? ipt_shape3(t, rows, d->o2, d->o1) : ipt_shape3(t, rows, d->o1, d->o2);
        v = ipt_reshape(g, v, ipt_shape3(t, rows, d->i1, d->i2));
        return ipt_reshape(g, ipt_kron(g, v, &f, ipt_reshape(g, y, to)), ys);
    }
    v = mix(g, v, rows, d->i2, k);
    if (!d->is_shuffled) {
        ipt_val r = ipt_reshape(g, y, ipt_shape3(t, rows, d->o1, d->o2));
        return ipt_reshape(g, ipt_matmul(g, v, k->q, r), ys);
    }
    v = ipt_matmul(g, v, k->q, (ipt_val){0});
    v = ipt_swap(g, ipt_reshape(g, v, ipt_shape4(t, rows, d->o1, d->o2, 1)));
    return ipt_add(g, y, ipt_reshape(g, v, ys));
}

/* The same for a convolution: the O1 groups become pictures of the batch for Q's kernel. */
static ipt_val kron_conv(ipt_graph *g, ipt_val v, ipt_val y, const kron *k, const ipt_conv *conv)
{
    const ipt_adapter_kron *d = k->d;
    ipt_shape xs = ipt_shape_of(g, v), ys = ipt_shape_of(g, y);
    ipt_dtype t = ys.dtype;
    int32_t n = xs.dim[0], pixels = xs.dim[1] * xs.dim[2], result = ys.dim[1] * ys.dim[2];
    v = mix(g, v, n * pixels, d->i2, k);
    v = ipt_swap(g, ipt_reshape(g, v, ipt_shape4(t, n, pixels, d->o1, d->i2)));
    v = ipt_reshape(g, v, ipt_shape4(t, n * d->o1, xs.dim[1], xs.dim[2], d->i2));
    v = ipt_conv2d_leaf(g, v, k->q, *conv);
    v = ipt_swap(g, ipt_reshape(g, v, ipt_shape4(t, n, d->o1, result, d->o2)));
    return ipt_add(g, y, ipt_reshape(g, v, ys));
}

static ipt_val add_kron(ipt_graph *g, ipt_val x, ipt_val y, const ipt_adapter_site *s,
                        const ipt_conv *conv, int i)
{
    int32_t taps = conv ? conv->kernel * conv->kernel : 1;
    const kron k = kron_leaves(g, s, i, ipt_shape_of(g, x).dtype, taps);
    x = placed(g, x, k.slot);
    return has_kernel(conv) ? kron_conv(g, x, y, &k, conv) : kron_plain(g, x, y, &k);
}

ipt_val ipt_adapter_hidden(ipt_graph *g, ipt_val x, int32_t out, const char *site, ipt_val *up)
{
    const ipt_adapter_site *s = find_site(g, site);
    if (!s)
        return (ipt_val){0};
    if (s->n_rank > 0)
        return low_rank(g, x, out, s, NULL, up);
    if (!kron_is_side(s))
        return (ipt_val){0};
    ipt_shape to = ipt_shape_of(g, x);
    const kron k = kron_leaves(g, s, 0, to.dtype, 1);
    int32_t rows = (int32_t)(ipt_shape_count(&to) / (size_t)to.dim[to.rank - 1]);
    to.dim[to.rank - 1] = k.d->o1 * k.d->i2;
    *up = k.q;
    return ipt_reshape(g, mix(g, placed(g, x, k.slot), rows, k.d->i2, &k), to);
}

/* --- vectors ---------------------------------------------------------------------------------- */
/* sum_s gates[row][n][s] place[n][t][s] delta[s] in the shape of y. */
static ipt_val placed_vector(ipt_graph *g, int row, ipt_val delta, const ipt_shape *y)
{
    int32_t n = g->gate_batch, slots = g->gate_slots, t = places_in(y);
    ipt_val one = ipt_reshape(g, gates_of(g), ipt_shape2(IPT_F32, 1, g->gate_rows * n * slots));
    if (g->gate_rows > 1)
        one = ipt_slice(g, one, row * n * slots, n * slots);
    one = ipt_reshape(g, one, ipt_shape3(IPT_F32, n, 1, slots));
    ipt_val p = ipt_reshape(g, place_leaf(g, n, t), ipt_shape3(IPT_F32, n, t, slots));
    p = ipt_reshape(g, ipt_mul(g, p, one), ipt_shape2(IPT_F32, n * t, slots));
    ipt_shape to = *y;
    to.dtype = IPT_F32;
    return ipt_cast(g, ipt_reshape(g, ipt_matmul(g, p, delta, (ipt_val){0}), to), y->dtype);
}

/* sum_s gates[row][n][s] delta[s] as [N,1,..,1,C], broadcast over y's pixels or tokens.  All rows
 * of the gates go through one small product; its row is cut out. */
static ipt_val gated_vector(ipt_graph *g, const ipt_adapter_site *s, const char *kind,
                            const ipt_shape *y)
{
    int32_t c = y->dim[y->rank - 1], n = g->gate_batch, rows = g->gate_rows;
    ipt_val d = param(g, s, kind, -1, "", ipt_shape2(IPT_F32, g->gate_slots, c));
    if (g->is_placed)
        return placed_vector(g, s->row, d, y);
    ipt_val all = ipt_reshape(g, gates_of(g), ipt_shape2(IPT_F32, rows * n, g->gate_slots));
    all = ipt_matmul(g, all, d, (ipt_val){0});
    if (rows > 1)
        all = ipt_slice(g, ipt_reshape(g, all, ipt_shape2(IPT_F32, 1, rows * n * c)),
                        s->row * n * c, n * c);
    ipt_shape to = *y;
    to.dtype = IPT_F32;
    for (int i = 1; i + 1 < to.rank; i++)
        to.dim[i] = 1;
    return ipt_cast(g, ipt_reshape(g, all, to), y->dtype);
}

ipt_val ipt_adapter_path(ipt_graph *g, ipt_val x, ipt_val y, const char *site, const ipt_conv *conv)
{
    const ipt_adapter_site *s = find_site(g, site);
    ipt_shape ys = ipt_shape_of(g, y);
    if (!s || ys.rank == 0)
        return y;
    if (conv && s->n_rank > 0) { /* a linear operator has added it itself */
        ipt_val up = {0}, h = low_rank(g, x, ys.dim[ys.rank - 1], s, conv, &up);
        y = ipt_matmul(g, h, up, y);
    }
    for (int k = !conv && kron_is_side(s); k < s->n_kron; k++)
        y = add_kron(g, x, y, s, conv, k);
    for (int k = 0; k < s->n_dense; k++)
        y = add_dense(g, x, y, s, conv, k);
    if (s->has_bias)
        y = ipt_add(g, y, gated_vector(g, s, "bias_delta", &ys));
    return y;
}

bool ipt_adapter_norm_operands(ipt_graph *g, const char *site, int32_t c, ipt_val one_zero[2])
{
    const ipt_adapter_site *s = find_site(g, site);
    if (s && s->has_norm) {
        one_zero[0] = param(g, s, "norm_one", -1, "", ipt_shape1(IPT_F32, c));
        one_zero[1] = param(g, s, "norm_zero", -1, "", ipt_shape1(IPT_F32, c));
    }
    return s != NULL;
}

ipt_val ipt_adapter_norm_path(ipt_graph *g, const char *site, ipt_val y, ipt_val normed)
{
    const ipt_adapter_site *s = find_site(g, site);
    ipt_shape ys = ipt_shape_of(g, y);
    if (!s || ys.rank == 0)
        return y;
    if (s->has_norm)
        y = ipt_add(g, y, ipt_mul(g, normed, gated_vector(g, s, "norm_delta", &ys)));
    return s->has_bias ? ipt_add(g, y, gated_vector(g, s, "bias_delta", &ys)) : y;
}
