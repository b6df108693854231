/* compose/bank.c - the loaded adapters of a request, stacked per module: low-rank columns of all
 * adapters side by side with a slot number for each, padded to a multiple of four; Kronecker
 * factors and whole differences one after the other; biases and norms as one vector a slot. */
#include "compose/bank.h"

#include <stdlib.h>
#include <string.h>

enum { RANK_ALIGN = 4 };

/* What all files together have for one module. */
typedef struct load {
    uint32_t rank;
    uint16_t n_dense, n_kron;
    bool has_bias, has_norm;
} load;

/* --- layout ----------------------------------------------------------------------------------- */
/* Gate row of a UNet module: which block it sits in. */
static uint16_t row_of(const char *name)
{
    int level = -1;
    if (strncmp(name, "down_blocks.", 12) == 0)
        level = name[12] - '0';
    else if (strncmp(name, "up_blocks.", 10) == 0)
        level = 9 + name[10] - '0';
    else if (strncmp(name, "mid_block.", 10) == 0)
        level = 8;
    return (uint16_t)(level + 1);
}

static bool is_used(const load *l)
{
    return l->rank || l->n_dense || l->n_kron || l->has_bias || l->has_norm;
}

static void count(const ipt_bank *b, load *loads)
{
    for (size_t f = 0; f < b->n_file; f++)
        for (size_t i = 0; i < b->file[f]->n_module; i++) {
            const ipt_adapter_module *m = &b->file[f]->module[i];
            load *l = &loads[m->module];
            switch (m->act) {
            case IPT_ACTS_LOW_RANK:
                l->rank += (uint32_t)m->n_col;
                break;
            case IPT_ACTS_KRON:
                l->n_kron++;
                break;
            case IPT_ACTS_DENSE:
                l->n_dense++;
                break;
            case IPT_ACTS_BIAS:
                l->has_bias = true;
                break;
            case IPT_ACTS_NORM:
                l->has_norm = true;
                break;
            }
        }
}

const ipt_adapter_module *ipt_bank_part(const ipt_bank *b, size_t module, ipt_adapter_act act,
                                        size_t k, size_t *slot)
{
    for (size_t f = 0; f < b->n_file; f++)
        for (size_t i = 0; i < b->file[f]->n_module; i++) {
            const ipt_adapter_module *m = &b->file[f]->module[i];
            if (m->module != module || m->act != act || k-- > 0)
                continue;
            *slot = f;
            return m;
        }
    return NULL;
}

static ipt_status add_site(ipt_bank *b, size_t module, const load *l)
{
    const ipt_module *m = &b->modules[module];
    uint32_t padded = (l->rank + RANK_ALIGN - 1) / RANK_ALIGN * RANK_ALIGN;
    size_t slot = 0, k = b->n_site[m->comp]++;
    ipt_adapter_kron *kron = ipt_arena_alloc(&b->arena, (l->n_kron + 1u) * sizeof *kron);
    if (!kron)
        return IPT_ERR_NOMEM;
    if (padded > UINT16_MAX)
        return ipt_fail(b->ctx, IPT_ERR_ARG, "%s: the adapters' ranks add up to %u, at most 65532",
                        m->name, padded);
    for (size_t i = 0; i < l->n_kron; i++)
        kron[i] = ipt_bank_part(b, module, IPT_ACTS_KRON, i, &slot)->kron;
    b->from[m->comp][k] = module;
    b->site[m->comp][k] =
        (ipt_adapter_site){.site = m->name,
                           .n_rank = (uint16_t)padded,
                           .row = m->comp == IPT_COMP_UNET ? row_of(m->name) : (uint16_t)0,
                           .n_dense = l->n_dense,
                           .n_kron = l->n_kron,
                           .has_bias = l->has_bias,
                           .has_norm = l->has_norm,
                           .kron = kron};
    return IPT_OK;
}

