/* model_io/adapter_convert.c - adapters in other names, kinds and ranks.
 *
 * Sources: LyCORIS (factorization, lokr.py: what its loader takes), DiffuseKronA (krona.py),
 * kohya-ss/sd-scripts (networks/resize_lora.py), Van Loan and Pitsianis 1993 (nearest Kronecker
 * product: the largest singular pair of the rearranged matrix). */
#include <math.h>
#include <string.h>

#include "model_io/adapter_tools.h"
#include "model_io/kinds.h"

static ipt_status refuse(ipt_tool *t, const ipt_adapter_module *a, ipt_status s, const char *why)
{
    const ipt_module *m = &t->module[a->module];
    return ipt_fail(t->ctx, s, "%s.%s: found %s, %s", ipt_comp_name(m->comp), m->name,
                    ipt_adapter_kind_name(a), why);
}

/* --- kinds that stay -------------------------------------------------------------------------- */
/* What LyCORIS' readers would take for alpha / rank: alpha in f32. */
static ipt_status put_scale(ipt_tool *t, const ipt_adapter_module *a)
{
    double alpha = a->rank > 0 ? a->scale * a->rank : 1;
    ipt_out_values v = {.value = &alpha, .dtype = IPT_ST_F32};
    double plain = a->rank > 0 ? (double)a->alpha / a->rank : 1;
    if (plain >= a->scale && plain <= a->scale)
        alpha = a->rank > 0 ? (double)a->alpha : 1;
    return a->kind->is_scaled ? ipt_adapter_out_tensor(t->out, a->module, ".alpha", &v) : IPT_OK;
}

static ipt_status put_dora(ipt_tool *t, const ipt_adapter_module *a)
{
    ipt_out_values v = {.same = a->magnitude};
    if (!a->magnitude)
        return IPT_OK;
    if (!a->is_by_input) {
        v.rank = (uint8_t)ipt_tool_axes(t, a);
        v.dim[0] = a->out;
        v.dim[1] = v.dim[2] = v.dim[3] = 1;
    }
    return ipt_adapter_out_tensor(t->out, a->module, ".dora_scale", &v);
}

/* Every tensor under its own ending.  LyCORIS multiplies nothing where both factors of LoKr are
 * whole; PEFT does, so that its scale goes into the first. */
static ipt_status put_parts(ipt_tool *t, const ipt_adapter_module *a)
{
    bool fold = a->kind->is_scaled && a->rank == 0 && !(a->scale >= 1 && a->scale <= 1);
    for (int i = 0; i < IPT_ADAPTER_PARTS; i++) {
        ipt_out_values v = {.same = a->part[i]};
        if (!a->part[i])
            continue;
        if (!fold || i > 0 || a->part[i]->rank > 4) {
            IPT_TRY(ipt_adapter_out_tensor(t->out, a->module, a->kind->key[i], &v));
            continue;
        }
        size_t n = a->part[i]->count;
        double *scaled = ipt_calloc(t->ctx, n, sizeof *scaled);
        if (!scaled)
            return IPT_ERR_NOMEM;
        for (size_t k = 0; k < n; k++)
            scaled[k] = a->scale * (double)ipt_st_get(a->part[i], k);
        v = (ipt_out_values){
            .value = scaled, .dtype = ipt_tool_dtype(t, a), .rank = a->part[i]->rank};
        memcpy(v.dim, a->part[i]->dim, sizeof v.dim);
        ipt_status s = ipt_adapter_out_tensor(t->out, a->module, a->kind->key[i], &v);
        ipt_free(scaled);
        IPT_TRY(s);
    }
    IPT_TRY(put_scale(t, a));
    IPT_TRY(put_dora(t, a));
    ipt_tool_note(t, a->module, 0, 0, 0, t->dtype == IPT_ST_COUNT && !fold);
    return IPT_OK;
}

