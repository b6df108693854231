/* train/trainee.c - see trainee.h.  In a graph a is [kh*kw*in, R], b [R, out], p [i1, o1], q
 * [kh*kw*i2, o2]; files have them turned, kernels as [.., in, kh, kw]. */
#include "train/trainee.h"

#include "train/step.h"

#include <math.h>
#include <string.h>

enum { RANK_ALIGN = 4, MAX_RANK = 4096 };

static bool ends_with(const char *s, const char *end)
{
    const size_t n = strlen(s), k = strlen(end);
    return n >= k && strcmp(s + n - k, end) == 0;
}

static bool is_kernel(const ipt_module *m) { return m->kh * m->kw > 1; }

/* --- which modules ---------------------------------------------------------------------------- */
static bool is_reached(const ipt_module *m, const ipt_trainee_opts *o)
{
    static const char *const attention[] = {".to_q", ".to_k", ".to_v", ".to_out.0"};
    if (m->comp != IPT_COMP_UNET || m->is_norm)
        return false;
    if (is_kernel(m))
        return o->kind == IPT_TRAINEE_LORA && o->conv_rank > 0;
    for (size_t i = 0; i < IPT_COUNT(attention); i++)
        if (ends_with(m->name, attention[i]))
            return true;
    return o->reach == IPT_REACH_TRANSFORMER && strstr(m->name, ".attentions.") != NULL;
}

static int32_t rank_of(const ipt_trainee *t, const ipt_module *m)
{
    return is_kernel(m) ? t->opts.conv_rank : t->opts.rank;
}

static int32_t padded(int32_t rank) { return (rank + RANK_ALIGN - 1) / RANK_ALIGN * RANK_ALIGN; }

/* --- sites and tensors ------------------------------------------------------------------------ */
static ipt_status add_item(ipt_trainee *t, const char *site, const char *end, ipt_dtype act,
                           int32_t rows, int32_t cols)
{
    char name[512];
    ipt_name(name, sizeof name, "%s.%s", site, end);
    ipt_state_item *i = &t->item[t->n_item++];
    *i = (ipt_state_item){ipt_arena_strdup(&t->arena, name), ipt_shape2(act, rows, cols)};
    return i->name ? IPT_OK : IPT_ERR_NOMEM;
}

/* The largest divisor of n that is at most `most`. */
static int32_t divisor(int32_t n, int32_t most)
{
    int32_t d = most < n ? most : n;
    while (n % d != 0)
        d--;
    return d;
}

static ipt_status add_kron(ipt_trainee *t, ipt_adapter_site *s, const ipt_module *m, ipt_dtype act)
{
    ipt_adapter_kron *k = ipt_arena_alloc(&t->arena, sizeof *k);
    if (!k)
        return IPT_ERR_NOMEM;
    if (t->opts.kind == IPT_TRAINEE_LOKR) {
        ipt_kron_factorise(m->out, t->opts.factor, &k->o1, &k->o2);
        ipt_kron_factorise(m->in, t->opts.factor, &k->i1, &k->i2);
    } else {
        k->o1 = divisor(m->out, t->opts.a1);
        k->i1 = divisor(m->in, t->opts.a2);
        k->o2 = m->out / k->o1;
        k->i2 = m->in / k->i1;
    }
    s->n_kron = 1;
    s->kron = k;
    IPT_TRY(add_item(t, s->site, "kron0_p", act, k->i1, k->o1));
    return add_item(t, s->site, "kron0_q", act, k->i2, k->o2);
}

static ipt_status add_site(ipt_trainee *t, size_t module, ipt_dtype act)
{
    const ipt_module *m = &t->module[module];
    ipt_adapter_site *s = &t->site[t->n_site];
    t->from[t->n_site++] = module;
    *s = (ipt_adapter_site){.site = m->name, .row = is_kernel(m)};
    if (t->opts.kind != IPT_TRAINEE_LORA)
        return add_kron(t, s, m, act);
    s->n_rank = (uint16_t)padded(rank_of(t, m));
    IPT_TRY(add_item(t, s->site, "lora_a", act, m->kh * m->kw * m->in, s->n_rank));
    return add_item(t, s->site, "lora_b", act, s->n_rank, m->out);
}

static ipt_status check(ipt_ctx *ctx, const ipt_trainee_opts *o)
{
    if (o->kind == IPT_TRAINEE_LORA &&
        (o->rank < 1 || o->rank > MAX_RANK || o->conv_rank < 0 || o->conv_rank > MAX_RANK))
        return ipt_fail(ctx, IPT_ERR_ARG, "rank %d (kernels: %d), expected 1 to %d (0: no kernels)",
                        o->rank, o->conv_rank, MAX_RANK);
    if (o->kind == IPT_TRAINEE_LOKR && o->factor != -1 && o->factor < 1)
        return ipt_fail(ctx, IPT_ERR_ARG, "factor %d, expected -1 or 1 and more", o->factor);
    if (o->kind == IPT_TRAINEE_KRONA && (o->a1 < 1 || o->a2 < 1))
        return ipt_fail(ctx, IPT_ERR_ARG, "first factor %d x %d, expected 1 x 1 and more", o->a1,
                        o->a2);
    return IPT_OK;
}

