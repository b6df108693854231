/* model_io/adapter_tools.c - what the tools share: changes as matrices and singular values, factors
 * on their way into a file, the report. */
#include "model_io/adapter_tools.h"

#include <math.h>
#include <string.h>

#include "model_io/kinds.h"

/* --- what a part is --------------------------------------------------------------------------- */
bool ipt_tool_is_vector(const ipt_adapter_module *a)
{
    return a->act == IPT_ACTS_BIAS || a->act == IPT_ACTS_NORM;
}

bool ipt_tool_is_lora(const ipt_adapter_module *a)
{
    return a->kind->factors == ipt_lora_factors && !a->magnitude;
}

static const ipt_st_tensor *first_part(const ipt_adapter_module *a)
{
    for (int i = 0; i < IPT_ADAPTER_PARTS; i++)
        if (a->part[i])
            return a->part[i];
    return NULL;
}

ipt_st_dtype ipt_tool_dtype(const ipt_tool *t, const ipt_adapter_module *a)
{
    const ipt_st_tensor *p = first_part(a);
    if (t->dtype != IPT_ST_COUNT)
        return t->dtype;
    return p && ipt_st_can_write(p->dtype) && p->dtype != IPT_ST_F64 ? p->dtype : IPT_ST_F32;
}

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), k = strlen(end);
    return n >= k && strcmp(s + n - k, end) == 0;
}

int ipt_tool_module_axes(const ipt_tool *t, size_t module)
{
    const ipt_module *m = &t->module[module];
    bool projection = strstr(m->name, "attentions.") &&
                      (ends_with(m->name, ".proj_in") || ends_with(m->name, ".proj_out"));
    return m->kh * m->kw > 1 || ends_with(m->name, ".conv_shortcut") ||
                   (projection && t->conv_projections)
               ? 4
               : 2;
}

int ipt_tool_axes(const ipt_tool *t, const ipt_adapter_module *a)
{
    if (a->kind->factors == ipt_lora_factors && !a->part[2])
        return a->part[0]->rank == 4 ? 4 : 2;
    return ipt_tool_module_axes(t, a->module);
}

/* --- changes ---------------------------------------------------------------------------------- */
ipt_status ipt_tool_read(ipt_tool *t, ipt_weights *w, const ipt_module *m, bool is_bias,
                         double **base)
{
    char name[IPT_KEY_MAX + 16];
    bool vector = is_bias || m->is_norm;
    ipt_shape s = vector               ? ipt_shape1(IPT_F32, m->out)
                  : m->kh * m->kw == 1 ? ipt_shape2(IPT_F32, m->out, m->in)
                                       : ipt_shape4(IPT_F32, m->out, m->kh, m->kw, m->in);
    ipt_name(name, sizeof name, "%s.%s", m->name, is_bias ? "bias" : "weight");
    double *v = ipt_calloc(t->ctx, ipt_shape_count(&s), sizeof *v);
    ipt_status status = v ? w->read(w, name, &s, v) : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        *base = v;
    else
        ipt_free(v);
    return status;
}

ipt_status ipt_tool_base(ipt_tool *t, const ipt_adapter_module *a, double **base)
{
    const ipt_module *m = &t->module[a->module];
    *base = NULL;
    if (!ipt_adapter_needs_base(a))
        return IPT_OK;
    if (!t->weights[m->comp])
        return ipt_fail(t->ctx, IPT_ERR_MISSING,
                        "%s.%s: found %s, whose change depends on the model's own weight: name the "
                        "model with -m MODEL",
                        ipt_comp_name(m->comp), m->name, ipt_adapter_kind_name(a));
    return ipt_tool_read(t, t->weights[m->comp], m, a->act == IPT_ACTS_BIAS, base);
}