static ipt_status put_same(ipt_tool *t, ipt_adapter_format format, const ipt_adapter_module *a)
{
    bool peft = format == IPT_FORMAT_PEFT || format == IPT_FORMAT_DIFFUSERS;
    if (a->kind->factors == ipt_lora_factors) {
        if (a->part[2] && peft && !a->magnitude)
            return ipt_tool_put_expanded(t, a);
        return ipt_tool_put_same(t, a);
    }
    if (a->kind->read && a->kron.is_shuffled && format != IPT_FORMAT_KRONA)
        return refuse(t, a, IPT_ERR_UNSUPPORTED,
                      "which this format cannot hold; expected --to lokr (exact) or --to lora");
    if (a->kind->family == IPT_ADAPTER_PEFT)
        return refuse(t, a, IPT_ERR_UNSUPPORTED,
                      "which has no other form; expected --to lora with a rank and a model");
    return put_parts(t, a);
}

/* --- Kronecker products ----------------------------------------------------------------------- */
typedef struct cut { /* P [o1,i1], Q [o2, i2 taps] */
    size_t o1, o2, i1, n;
} cut;

void ipt_kron_factorise(int32_t dim, int32_t factor, int32_t *small, int32_t *large)
{
    int32_t m = 1, n = dim, length = m + n;
    if (factor > 0 && dim % factor == 0) {
        m = factor < dim / factor ? factor : dim / factor;
        *small = m;
        *large = dim / m;
        return;
    }
    factor = factor < 0 ? dim : factor;
    while (m < n) {
        int32_t next = m + 1;
        while (dim % next != 0)
            next++;
        if (next + dim / next > length || next > factor)
            break;
        m = next;
        n = dim / next;
    }
    *small = m < n ? m : n;
    *large = m < n ? n : m;
}

/* The nearest product of that cut; *p [o1,i1] and *q [o2,n] are the caller's. */
static ipt_status nearest_kron(ipt_tool *t, const ipt_adapter_module *a, const cut *c,
                               bool is_shuffled, ipt_svd *out)
{
    size_t fan = ipt_fan(a);
    double *d = NULL, *m = NULL;
    IPT_TRY(ipt_tool_delta(t, a, &d));
    m = ipt_calloc(t->ctx, (size_t)a->out * fan, sizeof *m);
    ipt_status s = m ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t x = 0; s == IPT_OK && x < c->o1; x++)
        for (size_t y = 0; y < c->o2; y++)
            for (size_t i = 0; i < c->i1; i++)
                memcpy(m + ((x * c->i1 + i) * c->o2 + y) * c->n,
                       d + (is_shuffled ? y * c->o1 + x : x * c->o2 + y) * fan + i * c->n,
                       c->n * sizeof *m);
    ipt_free(d);
    if (s == IPT_OK)
        s = ipt_svd_dense(t->ctx, (ipt_matrix){m, c->o1 * c->i1, c->o2 * c->n}, 1, out);
    ipt_free(m);
    if (s != IPT_OK)
        return s;
    double root = sqrt(out->s[0]);
    for (size_t i = 0; i < out->m; i++)
        out->u[i] *= root;
    for (size_t i = 0; i < out->n; i++)
        out->v[i] *= root;
    return IPT_OK;
}