ipt_status ipt_trainee_create(ipt_ctx *ctx, const ipt_module *modules, size_t n,
                              const ipt_trainee_opts *o, ipt_dtype act, ipt_trainee **out)
{
    IPT_TRY(check(ctx, o));
    ipt_trainee *t = ipt_alloc(ctx, sizeof *t);
    ipt_status status = IPT_OK;
    if (!t)
        return IPT_ERR_NOMEM;
    t->ctx = ctx;
    t->opts = *o;
    t->module = modules;
    t->n_module = n;
    ipt_arena_init(&t->arena, ctx);
    size_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += is_reached(&modules[i], o);
    t->site = ipt_arena_alloc(&t->arena, (count + 1) * sizeof *t->site);
    t->from = ipt_arena_alloc(&t->arena, (count + 1) * sizeof *t->from);
    t->item = ipt_arena_alloc(&t->arena, (2 * count + 1) * sizeof *t->item);
    if (!t->site || !t->from || !t->item)
        status = IPT_ERR_NOMEM;
    else if (count == 0)
        status = ipt_fail(ctx, IPT_ERR_MISSING, "the model has no module that could be trained");
    for (size_t i = 0; i < n && status == IPT_OK; i++)
        if (is_reached(&modules[i], o))
            status = add_site(t, i, act);
    if (status != IPT_OK)
        ipt_trainee_destroy(&t);
    else
        *out = t;
    return status;
}

void ipt_trainee_destroy(ipt_trainee **t)
{
    if (!t || !*t)
        return;
    ipt_arena_finish(&(*t)->arena);
    ipt_free(*t);
    *t = NULL;
}

/* --- values ----------------------------------------------------------------------------------- */
/* Of the first factor of a site, [rows, cols] of which `used` columns are no padding. */
static void first_values(const ipt_trainee *t, size_t site, size_t rows, size_t cols, size_t used,
                         float *v)
{
    uint64_t seed = t->opts.seed + 0x9e3779b97f4a7c15u * (site + 1);
    const bool is_normal = t->opts.kind == IPT_TRAINEE_KRONA;
    const float bound = 1.0F / (is_normal ? (float)cols : sqrtf((float)rows));
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < used; j++)
            v[i * cols + j] =
                bound * (is_normal ? ipt_rng_normal(&seed) : 2.0F * ipt_rng_uniform(&seed) - 1.0F);
}

ipt_status ipt_trainee_begin(const ipt_trainee *t, ipt_state *s)
{
    for (size_t i = 0; i < t->n_item; i++) {
        const ipt_shape *shape = &t->item[i].shape;
        const size_t n = ipt_shape_count(shape), rows = (size_t)shape->dim[0],
                     cols = (size_t)shape->dim[1];
        const ipt_module *m = &t->module[t->from[i / 2]];
        float *v = ipt_calloc(t->ctx, n, sizeof *v);
        if (!v)
            return IPT_ERR_NOMEM;
        if (i % 2 == 0)
            first_values(t, i / 2, rows, cols,
                         t->opts.kind == IPT_TRAINEE_LORA ? (size_t)rank_of(t, m) : cols, v);
        const ipt_status status = ipt_train_set(s, t->item[i].name, v, n * sizeof *v);
        ipt_free(v);
        IPT_TRY(status);
    }
    return IPT_OK;
}

/* --- plans ------------------------------------------------------------------------------------ */
static ipt_status write_slots(const ipt_trainee *t, ipt_plan *p, size_t i)
{
    const ipt_adapter_site *s = &t->site[i];
    const bool is_lora = s->n_rank > 0;
    const int32_t n = is_lora ? s->n_rank : 1,
                  used = is_lora ? rank_of(t, &t->module[t->from[i]]) : 1;
    char name[512];
    int32_t *slot = ipt_calloc(t->ctx, (size_t)n, sizeof *slot);
    if (!slot)
        return IPT_ERR_NOMEM;
    for (int32_t k = used; k < n; k++)
        slot[k] = -1;
    ipt_name(name, sizeof name, "%s.%s_slot", s->site, is_lora ? "lora" : "kron0");
    const ipt_status status = ipt_plan_write(p, name, slot, (size_t)n * sizeof *slot);
    ipt_free(slot);
    return status;
}

ipt_status ipt_trainee_prepare(const ipt_trainee *t, ipt_plan *p, int32_t batch)
{
    const bool is_lora = t->opts.kind == IPT_TRAINEE_LORA;
    const size_t n = (size_t)batch * IPT_TRAINEE_GATES;
    float *gate = ipt_calloc(t->ctx, n, sizeof *gate);
    if (!gate)
        return IPT_ERR_NOMEM;
    for (size_t i = 0; i < n; i++) {
        const bool kernels = i >= (size_t)batch;
        const int32_t rank = kernels ? t->opts.conv_rank : t->opts.rank;
        const double alpha = kernels ? t->opts.conv_alpha : t->opts.alpha;
        gate[i] = !is_lora ? 1.0F : rank > 0 ? (float)(alpha / rank) : 0.0F;
    }
    ipt_status status = ipt_plan_write(p, "gates", gate, n * sizeof *gate);
    ipt_free(gate);
    for (size_t i = 0; i < t->n_site && status == IPT_OK; i++)
        status = write_slots(t, p, i);
    return status;
}