static ipt_status stack(ipt_bank *b, size_t n_modules, load *loads)
{
    size_t n[IPT_COMP_COUNT] = {0};
    count(b, loads);
    for (size_t m = 0; m < n_modules; m++)
        n[b->modules[m].comp] += is_used(&loads[m]);
    for (int c = 0; c < IPT_COMP_COUNT; c++) {
        b->site[c] = ipt_arena_alloc(&b->arena, (n[c] + 1) * sizeof *b->site[c]);
        b->from[c] = ipt_arena_alloc(&b->arena, (n[c] + 1) * sizeof *b->from[c]);
        if (!b->site[c] || !b->from[c])
            return IPT_ERR_NOMEM;
    }
    for (size_t m = 0; m < n_modules; m++)
        if (is_used(&loads[m]))
            IPT_TRY(add_site(b, m, &loads[m]));
    return IPT_OK;
}

ipt_status ipt_bank_create(ipt_ctx *ctx, const ipt_module *modules, size_t n_modules,
                           ipt_adapter_file *const *file, size_t n_file, ipt_bank **out)
{
    if (n_file > IPT_MAX_SLOT)
        return ipt_fail(ctx, IPT_ERR_ARG, "%zu adapters given, at most %d at once", n_file,
                        IPT_MAX_SLOT);
    ipt_bank *b = ipt_alloc(ctx, sizeof *b);
    load *loads = ipt_calloc(ctx, n_modules + 1, sizeof *loads);
    ipt_status status = b && loads ? IPT_OK : IPT_ERR_NOMEM;
    if (status == IPT_OK) {
        b->ctx = ctx;
        b->modules = modules;
        b->file = file;
        b->n_file = n_file;
        ipt_arena_init(&b->arena, ctx);
        status = stack(b, n_modules, loads);
        if (status != IPT_OK)
            ipt_bank_destroy(&b);
    } else {
        ipt_free(b);
    }
    ipt_free(loads);
    if (status == IPT_OK)
        *out = b;
    return status;
}

void ipt_bank_destroy(ipt_bank **bp)
{
    if (!bp || !*bp)
        return;
    ipt_arena_finish(&(*bp)->arena);
    ipt_free(*bp);
    *bp = NULL;
}

size_t ipt_bank_n_slot(const ipt_bank *b) { return b ? b->n_file : 0; }

const ipt_adapter_site *ipt_bank_sites(const ipt_bank *b, int comp, size_t *n)
{
    *n = b ? b->n_site[comp] : 0;
    return b ? b->site[comp] : NULL;
}

bool ipt_bank_has(const ipt_bank *b, int comp) { return b && b->n_site[comp] > 0; }

static bool same_site(const ipt_adapter_site *a, const ipt_adapter_site *b)
{
    if (strcmp(a->site, b->site) != 0 || a->n_rank != b->n_rank || a->row != b->row ||
        a->n_dense != b->n_dense || a->n_kron != b->n_kron || a->has_bias != b->has_bias ||
        a->has_norm != b->has_norm)
        return false;
    for (int i = 0; i < a->n_kron; i++) {
        const ipt_adapter_kron *x = &a->kron[i], *y = &b->kron[i];
        if (x->o1 != y->o1 || x->o2 != y->o2 || x->i1 != y->i1 || x->i2 != y->i2 ||
            x->is_shuffled != y->is_shuffled)
            return false;
    }
    return true;
}

bool ipt_bank_same_layout(const ipt_bank *a, const ipt_bank *b, int comp)
{
    size_t na = 0, nb = 0;
    const ipt_adapter_site *sa = ipt_bank_sites(a, comp, &na), *sb = ipt_bank_sites(b, comp, &nb);
    if (na != nb || (na > 0 && ipt_bank_n_slot(a) != ipt_bank_n_slot(b)))
        return false;
    for (size_t i = 0; i < na; i++)
        if (!same_site(&sa[i], &sb[i]))
            return false;
    return true;
}

/* --- values ----------------------------------------------------------------------------------- */
/* One site of one plan. */
typedef struct writer {
    const ipt_bank *b;
    const ipt_adapter_site *site;
    size_t module;
    ipt_plan *p;
    uint64_t *uploaded;
} writer;