static ipt_status put_nearest_lokr(ipt_tool *t, const ipt_adapter_module *a, int32_t factor)
{
    int32_t o1 = 1, o2 = 1, i1 = 1, i2 = 1;
    int64_t taps = (int64_t)a->kh * a->kw;
    double one = 1;
    ipt_svd d = {0};
    ipt_kron_factorise(a->out, factor, &o1, &o2);
    ipt_kron_factorise(a->in, factor, &i1, &i2);
    cut c = {(size_t)o1, (size_t)o2, (size_t)i1, (size_t)(i2 * taps)};
    IPT_TRY(nearest_kron(t, a, &c, false, &d));
    ipt_st_dtype dtype = ipt_tool_dtype(t, a);
    bool four = ipt_tool_axes(t, a) == 4;
    ipt_out_values p = {.value = d.u, .dtype = dtype, .rank = 2, .dim = {o1, i1, 1, 1}},
                   q = {.value = d.v,
                        .dtype = dtype,
                        .rank = four ? 4 : 2,
                        .dim = {o2, i2, four ? a->kh : 1, four ? a->kw : 1}},
                   alpha = {.value = &one, .dtype = IPT_ST_F32};
    ipt_status s = ipt_adapter_out_tensor(t->out, a->module, ".lokr_w1", &p);
    if (s == IPT_OK)
        s = ipt_adapter_out_tensor(t->out, a->module, ".lokr_w2", &q);
    if (s == IPT_OK)
        s = ipt_adapter_out_tensor(t->out, a->module, ".alpha", &alpha);
    if (s == IPT_OK)
        ipt_tool_note(t, a->module, d.total, d.tail, 0, false);
    ipt_svd_finish(&d);
    return s;
}

/* DiffuseKronA's change is up[p][j] down[i][q] at row p a1 + q, column i b2 + j: for other readers
 * a LoKr only with P = [1].  Q is a product through (q,j) or (p,i), of which every value is one of
 * the factors' or 0, so that it is exact; LyCORIS takes a factored Q below half of its longer side.
 */
typedef struct shuffled {
    size_t a1, a2, b1, b2, rank;
    bool through_rows; /* (p,i), else (q,j) */
    bool is_factored;
} shuffled;

static shuffled shuffled_of(const ipt_adapter_kron *k)
{
    shuffled x = {
        .a1 = (size_t)k->o1, .a2 = (size_t)k->i1, .b1 = (size_t)k->o2, .b2 = (size_t)k->i2};
    size_t by_q = x.a1 * x.b2, by_p = x.a2 * x.b1, out = x.a1 * x.b1, in = x.a2 * x.b2;
    x.through_rows = by_p < by_q;
    x.rank = x.through_rows ? by_p : by_q;
    x.is_factored = 2 * x.rank < (out > in ? out : in);
    return x;
}

static void fill_factors(const shuffled *x, const ipt_st_tensor *down, const ipt_st_tensor *up,
                         double *wa, double *wb)
{
    for (size_t p = 0; p < x->b1; p++)
        for (size_t q = 0; q < x->a1; q++)
            for (size_t k = 0; k < (x->through_rows ? x->a2 : x->b2); k++)
                if (x->through_rows)
                    wa[(p * x->a1 + q) * x->rank + p * x->a2 + k] =
                        (double)ipt_st_get(down, k * x->a1 + q);
                else
                    wa[(p * x->a1 + q) * x->rank + q * x->b2 + k] =
                        (double)ipt_st_get(up, p * x->b2 + k);
    for (size_t i = 0; i < x->a2; i++)
        for (size_t j = 0; j < x->b2; j++)
            for (size_t k = 0; k < (x->through_rows ? x->b1 : x->a1); k++)
                if (x->through_rows)
                    wb[(k * x->a2 + i) * x->a2 * x->b2 + i * x->b2 + j] =
                        (double)ipt_st_get(up, k * x->b2 + j);
                else
                    wb[(k * x->b2 + j) * x->a2 * x->b2 + i * x->b2 + j] =
                        (double)ipt_st_get(down, i * x->a1 + k);
}