ipt_status ipt_tool_delta(ipt_tool *t, const ipt_adapter_module *a, double **delta)
{
    size_t n = (size_t)a->out * (ipt_tool_is_vector(a) ? 1 : ipt_fan(a));
    double *base = NULL, *d = NULL;
    IPT_TRY(ipt_tool_base(t, a, &base));
    d = ipt_calloc(t->ctx, n, sizeof *d);
    ipt_status status = d ? ipt_adapter_file_delta(t->ctx, a, base, d) : IPT_ERR_NOMEM;
    ipt_free(base);
    if (status == IPT_OK)
        *delta = d;
    else
        ipt_free(d);
    return status;
}

static ipt_status low_rank_svd(ipt_tool *t, const ipt_adapter_module *a, size_t rank, ipt_svd *out)
{
    size_t r = (size_t)a->n_col, fan = ipt_fan(a), n = (size_t)a->out;
    double *base = NULL;
    IPT_TRY(ipt_tool_base(t, a, &base));
    double *down = ipt_calloc(t->ctx, r * fan, sizeof *down),
           *up = ipt_calloc(t->ctx, r * n, sizeof *up);
    ipt_status status = down && up ? ipt_adapter_factors(t->ctx, a, base, down, up) : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        status =
            ipt_svd_product(t->ctx, (ipt_matrix){up, n, r}, (ipt_matrix){down, r, fan}, rank, out);
    ipt_free(base);
    ipt_free(down);
    ipt_free(up);
    return status;
}

static ipt_status kron_svd(ipt_tool *t, const ipt_adapter_module *a, size_t rank, ipt_svd *out)
{
    const ipt_adapter_kron *k = &a->kron;
    double *p = NULL, *q = NULL;
    IPT_TRY(ipt_adapter_kron_pair(t->ctx, a, &p, &q));
    ipt_status status = ipt_svd_kron(t->ctx, (ipt_matrix){p, (size_t)k->o1, (size_t)k->i1},
                                     (ipt_matrix){q, (size_t)k->o2, ipt_fan(a) / (size_t)k->i1},
                                     k->is_shuffled, rank, out);
    ipt_free(p);
    ipt_free(q);
    return status;
}

/* A LoHa of rank 32 has 1024 columns: then its matrix costs less than its factors.  Multiply-adds
 * of turning both factors, and of making the matrix and a dozen passes over it. */
static bool is_cheap(const ipt_adapter_module *a, size_t rank)
{
    double r = a->n_col, n = a->out, fan = (double)ipt_fan(a);
    return rank == 0 || 4 * r * r * (n + fan) <= n * fan * (2 * r + 48 * ((double)rank + 12));
}

ipt_status ipt_tool_svd(ipt_tool *t, const ipt_adapter_module *a, size_t rank, ipt_svd *out)
{
    double *d = NULL;
    if (a->act == IPT_ACTS_LOW_RANK && is_cheap(a, rank))
        return low_rank_svd(t, a, rank, out);
    if (a->act == IPT_ACTS_KRON)
        return kron_svd(t, a, rank, out);
    IPT_TRY(ipt_tool_delta(t, a, &d));
    ipt_status status =
        ipt_svd_dense(t->ctx, (ipt_matrix){d, (size_t)a->out, ipt_fan(a)}, rank, out);
    ipt_free(d);
    return status;
}

/* --- report ----------------------------------------------------------------------------------- */
void ipt_tool_note(ipt_tool *t, size_t module, double total, double lost, int32_t rank, bool exact)
{
    ipt_tool_report *r = &t->report;
    const ipt_module *m = &t->module[module];
    double error = total > 0 ? sqrt(fmax(lost, 0) / total) : 0;
    r->n_module++;
    r->n_exact += exact;
    r->total += total;
    r->lost += fmax(lost, 0);
    r->error_sum += error;
    if (rank > 0) {
        r->rank_min = r->rank_min == 0 || rank < r->rank_min ? rank : r->rank_min;
        r->rank_max = rank > r->rank_max ? rank : r->rank_max;
    }
    if (error > r->error_worst) {
        r->error_worst = error;
        ipt_name(r->worst, sizeof r->worst, "%s.%s", ipt_comp_name(m->comp), m->name);
    }
}