/* Leaf "<site>.<kind>", or "<site>.<kind><k><end>". */
static ipt_status put(const writer *w, const char *kind, int k, const char *end, const void *data,
                      size_t bytes)
{
    char name[320], number[16] = "";
    if (k >= 0)
        ipt_name(number, sizeof number, "%d", k);
    ipt_name(name, sizeof name, "%s.%s%s%s", w->site->site, kind, number, end);
    *w->uploaded += bytes;
    return ipt_plan_write(w->p, name, data, bytes);
}

static ipt_status put_dense_slot(const writer *w, int k, size_t slot)
{
    const int32_t s = (int32_t)slot, four[4] = {s, s, s, s};
    return put(w, "dense", k, "_slot", four, w->b->modules[w->module].in % 4 ? 4 : sizeof four);
}

ipt_status ipt_bank_values(const ipt_bank *b, const ipt_module *m, bool is_bias, ipt_weights *store,
                           double **out)
{
    ipt_shape s = ipt_shape1(IPT_F32, m->out);
    char name[320];
    *out = NULL;
    if (!m->is_norm && !is_bias)
        s = m->kh * m->kw == 1 ? ipt_shape2(IPT_F32, m->out, m->in)
                               : ipt_shape4(IPT_F32, m->out, m->kh, m->kw, m->in);
    double *v = ipt_calloc(b->ctx, ipt_shape_count(&s), sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    ipt_name(name, sizeof name, "%s.%s", m->name, is_bias ? "bias" : "weight");
    ipt_status status = store->read(store, name, &s, v);
    if (status == IPT_OK)
        *out = v;
    else
        ipt_free(v);
    return status;
}

ipt_status ipt_bank_base(const ipt_bank *b, const ipt_adapter_module *a, ipt_weights *store,
                         double **out)
{
    *out = NULL;
    if (!ipt_adapter_needs_base(a) || !store)
        return IPT_OK;
    return ipt_bank_values(b, &b->modules[a->module], a->act == IPT_ACTS_BIAS, store, out);
}

void ipt_columns_finish(ipt_columns *c)
{
    ipt_free(c->a);
    ipt_free(c->b);
    ipt_free(c->slot);
    *c = (ipt_columns){0};
}

ipt_status ipt_bank_columns(const ipt_bank *b, int comp, size_t site, ipt_weights *store,
                            ipt_columns *out)
{
    size_t r = b->site[comp][site].n_rank, module = b->from[comp][site], col = 0, f = 0;
    const ipt_module *m = &b->modules[module];
    const ipt_adapter_module *a;
    *out = (ipt_columns){.n_a = (size_t)m->in * (size_t)m->kh * (size_t)m->kw * r,
                         .n_b = r * (size_t)m->out};
    out->a = ipt_calloc(b->ctx, out->n_a, sizeof *out->a);
    out->b = ipt_calloc(b->ctx, out->n_b, sizeof *out->b);
    out->slot = ipt_calloc(b->ctx, r, sizeof *out->slot);
    if (!out->a || !out->b || !out->slot)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < r; i++)
        out->slot[i] = -1;
    for (size_t n = 0; (a = ipt_bank_part(b, module, IPT_ACTS_LOW_RANK, n, &f)); n++) {
        double *base = NULL;
        IPT_TRY(ipt_bank_base(b, a, store, &base));
        ipt_status status = ipt_adapter_pack(b->ctx, a, base, out->a, out->b, r, col);
        ipt_free(base);
        IPT_TRY(status);
        for (int32_t c = 0; c < a->n_col; c++)
            out->slot[col++] = (int32_t)f;
    }
    return IPT_OK;
}

static ipt_status write_low_rank(const writer *w)
{
    int comp = w->b->modules[w->module].comp;
    ipt_columns c = {0};
    ipt_status status = ipt_bank_columns(w->b, comp, (size_t)(w->site - w->b->site[comp]),
                                         ipt_plan_weights(w->p), &c);
    if (status == IPT_OK)
        status = put(w, "lora_a", -1, "", c.a, c.n_a * sizeof *c.a);
    if (status == IPT_OK)
        status = put(w, "lora_b", -1, "", c.b, c.n_b * sizeof *c.b);
    if (status == IPT_OK)
        status = put(w, "lora_slot", -1, "", c.slot, w->site->n_rank * sizeof *c.slot);
    ipt_columns_finish(&c);
    return status;
}