/* What a LoKr of these factors has for Q: wa [out,rank] and wb [rank,in], or wa [out,in] alone. */
static ipt_status krona_as_q(ipt_ctx *ctx, const shuffled *x, const ipt_st_tensor *down,
                             const ipt_st_tensor *up, double **wa, double **wb)
{
    size_t out = x->a1 * x->b1, in = x->a2 * x->b2;
    IPT_TRY(ipt_st_load(down));
    IPT_TRY(ipt_st_load(up));
    *wb = NULL;
    *wa = ipt_calloc(ctx, out * (x->is_factored ? x->rank : in), sizeof **wa);
    if (*wa && x->is_factored)
        *wb = ipt_calloc(ctx, x->rank * in, sizeof **wb);
    if (!*wa || (x->is_factored && !*wb)) {
        ipt_free(*wa);
        *wa = NULL;
        return IPT_ERR_NOMEM;
    }
    if (x->is_factored) {
        fill_factors(x, down, up, *wa, *wb);
        return IPT_OK;
    }
    for (size_t o = 0; o < out; o++)
        for (size_t c = 0; c < in; c++)
            (*wa)[o * in + c] = (double)ipt_st_get(up, o / x->a1 * x->b2 + c % x->b2) *
                                (double)ipt_st_get(down, c / x->b2 * x->a1 + o % x->a1);
    return IPT_OK;
}

static ipt_status put_lokr_of_krona(ipt_tool *t, const ipt_adapter_module *a)
{
    shuffled x = shuffled_of(&a->kron);
    const ipt_st_tensor *down = a->part[0], *up = a->part[1];
    double *wa = NULL, *wb = NULL, one = 1, rank = (double)x.rank, total = 0, lost = 0;
    IPT_TRY(krona_as_q(t->ctx, &x, down, up, &wa, &wb));
    ipt_st_dtype dtype = ipt_tool_dtype(t, a);
    int64_t out = a->out, in = a->in, r = (int64_t)x.rank;
    ipt_out_values v[] = {
        {.value = &one, .dtype = dtype, .rank = 2, .dim = {1, 1, 1, 1}},
        {.value = wa, .dtype = dtype, .rank = 2, .dim = {out, x.is_factored ? r : in, 1, 1}},
        {.value = wb, .dtype = dtype, .rank = 2, .dim = {r, in, 1, 1}},
        {.value = x.is_factored ? &rank : &one, .dtype = IPT_ST_F32},
        {.same = down},
        {.same = up},
    };
    const char *const key[] = {".lokr_w1",     x.is_factored ? ".lokr_w2_a" : ".lokr_w2",
                               ".lokr_w2_b",   ".alpha",
                               IPT_KRONA_DOWN, IPT_KRONA_UP};
    ipt_status s = IPT_OK;
    for (size_t i = 0; s == IPT_OK && i < IPT_COUNT(v); i++)
        if (i != 2 || x.is_factored)
            s = ipt_adapter_out_tensor(t->out, a->module, key[i], &v[i]);
    bool exact = x.is_factored && t->dtype == IPT_ST_COUNT;
    for (size_t i = 0; s == IPT_OK && !x.is_factored && i < (size_t)(out * in); i++) {
        double e = wa[i] - (double)(float)wa[i];
        total += wa[i] * wa[i];
        lost += e * e;
    }
    if (s == IPT_OK)
        ipt_tool_note(t, a->module, total, lost, 0, exact);
    ipt_free(wa);
    ipt_free(wb);
    return s;
}

/* The values are those of a tensor, in its dtype. */
static bool is_equal(const ipt_st_tensor *t, const double *v, size_t n)
{
    if (!t || t->count != n || ipt_st_load(t) != IPT_OK)
        return false;
    for (size_t i = 0; i < n; i++) {
        float f = (float)v[i];
        double want = t->dtype == IPT_ST_F16    ? (double)ipt_f16_to_f32(ipt_f32_to_f16(f))
                      : t->dtype == IPT_ST_BF16 ? (double)ipt_bf16_to_f32(ipt_f32_to_bf16(f))
                                                : (double)f;
        double got = (double)ipt_st_get(t, i);
        if (!(got >= want && got <= want))
            return false;
    }
    return true;
}

