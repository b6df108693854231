/* graph/attention.c - what the attention operators share. */
#include "graph/attention.h"

#include <math.h>

bool ipt_attn_dividing(const ipt_node *n, int32_t c)
{
    return n->attr.attn.heads >= 1 && c % n->attr.attn.heads == 0;
}

const char *ipt_attn_same_types(const ipt_node *n, int n_act)
{
    for (int i = 0; i < n_act; i++)
        if (n->in_shape[i].dtype != n->in_shape[0].dtype || n->in_shape[i].dtype == IPT_I32)
            return "operands differ in type";
    return NULL;
}

const char *ipt_attn_check_query(const ipt_node *n)
{
    const ipt_shape *q = &n->in_shape[0], *k = &n->in_shape[1];
    if (!ipt_attn_dividing(n, q->dim[2]))
        return "channels are not a multiple of the heads";
    if (n->attr.attn.causal && q->dim[1] != k->dim[1])
        return "causal attention needs as many keys as queries";
    if (!(fabsf(n->attr.attn.scale) > 0) || isinf(n->attr.attn.scale))
        return "scale must be finite and not 0";
    return NULL;
}

ipt_attn_geo ipt_attn_geo_of(const ipt_node *n, const ipt_launch *l, const ipt_shape *q,
                             const ipt_shape *k)
{
    ipt_attn_geo g = {.n = (uint32_t)k->dim[0],
                      .t = (uint32_t)q->dim[1],
                      .s = (uint32_t)k->dim[1],
                      .c = (uint32_t)k->dim[2],
                      .heads = (uint32_t)n->attr.attn.heads,
                      .dtype = k->dtype,
                      .scale = n->attr.attn.scale,
                      .causal = n->attr.attn.causal != 0};
    g.d = g.c / g.heads;
    g.elt = ipt_dtype_bytes(k->dtype);
    if (l) {
        uint64_t rows = g.t > g.s ? g.t : g.s, stat = (uint64_t)g.n * g.heads * g.t * 4;
        g.whole = g.n * rows * g.c * g.elt <= l->dev->max_range && stat <= l->dev->max_range;
    }
    return g;
}

bool ipt_attn_fits(const ipt_attn_geo *g, const ipt_launch *l)
{
    uint64_t rows = g->t > g->s ? g->t : g->s, limit = l->dev->max_group_count;
    uint64_t one = rows * g->c * g->elt + l->dev->align;
    return (uint64_t)g->n * rows * g->c <= UINT32_MAX && (g->whole || one <= l->dev->max_range) &&
           (uint64_t)g->heads * 32 <= limit && g->n <= limit && rows / 8 + 1 <= limit &&
           (uint64_t)g->n * g->heads * g->t * 4 <= l->dev->max_range;
}

ipt_attn_ref ipt_attn_ref_geo(const ipt_node *n, const ipt_shape *q, const ipt_shape *k)
{
    ipt_attn_ref g = {(size_t)k->dim[0],
                      (size_t)q->dim[1],
                      (size_t)k->dim[1],
                      (size_t)n->attr.attn.heads,
                      (size_t)(k->dim[2] / n->attr.attn.heads),
                      (size_t)k->dim[2],
                      (double)n->attr.attn.scale,
                      n->attr.attn.causal != 0};
    return g;
}

double ipt_attn_dot(const double *a, const double *b, size_t d)
{
    double sum = 0;
    for (size_t c = 0; c < d; c++)
        sum += a[c] * b[c];
    return sum;
}

void ipt_attn_axpy(double *dst, double a, const double *x, size_t d)
{
    for (size_t c = 0; c < d; c++)
        dst[c] += a * x[c];
}

const double *ipt_attn_row(const ipt_attn_ref *g, const double *x, size_t rows, size_t n, size_t h,
                           size_t i)
{
    return x + (n * rows + i) * g->c + h * g->d;
}

double ipt_attn_score(const ipt_attn_ref *g, const double *q, const double *k, size_t n, size_t h,
                      size_t i, size_t j)
{
    return g->scale *
           ipt_attn_dot(ipt_attn_row(g, q, g->t, n, h, i), ipt_attn_row(g, k, g->s, n, h, j), g->d);
}

double ipt_attn_log_sum(const ipt_attn_ref *g, const double *q, const double *k, size_t n, size_t h,
                        size_t i)
{
    size_t lim = g->causal ? i + 1 : g->s;
    double top = -HUGE_VAL, sum = 0;
    for (size_t j = 0; j < lim; j++)
        top = fmax(top, ipt_attn_score(g, q, k, n, h, i, j));
    for (size_t j = 0; j < lim; j++)
        sum += exp(ipt_attn_score(g, q, k, n, h, i, j) - top);
    return top + log(sum);
}

uint32_t ipt_attn_below(const ipt_launch *l, uint64_t first, uint64_t elt)
{
    return (uint32_t)(first * elt / l->dev->align * l->dev->align / elt);
}

void ipt_attn_groups(ipt_dispatch *d, uint32_t x, uint32_t y, uint32_t z)
{
    if (d) {
        d->groups[0] = x;
        d->groups[1] = y;
        d->groups[2] = z;
    }
}

ipt_attn_matrix ipt_attn_heads(const ipt_attn_geo *g, ipt_src src, int index, uint32_t rows,
                               uint32_t row0)
{
    return (ipt_attn_matrix){
        src, index, (uint64_t)rows * g->c, {row0 * g->c, rows * g->c, g->d, g->c, 1}};
}

