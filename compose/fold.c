/* compose/fold.c - a bank's adapters into the weights themselves, where their mix stays the same
 * for a whole request: they cost nothing then, whatever their rank.
 *
 * Low-rank parts are multiplied out on the device, beside what lies there (f32 sums, rounded once);
 * sites with any other part are made on the host in double from the file's values. */
#include "compose/bank.h"

#include <math.h>
#include <string.h>

/* One site under its gates [n_slot]. */
typedef struct fold {
    const ipt_bank *b;
    const ipt_adapter_site *site;
    const ipt_module *m;
    size_t module, number;
    const float *gate;
    ipt_weights *store;
} fold;

static fold fold_of(const ipt_bank *b, int comp, size_t site, const float *gate, ipt_weights *store)
{
    fold f = {.b = b, .site = &b->site[comp][site], .number = site, .store = store};
    f.module = b->from[comp][site];
    f.m = &b->modules[f.module];
    f.gate = gate + f.site->row * b->n_file;
    return f;
}

static ipt_status add_low_rank(const fold *f, const char *name)
{
    size_t r = f->site->n_rank;
    ipt_columns c = {0};
    ipt_status status = ipt_bank_columns(f->b, f->m->comp, f->number, f->store, &c);
    for (size_t i = 0; status == IPT_OK && i < r; i++)
        for (size_t o = 0; c.slot[i] >= 0 && o < (size_t)f->m->out; o++)
            c.b[i * (size_t)f->m->out + o] *= f->gate[c.slot[i]];
    if (status == IPT_OK)
        status = ipt_weights_add(f->store, name, c.a, c.b, r);
    ipt_columns_finish(&c);
    return status;
}

/* v += gate * change, for every part that acts in this way. */
static ipt_status add_parts(const fold *f, ipt_adapter_act act, size_t n, double *v)
{
    const ipt_adapter_module *a;
    size_t slot = 0;
    for (size_t k = 0; (a = ipt_bank_part(f->b, f->module, act, k, &slot)); k++) {
        double *d = NULL, g = (double)f->gate[slot];
        IPT_TRY(ipt_bank_delta(f->b, a, f->store, n, &d));
        for (size_t i = 0; i < n; i++)
            v[i] += g * d[i];
        ipt_free(d);
    }
    return IPT_OK;
}

static ipt_status replace(const fold *f, const char *name, bool is_bias)
{
    static const ipt_adapter_act of_weight[] = {IPT_ACTS_LOW_RANK, IPT_ACTS_KRON, IPT_ACTS_DENSE,
                                                IPT_ACTS_NORM};
    const ipt_module *m = f->m;
    size_t fan = is_bias || m->is_norm ? 1 : (size_t)m->in * (size_t)m->kh * (size_t)m->kw,
           n = (size_t)m->out * fan;
    double *v = NULL;
    IPT_TRY(ipt_bank_values(f->b, m, is_bias, f->store, &v));
    ipt_status status = IPT_OK;
    if (is_bias)
        status = add_parts(f, IPT_ACTS_BIAS, n, v);
    for (size_t i = 0; !is_bias && status == IPT_OK && i < IPT_COUNT(of_weight); i++)
        status = add_parts(f, of_weight[i], n, v);
    if (status == IPT_OK)
        status = ipt_weights_replace(f->store, name, v);
    ipt_free(v);
    return status;
}

static bool is_silent(const fold *f)
{
    for (size_t i = 0; i < f->b->n_file; i++)
        if (f->gate[i] < 0 || f->gate[i] > 0)
            return false;
    return true;
}

ipt_status ipt_bank_fold(const ipt_bank *b, int comp, size_t site, const float *gate,
                         ipt_weights *store)
{
    const fold f = fold_of(b, comp, site, gate, store);
    const ipt_adapter_site *s = f.site;
    char name[320];
    if (is_silent(&f))
        return IPT_OK;
    ipt_name(name, sizeof name, "%s.weight", s->site);
    ipt_status status = IPT_ERR_TOO_LARGE;
    if (s->n_rank && !s->n_kron && !s->n_dense)
        status = add_low_rank(&f, name);
    if (status != IPT_OK && status != IPT_ERR_TOO_LARGE)
        return status;
    if (status == IPT_ERR_TOO_LARGE && (s->n_rank || s->n_kron || s->n_dense || s->has_norm))
        IPT_TRY(replace(&f, name, false));
    ipt_name(name, sizeof name, "%s.bias", s->site);
    return s->has_bias ? replace(&f, name, true) : IPT_OK;
}

ipt_status ipt_bank_unfold(const ipt_bank *b, int comp, size_t site, ipt_weights *store)
{
    const ipt_adapter_site *s = &b->site[comp][site];
    char name[320];
    ipt_name(name, sizeof name, "%s.weight", s->site);
    if (s->n_rank || s->n_kron || s->n_dense || s->has_norm)
        IPT_TRY(ipt_weights_restore(store, name));
    ipt_name(name, sizeof name, "%s.bias", s->site);
    return s->has_bias ? ipt_weights_restore(store, name) : IPT_OK;
}

/* --- what it costs ---------------------------------------------------------------------------- */
ipt_fold_cost ipt_bank_cost(const ipt_bank *b, int comp, const ipt_site_rows *rows,
                            ipt_dtype weight_type)
{
    enum { HOST_MACS = 16 }; /* an element of a change made on the host, beside one multiply-add */
    ipt_fold_cost c = {0};
    for (size_t i = 0; i < b->n_site[comp]; i++) {
        const ipt_adapter_site *s = &b->site[comp][i];
        const ipt_module *m = &b->modules[b->from[comp][i]];
        double fan = (double)m->in * m->kh * m->kw, out = m->out, values = fan * out, each = 0,
               host = 0;
        if (s->n_rank)
            each += s->n_rank * (fan + out);
        for (int k = 0; k < s->n_kron; k++) {
            const ipt_adapter_kron *d = &s->kron[k];
            each += (double)d->i1 * d->o2 * (fan / d->i1) + (double)d->i1 * d->o1 * d->o2;
        }
        each += s->n_dense * values;
        if (s->has_bias || s->has_norm)
            each += out;
        host = (s->n_kron || s->n_dense) ? HOST_MACS * values * (1 + s->n_kron + s->n_dense) : 0;
        c.step_macs += each * rows->of(rows->user, s->site);
        c.fold_macs += s->n_rank * values + host;
        if (s->n_rank || s->n_kron || s->n_dense)
            c.bytes += values * (double)ipt_dtype_bytes(weight_type);
    }
    return c;
}