/* A LoKr that carries DiffuseKronA's factors, and is still what they make: *down and *up. */
static ipt_status find_krona(ipt_tool *t, const ipt_adapter_module *a, const ipt_st_tensor **down,
                             const ipt_st_tensor **up)
{
    const ipt_st_tensor *d = a->part[IPT_LOKR_KRONA_DOWN], *u = a->part[IPT_LOKR_KRONA_UP];
    double *wa = NULL, *wb = NULL;
    *down = *up = NULL;
    if (strcmp(a->kind->name, "lokr") != 0 || a->magnitude || !d || !u || d->rank != 2 ||
        u->rank != 2 || a->kh * a->kw != 1 || !a->part[0] || a->part[0]->count != 1)
        return IPT_OK;
    for (int i = 0; i < 2; i++)
        if (d->dim[i] < 1 || u->dim[i] < 1 || d->dim[i] > (int64_t)a->in + a->out ||
            u->dim[i] > (int64_t)a->in + a->out)
            return IPT_OK;
    if (d->dim[1] * u->dim[0] != a->out || d->dim[0] * u->dim[1] != a->in ||
        !(a->scale >= 1 && a->scale <= 1) || ipt_st_load(a->part[0]) != IPT_OK ||
        !(ipt_st_get(a->part[0], 0) >= 1 && ipt_st_get(a->part[0], 0) <= 1))
        return IPT_OK;
    ipt_adapter_kron k = {(int32_t)d->dim[1], (int32_t)u->dim[0], (int32_t)d->dim[0],
                          (int32_t)u->dim[1], true};
    shuffled x = shuffled_of(&k);
    IPT_TRY(krona_as_q(t->ctx, &x, d, u, &wa, &wb));
    size_t out = (size_t)a->out, in = (size_t)a->in;
    bool same = x.is_factored ? is_equal(a->part[4], wa, out * x.rank) &&
                                    is_equal(a->part[5], wb, x.rank * in)
                              : is_equal(a->part[3], wa, out * in);
    if (same) {
        *down = d;
        *up = u;
    }
    ipt_free(wa);
    ipt_free(wb);
    return IPT_OK;
}

static int32_t divisor_to(int32_t n, int32_t most)
{
    int32_t d = most < n ? most : n;
    while (n % d != 0)
        d--;
    return d;
}

static ipt_status put_nearest_krona(ipt_tool *t, const ipt_adapter_module *a,
                                    const ipt_convert_opts *o)
{
    int32_t a1 = o->a1 > 0 ? o->a1 : divisor_to(a->out, 4),
            a2 = o->a2 > 0 ? o->a2 : divisor_to(a->in, 64);
    const ipt_module *m = &t->module[a->module];
    if (a->kh * a->kw != 1)
        return refuse(t, a, IPT_ERR_UNSUPPORTED,
                      "a kernel of several taps, which DiffuseKronA does not have");
    if (a->out % a1 != 0 || a->in % a2 != 0)
        return ipt_fail(t->ctx, IPT_ERR_ARG,
                        "%s.%s: found %d outputs and %d inputs, expected multiples of %d and %d "
                        "(--kron %dx%d)",
                        ipt_comp_name(m->comp), m->name, (int)a->out, (int)a->in, (int)a1, (int)a2,
                        (int)a1, (int)a2);
    cut c = {(size_t)a1, (size_t)(a->out / a1), (size_t)a2, (size_t)(a->in / a2)};
    ipt_svd d = {0};
    IPT_TRY(nearest_kron(t, a, &c, true, &d));
    double *down = ipt_calloc(t->ctx, c.o1 * c.i1, sizeof *down); /* P transposed */
    ipt_status s = down ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t i = 0; s == IPT_OK && i < c.o1 * c.i1; i++)
        down[i % c.i1 * c.o1 + i / c.i1] = d.u[i];
    ipt_st_dtype dtype = ipt_tool_dtype(t, a);
    ipt_out_values p = {.value = down, .dtype = dtype, .rank = 2, .dim = {a2, a1, 1, 1}},
                   q = {.value = d.v,
                        .dtype = dtype,
                        .rank = 2,
                        .dim = {(int64_t)c.o2, (int64_t)c.n, 1, 1}};
    if (s == IPT_OK)
        s = ipt_adapter_out_tensor(t->out, a->module, ".down.weight", &p);
    if (s == IPT_OK)
        s = ipt_adapter_out_tensor(t->out, a->module, ".up.weight", &q);
    if (s == IPT_OK)
        ipt_tool_note(t, a->module, d.total, d.tail, 0, false);
    ipt_free(down);
    ipt_svd_finish(&d);
    return s;
}