ipt_attn_matrix ipt_attn_probs(const ipt_attn_geo *g, ipt_src src, int index, uint32_t row0)
{
    const uint32_t one = g->t * g->s;
    return (ipt_attn_matrix){
        src, index, (uint64_t)one * g->heads, {row0 * g->s, one * g->heads, one, g->s, 1}};
}

ipt_attn_matrix ipt_attn_scratch(const ipt_attn_geo *g, int index, const ipt_attn_pairs *p,
                                 uint32_t rows, uint32_t cols)
{
    const uint32_t one = rows * cols;
    return (ipt_attn_matrix){
        IPT_SRC_SCRATCH, index, 0, {0u - p->first * one, one * g->heads, one, cols, 1}};
}

ipt_attn_matrix ipt_attn_transposed(ipt_attn_matrix m)
{
    const uint32_t s = m.at.s0;
    m.at.s0 = m.at.s1;
    m.at.s1 = s;
    return m;
}

/* What of the matrix a dispatch over these pairs reaches. */
static uint64_t first_of(const ipt_attn_geo *g, const ipt_attn_matrix *m, const ipt_attn_pairs *p)
{
    return p->first / g->heads * m->batch;
}

static void bind_matrix(const ipt_attn_geo *g, ipt_launch *l, ipt_dispatch *d,
                        const ipt_attn_matrix *m, const ipt_attn_pairs *p, bool write)
{
    uint64_t first = first_of(g, m, p), last = (p->first + p->count - 1) / g->heads + 1;
    if (m->batch == 0)
        ipt_launch_bind(d, IPT_BIND_SSBO, m->src, m->index, write);
    else
        ipt_launch_bind_part(l, d,
                             &(ipt_bind){IPT_BIND_SSBO, m->src, (uint8_t)(m->index), write,
                                         first * g->elt, (last * m->batch - first) * g->elt});
}

static bool has_subgroups(const ipt_launch *l)
{
    return l->dev->simd && l->dev->subgroup_shuffle && l->dev->subgroup <= 16;
}

/* The shader for f16 activations stored as `types`, or for f32. */
static const char *mm_shader(const ipt_attn_geo *g, const ipt_launch *l, ipt_attn_types types)
{
    static const char *const name[][2] = {
        [IPT_ATTN_HHF] = {"attention_mm.hhf", "attention_mm_any.hhf"},
        [IPT_ATTN_HHH] = {"attention_mm.hhh", "attention_mm_any.hhh"},
        [IPT_ATTN_FHH] = {"attention_mm.fhh", "attention_mm_any.fhh"},
    };
    return g->dtype == IPT_F16 ? name[types][has_subgroups(l)]
           : has_subgroups(l)  ? "attention_mm_any.f32"
                               : "attention_mm.f32";
}

/* NOLINTNEXTLINE(readability-function-size): extents, factor and the three operands of a product */
void ipt_attn_mm(const ipt_attn_geo *g, ipt_launch *l, ipt_attn_types types,
                 const ipt_attn_pairs *p, const uint32_t mnk[3], float alpha, ipt_attn_matrix a,
                 ipt_attn_matrix b, ipt_attn_matrix c)
{
    struct {
        uint32_t m, n, k, heads, pair0;
        float alpha;
        ipt_attn_operand at[3];
    } push = {mnk[0], mnk[1], mnk[2], g->heads, p->first, alpha, {a.at, b.at, c.at}};
    const ipt_attn_matrix *all[3] = {&a, &b, &c};
    for (int i = 0; i < 3; i++)
        if (all[i]->batch)
            push.at[i].off -= ipt_attn_below(l, first_of(g, all[i], p), g->elt);
    ipt_dispatch *d = ipt_launch_add(l, mm_shader(g, l, types), &push, sizeof push);
    for (int i = 0; i < 3; i++)
        bind_matrix(g, l, d, all[i], p, i == 2);
    if (d && has_subgroups(l)) {
        const uint32_t sg = l->dev->subgroup;
        ipt_launch_spec(d, sg);
        d->k.subgroup = sg;
        ipt_attn_groups(d, ipt_attn_div_up(mnk[1], 2 * sg), ipt_attn_div_up(mnk[0], 2 * sg),
                        p->count);
    } else {
        ipt_attn_groups(d, ipt_attn_div_up(mnk[1], IPT_ATTN_TILE),
                        ipt_attn_div_up(mnk[0], IPT_ATTN_TILE), p->count);
    }
    if (d)
        d->macs = (double)mnk[0] * mnk[1] * mnk[2] * p->count;
}

uint32_t ipt_attn_plan(const ipt_attn_geo *g, const ipt_launch *l, uint32_t extent, uint32_t other,
                       ipt_attn_pairs *p)
{
    uint64_t limit =
        (IPT_ATTN_SCRATCH < l->dev->max_range ? IPT_ATTN_SCRATCH : l->dev->max_range) / 4;
    uint64_t one = (uint64_t)extent * other;
    p->first = 0;
    p->count = 1;
    if (one > limit)
        return (uint32_t)(limit / other);
    uint64_t fit = limit / one, all = (uint64_t)g->n * g->heads;
    if (fit > all)
        fit = all;
    if (fit > l->dev->max_group_count)
        fit = l->dev->max_group_count;
    if (!g->whole && fit > 1) /* inside one batch element: a divisor of the heads */
        for (fit = fit < g->heads ? fit : g->heads; g->heads % fit; fit--)
            ;
    p->count = (uint32_t)fit;
    return extent;
}

bool ipt_attn_next(const ipt_attn_geo *g, ipt_attn_pairs *p, uint32_t count)
{
    p->first += p->count;
    uint32_t left = p->first < g->n * g->heads ? g->n * g->heads - p->first : 0;
    p->count = left < count ? left : count;
    return left > 0;
}