ipt_status ipt_tool_step(ipt_tool *t, size_t done, size_t total)
{
    if (ipt_cancelled(t->ctx))
        return ipt_fail(t->ctx, IPT_ERR_CANCELLED, "cancelled");
    if (t->step)
        t->step(t->user, done, total);
    return IPT_OK;
}

/* --- into the file ---------------------------------------------------------------------------- */
static ipt_out_values matrix(const ipt_module *m, const double *v, ipt_st_dtype dtype, int axes,
                             size_t rank, bool is_up)
{
    bool four = axes == 4;
    ipt_out_values x = {.value = v, .dtype = dtype, .rank = four ? 4 : 2, .dim = {1, 1, 1, 1}};
    x.dim[0] = is_up ? m->out : (int64_t)rank;
    x.dim[1] = is_up ? (int64_t)rank : m->in;
    if (four && !is_up) {
        x.dim[2] = m->kh;
        x.dim[3] = m->kw;
    }
    return x;
}

static double rounded(ipt_st_dtype dtype, double v)
{
    float f = (float)v;
    return dtype == IPT_ST_F64    ? v
           : dtype == IPT_ST_F16  ? (double)ipt_f16_to_f32(ipt_f32_to_f16(f))
           : dtype == IPT_ST_BF16 ? (double)ipt_bf16_to_f32(ipt_f32_to_bf16(f))
                                  : (double)f;
}

/* |up down - round(up) round(down)|^2, as [up - up', up'] [down; down - down']: nothing cancels. */
static ipt_status rounding(ipt_tool *t, const double *down, const double *up, size_t rank,
                           size_t out, size_t fan, ipt_st_dtype dtype, double *lost)
{
    double *d = ipt_calloc(t->ctx, 2 * rank * fan, sizeof *d),
           *u = ipt_calloc(t->ctx, 2 * rank * out, sizeof *u);
    ipt_status status = d && u ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t i = 0; status == IPT_OK && i < rank * fan; i++) {
        d[i] = down[i];
        d[rank * fan + i] = down[i] - rounded(dtype, down[i]);
    }
    for (size_t i = 0; status == IPT_OK && i < rank * out; i++) {
        double v = rounded(dtype, up[i]);
        u[i / rank * 2 * rank + i % rank] = up[i] - v;
        u[i / rank * 2 * rank + rank + i % rank] = v;
    }
    if (status == IPT_OK)
        status = ipt_product_norm2(t->ctx, u, d, out, 2 * rank, fan, lost);
    ipt_free(d);
    ipt_free(u);
    return status;
}

static ipt_status put(ipt_tool *t, size_t module, const double *down, const double *up, size_t rank,
                      ipt_st_dtype dtype, int axes)
{
    const ipt_module *m = &t->module[module];
    ipt_out_lora f = {.down = matrix(m, down, dtype, axes, rank, false),
                      .up = matrix(m, up, dtype, axes, rank, true),
                      .rank = (int32_t)rank,
                      .alpha = (double)rank};
    return ipt_adapter_out_lora(t->out, module, &f);
}

static size_t fan_of(const ipt_module *m) { return (size_t)m->in * (size_t)m->kh * (size_t)m->kw; }

ipt_status ipt_tool_put_svd(ipt_tool *t, size_t module, const ipt_svd *d, ipt_st_dtype dtype,
                            int axes)
{
    size_t r = d->rank;
    double *down = ipt_calloc(t->ctx, r * d->n, sizeof *down),
           *up = ipt_calloc(t->ctx, r * d->m, sizeof *up), lost = 0;
    ipt_status status = down && up ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t k = 0; status == IPT_OK && k < r; k++) {
        double root = sqrt(d->s[k]);
        for (size_t i = 0; i < d->n; i++)
            down[k * d->n + i] = root * d->v[k * d->n + i];
        for (size_t o = 0; o < d->m; o++)
            up[o * r + k] = root * d->u[k * d->m + o];
    }
    if (status == IPT_OK)
        status = rounding(t, down, up, r, d->m, d->n, dtype, &lost);
    if (status == IPT_OK)
        status = put(t, module, down, up, r, dtype, axes);
    if (status == IPT_OK)
        ipt_tool_note(t, module, d->total, d->tail + lost, (int32_t)r, false);
    ipt_free(down);
    ipt_free(up);
    return status;
}