static ipt_status put_krona(ipt_tool *t, const ipt_adapter_module *a, const ipt_convert_opts *o)
{
    ipt_out_values down = {.same = a->part[0]}, up = {.same = a->part[1]};
    if (!a->kron.is_shuffled || a->act != IPT_ACTS_KRON)
        IPT_TRY(find_krona(t, a, &down.same, &up.same));
    if (!down.same)
        return put_nearest_krona(t, a, o);
    IPT_TRY(ipt_adapter_out_tensor(t->out, a->module, ".down.weight", &down));
    IPT_TRY(ipt_adapter_out_tensor(t->out, a->module, ".up.weight", &up));
    ipt_tool_note(t, a->module, 0, 0, 0, t->dtype == IPT_ST_COUNT);
    return IPT_OK;
}

/* --- convert ---------------------------------------------------------------------------------- */
static ipt_status put_vector(ipt_tool *t, const ipt_adapter_module *a)
{
    double *v = NULL;
    ipt_out_values same = {.same = a->part[0]};
    if (a->kind->delta == ipt_given_delta) {
        IPT_TRY(ipt_adapter_out_tensor(t->out, a->module, a->kind->key[0], &same));
        ipt_tool_note(t, a->module, 0, 0, 0, t->dtype == IPT_ST_COUNT);
        return IPT_OK;
    }
    IPT_TRY(ipt_tool_delta(t, a, &v));
    ipt_status s =
        ipt_tool_put_vector(t, a->module, a->act == IPT_ACTS_BIAS, v, ipt_tool_dtype(t, a));
    ipt_free(v);
    return s;
}

/* A LoRA without a rank given keeps its own; with one it is cut to it. */
static ipt_status put_lora(ipt_tool *t, const ipt_adapter_module *a, int32_t rank)
{
    ipt_svd d = {0};
    if (ipt_tool_is_lora(a) && (rank == 0 || rank >= a->rank))
        return a->part[2] ? ipt_tool_put_expanded(t, a) : ipt_tool_put_same(t, a);
    if (rank == 0)
        return refuse(t, a, IPT_ERR_ARG, "which has no low rank of its own: expected --rank R");
    IPT_TRY(ipt_tool_svd(t, a, (size_t)rank, &d));
    ipt_status s = IPT_OK;
    if (d.total > 0)
        s = ipt_tool_put_svd(t, a->module, &d, ipt_tool_dtype(t, a), ipt_tool_axes(t, a));
    else
        t->report.n_empty++;
    ipt_svd_finish(&d);
    return s;
}

static ipt_status convert_part(ipt_tool *t, const ipt_adapter_module *a, const ipt_convert_opts *o)
{
    ipt_adapter_format format = ipt_adapter_out_format(t->out);
    bool is_lokr = strcmp(a->kind->name, "lokr") == 0 && a->act == IPT_ACTS_KRON;
    if (o->to == IPT_TO_SAME && !ipt_tool_is_vector(a))
        return put_same(t, format, a);
    if (ipt_tool_is_vector(a) && format != IPT_FORMAT_KOHYA)
        return refuse(
            t, a, IPT_ERR_UNSUPPORTED,
            "a change of a bias or norm, which this format cannot hold; expected --format "
            "kohya");
    if (ipt_tool_is_vector(a))
        return put_vector(t, a);
    if (o->to == IPT_TO_LORA)
        return put_lora(t, a, o->rank);
    if (o->to == IPT_TO_KRONA)
        return put_krona(t, a, o);
    if (is_lokr)
        return put_parts(t, a);
    if (a->kron.is_shuffled)
        return put_lokr_of_krona(t, a);
    return put_nearest_lokr(t, a, o->factor);
}