/* --- file ------------------------------------------------------------------------------------- */
/* Element (r, k) of item i as doubles in file order: used columns of [taps * in, cols] become rows
 * of [used, in, taps]; ipt_free. */
static ipt_status turned(const ipt_trainee *t, const ipt_state *s, size_t i, size_t used,
                         size_t taps, double **out)
{
    const ipt_shape *shape = &t->item[i].shape;
    const size_t rows = (size_t)shape->dim[0], cols = (size_t)shape->dim[1], in = rows / taps;
    float *v = ipt_calloc(t->ctx, rows * cols, sizeof *v);
    double *d = ipt_calloc(t->ctx, rows * used, sizeof *d);
    ipt_status status =
        v && d ? ipt_train_get(s, t->item[i].name, v, rows * cols * sizeof *v) : IPT_ERR_NOMEM;
    for (size_t c = 0; c < used && status == IPT_OK; c++)
        for (size_t tap = 0; tap < taps; tap++)
            for (size_t k = 0; k < in; k++)
                d[(c * in + k) * taps + tap] = (double)v[(tap * in + k) * cols + c];
    ipt_free(v);
    if (status == IPT_OK)
        *out = d;
    else
        ipt_free(d);
    return status;
}

static ipt_status write_lora(const ipt_trainee *t, size_t i, const double *down, const double *up,
                             ipt_adapter_out *out)
{
    const ipt_module *m = &t->module[t->from[i]];
    const int32_t rank = rank_of(t, m);
    const bool four = is_kernel(m);
    const ipt_out_lora f = {
        .down = {.value = down,
                 .dtype = IPT_ST_F32,
                 .rank = four ? 4 : 2,
                 .dim = {rank, m->in, m->kh, m->kw}},
        .up = {.value = up, .dtype = IPT_ST_F32, .rank = four ? 4 : 2, .dim = {m->out, rank, 1, 1}},
        .rank = rank,
        .alpha = four ? t->opts.conv_alpha : t->opts.alpha};
    return ipt_adapter_out_lora(out, t->from[i], &f);
}

static ipt_status write_kron(const ipt_trainee *t, size_t i, const double *p, const double *q,
                             ipt_adapter_out *out)
{
    const ipt_adapter_kron *k = t->site[i].kron;
    const double one = 1; /* of two whole factors nobody reads it */
    const ipt_out_values w1 = {.value = p, .dtype = IPT_ST_F32, .rank = 2, .dim = {k->o1, k->i1}},
                         w2 = {.value = q, .dtype = IPT_ST_F32, .rank = 2, .dim = {k->o2, k->i2}},
                         alpha = {.value = &one, .dtype = IPT_ST_F32};
    IPT_TRY(ipt_adapter_out_tensor(out, t->from[i], ".lokr_w1", &w1));
    IPT_TRY(ipt_adapter_out_tensor(out, t->from[i], ".lokr_w2", &w2));
    return ipt_adapter_out_tensor(out, t->from[i], ".alpha", &alpha);
}

ipt_status ipt_trainee_write(const ipt_trainee *t, const ipt_state *s, ipt_adapter_out *out)
{
    for (size_t i = 0; i < t->n_site; i++) {
        const ipt_module *m = &t->module[t->from[i]];
        const bool is_lora = t->opts.kind == IPT_TRAINEE_LORA;
        const size_t rank = is_lora ? (size_t)rank_of(t, m) : 0;
        double *v[2] = {NULL, NULL}, *up = NULL;
        ipt_status status = turned(t, s, 2 * i, is_lora ? rank : (size_t)t->site[i].kron[0].o1,
                                   (size_t)m->kh * (size_t)m->kw, &v[0]);
        if (status == IPT_OK)
            status = turned(t, s, 2 * i + 1, (size_t)t->item[2 * i + 1].shape.dim[1], 1, &v[1]);
        if (status == IPT_OK && is_lora) { /* without the padding */
            const size_t all = (size_t)t->site[i].n_rank;
            up = ipt_calloc(t->ctx, (size_t)m->out * rank, sizeof *up);
            status = up ? IPT_OK : IPT_ERR_NOMEM;
            for (size_t o = 0; o < (size_t)m->out && up; o++)
                memcpy(up + o * rank, v[1] + o * all, rank * sizeof *up);
        }
        if (status == IPT_OK)
            status = is_lora ? write_lora(t, i, v[0], up, out) : write_kron(t, i, v[0], v[1], out);
        ipt_free(v[0]);
        ipt_free(v[1]);
        ipt_free(up);
        IPT_TRY(status);
    }
    return IPT_OK;
}