ipt_status ipt_tool_put_factors(ipt_tool *t, size_t module, const double *down, const double *up,
                                size_t rank, ipt_st_dtype dtype, int axes)
{
    const ipt_module *m = &t->module[module];
    double total = 0, lost = 0;
    if (!t->want_no_errors) {
        IPT_TRY(ipt_product_norm2(t->ctx, up, down, (size_t)m->out, rank, fan_of(m), &total));
        IPT_TRY(rounding(t, down, up, rank, (size_t)m->out, fan_of(m), dtype, &lost));
    }
    IPT_TRY(put(t, module, down, up, rank, dtype, axes));
    ipt_tool_note(t, module, total, lost, (int32_t)rank, false);
    return IPT_OK;
}

ipt_status ipt_tool_put_vector(ipt_tool *t, size_t module, bool is_bias, const double *v,
                               ipt_st_dtype dtype)
{
    const ipt_module *m = &t->module[module];
    double total = 0, lost = 0;
    ipt_out_values x = {.value = v, .dtype = dtype, .rank = 1, .dim = {m->out, 1, 1, 1}};
    for (int32_t i = 0; i < m->out; i++) {
        double e = v[i] - rounded(dtype, v[i]);
        total += v[i] * v[i];
        lost += e * e;
    }
    IPT_TRY(ipt_adapter_out_tensor(t->out, module,
                                   m->is_norm ? is_bias ? ".b_norm" : ".w_norm" : ".diff_b", &x));
    ipt_tool_note(t, module, total, lost, 0, false);
    return IPT_OK;
}

ipt_status ipt_tool_put_expanded(ipt_tool *t, const ipt_adapter_module *a)
{
    size_t r = (size_t)a->n_col, fan = ipt_fan(a), n = (size_t)a->out;
    ipt_st_dtype dtype = ipt_tool_dtype(t, a);
    double *down = ipt_calloc(t->ctx, r * fan, sizeof *down),
           *up = ipt_calloc(t->ctx, r * n, sizeof *up), total = 0, lost = 0;
    ipt_status s = down && up ? ipt_adapter_factors(t->ctx, a, NULL, down, up) : IPT_ERR_NOMEM;
    if (s == IPT_OK)
        s = ipt_product_norm2(t->ctx, up, down, n, r, fan, &total);
    if (s == IPT_OK) {
        ipt_out_lora f = {.down = matrix(&t->module[a->module], down, dtype, 4, r, false),
                          .up = {.same = a->part[1]},
                          .rank = a->rank,
                          .alpha = a->scale * a->rank};
        s = ipt_adapter_out_lora(t->out, a->module, &f);
    }
    for (size_t i = 0; s == IPT_OK && i < r * fan; i++)
        down[i] -= rounded(dtype, down[i]);
    if (s == IPT_OK) /* up keeps its bits */
        s = ipt_product_norm2(t->ctx, up, down, n, r, fan, &lost);
    if (s == IPT_OK)
        ipt_tool_note(t, a->module, total, lost, a->rank, false);
    ipt_free(down);
    ipt_free(up);
    return s;
}

/* What rounding a LoRA's own tensors to another dtype loses. */
static ipt_status note_rounded(ipt_tool *t, const ipt_adapter_module *a)
{
    size_t r = (size_t)a->n_col, fan = ipt_fan(a), n = (size_t)a->out;
    double *down = ipt_calloc(t->ctx, r * fan, sizeof *down),
           *up = ipt_calloc(t->ctx, r * n, sizeof *up), total = 0, lost = 0;
    ipt_status s = down && up ? ipt_adapter_factors(t->ctx, a, NULL, down, up) : IPT_ERR_NOMEM;
    for (size_t i = 0; s == IPT_OK && a->scale != 0 && i < r * n; i++)
        up[i] /= a->scale; /* relative errors have no scale */
    if (s == IPT_OK)
        s = ipt_product_norm2(t->ctx, up, down, n, r, fan, &total);
    if (s == IPT_OK)
        s = rounding(t, down, up, r, n, fan, t->dtype, &lost);
    if (s == IPT_OK)
        ipt_tool_note(t, a->module, total * a->scale * a->scale, lost * a->scale * a->scale,
                      a->rank, false);
    ipt_free(down);
    ipt_free(up);
    return s;
}