/* Words inside a file, as A1111 and OneTrainer write them. */
static ipt_status put_words(ipt_tool *t, const ipt_adapter_file *f)
{
    static const char *const endings[2] = {".clip_l", ".clip_g"};
    char key[IPT_KEY_MAX];
    for (size_t i = 0; i < f->n_embedding; i++) {
        const ipt_adapter_embedding *e = &f->embedding[i];
        bool both = e->vector[1] != NULL;
        if (ipt_adapter_out_format(t->out) != IPT_FORMAT_KOHYA) {
            t->report.n_left_out++;
            continue;
        }
        for (int k = 0; k < 2; k++) {
            ipt_out_values v = {.same = e->vector[k]};
            if (!v.same)
                continue;
            if (v.same->rank == 1) {
                v.rank = 2;
                v.dim[0] = 1;
                v.dim[1] = v.same->dim[0];
            }
            ipt_name(key, sizeof key, "bundle_emb.%.200s%s", e->word,
                     both ? endings[k] : ".string_to_param.*");
            IPT_TRY(ipt_adapter_out_key(t->out, key, &v));
        }
    }
    return IPT_OK;
}

ipt_status ipt_adapter_convert(ipt_tool *t, const ipt_adapter_file *file, const ipt_convert_opts *o)
{
    for (size_t i = 0; i < file->n_module; i++) {
        IPT_TRY(ipt_tool_step(t, i, file->n_module));
        IPT_TRY(convert_part(t, &file->module[i], o));
    }
    return put_words(t, file);
}

/* --- resize ----------------------------------------------------------------------------------- */
size_t ipt_rank_for(const double *s, size_t n, double total, double keep)
{
    double sum = 0;
    size_t r = 0;
    while (r < n && (r == 0 || sum < keep * keep * total * (1 - 1e-12))) {
        sum += s[r] * s[r];
        r++;
    }
    return r;
}

static ipt_status resize_part(ipt_tool *t, const ipt_adapter_module *a, const ipt_resize_opts *o)
{
    bool conv = a->kh * a->kw > 1;
    int32_t most = conv && o->conv_rank > 0 ? o->conv_rank : o->rank;
    ipt_svd d = {0};
    if (ipt_tool_is_lora(a) && o->keep <= 0 && (most == 0 || most >= a->rank))
        return a->part[2] ? ipt_tool_put_expanded(t, a) : ipt_tool_put_same(t, a);
    if (most == 0 && !ipt_tool_is_lora(a))
        return refuse(t, a, IPT_ERR_ARG, "which has no low rank of its own: expected --rank R");
    IPT_TRY(ipt_tool_svd(t, a, (size_t)most, &d));
    ipt_status s = IPT_OK;
    if (o->keep > 0 && d.total > 0)
        ipt_svd_cut(&d, ipt_rank_for(d.s, d.rank, d.total, o->keep));
    if (!(d.total > 0))
        t->report.n_empty++;
    else if (ipt_tool_is_lora(a) && !a->part[2] && d.rank >= (size_t)a->rank)
        s = ipt_tool_put_same(t, a);
    else
        s = ipt_tool_put_svd(t, a->module, &d, ipt_tool_dtype(t, a), ipt_tool_axes(t, a));
    ipt_svd_finish(&d);
    return s;
}

ipt_status ipt_adapter_resize(ipt_tool *t, const ipt_adapter_file *file, const ipt_resize_opts *o)
{
    for (size_t i = 0; i < file->n_module; i++) {
        const ipt_adapter_module *a = &file->module[i];
        IPT_TRY(ipt_tool_step(t, i, file->n_module));
        IPT_TRY(ipt_tool_is_vector(a) ? put_vector(t, a) : resize_part(t, a, o));
    }
    return put_words(t, file);
}