static ipt_status write_kron(const writer *w, int k)
{
    size_t f = 0;
    const ipt_adapter_module *a = ipt_bank_part(w->b, w->module, IPT_ACTS_KRON, (size_t)k, &f);
    const ipt_adapter_kron *d = &a->kron;
    size_t n_p = (size_t)d->i1 * (size_t)d->o1,
           n_q = (size_t)a->kh * (size_t)a->kw * (size_t)d->i2 * (size_t)d->o2;
    float *p = ipt_calloc(w->b->ctx, n_p, sizeof *p), *q = ipt_calloc(w->b->ctx, n_q, sizeof *q);
    ipt_status status = p && q ? ipt_adapter_kron_factors(w->b->ctx, a, p, q) : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        status = put(w, "kron", k, "_p", p, n_p * sizeof *p);
    if (status == IPT_OK)
        status = put(w, "kron", k, "_q", q, n_q * sizeof *q);
    if (status == IPT_OK)
        status = put(w, "kron", k, "_slot", &(int32_t){(int32_t)f}, sizeof(int32_t));
    ipt_free(p);
    ipt_free(q);
    return status;
}

ipt_status ipt_bank_delta(const ipt_bank *b, const ipt_adapter_module *a, ipt_weights *store,
                          size_t n, double **out)
{
    double *base = NULL, *d = ipt_calloc(b->ctx, n, sizeof *d);
    ipt_status status = d ? ipt_bank_base(b, a, store, &base) : IPT_ERR_NOMEM;
    if (status == IPT_OK)
        status = ipt_adapter_delta(b->ctx, a, base, d);
    ipt_free(base);
    if (status == IPT_OK)
        *out = d;
    else
        ipt_free(d);
    return status;
}

static ipt_status write_dense(const writer *w, int k)
{
    const ipt_module *m = &w->b->modules[w->module];
    size_t fan = (size_t)m->in * (size_t)m->kh * (size_t)m->kw, out = (size_t)m->out, f = 0;
    const ipt_adapter_module *a = ipt_bank_part(w->b, w->module, IPT_ACTS_DENSE, (size_t)k, &f);
    double *d = NULL;
    IPT_TRY(ipt_bank_delta(w->b, a, ipt_plan_weights(w->p), out * fan, &d));
    float *t = ipt_calloc(w->b->ctx, out * fan, sizeof *t);
    ipt_status status = t ? IPT_OK : IPT_ERR_NOMEM;
    for (size_t o = 0; t && o < out; o++)
        for (size_t i = 0; i < fan; i++)
            t[i * out + o] = (float)d[o * fan + i];
    ipt_free(d);
    if (status == IPT_OK)
        status = put(w, "dense", k, "", t, out * fan * sizeof *t);
    ipt_free(t);
    return status == IPT_OK ? put_dense_slot(w, k, f) : status;
}

/* One row a slot; slots without a part have zeros. */
static ipt_status write_vectors(const writer *w, ipt_adapter_act act, const char *leaf)
{
    size_t out = (size_t)w->b->modules[w->module].out, f = 0;
    const ipt_adapter_module *a;
    ipt_status status = IPT_OK;
    float *v = ipt_calloc(w->b->ctx, w->b->n_file * out, sizeof *v);
    if (!v)
        return IPT_ERR_NOMEM;
    for (size_t k = 0; status == IPT_OK && (a = ipt_bank_part(w->b, w->module, act, k, &f)); k++) {
        double *d = NULL;
        status = ipt_bank_delta(w->b, a, ipt_plan_weights(w->p), out, &d);
        for (size_t i = 0; status == IPT_OK && i < out; i++)
            v[f * out + i] = (float)d[i];
        ipt_free(d);
    }
    if (status == IPT_OK)
        status = put(w, leaf, -1, "", v, w->b->n_file * out * sizeof *v);
    ipt_free(v);
    return status;
}