ipt_status ipt_tool_put_same(ipt_tool *t, const ipt_adapter_module *a)
{
    double scale = a->rank > 0 ? (double)a->alpha / a->rank : 1;
    bool plain = scale >= a->scale && scale <= a->scale; /* not PEFT's rank-stabilised root */
    ipt_out_lora f = {.down = {.same = a->part[0]},
                      .up = {.same = a->part[1]},
                      .mid = {.same = a->part[2]},
                      .magnitude = {.same = a->magnitude},
                      .rank = a->rank,
                      .by_input = a->is_by_input,
                      .alpha = plain ? (double)a->alpha : a->scale * a->rank};
    if (a->magnitude) {
        f.magnitude.rank = a->magnitude->rank < 4 ? a->magnitude->rank : 4;
        for (int i = 0; i < 4; i++)
            f.magnitude.dim[i] = i < f.magnitude.rank ? a->magnitude->dim[i] : 1;
    }
    IPT_TRY(ipt_adapter_out_lora(t->out, a->module, &f));
    if (t->dtype != IPT_ST_COUNT && t->dtype != a->part[0]->dtype)
        return note_rounded(t, a);
    ipt_tool_note(t, a->module, 0, 0, a->rank, true);
    return IPT_OK;
}

double ipt_tool_norm2_cost(const ipt_adapter_module *a)
{
    double r = a->n_col, n = a->out, fan = ipt_tool_is_vector(a) ? 1 : (double)ipt_fan(a);
    if (a->act == IPT_ACTS_LOW_RANK && r * (n + fan) <= n * fan)
        return r * r * (n + fan);
    if (a->act == IPT_ACTS_KRON)
        return (double)a->kron.o1 * a->kron.i1 + (double)a->kron.o2 * fan / a->kron.i1;
    return n * fan * (2.0 * a->rank + 4);
}

ipt_status ipt_tool_norm2(ipt_tool *t, const ipt_adapter_module *a, double *norm2)
{
    size_t fan = ipt_tool_is_vector(a) ? 1 : ipt_fan(a), n = (size_t)a->out * fan;
    double *x = NULL, *y = NULL;
    ipt_status s = IPT_OK;
    if (a->act == IPT_ACTS_LOW_RANK && (size_t)a->n_col * ((size_t)a->out + fan) <= n) {
        size_t r = (size_t)a->n_col;
        double *base = NULL;
        IPT_TRY(ipt_tool_base(t, a, &base));
        x = ipt_calloc(t->ctx, r * fan, sizeof *x);
        y = ipt_calloc(t->ctx, r * (size_t)a->out, sizeof *y);
        s = x && y ? ipt_adapter_factors(t->ctx, a, base, x, y) : IPT_ERR_NOMEM;
        if (s == IPT_OK)
            s = ipt_product_norm2(t->ctx, y, x, (size_t)a->out, r, fan, norm2);
        ipt_free(base);
    } else if (a->act == IPT_ACTS_KRON) {
        size_t np = (size_t)a->kron.o1 * (size_t)a->kron.i1, nq = n / np;
        IPT_TRY(ipt_adapter_kron_pair(t->ctx, a, &x, &y));
        *norm2 = ipt_norm2(x, np) * ipt_norm2(y, nq);
    } else {
        IPT_TRY(ipt_tool_delta(t, a, &x));
        *norm2 = ipt_norm2(x, n);
    }
    ipt_free(x);
    ipt_free(y);
    return s;
}