static ipt_status write_ones(const writer *w)
{
    size_t c = (size_t)w->b->modules[w->module].out;
    float *v = ipt_calloc(w->b->ctx, c, sizeof *v);
    ipt_status status = v ? put(w, "norm_zero", -1, "", v, c * sizeof *v) : IPT_ERR_NOMEM;
    for (size_t i = 0; v && i < c; i++)
        v[i] = 1;
    if (status == IPT_OK)
        status = put(w, "norm_one", -1, "", v, c * sizeof *v);
    ipt_free(v);
    return status;
}

static ipt_status write_site(const writer *w)
{
    const ipt_adapter_site *s = w->site;
    if (s->n_rank)
        IPT_TRY(write_low_rank(w));
    for (int k = 0; k < s->n_kron; k++)
        IPT_TRY(write_kron(w, k));
    for (int k = 0; k < s->n_dense; k++)
        IPT_TRY(write_dense(w, k));
    if (s->has_norm) {
        IPT_TRY(write_vectors(w, IPT_ACTS_NORM, "norm_delta"));
        IPT_TRY(write_ones(w));
    }
    return s->has_bias ? write_vectors(w, IPT_ACTS_BIAS, "bias_delta") : IPT_OK;
}

/* The leaf that tells whether a plan has the site. */
static const char *sign_of(const ipt_adapter_site *s)
{
    return s->n_rank     ? "lora_slot"
           : s->n_kron   ? "kron0_slot"
           : s->n_dense  ? "dense0_slot"
           : s->has_norm ? "norm_delta"
                         : "bias_delta";
}

ipt_status ipt_bank_write(const ipt_bank *b, int comp, ipt_plan *p, uint64_t *uploaded)
{
    char name[320];
    for (size_t i = 0; b && i < b->n_site[comp]; i++) {
        const writer w = {b, &b->site[comp][i], b->from[comp][i], p, uploaded};
        /* A text encoder's plan lacks the layers after the one that clip skip asks for and, without
         * a pooled output, the projection; a shallow UNet's (input "deep") the layers inside, that
         * of maps alone (input "d_maps") the last ones.  A whole UNet's plan has every module: one
         * that is not there is told as a failure. */
        ipt_name(name, sizeof name, "%s.%s", w.site->site, sign_of(w.site));
        bool may_lack =
            comp != IPT_COMP_UNET || ipt_plan_has(p, "deep") || ipt_plan_has(p, "d_maps");
        if (may_lack && !ipt_plan_has(p, name))
            continue;
        IPT_TRY(write_site(&w));
    }
    return IPT_OK;
}

/* --- block weights ---------------------------------------------------------------------------- */
ipt_status ipt_block_weights(ipt_ctx *ctx, const char *text, float row[IPT_GATE_ROWS])
{
    for (int i = 0; i < IPT_GATE_ROWS; i++)
        row[i] = 1.0F;
    const char *p = text ? text : "";
    while (*p) {
        int first, n;
        if (strncmp(p, "down", 4) == 0)
            first = 1, n = 8, p += 4;
        else if (strncmp(p, "mid", 3) == 0)
            first = 9, n = 1, p += 3;
        else if (strncmp(p, "up", 2) == 0)
            first = 10, n = 8, p += 2;
        else
            break;
        if (n > 1 && p[0] == '.' && p[1] >= '0' && p[1] <= '7') {
            first += p[1] - '0';
            n = 1;
            p += 2;
        }
        char *end = NULL;
        double w = *p == ':' ? strtod(p + 1, &end) : 0;
        if (!end || end == p + 1 || !(w >= -100 && w <= 100) || (*end && *end != '/'))
            break;
        for (int i = 0; i < n; i++)
            row[first + i] = (float)w;
        p = *end ? end + 1 : end;
        if (!*end)
            return IPT_OK;
    }
    if (!text || !*text)
        return IPT_OK;
    return ipt_fail(
        ctx, IPT_ERR_ARG,
        "blocks=%s: expected parts like down:1, down.2:0.5, mid:0, up:0.5 joined by '/'", text);
}
